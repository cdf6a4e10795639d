"""benchmarks/: it refuses wrong results, writes what report.py reads, and the report draws."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import bench, measure, peers, problem_sets, report, verify  # noqa: E402
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
    "multi_head": Problem("multi_head", 2, 2, 5, 5, 4),
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
        assert gradients == (expected if record["pass"] == "forward_backward" else set())


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
    """Else a report would compare figures of different runs. (`quick` is not reported.)"""
    sets = {n: s for n, s in problem_sets.SETS.items() if n not in ("quick", "memory")}
    problems = [problem for s in sets.values() for problem in s]
    assert len(problems) == len(set(problems))


def test_records(run):
    _, records = run([TINY["additive"]], "--against", "eager", "keras")
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
    torch.testing.assert_close(part.out, full.out[:, part.heads])
    torch.testing.assert_close(part.inputs["key"].grad, full.inputs["key"].grad[:, [0, 3]])
    torch.testing.assert_close(part.inputs["weight"].grad, full.inputs["weight"].grad[part.heads])


def test_blocks_of_queries_give_the_whole_reference(monkeypatch):
    problem = TINY["dot float causal"]
    inputs = problem_sets.make_inputs(problem, torch.float64, "cpu", True)
    grad_out = torch.ones(1, 2, 6, 8, dtype=torch.float64)
    whole = verify.Reference(problem, inputs, grad_out)
    monkeypatch.setattr(verify, "CHUNK", 2 * 6 * 4)  # four queries at a time
    blocks = verify.Reference(problem, inputs, grad_out)
    torch.testing.assert_close(blocks.out, whole.out)
    for name, t in whole.inputs.items():
        torch.testing.assert_close(blocks.inputs[name].grad, t.grad)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_sees_what_a_function_allocates():
    size = 64 << 20
    peak = measure.peak_bytes_here(lambda: torch.zeros(size, dtype=torch.uint8) + 1, "cpu")
    assert 2 * size * 0.9 < peak < 2 * size * 1.3


def test_times_are_interleaved():
    order = []
    functions = {n: (lambda n=n: order.append(n) or measure.time.sleep(0.006)) for n in "ab"}
    measure.interleaved_times(functions, "cpu", seconds=0)
    timed = order[-2 * measure.MIN_SAMPLES :]
    assert timed == ["a", "b"] * measure.MIN_SAMPLES


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
    assert "| B1 H8 L128 D64 | forward | 2.00 | 4.00 | 20.0 | 2x |" in text
    assert "| B1 H8 L512 D64 | forward | 40.0 | 80.0 | does not fit | 2x |" in text
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
