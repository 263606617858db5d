# SPDX-License-Identifier: MIT
"""Files that a user keeps: a failed write leaves the old content, and a reader refuses every wrong content."""

import ast
import contextlib
import copy
import errno
import json
import math
import os
import stat
import threading
from pathlib import Path

import pytest

from benchmarks.harness import records
from tokred_kernels.backends.selfcheck import cache
from tokred_kernels.files import replace_json, replace_text
from tokred_kernels.methods.algm import Similarity, Thresholds
from tokred_kernels.methods.diffrate.counts import read_kept
from tokred_kernels.methods.diffrate.search import FoundRates

ROOT = Path(__file__).parent.parent
THRESHOLDS = Thresholds({1: Similarity(0.25, 0.5, 6), 3: Similarity(-0.5, 0.25, 9)}, (2, 2))
RATES = FoundRates([17, 9], [17, 5], 0.5, 0.25)
PLACE = ("sm_90", "keys", "float16", 64)
CONFIG = {"block_queries": 64, "block_keys": 32, "num_warps": 4, "num_stages": 3, "enough": 1}


def configs_tuned():
    pytest.importorskip("triton")
    from tokred_kernels.backends.triton import configs_tuned

    return configs_tuned


def write_configs(path):
    tuned = configs_tuned()
    config = tuned.AttentionConfig(block_channels=64, **CONFIG)
    tuned.write(path, {tuned.Place(*PLACE): config})


def read_configs(path):
    return configs_tuned().read(path)


def read_counts(path):
    return read_kept("methods.DiffRate", path)


def write_verdicts(path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TOKRED_CACHE_DIR", str(path.parent))
        patched.setattr(cache, "key", lambda of: path.stem)
        cache.write({}, {"triton": {}})


WRITERS = {
    "thresholds": THRESHOLDS.save,
    "rates": RATES.save,
    "configs": write_configs,
    "verdicts": write_verdicts,
    "results": lambda path: records.write_json(path, {"rows": list(range(20))}),
    "text": lambda path: replace_text(path, "new " * 20),
    "long text": lambda path: replace_text(path, "new " * 20000),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


# --- writing


@contextlib.contextmanager
def no_file_above(size):
    """Let the operating system cut every write at `size` bytes of a file."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def failing(name):
    """Let a function of `os` fail as on a full disk."""

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, name, fail)
        yield


DISKS = {
    "cut in the middle": lambda: no_file_above(10),
    "full at fsync": lambda: failing("fsync"),
    "full at replace": lambda: failing("replace"),
}
disks = pytest.mark.parametrize("disk", DISKS.values(), ids=DISKS)


@disks
@writers
def test_a_full_disk_leaves_the_old_file(write, disk, tmp_path):
    path = tmp_path / "kept.json"
    path.write_bytes(b"old\r\n\0")
    path.chmod(0o640)
    with pytest.raises((OSError, cache.Unusable), match=r"No space left|too large"), disk():
        write(path)
    assert path.read_bytes() == b"old\r\n\0"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["kept.json"]


@disks
@writers
def test_a_full_disk_leaves_no_new_file(write, disk, tmp_path):
    with pytest.raises((OSError, cache.Unusable), match=r"No space left|too large"), disk():
        write(tmp_path / "new.json")
    assert os.listdir(tmp_path) == []


@writers
def test_the_old_file_is_replaced_whole(write, tmp_path):
    path, other = tmp_path / "kept.json", tmp_path / "other.json"
    path.write_text("old " * 100000)
    write(path)
    write(other)
    assert path.read_bytes() == other.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["kept.json", "other.json"]


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "kept").write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_text(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "old"
    assert os.listdir(tmp_path) == ["kept"]


def test_readers_see_the_old_text_or_the_new(tmp_path):
    path, texts = tmp_path / "kept", ["a" * 100000, "b" * 50000]
    replace_text(path, texts[0])
    writer = threading.Thread(target=lambda: [replace_text(path, text) for text in texts * 20])
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(path.read_text())
    writer.join()
    assert seen <= set(texts)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_open_or_of_the_old_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        (tmp_path / "opened").write_text("")
        replace_text(tmp_path / "new", "")
        (tmp_path / "old").write_text("")
        (tmp_path / "old").chmod(0o604)
        replace_text(tmp_path / "old", "")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "opened").stat().st_mode
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o604


@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_stays_and_its_target_is_replaced(dangling, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if not dangling:
        (folder / "target").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere/target")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (folder / "target").read_text() == "new"
    assert not (folder / "target").is_symlink()
    assert os.listdir(folder) == ["target"]


def test_a_pipe_is_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    replace_text(tmp_path / "pipe", "new")
    reader.join()
    assert found == ["new"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name, error in (("", IsADirectoryError), ("no/such.json", FileNotFoundError), ("loop", OSError)):
        with pytest.raises(error) as caught:
            replace_text(tmp_path / name, "new")
        assert str(tmp_path / name) in str(caught.value) or "such.json" in str(caught.value)
    assert os.listdir(tmp_path) == ["loop"]


def test_a_name_as_long_as_the_file_system_takes(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        replace_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(value, tmp_path):
    (tmp_path / "kept").write_text("old")
    for write in (RATES._replace(gflops=value).save, lambda path: replace_json(path, [value])):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "old"


def test_no_other_code_writes_a_file_in_place():
    allowed = {"benchmarks/harness/memory.py", "tokred_kernels/files.py", "tokred_kernels/backends/selfcheck/worker.py"}
    for path in [
        file
        for folder in ("tokred_kernels", "benchmarks", "examples", "experiments")
        for file in ROOT.glob(f"{folder}/**/*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or path.relative_to(ROOT).as_posix() in allowed:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            values = [getattr(part, "value", None) for part in (*node.args, *(key.value for key in node.keywords))]
            opens = name in ("open", "fdopen") and any(isinstance(v, str) and set(v) & set("wxa+") for v in values)
            assert not opens and name not in ("write_text", "write_bytes"), f"{path}:{node.lineno} calls {name}"


# --- reading

CONTENTS = {
    "thresholds": (Thresholds.load, THRESHOLDS.save),
    "rates": (read_counts, RATES.save),
    "configs": (read_configs, write_configs),
}
contents = pytest.mark.parametrize(("load", "save"), CONTENTS.values(), ids=CONTENTS)
NEVER = (10**400, -(10**400), math.inf, -math.inf, math.nan, True, "text", {}, [[]], [None], {"a": 1})
# Values that are wrong in other fields but right in these.
LEGAL = {"window": (None,), "mean": (-1,), "configs": ([],)}
OPTIONAL = ("gflops", "target_gflops")


def places(content, way=()):
    """Yield the keys that lead to each value in `content`, first those to `content` itself."""
    yield way
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*way, key))


def at(content, way):
    for key in way:
        content = content[key]
    return content


def put(content, way, value):
    if not way:
        return value
    content = copy.deepcopy(content)
    at(content, way[:-1])[way[-1]] = value
    return content


def mutations(content):
    """Yield pairs of fields and a content that is wrong in one of them; the message must name one."""
    for way in places(content):
        fields = [key for key in way if isinstance(key, str)][-1:]
        for value in (*NEVER, None, -1, []):
            if value not in [legal for field in fields for legal in LEGAL.get(field, ())]:
                yield fields, put(content, way, value)
        found = at(content, way)
        if isinstance(found, dict):
            for name in found:
                less = {key: value for key, value in found.items() if key != name}
                if name not in OPTIONAL and less != {} and not name.isdecimal():
                    yield [name], put(content, way, less)
            yield ["surplus"], put(content, way, {**found, "surplus": 1})
        if isinstance(found, list) and found:
            if found[:-1] not in LEGAL.get(way[-1], ()):
                yield fields, put(content, way, found[:-1])
            yield fields, put(content, way, [*found, *found[-1:]])


@contents
def test_every_field_that_is_wrong_is_refused_by_name(load, save, tmp_path):
    path = tmp_path / "kept.json"
    save(path)
    load(path)
    content = json.loads(path.read_text())
    number = 0
    for fields, wrong in mutations(content):
        path.write_text(json.dumps(wrong).replace("Infinity", "1e999"))
        with pytest.raises((ValueError, TypeError)) as caught:
            pytest.fail(f"loaded {wrong} as {load(path)}")
        message = str(caught.value)
        assert str(path) in message
        assert not fields or any(field in message for field in fields), (message, fields)
        assert message.startswith("tokred_kernels") and "\n" not in message and len(message) < 600
        number += 1
    assert number > 100


@contents
@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"not JSON", b"[" * 100000, b'"' + b"\xff\xfe" * 9, b"{}", b"[]", b"null", b"1", b"9" * 5000],
    ids=lambda text: repr(text[:9]),
)
def test_what_is_not_the_json_of_the_kind_is_refused(load, save, text, tmp_path):
    path = tmp_path / "kept.json"
    path.write_bytes(text)
    with pytest.raises((ValueError, TypeError)) as caught:
        load(path)
    assert str(path) in str(caught.value) and str(caught.value).startswith("tokred_kernels")


@contents
def test_a_name_that_is_there_twice_is_refused(load, save, tmp_path):
    path = tmp_path / "kept.json"
    save(path)
    name = next(iter(json.loads(path.read_text())))
    path.write_text(path.read_text().replace("{", f'{{"{name}": 1, ', 1))
    with pytest.raises(ValueError, match=f"must be JSON .'{name}' is there twice") as caught:
        load(path)
    assert str(path) in str(caught.value)


@contents
def test_a_folder_and_no_file(load, save, tmp_path):
    with pytest.raises(OSError, match=r"directory|Permission") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        load(tmp_path / "nothing.json")
