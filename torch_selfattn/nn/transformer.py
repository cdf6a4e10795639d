"""Transformer layers and stacks, with a key-value cache for decoding step by step."""

import copy
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._masks import merge_masks
from ._nested import encode_nested
from .multi_head_attention import MultiHeadAttention
from .positional import RotaryEmbedding

__all__ = [
    "KVCache",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

Activation: TypeAlias = str | Callable[[Tensor], Tensor]


class KVCache(NamedTuple):
    """What one decoder layer keeps between steps. ``C`` is the capacity.

    The first two are written in place at the positions after ``lengths``; what stands behind is
    never read. To reorder or drop samples (beam search), ``index_select`` all four along
    dimension 0, and ``lengths`` with them.
    """

    key: Tensor  # (B, Hk, C, E)
    value: Tensor  # (B, Hk, C, E)
    memory_key: Tensor  # (B, Hk of the cross attention, Lm, E)
    memory_value: Tensor  # (B, Hk of the cross attention, Lm, E)


def as_activation_module(activation: Activation) -> Callable[[Tensor], Tensor]:
    """As a module where there is one: a module can be scripted, and shows in the printed layer."""
    by_name: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
    if isinstance(activation, str):
        if activation not in by_name:
            raise ValueError(
                f"activation should be relu/gelu, not {activation}; also silu or a callable "
                f"(got {activation!r})"
            )
        return by_name[activation]()
    by_function: dict[Callable[[Tensor], Tensor], type[nn.Module]] = {
        F.relu: nn.ReLU,
        F.gelu: nn.GELU,
        F.silu: nn.SiLU,
    }
    return by_function[activation]() if activation in by_function else activation


def _reset_parameters(module: nn.Module) -> None:
    """Calls reset_parameters of every module below this one."""
    for child in module.modules():
        if child is not module and hasattr(child, "reset_parameters"):
            child.reset_parameters()  # type: ignore[operator]


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a two-layer feed-forward network, each with a residual and a norm.

    Arguments and state dict are those of ``torch.nn.TransformerEncoderLayer`` (see
    :class:`MultiHeadAttention` for what differs), and more after them.

    State-dict keys: ``self_attn.*`` (:class:`MultiHeadAttention`), ``linear1.weight``
    (dim_feedforward, d_model), ``linear2.weight`` (d_model, dim_feedforward), ``norm1.weight``,
    ``norm2.weight`` (d_model), each with a ``.bias`` if bias.

    Args:
        d_model: size of the input and output.
        nhead: number of query heads.
        dim_feedforward: size of the hidden layer.
        dropout: probability, for attention weights, hidden layer and both residual branches.
        activation: ``"relu"``, ``"gelu"``, ``"silu"`` or a callable (a module, to be scripted).
        layer_norm_eps: of both norms.
        batch_first: (B, L, D) instead of (L, B, D).
        norm_first: norm before each branch (pre-norm) instead of after the sum (post-norm).
        bias: whether linear layers and norms have one.
        score: ``"dot"`` or ``"additive"``.
        num_kv_heads: number of key and value heads, nhead by default.
        window: (left, right): how many positions before and after its own each one sees, -1 = all.
        rotary: rotates queries and keys by their position.
        alibi: lowers scores with the distance, as in :class:`MultiHeadAttention`.

    Sources: Vaswani et al., 2017; Xiong et al., "On layer normalization in the transformer
    architecture", ICML 2020 (pre-norm).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        score: str = "dot",
        num_kv_heads: int | None = None,
        window: tuple[int, int] = (-1, -1),
        rotary: RotaryEmbedding | None = None,
        alibi: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, device=device, dtype=dtype,
            score=score, num_kv_heads=num_kv_heads, window=window, rotary=rotary,
            alibi=alibi,
        )  # fmt: skip
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, device, dtype)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, True, bias, device, dtype)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, True, bias, device, dtype)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = as_activation_module(activation)

    def reset_parameters(self) -> None:
        """Starts all submodules anew, each as it starts itself."""
        _reset_parameters(self)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """src (L, B, D), or (B, L, D) with batch_first, or (L, D) -> the same shape.

        Masks and ``key_lengths`` (B) as in :meth:`MultiHeadAttention.forward` (True = ignore).
        With batch_first also a nested tensor (B, L*, D), without masks and lengths.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if src.is_nested:
                return encode_nested(
                    self, self.self_attn.batch_first, src, is_causal, src_mask=src_mask,
                    src_key_padding_mask=src_key_padding_mask, key_lengths=key_lengths,
                )  # fmt: skip
        x = self.norm1(src) if self.norm_first else src
        attended, _ = self.self_attn(
            x, x, x, src_key_padding_mask, False, src_mask, True, is_causal, key_lengths
        )
        x = src + self.dropout1(attended)
        if self.norm_first:
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self._feed_forward(x))


class TransformerDecoderLayer(nn.Module):
    """Self-attention, attention to a memory, and a feed-forward network.

    Arguments and state dict are those of ``torch.nn.TransformerDecoderLayer`` (see
    :class:`MultiHeadAttention` for what differs), and more after them. ``forward`` computes all
    positions at once; ``decode`` computes the next positions from a cache and gives the same
    numbers, to rounding, as ``forward`` with ``tgt_is_causal=True``.

    State-dict keys: ``self_attn.*``, ``multihead_attn.*`` (the attention to the memory, both
    :class:`MultiHeadAttention`), ``linear1.*``, ``linear2.*``, ``norm1.*``, ``norm2.*``,
    ``norm3.*``.

    Args:
        d_model ... dtype: as in :class:`TransformerEncoderLayer`.
        score, num_kv_heads, window, rotary, alibi: of the self-attention.
        cross_score: ``"dot"`` or ``"additive"``, score of the attention to the memory.
        cross_nhead: its number of heads, nhead by default.
        cross_num_kv_heads: its number of key and value heads, cross_nhead by default.
        memory_dim: size of the memory, d_model by default.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        score: str = "dot",
        num_kv_heads: int | None = None,
        window: tuple[int, int] = (-1, -1),
        rotary: RotaryEmbedding | None = None,
        cross_score: str = "dot",
        cross_nhead: int | None = None,
        cross_num_kv_heads: int | None = None,
        memory_dim: int | None = None,
        alibi: bool = False,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.self_attn = MultiHeadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, device=device, dtype=dtype,
            score=score, num_kv_heads=num_kv_heads, window=window, rotary=rotary,
            alibi=alibi,
        )  # fmt: skip
        self.multihead_attn = MultiHeadAttention(
            d_model, nhead if cross_nhead is None else cross_nhead, dropout, bias,
            kdim=memory_dim, vdim=memory_dim, batch_first=batch_first, device=device, dtype=dtype,
            score=cross_score, num_kv_heads=cross_num_kv_heads,
        )  # fmt: skip
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, device, dtype)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, True, bias, device, dtype)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, True, bias, device, dtype)
        self.norm3 = nn.LayerNorm(d_model, layer_norm_eps, True, bias, device, dtype)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = as_activation_module(activation)

    def reset_parameters(self) -> None:
        """Starts all submodules anew, each as it starts itself."""
        _reset_parameters(self)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    def _forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        need_weights: bool,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_key_padding_mask: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        tgt_is_causal: bool,
        memory_is_causal: bool,
        tgt_lengths: Tensor | None,
        memory_lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        x = self.norm1(tgt) if self.norm_first else tgt
        attended, _ = self.self_attn(
            x, x, x, tgt_key_padding_mask, False, tgt_mask, True, tgt_is_causal, tgt_lengths
        )
        tgt = tgt + self.dropout1(attended)
        if not self.norm_first:
            tgt = self.norm1(tgt)
        attended, weights = self.multihead_attn(
            self.norm2(tgt) if self.norm_first else tgt, memory, memory, memory_key_padding_mask,
            need_weights, memory_mask, False, memory_is_causal, memory_lengths,
        )  # fmt: skip
        return self._finish(tgt, attended), weights

    def _finish(self, tgt: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention to the memory."""
        tgt = tgt + self.dropout2(attended)
        if self.norm_first:
            return tgt + self._feed_forward(self.norm3(tgt))
        tgt = self.norm2(tgt)
        return self.norm3(tgt + self._feed_forward(tgt))

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
    ) -> Tensor:
        """tgt (Lt, B, D), memory (Lm, B, memory_dim), or batch first, or without B -> as tgt.

        Masks and lengths (B) as in :meth:`MultiHeadAttention.forward` (True = ignore).
        """
        return self._forward(
            tgt, memory, False, tgt_mask, memory_mask, tgt_key_padding_mask,
            memory_key_padding_mask, tgt_is_causal, memory_is_causal, tgt_lengths, memory_lengths,
        )[0]  # fmt: skip

    @torch.jit.export
    def forward_with_weights(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` and the weights of the attention to the memory, (B, cross_nhead, Lt, Lm),
        the alignment."""
        output, weights = self._forward(
            tgt, memory, True, tgt_mask, memory_mask, tgt_key_padding_mask,
            memory_key_padding_mask, tgt_is_causal, memory_is_causal, tgt_lengths, memory_lengths,
        )  # fmt: skip
        assert weights is not None
        return output, weights

    @torch.jit.export
    def new_cache(self, memory: Tensor, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` positions; projects the memory once.

        memory: (Lm, B, memory_dim), or (B, Lm, memory_dim) with batch_first.
        """
        if memory.dim() != 3:
            raise RuntimeError(
                "TransformerDecoderLayer: memory must have 3 dimensions "
                f"(got memory={memory.shape})"
            )
        if not self.batch_first:
            memory = memory.transpose(0, 1)
        memory_key, memory_value = self.multihead_attn.project_key_value(memory, memory)
        attention = self.self_attn
        shape = [memory.size(0), attention.num_kv_heads, capacity, attention.head_dim]
        return KVCache(
            memory_key.new_zeros(shape), memory_key.new_zeros(shape), memory_key, memory_value
        )

    def _decode(
        self,
        tgt: Tensor,
        cache: KVCache,
        lengths: Tensor,
        memory_lengths: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if tgt.dim() != 3:
            raise RuntimeError(
                f"TransformerDecoderLayer: tgt must have 3 dimensions (got tgt={tgt.shape})"
            )
        if not self.batch_first:
            tgt = tgt.transpose(0, 1)
        steps = tgt.size(1)
        x = self.norm1(tgt) if self.norm_first else tgt
        query = self.self_attn.project_query(x, 0, lengths)
        key, value = self.self_attn.project_key_value(x, x, lengths)
        # (B, T) -> (B, Hk, T, E): where the new keys and values go.
        rows = (lengths[:, None] + torch.arange(steps, device=tgt.device)).to(torch.int64)
        rows = rows[:, None, :, None].expand_as(key)
        cache.key.scatter_(2, rows, key.to(cache.key.dtype))
        cache.value.scatter_(2, rows, value.to(cache.value.dtype))
        attended, _ = self.self_attn.attend(
            query, cache.key, cache.value, False, None, True, lengths + steps, None, 0, lengths
        )
        tgt = tgt + self.dropout1(attended)
        if not self.norm_first:
            tgt = self.norm1(tgt)
        attended, weights = self.multihead_attn.attend(
            self.multihead_attn.project_query(self.norm2(tgt) if self.norm_first else tgt),
            cache.memory_key, cache.memory_value, need_weights,
            merge_masks(None, memory_key_padding_mask, tgt.size(0)), False, memory_lengths,
        )  # fmt: skip
        output = self._finish(tgt, attended)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    @torch.jit.export
    def decode(
        self,
        tgt: Tensor,
        cache: KVCache,
        lengths: Tensor,
        memory_lengths: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The next T positions, causal, with what the cache holds of the ones before.

        Meant for inference, under ``torch.no_grad``: it writes the new keys and values into
        ``cache`` (positions ``lengths[b] ... lengths[b] + T - 1`` of sample b). The caller advances
        ``lengths`` by T after all layers have run; a sample whose length is not advanced takes the
        same positions again.

        Args:
            tgt: (T, B, D), or (B, T, D) with batch_first.
            cache: from :meth:`new_cache`.
            lengths: (B) integer, how many positions of each sample the cache holds; with T added,
                at most its capacity.
            memory_lengths, memory_key_padding_mask: as in :meth:`forward`.
        """
        return self._decode(tgt, cache, lengths, memory_lengths, memory_key_padding_mask, False)[0]

    @torch.jit.export
    def decode_with_weights(
        self,
        tgt: Tensor,
        cache: KVCache,
        lengths: Tensor,
        memory_lengths: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`decode` and the weights of the attention to the memory (B, cross_nhead, T, Lm)."""
        output, weights = self._decode(
            tgt, cache, lengths, memory_lengths, memory_key_padding_mask, True
        )
        assert weights is not None
        return output, weights


def _copies(layer: nn.Module, count: int) -> nn.ModuleList:
    """``count`` copies that start from different numbers but share their rotary tables."""
    shared = {id(m): m for m in layer.modules() if isinstance(m, RotaryEmbedding)}
    copies = [copy.deepcopy(layer, dict(shared)) for _ in range(count)]
    for made in copies:
        _reset_parameters(made)
    return nn.ModuleList(copies)


class TransformerEncoder(nn.Module):
    """A stack of encoder layers and an optional last norm (give one with ``norm_first``).

    State-dict keys: ``layers.<n>.*``, ``norm.*``, as those of ``torch.nn.TransformerEncoder``. The
    layers are copies of the given one, each started anew (PyTorch's start from equal numbers).
    ``enable_nested_tensor`` and ``mask_check`` of PyTorch's change nothing here.
    """

    def __init__(
        self,
        encoder_layer: TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.batch_first = encoder_layer.self_attn.batch_first
        self.layers = _copies(encoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`TransformerEncoderLayer.forward`; ``is_causal`` None is False."""
        causal = is_causal is not None and is_causal
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if src.is_nested:
                return encode_nested(
                    self, self.batch_first, src, causal, mask=mask,
                    src_key_padding_mask=src_key_padding_mask, key_lengths=key_lengths,
                )  # fmt: skip
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, causal, key_lengths)
        if self.norm is not None:
            src = self.norm(src)
        return src


class TransformerDecoder(nn.Module):
    """A stack of decoder layers and an optional last norm (give one with ``norm_first``).

    State-dict keys: ``layers.<n>.*``, ``norm.*``, as those of ``torch.nn.TransformerDecoder``. The
    layers are copies of the given one, each started anew (PyTorch's start from equal numbers).
    """

    def __init__(
        self, decoder_layer: TransformerDecoderLayer, num_layers: int, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layers = _copies(decoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`TransformerDecoderLayer.forward`; ``tgt_is_causal`` None is False."""
        causal = tgt_is_causal is not None and tgt_is_causal
        for layer in self.layers:
            tgt = layer(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                causal, memory_is_causal, tgt_lengths, memory_lengths,
            )  # fmt: skip
        if self.norm is not None:
            tgt = self.norm(tgt)
        return tgt

    @torch.jit.export
    def forward_with_weights(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` and all layers' weights of the attention to the memory,
        (num_layers, B, cross_nhead, Lt, Lm)."""
        causal = tgt_is_causal is not None and tgt_is_causal
        all_weights: list[Tensor] = []
        for layer in self.layers:
            tgt, weights = layer.forward_with_weights(  # type: ignore[operator]
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                causal, memory_is_causal, tgt_lengths, memory_lengths,
            )  # fmt: skip
            all_weights.append(weights)
        if self.norm is not None:
            tgt = self.norm(tgt)
        return tgt, torch.stack(all_weights)

    @torch.jit.export
    def new_cache(self, memory: Tensor, capacity: int) -> list[KVCache]:
        """As :meth:`TransformerDecoderLayer.new_cache`, one for each layer."""
        caches: list[KVCache] = []
        for layer in self.layers:
            caches.append(layer.new_cache(memory, capacity))  # type: ignore[operator]
        return caches

    @torch.jit.export
    def decode(
        self,
        tgt: Tensor,
        caches: list[KVCache],
        lengths: Tensor,
        memory_lengths: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`TransformerDecoderLayer.decode`."""
        for i, layer in enumerate(self.layers):
            tgt = layer.decode(  # type: ignore[operator]
                tgt, caches[i], lengths, memory_lengths, memory_key_padding_mask
            )
        if self.norm is not None:
            tgt = self.norm(tgt)
        return tgt

    @torch.jit.export
    def decode_with_weights(
        self,
        tgt: Tensor,
        caches: list[KVCache],
        lengths: Tensor,
        memory_lengths: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`decode` and all layers' weights of the attention to the memory,
        (num_layers, B, cross_nhead, T, Lm)."""
        all_weights: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            tgt, weights = layer.decode_with_weights(  # type: ignore[operator]
                tgt, caches[i], lengths, memory_lengths, memory_key_padding_mask
            )
            all_weights.append(weights)
        if self.norm is not None:
            tgt = self.norm(tgt)
        return tgt, torch.stack(all_weights)
