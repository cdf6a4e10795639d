"""What PyTorch is told about the operators from Python: batching rules and FLOP counts.

Batching rules (``torch.vmap``): the vmapped dimension is folded into the batch of the problem, so a
vmapped call is one kernel launch. Only dropout needs care, because its random numbers are counted
by the position in the batch.

FLOP counts (``torch.utils.flop_counter``): matrix products as PyTorch counts those of its own
attention, masks and windows not discounted; an element of the additive score counts 4 forward (add,
tanh as 1, multiply-add with the weight).
"""

from typing import Any

import torch
from torch import Tensor

from ._flop_counter import register_flop_formula

Results = tuple[tuple[Any, ...], tuple[int | None, ...]]  # of a batching rule, and their dimensions

_forward_op = torch.ops.torch_selfattn._attention_forward
_backward_op = torch.ops.torch_selfattn._attention_backward


def _front(x: Tensor | None, dim: int | None) -> Tensor | None:
    """The vmapped dimension first; a tensor that has none stays as it is."""
    return x if x is None or dim is None else x.movedim(dim, 0)


def _fold(x: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """(V, B or 1, ...) or (B or 1, ...) -> (V * B, ...)."""
    if x is None:
        return None
    x = _front(x, dim) if dim is not None else x.unsqueeze(0)
    assert x is not None
    return x.expand(size, batch, *x.shape[2:]).reshape(size * batch, *x.shape[2:])


def _whole_weight(x: Tensor | None, dim: int | None) -> tuple[Tensor | None, int | None]:
    """An (E) or (H, E) weight as (1, 1, E) or (1, H, E), for folding."""
    if x is None:
        return None, dim
    front = _front(x, dim)
    assert front is not None
    lead = 0 if dim is None else 1
    for _ in range(lead + 3 - front.dim()):
        front = front.unsqueeze(lead)
    return front, None if dim is None else 0


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.unflatten(0, (size, x.shape[0] // size))


def _sample(tensors: Any, dims: Any, index: int) -> list[Tensor | None]:
    """The arguments of one sample."""
    return [
        x if x is None or dim is None else x.select(dim, index)
        for x, dim in zip(tensors, dims, strict=True)
    ]


def _sum_to(grad: Tensor, batch: int) -> Tensor:
    """The gradient (V, B, ...) of something that was expanded along B."""
    return grad.sum(1, keepdim=True) if batch == 1 and grad.shape[1] != 1 else grad


def _batch_of(query: Tensor, dim: int | None) -> int:
    return query.shape[0] if dim is None else _front(query, dim).shape[1]  # type: ignore[union-attr]


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Results:
    tensors, options = list(args[:9]), args[9:]
    dims = list(in_dims[:9])
    dropout_p = options[1]
    size = info.batch_size
    if dropout_p > 0 and info.randomness == "error":
        raise RuntimeError(
            "vmap: attention with dropout needs randomness='different' or randomness='same' (got "
            "randomness='error')"
        )
    if dropout_p > 0 and info.randomness == "same":
        # The same random numbers for each sample: each is a problem of its own.
        device = tensors[0].device
        generator = (
            torch.default_generator
            if device.type == "cpu"
            else torch.get_device_module(device).default_generators[device.index]
        )
        state = generator.get_state()
        results = []
        for v in range(size):
            generator.set_state(state)
            results.append(_forward_op(*_sample(tensors, dims, v), *options))
        # A philox state per sample tells the backward rule that they were computed one by one.
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0, 0)

    tensors[3], dims[3] = _whole_weight(tensors[3], dims[3])
    batch = _batch_of(tensors[0], dims[0])
    folded = [_fold(t, d, size, batch) for t, d in zip(tensors, dims, strict=True)]
    for i in (3, 4, 8):  # weight, mask, slopes: if the same for all, they stay as they are
        if tensors[i] is not None and dims[i] is None and tensors[i].shape[0] == 1:
            folded[i] = tensors[i]
    out, lse, philox_state = _forward_op(*folded, *options)
    return (_unfold(out, size), _unfold(lse, size), philox_state), (0, 0, None)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Results:
    # grad_output, grad_lse, the nine inputs, output, lse, philox_state, options, and whether the
    # gradients of attn_mask and alibi_slopes are wanted
    tensors, options = list(args[:14]), args[14:]
    dims = list(in_dims[:14])
    dropout_p = options[1]
    size = info.batch_size
    output_dim, philox_dim = dims[11], dims[13]
    if dropout_p > 0 and (philox_dim is not None or output_dim is None):
        # The forward pass did not fold: its random numbers belong to the unfolded problem.
        results = [_backward_op(*_sample(tensors, dims, v), *options) for v in range(size)]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * 6

    (given_weight,) = _sample(tensors[5:6], dims[5:6], 0)
    tensors[5], dims[5] = _whole_weight(tensors[5], dims[5])
    batch = _batch_of(tensors[2], dims[2])
    folded = [_fold(t, d, size, batch) for t, d in zip(tensors[:13], dims[:13], strict=True)]
    # The optional inputs by the place of their gradients: where they stand, who wants it.
    optional = ((3, 5, tensors[5] is not None), (4, 6, options[-2]), (5, 10, options[-1]))
    for _, n, wanted in optional:
        shared = tensors[n] is not None and dims[n] is None and tensors[n].shape[0] == 1
        if shared and not wanted:
            folded[n] = tensors[n]
    grads = list(_backward_op(*folded, tensors[13], *options))
    out_dims: list[int | None] = [0, 0, 0, None, None, None]
    for i in range(3):
        grads[i] = _unfold(grads[i], size)
    for i, n, wanted in optional:
        if wanted:
            rows = _batch_of(tensors[n], dims[n])
            grads[i] = _sum_to(_unfold(grads[i], size), rows)
            out_dims[i] = 0
    if given_weight is not None:
        grads[3] = grads[3].reshape(size, *given_weight.shape)
    return tuple(grads), tuple(out_dims)


def _pairs(query: torch.Size, key: torch.Size) -> int:
    return query[0] * query[1] * query[2] * key[2]


def _forward_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, weight: torch.Size | None = None,
    *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    score = 2 if weight is None else 4
    return _pairs(query, key) * (score * query[3] + 2 * value[3])


def _backward_flops(
    grad_output: torch.Size, grad_lse: torch.Size | None,
    query: torch.Size, key: torch.Size, value: torch.Size, weight: torch.Size | None = None,
    *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    # The score again; the dot product's dQ and dK are two products, the additive score's gradients
    # per element g * w * (1 - t * t) added to dQ and dK, and g * t added to dw.
    score = 2 + 4 if weight is None else 4 + 8
    return _pairs(query, key) * (score * query[3] + 2 * 2 * value[3])


def register() -> None:
    """Called once by the package's __init__."""
    torch.library.register_vmap("torch_selfattn::_attention_forward", _forward_vmap)
    torch.library.register_vmap("torch_selfattn::_attention_backward", _backward_vmap)
    register_flop_formula(_forward_op, _forward_flops)
    register_flop_formula(_backward_op, _backward_flops)
