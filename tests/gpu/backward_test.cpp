// Backward on the GPU against the oracle, by the whole bar of the semantics.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "generator/arch.h"
#include "runtime/cuda/device.h"
#include "tests/support/device_case.h"
#include "tests/support/forward_bar.h"

namespace treeattn::testing {
namespace {

constexpr int kCases = 300;

RandomCaseOptions gpu_cases() {
  RandomCaseOptions options;
  options.most_long_tokens = 2700;
  return options;
}

struct Expected {
  Gradients exact, emulated;
};

/// Cases `make(n)` with their oracle's gradients and loaded kernels, made on every core.
template <class Make>
void make_cases(int count, const Make& make, std::vector<BackwardCase>& cases,
                std::vector<Expected>& expected) {
  cases.resize(count);
  expected.resize(count);
  parallel_for(count, [&](int n) {
    BackwardCase& c = cases[n];
    c = make(n);
    const Shape shape = shape_of_case(c.forward, true);
    gpu_engine().prepare({&shape, 1});
    const OracleCase problem = c.forward.oracle();
    c.set_forward(oracle_forward(problem, Emulate::kNothing, 1));
    const std::vector<double> dout = c.dout.to_doubles();
    expected[n].exact = oracle_backward(problem, dout, c.dlse_doubles(), Emulate::kNothing, 1);
    expected[n].emulated =
        oracle_backward(problem, dout, c.dlse_doubles(), emulation_of(c.forward.dtype), 1);
  });
}

class Backward : public GpuTest {};

TEST_F(Backward, ThreeHundredCasesAgreeWithTheOracle) {
  std::vector<BackwardCase> cases;
  std::vector<Expected> expected;
  make_cases(
      kCases, [](int n) { return backward_case(static_cast<std::uint64_t>(n), gpu_cases()); },
      cases, expected);
  for (int n = 0; n < kCases; ++n) {
    const double bar = cases[n].forward.dtype == DType::kF16 ? 1e-3 : 4e-3;
    // Scores far beyond a softcap leave gradients of rounding noise: there the emulation is the
    // bar.
    const double rel_l2 = cases[n].forward.softcap > 0 ? 0 : bar;
    const Gradients actual = device_backward(cases[n], n % 3 == 0);
    EXPECT_EQ(
        judge_gradients(cases[n].forward, expected[n].exact, expected[n].emulated, actual, rel_l2),
        "")
        << cases[n].forward.describe();
  }
}

// The sm90 family's backward by name, over every head dim that it has.
TEST_F(Backward, OfTheSm90FamilyAgreesWithTheOracle) {
  if (kernel_target(device_info(0), FamilyChoice::kAuto) != kSm90Target) {
    GTEST_SKIP() << "the sm90 family runs on compute capability 9.0";
  }
  const auto make = [](int n) {
    RandomCaseOptions options = gpu_cases();
    options.head_dim = 72 + n % 8 * 8;
    options.head_dim_v = n % 3 == 0 ? 16 + n % 15 * 8 : *options.head_dim;
    options.softcap = false;
    return backward_case(static_cast<std::uint64_t>(5000 + n), options);
  };
  std::vector<BackwardCase> cases;
  std::vector<Expected> expected;
  make_cases(24, make, cases, expected);
  for (std::size_t n = 0; n < cases.size(); ++n) {
    const RandomCase& c = cases[n].forward;
    const std::string spec =
        fmt::format("bwd/sm90@sm_90a/{}/d{}v{}", c.dtype == DType::kF16 ? "f16" : "bf16",
                    c.head_dim, c.head_dim_v);
    for (const bool deterministic : {false, true}) {
      const Gradients actual = device_backward(cases[n], deterministic, spec);
      EXPECT_EQ(judge_gradients(c, expected[n].exact, expected[n].emulated, actual,
                                c.dtype == DType::kF16 ? 1e-3 : 4e-3),
                "")
          << spec << " " << c.describe();
    }
  }
}

// q = 0: dv[j] is the sum over its rows of dout / (number of keys they see), head by head.
TEST_F(Backward, MaskExactProbe) {
  for (std::uint64_t seed = 1000; seed < 1012; ++seed) {
    RandomCaseOptions options = gpu_cases();
    options.head_dim = 64;
    options.head_dim_v = 64;
    options.softcap = false;
    options.dtype = DType::kF16;
    BackwardCase c = backward_case(seed, options);
    apply_count_probe(c.forward);
    c.dlse.clear();
    const OracleCase problem = c.forward.oracle();
    c.set_forward(oracle_forward(problem));
    const Gradients exact = oracle_backward(problem, c.dout.to_doubles(), {});
    const Gradients emulated = oracle_backward(problem, c.dout.to_doubles(), {}, Emulate::kF16);
    const Gradients actual = device_backward(c, false);
    EXPECT_EQ(judge_gradients(c.forward, exact, emulated, actual, 1e-3), "")
        << c.forward.describe();
    for (std::size_t n = 0; n < exact.dv.size(); ++n) {
      if (exact.dv[n] == 0.0) {
        ASSERT_EQ(actual.dv[n], 0.0) << "a key that nobody sees";
      }
    }
  }
}

TEST_F(Backward, DeterministicGradientsAreBitIdenticalFromRunToRun) {
  RandomCaseOptions options = gpu_cases();
  options.head_dim = 128;
  options.head_dim_v = 128;
  options.dtype = DType::kBF16;
  options.long_share = 1;
  BackwardCase c = backward_case(5, options);
  c.set_forward(oracle_forward(c.forward.oracle()));
  const Gradients first = device_backward(c, true);
  for (int run = 0; run < 100; ++run) {
    const Gradients again = device_backward(c, true);
    ASSERT_EQ(first.dq, again.dq) << run;
    ASSERT_EQ(first.dk, again.dk) << run;
    ASSERT_EQ(first.dv, again.dv) << run;
  }
}

}  // namespace
}  // namespace treeattn::testing
