// The C API: translates structs, catches everything, keeps the last error's text per thread.
#include "treeattn/treeattn_c.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "treeattn/tree.h"
#include "treeattn/treeattn.h"

struct treeattn_engine {
  treeattn::Engine engine;
};

struct treeattn_packed {
  treeattn::PackedRows rows;
};

namespace {

using treeattn::Error;
using treeattn::ErrorCode;

static_assert(sizeof(treeattn_plan) == sizeof(treeattn::Plan) &&
              std::is_trivially_copyable_v<treeattn::Plan>);
static_assert(static_cast<int>(ErrorCode::kInternal) == TREEATTN_INTERNAL);
static_assert(static_cast<int>(treeattn::Lowering::kIntervals) == TREEATTN_LOWER_INTERVALS);
static_assert(static_cast<int>(treeattn::DType::kF64) == TREEATTN_F64);

std::string& last_error() {
  thread_local std::string text;
  return text;
}

template <class Body>
treeattn_status guarded(Body&& body) noexcept {
  try {
    body();
    return TREEATTN_OK;
  } catch (const Error& e) {
    last_error() = e.what();
    return static_cast<treeattn_status>(e.code());
  } catch (const std::bad_alloc&) {
    last_error() = "out of host memory";
    return TREEATTN_INTERNAL;
  } catch (const std::exception& e) {
    last_error() = e.what();
    return TREEATTN_INTERNAL;
  }
}

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

template <class T>
T& require(T* pointer, const char* name) {
  if (pointer == nullptr) refuse(fmt::format("{} is null", name));
  return *pointer;
}

/// A struct of this version or a later one: its known fields are a prefix.
template <class Struct>
Struct& require_struct(Struct* pointer, const char* name) {
  Struct& value = require(pointer, name);
  if (value.struct_size < sizeof(Struct)) {
    refuse(fmt::format("{}.struct_size is {}, expected at least {}: set it to sizeof({})", name,
                       value.struct_size, sizeof(Struct), name));
  }
  return value;
}

treeattn::DType to_dtype(std::int32_t dtype) {
  if (dtype < TREEATTN_F16 || dtype > TREEATTN_F64) {
    refuse(fmt::format("dtype is {}, expected 0 (f16), 1 (bf16), 2 (f32) or 3 (f64)", dtype));
  }
  return static_cast<treeattn::DType>(dtype);
}

treeattn::Shape to_shape(const treeattn_shape& s) {
  return {to_dtype(s.dtype), s.heads,        s.heads_kv,     s.head_dim,
          s.head_dim_v,      s.softcap != 0, s.backward != 0};
}

std::vector<treeattn::Shape> to_shapes(const treeattn_shape* shapes, std::size_t count) {
  std::vector<treeattn::Shape> converted;
  if (count > 0) require_struct(shapes, "shapes");
  for (std::size_t i = 0; i < count; ++i) {
    // Elements of an array lie struct_size apart: the caller's idea of the struct.
    const auto* at = reinterpret_cast<const char*>(shapes) + i * shapes->struct_size;
    converted.push_back(to_shape(*reinterpret_cast<const treeattn_shape*>(at)));
  }
  return converted;
}

treeattn::Plan to_plan(const treeattn_plan& plan) {
  return std::bit_cast<treeattn::Plan>(plan);
}

treeattn::ConstTensor to_tensor(const treeattn_tensor& t) {
  return {t.data, t.token_stride, t.head_stride};
}

void copy_text(const std::string& text, char* out, std::size_t bytes) {
  if (bytes == 0) return;
  const std::size_t length = std::min(text.size(), bytes - 1);
  std::memcpy(out, text.data(), length);
  out[length] = '\0';
}

}  // namespace

extern "C" {

int32_t treeattn_version(void) {
  return TREEATTN_VERSION;
}

const char* treeattn_last_error(void) {
  return last_error().c_str();
}

treeattn_status treeattn_engine_create(int32_t kind, int32_t threads, treeattn_engine** engine) {
  return guarded([&] {
    require(engine, "engine") = nullptr;
    if (kind != TREEATTN_CUDA && kind != TREEATTN_CPU) {
      refuse(fmt::format("kind is {}, expected 0 (CUDA) or 1 (CPU)", kind));
    }
    treeattn::EngineOptions options;
    options.kind = kind == TREEATTN_CPU ? treeattn::EngineKind::kCpu : treeattn::EngineKind::kCuda;
    options.threads = threads;
    *engine = new treeattn_engine{treeattn::Engine(options)};
  });
}

void treeattn_engine_destroy(treeattn_engine* engine) {
  delete engine;
}

treeattn_status treeattn_engine_description(const treeattn_engine* engine, char* text,
                                            size_t bytes) {
  return guarded([&] {
    require(text, "text");
    copy_text(require(engine, "engine").engine.description(), text, bytes);
  });
}

treeattn_status treeattn_plan_for(const treeattn_engine* engine, int64_t total_q, int64_t total_k,
                                  int32_t batch, const treeattn_shape* shapes, size_t num_shapes,
                                  treeattn_plan* plan) {
  return guarded([&] {
    treeattn_plan& out = require(plan, "plan");
    const treeattn::Plan header =
        require(engine, "engine")
            .engine.plan_for(total_q, total_k, batch, to_shapes(shapes, num_shapes));
    out = std::bit_cast<treeattn_plan>(header);
  });
}

treeattn_status treeattn_plan_bytes(const treeattn_plan* plan, size_t* bytes) {
  return guarded([&] {
    require(bytes, "bytes") = treeattn::plan_bytes(to_plan(require_struct(plan, "plan")));
  });
}

treeattn_status treeattn_build_plan(treeattn_engine* engine, const treeattn_plan* plan,
                                    const treeattn_plan_inputs* inputs, int32_t* buffer,
                                    void* stream) {
  return guarded([&] {
    const treeattn_plan_inputs& in = require_struct(inputs, "inputs");
    treeattn::PlanInputs converted;
    converted.lowering = static_cast<treeattn::Lowering>(in.lowering);
    converted.cu_seqlens_q = in.cu_seqlens_q;
    converted.cu_seqlens_k = in.cu_seqlens_k;
    converted.tree_dfs_order_start_q = in.tree_dfs_order_start_q;
    converted.tree_dfs_order_end_k = in.tree_dfs_order_end_k;
    converted.first = in.first;
    converted.len = in.len;
    require(engine, "engine")
        .engine.build_plan(to_plan(require_struct(plan, "plan")), converted, buffer, stream);
  });
}

treeattn_status treeattn_validate(const treeattn_engine* engine, const treeattn_plan* plan,
                                  const int32_t* buffer, void* stream,
                                  treeattn_plan_report* report) {
  return guarded([&] {
    treeattn_plan_report& out = require_struct(report, "report");
    const treeattn::PlanReport found =
        require(engine, "engine")
            .engine.validate(to_plan(require_struct(plan, "plan")), buffer, stream);
    out.valid = found.valid ? 1 : 0;
    out.bad_sequences = found.bad_sequences;
    out.first_bad_token = found.first_bad_token;
    copy_text(found.message, out.message, sizeof(out.message));
  });
}

treeattn_status treeattn_forward_workspace_bytes(const treeattn_engine* engine,
                                                 const treeattn_plan* plan,
                                                 const treeattn_shape* shape, size_t* bytes) {
  return guarded([&] {
    require(bytes, "bytes") =
        require(engine, "engine")
            .engine.forward_workspace_bytes(to_plan(require_struct(plan, "plan")),
                                            to_shape(require_struct(shape, "shape")));
  });
}

treeattn_status treeattn_forward(treeattn_engine* engine, const treeattn_forward_args* args,
                                 void* stream) {
  return guarded([&] {
    const treeattn_forward_args& a = require_struct(args, "args");
    const treeattn::Plan plan = to_plan(require_struct(a.plan, "plan"));
    treeattn::ForwardArgs converted;
    converted.dtype = to_dtype(a.dtype);
    converted.heads = a.heads;
    converted.heads_kv = a.heads_kv;
    converted.head_dim = a.head_dim;
    converted.head_dim_v = a.head_dim_v;
    converted.q = to_tensor(a.q);
    converted.k = to_tensor(a.k);
    converted.v = to_tensor(a.v);
    converted.out = {a.out.data, a.out.token_stride, a.out.head_stride};
    converted.lse = a.lse;
    converted.softmax_scale = a.softmax_scale;
    converted.softcap = a.softcap;
    converted.plan = &plan;
    converted.plan_buffer = a.plan_buffer;
    converted.workspace = a.workspace;
    converted.workspace_bytes = a.workspace_bytes;
    if (a.spec != nullptr) converted.spec = a.spec;
    require(engine, "engine").engine.forward(converted, stream);
  });
}

treeattn_status treeattn_backward_workspace_bytes(const treeattn_engine* engine,
                                                  const treeattn_plan* plan,
                                                  const treeattn_shape* shape,
                                                  int32_t deterministic, size_t* bytes) {
  return guarded([&] {
    require(bytes, "bytes") = require(engine, "engine")
                                  .engine.backward_workspace_bytes(
                                      to_plan(require_struct(plan, "plan")),
                                      to_shape(require_struct(shape, "shape")), deterministic != 0);
  });
}

treeattn_status treeattn_backward(treeattn_engine* engine, const treeattn_backward_args* args,
                                  void* stream) {
  return guarded([&] {
    const treeattn_backward_args& a = require_struct(args, "args");
    const treeattn::Plan plan = to_plan(require_struct(a.plan, "plan"));
    treeattn::BackwardArgs converted;
    converted.dtype = to_dtype(a.dtype);
    converted.heads = a.heads;
    converted.heads_kv = a.heads_kv;
    converted.head_dim = a.head_dim;
    converted.head_dim_v = a.head_dim_v;
    converted.q = to_tensor(a.q);
    converted.k = to_tensor(a.k);
    converted.v = to_tensor(a.v);
    converted.out = to_tensor(a.out);
    converted.dout = to_tensor(a.dout);
    converted.dq = {a.dq.data, a.dq.token_stride, a.dq.head_stride};
    converted.dk = {a.dk.data, a.dk.token_stride, a.dk.head_stride};
    converted.dv = {a.dv.data, a.dv.token_stride, a.dv.head_stride};
    converted.lse = a.lse;
    converted.dlse = a.dlse;
    converted.softmax_scale = a.softmax_scale;
    converted.softcap = a.softcap;
    converted.deterministic = a.deterministic != 0;
    converted.plan = &plan;
    converted.plan_buffer = a.plan_buffer;
    converted.workspace = a.workspace;
    converted.workspace_bytes = a.workspace_bytes;
    if (a.spec != nullptr) converted.spec = a.spec;
    require(engine, "engine").engine.backward(converted, stream);
  });
}

treeattn_status treeattn_prepare(treeattn_engine* engine, const treeattn_shape* shapes,
                                 size_t num_shapes) {
  return guarded([&] { require(engine, "engine").engine.prepare(to_shapes(shapes, num_shapes)); });
}

treeattn_status treeattn_get_stats(const treeattn_engine* engine, treeattn_stats* stats) {
  return guarded([&] {
    treeattn_stats& out = require_struct(stats, "stats");
    const treeattn::Stats found = require(engine, "engine").engine.stats();
    out.launches = found.launches;
    out.memory_hits = found.memory_hits;
    out.disk_hits = found.disk_hits;
    out.compiles = found.compiles;
    out.rejected = found.rejected;
    out.compile_ms = found.compile_ms;
    out.load_ms = found.load_ms;
  });
}

treeattn_status treeattn_pack_rows(const int64_t* tokens, const int64_t* row_offsets,
                                   size_t num_rows, treeattn_packed** packed) {
  const treeattn_pack_options options = TREEATTN_PACK_OPTIONS_INIT;
  return treeattn_pack_rows_with_options(tokens, row_offsets, num_rows, &options, packed);
}

treeattn_status treeattn_pack_rows_with_options(const int64_t* tokens, const int64_t* row_offsets,
                                                size_t num_rows,
                                                const treeattn_pack_options* options,
                                                treeattn_packed** packed) {
  return guarded([&] {
    treeattn_packed*& out = require(packed, "packed");
    const treeattn_pack_options& given = require_struct(options, "options");
    const int64_t* const at = &require(row_offsets, "row_offsets");
    if (at[0] != 0) refuse(fmt::format("row_offsets[0] is {}, expected 0", at[0]));
    std::vector<std::span<const int64_t>> rows;
    rows.reserve(num_rows);
    for (std::size_t r = 0; r < num_rows; ++r) {
      if (at[r + 1] < at[r]) {
        refuse(fmt::format("row_offsets[{}] is {}, expected at least row_offsets[{}] = {}", r + 1,
                           at[r + 1], r, at[r]));
      }
      if (at[r + 1] > 0) require(tokens, "tokens");
      rows.emplace_back(tokens + at[r], static_cast<std::size_t>(at[r + 1] - at[r]));
    }
    treeattn::PackOptions converted{given.min_shared};
    if (given.max_shared != nullptr) converted.max_shared = {given.max_shared, num_rows};
    out = new treeattn_packed{treeattn::pack_rows(rows, converted)};
  });
}

void treeattn_packed_destroy(treeattn_packed* packed) {
  delete packed;
}

treeattn_status treeattn_packed_size(const treeattn_packed* packed, int64_t* tokens,
                                     int64_t* nodes) {
  return guarded([&] {
    const treeattn::PackedRows& rows = require(packed, "packed").rows;
    require(tokens, "tokens") = rows.tree.tokens();
    require(nodes, "nodes") = static_cast<int64_t>(rows.tree.nodes().size());
  });
}

treeattn_status treeattn_packed_copy(const treeattn_packed* packed, int64_t* tokens,
                                     int32_t* position_ids, int32_t* tree_dfs_order_start_q,
                                     int32_t* tree_dfs_order_end_k, int64_t* row_positions) {
  return guarded([&] {
    const treeattn::PackedRows& rows = require(packed, "packed").rows;
    const auto copy = [](const auto& from, auto* to) {
      if (to != nullptr) std::copy(from.begin(), from.end(), to);
    };
    copy(rows.tokens, tokens);
    copy(rows.position_ids, position_ids);
    copy(rows.row_positions, row_positions);
    if (tree_dfs_order_start_q == nullptr && tree_dfs_order_end_k == nullptr) return;
    std::vector<int32_t> start;
    std::vector<int32_t> end;
    rows.tree.append_arrays(start, end);
    copy(start, tree_dfs_order_start_q);
    copy(end, tree_dfs_order_end_k);
  });
}

treeattn_status treeattn_packed_copy_nodes(const treeattn_packed* packed, int64_t* node_parents,
                                           int64_t* node_lengths, int64_t* row_nodes) {
  return guarded([&] {
    const treeattn::PackedRows& rows = require(packed, "packed").rows;
    for (const treeattn::TreeNode& node : rows.tree.nodes()) {
      if (node_parents != nullptr) *node_parents++ = node.parent;
      if (node_lengths != nullptr) *node_lengths++ = node.length;
    }
    if (row_nodes != nullptr) std::copy(rows.row_nodes.begin(), rows.row_nodes.end(), row_nodes);
  });
}

}  // extern "C"
