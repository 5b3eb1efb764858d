#include "runtime/cuda/nvrtc.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "runtime/cuda/nvrtc_search.h"
#include "tests/support/fake_nvrtc.h"
#include "tests/support/temp_dir.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;
using test::FakeNvrtc;
using test::TempDir;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::MatchesRegex;
using testing::Not;

NvrtcPlaces nowhere() {
  NvrtcPlaces places;
  places.loader = false;
  return places;
}

class NvrtcSearchTest : public testing::Test {
 protected:
  std::string make_folder(const std::string& name) const {
    fs::create_directories(folder_ / name);
    return (folder_ / name).string();
  }
  /// A library that loads but is no NVRTC.
  void make_impostor(const std::string& path) const {
    fs::create_directories((folder_ / path).parent_path());
    fs::create_symlink("/proc/self/exe", folder_ / path);
  }
  std::vector<std::string> relative(const std::vector<fs::path>& folders) const {
    std::vector<std::string> names;
    for (const fs::path& f : folders)
      names.push_back(f.lexically_relative(folder_.path()).string());
    return names;
  }

  TempDir folder_;
};

TEST_F(NvrtcSearchTest, LooksIntoToolkitsThenNewerVersionsFirst) {
  for (const char* name : {"home/lib64", "home/lib", "opt/cuda-12.6/lib64", "opt/cuda-12.10/lib64",
                           "opt/cuda-13.0/lib", "opt/other/lib64"}) {
    make_folder(name);
  }
  NvrtcPlaces places = nowhere();
  places.toolkits = {(folder_ / "home").string(), (folder_ / "absent").string()};
  places.versioned_toolkits = (folder_ / "opt").string();
  EXPECT_THAT(relative(nvrtc_folders(places)),
              ElementsAre("home/lib64", "home/lib", "opt/cuda-13.0/lib", "opt/cuda-12.10/lib64",
                          "opt/cuda-12.6/lib64"));
}

TEST_F(NvrtcSearchTest, LooksIntoPythonEnvironments) {
  for (const char* name : {"env/lib/python3.9/site-packages/nvidia/cuda_nvrtc/lib",
                           "env/lib/python3.12/site-packages/nvidia/cu13/lib",
                           "env/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib",
                           "env/lib/python2.7/site-packages/nvidia/cuda_nvrtc/lib"}) {
    make_folder(name);
  }
  NvrtcPlaces places = nowhere();
  places.python_prefixes = {(folder_ / "env").string(), (folder_ / "env").string()};
  EXPECT_THAT(relative(nvrtc_folders(places)),
              ElementsAre("env/lib/python3.12/site-packages/nvidia/cu13/lib",
                          "env/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib",
                          "env/lib/python3.9/site-packages/nvidia/cuda_nvrtc/lib", "env/lib"));
}

TEST_F(NvrtcSearchTest, ANamedFolderIsLookedThrough) {
  make_impostor("named/lib64/libnvrtc.so.12");
  const std::string named = (folder_ / "named").string();
  EXPECT_THAT(nvrtc_named_candidates(named), ElementsAre(named + "/lib64/libnvrtc.so.12"));
  EXPECT_THAT(nvrtc_named_candidates("/x/libnvrtc.so.13"), ElementsAre("/x/libnvrtc.so.13"));
  EXPECT_THAT(nvrtc_named_candidates(make_folder("empty")),
              ElementsAre((folder_ / "empty/libnvrtc.so.13").string()));
}

TEST_F(NvrtcSearchTest, SaysWhatWasTried) {
  NvrtcPlaces places = nowhere();
  places.toolkits = {(folder_ / "home").string()};
  const std::string empty = make_folder("home/lib64");
  std::string tried;
  EXPECT_EQ(open_nvrtc(places, tried), nullptr);
  EXPECT_EQ(tried, empty + ": no libnvrtc in it");
}

TEST_F(NvrtcSearchTest, ANamedLibraryIsTheOnlyOne) {
  NvrtcPlaces places = NvrtcPlaces::from_environment();
  places.named = "/no/such/libnvrtc.so.13";
  std::string tried;
  EXPECT_EQ(open_nvrtc(places, tried), nullptr);
  EXPECT_THAT(tried, HasSubstr("/no/such/libnvrtc.so.13"));
  EXPECT_THAT(tried, Not(HasSubstr("\n")));
}

TEST_F(NvrtcSearchTest, AnUnfitLibraryIsNamed) {
  NvrtcPlaces places = nowhere();
  places.named = "libm.so.6";
  std::string tried;
  EXPECT_EQ(open_nvrtc(places, tried), nullptr);
  EXPECT_THAT(tried, HasSubstr("libm.so.6: it has no nvrtcVersion"));
}

TEST(Nvrtc, AFakeTakesItsPlace) {
  const FakeNvrtc fake(12, 6, 85);
  EXPECT_EQ(&nvrtc(), &fake.table);
  EXPECT_EQ(nvrtc_version(nvrtc()), "12.6.85");
  EXPECT_EQ(fake.live_programs(), 0);
}

TEST(Nvrtc, TheFileNameTellsTheBuild) {
  const TempDir folder;
  test::write_text(folder / "libnvrtc.so.13.0.77", "");
  fs::create_symlink("libnvrtc.so.13.0.77", folder / "libnvrtc.so.13");
  FakeNvrtc fake(13, 0, 88);
  fake.table.path = (folder / "libnvrtc.so.13").string();
  EXPECT_EQ(nvrtc_version(fake.table), "13.0.77");
  fs::rename(folder / "libnvrtc.so.13.0.77", folder / "libnvrtc.so.13.0");
  fs::remove(folder / "libnvrtc.so.13");
  fake.table.path = (folder / "libnvrtc.so.13.0").string();
  EXPECT_EQ(nvrtc_version(fake.table), "13.0.88") << "asked, as the name does not tell";
}

TEST(Nvrtc, TheRealOneTellsItsVersionAndTargets) {
  std::string why;
  const NvrtcTable* const table = try_nvrtc(&why);
  if (table == nullptr) GTEST_SKIP() << "no NVRTC here:\n" << why;
  EXPECT_EQ(&nvrtc(), table);
  EXPECT_GE(table->major, 12);
  EXPECT_TRUE(fs::exists(table->path)) << table->path;
  const std::string version = nvrtc_version(*table);
  EXPECT_THAT(version, MatchesRegex("[0-9]+\\.[0-9]+\\.[1-9][0-9]*"));
  EXPECT_EQ(nvrtc_version(*table), version);
  const std::vector<int> archs = nvrtc_supported_archs(*table);
  EXPECT_THAT(archs, Contains(80));
  EXPECT_THAT(archs, Contains(90));
}

}  // namespace
}  // namespace treeattn
