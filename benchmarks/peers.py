"""What is compared: ours, and what a user of PyTorch would write or call instead.

A candidate makes a function of the problem's tensors (problem_sets.make_inputs) that returns the
output, or the output and the weights. It says beforehand why it cannot run a problem, and how much
memory its largest intermediate tensors take.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_selfattn
from benchmarks.problem_sets import MASKS_WITHOUT_TENSOR, Problem, allowed, key_lengths

Function = Callable[..., Any]


def _nothing(problem: Problem, backward: bool, element_size: int) -> int:
    return 0


@dataclass(frozen=True)
class Candidate:
    """One way to compute the operators in `ops`."""

    ops: tuple[str, ...]
    make: Callable[[Problem], Function]
    is_ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    # Bytes of the large intermediate tensors that are alive at the same time.
    intermediate_bytes: Callable[[Problem, bool, int], int] = _nothing
    # Around every call, forward and backward.
    context: Callable[[], AbstractContextManager] = nullcontext
    # Why the problem cannot be run, "" if it can.
    not_supported: Callable[[Problem], str] = field(default=lambda problem: "")

    def arguments(self, problem: Problem, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The problem's tensors, and what says which pairs are allowed where that is none of them:
        ours takes lengths and windows, the others a boolean mask."""
        if problem.mask not in MASKS_WITHOUT_TENSOR:
            return inputs
        device = inputs["query"].device
        if not self.is_ours:
            keep = allowed(problem)
            assert keep is not None
            return {**inputs, "attn_mask": keep.to(device)}
        if problem.mask == "lengths":
            return {**inputs, "key_lengths": key_lengths(problem).to(device)}
        return inputs


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def candidate_of(name: str) -> Candidate:
    """NAME, ours:IMPLEMENTATION, and either with @THREADS behind it."""
    name, _, threads = name.partition("@")
    if name.startswith("ours:"):
        candidate = forced(name.removeprefix("ours:"))
    elif name in CANDIDATES:
        candidate = CANDIDATES[name]
    else:
        raise SystemExit(f"there is no candidate {name} (there are {', '.join(CANDIDATES)})")
    if not threads:
        return candidate
    context = candidate.context

    @contextmanager
    def both() -> Iterator[None]:
        with context(), _threads(int(threads)):
            yield

    return replace(candidate, context=both)


# Ours.


def our_options(problem: Problem) -> dict[str, Any]:
    """The keyword arguments of our functions; a mask and causal is the mask and a window."""
    windowed = problem.mask == "window"
    return {
        "is_causal": problem.causal and not problem.mask,
        "window_left": problem.key_length // 8 - 1 if windowed else -1,
        "window_right": 0 if windowed or (problem.causal and problem.mask) else -1,
        "enable_gqa": problem.groups > 1,
    }


def _ours(problem: Problem) -> Function:
    options = our_options(problem)

    def dot(query: Tensor, key: Tensor, value: Tensor, **more: Tensor) -> Tensor:
        return torch_selfattn.dot_product_attention(query, key, value, **more, **options)

    def additive(
        query: Tensor, key: Tensor, value: Tensor, weight: Tensor, **more: Tensor
    ) -> Tensor:
        return torch_selfattn.additive_attention(query, key, value, weight, **more, **options)

    def multi_head(
        x: Tensor,
        in_proj_weight: Tensor,
        in_proj_bias: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor,
    ) -> Tensor:
        in_proj = [in_proj_weight], [in_proj_bias]
        return torch_selfattn.multi_head_attention(
            x, x, x, problem.heads, *in_proj, out_proj_weight, out_proj_bias
        )

    def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch_selfattn.rotary_embedding(x, cos, sin)

    if problem.op == "multi_head_weights":
        return _multi_head_module(problem, torch_selfattn.nn.MultiHeadAttention)
    calls = {"dot": dot, "additive": additive, "multi_head": multi_head, "rotary": rotary}
    return calls[problem.op]


def forced(implementation: str) -> Candidate:
    """Ours by the implementation of this name instead of the best one."""
    return Candidate(
        ("dot", "additive", "multi_head", "multi_head_weights"),
        _ours,
        is_ours=True,
        context=lambda: torch_selfattn.use_implementation(implementation),
    )


# PyTorch's own attention.


def _sdpa(problem: Problem) -> Function:
    return lambda query, key, value, attn_mask=None: F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=problem.causal, enable_gqa=problem.groups > 1
    )


def _sdpa_backend(backend: SDPBackend) -> Candidate:
    return Candidate(("dot",), _sdpa, devices=("cuda",), context=lambda: sdpa_kernel(backend))


def _flex(problem: Problem) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if problem.causal:
        block_mask = create_block_mask(
            lambda b, h, i, j: j <= i, None, None, problem.query_length, problem.key_length
        )
    return lambda query, key, value: compiled(
        query, key, value, block_mask=block_mask, enable_gqa=problem.groups > 1
    )


def _multi_head_module(problem: Problem, kind: Callable[..., nn.Module]) -> Function:
    """Of nn.MultiheadAttention, or of ours, which has the same arguments and parameters."""
    width = problem.heads * problem.head_dim
    module = kind(width, problem.heads, batch_first=True)
    need_weights = problem.op == "multi_head_weights"

    def run(x: Tensor, **parameters: Tensor) -> Any:
        if module.in_proj_weight is not parameters["in_proj_weight"]:
            for name, parameter in parameters.items():
                owner = module.out_proj if name.startswith("out_proj") else module
                setattr(owner, name.removeprefix("out_proj_"), parameter)
        # In eval mode without gradients the module takes its inference fast path.
        module.train(torch.is_grad_enabled())
        out, weights = module(x, x, x, need_weights=need_weights)
        return (out, weights) if need_weights else out

    return run


# Compositions of PyTorch's operators.


def _finish(problem: Problem, scores: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    if problem.causal:
        shape = (problem.query_length, problem.key_length)
        future = torch.ones(shape, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


def _repeat_heads(problem: Problem, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if problem.groups == 1:
        return key, value
    return key.repeat_interleave(problem.groups, 1), value.repeat_interleave(problem.groups, 1)


def dot_composition(problem: Problem) -> Function:
    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        key, value = _repeat_heads(problem, key, value)
        scores = (query * problem.head_dim**-0.5) @ key.transpose(-2, -1)
        return _finish(problem, scores, value, attn_mask)

    return run


def additive_composition(problem: Problem) -> Function:
    """The shortest way: the sum over features is a product of a matrix and a vector."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, weight: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        key, value = _repeat_heads(problem, key, value)
        terms = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3))  # (B, H, Lq, Lk, D)
        scores = (terms @ weight[:, None, :, None]).squeeze(-1)
        return _finish(problem, scores, value, attn_mask)

    return run


def _keras_formula(problem: Problem) -> Function:
    """As keras.layers.AdditiveAttention: reduce_sum(scale * tanh(q + k))."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, weight: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        key, value = _repeat_heads(problem, key, value)
        terms = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3))
        scores = torch.sum(weight[:, None, None, :] * terms, -1)
        return _finish(problem, scores, value, attn_mask)

    return run


def rotary_composition(problem: Problem) -> Function:
    """The usual way: x cos + rotate_half(x) sin, in float32 as the tables are."""

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        rotated_half = torch.cat([-second, first], -1)
        turned = x * torch.cat([cos, cos], -1) + rotated_half * torch.cat([sin, sin], -1)
        return turned.to(x.dtype)

    return run


COMPOSITIONS = {
    "dot": dot_composition,
    "additive": additive_composition,
    "rotary": rotary_composition,
}


def _eager(problem: Problem) -> Function:
    return COMPOSITIONS[problem.op](problem)


def _compiled(problem: Problem) -> Function:
    # The Keras form: torch.compile fuses its sum with tanh, a matrix product it would not.
    compositions = {**COMPOSITIONS, "additive": _keras_formula}
    return torch.compile(compositions[problem.op](problem), dynamic=False)


def _scores(problem: Problem, element_size: int) -> int:
    return problem.batch * problem.heads * problem.query_length * problem.key_length * element_size


def _composition_bytes(features: tuple[int, int]) -> Callable[[Problem, bool, int], int]:
    """Memory of a composition. `features`: its tensors of Lq Lk D elements, forward and both."""

    def needed(problem: Problem, backward: bool, element_size: int) -> int:
        if problem.op == "rotary":
            return 0
        large = features[backward] * problem.head_dim if problem.op == "additive" else 0
        return _scores(problem, element_size) * (large + (4 if backward else 2))

    return needed


CANDIDATES: dict[str, Candidate] = {
    "ours": Candidate(
        ("dot", "additive", "multi_head", "multi_head_weights", "rotary"), _ours, is_ours=True
    ),
    "sdpa": Candidate(("dot",), _sdpa),
    "sdpa:flash": _sdpa_backend(SDPBackend.FLASH_ATTENTION),
    "sdpa:efficient": _sdpa_backend(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa:cudnn": _sdpa_backend(SDPBackend.CUDNN_ATTENTION),
    "sdpa:math": _sdpa_backend(SDPBackend.MATH),
    "flex": Candidate(
        ("dot",),
        _flex,
        devices=("cuda",),
        not_supported=lambda problem: "masks are code for it" if problem.mask else "",
    ),
    "mha": Candidate(
        ("multi_head", "multi_head_weights"),
        lambda problem: _multi_head_module(problem, nn.MultiheadAttention),
    ),
    "eager": Candidate(tuple(COMPOSITIONS), _eager, intermediate_bytes=_composition_bytes((2, 3))),
    "compile": Candidate(
        tuple(COMPOSITIONS), _compiled, intermediate_bytes=_composition_bytes((0, 2))
    ),
    "keras": Candidate(
        ("additive",), _keras_formula, intermediate_bytes=_composition_bytes((2, 3))
    ),
}
