"""use_in_scaled_dot_product_attention: PyTorch's function computed by ours inside of a block."""

import threading

import pytest
import torch
import torch.nn.functional as F
from module_checks import gradients
from torch.nn.attention import bias
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.overrides import TorchFunctionMode

from torch_selfattn.integrations import use_in_scaled_dot_product_attention

B, H, LQ, LK, E = 2, 4, 5, 7, 8


class Calls(TorchFunctionMode):
    """Counts the calls of our operator; to be entered first, so that it sees what is inside."""

    def __init__(self) -> None:
        self.ours = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ours += "torch_selfattn" in str(func)
        return func(*args, **(kwargs or {}))


def inputs(lq: int = LQ, lk: int = LK, kv_heads: int = H) -> list[torch.Tensor]:
    shapes = (H, lq, E), (kv_heads, lk, E), (kv_heads, lk, E)
    return [torch.randn(B, *s, dtype=torch.float64, requires_grad=True) for s in shapes]


BOOL = torch.rand(B, 1, LQ, LK, generator=torch.Generator().manual_seed(1)) < 0.7
BOOL[..., 0] = True
FLOAT = torch.randn(H, LQ, LK, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
CALLS = {
    "plain": ([], {}),
    "positional": ([BOOL, 0.0, False], {}),
    "mask": ([], {"attn_mask": BOOL}),
    "float mask": ([FLOAT], {}),
    "causal": ([], {"is_causal": True}),
    "scale": ([], {"scale": 0.3}),
    "grouped": ([], {"enable_gqa": True, "kv_heads": 2}),
    "lower right": ([bias.causal_lower_right(LQ, LK)], {}),
    "upper left": ([bias.causal_upper_left(LQ, LK)], {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_same_output_and_gradients(name: str) -> None:
    args, kwargs = CALLS[name]
    kwargs = dict(kwargs)
    x = inputs(kv_heads=kwargs.pop("kv_heads", H))
    for function in (F.scaled_dot_product_attention, imported_by_name):
        expected = function(*x, *args, **kwargs)
        with Calls() as calls, use_in_scaled_dot_product_attention():
            out = function(*x, *args, **kwargs)
        assert calls.ours == 1
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(
            gradients(out, x), gradients(expected, x), atol=1e-12, rtol=1e-12
        )


def test_by_keywords_and_with_a_gradient_of_the_mask() -> None:
    x = inputs()
    mask = FLOAT.clone().requires_grad_()
    kwargs = dict(zip(("query", "key", "value"), x, strict=True), attn_mask=mask)
    expected = F.scaled_dot_product_attention(**kwargs)
    with use_in_scaled_dot_product_attention():
        out = F.scaled_dot_product_attention(**kwargs)
    torch.testing.assert_close(gradients(out, [mask]), gradients(expected, [mask]))


def test_dropout_is_reproducible() -> None:
    x = inputs()
    with use_in_scaled_dot_product_attention():
        torch.manual_seed(1)
        first = F.scaled_dot_product_attention(*x, dropout_p=0.5)
        torch.manual_seed(1)
        assert torch.equal(F.scaled_dot_product_attention(*x, dropout_p=0.5), first)
        assert not torch.equal(F.scaled_dot_product_attention(*x, dropout_p=0.5), first)


def test_modules_of_pytorch() -> None:
    x = torch.randn(B, LQ, 8)
    attention = torch.nn.MultiheadAttention(8, H, batch_first=True).eval()
    layer = torch.nn.TransformerEncoderLayer(8, H, 12, batch_first=True).eval()
    with torch.no_grad():  # where PyTorch has fused paths without the function
        expected = attention(x, x, x, need_weights=False)[0], layer(x)
        with Calls() as calls, use_in_scaled_dot_product_attention():
            out = attention(x, x, x, need_weights=False)[0], layer(x)
    assert calls.ours == 2
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_entered_again_and_left() -> None:
    x = inputs()

    def runs() -> bool:
        # Of ours only there is a node of this name.
        out = F.scaled_dot_product_attention(*x)
        return "ScaledDotProduct" not in type(out.grad_fn).__name__

    mode = use_in_scaled_dot_product_attention()
    assert not runs()
    with mode:
        assert runs()
        with mode, use_in_scaled_dot_product_attention():
            assert runs()
        assert runs()
    assert not runs()
    with mode:
        assert runs()
    with pytest.raises(KeyError), mode:
        raise KeyError
    assert not runs()


def test_other_threads_are_not_touched() -> None:
    x = inputs()
    found = []

    def of_thread() -> None:
        found.append(type(F.scaled_dot_product_attention(*x).grad_fn).__name__)

    of_thread()
    with use_in_scaled_dot_product_attention():
        of_thread()
        thread = threading.Thread(target=of_thread)
        thread.start()
        thread.join()
    assert found[0] == found[2] != found[1]


def test_backward_outside_of_the_block() -> None:
    x = inputs()
    with use_in_scaled_dot_product_attention():
        out = F.scaled_dot_product_attention(*x, is_causal=True)
    expected = F.scaled_dot_product_attention(*x, is_causal=True)
    torch.testing.assert_close(gradients(out, x), gradients(expected, x))


def test_compile() -> None:
    torch._dynamo.reset()
    x = [t.detach() for t in inputs()]

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    def with_inside(q, k, v):
        with use_in_scaled_dot_product_attention():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    expected = attention(*x)
    made = []

    def backend(graph, example_inputs):
        made.append(graph.code)
        return graph

    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*x), expected)
    with use_in_scaled_dot_product_attention():
        torch.testing.assert_close(compiled(*x), expected)
    torch.testing.assert_close(compiled(*x), expected)  # the first graph again
    module = torch.nn.MultiheadAttention(8, H, batch_first=True)
    sequence = torch.randn(B, LQ, 8)
    of_module = torch.compile(module, backend=backend, fullgraph=True)
    with use_in_scaled_dot_product_attention():
        out, _ = of_module(sequence, sequence, sequence, need_weights=False)
    torch.testing.assert_close(out, module(sequence, sequence, sequence, need_weights=False)[0])
    inside = torch.compile(with_inside, backend=backend, fullgraph=True)
    torch.testing.assert_close(inside(*x), expected)
    assert ["torch_selfattn" in code for code in made] == [False, True, True, True]
    torch._dynamo.reset()


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    x = tuple(t.detach() for t in inputs())
    with use_in_scaled_dot_product_attention():
        exported = torch.export.export(Model(), x)
    assert "torch_selfattn" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*x), F.scaled_dot_product_attention(*x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_is_refused() -> None:
    x = inputs()
    nested = torch.nested.nested_tensor([torch.zeros(2, 3, E)])
    with use_in_scaled_dot_product_attention():
        with pytest.raises(NotImplementedError, match=r"no nested tensors .*query.is_nested=True"):
            F.scaled_dot_product_attention(nested, nested, nested)
        with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set when"):
            F.scaled_dot_product_attention(*x, attn_mask=BOOL, is_causal=True)
        with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
            F.scaled_dot_product_attention(*x, bias.causal_upper_left(LQ, LK), is_causal=True)
