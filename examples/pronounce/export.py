"""The trained model without its Python source: TorchScript, and AOTInductor packages.

    python -m examples.pronounce.export examples/pronounce/runs/default/checkpoint.pt

writes beside the checkpoint
    pronounce.pt          TorchScript: word -> (phones, attention), greedy loop included
    start.pt2, step.pt2   torch.export + AOTInductor: the two halves of the loop, compiled
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_selfattn.nn import KVCache

from .data import LETTER_ID, PHONES, letter_ids
from .model import GreedyDecoder, Pronouncer


class WordPronouncer(nn.Module):
    """What is scripted: a string in, its phones and their attention over the letters out."""

    def __init__(self, model: Pronouncer) -> None:
        super().__init__()
        self.model = model
        self.letter_id = dict(LETTER_ID)
        self.phone_names = ["<pad>", "<begin>", "<end>", *PHONES]

    def forward(self, word: str) -> tuple[list[str], Tensor]:
        """Phones (T names) and attention (T, L)."""
        ids = torch.tensor([letter_ids(word, self.letter_id)])
        lengths = torch.tensor([ids.size(1)])
        phones, alignment = self.model.greedy(ids, lengths)
        first_row: list[int] = phones[0].tolist()
        names: list[str] = []
        for phone in first_row:
            if phone == self.model.end:
                break
            names.append(self.phone_names[phone])
        return names, alignment[0, : len(names)]


def export_torchscript(model: Pronouncer, path: Path) -> None:
    with warnings.catch_warnings():
        # torch 2.13 and later announce torch.export as the successor of TorchScript.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+.* is deprecated")
        script = torch.jit.script(WordPronouncer(model).eval())
        torch.jit.save(script, str(path))


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    if not path.is_file():
        raise FileNotFoundError(f"no TorchScript file at {path}: run export.py first")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+.* is deprecated")
        return torch.jit.load(str(path))


Program = Callable[..., Any]

# A compiled package takes and gives tensors; a list of caches travels as a flat list of them.
CACHE_TENSORS = len(KVCache._fields)


def flatten(caches: list[KVCache]) -> list[Tensor]:
    return [tensor for cache in caches for tensor in cache]


def unflatten(tensors: list[Tensor]) -> list[KVCache]:
    starts = range(0, len(tensors), CACHE_TENSORS)
    return [KVCache(*tensors[start : start + CACHE_TENSORS]) for start in starts]


class Start(nn.Module):
    """Pronouncer.start as a module of its own, for torch.export."""

    def __init__(self, model: Pronouncer) -> None:
        super().__init__()
        self.model = model

    def forward(self, letters: Tensor, lengths: Tensor) -> list[Tensor]:
        return flatten(self.model.start(letters, lengths))


class Step(nn.Module):
    """Pronouncer.step as a module of its own, for torch.export; it writes into the caches."""

    def __init__(self, model: Pronouncer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, phone: Tensor, position: Tensor, caches: list[Tensor], lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.model.step(phone, position, unflatten(caches), lengths)


def export_programs(model: Pronouncer) -> dict[str, torch.export.ExportedProgram]:
    """Both halves of the greedy loop, for any number of words of any length."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    word = torch.export.Dim("letters", min=1, max=64)
    letters, lengths = torch.ones(3, 7, dtype=torch.long), torch.tensor([7, 5, 6])
    phone, position = torch.ones_like(lengths), torch.zeros_like(lengths)
    with torch.no_grad():
        caches = flatten(model.start(letters, lengths))
        start = torch.export.export(
            Start(model).eval(),
            (letters, lengths),
            dynamic_shapes=({0: batch, 1: word}, {0: batch}),
        )
        # The letters' keys and values are as long as the words, the phones' have a fixed length.
        cache_shapes = [
            {
                i: word if size == letters.size(1) else batch
                for i, size in enumerate(cache.shape)
                if size == letters.size(1) or i == 0
            }
            for cache in caches
        ]
        step = torch.export.export(
            Step(model).eval(),
            (phone, position, caches, lengths),
            dynamic_shapes=({0: batch}, {0: batch}, cache_shapes, {0: batch}),
        )
    return {"start": start, "step": step}


def export_aoti(model: Pronouncer, folder: Path) -> None:
    """Compiles both halves into the libraries start.pt2 and step.pt2."""
    for name, program in export_programs(model).items():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{name}.pt2"))


class CompiledPronouncer(GreedyDecoder):
    """The same greedy loop around the two exported halves."""

    def __init__(self, start: Program, step: Program) -> None:
        super().__init__()
        self.start_program = start
        self.step_program = step

    def start(self, letters: Tensor, lengths: Tensor) -> list[KVCache]:
        return unflatten(self.start_program(letters, lengths))

    def step(
        self, phone: Tensor, position: Tensor, caches: list[KVCache], lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, weights = self.step_program(phone, position, flatten(caches), lengths)
        return logits, weights


def load_aoti(folder: Path) -> CompiledPronouncer:
    for name in ("start.pt2", "step.pt2"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no AOTInductor package at {folder / name}: run export.py first"
            )
    start, step = (
        torch._inductor.aoti_load_package(str(folder / f"{name}.pt2")) for name in ("start", "step")
    )
    return CompiledPronouncer(start, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    model = Pronouncer.load(args.checkpoint).eval()
    folder = args.checkpoint.parent
    export_torchscript(model, folder / "pronounce.pt")
    export_aoti(model, folder)
    print(f"wrote pronounce.pt, start.pt2 and step.pt2 to {folder}")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
