"""Sharding rules of the operators for DTensor.

C++ autograd runs above DTensor, so the forward and the backward operators meet it one by one, in
canonical shapes. A problem can be divided

* by batch: what has a batch dimension is sharded along it, what is broadcast along it (size 1, or
  no such dimension) is replicated;
* by heads: likewise. With grouped heads only where each process gets whole groups. Not the packed
  operators (a shard of a packed projection is not the packed projection of some heads), and not
  weights averaged over heads;

and the gradient of what is replicated is then a partial sum. Any other placement is first brought
to one of these, or gathered, as DTensor does it: by what costs least.

Dropout: the random numbers of an element are counted by its position in the batch that the process
sees, so shards whose generators have one seed, as DTensor has it, would drop the same elements.
There is no hook for another generator, so the rules refuse sharded inputs with dropout. Replicated
ones draw from the generator of each process, which must be in the same state everywhere.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

# For one dimension of the mesh: placements of the outputs, and of the arguments (None: no tensor).
Rule = tuple[list[Placement | None], list[Placement | None]]

_ops = torch.ops.torch_selfattn

# Where the batch and the heads stand, counted from the last dimension.
_DIMENSIONS: dict[str, dict[str, int]] = {
    name: {"batch": 4, "heads": 3}
    for name in ("query", "key", "value", "output", "grad_output", "attn_mask", "weights", "grad")
} | {
    "lse": {"batch": 3, "heads": 2},
    "grad_lse": {"batch": 3, "heads": 2},
    "weight": {"batch": 3, "heads": 2},
    "alibi_slopes": {"batch": 2, "heads": 1},
    "key_lengths": {"batch": 1},
    "key_starts": {"batch": 1},
    "query_offsets": {"batch": 1},
    "query_indices": {"batch": 2},
    "philox_state": {},
}
# The packed operators have projections (B, L, H * E) in the place of heads.
_PACKED_DIMENSIONS = _DIMENSIONS | {
    name: {"batch": 3} for name in ("packed", "query", "output", "grad_output")
}
# What may be of size 1 where the problem is larger, and is then the same for all shards.
_BROADCAST = ("attn_mask", "weight", "alibi_slopes", "query_indices")


def _is_tensor(argument: Any) -> bool:
    return hasattr(argument, "placements")


def _replicate(*arguments: Any) -> list[Placement | None]:
    return [Replicate() if _is_tensor(a) else None for a in arguments]


class _Call:
    """The arguments of an operator by name, tensors as DTensor's specs."""

    def __init__(self, op: Any, arguments: tuple[Any, ...], dimensions: dict[str, Any]) -> None:
        self.names = [a.name for a in op._schema.arguments]
        self.arguments = dict(zip(self.names, arguments, strict=True))
        self.dimensions = dimensions

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def placement(self, name: str, way: str, rank: int | None = None) -> Placement:
        """Of an argument, or of a result of the given rank, where the problem is divided so."""
        from_end = self.dimensions[name].get(way)
        if rank is None:
            x = self[name]
            rank = x.ndim
            broadcast = from_end is None or from_end > rank
            if name in _BROADCAST:
                broadcast = broadcast or x.shape[rank - from_end] == 1
        else:
            broadcast = from_end is None
        return Replicate() if broadcast else Shard(rank - from_end)

    def inputs(self, way: str) -> list[Placement | None]:
        return [
            self.placement(name, way) if _is_tensor(self[name]) else None for name in self.names
        ]

    def gradient(self, name: str, way: str, wanted: bool = True) -> Placement:
        """Of an argument. What is not wanted has no elements, on no process."""
        if not wanted or not _is_tensor(self[name]):
            return Replicate()
        placement = self.placement(name, way)
        return placement if placement.is_shard() else Partial()

    def optional_gradients(self, way: str) -> list[Placement | None]:
        return [
            self.gradient("weight", way),
            self.gradient("attn_mask", way, self["attn_mask_grad"]),
            self.gradient("alibi_slopes", way, self["alibi_slopes_grad"]),
        ]

    def replicated(self, outputs: int) -> Rule:
        return [Replicate()] * outputs, _replicate(*self.arguments.values())

    def rules(
        self, outputs: int, ways: list[str], results: Callable[[str], list[Placement | None]]
    ) -> list[Rule]:
        """All replicated, and divided in each of these ways; outputs: their number."""
        return [self.replicated(outputs)] + [(results(way), self.inputs(way)) for way in ways]

    def whole_groups(self) -> bool:
        """Whether every way to divide the key heads by dimensions of the mesh divides them evenly.

        Equal numbers of query and key heads go together however they are divided.
        """
        query, key = self["query"], self["key"]
        if query.shape[1] == key.shape[1]:
            return True
        sizes = [size for size in query.mesh.shape if size > 1]
        products = [
            math.prod(chosen)
            for count in range(1, len(sizes) + 1)
            for chosen in itertools.combinations(sizes, count)
        ]
        return all(key.shape[1] % p == 0 for p in products if p <= key.shape[1])

    def refuse_sharded_dropout(self) -> None:
        for argument in self.arguments.values():
            if _is_tensor(argument) and not all(
                p.is_replicate() or p.is_partial() for p in argument.placements
            ):
                raise NotImplementedError(
                    "torch_selfattn: dropout_p must be 0 for sharded DTensors, whose shards would "
                    "drop the same elements; attend to local tensors, as MultiHeadAttentionParallel"
                    f" does (got dropout_p={self['dropout_p']}, "
                    f"placements={tuple(argument.placements)})"
                )


def _attention_forward(*arguments: Any) -> list[Rule]:
    call = _Call(_ops._attention_forward.default, arguments, _DIMENSIONS)
    if call["dropout_p"] > 0:
        call.refuse_sharded_dropout()
        return [call.replicated(3)]
    ways = ["batch", "heads"] if call.whole_groups() else ["batch"]
    return call.rules(
        3,
        ways,
        lambda way: [call.placement("output", way, 4), call.placement("lse", way, 3), Replicate()],
    )


def _attention_backward(*arguments: Any) -> list[Rule]:
    call = _Call(_ops._attention_backward.default, arguments, _DIMENSIONS)
    if call["dropout_p"] > 0:
        return [call.replicated(6)]
    ways = ["batch", "heads"] if call.whole_groups() else ["batch"]
    return call.rules(
        6,
        ways,
        lambda way: [
            *(call.gradient(name, way) for name in ("query", "key", "value")),
            *call.optional_gradients(way),
        ],
    )


def _packed_forward(*arguments: Any) -> list[Rule]:
    call = _Call(_ops._packed_attention_forward.default, arguments, _PACKED_DIMENSIONS)
    if call["dropout_p"] > 0:
        call.refuse_sharded_dropout()
        return [call.replicated(3)]
    return call.rules(
        3,
        ["batch"],
        lambda way: [call.placement("output", way, 3), call.placement("lse", way, 3), Replicate()],
    )


def _packed_backward(*arguments: Any) -> list[Rule]:
    call = _Call(_ops._packed_attention_backward.default, arguments, _PACKED_DIMENSIONS)
    if call["dropout_p"] > 0:
        return [call.replicated(5)]
    return call.rules(
        5,
        ["batch"],
        lambda way: [
            call.gradient("packed", way),
            call.gradient("query", way),
            *call.optional_gradients(way),
        ],
    )


def _weights_ways(call: _Call) -> list[str]:
    return ["batch", "heads"] if call.whole_groups() and not call["average_heads"] else ["batch"]


def _weights_forward(*arguments: Any) -> list[Rule]:
    call = _Call(_ops._attention_weights_forward.default, arguments, _DIMENSIONS)
    return call.rules(1, _weights_ways(call), lambda way: [call.placement("weights", way, 4)])


def _weights_backward(*arguments: Any) -> list[Rule]:
    call = _Call(_ops._attention_weights_backward.default, arguments, _DIMENSIONS)
    return call.rules(
        5,
        _weights_ways(call),
        lambda way: [
            call.gradient("query", way),
            call.gradient("key", way),
            *call.optional_gradients(way),
        ],
    )


# ---- Positional encodings: x (..., L, D) is divided along any dimension before the last two.


def _rows(x: Any, dim: int, rank: int) -> Placement:
    """Of positions or a table of rows, of this rank where all samples have the same, one more where
    each has its own, if x is sharded along dim."""
    per_sample = x.ndim == rank + 1 and x.shape[0] != 1
    return Shard(0) if per_sample and dim == 0 else Replicate()


def _optional_rows(x: Any, dim: int, rank: int) -> Placement | None:
    return None if x is None else _rows(x, dim, rank)


def _add_sinusoidal(x: Any, positions: Any, scale: float, base: float, offset: int) -> list[Rule]:
    rules: list[Rule] = [([Replicate()], _replicate(x, positions, scale, base, offset))]
    for d in range(x.ndim - 2):
        rules.append(([Shard(d)], [Shard(d), _optional_rows(positions, d, 1), None, None, None]))
    return rules


def _add_learned(x: Any, table: Any, positions: Any, offset: int) -> list[Rule]:
    rules: list[Rule] = [([Replicate()], _replicate(x, table, positions, offset))]
    for d in range(x.ndim - 2):
        rules.append(([Shard(d)], [Shard(d), Replicate(), _optional_rows(positions, d, 1), None]))
    return rules


def _add_learned_backward(
    grad: Any, positions: Any, offset: int, rows: int, dtype: torch.dtype
) -> list[Rule]:
    rules: list[Rule] = [([Replicate()], _replicate(grad, positions, offset, rows, dtype))]
    for d in range(grad.ndim - 2):
        rules.append(([Partial()], [Shard(d), _optional_rows(positions, d, 1), None, None, None]))
    return rules


def _rotary(
    x: Any, cos: Any, sin: Any, position_ids: Any, interleaved: bool, conjugate: bool
) -> list[Rule]:
    rules: list[Rule] = [
        ([Replicate()], _replicate(x, cos, sin, position_ids, interleaved, conjugate))
    ]
    for d in range(x.ndim - 2):
        ids = _optional_rows(position_ids, d, 1)
        rules.append(([Shard(d)], [Shard(d), _rows(cos, d, 2), _rows(sin, d, 2), ids, None, None]))
    return rules


def _table(*arguments: Any) -> list[Rule]:
    """Of an operator whose tensor only gives a dtype and a device."""
    return [([Replicate()], _replicate(*arguments))]


def _two_tables(*arguments: Any) -> list[Rule]:
    return [([Replicate(), Replicate()], _replicate(*arguments))]


def register() -> None:
    """Called once by the package's __init__."""
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for op, rule in (
        (_ops._attention_forward, _attention_forward),
        (_ops._attention_backward, _attention_backward),
        (_ops._packed_attention_forward, _packed_forward),
        (_ops._packed_attention_backward, _packed_backward),
        (_ops._attention_weights_forward, _weights_forward),
        (_ops._attention_weights_backward, _weights_backward),
        (_ops._add_sinusoidal_encoding_forward, _add_sinusoidal),
        (_ops._add_learned_encoding_forward, _add_learned),
        (_ops._add_learned_encoding_backward, _add_learned_backward),
        (_ops._rotary_embedding_forward, _rotary),
        (_ops._sinusoidal_encoding_forward, _table),
        (_ops._rotary_tables_forward, _two_tables),
    ):
        register_sharding(op.default)(rule)
        # DTensor keeps what a rule said for arguments that look the same to it: tensors, and what
        # stands after the first integer. Here dropout_p stands before, and an absent tensor counts.
        known[op.default].static_argnum = 0
