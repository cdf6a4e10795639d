"""torch.compile in a training loop: one graph for all steps and lengths, of every operator and
every module; autocast inside; compiled autograd; tables on the default device."""

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from module_checks import gradients, no_recompiles
from test_aotinductor import EveryOperator
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import torch_selfattn
from torch_selfattn import nn

B, D, H = 3, 16, 2
LENGTHS = (11, 19, 14)  # unlike all other sizes: equal ones are taken to be one size


class EveryModule(torch.nn.Module):
    """Learns from x (B, L, D) with lengths (B); returns a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.sinusoids = nn.SinusoidalPositionalEncoding(dropout=0.1)
        self.learned = nn.LearnedPositionalEncoding(64, D, 0.1)
        self.own = nn.SelfAttention(D, score="additive", dropout=0.1)
        self.additive = nn.AdditiveAttention(D, D, D, dropout=0.1)
        layer = nn.TransformerEncoderLayer(
            D, H, 24, batch_first=True, rotary=nn.RotaryEmbedding(D // H, 64), score="additive"
        )
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(D, H, 24, batch_first=True, alibi=True), 1
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.learned(self.sinusoids(x))
        x = x + self.own(x, key_lengths=lengths)[0]
        x = x + self.additive(x, x, key_lengths=lengths)[0]
        memory = self.encoder(x, key_lengths=lengths)
        return self.decoder(x, memory, tgt_is_causal=True, memory_lengths=lengths).square().mean()


class OperatorLoss(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.operators = EveryOperator()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        results = self.operators(x, lengths)
        return sum((result.square().mean() for result in results), torch.zeros(()))


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "operators": (OperatorLoss, 24),
    "modules": (EveryModule, D),
}


def batches(size: int, lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(B, n, size), torch.tensor([n, 5, n - 2])) for n in lengths]


def train(model, parameters, data):
    """The losses of two steps for each batch."""
    torch.manual_seed(3)  # dropout
    optimizer = torch.optim.Adam(parameters, 0.01)
    losses = []
    for inputs in data:
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(*inputs)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_all_steps(name: str) -> None:
    """Three lengths, two steps of each: the losses are those of eager training."""
    make, size = MODELS[name]
    model = make()
    eager = copy.deepcopy(model)
    data = batches(size, LENGTHS)
    counter = CompileCounterWithBackend("aot_eager")
    with no_recompiles():
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        compiled(*data[0])
        graphs = counter.frame_count
        losses = train(compiled, list(model.parameters()), data)
    assert counter.frame_count == graphs
    assert losses == pytest.approx(train(eager, list(eager.parameters()), data), rel=1e-4)
    assert len(set(losses)) == len(losses)


@pytest.mark.slow
def test_autocast_inside_and_outside() -> None:
    """Autocast within the compiled function, and around it: the numbers of eager autocast."""
    module = nn.MultiHeadAttention(D, H, batch_first=True)

    def attend(x: Tensor, lengths: Tensor) -> Tensor:
        return module(x, x, x, key_lengths=lengths, need_weights=False)[0]

    def inside(x: Tensor, lengths: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(x, lengths)

    parameters = list(module.parameters())
    for function, outside in ((inside, False), (attend, True)):
        with no_recompiles():
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
            for inputs in batches(D, LENGTHS):
                with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                    got, want = compiled(*inputs), function(*inputs)
                assert got.dtype == torch.bfloat16
                assert torch.equal(got, want)
                torch.testing.assert_close(gradients(got, parameters), gradients(want, parameters))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by PyTorch itself
def test_compiled_autograd() -> None:
    """The backward pass of an eager forward pass as one graph."""
    layer = nn.TransformerEncoderLayer(D, H, 24, 0.0, batch_first=True, score="additive")

    def grads(inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        layer.zero_grad()
        layer(inputs[0], key_lengths=inputs[1], is_causal=True).square().sum().backward()
        return [parameter.grad.clone() for parameter in layer.parameters()]

    data = batches(D, LENGTHS)
    want = [grads(inputs) for inputs in data]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True, dynamic=True)):
        got = [grads(inputs) for inputs in data]
        graphs = counter.frame_count
        torch.testing.assert_close([grads(inputs) for inputs in data], want)
    torch._dynamo.reset()
    torch.testing.assert_close(got, want)
    assert counter.frame_count == graphs > 0


@pytest.mark.parametrize("where", ["nowhere", "context", "default"])
def test_tables_on_the_default_device(where: str) -> None:
    """Tables without a device are made on that of `with torch.device` and set_default_device."""

    def tables() -> tuple[Tensor, ...]:
        return (
            torch_selfattn.sinusoidal_encoding(5, 4),
            *torch_selfattn.rotary_tables(5, 4),
        )

    context = torch.device("meta") if where == "context" else contextlib.nullcontext()
    device = "cpu" if where == "nowhere" else "meta"
    torch._dynamo.reset()
    try:
        if where == "default":
            torch.set_default_device("meta")
        with context:
            compiled = torch.compile(tables, backend="aot_eager", fullgraph=True)
            for call in (tables, compiled):
                assert [x.device.type for x in call()] == [device] * 3
    finally:
        torch.set_default_device(None)
        torch._dynamo.reset()
