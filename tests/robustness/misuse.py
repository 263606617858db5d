# SPDX-License-Identifier: MIT
"""Call every public function and every registered op with bad arguments, each batch of cases in a child process.

python tests/robustness/misuse.py          one bad argument at a time
python tests/robustness/misuse.py --all    also all pairs of bad arguments of an op or function, some hours

The first is what tests/robustness/test_misuse.py runs.

The cases are generated: arguments from signatures and schemas, bad values from the kind of a valid one, and valid calls
of registered ops by recording those that valid public calls make. A case passes if the call raises an ordinary
exception whose message names the argument, or returns the right value: a public function what the reference returns,
a registered op what it returns for contiguous plain tensors of the same values. A child prints each case before it runs
it, so that a crash or a hang names its case.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import os
import resource
import subprocess
import sys
import threading
import warnings
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from robustness.misuse_calls import op_calls, stateful_calls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokred_kernels as tk

HANG_SECONDS = 60
MEMORY = 12 << 30  # bytes of address space of a child
VAST = 10**5000  # Python does not print it
UNPRINTED = ("torch.ops", "patch", "set_keep_rate")  # whose own error cannot be printed either
WORDS = {"name": "backend", "labels": "Target", "granularity": "target_gflops"}  # what messages name instead
ORDINARY = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)
ROOT = Path(__file__).parents[2]
# Torch's own attention on a CPU can return 0 for a query that holds NaN, as the docstring of token_attention says. The
# lse of a row with an infinite score is NaN or infinite: its result is NaN in either case.
DOCUMENTED = {"token_attention(q=NaN)", "lookup_gather(q=infinite)", "lookup_gather(k=infinite)"}


class Listening(Tensor):
    """A wrapper subclass that has no memory, such as DTensor."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner if isinstance(value, Listening) else value

        return function(*torch.utils._pytree.tree_map(unwrap, args), **(kwargs or {}))


# Public names without arguments, and records and modules whose members are called.
NOT_CALLED = {"show_config", "__version__", "flops", "methods", "nn", "viz"}
NOT_CALLED |= {"FoundRates", "ImportanceMatch", "LookupLogits", "MergeOutput"}


def public_cases(full):
    """Cases of public functions: a label, the names of the bad arguments, the function, and its arguments."""
    for name, (function, given) in {**op_calls(), **stateful_calls()}.items():
        parameters = inspect.signature(function).parameters
        arguments = {
            key: given.get(key, None if parameter.default is parameter.empty else parameter.default)
            for key, parameter in parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        }
        yield from changed(name, arguments, full, lambda values, function=function: function(**values))


def op_cases(full):
    """Cases of registered ops, from the calls that valid public calls make of them."""
    for name, calls in recorded_calls().items():
        overload = getattr(torch.ops.tokred, name).default
        names = [argument.name for argument in overload._schema.arguments]
        for number, values in enumerate(calls):
            label = f"torch.ops.tokred.{name}" + (f"#{number}" if number else "")
            arguments = dict(zip(names, values, strict=True))
            yield from changed(label, arguments, full, lambda values, overload=overload: overload(*values.values()))


def changed(name, arguments, full, call):
    """The cases in which one argument is bad, and, if `full`, those in which two are."""
    bad = {key: list(bad_values(value)) for key, value in arguments.items()}
    for key, values in bad.items():
        for label, value in values:
            if not (name.startswith(UNPRINTED) and value is VAST):
                yield f"{name}({key}={label})", (key,), call, {**arguments, key: value}
    for one, other in itertools.combinations(bad, 2) if full else ():
        for (label, value), (also, second) in itertools.product(bad[one], bad[other]):
            yield f"{name}({one}={label}, {other}={also})", (one, other), call, {**arguments, one: value, other: second}


class Recorder(TorchDispatchMode):
    """Keeps the arguments of the registered ops that are called: the first call with each set of optional arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tokred":
            of_op = self.calls.setdefault(function._opname, {})
            of_op.setdefault(tuple(type(value).__name__ for value in args), args)
        return function(*args, **(kwargs or {}))


def recorded_calls():
    """The arguments with which valid public calls, and their gradients, call each registered op."""
    calls = op_calls()
    x, packed = calls["merge"][1]["x"], tk.Packing.of((5, 7), torch.device("cpu"))
    attention = calls["token_attention"][1]
    rows = {name: torch.randn(12, 3, 8) for name in "qkv"} | {"size": torch.rand(12) + 0.5, "packed": packed}
    with Recorder() as recorder, tk.use_backend("cpu"):
        for name, (function, given) in calls.items():
            if name in tk.__all__ and name != "use_backend":
                function(**given)
        tk.adaptive_bipartite_match(x.flatten(0, 1)[:12], threshold=0.1, count="image", packed=packed)
        tk.adaptive_bipartite_match(x, layer_index=2, count="image")
        tk.window_match(**calls["window_match"][1] | {"count": "image"})
        token_map = calls["merge"][1]["token_map"]
        tk.TokenMap(token_map.dest, token_map.num_out).then(tk.TokenMap.from_dest(torch.arange(16).view(2, 8) % 5))
        tk.TokenMap(token_map.dest, token_map.num_out).views()
        for given in (attention | {"importance": "mean"}, rows | {"importance": "class"}):
            trained = {key: train(value) for key, value in given.items()}
            out, worth = tk.token_attention(**trained)
            (out.sum() + worth.sum()).backward()
        for name in ("merge", "merge_wavg", "unmerge", "lookup_gather", "lookup_scatter"):
            function, given = calls[name]
            out = function(**{key: train(value) for key, value in given.items()})
            sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
        tk.merge(train(x), token_map, reduce="amax").sum().backward()
    return {name: [tuple(map(detached, values)) for values in of_op.values()] for name, of_op in recorder.calls.items()}


def train(value):
    return value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def detached(value):
    return value.detach() if isinstance(value, Tensor) else value


def bad_tensors(good):
    """Tensors that are wrong, or unusual, in the place of a good one."""
    floating = good.is_floating_point()
    yield "an int", 3
    yield "a list", good.flatten()[:4].tolist()
    yield "a NumPy array", good.numpy()
    yield "None", None
    yield "meta", good.to("meta")
    yield "sparse", good.to_sparse()
    yield "another dtype", good.long() if floating else good.float()
    yield "complex", good.to(torch.complex64)
    yield "bool", good.bool()
    yield "one dimension less", good[0]
    yield "one dimension more", good[None]
    yield "one row less", good[..., :-1].contiguous()
    yield "no rows", good[:0]
    yield "a subclass", Listening(good.clone())
    yield "strided", good.repeat_interleave(2, -1)[..., ::2]
    yield "transposed", good.transpose(0, -1).contiguous().transpose(0, -1)
    yield "expanded", good[:1].expand_as(good)
    if not floating:
        for low in (-(2**31), -2, 2**31 - 1, 100):
            yield f"an entry of {low}", _first(good, low)
        return
    yield "mkldnn", good.float().to_mkldnn()
    yield "nested", torch.nested.nested_tensor(list(good))
    yield "float64", good.double()
    yield "float16", good.half()
    yield "NaN", _first(good, torch.nan)
    yield "infinite", _first(good, torch.inf)
    yield "negated", torch.complex(good, -good).conj().imag
    yield "zeros without memory", torch._efficientzerotensor(good.shape)
    yield "huge and expanded", good.flatten()[:1].expand(2**20, 2**12, *good.shape[2:])


def _first(good, value):
    changed = good.clone(memory_format=torch.contiguous_format)
    changed.view(-1)[:1] = value
    return changed


def bad_values(good):
    """Bad or unusual values in the place of a good one: labels and values."""
    if isinstance(good, Tensor):
        yield from bad_tensors(good)
        return
    yield "a string", "nonsense"
    yield "an object", object()
    yield "a list", [1, 2]
    yield "a tensor", torch.tensor([1.0, 2.0])
    yield "a dict", {}
    yield "NaN", float("nan")
    yield "inf", float("inf")
    yield "-1", -1
    yield "-4000", -4000
    yield "2**31", 2**31
    yield "2**63", 2**63
    yield "10**400", 10**400
    yield "10**5000", VAST
    yield "1000", 1000
    yield "0", 0
    yield "1.5", 1.5
    yield "True", True
    yield "None", None
    yield "a NumPy int", np.int8(2)
    yield "a NumPy float", np.float32(0.25)
    yield "a NumPy array", np.arange(2)
    yield "a fraction", Fraction(1, 3)
    if isinstance(good, tuple):
        yield "a short tuple", good[:1]
        yield "a long tuple", (*good, 1, 1)
        yield "a negative part", (-1, *good[1:])
        yield "a zero part", (0, *good[1:])
        yield "a float part", (2.0, *good[1:])
        yield "a huge part", (2**31, *good[1:])
        yield "huge parts", (2**30,) * len(good)
        yield "a string part", ("2", *good[1:])


def plain(value):
    """The same values in a contiguous plain tensor, if there is one."""
    if isinstance(value, Listening):
        return value.inner
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested and not value.is_meta:
        return torch.zeros(value.shape) if value._is_zerotensor() else value.resolve_neg().contiguous()
    return value


def same(one, other):
    """Return whether two results are equal up to rounding."""
    one, other = (value.inner if isinstance(value, Listening) else value for value in (one, other))
    if isinstance(one, tk.TokenMap):
        return isinstance(other, tk.TokenMap) and one.num_out == other.num_out and same(one.dest, other.dest)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        if one.is_meta:
            return one.shape == other.shape and one.dtype == other.dtype
        tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(one.dtype, 1e-4)
        return one.dtype == other.dtype and torch.allclose(
            one.double(), other.double(), tolerance, tolerance, equal_nan=True
        )
    return isinstance(one, (int, float, str)) is False or one == other


def verdict(label, names, call, values):
    """What is wrong with a case, or None."""
    torch.manual_seed(0)
    try:
        result = call(values)
    except ORDINARY as error:
        message = str(error)
        # An op's arguments must fit each other: the message can name the other one, and torch's own names the op.
        op = label.startswith("torch.ops") and ("tokred::" in message or message.startswith("tokred_kernels."))
        # A module leaves the dtype and the device of its input to torch's modules, which raise a RuntimeError.
        op = op or (".forward(" in label and type(error) is RuntimeError)
        if op or "torch.nn.modules.linear.Identity is not supported" in message:
            return None
        if any(name in message or WORDS.get(name, name) in message for name in names):
            return None
        return f"{type(error).__name__} names no argument: {message[:300]}"
    except FileNotFoundError:
        return None if "kept=a string" in label else "looks for a file"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    if label in DOCUMENTED or label.startswith(("use_backend", "LookupViT", "TokenPredictor", "CompressionRate")):
        return None
    torch.manual_seed(0)
    if label.startswith("torch.ops"):
        expected = call({name: plain(value) for name, value in values.items()})
    else:
        generator = values.get("generator")
        if isinstance(generator, torch.Generator):
            return None  # its state has moved on
        try:
            with tk.use_backend("reference"):
                expected = call(values)
        except ORDINARY as error:
            return f"returns a value where the reference raises {type(error).__name__}: {str(error)[:200]}"
    return None if same(result, expected) else "returns another value than the reference"


def all_cases(full):
    yield from public_cases(full)
    yield from op_cases(full)


def run_child(first, full):
    """Run the cases from number `first` on."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # so that an absurd allocation raises, and its case is a fault
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for number, (label, *case) in enumerate(all_cases(full)):
        if number >= first:
            print(f"{number}\t{label}", flush=True)
            fault = verdict(label, *case)
            if fault is not None:
                print(f"!\t{label}\t{' '.join(fault.split())}", flush=True)
    print("done", flush=True)


def run(full=False):
    """Run all cases in child processes; return their number and the faults."""
    first, faults = 0, []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
    }
    while True:
        command = [sys.executable, __file__, "--child", str(first), *(["--all"] if full else [])]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        label, started = "the start", True
        timer = Watch(child)
        for line in child.stdout:
            timer.tick()
            kind, *rest = line.rstrip("\n").split("\t")
            if kind == "done":
                child.wait()
                timer.stop()
                return first, faults
            if kind == "!":
                faults.append(f"{rest[0]}: {rest[1]}")
            else:
                first, label, started = int(kind) + 1, rest[0], False
        timer.stop()
        code, last = child.wait(), child.stderr.read()[-300:]
        faults.append(f"{label}: {'hung' if timer.fired else f'died with {code}'} {last}")
        if started:
            return first, faults


class Watch:
    """Ends a child that prints nothing for a while."""

    def __init__(self, child):
        self.child, self.fired, self.timer = child, False, None
        self.tick()

    def tick(self):
        self.stop()
        self.timer = threading.Timer(HANG_SECONDS, self.fire)
        self.timer.daemon = True
        self.timer.start()

    def fire(self):
        self.fired = True
        self.child.kill()

    def stop(self):
        if self.timer is not None:
            self.timer.cancel()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="also all pairs of bad arguments")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        run_child(arguments.child, arguments.all)
        return
    number, faults = run(arguments.all)
    print(*faults, f"{number} cases, {len(faults)} faults", sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
