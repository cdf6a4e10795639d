"""Modules on top of the operators.

All of them can be scripted (``torch.jit.script``), compiled and exported, with every option off and
on. ``B`` batch, ``L`` length, ``D`` embed_dim.

One head, inputs (B, L, D) or (L, D), masks as the operators take them (True = attend)::

    SelfAttention(embed_dim, score="dot", key_dim=None, value_dim=None, bias=True, dropout=0.0,
                  is_causal=False, window=(-1, -1), scale=None, alibi=False)
        (x, attn_mask=None, key_lengths=None, need_weights=False) -> (output, weights or None)
    AdditiveAttention(query_dim, key_dim, hidden_dim, bias=True, dropout=0.0)
        (query, key, value=None, attn_mask=None, key_lengths=None, need_weights=False)
            -> (context, weights or None)
        .project_key(key), .attend(query, projected_key, value, ...): keys projected once

Arguments, state dict and conventions of PyTorch's module of nearly the same name (sequence first
unless ``batch_first=True``; in boolean masks True = do NOT attend), and more after them::

    MultiHeadAttention(embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False,
                       add_zero_attn=False, kdim=None, vdim=None, batch_first=False,
                       device=None, dtype=None,
                       *, score="dot", num_kv_heads=None, window=(-1, -1), rotary=None, scale=None,
                       alibi=False)
        (query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
         average_attn_weights=True, is_causal=False,
         key_lengths=None, key_starts=None, query_offset=0, query_offsets=None)
            -> (output, weights or None)
    TransformerEncoderLayer(d_model, nhead, dim_feedforward=2048, dropout=0.1, activation="relu",
                            layer_norm_eps=1e-5, batch_first=False, norm_first=False, bias=True,
                            device=None, dtype=None,
                            *, score="dot", num_kv_heads=None, window=(-1, -1), rotary=None,
                            alibi=False)
        (src, src_mask=None, src_key_padding_mask=None, is_causal=False, key_lengths=None) -> output
    TransformerDecoderLayer(... the same ..., cross_score="dot", cross_nhead=None,
                            cross_num_kv_heads=None, memory_dim=None, alibi=False)
        (tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
         memory_key_padding_mask=None, tgt_is_causal=False, memory_is_causal=False,
         tgt_lengths=None, memory_lengths=None) -> output
        .forward_with_weights(same arguments) -> (output, weights of the attention to the memory,
                                                  (B, cross_nhead, Lt, Lm))
    TransformerEncoder(layer, num_layers, norm=None, enable_nested_tensor=True, mask_check=True)
    TransformerDecoder(layer, num_layers, norm=None)

Decoding step by step, the same numbers as the causal ``forward`` gives, all of it scriptable::

    cache = layer.new_cache(memory, capacity)     # KVCache: plain tensors; memory projected once
    lengths = torch.zeros(B, dtype=torch.int64)   # tokens in the cache, sample by sample
    for step in range(max_length):
        y = layer.decode(x, cache, lengths, memory_lengths)  # x: the embedding of the new token(s)
        # or: y, weights = layer.decode_with_weights(x, cache, lengths, memory_lengths)
        lengths = lengths + x.size(1)             # batch_first; else x.size(0)

``decode`` writes into the cache. Samples may have different lengths; ``x`` may hold several tokens
(a prompt). A decoder stack has the same methods, with a list of caches.

Positional encodings, x (..., L, D)::

    SinusoidalPositionalEncoding(scale=1.0, base=10000.0, dropout=0.0)
    LearnedPositionalEncoding(max_length, embed_dim, dropout=0.0)
    RotaryEmbedding(dim, max_length=4096, base=10000.0, interleaved=False, scaling=1.0)
        x (B, H, L, head dim)
    all three:
        (x, offset=0, positions=None) -> x's shape; row l stands at position offset + l, or
        offset + positions[b, l]; for a decoder step give positions=lengths[:, None]
"""

from .attention import AdditiveAttention, SelfAttention
from .multi_head_attention import MultiHeadAttention
from .positional import LearnedPositionalEncoding, RotaryEmbedding, SinusoidalPositionalEncoding
from .transformer import (
    KVCache,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "AdditiveAttention",
    "KVCache",
    "LearnedPositionalEncoding",
    "MultiHeadAttention",
    "RotaryEmbedding",
    "SelfAttention",
    "SinusoidalPositionalEncoding",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
