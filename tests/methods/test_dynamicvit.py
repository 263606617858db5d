# SPDX-License-Identifier: MIT
"""DynamicViT in timm's models: removing and masking against plain rewritings of the paper, and against each other."""

import copy
import pickle

import pytest
import torch
from algm_models import MODELS, TINY, VisionTransformer, images, make, vit
from pruning_models import KEEP, LAYERS, LEFT, dense_pruning, make_dynamicvit
from torch import nn

import tokred_kernels as tk
from tokred_kernels.methods import dynamicvit
from tokred_kernels.nn import ratio_loss
from tokred_kernels.patching import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


def decide_as_evaluating(monkeypatch, left=LEFT):
    """When training, keep the tokens of highest score among those kept so far, as many as evaluating keeps."""
    numbers = iter(left)

    def decide(scores, before):
        chosen = scores[..., 0].masked_fill(before == 0, -torch.inf).topk(next(numbers), 1).indices
        return torch.zeros_like(before).scatter(1, chosen, 1.0)

    monkeypatch.setattr(dynamicvit, "decide", decide)


def kept(model):
    """Which patches (B, N) each layer of the last forward, evaluating, has left."""
    maps = model.tokred_trace.maps
    composed = [maps[0]]
    for token_map in maps[1:]:
        composed.append(composed[-1].then(token_map))
    return [token_map.dest[:, model.num_prefix_tokens :] >= 0 for token_map in composed]


# --- the numbers


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_evaluating_equals_the_paper_written_out(name, backend):
    model, x = make_dynamicvit(name).double(), images().double()
    with torch.no_grad():
        expected, sources = dense_pruning.dynamicvit_removing(model, x, dict(zip(LAYERS, KEEP, strict=True)))
        with tk.use_backend(backend):
            tokens = model.forward_features(x)
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.token_map.source(torch.float64), sources, rtol=0, atol=0)
    assert torch.equal(model.token_sizes, torch.ones(3, 9 + model.num_prefix_tokens, 1))
    assert model.tokred_trace.left == tuple(n + model.num_prefix_tokens for n in (36, *LEFT))
    assert model.token_decisions == ()


@pytest.mark.parametrize(
    ("layers", "keep"),
    [((0,), 0.5), ([0, 3], [1.0, 0.1]), ((1, 2, 3), 0.6), ((0, 1), (0.5, 1e-9)), ((2,), [1])],
    ids=str,
)
def test_settings_are_those_of_the_paper_written_out(layers, keep):
    model, x = make_dynamicvit("registers", layers, keep).double(), images().double()
    each = keep if isinstance(keep, (list, tuple)) else [keep] * len(layers)
    with torch.no_grad():
        expected, sources = dense_pruning.dynamicvit_removing(model, x, dict(zip(layers, each, strict=True)))
        torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.token_map.source(torch.float64), sources, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_the_paper_written_out(name, backend):
    """Tokens, decisions and all gradients, with the same noise: predictors learn by way of the masks."""
    model, x = make_dynamicvit(name).double().train(), images().double()
    torch.manual_seed(7)
    noise = [-torch.empty(3, 36, 2).exponential_().log().double() for _ in LAYERS]
    expected, decisions = dense_pruning.dynamicvit_masking(model, x, LAYERS, noise)
    target = torch.randn_like(expected)
    losses = [(decision.mean(1) - share).square().mean() for decision, share in zip(decisions, KEEP, strict=True)]
    (expected.mul(target).sum() + 10 * sum(losses) / 3).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    torch.manual_seed(7)
    with tk.use_backend(backend):
        tokens = model.forward_features(x)
        (tokens.mul(target).sum() + 10 * ratio_loss(model.token_decisions, KEEP)).backward()
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(model.token_decisions, decisions, strict=True):
        assert torch.equal(ours.double(), theirs.round())
        assert 0 < theirs.mean() < 1
    assert sum(name.startswith("score_predictor") for name in gradients) == 3 * 10
    for parameter, gradient in gradients.items():
        # The softmax of the noise is taken in float32. No softmax feels a shift of all keys: that gradient is none.
        close = {"rtol": 1e-4, "atol": 1e-5 * gradient.abs().max().item() + 1e-10}
        torch.testing.assert_close(model.get_parameter(parameter).grad, gradient, **close, msg=parameter)


# Which pools a model can have.
POOLED = [(name, pool) for name in MODELS for pool in ("token", "avg", "") if name != "distilled" or pool == "token"]
POOLED.remove(("no prefix", "token"))


@pytest.mark.parametrize(("name", "pool"), POOLED)
def test_masking_is_removing(name, pool, monkeypatch):
    """Training and evaluation agree: the same decisions give the same tokens, up to the eps of the masked softmax.

    That moves a weight by eps / sum e, where the sum, of weights below the highest score of all keys, is of order 1.
    """
    model, x = make_dynamicvit(name, global_pool=pool).double(), images().double()
    with torch.no_grad():
        tokens = model.forward_features(x)
        logits = model.forward_head(tokens)
        stay, dest = kept(model), model.token_map.dest.long()
        model.train()
        decide_as_evaluating(monkeypatch)
        masked = model.forward_features(x)
        masked_logits = model.forward_head(masked)
    for decision, left in zip(model.token_decisions, stay, strict=True):
        assert torch.equal(decision == 1, left)
    for image in range(3):
        left = dest[image] >= 0
        torch.testing.assert_close(masked[image][left], tokens[image][dest[image][left]], rtol=1e-4, atol=1e-4)
    if pool:
        torch.testing.assert_close(masked_logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.token_map.dest[0], torch.arange(36 + model.num_prefix_tokens, dtype=torch.int32))
    assert (model.token_sizes == 1).all()


@pytest.mark.parametrize(("name", "pool"), POOLED)
def test_an_image_that_keeps_nothing_stays_finite(name, pool, monkeypatch):
    model, x = make_dynamicvit(name, global_pool=pool).train(), images()

    def decide(scores, before):  # the first image loses all, the others some
        some = torch.rand_like(before).round()
        return (scores.exp()[..., 0] * 0 + torch.where(torch.arange(3)[:, None] == 0, 0.0, some)) * before

    monkeypatch.setattr(dynamicvit, "decide", decide)
    logits = model(x)
    assert logits.isfinite().all()
    (logits.square().sum() + ratio_loss(model.token_decisions, KEEP)).backward()
    assert (model.token_decisions[0][0] == 0).all()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_policies_only_shrink_and_losses_reach_the_predictors():
    model = make_dynamicvit().train()
    for _ in range(5):
        model(images())
        assert [tuple(decision.shape) for decision in model.token_decisions] == [(3, 36)] * 3
        assert all(set(decision.unique().tolist()) == {0.0, 1.0} for decision in model.token_decisions)
        for after, before in zip(model.token_decisions[1:], model.token_decisions, strict=False):
            assert (after <= before).all()
            assert (after < before).any()
    ratio_loss(model.token_decisions, KEEP).backward()
    for predictor in model.score_predictor:
        assert all(parameter.grad.abs().max() > 0 for parameter in predictor.parameters())
    model.eval()(images())
    assert model.token_decisions == ()


def test_training_meets_the_shares_and_lowers_the_loss():
    rates = {"drop_path_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    model = patch(VisionTransformer(**TINY, **rates).train(), "dynamicvit", layers=LAYERS, keep=KEEP)
    assert all(module.training for module in model.modules())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x, labels, losses = images(8), torch.arange(8) % 5, []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), labels)
        ratio = ratio_loss(model.token_decisions, KEEP)
        optimizer.zero_grad()
        (loss + 10 * ratio).backward()
        optimizer.step()
        losses.append((loss.item(), ratio.item()))
    for first, last in zip(torch.tensor(losses[:3]).sum(0), torch.tensor(losses[-3:]).sum(0), strict=True):
        assert last < 0.7 * first


# --- checkpoints, putting in and taking out


def published_state(depth=4, channels=48, classes=5, patches=36, layers=3):
    """The names and shapes of a checkpoint of the authors' `VisionTransformerDiffPruning`."""
    c = channels
    shapes = {"cls_token": (1, 1, c), "pos_embed": (1, patches + 1, c), "head.weight": (classes, c)}
    shapes |= {"patch_embed.proj.weight": (c, 3, 8, 8), "patch_embed.proj.bias": (c,), "head.bias": (classes,)}
    wide = {"attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)}
    blocks = {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in wide.items()}
    halves = {"in_conv.1": (c, c), "out_conv.0": (c // 2, c), "out_conv.2": (c // 4, c // 2), "out_conv.4": (2, c // 4)}
    predictors = {f"score_predictor.{i}.{name}": shape for i in range(layers) for name, shape in halves.items()}
    norms = [f"blocks.{i}.{name}" for i in range(depth) for name in ("norm1", "norm2")]
    norms += ["norm", *(f"score_predictor.{i}.in_conv.0" for i in range(layers))]
    for name, shape in {**blocks, **predictors, **dict.fromkeys(norms, (c,))}.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def test_published_checkpoints_load():
    state, x = published_state(), images()
    model = patch(make(), "dynamicvit", layers=LAYERS, keep=KEEP)
    assert sorted(model.state_dict()) == sorted(state)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model.score_predictor[2].out_conv[4].weight, state["score_predictor.2.out_conv.4.weight"])
    expected = model(x)
    other = make_dynamicvit()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), expected)


def test_unpatch_restores_everything():
    model, x = make("distilled"), images()
    expected, before = model(x), [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()]
    keys = list(model.state_dict())
    patch(model, "dynamicvit", layers=LAYERS)
    assert not torch.equal(model(x), expected)
    model.train()(x)
    assert unpatch(model.eval()) is model
    assert [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()] == before
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "score_predictor")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_copies_and_pickles_are_patched_models_of_their_own(training):
    model, x = make_dynamicvit(), images()
    expected = model(x)
    model.train(training)(x)  # which, training, leaves decisions with their graph
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.token_decisions == ()
        with pytest.raises(AttributeError, match="before its first forward"):
            _ = other.token_map
        assert torch.equal(other.eval()(x), expected)
        assert other.score_predictor[0] is not model.score_predictor[0]
        unpatch(other)
    assert torch.equal(model.eval()(x), expected)


def test_predictors_are_where_and_what_the_model_is():
    model = patch(make().to(torch.bfloat16), "dynamicvit", layers=LAYERS)
    assert {parameter.dtype for parameter in model.score_predictor.parameters()} == {torch.bfloat16}
    assert model(images().bfloat16()).dtype == torch.bfloat16
    assert model.train()(images().bfloat16()).dtype == torch.bfloat16


# --- what a model is used for


@pytest.mark.parametrize(("name", "backend"), [("vit", "auto"), ("no prefix", "reference")])
def test_compiles_whole(name, backend):
    model, x = make_dynamicvit(name), images()
    with tk.use_backend(backend):
        expected = model(x)
        dest = model.token_map.dest
        y = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.token_map.dest, dest)


def test_compiles_whole_in_training():
    model = make_dynamicvit().train()
    y = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(images())
    (y.square().sum() + ratio_loss(model.token_decisions, KEEP)).backward()
    assert all(set(decision.unique().tolist()) == {0.0, 1.0} for decision in model.token_decisions)
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.score_predictor.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_autocast(training, monkeypatch):
    model, x = make_dynamicvit().train(training), images()
    decide_as_evaluating(monkeypatch, LEFT * 2)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(y.float(), expected).min() > 0.9
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_attention_without_the_fused_kernel_agrees():
    model, x = make_dynamicvit("q and k norm, layer scale").train(), images()
    results = []
    for fused in (True, False):
        for block in model.blocks:
            block.attn.fused_attn = fused
        torch.manual_seed(1)
        results.append(model(x))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_checkpointing_gives_the_same_gradients():
    model, x = make_dynamicvit().train(), images()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(1)
        (model(x).square().sum() + ratio_loss(model.token_decisions, KEEP)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_distilled_training():
    model = make_dynamicvit("distilled").train()
    model.set_distilled_training(True)
    logits, distilled = model(images())
    assert logits.shape == distilled.shape == (3, 5)
    (logits + distilled).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.score_predictor.parameters())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name, backend):
    model = make_dynamicvit(name).requires_grad_(False)
    with tk.use_backend(backend), tk.flops.counter(display=False) as counter:
        model(images())
    found = tk.flops.count(model)
    assert found.total == pytest.approx(counter.get_total_flops() / 3, rel=1e-9)
    assert found.tokens == tuple(n + model.num_prefix_tokens for n in (36, 36, *LEFT))


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (16, 24), (64, 40)], ids=str)
def test_shares_are_of_the_patches_of_each_image(size):
    model, patches = make_dynamicvit(dynamic_img_size=True), size[0] // 8 * (size[1] // 8)
    assert model(images(2, size)).shape == (2, 5)
    left = [1 + max(int(patches * share), 1) for share in KEEP]
    assert model.tokred_trace.left == (1 + patches, *left)
    assert model.token_map.num_tokens == 1 + patches
    assert tk.flops.count(model, size).tokens[2:] == tuple(left)
    assert model.train()(images(2, size)).shape == (2, 5)
    assert model.token_decisions[0].shape == (2, patches)


def test_an_empty_batch_and_the_dense_grid():
    model, x = make_dynamicvit(), images()
    tokens = model.forward_features(x)
    grid = tk.unmerge(tokens, model.token_map)
    assert grid.shape == (3, 37, 48)
    assert torch.equal((grid != 0).any(-1).sum(1), torch.tensor([10, 10, 10]))
    assert torch.equal(grid[:, 0], tokens[:, 0])
    assert model(images(0)).shape == (0, 5)
    assert (model.token_map.batch, model.token_map.num_out) == (0, 10)
    assert model.train()(images(0)).shape == (0, 5)


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep": (0.5, 0.7)}, ValueError, r"keep must not rise from layer to layer, got \(0.5, 0.7\)"),
        ({"keep": (0.5, 0.0)}, ValueError, "keep must be above 0 and at most 1, got 0.0"),
        ({"keep": 1.5}, ValueError, "keep must be above 0 and at most 1, got 1.5"),
        ({"keep": "most"}, TypeError, "keep must be a number, or a list of numbers, got 'most'"),
        ({"keep": (0.7, 0.49, 0.343)}, ValueError, "keep must have one number for each of 2 layers, got 3"),
        ({"layers": (1, 4)}, ValueError, "layers must be from 0 to 3, the model's last block, got 4"),
        ({"layers": ()}, ValueError, "layers must name at least one block, got none"),
        ({"layers": (3, 1)}, ValueError, r"layers must ascend, got \(3, 1\)"),
        ({"layers": 3}, TypeError, "layers must be a tuple of ints, got 3"),
        ({"trace": 1}, TypeError, "trace must be True or False, got 1"),
        ({"fuse": True}, TypeError, 'a setting of "dynamicvit" must be one of layers, keep, trace, got fuse'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(settings, error, message):
    model = make()
    with pytest.raises(error, match=f"tokred_kernels.(patch|methods.DynamicViT): {message}"):
        patch(model, "dynamicvit", **{"layers": (1, 3), "keep": (0.7, 0.5), **settings})
    assert type(model) is VisionTransformer  # left as it was
    assert type(model.blocks[0]) is vit.Block
    assert not hasattr(model, "score_predictor")


@pytest.mark.parametrize("pool", ["map", "max", "avgmax"])
def test_pools_that_cannot_pass_over_masked_tokens_are_refused(pool):
    model = make("no prefix", global_pool=pool)
    with pytest.raises(
        NotImplementedError, match=f"pools its tokens by global_pool='{pool}', which .*supported are means"
    ):
        patch(model, "dynamicvit", layers=LAYERS)
    assert not hasattr(model, "score_predictor")
