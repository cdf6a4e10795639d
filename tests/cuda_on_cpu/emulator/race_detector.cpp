// Finds data races between GPU threads, whatever order they happened to run in.
//
// A kernel compiled with -fsanitize=thread calls the __tsan_* functions below for each load and
// store; the sanitizer's own run-time library is not linked. Every thread has a vector clock,
// advanced where it releases (barrier, __syncwarp); every byte remembers its last writer and
// reader. Shared memory is checked within the block, global memory also between the blocks of a
// launch. Shuffles and matrix instructions order nothing, as CUDA documents.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <unordered_map>

#include "internal.h"

extern "C" __attribute__((weak)) char __start_cuda_shared[], __stop_cuda_shared[];

namespace cuda_on_cpu::race {

bool enabled;

namespace {

enum Flag : std::uint8_t {
  kWritten = 1,
  kRead = 2,
  kWriteAtomic = 4,
  kInFlight = 8,
  kOtherBlockRead = 16,
};

struct Cell {  // one byte of memory
  std::uint32_t block, write_clock, read_clock, write_pc, read_pc;
  std::uint16_t writer, reader;
  std::uint8_t flags;
};
struct Line {
  Cell cells[16] = {};
};

constexpr std::size_t kWindowBytes = 256 << 10;
std::vector<Cell> window(kWindowBytes);              // dynamic shared memory
std::unordered_map<std::uintptr_t, Line> elsewhere;  // by address / 16; cleared at each launch
std::vector<Clock> clocks;
std::uint32_t block;
int threads;
char* image;  // program counters are kept as offsets from here

std::uint32_t image_offset(const void* pc) {
  return static_cast<std::uint32_t>(static_cast<const char*>(pc) - image);
}

Cell& find(const char* p, bool& shared) {
  static char* const base = shared_pointer(0);
  shared = true;
  const auto offset = static_cast<std::size_t>(p - base);
  if (offset < kWindowBytes) return window[offset];
  shared = p >= __start_cuda_shared && p < __stop_cuda_shared;
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  return elsewhere[address / 16].cells[address % 16];
}

struct Access {
  int thread;
  const char* at;
  bool write;
  std::uint32_t pc;
  bool shared;
};

[[noreturn]] void report(const Access& now, const char* before, std::uint32_t pc_before, int thread,
                         bool other_block) {
  char global[40];
  snprintf(global, sizeof global, "global memory %p", now.at);
  fail("data race on %s: %s at %s is not ordered after the %s at %s by %s %d",
       now.shared ? shared_name(now.at).c_str() : global, now.write ? "write" : "read",
       source_line(image + now.pc).c_str(), before, source_line(image + pc_before).c_str(),
       other_block ? "another block's thread" : "thread", thread);
}

void check_byte(Cell& c, Access now, bool atomic) {
  const Clock& known = clocks[static_cast<std::size_t>(now.thread)];
  const bool conflicting_write =
      (c.flags & kWritten) != 0 && !(atomic && (c.flags & kWriteAtomic) != 0);
  if (c.block != block) {
    if (now.shared || c.flags == 0) {
      c = Cell();
    } else {
      if (conflicting_write) report(now, "write", c.write_pc, c.writer, true);
      if (now.write && (c.flags & kRead) != 0) report(now, "read", c.read_pc, c.reader, true);
      if ((c.flags & kRead) != 0) c.flags |= kOtherBlockRead;
    }
    c.block = block;
  } else {
    if (conflicting_write && (c.flags & kInFlight) != 0) {
      report(now, "unfinished asynchronous write", c.write_pc, c.writer, false);
    }
    if (conflicting_write && c.writer != now.thread && c.write_clock > known[c.writer]) {
      report(now, "write", c.write_pc, c.writer, false);
    }
    if (now.write && (c.flags & kOtherBlockRead) != 0) {
      report(now, "read", c.read_pc, c.reader, true);
    }
    if (now.write && (c.flags & kRead) != 0 && c.reader != now.thread &&
        c.read_clock > known[c.reader]) {
      report(now, "read", c.read_pc, c.reader, false);
    }
  }
  const auto thread = static_cast<std::uint16_t>(now.thread);
  if (now.write) {
    c.flags = static_cast<std::uint8_t>((c.flags & kOtherBlockRead) | kWritten |
                                        (atomic ? kWriteAtomic : 0));
    c.writer = thread;
    c.write_clock = known[thread];
    c.write_pc = now.pc;
  } else if ((c.flags & kRead) == 0 || c.reader == thread || c.read_clock <= known[c.reader] ||
             (random_bits() & 1) != 0) {  // of several concurrent readers one is remembered
    c.flags |= kRead;
    c.reader = thread;
    c.read_clock = known[thread];
    c.read_pc = now.pc;
  }
}

void check(int thread, const char* p, std::size_t bytes, bool write, bool atomic,
           std::uint32_t pc) {
  if (p >= stacks_begin && p < stacks_end) return;
  for (const char* const end = p + bytes; p < end; ++p) {
    Access now{thread, p, write, pc, false};
    Cell& cell = find(p, now.shared);
    check_byte(cell, now, atomic);
  }
}

}  // namespace

void begin_launch() { elsewhere.clear(); }

void begin_block(int count) {
  if (!enabled) return;
  ++block;
  threads = count;
  const auto n = static_cast<std::size_t>(count);
  clocks.assign(n, Clock(n, 0));
  for (std::size_t t = 0; t < n; ++t) clocks[t][t] = 1;
}

void release(int thread, Clock& into) {
  if (!enabled) return;
  Clock& own = clocks[static_cast<std::size_t>(thread)];
  into.resize(static_cast<std::size_t>(threads));
  for (std::size_t i = 0; i < own.size(); ++i) into[i] = std::max(into[i], own[i]);
  ++own[static_cast<std::size_t>(thread)];
}

void acquire(int thread, const Clock& from) {
  if (!enabled) return;
  Clock& own = clocks[static_cast<std::size_t>(thread)];
  for (std::size_t i = 0; i < from.size(); ++i) own[i] = std::max(own[i], from[i]);
}

void join(const std::vector<int>& members) {
  Clock all;
  for (const int t : members) release(t, all);
  for (const int t : members) acquire(t, all);
}

void access(int thread, const void* pointer, std::size_t bytes, bool write, bool atomic) {
  if (!enabled) return;
  check(thread, static_cast<const char*>(pointer), bytes, write, atomic, image_offset(site));
}

void begin_async_write(const void* pointer, std::size_t bytes, int issuer) {
  if (!enabled) return;
  const auto* p = static_cast<const char*>(pointer);
  check(issuer, p, bytes, true, false, image_offset(site));
  bool shared;
  for (std::size_t i = 0; i < bytes; ++i) find(p + i, shared).flags |= kInFlight;
}

void end_async_write(const void* pointer, std::size_t bytes, int thread) {
  if (!enabled) return;
  bool shared;
  for (std::size_t i = 0; i < bytes; ++i) {
    Cell& c = find(static_cast<const char*>(pointer) + i, shared);
    c.flags &= static_cast<std::uint8_t>(~kInFlight);
    c.writer = static_cast<std::uint16_t>(thread);
    c.write_clock = clocks[c.writer][c.writer];
  }
}

}  // namespace cuda_on_cpu::race

namespace cuda_on_cpu {

void race_access(const void* p, std::size_t bytes, bool write, bool atomic, const void* at) {
  if (!race::enabled || current == nullptr) return;
  site = at;
  race::access(current->index, p, bytes, write, atomic);
}

}  // namespace cuda_on_cpu

// The calls that -fsanitize=thread puts into the kernels.
extern "C" {

void __tsan_init() {
  cuda_on_cpu::race::enabled = true;
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&__tsan_init), &info) != 0) {
    cuda_on_cpu::race::image = static_cast<char*>(info.dli_fbase);
  }
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

#define TSA_ACCESS(name, bytes, write)                                             \
  void __tsan_##name##bytes(void* p) {                                             \
    cuda_on_cpu::race_access(p, bytes, write, false, __builtin_return_address(0)); \
  }
#define TSA_ACCESSES(bytes)                \
  TSA_ACCESS(read, bytes, false)           \
  TSA_ACCESS(write, bytes, true)           \
  TSA_ACCESS(unaligned_read, bytes, false) \
  TSA_ACCESS(unaligned_write, bytes, true)
TSA_ACCESSES(1)
TSA_ACCESSES(2)
TSA_ACCESSES(4)
TSA_ACCESSES(8)
TSA_ACCESSES(16)
void __tsan_read_range(void* p, std::size_t bytes) {
  cuda_on_cpu::race_access(p, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, std::size_t bytes) {
  cuda_on_cpu::race_access(p, bytes, true, false, __builtin_return_address(0));
}
void* __tsan_memcpy(void* to, const void* from, std::size_t bytes) {
  cuda_on_cpu::race_access(from, bytes, false, false, __builtin_return_address(0));
  cuda_on_cpu::race_access(to, bytes, true, false, __builtin_return_address(0));
  return __builtin_memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, std::size_t bytes) {
  cuda_on_cpu::race_access(to, bytes, true, false, __builtin_return_address(0));
  return __builtin_memset(to, value, bytes);
}

}  // extern "C"
