"""additive_attention and additive_attention_with_lse."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from attention_problems import BY_NAME, FEW, SCORES
from attention_tester import AttentionTester
from operator_tester import forced, skip_unless_supported

import torch_selfattn


class TestAdditiveAttention(AttentionTester):
    op = "additive_attention_with_lse"
    score = "additive"


class TestLeakyRelu(AttentionTester):
    op = "additive_attention_with_lse"
    score = "additive"
    problems: ClassVar = [BY_NAME[name] for name in [*FEW, *SCORES, "long mask"]]
    extra: ClassVar = {"activation": "leaky_relu"}

    def plain(self, implementation, dtype=torch.float64):
        arguments = self.arguments(BY_NAME["plain"], dtype, "cpu")
        skip_unless_supported(self, arguments, implementation)
        return arguments

    @pytest.mark.parametrize("slope", [-0.5, 0.0, 1.0, 3.0])
    def test_any_slope(self, slope, implementation):
        arguments = self.plain(implementation) | {"negative_slope": slope}
        tensors, join = self.split(arguments)
        inputs = [x.requires_grad_() for x in tensors]
        with forced(implementation):
            got = self.results(join(inputs))
        want = self.results(join(inputs), lambda a: self.reference(a, None))
        torch.testing.assert_close(got, want)

    def test_derivative_at_0(self, implementation):
        """The slope, as in PyTorch."""
        self.plain(implementation)
        weight = torch.tensor([3.0, -2.0])
        query = torch.tensor([[[[1.0, -4.0]]]], requires_grad=True)
        key = torch.tensor([[[[-1.0, 4.0], [7.0, 8.0]]]])
        value = torch.tensor([[[[1.0], [0.0]]]])
        for activation, slope in (("leaky_relu", 0.2), ("relu", 0.0)):
            with forced(implementation):
                out = torch_selfattn.additive_attention(
                    query, key, value, weight, activation=activation
                )
                (grad,) = torch.autograd.grad(out.sum(), query)
            p = 1 / (1 + math.exp(3 * 8 - 2 * 4))  # of the first key, whose sums are 0
            want = p * (1 - p) * (slope - 1) * weight
            torch.testing.assert_close(grad.flatten(), want)

    def test_large_sums_cancel(self, implementation):
        """q + k is added up first: sums over w q and w k apart would keep no digit."""
        arguments = self.plain(implementation, torch.float32)
        coarse = {name: arguments[name].mul(8).round() / 8 for name in ("query", "key")}
        large = torch.full((3,), 2.0**20)
        moved = {"query": coarse["query"] + large, "key": coarse["key"] - large}
        with forced(implementation):
            want = self.call(arguments | coarse)
            got = self.call(arguments | moved)
        torch.testing.assert_close(got, want)


# Exponents of |w| of 14 elements: they enter the products of eight, four and two elements that
# share a division.
EXPONENTS = {
    "equal": [0] * 14,
    "small eight": [0, 4, 7, 9, 3, 8, 6, 5, 0, 0, 0, 0, 0, 0],
    "small four": [0, 0, 0, 0, 0, 0, 0, 0, 18, 22, 20, 19, 0, 0],
    "far apart": [0, 4, 9, 14, 1, 1, 2, 2, 0, 20, 30, 300, 3, 5],
}


@pytest.mark.parametrize("exponents", EXPONENTS.values(), ids=EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
def test_edges_of_the_range_rules(name, dtype, exponents):
    """q = k = m from where nothing overflows to where e^(2 m) does, also with weights so small
    that products are near the largest number: the result has an edge nowhere."""
    if f"{name}: not supported" in torch_selfattn.explain(*torch.ones(3, 1, 1, 1, 1)):
        pytest.skip(f"this processor has no {name}")
    generator = torch.Generator().manual_seed(3)
    weights = torch.tensor(exponents).mul(-1.0).exp2()
    value = torch.randn(1, 1, 40, 3, generator=generator, dtype=torch.float64).to(dtype)
    spread = torch.rand(2, 1, 1, 40, 14, generator=generator, dtype=torch.float64)
    bound = 300 * torch.finfo(dtype).eps
    for m in torch.linspace(1, 34, 67, dtype=torch.float64):
        for sign in (1, -1):
            query, key = ((sign * m + 0.1 * x).to(dtype) for x in spread)
            inputs = [query, key, value, weights.to(dtype)]
            results = []
            for function, cast in (
                (torch_selfattn.additive_attention, dtype),
                (torch_selfattn.reference.additive_attention, torch.float64),
            ):
                leaves = [x.to(cast).requires_grad_() for x in inputs]
                with forced(name):
                    out = function(*leaves)
                results.append((out, *torch.autograd.grad(out.sum(), leaves)))
            for got, want in zip(*results, strict=True):
                assert (got - want).abs().max() <= bound * want.abs().max().clamp(min=1)


def test_relu_is_leaky_relu_of_slope_0():
    arguments = BY_NAME["plain"].arguments("additive")
    of_weights = {name: arguments[name] for name in ("query", "key", "weight")}
    for op, given in (
        (torch_selfattn.additive_attention, arguments),
        (torch_selfattn.attention_weights, of_weights),
    ):
        want = op(**given, activation="leaky_relu", negative_slope=0.0)
        assert torch.equal(op(**given, activation="relu", negative_slope=0.7), want)
        assert not torch.equal(op(**given), want)


def test_activation_stands_at_the_end():
    """With defaults: a scripted call that was saved before there was one still loads."""
    schema = torch.ops.torch_selfattn.additive_attention.default._schema
    assert [a.name for a in schema.arguments[-2:]] == ["activation", "negative_slope"]
    assert [a.default_value for a in schema.arguments[-2:]] == ["tanh", 0.2]


def test_gatv2_layer_is_that_along_its_edges():
    """Output and every gradient; node 4 has no edge."""
    heads, nodes, width, dim = 3, 5, 6, 4
    i, j = torch.tensor([[0, 0, 0, 1, 2, 2, 3], [1, 2, 4, 0, 2, 3, 3]])
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((nodes, width), (heads, width, dim), (heads, width, dim), (heads, dim))
    ]

    def along_edges(x, left, right, weight):
        q, k = x @ left, x @ right
        scores = (weight[:, None] * F.leaky_relu(q[:, i] + k[:, j], 0.2)).sum(-1).exp()
        total = scores.new_zeros(heads, nodes).index_add(1, i, scores)
        p = scores / total[:, i]
        return k.new_zeros(heads, nodes, dim).index_add(1, i, p[..., None] * k[:, j])

    def dense(x, left, right, weight):
        adjacency = torch.zeros(nodes, nodes, dtype=torch.bool)
        adjacency[i, j] = True
        q, k = (x @ left)[None], (x @ right)[None]
        return torch_selfattn.additive_attention(
            q, k, k, weight, attn_mask=adjacency, activation="leaky_relu"
        )[0]

    got, want = dense(*inputs), along_edges(*inputs)
    torch.testing.assert_close(got, want)
    assert (got[:, 4] == 0).all()
    grad = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad)
    )
