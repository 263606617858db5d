# SPDX-License-Identifier: MIT
"""A mean weighs each token by its size: by the sizes of these very tokens, or not at all."""

import threading

import pytest
import torch

import tokred_kernels as tk
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch

vit = import_timm().models.vision_transformer
TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
NOT_ITS_OWN = "must be the output of the last forward"

pytestmark = pytest.mark.usefixtures("one_thread")


def make(pool="avg", **more):
    model = vit.VisionTransformer(**TINY, class_token=False, global_pool=pool, **more).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("pool", ["avg", "avgmax", "map"])
@torch.no_grad()
def test_features_of_an_earlier_forward_are_refused(pool):
    model = patch(make(pool), "tome", r=5)
    first, second = torch.randn(2, 2, 3, 48, 48)
    expected = model(first)
    earlier = model.forward_features(first)
    torch.testing.assert_close(model.forward_head(earlier), expected)
    later = model.forward_features(second)
    for tokens in (earlier, later.flip(0), later[:1], torch.cat([later, later]), later.clone()):
        with pytest.raises(ValueError, match=NOT_ITS_OWN):
            model.forward_head(tokens)
        with pytest.raises(ValueError, match=NOT_ITS_OWN):
            model.pool(tokens)
    torch.testing.assert_close(model.forward_head(later), model(second))


@torch.no_grad()
def test_what_needs_no_sizes_takes_any_tokens():
    model = patch(make(), "tome", r=5)
    tokens = model.forward_features(torch.randn(2, 3, 48, 48))
    assert torch.equal(model.pool(tokens.clone(), "max"), tokens.amax(1))
    dense = tk.unmerge(tokens, model.token_map)
    torch.testing.assert_close(model.pool(dense), dense.mean(1))
    torch.testing.assert_close(model.pool(dense), model.pool(tokens))


@torch.no_grad()
def test_packed_tokens_of_an_earlier_forward_are_refused():
    model = patch(make(), "algm", layers=(0, 2), threshold=-1.0, count="image")
    x = torch.randn(2, 3, 48, 48)
    earlier, later = model.forward_features(x), model.forward_features(x)
    assert earlier.dim() == 2
    assert model.forward_head(later).shape == (2, 5)
    with pytest.raises(ValueError, match=NOT_ITS_OWN):
        model.forward_head(earlier)


@torch.no_grad()
def test_masked_tokens_are_not_pooled_by_what_sees_them():
    model = patch(make(), "dynamicvit", layers=(1,), keep=(0.5,)).train()
    model.reset_classifier(5, "max")
    with pytest.raises(ValueError, match="pooling by 'max' cannot ignore masked tokens"):
        model(torch.randn(2, 3, 48, 48))


def assert_threads_share(model, both):
    """Two threads run the model many times, each with its own input: the outputs are those of one thread."""
    with torch.no_grad():
        expected = [model(x) for x in both]
    got = {0: [], 1: []}
    start = threading.Barrier(2)

    @torch.no_grad()
    def run(number):
        start.wait()
        got[number] += [model(both[number]) for _ in range(60)]

    threads = [threading.Thread(target=run, args=(number,)) for number in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in got.items():
        assert len(results) == 60
        for y in results:
            torch.testing.assert_close(y, expected[number])


def test_threads_share_a_model():
    assert_threads_share(patch(make(), "tome", r=5), torch.randn(2, 2, 3, 48, 48))


def test_threads_share_a_segmenter():
    encoder = patch(make(""), "algm", layers=(0, 2), threshold=0.0)
    assert_threads_share(tk.nn.LinearSegmenter(encoder, 3).eval(), torch.randn(2, 1, 3, 48, 48))
