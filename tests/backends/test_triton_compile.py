# SPDX-License-Identifier: MIT
"""Every Triton kernel, at every config and dtype shipped, compiled ahead of time: it fits, and does not spill.

No GPU is needed. The compiling is done by this file run as a program, without TRITON_INTERPRET, which the tests'
own process may have set: kernels are either interpreted or compiled, for the whole life of a process.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

# Shared memory that a program may have, in bytes: sm_86's and sm_89's 99 KiB for NVIDIA, so that the portable configs
# run on smaller cards (sm_120 too), 227 KiB where sm_90 and sm_100 have their own, and 64 KiB on gfx942. Threads come
# in warps of 32 or 64.
NVIDIA_SHARED, HOPPER_SHARED, AMD_SHARED = 99 * 1024, 227 * 1024, 64 * 1024
# Bytes per thread: ptxas spills a register or two, far below its limit, if one more block then fits a multiprocessor.
SPILL_ALLOWANCE = 16
TIMEOUT = 1800  # seconds for a target, on a machine that has other work
# Tensors that a kernel may be given None for.
ABSENT = (
    *("sources", "destinations", "cu_seqlens", "starts_in", "starts_out", "counts", "moments", "rank", "inverse"),
    *("weight", "weight_sum", "grad_weight_sum", "x", "y"),
    *("bias", "policy", "starts", "grad_importance", "top", "shift", "inverse_sum", "grad_bias", "grad_policy"),
    *("out", "grad_lse", "offset", "grad_v", "to_lse", "more_parts", "row_parts", "more_out", "row_out"),
)
HALVES = (torch.float16, torch.bfloat16)
EVERYTHING = ("sm_80", "gfx942")  # targets that everything is compiled for
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# PTX that loads 16 bytes or more from global memory (cp.async.cg always copies 16), and a single float16 or bfloat16.
WIDE_LOAD = r"ld\.global[.\w]*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)|cp\.async\.cg"
NARROW_LOAD = r"ld\.global[.\w]*\.[bu]16"
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def _compiled(target):
    """Compile all cases for one target in a new process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, target]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def compiling(request):
    """The selected targets, as many at once as there are processors: each takes minutes of one."""
    selected = [item.callspec.params["target"] for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {target: pool.submit(_compiled, target) for target in selected}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target", [pytest.param(name, marks=pytest.mark.slow) for name in TARGETS])
def test_every_kernel_fits_and_does_not_spill(target, compiling):
    run = compiling[target].result()
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    compiled = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    kernels = {"match_kernel", "combine_kernel", *OF_TABLES, *(OTHERS if target in EVERYTHING else ())}
    assert {kernel["name"] for kernel in compiled} == kernels
    assert [kernel for kernel in compiled if kernel["shared"] > _shared_limit(target, kernel["name"])] == []
    assert [kernel for kernel in compiled if kernel["spilled"] > SPILL_ALLOWANCE] == []
    if target.startswith("sm_"):  # AMD's wavefronts are twice as wide, so a thread has too little of some tiles
        moving = [kernel for kernel in compiled if kernel["name"] in MOVE_ROWS and kernel["aligned"]]
        assert [kernel for kernel in moving if kernel["wide_loads"] <= kernel["narrow_loads"]] == []


def _shared_limit(target, name):
    from tokred_kernels.backends.triton.configs_tables import TABLES

    if target.startswith("gfx"):
        return AMD_SHARED
    return HOPPER_SHARED if target in TABLES and name in OF_TABLES else NVIDIA_SHARED


def _all_cases(target):
    """Yield (kernel, tensor types, constants, options, aligned) for each case of a target."""
    # Without tensor cores the program is nearly the same for all NVIDIA targets: it is compiled for one.
    singles = (torch.float32,) if target in EVERYTHING else ()
    return itertools.chain(
        _match_cases((*singles, *HALVES)),
        _cases((torch.bfloat16,) if target == "gfx942" else (torch.float32, torch.bfloat16)) if singles else (),
        _map_cases() if singles else (),
        _attention_cases(target, (*singles, *HALVES)),
        _lookup_cases(target, (*singles, *HALVES)),
        _combine_cases(),
    )


def _match_cases(dtypes):
    """Yield the cases of the match, the one kernel with products whose configs are the same for all targets."""
    from tokred_kernels.backends.triton import configs
    from tokred_kernels.backends.triton.rank_candidates import match_kernel

    for dtype in dtypes:
        largest = max(config.block_channels for config in configs.MATCH_CONFIGS[dtype].values())
        for config in configs.MATCH_CONFIGS[dtype].values():
            blocks = {f"BLOCK_{name.upper()}": getattr(config, f"block_{name}") for name in ("src", "dst", "channels")}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            modes = [("", True, True)]
            # float16 differs from bfloat16 in the product's type alone: its modes need not all be compiled.
            if dtype != torch.float16:
                modes += [("MEAN", True, True), ("PACKED", True, True)]
                if config.block_channels == largest:
                    modes += [("", False, True), ("LISTS", True, True), ("", False, False), ("PACKED", False, False)]
            for mode, one_chunk, aligned in modes:
                types = {"metric": POINTER[dtype], "score": "*fp32", "partner": "*i32"}
                modes_on = {name: name == mode for name in ("PACKED", "LISTS", "MEAN")}
                if mode == "LISTS":
                    types |= {"sources": "*i32", "destinations": "*i32"}
                if mode == "PACKED":
                    types |= {"cu_seqlens": "*i32"}
                yield match_kernel, types, modes_on | {"ONE_CHUNK": one_chunk} | blocks, options, aligned


def _cases(dtypes):
    """Yield the cases of kernels without products. float16 is loaded and stored as bfloat16, and is not compiled."""
    from tokred_kernels.backends.triton import configs
    from tokred_kernels.backends.triton.bipartite_match import select_kernel
    from tokred_kernels.backends.triton.keep_topk import topk_kernel
    from tokred_kernels.backends.triton.merge import merge_kernel
    from tokred_kernels.backends.triton.merge_backward import amax_backward_kernel, merge_backward_kernel
    from tokred_kernels.backends.triton.rank_candidates import mean_kernel
    from tokred_kernels.backends.triton.unmerge import unmerge_kernel
    from tokred_kernels.backends.triton.window_similarity import window_kernel

    longest = max(configs.WINDOW_CONFIGS)
    for config in configs.WINDOW_CONFIGS.values():
        blocks = {"BLOCK_WINDOWS": config.block_windows, "BLOCK_CHANNELS": config.block_channels}
        options = {"num_warps": config.num_warps}
        for dtype in dtypes:
            modes = [(True, True)]
            if config.block_channels == longest:
                modes += [(True, False), (False, True), (False, False)]
            for one_chunk, aligned in modes:
                types = {"x": POINTER[dtype], "score": "*fp32"} | ({} if one_chunk else {"inverse": "*fp32"})
                constants = {"ONE_CHUNK": one_chunk, "UNROLL": config.unroll, **blocks}
                yield window_kernel, types, constants, options, aligned

    select = {"score": "*fp32", **dict.fromkeys(("index", "dest", "members", "begin", "count"), "*i32")}
    lists = {"sources": "*i32", "destinations": "*i32"}
    for config in configs.SELECT_CONFIGS.values():
        blocks = {"BLOCK": config.block, "CHUNK": config.chunk}
        options = {"num_warps": config.num_warps}
        for types, constants in (
            (select, {"LISTS": False, "BY_INDEX": True}),
            (select, {"LISTS": False, "BY_INDEX": False}),
            (select | lists, {"LISTS": True, "BY_INDEX": False}),
        ):
            yield select_kernel, types, constants | blocks, options, True
        types = {"scores": "*fp32", **dict.fromkeys(("dest", "members", "begin", "count"), "*i32")}
        for fuse in (False, True):
            yield topk_kernel, types, {"RANKED": False, "FUSE": fuse, **blocks}, options, True

    for (_, dtype), config in configs.ROWS_CONFIGS.items():
        if dtype not in dtypes:
            continue
        blocks = {"BLOCK_ROWS": config.block_rows, "BLOCK_CHANNELS": config.block_channels}
        options = {"num_warps": config.num_warps}
        of = POINTER[dtype]
        all_modes = config.block_channels == 128
        views = {"members": "*i32", "begin": "*i32", "count": "*i32"}
        yield mean_kernel, {"metric": of, "mean": of}, blocks, options, True
        yield unmerge_kernel, {"y": of, "dest": "*i32", "x": of}, blocks, options, True
        types = {"grad_y": of, "x": of, "y": of, "grad_x": of, **views}
        yield amax_backward_kernel, types, blocks, options, True
        types = {"x": of, "weight": "*fp32", "y": of, "sums": "*fp32", **views}
        merge_modes = [("mean", True, True, True)]
        if all_modes:
            merge_modes += [("mean", False, True, True), ("sum", False, False, True), ("amax", False, False, True)]
            merge_modes += [("sum", True, True, True), ("mean", True, True, False)]
        for reduce, weighted, sums, aligned in merge_modes:
            kept = types if weighted else {name: of for name, of in types.items() if name != "weight"}
            modes = {"REDUCE": reduce, "WEIGHTED": weighted, "SUMS": sums, "UNROLL": config.unroll}
            yield merge_kernel, kept, modes | blocks, options, aligned
        types = dict.fromkeys(("grad_weight_sum", "weight", "weight_sum", "grad_weight"), "*fp32")
        types |= {"grad_y": of, "x": of, "y": of, "dest": "*i32", "count": "*i32", "grad_x": of}
        backward_modes = [(True, True, True, True, True)]
        if all_modes:
            backward_modes += [(True, False, False, True, False), (False, True, True, False, True)]
        for mean, weighted, sums, need_x, need_weight in backward_modes:
            given = {"weight": weighted, "weight_sum": weighted, "grad_weight_sum": sums}
            given |= {"x": need_weight, "y": need_weight and mean}
            kept = {name: of for name, of in types.items() if given.get(name, True)}
            modes = {"MEAN": mean, "WEIGHTED": weighted, "SUMS": sums, "NEED_X": need_x, "NEED_WEIGHT": need_weight}
            yield merge_backward_kernel, kept, modes | blocks, options, True


def _map_cases():
    """Kernels that make maps: every mode, at its one config."""
    from tokred_kernels.backends.triton.build_match_map import dest_kernel
    from tokred_kernels.backends.triton.compose import compose_kernel
    from tokred_kernels.backends.triton.configs import RANK_CONFIG, SCAN_CONFIG
    from tokred_kernels.backends.triton.count_above_threshold import moments_kernel, similar_kernel
    from tokred_kernels.backends.triton.keep_topk import topk_kernel
    from tokred_kernels.backends.triton.rank_candidates import rank_kernel
    from tokred_kernels.backends.triton.to_csr import members_kernel, sorted_members_kernel
    from tokred_kernels.backends.triton.window_map import window_map_kernel

    given = dict.fromkeys(("partner", "rank", "dest", "members", "begin", "count", "keys"), "*i32")
    given |= {"score": "*fp32", "scores": "*fp32", "order": "*i64", "threshold": "fp32", "divisor": "i64"}
    lists = dict.fromkeys(("sources", "destinations"), "*i32")
    starts_in, starts_out = {"starts_in": "*i32"}, {"counts": "*i32", "starts_out": "*i32"}
    counts, moments = {"counts": "*i32"}, {"moments": "*fp64"}
    modes = (
        (compose_kernel, dict.fromkeys(("first", "second"), "*i32"), {}),
        (rank_kernel, {}, {"PACKED": False}),
        (rank_kernel, {"cu_seqlens": "*i32"}, {"PACKED": True}),
        (members_kernel, {}, {"PACKED_IN": False, "PACKED_OUT": False}),
        (members_kernel, starts_in | starts_out, {"PACKED_IN": True, "PACKED_OUT": True}),
        (sorted_members_kernel, {}, {}),
        (topk_kernel, {}, {"RANKED": True, "FUSE": True}),
        (dest_kernel, lists, {"LISTS": True, "BY_INDEX": False, "PACKED_IN": False, "PACKED_OUT": False}),
        (
            dest_kernel,
            starts_in | starts_out,
            {"LISTS": False, "BY_INDEX": True, "PACKED_IN": True, "PACKED_OUT": True},
        ),
        (window_map_kernel, {}, {"PACKED": False}),
        (window_map_kernel, starts_out, {"PACKED": True}),
        (moments_kernel, moments, {}),
        (similar_kernel, counts, {"OWN": False, "AVERAGE": False}),
        (similar_kernel, counts, {"OWN": True, "AVERAGE": False}),
        (similar_kernel, counts | moments, {"OWN": False, "AVERAGE": True}),
    )
    for kernel, more, on in modes:
        config = RANK_CONFIG if "blocks" in kernel.arg_names else SCAN_CONFIG
        types = {name: of for name, of in (given | more).items() if name in kernel.arg_names}
        constants = on | {"BLOCK": config.block} | ({"CHUNK": config.chunk} if "CHUNK" in kernel.arg_names else {})
        yield kernel, types, constants, {"num_warps": config.num_warps}, True


# What attention may be asked for: bias, policy, packed, the importance that is differentiated.
PLAIN = (False, False, False, "")
OF_CLASS = (True, False, False, "class")
OTHERS = (
    *("mean_kernel", "rank_kernel", "select_kernel", "window_kernel", "topk_kernel", "compose_kernel", "dest_kernel"),
    *("members_kernel", "sorted_members_kernel", "window_map_kernel", "moments_kernel", "similar_kernel"),
    *("merge_kernel", "merge_backward_kernel", "amax_backward_kernel", "unmerge_kernel"),
)
OF_TABLES = (
    *("attention_kernel", "importance_kernel", "rows_kernel", "keys_kernel", "queries_kernel"),
    *("gather_kernel", "scatter_kernel", "lookup_queries_kernel", "lookup_keys_kernel"),
)
# Kernels that read rows of channels: aligned, they must load 16 bytes at a time.
MOVE_ROWS = {
    *OF_TABLES,
    *("match_kernel", "mean_kernel", "window_kernel", "combine_kernel"),
    *("merge_kernel", "merge_backward_kernel", "amax_backward_kernel", "unmerge_kernel"),
}


def _table(target):
    """The configs that attention has on a target, those of tuned.json among them."""
    from tokred_kernels.backends.triton.configs_attention import TABLES

    return TABLES.get(target, TABLES["portable"])


def _attention_cases(target, dtypes):
    """Yield the cases of token attention: each config with all options, and some with fewer."""
    from tokred_kernels.backends.triton.attention_rows import rows_kernel
    from tokred_kernels.backends.triton.token_attention import attention_kernel, importance_kernel
    from tokred_kernels.backends.triton.token_attention_backward import keys_kernel, queries_kernel

    table = _table(target)
    # Heads of 64, and narrower heads with unaligned strides. float16 differs if a policy scales weights.
    others = {
        ("attention", torch.bfloat16): [
            (64, True, PLAIN),
            (64, True, OF_CLASS),
            (40, False, (True, False, True, "mean")),
        ],
        ("attention+policy", torch.float16): [(64, True, (True, True, True, "mean"))],
        ("rows", torch.bfloat16): [(64, True, OF_CLASS)],
        ("keys+policy", torch.float32): [(40, False, (True, True, True, "mean"))],
    }
    kernels = {
        **{"attention": attention_kernel, "importance": importance_kernel, "importance_mean": importance_kernel},
        **{"rows": rows_kernel, "queries": queries_kernel, "keys": keys_kernel},
    }
    for (name, suffix), dtype in itertools.product(itertools.product(kernels, ("", "+policy")), dtypes):
        by_width = table[name + suffix, dtype]
        mode = (True, bool(suffix), True, "class" if name == "importance" else "mean")
        # With the same configs as with a policy, a kernel without one needs less.
        covered = not suffix and by_width == table[name + "+policy", dtype]
        widths = [] if covered or _as_bfloat16(table, name + suffix, dtype) else _widths(by_width)
        if name in ("importance", "importance_mean", "rows"):  # these need many registers at the largest widths only
            widths = [width for width in widths if width >= 64]
        cases = [(width, True, mode) for width in widths]
        for channels, aligned, asked in [*cases, *others.get((name + suffix, dtype), ())]:
            types, constants = _attention_arguments(POINTER[dtype], *asked)
            constants["WHOLE"] &= not target.startswith("gfx")
            yield _tiles(kernels[name], by_width, channels, types, constants, aligned)


def _widths(by_width):
    """Return the two largest of the widths with the same blocks: smaller ones need fewer registers."""
    blocks = {width: dataclasses.replace(config, block_channels=0) for width, config in by_width.items()}
    return [width for width in by_width if sum(blocks[w] == blocks[width] for w in by_width if w > width) < 2]


def _as_bfloat16(table, name, dtype):
    """Return True for float16 with the configs of bfloat16: only the type of the products differs."""
    return dtype == torch.float16 and table[name, dtype] == table[name, torch.bfloat16]


def _attention_arguments(vectors, bias, policy, packed, importance):
    """The types of the tensors, and the constants, of any of its kernels."""
    types = dict.fromkeys(("q", "k", "v", "grad_out", "out", "grad_q", "grad_k", "grad_v"), vectors)
    types |= dict.fromkeys(("row_max", "row_sum", "importance_out", "delta", "level"), "*fp32") | {"scale": "fp32"}
    if bias:
        types |= dict.fromkeys(("bias", "grad_bias"), "*fp32")
    if policy:
        types |= dict.fromkeys(("policy", "shift", "inverse_sum", "grad_policy"), "*fp32") | {"top": "*i32"}
    if packed:
        types |= {"starts": "*i32"}
    if importance:
        types |= {"grad_importance": "*fp32"}
    constants = {"BIAS": bias, "POLICY": policy, "PACKED": packed, "IMPORTANCE": importance}
    constants |= {"NEED_BIAS": bias, "NEED_POLICY": policy, "TOP": policy and bool(importance)}
    return types, constants | {"WHOLE": not policy and not packed}


def _tiles(kernel, by_width, channels, types, constants, aligned):
    """Return the case of a kernel on tiles of scores, with the types and constants that it takes."""
    config = by_width[min(width for width in by_width if width >= channels)]
    constants = constants | {"BLOCK_QUERIES": config.block_queries, "BLOCK_KEYS": config.block_keys}
    constants |= {"BLOCK_CHANNELS": config.block_channels, "CHANNELS": channels}
    types, constants = (
        {name: value for name, value in given.items() if name in kernel.arg_names} for given in (types, constants)
    )
    return kernel, types, constants, {"num_warps": config.num_warps, "num_stages": config.num_stages}, aligned


def _lookup_cases(target, dtypes):
    """Yield the cases of lookup attention: each config with its most demanding kernel, and some others."""
    from tokred_kernels.backends.triton.lookup_gather import gather_kernel
    from tokred_kernels.backends.triton.lookup_gradients import lookup_keys_kernel, lookup_queries_kernel
    from tokred_kernels.backends.triton.lookup_scatter import scatter_kernel

    table = _table(target)
    of_gather, of_scatter = {"GATHER": True, "LSE": True}, {"GATHER": False, "LSE": False}
    not_of_gather, not_of_scatter = ("grad_v", "to_lse"), ("out", "grad_lse", "offset")
    kernels = {
        "gather": (gather_kernel, {}, ()),
        "scatter": (scatter_kernel, {}, ()),
        "scatter_queries": (lookup_queries_kernel, of_scatter, not_of_scatter),
        "gather_queries": (lookup_queries_kernel, of_gather, not_of_gather),
        "gather_keys": (lookup_keys_kernel, of_gather, ()),
        "scatter_keys": (lookup_keys_kernel, of_scatter, ("offset", "grad_v")),
    }
    # For kernels that need less with the same configs, only heads of 64 are compiled.
    more = {"gather_queries": "scatter_queries", "scatter_keys": "gather_keys"}
    unaligned = {("gather", torch.bfloat16), ("gather_keys", torch.float16)}
    for (name, (kernel, modes, absent)), suffix, dtype in itertools.product(kernels.items(), ("", "+few"), dtypes):
        by_width = table[name + suffix, dtype]
        widths = [] if _as_bfloat16(table, name + suffix, dtype) else _widths(by_width)
        if suffix and by_width == table[name, dtype]:
            continue
        if name in more and by_width == table[more[name] + suffix, dtype]:
            widths = [64] if dtype == torch.bfloat16 else []
        cases = [(width, True) for width in widths] + [(40, False)] * ((name + suffix, dtype) in unaligned)
        for channels, aligned in cases:
            types = dict.fromkeys(("q", "k", "v", "few", "many", "out", "grad_q", "grad_k", "grad_v"), POINTER[dtype])
            types |= dict.fromkeys(("lse", "grad_lse", "offset", "to_lse"), "*fp32") | {"scale": "fp32"}
            types = {name: of for name, of in types.items() if name not in absent}
            yield _tiles(kernel, by_width, channels, types, modes, aligned)


def _combine_cases():
    """Yield the cases of the kernel that combines the splits of lookup attention."""
    from tokred_kernels.backends.triton import configs_attention as configs
    from tokred_kernels.backends.triton.lookup_tiles import combine_kernel

    for (width, config), softmax in zip(configs.COMBINE_CONFIGS.items(), (False, True, False), strict=True):
        types = dict.fromkeys(("parts", "more_parts", "row_parts", "row_out"), "*fp32")
        types |= dict.fromkeys(("out", "more_out"), "*bf16")
        if softmax:
            del types["more_parts"], types["more_out"]
        constants = {"SOFTMAX": softmax, "MORE": not softmax, "CHANNELS": width, "UNROLL": config.unroll}
        constants |= {"BLOCK_CHANNELS": config.block_channels, "BLOCK_ROWS": config.block_rows}
        yield combine_kernel, types, constants, {"num_warps": config.num_warps}, True


def _compile(target, kernel, types, constants, options, aligned):
    """What launching `kernel` would compile: tensors 16-byte aligned, and where `aligned`, strides and sizes too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, attributes = {}, dict(constants), {}
    unspecialized = kernel.do_not_specialize
    for place, name in enumerate(kernel.arg_names):
        if name in types:
            signature[name] = types[name]
        elif name in constants:
            signature[name] = "constexpr"
        elif name in ABSENT:
            signature[name], values[name] = "constexpr", None
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or (aligned and signature[name] == "i32" and name not in unspecialized):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(options))
    ptx = compiled.asm.get("ptx", "")
    return {
        "name": kernel.__name__,
        "types": types,
        "constants": constants,
        "options": options,
        "aligned": aligned,
        "shared": compiled.metadata.shared,
        "spilled": _spilled(compiled),
        "wide_loads": len(re.findall(WIDE_LOAD, ptx)),
        "narrow_loads": len(re.findall(NARROW_LOAD, ptx)),
    }


def _spilled(compiled):
    """What the compiled kernel spills or keeps in local memory: bytes on NVIDIA, registers and bytes on AMD.

    AMD's scalar registers spill into lanes of vector registers, not to memory, and are not counted.
    """
    if "amdgcn" in compiled.asm:
        counts = re.findall(r"(?:vgpr_spill_count|\.private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"])
        assert len(counts) == 2, counts
        return sum(map(int, counts))
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found, usage.stdout + usage.stderr
    return int(found[1]) + int(found[2])


if __name__ == "__main__":
    for case in _all_cases(sys.argv[1]):
        print(json.dumps(_compile(sys.argv[1], *case)), flush=True)
