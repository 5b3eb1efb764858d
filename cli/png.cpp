#include "cli/png.h"

#include <algorithm>
#include <cstddef>
#include <string_view>

namespace treeattn::cli {
namespace {

std::string big_endian(std::uint32_t value) {
  std::string bytes;
  for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(value >> shift & 0xff);
  return bytes;
}

std::uint32_t crc32(std::string_view bytes) {
  std::uint32_t crc = 0xffffffff;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? 0xedb88320U : 0U);
  }
  return ~crc;
}

std::uint32_t adler32(std::string_view bytes) {
  constexpr std::uint32_t kModulus = 65521;
  std::uint32_t a = 1, b = 0;
  for (const char c : bytes) {
    a = (a + static_cast<unsigned char>(c)) % kModulus;
    b = (b + a) % kModulus;
  }
  return b << 16 | a;
}

std::string chunk(std::string_view type, std::string_view data) {
  const std::string body = std::string(type).append(data);
  return big_endian(static_cast<std::uint32_t>(data.size())) + body + big_endian(crc32(body));
}

/// One block of DEFLATE with its fixed codes (RFC 1951). Diagrams are runs of one colour, so the
/// only repetition it looks for is that of the byte before.
class Deflate {
 public:
  std::string compress(std::string_view bytes) {
    put(0b011, 3);  // the last block, fixed codes
    for (std::size_t at = 0; at < bytes.size();) {
      std::size_t run = 0;
      if (at > 0) {
        const std::size_t most = std::min(bytes.size() - at, kLongestRun);
        while (run < most && bytes[at + run] == bytes[at - 1]) ++run;
      }
      if (run >= kShortestRun) {
        put_run(static_cast<int>(run));
        at += run;
      } else {
        put_symbol(static_cast<unsigned char>(bytes[at++]));
      }
    }
    constexpr int kEndOfBlock = 256;
    put_symbol(kEndOfBlock);
    put(0, 7);  // fills the last byte
    return std::move(out_);
  }

 private:
  static constexpr std::size_t kShortestRun = 3;
  static constexpr std::size_t kLongestRun = 258;

  void put(unsigned bits, int count) {
    for (int i = 0; i < count; ++i) {
      byte_ |= (bits >> i & 1) << filled_;
      if (++filled_ < 8) continue;
      out_ += static_cast<char>(byte_);
      byte_ = 0;
      filled_ = 0;
    }
  }

  /// Codes, unlike numbers, begin with their highest bit.
  void put_code(unsigned code, int count) {
    for (int i = count - 1; i >= 0; --i) put(code >> i & 1, 1);
  }

  void put_symbol(int symbol) {
    const auto s = static_cast<unsigned>(symbol);
    if (s < 144) {
      put_code(0x30 + s, 8);
    } else if (s < 256) {
      put_code(0x190 + s - 144, 9);
    } else if (s < 280) {
      put_code(s - 256, 7);
    } else {
      put_code(0xc0 + s - 280, 8);
    }
  }

  /// The byte before, `length` times more.
  void put_run(int length) {
    if (length == static_cast<int>(kLongestRun)) {
      put_symbol(285);
    } else {
      // Symbols 257 to 264 are single lengths; every further four share one more bit each.
      int symbol = 257 + length - 3;
      int extra = 0;
      if (length > 10) {
        while ((length - 3) >> (extra + 3) != 0) ++extra;
        symbol = 261 + 4 * extra + ((length - 3) >> extra & 3);
      }
      put_symbol(symbol);
      put(static_cast<unsigned>(length - 3) & ((1U << extra) - 1), extra);
    }
    put_code(0, 5);  // distance 1
  }

  std::string out_;
  unsigned byte_ = 0;
  int filled_ = 0;
};

}  // namespace

std::string encode_png(int width, int height, std::span<const Rgb> palette,
                       const std::vector<std::uint8_t>& pixels) {
  std::string colours;
  for (const Rgb& colour : palette) colours.append(colour.begin(), colour.end());
  std::string rows;
  rows.reserve(pixels.size() + static_cast<std::size_t>(height));
  for (int y = 0; y < height; ++y) {
    rows += '\0';  // no filter
    const auto begin = pixels.begin() + std::ptrdiff_t{y} * width;
    rows.append(begin, begin + width);
  }
  // 8 bits a pixel, palette, and the only compression, filter and interlacing there are.
  constexpr std::string_view kFormat("\x08\x03\x00\x00\x00", 5);
  constexpr std::string_view kZlibHeader("\x78\x01", 2);
  return std::string("\x89PNG\r\n\x1a\n") +
         chunk("IHDR", big_endian(static_cast<std::uint32_t>(width)) +
                           big_endian(static_cast<std::uint32_t>(height)) + std::string(kFormat)) +
         chunk("PLTE", colours) +
         chunk("IDAT",
               std::string(kZlibHeader) + Deflate().compress(rows) + big_endian(adler32(rows))) +
         chunk("IEND", "");
}

}  // namespace treeattn::cli
