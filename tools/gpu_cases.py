"""Small problems on the GPU, forward and backward, for compute-sanitizer: every score, mask and
dtype once, sizes that do not fill a tile; kernels that run by name only, by name. Each result is
compared with the CPU's.
"""

import contextlib
import itertools
import sys

import torch

import torch_selfattn

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
MASKS = ("none", "causal", "bool", "float", "lengths", "slopes")
# Implementations that something is put before: the scores and dtypes that they have.
BY_NAME = {
    "additive_group": ("additive", (torch.float16, torch.bfloat16)),
    "additive_sines": ("additive", (torch.float16, torch.bfloat16)),
    "additive_exponential": ("additive", tuple(TOLERANCE)),
}


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "query": normal(2, 4, 70, 40),
        "key": normal(2, 2, 67, 40),
        "value": normal(2, 2, 67, 24),
        "weight": normal(4, 40),
    }


def options(mask: str, dtype: torch.dtype, device: str) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    if mask == "causal":
        return {"is_causal": True}
    if mask == "bool":
        return {"attn_mask": (torch.rand(2, 1, 70, 67, generator=generator) > 0.3).to(device)}
    if mask == "float":
        return {"attn_mask": torch.randn(70, 67, generator=generator).to(dtype).to(device)}
    if mask == "slopes":
        return {"alibi_slopes": torch_selfattn.alibi_slopes(4).to(device).requires_grad_()}
    if mask == "lengths":
        return {"key_lengths": torch.tensor([0, 33], device=device), "window_left": 9}
    return {}


def run(
    score: str, mask: str, dtype: torch.dtype, device: str, name: str = ""
) -> list[torch.Tensor]:
    """Output, weights and gradients; by name is the output alone."""
    tensors = {name: x.to(device).requires_grad_() for name, x in inputs(dtype).items()}
    query, key, value, weight = tensors.values()
    extra = options(mask, dtype, device)
    extra["enable_gqa"] = True
    with torch_selfattn.use_implementation(name) if name else contextlib.nullcontext():
        if score == "dot":
            out = torch_selfattn.dot_product_attention(query, key, value, **extra)
        else:
            out = torch_selfattn.additive_attention(query, key, value, weight, **extra)
    score_weight = None if score == "dot" else weight
    weights = torch_selfattn.attention_weights(
        query, key, score_weight, average_heads=True, **extra
    )
    (out.float().square().sum() + weights.float().square().sum()).backward()
    grads = [x.grad for x in tensors.values() if x.grad is not None]
    return [x.detach().cpu().float() for x in (out, weights, *grads)]


def main() -> int:
    wrong = 0
    cases = [("", *case) for case in itertools.product(("dot", "additive"), TOLERANCE, MASKS)]
    for name, (score, dtypes) in BY_NAME.items():
        cases += [(name, *case) for case in itertools.product([score], dtypes, MASKS)]
    for name, score, dtype, mask in cases:
        expected = run(score, mask, dtype, "cpu")
        found = run(score, mask, dtype, "cuda", name)
        scale = max(float(x.abs().max()) for x in expected)
        error = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) / max(
            scale, 1.0
        )
        # This one computes in bfloat16, whatever the inputs.
        good = error <= TOLERANCE[torch.bfloat16 if name == "additive_group" else dtype]  # no NaN
        wrong += not good
        verdict = "ok" if good else "WRONG"
        print(f"{name:20} {score:9} {mask:8} {dtype!s:15} {error:.1e} {verdict}", flush=True)
    torch.cuda.synchronize()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
