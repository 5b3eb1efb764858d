// The engine on the CPU, and the bar that GPU results are held to: that it accepts the executor and
// refuses what is wrong.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <climits>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/forward_bar.h"
#include "treeattn/error.h"

namespace treeattn::testing {
namespace {

using ::testing::HasSubstr;

Engine cpu_engine(int threads = 2) {
  EngineOptions options;
  options.kind = EngineKind::kCpu;
  options.threads = threads;
  return Engine(options);
}

/// Plan buffers are aligned to 16 bytes.
struct alignas(16) PlanWord {
  std::int32_t ints[4];
};

/// A case's plan, built by an engine in host memory.
struct Planned {
  Plan plan;
  std::vector<PlanWord> words;

  Planned(Engine& engine, const RandomCase& c) {
    const Shape shape{c.dtype, c.heads, c.heads_kv, c.head_dim, c.head_dim_v, c.softcap > 0, false};
    plan = engine.plan_for(c.total_q, c.total_k, c.batch(), {&shape, 1});
    words.resize((plan_bytes(plan) + sizeof(PlanWord) - 1) / sizeof(PlanWord));
    engine.build_plan(plan, c.plan_inputs(), buffer());
  }
  std::int32_t* buffer() { return words.data()->ints; }
};

/// What DeviceCase does on a GPU: poisons out and lse, plans, runs.
std::vector<float> run(Engine& engine, RandomCase& c) {
  Planned planned(engine, c);
  std::vector<float> lse(static_cast<std::size_t>(c.heads) * c.total_q, std::nanf(""));
  c.out.fill(std::nan(""));
  ForwardArgs args = c.forward_args();
  args.lse = lse.data();
  args.plan = &planned.plan;
  args.plan_buffer = planned.buffer();
  engine.forward(args);
  return lse;
}

struct Refusal {
  ErrorCode code = ErrorCode::kOk;
  std::string text = "accepted";
};

template <class Call>
Refusal refusal(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  return {};
}

RandomCaseOptions gpu_like() {
  RandomCaseOptions options;
  options.long_share = 0;
  options.most_short_tokens = 400;
  options.most_heads = 4;
  return options;
}

RandomCaseOptions tree_of(DType dtype) {
  RandomCaseOptions options = gpu_like();
  options.dtype = dtype;
  options.head_dim = 64;
  options.head_dim_v = 64;
  options.softcap = false;
  options.lowering = Lowering::kTree;
  return options;
}

TEST(CpuEngine, SaysWhatItIs) {
  EXPECT_EQ(cpu_engine().kind(), EngineKind::kCpu);
  EXPECT_EQ(cpu_engine(1).description(), "CPU executor, 1 thread");
  EXPECT_EQ(cpu_engine(3).description(), "CPU executor, 3 threads");
  EXPECT_THAT(cpu_engine(0).description(), HasSubstr("CPU executor, "));
  const Refusal refused = refusal([] { cpu_engine(-2); });
  EXPECT_EQ(refused.code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(refused.text, HasSubstr("threads is -2, expected 0 (one per core) or more"));
}

TEST(CpuEngine, PlanForTakesTotalsThatFit32Bits) {
  const Engine engine = cpu_engine();
  const Shape shape{DType::kBF16, 2, 1, 64};
  const auto text = [&](std::int64_t total_q, std::int64_t total_k, int batch) {
    return refusal([&] { engine.plan_for(total_q, total_k, batch, {&shape, 1}); }).text;
  };
  EXPECT_EQ(text(0, 0, 0), "accepted");
  EXPECT_EQ(text(INT_MAX, INT_MAX, 1), "accepted");
  EXPECT_THAT(text(-1, 5, 1), HasSubstr("total_q is -1, expected 0 to 2147483647"));
  EXPECT_THAT(text(5, std::int64_t{INT_MAX} + 1, 1), HasSubstr("total_k is 2147483648"));
  EXPECT_THAT(text(5, 5, -1), HasSubstr("batch is -1"));
  EXPECT_THAT(text(5, 5, INT_MAX), HasSubstr("batch is 2147483647"));
}

TEST(CpuEngine, PlanForChecksEveryShape) {
  const Engine engine = cpu_engine();
  const Shape good{DType::kF64, 6, 2, 13, 7};
  const auto text = [&](const std::function<void(Shape&)>& change) {
    Shape bad = good;
    change(bad);
    const Shape shapes[] = {good, bad};
    const auto planning = refusal([&] { engine.plan_for(8, 8, 1, shapes); });
    Engine preparing = cpu_engine();
    EXPECT_EQ(refusal([&] { preparing.prepare(shapes); }).text, planning.text);
    const Plan plan = engine.plan_for(8, 8, 1, {&good, 1});
    EXPECT_EQ(refusal([&] { engine.forward_workspace_bytes(plan, bad); }).text, planning.text);
    return planning.text;
  };
  EXPECT_EQ(text([](Shape&) {}), "accepted");
  EXPECT_THAT(text([](Shape& s) { s.heads = 0; }), HasSubstr("heads is 0"));
  EXPECT_THAT(text([](Shape& s) { s.heads = 7; }), HasSubstr("heads is 7, expected a multiple"));
  EXPECT_THAT(text([](Shape& s) { s.head_dim = 0; }), HasSubstr("head_dim is 0"));
  EXPECT_THAT(text([](Shape& s) { s.head_dim_v = -1; }), HasSubstr("head_dim_v is -1"));
  EXPECT_THAT(text([](Shape& s) { s.dtype = static_cast<DType>(9); }), HasSubstr("dtype is 9"));
}

TEST(CpuEngine, OnePlanServesManyShapes) {
  const Engine engine = cpu_engine();
  std::vector<Shape> shapes;
  for (int dim = 16; dim <= 256; dim += 8) shapes.push_back({DType::kBF16, 4, 2, dim});
  EXPECT_EQ(engine.plan_for(100, 100, 2, shapes).num_views, 1);
  EXPECT_EQ(engine.plan_for(100, 100, 2, {}).num_views, 1);
}

TEST(CpuEngine, BuildPlanRefusesMissingAndMisalignedPointers) {
  Engine engine = cpu_engine();
  const RandomCase c = random_case(1, tree_of(DType::kBF16));
  Planned planned(engine, c);
  const auto text = [&](const PlanInputs& inputs, std::int32_t* buffer) {
    return refusal([&] { engine.build_plan(planned.plan, inputs, buffer); }).text;
  };
  EXPECT_EQ(text(c.plan_inputs(), planned.buffer()), "accepted");
  EXPECT_THAT(text(c.plan_inputs(), nullptr),
              HasSubstr("buffer is null, expected plan_bytes(plan) = " +
                        std::to_string(plan_bytes(planned.plan)) + " bytes"));
  EXPECT_THAT(text(c.plan_inputs(), planned.buffer() + 1), HasSubstr("aligned to 16 bytes"));
  PlanInputs inputs = c.plan_inputs();
  inputs.tree_dfs_order_end_k = nullptr;
  EXPECT_THAT(text(inputs, planned.buffer()), HasSubstr("tree_dfs_order_end_k is null"));
  inputs = c.plan_inputs();
  inputs.lowering = static_cast<Lowering>(-1);
  EXPECT_THAT(text(inputs, planned.buffer()), HasSubstr("lowering is -1"));
  Plan foreign = planned.plan;
  foreign.version = 77;
  EXPECT_THAT(refusal([&] { engine.build_plan(foreign, c.plan_inputs(), planned.buffer()); }).text,
              HasSubstr("plan.version is 77"));
}

/// Two trees of ten tokens.
RandomCase two_chains() {
  RandomCase c;
  c.dtype = DType::kF32;
  c.head_dim = c.head_dim_v = 8;
  c.total_q = c.total_k = 20;
  c.cu_q = c.cu_k = {0, 10, 20};
  c.start.assign(20, 0);
  c.end.assign(20, 0);
  for (int t = 5; t < 10; ++t) c.start[t] = c.end[t] = 1;
  for (int t = 0; t < 5; ++t) c.end[t] = 1;
  return c;
}

TEST(CpuEngine, ValidateNamesTheSequenceTheTokenAndTheRule) {
  Engine engine = cpu_engine();
  const auto report = [&](const std::function<void(RandomCase&)>& change) {
    RandomCase c = two_chains();
    change(c);
    Planned planned(engine, c);
    return engine.validate(planned.plan, planned.buffer());
  };
  const PlanReport good = report([](RandomCase&) {});
  EXPECT_TRUE(good.valid) << good.message;
  EXPECT_EQ(good.bad_sequences, 0);
  EXPECT_EQ(good.first_bad_token, -1);

  const PlanReport decreasing = report([](RandomCase& c) { c.start[13] = 4; });
  EXPECT_FALSE(decreasing.valid);
  EXPECT_EQ(decreasing.bad_sequences, 1);
  EXPECT_EQ(decreasing.first_bad_token, 14);
  EXPECT_THAT(decreasing.message, HasSubstr("1 of 2 sequences invalid, first sequence 1"));
  EXPECT_THAT(decreasing.message, HasSubstr("tree_dfs_order_start_q must not decrease"));
  EXPECT_THAT(decreasing.message, HasSubstr("token 14"));

  const PlanReport beyond = report([](RandomCase& c) { c.cu_k[2] = 21; });
  EXPECT_FALSE(beyond.valid);
  EXPECT_THAT(beyond.message, HasSubstr("cu_seqlens_k must start at 0"));
  const PlanReport not_zero = report([](RandomCase& c) { c.cu_q[0] = 1; });
  EXPECT_FALSE(not_zero.valid);
  EXPECT_THAT(not_zero.message, HasSubstr("cu_seqlens_q must start at 0"));

  const PlanReport interval = report([](RandomCase& c) {
    c.lowering = Lowering::kIntervals;
    c.first.assign(20, 10);
    c.len.assign(20, 3);
    for (int t = 0; t < 10; ++t) c.first[t] = 0;
    c.len[7] = 11;  // reaches into the rows of sequence 1
  });
  EXPECT_FALSE(interval.valid);
  EXPECT_EQ(interval.first_bad_token, 7);
  EXPECT_THAT(interval.message, HasSubstr("leaves the query rows"));
  EXPECT_THAT(interval.message, HasSubstr("key 7"));
}

TEST(CpuEngine, ValidateWantsABuiltPlan) {
  Engine engine = cpu_engine();
  const RandomCase c = two_chains();
  Planned planned(engine, c);
  EXPECT_THAT(refusal([&] { engine.validate(planned.plan, nullptr); }).text,
              HasSubstr("buffer is null, expected a built plan"));
  std::fill_n(planned.buffer(), plan_bytes(planned.plan) / sizeof(std::int32_t), 0);
  const PlanReport report = engine.validate(planned.plan, planned.buffer());
  EXPECT_FALSE(report.valid);
  EXPECT_THAT(report.message, HasSubstr("build_plan was not called"));
}

TEST(CpuEngine, ForwardRefusesBadArgumentsBeforeItWritesAnything) {
  Engine engine = cpu_engine();
  RandomCase c = random_case(3, tree_of(DType::kBF16));
  c.out.fill(0.5);
  const std::vector<std::byte> before = bytes_of(c.out);
  Planned planned(engine, c);
  const auto text = [&](const std::function<void(ForwardArgs&)>& change) {
    ForwardArgs args = c.forward_args();
    args.plan = &planned.plan;
    args.plan_buffer = planned.buffer();
    change(args);
    const Refusal refused = refusal([&] { engine.forward(args); });
    EXPECT_EQ(refused.code, ErrorCode::kInvalidArgument);
    return refused.text;
  };
  EXPECT_THAT(text([](ForwardArgs& a) { a.heads = 0; }), HasSubstr("heads is 0"));
  EXPECT_THAT(text([](ForwardArgs& a) { a.softmax_scale = 0; }), HasSubstr("softmax_scale is 0"));
  EXPECT_THAT(text([](ForwardArgs& a) { a.v.data = nullptr; }), HasSubstr("v.data is null"));
  EXPECT_THAT(text([](ForwardArgs& a) { a.plan_buffer = nullptr; }), HasSubstr("plan_buffer"));
  std::fill_n(planned.buffer(), kPlanMetaInts, 0);
  EXPECT_THAT(text([](ForwardArgs&) {}), HasSubstr("plan"));
  EXPECT_EQ(bytes_of(c.out), before);
}

TEST(CpuEngine, NeedsNoKernelsAndNoWorkspace) {
  Engine engine = cpu_engine();
  const Shape shape{DType::kF32, 2, 1, 24};
  const Plan plan = engine.plan_for(9, 9, 1, {&shape, 1});
  EXPECT_TRUE(engine.prepare({&shape, 1}).empty());
  EXPECT_EQ(engine.forward_workspace_bytes(plan, shape), 0U);
  EXPECT_EQ(engine.stats().launches, 0U);
  EXPECT_EQ(engine.stats().compiles, 0U);
}

TEST(CpuEngine, CanBeMovedAndSharedBetweenThreads) {
  Engine first = cpu_engine();
  Engine engine = std::move(first);
  RandomCase c = random_case(5, tree_of(DType::kF16));
  const std::vector<float> lse = run(engine, c);
  std::vector<RandomCase> copies(4, c);
  std::vector<std::vector<float>> results(copies.size());
  {
    std::vector<std::jthread> threads;
    for (std::size_t n = 0; n < copies.size(); ++n) {
      threads.emplace_back([&, n] { results[n] = run(engine, copies[n]); });
    }
  }
  for (std::size_t n = 0; n < copies.size(); ++n) {
    EXPECT_EQ(judge_same_rows(copies[n], results[n], 0, c.total_q, c, lse, 0), "");
  }
}

// The same harness as on a GPU, on cases of the same composition.
TEST(ForwardBar, TheExecutorPassesOnRandomCases) {
  Engine engine = cpu_engine(0);
  int softcaps = 0;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    RandomCase c = random_case(seed, gpu_like());
    const std::vector<float> lse = run(engine, c);
    const OracleResult expected = oracle_forward(c.oracle(), emulation_of(c.dtype));
    ASSERT_EQ(judge_forward(c, expected, c.out.to_doubles(), lse), "");
    softcaps += c.softcap > 0 ? 1 : 0;
  }
  EXPECT_GT(softcaps, 10);
}

TEST(ForwardBar, TheEmulationPassesItsOwnBar) {
  for (std::uint64_t seed = 200; seed < 240; ++seed) {
    const RandomCase c = random_case(seed, gpu_like());
    const OracleResult expected = oracle_forward(c.oracle(), emulation_of(c.dtype));
    const std::vector<float> lse(expected.lse.begin(), expected.lse.end());
    ASSERT_EQ(judge_forward(c, expected, expected.emulated_out, lse), "");
  }
}

/// One long causal case per type, exact results at hand to be spoilt.
class SpoiltResults : public ::testing::TestWithParam<DType> {
 protected:
  SpoiltResults() {
    RandomCaseOptions options = tree_of(GetParam());
    options.lowering = Lowering::kCausal;
    options.most_short_tokens = 500;
    for (std::uint64_t seed = 0;; ++seed) {
      c_ = random_case(seed, options);
      if (c_.batch() == 1 && c_.cu_q == c_.cu_k && c_.cu_q[1] > 350) break;
    }
    expected_ = oracle_forward(c_.oracle(), emulation_of(c_.dtype));
    out_ = expected_.emulated_out;
    lse_.assign(expected_.lse.begin(), expected_.lse.end());
  }
  std::string judge() const { return judge_forward(c_, expected_, out_, lse_); }
  /// Index of (row, head, 0) in out.
  std::size_t at(int row, int head) const {
    return (static_cast<std::size_t>(row) * c_.heads + head) * c_.head_dim_v;
  }

  RandomCase c_;
  OracleResult expected_;
  std::vector<double> out_;
  std::vector<float> lse_;
};

TEST_P(SpoiltResults, AreAcceptedBeforeTheyAreSpoilt) {
  EXPECT_EQ(judge(), "");
}

TEST_P(SpoiltResults, AZeroedRowIsNoticed) {
  std::fill_n(out_.begin() + static_cast<std::ptrdiff_t>(at(250, c_.heads - 1)), c_.head_dim_v, 0);
  EXPECT_THAT(judge(), HasSubstr("the worst vector is above"));
}

TEST_P(SpoiltResults, ADroppedKeyIsNoticed) {
  OracleCase without = c_.oracle();
  without.rule = Lowering::kIntervals;
  without.first.resize(c_.total_k);
  without.len.resize(c_.total_k);
  for (int j = 0; j < c_.cu_k[1]; ++j) {
    without.first[j] = j;
    without.len[j] = c_.cu_q[1] - j;
  }
  ++without.first[100];  // the row of key 100 no longer sees it
  --without.len[100];
  const OracleResult wrong = oracle_forward(without, emulation_of(c_.dtype));
  out_ = wrong.emulated_out;
  EXPECT_THAT(judge(), HasSubstr("the worst vector is above"));
  out_ = expected_.emulated_out;
  lse_.assign(wrong.lse.begin(), wrong.lse.end());
  EXPECT_THAT(judge(), HasSubstr("lse is above"));
}

TEST_P(SpoiltResults, OneWrongElementIsNoticed) {
  out_[at(200, 0) + 5] += 0.05;
  EXPECT_THAT(judge(), HasSubstr("above"));
}

TEST_P(SpoiltResults, PoisonThatWasNotOverwrittenIsNoticed) {
  out_[at(c_.cu_q[1] - 1, 0)] = std::nan("");
  EXPECT_THAT(judge(), HasSubstr("rel_l2 is above"));
  out_ = expected_.emulated_out;
  lse_[7] = std::nanf("");
  EXPECT_THAT(judge(), HasSubstr("lse is above"));
  lse_[7] = kMinusInfinity;
  EXPECT_THAT(judge(), HasSubstr("lse is above"));
}

TEST_P(SpoiltResults, ACoarserTypeIsNoticed) {
  // bf16 probabilities where f16 is due; where bf16 is due, two bits less.
  for (double& x : out_) {
    const double step =
        std::exp2(std::floor(std::log2(std::abs(x) + 1e-30)) - (c_.dtype == DType::kF16 ? 7 : 5));
    x = std::round(x / step) * step;
  }
  EXPECT_THAT(judge(), HasSubstr("rel_l2 is above"));
}

INSTANTIATE_TEST_SUITE_P(BothTypes, SpoiltResults, ::testing::Values(DType::kF16, DType::kBF16),
                         [](const auto& p) { return p.param == DType::kF16 ? "f16" : "bf16"; });

TEST(ForwardBar, TheCountProbeIsExact) {
  Engine engine = cpu_engine(0);
  for (std::uint64_t seed = 400; seed < 430; ++seed) {
    RandomCaseOptions options = gpu_like();
    options.softcap = false;
    RandomCase c = random_case(seed, options);
    apply_count_probe(c);
    std::vector<float> lse = run(engine, c);
    ASSERT_EQ(judge_count_probe(c, lse), "");
    // Another mask: one key more for one row, where there is one.
    if (c.cu_q.back() == 0) continue;
    const std::size_t row = static_cast<std::size_t>(c.cu_q.back()) - 1;
    const double count = std::exp(double{lse[row]});
    lse[row] = static_cast<float>(std::log(count + 1));
    ASSERT_THAT(judge_count_probe(c, lse), HasSubstr("keys (lse"));
  }
}

TEST(ForwardBar, TheBitsProbeTellsOneKeyFromAnother) {
  Engine engine = cpu_engine(0);
  int noticed = 0;
  for (std::uint64_t seed = 500; seed < 520; ++seed) {
    RandomCaseOptions options = tree_of(DType::kF16);
    options.head_dim = options.head_dim_v = 32;
    RandomCase c = random_case(seed, options);
    apply_bits_probe(c);
    run(engine, c);
    ASSERT_EQ(judge_bits_probe(c), "");
    if (c.cu_q.back() < 2 || c.cu_k.back() < 2) continue;
    // The same count of keys, one of them its neighbour: as a mask shifted by one would give.
    RandomCase shifted = c;
    for (int t = 0; t < c.cu_k.back(); ++t) {
      for (int h = 0; h < c.heads_kv; ++h) {
        for (int d = 0; d < 32; ++d) shifted.v.set(t, h, d, static_cast<double>((t + 1) >> d & 1));
      }
    }
    run(engine, shifted);
    shifted.v = c.v;
    noticed += judge_bits_probe(shifted).empty() ? 0 : 1;
  }
  EXPECT_GT(noticed, 10);
}

TEST(ForwardBar, ATreeAloneIsBitIdenticalToItAmongOthers) {
  Engine engine = cpu_engine();
  int compared = 0;
  for (std::uint64_t seed = 600; seed < 640; ++seed) {
    RandomCaseOptions options = gpu_like();
    options.dtype = DType::kBF16;
    RandomCase c = random_case(seed, options);
    if (c.batch() < 2) continue;
    const std::vector<float> lse = run(engine, c);
    for (int b = 0; b < c.batch(); ++b) {
      RandomCase one = alone(c, b);
      std::vector<float> one_lse = run(engine, one);
      ASSERT_EQ(judge_same_rows(one, one_lse, 0, one.total_q, c, lse, c.cu_q[b]), "");
      ++compared;
      if (one.total_q == 0) continue;
      one_lse.back() = std::nextafter(one_lse.back(), 100.0F);
      ASSERT_THAT(judge_same_rows(one, one_lse, 0, one.total_q, c, lse, c.cu_q[b]),
                  HasSubstr("lse of row"));
    }
  }
  EXPECT_GT(compared, 40);
}

TEST(ForwardBar, GarbageIsUnseenAndNonFiniteNumbersStayInTheirSequence) {
  Engine engine = cpu_engine(0);
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    RandomCase clean = several_trees(dtype);
    const std::vector<float> clean_lse = run(engine, clean);
    const int row0 = clean.cu_q[1];
    const int after = clean.cu_q[2];
    RandomCase dirty = clean;
    const int row = after - 1;
    ASSERT_GT(spoil_unseen(dirty, 1, row, finite_garbage(dtype)), 0);
    std::vector<float> lse = run(engine, dirty);
    EXPECT_EQ(judge_same_rows(dirty, lse, row, 1, clean, clean_lse, row), "");
    EXPECT_NE(judge_same_rows(dirty, lse, row0, after - row0, clean, clean_lse, row0), "");

    dirty = clean;
    spoil(dirty.q, row0, after, std::nan(""));
    spoil(dirty.k, dirty.cu_k[1], dirty.cu_k[2], std::nan(""));
    spoil(dirty.v, dirty.cu_k[1], dirty.cu_k[2], std::nan(""));
    lse = run(engine, dirty);
    EXPECT_EQ(judge_same_rows(dirty, lse, 0, row0, clean, clean_lse, 0), "");
    const int rest = clean.total_q - after;
    EXPECT_EQ(judge_same_rows(dirty, lse, after, rest, clean, clean_lse, after), "");
    EXPECT_NE(judge_same_rows(dirty, lse, row0, after - row0, clean, clean_lse, row0), "");
  }
}

TEST(EngineTest, APlanFromIntervalsIsThatOfTheLoweringItSpellsOut) {
  Engine engine = cpu_engine();
  const std::int32_t cu_seqlens[] = {0, 40, 100};
  std::vector<std::int32_t> first(100), len(100);
  for (int j = 0; j < 100; ++j) {
    first[j] = j < 40 ? 0 : 40;
    len[j] = j < 40 ? 40 : 60;
  }
  const Shape shape{DType::kF32, 1, 1, 16};
  const Plan plan = engine.plan_for(100, 100, 2, {&shape, 1});
  std::vector<PlanWord> full(plan_bytes(plan) / sizeof(PlanWord) + 1);
  std::vector<PlanWord> spelt(full.size());
  PlanInputs inputs;
  inputs.lowering = Lowering::kFull;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = cu_seqlens;
  engine.build_plan(plan, inputs, full.data()->ints);
  engine.plan_from_intervals(plan, cu_seqlens, cu_seqlens, first.data(), len.data(),
                             spelt.data()->ints);
  EXPECT_EQ(std::memcmp(full.data(), spelt.data(), plan_bytes(plan)), 0);

  len[50] = 70;  // beyond its sequence
  engine.plan_from_intervals(plan, cu_seqlens, cu_seqlens, first.data(), len.data(),
                             spelt.data()->ints);
  const PlanReport report = engine.validate(plan, spelt.data()->ints);
  EXPECT_FALSE(report.valid);
  EXPECT_EQ(report.first_bad_token, 50);
  try {
    engine.plan_from_intervals(plan, cu_seqlens, cu_seqlens, nullptr, len.data(),
                               spelt.data()->ints);
    ADD_FAILURE() << "a missing array was accepted";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("first is null"));
  }
}

}  // namespace
}  // namespace treeattn::testing
