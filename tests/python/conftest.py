"""What all tests share: one thread, a fixed seed, and a reason for each skipped GPU test."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties += [("way", pair) for pair in ways.shown_by(item)]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(pytest.mark.skip(reason="torch finds no GPU here"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)
