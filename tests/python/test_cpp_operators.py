"""The operators as C++ functions: tests/cpp/ops/test_every_operator.cpp, one by one."""

import subprocess
from pathlib import Path

import pytest
import torch
import ways

import torch_selfattn

# Tests run in the build folder.
PROGRAM = Path("tests/cpp/torch_selfattn_ops_tests").absolute()


@pytest.mark.skipif(not PROGRAM.exists(), reason="the C++ tests are not built")
@pytest.mark.parametrize(
    "operator",
    [pytest.param(name, marks=pytest.mark.way("C++", operators=[name])) for name in ways.OPERATORS],
)
def test_cpp_operator(operator):
    run = subprocess.run([PROGRAM, f"{operator}*"], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout
    assert "All tests passed" in run.stdout  # not: no test has that name


def test_all_operators_are_known_to_the_table():
    public = {
        name.removesuffix("_with_lse")
        for name in torch_selfattn.__all__
        if hasattr(torch.ops.torch_selfattn, name)
    }
    assert set(ways.OPERATORS) == public - {"explain"}
