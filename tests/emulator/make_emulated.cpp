// make_emulated SPEC TEMPLATES OUT: writes the source of a spec for the emulator. It is what the
// generator writes, from templates whose PTX wrappers are the emulator's, in a namespace of its own
// and without the instructions that the generator itself emits.
#include <fmt/format.h>

#include <cctype>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "generator/generate.h"

namespace treeattn {
namespace {

constexpr std::string_view kLine = "#line 1 \"";

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (std::size_t at = text.find(from); at != std::string::npos;
       at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

/// Puts `text` in place of a section, up to the next; whether there was one.
bool replace_section(std::string& source, const std::string& name, const std::string& text) {
  const std::string mark = std::string(kLine) + name + "\"\n";
  const std::size_t at = source.find(mark);
  if (at == std::string::npos) return false;
  const std::size_t end = source.find(kLine, at + mark.size());
  if (end == std::string::npos) throw std::runtime_error("section " + name + " has no end");
  source.replace(at, end - at, text);
  return true;
}

std::string read(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string make(const std::string& text, const std::string& templates) {
  const KernelSpec spec = parse_kernel_spec(text);
  GeneratedSource source = generate(spec, templates);
  std::string& body = source.text;
  if (replace_section(body, "emitted/mma", read(templates + "/emitted.cuh"))) {
    replace_section(body, "emitted/wgmma", "");
  }
  // Of a fixed size it is static; of a dynamic size the emulator has it.
  replace_all(body, "extern __shared__", "extern");
  std::string name = to_string(spec);
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  std::string entries;
  for (const KernelEntry& entry : source.entries) {
    // Two targets' kernels have the same name.
    replace_all(body, "\n" + entry.name + "(", "\n" + entry.name + "_" + name + "(");
    entries += fmt::format("    {{{}, {}, emulator::run_entry<{}_{}>}},\n", entry.threads,
                           entry.smem_bytes, entry.name, name);
  }
  return fmt::format(
      "#include \"tests/emulator/device.h\"\n"
      "#define __CUDA_ARCH__ {}0\n"
      "#define treeattn emulated_{}\n"
      "namespace treeattn {{\n"
      "unsigned char shared_memory[1];\n"
      "namespace forward {{ unsigned char shared_memory[1]; }}\n"
      "namespace backward {{ unsigned char shared_memory[1]; }}\n"
      "namespace backward_dq {{ unsigned char shared_memory[1]; }}\n"
      "}}\n"
      "{}\n"
      "static const emulator::Registration registration({{\"{}\", {{\n{}}}}});\n",
      spec.problem.target.cc, name, body, to_string(spec), entries);
}

}  // namespace
}  // namespace treeattn

int main(int argc, char** argv) {
  try {
    if (argc != 4) throw std::runtime_error("usage: make_emulated SPEC TEMPLATES OUT");
    const std::string source = treeattn::make(argv[1], argv[2]);
    std::ofstream file(argv[3]);
    file << source;
    if (!file.flush()) throw std::runtime_error(std::string("cannot write ") + argv[3]);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "make_emulated: %s\n", error.what());
    return 1;
  }
}
