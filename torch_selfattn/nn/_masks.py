"""Masks of the modules: their shapes, and how they become one mask of the operators. Scriptable."""

import math

import torch
from torch import Tensor

__all__ = ["check_inputs", "merge_masks", "window_mask"]


def _check_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(
            f"MultiHeadAttention: only bool and floating types of {name} are supported "
            f"(got {name}.dtype={mask.dtype})"
        )


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    embed_dim: int,
    num_heads: int,
    packed: bool,
    batch_first: bool,
) -> None:
    """What ``nn.MultiheadAttention`` says of inputs that do not fit together, in its sentences.

    ``packed``: key and value are of the size of the query. Sizes of 1 that broadcast are let
    through.
    """
    if key_padding_mask is not None:
        _check_dtype("key_padding_mask", key_padding_mask)
    if attn_mask is not None:
        _check_dtype("attn_mask", attn_mask)
    dim = query.dim()
    if dim != 2 and dim != 3:
        raise RuntimeError(
            "MultiHeadAttention: query should be unbatched 2D or batched 3D tensor but received "
            f"{dim}-D query tensor (got query={query.shape})"
        )
    kind = "batched (3-D)" if dim == 3 else "unbatched (2-D)"
    if key.dim() != dim or value.dim() != dim:
        raise RuntimeError(
            f"MultiHeadAttention: For {kind} `query`, expected `key` and `value` to be {dim}-D but "
            f"found {key.dim()}-D and {value.dim()}-D tensors respectively "
            f"(got query={query.shape}, key={key.shape}, value={value.shape})"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != dim - 1:
        raise RuntimeError(
            f"MultiHeadAttention: For {kind} `query`, expected `key_padding_mask` to be `None` or "
            f"{dim - 1}-D but found {key_padding_mask.dim()}-D tensor instead "
            f"(got key_padding_mask={key_padding_mask.shape}, query={query.shape})"
        )
    if attn_mask is not None and attn_mask.dim() != 2 and attn_mask.dim() != 3:
        raise RuntimeError(
            f"MultiHeadAttention: For {kind} `query`, expected `attn_mask` to be `None`, 2-D or "
            f"3-D but found {attn_mask.dim()}-D tensor instead (got attn_mask={attn_mask.shape})"
        )
    if query.size(-1) != embed_dim:
        raise RuntimeError(
            f"MultiHeadAttention: was expecting embedding dimension of {embed_dim}, but got "
            f"{query.size(-1)} (got query={query.shape})"
        )
    if packed and key.shape != value.shape:
        raise RuntimeError(
            f"MultiHeadAttention: key shape {key.shape} does not match value shape {value.shape} "
            f"(got key={key.shape}, value={value.shape})"
        )
    if key.shape[:-1] != value.shape[:-1]:
        raise RuntimeError(
            f"MultiHeadAttention: key's sequence and batch dims {key.shape[:-1]} do not match "
            f"value's {value.shape[:-1]} (got key={key.shape}, value={value.shape})"
        )
    if key_padding_mask is None and attn_mask is None:
        return
    across, along = (0, 1) if batch_first else (1, 0)
    batch = query.size(across) if dim == 3 else 1
    query_length = query.size(along) if dim == 3 else query.size(0)
    key_length = key.size(along) if dim == 3 else key.size(0)
    if attn_mask is not None:
        _check_attn_mask(attn_mask, dim == 3, batch, num_heads, query_length, key_length)
    if key_padding_mask is not None:
        sizes = list(key_padding_mask.shape)
        if dim == 2:
            sizes = [1, sizes[0]]
        for axis, expected in enumerate([batch, key_length]):
            if sizes[axis] != expected and sizes[axis] != 1:
                raise RuntimeError(
                    f"MultiHeadAttention: Expected key_padded_mask.shape[{axis}] to be {expected}, "
                    f"but got {sizes[axis]} (got key_padding_mask={key_padding_mask.shape}, "
                    f"query={query.shape}, key={key.shape})"
                )


def _check_attn_mask(
    attn_mask: Tensor,
    is_batched: bool,
    batch: int,
    num_heads: int,
    query_length: int,
    key_length: int,
) -> None:
    rows, columns = attn_mask.size(-2), attn_mask.size(-1)
    fits = (rows == query_length or rows == 1) and (columns == key_length or columns == 1)
    got = (
        f"(got attn_mask={attn_mask.shape}, B={batch}, num_heads={num_heads}, Lq={query_length}, "
        f"Lk={key_length})"
    )
    if attn_mask.dim() == 2:
        if not fits:
            raise RuntimeError(
                f"MultiHeadAttention: The shape of the 2D attn_mask is {attn_mask.shape}, but "
                f"should be {(query_length, key_length)}. {got}"
            )
        return
    if fits and attn_mask.size(0) == batch * num_heads:
        return
    if is_batched:
        raise RuntimeError(
            f"MultiHeadAttention: The shape of the 3D attn_mask is {attn_mask.shape}, but should "
            f"be {(batch * num_heads, query_length, key_length)}. {got}"
        )
    raise RuntimeError(
        f"MultiHeadAttention: Expected `attn_mask` shape to be "
        f"{(num_heads, query_length, key_length)} but got {attn_mask.shape} {got}"
    )


def merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int
) -> Tensor | None:
    """The two masks of ``nn.MultiheadAttention`` (True = ignore) as one of the operators'
    (True = attend), broadcastable to (B, H, Lq, Lk)."""
    mask: Tensor | None = None
    if attn_mask is not None:
        mask = attn_mask
        if attn_mask.dim() == 3:  # (B * H, Lq, Lk)
            mask = attn_mask.view(batch, -1, attn_mask.size(1), attn_mask.size(2))
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]  # (B, 1, 1, Lk)
        if mask is None:
            mask = padding
        elif mask.dtype == torch.bool:
            if padding.dtype == torch.bool:
                mask = mask | padding
            else:
                mask = padding.masked_fill(mask, -math.inf)
        elif padding.dtype == torch.bool:
            mask = mask.masked_fill(padding, -math.inf)
        else:
            mask = mask + padding
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.logical_not()
    return mask


def window_mask(
    query_length: int,
    key_length: int,
    device: torch.device,
    key_lengths: Tensor | None,
    key_starts: Tensor | None,
    window_left: int,
    window_right: int,
    query_offset: int,
    query_offsets: Tensor | None,
) -> Tensor:
    """Lengths and window as a boolean mask (1 or B, 1, Lq, Lk), True = attend."""
    j = torch.arange(key_length, device=device)
    position = torch.arange(query_length, device=device)[None, None, :, None] + query_offset
    if query_offsets is not None:
        position = position + query_offsets[:, None, None, None]
    allowed = torch.ones([1, 1, query_length, key_length], dtype=torch.bool, device=device)
    if window_left >= 0:
        allowed = allowed & (j >= position - window_left)
    if window_right >= 0:
        allowed = allowed & (j <= position + window_right)
    if key_lengths is not None:
        allowed = allowed & (j < key_lengths[:, None, None, None])
    if key_starts is not None:
        allowed = allowed & (j >= key_starts[:, None, None, None])
    return allowed
