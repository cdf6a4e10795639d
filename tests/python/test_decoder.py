"""Decoding step by step with a cache gives what the parallel, causal forward gives."""

import itertools
import math

import pytest
import torch
from module_checks import assert_same, no_recompiles, randomize

from torch_selfattn import nn

B, D, H, HIDDEN, L, LM, CAPACITY = 3, 8, 4, 12, 6, 5, 9
MEMORY_LENGTHS = torch.tensor([5, 2, 4])

SELF = {
    "dot": {},
    "additive": {"score": "additive"},
    "grouped": {"num_kv_heads": 2},
    "window": {"window": (2, 3)},
    "rotary": {"rotary": {}},
    "alibi": {"alibi": True},
    "rotary, interleaved, partial": {"rotary": {"interleaved": True}, "num_kv_heads": 1},
    "all": {"score": "additive", "num_kv_heads": 2, "window": (3, 0), "rotary": {}},
}
CROSS = {
    "dot": {},
    "one additive head": {"cross_score": "additive", "cross_nhead": 1},
    "grouped, other memory": {"cross_num_kv_heads": 2, "memory_dim": 5},
}


def make_layer(own: str = "dot", cross: str = "dot", **kwargs) -> nn.TransformerDecoderLayer:
    options = {**SELF[own], **CROSS[cross]}
    heads = 2 if "partial" in own else H  # head dim 4, of which 2 are rotated
    if "rotary" in options:
        options["rotary"] = nn.RotaryEmbedding(2, 32, **options["rotary"])
    options = {"batch_first": True, "norm_first": True, "dtype": torch.float64, **options, **kwargs}
    layer = nn.TransformerDecoderLayer(D, heads, HIDDEN, 0.0, **options)
    randomize(layer)
    return layer


def data(layer_or_dim, batch_first: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(B, L, D, dtype=torch.float64)
    memory = torch.randn(B, LM, layer_or_dim, dtype=torch.float64)
    return (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))


def decode(module, x, memory, steps, batch_first: bool = True, **kwargs):
    """All of x in pieces of these lengths."""
    time = 1 if batch_first else 0
    cache = module.new_cache(memory, CAPACITY)
    lengths = torch.zeros(B, dtype=torch.int64)
    outputs, weights = [], []
    for piece in x.split(steps, time):
        out, w = module.decode_with_weights(piece, cache, lengths, **kwargs)
        lengths = lengths + piece.shape[time]
        outputs.append(out)
        weights.append(w)
    return torch.cat(outputs, time), torch.cat(weights, -2)


@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize("own", SELF)
@torch.no_grad()
def test_equals_the_parallel_forward(own: str, cross: str) -> None:
    for norm_first, batch_first in itertools.product((False, True), (False, True)):
        layer = make_layer(own, cross, norm_first=norm_first, batch_first=batch_first)
        x, memory = data(CROSS[cross].get("memory_dim", D), batch_first)
        parallel = layer.forward_with_weights(
            x, memory, tgt_is_causal=True, memory_lengths=MEMORY_LENGTHS
        )
        for module in (layer, torch.jit.script(layer)) if norm_first else (layer,):
            for steps in ([1] * L, [3, 1, 2], [L]):
                ours = decode(module, x, memory, steps, batch_first, memory_lengths=MEMORY_LENGTHS)
                assert_same(ours, parallel, 1e-12)


@torch.no_grad()
def test_memory_padding_mask() -> None:
    layer = make_layer("grouped", "one additive head")
    x, memory = data(D)
    for mask in (torch.rand(B, LM) < 0.4, torch.randn(B, LM, dtype=torch.float64)):
        parallel = layer.forward_with_weights(
            x, memory, tgt_is_causal=True, memory_key_padding_mask=mask
        )
        ours = decode(layer, x, memory, [1] * L, memory_key_padding_mask=mask)
        assert_same(ours, parallel, 1e-12)


@torch.no_grad()
def test_single_precision_and_decode_without_weights() -> None:
    layer = make_layer("rotary", "one additive head", dtype=torch.float32)
    x, memory = (t.float() for t in data(D))
    parallel = layer(x, memory, tgt_is_causal=True)
    cache = layer.new_cache(memory, CAPACITY)
    out = [layer.decode(x[:, i : i + 1], cache, torch.full((B,), i)) for i in range(L)]
    assert_same(torch.cat(out, 1), parallel, 1e-5)


@torch.no_grad()
def test_stack() -> None:
    for norm in (None, torch.nn.LayerNorm(D, dtype=torch.float64)):
        stack = nn.TransformerDecoder(make_layer("all", "one additive head"), 3, norm)
        randomize(stack)
        x, memory = data(D)
        parallel = stack.forward_with_weights(
            x, memory, tgt_is_causal=True, memory_lengths=MEMORY_LENGTHS
        )
        for module in (stack, torch.jit.script(stack)):
            caches = module.new_cache(memory, CAPACITY)
            lengths = torch.zeros(B, dtype=torch.int64)
            outputs, weights = [], []
            for piece in x.split([2, 1, 3], 1):
                out, w = module.decode_with_weights(piece, caches, lengths, MEMORY_LENGTHS)
                lengths = lengths + piece.shape[1]
                outputs.append(out)
                weights.append(w)
            assert_same((torch.cat(outputs, 1), torch.cat(weights, 3)), parallel, 1e-12)
            again = module.new_cache(memory, CAPACITY)
            zero = torch.zeros(B, dtype=torch.int64)
            assert_same(module.decode(x, again, zero, MEMORY_LENGTHS), parallel[0], 1e-12)


@pytest.mark.parametrize("own", SELF)
@torch.no_grad()
def test_samples_of_different_lengths(own: str) -> None:
    """Prompts of 1, 4 and 2 tokens, padded to 4; then two tokens each."""
    layer = make_layer(own)
    x, memory = data(D)
    prompt = torch.tensor([1, 4, 2])
    parallel = layer(x, memory, tgt_is_causal=True)
    cache = layer.new_cache(memory, CAPACITY)
    padded = x[:, :4].clone()
    padded[torch.arange(4) >= prompt[:, None]] = 77.0  # overwritten before anything reads it
    out = layer.decode(padded, cache, torch.zeros(B, dtype=torch.int64))
    for b in range(B):
        assert_same(out[b, : prompt[b]], parallel[b, : prompt[b]], 1e-12)
    lengths = prompt
    for _ in range(2):
        token = x[torch.arange(B), lengths][:, None]
        out = layer.decode(token, cache, lengths)
        assert_same(out[:, 0], parallel[torch.arange(B), lengths], 1e-12)
        lengths = lengths + 1


@torch.no_grad()
def test_a_sample_that_is_not_advanced_starts_its_position_again() -> None:
    layer = make_layer("rotary")
    x, memory = data(D)
    parallel = layer(x, memory, tgt_is_causal=True)
    cache = layer.new_cache(memory, CAPACITY)
    lengths = torch.zeros(B, dtype=torch.int64)
    layer.decode(torch.randn(B, 1, D, dtype=torch.float64), cache, lengths)  # thrown away
    out = layer.decode(x[:, :1], cache, lengths)
    assert_same(out, parallel[:, :1], 1e-12)


@torch.no_grad()
def test_reordered_samples() -> None:
    """As beam search does."""
    layer = make_layer("grouped", "one additive head")
    x, memory = data(D)
    cache = layer.new_cache(memory, CAPACITY)
    lengths = torch.zeros(B, dtype=torch.int64)
    layer.decode(x[:, :3], cache, lengths, MEMORY_LENGTHS)
    order = torch.tensor([2, 0, 0, 1])
    cache = nn.KVCache(*(t.index_select(0, order) for t in cache))
    lengths = torch.full((4,), 3)
    out = layer.decode(x[order, 3:4], cache, lengths, MEMORY_LENGTHS[order])
    parallel = layer(x, memory, tgt_is_causal=True, memory_lengths=MEMORY_LENGTHS)
    assert_same(out, parallel[order, 3:4], 1e-12)


@torch.no_grad()
def test_memory_is_projected_once() -> None:
    """Steps do not look at the memory, nor at what stands behind the length."""
    layer = make_layer()
    x, memory = data(D)
    cache = layer.new_cache(memory, CAPACITY)
    parallel = layer(x, memory, tgt_is_causal=True)
    memory.fill_(math.nan)
    cache.key[:, :, 1:] = math.nan
    cache.value[:, :, 1:] = math.nan
    out = layer.decode(x[:, :1], cache, torch.zeros(B, dtype=torch.int64))
    assert_same(out, parallel[:, :1], 1e-12)
    assert cache.key[:, :, 0].isfinite().all() and cache.key[:, :, 1:].isnan().all()


class Greedy(torch.nn.Module):
    """A model whose greedy loop is scripted: what the example exports."""

    def __init__(self, decoder: torch.nn.Module, embed: torch.nn.Embedding) -> None:
        super().__init__()
        self.embed = embed
        self.position = nn.SinusoidalPositionalEncoding(scale=0.5)
        self.decoder = decoder
        self.classify = torch.nn.Linear(D, embed.num_embeddings)

    def logits(self, tokens: torch.Tensor, memory: torch.Tensor, memory_lengths: torch.Tensor):
        x = self.position(self.embed(tokens))
        return self.classify(
            self.decoder(x, memory, tgt_is_causal=True, memory_lengths=memory_lengths)
        )

    @torch.jit.export
    def generate(
        self, memory: torch.Tensor, memory_lengths: torch.Tensor, steps: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = memory.size(0)
        cache = self.decoder.new_cache(memory, steps)
        lengths = torch.zeros([batch], dtype=torch.int64)
        tokens = torch.zeros([batch, 1], dtype=torch.int64)
        alignment: list[torch.Tensor] = []
        for _ in range(steps):
            x = self.position(self.embed(tokens[:, -1:]), 0, lengths[:, None])
            y, weights = self.decoder.decode_with_weights(x, cache, lengths, memory_lengths)
            tokens = torch.cat([tokens, self.classify(y)[:, -1].argmax(-1, keepdim=True)], 1)
            lengths = lengths + 1
            alignment.append(weights)
        return tokens, torch.cat(alignment, -2)

    def forward(self, memory: torch.Tensor, memory_lengths: torch.Tensor) -> torch.Tensor:
        return self.generate(memory, memory_lengths, 7)[0]


@pytest.mark.parametrize("stacked", [False, True])
@torch.no_grad()
def test_scripted_greedy_loop(stacked: bool, tmp_path) -> None:
    layer = make_layer("dot", "one additive head", dtype=torch.float32)
    decoder = nn.TransformerDecoder(layer, 2) if stacked else layer
    model = Greedy(decoder, torch.nn.Embedding(11, D))
    randomize(model)
    model.eval()
    memory = data(D)[1].float()
    tokens, alignment = model.generate(memory, MEMORY_LENGTHS, 7)

    # The loop without a cache
    expected = torch.zeros(B, 1, dtype=torch.int64)
    for _ in range(7):
        logits = model.logits(expected, memory, MEMORY_LENGTHS)
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, expected)
    assert tokens.unique().numel() > 2  # or it would show nothing
    assert alignment.shape == ((2,) if stacked else ()) + (B, 1, 7, LM)
    behind = torch.arange(LM) >= MEMORY_LENGTHS[:, None, None, None]
    assert (alignment.masked_select(behind) == 0).all()

    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(model), path)
    loaded = torch.jit.load(path)
    assert torch.equal(loaded(memory, MEMORY_LENGTHS), tokens)
    torch.testing.assert_close(loaded.generate(memory, MEMORY_LENGTHS, 7)[1], alignment)


@torch.no_grad()
def test_compiled_steps_share_one_graph() -> None:
    layer = make_layer("rotary", "one additive head", dtype=torch.float32)
    x, memory = (t.float() for t in data(D))
    parallel = layer(x, memory, tgt_is_causal=True, memory_lengths=MEMORY_LENGTHS)
    with no_recompiles():
        step = torch.compile(layer.decode, backend="aot_eager", fullgraph=True)
        cache = layer.new_cache(memory, CAPACITY)
        lengths = torch.zeros(B, dtype=torch.int64)
        outputs = []
        for i in range(L):
            outputs.append(step(x[:, i : i + 1], cache, lengths, MEMORY_LENGTHS))
            lengths = lengths + 1
    assert_same(torch.cat(outputs, 1), parallel, 1e-5)


@torch.no_grad()
def test_autocast() -> None:
    layer = make_layer("rotary", "one additive head", dtype=torch.float32)
    x, memory = (t.float() for t in data(D))
    parallel = layer(x, memory, tgt_is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = decode(layer, x, memory, [1] * L)
    assert_same(out.float(), parallel, 0.2)


@torch.no_grad()
def test_errors() -> None:
    layer = make_layer()
    x, memory = data(D)
    cache = layer.new_cache(memory, 4)
    with pytest.raises(RuntimeError, match="index 4 is out of bounds"):
        layer.decode(x, cache, torch.zeros(B, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"tgt must have 3 dimensions .*\[6, 8\]"):
        layer.decode(x[0], cache, torch.zeros(B, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"memory must have 3 dimensions .*\[5, 8\]"):
        layer.new_cache(memory[0], 4)
