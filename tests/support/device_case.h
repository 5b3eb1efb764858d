// Random problems on a GPU: uploads with guard bytes around every tensor, runs, downloads. One
// engine in device 0's primary context serves all tests of the process.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "runtime/attention/forward.h"
#include "runtime/cuda/device.h"
#include "runtime/cuda/device_memory.h"
#include "tests/support/oracle_backward.h"
#include "tests/support/random_case.h"
#include "treeattn/treeattn.h"

namespace treeattn::testing {

/// Why there is no GPU to test on; empty if there is one.
const std::string& no_gpu();
/// The engine of all tests; its context is current for the calling thread from then on.
Engine& gpu_engine();

/// Skips where there is no GPU, and makes the context current.
class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!no_gpu().empty()) GTEST_SKIP() << no_gpu();
    gpu_engine();
  }
};

/// A device copy of host bytes between guards that must stay as they are.
class GuardedBuffer {
 public:
  GuardedBuffer() = default;
  explicit GuardedBuffer(std::size_t bytes);
  GuardedBuffer(const void* data, std::size_t bytes);
  explicit GuardedBuffer(const HostTensor& tensor)
      : GuardedBuffer(tensor.data(), tensor.size_bytes()) {}
  template <class T>
  explicit GuardedBuffer(const std::vector<T>& values)
      : GuardedBuffer(values.data(), values.size() * sizeof(T)) {}

  /// Null when there is nothing, as an empty tensor's pointer may be.
  template <class T = void>
  T* as() const {
    return bytes_ == 0 ? nullptr : reinterpret_cast<T*>(buffer_.address() + kGuardBytes);
  }
  std::size_t bytes() const { return bytes_; }
  void upload(const void* data, std::size_t bytes);
  void download(void* to, std::size_t bytes) const;
  /// Whether every guard byte is as it was.
  bool intact() const;

 private:
  static constexpr std::size_t kGuardBytes = 512;
  DeviceBuffer buffer_;
  std::size_t bytes_ = 0;
};

/// Enough for any forward call, with contents that mean nothing.
GuardedBuffer forward_workspace();

/// A forward problem on the device, its plan built by the engine.
class DeviceCase {
 public:
  /// `heads_per_pack_log2`: query heads that share a forward tile's rows, whatever plan_for() would
  /// make of it.
  DeviceCase(const RandomCase& problem, bool backward, Stream stream = nullptr,
             std::optional<int> heads_per_pack_log2 = std::nullopt);

  void build_plan(const RandomCase& problem, Stream stream = nullptr);
  /// Poisons out and lse with NaN, runs, and downloads into problem.out and lse.
  void forward(RandomCase& problem, std::vector<float>& lse, Stream stream = nullptr,
               std::string_view spec = {});
  ForwardArgs forward_args(const RandomCase& problem) const;

  const Plan& plan() const { return plan_; }
  std::int32_t* plan_buffer() const { return plan_buffer_.as<std::int32_t>(); }
  std::vector<int> download_plan() const;
  bool intact() const;

  GuardedBuffer q, k, v, out, lse, workspace;

 private:
  GuardedBuffer cu_q_, cu_k_, start_, end_, first_, len_, plan_buffer_;
  Plan plan_;
};

Shape shape_of_case(const RandomCase& problem, bool backward);
/// Log2 of the most query heads that can share a tile's rows.
int most_packed(const RandomCase& problem);

/// Runs backward on the device from the case's out and lse; gradients are poisoned before.
Gradients device_backward(BackwardCase& problem, bool deterministic, std::string_view spec = {});

/// Runs `body` for 0..count-1 on every core.
void parallel_for(int count, const std::function<void(int)>& body);

}  // namespace treeattn::testing
