"""Positional encodings as functions: sinusoidal, learned, rotary; the slopes of ALiBi.

``x`` is ``(..., L, D)``, at least 2-D, with any strides, float64, float32, float16 or bfloat16; the
result has its shape, dtype and memory order. Sums, angles and tables are float32 or better whatever
the dtype of ``x``, under autocast too. Position ids are int64 or int32, ``(L,)`` or ``(B, L)`` with
``B = x.size(0)``; ``offset`` is added to them, or is the position of the first row where there are
none. All functions run under ``torch.jit.script``, ``torch.compile`` and ``torch.export``.

Shapes, dtypes and devices that don't fit together raise ``RuntimeError``, numbers out of range
``ValueError``, unsupported dtypes ``NotImplementedError``.
"""

import torch
from torch import Tensor

__all__ = [
    "add_learned_encoding",
    "add_sinusoidal_encoding",
    "alibi_slopes",
    "rotary_embedding",
    "rotary_tables",
    "sinusoidal_encoding",
]


def _device(device: torch.device | None) -> torch.device | None:
    # The C++ operator does not know of `with torch.device(...)` and torch.set_default_device.
    if device is None and not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return torch.empty(0).device  # Dynamo does not trace get_default_device
    return device


def sinusoidal_encoding(
    length: int,
    dim: int,
    base: float = 10000.0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    r"""Table of sinusoidal positional encodings (Vaswani et al., 2017), ``(length, dim)``.

    Row :math:`p - \text{offset}` is that of position :math:`p`:

    .. math::
        E_{p,2i} = \sin(p / \text{base}^{2i/\text{dim}}), \quad
        E_{p,2i+1} = \cos(p / \text{base}^{2i/\text{dim}})

    ``dim`` may be odd: the last column is then a sine. Angles are computed in float64, or reduced
    to a part of a turn in float64, so that positions up to 10\ :sup:`6` and beyond keep the
    accuracy of ``dtype`` (default: torch's default dtype).
    """
    return torch.ops.torch_selfattn.sinusoidal_encoding(
        length, dim, base, offset, dtype, _device(device)
    )


def add_sinusoidal_encoding(
    x: Tensor,
    scale: float = 1.0,
    base: float = 10000.0,
    offset: int = 0,
    positions: Tensor | None = None,
) -> Tensor:
    """``x + scale * encoding``, the encoding of :func:`sinusoidal_encoding` made on the way.

    No table lies in memory and there is no longest length. Differentiable in ``x``.
    """
    return torch.ops.torch_selfattn.add_sinusoidal_encoding(x, scale, base, offset, positions)


def add_learned_encoding(
    x: Tensor, table: Tensor, offset: int = 0, positions: Tensor | None = None
) -> Tensor:
    """``x + table[position]`` with a learned ``table`` ``(N, D)``.

    ``table`` has the dtype of ``x``, or is float32 with an ``x`` of lower precision. Differentiable
    in both; the gradient of the table sums over the batch and over equal positions in a fixed
    order, so it is the same on every run. A position outside ``[0, N)`` raises ``ValueError``; on
    CUDA, where reading position ids would wait for the device, it is a device-side assertion.
    """
    return torch.ops.torch_selfattn.add_learned_encoding(x, table, offset, positions)


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    r"""Rotary position embedding (Su et al., 2021) of ``x`` ``(..., L, D)``.

    Turns each pair of the first ``R`` elements of a row by the angle of its position and leaves the
    other ``D - R`` as they are:

    .. math:: (a, b) \to (a \cos\theta - b \sin\theta,\; b \cos\theta + a \sin\theta)

    Args:
        x: for example queries or keys, ``(B, H, L, D)``, also as a view of ``(B, L, H, D)``.
        cos, sin: ``(L, R/2)`` or ``(B, L, R/2)``; or, with ``position_ids``, tables ``(N, R/2)``.
            float32, float64 for a float64 ``x``: see :func:`rotary_tables`.
        interleaved: pairs are ``(2i, 2i + 1)`` as in the paper; otherwise ``(i, i + R/2)`` as in
            GPT-NeoX and LLaMA.
        rotary_dim: ``R``, to have it checked against ``cos``.
        position_ids: ``(L,)`` or ``(B, L)``, rows of the tables. Out of range: ``ValueError``, on
            CUDA a device-side assertion.

    Differentiable in ``x`` (the rotation by minus the angle), ``cos`` and ``sin``.
    """
    return torch.ops.torch_selfattn.rotary_embedding(
        x, cos, sin, interleaved, rotary_dim, position_ids
    )


def rotary_tables(
    length: int,
    dim: int,
    base: float = 10000.0,
    offset: int = 0,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``(cos, sin)``, each ``(length, dim / 2)``, for :func:`rotary_embedding`.

    Row :math:`p - \text{offset}`, column :math:`i`: the angle
    :math:`p / (\text{scaling} \cdot \text{base}^{2i/\text{dim}})`, computed in float64.
    ``scaling`` > 1 is linear position interpolation (Chen et al., 2023): it fits ``scaling`` times
    as many positions into the range of angles that a model was trained on. ``dim`` is ``R``, even;
    ``dtype`` is float32 or float64.
    """
    return torch.ops.torch_selfattn.rotary_tables(
        length, dim, base, offset, scaling, dtype, _device(device)
    )


def alibi_slopes(
    num_heads: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    r"""The slopes of ALiBi, ``(num_heads,)``, for the argument ``alibi_slopes`` of the attention
    functions.

    For :math:`H` heads, a power of two, head :math:`h = 1 \dots H` has :math:`2^{-8h/H}`. Otherwise
    the first :math:`n` heads have the slopes of :math:`n` heads, with the largest power of two
    :math:`n < H`, and the others have the 1st, 3rd, 5th, ... slope of :math:`2n` heads, as in the
    paper's code. ``dtype`` is float32, or that of the queries.

    Source: Press, Smith and Lewis, "Train short, test long: attention with linear biases enables
    input length extrapolation", ICLR 2022.
    """
    if num_heads <= 0:
        raise ValueError(f"alibi_slopes: num_heads must be positive (got num_heads={num_heads})")
    n = 1
    while 2 * n <= num_heads:
        n = 2 * n
    head = torch.arange(num_heads, dtype=torch.float64, device=device)
    # In steps of -8 / n: 1, 2, ..., n, then 1/2, 3/2, ...
    exponent = torch.where(head < n, head + 1.0, head - n + 0.5)
    return torch.exp2(exponent * (-8.0 / n)).to(dtype)
