"""Threads change nothing: neither their number, nor whose they are, nor a call within a task of
theirs. Every comparison is bitwise, of the output and all gradients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import torch_selfattn

SCORES = ("dot", "additive")
# name: (B, H, Hk, Lq, Lk, E), options. What is shared out differs from one to the other.
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "a task each": ((2, 3, 3, 20, 30, 16), {}),
    "several blocks of queries": ((1, 2, 2, 200, 150, 24), {}),
    "keys in shares": ((1, 1, 1, 5, 2300, 16), {}),
    "grouped heads": ((2, 4, 2, 90, 140, 8), {"enable_gqa": True}),
    "causal": ((2, 2, 2, 190, 190, 16), {"is_causal": True}),
    "window": ((1, 2, 2, 160, 1300, 16), {"window_left": 50, "window_right": 70}),
    "mask of all heads": ((3, 4, 4, 40, 70, 16), {"mask": (40, 70)}),
    "mask of keys": ((1, 2, 2, 70, 1100, 8), {"mask": (1, 2, 1, 1100)}),
    "padding": ((3, 2, 2, 60, 80, 16), {"key_lengths": [80, 1, 33]}),
    "dropout": ((2, 2, 2, 70, 90, 16), {"dropout_p": 0.3}),
}
CASES = [f"{score}, {name}" for score in SCORES for name in SHAPES]
CASES += [f"{score}, multi-head" for score in SCORES]


def problem(case: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function and its inputs, all of which want gradients; the same ones at each call."""
    score, name = case.split(", ", 1)
    additive = score == "additive"
    generator = torch.Generator().manual_seed(CASES.index(case))

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    if name == "multi-head":

        def multi_head(x: Tensor, w: Tensor, bias: Tensor, out: Tensor, *score_weight: Tensor):
            return torch_selfattn.multi_head_attention(
                x, x, x, 4, [w], [bias], out, score_weight=score_weight[0] if additive else None
            )

        leaves = [leaf(2, 70, 32), leaf(96, 32), leaf(96), leaf(32, 32)]
        return multi_head, [*leaves, leaf(4, 8)] if additive else leaves

    (b, h, hk, lq, lk, e), given = SHAPES[name]
    options = dict(given)
    leaves = [leaf(b, h, lq, e), leaf(b, hk, lk, e), leaf(b, hk, lk, e)]
    mask_shape = options.pop("mask", None)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"])
    if additive:
        leaves.append(leaf(h, e))
    if mask_shape is not None:
        leaves.append(leaf(*mask_shape))
    operator = (
        torch_selfattn.additive_attention if additive else torch_selfattn.dot_product_attention
    )

    def attend(*tensors: Tensor) -> Tensor:
        count = 4 if additive else 3
        mask = tensors[count] if len(tensors) > count else None
        return operator(*tensors[:count], attn_mask=mask, **options)

    return attend, leaves


def results(case: str, threads: tuple[int, int] | None = None) -> list[Tensor]:
    """Output and gradients; threads: for forward and for backward."""
    function, leaves = problem(case)
    torch.manual_seed(5)
    if threads is not None:
        torch.set_num_threads(threads[0])
    out = function(*leaves)
    if threads is not None:
        torch.set_num_threads(threads[1])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_same(got: list[Tensor], want: list[Tensor], message: str) -> None:
    assert len(got) == len(want)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"{message}: result {index}, {(a - b).abs().max()} apart"


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_changes_nothing(case):
    want = results(case, (1, 1))
    assert all(t.isfinite().all() and t.abs().max() > 0 for t in want)
    for threads in ((2, 2), (3, 3), (8, 8), (1, 3), (8, 2)):  # also another one for backward
        assert_same(results(case, threads), want, f"{threads} threads")


@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads_at_once(threads):
    """Each with a team of its own; two of them on every problem."""
    cases = [case for case in CASES if "dropout" not in case]  # the generator is one for all
    torch.set_num_threads(threads)
    want = {case: results(case) for case in cases}

    def run(case: str) -> list[list[Tensor]]:
        return [results(case) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for case, got in zip(2 * cases, pool.map(run, 2 * cases), strict=True):
            for one in got:
                assert_same(one, want[case], case)


def test_inter_op_threads():
    """Calls within tasks of torch.jit.fork, forward and backward."""

    def attend(q: Tensor, w: Tensor) -> Tensor:
        a = torch_selfattn.dot_product_attention(q, q, q)
        return a + torch_selfattn.additive_attention(q, q, q, w, is_causal=True)

    def forks(queries: list[Tensor], weights: list[Tensor]) -> Tensor:
        futures: list[torch.jit.Future[Tensor]] = []
        for i in range(len(queries)):
            futures.append(torch.jit.fork(attend, queries[i], weights[i]))
        outputs: list[Tensor] = []
        for future in futures:
            outputs.append(torch.jit.wait(future))
        return torch.stack(outputs)

    torch.set_num_threads(2)
    queries = [torch.randn(2, 3, 150, 16, requires_grad=True) for _ in range(6)]
    weights = [torch.randn(3, 16, requires_grad=True) for _ in range(6)]
    want = torch.stack([attend(q, w) for q, w in zip(queries, weights, strict=True)])
    got = torch.jit.script(forks)(queries, weights)
    leaves, upstream = [*queries, *weights], torch.randn_like(want)
    assert_same(
        [got, *torch.autograd.grad(got, leaves, upstream)],
        [want, *torch.autograd.grad(want, leaves, upstream)],
        "forked",
    )


class Results(Dataset):
    """Item i: the results of case i, computed where the item is asked for."""

    def __len__(self) -> int:
        return len(CASES)

    def __getitem__(self, index: int) -> list[Tensor]:
        return results(CASES[index])


def compare_with_workers(context: str) -> None:
    """Run in a process of its own: one that has run autograd cannot run it after a fork."""
    torch.set_num_threads(2)
    with torch.no_grad():  # the team exists when the workers are forked
        for case in CASES:
            function, leaves = problem(case)
            function(*leaves)
    loader = DataLoader(
        Results(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120
    )
    got = list(loader)
    assert len(got) == len(CASES)
    for case, one in zip(CASES, got, strict=True):
        assert_same(one, results(case), case)
    print("the same")


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(context):
    program = f"import test_threads; test_threads.compare_with_workers({context!r})"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and run.stdout.strip() == "the same", run.stderr
