# SPDX-License-Identifier: MIT
"""The cases of attention and pruning: a wrong result is told, and what they must take is counted."""

import dataclasses

import pytest
import torch

from benchmarks import agreement, attention, traffic
from benchmarks.cases import ATTENTION_OPS, CASES, Case
from benchmarks.providers import Provider, providers

TINY = Case("token_attention", "tiny", (2, 7, 12), 0, "cpu", heads=3, metric_dim=4, variant="size+class", training=True)
PRUNED = Case("keep_topk", "tiny", (2, 9, 6), 3, "cpu")


@pytest.mark.parametrize("variant", ["size", "policy", "class", "size+class", "size+policy+class"])
@pytest.mark.parametrize("training", [False, True])
def test_every_provider_agrees(variant, training):
    case = dataclasses.replace(TINY, variant=variant, training=training)
    inputs = attention.draw(case, 0)
    names = set()
    for provider in providers(case, ["reference", "cpu"], False):
        agreement.check(case, provider, inputs)
        names.add(provider.name)
    assert names == {"published", "fused", "reference", "cpu"}


def test_pruning_agrees():
    for provider in providers(PRUNED, ["reference", "cpu"], False):
        agreement.check(PRUNED, provider, attention.draw(PRUNED, 0))


@pytest.mark.parametrize("output", range(5))
def test_a_wrong_result_is_told(output):
    right = attention.with_backward(attention.ours(TINY))

    def wrong(inputs):
        results = list(right(inputs))
        results[output] = results[output] + 1e-2 * results[output].abs().max()
        return tuple(results)

    inputs = attention.draw(TINY, 0)
    agreement.check(TINY, Provider("cpu", right, "cpu"), inputs)
    with pytest.raises(agreement.Disagreement, match="off by"):
        agreement.check(TINY, Provider("cpu", wrong, "cpu"), inputs)


def test_inputs_are_as_the_variant_says():
    policy = attention.draw(dataclasses.replace(TINY, variant="policy"), 0)
    assert policy.size is None
    assert set(policy.policy.detach().unique().tolist()) <= {0.0, 1.0}
    assert len(policy.grads) == 1
    assert attention.draw(TINY, 0).policy is None
    assert len(attention.draw(TINY, 0).grads) == 2
    evaluating = attention.draw(dataclasses.replace(TINY, training=False), 0)
    assert not evaluating.q.requires_grad
    assert evaluating.grads == ()
    # As a model has them: three views of one projection.
    assert evaluating.q.untyped_storage().data_ptr() == evaluating.v.untyped_storage().data_ptr()


def test_least_bytes_and_operations_by_hand():
    forward = dataclasses.replace(TINY, training=False)
    row = 2 * 7 * 12 * 4
    assert traffic.least_bytes(forward) == 4 * row + 2 * 2 * 7 * 4
    assert traffic.operations(forward) == 2 * 2 * 2 * 3 * 7 * 7 * 4
    assert traffic.operations(TINY) == 7 * 2 * 2 * 3 * 7 * 7 * 4
    # 9 tokens, their scores and the map in; the class token, 5 kept and the fused one out.
    assert traffic.least_bytes(PRUNED) == 4 * (2 * 9 * 6 + 2 * 9 + 2 * 2 * 9 + 2 * 2 * 7 + 2 * 7 * 6)


def test_every_case_has_a_variant_that_is_known():
    for case in CASES:
        if case.op == "token_attention":
            assert attention.terms(case) and attention.terms(case) <= {"size", "policy", "class"}
            assert case.heads * case.metric_dim == case.shape[2]
        else:
            assert not case.variant
    assert {case.op for case in CASES} >= set(ATTENTION_OPS)


def test_the_yardstick_is_torchs_own():
    inputs = attention.draw(TINY, 0)
    expected = torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(attention.fused(inputs)[0], expected.transpose(1, 2).flatten(2), rtol=0, atol=0)


@pytest.mark.parametrize(
    "variant,training,serves",
    [("size", False, True), ("size", True, True), ("size+class", False, True), ("size+class", True, False),
     ("policy", True, False), ("size+policy", False, False)],
)  # fmt: skip
def test_flex_is_asked_for_what_it_can_give(variant, training, serves):
    case = Case("token_attention", "x", (1, 5, 8), 0, "cuda", heads=2, variant=variant, training=training)
    assert (attention.flex(case) is not None) == serves
