"""What is measured, as data: problems and the sets that bench.py knows by name."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """One shape of one operator. Letters as in docs/notation.md."""

    op: str  # "dot", "additive", "multi_head" or "rotary"
    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int
    kv_heads: int = 0  # 0: as many as heads
    causal: bool = False
    mask: str = ""  # "", "bool" (true = attend) or "float" (added, with gradient)

    @property
    def groups(self) -> int:
        """Query heads that read the same key and value head."""
        return self.heads // (self.kv_heads or self.heads)

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are computed; a causal problem has about half of them."""
        per_head = self.query_length * self.key_length
        if self.causal:
            per_head = sum(min(i + 1, self.key_length) for i in range(self.query_length))
        return self.batch * self.heads * per_head

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


def make_inputs(
    problem: Problem, dtype: torch.dtype, device: str, requires_grad: bool
) -> dict[str, Tensor]:
    """The tensor arguments by name, standard normal, the same for every candidate and pass."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator) * std
        return values.to(device, dtype).requires_grad_(requires_grad)

    p = problem
    if p.op == "multi_head":
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
    if p.mask == "float":
        inputs["attn_mask"] = normal(1, p.heads, p.query_length, p.key_length)
    elif p.mask == "bool":
        keep = torch.rand(p.batch, 1, p.query_length, p.key_length, generator=generator) < 0.8
        keep[..., 0] = True  # no empty row: not every peer gives 0 there
        inputs["attn_mask"] = keep.to(device)
    return inputs


def _square(op: str, heads: int, length: int, head_dim: int, **options: Any) -> Problem:
    return Problem(op, 1, heads, length, length, head_dim, **options)


LENGTHS = (128, 512, 2048)
SHAPES = ((32, 128, 64), (8, 1024, 32), (8, 1024, 128), (1, 4096, 64))

SETS: dict[str, list[Problem]] = {
    # A minute: what `make bench` runs.
    "quick": [_square(op, 8, length, 64) for op in ("dot", "additive") for length in (128, 512)],
    # Time against sequence length.
    "lengths": [
        *(_square("dot", 8, length, 64) for length in LENGTHS),
        *(_square("dot", 8, length, 64, causal=True) for length in LENGTHS),
        *(_square("additive", 8, length, 64) for length in LENGTHS),
    ],
    # The dot product over more shapes, which stress different parts of a kernel. A problem stands
    # in one set only: a report must not compare figures of different runs.
    "shapes": [
        *(_square("dot", *shape) for shape in SHAPES),
        *(_square("dot", *shape, causal=True) for shape in SHAPES),
        _square("dot", 8, 512, 64, mask="bool"),
        _square("dot", 8, 512, 64, mask="float"),
        _square("dot", 8, 512, 64, kv_heads=2),
        Problem("dot", 1, 8, 128, 1024, 64),
        Problem("dot", 1, 8, 1, 4096, 64),  # one decoding step
    ],
    # The additive score with masks, and between sequences of different lengths.
    "additive": [
        _square("additive", 8, 512, 64, causal=True),
        _square("additive", 8, 512, 64, mask="bool"),
        Problem("additive", 32, 4, 32, 32, 24),
        Problem("additive", 64, 1, 12, 16, 96),
    ],
    # Projections and attention, against nn.MultiheadAttention.
    "modules": [
        Problem("multi_head", 8, 8, 512, 512, 64),
        Problem("multi_head", 32, 8, 64, 64, 32),
    ],
    "positional": [_square("rotary", 8, length, 64) for length in (128, 2048)],
    # Tensors so small that what is measured is the way to the kernel and back.
    "overhead": [_square("dot", 1, 4, 8), _square("additive", 1, 4, 8)],
    # Peak memory is linear in the length; use with --memory.
    "memory": [_square("additive", 8, length, 64) for length in (1024, 2048, 4096)],
}
