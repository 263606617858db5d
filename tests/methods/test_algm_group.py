# SPDX-License-Identifier: MIT
"""A patched model in processes that all merge the same number of tokens."""

import copy

import pytest
import torch
from processes import run_together
from torch import distributed

from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def tokens_left(rank, folder):
    """Run in each process: what a patched model leaves, with the group and without."""
    torch.manual_seed(0)
    model = import_timm().models.vision_transformer.VisionTransformer(**TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    # In one process all windows are similar, in the other hardly any.
    x = torch.ones(2, 3, 32, 32) if rank == 0 else torch.randn(2, 3, 32, 32)
    left = {}
    for name, group in (("alone", None), ("together", distributed.group.WORLD)):
        one = patch(copy.deepcopy(model), "algm", layers=(0, 2), threshold=0.1, group=group)
        with torch.no_grad():
            copy.deepcopy(one)(x)  # a copy shares the group
            one(x)
        left[name] = one.tokred_trace.left
    return left


@pytest.mark.slow
def test_processes_of_a_group_keep_equal_shapes(tmp_path):
    found = run_together(tokens_left, tmp_path)
    assert found[0]["alone"] != found[1]["alone"]
    assert found[0]["together"] == found[1]["together"]
    fewest = [max(pair) for pair in zip(found[0]["alone"], found[1]["alone"], strict=True)]
    assert found[0]["together"][0] == fewest[0]
