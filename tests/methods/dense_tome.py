# SPDX-License-Identifier: MIT
"""ToMe in a ViT, written out: explicit attention weights, token by token, with the dense source matrix.

Straight from section 3 of the paper, for a timm VisionTransformer's weights, and sharing no code with the package.
"""

import torch


def forward(model, images, schedule, proportional=True):
    """Final tokens after the norm (B, N', C), their sizes (B, N'), and the source matrices (B, N', N)."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    results = [image_forward(model, tokens, schedule, proportional) for tokens in x]
    x, sizes, sources = (torch.stack(parts) for parts in zip(*results, strict=True))
    return model.norm(x), sizes, sources


def image_forward(model, x, schedule, proportional):
    size = torch.ones(len(x), dtype=x.dtype)
    source = torch.eye(len(x), dtype=x.dtype)
    prefix = model.num_prefix_tokens
    for block, r in zip(model.blocks, schedule, strict=True):
        attended, keys = attention(block.attn, block.norm1(x), size if proportional else torch.ones_like(size))
        x = x + block.ls1(attended)
        groups = choose(keys.mean(0), min(r, (len(x) - prefix) // 2), prefix)
        x = torch.stack([sum(size[i] * x[i] for i in group) / sum(size[i] for i in group) for group in groups])
        size = torch.stack([sum(size[i] for i in group) for group in groups])
        source = torch.stack([sum(source[i] for i in group) for group in groups])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, size, source


def attention(layer, x, size):
    """Output (N, C) and keys (H, N, d)."""
    tokens, heads = len(x), layer.num_heads
    q, k, v = (part.reshape(tokens, heads, -1).transpose(0, 1) for part in layer.qkv(x).chunk(3, dim=-1))
    q, k = layer.q_norm(q), layer.k_norm(k)
    weights = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5 + size.log()
    y = weights.softmax(-1) @ v
    return layer.proj(layer.norm(y.transpose(0, 1).reshape(tokens, -1))), k


def choose(metric, r, prefix):
    """The members of each merged token, in order; a plain list for each."""
    tokens = len(metric)
    if r <= 0:
        return [[i] for i in range(tokens)]
    metric = metric.detach()
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best = {}
    for i in range(0, tokens, 2):
        if i >= prefix:
            similarity, j = max((float(unit[i] @ unit[j]), -j) for j in range(1, tokens, 2) if j >= prefix)
            best[i] = (similarity, -j)
    by_similarity = sorted(best, key=lambda i: -best[i][0])
    joins, stays = by_similarity[:r], by_similarity[r:]
    if prefix:
        stays = sorted(stays)
    groups = [[i] for i in range(prefix)] + [[i] for i in stays]
    return groups + [[j, *(i for i in joins if best[i][1] == j)] for j in range(1, tokens, 2) if j >= prefix]
