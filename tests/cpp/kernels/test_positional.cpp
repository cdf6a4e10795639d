#include <array>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "catch2_any.h"
#include "kernels/common/sincos_turns.h"
#include "kernels/cpu/positional.h"

namespace k = torch_selfattn::kernels;
using std::int64_t;

namespace {

// The variants that this machine runs.
std::vector<const k::cpu::PositionalKernels*> variants() {
  std::vector<const k::cpu::PositionalKernels*> found;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (const auto* kernels = k::cpu::positional_kernels(name)) found.push_back(kernels);
  }
  return found;
}

// Threads of the test's own, every one taking every third task.
k::Parallel three_threads() {
  k::Parallel parallel;
  parallel.threads = 3;
  parallel.run_tasks = [](int64_t count, int threads, void (*task)(void*, int64_t, int),
                          void* context) {
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread) {
      running.emplace_back([=] {
        for (int64_t index = thread; index < count; index += threads) task(context, index, thread);
      });
    }
    for (std::thread& thread : running) thread.join();
  };
  return parallel;
}

double encoding(int64_t position, int64_t column, int64_t dim) {
  const double exponent = static_cast<double>(column / 2 * 2) / static_cast<double>(dim);
  const double angle = static_cast<double>(position) / std::pow(10000.0, exponent);
  return column % 2 == 0 ? std::sin(angle) : std::cos(angle);
}

double number(std::size_t index) { return std::sin(1.0 + 12.9898 * static_cast<double>(index)); }

// (B, H, L, D) = (3, 2, 400, 40), heads inside the length.
constexpr int64_t kBatch = 3;
constexpr int64_t kHeads = 2;
constexpr int64_t kLength = 400;
constexpr int64_t kDim = 40;
constexpr std::size_t kSize = kBatch * kHeads * kLength * kDim;

template <typename T>
struct Rows {
  Rows() : x(kSize), out(kSize) {
    for (std::size_t i = 0; i < kSize; ++i) x[i] = T(static_cast<float>(number(i)));
    problem.dtype =
        k::size_of(k::DType::kFloat32) == sizeof(T) ? k::DType::kFloat32 : k::DType::kBFloat16;
    problem.batch = kBatch;
    problem.heads = kHeads;
    problem.length = kLength;
    problem.dim = kDim;
    problem.x.data = x.data();
    problem.out.data = out.data();
    const int64_t stride[] = {kLength * kHeads * kDim, kDim, kHeads * kDim, 1};
    for (int d = 0; d < 4; ++d) problem.x.stride[d] = problem.out.stride[d] = stride[d];
  }
  // Largest |out - expected(b, l, h, d)|.
  template <typename Expected>
  double error(Expected&& expected) const {
    double largest = 0;
    for (std::size_t i = 0; i < kSize; ++i) {
      const auto row = static_cast<int64_t>(i) / kDim;
      const double want = expected(row / kHeads / kLength, row / kHeads % kLength, i,
                                   static_cast<int64_t>(i) % kDim);
      const double found = std::abs(static_cast<double>(out[i]) - want);
      if (!(found <= largest)) largest = found;  // NaN too
    }
    return largest;
  }
  std::vector<T> x;
  std::vector<T> out;
  k::RowProblem problem;
};

template <typename T>
void check_add_sinusoid(double bound) {
  for (const auto* kernels : variants()) {
    for (const k::Parallel& parallel : {k::Parallel{}, three_threads()}) {
      Rows<T> rows;
      rows.problem.positions.offset = 1000;
      kernels->add_sinusoid({rows.problem, 0.5, 10000.0}, parallel);
      REQUIRE(rows.error([&](int64_t, int64_t l, std::size_t i, int64_t d) {
        return static_cast<double>(rows.x[i]) + 0.5 * encoding(1000 + l, d, kDim);
      }) <= bound);
    }
  }
}

}  // namespace

TEST_CASE("sincos_turns keeps its bound over whole turns and at quadrant borders") {
  double largest = 0;
  for (int64_t i = -200'000; i <= 200'000; ++i) {
    const double turns = static_cast<double>(i) / 65536.0 + (i % 3 == 0 ? 1e9 : 0);
    float sine = 0;
    float cosine = 0;
    k::sincos_turns(turns, &sine, &cosine);
    const double angle = (turns - std::rint(turns)) * 6.283185307179586;
    largest = std::max(largest, std::abs(sine - std::sin(angle)));
    largest = std::max(largest, std::abs(cosine - std::cos(angle)));
  }
  REQUIRE(largest <= 0x1p-23);
  REQUIRE(largest > 0);
}

TEST_CASE("every instruction set adds the same encoding") {
  check_add_sinusoid<float>(2e-7);
  check_add_sinusoid<k::bfloat16>(8e-3);
}

TEST_CASE("position ids, near and far apart") {
  for (const auto* kernels : variants()) {
    // Few rows of factors for many ids; and ids all over, some negative.
    for (const int64_t spread : {int64_t{1}, int64_t{10'007}}) {
      std::vector<int64_t> ids(kBatch * kLength);
      for (std::size_t i = 0; i < ids.size(); ++i) {
        ids[i] = static_cast<int64_t>(i * 7919 % ids.size()) * spread - 50;
      }
      Rows<float> rows;
      rows.problem.positions.ids = ids.data();
      rows.problem.positions.stride[0] = kLength;
      rows.problem.positions.stride[1] = 1;
      kernels->add_sinusoid({rows.problem, 1.0, 10000.0}, three_threads());
      REQUIRE(rows.error([&](int64_t b, int64_t l, std::size_t i, int64_t d) {
        const int64_t position = ids[static_cast<std::size_t>(b * kLength + l)];
        return static_cast<double>(rows.x[i]) + encoding(position, d, kDim);
      }) <= 4e-7);
    }
  }
}

TEST_CASE("rotating there and back") {
  for (const auto* kernels : variants()) {
    for (const bool interleaved : {false, true}) {
      constexpr int64_t kPairs = 17;  // 6 of 40 columns pass through
      std::vector<float> cosine(kLength * kPairs);
      std::vector<float> sine(kLength * kPairs);
      k::SinusoidTable table;
      table.length = kLength;
      table.frequencies = {2 * kPairs, 100.0, 1.0};
      table.sine = sine.data();
      table.cosine = cosine.data();
      table.sines = table.cosines = table.row_stride = kPairs;
      table.pair_stride = 1;
      kernels->sinusoid_table(table, three_threads());
      Rows<float> rows;
      const std::vector<float> x = rows.x;
      k::Rotary r;
      r.rows = rows.problem;
      r.pairs = kPairs;
      r.interleaved = interleaved;
      r.cosine = cosine.data();
      r.sine = sine.data();
      r.cosine_stride[1] = r.sine_stride[1] = kPairs;
      r.cosine_stride[2] = r.sine_stride[2] = 1;
      r.table_rows = kLength;
      kernels->rotary(r, three_threads());
      // It turns: by far more than a rounding, and keeps the columns behind.
      double moved = 0;
      for (std::size_t i = 0; i < kSize; ++i) {
        const bool passes = static_cast<int64_t>(i) % kDim >= 2 * kPairs;
        if (passes) REQUIRE(rows.out[i] == x[i]);
        moved = std::max(moved, static_cast<double>(std::abs(rows.out[i] - x[i])));
      }
      REQUIRE(moved > 1.0);
      rows.x = rows.out;
      r.rows.x.data = rows.x.data();
      r.conjugate = true;
      kernels->rotary(r, three_threads());
      REQUIRE(rows.error([&](int64_t, int64_t, std::size_t i, int64_t) {
        return static_cast<double>(x[i]);
      }) <= 5e-7);
    }
  }
}

TEST_CASE("the gradient of a learned table is the same for any number of threads") {
  for (const auto* kernels : variants()) {
    Rows<float> grad;
    k::LearnedTableGrad p;
    p.batch = kBatch;
    p.heads = kHeads;
    p.length = kLength;
    p.dim = kDim;
    p.table_rows = kLength + 5;
    p.offset = 3;
    p.grad = grad.problem.x;
    std::array<std::vector<float>, 2> got;
    for (std::size_t run = 0; run < 2; ++run) {
      got[run].resize(static_cast<std::size_t>(p.table_rows * kDim));
      p.grad_table = got[run].data();
      kernels->learned_table_grad(p, run == 0 ? k::Parallel{} : three_threads());
    }
    REQUIRE(got[0] == got[1]);
    std::vector<double> want(got[0].size());
    for (std::size_t i = 0; i < kSize; ++i) {
      const int64_t l = static_cast<int64_t>(i) / kDim / kHeads % kLength;
      want[static_cast<std::size_t>((l + 3) * kDim + static_cast<int64_t>(i) % kDim)] += grad.x[i];
    }
    for (std::size_t i = 0; i < want.size(); ++i) {
      REQUIRE(std::abs(got[0][i] - want[i]) <= 1e-6);
    }
  }
}
