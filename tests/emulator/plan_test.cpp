// The plan kernels' own text, run on the CPU by the emulator, against the CPU builder.
#include "runtime/attention/plan.h"

#include <gtest/gtest.h>

#include <vector>

#include "runtime/attention/forward.h"
#include "tests/emulator/emulated_case.h"
#include "tests/support/plan_difference.h"

namespace treeattn::testing {
namespace {

std::vector<int> emulated_plan(const PlanShape& shape, const RandomCase& c) {
  const emulator::Kernel kernel = emulated_kernels(Pass::kPlan).at(0);
  std::vector<int> plan(static_cast<std::size_t>(plan_offsets(shape).total_ints), -1);
  const PlanLaunch work =
      make_plan_launch(shape, c.plan_inputs(), plan.data(), kEmulatedMultiprocessors);
  const Grid grids[] = {work.sequences, work.intervals, work.key_tiles, work.query_tiles};
  for (std::size_t i = 0; i < kernel.entries.size(); ++i) {
    emulator::launch(kernel.entries[i], {grids[i].x, grids[i].y, grids[i].z}, &work.params, c.seed);
  }
  return plan;
}

void expect_same(const RandomCase& c) {
  constexpr PlanView kViews[] = {{128, 64}, {16, 64}, {64, 128}, {24, 32}};
  const EmulatedPlan host(c, kViews);
  const std::vector<int> device = emulated_plan(host.shape, c);
  EXPECT_EQ(plan_difference(PlanReader(host.shape, device.data()),
                            PlanReader(host.shape, host.buffer.data())),
            "")
      << c.describe();
}

RandomCaseOptions shapes_only() {
  RandomCaseOptions options;
  options.numbers = false;
  options.long_share = 0.1;
  return options;
}

TEST(EmulatedPlan, EqualsTheCpuPlan) {
  for (std::uint64_t seed = 2000; seed < 2000 + emulated_count(20); ++seed) {
    ASSERT_NO_THROW(expect_same(random_case(seed, shapes_only())));
  }
}

TEST(EmulatedPlan, FlagsTheSameFaults) {
  SplitMix64 rng(9);
  for (std::uint64_t seed = 2500; seed < 2500 + emulated_count(20); ++seed) {
    RandomCase c = random_case(seed, shapes_only());
    break_plan_inputs(rng, c);
    ASSERT_NO_THROW(expect_same(c));
  }
}

}  // namespace
}  // namespace treeattn::testing
