#include "generator/kernel_spec.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "generator/tile_space.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

constexpr std::array<std::pair<Pass, std::string_view>, 4> kPasses{{
    {Pass::kPlan, "plan"},
    {Pass::kForward, "fwd"},
    {Pass::kBackward, "bwd"},
    {Pass::kBackwardDq, "bwd_dq"},
}};
constexpr std::array<std::pair<KernelDType, std::string_view>, 2> kDTypes{{
    {KernelDType::kF16, "f16"},
    {KernelDType::kBF16, "bf16"},
}};
constexpr std::array<std::pair<Family, std::string_view>, 2> kFamilies{{
    {Family::kSm80, "sm80"},
    {Family::kSm90, "sm90"},
}};
constexpr std::string_view kExample = "fwd/sm80@sm_90/bf16/d128v128/m128n64s2w4";

[[noreturn]] void refuse(std::string_view text, std::string_view part, std::string_view expected) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("kernel spec '{}': '{}' is not {}", text, part, expected),
              fmt::format("a spec looks like {}", kExample));
}

/// Reads a decimal number without sign, leading zero or overflow from the front of `text`.
std::optional<int> take_number(std::string_view& text, int most) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const auto length = static_cast<std::size_t>(end - text.data());
  const bool padded = length > 1 && text.front() == '0';
  if (error != std::errc{} || text.front() == '-' || padded || value > most) return std::nullopt;
  text.remove_prefix(length);
  return value;
}

bool take_char(std::string_view& text, char wanted) {
  if (text.empty() || text.front() != wanted) return false;
  text.remove_prefix(1);
  return true;
}

/// letter-number pairs such as m128n64s2w4, all of `text`.
template <std::size_t kCount>
std::optional<std::array<int, kCount>> take_fields(std::string_view text,
                                                   const char (&letters)[kCount + 1], int most) {
  std::array<int, kCount> values{};
  for (std::size_t i = 0; i < kCount; ++i) {
    if (!take_char(text, letters[i])) return std::nullopt;
    const auto value = take_number(text, most);
    if (!value) return std::nullopt;
    values[i] = *value;
  }
  if (!text.empty()) return std::nullopt;
  return values;
}

std::optional<TileConfig> parse_tile(std::string_view text) {
  std::array<int, 5> fields{};
  if (const auto plain = take_fields<4>(text, "mnsw", 1024)) {
    std::copy(plain->begin(), plain->end(), fields.begin());
  } else if (const auto boxed = take_fields<5>(text, "mnswb", 1024); boxed && boxed->back() != 0) {
    fields = *boxed;
  } else {
    return std::nullopt;
  }
  const auto [m, n, stages, warps, box_n] = fields;
  if (stages > 255 || warps > 255) return std::nullopt;
  return TileConfig{static_cast<std::uint16_t>(m), static_cast<std::uint16_t>(n),
                    static_cast<std::uint8_t>(stages), static_cast<std::uint8_t>(warps),
                    static_cast<std::uint16_t>(box_n)};
}

std::vector<std::string_view> split(std::string_view text, char by) {
  std::vector<std::string_view> parts;
  while (true) {
    const std::size_t at = text.find(by);
    parts.push_back(text.substr(0, at));
    if (at == std::string_view::npos) return parts;
    text.remove_prefix(at + 1);
  }
}

template <class Table>
auto find_name(const Table& table, std::string_view name) {
  for (const auto& [value, text] : table) {
    if (text == name) return std::optional(value);
  }
  return decltype(std::optional(table.front().first)){};
}

}  // namespace

std::size_t KernelSpecHash::operator()(const KernelSpec& spec) const noexcept {
  const Problem& p = spec.problem;
  const TileConfig& t = spec.tile;
  std::size_t h = 0;
  const auto mix = [&h](std::uint64_t value) {
    h ^= std::hash<std::uint64_t>{}(value) + 0x9e3779b97f4a7c15ULL + (h << 6) + (h >> 2);
  };
  mix(static_cast<std::uint64_t>(p.pass) | static_cast<std::uint64_t>(p.family) << 8 |
      static_cast<std::uint64_t>(p.target.cc) << 16 |
      static_cast<std::uint64_t>(p.target.arch_specific) << 32 |
      static_cast<std::uint64_t>(p.dtype) << 40 | static_cast<std::uint64_t>(p.softcap) << 48);
  mix(static_cast<std::uint64_t>(p.head_dim) | static_cast<std::uint64_t>(p.head_dim_v) << 16 |
      static_cast<std::uint64_t>(t.block_m) << 32 | static_cast<std::uint64_t>(t.block_n) << 48);
  mix(static_cast<std::uint64_t>(t.stages) | static_cast<std::uint64_t>(t.warps) << 8 |
      static_cast<std::uint64_t>(t.box_n) << 16);
  return h;
}

std::string_view to_string(KernelDType dtype) {
  return kDTypes.at(static_cast<std::size_t>(dtype)).second;
}

std::string_view to_string(Family family) {
  return kFamilies.at(static_cast<std::size_t>(family)).second;
}

std::string to_string(const Target& target) {
  return fmt::format("sm_{}{}", target.cc, target.arch_specific ? "a" : "");
}

std::string to_string(const TileConfig& tile) {
  std::string text = fmt::format("m{}n{}s{}w{}", tile.block_m, tile.block_n,
                                 static_cast<int>(tile.stages), static_cast<int>(tile.warps));
  if (tile.box_n != 0) text += fmt::format("b{}", tile.box_n);
  return text;
}

std::string to_string(const Problem& p) {
  const std::string_view pass = kPasses.at(static_cast<std::size_t>(p.pass)).second;
  std::string text = fmt::format("{}/{}@{}", pass, to_string(p.family), to_string(p.target));
  if (p.pass == Pass::kPlan) return text;
  text += fmt::format("/{}/d{}v{}", to_string(p.dtype), p.head_dim, p.head_dim_v);
  if (p.softcap) text += "/softcap";
  return text;
}

std::string to_string(const KernelSpec& spec) {
  std::string text = to_string(spec.problem);
  if (spec.problem.pass != Pass::kPlan) text += "/" + to_string(spec.tile);
  return text;
}

Target parse_target(std::string_view text) {
  std::string_view rest = text;
  if (rest.substr(0, 3) == "sm_") {
    rest.remove_prefix(3);
  } else if (rest.substr(0, 2) == "sm") {
    rest.remove_prefix(2);
  }
  const auto number = take_number(rest, 999);
  int cc = number.value_or(0);
  if (number && take_char(rest, '.')) {
    const auto minor = take_number(rest, 9);
    cc = minor ? cc * 10 + *minor : 0;
  }
  const bool specific = take_char(rest, 'a');
  if (cc < 80 || cc > 999 || !rest.empty()) {
    throw Error(ErrorCode::kInvalidArgument, fmt::format("target '{}' is not known", text),
                "targets look like sm_80, sm_86, sm_89, sm_90 or sm_90a; 8.0 is the oldest");
  }
  return Target{static_cast<std::uint16_t>(cc), specific};
}

KernelSpec parse_kernel_spec(std::string_view text) {
  const std::vector<std::string_view> parts = split(text, '/');
  KernelSpec spec;
  Problem& p = spec.problem;
  const auto pass = find_name(kPasses, parts[0]);
  if (!pass) refuse(text, parts[0], "a pass: fwd, bwd, bwd_dq or plan");
  p.pass = *pass;
  if (parts.size() < 2) refuse(text, text, "complete: the family and target are missing");
  const std::size_t at_sign = parts[1].find('@');
  const auto family = find_name(kFamilies, parts[1].substr(0, at_sign));
  if (!family || at_sign == std::string_view::npos) {
    refuse(text, parts[1], "a family and target such as sm80@sm_90 or sm90@sm_90a");
  }
  p.family = *family;
  const std::string_view target = parts[1].substr(at_sign + 1);
  p.target = parse_target(target);
  if (to_string(p.target) != target) {
    refuse(text, parts[1], fmt::format("written {}@{}", to_string(p.family), to_string(p.target)));
  }
  if (p.pass == Pass::kPlan) {
    if (parts.size() > 2) refuse(text, parts[2], "expected: a plan spec ends with its target");
    return spec;
  }
  if (parts.size() < 4) refuse(text, text, "complete: dtype or head dims are missing");
  const auto dtype = find_name(kDTypes, parts[2]);
  if (!dtype) refuse(text, parts[2], "a dtype: f16 or bf16");
  p.dtype = *dtype;
  const auto dims = take_fields<2>(parts[3], "dv", kHeadDimMax);
  if (!dims) refuse(text, parts[3], "head dims such as d128v128, at most 256");
  p.head_dim = static_cast<std::uint16_t>((*dims)[0]);
  p.head_dim_v = static_cast<std::uint16_t>((*dims)[1]);
  std::size_t at = 4;
  if (at < parts.size() && parts[at] == "softcap") {
    p.softcap = true;
    ++at;
  }
  if (at == parts.size()) return default_spec(p);
  const auto tile = parse_tile(parts[at]);
  if (!tile) refuse(text, parts[at], "a tile such as m128n64s2w4");
  spec.tile = *tile;
  if (at + 1 != parts.size()) refuse(text, parts[at + 1], "expected: a spec ends with its tile");
  return spec;
}

}  // namespace treeattn
