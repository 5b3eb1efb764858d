#include "runtime/support/dynamic_library.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "tests/support/temp_dir.h"

namespace treeattn {
namespace {

using testing::HasSubstr;

const std::vector<std::string> kMath = {"libm.so.6"};

TEST(DynamicLibrary, OpensTheFirstCandidateThatLoadsAndRemembersTheOthers) {
  const test::TempDir folder;
  const std::string text = (folder / "text.so").string();
  test::write_text(text, "not a library");
  const std::vector<std::string> candidates = {"/nowhere/libabsent.so", text, "", "libm.so.6",
                                               "libnever-tried.so"};
  const DynamicLibrary library = DynamicLibrary::open(candidates);
  ASSERT_TRUE(library);
  EXPECT_THAT(library.path(), HasSubstr("libm.so.6"));
  ASSERT_EQ(library.failures().size(), 3u);
  EXPECT_EQ(library.failures()[0].candidate, "/nowhere/libabsent.so");
  EXPECT_THAT(library.failures()[0].reason, HasSubstr("No such file"));
  EXPECT_EQ(library.failures()[1].candidate, text);
  EXPECT_NE(library.failures()[1].reason, library.failures()[0].reason);
  EXPECT_EQ(library.failures()[2].reason, "empty name");
}

TEST(DynamicLibrary, CallsAFunctionItLookedUp) {
  const DynamicLibrary library = DynamicLibrary::open(kMath);
  double (*square_root)(double) = nullptr;
  ASSERT_TRUE(library.load(square_root, "sqrt"));
  EXPECT_EQ(square_root(9.0), 3.0);
}

TEST(DynamicLibrary, AMissingSymbolIsNull) {
  const DynamicLibrary library = DynamicLibrary::open(kMath);
  void (*function)() = [] {};
  EXPECT_FALSE(library.load(function, "treeattn_no_such_symbol"));
  EXPECT_EQ(function, nullptr);
}

TEST(DynamicLibrary, NothingOpenedIsAValueWithALineForEachCandidate) {
  const std::vector<std::string> candidates = {"/nowhere/liba.so", "libtreeattn-absent.so.1"};
  const DynamicLibrary library = DynamicLibrary::open(candidates);
  EXPECT_FALSE(library);
  EXPECT_EQ(library.path(), "");
  EXPECT_EQ(library.symbol("sqrt"), nullptr);
  const std::string text = library.failure_text();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  EXPECT_THAT(text, HasSubstr("/nowhere/liba.so"));
  EXPECT_THAT(text, HasSubstr("\nlibtreeattn-absent.so.1"));
}

TEST(DynamicLibrary, OnlyIfLoadedTakesWhatIsThereAndLoadsNothing) {
  const std::vector<std::string> present = {"libc.so.6"};
  EXPECT_TRUE(DynamicLibrary::open(present, DynamicLibrary::Mode::kOnlyIfLoaded));
  const std::vector<std::string> absent = {"libtreeattn-absent.so.1"};
  const auto library = DynamicLibrary::open(absent, DynamicLibrary::Mode::kOnlyIfLoaded);
  EXPECT_FALSE(library);
  ASSERT_EQ(library.failures().size(), 1u);
  EXPECT_FALSE(library.failures()[0].reason.empty());
}

TEST(DynamicLibrary, FunctionsOutliveTheObject) {
  // A library that nothing else in this process has open.
  const std::vector<std::string> candidates = {"libresolv.so.2", "libnsl.so.1", "libutil.so.1"};
  auto library = DynamicLibrary::open(candidates);
  if (!library) GTEST_SKIP() << "no spare library: " << library.failure_text();
  const std::vector<std::string> same = {library.path()};
  library = DynamicLibrary();
  EXPECT_TRUE(DynamicLibrary::open(same, DynamicLibrary::Mode::kOnlyIfLoaded));
}

TEST(DynamicLibrary, MovesLeaveTheSourceEmpty) {
  DynamicLibrary first = DynamicLibrary::open(kMath);
  const DynamicLibrary second = std::move(first);
  EXPECT_NE(second.symbol("sqrt"), nullptr);
  EXPECT_FALSE(first);  // NOLINT(bugprone-use-after-move): the state after a move is the point
}

}  // namespace
}  // namespace treeattn
