"""multi_head_attention: projections and attention in one operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from attention_problems import Mask, reference_attention
from compiler_tester import CompilerTester
from operator_tester import OPS, Arguments
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class MultiHeadProblem:
    """batch 0: no batch dimension. inputs: "self" (query is key is value, one packed product),
    "memory" (key is value) or "different"."""

    name: str
    inputs: str = "different"
    batch: int = 2
    queries: int = 3
    keys: int = 4
    embed_dim: int = 4
    heads: int = 2
    kv_heads: int | None = None
    packed: bool = True
    bias: bool = True
    additive: bool = False
    mask: Mask | None = None
    slopes: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    large: bool = False
    empty: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def dropout_p(self) -> float:
        return self.options.get("dropout_p", 0.0)

    def arguments(self, dtype: torch.dtype, device: str = "cpu") -> Arguments:
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))

        def randn(*shape: int, size: float = 1.0) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (x * size).to(device, dtype)

        lead = (self.batch,) if self.batch else ()
        kv_dim = self.embed_dim // self.heads * (self.kv_heads or self.heads)
        sizes = [self.embed_dim, kv_dim, kv_dim]
        # With three weights query, key and value may have different widths.
        widths = [self.embed_dim] * 3 if self.packed else [self.embed_dim, 5, 3]
        if self.inputs == "self":
            query = key = value = randn(*lead, self.queries, self.embed_dim)
        else:
            query = randn(*lead, self.queries, widths[0])
            key = randn(*lead, self.keys, widths[1])
            value = key if self.inputs == "memory" else randn(*lead, self.keys, widths[2])
        factor = self.embed_dim**-0.5
        if self.packed:
            weights = [randn(sum(sizes), self.embed_dim, size=factor)]
            biases = [randn(sum(sizes))] if self.bias else []
        else:
            weights = [randn(n, w, size=factor) for n, w in zip(sizes, widths, strict=True)]
            biases = [randn(n) for n in sizes] if self.bias else []
        arguments: Arguments = {
            "query": query,
            "key": key,
            "value": value,
            "num_heads": self.heads,
            "in_proj_weight": weights,
            "in_proj_bias": biases,
            "out_proj_weight": randn(self.embed_dim + 1, self.embed_dim, size=factor),
        }
        if self.bias:
            arguments["out_proj_bias"] = randn(self.embed_dim + 1)
        if self.additive:
            arguments["score_weight"] = randn(self.heads, self.embed_dim // self.heads)
        if self.kv_heads is not None:
            arguments["num_kv_heads"] = self.kv_heads
        if self.mask is not None:
            closed = randn(*self.mask.shape) < -0.7
            bias = randn(*self.mask.shape).masked_fill(closed, float("-inf"))
            arguments["attn_mask"] = ~closed if self.mask.kind == "bool" else bias
        if self.slopes is not None:
            arguments["alibi_slopes"] = randn(*self.slopes)
        return arguments | self.options


PROBLEMS = [
    MultiHeadProblem("self", "self"),
    MultiHeadProblem("self, no bias", "self", bias=False),
    MultiHeadProblem("memory", "memory"),
    MultiHeadProblem("different"),
    MultiHeadProblem("three weights", packed=False),
    MultiHeadProblem("three weights, no bias", packed=False, bias=False),
    MultiHeadProblem("no batch", batch=0),
    MultiHeadProblem("no batch, self", "self", batch=0),
    MultiHeadProblem("one head", heads=1),
    MultiHeadProblem("grouped", "self", heads=4, kv_heads=2),
    MultiHeadProblem("grouped, memory", "memory", heads=4, kv_heads=1),
    MultiHeadProblem("additive", additive=True),
    MultiHeadProblem("additive, self, grouped", "self", heads=4, kv_heads=2, additive=True),
    MultiHeadProblem("causal", "self", options={"is_causal": True}),
    MultiHeadProblem("window", options={"window_left": 1, "query_offset": 1, "scale": 0.3}),
    MultiHeadProblem("bool mask", mask=Mask("bool", (3, 4))),
    MultiHeadProblem("float mask", mask=Mask("float", (2, 1, 3, 4))),
    MultiHeadProblem(
        "lengths", options={"key_lengths": torch.tensor([4, 0]), "key_starts": torch.tensor([1, 0])}
    ),
    MultiHeadProblem("slopes", "self", slopes=(2,), options={"query_offset": -2}),
    MultiHeadProblem(
        "slopes, grouped, additive", heads=4, kv_heads=2, additive=True, slopes=(2, 4)
    ),
    MultiHeadProblem("slopes, no batch", batch=0, slopes=(2,)),
    MultiHeadProblem("dropout", options={"dropout_p": 0.4}),
    MultiHeadProblem("larger", "self", queries=33, embed_dim=24, heads=3, large=True),
    MultiHeadProblem("zero batch", batch=0, queries=0, keys=3, empty=True),
    MultiHeadProblem("zero keys", keys=0, empty=True),
]


class TestMultiHeadAttention(CompilerTester):
    op = "multi_head_attention"
    problems: ClassVar[list[Any]] = PROBLEMS
    few: ClassVar[list[str]] = [
        "self", "three weights", "additive, self, grouped", "float mask", "slopes",
    ]  # fmt: skip
    fewest: ClassVar[list[str]] = ["self", "dropout"]

    def arguments(self, problem: MultiHeadProblem, dtype: torch.dtype, device: str) -> Arguments:
        return problem.arguments(dtype, device)

    def reference(self, arguments: Arguments, dropout_factors: Tensor | None) -> Any:
        a = {k: v for k, v in arguments.items() if k != "dropout_p"}
        inputs = [a.pop(name) for name in ("query", "key", "value")]
        heads = a.pop("num_heads")
        kv_heads = a.pop("num_kv_heads", heads)
        weights, biases = a.pop("in_proj_weight"), a.pop("in_proj_bias")
        out_weight, out_bias = a.pop("out_proj_weight"), a.pop("out_proj_bias", None)
        score_weight = a.pop("score_weight", None)
        dim = out_weight.shape[1] // heads
        sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        if len(weights) == 1:
            weights = weights[0].split(sizes)
            biases = biases[0].split(sizes) if biases else []

        def project(which: int) -> Tensor:
            x = F.linear(inputs[which], weights[which], biases[which] if biases else None)
            return x.unflatten(-1, (-1, dim)).transpose(-3, -2)

        q, k, v = (project(which) for which in range(3))
        if q.dim() == 3:  # without a batch: the heads are samples of one head
            dropout_factors = None if dropout_factors is None else dropout_factors[0]
            if "alibi_slopes" in a:
                a["alibi_slopes"] = a["alibi_slopes"][:, None]
        out = reference_attention(
            q, k, v, score_weight, dropout_factors=dropout_factors, enable_gqa=True, **a
        )[0]
        return (F.linear(out.transpose(-3, -2).flatten(-2), out_weight, out_bias),)

    # PyTorch's matrix products differ with the number of threads.
    numbers_of_threads = ()

    def autocast_tolerance(self, dtype: torch.dtype) -> dict[str, float]:
        # The gradient of a packed weight is added up in float32 here, in dtype where all is cast.
        return {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}

    def growing(self) -> list[Arguments]:
        return [
            MultiHeadProblem(
                f"growing {batch}",
                batch=batch,
                queries=queries,
                keys=keys,
                embed_dim=24,
                heads=4,
                mask=Mask("float", (queries, keys)),
            ).arguments(torch.float32)
            for batch, queries, keys in ((5, 9, 10), (7, 13, 17), (8, 21, 31))
        ]

    def small(self, seed: int = 0) -> Arguments:
        return MultiHeadProblem(f"small {seed}", queries=2, keys=3).arguments(torch.float64)


def test_agrees_with_pytorch():
    """The state and inputs of nn.MultiheadAttention give its outputs."""
    torch.manual_seed(0)
    for kdim, vdim in ((None, None), (5, 3)):
        module = torch.nn.MultiheadAttention(8, 2, kdim=kdim, vdim=vdim, batch_first=True).double()
        query = torch.randn(2, 3, 8, dtype=torch.float64)
        key = torch.randn(2, 4, kdim or 8, dtype=torch.float64)
        value = torch.randn(2, 4, vdim or 8, dtype=torch.float64)
        if kdim is None:
            weights, biases = [module.in_proj_weight], [module.in_proj_bias]
        else:
            weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
            biases = list(module.in_proj_bias.chunk(3))
        got = OPS.multi_head_attention(
            query, key, value, 2, weights, biases, module.out_proj.weight, module.out_proj.bias
        )
        want = module(query, key, value, need_weights=False)[0]
        torch.testing.assert_close(got, want)
