#pragma once

// The modules of Python's torch_selfattn.nn for C++, in the manner of torch::nn. Names, options,
// defaults, state-dict keys, starting numbers (after the same manual_seed) and errors are those of
// Python, where they are described at length: python -c 'help("torch_selfattn.nn")'.
//
//   SelfAttention, AdditiveAttention                   nn/attention.h
//   MultiHeadAttention                                 nn/multi_head_attention.h
//   TransformerEncoderLayer, TransformerDecoderLayer,  nn/transformer.h
//   TransformerEncoder, TransformerDecoder, KVCache, LayerNorm
//   SinusoidalPositionalEncoding,                      nn/positional.h
//   LearnedPositionalEncoding, RotaryEmbedding
//   load_state_dict, save_state_dict                   nn/state_dict.h
//
// What differs from Python follows torch::nn:
//  * options are given by builders: MultiHeadAttention(MultiHeadAttentionOptions(64, 4)
//    .batch_first(true).window({8, 0}))
//  * modules start on the CPU in float32; module->to(device, dtype) does what the arguments device
//    and dtype do in Python
//  * a tensor that is not given, or a result that Python would return as None, is an undefined
//    tensor: {} as argument, .defined() to ask
//
// Letters of shapes: docs/notation.md.

#include <torch_selfattn/nn/attention.h>
#include <torch_selfattn/nn/multi_head_attention.h>
#include <torch_selfattn/nn/positional.h>
#include <torch_selfattn/nn/state_dict.h>
#include <torch_selfattn/nn/transformer.h>
#include <torch_selfattn/ops.h>
