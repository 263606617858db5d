# SPDX-License-Identifier: MIT
"""Builds the native module with CMake and ninja; everything else stands in pyproject.toml.

Settings, from the environment:
    TOKRED_CUDA        1 builds the CUDA kernels and fails without nvcc, 0 does not, unset does so when nvcc is found.
    TOKRED_CUDA_ARCHS  architectures, as "80;90a;100;120" (the default).
    TOKRED_BUILD_DIR   the build folder (default: setuptools' own); name one to keep it between builds.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, or of the path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home, "bin", "nvcc") if home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def cuda_options() -> list[str]:
    """CMake's options for the CUDA part; an unmet wish is an error, never a quieter build."""
    wish = os.environ.get("TOKRED_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"TOKRED_CUDA={wish!r}: expected 0, 1 or unset")
    nvcc = find_nvcc()
    if wish == "1" and nvcc is None:
        raise SystemExit("TOKRED_CUDA=1, but no nvcc was found: set CUDA_HOME, or unset TOKRED_CUDA")
    if wish == "0" or nvcc is None:
        print("tokred_kernels: building the CPU kernels only", "(no nvcc)" if nvcc is None else "(TOKRED_CUDA=0)")
        return ["-DTOKRED_CUDA=OFF"]
    options = ["-DTOKRED_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if archs := os.environ.get("TOKRED_CUDA_ARCHS"):
        options.append(f"-DTOKRED_CUDA_ARCHS={archs}")
    return options


class CMakeBuild(build_ext):
    """Runs CMake for the one extension there is."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and put the module where setuptools expects it."""
        import pybind11  # noqa: PLC0415  (a build requirement: not there when only metadata is asked for)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(os.environ.get("TOKRED_BUILD_DIR", self.build_temp)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            # pip's build environment is another one each time: what an earlier build has found in its own is gone.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *cuda_options(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_native"], check=True)


setup(
    license="MIT",
    ext_modules=[Extension("tokred_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
