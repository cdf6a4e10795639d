"""``F.scaled_dot_product_attention`` computed by this package."""

from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from ..functional import dot_product_attention

__all__ = ["use_in_scaled_dot_product_attention"]


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _OURS.get(func, func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.is_nested or key.is_nested or value.is_nested:
        raise NotImplementedError(
            "scaled_dot_product_attention: torch_selfattn takes no nested tensors here (got "
            f"query.is_nested={query.is_nested}, key.is_nested={key.is_nested}, "
            f"value.is_nested={value.is_nested})"
        )
    offset = 0
    if isinstance(attn_mask, CausalBias):  # its elements mean nothing
        if is_causal:
            raise ValueError(
                "scaled_dot_product_attention: CausalBias should not be used with causal=True "
                f"(got is_causal={is_causal})"
            )
        if attn_mask.variant == CausalVariant.LOWER_RIGHT:
            offset = attn_mask.seq_len_kv - attn_mask.seq_len_q
        attn_mask, is_causal = None, True
    return dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset=offset
    )


def _with_our_attention(function: Any) -> Callable[..., Any]:
    """A copy of a function of PyTorch's that calls ours.

    A function that looks for modes by itself is handed to them as a whole and then runs without
    them, so they never see the attention inside of it.
    """
    names = {
        **function.__globals__,
        "scaled_dot_product_attention": _attention,
        "has_torch_function": lambda tensors: False,
    }
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_OURS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _with_our_attention(F.multi_head_attention_forward),
}


def use_in_scaled_dot_product_attention() -> TorchFunctionMode:
    """A context manager in which ``F.scaled_dot_product_attention`` is
    :func:`torch_selfattn.dot_product_attention`, whoever calls it and by whatever name::

        with use_in_scaled_dot_product_attention():
            output = model(x)

    All arguments keep their meaning. That includes ``nn.MultiheadAttention`` and
    ``nn.TransformerEncoderLayer``, whose fused inference path PyTorch leaves aside in a mode
    (``need_weights=True`` computes without this function, so it is not touched).

    * It holds for the thread that enters it, and not for threads that this one starts.
    * The backward pass needs no ``with``: it belongs to the forward that was run.
    * It may be nested and entered again.
    * ``torch.compile``: around a call of a compiled function, and inside of one; the operator is in
      the graph, and leaving the block compiles anew. ``torch.export`` too.
    * Functions that were scripted or exported before do not see it.
    * What PyTorch takes and this package does not (nested tensors) is a NotImplementedError.

    It costs about a microsecond for every PyTorch function called inside of it
    (it is a ``torch.overrides.TorchFunctionMode``).
    """
    return _Mode()
