"""Compiles the kernels of the group method by nvcc and checks what ptxas and the SASS say of them.

    python check_compiled.py <build folder> <nvcc> [cuobjdump]

For each target: no spills (of the blocks of keys in backward no more than they are known for), and
registers for as many blocks as the kernel counts on. With cuobjdump
(in the PATH or beside nvcc too) also the instructions of the inner block, which does a quad of
features for a warp's 16 queries and a tile of keys, against the budget of docs/kernels.md.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
FOLDER = CSRC / "kernels/cuda/sm80"
SOURCES = ("additive_group", "additive_group_backward")
TARGETS = ("80", "90a")
REGISTERS = 65536  # of a multiprocessor

# Blocks of a multiprocessor and threads of a block, by columns of the values (0: other kernels).
FORWARD_BLOCKS = {64: 3, 128: 2, 256: 2}
FORWARD_THREADS = 128
GRADIENT_THREADS = 384
# Bytes of spill stores of the blocks of keys, by target; those of queries have none.
GRADIENT_SPILLS = {"80": 32, "90a": 16}

# The inner block with four groups to a reciprocal, per 16 x 8 pairs of one group and warp.
BUDGET = {"HMMA": 2.0, "FP32": 10.0, "MUFU": 1.0, "LDS": 0.8, "HMUL2": 0.5, "all": 15.5}


def output_of(*command: str) -> str:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=CSRC
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


def width_of(kernel: str) -> int:
    """Columns of the values of a forward kernel by its mangled name, else 0."""
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
    if not any("forward_kernel" in entry[0] or "gradients_kernel" in entry[0] for entry in entries):
        wrong.append(f"sm_{target}: no forward or gradients kernel in ptxas' output")
    for name, *numbers in entries:
        stack, stores, loads, registers = map(int, numbers)
        width = width_of(name)
        gradients = re.search(r"gradients_kernelI\w*?Lb([01])", name)
        threads = FORWARD_BLOCKS[width] * FORWARD_THREADS if width else GRADIENT_THREADS
        most = REGISTERS // threads // 8 * 8 if width or gradients else 64
        spills = GRADIENT_SPILLS[target] if gradients and gradients[1] == "1" else 0
        short = re.search(r"additive_group_\w+?_kernel(I\w*?E)?", name)
        title = f"sm_{target} {short[0] if short else name}"
        print(f"{title}: {registers} registers, {stores} bytes of spill stores, stack {stack}")
        if max(stack, stores) > spills or loads > 2 * spills or registers > min(most, 255):
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
        "FP32": ("FMUL", "FFMA", "FADD"),
        "MUFU": ("MUFU",),
        "LDS": ("LDS", "LDSM"),
        "HMUL2": ("HMUL2", "HFMA2"),
    }
    found = Counter(all=len(block))
    for opcode in block:
        for kind, names in kinds.items():
            found[kind] += opcode.split(".")[0] in names
    return found


def check_instructions(target: str, sass: str) -> list[str]:
    wrong = []
    for kernel, blocks in blocks_of(sass).items():
        width = width_of(kernel)
        if width == 0:
            continue
        keys = 32 if width > 128 else 64
        units = 4 * keys // 8  # groups by tiles of 8 keys
        inner = [counts(block) for block in blocks]
        inner = [c for c in inner if c["HMMA"] == 2 * units and c["MUFU"] == units]
        title = f"sm_{target} forward, {width} columns"
        if len(inner) != 1:
            wrong.append(f"{title}: {len(inner)} blocks look like the inner one")
            continue
        each = {kind: inner[0][kind] / units for kind in BUDGET}
        print(f"{title}: " + ", ".join(f"{kind} {x:.2f}" for kind, x in each.items()))
        # Operands of the queries are loaded for half as many keys where the values are wide.
        extra = {"LDS": 0.4, "HMUL2": 0.5, "all": 1.5} if keys == 32 else {}
        wrong += [
            f"{title}: {each[kind]:.2f} {kind}, the budget is {limit}"
            for kind, limit in ((k, x + extra.get(k, 0)) for k, x in BUDGET.items())
            if each[kind] > limit
        ]
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
