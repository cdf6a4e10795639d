"""Positional-encoding modules."""

import functools
import math

import pytest
import torch
from module_checks import (
    assert_same,
    check_compiled,
    check_meta,
    check_reset,
    check_scripted,
    check_state_dict,
    gradients,
)

import torch_selfattn
from torch_selfattn import nn

B, H, L, D = 2, 3, 5, 6
POSITIONS = torch.tensor([[0, 3, 1, 40, 7], [2, 2, 9, 0, 11]])


def sinusoid(positions: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """(..., D), as the paper writes it."""
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = positions[..., None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"base": 100.0, "scale": 2.0}], ids=str)
def test_sinusoidal(options: dict) -> None:
    module = nn.SinusoidalPositionalEncoding(**options)
    assert not module.state_dict()
    x = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    scale, base = options.get("scale", 1.0), options.get("base", 10000.0)
    for kwargs, positions in (
        ({}, torch.arange(L)),
        ({"offset": 3}, torch.arange(L) + 3),
        ({"positions": POSITIONS[0]}, POSITIONS[0]),
        ({"positions": POSITIONS, "offset": 2}, POSITIONS + 2),
    ):
        out = module(x, **kwargs)
        assert_same(out, x + scale * sinusoid(positions, base), 1e-13)
        (grad,) = gradients(out, [x])
        (expected,) = gradients(x * 1, [x])
        assert torch.equal(grad, expected)
    check_scripted(
        module, [lambda m: m(x), lambda m: m(x, 3), lambda m: m(x, 1, POSITIONS), lambda m: m(x[0])]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinusoidal_is_accurate_far_out(dtype: torch.dtype) -> None:
    x = torch.zeros(1, L, D, dtype=dtype)
    out = nn.SinusoidalPositionalEncoding()(x, offset=100_000)
    expected = sinusoid(torch.arange(L) + 100_000)
    torch.testing.assert_close(out[0], expected.to(dtype), atol=2 * torch.finfo(dtype).eps, rtol=0)


def test_learned() -> None:
    make = functools.partial(nn.LearnedPositionalEncoding, 50, D)
    module = make(dtype=torch.float64)
    x = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    for kwargs, positions in (
        ({}, torch.arange(L)),
        ({"offset": 3}, torch.arange(L) + 3),
        ({"positions": POSITIONS}, POSITIONS),
    ):
        out = module(x, **kwargs)
        expected = x + module.weight[positions]
        assert_same(out, expected, 1e-14)
        torch.testing.assert_close(
            gradients(out, [x, module.weight]), gradients(expected, [x, module.weight])
        )
    with pytest.raises(ValueError):
        module(x, offset=46)
    assert set(module.state_dict()) == {"weight"}
    x = x.float().detach()
    check_scripted(make(), [lambda m: m(x), lambda m: m(x, 3), lambda m: m(x, 0, POSITIONS)])
    check_state_dict(make(), make, lambda m: m(x))
    check_reset(make())
    check_meta(make, lambda m: m(x))
    spread = nn.LearnedPositionalEncoding(1000, 64).weight.std().item()
    assert abs(spread / 0.02 - 1) < 0.02


def rotated(x: torch.Tensor, positions: torch.Tensor, dim: int, interleaved: bool, **options):
    """By the rotation matrices; positions (B, 1, L)."""
    base, scaling = options.get("base", 10000.0), options.get("scaling", 1.0)
    out = x.clone()
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        angle = positions.double() / (scaling * base ** (2 * i / dim))
        out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., b] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [D, 4])
@pytest.mark.parametrize("options", [{}, {"base": 50.0, "scaling": 2.0}], ids=str)
@pytest.mark.parametrize("converted", [False, True])
def test_rotary(interleaved: bool, dim: int, options: dict, converted: bool) -> None:
    module = nn.RotaryEmbedding(dim, 64, interleaved=interleaved, **options)
    assert not module.state_dict()
    if converted:
        module = module.double()
    x = torch.randn(B, H, L, D, dtype=torch.float64, requires_grad=True)
    for kwargs, positions in (
        ({}, torch.arange(L)),
        ({"offset": 7}, torch.arange(L) + 7),
        ({"offset": 62}, torch.arange(L) + 62),  # beyond the table
        ({"positions": POSITIONS}, POSITIONS[:, None]),
    ):
        out = module(x, **kwargs)
        expected = rotated(x, positions, dim, interleaved, **options)
        assert_same(out, expected, 1e-13)
        torch.testing.assert_close(gradients(out, [x]), gradients(expected, [x]))


def test_rotary_scores_depend_on_distance_only() -> None:
    module = nn.RotaryEmbedding(D)
    q, k = torch.randn(2, 1, 1, 1, D, dtype=torch.float64)
    scores = [(module(q, 5 + shift) * module(k, 2 + shift)).sum() for shift in (0, 1, 100, 5000)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(4))


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
@pytest.mark.parametrize("scripted", [False, True])
def test_rotary_tables_stay_in_single_precision(cast: str, scripted: bool) -> None:
    module = nn.RotaryEmbedding(D, 4096)
    x = torch.randn(B, H, L, D)
    expected = module(x, 4000)
    if scripted and cast == "bfloat16":
        pytest.skip("scripted modules have no bfloat16()")
    if scripted:
        module = torch.jit.script(module)
    module = getattr(module, cast)()
    assert torch.equal(module(x, 4000), expected)
    low = x.to(torch.bfloat16)
    torch.testing.assert_close(module(low, 4000).float(), expected, atol=0.05, rtol=0.05)


def test_rotary_state_and_scripting() -> None:
    make = functools.partial(nn.RotaryEmbedding, 4, 50)
    x = torch.randn(B, H, L, D)
    calls = [
        lambda m: m(x),
        lambda m: m(x, 7),
        lambda m: m(x, 48),
        lambda m: m(x, 0, POSITIONS),
        lambda m: m(x.double(), 2),
    ]
    check_scripted(make(), calls)
    check_state_dict(make(), make, lambda m: m(x))
    check_meta(make, lambda m: m(x))
    module = make()
    module.cos.fill_(math.nan)
    module.reset_parameters()
    assert torch.equal(module(x), make()(x))
    with pytest.raises(ValueError, match=r"dim must be even and positive \(got dim=3\)"):
        nn.RotaryEmbedding(3)


class WithParameter(torch.nn.Module):
    """So that there is a gradient to compare."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.factor = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor, offset: int = 0, positions: torch.Tensor | None = None):
        return self.module(x * self.factor, offset, positions)


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        nn.SinusoidalPositionalEncoding,
        lambda: nn.LearnedPositionalEncoding(64, D),
        lambda: nn.RotaryEmbedding(D, 64),
    ],
    ids=["sinusoidal", "learned", "rotary"],
)
def test_compiled(make, by_id: bool) -> None:
    def call(m, length):
        x = torch.randn(B, H, length, D)
        if by_id:
            return m(x, 0, torch.randint(0, 64, (B, length)))
        return m(x, 3)

    check_compiled(WithParameter(make()), call)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.SinusoidalPositionalEncoding(dropout=0.5),
        lambda: nn.LearnedPositionalEncoding(L, D, dropout=0.5),
    ],
    ids=["sinusoidal", "learned"],
)
def test_dropout(make) -> None:
    module = make()
    x = torch.randn(B, L, D) + 10
    dropped = module(x)
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    plain = module.eval()(x)
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_slopes_of_a_cast_module(dtype: torch.dtype) -> None:
    """Slopes stay float32 (as exact as float64 can be), though not in a scripted module."""
    heads = 6  # whose slopes bfloat16 would round
    exact = torch_selfattn.alibi_slopes(heads, torch.float64)
    module = nn.MultiHeadAttention(12, heads, batch_first=True, alibi=True)
    scripted = torch.jit.script(module).to(dtype)
    module.to(dtype)
    assert module.alibi.slopes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(module.alibi.slopes.double(), exact, atol=1e-7, rtol=0)
    x = torch.randn(2, 5, 12).to(dtype)
    assert_same(
        scripted(x, x, x, need_weights=False)[0], module(x, x, x, need_weights=False)[0], 0.05
    )
