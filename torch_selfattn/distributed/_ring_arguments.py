"""What ring_attention checks, so that wrong arguments raise on every process and none waits."""

import struct
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ORDERS = ("contiguous", "zigzag")
_ACTIVATIONS = ("tanh", "leaky_relu", "relu")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# What each process says of its arguments: numbers by name.
Description = dict[str, int]


def order_of_name(name: str, order: str) -> str:
    if order not in _ORDERS:
        raise ValueError(f"{name}: order must be 'contiguous' or 'zigzag' (got order={order!r})")
    return order


def _check(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, tensors: dict[str, Any],
    options: dict[str, Any], activation: str, negative_slope: float,
) -> None:  # fmt: skip
    name = "ring_attention"
    shapes = f"query={list(query.shape)}, key={list(key.shape)}, value={list(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise RuntimeError(
            f"{name}: query, key and value must have four dimensions, (B, H, L, E) (got {shapes})"
        )
    if not query.shape[0] == key.shape[0] == value.shape[0] or key.shape[1] != value.shape[1]:
        raise RuntimeError(
            f"{name}: query, key and value must have one batch size, key and value as many heads "
            f"(got {shapes})"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise RuntimeError(
            f"{name}: the heads of key and value must divide those of query (got {shapes})"
        )
    slopes = tensors["alibi_slopes"]
    if slopes is not None and slopes.dim() != 1:
        raise RuntimeError(
            f"{name}: alibi_slopes must have the shape (H) (got alibi_slopes={list(slopes.shape)})"
        )
    given = {"key": key, "value": value, "weight": weight, **tensors}
    for what, x in given.items():
        if x is not None and x.device != query.device:
            raise RuntimeError(
                f"{name}: {what} must be on the device of query (got query={query.device}, "
                f"{what}={x.device})"
            )
    # The rest are the operator's own rules: it checks without computing on the device meta.
    meta = {what: None if x is None else x.to("meta") for what, x in given.items()}
    ops = torch.ops.torch_selfattn
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        q, k, v = query.to("meta"), meta.pop("key"), meta.pop("value")
        weight = meta.pop("weight")
        if weight is None:
            if activation != "tanh":
                raise ValueError(
                    f"{name}: activation belongs to the additive score, which needs a weight (got "
                    f"activation={activation})"
                )
            ops.dot_product_attention_with_lse(q, k, v, **meta, **options)
        else:
            ops.additive_attention_with_lse(
                q, k, v, weight, activation=activation, negative_slope=negative_slope, **meta,
                **options,
            )  # fmt: skip


def _bits(x: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return bits


def _values(bounds: Tensor | None) -> int:
    """A number for the values of key lengths, which are read where that costs nothing."""
    if bounds is None or bounds.device.type != "cpu":
        return 0 if bounds is None else 1
    return 2 + hash(tuple(bounds.tolist())) % 2**61


def describe(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, is_causal: bool,
    scale: float | None, enable_gqa: bool, key_lengths: Tensor | None, key_starts: Tensor | None,
    window_left: int, window_right: int, alibi_slopes: Tensor | None, order: str,
    activation: str, negative_slope: float,
) -> Description:  # fmt: skip
    """Checks the arguments of this process by themselves, and says what must be alike."""
    order_of_name("ring_attention", order)
    tensors = {
        "key_lengths": key_lengths,
        "key_starts": key_starts,
        "alibi_slopes": alibi_slopes,
    }
    options = {
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "window_left": window_left,
        "window_right": window_right,
    }
    _check(query, key, value, weight, tensors, options, activation, negative_slope)
    differentiable = (query, key, value, weight, alibi_slopes)
    return {
        "the length of query": query.shape[2],
        "the length of key": key.shape[2],
        "the batch size": query.shape[0],
        "the heads of query": query.shape[1],
        "the heads of key": key.shape[1],
        "the head dim of query": query.shape[3],
        "the head dim of value": value.shape[3],
        "the dtype": _DTYPES.index(query.dtype),
        "the dimensions of weight": -1 if weight is None else weight.dim(),
        "key_lengths": _values(key_lengths),
        "key_starts": _values(key_starts),
        "the presence of alibi_slopes": int(alibi_slopes is not None),
        "is_causal": int(is_causal),
        "the presence of scale": int(scale is not None),
        "scale": 0 if scale is None else _bits(scale),
        "window_left": window_left,
        "window_right": window_right,
        "order": _ORDERS.index(order),
        "activation": _ACTIVATIONS.index(activation),
        "negative_slope": _bits(negative_slope),
        # A process without a node would not take part in backward.
        "whether a gradient is wanted": int(
            torch.is_grad_enabled()
            and any(x is not None and x.requires_grad for x in differentiable)
        ),
    }


_MAY_DIFFER = ("the length of query", "the length of key")
_FIELDS = 21


def agree(
    description: Description | Exception, group: Any, device: torch.device
) -> tuple[list[int], list[int]]:
    """The lengths of query and key of each process, or an error on all of them."""
    failed = isinstance(description, Exception)
    names = [] if isinstance(description, Exception) else list(description)
    values = [0] * _FIELDS if isinstance(description, Exception) else list(description.values())
    mine = torch.tensor([int(not failed), *values], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group)
    rows = torch.stack(gathered).tolist()

    if isinstance(description, Exception):
        raise description
    refused = [rank for rank, row in enumerate(rows) if not row[0]]
    if refused:
        raise RuntimeError(
            "ring_attention: the arguments must be right on every process (got an error on rank "
            f"{', '.join(map(str, refused))} of the group, which says what is wrong)"
        )
    for i, name in enumerate(names, 1):
        column = [row[i] for row in rows]
        if name not in _MAY_DIFFER and len(set(column)) > 1:
            raise RuntimeError(
                f"ring_attention: {name} must be the same on all processes (got "
                f"{_readable(name, column)})"
            )
    query_lengths = [row[1] for row in rows]
    key_lengths = [row[2] for row in rows]
    if description["order"] == _ORDERS.index("zigzag"):
        for lengths in (query_lengths, key_lengths):
            if len(set(lengths)) > 1 or lengths[0] % 2 != 0:
                raise RuntimeError(
                    "ring_attention: all pieces must have the same even length for order='zigzag' "
                    f"(got {lengths})"
                )
    return query_lengths, key_lengths


def _readable(name: str, column: list[int]) -> str:
    """The values of all processes, as they were given."""
    if name == "the dtype":
        return str([_DTYPES[i] for i in column])
    if name == "order":
        return str([_ORDERS[i] for i in column])
    if name == "activation":
        return str([_ACTIVATIONS[i] for i in column])
    if name in ("scale", "negative_slope"):
        return str([struct.unpack("<d", struct.pack("<q", i))[0] for i in column])
    if name in ("key_lengths", "key_starts"):
        return "other values on some"
    return str(column)


def check_bounds(name: str, bounds: Tensor | None, length: int) -> None:
    """As the operators do it: on the CPU, where reading costs nothing."""
    if bounds is None or bounds.device.type != "cpu":
        return
    for b, value in enumerate(bounds.tolist()):
        if not 0 <= value <= length:
            raise ValueError(
                f"ring_attention: {name} must be between 0 and the length of the whole sequence "
                f"(got {name}[{b}]={value}, length {length})"
            )
