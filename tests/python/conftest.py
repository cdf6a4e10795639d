"""What all tests share: one thread, a fixed seed, and a reason for each skipped GPU test."""

import hypothesis
import pytest
import torch

# The same examples in every run; `pytest --hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("fixed")


def pytest_configure() -> None:
    # The machine's cores belong to the test processes (pytest -n), not to one of them.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(pytest.mark.skip(reason="torch finds no GPU here"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)
