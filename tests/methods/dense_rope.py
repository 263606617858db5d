# SPDX-License-Identifier: MIT
"""ToMe in a ViT with rotary positions, written out: scores token by token, with the members of each token.

The score of two merged tokens is the mean, over every member of the one and every member of the other, of the score
that the two would have in these members' places. For a timm Eva's weights, and sharing no code with the package.
"""

import torch
from torch.nn import functional as F


def forward(model, images, schedule, choose, proportional=True):
    """Final tokens after the norm (B, N', C), and of each image the members of each token."""
    x, rope = model._pos_embed(model.patch_embed(images))
    x = model.norm_pre(x)
    results = [image_forward(model, tokens, rope, schedule, choose, proportional) for tokens in x]
    return model.norm(torch.stack([tokens for tokens, _ in results])), [members for _, members in results]


def image_forward(model, x, rope, schedule, choose, proportional):
    members = [[i] for i in range(len(x))]
    prefix = model.num_prefix_tokens
    for block, r in zip(model.blocks, schedule, strict=True):
        attended, keys = attention(block.attn, block.norm1(x), rope, members, prefix, proportional)
        x = x + (attended if block.gamma_1 is None else block.gamma_1 * attended)
        groups = choose(keys.mean(0), min(r, (len(x) - prefix) // 2), prefix)
        size = [len(own) for own in members]
        x = torch.stack([sum(size[i] * x[i] for i in group) / sum(size[i] for i in group) for group in groups])
        members = [[place for i in group for place in members[i]] for group in groups]
        after = block.mlp(block.norm2(x))
        x = x + (after if block.gamma_2 is None else block.gamma_2 * after)
    return x, members


def attention(layer, x, rope, members, prefix, proportional):
    """Return output (N, C) and keys (H, N, d), each the mean over the positions of its members."""
    width = layer.proj.in_features // layer.num_heads
    q, k, v = (part.unflatten(-1, (-1, width)).transpose(0, 1) for part in projected(layer, x))
    q, k = layer.q_norm(q), layer.k_norm(k)
    copies = layer.num_heads // k.shape[0]
    queries = [in_places(q[:, i], own, rope, prefix, layer.rotate_half) for i, own in enumerate(members)]
    turned = [in_places(k[:, i], own, rope, prefix, layer.rotate_half) for i, own in enumerate(members)]
    scores = torch.stack(
        [
            torch.stack([(a @ b.repeat_interleave(copies, 0).transpose(1, 2)).mean((1, 2)) for b in turned], -1)
            for a in queries
        ],
        1,
    )
    scores = scores * width**-0.5
    if proportional:
        scores = scores + torch.tensor([len(own) for own in members], dtype=x.dtype).log()
    y = (scores.softmax(-1) @ v.repeat_interleave(copies, 0)).transpose(0, 1).flatten(1)
    y = layer.norm(y)
    y = layer.proj(y if layer.gate is None else y * layer.gate(x).sigmoid())
    return y, torch.stack([own.mean(1) for own in turned], 1)


def projected(layer, x):
    """Queries, keys and values (N, heads d) each."""
    if layer.qkv is None:
        return layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    bias = layer.qkv.bias
    if getattr(layer, "q_bias", None) is not None:
        bias = torch.cat((layer.q_bias, layer.k_bias, layer.v_bias))
    return F.linear(x, layer.qkv.weight, bias).chunk(3, dim=-1)


def in_places(x, places, rope, prefix, half):
    """x (H, d), turned as it is in each of the places: (H, places, d)."""
    if rope is None:
        return x[:, None].expand(-1, len(places), -1)
    return torch.stack([x if i < prefix else turn(x, rope[i - prefix], half) for i in places], 1)


def turn(x, own, half):
    """x (H, d) by sines and cosines (2 d): pairs of channels are the two coordinates of a point in the plane."""
    width = x.shape[-1]
    pairs = (range(width // 2), range(width // 2, width)) if half else (range(0, width, 2), range(1, width, 2))
    out = torch.empty_like(x)
    for a, b in zip(*pairs, strict=True):
        sin, cos = own[a], own[width + a]
        out[:, a] = x[:, a] * cos - x[:, b] * sin
        out[:, b] = x[:, b] * cos + x[:, a] * sin
    return out
