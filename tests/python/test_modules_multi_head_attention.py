"""MultiHeadAttention: in the place of torch.nn.MultiheadAttention, and what it has beyond."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from module_checks import (
    assert_same,
    check_compiled,
    check_meta,
    check_reset,
    check_scripted,
    check_state_dict,
    gradients,
    outputs_of,
    randomize,
)

import torch_selfattn
from torch_selfattn import nn, reference

B, H, D, LQ, LK = 2, 4, 8, 5, 7


def pair(**kwargs) -> tuple[nn.MultiHeadAttention, torch.nn.MultiheadAttention]:
    theirs = torch.nn.MultiheadAttention(D, H, dtype=torch.float64, **kwargs)
    randomize(theirs)
    ours = nn.MultiHeadAttention(D, H, dtype=torch.float64, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(batch_first: bool, kdim: int = D, vdim: int = D) -> list[torch.Tensor]:
    made = []
    for length, dim in ((LQ, D), (LK, kdim), (LK, vdim)):
        x = torch.randn(B, length, dim, dtype=torch.float64)
        made.append((x if batch_first else x.transpose(0, 1)).requires_grad_())
    return made


def compare(ours, theirs, x: list[torch.Tensor], **kwargs) -> None:
    a, b = ours(*x, **kwargs), theirs(*x, **kwargs)
    assert [None if t is None else t.shape for t in a] == [
        None if t is None else t.shape for t in b
    ]
    assert_same(a, b, 1e-12)
    leaves = list({id(t): t for t in x}.values())
    floating = [m for m in kwargs.values() if torch.is_tensor(m) and m.requires_grad]
    theirs_parameters = dict(theirs.named_parameters())
    names = [name for name, _ in ours.named_parameters()]
    assert names == list(theirs_parameters)
    for grad, expected in zip(
        gradients(a, [*leaves, *floating, *ours.parameters()]),
        gradients(b, [*leaves, *floating, *theirs_parameters.values()]),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected, atol=1e-11, rtol=1e-11)


SHAPES = [{}, {"kdim": 3}, {"vdim": 6}, {"kdim": 5, "vdim": 3}]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_like_pytorch(
    bias: bool, add_bias_kv: bool, add_zero_attn: bool, shapes: dict, batch_first: bool
) -> None:
    ours, theirs = pair(
        bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first,
        **shapes,
    )  # fmt: skip
    x = inputs(batch_first, **shapes)
    compare(ours, theirs, x)
    compare(ours, theirs, x, need_weights=False)
    compare(ours, theirs, x, average_attn_weights=False)
    if not shapes:
        compare(ours, theirs, [x[0]] * 3, need_weights=False)
        compare(ours, theirs, [x[0], x[1], x[1]], need_weights=False)
        compare(ours, theirs, [x[0]] * 3)


def masks() -> dict[str, dict]:
    padding = torch.arange(LK) >= torch.tensor([7, 4])[:, None]
    causal = torch.ones(LQ, LK, dtype=torch.bool).triu(1)
    return {
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(LQ, LK, dtype=torch.float64).requires_grad_()},
        "bool per head": {"attn_mask": torch.rand(B * H, LQ, LK) < 0.4},
        "float per head": {"attn_mask": torch.randn(B * H, LQ, LK, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(B, LK, dtype=torch.float64)},
        "bool and padding": {"attn_mask": causal, "key_padding_mask": padding},
        "float and float padding": {
            "attn_mask": torch.randn(LQ, LK, dtype=torch.float64),
            "key_padding_mask": torch.randn(B, LK, dtype=torch.float64),
        },
        "causal hint": {"attn_mask": causal, "is_causal": True},
        "causal hint and padding": {
            "attn_mask": causal, "key_padding_mask": padding, "is_causal": True,
        },
    }  # fmt: skip


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", masks())
def test_masks_like_pytorch(name: str, need_weights: bool, extra: dict) -> None:
    if name == "causal hint" and not need_weights and extra:
        pytest.skip("PyTorch drops the mask there and lets no query see the appended keys")
    ours, theirs = pair(batch_first=True, **extra)
    kwargs = masks()[name]
    for mask in ("attn_mask", "key_padding_mask"):  # leave each query a key
        if mask in kwargs and kwargs[mask].dtype == torch.bool:
            kwargs[mask][..., 0] = False
    compare(ours, theirs, inputs(True), need_weights=need_weights, **kwargs)


@pytest.mark.parametrize("mixed", [True, False])
def test_boolean_and_floating_mask_together(mixed: bool) -> None:
    """PyTorch warns of it, but means the same."""
    module, _ = pair(batch_first=True)
    x = inputs(True)
    boolean = torch.rand(B, LK) < 0.3
    boolean[:, 0] = False
    floating = torch.randn(LQ, LK, dtype=torch.float64)
    both = {"attn_mask": floating, "key_padding_mask": boolean}
    if mixed:
        boolean = torch.ones(LQ, LK, dtype=torch.bool).triu(1)
        floating = torch.randn(B, LK, dtype=torch.float64)
        both = {"attn_mask": boolean, "key_padding_mask": floating}
    as_floats = {
        name: torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, -math.inf)
        if m.dtype == torch.bool
        else m
        for name, m in both.items()
    }
    assert_same(module(*x, **both), module(*x, **as_floats), 1e-13)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_without_a_batch(need_weights: bool, batch_first: bool) -> None:
    ours, theirs = pair(batch_first=batch_first)
    x = [t[0].detach().requires_grad_() for t in inputs(True)]
    padding = torch.arange(LK) >= 5
    for kwargs in (
        {},
        {"attn_mask": torch.randn(LQ, LK, dtype=torch.float64)},
        {"attn_mask": torch.randn(H, LQ, LK, dtype=torch.float64)},
        {"key_padding_mask": padding},
    ):
        compare(ours, theirs, x, need_weights=need_weights, **kwargs)
        compare(ours, theirs, x, need_weights=need_weights, average_attn_weights=False, **kwargs)


def test_starts_from_the_numbers_of_pytorch() -> None:
    for kwargs in ({}, {"kdim": 3, "vdim": 5, "add_bias_kv": True}, {"bias": False}):
        torch.manual_seed(5)
        theirs = torch.nn.MultiheadAttention(D, H, **kwargs)
        torch.manual_seed(5)
        ours = nn.MultiHeadAttention(D, H, **kwargs)
        for (name, a), (other, b) in zip(
            ours.state_dict().items(), theirs.state_dict().items(), strict=True
        ):
            assert name == other
            assert torch.equal(a, b), name


def test_fully_padded_sample() -> None:
    """PyTorch gives NaN here."""
    for need_weights, kwargs in itertools.product(
        (False, True), ({}, {"score": "additive"}, {"num_kv_heads": 2})
    ):
        module = nn.MultiHeadAttention(D, H, batch_first=True, dtype=torch.float64, **kwargs)
        randomize(module)
        x = inputs(True)
        padding = torch.zeros(B, LK, dtype=torch.bool)
        padding[1] = True
        out, weights = module(*x, key_padding_mask=padding, need_weights=need_weights)
        torch.testing.assert_close(out[1], module.out_proj.bias.expand(LQ, D))
        grads = gradients(out, [*x, *module.parameters()])
        assert all(g.isfinite().all() for g in grads)
        assert all((g[1] == 0).all() for g in grads[:3])
        if need_weights:
            assert (weights[1] == 0).all()
            torch.testing.assert_close(weights[0].sum(-1), torch.ones(LQ, dtype=torch.float64))


def test_nan_in_padding_reaches_no_output() -> None:
    module, _ = pair(batch_first=True)
    query, key, value = inputs(True)
    lengths = torch.tensor([7, 4])
    clean = module(query, key, value, key_lengths=lengths)
    with torch.no_grad():
        key[1, 4:], value[1, 4:] = math.nan, math.inf
    dirty = module(query, key, value, key_lengths=lengths)
    assert_same(dirty, clean, 0.0)
    assert_same(
        module(query, key, value, key_lengths=lengths, need_weights=False)[0], clean[0], 1e-12
    )
    (grad,) = torch.autograd.grad(dirty[0].sum(), query)
    assert grad.isfinite().all()


# Beyond PyTorch's module

OPTIONS = {
    "additive": {"score": "additive"},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1, "score": "additive"},
    "window": {"window": (2, 1)},
    "rotary": {"rotary": {}},
    "rotary, interleaved": {"rotary": {"interleaved": True, "base": 100.0}},
    "scale": {"scale": 0.3},
    "alibi": {"alibi": True},
    "alibi, grouped, additive": {"alibi": True, "num_kv_heads": 2, "score": "additive", "vdim": 3},
    "all": {"score": "additive", "num_kv_heads": 2, "window": (3, 2), "rotary": {}, "kdim": 5},
    "no bias": {"bias": False, "num_kv_heads": 2, "vdim": 3},
}


def make(name: str, **kwargs) -> nn.MultiHeadAttention:
    options = {"dtype": torch.float64, "batch_first": True, **OPTIONS[name], **kwargs}
    if "rotary" in options:
        options["rotary"] = nn.RotaryEmbedding(D // H, **options["rotary"])
    module = nn.MultiHeadAttention(D, H, **options)
    randomize(module)
    return module


def rotate(x: torch.Tensor, positions: torch.Tensor, options: dict) -> torch.Tensor:
    """As complex numbers."""
    dim = x.shape[-1]
    frequency = options.get("base", 10000.0) ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    turn = torch.polar(torch.ones(()).to(x), positions[..., None] * frequency)
    if options.get("interleaved"):
        return torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn
        ).flatten(-2)
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * turn
    return torch.cat([turned.real, turned.imag], -1)


def composed(m: nn.MultiHeadAttention, options: dict, query, key, value, is_causal=False, **kwargs):
    """Projections, rotation and the reference."""
    heads, kv_heads, e = H, options.get("num_kv_heads", H), D // H
    parts = [D, kv_heads * e, kv_heads * e]
    if m.in_proj_weight is not None:
        weights = m.in_proj_weight.split(parts)
    else:
        weights = [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
    biases = [None] * 3 if m.in_proj_bias is None else m.in_proj_bias.split(parts)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (n, e)).transpose(1, 2)
        for x, w, b, n in zip(
            (query, key, value), weights, biases, (heads, kv_heads, kv_heads), strict=True
        )
    )
    if "rotary" in options:
        offset = kwargs.get("query_offset", 0)
        positions = torch.arange(q.shape[2], dtype=q.dtype) + offset
        if "query_offsets" in kwargs:
            positions = positions + kwargs["query_offsets"][:, None, None]
        q = rotate(q, positions, options["rotary"])
        k = rotate(k, torch.arange(k.shape[2], dtype=q.dtype), options["rotary"])
    left, right = options.get("window", (-1, -1))
    slopes = 2.0 ** -(8.0 / H * torch.arange(1, H + 1)) if "alibi" in options else None
    out, _, p = reference.attention(
        q, k, v, m.score_weight, scale=options.get("scale"), enable_gqa=True, window_left=left,
        window_right=0 if is_causal else right, alibi_slopes=slopes, **kwargs,
    )  # fmt: skip
    return F.linear(out.transpose(1, 2).flatten(2), m.out_proj.weight, m.out_proj.bias), p


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    module = make(name)
    options = OPTIONS[name]
    x = inputs(True, options.get("kdim", D), options.get("vdim", D))
    leaves = [*x, *module.parameters()]
    for kwargs in (
        {},
        {"is_causal": True},
        {"key_lengths": torch.tensor([7, 3])},
        {"key_lengths": torch.tensor([6, 3]), "key_starts": torch.tensor([1, 3])},
        {"query_offset": 2, "is_causal": True},
        {"query_offset": 1, "query_offsets": torch.tensor([0, 1]), "is_causal": True},
    ):
        theirs = composed(module, options, *x, **kwargs)
        ours = module(*x, average_attn_weights=False, **kwargs)
        assert_same(ours, theirs, 1e-12)
        expected = gradients(theirs[0], leaves, retain_graph=True)
        out, none = module(*x, need_weights=False, **kwargs)
        assert none is None
        assert_same(out, theirs[0], 1e-12)
        torch.testing.assert_close(gradients(out, leaves), expected, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(
            gradients(ours, leaves), gradients(theirs, leaves), atol=1e-11, rtol=1e-11
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_masks(name: str) -> None:
    """Masks of this module say what to ignore, those of the operators what to attend to."""
    module = make(name)
    options = OPTIONS[name]
    x = inputs(True, options.get("kdim", D), options.get("vdim", D))
    ignore = torch.rand(LQ, LK) < 0.3
    padding = torch.rand(B, LK) < 0.3
    attend = ~(ignore | padding[:, None, None])
    theirs = composed(module, options, *x, attn_mask=attend, is_causal=True)
    for need_weights in (False, True):
        ours = module(
            *x, attn_mask=ignore, key_padding_mask=padding, is_causal=True,
            need_weights=need_weights, average_attn_weights=False,
        )  # fmt: skip
        assert_same(outputs_of(ours)[0], theirs[0], 1e-12)
        if need_weights:
            assert_same(ours[1], theirs[1], 1e-12)


def test_lengths_are_padding() -> None:
    module = make("additive")
    x = inputs(True)
    lengths, starts = torch.tensor([5, 7]), torch.tensor([0, 2], dtype=torch.int32)
    j = torch.arange(LK)
    padding = (j >= lengths[:, None]) | (j < starts[:, None])
    assert_same(
        module(*x, key_lengths=lengths, key_starts=starts),
        module(*x, key_padding_mask=padding),
        1e-12,
    )


@pytest.mark.parametrize("name", ["additive", "grouped", "window", "rotary", "all"])
def test_appended_keys_lie_outside_of_every_bound(name: str) -> None:
    """add_bias_kv and add_zero_attn with windows and lengths."""
    module = make(name, add_bias_kv=True, add_zero_attn=True)
    options = OPTIONS[name]
    x = inputs(True, options.get("kdim", D))
    kv_heads, e = options.get("num_kv_heads", H), D // H
    kwargs = {"key_lengths": torch.tensor([6, 0]), "query_offset": 1}
    ignore = torch.rand(LQ, LK) < 0.3
    k, v = module.project_key_value(x[1], x[2])
    q = module.project_query(x[0], 1)
    more = [
        torch.cat(
            [t, b.view(1, kv_heads, 1, e).expand(B, -1, -1, -1), torch.zeros_like(t[:, :, :1])], 2
        )
        for t, b in ((k, module.bias_k), (v, module.bias_v))
    ]
    left, right = options.get("window", (-1, -1))
    for is_causal, mask in itertools.product((False, True), (None, ignore)):
        allowed = reference.allowed_pairs(
            LQ, LK, None if mask is None else ~mask, window_left=left,
            window_right=0 if is_causal else right, **kwargs,
        )  # fmt: skip
        allowed = F.pad(allowed.expand(B, 1, LQ, LK), [0, 2], value=True)
        out, _, weights = reference.attention(
            q, *more, module.score_weight, allowed, enable_gqa=True
        )
        expected = module.out_proj(out.transpose(1, 2).flatten(2)), weights.mean(1)
        ours = module(*x, attn_mask=mask, is_causal=is_causal, **kwargs)
        assert_same(ours, expected, 1e-12)
        out, _ = module(*x, attn_mask=mask, is_causal=is_causal, need_weights=False, **kwargs)
        assert_same(out, expected[0], 1e-12)
        bias = torch.zeros(LQ, LK, dtype=torch.float64)
        if mask is not None:
            bias = bias.masked_fill(mask, -math.inf)
        assert_same(module(*x, attn_mask=bias, is_causal=is_causal, **kwargs), expected, 1e-12)


CONSTRUCTOR = {
    "score": ("dot", "additive"),
    "num_kv_heads": (None, 2),
    "rotary": (False, True),
    "bias": (True, False),
    "add_bias_kv": (False, True),
    "add_zero_attn": (False, True),
    "kdim": (None, 5),
}


@pytest.mark.parametrize("score", CONSTRUCTOR["score"])
@pytest.mark.parametrize("rotary", CONSTRUCTOR["rotary"])
@pytest.mark.parametrize("num_kv_heads", CONSTRUCTOR["num_kv_heads"])
def test_scripts_with_every_option(score: str, rotary: bool, num_kv_heads: int | None) -> None:
    """Every combination of what changes the scripted code; window and batch_first are numbers."""
    rest = [CONSTRUCTOR[name] for name in ("bias", "add_bias_kv", "add_zero_attn", "kdim")]
    padding = torch.arange(LK) >= torch.tensor([7, 4])[:, None]
    lengths = torch.tensor([7, 4])
    bias_mask = torch.randn(LQ, LK)
    for n, (bias, add_bias_kv, add_zero_attn, kdim) in enumerate(itertools.product(*rest)):
        batch_first = n % 2 == 0
        module = nn.MultiHeadAttention(
            D, H, 0.0, bias, add_bias_kv, add_zero_attn, kdim, None, batch_first, score=score,
            num_kv_heads=num_kv_heads, window=(2, -1) if n % 3 else (-1, -1),
            rotary=nn.RotaryEmbedding(2, 16) if rotary else None,
            alibi=not (add_bias_kv or add_zero_attn),
        )  # fmt: skip
        randomize(module)
        x = [t.detach().float() for t in inputs(batch_first, kdim or D)]
        single = [t.select(0 if batch_first else 1, 1) for t in x]
        of_sample = {
            "key_lengths": lengths,
            "key_starts": lengths // 4,
            "query_offset": 1,
            "query_offsets": lengths // 4,
        }
        arguments = [
            (x, {}),
            (x, {"need_weights": False}),
            (x, {"attn_mask": bias_mask, "key_padding_mask": padding}),
            (x, {"attn_mask": bias_mask > 0, "need_weights": False, "is_causal": True}),
            (x, of_sample),
            (single, {"average_attn_weights": False}),
        ]
        if kdim is None:
            arguments.append(([x[0]] * 3, {"need_weights": False, "is_causal": True}))
        calls = [lambda m, xs=xs, kwargs=kwargs: m(*xs, **kwargs) for xs, kwargs in arguments]
        check_scripted(module, calls)


def test_state() -> None:
    x = [t.detach().float() for t in inputs(False)]
    keys = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    split = {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    for kwargs, expected in (
        ({}, keys),
        ({"bias": False}, {"in_proj_weight", "out_proj.weight"}),
        ({"kdim": D, "vdim": D, "add_bias_kv": True}, keys | {"bias_k", "bias_v"}),
        ({"kdim": 3}, keys - {"in_proj_weight"} | split),
        ({"score": "additive"}, keys | {"score_weight"}),
        ({"alibi": True}, keys),
        ({"rotary": nn.RotaryEmbedding(2), "num_kv_heads": 2}, keys),
    ):
        make = functools.partial(nn.MultiHeadAttention, D, H, **kwargs)
        module = make()
        assert set(module.state_dict()) == expected
        check_reset(module)
        x[1] = torch.randn(LK, B, kwargs.get("kdim", D))
        check_state_dict(module, make, lambda m: m(*x))
        if "rotary" not in kwargs:
            check_meta(make, lambda m: m(*x))
    assert module.in_proj_weight.shape == (D + 2 * 2 * (D // H), D)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ["grouped", "rotary", "alibi", "all"])
def test_compiled(name: str, need_weights: bool) -> None:
    kdim = OPTIONS[name].get("kdim", D)
    module = make(name, dtype=torch.float32)

    def call(m, length):
        key = torch.randn(B, length + 5, kdim)
        value = torch.randn(B, length + 5, D)
        query = torch.randn(B, length, D)
        lengths = torch.tensor([length, 3])
        return m(query, key, value, need_weights=need_weights, is_causal=True, key_lengths=lengths)

    check_compiled(module, call)


@pytest.mark.parametrize("name", ["all", "no bias"])
def test_gradcheck(name: str) -> None:
    module = make(name)
    options = OPTIONS[name]
    x = [
        t[:1, :3].detach().requires_grad_()
        for t in inputs(True, options.get("kdim", D), options.get("vdim", D))
    ]
    names, parameters = zip(*module.named_parameters(), strict=True)

    def f(q, k, v, *parameters):
        named = dict(zip(names, parameters, strict=True))
        kwargs = {"need_weights": False, "is_causal": True}
        return torch.func.functional_call(module, named, (q, k, v), kwargs)[0]

    assert torch.autograd.gradcheck(f, (*x, *parameters))


def test_dropout() -> None:
    module = nn.MultiHeadAttention(D, H, dropout=1.0, batch_first=True)
    randomize(module)
    x = [t.detach().float() for t in inputs(True)]
    for need_weights in (False, True):
        out, weights = module(*x, need_weights=need_weights)
        torch.testing.assert_close(out, module.out_proj.bias.expand(B, LQ, D))
        if need_weights:  # those before dropout
            torch.testing.assert_close(weights.sum(-1), torch.ones(B, LQ))
    plain = nn.MultiHeadAttention(D, H, batch_first=True)
    plain.load_state_dict(module.state_dict())
    assert_same(module.eval()(*x), plain(*x), 0.0)
    module.train().dropout = 0.5
    torch.manual_seed(1)
    first = module(*x, need_weights=False)[0]
    torch.manual_seed(1)
    assert torch.equal(module(*x, need_weights=False)[0], first)
    assert not torch.equal(module(*x, need_weights=False)[0], first)
    outs = torch.stack([module(*x, need_weights=False)[0] for _ in range(2000)])
    error = outs.mean(0) - plain(*x)[0]
    assert (error.abs() < 5 * outs.std(0) / math.sqrt(2000)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Rotary tables stay float32: at position 3000 half precision would be off by whole turns."""
    exact = make("rotary", dtype=torch.float32)
    low = make("rotary", dtype=torch.float32).to(dtype)
    low.load_state_dict(exact.state_dict())
    x = [t.detach().to(dtype) for t in inputs(True)]
    out, weights = low(*x, query_offset=3000)
    assert out.dtype == weights.dtype == dtype
    expected = exact(*[t.float() for t in x], query_offset=3000)
    assert_same((out.float(), weights.float()), expected, 0.05)


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(need_weights: bool) -> None:
    module = make("rotary", dtype=torch.float32)
    x = [t.detach().float().requires_grad_() for t in inputs(True)]
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*x, need_weights=need_weights, key_lengths=torch.tensor([7, 3]))[0]
    assert out.dtype == torch.bfloat16
    expected = module(*x, key_lengths=torch.tensor([7, 3]))
    assert_same(out.float(), expected[0], 0.1)
    assert all(g.isfinite().all() for g in gradients(out, [*x, *module.parameters()]))


def test_is_one_operator_on_the_fast_path() -> None:
    called = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    module, _ = pair(batch_first=True)
    x = inputs(True)
    with Spy():
        module(*x, need_weights=False)
    assert any("multi_head_attention" in name for name in called)
    assert not any("linear" in name for name in called)


def test_forced_implementation_reaches_modules() -> None:
    module = make("all")
    x = inputs(True, 5)
    with torch_selfattn.use_implementation("reference"):
        forced = module(*x, need_weights=False)[0]
    assert_same(forced, module(*x, need_weights=False)[0], 1e-12)
