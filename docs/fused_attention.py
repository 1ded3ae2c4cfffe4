"""Draws docs/fused_attention.svg, the picture of the README: python3 docs/fused_attention.py

The weights in the window are a real softmax, of scores that are made up; the sizes on the right are arithmetic.
"""

import math
from pathlib import Path

INK, SOFT, LINE = "#1f2933", "#52606d", "#cbd2d9"
QUERY, KEY, TABLE, GOOD = "#d9480f", "#1864ab", "#5f3dc4", "#2b8a3e"
out = []


def add(text):
    out.append(text)


def text(x, y, words, size=13, fill=INK, weight="normal", anchor="start", mono=False, style="normal"):
    family = "ui-monospace, Menlo, Consolas, monospace" if mono else "Helvetica, Arial, sans-serif"
    add(
        f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size:g}" fill="{fill}" '
        f'font-weight="{weight}" font-style="{style}" text-anchor="{anchor}">{words}</text>'
    )


def rect(x, y, w, h, fill="none", stroke=LINE, width=1.0, radius=0.0, dash=""):
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    add(
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{width:g}"{dash}/>'
    )


def arrow(x1, y1, x2, y2, stroke=SOFT, width=1.4, bend=0.0):
    mx, my = (x1 + x2) / 2 - bend * (y2 - y1), (y1 + y2) / 2 + bend * (x2 - x1)
    add(
        f'<path d="M{x1:g} {y1:g} Q{mx:g} {my:g} {x2:g} {y2:g}" fill="none" stroke="{stroke}" '
        f'stroke-width="{width:g}" marker-end="url(#tip)" color="{stroke}"/>'
    )


def blend(share, colour=(0x18, 0x64, 0xAB)):
    """White at 0, the colour at 1."""
    return "#" + "".join(f"{round(255 + (c - 255) * share):02x}" for c in colour)


def window(x0, y0, cell=22, rows=10, columns=12, query=(2, 4), reach=3):
    """A feature map, and the softmax over the places that the query sees."""
    score = lambda a, b: 2.6 * math.exp(-((a - 2) ** 2 + (b - 2) ** 2) / 2.5) + 1.5 * math.exp(-(a * a + b * b) / 3)
    places = [(query[0] + a, query[1] + b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1)]
    inside = [p for p in places if 0 <= p[0] < rows and 0 <= p[1] < columns]
    exps = {p: math.exp(score(p[0] - query[0], p[1] - query[1])) for p in inside}
    top = max(exps.values())
    for row in range(rows):
        for column in range(columns):
            share = exps.get((row, column), 0) / top
            rect(x0 + column * cell, y0 + row * cell, cell, cell, blend(0.95 * share) if share else "#f8f9fa")
    for row, column in places:
        if (row, column) not in exps:
            rect(x0 + column * cell, y0 + row * cell, cell, cell, "url(#hatch)", LINE)
    left, upper = x0 + (query[1] - reach) * cell, y0 + (query[0] - reach) * cell
    rect(left, upper, (2 * reach + 1) * cell, (2 * reach + 1) * cell, "none", KEY, 2, 3, "6 3")
    qx, qy = x0 + query[1] * cell, y0 + query[0] * cell
    rect(qx, qy, cell, cell, QUERY, QUERY, 1, 2)
    text(qx + cell / 2, qy + cell * 0.72, "q", 14, "white", "bold", "middle")
    kx, ky = qx + 2 * cell, qy + 2 * cell
    rect(kx, ky, cell, cell, "none", "white", 2, 2)
    text(kx + cell / 2, ky + cell * 0.72, "k", 14, "white", "bold", "middle")
    return left, upper, (kx + cell, ky + cell / 2)


def vector(x, y, values, colour, cell=13):
    for i, value in enumerate(values):
        rect(x + i * cell, y, cell, cell, blend(value, colour), "white", 1)
    rect(x, y, cell * len(values), cell, "none", "#868e96", 1, 1)


def strip(x, y, rows, lit, label, index, cell=11, width=52):
    """A table with a row for each offset; the row that this key needs is lit."""
    for i in range(rows):
        rect(x, y + i * cell, width, cell, TABLE if i == lit else "#e5dbff", "white", 1)
    text(x + width / 2, y - 6, label, 12, TABLE, "bold", "middle", True)
    text(x + width + 5, y + lit * cell + 9, index, 12, TABLE, mono=True)


def bar(x, y, label, mib, colour, scale):
    text(x, y, label, 12.5)
    width = max(mib * scale, 1.5)
    rect(x, y + 6, width, 13, colour, colour, 0)
    text(x + width + 6, y + 17, f"{mib:.1f} MiB", 12, SOFT)


def main():
    width, height = 1000, 392
    add(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">')
    add("<title>Fused local attention: a query sees a window, scores are never stored, little is kept</title>")
    add('<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">')
    add(f'<path d="M0 0L8 4L0 8z" fill="{SOFT}"/></marker>')
    add('<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">')
    add('<rect width="6" height="6" fill="white"/><line x1="0" y1="0" x2="0" y2="6" stroke="#adb5bd" stroke-width="1.5"/></pattern></defs>')
    rect(0.5, 0.5, width - 1, height - 1, "white", LINE, 1, 10)

    text(24, 36, "1  A query sees a window", 17, weight="bold")
    left, upper, key = window(32, 92)
    text(left, upper - 7, "outside the map: masked", 12, SOFT)
    text(32, 334, "Shades: the softmax over the window.", 13, SOFT)
    text(32, 353, "Global attention: it is the whole map.", 13, SOFT)

    x = 344
    text(x - 10, 36, "2  Each score lives in a register", 17, weight="bold")
    vector(x, 58, [0.9, 0.3, 0.6, 0.8, 0.2, 0.5], (0xD9, 0x48, 0x0F))
    text(x + 86, 69, "q", 14, QUERY, "bold")
    vector(x, 78, [0.4, 0.8, 0.5, 0.9, 0.3, 0.7], (0x18, 0x64, 0xAB))
    text(x + 86, 89, "k", 14, KEY, "bold")
    strip(x + 128, 66, 7, 5, "rel_h", "a")
    strip(x + 212, 66, 7, 5, "rel_w", "b")
    text(x, 112, "offset of k from q:", 12, SOFT)
    text(x, 128, "a rows, b columns", 12, SOFT)
    arrow(key[0] + 2, key[1], x - 12, 84, KEY, 1.6, -0.12)
    rect(x - 10, 160, 304, 34, "#f1f3f5", "#f1f3f5", 1, 6)
    text(x, 182, "s = q&#183;k/&#8730;d + q&#183;(rel_h[a] + rel_w[b])", 13, mono=True)
    text(x, 220, "Then, key after key, a running softmax:", 13, SOFT)
    for i, line in enumerate(
        [
            "m&#8242; = max(m, s)",
            "l&#8242; = e^(m&#8722;m&#8242;)&#183;l + e^(s&#8722;m&#8242;)",
            "o&#8242; = e^(m&#8722;m&#8242;)&#183;o + e^(s&#8722;m&#8242;)&#183;v",
        ]
    ):
        text(x + 14, 244 + 21 * i, line, 13.5, mono=True)
    rect(x - 10, 304, 304, 54, "#ebfbee", "#ebfbee", 1, 6)
    text(x, 326, "y = o / l", 13.5, GOOD, "bold", mono=True)
    text(x + 112, 326, "the output", 12.5, SOFT)
    text(x, 347, "L = m + ln l", 13.5, GOOD, "bold", mono=True)
    text(x + 112, 347, "one number a query, head", 12.5, SOFT)

    x = 684
    text(x - 10, 36, "3  What has to be kept", 17, weight="bold")
    text(x, 62, "one image: 56&#215;56 places, 64 channels,", 12.5, SOFT)
    text(x, 79, "8 heads, 7&#215;7 window, 32-bit floats", 12.5, SOFT)
    places, channels, heads, keys, mib = 56 * 56, 64, 8, 49, 4 / 2**20
    unfolded, scores = 2 * places * channels * keys * mib, places * heads * keys * mib
    scale = 205 / unfolded
    text(x, 108, "Unfolded, the usual way:", 13, weight="bold")
    bar(x, 130, "keys and values of every window", unfolded, "#868e96", scale)
    bar(x, 168, "the softmax of every window", scores, "#868e96", scale)
    text(x, 214, "Fused:", 13, weight="bold")
    bar(x, 236, "y and L", (places * channels + places * heads) * mib, GOOD, scale)
    text(x, 286, "Backward makes the scores again,", 13, SOFT)
    text(x, 305, "p = e^(s&#8722;L), and every key gathers its", 13, SOFT)
    text(x, 324, "gradient from the queries that see it:", 13, SOFT)
    text(x, 343, "no atomics, the same bits every run.", 13, SOFT)
    for line in (318, 660):
        add(f'<line x1="{line}" y1="24" x2="{line}" y2="{height - 24}" stroke="{LINE}"/>')
    add("</svg>")
    Path(__file__).with_suffix(".svg").write_text("\n".join(out) + "\n", encoding="utf-8")


main()
