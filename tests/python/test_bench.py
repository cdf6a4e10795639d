"""benchmarks/: it refuses wrong results, writes what report.py reads, and the report draws."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import bench, limits, measure, peers, problem_sets, report, verify  # noqa: E402
from benchmarks.problem_sets import Problem  # noqa: E402

TINY = {
    "dot": Problem("dot", 2, 4, 5, 7, 8),
    "dot causal": Problem("dot", 1, 2, 6, 6, 8, causal=True),
    "dot grouped": Problem("dot", 1, 4, 5, 7, 8, kv_heads=2),
    "dot bool": Problem("dot", 2, 2, 5, 7, 8, mask="bool"),
    "dot float causal": Problem("dot", 1, 2, 6, 6, 8, causal=True, mask="float"),
    "additive": Problem("additive", 2, 4, 5, 7, 8),
    "additive grouped": Problem("additive", 1, 4, 5, 7, 8, kv_heads=2),
    "additive bool causal": Problem("additive", 2, 2, 6, 6, 8, causal=True, mask="bool"),
    "dot constant float": Problem("dot", 2, 2, 5, 7, 8, mask="constant float"),
    "dot window": Problem("dot", 1, 2, 20, 20, 8, mask="window"),
    "additive lengths": Problem("additive", 3, 2, 5, 7, 8, mask="lengths"),
    "additive block": Problem("additive", 2, 2, 70, 130, 8, mask="block"),
    "multi_head": Problem("multi_head", 2, 2, 5, 5, 4),
    "multi_head_weights": Problem("multi_head_weights", 2, 2, 5, 5, 4),
    "rotary": Problem("rotary", 2, 2, 5, 5, 8),
}
# torch.compile takes long to start, and the rest of the code is the same.
PEERS = ["sdpa", "eager", "keras", "mha"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs bench.py on problems; returns its exit code and its measurements."""
    threads = torch.get_num_threads()

    def run_bench(problems, *arguments):
        monkeypatch.setitem(problem_sets.SETS, "quick", problems)
        output = tmp_path / "results.jsonl"
        code = bench.main(
            [
                "--set",
                "quick",
                "--output",
                str(output),
                "--threads",
                "1",
                "--seconds",
                "0",
                *arguments,
            ]
        )
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert lines[0]["type"] == "environment"
        return code, lines[1:]

    yield run_bench
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", TINY)
def test_every_candidate_matches_the_reference(run, name):
    problem = TINY[name]
    code, records = run([problem], "--no-time", "--against", *PEERS, "--dtype", "float64")
    assert code == 0
    refused = {"sdpa"} if name == "dot float causal" else set()  # PyTorch's: a mask or causal
    assert {r["candidate"] for r in records if r["status"] != "ok"} == refused
    records = [r for r in records if r["status"] == "ok"]
    assert {r["candidate"] for r in records} >= {"ours"} and len(records) >= 4
    for record in records:
        gradients = {e.removeprefix("grad_") for e in record["errors"] if e != "out"}
        inputs = problem_sets.make_inputs(problem, torch.float64, "cpu", True)
        expected = {n for n, t in inputs.items() if t.requires_grad}
        outputs = {"out", "weights"} if name == "multi_head_weights" else {"out"}
        if record["pass"] == "forward_backward":
            outputs |= expected
        assert gradients | {"out"} == outputs


@pytest.mark.parametrize("name", TINY)
def test_sixteen_bits_and_threads(run, name):
    """One run with both dtypes and numbers of threads; nobody is called wrong."""
    dtypes = ("bfloat16", "float16")
    code, records = run(
        [TINY[name]], "--no-time", "--against", *PEERS, "--dtype", *dtypes, "--threads", "1", "2"
    )
    assert code == 0
    assert "wrong" not in {r["status"] for r in records}
    ours = [r for r in records if r["candidate"] == "ours"]
    found = {(r["dtype"], r["threads"], r["pass"]) for r in ours}
    assert len(found) == len(ours) == 8


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_sixteen_bits_have_limits_that_a_wrong_result_exceeds(name):
    dtype = getattr(torch, name)
    problem = Problem("dot", 1, 2, 64, 64, 32)
    inputs = problem_sets.make_inputs(problem, dtype, "cpu", False)
    reference = verify.Reference(
        problem, {n: t.requires_grad_() for n, t in inputs.items()}, torch.ones(1, 2, 64, 32)
    )
    out = reference.outputs["out"].to(dtype)
    assert not verify.too_wrong(reference.errors({"out": out}, {}), dtype)
    missing_key = torch.nn.functional.scaled_dot_product_attention(
        inputs["query"], inputs["key"][:, :, :-1], inputs["value"][:, :, :-1]
    )
    assert verify.too_wrong(reference.errors({"out": missing_key}, {}), dtype)


def test_allowed_pairs():
    def square(mask="", causal=False, batch=1):
        return Problem("dot", batch, 3, 16, 16, 8, mask=mask, causal=causal)

    assert square().pairs == square().full_pairs == 3 * 16 * 16
    assert square(causal=True).pairs == 3 * 16 * 17 // 2
    assert square(mask="window").pairs == 3 * (1 + 15 * 2)  # itself and the one before
    assert square(mask="lengths", batch=2).pairs == 3 * 16 * (16 + 8)
    assert square(mask="float").pairs == square().pairs
    some = square(mask="bool")
    assert some.pairs == 3 * int(problem_sets.make_inputs(some, torch.float32, "cpu", False)
                                 ["attn_mask"].sum())  # fmt: skip
    blocks = problem_sets.allowed(Problem("dot", 1, 1, 128, 256, 8, mask="block"))
    for i in range(0, 128, 64):
        for j in range(0, 256, 64):
            assert blocks[0, 0, i : i + 64, j : j + 64].unique().numel() == 1
    assert 0 < blocks.sum() < blocks.numel() and blocks.any(-1).all()


def _broken(change):
    """Ours, with an error in one place."""

    def make(problem):
        function = peers.CANDIDATES["eager"].make(problem)

        def run(**tensors):
            return change(function, tensors)

        return run

    return peers.Candidate(("dot", "additive"), make)


def _wrong_output(function, tensors):
    out = function(**tensors)
    out[0, -1, -1, -1] += 0.01
    return out


def _wrong_gradient(function, tensors):
    return function(**{**tensors, "key": tensors["key"].detach() * 0.5 + tensors["key"] * 0.5})


def _nan(function, tensors):
    out = function(**tensors)
    return out + torch.where(out == out.amax(), torch.nan, 0.0)


@pytest.mark.parametrize("name", ["dot", "additive"])
@pytest.mark.parametrize("change", [_wrong_output, _wrong_gradient, _nan])
def test_refuses_to_time_a_wrong_result(run, monkeypatch, capsys, name, change):
    monkeypatch.setitem(peers.CANDIDATES, "broken", _broken(change))
    code, records = run([TINY[name]], "--against", "broken", "eager")
    by_pass = {r["pass"]: r for r in records if r["candidate"] == "broken"}
    wrong = ["forward_backward"] if change is _wrong_gradient else list(by_pass)
    for one_pass in wrong:
        assert by_pass[one_pass]["status"] == "wrong"
        assert "seconds" not in by_pass[one_pass]
        culprit = "grad_key" if change is _wrong_gradient else "out"
        assert culprit in by_pass[one_pass]["reason"]
    assert "WRONG" in capsys.readouterr().out
    assert code == 0  # a peer's fault
    assert all("seconds" in r for r in records if r["candidate"] in ("ours", "eager"))


def test_a_wrong_result_of_ours_fails_the_run(run, monkeypatch):
    broken = dataclasses.replace(_broken(_wrong_output), is_ours=True)
    monkeypatch.setitem(peers.CANDIDATES, "ours", broken)
    code, records = run([TINY["dot"]], "--against", "eager")
    assert code == 1
    assert all("speedup" not in r for r in records)


def test_a_problem_stands_in_one_set_only():
    """Else a report would lose figures to another run. (`quick` is in none; GPUs have theirs.)"""
    others = ("quick", "memory", "dot_gpu")
    sets = {n: s for n, s in problem_sets.SETS.items() if n not in others}
    problems = [problem for s in sets.values() for problem in s]
    assert len(problems) == len(set(problems))


def test_records(run):
    _, records = run([TINY["additive"]], "--against", "eager", "keras")
    records = [r for r in records if r["type"] == "measurement"]
    assert len(records) == 6
    for record in records:
        assert Problem(**record["problem"]) == TINY["additive"]
        assert record["label"] == "B2 H4 Lq5 Lk7 D8"
        assert (record["dtype"], record["device"], record["threads"]) == ("float32", "cpu", 1)
        t = record["seconds"]
        assert 0 < t["min"] <= t["q1"] <= t["median"] <= t["q3"]
        assert t["samples"] >= measure.MIN_SAMPLES
    medians = {(r["pass"], r["candidate"]): r["seconds"]["median"] for r in records}
    for record in records:
        if record["candidate"] == "ours":
            best = min(medians[record["pass"], c] for c in ("eager", "keras"))
            assert medians[record["pass"], record["best_peer"]] == best
            assert record["speedup"] == pytest.approx(best / record["seconds"]["median"])
            assert record["implementation"]


def test_a_forced_implementation(run):
    code, records = run([TINY["dot"]], "--against", "ours:reference", "ours:nonsense", "--no-time")
    status = {r["candidate"]: r["status"] for r in records}
    assert code == 0
    assert status == {"ours": "ok", "ours:reference": "ok", "ours:nonsense": "skipped"}


def test_another_number_of_threads(run):
    names = ("ours:reference@1", "ours@1", "sdpa", "sdpa@1")
    code, records = run([TINY["dot"]], "--threads", "2", "--against", *names)
    assert code == 0 and torch.get_num_threads() == 2
    medians = {(r["pass"], r["candidate"]): r["seconds"]["median"] for r in records}
    for record in records:
        name, at, _ = record["candidate"].partition("@")
        assert ("scaling" in record) == (bool(at) and name in ("ours", "sdpa"))
        if "scaling" in record:
            here, there = (medians[record["pass"], n] for n in (name, record["candidate"]))
            assert record["scaling"] == pytest.approx(there / here)
        assert ("speedup" in record) == (record["candidate"] == "ours")


needs_loops = pytest.mark.skipif(
    limits.library() is None, reason="benchmarks/loops is not built (make build)"
)


@needs_loops
def test_the_additive_score_is_held_to_the_machine(run):
    _, records = run([Problem("additive", 1, 2, 32, 32, 16)], "--against", "ours:generic")
    held_to = [r for r in records if r["type"] == "machine_limit"]
    ours = [r for r in records if r["candidate"] == "ours"]
    isas = {ours[0]["implementation"], "generic"}
    for one_pass in ("forward", "forward_backward"):
        expected = {f"limit:additive_{one_pass}:{isa}" for isa in isas}
        assert {r["candidate"] for r in held_to if r["pass"] == one_pass} == expected
    for record in held_to:
        assert record["rate"] == pytest.approx(record["work"] / record["seconds"]["min"])
        assert 1e8 < record["rate"] < 1e13  # a core does at least one element in ten cycles
    for record in ours:
        assert 0 < record["figures"]["arithmetic"] < 1.5


@needs_loops
def test_decoding_is_held_to_reading_and_full_attention_to_products(run):
    decode = Problem("dot", 1, 2, 1, 4096, 64)
    full = Problem("dot", 1, 1, 1024, 1024, 32)
    _, records = run([decode, full], "--against", "sdpa", "--pass", "forward")
    rates = {(r["label"], r["candidate"]): r["rate"] for r in records if "rate" in r}
    ours = {r["label"]: r for r in records if r["candidate"] == "ours"}
    seconds = {label: r["seconds"]["median"] for label, r in ours.items()}
    read = 2 * 2 * 4096 * 64 * 4 / seconds[decode.label]
    assert ours[decode.label]["figures"] == pytest.approx({
        "rate_read": read,
        "read": read / rates[decode.label, "limit:read"],
        "read_large": read / rates[decode.label, "limit:read_large"],
    })  # fmt: skip
    flops = 4 * 1024 * 1024 * 32 / seconds[full.label]
    figures = ours[full.label]["figures"]
    assert figures["rate_flops"] == pytest.approx(flops)
    assert figures["gemm"] == pytest.approx(flops / rates[full.label, "limit:gemm"])
    assert {"gemm_attention", "fma"} < set(figures)


def test_shares_of_the_additive_limit():
    """Of 64 triples, at rates that take 1 s forward and 4 s with backward."""
    problem = Problem("additive", 1, 1, 4, 4, 4)
    rates = {"additive_forward:avx2": 64.0, "additive_forward_backward:avx2": 16.0}
    forward = limits.figures(problem, False, 4, "avx2", 10.0, rates)
    assert forward == pytest.approx({"ns_per_element": 1e9 * 10 / 64, "arithmetic": 1 / 10})
    assert limits.figures(problem, True, 4, "avx2", 10.0, rates)["arithmetic"] == 4 / 10
    assert set(limits.figures(problem, False, 4, "avx512", 10.0, rates)) == {"ns_per_element"}


def test_parts_are_the_whole(capsys):
    def listed(*arguments):
        assert bench.main(["--list", *arguments]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if " B1 H" in line]

    whole = listed("--set", "grid_short", "grid_long", "--against", "sdpa")
    parts = [
        listed("--set", "grid_short", "grid_long", "--against", "sdpa", "--part", f"{k}/3")
        for k in (1, 2, 3)
    ]
    assert len(whole) == len(set(whole)) == 72
    assert [line for lines in parts for line in lines] == whole and all(parts)
    assert listed("--set", "grid_short", "--only", "L512", "D64", "causal") == [
        f"dot B1 H{heads} L512 D64 causal" for heads in (1, 8, 32)
    ]


def test_skips_what_does_not_fit_in_memory(run, monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1 << 10)
    _, records = run([TINY["additive"]], "--against", "eager")
    for record in records:
        if record["candidate"] == "eager":
            assert record["status"] == "skipped" and "does not fit in memory" in record["reason"]
        else:
            assert record["status"] == "ok"


def test_part_of_the_heads_of_a_large_problem(monkeypatch):
    """The sampled heads give the numbers of all heads."""
    problem = Problem("additive", 1, 8, 5, 7, 8, kv_heads=4)
    inputs = problem_sets.make_inputs(problem, torch.float64, "cpu", True)
    grad_out = torch.ones(1, 8, 5, 8, dtype=torch.float64)
    full = verify.Reference(problem, inputs, grad_out)
    monkeypatch.setattr(verify, "MAX_WORK", 0)
    part = verify.Reference(problem, inputs, grad_out)
    assert full.heads == list(range(8)) and part.heads == [0, 1, 6, 7]
    torch.testing.assert_close(part.outputs["out"], full.outputs["out"][:, part.heads])
    torch.testing.assert_close(part.inputs["key"].grad, full.inputs["key"].grad[:, [0, 3]])
    torch.testing.assert_close(part.inputs["weight"].grad, full.inputs["weight"].grad[part.heads])


def test_blocks_of_queries_give_the_whole_reference(monkeypatch):
    problem = TINY["dot float causal"]
    inputs = problem_sets.make_inputs(problem, torch.float64, "cpu", True)
    grad_out = torch.ones(1, 2, 6, 8, dtype=torch.float64)
    whole = verify.Reference(problem, inputs, grad_out)
    monkeypatch.setattr(verify, "CHUNK", 2 * 6 * 4)  # four queries at a time
    blocks = verify.Reference(problem, inputs, grad_out)
    torch.testing.assert_close(blocks.outputs["out"], whole.outputs["out"])
    for name, t in whole.inputs.items():
        torch.testing.assert_close(blocks.inputs[name].grad, t.grad)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_sees_what_a_function_allocates():
    size = 64 << 20
    # In a process of its own: in this one malloc may have kept as much from an earlier test.
    program = (
        "import torch; from benchmarks import measure; print(measure.peak_bytes_here("
        f"lambda: torch.zeros({size}, dtype=torch.uint8) + 1, 'cpu'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    assert 2 * size * 0.9 < int(output) < 2 * size * 1.3


def test_times_are_interleaved():
    order = []
    functions = {n: (lambda n=n: order.append(n) or measure.time.sleep(0.006)) for n in "ab"}
    measure.interleaved_times(functions, "cpu", seconds=0)
    timed = order[-2 * measure.MIN_SAMPLES :]
    assert timed == ["a", "b"] * measure.MIN_SAMPLES


def test_a_repeated_measurement_replaces_all_of_the_first(tmp_path):
    lines = (Path(__file__).with_name("data") / "bench_sample.jsonl").read_text().splitlines()
    first = next(r for r in map(json.loads, lines) if r.get("speedup") and "memory" in r)
    again = {k: v for k, v in first.items() if k not in ("speedup", "best_peer", "memory")}
    again["seconds"] = {**again["seconds"], "median": 7.0}
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([lines[0], json.dumps(first), lines[0], json.dumps(again)]))
    _, (record,) = report.read([path])
    assert record["seconds"]["median"] == 7.0 and record["run"] == 2
    assert "speedup" not in record and record["memory"] == first["memory"]


def test_report(tmp_path):
    """From a sample: tables for the documents, and two pictures."""
    pytest.importorskip("matplotlib")
    sample = Path(__file__).with_name("data") / "bench_sample.jsonl"
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- benchmarks: summary -->\nold\n<!-- end -->\nbetween\n"
        "<!-- benchmarks: tables -->\n<!-- end -->\nafter\n"
    )
    report.main([str(sample), "--images", str(tmp_path), "--update", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old" not in text and text.count("between") == 1
    assert (
        "| additive, forward | 2.00 / 4.00 compile: **2x** | 40.0 / 80.0 compile: **2x** |" in text
    )
    assert "| B1 H8 L128 D64 | forward | 2.00 |  | 4.00 | 20.0 | 2x |  |" in text
    assert "| B1 H8 L512 D64 | forward | 40.0 |  | 80.0 | does not fit | 2x |  |" in text
    assert "| B1 H8 L512 D16 | forward | 10.0 | 20.0 | 40.0 |  | 4x | 2x |" in text
    assert "| 8 | 128 | 64 | 1.00 (1.5x) | 1.00 (6x) | 3.00 (1.5x) | 1.00 (6x) |" in text
    assert (
        "| float32, 2 threads, forward + backward | 4 | 3.00x | 1.50x | 6.00x | "
        "1.50x (H8 L128 D64) |" in text
    )
    assert "| B1 H1 L1024 D32 | float32, 2 threads, forward | 134 | 67 % | 80 % | 25 % |" in text
    assert "| B1 H8 Lq1 Lk4096 D64 | float32, 2 threads | 0.100 | 168 | 90 % | 175 % |" in text
    assert "| avx512 | 0.0186 | 87 % | 1.90x |" in text
    assert "| additive | block | float32, 2 threads | 25 % | 40 % | 40 % |" in text
    assert "| fma:avx512 | G fma/s | 2 | 320 | 320 | 320 |" in text
    assert "| additive B1 H8 L512 D64 | forward | 3.0 MiB | 1.50 |" in text
    assert "takes 0.120 s beyond" in text
    assert text.count("some processor") == 2 and "commit 0123456789" in text
    for name in ("additive_time.png", "dot_speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000


def test_report_refuses_a_document_without_its_place(tmp_path):
    sample = Path(__file__).with_name("data") / "bench_sample.jsonl"
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        report.main([str(sample), "--update", str(tmp_path / "README.md")])
