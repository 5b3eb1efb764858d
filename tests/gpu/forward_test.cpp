// Forward on the GPU: exact masks, bit identity, capacities, invalid trees, offsets beyond 32 bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "tests/support/device_case.h"
#include "tests/support/forward_bar.h"
#include "treeattn/error.h"

namespace treeattn::testing {
namespace {

class Forward : public GpuTest {};

RandomCaseOptions plain(DType dtype, int dim) {
  RandomCaseOptions options;
  options.dtype = dtype;
  options.head_dim = dim;
  options.head_dim_v = dim;
  options.softcap = false;
  options.most_long_tokens = 3000;
  return options;
}

TEST_F(Forward, CountProbeGivesTheExactNumberOfVisibleKeys) {
  for (std::uint64_t seed = 400; seed < 430; ++seed) {
    RandomCase c = random_case(seed, plain(seed % 2 == 0 ? DType::kF16 : DType::kBF16, 64));
    apply_count_probe(c);
    for (int log2 = 0; log2 <= most_packed(c); ++log2) {
      DeviceCase on(c, false, nullptr, log2);
      std::vector<float> lse;
      on.forward(c, lse);
      ASSERT_EQ(judge_count_probe(c, lse), "") << (1 << log2) << " heads a tile";
    }
  }
}

TEST_F(Forward, BitsProbeTellsWhichKeysWereSeen) {
  for (std::uint64_t seed = 500; seed < 520; ++seed) {
    RandomCase c = random_case(seed, plain(DType::kF16, 32));
    apply_bits_probe(c);
    for (int log2 = 0; log2 <= most_packed(c); ++log2) {
      DeviceCase on(c, false, nullptr, log2);
      std::vector<float> lse;
      on.forward(c, lse);
      ASSERT_EQ(judge_bits_probe(c), "") << (1 << log2) << " heads a tile";
    }
  }
}

/// Every token of a tensor at the same place, holding the first one's numbers.
HostTensor one_for_all(const HostTensor& t) {
  HostTensor same(t.dtype(), t.tokens(), t.heads(), t.dim(), 0, t.dim());
  for (int h = 0; h < t.heads(); ++h) {
    for (int d = 0; d < t.dim(); ++d) same.set(0, h, d, t.get(0, h, d));
  }
  return same;
}

// The copy engine of compute capability 9.0 cannot read these: kernels of the sm80 family walk the
// view that the plan holds, which for small heads is backward's.
TEST_F(Forward, TokensWithoutAStrideAgreeWithTheOracle) {
  struct Dims {
    int k, v;
    bool backward;
  };
  for (const Dims& dims : {Dims{128, 128, false}, Dims{72, 72, false}, Dims{192, 128, false},
                           Dims{256, 256, false}, Dims{64, 64, true}}) {
    RandomCaseOptions options = plain(DType::kBF16, dims.k);
    options.head_dim_v = dims.v;
    options.lowering = Lowering::kTree;
    options.long_share = 0;
    for (const bool softcap : {false, true}) {
      options.softcap = softcap;
      std::uint64_t seed = 900;
      // Keys that are all alike weigh every visible value the same. Their scores are off by the
      // same too, which averages out in no lse; far beyond a softcap that is more than 1e-4.
      for (const auto& [same_k, same_v] : {std::pair(true, true), {true, false}, {false, true}}) {
        if (same_k && softcap) continue;
        RandomCase c;
        do {
          c = random_case(seed++, options);
        } while (std::min(c.cu_q.back(), c.cu_k.back()) < 150);
        if (same_k) c.k = one_for_all(c.k);
        if (same_v) c.v = one_for_all(c.v);
        const OracleResult expected = oracle_forward(c.oracle(), emulation_of(c.dtype));
        DeviceCase on(c, dims.backward);
        std::vector<float> lse;
        on.forward(c, lse);
        if (same_v) {
          // Weights cancel in the emulation, and so does their rounding: it has no error to bound
          // a kernel by, whose sum is of weights that are not yet rounded.
          const ForwardError errors =
              compare_forward(expected.out, expected.lse, c.out.to_doubles(), lse, c.heads, dims.v);
          // Of the weights and of the result, each by at most 2^-8.
          EXPECT_LT(errors.worst_vector, 1.0 / 128) << c.describe();
          EXPECT_LT(errors.lse, 1e-4) << c.describe();
        } else {
          EXPECT_EQ(judge_forward(c, expected, c.out.to_doubles(), lse), "");
        }
        EXPECT_TRUE(on.intact()) << c.describe();
      }
    }
  }
}

// With packed heads the copy engine cannot read the first either, as a box holds several of them;
// the rest is as above.
TEST_F(Forward, PackedHeadsWithOtherStridesAgreeWithTheOracle) {
  RandomCaseOptions options = plain(DType::kBF16, 128);
  options.lowering = Lowering::kTree;
  options.long_share = 0;
  using Change = void (*)(RandomCase&);
  std::uint64_t seed = 950;
  for (const Change change : {Change([](RandomCase& c) {
                                HostTensor same(c.q.dtype(), c.q.tokens(), c.heads, 128, 128, 0);
                                for (int t = 0; t < c.total_q; ++t) {
                                  for (int d = 0; d < 128; ++d) same.set(t, 0, d, c.q.get(t, 0, d));
                                }
                                c.q = std::move(same);
                              }),
                              Change([](RandomCase& c) { c.k = one_for_all(c.k); })}) {
    for (const int dim : {128, 256}) {
      options.head_dim_v = dim;
      RandomCase c;
      do {
        c = random_case(seed++, options);
      } while (std::min(c.cu_q.back(), c.cu_k.back()) < 150 || most_packed(c) == 0);
      change(c);
      const OracleResult expected = oracle_forward(c.oracle(), emulation_of(c.dtype));
      for (int log2 = 0; log2 <= most_packed(c); ++log2) {
        DeviceCase on(c, false, nullptr, log2);
        std::vector<float> lse;
        on.forward(c, lse);
        EXPECT_EQ(judge_forward(c, expected, c.out.to_doubles(), lse), "")
            << (1 << log2) << " heads a tile";
        EXPECT_TRUE(on.intact()) << c.describe();
      }
    }
  }
}

TEST_F(Forward, AThousandRunsAreBitIdentical) {
  RandomCaseOptions options = plain(DType::kBF16, 128);
  options.long_share = 1;
  RandomCase c = random_case(3, options);
  DeviceCase on(c, false);
  std::vector<float> first_lse;
  on.forward(c, first_lse);
  const auto first = bytes_of(c.out);
  for (int run = 1; run < 1000; ++run) {
    std::vector<float> lse;
    on.forward(c, lse);
    ASSERT_EQ(bytes_of(c.out), first) << "run " << run;
    ASSERT_EQ(std::memcmp(lse.data(), first_lse.data(), lse.size() * sizeof(float)), 0);
  }
}

TEST_F(Forward, WhatAWorkspaceHoldsDoesNotMatter) {
  RandomCaseOptions options = plain(DType::kBF16, 128);
  options.long_share = 1;
  RandomCase c = random_case(5, options);
  DeviceCase on(c, false);
  std::vector<float> lse;
  on.forward(c, lse);
  const auto expected = bytes_of(c.out);
  std::mt19937 random(1);
  for (int run = 0; run < 200; ++run) {
    // Lengths and positions, as freed int32 tensors leave them, or anything.
    std::array<std::uint32_t, 4> words{};
    for (std::uint32_t& word : words) {
      word = static_cast<std::uint32_t>(random()) >> (run % 2 == 0 ? 21 : 0);
    }
    on.workspace.upload(words.data(), sizeof words);
    on.forward(c, lse);
    ASSERT_EQ(bytes_of(c.out), expected) << "run " << run;
  }
}

TEST_F(Forward, ATreeAloneIsBitIdenticalToItAmongOthers) {
  int compared = 0;
  for (std::uint64_t seed = 600; seed < 640; ++seed) {
    RandomCase c = random_case(seed, plain(DType::kBF16, 128));
    if (c.batch() < 2) continue;
    DeviceCase packed(c, false);
    std::vector<float> lse;
    packed.forward(c, lse);
    for (int b = 0; b < c.batch(); ++b) {
      RandomCase one = alone(c, b);
      DeviceCase on(one, false);
      std::vector<float> one_lse;
      on.forward(one, one_lse);
      ASSERT_EQ(judge_same_rows(one, one_lse, 0, one.total_q, c, lse, c.cu_q[b]), "");
      ++compared;
    }
  }
  EXPECT_GT(compared, 40);
}

TEST_F(Forward, FiniteGarbageInUnseenTokensChangesNoBit) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    const RandomCase sound = several_trees(dtype);
    for (const double share : {0.1, 0.5, 1.0}) {
      RandomCase clean = sound;
      std::vector<float> clean_lse;
      DeviceCase(clean, false).forward(clean, clean_lse);
      RandomCase dirty = sound;
      const int rows = sound.cu_q[2] - sound.cu_q[1];
      const int row = sound.cu_q[1] + static_cast<int>(share * (rows - 1));
      ASSERT_GT(spoil_unseen(dirty, 1, row, finite_garbage(dtype)), 0);
      std::vector<float> dirty_lse;
      DeviceCase(dirty, false).forward(dirty, dirty_lse);
      ASSERT_EQ(judge_same_rows(dirty, dirty_lse, row, 1, clean, clean_lse, row), "");
    }
  }
}

TEST_F(Forward, NonFiniteNumbersStayInsideTheirSequence) {
  for (const double poison : {std::nan(""), static_cast<double>(-kMinusInfinity)}) {
    RandomCase c = several_trees(DType::kBF16);
    RandomCase clean = c;
    std::vector<float> clean_lse;
    DeviceCase(clean, false).forward(clean, clean_lse);
    spoil(c.q, c.cu_q[1], c.cu_q[2], poison);
    spoil(c.k, c.cu_k[1], c.cu_k[2], poison);
    spoil(c.v, c.cu_k[1], c.cu_k[2], poison);
    std::vector<float> lse;
    DeviceCase(c, false).forward(c, lse);
    const int after = c.cu_q[2];
    ASSERT_EQ(judge_same_rows(c, lse, 0, c.cu_q[1], clean, clean_lse, 0), "");
    ASSERT_EQ(judge_same_rows(c, lse, after, c.total_q - after, clean, clean_lse, after), "");
  }
}

TEST_F(Forward, AnInvalidTreeIsNaNAndOnlyThat) {
  RandomCaseOptions options = plain(DType::kBF16, 64);
  options.lowering = Lowering::kTree;
  int tried = 0;
  for (std::uint64_t seed = 700; tried < 5; ++seed) {
    RandomCase c = random_case(seed, options);
    if (c.batch() < 2 || c.cu_q[1] < 8 || c.cu_q.back() == c.cu_q[1]) continue;
    ++tried;
    const std::vector<int> valid = c.start;
    for (int log2 = 0; log2 <= most_packed(c); ++log2) {
      c.start = valid;
      DeviceCase sound(c, false, nullptr, log2);
      std::vector<float> lse;
      sound.forward(c, lse);
      const std::vector<double> before = c.out.to_doubles();
      c.start[4] = 1 << 20;
      c.start[5] = 0;
      DeviceCase on(c, false, nullptr, log2);
      const PlanReport report = gpu_engine().validate(on.plan(), on.plan_buffer());
      EXPECT_FALSE(report.valid);
      EXPECT_EQ(report.bad_sequences, 1);
      EXPECT_EQ(report.first_bad_token, 5) << report.message;
      on.forward(c, lse);
      const std::vector<double> after = c.out.to_doubles();
      const std::size_t row = static_cast<std::size_t>(c.heads) * c.head_dim_v;
      for (std::size_t n = 0; n < after.size(); ++n) {
        if (n < c.cu_q[1] * row) {
          ASSERT_TRUE(std::isnan(after[n])) << n;
        } else {
          ASSERT_EQ(after[n], before[n]) << n;
        }
      }
    }
  }
}

TEST_F(Forward, TokensPastTheLastSequenceAreZeroAndMinusInfinity) {
  int tried = 0;
  for (std::uint64_t seed = 800; tried < 10; ++seed) {
    RandomCase c = random_case(seed, plain(DType::kF16, 80));
    if (c.total_q == c.cu_q.back()) continue;
    ++tried;
    for (int log2 = 0; log2 <= most_packed(c); ++log2) {
      DeviceCase on(c, false, nullptr, log2);
      std::vector<float> lse;
      on.forward(c, lse);
      for (int t = c.cu_q.back(); t < c.total_q; ++t) {
        for (int h = 0; h < c.heads; ++h) {
          ASSERT_EQ(lse[static_cast<std::size_t>(h) * c.total_q + t], kMinusInfinity);
          for (int d = 0; d < c.head_dim_v; ++d) ASSERT_EQ(c.out.get(t, h, d), 0.0);
        }
      }
    }
  }
}

// 65,536 tokens of 320 heads of 128: q holds more than 2^31 elements.
TEST_F(Forward, OffsetsBeyond32BitsAreRight) {
  constexpr int kTokens = 1 << 16;
  constexpr int kHeads = 320;
  constexpr int kDim = 128;
  constexpr std::int64_t kStride = std::int64_t{kHeads} * kDim;
  const std::size_t bytes = static_cast<std::size_t>(kTokens) * kStride * 2;
  static_assert(std::int64_t{kTokens} * kStride > (std::int64_t{1} << 31));
  // Every token of a short pattern repeats, so that the host can keep one period.
  constexpr int kPeriod = 512;
  HostTensor pattern(DType::kBF16, kPeriod, kHeads, kDim);
  SplitMix64 rng(5);
  for (int t = 0; t < kPeriod; ++t) {
    for (int h = 0; h < kHeads; ++h) {
      for (int d = 0; d < kDim; ++d) pattern.set(t, h, d, 2 * rng.uniform() - 1);
    }
  }
  DeviceBuffer q;
  DeviceBuffer out;
  try {
    q = DeviceBuffer(bytes);
    out = DeviceBuffer(bytes);
  } catch (const Error& error) {
    GTEST_SKIP() << "needs " << 2 * bytes << " free bytes: " << error.what();
  }
  for (int t = 0; t < kTokens; t += kPeriod) {
    const auto* from = static_cast<const std::byte*>(pattern.data());
    q.upload(std::span(from, pattern.size_bytes()), static_cast<std::size_t>(t) * kStride * 2);
  }
  std::vector<int> cu{0};
  for (int t = 0; t < kTokens; t += kPeriod) cu.push_back(t + kPeriod);
  const DeviceBuffer device_cu = DeviceBuffer::copy_of(cu);
  const Shape shape{DType::kBF16, kHeads, kHeads, kDim};
  const Plan plan =
      gpu_engine().plan_for(kTokens, kTokens, static_cast<int>(cu.size()) - 1, {&shape, 1});
  DeviceBuffer buffer(plan_bytes(plan));
  PlanInputs inputs;
  inputs.lowering = Lowering::kCausal;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = device_cu.as<int>();
  gpu_engine().build_plan(plan, inputs, buffer.as<int>());
  ForwardArgs args;
  args.heads = args.heads_kv = kHeads;
  args.head_dim = kDim;
  args.q = args.k = args.v = {q.as(), kStride, kDim};
  args.out = {out.as(), kStride, kDim};
  args.softmax_scale = 0.1;
  args.plan = &plan;
  args.plan_buffer = buffer.as<int>();
  const GuardedBuffer workspace = forward_workspace();
  args.workspace = workspace.as();
  args.workspace_bytes = kForwardWorkspaceBytes;
  gpu_engine().forward(args);
  // Every sequence is the same: the last, beyond 2^31 elements, must repeat the first bit by bit.
  const std::size_t chunk = static_cast<std::size_t>(kPeriod) * kStride;
  const auto first = out.download<std::uint16_t>(chunk, 0);
  const auto last = out.download<std::uint16_t>(chunk, bytes - chunk * 2);
  EXPECT_EQ(first, last);
  OracleCase problem;
  problem.rule = Lowering::kCausal;
  problem.heads = problem.heads_kv = kHeads;
  problem.head_dim = problem.head_dim_v = kDim;
  problem.softmax_scale = 0.1;
  problem.total_q = problem.total_k = kPeriod;
  problem.cu_q = problem.cu_k = {0, kPeriod};
  problem.q = problem.k = problem.v = pattern.to_doubles();
  HostTensor got(DType::kBF16, kPeriod, kHeads, kDim);
  std::memcpy(got.data(), last.data(), got.size_bytes());
  for (const int row : {0, 17, 300, 511}) {
    for (const int head : {0, 7, kHeads - 1}) {
      std::vector<double> expected;
      oracle_row(problem, row, head, expected);
      for (int d = 0; d < kDim; ++d) EXPECT_NEAR(got.get(row, head, d), expected[d], 6e-3);
    }
  }
}

}  // namespace
}  // namespace treeattn::testing
