# SPDX-License-Identifier: MIT
"""EViT's keep rate, as it is changed while a model trains."""

import copy

import pytest
import torch
from algm_models import images, make
from pruning_models import LAYERS, make_evit
from torch import nn

import tokred_kernels as tk
from tokred_kernels.nn import cosine_keep_rate
from tokred_kernels.patching import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_set_keep_rate_is_as_patched_anew():
    model, x = make_evit(), images()
    for rate in (0.5, 1.0, [0.9, 0.4, 1.0], 0.7):
        tk.set_keep_rate(model, rate)
        found = model(x)
        other = patch(unpatch(copy.deepcopy(model)), "evit", layers=LAYERS, keep_rate=rate)
        assert torch.equal(found, other(x))
        assert torch.equal(model.token_map.dest, other.token_map.dest)
        assert str(model.tokred_patch) == str(other.tokred_patch)
        assert tk.flops.count(model) == tk.flops.count(other)
    unpatch(model)
    with pytest.raises(ValueError, match=r'set_keep_rate: model must be patched with "evit", got VisionTransformer$'):
        tk.set_keep_rate(model, 0.5)


def test_a_model_that_started_with_every_token_may_lose_some():
    model, x = patch(make(), "evit", layers=LAYERS, keep_rate=1.0), images()
    left = []
    for epoch in range(6):
        tk.set_keep_rate(model, cosine_keep_rate(epoch, warmup=1, total=5, base=0.5))
        model(x)
        left.append(model.token_map.num_out)
    assert left[:2] == [37, 37]
    assert left[1] > left[2] > left[3] > left[4] > left[5]
    assert left[5] == 1 + 6 + 1  # 36, 18 and one, 10 and one, 6 and one


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        (0, ValueError, "keep_rate must be above 0 and at most 1, got 0"),
        (1.5, ValueError, "keep_rate must be above 0 and at most 1, got 1.5"),
        ("half", TypeError, "keep_rate must be a number, or a list of numbers, got 'half'"),
        ([0.5], ValueError, "keep_rate must have one number for each of 3 layers, got 1"),
    ],
    ids=str,
)
def test_wrong_rates_leave_the_model_as_it_was(rate, error, message):
    model, x = make_evit(), images()
    expected, text = model(x), str(model.tokred_patch)
    with pytest.raises(error, match=message):
        tk.set_keep_rate(model, rate)
    assert torch.equal(model(x), expected)
    assert str(model.tokred_patch) == text


def test_set_keep_rate_is_of_evit_alone():
    with pytest.raises(ValueError, match=r'must be patched with "evit", got .* patched with "tome", r=4'):
        tk.set_keep_rate(patch(make(), "tome", r=4), 0.5)
    with pytest.raises(ValueError, match='must be patched with "evit", got Linear'):
        tk.set_keep_rate(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match='must be patched with "evit", got Sequential'):
        tk.set_keep_rate(nn.Sequential(make_evit()), 0.5)


def test_a_compiled_model_is_trained_by_the_schedule():
    model = patch(make(), "evit", layers=(1,), keep_rate=1.0).train()
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), images()
    for rate in (1.0, 0.9, 0.8, 0.7):
        tk.set_keep_rate(model, rate)
        model.zero_grad()
        compiled(x).square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x).square().mean().backward()
        for got, want in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(got, want.grad, rtol=1e-4, atol=1e-5)


def test_a_model_that_lost_the_blocks_is_told_so():
    model = make_evit()
    last = model.tokred_patch.method.layers[-1]
    model.blocks = model.blocks[:last]
    with pytest.raises(ValueError, match=rf"must have the blocks .*{last}.* got only {last} blocks"):
        tk.set_keep_rate(model, 0.5)
