"""How long a run takes, roughly: so that a set can be measured in parts of known length."""

import os

from benchmarks import measure, peers, verify
from benchmarks.problem_sets import Problem

# Nanoseconds per pair and element (Lq Lk D), forward and with backward: what one run measured with
# 2 threads of a server processor of 2024 with AVX-512. A name that is not here counts as "other".
TYPICAL = {
    "dot": {"ours": (0.01, 0.035), "sdpa": (0.022, 0.08), "other": (0.04, 0.12)},
    "additive": {
        "ours": (0.02, 0.09), "ours:avx2": (0.035, 0.15),
        "compile": (0.6, 6.2), "other": (4.0, 8.0),
    },
    "multi_head": {"ours": (0.055, 0.18), "other": (0.09, 0.25)},
    "multi_head_weights": {"ours": (0.1, 0.3), "other": (0.12, 0.3)},
}  # fmt: skip
# PyTorch's product of float16 is slow on a CPU.
SLOWER = {("sdpa", "float16"): (2.7, 12.0)}
# All of it, not what is free: every process that measures a part must find the same parts.
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
COMPILE_SECONDS = 10.0  # of torch.compile, for each pass
REFERENCE = {"dot": 1.0, "additive": 40.0}  # the same in float64, of the heads that are compared


def seconds(
    problem: Problem,
    dtype: str,
    names: list[str],
    passes: list[str],
    threads: list[int],
    budget: float,
) -> float:
    """Of one problem in one dtype; budget: --seconds."""
    triples = problem.full_pairs * problem.head_dim
    heads = min(
        problem.batch * problem.heads, max(2.0, verify.MAX_WORK / (triples / problem.heads))
    )
    compared = triples * heads / (problem.batch * problem.heads)
    total = REFERENCE.get(problem.op, 0.3) * 1e-9 * compared
    for name in names:
        candidate = peers.candidate_of(name)
        if problem.op not in candidate.ops or candidate.not_supported(problem):
            continue
        base, _, at = name.partition("@")
        typical = TYPICAL.get(problem.op, {"other": (1e-6, 1e-6)})
        costs = typical.get(base, typical.get(base.split(":")[0], typical["other"]))
        left = problem.pairs / problem.full_pairs if base.startswith("ours") else 1.0
        for count in threads:
            for one_pass in passes:
                backward = one_pass == "forward_backward"
                needed = candidate.intermediate_bytes(problem, backward, 4)
                if needed > 0.9 * MEMORY:
                    continue
                once = costs[backward] * 1e-9 * triples * left * 2 / (int(at) if at else count)
                once *= SLOWER.get((base, dtype), (1.0, 1.0))[backward]
                once = max(once, 1e-5)
                calls, samples = measure.plan(once, budget)
                warm_up = min(10, 2 + int(0.2 / once))
                total += once * (calls * samples + warm_up) + 0.05
                total += COMPILE_SECONDS if base == "compile" else 0.0
    return total


def part(items: list[Problem], costs: list[float], index: int, count: int) -> list[Problem]:
    """The index-th (from 1) of `count` parts that take about the same time."""
    whole = sum(costs)
    chosen, before = [], 0.0
    for item, cost in zip(items, costs, strict=True):
        middle = (before + cost / 2) / whole
        if min(int(middle * count), count - 1) == index - 1:
            chosen.append(item)
        before += cost
    return chosen
