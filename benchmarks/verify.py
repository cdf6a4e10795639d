"""Compares a candidate with the definition in float64, output and every gradient."""

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.problem_sets import Problem, allowed

# Largest error relative to the largest element of each tensor. These limits tell a wrong result
# from a right one; the accuracy of each operator is tested against docs/tolerances.md. At 16 bits a
# peer that stores the scores in them is right: that was off by up to 1.8e-2 (bfloat16), 2.1e-3.
LIMITS = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}

# Heads do not depend on each other, so of a large problem some are enough. A head counts
# Lq * Lk * D; all heads up to this sum are compared, and always the first and the last one.
MAX_WORK = 3e8
# Elements of the largest tensor of the float64 composition.
CHUNK = 1 << 24


class Reference:
    """Output and gradients of a problem in float64, for chosen key/value heads of each sample."""

    def __init__(self, problem: Problem, inputs: Mapping[str, Tensor], grad_out: Tensor) -> None:
        self.problem = problem
        self.keep = allowed(problem)
        kv_heads = problem.kv_heads or problem.heads
        per_head = problem.full_pairs * problem.head_dim / problem.heads * problem.groups
        count = max(2, int(MAX_WORK / max(per_head, 1)))
        if not self._by_head or count >= kv_heads:
            self.kv_heads = list(range(kv_heads))
        else:
            self.kv_heads = [round(i * (kv_heads - 1) / (count - 1)) for i in range(count)]
        self.heads = [h * problem.groups + g for h in self.kv_heads for g in range(problem.groups)]
        chosen = {name: self.choose(name, t.detach()).double() for name, t in inputs.items()}
        self.inputs = {
            name: t.requires_grad_(inputs[name].requires_grad) for name, t in chosen.items()
        }
        self._compute(self.choose("out", grad_out).double())

    @property
    def _by_head(self) -> bool:
        """Whether the tensors are laid out by heads that do not depend on each other."""
        return self.problem.op in ("dot", "additive")

    def choose(self, name: str, t: Tensor) -> Tensor:
        """The part of a candidate's tensor that is compared."""
        if not self._by_head:
            return t
        if name == "weight":
            return t[self.heads]
        if t.shape[1] == 1:  # a mask that all heads share
            return t
        return t[:, self.kv_heads if name in ("key", "value") else self.heads]

    def _compute(self, grad_out: Tensor) -> None:
        p = self.problem
        if not self._by_head:
            make = peers.rotary_composition(p) if p.op == "rotary" else self._multi_head
            self.outputs = by_name(make(**self.inputs))
            self.outputs["out"].backward(grad_out)
            self.outputs = {name: t.detach() for name, t in self.outputs.items()}
            return
        # A block of queries at a time; autograd adds up the gradients of what they share.
        part = Problem(
            p.op, p.batch, len(self.heads), p.query_length, p.key_length, p.head_dim,
            len(self.kv_heads),
        )  # fmt: skip
        composition = peers.COMPOSITIONS[p.op](part)
        depth = p.head_dim if p.op == "additive" else 1
        rows = max(1, CHUNK // (p.batch * len(self.heads) * p.key_length * depth))
        outputs = []
        for begin in range(0, p.query_length, rows):
            end = min(begin + rows, p.query_length)
            call = dict(self.inputs)
            call["query"] = call["query"][:, :, begin:end]
            mask = self._mask(call.get("attn_mask"), begin, end, grad_out.device)
            if mask is not None:
                call["attn_mask"] = mask
            out = composition(**call)
            out.backward(grad_out[:, :, begin:end])
            outputs.append(out.detach())
        self.outputs = {"out": torch.cat(outputs, 2)}

    def _mask(
        self, attn_mask: Tensor | None, begin: int, end: int, device: torch.device
    ) -> Tensor | None:
        if self.keep is not None:
            rows = slice(begin, end) if self.keep.shape[2] > 1 else slice(None)
            keep = self.keep[:, :, rows].to(device)
            if attn_mask is None or not self.problem.mask.endswith("float"):
                return keep
            return attn_mask[:, :, begin:end].masked_fill(~keep, -torch.inf)
        return None if attn_mask is None else attn_mask[:, :, begin:end]

    def _multi_head(
        self,
        x: Tensor,
        in_proj_weight: Tensor,
        in_proj_bias: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        p = self.problem
        projected = x @ in_proj_weight.T + in_proj_bias
        query, key, value = (
            t.unflatten(-1, (p.heads, p.head_dim)).transpose(1, 2) for t in projected.chunk(3, -1)
        )
        weights = torch.softmax(query @ key.transpose(-2, -1) * p.head_dim**-0.5, -1)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        out = attended @ out_proj_weight.T + out_proj_bias
        return (out, weights.mean(1)) if p.op == "multi_head_weights" else out

    def errors(
        self, outputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Largest error of each tensor relative to its largest element; NaN counts as infinity."""
        found = {name: (got, self.outputs[name]) for name, got in outputs.items()}
        for name, gradient in gradients.items():
            expected = self.inputs[name].grad
            assert expected is not None
            found["grad_" + name] = (gradient, expected)
        errors = {}
        for name, (got, expected) in found.items():
            got = self.choose(name.removeprefix("grad_"), got.detach()).double()
            difference = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
            errors[name] = float(difference.nan_to_num(nan=torch.inf))
        return errors


def by_name(result: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What a candidate returned: the output, or the output and the weights."""
    outputs = result if isinstance(result, tuple) else (result,)
    return dict(zip(("out", "weights"), outputs, strict=False))


def too_wrong(errors: Mapping[str, float], dtype: torch.dtype) -> str:
    """Which tensors are beyond the limit, as text; "" if none is."""
    limit = LIMITS[dtype]
    return ", ".join(f"{n} is off by {e:.1e}" for n, e in errors.items() if not e <= limit)
