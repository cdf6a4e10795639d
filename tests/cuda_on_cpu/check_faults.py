"""Plants faults in copies of the CUDA kernels and checks that the tests find each of them.

    python check_faults.py <build folder> <compiler> <CUDA include folder> [fault name]

A fault is a replacement in the source: one that no longer matches is an error, so that the list
follows the kernels.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = "-std=c++20 -DCUDA_ON_CPU -g1 -gdwarf-4 -fno-strict-aliasing -fno-threadsafe-statics -w"
BUILDS = {  # flags of everything, flags of the kernels only, seed
    "plain": ("-O1", "", 1),
    "race": ("-O1", "-fsanitize=thread", 0),
    "asan": (
        "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "-fsanitize-sections=cuda_shared",
        3,
    ),
}


PARTS = ("forward", "backward", "weights")  # kernels/cuda/attention_<part>.cu


@dataclass
class Fault:
    name: str
    file: str  # below csrc
    old: str
    new: str
    build: str
    test: str  # a name, or a part of names, of float32 tests
    message: str = "FAILED"  # what the report must contain


FAULTS = [
    Fault(
        "no barrier before an operand is staged over",
        "kernels/cuda/attention_tile.cuh",
        "    __syncthreads();\n    stage<",
        "    stage<",
        "race",
        "dot causal",
        "data race",
    ),
    Fault(
        "no barrier between staging and use",
        "kernels/cuda/attention_tile.cuh",
        "const bool skip_zeros = __syncthreads_or(beyond) != 0;",
        "const bool skip_zeros = beyond;",
        "race",
        "dot causal",
        "data race",
    ),
    Fault(
        "a slot past the end of the operand",
        "kernels/cuda/attention_tile.cuh",
        "const int slot = index / kVectors;",
        "const int slot = index / kVectors + (columns == Tile<Acc>::kWidth ? 6 : 0);",
        "asan",
        "dot causal",
        "use-after-poison",
    ),
    Fault(
        "reads rows that do not exist",
        "kernels/cuda/attention_tile.cuh",
        "const bool inside = token >= from.begin && token < from.end;",
        "const bool inside = true;",
        "asan",
        "dot causal",
        "heap-buffer-overflow",
    ),
    Fault(
        "a barrier that not all threads reach",
        "kernels/cuda/attention_forward.cuh",
        "if (__syncthreads_or(load_biases<T>(bias, p, batch, head, pairs)) == 0) continue;",
        "if (!load_biases<T>(bias, p, batch, head, pairs)) continue;",
        "plain",
        "dot causal",
        "names lanes that have exited",
    ),
    Fault(
        "sum not rescaled with the maximum",
        "kernels/cuda/attention_forward.cuh",
        "sum[r] = sum[r] * rescale[r] + total;",
        "sum[r] = sum[r] + total;",
        "plain",
        "dot one query",
        "out:",
    ),
    Fault(
        "0 * NaN",
        "kernels/cuda/attention_tile.cuh",
        "if (skip_zeros && w == 0) continue;",
        "",
        "plain",
        "dot NaN behind a mask",
    ),
    Fault(
        "an element of grad_mask with two owners",
        "kernels/cuda/attention_backward.cuh",
        "if (i >= p.mask_size[2] || j >= p.mask_size[3]) continue;",
        "if (i > p.mask_size[2] || j >= p.mask_size[3]) continue;",
        "race",
        "dot float mask of queries",
        "another block",
    ),
    Fault(
        "gradient of lse left out",
        "kernels/cuda/attention_backward.cuh",
        "workspace.delta[first_row + i] = delta - grad_lse;",
        "workspace.delta[first_row + i] = delta;",
        "plain",
        "dot lse gradient",
    ),
    Fault(
        "the slope's gradient read before all warps have written",
        "kernels/cuda/attention_backward.cuh",
        "shared.tile[thread / 32] = grad_slope;\n    __syncthreads();",
        "shared.tile[thread / 32] = grad_slope;",
        "race",
        "dot slopes",
        "data race",
    ),
    Fault(
        "the slope's gradient once for each slice of the head dim",
        "kernels/cuda/attention_backward.cuh",
        "block.owner == Owner::kQueries && block.dim == 0 && call.grad_slopes",
        "block.owner == Owner::kQueries && call.grad_slopes",
        "race",
        "additive slopes",
        "another block",
    ),
    Fault(
        "lse used where it cannot hold the sum",
        "kernels/cuda/attention_backward.cuh",
        "fabs(lse) > kLseLimit<Acc> &&",
        "false &&",
        "plain",
        "dot mask of lowest numbers",
    ),
    Fault(
        "products of exponentials beyond their range",
        "kernels/cuda/attention_scores.cuh",
        "Acc(88) : Acc(11)",
        "Acc(880) : Acc(110)",
        "plain",
        "additive beyond the exponential form",
    ),
    Fault(
        "a mean that is a sum",
        "kernels/cuda/attention_weights.cuh",
        "result[r][c] * share",
        "result[r][c]",
        "plain",
        "weights mean",
    ),
    Fault(
        "chosen rows taken for the first ones",
        "kernels/cuda/attention_weights.cuh",
        "? key_range(call, batch, i) : KeyRange{0, 0}",
        "? key_range(p, batch, i) : KeyRange{0, 0}",
        "plain",
        "weights of chosen rows",
    ),
]


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


class Checker:
    def __init__(self, folder: Path, compiler: str, cuda: str):
        self.folder, self.compiler, self.cuda = folder, compiler, cuda

    def compile(self, source: Path, to: Path, csrc: Path, flags: str) -> None:
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        command = [
            self.compiler, *FLAGS.split(), *flags.split(), f"-I{HERE}/emulator", f"-I{HERE}",
            f"-I{csrc}", "-isystem", self.cuda, *language, "-c", str(source), "-o", str(to),
        ]  # fmt: skip
        result = run(command)
        if result.returncode != 0:
            raise RuntimeError(f"{source} does not compile:\n{result.stdout}")

    def runtime(self, build: str) -> list[str]:
        """The objects of the emulation and of the tests, which no fault changes."""
        folder = self.folder / build
        folder.mkdir(parents=True, exist_ok=True)
        flags, _, _ = BUILDS[build]
        objects = []
        for source in [*sorted((HERE / "emulator").glob("*.cpp")), HERE / "testing.cpp",
                       HERE / "test_attention.cu", HERE / "test_attention_weights.cu"]:  # fmt: skip
            objects.append(folder / f"{source.name}.o")
            self.compile(source, objects[-1], CSRC, flags)
        return [str(path) for path in objects]

    def check(self, index: int, fault: Fault, objects: list[str]) -> str | None:
        """None if the fault is found, else what happened instead."""
        folder = self.folder / f"fault{index}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(CSRC / "kernels", folder / "csrc" / "kernels")
        path = folder / "csrc" / fault.file
        text = path.read_text()
        if fault.old not in text:
            return f"{fault.file} has no {fault.old!r}"
        path.write_text(text.replace(fault.old, fault.new, 1))
        # One dtype is enough, and compiles in a quarter of the time.
        dispatch = folder / "csrc/kernels/cuda/attention_dispatch.h"
        text = dispatch.read_text()
        for other in (
            "kFloat64: return with_score(double())",
            "kFloat16: return with_score(__half())",
            "kBFloat16: return with_score(__nv_bfloat16())",
        ):
            if other not in text:
                return f"{dispatch.name} has no {other!r}"
            text = text.replace(other, other.split(":")[0] + ": break")
        dispatch.write_text(text)
        flags, kernel_flags, seed = BUILDS[fault.build]
        kernels = [folder / f"attention_{part}.o" for part in PARTS]
        for kernel in kernels:
            source = folder / "csrc/kernels/cuda" / f"{kernel.stem}.cu"
            self.compile(source, kernel, folder / "csrc", f"{flags} {kernel_flags}")
        program = folder / "tests"
        link = [
            self.compiler,
            *flags.split(),
            *map(str, kernels),
            *objects,
            "-ldl",
            "-o",
            str(program),
        ]
        if (linked := run(link)).returncode != 0:
            return linked.stdout
        environment = dict(os.environ, CUDA_ON_CPU_SEED=str(seed), ASAN_OPTIONS="detect_leaks=0")
        result = run([str(program), fault.test], env=environment)
        shutil.rmtree(folder)
        if result.returncode != 0 and fault.message in result.stdout:
            return None
        failed = [line for line in result.stdout.splitlines() if not line.startswith("ok")]
        return f"exit code {result.returncode}, no {fault.message!r} in\n" + "\n".join(failed[:8])


def main() -> int:
    checker = Checker(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    wanted = [f for f in FAULTS if len(sys.argv) < 5 or sys.argv[4] in f.name]
    objects = {build: checker.runtime(build) for build in sorted({f.build for f in wanted})}
    with ThreadPoolExecutor(max_workers=2) as pool:
        outcomes = pool.map(
            lambda item: checker.check(item[0], item[1], objects[item[1].build]), enumerate(wanted)
        )
        missed = 0
        for fault, outcome in zip(wanted, outcomes, strict=True):
            print(
                f"{'found ' if outcome is None else 'MISSED'} {fault.build:5} {fault.name}",
                flush=True,
            )
            if outcome is not None:
                missed += 1
                print("    " + outcome.replace("\n", "\n    "), flush=True)
    print(f"{len(wanted)} faults, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
