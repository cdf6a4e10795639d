"""Batching rules and FLOP counts of the positional encodings.

Batching rules (``torch.vmap``): the vmapped dimension becomes one more leading dimension, or, where
something differs from sample to sample, part of the batch; a vmapped call is one kernel launch.

FLOP counts (``torch.utils.flop_counter``): one per added element, six per rotated pair; sines and
cosines are not counted.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._flop_counter import register_flop_formula

_add_sinusoidal = torch.ops.torch_selfattn._add_sinusoidal_encoding_forward
_add_learned = torch.ops.torch_selfattn._add_learned_encoding_forward
_add_learned_backward = torch.ops.torch_selfattn._add_learned_encoding_backward
_rotary = torch.ops.torch_selfattn._rotary_embedding_forward


def _leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    """(V, ...) with the vmapped dimension first."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


class _Folded:
    """x as a problem without the vmapped dimension, and what belongs to its rows likewise.

    The batch of the folded x is (V), or (V * B) where ids or tables are (B, L, ...).
    """

    def __init__(
        self, size: int, x: Tensor, x_dim: int | None, rank: int, *others: tuple[Any, Any]
    ) -> None:
        # rank: of what one sample of a vmapped operand has if all samples of x share it.
        self.size = size
        x = _leading(x, x_dim, size)
        logical_ranks = [t.dim() - (dim is not None) for t, dim in others if t is not None]
        self.folds_batch = any(r == rank + 1 for r in logical_ranks)
        self.batch = x.shape[1] if self.folds_batch else 1
        self.x = x.flatten(0, 1) if self.folds_batch else x
        self.others = [self._fold(t, dim, rank) for t, dim in others]

    def _fold(self, t: Tensor | None, dim: int | None, rank: int) -> Tensor | None:
        if t is None or (dim is None and t.dim() == rank):
            return t
        t = _leading(t, dim, self.size)  # (V, L, ...) or (V, B or 1, L, ...)
        if not self.folds_batch:
            return t
        if t.dim() == rank + 1:
            t = t.unsqueeze(1)
        return t.expand(self.size, self.batch, *t.shape[2:]).flatten(0, 1)

    def unfold(self, out: Tensor) -> Tensor:
        return out.unflatten(0, (self.size, self.batch)) if self.folds_batch else out


def _add_sinusoidal_vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, positions: Tensor | None, *options: Any
) -> tuple[Tensor, int]:
    folded = _Folded(info.batch_size, x, in_dims[0], 1, (positions, in_dims[1]))
    return folded.unfold(_add_sinusoidal(folded.x, folded.others[0], *options)), 0


def _shifted_ids(folded: _Folded, offset: int, rows: int) -> Tensor:
    """Position ids (V * B, L) into a table that stacks the V tables of `rows` rows each."""
    ids = folded.others[0]
    if ids is None:
        ids = torch.arange(folded.x.shape[-2], device=folded.x.device)
    shift = torch.arange(folded.size, device=folded.x.device) * rows + offset
    if ids.dim() == 2:
        return ids + shift.repeat_interleave(folded.batch).unsqueeze(1)
    return ids + shift.unsqueeze(1)


def _add_learned_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    table: Tensor,
    positions: Tensor | None,
    offset: int,
) -> tuple[Tensor, int]:
    folded = _Folded(info.batch_size, x, in_dims[0], 1, (positions, in_dims[2]))
    if in_dims[1] is None:
        return folded.unfold(_add_learned(folded.x, table, folded.others[0], offset)), 0
    table = table.movedim(in_dims[1], 0)
    ids = _shifted_ids(folded, offset, table.shape[1])
    return folded.unfold(_add_learned(folded.x, table.flatten(0, 1), ids, 0)), 0


def _add_learned_backward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    grad: Tensor,
    positions: Tensor | None,
    offset: int,
    rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, int]:
    folded = _Folded(info.batch_size, grad, in_dims[0], 1, (positions, in_dims[1]))
    ids = _shifted_ids(folded, offset, rows)
    grad_table = _add_learned_backward(folded.x, ids, 0, info.batch_size * rows, dtype)
    return grad_table.unflatten(0, (info.batch_size, rows)), 0


def _rotary_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor | None,
    *options: Any,
) -> tuple[Tensor, int]:
    x_dim, cos_dim, sin_dim, ids_dim, *_ = in_dims
    size = info.batch_size
    if ids is not None and cos_dim is None and sin_dim is None:
        folded = _Folded(size, x, x_dim, 1, (ids, ids_dim))
        return folded.unfold(_rotary(folded.x, cos, sin, folded.others[0], *options)), 0
    if ids is not None:
        # A table per sample: take the rows first.
        def rows(table: Tensor, dim: int | None) -> Tensor:
            table = _leading(table, dim, size)
            each = _leading(ids, ids_dim, size)
            v = torch.arange(size, device=ids.device).view(-1, *[1] * (each.dim() - 1))
            return table[v, each]

        cos, sin = rows(cos, cos_dim), rows(sin, sin_dim)
        cos_dim = sin_dim = 0
    elif (cos_dim is None) != (sin_dim is None):
        cos, sin = _leading(cos, cos_dim, size), _leading(sin, sin_dim, size)
        cos_dim = sin_dim = 0
    folded = _Folded(size, x, x_dim, 2, (cos, cos_dim), (sin, sin_dim))
    return folded.unfold(_rotary(folded.x, *folded.others, None, *options)), 0


def _add_flops(x_shape: Any, *args: Any, **kwargs: Any) -> int:
    return math.prod(x_shape)


def _rotary_flops(x_shape: Any, cos_shape: Any, *args: Any, **kwargs: Any) -> int:
    return math.prod(x_shape[:-1]) * cos_shape[-1] * 6


def register() -> None:
    torch.library.register_vmap(_add_sinusoidal.default, _add_sinusoidal_vmap)
    torch.library.register_vmap(_add_learned.default, _add_learned_vmap)
    torch.library.register_vmap(_add_learned_backward.default, _add_learned_backward_vmap)
    torch.library.register_vmap(_rotary.default, _rotary_vmap)
    for operator in (_add_sinusoidal, _add_learned, _add_learned_backward):
        register_flop_formula(operator, _add_flops)
    register_flop_formula(_rotary, _rotary_flops)
