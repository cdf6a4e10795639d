"""Builds the C++ program and runs it on words."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch_selfattn

HERE = Path(__file__).resolve().parent


def find_cmake() -> str:
    """cmake beside this Python (pip install cmake) or on the PATH."""
    beside = Path(sys.executable).parent / "cmake"
    cmake = str(beside) if beside.is_file() else shutil.which("cmake")
    if cmake is None:
        raise FileNotFoundError("cmake was not found: pip install cmake")
    return cmake


def build(folder: Path = HERE / "build") -> Path:
    """Configures and builds cpp/ with find_package(TorchSelfAttn); the path of the program."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch_selfattn.cmake_prefix_path}"
    source = ["-S", str(HERE / "cpp"), "-B", str(folder)]
    for step in (
        # --fresh: a cache may remember a package that was built for another torch.
        [find_cmake(), "--fresh", *source, prefix, "-DCMAKE_BUILD_TYPE=Release"],
        [find_cmake(), "--build", str(folder)],
    ):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(step)} failed:\n{done.stdout}{done.stderr}")
    return folder / "pronounce"


def run(program: Path, model: Path, words: Sequence[str]) -> dict[str, list[str]]:
    """The phones that the program prints for each word; words go in by standard input."""
    done = subprocess.run(
        [os.fspath(program), os.fspath(model), "-"],
        input="\n".join(words),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{program} failed with status {done.returncode}:\n{done.stderr}")
    result = {}
    for line in done.stdout.splitlines():
        word, *phones = line.split()
        result[word] = phones
    return result
