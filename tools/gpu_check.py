"""make gpu-check: everything that needs a GPU, in under ten minutes, on a machine that has one.

    python tools/gpu_check.py [--out gpu-check] [--build build/torch-2.14.1]

Runs the tests of the kernels that the emulation on the CPU runs too, the tests marked `cuda`,
compute-sanitizer on a short list (where it is installed) and the quick benchmarks. Writes
gpu-check.json (results) and gpu-check.log (all output) into --out.
Exit code: 0 all good, 1 something failed, 3 no usable GPU, 4 a library without CUDA kernels.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any, TextIO

import torch

import torch_selfattn

ROOT = Path(__file__).resolve().parent.parent
NO_GPU, NO_CUDA_KERNELS = 3, 4
# Seconds for each step; together under ten minutes.
LIMITS = {
    "kernels": 60, "tests": 270, "memcheck": 60, "racecheck": 60, "benchmarks": 80, "additive": 50,
    "additive_float32": 50,
}  # fmt: skip


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def environment() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "modified": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
        "torch_selfattn": torch_selfattn.__version__,
        "cuda_archs": torch_selfattn._C.cuda_archs,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "driver": output_of(
            "nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ),
    }  # fmt: skip


def gpu() -> dict[str, Any]:
    """The first call to the GPU; raises RuntimeError without one."""
    torch.ones(8, device="cuda").sum().item()
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


class Steps:
    def __init__(self, log: TextIO) -> None:
        self.log = log
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, name: str, *command: str | Path) -> dict[str, Any]:
        """Runs a command with its output in the log and its verdict in the results."""
        words = [str(word) for word in command]
        print(f"{name}: {' '.join(words)}", flush=True)
        self.log.write(f"\n==== {name}: {' '.join(words)}\n")
        self.log.flush()
        start = time.monotonic()
        position = Path(self.log.name).stat().st_size
        try:
            status = subprocess.run(
                words, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT,
                timeout=LIMITS[name.split(".")[0]],
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = None
        result = {
            "good": status == 0,
            "seconds": round(time.monotonic() - start, 1),
            "exit_code": status,
            "timed_out": status is None,
        }
        self.results[name] = result
        verdict = "ok" if result["good"] else "FAILED" if status is not None else "OUT OF TIME"
        print(f"{name}: {verdict} ({result['seconds']} s)", flush=True)
        if not result["good"]:
            self.log.flush()
            written = Path(self.log.name).read_bytes()[position:].decode(errors="replace")
            print(*(f"    {line}" for line in written.splitlines()[-15:]), sep="\n", flush=True)
        return result

    def skip(self, name: str, reason: str) -> None:
        print(f"{name}: skipped, {reason}", flush=True)
        self.results[name] = {"good": None, "skipped": reason}


def count_tests(report: Path) -> dict[str, Any]:
    if not report.exists():
        return {}
    cases = list(xml.parse(report).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return {
        "passed": len([c for c in cases if len(c) == 0 or c.find("system-out") is not None]),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "skipped": len([c for c in cases if c.find("skipped") is not None]),
    }


def find_compute_sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if found is None and home is not None:
            found = shutil.which("compute-sanitizer", path=f"{home}/bin")
    return found


def run_steps(steps: Steps, out: Path, build: Path | None) -> None:
    python = sys.executable
    programs = sorted(build.glob("tests/cuda_on_cpu/gpu/gpu.*")) if build is not None else []
    for program in programs:
        steps.run(f"kernels.{program.name.removeprefix('gpu.')}", program)
    if not programs:
        steps.skip("kernels", "there is no --build with them")

    tests = ROOT / "tests/python"
    report = out / "tests.xml"
    report.unlink(missing_ok=True)
    result = steps.run(
        "tests", python, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT,
        "-m", "cuda", "-n", str(min(8, os.cpu_count() or 1)), "-p", "no:cacheprovider",
        f"--junit-xml={report}", tests,
    )  # fmt: skip
    result.update(count_tests(report))
    report.unlink(missing_ok=True)

    sanitizer = find_compute_sanitizer()
    for check in ("memcheck", "racecheck"):
        if sanitizer is None:
            steps.skip(check, "compute-sanitizer is not installed")
        else:
            steps.run(
                check, sanitizer, "--tool", check, "--error-exitcode", "9",
                python, ROOT / "tools/gpu_cases.py",
            )  # fmt: skip

    benchmarks = {
        "benchmarks": ("--set", "quick"),
        "additive": (
            "--set", "additive_gpu", "--dtype", "bfloat16",
            "--against", "ours:additive_exponential", "compile",
        ),
        "additive_float32": (
            "--set", "additive_gpu", "--dtype", "float32", "--against", "ours:generic", "compile",
        ),
    }  # fmt: skip
    for name, arguments in benchmarks.items():
        lines = out / f"{name}.jsonl"
        lines.unlink(missing_ok=True)
        result = steps.run(
            name, python, ROOT / "benchmarks/bench.py", *arguments, "--device", "cuda",
            "--output", lines,
        )  # fmt: skip
        if lines.exists():
            result["lines"] = [json.loads(line) for line in lines.read_text().splitlines() if line]
            lines.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-check")
    parser.add_argument("--build", type=Path, help="a build folder with the tests of the kernels")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    start = time.monotonic()
    document: dict[str, Any] = {"environment": environment(), "gpu": None, "steps": {}}
    with (out / "gpu-check.log").open("w") as log:
        json.dump(document["environment"], log, indent=2)
        steps = Steps(log)
        try:
            document["gpu"] = gpu()
            print(f"GPU: {document['gpu']}", flush=True)
            if torch_selfattn._C.cuda:
                run_steps(steps, out, options.build)
                verdicts = [step["good"] for step in steps.results.values()]
                code, verdict = (1, "failed") if False in verdicts else (0, "good")
            else:
                code = NO_CUDA_KERNELS
                verdict = "the library has no CUDA kernels: build with CUDA=ON to see why"
        except (RuntimeError, AssertionError) as error:
            first_line = re.split(r"\n", str(error))[0]
            code, verdict = NO_GPU, f"no usable GPU: {first_line}"
        document |= {
            "steps": steps.results,
            "verdict": verdict,
            "seconds": round(time.monotonic() - start, 1),
        }
        log.write(f"\n==== {verdict}\n")
    (out / "gpu-check.json").write_text(json.dumps(document, indent=2) + "\n")
    print(
        f"gpu-check: {verdict}. Results: {out / 'gpu-check.json'}, output: {out / 'gpu-check.log'}"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
