"""torch_selfattn::nn beside torch_selfattn.nn: checkpoints both ways, the same outputs, gradients,
starting numbers and errors. tests/foreign/checkpoints has the same cases in C++."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cmake_projects import FOREIGN, build_and_run, configure_with_package
from module_checks import outputs_of, randomize
from test_modules_multi_head_attention_errors import call_errors
from torch import Tensor

from torch_selfattn import nn

pytestmark = pytest.mark.slow

B, L, LM, H = 2, 5, 7, 2


def inputs() -> dict[str, Tensor]:
    def floating(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    lengths, memory_lengths = torch.tensor([5, 3]), torch.tensor([7, 4])
    return {
        "x": floating(B, L, 8),
        "memory": floating(B, LM, 8),
        "memory3": floating(B, LM, 3),
        "heads": floating(B, 3, L, 6),
        "lengths": lengths,
        "memory_lengths": memory_lengths,
        "starts": torch.tensor([0, 1]),
        "offsets": torch.tensor([0, 2]),
        "positions": torch.tensor([[0, 1, 2, 3, 4], [3, 1, 4, 1, 5]]),
        "padding": torch.arange(L) >= lengths[:, None],
        "memory_padding": torch.arange(LM) >= memory_lengths[:, None],
        "causal": torch.ones(L, L, dtype=torch.bool).triu(1),
        "score_mask": floating(L, L),
        "float_mask": floating(L, LM),
        "mask_per_head": (torch.rand(H, L, LM) < 0.3) & (torch.arange(LM) > 0),
    }


class Case(NamedTuple):
    make: Callable[[], torch.nn.Module]
    call: Callable[[Any, dict[str, Tensor]], Any]
    # Starts from the same numbers: all but stacks, whose Python layers reset their out-projection's
    # bias once more, as a module of its own.
    same_start: bool = True


def rotary() -> nn.RotaryEmbedding:
    return nn.RotaryEmbedding(4, 32, 100.0)


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        8, H, 12, activation="gelu", layer_norm_eps=0.01, batch_first=True, norm_first=True,
        bias=False, score="additive", num_kv_heads=1, window=(2, 2), rotary=rotary(),
    )  # fmt: skip


def decoder_layer() -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(
        8, H, 12, activation="silu", layer_norm_eps=0.01, batch_first=True, norm_first=True,
        bias=False, score="additive", num_kv_heads=1, window=(3, -1), rotary=rotary(),
        cross_score="additive", cross_nhead=4, cross_num_kv_heads=2, memory_dim=3,
    )  # fmt: skip


def decoder() -> nn.TransformerDecoder:
    return nn.TransformerDecoder(decoder_layer(), 2, torch.nn.LayerNorm(8, bias=False))


@torch.no_grad()
def decode(module: Any, i: dict[str, Tensor]) -> tuple[Tensor, ...]:
    cache = module.new_cache(i["memory3"], 8)
    results: list[Tensor] = []
    for t in range(L):
        results += module.decode_with_weights(
            i["x"][:, t : t + 1], cache, torch.full((B,), t), i["memory_lengths"],
            i["memory_padding"],
        )  # fmt: skip
    return tuple(results)


CASES = {
    "self_attention": Case(lambda: nn.SelfAttention(8), lambda m, i: m(i["x"])),
    "self_attention_options": Case(
        lambda: nn.SelfAttention(
            8, "additive", 5, 3, False, 0.5, True, (2, 1), scale=0.7, alibi=True,
            activation="leaky_relu", negative_slope=0.3,
        ),
        lambda m, i: m(i["x"], i["score_mask"], i["lengths"], True),
    ),
    "additive_attention": Case(
        lambda: nn.AdditiveAttention(8, 3, 5), lambda m, i: m(i["x"], i["memory3"])
    ),
    "additive_attention_options": Case(
        lambda: nn.AdditiveAttention(8, 3, 5, False, 0.5, activation="relu"),
        lambda m, i: m(i["x"], i["memory3"], i["memory"], None, i["memory_lengths"], True),
    ),
    "multi_head_attention": Case(
        lambda: nn.MultiHeadAttention(8, H),
        lambda m, i: m(*[i["x"].transpose(0, 1)] * 3, i["padding"]),
    ),
    "multi_head_attention_fused": Case(
        lambda: nn.MultiHeadAttention(8, H, 0.5, batch_first=True, window=(3, -1)),
        lambda m, i: m(
            i["x"], i["x"], i["x"], need_weights=False, attn_mask=i["causal"], is_causal=True,
            key_lengths=i["lengths"],
        ),
    ),
    "multi_head_attention_appended": Case(
        lambda: nn.MultiHeadAttention(
            8, 4, add_bias_kv=True, add_zero_attn=True, kdim=3, batch_first=True, num_kv_heads=2,
            window=(-1, 2), scale=0.9,
        ),
        lambda m, i: m(
            i["x"], i["memory3"], i["memory"], i["memory_padding"], True, i["float_mask"], False,
            False, i["memory_lengths"], i["starts"], 1, i["offsets"],
        ),
    ),
    "multi_head_attention_options": Case(
        lambda: nn.MultiHeadAttention(
            8, H, bias=False, batch_first=True, score="additive", num_kv_heads=1, window=(4, 3),
            rotary=rotary(), activation="leaky_relu",
        ),
        lambda m, i: m(
            i["x"], i["x"], i["x"], i["padding"], True, i["causal"], True, False, None,
            i["starts"], 2, i["offsets"],
        ),
    ),
    "multi_head_attention_alibi": Case(
        lambda: nn.MultiHeadAttention(8, H, vdim=3, batch_first=True, alibi=True),
        lambda m, i: m(
            i["x"][0], i["memory"][0], i["memory3"][0], i["memory_padding"][0], True,
            i["mask_per_head"],
        ),
    ),
    "sinusoidal": Case(nn.SinusoidalPositionalEncoding, lambda m, i: m(i["x"])),
    "sinusoidal_options": Case(
        lambda: nn.SinusoidalPositionalEncoding(0.5, 50.0, 0.5),
        lambda m, i: m(i["x"], 2, i["positions"]),
    ),
    "learned": Case(
        lambda: nn.LearnedPositionalEncoding(16, 8, 0.5),
        lambda m, i: (m(i["x"], 2), m(i["x"], 1, i["positions"])),
    ),
    "rotary": Case(
        rotary,
        lambda m, i: (m(i["heads"], 3), m(i["heads"], 40), m(i["heads"], 0, i["positions"])),
    ),
    "rotary_options": Case(
        lambda: nn.RotaryEmbedding(2, 16, interleaved=True, scaling=2.0), lambda m, i: m(i["heads"])
    ),
    "encoder_layer": Case(
        lambda: nn.TransformerEncoderLayer(8, H, 12, alibi=True),
        lambda m, i: m(i["x"].transpose(0, 1), i["causal"], i["padding"]),
    ),
    "encoder_layer_options": Case(
        encoder_layer, lambda m, i: m(i["x"], is_causal=True, key_lengths=i["lengths"])
    ),
    "encoder": Case(
        lambda: nn.TransformerEncoder(encoder_layer(), 2, torch.nn.LayerNorm(8)),
        lambda m, i: m(i["x"], i["causal"], i["padding"]),
        False,
    ),
    "decoder_layer": Case(
        lambda: nn.TransformerDecoderLayer(8, H, 12, alibi=True),
        lambda m, i: m(
            i["x"].transpose(0, 1), i["memory"].transpose(0, 1), i["causal"], i["float_mask"],
            i["padding"], i["memory_padding"],
        ),
    ),
    "decoder_layer_options": Case(
        decoder_layer,
        lambda m, i: m.forward_with_weights(
            i["x"], i["memory3"], tgt_is_causal=True, tgt_lengths=i["lengths"],
            memory_lengths=i["memory_lengths"],
        ),
    ),
    "decoder_layer_decode": Case(decoder_layer, decode),
    "decoder": Case(
        decoder,
        lambda m, i: m.forward_with_weights(
            i["x"], i["memory3"], i["causal"], memory_key_padding_mask=i["memory_padding"]
        ),
        False,
    ),
    "decoder_decode": Case(decoder, decode, False),
}  # fmt: skip


def made(name: str) -> torch.nn.Module:
    """The module of a case with the numbers that the C++ program gets."""
    torch.manual_seed(8)
    module = CASES[name].make().double().eval()
    randomize(module)
    return module


CONSTRUCTOR_ERRORS = {
    "heads": {"num_heads": 3},
    "no heads": {"num_heads": 0},
    "kv heads": {"num_kv_heads": 3},
    "no kv heads": {"num_kv_heads": 0},
    "score": {"score": "cosine"},
    "dropout": {"dropout": 1.5},
    "rotary": {"rotary": nn.RotaryEmbedding(4)},
    "alibi": {"alibi": True, "add_zero_attn": True},
}


def tensors_of_call_errors() -> dict[str, Tensor]:
    found = {}
    for name, (options, x, arguments) in call_errors().items():
        given = dict(zip(("query", "key", "value"), x, strict=True)) | arguments
        given |= {key: torch.tensor(value) for key, value in options.items()}
        found |= {f"{name}/{key}": value for key, value in given.items()}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where Python's files and the program's are."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(7)
    for name in CASES:
        torch.save(made(name).state_dict(), folder / f"{name}.state.pt")
        torch.save(inputs(), folder / f"{name}.inputs.pt")
    torch.save(tensors_of_call_errors(), folder / "errors.pt")
    configure_with_package(folder / "build", source=FOREIGN / "checkpoints")
    printed = build_and_run(folder / "build", folder, program="checkpoints")
    assert printed.split() == list(CASES)
    return folder


def load(path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_and_gradients(folder, name: str) -> None:
    module, results = made(name), load(folder / f"{name}.outputs.pt")
    outputs = outputs_of(CASES[name].call(module, load(folder / f"{name}.inputs.pt")))
    expected = {f"out.{n}": output.detach() for n, output in enumerate(outputs)}
    if outputs[0].requires_grad:
        sum(output.square().sum() for output in outputs).backward()
        for key, parameter in module.named_parameters():
            if parameter.grad is not None:
                expected[f"grad.{key}"] = parameter.grad
    assert list(results) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(results[key], value, atol=1e-12, rtol=1e-12, msg=key)
        assert not math.isnan(value.sum())


@pytest.mark.parametrize("name", CASES)
def test_state_dicts_go_both_ways(folder, name: str) -> None:
    module, back = made(name), load(folder / f"{name}.back.pt")
    expected = module.state_dict()
    assert list(back) == list(expected)
    for key, value in expected.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value), key
    module.load_state_dict(back)


@pytest.mark.parametrize("name", CASES)
def test_same_starting_numbers(folder, name: str) -> None:
    started = load(folder / f"{name}.started.pt")
    torch.manual_seed(5)
    expected = CASES[name].make().state_dict()
    assert {key: value.shape for key, value in started.items()} == {
        key: value.shape for key, value in expected.items()
    }
    if CASES[name].same_start:
        for key, value in expected.items():
            assert torch.equal(started[key], value), key


@pytest.mark.parametrize("name", call_errors())
def test_same_errors_of_calls(folder, name: str) -> None:
    options, x, arguments = call_errors()[name]
    with pytest.raises(RuntimeError) as error:
        nn.MultiHeadAttention(8, 4, **options)(*x, **arguments)
    assert (folder / f"{name}.txt").read_text() == str(error.value)


@pytest.mark.parametrize("name", CONSTRUCTOR_ERRORS)
def test_same_errors_of_options(folder, name: str) -> None:
    with pytest.raises(ValueError) as error:
        nn.MultiHeadAttention(**{"embed_dim": 8, "num_heads": 4} | CONSTRUCTOR_ERRORS[name])
    assert (folder / f"{name}.txt").read_text() == str(error.value)
