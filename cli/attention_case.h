// One forward problem in host memory with random numbers, and running it on an engine. Throws what
// the engine throws. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cli/arguments.h"
#include "runtime/attention/workload.h"
#include "runtime/cuda/device_memory.h"
#include "treeattn/treeattn.h"

namespace treeattn::cli {

/// Element `index` of an array of this dtype.
double element(DType dtype, const std::vector<std::byte>& array, std::size_t index);
/// `count` standard normal numbers, the same on every machine.
std::vector<std::byte> normal_array(DType dtype, std::size_t count, std::uint64_t seed);

/// Sizes of the numbers that a case is filled with.
struct CaseShape {
  DType dtype = DType::kBF16;
  int heads = 1;
  int heads_kv = 1;
  HeadDims dims;
  double softcap = 0;
};

/// Tensors are contiguous [tokens, heads, dim].
struct AttentionCase {
  std::string name;
  CaseShape shape;
  double softmax_scale = 1;
  std::vector<std::int32_t> cu_q, cu_k, start, end;
  std::vector<std::byte> q, k, v;
  std::vector<std::byte> dout;  ///< [total_q, heads, head_dim_v]

  int batch() const { return static_cast<int>(cu_q.size()) - 1; }
  std::int64_t total_q() const { return static_cast<std::int64_t>(start.size()); }
  std::int64_t total_k() const { return static_cast<std::int64_t>(end.size()); }
  Shape engine_shape(bool backward = false) const;
};

/// The trees of a workload, every token a query and a key.
AttentionCase make_case(const Workload& work, const CaseShape& shape, std::uint64_t seed);
/// Fills q, k and v for the case's sizes.
void fill_case(AttentionCase& problem, std::uint64_t seed);

/// What a case is run for.
struct RunOptions {
  std::string spec = {};  ///< kernel to use in place of the default; empty: the default
  bool backward = false;  ///< gradients too
  bool deterministic = false;
  int heads_per_pack = 0;  ///< with a forward spec: query heads that share a tile's rows; 0: one
};

/// A case on an engine: tensors where the engine wants them, a plan, one pass at a time.
class CaseRun {
 public:
  CaseRun(Engine& engine, const AttentionCase& problem, const RunOptions& options = {});
  CaseRun(const CaseRun&) = delete;
  CaseRun& operator=(const CaseRun&) = delete;

  void build_plan(Stream stream = nullptr);
  /// Throws Error(kInvalidTree) if the plan that was built is not valid.
  void require_valid_plan(Stream stream = nullptr);
  /// Overwrites q, for probes.
  void set_q(const std::vector<std::byte>& q);
  /// Fills out and lse with NaN.
  void poison();
  void forward(Stream stream = nullptr);
  /// Of a run with `backward`, after forward(): gradients for a dout of normal numbers.
  void backward(Stream stream = nullptr);

  std::vector<std::byte> out(Stream stream = nullptr) const;
  std::vector<float> lse(Stream stream = nullptr) const;
  std::vector<std::byte> dq(Stream stream = nullptr) const;
  std::vector<std::byte> dk(Stream stream = nullptr) const;
  std::vector<std::byte> dv(Stream stream = nullptr) const;

 private:
  /// Memory on the host or on the device, as the engine asks.
  class Memory {
   public:
    Memory() = default;
    Memory(bool device, std::size_t bytes);
    Memory(bool device, const void* data, std::size_t bytes);
    void* data();
    void fill_ones();
    void write(const void* data, std::size_t bytes);
    std::vector<std::byte> read(CUstream stream) const;

   private:
    bool on_device_ = false;
    std::vector<std::byte> host_;
    DeviceBuffer device_;
  };

  void set_up_backward(const AttentionCase& problem, const RunOptions& options);

  Engine& engine_;
  std::string spec_;
  Plan plan_;
  PlanInputs inputs_;
  ForwardArgs args_;
  BackwardArgs backward_args_;
  Memory dout_, dq_, dk_, dv_, backward_workspace_;
  Memory cu_q_, cu_k_, start_, end_, q_, k_, v_, out_, lse_, plan_buffer_, workspace_;
};

}  // namespace treeattn::cli
