"""The pictures of the documents. Each function returns False if there is nothing to draw."""

from pathlib import Path
from typing import Any

from benchmarks.records import (
    Record,
    by_candidate,
    groups,
    is_of_grid,
    is_square,
    measurements,
    most_threads,
    select,
    shape,
    times_faster,
)
from benchmarks.tables import TITLES, where

# Fixed colours, safe for colour-blind readers: a candidate looks the same in every picture.
COLOURS = {"ours": "#0072B2", "eager": "#D55E00", "compile": "#E69F00", "keras": "#999999"}
NAMES = {"eager": "eager PyTorch", "compile": "torch.compile", "keras": "Keras' formula"}


def additive_time(records: list[Record], path: Path) -> bool:
    """Time against length for the additive score."""
    import matplotlib.pyplot as plt

    timed = [r for r in select(records, "additive") if "seconds" in r and is_square(r)]
    timed = [r for r in timed if not r["problem"]["causal"]]
    (dtype, threads), timed = next(iter(groups(timed).items()), (("", 0), []))
    if not timed:
        return False
    shapes = [shape(r) for r in timed]
    heads, head_dim = max(sorted(set(shapes)), key=lambda s: (shapes.count(s), s == (8, 64)))
    timed = [r for r in timed if shape(r) == (heads, head_dim)]
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
    title = f"Additive attention, {heads} heads of {head_dim}, {where(dtype, threads)}"
    figure.suptitle(f"{title}, {timed[0]['device']}")
    _save(figure, path)
    return True


def _speedups(records: list[Record]) -> dict[tuple[str, str, bool], dict[tuple[int, ...], float]]:
    """(pass, dtype, causal): (heads, head dim, length): speed-up over SDPA."""
    found: dict[tuple[str, str, bool], dict[tuple[int, ...], float]] = {}
    for (dtype, _), group in groups(records).items():
        for (_, one_pass), row in by_candidate(group).items():
            faster = times_faster(row.get("ours"), row.get("sdpa"))
            if faster is not None:
                p = row["ours"]["problem"]
                cells = found.setdefault((one_pass, dtype, p["causal"]), {})
                cells[p["heads"], p["head_dim"], p["key_length"]] = faster
    return found


def dot_speedup(records: list[Record], path: Path) -> bool:
    """Speed-up of the dot product over SDPA by shape, a map of squares for each dtype and pass."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    records = most_threads([r for r in measurements(records) if is_of_grid(r)])
    found = _speedups([r for r in records if r["dtype"] != "float16"])
    if not found:
        return False
    columns = list(dict.fromkeys((dtype, causal) for _, dtype, causal in sorted(found)))
    columns.sort(key=lambda column: (column[0] != "float32", column))
    lines = sorted({key[:2] for cells in found.values() for key in cells})
    lengths = sorted({key[2] for cells in found.values() for key in cells})
    values = [value for cells in found.values() for value in cells.values()]
    # The same factor on both sides of 1, which is white.
    bound = max(2.0, *values, *(1 / value for value in values))
    norm = LogNorm(1 / bound, bound)
    figure, axes = plt.subplots(
        2, len(columns), squeeze=False, sharex=True, sharey=True, layout="constrained",
        figsize=(1.4 + 0.47 * len(lengths) * len(columns), 1.6 + 0.54 * len(lines)),
    )  # fmt: skip
    image = None
    for axis_row, (one_pass, title) in zip(axes, TITLES.items(), strict=True):
        for axis, (dtype, causal) in zip(axis_row, columns, strict=True):
            cells = found.get((one_pass, dtype, causal), {})
            square = [[cells.get((*line, n), float("nan")) for n in lengths] for line in lines]
            image = axis.imshow(square, cmap="RdBu", norm=norm, aspect="auto")
            for y, row in enumerate(square):
                for x, value in enumerate(row):
                    if value == value:
                        dark = value > bound**0.6 or value < bound**-0.6
                        colour = "white" if dark else "black"
                        axis.text(x, y, f"{value:.1f}", ha="center", va="center",
                                  fontsize=8, color=colour)  # fmt: skip
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
            axis.set_yticks(range(len(lines)), [f"H{h} D{d}" for h, d in lines])
            axis.tick_params(length=0, labelsize=8)
            axis.spines[:].set_visible(False)
        axis_row[0].set_ylabel(f"{title}", fontsize=9)
    for axis, (dtype, causal) in zip(axes[0], columns, strict=True):
        axis.set_title(f"{dtype}, {'causal' if causal else 'full'}", fontsize=9)
    figure.supxlabel("sequence length L, by number of heads H and head dim D", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
    ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 4, 8) if 1 / bound <= t <= bound]
    bar.set_ticks(ticks, labels=[f"{t:g}x" for t in ticks])
    bar.ax.minorticks_off()
    threads, device = records[0]["threads"], records[0]["device"]
    figure.suptitle(
        f"Speed-up of dot-product attention over F.scaled_dot_product_attention, {device}, "
        f"{threads} thread{'s' if threads > 1 else ''}", fontsize=10,
    )  # fmt: skip
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)
