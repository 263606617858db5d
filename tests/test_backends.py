# SPDX-License-Identifier: MIT
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

import tokred_kernels as tk
from tokred_kernels import backends
from tokred_kernels.backends.triton import availability

X = torch.randn(1, 6, 4)
A_MAP = tk.TokenMap.identity(1, 6)


def test_use_backend_is_a_setter_and_a_context():
    tk.use_backend("reference")
    assert backends.choose("merge", X) == "reference"
    with tk.use_backend("cpu"):
        assert backends.choose("merge", X) == "cpu"
        with tk.use_backend("reference"):
            assert backends.choose("merge", X) == "reference"
        assert backends.choose("merge", X) == "cpu"
    assert backends.choose("merge", X) == "reference"
    tk.use_backend("auto")
    assert backends.choose("merge", X) == "cpu"


def test_use_backend_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), tk.use_backend("reference"):
        1 / 0  # noqa: B018
    assert backends.choose("merge", X) == "cpu"


def test_unknown_backend():
    with pytest.raises(ValueError, match="name must be one of auto, reference, cpu, cuda, triton, got 'gpu'"):
        tk.use_backend("gpu")


@pytest.mark.parametrize(
    "call", [lambda: tk.merge(X, A_MAP), lambda: tk.unmerge(X, A_MAP), lambda: tk.bipartite_match(X, 2)]
)
def test_a_named_backend_that_cannot_serve_raises(call):
    with tk.use_backend("cuda"), pytest.raises(RuntimeError, match=r'"cuda" was requested .*can: reference, cpu'):
        call()


def test_a_dtype_that_a_backend_lacks_raises():
    assert "got float64" in backends.can_run("merge", "triton", "cuda", torch.float64) or not triton_here()
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert backends.can_run("merge", "cpu", "cpu", dtype) is None
        assert backends.can_run("merge", "reference", "cpu", dtype) is None
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        assert "cpu kernels take" in backends.can_run("merge", "cpu", "cpu", dtype)


def triton_here():
    return backends.can_run("merge", "triton", "cuda", torch.float32) is None


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.2.0", "triton 3.2.0 is too old: its kernels need 3.3"), ("3.3.0+git1", None), ("10.1", None), (None, None)],
)
def test_a_triton_that_is_too_old_is_not_taken(version, reason, monkeypatch):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", installed)
    availability.triton_failure.cache_clear()
    against = availability.triton_failure()
    assert against is None if reason is None else against.startswith(reason)
    assert backends.can_run("merge", "triton", "cuda", torch.float32) == against
    availability.triton_failure.cache_clear()


def test_show_config_tells_what_was_built(capsys):
    text = tk.show_config()
    assert capsys.readouterr().out.strip() == text
    assert "cpu kernels:" in text
    assert re.search(r"bipartite_match +auto -> cpu", text)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_environment_chooses_a_backend():
    code = "import torch, tokred_kernels as tk; print(tk.backends.choose('merge', torch.zeros(1, 1, 1)))"
    assert run(code, TOKRED_BACKEND="reference").stdout.strip() == "reference"


def test_an_unknown_backend_in_the_environment_is_one_error_at_the_first_use():
    message = "TOKRED_BACKEND must be one of auto, reference, cpu, cuda, triton, got 'best'"
    code = """
import torch, tokred_kernels as tk
x = torch.zeros(1, 4, 2)
dest = torch.zeros(1, 4, dtype=torch.int32)
for call in (
    lambda: tk.bipartite_match(x, 1),
    lambda: tk.token_attention(x[None], x[None], x[None]),
    lambda: tk.merge(x, tk.TokenMap.identity(1, 4)),
    lambda: tk.TokenMap(dest, 1).views(),
    tk.show_config,
):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    assert run(code, TOKRED_BACKEND="best").stdout.splitlines() == [message] * 5
    for command in ("info", "check"):
        result = subprocess.run(
            [sys.executable, "-m", "tokred_kernels", command],
            env={**os.environ, "TOKRED_BACKEND": "best"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


ISA_CODE = """
import torch, tokred_kernels as tk
torch.manual_seed(0)
print(tk.backends.native.MODULE.cpu.instruction_set())
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for tokens, channels in ((17, 5), (198, 64), (300, 33)):
        metric = torch.randint(-1, 2, (3, tokens, 4)).to(dtype)
        for class_token in (False, True):
            token_map = tk.bipartite_match(metric, tokens // 3, class_token=class_token)
            with tk.use_backend("reference"):
                assert torch.equal(
                    token_map.dest, tk.bipartite_match(metric, tokens // 3, class_token=class_token).dest
                )
        x = torch.randn(3, tokens, channels).to(dtype).requires_grad_()
        grads = []
        for backend in ("cpu", "reference"):
            with tk.use_backend(backend):
                for reduce in ("sum", "mean", "amax"):
                    y = tk.merge(x, token_map, reduce=reduce)
                    grads += [y, tk.unmerge(y, token_map), *torch.autograd.grad(y.float().sin().sum(), x)]
        for got, want in zip(grads[:9], grads[9:]):
            torch.testing.assert_close(got, want)
one_slot = tk.TokenMap.from_dest(torch.zeros(1, 2, dtype=torch.int64))
for dtype in (torch.float16, torch.bfloat16):  # loads and stores of each of their values, by sums that round
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    pair = torch.stack([every, every[torch.randperm(2**16)]])
    for reduce, want in (("sum", pair.float().sum(0)), ("mean", pair.float().sum(0) / 2)):
        got = tk.merge(pair[None], one_slot, reduce=reduce)[0, 0]
        torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=0, equal_nan=True)
"""


# Small whole numbers, so that scores tie exactly; entries that no kernel writes hold 77, which cannot be a cosine.
SELECTOR_CODE = """
import torch, tokred_kernels as tk
from tokred_kernels.backends import implementation
from tokred_kernels.partition import Partition, every_kth, every_other, prefix_and_rest
from tokred_kernels.windows import Windows

torch.manual_seed(0)
print(tk.backends.native.MODULE.cpu.instruction_set())


def poisoned(make):
    return lambda *args, **kwargs: make(*args, **kwargs).fill_(77)


torch.Tensor.new_empty, torch.empty_like = poisoned(torch.Tensor.new_empty), poisoned(torch.empty_like)


def same(op, *arguments):
    results = [implementation(backend, op)(*arguments) for backend in ("cpu", "reference")]
    single = isinstance(results[0], torch.Tensor)
    for got, want in zip(*([[result] for result in results] if single else results), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=4e-6 if want.is_floating_point() else 0)
    return results[0]


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def tokens(shape, dtype):
    x = torch.randint(-1, 2, shape).to(dtype)
    x[0, 1], x[-1, 2] = float("nan"), 0
    return x


def matches(metric, count):
    order = torch.stack([torch.randperm(count) for _ in range(metric.shape[0])]).int()
    lists = order[:, count // 4 :].contiguous(), order[:, : count // 4].contiguous()
    half = (count - 1) // 2
    partitions = [
        *(every_other(count, half, None, *flags) for flags in ((False, False), (True, False), (True, True))),
        *(every_other(count, half, 3, False, False), prefix_and_rest(count, half, 1), every_kth(count, 3, 1)),
        Partition(0, 1, count - count // 4, count // 4, 0, 0, False, half, *lists),
    ]
    for partition in partitions:
        if partition is None or metric.shape[-2] != count:
            continue
        _, partner, rank = same("rank_candidates", metric, partition)
        for r in {0, 1, partition.r // 2, partition.r}:
            same("build_match_map", partner, rank, partition._replace(r=r), count)


for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    for count, channels in ((7, 3), (70, 17), (198, 64), (301, 33)):
        matches(tokens((3, count, channels), dtype), count)
        matches(tokens((2, count, 2 * channels), dtype)[..., :channels], count)
        heads = torch.randint(-1, 2, (2, 4, count, channels)).to(dtype)
        same("rank_candidates", heads, every_other(count, 1, 0, False, False))

        lengths = (3, count, 0, count // 2)
        counts = [max((length - 1) // 4, 0) for length in (0, *lengths[1:])]
        packed = starts(length - r for length, r in zip(lengths, counts)), sum(lengths) - sum(counts)
        for flags in ((False, False), (True, False), (True, True)):
            partition = every_other(count, count, None, *flags)
            _, partner, rank = same("rank_candidates", tokens((sum(lengths), 4), dtype), partition, starts(lengths))
            joining = torch.tensor(counts).int()
            same("build_match_map", partner, rank, partition, sum(lengths), joining, starts(lengths), *packed)

    for windows in (Windows(1, 8, 8, 2, 2), Windows(0, 7, 9, 3, 2), Windows(2, 1, 5, 1, 5), Windows(5, 20, 3, 2, 1)):
        for channels in (0, 5, 70):
            # Not of whole numbers: a similarity on the threshold would go either way.
            x = torch.randn(3, windows.num_tokens(), channels).to(dtype)
            if channels:
                x[0, windows.first], x[1, windows.first + 1] = float("nan"), float("inf")
                x[2, windows.first + 2], x[2, windows.first + 3] = 0, 1e25  # whose square overflows
            same("window_similarity", x, windows, 0.05)

for windows in (Windows(1, 8, 8, 2, 2), Windows(0, 7, 9, 3, 2), Windows(2, 1, 5, 1, 5)):
    score = torch.randint(-1, 3, (3, windows.number())).float()
    for r in {0, 1, windows.number()}:
        same("window_map", score, windows, r)
    counts = [0, windows.number(), windows.number() // 2]
    lengths = [windows.num_tokens() - r * (windows.size() - 1) for r in counts]
    same("window_map", score, windows, 0, torch.tensor(counts).int(), starts(lengths), sum(lengths))

for shape in ((3, 100), (2, 1), (1, 20000), (4, 7)):
    score = torch.randint(-2, 5, shape) / 4
    score[score < 0] = float("-inf")
    for threshold, divisor in ((0.5, 0), (float("-inf"), 0), (0, 1), (0, 2.5)):
        for own in (True, False):
            same("count_above_threshold", score, threshold, divisor, own)
"""


ATTENTION_CODE = """
import torch, tokred_kernels as tk
torch.manual_seed(0)
print(tk.backends.native.MODULE.cpu.instruction_set())


def results(backend, call, leaves):
    with tk.use_backend(backend):
        values = call(*leaves)
        return *values, *torch.autograd.grad(sum(v.double().sin().sum() for v in values), leaves)


def same(call, *parts):
    bound = {8: 1e-10, 4: 1e-4, 2: 4e-2}[parts[0].element_size()]
    leaves = [part.requires_grad_() for part in parts]
    for got, want in zip(results("cpu", call, leaves), results("reference", call, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def lookup(q, k, v, values):
    out, lse = tk.lookup_gather(q, k, v)
    return out, tk.lookup_scatter(q, k, values, lse)


for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    for tokens, channels in ((1, 1), (7, 5), (50, 32), (97, 72)):
        q, k, v = (torch.randn(2, 2, tokens, channels, dtype=torch.float64).to(dtype) for _ in range(3))
        size, policy = torch.rand(2, tokens) + 0.5, torch.rand(2, tokens)
        both = lambda q, k, v, s, p: tk.token_attention(q, k, v, size=s, policy=p, importance="mean")
        same(both, q, k, v, size, policy)
        same(lambda q, k, v, s: tk.token_attention(q, k, v, size=s, importance="class"), q, k, v, size)
        few = [torch.randn(2, 2, (tokens + 2) // 3, channels, dtype=torch.float64).to(dtype) for _ in range(2)]
        same(lookup, few[0], k, v, few[1])

# Results so large that they pass the caches by, in whole vectors and not.
for tokens, channels in ((33000, 64), (53000, 40)):
    q, values = torch.randn(2, 1, 1, 3, channels)
    same(lookup, q, torch.randn(1, 1, tokens, channels), torch.randn(1, 1, tokens, channels), values)
"""


@pytest.mark.parametrize("code", [ISA_CODE, SELECTOR_CODE, ATTENTION_CODE], ids=["movers", "selectors", "attention"])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "amx"])
def test_every_instruction_set_gives_the_same(isa, code):
    result = run(code, TOKRED_CPU_ISA=isa)
    if f"TOKRED_CPU_ISA={isa}: this machine and build have" in result.stderr:
        pytest.skip(f"no {isa} here")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa


def test_an_unknown_instruction_set_raises():
    assert "TOKRED_CPU_ISA=mmx: this machine and build have baseline" in run(ISA_CODE, TOKRED_CPU_ISA="mmx").stderr


def test_one_thread_pool():
    code = """
import torch, tokred_kernels
paths = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}
assert len(paths) == 1, paths
"""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs Linux's /proc")
    result = run(code)
    assert result.returncode == 0, result.stderr
