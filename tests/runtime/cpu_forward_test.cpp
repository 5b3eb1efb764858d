#include "runtime/attention/cpu_forward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "runtime/attention/plan_cpu.h"
#include "tests/support/oracle.h"
#include "tests/support/random_case.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

using testing::compare_forward;
using testing::Emulate;
using testing::ForwardError;
using testing::HostTensor;
using testing::oracle_forward;
using testing::OracleResult;
using testing::random_case;
using testing::RandomCase;
using testing::RandomCaseOptions;

constexpr PlanView kViews[] = {{64, 64}, {128, 32}, {16, 16}, {32, 128}};

struct Output {
  std::vector<double> out;
  std::vector<float> lse;
};

/// Plans and runs; every view gives the same answer, so the case's seed picks one.
Output run(RandomCase& c, int threads = 2) {
  const PlanShape shape = c.plan_shape({&kViews[c.seed % std::size(kViews)], 1});
  std::vector<int> buffer(static_cast<std::size_t>(plan_offsets(shape).total_ints));
  build_plan_cpu(shape, c.plan_inputs(), buffer.data());
  const Plan plan = to_plan(shape);
  Output output;
  output.lse.assign(static_cast<std::size_t>(c.heads) * c.total_q,
                    std::numeric_limits<float>::quiet_NaN());
  c.out.fill(std::nan(""));
  ForwardArgs args = c.forward_args();
  args.plan = &plan;
  args.plan_buffer = buffer.data();
  args.lse = output.lse.data();
  cpu_forward(args, threads);
  output.out = c.out.to_doubles();
  return output;
}

RandomCaseOptions small_cases() {
  RandomCaseOptions options;
  options.gpu_limits = false;
  options.long_share = 0;
  options.most_short_tokens = 350;
  return options;
}

/// A forest of one sequence in contiguous tensors, numbers the same for the same seed.
RandomCase plain_case(DType dtype, int heads = 2) {
  RandomCaseOptions options = small_cases();
  options.dtype = dtype;
  options.lowering = Lowering::kTree;
  options.softcap = false;
  RandomCase c;
  for (std::uint64_t seed = 0;; ++seed) {
    c = random_case(seed, options);
    if (c.heads == heads && c.batch() > 2 && c.cu_q[2] - c.cu_q[1] > 80 && c.cu_q == c.cu_k)
      return c;
  }
}

struct Limits {
  double rel_l2;
  double vector;  ///< 0: twice the emulation's
  Emulate emulate;
};

Limits limits_of(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return {1e-3, 0, Emulate::kF16};
    case DType::kBF16:
      return {4e-3, 0, Emulate::kBF16};
    case DType::kF32:
      return {1e-5, 1e-4, Emulate::kNothing};
    case DType::kF64:
      return {1e-12, 1e-11, Emulate::kNothing};
  }
  return {};
}

void expect_matches_oracle(RandomCase& c) {
  const Limits limits = limits_of(c.dtype);
  const OracleResult expected = oracle_forward(c.oracle(), limits.emulate);
  const Output actual = run(c);
  const ForwardError error =
      compare_forward(expected.out, expected.lse, actual.out, actual.lse, c.heads, c.head_dim_v);
  const double vector_bound = limits.vector > 0
                                  ? limits.vector
                                  : testing::emulated_vector_bound(expected, c.heads, c.head_dim_v);
  EXPECT_LE(error.rel_l2, limits.rel_l2) << error.describe() << "\n" << c.describe();
  EXPECT_LE(error.worst_vector, vector_bound) << error.describe() << "\n" << c.describe();
  EXPECT_LE(error.lse, 1e-4) << error.describe() << "\n" << c.describe();
}

TEST(CpuForward, FourHundredRandomCasesMatchTheOracle) {
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    RandomCase c = random_case(seed, small_cases());
    expect_matches_oracle(c);
    if (HasFailure()) return;
  }
}

TEST(CpuForward, LongCasesMatchTheOracle) {
  RandomCaseOptions options = small_cases();
  options.long_share = 1;
  options.most_heads = 2;
  options.head_dim = 40;
  for (std::uint64_t seed = 1000; seed < 1012; ++seed) {
    RandomCase c = random_case(seed, options);
    expect_matches_oracle(c);
    if (HasFailure()) return;
  }
}

TEST(CpuForward, CountProbeGivesTheExactNumberOfVisibleKeys) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    RandomCaseOptions options = small_cases();
    options.most_short_tokens = 200;
    RandomCase c = random_case(seed, options);
    apply_count_probe(c);
    const Output actual = run(c);
    const testing::OracleCase rule = c.oracle();
    for (int b = 0; b < c.batch(); ++b) {
      const std::vector<std::uint8_t> seen = oracle_visibility(rule, b);
      const int keys = c.cu_k[b + 1] - c.cu_k[b];
      for (int i = c.cu_q[b]; i < c.cu_q[b + 1]; ++i) {
        int count = 0;
        for (int j = 0; j < keys; ++j) {
          count += seen[static_cast<std::size_t>(i - c.cu_q[b]) * keys + j];
        }
        for (int h = 0; h < c.heads; ++h) {
          const float lse = actual.lse[static_cast<std::size_t>(h) * c.total_q + i];
          ASSERT_NEAR(std::exp(static_cast<double>(lse)), count, 1e-3) << c.describe();
        }
      }
    }
  }
}

TEST(CpuForward, BitsProbeTellsWhichKeysWereSeen) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    RandomCaseOptions options = small_cases();
    options.dtype = DType::kF64;
    RandomCase c = random_case(seed, options);
    apply_bits_probe(c);
    const OracleResult expected = oracle_forward(c.oracle());
    const Output actual = run(c);
    for (std::size_t n = 0; n < actual.out.size(); ++n) {
      ASSERT_NEAR(actual.out[n], expected.out[n], 1e-13) << c.describe();
    }
  }
}

TEST(CpuForward, ThreadsAndRepeatsDoNotChangeABit) {
  RandomCase c = plain_case(DType::kBF16);
  const Output one = run(c, 1);
  for (const int threads : {0, 3, 16}) {
    const Output many = run(c, threads);
    EXPECT_EQ(one.out, many.out);
    EXPECT_EQ(one.lse, many.lse);
  }
}

TEST(CpuForward, ATreeAloneIsBitIdenticalToItAmongOthers) {
  for (const DType dtype : {DType::kF16, DType::kF32, DType::kF64}) {
    RandomCase packed = plain_case(dtype);
    RandomCase alone;
    const int row0 = packed.cu_q[1];
    const int tokens = packed.cu_q[2] - row0;
    alone = packed;
    alone.cu_q = alone.cu_k = {0, tokens};
    alone.total_q = alone.total_k = tokens;
    alone.start.assign(packed.start.begin() + row0, packed.start.begin() + row0 + tokens);
    alone.end.assign(packed.end.begin() + row0, packed.end.begin() + row0 + tokens);
    alone.out = HostTensor(dtype, tokens, alone.heads, alone.head_dim_v);
    const auto cut = [&](const HostTensor& from) {
      HostTensor to(dtype, tokens, from.heads(), from.dim());
      for (int t = 0; t < tokens; ++t) {
        for (int h = 0; h < from.heads(); ++h) {
          for (int d = 0; d < from.dim(); ++d) to.set(t, h, d, from.get(row0 + t, h, d));
        }
      }
      return to;
    };
    alone.q = cut(packed.q);
    alone.k = cut(packed.k);
    alone.v = cut(packed.v);
    const Output among = run(packed);
    const Output by_itself = run(alone);
    const auto row_size = static_cast<std::size_t>(packed.heads) * packed.head_dim_v;
    EXPECT_EQ(std::memcmp(&among.out[row0 * row_size], by_itself.out.data(),
                          by_itself.out.size() * sizeof(double)),
              0);
    EXPECT_EQ(std::memcmp(&among.lse[row0], by_itself.lse.data(), tokens * sizeof(float)), 0);
  }
}

TEST(CpuForward, GarbageInUnseenTokensChangesNoBit) {
  for (const double garbage : {1e4, std::nan(""), std::numeric_limits<double>::infinity()}) {
    RandomCase c = plain_case(DType::kF16);
    const Output clean = run(c);
    // The last row of sequence 1 keeps its result when all it does not see is spoilt.
    const int row = c.cu_q[2] - 1;
    int spoilt = 0;
    const testing::OracleCase rule = c.oracle();
    for (int j = 0; j < c.total_k; ++j) {
      const bool inside = j >= c.cu_k[1] && j < c.cu_k[2];
      if (inside && oracle_sees(rule, 1, row - c.cu_q[1], j - c.cu_k[1])) continue;
      ++spoilt;
      for (int h = 0; h < c.heads_kv; ++h) {
        for (int d = 0; d < c.head_dim; ++d) c.k.set(j, h, d, garbage);
        for (int d = 0; d < c.head_dim_v; ++d) c.v.set(j, h, d, garbage);
      }
    }
    ASSERT_GT(spoilt, 0);
    const Output dirty = run(c);
    const auto row_size = static_cast<std::size_t>(c.heads) * c.head_dim_v;
    for (std::size_t n = row * row_size; n < (row + 1) * row_size; ++n) {
      ASSERT_EQ(clean.out[n], dirty.out[n]) << "garbage " << garbage;
    }
    for (int h = 0; h < c.heads; ++h) {
      ASSERT_EQ(clean.lse[h * c.total_q + row], dirty.lse[h * c.total_q + row]);
    }
  }
}

TEST(CpuForward, AnInvalidTreeIsNaNAndOnlyThat) {
  RandomCase c = plain_case(DType::kF32);
  const Output good = run(c);
  c.start[c.cu_q[1]] = 1000;  // the next token's start is lower
  const Output bad = run(c);
  for (int i = 0; i < c.total_q; ++i) {
    const bool faulty = i >= c.cu_q[1] && i < c.cu_q[2];
    for (int h = 0; h < c.heads; ++h) {
      const auto at = (static_cast<std::size_t>(i) * c.heads + h) * c.head_dim_v;
      const auto lse = static_cast<std::size_t>(h) * c.total_q + i;
      if (faulty) {
        ASSERT_TRUE(std::isnan(bad.out[at])) << i;
        ASSERT_TRUE(std::isnan(bad.lse[lse])) << i;
      } else {
        ASSERT_EQ(bad.out[at], good.out[at]) << i;
        ASSERT_EQ(bad.lse[lse], good.lse[lse]) << i;
      }
    }
  }
}

TEST(CpuForward, RowsThatSeeNothingAreZeroAndMinusInfinity) {
  RandomCase c = plain_case(DType::kBF16);
  const int last = c.cu_q.back();
  // The last sequence becomes capacity; its tokens may hold anything.
  c.cu_q.pop_back();
  c.cu_k.pop_back();
  ASSERT_LT(c.cu_q.back(), last);
  c.v.fill(std::nan(""));
  c.k.fill(std::nan(""));
  const Output output = run(c);
  for (int i = c.cu_q.back(); i < c.total_q; ++i) {
    for (int h = 0; h < c.heads; ++h) {
      ASSERT_EQ(output.lse[static_cast<std::size_t>(h) * c.total_q + i],
                -std::numeric_limits<float>::infinity());
      for (int d = 0; d < c.head_dim_v; ++d) {
        ASSERT_EQ(output.out[(static_cast<std::size_t>(i) * c.heads + h) * c.head_dim_v + d], 0.0);
      }
    }
  }
}

TEST(CpuForward, NoTokensAndNoLseAreFine) {
  RandomCase c;
  c.head_dim = c.head_dim_v = 8;
  EXPECT_TRUE(run(c).out.empty());
  c.cu_q = {0, 3};
  c.cu_k = {0, 0};
  c.total_q = 3;
  c.start = {0, 0, 0};
  c.q = HostTensor(DType::kF32, 3, 1, 8);
  c.out = HostTensor(DType::kF32, 3, 1, 8);
  EXPECT_EQ(run(c).out, std::vector<double>(24, 0.0));
}

TEST(CpuForward, BytesBetweenOutputVectorsAreLeftAlone) {
  RandomCase c = plain_case(DType::kF32);
  const int stride = c.head_dim_v + 3;
  c.out = HostTensor(DType::kF32, c.total_q, c.heads, c.head_dim_v, c.heads * stride + 5, stride);
  run(c);
  const auto* data = static_cast<const float*>(c.out.data());
  std::size_t numbers = 0;
  for (std::size_t n = 0; n < c.out.size_bytes() / sizeof(float); ++n)
    numbers += !std::isnan(data[n]);
  EXPECT_EQ(numbers, static_cast<std::size_t>(c.total_q) * c.heads * c.head_dim_v);
}

TEST(CpuForward, APlanNobodyBuiltIsRefused) {
  RandomCase c = plain_case(DType::kF32);
  const PlanShape shape = c.plan_shape(kViews);
  const std::vector<int> zeros(static_cast<std::size_t>(plan_offsets(shape).total_ints), 0);
  const Plan plan = to_plan(shape);
  ForwardArgs args = c.forward_args();
  args.plan = &plan;
  args.plan_buffer = zeros.data();
  EXPECT_THROW(cpu_forward(args, 1), Error);
}

}  // namespace
}  // namespace treeattn
