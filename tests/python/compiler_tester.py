"""What torch.compile, torch.export, TorchScript, autocast, vmap and torch.func make of an operator:
the second half of the abstract tester."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from module_checks import saved_and_loaded
from operator_tester import OPS, Arguments, OperatorTester, is_float, is_tensor
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

import torch_selfattn

TRANSFORMS = ["grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "vmap(grad)", "vmap(jacrev)"]
# Functions of torch.autograd.functional with their options.
FUNCTIONALS: dict[str, tuple[str, dict[str, Any]]] = {
    "vjp": ("vjp", {}),
    "jvp": ("jvp", {}),
    "jacobian": ("jacobian", {}),
    "jacobian, vectorized": ("jacobian", {"vectorize": True}),
    "jacobian, forward mode": ("jacobian", {"vectorize": True, "strategy": "forward-mode"}),
    "hessian": ("hessian", {}),
    "hessian, forward mode": (
        "hessian",
        {"vectorize": True, "outer_jacobian_strategy": "forward-mode"},
    ),
    "hvp": ("hvp", {}),
    "vhp": ("vhp", {}),
}


class CallWithTensors(torch.nn.Module):
    """The public operator as a module whose inputs are its tensor arguments."""

    def __init__(self, op: str, arguments: Arguments) -> None:
        super().__init__()
        leaves, self.spec = tree_flatten(arguments)
        self.others = [None if is_tensor(leaf) else leaf for leaf in leaves]
        self.where = [n for n, leaf in enumerate(leaves) if is_tensor(leaf)]
        self.op = getattr(OPS, op).default

    @staticmethod
    def tensors(arguments: Arguments) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in tree_flatten(arguments)[0] if is_tensor(leaf))

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self.others)
        for n, tensor in zip(self.where, tensors, strict=True):
            leaves[n] = tensor
        return self.op(**tree_unflatten(leaves, self.spec))


class CompilerTester(OperatorTester):
    def growing(self) -> list[Arguments]:
        """Arguments of one call in three sizes, float32."""
        raise NotImplementedError

    def small(self, seed: int = 0) -> Arguments:
        """Arguments with few elements, float64; all seeds have the same shapes."""
        raise NotImplementedError

    @pytest.mark.way("compile")
    def test_compile(self):
        """One graph, forward and backward, for three batch sizes and lengths."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        sizes = self.growing()
        module = CallWithTensors(self.op, sizes[0])
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        graphs = torch._dynamo.utils.counters["stats"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for arguments in sizes:
                want = self.results(arguments)
                got = self.results(arguments, lambda a: compiled(*CallWithTensors.tensors(a)))
                torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert graphs["unique_graphs"] == 1
        torch._dynamo.reset()

    @pytest.mark.way("export")
    def test_export(self):
        """The public operator stays in the graph, with the batch and the lengths dynamic; after
        decomposition the forward operator does."""
        first, second, third = self.growing()
        module = CallWithTensors(self.op, first)
        inputs = CallWithTensors.tensors(first)
        dynamic = tuple(
            {d: torch.export.Dim.DYNAMIC for d in range(a.dim()) if a.shape[d] != b.shape[d]}
            for a, b in zip(inputs, CallWithTensors.tensors(second), strict=True)
        )
        program = torch.export.export(module, inputs, dynamic_shapes=(dynamic,))
        assert f"torch.ops.torch_selfattn.{self.op}.default" in program.graph_module.code
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        decomposed = program.run_decompositions().graph_module.code
        for inner in self.exported_inner_ops:
            assert f"torch.ops.torch_selfattn.{inner}.default" in decomposed
        for arguments in (second, third):
            want = self.call(arguments)
            got = self.as_tuple(loaded(*CallWithTensors.tensors(arguments)))
            torch.testing.assert_close(got, want, rtol=0, atol=0)

    exported_inner_ops = ("_attention_forward",)

    @pytest.mark.way("script")
    def test_torchscript_save_and_load(self):
        """A scripted function, saved and loaded, gives the same outputs and gradients."""
        loaded = saved_and_loaded(torch.jit.script(getattr(torch_selfattn, self.op)))
        for arguments in self.growing():
            for _ in range(3):  # the profiling executor optimises the second and third call
                got = self.results(arguments, lambda a: loaded(**self.with_defaults(a)))
            torch.testing.assert_close(got, self.results(arguments), rtol=0, atol=0)

    @pytest.mark.way("script")
    def test_traced_and_frozen(self):
        """Traced with one size, the operator serves the others, saved and loaded, and frozen."""
        sizes = self.growing()
        module = CallWithTensors(self.op, sizes[0]).eval()
        traced = torch.jit.trace(module, CallWithTensors.tensors(sizes[0]))
        for made in (traced, saved_and_loaded(traced), torch.jit.freeze(traced)):
            for arguments in sizes:
                got = self.results(arguments, lambda a, f=made: f(*CallWithTensors.tensors(a)))
                torch.testing.assert_close(got, self.results(arguments), rtol=0, atol=0)

    def with_defaults(self, arguments: Arguments) -> Arguments:
        """Every argument of the operator: a saved function has forgotten its defaults."""
        schema = getattr(OPS, self.op).default._schema
        defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        return defaults | arguments

    # ---- Autocast ----

    @pytest.mark.way("autocast")
    @pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_autocast(self, dtype16):
        """As if the inputs had been cast; the gradients have the dtype of what was given."""
        arguments = self.growing()[0]
        tensors, join = self.split(arguments)
        with torch.autocast("cpu", dtype=dtype16):
            got = self.results(arguments)
        kept = [arguments.get(name) for name in ("attn_mask", "alibi_slopes")]
        cast = join([x if any(x is y for y in kept) else x.to(dtype16) for x in tensors])
        want = self.results(cast)
        outputs = len(self.output_names())
        assert got[0].dtype == dtype16
        assert all(g.dtype == x.dtype for g, x in zip(got[outputs:], tensors, strict=True))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.to(b.dtype), b, **self.autocast_tolerance(dtype16))

    def autocast_tolerance(self, dtype: torch.dtype) -> dict[str, float]:
        return {"rtol": 0, "atol": 0}

    def test_autocast_switched_off(self):
        arguments = self.growing()[0]
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
            got = self.results(arguments)
        torch.testing.assert_close(got, self.results(arguments), rtol=0, atol=0)

    # ---- vmap and torch.func ----

    @staticmethod
    def stacked(samples: list[Arguments]) -> Arguments:
        """Samples of one shape as one set of arguments with a first dimension more."""
        return tree_map(
            lambda *xs: torch.stack(xs) if is_float(xs[0]) else xs[0], samples[0], *samples[1:]
        )

    @pytest.mark.way("vmap")
    def test_vmap(self):
        """Outputs and gradients are those of the samples one by one; nested as well."""
        samples = [self.small(seed) for seed in range(6)]
        _, join = self.split(samples[0])

        def of(*inputs: Tensor) -> tuple[Tensor, ...]:
            return self.call(join(inputs))

        def loss(outputs: tuple[Tensor, ...]) -> Tensor:
            return sum(x.sin().sum() for x in outputs)

        single = [[x.requires_grad_() for x in self.split(sample)[0]] for sample in samples]
        want = [of(*inputs) for inputs in single]
        want_grads = [
            torch.autograd.grad(loss(outputs), inputs)
            for outputs, inputs in zip(want, single, strict=True)
        ]
        batch, _ = self.split(self.stacked(samples))
        for function, shape in ((torch.vmap(of), (6,)), (torch.vmap(torch.vmap(of)), (2, 3))):
            inputs = [x.detach().unflatten(0, shape).requires_grad_() for x in batch]
            outputs = function(*inputs)
            grads = torch.autograd.grad(loss(outputs), inputs)
            for n in range(6):
                at = (n,) if len(shape) == 1 else divmod(n, 3)
                for got, wanted in zip((*outputs, *grads), (*want[n], *want_grads[n]), strict=True):
                    torch.testing.assert_close(got[at], wanted, rtol=1e-10, atol=1e-12)

    def test_vmap_over_one_argument(self):
        """Each tensor alone batched, along its last dimension."""
        arguments = self.small()
        tensors, join = self.split(arguments)
        for n in range(len(tensors)):

            def of(x: Tensor, n: int = n) -> tuple[Tensor, ...]:
                return self.call(join([*tensors[:n], x, *tensors[n + 1 :]]))

            batch = torch.stack((tensors[n], tensors[n] * 0.5), -1)
            got = torch.vmap(of, in_dims=-1)(batch)
            for sample in range(2):
                for a, b in zip(got, of(batch[..., sample]), strict=True):
                    torch.testing.assert_close(a[sample], b, rtol=1e-12, atol=1e-12)

    def outputs_and_loss(self, call: Any, join: Any) -> tuple[Any, Any]:
        """Functions of the differentiable tensors."""

        def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
            return self.as_tuple(call(join(inputs)))

        def loss(*inputs: Tensor) -> Tensor:
            return sum(x.sin().sum() for x in outputs(*inputs))

        return outputs, loss

    @pytest.mark.way("torch.func")
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_torch_func(self, transform):
        """torch.func of the operator is torch.func of the reference."""
        arguments = self.small()
        tensors, join = self.split(arguments)
        every = tuple(range(len(tensors)))

        def results(call: Any) -> Any:
            outputs, loss = self.outputs_and_loss(call, join)
            tangents = tuple(torch.cos(3 * x) for x in tensors)
            match transform:
                case "grad":
                    return torch.func.grad(loss, every)(*tensors)
                case "vjp":
                    values, pullback = torch.func.vjp(outputs, *tensors)
                    return values, pullback(tuple(x.cos() for x in values))
                case "jvp":
                    return torch.func.jvp(outputs, tuple(tensors), tangents)
                case "jacrev":
                    return torch.func.jacrev(outputs, every)(*tensors)
                case "jacfwd":
                    return torch.func.jacfwd(outputs, every)(*tensors)
                case "hessian":
                    return torch.func.hessian(loss, every)(*tensors)
            function = torch.func.grad(loss, every)
            if transform == "vmap(jacrev)":
                function = torch.func.jacrev(outputs, every)
            batch = [torch.stack((x, x.flip(-1))) for x in tensors]
            return torch.vmap(function)(*batch)

        got = results(lambda a: getattr(OPS, self.op)(**a))
        want = results(lambda a: self.reference(a, None))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)

    @pytest.mark.way("torch.func")
    @pytest.mark.parametrize("name", FUNCTIONALS)
    def test_autograd_functional(self, name):
        """torch.autograd.functional of the operator is that of the reference."""
        tensors, join = self.split(self.small())
        function, options = FUNCTIONALS[name]

        def results(call: Any) -> Any:
            outputs, loss = self.outputs_and_loss(call, join)
            along = tuple(torch.cos(3 * x) for x in tensors)
            of = getattr(torch.autograd.functional, function)
            match function:
                case "vjp":
                    return of(outputs, tuple(tensors), tuple(x.cos() for x in outputs(*tensors)))
                case "jvp":
                    return of(outputs, tuple(tensors), along)
                case "jacobian":
                    return of(outputs, tuple(tensors), **options)
                case "hessian":
                    return of(loss, tuple(tensors), **options)
            return of(loss, tuple(tensors), along)

        got = results(lambda a: getattr(OPS, self.op)(**a))
        want = results(lambda a: self.reference(a, None))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)

    # ---- Checkpoints ----

    def test_checkpoint(self):
        """Computed again in the backward pass: the same bits, dropout included."""
        arguments = self.growing()[1]
        if any(a.name == "dropout_p" for a in getattr(OPS, self.op).default._schema.arguments):
            arguments = arguments | {"dropout_p": 0.3}
        got = self.results(arguments, lambda a: checkpoint(self.call, a, use_reentrant=False))
        torch.testing.assert_close(got, self.results(arguments), rtol=0, atol=0)
