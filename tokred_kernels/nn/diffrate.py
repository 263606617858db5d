# SPDX-License-Identifier: MIT
"""DiffRate's differentiable discrete proxy: how many tokens to keep, as a parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokred_kernels.checks import check_count


class CompressionRate(nn.Module):
    """How many tokens a layer keeps, learned by gradient descent (DiffRate, section 3.3).

    The candidates are patch_number, patch_number - granularity, ..., down to above 0; the parameter
    `selected_probability`, as in the published code, holds their logits. What is kept is the expected candidate,
    rounded up.

    Args:
        patch_number: the patches that come in, without the class token.
        granularity: the gap between candidates.
        class_token: there is one; it is always kept and counted.
    """

    kept_token_candidate: Tensor

    def __init__(self, patch_number: int, granularity: int = 1, class_token: bool = True) -> None:
        super().__init__()
        check_count("nn.CompressionRate", "patch_number", patch_number, least=1)
        check_count("nn.CompressionRate", "granularity", granularity, least=1)
        self.patch_number = patch_number
        self.prefix = int(class_token)
        candidates = torch.arange(patch_number, 0, -granularity, dtype=torch.float32)
        # Published checkpoints have it among the parameters, so it is in the state dict, and no gradient reaches it.
        self.kept_token_candidate = nn.Parameter(candidates, requires_grad=False)
        self.selected_probability = nn.Parameter(torch.zeros_like(candidates))

    def kept(self) -> Tensor:
        """The expected number of tokens kept, class token included, rounded up; its gradient is that of the mean."""
        mean = self.kept_token_candidate @ self.selected_probability.softmax(-1)
        # The zero is added to a whole number, so that the count is exactly one.
        return mean.ceil().detach() + self.prefix + (mean - mean.detach())

    def mask(self, token_number: int | None = None) -> Tensor:
        """(patch_number + class token,): 1 for the tokens kept, the most important first, 0 for the others.

        Its gradient is that of the probability with which each token is kept: the sum of those of the candidates that
        are large enough. With `token_number` only tokens up to there are set to 0: those after it were out already, and
        keep their gradient's way.
        """
        total = self.patch_number + self.prefix
        probability = self.selected_probability.softmax(-1)
        # Candidate c keeps tokens 0 to c + prefix - 1. Put at its last token, the sum from the end is each token's own.
        last = self.kept_token_candidate.long() + self.prefix - 1
        at_last = probability.new_zeros(total).scatter(0, last, probability)
        soft = at_last.flip(0).cumsum(0).flip(0)
        index = torch.arange(total, device=soft.device)
        gone = index >= self.kept().detach()
        if token_number is not None:
            gone = gone & (index < token_number)
        return torch.where(gone, 0.0, 1.0) - soft.detach() + soft

    def extra_repr(self) -> str:
        """What a print of the model shows."""
        return f"patch_number={self.patch_number}, class_token={bool(self.prefix)}, kept={int(self.kept())}"
