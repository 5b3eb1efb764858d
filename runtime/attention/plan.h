// The plan's header and a read-only view of its buffer in host memory. Conversions validate and
// throw Error(kInvalidArgument); PlanReader trusts the buffer it is given and is safe to share.
#pragma once

#include <span>

#include "templates/shared/plan.h"
#include "treeattn/plan.h"
#include "treeattn/treeattn.h"

namespace treeattn {

/// The public header as the kernels' one, checked: version, totals, batch, views.
PlanShape to_plan_shape(const Plan& plan);
Plan to_plan(const PlanShape& shape);

/// Index of the view made for this tile shape, -1 if the plan holds none.
int find_view(const PlanShape& shape, int block_m, int block_n);

/// Ints at the start of the buffer that report_faults() needs: meta, cu_seqlens and fault bits.
long long plan_report_ints(const PlanShape& shape);
/// Reads the faults from a host copy of the buffer's first plan_report_ints() ints.
PlanReport report_faults(const PlanShape& shape, const int* buffer);

/// {slot, key0, keys, sequence} of a key tile; sequence == batch: keys past the last sequence.
struct KeyOrder {
  int slot;
  int key0;
  int keys;
  int sequence;
};

/// Typed access to a plan in host memory.
class PlanReader {
 public:
  PlanReader(const PlanShape& shape, const int* buffer)
      : shape_(shape), at_(plan_offsets(shape)), buffer_(buffer) {}

  const PlanShape& shape() const { return shape_; }
  const int* meta() const { return buffer_; }
  bool built() const { return buffer_[kMetaMagic] == kPlanMagic; }
  const int* cu_q() const { return buffer_ + at_.cu_q; }
  const int* cu_k() const { return buffer_ + at_.cu_k; }
  const int* seq_fault() const { return buffer_ + at_.seq_fault; }
  const int* first() const { return buffer_ + at_.first; }
  const int* len() const { return buffer_ + at_.len; }

  /// Row i (packed) sees key j (packed): the one test that every kernel makes.
  bool sees(int i, int j) const {
    return static_cast<unsigned>(i - first()[j]) < static_cast<unsigned>(len()[j]);
  }

  std::span<const KeyTile> granules() const {
    return records<KeyTile>(at_.granules, tile_slots(shape_.total_k, shape_.batch, kGranuleKeys));
  }
  /// By slot, unused slots included.
  std::span<const KeyTile> key_tiles(int view) const {
    return records<KeyTile>(at_.views[view].key_tiles,
                            tile_slots(shape_.total_k, shape_.batch, shape_.views[view].block_n));
  }
  /// Heavy first.
  std::span<const QueryTile> query_tiles(int view) const {
    return records<QueryTile>(at_.views[view].query_tiles, buffer_[kMetaQueryTiles + view]);
  }
  std::span<const KeyOrder> key_order(int view) const {
    return records<KeyOrder>(at_.views[view].key_order, buffer_[kMetaKeyTiles + view]);
  }
  /// By slot.
  std::span<const int> key_rank(int view) const {
    return records<int>(at_.views[view].key_rank,
                        tile_slots(shape_.total_k, shape_.batch, shape_.views[view].block_n));
  }

 private:
  template <class Record>
  std::span<const Record> records(long long offset, int count) const {
    return {reinterpret_cast<const Record*>(buffer_ + offset), static_cast<std::size_t>(count)};
  }

  PlanShape shape_;
  PlanOffsets at_;
  const int* buffer_;
};

}  // namespace treeattn
