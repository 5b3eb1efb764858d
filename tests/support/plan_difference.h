// Whether two plans are the same, and inputs that no plan should be made of.
#pragma once

#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "runtime/attention/plan.h"
#include "runtime/attention/splitmix.h"
#include "tests/support/random_case.h"

namespace treeattn::testing {

template <class Record>
bool same(std::span<const Record> a, std::span<const Record> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

/// Slots that hold a tile: those of every sequence and of the keys past the last.
inline std::vector<int> used_slots(const PlanReader& plan, int tile) {
  std::vector<int> slots;
  const int batch = plan.shape().batch;
  for (int b = 0; b <= batch; ++b) {
    const int begin = plan.cu_k()[b];
    const int end = b < batch ? plan.cu_k()[b + 1] : plan.shape().total_k;
    for (int n = 0; begin + n * tile < end; ++n) slots.push_back(tile_slot0(begin, b, tile) + n);
  }
  return slots;
}

inline bool same_tiles(std::span<const KeyTile> a, std::span<const KeyTile> b,
                       const std::vector<int>& slots) {
  for (const int slot : slots) {
    if (std::memcmp(&a[slot], &b[slot], sizeof(KeyTile)) != 0) return false;
  }
  return true;
}

/// The first section in which two plans differ; empty if they are the same plan.
inline std::string plan_difference(const PlanReader& device, const PlanReader& host) {
  const PlanShape& shape = host.shape();
  if (!same(std::span(device.meta(), kPlanMetaInts), std::span(host.meta(), kPlanMetaInts))) {
    return "meta";
  }
  const auto ints = [](const int* from, int count) {
    return std::span(from, static_cast<std::size_t>(count));
  };
  if (!same(ints(device.cu_q(), shape.batch + 1), ints(host.cu_q(), shape.batch + 1))) {
    return "cu_q";
  }
  if (!same(ints(device.cu_k(), shape.batch + 1), ints(host.cu_k(), shape.batch + 1))) {
    return "cu_k";
  }
  if (!same(ints(device.seq_fault(), shape.batch), ints(host.seq_fault(), shape.batch))) {
    return "seq_fault";
  }
  if (!same(ints(device.first(), shape.total_k), ints(host.first(), shape.total_k))) return "first";
  if (!same(ints(device.len(), shape.total_k), ints(host.len(), shape.total_k))) return "len";
  if (!same_tiles(device.granules(), host.granules(), used_slots(host, kGranuleKeys))) {
    return "granules";
  }
  for (int v = 0; v < shape.num_views; ++v) {
    const auto slots = used_slots(host, shape.views[v].block_n);
    if (!same_tiles(device.key_tiles(v), host.key_tiles(v), slots)) return "key tiles";
    if (!same(device.query_tiles(v), host.query_tiles(v))) return "query tiles";
    if (!same(device.key_order(v), host.key_order(v))) return "key order";
    if (!same(device.key_rank(v), host.key_rank(v))) return "key rank";
  }
  return "";
}

/// Changes some of the case's tree, intervals or cu_seqlens, mostly to what is not valid.
inline void break_plan_inputs(SplitMix64& rng, RandomCase& c) {
  switch (rng.below(4)) {
    case 0:
      for (int& s : c.start) {
        if (rng.chance(0.01)) s = static_cast<int>(rng.below(1000));
      }
      break;
    case 1:
      for (int& f : c.first) {
        if (rng.chance(0.01)) f += static_cast<int>(rng.between(-2000, 2000));
      }
      break;
    case 2:
      c.cu_q[rng.below(static_cast<std::int64_t>(c.cu_q.size()))] =
          static_cast<int>(rng.between(-100, 10'000));
      break;
    default:
      c.cu_k[rng.below(static_cast<std::int64_t>(c.cu_k.size()))] =
          static_cast<int>(rng.between(-100, 10'000));
  }
}

}  // namespace treeattn::testing
