#include "testing.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>

namespace testing {
namespace {

struct Entry {
  const char* name;
  void (*function)();
};
std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}
int failures = 0;  // of the running test
std::uint64_t state = 1;

}  // namespace

Test::Test(const char* name, void (*function)()) { entries().push_back({name, function}); }

std::uint32_t random() {
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return static_cast<std::uint32_t>(state * 2685821657736338717ull >> 32);
}

void report_failure(const char* file, int line, const char* text) {
  if (++failures <= 5) printf("    %s:%d: %s\n", file, line, text);
}
void report_failure(const char* file, int line, const char* text, double got, double expected) {
  if (++failures <= 5) {
    printf("    %s:%d: %s: got %.9g, expected %.9g\n", file, line, text, got, expected);
  }
}

}  // namespace testing

// Runs the tests whose names contain the argument, all without one.
int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  int ran = 0;
  int bad = 0;
  for (const auto& [name, function] : testing::entries()) {
    if (argc > 1 && std::strstr(name, argv[1]) == nullptr) continue;
    testing::failures = 0;
    testing::state = 0x9e3779b97f4a7c15ull;
    const auto start = Clock::now();
    try {
      function();
    } catch (const std::exception& error) {
      testing::report_failure(__FILE__, __LINE__, error.what());
    }
    const std::chrono::duration<double> seconds = Clock::now() - start;
    const bool passed = testing::failures == 0;
    printf("%-6s %6.2f s  %s\n", passed ? "ok" : "FAILED", seconds.count(), name);
    fflush(stdout);
    ++ran;
    bad += passed ? 0 : 1;
  }
  printf("%d tests, %d failed\n", ran, bad);
  return bad > 0 || ran == 0 ? 1 : 0;
}
