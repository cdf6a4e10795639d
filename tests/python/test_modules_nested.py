"""Nested tensors as inputs: the same as sequence by sequence."""

import itertools

import pytest
import torch
from module_checks import gradients, randomize

from torch_selfattn import nn

D, H = 8, 4
LENGTHS = [3, 0, 5]
LAYOUTS = [torch.strided, torch.jagged]

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def sequences(lengths=LENGTHS, dim: int = D) -> list[torch.Tensor]:
    return [torch.randn(n, dim, dtype=torch.float64, requires_grad=True) for n in lengths]


def nested(parts: list[torch.Tensor], layout: torch.layout) -> torch.Tensor:
    return torch.nested.as_nested_tensor(parts, layout=layout)


def assert_close(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    torch.testing.assert_close(list(a), list(b), atol=1e-12, rtol=1e-12)


OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"score": "additive", "num_kv_heads": 2, "window": (2, 1)},
    {"rotary": True},
    {"alibi": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_that_of_each_sequence(layout: torch.layout, options: dict) -> None:
    """Self-attention and attention to other sequences; output, weights and all gradients."""
    if "rotary" in options:
        options = {"rotary": nn.RotaryEmbedding(2, 16)}
    module = nn.MultiHeadAttention(D, H, batch_first=True, dtype=torch.float64, **options)
    randomize(module)
    queries, keys, values = sequences(), sequences([4, 2, 1]), sequences([4, 2, 1])
    for q, k, v in ((queries, queries, queries), (queries, keys, values)):
        leaves = [*q, *(() if k is q else (*k, *v)), *module.parameters()]
        for need_weights, average, is_causal in itertools.product((False, True), repeat=3):
            kwargs = {
                "need_weights": need_weights,
                "average_attn_weights": average,
                "is_causal": is_causal,
            }
            x = [nested(q, layout)]
            x += [x[0]] * 2 if k is q else [nested(k, layout), nested(v, layout)]
            out, weights = module(*x, **kwargs)
            assert out.is_nested and out.layout == layout
            alone = [module(*t, **kwargs) for t in zip(q, k, v, strict=True)]
            assert_close(out.unbind(), [a for a, _ in alone])
            total = torch.cat(list(out.unbind()))
            expected = torch.cat([a for a, _ in alone])
            assert_close(gradients(total, leaves), gradients(expected, leaves))
            if not need_weights:
                assert weights is None
                continue
            for w, (_, of_one) in zip(weights, alone, strict=True):
                rows, columns = of_one.shape[-2:]
                extra = 2 * ("add_bias_kv" in options)  # stand behind the padding
                assert_close([w[..., :rows, : columns - extra]], [of_one[..., : columns - extra]])
                assert (w[..., rows:, :] == 0).all()


def test_like_pytorch() -> None:
    """As far as nn.MultiheadAttention takes nested tensors: strided, one for all three, eval."""
    theirs = torch.nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64).eval()
    ours = nn.MultiHeadAttention(D, H, batch_first=True, dtype=torch.float64).eval()
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = nested(sequences([3, 5, 1]), torch.strided)
    for need_weights, average in itertools.product((False, True), repeat=2):
        with torch.no_grad():
            a = ours(x, x, x, need_weights=need_weights, average_attn_weights=average)
            b = theirs(x, x, x, need_weights=need_weights, average_attn_weights=average)
        assert a[0].layout == b[0].layout
        assert_close(a[0].unbind(), b[0].unbind())
        if need_weights:
            assert_close([a[1]], [b[1]])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_encoder(layout: torch.layout, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        D, H, 12, 0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    norm = torch.nn.LayerNorm(D, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2, norm)
    randomize(encoder)
    parts = sequences()
    for module, is_causal in itertools.product((layer, encoder), (False, True)):
        x = nested(parts, layout)
        out = module(x, is_causal=is_causal)
        expected = [module(part, is_causal=is_causal) for part in parts]
        assert out.layout == layout
        assert_close(out.unbind(), expected)
        leaves = [*parts, *module.parameters()]
        assert_close(
            gradients(torch.cat(list(out.unbind())), leaves),
            gradients(torch.cat(expected), leaves),
        )
        if layout == torch.jagged:  # a residual knows that the lengths are those of the input
            assert (out + x).is_nested


def test_encoder_like_pytorch() -> None:
    theirs = torch.nn.TransformerEncoderLayer(D, H, 12, batch_first=True, dtype=torch.float64)
    randomize(theirs)
    ours = nn.TransformerEncoderLayer(D, H, 12, batch_first=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = nested(sequences([3, 5, 1]), torch.strided)
    with torch.no_grad():
        assert_close(ours.eval()(x).unbind(), theirs.eval()(x).unbind())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_sequences_empty(layout: torch.layout) -> None:
    module = nn.MultiHeadAttention(D, H, batch_first=True, dtype=torch.float64)
    x = nested(sequences([0, 0]), layout)
    out, weights = module(x, x, x)
    assert [part.shape for part in out.unbind()] == [(0, D), (0, D)]
    assert weights.shape == (2, 0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors(layout: torch.layout) -> None:
    module = nn.MultiHeadAttention(D, H, batch_first=True, dtype=torch.float64)
    x, short, two = (nested(sequences(n), layout) for n in (LENGTHS, [3, 0, 4], [3, 4]))
    padded = torch.randn(3, 5, D, dtype=torch.float64)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    lengths = torch.tensor(LENGTHS)
    for arguments, kwargs, error, text in (
        ((x, padded, padded), {}, RuntimeError, r"must all be nested or none \(got query is nest"),
        ((padded, x, x), {}, RuntimeError, "query is not nested"),
        ((x, x, short), {}, RuntimeError, r"same lengths \(got key: \[3, 0, 5\], value: \[3, 0, 4"),
        ((two, x, x), {}, RuntimeError, "same batch size .*'query': 2, 'key': 3"),
        ((x, x, x), {"attn_mask": mask}, NotImplementedError, "attn_mask is not supported with "),
        ((x, x, x), {"key_padding_mask": mask}, NotImplementedError, "with NestedTensor input"),
        ((x, x, x), {"key_lengths": lengths}, NotImplementedError, "key_lengths is not supported"),
        ((x, x, x), {"key_starts": lengths}, NotImplementedError, "key_starts is not supported"),
    ):
        with pytest.raises(error, match="MultiHeadAttention: .*" + text):
            module(*arguments, **kwargs)
    module.batch_first = False
    with pytest.raises(RuntimeError, match="nested inputs are batch first"):
        module(x, x, x)
    layer = nn.TransformerEncoderLayer(D, H, batch_first=True, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="TransformerEncoderLayer: src_mask is not supp"):
        layer(x, mask)


def test_nested_of_other_shapes() -> None:
    module = nn.MultiHeadAttention(D, H, batch_first=True, dtype=torch.float64)
    uneven = torch.nested.nested_tensor([torch.zeros(2, D), torch.zeros(3, D + 1)])
    with pytest.raises(RuntimeError, match=r"sequences \(L, D\) of one D .*\[3, 9\]"):
        module(uneven, uneven, uneven)
    holes = torch.nested.nested_tensor_from_jagged(
        torch.zeros(8, D), torch.tensor([0, 4, 8]), lengths=torch.tensor([2, 3])
    )
    with pytest.raises(NotImplementedError, match=r"without holes .*holes: True"):
        module(holes, holes, holes)
