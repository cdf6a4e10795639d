#include "kernels/cpu/amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace torch_selfattn::kernels::cpu {

#if defined(__x86_64__) && defined(__linux__)
namespace {

bool cpu_has_amx_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned amx_bf16 = 1u << 22;
  constexpr unsigned amx_tile = 1u << 24;
  return (edx & amx_bf16) != 0 && (edx & amx_tile) != 0;
}

// The tiles are state that the kernel saves for those only that have asked for it. It refuses if it
// does not know them, or if a signal stack of a thread is too small for them.
bool kernel_permits_tiles() {
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

const char* find_reason() {
  if (!cpu_has_amx_bf16()) return "this CPU has no AMX for bfloat16";
  return kernel_permits_tiles() ? nullptr : "the operating system does not permit AMX";
}

}  // namespace

const char* amx_not_usable() {
  static const char* const reason = find_reason();
  return reason;
}
#else
const char* amx_not_usable() { return "this CPU has no AMX for bfloat16"; }
#endif

}  // namespace torch_selfattn::kernels::cpu
