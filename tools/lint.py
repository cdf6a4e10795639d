"""make lint: everything that can be said about the sources without running them.

    python tools/lint.py <build folder with compile_commands.json> [--only <step>...] [--all-tidy]

Every step runs, also after a failure; the exit code is 1 if any failed.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 600  # "about 500"

# clang-tidy takes 5 to 15 s for a file that includes torch and under 1 s for a kernel, so of the
# former only those with logic of their own are checked by default.
TIDY = (
    "csrc/kernels/",
    "csrc/ops/checks.cpp",
    "csrc/ops/meta/",
    "csrc/ops/cpu/",
    "csrc/ops/problem",
)


def tracked(*patterns: str) -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in sorted(set(listing.stdout.split("\n"))) if (ROOT / name).is_file()]


def run(*command: str) -> bool:
    return subprocess.run(command, cwd=ROOT).returncode == 0


def tool(module: str, *arguments: str) -> bool:
    return run(sys.executable, "-m", module, *arguments)


# --- Rules of the source tree -----------------------------------------------------------------


@dataclass
class Rule:
    """Lines of some files that must not match, and why."""

    files: tuple[str, ...]
    forbidden: str
    reason: str
    except_in: tuple[str, ...] = ()


RULES = [
    Rule(
        ("csrc/kernels/*",),
        r'#\s*include\s*[<"](torch/|ATen/|c10/|ops/|torch_selfattn/)',
        "kernels are torch-free: they are tested alone, under sanitizers and without a GPU",
    ),
    Rule(
        ("csrc/ops/meta/*", "csrc/ops/autograd/*"),
        # .size with an argument: std::vector has one too. at::empty({0}) is no size of a problem.
        r"\.size\([^)]|\.(sizes|numel)\(|at::empty\(\{(?!\d+\}|[^,{}]*\? \d+ : \d+\})",
        "concrete sizes specialise compiled graphs: use sym_size, sym_numel, empty_symint",
    ),
    Rule(
        ("csrc/ops/*",),
        r"\bTORCH_LIBRARY",
        "a second copy of the library must not register: TORCH_SELFATTN_IMPL, TORCH_SELFATTN_SCHEMAS",
        except_in=("csrc/ops/registration.h",),
    ),
    Rule(
        ("csrc/kernels/cuda/*",),
        r"\basm\b|__asm",
        "inline PTX belongs into ptx.cuh, where the CPU emulation can replace it",
        except_in=("csrc/kernels/cuda/ptx.cuh",),
    ),
    Rule(
        ("csrc/kernels/cuda/*",),
        r"<<<",
        "kernels start through launch(), which the CPU emulation can replace",
    ),
]


def broken_rules() -> Iterator[str]:
    for rule in RULES:
        pattern = re.compile(rule.forbidden)
        for name in tracked(*rule.files):
            if name in rule.except_in:
                continue
            for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
                if pattern.search(line.split("//")[0]):
                    yield f"{name}:{number}: {line.strip()}\n    {rule.reason}"
    for name in tracked("*.cpp", "*.h", "*.cu", "*.cuh", "*.py"):
        text = (ROOT / name).read_text()
        lines = text.count("\n")
        if lines > MAX_LINES and "Length:" not in text:
            yield (
                f"{name}: {lines} lines\n    a file of more than about 500 lines says why in a "
                "comment that starts with 'Length:'"
            )


def source_rules() -> bool:
    broken = list(broken_rules())
    print("\n".join(broken) or f"{len(RULES) + 1} rules hold", flush=True)
    return not broken


# --- Tools ------------------------------------------------------------------------------------


def shell_syntax() -> bool:
    return all([run("bash", "-n", name) for name in [*tracked("*.sh"), ".ci/run"]])


def clang_format() -> bool:
    result = subprocess.run(
        [beside_python("clang-format"), "--dry-run", "--Werror", "--ferror-limit=1",
         *tracked("*.cpp", "*.h", "*.cu", "*.cuh")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    places = re.findall(r"^(\S+:\d+):\d+: error", result.stderr, re.MULTILINE)
    if result.returncode != 0:
        print("make format would change:", *(places or [result.stderr]), sep="\n    ", flush=True)
    return result.returncode == 0


def beside_python(name: str) -> str:
    """A program of this interpreter's environment, else of the PATH."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else shutil.which(name) or name


def without_precompiled_header(command: str) -> str:
    """g++'s header is none of clang's, and a file must be seen to include what it needs."""
    return re.sub(r"-Winvalid-pch|-include \S+/cmake_pch\.hxx", "", command)


def clang_tidy(build: Path, everything: bool) -> bool:
    commands = json.loads((build / "compile_commands.json").read_text())
    for entry in commands:
        entry["command"] = without_precompiled_header(entry["command"])
    build = build / "clang-tidy"
    build.mkdir(exist_ok=True)
    (build / "compile_commands.json").write_text(json.dumps(commands))
    sources = [Path(entry["file"]).resolve() for entry in commands]
    names = [str(path.relative_to(ROOT)) for path in sources if path.is_relative_to(ROOT)]
    names = [n for n in names if n.startswith("csrc/") and n.endswith(".cpp")]
    if not everything:
        names = [n for n in names if n.startswith(TIDY)]

    def check(name: str) -> subprocess.CompletedProcess[str]:
        # -fno-openmp: omp.h belongs to g++. Warnings that only g++ knows are none of clang's.
        return subprocess.run(
            [beside_python("clang-tidy"), "-p", str(build), "--quiet", "--warnings-as-errors=*",
             "--extra-arg=-fno-openmp", "--extra-arg=-Wno-unknown-warning-option", name],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip

    good = True
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, result in zip(names, pool.map(check, names), strict=True):
            if result.returncode != 0:
                good = False
                print(f"{name}:\n{result.stdout}{result.stderr}", flush=True)
    print(f"clang-tidy: {len(names)} files", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--only", nargs="+", help="names of the steps to run")
    parser.add_argument("--all-tidy", action="store_true", help="clang-tidy over all of csrc")
    options = parser.parse_args()

    steps: dict[str, Callable[[], bool]] = {
        "ruff": lambda: tool("ruff", "check", "--quiet", "."),
        "ruff-format": lambda: tool("ruff", "format", "--quiet", "--diff", "."),
        "clang-format": clang_format,
        "rules": source_rules,
        "shell": shell_syntax,
        "docs": lambda: run(sys.executable, "tools/check_docs.py"),
        "mypy": lambda: tool("mypy", "--no-error-summary"),
        "clang-tidy": lambda: clang_tidy(options.build, options.all_tidy),
    }
    failed = []
    for name, step in steps.items():
        if options.only is None or name in options.only:
            start = time.monotonic()
            good = step()
            verdict = "ok" if good else "FAILED"
            print(f"{name:13} {verdict:6} {time.monotonic() - start:6.1f} s", flush=True)
            failed += [] if good else [name]
    if failed:
        print(f"lint failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
