"""Positional encodings against float64 formulas, and every way into the operators.

Length: four operators, each through the same list of ways in; side by side they are compared.
"""

import io
import math

import mpmath
import pytest
import torch
import ways
from module_checks import saved_and_loaded
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from torch_selfattn import (
    add_learned_encoding,
    add_sinusoidal_encoding,
    rotary_embedding,
    rotary_tables,
    sinusoidal_encoding,
)

OPS = torch.ops.torch_selfattn
HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float64, torch.float32, *HALF]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


# ---- References: the formulas in float64, with nothing of the package ---------------------------


def angles(positions, dim, base=10000.0, scaling=1.0):
    i = torch.arange((dim + 1) // 2, dtype=torch.float64, device=positions.device)
    return positions.double().unsqueeze(-1) / (scaling * base ** (2 * i / max(dim, 1)))


def reference_sinusoid(positions, dim, base=10000.0):
    out = torch.empty(*positions.shape, dim, dtype=torch.float64, device=positions.device)
    a = angles(positions, dim, base)
    out[..., 0::2] = a.sin()
    out[..., 1::2] = a.cos()[..., : dim // 2]
    return out


def beside(x, rows):
    """(B, L, D) between the batch and the length of x."""
    return (
        rows if rows.dim() == 2 else rows.view(rows.size(0), *[1] * (x.dim() - 3), *rows.shape[1:])
    )


def default_positions(x, offset, positions):
    if positions is None:
        positions = torch.arange(x.size(-2), device=x.device)
    return positions.long() + offset


def reference_add_sinusoidal(x, scale=1.0, base=10000.0, offset=0, positions=None):
    encoding = reference_sinusoid(default_positions(x, offset, positions), x.size(-1), base)
    return x.double() + scale * beside(x, encoding)


def reference_add_learned(x, table, offset=0, positions=None):
    return x.double() + beside(x, table.double()[default_positions(x, offset, positions)])


def reference_rotary(x, cos, sin, interleaved=False, rotary_dim=None, position_ids=None):
    """Pairs as complex numbers times e^(i angle)."""
    turn = torch.complex(cos.double(), sin.double())
    turn = beside(x, turn if position_ids is None else turn[position_ids.long()])
    rotated, rest = x.double().split([2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = rotated.chunk(2, dim=-1)
    z = torch.complex(a, b) * turn
    y = torch.stack((z.real, z.imag), dim=-1 if interleaved else -2).flatten(-2)
    return torch.cat((y, rest), dim=-1)


def assert_rounded(got, want, dtype, largest_angle=1.0):
    """Equal to the float64 result, rounded to dtype once (two units in the last place); the float64
    result itself is only as good as the rounding of its angles."""
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    atol = 2 * eps + largest_angle * 2.0**-51
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=atol)


def randn(*shape, device="cpu", dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(sum((k + 1) * n for k, n in enumerate(shape)))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return x.requires_grad_(requires_grad)


def ids(*shape, rows, device="cpu", dtype=torch.int64):
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(rows, shape, generator=generator, dtype=dtype).to(device)


# name -> (x, has a batch): every way a row can lie in memory.
def layouts(device, dtype, length=5, dim=6):
    def x(*shape):
        return randn(*shape, device=device, dtype=dtype)

    return {
        "2d": x(length, dim),
        "3d": x(2, length, dim),
        "4d": x(2, 3, length, dim),
        "heads inside": x(2, length, 3, dim).transpose(1, 2),
        "packed qkv": x(2, length, 3, 3, dim).select(2, 1).transpose(1, 2),
        "5d": x(2, 3, 2, length, dim),
        "5d heads inside": x(2, length, 3, 2, dim).movedim(1, 3),
        "columns outside": x(2, 3, dim, length).transpose(-1, -2),
        "every other column": x(2, 3, length, 2 * dim)[..., ::2],
        "expanded batch": x(1, 3, length, dim).expand(2, -1, -1, -1),
        "expanded rows": x(2, 3, 1, dim).expand(-1, -1, length, -1),
    }


LAYOUTS = list(layouts("cpu", torch.float64))


# ---- Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2, 7, 64])
@pytest.mark.parametrize(("length", "offset"), [(0, 0), (1, 0), (1, 77), (5, -3), (100, 31)])
def test_sinusoidal_encoding(length, offset, dim, dtype, device):
    got = sinusoidal_encoding(length, dim, offset=offset, dtype=dtype, device=device)
    want = reference_sinusoid(torch.arange(offset, offset + length, device=device), dim)
    assert got.shape == (length, dim) and got.is_contiguous() and got.device.type == device
    assert_rounded(got, want, dtype, max(abs(offset), abs(offset + length)))


def test_sinusoidal_encoding_dtype_and_device():
    assert sinusoidal_encoding(2, 4).dtype == torch.get_default_dtype()
    assert sinusoidal_encoding(2, 4).device.type == "cpu"
    with torch.device("meta"):  # as a module's __init__ may run
        assert sinusoidal_encoding(2, 4).device.type == "meta"
        assert rotary_tables(2, 4)[0].device.type == "meta"
    torch.set_default_dtype(torch.float64)
    try:
        assert sinusoidal_encoding(2, 4).dtype == torch.float64
        assert rotary_tables(2, 4)[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# How far an element may be from the exact sine: one rounding of dtype (half a unit in the last
# place of 1) and, for float64, the rounding of the angle itself.
TABLE_ERROR = {
    torch.float64: lambda position: 2.0**-51 * max(position, 4),
    torch.float32: lambda position: 2.0**-25 + 2.0**-30,
    torch.float16: lambda position: 2.0**-12 + 2.0**-24,
    torch.bfloat16: lambda position: 2.0**-9 + 2.0**-24,
}
CUDA_TABLE_ERROR = {torch.float32: lambda position: 2.0**-23}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 1, 2048, 65_537, 99_999, 1_000_000, 123_456_789])
def test_tables_are_exact_at_large_positions(position, dtype, device):
    dim, base, scaling, length = 64, 10000.0, 4.0, 3
    bound = TABLE_ERROR[dtype](position + length)
    if device == "cuda" and dtype in CUDA_TABLE_ERROR:
        bound = CUDA_TABLE_ERROR[dtype](position)
    table = sinusoidal_encoding(length, dim, base, position, dtype=dtype, device=device)
    zeros = torch.zeros(length, dim, dtype=dtype, device=device)
    added = add_sinusoidal_encoding(zeros, base=base, offset=position)
    tables = [table[:, 0::2], table[:, 1::2], added[:, 0::2], added[:, 1::2]]
    scalings = [1.0] * 4
    if dtype not in HALF:
        cos, sin = rotary_tables(length, dim, base, position, scaling, dtype=dtype, device=device)
        tables += [sin, cos]
        scalings += [scaling] * 2
    tables = [t.cpu().double() for t in tables]
    with mpmath.workdps(50):
        for r in range(length):
            for i in range(dim // 2):
                frequency = mpmath.mpf(base) ** (mpmath.mpf(-2 * i) / dim)
                for k, (t, s) in enumerate(zip(tables, scalings, strict=True)):
                    angle = (position + r) * frequency / s
                    exact = mpmath.sin(angle) if k % 2 == 0 else mpmath.cos(angle)
                    assert abs(float(t[r, i]) - exact) <= bound, (k, position + r, i)


def test_a_position_has_one_encoding(device):
    """However the rows are cut into blocks: decoding step by step equals the whole sequence."""
    whole = sinusoidal_encoding(200, 34, device=device)
    for begin, length in [(0, 1), (31, 2), (63, 40), (150, 50)]:
        part = sinusoidal_encoding(length, 34, offset=begin, device=device)
        assert torch.equal(part, whole[begin : begin + length])
    zeros = torch.zeros(3, 200, 34, device=device)
    assert torch.equal(add_sinusoidal_encoding(zeros)[1], whole)
    some = ids(3, 200, rows=200, device=device)
    assert torch.equal(add_sinusoidal_encoding(zeros, positions=some), whole[some])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_sinusoidal_encoding(layout, dtype, device):
    x = layouts(device, dtype, length=35, dim=7)[layout]
    for options in (
        {},
        {"scale": 0.25, "base": 100.0, "offset": 40},
        {"positions": ids(35, rows=1000, device=device), "offset": 3},
        {"positions": ids(35, rows=1000, device=device, dtype=torch.int32)},
    ):
        got = add_sinusoidal_encoding(x, **options)
        assert_rounded(got, reference_add_sinusoidal(x, **options), dtype, 1000)
    if x.dim() > 2:
        each = ids(35, 2, rows=5000, device=device).t()
        for positions in (each, each[:1]):
            got = add_sinusoidal_encoding(x, positions=positions)
            assert_rounded(got, reference_add_sinusoidal(x, positions=positions), dtype, 5000)


@pytest.mark.parametrize("table_dtype", ["as x", torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_learned_encoding(layout, dtype, table_dtype, device):
    if table_dtype == "as x":
        table_dtype = dtype
    elif dtype not in HALF:
        pytest.skip("the same case as another")
    x = layouts(device, dtype)[layout].requires_grad_()
    shared, each = ids(5, rows=7, device=device), ids(2, 5, rows=7, device=device)
    for storage in (randn(9, 6, device=device), randn(6, 9, device=device).t()):
        table = storage.to(table_dtype).requires_grad_()
        cases = [{}, {"offset": 4}, {"positions": shared, "offset": 2}]
        if x.dim() > 2:
            cases += [{"positions": each}, {"positions": each[:1].int(), "offset": 1}]
        for options in cases:
            got = add_learned_encoding(x, table, **options)
            want = reference_add_learned(x, table, **options)
            assert_rounded(got, want, dtype)
            g = randn(*x.shape, device=device, dtype=dtype)
            grad_x, grad_table = torch.autograd.grad(got, (x, table), g)
            want_x, want_table = torch.autograd.grad(want, (x, table), g.double())
            assert torch.equal(grad_x, want_x.to(dtype))
            assert grad_table.dtype == table_dtype
            # Sums of up to 60 terms in float32 (float64), then one rounding.
            eps = max(torch.finfo(table_dtype).eps, 1e-6 if dtype != torch.float64 else 1e-15)
            torch.testing.assert_close(
                grad_table.double(), want_table.double(), rtol=eps, atol=8 * eps
            )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_embedding(layout, dtype, interleaved, device):
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for dim, rotary_dim in [(16, 16), (10, 6), (7, 2), (5, 0)]:
        x = layouts(device, dtype, dim=dim)[layout].requires_grad_()
        cos, sin = rotary_tables(40, rotary_dim, dtype=table_dtype, device=device)
        odd = torch.stack((cos, sin), -1)  # strided tables, as HF's complex ones give
        cases = [
            (cos[:5], sin[:5], None),
            (odd[3:8, :, 0], odd[3:8, :, 1], None),
            (cos, sin, ids(5, rows=40, device=device)),
        ]
        if x.dim() > 2:
            each = ids(2, 5, rows=40, device=device)
            cases += [
                (cos[each], sin[each], None),
                (cos[each[:1]], sin[each[:1]], None),
                (odd[..., 0], odd[..., 1], each.int()),
                (cos, sin, each[:1]),
            ]
        for c, s, position_ids in cases:
            got = rotary_embedding(x, c, s, interleaved, rotary_dim, position_ids)
            want = reference_rotary(x, c, s, interleaved, position_ids=position_ids)
            assert_rounded(got, want, dtype)
            g = randn(*x.shape, device=device, dtype=dtype)
            (grad_x,) = torch.autograd.grad(got, x, g)
            (want_x,) = torch.autograd.grad(want, x, g.double())
            assert_rounded(grad_x, want_x.double(), dtype)


def test_rotary_scores_depend_on_the_distance_only(device):
    q, k = randn(1, 16, device=device), randn(1, 16, device=device)
    cos, sin = rotary_tables(200, 16, dtype=torch.float64, device=device)
    for interleaved in (False, True):
        q_at = rotary_embedding(q.expand(200, 16), cos, sin, interleaved)
        k_at = rotary_embedding(k.expand(200, 16), cos, sin, interleaved)
        scores = q_at @ k_at.t()
        torch.testing.assert_close(scores[7:, 7:], scores[:-7, :-7])
        assert (scores[0, 1:] - scores[0, :-1]).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_keep_the_memory_order(layout, device):
    x = layouts(device, torch.float32)[layout]
    cos, sin = rotary_tables(5, 6, device=device)
    table = torch.zeros(5, 6, device=device)
    want = torch.empty_like(x).stride() if x.dim() <= 4 else torch.empty(x.shape).stride()
    for y in (
        add_sinusoidal_encoding(x),
        add_learned_encoding(x, table),
        rotary_embedding(x, cos, sin),
    ):
        assert y.stride() == want


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 5, 6), (2, 0, 5, 6), (2, 3, 5, 0)])
def test_empty(shape, device):
    x = randn(*shape, device=device, requires_grad=True)
    length, dim = shape[-2:]
    table = randn(9, dim, device=device, requires_grad=True)
    cos, sin = rotary_tables(length, dim, dtype=torch.float64, device=device)
    for y in (
        add_sinusoidal_encoding(x),
        add_learned_encoding(x, table),
        rotary_embedding(x, cos, sin),
    ):
        assert y.shape == x.shape
        y.sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))


def test_nan_and_inf_stay_in_their_pair(device):
    x = randn(1, 3, 8, device=device)
    x[0, 1, 2], x[0, 2, 5] = math.nan, math.inf
    cos, sin = rotary_tables(3, 8, dtype=torch.float64, device=device)
    halves = ~rotary_embedding(x, cos, sin).isfinite()
    assert halves.nonzero().tolist() == [[0, 1, 2], [0, 1, 6], [0, 2, 1], [0, 2, 5]]
    pairs = ~rotary_embedding(x, cos, sin, interleaved=True).isfinite()
    assert pairs.nonzero().tolist() == [[0, 1, 2], [0, 1, 3], [0, 2, 4], [0, 2, 5]]


def test_table_gradient_does_not_depend_on_threads():
    x = randn(8, 4, 64, 300, dtype=torch.float32)
    table = randn(50, 300, dtype=torch.float32, requires_grad=True)
    positions = ids(8, 64, rows=50)
    positions[:, 32:] = 0  # padding: one row of the table gets half of the sum
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        y = add_learned_encoding(x, table, positions=positions)
        results.append(torch.autograd.grad(y, table, x)[0])
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- Gradients ----------------------------------------------------------------------------------


def gradient_cases(device):
    """name -> (function, its float64 arguments)."""

    def x(*shape):
        return randn(*shape, device=device, requires_grad=True)

    cos, sin = rotary_tables(9, 4, dtype=torch.float64, device=device)
    shared, each = ids(5, rows=9, device=device), ids(2, 5, rows=9, device=device)
    table = x(9, 6)
    learned, rotary, sinusoid = add_learned_encoding, rotary_embedding, add_sinusoidal_encoding
    cases = {
        "sinusoid": (lambda x: sinusoid(x, 0.5, offset=3), (x(2, 3, 5, 6),)),
        "sinusoid ids": (lambda x: sinusoid(x, positions=each), (x(2, 5, 7),)),
        "learned": (lambda x, t: learned(x, t, 2), (x(2, 3, 5, 6), table)),
        "learned 2d": (learned, (x(5, 6), table)),
        "learned shared ids": (lambda x, t: learned(x, t, 0, shared), (x(2, 5, 6), table)),
        "learned ids": (lambda x, t: learned(x, t, 0, each), (x(2, 3, 5, 6), table)),
        "learned one for all": (lambda x, t: learned(x, t, 0, each[:1]), (x(2, 3, 5, 6), table)),
        "learned 5d": (lambda x, t: learned(x, t, 0, each), (x(2, 2, 1, 5, 6), table)),
    }
    for interleaved in (False, True):
        how = "pairs" if interleaved else "halves"
        cases |= {
            f"rotary {how}": (
                lambda x, i=interleaved: rotary(x, cos[:5], sin[:5], i),
                (x(2, 3, 5, 6),),
            ),
            f"rotary {how} ids": (
                lambda x, i=interleaved: rotary(x, cos, sin, i, None, each),
                (x(2, 5, 3, 4).transpose(1, 2),),
            ),
            f"rotary {how} tables": (
                lambda x, c, s, i=interleaved: rotary(x, c, s, i),
                (x(2, 3, 5, 6), x(5, 2), x(5, 2)),
            ),
            f"rotary {how} tables each": (
                lambda x, c, s, i=interleaved: rotary(x, c, s, i),
                (x(2, 3, 5, 4), x(2, 5, 2), x(2, 5, 2)),
            ),
            f"rotary {how} tables ids": (
                lambda x, c, s, i=interleaved: rotary(x, c, s, i, None, each),
                (x(2, 5, 4), x(9, 2), x(9, 2)),
            ),
        }
    return cases


GRADIENT_CASES = list(gradient_cases("cpu"))


@pytest.mark.way("double backward", operators=ways.ENCODINGS)
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients(case, device):
    f, inputs = gradient_cases(device)[case]
    assert gradcheck(f, inputs, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_batched_grad=True)


@pytest.mark.way("forward AD", operators=ways.ENCODINGS)
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_forward_mode(case, device):
    f, inputs = gradient_cases(device)[case]
    assert gradcheck(f, inputs, check_forward_ad=True, check_backward_ad=False)
    with forward_ad.dual_level():  # over the backward
        x = inputs[0].detach().requires_grad_()
        y = f(x, *inputs[1:])
        g = forward_ad.make_dual(torch.ones_like(y), randn(*y.shape, device=device))
        (grad,) = torch.autograd.grad(y, x, g)
        assert forward_ad.unpack_dual(grad).tangent is not None


def test_backward_operator_of_the_table_has_its_own_derivative(device):
    each, shared = ids(2, 5, rows=9, device=device), ids(5, rows=9, device=device)
    for positions, offset in [(None, 3), (each, 0), (shared, 1), (each[:1], 0)]:
        g = randn(2, 3, 5, 6, device=device, requires_grad=True)

        def f(g, positions=positions, offset=offset):
            return OPS._add_learned_encoding_backward(g, positions, offset, 10, torch.float64)

        assert gradcheck(f, (g,), check_forward_ad=True)
        assert gradgradcheck(f, (g,))


def test_only_the_table_needs_a_gradient(device):
    x = randn(2, 5, 6, device=device)
    table = randn(9, 6, device=device, requires_grad=True)
    add_learned_encoding(x, table).sum().backward()
    assert torch.equal(table.grad[:5], torch.full_like(table[:5], 2))
    assert torch.equal(table.grad[5:], torch.zeros_like(table[5:]))


# ---- Ways in ------------------------------------------------------------------------------------


def operator_calls(device):
    """Calls of every operator, public and inner, with and without gradients, of odd strides."""

    def x(*shape, grad=True):
        return randn(*shape, device=device, requires_grad=grad)

    cos, sin = rotary_tables(9, 4, dtype=torch.float64, device=device)
    shared, each = ids(5, rows=9, device=device), ids(2, 5, rows=9, device=device)
    like = torch.empty(0, device=device)
    inside = x(2, 5, 3, 6).transpose(1, 2).detach().requires_grad_()
    return [
        (OPS.sinusoidal_encoding.default, (5, 7), {"dtype": torch.float16, "device": device}),
        (OPS._sinusoidal_encoding_forward.default, (like, 5, 7, 100.0, 3), {}),
        (OPS.rotary_tables.default, (5, 6), {"device": device}),
        (OPS._rotary_tables_forward.default, (like, 5, 6, 100.0, 3, 2.0), {}),
        (OPS.add_sinusoidal_encoding.default, (inside, 0.5), {}),
        (OPS.add_sinusoidal_encoding.default, (x(5, 7), 1.0, 10000.0, 0, shared), {}),
        (OPS._add_sinusoidal_encoding_forward.default, (x(2, 5, 6), each, 0.5, 100.0, 1), {}),
        (OPS._add_sinusoidal_encoding_forward.default, (x(2, 0, 6), None, 0.5, 100.0, 1), {}),
        (OPS.add_learned_encoding.default, (inside, x(9, 6), 2), {}),
        (OPS.add_learned_encoding.default, (x(2, 5, 6, grad=False), x(9, 6), 0, each), {}),
        (OPS._add_learned_encoding_forward.default, (x(5, 6), x(6, 9).t().detach(), shared, 0), {}),
        (OPS._add_learned_encoding_forward.default, (x(2, 1, 2, 5, 6), x(9, 6), each, 0), {}),
        (OPS._add_learned_encoding_backward.default, (inside, None, 2, 9, torch.float64), {}),
        (OPS._add_learned_encoding_backward.default, (inside, each, 0, 9, torch.float64), {}),
        (OPS.rotary_embedding.default, (inside, cos[:5], sin[:5], True, 4), {}),
        (OPS.rotary_embedding.default, (inside, cos, sin), {"position_ids": each}),
        (OPS._rotary_embedding_forward.default, (inside, cos[:5], sin[:5], None, False, True), {}),
        (OPS._rotary_embedding_forward.default, (x(5, 4), cos, sin, shared, True, False), {}),
        (
            OPS._rotary_embedding_forward.default,
            (x(2, 2, 1, 5, 4), x(2, 5, 2), x(2, 5, 2), None, True, False),
            {},
        ),
    ]


# torch's own, when it makes a fake tensor of an input that needs a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("index", range(len(operator_calls("cpu"))))
def test_opcheck(index, device):
    op, args, kwargs = operator_calls(device)[index]
    torch.library.opcheck(op, args, kwargs)


def everything(
    x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    length = x.size(-2)
    dim = x.size(-1)
    y = add_sinusoidal_encoding(x, 0.5, positions=positions)
    y = add_learned_encoding(y, table, positions=positions) + add_learned_encoding(x, table, 1)
    cos, sin = rotary_tables(length + 20, dim // 2 * 2, dtype=x.dtype, device=x.device)
    y = rotary_embedding(y, cos, sin, interleaved, dim // 2 * 2, positions)
    y = y + sinusoidal_encoding(length, dim, 100.0, 3, x.dtype, x.device)
    cos, sin = rotary_tables(length, 2, offset=5, dtype=x.dtype, device=x.device)
    return rotary_embedding(y, cos, sin, not interleaved)


def reference_everything(x, table, positions, interleaved):
    length, dim = x.shape[-2:]
    y = reference_add_sinusoidal(x, 0.5, positions=positions)
    y = reference_add_learned(y, table, positions=positions) + reference_add_learned(x, table, 1)
    a = angles(torch.arange(length + 20, device=x.device), dim // 2 * 2)
    y = reference_rotary(y, a.cos(), a.sin(), interleaved, position_ids=positions)
    y = y + reference_sinusoid(torch.arange(3, 3 + length, device=x.device), dim, 100.0)
    a = angles(torch.arange(5, 5 + length, device=x.device), 2)
    return reference_rotary(y, a.cos(), a.sin(), not interleaved)


def everything_inputs(length, dim=6, heads=3, batch=2, device="cpu"):
    return (
        randn(batch, length, heads, dim, device=device).transpose(1, 2).requires_grad_(),
        randn(30, dim, device=device, requires_grad=True),
        ids(batch, length, rows=length + 10, device=device),
        True,
    )


def assert_same(f, inputs):
    got, want = f(*inputs), reference_everything(*inputs)
    torch.testing.assert_close(got, want)
    g = randn(*got.shape, device=got.device)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs[:2], g), torch.autograd.grad(want, inputs[:2], g)
    )


@pytest.mark.way("Python", operators=ways.POSITIONAL)
def test_eager(device):
    assert_same(everything, everything_inputs(5, device=device))


@pytest.mark.way("script", operators=ways.POSITIONAL)
def test_torchscript(device):
    scripted = torch.jit.script(everything)
    inputs = everything_inputs(5, device=device)
    assert gradcheck(scripted, inputs)
    assert gradgradcheck(scripted, inputs)
    loaded = saved_and_loaded(scripted)
    for length in (5, 1, 8):
        assert_same(loaded, everything_inputs(length, device=device))


@pytest.mark.way("script", operators=ways.ENCODINGS)
def test_traced_and_frozen(device):
    """Traced with one length, an encoding serves others, forward and backward."""

    class Encodings(torch.nn.Module):
        def forward(self, x, table, positions, cos, sin):
            y = add_sinusoidal_encoding(x, 0.5, positions=positions)
            y = add_learned_encoding(y, table, positions=positions)
            return rotary_embedding(y, cos, sin, False, 4, positions)

    def inputs(length):
        x, table, positions, _ = everything_inputs(length, device=device)
        tables = rotary_tables(length + 20, 4, dtype=x.dtype, device=device)
        return x, table, positions, *tables

    module = Encodings().eval()
    traced = torch.jit.trace(module, inputs(5))
    for made in (traced, saved_and_loaded(traced), torch.jit.freeze(traced)):
        for length in (5, 1, 8):
            given = inputs(length)
            got, want = made(*given), module(*given)
            g = randn(*want.shape, device=device)
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            torch.testing.assert_close(
                torch.autograd.grad(got, given[:2], g), torch.autograd.grad(want, given[:2], g)
            )


@pytest.mark.way("compile", operators=ways.POSITIONAL)
def test_compile_does_not_recompile_for_another_length(device):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    try:
        for length, dim, heads, batch in [(5, 6, 3, 2), (9, 8, 4, 3), (17, 10, 2, 5)]:
            assert_same(compiled, everything_inputs(length, dim, heads, batch, device))
            torch._dynamo.config.error_on_recompile = True
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.way("export", operators=ways.POSITIONAL)
def test_export_with_a_dynamic_length(device):
    class Model(torch.nn.Module):
        def forward(self, x, table, positions, interleaved):
            return everything(x, table, positions, interleaved)

    length = torch.export.Dim("length", min=2, max=20)
    program = torch.export.export(
        Model(),
        everything_inputs(5, device=device),
        dynamic_shapes=({2: length}, None, {1: length}, None),
    )
    public = {getattr(OPS, name).default for name in (
        "add_sinusoidal_encoding", "add_learned_encoding", "rotary_embedding",
        "rotary_tables", "sinusoidal_encoding",
    )}  # fmt: skip
    assert public <= {node.target for node in program.graph.nodes}
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for length in (5, 2, 11):
        assert_same(loaded, everything_inputs(length, device=device))
    inner = {node.target for node in program.run_decompositions().graph.nodes}
    assert OPS._rotary_embedding_forward.default in inner
    assert OPS._sinusoidal_encoding_forward.default in inner


@pytest.mark.way("autocast", operators=ways.POSITIONAL)
def test_autocast_keeps_dtypes(device):
    table = randn(9, 6, device=device, dtype=torch.float32, requires_grad=True)
    cos, sin = rotary_tables(5, 6, device=device)
    weight = randn(6, 6, device=device, dtype=torch.float32)
    x = randn(2, 5, 6, device=device, dtype=torch.float32, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert sinusoidal_encoding(5, 6, device=device).dtype == torch.float32
        assert rotary_tables(5, 6, device=device)[0].dtype == torch.float32
        for h, dtype in [(x, torch.float32), (x @ weight, torch.bfloat16)]:
            y = add_learned_encoding(h, table)
            z = add_sinusoidal_encoding(y)
            rotated = rotary_embedding(z, cos, sin)
            assert h.dtype == y.dtype == z.dtype == rotated.dtype == dtype
            rotated.sum().backward()
    assert table.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


VMAP_CASES = {
    # name: (function of the vmapped arguments, their shapes without the vmapped dimension)
    "sinusoid": (lambda x: add_sinusoidal_encoding(x, 0.5, offset=2), "x"),
    "sinusoid ids": (lambda x, p: add_sinusoidal_encoding(x, positions=p), "xp"),
    "sinusoid ids each": (lambda x, p: add_sinusoidal_encoding(x, positions=p), "xq"),
    "learned": (lambda x, t: add_learned_encoding(x, t, 2), "xt"),
    "learned ids": (lambda x, t, p: add_learned_encoding(x, t, 1, p), "xtp"),
    "learned ids each": (lambda x, t, p: add_learned_encoding(x, t, 1, p), "xtq"),
    "rotary": (lambda x, c, s: rotary_embedding(x, c[:5], s[:5]), "xcc"),
    "rotary each": (lambda x, c, s: rotary_embedding(x, c, s, True), "xCC"),
    "rotary ids": (lambda x, c, s, p: rotary_embedding(x, c, s, position_ids=p), "xccp"),
    "rotary ids each": (lambda x, c, s, p: rotary_embedding(x, c, s, position_ids=p), "xccq"),
}


class CountOperators(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace == "torch_selfattn"
        return func(*args, **(kwargs or {}))


@pytest.mark.way("vmap", operators=ways.ENCODINGS)
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("case", VMAP_CASES)
def test_vmap(case, rank, device):
    f, kinds = VMAP_CASES[case]
    if rank == 2 and ("q" in kinds or "C" in kinds):
        pytest.skip("no batch")
    shapes = {"x": (2, 3, 5, 6)[4 - rank :], "t": (9, 6), "c": (9, 2), "C": (shape_b := 2, 5, 2)}
    if rank == 3:
        shapes["x"] = (2, 5, 6)

    def value(kind, batched, seed):
        lead = (4,) if batched else ()
        if kind == "p":
            return ids(*lead, 5, rows=8, device=device)
        if kind == "q":
            return ids(*lead, shape_b, 5, rows=8, device=device)
        return randn(*lead, *shapes[kind], device=device) + seed

    for batched in range(1, 2 ** len(kinds)):
        which = [bool(batched >> k & 1) for k in range(len(kinds))]
        args = [value(kind, b, k) for k, (kind, b) in enumerate(zip(kinds, which, strict=True))]
        want = torch.stack(
            [f(*(a[v] if b else a for a, b in zip(args, which, strict=True))) for v in range(4)]
        )
        moved = [a.movedim(0, -1) if b else a for a, b in zip(args, which, strict=True)]
        with CountOperators() as counter:  # one call, no loop over the samples
            front = torch.vmap(f, in_dims=tuple(0 if b else None for b in which))(*args)
            back = torch.vmap(f, in_dims=tuple(-1 if b else None for b in which))(*moved)
        assert counter.calls == 2
        torch.testing.assert_close(front, want)
        torch.testing.assert_close(back, want)


def test_vmap_over_the_backward_operator(device):
    g = randn(4, 2, 5, 6, device=device)
    each, shared = ids(4, 2, 5, rows=9, device=device), ids(5, rows=9, device=device)

    def f(g, p):
        return OPS._add_learned_encoding_backward(g, p, 1, 10, torch.float64)

    for p, dim in [(None, None), (shared, None), (each[:, 0], 0), (each, 0), (each[0], None)]:
        want = torch.stack([f(g[v], p if dim is None else p[v]) for v in range(4)])
        with CountOperators() as counter:
            torch.testing.assert_close(torch.vmap(f, in_dims=(0, dim))(g, p), want)
        assert counter.calls == 1


def test_nested_vmap_of_tables(device):
    y = torch.vmap(lambda x: x + sinusoidal_encoding(5, 6, device=device))(
        torch.zeros(3, 5, 6, device=device)
    )
    torch.testing.assert_close(y[1], sinusoidal_encoding(5, 6, device=device))


@pytest.mark.way("torch.func", operators=ways.POSITIONAL)
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "vmap_grad"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_torch_func(transform, interleaved, device):
    x, table, positions, _ = everything_inputs(3, device=device, heads=1, batch=1)
    inputs = (x.detach(), table.detach())

    def apply(f):
        def total(x, table):
            return f(x, table, positions, interleaved).pow(3).sum()

        if transform == "vmap_grad":
            xs = torch.stack([inputs[0], 2 * inputs[0]])
            return torch.func.vmap(torch.func.grad(total, (0, 1)), (0, None))(xs, inputs[1])
        return getattr(torch.func, transform)(total, (0, 1))(*inputs)

    torch.testing.assert_close(apply(everything), apply(reference_everything))


@pytest.mark.way("torch.func", operators=ways.POSITIONAL)
@pytest.mark.parametrize("name", ["vjp", "jvp", "jacobian", "hessian", "hvp", "vhp"])
def test_autograd_functional(name, device):
    x, table, positions, _ = everything_inputs(3, device=device, heads=1, batch=1)
    inputs = (x.detach(), table.detach())

    def apply(f):
        def total(x, table):
            return f(x, table, positions, False).pow(3).sum()

        further = (tuple(x.cos() for x in inputs),) if name in ("jvp", "hvp", "vhp") else ()
        return getattr(torch.autograd.functional, name)(total, inputs, *further)

    torch.testing.assert_close(apply(everything), apply(reference_everything))


def test_checkpoint(device):
    """Computed again in the backward pass, the gradients have the same bits."""
    x, table, positions, _ = everything_inputs(5, device=device)
    got, want = (
        torch.autograd.grad(result.pow(2).sum(), (x, table))
        for result in (
            checkpoint(everything, x, table, positions, True, use_reentrant=False),
            everything(x, table, positions, True),
        )
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_flops(device):
    x = randn(2, 3, 5, 6, device=device)
    cos, sin = rotary_tables(5, 4, dtype=torch.float64, device=device)
    with FlopCounterMode(display=False) as counter:
        add_sinusoidal_encoding(x)
    assert counter.get_total_flops() == 180
    with FlopCounterMode(display=False) as counter:
        rotary_embedding(x, cos, sin)
    assert counter.get_total_flops() == 2 * 3 * 5 * 2 * 6


# ---- Errors -------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 5, 8)
LONG = torch.zeros(2, 5, dtype=torch.int64)
T = torch.zeros(9, 8)
C = torch.zeros(5, 4)
ERRORS = [
    (sinusoidal_encoding, (-1, 4), ValueError,
     "length must not be negative (got -1)"),
    (sinusoidal_encoding, (3, -4), ValueError,
     "dim must not be negative (got -4)"),
    (sinusoidal_encoding, (3, 4, 0.0), ValueError,
     "base must be positive (got 0)"),
    (sinusoidal_encoding, (3, 4, 1e4, 0, torch.int64), NotImplementedError,
     "dtype must be float64, float32, float16 or bfloat16 (got"),
    (rotary_tables, (3, 5), ValueError,
     "dim must be even (got 5)"),
    (rotary_tables, (3, 4, 1e4, 0, -1.0), ValueError,
     "scaling must be positive (got -1)"),
    (rotary_tables, (3, 4, 1e4, 0, 1.0, torch.float16), NotImplementedError,
     "dtype must be float32 or float64"),
    (add_sinusoidal_encoding, (X[0, 0, 0],), RuntimeError,
     "x must be (..., L, D), at least 2-D (got x=[8])"),
    (add_sinusoidal_encoding, (X.long(),), NotImplementedError,
     "x must be float64, float32, float16 or bfloat16 (got x.dtype="),
    (add_sinusoidal_encoding, (X, 1.0, math.nan), ValueError,
     "base must be positive (got nan)"),
    (add_sinusoidal_encoding, (X, 1.0, 1e4, 0, LONG.float()), RuntimeError,
     "positions must be int64 or int32 (got positions.dtype=float)"),
    (add_sinusoidal_encoding, (X, 1.0, 1e4, 0, LONG[:, 1:]), RuntimeError,
     "positions must have one id for each row of x (got x=[2, 3, 5, 8], positions=[2, 4])"),
    (add_sinusoidal_encoding, (X, 1.0, 1e4, 0, LONG.repeat(2, 1)), RuntimeError,
     "positions must have the batch size of x or 1 (got x=[2, 3, 5, 8], positions=[4, 5])"),
    (add_sinusoidal_encoding, (X[0, 0], 1.0, 1e4, 0, LONG), RuntimeError,
     "positions must be (L), or (B, L) for an x of (B, ..., L, D) (got x=[5, 8], positions=[2,"
     " 5])"),
    (add_learned_encoding, (X, T[0]), RuntimeError,
     "table must be (N, D) (got table=[8])"),
    (add_learned_encoding, (X, T[:, :7]), RuntimeError,
     "table must have as many columns as x (got x=[2, 3, 5, 8], table=[9, 7])"),
    (add_learned_encoding, (X, T.half()), RuntimeError,
     "table must have the dtype of x, or float32 for an x of lower precision (got x=float, "
     "table=c10::Half)"),
    (add_learned_encoding, (X, T, -1), ValueError,
     "offset must not be negative (got -1)"),
    (add_learned_encoding, (X, T, 5), ValueError,
     "offset + the length of x must not exceed the rows of the table (got x=[2, 3, 5, 8], "
     "offset=5, rows=9)"),
    (rotary_embedding, (X, C.half(), C.half()), RuntimeError,
     "cos and sin must be float32 for this x"),
    (rotary_embedding, (X.double(), C, C), RuntimeError,
     "cos and sin must be float64 for this x"),
    (rotary_embedding, (X, C, C[None]), RuntimeError,
     "cos and sin must both be (L, R/2), or (B, L, R/2) for an x of (B, ..., L, D) (got"),
    (rotary_embedding, (X, C, C[:, 1:]), RuntimeError,
     "cos and sin must have the same shape (got cos=[5, 4], sin=[5, 3])"),
    (rotary_embedding, (X[..., 1:], C, C), RuntimeError,
     "twice the last dimension of cos must not exceed the last of x (got x=[2, 3, 5, 7], "
     "cos=[5, 4])"),
    (rotary_embedding, (X, C[1:], C[1:]), RuntimeError,
     "cos and sin must have one row for each row of x, or come with position_ids (got"),
    (rotary_embedding, (X, C.repeat(3, 1, 1), C.repeat(3, 1, 1)), RuntimeError,
     "cos and sin must have the batch size of x or 1 (got x=[2, 3, 5, 8], cos=[3, 5, 4])"),
    (rotary_embedding, (X, C, C, False, 4), RuntimeError,
     "rotary_dim must be twice the last dimension of cos (got rotary_dim=4, cos=[5, 4])"),
    (rotary_embedding, (X, C[None], C[None], False, None, LONG), RuntimeError,
     "with position_ids, cos and sin must be tables (N, R/2) (got cos=[1, 5, 4])"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(ERRORS)))
def test_errors_name_the_rule_and_the_values(index):
    f, args, error, message = ERRORS[index]
    makes_tensor = f in (sinusoidal_encoding, rotary_tables)
    for target in ("cpu", "meta"):
        moved = [a.to(target) if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(error) as raised:
            f(*moved, **({"device": torch.device(target)} if makes_tensor else {}))
        assert str(raised.value).startswith(f"{f.__name__}: {message}")
    with pytest.raises(Exception) as raised:  # TorchScript wraps it
        torch.jit.script(f)(*args)
    assert f"{f.__name__}: {message}" in str(raised.value)


def test_positions_outside_the_table():
    """Only a device that may be waited for knows them."""
    for bad, shown in [(9, 9), (-1, -1)]:
        positions = LONG.clone()
        positions[1, 3] = bad
        message = rf"position {shown} where the table has 9 rows"
        with pytest.raises(ValueError, match=f"add_learned_encoding: positions .*{message}"):
            add_learned_encoding(X, T, positions=positions)
        with pytest.raises(ValueError, match=f"rotary_embedding: position_ids .*{message}"):
            rotary_embedding(X, T[:, :4], T[:, :4], position_ids=positions)
    with pytest.raises(ValueError, match="position 12 where the table has 9 rows"):
        add_learned_encoding(X, T, 12, LONG)
