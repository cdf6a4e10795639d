#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

// Autocast changes nothing here: x keeps its dtype (an encoding costs memory traffic, no matrix
// product), and tables and angles stay float32 whatever x is.
void register_fallthrough(torch::Library& m) {
  for (const char* op : {"_sinusoidal_encoding_forward", "_rotary_tables_forward",
                         "_add_sinusoidal_encoding_forward", "_add_learned_encoding_forward",
                         "_add_learned_encoding_backward", "_rotary_embedding_forward"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace

TORCH_SELFATTN_IMPL(AutocastCPU, m) { register_fallthrough(m); }
TORCH_SELFATTN_IMPL(AutocastCUDA, m) { register_fallthrough(m); }

}  // namespace torch_selfattn::ops
