"""Measures what docs/tolerances.md bounds: the largest error of each operator, dtype and
implementation over the problem list. Run it after a change of a kernel:

    PYTHONPATH=. python tests/python/measure_errors.py [device]
"""

import sys

import tolerances
import torch
from operator_tester import DTYPES, forced, implementations
from test_additive_attention import TestAdditiveAttention
from test_attention_weights import TestAdditiveWeights, TestDotProductWeights
from test_dot_product_attention import TestDotProductAttention
from test_multi_head_attention import TestMultiHeadAttention

TESTERS = [
    TestDotProductAttention,
    TestAdditiveAttention,
    TestDotProductWeights,
    TestAdditiveWeights,
    TestMultiHeadAttention,
]


def main(device: str) -> None:
    torch.set_num_threads(1)
    print("tester | implementation | dtype | output | lse | gradients (the worst problem of each)")
    for tester in (cls() for cls in TESTERS):
        for name in implementations(device):
            for dtype in DTYPES:
                worst: dict[str, tuple[float, str]] = {}
                for problem in tester.problems:
                    arguments = tester.arguments(problem, dtype, device)
                    try:
                        with forced(name):
                            factors = tester.dropout_factors(problem, arguments)
                            found = tester.errors(arguments, dtype, factors)
                    except NotImplementedError:
                        continue
                    for what, error in found.items():
                        column = "gradients" if what.startswith("gradient") else what
                        worst[column] = max(worst.get(column, (0.0, "")), (error, problem.name))
                cells = [
                    f"{worst[c][0]:.2f} ({worst[c][1]})" if c in worst else "-"
                    for c in tolerances.COLUMNS[4:]
                ]
                row = [type(tester).__name__, name, tolerances.NAMES[dtype], *cells]
                print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
