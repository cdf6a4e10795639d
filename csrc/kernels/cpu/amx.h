#pragma once

namespace torch_selfattn::kernels::cpu {

// Whether the CPU has AMX tiles with products of bfloat16.
bool cpu_has_amx();

// Whether this process may use them. Linux grants that for the asking, once for all threads; the
// first call asks. It is left until tiles are wanted, because signal stacks must be larger then.
bool may_use_amx();

}  // namespace torch_selfattn::kernels::cpu
