//! Do the emulated CUDA device and the conformance cases find what is wrong in a kernel? Each mutation below is a fault of a kind
//! that CUDA code has; it is planted alone in the kernel's text, compiled, and `attn2d verify` must fail.
#![cfg(feature = "cuda-emu")]

use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A fault: the kernel file with the type of storage it is compiled for, the op whose cases must find it, the sound text (once in the file) and the faulty one.
struct Mutation {
    what: &'static str,
    file: &'static str,
    op: &'static str,
    sound: &'static str,
    faulty: &'static str,
}

const MUTATIONS: &[Mutation] = &[
    Mutation {
        what: "no barrier between the steps of a product",
        file: "conv2d_f32",
        op: "conv2d",
        sound: "        __syncthreads();\n        float *swap = now;",
        faulty: "        float *swap = now;",
    },
    Mutation {
        what: "a window that starts one column late",
        file: "conv2d_f32",
        op: "conv2d",
        sound: "int(pixel % p.q * p.stride_w) - int(p.pad_w)",
        faulty: "int(pixel % p.q * p.stride_w) - int(p.pad_w) + 1",
    },
    Mutation {
        what: "weights read past the last output channel",
        file: "conv2d_f32",
        op: "conv2d",
        sound: "        else end = 0;",
        faulty: "        else this->w += o * end;",
    },
    Mutation {
        what: "the wrong stride of a row of the image",
        file: "conv2d_f32",
        op: "conv2d",
        sound: "return load<N>(x + (y * p.w + z) * p.c + at.c)",
        faulty: "return load<N>(x + (y * p.h + z) * p.c + at.c)",
    },
    Mutation {
        what: "taps of a gradient that are not turned round",
        file: "depthwise_f32",
        op: "conv2d",
        sound: "(turned ? K * K - 1 - tap : tap)",
        faulty: "tap",
    },
    Mutation {
        what: "tiles that begin where column + pad is odd",
        file: "depthwise_bf16",
        op: "conv2d",
        sound: "int(tile * T) - int(odd)",
        faulty: "int(tile * T)",
    },
    Mutation {
        what: "no barrier before the sums of the rows of threads are added",
        file: "depthwise_f16",
        op: "conv2d",
        sound: "    __syncthreads();\n    for (u32 e = threadIdx.x; e < width",
        faulty: "    for (u32 e = threadIdx.x; e < width",
    },
    Mutation {
        what: "the sum of a softmax that is not rescaled",
        file: "global_attention_f32",
        op: "global_attention",
        sound: "sum[i] *= factor;",
        faulty: "",
    },
    Mutation {
        what: "an output that is not rescaled",
        file: "global_attention_f32",
        op: "global_attention",
        sound: "out[i][j] *= factor;",
        faulty: "out[i][j] *= 1.0f;",
    },
    Mutation {
        what: "keys past the last that are not masked",
        file: "global_attention_f32",
        op: "global_attention",
        sound: "p.scale * s[i][j]) : -INFINITY;",
        faulty: "p.scale * s[i][j]) : 0.0f;",
    },
    Mutation {
        what: "no barrier before a tile is multiplied",
        file: "global_attention_f32",
        op: "global_attention",
        sound: "            store(m.left + row * D + c, v);\n        }\n        __syncthreads();",
        faulty: "            store(m.left + row * D + c, v);\n        }",
    },
    Mutation {
        what: "no barrier before scores are overwritten",
        file: "global_attention_bwd_f32",
        op: "global_attention",
        sound: "    __syncthreads();\n    UNROLL for (int j = 0; j < 4; j++) {\n        store(m.scores",
        faulty: "    UNROLL for (int j = 0; j < 4; j++) {\n        store(m.scores",
    },
    Mutation {
        what: "a gradient without the scale",
        file: "global_attention_bwd_f32",
        op: "global_attention",
        sound: "apply<D>(p, head, in.q, q0, chunk, p.scale, m, sum_k);",
        faulty: "apply<D>(p, head, in.q, q0, chunk, 1.0f, m, sum_k);",
    },
    Mutation {
        what: "scores past the last key that count",
        file: "global_attention_mma_f16",
        op: "global_attention",
        sound: ">= head.tokens) s[m][j][i] = -INFINITY;",
        faulty: ">= head.tokens) s[m][j][i] = 0.0f;",
    },
    Mutation {
        what: "rows on tensor cores that are not rescaled",
        file: "global_attention_mma_f16",
        op: "global_attention",
        sound: "out[n][i] *= factor[i / 2];",
        faulty: "out[n][i] *= 1.0f;",
    },
    Mutation {
        what: "keys overwritten by the tile after next",
        file: "global_attention_mma_f16",
        op: "global_attention",
        sound: "        copy_async_wait(0);\n        __syncthreads();\n        if (k0 + TILE",
        faulty: "        copy_async_wait(0);\n        __syncwarp();\n        if (k0 + TILE",
    },
    Mutation {
        what: "sums by position that forget the last tile",
        file: "global_attention_bwd_mma_f16",
        op: "global_attention",
        sound: "* LINE + lane_row() + i / 2 * 8] += c[i];",
        faulty: "* LINE + lane_row() + i / 2 * 8] = c[i];",
    },
    Mutation {
        what: "position terms read before all warps have made theirs",
        file: "global_attention_bwd_mma_f16",
        op: "global_attention",
        sound: "k0, false, true);\n            __syncthreads();",
        faulty: "k0, false, true);\n            __syncwarp();",
    },
    Mutation {
        what: "offsets that every warp adds",
        file: "global_attention_tables_mma_f16",
        op: "global_attention",
        sound: "if (o / 16 % 4 != warp) continue;",
        faulty: "",
    },
    Mutation {
        what: "a window that is one row off",
        file: "local_attention_f32",
        op: "local_attention",
        sound: "u32 row = at.y + a - p.kh / 2;",
        faulty: "u32 row = at.y + a - p.kh / 2 + 1;",
    },
    Mutation {
        what: "offsets of queries that are not negated",
        file: "local_attention_bwd_f32",
        op: "local_attention",
        sound: "u32 b = r + p.kw - 1 - j;",
        faulty: "u32 b = j - r;",
    },
    Mutation {
        what: "a band of keys that is overwritten while it is read",
        file: "local_attention_mma_f16",
        op: "local_attention",
        sound: "if (from > 0) __syncthreads();",
        faulty: "",
    },
    Mutation {
        what: "keys that are not waited for",
        file: "local_attention_mma_bf16",
        op: "local_attention",
        sound: "        copy_async_wait(0);\n",
        faulty: "",
    },
    Mutation {
        what: "a window as wide as what a patch sees",
        file: "local_attention_mma_f16",
        op: "local_attention",
        sound: "return x - left < width;",
        faulty: "return true;",
    },
    Mutation {
        what: "sums that are not rescaled for a logit far beyond the maximum",
        file: "local_attention_mma_bf16",
        op: "local_attention",
        sound: "sum[i] *= factor;",
        faulty: "",
    },
    Mutation {
        what: "offsets of queries on tensor cores that are not negated",
        file: "local_attention_bwd_mma_f16",
        op: "local_attention",
        sound: "u32 a = at.g / 4 + 2 * r + p.kh - 1 - chunk.row[k],",
        faulty: "u32 a = chunk.row[k] - at.g / 4 - 2 * r,",
    },
    Mutation {
        what: "sums of dS by column that are not moved to the query's offsets",
        file: "local_attention_bwd_mma_bf16",
        op: "local_attention",
        sound: "16 + query % 4 + offset - p.kh",
        faulty: "16 + offset - p.kh",
    },
    Mutation {
        what: "no barrier before a tile overwrites the last one",
        file: "local_attention_tables_mma_f16",
        op: "local_attention",
        sound: "        __syncthreads();\n        Patch<D> at(p, tile, g);",
        faulty: "        Patch<D> at(p, tile, g);",
    },
    Mutation {
        what: "moments that forget the distance of the means",
        file: "batch_norm_f32",
        op: "batch_norm",
        sound: " + delta * delta * (seen * share)",
        faulty: "",
    },
    Mutation {
        what: "a tree of sums that leaves out a level",
        file: "batch_norm_f32",
        op: "batch_norm",
        sound: "for (u32 half = at.step / 2; half > 0; half /= 2) {\n        __syncthreads();\n        if (at.row < half) {\n            UNROLL",
        faulty: "for (u32 half = at.step / 4; half > 0; half /= 2) {\n        __syncthreads();\n        if (at.row < half) {\n            UNROLL",
    },
    Mutation {
        what: "no barrier in a tree of sums",
        file: "layer_norm_f32",
        op: "layer_norm",
        sound: "half /= 2) {\n        __syncthreads();\n        if (at.row < half) {",
        faulty: "half /= 2) {\n        if (at.row < half) {",
    },
    Mutation {
        what: "half of a warp left out of its sum",
        file: "softmax_f32",
        op: "softmax",
        sound: "lane = 16; lane > 0; lane /= 2) v += ",
        faulty: "lane = 8; lane > 0; lane /= 2) v += ",
    },
    Mutation {
        what: "shared sums overwritten before all have read them",
        file: "cross_entropy_f32",
        op: "cross_entropy",
        sound: "    __syncthreads();\n    if (threadIdx.x % 32 == 0) shares",
        faulty: "    if (threadIdx.x % 32 == 0) shares",
    },
    Mutation {
        what: "a last window that is not asked",
        file: "max_pool2d_f32",
        op: "max_pool2d",
        sound: "least(at / stride + 1, count)",
        faulty: "least(at / stride, count)",
    },
    Mutation {
        what: "shared memory for four channels a thread, which has eight",
        file: "batch_norm_f16",
        op: "batch_norm",
        sound: "(2 * WIDE<Real> + 1) * 256",
        faulty: "9 * 256",
    },
    Mutation {
        what: "accesses of eight where rows are a multiple of four",
        file: "batch_norm_bf16",
        op: "batch_norm",
        sound: "if (channels % 8 == 0) return f(",
        faulty: "if (channels % 4 == 0) return f(",
    },
    Mutation {
        what: "a sum kept in 16 bits",
        file: "global_avg_pool_bf16",
        op: "global_avg_pool",
        sound: "total[k] += v.v[k];",
        faulty: "total[k] = to_float(rounded<Real>(total[k] + v.v[k]));",
    },
    Mutation {
        what: "the second word of places not read",
        file: "max_pool2d_f16",
        op: "max_pool2d",
        sound: "u32 word = places[e / 4 + j / 4];",
        faulty: "u32 word = places[e / 4];",
    },
    Mutation {
        what: "the random words of four elements used for eight",
        file: "dropout_bf16",
        op: "dropout",
        sound: "make_uint4((first + j) / 4,",
        faulty: "make_uint4(first / 4,",
    },
    Mutation {
        what: "means that are read before all are there",
        file: "squeeze_excite_f32",
        op: "squeeze_excite",
        sound: "mean[c] = total(p, part, image, c) / float(p.pixels);\n    __syncthreads();",
        faulty: "mean[c] = total(p, part, image, c) / float(p.pixels);",
    },
    Mutation {
        what: "one random word for four images",
        file: "stochastic_depth_f16",
        op: "stochastic_depth",
        sound: "u32 k = image % 4, word",
        faulty: "u32 k = 0, word",
    },
    Mutation {
        what: "places outside the image that count",
        file: "avg_pool2d_f32",
        op: "avg_pool2d",
        sound: "size + pad - start)}",
        faulty: "size + 2 * pad - start)}",
    },
    Mutation {
        what: "offsets of keys that are not negated",
        file: "lesa_f32",
        op: "lesa_logits",
        sound: "*place_k = table + s.row(j, i, s.e)",
        faulty: "*place_k = table + s.row(i, j, s.e)",
    },
    Mutation {
        what: "a tail moved by whole accesses",
        file: "optim_step_f32",
        op: "adamw_step",
        sound: "    if (i + 4 <= p.len) {\n        adamw<4>",
        faulty: "    if (i < p.len) {\n        adamw<4>",
    },
    Mutation {
        what: "no wait for an asynchronous copy",
        file: "tensor_cores_mma_bf16",
        op: "tensor_cores",
        sound: "    copy_async_wait(0);\n",
        faulty: "",
    },
    Mutation {
        what: "matrices that are not transposed",
        file: "tensor_cores_mma_f16",
        op: "tensor_cores",
        sound: "load_matrices_transposed(column,",
        faulty: "load_matrices(column,",
    },
    Mutation {
        what: "a tail that ends one early",
        file: "cast_bf16",
        op: "cast",
        sound: "else for (; i < p.len; i++) y[i] = rounded<Real>(x[i]);",
        faulty: "else for (; i + 1 < p.len; i++) y[i] = rounded<Real>(x[i]);",
    },
    Mutation {
        what: "another key schedule of the random numbers",
        file: "dropout_f32",
        op: "dropout",
        sound: "key.x += 0x9E3779B9u;",
        faulty: "key.x += 0x9E3779B8u;",
    },
    Mutation {
        what: "copies that are not waited for",
        file: "conv2d_mma_f16",
        op: "conv2d",
        sound: "copy_async_wait(STAGES - 2);",
        faulty: "copy_async_wait(STAGES - 1);",
    },
    Mutation {
        what: "no barrier between a product and its tile in shared memory",
        file: "conv2d_mma_f16",
        op: "conv2d",
        sound: "    __syncthreads();\n    UNROLL for (int j = 0; j < BN / 16; j++) {\n        u32 column = warp",
        faulty: "    UNROLL for (int j = 0; j < BN / 16; j++) {\n        u32 column = warp",
    },
    Mutation {
        what: "pixels past the last that are read",
        file: "conv2d_mma_bf16",
        op: "conv2d",
        sound: "p.p * p.stride_h - p.pad_h : 0x80000000u",
        faulty: "p.p * p.stride_h - p.pad_h : 0u",
    },
    Mutation {
        what: "a stage that is filled while it is multiplied",
        file: "conv2d_bwd_mma_f16",
        op: "conv2d",
        sound: "        copy_async_wait(STAGES - 2);\n        __syncthreads();\n",
        faulty: "        copy_async_wait(STAGES - 2);\n        __syncwarp();\n",
    },
    Mutation {
        what: "parts of a weight gradient that share a pixel",
        file: "conv2d_bwd_mma_bf16",
        op: "conv2d",
        sound: "end = least(begin + part, pixels);",
        faulty: "end = least(begin + part + 1, pixels);",
    },
    Mutation {
        what: "a phase of the stride that steps in whole pixels",
        file: "conv2d_bwd_mma_f16",
        op: "conv2d",
        sound: "p.kh * row, p.stride_w * p.c,",
        faulty: "p.kh * row, p.c,",
    },
    Mutation {
        what: "statistics that count pixels past the last",
        file: "conv2d_ends_f32",
        op: "conv_block",
        sound: "mine = rows > ty * 4 ? rows - ty * 4 : 0;",
        faulty: "mine = 4;",
    },
    Mutation {
        what: "no barrier before a column's sums are joined",
        file: "conv2d_ends_f32",
        op: "conv_block",
        sound: "    __syncthreads();\n    UNROLL for (int j = 0; j < B / 16; j += 4) {\n        Pack<4> total",
        faulty: "    UNROLL for (int j = 0; j < B / 16; j += 4) {\n        Pack<4> total",
    },
    Mutation {
        what: "statistics of half of a fragment's rows",
        file: "conv2d_ends_mma_f16",
        op: "conv_block",
        sound: "lane = 4; lane < 32; lane *= 2) v +=",
        faulty: "lane = 8; lane < 32; lane *= 2) v +=",
    },
    Mutation {
        what: "statistics of one warp over those of another",
        file: "conv2d_ends_mma_bf16",
        op: "conv_block",
        sound: "part + first / (BM / 2) * 2 * p.o",
        faulty: "part + first / BM * 2 * p.o",
    },
    Mutation {
        what: "an activation before the residual too",
        file: "conv2d_ends_mma_f16",
        op: "conv_block",
        sound: "return p.residual ? z : activated(p, z);",
        faulty: "return activated(p, z);",
    },
    Mutation {
        what: "a mean read before all blocks are in it",
        file: "batch_norm_f32",
        op: "batch_norm",
        sound: "    add_rows<1>(sum, shares, at);\n    __syncthreads();\n",
        faulty: "    add_rows<1>(sum, shares, at);\n",
    },
    Mutation {
        what: "a tile whose images are all the last one",
        file: "attention_block_f32",
        op: "attention_block",
        sound: "Head head(at, image, g);",
        faulty: "Head head(at, end - 1, g);",
    },
    Mutation {
        what: "gradients of k and v that pass the weight of q",
        file: "attention_block_mma_f16",
        op: "attention_block",
        sound: "share.move(i, tile, w.of(inside ? k / depth : 0),",
        faulty: "share.move(i, tile, w.of(0),",
    },
];

/// The C++ that `build.rs` made of a kernel file.
fn generated(file: &str) -> String {
    let path = Path::new(env!("OUT_DIR")).join(format!("kernels/emu_{file}.cpp"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn compile(arguments: &[&str]) {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let root = env!("CARGO_MANIFEST_DIR");
    let output = Command::new(compiler)
        .current_dir(root)
        .args(["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"])
        .args(["-DATTN2D_EMU_REPLACEMENT", "-Ikernels/emu"])
        .args(arguments)
        .output()
        .expect("a C++ compiler built this test's emulator");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A shared object with the emulator and the kernels of one text.
fn library(folder: &Path, emulator: &str, text: &str) -> PathBuf {
    let entries: Vec<&str> =
        text.lines().filter_map(|l| l.strip_prefix("EMU_EXPORT(")?.split(',').next()).collect();
    let mut source =
        format!("{text}\nextern \"C\" const emu::Kernel *const attn2d_emu_kernels[];\n");
    source += "const emu::Kernel *const attn2d_emu_kernels[] = {\n";
    for entry in entries {
        source += &format!("    &attn2d_emu_{entry},\n");
    }
    source += "    nullptr};\n";
    let (cpp, so) = (folder.join("kernels.cpp"), folder.join("kernels.so"));
    std::fs::write(&cpp, source).unwrap();
    let [cpp, so_name] = [&cpp, &so].map(|p| p.display().to_string());
    compile(&["-shared", "-Wl,-Bsymbolic", "-o", &so_name, &cpp, emulator]);
    so
}

/// Whether `attn2d verify` passes with these kernels, and what it says.
fn verify(op: &str, precision: &str, library: &Path) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_attn2d"))
        .args(["verify", "--device", "cuda-emu", "--require", "cuda-emu", "--op", op])
        .args(["--precision", precision, "--fail-fast"])
        .env("ATTN2D_EMU_LIBRARY", library)
        .env_remove("ATTN2D_EMU_SCHEDULE")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// Plants a fault and says whether verification fails by it.
fn is_found(m: &Mutation, folder: &Path, emulator: &str) -> bool {
    let text = generated(m.file);
    let found = text.matches(m.sound).count();
    assert_eq!(found, 1, "'{}': its text stands {found} times in {}", m.what, m.file);
    std::fs::create_dir(folder).unwrap();
    let faulty = library(folder, emulator, &text.replace(m.sound, m.faulty));
    let precision = m.file.rsplit('_').next().unwrap();
    let (passed, text) = verify(m.op, precision, &faulty);
    let line = text.lines().find(|l| l.starts_with("FAIL"));
    println!("{}: {}\n    {}", m.file, m.what, line.unwrap_or("(no FAIL line)"));
    !passed && line.is_some()
}

#[test]
fn every_planted_fault_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let emulator = folder.path().join("emu.o").display().to_string();
    compile(&["-r", "kernels/emu/emu.cpp", "kernels/emu/launch.cpp", "-o", &emulator]);

    // The same way without a fault passes: what fails below fails by the fault.
    let sound = library(folder.path(), &emulator, &generated("conv2d_f32"));
    let (passed, text) = verify("conv2d", "f32", &sound);
    assert!(passed, "{text}");

    let missed: Vec<String> = MUTATIONS
        .par_iter()
        .enumerate()
        .filter(|(i, m)| !is_found(m, &folder.path().join(i.to_string()), &emulator))
        .map(|(_, m)| format!("{} ({})", m.what, m.file))
        .collect();
    assert!(missed.is_empty(), "not found: {missed:#?}");
    assert!(MUTATIONS.len() >= 10);
}
