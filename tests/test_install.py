# SPDX-License-Identifier: MIT
"""The decisions and messages of setup.py, with scripts in place of nvcc, nvidia-smi and CMake."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Loads setup.py without running it; what follows uses its names from `m`.
LOAD = f"""
import runpy, setuptools, sys
setuptools.setup = lambda **keywords: None
m = runpy.run_path({str(ROOT / "setup.py")!r})
"""
# What each toolkit's nvcc prints for --list-gpu-arch and --list-gpu-code, and the names with a suffix that it accepts.
OLD = "50 52 53 60 61 62 70 72 75 80 86 87 89 90"
TOOLKITS = {
    "11.2": ("35 37 50 52 53 60 61 62 70 72 75 80 86", ""),
    "11.8": (f"35 37 {OLD}", ""),
    "12.4": (OLD, "90a"),
    "12.8": (f"{OLD} 100 101 120", "90a 100a 101a 120a"),
    "13.0": ("75 80 86 87 88 89 90 100 110 103 120 121", "90a 100a 100f 103a 120a 120f 121a"),
}
NVCC = """#!/bin/sh
case "$1" in
--version)
  echo 'nvcc: NVIDIA (R) Cuda compiler driver'
  echo 'Copyright (c) 2005-2025 NVIDIA Corporation'
  echo 'Cuda compilation tools, release {version}, V{version}.61' ;;
--list-gpu-arch) printf 'compute_%s\\n' {numbers} ;;
--list-gpu-code) printf 'sm_%s\\n' {numbers} ;;
--dryrun)
  case ' {names} ' in *" ${{2#-arch=sm_}} "*) exit 0 ;; esac
  echo "nvcc fatal   : Unsupported gpu architecture '${{2#-arch=}}'" >&2
  exit 1 ;;
esac
"""
CMAKE = """#!/bin/sh
echo "$*" >> "$FAKE_LOG"
case "$*" in
*' -n') printf '[1/4] Building CXX object a.o\\n[2/4] Building CXX object b.o\\n[3/4] Building CUDA object c.o\\n' ;;
--build*) printf '[1/4] Building CXX object a.o\\n[4/4] Linking CXX module\\n'; exit ${FAKE_BUILD:-0} ;;
*TOKRED_CUDA=ON*) printf '%s\\n' "$FAKE_CUDA"; test -z "$FAKE_CUDA" ;;
*) printf '%s\\n' "$FAKE_CONFIGURE"; test -z "$FAKE_CONFIGURE" ;;
esac
"""
NO_OPENMP = """-- The CXX compiler identification is AppleClang 15.0.0.15000309
-- Check for working CXX compiler: /usr/bin/c++ - skipped
CMake Error at /usr/share/cmake/Modules/FindPackageHandleStandardArgs.cmake:230 (message):
  Could NOT find OpenMP_CXX (missing: OpenMP_CXX_FLAGS OpenMP_CXX_LIB_NAMES)
Call Stack (most recent call first):
  CMakeLists.txt:22 (find_package)

-- Configuring incomplete, errors occurred!"""
BROKEN_NVCC = """-- The CXX compiler identification is GNU 14.2.0
-- Check for working CUDA compiler: /usr/local/cuda/bin/nvcc - broken
CMake Error at /usr/share/cmake/Modules/CMakeTestCUDACompiler.cmake:102 (message):
  The CUDA compiler

    "/usr/local/cuda/bin/nvcc"

  is not able to compile a simple test program.

    error: -- unsupported GNU version! gcc versions later than 11 are not supported!

-- Configuring incomplete, errors occurred!"""


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A folder of programs that is all of PATH, and the environment of the commands run here."""

    def __init__(self, folder):
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.log = folder / "cmake.log"
        self.environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "CXX")}
        self.environment = {k: v for k, v in self.environment.items() if not k.startswith("TOKRED_")}
        self.environment.update(PATH=str(self.folder), FAKE_LOG=str(self.log), PYTHONPATH=str(folder / "python"))
        (folder / "python").mkdir()
        (folder / "python/pybind11.py").write_text("def get_cmake_dir(): return 'pybind11'\n")

    def nvcc(self, toolkit):
        numbers, suffixed = TOOLKITS[toolkit]
        script(self.folder / "nvcc", NVCC.format(version=toolkit, numbers=numbers, names=f"{numbers} {suffixed}"))

    def nvidia_smi(self, words, status=0):
        script(
            self.folder / "nvidia-smi",
            f"#!/bin/sh\ntest \"$*\" = '--query-gpu=compute_cap --format=csv,noheader' ||"
            f" exit 3\nprintf '%s\\n' '{words}'\nexit {status}\n",
        )

    def build_tools(self):
        script(self.folder / "cmake", CMAKE)
        for name in ("ninja", "c++"):
            script(self.folder / name, "#!/bin/sh\n")

    def run(self, *arguments, cwd=ROOT, **environment):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # without a terminal
        )

    def cuda_options(self, **environment):
        return self.run("-c", LOAD + "print(*m['cuda_options']()[0::2], sep='\\n')", **environment)

    def build(self, **environment):
        folder = self.folder.parent / "build"
        return self.run("setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp", **environment)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def assert_fails(result, words):
    """The last line is one sentence with these words; no traceback is printed."""
    assert result.returncode != 0
    assert words in result.stderr.strip().splitlines()[-1], result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("tokred_kernels: ")
    assert "Traceback" not in result.stderr


ALL = "80;90a-real;100-real;120-real"


@pytest.mark.parametrize(
    "toolkit,gpus,architectures",
    [
        ("11.8", None, "80;90-real"),
        ("12.4", None, "80;90a-real"),
        ("12.8", None, ALL),
        ("13.0", None, ALL),
        ("13.0", "9.0", "90a-real"),
        ("11.8", "9.0", "90"),
        ("13.0", "8.6\n8.6", "86"),
        ("13.0", "9.0\n8.0", "80;90a-real"),
        ("13.0", "7.5\n8.9", "89"),
        ("13.0", "12.1", "121"),
        ("13.0", "[N/A]", ALL),
        # An nvcc that is older than the GPU: PTX of the newest architecture that it knows.
        ("12.4", "12.0", "90"),
        ("12.8", "10.3", "100"),
    ],
)
def test_architectures_are_those_of_the_gpus_or_the_ones_nvcc_knows(machine, toolkit, gpus, architectures):
    machine.nvcc(toolkit)
    if gpus is not None:
        machine.nvidia_smi(gpus)
    result = machine.cuda_options()
    assert result.stdout.splitlines() == ["-DTOKRED_CUDA=ON", f"-DTOKRED_CUDA_ARCHS={architectures}"], result.stderr


@pytest.mark.parametrize(
    "words,status",
    [
        ("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", 9),
        ('Field "compute_cap" is not a valid field to query.', 2),
        ("8.6", 1),
    ],
)
def test_an_nvidia_smi_that_fails_leaves_the_default_list(machine, words, status):
    machine.nvcc("13.0")
    machine.nvidia_smi(words, status)
    assert f"={ALL}\n" in machine.cuda_options().stdout


@pytest.mark.parametrize(
    "requested,architectures",
    [
        ("90a", "90a-real"),
        ("90a;80", "80;90a-real"),
        ("86, 89", "86;89-real"),
        ("100f", "100f-real"),
    ],
)
def test_requested_architectures_are_taken_whatever_gpu_is_present(machine, requested, architectures):
    machine.nvcc("13.0")
    machine.nvidia_smi("7.5")
    assert f"={architectures}\n" in machine.cuda_options(TOKRED_CUDA_ARCHS=requested).stdout


@pytest.mark.parametrize(
    "toolkit,requested,unknown",
    [("12.4", "80;100", "100"), ("11.8", "80;90a", "90a"), ("13.0", "80;70;95", "70, 95"), ("13.0", "sm80", "sm80")],
)
def test_a_requested_architecture_that_cannot_be_built_is_named(machine, toolkit, requested, unknown):
    machine.nvcc(toolkit)
    result = machine.cuda_options(TOKRED_CUDA_ARCHS=requested)
    assert_fails(result, f"cannot build for {unknown}; {machine.folder}/nvcc can for 80, 86, 87")


def no_nvcc(machine):
    return "no nvcc was found"


def old_nvcc(machine):
    machine.nvcc("11.2")
    return "version 11.2, older than 11.8"


def broken_nvcc(machine):
    script(machine.folder / "nvcc", "#!/bin/sh\nexit 127\n")
    return "nvcc --version does not work"


def nvcc_without_lists(machine):
    machine.nvcc("13.0")
    text = (machine.folder / "nvcc").read_text().replace("--list-gpu-code)", "--other)")
    (machine.folder / "nvcc").write_text(text)
    return "cannot compile for sm_80 or newer"


def old_gpu(machine):
    machine.nvcc("13.0")
    machine.nvidia_smi("7.5")
    return "the GPU is sm_75, and the kernels need sm_80 or newer"


@pytest.mark.parametrize("cause", [no_nvcc, old_nvcc, broken_nvcc, nvcc_without_lists, old_gpu])
def test_without_a_usable_nvcc_the_cpu_kernels_are_built_unless_cuda_is_required(machine, cause):
    reason = cause(machine)
    result = machine.cuda_options()
    assert result.stdout.endswith("\n-DTOKRED_CUDA=OFF\n") and result.returncode == 0
    assert result.stdout.startswith("tokred_kernels: building the CPU kernels only: ") and reason in result.stdout
    assert_fails(machine.cuda_options(TOKRED_CUDA="1"), reason)
    assert_fails(machine.cuda_options(TOKRED_CUDA="1"), "TOKRED_CUDA=1, but ")


def test_a_variable_that_is_neither_0_nor_1(machine):
    assert_fails(machine.cuda_options(TOKRED_CUDA="yes"), "TOKRED_CUDA='yes': expected 0, 1 or unset")


def test_a_build_prints_its_plan(machine):
    machine.build_tools()
    machine.nvcc("13.0")
    result = machine.build()
    assert result.returncode == 0, result.stderr
    assert "compiling 2 C++ files and 1 CUDA files for sm_80, sm_90a, sm_100, sm_120 on " in result.stdout
    assert " cores, about 1 min (TOKRED_CUDA=0 " in result.stdout
    assert "[4/4] Linking" in result.stdout
    assert "TOKRED_CUDA=OFF" not in machine.log.read_text()


def test_cmake_that_fails_with_cuda_only(machine):
    machine.build_tools()
    machine.nvcc("13.0")
    result = machine.build(FAKE_CUDA=BROKEN_NVCC)
    assert result.returncode == 0, result.stderr
    assert "building the CPU kernels only, because CMake failed with CUDA:" in result.stdout
    assert "unsupported GNU version" in result.stdout and "compiling 2 C++ files on" in result.stdout
    assert [" -DTOKRED_CUDA=ON " in line for line in machine.log.read_text().splitlines()] == [True, *[False] * 3]
    required = machine.build(FAKE_CUDA=BROKEN_NVCC, TOKRED_CUDA="1")
    assert_fails(required, "nvcc does not work: set CUDAHOSTCXX to a C++ compiler that it supports")
    assert "unsupported GNU version" in required.stderr


@pytest.mark.parametrize(
    "missing,environment,words",
    [
        ("c++", {}, "no C++ compiler was found (c++, g++, clang++): install one, or set TOKRED_NATIVE=0"),
        (None, {"CXX": "icpx -O2"}, "no C++ compiler was found (icpx): install one, or set TOKRED_NATIVE=0"),
        ("cmake", {}, "cmake was not found: pip install cmake, or set TOKRED_NATIVE=0"),
        ("ninja", {}, "ninja was not found: pip install ninja, or set TOKRED_NATIVE=0"),
        (None, {"FAKE_CONFIGURE": NO_OPENMP}, "the C++ compiler has no OpenMP: install it (libgomp for GCC, libomp"),
        (None, {"FAKE_CONFIGURE": "Could NOT find Python (missing: Development.Module)"}, "python3-dev"),
        (None, {"FAKE_CONFIGURE": "CMake 3.24 or higher is required."}, "CMake could not configure the build"),
        (None, {"FAKE_BUILD": "1"}, "the compiler failed, see above: correct the cause, or set TOKRED_NATIVE=0"),
    ],
)
def test_what_is_missing_is_one_sentence(machine, missing, environment, words):
    machine.build_tools()
    if missing is not None:
        (machine.folder / missing).unlink()
    result = machine.build(**environment)
    assert_fails(result, words)
    printed_by_cmake = environment.get("FAKE_CONFIGURE", "").split("\n")
    assert set(printed_by_cmake) <= set(result.stderr.split("\n")) | {""}


def test_pybind11_is_missing(machine):
    machine.build_tools()
    (machine.folder.parent / "python/pybind11.py").write_text("raise ModuleNotFoundError\n")
    assert_fails(machine.build(), "pybind11 was not found: pip install pybind11, or set TOKRED_NATIVE=0")


def test_progress_is_on_the_terminal_while_the_output_is_captured(machine, tmp_path):
    machine.build_tools()
    code = "sys.stdout = sys.stderr = open(sys.argv[1], 'w')\nfrom pathlib import Path\n"
    code += "compile = m['CMakeBuild'].compile\ncompile.__globals__['SECONDS_BETWEEN_REPORTS'] = 0\n"
    code += "compile(None, Path('build'), ['-DTOKRED_CUDA=OFF'])"
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-c", LOAD + code, str(tmp_path / "out")], machine.environment)
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # Linux reports the end of a terminal so
        pass
    assert os.waitpid(child, 0)[1] == 0, shown
    lines = shown.decode().splitlines()
    assert lines[0].startswith("tokred_kernels: compiling 2 C++ files on ")
    assert lines[1:] == ["tokred_kernels: 1 of 4 files built", "tokred_kernels: 4 of 4 files built"]


USE = """
import torch, tokred_kernels as tk
assert "elsewhere" in tk.__file__, tk.__file__
native = tk.backends.native
assert native.MODULE is None and native.CUDA is None
assert "TOKRED_NATIVE=0" in native.FAILURE and "TOKRED_NATIVE=0" in tk.show_config()
assert tk.bipartite_merge(torch.randn(2, 9, 4), 3).x.shape == (2, 6, 4)
"""


def test_install_without_a_compiler(machine, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "tokred_kernels", source / "tokred_kernels")  # with a native module, if there is one
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    elsewhere = tmp_path / "elsewhere"
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    installed = machine.run("-m", "pip", "install", *options, "--target", elsewhere, source, TOKRED_NATIVE="0")
    assert installed.returncode == 0, installed.stderr
    assert not list(elsewhere.rglob("*.so"))
    # -S: an editable install of this repository would provide the native module.
    path = os.pathsep.join([str(elsewhere), *sys.path])
    used = machine.run("-S", "-c", USE, cwd=tmp_path, PYTHONPATH=path)
    assert used.returncode == 0, used.stderr
