"""Importing the package: quiet, quick, and clear about what is wrong."""

import shutil
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


@pytest.mark.slow
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


def copied_package(folder: Path, name: str = "torch_selfattn") -> Path:
    """A package of the same Python files; without what is compiled."""
    compiled = shutil.ignore_patterns("lib", "include", "share", "*.so")
    return Path(
        shutil.copytree(Path(torch_selfattn.__file__).parent, folder / name, ignore=compiled)
    )


def copied_library(folder: Path) -> Path:
    library = Path(torch_selfattn.__file__).parent / "lib/libtorch_selfattn.so"
    return Path(shutil.copy(library, folder))


def error_of(statement: str, folder: Path) -> str:
    """What an import says in a process whose first packages are those of a folder."""
    code = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import torch
try:
    {statement}
except ImportError as error:
    print(error)
"""
    return run(code).stdout


def test_missing_library_is_a_clear_error(tmp_path: Path) -> None:
    """A checkout that was not built."""
    copied_package(tmp_path)
    assert "the package was not built" in error_of("import torch_selfattn", tmp_path)


def test_a_symbol_that_torch_lacks_is_a_clear_error(tmp_path: Path) -> None:
    """A library built for another torch, in a package that does not say for which."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = copied_package(tmp_path) / "_C.abi3.so"
    source = tmp_path / "lacking.cpp"
    source.write_text(
        'void of_another_torch(); extern "C" void* PyInit__C();\n'
        "void* PyInit__C() { of_another_torch(); return nullptr; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-z,now", source, "-o", library], check=True)
    text = error_of("import torch_selfattn", tmp_path)
    assert f"built for another torch than this one, {torch.__version__}" in text
    assert "undefined symbol" in text and "reinstall torch_selfattn with this torch" in text


def test_a_second_package_is_a_clear_error(tmp_path: Path) -> None:
    (copied_package(tmp_path, "selfattn_copy") / "lib").mkdir()
    copied_library(tmp_path / "selfattn_copy/lib")
    text = error_of("import torch_selfattn, selfattn_copy", tmp_path)
    first = Path(torch_selfattn.__file__).parent / "lib/libtorch_selfattn.so"
    assert f"another copy of its library, {first.resolve()}," in text
    assert str(tmp_path / "selfattn_copy") in text


def test_a_package_after_another_library_is_a_clear_error(tmp_path: Path) -> None:
    library = copied_library(tmp_path)
    loading = f"torch.ops.load_library({str(library)!r}); import torch_selfattn"
    assert f"another copy of its library, {library}," in error_of(loading, tmp_path)


def test_another_library_after_the_package_changes_nothing(tmp_path: Path) -> None:
    code = f"""
import torch, torch_selfattn
torch.ops.load_library({str(copied_library(tmp_path))!r})
q = torch.randn(1, 1, 3, 4, requires_grad=True)
torch_selfattn.dot_product_attention(q, q, q).sum().backward()
"""
    done = run(code)
    assert done.stderr.count("the operators of another copy are loaded already") == 1
    assert "Overriding" not in done.stderr


def test_the_library_itself_may_be_loaded_before() -> None:
    library = Path(torch_selfattn.__file__).parent / "lib/libtorch_selfattn.so"
    run(f"import torch; torch.ops.load_library({str(library)!r}); import torch_selfattn")


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
