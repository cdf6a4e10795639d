"""Measures the operators against their peers, in one process and in turn.

    python benchmarks/bench.py --set quick
    python benchmarks/bench.py --set lengths --op additive --against eager compile --threads 2
    python benchmarks/bench.py --set memory --memory

Nothing is timed before its output and all its gradients have been compared with the definition in
float64; what differs is reported and not timed. Each result is a line of JSON in --output;
report.py makes tables and pictures of it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# For `benchmarks`; at the end, so that the torch_selfattn of PYTHONPATH or the environment comes
# before the one of this checkout.
sys.path.append(str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    # One core per thread, before torch starts them: two threads that the system has put on one core
    # wait for each other, and every time is a multiple of its time slice.
    os.environ.setdefault("OMP_PROC_BIND", "close")
    os.environ.setdefault("OMP_PLACES", "cores")

import torch
from torch import Tensor

import torch_selfattn
from benchmarks import machine, measure, peers, verify
from benchmarks.problem_sets import SETS, Problem, make_inputs

PASSES = ("forward", "forward_backward")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SCHEMA = 1


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(["ours:<implementation>", *(n for n in peers.CANDIDATES if n != "ours")])
    parser.add_argument("--set", choices=[*SETS, "import"], default="quick", help="which problems")
    parser.add_argument("--op", nargs="+", help="only these operators of the set")
    parser.add_argument(
        "--against", nargs="+", metavar="NAME", help=f"beside ours, all peers by default: {names}"
    )
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--seconds", type=float, help="per candidate, problem and pass; 2 on the CPU, 0.3 on a GPU"
    )
    parser.add_argument("--memory", action="store_true", help="also peak memory")
    parser.add_argument("--no-time", action="store_true", help="verify (and --memory) only")
    parser.add_argument(
        "--output", type=Path, help="JSON lines; default benchmarks/results/local.jsonl"
    )
    parser.add_argument("--append", action="store_true", help="keep what --output holds")
    parser.add_argument("--measure-memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 2.0 if options.device == "cpu" else 0.3
    return options


def candidate_of(name: str) -> peers.Candidate:
    if name.startswith("ours:"):
        return peers.forced(name.removeprefix("ours:"))
    if name not in peers.CANDIDATES:
        raise SystemExit(f"there is no candidate {name} (there are {', '.join(peers.CANDIDATES)})")
    return peers.CANDIDATES[name]


def make_call(
    candidate: peers.Candidate, problem: Problem, inputs: dict[str, Tensor], grad_out: Tensor | None
) -> Callable[[], Any]:
    """A call without gradients, or, with grad_out, forward and backward: (out, gradients)."""
    function = candidate.make(problem)
    leaves = [t for t in inputs.values() if t.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad(), candidate.context():
            return function(**inputs)

    def forward_backward() -> tuple[Tensor, tuple[Tensor, ...]]:
        with candidate.context():
            out = function(**inputs)
            return out, torch.autograd.grad(out, leaves, grad_out)

    return forward if grad_out is None else forward_backward


class Bench:
    """All measurements of one problem."""

    def __init__(self, problem: Problem, options: argparse.Namespace) -> None:
        self.problem = problem
        self.options = options
        self.dtype = DTYPES[options.dtype]
        self.inputs = make_inputs(problem, self.dtype, options.device, requires_grad=True)
        shape = self.inputs["x" if "x" in self.inputs else "query"].shape
        generator = torch.Generator().manual_seed(1)
        self.grad_out = torch.randn(shape, generator=generator).to(options.device, self.dtype)

    def results(self) -> Iterator[dict[str, Any]]:
        """One record per candidate and pass."""
        names = ["ours", *(self.options.against or [n for n in peers.CANDIDATES if n != "ours"])]
        candidates = {n: candidate_of(n) for n in dict.fromkeys(names)}
        candidates = {n: c for n, c in candidates.items() if self.problem.op in c.ops}
        candidates = {n: c for n, c in candidates.items() if self.options.device in c.devices}
        reference = verify.Reference(self.problem, self.inputs, self.grad_out)
        if len(reference.heads) < self.problem.heads:
            print(f"  verified on heads {reference.heads} of {self.problem.heads}")
        for one_pass in self.options.passes:
            yield from self._pass(one_pass, candidates, reference)

    def _pass(
        self, one_pass: str, candidates: dict[str, peers.Candidate], reference: verify.Reference
    ) -> list[dict[str, Any]]:
        records: dict[str, dict[str, Any]] = {}
        calls: dict[str, Callable[[], Any]] = {}
        for name, candidate in candidates.items():
            torch._dynamo.reset()
            record = self._record(name, one_pass)
            records[name] = record
            reason = self._reason_to_skip(candidate, one_pass)
            if reason:
                record.update(status="skipped", reason=reason)
                continue
            grad_out = self.grad_out if one_pass == "forward_backward" else None
            call = make_call(candidate, self.problem, self.inputs, grad_out)
            try:
                record["errors"] = self._errors(call(), reference)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                if name == "ours":
                    raise
                first_line = str(error).strip().split("\n")[0]
                record.update(status="skipped", reason=f"{type(error).__name__}: {first_line}")
                continue
            wrong = verify.too_wrong(record["errors"], self.dtype)
            if wrong:
                record.update(status="wrong", reason=wrong)
                continue
            record["status"] = "ok"
            calls[name] = call
        if not self.options.no_time:
            times = measure.interleaved_times(calls, self.options.device, self.options.seconds)
            for name, t in times.items():
                records[name]["seconds"] = vars(t)
        if self.options.memory:
            for name in calls:
                self._measure_memory(records[name])
        self._add_ratios(records)
        return list(records.values())

    def _record(self, name: str, one_pass: str) -> dict[str, Any]:
        return {
            "type": "measurement",
            "problem": self.problem.as_dict(),
            "label": self.problem.label,
            "dtype": self.options.dtype,
            "device": self.options.device,
            "threads": self.options.threads,
            "pass": one_pass,
            "candidate": name,
            **({"implementation": self._implementation()} if name == "ours" else {}),
        }

    def _implementation(self) -> str:
        """The one that explain() says runs."""
        if self.problem.op not in ("dot", "additive"):
            return ""
        tensors = {k: t for k, t in self.inputs.items() if k in ("weight", "attn_mask")}
        text = torch_selfattn.explain(
            self.inputs["query"], self.inputs["key"], self.inputs["value"],
            **peers.our_options(self.problem), **tensors,
        )  # fmt: skip
        runs = [line for line in text.splitlines() if line.endswith((": runs", ": runs (forced)"))]
        return runs[0].split(":")[0].strip() if runs else ""

    def _reason_to_skip(self, candidate: peers.Candidate, one_pass: str) -> str:
        reason = candidate.not_supported(self.problem)
        if reason:
            return reason
        element_size = self.grad_out.element_size()
        backward = one_pass == "forward_backward"
        needed = candidate.intermediate_bytes(self.problem, backward, element_size)
        available = measure.available_bytes(self.options.device)
        if needed > 0.9 * available:
            gib = f"{needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
            return f"does not fit in memory: needs about {gib}"
        return ""

    def _errors(self, result: Any, reference: verify.Reference) -> dict[str, float]:
        if isinstance(result, Tensor):
            return reference.errors(result, {})
        out, gradients = result
        leaves = [name for name, t in self.inputs.items() if t.requires_grad]
        return reference.errors(out, dict(zip(leaves, gradients, strict=True)))

    def _measure_memory(self, record: dict[str, Any]) -> None:
        arguments = [
            "--measure-memory", json.dumps(self.problem.as_dict()), record["candidate"],
            record["pass"], "--dtype", self.options.dtype, "--device", self.options.device,
            "--threads", str(self.options.threads),
        ]  # fmt: skip
        peak = measure.peak_bytes(arguments, self.options.device)
        if isinstance(peak, str):
            record["memory"] = {"reason": peak}
            return
        inputs = sum(t.nbytes for t in self.inputs.values())
        results = self.grad_out.nbytes
        if record["pass"] == "forward_backward":
            inputs += self.grad_out.nbytes
            results += sum(t.nbytes for t in self.inputs.values() if t.requires_grad)
        record["memory"] = {"peak_bytes": peak, "input_bytes": inputs, "result_bytes": results}

    @staticmethod
    def _add_ratios(records: dict[str, dict[str, Any]]) -> None:
        """How many times faster ours is than the best peer."""
        rivals = {
            n: r["seconds"]["median"]
            for n, r in records.items()
            if "seconds" in r and not n.startswith("ours")
        }
        for name, record in records.items():
            if rivals and "seconds" in record and name.startswith("ours"):
                best = min(rivals, key=rivals.__getitem__)
                record["best_peer"] = best
                record["speedup"] = rivals[best] / record["seconds"]["median"]


def in_words(record: dict[str, Any]) -> str:
    head = f"  {record['pass']:<17}{record['candidate']:<15}"
    if record["status"] != "ok":
        return f"{head}{record['status'].upper()}: {record['reason']}"
    text = head
    if "seconds" in record:
        t = {k: 1e3 * record["seconds"][k] for k in ("median", "q1", "q3", "min")}
        text += (
            f"{t['median']:10.3f} ms  ({t['q1']:.3f} … {t['q3']:.3f}, min {t['min']:.3f}; "
            f"{record['seconds']['samples']} samples)"
        )
    if "peak_bytes" in record.get("memory", {}):
        memory = record["memory"]
        ratio = (memory["peak_bytes"] + memory["input_bytes"]) / (
            memory["result_bytes"] + memory["input_bytes"]
        )
        mib = memory["peak_bytes"] / 2**20
        text += f"  {mib:.1f} MiB; {ratio:.2f}x inputs and results"
    elif "memory" in record:
        text += f"  no memory figure: {record['memory']['reason']}"
    if "speedup" in record:
        text += f"  {record['speedup']:.2f}x {record['best_peer']}"
    return text


def measure_memory(options: argparse.Namespace) -> None:
    """The child process of measure.peak_bytes."""
    problem_json, name, one_pass = options.measure_memory
    bench = Bench(Problem(**json.loads(problem_json)), options)
    grad_out = bench.grad_out if one_pass == "forward_backward" else None
    call = make_call(candidate_of(name), bench.problem, bench.inputs, grad_out)
    print(json.dumps({"peak_bytes": measure.peak_bytes_here(call, options.device)}))


def measure_import() -> dict[str, Any]:
    t = measure.import_seconds(runs=9)
    return {"type": "import", "status": "ok", "seconds": vars(t)}


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a result of ours was wrong."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    if options.measure_memory:
        measure_memory(options)
        return 0
    output = options.output or Path(__file__).parent / "results" / "local.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    wrong = False
    with output.open("a" if options.append else "w") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()

        environment = machine.describe(options.device)
        print(machine.in_words(environment))
        write({"type": "environment", "schema": SCHEMA, "set": options.set, **environment})
        if options.set == "import":
            record = measure_import()
            write(record)
            print(f"import torch_selfattn: {record['seconds']['median']:.3f} s beyond torch")
        for problem in SETS.get(options.set, []):
            if options.op and problem.op not in options.op:
                continue
            print(f"{problem.op} {problem.label} {options.dtype} {options.device}")
            for record in Bench(problem, options).results():
                write(record)
                print(in_words(record), flush=True)
                wrong |= record["status"] == "wrong" and record["candidate"].startswith("ours")
    print(f"Written to {output}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
