"""Builds and runs C++ projects that know the package by its installed files only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch_selfattn

FOREIGN = Path(__file__).resolve().parents[1] / "foreign"


def run(*command, folder=None, **environment):
    """Runs a command as a shell would that knows neither Python's environment nor its libraries."""
    drop = ("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "CMAKE_PREFIX_PATH")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    if shutil.which("ccache"):
        env |= {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CCACHE_NOHASHDIR": "1"}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=env | environment,
        cwd=folder,
    )


def cmake():
    return shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def configure(build, *options, source=FOREIGN, **environment):
    return run(cmake(), "-GNinja", "-S", source, "-B", build, *options, **environment)


def configure_with_package(build, *options, source=FOREIGN):
    """What it printed, of a project that is given the package's folder."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch_selfattn.cmake_prefix_path}"
    configured = configure(build, prefix, *options, source=source)
    assert configured.returncode == 0, configured.stdout + configured.stderr
    return configured.stdout


def build_and_run(build, *arguments, program="foreign"):
    """What the program printed, in the build folder."""
    built = run(cmake(), "--build", build, "--target", program)
    assert built.returncode == 0, built.stdout + built.stderr
    result = run(build / program, *arguments, folder=build)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
