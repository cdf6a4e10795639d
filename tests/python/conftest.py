"""What all tests share: one thread, a fixed seed, and no test of a GPU where there is none."""

from pathlib import Path

import hypothesis
import pytest
import torch
import ways

# The same examples in every run; `pytest --hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ways", type=Path, help="write which operator passed by which way in")


def pytest_configure(config: pytest.Config) -> None:
    # The machine's cores belong to the test processes (pytest -n), not to one of them.
    torch.set_num_threads(1)
    file = config.getoption("--ways")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ways.Recorder(file))


def pytest_report_header() -> str:
    found = torch.cuda.is_available()
    return "torch finds a GPU" if found else "torch finds no GPU: tests marked cuda are left out"


@pytest.hookimpl(tryfirst=True)  # before -m and -k leave tests out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    collected = config.stash.setdefault(ways.COLLECTED, {})
    for item in items:
        shown = ways.shown_by(item)
        item.user_properties += [("way", pair) for pair in shown]
        collected.setdefault(item.path, set()).update(shown)
    if torch.cuda.is_available():
        return
    for_gpu = {item for item in items if item.get_closest_marker("cuda") is not None}
    config.hook.pytest_deselected(items=list(for_gpu))
    items[:] = [item for item in items if item not in for_gpu]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)
