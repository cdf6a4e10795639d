"""The README's table of operators and ways in, from what `pytest --ways FILE` has written.

    python tools/ways_table.py FILE [--update README.md]

A cell is the number of tests that passed. A failed one is an error, and no table is written.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/python"))

import ways

BEGIN, END = "<!-- ways -->\n", "<!-- end ways -->\n"


def table(outcomes: dict[str, dict[str, dict[str, int]]]) -> str:
    for operator, by_way in outcomes.items():
        for way, counts in by_way.items():
            if counts.get("failed"):
                raise ValueError(f"{operator} by {way}: {counts['failed']} tests failed")
    lines = [["operator", *ways.WAYS], ["---", *["---:"] * len(ways.WAYS)]]
    for operator in ways.OPERATORS:
        counts = [outcomes.get(operator, {}).get(way, {}).get("passed", 0) for way in ways.WAYS]
        lines.append([f"`{operator}`", *(str(n) if n else "" for n in counts)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def replace(text: str, between: str, name: str) -> str:
    head, found, rest = text.partition(BEGIN)
    _, ends, tail = rest.partition(END)
    if not found or not ends:
        raise ValueError(f"{name} has no place for the table, {BEGIN.strip()} … {END.strip()}")
    return head + BEGIN + between + END + tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--update", type=Path, help="the document that has the table")
    options = parser.parse_args()
    made = table(json.loads(options.file.read_text()))
    if options.update is None:
        print(made, end="")
    else:
        options.update.write_text(replace(options.update.read_text(), made, str(options.update)))


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
