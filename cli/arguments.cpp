#include "cli/arguments.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <optional>
#include <utility>

#include "cli/common.h"
#include "generator/tile_space.h"

namespace treeattn::cli {
namespace {

constexpr std::array<std::pair<std::string_view, DType>, 4> kDTypes{{
    {"f16", DType::kF16},
    {"bf16", DType::kBF16},
    {"f32", DType::kF32},
    {"f64", DType::kF64},
}};

[[noreturn]] void refuse(std::string_view option, std::string_view value,
                         std::string_view expected) {
  throw UsageError(fmt::format("{}: '{}' is not {}", option, value, expected));
}

/// All of `text` as a number without sign.
std::optional<std::uint64_t> parse_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

/// A number with a unit after it, times the unit.
std::optional<std::uint64_t> parse_scaled(
    std::string_view text,
    std::initializer_list<std::pair<std::string_view, std::uint64_t>> units) {
  const std::size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
  const auto number = parse_number(text.substr(0, digits));
  if (!number) return std::nullopt;
  const std::string_view unit = text.substr(digits);
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  for (const auto& [name, scale] : units) {
    if (unit == name && *number <= kMost / scale) return *number * scale;
  }
  return std::nullopt;
}

std::vector<HeadDims> all_head_dims() {
  std::vector<HeadDims> all;
  for (const KernelSpec& spec : default_specs(Pass::kForward, Target{})) {
    const HeadDims dims{spec.problem.head_dim, spec.problem.head_dim_v};
    if (std::find(all.begin(), all.end(), dims) == all.end()) all.push_back(dims);
  }
  return all;
}

template <class Value>
void add_once(std::vector<Value>& values, const Value& value) {
  if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
}

}  // namespace

CLI::Validator whole_number(std::int64_t low, std::int64_t high) {
  return {[low, high](std::string& text) {
            std::int64_t value = 0;
            const auto [end, error] =
                std::from_chars(text.data(), text.data() + text.size(), value);
            const bool good = error == std::errc() && end == text.data() + text.size() &&
                              value >= low && value <= high;
            return good ? std::string()
                        : fmt::format("'{}' is not a whole number from {} to {}", text, low, high);
          },
          ""};
}

CLI::Validator number(double low, double high) {
  return {[low, high](std::string& text) {
            double value = 0;
            const auto [end, error] =
                std::from_chars(text.data(), text.data() + text.size(), value);
            const bool good = error == std::errc() && end == text.data() + text.size() &&
                              value >= low && value <= high;
            return good ? std::string()
                        : fmt::format("'{}' is not a number from {:g} to {:g}", text, low, high);
          },
          ""};
}

CLI::Validator one_of(std::vector<std::string> words) {
  return {[words = std::move(words)](std::string& text) {
            if (std::find(words.begin(), words.end(), text) != words.end()) return std::string();
            return fmt::format("'{}' is not one of {}", text, fmt::join(words, ", "));
          },
          ""};
}

std::vector<std::string> split_list(std::string_view option, std::string_view text) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    if (end == begin) refuse(option, text, "a list: there is nothing before or after a comma");
    parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::vector<DType> parse_dtypes(std::string_view option, std::string_view text, bool wide) {
  std::vector<DType> dtypes;
  for (const std::string& part : split_list(option, text)) {
    const auto* const known = std::find_if(kDTypes.begin(), kDTypes.begin() + (wide ? 4 : 2),
                                           [&](const auto& entry) { return entry.first == part; });
    if (known == kDTypes.begin() + (wide ? 4 : 2)) {
      refuse(option, part, wide ? "f16, bf16, f32 or f64" : "f16 or bf16");
    }
    add_once(dtypes, known->second);
  }
  return dtypes;
}

std::string_view dtype_name(DType dtype) {
  return kDTypes.at(static_cast<std::size_t>(dtype)).first;
}

KernelDType kernel_dtype(DType dtype) {
  return dtype == DType::kF16 ? KernelDType::kF16 : KernelDType::kBF16;
}

std::vector<HeadDims> parse_head_dims(std::string_view option, std::string_view text) {
  std::vector<HeadDims> list;
  for (const std::string& part : split_list(option, text)) {
    if (part == "all") {
      for (const HeadDims& dims : all_head_dims()) add_once(list, dims);
      continue;
    }
    const std::size_t slash = part.find('/');
    const auto dim = parse_number(std::string_view(part).substr(0, slash));
    const auto dim_v =
        slash == std::string::npos ? dim : parse_number(std::string_view(part).substr(slash + 1));
    const auto good = [](const std::optional<std::uint64_t>& value) {
      return value && *value >= kHeadDimMin && *value <= kHeadDimMax && *value % kHeadDimStep == 0;
    };
    if (!good(dim) || !good(dim_v)) {
      refuse(option, part,
             fmt::format("a multiple of {} from {} to {}, two of them such as 192/128 where v "
                         "differs, or all",
                         kHeadDimStep, kHeadDimMin, kHeadDimMax));
    }
    add_once(list, {static_cast<int>(*dim), static_cast<int>(*dim_v)});
  }
  return list;
}

std::string to_string(const HeadDims& dims) {
  return dims.head_dim == dims.head_dim_v ? fmt::format("{}", dims.head_dim)
                                          : fmt::format("{}/{}", dims.head_dim, dims.head_dim_v);
}

std::uint64_t parse_bytes(std::string_view option, std::string_view text) {
  constexpr std::uint64_t kKi = 1024, kMi = kKi * kKi, kGi = kKi * kMi;
  const auto bytes = parse_scaled(text, {{"", 1},
                                         {"B", 1},
                                         {"K", kKi},
                                         {"KiB", kKi},
                                         {"M", kMi},
                                         {"MiB", kMi},
                                         {"G", kGi},
                                         {"GiB", kGi}});
  if (!bytes) refuse(option, text, "a number of bytes such as 500M or 2GiB");
  return *bytes;
}

std::int64_t parse_duration(std::string_view option, std::string_view text) {
  const auto seconds =
      parse_scaled(text, {{"s", 1}, {"m", 60}, {"h", 3600}, {"d", 86400}, {"w", 604800}});
  if (!seconds) refuse(option, text, "a time such as 90s, 15m, 12h, 30d or 4w");
  return static_cast<std::int64_t>(*seconds);
}

void check_heads(int heads, int heads_kv) {
  if (heads % heads_kv == 0) return;
  refuse("--heads", fmt::format("{}", heads),
         fmt::format("a multiple of --heads-kv, which is {}", heads_kv));
}

}  // namespace treeattn::cli
