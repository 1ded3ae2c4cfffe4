#!/usr/bin/env python3
"""Our benchmarks beside PyTorch's, one row after the other on this machine: ours, PyTorch, PyTorch keeping freed memory, ours.

    pip install torch torchvision
    python benches/peers/compare.py OUT.json [--only REGEX] [--suite ops,step] [--threads 2]   measure, add to OUT.json, print the table
    python benches/peers/compare.py OUT.json --table                           only print what OUT.json holds

A row's time is forward and backward in milliseconds: ours the mean of the medians of the two runs (criterion's
`new/estimates.json`), PyTorch's the least of all ways that `torch_bench.py` tries. Ratio = PyTorch's time / ours: above 1
ours is faster. Rows that OUT.json has already are measured again only where they match `--only`.
"""
import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEER = ROOT / "benches/peers/torch_bench.py"


def lines(*command):
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines()


def our_rows(suites, path):
    """The rows of suites, in their order; `path` gets what the peers read."""
    lines("cargo", "run", "--release", "--quiet", "--", "bench", *suites.split(","), "--list", "--json", path)
    return [row["name"] for row in json.loads(pathlib.Path(path).read_text())["rows"]]


def ours(row, threads):
    """Criterion's median of one row, in milliseconds."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    estimates = target / "criterion" / row / "new/estimates.json"
    estimates.unlink(missing_ok=True)
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    command = ["cargo", "bench", "--quiet", "--bench", "ops", "--bench", "step", "--", "--noplot", f"^{row}$"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode != 0 or not estimates.exists():
        sys.exit(f"{' '.join(command)}\n{run.stderr}{row}: no estimates at {estimates}")
    return json.loads(estimates.read_text())["median"]["point_estimate"] / 1e6


def theirs(row, threads, rows, out, *more):
    command = [sys.executable, PEER, rows, out, "--only", f"^{row}$", "--threads", str(threads), *more]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def measure(row, rows, threads):
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/torch.json"
        first = ours(row, threads)
        theirs(row, threads, rows, out)
        theirs(row, threads, rows, out, "--keep-memory")
        second = ours(row, threads)
        theirs_now = json.loads(pathlib.Path(out).read_text())["rows"][0]
    ways = {way: times["ms"] for way, times in theirs_now["ways"].items()}
    if not ways:
        sys.exit(f"{row}: PyTorch has no way: {theirs_now['failed']}")
    best = min(ways.values())
    mean = (first + second) / 2
    return {
        "ours_ms": round(mean, 4),
        "our_runs_ms": [round(first, 4), round(second, 4)],
        "torch_ms": best,
        "torch_way": min(ways, key=ways.get),
        "ratio": round(best / mean, 3),
        "torch_ways_ms": ways,
        "load": round(os.getloadavg()[0], 2),
        "commit": lines("git", "rev-parse", "--short", "HEAD")[0],
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def machine(threads):
    info = pathlib.Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()).group(1) if info.exists() else platform.processor()
    versions = lines(sys.executable, "-c", "import torch, torchvision; print(torch.__version__, torchvision.__version__)")
    torch, torchvision = versions[0].split()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "rustc": lines("rustc", "--version")[0],
        "torch": torch,
        "torchvision": torchvision,
    }


def table(results):
    print("| row | ours ms | PyTorch ms | its best way | ratio | ratio without kept memory |\n|---|---|---|---|---|---|")
    for name, row in results["rows"].items():
        way = row["torch_way"].replace("_", " ")
        unkept = min(ms for key, ms in row["torch_ways_ms"].items() if not key.endswith("_kept")) / row["ours_ms"]
        print(f"| {name} | {row['ours_ms']:.4g} | {row['torch_ms']:.4g} | {way} | {row['ratio']:.2f} | {unkept:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="the JSON file to add to")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the rows whose name matches")
    parser.add_argument("--suite", default="ops,step", metavar="SUITES", help="suites of `attn2d bench` (default: ops,step)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"machine": {}, "rows": {}}
    if not args.table:
        results["machine"] = machine(args.threads)
        with tempfile.TemporaryDirectory() as folder:
            rows = f"{folder}/rows.json"
            for row in our_rows(args.suite, rows):
                if re.search(args.only, row):
                    results["rows"][row] = measure(row, rows, args.threads)
                    print(row, json.dumps(results["rows"][row]), file=sys.stderr, flush=True)
                    args.out.write_text(json.dumps(results, indent=1) + "\n")
    table(results)


if __name__ == "__main__":
    main()
