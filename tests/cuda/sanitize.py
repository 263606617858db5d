# SPDX-License-Identifier: MIT
"""Every CUDA op once, on sizes with tails everywhere: what `make gpu` runs under compute-sanitizer."""

import torch

import tokred_kernels as tk
from tokred_kernels.ops.window_map import window_map
from tokred_kernels.ops.window_similarity import window_similarity
from tokred_kernels.windows import Windows

# One token, odd, a ViT's, and one past the size of a single launch, and of ranks by counting.
TOKENS = (1, 17, 197, 1500)
# Packed images, for one launch and for two.
LENGTHS = ((5, 0, 1, 2, 197), (1200, 3, 700))
# Few tokens a window and many, with rims and without.
WINDOWS = (Windows(0, 2, 1, 2, 1), Windows(1, 15, 14, 2, 2), Windows(2, 13, 16, 3, 3), Windows(0, 40, 52, 1, 2))
# (B, H, M, N, d) of lookup attention: tails of tiles on both sides, and each width of its tiles.
LOOKUPS = ((2, 1, 1, 3, 8), (1, 2, 17, 33, 40), (1, 1, 33, 197, 100), (1, 1, 25, 50, 130))
# No cosine of vectors of -1, 0 and 1 in five dimensions is near it.
THRESHOLD = 0.55


def main() -> None:
    """Run each op forward and backward and compare with the reference."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for tokens in TOKENS:
            check(tokens, dtype)
            check_counts(tokens, dtype)
            check_keep_topk(tokens, dtype)
        for lengths in LENGTHS:
            check_packed(lengths, dtype)
        for windows in WINDOWS:
            check_windows(windows, dtype)
            check_grid(windows, dtype)
        for shape in LOOKUPS:
            check_lookup(shape, dtype)
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


def ternary(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Coordinates of -1, 0 and 1."""
    return torch.randint(-1, 2, shape, device="cuda").to(dtype)


def on_both(function) -> None:
    """`function()` gives the same tensors on both backends."""
    results = []
    for backend in ("cuda", "reference"):
        with tk.use_backend(backend):
            results.append(function())
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def of_map(token_map: tk.TokenMap) -> list[torch.Tensor]:
    """All of a map's tensors."""
    return [token_map.dest, *token_map.views()]


def check_counts(tokens: int, dtype: torch.dtype) -> None:
    """Selectors that decide how many tokens merge, and that of importance."""
    keys = ternary(3, tokens, 5, dtype=dtype)
    settings = {"threshold": THRESHOLD}, {"layer_index": 3.0}
    for count in ("batch", "image"):
        for how in settings:
            on_both(lambda count=count, how=how: of_map(tk.adaptive_bipartite_match(keys, count=count, **how)))
    if tokens > 2:
        on_both(lambda: of_map(tk.importance_match(keys, tokens // 2, class_token=True)[0]))


def check_keep_topk(tokens: int, dtype: torch.dtype) -> None:
    """Few values, so that scores tie, and one that is no number."""
    scores = ternary(2, tokens, dtype=dtype)
    scores[0, -1] = torch.nan
    for k in sorted({0, (tokens - 1) // 2, tokens - 1}):
        for fuse in (False, True):
            on_both(lambda k=k, fuse=fuse: of_map(tk.keep_topk(scores, k, fuse=fuse)))


def check_packed(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Images of several lengths."""
    packed = tk.Packing.of(lengths, torch.device("cuda"))
    keys = ternary(packed.rows, 5, dtype=dtype)
    on_both(
        lambda: of_map(
            tk.adaptive_bipartite_match(keys, threshold=THRESHOLD, count="image", packed=packed, num_prefix=1)
        )
    )


def check_windows(windows: Windows, dtype: torch.dtype) -> None:
    """The scores up to rounding, and the map of given scores."""
    for channels in (33, 64):
        x = torch.randn(2, windows.num_tokens, channels, device="cuda").to(dtype)
        scores = [window_similarity(x, windows, 0.0, backend)[0] for backend in ("cuda", "reference")]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-5)
    given = ternary(2, windows.number, dtype=torch.float32)
    counts = torch.tensor([windows.number, windows.number // 2], dtype=torch.int32, device="cuda")
    for r, each in ((0, None), (windows.number // 2, None), (windows.number, None), (0, counts)):
        maps = [of_map(window_map(given, windows, r, backend, each)) for backend in ("cuda", "reference")]
        for got, want in zip(*maps, strict=True):
            assert torch.equal(got, want)


def check_grid(windows: Windows, dtype: torch.dtype) -> None:
    """ToMe for diffusion's partition, by lists."""
    tokens = windows.grid_height * windows.grid_width
    keys = ternary(2, tokens, 5, dtype=dtype)
    cell = {"grid": (windows.grid_height, windows.grid_width), "stride": (windows.height, windows.width)}
    on_both(lambda: of_map(tk.grid_bipartite_match(keys, tokens // 3, **cell)))


def check_lookup(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Gather and scatter chained, and their gradients."""
    batch, heads, compressed, tokens, channels = shape
    rows = (compressed, tokens, tokens, compressed)
    parts = [torch.randn(batch, heads, n, channels, device="cuda").to(dtype).requires_grad_() for n in rows]
    q, k, v, values = parts
    results = []
    for backend in ("cuda", "reference"):
        with tk.use_backend(backend):
            out, lse = tk.lookup_gather(q, k, v)
            made = [out, lse, tk.lookup_scatter(q, k, values, lse)]
            loss = sum(part.float().square().sum() for part in made)
            results.append([*made, *torch.autograd.grad(loss, parts)])
    tolerance = {"rtol": 0.05, "atol": 0.5} if dtype != torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


if __name__ == "__main__":
    main()
