"""``attn_implementation="torch_selfattn"`` for models of Hugging Face's transformers::

    import transformers
    from torch_selfattn.integrations import huggingface

    huggingface.register()
    model = transformers.AutoModel.from_pretrained(..., attn_implementation="torch_selfattn")
    # or, of a model that is there:
    model.set_attn_implementation("torch_selfattn")

It serves every model that transformers computes through its attention interface (those that take
``attn_implementation="sdpa"``). Importing this module does not import transformers.
"""

from typing import Any

import torch
from torch import Tensor

from ..functional import attention_weights, dot_product_attention

__all__ = ["NAME", "attention_forward", "register"]

#: What the implementation is registered as.
NAME = "torch_selfattn"

# Arguments of some models by which attention would be another function.
_UNSUPPORTED = {
    "softcap": "a soft cap on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse attention to chosen keys",
    "block_indices": "sparse attention to chosen blocks of keys",
}


def register() -> None:
    """Makes the implementation known to transformers as ``"torch_selfattn"``. May be called again.

    Errors: ImportError if transformers is not there or has no attention and mask interfaces.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "huggingface.register: transformers with AttentionInterface and AttentionMaskInterface "
            f"must be installed (got {error})"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    # Boolean masks, True = attend, and none at all where `is_causal` says the same.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _add_position_bias(position_bias: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return position_bias.masked_fill(attention_mask.logical_not(), -torch.inf)
    return position_bias + attention_mask


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for each attention layer.

    query (B, H, Lq, E), key (B, Hk, Lk, E), value (B, Hk, Lk, Ev) -> (B, Lq, H, Ev), and the
    weights (B, H, Lq, Lk), before dropout, with ``output_attentions=True``, else None.

    * The key heads are not repeated: query head h reads key head h // (H // Hk).
    * ``attention_mask``: boolean (True = attend) or floating, (B, 1 or H, Lq, Lk). Without one
      attention is causal if ``is_causal`` or, that being None, ``module.is_causal`` says so and
      there is more than one query (a single one is a step of decoding and sees all keys).
    * Padding and sliding windows arrive in the mask; so do the positions that a cache shifts.
    * ``position_bias``, as of T5: added to the scores, with gradient.

    A query that may attend to nothing, as the padding on the left of a prompt, gives 0; eager
    attention gives it the mean of all values. It makes no difference to any token that counts.

    Errors: NotImplementedError for a soft cap on the scores, for attention sinks and for sparse
    attention, which the operators do not have.
    """
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"torch_selfattn attention: {meaning} is not supported; use "
                f'attn_implementation="eager" (got {name} from {type(module).__name__})'
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = attention_mask is None and query.size(2) > 1 and is_causal
    if position_bias is not None:
        attention_mask = _add_position_bias(position_bias, attention_mask)
    # As a window, because that goes together with a position bias.
    window_right = 0 if causal else -1
    grouped = key.size(1) != query.size(1)
    output = dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=grouped,
        window_right=window_right,
    )  # fmt: skip
    weights: Tensor | None = None
    if kwargs.get("output_attentions"):
        weights = attention_weights(
            query, key, attn_mask=attention_mask, scale=scaling, enable_gqa=grouped,
            window_right=window_right,
        )  # fmt: skip
    return output.transpose(1, 2).contiguous(), weights
