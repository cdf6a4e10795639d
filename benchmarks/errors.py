"""The error of the additive score against the scale of q and k, for each path of the kernels.

    python benchmarks/errors.py --output benchmarks/results/error_by_scale.jsonl
    python benchmarks/errors.py --draw benchmarks/results/error_by_scale.jsonl --image FILE.png

q and k are normal of a standard deviation, w of 0.5, E = Ev = 64, Lq = 64, Lk = 128. An error is
the norm of the difference from the definition in float64, rounded to the dtype of the result,
divided by the norm of the result. The kernels for the CPU run here; those of CUDA in
tests/cuda_on_cpu, whose program cuda_on_cpu.error_by_scale prints its errors (`make test-slow`
builds it; the newest one is taken).
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import torch_selfattn
from benchmarks import machine
from torch_selfattn import reference

ROOT = Path(__file__).resolve().parents[1]
SCALES = (0.03, 0.1, 0.3, 1, 1.5, 2, 3, 4, 6, 10, 30, 100, 1e3, 1e4)
IMPLEMENTATIONS = {torch.float32: ("avx512", "avx2", "generic"), torch.bfloat16: ("avx512",)}
RESULTS = ("out", "grad_query", "grad_key", "grad_value", "grad_weight")
LINE = re.compile(r"(.+) (\w+), N\(0, (.+)\): (\w+) (\S+)$")

Results = tuple[Tensor, ...]


def eager(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    scores = (torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) * w).sum(-1)
    return scores.softmax(-1) @ v


def results(function: Callable[..., Tensor], inputs: Results, grad: Tensor) -> Results:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def on_cpu() -> Iterator[dict[str, Any]]:
    for dtype, names in IMPLEMENTATIONS.items():
        for scale in SCALES:
            generator = torch.Generator().manual_seed(7)
            sizes = ((64, scale), (128, scale), (128, 1), (None, 0.5), (64, 1))
            q, k, v, w, grad = (
                (torch.randn(64 if n is None else (1, 1, n, 64), generator=generator) * x).to(dtype)
                for n, x in sizes
            )
            inputs = (q, k, v, w)
            wanted = results(
                reference.additive_attention, tuple(x.double() for x in inputs), grad
            )  # fmt: skip
            want = [x.to(dtype).double() for x in wanted]

            def line(path: str, got: Results, want=want, dtype=dtype, scale=scale):
                for name, a, b in zip(RESULTS, got, want, strict=True):
                    error = ((a.detach().double() - b).norm() / b.norm()).item()
                    yield record(path, str(dtype).removeprefix("torch."), scale, name, error)

            for name in names:
                with torch_selfattn.use_implementation(name):
                    try:
                        got = results(torch_selfattn.additive_attention, inputs, grad)
                    except NotImplementedError:
                        continue  # another machine
                yield from line(f"CPU, {name}", got)
            yield from line("PyTorch, eager", results(eager, inputs, grad))


def record(path: str, dtype: str, scale: float, result: str, error: float) -> dict[str, Any]:
    return {
        "type": "error", "path": path, "dtype": dtype, "scale": scale, "result": result,
        "error": error,
    }  # fmt: skip


def in_emulation() -> Iterator[dict[str, Any]]:
    built = ROOT.glob("build/*/tests/cuda_on_cpu/cuda_on_cpu.error_by_scale")
    program = max(built, key=lambda path: path.stat().st_mtime, default=None)
    if program is None:
        print("Without the CUDA kernels: cuda_on_cpu.error_by_scale is not built (make test-slow)")
        return
    printed = subprocess.run(
        [program, "error by scale"], capture_output=True, text=True, check=True,
        env={**os.environ, "TORCH_SELFATTN_PRINT_ERRORS": "1"},
    ).stdout  # fmt: skip
    for match in filter(None, map(LINE.match, printed.splitlines())):
        path, dtype, scale, result, error = match.groups()
        if result in RESULTS:
            yield record(f"CUDA, {path}", dtype, float(scale), result, float(error))


def draw(records: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for r in records:
        if r["error"] > 0:  # else it equals the rounded definition
            curves[r["result"], r["dtype"], r["path"]].append((r["scale"], r["error"]))
    styles = {"float32": "-", "bfloat16": "--"}
    colours = {name: f"C{n}" for n, name in enumerate(sorted({key[2] for key in curves}))}
    titles = {"out": "output", "grad_query": "gradient of q"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (result, title) in zip(axes, titles.items(), strict=True):
        for (of, dtype, name), points in sorted(curves.items()):
            if of == result:
                axis.plot(
                    *zip(*points, strict=True), styles[dtype], marker=".", color=colours[name],
                    label=f"{name}, {dtype}",
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="standard deviation of q and k", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    axes[0].set_ylim(bottom=1e-7)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="measure, and write JSON lines")
    parser.add_argument("--draw", type=Path, help="JSON lines to draw")
    parser.add_argument("--image", type=Path, default=ROOT / "docs/images/additive_error.png")
    options = parser.parse_args()
    if options.output is not None:
        environment = {"type": "environment", **machine.describe("cpu", [1])}
        torch.set_num_threads(1)
        lines = [environment, *on_cpu(), *in_emulation()]
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = options.draw or options.output
    if source is None:
        parser.error("give --output, --draw or both")
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    draw([line for line in lines if line["type"] == "error"], options.image)


if __name__ == "__main__":
    main()
