"""Encoder and decoder layers and stacks: in the place of PyTorch's, and what they have beyond.
Decoding with a cache is in test_decoder.py."""

import copy
import functools
import itertools

import pytest
import torch
from module_checks import (
    assert_same,
    check_compiled,
    check_meta,
    check_reset,
    check_scripted,
    check_state_dict,
    gradients,
    randomize,
)

from torch_selfattn import nn

B, D, H, HIDDEN, LT, LM = 2, 8, 4, 12, 5, 7


def sequence(length: int, batch_first: bool, dim: int = D) -> torch.Tensor:
    x = torch.randn(B, length, dim, dtype=torch.float64)
    return (x if batch_first else x.transpose(0, 1)).requires_grad_()


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


PADDING = torch.arange(LM) >= torch.tensor([7, 4])[:, None]
TGT_PADDING = torch.arange(LT) >= torch.tensor([3, 5])[:, None]


def like_pytorch(kind: str, **kwargs):
    theirs = getattr(torch.nn, kind)(D, H, HIDDEN, 0.0, dtype=torch.float64, **kwargs)
    randomize(theirs)
    ours = getattr(nn, kind)(D, H, HIDDEN, 0.0, dtype=torch.float64, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def compare(ours, theirs, x: list[torch.Tensor], *masks) -> None:
    a, b = ours(*x, *masks), theirs(*x, *masks)
    assert_same(a, b, 1e-12)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    torch.testing.assert_close(
        gradients(a, [*x, *ours.parameters()]),
        gradients(b, [*x, *theirs.parameters()]),
        atol=1e-11,
        rtol=1e-11,
    )


LAYER_OPTIONS = [
    {"norm_first": norm_first, "batch_first": batch_first, **rest}
    for norm_first, batch_first, rest in itertools.product(
        (False, True),
        (False, True),
        (
            {},
            {"bias": False},
            {"activation": "gelu"},
            {"activation": torch.nn.functional.gelu, "layer_norm_eps": 0.1},
            {"activation": torch.nn.SiLU()},
        ),
    )
]


@pytest.mark.parametrize("options", LAYER_OPTIONS, ids=str)
def test_encoder_layer_like_pytorch(options: dict) -> None:
    ours, theirs = like_pytorch("TransformerEncoderLayer", **options)
    x = [sequence(LM, options["batch_first"])]
    compare(ours, theirs, x)
    compare(ours, theirs, x, causal(LM))
    compare(ours, theirs, x, None, PADDING)
    compare(ours, theirs, x, causal(LM), PADDING, True)
    compare(ours, theirs, [sequence(LM, True)[0].detach().requires_grad_()])


@pytest.mark.parametrize("options", LAYER_OPTIONS, ids=str)
def test_decoder_layer_like_pytorch(options: dict) -> None:
    ours, theirs = like_pytorch("TransformerDecoderLayer", **options)
    x = [sequence(length, options["batch_first"]) for length in (LT, LM)]
    memory_mask = torch.rand(LT, LM) < 0.3
    memory_mask[:, 0] = False
    compare(ours, theirs, x)
    compare(ours, theirs, x, causal(LT), None, None, PADDING, True)
    compare(ours, theirs, x, causal(LT), memory_mask, TGT_PADDING, PADDING)


@pytest.mark.parametrize("norm", [False, True])
def test_stacks_like_pytorch(norm: bool) -> None:
    for kind, lengths in (("Encoder", (LM,)), ("Decoder", (LT, LM))):
        ours, theirs = (
            getattr(module, f"Transformer{kind}")(
                getattr(module, f"Transformer{kind}Layer")(
                    D, H, HIDDEN, 0.0, batch_first=True, dtype=torch.float64
                ),
                2,
                norm=torch.nn.LayerNorm(D, dtype=torch.float64) if norm else None,
            )
            for module in (nn, torch.nn)
        )
        randomize(theirs)
        ours.load_state_dict(theirs.state_dict())
        compare(ours, theirs, [sequence(length, True) for length in lengths])


def test_layers_start_from_the_numbers_of_pytorch() -> None:
    for kind in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        torch.manual_seed(5)
        theirs = getattr(torch.nn, kind)(D, H, HIDDEN)
        torch.manual_seed(5)
        ours = getattr(nn, kind)(D, H, HIDDEN)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_layers_of_a_stack_start_from_different_numbers() -> None:
    rotary = nn.RotaryEmbedding(D // H)
    layer = nn.TransformerDecoderLayer(D, H, HIDDEN, rotary=rotary)
    stack = nn.TransformerDecoder(layer, 2)
    a, b = (made.state_dict() for made in stack.layers)
    assert not torch.equal(a["linear1.weight"], b["linear1.weight"])
    for made in stack.layers:
        assert made.self_attn.rotary is rotary  # one table serves all
    assert stack.layers[0] is not layer


# Beyond PyTorch's layers

OPTIONS = {
    "additive": {"score": "additive"},
    "grouped": {"num_kv_heads": 2},
    "window": {"window": (2, 1)},
    "rotary": {"rotary": True},
    "alibi": {"alibi": True},
    "all": {"score": "additive", "num_kv_heads": 1, "window": (3, 0), "rotary": True},
}
CROSS_OPTIONS = {
    "additive": {"cross_score": "additive"},
    "one additive head": {"cross_score": "additive", "cross_nhead": 1},
    "grouped": {"cross_num_kv_heads": 2},
    "memory_dim": {"memory_dim": 3, "cross_nhead": 2},
}


def build(kind: str, options: dict, **kwargs):
    options = dict(options)
    if options.get("rotary"):
        options["rotary"] = nn.RotaryEmbedding(D // H, 64)
    options = {"dtype": torch.float64, "dropout": 0.0, "batch_first": True, **options, **kwargs}
    layer = getattr(nn, kind)(D, H, HIDDEN, **options)
    randomize(layer)
    return layer


def attention(options: dict, **kwargs) -> nn.MultiHeadAttention:
    """The attention that the options ask for, made directly."""
    options = dict(options)
    if options.get("rotary"):
        options["rotary"] = nn.RotaryEmbedding(D // H, 64)
    return nn.MultiHeadAttention(D, H, batch_first=True, dtype=torch.float64, **options, **kwargs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_encoder_layer_options(name: str, norm_first: bool) -> None:
    layer = build("TransformerEncoderLayer", OPTIONS[name], norm_first=norm_first)
    own = attention(OPTIONS[name])
    own.load_state_dict(layer.self_attn.state_dict())
    x = sequence(LM, True)
    lengths = torch.tensor([7, 3])

    def attend(y):
        return own(y, y, y, key_lengths=lengths, is_causal=True, need_weights=False)[0]

    def feed_forward(y):
        return layer.linear2(torch.relu(layer.linear1(y)))

    if norm_first:
        expected = x + attend(layer.norm1(x))
        expected = expected + feed_forward(layer.norm2(expected))
    else:
        expected = layer.norm1(x + attend(x))
        expected = layer.norm2(expected + feed_forward(expected))
    assert_same(layer(x, is_causal=True, key_lengths=lengths), expected, 1e-12)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("cross", CROSS_OPTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_decoder_layer_options(name: str, cross: str, norm_first: bool) -> None:
    options = CROSS_OPTIONS[cross]
    layer = build("TransformerDecoderLayer", OPTIONS[name], norm_first=norm_first, **options)
    own = attention(OPTIONS[name])
    own.load_state_dict(layer.self_attn.state_dict())
    dim = options.get("memory_dim")
    other = nn.MultiHeadAttention(
        D, options.get("cross_nhead", H), kdim=dim, vdim=dim, batch_first=True,
        dtype=torch.float64, score=options.get("cross_score", "dot"),
        num_kv_heads=options.get("cross_num_kv_heads"),
    )  # fmt: skip
    other.load_state_dict(layer.multihead_attn.state_dict())
    x, memory = sequence(LT, True), sequence(LM, True, dim or D)
    lengths, memory_lengths = torch.tensor([3, 5]), torch.tensor([7, 3])

    def attend(y):
        return own(y, y, y, is_causal=True, key_lengths=lengths, need_weights=False)[0]

    def look(y):
        return other(y, memory, memory, key_lengths=memory_lengths, average_attn_weights=False)

    def feed_forward(y):
        return layer.linear2(torch.relu(layer.linear1(y)))

    if norm_first:
        expected = x + attend(layer.norm1(x))
        looked, weights = look(layer.norm2(expected))
        expected = expected + looked
        expected = expected + feed_forward(layer.norm3(expected))
    else:
        expected = layer.norm1(x + attend(x))
        looked, weights = look(expected)
        expected = layer.norm2(expected + looked)
        expected = layer.norm3(expected + feed_forward(expected))
    kwargs = {"tgt_is_causal": True, "tgt_lengths": lengths, "memory_lengths": memory_lengths}
    assert_same(layer(x, memory, **kwargs), expected, 1e-12)
    ours = layer.forward_with_weights(x, memory, **kwargs)
    assert ours[1].shape == (B, options.get("cross_nhead", H), LT, LM)
    assert_same(ours, (expected, weights), 1e-12)


def test_stack_returns_weights_of_all_layers() -> None:
    stack = nn.TransformerDecoder(
        build("TransformerDecoderLayer", {}), 3, torch.nn.LayerNorm(D).double()
    )
    x, memory = sequence(LT, True), sequence(LM, True)
    out, weights = stack.forward_with_weights(x, memory, tgt_is_causal=True)
    assert_same(out, stack(x, memory, tgt_is_causal=True), 1e-12)
    assert weights.shape == (3, B, H, LT, LM)
    first = stack.layers[0].forward_with_weights(x, memory, tgt_is_causal=True)
    assert_same(weights[0], first[1], 0.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["additive", "grouped", "rotary", "alibi", "all"])
def test_scripts_with_every_option(name: str, bias: bool) -> None:
    """Scores, groups, rotary, bias and activation change the scripted code; norm_first does not.
    (All combinations within the attention: test_modules_multi_head_attention.py.)"""
    lengths = torch.tensor([7, 4])
    activations = itertools.cycle(("relu", "gelu", "silu"))
    orders = itertools.cycle((False, True))
    for cross in (None, *CROSS_OPTIONS):
        more = {"bias": bias, "activation": next(activations), "norm_first": next(orders)}
        if cross is None:
            layer = build("TransformerEncoderLayer", OPTIONS[name], **more)
            x = sequence(LM, True).detach()
            calls = [
                lambda m, x=x: m(x),
                lambda m, x=x: m(x, causal(LM), PADDING, True),
                lambda m, x=x: m(x, None, None, False, lengths),
                lambda m, x=x: m(x[0]),
            ]
        else:
            options = CROSS_OPTIONS[cross]
            layer = build("TransformerDecoderLayer", OPTIONS[name], **more, **options)
            x = sequence(LT, True).detach()
            memory = sequence(LM, True, options.get("memory_dim", D)).detach()
            calls = [
                lambda m, x=x, y=memory: m(x, y),
                lambda m, x=x, y=memory: m(x, y, causal(LT), None, TGT_PADDING, PADDING, True),
                lambda m, x=x, y=memory: m.forward_with_weights(x, y, memory_lengths=lengths),
            ]
        check_scripted(layer, calls)


def test_stacks_script() -> None:
    x, memory = sequence(LT, True).detach(), sequence(LM, True).detach()
    for norm in (None, torch.nn.LayerNorm(D, dtype=torch.float64)):
        encoder = nn.TransformerEncoder(build("TransformerEncoderLayer", OPTIONS["all"]), 2, norm)
        check_scripted(encoder, [lambda m: m(memory), lambda m: m(memory, None, PADDING, True)])
        decoder = nn.TransformerDecoder(build("TransformerDecoderLayer", OPTIONS["all"]), 2, norm)
        check_scripted(
            decoder,
            [
                lambda m: m(x, memory, None, None, None, PADDING, True),
                lambda m: m.forward_with_weights(x, memory),
            ],
        )


def test_state() -> None:
    attn = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    linear = {f"{m}.{p}" for m in ("linear1", "linear2") for p in ("weight", "bias")}
    x, memory = sequence(LT, False).detach().float(), sequence(LM, False).detach().float()
    for kind, parts, call in (
        ("TransformerEncoderLayer", ["self_attn"], lambda m: m(x)),
        ("TransformerDecoderLayer", ["self_attn", "multihead_attn"], lambda m: m(x, memory)),
    ):
        make = functools.partial(getattr(nn, kind), D, H, HIDDEN, 0.0, score="additive")
        norms = {f"norm{n}.{p}" for n in range(1, len(parts) + 2) for p in ("weight", "bias")}
        keys = {f"{part}.{key}" for part in parts for key in attn}
        assert set(make().state_dict()) == keys | linear | norms | {"self_attn.score_weight"}
        check_reset(make())
        check_meta(make, call)
        check_state_dict(make(), make, call)


def test_encoder_layer_compiled() -> None:
    layer = build("TransformerEncoderLayer", OPTIONS["all"], dtype=torch.float32, norm_first=True)
    check_compiled(layer, lambda m, length: m(torch.randn(B, length, D), is_causal=True))


def test_decoder_layer_compiled() -> None:
    layer = build(
        "TransformerDecoderLayer", OPTIONS["all"], dtype=torch.float32, norm_first=True,
        cross_score="additive", cross_nhead=1,
    )  # fmt: skip

    def call(m, length):
        x, memory = torch.randn(B, length, D), torch.randn(B, length + 6, D)
        lengths = torch.tensor([length, 3])
        return m(x, memory, tgt_is_causal=True, memory_lengths=lengths)

    check_compiled(layer, call)


def test_stack_compiled() -> None:
    layer = build("TransformerEncoderLayer", {"rotary": True}, dtype=torch.float32)
    check_compiled(nn.TransformerEncoder(layer, 2), lambda m, n: m(torch.randn(B, n, D)))


def test_fully_padded_sample_stays_finite() -> None:
    encoder = build("TransformerEncoderLayer", {})
    x = sequence(LM, True)
    out = encoder(x, key_lengths=torch.tensor([LM, 0]))
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(out, [x, *encoder.parameters()]))
    decoder = build("TransformerDecoderLayer", {}, cross_score="additive")
    padding = torch.zeros(B, LM, dtype=torch.bool)
    padding[1] = True
    tgt = sequence(LT, True)
    out = decoder(tgt, x, memory_key_padding_mask=padding)
    grads = gradients(out, [tgt, x, *decoder.parameters()])
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert (grads[1][1] == 0).all()


def test_dropout_is_everywhere_and_only_in_training() -> None:
    """Each of a layer's dropouts alone changes the output; evaluation has none."""
    layer = nn.TransformerDecoderLayer(D, H, HIDDEN, 0.5, batch_first=True)
    randomize(layer)
    x, memory = sequence(LT, True).detach().float(), sequence(LM, True).detach().float()
    exact = nn.TransformerDecoderLayer(D, H, HIDDEN, 0.0, batch_first=True)
    exact.load_state_dict(layer.state_dict())
    expected = exact(x, memory)
    assert_same(copy.deepcopy(layer).eval()(x, memory), expected, 1e-6)
    names = ["dropout", "dropout1", "dropout2", "dropout3", "self_attn", "multihead_attn"]
    for only in names:
        one = copy.deepcopy(exact)
        if only.endswith("attn"):
            assert getattr(layer, only).dropout == 0.5
            getattr(one, only).dropout = 0.5
        else:
            assert getattr(layer, only).p == 0.5
            getattr(one, only).p = 0.5
        assert not torch.allclose(one(x, memory), expected), only
        assert_same(one.eval()(x, memory), expected, 1e-6)


def test_gradcheck() -> None:
    layer = build(
        "TransformerDecoderLayer", OPTIONS["all"], activation="gelu", cross_score="additive"
    )
    x, memory = (sequence(n, True)[:1].detach().requires_grad_() for n in (2, 3))
    assert torch.autograd.gradcheck(
        lambda x, memory, *_: layer(x, memory, tgt_is_causal=True), (x, memory, *layer.parameters())
    )


def test_errors() -> None:
    with pytest.raises(ValueError, match="activation should be relu/gelu, not tanhh; "):
        nn.TransformerEncoderLayer(D, H, activation="tanhh")
    with pytest.raises(ValueError, match="num_heads must be divisible by num_kv_heads"):
        nn.TransformerDecoderLayer(D, H, num_kv_heads=3)
