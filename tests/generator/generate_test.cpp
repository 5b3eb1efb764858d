#include "generator/generate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <regex>
#include <set>
#include <string>

#include "generator/tile_space.h"
#include "runtime/cache/artifact.h"
#include "templates/shared/params.h"
#include "tests/support/temp_dir.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr const char* kText = "fwd/sm80@sm_90/bf16/d128v128/m128n64s2w4";

TEST(Generate, SourceIsOneTextThatOpensWithItsSpec) {
  for (const char* text : {kText, "plan/sm80@sm_90", "fwd/sm80@sm_86/f16/d72v72/softcap",
                           "bwd/sm80@sm_90/bf16/d128v128", "bwd_dq/sm80@sm_80/f16/d64v64"}) {
    const KernelSpec spec = parse_kernel_spec(text);
    const GeneratedSource source = generate(spec);
    EXPECT_EQ(source.spec, spec);
    EXPECT_THAT(source.text, StartsWith("// " + to_string(spec) + "\n"));
    EXPECT_THAT(source.text, Not(HasSubstr("#include")));
    EXPECT_THAT(source.text, Not(HasSubstr("#pragma once")));
    EXPECT_THAT(source.text, Not(HasSubstr(TREEATTN_SOURCE_DIR)));
  }
}

TEST(Generate, EntriesAreDefinedWithTheirLaunchBounds) {
  const GeneratedSource source = generate(parse_kernel_spec(kText));
  ASSERT_EQ(source.entries.size(), 1U);
  EXPECT_EQ(source.entries[0].name, "treeattn_fwd_sm80_bf16_d128v128_m128n64s2w4");
  EXPECT_EQ(source.entries[0].threads, 128);
  EXPECT_EQ(source.entries[0].smem_bytes, 99680);
  EXPECT_THAT(source.text, HasSubstr("__launch_bounds__(128, 2)\n" + source.entries[0].name + "("));
  const GeneratedSource plan = generate(parse_kernel_spec("plan/sm80@sm_90"));
  ASSERT_EQ(plan.entries.size(), 4U);
  for (const KernelEntry& entry : plan.entries) {
    EXPECT_THAT(plan.text, HasSubstr(entry.name + "("));
    EXPECT_EQ(entry.smem_bytes, 0);
  }
}

TEST(Generate, BackwardEntriesAreInLaunchOrder) {
  const GeneratedSource source =
      generate(parse_kernel_spec("bwd/sm80@sm_90/bf16/d128v128/m64n128s2w8"));
  ASSERT_EQ(source.entries.size(), 3U);
  const std::string name = "treeattn_bwd_sm80_bf16_d128v128_m64n128s2w8";
  EXPECT_EQ(source.entries[0].name, name + "_prepare");
  EXPECT_EQ(source.entries[1].name, name);
  EXPECT_EQ(source.entries[2].name, name + "_sum");
  EXPECT_THAT(source.text, HasSubstr("/*bulk_dq=*/true"));
  const GeneratedSource older =
      generate(parse_kernel_spec("bwd/sm80@sm_80/bf16/d128v128/m64n128s2w8"));
  EXPECT_THAT(older.text, HasSubstr("/*bulk_dq=*/false"));
  EXPECT_LT(older.entries[1].smem_bytes, source.entries[1].smem_bytes);
}

TEST(Generate, SourceIsTheSameEveryTime) {
  const KernelSpec spec = parse_kernel_spec(kText);
  EXPECT_EQ(generate(spec).text, generate(spec).text);
}

TEST(Generate, EverySpecHasItsOwnSource) {
  std::set<std::string> keys;
  std::size_t specs = 0;
  for (const int cc : {80, 90}) {
    for (const KernelSpec& spec :
         default_specs(Pass::kForward, {static_cast<std::uint16_t>(cc), false})) {
      keys.insert(artifact_key(generate(spec), compile_options(spec)).hex());
      ++specs;
    }
  }
  EXPECT_EQ(keys.size(), specs);
}

TEST(Generate, SourceFollowsEveryFieldOfTheSpec) {
  const std::string base = generate(parse_kernel_spec(kText)).text;
  for (const char* other :
       {"fwd/sm80@sm_80/bf16/d128v128/m128n64s2w4", "fwd/sm80@sm_90/f16/d128v128/m128n64s2w4",
        "fwd/sm80@sm_90/bf16/d120v128/m128n64s2w4", "fwd/sm80@sm_90/bf16/d128v120/m128n64s2w4",
        "fwd/sm80@sm_90/bf16/d128v128/softcap/m128n64s2w4",
        "fwd/sm80@sm_90/bf16/d128v128/m64n64s2w4", "fwd/sm80@sm_90/bf16/d128v128/m128n32s2w4",
        "fwd/sm80@sm_90/bf16/d128v128/m128n64s1w4", "fwd/sm80@sm_90/bf16/d128v128/m128n64s2w8"}) {
    EXPECT_NE(generate(parse_kernel_spec(other)).text, base) << other;
  }
}

TEST(Generate, IllegalTilesAreRefusedWithTheReason) {
  try {
    generate(parse_kernel_spec("fwd/sm80@sm_90/bf16/d128v128/m128n128s2w4"));
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_THAT(error.what(), HasSubstr("accumulators"));
  }
}

TEST(Generate, TemplateFolderReplacesTheEmbeddedTemplates) {
  const test::TempDir dir;
  fs::copy(fs::path(TREEATTN_SOURCE_DIR) / "templates", dir.path(), fs::copy_options::recursive);
  const KernelSpec spec = parse_kernel_spec(kText);
  EXPECT_EQ(generate(spec, dir.path().string()).text, generate(spec).text);
  std::ofstream(dir.path() / "kernels" / "forward_sm80.cuh", std::ios::app) << "// edited\n";
  EXPECT_THAT(generate(spec, dir.path().string()).text, HasSubstr("// edited"));
  try {
    generate(spec, (dir.path() / "nowhere").string());
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kNotFound);
  }
}

// The emitted parts, as a reader of the source meets them.
TEST(Generate, EmittedConfigIsTheGoldenOne) {
  const std::string text = generate(parse_kernel_spec(kText)).text;
  const std::size_t begin = text.find("#line 1 \"emitted/config\"");
  const std::size_t end = text.find("#line 1 \"emitted/mma\"");
  ASSERT_NE(begin, std::string::npos);
  ASSERT_LT(begin, end);
  EXPECT_EQ(
      text.substr(begin, end - begin),
      "#line 1 \"emitted/config\"\n"
      "namespace treeattn {\n"
      "__device__ constexpr ForwardConfig kConfig{\n"
      "    /*dtype=*/KernelDType::kBF16, /*head_dim=*/128, /*head_dim_v=*/128,\n"
      "    /*block_m=*/128, /*block_n=*/64, /*stages=*/2, /*warps=*/4, /*softcap=*/false};\n"
      "static_assert(kConfig.smem_bytes() == 99680, \"shared memory as the host sized it\");\n"
      "static_assert(sizeof(ForwardParams) == " +
          std::to_string(sizeof(ForwardParams)) +
          ", \"parameters as the host passes them\");\n"
          "}  // namespace treeattn\n");
}

// N follows the tile in Q K^T and head_dim_v in P V, with as many accumulators as that takes.
TEST(Generate, EmittedWarpgroupInstructionsHaveTheShapesOfTheSpec) {
  const std::string text =
      generate(parse_kernel_spec("fwd/sm90@sm_90a/f16/d192v72/m128n96s2w8b32")).text;
  EXPECT_THAT(text, HasSubstr("wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {%0, %1,"));
  EXPECT_THAT(text, HasSubstr("%46, %47}, %49, %50, p, 1, 1, 0, 0;"));
  EXPECT_THAT(text, HasSubstr("setp.ne.b32 p, %48, 0;"));
  EXPECT_THAT(text, HasSubstr("wgmma.mma_async.sync.aligned.m64n72k16.f32.f16.f16 {%0, %1,"));
  EXPECT_THAT(text, HasSubstr("%34, %35}, {%36, %37, %38, %39}, %40, 1, 1, 1, 1;"));
  EXPECT_THAT(text, HasSubstr("\"+f\"(d[47])\n"));
  EXPECT_THAT(text, Not(HasSubstr("d[48]")));
  EXPECT_THAT(text, HasSubstr("/*box_n=*/32"));
}

TEST(Generate, EmittedInstructionsAreOfTheDtype) {
  const std::string f16 = generate(parse_kernel_spec("fwd/sm80@sm_90/f16/d64v64")).text;
  const std::string bf16 = generate(parse_kernel_spec("fwd/sm80@sm_90/bf16/d64v64")).text;
  EXPECT_THAT(f16, HasSubstr("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"));
  EXPECT_THAT(f16, HasSubstr("cvt.rn.f16x2.f32"));
  EXPECT_THAT(f16, Not(HasSubstr("bf16")));
  EXPECT_THAT(bf16, HasSubstr("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"));
  EXPECT_THAT(bf16, HasSubstr("cvt.rn.bf16x2.f32"));
}

TEST(Generate, EmbeddedTextHoldsEveryTemplate) {
  EXPECT_THAT(embedded_templates_text(), HasSubstr("kernels/forward_sm80.cuh"));
  EXPECT_THAT(embedded_templates_text(), HasSubstr("kernels/forward_sm90.cuh"));
  EXPECT_THAT(embedded_templates_text(), HasSubstr("kernels/plan.cuh"));
}

}  // namespace
}  // namespace treeattn
