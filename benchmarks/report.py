"""Tables and pictures of what bench.py wrote.

    python benchmarks/report.py benchmarks/results/*.jsonl --images docs/images
    python benchmarks/report.py benchmarks/results/*.jsonl --update README.md docs/benchmarks.md

Every measured figure in the documents comes from here: --update replaces what stands between the
lines `<!-- benchmarks: NAME -->` and `<!-- end -->`, NAME being `summary` or `tables`.
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
PEERS = {
    "dot": ("sdpa",),
    "additive": ("compile", "eager"),
    "multi_head": ("mha",),
    "rotary": ("compile", "eager"),
}
OPS = {
    "dot": "Dot product against `F.scaled_dot_product_attention`",
    "additive": "Additive score against its composition",
    "multi_head": "`multi_head_attention` against `nn.MultiheadAttention`",
    "rotary": "`rotary_embedding` against its composition",
}


def read(paths: Iterable[Path]) -> tuple[list[Record], list[Record]]:
    """Environments and results; of one that was repeated, the last."""
    environments: list[Record] = []
    results: dict[str, Record] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["type"] == "environment":
                environments.append(record)
                continue
            identity = ("type", "problem", "dtype", "device", "threads", "pass", "candidate")
            # Time and memory may have been measured in runs of their own.
            key = str([record.get(k) for k in identity])
            known = {k: v for k, v in record.items() if v is not None}
            results[key] = {**results.get(key, {}), **known}
    return environments, list(results.values())


def measurements(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if r["type"] == "measurement"]


def select(records: Iterable[Record], op: str, one_pass: str | None = None) -> list[Record]:
    return [
        r
        for r in measurements(records)
        if r["problem"]["op"] == op and (one_pass is None or r["pass"] == one_pass)
    ]


def in_order(records: Iterable[Record]) -> list[Record]:
    """Plain problems first, then causal and masked ones; short before long."""
    keys = ("mask", "causal", "kv_heads", "batch", "heads", "head_dim", "key_length")
    return sorted(records, key=lambda r: [r["problem"][k] for k in keys])


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def milliseconds(record: Record | None) -> str:
    if record is None:
        return ""
    if "seconds" not in record:
        if record["status"] == "ok":  # only its memory was measured
            return ""
        return "does not fit" if "memory" in record.get("reason", "") else record["status"]
    return three_digits(1e3 * record["seconds"]["median"])


def table(records: list[Record], op: str) -> list[str]:
    """One line per problem and pass: milliseconds, and ours against the fastest of all peers."""
    names = {"ours": "ours", "sdpa": "SDPA", "mha": "nn.MultiheadAttention", **NAMES}
    candidates = ["ours", *PEERS[op]]
    lines = [
        "| " + " | ".join(["", "", *(names[c] for c in candidates), "speed-up"]) + " |",
        "|---|---|" + "--:|" * (len(candidates) + 1),
    ]
    for (label, one_pass), row in _rows(records, op).items():
        speedup = row.get("ours", {}).get("speedup")
        cells = [milliseconds(row.get(c)) for c in candidates]
        cells.append("" if speedup is None else f"{speedup:.2g}x")
        if any(cells):
            lines.append(f"| {label} | {TITLES[one_pass]} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def memory_table(records: list[Record]) -> list[str]:
    """Peak memory of ours beside what inputs and results take by themselves."""
    lines = ["| | | on top of the inputs | all / (inputs and results) |", "|---|---|--:|--:|"]
    for r in in_order(measurements(records)):
        memory = r.get("memory", {})
        if r["candidate"] == "ours" and "peak_bytes" in memory:
            everything = memory["input_bytes"] + memory["peak_bytes"]
            ratio = everything / (memory["input_bytes"] + memory["result_bytes"])
            mib = memory["peak_bytes"] / 2**20
            title = f"{r['problem']['op']} {r['label']} | {TITLES[r['pass']]}"
            lines.append(f"| {title} | {mib:.1f} MiB | {ratio:.2f} |")
    return lines if len(lines) > 2 else []


def summary(records: list[Record]) -> list[str]:
    """Ours and its fastest peer by length, of the shape that was measured at most lengths."""
    timed = [r for r in in_order(records) if "speedup" in r and _square(r)]
    timed = [r for op in OPS for r in select(timed, op) if r["candidate"] == "ours"]
    shapes = [_shape(r) for r in timed]
    timed = [r for r in timed if _shape(r) == max(shapes, key=shapes.count)]
    lengths = sorted({r["problem"]["key_length"] for r in timed})
    rows: dict[str, dict[int, str]] = {}
    names = {"sdpa": "SDPA", "compile": "compile", "eager": "eager", "keras": "Keras' formula"}
    for r in timed:
        score = "dot product" if r["problem"]["op"] == "dot" else r["problem"]["op"]
        title = f"{score}{', causal' if r['problem']['causal'] else ''}, {TITLES[r['pass']]}"
        ours = 1e3 * r["seconds"]["median"]
        rows.setdefault(title, {})[r["problem"]["key_length"]] = (
            f"{three_digits(ours)} / {three_digits(ours * r['speedup'])} "
            f"{names[r['best_peer']]}: **{r['speedup']:.2g}x**"
        )
    rows = {title: row for title, row in rows.items() if len(row) == len(lengths)}
    if not rows:
        return []
    heads, head_dim = _shape(timed[0])
    head = [f"ms, {heads} heads of {head_dim}, {_where(timed)}", *(f"L = {n}" for n in lengths)]
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "---|" * len(lengths),
        *(
            f"| {title} | " + " | ".join(row.get(n, "") for n in lengths) + " |"
            for title, row in rows.items()
        ),
    ]


def sources(environments: list[Record]) -> str:
    """Machines and versions, one paragraph for all runs that differ in time and load only."""
    seen: dict[str, str] = {}
    for e in environments:
        text = in_words(e).replace("\n", "; ")
        key = str({k: v for k, v in e.items() if k not in ("time", "load", "set")})
        seen.setdefault(key, text)
    return "\n\n".join(seen.values())


def documents(environments: list[Record], records: list[Record]) -> dict[str, str]:
    """The texts that --update inserts, by name."""
    blocks = []
    for op, title in OPS.items():
        lines = table(records, op)
        if lines:
            blocks.append("\n".join([f"{title}, milliseconds (median):", "", *lines]))
    lines = memory_table(records)
    if lines:
        blocks.append("\n".join(["Peak memory:", "", *lines]))
    imports = [r for r in records if r["type"] == "import"]
    if imports:
        seconds = imports[-1]["seconds"]["median"]
        blocks.append(f"`import torch_selfattn` takes {seconds:.3f} s beyond `import torch`.")
    where = sources(environments)
    return {
        "summary": "\n".join(summary(measurements(records))) + f"\n\n{where}",
        "tables": "\n\n".join([*blocks, where]),
    }


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
    timed = [r for r in in_order(select(records, "dot")) if "seconds" in r]
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
    axis.set_xlabel("speed-up over F.scaled_dot_product_attention")
    axis.set_title(f"Dot-product attention, {_where(timed)}")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)
    return True


def _rows(records: list[Record], op: str) -> dict[tuple[str, str], dict[str, Record]]:
    """(label, pass): candidate: record."""
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for record in in_order(select(records, op)):
        rows.setdefault((record["label"], record["pass"]), {})[record["candidate"]] = record
    return rows


def _shape(record: Record) -> tuple[int, int]:
    return record["problem"]["heads"], record["problem"]["head_dim"]


def _plain(record: Record) -> bool:
    return not record["problem"]["causal"] and not record["problem"]["mask"]


def _square(record: Record) -> bool:
    """One sequence attending to itself, without a mask or grouped heads."""
    p = record["problem"]
    return (
        p["op"] in ("dot", "additive")
        and p["batch"] == 1
        and p["query_length"] == p["key_length"]
        and not p["mask"]
        and not p["kv_heads"]
    )


def _where(records: list[Record]) -> str:
    threads = {r["threads"] for r in records}
    places = sorted({f"{r['dtype']}, {r['device']}" for r in records})
    return "; ".join(places) + (f", {threads.pop()} threads" if len(threads) == 1 else "")


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)


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
        draw_additive(records, options.images / "additive_time.png")
        draw_speedup(records, options.images / "dot_speedup.png")


if __name__ == "__main__":
    main()
