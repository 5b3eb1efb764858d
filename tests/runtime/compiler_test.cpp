#include "runtime/jit/compiler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "runtime/jit/ptxas_log.h"
#include "tests/support/fake_nvrtc.h"
#include "tests/support/log_capture.h"
#include "tests/support/temp_dir.h"

namespace treeattn {
namespace {

using test::fake_source;
using test::fake_spec;
using test::FakeNvrtc;
using test::files_below;
using test::LogCapture;
using test::read_text;
using test::TempDir;
using testing::HasSubstr;
using testing::Not;
using testing::SizeIs;

TEST(PtxasLog, ReadsEachEntryOnce) {
  // As NVRTC 13.0 prints it, entries in an order of its own and with a function not inlined.
  constexpr const char* kLog =
      "ptxas info    : 0 bytes gmem\n"
      "ptxas info    : Compiling entry function 'second' for 'sm_80'\n"
      "ptxas info    : Function properties for second\n"
      "ptxas         .     1728 bytes stack frame, 1704 bytes spill stores, 1864 bytes spill "
      "loads\n"
      "ptxas info    : Used 32 registers, used 0 barriers, 1800 bytes cumulative stack size, 364 "
      "bytes cmem[0]\n"
      "ptxas info    : Compile time = 76.630 ms\n"
      "ptxas info    : Function properties for _Z6helperv\n"
      "ptxas         .     16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n"
      "ptxas info    : Compiling entry function 'first' for 'sm_80'\n"
      "ptxas info    : Function properties for first\n"
      "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
      "ptxas info    : Used 255 registers, used 1 barriers, 256 bytes smem, 360 bytes cmem[0]\n";
  std::vector<EntryFacts> entries{{"first", 128, 500, 0, 0, 0, 0}, {"second", 64, 0, 0, 0, 0, 0}};
  EXPECT_EQ(read_ptxas_log(kLog, entries), 2);
  EXPECT_EQ(entries[0], (EntryFacts{"first", 128, 500, 255, 0, 0, 256}));
  EXPECT_EQ(entries[1], (EntryFacts{"second", 64, 0, 32, 1704 + 1864, 1800, 0}));
}

TEST(PtxasLog, LeavesUnnamedEntriesAlone) {
  std::vector<EntryFacts> entries{{"mine", 128, 0, 0, 0, 0, 0}};
  const std::vector<EntryFacts> before = entries;
  for (const char* log : {"", "\n\n", "Compiling entry function '", "Used 40 registers",
                          "Compiling entry function 'other' for 'sm_80'\nUsed 40 registers\n",
                          "Compiling entry function 'mine' for 'sm_80'\nUsed many registers"}) {
    read_ptxas_log(log, entries);
    EXPECT_EQ(entries, before) << log;
  }
}

class CompilerTest : public testing::Test {
 protected:
  CompileResult compile(const GeneratedSource& source) {
    return NvrtcCompiler("").compile(source, compile_options(source.spec));
  }
  LogCapture log_;
};

TEST_F(CompilerTest, MakesAnArtifactWithItsFacts) {
  FakeNvrtc fake;
  fake.spill_bytes = 8;
  const GeneratedSource source = fake_source(fake_spec(), 2);
  CompileResult result = compile(source);
  const Artifact artifact = result.take();
  EXPECT_EQ(artifact.key, artifact_key(source, compile_options(source.spec)));
  EXPECT_EQ(artifact.spec, to_string(source.spec));
  EXPECT_EQ(artifact.target, "sm_90");
  EXPECT_EQ(artifact.nvrtc, "13.0.88");
  ASSERT_THAT(artifact.entries, SizeIs(2));
  EXPECT_EQ(artifact.entries[1], (EntryFacts{"kernel_d128_1", 128, 2000, 40, 16, 8, 256}));
  EXPECT_FALSE(refuse_artifact(artifact));
  EXPECT_GT(result.ms, 0);
  EXPECT_EQ(fake.live_programs(), 0);
}

TEST_F(CompilerTest, LogOptionsFollowTheVersionAndStayOutOfTheKey) {
  const GeneratedSource source = fake_source(fake_spec());
  ArtifactKey key;
  {
    FakeNvrtc fake(13, 0);
    key = compile(source).take().key;
    EXPECT_THAT(fake.last_options(), HasSubstr("--gpu-architecture=sm_90 "));
    for (const std::string& flag : compile_options(source.spec).flags) {
      EXPECT_THAT(fake.last_options(), HasSubstr(flag + " "));
    }
    EXPECT_THAT(fake.last_options(), HasSubstr("--ptxas-options=-v --no-cache"));
  }
  FakeNvrtc fake(12, 8, 93);
  EXPECT_EQ(compile(source).take().key, key);
  EXPECT_THAT(fake.last_options(), HasSubstr("--ptxas-options=-v"));
  EXPECT_THAT(fake.last_options(), Not(HasSubstr("--no-cache")));
}

TEST_F(CompilerTest, AFailureCarriesTheLogAndTheSavedSource) {
  FakeNvrtc fake;
  fake.fail_log = "templates/kernels/x.cuh(7): error: identifier \"foo\" is undefined";
  const TempDir folder;
  const std::string dump = (folder / "deep" / "er").string();
  const GeneratedSource source = fake_source(fake_spec());
  CompileResult result = NvrtcCompiler(dump).compile(source, compile_options(source.spec));
  EXPECT_FALSE(result.artifact);
  try {
    result.take();
    FAIL() << "take() gave an artifact";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCompileFailed);
    EXPECT_THAT(error.what(), HasSubstr(fake.fail_log));
    EXPECT_THAT(error.what(), HasSubstr(to_string(source.spec)));
    const auto files = files_below(dump);
    ASSERT_THAT(files, SizeIs(2)) << "source and log";
    EXPECT_THAT(error.what(), HasSubstr(files[0].string()));
    EXPECT_EQ(read_text(files[0]), source.text);
    EXPECT_EQ(read_text(files[1]), fake.fail_log);
  }
  EXPECT_THAT(compile(source).failure, HasSubstr("set TREEATTN_DUMP"));
  EXPECT_EQ(fake.live_programs(), 0);
}

TEST_F(CompilerTest, DumpsSourceLogAndCubin) {
  const FakeNvrtc fake;
  const TempDir folder;
  const GeneratedSource source = fake_source(fake_spec());
  const CompileResult result =
      NvrtcCompiler(folder.path().string()).compile(source, compile_options(source.spec));
  const auto files = files_below(folder.path());
  ASSERT_THAT(files, SizeIs(3));
  EXPECT_EQ(files[0].extension(), ".cu");
  EXPECT_EQ(read_text(files[0]), source.text);
  const std::string cubin = read_text(files[1]);
  EXPECT_EQ(cubin.size(), result.artifact->cubin.size());
  EXPECT_EQ(files[1].extension(), ".cubin");
  EXPECT_EQ(read_text(files[2]), result.log);
}

TEST_F(CompilerTest, AnUnwritableDumpFolderIsAWarning) {
  const FakeNvrtc fake;
  const TempDir folder;
  test::write_text(folder / "file", "");
  const GeneratedSource source = fake_source(fake_spec());
  NvrtcCompiler compiler((folder / "file").string());
  EXPECT_TRUE(compiler.compile(source, compile_options(source.spec)).artifact);
  EXPECT_TRUE(compiler.compile(source, compile_options(source.spec)).artifact);
  EXPECT_EQ(log_.count("TREEATTN_DUMP="), 1u);
}

TEST_F(CompilerTest, SlowCodeIsAFailure) {
  FakeNvrtc fake;
  for (const char* code : {"C7508", "C7510", "C7512"}) {
    fake.extra_log = std::string("ptxas info : (") + code + ") Potential Performance Loss: wgmma\n";
    const CompileResult result = compile(fake_source(fake_spec()));
    EXPECT_TRUE(result.performance_warning);
    EXPECT_FALSE(result.artifact);
    EXPECT_THAT(result.failure, HasSubstr("Potential Performance Loss"));
  }
}

TEST_F(CompilerTest, CodeThatIsNoCubinIsAFailure) {
  FakeNvrtc fake;
  fake.garbage = true;
  const CompileResult result = compile(fake_source(fake_spec()));
  EXPECT_FALSE(result.artifact);
  EXPECT_EQ(result.code, ErrorCode::kCompileFailed);
  EXPECT_THAT(result.failure, HasSubstr("not a CUDA ELF image"));
}

TEST_F(CompilerTest, AnUnknownTargetIsUnsupported) {
  FakeNvrtc fake;
  fake.archs = {80, 90};
  KernelSpec spec = fake_spec();
  spec.problem.target = Target{120, false};
  const CompileResult result = compile(fake_source(spec));
  EXPECT_EQ(result.code, ErrorCode::kUnsupported);
  EXPECT_THAT(result.failure, HasSubstr("does not compile for sm_120; it knows sm_80, sm_90"));
  EXPECT_EQ(fake.compiles(), 0);
}

class RealNvrtcTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (try_nvrtc(&why) == nullptr) GTEST_SKIP() << "no NVRTC here:\n" << why;
  }
};

GeneratedSource real_source(int cc) {
  KernelSpec spec = fake_spec();
  spec.problem.target = Target{static_cast<std::uint16_t>(cc), false};
  GeneratedSource source;
  source.spec = spec;
  source.entries = {{"plain", 128, 0}, {"spilling", 128, 0}};
  source.text = R"(
extern "C" __global__ void __launch_bounds__(128) plain(float* p) {
  __shared__ float s[64];
  s[threadIdx.x % 64] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = s[(threadIdx.x + 1) % 64];
}
extern "C" __global__ void __launch_bounds__(128, 16) spilling(float* p, int n) {
  float x[64];
  for (int i = 0; i < 64; i++) x[i] = p[i * n + threadIdx.x];
  for (int r = 0; r < 9; r++)
    for (int i = 0; i < 64; i++) x[i] = x[i] * x[(i + r) % 64] + p[i];
  for (int i = 0; i < 64; i++) p[i * n + threadIdx.x] = x[i];
}
)";
  return source;
}

TEST_F(RealNvrtcTest, CompilesAndReportsForEveryTarget) {
  NvrtcCompiler compiler("");
  for (const int cc : {80, 90}) {
    const GeneratedSource source = real_source(cc);
    const CompileOptions options = compile_options(source.spec);
    CompileResult result = compiler.compile(source, options);
    ASSERT_TRUE(result.artifact) << result.failure;
    const Artifact artifact = result.take();
    EXPECT_EQ(artifact.nvrtc, nvrtc_version(nvrtc()));
    EXPECT_EQ(artifact.target, "sm_" + std::to_string(cc));
    EXPECT_GT(artifact.entries[0].registers, 0);
    EXPECT_EQ(artifact.entries[0].static_smem_bytes, 256);
    EXPECT_EQ(artifact.entries[0].spill_bytes, 0);
    EXPECT_EQ(artifact.entries[1].registers, 32);
    EXPECT_GT(artifact.entries[1].spill_bytes, 0);
    EXPECT_GT(artifact.entries[1].stack_bytes, 0);
    EXPECT_EQ(compiler.compile(source, options).take(), artifact) << "same bytes every time";
  }
}

TEST_F(RealNvrtcTest, AnErrorNamesItsLine) {
  GeneratedSource source = real_source(80);
  source.text += "#line 23 \"templates/kernels/x.cuh\"\n__device__ int f() { return foo; }\n";
  const CompileResult result = NvrtcCompiler("").compile(source, compile_options(source.spec));
  EXPECT_FALSE(result.artifact);
  EXPECT_EQ(result.code, ErrorCode::kCompileFailed);
  EXPECT_THAT(result.failure,
              HasSubstr("templates/kernels/x.cuh(23): error: identifier \"foo\" is undefined"));
}

TEST_F(RealNvrtcTest, InfoNamesVersionAndPath) {
  const CompilerInfo info = NvrtcCompiler("").info();
  EXPECT_TRUE(info.available);
  EXPECT_EQ(info.major, nvrtc().major);
  EXPECT_EQ(info.path, nvrtc().path);
  EXPECT_TRUE(nvrtc_version(nvrtc()).starts_with(info.version + "."));
}

}  // namespace
}  // namespace treeattn
