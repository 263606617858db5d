# SPDX-License-Identifier: MIT
"""Counts that two processes agree on."""

import pytest
import torch
from processes import PROCESSES, run_together

import tokred_kernels as tk

# As many images in each process: in the last case one has none.
CASES = {"one each": (1, 1), "two and three": (2, 3), "none and two": (0, 2), "none at all": (0, 0)}
MATCHES = {
    "window": lambda x, **how: tk.window_match(x, 0.05, **how, num_prefix=1),
    "threshold": lambda x, **how: tk.adaptive_bipartite_match(x, threshold=0.6, class_token=True, **how),
    "layer": lambda x, **how: tk.adaptive_bipartite_match(x, layer_index=3, class_token=True, **how),
}


def images(case):
    """What each process has: the tokens of the first are more similar."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(number, 65, 16, generator=generator) + 0.4 * (PROCESSES - rank)
        for rank, number in enumerate(CASES[case])
    ]


def match_together(rank, folder):
    """Run in each process: every match of every case, with the group and without."""
    group = torch.distributed.group.WORLD
    results = {}
    for which in ("reference", "cpu"):
        with tk.use_backend(which):
            for case in CASES:
                x = images(case)[rank]
                for name, match in MATCHES.items():
                    results[which, case, name] = (
                        match(x, group=group).dest,
                        match(x).num_out,
                        match(x, group=group).num_out,
                    )
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found."""
    return run_together(match_together, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("name", MATCHES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_all_processes_keep_the_shapes_of_the_most_reluctant(results, which, case, name):
    found = [own[which, case, name] for own in results]
    alone = [own for (_, own, _), number in zip(found, CASES[case], strict=True) if number]
    expected = max(alone, default=65)
    assert [agreed for *_, agreed in found] == [expected] * PROCESSES
    if case == "one each":
        assert alone[0] < alone[1], "the processes must differ, or this shows nothing"
    for (dest, _, _), x in zip(found, images(case), strict=True):
        assert dest.shape == x.shape[:2]
        given = (65 - expected) // (3 if name == "window" else 1)
        with tk.use_backend(which):
            assert torch.equal(dest, MATCHES[name](x, count=given).dest)
