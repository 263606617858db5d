# SPDX-License-Identifier: MIT
"""Which backend `auto` takes on a device whose kernels are self-checked. The CPU stands in for a GPU."""

import warnings

import pytest
import torch

import tokred_kernels as tk
from tokred_kernels import backends
from tokred_kernels.backends import selfcheck
from tokred_kernels.backends.selection import ranking
from tokred_kernels.backends.selfcheck.verdict import PASSED, WRONG, Verdict
from tokred_kernels.backends.triton import availability
from tokred_kernels.ops.registry import SPECS

BF16 = torch.bfloat16


def passed(time=None, dtype="bfloat16"):
    return Verdict(PASSED, None, {} if time is None else {f"{dtype} 64x197": time})


def rank(op="merge", dtype=BF16, training=False, **verdicts):
    return ranking(
        op, {name: {op: v} if isinstance(v, Verdict) else v for name, v in verdicts.items()}, dtype, training
    )


def test_the_fastest_that_passed_comes_first():
    assert rank(cuda=passed(8), triton=passed(6), reference=passed(90)) == ("triton", "cuda", "reference")
    assert rank(cuda=passed(8), triton=Verdict(WRONG, "off"), reference=passed(90)) == ("cuda", "reference")
    assert rank(cuda=passed(8), triton=passed(9), reference=passed(5)) == ("reference", "cuda", "triton")


def test_times_within_five_percent_are_a_draw():
    assert rank(cuda=passed(6.29), triton=passed(6), reference=passed(90)) == ("cuda", "triton", "reference")
    assert rank(cuda=passed(6.31), triton=passed(6), reference=passed(90)) == ("triton", "cuda", "reference")


def test_without_times_the_order_is_fixed():
    assert rank(cuda=passed(), triton=passed(), reference=passed()) == ("cuda", "triton", "reference")
    assert rank() == ("reference",)


def test_dtypes_have_times_of_their_own():
    verdicts = {
        "cuda": Verdict(PASSED, None, {"bfloat16 a": 9, "float32 a": 5}),
        "triton": Verdict(PASSED, None, {"bfloat16 a": 6, "float32 a": 7}),
    }
    assert rank(**verdicts)[0] == rank(dtype=torch.float16, **verdicts)[0] == "triton"
    assert rank(dtype=torch.float32, **verdicts)[0] == "cuda"


def test_training_needs_the_gradient_too():
    verdicts = {
        "cuda": {"merge": passed(5), "merge_backward": Verdict(WRONG, "off")},
        "triton": {"merge": passed(7), "merge_backward": passed(7)},
        "reference": {"merge": passed(90), "merge_backward": passed(90)},
    }
    assert rank(**verdicts) == ("cuda", "triton", "reference")
    assert rank(training=True, **verdicts) == ("triton", "reference")
    # The gradient of unmerge is a merge.
    verdicts = {"cuda": {"unmerge": passed(5), "merge": Verdict(WRONG, "off")}}
    assert rank("unmerge", **verdicts) == ("cuda", "reference")
    assert rank("unmerge", training=True, **verdicts) == ("reference",)


@pytest.fixture
def checked(monkeypatch):
    """Treat the CPU as a GPU whose verdicts the test gives: only C++ kernels exist for it."""
    found = {}
    monkeypatch.setattr(backends, "SELF_CHECKED", {"cpu"})
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr("tokred_kernels.backends.selection.FIXED_ORDER", ("cpu", "triton", "torch", "reference"))
    monkeypatch.setattr(selfcheck, "verdicts", lambda device, op: found)
    monkeypatch.setattr(selfcheck, "is_known", lambda device, op: True)
    return found


X = torch.randn(2, 6, 4)


def test_a_kernel_that_did_not_pass_is_not_used(checked):
    assert backends.choose("merge", X) == "reference"
    backends._chosen.clear()
    checked["cpu"] = {"merge": passed()}
    assert backends.choose("merge", X) == "cpu"
    assert backends.choose("merge", X, training=True) == "reference"
    assert backends.choose("unmerge", X) == "reference"
    with tk.use_backend("cpu"):  # by name, without a check
        assert backends.choose("unmerge", X) == "cpu"


def test_ops_choose_their_gradients_too(checked):
    checked["cpu"] = {"merge": passed(), "bipartite_match": passed()}
    x = X.clone().requires_grad_()
    token_map = tk.bipartite_match(X, 2)
    assert "reference" not in backends._chosen.values()
    tk.merge(x, token_map).sum().backward()
    assert backends._chosen["merge", "auto", X.device, X.dtype, 0, True, False] == "reference"
    assert torch.equal(x.grad, torch.full_like(x, 1.0)) or x.grad.isfinite().all()


def test_a_compound_is_one_call_only_if_all_parts_agree(checked):
    checked["cpu"] = {"merge": passed()}
    assert backends.choose("bipartite_merge", X) == "reference"
    backends._chosen.clear()
    checked["cpu"]["bipartite_match"] = passed()
    assert backends.choose("bipartite_merge", X) == "cpu"


def test_integer_ops_follow_the_verdicts(checked):
    dest = torch.zeros(1, 3, dtype=torch.int32)
    checked["cpu"] = {"window_similarity": passed()}
    assert backends.companion("window_map", "cpu", X) == "reference"
    with tk.use_backend("cpu"):
        assert backends.companion("window_map", "cpu", X) == backends.best("to_csr", dest) == "cpu"
    with tk.use_backend("reference"):
        assert backends.best("to_csr", dest) == "reference"
    with tk.use_backend("cuda"):  # cannot run on this tensor
        assert backends.best("to_csr", dest) in ("cpu", "reference")


def test_wide_heads_pass_over_kernels_that_do_not_take_them(checked, monkeypatch):
    checked["triton"] = checked["cpu"] = {"lookup_gather": passed()}
    monkeypatch.setattr("tokred_kernels.backends.selection.FIXED_ORDER", ("triton", "cpu", "reference"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(availability, "triton_failure", lambda: None)
    assert [backends.choose("lookup_gather", X, head_dim=d) for d in (64, 128, 129)] == ["triton", "triton", "cpu"]
    assert len(backends._chosen) == 2  # one entry for all head dimensions that no backend limits
    refused = r"at most 128 channels a head, got 129\. These can: reference, cpu"
    with tk.use_backend("triton"), pytest.raises(RuntimeError, match=refused):
        backends.choose("lookup_gather", X, head_dim=129)
    assert SPECS["lookup_gather"].max_head_dim["cuda"] == 256


def test_torch_attends_if_it_is_faster(checked):
    q = torch.randn(1, 1, 4, 8)
    for ours, torchs, expected in ((5, 9, "cpu"), (9, 5, "torch")):
        backends._chosen.clear()
        checked["cpu"] = {"token_attention": passed(ours, "float32")}
        checked["torch"] = {"token_attention": passed(torchs, "float32")}
        assert backends._choose("token_attention", "auto", q, with_torch=True) == expected
        assert backends.choose("token_attention", q) == "cpu"
    backends._chosen.clear()
    checked["cpu"] = {"token_attention": Verdict(WRONG, "off")}
    checked["torch"] = {}
    assert backends.choose("token_attention", q) == "reference"
    if not backends.native.WIDE_VECTORS:  # SDPA, not the reference, which stores all weights
        assert backends.use_sdpa("token_attention", q, plain=False)


def test_a_compiled_call_follows_the_verdicts(checked, fresh_dynamo):
    checked["cpu"] = {"merge": passed()}
    token_map = tk.TokenMap.from_dest(torch.tensor([[0, 1, 1, 2, 2, 2]] * 2))
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(lambda x: tk.merge(x, token_map), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(X), tk.merge(X, token_map))
    assert "tokred.merge" in graphs[0]


# How `verdicts` finds what it returns, for a pretended GPU.


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU in name: its check is counted, and finds `passed` for everything."""
    runs = []
    everything = {name: {op: passed() for op in backends.OPS} for name in (*selfcheck.CHECKED["cuda"],)}
    monkeypatch.setenv("TOKRED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TOKRED_SELFCHECK", raising=False)
    monkeypatch.setattr(selfcheck, "_known", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(selfcheck.cache, "facts", lambda device: {"device": "A GPU", "torch": torch.__version__})
    monkeypatch.setattr(selfcheck, "check", lambda *_, **__: runs.append(1) or everything)
    monkeypatch.setattr(selfcheck, "due", lambda device, found, op: [] if found else [("cuda", "merge")])
    return runs


GPU = torch.device("cuda", 0)


def test_the_first_use_checks_once_and_says_so(gpu, capsys, monkeypatch):
    assert selfcheck.verdicts(GPU)["triton"]["merge"].verdict == PASSED
    assert len(gpu) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "A GPU" in said and "TOKRED_SELFCHECK=0" in said
    selfcheck.verdicts(torch.device("cuda"))
    monkeypatch.setattr(selfcheck, "_known", {})  # another process
    assert selfcheck.verdicts(GPU)["cuda"]["merge"].verdict == PASSED
    assert len(gpu) == 1 and capsys.readouterr().err == ""


def test_no_check_if_it_is_turned_off(gpu, capsys, monkeypatch):
    monkeypatch.setenv("TOKRED_SELFCHECK", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selfcheck.verdicts(GPU) == {}
    assert not gpu and capsys.readouterr().err == ""


def test_no_check_during_graph_capture(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="during CUDA graph capture.*python -m tokred_kernels check"):
        assert selfcheck.verdicts(GPU) == {}
    assert not gpu and not selfcheck.is_known(GPU, "merge")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert selfcheck.verdicts(GPU) and len(gpu) == 1  # later, the check runs


def test_no_check_in_a_forked_process(gpu, monkeypatch):
    monkeypatch.setattr(selfcheck, "_is_fork", True)
    monkeypatch.setattr(selfcheck.cache, "facts", None)  # CUDA must not be asked there
    with pytest.warns(UserWarning, match="in a forked process"):
        assert selfcheck.verdicts(GPU) == {}
    assert selfcheck.verdicts(GPU) == {} and not gpu  # and not at every call


def test_a_fork_is_noticed():
    import os

    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.write(writing, str(selfcheck._is_fork).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"True" and not selfcheck._is_fork
    os.close(reading), os.close(writing)


def test_a_folder_that_cannot_be_written_means_memory_only(gpu, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKRED_CACHE_DIR", str(tmp_path / "file"))
    assert selfcheck.verdicts(GPU)["triton"]["merge"].verdict == PASSED
    assert len(gpu) == 1 and "is a file" in capsys.readouterr().err
    selfcheck.verdicts(GPU)
    assert len(gpu) == 1


def test_patch_prepares_the_kernels(gpu, monkeypatch):
    class Parameter:
        device = GPU

    class Model(torch.nn.Module):
        def parameters(self):
            return [Parameter(), Parameter()]

    backends.prepare(Model())
    assert len(gpu) == 1
    monkeypatch.setattr(selfcheck, "_known", {})
    with tk.use_backend("triton"):  # needs no verdict
        monkeypatch.setattr(selfcheck, "verdicts", None)
        backends.prepare(Model())


def test_triton_is_due_only_if_cuda_has_no_correct_kernel(monkeypatch):
    def able(op, backend, device, dtype):
        return None if backend != "cuda" or "attention" not in op else "no kernel"

    monkeypatch.setattr(selfcheck, "can_run", able)
    pairs = selfcheck.due(GPU, {})
    assert {op for backend, op in pairs if backend == "triton"} == {"token_attention", "token_attention_backward"}
    assert ("cuda", "merge") in pairs and ("cuda", "token_attention") not in pairs
    found = {backend: {op: passed() for b, op in pairs if b == backend} for backend in selfcheck.CHECKED["cuda"]}
    assert selfcheck.due(GPU, found) == []
    found["cuda"]["merge"] = Verdict(WRONG, "off")
    assert selfcheck.due(GPU, found) == [("triton", "merge")]
    monkeypatch.setattr(selfcheck, "can_run", lambda op, b, *_: "no CUDA" if b == "cuda" else None)
    lookup = {op for op in backends.OPS if SPECS[op].family == "lookup"}
    rest = set(backends.OPS) - lookup
    assert {op for backend, op in selfcheck.due(GPU, {}) if backend == "triton"} == rest
    # Those of lookup attention are due when one is first used.
    pairs = selfcheck.due(GPU, {}, "lookup_gather")
    assert {op for backend, op in pairs if backend == "triton"} == {op for _, op in pairs} == lookup


def test_lookup_ops_have_a_check_of_their_own(gpu, monkeypatch):
    monkeypatch.setattr(selfcheck, "due", lambda device, found, op: [("cuda", op)])
    selfcheck.verdicts(GPU, "merge"), selfcheck.verdicts(GPU, "unmerge")
    assert len(gpu) == 2  # the pretended check leaves the same due, and so runs again for Triton in place of CUDA
    before = len(gpu)
    selfcheck.verdicts(GPU, "lookup_gather"), selfcheck.verdicts(GPU, "lookup_scatter")
    assert len(gpu) == 2 * before


def test_known_bad_kernels_are_not_tried(monkeypatch):
    from tokred_kernels.backends.selfcheck import known_bad, supervisor

    bad = known_bad.KnownBad("cpu", "merge", None, None, "wrong on this machine")
    monkeypatch.setattr(known_bad, "KNOWN_BAD", (bad,))
    tried = []
    monkeypatch.setattr(supervisor, "run", lambda tasks, settings, progress, known: tried.extend(tasks) or known)
    found = selfcheck.check(torch.device("cpu"), [("cpu", "merge"), ("cpu", "unmerge")])
    assert found["cpu"]["merge"] == Verdict("unsupported", "wrong on this machine")
    assert [task.op for task in tried] == ["unmerge"]
    assert known_bad.reason_known("triton", "merge", "sm_90", "3.6.0") is None
    monkeypatch.setattr(known_bad, "KNOWN_BAD", (bad._replace(architecture="sm_90", triton="3.6"),))
    assert known_bad.reason_known("cpu", "merge", "sm_90", "3.6.1")
    assert not known_bad.reason_known("cpu", "merge", "sm_80", "3.6.1")
    assert not known_bad.reason_known("cpu", "merge", "sm_90", "3.7.0")


def test_triton_needs_a_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    availability.capability_failure.cache_clear()
    assert "compute capability 8.0, this GPU has 7.5" in availability.capability_failure(7)
    availability.capability_failure.cache_clear()
