// Forward on the GPU against the oracle, by the whole bar of the semantics: random cases over every
// head dim, and one small case for every kernel that is used unless a caller asks for another.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "generator/arch.h"
#include "generator/kernel_spec.h"
#include "generator/tile_space.h"
#include "tests/support/device_case.h"
#include "tests/support/forward_bar.h"

namespace treeattn::testing {
namespace {

constexpr int kCases = 320;

RandomCaseOptions gpu_cases() {
  RandomCaseOptions options;
  options.most_long_tokens = 3300;
  return options;
}

struct JudgedCase {
  RandomCase problem;
  OracleResult expected;
};

/// The oracle's answers and loaded kernels, made on every core.
template <class Make>
std::vector<JudgedCase> make_cases(int count, const Make& make) {
  std::vector<JudgedCase> cases(count);
  parallel_for(count, [&](int n) {
    RandomCase& c = cases[n].problem = make(n);
    const Shape shape = shape_of_case(c, false);
    gpu_engine().prepare({&shape, 1});
    cases[n].expected = oracle_forward(c.oracle(), emulation_of(c.dtype), 1);
  });
  return cases;
}

class ForwardRandom : public GpuTest {};

TEST_F(ForwardRandom, ThreeHundredCasesAgreeWithTheOracle) {
  std::vector<JudgedCase> cases = make_cases(
      kCases, [](int n) { return random_case(static_cast<std::uint64_t>(n), gpu_cases()); });
  double worst_bf16 = 0, worst_f16 = 0, worst_lse = 0;
  int packed = 0;
  for (auto& [c, expected] : cases) {
    for (int log2 = 0; log2 <= most_packed(c); ++log2) {
      DeviceCase on(c, false, nullptr, log2);
      std::vector<float> lse;
      on.forward(c, lse);
      const std::vector<double> out = c.out.to_doubles();
      EXPECT_EQ(judge_forward(c, expected, out, lse), "") << (1 << log2) << " heads a tile";
      EXPECT_TRUE(on.intact()) << "bytes beside a tensor were written with " << (1 << log2)
                               << " heads a tile: " << c.describe();
      const ForwardError error =
          compare_forward(expected.out, expected.lse, out, lse, c.heads, c.head_dim_v);
      double& worst = c.dtype == DType::kF16 ? worst_f16 : worst_bf16;
      worst = std::max(worst, error.rel_l2);
      worst_lse = std::max(worst_lse, error.lse);
      packed += log2 > 0 ? 1 : 0;
    }
  }
  EXPECT_GT(packed, kCases / 2);
  std::printf("forward, %d cases and %d packed: rel_l2 bf16 %.2e, f16 %.2e, lse %.2e\n", kCases,
              packed, worst_bf16, worst_f16, worst_lse);
}

TEST_F(ForwardRandom, WithoutLseTheOutputIsTheSame) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    RandomCase c = random_case(seed, gpu_cases());
    const DeviceCase on(c, false, nullptr, most_packed(c));
    const auto run = [&](float* lse) {
      HostTensor out = c.out;
      GuardedBuffer device_out(out);
      ForwardArgs args = on.forward_args(c);
      args.out.data = device_out.as();
      args.lse = lse;
      gpu_engine().forward(args);
      device_out.download(out.data(), out.size_bytes());
      EXPECT_TRUE(device_out.intact()) << c.describe();
      return bytes_of(out);
    };
    ASSERT_EQ(run(nullptr), run(on.lse.as<float>())) << c.describe();
  }
}

// Every default kernel of this GPU: what prepare() makes ready is the spec of exactly these head
// dims, and it computes what it should.
TEST_F(ForwardRandom, EveryDefaultKernelAgreesWithTheOracle) {
  const std::vector<KernelSpec> specs =
      default_specs(Pass::kForward, kernel_target(device_info(0)));
  ASSERT_GE(specs.size(), 62U);
  std::vector<JudgedCase> cases = make_cases(static_cast<int>(specs.size()), [&](int n) {
    const Problem& problem = specs[n].problem;
    RandomCaseOptions options;
    options.dtype = problem.dtype == KernelDType::kF16 ? DType::kF16 : DType::kBF16;
    options.head_dim = problem.head_dim;
    options.head_dim_v = problem.head_dim_v;
    options.softcap = false;
    options.lowering = Lowering::kTree;
    options.long_share = 0;
    options.most_heads = 8;
    for (std::uint64_t seed = 3000 + static_cast<std::uint64_t>(n);; seed += specs.size()) {
      RandomCase c = random_case(seed, options);
      if (std::min(c.cu_q.back(), c.cu_k.back()) > 200 && most_packed(c) > 0) return c;
    }
  });
  for (std::size_t n = 0; n < specs.size(); ++n) {
    RandomCase& c = cases[n].problem;
    const Shape shape = shape_of_case(c, false);
    const auto prepared = gpu_engine().prepare({&shape, 1});
    ASSERT_EQ(prepared.size(), 2U);
    EXPECT_EQ(prepared[1].spec, to_string(specs[n]));
    for (const int log2 : {0, most_packed(c)}) {
      DeviceCase on(c, false, nullptr, log2);
      std::vector<float> lse;
      on.forward(c, lse, nullptr, to_string(specs[n]));
      EXPECT_EQ(judge_forward(c, cases[n].expected, c.out.to_doubles(), lse), "")
          << (1 << log2) << " heads a tile";
      EXPECT_TRUE(on.intact()) << to_string(specs[n]) << ", " << (1 << log2) << " heads a tile";
    }
  }
}

}  // namespace
}  // namespace treeattn::testing
