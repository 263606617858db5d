# SPDX-License-Identifier: MIT
"""DiffRate's differentiable discrete proxy: the number of tokens to keep, as a parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokred_kernels.checks import MAX_ROWS, check_count, check_flag


class CompressionRate(nn.Module):
    """How many tokens a layer keeps, learned by gradient descent (DiffRate, section 3.3).

    The candidates are patch_number, patch_number - granularity, ..., down to above 0; the parameter
    `selected_probability`, as in the published code, holds their logits. What is kept is the expected candidate,
    rounded up.

    Args:
        patch_number: the patches that come in, without the class token.
        granularity: the gap between candidates.
        class_token: there is one; it is always kept and counted.
        num_prefix: so many tokens, the class token among them, are always kept and counted; default that one or none.
    """

    kept_token_candidate: Tensor

    def __init__(
        self, patch_number: int, granularity: int = 1, class_token: bool = True, num_prefix: int | None = None
    ) -> None:
        super().__init__()
        patch_number = check_count("nn.CompressionRate", "patch_number", patch_number, least=1, most=MAX_ROWS)
        granularity = check_count("nn.CompressionRate", "granularity", granularity, least=1)
        check_flag("nn.CompressionRate", "class_token", class_token)
        if num_prefix is not None:
            num_prefix = check_count("nn.CompressionRate", "num_prefix", num_prefix)
        self.patch_number = patch_number
        self.granularity = granularity
        self.prefix = int(class_token) if num_prefix is None else num_prefix
        candidates = self._candidates().float()
        # Published checkpoints have it among the parameters, so it is in the state dict, and no gradient reaches it.
        # Nothing is computed with it: half precision, in which a model may be, has no 575.
        self.kept_token_candidate = nn.Parameter(candidates, requires_grad=False)
        self.selected_probability = nn.Parameter(torch.zeros_like(candidates))

    @property
    def least(self) -> int:
        """The lowest count there is to learn, the tokens that are always kept included."""
        return (self.patch_number - 1) % self.granularity + 1 + self.prefix

    def _candidates(self, device: torch.device | None = None) -> Tensor:
        return torch.arange(self.patch_number, 0, -self.granularity, device=device)

    def kept(self) -> Tensor:
        """The expected number of tokens kept, class token included, rounded up; its gradient is that of the mean."""
        # No matrix product: under autocast that would round to half precision, and counts with it.
        probability = _full(self.selected_probability).softmax(-1)
        mean = (self._candidates(probability.device) * probability).sum()
        # The zero is added to a whole number, so that the count is exactly one.
        return mean.ceil().detach() + self.prefix + (mean - mean.detach())

    def mask(self, token_number: int | None = None) -> Tensor:
        """(patch_number + class token,): 1 for the tokens kept, the most important first, 0 for the others.

        Its gradient is that of the probability with which each token is kept: the sum of those of the candidates that
        are large enough. With `token_number` only tokens up to there are set to 0: those after it were out already, and
        keep their gradient's way.
        """
        if token_number is not None:
            token_number = check_count("nn.CompressionRate", "token_number", token_number)
        total = self.patch_number + self.prefix
        probability = _full(self.selected_probability).softmax(-1)
        # Candidate c keeps tokens 0 to c + prefix - 1. Put at its last token, the sum from the end is each token's own.
        last = self._candidates(probability.device) + self.prefix - 1
        at_last = probability.new_zeros(total).scatter(0, last, probability)
        soft = at_last.flip(0).cumsum(0).flip(0)
        index = torch.arange(total, device=soft.device)
        gone = index >= self.kept().detach()
        if token_number is not None:
            gone = gone & (index < token_number)
        # An exact zero is added, so that the mask is 0 and 1 to the bit, as attention wants of a policy.
        return torch.where(gone, 0.0, 1.0).to(soft.dtype) + (soft - soft.detach())

    def extra_repr(self) -> str:
        """What a print of the model shows."""
        return f"patch_number={self.patch_number}, class_token={bool(self.prefix)}, kept={int(self.kept())}"


def _full(value: Tensor) -> Tensor:
    """In float32, or float64 of such: half precision has no 577."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
