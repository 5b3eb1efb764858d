// Runs the built command line as a process, in an environment of its own: no driver is found, the
// cache is a temporary folder, nothing of the user's is touched.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/cuda/nvrtc.h"
#include "tests/support/child_process.h"
#include "tests/support/temp_dir.h"

namespace treeattn::test {

struct CliResult {
  int status = -1;
  std::string out;
  std::string err;

  /// Standard output, which must be one JSON document.
  nlohmann::json json() const {
    const auto document = nlohmann::json::parse(out, nullptr, false);
    EXPECT_FALSE(document.is_discarded()) << "no JSON:\n" << out << "\n" << err;
    return document;
  }
};

class Cli {
 public:
  Cli() {
    // What finding NVRTC and running under a sanitizer depend on.
    for (const char* name : {"PATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "TREEATTN_NVRTC",
                             "VIRTUAL_ENV", "ASAN_OPTIONS", "TSAN_OPTIONS", "UBSAN_OPTIONS"}) {
      if (const char* value = std::getenv(name)) set(name, value);
    }
    set("HOME", (dir_ / "home").string());
    set("TREEATTN_CACHE_DIR", cache_dir());
    set("TREEATTN_LIBCUDA", "/nonexistent/libcuda.so.1");
    set("LC_ALL", "C.UTF-8");
  }

  Cli& set(const std::string& name, const std::string& value) {
    environment_[name] = value;
    return *this;
  }
  Cli& without_nvrtc() { return set("TREEATTN_NVRTC", "/nonexistent/libnvrtc.so"); }

  /// A path in this object's folder.
  std::string path(const std::string& name) const { return (dir_ / name).string(); }
  std::string cache_dir() const { return path("cache"); }
  std::string write(const std::string& name, const std::string& text) const {
    write_text(dir_ / name, text);
    return path(name);
  }

  /// A child that runs the command line with its output in files; ends with the object.
  ChildProcess start(const std::vector<std::string>& args) const {
    return ChildProcess([&] {
      redirect(STDOUT_FILENO, "stdout");
      redirect(STDERR_FILENO, "stderr");
      return execute(args);
    });
  }
  CliResult finish(ChildProcess child) const {
    CliResult result;
    result.status = child.wait();
    result.out = read_text(dir_ / "stdout");
    result.err = read_text(dir_ / "stderr");
    return result;
  }
  CliResult run(const std::vector<std::string>& args) const { return finish(start(args)); }

 private:
  void redirect(int descriptor, const std::string& name) const {
    const int file = open(path(name).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(file, descriptor);
    close(file);
  }

  int execute(const std::vector<std::string>& args) const {
    const std::string program = TREEATTN_BINARY_DIR "/bin/treeattn";
    std::vector<std::string> texts{"treeattn"};
    texts.insert(texts.end(), args.begin(), args.end());
    std::vector<std::string> settings;
    for (const auto& [name, value] : environment_) settings.push_back(name + "=" + value);
    std::vector<char*> argv;
    for (std::string& text : texts) argv.push_back(text.data());
    argv.push_back(nullptr);
    std::vector<char*> envp;
    for (std::string& setting : settings) envp.push_back(setting.data());
    envp.push_back(nullptr);
    execve(program.c_str(), argv.data(), envp.data());
    return 98;
  }

  TempDir dir_;
  std::map<std::string, std::string> environment_;
};

/// Whether kernels can be compiled here.
inline bool has_nvrtc() {
  return try_nvrtc() != nullptr;
}

inline bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

/// A bad argument: status 2, nothing on standard output, and an error that says all of `parts`.
inline void expect_usage_error(const CliResult& result, const std::vector<std::string>& parts) {
  EXPECT_EQ(result.status, 2) << result.err;
  EXPECT_EQ(result.out, "");
  EXPECT_EQ(result.err.rfind("treeattn: ", 0), 0u) << result.err;
  for (const std::string& part : parts) {
    EXPECT_TRUE(contains(result.err, part)) << "no '" << part << "' in: " << result.err;
  }
}

}  // namespace treeattn::test
