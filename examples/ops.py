# SPDX-License-Identifier: MIT
"""Token maps by hand: match, merge, compose and unmerge.

python examples/ops.py
"""

import torch

import tokred_kernels as tk


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 197, 384)  # two images, a class token and 196 patches
    metric = torch.randn(2, 197, 64)  # what tokens are compared by, for example the keys averaged over heads

    # ToMe: the 16 most similar pairs merge.
    first = tk.bipartite_match(metric, 16, class_token=True)
    y, size = tk.merge_wavg(x, first)
    print(f"ToMe: {x.shape[1]} tokens become {y.shape[1]}; one token stands for up to {int(size.max())}")

    # The same match and merge in one call, on the merged tokens and their sizes.
    y, size, second = tk.bipartite_merge(y, 16, size=size, class_token=True)
    both = first.then(second)
    print(f"after a second merge: {y.shape[1]} tokens; the sizes add up to {int(size[0].sum())}")

    # Every original token gets the value of its output token.
    restored = tk.unmerge(y, both)
    error = (restored - x).norm() / x.norm()
    print(f"unmerge: {tuple(restored.shape)}, relative error {error:.2f}")

    # Pruning: keep the 98 tokens with the highest scores, and fuse the others into one.
    scores = torch.rand(2, 197)
    kept = tk.keep_topk(scores, 98, num_prefix=1, fuse=True)
    print(f"keep_topk: {tk.merge(x, kept).shape[1]} tokens, the last one is the mean of {197 - 1 - 98}")

    # Attention that counts each merged token by its size, and returns each token's importance.
    q, k, v = torch.randn(3, 2, 6, y.shape[1], 64).unbind(0)
    out, importance = tk.token_attention(q, k, v, size=size, importance="class")
    print(f"token_attention: {tuple(out.shape)}, importance {tuple(importance.shape)}")


if __name__ == "__main__":
    main()
