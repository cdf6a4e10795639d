"""The attention modules of a model exchanged for ours, in place."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from .. import nn as ours
from ..nn.transformer import as_activation_module

__all__ = ["replace_attention"]

# A function that is called when nothing can fail any more.
Change = Callable[[], None]


def _multi_head_attention(module: nn.MultiheadAttention) -> Change:
    # On the device meta, so that it costs nothing and draws no random numbers.
    template = ours.MultiHeadAttention(
        module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None,
        module.bias_k is not None, module.add_zero_attn, module.kdim, module.vdim,
        module.batch_first, device="meta",
    )  # fmt: skip
    options = {k: v for k, v in vars(template).items() if k not in vars(nn.Module())}

    def change() -> None:
        state = vars(module)
        # The latter two are plain attributes where they are None, and never otherwise.
        for name in ("_qkv_same_embed_dim", "bias_k", "bias_v"):
            state.pop(name, None)
        state.update(options)
        for name in ("bias_k", "bias_v", "score_weight"):
            module._parameters.setdefault(name, None)
        module.__class__ = ours.MultiHeadAttention  # type: ignore[assignment]

    return change


def _activation(module: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> Any:
    made = as_activation_module(module.activation)
    if isinstance(made, nn.Module) and made is not module.activation:
        made.train(module.training)
    return made


def _encoder_layer(module: nn.TransformerEncoderLayer) -> Change:
    activation = _activation(module)

    def change() -> None:
        module.activation = activation
        module.__class__ = ours.TransformerEncoderLayer  # type: ignore[assignment]

    return change


def _decoder_layer(module: nn.TransformerDecoderLayer) -> Change:
    activation = _activation(module)

    def change() -> None:
        module.activation = activation
        module.batch_first = module.self_attn.batch_first
        module.__class__ = ours.TransformerDecoderLayer  # type: ignore[assignment]

    return change


REPLACEMENTS: dict[type[nn.Module], Callable[..., Change]] = {
    nn.MultiheadAttention: _multi_head_attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerDecoderLayer: _decoder_layer,
}


def replace_attention(
    model: nn.Module, *, subclasses: Literal["refuse", "skip"] = "refuse"
) -> list[str]:
    """Makes every ``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer`` and
    ``nn.TransformerDecoderLayer`` of a model, itself included, one of :mod:`torch_selfattn.nn`.

    The modules change their class and stay the objects that they are. So everything that holds one
    of them or one of their parameters goes on working: optimizers, hooks, modules that are used in
    several places, data types, devices, ``train()`` and ``eval()``, parametrizations of linear
    layers and norms. State dicts keep their keys. Stacks (``nn.TransformerEncoder``,
    ``nn.Transformer``) remain PyTorch's and work with the new layers.

    Args:
        model: any module. Nothing of it is changed if an error is raised.
        subclasses: what to do about a module of a *subclass* of the three, or one whose ``forward``
            has been exchanged or whose own parameters are parametrized, since its forward may do
            something else: ``"refuse"`` raises, ``"skip"`` leaves it as it is. Modules inside of a
            skipped one are replaced all the same.

    Returns:
        The names of the replaced modules, those of ``model.named_modules()`` (``""`` is the model
        itself); a module that is used in several places counts once. An empty list: there was none.

    Errors:
        TypeError: a subclass, see above; the error names all of them.
        ValueError: an option that our module does not take (a dropout outside of 0 to 1).

    What then differs is described in :class:`torch_selfattn.nn.MultiHeadAttention`. Callers should
    give ``need_weights=False``, as PyTorch's layers do, to have what the module is for.
    """
    if subclasses not in ("refuse", "skip"):
        raise ValueError(
            f"replace_attention: subclasses must be 'refuse' or 'skip' (got {subclasses!r})"
        )
    changes: dict[str, Change] = {}
    refused: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, tuple(REPLACEMENTS)):
            continue
        make = REPLACEMENTS.get(type(module))  # type: ignore[arg-type]
        if make is None or "forward" in vars(module):
            what = type(module).__qualname__ if make is None else "its forward was exchanged"
            refused.append(f"{name or 'the model itself'} ({what})")
        else:
            changes[name] = make(module)
    if refused and subclasses == "refuse":
        raise TypeError(
            "replace_attention: modules must be of PyTorch's own classes, not of subclasses, "
            f"unless subclasses='skip' (got {', '.join(refused)})"
        )
    for change in changes.values():
        change()
    return list(changes)
