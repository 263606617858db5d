# SPDX-License-Identifier: MIT
"""Functions run by two processes of one group."""

import os
from datetime import timedelta

import torch
from torch import distributed, multiprocessing

PROCESSES = 2


def run_together(work, folder):
    """What work(rank, folder) gave in each process of a gloo group, its number of threads one."""
    multiprocessing.spawn(_run_one, (work, str(folder)), nprocs=PROCESSES)
    return [torch.load(f"{folder}/result{rank}.pt") for rank in range(PROCESSES)]


def _run_one(rank, work, folder):
    torch.set_num_threads(1)
    meet = {"init_method": f"file://{folder}/meet", "timeout": timedelta(minutes=2)}
    distributed.init_process_group("gloo", rank=rank, world_size=PROCESSES, **meet)
    torch.save(work(rank, folder), f"{folder}/result{rank}.pt")
    distributed.barrier()
    os._exit(0)  # Taking the group apart, gloo now and then aborts, or waits for the GIL for good.
