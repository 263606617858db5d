# SPDX-License-Identifier: MIT
import pytest
import torch
from support import golden

import tokred_kernels as tk
from benchmarks.baselines import algm, pruning, tome, tomesd


@pytest.mark.parametrize("name", ["tome_0.npz", "tome_1.npz", "tome_2.npz"])
def test_chain_reproduces_the_authors_code(name):
    arrays, settings = golden(name)
    plan = tome.bipartite_plan(arrays["metric"], **settings)
    x = arrays["x"]
    for mode in ("mean", "sum", "amax"):
        torch.testing.assert_close(plan.merge(x, mode), arrays[f"merged_{mode}"])
    merged, size = tome.merge_wavg(plan.merge, x, arrays["size"])
    torch.testing.assert_close(merged, arrays["merged_wavg"])
    torch.testing.assert_close(size, arrays["merged_size"])
    torch.testing.assert_close(tome.merge_source(plan.merge, x), arrays["source"])
    if "unmerged" in arrays:
        torch.testing.assert_close(plan.unmerge(arrays["merged_wavg"]), arrays["unmerged"])


def test_kth_chain_reproduces_the_authors_code():
    arrays, settings = golden("tome_kth_0.npz")
    plan = tome.kth_plan(arrays["metric"], settings["k"])
    torch.testing.assert_close(plan.merge(arrays["x"]), arrays["merged_mean"])
    token_map = tome.token_map(plan, arrays["x"].shape[1])
    torch.testing.assert_close(
        tk.unmerge(arrays["merged_mean"], token_map)[:, : arrays["unmerged"].shape[1]], arrays["unmerged"]
    )


@pytest.mark.parametrize("name", ["algm_local_0.npz", "algm_local_1.npz"])
def test_window_chain_reproduces_the_authors_code(name):
    arrays, settings = golden(name)
    plan = algm.window_plan(arrays["x"], settings["threshold"], tuple(settings["window_size"]))
    merged, size = tome.merge_wavg(plan.merge, arrays["x"])
    torch.testing.assert_close(merged, arrays["merged_wavg"])
    torch.testing.assert_close(size, arrays["merged_size"])


@pytest.mark.parametrize("name", ["algm_global_0.npz", "algm_global_1.npz"])
def test_adaptive_chain_reproduces_the_authors_code(name):
    arrays, settings = golden(name)
    plan = algm.adaptive_plan(arrays["x"], settings["layer_index"], settings["class_token"])
    merged, size = tome.merge_wavg(plan.merge, arrays["x"], arrays["size"])
    torch.testing.assert_close(merged, arrays["merged_wavg"])
    torch.testing.assert_close(size, arrays["merged_size"])


def test_grid_chain_reproduces_the_authors_code():
    arrays, s = golden("tomesd_0.npz")
    metric = arrays["metric"]
    plan = tomesd.grid_plan(metric, s["r"], (s["h"], s["w"]), (s["sy"], s["sx"]))
    # The order of slots rests on an unstable sort: in the order of tokens it shows no more.
    token_map = tome.token_map(plan, metric.shape[1])
    torch.testing.assert_close(tk.unmerge(plan.merge(metric), token_map), arrays["unmerged"])


def test_importance_chain_reproduces_the_authors_code():
    arrays, settings = golden("diffrate_merge_0.npz")
    plan, similarity = pruning.importance_plan(arrays["x"], settings["kept"], settings["class_token"])
    torch.testing.assert_close(plan.merge(arrays["x"]), arrays["merged_mean"])
    torch.testing.assert_close(similarity, arrays["node_max"])


def same(plan, expected):
    return torch.equal(tome.token_map(plan, expected.num_tokens).dest, expected.dest)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("tokens,r", [(16, 3), (197, 16), (50, 100)])
def test_plan_is_the_reference_map(tokens, r, class_token):
    metric = torch.randn(3, tokens, 32)
    with tk.use_backend("reference"):
        expected = tk.bipartite_match(metric, r, class_token=class_token)
    assert same(tome.bipartite_plan(metric, r, class_token=class_token), expected)


def test_kth_plan_is_the_reference_map_tail_included():
    metric = torch.randn(2, 38, 16)
    with tk.use_backend("reference"):
        expected = tk.kth_bipartite_match(metric, 4)
    assert same(tome.kth_plan(metric, 4), expected)


def test_random_plan_is_the_reference_map_of_the_same_draw():
    metric = torch.randn(2, 40, 16)
    with tk.use_backend("reference"):
        torch.manual_seed(3)
        expected = tk.random_bipartite_match(metric, 11)
    torch.manual_seed(3)
    assert same(tome.random_plan(metric, 11), expected)


@pytest.mark.parametrize("window", [(2, 2), (3, 4), (1, 2)])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.1, 2.0], ids=["all", "many", "some", "none"])
def test_window_plan_is_the_reference_map(window, threshold):
    x = torch.randn(3, 145, 16)
    with tk.use_backend("reference"):
        expected = tk.window_match(x, threshold, window=window, num_prefix=1)
    assert same(algm.window_plan(x, threshold, window), expected)


@pytest.mark.parametrize("layer_index", [1, 2.5, 5])
def test_adaptive_plan_is_the_reference_map(layer_index):
    metric = torch.randn(3, 77, 16)
    with tk.use_backend("reference"):
        expected = tk.adaptive_bipartite_match(metric, layer_index=layer_index, class_token=True)
    assert same(algm.adaptive_plan(metric, layer_index, class_token=True), expected)


@pytest.mark.parametrize("grid,stride", [((8, 8), (2, 2)), ((7, 9), (2, 3))])
@pytest.mark.parametrize("r", [1, 20, 1000])
def test_grid_plan_is_the_reference_map(grid, stride, r):
    metric = torch.randn(2, grid[0] * grid[1], 16)
    plan = tomesd.grid_plan(metric, r, grid, stride)
    with tk.use_backend("reference"):
        expected = tk.grid_bipartite_match(metric, r, grid=grid, stride=stride)
        restored = tk.unmerge(plan.merge(metric), tome.token_map(plan, metric.shape[1]))
        torch.testing.assert_close(restored, tk.unmerge(tk.merge(metric, expected), expected))


def test_importance_plan_is_the_reference_map():
    metric = torch.randn(2, 40, 16)
    plan, similarity = pruning.importance_plan(metric, 25)
    with tk.use_backend("reference"):
        expected, cosine = tk.importance_match(metric, 25, class_token=True)
    assert same(plan, expected)
    torch.testing.assert_close(similarity, cosine)


def test_policy_chain_reproduces_the_authors_code():
    arrays, _ = golden("dynamicvit_policy_0.npz")
    scores, policy = (arrays[name].clone().requires_grad_() for name in ("scores", "policy"))
    weights = pruning._softmax_with_policy(scores, policy[..., 0])
    torch.testing.assert_close(weights, arrays["out"])
    (weights * arrays["w"]).sum().backward()
    torch.testing.assert_close(scores.grad, arrays["grad_scores"])
    torch.testing.assert_close(policy.grad, arrays["grad_policy"])


def test_pruning_chain_reproduces_the_authors_code():
    arrays, _ = golden("evit_0.npz")
    scores = torch.nn.functional.pad(arrays["cls_attn"], (1, 0))
    kept = arrays["kept_index"].shape[1]
    torch.testing.assert_close(pruning.keep_attentive(arrays["x"], scores, kept), arrays["out"])
