#include "runtime/attention/cpu_backward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "runtime/attention/cpu_forward.h"
#include "runtime/attention/plan_cpu.h"
#include "tests/support/oracle_backward.h"

namespace treeattn {
namespace {

using testing::backward_case;
using testing::BackwardCase;
using testing::Emulate;
using testing::Gradients;
using testing::HostTensor;
using testing::judge_gradients;
using testing::oracle_backward;
using testing::oracle_forward;
using testing::OracleCase;
using testing::OracleResult;
using testing::RandomCaseOptions;

constexpr PlanView kViews[] = {{64, 64}, {128, 32}, {16, 16}, {32, 128}};

RandomCaseOptions small_cases() {
  RandomCaseOptions options;
  options.gpu_limits = false;
  options.long_share = 0;
  options.most_short_tokens = 220;
  return options;
}

Gradients run(BackwardCase& c, int threads = 2) {
  const PlanShape shape = c.forward.plan_shape({&kViews[c.forward.seed % std::size(kViews)], 1});
  std::vector<int> buffer(static_cast<std::size_t>(plan_offsets(shape).total_ints));
  build_plan_cpu(shape, c.forward.plan_inputs(), buffer.data());
  const Plan plan = to_plan(shape);
  for (HostTensor* t : {&c.dq, &c.dk, &c.dv}) t->fill(std::nan(""));
  BackwardArgs args = c.backward_args();
  args.plan = &plan;
  args.plan_buffer = buffer.data();
  cpu_backward(args, threads);
  return {c.dq.to_doubles(), c.dk.to_doubles(), c.dv.to_doubles()};
}

Emulate emulation_of(DType dtype) {
  return dtype == DType::kF16 ? Emulate::kF16 : Emulate::kBF16;
}

TEST(CpuBackward, RandomCasesAgreeWithTheOracle) {
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    BackwardCase c = backward_case(seed, small_cases());
    const OracleCase problem = c.forward.oracle();
    c.set_forward(oracle_forward(problem));
    const std::vector<double> dout = c.dout.to_doubles();
    const Gradients expected = oracle_backward(problem, dout, c.dlse_doubles());
    const Gradients emulated =
        oracle_backward(problem, dout, c.dlse_doubles(), emulation_of(c.forward.dtype));
    const bool narrow = c.forward.dtype == DType::kF16 || c.forward.dtype == DType::kBF16;
    EXPECT_EQ(judge_gradients(c.forward, expected, emulated, run(c), narrow ? 0 : 2e-5), "")
        << c.forward.describe();
  }
}

TEST(CpuBackward, ResultDoesNotDependOnTheNumberOfThreads) {
  BackwardCase c = backward_case(11, small_cases());
  c.set_forward(oracle_forward(c.forward.oracle()));
  const Gradients one = run(c, 1);
  const Gradients three = run(c, 3);
  EXPECT_EQ(one.dq, three.dq);
  EXPECT_EQ(one.dk, three.dk);
  EXPECT_EQ(one.dv, three.dv);
}

/// sum(out dout) + sum(lse dlse) of the executor's own forward.
double loss(BackwardCase& c) {
  const PlanShape shape = c.forward.plan_shape({&kViews[0], 1});
  std::vector<int> buffer(static_cast<std::size_t>(plan_offsets(shape).total_ints));
  build_plan_cpu(shape, c.forward.plan_inputs(), buffer.data());
  const Plan plan = to_plan(shape);
  std::vector<float> lse(static_cast<std::size_t>(c.forward.heads) * c.forward.total_q);
  ForwardArgs args = c.forward.forward_args();
  args.plan = &plan;
  args.plan_buffer = buffer.data();
  args.lse = lse.data();
  cpu_forward(args, 1);
  c.lse = lse;
  double sum = 0;
  for (std::int64_t t = 0; t < c.forward.cu_q.back(); ++t) {
    for (int h = 0; h < c.forward.heads; ++h) {
      for (int d = 0; d < c.forward.head_dim_v; ++d) {
        sum += c.forward.out.get(t, h, d) * c.dout.get(t, h, d);
      }
    }
  }
  return sum;
}

// Central differences of the float64 forward; lse is float, so dlse is left out here.
TEST(CpuBackward, GradientsAreTheFiniteDifferencesOfForward) {
  int compared = 0;
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    RandomCaseOptions options = small_cases();
    options.dtype = DType::kF64;
    options.head_dim = 8;
    options.head_dim_v = 12;
    options.most_short_tokens = 60;
    BackwardCase c = backward_case(seed, options);
    if (c.forward.cu_q.back() < 4 || c.forward.cu_k.back() < 4) continue;
    c.dlse.clear();
    loss(c);
    const Gradients g = run(c);
    constexpr double kStep = 1e-5;
    const auto difference = [&](HostTensor& t, std::int64_t token, int head, int d) {
      const double x = t.get(token, head, d);
      t.set(token, head, d, x + kStep);
      const double above = loss(c);
      t.set(token, head, d, x - kStep);
      const double below = loss(c);
      t.set(token, head, d, x);
      return (above - below) / (2 * kStep);
    };
    SplitMix64 rng(seed);
    for (int n = 0; n < 6; ++n) {
      const auto i = rng.below(c.forward.cu_q.back());
      const auto j = rng.below(c.forward.cu_k.back());
      const auto h = static_cast<int>(rng.below(c.forward.heads));
      const auto h_kv = static_cast<int>(rng.below(c.forward.heads_kv));
      const auto d = static_cast<int>(rng.below(8));
      const auto close = [&](double expected, double actual) {
        EXPECT_NEAR(actual, expected, 2e-6 * (1 + std::abs(expected))) << c.forward.describe();
        ++compared;
      };
      close(difference(c.forward.q, i, h, d), g.dq[(i * c.forward.heads + h) * 8 + d]);
      close(difference(c.forward.k, j, h_kv, d), g.dk[(j * c.forward.heads_kv + h_kv) * 8 + d]);
      close(difference(c.forward.v, j, h_kv, d), g.dv[(j * c.forward.heads_kv + h_kv) * 12 + d]);
    }
  }
  EXPECT_GT(compared, 200);
}

// q = 0: every visible key weighs 1 / count, so dv[j] = sum over its rows of dout / count.
TEST(CpuBackward, OracleHoldsTheMaskExactProbe) {
  for (std::uint64_t seed = 200; seed < 220; ++seed) {
    BackwardCase c = backward_case(seed, small_cases());
    testing::apply_count_probe(c.forward);
    const OracleCase problem = c.forward.oracle();
    const std::vector<double> dout = c.dout.to_doubles();
    const Gradients g = oracle_backward(problem, dout, c.dlse_doubles());
    const int group = problem.heads / problem.heads_kv;
    std::vector<double> dv(g.dv.size(), 0.0);
    for (int b = 0; b < problem.batch(); ++b) {
      for (std::int64_t i = 0; i < problem.cu_q[b + 1] - problem.cu_q[b]; ++i) {
        const std::int64_t keys = problem.cu_k[b + 1] - problem.cu_k[b];
        double count = 0;
        for (std::int64_t j = 0; j < keys; ++j) count += oracle_sees(problem, b, i, j) ? 1 : 0;
        for (std::int64_t j = 0; j < keys; ++j) {
          if (!oracle_sees(problem, b, i, j)) continue;
          for (int h = 0; h < problem.heads; ++h) {
            for (int d = 0; d < problem.head_dim_v; ++d) {
              dv[((problem.cu_k[b] + j) * problem.heads_kv + h / group) * problem.head_dim_v + d] +=
                  dout[((problem.cu_q[b] + i) * problem.heads + h) * problem.head_dim_v + d] /
                  count;
            }
          }
        }
      }
    }
    for (std::size_t n = 0; n < dv.size(); ++n) ASSERT_NEAR(g.dv[n], dv[n], 1e-9);
  }
}

// A sequence that is no tree: its gradients are NaN, its neighbours' are not.
TEST(CpuBackward, InvalidSequencesBecomeNaN) {
  RandomCaseOptions options = small_cases();
  options.lowering = Lowering::kTree;
  for (std::uint64_t seed = 0;; ++seed) {
    BackwardCase c = backward_case(seed, options);
    testing::RandomCase& f = c.forward;
    if (f.batch() < 2 || f.cu_q[1] < 8 || f.cu_k[1] < 8 || f.cu_q.back() < f.cu_q[1] + 8) continue;
    c.set_forward(oracle_forward(f.oracle()));
    f.start[2] = 1000;
    f.start[3] = 0;
    run(c);
    EXPECT_TRUE(std::isnan(c.dq.get(0, 0, 0)));
    EXPECT_TRUE(std::isnan(c.dk.get(f.cu_k[1] - 1, 0, 0)));
    EXPECT_TRUE(std::isnan(c.dv.get(0, 0, 0)));
    EXPECT_FALSE(std::isnan(c.dq.get(f.cu_q[1], 0, 0)));
    if (f.cu_k.back() > f.cu_k[1]) {
      EXPECT_FALSE(std::isnan(c.dk.get(f.cu_k[1], 0, 0)));
    }
    return;
  }
}

}  // namespace
}  // namespace treeattn
