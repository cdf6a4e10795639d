"""The problem list of the attention operators, and what they compute in plain PyTorch.

`PROBLEMS` has one entry for each way in which a call can differ; every tester runs over it. The
reference below is written with PyTorch's own broadcasting, in float64, and shares nothing with the
package (torch_selfattn.reference is tested against it as well).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]


# ---- Reference ----------------------------------------------------------------------------------


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_factors: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    query_offset: int = 0,
    query_offsets: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and weights (before dropout) in float64, differentiable to any order."""
    query, key, value = query.double(), key.double(), value.double()
    if enable_gqa:
        heads = query.shape[-3]
        key = key.repeat_interleave(heads // key.shape[-3], -3)
        value = value.repeat_interleave(heads // value.shape[-3], -3)
    leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    rank = len(leading) + 2
    pairs = (*leading, query.shape[-2], key.shape[-2])

    if weight is None:
        factor = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
        scores = query @ key.mT * factor
    else:
        factor = 1.0 if scale is None else scale
        w = weight.double()
        w = w[:, None, None, :] if w.dim() == 2 else w  # beside (H, Lq, Lk, E)
        x = query.unsqueeze(-2) + key.unsqueeze(-3)
        slope = {"relu": 0.0, "leaky_relu": negative_slope}
        f = x.tanh() if activation == "tanh" else torch.where(x > 0, x, slope[activation] * x)
        scores = (w * f).sum(-1) * factor
    scores = scores.expand(pairs)

    def per_sample(x: Tensor) -> Tensor:  # beside (..., H, Lq, Lk), or (N, Lq, Lk)
        return x.reshape(x.shape + (1,) * (rank - x.dim()))

    allowed = torch.ones(pairs, dtype=torch.bool, device=query.device)
    j = torch.arange(key.shape[-2], device=query.device)
    i = torch.arange(query.shape[-2], device=query.device)[:, None] + query_offset
    if query_offsets is not None:
        i = i + per_sample(query_offsets)
    if alibi_slopes is not None:
        slopes = alibi_slopes.double() if rank > 3 else alibi_slopes.double()[..., 0]
        scores = scores - slopes[..., None, None] * (i - j).abs()
    if is_causal:
        allowed = allowed & (j <= i)
    if window_left >= 0:
        allowed = allowed & (j >= i - window_left)
    if window_right >= 0:
        allowed = allowed & (j <= i + window_right)
    if key_lengths is not None:
        allowed = allowed & (j < per_sample(key_lengths))
    if key_starts is not None:
        allowed = allowed & (j >= per_sample(key_starts))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            allowed = allowed & attn_mask
        else:
            bias = attn_mask.double()
            allowed = allowed & (bias != -math.inf)
            scores = scores + torch.where(bias == -math.inf, 0.0, bias)

    some = allowed.any(-1, keepdim=True)
    # A row without a key is computed as a row of zeros, and its results are replaced afterwards.
    scores = torch.where(some, torch.where(allowed, scores, -math.inf), 0.0)
    weights = torch.where(some, torch.softmax(scores, -1), 0.0)
    lse = torch.where(some[..., 0], torch.logsumexp(scores, -1), -math.inf)
    dropped = weights if dropout_factors is None else weights * dropout_factors
    return dropped @ value, lse, weights


def philox_dropout_factors(
    philox_state: Tensor, batch: int, heads: int, queries: int, keys: int, p: float
) -> Tensor:
    """The factors 0 and 1 / (1 - p) of csrc/kernels/common/philox.h, by Philox4x32-10 in numpy."""
    mask = np.uint64(0xFFFFFFFF)
    state = philox_state.cpu().numpy().astype(np.int64).view(np.uint64)
    seed, offset = int(state[0]), int(state[1])
    blocks_per_row = (keys + 3) // 4
    index = np.arange(batch * heads * queries * blocks_per_row, dtype=np.uint64)
    shift = np.uint64(32)
    c = [
        index & mask,
        index >> shift,
        np.full_like(index, offset & 0xFFFFFFFF),
        np.full_like(index, offset >> 32),
    ]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c[0]
        p1 = np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> shift) ^ c[1] ^ np.uint64(k0),
            p1 & mask,
            (p0 >> shift) ^ c[3] ^ np.uint64(k1),
            p0 & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    random = np.stack(c, -1).reshape(batch, heads, queries, blocks_per_row * 4)[..., :keys]
    if p >= 1:
        return torch.zeros(random.shape, dtype=torch.float64)
    keep = random >= np.uint64(int(p * 2**32))
    return torch.from_numpy(keep.astype(np.float64) / (1.0 - p))


# ---- Problems -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """kind: "bool", "float" (dtype of query), "float32"; holes: some pairs, and one whole row of
    queries, may not attend (-inf in a floating mask); block: the holes are squares of this size."""

    kind: str
    shape: Shape
    holes: bool = True
    block: int = 1


@dataclass(frozen=True)
class Problem:
    """One call of an attention operator by its shapes; `arguments` makes the tensors."""

    name: str
    query: Shape
    key: Shape
    value: Shape
    mask: Mask | None = None
    weight_per_head: bool = True
    key_lengths: Any = None  # nested lists, one number for each sample
    key_starts: Any = None
    query_offsets: Any = None
    index_dtype: torch.dtype = torch.int64
    slopes: Shape | None = None  # of alibi_slopes
    slopes_dtype: torch.dtype | None = None  # that of query by default
    options: dict[str, Any] = field(default_factory=dict)
    large: bool = False  # too large for gradcheck, which costs a call per input element
    magnitude: float = 1.0  # standard deviation of query, key, value

    def __str__(self) -> str:
        return self.name

    @property
    def dropout_p(self) -> float:
        return self.options.get("dropout_p", 0.0)

    @property
    def rank(self) -> int:
        return max(len(self.query), len(self.key), len(self.value))

    @property
    def empty(self) -> bool:
        return 0 in (*self.query, *self.key, *self.value)

    def heads(self) -> int:
        if self.rank < 4:
            return 1
        return max(s[-3] if len(s) > 2 else 1 for s in (self.query, self.key, self.value))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(sum(map(ord, self.name)))

    def arguments(
        self, score: str, dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> dict[str, Any]:
        """Keyword arguments of the public operator. score: "dot" or "additive"."""
        generator = self.generator()

        def randn(shape: Shape) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def index(values: Any) -> Tensor:
            return torch.tensor(values, dtype=self.index_dtype, device=device)

        arguments: dict[str, Any] = {
            name: (randn(shape) * self.magnitude).to(device, dtype)
            for name, shape in (("query", self.query), ("key", self.key), ("value", self.value))
        }
        if score == "additive":
            per_head = self.weight_per_head and self.rank >= 4
            shape = (self.heads(), self.query[-1]) if per_head else (self.query[-1],)
            # Scores of size 1 for any head dim, as of the dot product.
            size = min(1.0, 2.0 * self.query[-1] ** -0.5) if self.query[-1] > 0 else 1.0
            arguments["weight"] = (randn(shape) * size).to(device, dtype)
        if self.mask is not None:
            arguments["attn_mask"] = self._mask(randn, dtype).to(device)
        for name in ("key_lengths", "key_starts", "query_offsets"):
            if getattr(self, name) is not None:
                arguments[name] = index(getattr(self, name))
        if self.slopes is not None:
            # Of both signs, and biases of size 1 or so, as the scores.
            distance = max(self.query[-2], self.key[-2]) + abs(self.options.get("query_offset", 0))
            slopes = randn(self.slopes) * min(0.5, 3.0 / max(distance, 1))
            arguments["alibi_slopes"] = slopes.to(device, self.slopes_dtype or dtype)
        return arguments | self.options

    def _mask(self, randn: Any, dtype: torch.dtype) -> Tensor:
        assert self.mask is not None
        if self.mask.block > 1:
            *leading, rows, columns = self.mask.shape
            size = self.mask.block
            coarse = randn((*leading, -(-rows // size), -(-columns // size))) < 0.3
            blocks = coarse.repeat_interleave(size, -2).repeat_interleave(size, -1)
            closed = blocks[..., :rows, :columns].clone()
        else:
            closed = randn(self.mask.shape) < -0.7
        if self.mask.holes and closed.dim() >= 2 and closed.shape[-2] > 1:
            closed[..., 1, :] = True
        if not self.mask.holes:
            closed[:] = False
        if self.mask.kind == "bool":
            return ~closed
        values = randn(self.mask.shape).masked_fill(closed, -math.inf)
        return values.to(torch.float32 if self.mask.kind == "float32" else dtype)


def reference_of(arguments: dict[str, Any], dropout_factors: Tensor | None = None) -> Any:
    """reference_attention on the arguments of a public operator."""
    arguments = dict(arguments)
    arguments.pop("dropout_p", None)
    return reference_attention(dropout_factors=dropout_factors, **arguments)


def _list() -> list[Problem]:
    problems: list[Problem] = []

    def add(name: str, query: Shape, key: Shape, value: Shape, **rest: Any) -> None:
        fields = Problem.__dataclass_fields__
        own = {k: rest.pop(k) for k in list(rest) if k in fields}
        problems.append(Problem(name, query, key, value, options=rest, **own))

    q, k, v = (2, 2, 4, 3), (2, 2, 5, 3), (2, 2, 5, 2)
    pairs = (2, 2, 4, 5)
    add("plain", q, k, v)
    add("shared weight", q, k, v, weight_per_head=False)
    add("one element", (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1))
    add("one query", (2, 2, 1, 3), k, v)
    add("one key", q, (2, 2, 1, 3), (2, 2, 1, 2))
    add("scale", q, k, v, scale=0.7)
    add("scale 0", q, k, v, scale=0.0)
    add("negative scale", q, k, v, scale=-1.3)
    # Sizes beside the tiles of the kernels (8, 16, 32, 64, 128, 256) and over several of them.
    add("odd sizes", (1, 2, 19, 9), (1, 2, 35, 9), (1, 2, 35, 17), large=True)
    add("tile sizes", (1, 2, 32, 16), (1, 2, 64, 16), (1, 2, 64, 16), large=True)
    add("long", (1, 1, 67, 33), (1, 1, 133, 33), (1, 1, 133, 40), large=True)
    add("long causal", (1, 2, 131, 8), (1, 2, 131, 8), (1, 2, 131, 8), is_causal=True, large=True)
    add("one query, long", (1, 2, 1, 64), (1, 2, 300, 64), (1, 2, 300, 64), large=True)
    add("few queries of groups, long", (2, 6, 2, 16), (2, 2, 300, 16), (2, 2, 300, 24),
        enable_gqa=True, key_lengths=[300, 41], large=True)  # fmt: skip
    add("wide heads", (1, 1, 5, 257), (1, 1, 6, 257), (1, 1, 6, 130), large=True)
    add(
        "long window", (1, 1, 150, 8), (1, 1, 140, 8), (1, 1, 140, 8),
        window_left=20, window_right=3, query_offset=-4, large=True,
    )  # fmt: skip
    # Heads and leading dimensions.
    add("grouped heads", (2, 4, 4, 3), k, v, enable_gqa=True)
    add("grouped, one head", (2, 3, 4, 3), (2, 1, 5, 3), (2, 1, 5, 2), enable_gqa=True)
    add("grouped unequally", (1, 4, 4, 3), (1, 2, 5, 3), (1, 1, 5, 2), enable_gqa=True)
    add("key heads broadcast", q, (2, 1, 5, 3), (2, 1, 5, 2))
    add("value heads broadcast", q, k, (2, 1, 5, 2))
    add("query heads broadcast", (2, 1, 4, 3), k, v)
    add("key batch broadcast", q, (1, 2, 5, 3), v)
    add("query batch broadcast", (1, 2, 4, 3), k, v)
    add("2-D", q[2:], k[2:], v[2:])
    add("3-D", q[1:], k[1:], v[1:])
    add("3-D broadcast", q[1:], (1, 5, 3), v[2:])
    add("5-D", (2, 1, 2, 4, 3), (1, 3, 2, 5, 3), (2, 3, 2, 5, 2))
    add("mixed ranks", q, k[1:], v[2:])
    # Pairs that may not attend.
    add("causal", q, (2, 2, 4, 3), (2, 2, 4, 2), is_causal=True)
    add("causal, more keys", (1, 2, 3, 3), (1, 2, 5, 3), (1, 2, 5, 2), is_causal=True)
    add("causal, more queries", (1, 2, 5, 3), (1, 2, 3, 3), (1, 2, 3, 2), is_causal=True)
    add("causal, bottom right", (1, 2, 3, 3), (1, 2, 5, 3), (1, 2, 5, 2),
        is_causal=True, query_offset=2)  # fmt: skip
    add("before the first key", q, k, v, is_causal=True, query_offset=-2)
    add("window left", q, k, v, window_left=1)
    add("window right", q, k, v, window_right=1)
    add("window both", q, k, v, window_left=1, window_right=0)
    add("window of one", q, k, v, window_left=0, window_right=0)
    add("window past the keys", q, k, v, window_left=1, window_right=1, query_offset=3)
    add("query offsets", q, k, v, window_left=2, window_right=1, query_offsets=[3, -2],
        query_offset=1)  # fmt: skip
    add("key lengths", q, k, v, key_lengths=[5, 2])
    add("key lengths with 0", q, k, v, key_lengths=[0, 3], index_dtype=torch.int32)
    add("key starts", q, k, v, key_starts=[1, 5])
    add("key range", q, k, v, key_lengths=[4, 2], key_starts=[1, 3], index_dtype=torch.int32)
    add("causal and lengths", q, k, v, key_lengths=[3, 5], is_causal=True, query_offset=1)
    add("3-D lengths", q[1:], k[1:], v[1:], key_lengths=[2, 4])
    add("2-D length", q[2:], k[2:], v[2:], key_lengths=3)
    add("5-D lengths", (1, 2, 2, 3, 2), (2, 1, 2, 4, 2), (2, 1, 2, 4, 2),
        key_lengths=[[1, 2], [3, 4]], query_offsets=[[0, 1], [1, 2]], window_right=0)  # fmt: skip
    # Masks, of every broadcastable shape.
    for kind in ("bool", "float"):
        for shape in (
            pairs,
            (4, 5),
            (5,),
            (4, 1),
            (1, 1),
            (2, 1, 1, 5),
            (1, 2, 4, 1),
            (2, 1, 4, 5),
        ):
            add(f"{kind} mask {shape}", q, k, v, mask=Mask(kind, shape))
    add("float mask without holes", q, k, v, mask=Mask("float", pairs, holes=False))
    add("float32 mask", q, k, v, mask=Mask("float32", (2, 1, 4, 5)))
    add("bool mask 3-D", q[1:], k[1:], v[1:], mask=Mask("bool", (2, 4, 5)))
    add("float mask 2-D", q[2:], k[2:], v[2:], mask=Mask("float", (4, 5)))
    add("float mask 5-D", (2, 1, 2, 3, 2), (1, 2, 2, 4, 2), (2, 2, 2, 4, 2),
        mask=Mask("float", (2, 1, 2, 3, 4)))  # fmt: skip
    add("mask and causal", q, k, v, mask=Mask("float", pairs), window_right=0)
    add("mask, window, lengths, groups", (2, 4, 4, 3), k, v, mask=Mask("float", (4, 1, 5)),
        window_left=2, key_lengths=[5, 3], enable_gqa=True)  # fmt: skip
    add("long mask", (1, 2, 40, 8), (1, 2, 70, 8), (1, 2, 70, 8), mask=Mask("float", (2, 40, 70)),
        large=True)  # fmt: skip
    add("long bool mask", (2, 2, 40, 8), (2, 2, 70, 8), (2, 2, 70, 8),
        mask=Mask("bool", (2, 1, 40, 70)), large=True)  # fmt: skip
    # ALiBi.
    add("slopes", q, k, v, slopes=(2,))
    add("slopes per sample", q, k, v, slopes=(2, 2))
    add("float32 slopes", q, k, v, slopes=(2,), slopes_dtype=torch.float32)
    add("slopes, causal", q, (2, 2, 4, 3), (2, 2, 4, 2), slopes=(2,), is_causal=True)
    add("slopes, offsets", q, k, v, slopes=(2, 2), query_offset=-2, query_offsets=[3, -5])
    add("slopes, before the keys", q, k, v, slopes=(2,), query_offset=-10)
    add("slopes, mask, window, lengths, groups", (2, 4, 4, 3), k, v, mask=Mask("float", (4, 1, 5)),
        slopes=(2, 4), window_left=2, key_lengths=[5, 3], query_offsets=[0, 1],
        enable_gqa=True)  # fmt: skip
    add("slopes, bool mask", q, k, v, slopes=(2,), mask=Mask("bool", (2, 1, 4, 5)))
    add("slopes, broadcast heads", (2, 1, 4, 3), k, (1, 2, 5, 2), slopes=(2,))
    add("slopes, 2-D", q[2:], k[2:], v[2:], slopes=(1,))
    add("slopes, 3-D", q[1:], k[1:], v[1:], slopes=(2, 1))
    add("slopes, 5-D", (2, 1, 2, 4, 3), (1, 3, 2, 5, 3), (2, 3, 2, 5, 2), slopes=(2, 3, 2))
    add("slopes, dropout", q, k, v, slopes=(2,), dropout_p=0.4)
    add("slopes, one query, long", (1, 2, 1, 64), (1, 2, 300, 64), (1, 2, 300, 64), slopes=(2,),
        query_offset=299, large=True)  # fmt: skip
    add("long slopes", (2, 2, 67, 8), (2, 2, 76, 8), (2, 2, 76, 8), slopes=(2,),
        is_causal=True, query_offset=9, large=True)  # fmt: skip
    add("mask of blocks", (1, 2, 90, 8), (1, 2, 330, 8), (1, 2, 330, 8),
        mask=Mask("bool", (90, 330), block=40), large=True)  # fmt: skip
    add("mask of blocks, few queries", (2, 4, 2, 8), (2, 1, 330, 8), (2, 1, 330, 8),
        mask=Mask("float", (2, 1, 2, 330), holes=True, block=50), enable_gqa=True,
        large=True)  # fmt: skip
    # Dropout.
    add("dropout", q, k, v, dropout_p=0.4)
    add("dropout and mask", q, k, v, dropout_p=0.3, mask=Mask("float", (4, 5)))
    add("dropout grouped causal", (2, 4, 4, 3), k, v, dropout_p=0.5, enable_gqa=True,
        is_causal=True)  # fmt: skip
    add("long dropout", (1, 2, 37, 8), (1, 2, 71, 8), (1, 2, 71, 8), dropout_p=0.2, large=True)
    # Nothing to do, or next to nothing.
    for name, dim in (("batch", 0), ("heads", 1)):
        zero = [(*s[:dim], 0, *s[dim + 1 :]) for s in (q, k, v)]
        add(f"zero {name}", zero[0], zero[1], zero[2])
    add("zero queries", (2, 2, 0, 3), k, v)
    add("zero keys", q, (2, 2, 0, 3), (2, 2, 0, 2))
    add("zero head dim", (2, 2, 4, 0), (2, 2, 5, 0), v)
    add("zero value dim", q, k, (2, 2, 5, 0))
    add("slopes, zero heads", (2, 0, 4, 3), (2, 0, 5, 3), (2, 0, 5, 2), slopes=(0,))
    add("slopes, zero queries", (2, 2, 0, 3), k, v, slopes=(2,))
    add("slopes, zero keys", q, (2, 2, 0, 3), (2, 2, 0, 2), slopes=(2, 2))
    add("slopes, zero head dim", (2, 2, 4, 0), (2, 2, 5, 0), v, slopes=(2,))
    # Scores far from 0: the softmax is nearly one-hot.
    add("large scores", (1, 2, 9, 8), (1, 2, 11, 8), (1, 2, 11, 8), magnitude=4.0, large=True)
    return problems


PROBLEMS = _list()
BY_NAME = {p.name: p for p in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS)

# One problem for each path through the code, and the shortest list that still has every argument.
FEW = [
    "plain",
    "grouped heads",
    "3-D",
    "key batch broadcast",
    "float mask (2, 1, 1, 5)",
    "bool mask (4, 5)",
    "mask, window, lengths, groups",
    "query offsets",
    "slopes, mask, window, lengths, groups",
    "dropout and mask",
]
# Beside the first, for what changes only the score.
SCORES = [
    "shared weight",
    "one element",
    "one query",
    "negative scale",
    "odd sizes",
    "long causal",
    "few queries of groups, long",
    "wide heads",
    "long window",
    "grouped unequally",
    "5-D",
    "causal",
    "key lengths with 0",
    "float mask (2, 2, 4, 5)",
    "mask of blocks",
    "mask of blocks, few queries",
    "slopes per sample",
    "long slopes",
    "long dropout",
    "zero keys",
    "zero head dim",
    "large scores",
]
FEWEST = ["3-D", "slopes, mask, window, lengths, groups", "dropout and mask"]
