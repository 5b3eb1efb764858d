// The order of the layers, and what each may include, read off the sources.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <regex>
#include <string>
#include <vector>

namespace treeattn {
namespace {

namespace fs = std::filesystem;

struct Include {
  std::string file;  ///< relative to the checkout
  std::string name;
  bool quoted = false;
};

std::vector<Include> includes_below(const std::string& folder) {
  static const std::regex kInclude(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"])");
  const fs::path root = TREEATTN_SOURCE_DIR;
  std::vector<Include> found;
  for (const auto& entry : fs::recursive_directory_iterator(root / folder)) {
    const std::string extension = entry.path().extension().string();
    if (extension != ".h" && extension != ".cpp" && extension != ".cuh") continue;
    std::ifstream file(entry.path());
    for (std::string line; std::getline(file, line);) {
      std::smatch match;
      if (!std::regex_search(line, match, kInclude)) continue;
      found.push_back({fs::relative(entry.path(), root).string(), match[2], match[1] == "\""});
    }
  }
  EXPECT_FALSE(found.empty()) << "no includes below " << folder;
  return found;
}

/// Lowest first; each may include itself and what comes before it.
const std::vector<std::string> kLayers = {
    "templates/shared/",  "generator/",     "runtime/support/",
    "runtime/cuda/",      "runtime/cache/", "runtime/jit/",
    "runtime/attention/", "runtime/api/",   "cli/"};

/// Index into kLayers; -1: in none.
int layer_of(const std::string& path) {
  for (std::size_t i = 0; i < kLayers.size(); ++i) {
    if (path.starts_with(kLayers[i])) return static_cast<int>(i);
  }
  return -1;
}

TEST(Layering, NoIncludeRunsAgainstTheOrder) {
  for (const char* folder : {"generator", "runtime", "cli"}) {
    for (const Include& include : includes_below(folder)) {
      if (!include.quoted || include.name.starts_with("treeattn/")) continue;
      const int from = layer_of(include.file);
      const int to = layer_of(include.name);
      EXPECT_GE(to, 0) << include.file << " includes \"" << include.name
                       << "\", which is not a path from the checkout's root to a layer";
      EXPECT_LE(to, from) << include.file << " includes \"" << include.name
                          << "\" of a higher layer";
    }
  }
}

TEST(Layering, GeneratorKnowsNeitherCudaNorTheRuntimeApi) {
  for (const Include& include : includes_below("generator")) {
    EXPECT_NE(include.name, "cuda.h") << include.file;
    EXPECT_NE(include.name, "nvrtc.h") << include.file;
    if (include.name.starts_with("treeattn/")) {
      EXPECT_EQ(include.name, "treeattn/error.h") << include.file;
    }
  }
}

TEST(Layering, PublicHeadersIncludeOnlyTheStandardLibraryAndEachOther) {
  for (const char* folder : {"runtime/include", "generator/include"}) {
    const auto is_other = [](const Include& include) {
      return include.quoted
                 ? !include.name.starts_with("treeattn/")
                 : include.name.find('/') != std::string::npos ||
                       include.name.starts_with("cuda") || include.name.starts_with("nvrtc");
    };
    for (const Include& include : includes_below(folder)) {
      EXPECT_FALSE(is_other(include)) << include.file << " includes " << include.name;
    }
  }
}

TEST(Layering, TemplatesIncludeOnlyTemplates) {
  for (const Include& include : includes_below("templates")) {
    EXPECT_TRUE(include.quoted) << include.file << " includes <" << include.name
                                << ">; kernels depend on no header outside templates/";
    const fs::path target =
        fs::path(TREEATTN_SOURCE_DIR) / fs::path(include.file).parent_path() / include.name;
    EXPECT_TRUE(fs::exists(target)) << include.file << " includes \"" << include.name << "\"";
  }
}

}  // namespace
}  // namespace treeattn
