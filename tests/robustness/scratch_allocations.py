# SPDX-License-Identifier: MIT
"""Run each CPU op that allocates scratch memory with too little address space; test_out_of_memory.py runs this script.

Each op runs in a forked process, under limits that grow until it succeeds. Print one line of JSON for each op: its
name, the exit status of its process, and the errors that it raised.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch

import tokred_kernels as tk

STEP, MOST = 2 << 20, 2 << 30  # bytes


def many_channels(size, tokens=8):
    return torch.randn(2, tokens, size)


def heads(size, tokens, **options):
    return torch.randn(2, 1, tokens, size, **options)


def backward_of(out):
    grad = torch.ones_like(out)
    return lambda: out.backward(grad, retain_graph=True)


def keep_topk(size):
    scores = torch.randn(2, 16 * size)
    return lambda: tk.keep_topk(scores, 3, num_prefix=1)


def bipartite_match(size):
    metric = many_channels(size)
    return lambda: tk.bipartite_match(metric, 2)


def rank_candidates(size):
    metric = many_channels(size)
    return lambda: tk.adaptive_bipartite_match(metric, threshold=0.5)


def window_similarity(size):
    x = many_channels(16 * size, tokens=4)
    return lambda: tk.window_match(x, 0.5, grid=(2, 2), num_prefix=0)


def window_map(size):
    # The smallest windows need the most scratch memory: more than malloc can have left over from a run that failed.
    x = torch.randn(2, 16 * size, 1)
    return lambda: tk.window_match(x, 0.5, grid=(16, size), window=(1, 2), num_prefix=0)


def token_attention(size):
    q, k, v = (heads(size, 8) for _ in range(3))
    return lambda: tk.token_attention(q, k, v, importance="mean")


def token_attention_backward(size):
    q, k, v = (heads(size, 8, requires_grad=True) for _ in range(3))
    return backward_of(tk.token_attention(q, k, v, importance="mean")[0])


def lookup_gather(size):
    q, k, v = (heads(size, tokens) for tokens in (4, 8, 8))
    return lambda: tk.lookup_gather(q, k, v)


def lookup_gather_backward(size):
    q, k, v = (heads(size, tokens, requires_grad=True) for tokens in (4, 8, 8))
    return backward_of(tk.lookup_gather(q, k, v)[0])


def lookup_scatter(size):
    q, k, v = (heads(size, tokens) for tokens in (4, 8, 4))
    lse = torch.zeros(2, 1, 4)
    return lambda: tk.lookup_scatter(q, k, v, lse)


def lookup_scatter_backward(size):
    q, k, v = (heads(size, tokens, requires_grad=True) for tokens in (4, 8, 4))
    return backward_of(tk.lookup_scatter(q, k, v, torch.zeros(2, 1, 4)))


OPS = (keep_topk, bipartite_match, rank_candidates, window_similarity, window_map, token_attention)
OPS += (token_attention_backward, lookup_gather, lookup_gather_backward, lookup_scatter, lookup_scatter_backward)


def address_space():
    """Return the bytes of address space that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def errors_of(prepare):
    """Return the errors that an op raises under limits that grow until it succeeds."""
    torch.set_num_threads(2)
    torch.ones(1 << 20).sum()  # starts the threads, which a limit would prevent
    prepare(64)()
    run, errors = prepare(1 << 17), set()
    used, hard = address_space(), resource.getrlimit(resource.RLIMIT_AS)[1]
    for extra in range(STEP, MOST, STEP):
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, hard))
        try:
            run()
        except (RuntimeError, MemoryError) as error:
            errors.add(f"{type(error).__name__}: {error}")
        else:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            return sorted(errors)
    raise AssertionError(f"{prepare.__name__} did not succeed with {MOST} bytes: {errors}")


if __name__ == "__main__":
    tk.use_backend("cpu")
    for prepare in OPS:
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.write(writer, json.dumps(errors_of(prepare)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps([prepare.__name__, status, text]))
        sys.stdout.flush()
