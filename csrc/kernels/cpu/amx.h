#pragma once

namespace torch_selfattn::kernels::cpu {

// Why no thread of this process may use the AMX tiles for products of bfloat16, or null. Linux
// grants them for the asking, once for a process and all its threads.
const char* amx_not_usable();

}  // namespace torch_selfattn::kernels::cpu
