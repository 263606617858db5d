# SPDX-License-Identifier: MIT
"""What a LookupViT costs, against torch's counter and the paper."""

import pytest
import torch
from torch import nn

import tokred_kernels as tk
from tokred_kernels import flops
from tokred_kernels.models.imports import import_timm
from tokred_kernels.nn.lookupvit import LookupViT, lookupvit_base
from tokred_kernels.nn.lookupvit_flops import lookupvit_flops
from tokred_kernels.nn.lookupvit_resize import resize_flops

timm = import_timm()

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2, "grid": (2, 2)}
VIDEO = {**TINY, "img_size": (4, 32, 24), "patch_size": (2, 8, 8), "grid": (1, 2, 3)}
COSTED = {
    "square": TINY,
    "all tokens": {**TINY, "grid": (4, 4)},
    "output projection": {**TINY, "scatter_proj": True, "grid": (3, 1), "lookup_ratio": 4, "mlp_ratio": 2},
    "video": VIDEO,
}


@pytest.mark.parametrize("name", COSTED)
def test_operations_are_those_of_torchs_counter(name):
    model = LookupViT(**COSTED[name]).eval()
    x = torch.zeros(2, 3, *model.img_size)
    with tk.use_backend("reference"), torch.no_grad(), flops.counter(display=False) as counter:
        model(x)
    assert lookupvit_flops(model).total == counter.get_total_flops() / 2


def test_operations_of_other_sizes_and_grids():
    model = LookupViT(**TINY, dynamic_img_size=True).eval()
    with tk.use_backend("reference"), torch.no_grad(), flops.counter(display=False) as counter:
        model(torch.zeros(1, 3, 48, 64), (3, 5))
    counted = lookupvit_flops(model, (48, 64), (3, 5))
    # The counter sees the positions resized too, which is done once for all images.
    assert counted.total == counter.get_total_flops() - resize_flops(32, (4, 4), (6, 8))
    assert counted.tokens == (48 + 15,) * 3
    assert counted.macs == counted.total // 2


def test_operations_are_the_papers():
    with torch.device("meta"):
        ours = lookupvit_base(img_size=384, grid=(5, 5))
        vit = timm.models.vision_transformer.VisionTransformer(img_size=384)  # ViT-B/16
    found, full = lookupvit_flops(ours), flops.count(vit)
    assert ours.lookup_grid == (24, 24)
    assert full.gflops / 2 == pytest.approx(55.5, rel=0.01)  # as published
    assert full.total > 3 * found.total
    costs = [lookupvit_flops(ours, grid=(side, side)).total for side in (3, 5, 7, 10, 24)]
    assert costs == sorted(costs)


def test_operations_that_are_refused():
    with pytest.raises(TypeError, match="model must be a LookupViT, got Linear"):
        lookupvit_flops(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"only images of \(32, 32\) pixels, got \(64, 64\); make it with dynamic_img"):
        lookupvit_flops(LookupViT(**TINY), 64)
    with pytest.raises(ValueError, match="grid must be at most the lookup grid"):
        lookupvit_flops(LookupViT(**TINY), grid=(5, 5))
