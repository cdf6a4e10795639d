"""replace_attention: PyTorch's modules of a model become ours, and nothing else changes."""

import copy
import io

import pytest
import torch
from module_checks import gradients, randomize
from torch import nn

import torch_selfattn
from torch_selfattn.integrations import replace_attention

D, H, L, B = 8, 4, 6, 3


class Block(nn.Module):
    """One attention module used twice, one in a list, layers, and a stack of PyTorch's."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.shared = nn.MultiheadAttention(D, H, batch_first=True, **kwargs)
        self.again = self.shared
        self.list = nn.ModuleList(
            [
                nn.MultiheadAttention(D, H, batch_first=True, add_bias_kv=True, **kwargs),
                nn.MultiheadAttention(D, H, batch_first=True, kdim=D, vdim=5, bias=False, **kwargs),
            ]
        )
        self.to_value = nn.Linear(D, 5)
        layer = nn.TransformerEncoderLayer(D, H, 12, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoderLayer(
            D, H, 12, 0.0, nn.functional.relu, batch_first=True, norm_first=True
        )

    def forward(self, x, padding=None):
        x = x + self.shared(x, x, x, padding, need_weights=False)[0]
        x = x + self.again(x, x, x, padding)[0]
        x = x + self.list[0](x, x, x, padding, need_weights=False)[0]
        x = x + self.list[1](x, x, self.to_value(x), padding, need_weights=False)[0]
        y = self.encoder(x, src_key_padding_mask=padding)
        return self.decoder(y, x, memory_key_padding_mask=padding)


NAMES = [
    "shared", "list.0", "list.1", "encoder.layers.0", "encoder.layers.0.self_attn",
    "encoder.layers.1", "encoder.layers.1.self_attn", "decoder", "decoder.self_attn",
    "decoder.multihead_attn",
]  # fmt: skip
PADDING = torch.arange(L) >= torch.tensor([6, 4, 1])[:, None]


def block(**kwargs) -> Block:
    model = Block(**kwargs)
    randomize(model)
    return model.double()


def leftovers(model: nn.Module) -> list[str]:
    theirs = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return [name for name, m in model.named_modules() if isinstance(m, theirs)]


@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
def test_same_output_and_gradients(padding: torch.Tensor | None) -> None:
    model = block()
    x = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    keys = list(model.state_dict())
    expected = model(x, padding)
    expected_gradients = gradients(expected, leaves)
    assert sorted(replace_attention(model)) == sorted(NAMES)
    assert leftovers(model) == []
    assert [id(p) for p in model.parameters()] == [id(p) for p in leaves[1:]]
    assert list(model.state_dict()) == keys
    out = model(x, padding)
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(gradients(out, leaves), expected_gradients, atol=1e-10, rtol=1e-10)
    assert replace_attention(model) == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_inference_with_padding_becomes_nested_in_pytorch_s_stack() -> None:
    """nn.TransformerEncoder hands nested tensors to its layers there."""
    model = block().eval()
    x = torch.randn(B, L, D, dtype=torch.float64)
    seen = []
    with torch.no_grad():
        expected = model.encoder(x, src_key_padding_mask=PADDING)
        replace_attention(model)
        hook = model.encoder.layers[1].register_forward_pre_hook(
            lambda module, args: seen.append(args[0].is_nested)
        )
        out = model.encoder(x, src_key_padding_mask=PADDING)
    hook.remove()
    assert seen == [True]
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-11)
    assert (out[2, 1:] == 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_what_is_kept(training: bool) -> None:
    model = block(dropout=0.25).to(torch.bfloat16).train(training)
    for p in model.list[0].parameters():
        p.requires_grad_(False)
    modules = dict(model.named_modules())
    replace_attention(model)
    for name in NAMES:
        assert model.get_submodule(name) is modules[name]
    assert model.shared is model.again
    assert type(model.shared) is torch_selfattn.nn.MultiHeadAttention
    assert type(model.decoder) is torch_selfattn.nn.TransformerDecoderLayer
    assert all(m.training == training for m in model.modules())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert [p.requires_grad for p in model.list[0].parameters()] == [False] * 6
    assert model.shared.dropout == 0.25 and model.shared.batch_first
    x = torch.randn(B, L, D, dtype=torch.bfloat16)
    assert model.shared(x, x, x, need_weights=False)[0].dtype == torch.bfloat16


def test_optimizer_and_hooks_go_on() -> None:
    torch.manual_seed(3)
    models = [block(), None]
    models[1] = copy.deepcopy(models[0])
    losses, calls = [], []
    for replaced, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        called = []
        model.shared.register_forward_hook(lambda *_, c=called: c.append("forward"))
        model.encoder.layers[0].register_full_backward_hook(lambda *_, c=called: c.append("back"))
        x = torch.randn(B, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        for step in range(4):
            if step == 2 and replaced:
                assert replace_attention(model)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        calls.append(called)
    torch.testing.assert_close(losses[4:], losses[:4], atol=1e-9, rtol=1e-9)
    assert calls[0] == calls[1] == ["forward", "forward", "back"] * 4


def test_copied_saved_and_scripted() -> None:
    model = block().eval()
    x = torch.randn(B, L, D, dtype=torch.float64)
    replace_attention(model)
    expected = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for made in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        torch.testing.assert_close(made(x), expected)
    other = block()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(x), expected, atol=1e-11, rtol=1e-11)
    for module in (model.shared, model.list[0], model.list[1]):
        args = (x, x, model.to_value(x) if module is model.list[1] else x)
        torch.testing.assert_close(torch.jit.script(module)(*args)[0], module(*args)[0])
    for module, args in ((model.encoder.layers[0], (x,)), (model.decoder, (x, x))):
        torch.testing.assert_close(torch.jit.script(module)(*args), module(*args))


def test_reset_parameters_of_the_replaced() -> None:
    model = nn.MultiheadAttention(D, H)
    replace_attention(model)
    torch.manual_seed(1)
    model.reset_parameters()
    torch.manual_seed(1)
    expected = nn.MultiheadAttention(D, H)
    expected.out_proj.reset_parameters()
    torch.manual_seed(1)
    ours = torch_selfattn.nn.MultiHeadAttention(D, H)
    torch.manual_seed(1)
    ours.reset_parameters()
    torch.testing.assert_close(dict(model.state_dict()), dict(ours.state_dict()))


def test_compiled() -> None:
    model = nn.TransformerEncoderLayer(D, H, 12, 0.0, batch_first=True)
    replace_attention(model)
    x = torch.randn(B, L, D)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_the_model_itself() -> None:
    for module in (nn.MultiheadAttention(D, H), nn.TransformerEncoderLayer(D, H, 12, 0.0)):
        module.double()
        x = torch.randn(L, B, D, dtype=torch.float64)
        args = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
        expected = module(*args)
        assert replace_attention(module)[0] == ""
        torch.testing.assert_close(module(*args), expected)


def test_parametrized_and_pruned() -> None:
    """Of linear layers as they are; of the attention module's own parameters: a subclass."""
    from torch.nn.utils import parametrizations, prune

    model = nn.TransformerEncoderLayer(D, H, 12, 0.0, batch_first=True, dtype=torch.float64)
    parametrizations.weight_norm(model.self_attn.out_proj, "weight")
    parametrizations.spectral_norm(model.linear1)
    prune.l1_unstructured(model.self_attn, "in_proj_weight", amount=0.5)
    model.eval()
    x = torch.randn(B, L, D, dtype=torch.float64)
    expected = model(x)
    assert replace_attention(model) == ["", "self_attn"]
    torch.testing.assert_close(model(x), expected)
    model.self_attn.in_proj_weight_orig.data.zero_()  # the hook that prunes still runs
    assert not torch.allclose(model(x), expected)

    parametrized = nn.MultiheadAttention(D, H)
    nn.utils.parametrize.register_parametrization(parametrized, "in_proj_weight", nn.Identity())
    with pytest.raises(TypeError, match=r"the model itself \(ParametrizedMultiheadAttention"):
        replace_attention(parametrized)


class MyAttention(nn.MultiheadAttention):
    pass


class MyLayer(nn.TransformerEncoderLayer):
    """Inherits PyTorch's forward with its fused path for inference."""


def test_subclasses() -> None:
    model = nn.ModuleDict(
        {
            "first": nn.MultiheadAttention(D, H),
            "mine": MyAttention(D, H),
            "layer": MyLayer(D, H, 12, 0.0, batch_first=True),
            "exchanged": nn.MultiheadAttention(D, H),
        }
    )
    model["exchanged"].forward = lambda *args: None
    before = [type(m) for m in model.modules()]
    text = (
        r"not of subclasses.*got mine \(MyAttention\), layer \(MyLayer\), exchanged \(its forward"
    )
    with pytest.raises(TypeError, match=text):
        replace_attention(model)
    assert [type(m) for m in model.modules()] == before
    x = torch.randn(B, L, D)
    layer = model["layer"].eval()
    with torch.no_grad():
        expected = layer(x)
    assert replace_attention(model, subclasses="skip") == ["first", "layer.self_attn"]
    assert type(model["mine"]) is MyAttention and type(layer) is MyLayer
    calls = []
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert calls == [1]  # not passed over by the fused path
    with pytest.raises(ValueError, match="subclasses must be 'refuse' or 'skip'"):
        replace_attention(model, subclasses="both")


def test_never_half_done() -> None:
    model = nn.Sequential(nn.MultiheadAttention(D, H), nn.MultiheadAttention(D, H, dropout=1.5))
    with pytest.raises(ValueError, match="dropout must be between 0 and 1"):
        replace_attention(model)
    assert type(model[0]) is nn.MultiheadAttention
    assert "score" not in vars(model[0])


def test_no_random_numbers_are_drawn() -> None:
    model = block()
    state = torch.get_rng_state()
    replace_attention(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert replace_attention(nn.Linear(2, 2)) == []
