"""What every module is checked for, whatever it computes."""

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def outputs_of(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [x for x in results if x is not None]


def gradients(
    result: Any, inputs: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor | None]:
    """Of a fixed random function of all outputs."""
    generator = torch.Generator().manual_seed(9)
    outputs = outputs_of(result)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    return list(torch.autograd.grad(outputs, inputs, grads, retain_graph, allow_unused=True))


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    torch.testing.assert_close(
        outputs_of(ours), outputs_of(theirs), atol=tolerance, rtol=tolerance, check_stride=False
    )


def randomize(module: nn.Module) -> None:
    """Biases start at 0 and norms at 1, which hides mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)


def check_state_dict(module: nn.Module, make: Callable[[], nn.Module], call: Callable) -> None:
    """Saved and loaded, copied and pickled, the module computes the same."""
    expected = call(module)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    other = make()
    other.load_state_dict(torch.load(stream, weights_only=True))
    other.train(module.training)
    for made in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(call(made), expected, 0.0)


def check_reset(module: nn.Module) -> None:
    """reset_parameters reaches every parameter, and gives finite numbers."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    module.reset_parameters()
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all(), name


def check_meta(make: Callable[..., nn.Module], call: Callable) -> None:
    """Made on the meta device and materialised later."""
    module = make(device="meta")
    module.to_empty(device="cpu")
    module.reset_parameters()
    for x in outputs_of(call(module)):
        assert x.isfinite().all()


def saved_and_loaded(scripted: Any) -> Any:
    """What a TorchScript file of it gives."""
    stream = io.BytesIO()
    torch.jit.save(scripted, stream)
    stream.seek(0)
    return torch.jit.load(stream)


def check_scripted(module: nn.Module, calls: Sequence[Callable], tolerance: float = 0.0) -> None:
    """Scripted, saved and loaded, and frozen, it computes what it computes eagerly."""
    scripted = torch.jit.script(module)
    made = [scripted, saved_and_loaded(scripted)]
    for one in made:
        one.train(module.training)
    if not module.training:
        made.append(torch.jit.freeze(made[-1]))  # its parameters are constants
    for one in made:
        for call in calls:
            assert_same(call(one), call(module), tolerance)


@contextlib.contextmanager
def no_recompiles() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def check_compiled(
    module: nn.Module, call: Callable[[Callable, int], Any], lengths: Sequence[int] = (11, 19, 14)
) -> None:
    """One graph serves all lengths, forward and backward. (The lengths differ from all other sizes:
    equal ones are taken to be one size.)"""
    parameters = list(module.parameters())
    with no_recompiles():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
        for length in lengths:
            torch.manual_seed(length)
            ours = call(compiled, length)
            torch.manual_seed(length)
            theirs = call(module, length)
            assert_same(ours, theirs, 1e-5)
            torch.testing.assert_close(
                gradients(ours, parameters), gradients(theirs, parameters), atol=1e-4, rtol=1e-4
            )
