"""SelfAttention and AdditiveAttention."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from module_checks import (
    check_compiled,
    check_meta,
    check_reset,
    check_scripted,
    check_state_dict,
    gradients,
    randomize,
)

from torch_selfattn import nn, reference

B, L, D = 2, 6, 5
LENGTHS = torch.tensor([6, 3])


def self_attention(score: str, dtype=torch.float64, **kwargs) -> nn.SelfAttention:
    module = nn.SelfAttention(D, score, dtype=dtype, **kwargs)
    randomize(module)
    return module


SELF_OPTIONS = [
    {},
    {"key_dim": 4, "value_dim": 3},
    {"bias": False},
    {"is_causal": True},
    {"window": (1, 2)},
    {"window": (2, 5), "is_causal": True},
    {"scale": 0.3},
    {"alibi": True},
    {"alibi": True, "is_causal": True, "value_dim": 3},
]


def composed_self_attention(
    m: nn.SelfAttention, options: dict, x, attn_mask=None, key_lengths=None
):
    """The formula of the docstring."""
    q, k, v = (F.linear(x, p.weight, p.bias) for p in (m.q_proj, m.k_proj, m.v_proj))
    left, right = options.get("window", (-1, -1))
    slopes = torch.tensor([1 / 256]) if options.get("alibi") else None
    out, _, weights = reference.attention(
        q, k, v, m.score_weight, attn_mask, scale=options.get("scale"), key_lengths=key_lengths,
        window_left=left, window_right=0 if options.get("is_causal") else right,
        alibi_slopes=slopes,
    )  # fmt: skip
    return out, weights


@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("options", SELF_OPTIONS, ids=str)
def test_self_attention(score: str, options: dict) -> None:
    module = self_attention(score, **options)
    x = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(B, L, L) < 0.7
    bias = torch.randn(L, L, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    for kwargs in (
        {},
        {"attn_mask": mask},
        {"attn_mask": bias},
        {"key_lengths": LENGTHS},
        {"attn_mask": mask, "key_lengths": LENGTHS},
    ):
        ours = module(x, need_weights=True, **kwargs)
        theirs = composed_self_attention(module, options, x, **kwargs)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(
            gradients(ours, inputs), gradients(theirs, inputs), atol=1e-11, rtol=1e-11
        )
        alone, none = module(x, **kwargs)
        assert none is None
        torch.testing.assert_close(alone, ours[0], atol=0, rtol=0)
    # One sample without its batch dimension
    torch.testing.assert_close(module(x[1])[0], module(x)[0][1], atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("options", SELF_OPTIONS, ids=str)
def test_self_attention_scripted(score: str, options: dict) -> None:
    module = self_attention(score, **options)
    x = torch.randn(B, L, D, dtype=torch.float64)
    check_scripted(
        module,
        [
            lambda m: m(x),
            lambda m: m(x, need_weights=True),
            lambda m: m(x, torch.ones(L, L, dtype=torch.bool).tril(), LENGTHS, True),
            lambda m: m(x[0]),
        ],
    )


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_self_attention_state(score: str) -> None:
    make = functools.partial(nn.SelfAttention, D, score, key_dim=4, value_dim=3)
    x = torch.randn(B, L, D)
    keys = {f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")}
    if score == "additive":
        keys.add("score_weight")
    assert set(make().state_dict()) == keys
    assert set(make(bias=False).state_dict()) == {k for k in keys if not k.endswith("bias")}
    assert set(make(alibi=True).state_dict()) == keys
    for alibi in (False, True):
        made = functools.partial(make, alibi=alibi)
        check_state_dict(made(), made, lambda m: m(x, need_weights=True))
        check_reset(made())
        check_meta(made, lambda m: m(x))


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_self_attention_compiled(score: str) -> None:
    module = self_attention(score, torch.float32, is_causal=True)
    check_compiled(module, lambda m, length: m(torch.randn(B, length, D)))


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_self_attention_gradcheck(score: str) -> None:
    module = self_attention(score, window=(1, 1))
    x = torch.randn(1, 4, D, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def f(x, *parameters):
        return torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x, None, torch.tensor([3]))
        )[0]

    assert torch.autograd.gradcheck(f, (x, *parameters))


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_self_attention_dropout(score: str) -> None:
    """Kept with probability 1 - p and divided by it: the right mean and variance, and none in
    evaluation."""
    p, samples, length = 0.3, 400, 8
    module = nn.SelfAttention(1, score, dropout=p)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.v_proj.bias.fill_(1.0)  # equal scores, all values 1
    x = torch.zeros(samples, length, 1)
    out = module(x)[0]  # the kept fraction / (1 - p)
    kept = out * (1 - p) * length
    torch.testing.assert_close(kept, kept.round(), atol=1e-4, rtol=0)
    n = out.numel()
    variance = p / (1 - p) / length
    assert abs(out.mean().item() - 1) < 4 * math.sqrt(variance / n)
    assert abs(out.var().item() / variance - 1) < 5 * math.sqrt(2 / n)
    torch.manual_seed(1)
    first = module(x)[0]
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], first) and not torch.equal(out, first)
    torch.testing.assert_close(module.eval()(x)[0], torch.ones(samples, length, 1))


def test_fully_padded_sample() -> None:
    for score in ("dot", "additive"):
        module = self_attention(score)
        x = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
        out, weights = module(x, key_lengths=torch.tensor([L, 0]), need_weights=True)
        assert (out[1] == 0).all() and (weights[1] == 0).all()
        (grad,) = torch.autograd.grad(out.sum() + weights.square().sum(), x)
        assert (grad[1] == 0).all() and grad.isfinite().all()


# AdditiveAttention

DQ, DK, HIDDEN, LQ = 5, 4, 7, 3


def additive(bias: bool = True, dtype=torch.float64, **kwargs) -> nn.AdditiveAttention:
    module = nn.AdditiveAttention(DQ, DK, HIDDEN, bias, dtype=dtype, **kwargs)
    randomize(module)
    return module


def bahdanau(m: nn.AdditiveAttention, query, key, value, allowed=None):
    """As the paper writes it, with the tensor of all pairs."""
    hidden = torch.tanh(m.q_proj(query).unsqueeze(-2) + m.k_proj(key).unsqueeze(-3))
    scores = hidden @ m.score_weight
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


@pytest.mark.parametrize("bias", [False, True])
def test_additive_attention(bias: bool) -> None:
    module = additive(bias)
    query = torch.randn(B, LQ, DQ, dtype=torch.float64, requires_grad=True)
    key = torch.randn(B, L, DK, dtype=torch.float64, requires_grad=True)
    value = torch.randn(B, L, 2, dtype=torch.float64, requires_grad=True)
    allowed = torch.arange(L) < LENGTHS[:, None, None]
    inputs = [query, key, value, *module.parameters()]
    for ours, theirs in (
        (module(query, key, value, need_weights=True), bahdanau(module, query, key, value)),
        (module(query, key, need_weights=True), bahdanau(module, query, key, key)),
        (
            module(query, key, value, key_lengths=LENGTHS, need_weights=True),
            bahdanau(module, query, key, value, allowed),
        ),
        (
            module(query, key, value, allowed, need_weights=True),
            bahdanau(module, query, key, value, allowed),
        ),
        (
            module.attend(query, module.project_key(key), value, None, LENGTHS, True),
            bahdanau(module, query, key, value, allowed),
        ),
        (
            module(query[0], key[0], value[0], need_weights=True),
            bahdanau(module, query[0], key[0], value[0]),
        ),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(
            gradients(ours, inputs), gradients(theirs, inputs), atol=1e-11, rtol=1e-11
        )
    assert module(query, key)[1] is None


@pytest.mark.parametrize("bias", [False, True])
def test_additive_attention_scripted(bias: bool) -> None:
    module = additive(bias)
    query = torch.randn(B, LQ, DQ, dtype=torch.float64)
    key = torch.randn(B, L, DK, dtype=torch.float64)
    mask = torch.rand(B, LQ, L) < 0.5
    calls = [
        lambda m, v=v, a=a, n=n, w=w: m(query, key, v, a, n, w)
        for v, a, n, w in itertools.product(
            (None, key[..., :2]), (None, mask), (None, LENGTHS), (False, True)
        )
    ]
    check_scripted(module, calls)

    class Decoder(torch.nn.Module):
        """The other methods can be called from scripted code."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            projected = self.attention.project_key(key)
            return self.attention.attend(query, projected, key)[0]

    torch.testing.assert_close(torch.jit.script(Decoder())(query, key), module(query, key)[0])


def test_additive_attention_state() -> None:
    make = functools.partial(nn.AdditiveAttention, DQ, DK, HIDDEN)
    query, key = torch.randn(B, LQ, DQ), torch.randn(B, L, DK)
    keys = {"q_proj.weight", "q_proj.bias", "k_proj.weight", "score_weight"}
    assert set(make().state_dict()) == keys
    assert set(make(bias=False).state_dict()) == keys - {"q_proj.bias"}
    check_state_dict(make(), make, lambda m: m(query, key, need_weights=True))
    check_reset(make())
    check_meta(make, lambda m: m(query, key))


def test_additive_attention_compiled() -> None:
    module = additive(dtype=torch.float32)
    check_compiled(
        module, lambda m, length: m(torch.randn(B, length + 1, DQ), torch.randn(B, length, DK))
    )


def test_additive_attention_gradcheck() -> None:
    module = additive()
    query = torch.randn(1, 2, DQ, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 3, DK, dtype=torch.float64, requires_grad=True)
    f = lambda q, k, *p: module(q, k)[0]  # noqa: E731
    assert torch.autograd.gradcheck(f, (query, key, *module.parameters()))


def test_additive_attention_dropout() -> None:
    module = additive(dtype=torch.float32, dropout=1.0)
    query, key = torch.randn(B, LQ, DQ), torch.randn(B, L, DK)
    assert (module(query, key)[0] == 0).all()
    expected = bahdanau(module, query, key, key)[0]
    torch.testing.assert_close(module.eval()(query, key)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    exact = self_attention("additive", torch.float32)
    x = torch.randn(B, L, D).to(dtype)
    out, weights = nn.SelfAttention(D, "additive").to(dtype), None
    out.load_state_dict(exact.state_dict())
    out, weights = out(x, need_weights=True)
    assert out.dtype == weights.dtype == dtype
    torch.testing.assert_close(out.float(), exact(x.float())[0], atol=0.05, rtol=0.05)


def test_autocast() -> None:
    module = self_attention("dot", torch.float32)
    x = torch.randn(B, L, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = module(x, need_weights=True)
    assert out.dtype == weights.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().sum(), x)[0].dtype == torch.float32
    torch.testing.assert_close(out.float(), module(x)[0], atol=0.05, rtol=0.05)


def test_errors() -> None:
    with pytest.raises(ValueError, match="SelfAttention: score must be 'dot' or 'additive'"):
        nn.SelfAttention(D, "cosine")
    for make in (lambda p: nn.SelfAttention(D, dropout=p), lambda p: additive(dropout=p)):
        for p in (-0.1, 1.1):
            with pytest.raises(ValueError, match="dropout must be between 0 and 1"):
                make(p)
