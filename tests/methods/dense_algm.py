# SPDX-License-Identifier: MIT
"""Plain implementation of ALGM for a timm VisionTransformer: all cosines, token by token, and dense source matrices.

It follows section 3 of the paper and the published code, and shares no code with the package.
"""

import torch


def forward(
    model, images, grid, layers, *, window=(2, 2), threshold, counts=None, proportional=False, global_threshold=None
):
    """Final tokens after the norm (B, N', C), their sizes (B, N'), and the source matrices (B, N', N).

    `counts` has a fixed number for each layer; without, the smallest over the batch that the thresholds give.
    """
    x = list(model.norm_pre(model._pos_embed(model.patch_embed(images))))
    sizes = [torch.ones(len(tokens), dtype=tokens.dtype) for tokens in x]
    sources = [torch.eye(len(tokens), dtype=tokens.dtype) for tokens in x]
    prefix = model.num_prefix_tokens
    for number, block in enumerate(model.blocks):
        for i, tokens in enumerate(x):
            size = sizes[i] if proportional else torch.ones_like(sizes[i])
            x[i] = tokens + block.ls1(attention(block.attn, block.norm1(tokens), size))
        if number in layers:
            count = None if counts is None else counts[layers.index(number)]
            if number == layers[0]:
                groups = window_groups([tokens.detach() for tokens in x], grid, window, threshold, prefix, count)
            else:
                groups = pair_groups([tokens.detach() for tokens in x], number, global_threshold, prefix, count)
            for i, of_image in enumerate(groups):
                x[i] = torch.stack([mean(x[i], sizes[i], group) for group in of_image])
                sources[i] = torch.stack([sources[i][group].sum(0) for group in of_image])
                sizes[i] = torch.stack([sizes[i][group].sum() for group in of_image])
        x = [tokens + block.ls2(block.mlp(block.norm2(tokens))) for tokens in x]
    return model.norm(torch.stack(x)), torch.stack(sizes), torch.stack(sources)


def mean(x, size, group):
    return sum(size[i] * x[i] for i in group) / sum(size[i] for i in group)


def attention(layer, x, size):
    """(N, C)."""
    tokens, heads = len(x), layer.num_heads
    q, k, v = (part.reshape(tokens, heads, -1).transpose(0, 1) for part in layer.qkv(x).chunk(3, dim=-1))
    q, k = layer.q_norm(q), layer.k_norm(k)
    weights = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5 + size.log()
    y = weights.softmax(-1) @ v
    return layer.proj(layer.norm(y.transpose(0, 1).reshape(tokens, -1)))


def cosines(x):
    """Return the cosines of all pairs of tokens, as nested lists."""
    unit = x / x.norm(dim=-1, keepdim=True)
    return (unit @ unit.T).tolist()


def window_groups(images, grid, window, threshold, prefix, count):
    """For each image the members of each merged token, in order."""
    found = [window_similarities(x, grid, window, prefix) for x in images]
    if count is None:
        count = min(sum(value >= threshold for value, _ in windows) for windows in found)
    results = []
    for x, windows in zip(images, found, strict=True):
        best = sorted(windows, key=lambda entry: -entry[0])[:count]
        merged = [members for _, members in best]
        gone = {i for members in merged for i in members}
        rest = [[i] for i in range(prefix, len(x)) if i not in gone]
        results.append([[i] for i in range(prefix)] + merged + rest)
    return results


def window_similarities(x, grid, window, prefix):
    """Mean cosine of the pairs of each window that lies wholly inside the grid, and its tokens."""
    windows, cosine = [], cosines(x)
    for top in range(0, grid[0] - window[0] + 1, window[0]):
        for left in range(0, grid[1] - window[1] + 1, window[1]):
            members = [prefix + (top + i) * grid[1] + left + j for i in range(window[0]) for j in range(window[1])]
            pairs = [cosine[a][b] for a in members for b in members if a != b]
            windows.append((sum(pairs) / len(pairs), members))
    return windows


def pair_groups(images, layer, threshold, prefix, count):
    """For each image the members of each merged token, in order."""
    found = [best_partners(x, prefix) for x in images]
    if count is None:
        scores = [torch.tensor([value for value, _ in best.values()], dtype=torch.float64) for best in found]
        if threshold is None:
            means, stds = ([getattr(s, name)() for s in scores] for name in ("mean", "std"))
            threshold = sum(means) / len(means) + sum(stds) / len(stds) / (layer + 1)
        count = min(int((s >= threshold).sum()) for s in scores)
    results = []
    for x, best in zip(images, found, strict=True):
        tokens = len(x)
        own = min(count, (tokens - prefix) // 2)
        by_similarity = sorted(best, key=lambda i: -best[i][0])
        joins, stays = by_similarity[:own], by_similarity[own:]
        if own == 0:
            results.append([[i] for i in range(tokens)])
            continue
        if prefix:
            stays = sorted(stays)
        groups = [[i] for i in range(prefix)] + [[i] for i in stays]
        odd = [j for j in range(1, tokens, 2) if j >= prefix]
        results.append(groups + [[j, *(i for i in joins if best[i][1] == j)] for j in odd])
    return results


def best_partners(x, prefix):
    """Highest cosine, and the odd token that has it, of each even token after the prefix."""
    best, cosine = {}, cosines(x)
    for i in range(0, len(x), 2):
        if i >= prefix:
            similarity, j = max((cosine[i][j], -j) for j in range(1, len(x), 2) if j >= prefix)
            best[i] = (similarity, -j)
    return best
