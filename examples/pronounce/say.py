"""Pronounces words with an exported TorchScript model, or with a checkpoint of train.py.

    python -m examples.pronounce.say examples/pronounce/runs/default/pronounce.pt knight

The C++ program in cpp/ does the same without Python.
"""

import argparse
import sys
from pathlib import Path

import torch

from .export import WordPronouncer, load_torchscript
from .model import Pronouncer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="pronounce.pt or checkpoint.pt")
    parser.add_argument("words", nargs="+")
    args = parser.parse_args()
    try:
        if args.model.name.startswith("checkpoint"):
            model = WordPronouncer(Pronouncer.load(args.model).eval())
        else:
            model = load_torchscript(args.model)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = 0
    for word in args.words:
        try:
            with torch.inference_mode():
                phones, _ = model(word)
            print(word, "", *phones)
        except (ValueError, torch.jit.Error) as error:
            # TorchScript puts the original message last, behind its own trace.
            message = str(error).strip().splitlines()[-1].removeprefix("builtins.ValueError: ")
            print(f"error: {message}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
