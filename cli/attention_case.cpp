#include "cli/attention_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>
#include <span>
#include <utility>

#include "generator/kernel_spec.h"
#include "runtime/attention/arguments.h"
#include "runtime/attention/half.h"
#include "runtime/attention/splitmix.h"
#include "treeattn/error.h"

namespace treeattn::cli {
namespace {

constexpr std::size_t kNormals = 1 << 16;

/// Box and Muller's standard normal numbers.
std::vector<double> normal_numbers(std::size_t count) {
  SplitMix64 rng(0x7265657474616e6eULL);
  std::vector<double> numbers(count);
  for (std::size_t i = 0; i + 1 < count; i += 2) {
    const double radius = std::sqrt(-2 * std::log(1 - rng.uniform()));
    const double angle = 2 * std::numbers::pi * rng.uniform();
    numbers[i] = radius * std::cos(angle);
    numbers[i + 1] = radius * std::sin(angle);
  }
  return numbers;
}

template <class Element, class Convert>
std::vector<std::byte> draw(std::size_t count, std::uint64_t seed, const Convert& convert) {
  static const std::vector<double> numbers = normal_numbers(kNormals);
  std::vector<Element> table(kNormals);
  for (std::size_t i = 0; i < kNormals; ++i) table[i] = convert(numbers[i]);
  std::vector<std::byte> array(count * sizeof(Element));
  SplitMix64 rng(seed);
  // Sixteen bits choose a number: benchmarks draw hundreds of millions.
  constexpr int kPerDraw = 4;
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < count; ++i) {
    bits = i % kPerDraw == 0 ? rng.next() : bits >> 16;
    std::memcpy(&array[i * sizeof(Element)], &table[bits & (kNormals - 1)], sizeof(Element));
  }
  return array;
}

/// The plan's header, with tile lists for the kernel that will run.
Plan header_for(const Engine& engine, const AttentionCase& problem, const RunOptions& options) {
  const Shape shape = problem.engine_shape(options.backward);
  Plan plan = engine.plan_for(problem.total_q(), problem.total_k(), problem.batch(), {&shape, 1});
  if (options.spec.empty()) return plan;
  const TileConfig tile = parse_kernel_spec(options.spec).tile;
  // A plan for forward alone holds the one view that is used, so that making it costs no more.
  if (!options.backward) plan.num_views = 0;
  const int rows = tile.block_m / std::max(options.heads_per_pack, 1);
  plan.views[plan.num_views++] = {rows, tile.view_block_n()};
  return plan;
}

template <class Value>
std::size_t bytes_of(const std::vector<Value>& values) {
  return values.size() * sizeof(Value);
}

}  // namespace

double element(DType dtype, const std::vector<std::byte>& array, std::size_t index) {
  const auto load = [&]<class Element>(Element value) {
    std::memcpy(&value, &array[index * sizeof(Element)], sizeof(Element));
    return value;
  };
  switch (dtype) {
    case DType::kF16:
      return static_cast<double>(f16_to_float(load(std::uint16_t{})));
    case DType::kBF16:
      return static_cast<double>(bf16_to_float(load(std::uint16_t{})));
    case DType::kF32:
      return static_cast<double>(load(float{}));
    case DType::kF64:
      return load(double{});
  }
  throw Error(ErrorCode::kInternal, "unknown dtype");
}

std::vector<std::byte> normal_array(DType dtype, std::size_t count, std::uint64_t seed) {
  switch (dtype) {
    case DType::kF16:
      return draw<std::uint16_t>(count, seed,
                                 [](double x) { return float_to_f16(static_cast<float>(x)); });
    case DType::kBF16:
      return draw<std::uint16_t>(count, seed,
                                 [](double x) { return float_to_bf16(static_cast<float>(x)); });
    case DType::kF32:
      return draw<float>(count, seed, [](double x) { return static_cast<float>(x); });
    case DType::kF64:
      return draw<double>(count, seed, [](double x) { return x; });
  }
  throw Error(ErrorCode::kInternal, "unknown dtype");
}

Shape AttentionCase::engine_shape(bool backward) const {
  return {shape.dtype,           shape.heads,       shape.heads_kv, shape.dims.head_dim,
          shape.dims.head_dim_v, shape.softcap > 0, backward};
}

void fill_case(AttentionCase& problem, std::uint64_t seed) {
  const CaseShape& shape = problem.shape;
  const auto count = [](std::int64_t tokens, int heads, int dim) {
    return static_cast<std::size_t>(tokens) * static_cast<std::size_t>(heads) *
           static_cast<std::size_t>(dim);
  };
  SplitMix64 seeds(seed);
  problem.softmax_scale = 1 / std::sqrt(static_cast<double>(shape.dims.head_dim));
  problem.q = normal_array(shape.dtype, count(problem.total_q(), shape.heads, shape.dims.head_dim),
                           seeds.next());
  problem.k = normal_array(
      shape.dtype, count(problem.total_k(), shape.heads_kv, shape.dims.head_dim), seeds.next());
  problem.v = normal_array(
      shape.dtype, count(problem.total_k(), shape.heads_kv, shape.dims.head_dim_v), seeds.next());
  problem.dout = normal_array(
      shape.dtype, count(problem.total_q(), shape.heads, shape.dims.head_dim_v), seeds.next());
}

AttentionCase make_case(const Workload& work, const CaseShape& shape, std::uint64_t seed) {
  AttentionCase problem;
  problem.name = work.name;
  problem.shape = shape;
  PackedTrees packed = work.pack();
  problem.cu_q = packed.cu_seqlens;
  problem.cu_k = std::move(packed.cu_seqlens);
  problem.start = std::move(packed.start);
  problem.end = std::move(packed.end);
  fill_case(problem, seed);
  return problem;
}

CaseRun::Memory::Memory(bool device, std::size_t bytes) : on_device_(device) {
  if (device) {
    device_ = DeviceBuffer(bytes);
  } else {
    host_.resize(bytes);
  }
}

CaseRun::Memory::Memory(bool device, const void* data, std::size_t bytes) : Memory(device, bytes) {
  write(data, bytes);
}

void* CaseRun::Memory::data() {
  return on_device_ ? std::bit_cast<void*>(device_.address()) : host_.data();
}

void CaseRun::Memory::fill_ones() {
  if (on_device_) {
    device_.fill(0xff);
  } else {
    host_.assign(host_.size(), std::byte{0xff});
  }
}

void CaseRun::Memory::write(const void* data, std::size_t bytes) {
  if (bytes == 0) return;
  if (on_device_) {
    device_.upload(std::span(static_cast<const std::byte*>(data), bytes));
  } else {
    std::memcpy(host_.data(), data, bytes);
  }
}

std::vector<std::byte> CaseRun::Memory::read(CUstream stream) const {
  return on_device_ ? device_.download_all<std::byte>(stream) : host_;
}

CaseRun::CaseRun(Engine& engine, const AttentionCase& problem, const RunOptions& options)
    : engine_(engine), spec_(options.spec), plan_(header_for(engine, problem, options)) {
  const bool gpu = engine.kind() == EngineKind::kCuda;
  const auto copy = [gpu](const auto& values) {
    return Memory(gpu, values.data(), bytes_of(values));
  };
  const CaseShape& shape = problem.shape;
  const auto& [dim, dim_v] = shape.dims;
  cu_q_ = copy(problem.cu_q);
  cu_k_ = copy(problem.cu_k);
  start_ = copy(problem.start);
  end_ = copy(problem.end);
  q_ = copy(problem.q);
  k_ = copy(problem.k);
  v_ = copy(problem.v);
  const auto rows =
      static_cast<std::size_t>(problem.total_q()) * static_cast<std::size_t>(shape.heads);
  out_ = Memory(gpu, rows * static_cast<std::size_t>(dim_v * element_bytes(shape.dtype)));
  lse_ = Memory(gpu, rows * sizeof(float));
  plan_buffer_ = Memory(gpu, plan_bytes(plan_));
  workspace_ = Memory(gpu, engine.forward_workspace_bytes(plan_, problem.engine_shape()));

  inputs_.cu_seqlens_q = static_cast<const std::int32_t*>(cu_q_.data());
  inputs_.cu_seqlens_k = static_cast<const std::int32_t*>(cu_k_.data());
  inputs_.tree_dfs_order_start_q = static_cast<const std::int32_t*>(start_.data());
  inputs_.tree_dfs_order_end_k = static_cast<const std::int32_t*>(end_.data());
  args_.dtype = shape.dtype;
  args_.heads = shape.heads;
  args_.heads_kv = shape.heads_kv;
  args_.head_dim = dim;
  args_.head_dim_v = dim_v;
  args_.q = {q_.data(), std::int64_t{shape.heads} * dim, dim};
  args_.k = {k_.data(), std::int64_t{shape.heads_kv} * dim, dim};
  args_.v = {v_.data(), std::int64_t{shape.heads_kv} * dim_v, dim_v};
  args_.out = {out_.data(), std::int64_t{shape.heads} * dim_v, dim_v};
  args_.lse = static_cast<float*>(lse_.data());
  args_.softmax_scale = problem.softmax_scale;
  args_.softcap = shape.softcap;
  args_.plan = &plan_;
  args_.plan_buffer = static_cast<const std::int32_t*>(plan_buffer_.data());
  args_.workspace = workspace_.data();
  args_.workspace_bytes = engine.forward_workspace_bytes(plan_, problem.engine_shape());
  if (options.backward) {
    set_up_backward(problem, options);
  } else {
    args_.spec = spec_;
  }
}

void CaseRun::set_up_backward(const AttentionCase& problem, const RunOptions& options) {
  const bool gpu = engine_.kind() == EngineKind::kCuda;
  dout_ = Memory(gpu, problem.dout.data(), problem.dout.size());
  dq_ = Memory(gpu, problem.q.size());
  dk_ = Memory(gpu, problem.k.size());
  dv_ = Memory(gpu, problem.v.size());
  const std::size_t bytes = engine_.backward_workspace_bytes(plan_, problem.engine_shape(true),
                                                             options.deterministic, spec_);
  backward_workspace_ = Memory(gpu, bytes);
  BackwardArgs& b = backward_args_;
  b.dtype = args_.dtype;
  b.heads = args_.heads;
  b.heads_kv = args_.heads_kv;
  b.head_dim = args_.head_dim;
  b.head_dim_v = args_.head_dim_v;
  b.q = args_.q;
  b.k = args_.k;
  b.v = args_.v;
  b.out = {args_.out.data, args_.out.token_stride, args_.out.head_stride};
  b.dout = {dout_.data(), args_.out.token_stride, args_.out.head_stride};
  b.lse = args_.lse;
  b.dq = {dq_.data(), args_.q.token_stride, args_.q.head_stride};
  b.dk = {dk_.data(), args_.k.token_stride, args_.k.head_stride};
  b.dv = {dv_.data(), args_.v.token_stride, args_.v.head_stride};
  b.softmax_scale = args_.softmax_scale;
  b.softcap = args_.softcap;
  b.deterministic = options.deterministic;
  b.plan = &plan_;
  b.plan_buffer = args_.plan_buffer;
  b.workspace = backward_workspace_.data();
  b.workspace_bytes = bytes;
  b.spec = spec_;
}

void CaseRun::build_plan(Stream stream) {
  engine_.build_plan(plan_, inputs_, static_cast<std::int32_t*>(plan_buffer_.data()), stream);
}

void CaseRun::require_valid_plan(Stream stream) {
  const PlanReport report =
      engine_.validate(plan_, static_cast<const std::int32_t*>(plan_buffer_.data()), stream);
  if (!report.valid) throw Error(ErrorCode::kInvalidTree, report.message);
}

void CaseRun::set_q(const std::vector<std::byte>& q) {
  q_.write(q.data(), q.size());
}

void CaseRun::poison() {
  for (Memory* memory : {&out_, &lse_, &dq_, &dk_, &dv_}) memory->fill_ones();
}

void CaseRun::forward(Stream stream) {
  engine_.forward(args_, stream);
}

void CaseRun::backward(Stream stream) {
  engine_.backward(backward_args_, stream);
}

std::vector<std::byte> CaseRun::dq(Stream stream) const {
  return dq_.read(static_cast<CUstream>(stream));
}

std::vector<std::byte> CaseRun::dk(Stream stream) const {
  return dk_.read(static_cast<CUstream>(stream));
}

std::vector<std::byte> CaseRun::dv(Stream stream) const {
  return dv_.read(static_cast<CUstream>(stream));
}

std::vector<std::byte> CaseRun::out(Stream stream) const {
  return out_.read(static_cast<CUstream>(stream));
}

std::vector<float> CaseRun::lse(Stream stream) const {
  const std::vector<std::byte> bytes = lse_.read(static_cast<CUstream>(stream));
  std::vector<float> values(bytes.size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

}  // namespace treeattn::cli
