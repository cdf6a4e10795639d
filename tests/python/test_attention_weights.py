"""attention_weights: chosen rows and heads of the weight matrix, of both scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from attention_problems import FEW, PROBLEMS, SCORES, Mask, Problem, reference_of
from compiler_tester import CompilerTester
from operator_tester import OPS, Arguments
from torch import Tensor


class WeightsTester(CompilerTester):
    op = "attention_weights"
    score: ClassVar[str]
    extra: ClassVar[Arguments] = {}  # arguments of every call
    # The value decides nothing here: only heads and batches that query and key have.
    problems: ClassVar[list[Problem]] = [
        replace(p, value=p.key)
        for p in PROBLEMS
        if p.dropout_p == 0 and p.name != "grouped unequally"
    ]
    few: ClassVar[list[str]] = [
        "plain",
        "grouped heads",
        "key batch broadcast",
        "float mask (2, 1, 1, 5)",
        "query offsets",
        "slopes, mask, window, lengths, groups",
    ]

    def arguments(self, problem: Problem, dtype: torch.dtype, device: str) -> Arguments:
        arguments = problem.arguments(self.score, dtype, device) | self.extra
        del arguments["value"]
        if problem.name in self.averaged:
            arguments["average_heads"] = True
        if problem.name in self.selected:
            rows, heads = [2, 0, 2], [1, 0, 1]
            arguments["rows"] = torch.tensor(rows, device=device)
            arguments["heads"] = torch.tensor(heads, device=device, dtype=torch.int32)
        return arguments

    # Problems with rows and heads chosen: out of order, one of them twice.
    selected = (
        "plain",
        "grouped heads",
        "key heads broadcast",
        "causal",
        "query offsets",
        "key range",
        "float mask (2, 2, 4, 5)",
        "float mask (2, 1, 1, 5)",
        "bool mask (1, 2, 4, 1)",
        "mask, window, lengths, groups",
        "slopes per sample",
        "slopes, mask, window, lengths, groups",
    )

    # The mean over the heads.
    averaged = (
        "shared weight",
        "grouped, one head",
        "grouped heads",
        "query offsets",
        "key lengths with 0",
        "float mask (2, 1, 4, 5)",
        "float mask (4, 5)",
        "bool mask (2, 1, 1, 5)",
        "5-D",
        "3-D",
        "2-D",
        "zero keys",
        "zero heads",
        "long",
        "long causal",
        "long mask",
        "slopes, mask, window, lengths, groups",
    )

    def reference(self, arguments: Arguments, dropout_factors: Tensor | None) -> Any:
        arguments = dict(arguments)
        rows, heads = arguments.pop("rows", None), arguments.pop("heads", None)
        average_heads = arguments.pop("average_heads", False)
        weights = reference_of(arguments | {"value": arguments["key"]})[2]
        weights = weights if rows is None else weights.index_select(-2, rows)
        weights = weights if heads is None else weights.index_select(-3, heads)
        if average_heads and max(arguments["query"].dim(), arguments["key"].dim()) > 3:
            weights = weights.sum(-3) / max(weights.shape[-3], 1)
        return (weights,)

    def inner_ops(self, problem: Problem) -> list[str]:
        return [f"torch_selfattn::_attention_weights_{d}" for d in ("forward", "backward")]

    exported_inner_ops = ("_attention_weights_forward",)

    def growing(self) -> list[Arguments]:
        return [
            self.arguments(
                Problem(
                    f"growing {batch}",
                    (batch, 4, queries, 6),
                    (batch, 2, keys, 6),
                    (batch, 2, keys, 6),
                    mask=Mask("float", (batch, 1, queries, keys), holes=False),
                    slopes=(batch, 4),
                    options={"enable_gqa": True, "window_left": 6},
                ),
                torch.float32,
                "cpu",
            )
            | {"rows": torch.arange(queries - 1).flip(0), "average_heads": True}
            for batch, queries, keys in ((5, 9, 10), (7, 13, 17), (8, 21, 31))
        ]

    @pytest.mark.way("autocast")
    def test_autocast(self):
        """The weights are to be looked at: they keep the dtype of the query, and are no worse than
        if the inputs had been rounded."""
        arguments = self.growing()[0]
        want = self.results(arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = self.results(arguments)
        atol = 8 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(got, want, rtol=0, atol=atol)

    def small(self, seed: int = 0) -> Arguments:
        problem = Problem(
            f"small {seed}",
            (1, 2, 3, 2),
            (1, 1, 3, 2),
            (1, 1, 3, 2),
            mask=Mask("float", (3, 3), holes=False),
            slopes=(2,),
            options={"enable_gqa": True, "window_right": 1},
        )
        return self.arguments(problem, torch.float64, "cpu") | {"rows": torch.tensor([2, 0])}


class TestDotProductWeights(WeightsTester):
    score = "dot"


class TestAdditiveWeights(WeightsTester):
    score = "additive"


class TestLeakyReluWeights(WeightsTester):
    score = "additive"
    extra: ClassVar[Arguments] = {"activation": "leaky_relu", "negative_slope": 0.1}
    problems: ClassVar[list[Problem]] = [
        p for p in WeightsTester.problems if p.name in (*FEW, *SCORES, *WeightsTester.averaged)
    ]


def inputs(queries: int = 1, heads: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, heads, queries, 3, generator=generator),
        torch.randn(2, heads, 5, 3, generator=generator),
    )


@pytest.mark.parametrize("which", ["rows", "heads"])
@pytest.mark.parametrize("chosen", [[], [0], [0, 0]], ids=str)
def test_selection_of_a_single_row_or_head(which, chosen):
    """A single query (or head) can be chosen no time, once or twice, like any other."""
    query, key = inputs()
    all_rows = OPS.attention_weights(query, key)
    index = torch.tensor(chosen, dtype=torch.int64)
    got = OPS.attention_weights(query, key, **{which: index})
    want = all_rows.index_select(2 if which == "rows" else 1, index)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("which", ["rows", "heads"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_selection_out_of_range(which, size, score):
    query, key = inputs(size, size)
    weight = torch.ones(3) if score == "additive" else None
    with pytest.raises((IndexError, RuntimeError), match=r"out of .*(range|bounds)"):
        OPS.attention_weights(query, key, weight, **{which: torch.tensor([size])})


def test_rows_add_up_to_one():
    query, key = inputs(4, 2)
    for weight in (None, torch.ones(3)):
        total = OPS.attention_weights(query, key, weight, is_causal=True).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_agrees_with_the_attention():
    """weights @ value is what the attention operator returns."""
    query, key = inputs(4, 2)
    value = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(2))
    weight = torch.tensor([0.3, -1.0, 2.0])
    for op, w in ((OPS.dot_product_attention, ()), (OPS.additive_attention, (weight,))):
        weights = OPS.attention_weights(query, key, *w, window_left=2, query_offset=1)
        want = op(query, key, value, *w, window_left=2, query_offset=1)
        torch.testing.assert_close(weights @ value, want)


@pytest.mark.parametrize("chosen", [None, [2, 0], [1]], ids=str)
def test_the_mean_is_that_of_the_chosen_heads(chosen):
    query, key = inputs(4, 3)
    heads = None if chosen is None else torch.tensor(chosen)
    for weight in (None, torch.tensor([0.3, -1.0, 2.0])):
        single = OPS.attention_weights(query, key, weight, heads=heads)
        mean = OPS.attention_weights(query, key, weight, heads=heads, average_heads=True)
        torch.testing.assert_close(mean, single.mean(1))


def test_gradients_of_many_rows_are_added_up_in_pieces():
    """So many pairs that the backward pass takes the rows in several chunks, at least four."""
    generator = torch.Generator().manual_seed(3)
    query, key = (
        torch.randn(1, 2, length, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        for length in (2100, 4000)
    )
    mask = torch.zeros(1, 4000, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1, 2, 2100, 4000, generator=generator, dtype=torch.float64)
    options = {"window_left": 30, "window_right": 0, "query_offset": 900}
    weights = OPS.attention_weights(query, key, attn_mask=mask, **options)
    got = torch.autograd.grad(weights, (query, key, mask), grad)
    want = reference_of({"query": query, "key": key, "value": key, "attn_mask": mask} | options)[2]
    torch.testing.assert_close(got, torch.autograd.grad(want, (query, key, mask), grad))


def test_third_derivative_where_query_is_key():
    """A tensor given twice is two arguments: each derivative counts it once for each."""
    x = inputs(3, 2)[0].double().requires_grad_()

    def third(f: Any) -> Tensor:
        y = f(x)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return y

    got = third(lambda x: OPS.attention_weights(x, x))
    torch.testing.assert_close(
        got, third(lambda x: torch.softmax(x @ x.mT / x.shape[-1] ** 0.5, -1))
    )
    got = third(lambda x: OPS.dot_product_attention(x, x, x))
    want = third(lambda x: torch.softmax(x @ x.mT / x.shape[-1] ** 0.5, -1) @ x)
    torch.testing.assert_close(got, want)


def test_key_lengths_out_of_range():
    query, key = inputs(4, 2)
    with pytest.raises(ValueError, match=r"attention_weights: key_lengths must be between 0 and"):
        OPS.attention_weights(query, key, key_lengths=torch.tensor([5, 6]))


def test_inner_operator_checks_its_indices():
    query, key = inputs(4, 2)
    arguments = (query, key, None, None, None, None, None, None)
    for indices in (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="query_indices must"):
            OPS._attention_weights_forward(*arguments, indices, None, None, 0, 0, 0, False)


def test_vmap_over_rows():
    """Rows that differ from sample to sample, in a window."""
    query, key = inputs(4, 2)
    rows = torch.tensor([[3, 1], [0, 0], [2, 3]])

    def of(rows: Tensor) -> Tensor:
        return OPS.attention_weights(query, key, rows=rows, window_left=1, window_right=1)

    torch.testing.assert_close(torch.vmap(of)(rows), torch.stack([of(r) for r in rows]))
