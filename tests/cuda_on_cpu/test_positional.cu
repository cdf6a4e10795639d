// The CUDA kernels of the positional encodings against the formulas in double, over layouts that
// take the packed path and layouts that must not.
// Length: five kernels that share layouts, positions and the comparison.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/positional.h"
#include "testing.h"

namespace torch_selfattn::kernels::cuda {
namespace {

using std::int64_t;
using testing::DeviceArray;

double value(double x) { return x; }
double value(float x) { return x; }
double value(__nv_bfloat16 x) { return __bfloat162float(x); }
double value(__half x) { return __half2float(x); }

template <typename T>
T rounded(double x) {
  return T(static_cast<std::conditional_t<sizeof(T) == 8, double, float>>(x));
}

template <typename T>
struct Traits;
template <>
struct Traits<double> {
  static constexpr DType dtype = DType::kFloat64;
  static constexpr double epsilon = 1e-14;
};
template <>
struct Traits<float> {
  static constexpr DType dtype = DType::kFloat32;
  static constexpr double epsilon = 2e-7;
};
template <>
struct Traits<__half> {
  static constexpr DType dtype = DType::kFloat16;
  static constexpr double epsilon = 1e-3;
};
template <>
struct Traits<__nv_bfloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr double epsilon = 8e-3;
};

// Of table and angle: float64 if the rows are, else float32.
template <typename T>
using table_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
std::vector<T> random_numbers(int64_t count) {
  std::vector<T> numbers(static_cast<std::size_t>(count));
  for (T& x : numbers) {
    x = rounded<T>(static_cast<double>(testing::random() % 4001) / 1000.0 - 2.0);
  }
  return numbers;
}

std::vector<int64_t> random_ids(int64_t count, int64_t rows) {
  std::vector<int64_t> ids(static_cast<std::size_t>(count));
  for (int64_t& id : ids) id = testing::random() % rows;
  return ids;
}

bool close(double got, double expected, double epsilon) {
  return std::abs(got - expected) <= epsilon * (1.0 + std::abs(expected));
}

// Strides of (B, H, L, D), and how much storage that takes.
struct Layout {
  const char* name;
  int64_t batch, heads, length, dim;
  int64_t stride[4];
  int64_t start;  // elements before the first one
};
Layout heads_outside(int64_t b, int64_t h, int64_t l, int64_t d) {
  return {"(B, H, L, D)", b, h, l, d, {h * l * d, l * d, d, 1}, 0};
}
Layout heads_inside(int64_t b, int64_t h, int64_t l, int64_t d) {
  return {"(B, L, H, D)", b, h, l, d, {l * h * d, d, h * d, 1}, 0};
}
Layout columns_outside(int64_t b, int64_t h, int64_t l, int64_t d) {
  return {"(B, H, D, L)", b, h, l, d, {h * l * d, l * d, 1, l}, 0};
}
Layout unaligned(int64_t b, int64_t h, int64_t l, int64_t d) {
  Layout layout = heads_outside(b, h, l, d);
  layout.name = "unaligned";
  layout.start = 1;
  return layout;
}
Layout shared_sample(int64_t b, int64_t h, int64_t l, int64_t d) {
  return {"expanded", b, h, l, d, {0, l * d, d, 1}, 0};
}

Layout padded_rows(int64_t b, int64_t h, int64_t l, int64_t d) {
  return {"padded rows", b, h, l, d, {h * l * (d + 1), l * (d + 1), d + 1, 1}, 0};
}
Layout every_other_column(int64_t b, int64_t h, int64_t l, int64_t d) {
  return {"every other column", b, h, l, d, {2 * h * l * d, 2 * l * d, 2 * d, 2}, 0};
}
Layout one_row(int64_t d) { return {"one row", 1, 1, 1, d, {0, 0, 0, 1}, 0}; }

std::vector<Layout> layouts() {
  return {heads_outside(2, 3, 5, 32),
          heads_inside(2, 3, 5, 32),
          columns_outside(1, 2, 4, 16),
          unaligned(1, 2, 3, 32),
          shared_sample(3, 2, 2, 16),
          heads_outside(1, 1, 300, 2),
          heads_inside(2, 1, 3, 7),
          heads_outside(3, 2, 1, 1),
          padded_rows(1, 2, 3, 32),
          every_other_column(1, 2, 3, 32),
          one_row(7),
          heads_outside(2, 2, 3, 12)};
}

template <typename T>
struct Rows {
  explicit Rows(const Layout& layout)
      : layout(layout),
        host(random_numbers<T>(layout.start + 1 + (layout.batch - 1) * layout.stride[0] +
                               (layout.heads - 1) * layout.stride[1] +
                               (layout.length - 1) * layout.stride[2] +
                               (layout.dim - 1) * layout.stride[3])),
        x(host),
        out(static_cast<std::size_t>(layout.batch * layout.heads * layout.length * layout.dim)) {}

  RowProblem problem(const Positions& positions) const {
    RowProblem p;
    p.dtype = Traits<T>::dtype;
    p.batch = layout.batch;
    p.heads = layout.heads;
    p.length = layout.length;
    p.dim = layout.dim;
    p.x.data = x.data() + layout.start;
    std::copy(layout.stride, layout.stride + 4, p.x.stride);
    const Layout contiguous = heads_outside(p.batch, p.heads, p.length, p.dim);
    p.out.data = out.data();
    const int64_t size[] = {p.batch, p.heads, p.length, 0};
    for (int d = 0; d < 4; ++d) p.out.stride[d] = size[d] == 1 ? 0 : contiguous.stride[d];
    p.positions = positions;
    return p;
  }
  double at(int64_t b, int64_t h, int64_t l, int64_t d) const {
    const int64_t offset = layout.start + b * layout.stride[0] + h * layout.stride[1] +
                           l * layout.stride[2] + d * layout.stride[3];
    return value(host[static_cast<std::size_t>(offset)]);
  }

  // expected(b, h, l, d) everywhere in out.
  template <typename Expected>
  void check(double epsilon, Expected&& expected) const {
    const std::vector<T> got = out.copy();
    std::size_t index = 0;
    for (int64_t b = 0; b < layout.batch; ++b) {
      for (int64_t h = 0; h < layout.heads; ++h) {
        for (int64_t l = 0; l < layout.length; ++l) {
          for (int64_t d = 0; d < layout.dim; ++d, ++index) {
            if (!close(value(got[index]), expected(b, h, l, d), epsilon)) {
              testing::report_failure(__FILE__, __LINE__, layout.name, value(got[index]),
                                      expected(b, h, l, d));
            }
          }
        }
      }
    }
  }

  Layout layout;
  std::vector<T> host;
  DeviceArray<T> x;
  DeviceArray<T> out;
};

// None, shared by the samples, one per sample. The ids must outlive the positions.
enum class Ids { kNone, kShared, kEach };
struct TestPositions {
  TestPositions(Ids kind, const Layout& layout, int64_t rows, int64_t offset)
      : host(kind == Ids::kNone
                 ? std::vector<int64_t>()
                 : random_ids(layout.length * (kind == Ids::kEach ? layout.batch : 1), rows)),
        device(host) {
    if (kind != Ids::kNone) {
      on_host.ids = host.data();
      on_host.stride[0] = kind == Ids::kEach ? layout.length : 0;
      on_host.stride[1] = 1;
    }
    on_host.offset = offset;
    on_device = on_host;
    if (kind != Ids::kNone) on_device.ids = device.data();
  }
  std::vector<int64_t> host;
  DeviceArray<int64_t> device;
  Positions on_host;
  Positions on_device;
};

double encoding(int64_t position, int64_t column, int64_t dim, double base) {
  const double angle =
      static_cast<double>(position) /
      std::pow(base, static_cast<double>(column / 2 * 2) / static_cast<double>(dim));
  return column % 2 == 0 ? std::sin(angle) : std::cos(angle);
}

template <typename T>
void test_sinusoid_table() {
  for (const auto& [length, dim, offset] :
       {std::array<int64_t, 3>{7, 10, 3}, {300, 5, 99'900}, {2, 600, 999'999}, {3, 1, -4}}) {
    const DeviceArray<T> out(static_cast<std::size_t>(length * dim));
    SinusoidTable p;
    p.dtype = Traits<T>::dtype;
    p.length = length;
    p.offset = offset;
    p.frequencies = {dim, 10000.0, 1.0};
    p.sine = out.data();
    p.cosine = out.data() + 1;
    p.sines = (dim + 1) / 2;
    p.cosines = dim / 2;
    p.row_stride = dim;
    p.pair_stride = 2;
    CHECK(sinusoid_table(p, nullptr) == cudaSuccess);
    const std::vector<T> got = out.copy();
    const double angle_error = sizeof(T) == 8 ? 1e6 * 0x1p-50 : 0;
    for (int64_t l = 0; l < length; ++l) {
      for (int64_t d = 0; d < dim; ++d) {
        const double expected = encoding(offset + l, d, dim, 10000.0);
        const double x = value(got[static_cast<std::size_t>(l * dim + d)]);
        if (!(std::abs(x - expected) <= Traits<T>::epsilon + angle_error)) {
          testing::report_failure(__FILE__, __LINE__, "sinusoid table", x, expected);
        }
      }
    }
  }
}

template <typename T>
void test_rotary_tables() {
  constexpr int64_t kLength = 40;
  constexpr int64_t kPairs = 9;
  const DeviceArray<T> cosine(kLength * kPairs);
  const DeviceArray<T> sine(kLength * kPairs);
  SinusoidTable p;
  p.dtype = Traits<T>::dtype;
  p.length = kLength;
  p.offset = 1000;
  p.frequencies = {2 * kPairs, 500.0, 4.0};
  p.sine = sine.data();
  p.cosine = cosine.data();
  p.sines = p.cosines = p.row_stride = kPairs;
  p.pair_stride = 1;
  CHECK(sinusoid_table(p, nullptr) == cudaSuccess);
  const std::vector<T> got_cosine = cosine.copy();
  const std::vector<T> got_sine = sine.copy();
  for (std::size_t at = 0; at < got_sine.size(); ++at) {
    const double position = static_cast<double>(1000 + at / kPairs);
    const double angle =
        position / 4.0 / std::pow(500.0, static_cast<double>(at % kPairs) / kPairs);
    CHECK(close(value(got_sine[at]), std::sin(angle), Traits<T>::epsilon + 1e-12));
    CHECK(close(value(got_cosine[at]), std::cos(angle), Traits<T>::epsilon + 1e-12));
  }
}

template <typename T>
void test_add_sinusoid() {
  for (const Layout& layout : layouts()) {
    for (const Ids ids : {Ids::kNone, Ids::kShared, Ids::kEach}) {
      const Rows<T> rows(layout);
      const TestPositions positions(ids, layout, 1000, 17);
      CHECK(add_sinusoid({rows.problem(positions.on_device), 0.5, 100.0}, nullptr) == cudaSuccess);
      // The angle itself is rounded in float64.
      rows.check(Traits<T>::epsilon + 1e-12, [&](int64_t b, int64_t h, int64_t l, int64_t d) {
        const int64_t position = positions.on_host.at(b, l);
        return rows.at(b, h, l, d) + 0.5 * encoding(position, d, layout.dim, 100.0);
      });
    }
  }
}

template <typename T, typename Table>
void test_add_learned() {
  constexpr int64_t kTableRows = 310;
  for (const Layout& layout : layouts()) {
    for (const Ids ids : {Ids::kNone, Ids::kShared, Ids::kEach}) {
      for (const bool transposed : {false, true}) {
        const Rows<T> rows(layout);
        const TestPositions positions(ids, layout, 300, 10);
        const auto table = random_numbers<Table>(kTableRows * layout.dim);
        const DeviceArray<Table> device_table(table);
        AddLearned a;
        a.rows = rows.problem(positions.on_device);
        a.table_dtype = Traits<Table>::dtype;
        a.table = device_table.data();
        a.table_rows = kTableRows;
        a.table_stride[0] = transposed ? 1 : layout.dim;
        a.table_stride[1] = transposed ? kTableRows : 1;
        CHECK(add_learned(a, nullptr) == cudaSuccess);
        rows.check(Traits<T>::epsilon, [&](int64_t b, int64_t h, int64_t l, int64_t d) {
          const int64_t at = positions.on_host.at(b, l) * a.table_stride[0] + d * a.table_stride[1];
          return rows.at(b, h, l, d) + value(table[static_cast<std::size_t>(at)]);
        });
      }
    }
  }
}

template <typename T, typename Table>
void test_learned_table_grad() {
  constexpr int64_t kTableRows = 11;
  std::vector<Layout> tried = layouts();
  tried.erase(tried.begin() + 5);  // its sums have no bound here
  tried.push_back(heads_outside(2, 9, 8, 40));
  for (const Layout& layout : tried) {
    for (const Ids ids : {Ids::kNone, Ids::kShared, Ids::kEach}) {
      const Rows<T> grad(layout);
      const TestPositions positions(ids, layout, 9, 2);
      LearnedTableGrad p;
      p.dtype = Traits<T>::dtype;
      p.table_dtype = Traits<Table>::dtype;
      p.batch = layout.batch;
      p.heads = layout.heads;
      p.length = layout.length;
      p.dim = layout.dim;
      p.table_rows = kTableRows;
      p.offset = 2;
      p.grad = grad.problem({}).x;
      std::vector<int64_t> order(positions.host.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return positions.host[static_cast<std::size_t>(a)] <
               positions.host[static_cast<std::size_t>(b)];
      });
      std::vector<int64_t> sorted;
      for (const int64_t at : order) sorted.push_back(positions.host[static_cast<std::size_t>(at)]);
      const DeviceArray<int64_t> device_order(order);
      const DeviceArray<int64_t> device_sorted(sorted);
      if (ids != Ids::kNone) {
        p.sorted_ids = device_sorted.data();
        p.order = device_order.data();
        p.entries = static_cast<int64_t>(order.size());
        p.per_sample = ids == Ids::kEach;
      }
      const auto size = static_cast<std::size_t>(kTableRows * layout.dim);
      std::vector<double> expected(size);
      double terms = 0;
      for (int64_t b = 0; b < layout.batch; ++b) {
        for (int64_t h = 0; h < layout.heads; ++h) {
          for (int64_t l = 0; l < layout.length; ++l, ++terms) {
            for (int64_t d = 0; d < layout.dim; ++d) {
              expected[static_cast<std::size_t>(positions.on_host.at(b, l) * layout.dim + d)] +=
                  grad.at(b, h, l, d);
            }
          }
        }
      }
      std::vector<Table> first;
      for (int run = 0; run < 2; ++run) {  // twice the same bits
        const DeviceArray<Table> grad_table(size);
        p.grad_table = grad_table.data();
        CHECK(learned_table_grad(p, nullptr) == cudaSuccess);
        const std::vector<Table> got = grad_table.copy();
        if (run == 0) first = got;
        for (std::size_t at = 0; at < size; ++at) {
          CHECK(value(got[at]) == value(first[at]));
          // Sums are float32 (float64): half-precision tables are rounded once.
          const double epsilon = Traits<Table>::epsilon + terms * (sizeof(T) == 8 ? 1e-15 : 1e-7);
          if (!close(value(got[at]), expected[at], epsilon)) {
            testing::report_failure(__FILE__, __LINE__, layout.name, value(got[at]), expected[at]);
          }
        }
      }
    }
  }
}

template <typename T>
void test_rotary() {
  using Table = table_t<T>;
  constexpr int64_t kTableRows = 310;
  for (const Layout& layout : layouts()) {
    for (const int64_t pairs : {layout.dim / 2, layout.dim / 4, layout.dim / 4 + 1, int64_t{0}}) {
      if (2 * pairs > layout.dim) continue;
      for (const Ids ids : {Ids::kNone, Ids::kShared, Ids::kEach}) {
        for (int kind = 0; kind < 4; ++kind) {
          // Tables lie in one array with the sine beside the cosine, or behind it, and for some
          // cases one per sample.
          const bool interleaved = kind % 2 == 1;
          const bool strided = kind / 2 == 1;
          const bool each = ids == Ids::kNone && strided;
          const Rows<T> rows(layout);
          const TestPositions positions(ids, layout, kTableRows, 0);
          const int64_t tables = each ? layout.batch : 1;
          const auto table = random_numbers<Table>(2 * tables * kTableRows * pairs + 1);
          const DeviceArray<Table> device_table(table);
          Rotary r;
          r.rows = rows.problem(positions.on_device);
          r.pairs = pairs;
          r.interleaved = interleaved;
          r.conjugate = kind == 1 || kind == 2;
          const int64_t sine_start = strided ? 1 : tables * kTableRows * pairs;
          const int64_t pair_stride = strided ? 2 : 1;
          r.cosine = device_table.data();
          r.sine = device_table.data() + sine_start;
          for (int64_t (*stride)[3] : {&r.cosine_stride, &r.sine_stride}) {
            (*stride)[0] = each ? kTableRows * pairs * pair_stride : 0;
            (*stride)[1] = pairs * pair_stride;
            (*stride)[2] = pair_stride;
          }
          r.table_rows = kTableRows;
          CHECK(rotary(r, nullptr) == cudaSuccess);
          // Two products of up to 4 may cancel.
          rows.check(4 * Traits<T>::epsilon, [&](int64_t b, int64_t h, int64_t l, int64_t d) {
            if (d >= 2 * pairs) return rows.at(b, h, l, d);
            const int64_t pair = interleaved ? d / 2 : d % pairs;
            const bool second = interleaved ? d % 2 == 1 : d >= pairs;
            const int64_t distance = interleaved ? 1 : pairs;
            const double other = rows.at(b, h, l, second ? d - distance : d + distance);
            const int64_t at = b * r.cosine_stride[0] +
                               positions.on_host.at(b, l) * r.cosine_stride[1] + pair * pair_stride;
            const double cosine = value(table[static_cast<std::size_t>(at)]);
            const double sine = value(table[static_cast<std::size_t>(at + sine_start)]) *
                                (r.conjugate ? -1.0 : 1.0);
            return rows.at(b, h, l, d) * cosine + (second ? other : -other) * sine;
          });
        }
      }
    }
  }
}

// So many rows that a block goes on to a second sample.
void test_several_samples_in_a_block() {
  const Layout layout = heads_outside(2, 1, 16384, 64);
  for (const Ids ids : {Ids::kShared, Ids::kEach}) {
    const Rows<float> rows(layout);
    const TestPositions positions(ids, layout, 1000, 0);
    CHECK(add_sinusoid({rows.problem(positions.on_device), 1.0, 100.0}, nullptr) == cudaSuccess);
    rows.check(1e-6, [&](int64_t b, int64_t h, int64_t l, int64_t d) {
      return rows.at(b, h, l, d) + encoding(positions.on_host.at(b, l), d, layout.dim, 100.0);
    });
    // Half a turn in the first sample, none in the second (with ids: of even and odd positions).
    Rotary r;
    r.rows = rows.problem(ids == Ids::kEach ? positions.on_device : Positions{});
    r.pairs = 32;
    std::vector<float> cosine(2 * 16384 * 32, 1.0f);
    const auto turned = [&](int64_t b, int64_t position) {
      return ids == Ids::kEach ? position % 2 == 0 : b == 0;
    };
    for (std::size_t at = 0; at < cosine.size(); ++at) {
      const auto row = static_cast<int64_t>(at) / 32;
      if (turned(row / 16384, row % 16384)) cosine[at] = -1.0f;
    }
    const DeviceArray<float> device_cosine(cosine);
    const DeviceArray<float> sine(std::vector<float>(cosine.size(), 0.0f));
    r.cosine = device_cosine.data();
    r.sine = sine.data();
    for (int64_t (*stride)[3] : {&r.cosine_stride, &r.sine_stride}) {
      (*stride)[0] = ids == Ids::kEach ? 0 : 16384 * 32;
      (*stride)[1] = 32;
      (*stride)[2] = 1;
    }
    r.table_rows = 16384;
    CHECK(rotary(r, nullptr) == cudaSuccess);
    rows.check(0, [&](int64_t b, int64_t h, int64_t l, int64_t d) {
      const int64_t position = ids == Ids::kEach ? positions.on_host.at(b, l) : l;
      return rows.at(b, h, l, d) * (turned(b, position) ? -1 : 1);
    });
  }
}

#if defined(CUDA_ON_CPU)  // on a GPU an assertion ends the process's use of it
template <typename Call>
bool asserts(Call&& call) {
  try {
    call();
  } catch (const cuda_on_cpu::Error& error) {
    return std::string(error.what()).find("must lie in the table") != std::string::npos;
  }
  return false;
}

void test_positions_outside_the_table() {
  const Layout layout = heads_outside(1, 1, 4, 8);
  for (const int64_t bad : {int64_t{-1}, int64_t{5}}) {
    const Rows<float> rows(layout);
    std::vector<int64_t> ids = {0, 1, 4, 2};
    const auto positions = [&](const DeviceArray<int64_t>& device) {
      Positions p;
      p.ids = device.data();
      p.stride[1] = 1;
      return p;
    };
    const DeviceArray<float> table(random_numbers<float>(5 * 8));
    for (const bool is_bad : {false, true}) {
      if (is_bad) ids[2] = bad;
      const DeviceArray<int64_t> device_ids(ids);
      AddLearned a;
      a.rows = rows.problem(positions(device_ids));
      a.table = table.data();
      a.table_rows = 5;
      a.table_stride[0] = 8;
      a.table_stride[1] = 1;
      CHECK(asserts([&] { add_learned(a, nullptr); }) == is_bad);
      Rotary r;
      r.rows = a.rows;
      r.pairs = 4;
      r.cosine = r.sine = table.data();
      r.cosine_stride[1] = r.sine_stride[1] = 8;
      r.cosine_stride[2] = r.sine_stride[2] = 1;
      r.table_rows = 5;
      CHECK(asserts([&] { rotary(r, nullptr); }) == is_bad);
    }
  }
}
#endif

const testing::Test tests[] = {
    {"sinusoid table, float64", test_sinusoid_table<double>},
    {"sinusoid table, float32", test_sinusoid_table<float>},
    {"sinusoid table, float16", test_sinusoid_table<__half>},
    {"sinusoid table, bfloat16", test_sinusoid_table<__nv_bfloat16>},
    {"rotary tables, float64", test_rotary_tables<double>},
    {"rotary tables, float32", test_rotary_tables<float>},
    {"add sinusoid, float64", test_add_sinusoid<double>},
    {"add sinusoid, float32", test_add_sinusoid<float>},
    {"add sinusoid, float16", test_add_sinusoid<__half>},
    {"add sinusoid, bfloat16", test_add_sinusoid<__nv_bfloat16>},
    {"add learned, float64", test_add_learned<double, double>},
    {"add learned, float32", test_add_learned<float, float>},
    {"add learned, float16", test_add_learned<__half, __half>},
    {"add learned, bfloat16", test_add_learned<__nv_bfloat16, __nv_bfloat16>},
    {"add learned, float16 with a float32 table", test_add_learned<__half, float>},
    {"table gradient, float64", test_learned_table_grad<double, double>},
    {"table gradient, float32", test_learned_table_grad<float, float>},
    {"table gradient, float16", test_learned_table_grad<__half, __half>},
    {"table gradient, bfloat16 into float32", test_learned_table_grad<__nv_bfloat16, float>},
    {"rotary, float64", test_rotary<double>},
    {"rotary, float32", test_rotary<float>},
    {"rotary, float16", test_rotary<__half>},
    {"rotary, bfloat16", test_rotary<__nv_bfloat16>},
    {"several samples in a block", test_several_samples_in_a_block},
#if defined(CUDA_ON_CPU)
    {"positions outside the table", test_positions_outside_the_table},
#endif
};

}  // namespace
}  // namespace torch_selfattn::kernels::cuda
