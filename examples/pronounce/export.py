"""The trained model without its Python source: TorchScript, and AOTInductor packages.

    python -m examples.pronounce.export examples/pronounce/runs/default/checkpoint.pt

writes beside the checkpoint
    pronounce.pt                 TorchScript: word -> (phones, attention), greedy loop included
    encoder.pt2, decoder.pt2     torch.export + AOTInductor: the two halves as compiled libraries
"""

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

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


class Encoder(nn.Module):
    """Pronouncer.encode as a module of its own, for torch.export."""

    def __init__(self, model: Pronouncer) -> None:
        super().__init__()
        self.model = model

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        return self.model.encode(letters, lengths)


class Decoder(nn.Module):
    """Pronouncer.decode as a module of its own, for torch.export."""

    def __init__(self, model: Pronouncer) -> None:
        super().__init__()
        self.model = model

    def forward(self, phones: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.decode(phones, memory, lengths)


def export_aoti(model: Pronouncer, folder: Path) -> None:
    """Compiles both halves for any batch size, word length and number of phones so far."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    word = torch.export.Dim("letters", min=1, max=64)
    steps = torch.export.Dim("phones", min=1, max=64)
    letters, lengths = torch.ones(3, 7, dtype=torch.long), torch.tensor([7, 5, 6])
    phones = torch.ones(3, 4, dtype=torch.long)
    with torch.no_grad():
        memory = model.encode(letters, lengths)
        encoder = torch.export.export(
            Encoder(model).eval(),
            (letters, lengths),
            dynamic_shapes=({0: batch, 1: word}, {0: batch}),
        )
        decoder = torch.export.export(
            Decoder(model).eval(),
            (phones, memory, lengths),
            dynamic_shapes=({0: batch, 1: steps}, {0: batch, 1: word}, {0: batch}),
        )
        for program, name in ((encoder, "encoder.pt2"), (decoder, "decoder.pt2")):
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / name))


class CompiledPronouncer(GreedyDecoder):
    """The same greedy loop around the two compiled halves."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        for name in ("encoder.pt2", "decoder.pt2"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no AOTInductor package at {folder / name}")
        self.encode = torch._inductor.aoti_load_package(str(folder / "encoder.pt2"))
        self.decode = torch._inductor.aoti_load_package(str(folder / "decoder.pt2"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    model = Pronouncer.load(args.checkpoint).eval()
    folder = args.checkpoint.parent
    export_torchscript(model, folder / "pronounce.pt")
    export_aoti(model, folder)
    print(f"wrote pronounce.pt, encoder.pt2 and decoder.pt2 to {folder}")


if __name__ == "__main__":
    main()
