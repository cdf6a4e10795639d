"""The operators as documented Python functions.

Each is a thin front of the operator of the same name: ``torch.ops.torch_selfattn.<name>``, which
checks the arguments, so that Python, TorchScript, ``torch.export`` and C++ get the same answers and
the same errors. All of them can be called from scripted code.

Letters: B batch, H query heads, Hk key and value heads, Lq queries, Lk keys, E head dim of query
and key, Ev head dim of value. ``...`` stands for any number of leading dimensions, which are
broadcast as ``F.scaled_dot_product_attention`` broadcasts them.

Arguments that all attention functions share
--------------------------------------------
query : Tensor
    (..., H, Lq, E), any strides. float64, float32, float16 or bfloat16. Three dimensions are one
    head per sample, two are one head of one sample.
key : Tensor
    (..., Hk, Lk, E) with Hk = H or 1, or with ``enable_gqa`` any divisor of H.
value : Tensor
    (..., Hk, Lk, Ev).
attn_mask : Tensor, optional
    Broadcastable to (..., H, Lq, Lk). Boolean: True = attend. Floating (float32 or the dtype of
    query): added to the score, -inf = do not attend; differentiable.
dropout_p : float
    Probability of dropping an attention weight; the kept ones are divided by 1 - dropout_p. Not
    switched off by ``eval()``: functions know no mode. Follows ``torch.manual_seed``.
is_causal : bool
    Query i attends to keys j <= i (+ query offset): aligned to the top left. Not together with
    ``attn_mask``: the mask *and* causal is the mask and ``window_right=0``.
scale : float, optional
    Factor of the score. None: 1 / sqrt(E) for the dot product, 1 for the additive score.
enable_gqa : bool
    Grouped heads: query head h reads key and value head h // (H // Hk).
key_lengths, key_starts : Tensor, optional
    One int64 or int32 for each sample, so of the shape ``...``, usually (B): sample b attends to
    keys ``key_starts[b] <= j < key_lengths[b]`` only (right and left padding without a mask).
window_left, window_right : int
    A query at position t attends to keys ``t - window_left <= j <= t + window_right``; -1 = open.
query_offset : int
    The position of query i is ``i + query_offset`` on the axis of the keys. ``Lk - Lq`` aligns
    causal attention to the bottom right; with a cache it is the cached length.
query_offsets : Tensor, optional
    One int64 or int32 for each sample, added to ``query_offset``.
alibi_slopes : Tensor, optional
    (H), or (..., H) with a row for each sample; float32 or the dtype of query; differentiable.
    ALiBi: adds ``-alibi_slopes[h] * |t - j|`` to the score of a query at position t and key j. The
    position is the one that windows use, so ``query_offset = Lk - Lq`` gives the convention of
    FlashAttention (the last query stands at the last key). With causal attention it is the original
    ``slope * (j - t)``. :func:`torch_selfattn.alibi_slopes` makes the slopes of the paper.

What holds for all of them
--------------------------
A query that may attend to no key gives 0 (and log-sum-exp -inf) with zero gradients. NaN or inf in
a key or value that is masked out changes nothing. Memory is linear in Lq and Lk. Every tensor
argument of floating dtype has a gradient, and so have the gradients.

Errors: RuntimeError for shapes, dtypes or devices that do not fit together, ValueError for a number
out of its range, NotImplementedError for what is not supported.
"""

import torch
from torch import Tensor

__all__ = [
    "additive_attention",
    "additive_attention_with_lse",
    "attention_weights",
    "dot_product_attention",
    "dot_product_attention_with_lse",
    "explain",
    "multi_head_attention",
]

# Looked up once: the way through torch.ops is 0.2 us of a call.
_dot_product_attention = torch.ops.torch_selfattn.dot_product_attention
_additive_attention = torch.ops.torch_selfattn.additive_attention


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
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
    """Scaled dot-product attention: ``softmax_j(scale * q_i . k_j + mask_ij) v_j``.

    The first eight arguments are those of ``F.scaled_dot_product_attention``; all arguments are
    described at the top of :mod:`torch_selfattn.functional`.

    Shapes: query (..., H, Lq, E), key (..., Hk, Lk, E), value (..., Hk, Lk, Ev) ->
    (..., H, Lq, Ev), in query's dtype.

    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017.
    """
    # PyTorch takes 0.06 us to convert an argument, so a plain call leaves out what changes nothing.
    # (Positions do not, without a window, and a comparison would be a guard on a symbolic offset.)
    if not torch.jit.is_scripting() and (  # type: ignore[attr-defined]
        attn_mask is None and dropout_p == 0.0 and is_causal is False and scale is None
        and enable_gqa is False and key_lengths is None and key_starts is None
        and window_left == -1 and window_right == -1 and isinstance(query_offset, int)
        and query_offsets is None and alibi_slopes is None
    ):  # fmt: skip
        return _dot_product_attention(query, key, value)
    return _dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes,
    )  # fmt: skip


def dot_product_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
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
    """:func:`dot_product_attention` and the log-sum-exp of each row of scores.

    With it, attention over keys that come in pieces can be put together afterwards: the pieces'
    outputs weighted by ``exp(lse - logsumexp(all lse))``.

    Returns the output (..., H, Lq, Ev) and ``lse`` (..., H, Lq), float32 (float64 for float64
    inputs), -inf for a row without a key; it is not changed by dropout. Both have gradients.
    """
    return torch.ops.torch_selfattn.dot_product_attention_with_lse(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes,
    )  # fmt: skip


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
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
    """Additive attention: the score is ``scale * sum_d weight[h, d] * f(q[i, d] + k[j, d])``.

    ``weight`` is (E), or (H, E) for one vector per query head, in query's dtype, with gradient;
    ``scale`` is 1 by default. ``activation``, f: ``"tanh"``, ``"relu"``, or ``"leaky_relu"``: x
    where x > 0 and ``negative_slope * x`` elsewhere (the derivative at 0 is the slope), 0.2 in
    GATv2; the others do not read ``negative_slope``. The projections of query and key come before
    this function (:class:`torch_selfattn.nn.AdditiveAttention` has them). The other arguments are
    described at the top of :mod:`torch_selfattn.functional`. Never forms a tensor of Lq * Lk
    elements.

    Shapes: query (..., H, Lq, E), key (..., Hk, Lk, E), value (..., Hk, Lk, Ev) ->
    (..., H, Lq, Ev), in query's dtype.

    Source: Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and
    translate", ICLR 2015. Leaky ReLU: Brody, Alon and Yahav, "How attentive are graph attention
    networks?", ICLR 2022.
    """
    # As in dot_product_attention.
    if not torch.jit.is_scripting() and (  # type: ignore[attr-defined]
        attn_mask is None and dropout_p == 0.0 and is_causal is False and scale is None
        and enable_gqa is False and key_lengths is None and key_starts is None
        and window_left == -1 and window_right == -1 and isinstance(query_offset, int)
        and query_offsets is None and alibi_slopes is None and activation == "tanh"
    ):  # fmt: skip
        return _additive_attention(query, key, value, weight)
    return _additive_attention(
        query, key, value, weight, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes, activation, negative_slope,
    )  # fmt: skip


def additive_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
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
    """:func:`additive_attention` and the log-sum-exp of each row of scores.

    Returns the output (..., H, Lq, Ev) and ``lse`` (..., H, Lq), as
    :func:`dot_product_attention_with_lse` does.
    """
    return torch.ops.torch_selfattn.additive_attention_with_lse(
        query, key, value, weight, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes, activation, negative_slope,
    )  # fmt: skip


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
    """Chosen rows of the matrix of attention weights, without forming the others.

    ``weight`` None means the dot-product score, (E) or (H, E) the additive one. ``rows`` (R) int64:
    indices of queries, all by default. ``heads`` (G) int64: indices of query heads, all by default.
    ``activation`` and ``negative_slope``: those of :func:`additive_attention`.
    ``average_heads``: the mean over these heads; the matrices of single heads are not formed.
    The other arguments are described at the top of :mod:`torch_selfattn.functional`.

    Returns (..., G, R, Lk), averaged (..., R, Lk), in query's dtype; each row adds up to 1, or to 0
    where the query may attend to no key. Memory is that of the result, and of the gradients of what
    asks for one; second derivatives form the matrices of all heads.
    """
    return torch.ops.torch_selfattn.attention_weights(
        query, key, weight, rows, heads, attn_mask, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes, average_heads, activation, negative_slope,
    )  # fmt: skip


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
    dropout_p: float = 0.0,
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
    """In-projection, attention with ``num_heads`` heads, out-projection.

    query (B, Lq, Dq), key (B, Lk, Dk), value (B, Lk, Dv), or all without B -> (B, Lq, Do).

    ``in_proj_weight``: one packed matrix (E + 2 Ekv, D) whose rows are those of the query, key and
    value projections behind each other, or the three of them, (E, Dq), (Ekv, Dk), (Ekv, Dv), with
    E = num_heads * head dim and Ekv = num_kv_heads * head dim. ``in_proj_bias``: nothing, one
    packed vector or three. ``out_proj_weight``: (Do, E). ``score_weight``: None for the dot
    product, (head dim) or (num_heads, head dim) for the additive score, whose ``activation`` and
    ``negative_slope`` are those of :func:`additive_attention`. ``num_kv_heads`` None means
    num_heads. The other arguments are described at the top of :mod:`torch_selfattn.functional`.

    Source: Vaswani et al., 2017; grouped heads: Ainslie et al., "GQA", EMNLP 2023.
    """
    return torch.ops.torch_selfattn.multi_head_attention(
        query, key, value, num_heads, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias,
        score_weight, num_kv_heads, attn_mask, dropout_p, is_causal, scale,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes, activation, negative_slope,
    )  # fmt: skip


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
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
) -> str:
    """Says which implementation runs this call, and why those before it in the list do not.

    The arguments are those of :func:`additive_attention`, with ``weight`` None for the dot product.
    Nothing is computed. See also :func:`torch_selfattn.use_implementation`.
    """
    return torch.ops.torch_selfattn.explain(
        query, key, value, weight, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_lengths, key_starts, window_left, window_right, query_offset, query_offsets,
        alibi_slopes, activation, negative_slope,
    )  # fmt: skip
