# SPDX-License-Identifier: MIT
"""DiffRate in a ViT, written out: explicit attention weights, one image at a time, candidates in a loop.

It follows section 3 of the paper and its code, for the weights of a timm VisionTransformer, and shares no code with
the package.
"""

import torch

POLICY_EPS = 1e-6


def embed(model, images):
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def forward(model, images, prune, merge, proportional=True):
    """Evaluating: final tokens after the norm (B, N', C), their sizes (B, N'), and the source matrices (B, N', N)."""
    parts = zip(*[image_forward(model, x, prune, merge, proportional) for x in embed(model, images)], strict=True)
    x, sizes, sources = (torch.stack(part) for part in parts)
    return model.norm(x), sizes, sources


def image_forward(model, x, prune, merge, proportional):
    size, source = torch.ones(len(x), dtype=x.dtype), torch.eye(len(x), dtype=x.dtype)
    prefix = model.num_prefix_tokens
    for block, stay, left in zip(model.blocks, prune, merge, strict=True):
        attended, worth = attention(block.attn, block.norm1(x), size if proportional else None)
        x = x + block.ls1(attended)
        if min(stay, left) < len(x):
            order = ranked(worth, prefix)[:stay]
            x, size, source = x[order], size[order], source[order]
            groups, cosine = joined(x, left, prefix)
            size = torch.stack([size[g[0]] + sum(size[i] * cosine[i] for i in g[1:]) for g in groups])
            x = torch.stack([x[g].mean(0) for g in groups])
            source = torch.stack([source[g].sum(0) for g in groups])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, size, source


def attention(layer, x, size=None, policy=None):
    """Output (N, C), and what the class token's weights give each token, the mean over heads."""
    tokens, heads = len(x), layer.num_heads
    q, k, v = (part.reshape(tokens, heads, -1).transpose(0, 1) for part in layer.qkv(x).chunk(3, dim=-1))
    q, k = layer.q_norm(q), layer.k_norm(k)
    scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    if size is not None:
        scores = scores + size.log()
    if policy is None:
        weights = scores.softmax(-1)
    else:
        seen = policy.expand(tokens, tokens).clone()
        seen[range(tokens), range(tokens)] = 1
        kept = (scores - scores.amax(-1, keepdim=True)).exp() * seen
        weights = (kept + POLICY_EPS / tokens) / (kept.sum(-1, keepdim=True) + POLICY_EPS)
    y = (weights @ v).transpose(0, 1).reshape(tokens, -1)
    return layer.proj(layer.norm(y)), weights[:, 0].mean(0)


def ranked(worth, prefix, last=None):
    """Return the prefix, then the others by importance; the tokens from `last` on are masked, and stay last."""
    last = len(worth) if last is None else last
    return [
        *range(prefix),
        *sorted(range(prefix, last), key=lambda i: -float(worth.detach()[i])),
        *range(last, len(worth)),
    ]


def joined(x, left, prefix):
    """The members of each of `left` tokens, and the cosine by which those behind them join."""
    unit = (x / x.norm(dim=-1, keepdim=True)).detach()
    groups, cosine = [[i] for i in range(min(left, len(x)))], {}
    for i in range(left, len(x)):
        similar = [float(unit[i] @ unit[j]) for j in range(prefix, left)]
        cosine[i] = max(similar)
        groups[prefix + similar.index(cosine[i])].append(i)
    return groups, cosine


def forward_masked(model, images, rates, candidates):
    """Training: final tokens (B, N, C), sizes (B, N) and masks (B, N); `rates` has two logits for each block, or None.

    A block without rates does nothing.
    """
    results = zip(*[image_masked(model, x, rates, candidates) for x in embed(model, images)], strict=True)
    x, sizes, masks = (torch.stack(part) for part in results)
    return model.norm(x), sizes, masks


def image_masked(model, x, rates, candidates):
    tokens, prefix = len(x), model.num_prefix_tokens
    size, mask, last = torch.ones(tokens, dtype=x.dtype), None, tokens
    for block, rate in zip(model.blocks, rates, strict=True):
        attended, worth = attention(block.attn, block.norm1(x), size, mask)
        x = x + block.ls1(attended)
        if rate is not None:
            order = ranked(worth, prefix, last)
            mask = torch.ones_like(size) if mask is None else mask
            x, size, mask = x[order], size[order], mask[order]
            (prune, pruned), (merge, merged) = (proxy(logits, candidates, tokens, prefix) for logits in rate)
            if prune < last:
                mask = mask * pruned(last)
            last = min(last, prune)
            if merge < last:
                mask = mask * merged(last)
                groups, cosine = joined(x[:last], merge, prefix)
                scaled = [max(1.0, float(size.detach()[i]) * cosine.get(i, 1.0)) for i in range(last)]
                together = [sum(scaled[i] for i in g) for g in groups]
                size = torch.tensor([*together, *scaled[merge:], *size[last:].tolist()], dtype=x.dtype)
                x = torch.cat([torch.stack([x[g].mean(0) for g in groups]), x[merge:]])
                last = merge
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, size, torch.ones_like(size) if mask is None else mask


def proxy(logits, candidates, tokens, prefix):
    """How many are kept, and the straight-through mask, of the tokens up to some last one."""
    probability = logits.softmax(-1)
    kept = int((probability * candidates).sum().ceil()) + prefix

    def mask(last):
        soft = torch.zeros(tokens, dtype=logits.dtype)
        for candidate, own in zip(candidates.tolist(), probability, strict=True):
            keeps = torch.zeros(tokens, dtype=logits.dtype)
            keeps[: int(candidate) + prefix] = 1
            soft = soft + keeps * own
        hard = torch.ones(tokens, dtype=logits.dtype)
        hard[kept:last] = 0
        return hard - soft.detach() + soft

    return kept, mask
