"""dot_product_attention and dot_product_attention_with_lse."""

import itertools

import pytest
import torch
from attention_tester import AttentionTester
from operator_tester import OPS
from torch import Tensor
from torch.nn import functional as F


class TestDotProductAttention(AttentionTester):
    op = "dot_product_attention_with_lse"
    score = "dot"


# ---- Shapes as F.scaled_dot_product_attention takes them ----

LEADING = [(), (1,), (2,), (3,), (1, 1), (1, 2), (2, 1), (2, 3), (1, 2, 1), (2, 1, 3), (2, 2, 3)]


def pytorch(*arguments, **options) -> Tensor | None:
    """F.scaled_dot_product_attention's answer by its plain kernel, None where it refuses."""
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(*arguments, **options)
    except RuntimeError:
        return None


def filled(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_broadcasts_as_pytorch(leading):
    """Each combination of leading dimensions that PyTorch takes has PyTorch's result, of its shape,
    and each that it refuses is refused."""
    query = filled((*leading, 2, 4), 1)
    taken = 0
    for key_leading, value_leading in itertools.product(LEADING, LEADING):
        key, value = filled((*key_leading, 3, 4), 2), filled((*value_leading, 3, 5), 3)
        want = pytorch(query, key, value)
        if want is None:
            with pytest.raises(RuntimeError):
                OPS.dot_product_attention(query, key, value)
            continue
        taken += 1
        torch.testing.assert_close(OPS.dot_product_attention(query, key, value), want)
    assert taken >= 20


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast_as_pytorch(rank, kind):
    """The same for masks: sizes 1, the full size or a wrong one in each dimension of each rank."""
    full = (2, 3, 2, 4, 5)[5 - rank :]
    query, key, value = (filled((*full[:-2], n, 4), n) for n in (4, 5, 5))
    taken = 0
    for mask_rank in range(1, rank + 1):
        for choice in itertools.product((0, 1, 2), repeat=mask_rank):
            sizes = full[rank - mask_rank :]
            shape = tuple((1, n, n + 1)[c] for c, n in zip(choice, sizes, strict=True))
            mask = filled(shape, 7)
            mask = mask > -1 if kind == "bool" else mask
            want = pytorch(query, key, value, attn_mask=mask)
            if want is None:
                with pytest.raises(RuntimeError):
                    OPS.dot_product_attention(query, key, value, attn_mask=mask)
                continue
            taken += 1
            got = OPS.dot_product_attention(query, key, value, attn_mask=mask)
            if kind == "bool":  # a row without a key is 0 here; PyTorch's kernels differ in it
                some = mask.expand(*full).any(-1, keepdim=True)
                got, want = got * some, want.nan_to_num() * some
            torch.testing.assert_close(got, want)
    assert taken >= 4


@pytest.mark.parametrize("heads, kv_heads", [(6, 1), (6, 2), (6, 3), (6, 6)])
def test_groups_heads_as_pytorch(heads, kv_heads):
    query = filled((2, heads, 4, 3), 1)
    key, value = filled((2, kv_heads, 5, 3), 2), filled((2, kv_heads, 5, 3), 3)
    got = OPS.dot_product_attention(query, key, value, enable_gqa=True, is_causal=True)
    want = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, is_causal=True)
    torch.testing.assert_close(got, want)


def test_positional_arguments_as_pytorch():
    """The first eight arguments have PyTorch's order."""
    query, key, value = filled((2, 4, 3, 4), 1), filled((2, 2, 5, 4), 2), filled((2, 2, 5, 4), 3)
    mask = filled((3, 5), 4)
    arguments = (query, key, value, mask, 0.0, False, 0.3)
    want = F.scaled_dot_product_attention(*arguments[:6], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(OPS.dot_product_attention(*arguments, True), want)
