// What README.md says about the code, checked against the code.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "runtime/support/config.h"

namespace treeattn {
namespace {

std::string source_file(const std::string& name) {
  std::ifstream file(std::string(TREEATTN_SOURCE_DIR) + "/" + name);
  EXPECT_TRUE(file) << name;
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Lines without their indentation, blank ones left out.
std::string normalised(const std::string& text) {
  std::istringstream lines(text);
  std::string all;
  for (std::string line; std::getline(lines, line);) {
    const std::size_t begin = line.find_first_not_of(' ');
    if (begin != std::string::npos) all += line.substr(begin) + "\n";
  }
  return all;
}

/// The contents of the fenced blocks of one language.
std::vector<std::string> code_blocks(const std::string& markdown, const std::string& language) {
  const std::string fence = "```" + language + "\n";
  std::vector<std::string> blocks;
  for (std::size_t at = markdown.find(fence); at != std::string::npos;
       at = markdown.find(fence, at)) {
    at += fence.size();
    const std::size_t end = markdown.find("```\n", at);
    blocks.push_back(markdown.substr(at, end - at));
    at = end;
  }
  return blocks;
}

TEST(Readme, CppExampleIsPartOfTheExampleApp) {
  const auto blocks = code_blocks(source_file("README.md"), "cpp");
  const std::string app = normalised(source_file("examples/forward_app/main.cpp"));
  ASSERT_FALSE(blocks.empty());
  for (const std::string& block : blocks) {
    EXPECT_NE(app.find(normalised(block)), std::string::npos)
        << "examples/forward_app/main.cpp lacks these lines of README.md:\n"
        << block;
  }
}

TEST(Readme, TableOfVariablesIsTheLibrarys) {
  const std::string readme = source_file("README.md");
  std::set<std::string> documented;
  static const std::regex kRow(R"(\n\| `([A-Z_]+)` \|)");
  for (std::sregex_iterator row(readme.begin(), readme.end(), kRow), end; row != end; ++row) {
    documented.insert((*row)[1]);
  }
  std::set<std::string> read;
  for (const EnvVar& variable : environment_table()) read.insert(variable.name);
  EXPECT_EQ(documented, read);
}

}  // namespace
}  // namespace treeattn
