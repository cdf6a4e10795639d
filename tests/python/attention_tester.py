"""What the two attention scores share beyond the abstract tester."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import hypothesis
import pytest
import torch
from attention_problems import BY_NAME, PROBLEMS, Mask, Problem, reference_of
from compiler_tester import CompilerTester
from hypothesis import strategies as st
from operator_tester import (
    DTYPES,
    LAYOUTS,
    OPS,
    Arguments,
    forced,
    implementations,
    skip_unless_supported,
    supported_arguments,
    why_not_supported,
)
from torch import Tensor

import torch_selfattn.reference


def closed_mask(kind: str) -> Arguments:
    mask = torch.zeros(4, 5, dtype=torch.bool)
    return {"attn_mask": mask if kind == "bool" else torch.full((4, 5), -math.inf)}


# Ways to leave the problem "plain" (4 queries, 5 keys) without any allowed pair.
CLOSED_ROWS: dict[str, Callable[[], Arguments]] = {
    "bool mask": lambda: closed_mask("bool"),
    "float mask": lambda: closed_mask("float"),
    "key_lengths": lambda: {"key_lengths": torch.tensor([0, 0])},
    "key_starts": lambda: {"key_starts": torch.tensor([5, 5])},
    "empty range": lambda: {
        "key_starts": torch.tensor([3, 2]),
        "key_lengths": torch.tensor([3, 1]),
    },
    "causal": lambda: {"is_causal": True, "query_offset": -4},
    "window": lambda: {"window_left": 1, "query_offset": 9},
    "offsets": lambda: {"window_right": 0, "query_offsets": torch.tensor([-4, -9])},
}


def masked(kind: str) -> tuple[Tensor, Tensor, Arguments]:
    """Keys 1 and 4 closed for all queries, query 2 for all keys."""
    hidden = torch.tensor([False, True, False, False, True]).expand(2, 5)
    rows = torch.tensor([True, True, False, True]).expand(2, 4)
    allowed = rows[0][:, None] & ~hidden[0]
    if kind == "bool":
        return hidden, rows, {"attn_mask": allowed}
    return hidden, rows, {"attn_mask": torch.zeros(4, 5).masked_fill(~allowed, -math.inf)}


# For "plain": which keys (B, Lk) nobody sees, which queries (B, Lq) see one, and the arguments.
MASKED_KEYS: dict[str, Callable[[], tuple[Tensor, Tensor, Arguments]]] = {
    "bool mask": lambda: masked("bool"),
    "float mask": lambda: masked("float"),
    "key_lengths": lambda: (
        torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]) > 0,
        torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]) > 0,
        {"key_lengths": torch.tensor([3, 0])},
    ),
    "key_starts": lambda: (
        torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]) > 0,
        torch.ones(2, 4, dtype=torch.bool),
        {"key_starts": torch.tensor([2, 0])},
    ),
    "causal": lambda: (
        torch.tensor([[0, 0, 0, 0, 1]] * 2) > 0,
        torch.ones(2, 4, dtype=torch.bool),
        {"is_causal": True},
    ),
    "window": lambda: (
        torch.tensor([[1, 1, 0, 0, 0]] * 2) > 0,
        torch.tensor([[1, 1, 1, 0]] * 2) > 0,
        {"window_left": 0, "query_offset": 2},
    ),
}


class AttentionTester(CompilerTester):
    score: ClassVar[str]  # "dot" or "additive"
    problems: ClassVar[list[Problem]] = PROBLEMS
    extra: ClassVar[Arguments] = {}  # arguments of every call

    def arguments(self, problem: Problem, dtype: torch.dtype, device: str) -> Arguments:
        return problem.arguments(self.score, dtype, device) | self.extra

    def reference(self, arguments: Arguments, dropout_factors: Tensor | None) -> Any:
        return reference_of(arguments, dropout_factors)[:2]

    def growing(self) -> list[Arguments]:
        # No two dimensions are equal, so that none is taken for another one.
        return [
            Problem(
                f"growing {batch}",
                (batch, 4, queries, 6),
                (batch, 2, keys, 6),
                (batch, 2, keys, 3),
                mask=Mask("float", (batch, 1, queries, keys), holes=False),
                slopes=(batch, 4),
                key_lengths=list(range(1, batch + 1)),
                options={"enable_gqa": True, "window_left": 6},
            ).arguments(self.score, torch.float32)
            | self.extra
            for batch, queries, keys in ((5, 9, 10), (7, 13, 17), (8, 21, 31))
        ]

    def small(self, seed: int = 0) -> Arguments:
        problem = Problem(
            f"small {seed}",
            (1, 2, 2, 2),
            (1, 1, 3, 2),
            (1, 1, 3, 2),
            mask=Mask("float", (2, 3), holes=False),
            slopes=(2,),
            options={"enable_gqa": True, "window_right": 1},
        )
        return problem.arguments(self.score) | self.extra

    # ---- The public operators beside the one under test ----

    def output_only(self, arguments: Arguments) -> Tensor:
        return getattr(OPS, self.op.removesuffix("_with_lse"))(**arguments)

    def test_without_lse(self):
        """The operator without log-sum-exp gives the same output and gradients."""
        for name in ("plain", "mask, window, lengths, groups", "dropout", "5-D"):
            arguments = self.arguments(BY_NAME[name], torch.float32, "cpu")
            tensors, join = self.split(arguments)
            inputs = [x.requires_grad_() for x in tensors]
            self.seed()
            got = self.output_only(join(inputs))
            self.seed()
            want = self.call(join(inputs))[0]
            assert torch.equal(got, want)
            grads = self.grads([got], inputs)
            for a, b in zip(grads, self.grads([want], inputs), strict=True):
                assert torch.equal(a, b)

    def test_gradient_of_lse_alone(self, implementation):
        arguments = self.arguments(BY_NAME["mask, window, lengths, groups"], torch.float64, "cpu")
        skip_unless_supported(self, arguments, implementation)
        tensors, join = self.split(arguments)
        inputs = [x.requires_grad_() for x in tensors]
        with forced(implementation):
            got = self.grads([self.call(join(inputs))[1]], inputs)
        want = self.grads([self.reference(join(inputs), None)[1]], inputs)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    def test_package_reference(self, problem):
        """torch_selfattn.reference says the same as the reference of these tests."""
        arguments = self.arguments(problem, torch.float64, "cpu")
        arguments.pop("dropout_p", None)
        ours = getattr(torch_selfattn.reference, self.op)
        got = self.results(arguments, lambda a: ours(**a))
        want = self.results(arguments, lambda a: self.reference(a, None))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    test_package_reference.problems = lambda tester: [p for p in tester.problems if not p.empty]

    # ---- Memory order ----

    @pytest.mark.parametrize("heads_inside", [False, True], ids=["contiguous", "heads inside"])
    def test_memory_order(self, heads_inside):
        """The output has the memory order of query, each gradient that of its tensor."""
        arguments = self.arguments(BY_NAME["plain"], torch.float32, "cpu")
        for name in ("query", "key", "value"):
            x = arguments[name]
            x = x.transpose(1, 2).contiguous().transpose(1, 2) if heads_inside else x
            arguments[name] = x.requires_grad_()
        output = self.call(arguments)[0]
        inputs = [arguments[name] for name in ("query", "key", "value")]
        for x in (output, *torch.autograd.grad(output.sum(), inputs)):
            assert (x.transpose(1, 2) if heads_inside else x).is_contiguous()

    # ---- Rows without a key, and what stands where nobody looks ----

    @pytest.mark.parametrize("way", list(CLOSED_ROWS))
    def test_rows_without_a_key(self, way, implementation):
        """Output 0, log-sum-exp -inf, no gradient to anything, and none of second order."""
        arguments, _ = supported_arguments(
            self, BY_NAME["plain"], "cpu", implementation, torch.float64, **CLOSED_ROWS[way]()
        )
        tensors, join = self.split(arguments)
        inputs = [x.requires_grad_() for x in tensors]
        with forced(implementation):
            output, lse = self.call(join(inputs))
            assert (output == 0).all() and not output.signbit().any()
            assert (lse == -math.inf).all()
            grads = torch.autograd.grad(
                [output, lse],
                inputs,
                [torch.ones_like(output), torch.ones_like(lse)],
                create_graph=True,
            )
            assert all((g == 0).all() for g in grads)
            second = torch.autograd.grad(sum((g + 1).pow(2).sum() for g in grads), inputs,
                                         allow_unused=True)  # fmt: skip
        assert all(g is None or (g == 0).all() for g in second)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("mask_kind", list(MASKED_KEYS))
    def test_masked_out_values_do_not_leak(self, mask_kind, implementation, bad):
        """NaN or inf in a key and value that a mask closes for all queries changes neither outputs
        nor gradients; nor does NaN in a query without a key, or in its gradient. The fast kernels
        run a tile that met such a number again, with other instructions: so the bits of the
        additive score may differ by its own rounding, measured up to 2.4 eps. Float by the tiles of
        AMX is run again by AVX-512."""
        hidden, open_rows, extra = MASKED_KEYS[mask_kind]()
        arguments = self.arguments(BY_NAME["plain"], torch.float32, "cpu") | extra
        skip_unless_supported(self, arguments, implementation)
        clean, dirty = dict(arguments), dict(arguments)
        for name in ("key", "value"):
            clean[name] = arguments[name].masked_fill(hidden[:, None, :, None], 0.25)
            dirty[name] = arguments[name].masked_fill(hidden[:, None, :, None], bad)
        closed = ~open_rows[:, None, :, None]
        dirty["query"] = arguments["query"].masked_fill(closed, bad)

        def run(arguments: Arguments, grad: float) -> list[Tensor]:
            tensors, join = self.split(arguments)
            inputs = [x.detach().requires_grad_() for x in tensors]
            output, lse = self.call(join(inputs))
            grad_output = torch.cos(torch.arange(output.numel()).view(output.shape) * 1.0)
            grad_output = grad_output.masked_fill(closed, grad)
            return [output, lse, *torch.autograd.grad(output, inputs, grad_output)]

        with forced(implementation):
            want, got = run(clean, 0.0), run(dirty, bad)
        eps = torch.finfo(torch.float32).eps
        exact = self.score == "dot" and implementation != "amx"
        torch.testing.assert_close(got, want, rtol=0, atol=0 if exact else 8 * eps)

    @pytest.mark.parametrize("mask_kind", list(MASKED_KEYS))
    def test_masked_out_values_do_not_leak_second_order(self, mask_kind):
        """The same for the composed derivatives: double backward, torch.func and forward mode."""
        hidden, _, extra = MASKED_KEYS[mask_kind]()
        arguments = self.arguments(BY_NAME["plain"], torch.float64, "cpu") | extra
        results = []
        for fill in (0.25, math.nan):
            filled = {
                name: arguments[name].masked_fill(hidden[:, None, :, None], fill)
                for name in ("key", "value")
            }
            tensors, join = self.split(arguments | filled)

            def loss(*inputs: Tensor, join: Any = join) -> Tensor:
                return self.call(join(inputs))[0].sin().sum()

            inputs = [x.detach().requires_grad_() for x in tensors]
            grads = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.sin().sum() for g in grads), inputs)
            func = torch.func.grad(loss, tuple(range(len(inputs))))(*tensors)
            tangents = tuple(torch.ones_like(x) for x in tensors)
            jvp = torch.func.jvp(loss, tuple(tensors), tangents)
            results.append([*grads, *second, *func, *jvp])
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)

    def test_nan_stays_in_its_row(self, implementation):
        """NaN in a key reaches the queries that attend to it, and no others."""
        arguments, _ = supported_arguments(self, BY_NAME["causal"], "cpu", implementation)
        arguments["key"][:, :, 2] = math.nan
        with forced(implementation):
            output, lse = self.call(arguments)
        assert output[:, :, :2].isfinite().all() and lse[:, :, :2].isfinite().all()
        assert output[:, :, 2:].isnan().all() and lse[:, :, 2:].isnan().all()

    # ---- Far from 0 ----

    def test_scores_beyond_float16(self, implementation):
        """Scores of 1e5 and more from float16 inputs: softmax in float32, as wanted."""
        problem = Problem("beyond float16", (1, 2, 5, 16), (1, 2, 7, 16), (1, 2, 7, 4))
        arguments = self.arguments(problem, torch.float16, "cpu")
        skip_unless_supported(self, arguments, implementation)
        for name in ("query", "key") if self.score == "dot" else ("weight",):
            arguments[name] = arguments[name] * (300 if self.score == "dot" else 2e4)
        arguments["scale"] = 1.0
        with forced(implementation):
            got = self.call(arguments)
        want = self.reference(arguments, None)
        assert want[1].abs().max() > 65504
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=0)

    def test_overflowing_scores(self, dtype, implementation):
        """Scores that overflow are the largest number: no NaN, and weights that add up to 1."""
        if dtype in (torch.float16, torch.bfloat16):
            pytest.skip("scores of 16-bit inputs are float32")
        problem = Problem("overflow", (1, 1, 6, 4), (1, 1, 7, 4), (1, 1, 7, 3))
        arguments = self.arguments(problem, dtype, "cpu")
        skip_unless_supported(self, arguments, implementation)
        # Each score of one sign: a sum of +inf and -inf is NaN by anybody's arithmetic.
        largest = torch.finfo(dtype).max
        arguments["query"] = arguments["query"].abs() + 1
        signs = torch.tensor([1, -1, 1, -1, -1, 1, -1], dtype=dtype)[:, None]
        arguments["key"] = (arguments["key"].abs() + 1) * signs
        if self.score == "dot":
            arguments["query"] *= largest**0.6
            arguments["key"] *= largest**0.6
        else:
            arguments["key"] *= 100  # the sign of the tanh
            arguments["weight"] = torch.full_like(arguments["weight"], largest / 16)
            arguments["scale"] = 100.0
        arguments["value"] = torch.ones_like(arguments["value"]).requires_grad_()
        with forced(implementation):
            output, lse = self.call(arguments)
            (grad_value,) = torch.autograd.grad(output.sum(), arguments["value"])
        torch.testing.assert_close(output, torch.ones_like(output))
        assert not lse.isnan().any()
        # Six queries share the three keys of positive score.
        want = torch.where(signs > 0, 6 / 3, 0.0).expand(1, 1, 7, 3)
        torch.testing.assert_close(grad_value, want.to(dtype))

    @pytest.mark.parametrize("bias", ["finfo.min", "inf"])
    def test_extreme_masks(self, bias, implementation):
        """finfo.min is a number: a row that has nothing else attends to all its keys alike, as in
        PyTorch. +inf takes all the weight."""
        problem = Problem("extreme mask", (1, 1, 3, 4), (1, 1, 4, 4), (1, 1, 4, 3))
        arguments = self.arguments(problem, torch.float32, "cpu")
        skip_unless_supported(self, arguments, implementation)
        value = arguments["value"]
        mask = torch.zeros(3, 4)
        if bias == "inf":
            mask[:, 1] = math.inf
            want = value[:, :, 1:2].expand(1, 1, 3, 3)
        else:
            mask[:] = torch.finfo(torch.float32).min
            want = value.mean(-2, keepdim=True).expand(1, 1, 3, 3)
        with forced(implementation):
            output = self.output_only(arguments | {"attn_mask": mask})
        if bias == "inf":
            torch.testing.assert_close(output, want)
        else:  # which of the keys win depends on the rounding of score + mask, none is NaN
            assert output.isfinite().all()
            assert (output <= value.amax(-2, keepdim=True) + 1e-5).all()
            assert (output >= value.amin(-2, keepdim=True) - 1e-5).all()

    def test_large_offset_of_all_scores(self, implementation):
        """A constant added to a row of scores changes its log-sum-exp alone."""
        arguments = self.arguments(BY_NAME["plain"], torch.float64, "cpu")
        skip_unless_supported(self, arguments, implementation)
        with forced(implementation):
            output, lse = self.call(arguments)
            for offset in (1e4, -1e4, 1e8):
                mask = torch.full((4, 1), offset, dtype=torch.float64)
                moved, moved_lse = self.call(arguments | {"attn_mask": mask})
                # Adding the offset rounds each score to a multiple of eps * |offset|.
                atol = 8 * torch.finfo(torch.float64).eps * abs(offset)
                torch.testing.assert_close(moved, output, rtol=0, atol=atol)
                torch.testing.assert_close(moved_lse - offset, lse, rtol=0, atol=atol)

    # ---- Dropout ----

    def dropout_mask(
        self, p: float, seed: int, keys: int = 37, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """The factors, seen through equal weights and an identity as value."""
        query = torch.zeros(2, 3, 50, 4, dtype=dtype)
        key = torch.zeros(2, 3, keys, 4, dtype=dtype)
        value = torch.eye(keys, dtype=dtype).expand(2, 3, keys, keys)
        weight = [torch.zeros(4, dtype=dtype)] if self.score == "additive" else []
        torch.manual_seed(seed)
        op = getattr(OPS, self.op.removesuffix("_with_lse"))
        return op(query, key, value, *weight, dropout_p=p) * keys

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_dropout_statistics(self, p, implementation):
        try:
            with forced(implementation):
                factors = self.dropout_mask(p, seed=1)
        except NotImplementedError as e:  # test_dropout_same_on_every_implementation compares it
            pytest.skip(str(e).splitlines()[0])
        kept = factors > 0
        torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)))
        n = factors.numel()
        sigma = math.sqrt(p * (1 - p) / n)
        assert abs(kept.double().mean().item() - (1 - p)) < 4 * sigma
        # No pattern along keys, queries, heads or samples: neighbours agree by chance only.
        for dim in range(4):
            pairs = kept.narrow(dim, 1, kept.shape[dim] - 1) == kept.narrow(
                dim, 0, kept.shape[dim] - 1
            )
            chance = p * p + (1 - p) * (1 - p)
            assert abs(pairs.double().mean().item() - chance) < 6 * math.sqrt(0.25 / pairs.numel())

    def test_dropout_seed(self):
        """The same numbers after the same seed, others in the next call; none are drawn for p 0."""
        first = self.dropout_mask(0.5, seed=1)
        assert torch.equal(first, self.dropout_mask(0.5, seed=1))
        assert not torch.equal(first, self.dropout_mask(0.5, seed=2))
        arguments = self.arguments(BY_NAME["dropout"], torch.float32, "cpu")
        self.seed()
        assert not torch.equal(self.output_only(arguments), self.output_only(arguments))
        state = torch.get_rng_state()
        self.output_only(arguments | {"dropout_p": 0.0})
        assert torch.equal(state, torch.get_rng_state())

    def test_dropout_same_on_every_implementation(self):
        masks = []
        for name, dtype in itertools.product(implementations("cpu"), DTYPES):
            with contextlib.suppress(NotImplementedError), forced(name):
                masks.append(self.dropout_mask(0.3, seed=3, dtype=dtype) > 0)
        assert masks and all(torch.equal(m, masks[0]) for m in masks)

    def test_dropout_of_everything(self, implementation):
        arguments = self.arguments(BY_NAME["dropout and mask"], torch.float32, "cpu")
        skip_unless_supported(self, arguments, implementation)
        with forced(implementation):
            tensors, join = self.split(arguments | {"dropout_p": 1.0})
            inputs = [x.requires_grad_() for x in tensors]
            output, lse = self.call(join(inputs))
            assert (output == 0).all()
            grads = torch.autograd.grad(output.sum(), inputs)
            want = self.call(arguments | {"dropout_p": 0.0})[1]
        assert all((g == 0).all() for g in grads)
        assert torch.equal(lse, want)

    # ---- Any shapes, masks and strides ----

    # Two classes inherit it, which is what this health check warns of.
    @hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.differing_executors])
    @hypothesis.given(data=st.data())
    def test_random_problems(self, data):
        size = st.integers(1, 9)
        batch, groups, per_group = (data.draw(st.integers(1, 3)) for _ in range(3))
        queries, keys, dim, value_dim = (data.draw(size) for _ in range(4))
        heads = groups * per_group
        mask = None
        kind = data.draw(st.sampled_from([None, "bool", "float", "float32"]))
        if kind is not None:
            full = (batch, heads, queries, keys)
            rank = data.draw(st.integers(1, 4))
            shape = tuple(n if data.draw(st.booleans()) else 1 for n in full[4 - rank :])
            mask = Mask(kind, shape)

        def index(low: int, high: int) -> Any:
            if not data.draw(st.booleans()):
                return None
            return [data.draw(st.integers(low, high)) for _ in range(batch)]

        problem = Problem(
            f"random {data.draw(st.integers(0, 99))}",
            (batch, heads, queries, dim),
            (batch, groups, keys, dim),
            (batch, groups, keys, value_dim),
            mask=mask,
            key_lengths=index(0, keys),
            key_starts=index(0, keys),
            query_offsets=index(-4, 4),
            slopes=data.draw(st.sampled_from([None, (heads,), (batch, heads)])),
            slopes_dtype=data.draw(st.sampled_from([None, torch.float32])),
            options={
                "enable_gqa": True,
                "window_left": data.draw(st.integers(-1, 6)),
                "window_right": data.draw(st.integers(-1, 6)),
                "query_offset": data.draw(st.integers(-4, 6)),
            },
        )
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
        arguments = self.arguments(problem, dtype, "cpu")
        for name in ("query", "key", "value"):
            layout = data.draw(st.sampled_from(["as it is", *LAYOUTS]))
            arguments[name] = LAYOUTS.get(layout, lambda x: x)(arguments[name])
        name = data.draw(st.sampled_from(implementations("cpu")))
        hypothesis.assume(not why_not_supported(self, arguments, name))
        with forced(name):
            self.check(arguments, dtype, name)
