# SPDX-License-Identifier: MIT
"""Segment an image with merged tokens: ALGM merges tokens, and the decoder restores one value per patch.

python examples/segment_algm.py
"""

import timm
import torch

import tokred_kernels as tk


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    # Random weights need no download; for your own model use pretrained=True.
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=256).eval()
    segmenter = tk.nn.LinearSegmenter(encoder, num_classes=19).eval()

    # An image of flat regions, whose tokens are similar, and one of noise.
    image = torch.randn(1, 3, 4, 4).repeat_interleave(64, 2).repeat_interleave(64, 3)
    images = torch.cat([image, torch.randn(1, 3, 256, 256)])
    expected = segmenter(images)
    print(f"plain: {tk.flops.count(encoder).gflops:.2f} GFLOPs per image")

    # The number of merged tokens depends on the image: first 2 x 2 windows merge, then any similar pairs.
    tk.patch(encoder, "algm", layers=(0, 4), threshold=0.9, count="image")
    found = segmenter(images)
    kept = encoder.token_map.packed.lengths
    same = (found.argmax(1) == expected.argmax(1)).float().mean((1, 2))
    for name, tokens, share in zip(("flat regions", "noise"), kept, same.tolist(), strict=True):
        print(f"{name}: {tokens} of 257 tokens, {share:.0%} of the pixels have the same class as without ALGM")
    print(f"output: {tuple(found.shape)}, {tk.flops.count(encoder).gflops:.2f} GFLOPs per image")


if __name__ == "__main__":
    main()
