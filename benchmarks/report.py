"""Tables and pictures of what bench.py wrote.

    python benchmarks/report.py benchmarks/results/cpu_*.jsonl --images docs/images
    python benchmarks/report.py benchmarks/results/cpu_*.jsonl --update README.md docs/benchmarks.md
    python benchmarks/report.py benchmarks/results/cuda_*.jsonl --update docs/hardware.md

Every measured figure in the documents comes from here: --update replaces what stands between the
lines `<!-- benchmarks: NAME -->` and `<!-- end -->`, NAME being `summary` or `tables`.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import figures, tables
from benchmarks.machine import in_words
from benchmarks.records import Record, is_of_grid, measurements, most_threads, read


def sources(environments: list[Record]) -> str:
    """Machines and versions, one paragraph for all runs that differ in time and load only."""
    seen: dict[str, str] = {}
    for e in environments:
        text = in_words(e).replace("\n", "; ")
        key = str({k: v for k, v in e.items() if k not in ("time", "load", "set", "threads")})
        seen.setdefault(key, text)
    return "\n\n".join(seen.values())


def documents(environments: list[Record], records: list[Record]) -> dict[str, str]:
    """The texts that --update inserts, by name."""
    blocks = tables.all_tables(records)
    imports = [r for r in records if r["type"] == "import"]
    if imports:
        seconds = imports[-1]["seconds"]["median"]
        blocks.append(f"`import torch_selfattn` takes {seconds:.3f} s beyond `import torch`.")
    where = sources(environments)
    summary = ["\n".join(tables.summary(records))]
    grid = most_threads([r for r in measurements(records) if is_of_grid(r)])
    means = tables.means(grid)
    if means:
        text = "Dot product, speed-up over `F.scaled_dot_product_attention`, geometric means:"
        summary.append("\n".join([text, "", *means]))
    return {
        "summary": "\n\n".join([*summary, where]),
        "tables": "\n\n".join([*blocks, where]),
    }


def update(path: Path, texts: dict[str, str]) -> None:
    content = path.read_text()
    found = False
    for name, text in texts.items():
        begin, end = f"<!-- benchmarks: {name} -->", "<!-- end -->"
        before, opened, rest = content.partition(begin)
        _, closed, after = rest.partition(end)
        if opened and closed:
            content = f"{before}{begin}\n{text}\n{end}{after}"
            found = True
    if not found:
        raise SystemExit(f"{path} has no lines <!-- benchmarks: NAME --> and <!-- end -->")
    path.write_text(content)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--images", type=Path, help="folder for the pictures")
    parser.add_argument("--update", nargs="+", type=Path, default=[], help="documents")
    options = parser.parse_args(arguments)
    environments, records = read(options.results)
    texts = documents(environments, records)
    print(f"{texts['summary']}\n\n{texts['tables']}")
    for path in options.update:
        update(path, texts)
    if options.images:
        import matplotlib

        matplotlib.use("Agg")
        figures.additive_time(records, options.images / "additive_time.png")
        figures.dot_speedup(records, options.images / "dot_speedup.png")


if __name__ == "__main__":
    main()
