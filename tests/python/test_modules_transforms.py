"""What PyTorch does to any module, done to each of ours: checkpoints, parametrizations, per-sample
gradients by functional_call, frozen parameters, traces and scripts, in C++ too."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cmake_projects import build_and_run, configure_with_package
from module_checks import assert_same, gradients, outputs_of, randomize, saved_and_loaded
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from torch_selfattn import nn

B, L, D, H, F = 3, 7, 8, 2, 12
# x (B, L, D) to the module's results.
Call = Callable[[Callable, Tensor], Any]
MODULES: dict[str, tuple[Callable[[], torch.nn.Module], Call]] = {
    "SelfAttention": (
        lambda: nn.SelfAttention(D, score="additive", dropout=0.2, dtype=torch.float64),
        lambda m, x: m(x, key_lengths=lengths(x), need_weights=True),
    ),
    "MultiHeadAttention": (
        lambda: nn.MultiHeadAttention(D, H, dropout=0.2, batch_first=True, dtype=torch.float64),
        lambda m, x: m(x, x, x, need_weights=False),
    ),
    "MultiHeadAttention, additive": (
        lambda: nn.MultiHeadAttention(
            D, H, kdim=D, vdim=D, batch_first=True, score="additive", dtype=torch.float64,
            add_bias_kv=True,
        ),
        lambda m, x: m(x, x.flip(-2), x, need_weights=True),
    ),
    "AdditiveAttention": (
        lambda: nn.AdditiveAttention(D, D, 5, dropout=0.2, dtype=torch.float64),
        lambda m, x: m(x, x, key_lengths=lengths(x), need_weights=True),
    ),
    "SinusoidalPositionalEncoding": (
        lambda: nn.SinusoidalPositionalEncoding(dropout=0.2),
        lambda m, x: m(x),
    ),
    "LearnedPositionalEncoding": (
        lambda: nn.LearnedPositionalEncoding(L + 3, D, dropout=0.2, dtype=torch.float64),
        lambda m, x: m(x),
    ),
    "RotaryEmbedding": (
        lambda: nn.RotaryEmbedding(D, L + 3).double(),
        lambda m, x: m(x),
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                D, H, F, batch_first=True, dtype=torch.float64,
                rotary=nn.RotaryEmbedding(D // H, L + 3).double(),
            ), 2,
        ),
        lambda m, x: m(x, key_lengths=lengths(x)),
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(
                D, H, F, batch_first=True, dtype=torch.float64, alibi=True,
                cross_score="additive",
            ), 2,
        ),
        lambda m, x: m(x, x.flip(-2), tgt_is_causal=True, memory_lengths=lengths(x)),
    ),
}  # fmt: skip

each_module = pytest.mark.parametrize("name", MODULES)
each_with_parameters = pytest.mark.parametrize(
    "name", [name for name, (make, _) in MODULES.items() if any(True for _ in make().parameters())]
)


def lengths(x: Tensor) -> Tensor:
    return torch.arange(L, L - x.shape[0], -1)


def made(name: str) -> tuple[torch.nn.Module, Call]:
    make, call = MODULES[name]
    module = make()
    randomize(module)
    return module, call


def inputs() -> Tensor:
    return torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


@each_module
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(name: str, use_reentrant: bool) -> None:
    """Computed again in the backward pass: the same gradients, dropout included."""
    module, call = made(name)
    x = inputs()
    results = []
    for run in (
        lambda: call(module, x),
        lambda: checkpoint(lambda x: call(module, x), x, use_reentrant=use_reentrant),
    ):
        torch.manual_seed(6)
        module.zero_grad()
        x.grad = None
        outputs = outputs_of(run())
        sum(output.square().sum() for output in outputs).backward()
        results.append((outputs, [p.grad for p in (x, *module.parameters())]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@each_with_parameters
def test_parametrization(name: str) -> None:
    """Every parameter computed from another one: the output is that of the computed parameters, the
    gradients reach the others; removed again, the module is a plain one."""
    plain, call = made(name)
    plain.eval()
    module = copy.deepcopy(plain)
    owned = [
        (owner, key)
        for owner in module.modules()
        for key, _ in owner.named_parameters(recurse=False)
    ]
    for owner, key in owned:
        parametrize.register_parametrization(owner, key, Doubled())
    x = inputs()
    ours, theirs = call(module, x), call(plain, x)
    assert_same(ours, theirs, 1e-12)
    got = gradients(ours, [owner.parametrizations[key].original for owner, key in owned])
    want = gradients(theirs, list(plain.parameters()))
    torch.testing.assert_close(got, [2 * gradient for gradient in want])
    for owner, key in owned:
        parametrize.remove_parametrizations(owner, key)
    assert_same(call(module, x), theirs, 1e-12)


@each_module
def test_gradients_of_each_sample(name: str) -> None:
    """vmap(grad(functional_call)) is one backward pass per sample."""
    module, call = made(name)
    module.eval()
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    x = inputs().detach()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        def functional(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(module, parameters, args, kwargs)

        results = outputs_of(call(functional, sample.unsqueeze(0)))
        return sum(result.sin().sum() for result in results)

    got = torch.vmap(torch.func.grad(loss, (0, 1)), (None, 0))(parameters, x)
    for n in range(B):
        want = torch.func.grad(loss, (0, 1))(parameters, x[n])
        at = torch.utils._pytree.tree_map(lambda t, n=n: t[n], got)
        torch.testing.assert_close(at, want, rtol=1e-10, atol=1e-12)


@each_with_parameters
def test_frozen_parameters_get_no_gradient(name: str) -> None:
    """One trained parameter at a time: its gradient is that of training all of them."""
    module, call = made(name)
    module.eval()
    x = inputs()
    parameters = list(module.parameters())
    want = gradients(call(module, x), parameters)
    for n, trained in enumerate(parameters):
        module.requires_grad_(False)
        trained.requires_grad_()
        (got,) = gradients(call(module, x), [trained])
        torch.testing.assert_close(got, want[n], rtol=1e-12, atol=1e-12)


@each_module
def test_traced(name: str) -> None:
    """Traced with one length, a module serves others, forward and backward."""

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.call = module, call

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(outputs_of(self.call(self.module, x)))

    module, call = made(name)
    module.eval()
    traced = torch.jit.trace(Outputs(), inputs())
    for length in (L, L + 2):
        x = torch.randn(B, length, D, dtype=torch.float64, requires_grad=True)
        variables = [x, *module.parameters()]
        ours, theirs = traced(x), call(module, x)
        assert_same(ours, theirs, 1e-12)
        torch.testing.assert_close(gradients(ours, variables), gradients(theirs, variables))


@each_module
def test_scripted(name: str) -> None:
    """Scripted, and saved and loaded: the same outputs and gradients, for several lengths."""
    module, call = made(name)
    module.eval()
    scripted = torch.jit.script(module)
    for one in (scripted, saved_and_loaded(scripted).eval()):
        for length in (L, L + 2):
            x = torch.randn(B, length, D, dtype=torch.float64, requires_grad=True)
            ours, theirs = call(one, x), call(module, x)
            assert_same(ours, theirs, 1e-12)
            torch.testing.assert_close(
                gradients(ours, [x, *one.parameters()]),
                gradients(theirs, [x, *module.parameters()]),
            )


def recorded_call(call: Call) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The arguments that the module is called with; a tensor that stands there twice is one."""
    found: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
    call(lambda *args, **kwargs: found.append((args, kwargs)), inputs().detach())
    return found[0]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with the scripted modules and what a C++ program got from them (tests/foreign)."""
    folder = tmp_path_factory.mktemp("scripts")
    torch.manual_seed(3)
    for n, name in enumerate(MODULES):
        module, call = made(name)
        torch.jit.save(torch.jit.script(module), folder / f"{n}.pt")
        torch.save(module.state_dict(), folder / f"{n}.state.pt")
        torch.save(recorded_call(call), folder / f"{n}.call.pt")
    configure_with_package(folder / "build")
    build_and_run(folder / "build", folder, *map(str, range(len(MODULES))), program="scripts")
    return folder


@each_module
def test_scripted_in_cpp(scripts, name: str) -> None:
    """Loaded by a C++ program: the outputs and gradients of the module in Python."""
    n = list(MODULES).index(name)
    module, _ = made(name)
    module.load_state_dict(torch.load(scripts / f"{n}.state.pt"))
    module.eval()
    args, kwargs = torch.load(scripts / f"{n}.call.pt")
    for argument in args:
        argument.requires_grad_()
    outputs = outputs_of(module(*args, **kwargs))
    sum(output.square().sum() for output in outputs).backward()
    want = {f"out.{m}": output.detach() for m, output in enumerate(outputs)}
    want |= {f"grad.{key}": parameter.grad for key, parameter in module.named_parameters()}
    want |= {f"grad.{m}": argument.grad for m, argument in enumerate(args)}
    got = torch.load(scripts / f"{n}.results.pt", weights_only=False)  # has TorchScript types
    torch.testing.assert_close(got, want, rtol=0, atol=0)
