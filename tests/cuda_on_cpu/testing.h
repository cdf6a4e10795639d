#pragma once

// A test file defines functions and registers them:
//   const testing::Test tests[] = {{"what it shows", function}, …};
// It includes no Catch2, so that it compiles in a second and by nvcc too.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace testing {

struct Test {
  Test(const char* name, void (*function)());
};

std::uint32_t random();  // the same sequence in every test, whatever runs before it

// Counts a failure of the running test, and prints the first few.
void report_failure(const char* file, int line, const char* text);
void report_failure(const char* file, int line, const char* text, double got, double expected);

#define CHECK(condition)                                                         \
  do {                                                                           \
    if (!(condition)) ::testing::report_failure(__FILE__, __LINE__, #condition); \
  } while (false)

// Device memory, freed with the object. Reads past its end are found by AddressSanitizer.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : count_(count) {
    CHECK(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)) == cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) {
    CHECK(cudaMemcpy(data_, from.data(), count_ * sizeof(T), cudaMemcpyHostToDevice) ==
          cudaSuccess);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  std::vector<T> copy() const {
    std::vector<T> to(count_);
    CHECK(cudaMemcpy(to.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return to;
  }

 private:
  T* data_ = nullptr;
  std::size_t count_;
};

}  // namespace testing
