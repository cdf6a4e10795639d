"""Runs CMake: CMakeLists.txt is the only build description.

    pip install --no-build-isolation .       (or -e . for a build in place)

Environment: CMAKE_ARGS is appended to the configure command (e.g. -DTORCH_SELFATTN_CUDA=OFF),
MAX_JOBS limits the compile jobs, CUDA_HOME says where the CUDA toolkit is.
"""

import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def package_version() -> str:
    text = (ROOT / "CMakeLists.txt").read_text()
    return re.findall(r"project\(TorchSelfAttn VERSION ([\d.]+)", text)[0]


def torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        sys.exit(
            "torch_selfattn is compiled against the installed torch, which is not visible here.\n"
            "Install torch and the build tools (setuptools cmake ninja pybind11), then run\n"
            "    pip install --no-build-isolation .\n"
        )


class CMakeBuild(build_ext):
    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = ROOT / "torch_selfattn" if in_place else Path(self.build_lib) / "torch_selfattn"
        kind = "in-place" if in_place else "wheel"
        python = f"py{sys.version_info.major}.{sys.version_info.minor}"
        build = ROOT / "build" / f"pip-torch-{torch_version()}-{python}-{kind}"
        configure = [
            "cmake",
            "-GNinja",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_INSTALL_PREFIX={package.resolve()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DTORCH_SELFATTN_PYTHON=ON",
            f"-DTORCH_SELFATTN_WHEEL={'OFF' if in_place else 'ON'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        compile_and_install = ["cmake", "--build", str(build), "--target", "install", "-j", jobs]
        # cmake and ninja from the environment, also where it is not activated.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        for command in (configure, compile_and_install):
            subprocess.check_call(command, env={**os.environ, "PATH": path})


setup(
    version=package_version(),
    packages=find_packages(include=["torch_selfattn", "torch_selfattn.*"]),
    package_data={"torch_selfattn": ["py.typed", "*.pyi"]},
    # No sources: this only says that the wheel belongs to one platform and Python.
    ext_modules=[Extension("torch_selfattn._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Torch promises no stable C++ interface between minor versions.
    install_requires=[f"torch=={'.'.join(torch_version().split('.')[:2])}.*"],
)
