// Nothing may link the driver, NVRTC or the CUDA runtime: each is opened when it is needed, so that
// a machine without it can do everything else.
#include <elf.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "tests/support/temp_dir.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;
using testing::Contains;
using testing::HasSubstr;
using testing::Not;

template <typename Record>
std::vector<Record> records(const std::string& file, std::size_t offset, std::size_t count) {
  std::vector<Record> table(count);
  if (offset > file.size() || count * sizeof(Record) > file.size() - offset) return {};
  std::memcpy(table.data(), file.data() + offset, count * sizeof(Record));
  return table;
}

/// DT_NEEDED of a 64-bit ELF file; what is not one has none.
std::vector<std::string> needed_libraries(const fs::path& path) {
  const std::string file = test::read_text(path);
  if (!file.starts_with(ELFMAG)) return {};
  const auto header = records<Elf64_Ehdr>(file, 0, 1);
  if (header.empty()) return {};
  const auto sections = records<Elf64_Shdr>(file, header[0].e_shoff, header[0].e_shnum);
  std::vector<std::string> needed;
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_DYNAMIC) continue;
    const Elf64_Shdr& strings = sections.at(section.sh_link);
    for (const Elf64_Dyn& entry :
         records<Elf64_Dyn>(file, section.sh_offset, section.sh_size / sizeof(Elf64_Dyn))) {
      if (entry.d_tag == DT_NEEDED) {
        needed.emplace_back(file.c_str() + strings.sh_offset + entry.d_un.d_val);
      }
    }
  }
  return needed;
}

void expect_free_of_cuda(const fs::path& path) {
  const std::vector<std::string> needed = needed_libraries(path);
  // Without this an unreadable file would pass.
  EXPECT_THAT(needed, Contains(HasSubstr("libc.so"))) << path;
  for (const char* library : {"libcuda", "libnvrtc", "libcudart", "libcublas", "libnvJitLink"}) {
    EXPECT_THAT(needed, Not(Contains(HasSubstr(library)))) << path;
  }
}

TEST(Linkage, TheLibraryInThisProgramNeedsNoCuda) {
  expect_free_of_cuda(fs::canonical("/proc/self/exe"));
}

TEST(Linkage, BuiltProgramsAndLibrariesNeedNoCuda) {
  int checked = 0;
  for (const char* name : {"bin/treeattn", "libtreeattn.so"}) {
    const fs::path path = fs::path(TREEATTN_BINARY_DIR) / name;
    if (!fs::exists(path)) continue;
    expect_free_of_cuda(fs::canonical(path));
    ++checked;
  }
  if (checked == 0) GTEST_SKIP() << "neither the command line nor a shared library was built";
}

}  // namespace
}  // namespace treeattn
