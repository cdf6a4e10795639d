"""What PyTorch is told about the operators from Python: batching rules and FLOP counts.

Batching rules (``torch.vmap``): the vmapped dimension is folded into the batch of the problem, so a
vmapped call is one kernel launch. Only dropout needs care, because its random numbers are counted
by the position in the batch.

FLOP counts (``torch.utils.flop_counter``): matrix products as PyTorch counts those of its own
attention, masks and windows not discounted; an element of the additive score counts 4 forward (add,
the activation as 1, multiply-add with the weight).
"""

from typing import Any

import torch
from torch import Tensor

from ._flop_counter import register_flop_formula

Results = tuple[tuple[Any, ...], tuple[int | None, ...]]  # of a batching rule, and their dimensions

_forward_op = torch.ops.torch_selfattn._attention_forward
_backward_op = torch.ops.torch_selfattn._attention_backward
_packed_forward_op = torch.ops.torch_selfattn._packed_attention_forward
_packed_backward_op = torch.ops.torch_selfattn._packed_attention_backward
_weights_forward_op = torch.ops.torch_selfattn._attention_weights_forward
_weights_backward_op = torch.ops.torch_selfattn._attention_weights_backward


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


def _shape_of_weight(x: Tensor | None, dim: int | None) -> torch.Size | None:
    """Of one sample's weight."""
    return None if x is None else x.shape if dim is None else x.select(dim, 0).shape


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


def _forward_rule(op: Any, inputs: int, info: Any, in_dims: Any, args: Any) -> Results:
    """Of a forward operator: `inputs` tensors, then weight, mask, what each sample has one of and
    slopes, then numbers; it returns output, lse and philox_state."""
    tensors, options = list(args[: inputs + 6]), args[inputs + 6 :]
    dims = list(in_dims[: inputs + 6])
    dropout_p = options[-4]
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
            results.append(op(*_sample(tensors, dims, v), *options))
        # A philox state per sample tells the backward rule that they were computed one by one.
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0, 0)

    tensors[inputs], dims[inputs] = _whole_weight(tensors[inputs], dims[inputs])
    batch = _batch_of(tensors[0], dims[0])
    folded = [_fold(t, d, size, batch) for t, d in zip(tensors, dims, strict=True)]
    for i in (
        inputs,
        inputs + 1,
        inputs + 5,
    ):  # weight, mask, slopes: if the same for all, they stay
        if tensors[i] is not None and dims[i] is None and tensors[i].shape[0] == 1:
            folded[i] = tensors[i]
    out, lse, philox_state = op(*folded, *options)
    return (_unfold(out, size), _unfold(lse, size), philox_state), (0, 0, None)


def _backward_rule(op: Any, inputs: int, info: Any, in_dims: Any, args: Any) -> Results:
    """Of its backward operator: grad_output, grad_lse, the forward operator's tensors, output, lse,
    philox_state, numbers, and whether the gradients of mask and slopes are wanted; it returns the
    gradients of `inputs` tensors, weight, mask and slopes, without elements for what is absent."""
    count = 2 + inputs + 6 + 3
    tensors, options = list(args[:count]), args[count:]
    dims = list(in_dims[:count])
    dropout_p = options[-6]
    size = info.batch_size
    output_dim, philox_dim = dims[-3], dims[-1]
    if dropout_p > 0 and (philox_dim is not None or output_dim is None):
        # The forward pass did not fold: its random numbers belong to the unfolded problem.
        results = [op(*_sample(tensors, dims, v), *options) for v in range(size)]
        zeros = (0,) * (inputs + 3)
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), zeros

    first = 2 + inputs  # the weight
    given_weight = _shape_of_weight(tensors[first], dims[first])
    tensors[first], dims[first] = _whole_weight(tensors[first], dims[first])
    batch = _batch_of(tensors[2], dims[2])
    folded = [_fold(t, d, size, batch) for t, d in zip(tensors[:-1], dims[:-1], strict=True)]
    # The optional inputs by the place of their gradients: where they stand, who wants it.
    optional = (
        (inputs, first, tensors[first] is not None),
        (inputs + 1, first + 1, options[-2]),
        (inputs + 2, first + 5, options[-1]),
    )
    for _, n, wanted in optional:
        shared = tensors[n] is not None and dims[n] is None and tensors[n].shape[0] == 1
        if shared and not wanted:
            folded[n] = tensors[n]
    grads = list(op(*folded, tensors[-1], *options))
    out_dims: list[int | None] = [None] * (inputs + 3)
    for i in range(inputs):
        if tensors[2 + i] is not None:
            grads[i] = _unfold(grads[i], size)
            out_dims[i] = 0
    for i, n, wanted in optional:
        if wanted:
            rows = _batch_of(tensors[n], dims[n])
            grads[i] = _sum_to(_unfold(grads[i], size), rows)
            out_dims[i] = 0
    if given_weight is not None:
        grads[inputs] = grads[inputs].reshape(size, *given_weight)
    return tuple(grads), tuple(out_dims)


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Results:
    return _forward_rule(_forward_op, 3, info, in_dims, args)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Results:
    return _backward_rule(_backward_op, 3, info, in_dims, args)


def _packed_forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Results:
    return _forward_rule(_packed_forward_op, 2, info, in_dims, args)


def _packed_backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Results:
    return _backward_rule(_packed_backward_op, 2, info, in_dims, args)


def _weights_forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    # query, key, weight, mask, what each sample has one of, slopes, query_indices, options
    tensors, dims, size = list(args[:9]), list(in_dims[:9]), info.batch_size
    tensors[2], dims[2] = _whole_weight(tensors[2], dims[2])
    batch = _batch_of(tensors[0], dims[0])
    folded = [_fold(t, d, size, batch) for t, d in zip(tensors, dims, strict=True)]
    for i in (2, 3, 7, 8):  # what is the same for all stays as it is
        if tensors[i] is not None and dims[i] is None and tensors[i].shape[0] == 1:
            folded[i] = tensors[i]
    return _unfold(_weights_forward_op(*folded, *args[9:]), size), 0


def _weights_backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Results:
    # grad, the nine inputs, options, and whether the gradients of mask and slopes are wanted
    tensors, dims, size = list(args[:10]), list(in_dims[:10]), info.batch_size
    given_weight = _shape_of_weight(tensors[3], dims[3])
    tensors[3], dims[3] = _whole_weight(tensors[3], dims[3])
    batch = _batch_of(tensors[1], dims[1])
    # Weight, mask and slopes have a gradient for each sample.
    folded = [_fold(t, d, size, batch) for t, d in zip(tensors, dims, strict=True)]
    grads = list(_weights_backward_op(*folded, *args[10:]))
    out_dims: list[int | None] = [0, 0, None, None, None]
    for i in range(2):
        grads[i] = _unfold(grads[i], size)
    for i, n, wanted in ((2, 3, given_weight is not None), (3, 4, args[-2]), (4, 8, args[-1])):
        if wanted:
            rows = _batch_of(tensors[n], dims[n])
            grads[i] = _sum_to(_unfold(grads[i], size), rows)
            out_dims[i] = 0
    if given_weight is not None:
        grads[2] = grads[2].reshape(size, *given_weight)
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


def _packed_shapes(
    packed: torch.Size, query: torch.Size | None, heads: int, kv_heads: int
) -> tuple[torch.Size, torch.Size]:
    """Of query and key; the value's is the key's."""
    dim = packed[2] // (2 * kv_heads + (heads if query is None else 0))
    queries = packed[1] if query is None else query[1]
    return (
        torch.Size((packed[0], heads, queries, dim)),
        torch.Size((packed[0], kv_heads, packed[1], dim)),
    )


def _packed_forward_flops(
    packed: torch.Size, query: torch.Size | None, weight: torch.Size | None,
    attn_mask: Any, key_lengths: Any, key_starts: Any, query_offsets: Any, alibi_slopes: Any,
    num_heads: int, num_kv_heads: int, *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    q, k = _packed_shapes(packed, query, num_heads, num_kv_heads)
    return _forward_flops(q, k, k, weight)


def _packed_backward_flops(
    grad_output: torch.Size, grad_lse: torch.Size | None,
    packed: torch.Size, query: torch.Size | None, weight: torch.Size | None,
    attn_mask: Any, key_lengths: Any, key_starts: Any, query_offsets: Any, alibi_slopes: Any,
    output: torch.Size, lse: torch.Size, philox_state: torch.Size, num_heads: int,
    num_kv_heads: int, *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    q, k = _packed_shapes(packed, query, num_heads, num_kv_heads)
    return _backward_flops(grad_output, grad_lse, q, k, k, weight)


def _weights_forward_flops(
    query: torch.Size, key: torch.Size, weight: torch.Size | None = None,
    *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    return _pairs(query, key) * (2 if weight is None else 4) * query[3]


def _weights_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, weight: torch.Size | None = None,
    *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    return _pairs(query, key) * (2 + 4 if weight is None else 4 + 8) * query[3]


def register() -> None:
    """Called once by the package's __init__."""
    torch.library.register_vmap("torch_selfattn::_attention_forward", _forward_vmap)
    torch.library.register_vmap("torch_selfattn::_attention_backward", _backward_vmap)
    torch.library.register_vmap("torch_selfattn::_packed_attention_forward", _packed_forward_vmap)
    torch.library.register_vmap("torch_selfattn::_packed_attention_backward", _packed_backward_vmap)
    torch.library.register_vmap("torch_selfattn::_attention_weights_forward", _weights_forward_vmap)
    torch.library.register_vmap(
        "torch_selfattn::_attention_weights_backward", _weights_backward_vmap
    )
    register_flop_formula(_forward_op, _forward_flops)
    register_flop_formula(_backward_op, _backward_flops)
    register_flop_formula(_packed_forward_op, _packed_forward_flops)
    register_flop_formula(_packed_backward_op, _packed_backward_flops)
    register_flop_formula(_weights_forward_op, _weights_forward_flops)
    register_flop_formula(_weights_backward_op, _weights_backward_flops)
