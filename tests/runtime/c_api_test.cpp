// The C API: struct versions, null arguments, status codes, the last error's text, and a whole
// forward pass on the CPU engine.
#include "treeattn/treeattn_c.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/oracle_backward.h"
#include "treeattn/treeattn.h"

namespace treeattn::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr int kTokens = 7;
constexpr int kHeads = 2;
constexpr int kDim = 4;

/// The README's tree, smaller: a prompt and three responses, in f64 on the CPU.
struct Problem {
  std::vector<std::int32_t> cu{0, kTokens};
  std::vector<std::int32_t> start{0, 0, 1, 1, 2, 2, 3};
  std::vector<std::int32_t> end{3, 3, 1, 1, 2, 2, 3};
  std::vector<double> q, k, v, out;
  std::vector<float> lse;

  Problem() : out(kTokens * kHeads * kDim, NAN), lse(kTokens * kHeads, NAN) {
    for (int n = 0; n < kTokens * kHeads * kDim; ++n) {
      q.push_back(std::sin(n));
      k.push_back(std::cos(3 * n));
      v.push_back(std::sin(7 * n + 1));
    }
  }
  OracleCase oracle() const {
    OracleCase c;
    c.heads = c.heads_kv = kHeads;
    c.head_dim = c.head_dim_v = kDim;
    c.softmax_scale = 0.5;
    c.total_q = c.total_k = kTokens;
    c.cu_q = c.cu_k = cu;
    c.start = start;
    c.end = end;
    c.q = q;
    c.k = k;
    c.v = v;
    return c;
  }
};

treeattn_tensor tensor(std::vector<double>& values) {
  return {values.data(), kHeads * kDim, kDim};
}

class CApi : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(treeattn_engine_create(TREEATTN_CPU, 2, &engine_), TREEATTN_OK);
    shape_.dtype = TREEATTN_F64;
    shape_.heads = shape_.heads_kv = kHeads;
    shape_.head_dim = kDim;
    ASSERT_EQ(treeattn_plan_for(engine_, kTokens, kTokens, 1, &shape_, 1, &plan_), TREEATTN_OK);
    std::size_t bytes = 0;
    ASSERT_EQ(treeattn_plan_bytes(&plan_, &bytes), TREEATTN_OK);
    buffer_ = static_cast<std::int32_t*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16));
    inputs_.cu_seqlens_q = inputs_.cu_seqlens_k = problem_.cu.data();
    inputs_.tree_dfs_order_start_q = problem_.start.data();
    inputs_.tree_dfs_order_end_k = problem_.end.data();
    ASSERT_EQ(treeattn_build_plan(engine_, &plan_, &inputs_, buffer_, nullptr), TREEATTN_OK);
    std::memset(&args_, 0, sizeof args_);
    args_.struct_size = sizeof args_;
    args_.dtype = TREEATTN_F64;
    args_.heads = args_.heads_kv = kHeads;
    args_.head_dim = kDim;
    args_.q = tensor(problem_.q);
    args_.k = tensor(problem_.k);
    args_.v = tensor(problem_.v);
    args_.out = tensor(problem_.out);
    args_.lse = problem_.lse.data();
    args_.softmax_scale = 0.5;
    args_.plan = &plan_;
    args_.plan_buffer = buffer_;
  }
  void TearDown() override {
    treeattn_engine_destroy(engine_);
    std::free(buffer_);
  }

  /// The text of a call that must fail with this status.
  static std::string error(treeattn_status expected, treeattn_status status) {
    EXPECT_EQ(status, expected) << treeattn_last_error();
    return treeattn_last_error();
  }
  static std::string invalid(treeattn_status status) {
    return error(TREEATTN_INVALID_ARGUMENT, status);
  }

  treeattn_engine* engine_ = nullptr;
  treeattn_shape shape_ = TREEATTN_SHAPE_INIT;
  treeattn_plan plan_{};
  treeattn_plan_inputs inputs_ = TREEATTN_PLAN_INPUTS_INIT;
  treeattn_forward_args args_{};
  std::int32_t* buffer_ = nullptr;
  Problem problem_;
};

TEST_F(CApi, AWholeForwardAgreesWithTheOracle) {
  ASSERT_EQ(treeattn_prepare(engine_, &shape_, 1), TREEATTN_OK) << treeattn_last_error();
  std::size_t workspace = 1;
  ASSERT_EQ(treeattn_forward_workspace_bytes(engine_, &plan_, &shape_, &workspace), TREEATTN_OK);
  EXPECT_EQ(workspace, 0U);
  ASSERT_EQ(treeattn_forward(engine_, &args_, nullptr), TREEATTN_OK) << treeattn_last_error();
  const OracleResult expected = oracle_forward(problem_.oracle());
  for (std::size_t n = 0; n < expected.out.size(); ++n) {
    EXPECT_NEAR(problem_.out[n], expected.out[n], 1e-13) << n;
  }
  for (std::size_t n = 0; n < expected.lse.size(); ++n) {
    EXPECT_NEAR(problem_.lse[n], expected.lse[n], 1e-6) << n;
  }
}

TEST_F(CApi, EveryFieldOfForwardArrives) {
  const auto run = [&] {
    std::ranges::fill(problem_.out, NAN);
    std::ranges::fill(problem_.lse, NAN);
    EXPECT_EQ(treeattn_forward(engine_, &args_, nullptr), TREEATTN_OK) << treeattn_last_error();
    return problem_.out;
  };
  const std::vector<double> plain = run();
  args_.softcap = 0.3;
  EXPECT_NE(run(), plain);
  args_.softcap = 0;
  args_.softmax_scale = 2;
  EXPECT_NE(run(), plain);
  args_.softmax_scale = 0.5;
  args_.heads_kv = 1;
  EXPECT_NE(run(), plain) << "head 1 reads head 0's keys";
  args_.heads_kv = kHeads;
  args_.lse = nullptr;
  EXPECT_EQ(run(), plain);
  EXPECT_TRUE(std::isnan(problem_.lse[0])) << "lse was not wanted";
  args_.head_dim_v = kDim / 2;
  const std::vector<double> half = run();
  EXPECT_EQ(half[1], plain[1]);
  EXPECT_TRUE(std::isnan(half[kDim - 1]));
}

TEST_F(CApi, AWholeBackwardAgreesWithTheOracle) {
  ASSERT_EQ(treeattn_forward(engine_, &args_, nullptr), TREEATTN_OK);
  std::vector<double> dout(problem_.q.size());
  std::vector<double> dq(dout.size(), NAN);
  std::vector<double> dk = dq;
  std::vector<double> dv = dq;
  for (std::size_t n = 0; n < dout.size(); ++n) dout[n] = std::cos(static_cast<double>(n) + 2);
  treeattn_backward_args back{};
  back.struct_size = sizeof back;
  back.dtype = TREEATTN_F64;
  back.heads = back.heads_kv = kHeads;
  back.head_dim = kDim;
  back.q = args_.q;
  back.k = args_.k;
  back.v = args_.v;
  back.out = args_.out;
  back.dout = tensor(dout);
  back.dq = tensor(dq);
  back.dk = tensor(dk);
  back.dv = tensor(dv);
  back.lse = args_.lse;
  back.softmax_scale = 0.5;
  back.plan = &plan_;
  back.plan_buffer = buffer_;
  shape_.backward = 1;
  std::size_t bytes = 1;
  ASSERT_EQ(treeattn_backward_workspace_bytes(engine_, &plan_, &shape_, 1, &bytes), TREEATTN_OK);
  ASSERT_EQ(treeattn_backward(engine_, &back, nullptr), TREEATTN_OK) << treeattn_last_error();
  const Gradients expected = oracle_backward(problem_.oracle(), dout, {});
  for (std::size_t n = 0; n < dq.size(); ++n) {
    EXPECT_NEAR(dq[n], expected.dq[n], 1e-6) << n;
    EXPECT_NEAR(dk[n], expected.dk[n], 1e-6) << n;
    EXPECT_NEAR(dv[n], expected.dv[n], 1e-6) << n;
  }
  back.dv.data = nullptr;
  EXPECT_THAT(invalid(treeattn_backward(engine_, &back, nullptr)), HasSubstr("dv.data is null"));
  back.struct_size = 16;
  EXPECT_THAT(invalid(treeattn_backward(engine_, &back, nullptr)),
              HasSubstr("args.struct_size is 16"));
}

TEST_F(CApi, TheVersionIsTheHeaders) {
  EXPECT_EQ(treeattn_version(), TREEATTN_VERSION);
}

TEST_F(CApi, NullArgumentsAreNamed) {
  std::size_t bytes = 0;
  treeattn_plan_report report{};
  report.struct_size = sizeof report;
  treeattn_stats stats{};
  stats.struct_size = sizeof stats;
  const auto named = [](treeattn_status status, const char* name) {
    EXPECT_EQ(invalid(status), std::string(name) + " is null");
  };
  treeattn_engine* const none = nullptr;
  named(treeattn_engine_create(TREEATTN_CPU, 0, nullptr), "engine");
  named(treeattn_engine_description(engine_, nullptr, 10), "text");
  char text[8];
  named(treeattn_engine_description(none, text, sizeof text), "engine");
  named(treeattn_plan_for(none, 1, 1, 1, &shape_, 1, &plan_), "engine");
  named(treeattn_plan_for(engine_, 1, 1, 1, nullptr, 1, &plan_), "shapes");
  named(treeattn_plan_for(engine_, 1, 1, 1, &shape_, 1, nullptr), "plan");
  named(treeattn_plan_bytes(nullptr, &bytes), "plan");
  named(treeattn_plan_bytes(&plan_, nullptr), "bytes");
  named(treeattn_build_plan(none, &plan_, &inputs_, buffer_, nullptr), "engine");
  named(treeattn_build_plan(engine_, nullptr, &inputs_, buffer_, nullptr), "plan");
  named(treeattn_build_plan(engine_, &plan_, nullptr, buffer_, nullptr), "inputs");
  named(treeattn_validate(none, &plan_, buffer_, nullptr, &report), "engine");
  named(treeattn_validate(engine_, nullptr, buffer_, nullptr, &report), "plan");
  named(treeattn_validate(engine_, &plan_, buffer_, nullptr, nullptr), "report");
  named(treeattn_forward_workspace_bytes(engine_, &plan_, nullptr, &bytes), "shape");
  named(treeattn_forward_workspace_bytes(engine_, &plan_, &shape_, nullptr), "bytes");
  named(treeattn_forward(none, &args_, nullptr), "engine");
  named(treeattn_forward(engine_, nullptr, nullptr), "args");
  named(treeattn_backward_workspace_bytes(engine_, nullptr, &shape_, 0, &bytes), "plan");
  named(treeattn_backward(engine_, nullptr, nullptr), "args");
  named(treeattn_prepare(none, &shape_, 1), "engine");
  named(treeattn_prepare(engine_, nullptr, 2), "shapes");
  named(treeattn_get_stats(none, &stats), "engine");
  named(treeattn_get_stats(engine_, nullptr), "stats");
  args_.plan = nullptr;
  named(treeattn_forward(engine_, &args_, nullptr), "plan");
  EXPECT_THAT(invalid(treeattn_build_plan(engine_, &plan_, &inputs_, nullptr, nullptr)),
              HasSubstr("buffer is null"));
  EXPECT_THAT(invalid(treeattn_validate(engine_, &plan_, nullptr, nullptr, &report)),
              HasSubstr("buffer is null"));
  treeattn_engine_destroy(nullptr);
}

TEST_F(CApi, StructsOfAnOlderVersionAreRefused) {
  std::size_t bytes = 0;
  const auto refused = [](treeattn_status status, const char* name) {
    EXPECT_THAT(invalid(status),
                StartsWith(std::string(name) + ".struct_size is 8, expected at least "));
  };
  shape_.struct_size = 8;
  refused(treeattn_plan_for(engine_, 1, 1, 1, &shape_, 1, &plan_), "shapes");
  refused(treeattn_prepare(engine_, &shape_, 1), "shapes");
  refused(treeattn_forward_workspace_bytes(engine_, &plan_, &shape_, &bytes), "shape");
  inputs_.struct_size = 8;
  refused(treeattn_build_plan(engine_, &plan_, &inputs_, buffer_, nullptr), "inputs");
  args_.struct_size = 8;
  refused(treeattn_forward(engine_, &args_, nullptr), "args");
  treeattn_plan_report report{};
  report.struct_size = 8;
  refused(treeattn_validate(engine_, &plan_, buffer_, nullptr, &report), "report");
  treeattn_stats stats{};
  stats.struct_size = 8;
  refused(treeattn_get_stats(engine_, &stats), "stats");
  plan_.struct_size = 8;
  refused(treeattn_plan_bytes(&plan_, &bytes), "plan");
}

// Fields that a later version appends stay unknown to this one.
TEST_F(CApi, StructsOfALaterVersionAreAccepted) {
  struct LaterShape {
    treeattn_shape known;
    std::int32_t more[6];
  };
  LaterShape shapes[2] = {{shape_, {1, 2, 3}}, {shape_, {4, 5, 6}}};
  for (LaterShape& later : shapes) later.known.struct_size = sizeof later;
  shapes[1].known.heads = 3;
  treeattn_plan plan{};
  EXPECT_THAT(invalid(treeattn_plan_for(engine_, 5, 5, 1, &shapes[0].known, 2, &plan)),
              HasSubstr("heads is 3, expected a multiple of heads_kv = 2"));
  shapes[1].known.heads = 4;
  EXPECT_EQ(treeattn_plan_for(engine_, 5, 5, 1, &shapes[0].known, 2, &plan), TREEATTN_OK);
  struct {
    treeattn_forward_args known;
    std::int64_t more[4];
  } later{args_, {9, 9, 9, 9}};
  later.known.struct_size = sizeof later;
  EXPECT_EQ(treeattn_forward(engine_, &later.known, nullptr), TREEATTN_OK);
  EXPECT_FALSE(std::isnan(problem_.out[0]));
}

TEST_F(CApi, EngineCreateNamesWhatItRefuses) {
  auto* engine = reinterpret_cast<treeattn_engine*>(&plan_);
  // Legal in C only: UndefinedBehaviorSanitizer (which comes with AddressSanitizer here) objects.
#if !defined(__SANITIZE_ADDRESS__)
  const auto kind = std::bit_cast<treeattn_engine_kind>(5U);
  EXPECT_EQ(invalid(treeattn_engine_create(kind, 0, &engine)),
            "kind is 5, expected 0 (CUDA) or 1 (CPU)");
  EXPECT_EQ(engine, nullptr) << "nothing to destroy is left behind";
  engine = reinterpret_cast<treeattn_engine*>(&plan_);
#endif
  EXPECT_THAT(invalid(treeattn_engine_create(TREEATTN_CPU, -1, &engine)),
              HasSubstr("threads is -1"));
  EXPECT_EQ(engine, nullptr);
}

TEST_F(CApi, EnumsOutOfRangeAreRefused) {
  shape_.dtype = 4;
  EXPECT_THAT(invalid(treeattn_plan_for(engine_, 1, 1, 1, &shape_, 1, &plan_)),
              HasSubstr("dtype is 4, expected 0 (f16)"));
  args_.dtype = -1;
  EXPECT_THAT(invalid(treeattn_forward(engine_, &args_, nullptr)), HasSubstr("dtype is -1"));
  inputs_.lowering = 4;
  EXPECT_THAT(invalid(treeattn_build_plan(engine_, &plan_, &inputs_, buffer_, nullptr)),
              HasSubstr("lowering is 4"));
}

TEST_F(CApi, AnInvalidTreeIsAReportNotAnError) {
  treeattn_plan_report report{};
  report.struct_size = sizeof report;
  ASSERT_EQ(treeattn_validate(engine_, &plan_, buffer_, nullptr, &report), TREEATTN_OK);
  EXPECT_EQ(report.valid, 1);
  EXPECT_EQ(report.bad_sequences, 0);
  EXPECT_EQ(report.first_bad_token, -1);
  EXPECT_STREQ(report.message, "");
  problem_.start[3] = 9;
  ASSERT_EQ(treeattn_build_plan(engine_, &plan_, &inputs_, buffer_, nullptr), TREEATTN_OK);
  std::memset(report.message, 'x', sizeof report.message);
  ASSERT_EQ(treeattn_validate(engine_, &plan_, buffer_, nullptr, &report), TREEATTN_OK);
  EXPECT_EQ(report.valid, 0);
  EXPECT_EQ(report.bad_sequences, 1);
  EXPECT_EQ(report.first_bad_token, 4);
  EXPECT_THAT(std::string(report.message, strnlen(report.message, sizeof report.message)),
              HasSubstr("token 4"));
  ASSERT_EQ(treeattn_forward(engine_, &args_, nullptr), TREEATTN_OK);
  for (const double x : problem_.out) EXPECT_TRUE(std::isnan(x));
}

TEST_F(CApi, TextsAreCutToTheBufferAndTerminated) {
  char text[6];
  std::memset(text, 'x', sizeof text);
  ASSERT_EQ(treeattn_engine_description(engine_, text, sizeof text), TREEATTN_OK);
  EXPECT_STREQ(text, "CPU e");
  text[0] = 'x';
  ASSERT_EQ(treeattn_engine_description(engine_, text, 0), TREEATTN_OK);
  EXPECT_EQ(text[0], 'x') << "nothing may be written to no bytes";
  char whole[100];
  ASSERT_EQ(treeattn_engine_description(engine_, whole, sizeof whole), TREEATTN_OK);
  EXPECT_STREQ(whole, "CPU executor, 2 threads");
}

TEST_F(CApi, TheLastErrorBelongsToItsThread) {
  EXPECT_EQ(invalid(treeattn_forward(engine_, nullptr, nullptr)), "args is null");
  std::string other;
  std::thread([&] {
    EXPECT_STREQ(treeattn_last_error(), "");
    treeattn_prepare(nullptr, nullptr, 0);
    other = treeattn_last_error();
  }).join();
  EXPECT_EQ(other, "engine is null");
  EXPECT_STREQ(treeattn_last_error(), "args is null");
}

TEST_F(CApi, ThePlansHeaderIsTheCppOne) {
  EngineOptions options;
  options.kind = EngineKind::kCpu;
  const Engine engine(options);
  const Shape shape{DType::kF64, kHeads, kHeads, kDim};
  const Plan plan = engine.plan_for(kTokens, kTokens, 1, {&shape, 1});
  ASSERT_EQ(sizeof plan, sizeof plan_);
  EXPECT_EQ(std::memcmp(&plan, &plan_, sizeof plan), 0);
  std::size_t bytes = 0;
  ASSERT_EQ(treeattn_plan_bytes(&plan_, &bytes), TREEATTN_OK);
  EXPECT_EQ(bytes, plan_bytes(plan));
}

TEST_F(CApi, RowsArePackedIntoAPrefixForest) {
  const std::vector<std::int64_t> tokens{7, 8, 9, 7, 8, 5, 3};
  const std::vector<std::int64_t> offsets{0, 3, 6, 6, 7};
  treeattn_packed* packed = nullptr;
  ASSERT_EQ(treeattn_pack_rows(tokens.data(), offsets.data(), 4, &packed), TREEATTN_OK);
  std::int64_t count = 0;
  std::int64_t nodes = 0;
  ASSERT_EQ(treeattn_packed_size(packed, &count, &nodes), TREEATTN_OK);
  EXPECT_EQ(count, 5);
  EXPECT_EQ(nodes, 4);
  std::vector<std::int64_t> ids(5);
  std::vector<std::int64_t> positions(7);
  std::vector<std::int32_t> depths(5);
  std::vector<std::int32_t> start(5);
  std::vector<std::int32_t> end(5);
  ASSERT_EQ(treeattn_packed_copy(packed, ids.data(), depths.data(), start.data(), end.data(),
                                 positions.data()),
            TREEATTN_OK);
  for (std::size_t t = 0; t < tokens.size(); ++t) EXPECT_EQ(ids[positions[t]], tokens[t]) << t;
  EXPECT_EQ(depths, (std::vector<std::int32_t>{0, 1, 2, 2, 0}));
  EXPECT_EQ(start, (std::vector<std::int32_t>{0, 0, 1, 2, 3}));
  EXPECT_EQ(end, (std::vector<std::int32_t>{2, 2, 1, 2, 3}));
  EXPECT_EQ(treeattn_packed_copy(packed, nullptr, nullptr, nullptr, nullptr, nullptr), TREEATTN_OK);
  std::vector<std::int64_t> parents(4);
  std::vector<std::int64_t> lengths(4);
  std::vector<std::int64_t> row_nodes(4);
  ASSERT_EQ(treeattn_packed_copy_nodes(packed, parents.data(), lengths.data(), row_nodes.data()),
            TREEATTN_OK);
  EXPECT_EQ(parents, (std::vector<std::int64_t>{-1, 0, 0, -1}));
  EXPECT_EQ(lengths, (std::vector<std::int64_t>{2, 1, 1, 1}));
  EXPECT_EQ(row_nodes, (std::vector<std::int64_t>{1, 2, -1, 3}));
  EXPECT_EQ(treeattn_packed_copy_nodes(packed, nullptr, nullptr, nullptr), TREEATTN_OK);
  treeattn_packed_destroy(packed);
  treeattn_packed_destroy(nullptr);

  const std::vector<std::int64_t> bad{0, 3, 2};
  EXPECT_EQ(treeattn_pack_rows(tokens.data(), bad.data(), 2, &packed), TREEATTN_INVALID_ARGUMENT);
  EXPECT_THAT(treeattn_last_error(), HasSubstr("row_offsets[2] is 2, expected at least"));
  EXPECT_EQ(treeattn_pack_rows(nullptr, offsets.data(), 4, &packed), TREEATTN_INVALID_ARGUMENT);
  EXPECT_THAT(treeattn_last_error(), HasSubstr("tokens is null"));
}

TEST_F(CApi, WhatRowsMayShareIsAnOption) {
  const std::vector<std::int64_t> tokens{7, 8, 9, 7, 8, 9, 7, 5};
  const std::vector<std::int64_t> offsets{0, 3, 6, 8};
  const std::vector<std::int64_t> most{2, 3, 2};
  treeattn_pack_options options = TREEATTN_PACK_OPTIONS_INIT;
  const auto packed_tokens = [&] {
    treeattn_packed* packed = nullptr;
    EXPECT_EQ(treeattn_pack_rows_with_options(tokens.data(), offsets.data(), 3, &options, &packed),
              TREEATTN_OK);
    std::int64_t count = 0;
    std::int64_t nodes = 0;
    EXPECT_EQ(treeattn_packed_size(packed, &count, &nodes), TREEATTN_OK);
    treeattn_packed_destroy(packed);
    return count;
  };
  EXPECT_EQ(packed_tokens(), 4);
  options.min_shared = 2;
  EXPECT_EQ(packed_tokens(), 5);
  options.max_shared = most.data();
  EXPECT_EQ(packed_tokens(), 6);

  treeattn_packed* packed = nullptr;
  options.min_shared = 0;
  EXPECT_THAT(
      invalid(treeattn_pack_rows_with_options(tokens.data(), offsets.data(), 3, &options, &packed)),
      HasSubstr("min_shared is 0"));
  options.struct_size = 4;
  EXPECT_THAT(
      invalid(treeattn_pack_rows_with_options(tokens.data(), offsets.data(), 3, &options, &packed)),
      HasSubstr("options.struct_size is 4"));
  EXPECT_EQ(packed, nullptr);
}

TEST_F(CApi, StatsAreFilled) {
  treeattn_stats stats;
  std::memset(&stats, 0x5a, sizeof stats);
  stats.struct_size = sizeof stats;
  ASSERT_EQ(treeattn_get_stats(engine_, &stats), TREEATTN_OK);
  EXPECT_EQ(stats.launches, 0U);
  EXPECT_EQ(stats.memory_hits, 0U);
  EXPECT_EQ(stats.disk_hits, 0U);
  EXPECT_EQ(stats.compiles, 0U);
  EXPECT_EQ(stats.rejected, 0U);
  EXPECT_EQ(stats.compile_ms, 0);
  EXPECT_EQ(stats.load_ms, 0);
}

}  // namespace
}  // namespace treeattn::testing
