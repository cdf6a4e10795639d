"""MultiHeadAttention: errors about arguments that do not fit, with PyTorch's sentences inside."""

import pytest
import torch

from torch_selfattn import nn

B, H, D, LQ, LK = 2, 4, 8, 5, 7


def inputs(batch_first: bool) -> list[torch.Tensor]:
    made = [torch.randn(B, length, D) for length in (LQ, LK, LK)]
    return made if batch_first else [x.transpose(0, 1) for x in made]


def test_constructor_errors() -> None:
    for kwargs, text in (
        ({"embed_dim": 6}, r"embed_dim must be divisible by num_heads \(got embed_dim=6"),
        ({"embed_dim": 0}, "embed_dim and num_heads must be greater than 0"),
        ({"num_kv_heads": 3}, r"num_heads must be divisible by num_kv_heads .*num_kv_heads=3"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"score": "cosine"}, "score must be 'dot' or 'additive'"),
        ({"dropout": 1.5}, "dropout must be between 0 and 1"),
        ({"rotary": nn.RotaryEmbedding(4)}, "rotary.dim must not exceed the head dim"),
        ({"alibi": True, "add_zero_attn": True}, "alibi does not go with .*add_zero_attn=True"),
    ):
        with pytest.raises(ValueError, match=text):
            nn.MultiHeadAttention(**{"embed_dim": D, "num_heads": H, **kwargs})


def test_constructor_errors_contain_those_of_pytorch() -> None:
    for sizes in ((0, 4), (8, 0), (6, 4)):
        with pytest.raises((ValueError, AssertionError)) as theirs:
            torch.nn.MultiheadAttention(*sizes)
        with pytest.raises(ValueError) as ours:
            nn.MultiHeadAttention(*sizes)
        assert str(theirs.value) in str(ours.value)


def call_errors() -> dict[str, tuple[dict, tuple, dict]]:
    """name -> (constructor arguments, inputs, call arguments), all of which PyTorch refuses."""
    q, k, v = inputs(False)
    single = (q[:, 0], k[:, 0], v[:, 0])
    return {
        "query of 4": ({}, (q[None], k, v), {}),
        "query of 1": ({}, (q[0, 0], k, v), {}),
        "key of 2": ({}, (q, k[0], v), {}),
        "value of 2": ({}, (q, k, v[0]), {}),
        "key of 3": ({}, (single[0], k, single[2]), {}),
        "padding of 3": ({}, (q, k, v), {"key_padding_mask": torch.zeros(B, 1, LK).bool()}),
        "padding of 2": ({}, single, {"key_padding_mask": torch.zeros(1, LK).bool()}),
        "mask of 4": ({}, (q, k, v), {"attn_mask": torch.zeros(1, 1, LQ, LK)}),
        "mask of 1": ({}, single, {"attn_mask": torch.zeros(LK)}),
        "integer mask": ({}, (q, k, v), {"attn_mask": torch.zeros(LQ, LK).long()}),
        "integer padding": ({}, (q, k, v), {"key_padding_mask": torch.zeros(B, LK).int()}),
        "embed_dim": ({}, (q[..., :4], k, v), {}),
        "lengths": ({}, (q, k, v[1:]), {}),
        "lengths, kdim": ({"kdim": 5}, (q, k[..., :5], v[1:]), {}),
        "mask": ({}, (q, k, v), {"attn_mask": torch.zeros(LQ, 3)}),
        "mask, too many rows": ({}, (q, k, v), {"attn_mask": torch.zeros(LK, LK)}),
        "mask of heads": ({}, (q, k, v), {"attn_mask": torch.zeros(3, LQ, LK)}),
        "mask of heads, 3 columns": ({}, (q, k, v), {"attn_mask": torch.zeros(B * H, LQ, 3)}),
        "mask of heads, no batch": ({}, single, {"attn_mask": torch.zeros(3, LQ, LK)}),
        "padding, batch": ({}, (q, k, v), {"key_padding_mask": torch.zeros(3, LK).bool()}),
        "padding, length": ({}, (q, k, v), {"key_padding_mask": torch.zeros(B, 3).bool()}),
        "padding, no batch": ({}, single, {"key_padding_mask": torch.zeros(3).bool()}),
    }


@pytest.mark.parametrize("name", call_errors())
def test_call_errors_contain_those_of_pytorch(name: str) -> None:
    options, x, kwargs = call_errors()[name]
    ours, theirs = (
        nn.MultiHeadAttention(D, H, **options),
        torch.nn.MultiheadAttention(D, H, **options),
    )
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        theirs(*x, **kwargs)
    with pytest.raises(RuntimeError) as error:
        ours(*x, **kwargs)
    text = str(error.value)
    assert str(expected.value) in text
    assert text.startswith("MultiHeadAttention: ") and text.endswith(")") and "(got " in text
    if name in ("key of 2", "mask of heads", "padding, length"):  # scripting takes long
        with pytest.raises(Exception, match="MultiHeadAttention: "):
            torch.jit.script(ours)(*x, **kwargs)


def test_call_errors_batch_first() -> None:
    module = nn.MultiHeadAttention(D, H, batch_first=True)
    q, k, v = inputs(True)
    for arguments, text in (
        ((q, k, v[:, 1:]), r"key shape torch.Size\(\[2, 7, 8\]\) does not match value shape"),
        ((q, k, v, None, False, torch.zeros(3, LQ, LK)), r"should be \(8, 5, 7\)"),
        ((q, k, v, None, False, torch.zeros(LQ, 3)), r"should be \(5, 7\)"),
        ((q, k, v, torch.zeros(3, LK).bool()), r"key_padded_mask.shape\[0\] to be 2, but got 3"),
        ((q, k, v, torch.zeros(B, 3).bool()), r"key_padded_mask.shape\[1\] to be 7, but got 3"),
    ):
        with pytest.raises(RuntimeError, match=text):
            module(*arguments)
