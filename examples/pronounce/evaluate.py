"""Phoneme and word error rates, overall and by word length; alignment monotonicity.

    python -m examples.pronounce.evaluate examples/pronounce/runs/default/checkpoint.pt

A word with several listed pronunciations is compared with the nearest one. PER is the number of
edits to it over its length, WER the share of words that equal none of them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .data import (
    END,
    PHONES,
    Dictionary,
    encode_words,
    load_dictionary,
    split_dictionary,
)
from .model import Pronouncer

# Lower ends of the word-length classes in the table.
LENGTH_CLASSES = (1, 5, 7, 9, 11, 13)

Decode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass
class Pronounced:
    """A word's phones and the attention of each phone over the letters, (phones, letters)."""

    phones: list[str]
    alignment: Tensor


@dataclasses.dataclass
class Score:
    words: int = 0
    word_errors: int = 0
    phones: int = 0
    phone_errors: int = 0

    def add(self, hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        errors, length = min((edit_distance(hypothesis, ref), len(ref)) for ref in references)
        self.words += 1
        self.word_errors += errors > 0
        self.phones += length
        self.phone_errors += errors

    @property
    def per(self) -> float:
        """Phoneme error rate in percent."""
        return 100.0 * self.phone_errors / max(1, self.phones)

    @property
    def wer(self) -> float:
        """Word error rate in percent."""
        return 100.0 * self.word_errors / max(1, self.words)

    def __str__(self) -> str:
        return f"PER {self.per:.2f} %, WER {self.wer:.1f} % on {self.words} words"


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance: substitutions, insertions and deletions cost 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[j - 1] + 1))
    return row[-1]


def phone_names(ids: Sequence[int]) -> list[str]:
    """Phones up to the END id."""
    length = ids.index(END) if END in ids else len(ids)
    return [PHONES[i - 3] for i in ids[:length]]


@torch.inference_mode()
def pronounce_words(
    decode: Decode, words: Sequence[str], batch_size: int = 256, device: str = "cpu"
) -> dict[str, Pronounced]:
    """Greedy pronunciations; `decode` maps (letters, lengths) to (phone ids, alignments)."""
    by_length = sorted(set(words), key=lambda word: (len(word), word))
    result = {}
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        letters, lengths = encode_words(batch)
        ids, alignments = decode(letters.to(device), lengths.to(device))
        for word, row, alignment in zip(batch, ids.tolist(), alignments.cpu(), strict=True):
            phones = phone_names(row)
            result[word] = Pronounced(phones, alignment[: len(phones), : len(word)])
    return {word: result[word] for word in words}


def total_score(hypotheses: Mapping[str, Sequence[str]], references: Dictionary) -> Score:
    score = Score()
    for word, hypothesis in hypotheses.items():
        score.add(hypothesis, references[word])
    return score


def scores_by_length(
    hypotheses: Mapping[str, Sequence[str]], references: Dictionary
) -> dict[str, Score]:
    """Scores of the words with 1-4, 5-6, ... 13 and more letters."""
    ends = [f"-{high - 1}" for high in LENGTH_CLASSES[1:]] + [" or more"]
    scores = {f"{low}{end}": Score() for low, end in zip(LENGTH_CLASSES, ends, strict=True)}
    names = list(scores)
    for word, hypothesis in hypotheses.items():
        index = sum(len(word) >= low for low in LENGTH_CLASSES) - 1
        scores[names[index]].add(hypothesis, references[word])
    return scores


def monotone_share(pronounced: Mapping[str, Pronounced]) -> float:
    """Share of steps, in percent, whose most attended letter is not before the previous one."""
    steps = forward = 0
    for item in pronounced.values():
        position = item.alignment.argmax(dim=-1)
        steps += max(0, len(position) - 1)
        forward += int((position[1:] >= position[:-1]).sum())
    return 100.0 * forward / max(1, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--dictionary", type=Path, help="a file in the format of cmudict.dict")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = Pronouncer.load(args.checkpoint).to(args.device).eval()
    references = split_dictionary(load_dictionary(args.dictionary), args.split)
    pronounced = pronounce_words(model.greedy, list(references), device=args.device)
    hypotheses = {word: item.phones for word, item in pronounced.items()}
    for name, score in scores_by_length(hypotheses, references).items():
        print(f"{name:>10} letters: {score}")
    print(f"{args.split}: {total_score(hypotheses, references)}")
    print(f"alignment: {monotone_share(pronounced):.1f} % of the steps are monotone")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
