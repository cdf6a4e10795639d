"""Positional encodings."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..positional import (
    add_learned_encoding,
    add_sinusoidal_encoding,
    alibi_slopes,
    rotary_embedding,
    rotary_tables,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LearnedPositionalEncoding", "RotaryEmbedding", "SinusoidalPositionalEncoding"]


class SinusoidalPositionalEncoding(nn.Module):
    r"""Adds ``scale`` times sines and cosines of the position, then drops out.

    .. math::
        \mathrm{enc}(p, 2i) = \sin(p / base^{2i/D}), \quad
        \mathrm{enc}(p, 2i+1) = \cos(p / base^{2i/D})

    The angles are computed in float32 or better whatever the dtype of the input; there is no table,
    hence no longest length. No parameters, no buffers.

    Args:
        scale: factor of the encoding.
        base: the longest wavelength is ``2 pi * base``.
        dropout: probability of dropping an element of the sum in training.

    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.5.
    """

    def __init__(self, scale: float = 1.0, base: float = 10000.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = float(scale)
        self.base = float(base)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """x (..., L, D) -> the same shape and dtype.

        Row l stands at position ``offset + l``, or, with integer ``positions`` (L) or (B, L), at
        ``offset + positions[b, l]``: for decoding step by step, give the cached length(s).
        """
        return self.dropout(add_sinusoidal_encoding(x, self.scale, self.base, offset, positions))

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, base={self.base:g}"


class LearnedPositionalEncoding(nn.Module):
    """Adds row ``position`` of a trained table, then drops out.

    State-dict keys: ``weight`` (max_length, embed_dim).

    Args:
        max_length: number of positions; a position beyond it is an error.
        embed_dim: size of the last dimension of the input.
        dropout: probability of dropping an element of the sum in training.

    Source: Gehring et al., "Convolutional sequence to sequence learning", ICML 2017.
    """

    def __init__(
        self,
        max_length: int,
        embed_dim: int,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.embed_dim = embed_dim
        self.weight = nn.Parameter(torch.empty(max_length, embed_dim, device=device, dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, as BERT and GPT-2 start."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """x (..., L, embed_dim) -> the same shape and dtype; positions as in
        :meth:`SinusoidalPositionalEncoding.forward`."""
        return self.dropout(add_learned_encoding(x, self.weight, offset, positions))

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}, embed_dim={self.embed_dim}"


class RotaryEmbedding(nn.Module):
    """Rotates pairs of elements of queries and keys by angles proportional to their position.

    Pair i of a row at position p is turned by ``p / (scaling * base^(2i / dim))``, so that the dot
    product of a query and a key depends on the distance of their positions only.

    Cosines and sines stay float32 when the module is cast to half precision. They are kept for the
    first ``max_length`` positions; beyond, and for float64 inputs to a module that is not float64,
    they are computed in the call. Given ``positions`` must lie below ``max_length``. No parameters
    and nothing in the state dict.

    Args:
        dim: how many elements of each row are rotated (even); the rest is left alone. Give the head
            dim, or less for a partial rotation.
        max_length: length of the tables.
        base: the longest wavelength is ``2 pi * base``.
        interleaved: pairs are (x[2i], x[2i+1]); otherwise (x[i], x[i + dim/2]), as in GPT-NeoX and
            Llama checkpoints of the transformers library.
        scaling: divides the positions, to stretch a trained model to longer sequences (linear
            interpolation).

    Sources: Su et al., "RoFormer: Enhanced transformer with rotary position embedding", 2021;
    Chen et al., "Extending context window of large language models via positional interpolation",
    2023 (scaling).
    """

    def __init__(
        self,
        dim: int,
        max_length: int = 4096,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2 != 0:
            raise ValueError(f"RotaryEmbedding: dim must be even and positive (got dim={dim})")
        self.dim = dim
        self.max_length = max_length
        self.base = float(base)
        self.interleaved = interleaved
        self.scaling = float(scaling)
        for name in ("cos", "sin"):
            table = torch.empty(max_length, dim // 2, dtype=torch.float32, device=device)
            self.register_buffer(name, table, persistent=False)
        self.reset_parameters()

    cos: Tensor
    sin: Tensor

    def reset_parameters(self) -> None:
        """Fills the tables (again, after ``to_empty``)."""
        if self.cos.is_meta:
            return
        dtype = torch.float64 if self.cos.dtype == torch.float64 else torch.float32
        self.cos, self.sin = rotary_tables(
            self.max_length, self.dim, self.base, 0, self.scaling, dtype, self.cos.device
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        before = self.cos.dtype
        super()._apply(fn, recurse)
        if self.cos.dtype != before:  # back to float32, or as exact as float64 can be
            self.reset_parameters()
        return self

    def tables(self, offset: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (length, dim / 2) of the positions offset ... offset + length - 1, for
        inputs of this dtype."""
        end = offset + length
        table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # Another dtype is there after .half() of a scripted module, which has no _apply of ours.
        other = self.cos.dtype != table_dtype
        # A trace has one of the branches for all lengths: that of the table. (The comparison would
        # be a constant of it, and rotary_tables of a device cannot be traced.)
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if other or (not tracing and end > self.max_length):
            return rotary_tables(
                length, self.dim, self.base, offset, self.scaling, table_dtype, self.cos.device
            )
        return self.cos[offset:end], self.sin[offset:end]

    def forward(self, x: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """x (B, H, L, D) with D >= dim -> the same shape and dtype.

        Row l stands at position ``offset + l``, or, with integer ``positions`` (B, L), at
        ``positions[b, l]`` (then ``offset`` must be 0).
        """
        if positions is None:
            cos, sin = self.tables(offset, x.size(-2), x.dtype)
        else:
            cos, sin = self.tables(0, self.max_length, x.dtype)
        return rotary_embedding(x, cos, sin, self.interleaved, self.dim, positions)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, max_length={self.max_length}, base={self.base:g}, "
            f"interleaved={self.interleaved}, scaling={self.scaling:g}"
        )


class AlibiSlopes(nn.Module):
    """The slopes of :func:`torch_selfattn.alibi_slopes` where a module needs them: on its device,
    float32 when it is cast to half precision, with nothing in the state dict."""

    slopes: Tensor

    def __init__(self, num_heads: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        slopes = torch.empty(num_heads, dtype=torch.float32, device=device)
        self.register_buffer("slopes", slopes, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the slopes (again, after ``to_empty``)."""
        if self.slopes.is_meta:
            return
        dtype = torch.float64 if self.slopes.dtype == torch.float64 else torch.float32
        self.slopes = alibi_slopes(self.slopes.size(0), dtype, self.slopes.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        before = self.slopes.dtype
        super()._apply(fn, recurse)
        if self.slopes.dtype != before:  # back to float32, or as exact as float64 can be
            self.reset_parameters()
        return self

    def forward(self) -> Tensor:
        return self.slopes
