"""The Python fronts: they pass every argument on, agree with the reference, script and vmap."""

import inspect
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import torch_selfattn
from torch_selfattn import functional, reference

FRONTS = [getattr(functional, name) for name in functional.__all__]
B, H, LQ, LK, E, EV = 2, 4, 5, 7, 6, 3


def problem(kv_heads: int = H, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    query = torch.randn(B, H, LQ, E, dtype=dtype)
    key = torch.randn(B, kv_heads, LK, E, dtype=dtype)
    value = torch.randn(B, kv_heads, LK, EV, dtype=dtype)
    weight = torch.randn(H, E, dtype=dtype)
    return [x.requires_grad_() for x in (query, key, value, weight)]


def bool_mask(*shape: int) -> torch.Tensor:
    mask = torch.rand(*shape) < 0.6
    mask[..., 0, :] = False  # and one row without a key
    return mask


# Each exercises some arguments, so that exchanging two of them in a front shows.
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
    "bool mask": {"attn_mask": bool_mask(B, 1, LQ, LK)},
    "float mask": {"attn_mask": torch.randn(H, LQ, LK, dtype=torch.float64)},
    "grouped": {"enable_gqa": True},
    "lengths": {"key_lengths": torch.tensor([7, 4])},
    "starts": {"key_starts": torch.tensor([2, 0])},
    "lengths and starts": {
        "key_lengths": torch.tensor([5, 0]),
        "key_starts": torch.tensor([1, 0]),
    },
    "window left": {"window_left": 2},
    "window right": {"window_right": 1},
    "window and offset": {"window_left": 1, "window_right": 2, "query_offset": 2},
    "offsets": {"is_causal": True, "query_offset": 1, "query_offsets": torch.tensor([0, 2])},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, -0.3], dtype=torch.float64)},
    "slopes and offsets": {
        "alibi_slopes": torch.linspace(-0.5, 0.5, B * H).view(B, H),
        "query_offset": 1,
        "query_offsets": torch.tensor([0, 2]),
    },
}


def options(name: str) -> dict:
    return dict(OPTIONS[name])


def gradients(outputs, inputs) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in outputs]
    # A row without a key has lse -inf; its gradient is 0 whatever comes in.
    return list(torch.autograd.grad(outputs, inputs, grads, allow_unused=True))


@pytest.mark.parametrize("front", FRONTS, ids=lambda f: f.__name__)
def test_signature_is_that_of_the_operator(front) -> None:
    schema = getattr(torch.ops.torch_selfattn, front.__name__).default._schema
    parameters = inspect.signature(front).parameters.values()
    assert [p.name for p in parameters] == [a.name for a in schema.arguments]
    for parameter, argument in zip(parameters, schema.arguments, strict=True):
        if argument.has_default_value():
            assert parameter.default == argument.default_value, parameter
        else:
            assert parameter.default is inspect.Parameter.empty, parameter
    assert front.__doc__


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_agrees_with_the_reference(score: str, name: str) -> None:
    kwargs = options(name)
    q, k, v, w = problem(kv_heads=2 if name == "grouped" else H)
    arguments = (q, k, v) if score == "dot" else (q, k, v, w)
    function = {"dot": "dot_product_attention", "additive": "additive_attention"}[score]
    if kwargs.get("attn_mask") is not None and kwargs["attn_mask"].is_floating_point():
        kwargs["attn_mask"] = kwargs["attn_mask"].clone().requires_grad_()
        inputs = [*arguments, kwargs["attn_mask"]]
    else:
        inputs = list(arguments)

    expected = getattr(reference, function + "_with_lse")(*arguments, **kwargs)
    out, lse = getattr(functional, function + "_with_lse")(*arguments, **kwargs)
    torch.testing.assert_close((out, lse), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        gradients((out, lse), inputs), gradients(expected, inputs), atol=1e-11, rtol=1e-11
    )
    alone = getattr(functional, function)(*arguments, **kwargs)
    torch.testing.assert_close(alone, out, atol=0, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_attention_weights(score: str, name: str) -> None:
    kwargs = options(name)
    q, k, _, w = problem(kv_heads=2 if name == "grouped" else H)
    weight = w if score == "additive" else None
    rows, heads = torch.tensor([4, 0, 1]), torch.tensor([3, 1])
    for chosen in ({}, {"rows": rows}, {"heads": heads}, {"rows": rows, "heads": heads}):
        ours = functional.attention_weights(q, k, weight, **chosen, **kwargs)
        expected = reference.attention_weights(q, k, weight, **chosen, **kwargs)
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
        total = ours.sum(-1)
        assert ((total - 1).abs() < 1e-12).logical_or(total == 0).all()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_multi_head_attention(split: bool, biased: bool, batched: bool) -> None:
    heads, kv_heads, dim = 4, 2, 3
    embed, kv = heads * dim, kv_heads * dim
    shapes = [(embed, 5), (kv, 5), (kv, 5)] if split else [(embed + 2 * kv, 5)]
    weights = [torch.randn(s, dtype=torch.float64) for s in shapes]
    biases = [torch.randn(s[0], dtype=torch.float64) for s in shapes] if biased else []
    out_weight = torch.randn(8, embed, dtype=torch.float64)
    out_bias = torch.randn(8, dtype=torch.float64) if biased else None
    lead = (2,) if batched else ()
    query = torch.randn(*lead, LQ, 5, dtype=torch.float64)
    key, value = torch.randn(2, *lead, LK, 5, dtype=torch.float64)
    for score_weight in (None, torch.randn(heads, dim, dtype=torch.float64)):
        arguments = (
            query, key, value, heads, weights, biases, out_weight, out_bias, score_weight, kv_heads
        )  # fmt: skip
        ours = functional.multi_head_attention(*arguments, window_left=3, window_right=1, scale=0.3)
        expected = reference.multi_head_attention(
            *arguments, window_left=3, window_right=1, scale=0.3
        )
        assert ours.shape == (*lead, LQ, 8)
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("front", FRONTS, ids=lambda f: f.__name__)
def test_scripted_front(front) -> None:
    scripted = torch.jit.script(front)
    q, k, v, w = problem()
    heads = [torch.randn(H * E * 3, 9, dtype=torch.float64)], []
    arguments = {
        "additive_attention": (q, k, v, w),
        "additive_attention_with_lse": (q, k, v, w),
        "attention_weights": (q, k, w),
        "multi_head_attention": (
            *torch.randn(3, B, LQ, 9, dtype=torch.float64), H, *heads,
            torch.randn(9, H * E, dtype=torch.float64),
        ),
    }.get(front.__name__, (q, k, v))  # fmt: skip
    for kwargs in ({}, {"is_causal": True, "scale": 0.4}, {"window_left": 1, "query_offset": 2}):
        result = scripted(*arguments, **kwargs)
        expected = front(*arguments, **kwargs)
        if isinstance(expected, str):
            assert result == expected
        else:
            torch.testing.assert_close(result, expected, atol=0, rtol=0)


# The reference itself: against PyTorch, and what it promises beyond.


@pytest.mark.parametrize("name", ["plain", "causal", "scale", "float mask", "grouped"])
def test_reference_agrees_with_pytorch(name: str) -> None:
    kwargs = options(name)
    q, k, v, _ = problem(kv_heads=2 if name == "grouped" else H)
    expected = F.scaled_dot_product_attention(q, k, v, **kwargs)
    torch.testing.assert_close(reference.dot_product_attention(q, k, v, **kwargs), expected)


def test_reference_additive_score_is_the_formula() -> None:
    q, k, v, w = problem()
    out = reference.additive_attention(q, k, v, w, scale=0.5)
    b, h, i = 1, 2, 3
    scores = [0.5 * (w[h] * torch.tanh(q[b, h, i] + k[b, h, j])).sum() for j in range(LK)]
    p = torch.stack(scores).softmax(0)
    torch.testing.assert_close(out[b, h, i], (p[:, None] * v[b, h]).sum(0))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 4, 5), (3, 2, 4, 5)])
def test_reference_takes_any_rank(shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(3, *shape, E, dtype=torch.float64)
    out, lse = reference.dot_product_attention_with_lse(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert lse.shape == shape
    torch.testing.assert_close(functional.dot_product_attention(q, k, v), out)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_what_is_masked_out_changes_nothing(score: str) -> None:
    """In the reference and the operator: NaN behind a mask, and a row without a key."""
    q, k, v, w = problem()
    mask = torch.ones(B, 1, LQ, LK, dtype=torch.bool)
    mask[:, :, :, 3] = False
    mask[0, :, 2] = False
    clean = [x.detach().clone() for x in (q, k, v, w)]
    dirty = [x.clone() for x in clean]
    dirty[1][:, :, 3], dirty[2][:, :, 3] = math.nan, math.inf
    results = []
    for module, inputs in itertools.product((reference, functional), (clean, dirty)):
        inputs = [x.clone().requires_grad_() for x in inputs]
        if score == "dot":
            out, lse = module.dot_product_attention_with_lse(*inputs[:3], mask)
            inputs = inputs[:3]
        else:
            out, lse = module.additive_attention_with_lse(*inputs, mask)
        assert (out[0, :, 2] == 0).all() and (lse[0, :, 2] == -math.inf).all()
        grads = gradients((out, lse), inputs)
        assert (grads[0][0, :, 2] == 0).all() and (grads[1][:, :, 3] == 0).all()
        results.append((out, lse, grads))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-11, rtol=1e-11)


def test_reference_second_derivatives() -> None:
    q, k, v = torch.randn(3, 1, 1, 3, 2, dtype=torch.float64).requires_grad_()
    w = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    f = reference.additive_attention
    assert torch.autograd.gradgradcheck(lambda *x: f(*x, attn_mask=mask), (q, k, v, w))


# Choice of the implementation.


def test_use_implementation_holds_and_restores() -> None:
    q, k, v, _ = problem()
    best = torch_selfattn.explain(q, k, v)
    assert "dot_product_attention" in best and "reference" in best
    with torch_selfattn.use_implementation("reference"):
        assert "reference: runs (forced)" in torch_selfattn.explain(q, k, v)
        forced = torch_selfattn.dot_product_attention(q, k, v)
        with pytest.raises(ValueError, match="no such thing"):
            with torch_selfattn.use_implementation("no such thing"):
                torch_selfattn.dot_product_attention(q, k, v)
        assert "reference: runs (forced)" in torch_selfattn.explain(q, k, v)
    assert torch_selfattn.explain(q, k, v) == best
    torch.testing.assert_close(forced, torch_selfattn.dot_product_attention(q, k, v))


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_autocast_brings_dtypes_together(score: str, dtype: torch.dtype) -> None:
    """A projected query and a weight or cache in float32 meet under autocast."""
    tensors = problem(dtype=torch.float32)
    exact = attend_by(score, *tensors)
    for low in itertools.product((False, True), repeat=3):
        cast = [x.to(dtype) if to else x for x, to in zip(tensors[:3], low, strict=True)]
        with torch.autocast("cpu", dtype):
            out = attend_by(score, *cast, tensors[3])
            weights = functional.attention_weights(
                *cast[:2], tensors[3] if score != "dot" else None
            )
        assert out.dtype == dtype and weights.dtype == cast[0].dtype
        torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)
        wanted = tensors if score == "additive" else tensors[:3]
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), wanted))


def attend_by(score: str, q, k, v, w) -> torch.Tensor:
    if score == "dot":
        return functional.dot_product_attention(q, k, v)
    return functional.additive_attention(q, k, v, w)


def test_autocast_lets_no_other_dtypes_through() -> None:
    q, k, v, w = problem(dtype=torch.float32)
    for device in ("cpu", "cuda"):  # the one that is there, and one that casts nothing here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # autocast for a GPU that is not there
            with torch.autocast(device, torch.bfloat16):
                with pytest.raises(RuntimeError, match="weight must have the dtype of query"):
                    functional.additive_attention(q, k, v, w.double())
                with pytest.raises(RuntimeError, match="to have the same dtype"):
                    functional.dot_product_attention(q, k.double(), v)


def test_autocast_compiled() -> None:
    q, k, v, w = (x.detach() for x in problem(dtype=torch.float32))

    def f(q, k, v, w):
        return functional.additive_attention(q.bfloat16(), k, v, w)

    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("ignore")
        expected = f(q, k, v, w)
        out = torch.compile(f, backend="aot_eager", fullgraph=True)(q, k, v, w)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_mask", 1), ("dropout_p", "0"), ("is_causal", "no"), ("scale", "1"),
        ("enable_gqa", "no"), ("key_lengths", 1), ("key_starts", 1), ("window_left", "-1"),
        ("window_right", None), ("query_offset", "0"), ("query_offsets", 1),
        ("alibi_slopes", 1),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_beside_defaults(score, name, value):
    """A call that says nothing but this is not taken for a plain one."""
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises((RuntimeError, TypeError), match=name):
        if score == "dot":
            torch_selfattn.dot_product_attention(x, x, x, **{name: value})
        else:
            torch_selfattn.additive_attention(x, x, x, torch.randn(4), **{name: value})


def test_a_plain_call_may_have_a_symbolic_offset():
    """Nothing looks at it: no guard on its value, so no second compilation."""
    x = torch.randn(1, 2, 3, 4)
    compiled = torch.compile(
        lambda x, offset: torch_selfattn.dot_product_attention(x, x, x, query_offset=offset),
        backend="eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    want = torch_selfattn.dot_product_attention(x, x, x)
    for offset in (5, 0, 1, -3):
        with torch.compiler.set_stance("default" if offset == 5 else "fail_on_recompile"):
            assert torch.equal(compiled(x, offset), want)


def test_slopes_are_those_of_the_paper() -> None:
    """alibi_slopes against the paper's own code."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    def get_slopes(n: int) -> list[float]:
        if math.log2(n).is_integer():
            return power_of_two(n)
        closest = 2 ** math.floor(math.log2(n))
        return power_of_two(closest) + get_slopes(2 * closest)[0::2][: n - closest]

    scripted = torch.jit.script(torch_selfattn.alibi_slopes)
    for heads in (*range(1, 34), 40, 64, 71, 112):
        want = torch.tensor(get_slopes(heads), dtype=torch.float64)
        for function in (torch_selfattn.alibi_slopes, scripted):
            got = function(heads, dtype=torch.float64)
            torch.testing.assert_close(got, want, atol=0, rtol=1e-14)
            assert torch.equal(function(heads), got.float())
    with pytest.raises(ValueError, match=r"num_heads must be positive \(got num_heads=0\)"):
        torch_selfattn.alibi_slopes(0)


def test_slopes_of_causal_attention_are_the_original_ones() -> None:
    """slope * j, as in the paper, differs by a constant of the row, which only lse shows."""
    q, k, v, _ = problem()
    slopes = torch_selfattn.alibi_slopes(H)
    out, lse = functional.dot_product_attention_with_lse(
        q, k, v, is_causal=True, query_offset=LK - LQ, alibi_slopes=slopes
    )
    bias = slopes[:, None, None] * torch.arange(LK)
    original, shifted = functional.dot_product_attention_with_lse(
        q, k, v, bias, window_right=0, query_offset=LK - LQ
    )
    torch.testing.assert_close(out, original, atol=1e-12, rtol=1e-12)
    position = torch.arange(LQ) + LK - LQ
    torch.testing.assert_close(lse, shifted - slopes[:, None] * position, atol=1e-12, rtol=1e-12)
