# SPDX-License-Identifier: MIT
"""The count that is learned: what the authors' code gives, and its gradients by hand."""

import copy

import pytest
import torch
from support import golden

from tokred_kernels import flops
from tokred_kernels.methods.diffrate import compression_flops, kept_counts
from tokred_kernels.models.imports import import_timm
from tokred_kernels.nn.diffrate import CompressionRate
from tokred_kernels.patching import patch

VisionTransformer = import_timm().models.vision_transformer.VisionTransformer


def drawn(*args, scale=1.0, **settings):
    """With logits drawn, in float64."""
    rate = CompressionRate(*args, **settings).double()
    torch.nn.init.normal_(rate.selected_probability, std=scale)
    return rate


def test_reproduces_the_authors_code():
    arrays, params = golden("diffrate_rate_0.npz")
    rate = CompressionRate(params["patch_number"], params["granularity"], params["class_token"])
    rate.load_state_dict(
        {"kept_token_candidate": arrays["candidates"], "selected_probability": arrays["logits"]}, strict=True
    )
    kept, mask = rate.kept(), rate.mask(params["token_number"])
    assert kept.item() == arrays["kept"].item()
    torch.testing.assert_close(mask, arrays["mask"])
    ((mask * arrays["w"]).sum() + 0.01 * kept).backward()
    torch.testing.assert_close(rate.selected_probability.grad, arrays["grad_logits"])
    assert rate.kept_token_candidate.grad is None


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("patches,granularity", [(1, 1), (2, 1), (7, 3), (20, 4), (36, 37), (196, 2)])
def test_kept_is_the_mean_rounded_up_and_the_mask_ones_up_to_there(patches, granularity, prefix):
    rate = drawn(patches, granularity, num_prefix=prefix, scale=2.0)
    candidates = list(range(patches, 0, -granularity))
    assert rate.kept_token_candidate.tolist() == candidates
    assert rate.least == candidates[-1] + prefix
    probability = rate.selected_probability.softmax(-1)
    mean = sum(c * p for c, p in zip(candidates, probability.tolist(), strict=True))
    kept = int(rate.kept())
    assert rate.kept().item() == kept  # whole to the bit
    assert -1e-9 <= kept - prefix - mean < 1 + 1e-9
    expected = [1.0] * kept + [0.0] * (patches + prefix - kept)
    assert rate.mask().tolist() == expected
    for last in (0, kept, kept + 1, patches + prefix):
        behind = [1.0] * max(patches + prefix - max(last, kept), 0)
        assert rate.mask(last).tolist() == expected[: patches + prefix - len(behind)] + behind


@pytest.mark.parametrize("class_token", [True, False])
def test_the_class_token_is_kept_and_counted(class_token):
    rate = CompressionRate(10, class_token=class_token)
    assert rate.kept().item() == 6 + class_token  # the mean of 1 to 10 is 5.5
    assert len(rate.mask()) == 10 + class_token
    assert repr(rate) == f"CompressionRate(patch_number=10, class_token={class_token}, kept={6 + class_token})"


def test_gradients_are_those_of_the_soft_count_and_the_soft_mask():
    rate = drawn(9, 2, num_prefix=2)
    weights = torch.randn(11, dtype=torch.float64)
    candidates = torch.arange(9, 0, -2).double()

    def soft(logits):
        probability = logits.softmax(-1)
        keeps = (torch.arange(11)[:, None] < candidates + 2).double()  # which candidate keeps which token
        return probability @ candidates, keeps @ probability @ weights

    logits = rate.selected_probability
    for part, straight in enumerate((rate.kept(), (rate.mask(8) * weights).sum())):
        (found,) = torch.autograd.grad(straight, logits)
        step = 1e-6
        for index in range(len(logits)):
            up, down = logits.detach().clone(), logits.detach().clone()
            up[index] += step
            down[index] -= step
            slope = (soft(up)[part] - soft(down)[part]) / (2 * step)
            assert found[index].item() == pytest.approx(slope.item(), abs=1e-8)


def test_masks_multiply_to_masks_to_the_bit():
    rates = [drawn(577, scale=3.0).float() for _ in range(12)]
    mask = torch.stack([rate.mask() for rate in rates]).prod(0)
    assert set(mask.tolist()) <= {0.0, 1.0}
    assert int(mask.sum()) == min(int(rate.kept()) for rate in rates)


def test_counts_are_not_rounded_under_autocast_and_in_half_precision():
    rate = drawn(577).float()
    kept, mask = rate.kept(), rate.mask()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rate.kept(), kept)
        assert torch.equal(rate.mask(), mask)
    half = drawn(197).half()
    kept, mask = half.kept(), half.mask()
    assert kept.dtype == mask.dtype == torch.float32
    assert torch.equal(half.float().kept(), kept)
    assert torch.equal(half.float().mask(), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [576, 575, 574, 573, 301, 2, 1])
def test_half_precision_counts_beyond_256(dtype, number):
    rate = CompressionRate(576)
    rate.selected_probability.data[576 - number] = 40.0
    assert rate.kept() == number + 1
    half = copy.deepcopy(rate).to(dtype)
    assert half.kept() == number + 1
    assert half.least == rate.least == 2
    assert torch.equal(half.mask(), rate.mask())
    weight = torch.arange(577.0)
    grads = [torch.autograd.grad((one.mask() * weight).sum(), one.selected_probability)[0] for one in (half, rate)]
    torch.testing.assert_close(grads[0].float(), grads[1], rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("patches", "granularity"), [(36, 1), (36, 4), (35, 4), (36, 37), (1, 1)])
def test_the_least_count_is_the_last_candidate(patches, granularity):
    rate = CompressionRate(patches, granularity)
    assert rate.least == rate.kept_token_candidate[-1] + 1


def test_is_made_where_torch_makes_tensors():
    with torch.device("meta"):
        rate = CompressionRate(36)
    assert all(parameter.is_meta for parameter in rate.parameters())


def test_flops_reach_both_counts_of_every_block():
    settings = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = patch(VisionTransformer(**settings).eval(), "diffrate")
    for block, slope in zip(model.blocks, (0.0, 4.0, 2.0, -3.0), strict=True):
        for rate in (block.prune_ddp, block.merge_ddp):
            torch.nn.init.normal_(rate.selected_probability, std=0.3).data += slope * rate.kept_token_candidate / 36
    entering = [37]
    for prune, merge in zip(*kept_counts(model), strict=True):
        entering.append(min(entering[-1], prune, merge))
    assert entering[1] > entering[2] > entering[3] > entering[4]
    gflops = compression_flops(model)
    gflops.backward()
    torch.testing.assert_close(gflops.item(), flops.count(model, tokens=entering[1:]).gflops, rtol=1e-6, atol=0)
    plain = VisionTransformer(**settings)
    assert flops.count(plain, tokens=entering[1:]).gflops < gflops < flops.count(plain).gflops
    for index, block in enumerate(model.blocks[1:], 1):
        # One more token that leaves costs the MLP of this block and the attention of the next.
        slope = 2 * 2 * 48 * 4 * 48
        if index < 3:
            slope += 2 * 4 * 48 * 48 + 2 * 4 * 48 * entering[index + 1]
        for rate in (block.prune_ddp, block.merge_ddp):
            probability, candidates = rate.selected_probability.detach().softmax(-1), rate.kept_token_candidate
            of_mean = probability * (candidates - probability @ candidates)
            torch.testing.assert_close(rate.selected_probability.grad, slope / 1e9 * of_mean, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "settings,error,words",
    [
        ({"patch_number": 0}, ValueError, "nn.CompressionRate: patch_number must be at least 1, got 0"),
        ({"patch_number": 4.0}, TypeError, "patch_number must be an int, got float"),
        ({"patch_number": 4, "granularity": 0}, ValueError, "granularity must be at least 1, got 0"),
        ({"patch_number": 4, "num_prefix": -1}, ValueError, "num_prefix must be at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        CompressionRate(**settings)
