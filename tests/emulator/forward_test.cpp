// The forward kernels' own text, run on the CPU by the emulator, against the oracle.
#include "runtime/attention/forward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "generator/generate.h"
#include "tests/emulator/emulated_case.h"
#include "tests/support/forward_bar.h"

namespace treeattn::testing {
namespace {

/// Runs the kernel and fills c.out and lse. The seed is of the order in which things happen.
void run(const emulator::Kernel& kernel, RandomCase& c, std::vector<float>& lse,
         std::uint64_t order = 0, bool packed = false) {
  const KernelSpec spec = parse_kernel_spec(kernel.spec);
  const int heads_per_pack_log2 = packed ? most_heads_per_pack_log2(c.heads / c.heads_kv) : 0;
  const PlanView view{spec.tile.block_m >> heads_per_pack_log2, spec.tile.view_block_n()};
  const EmulatedPlan plan(c, {&view, 1});
  const PlanShape& shape = plan.shape;
  c.out.fill(std::nan(""));
  lse.assign(static_cast<std::size_t>(c.heads) * c.total_q, std::nanf(""));
  std::vector<unsigned long long> workspace(kForwardWorkspaceBytes / 8, ~0ULL);
  ForwardArgs args = c.forward_args();
  args.plan = &plan.header;
  args.plan_buffer = plan.buffer.data();
  args.lse = lse.data();
  args.workspace = workspace.data();
  args.workspace_bytes = kForwardWorkspaceBytes;
  const ForwardLaunch work =
      make_forward_launch(args, shape, spec, kEmulatedMultiprocessors, kEmulatedL2Bytes);
  if (work.grid.x == 0) return;
  const emulator::Index grid{work.grid.x, work.grid.y, work.grid.z};
  if (spec.problem.family == Family::kSm80) {
    emulator::launch(kernel.entries[0], grid, &work.params, order);
    return;
  }
  const ForwardTensorMaps maps = forward_tensor_maps(args, shape, spec);
  ASSERT_TRUE(maps.fit());
  const emulator::Tensor q = emulated_tensor(maps.q);
  const emulator::Tensor k = emulated_tensor(maps.k);
  const emulator::Tensor k_granule = emulated_tensor(maps.k_granule);
  const emulator::Tensor v = emulated_tensor(maps.v);
  const emulator::Tensor v_granule = emulated_tensor(maps.v_granule);
  const ForwardSm90Params params{emulated_map(q),
                                 emulated_map(k),
                                 emulated_map(k_granule),
                                 emulated_map(v),
                                 emulated_map(v_granule),
                                 work.params,
                                 plan_offsets(shape).granules,
                                 workspace.data(),
                                 1,
                                 maps.q.head_step(),
                                 maps.k.head_step(),
                                 maps.v.head_step()};
  emulator::launch(kernel.entries[0], grid, &params, order);
  EXPECT_EQ(workspace[0], 0U) << "the counter is left for the next launch";
}

class EmulatedForward : public ::testing::TestWithParam<emulator::Kernel> {};

TEST_P(EmulatedForward, RandomCasesAgreeWithTheOracle) {
  const Problem problem = parse_kernel_spec(GetParam().spec).problem;
  for (std::uint64_t seed = 0; seed < emulated_count(8); ++seed) {
    RandomCase c = random_case(seed, emulated_cases(problem));
    const OracleResult expected = oracle_forward(c.oracle(), emulation_of(c.dtype), 1);
    std::vector<float> lse;
    ASSERT_NO_THROW(run(GetParam(), c, lse, seed)) << c.describe();
    EXPECT_EQ(judge_forward(c, expected, c.out.to_doubles(), lse), "");
  }
}

TEST_P(EmulatedForward, PackedHeadsAgreeWithTheOracle) {
  const Problem problem = parse_kernel_spec(GetParam().spec).problem;
  std::uint64_t cases = 0;
  for (std::uint64_t seed = 200; cases < emulated_count(8); ++seed) {
    RandomCase c = random_case(seed, emulated_cases(problem));
    if (most_heads_per_pack_log2(c.heads / c.heads_kv) == 0) continue;
    ++cases;
    const OracleResult expected = oracle_forward(c.oracle(), emulation_of(c.dtype), 1);
    std::vector<float> lse;
    ASSERT_NO_THROW(run(GetParam(), c, lse, seed, true)) << c.describe();
    EXPECT_EQ(judge_forward(c, expected, c.out.to_doubles(), lse), "");
  }
}

TEST_P(EmulatedForward, PackedHeadsSeeTheExactNumberOfKeys) {
  const Problem problem = parse_kernel_spec(GetParam().spec).problem;
  std::uint64_t cases = 0;
  for (std::uint64_t seed = 300; cases < emulated_count(4); ++seed) {
    RandomCase c = random_case(seed, emulated_cases(problem));
    if (most_heads_per_pack_log2(c.heads / c.heads_kv) == 0) continue;
    ++cases;
    apply_count_probe(c);
    std::vector<float> lse;
    ASSERT_NO_THROW(run(GetParam(), c, lse, seed, true)) << c.describe();
    EXPECT_EQ(judge_count_probe(c, lse), "");
  }
}

TEST_P(EmulatedForward, CountProbeGivesTheExactNumberOfVisibleKeys) {
  const Problem problem = parse_kernel_spec(GetParam().spec).problem;
  for (std::uint64_t seed = 100; seed < 100 + emulated_count(3); ++seed) {
    RandomCase c = random_case(seed, emulated_cases(problem));
    apply_count_probe(c);
    std::vector<float> lse;
    ASSERT_NO_THROW(run(GetParam(), c, lse, seed)) << c.describe();
    EXPECT_EQ(judge_count_probe(c, lse), "");
  }
}

TEST_P(EmulatedForward, TheOrderOfEventsChangesNoBit) {
  const Problem problem = parse_kernel_spec(GetParam().spec).problem;
  RandomCase c = random_case(4, emulated_cases(problem));
  std::vector<float> first_lse;
  ASSERT_NO_THROW(run(GetParam(), c, first_lse)) << c.describe();
  const std::vector<std::byte> first = bytes_of(c.out);
  for (std::uint64_t order = 1; order <= emulated_count(7); ++order) {
    std::vector<float> lse;
    ASSERT_NO_THROW(run(GetParam(), c, lse, order)) << c.describe();
    ASSERT_EQ(first, bytes_of(c.out)) << order;
    ASSERT_EQ(std::memcmp(first_lse.data(), lse.data(), lse.size() * sizeof(float)), 0) << order;
  }
}

INSTANTIATE_TEST_SUITE_P(Specs, EmulatedForward,
                         ::testing::ValuesIn(emulated_kernels(Pass::kForward)), emulated_name);

}  // namespace
}  // namespace treeattn::testing
