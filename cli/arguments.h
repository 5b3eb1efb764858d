// Values of options: checks and parsers whose complaints name the option, the bad value and what
// was expected. Parsers throw UsageError.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "generator/kernel_spec.h"
#include "treeattn/treeattn.h"

namespace treeattn::cli {

/// A check for CLI11: a whole number in [low, high].
CLI::Validator whole_number(std::int64_t low, std::int64_t high);
/// A check for CLI11: a number in [low, high].
CLI::Validator number(double low, double high);
/// A check for CLI11: one of these words.
CLI::Validator one_of(std::vector<std::string> words);

/// Parts between commas; empty parts are refused.
std::vector<std::string> split_list(std::string_view option, std::string_view text);

/// f16, bf16 and, where allowed, f32 and f64.
std::vector<DType> parse_dtypes(std::string_view option, std::string_view text, bool wide);
std::string_view dtype_name(DType dtype);
KernelDType kernel_dtype(DType dtype);  ///< of f16 and bf16

struct HeadDims {
  int head_dim = 0;
  int head_dim_v = 0;
  friend bool operator==(const HeadDims&, const HeadDims&) = default;
};
/// "64,192/128" or "all": every head dim that the kernels have, with the pairs that models use.
std::vector<HeadDims> parse_head_dims(std::string_view option, std::string_view text);
std::string to_string(const HeadDims& dims);  ///< 64 or 192/128

/// "500M", "2GiB", "1024": powers of 1024.
std::uint64_t parse_bytes(std::string_view option, std::string_view text);
/// "30d", "12h", "15m", "90s", in seconds.
std::int64_t parse_duration(std::string_view option, std::string_view text);

/// heads must be a multiple of heads_kv.
void check_heads(int heads, int heads_kv);

}  // namespace treeattn::cli
