"""Loads the compiled library, with an error that says what to do when it does not fit torch."""

import re
from pathlib import Path
from types import ModuleType

import torch

_LIBRARY = "libtorch_selfattn.so"
_REINSTALL = (
    "reinstall torch_selfattn with this torch present "
    "(pip install --force-reinstall --no-deps --no-build-isolation torch_selfattn)."
)


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
        f"{_REINSTALL}"
    )


def _other_copy() -> Path | None:
    """The library that registered the operators of this process, if it is not this package's."""
    ours = Path(__file__).parent / "lib" / _LIBRARY
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux: PyTorch itself says what it thinks of a second copy
        return None
    # Six columns, the last of which is the file's path; each file has several lines.
    paths = {Path(line.split(maxsplit=5)[5]) for line in mapped if line.endswith("/" + _LIBRARY)}
    for path in sorted(paths):
        if not (path.exists() and ours.exists() and path.samefile(ours)):
            return path
    return None


def load_library() -> ModuleType:
    built_for = _torch_version_of_build()
    if built_for is not None and _minor(built_for) != _minor(torch.__version__):
        # Before loading: a library for another torch may fail in ways worse than an exception.
        raise _mismatch(built_for)
    other = _other_copy()
    if other is not None:
        raise ImportError(
            f"torch_selfattn in {Path(__file__).parent} cannot be loaded: this process has loaded "
            f"another copy of its library, {other}, and operators can be registered only once. "
            "Use one of the two."
        )
    try:
        from . import _C
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            raise ImportError(
                "torch_selfattn._C is not there: the package was not built. In a source tree run "
                "`pip install -e . --no-build-isolation`."
            ) from error
        if "undefined symbol" in str(error):
            raise ImportError(
                f"torch_selfattn was built for another torch than this one, {torch.__version__}, "
                f"whose library lacks what it needs ({error}): {_REINSTALL}"
            ) from error
        raise
    if _minor(_C.torch_version) != _minor(torch.__version__):
        raise _mismatch(_C.torch_version)
    return _C
