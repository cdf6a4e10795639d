"""docs/tolerances.md, the one table of error bounds, as the tests use it.

Errors are in units of the dtype's epsilon at the size of the result: |got - want| <= bound * eps *
max(1, max |want|), element by element, where want comes from float64.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

TABLE = Path(__file__).parents[2] / "docs" / "tolerances.md"
COLUMNS = ("op", "device", "implementation", "dtype", "output", "lse", "gradients")
NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@functools.cache
def rows() -> dict[tuple[str, str, str, str], dict[str, float]]:
    """(op, device, implementation, dtype) -> bounds by column name."""
    result: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != len(COLUMNS) or cells[0] == "op" or not cells[0].startswith("`"):
            continue
        op, device, implementations, dtypes, *bounds = (cell.replace("`", "") for cell in cells)
        for implementation in implementations.split(", "):
            for dtype in dtypes.split(", "):
                key = (op, device, implementation, dtype)
                assert key not in result, f"{TABLE.name} has two rows for {key}"
                result[key] = {
                    name: float(bound)
                    for name, bound in zip(COLUMNS[4:], bounds, strict=True)
                    if bound != "-"
                }
    return result


def bound(op: str, device: str, implementation: str, dtype: torch.dtype, column: str) -> float:
    """The row of the implementation, or that of `*`, any implementation of the device."""
    table = rows()
    name = implementation if (op, device, implementation, NAMES[dtype]) in table else "*"
    return table[op, device, name, NAMES[dtype]][column]


def error(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """The largest error in the table's unit; inf where NaN or an infinity is not matched."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if want.numel() == 0:
        return 0.0
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(7.0), want[~finite].nan_to_num(7.0)):
        return float("inf")
    got, want = got[finite], want[finite]
    if want.numel() == 0:
        return 0.0
    largest = max(1.0, want.abs().max().item())
    result = ((got - want).abs().max() / (torch.finfo(dtype).eps * largest)).item()
    return result if result == result else float("inf")
