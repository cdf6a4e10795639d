"""What the operators compute, in plain PyTorch that can be read as their definition.

The functions take the arguments of their namesakes in :mod:`torch_selfattn.functional` and are
differentiable to any order. They are written for clarity: memory is Lq * Lk * E, so use them for
small sizes, in float64 as a yardstick. The only other argument is ``dropout_factors``: instead of a
probability, the factors (0 or 1 / (1 - p)) themselves, broadcastable to the attention weights.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

__all__ = [
    "additive_attention",
    "additive_attention_with_lse",
    "allowed_pairs",
    "attention",
    "attention_weights",
    "dot_product_attention",
    "dot_product_attention_with_lse",
    "multi_head_attention",
]


def _positions(
    query_length: int,
    query_offset: int,
    query_offsets: Tensor | None,
    device: torch.device | None,
) -> Tensor:
    """Where the queries stand on the axis of the keys: (Lq, 1) or (B, 1, Lq, 1)."""
    position = torch.arange(query_length, device=device)[:, None] + query_offset
    return position if query_offsets is None else position + query_offsets[:, None, None, None]


def allowed_pairs(
    query_length: int,
    key_length: int,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    query_offset: int = 0,
    query_offsets: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which query may attend to which key: boolean, broadcastable to (B, H, Lq, Lk)."""
    j = torch.arange(key_length, device=device)
    position = _positions(query_length, query_offset, query_offsets, device)
    allowed = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    if is_causal:
        allowed = allowed & (j <= position)
    if window_left >= 0:
        allowed = allowed & (j >= position - window_left)
    if window_right >= 0:
        allowed = allowed & (j <= position + window_right)
    if key_lengths is not None:
        allowed = allowed & (j < key_lengths[:, None, None, None])
    if key_starts is not None:
        allowed = allowed & (j >= key_starts[:, None, None, None])
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        allowed = allowed & (attn_mask if is_bool else attn_mask != -math.inf)
    return allowed


def _softmax(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the allowed keys, and the log-sum-exp; 0 and -inf in a row without one."""
    some = allowed.any(-1, keepdim=True)
    # A row without a key gets a stand-in, so that no derivative of it is NaN.
    safe = torch.where(allowed, scores, -math.inf).where(some, 0.0)
    lse = torch.logsumexp(safe, -1, keepdim=True)
    weights = torch.exp(safe - lse).where(allowed & some, 0.0)
    return weights, lse.where(some, -math.inf).squeeze(-1)


def _with_rank(x: Tensor, rank: int) -> Tensor:
    """Four dimensions or more. Three are samples of one head, two are one head of one sample."""
    if rank <= 3:
        return (x[None] if x.dim() < 3 else x)[:, None]
    return x[(None,) * (rank - x.dim())]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_factors: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    query_offset: int = 0,
    query_offsets: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and weights (before dropout) of both scores; weight None: dot product."""
    rank = max(query.dim(), key.dim(), value.dim())
    q, k, v = (_with_rank(x, rank) for x in (query, key, value))
    leading = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])

    def merge(x: Tensor) -> Tensor:  # (..., H, L, D) -> (B, H, L, D)
        return x.expand(*leading, *x.shape[-3:]).flatten(0, -4)

    q, k, v = merge(q), merge(k), merge(v)
    heads = q.shape[1] if enable_gqa else max(q.shape[1], k.shape[1], v.shape[1])
    q = q.expand(-1, heads, -1, -1)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = merge(_with_rank(attn_mask, rank))
    key_lengths, key_starts, query_offsets = (
        None if x is None else x.reshape(-1) for x in (key_lengths, key_starts, query_offsets)
    )

    allowed = allowed_pairs(
        q.shape[2], k.shape[2], attn_mask, is_causal, key_lengths, key_starts,
        window_left, window_right, query_offset, query_offsets, q.device,
    )  # fmt: skip
    allowed = allowed.expand(*q.shape[:3], k.shape[2])
    # What stands in a pair that is not allowed is replaced, not multiplied by 0: 0 * NaN is NaN.
    pair = allowed[..., None]
    q_i, k_j, v_j = q[:, :, :, None], k[:, :, None], v[:, :, None]  # (B, H, Lq or 1, Lk or 1, E)
    if weight is None:
        terms = q_i.where(pair, 0.0) * k_j.where(pair, 0.0)
        scores = terms.sum(-1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    else:
        sums = (q_i + k_j).where(pair, 0.0)
        terms = torch.tanh(sums) if activation == "tanh" else leaky_relu(
            sums, 0.0 if activation == "relu" else negative_slope
        )  # fmt: skip
        # weight: (E), (H, E), or, as the inner operators take it, (B or 1, H or 1, E)
        w = weight[..., :, None, None, :] if weight.dim() > 1 else weight
        scores = (terms * w).sum(-1) * (1.0 if scale is None else scale)
    if alibi_slopes is not None:
        position = _positions(q.shape[2], query_offset, query_offsets, q.device)
        distance = (position - torch.arange(k.shape[2], device=q.device)).abs()
        slopes = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes.flatten(0, -2)
        scores = scores - slopes.to(scores.dtype)[..., None, None] * distance
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(scores.dtype).where(allowed, 0.0)

    weights, lse = _softmax(scores, allowed)
    factors = weights if dropout_factors is None else weights * dropout_factors
    out = (factors[..., None] * v_j.where(pair, 0.0)).sum(-2)

    # The dimensions before Lq as they came.
    before = leading + q.shape[1:2] if rank > 3 else leading if rank == 3 else torch.Size()
    return (
        out.reshape(before + out.shape[2:]),
        lse.reshape(before + lse.shape[2:]),
        weights.reshape(before + weights.shape[2:]),
    )


def dot_product_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_factors: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    query_offset: int = 0,
    query_offsets: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of :func:`torch_selfattn.dot_product_attention_with_lse`."""
    out, lse, _ = attention(
        query, key, value, None, attn_mask, dropout_factors, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes,
    )  # fmt: skip
    return out, lse


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_factors: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    query_offset: int = 0,
    query_offsets: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Output of :func:`torch_selfattn.dot_product_attention`."""
    return attention(
        query, key, value, None, attn_mask, dropout_factors, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes,
    )[0]  # fmt: skip


def additive_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    dropout_factors: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    query_offset: int = 0,
    query_offsets: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of :func:`torch_selfattn.additive_attention_with_lse`."""
    out, lse, _ = attention(
        query, key, value, weight, attn_mask, dropout_factors, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes, activation, negative_slope,
    )  # fmt: skip
    return out, lse


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    dropout_factors: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    query_offset: int = 0,
    query_offsets: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
) -> Tensor:
    """Output of :func:`torch_selfattn.additive_attention`."""
    return attention(
        query, key, value, weight, attn_mask, dropout_factors, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes, activation, negative_slope,
    )[0]  # fmt: skip


def attention_weights(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    heads: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    query_offset: int = 0,
    query_offsets: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    average_heads: bool = False,
    activation: str = "tanh",
    negative_slope: float = 0.2,
) -> Tensor:
    """Chosen rows of the weights: :func:`torch_selfattn.attention_weights`."""
    weights = attention(
        query, key, key, weight, attn_mask, None, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes, activation, negative_slope,
    )[2]  # fmt: skip
    if rows is not None:
        weights = weights.index_select(-2, rows)
    if heads is not None:
        weights = weights.index_select(-3, heads)
    has_heads = max(query.dim(), key.dim()) > 3
    return weights.mean(-3) if average_heads and has_heads else weights


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    in_proj_weight: list[Tensor],
    in_proj_bias: list[Tensor],
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None = None,
    score_weight: Tensor | None = None,
    num_kv_heads: int | None = None,
    attn_mask: Tensor | None = None,
    dropout_factors: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    query_offset: int = 0,
    query_offsets: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
) -> Tensor:
    """Projections and attention: :func:`torch_selfattn.multi_head_attention`."""
    if query.dim() == 2:
        return multi_head_attention(
            query[None], key[None], value[None], num_heads, in_proj_weight, in_proj_bias,
            out_proj_weight, out_proj_bias, score_weight, num_kv_heads, attn_mask, dropout_factors,
            is_causal, scale, key_lengths, key_starts, window_left, window_right, query_offset,
            query_offsets, alibi_slopes, activation, negative_slope,
        )[0]  # fmt: skip
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    embed_dim = out_proj_weight.shape[1]
    kv_dim = embed_dim // num_heads * kv_heads
    sizes = [embed_dim, kv_dim, kv_dim]
    weights = list(in_proj_weight[0].split(sizes)) if len(in_proj_weight) == 1 else in_proj_weight
    biases = list(in_proj_bias[0].split(sizes)) if len(in_proj_bias) == 1 else in_proj_bias

    def project(x: Tensor, which: int, heads: int) -> Tensor:  # (B, L, D) -> (B, heads, L, E)
        x = torch.nn.functional.linear(x, weights[which], biases[which] if biases else None)
        return x.unflatten(-1, (heads, embed_dim // num_heads)).transpose(-3, -2)

    out = attention(
        project(query, 0, num_heads), project(key, 1, kv_heads), project(value, 2, kv_heads),
        score_weight, attn_mask, dropout_factors, is_causal, scale, True,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes, activation, negative_slope,
    )[0]  # fmt: skip
    out = out.transpose(-3, -2).flatten(-2)  # (B, Lq, num_heads * E)
    return torch.nn.functional.linear(out, out_proj_weight, out_proj_bias)
