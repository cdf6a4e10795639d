"""Compiles the kernels of the additive score by nvcc and checks what ptxas and the SASS say.

    python check_compiled.py <build folder> <nvcc> [cuobjdump]

For each target: no spills, or no more than a kernel is known for, and registers for as many blocks
as it counts on. With cuobjdump (in the PATH or beside nvcc too) also the instructions of the inner
blocks, against the budgets of docs/kernels.md: of the group method's forward, which does a quad of
features for a warp's 16 queries and a tile of keys; of the exponential form's scores, of 16 pairs
and four features; of its slopes, of 8 queries, 8 keys and two features of each lane.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
FOLDER = CSRC / "kernels/cuda/sm80"
SOURCES = (
    "additive_exponential",
    "additive_exponential_backward",
    "additive_exponential_prepare",
    "additive_group",
    "additive_group_backward",
    "additive_sines",
    "additive_sines_backward",
)
TARGETS = ("80", "90a")
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Limits:
    """Of the kernels whose mangled name matches the pattern."""

    pattern: str
    threads: int  # of a block
    blocks: int  # of a multiprocessor
    spills: dict[str, int] = field(default_factory=dict)  # bytes of stores, by target


# The spills of the exponential form are outside of its inner blocks.
LIMITS = [
    Limits("additive_group_forward_kernel.*Li64E", 128, 3),
    Limits("additive_group_forward_kernel.*Li(128|256)E", 128, 2),
    Limits("additive_group_gradients_kernel[^L]*Lb0", 384, 1),  # blocks of queries
    Limits("additive_group_gradients_kernel[^L]*Lb1", 384, 1, {"80": 32, "90a": 16}),
    Limits("additive_sines_forward_kernel", 256, 1),
    # On sm_80 the form that spills is one that no GPU has the shared memory for.
    Limits("additive_sines_gradients_kernel", 256, 1, {"80": 24}),
    Limits("additive_exponential_forward_kernel.*Li64E", 256, 2, {"90a": 24}),
    Limits("additive_exponential_gradients_kernel.*Li64E", 256, 2, {"80": 80, "90a": 64}),
    Limits("additive_exponential_(forward|gradients)_kernel.*Li128E", 256, 1),
    Limits("", 256, 4),  # the others
]

# Counts of the inner blocks, and of what: they are found by these numbers of HMMA, MUFU and FFMA.
# The group method with four groups to a reciprocal, per 16 x 8 pairs of one group and warp.
BUDGET = {"HMMA": 2.0, "FP32": 10.0, "MUFU": 1.0, "LDS": 0.8, "HMUL2": 0.5, "all": 15.5}
EXPONENTIAL_BLOCKS = {
    "scores by fours": ({"MUFU": 16, "FFMA": 128}, {"FP32": 224, "LDS": 9, "all": 258}),
    "scores by twos": ({"MUFU": 32, "FFMA": 128}, {"FP32": 192, "LDS": 9, "all": 242}),
    "slopes": ({"MUFU": 64, "FFMA": 640}, {"FP32": 832, "LDS": 32, "all": 960}),
}


def output_of(*command: str) -> str:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=CSRC
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


def width_of(kernel: str) -> int:
    """Columns of the values of a forward kernel of the group method by its mangled name, else 0."""
    found = re.search(r"additive_group_forward_kernel\w*Li(\d+)E", kernel)
    return int(found[1]) if found else 0


def check_resources(target: str, log: str) -> list[str]:
    wrong = []
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    if not entries:
        wrong.append(f"sm_{target}: no kernel in ptxas' output")
    for name, *numbers in entries:
        stack, stores, loads, registers = map(int, numbers)
        limits = next(x for x in LIMITS if re.search(x.pattern, name))
        most = min(REGISTERS // (limits.threads * limits.blocks) // 8 * 8, 255)
        spills = limits.spills.get(target, 0)
        short = re.search(r"additive_[a-z_]+_kernel(I\w*?E)?", name)
        title = f"sm_{target} {short[0] if short else name}"
        print(f"{title}: {registers} registers, {stores} bytes of spill stores, stack {stack}")
        if max(stack, stores) > spills or loads > 3 * spills or registers > most:
            wrong.append(f"{title}: more than {spills} bytes of spills, or than {most} registers")
    return wrong


def blocks_of(sass: str) -> dict[str, list[list[str]]]:
    """Instructions of each kernel by basic block: opcodes with their modifiers."""
    kernels: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in sass.splitlines():
        if found := re.match(r"\s*Function : (\w+)", line):
            name = found[1]
            kernels[name] = []
        elif (found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line)) and name:
            kernels[name].append((int(found[1], 16), found[2]))
    result = {}
    for kernel, code in kernels.items():
        jump = r"\b(?:BRA|BSSY|CALL|WARPSYNC)\b.*?\b0x([0-9a-f]+)"
        starts = {int(x[1], 16) for _, text in code if (x := re.search(jump, text))}
        blocks: list[list[str]] = [[]]
        for address, text in code:
            if address in starts:
                blocks.append([])
            words = text.split()
            blocks[-1].append(words[1] if words[0].startswith("@") else words[0])
            if re.search(r"\b(BRA|EXIT|RET)\b", text):
                blocks.append([])
        result[kernel] = blocks
    return result


def counts(block: list[str]) -> Counter[str]:
    kinds = {
        "HMMA": ("HMMA",),
        "FFMA": ("FFMA",),
        "FP32": ("FMUL", "FFMA", "FADD"),
        "MUFU": ("MUFU",),
        "LDS": ("LDS", "LDSM"),
        "HMUL2": ("HMUL2", "HFMA2"),
        "local": ("LDL", "STL"),
    }
    found = Counter(all=len(block))
    for opcode in block:
        for kind, names in kinds.items():
            found[kind] += opcode.split(".")[0] in names
    return found


def check_group(target: str, kernel: str, blocks: list[Counter[str]]) -> list[str]:
    width = width_of(kernel)
    keys = 32 if width > 128 else 64
    units = 4 * keys // 8  # groups by tiles of 8 keys
    inner = [c for c in blocks if c["HMMA"] == 2 * units and c["MUFU"] == units]
    title = f"sm_{target} forward, {width} columns"
    if len(inner) != 1:
        return [f"{title}: {len(inner)} blocks look like the inner one"]
    each = {kind: inner[0][kind] / units for kind in BUDGET}
    print(f"{title}: " + ", ".join(f"{kind} {x:.2f}" for kind, x in each.items()))
    # Operands of the queries are loaded for half as many keys where the values are wide.
    extra = {"LDS": 0.4, "HMUL2": 0.5, "all": 1.5} if keys == 32 else {}
    return [
        f"{title}: {each[kind]:.2f} {kind}, the budget is {limit}"
        for kind, limit in ((k, x + extra.get(k, 0)) for k, x in BUDGET.items())
        if each[kind] > limit
    ]


def check_exponential(target: str, kernel: str, blocks: list[Counter[str]]) -> list[str]:
    wrong = []
    gradients = "gradients_kernel" in kernel
    for name, (exact, most) in EXPONENTIAL_BLOCKS.items():
        if name == "slopes" and not gradients:
            continue
        title = f"sm_{target} {'gradients' if gradients else 'forward'}, {name}"
        inner = [c for c in blocks if all(c[kind] == count for kind, count in exact.items())]
        if not inner:
            wrong.append(f"{title}: no block looks like it")
        for found in inner:
            print(f"{title}: " + ", ".join(f"{kind} {found[kind]}" for kind in (*exact, *most)))
            wrong += [
                f"{title}: {found[kind]} {kind}, the budget is {limit}"
                for kind, limit in {**most, "local": 0}.items()
                if found[kind] > limit
            ]
    return wrong


def check_instructions(target: str, sass: str) -> list[str]:
    wrong = []
    for kernel, blocks in blocks_of(sass).items():
        found = [counts(block) for block in blocks]
        if width_of(kernel) != 0:
            wrong += check_group(target, kernel, found)
        elif re.search("additive_exponential_(forward|gradients)_kernel", kernel):
            wrong += check_exponential(target, kernel, found)
    return wrong


def find_cuobjdump(nvcc: str) -> str | None:
    if len(sys.argv) > 3:
        return sys.argv[3]
    beside = Path(nvcc).resolve().parent
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))


def main() -> int:
    folder, nvcc = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        print("cuobjdump was not found: instructions are not counted")
    else:
        # It calls nvdisasm, which lies beside it.
        os.environ["PATH"] += os.pathsep + str(Path(cuobjdump).resolve().parent)
    wrong = []
    for target in TARGETS:
        for source in SOURCES:
            cubin = folder / f"{source}.sm_{target}.cubin"
            log = output_of(
                nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", "-Xptxas", "-v",
                f"-gencode=arch=compute_{target},code=sm_{target}", "-cubin",
                str(FOLDER / f"{source}.cu"), "-o", str(cubin),
            )  # fmt: skip
            wrong += check_resources(target, log)
            if cuobjdump is not None:
                wrong += check_instructions(target, output_of(cuobjdump, "-sass", str(cubin)))
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
