# SPDX-License-Identifier: MIT
import os
import subprocess
import sys

import pytest
import torch

import tokred_kernels as tk
from tokred_kernels import backends

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
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, cuda, triton, got 'gpu'"):
        tk.use_backend("gpu")


@pytest.mark.parametrize(
    "call", [lambda: tk.merge(X, A_MAP), lambda: tk.unmerge(X, A_MAP), lambda: tk.bipartite_match(X, 2)]
)
def test_a_named_backend_that_cannot_serve_raises(call):
    with tk.use_backend("cuda"), pytest.raises(RuntimeError, match=r'"cuda" was asked for.*What can: reference, cpu'):
        call()


def test_a_dtype_that_a_backend_lacks_raises():
    assert "got float64" in backends.reason_against("merge", "triton", "cuda", torch.float64) or not triton_here()
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert backends.reason_against("merge", "cpu", "cpu", dtype) is None
        assert backends.reason_against("merge", "reference", "cpu", dtype) is None
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        assert "cpu kernels take" in backends.reason_against("merge", "cpu", "cpu", dtype)


def triton_here():
    return backends.reason_against("merge", "triton", "cuda", torch.float32) is None


def test_a_gpu_kernel_that_no_recorded_run_has_shown_right_is_not_taken_by_auto(monkeypatch):
    monkeypatch.setattr(backends, "reason_against", lambda *_: None)
    monkeypatch.setattr(backends, "VERIFIED", {"cuda": ["merge"], "triton": ["unmerge"]})
    assert backends._decide("merge", "auto", "cuda", torch.float32) == "cuda"
    assert backends._decide("unmerge", "auto", "cuda", torch.float32) == "triton"
    assert backends._decide("bipartite_match", "auto", "cuda", torch.float32) == "reference"
    assert backends._decide("bipartite_match", "cuda", "cuda", torch.float32) == "cuda"


def test_show_config_tells_what_was_built(capsys):
    text = tk.show_config()
    assert capsys.readouterr().out.strip() == text
    assert "cpu kernels:" in text
    assert "bipartite_match  auto -> cpu" in text


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_environment_chooses_a_backend():
    code = "import torch, tokred_kernels as tk; print(tk.backends.choose('merge', torch.zeros(1, 1, 1)))"
    assert run(code, TOKRED_BACKEND="reference").stdout.strip() == "reference"
    assert "backend must be one of" in run(code, TOKRED_BACKEND="best").stderr


ISA_CODE = """
import torch, tokred_kernels as tk
torch.manual_seed(0)
print(tk.backends.native.MODULE.cpu.instruction_set())
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for tokens, channels in ((17, 5), (198, 64), (300, 33)):
        metric = torch.randint(-1, 2, (3, tokens, 4)).to(dtype)
        token_map = tk.bipartite_match(metric, tokens // 3, class_token=True)
        with tk.use_backend("reference"):
            assert torch.equal(token_map.dest, tk.bipartite_match(metric, tokens // 3, class_token=True).dest)
        x = torch.randn(3, tokens, channels).to(dtype).requires_grad_()
        grads = []
        for backend in ("cpu", "reference"):
            with tk.use_backend(backend):
                for reduce in ("sum", "mean", "amax"):
                    y = tk.merge(x, token_map, reduce=reduce)
                    grads += [y, tk.unmerge(y, token_map), *torch.autograd.grad(y.float().sin().sum(), x)]
        for got, want in zip(grads[:9], grads[9:]):
            torch.testing.assert_close(got, want)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(isa):
    result = run(ISA_CODE, TOKRED_CPU_ISA=isa)
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
