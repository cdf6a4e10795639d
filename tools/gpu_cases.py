"""Small problems on the GPU, forward and backward, for compute-sanitizer: every score, mask and
dtype once, sizes that do not fill a tile. Each result is compared with the CPU's.
"""

import itertools
import sys

import torch

import torch_selfattn

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
MASKS = ("none", "causal", "bool", "float", "lengths", "slopes")


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


def run(score: str, mask: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    tensors = {name: x.to(device).requires_grad_() for name, x in inputs(dtype).items()}
    query, key, value, weight = tensors.values()
    extra = options(mask, dtype, device)
    if score == "dot":
        out = torch_selfattn.dot_product_attention(query, key, value, enable_gqa=True, **extra)
    else:
        out = torch_selfattn.additive_attention(query, key, value, weight, enable_gqa=True, **extra)
    score_weight = None if score == "dot" else weight
    weights = torch_selfattn.attention_weights(
        query, key, score_weight, enable_gqa=True, average_heads=True, **extra
    )
    (out.float().square().sum() + weights.float().square().sum()).backward()
    grads = [x.grad for x in tensors.values() if x.grad is not None]
    return [x.detach().cpu().float() for x in (out, weights, *grads)]


def main() -> int:
    wrong = 0
    for score, mask, dtype in itertools.product(("dot", "additive"), MASKS, TOLERANCE):
        expected = run(score, mask, dtype, "cpu")
        found = run(score, mask, dtype, "cuda")
        scale = max(float(x.abs().max()) for x in expected)
        error = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) / max(
            scale, 1.0
        )
        good = error <= TOLERANCE[dtype]  # a NaN is not
        wrong += not good
        verdict = "ok" if good else "WRONG"
        print(f"{score:9} {mask:8} {dtype!s:15} {error:.1e} {verdict}", flush=True)
    torch.cuda.synchronize()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
