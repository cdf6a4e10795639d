// Runs the blocks of a grid one after another, with every GPU thread a fiber.
//
// Threads switch only where CUDA lets them wait: block barriers and warp collectives. Which warp
// runs next, and when asynchronous copies land, is drawn from the seed, so that a missing barrier
// or wait shows as a wrong result in most seeds. Memory that an asynchronous copy will write reads
// as NaN until then, as does shared memory at the start of a block.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#define __asan_poison_memory_region(...)
#define __asan_unpoison_memory_region(...)
#endif

#if !defined(__x86_64__)
#error "cuda_on_cpu: write the context switch for this processor"
#endif
// Saves the callee-saved registers and the stack pointer of one fiber, and takes up another's.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
// The section of all static shared variables; absent in a program that has none.
extern "C" __attribute__((weak)) char __start_cuda_shared[], __stop_cuda_shared[];

namespace cuda_on_cpu {

Fiber* current;
const void* site;
char* stacks_begin;
char* stacks_end;
std::uint64_t random_state = 1;
double laziness = 0.5;

namespace {

constexpr int kMaxThreads = 1024;
constexpr std::size_t kStackBytes = 256 << 10;
constexpr std::size_t kPage = 4096;
constexpr std::uint32_t kWindowBytes = 256 << 10;
constexpr std::uint32_t kWindowStart = 1024;
constexpr std::size_t kMaxDynamicShared = 227 << 10;  // as on sm_90
// Dynamic shared memory; offsets into it are the 32-bit shared addresses.
alignas(1024) char window[kWindowBytes];

struct Region {
  std::uint32_t offset;
  std::size_t bytes;
  char* at;
};

std::uint64_t seed = [] {
  const char* setting = std::getenv("CUDA_ON_CPU_SEED");
  return setting != nullptr ? std::strtoull(setting, nullptr, 0) : 0;
}();
std::uint64_t launches;
double stickiness;  // probability that the same warp goes on
std::vector<Fiber> fibers(kMaxThreads);
std::vector<Warp> warps;
int threads;
int live;  // threads that have not exited
void* host_stack_pointer;
[[maybe_unused]] void* host_asan_stack;
[[maybe_unused]] const void* host_bottom;
[[maybe_unused]] std::size_t host_size;
const std::function<void()>* kernel_body;
std::string failure;

// __syncthreads
std::vector<Fiber*> at_barrier;
race::Clock barrier_clock;
// Named barriers
struct NamedBarrier {
  std::vector<Fiber*> waiting;
  race::Clock clock;
};
std::vector<NamedBarrier> named_barriers;
int predicate_sum;
int predicate_result;

std::vector<Region> regions;
std::size_t dynamic_bytes;
std::uint32_t window_used;

void yield() {
  Fiber& f = *current;
  __sanitizer_start_switch_fiber(&f.asan_stack, host_bottom, host_size);
  cuda_on_cpu_switch(&f.stack_pointer, host_stack_pointer);
  __sanitizer_finish_switch_fiber(f.asan_stack, nullptr, nullptr);
}

// Lets the threads at the barrier go on once all that live have come.
void check_barrier() {
  if (at_barrier.empty() || static_cast<int>(at_barrier.size()) < live) return;
  predicate_result = std::exchange(predicate_sum, 0);
  for (Fiber* f : std::exchange(at_barrier, {})) {
    race::acquire(f->index, barrier_clock);
    if (f != current) wake(*f);
  }
}

void run_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &host_bottom, &host_size);
  (*kernel_body)();
  Fiber& f = *current;
  f.state = Fiber::kFinished;
  f.warp->finished |= 1u << f.lane;
  f.warp->ready &= ~(1u << f.lane);
  --live;
  for (const Warp::Pending& p : f.warp->pending) {
    if ((p.mask >> f.lane & 1) != 0) {
      fail("lane %d exited while lanes %08x wait for it in %s", f.lane, p.arrived, p.name);
    }
  }
  check_barrier();
  __sanitizer_start_switch_fiber(nullptr, host_bottom, host_size);
  cuda_on_cpu_switch(&f.stack_pointer, host_stack_pointer);
}

// A stack whose first switch-in enters run_fiber.
void prepare(Fiber& f) {
  if (stacks_begin == nullptr) {
    constexpr std::size_t bytes = kMaxThreads * kStackBytes;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stacks_begin = static_cast<char*>(p);
    stacks_end = stacks_begin + bytes;
  }
  if (f.stack == nullptr) {
    f.stack = stacks_begin + static_cast<std::size_t>(&f - fibers.data()) * kStackBytes;
    mprotect(f.stack, kPage, PROT_NONE);  // an overflow faults here
    f.stack += kPage;
  }
  __asan_unpoison_memory_region(f.stack, kStackBytes - kPage);
  // The ABI wants the stack pointer at 8 modulo 16 on entry.
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes - kPage) - 2;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
}

void resume(Fiber& f) {
  current = &f;
  threadIdx = f.thread_index;
  __sanitizer_start_switch_fiber(&host_asan_stack, f.stack, kStackBytes - kPage);
  cuda_on_cpu_switch(&host_stack_pointer, f.stack_pointer);
  __sanitizer_finish_switch_fiber(host_asan_stack, nullptr, nullptr);
  current = nullptr;
  if (!failure.empty()) throw Error(failure);
}

std::string who_waits() {
  std::string text = "deadlock: no thread can go on";
  for (const Warp& w : warps) {
    for (std::uint32_t left = ~w.finished & w.all(); left != 0;) {
      const Fiber& first = w.fibers[__builtin_ctz(left)];
      std::uint32_t same = 0;
      for (int lane = 0; lane < w.lanes; ++lane) {
        const Fiber& f = w.fibers[lane];
        if ((left >> lane & 1) != 0 && f.waits_for == first.waits_for &&
            f.waits_detail == first.waits_detail && f.waits_at == first.waits_at) {
          same |= 1u << lane;
        }
      }
      char line[200];
      snprintf(line, sizeof line, "\n  warp %2d lanes %08x wait for %s (%#llx) at ", w.index, same,
               first.waits_for, static_cast<unsigned long long>(first.waits_detail));
      text += line + source_line(first.waits_at);
      left &= ~same;
    }
  }
  return text;
}

Warp* pick_warp(Warp* last) {
  if (last != nullptr && last->ready != 0 && chance(stickiness)) return last;
  const std::size_t start = random_bits() % warps.size();
  for (std::size_t i = 0; i < warps.size(); ++i) {
    Warp& w = warps[(start + i) % warps.size()];
    if (w.ready != 0) return &w;
  }
  return nullptr;
}

__attribute__((no_sanitize("address"))) void fill_shared_memory() {
  __asan_unpoison_memory_region(window, kWindowBytes);
  std::memset(window, 0xff, kWindowBytes);
  __asan_poison_memory_region(window, kWindowBytes);
  for (volatile char* p = __start_cuda_shared; p < __stop_cuda_shared; ++p) {
    *p = static_cast<char>(0xff);
  }
}

void run_block() {
  warps.assign(static_cast<std::size_t>((threads + 31) / 32), Warp());
  for (std::size_t i = 0; i < warps.size(); ++i) {
    Warp& w = warps[i];
    w.index = static_cast<int>(i);
    w.fibers = &fibers[32 * i];
    w.lanes = std::min(32, threads - 32 * w.index);
    w.ready = w.all();
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[static_cast<std::size_t>(i)];
    prepare(f);
    const unsigned n = static_cast<unsigned>(i);
    f.thread_index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
    f.index = i;
    f.lane = i % 32;
    f.warp = &warps[static_cast<std::size_t>(i / 32)];
    f.state = Fiber::kReady;
    f.copies.clear();
    f.copy_group = 0;
  }
  at_barrier.clear();
  barrier_clock.clear();
  named_barriers.assign(16, {});
  regions.clear();
  predicate_sum = 0;
  live = threads;
  window_used = kWindowStart;
  fill_shared_memory();
  race::begin_block(threads);
  for (Warp* w = nullptr; live > 0;) {
    w = pick_warp(w);
    if (w == nullptr) fail("%s", who_waits().c_str());
    // Lanes run in order from a random one, or in reverse.
    const std::uint32_t turn = random_bits() % 32;
    for (std::uint32_t i = 0, todo = w->ready; i < 32; ++i) {
      const std::uint32_t lane = ((turn & 1) != 0 ? turn - i : turn + i) & 31;
      if ((todo & w->ready & 1u << lane) != 0) resume(w->fibers[lane]);
    }
  }
}

}  // namespace

void set_seed(std::uint64_t value) {
  seed = value;
  launches = 0;
}

void fail(const char* format, ...) {
  char text[8192];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (current == nullptr) throw Error(text);
  char where[200];
  snprintf(where, sizeof where, ", block (%u,%u,%u) thread (%u,%u,%u), seed %llu]", blockIdx.x,
           blockIdx.y, blockIdx.z, current->thread_index.x, current->thread_index.y,
           current->thread_index.z, static_cast<unsigned long long>(seed));
  failure = std::string(text) + " [" + source_line(site) + where;
  yield();  // the scheduler throws, and never resumes this block
  std::abort();
}

void run_grid(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
              const std::function<void()>& kernel) {
  threads = static_cast<int>(block.x * block.y * block.z);
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535) {
    fail("launch: impossible block or grid size");
  }
  if (dynamic_shared_bytes > kMaxDynamicShared) {
    fail("launch: %zu bytes of dynamic shared memory", dynamic_shared_bytes);
  }
  gridDim = grid;
  blockDim = block;
  dynamic_bytes = dynamic_shared_bytes;
  kernel_body = &kernel;
  random_state = (seed * 1000003 + launches++ + 1) * 0x9e3779b97f4a7c15ull;
  // A late reader sees every race, so the race detector lets all copies land late.
  const double chances[] = {1, 0.5, 0.9, 0};
  const double stick[] = {0.95, 0, 0.5};
  laziness = race::enabled ? 1 : chances[seed % 4];
  stickiness = stick[seed % 3];
  current = nullptr;
  failure.clear();
  race::begin_launch();
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
    }
  }
}

std::string source_line(const void* program_counter) {
  Dl_info info;
  if (program_counter == nullptr || dladdr(program_counter, &info) == 0) return "?";
  char text[600];
  snprintf(text, sizeof text, "addr2line -i -e '%s' %#zx 2>/dev/null", info.dli_fname,
           static_cast<std::size_t>(static_cast<const char*>(program_counter) - 1 -
                                    static_cast<char*>(info.dli_fbase)));
  std::string line;
  if (FILE* output = popen(text, "r"); output != nullptr) {
    // Innermost first: the first that is not one of the wrappers.
    while (fgets(text, sizeof text, output) != nullptr) {
      line = text;
      line = line.substr(line.rfind('/') + 1);
      line = line.substr(0, line.find_first_of(" \n"));
      const std::string file = line.substr(0, line.find(':'));
      if (file != "ptx.cuh" && file != "builtins.h" && file != "launch.h") break;
    }
    pclose(output);
  }
  return line;
}

void wait(const char* what, std::uint64_t detail, const void* at) {
  Fiber& f = *current;
  f.state = Fiber::kWaiting;
  f.waits_for = what;
  f.waits_detail = detail;
  f.waits_at = at;
  f.warp->ready &= ~(1u << f.lane);
  yield();
}

void wake(Fiber& f) {
  f.state = Fiber::kReady;
  f.warp->ready |= 1u << f.lane;
}

int current_lane() { return current->lane; }
std::uint32_t active_lanes() { return ~current->warp->finished & current->warp->all(); }

void warp_collective(std::uint32_t mask, const char* name, WarpOperation operation, void* arguments,
                     const void* at) {
  site = at = at != nullptr ? at : __builtin_return_address(0);
  Fiber& f = *current;
  Warp& w = *f.warp;
  if ((mask >> f.lane & 1) == 0) fail("%s: lane %d is not in its mask %08x", name, f.lane, mask);
  if ((mask & (w.finished | ~w.all())) != 0) {
    fail("%s: mask %08x names lanes that have exited or do not exist", name, mask);
  }
  auto p = w.pending.begin();
  while (p != w.pending.end() &&
         (p->mask != mask || p->operation != operation || (p->arrived >> f.lane & 1) != 0)) {
    ++p;
  }
  if (p == w.pending.end()) p = w.pending.insert(p, {mask, 0, operation, name, {}});
  p->arguments[f.lane] = arguments;
  p->arrived |= 1u << f.lane;
  if (p->arrived != mask) return wait(name, mask, at);
  const Warp::Pending all = *p;
  w.pending.erase(p);
  all.operation(all.arguments, mask);
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && lane != f.lane) wake(w.fibers[lane]);
  }
}

void sync_warp(std::uint32_t mask) {
  warp_collective(
      mask, "syncwarp",
      [](void* const*, std::uint32_t lanes) {
        if (!race::enabled) return;
        std::vector<int> members;
        for (int lane = 0; lane < 32; ++lane) {
          if ((lanes >> lane & 1) != 0) members.push_back(current->index - current->lane + lane);
        }
        race::join(members);
      },
      nullptr, __builtin_return_address(0));
}

namespace {
void barrier(const void* at) {
  site = at;
  race::release(current->index, barrier_clock);
  at_barrier.push_back(current);
  const bool last = static_cast<int>(at_barrier.size()) == live;
  check_barrier();
  if (!last) wait("__syncthreads", 0, at);
}
}  // namespace

void sync_threads() { barrier(__builtin_return_address(0)); }

int sync_threads_count(int predicate) {
  predicate_sum += predicate != 0 ? 1 : 0;
  barrier(__builtin_return_address(0));
  return predicate_result;
}

void sync_some_threads(int id, int count) {
  site = __builtin_return_address(0);
  if (id < 1 || id > 15 || count < 32 || count % 32 != 0 || count > threads) {
    fail("barrier %d of %d threads", id, count);
  }
  NamedBarrier& b = named_barriers[static_cast<std::size_t>(id)];
  race::release(current->index, b.clock);
  b.waiting.push_back(current);
  if (static_cast<int>(b.waiting.size()) < count) {
    return wait("named barrier", static_cast<std::uint64_t>(id), site);
  }
  for (Fiber* f : std::exchange(b.waiting, {})) {
    race::acquire(f->index, b.clock);
    if (f != current) wake(*f);
  }
}

void* shared_region(std::uint32_t offset, std::size_t bytes) {
  site = __builtin_return_address(0);
  const std::size_t end = offset + bytes;
  if (end > dynamic_bytes) {
    fail("shared region [%u, %zu) lies outside the %zu bytes of the launch", offset, end,
         dynamic_bytes);
  }
  for (const Region& r : regions) {
    if (offset >= r.offset && end <= r.offset + r.bytes) return r.at + (offset - r.offset);
    if (offset < r.offset + r.bytes && r.offset < end) {
      fail("shared region [%u, %zu) straddles [%u, %zu)", offset, end, r.offset,
           r.offset + r.bytes);
    }
  }
  // As on the GPU modulo 1024, with a red zone of 16 bytes or more after the region before.
  const auto next = [&](std::uint32_t from) {
    return (from + 1023 - offset % 1024) / 1024 * 1024 + offset % 1024;
  };
  std::uint32_t at = next(window_used + 16);
  if (at + bytes > kWindowBytes) at = next(window_used);  // too full for red zones
  if (at + bytes > kWindowBytes) fail("shared regions do not fit the emulated window");
  window_used = static_cast<std::uint32_t>(at + bytes);
  __asan_unpoison_memory_region(window + at, bytes);
  regions.push_back({offset, bytes, window + at});
  return window + at;
}

std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const char*>(pointer) - window);
}
char* shared_pointer(std::uint32_t address) { return window + static_cast<std::int32_t>(address); }

std::string shared_name(const void* pointer) {
  const auto* p = static_cast<const char*>(pointer);
  for (const Region& r : regions) {
    if (p >= r.at && p < r.at + r.bytes) {
      return "dynamic shared memory + " + std::to_string(r.offset + (p - r.at));
    }
  }
  return "static shared memory + " + std::to_string(p - __start_cuda_shared);
}

}  // namespace cuda_on_cpu
