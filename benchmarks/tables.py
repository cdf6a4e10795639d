"""The tables of the documents, in Markdown. Each function returns [] if nothing was measured."""

import statistics
from collections.abc import Iterable

from benchmarks.records import (
    Record,
    by_candidate,
    groups,
    in_order,
    is_of_grid,
    is_square,
    measurements,
    median,
    most_threads,
    select,
    shape,
    times_faster,
)

TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
NAMES = {
    "ours": "ours", "ours:avx2": "ours, AVX2", "sdpa": "SDPA", "mha": "nn.MultiheadAttention",
    "compile": "torch.compile", "eager": "eager PyTorch", "keras": "Keras' formula",
}  # fmt: skip
SHORT_NAMES = {**NAMES, "compile": "compile", "eager": "eager"}
PEERS = {
    "dot": ("sdpa",),
    "additive": ("ours:avx2", "compile", "eager"),
    "multi_head": ("mha",),
    "multi_head_weights": ("mha",),
    "rotary": ("compile", "eager"),
}
OPS = {
    "dot": "Dot product against `F.scaled_dot_product_attention`",
    "additive": "Additive score against its composition",
    "multi_head": "`multi_head_attention` against `nn.MultiheadAttention`",
    "multi_head_weights": "`nn.MultiHeadAttention` against PyTorch's, with `need_weights`",
    "rotary": "`rotary_embedding` against its composition",
}


def markdown(head: list[str], rows: list[list[str]], text_columns: int = 1) -> list[str]:
    if not rows:
        return []
    rule = "|" + "---|" * text_columns + "--:|" * (len(head) - text_columns)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}x" if value < 99.5 else f"{value:.0f}x"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def milliseconds(record: Record | None) -> str:
    if record is None:
        return ""
    if "seconds" not in record:
        if record["status"] == "ok":  # only its memory was measured
            return ""
        return "does not fit" if "memory" in record.get("reason", "") else record["status"]
    return three_digits(1e3 * median(record))


def where(dtype: str, threads: int) -> str:
    return f"{dtype}, {threads} thread{'s' if threads > 1 else ''}"


def comparison(records: list[Record], op: str) -> list[str]:
    """One line per problem and pass: milliseconds, and ours against the fastest of all peers."""
    rows = by_candidate(in_order(r for r in select(records, op) if not is_of_grid(r)))
    rows = {k: row for k, row in rows.items() if any(not c.startswith("ours") for c in row)}
    known = {c for row in rows.values() for c in row}
    candidates = ["ours", *(c for c in PEERS[op] if c in known)]
    ours = [c for c in candidates if c.startswith("ours")]
    head = [NAMES[c] for c in candidates]
    head += [f"speed-up{NAMES[c].removeprefix('ours')}" for c in ours]
    lines = []
    for (label, one_pass), row in rows.items():
        cells = [milliseconds(row.get(c)) for c in candidates]
        cells += [times(row.get(c, {}).get("speedup")) for c in ours]
        if any(cells):
            lines.append([label, TITLES[one_pass], *cells])
    return markdown(["", "", *head], lines, text_columns=2)


def grid(records: list[Record]) -> list[str]:
    """The dot product by shape: milliseconds and the speed-up over SDPA."""
    cells: dict[tuple[int, int, int], dict[tuple[str, bool], str]] = {}
    for row in by_candidate(r for r in measurements(records) if is_of_grid(r)).values():
        faster = times_faster(row.get("ours"), row.get("sdpa"))
        if faster is None:
            continue
        r = row["ours"]
        p = r["problem"]
        cells.setdefault((p["heads"], p["key_length"], p["head_dim"]), {})[
            r["pass"], p["causal"]
        ] = f"{milliseconds(r)} ({times(faster)})"
    columns = [(one_pass, causal) for one_pass in TITLES for causal in (False, True)]
    head = [f"{'causal, ' if causal else ''}{TITLES[one_pass]}" for one_pass, causal in columns]
    rows = [
        [*(str(number) for number in key), *(row.get(column, "") for column in columns)]
        for key, row in sorted(cells.items())
    ]
    return markdown(["H", "L", "D", *head], rows, text_columns=0)


def means(records: list[Record]) -> list[str]:
    """Geometric means of the speed-up over SDPA, and the least one."""
    rows = []
    of_grid = [r for r in measurements(records) if is_of_grid(r)]
    for (dtype, threads), group in groups(of_grid).items():
        for one_pass, title in TITLES.items():
            faster = {}
            for (label, this_pass), row in by_candidate(in_order(group)).items():
                ratio = times_faster(row.get("ours"), row.get("sdpa"))
                if ratio is not None and this_pass == one_pass:
                    faster[label.removeprefix("B1 ")] = ratio
            if not faster:
                continue
            full = [value for label, value in faster.items() if "causal" not in label]
            causal = [value for label, value in faster.items() if "causal" in label]
            least = min(faster, key=faster.__getitem__)
            found = [
                f"{statistics.geometric_mean(values):.2f}x" if values else ""
                for values in ([*full, *causal], full, causal)
            ]
            place = f"{where(dtype, threads)}, {title}"
            rows.append([place, str(len(faster)), *found, f"{faster[least]:.2f}x ({least})"])
    head = ["", "shapes", "all", "full", "causal", "least"]
    return markdown(head, rows)


def products(records: list[Record]) -> list[str]:
    """Full attention as a share of the rate of matrix products."""
    rows = [
        [
            r["label"],
            f"{where(r['dtype'], r['threads'])}, {TITLES[r['pass']]}",
            f"{r['figures']['rate_flops'] / 1e9:.0f}",
            *(percent(r["figures"].get(name)) for name in ("gemm", "gemm_attention", "fma")),
        ]
        for group in groups(in_order(select(records, "dot"))).values()
        for r in group
        if r["candidate"] == "ours" and "gemm" in r.get("figures", {})
    ]
    head = ["", "", "GFLOP/s", "of `torch.mm`", "of both products, alone", "of the FMA rate"]
    return markdown(head, rows, text_columns=2)


def reading(records: list[Record]) -> list[str]:
    """Decoding steps as a share of the rate of reading."""
    rows = [
        [
            r["label"],
            where(r["dtype"], r["threads"]),
            milliseconds(r),
            f"{r['figures']['rate_read'] / 1e9:.0f}",
            *(percent(r["figures"].get(name)) for name in ("read", "read_large")),
        ]
        for group in groups(in_order(select(records, "dot", "forward"))).values()
        for r in group
        if r["candidate"] == "ours" and "rate_read" in r.get("figures", {})
    ]
    head = ["", "", "ms", "GB/s", "of reading as much", "of reading 256 MiB"]
    return markdown(head, rows, text_columns=2)


def additive(records: list[Record]) -> list[str]:
    """Time per pair and element, the arithmetic's share of it, and what a second thread brings."""
    rows = []
    for group in groups(in_order(select(records, "additive"))).values():
        for (label, one_pass), row in by_candidate(group).items():
            for name in ("ours", "ours:avx2"):
                r = row.get(name, {})
                figures = r.get("figures", {})
                if "ns_per_element" not in figures:
                    continue
                scaling = times_faster(r, row.get(f"{name}@1"))
                rows.append([
                    label,
                    f"{where(r['dtype'], r['threads'])}, {TITLES[one_pass]}",
                    r["implementation"],
                    three_digits(figures["ns_per_element"]),
                    percent(figures.get("arithmetic")),
                    "" if scaling is None else f"{scaling:.2f}x",
                ])  # fmt: skip
    head = [
        "", "", "", "ns per pair and element", "of the arithmetic alone", "speed-up over 1 thread",
    ]  # fmt: skip
    return markdown(head, rows, text_columns=3)


def masks(records: list[Record]) -> list[str]:
    """Time against the pairs that are left, both relative to the problem without a mask."""
    sizes = ("op", "batch", "heads", "query_length", "key_length", "head_dim", "kv_heads")
    full: dict[str, Record] = {}
    lines: dict[str, dict[str, Record]] = {}
    for r in in_order(measurements(records)):
        if r["candidate"] != "ours" or "seconds" not in r or r["threads"] is None:
            continue
        p = r["problem"]
        base = str([*(p[k] for k in sizes), r["dtype"], r["threads"], r["run"]])
        kind = p["mask"] or ("causal" if p["causal"] else "")
        if not kind:
            full[base + r["pass"]] = r
        elif p["op"] in ("dot", "additive") and "pairs" in r and not kind.endswith("float"):
            lines.setdefault(f"{base}|{kind}", {})[r["pass"]] = r
    rows = []
    for key, row in lines.items():
        base, _, kind = key.partition("|")
        shares = {n: times_faster(full.get(base + n), r) for n, r in row.items()}
        first = next(iter(row.values()))
        p = first["problem"]
        if p["batch"] == 1 or not any(shares.values()):  # causal ones of other sets
            continue
        all_pairs = p["batch"] * p["heads"] * p["query_length"] * p["key_length"]
        rows.append([
            p["op"], kind, where(first["dtype"], first["threads"]),
            percent(first["pairs"] / all_pairs), *(percent(shares.get(n)) for n in TITLES),
        ])  # fmt: skip
    head = ["", "", "", "pairs left", *(f"time, {title}" for title in TITLES.values())]
    return markdown(head, rows, text_columns=3)


def machine_limits(records: Iterable[Record]) -> list[str]:
    """What the shares are of: each limit's rates in all places where it was measured."""
    rates: dict[tuple[str, str, int], list[float]] = {}
    for r in records:
        if r["type"] == "machine_limit" and "rate" in r:
            name = r["candidate"].removeprefix("limit:")
            rates.setdefault((name, r["unit"], r["threads"]), []).append(r["rate"] / 1e9)
    rows = [
        [
            name,
            f"G {unit}",
            str(threads),
            *(three_digits(f(values)) for f in (statistics.median, min, max)),
        ]
        for (name, unit, threads), values in sorted(rates.items())
    ]
    return markdown(["limit", "", "threads", "median", "least", "most"], rows, text_columns=3)


def memory(records: list[Record]) -> list[str]:
    """Peak memory of ours beside what inputs and results take by themselves."""
    rows = []
    for r in in_order(measurements(records)):
        used = r.get("memory", {})
        if r["candidate"] == "ours" and "peak_bytes" in used:
            everything = used["input_bytes"] + used["peak_bytes"]
            ratio = everything / (used["input_bytes"] + used["result_bytes"])
            mib = used["peak_bytes"] / 2**20
            title = f"{r['problem']['op']} {r['label']}"
            rows.append([title, TITLES[r["pass"]], f"{mib:.1f} MiB", f"{ratio:.2f}"])
    head = ["", "", "on top of the inputs", "all / (inputs and results)"]
    return markdown(head, rows, text_columns=2)


def summary(records: list[Record]) -> list[str]:
    """Ours and its fastest peer by length, of the shape that was measured at most lengths."""
    timed = [r for r in in_order(measurements(records)) if "speedup" in r and is_square(r)]
    timed = [r for op in OPS for r in select(timed, op) if r["candidate"] == "ours"]
    (dtype, threads), timed = next(iter(groups(timed).items()), (("", 0), []))
    if not timed:
        return []
    shapes = [shape(r) for r in timed]
    heads, head_dim = max(shapes, key=shapes.count)
    rows: dict[str, dict[int, str]] = {}
    for r in timed:
        if shape(r) != (heads, head_dim):
            continue
        score = "dot product" if r["problem"]["op"] == "dot" else r["problem"]["op"]
        title = f"{score}{', causal' if r['problem']['causal'] else ''}, {TITLES[r['pass']]}"
        ours = 1e3 * median(r)
        rows.setdefault(title, {})[r["problem"]["key_length"]] = (
            f"{three_digits(ours)} / {three_digits(ours * r['speedup'])} "
            f"{SHORT_NAMES[r['best_peer']]}: **{times(r['speedup'])}**"
        )
    # The lengths that all have, but for those of which only one or two were measured.
    enough = min(3, max(len(row) for row in rows.values()))
    rows = {title: row for title, row in rows.items() if len(row) >= enough}
    lengths = sorted(set.intersection(*(set(row) for row in rows.values())))
    head = [f"ms, {heads} heads of {head_dim}, {timed[0]['device']}, {where(dtype, threads)}"]
    lines = [[title, *(row[n] for n in lengths)] for title, row in rows.items()]
    return markdown([*head, *(f"L = {n}" for n in lengths)], lines, len(lengths) + 1)


def all_tables(records: list[Record]) -> list[str]:
    """Everything that was measured, each table with a line that says what it is."""
    blocks: list[tuple[str, list[str]]] = []
    grid_records = [r for r in measurements(records) if is_of_grid(r)]
    for (dtype, threads), group in groups(most_threads(grid_records)).items():
        title = f"{OPS['dot']}, {where(dtype, threads)}, milliseconds (median) and speed-up:"
        blocks.append((title, grid(group)))
    blocks.append(("Geometric means of these speed-ups, and the least:", means(records)))
    blocks.append(("Full attention in float32 as a share of matrix products:", products(records)))
    blocks.append(("Reading keys and values, one query:", reading(records)))
    for op, title in OPS.items():
        for (dtype, threads), group in groups(select(records, op)).items():
            text = f"{title}, {where(dtype, threads)}, milliseconds (median):"
            blocks.append((text, comparison(group, op)))
    text = "The additive score, as a share of the machine's limit:"
    blocks.append((text, additive(records)))
    text = "Ours with masks, relative to no mask (4 samples, 2 heads of 64, 1024 tokens):"
    blocks.append((text, masks(records)))
    blocks.append(("Limits of the machine, measured in turn with these:", machine_limits(records)))
    blocks.append(("Peak memory:", memory(records)))
    return ["\n".join([title, "", *lines]) for title, lines in blocks if lines]
