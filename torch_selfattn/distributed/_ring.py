"""Ring attention: the sequence is divided among the processes of a group.

Each process keeps its queries; keys and values travel round the ring, and the attention to what is
there is computed while the next ones are on their way. Partial results are joined by their
log-sum-exp:

    l = log(exp(l1) + exp(l2)),    o = exp(l1 - l) o1 + exp(l2 - l) o2

Backward sends keys and values round once more, and their gradients with them: with the final o and
l the gradients of one piece of keys are those of the operator's backward (docs/formulas.md), which
needs no other piece. So each process holds a few pieces, never the whole sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._ring_arguments import Description, agree, check_bounds, describe, order_of_name

_backward_op = torch.ops.torch_selfattn._attention_backward


@dataclass(frozen=True)
class _Segment:
    """Consecutive positions: where they stand in the sequence, and in the process's tensor."""

    start: int
    begin: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """Its part of a tensor (B, H, L, ...)."""
        return x.narrow(2, self.begin, self.length)


def _segments(lengths: list[int], order: str) -> list[list[_Segment]]:
    """Of each process."""
    if order == "contiguous":
        starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
        return [[_Segment(s, 0, n)] for s, n in zip(starts, lengths, strict=True)]
    half, last = lengths[0] // 2, 2 * len(lengths) - 1
    return [
        [_Segment(rank * half, 0, half), _Segment((last - rank) * half, half, half)]
        for rank in range(len(lengths))
    ]


@dataclass(frozen=True)
class _Options:
    group: Any
    scale: float | None
    window_left: int
    window_right: int
    enable_gqa: bool
    activation: str  # of the additive score
    negative_slope: float
    query_segments: list[_Segment]  # of this process
    key_segments: list[list[_Segment]]  # of each process

    @property
    def slope(self) -> float | None:
        """The activation as the backward operator takes it."""
        slopes = {"tanh": None, "relu": 0.0}
        return slopes.get(self.activation, self.negative_slope)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return len(self.key_segments)

    def key_length(self, owner: int) -> int:
        return sum(segment.length for segment in self.key_segments[owner])

    def pairs(self, owner: int) -> list[tuple[_Segment, _Segment]]:
        """The segments of queries and of that process's keys between which something is seen."""
        return [
            (q, k)
            for k in self.key_segments[owner]
            for q in self.query_segments
            if q.length > 0
            and k.length > 0
            and (self.window_right < 0 or k.start <= q.start + q.length - 1 + self.window_right)
            and (self.window_left < 0 or k.start + k.length - 1 >= q.start - self.window_left)
        ]


def _within(bounds: Tensor | None, segment: _Segment) -> Tensor | None:
    """Key lengths or starts on the axis of a segment's keys."""
    return None if bounds is None else (bounds - segment.start).clamp(0, segment.length)


class _Exchange:
    """Tensors on their way to the next process, and their successors from the one before."""

    def __init__(self, group: Any, sent: list[Tensor], received: list[Tensor]) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        following = dist.get_global_rank(group, (rank + 1) % size)
        previous = dist.get_global_rank(group, (rank - 1) % size)
        self.sent, self.received = sent, received  # sent: alive until they are
        sends = [dist.P2POp(dist.isend, x, following, group) for x in sent]
        receives = [dist.P2POp(dist.irecv, x, previous, group) for x in received]
        self.works = dist.batch_isend_irecv(sends + receives)

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def _send_keys(options: _Options, step: int, key: Tensor, value: Tensor) -> _Exchange | None:
    """Starts the exchange that brings the keys of step + 1; there is none after the last."""
    if step + 1 == options.size:
        return None
    length = options.key_length((options.rank - step - 1) % options.size)
    received = [
        x.new_empty((x.shape[0], x.shape[1], length, x.shape[3])) for x in (key, value)
    ]  # fmt: skip
    return _Exchange(options.group, [key.contiguous(), value.contiguous()], received)


def _join(output: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Adds attention to more keys to what is there, in place."""
    total = torch.logaddexp(lse, more_lse)
    nothing = total == -torch.inf  # no key yet: -inf - -inf would be NaN
    output.mul_((lse - total).exp_().masked_fill_(nothing, 0).unsqueeze(-1))
    output.addcmul_(
        more.to(output.dtype), (more_lse - total).exp_().masked_fill_(nothing, 0).unsqueeze(-1)
    )
    lse.copy_(total)


def _partial(
    options: _Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    offset: int,
    **tensors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # By name: neither operator has the other's arguments in the same places.
    shared = {
        "scale": options.scale,
        "enable_gqa": options.enable_gqa,
        "window_left": options.window_left,
        "window_right": options.window_right,
        "query_offset": offset,
        **tensors,
    }
    ops = torch.ops.torch_selfattn
    if weight is None:
        return ops.dot_product_attention_with_lse(query, key, value, **shared)
    return ops.additive_attention_with_lse(
        query, key, value, weight, activation=options.activation,
        negative_slope=options.negative_slope, **shared,
    )  # fmt: skip


class _RingAttention(torch.autograd.Function):
    # Saves its inputs, output and lse: this process's pieces.

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None,
        alibi_slopes: Tensor | None,
        key_lengths: Tensor | None,
        key_starts: Tensor | None,
        options: _Options,
    ) -> Tensor:
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        shape = query.shape[:3]
        output = query.new_zeros((*shape, value.shape[3]), dtype=exact)
        lse = query.new_full(shape, -torch.inf, dtype=exact)
        travelling = [key, value]
        for step in range(options.size):
            owner = (options.rank - step) % options.size
            exchange = _send_keys(options, step, *travelling)
            for q, k in options.pairs(owner):
                more, more_lse = _partial(
                    options,
                    q.of(query),
                    k.of(travelling[0]),
                    k.of(travelling[1]),
                    weight,
                    q.start - k.start,
                    key_lengths=_within(key_lengths, k),
                    key_starts=_within(key_starts, k),
                    alibi_slopes=alibi_slopes,
                )
                _join(q.of(output), q.of(lse), more, more_lse)
            if exchange is not None:
                travelling = exchange.wait()
        output = output.to(query.dtype)
        ctx.save_for_backward(
            query, key, value, weight, alibi_slopes, key_lengths, key_starts, output, lse
        )
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "ring_attention: it can be differentiated once only (got create_graph=True)"
            )
        (query, key, value, weight, alibi_slopes, key_lengths, key_starts, output, lse) = (
            ctx.saved_tensors
        )
        options: _Options = ctx.options
        exact = lse.dtype
        slopes = None if alibi_slopes is None else alibi_slopes.unsqueeze(0)  # (1, H)
        philox_state = query.new_empty(0, dtype=torch.int64)  # no dropout
        grad_query = torch.zeros_like(query, dtype=exact)
        grad_weight = None if weight is None else torch.zeros_like(weight, dtype=exact)
        grad_slopes = None if slopes is None else torch.zeros_like(slopes, dtype=exact)

        travelling = [key, value]
        # What has been gathered for the keys that are here comes one step behind them.
        coming: _Exchange | None = None
        gathered: list[Tensor] = []
        for step in range(options.size):
            owner = (options.rank - step) % options.size
            exchange = _send_keys(options, step, *travelling)
            here = [torch.zeros_like(x, dtype=exact) for x in travelling]
            for q, k in options.pairs(owner):
                grads = _backward_op(
                    q.of(grad_output), None, q.of(query), *(k.of(x) for x in travelling), weight,
                    None, _within(key_lengths, k), _within(key_starts, k), None, slopes,
                    q.of(output), q.of(lse).contiguous(), philox_state, options.scale,
                    options.slope, 0.0, options.window_left, options.window_right,
                    q.start - k.start, False, slopes is not None,
                )  # fmt: skip
                q.of(grad_query).add_(grads[0])
                k.of(here[0]).add_(grads[1])
                k.of(here[1]).add_(grads[2])
                if grad_weight is not None:
                    grad_weight.add_(grads[3])
                if grad_slopes is not None:
                    grad_slopes.add_(grads[5])
            if coming is not None:
                for x, more in zip(here, coming.wait(), strict=True):
                    x.add_(more)
            if options.size > 1:
                # To the process that has these keys next; after the last step their owner.
                length = options.key_length((owner - 1) % options.size)
                received = [x.new_empty((*x.shape[:2], length, x.shape[3])) for x in here]
                coming = _Exchange(options.group, here, received)
            gathered = here
            if exchange is not None:
                travelling = exchange.wait()
        if coming is not None:
            gathered = coming.wait()

        def result(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
            if grad is None or like is None:
                return None
            return grad.to(like.dtype).reshape(like.shape)

        return (
            result(grad_query, query),
            result(gathered[0], key),
            result(gathered[1], value),
            result(grad_weight, weight),
            result(grad_slopes, alibi_slopes),
            *(None,) * 3,
        )


def ring_positions(
    length: int,
    *,
    order: str = "contiguous",
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The positions of a sequence that this process holds, (L of this process) int64.

    ``x[:, ring_positions(x.size(1))]`` is this process's piece of x (B, L, D), and positional
    encodings take the positions as they are.

    ``order``: ``"contiguous"``, any length, the first processes have one more where it is not
    divisible; or ``"zigzag"``, length a multiple of 2 W for W processes: cut into 2 W chunks, of
    which process r has chunk r and chunk 2 W - 1 - r, so that all have the same work in causal
    attention.
    """
    order = order_of_name("ring_positions", order)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if order == "zigzag" and length % (2 * size) != 0:
        raise ValueError(
            "ring_positions: length must be a multiple of twice the number of processes for "
            f"order='zigzag' (got length={length}, processes={size})"
        )
    lengths = [length // size + (r < length % size) for r in range(size)]
    parts = [
        torch.arange(s.start, s.start + s.length, device=device)
        for s in _segments(lengths, order)[rank]
    ]
    return torch.cat(parts)


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    alibi_slopes: Tensor | None = None,
    order: str = "contiguous",
    activation: str = "tanh",
    negative_slope: float = 0.2,
) -> Tensor:
    r"""Attention of a sequence that is divided among the processes of ``group``.

    Every process calls it with its pieces and gets the output for its queries, the same numbers (to
    rounding) as :func:`torch_selfattn.dot_product_attention`, with ``weight``
    :func:`torch_selfattn.additive_attention`, gives for the whole sequence. Backward must be called
    on every process too. Memory is linear in the length of a piece.

    Args:
        query: (B, H, Lq, E), this process's queries.
        key: (B, Hk, Lk, E), its keys. The pieces of different processes may have different lengths
            (``order="contiguous"``), also 0, and Lq may differ from Lk.
        value: (B, Hk, Lk, Ev).
        weight: (E) or (H, E) for the additive score, the same on all processes.
        group: the processes; None is all of them.
        is_causal: a query attends to keys at its own position of the whole sequence or before.
        scale, enable_gqa: as in :mod:`torch_selfattn.functional`.
        key_lengths, key_starts: (B), counted in the whole sequence, the same on all processes.
        window_left, window_right: as in :mod:`torch_selfattn.functional`, in the whole sequence.
        alibi_slopes: (H), the same on all processes.
        order: which positions a process holds: ``"contiguous"``, the pieces stand behind each other
            in the order of the ranks; ``"zigzag"``, which gives all processes the same work in
            causal attention: :func:`ring_positions`.
        activation, negative_slope: of the additive score, as in
            :func:`torch_selfattn.additive_attention`.

    Gradients of query, key and value are those of the whole sequence. That of ``weight`` and
    ``alibi_slopes`` is this process's share: the sum over the processes is the gradient, as it is
    for every other parameter of a model whose sequence is divided. Differentiable once. No dropout.

    Errors: wrong arguments are found before anything is sent (by one small ``all_gather``, which
    also exchanges the lengths) and raise on every process: those of
    :mod:`torch_selfattn.functional` where the arguments are wrong, RuntimeError on the others and
    for arguments that differ from process to process.

    Source: Liu, Zaharia and Abbeel, "Ring attention with blockwise transformers for near-infinite
    context", ICLR 2024; zigzag: Brandon et al., "Striped attention", 2023, and Zhu's
    ring-flash-attention.
    """
    group = dist.group.WORLD if group is None else group
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As the operators do it; inside the node there is no autocast, forward or backward.
        dtype = torch.get_autocast_dtype(device)

        def cast(x: Tensor) -> Tensor:
            return x if x.dtype == torch.float64 else x.to(dtype)

        query, key, value = cast(query), cast(key), cast(value)
        weight = None if weight is None else cast(weight)
    description: Description | Exception
    try:
        description = describe(
            query, key, value, weight, is_causal, scale, enable_gqa, key_lengths, key_starts,
            window_left, window_right, alibi_slopes, order, activation, negative_slope,
        )  # fmt: skip
    except Exception as error:
        description = error  # raised once the others know
    query_pieces, key_pieces = agree(description, group, query.device)
    check_bounds("key_lengths", key_lengths, sum(key_pieces))
    check_bounds("key_starts", key_starts, sum(key_pieces))
    options = _Options(
        group,
        scale,
        window_left,
        0 if is_causal else window_right,
        enable_gqa,
        activation,
        negative_slope,
        _segments(query_pieces, order)[dist.get_rank(group)],
        _segments(key_pieces, order),
    )
    with torch.autocast(device, enabled=False):
        return _RingAttention.apply(
            query, key, value, weight, alibi_slopes, key_lengths, key_starts, options
        )
