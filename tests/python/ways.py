"""Which operator passed by which way in: `pytest --ways FILE` writes it down.

A test says what it shows by the marker `way`, one of WAYS, and of which operators by the argument
`operators`, else by its class's attribute `op`:

    @pytest.mark.way("vmap", operators=["rotary_embedding"])

tools/ways_table.py makes the table of the README from the file.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

WAYS = [
    "Python",
    "script",
    "C++",
    "compile",
    "export",
    "AOTInductor",
    "autocast",
    "vmap",
    "torch.func",
    "forward AD",
    "double backward",
    "DTensor",
]
ATTENTION = [
    "dot_product_attention",
    "additive_attention",
    "attention_weights",
    "multi_head_attention",
]
POSITIONAL = [
    "sinusoidal_encoding",
    "add_sinusoidal_encoding",
    "add_learned_encoding",
    "rotary_tables",
    "rotary_embedding",
]
# Each *_with_lse goes with its operator: both are the same inner operator.
OPERATORS = ATTENTION + POSITIONAL
# In a session's stash: what the collected tests of each file show, chosen to run or not.
COLLECTED = pytest.StashKey[dict[Path, set[tuple[str, str]]]]()
ENCODINGS = ["add_sinusoidal_encoding", "add_learned_encoding", "rotary_embedding"]


def shown_by(item: pytest.Item) -> list[tuple[str, str]]:
    """(operator, way) of each that a test shows."""
    pairs = []
    for marker in item.iter_markers("way"):
        (way,) = marker.args
        if way not in WAYS:
            raise pytest.UsageError(f"{item.nodeid}: way must be one of {WAYS} (got {way!r})")
        operators = marker.kwargs.get("operators")
        if operators is None:
            operators = [item.cls.op.removesuffix("_with_lse")]  # type: ignore[attr-defined]
        if not set(operators) <= set(OPERATORS):
            raise pytest.UsageError(f"{item.nodeid}: unknown operators among {operators}")
        pairs += [(name, way) for name in operators]
    return pairs


class Recorder:
    """A plugin: counts the outcomes of marked tests, those of other processes (-n) as well."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.outcomes: dict[str, dict[str, Counter[str]]] = defaultdict(
            lambda: defaultdict(Counter)
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return  # set-up and clean-up
        for name, shown in report.user_properties:
            if name == "way":
                operator, way = shown
                self.outcomes[operator][way][report.outcome] += 1
                if report.outcome == "passed":
                    self.outcomes[operator][way]["milliseconds"] += round(1000 * report.duration)

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.outcomes, indent=1, sort_keys=True) + "\n")
