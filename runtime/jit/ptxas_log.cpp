#include "runtime/jit/ptxas_log.h"

#include <algorithm>
#include <charconv>
#include <optional>

namespace treeattn {

namespace {

/// Takes the next line off the text.
std::string_view take_line(std::string_view& text) {
  const std::size_t end = std::min(text.find('\n'), text.size());
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return line;
}

/// The text between a mark and a quote: "entry function 'name' for".
std::string_view quoted_after(std::string_view line, std::string_view mark) {
  const std::size_t at = line.find(mark);
  if (at == std::string_view::npos) return {};
  const std::string_view rest = line.substr(at + mark.size());
  return rest.substr(0, rest.find('\''));
}

/// The number in front of a unit: "Used 40 registers" -> 40.
std::optional<int> number_before(std::string_view line, std::string_view unit) {
  const std::size_t at = line.find(unit);
  if (at == std::string_view::npos) return std::nullopt;
  std::size_t begin = at;
  while (begin > 0 && line[begin - 1] >= '0' && line[begin - 1] <= '9') --begin;
  int value = 0;
  const auto [end, error] = std::from_chars(line.data() + begin, line.data() + at, value);
  if (error != std::errc{} || end != line.data() + at) return std::nullopt;
  return value;
}

void read_line(std::string_view line, bool own_properties, EntryFacts& entry) {
  const auto assign = [line](int& to, std::string_view unit) {
    if (const auto value = number_before(line, unit)) to = *value;
  };
  if (own_properties) {
    assign(entry.stack_bytes, " bytes stack frame");
    const auto stores = number_before(line, " bytes spill stores");
    const auto loads = number_before(line, " bytes spill loads");
    if (stores || loads) entry.spill_bytes = stores.value_or(0) + loads.value_or(0);
  }
  assign(entry.registers, " registers");
  // The whole of what a call chain needs, where ptxas says it.
  assign(entry.stack_bytes, " bytes cumulative stack size");
  assign(entry.static_smem_bytes, " bytes smem");
}

}  // namespace

int read_ptxas_log(std::string_view log, std::vector<EntryFacts>& entries) {
  int named = 0;
  EntryFacts* entry = nullptr;
  bool own_properties = false;
  while (!log.empty()) {
    const std::string_view line = take_line(log);
    if (const auto name = quoted_after(line, "Compiling entry function '"); !name.empty()) {
      const auto found = std::find_if(entries.begin(), entries.end(),
                                      [name](const EntryFacts& e) { return e.name == name; });
      entry = found != entries.end() ? &*found : nullptr;
      own_properties = false;
      if (entry != nullptr) ++named;
      continue;
    }
    if (entry == nullptr) continue;
    constexpr std::string_view kProperties = "Function properties for ";
    if (const std::size_t at = line.find(kProperties); at != std::string_view::npos) {
      // Functions that were not inlined are listed below the entry that calls them.
      own_properties = line.substr(at + kProperties.size()) == entry->name;
      continue;
    }
    read_line(line, own_properties, *entry);
  }
  return named;
}

std::string_view find_performance_warning(std::string_view log) {
  while (!log.empty()) {
    const std::string_view line = take_line(log);
    for (const std::string_view sign : {"C7508", "Potential Performance Loss"}) {
      if (line.find(sign) != std::string_view::npos) return line;
    }
  }
  return {};
}

}  // namespace treeattn
