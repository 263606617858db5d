# SPDX-License-Identifier: MIT
"""The CUDA sources, compiled for the host by g++ on top of emulation/, as a process that runs ops on request.

And what their tests share. Metrics are small whole numbers where indices are compared: their products and norms are
exact in float32, so that the scores are equal to the last bit, and ties are many and real. Merged values are whole
numbers for the same reason.
"""

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tokred_kernels.backends.reference import to_csr

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).resolve().parent / "emulation"
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda p: -p.stat().st_size) + sorted(EMULATION.glob("*.cpp"))
HEADERS = [p for d in (ROOT / "csrc/cuda", ROOT / "csrc/common", EMULATION) for p in sorted(d.glob("*.*h"))]
FLAGS = [
    *("-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DTOKRED_EMULATION", f"-I{EMULATION}"),
    # What goes wrong with pointers and indices; all of "undefined" would double the compile time.
    *("-g1", "-fsanitize=address,alignment,shift,signed-integer-overflow", "-fno-sanitize-recover=all"),
]
OPS = (  # in the order of driver.cpp
    *(
        "bipartite_match",
        "rank_candidates",
        "build_match_map",
        "count_above_threshold",
        "window_similarity",
        "window_map",
    ),
    *("keep_topk", "to_csr", "compose", "merge", "merge_backward", "unmerge"),
    *("lookup_gather", "lookup_gather_backward", "lookup_scatter", "lookup_scatter_backward"),
    *("match_config", "order", "row_config", "window_config"),
)
H100_SHARED = 227 * 1024  # bytes of dynamic shared memory that a block may have
SMALL_SHARED = 99 * 1024  # the same on the architecture with the least
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def build() -> Path:
    """The driver, built once for each state of the sources and kept in the temporary folder."""
    compiler = shutil.which("g++")
    state = hashlib.sha256("\0".join([*FLAGS, *(p.read_text() for p in [*SOURCES, *HEADERS])]).encode()).hexdigest()
    folder = Path(tempfile.gettempdir(), f"tokred-emulation-{os.getuid()}", state[:16])
    driver = folder / "driver"
    if driver.exists():
        return driver
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        target = folder / f"{source.stem}-{os.getpid()}.o"
        subprocess.run([compiler, *FLAGS, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    linked = folder / f"driver-{os.getpid()}"
    subprocess.run([compiler, *FLAGS, *objects, "-o", linked], check=True)
    linked.rename(driver)  # at once, so that a second run never sees half of it
    return driver


class Emulator:
    """Calls ops in the driver; tensors are sent there and back, and written in place."""

    def __init__(self, driver):
        self.driver = driver
        self.start()

    def start(self):
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (it lives as long as the process)
        self.process = subprocess.Popen(
            [self.driver], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment
        )

    def call(self, op, integers, buffers=(), *, shared_limit=H100_SHARED, reverse=False, offset=0):
        """Run `op`; `buffers` are 1-D tensors or None.

        Addresses are `offset` bytes past a multiple of 16, where a buffer's elements can lie there.
        """
        numbers = [OPS.index(op), shared_limit, int(reverse), len(integers), *map(int, integers), len(buffers)]
        message = [struct.pack(f"<{len(numbers)}q", *numbers)]
        views = [None if b is None else b.view(torch.uint8).numpy() for b in buffers]
        for buffer, view in zip(buffers, views, strict=True):
            if view is None:
                message.append(struct.pack("<2q", -1, 0))
                continue
            message.append(struct.pack("<2q", view.size, 0 if offset % buffer.itemsize else offset))
            message.append(view.tobytes())
        try:
            self.process.stdin.write(b"".join(message))
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail(op)
        failed, size = self.read_numbers(op, 2)
        if failed:
            raise RuntimeError(self.read(op, size).decode())
        result = self.read_numbers(op, size)
        for view in views:
            if view is not None and view.size:
                view[:] = torch.frombuffer(bytearray(self.read(op, view.size)), dtype=torch.uint8).numpy()
        return result

    def read_numbers(self, op, count):
        return struct.unpack(f"<{count}q", self.read(op, 8 * count))

    def read(self, op, size):
        data = self.process.stdout.read(size)
        if len(data) != size:
            self.fail(op)
        return data

    def fail(self, op):
        status = self.process.wait()
        self.log.seek(0)
        words = self.log.read()[:4000]
        self.start()  # for the tests after this one
        pytest.fail(f"the emulated {op} ended with status {status}:\n{words}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
all_floats = pytest.mark.parametrize("dtype", list(DTYPES), ids=dtype_id)


def flat(tensor):
    """What lies in memory from a tensor's first element to its last, however it is strided."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length if tensor.numel() else 0,), (1,)).clone()


def whole_numbers(*size, dtype=torch.float32, low=-3, high=4, scale=1):
    return (torch.randint(low, high, size) * scale).to(dtype)


def poisoned(*sizes):
    """Index outputs, filled with what no kernel writes."""
    return [torch.full((size,), -7, dtype=torch.int32) for size in sizes]


def assert_map(got, dest, num_out):
    names = ("dest", "members", "begin", "count")
    for name, ours, expected in zip(names, got, (dest, *to_csr.to_csr(dest, num_out)), strict=True):
        assert ours.flatten().tolist() == expected.flatten().tolist(), name


def starts(lengths):
    """Where packed images of these lengths start, and where the last one ends."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
