"""FLOP counts, registered when somebody counts.

torch.utils.flop_counter imports Triton: 0.2 s that few users of this package need. So the formulas
wait until something else imports that module.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_MODULE = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def _register_waiting() -> None:
    register: Callable[..., Any] = sys.modules[_MODULE].register_flop_formula
    while _waiting:
        operator, formula = _waiting.pop()
        register(operator)(formula)


class _AfterImport(MetaPathFinder):
    """Runs _register_waiting at the end of the module's import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_waiting()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_flop_formula(operator: Any, formula: Callable[..., int]) -> None:
    """torch.utils.flop_counter.register_flop_formula, now or when that module is imported."""
    _waiting.append((operator, formula))
    if _MODULE in sys.modules:
        _register_waiting()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
