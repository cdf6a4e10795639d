"""The lines that bench.py wrote, for tables.py and figures.py."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# The shapes of the dot product over which means are taken, full and causal.
GRID_HEADS = (1, 8, 32)
GRID_LENGTHS = (128, 512, 1024, 4096)
GRID_HEAD_DIMS = (32, 64, 128)

# What a measurement of time brings, and loses when it is repeated.
OF_TIME = ("seconds", "speedup", "best_peer", "scaling", "figures", "run")


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
            key = str([record.get(k) for k in identity])
            known = {k: v for k, v in record.items() if v is not None}
            before = results.get(key, {})
            if "seconds" in record:
                known["run"] = len(environments)
                before = {k: v for k, v in before.items() if k not in OF_TIME}
            # Time and memory may have been measured in runs of their own.
            results[key] = {**before, **known}
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


def groups(records: Iterable[Record]) -> dict[tuple[str, int], list[Record]]:
    """By dtype and threads: the widest dtype and most threads first."""
    found: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        found.setdefault((r["dtype"], r["threads"]), []).append(r)
    width = ("float64", "float32", "bfloat16", "float16")
    return dict(sorted(found.items(), key=lambda item: (width.index(item[0][0]), -item[0][1])))


def most_threads(records: list[Record]) -> list[Record]:
    most = max((r["threads"] for r in records), default=0)
    return [r for r in records if r["threads"] == most]


def by_candidate(records: Iterable[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """(label, pass): candidate: record, in the order of the records."""
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        rows.setdefault((record["label"], record["pass"]), {})[record["candidate"]] = record
    return rows


def median(record: Record) -> float:
    return float(record["seconds"]["median"])


def times_faster(record: Record | None, other: Record | None) -> float | None:
    """How many times faster `record` is; None unless both were timed, in the same run."""
    if record is None or other is None or "seconds" not in record or "seconds" not in other:
        return None
    return median(other) / median(record) if record["run"] == other["run"] else None


def shape(record: Record) -> tuple[int, int]:
    return record["problem"]["heads"], record["problem"]["head_dim"]


def is_square(record: Record) -> bool:
    """Of attention: one sequence attending to itself, without a mask or grouped heads."""
    p = record["problem"]
    return (
        p["op"] in ("dot", "additive")
        and p["batch"] == 1
        and p["query_length"] == p["key_length"]
        and not p["mask"]
        and not p["kv_heads"]
    )


def is_of_grid(record: Record) -> bool:
    """Whether it stands in the table of the dot product by shape, not in that of other problems."""
    p = record["problem"]
    return (
        p["op"] == "dot"
        and is_square(record)
        and p["heads"] in GRID_HEADS
        and p["key_length"] in GRID_LENGTHS
        and p["head_dim"] in GRID_HEAD_DIMS
    )
