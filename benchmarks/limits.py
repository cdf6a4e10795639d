"""What the machine could do at best, measured in turn with the operators that are held to it.

An operator's figure is given as a share of the rate of matrix products or of reading; for the
additive score, of the rate of a loop that does its arithmetic alone, with the instruction set that
its kernel uses. The loops for that are in benchmarks/loops/, which `make build` compiles.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.problem_sets import Problem

# Implementations of ours, and which loops are compiled as they are.
ISAS = {"generic": 0, "avx2": 1, "avx512": 2, "avx512bf16": 2, "amx": 2}
# What a round of each loop does for every lane of a vector, see benchmarks/loops/loops_isa.h: fused
# multiply-adds (FMA), or pairs and elements of the additive score.
LOOPS = {"fma": 0, "additive_forward": 1, "additive_forward_backward": 2}
WORK = 8
ROUNDS = 1 << 16  # 0.1 to 2 ms
SQUARE = 2048  # tokens of the square matrix product
LARGE = 256 << 20  # bytes, more than a cache holds


@dataclass(frozen=True)
class Limit:
    """Something that takes `work` units."""

    name: str
    unit: str
    work: float
    call: Callable[[], object]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loops: TORCH_SELFATTN_LOOPS, else the newest under build/ that loads, else None."""
    root = Path(__file__).resolve().parents[1]
    built = root.glob("build/*/benchmarks/loops/libtorch_selfattn_loops.so")
    newest = sorted(built, key=lambda path: path.stat().st_mtime, reverse=True)
    named = os.environ.get("TORCH_SELFATTN_LOOPS")
    for path in [named] if named else newest:
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # built for another system
            continue
    return None


def _loop(name: str, unit: str, isa: str, threads: int) -> list[Limit]:
    loops = library()
    lanes = loops.loops_vector_bytes(ISAS[isa]) // 4 if loops and isa in ISAS else 0
    if loops is None or not lanes:
        return []
    work = WORK * lanes * threads * ROUNDS
    arguments = ISAS[isa], LOOPS[name], ctypes.c_int64(ROUNDS), threads
    return [Limit(f"{name}:{isa}", unit, work, lambda: loops.loops_arithmetic(*arguments))]


def _read(name: str, size: int, threads: int) -> list[Limit]:
    loops = library()
    if loops is None:
        return []
    isa = max(i for i in ISAS.values() if loops.loops_vector_bytes(i))
    data = torch.ones(size // 4)
    arguments = isa, ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.numel()), threads

    def call() -> torch.Tensor:
        loops.loops_read(*arguments)
        return data  # alive as long as the call is

    return [Limit(name, "B/s", data.nbytes, call)]


def _products(length: int, head_dim: int) -> list[Limit]:
    """A large square product, and both of one head of attention, whose scores are stored."""
    a, b, out = (torch.ones(SQUARE, SQUARE) for _ in range(3))
    query, key, attended = (torch.ones(length, head_dim) for _ in range(3))
    scores = torch.empty(length, length)

    def square() -> None:
        torch.mm(a, b, out=out)

    def attention() -> None:
        torch.mm(query, key.T, out=scores)
        torch.mm(scores, key, out=attended)

    return [
        Limit("gemm", "FLOP/s", 2.0 * SQUARE**3, square),
        Limit("gemm_attention", "FLOP/s", 4.0 * length * length * head_dim, attention),
    ]


def _additive(backward: bool) -> str:
    return "additive_forward_backward" if backward else "additive_forward"


def of(
    problem: Problem, backward: bool, dtype: torch.dtype, threads: int, isas: list[str]
) -> list[Limit]:
    """Those that apply, on the CPU. isas: what the measured kernels of ours are compiled for."""
    p = problem
    if p.mask or p.causal:
        return []
    found: list[Limit] = []
    if p.op == "dot" and p.query_length == 1:
        if backward:
            return []
        footprint = 2 * p.batch * (p.kv_heads or p.heads) * p.key_length * p.head_dim
        found += _read("read", footprint * dtype.itemsize, threads)
        found += _read("read_large", LARGE, threads)
    elif p.op == "dot" and p.query_length >= 1024 and dtype == torch.float32:
        found += _products(p.query_length, p.head_dim)
        found += _loop("fma", "fma/s", isas[0], threads)
    elif p.op == "additive" and p.query_length > 1 and dtype != torch.float64:
        for isa in dict.fromkeys(isas):
            found += _loop(_additive(backward), "element/s", isa, threads)
    return found


def figures(
    problem: Problem,
    backward: bool,
    element_size: int,
    isa: str,
    seconds: float,
    rates: Mapping[str, float],
) -> dict[str, float]:
    """What ours reaches, `rate_...`, and as a share of each limit that was measured beside it."""
    p = problem
    triples = p.pairs * p.head_dim
    if p.op == "dot" and p.query_length == 1:
        if backward:
            return {}
        size = 2 * triples // (p.heads // (p.kv_heads or p.heads)) * element_size
        found = {"rate_read": size / seconds}
        return found | {n: size / seconds / rates[n] for n in ("read", "read_large") if n in rates}
    if p.op == "dot":
        # Two products forward; backward makes the scores again, and four more.
        rate = (14.0 if backward else 4.0) * triples / seconds
        found = {"rate_flops": rate}
        found |= {n: rate / rates[n] for n in ("gemm", "gemm_attention") if n in rates}
        if f"fma:{isa}" in rates:
            found["fma"] = rate / (2.0 * rates[f"fma:{isa}"])
        return found
    if p.op != "additive":
        return {}
    found = {"ns_per_element": 1e9 * seconds / triples}
    loop = f"{_additive(backward)}:{isa}"
    if loop in rates:
        found["arithmetic"] = triples / rates[loop] / seconds
    return found
