# SPDX-License-Identifier: MIT
"""Every CUDA op once, on sizes with tails everywhere: what `make gpu` runs under compute-sanitizer."""

import torch

import tokred_kernels as tk

# One token, odd, a ViT's, and one past the size of a single launch.
TOKENS = (1, 17, 197, 1500)


def main() -> None:
    """Run each op forward and backward and compare with the reference."""
    torch.manual_seed(0)
    for tokens in TOKENS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            check(tokens, dtype)
    torch.cuda.synchronize()
    print("sanitize: all ops ran")


def check(tokens: int, dtype: torch.dtype) -> None:
    """One size and dtype."""
    # Coordinates of -1, 0, 1: cosines are exact, so the maps must be equal.
    keys = torch.randint(-1, 2, (2, tokens, 5), device="cuda").to(dtype)
    x = torch.randn(2, tokens, 33, device="cuda").to(dtype).requires_grad_()
    size = torch.rand(2, tokens, 1, device="cuda") + 0.5
    size.requires_grad_()
    results = []
    for backend in ("cuda", "reference"):
        with tk.use_backend(backend):
            out = tk.bipartite_merge(x, tokens // 3, metric=keys, size=size, class_token=True)
            parts = [out.token_map.dest, out.x, out.size, tk.unmerge(out.x, out.token_map)]
            for reduce in ("sum", "mean", "amax"):
                parts.append(tk.merge(x, out.token_map, reduce=reduce))
            loss = sum(part.float().square().sum() for part in parts[1:])
            parts += torch.autograd.grad(loss, (x, size))
            parts.append(tk.kth_bipartite_match(keys, 4).dest)
            parts += out.token_map.then(tk.TokenMap.identity(2, out.token_map.num_out)).views()
        results.append(parts)
    tolerance = {"rtol": 0.05, "atol": 0.5} if dtype != torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


if __name__ == "__main__":
    main()
