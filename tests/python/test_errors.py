"""Every rule about arguments: the type and the text of its error, the same from Python, from
TorchScript and on meta tensors (so under torch.compile and torch.export)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from operator_tester import OPS
from torch import Tensor

import torch_selfattn

DOT = "dot_product_attention"
ADDITIVE = "additive_attention"
WEIGHTS = "attention_weights"
MULTI = "multi_head_attention"


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def index(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def valid(op: str) -> dict[str, Any]:
    """Arguments that op accepts, the starting point of each wrong call."""
    arguments: dict[str, Any] = {
        "query": zeros(2, 4, 3, 8),
        "key": zeros(2, 4, 5, 8),
        "value": zeros(2, 4, 5, 6),
    }
    if op == ADDITIVE:
        arguments["weight"] = zeros(8)
    if op == WEIGHTS:
        del arguments["value"]
    if op == MULTI:
        arguments = {
            "query": zeros(2, 3, 8),
            "key": zeros(2, 5, 8),
            "value": zeros(2, 5, 8),
            "num_heads": 4,
            "in_proj_weight": [zeros(24, 8)],
            "in_proj_bias": [zeros(24)],
            "out_proj_weight": zeros(8, 8),
        }
    return arguments


@dataclass
class Wrong:
    """text: all of the message after "op: "; None: the value is only known to the kernel, so that
    meta tensors cannot refuse it."""

    error: type[Exception]
    text: str
    changes: dict[str, Any] = field(default_factory=dict)
    ops: tuple[str, ...] = (DOT, ADDITIVE)
    on_meta: bool = True


Q, K, V = "query=[2, 4, 3, 8]", "key=[2, 4, 5, 8]", "value=[2, 4, 5, 6]"
GOT = f"(got {Q}, {K}, {V})"

WRONG = {
    "rank": Wrong(
        RuntimeError,
        "Expected query, key, and value to all be  at least 2 dimensional (got query=[8], "
        f"{K}, {V})",
        {"query": zeros(8)},
    ),
    "dtypes": Wrong(
        RuntimeError,
        "Expected query, key, and value to have the same dtype (got query=float, key=double, "
        "value=float)",
        {"key": zeros(2, 4, 5, 8, dtype=torch.float64)},
    ),
    "dtype": Wrong(
        NotImplementedError,
        "query must be float64, float32, float16 or bfloat16 (got query.dtype=int)",
        {
            "query": zeros(2, 4, 3, 8, dtype=torch.int32),
            "key": zeros(2, 4, 5, 8, dtype=torch.int32),
            "value": zeros(2, 4, 5, 6, dtype=torch.int32),
        },
    ),
    "head dim": Wrong(
        RuntimeError,
        f"query and key must have the same head dim (got {Q}, key=[2, 4, 5, 7])",
        {"key": zeros(2, 4, 5, 7)},
    ),
    "lengths": Wrong(
        RuntimeError,
        f"key and value must have the same length (got {K}, value=[2, 4, 9, 6])",
        {"value": zeros(2, 4, 9, 6)},
    ),
    "batches": Wrong(
        RuntimeError,
        f"leading dimensions must be broadcastable (got {Q}, key=[3, 4, 5, 8], {V})",
        {"key": zeros(3, 4, 5, 8)},
    ),
    "heads": Wrong(
        RuntimeError,
        "query, key and value must have the same number of heads or one, unless enable_gqa (got "
        f"{Q}, key=[2, 2, 5, 8], {V})",
        {"key": zeros(2, 2, 5, 8)},
    ),
    "grouped heads": Wrong(
        RuntimeError,
        "Number of heads in key and value must divide the number of heads in query (got "
        f"{Q}, key=[2, 3, 5, 8], value=[2, 3, 5, 6])",
        {"key": zeros(2, 3, 5, 8), "value": zeros(2, 3, 5, 6), "enable_gqa": True},
    ),
    "no key heads": Wrong(
        RuntimeError,
        "Number of heads in key and value must divide the number of heads in query (got "
        f"{Q}, key=[2, 0, 5, 8], value=[2, 0, 5, 6])",
        {"key": zeros(2, 0, 5, 8), "value": zeros(2, 0, 5, 6), "enable_gqa": True},
    ),
    "mask and causal": Wrong(
        RuntimeError,
        "Explicit attn_mask should not be set when is_causal=True; a mask and causal is the mask "
        "and window_right=0 (got attn_mask=[3, 5], is_causal=True)",
        {"attn_mask": zeros(3, 5), "is_causal": True},
    ),
    "mask dtype": Wrong(
        RuntimeError,
        "Expected attn_mask dtype to be bool or float or to match query dtype (got "
        "attn_mask=double, query=float)",
        {"attn_mask": zeros(3, 5, dtype=torch.float64)},
    ),
    "integer mask": Wrong(
        RuntimeError,
        "Expected attn_mask dtype to be bool or float or to match query dtype (got "
        "attn_mask=long int, query=float)",
        {"attn_mask": zeros(3, 5, dtype=torch.int64)},
    ),
    "mask columns": Wrong(
        RuntimeError,
        "attn_mask must be broadcastable to [2, 4, 3, 5] (got attn_mask=[3, 4])",
        {"attn_mask": zeros(3, 4)},
    ),
    "mask heads": Wrong(
        RuntimeError,
        "attn_mask must be broadcastable to [2, 4, 3, 5] (got attn_mask=[2, 3, 5])",
        {"attn_mask": zeros(2, 3, 5)},
    ),
    "mask batch": Wrong(
        RuntimeError,
        "attn_mask must be broadcastable to [2, 4, 3, 5] (got attn_mask=[3, 1, 3, 5])",
        {"attn_mask": zeros(3, 1, 3, 5)},
    ),
    "mask rank": Wrong(
        RuntimeError,
        "attn_mask must be broadcastable to [2, 4, 3, 5] (got attn_mask=[1, 2, 4, 3, 5])",
        {"attn_mask": zeros(1, 2, 4, 3, 5)},
    ),
    **{
        f"{name} shape": Wrong(
            RuntimeError,
            f"{name} must have one element per sample, shape [2] (got {name}=[3])",
            {name: index(1, 1, 1)},
        )
        for name in ("key_lengths", "key_starts", "query_offsets")
    },
    **{
        f"{name} dtype": Wrong(
            RuntimeError,
            f"{name} must be int64 or int32 (got {name}.dtype=float)",
            {name: zeros(2)},
        )
        for name in ("key_lengths", "key_starts", "query_offsets")
    },
    "slopes heads": Wrong(
        RuntimeError,
        "alibi_slopes must have the shape [4] or [2, 4] (got alibi_slopes=[3])",
        {"alibi_slopes": zeros(3)},
    ),
    "slopes batch": Wrong(
        RuntimeError,
        "alibi_slopes must have the shape [4] or [2, 4] (got alibi_slopes=[3, 4])",
        {"alibi_slopes": zeros(3, 4)},
    ),
    "slopes rank": Wrong(
        RuntimeError,
        "alibi_slopes must have the shape [4] or [2, 4] (got alibi_slopes=[1, 2, 4])",
        {"alibi_slopes": zeros(1, 2, 4)},
    ),
    "one slope": Wrong(
        RuntimeError,
        "alibi_slopes must have the shape [4] or [2, 4] (got alibi_slopes=[])",
        {"alibi_slopes": zeros()},
    ),
    "slopes dtype": Wrong(
        RuntimeError,
        "alibi_slopes must be float32 or have the dtype of query (got query=float, "
        "alibi_slopes=double)",
        {"alibi_slopes": zeros(4, dtype=torch.float64)},
    ),
    "key_lengths too large": Wrong(
        ValueError,
        "key_lengths must be between 0 and the key length (got key_lengths[1]=6, key length 5)",
        {"key_lengths": index(5, 6)},
        on_meta=False,
    ),
    "key_starts negative": Wrong(
        ValueError,
        "key_starts must be between 0 and the key length (got key_starts[0]=-1, key length 5)",
        {"key_starts": index(-1, 2, dtype=torch.int32)},
        on_meta=False,
    ),
    "dropout_p above 1": Wrong(
        ValueError, "dropout_p must be between 0 and 1 (got dropout_p=1.5)", {"dropout_p": 1.5}
    ),
    "dropout_p below 0": Wrong(
        ValueError, "dropout_p must be between 0 and 1 (got dropout_p=-0.1)", {"dropout_p": -0.1}
    ),
    "dropout_p NaN": Wrong(
        ValueError,
        "dropout_p must be between 0 and 1 (got dropout_p=nan)",
        {"dropout_p": float("nan")},
    ),
    "window_left": Wrong(
        ValueError,
        "window_left must be -1 (open) or more (got window_left=-2)",
        {"window_left": -2},
    ),
    "window_right": Wrong(
        ValueError,
        "window_right must be -1 (open) or more (got window_right=-3)",
        {"window_right": -3},
    ),
    "activation": Wrong(
        ValueError,
        "activation must be tanh, leaky_relu or relu (got activation=gelu)",
        {"activation": "gelu"},
        (ADDITIVE, WEIGHTS, MULTI),
    ),
    "activation of a dot product": Wrong(
        ValueError,
        "activation belongs to the additive score, which needs a weight (got activation=relu)",
        {"activation": "relu"},
        (WEIGHTS, MULTI),
    ),
    "negative_slope": Wrong(
        ValueError,
        "negative_slope must be finite (got negative_slope=inf)",
        {"activation": "leaky_relu", "negative_slope": float("inf")},
        (ADDITIVE,),
    ),
    "weight columns": Wrong(
        RuntimeError,
        f"weight must have as many columns as query (got {Q}, weight=[7])",
        {"weight": zeros(7)},
        (ADDITIVE,),
    ),
    "weight heads": Wrong(
        RuntimeError,
        f"weight must have the shape (E) or (H, E) (got weight=[3, 8], {Q})",
        {"weight": zeros(3, 8)},
        (ADDITIVE,),
    ),
    "weight rank": Wrong(
        RuntimeError,
        f"weight must have the shape (E) or (H, E) (got weight=[1, 4, 8], {Q})",
        {"weight": zeros(1, 4, 8)},
        (ADDITIVE,),
    ),
    "weight scalar": Wrong(
        RuntimeError,
        f"weight must have as many columns as query (got {Q}, weight=[])",
        {"weight": zeros()},
        (ADDITIVE,),
    ),
    "weight dtype": Wrong(
        RuntimeError,
        "weight must have the dtype of query (got query=float, weight=double)",
        {"weight": zeros(8, dtype=torch.float64)},
        (ADDITIVE,),
    ),
    "rows": Wrong(
        RuntimeError,
        "rows must be int64 or int32, one dimension (got rows=[1, 2] long int)",
        {"rows": torch.zeros(1, 2, dtype=torch.int64)},
        (WEIGHTS,),
    ),
    "heads dtype": Wrong(
        RuntimeError,
        "heads must be int64 or int32, one dimension (got heads=[2] float)",
        {"heads": zeros(2)},
        (WEIGHTS,),
    ),
    "weights, head dim": Wrong(
        RuntimeError,
        f"query and key must have the same head dim (got {Q}, key=[2, 4, 5, 7])",
        {"key": zeros(2, 4, 5, 7)},
        (WEIGHTS,),
    ),
    "multi, rank": Wrong(
        RuntimeError,
        "query, key and value must be (B, L, D) or (L, D) (got query=[3, 8], key=[2, 5, 8], "
        "value=[2, 5, 8])",
        {"query": zeros(3, 8)},
        (MULTI,),
    ),
    "multi, groups": Wrong(
        ValueError,
        "num_heads must be a multiple of num_kv_heads (got num_heads=4, num_kv_heads=3)",
        {"num_kv_heads": 3},
        (MULTI,),
    ),
    "multi, no heads": Wrong(
        ValueError,
        "num_heads must be a multiple of num_kv_heads (got num_heads=0, num_kv_heads=0)",
        {"num_heads": 0},
        (MULTI,),
    ),
    "multi, two weights": Wrong(
        RuntimeError,
        "in_proj_weight must be one packed weight or three (got 2)",
        {"in_proj_weight": [zeros(8, 8), zeros(8, 8)]},
        (MULTI,),
    ),
    "multi, biases": Wrong(
        RuntimeError,
        "in_proj_bias must be empty or have as many tensors as in_proj_weight (got 2 and 1)",
        {"in_proj_bias": [zeros(8), zeros(8)]},
        (MULTI,),
    ),
    "multi, weight rank": Wrong(
        RuntimeError,
        "in_proj_weight must have two dimensions (got [24])",
        {"in_proj_weight": [zeros(24)]},
        (MULTI,),
    ),
    "multi, bias shape": Wrong(
        RuntimeError,
        "in_proj_bias must have as many elements as in_proj_weight has rows (got "
        "in_proj_weight=[24, 8], in_proj_bias=[23])",
        {"in_proj_bias": [zeros(23)]},
        (MULTI,),
    ),
    "multi, columns": Wrong(
        RuntimeError,
        "in_proj_weight must have as many columns as its input (got input=[2, 3, 8], "
        "in_proj_weight=[24, 7])",
        {"in_proj_weight": [zeros(24, 7)]},
        (MULTI,),
    ),
    "multi, packed rows": Wrong(
        RuntimeError,
        "the rows of the packed in_proj_weight must be a multiple of num_heads + 2 num_kv_heads "
        "(got in_proj_weight=[25, 8], num_heads=4, num_kv_heads=4)",
        {"in_proj_weight": [zeros(25, 8)], "in_proj_bias": [zeros(25)]},
        (MULTI,),
    ),
    "multi, rows": Wrong(
        RuntimeError,
        "the rows of in_proj_weight must be a multiple of the heads (got in_proj_weight=[9, 8], "
        "heads=4)",
        {"in_proj_weight": [zeros(8, 8), zeros(9, 8), zeros(8, 8)], "in_proj_bias": []},
        (MULTI,),
    ),
}
CASES = [
    pytest.param(op, wrong, id=f"{op}-{name}") for name, wrong in WRONG.items() for op in wrong.ops
]


def message(op: str, wrong: Wrong) -> str:
    return f"{op}: {wrong.text}"


@pytest.mark.parametrize("op", [DOT, ADDITIVE, WEIGHTS, MULTI])
def test_the_starting_point_is_right(op):
    getattr(OPS, op)(**valid(op))


@pytest.mark.parametrize("op, wrong", CASES)
def test_eager(op, wrong):
    arguments = valid(op) | wrong.changes
    for call in (getattr(torch_selfattn, op), getattr(OPS, op), with_lse(op)):
        with pytest.raises(wrong.error) as caught:
            call(**arguments)
        assert type(caught.value) is wrong.error
        assert str(caught.value).splitlines()[0] == message(op, wrong)


def with_lse(op: str) -> Any:
    return getattr(OPS, f"{op}_with_lse" if op in (DOT, ADDITIVE) else op)


@pytest.mark.parametrize("op, wrong", CASES)
def test_meta(op, wrong):
    def to_meta(x: Any) -> Any:
        if isinstance(x, list):
            return [to_meta(y) for y in x]
        return x.to("meta") if isinstance(x, Tensor) else x

    arguments = {k: to_meta(v) for k, v in (valid(op) | wrong.changes).items()}
    if not wrong.on_meta:
        getattr(OPS, op)(**arguments)
        return
    with pytest.raises(wrong.error) as caught:
        getattr(OPS, op)(**arguments)
    assert type(caught.value) is wrong.error
    assert str(caught.value).splitlines()[0] == message(op, wrong)


@pytest.mark.parametrize("op, wrong", CASES)
def test_script(op, wrong):
    """TorchScript adds its stack trace, and turns a ValueError into its own RuntimeError."""
    scripted = torch.jit.script(getattr(torch_selfattn, op))
    with pytest.raises((wrong.error, RuntimeError)) as caught:
        scripted(**(valid(op) | wrong.changes))
    assert message(op, wrong) in str(caught.value)
    if wrong.error is not ValueError:
        assert isinstance(caught.value, wrong.error)


def test_devices():
    """A meta tensor beside CPU tensors stands for any other device."""
    for name, text in (
        ("key", "Expected query, key, and value to have the same device type (got query=cpu, "
                "key=meta, value=cpu)"),
        ("weight", "weight must be on the device of query (got query=cpu, weight=meta)"),
        ("attn_mask", "attn_mask must be on the device of query (got query=cpu, attn_mask=meta)"),
        ("key_lengths", "key_lengths must be on the device of query (got query=cpu, "
                        "key_lengths=meta)"),
    ):  # fmt: skip
        arguments = valid(ADDITIVE) | {"attn_mask": zeros(3, 5), "key_lengths": index(1, 1)}
        arguments[name] = arguments[name].to("meta")
        with pytest.raises(RuntimeError) as caught:
            OPS.additive_attention(**arguments)
        assert str(caught.value).splitlines()[0] == f"additive_attention: {text}"


# ---- The forward and backward operators, which Python reaches directly ----


def inner(**changes: Any) -> tuple[list[Any], list[Any]]:
    """Arguments of _attention_forward, and the additional ones of _attention_backward."""
    t: dict[str, Any] = {
        "query": zeros(2, 4, 3, 8), "key": zeros(2, 2, 5, 8), "value": zeros(2, 2, 5, 6),
        "weight": zeros(1, 4, 8), "attn_mask": zeros(1, 1, 3, 5), "key_lengths": index(1, 2),
        "key_starts": None, "query_offsets": None, "alibi_slopes": zeros(1, 4), "scale": None,
        "negative_slope": None, "dropout_p": 0.0, "window_left": -1, "window_right": -1,
        "query_offset": 0,
    }  # fmt: skip
    b: dict[str, Any] = {
        "grad_output": zeros(2, 4, 3, 6), "grad_lse": zeros(2, 4, 3), "output": zeros(2, 4, 3, 6),
        "lse": zeros(2, 4, 3), "philox_state": torch.zeros(0, dtype=torch.int64),
    }  # fmt: skip
    for name, value in changes.items():
        (t if name in t else b)[name] = value
    forward = list(t.values())
    backward = [b["grad_output"], b["grad_lse"], *forward[:9], b["output"], b["lse"],
                b["philox_state"], *forward[9:], True, True]  # fmt: skip
    return forward, backward


INNER = {
    "rank": (
        {"query": zeros(4, 3, 8)},
        "the inner operator takes tensors of four dimensions (got query=[4, 3, 8], "
        "key=[2, 2, 5, 8], value=[2, 2, 5, 6])",
    ),
    "batch": (
        {"key": zeros(1, 2, 5, 8)},
        f"the inner operator takes key and value of one batch and head count (got {Q}, "
        "key=[1, 2, 5, 8], value=[2, 2, 5, 6])",
    ),
    "heads": (
        {"key": zeros(2, 3, 5, 8), "value": zeros(2, 3, 5, 6)},
        "Number of heads in key and value must divide the number of heads in query (got "
        f"{Q}, key=[2, 3, 5, 8])",
    ),
    "weight": (
        {"weight": zeros(1, 2, 8)},
        "weight must be broadcastable to [2, 4, 8] (got weight=[1, 2, 8])",
    ),
    "weight of two dimensions": (
        {"weight": zeros(2, 8)},
        "weight must be broadcastable to [4, 8] (got weight=[2, 8])",
    ),
    "weight of four dimensions": (
        {"weight": zeros(1, 1, 1, 8)},
        "weight must be broadcastable to [2, 4, 8] (got weight=[1, 1, 1, 8])",
    ),
    "mask": (
        {"attn_mask": zeros(3, 5)},
        "attn_mask must be broadcastable to [2, 4, 3, 5] (got attn_mask=[3, 5])",
    ),
    "key_lengths": (
        {"key_lengths": index(1, 2, 3)},
        "key_lengths must have the shape [2] (got key_lengths=[3])",
    ),
    "slopes": (
        {"alibi_slopes": zeros(4)},
        "alibi_slopes must be broadcastable to [2, 4] (got alibi_slopes=[4])",
    ),
}
INNER_BACKWARD = {
    "output": (
        {"output": zeros(2, 4, 3, 5)},
        "output must have the shape [2, 4, 3, 6] (got output=[2, 4, 3, 5])",
    ),
    "grad": (
        {"grad_output": zeros(2, 4, 2, 6)},
        "the gradient of the output must have the shape [2, 4, 3, 6] (got the gradient of the "
        "output=[2, 4, 2, 6])",
    ),
    "lse": ({"lse": zeros(2, 4)}, "lse must have the shape [2, 4, 3] (got lse=[2, 4])"),
    "grad_lse": (
        {"grad_lse": zeros(2, 4)},
        "the gradient of lse must have the shape [2, 4, 3] (got the gradient of lse=[2, 4])",
    ),
    "dtype": (
        {"grad_output": zeros(2, 4, 3, 6, dtype=torch.float64)},
        "the output and its gradient must have dtype and device of query (got query=float cpu, "
        "the other=double cpu)",
    ),
    "lse dtype": (
        {"lse": zeros(2, 4, 3, dtype=torch.float64)},
        "lse must be float64 for float64 inputs and float32 otherwise (got lse.dtype=double)",
    ),
    "philox state": (
        {"philox_state": index(1, 2)},
        "philox_state must be int64, (2) with dropout and (0) without (got philox_state=[2])",
    ),
    "no philox state": (
        {"dropout_p": 0.5},
        "philox_state must be int64, (2) with dropout and (0) without (got philox_state=[0])",
    ),
}


def on_meta(arguments: list[Any]) -> list[Any]:
    return [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [*INNER, *(f"backward {n}" for n in INNER_BACKWARD)])
def test_inner_operators(name, device):
    both = not name.startswith("backward ")
    changes, text = INNER[name] if both else INNER_BACKWARD[name.removeprefix("backward ")]
    forward, backward = inner(**changes)
    calls = [(OPS._attention_backward, backward)]
    if both:
        calls.append((OPS._attention_forward, forward))
    for op, arguments in calls:
        if device == "meta":
            arguments, text = on_meta(arguments), text.replace("cpu", "meta")
        with pytest.raises(RuntimeError) as caught:
            op(*arguments)
        assert str(caught.value).splitlines()[0] == f"additive_attention: {text}"


def test_inner_operators_starting_point():
    forward, backward = inner()
    OPS._attention_forward(*forward)
    OPS._attention_backward(*backward)


@pytest.mark.parametrize(
    "changes, got",
    [
        ({"negative_slope": float("nan")}, "negative_slope=nan, weight=a tensor"),
        ({"negative_slope": 0.5, "weight": None}, "negative_slope=0.5, weight=None"),
    ],
)
def test_inner_negative_slope(changes, got):
    forward, _ = inner(**changes)
    op = "additive_attention" if "weight" not in changes else "dot_product_attention"
    for arguments in (forward, on_meta(forward)):
        with pytest.raises(ValueError) as caught:
            OPS._attention_forward(*arguments)
        assert str(caught.value).splitlines()[0] == (
            f"{op}: negative_slope must be finite, and of an additive score (got {got})"
        )


def test_dropout_factors():
    for state, p, error, text in (
        (index(1), 0.5, RuntimeError, "philox_state must be int64, (2) (got philox_state=[1])"),
        (index(1, 2), 2.0, ValueError, "dropout_p must be between 0 and 1 (got dropout_p=2)"),
    ):
        for device in ("cpu", "meta"):
            with pytest.raises(error) as caught:
                OPS._attention_dropout_factors(state.to(device), 1, 1, 1, 1, p, torch.float32)
            assert str(caught.value).splitlines()[0] == f"_attention_dropout_factors: {text}"
