"""Which implementation runs: the list, the choice, and what explain() says of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_problems import BY_NAME, PROBLEMS
from operator_tester import DTYPES, OPS, Recorder, implementations

import torch_selfattn

SCORES = ["dot", "additive"]


def explain(arguments: dict) -> dict[str, str]:
    """name -> what explain() says of it, in the order of the list."""
    lines = torch_selfattn.explain(**arguments).splitlines()[1:]
    return dict(line.strip().split(": ", 1) for line in lines)


def cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return set(lines[0].split()) if lines else set()


def test_the_slow_reference_is_the_last():
    assert implementations("cpu")[-1] == "reference"


@pytest.mark.skipif("generic" not in implementations("cpu"), reason="only the reference is built")
def test_the_best_for_this_cpu_runs():
    flags = cpu_flags()
    best = "generic"
    if {"avx2", "fma", "f16c"} <= flags:
        best = "avx2"
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"} <= flags:
        best = "avx512"
    has_tiles = best == "avx512" and {"avx512_bf16", "amx_tile", "amx_bf16"} <= flags
    for score in SCORES:
        said = explain(BY_NAME["plain"].arguments(score, torch.float32))
        assert said[best] == "runs", said
        said = explain(BY_NAME["plain"].arguments(score, torch.bfloat16))
        products = best
        if score == "dot" and best == "avx512" and "avx512_bf16" in flags:
            products = "amx" if has_tiles else "avx512bf16"
        assert said[products] == "runs", said
    for heads, queries, head_dim, dtype, products in (
        (4, 128, 17, torch.float32, "amx"),
        (8, 127, 64, torch.float32, best),
        (3, 128, 64, torch.float32, best),
        (1, 512, 64, torch.float32, "amx"),
        (4, 128, 16, torch.float32, best),
        (4, 128, 64, torch.float64, best),
        (1, 32, 16, torch.float16, "amx"),
        (8, 31, 64, torch.float16, best),
    ):
        x = torch.zeros(1, heads, queries, head_dim, dtype=dtype)
        said = explain({"query": x, "key": x, "value": x})
        assert said[products if has_tiles else best] == "runs", (x.shape, dtype, said)


@pytest.mark.skipif(not {"amx_tile", "amx_bf16"} <= cpu_flags(), reason="this CPU has no AMX")
def test_what_is_passed_over_runs_by_name():
    x = torch.randn(1, 2, 5, 8)
    said = explain({"query": x, "key": x, "value": x})
    assert said["amx"] == "supported, but passed over: there are few queries"
    with torch_selfattn.use_implementation("amx"):
        assert explain({"query": x, "key": x, "value": x})["amx"] == "runs (forced)"
        out = torch_selfattn.dot_product_attention(x, x, x)
    torch.testing.assert_close(out, torch_selfattn.dot_product_attention(x, x, x))


@pytest.mark.skipif("avx512_bf16" not in cpu_flags(), reason="this CPU has no AVX512-BF16")
def test_products_of_pairs_refuse_what_they_would_round():
    for score, dtype, reason in (
        ("dot", torch.float32, "the inputs are not bfloat16"),
        ("dot", torch.float16, "the inputs are not bfloat16"),
        ("dot", torch.float64, "the inputs are not bfloat16"),
        ("additive", torch.bfloat16, "the additive score has no products of pairs"),
    ):
        said = explain(BY_NAME["plain"].arguments(score, dtype))
        assert said["avx512bf16"] == f"not supported, {reason}"
        if {"amx_tile", "amx_bf16"} <= cpu_flags():
            refused = score == "additive" or dtype == torch.float64
            assert said["amx"].startswith("not supported") == refused


@pytest.mark.parametrize("score", SCORES)
def test_every_problem_has_an_implementation(score):
    """Exactly one runs; the generic one and the reference are never refused."""
    for problem in PROBLEMS:
        for dtype in DTYPES:
            said = explain(problem.arguments(score, dtype))
            assert list(said) == list(implementations("cpu"))
            assert list(said.values()).count("runs") == 1, (problem.name, said)
            for name in {"generic", "reference"} & set(said):
                assert not said[name].startswith("not supported"), (problem.name, said)


@pytest.mark.parametrize("score", SCORES)
def test_explain_computes_nothing(score):
    arguments = BY_NAME["plain"].arguments(score, torch.float32)
    with Recorder() as recorder:
        torch_selfattn.explain(**arguments)
    assert recorder.calls == []


def test_explain_of_a_forced_implementation():
    arguments = BY_NAME["plain"].arguments("dot", torch.float32)
    with torch_selfattn.use_implementation("reference"):
        said = explain(arguments)
    assert said["reference"] == "runs (forced)"
    others = [text for name, text in said.items() if name != "reference"]
    assert all(t.startswith(("supported, not the forced one", "not supported, ")) for t in others)


def test_explain_of_an_unknown_device():
    x = torch.zeros(1, 1, 1, 1, device="meta")
    with pytest.raises(NotImplementedError, match="there are no kernels for this device"):
        torch_selfattn.explain(x, x, x)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_unknown_implementation(direction):
    x = torch.randn(1, 1, 2, 2, requires_grad=True)
    out = OPS.dot_product_attention(x, x, x)
    with torch_selfattn.use_implementation("no such thing"), pytest.raises(ValueError) as caught:
        if direction == "forward":
            OPS.dot_product_attention(x, x, x)
        else:
            out.sum().backward()
    text = str(caught.value).splitlines()[0]
    assert direction in text and "there is no implementation of the forced name" in text
    assert f"(got no such thing, available: {', '.join(implementations('cpu'))})" in text
    assert torch_selfattn._C.forced_implementation() == ""


def test_the_choice_reaches_threads_of_autograd():
    """The engine runs backward on threads of its own for other devices; the choice is process-wide,
    so a forced name that does not exist must reach every one of them."""
    import threading

    errors = []

    def run() -> None:
        x = torch.randn(1, 1, 2, 2)
        try:
            OPS.dot_product_attention(x, x, x)
        except ValueError as e:
            errors.append(e)

    with torch_selfattn.use_implementation("no such thing"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize("score", SCORES)
def test_implementations_agree(score):
    """Neighbours in the list on a problem of several tiles; each one is held to the float64
    reference by the operators' own tests."""
    arguments = BY_NAME["long mask"].arguments(score, torch.float32)
    op = OPS.additive_attention if score == "additive" else OPS.dot_product_attention
    results = {}
    for name in implementations("cpu"):
        if explain(arguments)[name].startswith("not supported"):
            continue
        with torch_selfattn.use_implementation(name):
            results[name] = op(**arguments)
    for name, result in results.items():
        torch.testing.assert_close(result, results["reference"], rtol=1e-5, atol=1e-5, msg=name)


def test_verbose_dispatch():
    program = (
        "import torch, torch_selfattn\n"
        "x = torch.zeros(1, 1, 2, 2, requires_grad=True)\n"
        "torch_selfattn.dot_product_attention(x, x, x).sum().backward()\n"
    )
    for setting, wanted in (("dispatch", True), ("", False)):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"TORCH_SELFATTN_VERBOSE": setting},
            capture_output=True,
            text=True,
            check=True,
        )
        assert (": runs" in run.stderr) == wanted, run.stderr
        assert ("backward" in run.stderr) == wanted
