"""Tables and pictures of what bench.py wrote.

    python benchmarks/report.py benchmarks/results/cpu.jsonl --images docs/images
    python benchmarks/report.py benchmarks/results/cpu.jsonl --readme README.md

Every figure in the README comes from here: --readme replaces what stands between the lines
`<!-- benchmarks: begin -->` and `<!-- benchmarks: end -->`.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import in_words

Record = dict[str, Any]

# Fixed colours, safe for colour-blind readers: a candidate looks the same in every picture.
COLOURS = {"ours": "#0072B2", "eager": "#D55E00", "compile": "#E69F00", "keras": "#999999"}
NAMES = {"eager": "eager PyTorch", "compile": "torch.compile", "keras": "Keras' formula"}
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def read(paths: Iterable[Path]) -> tuple[list[Record], list[Record]]:
    """Environments and measurements; of a measurement that was repeated, the last."""
    environments: list[Record] = []
    measurements: dict[tuple[str, ...], Record] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["type"] == "environment":
                environments.append(record)
            elif record["type"] == "measurement":
                keys = ("label", "dtype", "device", "pass", "candidate")
                key = (record["problem"]["op"], *(str(record[k]) for k in keys))
                measurements[key] = record
    return environments, list(measurements.values())


def select(records: Iterable[Record], op: str, one_pass: str | None = None) -> list[Record]:
    return [
        r
        for r in records
        if r["problem"]["op"] == op and (one_pass is None or r["pass"] == one_pass)
    ]


def milliseconds(record: Record | None) -> str:
    if record is None:
        return ""
    if "seconds" not in record:
        return "does not fit" if "memory" in record.get("reason", "") else record["status"]
    value = 1e3 * record["seconds"]["median"]
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(records: list[Record], op: str, candidates: list[str]) -> list[str]:
    """Markdown: one line per problem and pass, milliseconds and the speed-up."""
    names = {"sdpa": "SDPA", "mha": "nn.MultiheadAttention", **NAMES}
    lines = [
        "| " + " | ".join(["", "", *(names.get(c, c) for c in candidates), "faster by"]) + " |",
        "|---|---|" + "--:|" * (len(candidates) + 1),
    ]
    cells: dict[tuple[str, str], dict[str, Record]] = {}
    for record in select(records, op):
        cells.setdefault((record["label"], record["pass"]), {})[record["candidate"]] = record
    for (label, one_pass), row in cells.items():
        speedup = row.get("ours", {}).get("speedup")
        lines.append(
            f"| {label} | {TITLES[one_pass]} | "
            + " | ".join(milliseconds(row.get(c)) for c in candidates)
            + f" | {'' if speedup is None else f'{speedup:.2g}x'} |"
        )
    return lines


def markdown(environments: list[Record], records: list[Record]) -> str:
    """The tables, with the machine and the versions they were measured on."""
    sections = [
        ("dot", ["ours", "sdpa"], "Dot product against `F.scaled_dot_product_attention`"),
        ("additive", ["ours", "compile", "eager"], "Additive score against its composition"),
        ("multi_head", ["ours", "mha"], "`multi_head_attention` against `nn.MultiheadAttention`"),
    ]
    blocks = []
    for op, candidates, title in sections:
        if select(records, op):
            blocks.append(
                "\n".join([f"{title}, milliseconds:", "", *table(records, op, candidates)])
            )
    blocks.append("\n\n".join(dict.fromkeys(in_words(e).replace("\n", "; ") for e in environments)))
    return "\n\n".join(blocks)


def draw_additive(records: list[Record], path: Path) -> bool:
    """Time against length for the additive score; False if there is nothing to draw."""
    import matplotlib.pyplot as plt

    timed = [r for r in select(records, "additive") if "seconds" in r]
    shapes = {(r["problem"]["heads"], r["problem"]["head_dim"]) for r in timed}
    if not timed:
        return False
    heads, head_dim = max(shapes, key=lambda s: sum(_shape(r) == s for r in timed))
    timed = [r for r in timed if _shape(r) == (heads, head_dim) and _plain(r)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, one_pass in zip(axes, TITLES, strict=True):
        for candidate in ("eager", "keras", "compile", "ours"):
            points = sorted(
                (
                    r["problem"]["key_length"],
                    [1e3 * r["seconds"][k] for k in ("q1", "median", "q3")],
                )
                for r in timed
                if r["candidate"] == candidate and r["pass"] == one_pass
            )
            if not points:
                continue
            lengths = [length for length, _ in points]
            low, median, high = zip(*(times for _, times in points), strict=True)
            colour = COLOURS[candidate]
            name = NAMES.get(candidate, "torch_selfattn")
            axis.plot(lengths, median, "o-", color=colour, label=name)
            axis.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel="sequence length L", title=TITLES[one_pass])
        lengths = sorted({r["problem"]["key_length"] for r in timed})
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Additive attention, {heads} heads of {head_dim}, {_where(timed)}")
    _save(figure, path)
    return True


def draw_speedup(records: list[Record], path: Path) -> bool:
    """Speed-up over scaled_dot_product_attention by shape; False if there is nothing to draw."""
    import matplotlib.pyplot as plt

    times: dict[str, dict[tuple[str, str], float]] = {}
    timed = [r for r in select(records, "dot") if "seconds" in r]
    for r in timed:
        cells = times.setdefault(r["label"].removeprefix("B1 "), {})
        cells[r["pass"], r["candidate"]] = r["seconds"]["median"]
    times = {
        label: cells
        for label, cells in times.items()
        if all((one_pass, c) in cells for one_pass in TITLES for c in ("ours", "sdpa"))
    }
    if not times:
        return False
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.34 * len(times)), layout="constrained")
    rows = list(reversed(times.items()))
    for offset, one_pass, colour in (
        (0.2, "forward", "#0072B2"),
        (-0.2, "forward_backward", "#56B4E9"),
    ):
        ratios = [cells[one_pass, "sdpa"] / cells[one_pass, "ours"] for _, cells in rows]
        at = [i + offset for i in range(len(rows))]
        axis.barh(at, ratios, height=0.38, color=colour, label=TITLES[one_pass])
        for y, ratio in zip(at, ratios, strict=True):
            axis.text(ratio, y, f" {ratio:.2g}", va="center", fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.set_xlabel("times faster than F.scaled_dot_product_attention")
    axis.set_title(f"Dot-product attention, {_where(timed)}")
    axis.legend(frameon=False, loc="best")
    axis.margins(x=0.1)
    _save(figure, path)
    return True


def _shape(record: Record) -> tuple[int, int]:
    return record["problem"]["heads"], record["problem"]["head_dim"]


def _plain(record: Record) -> bool:
    return not record["problem"]["causal"] and not record["problem"]["mask"]


def _where(records: list[Record]) -> str:
    threads = {r["threads"] for r in records}
    places = sorted({f"{r['dtype']}, {r['device']}" for r in records})
    return "; ".join(places) + (f", {threads.pop()} threads" if len(threads) == 1 else "")


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)


def update_readme(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{readme} has no lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--images", type=Path, help="folder for the pictures")
    parser.add_argument("--readme", type=Path, help="file in which to replace the tables")
    options = parser.parse_args(arguments)
    environments, records = read(options.results)
    text = markdown(environments, records)
    print(text)
    if options.readme:
        update_readme(options.readme, text)
    if options.images:
        import matplotlib

        matplotlib.use("Agg")
        draw_additive(records, options.images / "additive_time.png")
        draw_speedup(records, options.images / "dot_speedup.png")


if __name__ == "__main__":
    main()
