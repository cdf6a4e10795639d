"""Plants faults in copies of the CUDA kernels and checks that the tests find each of them.

    python check_faults.py [--only PART]... <build folder> <compiler> <CUDA include folder>...

A fault is a replacement in the source: one that no longer matches is an error, so that the list
follows the kernels.

Length: most of it is that list.
"""

import argparse
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


GENERIC = ("attention_forward", "attention_backward", "attention_weights")  # kernels/cuda/*.cu
EXPONENTIAL = (
    "sm80/additive_exponential",
    "sm80/additive_exponential_backward",
    "sm80/additive_exponential_prepare",
)
KERNELS = (
    *GENERIC,
    *EXPONENTIAL,
    "sm80/additive_group",
    "sm80/additive_group_backward",
    "sm80/additive_sines",
    "sm80/additive_sines_backward",
)


@dataclass(frozen=True)
class Program:
    """What is compiled for a fault: for one dtype only, which takes a quarter of the time."""

    tests: tuple[str, ...]
    kernels: tuple[str, ...]  # that may have the fault
    dtype: str  # of the tests

    @property
    def others(self) -> tuple[str, ...]:
        """Kernels that never have the fault."""
        return tuple(name for name in KERNELS if name not in self.kernels)


PROGRAMS = {
    "attention": Program(("test_attention.cu", "test_attention_weights.cu"), GENERIC, "kFloat32"),
    "exponential": Program(("test_additive_exponential.cu",), EXPONENTIAL, "kFloat32"),
    "group": Program(("test_additive_group.cu",), ("sm80/additive_group",), "kBFloat16"),
    "group gradients": Program(
        ("test_additive_group_backward.cu",), ("sm80/additive_group_backward",), "kBFloat16"
    ),
    "sines": Program(("test_additive_sines.cu",), ("sm80/additive_sines",), "kBFloat16"),
    "sines gradients": Program(
        ("test_additive_sines_backward.cu",), ("sm80/additive_sines_backward",), "kBFloat16"
    ),
}

# Replacements that leave one dtype in the kernels: (file, text, dtype it is for, without it).
DTYPES = [
    ("attention_dispatch.h", f"{name}: return with_score({cpp}())", name, f"{name}: break")
    for name, cpp in (
        ("kFloat64", "double"),
        ("kFloat32", "float"),
        ("kFloat16", "__half"),
        ("kBFloat16", "__nv_bfloat16"),
    )
] + [
    (
        "sm80/additive_group.cu",
        "? forward<__half>(call, workspace, stream)",
        "kFloat16",
        "? cudaErrorInvalidValue",
    ),
    (
        "sm80/additive_group_backward.cu",
        "? Launches<__half>(call, device, workspace, stream).all()",
        "kFloat16",
        "? cudaErrorInvalidValue",
    ),
    (
        "sm80/additive_sines.cu",
        "? forward<__half>(call, resident, workspace, stream)",
        "kFloat16",
        "? cudaErrorInvalidValue",
    ),
]


@dataclass
class Fault:
    name: str
    file: str  # below csrc
    old: str
    new: str
    build: str
    test: str  # a name, or a part of names, of tests of the program's dtype
    message: str = "FAILED"  # what the report must contain

    @property
    def program(self) -> Program:
        for name in ("exponential", "group gradients", "group", "sines gradients", "sines"):
            if self.test.startswith(name):
                return PROGRAMS[name]
        return PROGRAMS["attention"]


FORWARD = "kernels/cuda/sm80/additive_group_forward.cuh"
GRADIENTS = "kernels/cuda/sm80/additive_group_gradients.cuh"
SINES = "kernels/cuda/sm80/additive_sines_forward.cuh"
SINE_GRADIENTS = "kernels/cuda/sm80/additive_sines_gradients.cuh"
EXPONENTIAL_TILE = "kernels/cuda/sm80/additive_exponential_tile.cuh"
EXPONENTIAL_FORWARD = "kernels/cuda/sm80/additive_exponential_forward.cuh"
EXPONENTIAL_GRADIENTS = "kernels/cuda/sm80/additive_exponential_gradients.cuh"
EXPONENTIAL_SLOPES = "kernels/cuda/sm80/additive_exponential_slopes.cuh"

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
    Fault(
        "leaky ReLU: without its slope",
        "kernels/cuda/attention_scores.cuh",
        "return x > 0 ? x : negative_slope * x;",
        "return x > 0 ? x : Acc(0);",
        "plain",
        "leaky f32, groups, mask",
    ),
    Fault(
        "leaky ReLU: the derivative of the identity",
        "kernels/cuda/attention_scores.cuh",
        "(sum > 0 ? Acc(1) : weight.negative_slope)",
        "Acc(1)",
        "plain",
        "leaky f32, groups, mask",
    ),
    Fault(
        "leaky ReLU: a hidden NaN times the gradient 0",
        "kernels/cuda/attention_scores.cuh",
        "if (g == 0) continue;  // never 0 * NaN\n            const Vector<Acc> x = ",
        "const Vector<Acc> x = ",
        "plain",
        "leaky NaN behind a mask",
    ),
    Fault(
        "exponential: two features of four with each other's weights",
        EXPONENTIAL_TILE,
        "fmaf(w.z, x3, w.w * x2)",
        "fmaf(w.z, x2, w.w * x3)",
        "plain",
        "exponential, N(0, 2)",
    ),
    Fault(
        "exponential: the last feature alone with the third's x",
        EXPONENTIAL_TILE,
        "fmaf(w.w, reciprocal_approx(x3), s[r][c])",
        "fmaf(w.w, reciprocal_approx(x2), s[r][c])",
        "plain",
        "exponential N(0, 5)",
    ),
    Fault(
        "exponential: four features share beyond their range",
        EXPONENTIAL_TILE,
        "if (sum <= 11) return",
        "if (sum <= 22) return",
        "plain",
        "exponential two features",
    ),
    Fault(
        "exponential: slopes of single features exchanged",
        EXPONENTIAL_SLOPES,
        "return {reciprocal_approx(x1), reciprocal_approx(x0), 1.0F};",
        "return {reciprocal_approx(x0), reciprocal_approx(x1), 1.0F};",
        "plain",
        "exponential N(0, 5)",
    ),
    Fault(
        "exponential: nothing is beyond the range",
        "kernels/cuda/sm80/additive_exponential_prepare.cu",
        "if (!(largest <= tensor.limit)) largest = kInfinity<float>;",
        "",
        "plain",
        "exponential N(0, 1e4)",
    ),
    Fault(
        "exponential: padding is not zero",
        "kernels/cuda/sm80/additive_exponential_prepare.cu",
        "if (token >= range.begin && token < range.end) {",
        "if (token < tensor.length) {",
        "plain",
        "exponential NaN behind lengths",
    ),
    Fault(
        "exponential: scores that are not bounded keep their first maximum",
        EXPONENTIAL_FORWARD,
        "bool has_maximum = bounded;",
        "bool has_maximum = true;",
        "plain",
        "exponential large weights, long",
    ),
    Fault(
        "exponential: sums are not rescaled",
        EXPONENTIAL_FORWARD,
        "sum[r] *= rescale[r];",
        "",
        "plain",
        "exponential large weights, long",
    ),
    Fault(
        "exponential: the output is not rescaled",
        EXPONENTIAL_FORWARD,
        "fmaf(out[n][e], factor[e / 2], product[n][e])",
        "out[n][e] + product[n][e]",
        "plain",
        "exponential large weights, long",
    ),
    Fault(
        "exponential: the gradient of lse is left out of dq",
        EXPONENTIAL_GRADIENTS,
        "block.key_range == 0 &&",
        "block.key_range < 0 &&",
        "plain",
        "exponential lse gradient",
    ),
    Fault(
        "exponential: rows without a key take the gradient of lse",
        EXPONENTIAL_GRADIENTS,
        "statistics.maximum[at] != -kInfinity<float> && statistics.inverse_sum[at] != 0",
        "true",
        "plain",
        "exponential rows without a key",
    ),
    Fault(
        "exponential: dk without the sum of g",
        EXPONENTIAL_GRADIENTS,
        "fmaf(-4.0F, x, of_key)",
        "-4.0F * x",
        "plain",
        "exponential odd sizes",
    ),
    Fault(
        "exponential: ranges of queries leave their parts in one place",
        EXPONENTIAL_GRADIENTS,
        "const std::int64_t part = block.row * workspace.query_ranges + block.query_range;",
        "const std::int64_t part = block.row * workspace.query_ranges;",
        "plain",
        "exponential odd sizes",
    ),
    Fault(
        "exponential: the mask's gradient is not cleared where nothing is allowed",
        EXPONENTIAL_GRADIENTS,
        "clear_mask_gradient(call, block, tile, key_tile);",
        ";",
        "plain",
        "exponential f16 mask, full, causal",
    ),
    Fault(
        "exponential: parts of dq read before all warps have left theirs",
        EXPONENTIAL_GRADIENTS,
        "          __syncthreads();\n          query_sum.add(",
        "          query_sum.add(",
        "race",
        "exponential E 16",
        "data race",
    ),
    Fault(
        "exponential: dP read before all warps have stored it",
        EXPONENTIAL_GRADIENTS,
        "      store_grad_weights(memory, value.columns, p.dtype);\n      __syncthreads();",
        "      store_grad_weights(memory, value.columns, p.dtype);",
        "race",
        "exponential E 16",
        "data race",
    ),
    Fault(
        "exponential: a stage copied over while it is read",
        EXPONENTIAL_FORWARD,
        "float* const to = stages + key_tile % 2 * (2 * Shape::kTokens);",
        "float* const to = stages + 0 * (2 * Shape::kTokens);",
        "race",
        "exponential blocks hidden by a mask",
        "data race",
    ),
    Fault(
        "exponential: too little shared memory",
        "kernels/cuda/sm80/additive_exponential_shape.h",
        "4 * kTokens + kPairs + kTileTokens;",
        "4 * kTokens + kPairs;",
        "asan",
        "exponential E 16",
        "",
    ),
    Fault(
        "group: a stage used before all warps have filled it",
        FORWARD,
        "cp_async_wait<0>();\n      __syncthreads();\n      if (first == 0)",
        "cp_async_wait<0>();\n      if (first == 0)",
        "race",
        "group odd sizes",
        "data race",
    ),
    Fault(
        "group: a copy not waited for",
        FORWARD,
        "cp_async_wait<0>();\n      __syncthreads();\n      if (first == 0)",
        "cp_async_wait<1>();\n      __syncthreads();\n      if (first == 0)",
        "race",
        "group odd sizes",
        "data race",
    ),
    Fault(
        "group: values not waited for where there are few quads",
        FORWARD,
        "if (quads <= step_quads) {",
        "if (quads < 0) {",
        "race",
        "group one quad",
        "data race",
    ),
    Fault(
        "group: a shuffle that some lanes pass by",
        FORWARD,
        "const WeightNorms norms = WeightNorms::of(weight, p.head_dim, scale);",
        "WeightNorms norms = {0, 0};"
        "if (least.two >= kLeastDenominator) norms = WeightNorms::of(weight, p.head_dim, scale);",
        "plain",
        "group one huge key",
        "deadlock",
    ),
    Fault(
        "group: four joined beyond their range",
        "kernels/cuda/sm80/additive_group_products.cuh",
        "kLeastDenominator = 0x1p-116f",
        "kLeastDenominator = 0",
        "plain",
        "group two joined, far edge",
    ),
    Fault(
        "group: the products of queries without their factor",
        FORWARD,
        "if (!join_four) {",
        "if (false) {",
        "plain",
        "group two joined, far edge",
    ),
    Fault(
        "group: keys not centred",
        "kernels/cuda/sm80/additive_group_extremes.cuh",
        "? 0.5f * high + 0.5f * low : 0.0f",
        "? 0.0f * high : 0.0f",
        "plain",
        "group keys of 50, queries of -50",
    ),
    Fault(
        "group: both rows of a lane drop alike",
        "kernels/cuda/sm80/fragments.cuh",
        "first_row + (odd ? 8 : 0)",
        "first_row",
        "plain",
        "group dropout",
    ),
    Fault(
        "group: a tile with NaN not done again",
        FORWARD,
        "block_finite ? 0 : 1",
        "0",
        "plain",
        "group NaN behind a mask",
    ),
    Fault(
        "group: values of keys that do not exist",
        "kernels/cuda/sm80/additive_group_tile.cuh",
        "key >= begin && key < end",
        "true",
        "asan",
        "group odd sizes",
        "AddressSanitizer",
    ),
    Fault(
        "group: gradients from parts of scores that are not there yet",
        GRADIENTS,
        "      barrier_sync(1 + stripe, 32 * quads);\n#pragma unroll 1\n      for (int piece",
        "#pragma unroll 1\n      for (int piece",
        "race",
        "group gradients odd sizes",
        "data race",
    ),
    Fault(
        "group: columns loaded over before all warps have used them",
        GRADIENTS,
        "    cp_async_wait<0>();\n    __syncthreads();",
        "    cp_async_wait<0>();\n    barrier_sync(1 + stripe, 32 * quads);",
        "race",
        "group gradients odd sizes",
        "data race",
    ),
    Fault(
        "group: gradients of a key of one head only",
        GRADIENTS,
        "if (kOwnsKeys) sum = 0;",
        "",
        "plain",
        "group gradients grouped heads",
        "grad_key",
    ),
    Fault(
        "group: num / den rounded without its constant",
        "kernels/cuda/sm80/additive_group_gradients_pieces.cuh",
        "constant += __shfl_xor_sync(~0u, constant, 2);",
        "constant = 0;",
        "plain",
        "group gradients, q N(5, 1), k N(-2, 1)",
        "relative error",
    ),
    Fault(
        "group: queries' sums of p not left for the keys",
        GRADIENTS,
        "workspace.statistics[stripe_of.index * kStripe + row].y -= log2f(sum);",
        "",
        "plain",
        "group gradients, q N(5, 1), k N(-2, 1)",
        "relative error",
    ),
    Fault(
        "group: NaN in gradients not done again",
        GRADIENTS,
        "if (__syncthreads_and(finite) == 0 &&",
        "if (__syncthreads_and(finite) == 2 &&",
        "plain",
        "group gradients NaN behind a mask",
    ),
    Fault(
        "group: keys drop what other queries drop",
        "kernels/cuda/sm80/additive_group_gradients_pieces.cuh",
        "Dropout::block_index(row + q, pairs.key, p.key_length)",
        "Dropout::block_index(row, pairs.key, p.key_length)",
        "plain",
        "group gradients dropout",
    ),
    Fault(
        "sines: a slot used before all warps have filled it",
        SINES,
        "cp_async_wait<0>();\n      __syncthreads();",
        "cp_async_wait<0>();",
        "race",
        "sines odd sizes",
        "data race",
    ),
    Fault(
        "sines: a copy not waited for",
        SINES,
        "cp_async_wait<0>();\n      __syncthreads();",
        "cp_async_wait<1>();\n      __syncthreads();",
        "race",
        "sines odd sizes",
        "data race",
    ),
    Fault(
        "sines: halves joined whose maxima differ",
        SINES,
        "numbers[(4 * n + i) * kHalf + index] * other[t][i / 2]",
        "numbers[(4 * n + i) * kHalf + index]",
        "plain",
        "sines slopes, causal",
    ),
    Fault(
        "sines: a head beyond all fits not left",
        SINES,
        "head.left != 0",
        "false",
        "plain",
        "sines beyond all fits",
    ),
    Fault(
        "sines: no straight line",
        "kernels/cuda/sm80/additive_sines_features.cuh",
        "alone[t] += x[t] * line;",
        "",
        "plain",
        "sines odd sizes",
    ),
    Fault(
        "sines: g written over p before all warps have read it",
        SINE_GRADIENTS,
        "          __syncthreads();  // nobody reads p any more\n",
        "",
        "race",
        "sines gradients odd sizes",
        "data race",
    ),
    Fault(
        "sines: g summed up over half of the queries",
        SINE_GRADIENTS,
        "sums[row] + sums[kSineRows + row]",
        "sums[row]",
        "plain",
        "sines gradients odd sizes",
    ),
    Fault(
        "sines: the weight's gradient from rounded sums of large keys",
        SINE_GRADIENTS,
        "(kKeys ? x - mean : x + mean)",
        "x",
        "plain",
        "sines gradients keys of 50, queries of -50",
    ),
    Fault(
        "sines: keys drop what other queries drop",
        "kernels/cuda/sm80/additive_sines_gradients_tile.cuh",
        "first_query + query + column, j",
        "first_query + query, j",
        "plain",
        "sines gradients dropout",
    ),
]


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


class Checker:
    def __init__(self, folder: Path, compiler: str, cuda: list[str]):
        self.folder, self.compiler = folder, compiler
        self.cuda = [word for path in dict.fromkeys(cuda) for word in ("-isystem", path)]

    def compile(self, source: Path, to: Path, csrc: Path, flags: str) -> None:
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        command = [
            self.compiler, *FLAGS.split(), *flags.split(), f"-I{HERE}/emulator", f"-I{HERE}",
            f"-I{csrc}", *self.cuda, *language, "-c", str(source), "-o", str(to),
        ]  # fmt: skip
        result = run(command)
        if result.returncode != 0:
            raise RuntimeError(f"{source} does not compile:\n{result.stdout}")

    def copy_kernels(self, folder: Path, program: Program) -> Path:
        """A csrc with the kernels for the program's dtype."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(CSRC / "kernels", folder / "csrc" / "kernels")
        for name, old, dtype, new in DTYPES:
            path = folder / "csrc/kernels/cuda" / name
            text = path.read_text()
            if old not in text:
                raise RuntimeError(f"{name} has no {old!r}")
            if dtype != program.dtype:
                path.write_text(text.replace(old, new))
        return folder / "csrc"

    def compile_kernels(
        self, names: tuple[str, ...], csrc: Path, folder: Path, build: str
    ) -> list[Path]:
        flags, kernel_flags, _ = BUILDS[build]
        objects = [folder / f"{Path(name).name}.o" for name in names]
        for name, to in zip(names, objects, strict=True):
            self.compile(csrc / "kernels/cuda" / f"{name}.cu", to, csrc, f"{flags} {kernel_flags}")
        return objects

    def runtime(self, build: str, program: Program) -> list[Path]:
        """The objects of the emulation, of the tests and of kernels which no fault changes."""
        folder = self.folder / f"{build} {program.kernels[0].replace('/', ' ')}"
        csrc = self.copy_kernels(folder, program)
        flags, _, _ = BUILDS[build]
        objects = self.compile_kernels(program.others, csrc, folder, build)
        for source in [
            *sorted((HERE / "emulator").glob("*.cpp")),
            HERE / "testing.cpp",
            *(HERE / name for name in program.tests),
        ]:
            objects.append(folder / f"{source.name}.o")
            self.compile(source, objects[-1], CSRC, flags)
        return objects

    def check(self, index: int, fault: Fault, objects: list[Path]) -> str | None:
        """None if the fault is found, else what happened instead."""
        folder = self.folder / f"fault{index}"
        csrc = self.copy_kernels(folder, fault.program)
        path = csrc / fault.file
        text = path.read_text()
        if fault.old not in text:
            return f"{fault.file} has no {fault.old!r}"
        path.write_text(text.replace(fault.old, fault.new, 1))
        kernels = self.compile_kernels(fault.program.kernels, csrc, folder, fault.build)
        flags, _, seed = BUILDS[fault.build]
        program = folder / "tests"
        link = [
            self.compiler,
            *flags.split(),
            *map(str, [*kernels, *objects]),
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("compiler")
    parser.add_argument("cuda", nargs="+")
    parser.add_argument("--only", action="append", help="a part of the names of faults")
    options = parser.parse_args()
    checker = Checker(options.folder.resolve(), options.compiler, options.cuda)
    wanted = [f for f in FAULTS if any(part in f.name for part in options.only or [""])]
    if not wanted:
        parser.error(f"--only: part of the name of a fault (got {options.only!r})")
    wanted_objects = sorted({(f.build, f.program.kernels) for f in wanted})
    objects = {
        (build, program.kernels): checker.runtime(build, program)
        for program in PROGRAMS.values()
        for build in BUILDS
        if (build, program.kernels) in wanted_objects
    }
    with ThreadPoolExecutor(max_workers=2) as pool:
        outcomes = pool.map(
            lambda item: checker.check(
                item[0], item[1], objects[item[1].build, item[1].program.kernels]
            ),
            enumerate(wanted),
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
