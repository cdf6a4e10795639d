"""Attention over several processes (``torch.distributed``). Not imported by ``torch_selfattn``.

Importing this module registers the sharding rules of the operators, so that they take DTensors
(:mod:`torch_selfattn.distributed._sharding` says which placements). It also has

* :class:`MultiHeadAttentionParallel`, the heads of a :class:`torch_selfattn.nn.MultiHeadAttention`
  divided among the processes by ``parallelize_module`` (tensor parallel), and
  :func:`tensor_parallel_plan` for whole transformers;
* :func:`ring_attention`, the sequence divided among the processes (context parallel), and
  :func:`ring_positions`.

DDP and FSDP2 need nothing of it. docs/distributed.md has a page of examples.
"""

from . import _sharding
from ._ring import ring_attention, ring_positions
from ._tensor_parallel import MultiHeadAttentionParallel, tensor_parallel_plan

__all__ = [
    "MultiHeadAttentionParallel",
    "ring_attention",
    "ring_positions",
    "tensor_parallel_plan",
]

_sharding.register()
