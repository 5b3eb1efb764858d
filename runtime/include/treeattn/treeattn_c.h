/* treeattn: exact tree attention with run-time compiled CUDA kernels. The C API.
 *
 * Every function returns a treeattn_status; on failure treeattn_last_error() holds the text of this
 * thread's last error: what was wrong, what was expected, what to do next. Structs begin with
 * struct_size, which the caller sets to sizeof (the *_INIT macros do); later versions only append.
 * The layouts and meanings are those of treeattn.h. */
#ifndef TREEATTN_C_H_
#define TREEATTN_C_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum treeattn_status {
  TREEATTN_OK = 0,
  TREEATTN_INVALID_ARGUMENT = 1,
  TREEATTN_UNSUPPORTED = 2,
  TREEATTN_NOT_FOUND = 3,
  TREEATTN_COMPILE_FAILED = 4,
  TREEATTN_CUDA_ERROR = 5,
  TREEATTN_IO_ERROR = 6,
  TREEATTN_INVALID_TREE = 7,
  TREEATTN_INTERNAL = 8
} treeattn_status;

typedef enum treeattn_dtype {
  TREEATTN_F16 = 0,
  TREEATTN_BF16 = 1,
  TREEATTN_F32 = 2, /* CPU executor only */
  TREEATTN_F64 = 3  /* CPU executor only */
} treeattn_dtype;

typedef enum treeattn_lowering {
  TREEATTN_LOWER_TREE = 0,
  TREEATTN_LOWER_CAUSAL = 1,
  TREEATTN_LOWER_FULL = 2,
  TREEATTN_LOWER_INTERVALS = 3
} treeattn_lowering;

typedef enum treeattn_engine_kind { TREEATTN_CUDA = 0, TREEATTN_CPU = 1 } treeattn_engine_kind;

/* The version this header belongs to, and the library's own at run time: major * 10000 + minor *
 * 100
 * + patch. */
#define TREEATTN_VERSION 100
int32_t treeattn_version(void);

typedef struct treeattn_engine treeattn_engine;

/* Header of a plan's buffer; plain data, see treeattn/plan.h. */
typedef struct treeattn_plan {
  uint32_t struct_size;
  uint32_t version;
  int32_t total_q;
  int32_t total_k;
  int32_t batch;
  int32_t num_views;
  struct {
    int32_t block_m;
    int32_t block_n;
  } views[8];
} treeattn_plan;

typedef struct treeattn_shape {
  uint32_t struct_size;
  int32_t dtype;
  int32_t heads;
  int32_t heads_kv;
  int32_t head_dim;
  int32_t head_dim_v; /* 0: as head_dim */
  int32_t softcap;    /* 0 or 1 */
  int32_t backward;   /* 0 or 1: the plan and prepare also serve backward */
} treeattn_shape;
#define TREEATTN_SHAPE_INIT \
  { sizeof(treeattn_shape), TREEATTN_BF16, 0, 0, 0, 0, 0, 0 }

typedef struct treeattn_plan_inputs {
  uint32_t struct_size;
  int32_t lowering;
  const int32_t* cu_seqlens_q;           /* [batch + 1] */
  const int32_t* cu_seqlens_k;           /* [batch + 1] */
  const int32_t* tree_dfs_order_start_q; /* tree: [total_q] */
  const int32_t* tree_dfs_order_end_k;   /* tree: [total_k] */
  const int32_t* first;                  /* intervals: [total_k] */
  const int32_t* len;                    /* intervals: [total_k] */
} treeattn_plan_inputs;
#define TREEATTN_PLAN_INPUTS_INIT \
  { sizeof(treeattn_plan_inputs), TREEATTN_LOWER_TREE, NULL, NULL, NULL, NULL, NULL, NULL }

/* [tokens, heads, dim]; the last dimension is contiguous, strides in elements. */
typedef struct treeattn_tensor {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
} treeattn_tensor;

typedef struct treeattn_forward_args {
  uint32_t struct_size;
  int32_t dtype;
  int32_t heads;
  int32_t heads_kv;
  int32_t head_dim;
  int32_t head_dim_v; /* 0: as head_dim */
  treeattn_tensor q, k, v, out;
  float* lse; /* [heads, total_q]; NULL: not wanted */
  double softmax_scale;
  double softcap; /* 0: off */
  const treeattn_plan* plan;
  const int32_t* plan_buffer;
  void* workspace;
  size_t workspace_bytes;
  const char* spec; /* NULL: the default kernel */
} treeattn_forward_args;

typedef struct treeattn_backward_args {
  uint32_t struct_size;
  int32_t dtype;
  int32_t heads;
  int32_t heads_kv;
  int32_t head_dim;
  int32_t head_dim_v; /* 0: as head_dim */
  treeattn_tensor q, k, v, out, dout, dq, dk, dv;
  const float* lse;  /* [heads, total_q], as forward wrote it */
  const float* dlse; /* [heads, total_q]; NULL: zero */
  double softmax_scale;
  double softcap;        /* 0: off */
  int32_t deterministic; /* 0 or 1 */
  const treeattn_plan* plan;
  const int32_t* plan_buffer;
  void* workspace;
  size_t workspace_bytes;
  const char* spec; /* NULL: the default kernel */
} treeattn_backward_args;

typedef struct treeattn_plan_report {
  uint32_t struct_size;
  int32_t valid;
  int32_t bad_sequences;
  int64_t first_bad_token; /* -1: none */
  char message[512];
} treeattn_plan_report;

typedef struct treeattn_stats {
  uint32_t struct_size;
  uint64_t launches, memory_hits, disk_hits, compiles, rejected;
  double compile_ms, load_ms;
} treeattn_stats;

/* Text of this thread's last error; never NULL, valid until this thread's next call. */
const char* treeattn_last_error(void);

/* kind: a treeattn_engine_kind. threads: of the CPU executor, 0: one per core. A CUDA engine takes
 * the current context, or the primary context of device 0 where there is none. */
treeattn_status treeattn_engine_create(int32_t kind, int32_t threads, treeattn_engine** engine);
void treeattn_engine_destroy(treeattn_engine* engine); /* NULL is allowed */
/* Copies a line about the engine's device; always terminated. */
treeattn_status treeattn_engine_description(const treeattn_engine* engine, char* text,
                                            size_t bytes);

treeattn_status treeattn_plan_for(const treeattn_engine* engine, int64_t total_q, int64_t total_k,
                                  int32_t batch, const treeattn_shape* shapes, size_t num_shapes,
                                  treeattn_plan* plan);
treeattn_status treeattn_plan_bytes(const treeattn_plan* plan, size_t* bytes);
treeattn_status treeattn_build_plan(treeattn_engine* engine, const treeattn_plan* plan,
                                    const treeattn_plan_inputs* inputs, int32_t* buffer,
                                    void* stream);
/* Synchronises the stream. An invalid tree is TREEATTN_OK with report->valid == 0. */
treeattn_status treeattn_validate(const treeattn_engine* engine, const treeattn_plan* plan,
                                  const int32_t* buffer, void* stream,
                                  treeattn_plan_report* report);

treeattn_status treeattn_forward_workspace_bytes(const treeattn_engine* engine,
                                                 const treeattn_plan* plan,
                                                 const treeattn_shape* shape, size_t* bytes);
treeattn_status treeattn_forward(treeattn_engine* engine, const treeattn_forward_args* args,
                                 void* stream);

treeattn_status treeattn_backward_workspace_bytes(const treeattn_engine* engine,
                                                  const treeattn_plan* plan,
                                                  const treeattn_shape* shape,
                                                  int32_t deterministic, size_t* bytes);
treeattn_status treeattn_backward(treeattn_engine* engine, const treeattn_backward_args* args,
                                  void* stream);

/* Loads, compiling if need be, the kernels for these shapes and the plan. */
treeattn_status treeattn_prepare(treeattn_engine* engine, const treeattn_shape* shapes,
                                 size_t num_shapes);
treeattn_status treeattn_get_stats(const treeattn_engine* engine, treeattn_stats* stats);

/* Rows of tokens merged into a prefix forest; see treeattn/tree.h. */
typedef struct treeattn_packed treeattn_packed;
/* Row r is tokens[row_offsets[r]] .. tokens[row_offsets[r + 1] - 1]; row_offsets begins with 0.
 * Empty and equal rows are legal. */
treeattn_status treeattn_pack_rows(const int64_t* tokens, const int64_t* row_offsets,
                                   size_t num_rows, treeattn_packed** packed);
/* What rows may share; see treeattn::PackOptions. */
typedef struct treeattn_pack_options {
  uint32_t struct_size;
  int64_t min_shared;        /* at least 1: shorter prefixes are not shared */
  const int64_t* max_shared; /* [num_rows] leading tokens that may be shared; NULL: all */
} treeattn_pack_options;
#define TREEATTN_PACK_OPTIONS_INIT \
  { sizeof(treeattn_pack_options), 1, NULL }
treeattn_status treeattn_pack_rows_with_options(const int64_t* tokens, const int64_t* row_offsets,
                                                size_t num_rows,
                                                const treeattn_pack_options* options,
                                                treeattn_packed** packed);
void treeattn_packed_destroy(treeattn_packed* packed); /* NULL is allowed */
treeattn_status treeattn_packed_size(const treeattn_packed* packed, int64_t* tokens,
                                     int64_t* nodes);
/* Each array may be NULL; all but row_positions have the packed tokens' number of elements.
 * row_positions holds the packed position of every token of every row, row by row. */
treeattn_status treeattn_packed_copy(const treeattn_packed* packed, int64_t* tokens,
                                     int32_t* position_ids, int32_t* tree_dfs_order_start_q,
                                     int32_t* tree_dfs_order_end_k, int64_t* row_positions);
/* Each array may be NULL. node_parents [nodes]: DFS index, -1 for a root; node_lengths [nodes]:
 * tokens; row_nodes [num_rows]: the node that a row ends at, -1 for an empty row. */
treeattn_status treeattn_packed_copy_nodes(const treeattn_packed* packed, int64_t* node_parents,
                                           int64_t* node_lengths, int64_t* row_nodes);

#ifdef __cplusplus
}
#endif

#endif /* TREEATTN_C_H_ */
