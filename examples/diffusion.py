# SPDX-License-Identifier: MIT
"""Patch a diffusers pipeline with ToMe for Stable Diffusion.

python examples/diffusion.py
"""

import time

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import tokred_kernels as tk


def tiny_pipeline() -> DiTPipeline:
    """Return a pipeline with random weights, which needs no download."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=4, sample_size=64, in_channels=4, out_channels=8,
        norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    return DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())


def generate(pipe: DiTPipeline) -> tuple[torch.Tensor, float]:
    """Return an image and the seconds that it took."""
    start = time.perf_counter()
    draw = torch.Generator().manual_seed(1)
    image = pipe([207], generator=draw, num_inference_steps=2, output_type="np").images
    return torch.from_numpy(image), time.perf_counter() - start


def main() -> None:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    generate(pipe)  # warm-up
    expected, plain = generate(pipe)
    print(f"plain: {tuple(expected.shape)} in {plain:.2f} s")

    for ratio in (0.25, 0.5):
        tk.patch(pipe, "tomesd", ratio=ratio)  # attention sees this share of the tokens less
        image, seconds = generate(pipe)
        difference = (image - expected).abs().mean()
        print(f"ratio {ratio}: {seconds:.2f} s, {plain / seconds:.2f}x as fast, mean difference {difference:.4f}")
        tk.unpatch(pipe)
    print(f"restored: {torch.equal(generate(pipe)[0], expected)}")


if __name__ == "__main__":
    main()
