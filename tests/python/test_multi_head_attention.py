"""multi_head_attention: projections and attention in one operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from attention_problems import Mask, reference_attention
from compiler_tester import CompilerTester
from operator_tester import OPS, Arguments, is_tensor
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torch_selfattn import reference


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
        options = {k: x.to(device) if is_tensor(x) else x for k, x in self.options.items()}
        return arguments | options


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
    MultiHeadProblem("self, bool mask", "self", mask=Mask("bool", (2, 1, 3, 3))),
    MultiHeadProblem("memory, float mask", "memory", mask=Mask("float", (2, 3, 4))),
    MultiHeadProblem(
        "grouped, additive, lengths",
        "memory",
        heads=4,
        kv_heads=2,
        additive=True,
        mask=Mask("float", (1, 1, 3, 4)),
        options={"key_lengths": torch.tensor([4, 2]), "window_left": 1, "query_offset": 2},
    ),
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
    fewest: ClassVar[list[str]] = [
        "self",
        "memory",
        "grouped, additive, lengths",
        "slopes",
        "dropout",
    ]

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

    def inner_ops(self, problem: MultiHeadProblem) -> list[str]:
        packed = problem.packed and problem.inputs != "different"
        name = "packed_attention" if packed else "attention"
        return [f"torch_selfattn::_{name}_{d}" for d in ("forward", "backward")]

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


class Names(TorchDispatchMode):
    """Names of the operators that run, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


VIEWS = {"t", "transpose", "view", "_unsafe_view", "unsqueeze", "squeeze", "slice", "detach"}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["self", "larger", "grouped", "additive, self, grouped"])
def test_self_attention_is_two_products_and_the_attention(name, dtype, batch_first):
    """One matrix product in, one out, two each in backward, and nothing that copies, fills or adds:
    the heads and their gradients are read and written where the products have them."""
    problem = next(p for p in PROBLEMS if p.name == name)
    arguments = problem.arguments(dtype)
    tensors, join = TestMultiHeadAttention.split(arguments)
    if not batch_first:
        tensors[0] = tensors[0].transpose(0, 1).contiguous()
    for x in tensors:
        x.requires_grad_()
    with Names() as forward:
        x = tensors[0] if batch_first else tensors[0].transpose(0, 1)
        output = OPS.multi_head_attention(**join([x, *tensors[1:]]))
    grad = torch.randn_like(output)
    with Names() as backward:
        torch.autograd.grad(output, tensors, grad)
    computed = [n for n in forward.names if n not in VIEWS]
    assert computed == ["addmm", "_packed_attention_forward", "addmm"], computed
    computed = [n for n in backward.names if n not in VIEWS]
    products = ["mm", "mm", "sum"]  # gradients of input, weight and bias
    assert sorted(computed) == sorted([*products, *products, "_packed_attention_backward"]), (
        computed
    )


@pytest.mark.parametrize("name", ["memory", "grouped, memory"])
def test_attention_to_a_memory_joins_the_parameters_only(name):
    """The packed weight and bias are split, so their gradients are joined; nothing else is."""
    arguments = next(p for p in PROBLEMS if p.name == name).arguments(torch.float32)
    inputs = [arguments["query"], arguments["key"], *arguments["in_proj_weight"]]
    for x in (*inputs, *arguments["in_proj_bias"]):
        x.requires_grad_()
    with Names() as names:
        output = OPS.multi_head_attention(**arguments)
        torch.autograd.grad(output.sum(), [*inputs, *arguments["in_proj_bias"]])
    copies = {
        "cat",
        "copy_",
        "clone",
        "contiguous",
        "_to_copy",
        "fill_",
        "zeros",
        "new_zeros",
        "add",
    }
    copies |= {"slice_backward", "narrow_copy", "index_put_"}
    assert [n for n in names.names if n in copies] == ["cat", "cat"]


class SelfAttention(torch.nn.Module):
    """Self-attention or, with a second input, attention to a memory, with grouped heads: a function
    of its input and of parameters that are packed."""

    def __init__(self, additive: bool = False, dropout_p: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(8)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) / 2

        self.parameters_ = torch.nn.ParameterList([randn(16, 8), randn(16), randn(3, 8)])
        self.score_weight = torch.nn.Parameter(randn(4, 2)) if additive else None
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        weight, bias, out_weight = self.parameters_
        key = x if memory is None else memory
        return OPS.multi_head_attention(
            x, key, key, 4, [weight], [bias], out_weight, None, self.score_weight, 2,
            dropout_p=self.dropout_p, window_left=2,
        )  # fmt: skip

    def reference(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        weight, bias, out_weight = self.parameters_
        key = x if memory is None else memory
        return reference.multi_head_attention(
            x, key, key, 4, [weight], [bias], out_weight, None, self.score_weight, 2, window_left=2
        )


def self_inputs(memory: bool, batch: int = 2, length: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    shapes = [(batch, length, 8), (batch, length + 1, 8)][: 2 if memory else 1]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def outputs_and_grads(f: Any, inputs: list[Tensor], module: torch.nn.Module) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = f(*inputs)
    return [output, *torch.autograd.grad(output.sin().sum(), [*inputs, *module.parameters()])]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("memory", [False, True])
class TestPacked:
    """What the compilers and transforms make of the operators on packed projections."""

    def test_compile(self, memory, additive):
        module = SelfAttention(additive)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, length in ((3, 5), (4, 9), (2, 7)):
                inputs = self_inputs(memory, batch, length)
                got = outputs_and_grads(compiled, inputs, module)
                torch.testing.assert_close(got, outputs_and_grads(module, inputs, module))
        torch._dynamo.reset()

    def test_export(self, memory, additive):
        module = SelfAttention(additive)
        inputs = self_inputs(memory, 3, 5)
        shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes)
        code = program.run_decompositions().graph_module.code
        assert "torch.ops.torch_selfattn._packed_attention_forward.default" in code
        inputs = self_inputs(memory, 4, 5)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))

    def test_torch_func(self, memory, additive):
        module = SelfAttention(additive)
        inputs = self_inputs(memory)
        every = tuple(range(len(inputs)))
        tangents = tuple(x.cos() for x in inputs)
        for transform in (
            lambda f: torch.func.grad(lambda *x: f(*x).sin().sum(), every)(*inputs),
            lambda f: torch.func.jacrev(f, every)(*inputs),
            lambda f: torch.func.jvp(f, tuple(inputs), tangents),
            lambda f: torch.func.hessian(lambda *x: f(*x).sin().sum(), every)(*inputs),
            lambda f: torch.vmap(torch.func.grad(lambda *x: f(*x).sin().sum(), every))(
                *[torch.stack((x, x.flip(-1))) for x in inputs]
            ),
        ):
            got, want = transform(module), transform(module.reference)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)

    def test_vmap(self, memory, additive):
        """Outputs and gradients of samples; batched gradients of one output."""
        module = SelfAttention(additive)
        inputs = [torch.stack((x, x.flip(-1), x * 2)) for x in self_inputs(memory)]
        got = outputs_and_grads(torch.vmap(module), inputs, module)

        def one_by_one(*inputs: Tensor) -> Tensor:
            return torch.stack([module(*sample) for sample in zip(*inputs, strict=True)])

        torch.testing.assert_close(got, outputs_and_grads(one_by_one, inputs, module))
        leaves = [x[0].clone().requires_grad_() for x in inputs]
        output = module(*leaves)
        grads = torch.stack((torch.ones_like(output), output.detach()))
        batched = torch.autograd.grad(
            output, leaves, grads, is_grads_batched=True, retain_graph=True
        )
        single = [torch.autograd.grad(output, leaves, g, retain_graph=True) for g in grads]
        torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*single, strict=True))))

    def test_vmap_with_dropout(self, memory, additive):
        module = SelfAttention(additive, dropout_p=0.5)
        x = self_inputs(memory)
        inputs = [torch.stack((t, t)) for t in x]
        different = torch.vmap(module, randomness="different")(*inputs)
        assert not torch.equal(different[0], different[1])
        torch.manual_seed(4)
        same = torch.vmap(module, randomness="same")(*inputs)
        torch.manual_seed(4)
        torch.testing.assert_close(same, torch.stack([module(*x)] * 2))
        leaves = [t.clone().requires_grad_() for t in x]
        output = module(*leaves)
        grads = torch.stack((torch.ones_like(output), output.detach()))
        batched = torch.autograd.grad(
            output, leaves, grads, is_grads_batched=True, retain_graph=True
        )
        single = [torch.autograd.grad(output, leaves, g, retain_graph=True) for g in grads]
        torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*single, strict=True))))


def test_flops_of_packed_attention_are_those_of_its_parts():
    module = SelfAttention()
    x = self_inputs(memory=False)[0].requires_grad_()

    def count(key: Tensor) -> int:
        weight, bias, out_weight = module.parameters_
        with FlopCounterMode(display=False) as counter:
            OPS.multi_head_attention(
                x, key, key, 4, [weight], [bias], out_weight, None, None, 2
            ).sum().backward()
        return counter.get_total_flops()

    products = 2 * x.shape[0] * x.shape[1] * (8 * 16 + 8 * 3)
    pairs = 2 * 4 * 3 * 3
    assert count(x) == 3 * products + pairs * 2 * (4 + 10)
    assert count(x.clone()) == count(x)


def test_inner_operators_check_their_columns():
    packed = torch.zeros(1, 3, 10)
    rest = (*[None] * 7, 4, 2, None, None, 0.0, -1, -1, 0)
    with pytest.raises(RuntimeError, match="packed projection must have columns for all heads"):
        OPS._packed_attention_forward(packed, *rest)


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
