# SPDX-License-Identifier: MIT
"""ToMe for Stable Diffusion written out with dense matrices: slow, in plain torch, sharing nothing with the package.

Each block is written as three residual branches. A branch that merges takes `average @ x` in and gives `share @ y` out.
"""

import contextlib
from unittest import mock

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch.nn import functional as F


def matrices(x, grid, ratio, stride):
    """`average` (B, N', N), whose rows are means of the tokens that are one now, and `share` (B, N, N'), its way back.

    Slots are in the order of the token that stands for them: neither attention nor an MLP minds which order it is.
    """
    (height, width), (down, across) = grid, stride
    rows, columns = range(0, height - down + 1, down), range(0, width - across + 1, across)
    destinations = torch.tensor([row * width + column for row in rows for column in columns])
    sources = torch.tensor([token for token in range(height * width) if token not in destinations.tolist()])
    unit = F.normalize(x, dim=-1)
    best, partner = (unit[:, sources] @ unit[:, destinations].mT).max(-1)
    removed = min(int(height * width * ratio), len(sources))
    stands_for = torch.arange(height * width).repeat(len(x), 1)
    for image, order in enumerate(best.argsort(dim=1, descending=True)):
        gone = order[:removed]
        stands_for[image, sources[gone]] = destinations[partner[image, gone]]
    kept = torch.stack([image.unique() for image in stands_for])
    share = (stands_for[:, :, None] == kept[:, None, :]).to(x.dtype)
    return (share / share.sum(1, keepdim=True)).mT, share


def block(self, x, grid, ratio, stride, parts, *, context, timestep, labels):
    """What a BasicTransformerBlock of norm type layer_norm, ada_norm_zero or ada_norm_single gives for x (B, N, C)."""
    with torch.no_grad():
        average, share = matrices(x, grid, ratio, stride)

    def branch(name, y, **more):
        part = getattr(self, name)
        return share @ part(average @ y, **more) if name in parts else part(y, **more)

    if self.norm_type == "layer_norm":
        x = x + branch("attn1", self.norm1(x))
        x = x + branch("attn2", self.norm2(x), encoder_hidden_states=context)
        return x + branch("ff", self.norm3(x))
    if self.norm_type == "ada_norm_zero":
        embedded = F.silu(self.norm1.emb(timestep, labels, hidden_dtype=x.dtype))
        shift, scale, gate, shift_2, scale_2, gate_2 = self.norm1.linear(embedded)[:, None].chunk(6, dim=-1)
        norm_1, norm_2 = self.norm1.norm, self.norm3
    else:
        table = self.scale_shift_table + timestep.unflatten(-1, (6, -1))
        shift, scale, gate, shift_2, scale_2, gate_2 = table.split(1, dim=1)
        norm_1, norm_2 = self.norm1, self.norm2
    x = x + gate * branch("attn1", norm_1(x) * (1 + scale) + shift)
    if self.attn2 is not None:
        x = x + branch("attn2", x, encoder_hidden_states=context)
    return x + gate_2 * branch("ff", norm_2(x) * (1 + scale_2) + shift_2)


@contextlib.contextmanager
def merging(grids, ratio, stride, parts):
    """While it lasts, plain blocks merge as `block` does where their number of tokens is in `grids`: {N: (h, w)}."""
    plain = BasicTransformerBlock.forward

    def forward(self, hidden_states, *args, encoder_hidden_states=None, timestep=None, class_labels=None, **kwargs):
        given = {"encoder_hidden_states": encoder_hidden_states, "timestep": timestep, "class_labels": class_labels}
        if hidden_states.shape[1] not in grids:
            return plain(self, hidden_states, *args, **given, **kwargs)
        grid = grids[hidden_states.shape[1]]
        more = {"context": encoder_hidden_states, "timestep": timestep, "labels": class_labels}
        return block(self, hidden_states, grid, ratio, stride, parts, **more)

    with mock.patch.object(BasicTransformerBlock, "forward", forward):
        yield
