#include "generator/kernel_spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>
#include <unordered_set>
#include <vector>

#include "generator/arch.h"
#include "generator/tile_space.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

using ::testing::HasSubstr;

std::string refusal(std::string_view text) {
  try {
    parse_kernel_spec(text);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << text;
    return error.what();
  }
  return "accepted";
}

TEST(KernelSpec, EveryDefaultSpecRoundTrips) {
  std::set<std::string> texts;
  std::unordered_set<KernelSpec, KernelSpecHash> specs;
  const auto add = [&](Pass pass, Target target) {
    for (const KernelSpec& spec : default_specs(pass, target)) {
      const std::string text = to_string(spec);
      EXPECT_EQ(parse_kernel_spec(text), spec) << text;
      EXPECT_TRUE(texts.insert(text).second) << text << " names two specs";
      EXPECT_TRUE(specs.insert(spec).second) << text;
    }
  };
  for (const ArchLimits& arch : known_targets()) {
    for (const Pass pass : {Pass::kForward, Pass::kBackward, Pass::kBackwardDq}) {
      add(pass, arch.target);
    }
  }
  add(Pass::kForward, kSm90Target);
  EXPECT_GE(texts.size(), known_targets().size() * 2 * 31);
}

TEST(KernelSpec, TextIsTheDocumentedOne) {
  KernelSpec spec;
  spec.problem.target = {90, false};
  spec.problem.head_dim = 128;
  spec.problem.head_dim_v = 64;
  spec.tile = {128, 64, 2, 4};
  EXPECT_EQ(to_string(spec), "fwd/sm80@sm_90/bf16/d128v64/m128n64s2w4");
  spec.problem.softcap = true;
  spec.problem.dtype = KernelDType::kF16;
  EXPECT_EQ(to_string(spec), "fwd/sm80@sm_90/f16/d128v64/softcap/m128n64s2w4");
  EXPECT_EQ(parse_kernel_spec(to_string(spec)), spec);
  spec.problem.family = Family::kSm90;
  spec.problem.target = {90, true};
  spec.tile = {128, 128, 2, 8, 64};
  EXPECT_EQ(to_string(spec), "fwd/sm90@sm_90a/f16/d128v64/softcap/m128n128s2w8b64");
  EXPECT_EQ(parse_kernel_spec(to_string(spec)), spec);
  KernelSpec plan;
  plan.problem.pass = Pass::kPlan;
  plan.problem.target = {90, true};
  EXPECT_EQ(to_string(plan), "plan/sm80@sm_90a");
  EXPECT_EQ(parse_kernel_spec(to_string(plan)), plan);
}

TEST(KernelSpec, TextWithoutATileMeansTheDefaultTile) {
  const KernelSpec spec = parse_kernel_spec("fwd/sm80@sm_90/bf16/d80v80");
  EXPECT_EQ(spec.tile, default_tile(spec.problem));
  const KernelSpec capped = parse_kernel_spec("fwd/sm80@sm_80/f16/d192v128/softcap");
  EXPECT_TRUE(capped.problem.softcap);
  EXPECT_EQ(capped.tile, default_tile(capped.problem));
}

TEST(KernelSpec, RefusalsNameThePart) {
  EXPECT_THAT(refusal(""), HasSubstr("''"));
  EXPECT_THAT(refusal("forward/sm80@sm_90"), HasSubstr("'forward' is not a pass"));
  EXPECT_THAT(refusal("fwd"), HasSubstr("family and target"));
  EXPECT_THAT(refusal("fwd/sm90@sm_90/bf16/d64v64"), HasSubstr("compiled for sm_90a"));
  EXPECT_THAT(refusal("bwd_dq/sm90@sm_90a/bf16/d128v128"), HasSubstr("forward and backward"));
  EXPECT_THAT(refusal("bwd/sm90@sm_90a/bf16/d64v64"), HasSubstr("expected 72 to 128"));
  EXPECT_THAT(refusal("bwd/sm90@sm_90a/bf16/d128v136"), HasSubstr("128 and 136"));
  EXPECT_THAT(refusal("bwd/sm90@sm_90a/bf16/d128v128/softcap"), HasSubstr("no softcap"));
  EXPECT_THAT(refusal("fwd/sm70@sm_90/bf16/d64v64"), HasSubstr("'sm70@sm_90'"));
  EXPECT_THAT(refusal("fwd/sm80/bf16/d64v64"), HasSubstr("'sm80'"));
  EXPECT_THAT(refusal("fwd/sm90@sm_90a/bf16/d64v64/m192n128s2w12b0"), HasSubstr("b0'"));
  EXPECT_THAT(refusal("fwd/sm80@sm_75/bf16/d64v64"), HasSubstr("sm_75"));
  EXPECT_THAT(refusal("fwd/sm80@90/bf16/d64v64"), HasSubstr("sm80@sm_90"));
  EXPECT_THAT(refusal("fwd/sm80@sm_90/fp8/d64v64"), HasSubstr("'fp8' is not a dtype"));
  EXPECT_THAT(refusal("fwd/sm80@sm_90/bf16/d64"), HasSubstr("'d64'"));
  EXPECT_THAT(refusal("fwd/sm80@sm_90/bf16/d064v64"), HasSubstr("'d064v64'"));
  EXPECT_THAT(refusal("fwd/sm80@sm_90/bf16/d64v264"), HasSubstr("'d64v264'"));
  EXPECT_THAT(refusal("fwd/sm80@sm_90/bf16/d12v64"), HasSubstr("head_dim is 12"));
  EXPECT_THAT(refusal("fwd/sm80@sm_90/bf16/d64v64/m128n64s2"), HasSubstr("'m128n64s2'"));
  EXPECT_THAT(refusal("fwd/sm80@sm_90/bf16/d64v64/m128n64s2w4/x"), HasSubstr("'x'"));
  EXPECT_THAT(refusal("fwd/sm80@sm_90/bf16/d64v64/"), HasSubstr("''"));
  EXPECT_THAT(refusal("plan/sm80@sm_90/bf16"), HasSubstr("'bf16'"));
}

TEST(KernelSpec, TargetsAreReadTheWaysPeopleWriteThem) {
  const Target sm90{90, false};
  for (const char* text : {"sm_90", "sm90", "90", "9.0"}) EXPECT_EQ(parse_target(text), sm90);
  EXPECT_EQ(parse_target("sm_90a"), (Target{90, true}));
  EXPECT_EQ(parse_target("12.0"), (Target{120, false}));
  for (const char* text : {"", "sm_", "7.5", "sm_90b", "9.", "9.00", "-90", "sm_9999", " 90"}) {
    EXPECT_THROW(parse_target(text), Error) << text;
  }
}

// Bytes flipped, inserted and removed: either a spec whose text says the same, or an Error.
TEST(KernelSpec, DamagedTextsParseToThemselvesOrAreRefused) {
  std::mt19937 random(7);
  const std::vector<std::string> seeds = {
      "fwd/sm80@sm_90/bf16/d128v128/m128n64s2w4", "fwd/sm80@sm_86/f16/d40v40/softcap/m128n64s2w4",
      "fwd/sm90@sm_90a/bf16/d64v64/m192n128s2w12b64", "plan/sm80@sm_90"};
  const std::string alphabet = "/@_0123456789abcdfmnpsvwxl-. \xff";
  int refused = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string text = seeds[random() % seeds.size()];
    for (auto edits = 1 + random() % 3; edits > 0 && !text.empty(); --edits) {
      const std::size_t at = random() % text.size();
      const char c = alphabet[random() % alphabet.size()];
      switch (random() % 3) {
        case 0:
          text[at] = c;
          break;
        case 1:
          text.insert(at, 1, c);
          break;
        default:
          text.erase(at, 1);
      }
    }
    try {
      const KernelSpec spec = parse_kernel_spec(text);
      const std::string again = to_string(spec);
      EXPECT_EQ(again.substr(0, text.size()), text);
      EXPECT_EQ(parse_kernel_spec(again), spec);
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 10000);
}

}  // namespace
}  // namespace treeattn
