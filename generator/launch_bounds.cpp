#include "generator/launch_bounds.h"

#include <algorithm>

#include "generator/arch.h"

namespace treeattn {
namespace {

/// Registers a thread needs beside its accumulators: fragments, addresses, row maxima and sums.
/// Found with ptxas over all default specs: fewer spill.
template <class Config>
constexpr int kOtherRegisters = 48;
template <>
constexpr int kOtherRegisters<BackwardDqConfig> = 70;
/// Shared memory a block must be able to have for dQ to pass through it.
constexpr int kBulkDqMinSmem = 200 * 1024;
/// Shared memory the driver keeps for itself in every block.
constexpr int kReservedSmemBytes = 1024;

template <class Config>
int blocks_per_sm(const KernelSpec& spec, const Config& config) {
  const ArchLimits limits = arch_limits(spec.problem.target);
  const int by_smem = limits.smem_per_sm / (config.smem_bytes() + kReservedSmemBytes);
  const int by_threads = limits.max_threads_per_sm / config.threads();
  const int registers = accumulator_registers(config) + kOtherRegisters<Config>;
  const int by_registers = limits.registers_per_sm / (config.threads() * registers);
  return std::max(1, std::min({by_smem, by_threads, by_registers}));
}

}  // namespace

ForwardConfig forward_config(const KernelSpec& spec) {
  const Problem& p = spec.problem;
  const TileConfig& t = spec.tile;
  return {p.dtype, p.head_dim, p.head_dim_v, t.block_m, t.block_n, t.stages, t.warps, p.softcap};
}

ForwardSm90Config forward_sm90_config(const KernelSpec& spec) {
  const Problem& p = spec.problem;
  const TileConfig& t = spec.tile;
  return {p.dtype, p.head_dim, p.head_dim_v, t.block_m, t.block_n,
          t.box_n, t.stages,   t.warps,      p.softcap};
}

int accumulator_registers(const ForwardSm90Config& config) {
  return config.head_dim_v / 2 + config.block_n / 2 + config.block_n / 4;
}

int accumulator_registers(const ForwardConfig& config) {
  return config.rows_per_warp() * (config.head_dim_v + config.block_n) / 32;
}

BackwardConfig backward_config(const KernelSpec& spec) {
  const Problem& p = spec.problem;
  const TileConfig& t = spec.tile;
  // The bulk copy engine came with compute capability 9.0. It needs dQ in shared memory, which
  // 12.x is too short of.
  const bool bulk_dq = p.target.cc >= 90 && arch_limits(p.target).smem_per_block >= kBulkDqMinSmem;
  return {p.dtype,  p.head_dim, p.head_dim_v, t.block_m, t.block_n,
          t.stages, t.warps,    p.softcap,    bulk_dq};
}

BackwardSm90Config backward_sm90_config(const KernelSpec& spec) {
  return {backward_config(spec)};
}

BackwardDqConfig backward_dq_config(const KernelSpec& spec) {
  const Problem& p = spec.problem;
  const TileConfig& t = spec.tile;
  return {p.dtype, p.head_dim, p.head_dim_v, t.block_m, t.block_n, t.stages, t.warps, p.softcap};
}

int accumulator_registers(const BackwardDqConfig& config) {
  const int fragments = (config.padded_dim() + config.padded_dim_v()) / 32;
  return config.padded_dim() / 2 + config.block_n + fragments;
}

int accumulator_registers(const BackwardConfig& config) {
  const int gradients = config.block_n * (config.padded_dim() + config.padded_dim_v());
  const int scores = 2 * config.block_m * config.block_n;
  const int dq = config.block_m * config.padded_dim();
  return (gradients + std::max(scores, dq)) / config.threads();
}

int blocks_per_sm(const KernelSpec& spec) {
  if (spec.problem.family == Family::kSm90) return 1;  // persistent, with nearly all registers
  switch (spec.problem.pass) {
    case Pass::kBackward:
      return blocks_per_sm(spec, backward_config(spec));
    case Pass::kBackwardDq:
      return blocks_per_sm(spec, backward_dq_config(spec));
    default:
      return blocks_per_sm(spec, forward_config(spec));
  }
}

}  // namespace treeattn
