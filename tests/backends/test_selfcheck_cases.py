# SPDX-License-Identifier: MIT
"""The cases of the self-check pass on correct kernels and report wrong ones."""

import math

import pytest
import torch

from tokred_kernels import backends
from tokred_kernels.backends import native
from tokred_kernels.backends.selfcheck import cases as selfcheck
from tokred_kernels.backends.selfcheck.cases import compare
from tokred_kernels.ops.registry import SPECS

every_op = pytest.mark.parametrize("op", backends.OPS)
needs_native = pytest.mark.skipif(native.MODULE is None, reason="the native module is not built")


def run(op, arguments):
    """The outputs of the C++ kernel, in a tuple."""
    outputs = backends.implementation("cpu", op)(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def errors(op, function, **level):
    """What the checks of all cases say about `function` of their arguments, without those that pass."""
    found = {case.name: case.check(function(case.arguments)) for case in selfcheck.cases(op, **level)}
    assert found, "no case at all"
    return {name: error for name, error in found.items() if error is not None}


@needs_native
@every_op
def test_cpp_kernels_pass(op):
    assert errors(op, lambda arguments: run(op, arguments)) == {}


@every_op
def test_the_reference_passes(op):
    assert errors(op, lambda arguments: selfcheck.reference_call(op, arguments)) == {}


@needs_native
@every_op
def test_cpp_kernels_pass_the_cases_of_the_interpreter(op):
    assert errors(op, lambda arguments: run(op, arguments), interpreted=True) == {}


@every_op
def test_cases_are_reproducible_and_leave_the_global_generator_alone(op):
    state = torch.get_rng_state()
    first, second = (list(selfcheck.cases(op, interpreted=True)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [case.name for case in first] == [case.name for case in second]
    for case, again in zip(first, second, strict=True):
        for one, other in zip(flat(case.arguments), flat(again.arguments), strict=True):
            assert one.stride() == other.stride()
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


@every_op
def test_names_are_unique(op):
    for level in ({}, {"interpreted": True}):
        names = [case.name for case in selfcheck.cases(op, **level)]
        assert len(set(names)) == len(names)
    assert next(selfcheck.cases(op, deep=True)).name


def flat(arguments):
    """The tensors of the arguments, those in named tuples too."""
    for part in arguments:
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, tuple):
            yield from flat(part)


def scaled(tensor):
    """All entries off by one part in a thousand."""
    return tensor * 1.001 if tensor.is_floating_point() else None


def raised(tensor):
    """One entry in the middle off by one."""
    if tensor.is_floating_point() or tensor.numel() == 0:
        return None
    changed = tensor.clone()
    changed.view(-1)[tensor.numel() // 2] += 1
    return changed


def swapped(tensor):
    """Two neighbours swapped: tokens of the last image, or entries of a tensor with one dimension."""
    rows = tensor if tensor.dim() == 1 else tensor[-1]
    if len(rows) < 2:
        return None
    changed = tensor.clone()
    part = changed if tensor.dim() == 1 else changed[-1]
    part[0], part[1] = rows[1], rows[0]
    return changed


def one_nan(tensor):
    """One entry in the middle that was not written."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    changed = tensor.clone(memory_format=torch.contiguous_format)
    changed.view(-1)[tensor.numel() // 2] = torch.nan
    return changed


@needs_native
@every_op
@pytest.mark.parametrize("change", [scaled, raised, swapped, one_nan])
def test_wrong_outputs_are_reported(op, change):
    tried, reported = set(), set()
    for case in selfcheck.cases(op):
        if not SPECS[op].is_integer and next(flat(case.arguments)).dtype != torch.float32:
            continue
        outputs = run(op, case.arguments)
        for place, output in enumerate(outputs):
            wrong = change(output)
            if wrong is not None and not torch.equal(wrong.nan_to_num(), output.nan_to_num()):
                tried.add(place)
                if case.check((*outputs[:place], wrong, *outputs[place + 1 :])) is not None:
                    reported.add(place)
    assert reported == tried
    if change in (scaled, raised):
        floats = change is scaled
        assert tried == {n for n, output in enumerate(outputs) if output.is_floating_point() == floats}


@needs_native
def test_off_by_one_in_a_thousand_is_reported_by_most_cases():
    for op in sorted({op for op in backends.OPS if not SPECS[op].is_integer} - {"bipartite_match"}):
        missed = []
        for case in selfcheck.cases(op):
            outputs = run(op, case.arguments)
            if next(flat(case.arguments)).dtype == torch.float32:
                wrong = tuple(scaled(t) if t.is_floating_point() else t for t in outputs)
                missed += [case.name] if case.check(wrong) is None else []
        assert len(missed) <= 2, f"{op}: {missed}"


def as_tf32(part):
    """Float32 numbers with the ten digits of the fraction that tensor cores read."""
    if not isinstance(part, torch.Tensor) or part.dtype != torch.float32:
        return part
    return part.view(torch.int32).add(1 << 12).bitwise_and(-(1 << 13)).view(torch.float32)


@needs_native
@pytest.mark.parametrize("op", [op for op in backends.OPS if not SPECS[op].is_integer and SPECS[op].family != "merge"])
def test_products_of_tf32_are_reported(op):
    found = [
        case.check(run(op, (*map(as_tf32, case.arguments),)))
        for case in selfcheck.cases(op)
        if next(flat(case.arguments)).dtype == torch.float32
    ]
    assert any(found)


def test_what_a_mismatch_says():
    want = compare.closely("out", torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3), 4, torch.float32)
    got = torch.ones(2, 3)
    assert compare.mismatch(got, want) is None
    got[1, 2] = 1.001
    assert compare.mismatch(got, want).startswith("out[1, 2]: expected 1.0, got 1.00100")
    assert "expected torch.float32 (2, 3), got torch.float64 (2, 3)" in compare.mismatch(got.double(), want)
    assert "got torch.float32 (2, 2)" in compare.mismatch(got[:, :2], want)
    check = compare.expect(lambda: [want])
    assert check((torch.ones(2, 3), torch.ones(1))) == "expected 1 outputs, got 2"


def test_infinities_and_nan_are_compared_exactly():
    want = torch.tensor([math.inf, math.nan, 1.0], dtype=torch.float64)
    want = compare.closely("y", want, want, 4, torch.float32)
    assert compare.mismatch(torch.tensor([math.inf, math.nan, 1.0]), want) is None
    for place, value in ((0, 3.0), (0, math.nan), (0, -math.inf), (1, 1.0), (2, math.nan)):
        got = torch.tensor([math.inf, math.nan, 1.0])
        got[place] = value
        assert compare.mismatch(got, want).startswith(f"y[{place}]")


def test_torchs_attention_is_one_more_way_to_compute_a_case():
    found = 0
    for case in selfcheck.cases("token_attention", interpreted=True):
        *_, policy, starts, _, _, wanted = case.arguments
        if policy is not None or starts is not None or wanted:
            with pytest.raises(ValueError, match="sdpa_call: torch's attention takes a bias only"):
                selfcheck.sdpa_call("token_attention", case.arguments)
        elif "NaN" not in case.name:
            _, row_max, row_sum, importance = selfcheck.reference_call("token_attention", case.arguments)
            out = selfcheck.sdpa_call("token_attention", case.arguments)
            assert case.check((*out, row_max, row_sum, importance)) is None
            found += 1
    assert found >= 2


def test_torchs_attention_has_the_references_gradients():
    case = selfcheck.timing_cases("token_attention_backward")[0]
    small = tuple(t[:1] if isinstance(t, torch.Tensor) and t.dim() > 1 else t for t in case.arguments)
    gradients = selfcheck.sdpa_call("token_attention_backward", small)
    assert len(gradients) == 3
    for got, want in zip(gradients, selfcheck.reference_call("token_attention_backward", small), strict=False):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_native
@every_op
def test_timing_cases_are_valid_calls(op):
    found = selfcheck.timing_cases(op)
    dtypes = {torch.float32} if SPECS[op].is_integer else {torch.float32, torch.bfloat16}
    assert {case.dtype for case in found} == dtypes
    assert len({case.name for case in found}) == len(found) >= 2
    for case in found:
        got, want = run(op, case.arguments), selfcheck.reference_call(op, case.arguments)
        assert [t.shape for t in got] == [t.shape for t in want]
