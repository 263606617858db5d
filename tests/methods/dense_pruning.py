# SPDX-License-Identifier: MIT
"""EViT and DynamicViT in a ViT, written out: one image at a time, with explicit attention weights.

Straight from section 3 of the papers, for a timm VisionTransformer's weights, and sharing no code with the package.
"""

import math

import torch

EPS = 1e-6  # of DynamicViT's masked softmax, as published


def first_tokens(model, images):
    """The tokens (B, N, C) that enter the first block."""
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def evit(model, images, rates, fuse=True, importance="class"):
    """Final tokens after the norm (B, N', C), and the source matrices (B, N', N); `rates` is {block: keep rate}."""
    results = [evit_image(model, x, rates, fuse, importance) for x in first_tokens(model, images)]
    x, sources = (torch.stack(parts) for parts in zip(*results, strict=True))
    return model.norm(x), sources


def evit_image(model, x, rates, fuse, importance):
    source, prefix = torch.eye(len(x), dtype=x.dtype), model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        attended, weights = attention(block.attn, block.norm1(x))
        x = x + block.ls1(attended)
        if rates.get(index, 1) < 1:
            worth = weights[0] if importance == "class" else weights.mean(0)
            k = math.ceil(rates[index] * (len(x) - prefix))
            stay, rest = choose(worth, k, prefix)
            tokens, sources = [x[n] for n in stay], [source[n] for n in stay]
            if fuse and rest:
                tokens.append(sum(worth[n] * x[n] for n in rest))
                sources.append(sum(source[n] for n in rest))
            x, source = torch.stack(tokens), torch.stack(sources)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, source


def dynamicvit_removing(model, images, shares):
    """As when evaluating: final tokens after the norm, and the source matrices; `shares` is {block: share to keep}."""
    results = [removing_image(model, x, shares) for x in first_tokens(model, images)]
    x, sources = (torch.stack(parts) for parts in zip(*results, strict=True))
    return model.norm(x), sources


def removing_image(model, x, shares):
    source, prefix = torch.eye(len(x), dtype=x.dtype), model.num_prefix_tokens
    predictors, patches = iter(model.score_predictor), len(x) - prefix
    for index, block in enumerate(model.blocks):
        if index in shares:
            keeping = log_probabilities(next(predictors), x[prefix:], torch.ones(len(x) - prefix).to(x))[:, 0]
            worth = torch.cat([torch.zeros(prefix).to(x), keeping])
            stay, _ = choose(worth, max(int(patches * shares[index]), 1), prefix)
            x, source = x[stay], source[stay]
        x = x + block.ls1(attention(block.attn, block.norm1(x))[0])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, source


def dynamicvit_masking(model, images, layers, noise):
    """As when training: final tokens after the norm (B, N, C), and of each layer the decisions (B, patches).

    `noise` is the Gumbel noise (B, patches, 2) of each layer. Decisions are 0 or 1, with the gradient of a softmax.
    """
    x = first_tokens(model, images)
    results = [masking_image(model, x[i], layers, [of_layer[i] for of_layer in noise]) for i in range(len(x))]
    x, decisions = zip(*results, strict=True)
    return model.norm(torch.stack(x)), [torch.stack(of_layer) for of_layer in zip(*decisions, strict=True)]


def masking_image(model, x, layers, noise):
    prefix, decisions, policy = model.num_prefix_tokens, [], None
    for index, block in enumerate(model.blocks):
        if index in layers:
            predictor, drawn = model.score_predictor[len(decisions)], noise[len(decisions)]
            before = decisions[-1] if decisions else torch.ones(len(x) - prefix).to(x)
            soft = (log_probabilities(predictor, x[prefix:], before) + drawn).softmax(-1)[:, 0]
            hard = (soft > 0.5).to(x)
            decisions.append((hard + soft - soft.detach()) * before)
            policy = torch.cat([torch.ones(prefix).to(x), decisions[-1]])
        x = x + block.ls1(attention(block.attn, block.norm1(x), policy)[0])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, decisions


def log_probabilities(predictor, x, policy):
    """(N, 2) of x (N, C): half of each token's features, and half of the mean of those that `policy` (N,) keeps."""
    features = predictor.in_conv(x)
    own, others = features[:, : x.shape[1] // 2], features[:, x.shape[1] // 2 :]
    kept = sum(policy[n] * others[n] for n in range(len(x)))
    mean = kept / policy.sum() if policy.any() else kept
    return torch.stack([predictor.out_conv(torch.cat([one, mean])) for one in own])


def attention(layer, x, policy=None):
    """Output (N, C), and the weights (N, N), of all heads the mean. With a `policy` (N,) a query sees what is kept."""
    tokens, heads = len(x), layer.num_heads
    q, k, v = (part.reshape(tokens, heads, -1).transpose(0, 1) for part in layer.qkv(x).chunk(3, dim=-1))
    q, k = layer.q_norm(q), layer.k_norm(k)
    scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    if policy is None:
        weights = scores.softmax(-1)
    else:
        own = torch.eye(tokens).to(x)
        e = (scores - scores.amax(-1, keepdim=True)).exp() * (own + (1 - own) * policy)
        weights = (e + EPS / tokens) / (e.sum(-1, keepdim=True) + EPS)
    y = weights @ v
    return layer.proj(layer.norm(y.transpose(0, 1).reshape(tokens, -1))), weights.mean(0)


def choose(worth, k, first):
    """The tokens that stay: those before `first`, and the `k` worthiest, in that order; and those that do not.

    Ties go to the first token. If all tokens stay, their order does too.
    """
    if k >= len(worth) - first:
        return list(range(len(worth))), []
    order = sorted(range(first, len(worth)), key=lambda n: (-worth[n].item(), n))
    return [*range(first), *order[:k]], order[k:]
