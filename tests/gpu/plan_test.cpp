// The plan that the device builds is the one that the CPU builds.
#include "runtime/attention/plan.h"

#include <gtest/gtest.h>

#include <vector>

#include "runtime/attention/plan_cpu.h"
#include "tests/support/device_case.h"
#include "tests/support/plan_difference.h"

namespace treeattn::testing {
namespace {

class DevicePlan : public GpuTest {};

void expect_same(const RandomCase& c, std::optional<int> heads_per_pack_log2 = std::nullopt) {
  const DeviceCase on(c, true, nullptr, heads_per_pack_log2);
  const std::vector<int> device = on.download_plan();
  const PlanShape shape = to_plan_shape(on.plan());
  std::vector<int> host(device.size());
  build_plan_cpu(shape, c.plan_inputs(), host.data());
  EXPECT_EQ(plan_difference(PlanReader(shape, device.data()), PlanReader(shape, host.data())), "")
      << c.describe();
  EXPECT_TRUE(on.intact()) << c.describe();
}

RandomCaseOptions shapes_only() {
  RandomCaseOptions options;
  options.numbers = false;
  return options;
}

TEST_F(DevicePlan, EqualsTheCpuPlan) {
  for (std::uint64_t seed = 2000; seed < 2300; ++seed)
    expect_same(random_case(seed, shapes_only()));
}

TEST_F(DevicePlan, EqualsTheCpuPlanForPackedHeads) {
  for (std::uint64_t seed = 2300; seed < 2400; ++seed) {
    expect_same(random_case(seed, shapes_only()),
                1 + static_cast<int>(seed % kMostHeadsPerPackLog2));
  }
}

TEST_F(DevicePlan, EqualsTheCpuPlanForManyTokensAndSequences) {
  RandomCaseOptions options = shapes_only();
  options.long_share = 1;
  options.most_long_tokens = 60'000;
  options.head_dim = 64;
  options.head_dim_v = 64;
  for (std::uint64_t seed = 2400; seed < 2410; ++seed) {
    const RandomCase c = random_case(seed, options);
    expect_same(c);
    expect_same(c, kMostHeadsPerPackLog2);
  }
  RandomCase c = random_case(2410, options);
  c.lowering = Lowering::kCausal;
  c.cu_q.assign(1, 0);
  for (int n = 0; n <= c.total_q; n += 3) c.cu_q.push_back(n);
  c.cu_k = c.cu_q;
  if (c.total_k < c.cu_k.back()) return;
  expect_same(c);
}

TEST_F(DevicePlan, FlagsTheSameFaults) {
  RandomCaseOptions options = shapes_only();
  SplitMix64 rng(9);
  int flagged = 0;
  for (std::uint64_t seed = 2500; seed < 2600; ++seed) {
    RandomCase c = random_case(seed, options);
    break_plan_inputs(rng, c);
    DeviceCase on(c, true);
    const PlanReport device = gpu_engine().validate(on.plan(), on.plan_buffer());
    const PlanShape shape = to_plan_shape(on.plan());
    std::vector<int> host(plan_bytes(on.plan()) / sizeof(int));
    build_plan_cpu(shape, c.plan_inputs(), host.data());
    const PlanReport expected = report_faults(shape, host.data());
    EXPECT_EQ(device.valid, expected.valid) << c.describe();
    EXPECT_EQ(device.bad_sequences, expected.bad_sequences) << c.describe();
    EXPECT_EQ(device.first_bad_token, expected.first_bad_token) << c.describe();
    EXPECT_EQ(device.message, expected.message);
    flagged += device.valid ? 0 : 1;
    expect_same(c);
  }
  EXPECT_GT(flagged, 30);
}

}  // namespace
}  // namespace treeattn::testing
