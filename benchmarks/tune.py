# SPDX-License-Identifier: MIT
"""Searches for the fastest block sizes of the Triton kernels of token and lookup attention on this GPU.

python benchmarks/tune.py                          head dimension 64, bfloat16, at most five minutes
python benchmarks/tune.py --width 32 128 --minutes 9
python benchmarks/tune.py --kernel keys,queries --variant plain,policy

Block sizes that beat those in use by a margin go into tokred_kernels/backends/triton/tuned.json, which the kernels
read. All measurements go into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not __package__:  # run as a file
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import machine, records
from benchmarks.harness.arguments import chosen_names
from benchmarks.harness.trials import MARGIN, GpuFunctions, Job, Launch, Trial

ATTENTION = ("attention", "keys", "queries", "rows", "importance")
LOOKUP = ("gather", "scatter", "gather_keys", "gather_queries", "scatter_keys", "scatter_queries")
VARIANTS = ("plain", "policy", "few")
DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = (16, 32, 64, 128)
SEED = 11
TURN_MS = {"warmup": 10, "rep": 50}
KEPT = 0.7  # share of the tokens that a policy keeps

# (queries, keys, warps, stages) to try at every head dimension; those that do not fit are recorded as failed.
_FORWARD = [*itertools.product((128,), (32, 64, 128), (4, 8), (2, 3, 4)), (64, 128, 4, 2), (64, 64, 4, 2)]
_BY_QUERIES = [
    *itertools.product((64,), (32, 64, 128), (4,), (2, 3)),
    *itertools.product((128,), (32, 64, 128), (4, 8), (2, 3)),
]
_BY_KEYS = [
    *itertools.product((16, 32, 64, 128), (64,), (4,), (1, 2)),
    *itertools.product((16, 32, 64), (128,), (4, 8), (1, 2)),
]
CANDIDATES = {
    "attention": _FORWARD,
    "keys": _BY_KEYS,
    "queries": _BY_QUERIES,
    "rows": list(itertools.product((32, 64, 128), (32,), (4, 8), (2,))),
    "importance": list(itertools.product((64,), (32, 64, 128), (2, 4, 8), (2,))),
    "gather": _FORWARD,
    "scatter": [*_BY_KEYS, (128, 128, 4, 2), (128, 128, 8, 2), (32, 256, 8, 2)],
    "gather_keys": _BY_KEYS,
    "gather_queries": _BY_QUERIES,
    "scatter_keys": _BY_KEYS,
    "scatter_queries": _BY_QUERIES,
}
# Kernels that split the keys are also tried with these numbers of programs, with their fastest blocks.
SPLITTING = ("gather", "gather_queries", "scatter_queries")
ENOUGH = (192, 384, 512, 768, 1152, 1536)


class Shapes(NamedTuple):
    """The shapes of the benchmarks' targets: images, heads and tokens."""

    attention: tuple[int, int, int] = (64, 12, 577)
    lookup: tuple[int, int, int, int] = (16, 12, 100, 4096)  # images, heads, compressed tokens, tokens
    few: int = 49  # compressed tokens of the variant "few"


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    kernels = chosen_names(parser, "--kernel", options.kernel, (*ATTENTION, *LOOKUP))
    variants = chosen_names(parser, "--variant", options.variant, VARIANTS)
    if options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes}")
    if not torch.cuda.is_available():
        parser.error("tuning needs a GPU: torch sees no CUDA device here")
    from tokred_kernels.backends.triton import configs_attention, configs_tuned  # noqa: PLC0415  (needs triton)

    tuned = options.tuned or configs_attention.TUNED
    try:
        known = configs_tuned.read(tuned) if tuned.exists() else {}
    except ValueError as error:
        parser.error(str(error))
    architecture = configs_attention.gpu_architecture(torch.cuda.current_device())
    deadline = time.monotonic() + options.minutes * 60
    description = machine.describe()
    print(f"{description['gpu']} ({architecture}), torch {description['torch']}, triton {description['triton']}")
    rows: list[dict[str, Any]] = []
    stopped = None
    try:
        for variant, width in itertools.product(variants, options.width):
            jobs = make_jobs(variant, width, options.dtype, Shapes(), "cuda", kernels)
            rows.extend(tune(jobs, architecture, options.dtype, width, gpu_functions(), deadline))
    except Exception as error:  # earlier measurements are kept
        stopped = f"{type(error).__name__}: {error}"
        print(f"stopped: {stopped}", file=sys.stderr)
    settings = {
        # The README's table shows only complete runs.
        **{"device": "cuda", "suite": "tune", "quick": False, "complete": False, "margin": MARGIN},
        **{"minutes": options.minutes, "widths": options.width, "dtype": options.dtype, "variants": variants},
        "stopped": stopped,
    }
    path = options.json or records.default_path(description["date"], "cuda", "tune")
    records.write_json(path, {"machine": description, "settings": settings, "rows": rows})
    print(f"written: {path}")
    winners = winning(rows)
    if winners:
        configs_tuned.write(tuned, known | winners)
        print(f"written: {tuned}")
    print(summary(rows))
    return 0 if stopped is None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default=",".join((*ATTENTION, *LOOKUP)), help="default: %(default)s")
    parser.add_argument("--variant", default="plain", help=f"some of {', '.join(VARIANTS)} (default: %(default)s)")
    parser.add_argument("--width", type=int, nargs="+", default=[64], choices=WIDTHS, help="head dimensions (64)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--minutes", type=float, default=5, help="time limit (%(default)s)")
    parser.add_argument("--json", type=Path, help="default: in benchmarks/results/")
    parser.add_argument("--tuned", type=Path, help="file for the winners (default: the one that the kernels read)")
    return parser


def gpu_functions() -> GpuFunctions:
    from triton.testing import do_bench  # noqa: PLC0415  (needs triton)

    def measure(call: Callable[[], None]) -> float:
        return do_bench(call, **TURN_MS, return_mode="median") * 1e3  # empties the L2 cache before each call

    return GpuFunctions(measure, Launch.compile, torch.cuda.synchronize)


def make_jobs(
    variant: str, width: int, dtype: str, shapes: Shapes, device: str, kernels: Sequence[str] = (*ATTENTION, *LOOKUP)
) -> list[Job]:
    """Return the chosen kernels of a variant, in the order of `kernels`, with random inputs."""
    jobs: dict[str, Job] = {}
    if variant != "few" and set(kernels) & set(ATTENTION):
        jobs |= _attention_jobs(width, getattr(torch, dtype), shapes, device, variant == "policy")
    if variant != "policy" and set(kernels) & set(LOOKUP):
        jobs |= _lookup_jobs(width, getattr(torch, dtype), shapes, device, variant == "few")
    return [jobs[name] for name in kernels if name in jobs]


def _attention_jobs(width: int, dtype: torch.dtype, shapes: Shapes, device: str, with_policy: bool) -> dict[str, Job]:
    from tokred_kernels.backends.triton.token_attention import token_attention  # noqa: PLC0415  (needs triton)
    from tokred_kernels.backends.triton.token_attention_backward import token_attention_backward  # noqa: PLC0415

    images, heads, tokens = shapes.attention
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    # Views of one projection, as in a model.
    q, k, v = normal(images, tokens, 3, heads, width).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    bias = (normal(images, tokens).abs() + 1).log()
    policy = (normal(images, tokens).sigmoid() < KEPT).float() if with_policy else None
    grad_out, grad_worth = normal(images, tokens, heads, width).to(dtype), normal(images, tokens)
    scale = width**-0.5
    given = (q, k, v, bias, policy, None, tokens, scale)
    out, row_max, row_sum, _ = token_attention(*given, "")

    def forward() -> Sequence[Tensor]:
        return token_attention(*given, "")[:3]

    def importance() -> Sequence[Tensor]:
        return token_attention(*given, "class")[3:]

    def backward() -> Sequence[Tensor]:
        inputs = (grad_out, grad_worth, *given[:6], out, row_max, row_sum, tokens, scale, "class", False, with_policy)
        return token_attention_backward(*inputs)

    suffix = "+policy" if with_policy else ""
    calls = {"attention": forward, "importance": importance, **dict.fromkeys(("keys", "queries", "rows"), backward)}
    return {name: Job(name + suffix, call, (f"{name}_kernel",)) for name, call in calls.items()}


def _lookup_jobs(width: int, dtype: torch.dtype, shapes: Shapes, device: str, few: bool) -> dict[str, Job]:
    from tokred_kernels.backends.triton.lookup_gather import lookup_gather  # noqa: PLC0415  (needs triton)
    from tokred_kernels.backends.triton.lookup_gather_backward import lookup_gather_backward  # noqa: PLC0415
    from tokred_kernels.backends.triton.lookup_scatter import lookup_scatter  # noqa: PLC0415
    from tokred_kernels.backends.triton.lookup_scatter_backward import lookup_scatter_backward  # noqa: PLC0415

    images, heads, compressed, tokens = shapes.lookup
    compressed = shapes.few if few else compressed
    generator = torch.Generator(device).manual_seed(SEED)

    def rows(number: int) -> Tensor:
        drawn = torch.randn(images, number, heads, width, generator=generator, device=device)
        return drawn.to(dtype).transpose(1, 2)

    q, k, v, values = rows(compressed), rows(tokens), rows(tokens), rows(compressed)
    of_gather, of_scatter = rows(compressed).transpose(1, 2), rows(tokens).transpose(1, 2)
    scale = width**-0.5
    out, lse = lookup_gather(q, k, v, scale)

    def gather_backward() -> Sequence[Tensor]:
        return lookup_gather_backward(of_gather, None, q, k, v, out, lse, scale)

    def scatter_backward() -> Sequence[Tensor]:
        return lookup_scatter_backward(of_scatter, q, k, values, lse, scale)

    suffix = "+few" if few else ""
    jobs: dict[str, tuple[Callable[[], Sequence[Tensor]], tuple[str, ...]]] = {
        "gather": (lambda: lookup_gather(q, k, v, scale), ("gather_kernel", "combine_kernel")),
        "scatter": (lambda: (lookup_scatter(q, k, values, lse, scale),), ("scatter_kernel",)),
        "gather_keys": (gather_backward, ("lookup_keys_kernel",)),
        "gather_queries": (gather_backward, ("lookup_queries_kernel", "combine_kernel")),
        "scatter_keys": (scatter_backward, ("lookup_keys_kernel",)),
        "scatter_queries": (scatter_backward, ("lookup_queries_kernel", "combine_kernel")),
    }
    return {name: Job(name + suffix, call, timed) for name, (call, timed) in jobs.items()}


def tune(
    jobs: Sequence[Job],
    architecture: str,
    dtype: str,
    width: int,
    gpu: GpuFunctions,
    deadline: float,
    candidates: Mapping[str, Sequence[tuple[int, int, int, int]]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every config of every job, the one in use first; `winner` marks those to store.

    If a kernel raises, its rows so far come before the exception.
    """
    from tokred_kernels.backends.triton.configs_attention import choose  # noqa: PLC0415  (needs triton)

    for number, job in enumerate(jobs, 1):
        base = job.kernel.partition("+")[0]
        default = dataclasses.replace(
            choose(job.kernel, width, getattr(torch, dtype), architecture), block_channels=width
        )
        trial = Trial(job, architecture, dtype, default, gpu, deadline)
        names = ("block_queries", "block_keys", "num_warps", "num_stages")
        blocks = (candidates or CANDIDATES)[base]
        try:
            others = (dataclasses.replace(default, **dict(zip(names, b, strict=True))) for b in blocks)
            trial.measure([default, *others])
            if base in SPLITTING:
                best = trial.best() or default
                trial.measure([dataclasses.replace(best, enough=enough) for enough in ENOUGH])
            trial.decide()
            print(f"[{number}/{len(jobs)}] {summary(list(trial.rows.values()))}", flush=True)
        finally:
            yield from trial.rows.values()


def winning(rows: Sequence[dict[str, Any]]) -> dict[Any, Any]:
    """Return the winners as entries of tuned.json."""
    from tokred_kernels.backends.triton.configs_tables import AttentionConfig  # noqa: PLC0415  (needs triton)
    from tokred_kernels.backends.triton.configs_tuned import Place  # noqa: PLC0415

    return {
        Place(row["architecture"], row["kernel"], row["dtype"], row["width"]): AttentionConfig(**row["config"])
        for row in rows
        if row["winner"]
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line per kernel: the config in use, the fastest, and how many configs have each status."""
    lines = []
    for place in dict.fromkeys((row["kernel"], row["width"]) for row in rows):
        own = [row for row in rows if (row["kernel"], row["width"]) == place]
        counts = {row["status"]: [r["status"] for r in own].count(row["status"]) for row in own}
        fit = [row for row in own if row["status"] == "measured"]
        text = f"{place[0]} {place[1]}: "
        for title, row in (
            ("in use", next((row for row in fit if row["default"]), None)),
            ("fastest", min(fit, key=lambda row: row["median_us"], default=None)),
        ):
            if row is not None:
                c = row["config"]
                blocks = f"{c['block_queries']}x{c['block_keys']}, {c['num_warps']} warps, {c['num_stages']} stages"
                text += f"{title} {row['median_us']:.1f} us ({blocks}){', wins' if row['winner'] else ''}; "
        lines.append(text + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
