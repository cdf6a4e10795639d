"""The installed files as a C++ project sees them: find_package, link, train, run without Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_selfattn

FOREIGN = Path(__file__).resolve().parents[1] / "foreign"
PACKAGE = Path(torch_selfattn.__file__).parent

pytestmark = pytest.mark.slow


def run(*command, **environment):
    """Runs a command as a shell would that knows neither Python's environment nor its libraries."""
    drop = ("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "CMAKE_PREFIX_PATH")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    if shutil.which("ccache"):
        env |= {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CCACHE_NOHASHDIR": "1"}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=env | environment
    )


def configure(build, *options, source=FOREIGN, **environment):
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return run(cmake, "-GNinja", "-S", source, "-B", build, *options, **environment)


def build_and_run(build):
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    built = run(cmake, "--build", build)
    assert built.returncode == 0, built.stdout + built.stderr
    return run(build / "foreign")


def test_foreign_project_builds_trains_and_runs(tmp_path):
    # Nothing but the package's folder is given, and no interpreter that could tell where torch is.
    configured = configure(
        tmp_path, f"-DCMAKE_PREFIX_PATH={torch_selfattn.cmake_prefix_path}",
        "-DPython_EXECUTABLE=/nonexistent",
    )  # fmt: skip
    assert configured.returncode == 0, configured.stdout + configured.stderr
    assert f"Found torch {torch.__version__.split('+')[0]}" in configured.stdout
    result = build_and_run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"version {torch_selfattn.__version__} " in result.stdout


@pytest.mark.parametrize("order", ["BEFORE", "AFTER"])
def test_coexists_with_the_projects_own_find_package_torch(tmp_path, order):
    prefixes = f"{torch_selfattn.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    configured = configure(
        tmp_path,
        f"-DCMAKE_PREFIX_PATH={prefixes}",
        f"-DFOREIGN_TORCH={order}",
        # What Torch's config wants of whoever uses a CUDA build of it.
        f"-DCUDA_TOOLKIT_ROOT_DIR={toolkit}",
        "-DCUDA_NVRTC_LIB=",
        "-DTORCH_CUDA_ARCH_LIST=9.0",
    )
    if torch.version.cuda and "cannot find the CUDA" in configured.stderr:
        pytest.skip("Torch's own CMake config needs a CUDA toolkit")
    assert configured.returncode == 0, configured.stdout + configured.stderr
    result = build_and_run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def fake_torch(folder, version):
    """A folder laid out as torch, of another version."""
    major, minor, patch = version.split(".")
    header = folder / "include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n"
        f"#define TORCH_VERSION_PATCH {patch}\n"
    )
    (folder / "lib").mkdir()
    for name in ("c10", "torch", "torch_cpu"):
        (folder / f"lib/lib{name}.so").write_bytes(b"")
    return folder


def test_another_minor_version_of_torch_is_a_clear_error(tmp_path):
    torch_folder = fake_torch(tmp_path / "torch", "2.99.0")
    configured = configure(
        tmp_path / "build",
        f"-DCMAKE_PREFIX_PATH={torch_selfattn.cmake_prefix_path};{torch_folder}",
    )
    assert configured.returncode != 0
    message = " ".join(configured.stderr.split())
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"was built for torch {minor}, but the torch at {torch_folder} is 2.99.0" in message


def test_missing_torch_is_a_clear_error(tmp_path):
    # The package alone, away from torch and without a memory of where it was.
    package = tmp_path / "alone"
    shutil.copytree(PACKAGE / "share", package / "share")
    config = package / "share/cmake/TorchSelfAttn/TorchSelfAttnConfig.cmake"
    text = config.read_text()
    config.write_text(text.replace(str(Path(torch.__file__).parent), "/nonexistent"))
    assert config.read_text() != text
    configured = configure(
        tmp_path / "build", f"-DCMAKE_PREFIX_PATH={package}", "-DPython_EXECUTABLE=/nonexistent"
    )
    assert configured.returncode != 0
    assert "torch was not found. Set Torch_DIR" in " ".join(configured.stderr.split())


def test_only_marked_symbols_are_exported():
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not there")
    listing = run("nm", "-DC", "--defined-only", PACKAGE / "lib/libtorch_selfattn.so").stdout
    # T: code of our own; weak symbols come from inline functions of torch's headers.
    exported = re.findall(r" T (\S.*)", listing)
    assert exported
    public = re.compile(r"torch_selfattn::(?!kernels)|_init$|_fini$")
    assert [name for name in exported if not public.match(name)] == []


def test_library_is_free_of_python():
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not there")
    library = PACKAGE / "lib/libtorch_selfattn.so"
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", library).stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name]
