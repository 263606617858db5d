# SPDX-License-Identifier: MIT
"""DiffRate's differentiable discrete proxy: the number of tokens to keep, as a parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokred_kernels.checks import MAX_ROWS, check_count, check_flag


class CompressionRate(nn.Module):
    """How many tokens a layer keeps, learned by gradient descent (DiffRate, section 3.3).

    The candidates are patch_number, patch_number - granularity, and so on, as long as they are above 0. The parameter
    `selected_probability`, named as in the published code, has their logits. The layer keeps the expected candidate,
    rounded up.

    Args:
        patch_number: the number of patches that enter, without the class token.
        granularity: the gap between candidates.
        class_token: whether there is a class token, which is always kept and counted.
        num_prefix: this many tokens, including the class token, are always kept and counted. Default 1 with
            `class_token`, else 0.
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
        # A parameter without gradient, because published checkpoints have it in their state dict. Nothing is computed
        # with it: a model can be in half precision, which cannot represent 575.
        self.kept_token_candidate = nn.Parameter(candidates, requires_grad=False)
        self.selected_probability = nn.Parameter(torch.zeros_like(candidates))

    @property
    def least(self) -> int:
        """The lowest count that can be learned, including the tokens that are always kept."""
        return (self.patch_number - 1) % self.granularity + 1 + self.prefix

    def _candidates(self, device: torch.device | None = None) -> Tensor:
        return torch.arange(self.patch_number, 0, -self.granularity, device=device)

    def kept(self) -> Tensor:
        """Return the expected number of kept tokens, prefix included, rounded up, with the gradient of the mean."""
        # No matrix product, because autocast would compute it in half precision.
        probability = _full(self.selected_probability).softmax(-1)
        mean = (self._candidates(probability.device) * probability).sum()
        # Adding zero to a whole number leaves it exactly whole.
        return mean.ceil().detach() + self.prefix + (mean - mean.detach())

    def mask(self, token_number: int | None = None) -> Tensor:
        """Return (patch_number + num_prefix,): 1 for kept tokens, the most important first, and 0 for the others.

        The gradient is that of the probability of keeping each token: the sum of the probabilities of all candidates
        that are large enough. With `token_number`, only the first `token_number` entries are set to 0: the tokens after
        them were masked before, and their gradient passes.
        """
        if token_number is not None:
            token_number = check_count("nn.CompressionRate", "token_number", token_number)
        total = self.patch_number + self.prefix
        probability = _full(self.selected_probability).softmax(-1)
        # Candidate c keeps tokens 0 to c + prefix - 1: store its probability there, and sum from the end.
        last = self._candidates(probability.device) + self.prefix - 1
        at_last = probability.new_zeros(total).scatter(0, last, probability)
        soft = at_last.flip(0).cumsum(0).flip(0)
        index = torch.arange(total, device=soft.device)
        gone = index >= self.kept().detach()
        if token_number is not None:
            gone = gone & (index < token_number)
        # Adding an exact zero leaves the mask exactly 0 and 1, which attention needs.
        return torch.where(gone, 0.0, 1.0).to(soft.dtype) + (soft - soft.detach())

    def extra_repr(self) -> str:
        """Return the text for `print(model)`."""
        return f"patch_number={self.patch_number}, class_token={bool(self.prefix)}, kept={int(self.kept())}"


def _full(value: Tensor) -> Tensor:
    """Return the value in float32, or float64 if it has that: half precision cannot represent 577."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
