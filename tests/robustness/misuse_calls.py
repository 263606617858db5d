# SPDX-License-Identifier: MIT
"""Valid calls of the public functions, methods and modules, which misuse.py spoils one argument at a time."""

from __future__ import annotations

import functools
import inspect

import torch

import tokred_kernels as tk
from tokred_kernels.methods.algm import Similarity
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import METHODS


def op_calls():
    """A valid call of each public op, function of numbers and module: its name, the function, and keyword arguments."""
    torch.manual_seed(0)
    x, keys, few, row = torch.randn(2, 12, 8), torch.randn(2, 3, 12, 8), torch.randn(2, 3, 4, 8), torch.rand(2, 12)
    generator = torch.Generator().manual_seed(0)
    lse = tk.lookup_gather(few, keys, keys)[1]
    token_map = tk.bipartite_match(x, 4)
    model = torch.nn.Identity()  # no supported model: good values of the other arguments get there
    block = {"mlp_ratio": 4.0, "qkv_bias": True, "init_values": 0.1, "proj_drop": 0.1}
    calls = {
        tk.adaptive_bipartite_match: {"metric": x, "threshold": 0.1},
        tk.bipartite_match: {"metric": x, "r": 3},
        tk.bipartite_merge: {"x": x, "r": 3, "metric": x.clone(), "size": row + 0.5},
        tk.grid_bipartite_match: {"metric": x, "r": 3, "grid": (3, 4), "generator": generator},
        tk.importance_match: {"metric": x, "num_kept": 7},
        tk.keep_topk: {"scores": row, "k": 3},
        tk.kth_bipartite_match: {"metric": x, "k": 3},
        tk.lookup_gather: {"q": few, "k": keys, "v": keys.clone(), "scale": 0.3},
        tk.lookup_scatter: {"q": few, "k": keys, "v": few.clone(), "lse": lse, "scale": 0.3},
        tk.merge: {"x": x, "token_map": token_map, "weight": row},
        tk.merge_wavg: {"x": x, "token_map": token_map, "size": row},
        tk.random_bipartite_match: {"metric": x, "r": 3, "generator": generator},
        tk.token_attention: {"q": keys, "k": keys.clone(), "v": keys.clone(), "policy": row, "size": row + 0.5},
        tk.unmerge: {"y": torch.randn(2, 8, 8), "token_map": token_map},
        tk.window_match: {"x": x, "threshold": 0.1, "grid": (3, 4), "window": (1, 2), "num_prefix": 0},
        tk.use_backend: {"name": "auto"},
        tk.Packing.of: {"lengths": (3, 0, 9), "device": torch.device("cpu")},
        tk.flops.count: {"model": model},
        tk.flops.image_size: {"model": model},
        tk.viz.draw_tokens: {"image": torch.rand(3, 12, 16), "token_map": token_map, "grid": (3, 4), "num_prefix": 0},
        tk.nn.CompressionRate: {"patch_number": 12},
        tk.nn.TokenPredictor: {"embed_dim": 8},
        tk.nn.LookupViTBlock: {"dim": 8, "num_heads": 2, **block},
        tk.nn.LookupViT: {"img_size": 32, "depth": 1, "embed_dim": 8, "num_heads": 2, "grid": (2, 2), **block},
        tk.nn.cosine_keep_rate: {"step": 3, "warmup": 1, "total": 10, "base": 0.5},
    }
    return {function.__qualname__: (function, given) for function, given in calls.items()}


def stateful_calls():
    """A valid call of each public function that changes a model, of each method of the public classes, and of each
    module's forward: its name, the function, and keyword arguments. Each call starts from the same state.
    """
    torch.manual_seed(0)
    x, row, images = torch.randn(2, 12, 8), torch.rand(2, 12), torch.randn(2, 3, 32, 32)
    token_map, packed = tk.bipartite_match(x, 4), tk.Packing.of((5, 7), torch.device("cpu"))
    after = tk.TokenMap.identity(2, token_map.num_out)
    calls = {
        "TokenMap": (tk.TokenMap, {"dest": token_map.dest, "num_out": 8, **views_of(token_map)}),
        "TokenMap.from_dest": (tk.TokenMap.from_dest, {"dest": token_map.dest, "num_out": 8}),
        "TokenMap.identity": (tk.TokenMap.identity, {"batch": 2, "tokens": 3, "device": "cpu"}),
        "TokenMap.then": (token_map.then, {"after": after}),
        "TokenMap.image": (token_map.image, {"index": 1}),
        "TokenMap.source": (token_map.source, {"dtype": torch.float32}),
        "TokenMap.to": (token_map.to, {"device": "cpu"}),
        "Packing.to": (packed.to, {"device": "cpu"}),
        "Thresholds": (tk.Thresholds, {"layers": {1: Similarity(0.1, 0.2, 3)}, "window": (2, 2)}),
        "Thresholds.threshold": (tk.Thresholds({1: Similarity(0.1, 0.2, 3)}).threshold, {"layer": 1}),
        "keep_attentive": (tk.nn.keep_attentive, {"x": x, "importance": row, "k": 3}),
        "decide": (tk.nn.decide, {"log_probabilities": torch.randn(2, 12, 2).log_softmax(-1), "policy": row.round()}),
        "ratio_loss": (tk.nn.ratio_loss, {"policies": [row.round()], "keep": (0.5,)}),
        "distillation_loss": (
            tk.nn.distillation_loss,
            {"logits": row, "teacher_logits": row.clone(), "tokens": x, "teacher_tokens": x + 1, "policy": row.round()},
        ),
        "lookup_loss": (
            tk.nn.lookup_loss,
            {"logits": tk.nn.LookupLogits(row, row + 1), "labels": torch.tensor([1, 2])},
        ),
        "TokenPredictor.forward": (tk.nn.TokenPredictor(8).forward, {"x": x, "policy": row.round()}),
        "CompressionRate.mask": (tk.nn.CompressionRate(12).mask, {"token_number": 5}),
        "LookupViTBlock.forward": (tk.nn.LookupViTBlock(8, 2).forward, {"z_p": x[:, :4].contiguous(), "z_l": x}),
        "LookupViT.forward": (lookupvit().eval().forward, {"x": images, "grid": (2, 1)}),
        "lookupvit_flops": (tk.nn.lookupvit_flops, {"model": lookupvit(), "img_size": 32, "grid": (2, 1)}),
        "LinearSegmenter": (tk.nn.LinearSegmenter, {"encoder": vit(), "num_classes": 3}),
        "LinearSegmenter.forward": (tk.nn.LinearSegmenter(vit(), 3).eval().forward, {"images": images}),
        "unpatch": (unpatched, {"model": torch.nn.Identity()}),
        "patched_method": (tk.patched_method, {"model": torch.nn.Identity()}),
        "set_keep_rate": (rated, {"keep_rate": (0.5,)}),
        "calibrate_thresholds": (calibrated, {"batches": [images], "layers": (0, 1), "window": (2, 2)}),
        "diffrate_search": (searched, {"batches": [(images, torch.tensor([0, 1]))], "target_gflops": 0.0003}),
        "compression_flops": (tk.methods.compression_flops, {"model": torch.nn.Identity()}),
        "kept_counts": (tk.methods.kept_counts, {"model": torch.nn.Identity()}),
        "patch": (tk.patch, {"model": torch.nn.Identity(), "method": tk.methods.ToMe(2)}),
    }
    for size in ("tiny", "small", "base", "large"):
        make = getattr(tk.nn, f"lookupvit_{size}")
        make = functools.partial(make, depth=1, embed_dim=24, num_heads=3)
        calls[f"lookupvit_{size}"] = (make, {"num_classes": 2, "grid": (2, 2)})
    for method, settings in PATCHES.items():
        calls[f"patch:{method}"] = (patched_with(method), settings)
    return calls


# A setting of each method for a model of two blocks and 16 patches; the others have their defaults.
PATCHES = {
    "tome": {"r": 2},
    "algm": {"layers": (0, 1), "threshold": 0.2},
    "dynamicvit": {"layers": (1,), "keep": (0.5,)},
    "evit": {"layers": (1,), "keep_rate": (0.5,)},
    "diffrate": {"kept": {"prune_kept_num": [15, 12], "merge_kept_num": [14, 9]}},
    "lookupvit": {"grid": (2, 2)},
}


def vit():
    """A small model that methods patch."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return import_timm().models.VisionTransformer(**sizes).eval()


def lookupvit():
    return tk.nn.LookupViT(img_size=32, depth=1, embed_dim=8, num_heads=2, grid=(2, 2), num_classes=3)


def views_of(token_map):
    return {"members": token_map.members, "begin": token_map.begin, "count": token_map.count}


def patched_with(method):
    """Return the function with the settings of `method` that patches a model and returns its output."""

    def call(**settings):
        model = tk.patch(vit(), method, **settings).eval()
        with torch.no_grad():
            return model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32))

    call.__signature__ = inspect.signature(METHODS.get(method, functools.partial(tk.nn.LookupViT.from_vit, vit())))
    return call


def unpatched(model):
    return tk.unpatch(model)


def rated(keep_rate):
    model = tk.patch(vit(), "evit", layers=(1,))
    tk.set_keep_rate(model, keep_rate)
    return model(torch.ones(1, 3, 32, 32))


def calibrated(batches, layers=None, window=None, progress=False):
    found = tk.calibrate_thresholds(vit(), batches, layers=layers, window=window, progress=progress)
    return [torch.tensor(entry) for entry in found.layers.values()]


def searched(batches, target_gflops, steps=2, lr=0.01, flops_weight=1.0, granularity=2, tolerance=1e9, progress=False):
    steps = min(steps, 3) if type(steps) is int else steps  # large numbers are valid, and take years
    options = {"steps": steps, "lr": lr, "flops_weight": flops_weight, "granularity": granularity}
    found = tk.diffrate_search(vit(), batches, target_gflops, **options, tolerance=tolerance, progress=progress)
    return found.prune_kept_num, found.merge_kept_num
