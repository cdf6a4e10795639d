"""Tensor parallel: the heads of MultiHeadAttention divided among processes.

A process computes its heads on local tensors: the in-projections are divided by rows, as
``ColwiseParallel`` divides a linear layer, the out-projection by columns, as ``RowwiseParallel``
does, and one all-reduce adds up the processes' parts of the output.

The rows of the packed in-projection are those of the query, key and value projections behind each
other, and a process needs its rows of each. So the parameter is a DTensor whose rows are in another
order, all rows of the first process, then all of the second, sharded along them. Saving and loading
put the rows in order, so a state dict is that of the undivided module. (What an optimizer saves for
them stays in the other order: it fits the same number of processes.)
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.parallel import parallelize_module as _parallelize
from torch.distributed.tensor.placement_types import Placement

from ..functional import multi_head_attention
from ..nn import MultiHeadAttention, TransformerDecoderLayer, TransformerEncoderLayer

_PACKED = ("in_proj_weight", "in_proj_bias")


def _local(parameter: Tensor | None) -> Tensor | None:
    """A process's shard, whose gradient is the parameter's shard of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@contextlib.contextmanager
def _numbers_of_process(rank: int, device: torch.device) -> Iterator[None]:
    """Random numbers that differ from process to process, although all generators have one state
    (so that the dropout of what is replicated is the same everywhere), and have one after it."""
    seed = int(torch.randint(2**62, (), device="cpu"))
    generator = (
        torch.default_generator
        if device.type == "cpu"
        else torch.get_device_module(device).default_generators[device.index]
    )
    state = generator.get_state()
    generator.manual_seed(seed + rank)
    try:
        yield
    finally:
        generator.set_state(state)


class _DividedHeads(MultiHeadAttention):
    """What a MultiHeadAttention becomes: its attributes and methods are those of the process's own
    heads, ``forward`` takes and returns what the undivided module does."""

    _mesh: DeviceMesh
    _style: "MultiHeadAttentionParallel"
    _row_order: Tensor  # row i of the divided in-projection is this one of the undivided

    # Parameters as their local shards; parameters() has the DTensors.
    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        return _local(self._parameters["in_proj_weight"])

    @property
    def q_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        return _local(self._parameters["q_proj_weight"])

    @property
    def k_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        return _local(self._parameters["k_proj_weight"])

    @property
    def v_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        return _local(self._parameters["v_proj_weight"])

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        return _local(self._parameters["in_proj_bias"])

    @property
    def bias_k(self) -> Tensor | None:  # type: ignore[override]
        return _local(self._parameters["bias_k"])

    @property
    def bias_v(self) -> Tensor | None:  # type: ignore[override]
        return _local(self._parameters["bias_v"])

    @property
    def score_weight(self) -> Tensor | None:  # type: ignore[override]
        return _local(self._parameters["score_weight"])

    def _own(self, x: Tensor, dim: int) -> Tensor:
        """This process's heads of a tensor that has all heads in a dimension."""
        return x.chunk(self._mesh.size(), dim)[self._mesh.get_local_rank()]

    def _alibi_slopes(self) -> Tensor | None:
        slopes = super()._alibi_slopes()
        return None if slopes is None else self._own(slopes, 0)

    def _given(self, x: Tensor | None, known: dict[int, Tensor], placement: Placement) -> Any:
        """An argument of forward, whole, as a local tensor; its gradient is the sum of the
        processes' gradients. One tensor given twice stays one."""
        if x is None or not (x.is_floating_point() or isinstance(x, DTensor)):
            return x
        if id(x) not in known:
            if isinstance(x, DTensor):
                whole = x
            else:
                whole = DTensor.from_local(x, self._mesh, [placement], run_check=False)
            whole = whole.redistribute(placements=[Replicate()])
            known[id(x)] = whole.to_local(grad_placements=[Partial()])
        return known[id(x)]

    def _own_mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        if mask is None or mask.dim() != 3:
            return mask
        batch = 1 if query.dim() == 2 else query.size(0 if self.batch_first else 1)
        heads = self.num_heads * self._mesh.size()
        if mask.size(0) != batch * heads:
            raise RuntimeError(
                "MultiHeadAttention: attn_mask of 3 dimensions must be (B * num_heads, Lq, Lk) "
                f"(got attn_mask={mask.shape}, B={batch}, num_heads={heads})"
            )
        return self._own(mask.unflatten(0, (batch, heads)), 1).flatten(0, 1)

    @contextlib.contextmanager
    def _own_numbers(self, x: Tensor) -> Iterator[None]:
        if self.training and self.dropout > 0:
            with _numbers_of_process(self._mesh.get_local_rank(), x.device):
                yield
        else:
            yield

    def _attend(self, query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        with self._own_numbers(query):
            return super()._attend(query, *arguments)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool,
        key_lengths: Tensor | None, key_starts: Tensor | None, query_offset: int,
        query_offsets: Tensor | None,
    ) -> Tensor:  # fmt: skip
        packed, bias = self.in_proj_weight, self.in_proj_bias
        weights = list(self._split_weights()) if packed is None else [packed]
        biases: list[Tensor] = []
        if bias is not None:
            kv = self.kv_embed_dim
            split = packed is None
            biases = list(bias.split_with_sizes([self.embed_dim, kv, kv])) if split else [bias]
        out_weight = _local(self.out_proj.weight)
        assert out_weight is not None
        with self._own_numbers(query):
            part = multi_head_attention(
                query, key, value, self.num_heads, weights, biases, out_weight, None,
                self.score_weight, self.num_kv_heads, attn_mask,
                self.dropout if self.training else 0.0, False, self.scale, key_lengths, key_starts,
                self.window_left, self._window_right(is_causal), query_offset, query_offsets,
                self._alibi_slopes(), self.activation, self.negative_slope,
            )  # fmt: skip
        # As the out-projection would: the bias once, after the sum.
        output: Any = DTensor.from_local(part, self._mesh, [Partial()], run_check=False)
        output = output.redistribute(placements=[self._style.canonical_output(self.batch_first)])
        if self.out_proj.bias is not None:
            output = output + self.out_proj.bias
        return output.to_local() if self._style.use_local_output else output

    def _all_weights(self, weights: Tensor, averaged: bool) -> Tensor:
        if averaged:
            share = weights / self._mesh.size()
            whole = DTensor.from_local(share, self._mesh, [Partial()], run_check=False)
        else:
            heads = Shard(weights.dim() - 3)
            whole = DTensor.from_local(weights, self._mesh, [heads], run_check=False)
        return whole.redistribute(placements=[Replicate()]).to_local()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
        key_lengths: Tensor | None = None, key_starts: Tensor | None = None, query_offset: int = 0,
        query_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        known: dict[int, Tensor] = {}
        layout = self._style.input_layouts
        query, key, value = (self._given(x, known, layout) for x in (query, key, value))
        whole = [
            self._given(x, known, Replicate())
            for x in (key_padding_mask, attn_mask, key_lengths, key_starts, query_offsets)
        ]
        if self._style.output_layouts.is_shard() and query.dim() == 2:
            raise RuntimeError(
                "MultiHeadAttentionParallel: output_layouts must be Replicate() for inputs without "
                f"a batch (got output_layouts={self._style.output_layouts})"
            )
        output, weights = super().forward(
            query, key, value, whole[0], need_weights, self._own_mask(whole[1], query),
            average_attn_weights, is_causal, whole[2], whole[3], query_offset, whole[4],
        )  # fmt: skip
        if weights is not None:
            weights = self._all_weights(weights, average_attn_weights)
        return output, weights

    def reset_parameters(self) -> None:
        raise RuntimeError(
            "MultiHeadAttention: reset_parameters must be called before parallelize_module, which "
            "divides the parameters"
        )

    # State dicts have the rows of the packed in-projection in their usual order.

    def _with_rows(self, parameter: DTensor, whole: Tensor, rows: Tensor) -> DTensor:
        """Rows of a whole tensor, divided as the parameter is."""
        mesh = parameter.device_mesh
        chosen = whole.to(parameter.device)[rows.to(parameter.device)]
        replicated = DTensor.from_local(chosen, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(placements=parameter.placements)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _PACKED:
            x = destination.get(prefix + name)
            if isinstance(x, DTensor) and not x.is_meta:
                in_order = torch.argsort(self._row_order)
                destination[prefix + name] = self._with_rows(x, x.full_tensor(), in_order)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in _PACKED:
            x, parameter = state_dict.get(prefix + name), self._parameters[name]
            if x is not None and isinstance(parameter, DTensor) and x.shape == parameter.shape:
                whole = x.full_tensor() if isinstance(x, DTensor) else x
                rows = self._with_rows(parameter, whole, self._row_order)
                state_dict[prefix + name] = rows
        super()._load_from_state_dict(state_dict, prefix, *others)


class MultiHeadAttentionParallel(ParallelStyle):
    """Divides the heads of a :class:`torch_selfattn.nn.MultiHeadAttention` among the processes of a
    mesh: a style for ``torch.distributed.tensor.parallel.parallelize_module``.

    ``num_heads`` and ``num_kv_heads`` must be multiples of the number of processes. Everything the
    module can do stays: both scores, grouped heads, windows, masks, padding, rotary, ALiBi,
    ``add_bias_kv``, returned weights. Output and gradients are those of the undivided module to
    rounding, but for dropout, which draws other random numbers; generators must have the same seed
    on all processes. State-dict keys stay, with DTensors (``full_tensor()`` is what the undivided
    module has); ``state_dict`` and ``load_state_dict`` must be called on all processes.

    The module's ``num_heads``, ``num_kv_heads``, ``embed_dim`` and ``kv_embed_dim`` are afterwards
    those of the process. Methods other than ``forward`` work on its own heads and are for inference
    (``decode`` of a decoder layer uses them): inputs get no complete gradient through them.

    Args:
        input_layouts: placement of query, key and value where they are no DTensors.
        output_layouts: placement of the output: ``Replicate()``, or ``Shard(d)`` in the layout of
            the module's output (``Shard(1)`` is the length with ``batch_first``).
        use_local_output: return a plain tensor instead of a DTensor.

    Source: Shoeybi et al., "Megatron-LM", 2019.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = Replicate() if input_layouts is None else input_layouts
        self.output_layouts = Replicate() if output_layouts is None else output_layouts
        self.use_local_output = use_local_output

    def canonical_output(self, batch_first: bool) -> Placement:
        """The output's placement where the batch is the first dimension."""
        placement = self.output_layouts
        if isinstance(placement, Shard) and not batch_first and placement.dim in (0, 1):
            return Shard(1 - placement.dim)
        return placement

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MultiHeadAttention) or isinstance(module, _DividedHeads):
            raise NotImplementedError(
                "MultiHeadAttentionParallel: the module must be an undivided "
                f"torch_selfattn.nn.MultiHeadAttention (got {type(module).__name__})"
            )
        size = device_mesh.size()
        if module.num_heads % size != 0 or module.num_kv_heads % size != 0:
            raise ValueError(
                "MultiHeadAttentionParallel: num_heads and num_kv_heads must be divisible by the "
                f"number of processes (got num_heads={module.num_heads}, "
                f"num_kv_heads={module.num_kv_heads}, processes={size})"
            )
        parts = torch.arange(module.embed_dim + 2 * module.kv_embed_dim).split_with_sizes(
            [module.embed_dim, module.kv_embed_dim, module.kv_embed_dim]
        )
        chunks = [part.chunk(size) for part in parts]
        row_order = torch.cat([part[rank] for rank in range(size) for part in chunks])

        def divide(name: str, dim: int) -> None:
            parameter = module._parameters[name]
            if parameter is None:
                return
            x = parameter.detach()
            if name in _PACKED:
                x = x[row_order.to(x.device)]
            divided = distribute_tensor(
                x, device_mesh, [Shard(dim)], src_data_rank=self.src_data_rank
            )
            divided_parameter = nn.Parameter(divided, requires_grad=parameter.requires_grad)
            module.register_parameter(name, divided_parameter)

        for name in (*_PACKED, "q_proj_weight", "k_proj_weight", "v_proj_weight", "score_weight"):
            divide(name, 0)
        divide("bias_k", 2)
        divide("bias_v", 2)
        out_style = RowwiseParallel(
            output_layouts=self.canonical_output(module.batch_first),
            use_local_output=self.use_local_output,
        )
        _parallelize(module.out_proj, device_mesh, out_style, src_data_rank=self.src_data_rank)

        for attribute in ("num_heads", "num_kv_heads", "embed_dim", "kv_embed_dim"):
            setattr(module, attribute, getattr(module, attribute) // size)
        cls = type(module)
        module.__class__ = type(f"Parallel{cls.__name__}", (_DividedHeads, cls), {})
        module._mesh = device_mesh  # type: ignore[assignment]
        module._style = self  # type: ignore[assignment]
        module._row_order = row_order
        return module


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The plan for ``parallelize_module`` that divides every MultiHeadAttention below ``model`` by
    heads, and the feed-forward network of every transformer layer by its hidden units. Norms and
    everything else stay as they are, the same on all processes."""
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention):
            plan[name] = MultiHeadAttentionParallel()
        elif isinstance(module, TransformerEncoderLayer | TransformerDecoderLayer):
            dot = f"{name}." if name else ""
            plan[f"{dot}linear1"] = ColwiseParallel()
            plan[f"{dot}linear2"] = RowwiseParallel()
    if "" in plan:
        raise ValueError(
            "tensor_parallel_plan: the model must contain modules (got a MultiHeadAttention: give "
            "parallelize_module a MultiHeadAttentionParallel for it)"
        )
    return plan
