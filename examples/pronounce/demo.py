"""The whole job: train, evaluate, export, build the C++ program, compare, draw.

    python -m examples.pronounce.demo                  about 5 minutes on two cores
    python -m examples.pronounce.demo --recipe full    up to an hour

A second run goes on where the first one was stopped and trains nothing that is trained already;
--fresh starts over.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from . import cpp_program, evaluate, export, figure, report, train
from .data import load_dictionary, split_dictionary, subset
from .model import Pronouncer
from .peer import load_peer

AGREEMENT_WORDS = 500
SPOKEN_WORDS = ("hello", "knightsbridge", "tomato", "pytorch", "attention")

Phones = Mapping[str, list[str]]


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def compare(model: Pronouncer, folder: Path, program: Path, words: list[str]) -> dict[str, int]:
    """How many words each exported form pronounces differently from the eager model."""
    eager = phones_of(evaluate.pronounce_words(model.greedy, words))
    script = export.load_torchscript(folder / "pronounce.pt")
    compiled = export.load_aoti(folder)
    with torch.inference_mode():
        others: dict[str, Phones] = {
            "TorchScript": {word: script(word)[0] for word in words},
            "AOTInductor": phones_of(evaluate.pronounce_words(compiled.greedy, words)),
            "C++": cpp_program.run(program, folder / "pronounce.pt", words),
        }
    return {
        name: sum(phones[word] != eager[word] for word in words) for name, phones in others.items()
    }


def phones_of(pronounced: Mapping[str, evaluate.Pronounced]) -> dict[str, list[str]]:
    return {word: item.phones for word, item in pronounced.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=train.RECIPES, default="default")
    parser.add_argument("--output", type=Path, help="folder for everything written (runs/RECIPE)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the training")
    parser.add_argument("--fresh", action="store_true", help="train again from the beginning")
    parser.add_argument("--dictionary", type=Path, help="a file in the format of cmudict.dict")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    args = parser.parse_args()
    folder = args.output or train.RUNS / args.recipe
    start = time.monotonic()

    heading(f"training ({args.recipe} recipe); Ctrl-C stops, the same command goes on")
    trainer = train.run(
        args.recipe, folder, not args.fresh, args.device, args.dictionary, args.epochs
    )
    if not trainer.finished:
        return 130
    model = Pronouncer.load(folder / "checkpoint.pt").eval()

    heading("held-out words, by word length")
    references = split_dictionary(load_dictionary(args.dictionary), "test")
    pronounced = evaluate.pronounce_words(model.greedy, list(references))
    lines = [report.length_table(phones_of(pronounced), load_peer(), references)]
    lines.append(
        f"\n{evaluate.monotone_share(pronounced):.1f} % of the alignment steps are monotone."
    )
    print("\n".join(lines))

    heading("export: TorchScript and AOTInductor")
    export.export_torchscript(model, folder / "pronounce.pt")
    export.export_aoti(model, folder)
    print(f"{folder}/pronounce.pt, start.pt2, step.pt2")

    heading("C++ program")
    program = cpp_program.build()
    print(f"{program} {folder / 'pronounce.pt'} {' '.join(SPOKEN_WORDS)}")
    for word, phones in cpp_program.run(program, folder / "pronounce.pt", SPOKEN_WORDS).items():
        print(f"  {word}: {' '.join(phones)}")

    words = list(subset(references, AGREEMENT_WORDS))
    heading(f"the same {len(words)} words by every road")
    differences = compare(model, folder, program, words)
    agreement = ", ".join(f"{name} {count}" for name, count in differences.items())
    lines.append(f"\nWords of {len(words)} that differ from the eager model: {agreement}.")
    print(lines[-1].strip())

    heading("alignment figure")
    drawn = figure.unseen(list(figure.WORDS), args.dictionary)
    figure.draw(evaluate.pronounce_words(model.greedy, drawn), folder / "alignment.png")
    print(folder / "alignment.png")

    lines.append(f"\nTraining took {trainer.seconds / 60:.1f} minutes. {report.machine()}.")
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nresults: {folder / 'results.md'} ({(time.monotonic() - start) / 60:.1f} minutes)")
    return 1 if any(differences.values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
