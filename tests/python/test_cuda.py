"""On a GPU: the ways into the operators, PyTorch's fused kernels by name, streams and CUDA graphs.

The numbers of every operator on a GPU are checked by its own file (pytest -m cuda)."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_selfattn
from torch_selfattn.nn import MultiHeadAttention

pytestmark = pytest.mark.cuda
OPS = torch.ops.torch_selfattn


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


class Model(nn.Module):
    """Both scores, a rotary encoding and projections."""

    def __init__(self) -> None:
        super().__init__()
        self.dot = MultiHeadAttention(64, 4, batch_first=True)
        self.additive = MultiHeadAttention(64, 4, batch_first=True, score="additive")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dot(x, x, x, need_weights=False, is_causal=True)[0]
        x = torch_selfattn.add_sinusoidal_encoding(x)
        return x + self.additive(x, x, x, need_weights=False)[0]


def train_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_module_trains_as_on_the_cpu() -> None:
    model = Model()
    x = torch.randn(3, 21, 64)
    want = train_step(model, x)
    got = train_step(model.cuda(), x.cuda())
    assert_same([t.cpu() for t in got], [t.cpu() for t in want])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script(tmp_path: Path) -> None:
    model = Model().cuda()
    x = normal(2, 17, 64).detach()
    want = train_step(model, x)
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    assert_same(train_step(torch.jit.load(tmp_path / "model.pt"), x), want)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_compile() -> None:
    model = Model().cuda()
    compiled = torch.compile(model, fullgraph=True)
    for length in (17, 33):
        x = normal(2, length, 64).detach()
        assert_same(train_step(compiled, x), train_step(model, x))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_export_and_aotinductor(tmp_path: Path) -> None:
    model = Model().cuda().eval()
    length = torch.export.Dim("length", min=2, max=512)
    x = normal(2, 17, 64).detach()
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        other = normal(2, 40, 64).detach()
        want = [model(other)]
        assert_same([program.module()(other)], want)
        assert_same([torch._inductor.aoti_load_package(package)(other)], want)


def test_autocast() -> None:
    query, key, value = (normal(2, 4, 33, 64) for _ in range(3))
    weight = normal(4, 64)
    with torch.autocast("cuda", torch.bfloat16):
        for out in (
            torch_selfattn.dot_product_attention(query, key, value),
            torch_selfattn.additive_attention(query, key, value, weight),
        ):
            assert out.dtype == torch.bfloat16
            out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (query, weight))


def test_vmap() -> None:
    query, key, value = (normal(3, 2, 2, 9, 16).detach() for _ in range(3))
    got = torch.func.vmap(torch_selfattn.dot_product_attention)(query, key, value)
    torch.testing.assert_close(got, torch_selfattn.dot_product_attention(query, key, value))


def test_cuda_graph_draws_new_dropout() -> None:
    query, key, value = (normal(2, 4, 200, 64, dtype=torch.bfloat16).detach() for _ in range(3))
    weight = normal(4, 64, dtype=torch.bfloat16).detach()

    def attend() -> Tensor:
        return torch_selfattn.additive_attention(query, key, value, weight, dropout_p=0.5)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert torch.isfinite(out).all()
    assert not torch.equal(first, out)


def test_side_stream() -> None:
    """Kernels run on the current stream: after what it waits for, not before."""
    query, key, value = (normal(2, 4, 128, 64).detach() for _ in range(3))
    want = torch_selfattn.dot_product_attention(2 * query, key, value, window_left=30)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        doubled = 2 * query
        got = torch_selfattn.dot_product_attention(doubled, key, value, window_left=30)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want).norm() / want.norm()).detach())


FUSED = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, dtype in itertools.product(
        ("cudnn", "flash", "efficient"), (torch.float32, torch.float16, torch.bfloat16)
    )
    if dtype != torch.float32 or name == "efficient"
]


@pytest.mark.parametrize(("name", "dtype"), FUSED)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "dim"), [(31, 64), (32, 64), (33, 72), (257, 128)])
def test_fused(name: str, dtype: torch.dtype, causal: bool, length: int, dim: int) -> None:
    """Around the lengths to which PyTorch's kernels pad the log-sum-exp."""
    inputs = [normal(2, 3, length, dim, dtype=dtype) for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = normal(2, 3, length, dim, dtype=dtype).detach()
    with torch_selfattn.use_implementation(name):
        try:
            out, lse = torch_selfattn.dot_product_attention_with_lse(*inputs, is_causal=causal)
        except NotImplementedError as error:
            pytest.skip(str(error).splitlines()[0])
        got = torch.autograd.grad(out, inputs, grad)
    scores = exact[0] @ exact[1].mT * dim**-0.5
    if causal:
        hidden = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    want_out = scores.softmax(-1) @ exact[2]
    want = torch.autograd.grad(want_out, exact, grad.double())
    bound = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 3e-6
    assert relative_error(out, want_out) < bound
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < bound


@pytest.mark.parametrize("length", [64, 333, 1024])
def test_default_backward_is_deterministic(length: int) -> None:
    inputs = [normal(2, 4, length, 64, dtype=torch.bfloat16) for _ in range(3)]
    weight = normal(4, 64, dtype=torch.bfloat16)
    for out in (
        torch_selfattn.dot_product_attention(*inputs),
        torch_selfattn.additive_attention(*inputs, weight),
    ):
        grad = torch.ones_like(out)
        first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        for _ in range(10):
            again = torch.autograd.grad(out, inputs, grad, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_default_is_as_accurate_as_scaled_dot_product_attention() -> None:
    query, key, value = (normal(2, 4, 300, 64, dtype=torch.bfloat16).detach() for _ in range(3))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    ours = torch_selfattn.dot_product_attention(query, key, value)
    theirs = F.scaled_dot_product_attention(query, key, value)
    assert relative_error(ours, exact) <= 1.2 * relative_error(theirs, exact)
