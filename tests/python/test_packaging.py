"""The installed files as a C++ project sees them: find_package, link, train, run without Python."""

import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from cmake_projects import FOREIGN, build_and_run, configure, configure_with_package, run
from torch import Tensor

import torch_selfattn
from torch_selfattn.nn import MultiHeadAttention

PACKAGE = Path(torch_selfattn.__file__).parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same small model scripted, and compiled by AOTInductor."""
    folder = tmp_path_factory.mktemp("models")
    block = Block().eval()
    example = (torch.randn(2, 7, 16), torch.tensor([7, 5]))
    torch.jit.script(block).save(folder / "block.pt")
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    program = torch.export.export(
        block, example, dynamic_shapes={"x": {0: batch, 1: length}, "lengths": {0: batch}}
    )
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "block.pt2"))
    return folder / "block.pt", folder / "block.pt2"


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(16, 2, batch_first=True, score="additive")

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # (B, L, 16), (B) -> (B, L, 16)
        return self.attention(x, x, x, key_lengths=lengths, need_weights=False)[0]


def test_foreign_project_builds_trains_and_runs(tmp_path, models):
    # Nothing but the package's folder is given, and no interpreter that could tell where torch is.
    configured = configure_with_package(tmp_path, "-DPython_EXECUTABLE=/nonexistent")
    assert f"Found torch {torch.__version__.split('+')[0]}" in configured
    printed = build_and_run(tmp_path, *models)
    assert f"version {torch_selfattn.__version__} " in printed
    assert "scripted and exported agree" in printed
    # What it saved is a state dict of Python's.
    made = torch_selfattn.nn.TransformerEncoder(
        torch_selfattn.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2
    )
    made.load_state_dict(torch.load(tmp_path / "trained.pt", weights_only=True))


def test_example_trains_and_saves(tmp_path):
    configure_with_package(tmp_path, source=FOREIGN.parents[1] / "examples/cpp")
    printed = build_and_run(tmp_path, program="reverser")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.e-]+)", printed)]
    assert len(losses) == 3
    assert losses[-1] < 0.1 * losses[0]
    assert torch.load(tmp_path / "reverser.pt", weights_only=True)["output.bias"].shape == (10,)


def test_linker_keeps_the_library(tmp_path):
    """Also where it drops libraries that nothing refers to, and the program refers to nothing."""
    configure_with_package(tmp_path, "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")
    build_and_run(tmp_path, program="by_name")


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
    build_and_run(tmp_path)


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
    configured = configure(
        tmp_path / "build", f"-DCMAKE_PREFIX_PATH={package}", "-DPython_EXECUTABLE=/nonexistent"
    )
    assert configured.returncode != 0
    assert "torch was not found. Set Torch_DIR" in " ".join(configured.stderr.split())


def test_sdist_has_all_tracked_files(tmp_path):
    root = FOREIGN.parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = set(run("git", "ls-files", folder=root).stdout.splitlines())
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    assert run(sys.executable, "-c", code, folder=root).returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert tracked - packed <= {".gitignore", ".ci/run"}
    built = re.compile(r"\.so$|^build|^torch_selfattn/(lib|include|share)/|/runs/|__pycache__")
    assert [name for name in packed if built.search(name)] == []


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
