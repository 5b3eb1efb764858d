// What the CPU executor's passes share: element types, strided loads, and a pool of workers that
// take tasks in order.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "runtime/attention/half.h"
#include "runtime/attention/plan.h"
#include "treeattn/treeattn.h"

namespace treeattn::cpu {

struct F16 {
  using Stored = std::uint16_t;
  using Acc = float;
  static float load(Stored bits) { return f16_to_float(bits); }
  static Stored store(double value) { return float_to_f16(static_cast<float>(value)); }
};
struct BF16 {
  using Stored = std::uint16_t;
  using Acc = float;
  static float load(Stored bits) { return bf16_to_float(bits); }
  static Stored store(double value) { return float_to_bf16(static_cast<float>(value)); }
};
struct F32 {
  using Stored = float;
  using Acc = float;
  static float load(Stored value) { return value; }
  static Stored store(double value) { return static_cast<float>(value); }
};
struct F64 {
  using Stored = double;
  using Acc = double;
  static double load(Stored value) { return value; }
  static Stored store(double value) { return value; }
};

/// Rows of one head as a contiguous [count, dim].
template <class Type>
void load_rows(const ConstTensor& from, std::int64_t token, int count, int head, int dim,
               typename Type::Acc* to) {
  const auto* data = static_cast<const typename Type::Stored*>(from.data);
  for (int r = 0; r < count; ++r) {
    const auto* row = data + (token + r) * from.token_stride + head * from.head_stride;
    for (int d = 0; d < dim; ++d) *to++ = Type::load(row[d]);
  }
}

/// Runs tasks 0..tasks-1 on workers made by `make`, each used by one thread. threads = 0: one per
/// core.
template <class Worker, class Make>
void run_tasks(std::int64_t tasks, int threads, Make&& make) {
  if (tasks == 0) return;
  const std::int64_t wanted =
      threads > 0 ? threads : std::max(1U, std::thread::hardware_concurrency());
  // Scratch is made before any thread starts, so that running out of memory is an ordinary
  // exception.
  std::vector<Worker> workers;
  for (std::int64_t i = 0; i < std::min(wanted, tasks); ++i) workers.push_back(make());
  std::atomic<std::int64_t> next{0};
  const auto work = [&](Worker& worker) {
    for (std::int64_t task = next++; task < tasks; task = next++) worker.run(task);
  };
  std::vector<std::jthread> pool;
  pool.reserve(workers.size());
  try {
    for (std::size_t i = 1; i < workers.size(); ++i) {
      pool.emplace_back([&, i] { work(workers[i]); });
    }
  } catch (const std::system_error&) {
    // Fewer threads than asked for: those that run do all of it.
  }
  work(workers[0]);
}

/// Throws unless the buffer holds a plan that the executor can walk.
inline void check_built(const PlanReader& plan) {
  if (!plan.built()) {
    throw Error(ErrorCode::kInvalidArgument, "plan_buffer holds no plan",
                "call build_plan on this buffer first");
  }
  if (plan.shape().num_views == 0) {
    throw Error(ErrorCode::kInvalidArgument, "the plan holds no tile lists",
                "make its header with plan_for() and at least one shape");
  }
}

/// Calls body with a value of the element type that stands for `dtype`.
template <class Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kF16:
      return body(F16{});
    case DType::kBF16:
      return body(BF16{});
    case DType::kF32:
      return body(F32{});
    case DType::kF64:
      return body(F64{});
  }
  throw Error(
      ErrorCode::kInvalidArgument,
      fmt::format("dtype is {}, expected kF16, kBF16, kF32 or kF64", static_cast<int>(dtype)));
}

}  // namespace treeattn::cpu
