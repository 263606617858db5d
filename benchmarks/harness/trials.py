# SPDX-License-Identifier: MIT
"""Trials of the block sizes of one Triton kernel: each is compiled, checked against those in use, and timed alone."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

MARGIN = 0.03  # a smaller gain may be noise
# Largest ||result - default result|| / ||default result||: both round equally often, at different places.
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
SPILLED_WORDS = 4  # per thread; the tests of the compiled kernels allow as many


class Job(NamedTuple):
    """A kernel to tune: its name in the tables, a call that runs it, and the names of the launches to time."""

    kernel: str
    call: Callable[[], Sequence[Tensor]]
    timed: tuple[str, ...]


class Launch(NamedTuple):
    """A kernel launch, to run or compile later."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> Any:
        """Launch the kernel and return the compiled kernel."""
        return self.kernel[self.grid](*self.arguments, **self.options)

    def compile(self) -> Any:
        """Compile without launching."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)


class GpuFunctions(NamedTuple):
    """The functions that need a GPU; tests replace them. `measure` returns the microseconds of a call."""

    measure: Callable[[Callable[[], None]], float]
    compile: Callable[[Launch], Any]
    synchronise: Callable[[], None]


@contextmanager
def use_config(architecture: str, kernel: str, dtype: str, config: Any) -> Iterator[None]:
    """Put `config` into the tables."""
    from tokred_kernels.backends.triton.configs_tables import PORTABLE, TABLES  # noqa: PLC0415  (needs triton)

    before = TABLES.get(architecture)
    place = kernel, getattr(torch, dtype)
    table = dict(before or TABLES[PORTABLE])
    table[place] = table[place] | {config.block_channels: config}
    TABLES[architecture] = table
    try:
        yield
    finally:
        if before is None:
            del TABLES[architecture]
        else:
            TABLES[architecture] = before


@contextmanager
def record_launches(launches: list[Launch], *, dry_run: bool) -> Iterator[None]:
    """Append every launch to `launches`; with `dry_run`, do not run them."""
    from tokred_kernels.backends.triton import (  # noqa: PLC0415  (needs triton)
        lookup_gather,
        lookup_gradients,
        lookup_scatter,
        lookup_tiles,
        token_attention,
        token_attention_backward,
    )

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            def launch(*arguments: Any, **options: Any) -> Any:
                launches.append(Launch(self.kernel, grid, arguments, options))
                return None if dry_run else launches[-1].run()

            return launch

    modules = (lookup_gather, lookup_gradients, lookup_scatter, lookup_tiles, token_attention, token_attention_backward)
    originals = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    ]
    for module, name, kernel in originals:
        setattr(module, name, Recorder(kernel))
    try:
        yield
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)


class Trial:
    """The configs of one kernel, the one in use among them as `default`."""

    def __init__(
        self,
        job: Job,
        architecture: str,
        dtype: str,
        default: Any,
        gpu: GpuFunctions,
        deadline: float,
    ) -> None:
        self.job, self.architecture, self.dtype, self.default = job, architecture, dtype, default
        self.gpu, self.deadline = gpu, deadline
        self.rows: dict[Any, dict[str, Any]] = {}
        self.expected: Sequence[Tensor] | None = None

    def measure(self, configs: Sequence[Any]) -> None:
        """Add a row for each config that has none."""
        new = [config for config in dict.fromkeys(configs) if config not in self.rows]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = {config: pool.submit(self._compile, self._launches(config, dry_run=True)) for config in new}
            # Time nothing while others compile: the host would launch late.
            wait(compiling.values(), timeout=max(0.0, self.deadline - time.monotonic()))
            for config, future in compiling.items():
                self.rows[config] = {
                    **{"suite": "tune", "architecture": self.architecture, "kernel": self.job.kernel},
                    **{"dtype": self.dtype, "width": config.block_channels, "config": dataclasses.asdict(config)},
                    **{"default": config == self.default, "winner": False, "median_us": None},
                    **self._measured(config, future),
                }
            pool.shutdown(cancel_futures=True)

    def best(self) -> Any | None:
        """Return the fastest config that is right and does not spill."""
        fit = {config: row["median_us"] for config, row in self.rows.items() if row["status"] == "measured"}
        return min(fit, key=fit.__getitem__, default=None)

    def decide(self) -> None:
        """Mark the fastest config as the winner if it beats the default by the margin, in two measurements."""
        best, default = self.best(), self.rows[self.default]
        if best is None or best == self.default or default["median_us"] is None or self._late():
            return
        row = self.rows[best]
        if row["median_us"] < default["median_us"] * (1 - MARGIN):
            default["again_us"], row["again_us"] = (self._time(config)[0] for config in (self.default, best))
            row["winner"] = row["again_us"] < default["again_us"] * (1 - MARGIN)

    def _late(self) -> bool:
        return time.monotonic() >= self.deadline

    def _launches(self, config: Any, *, dry_run: bool) -> list[Launch]:
        launches: list[Launch] = []
        with (
            use_config(self.architecture, self.job.kernel, self.dtype, config),
            record_launches(launches, dry_run=dry_run),
        ):
            self.job.call()
        timed = [launch for launch in launches if launch.kernel.__name__ in self.job.timed]
        blocks = {"BLOCK_QUERIES": config.block_queries, "BLOCK_KEYS": config.block_keys}
        if not timed or not blocks.items() <= timed[0].options.items():
            raise RuntimeError(f"{self.job.kernel} was not launched with {config}")
        return timed

    def _compile(self, launches: list[Launch]) -> None:
        for launch in launches:
            if not self._late():
                self.gpu.compile(launch)

    def _time(self, config: Any) -> tuple[float, Any]:
        launches = self._launches(config, dry_run=False)

        def call() -> None:
            for launch in launches:
                launch.run()

        return self.gpu.measure(call), launches[0].run()

    def _measured(self, config: Any, compiling: Future[None]) -> dict[str, Any]:
        if self._late() or (self.expected is None and config != self.default):
            return {"status": "not reached"}  # no time left, or the default failed
        try:
            compiling.result()
            results = self._results(config)
            if self.expected is None:
                self.expected = results
            error = relative_error(results, self.expected)
            if not error <= TOLERANCE[self.dtype]:
                return {"status": "wrong", "error": error}
            microseconds, compiled = self._time(config)
        except Exception as error:  # of a compiler or a driver
            self.gpu.synchronise()  # raises if the device is lost
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
        spilled = getattr(compiled, "n_spills", None) or 0
        return {
            "status": "spills" if spilled > SPILLED_WORDS and config != self.default else "measured",
            **{"median_us": microseconds, "error": error, "spilled_words": spilled},
            "registers": getattr(compiled, "n_regs", None),
            "shared": getattr(getattr(compiled, "metadata", None), "shared", None),
        }

    def _results(self, config: Any) -> Sequence[Tensor]:
        """Return the results of a call whose outputs dry_run NaN before it."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory
        try:
            with use_config(self.architecture, self.job.kernel, self.dtype, config):
                results = self.job.call()
        finally:
            torch.use_deterministic_algorithms(before)
        self.gpu.synchronise()
        return results


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest ||result - expected|| / ||expected||, or NaN if any is NaN."""
    errors = [0.0]
    for one, other in zip(results, expected, strict=True):
        distance, size = ((one.float() - other.float()).norm().item(), other.float().norm().item())
        errors.append(distance / size if size else math.inf if distance else 0.0)
    return math.nan if any(map(math.isnan, errors)) else max(errors)
