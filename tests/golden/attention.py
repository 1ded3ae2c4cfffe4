"""Two-dimensional self-attention, written out plainly: the definition that the kernels are held to.

    q, k, v: [N, H, W, G, d]  ->  y: [N, H, W, G, d]

With a query at (i, j), a key at (i', j') and the offset (a, b) = (i' - i, j' - j), key minus query:

    logit = scale * <q, k>  +  <q, rel_h[a] + rel_w[b]>  +  bias[g, a, b]
    y     = sum over keys of softmax(logit) * v

The position terms are optional and are not multiplied by `scale`. Tables are indexed from the most negative offset:

    global   row a + H-1 of rel_h [2H-1, G*d], row b + W-1 of rel_w [2W-1, G*d], bias [G, 2H-1, 2W-1]
    local    row a + (kh-1)/2 of rel_h [kh, G*d], row b + (kw-1)/2 of rel_w [kw, G*d], bias [G, kh, kw]

Nothing here is fast. One query at a time, its keys gathered, no broadcasting trick that could hide a mistake twice.
"""
import torch


def attend(q, keys, values, rel, bias, scale):
    """One query position. q [N,G,d], keys and values [K,N,G,d], rel [K,G,d] or None, bias [K,G] or None -> [N,G,d]."""
    logits = scale * torch.einsum("ngd,kngd->kng", q, keys)
    if rel is not None:
        logits = logits + torch.einsum("ngd,kgd->kng", q, rel)
    if bias is not None:
        logits = logits + bias[:, None, :]
    return torch.einsum("kng,kngd->ngd", torch.softmax(logits, 0), values)


def positions(offsets, center, heads, rel_h, rel_w, bias):
    """The position terms of a list of offsets (a, b): rel [K,G,d] or None, bias [K,G] or None."""
    rows = torch.tensor([a + center[0] for a, _ in offsets])
    cols = torch.tensor([b + center[1] for _, b in offsets])
    rel = None
    if rel_h is not None:
        rel = rel_h[rows]
    if rel_w is not None:
        rel = rel_w[cols] if rel is None else rel + rel_w[cols]
    if rel is not None:
        rel = rel.reshape(len(offsets), heads, -1)
    return rel, None if bias is None else bias[:, rows, cols].T


def global_attention(q, k, v, rel_h=None, rel_w=None, bias=None, *, scale):
    """Every query attends to the whole map."""
    n, h, w, heads, d = q.shape
    places = [(i, j) for i in range(h) for j in range(w)]
    keys = k.reshape(n, h * w, heads, d).transpose(0, 1)
    values = v.reshape(n, h * w, heads, d).transpose(0, 1)
    out = []
    for i, j in places:
        offsets = [(ki - i, kj - j) for ki, kj in places]
        rel, b = positions(offsets, (h - 1, w - 1), heads, rel_h, rel_w, bias)
        out.append(attend(q[:, i, j], keys, values, rel, b, scale))
    return torch.stack(out, 1).reshape(n, h, w, heads, d)


def local_attention(q, k, v, rel_h=None, rel_w=None, bias=None, *, kernel, border, scale):
    """Every query attends to the kh x kw window around it.

    border "mask": places outside the map leave the softmax. border "zero": they stay, with k = v = 0, so their logit is
    the position term alone.
    """
    n, h, w, heads, d = q.shape
    center = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    window = [(a - center[0], b - center[1]) for a in range(kernel[0]) for b in range(kernel[1])]
    nothing = torch.zeros_like(k[:, 0, 0])
    out = []
    for i in range(h):
        for j in range(w):
            inside = {(a, b): 0 <= i + a < h and 0 <= j + b < w for a, b in window}
            offsets = [o for o in window if inside[o] or border == "zero"]
            keys = torch.stack([k[:, i + a, j + b] if inside[a, b] else nothing for a, b in offsets])
            values = torch.stack([v[:, i + a, j + b] if inside[a, b] else nothing for a, b in offsets])
            rel, b = positions(offsets, center, heads, rel_h, rel_w, bias)
            out.append(attend(q[:, i, j], keys, values, rel, b, scale))
    return torch.stack(out, 1).reshape(n, h, w, heads, d)


def lesa_logits(qkv, table):
    """The three kinds of logits of LESA. qkv [N,L,G,4e]: of each head q (e numbers), k (e), v (2e); table [2L-1,4e]: a row for each offset
    of the flattened pixels, from the most negative -> [N,L,L,3G], kinds one after the other."""
    n, length, heads, width = qkv.shape
    e = width // 4
    q, k = qkv[..., :e], qkv[..., e:2 * e]
    rows = []
    for i in range(length):
        row = []
        for j in range(length):
            same = (q[:, i] * k[:, j]).sum(-1)
            by_query = q[:, i] @ table[i - j + length - 1, :e]
            by_key = k[:, j] @ table[j - i + length - 1, e:2 * e]
            row.append(torch.cat([same, by_query, by_key], -1))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def lesa_context(logits, qkv, table):
    """What LESA's softmax makes of values and of their positions: logits [N,L,L,3G] -> [N,L,2,2eG]."""
    n, length, heads, width = qkv.shape
    v, places = qkv[..., width // 2:], table[:, width // 2:]
    weights = torch.softmax(logits.reshape(n, length, length, 3, heads).sum(3), 2)
    out = []
    for i in range(length):
        rows = torch.stack([places[i - j + length - 1] for j in range(length)])
        of_values = torch.einsum("njg,njgc->ngc", weights[:, i], v)
        of_places = torch.einsum("njg,jc->ngc", weights[:, i], rows)
        out.append(torch.stack([of_values.reshape(n, -1), of_places.reshape(n, -1)], 1))
    return torch.stack(out, 1)


def check():
    """The definitions above agree with PyTorch's fused attention where it has the same function, and with each other:
    a masked window of 2H-1 x 2W-1 sees the whole map, with tables of the same size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        n, h, w, heads, d = 2, 3, 4, 2, 5
        q, k, v = (torch.randn(n, h, w, heads, d, dtype=torch.float64) for _ in range(3))
        tables = [torch.randn(*s, dtype=torch.float64) for s in ((5, 10), (7, 10), (2, 5, 7))]
    flat = [t.reshape(n, h * w, heads, d).transpose(1, 2) for t in (q, k, v)]
    fused = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(q.shape)
    torch.testing.assert_close(global_attention(q, k, v, scale=d**-0.5), fused)
    local = local_attention(q, k, v, *tables, kernel=(5, 7), border="mask", scale=0.3)
    torch.testing.assert_close(local, global_attention(q, k, v, *tables, scale=0.3))
