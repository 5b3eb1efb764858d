#include "cli/draw.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <string_view>
#include <utility>

#include "cli/png.h"
#include "runtime/attention/plan.h"
#include "runtime/attention/plan_cpu.h"

namespace treeattn::cli {
namespace {

/// Tokens that are drawn one by one at most.
constexpr int kMostTokensDrawn = 48;
constexpr int kMostColumns = 96;
/// A character is about twice as high as it is wide.
constexpr int kCharAspect = 2;

struct Glyphs {
  std::string_view skipped, partial, full;
  std::array<std::string_view, 3> shares;  ///< of a partial one, by thirds
};
constexpr Glyphs kAscii{".", "+", "#", {"-", "+", "*"}};
constexpr Glyphs kUnicode{"·", "▒", "█", {"░", "▒", "▓"}};

const Glyphs& glyphs(const DrawStyle& style) {
  return style.utf8 ? kUnicode : kAscii;
}

/// Begin of part n of `parts` nearly equal parts of [0, total).
int part(int total, int parts, int n) {
  return static_cast<int>(std::int64_t{total} * n / parts);
}

char node_label(int node) {
  constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
  return kLetters[static_cast<std::size_t>(node) % kLetters.size()];
}

std::string draw_tokens(const MaskPicture& picture, const std::string& labels) {
  const int n = picture.tokens();
  const auto label = [&](int token) {
    return labels.empty() ? node_label(picture.node[token]) : labels[token];
  };
  std::string text = "     ";
  for (int key = 0; key < n; ++key) text += fmt::format(" {}", label(key));
  text += "\n";
  for (int row = 0; row < n; ++row) {
    text += fmt::format(" {}   ", label(row));
    for (int key = 0; key < n; ++key) text += picture.sees(row, key) ? " #" : " .";
    text += "\n";
  }
  return text;
}

/// Class of a block of tiles: what they all are, else partial.
TileClass merged_class(const TileGrid& grid, int m0, int m1, int n0, int n1) {
  const TileClass first = grid.at(m0, n0);
  for (int m = m0; m < m1; ++m) {
    for (int n = n0; n < n1; ++n) {
      if (grid.at(m, n) != first) return TileClass::kPartial;
    }
  }
  return first;
}

template <class Name>
auto class_of(TileClass c, const Name& skipped, const Name& partial, const Name& full) {
  if (c == TileClass::kSkipped) return skipped;
  return c == TileClass::kFull ? full : partial;
}

constexpr int kSvgSide = 720;
constexpr int kMargin = 24;
constexpr int kLegendHeight = 56;
/// Tiles a side that are drawn at most; more are merged.
constexpr int kSvgTiles = 512;
constexpr std::size_t kMostShapes = 20'000;

std::string svg_tiles(const MaskPicture& picture, double scale) {
  const TileGrid& grid = picture.tiles;
  const int rows = std::min(grid.query_tiles, kSvgTiles);
  const int columns = std::min(grid.key_tiles, kSvgTiles);
  const int tokens = picture.tokens();
  std::string out;
  for (int r = 0; r < rows; ++r) {
    const int m0 = part(grid.query_tiles, rows, r);
    const int m1 = part(grid.query_tiles, rows, r + 1);
    const double y0 = m0 * picture.block_m * scale;
    const double y1 = std::min(m1 * picture.block_m, tokens) * scale;
    for (int c = 0; c < columns;) {
      const auto class_at = [&](int column) {
        return merged_class(grid, m0, m1, part(grid.key_tiles, columns, column),
                            part(grid.key_tiles, columns, column + 1));
      };
      const TileClass tile_class = class_at(c);
      const int begin = c;
      while (c < columns && class_at(c) == tile_class) ++c;
      if (tile_class == TileClass::kSkipped) continue;
      const double x0 = part(grid.key_tiles, columns, begin) * picture.block_n * scale;
      const double x1 =
          std::min(part(grid.key_tiles, columns, c) * picture.block_n, tokens) * scale;
      out += fmt::format(
          R"svg(<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/>
)svg",
          tile_class == TileClass::kFull ? "full" : "partial", x0, y0, x1 - x0, y1 - y0);
    }
  }
  return out;
}

/// Keys of a node are seen by its rows from their own position on, and by its subtree: one shape.
std::string svg_mask(const MaskPicture& picture, double scale) {
  std::string out;
  std::size_t shapes = 0;
  const int tokens = picture.tokens();
  for (int key = 0; key < tokens;) {
    const int begin = key;
    const int end = picture.first[key] + picture.len[key];
    do {
      ++key;
    } while (key < tokens && picture.first[key] == picture.first[key - 1] + 1 &&
             picture.first[key] + picture.len[key] == end);
    if (++shapes > kMostShapes) return {};
    out += fmt::format(
        R"svg(<polygon class="mask" points="{:.2f},{:.2f} {:.2f},{:.2f} {:.2f},{:.2f} {:.2f},{:.2f}"/>
)svg",
        begin * scale, picture.first[begin] * scale, key * scale,
        (picture.first[key - 1] + 1) * scale, key * scale, end * scale, begin * scale, end * scale);
  }
  return out;
}

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        // XML has no way to write other control characters.
        if (static_cast<unsigned char>(c) >= 0x20 || c == '\t' || c == '\n') out += c;
    }
  }
  return out;
}

std::string svg_legend(const MaskPicture& picture) {
  const int y = kSvgSide + 16;
  std::string out;
  int x = 0;
  for (const auto& [name, text] : {std::pair{"full", "full tile: no mask code runs"},
                                   std::pair{"partial", "partial tile: the mask is tested"},
                                   std::pair{"mask", "pairs that see each other"}}) {
    out += fmt::format(R"(<rect class="{}" x="{}" y="{}" width="14" height="14"/>)", name, x, y);
    out += fmt::format(R"svg(<text x="{}" y="{}">{}</text>
)svg",
                       x + 20, y + 12, text);
    x += 240;
  }
  out += fmt::format(
      R"svg(<text x="0" y="{}">queries down, keys to the right; tiles of {} queries x {} keys, skipped ones white</text>
)svg",
      y + 34, picture.block_m, picture.block_n);
  return out;
}

}  // namespace

MaskPicture make_picture(const Tree& tree, int block_m, int block_n) {
  std::vector<std::int32_t> start, end;
  tree.append_arrays(start, end);
  const std::int32_t cu_seqlens[] = {0, static_cast<std::int32_t>(start.size())};
  PlanShape shape{};
  shape.total_q = shape.total_k = cu_seqlens[1];
  shape.batch = 1;
  shape.num_views = 1;
  shape.views[0] = {block_m, block_n};
  PlanInputs inputs;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = cu_seqlens;
  inputs.tree_dfs_order_start_q = start.data();
  inputs.tree_dfs_order_end_k = end.data();
  std::vector<int> buffer(static_cast<std::size_t>(plan_offsets(shape).total_ints));
  build_plan_cpu(shape, inputs, buffer.data());
  const PlanReader plan(shape, buffer.data());
  MaskPicture picture;
  picture.first.assign(plan.first(), plan.first() + start.size());
  picture.len.assign(plan.len(), plan.len() + start.size());
  picture.node.assign(start.begin(), start.end());
  picture.block_m = block_m;
  picture.block_n = block_n;
  picture.tiles = tile_grid(shape, buffer.data(), 0, 0);
  return picture;
}

std::string draw_mask(const MaskPicture& picture, const DrawStyle& style,
                      const std::string& labels) {
  const int tokens = picture.tokens();
  if (tokens == 0) return "  (no tokens)\n";
  if (tokens <= kMostTokensDrawn && 2 * tokens + 7 <= style.columns) {
    return draw_tokens(picture, labels);
  }
  const int columns = std::min({tokens, kMostColumns, std::max(16, style.columns - 4)});
  const int rows = std::max(1, columns / kCharAspect);
  std::vector<double> visible(static_cast<std::size_t>(rows) * columns, 0);
  for (int c = 0; c < columns; ++c) {
    for (int key = part(tokens, columns, c); key < part(tokens, columns, c + 1); ++key) {
      const int begin = picture.first[key];
      const int end = begin + picture.len[key];
      for (int r = 0; r < rows; ++r) {
        const int overlap =
            std::min(end, part(tokens, rows, r + 1)) - std::max(begin, part(tokens, rows, r));
        visible[static_cast<std::size_t>(r) * columns + c] += std::max(0, overlap);
      }
    }
  }
  const Glyphs& glyph = glyphs(style);
  std::string text;
  for (int r = 0; r < rows; ++r) {
    text += "  ";
    for (int c = 0; c < columns; ++c) {
      const double area = static_cast<double>(part(tokens, rows, r + 1) - part(tokens, rows, r)) *
                          (part(tokens, columns, c + 1) - part(tokens, columns, c));
      const double share = visible[static_cast<std::size_t>(r) * columns + c] / area;
      if (share == 0) {
        text += glyph.skipped;
      } else if (share >= 1) {
        text += glyph.full;
      } else {
        text += glyph.shares[std::min<std::size_t>(2, static_cast<std::size_t>(share * 3))];
      }
    }
    text += "\n";
  }
  return text;
}

std::string draw_tiles(const MaskPicture& picture, const DrawStyle& style) {
  const TileGrid& grid = picture.tiles;
  const Glyphs& glyph = glyphs(style);
  const int columns = std::min({grid.key_tiles, kMostColumns, std::max(16, style.columns - 4)});
  const int rows = std::min(grid.query_tiles, kMostColumns / kCharAspect);
  std::string text;
  for (int r = 0; r < rows; ++r) {
    text += "  ";
    for (int c = 0; c < columns; ++c) {
      const TileClass tile_class =
          merged_class(grid, part(grid.query_tiles, rows, r), part(grid.query_tiles, rows, r + 1),
                       part(grid.key_tiles, columns, c), part(grid.key_tiles, columns, c + 1));
      text += class_of(tile_class, glyph.skipped, glyph.partial, glyph.full);
    }
    text += "\n";
  }
  return text;
}

std::vector<std::string> tile_rows(const MaskPicture& picture) {
  std::vector<std::string> rows;
  for (int m = 0; m < picture.tiles.query_tiles; ++m) {
    std::string row;
    for (int n = 0; n < picture.tiles.key_tiles; ++n) {
      row += class_of(picture.tiles.at(m, n), '.', '+', '#');
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

std::string draw_svg(const MaskPicture& picture, const std::string& title) {
  const double scale = static_cast<double>(kSvgSide) / std::max(1, picture.tokens());
  const int width = kSvgSide + 2 * kMargin;
  const int height = kSvgSide + 3 * kMargin + kLegendHeight;
  std::string svg = fmt::format(
      R"svg(<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">
)svg",
      width, height);
  svg += fmt::format("<title>{}</title>\n", escaped(title));
  svg +=
      "<style>text{font:13px sans-serif;fill:#222}.full{fill:#2b6cb0}.partial{fill:#f6ad55}"
      ".mask{fill:#1a202c;fill-opacity:0.35}.frame{fill:none;stroke:#888}</style>\n";
  svg += fmt::format(R"svg(<rect width="{}" height="{}" fill="#fff"/>
)svg",
                     width, height);
  svg += fmt::format(R"svg(<text x="{}" y="{}">{}</text>
)svg",
                     kMargin, kMargin, escaped(title));
  svg += fmt::format("<g transform=\"translate({},{})\">\n", kMargin, kMargin + 12);
  svg += svg_tiles(picture, scale);
  svg += svg_mask(picture, scale);
  svg += fmt::format(R"svg(<rect class="frame" width="{0}" height="{0}"/>
)svg",
                     kSvgSide);
  svg += svg_legend(picture);
  return svg + "</g>\n</svg>\n";
}

std::string draw_png(const MaskPicture& picture) {
  // The colours of the SVG: white, grey, then partial and full tiles without and with the mask.
  constexpr Rgb kPalette[] = {{0xff, 0xff, 0xff}, {0x88, 0x88, 0x88}, {0xf6, 0xad, 0x55},
                              {0xa9, 0x7c, 0x47}, {0x2b, 0x6c, 0xb0}, {0x25, 0x51, 0x82}};
  constexpr std::uint8_t kWhite = 0, kFrame = 1, kPartial = 2, kFull = 4;
  const int tokens = picture.tokens();
  // Small trees in whole pixels a token, large ones by samples.
  const int side =
      tokens == 0 ? kSvgSide : std::max(1, kSvgSide / tokens) * std::min(tokens, kSvgSide);
  const int width = side + 2;
  std::vector<std::uint8_t> pixels(static_cast<std::size_t>(width) * width, kFrame);
  for (int y = 0; y < side; ++y) {
    for (int x = 0; x < side; ++x) {
      std::uint8_t colour = kWhite;
      if (tokens > 0) {
        const int row = part(tokens, side, y);
        const int key = part(tokens, side, x);
        const TileClass tile_class = picture.tiles.at(row / picture.block_m, key / picture.block_n);
        colour = class_of(tile_class, kWhite, kPartial, kFull);
        if (colour != kWhite && picture.sees(row, key)) ++colour;
      }
      pixels[(static_cast<std::size_t>(y) + 1) * width + x + 1] = colour;
    }
  }
  return encode_png(width, width, kPalette, pixels);
}

}  // namespace treeattn::cli
