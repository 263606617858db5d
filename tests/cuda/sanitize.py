# SPDX-License-Identifier: MIT
"""Every op of a backend once, on sizes with tails everywhere: what `make gpu` runs under compute-sanitizer.

python tests/cuda/sanitize.py                     the CUDA kernels
python tests/cuda/sanitize.py triton              those of Triton
python tests/cuda/sanitize.py triton --filters    only print the options that select these kernels
python tests/cuda/sanitize.py --skip windows,grid what is left of the CUDA kernels

Failures are printed, and the other checks run as long as the device works.
"""

import argparse
import importlib
import pkgutil
import sys

import torch

import tokred_kernels as tk
from tokred_kernels import backends
from tokred_kernels.ops.window_map import window_map
from tokred_kernels.ops.window_similarity import window_similarity
from tokred_kernels.windows import Windows

# One token, odd, a ViT's, past the size of a single launch, and past that of ranks by counting.
TOKENS = (1, 17, 197, 1500, 5000)
# Packed images, for one launch and for two.
LENGTHS = ((5, 0, 1, 2, 197), (1200, 3, 700))
# Few tokens a window and many, with rims and without.
WINDOWS = (Windows(0, 2, 1, 2, 1), Windows(1, 15, 14, 2, 2), Windows(2, 13, 16, 3, 3), Windows(0, 40, 52, 1, 2))
# (B, H, M, N, d) of lookup attention: tails of tiles on both sides, and each width of its tiles.
LOOKUPS = ((2, 1, 1, 3, 8), (1, 2, 17, 33, 40), (1, 1, 33, 197, 100), (1, 1, 25, 50, 130))
# No cosine of vectors of -1, 0 and 1 in five dimensions is near it.
THRESHOLD = 0.55
# (B, H, N, d) of token attention: one token, and tails of tiles.
ATTENTIONS = ((2, 1, 1, 8), (1, 2, 33, 40), (1, 1, 197, 100))


class Run:
    """The backend to check and the device of its tensors. Its results are compared with those of the reference."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device

    def on_both(self, function, rtol: float = 0, atol: float = 1e-5) -> None:
        """Raise unless `function()` returns the same tensors on both backends."""
        results = []
        for backend in (self.backend, "reference"):
            with tk.use_backend(backend):
                results.append(function())
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)

    def normal(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return normally distributed random tokens."""
        return torch.randn(shape, device=self.device).to(dtype)

    def ternary(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return tokens of -1, 0 and 1: their cosines are exact, so maps must be equal."""
        return torch.randint(-1, 2, shape, device=self.device).to(dtype)

    def wait(self) -> None:
        """Raise the errors of all kernels that were launched."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def can_go_on(self) -> bool:
        """Return False if the device is lost to this process."""
        try:
            self.wait()
        except RuntimeError:
            return False
        return True

    def can(self, op: str, dtype: torch.dtype, head_dim: int = 0) -> bool:
        """Return True if the backend has a kernel for the op."""
        return backends.can_run(op, self.backend, self.device, dtype, head_dim) is None


def main(arguments: list[str] | None = None) -> int:
    """Run each op forward and backward and compare with the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", choices=backends.BACKENDS[1:], default="cuda")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--filters", action="store_true", help="print compute-sanitizer's options and do nothing")
    parser.add_argument("--skip", default="", help=f"some of {','.join(CHECKS)}: what lost the device before")
    options = parser.parse_args(arguments)
    if options.filters:
        print(" ".join(f"--kernel-name kns={part}" for part in kernel_names(options.backend)))
        return 0
    skipped = [name for name in options.skip.split(",") if name]
    for name in skipped:
        if name not in CHECKS:
            parser.error(f"--skip must name some of {', '.join(CHECKS)}, got {name!r}")
    torch.manual_seed(0)
    run = Run(options.backend, options.device)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    left = [(name, how, d) for d in dtypes for name, (_, hows) in CHECKS.items() for how in hows if name not in skipped]
    failed = 0
    while left:
        name, how, dtype = left.pop(0)
        try:
            CHECKS[name][0](run, how, dtype)
            run.wait()
        except Exception as error:  # a wrong result, or whatever a kernel, its launch or a compiler may raise
            failed += 1
            print(f"sanitize: {name}, {how}, {dtype}: {type(error).__name__}: {error}", file=sys.stderr)
            if not run.can_go_on():
                print(f"sanitize: the device is lost, and {len(left)} checks did not run; see --skip", file=sys.stderr)
                break
    if failed:
        print(f"sanitize: {failed} checks failed on {run.backend}", file=sys.stderr)
        return 1
    print(f"sanitize: all ops ran on {run.backend}" + (f", but {', '.join(skipped)}" if skipped else ""))
    return 0


def kernel_names(backend: str) -> list[str]:
    """Parts of the mangled names of this package's kernels: their namespace, or of Triton's, which have none, each."""
    if backend != "triton":
        return ["tokred"]
    from tokred_kernels.backends import triton

    modules = [importlib.import_module(f"{triton.__name__}.{m.name}") for m in pkgutil.iter_modules(triton.__path__)]
    values = [item for module in modules for item in vars(module).items()]
    return sorted({name for name, value in values if name.endswith("_kernel") and hasattr(value, "arg_names")})


def check(run: Run, tokens: int, dtype: torch.dtype) -> None:
    """One size and dtype."""
    keys = run.ternary(2, tokens, 5, dtype=dtype)
    x = run.normal(2, tokens, 33, dtype=dtype).requires_grad_()
    size = torch.rand(2, tokens, 1, device=run.device) + 0.5
    size.requires_grad_()

    def function() -> list[torch.Tensor]:
        out = tk.bipartite_merge(x, tokens // 3, metric=keys, size=size, class_token=True)
        parts = [out.token_map.dest, out.x, out.size, tk.unmerge(out.x, out.token_map)]
        for reduce in ("sum", "mean", "amax"):
            parts.append(tk.merge(x, out.token_map, reduce=reduce))
        loss = sum(part.float().square().sum() for part in parts[1:])
        parts += torch.autograd.grad(loss, (x, size))
        parts.append(tk.kth_bipartite_match(keys, 4).dest)
        parts += out.token_map.then(tk.TokenMap.identity(2, out.token_map.num_out)).views()
        return parts

    run.on_both(function, **about(dtype))


def about(dtype: torch.dtype) -> dict[str, float]:
    """How far sums of squares may be apart."""
    return {"rtol": 0.05, "atol": 0.5} if dtype != torch.float32 else {"rtol": 1e-3, "atol": 1e-3}


def of_map(token_map: tk.TokenMap) -> list[torch.Tensor]:
    """All of a map's tensors."""
    return [token_map.dest, *token_map.views()]


def check_counts(run: Run, tokens: int, dtype: torch.dtype) -> None:
    """Selectors that decide how many tokens merge, and that of importance."""
    keys = run.ternary(3, tokens, 5, dtype=dtype)
    settings = {"threshold": THRESHOLD}, {"layer_index": 3.0}
    for count in ("batch", "image"):
        for how in settings:
            run.on_both(lambda count=count, how=how: of_map(tk.adaptive_bipartite_match(keys, count=count, **how)))
    if tokens > 2:
        run.on_both(lambda: of_map(tk.importance_match(keys, tokens // 2, class_token=True)[0]))


def check_keep_topk(run: Run, tokens: int, dtype: torch.dtype) -> None:
    """Check few values, so that scores tie, and a NaN."""
    scores = run.ternary(2, tokens, dtype=dtype)
    scores[0, -1] = torch.nan
    for k in sorted({0, (tokens - 1) // 2, tokens - 1}):
        for fuse in (False, True):
            run.on_both(lambda k=k, fuse=fuse: of_map(tk.keep_topk(scores, k, fuse=fuse, num_prefix=1)))


def check_packed(run: Run, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Images of several lengths."""
    packed = tk.Packing.of(lengths, torch.device(run.device))
    keys = run.ternary(packed.rows, 5, dtype=dtype)
    run.on_both(
        lambda: of_map(
            tk.adaptive_bipartite_match(keys, threshold=THRESHOLD, count="image", packed=packed, num_prefix=1)
        )
    )


def check_windows(run: Run, windows: Windows, dtype: torch.dtype) -> None:
    """The scores up to rounding, and the map of given scores."""
    for channels in (33, 64):
        x = run.normal(2, windows.num_tokens(), channels, dtype=dtype)
        scores = [window_similarity(x, windows, 0.0, backend)[0] for backend in (run.backend, "reference")]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-5)
    given = run.ternary(2, windows.number(), dtype=torch.float32)
    counts = torch.tensor([windows.number(), windows.number() // 2], dtype=torch.int32, device=run.device)
    for r, each in ((0, None), (windows.number() // 2, None), (windows.number(), None), (0, counts)):
        maps = [of_map(window_map(given, windows, r, backend, each)) for backend in (run.backend, "reference")]
        for got, want in zip(*maps, strict=True):
            assert torch.equal(got, want)


def check_grid(run: Run, windows: Windows, dtype: torch.dtype) -> None:
    """ToMe for diffusion's partition, by lists."""
    tokens = windows.grid_height * windows.grid_width
    keys = run.ternary(2, tokens, 5, dtype=dtype)
    cell = {"grid": (windows.grid_height, windows.grid_width), "stride": (windows.height, windows.width)}
    run.on_both(lambda: of_map(tk.grid_bipartite_match(keys, tokens // 3, **cell)))


def check_lookup(run: Run, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Gather and scatter chained, and their gradients."""
    batch, heads, compressed, tokens, channels = shape
    rows = (compressed, tokens, tokens, compressed)
    parts = [run.normal(batch, heads, n, channels, dtype=dtype).requires_grad_() for n in rows]
    q, k, v, values = parts
    if not run.can("lookup_gather", dtype, channels):
        return

    def function() -> list[torch.Tensor]:
        out, lse = tk.lookup_gather(q, k, v)
        made = [out, lse, tk.lookup_scatter(q, k, values, lse)]
        loss = sum(part.float().square().sum() for part in made)
        return [*made, *torch.autograd.grad(loss, parts)]

    run.on_both(function, **about(dtype))


def check_attention(run: Run, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """With sizes, a policy and importance, and their gradients."""
    if not run.can("token_attention", dtype):
        return
    batch, heads, tokens, channels = shape
    q, k, v = (run.normal(batch, heads, tokens, channels, dtype=dtype).requires_grad_() for _ in range(3))
    size = (torch.rand(batch, tokens, device=run.device) + 0.5).requires_grad_()
    policy = (torch.rand(batch, tokens, device=run.device) < 0.5).float().requires_grad_()
    for importance in (None, "class", "mean"):
        for more in ({}, {"size": size}, {"size": size, "policy": policy}):

            def function(importance=importance, more=more) -> list[torch.Tensor]:
                made = tk.token_attention(q, k, v, importance=importance, **more)
                made = made if isinstance(made, tuple) else (made,)
                loss = sum(part.float().square().sum() for part in made)
                return [*made, *torch.autograd.grad(loss, (q, k, v, *more.values()))]

            run.on_both(function, **about(dtype))


CHECKS = {
    "sizes": (check, TOKENS),
    "counts": (check_counts, TOKENS),
    "keep_topk": (check_keep_topk, TOKENS),
    "packed": (check_packed, LENGTHS),
    "windows": (check_windows, WINDOWS),
    "grid": (check_grid, WINDOWS),
    "lookup": (check_lookup, LOOKUPS),
    "attention": (check_attention, ATTENTIONS),
}

if __name__ == "__main__":
    sys.exit(main())
