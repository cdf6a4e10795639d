"""Loads the compiled library, with an error that says what to do when it does not fit torch."""

import re
from pathlib import Path
from types import ModuleType

import torch


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _torch_version_of_build() -> str | None:
    """What the installed CMake configuration says; the library itself may not load."""
    config = Path(__file__).parent / "share/cmake/TorchSelfAttn/TorchSelfAttnConfig.cmake"
    try:
        found = re.search(r'_built_for "(\d+\.\d+)', config.read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def _mismatch(built_for: str) -> ImportError:
    return ImportError(
        f"torch_selfattn was built for torch {_minor(built_for)}, but this is torch "
        f"{torch.__version__}. Torch promises no stable C++ interface between minor versions: "
        "reinstall torch_selfattn with this torch present "
        "(pip install --force-reinstall --no-deps --no-build-isolation torch_selfattn)."
    )


def load_library() -> ModuleType:
    built_for = _torch_version_of_build()
    if built_for is not None and _minor(built_for) != _minor(torch.__version__):
        # Before loading: a library for another torch may fail in ways worse than an exception.
        raise _mismatch(built_for)
    try:
        from . import _C
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            raise ImportError(
                "torch_selfattn._C is not there: the package was not built. In a source tree run "
                "`pip install -e . --no-build-isolation`."
            ) from error
        raise
    if _minor(_C.torch_version) != _minor(torch.__version__):
        raise _mismatch(_C.torch_version)
    return _C
