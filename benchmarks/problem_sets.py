"""What is measured, as data: problems and the sets that bench.py knows by name."""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.records import GRID_HEAD_DIMS, GRID_HEADS, GRID_LENGTHS


@dataclass(frozen=True)
class Problem:
    """One shape of one operator. Letters as in docs/notation.md."""

    op: str  # "dot", "additive", "multi_head", "multi_head_weights" or "rotary"
    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int
    kv_heads: int = 0  # 0: as many as heads
    causal: bool = False
    # As tensors, attn_mask: "bool" (true = attend, no structure), "block" (the same, in blocks of
    # 64 x 64), "float" (added, with gradient), "constant float" (without). As arguments of ours and
    # a boolean mask for the others: "lengths" (padding) and "window" (of Lk / 8 keys).
    mask: str = ""

    @property
    def groups(self) -> int:
        """Query heads that read the same key and value head."""
        return self.heads // (self.kv_heads or self.heads)

    @property
    def full_pairs(self) -> int:
        return self.batch * self.heads * self.query_length * self.key_length

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are allowed."""
        keep = allowed(self)
        if keep is None:
            return self.full_pairs
        return int(keep.sum()) * (self.full_pairs // keep.numel())

    @property
    def label(self) -> str:
        lengths = f"L{self.query_length}"
        if self.key_length != self.query_length:
            lengths = f"Lq{self.query_length} Lk{self.key_length}"
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads else "")
        parts = [f"B{self.batch}", heads, lengths, f"D{self.head_dim}"]
        parts += ["causal"] if self.causal else []
        parts += [f"{self.mask} mask"] if self.mask else []
        return " ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


MASKS_WITHOUT_TENSOR = ("lengths", "window")


def key_lengths(problem: Problem) -> Tensor:
    """Of sample b: (B - b) / B of all keys."""
    b = torch.arange(problem.batch, 0, -1)
    return (problem.key_length * b + problem.batch - 1) // problem.batch


@functools.lru_cache(maxsize=4)
def allowed(problem: Problem) -> Tensor | None:
    """Which pairs are, (1 or B, 1, 1 or Lq, Lk), as all candidates are given it; None: all.

    No row is empty: not every peer gives 0 there.
    """
    p = problem
    generator = torch.Generator().manual_seed(2)
    i, j = torch.arange(p.query_length)[:, None], torch.arange(p.key_length)
    keep = None
    if p.mask == "bool":
        keep = torch.rand(p.batch, 1, p.query_length, p.key_length, generator=generator) < 0.8
        keep[..., 0] = True
    elif p.mask == "block":
        rows, columns = math.ceil(p.query_length / 64), math.ceil(p.key_length / 64)
        blocks = torch.rand(p.batch, 1, rows, columns, generator=generator) < 0.2
        blocks[..., 0] = True
        keep = blocks[..., i // 64, j // 64]
    elif p.mask == "lengths":
        keep = j < key_lengths(p)[:, None, None, None]
    elif p.mask == "window":
        keep = ((i - p.key_length // 8 < j) & (j <= i))[None, None]
    if p.causal:
        past = (j <= i)[None, None]
        keep = past if keep is None else keep & past
    return keep


def make_inputs(
    problem: Problem, dtype: torch.dtype, device: str, requires_grad: bool
) -> dict[str, Tensor]:
    """The tensor arguments by name, standard normal, the same for every candidate and pass."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator) * std
        return values.to(device, dtype).requires_grad_(requires_grad)

    p = problem
    if p.op.startswith("multi_head"):
        width = p.heads * p.head_dim

        def parameter(*shape: int, std: float = 1.0) -> Tensor:
            return nn.Parameter(normal(*shape, std=std).detach(), requires_grad)

        return {
            "x": normal(p.batch, p.query_length, width),
            "in_proj_weight": parameter(3 * width, width, std=width**-0.5),
            "in_proj_bias": parameter(3 * width),
            "out_proj_weight": parameter(width, width, std=width**-0.5),
            "out_proj_bias": parameter(width),
        }
    if p.op == "rotary":
        angles = (
            torch.rand(p.query_length, p.head_dim // 2, generator=generator).mul(6.28).to(device)
        )
        table_dtype = torch.promote_types(dtype, torch.float32)
        x = normal(p.batch, p.heads, p.query_length, p.head_dim)
        return {"x": x, "cos": angles.cos().to(table_dtype), "sin": angles.sin().to(table_dtype)}
    kv_heads = p.kv_heads or p.heads
    inputs = {
        "query": normal(p.batch, p.heads, p.query_length, p.head_dim),
        "key": normal(p.batch, kv_heads, p.key_length, p.head_dim),
        "value": normal(p.batch, kv_heads, p.key_length, p.head_dim),
    }
    if p.op == "additive":
        inputs["weight"] = normal(p.heads, p.head_dim, std=p.head_dim**-0.5)
    if p.mask.endswith("float"):
        mask = normal(1, p.heads, p.query_length, p.key_length)
        inputs["attn_mask"] = mask if p.mask == "float" else mask.detach()
    elif p.mask and p.mask not in MASKS_WITHOUT_TENSOR:
        keep = allowed(replace(p, causal=False))
        assert keep is not None
        inputs["attn_mask"] = keep.to(device)
    return inputs


def _square(op: str, heads: int, length: int, head_dim: int, **options: Any) -> Problem:
    return Problem(op, 1, heads, length, length, head_dim, **options)


def _grid(lengths: Sequence[int]) -> list[Problem]:
    return [
        _square("dot", heads, length, head_dim, causal=causal)
        for length in lengths
        for heads in GRID_HEADS
        for head_dim in GRID_HEAD_DIMS
        for causal in (False, True)
    ]


# A problem stands in one set only (but for `quick`, `memory` and the sets of GPUs, of which reports
# are made apart): a report must not compare figures of different runs.
SETS: dict[str, list[Problem]] = {
    # A minute: what `make bench` runs.
    "quick": [_square(op, 8, length, 64) for op in ("dot", "additive") for length in (128, 512)],
    # The dot product over shapes which stress different parts of a kernel.
    "grid_short": _grid(GRID_LENGTHS[:-1]),
    "grid_long": _grid(GRID_LENGTHS[-1:]),
    # The rest of the dot product: the length that the README has of both scores, masks, grouped
    # heads, another number of keys, decoding steps.
    "shapes": [
        *(_square("dot", 8, 2048, 64, causal=causal) for causal in (False, True)),
        *(
            _square("dot", 8, length, 64, mask=mask)
            for length in (512, 2048)
            for mask in ("bool", "constant float", "float")
        ),
        _square("dot", 8, 512, 64, kv_heads=2),
        Problem("dot", 1, 8, 128, 1024, 64),
        *(Problem("dot", 1, heads, 1, 4096, 64) for heads in (8, 32)),
    ],
    # The additive score: time against length, decoding steps, also of a recurrent decoder, and two
    # small ones of models.
    "additive": [
        *(_square("additive", 8, length, d) for length in (128, 512, 2048) for d in (16, 64, 128)),
        *(Problem("additive", 1, 8, 1, 2048, d) for d in (16, 64, 128)),
        Problem("additive", 64, 1, 1, 64, 512),
        Problem("additive", 32, 4, 32, 32, 24),
        Problem("additive", 64, 1, 12, 16, 96),
    ],
    # The shape by which CUDA kernels of the additive score are compared, and the dot product.
    "additive_gpu": [_square("additive", 64, 1024, 64)],
    "dot_gpu": [
        _square("dot", heads, length, head_dim, causal=causal)
        for heads, length, head_dim in ((64, 1024, 64), (32, 4096, 128))
        for causal in (False, True)
    ],
    # Time against the pairs that are left.
    "masks": [
        Problem(op, 4, 2, 1024, 1024, 64, causal=mask == "causal", mask=mask.replace("causal", ""))
        for op in ("additive", "dot")
        for mask in ("", "causal", "lengths", "window", "block", "bool")
    ],
    # Projections and attention, against nn.MultiheadAttention.
    "modules": [
        Problem("multi_head", 8, 8, 512, 512, 64),
        Problem("multi_head_weights", 8, 8, 512, 512, 64),
        Problem("multi_head", 32, 8, 64, 64, 32),
    ],
    "positional": [_square("rotary", 8, length, 64) for length in (128, 2048)],
    # Tensors so small that what is measured is the way to the kernel and back.
    "overhead": [_square("dot", 1, 4, 8), _square("additive", 1, 4, 8)],
    # Peak memory is linear in the length; use with --memory.
    "memory": [_square("additive", 8, length, 64) for length in (1024, 2048, 4096)],
}
