"""Checks that the interpreter given as PYTHON= has what the build and the tests need."""

import importlib.util
import sys

# Import name: the name to install it by.
NEEDED = {
    "torch": "torch",
    "pybind11": "pybind11",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
    "expecttest": "expecttest",
    "numpy": "numpy",
}

if sys.version_info < (3, 10):  # noqa: UP036 (this is the check)
    sys.exit(f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}")
missing = [
    package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None
]
if missing:
    sys.exit(
        f"{sys.executable} lacks {', '.join(missing)}. Nothing is installed into an environment "
        f"given by PYTHON=; this would be the command:\n"
        f"    {sys.executable} -m pip install {' '.join(missing)}"
    )
