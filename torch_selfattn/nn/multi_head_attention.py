"""Multi-head attention with the interface of ``torch.nn.MultiheadAttention``."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import (
    additive_attention,
    attention_weights,
    dot_product_attention,
    multi_head_attention,
)
from ._masks import check_inputs, merge_masks, window_mask
from ._nested import NestedInputs
from .attention import (
    activation_repr,
    check_activation,
    check_dropout,
    check_score,
    init_score_weight,
)
from .positional import AlibiSlopes, RotaryEmbedding

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nn.Module):
    r"""Multi-head attention; takes the place of ``torch.nn.MultiheadAttention``.

    .. math::
        \mathrm{head}_h = \sum_j \mathrm{softmax}_j(\mathrm{score}(Q_h, K_h))\, V_h, \qquad
        y = W_o\, [\mathrm{head}_1; \dots; \mathrm{head}_H] + b_o

    The positional arguments, the arguments of ``forward`` and the state dict are those of
    ``nn.MultiheadAttention``; with the same state dict it gives the same outputs and gradients.
    What differs, on purpose:

    * a sample whose keys are all padding gives the out-projection's bias, with finite gradients,
      and not NaN; a padded key or value that is NaN reaches no output;
    * ``is_causal=True`` is applied by itself; with ``attn_mask`` both hold (there it is a hint that
      may be wrong);
    * the returned weights are those before dropout;
    * ``need_weights=False`` (give it!) costs memory linear in the lengths, in training too.

    State-dict keys: ``in_proj_weight`` (E + 2 Ekv, E), or, if ``kdim`` or ``vdim`` differ from
    ``embed_dim``, ``q_proj_weight`` (E, E), ``k_proj_weight`` (Ekv, kdim), ``v_proj_weight``
    (Ekv, vdim); ``out_proj.weight`` (E, E); with bias ``in_proj_bias`` (E + 2 Ekv) and
    ``out_proj.bias`` (E); with add_bias_kv ``bias_k`` and ``bias_v`` (1, 1, Ekv); additive score:
    ``score_weight`` (num_heads, head dim). E = embed_dim, Ekv = num_kv_heads * head dim.

    Args:
        embed_dim: size of the queries and of the output.
        num_heads: number of query heads; head dim = embed_dim / num_heads.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have one.
        add_bias_kv: append one trained key and value to each sequence.
        add_zero_attn: append a key and value of zeros to each sequence.
        kdim: size of the keys, embed_dim by default.
        vdim: size of the values, embed_dim by default.
        batch_first: (B, L, D) instead of (L, B, D).
        score: ``"dot"`` or ``"additive"``, ``w_h . tanh(q + k)``.
        num_kv_heads: number of key and value heads, a divisor of num_heads, which is the default.
        window: (left, right): how many keys before and after its own position a query sees,
            -1 = all. Appended keys are seen by all.
        rotary: rotates queries and keys (not the appended ones) by their position; its ``dim`` is
            at most the head dim.
        scale: factor of the score; None: 1 / sqrt(head dim) for the dot product, 1 for the
            additive score.
        alibi: lowers the score by the distance of query and key times a slope of the head, those of
            :func:`torch_selfattn.alibi_slopes`. Not with add_bias_kv and add_zero_attn, whose keys
            stand nowhere.
        activation, negative_slope: of the additive score, in the place of tanh, see
            :func:`torch_selfattn.additive_attention`.

    Sources: Vaswani et al., 2017; Bahdanau et al., 2015 (additive score); Ainslie et al., 2023
    (grouped heads); Su et al., 2021 (rotary); Beltagy et al., 2020 (window); Press et al., 2022
    (ALiBi).
    """

    in_proj_weight: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    score_weight: Tensor | None

    # Read by torch.nn.TransformerEncoderLayer: no, its fused path may not do without this module.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        score: str = "dot",
        num_kv_heads: int | None = None,
        window: tuple[int, int] = (-1, -1),
        rotary: RotaryEmbedding | None = None,
        scale: float | None = None,
        alibi: bool = False,
        activation: str = "tanh",
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        name = "MultiHeadAttention"
        check_score(name, score)
        check_activation(name, score, activation)
        check_dropout(name, dropout)
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(
                f"{name}: embed_dim and num_heads must be greater than 0, "
                f"got embed_dim={embed_dim} and num_heads={num_heads} instead "
                f"(got embed_dim={embed_dim}, num_heads={num_heads})"
            )
        if embed_dim % num_heads != 0:
            raise ValueError(
                f"{name}: embed_dim must be divisible by num_heads "
                f"(got embed_dim={embed_dim}, num_heads={num_heads})"
            )
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads <= 0 or num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"{name}: num_heads must be divisible by num_kv_heads "
                f"(got num_heads={num_heads}, num_kv_heads={num_kv_heads})"
            )
        self.head_dim = embed_dim // num_heads
        self.kv_embed_dim = self.num_kv_heads * self.head_dim
        if rotary is not None and rotary.dim > self.head_dim:
            raise ValueError(
                f"{name}: rotary.dim must not exceed the head dim "
                f"(got rotary.dim={rotary.dim}, head dim={self.head_dim})"
            )
        if alibi and (add_bias_kv or add_zero_attn):
            raise ValueError(
                f"{name}: alibi does not go with add_bias_kv and add_zero_attn "
                f"(got add_bias_kv={add_bias_kv}, add_zero_attn={add_zero_attn})"
            )
        self.dropout = float(dropout)
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.score = score
        self.activation = activation
        self.negative_slope = float(negative_slope)
        self.window_left = int(window[0])
        self.window_right = int(window[1])
        self.rotary = rotary
        self.alibi = AlibiSlopes(num_heads, device) if alibi else None
        default_scale = 1 / math.sqrt(self.head_dim) if score == "dot" else 1.0
        self.scale = default_scale if scale is None else float(scale)

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            if not wanted:
                return None
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        packed = self.kdim == embed_dim and self.vdim == embed_dim
        total = embed_dim + 2 * self.kv_embed_dim
        # In the order of nn.MultiheadAttention, so that parameters() of both can be zipped.
        for key, value in {
            "q_proj_weight": parameter(not packed, embed_dim, embed_dim),
            "k_proj_weight": parameter(not packed, self.kv_embed_dim, self.kdim),
            "v_proj_weight": parameter(not packed, self.kv_embed_dim, self.vdim),
            "in_proj_weight": parameter(packed, total, embed_dim),
            "in_proj_bias": parameter(bias, total),
        }.items():
            self.register_parameter(key, value)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.register_parameter("bias_k", parameter(add_bias_kv, 1, 1, self.kv_embed_dim))
        self.register_parameter("bias_v", parameter(add_bias_kv, 1, 1, self.kv_embed_dim))
        additive = score == "additive"
        self.register_parameter("score_weight", parameter(additive, num_heads, self.head_dim))
        self._reset_in_projection()

    def reset_parameters(self) -> None:
        """In-projections Xavier uniform, biases 0, bias_k and bias_v Xavier normal, out-projection
        as ``nn.Linear``; score weight within 1 / sqrt(head dim). The same numbers as those of
        ``nn.MultiheadAttention`` after the same ``torch.manual_seed``."""
        self.out_proj.reset_parameters()
        self._reset_in_projection()
        if self.alibi is not None:
            self.alibi.reset_parameters()

    def _reset_in_projection(self) -> None:
        for weight in (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
        ):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.bias_k is not None and self.bias_v is not None:
            nn.init.xavier_normal_(self.bias_k)
            nn.init.xavier_normal_(self.bias_v)
        if self.score_weight is not None:
            init_score_weight(self.score_weight)

    def _query_size(self) -> int:
        """Of a query's last dimension. (embed_dim may be that of some of the heads.)"""
        weight = self.in_proj_weight
        if weight is None:
            weight = self.q_proj_weight
        assert weight is not None
        return weight.size(1)

    def _split_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.in_proj_weight
        if packed is not None:
            e, kv = self.embed_dim, self.kv_embed_dim
            return packed[:e], packed[e : e + kv], packed[e + kv :]
        q, k, v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        assert q is not None and k is not None and v is not None
        return q, k, v

    def _bias(self, begin: int, end: int) -> Tensor | None:
        bias = self.in_proj_bias
        if bias is None:
            return None
        return bias[begin:end]

    def _alibi_slopes(self) -> Tensor | None:
        slopes: Tensor | None = None
        alibi = self.alibi
        if alibi is not None:
            slopes = alibi.slopes
        return slopes

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """(B, L, heads * E) -> (B, heads, L, E), a view."""
        return x.unflatten(-1, [heads, self.head_dim]).transpose(1, 2)

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, L, D). Without batch_first the length is outside in memory, and F.linear would copy
        an input that is not contiguous."""
        if self.batch_first:
            return F.linear(x, weight, bias)
        return F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)

    def _positions(self, length: int, offset: int, offsets: Tensor) -> Tensor:
        """(B, L): the positions of queries whose sample b starts at offset + offsets[b]."""
        return torch.arange(length, device=offsets.device) + (offsets[:, None] + offset)

    def project_query(
        self, query: Tensor, query_offset: int = 0, query_offsets: Tensor | None = None
    ) -> Tensor:
        """query (B, Lq, embed_dim) -> (B, H, Lq, head dim), projected and rotated."""
        weight = self._split_weights()[0]
        bias = self._bias(0, self.embed_dim)
        q = self._heads(self._project(query, weight, bias), self.num_heads)
        rotary = self.rotary
        if rotary is not None:
            if query_offsets is None:
                q = rotary(q, query_offset)
            else:
                q = rotary(q, 0, self._positions(q.size(2), query_offset, query_offsets))
        return q

    def project_key_value(
        self, key: Tensor, value: Tensor, key_offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """key (B, Lk, kdim), value (B, Lk, vdim) -> both (B, Hk, Lk, head dim), projected, the key
        rotated; row l stands at position l, or key_offsets[b] + l."""
        e, kv = self.embed_dim, self.kv_embed_dim
        packed = self.in_proj_weight
        if packed is not None and value is key:
            both = self._project(key, packed[e:], self._bias(e, e + 2 * kv))
            # One split, whose backward joins the two gradients; that of two slices adds them up.
            k, v = both.chunk(2, -1)
        else:
            _, k_weight, v_weight = self._split_weights()
            k = self._project(key, k_weight, self._bias(e, e + kv))
            v = self._project(value, v_weight, self._bias(e + kv, e + 2 * kv))
        k, v = self._heads(k, self.num_kv_heads), self._heads(v, self.num_kv_heads)
        rotary = self.rotary
        if rotary is not None:
            if key_offsets is None:
                k = rotary(k)
            else:
                k = rotary(k, 0, self._positions(k.size(2), 0, key_offsets))
        return k, v

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        key_lengths: Tensor | None = None,
        key_starts: Tensor | None = None,
        query_offset: int = 0,
        query_offsets: Tensor | None = None,
        average_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention and out-projection for what ``project_query`` and ``project_key_value`` give.

        The mask is one of the operators (True = attend), broadcastable to (B, H, Lq, Lk). Returns
        (B, Lq, embed_dim) and the weights (B, H, Lq, Lk), with average_weights their mean over the
        heads (B, Lq, Lk), or None.
        """
        return self._attend(
            query, key, value, need_weights, attn_mask, self.window_left,
            self._window_right(is_causal), key_lengths, key_starts, query_offset, query_offsets,
            average_weights,
        )  # fmt: skip

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool,
        attn_mask: Tensor | None,
        window_left: int,
        window_right: int,
        key_lengths: Tensor | None,
        key_starts: Tensor | None,
        query_offset: int,
        query_offsets: Tensor | None,
        average_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout if self.training else 0.0
        score_weight = self.score_weight
        slopes = self._alibi_slopes()
        if score_weight is None:
            out = dot_product_attention(
                query, key, value, attn_mask, dropout_p, False, self.scale, True, key_lengths,
                key_starts, window_left, window_right, query_offset, query_offsets, slopes,
            )  # fmt: skip
        else:
            out = additive_attention(
                query, key, value, score_weight, attn_mask, dropout_p, False, self.scale, True,
                key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
                slopes, self.activation, self.negative_slope,
            )  # fmt: skip
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        weights: Tensor | None = None
        if need_weights:
            weights = attention_weights(
                query, key, score_weight, None, None, attn_mask, False, self.scale, True,
                key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
                slopes, average_weights, self.activation, self.negative_slope,
            )  # fmt: skip
        return out, weights

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        key_lengths: Tensor | None,
        key_starts: Tensor | None,
        query_offset: int,
        query_offsets: Tensor | None,
    ) -> Tensor:
        """The whole of it as one operator."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        weights = list(self._split_weights()) if packed is None else [packed]
        biases: list[Tensor] = []
        if bias is not None:
            if packed is None:
                kv = self.kv_embed_dim
                biases = list(bias.split_with_sizes([self.embed_dim, kv, kv]))
            else:
                biases = [bias]
        return multi_head_attention(
            query, key, value, self.num_heads, weights, biases,
            self.out_proj.weight, self.out_proj.bias, self.score_weight, self.num_kv_heads,
            attn_mask, self.dropout if self.training else 0.0, False, self.scale, key_lengths,
            key_starts, self.window_left, self._window_right(is_causal), query_offset,
            query_offsets, self._alibi_slopes(), self.activation, self.negative_slope,
        )  # fmt: skip

    def _window_right(self, is_causal: bool) -> int:
        return 0 if is_causal else self.window_right

    def _append_keys(
        self, key: Tensor, value: Tensor, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """add_bias_kv and add_zero_attn: more keys behind the sequence, which all queries see."""
        batch, length = key.size(0), key.size(2)
        bias_k, bias_v = self.bias_k, self.bias_v
        if bias_k is not None and bias_v is not None:
            shape = [batch, self.num_kv_heads, 1, self.head_dim]
            key = torch.cat([key, self._heads(bias_k, self.num_kv_heads).expand(shape)], 2)
            value = torch.cat([value, self._heads(bias_v, self.num_kv_heads).expand(shape)], 2)
        if self.add_zero_attn:
            key = F.pad(key, [0, 0, 0, 1])
            value = F.pad(value, [0, 0, 0, 1])
        extra = key.size(2) - length
        if attn_mask is not None:
            if attn_mask.size(-1) == 1 and length != 1:
                shape = list(attn_mask.shape)
                shape[-1] = length
                attn_mask = attn_mask.expand(shape)
            if attn_mask.dtype == torch.bool:
                attn_mask = F.pad(attn_mask, [0, extra], value=1.0)
            else:
                attn_mask = F.pad(attn_mask, [0, extra])
        return key, value, attn_mask

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _forward_nested(
        self,
        inputs: NestedInputs,
        need_weights: bool,
        average_attn_weights: bool,
        is_causal: bool,
        query_offset: int,
        query_offsets: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        inputs.check_same_lengths("key", "value")
        query = inputs.padded("query")
        out, weights = self.forward(  # and not self(...), which would run the hooks twice
            query, inputs.padded("key"), inputs.padded("value"), None, need_weights, None,
            average_attn_weights, is_causal, inputs.lengths("key"), None, query_offset,
            query_offsets,
        )  # fmt: skip
        if weights is not None:  # padded, as PyTorch's
            rows = torch.arange(query.size(1), device=query.device)[:, None]
            lengths = inputs.lengths("query").view([-1] + [1] * (weights.dim() - 1))
            weights = weights.masked_fill(rows >= lengths, 0.0)
        return inputs.nest(out, "query"), weights

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        key_lengths: Tensor | None = None,
        key_starts: Tensor | None = None,
        query_offset: int = 0,
        query_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` to ``key`` and ``value``.

        Args:
            query: (Lq, B, embed_dim), or (B, Lq, embed_dim) with batch_first, or (Lq, embed_dim).
            key: (Lk, B, kdim), or as query.
            value: (Lk, B, vdim), or as query. With batch_first all three may be nested tensors
                (B, L*, D), strided or jagged, without masks and lengths; the output is then nested
                as query is, and the weights are padded with zeros.
            key_padding_mask: (B, Lk) or (Lk): boolean, True = ignore this key, or floating, added
                to the score.
            need_weights: also return the attention weights: B * Lq * Lk elements averaged, and no
                more memory than that, else B * H * Lq * Lk.
            attn_mask: (Lq, Lk) or (B * num_heads, Lq, Lk): boolean, True = ignore, or floating,
                added to the score (differentiable).
            average_attn_weights: return the weights' mean over the heads instead of all; those of
                single heads are not formed.
            is_causal: query i sees keys j <= i (+ query offset) only.
            key_lengths, key_starts: (B): sample b sees keys key_starts[b] <= j < key_lengths[b];
                cheaper than the same as a key_padding_mask.
            query_offset, query_offsets: position of the first query on the axis of the keys, as in
                :mod:`torch_selfattn.functional`.

        Returns:
            The output, in the layout of query, and the weights, (B, Lq, Lk') averaged or
            (B, num_heads, Lq, Lk') (both without B for unbatched inputs), or None. Lk' counts the
            appended keys.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if query.is_nested or key.is_nested or value.is_nested:
                inputs = NestedInputs(
                    "MultiHeadAttention", self.batch_first, query=query, key=key, value=value
                )
                inputs.refuse(
                    key_padding_mask=key_padding_mask, attn_mask=attn_mask,
                    key_lengths=key_lengths, key_starts=key_starts,
                )  # fmt: skip
                return self._forward_nested(
                    inputs, need_weights, average_attn_weights, is_causal, query_offset,
                    query_offsets,
                )  # fmt: skip
        # In a trace sizes are tensors, and what comparing them gives is a constant.
        if not torch.jit.is_tracing():  # type: ignore[attr-defined]
            check_inputs(
                query, key, value, key_padding_mask, attn_mask, self._query_size(), self.num_heads,
                self.in_proj_weight is not None, self.batch_first,
            )  # fmt: skip
        is_batched = query.dim() == 3
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        # One tensor given twice stays one, so that it is projected by one matrix product.
        same_query, same_value = query is key, value is key
        query = self._batch_first(query)
        key = query if same_query else self._batch_first(key)
        value = key if same_value else self._batch_first(value)
        mask = merge_masks(attn_mask, key_padding_mask, query.size(0))

        weights: Tensor | None = None
        appends = self.bias_k is not None or self.add_zero_attn
        if self.rotary is None and not appends and not need_weights:
            out = self._fused(
                query, key, value, mask, is_causal, key_lengths, key_starts, query_offset,
                query_offsets,
            )  # fmt: skip
        else:
            q = self.project_query(query, query_offset, query_offsets)
            k, v = self.project_key_value(key, value)
            if appends:
                left, right = self.window_left, self._window_right(is_causal)
                bounded = key_lengths is not None or key_starts is not None
                if left >= 0 or right >= 0 or bounded:
                    # The appended keys lie outside of every bound, so the bounds become a mask.
                    seen = window_mask(
                        q.size(2), k.size(2), q.device, key_lengths, key_starts, left, right,
                        query_offset, query_offsets,
                    )  # fmt: skip
                    if mask is None:
                        mask = seen
                    elif mask.dtype == torch.bool:
                        mask = mask & seen
                    else:
                        mask = mask.masked_fill(seen.logical_not(), -math.inf)
                k, v, mask = self._append_keys(k, v, mask)
                out, weights = self._attend(
                    q, k, v, need_weights, mask, -1, -1, None, None, 0, None, average_attn_weights
                )
            else:
                out, weights = self.attend(
                    q, k, v, need_weights, mask, is_causal, key_lengths, key_starts, query_offset,
                    query_offsets, average_attn_weights,
                )  # fmt: skip

        if weights is not None and not is_batched:
            weights = weights[0]
        if not is_batched:
            return out[0], weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, {self.num_heads}, score={self.score!r}"
        text += activation_repr(self.activation, self.negative_slope)
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        if self.window_left >= 0 or self.window_right >= 0:
            text += f", window=({self.window_left}, {self.window_right})"
        if self.dropout > 0:
            text += f", dropout={self.dropout:g}"
        return text + f", batch_first={self.batch_first}"
