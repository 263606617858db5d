# SPDX-License-Identifier: MIT
"""DynamicViT's parts against the authors' numbers, and against what their code says, written out."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support import golden
from torch import nn

from tokred_kernels.nn import TokenPredictor, decide, distillation_loss, ratio_loss


def drawn_predictor(embed_dim=16, dtype=torch.float64):
    """One with weights that say something: the initial biases are zeros."""
    predictor = TokenPredictor(embed_dim).to(dtype)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.5)
    return predictor


# --- the predictor


@pytest.mark.parametrize("column", [True, False], ids=["(B, N, 1)", "(B, N)"])
def test_gives_what_the_published_code_gave(column):
    recorded, settings = golden("dynamicvit_predictor_0.npz")
    predictor = TokenPredictor(settings["embed_dim"])
    weights = {name.removeprefix("weight."): value for name, value in recorded.items() if name.startswith("weight.")}
    predictor.load_state_dict(weights, strict=True)
    policy = recorded["policy"] if column else recorded["policy"][..., 0]
    found = predictor(recorded["x"], policy)
    torch.testing.assert_close(found, recorded["out"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 10))


def test_the_mean_is_of_what_is_kept():
    predictor, x, policy = drawn_predictor(), torch.randn(3, 9, 16).double(), torch.rand(3, 9).round()
    policy[0], policy[1, :2] = 1, torch.tensor([1.0, 0.0])
    found = predictor(x, policy)
    for image in range(3):
        features = predictor.in_conv(x[image])
        mean = features[policy[image] == 1, 8:].mean(0)
        expected = predictor.out_conv(torch.cat([features[:, :8], mean.expand(9, -1)], -1))
        torch.testing.assert_close(found[image], expected, rtol=1e-9, atol=1e-12)
    # What is dropped has no part in it, whatever it is.
    changed = torch.where(policy.unsqueeze(-1) == 0, 7.0, x)
    kept = policy == 1
    assert torch.equal(predictor(changed, policy)[kept], found[kept])


def test_an_image_that_kept_nothing_stays_finite():
    predictor, x = drawn_predictor(), torch.randn(2, 9, 16).double().requires_grad_()
    policy = torch.stack([torch.zeros(9), torch.ones(9)]).double().requires_grad_()
    found = predictor(x, policy)
    features = predictor.in_conv(x[0])
    expected = predictor.out_conv(torch.cat([features[:, :8], torch.zeros(9, 8).double()], -1))
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)
    found.square().sum().backward()
    for leaf in (x, policy, *predictor.parameters()):
        assert leaf.grad.isfinite().all()
    # The other image is what it would be alone.
    torch.testing.assert_close(found[1:], predictor(x[1:], policy[1:]), rtol=1e-9, atol=1e-12)


def test_gradients():
    predictor, policy = drawn_predictor(8), torch.rand(2, 5).double() + 0.1
    x = torch.randn(2, 5, 8).double()
    assert torch.autograd.gradcheck(predictor, (x.requires_grad_(), policy.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    predictor, x, policy = drawn_predictor(), torch.randn(2, 30, 16).double(), torch.rand(2, 30).round()
    low = copy.deepcopy(predictor).to(dtype)(x.to(dtype), policy)
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), predictor(x, policy), rtol=0.05, atol=0.05)


def test_starts_as_published():
    torch.manual_seed(3)
    predictor = TokenPredictor(384)
    shapes = {name: tuple(parameter.shape) for name, parameter in predictor.named_parameters()}
    assert shapes == {
        "in_conv.0.weight": (384,),
        "in_conv.0.bias": (384,),
        "in_conv.1.weight": (384, 384),
        "in_conv.1.bias": (384,),
        "out_conv.0.weight": (192, 384),
        "out_conv.0.bias": (192,),
        "out_conv.2.weight": (96, 192),
        "out_conv.2.bias": (96,),
        "out_conv.4.weight": (2, 96),
        "out_conv.4.bias": (2,),
    }
    assert TokenPredictor().in_conv[0].weight.shape == (384,)
    for name, parameter in predictor.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.dim() == 2:
            assert 0.015 < parameter.std() < 0.025, name


@pytest.mark.parametrize("shape", [(2, 9), (2, 10, 2), (10, 2), (20,), (2, 1), (1, 10), (2, 10, 1, 1)], ids=str)
def test_policies_of_another_shape_are_refused(shape):
    message = re.escape(f"TokenPredictor: policy must be (2, 10, 1) as x is (2, 10, 16), got {shape}")
    with pytest.raises(ValueError, match=message):
        TokenPredictor(16)(torch.randn(2, 10, 16), torch.ones(shape))


@pytest.mark.parametrize(
    ("embed_dim", "error", "message"),
    [
        (18, ValueError, "embed_dim must be a multiple of 4, got 18"),
        (0, ValueError, "embed_dim must be at least 4, got 0"),
        (16.0, TypeError, "embed_dim must be an int, got float"),
        (True, TypeError, "embed_dim must be an int, got bool"),
    ],
)
def test_widths_that_are_refused(embed_dim, error, message):
    with pytest.raises(error, match=f"tokred_kernels.nn.TokenPredictor: {message}"):
        TokenPredictor(embed_dim)


# --- decisions


def test_decisions_are_0_or_1_and_what_is_dropped_stays_dropped():
    scores = torch.randn(4, 1000, 2).log_softmax(-1)
    policy = torch.rand(4, 1000).round()
    found = decide(scores, policy)
    assert found.shape == (4, 1000)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert (found[policy == 0] == 0).all()
    again = decide(scores, found)
    assert (again <= found).all()
    assert (again < found).any()


def test_decisions_are_drawn_by_their_probabilities():
    probability = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0])
    scores = torch.stack([probability, 1 - probability], -1).log().expand(20000, 5, 2)
    found = decide(scores, torch.ones(20000, 5)).mean(0)
    torch.testing.assert_close(found, probability, rtol=0, atol=0.02)  # six standard deviations
    assert (found[0], found[-1]) == (0, 1)


def test_decisions_follow_the_noise_with_the_gradient_of_a_softmax():
    scores = torch.randn(2, 7, 2).log_softmax(-1).requires_grad_()
    policy = torch.tensor([1.0, 1, 0, 1, 1, 0, 1]).repeat(2, 1).requires_grad_()
    target = torch.randn(2, 7)
    torch.manual_seed(5)
    found = decide(scores, policy)
    got = torch.autograd.grad((found * target).sum(), [scores, policy])
    torch.manual_seed(5)
    noise = -torch.empty(2, 7, 2).exponential_().log()
    soft = (scores + noise).softmax(-1)[..., 0]
    hard = (soft > 0.5).float()
    torch.testing.assert_close(found, hard * policy, rtol=0, atol=0)
    expected = torch.autograd.grad((soft * policy.detach() * target).sum(), scores)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], hard * target, rtol=0, atol=0)
    assert (got[0][policy == 1] != 0).all()
    assert (got[0][policy == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decisions_of_other_precisions_are_0_or_1_too(dtype):
    scores = torch.randn(2, 500, 2).log_softmax(-1).to(dtype).requires_grad_()
    found = decide(scores, torch.ones(2, 500))
    assert set(found.unique().tolist()) == {0.0, 1.0}
    found.sum().backward()
    assert scores.grad.isfinite().all()


# --- losses


def published_ratio_loss(scores, ratio):
    """As in `DistillDiffPruningLoss_dynamic`, before its weight."""
    loss = 0.0
    for i, score in enumerate(scores):
        loss = loss + ((score.mean(1) - ratio[i]) ** 2).mean()
    return loss / len(scores)


def test_ratio_loss_is_the_published_one():
    policies, keep = [torch.rand(4, 50).round().requires_grad_() for _ in range(3)], (0.7, 0.49, 0.343)
    found, expected = ratio_loss(policies, keep), published_ratio_loss(policies, keep)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, policies), torch.autograd.grad(expected, policies), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ratio_loss_is_of_each_image():
    policy = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])
    assert ratio_loss([policy], [0.5]).item() == 0.25  # their mean alone would be right
    assert ratio_loss([policy[:, [0]].repeat(1, 4) * torch.tensor([1.0, 0, 1, 0])], [0.5]).item() == 0.125
    half = torch.tensor([[1.0, 0, 1, 0]])
    assert ratio_loss([half, half], [0.5, 0.25]).item() == pytest.approx(0.0625 / 2)


def test_ratio_loss_of_half_precision_is_in_float32():
    policy = (torch.rand(2, 5001) < 0.7).bfloat16()
    found = ratio_loss([policy], [0.7])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, published_ratio_loss([policy.float()], [0.7]))


def test_ratio_loss_needs_a_share_for_each_policy():
    with pytest.raises(ValueError, match="keep must have a share for each of the 2 policies, got 3"):
        ratio_loss([torch.ones(1, 2)] * 2, [0.5] * 3)
    with pytest.raises(TypeError, match="policies must be a list of at least one tensor"):
        ratio_loss([], [0.5])


def published_distillation_loss(pred, cls_t, token_pred, token_t, mask, mse_token):
    """As in `DistillDiffPruningLoss_dynamic`, before its weights."""
    cls_kl = F.kl_div(F.log_softmax(pred, -1), F.log_softmax(cls_t, -1), reduction="batchmean", log_target=True)
    batch, number, channels = token_pred.shape
    kept = mask.reshape(batch * number) > 0.5
    if mask.sum() < 0.1:
        return cls_kl, token_pred.new_zeros(())
    token_t = token_t.reshape(batch * number, channels)[kept]
    token_pred = token_pred.reshape(batch * number, channels)[kept]
    if mse_token:
        return cls_kl, torch.pow(token_pred - token_t, 2).mean()
    of_tokens = F.kl_div(
        F.log_softmax(token_pred, -1), F.log_softmax(token_t, -1), reduction="batchmean", log_target=True
    )
    return cls_kl, of_tokens


@pytest.mark.parametrize("kept", ["some", "one", "all", "none", "none of one image"])
@pytest.mark.parametrize("mse", [True, False])
def test_distillation_loss_is_the_published_one(mse, kept):
    logits, tokens = torch.randn(3, 10).double(), torch.randn(3, 20, 6).double()
    teacher_logits, teacher_tokens = torch.randn(3, 10).double(), torch.randn(3, 20, 6).double()
    policy = (torch.rand(3, 20) < 0.4).double()
    policy[1] = {"none of one image": 0, "all": 1}.get(kept, policy[1])
    if kept in ("none", "all", "one"):
        policy[:] = float(kept == "all")
        policy[2, 3] = float(kept != "none")
    leaves = [logits.requires_grad_(), tokens.requires_grad_()]
    found = distillation_loss(logits, teacher_logits, tokens, teacher_tokens, policy, mse=mse)
    expected = published_distillation_loss(logits, teacher_logits, tokens, teacher_tokens, policy, mse)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == ()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    got = torch.autograd.grad(found[0] + 2 * found[1], leaves)
    wanted = torch.autograd.grad(expected[0] + 2 * expected[1], leaves, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert (found[1] == 0) == (kept == "none")


def test_a_pupil_that_is_its_teacher_loses_nothing():
    logits, tokens = torch.randn(3, 10), torch.randn(3, 20, 6)
    for mse in (True, False):
        assert all(
            abs(part) < 1e-7 for part in distillation_loss(logits, logits, tokens, tokens, torch.ones(3, 20), mse=mse)
        )


@pytest.mark.parametrize("shape", [(1, 20, 1), (20,), (1, 19)], ids=str)
def test_policies_that_fit_no_tokens_are_refused(shape):
    logits, tokens = torch.randn(1, 10), torch.randn(1, 20, 6)
    with pytest.raises(ValueError, match=r"distillation_loss: policy must be \(1, 20\) as tokens are \(1, 20, 6\)"):
        distillation_loss(logits, logits, tokens, tokens, torch.ones(shape))
    with pytest.raises(ValueError, match=r"decide: policy must be \(1, 20\) as log_probabilities are \(1, 20, 2\)"):
        decide(torch.randn(1, 20, 2), torch.ones(shape))
