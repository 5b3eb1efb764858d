// Pictures of a mask and of the tiles it is cut into, as text, SVG and PNG. Pure functions.
#pragma once

#include <string>
#include <vector>

#include "runtime/attention/plan_stats.h"
#include "treeattn/tree.h"

namespace treeattn::cli {

/// One tree: which rows see each key, and the class of each tile.
struct MaskPicture {
  std::vector<int> node;        ///< of each token, in DFS order
  std::vector<int> first, len;  ///< rows that see each key
  int block_m = 0;
  int block_n = 0;
  TileGrid tiles;

  int tokens() const { return static_cast<int>(node.size()); }
  bool sees(int row, int key) const { return row >= first[key] && row < first[key] + len[key]; }
};
MaskPicture make_picture(const Tree& tree, int block_m, int block_n);

/// Tiles of one tree above which no picture is made.
inline constexpr double kMostPictureTiles = 64e6;

struct DrawStyle {
  bool utf8 = false;
  int columns = 80;
};

/// The mask, token by token where it fits, else by the share of pairs that are visible. `labels`
/// names tokens; empty: letters by node.
std::string draw_mask(const MaskPicture& picture, const DrawStyle& style,
                      const std::string& labels = {});
/// One character a tile, or a few tiles where there are many.
std::string draw_tiles(const MaskPicture& picture, const DrawStyle& style);
/// Tile classes in characters, row by row: '.' skipped, '+' partial, '#' full.
std::vector<std::string> tile_rows(const MaskPicture& picture);

/// Tiles by class and, above them, the exact mask as one shape a node.
std::string draw_svg(const MaskPicture& picture, const std::string& title);
/// The same without words: the bytes of a PNG file.
std::string draw_png(const MaskPicture& picture);

}  // namespace treeattn::cli
