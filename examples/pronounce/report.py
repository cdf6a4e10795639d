"""The results as Markdown: table by word length beside the peer, agreement, machine."""

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .data import Dictionary
from .evaluate import Score, scores_by_length, total_score

PEER_CAVEAT = (
    "g2p-en's training words are not documented and its error is the same on our training and "
    "test words, so it has very probably seen the words of this table; our model has not."
)


def length_table(
    ours: Mapping[str, Sequence[str]],
    peer: Callable[[str], list[str]] | None,
    references: Dictionary,
) -> str:
    """PER and WER in percent by word length, ours and the peer's."""
    theirs = {word: peer(word) for word in ours} if peer else {}

    def row(name: str, words: int, *scores: Score) -> str:
        cells = [f"{score.per:.2f} | {score.wer:.1f}" for score in scores]
        return f"| {name} | {words} | {' | '.join(cells)} |"

    columns = "PER | WER" + (" | g2p-en PER | g2p-en WER" if peer else "")
    lines = [f"| letters | words | {columns} |", "|" + " ---: |" * (columns.count("|") + 3)]
    our_scores = scores_by_length(ours, references)
    their_scores = scores_by_length(theirs, references)
    for name, score in our_scores.items():
        lines.append(row(name, score.words, score, *([their_scores[name]] if peer else [])))
    total = total_score(ours, references)
    their_total = [total_score(theirs, references)] if peer else []
    lines.append(row("all", total.words, total, *their_total))
    if peer:
        lines += ["", PEER_CAVEAT]
    return "\n".join(lines)


def machine() -> str:
    """CPU model, threads and versions, to stand beside every measured figure."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        family = re.search(r"cpu family\s*:\s*(.+)", cpuinfo.read_text())
        cpu = f"{found[1]} (family {family[1]})" if found and family else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu}, threads: {torch.get_num_threads()}{gpu}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
