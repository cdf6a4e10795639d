"""Where a figure comes from: device, processor, versions, commit."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# Of the processor's flags, those that attention kernels are written for.
INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni",
    "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve",
)  # fmt: skip


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() in ("flags", "Features"):
                flags = value.split()
                break
    except OSError:
        pass
    return {
        "model": model,
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", "-C", str(root), *arguments], text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        results = ":!benchmarks/results"  # being written
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(root), results)
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: str, threads: list[int]) -> dict[str, Any]:
    # Here, so that a report can be made where neither is installed.
    import torch

    import torch_selfattn

    description: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "cpu": _cpu(),
        "threads": threads,
        # What else ran on the machine: the load of the last minute at the start.
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_selfattn": torch_selfattn.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }
    if device == "cuda":
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = torch.version.cuda
        description["cudnn"] = torch.backends.cudnn.version()
    return description


def in_words(description: dict[str, Any]) -> str:
    cpu = description["cpu"]
    lines = [
        f"{cpu['model']}, {cpu['cores']} cores ({' '.join(cpu['instruction_sets'])}), "
        f"load {description['load']} at the start",
        f"torch_selfattn {description['torch_selfattn']} at commit {description['commit']}, "
        f"torch {description['torch']}, Python {description['python']}, {description['time']}",
    ]
    if "gpu" in description:
        lines.insert(
            0,
            f"{description['gpu']}, CUDA {description['cuda']}, cuDNN {description['cudnn']}",
        )
    return "\n".join(lines)
