# SPDX-License-Identifier: MIT
"""Patch a model of Hugging Face's transformers with EViT and with ToMe.

python examples/patch_transformers.py
"""

import torch
from transformers import Dinov2Config, Dinov2ForImageClassification

import tokred_kernels as tk


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    # Random weights need no download; for your own model use from_pretrained.
    config = Dinov2Config(
        hidden_size=192, num_attention_heads=3, num_hidden_layers=6, image_size=224, patch_size=16, num_labels=10
    )
    model = Dinov2ForImageClassification(config).eval()
    images = torch.randn(2, 3, 224, 224)
    expected = model(images).logits
    plain = tk.flops.count(model)
    print(f"plain: {plain.tokens[-1]:g} tokens, {plain.gflops:.2f} GFLOPs per image")

    methods = {
        "tome": {"r": 16},  # merge 16 pairs of tokens in each block
        "evit": {"layers": (2, 4), "keep_rate": 0.7},  # keep the tokens that the class token attends to
    }
    for method, settings in methods.items():
        tk.patch(model, method, **settings)
        logits = model(images).logits
        counted = tk.flops.count(model)
        cosine = torch.cosine_similarity(logits, expected).mean()
        print(f"{method}: {counted.tokens[-1]:g} tokens, {counted.gflops:.2f} GFLOPs, cosine {cosine:.3f}")
        tk.unpatch(model)


if __name__ == "__main__":
    main()
