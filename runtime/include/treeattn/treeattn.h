/// treeattn: exact tree attention with run-time compiled CUDA kernels. The C++ API.
///
/// Packed (varlen) layout as in FlashAttention: q [total_q, heads, head_dim], k [total_k, heads_kv,
/// head_dim], v [total_k, heads_kv, head_dim_v], out [total_q, heads, head_dim_v], lse [heads,
/// total_q]. Every function throws treeattn::Error with what was wrong, what was expected and what
/// to do next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "treeattn/error.h"
#include "treeattn/plan.h"
#include "treeattn/tree.h"

namespace treeattn {

enum class DType : std::int32_t { kF16 = 0, kBF16 = 1, kF32 = 2, kF64 = 3 };

/// A CUstream. Null is the legacy default stream.
using Stream = void*;

/// A [tokens, heads, dim] tensor: the last dimension is contiguous, the other strides are in
/// elements. On the GPU data and strides are multiples of 16 bytes. Strides of dimensions of size 1
/// are ignored.
struct ConstTensor {
  const void* data = nullptr;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
};
struct Tensor {
  void* data = nullptr;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
};

/// What a plan is built from. Pointers live where the engine does (device memory for a CUDA
/// engine).
struct PlanInputs {
  Lowering lowering = Lowering::kTree;
  const std::int32_t* cu_seqlens_q = nullptr;            ///< [batch + 1]
  const std::int32_t* cu_seqlens_k = nullptr;            ///< [batch + 1]
  const std::int32_t* tree_dfs_order_start_q = nullptr;  ///< kTree: [total_q]
  const std::int32_t* tree_dfs_order_end_k = nullptr;    ///< kTree: [total_k]
  const std::int32_t* first =
      nullptr;  ///< kIntervals: [total_k], packed row that first sees the key
  const std::int32_t* len =
      nullptr;  ///< kIntervals: [total_k], rows that see it; 0: none (padding)
};

/// Sizes and kinds of a problem, for planning and preparing.
struct Shape {
  DType dtype = DType::kBF16;
  int heads = 0;
  int heads_kv = 0;
  int head_dim = 0;
  int head_dim_v = 0;  ///< 0: as head_dim
  bool softcap = false;
  bool backward = false;  ///< the plan and prepare() also serve backward
};

struct ForwardArgs {
  DType dtype = DType::kBF16;
  int heads = 0;
  int heads_kv = 0;
  int head_dim = 0;
  int head_dim_v = 0;  ///< 0: as head_dim
  ConstTensor q, k, v;
  Tensor out;
  float* lse = nullptr;        ///< [heads, total_q], natural logarithm; null: not wanted
  double softmax_scale = 0;    ///< must be set and positive; 1 / sqrt(head_dim) is usual
  double softcap = 0;          ///< > 0: scores become softcap * tanh(score / softcap)
  const Plan* plan = nullptr;  ///< header of the plan
  const std::int32_t* plan_buffer = nullptr;  ///< built by build_plan
  void* workspace = nullptr;        ///< 16-byte aligned; not shared by calls that may overlap
  std::size_t workspace_bytes = 0;  ///< at least forward_workspace_bytes()
  /// Kernel to use in place of the default, as canonical text; empty: the default.
  std::string_view spec = {};
};

/// Tensors are as in ForwardArgs; gradients have the shapes of what they belong to. dq, dk and dv
/// are overwritten, never added to.
struct BackwardArgs {
  DType dtype = DType::kBF16;
  int heads = 0;
  int heads_kv = 0;
  int head_dim = 0;
  int head_dim_v = 0;  ///< 0: as head_dim
  ConstTensor q, k, v, out, dout;
  const float* lse = nullptr;   ///< [heads, total_q], as forward wrote it
  const float* dlse = nullptr;  ///< [heads, total_q], gradient of lse; null: zero
  Tensor dq, dk, dv;
  double softmax_scale = 0;  ///< as in forward
  double softcap = 0;        ///< as in forward
  /// Gradients that are bit-identical from run to run and independent of what else is packed.
  /// Without, the order in which summands are added is left to chance.
  bool deterministic = false;
  const Plan* plan = nullptr;
  const std::int32_t* plan_buffer = nullptr;
  void* workspace = nullptr;        ///< 16-byte aligned
  std::size_t workspace_bytes = 0;  ///< at least backward_workspace_bytes()
  /// Kernel to use in place of the default, as canonical text; empty: the default.
  std::string_view spec = {};
};

/// What validate found.
struct PlanReport {
  bool valid = true;
  int bad_sequences = 0;
  std::int64_t first_bad_token = -1;  ///< packed index; -1: none
  std::string message;                ///< names the token, its sequence and the rule it breaks
};

/// Counters since the engine was created.
struct Stats {
  std::uint64_t launches = 0;
  std::uint64_t memory_hits = 0;  ///< kernels found loaded
  std::uint64_t disk_hits = 0;    ///< kernels loaded from the cache folders
  std::uint64_t compiles = 0;     ///< kernels compiled here
  std::uint64_t rejected = 0;     ///< cache entries refused as damaged or foreign
  double compile_ms = 0;
  double load_ms = 0;
};

/// One kernel that prepare() made ready.
struct PreparedKernel {
  std::string spec;
  std::string origin;  ///< "memory", "disk" or "compiled"
  double ms = 0;
};

enum class EngineKind { kCuda, kCpu };

struct EngineOptions {
  EngineKind kind = EngineKind::kCuda;
  int threads = 0;  ///< CPU executor: worker threads; 0: one per core
};

/// The entry point. A CUDA engine belongs to the context that was current when it was created (a
/// framework's primary context, say); calls from threads without a current context use that
/// context. Thread-safe. Nothing in build_plan(), forward() and backward() allocates device memory
/// or synchronises.
class Engine {
 public:
  explicit Engine(const EngineOptions& options = {});
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  EngineKind kind() const;
  /// Device name, compute capability and kernel target, or the CPU executor's threads.
  std::string description() const;

  /// The header of a plan for these totals with the tile lists that `shapes` need.
  Plan plan_for(std::int64_t total_q, std::int64_t total_k, int batch,
                std::span<const Shape> shapes) const;
  /// Builds the plan into `buffer` (plan_bytes(plan) bytes). Asynchronous on the stream.
  void build_plan(const Plan& plan, const PlanInputs& inputs, std::int32_t* buffer,
                  Stream stream = nullptr);
  /// build_plan() from one interval per key instead of a tree: packed row i sees key j iff
  /// first[j] <= i < first[j] + len[j]. Both arrays are [total_k]; an interval must stay within the
  /// rows of its key's sequence, and one of length 0 is padding. Pointers, errors as build_plan().
  void plan_from_intervals(const Plan& plan, const std::int32_t* cu_seqlens_q,
                           const std::int32_t* cu_seqlens_k, const std::int32_t* first,
                           const std::int32_t* len, std::int32_t* buffer, Stream stream = nullptr) {
    PlanInputs inputs;
    inputs.lowering = Lowering::kIntervals;
    inputs.cu_seqlens_q = cu_seqlens_q;
    inputs.cu_seqlens_k = cu_seqlens_k;
    inputs.first = first;
    inputs.len = len;
    build_plan(plan, inputs, buffer, stream);
  }
  /// Synchronises the stream and says whether the inputs were a valid tree.
  PlanReport validate(const Plan& plan, const std::int32_t* buffer, Stream stream = nullptr) const;

  /// At most 16, on compute capability 9.0. Contents do not matter.
  std::size_t forward_workspace_bytes(const Plan& plan, const Shape& shape) const;
  void forward(const ForwardArgs& args, Stream stream = nullptr);

  /// About 4 bytes x total_q x heads x (head_dim + 2) on a GPU. Besides, 4 bytes x (head_dim +
  /// head_dim_v) for each key of at most two key tiles a multiprocessor, and where heads > heads_kv
  /// and a sequence may have 2,048 queries, of all kv heads and all keys. Next to nothing where
  /// `deterministic`. Contents do not matter. `spec`: the kernel that BackwardArgs::spec will name.
  std::size_t backward_workspace_bytes(const Plan& plan, const Shape& shape,
                                       bool deterministic = false,
                                       std::string_view spec = {}) const;
  /// Needs a plan that was made for shapes with `backward`.
  void backward(const BackwardArgs& args, Stream stream = nullptr);

  /// Loads (compiling if need be) the kernels for these shapes and the plan, ahead of capture or
  /// timing.
  std::vector<PreparedKernel> prepare(std::span<const Shape> shapes);
  Stats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace treeattn
