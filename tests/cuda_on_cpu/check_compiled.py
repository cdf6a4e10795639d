"""Checks what ptxas has made of the kernels of the additive score, in the objects of the build.

    python check_compiled.py <object>...

For each architecture in them: no spills, or no more than a kernel is known for, and registers for
as many blocks as it counts on. Also the instructions of the inner blocks, against the budgets of
docs/kernels.md: of the group method's forward, which does a quad of features for a warp's 16
queries and a tile of keys; of the exponential form's scores, of 16 pairs and four features; of its
slopes, of 8 queries, 8 keys and two features of each lane.

Needs cuobjdump: in the PATH, of the CUDA toolkit, or of the package triton. Without it the exit
status is 77.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = (
    "additive_exponential",
    "additive_exponential_backward",
    "additive_exponential_prepare",
    "additive_group",
    "additive_group_backward",
    "additive_sines",
    "additive_sines_backward",
)
NOT_FOUND = 77  # the exit status of a test that was skipped
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Limits:
    """Of the kernels whose mangled name matches the pattern."""

    pattern: str
    threads: int  # of a block
    blocks: int  # of a multiprocessor
    spills: dict[str, int] = field(default_factory=dict)  # bytes on the stack, by target


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
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def width_of(kernel: str) -> int:
    """Columns of the values of a forward kernel of the group method by its mangled name, else 0."""
    found = re.search(r"additive_group_forward_kernel\w*Li(\d+)E", kernel)
    return int(found[1]) if found else 0


def check_resources(target: str, usage: str) -> list[str]:
    wrong = []
    entries = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", usage)
    if not entries:
        wrong.append(f"sm_{target}: no kernel in cuobjdump's output")
    for name, *numbers in entries:
        registers, stack, local = map(int, numbers)
        limits = next(x for x in LIMITS if re.search(x.pattern, name))
        most = min(REGISTERS // (limits.threads * limits.blocks) // 8 * 8, 255)
        spills = limits.spills.get(target, 0)
        short = re.search(r"additive_[a-z_]+_kernel(I\w*?E)?", name)
        title = f"sm_{target} {short[0] if short else name}"
        print(f"{title}: {registers} registers, {stack} bytes of stack")
        if stack > spills or local > 0 or registers > most:
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


def find_cuobjdump() -> str | None:
    folders = [os.environ["PATH"], "/usr/local/cuda/bin"]
    if "CUDA_HOME" in os.environ:
        folders.append(f"{os.environ['CUDA_HOME']}/bin")
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        folders.append(f"{Path(triton.origin).parent}/backends/nvidia/bin")
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def main() -> int:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("cuobjdump was not found")
        return NOT_FOUND
    # It calls nvdisasm, which lies beside it.
    os.environ["PATH"] += os.pathsep + str(Path(cuobjdump).resolve().parent)
    wrong = []
    objects = {Path(x).name.removesuffix(".cu.o"): x for x in sys.argv[1:]}
    for source in SOURCES:
        built = output_of(cuobjdump, "-lelf", objects[source])
        targets = re.findall(r"\.sm_(\w+)\.cubin", built)
        if not targets:
            wrong.append(f"{source}: no machine code in {objects[source]}")
        for target in targets:
            what = (f"-arch=sm_{target}", objects[source])
            wrong += check_resources(target, output_of(cuobjdump, "-res-usage", *what))
            wrong += check_instructions(target, output_of(cuobjdump, "-sass", *what))
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
