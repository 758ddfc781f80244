/* C interface of the mixbits CPU library: plain pointers and sizes, no exceptions, no allocation the caller has to free
 * except the handles named so. Every function that can fail returns 0, or the number of an error (mb_error_text).
 *
 * A matrix (rows = outputs, cols = inputs) is held in the run-time layout that mb_repack writes from the codes of the file:
 * blocks of 64 rows; within a block, group after group of columns, each padded to whole chunks; a chunk is 64 rows x
 * chunk_cols(bits) columns (layout.h). The weight is (mul * code - off) * scale; 8-bit codes have mul 1, off 127 and stand there
 * plus one, so that padding is zero whatever the sign. */
#ifndef MIXBITS_H
#define MIXBITS_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MB_ABI_VERSION 1
#if defined(_WIN32)
#define MB_API __declspec(dllexport)
#else
#define MB_API __attribute__((visibility("default")))
#endif

enum { MB_OK = 0, MB_BAD_SHAPE, MB_BAD_BITS, MB_BAD_SIZE, MB_BAD_TOKEN, MB_BAD_TREE, MB_TOO_LONG, MB_NO_MEMORY, MB_BAD_POINTER, MB_BAD_ISA };
enum { MB_INT8 = 0, MB_FLOAT32 = 1 };                                             /* activations of a product */
enum { MB_RELU = 0, MB_GELU = 1, MB_GELU_TANH = 2, MB_SILU = 3 };                  /* activation functions */
enum { MB_OPT = 0, MB_LLAMA = 1 };

typedef struct {
  const uint8_t* packed;  /* mb_packed_bytes of them */
  const float* scales;    /* mb_num_scales of them: per block, per group, 64 rows; NULL with 16 bits */
  int64_t rows, cols;
  int64_t group;          /* columns that share a scale; 0: all of a row */
  int32_t bits;           /* of a code: 1, 2, 3, 4, 8; 16: float16 values, always multiplied in float32 */
  int32_t mul, off;       /* weight = (mul * code - off) * scale */
  int32_t reserved;
} mb_matrix;

typedef struct {
  mb_matrix q, k, v, o, gate, up, down;                                             /* gate: MB_LLAMA only */
  const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias; /* NULL: none */
  const float *norm1_gain, *norm1_bias, *norm2_gain, *norm2_bias;                   /* around attention, around the MLP */
} mb_layer;

typedef struct {
  int32_t family, num_layers, hidden, heads, kv_heads, head_dim, feed_forward, context;
  int32_t activation, norm_first, position_offset, reserved;
  float eps, attention_scale;
  mb_matrix embedding, positions, head;       /* positions: MB_OPT; head may repeat the embedding */
  const float *final_gain, *final_bias;       /* NULL: no final norm */
  const float* head_bias;
  const float *rope_cos, *rope_sin;           /* MB_LLAMA: (context, head_dim) */
  const mb_layer* layers;
} mb_model;

MB_API int32_t mb_abi_version(void);
MB_API const char* mb_error_text(int32_t error);
MB_API const char* mb_isa(void);                     /* in use: scalar, avx2, avx-vnni, avx512-vnni, neon-dot */
MB_API const char* mb_isas(void);                    /* usable here, best first, separated by commas */
MB_API int32_t mb_set_isa(const char* name);         /* NULL: the best that gives the scalar code's numbers */
MB_API void mb_set_num_threads(int32_t num_threads); /* at least 1; the calling thread is one of them */
MB_API int32_t mb_get_num_threads(void);

MB_API int64_t mb_packed_bytes(int64_t rows, int64_t cols, int64_t group, int32_t bits); /* -1: impossible */
MB_API int64_t mb_num_scales(int64_t rows, int64_t cols, int64_t group);                 /* -1: impossible */
/* codes: the file's bytes; ternary != 0: five codes a byte (bits must be 2); bits 16: float16 values. scales (num_groups a row, or
 * scales_per_row = 0: one for all) come out as the layout's, times factor. */
MB_API int32_t mb_repack(const uint8_t* codes, int64_t num_bytes, int64_t rows, int64_t cols, int64_t group, int32_t bits,
                         int32_t ternary, uint8_t* packed);
MB_API int32_t mb_repack_scales(const float* scales, int64_t scales_per_row, float factor, int64_t rows, int64_t cols,
                                int64_t group, float* out);

/* y (m, rows) = x (m, cols) W^T + bias */
MB_API int32_t mb_linear(const mb_matrix* w, int32_t activations, const float* x, int64_t m, const float* bias, float* y);
/* y (n, cols): the rows `ids` of w in float32 */
MB_API int32_t mb_embedding(const mb_matrix* w, const int64_t* ids, int64_t n, float* y);
/* out (num_targets,): log softmax(x W^T + bias)[row, target]; the targets of row i are targets[offsets[i]:offsets[i + 1]], ascending;
 * log_partition (m,) may be NULL */
MB_API int32_t mb_log_softmax_at(const mb_matrix* w, int32_t activations, const float* x, int64_t m, const float* bias,
                                 const int64_t* offsets, const int64_t* targets, float* out, float* log_partition);

/* out (n,): log p(token | ancestors) of each node, 0 at roots; a parent stands before its children, a root has parent -1, trees are contiguous */
MB_API int32_t mb_score_forest(const mb_model* model, int32_t activations, const int64_t* tokens, const int64_t* parents, int64_t n,
                               int64_t max_rows, float* out);

typedef struct mb_state mb_state;                    /* key-value caches of several streams */
MB_API mb_state* mb_state_new(const mb_model* model, int32_t activations, int64_t num_streams); /* NULL: no memory or a bad model */
MB_API void mb_state_free(mb_state* state);
MB_API int32_t mb_state_reset(mb_state* state, int64_t stream); /* -1: all */
MB_API int64_t mb_state_length(const mb_state* state, int64_t stream);
/* one token for each of m different streams; logits (m, vocabulary). Allocates nothing. */
MB_API int32_t mb_step(mb_state* state, const int64_t* streams, const int64_t* tokens, int64_t m, float* logits);
MB_API int32_t mb_check_model(const mb_model* model);

#ifdef __cplusplus
}
#endif
#endif
