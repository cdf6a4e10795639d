#pragma once

// What the scheduler, the emulated instructions and the race detector know of each other.
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

struct Warp;

struct Fiber {  // one GPU thread
  enum State : std::uint8_t { kReady, kWaiting, kFinished };
  // A cp.async not yet waited for; landed: the bytes have arrived already.
  struct Copy {
    char* to;
    const char* from;
    int bytes, source_bytes, group;
    bool landed;
  };

  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan_stack = nullptr;
  uint3 thread_index{};
  int index = 0;
  int lane = 0;
  Warp* warp = nullptr;
  State state = kFinished;
  const char* waits_for = nullptr;
  std::uint64_t waits_detail = 0;
  const void* waits_at = nullptr;
  std::vector<Copy> copies;
  int copy_group = 0;
};

struct Warp {
  struct Pending {  // a collective that some lanes have reached
    std::uint32_t mask, arrived;
    WarpOperation operation;
    const char* name;
    void* arguments[32];
  };
  int index = 0;
  int lanes = 0;
  Fiber* fibers = nullptr;
  std::uint32_t ready = 0;
  std::uint32_t finished = 0;
  std::vector<Pending> pending;
  std::uint32_t all() const { return ~0u >> (32 - lanes); }
};

extern Fiber* current;    // the running thread; null in the scheduler
extern const void* site;  // where in the kernel the emulated instruction that runs was called
extern char* stacks_begin;
extern char* stacks_end;
extern std::uint64_t random_state;
extern double laziness;  // probability that an asynchronous copy lands only when it is waited for

inline std::uint32_t random_bits() {  // xorshift*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<std::uint32_t>(random_state * 2685821657736338717ull >> 32);
}
inline bool chance(double probability) { return random_bits() < probability * 4294967295.0; }

// "file:line" of a kernel's statement, from the debug information.
std::string source_line(const void* program_counter);
std::string shared_name(const void* pointer);  // "dynamic shared memory + offset"
char* shared_pointer(std::uint32_t address);
void wait(const char* what, std::uint64_t detail, const void* at);  // until wake()
void wake(Fiber& fiber);

// Vector clocks per thread; all of these return at once unless a kernel is instrumented.
namespace race {

using Clock = std::vector<std::uint32_t>;
extern bool enabled;
void begin_launch();
void begin_block(int threads);
void release(int thread, Clock& into);
void acquire(int thread, const Clock& from);
void join(const std::vector<int>& threads);
void access(int thread, const void* pointer, std::size_t bytes, bool write, bool atomic = false);
void begin_async_write(const void* pointer, std::size_t bytes, int issuer);
void end_async_write(const void* pointer, std::size_t bytes, int thread);

}  // namespace race

}  // namespace cuda_on_cpu
