// The plan that the device builds is the one that the CPU builds.
#include "runtime/attention/plan.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "runtime/attention/plan_cpu.h"
#include "tests/support/device_case.h"

namespace treeattn::testing {
namespace {

class DevicePlan : public GpuTest {};

template <class Record>
bool same(std::span<const Record> a, std::span<const Record> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

/// Slots that hold a tile: those of every sequence and of the keys past the last.
std::vector<int> used_slots(const PlanReader& plan, int tile) {
  std::vector<int> slots;
  const int batch = plan.shape().batch;
  for (int b = 0; b <= batch; ++b) {
    const int begin = plan.cu_k()[b];
    const int end = b < batch ? plan.cu_k()[b + 1] : plan.shape().total_k;
    for (int n = 0; begin + n * tile < end; ++n) slots.push_back(tile_slot0(begin, b, tile) + n);
  }
  return slots;
}

bool same_tiles(std::span<const KeyTile> a, std::span<const KeyTile> b,
                const std::vector<int>& slots) {
  for (const int slot : slots) {
    if (std::memcmp(&a[slot], &b[slot], sizeof(KeyTile)) != 0) return false;
  }
  return true;
}

std::string difference(const PlanReader& device, const PlanReader& host) {
  const PlanShape& shape = host.shape();
  if (!same(std::span(device.meta(), kPlanMetaInts), std::span(host.meta(), kPlanMetaInts))) {
    return "meta";
  }
  const auto ints = [](const int* from, int count) {
    return std::span(from, static_cast<std::size_t>(count));
  };
  if (!same(ints(device.cu_q(), shape.batch + 1), ints(host.cu_q(), shape.batch + 1))) {
    return "cu_q";
  }
  if (!same(ints(device.cu_k(), shape.batch + 1), ints(host.cu_k(), shape.batch + 1))) {
    return "cu_k";
  }
  if (!same(ints(device.seq_fault(), shape.batch), ints(host.seq_fault(), shape.batch))) {
    return "seq_fault";
  }
  if (!same(ints(device.first(), shape.total_k), ints(host.first(), shape.total_k))) return "first";
  if (!same(ints(device.len(), shape.total_k), ints(host.len(), shape.total_k))) return "len";
  if (!same_tiles(device.granules(), host.granules(), used_slots(host, kGranuleKeys))) {
    return "granules";
  }
  for (int v = 0; v < shape.num_views; ++v) {
    const auto slots = used_slots(host, shape.views[v].block_n);
    if (!same_tiles(device.key_tiles(v), host.key_tiles(v), slots)) return "key tiles";
    if (!same(device.query_tiles(v), host.query_tiles(v))) return "query tiles";
    if (!same(device.key_order(v), host.key_order(v))) return "key order";
  }
  return "";
}

void expect_same(const RandomCase& c, std::optional<int> heads_per_pack_log2 = std::nullopt) {
  const DeviceCase on(c, true, nullptr, heads_per_pack_log2);
  const std::vector<int> device = on.download_plan();
  const PlanShape shape = to_plan_shape(on.plan());
  std::vector<int> host(device.size());
  build_plan_cpu(shape, c.plan_inputs(), host.data());
  EXPECT_EQ(difference(PlanReader(shape, device.data()), PlanReader(shape, host.data())), "")
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
    switch (rng.below(4)) {
      case 0:
        for (int& s : c.start) {
          if (rng.chance(0.01)) s = static_cast<int>(rng.below(1000));
        }
        break;
      case 1:
        for (int& f : c.first) {
          if (rng.chance(0.01)) f += static_cast<int>(rng.between(-2000, 2000));
        }
        break;
      case 2:
        c.cu_q[rng.below(static_cast<std::int64_t>(c.cu_q.size()))] =
            static_cast<int>(rng.between(-100, 10'000));
        break;
      default:
        c.cu_k[rng.below(static_cast<std::int64_t>(c.cu_k.size()))] =
            static_cast<int>(rng.between(-100, 10'000));
    }
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
