#include "generator/template_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "tests/support/temp_dir.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::Not;

class Templates : public ::testing::Test {
 protected:
  void write(const std::string& name, const std::string& text) {
    const fs::path path = dir_.path() / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
  }
  std::string flatten(const std::string& name) {
    return Flattener(dir_.path().string()).flatten(name);
  }
  std::string refusal(const std::string& name) {
    try {
      flatten(name);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  }

  test::TempDir dir_;
};

TEST(EmbeddedTemplates, AreTheFilesOfTheFolder) {
  const fs::path root = fs::path(TREEATTN_SOURCE_DIR) / "templates";
  std::size_t files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(root)) {
    const std::string extension = entry.path().extension().string();
    files += extension == ".h" || extension == ".cuh" ? 1 : 0;
  }
  EXPECT_EQ(embedded_templates().size(), files);
  std::string_view previous;
  for (const EmbeddedTemplate& t : embedded_templates()) {
    EXPECT_LT(previous, t.name);
    previous = t.name;
    std::ifstream file(root / t.name, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    EXPECT_EQ(text.str(), t.text) << t.name;
  }
}

TEST_F(Templates, IncludesAreInlinedOnceWithTheirPlaceMarked) {
  write("a/top.cuh", "#pragma once\n#include \"../b/low.h\"\n  #  include \"mid.cuh\"\nint top;\n");
  write("a/mid.cuh", "#include \"../b/low.h\"\nint mid;");
  write("b/low.h", "int low;\n");
  EXPECT_EQ(flatten("a/top.cuh"),
            "#line 1 \"templates/a/top.cuh\"\n\n"
            "#line 1 \"templates/b/low.h\"\nint low;\n"
            "#line 3 \"templates/a/top.cuh\"\n"
            "#line 1 \"templates/a/mid.cuh\"\n"
            "#line 2 \"templates/a/mid.cuh\"\nint mid;\n"
            "#line 4 \"templates/a/top.cuh\"\nint top;\n");
}

TEST_F(Templates, AFileIsInlinedOnceOverSeveralCalls) {
  write("a.h", "int a;\n");
  write("b.h", "#include \"a.h\"\nint b;\n");
  Flattener flattener(dir_.path().string());
  EXPECT_THAT(flattener.flatten("a.h"), HasSubstr("int a;"));
  EXPECT_THAT(flattener.flatten("b.h"), Not(HasSubstr("int a;")));
  EXPECT_EQ(flattener.flatten("a.h"), "");
}

TEST_F(Templates, TroubleNamesTheFile) {
  write("cycle.h", "#include \"other.h\"\n");
  write("other.h", "#include \"cycle.h\"\n");
  write("missing.h", "\n#include \"nowhere.h\"\n");
  write("angle.h", "int x;\n#include <cuda.h>\n");
  write("open.h", "#include \"angle.h\n");
  EXPECT_THAT(refusal("cycle.h"), HasSubstr("include each other"));
  EXPECT_THAT(refusal("missing.h"), HasSubstr("nowhere.h, included by missing.h"));
  EXPECT_THAT(refusal("angle.h"), HasSubstr("templates/angle.h:2: include <cuda.h>"));
  EXPECT_THAT(refusal("open.h"), HasSubstr("templates/open.h:1"));
  EXPECT_THAT(refusal("none.h"), HasSubstr("none.h"));
  try {
    Flattener().flatten("none.h");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInternal);
  }
}

}  // namespace
}  // namespace treeattn
