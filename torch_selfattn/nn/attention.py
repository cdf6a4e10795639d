"""One-head attention: the textbook blocks."""

import math

import torch
from torch import Tensor, nn

from ..functional import additive_attention, attention_weights, dot_product_attention
from .positional import AlibiSlopes

__all__ = ["AdditiveAttention", "SelfAttention"]


def check_score(module: str, score: str) -> None:
    if score not in ("dot", "additive"):
        raise ValueError(f"{module}: score must be 'dot' or 'additive' (got score={score!r})")


def check_activation(module: str, score: str, activation: str) -> None:
    if activation not in ("tanh", "leaky_relu", "relu"):
        raise ValueError(
            f"{module}: activation must be 'tanh', 'leaky_relu' or 'relu' "
            f"(got activation={activation!r})"
        )
    if score == "dot" and activation != "tanh":
        raise ValueError(
            f"{module}: activation belongs to the additive score "
            f"(got score={score!r}, activation={activation!r})"
        )


def check_dropout(module: str, dropout: float) -> None:
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{module}: dropout must be between 0 and 1 (got dropout={dropout})")


def activation_repr(activation: str, negative_slope: float) -> str:
    if activation == "tanh":
        return ""
    slope = f", negative_slope={negative_slope:g}" if activation == "leaky_relu" else ""
    return f", activation={activation!r}{slope}"


def init_score_weight(score_weight: Tensor) -> None:
    """As ``nn.Linear(head_dim, 1)`` starts: uniform within 1 / sqrt(head dim)."""
    bound = 1 / math.sqrt(score_weight.size(-1))
    nn.init.uniform_(score_weight, -bound, bound)


class SelfAttention(nn.Module):
    r"""One head of self-attention: the textbook block.

    .. math::
        Q = x W_q^T + b_q, \quad K = x W_k^T + b_k, \quad V = x W_v^T + b_v, \qquad
        y_i = \sum_j \mathrm{softmax}_j(\mathrm{score}(Q_i, K_j))\, V_j

    with the score :math:`q \cdot k / \sqrt{E}` (``"dot"``) or :math:`w \cdot \tanh(q + k)`
    (``"additive"``).

    State-dict keys: ``q_proj.weight`` (key_dim, embed_dim), ``k_proj.weight`` (key_dim, embed_dim),
    ``v_proj.weight`` (value_dim, embed_dim), with bias also ``q_proj.bias``, ``k_proj.bias``,
    ``v_proj.bias``; additive: ``score_weight`` (key_dim).

    Args:
        embed_dim: size of the input's last dimension.
        score: ``"dot"`` or ``"additive"``.
        key_dim: size of queries and keys, embed_dim by default.
        value_dim: size of values and of the output, embed_dim by default.
        bias: whether the projections have one.
        dropout: probability of dropping an attention weight in training.
        is_causal: position i attends to positions j <= i only.
        window: (left, right): how many positions before and after its own each one sees, -1 = all.
        scale: factor of the score; None: 1 / sqrt(key_dim) for the dot product, 1 for the additive.
        alibi: lowers the score by the distance of two positions times the slope of
            ``torch_selfattn.alibi_slopes(1)``, 1/256.
        activation, negative_slope: of the additive score, in the place of tanh, see
            :func:`torch_selfattn.additive_attention`.

    Sources: Vaswani et al., 2017 (dot product); Bahdanau et al., 2015 (additive); Press et al.,
    2022 (ALiBi).
    """

    score_weight: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        score: str = "dot",
        key_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        is_causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        alibi: bool = False,
        activation: str = "tanh",
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        check_score("SelfAttention", score)
        check_activation("SelfAttention", score, activation)
        check_dropout("SelfAttention", dropout)
        self.embed_dim = embed_dim
        self.score = score
        self.activation = activation
        self.negative_slope = float(negative_slope)
        self.key_dim = embed_dim if key_dim is None else key_dim
        self.value_dim = embed_dim if value_dim is None else value_dim
        self.dropout = float(dropout)
        self.is_causal = is_causal
        self.window_left = int(window[0])
        self.window_right = 0 if is_causal else int(window[1])
        # Resolved here: a number scripts more simply than an optional one.
        default_scale = 1 / math.sqrt(self.key_dim) if score == "dot" else 1.0
        self.scale = default_scale if scale is None else float(scale)
        self.alibi = AlibiSlopes(1, device) if alibi else None
        self.q_proj = nn.Linear(embed_dim, self.key_dim, bias, device, dtype)
        self.k_proj = nn.Linear(embed_dim, self.key_dim, bias, device, dtype)
        self.v_proj = nn.Linear(embed_dim, self.value_dim, bias, device, dtype)
        if score == "additive":
            self.score_weight = nn.Parameter(torch.empty(self.key_dim, device=device, dtype=dtype))
        else:
            self.register_parameter("score_weight", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections: Xavier uniform, biases 0; score weight: within 1 / sqrt(key_dim)."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.score_weight is not None:
            init_score_weight(self.score_weight)
        if self.alibi is not None:
            self.alibi.reset_parameters()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, L, embed_dim) or (L, embed_dim) -> (output (..., L, value_dim), weights or None).

        ``attn_mask``: broadcastable to (B, L, L); boolean (True = attend) or floating (added to the
        score). ``key_lengths`` (B): sample b is padding from ``key_lengths[b]`` on.
        ``need_weights``: also return the weights (B, L, L), before dropout.
        """
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        dropout_p = self.dropout if self.training else 0.0
        score_weight = self.score_weight
        slopes: Tensor | None = None
        alibi = self.alibi
        if alibi is not None:
            slopes = alibi.slopes
        if score_weight is None:
            output = dot_product_attention(
                query, key, value, attn_mask, dropout_p, scale=self.scale, key_lengths=key_lengths,
                window_left=self.window_left, window_right=self.window_right, alibi_slopes=slopes,
            )  # fmt: skip
        else:
            output = additive_attention(
                query, key, value, score_weight, attn_mask, dropout_p, scale=self.scale,
                key_lengths=key_lengths, window_left=self.window_left,
                window_right=self.window_right, alibi_slopes=slopes, activation=self.activation,
                negative_slope=self.negative_slope,
            )  # fmt: skip
        weights: Tensor | None = None
        if need_weights:
            weights = attention_weights(
                query, key, score_weight, attn_mask=attn_mask, scale=self.scale,
                key_lengths=key_lengths, window_left=self.window_left,
                window_right=self.window_right, alibi_slopes=slopes, activation=self.activation,
                negative_slope=self.negative_slope,
            )  # fmt: skip
        return output, weights

    def extra_repr(self) -> str:
        text = f"score={self.score!r}, dropout={self.dropout:g}"
        text += activation_repr(self.activation, self.negative_slope)
        if self.is_causal:
            text += ", is_causal=True"
        if self.window_left >= 0 or self.window_right > 0:
            text += f", window=({self.window_left}, {self.window_right})"
        return text


class AdditiveAttention(nn.Module):
    r"""Bahdanau's attention: a query looks at keys through a small network with one hidden layer.

    .. math::
        \mathrm{score}_{ij} = w \cdot \tanh(W_q q_i + W_k k_j + b), \qquad
        c_i = \sum_j \mathrm{softmax}_j(\mathrm{score}_{ij})\, v_j

    The values are not projected. Memory is linear in the lengths: the hidden layer of all pairs,
    (Lq, Lk, hidden_dim), is never formed.

    State-dict keys: ``q_proj.weight`` (hidden_dim, query_dim), ``q_proj.bias`` (hidden_dim) with
    bias, ``k_proj.weight`` (hidden_dim, key_dim), ``score_weight`` (hidden_dim).

    Args:
        query_dim: size of the queries.
        key_dim: size of the keys.
        hidden_dim: size of the hidden layer.
        bias: whether the hidden layer has one.
        dropout: probability of dropping an attention weight in training.
        activation, negative_slope: of the hidden layer, in the place of tanh, see
            :func:`torch_selfattn.additive_attention`. ``"leaky_relu"`` is the score of GATv2.

    Sources: Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and
    translate", ICLR 2015; Brody, Alon and Yahav, "How attentive are graph attention networks?",
    ICLR 2022.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "tanh",
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        check_activation("AdditiveAttention", "additive", activation)
        check_dropout("AdditiveAttention", dropout)
        self.query_dim = query_dim
        self.key_dim = key_dim
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.negative_slope = float(negative_slope)
        self.dropout = float(dropout)
        self.q_proj = nn.Linear(query_dim, hidden_dim, bias, device, dtype)
        self.k_proj = nn.Linear(key_dim, hidden_dim, False, device, dtype)
        self.score_weight = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections: Xavier uniform, bias 0; score weight: within 1 / sqrt(hidden_dim)."""
        nn.init.xavier_uniform_(self.q_proj.weight)
        nn.init.xavier_uniform_(self.k_proj.weight)
        if self.q_proj.bias is not None:
            nn.init.zeros_(self.q_proj.bias)
        init_score_weight(self.score_weight)

    def project_key(self, key: Tensor) -> Tensor:
        """key (..., Lk, key_dim) -> (..., Lk, hidden_dim), to be used again for every step of a
        decoder by :meth:`attend`."""
        return self.k_proj(key)

    def attend(
        self,
        query: Tensor,
        projected_key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward` with keys that :meth:`project_key` has projected."""
        hidden = self.q_proj(query)
        context = additive_attention(
            hidden, projected_key, value, self.score_weight, attn_mask,
            self.dropout if self.training else 0.0, key_lengths=key_lengths,
            activation=self.activation, negative_slope=self.negative_slope,
        )  # fmt: skip
        weights: Tensor | None = None
        if need_weights:
            weights = attention_weights(
                hidden, projected_key, self.score_weight, attn_mask=attn_mask,
                key_lengths=key_lengths, activation=self.activation,
                negative_slope=self.negative_slope,
            )  # fmt: skip
        return context, weights

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, Lq, query_dim), key (B, Lk, key_dim), value (B, Lk, Dv), by default the key ->
        (context (B, Lq, Dv), weights (B, Lq, Lk) or None); or all without B.

        ``attn_mask``: broadcastable to (B, Lq, Lk); boolean (True = attend) or floating (added to
        the score). ``key_lengths`` (B): sample b's keys are padding from ``key_lengths[b]`` on.
        ``need_weights``: also return the weights, before dropout.
        """
        return self.attend(
            query, self.project_key(key), key if value is None else value, attn_mask, key_lengths,
            need_weights,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"dropout={self.dropout:g}" + activation_repr(self.activation, self.negative_slope)
