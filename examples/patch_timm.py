# SPDX-License-Identifier: MIT
"""Patch a timm model with ToMe, compare speed and outputs, and restore it.

python examples/patch_timm.py
"""

import time

import timm
import torch

import tokred_kernels as tk


@torch.inference_mode()
def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    model(images)  # warm-up
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    # Random weights need no download; for your own model use pretrained=True.
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10).eval()
    images = torch.randn(4, 3, 224, 224)
    expected, plain = model(images), seconds(model, images)
    print(f"plain: {tk.flops.count(model).gflops:.2f} GFLOPs per image")

    for r in (4, 8, 16):
        tk.patch(model, "tome", r=r)  # each block merges r pairs of tokens
        counted = tk.flops.count(model)
        cosine = torch.cosine_similarity(model(images), expected).mean()
        print(
            f"r = {r}: {counted.gflops:.2f} GFLOPs, {counted.tokens[-1]:g} of {counted.tokens[0]:g} tokens, "
            f"{plain / seconds(model, images):.2f}x as fast, cosine of the logits {cosine:.3f}"
        )
        tk.unpatch(model)
    print(f"restored: {torch.equal(model(images), expected)}")


if __name__ == "__main__":
    main()
