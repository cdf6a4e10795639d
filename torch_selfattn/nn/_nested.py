"""Nested tensors at the modules' inputs: padded on the way in, nested again on the way out.

Padding and lengths are what the operators take, so a batch of nested inputs costs what the same
batch costs padded, with ``key_lengths``. Gradients flow through both ways.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

__all__ = ["NestedInputs", "encode_nested"]


class NestedInputs:
    """Nested tensors (B, L*, D) of one call, of the strided or the jagged layout.

    One tensor given several times is padded once and stays one tensor.
    """

    def __init__(self, module: str, batch_first: bool, **tensors: Tensor) -> None:
        shown = ", ".join(
            f"{name} {'is' if x.is_nested else 'is not'} nested" for name, x in tensors.items()
        )
        if not all(x.is_nested for x in tensors.values()):
            names = " and ".join(tensors)
            raise RuntimeError(f"{module}: {names} must all be nested or none (got {shown})")
        if not batch_first:
            raise RuntimeError(
                f"{module}: nested inputs are batch first (got batch_first={batch_first})"
            )
        self._module = module
        self._nested = tensors
        self._padded: dict[int, tuple[Tensor, list[int]]] = {}
        batches = {name: len(self._pad(name)[1]) for name in tensors}
        if len(set(batches.values())) != 1:
            raise RuntimeError(
                f"{module}: nested inputs must have the same batch size (got {batches})"
            )

    def refuse(self, **arguments: Tensor | None) -> None:
        """Raises if one of these is given: the nested tensor says what is padding."""
        for name, argument in arguments.items():
            if argument is not None:
                raise NotImplementedError(
                    f"{self._module}: {name} is not supported with NestedTensor input "
                    f"(got {name}={list(argument.shape)})"
                )

    def _pad(self, name: str) -> tuple[Tensor, list[int]]:
        x = self._nested[name]
        if id(x) not in self._padded:
            jagged: Any = x  # torch has no type for it
            if x.layout == torch.jagged:
                ragged = x.dim() == 3 and isinstance(x.shape[1], torch.SymInt)
                if not ragged or jagged.lengths() is not None:
                    raise NotImplementedError(
                        f"{self._module}: a jagged {name} must be (B, L*, D) without holes "
                        f"(got {name}={tuple(x.shape)}, holes: {jagged.lengths() is not None})"
                    )
            parts = x.unbind()
            if x.dim() != 3 or len({part.size(-1) for part in parts}) != 1:
                raise RuntimeError(
                    f"{self._module}: a nested {name} must have sequences (L, D) of one D "
                    f"(got {[list(part.shape) for part in parts]})"
                )
            lengths = [part.size(0) for part in parts]
            self._padded[id(x)] = pad_sequence(list(parts), batch_first=True), lengths
        return self._padded[id(x)]

    def padded(self, name: str) -> Tensor:
        """(B, L, D), zeros where a sequence is shorter."""
        return self._pad(name)[0]

    def lengths(self, name: str) -> Tensor:
        """(B) int64, on the device of the inputs."""
        padded, lengths = self._pad(name)
        return torch.tensor(lengths, device=padded.device)

    def check_same_lengths(self, name: str, other: str) -> None:
        a, b = self._pad(name)[1], self._pad(other)[1]
        if a != b:
            raise RuntimeError(
                f"{self._module}: nested {name} and {other} must have the same lengths "
                f"(got {name}: {a}, {other}: {b})"
            )

    def nest(self, x: Tensor, like: str) -> Tensor:
        """x (B, L, D) -> nested, with the lengths and the layout of that input."""
        nested: Any = self._nested[like]
        lengths = self._pad(like)[1]
        parts = [part[:length] for part, length in zip(x.unbind(), lengths, strict=True)]
        if nested.layout == torch.jagged:
            # The same tensor of offsets, which is how torch knows that the lengths are the same.
            return torch.nested.nested_tensor_from_jagged(torch.cat(parts), nested.offsets())
        return torch.nested.as_nested_tensor(parts)


def encode_nested(
    encoder: nn.Module, batch_first: bool, src: Tensor, is_causal: bool, **others: Tensor | None
) -> Tensor:
    """A transformer encoder (layer) for a nested ``src``; none of ``others`` may be given."""
    inputs = NestedInputs(type(encoder).__name__, batch_first, src=src)
    inputs.refuse(**others)
    # Not encoder(...), which would run its hooks twice.
    output = encoder.forward(
        inputs.padded("src"), is_causal=is_causal, key_lengths=inputs.lengths("src")
    )
    return inputs.nest(output, "src")
