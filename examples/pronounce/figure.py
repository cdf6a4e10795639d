"""Draws which letters each phone attends to, for words that the model has never seen.

python -m examples.pronounce.figure examples/pronounce/runs/default/checkpoint.pt alignment.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, not a window

from matplotlib import pyplot as plt

from .data import load_dictionary, split_of
from .evaluate import Pronounced, pronounce_words
from .model import Pronouncer

# None of them is in the training set; main() checks it.
WORDS = ("knightsbridge", "forethought", "chronicle")


def draw_alignment(axes: plt.Axes, word: str, item: Pronounced) -> matplotlib.image.AxesImage:
    """One panel: letters from left to right, phones from top to bottom."""
    image = axes.imshow(item.alignment.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(word)), list(word), fontsize=11)
    axes.set_yticks(range(len(item.phones)), item.phones, fontsize=9, family="monospace")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    # Thin white lines between the cells.
    axes.set_xticks([x - 0.5 for x in range(1, len(word))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(item.phones))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_color("0.7")
    return image


def draw(pronounced: dict[str, Pronounced], path: Path) -> None:
    """All words side by side, with cells of one size and one scale of color."""
    cell, left, top, bottom, right = 0.28, 0.5, 0.35, 0.1, 0.9  # inches
    rows = max(len(item.phones) for item in pronounced.values())
    width = sum(left + cell * len(word) for word in pronounced) + right
    height = top + cell * rows + bottom
    figure = plt.figure(figsize=(width, height))

    def add_axes(x: float, size_x: float, size_y: float) -> plt.Axes:
        y = height - top - size_y
        return figure.add_axes((x / width, y / height, size_x / width, size_y / height))

    x = 0.0
    for word, item in pronounced.items():
        axes = add_axes(x + left, cell * len(word), cell * len(item.phones))
        image = draw_alignment(axes, word, item)
        x += left + cell * len(word)
    bar = figure.colorbar(image, cax=add_axes(x + 0.25, 0.1, cell * rows))
    bar.set_label("attention weight")
    bar.outline.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def unseen(words: list[str], dictionary: Path | None = None) -> list[str]:
    """The words, after a check that the model was not trained on any of them."""
    listed = load_dictionary(dictionary)
    for word in words:
        if word in listed and split_of(word) == "train":
            raise ValueError(f"'{word}' is in the training set: the figure is for unseen words")
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("words", nargs="*", default=list(WORDS))
    args = parser.parse_args()
    model = Pronouncer.load(args.checkpoint).eval()
    words = unseen(args.words)
    draw(pronounce_words(model.greedy, words), args.image)
    print(f"drew {', '.join(words)} to {args.image}")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
