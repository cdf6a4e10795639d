"""torch.vmap and FLOP counts of the attention operators."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torch_selfattn import functional

V, B, H, HK, L, E, EV = 3, 2, 4, 2, 5, 4, 3

# Of each argument, where the vmapped dimension stands; None: the same for all samples.
IN_DIMS = {
    "all": {
        "query": 0,
        "key": 0,
        "value": 0,
        "weight": 0,
        "attn_mask": 0,
        "key_lengths": 0,
        "alibi_slopes": 0,
    },
    "query": {"query": 0},
    "key and value": {"key": 1, "value": -1},
    "weight": {"weight": 1},
    "mask": {"attn_mask": 2},
    "lengths": {"key_lengths": 1},
    "slopes": {"alibi_slopes": 1},
    "weight and lengths": {"weight": 0, "key_lengths": 0},
}


def arguments(dims: dict[str, int], mask_batch: int = B) -> dict[str, torch.Tensor]:
    shapes = {
        "query": (B, H, L, E),
        "key": (B, HK, L, E),
        "value": (B, HK, L, EV),
        "weight": (H, E),
        "attn_mask": (mask_batch, 1, L, L),
        "alibi_slopes": (H,) if mask_batch == 1 else (B, H),
    }
    made = {}
    for name, shape in shapes.items():
        x = torch.randn(V, *shape, dtype=torch.float64)
        made[name] = x.movedim(0, dims[name]) if name in dims else x[0]
    lengths = torch.tensor([[5, 2], [0, 4], [3, 3]])
    dim = dims.get("key_lengths")
    made["key_lengths"] = lengths[0] if dim is None else lengths.movedim(0, dim)
    return made


def attend(query, key, value, weight, attn_mask, alibi_slopes, key_lengths):
    return functional.additive_attention(
        query, key, value, weight, attn_mask, enable_gqa=True, key_lengths=key_lengths,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip


def by_loop(f, made: dict, dims: dict):
    """What vmap means: one call for each sample."""
    samples = []
    for v in range(V):
        samples.append(f(**{n: x.select(dims[n], v) if n in dims else x for n, x in made.items()}))
    return samples


def in_dims(made: dict, dims: dict) -> tuple:
    return tuple(dims.get(name) for name in made)


@pytest.mark.parametrize("mask_batch", [1, B])
@pytest.mark.parametrize("name", IN_DIMS)
def test_forward(name: str, mask_batch: int) -> None:
    dims = IN_DIMS[name]
    made = arguments(dims, mask_batch)
    ours = torch.vmap(attend, in_dims(made, dims))(*made.values())
    torch.testing.assert_close(ours, torch.stack(by_loop(attend, made, dims)), atol=0, rtol=0)


@pytest.mark.parametrize("weight_rank", [2, 3])
@pytest.mark.parametrize("mask_batch", [1, B])
@pytest.mark.parametrize("name", IN_DIMS)
def test_backward_operator(name: str, mask_batch: int, weight_rank: int) -> None:
    """The gradients of each sample, also of what all samples share."""
    dims = IN_DIMS[name]
    made = arguments(dims, mask_batch)
    floating = ("query", "key", "value", "weight", "attn_mask", "alibi_slopes")

    def inner(made: dict, grad: torch.Tensor):
        weight = made["weight"] if weight_rank == 2 else made["weight"][None]
        slopes = made["alibi_slopes"]
        tensors = (
            made["query"], made["key"], made["value"], weight, made["attn_mask"],
            made["key_lengths"], None, None, slopes[None] if mask_batch == 1 else slopes,
        )  # fmt: skip
        numbers = (None, None, 0.0, -1, -1, 0)
        saved = torch.ops.torch_selfattn._attention_forward(*tensors, *numbers)
        return torch.ops.torch_selfattn._attention_backward(
            grad, None, *tensors, *saved, *numbers, True, True
        )

    grad = torch.randn(B, H, L, EV, dtype=torch.float64)
    ours = torch.vmap(lambda *x: inner(dict(zip(made, x, strict=True)), grad), in_dims(made, dims))(
        *made.values()
    )

    def by_autograd(**made):
        leaves = {n: made[n].detach().requires_grad_() for n in floating}
        return torch.autograd.grad(attend(**{**made, **leaves}), list(leaves.values()), grad)

    expected = [torch.stack(g) for g in zip(*by_loop(by_autograd, made, dims), strict=True)]
    if weight_rank == 3:
        expected[3] = expected[3][:, None]
    if mask_batch == 1:
        expected[5] = expected[5][:, None]
    torch.testing.assert_close(list(ours), expected, atol=1e-12, rtol=1e-12)


def test_nested() -> None:
    query = torch.randn(2, V, B, H, L, E, dtype=torch.float64)
    key = torch.randn(V, B, H, L, E, dtype=torch.float64)
    f = functional.dot_product_attention
    ours = torch.vmap(torch.vmap(f), (0, None, None))(query, key, key)
    torch.testing.assert_close(ours, f(query, key.expand(query.shape), key.expand(query.shape)))


def test_jacobian_with_batched_gradients() -> None:
    query = torch.randn(1, 2, 3, E, dtype=torch.float64)
    weight = torch.randn(E, dtype=torch.float64)

    def f(query, weight):
        return functional.additive_attention(query, query, query, weight)

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(
        jacobian(f, (query, weight), vectorize=True), jacobian(f, (query, weight))
    )


def test_gradient_through_vmap() -> None:
    made = arguments({"query": 0})
    query = made["query"].requires_grad_()
    weight = made["weight"].requires_grad_()
    slopes = made["alibi_slopes"].requires_grad_()

    def f(q: torch.Tensor) -> torch.Tensor:
        return attend(q, made["key"], made["value"], weight, made["attn_mask"], slopes, None)

    out = torch.vmap(f)(query)
    grads = torch.autograd.grad(out.square().sum(), (query, weight, slopes))
    loop = sum(f(q).square().sum() for q in query)
    torch.testing.assert_close(grads, torch.autograd.grad(loop, (query, weight, slopes)))


def dropped(x: torch.Tensor) -> torch.Tensor:
    """With equal scores and value 1, the output tells how many weights were kept."""
    return functional.dot_product_attention(
        x * 0, x * 0, torch.eye(L).expand(B, H, L, L), None, 0.5
    )


def test_dropout_needs_a_randomness() -> None:
    with pytest.raises(RuntimeError, match="randomness='different' or randomness='same'"):
        torch.vmap(dropped)(torch.ones(V, B, H, L, E))


def test_dropout_different_and_same() -> None:
    x = torch.ones(V, B, H, L, E)
    different = torch.vmap(dropped, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    torch.manual_seed(4)
    same = torch.vmap(dropped, randomness="same")(x)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    torch.manual_seed(4)
    assert torch.equal(same[0], dropped(x[0]))


def test_dropout_same_mask_in_batched_backward() -> None:
    """Batched gradients of an unvmapped forward pass: the random numbers must not be folded."""
    x = torch.randn(2, 1, 3, E, dtype=torch.float64, requires_grad=True)
    out = functional.dot_product_attention(x, x, x, None, 0.5)
    grads = torch.randn(V, *out.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in grads]
    torch.testing.assert_close(batched, torch.stack(single))


# FLOPs


def count(f) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def test_flops_of_dot_product_are_those_pytorch_counts() -> None:
    q = torch.randn(B, H, 7, E, requires_grad=True)
    k, v = torch.randn(B, H, L, E, requires_grad=True), torch.randn(B, H, L, EV, requires_grad=True)

    def composed():
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    def fused():
        return functional.dot_product_attention(q, k, v)

    assert count(fused) == count(composed) == 2 * B * H * 7 * L * (E + EV)
    # The backward pass computes the scores once more.
    again = 2 * B * H * 7 * L * E
    assert count(lambda: fused().sum().backward()) == again + count(
        lambda: composed().sum().backward()
    )


def test_flops_of_additive_score() -> None:
    q = torch.randn(B, H, 7, E, requires_grad=True)
    k, v = torch.randn(B, H, L, E), torch.randn(B, H, L, EV)
    w = torch.randn(E)
    pairs = B * H * 7 * L
    forward = pairs * (4 * E + 2 * EV)
    assert count(lambda: functional.additive_attention(q, k, v, w)) == forward
    backward = pairs * (12 * E + 4 * EV)
    both = count(lambda: functional.additive_attention(q, k, v, w).sum().backward())
    assert both == forward + backward


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "torch_selfattn"])
def test_flops_are_registered_in_either_order_of_import(first: str) -> None:
    second = {"torch_selfattn": "torch.utils.flop_counter"}.get(first, "torch_selfattn")
    code = f"""
import {first}, {second}
import torch, sys
from torch.utils.flop_counter import flop_registry
for name in ("_attention_forward", "_attention_backward", "_rotary_embedding_forward"):
    assert getattr(torch.ops.torch_selfattn, name) in flop_registry, name
assert not any("torch_selfattn" in type(f).__module__ for f in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("how", ["unfolded", "same", "different"])
def test_backward_operator_regenerates_the_dropout_of_its_forward(how: str) -> None:
    """Dropped is what the forward pass dropped: with values 1 the weights that were kept show in
    the gradient of the value."""
    query = torch.zeros(V, B, H, L, E, dtype=torch.float64)
    value = torch.eye(L, dtype=torch.float64).expand(V, B, H, L, L)
    numbers = (None, None, 0.5, -1, -1, 0)
    forward = torch.ops.torch_selfattn._attention_forward
    backward = torch.ops.torch_selfattn._attention_backward
    grad = torch.eye(L, dtype=torch.float64).expand(V, B, H, L, L)

    def both(query, value, grad):
        tensors = (query, query, value, None, None, None, None, None, None)
        saved = forward(*tensors, *numbers)
        return saved[0], backward(grad, None, *tensors, *saved, *numbers, False, False)[2]

    if how == "unfolded":
        tensors = (query[0], query[0], value[0], None, None, None, None, None, None)
        saved = forward(*tensors, *numbers)
        out = saved[0].expand(V, B, H, L, L)
        (_, _, grad_value, *_) = torch.vmap(
            lambda g: backward(g, None, *tensors, *saved, *numbers, False, False)
        )(grad)
    else:
        out, grad_value = torch.vmap(both, randomness=how)(query, value, grad)
    # out = P * dropout; dV = (P * dropout)^T dO
    assert ((out == 0) | (out - 2 / L).abs().lt(1e-12)).all() and 0 < (out == 0).sum()
    torch.testing.assert_close(grad_value, out.transpose(-2, -1))
