"""Importing the package: quiet, quick, and clear about what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_selfattn
from torch_selfattn import _load


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code], check=True, capture_output=True, text=True
    )


def test_prints_nothing_and_warns_of_nothing() -> None:
    done = run("import torch_selfattn", "-W", "error")
    assert done.stdout == "" and done.stderr == ""


def test_import_time() -> None:
    code = """
import time, torch
start = time.process_time()
import torch_selfattn
print(time.process_time() - start)
"""
    # The best of three: the others paid for a cold disk or a busy machine.
    assert min(float(run(code).stdout) for _ in range(3)) <= 0.15


def test_does_not_import_what_few_need() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import torch_selfattn
heavy = ("triton", "sympy", "torch._dynamo", "torch._inductor", "numpy", "torch.distributed")
new = set(sys.modules) - before
print(*[m for m in new if m.startswith(heavy)])
"""
    assert run(code).stdout.strip() == ""


def test_what_it_exports() -> None:
    for name in torch_selfattn.__all__:
        assert hasattr(torch_selfattn, name), name
    for name in torch_selfattn.nn.__all__:
        assert hasattr(torch_selfattn.nn, name), name
    assert (Path(torch_selfattn.__file__).parent / "py.typed").exists()
    config = Path(torch_selfattn.cmake_prefix_path) / "TorchSelfAttn/TorchSelfAttnConfig.cmake"
    assert config.exists()


def test_knows_the_torch_it_was_built_for() -> None:
    built_for = _load._torch_version_of_build()
    assert built_for is not None and torch.__version__.startswith(built_for + ".")


@pytest.mark.parametrize("readable", [True, False])
def test_another_torch_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, readable: bool) -> None:
    monkeypatch.setattr(torch, "__version__", "1.99.3+cpu")
    if not readable:  # then the library itself says what it was built for
        monkeypatch.setattr(_load, "_torch_version_of_build", lambda: None)
    with pytest.raises(ImportError, match=r"built for torch 2\.\d+, but this is torch 1\.99\.3"):
        _load.load_library()


def test_missing_library_is_a_clear_error(tmp_path: Path) -> None:
    """A checkout that was not built."""
    package = tmp_path / "torch_selfattn"
    package.mkdir()
    for source in Path(torch_selfattn.__file__).parent.glob("*.py"):
        (package / source.name).write_text(source.read_text())
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
try:
    import torch_selfattn
except ImportError as error:
    print(error)
"""
    assert "the package was not built" in run(code).stdout


def test_environment_report() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch_selfattn"], check=True, capture_output=True, text=True
    )
    assert torch_selfattn.__version__ in done.stdout and torch.__version__ in done.stdout
    for call in ("dot_product_attention on cpu", "additive_attention on cpu"):
        assert call in done.stdout
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        assert dtype in done.stdout
    assert ": runs" in done.stdout
