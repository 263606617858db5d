# SPDX-License-Identifier: MIT
"""Build the native module with CMake and Ninja. All other settings are in pyproject.toml.

Environment variables:
    TOKRED_NATIVE      0 installs without the native module and needs no compiler. The reference and Triton work.
    TOKRED_CUDA        1 requires the CUDA kernels, 0 leaves them out, unset builds them if nvcc is found and works.
    TOKRED_CUDA_ARCHS  CUDA architectures such as "80;90a". Default: those of the GPUs present, else 80;90a;100;120.
    TOKRED_SANITIZE    1 builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
    TOKRED_BUILD_DIR   The build folder. Default: setuptools' own. If it is kept, the next build is incremental.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = (80, 90, 100, 120)
OLDEST_ARCHITECTURE = 80  # the kernels use bfloat16 tensor cores and cp.async
OLDEST_NVCC = (11, 8)  # the first with cudaLaunchKernelEx
WITHOUT_NATIVE = "or set TOKRED_NATIVE=0 to install without the native module"
# What CMake prints if a part of the toolchain is missing, and how to get that part.
MISSING = {
    "Could NOT find OpenMP": "the C++ compiler has no OpenMP: install it (libgomp for GCC, libomp for Clang)",
    "Could NOT find Python": "Python's headers were not found: install them (python3-dev or python3-devel)",
    "The C\\+\\+ compiler\n": "the C++ compiler does not work: repair it or set CXX to another one",
    "The CUDA compiler\n|CMakeCUDACompilerId": "nvcc does not work: set CUDAHOSTCXX to a C++ compiler that it supports",
}
# Measured on one core: seconds per C++ file, per CUDA file, and per CUDA file and architecture.
CPP_SECONDS, CUDA_SECONDS, ARCHITECTURE_SECONDS = 2.0, 1.0, 4.5
SECONDS_BETWEEN_REPORTS = 10


class CudaUnavailableError(Exception):
    """The CUDA kernels cannot be built here; the message is the reason."""


def failure(message: str) -> SystemExit:
    """Return the exception that ends the build with one sentence and no traceback."""
    return SystemExit(f"tokred_kernels: {message}")


def say(message: str) -> None:
    """Print a message; pip captures the output unless -v is given, so also write it to the terminal if there is one."""
    line = f"tokred_kernels: {message}\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:  # OSError: no terminal
            terminal.write(line)


def flag(name: str) -> str:
    """Return the environment variable `name`: "0", "1" or "" if unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise failure(f"{name}={value!r}: expected 0, 1 or unset")
    return value


def output(*command: str) -> str:
    """Return what a command prints, or "" if it does not run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def find_nvcc() -> str:
    """Return the nvcc of CUDA_HOME or CUDA_PATH, else the one on the path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home, "bin", "nvcc") if home else None
    nvcc = str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")
    if nvcc is None:
        raise CudaUnavailableError("no nvcc was found on the path or in CUDA_HOME")
    version = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
    if version is None:
        raise CudaUnavailableError(f"{nvcc} --version does not work")
    if tuple(map(int, version.groups())) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise CudaUnavailableError(f"{nvcc} is version {'.'.join(version.groups())}, older than {oldest}")
    return nvcc


class Nvcc:
    """The architectures that an nvcc can compile for."""

    def __init__(self, path: str) -> None:
        self.path = path
        listed = [
            set(re.findall(rf"^{prefix}_(\d+)\s*$", output(path, option), re.MULTILINE))
            for prefix, option in (("compute", "--list-gpu-arch"), ("sm", "--list-gpu-code"))
        ]
        self.numbers = sorted(int(n) for n in set.intersection(*listed) if int(n) >= OLDEST_ARCHITECTURE)
        if not self.numbers:
            raise CudaUnavailableError(f"{path} cannot compile for sm_{OLDEST_ARCHITECTURE} or newer")

    def knows(self, architecture: str) -> bool:
        """Return True if nvcc can compile for `architecture`, such as "80" or "90a"; its lists omit suffixes."""
        if not re.fullmatch(r"\d+[af]?", architecture) or int(architecture.rstrip("af")) not in self.numbers:
            return False
        if architecture.isdigit():
            return True
        command = [self.path, "--dryrun", f"-arch=sm_{architecture}", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def choose(self) -> list[str]:
        """Return the architectures to build for: those of TOKRED_CUDA_ARCHS, of the GPUs present, or the default."""
        requested = re.findall(r"[^;,\s]+", os.environ.get("TOKRED_CUDA_ARCHS", ""))
        if unknown := [name for name in requested if not self.knows(name)]:
            possible = ", ".join(map(str, self.numbers))
            raise failure(f"TOKRED_CUDA_ARCHS: cannot build for {', '.join(unknown)}; {self.path} can for {possible}")
        if requested:
            return requested
        present = gpu_capabilities()
        usable = [capability for capability in present if capability >= OLDEST_ARCHITECTURE]
        if present and not usable:
            names = ", ".join(f"sm_{c}" for c in present)
            raise CudaUnavailableError(f"the GPU is {names}, and the kernels need sm_{OLDEST_ARCHITECTURE} or newer")
        if usable:
            return [self._nearest(capability) for capability in usable]
        return [self._name(number) for number in ARCHITECTURES if number in self.numbers]

    def _name(self, number: int) -> str:
        return "90a" if number == 90 and self.knows("90a") else str(number)

    def _nearest(self, capability: int) -> str:
        """Return the architecture of a GPU, or a lower one if nvcc is too old; the driver then compiles its PTX."""
        if capability in self.numbers:
            return self._name(capability)
        lower = [number for number in ARCHITECTURES if number in self.numbers and number < capability]
        if not lower:
            raise CudaUnavailableError(f"{self.path} cannot compile for the GPU, sm_{capability}")
        return str(lower[-1])


def gpu_capabilities() -> list[int]:
    """Return the compute capabilities of the GPUs present, such as [80, 90]; an empty list without a driver."""
    lines = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    return sorted({int(line.replace(".", "")) for line in lines if re.fullmatch(r"\d+\.\d", line)})


def cmake_architectures(names: list[str]) -> str:
    """Return CMake's list. The lowest architecture also gets PTX, which the driver can compile for newer GPUs.

    The PTX of an architecture with a suffix ("90a") runs on no other GPU and is left out.
    """
    names = sorted(dict.fromkeys(names), key=lambda name: int(name.rstrip("af")))
    with_ptx = next((name for name in names if name.isdigit()), None)
    return ";".join(name if name == with_ptx else f"{name}-real" for name in names)


def cuda_options() -> list[str]:
    """Return CMake's options for the CUDA part. Raise SystemExit if TOKRED_CUDA=1 and CUDA cannot be built."""
    required = flag("TOKRED_CUDA")
    if required == "0":
        say("building the CPU kernels only (TOKRED_CUDA=0)")
        return ["-DTOKRED_CUDA=OFF"]
    try:
        nvcc = Nvcc(find_nvcc())
        architectures = cmake_architectures(nvcc.choose())
    except CudaUnavailableError as reason:
        if required:
            raise failure(f"TOKRED_CUDA=1, but {reason}") from None
        say(f"building the CPU kernels only: {reason}")
        return ["-DTOKRED_CUDA=OFF"]
    return ["-DTOKRED_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc.path}", f"-DTOKRED_CUDA_ARCHS={architectures}"]


def check_tools() -> None:
    """Raise SystemExit if a program that the build needs is missing."""
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compiler)):
        raise failure(f"no C++ compiler was found ({', '.join(compiler)}): install one, {WITHOUT_NATIVE}")
    for program in ("cmake", "ninja"):
        if shutil.which(program) is None:
            raise failure(f"{program} was not found: pip install {program}, {WITHOUT_NATIVE}")


def last_lines(text: str, count: int = 15) -> str:
    """Return the last lines that are not empty."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


class CMakeBuild(build_ext):
    """Build the one extension with CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and put the module where setuptools expects it."""
        check_tools()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(os.environ.get("TOKRED_BUILD_DIR", self.build_temp)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cuda = cuda_options()
        configured = self.configure(build, target.parent, cuda)
        if configured.returncode and "-DTOKRED_CUDA=ON" in cuda and not flag("TOKRED_CUDA"):
            say("building the CPU kernels only, because CMake failed with CUDA:\n" + last_lines(configured.stdout))
            cuda = ["-DTOKRED_CUDA=OFF"]
            configured = self.configure(build, target.parent, cuda)
        if configured.returncode:
            found = (reason for pattern, reason in MISSING.items() if re.search(pattern, configured.stdout))
            reason = next(found, "CMake could not configure the build: repair what it names")
            print(last_lines(configured.stdout), file=sys.stderr)
            raise failure(f"{reason}, {WITHOUT_NATIVE}")
        print(configured.stdout)
        self.compile(build, cuda)

    def configure(self, build: Path, output_folder: Path, cuda: list[str]) -> subprocess.CompletedProcess[str]:
        """Run CMake; the result holds its output and its exit status."""
        try:
            import pybind11  # noqa: PLC0415  (a build requirement: not installed when only metadata is asked for)
        except ModuleNotFoundError:
            raise failure(f"pybind11 was not found: pip install pybind11, {WITHOUT_NATIVE}") from None
        command = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            # pip uses a new build environment each time, so a path in a kept build folder may no longer exist.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_folder}",
            f"-DTOKRED_SANITIZE={'ON' if flag('TOKRED_SANITIZE') == '1' else 'OFF'}",
            *cuda,
        ]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)

    def compile(self, build: Path, cuda: list[str]) -> None:
        """Build the module, with its progress on the terminal."""
        command = ["cmake", "--build", str(build), "--target", "_native"]
        say(plan(output(*command, "--", "-n"), cuda))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        reported = time.monotonic()
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            step = re.match(r"\[(\d+)/(\d+)\]", line)
            if step and time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                say(f"{step[1]} of {step[2]} files built")
        if process.wait():
            without = "or set TOKRED_CUDA=0 to build the CPU kernels only" if len(cuda) > 1 else WITHOUT_NATIVE
            raise failure(f"the compiler failed, see above: correct the cause, {without}")


def plan(dry_run: str, cuda: list[str]) -> str:
    """Return one sentence about a build: its files, architectures and time. `dry_run` is the output of `ninja -n`."""
    cuda_files, cpp_files = len(re.findall(r"Building CUDA", dry_run)), len(re.findall(r"Building CXX", dry_run))
    names = cuda[-1].partition("=")[2].replace("-real", "").split(";") if len(cuda) > 1 else []
    cores = os.cpu_count() or 1
    seconds = cpp_files * CPP_SECONDS + cuda_files * (CUDA_SECONDS + ARCHITECTURE_SECONDS * len(names))
    minutes = max(1, round(seconds / cores / 60))
    files = f"{cpp_files} C++ files" + (f" and {cuda_files} CUDA files for sm_{', sm_'.join(names)}" if names else "")
    expected = f"compiling {files} on {cores} cores, about {minutes} min"
    return expected + (" (TOKRED_CUDA=0 builds the CPU kernels only)" if names else "")


setup(
    license="MIT",
    ext_modules=[] if flag("TOKRED_NATIVE") == "0" else [Extension("tokred_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
