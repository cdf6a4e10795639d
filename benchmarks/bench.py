"""Measures the operators against their peers, in one process and in turn.

    python benchmarks/bench.py --set quick
    python benchmarks/bench.py --set additive --against eager compile ours:avx2 ours@1
    python benchmarks/bench.py --set grid_long --against sdpa --dtype float32 bfloat16 --part 1/3
    python benchmarks/bench.py --set memory --memory --no-time

Nothing is timed before its output and all its gradients have been compared with the definition in
float64; what differs is reported and not timed. Limits of the machine are measured in turn with
what is held to them (limits.py). Each result is a line of JSON in --output; report.py makes tables
and pictures of it.
"""

import argparse
import json
import os
import sys
import time
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
from benchmarks import estimate, limits, machine, measure, peers, verify
from benchmarks.problem_sets import SETS, Problem, make_inputs

PASSES = ("forward", "forward_backward")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SCHEMA = 1


def part(text: str) -> tuple[int, int]:
    index, count = (int(number) for number in text.split("/"))
    if not 1 <= index <= count:
        raise ValueError(text)
    return index, count


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(n for n in peers.CANDIDATES if n != "ours")
    parser.add_argument(
        "--set",
        dest="sets",
        nargs="+",
        choices=[*SETS, "import"],
        default=["quick"],
        help="which problems",
    )
    parser.add_argument("--op", nargs="+", help="only these operators of the set")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only problems with all these words in their label, such as L4096 causal",
    )
    parser.add_argument(
        "--part",
        type=part,
        default="1/1",
        metavar="K/N",
        help="only the K-th of N parts of the problems that take about the same time",
    )
    parser.add_argument("--list", action="store_true", help="say what would be measured, and stop")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="NAME",
        help=f"beside ours, all peers by default: {names}; ours:IMPLEMENTATION forces one of ours; "
        "NAME@THREADS uses so many",
    )
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
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
    names_of_peers = options.against or [n for n in peers.CANDIDATES if n != "ours"]
    options.names = list(dict.fromkeys(["ours", *names_of_peers]))
    options.names = [n for n in options.names if options.device in peers.candidate_of(n).devices]
    return options


def select(options: argparse.Namespace) -> tuple[list[Problem], float]:
    """The problems of the options, and how many seconds they take, roughly."""
    problems = list(dict.fromkeys(p for name in options.sets for p in SETS.get(name, [])))
    problems = [p for p in problems if not options.op or p.op in options.op]
    problems = [p for p in problems if set(options.only) <= set(p.label.split())]
    costs = {
        p: sum(
            estimate.seconds(
                p, dtype, options.names, options.passes, options.threads, options.seconds
            )
            for dtype in options.dtype
        )
        for p in problems
    }
    problems = estimate.part(problems, [costs[p] for p in problems], *options.part)
    return problems, sum(costs[p] for p in problems)


def make_call(
    candidate: peers.Candidate, problem: Problem, inputs: dict[str, Tensor], grad_out: Tensor | None
) -> Callable[[], Any]:
    """A call without gradients, or, with grad_out, forward and backward: (outputs, gradients)."""
    function = candidate.make(problem)
    leaves = [t for t in inputs.values() if t.requires_grad]
    arguments = candidate.arguments(problem, inputs)

    def forward() -> Any:
        with torch.no_grad(), candidate.context():
            return function(**arguments)

    def forward_backward() -> tuple[Any, tuple[Tensor, ...]]:
        with candidate.context():
            result = function(**arguments)
            out = result if isinstance(result, Tensor) else result[0]
            return result, torch.autograd.grad(out, leaves, grad_out)

    return forward if grad_out is None else forward_backward


class Bench:
    """All measurements of one problem in one dtype."""

    def __init__(self, problem: Problem, dtype: str, options: argparse.Namespace) -> None:
        self.problem = problem
        self.options = options
        self.dtype_name = dtype
        self.dtype = DTYPES[dtype]
        self.threads = torch.get_num_threads()
        self.inputs = make_inputs(problem, self.dtype, options.device, requires_grad=True)
        shape = self.inputs["x" if "x" in self.inputs else "query"].shape
        generator = torch.Generator().manual_seed(1)
        self.grad_out = torch.randn(shape, generator=generator).to(options.device, self.dtype)

    def results(self) -> Iterator[dict[str, Any]]:
        """One record per candidate and pass."""
        candidates = {n: peers.candidate_of(n) for n in self.options.names}
        candidates = {n: c for n, c in candidates.items() if self.problem.op in c.ops}
        reference = verify.Reference(self.problem, self.inputs, self.grad_out)
        if len(reference.heads) < self.problem.heads:
            print(f"  verified on heads {reference.heads} of {self.problem.heads}")
        for threads in self.options.threads:
            self.threads = threads
            torch.set_num_threads(threads)
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
                record["errors"] = self._errors(call(), one_pass, reference)
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
            held_to = self._limits(one_pass, list(calls))
            for name, limit in held_to.items():
                records[name] = self._record(name, one_pass) | {
                    "type": "machine_limit", "status": "ok", "unit": limit.unit, "work": limit.work
                }  # fmt: skip
            functions = calls | {name: limit.call for name, limit in held_to.items()}
            times = measure.interleaved_times(
                functions, self.options.device, self.options.seconds, brief=held_to
            )
            for name, t in times.items():
                records[name]["seconds"] = vars(t)
            self._add_figures(records, one_pass)
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
            "pairs": self.problem.pairs,
            "dtype": self.dtype_name,
            "device": self.options.device,
            "threads": self.threads,
            "pass": one_pass,
            "candidate": name,
            **({"implementation": self._implementation(name)} if name.startswith("ours") else {}),
        }

    def _limits(self, one_pass: str, names: list[str]) -> dict[str, limits.Limit]:
        """Those that the named ones of ours are held to."""
        isas = [self._implementation(n) for n in names if n.startswith("ours") and "@" not in n]
        if self.options.device != "cpu" or not isas:
            return {}
        backward = one_pass == "forward_backward"
        found = limits.of(self.problem, backward, self.dtype, self.threads, isas)
        return {f"limit:{limit.name}": limit for limit in found}

    def _implementation(self, name: str) -> str:
        """The one that is forced, or that explain() says runs."""
        forced = name.partition("@")[0].removeprefix("ours").removeprefix(":")
        if forced or self.problem.op not in ("dot", "additive"):
            return forced
        tensors = peers.CANDIDATES["ours"].arguments(self.problem, self.inputs)
        tensors = {k: t for k, t in tensors.items() if k in ("weight", "attn_mask", "key_lengths")}
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

    def _errors(self, result: Any, one_pass: str, reference: verify.Reference) -> dict[str, float]:
        if one_pass == "forward":
            return reference.errors(verify.by_name(result), {})
        outputs, gradients = result
        leaves = [name for name, t in self.inputs.items() if t.requires_grad]
        return reference.errors(verify.by_name(outputs), dict(zip(leaves, gradients, strict=True)))

    def _measure_memory(self, record: dict[str, Any]) -> None:
        arguments = [
            "--measure-memory", json.dumps(self.problem.as_dict()), record["candidate"],
            record["pass"], "--dtype", self.dtype_name, "--device", self.options.device,
            "--threads", str(self.threads),
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

    def _add_figures(self, records: dict[str, dict[str, Any]], one_pass: str) -> None:
        """Rates, and what ours reaches of them."""
        rates = {}
        for name, record in records.items():
            if name.startswith("limit:"):
                # The best one: no share looks better because the limit had a bad moment.
                record["rate"] = record["work"] / record["seconds"]["min"]
                rates[name.removeprefix("limit:")] = record["rate"]
        for name, record in records.items():
            if name.startswith("ours") and "@" not in name and "seconds" in record:
                record["figures"] = limits.figures(
                    self.problem, one_pass == "forward_backward", self.dtype.itemsize,
                    record["implementation"], record["seconds"]["median"], rates,
                )  # fmt: skip

    @staticmethod
    def _add_ratios(records: dict[str, dict[str, Any]]) -> None:
        """How many times faster ours is than the best peer, and anything than on other threads."""
        times = {n: r["seconds"]["median"] for n, r in records.items() if "seconds" in r}
        rivals = {n: t for n, t in times.items() if not n.startswith(("ours", "limit:"))}
        rivals = {n: t for n, t in rivals.items() if "@" not in n}
        for name, t in times.items():
            all_threads, at, _ = name.partition("@")
            if at:
                if all_threads in times:
                    records[name]["scaling"] = t / times[all_threads]
            elif rivals and name.startswith("ours"):
                best = min(rivals, key=rivals.__getitem__)
                records[name]["best_peer"] = best
                records[name]["speedup"] = rivals[best] / t


def in_words(record: dict[str, Any]) -> str:
    head = f"  {record['pass']:<17}{record['candidate']:<15}"
    if "rate" in record:
        return f"{head}{record['rate'] / 1e9:10.2f} G {record['unit']}"
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
    if "scaling" in record:
        text += f"  {record['scaling']:.2f}x the time"
    for name, value in record.get("figures", {}).items():
        number = f"{value / 1e9:.1f} G/s" if name.startswith("rate") else f"{value:.3g}"
        text += f"  {name} {number}"
    return text


def measure_memory(options: argparse.Namespace) -> None:
    """The child process of measure.peak_bytes."""
    problem_json, name, one_pass = options.measure_memory
    bench = Bench(Problem(**json.loads(problem_json)), options.dtype[0], options)
    grad_out = bench.grad_out if one_pass == "forward_backward" else None
    call = make_call(peers.candidate_of(name), bench.problem, bench.inputs, grad_out)
    print(json.dumps({"peak_bytes": measure.peak_bytes_here(call, options.device)}))


def measure_import() -> dict[str, Any]:
    t = measure.import_seconds(runs=9)
    return {"type": "import", "status": "ok", "seconds": vars(t)}


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a result of ours was wrong."""
    options = parse_arguments(arguments)
    torch.set_num_threads(max(options.threads))
    if options.measure_memory:
        measure_memory(options)
        return 0
    problems, seconds = select(options)
    about = f", about {seconds / 60:.1f} minutes" if options.device == "cpu" else ""
    print(f"{len(problems)} problems{about}")
    if options.list:
        print(*(f"{p.op} {p.label}" for p in problems), sep="\n")
        return 0
    output = options.output or Path(__file__).parent / "results" / "local.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    wrong = False
    with output.open("a" if options.append else "w") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()

        if options.device == "cpu" and limits.library() is None:
            print("Without some limits of the machine: benchmarks/loops is not built (make build)")
        environment = machine.describe(options.device, options.threads)
        print(machine.in_words(environment))
        write({"type": "environment", "schema": SCHEMA, "set": options.sets, **environment})
        if "import" in options.sets:
            record = measure_import()
            write(record)
            print(f"import torch_selfattn: {record['seconds']['median']:.3f} s beyond torch")
        begin = time.monotonic()
        for problem in problems:
            for dtype in options.dtype:
                print(f"{problem.op} {problem.label} {dtype} {options.device}")
                torch.set_num_threads(max(options.threads))
                for record in Bench(problem, dtype, options).results():
                    write(record)
                    print(in_words(record), flush=True)
                    wrong |= record["status"] == "wrong" and record["candidate"].startswith("ours")
        print(f"{(time.monotonic() - begin) / 60:.1f} minutes")
    print(f"Written to {output}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
