"""Peak memory of forward and backward, by the kernel's own account (ru_maxrss of a process that
does nothing else): linear in the length, and no more than three times what goes in and out."""

import json
import subprocess
import sys

import pytest
from operator_tester import implementations

# Prints how much the process grew beyond its size after a small warm-up call.
PROGRAM = """
import json, resource, sys
import torch, torch_selfattn
torch.set_num_threads(2)
op, heads, length, dim, alibi = sys.argv[1], *map(int, sys.argv[2:])

def run(length):
    q, k, v = (torch.randn(1, heads, length, dim, requires_grad=True) for _ in range(3))
    inputs = [q, k, v] + ([torch.randn(heads, dim, requires_grad=True)] if "additive" in op else [])
    slopes = torch.full((heads,), 0.01, requires_grad=True) if alibi else None
    out = getattr(torch_selfattn, op)(*inputs, alibi_slopes=slopes)
    grad = torch.ones_like(out)
    grads = torch.autograd.grad(out, inputs + [slopes] * alibi, grad)
    return sum(x.numel() * 4 for x in (*inputs, out, grad, *grads))

run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
needed = run(length)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"needed": needed, "peak": (after - before) * 1024}))
"""
MEBI = 2**20

pytestmark = pytest.mark.skipif(
    "generic" not in implementations("cpu"), reason="the reference takes hours at these lengths"
)


def measure(op: str, heads: int, length: int, dim: int, alibi: bool = False) -> dict[str, int]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, op, *map(str, (heads, length, dim, int(alibi)))],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "alibi",
    [pytest.param(False, id="plain"), pytest.param(True, id="slopes", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("op", ["dot_product_attention", "additive_attention"])
def test_linear_in_the_length(op, alibi):
    """One head, where splitting the keys between threads costs most: at each length no more than
    three times inputs, output and gradients, and 2 MiB for the allocator. A matrix of Lq * Lk alone
    would be 4, 16 and 64 MiB beside 2, 4.5 and 9."""
    for length in (1024, 2048, 4096):
        found = measure(op, 1, length, 64, alibi)
        assert found["peak"] <= 3 * found["needed"] + 2 * MEBI, (length, found)


@pytest.mark.parametrize(
    "op", ["dot_product_attention", pytest.param("additive_attention", marks=pytest.mark.slow)]
)
def test_no_more_than_three_times_inputs_and_outputs(op):
    """B1 H8 L4096 D64 float32: inputs, output and gradients are 64 MiB."""
    found = measure(op, 8, 4096, 64)
    assert found["needed"] >= 64 * MEBI
    assert found["peak"] <= 3 * found["needed"], {k: v / MEBI for k, v in found.items()}


AVERAGED_WEIGHTS = """
import json, resource, sys
import torch, torch_selfattn
torch.set_num_threads(2)
score, heads, length, dim = sys.argv[1], *map(int, sys.argv[2:])
module = torch_selfattn.nn.MultiHeadAttention(heads * dim, heads, batch_first=True, score=score)

@torch.no_grad()
def run(length):
    x = torch.randn(1, length, heads * dim)
    out, weights = module(x, x, x, need_weights=True)  # averaged by default
    projected = 3 * x.numel()
    return 4 * (x.numel() + projected + out.numel() + weights.numel())

run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
needed = run(length)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"needed": needed, "peak": (after - before) * 1024}))
"""


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_averaged_weights_do_not_form_those_of_the_heads(score):
    """16 heads of 16, L = 2048: input, projections, output and averaged weights are 26 MiB; the
    weights of all heads would be 256 MiB."""
    run = subprocess.run(
        [sys.executable, "-c", AVERAGED_WEIGHTS, score, "16", "2048", "16"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)
    assert found["peak"] <= 2 * found["needed"], {k: v / MEBI for k, v in found.items()}
