// A writer of small palette pictures: enough for diagrams, without a library.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace treeattn::cli {

using Rgb = std::array<std::uint8_t, 3>;

/// The bytes of a PNG file. `pixels`: width * height indices into the palette of at most 256
/// colours, row by row; both sides at least 1.
std::string encode_png(int width, int height, std::span<const Rgb> palette,
                       const std::vector<std::uint8_t>& pixels);

}  // namespace treeattn::cli
