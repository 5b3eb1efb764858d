#include "runtime/support/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace treeattn {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// Starts every test from an environment with none of the variables, and puts the old one back.
class ConfigTest : public testing::Test {
 protected:
  ConfigTest() {
    for (const EnvVar& variable : environment_table()) {
      const char* value = std::getenv(variable.name.c_str());
      if (value != nullptr) before_[variable.name] = value;
      unsetenv(variable.name.c_str());
    }
  }
  ~ConfigTest() override {
    for (const EnvVar& variable : environment_table()) {
      const auto old = before_.find(variable.name);
      if (old == before_.end()) {
        unsetenv(variable.name.c_str());
      } else {
        set(old->first.c_str(), old->second.c_str());
      }
    }
  }

  static void set(const char* name, const char* value) { setenv(name, value, 1); }

 private:
  std::map<std::string, std::string> before_;
};

TEST_F(ConfigTest, WithoutAnyVariableEverythingIsDefault) {
  const Config config = Config::from_environment();
  EXPECT_EQ(config.cache_dir, "");
  EXPECT_THAT(config.cache_path, IsEmpty());
  EXPECT_EQ(config.jit, JitPolicy::kAuto);
  EXPECT_EQ(config.capture_miss, CaptureMiss::kLoad);
  EXPECT_EQ(config.family, FamilyChoice::kAuto);
  EXPECT_EQ(config.log_level, LogLevel::kWarning);
  EXPECT_EQ(config.nvrtc_path + config.driver_path + config.dump_dir + config.template_dir, "");
  EXPECT_THAT(config.problems, IsEmpty());
}

TEST_F(ConfigTest, CacheDirFallsBackFromOwnToXdgToHome) {
  set("HOME", "/home/someone");
  EXPECT_EQ(Config::from_environment().cache_dir, "/home/someone/.cache/treeattn");
  set("XDG_CACHE_HOME", "/xdg");
  EXPECT_EQ(Config::from_environment().cache_dir, "/xdg/treeattn");
  set("TREEATTN_CACHE_DIR", "/own/folder/");
  EXPECT_EQ(Config::from_environment().cache_dir, "/own/folder");
}

TEST_F(ConfigTest, EmptyVariablesCountAsUnset) {
  set("HOME", "");
  set("XDG_CACHE_HOME", "");
  set("TREEATTN_CACHE_DIR", "");
  set("TREEATTN_JIT", "");
  const Config config = Config::from_environment();
  EXPECT_EQ(config.cache_dir, "");
  EXPECT_THAT(config.problems, IsEmpty());
}

TEST_F(ConfigTest, RelativeXdgAndHomeAreIgnoredAndListed) {
  set("XDG_CACHE_HOME", "relative/xdg");
  set("HOME", "relative/home");
  const Config config = Config::from_environment();
  EXPECT_EQ(config.cache_dir, "");
  EXPECT_THAT(config.problems,
              ElementsAre(HasSubstr("XDG_CACHE_HOME='relative/xdg'"), HasSubstr("HOME='relative")));
}

TEST_F(ConfigTest, RelativeCacheDirIsMadeAbsolute) {
  set("TREEATTN_CACHE_DIR", "some/../kernels");
  EXPECT_EQ(Config::from_environment().cache_dir,
            (std::filesystem::current_path() / "kernels").string());
}

TEST_F(ConfigTest, AnUnexpandedTildeIsIgnoredAndListed) {
  set("HOME", "/home/someone");
  set("TREEATTN_CACHE_DIR", "~/kernels");
  const Config config = Config::from_environment();
  EXPECT_EQ(config.cache_dir, "/home/someone/.cache/treeattn");
  EXPECT_THAT(config.problems, ElementsAre(HasSubstr("TREEATTN_CACHE_DIR='~/kernels'")));
}

TEST_F(ConfigTest, CachePathIsSplitAtColonsWithoutBlanksAndRepeats) {
  set("TREEATTN_CACHE_PATH", ":/opt/pack::/srv/kernels/:/opt/pack/:");
  EXPECT_THAT(Config::from_environment().cache_path, ElementsAre("/opt/pack", "/srv/kernels"));
}

TEST_F(ConfigTest, ParsesEveryChoice) {
  set("TREEATTN_JIT", "off");
  set("TREEATTN_CAPTURE_MISS", "error");
  set("TREEATTN_LOG", "debug");
  set("TREEATTN_FAMILY", "sm80");
  Config config = Config::from_environment();
  EXPECT_EQ(config.jit, JitPolicy::kOff);
  EXPECT_EQ(config.capture_miss, CaptureMiss::kError);
  EXPECT_EQ(config.log_level, LogLevel::kDebug);
  EXPECT_EQ(config.family, FamilyChoice::kSm80);
  set("TREEATTN_JIT", "force");
  set("TREEATTN_CAPTURE_MISS", "load");
  set("TREEATTN_LOG", "error");
  set("TREEATTN_FAMILY", "auto");
  config = Config::from_environment();
  EXPECT_EQ(config.jit, JitPolicy::kForce);
  EXPECT_EQ(config.capture_miss, CaptureMiss::kLoad);
  EXPECT_EQ(config.log_level, LogLevel::kError);
  EXPECT_EQ(config.family, FamilyChoice::kAuto);
  EXPECT_THAT(config.problems, IsEmpty());
}

TEST_F(ConfigTest, ABadChoiceKeepsTheDefaultAndIsListed) {
  set("TREEATTN_JIT", "on");
  set("TREEATTN_FAMILY", "sm90");
  set("TREEATTN_LOG", "Info");
  const Config config = Config::from_environment();
  EXPECT_EQ(config.jit, JitPolicy::kAuto);
  EXPECT_EQ(config.family, FamilyChoice::kAuto);
  EXPECT_EQ(config.log_level, LogLevel::kWarning);
  EXPECT_THAT(config.problems,
              ElementsAre("TREEATTN_JIT='on' is not one of auto, off, force; using auto",
                          "TREEATTN_FAMILY='sm90' is not one of auto, sm80; using auto",
                          "TREEATTN_LOG='Info' is not one of error, warning, info, debug; using "
                          "warning"));
}

TEST_F(ConfigTest, LibraryNamesStayNamesAndPathsBecomeAbsolute) {
  set("TREEATTN_NVRTC", "libnvrtc.so.13");
  set("TREEATTN_LIBCUDA", "drivers/libcuda.so.1");
  set("TREEATTN_DUMP", "/dumps");
  set("TREEATTN_TEMPLATE_DIR", "/templates");
  const Config config = Config::from_environment();
  EXPECT_EQ(config.nvrtc_path, "libnvrtc.so.13");
  EXPECT_EQ(config.driver_path,
            (std::filesystem::current_path() / "drivers/libcuda.so.1").string());
  EXPECT_EQ(config.dump_dir, "/dumps");
  EXPECT_EQ(config.template_dir, "/templates");
}

TEST_F(ConfigTest, TheProcessConfigurationIsParsedOnce) {
  const Config& first = config();
  const std::string dump = first.dump_dir;
  set("TREEATTN_DUMP", "/changed/later");
  EXPECT_EQ(&config(), &first);
  EXPECT_EQ(config().dump_dir, dump);
}

TEST_F(ConfigTest, TheTableShowsPresentValues) {
  set("TREEATTN_JIT", "nonsense");
  std::optional<EnvVar> jit;
  for (const EnvVar& variable : environment_table()) {
    EXPECT_FALSE(variable.effect.empty()) << variable.name;
    if (variable.name == "TREEATTN_JIT") jit = variable;
  }
  ASSERT_TRUE(jit);
  EXPECT_EQ(jit->value, "nonsense");
}

}  // namespace
}  // namespace treeattn
