"""Times and memory of functions that have been verified."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIN_SAMPLE_SECONDS = 0.005
MIN_SAMPLES = 5
MIN_SAMPLES_OF_SLOW = 3  # of calls that take longer than SLOW_SECONDS
SLOW_SECONDS = 5.0
MAX_SAMPLES = 50


@dataclass(frozen=True)
class Times:
    """Seconds per call. A sample is the mean over `calls` calls in a row."""

    median: float
    q1: float
    q3: float
    min: float
    samples: int
    calls: int

    @staticmethod
    def of(samples: list[float], calls: int) -> "Times":
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Times(median, q1, q3, min(samples), len(samples), calls)


def _seconds(function: Callable[[], Any], calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def _typical_seconds(function: Callable[[], Any], device: str) -> float:
    """Of a warm call that was not interrupted: the shortest of a few."""
    first = _seconds(function, 1, device)
    if first > SLOW_SECONDS / 5:  # it was verified before: no need to call it again
        return first
    times = [_seconds(function, 1, device)]
    while len(times) < 10 and sum(times) < 0.2:
        times.append(_seconds(function, 1, device))
    return min(times)


def plan(once: float, seconds: float) -> tuple[int, int]:
    """Calls in a sample and number of samples for a function that takes `once` seconds."""
    calls = max(1, round(MIN_SAMPLE_SECONDS / once))
    fewest = MIN_SAMPLES_OF_SLOW if once > SLOW_SECONDS else MIN_SAMPLES
    return calls, min(MAX_SAMPLES, max(fewest, int(seconds / (once * calls))))


def interleaved_times(
    functions: Mapping[str, Callable[[], Any]],
    device: str,
    seconds: float,
    brief: Collection[str] = (),
) -> dict[str, Times]:
    """Times all functions in turn, so that a busy moment of the machine meets all of them.

    Each gets about `seconds`, those in `brief` a quarter: they take part in fewer rounds, evenly
    spread, as the slow ones do.
    """
    calls: dict[str, int] = {}
    rounds: dict[str, int] = {}
    for name, function in functions.items():
        share = seconds / 4 if name in brief else seconds
        calls[name], rounds[name] = plan(_typical_seconds(function, device), share)
    total = max(rounds.values(), default=0)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    gc_was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(total):
            for name, function in functions.items():
                if (i + 1) * rounds[name] // total > i * rounds[name] // total:
                    samples[name].append(_seconds(function, calls[name], device))
    finally:
        if gc_was_enabled:
            gc.enable()
    return {name: Times.of(samples[name], calls[name]) for name in functions}


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_bytes_here(function: Callable[[], Any], device: str) -> int:
    """Peak memory that one call takes on top of what is there, its results included."""
    function()  # compiles, loads libraries, starts threads
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    anonymous, file = _resident("RssAnon"), _resident("RssFile")
    result = function()
    # Where memory is short the system drops pages of files (libraries) meanwhile, which would hide
    # as much of what was allocated: take the smaller number of them.
    peak = _resident("VmHWM") - anonymous - min(file, _resident("RssFile"))
    del result
    return peak


def peak_bytes(arguments: list[str], device: str) -> int | str:
    """peak_bytes_here in a process of its own, or the reason why there is no figure.

    bench.py with --measure-memory is the process. glibc keeps freed memory for later by
    default; told to return every large block, its resident size is what is in use.
    """
    if device == "cpu" and not sys.platform.startswith("linux"):
        return "peak memory on the CPU is read from Linux's /proc"
    bench = Path(__file__).with_name("bench.py")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(
        [sys.executable, str(bench), *arguments], capture_output=True, text=True, env=environment
    )
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        return f"the measuring process ended with code {run.returncode}: {last}"
    return int(json.loads(run.stdout.splitlines()[-1])["peak_bytes"])


def import_seconds(runs: int) -> Times:
    """Time that `import torch_selfattn` takes where torch is imported already."""
    program = (
        "import time, torch; begin = time.perf_counter(); import torch_selfattn; "
        "print(time.perf_counter() - begin)"
    )
    folder = Path(__file__).parent  # -c puts the current folder first; here is no torch_selfattn
    samples = [
        float(subprocess.check_output([sys.executable, "-c", program], text=True, cwd=folder))
        for _ in range(runs + 1)
    ]
    return Times.of(samples[1:], 1)  # the first one reads the files from the disk


def available_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62  # not known here: try
