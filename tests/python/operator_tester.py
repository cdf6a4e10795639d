"""The abstract tester of an operator: what every operator must pass, written once.

A subclass names the operator, its problem list and its float64 reference; every test below then
runs for it. `arguments` are keyword arguments of the public operator; those of floating dtype
(tensors inside lists too) are differentiable.
"""

from __future__ import annotations

import contextlib
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import tolerances
import torch
from attention_problems import FEW, FEWEST, Problem, philox_dropout_factors
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import torch_selfattn

OPS = torch.ops.torch_selfattn
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# PyTorch's kernels on CUDA.
FUSED = ("cudnn", "flash", "efficient")
Arguments = dict[str, Any]


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@functools.cache
def implementations(device: str) -> tuple[str, ...]:
    """Names of the implementations on a device, best first."""
    if device == "cuda" and not torch.cuda.is_available():
        return ("",)
    x = torch.zeros(1, 1, 1, 1, device=device)
    return tuple(re.findall(r"^  (\w+):", OPS.explain(x, x, x), re.MULTILINE))


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    with torch_selfattn.use_implementation(name) if name else contextlib.nullcontext():
        yield


class Recorder(TorchDispatchMode):
    """Records the calls of the inner operators: (overload, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torch_selfattn":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def expanded(x: Tensor) -> Tensor:
    """One matrix for all heads and samples, stride 0."""
    lead = x.dim() - 2
    return x[(slice(0, 1),) * lead].expand(x.shape) if lead > 0 else x


def with_offset(x: Tensor) -> Tensor:
    """Not at the beginning of its storage, and not aligned."""
    storage = torch.empty(x.numel() + 3, dtype=x.dtype, device=x.device)
    return storage[3:].view(x.shape).copy_(x)


def every_other(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, float("nan"))), -1).flatten(-2)[..., ::2]


def transposed(x: Tensor, a: int, b: int) -> Tensor:
    return x.transpose(a, b).contiguous().transpose(a, b) if x.dim() >= -min(a, b) else x


LAYOUTS = {
    "heads inside": lambda x: transposed(x, -3, -2),
    "columns outside": lambda x: transposed(x, -2, -1),
    "batch inside": lambda x: transposed(x, -4, -1),
    "every other column": every_other,
    "rows beside NaN": lambda x: every_other(x.mT).mT if x.dim() > 1 else every_other(x),
    "offset": with_offset,
    "expanded": expanded,
}


class OperatorTester(ABC):
    op: ClassVar[str]  # torch.ops.torch_selfattn.<op>
    problems: ClassVar[list[Problem]]
    # Names of problems for tests that cost much more than a call, and for those that cost seconds.
    few: ClassVar[list[str]] = FEW
    fewest: ClassVar[list[str]] = FEWEST
    implementation = ""  # that check() is about

    @abstractmethod
    def arguments(self, problem: Problem, dtype: torch.dtype, device: str) -> Arguments: ...

    @abstractmethod
    def reference(self, arguments: Arguments, dropout_factors: Tensor | None) -> Any:
        """The operator's outputs in float64, differentiable."""

    # ---- What the tests are made of ----

    def call(self, arguments: Arguments) -> tuple[Tensor, ...]:
        return self.as_tuple(getattr(OPS, self.op)(**arguments))

    @staticmethod
    def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def output_names(self) -> list[str]:
        return ["output", "lse"][: len(getattr(OPS, self.op).default._schema.returns)]

    def seed(self) -> None:
        torch.manual_seed(1234)

    def dropout_factors(self, problem: Problem, arguments: Arguments) -> Tensor | None:
        """The factors that call() uses after seed(): the generator's state is read off the inner
        operator, the factors are made here."""
        if problem.dropout_p == 0:
            return None
        self.seed()
        with Recorder() as recorder, torch.no_grad():
            self.call(arguments)
        forward, args = recorder.calls[0]
        self.seed()
        with torch.no_grad():
            output, lse, state = forward(*args)
        keys = args[1].shape[2]
        return philox_dropout_factors(state, *lse.shape, keys, problem.dropout_p).to(output.device)

    @staticmethod
    def split(arguments: Arguments) -> tuple[list[Tensor], Callable[[Any], Arguments]]:
        """The differentiable tensors, and the arguments with others in their places. A tensor that
        is given twice is one."""
        leaves, spec = tree_flatten(arguments)
        given = {id(leaf): leaf for leaf in leaves if is_float(leaf)}

        def join(tensors: Any) -> Arguments:
            by_id = dict(zip(given, tensors, strict=True))
            return tree_unflatten([by_id.get(id(leaf), leaf) for leaf in leaves], spec)

        return list(given.values()), join

    def function(self, arguments: Arguments, call: Any = None) -> tuple[Any, list[Tensor]]:
        """The operator as a function of its differentiable tensors, as gradcheck wants it: the same
        dropout in each call, a finite number for the log-sum-exp of a row without a key."""
        tensors, join = self.split(arguments)

        def f(*inputs: Tensor) -> Any:
            self.seed()
            outputs = self.as_tuple((call or self.call)(join(inputs)))
            outputs = tuple(x.where(x.detach().isfinite(), 0.0) for x in outputs)
            return outputs if len(outputs) > 1 else outputs[0]

        return f, [x.detach().clone().requires_grad_() for x in tensors]

    def scripted_call(self) -> Callable[[Arguments], Any]:
        """The Python function of the operator's name in TorchScript."""
        f = torch.jit.script(getattr(torch_selfattn, self.op))
        return lambda arguments: f(**arguments)

    def grads(
        self, outputs: Any, inputs: list[Tensor], dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        """Gradients of the inputs for random gradients of the outputs, the same numbers in each
        call, rounded to dtype; of the log-sum-exp of a row without a key none is asked for, and
        none at all from kernels whose backward takes none."""
        if self.implementation in FUSED:
            outputs = outputs[:1]
        generator = torch.Generator().manual_seed(5)
        given = []
        for x in outputs:
            g = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
            given.append(g.to(x.device, x.dtype))
        outputs = [x.where(x.detach().isfinite(), 0.0) for x in outputs]
        grads = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]

    def results(self, arguments: Arguments, call: Any = None) -> list[Tensor]:
        """Outputs and gradients of one call after seed()."""
        tensors, join = self.split(arguments)
        inputs = [x.detach().requires_grad_() for x in tensors]
        self.seed()
        outputs = self.as_tuple((call or self.call)(join(inputs)))
        return [*(x.detach() for x in outputs), *self.grads(outputs, inputs)]

    def pairs(
        self, arguments: Arguments, dtype: torch.dtype, dropout_factors: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Outputs and gradients, got and wanted, by name."""
        tensors, join = self.split(arguments)
        ours = [x.detach().requires_grad_() for x in tensors]
        theirs = [x.detach().double().requires_grad_() for x in tensors]
        self.seed()
        got = self.call(join(ours))
        want = self.as_tuple(self.reference(join(theirs), dropout_factors))
        dtypes = [dtype, torch.float64 if dtype == torch.float64 else torch.float32]  # output, lse
        assert [x.dtype for x in got] == dtypes[: len(got)]
        pairs = dict(zip(self.output_names(), zip(got, want, strict=True), strict=True))
        got_grads, want_grads = self.grads(got, ours, dtype), self.grads(want, theirs, dtype)
        for n, (a, b) in enumerate(zip(got_grads, want_grads, strict=True)):
            assert a.dtype == tensors[n].dtype
            pairs[f"gradient {n}"] = (a, b)
        return pairs

    def errors(
        self, arguments: Arguments, dtype: torch.dtype, dropout_factors: Tensor | None = None
    ) -> dict[str, float]:
        """The errors of outputs and gradients in the unit of docs/tolerances.md."""
        errors = {}
        tensors, _ = self.split(arguments)
        for what, (got, want) in self.pairs(arguments, dtype, dropout_factors).items():
            # A float32 mask beside other inputs is no better than the coarser of the two.
            coarser = max(dtype, got.dtype, key=lambda d: torch.finfo(d).eps)
            errors[what] = tolerances.error(got, want, got.dtype if what == "lse" else coarser)
            if what.startswith("gradient"):
                n = int(what.removeprefix("gradient "))
                errors[what] /= self.size_of_gradient(arguments, tensors[n])
        return errors

    @staticmethod
    def size_of_gradient(arguments: Arguments, tensor: Tensor) -> float:
        """What the gradient's errors are multiplied by on their way: of ALiBi slopes the distance,
        the largest one from the first key."""
        if tensor is not arguments.get("alibi_slopes"):
            return 1.0
        position = arguments["query"].shape[-2] + abs(arguments.get("query_offset", 0))
        if "query_offsets" in arguments:
            position += arguments["query_offsets"].abs().max().item()
        return max(1.0, position)

    def check(
        self,
        arguments: Arguments,
        dtype: torch.dtype,
        implementation: str = "reference",
        dropout_factors: Tensor | None = None,
    ) -> None:
        """Outputs and gradients lie within the bounds of an implementation."""
        self.implementation = implementation
        device = arguments["query"].device.type
        with skips_without_backward():
            errors = self.errors(arguments, dtype, dropout_factors)
        for what, found in errors.items():
            column = "gradients" if what.startswith("gradient") else what
            limit = tolerances.bound(self.op, device, implementation, dtype, column)
            assert found <= limit, f"{what}: error {found:.3g} eps, allowed {limit} eps"

    # ---- Tests ----

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        wanted = getattr(metafunc.function, "problems", lambda tester: tester.problems)
        problems = wanted(self) if "problem" in metafunc.fixturenames else [None]
        cases = []
        for problem in problems:
            for device, implementation in self.places(metafunc):
                if device == "cuda" and not torch.cuda.is_available() and problem != problems[0]:
                    continue  # one test that says so is enough
                for dtype in DTYPES if "dtype" in metafunc.fixturenames else [None]:
                    case = {
                        "problem": problem,
                        "device": device,
                        "implementation": implementation,
                        "dtype": dtype,
                    }
                    case = {k: v for k, v in case.items() if k in metafunc.fixturenames}
                    ids = [str(problem), device, implementation, tolerances.NAMES.get(dtype)]
                    ids = "-".join(x for x in ids if x not in (None, "", "None"))
                    marks = [pytest.mark.cuda] if device == "cuda" else []
                    cases.append(pytest.param(*case.values(), id=ids, marks=marks))
        if cases and case:
            metafunc.parametrize(tuple(case), cases)

    @staticmethod
    def places(metafunc: pytest.Metafunc) -> list[tuple[str | None, str]]:
        """Devices and implementations that a test runs with."""
        if "device" not in metafunc.fixturenames:
            cpu_only = "implementation" in metafunc.fixturenames
            return [(None, name) for name in (implementations("cpu") if cpu_only else [""])]
        devices = ["cpu", "cuda"]
        if "implementation" not in metafunc.fixturenames:
            return [(device, "") for device in devices]
        return [(device, name) for device in devices for name in implementations(device)]

    @pytest.mark.way("Python")
    def test_forward_and_backward(self, problem, dtype, device, implementation):
        """Outputs and all gradients against the float64 reference, by each implementation."""
        arguments = self.arguments(problem, dtype, device)
        skip_unless_supported(self, arguments, implementation)
        with forced(implementation):
            factors = self.dropout_factors(problem, arguments)
            self.check(arguments, dtype, implementation, factors)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, problem, device, implementation, layout):
        """Inputs of any strides: each tensor argument in turn, and all together."""
        given, dtype = supported_arguments(self, problem, device, implementation)
        tensors, join = self.split(given)
        for n in range(len(tensors) + 1):
            laid = [
                LAYOUTS[layout](x) if n in (m, len(tensors)) else x for m, x in enumerate(tensors)
            ]
            if all(x is y for x, y in zip(laid, tensors, strict=True)):
                continue
            with forced(implementation):
                self.check(join(laid), dtype, implementation)

    test_layouts.problems = lambda tester: [
        p
        for p in tester.problems
        if p.name in ("float mask (2, 2, 4, 5)", "float mask", "slopes per sample")
    ]

    def test_deterministic(self, problem, device, implementation):
        """The same bits in each run and for each number of threads."""
        if implementation in ("cudnn", "flash"):
            pytest.skip("its backward is not deterministic")
        arguments, _ = supported_arguments(self, problem, device, implementation)
        threads = torch.get_num_threads()
        try:
            with forced(implementation), skips_without_backward():
                first = self.results(arguments)
                for n in (threads, *self.numbers_of_threads):
                    torch.set_num_threads(n)
                    for a, b in zip(first, self.results(arguments), strict=True):
                        assert torch.equal(a, b), f"differs with {n} threads"
        finally:
            torch.set_num_threads(threads)

    numbers_of_threads: ClassVar[tuple[int, ...]] = (2, 3, 5)
    test_deterministic.problems = lambda tester: [
        p
        for p in tester.problems
        if p.name in ("long mask", "long slopes", "long dropout", "larger")
    ]

    # Gradients. gradcheck compares with finite differences in float64, along a random direction or,
    # of every problem in the slow tests, element by element.

    def gradient_problems(self) -> list[Problem]:
        return [p for p in self.problems if not (p.large or p.empty or self.has_float32(p))]

    @staticmethod
    def has_float32(problem: Problem) -> bool:
        """Whether a tensor is float32 beside float64 ones."""
        mask = problem.mask is not None and problem.mask.kind == "float32"
        return mask or getattr(problem, "slopes_dtype", None) == torch.float32

    def test_gradcheck(self, problem):
        f, inputs = self.function(self.arguments(problem, torch.float64, "cpu"))
        assert gradcheck(f, inputs, fast_mode=True)

    test_gradcheck.problems = gradient_problems

    @pytest.mark.slow
    def test_gradcheck_every_element(self, problem):
        f, inputs = self.function(self.arguments(problem, torch.float64, "cpu"))
        assert gradcheck(f, inputs)

    test_gradcheck_every_element.problems = gradient_problems

    @pytest.mark.way("double backward")
    def test_gradgradcheck(self, problem):
        f, inputs = self.function(self.arguments(problem, torch.float64, "cpu"))
        # With requires_grad on the gradients it also checks the derivative by them.
        assert gradgradcheck(f, inputs, gen_non_contig_grad_outputs=True, fast_mode=True)

    test_gradgradcheck.problems = gradient_problems

    def few_problems(self) -> list[Problem]:
        return [p for p in self.problems if p.name in self.few]

    def fewest_problems(self) -> list[Problem]:
        return [p for p in self.problems if p.name in self.fewest]

    @pytest.mark.way("script")
    def test_gradcheck_scripted(self, problem):
        call = self.scripted_call()
        f, inputs = self.function(self.arguments(problem, torch.float64, "cpu"), call)
        assert gradcheck(f, inputs)
        assert gradgradcheck(f, inputs, fast_mode=True)

    test_gradcheck_scripted.problems = few_problems

    def test_gradgradcheck_every_element(self, problem):
        f, inputs = self.function(self.arguments(problem, torch.float64, "cpu"))
        assert gradgradcheck(f, inputs)

    test_gradgradcheck_every_element.problems = fewest_problems

    @pytest.mark.way("forward AD")
    def test_forward_mode(self, problem):
        """Forward-mode AD, and forward over reverse, against finite differences."""
        f, inputs = self.function(self.arguments(problem, torch.float64, "cpu"))
        assert gradcheck(f, inputs, check_forward_ad=True, check_backward_ad=False)
        assert gradgradcheck(f, inputs, fast_mode=True, check_fwd_over_rev=True)

    test_forward_mode.problems = few_problems

    # Registration.

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by opcheck itself
    def test_opcheck(self, problem, device):
        """All of torch.library.opcheck for the public, the forward and the backward operator."""
        arguments = self.arguments(problem, torch.float64, device)
        tensors, join = self.split(arguments)
        inputs = [x.detach().requires_grad_() for x in tensors]
        with Recorder() as recorder:
            outputs = self.call(join(inputs))
            outputs = [x.where(x.detach().isfinite(), 0.0) for x in outputs]
            torch.autograd.grad([x.cos().sum() for x in outputs], inputs, allow_unused=True)
        names = [func.overloadpacket._qualified_op_name for func, _ in recorder.calls]
        assert set(names) == set(self.inner_ops(problem)), names
        public = getattr(OPS, self.op).default
        if problem.dropout_p == 0:  # a composite operator has nothing of its own to check
            opcheck(public, (), join(inputs))
        for func, args in dict(reversed(recorder.calls)).items():  # one call of each
            opcheck(func, tree_map(self.detached, args))

    test_opcheck.problems = fewest_problems

    def inner_ops(self, problem: Problem) -> list[str]:
        return [f"torch_selfattn::_attention_{d}" for d in ("forward", "backward")]

    @staticmethod
    def detached(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.is_floating_point()) if is_tensor(x) else x


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def why_not_supported(tester: OperatorTester, arguments: Arguments, name: str) -> str:
    """The implementation's own reason, or nothing."""
    try:
        with forced(name), torch.no_grad():
            tester.call(arguments)
    except NotImplementedError as e:
        return str(e).splitlines()[0]
    return ""


def skip_unless_supported(tester: OperatorTester, arguments: Arguments, name: str) -> None:
    """Skips with the reason. Each problem has an implementation that supports it:
    test_implementations.py."""
    if reason := why_not_supported(tester, arguments, name):
        pytest.skip(reason)


@contextlib.contextmanager
def skips_without_backward() -> Iterator[None]:
    """Both passes have their own reasons on CUDA; skip_unless_supported asks for the forward's."""
    try:
        yield
    except NotImplementedError as error:
        if "backward on cuda" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])


def supported_arguments(
    tester: OperatorTester,
    problem: Problem,
    device: str,
    name: str,
    dtype: torch.dtype = torch.float32,
    **extra: Any,
) -> tuple[Arguments, torch.dtype]:
    """In the dtype, or in bfloat16 for an implementation that is for nothing else."""
    for candidate in (dtype, torch.bfloat16):
        arguments = tester.arguments(problem, candidate, device) | extra
        reason = why_not_supported(tester, arguments, name)
        if not reason:
            return arguments, candidate
    pytest.skip(reason)
