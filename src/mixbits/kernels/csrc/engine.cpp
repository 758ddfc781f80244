// Whole models: OPT (post- and pre-LayerNorm) and Llama, scoring a forest of tokens or decoding one token a stream.
//
// Many rows: chunks of rows are independent but for attention, so a layer is two jobs (keys and values; the rest), in which a thread
// takes its rows through everything while they are in its cache. Few rows: the threads share the blocks of each weight matrix.
// Either way a number is computed in the same order, so neither threads nor chunks change a bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace mb {
namespace {

template <class T> void grow(std::vector<T>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.resize(static_cast<size_t>(n));
}

// Activations of a few rows, quantized as the last matrix asked for (q, k and v share them).
struct Quantized {
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sums;
  const float* of = nullptr;
  Cut cut{1, 0, 8};

  void reserve(int64_t rows, int64_t width, int64_t groups) {
    grow(q, rows * width);
    grow(scale, rows);
    grow(sums, rows * groups);
  }
  Rows8 rows(const Kernels& k, const mb_matrix& w, const float* x, int64_t n) {
    const Cut wanted = cut_of(w);
    if (x != of || !(wanted == cut)) {
      reserve(n, wanted.width(), wanted.num_groups);
      quantize_rows(k, x, n, wanted, q.data(), scale.data(), sums.data());
      of = x;
      cut = wanted;
    }
    return {q.data(), scale.data(), sums.data()};
  }
  void forget() { of = nullptr; }
};

bool in_float(const mb_matrix& w, int activations) { return activations == MB_FLOAT32 || w.bits == 16; }

void product(const Kernels& k, const mb_matrix& w, int activations, const float* x, int64_t n, Quantized& held, const float* bias, float* y) {
  const int64_t blocks = num_blocks(w.rows);
  if (in_float(w, activations)) k.gemm_float(w, x, w.cols, 0, n, 0, blocks, bias, y, w.rows);
  else k.gemm_int8(w, held.rows(k, w, x, n), 0, n, 0, blocks, bias, y, w.rows);
}

// Keys and values of a layer, what each row may look at, and where its own key and value go.
struct Memory {
  float *keys, *values;              // rows of kv_heads * head_dim
  const int32_t* place;              // (m,)
  const int32_t* const* context;     // (m,) lists of rows
  const int32_t* length;             // (m,)
};

struct Scratch {  // of one thread
  Quantized held;
  std::vector<float> a, b, wide, gate, scores;
};
thread_local Scratch scratch;

int64_t query_width(const mb_model& m) { return static_cast<int64_t>(m.heads) * m.head_dim; }
int64_t key_width(const mb_model& m) { return static_cast<int64_t>(m.kv_heads) * m.head_dim; }

void norm(const Kernels& k, const mb_model& m, const float* gain, const float* bias, const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    if (m.family == MB_LLAMA) k.rms_norm(x + i * m.hidden, gain, m.eps, m.hidden, out + i * m.hidden);
    else k.layer_norm(x + i * m.hidden, gain, bias, m.eps, m.hidden, out + i * m.hidden);
  }
}

void rotate(const mb_model& m, float* x, int64_t heads, int64_t position) {
  const float *cosine = m.rope_cos + position * m.head_dim, *sine = m.rope_sin + position * m.head_dim;
  const int64_t half = m.head_dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += m.head_dim)
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cosine[i] - b * sine[i];
      x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

void embed(const Kernels& k, const mb_model& m, int64_t token, int64_t position, float* x, float* spare) {
  k.weight_row(m.embedding, token, x);
  if (m.family != MB_OPT) return;
  k.weight_row(m.positions, position + m.position_offset, spare);
  k.add(x, spare, m.hidden);
}

void attend_row(const Kernels& k, const mb_model& m, const Memory& memory, int64_t row, int64_t head, const float* query, float* scores, float* out) {
  const int64_t group = m.heads / m.kv_heads, at = head / group * m.head_dim;
  k.attend(query + head * m.head_dim, memory.keys + at, memory.values + at, key_width(m), memory.context[row], memory.length[row], m.head_dim, m.attention_scale, scores, out + head * m.head_dim);
}

// The longest context of rows [from, from + n).
int64_t longest(const Memory& memory, int64_t from, int64_t n) {
  int32_t most = 0;
  for (int64_t i = from; i < from + n; ++i) most = std::max(most, memory.length[i]);
  return most;
}

// Scores of a context as the kernels keep them: whole vectors.
int64_t num_scores(int64_t context) { return (context + 15) / 16 * 16; }

// Turn the queries and keys of rows [from, from + n) by their positions (Llama), and put keys and values in their places.
void remember(const mb_model& m, const Memory& memory, const int32_t* positions, int64_t from, int64_t n, float* queries, float* keys, const float* values) {
  const int64_t wide = key_width(m);
  for (int64_t i = 0; i < n; ++i, queries += query_width(m), keys += wide, values += wide) {
    if (m.family == MB_LLAMA) {
      rotate(m, queries, m.heads, positions[from + i]);
      rotate(m, keys, m.kv_heads, positions[from + i]);
    }
    std::memcpy(memory.keys + memory.place[from + i] * wide, keys, static_cast<size_t>(wide) * 4);
    std::memcpy(memory.values + memory.place[from + i] * wide, values, static_cast<size_t>(wide) * 4);
  }
}

// Rows [from, from + n) of a layer up to their queries, keys and values.
void keys_and_values(const Kernels& k, const mb_model& m, const mb_layer& l, int activations, const float* x, int64_t from, int64_t n, const int32_t* positions, const Memory& memory, float* queries) {
  Scratch& s = scratch;
  const int64_t wide = key_width(m);
  grow(s.a, n * m.hidden);
  grow(s.b, 2 * n * wide);
  const float* in = x + from * m.hidden;
  if (m.norm_first) {
    norm(k, m, l.norm1_gain, l.norm1_bias, in, n, s.a.data());
    in = s.a.data();
  }
  s.held.forget();
  float *q = queries + from * query_width(m), *key = s.b.data(), *value = key + n * wide;
  product(k, l.q, activations, in, n, s.held, l.q_bias, q);
  product(k, l.k, activations, in, n, s.held, l.k_bias, key);
  product(k, l.v, activations, in, n, s.held, l.v_bias, value);
  remember(m, memory, positions, from, n, q, key, value);
}

void rest_of_layer(const Kernels& k, const mb_model& m, const mb_layer& l, int activations, float* x, int64_t from, int64_t n, const Memory& memory, const float* queries) {
  Scratch& s = scratch;
  const int64_t d = m.hidden;
  grow(s.a, n * std::max<int64_t>(query_width(m), d));
  grow(s.b, n * d);
  grow(s.wide, n * m.feed_forward);
  grow(s.scores, num_scores(longest(memory, from, n)));
  float* in = x + from * d;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t h = 0; h < m.heads; ++h) attend_row(k, m, memory, from + i, h, queries + (from + i) * query_width(m), s.scores.data(), s.a.data() + i * query_width(m));
  s.held.forget();
  product(k, l.o, activations, s.a.data(), n, s.held, l.o_bias, s.b.data());
  k.add(in, s.b.data(), n * d);
  const float* into = in;
  if (m.norm_first) {
    norm(k, m, l.norm2_gain, l.norm2_bias, in, n, s.a.data());
    into = s.a.data();
  } else {
    norm(k, m, l.norm1_gain, l.norm1_bias, in, n, in);
  }
  s.held.forget();
  if (m.family == MB_LLAMA) {
    grow(s.gate, n * m.feed_forward);
    product(k, l.gate, activations, into, n, s.held, l.gate_bias, s.gate.data());
    product(k, l.up, activations, into, n, s.held, l.up_bias, s.wide.data());
    k.activate(m.activation, s.gate.data(), n * m.feed_forward);
    k.multiply(s.wide.data(), s.gate.data(), n * m.feed_forward);
  } else {
    product(k, l.up, activations, into, n, s.held, l.up_bias, s.wide.data());
    k.activate(m.activation, s.wide.data(), n * m.feed_forward);
  }
  s.held.forget();
  product(k, l.down, activations, s.wide.data(), n, s.held, l.down_bias, s.b.data());
  k.add(in, s.b.data(), n * d);
  if (!m.norm_first) norm(k, m, l.norm2_gain, l.norm2_bias, in, n, in);
}

// The same with few rows: every product is shared by the threads. Buffers are the caller's, so that nothing is allocated.
struct FewRows {
  Quantized held;
  std::vector<float> a, b, wide, gate, key, value, scores;
  int64_t scores_each = 0;

  void reserve(const mb_model& m, int64_t rows, int64_t context) {
    const int64_t most = std::max<int64_t>({m.hidden, m.feed_forward, query_width(m)});
    grow(a, rows * std::max<int64_t>(m.hidden, query_width(m)));
    grow(b, rows * m.hidden);
    grow(wide, rows * m.feed_forward);
    grow(gate, m.family == MB_LLAMA ? rows * m.feed_forward : 0);
    grow(key, rows * key_width(m));
    grow(value, rows * key_width(m));
    scores_each = num_scores(context);
    grow(scores, rows * m.heads * scores_each);
    int64_t width = most + 64, groups = 1;
    auto see = [&](const mb_matrix& w) {
      if (!w.packed) return;
      const Cut cut = cut_of(w);
      width = std::max(width, cut.width());
      groups = std::max(groups, cut.num_groups);
    };
    for (int32_t i = 0; i < m.num_layers; ++i)
      for (const mb_matrix* w : {&m.layers[i].q, &m.layers[i].k, &m.layers[i].v, &m.layers[i].o, &m.layers[i].gate, &m.layers[i].up, &m.layers[i].down}) see(*w);
    see(m.head);
    held.reserve(rows, width, groups);
  }
};

struct Target {
  const mb_matrix* w;
  const float* bias;
  float* y;
};

// y = x W^T + bias for up to three matrices of the same input; `after` sees each finished part: number of the matrix, from row, to row.
template <class After>
void share(const Kernels& k, int activations, const float* x, int64_t n, Quantized& held, const Target* targets, int count, After&& after, int number = 0) {
  int64_t blocks = 0;
  bool alike = true;
  for (int i = 0; i < count; ++i) {
    blocks += num_blocks(targets[i].w->rows);
    alike = alike && (in_float(*targets[i].w, activations) || cut_of(*targets[i].w) == cut_of(*targets[0].w)) && in_float(*targets[i].w, activations) == in_float(*targets[0].w, activations);
  }
  if (!alike) {
    for (int i = 0; i < count; ++i) share(k, activations, x, n, held, targets + i, 1, after, i);
    return;
  }
  Rows8 rows{};
  if (!in_float(*targets[0].w, activations)) rows = held.rows(k, *targets[0].w, x, n);
  const int64_t chunks = num_threads() < 2 ? 1 : std::min<int64_t>(blocks, 4 * num_threads());
  parallel_for(chunks, [&](int64_t c) {
    int64_t b0 = blocks * c / chunks, b1 = blocks * (c + 1) / chunks;
    for (int i = 0; i < count && b1 > 0; ++i) {
      const mb_matrix& w = *targets[i].w;
      const int64_t own = num_blocks(w.rows), from = std::max<int64_t>(0, b0), to = std::min(own, b1);
      if (from < to) {
        if (in_float(w, activations)) k.gemm_float(w, x, w.cols, 0, n, from, to, targets[i].bias, targets[i].y, w.rows);
        else k.gemm_int8(w, rows, 0, n, from, to, targets[i].bias, targets[i].y, w.rows);
        after(number + i, from * kBlockRows, std::min(w.rows, to * kBlockRows));
      }
      b0 -= own;
      b1 -= own;
    }
  });
}

void layer_of_few(const Kernels& k, const mb_model& m, const mb_layer& l, int activations, float* x, int64_t n, const int32_t* positions, const Memory& memory, float* queries, FewRows& s) {
  const int64_t d = m.hidden;
  auto nothing = [](int, int64_t, int64_t) {};
  const float* in = x;
  if (m.norm_first) {
    norm(k, m, l.norm1_gain, l.norm1_bias, x, n, s.a.data());
    in = s.a.data();
  }
  s.held.forget();
  const Target qkv[3] = {{&l.q, l.q_bias, queries}, {&l.k, l.k_bias, s.key.data()}, {&l.v, l.v_bias, s.value.data()}};
  share(k, activations, in, n, s.held, qkv, 3, nothing);
  remember(m, memory, positions, 0, n, queries, s.key.data(), s.value.data());
  int64_t work = 0;
  for (int64_t i = 0; i < n; ++i) work += memory.length[i];
  auto heads = [&](int64_t j) { attend_row(k, m, memory, j / m.heads, j % m.heads, queries + j / m.heads * query_width(m), s.scores.data() + j * s.scores_each, s.a.data() + j / m.heads * query_width(m)); };
  if (work * query_width(m) < 16384) for (int64_t j = 0; j < n * m.heads; ++j) heads(j);
  else parallel_for(n * m.heads, heads);
  s.held.forget();
  const Target out{&l.o, l.o_bias, s.b.data()};
  share(k, activations, s.a.data(), n, s.held, &out, 1, nothing);
  k.add(x, s.b.data(), n * d);
  const float* into = x;
  if (m.norm_first) {
    norm(k, m, l.norm2_gain, l.norm2_bias, x, n, s.a.data());
    into = s.a.data();
  } else {
    norm(k, m, l.norm1_gain, l.norm1_bias, x, n, x);
  }
  s.held.forget();
  const bool gated = m.family == MB_LLAMA;
  const Target up[2] = {{gated ? &l.gate : &l.up, gated ? l.gate_bias : l.up_bias, gated ? s.gate.data() : s.wide.data()}, {&l.up, l.up_bias, s.wide.data()}};
  share(k, activations, into, n, s.held, up, gated ? 2 : 1, [&](int which, int64_t from, int64_t to) {
    if (which == 0) for (int64_t i = 0; i < n; ++i) k.activate(m.activation, up[0].y + i * m.feed_forward + from, to - from);
  });
  if (gated) k.multiply(s.wide.data(), s.gate.data(), n * m.feed_forward);
  s.held.forget();
  const Target down{&l.down, l.down_bias, s.b.data()};
  share(k, activations, s.wide.data(), n, s.held, &down, 1, nothing);
  k.add(x, s.b.data(), n * d);
  if (!m.norm_first) norm(k, m, l.norm2_gain, l.norm2_bias, x, n, x);
}

bool are_few(int64_t rows) { return rows < 12 * num_threads(); }

// Rows of a chunk: enough for the weights to be read rarely, few enough for the widest activations to stay in the cache.
int64_t chunk_rows(const mb_model& m, int64_t rows) {
  const int64_t fit = std::max<int64_t>(12, std::min<int64_t>(96, (512 << 10) / (5 * std::max<int64_t>(m.feed_forward, 4 * m.hidden)) / 6 * 6));
  return std::max<int64_t>(6, std::min(fit, ceil_div(ceil_div(rows, num_threads()), 6) * 6));
}

bool good(const mb_matrix& w, int64_t rows, int64_t cols) { return check_matrix(w) == MB_OK && w.rows == rows && w.cols == cols; }

}  // namespace

void log_softmax_at(const Kernels& k, const mb_matrix& w, int activations, const float* x, int64_t m, const float* bias, const int64_t* offsets, const int64_t* targets, float* out, float* log_partition) {
  constexpr int64_t kRows = 24, kSegment = 16;  // activation rows and weight blocks at once: 96 KiB of logits
  const int64_t blocks = num_blocks(w.rows), segments = ceil_div(blocks, kSegment), parts = ceil_div(m, kRows);
  const bool exact = in_float(w, activations);
  const Cut cut = cut_of(w);
  Quantized held;
  if (!exact) {
    held.reserve(m, cut.width(), cut.num_groups);
    parallel_for(parts, [&](int64_t p) {
      const int64_t from = p * kRows, n = std::min(kRows, m - from);
      quantize_rows(k, x + from * w.cols, n, cut, held.q.data() + from * cut.width(), held.scale.data() + from, held.sums.data() + from * cut.num_groups);
    });
  }
  std::vector<float> most(static_cast<size_t>(segments * m)), sums(static_cast<size_t>(segments * m));
  parallel_for(parts * segments, [&](int64_t task) {
    thread_local std::vector<float> logits;
    const int64_t p = task / segments, segment = task % segments, from = p * kRows, n = std::min(kRows, m - from);
    const int64_t b0 = segment * kSegment, b1 = std::min(blocks, b0 + kSegment), first = b0 * kBlockRows, count = std::min(w.rows, b1 * kBlockRows) - first;
    grow(logits, kRows * kSegment * kBlockRows);
    // The kernels write row blocks at their own place in y: a view of the weights that begins here writes at 0.
    mb_matrix part = w;
    part.packed += b0 * block_bytes(cut, w.bits);
    if (part.scales) part.scales += first * cut.num_groups;
    part.rows = count;
    const float* b = bias ? bias + first : nullptr;
    if (exact) k.gemm_float(part, x + from * w.cols, w.cols, 0, n, 0, b1 - b0, b, logits.data(), count);
    else k.gemm_int8(part, {held.q.data() + from * cut.width(), held.scale.data() + from, held.sums.data() + from * cut.num_groups}, 0, n, 0, b1 - b0, b, logits.data(), count);
    for (int64_t i = 0; i < n; ++i) {
      const float* row = logits.data() + i * count;
      float top = -std::numeric_limits<float>::infinity(), sum = 0;
      k.log_sum(row, count, &top, &sum);
      most[static_cast<size_t>(segment * m + from + i)] = top;
      sums[static_cast<size_t>(segment * m + from + i)] = sum;
      for (int64_t t = offsets[from + i]; t < offsets[from + i + 1]; ++t)
        if (targets[t] >= first && targets[t] < first + count) out[t] = row[targets[t] - first];
    }
  });
  for (int64_t i = 0; i < m; ++i) {
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t s = 0; s < segments; ++s) top = std::max(top, most[static_cast<size_t>(s * m + i)]);
    float sum = 0;
    for (int64_t s = 0; s < segments; ++s) sum += sums[static_cast<size_t>(s * m + i)] * std::exp(most[static_cast<size_t>(s * m + i)] - top);
    const float partition = top + std::log(sum);
    if (log_partition) log_partition[i] = partition;
    for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t) out[t] -= partition;
  }
}

}  // namespace mb

using namespace mb;

struct mb_state {
  mb_model model;
  int activations;
  int64_t streams;
  std::vector<float> keys, values, x, queries;
  std::vector<int32_t> rows, lengths, place, positions, length;  // rows: (streams, context) row numbers of the caches
  std::vector<int64_t> seen;  // (streams,): the last call that named a stream
  int64_t calls = 0;
  std::vector<const int32_t*> context;
  FewRows few;
};

extern "C" {

int32_t mb_check_model(const mb_model* m) {
  if (!m || !m->layers) return MB_BAD_POINTER;
  if (m->family != MB_OPT && m->family != MB_LLAMA) return MB_BAD_SHAPE;
  if (m->num_layers < 1 || m->hidden < 1 || m->heads < 1 || m->kv_heads < 1 || m->heads % m->kv_heads || m->head_dim < 1 || m->feed_forward < 1 || m->context < 1) return MB_BAD_SHAPE;
  if (m->activation < MB_RELU || m->activation > MB_SILU || m->position_offset < 0) return MB_BAD_SHAPE;
  if (check_matrix(m->embedding) || !good(m->head, m->embedding.rows, m->hidden) || m->embedding.cols != m->hidden) return MB_BAD_SHAPE;
  if (m->family == MB_OPT && (check_matrix(m->positions) || m->positions.cols != m->hidden || m->positions.rows < m->context + m->position_offset)) return MB_BAD_SHAPE;
  if (m->family == MB_LLAMA && (!m->rope_cos || !m->rope_sin || m->head_dim % 2 || !m->norm_first || !m->final_gain)) return MB_BAD_POINTER;
  const int64_t q = query_width(*m), kv = key_width(*m), d = m->hidden, f = m->feed_forward;
  for (int32_t i = 0; i < m->num_layers; ++i) {
    const mb_layer& l = m->layers[i];
    if (!good(l.q, q, d) || !good(l.k, kv, d) || !good(l.v, kv, d) || !good(l.o, d, q) || !good(l.up, f, d) || !good(l.down, d, f)) return MB_BAD_SHAPE;
    if (m->family == MB_LLAMA && (!good(l.gate, f, d) || !l.norm1_gain || !l.norm2_gain)) return MB_BAD_SHAPE;
  }
  return MB_OK;
}

int32_t mb_score_forest(const mb_model* model, int32_t activations, const int64_t* tokens, const int64_t* parents, int64_t n, int64_t max_rows, float* out) {
  if (const int32_t error = mb_check_model(model)) return error;
  if (n < 0 || (activations != MB_INT8 && activations != MB_FLOAT32)) return MB_BAD_SHAPE;
  if (n > 0 && (!tokens || !parents || !out)) return MB_BAD_POINTER;
  const mb_model& m = *model;
  const Kernels& k = kernels();
  const int64_t d = m.hidden, wide = key_width(m);
  try {
    std::vector<int32_t> depth(static_cast<size_t>(n)), row(static_cast<size_t>(n), -1);
    int64_t root = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (tokens[i] < 0 || tokens[i] >= m.embedding.rows) return MB_BAD_TOKEN;
      if (parents[i] < 0) {
        if (parents[i] != -1) return MB_BAD_TREE;
        root = i;
        depth[static_cast<size_t>(i)] = 0;
        continue;
      }
      if (parents[i] >= i || parents[i] < root) return MB_BAD_TREE;
      const int32_t above = depth[static_cast<size_t>(parents[i])];
      if (above >= m.context) return MB_TOO_LONG;  // the parent would have to be read at that position
      depth[static_cast<size_t>(i)] = above + 1;
      row[static_cast<size_t>(parents[i])] = 0;  // has a child: is read
    }
    std::vector<float> x, queries, keys, values;
    std::vector<int32_t> place, positions, length, lists;
    std::vector<int64_t> nodes, list_at, offsets, targets, order;
    std::vector<const int32_t*> context;
    std::vector<float> found;
    FewRows few;
    for (int64_t begin = 0; begin < n;) {
      // Trees [begin, end): at least one, then while the rows stay below max_rows.
      int64_t end = begin, rows = 0;
      while (end < n) {
        int64_t stop = end + 1, own = row[static_cast<size_t>(end)] == 0;
        while (stop < n && parents[stop] >= 0) own += row[static_cast<size_t>(stop++)] == 0;
        if (end > begin && rows + own > max_rows) break;
        rows += own;
        end = stop;
      }
      nodes.clear();
      positions.clear();
      length.clear();
      lists.clear();
      list_at.clear();
      for (int64_t i = begin; i < end; ++i) {
        if (parents[i] < 0) out[i] = 0.0f;
        if (row[static_cast<size_t>(i)] < 0) continue;
        const int32_t mine = static_cast<int32_t>(nodes.size());
        row[static_cast<size_t>(i)] = mine;
        list_at.push_back(static_cast<int64_t>(lists.size()));
        if (parents[i] >= 0) {
          const int32_t above = row[static_cast<size_t>(parents[i])];
          const int64_t at = list_at[static_cast<size_t>(above)];
          for (int32_t j = 0; j < length[static_cast<size_t>(above)]; ++j) lists.push_back(lists[static_cast<size_t>(at + j)]);
        }
        lists.push_back(mine);
        length.push_back(depth[static_cast<size_t>(i)] + 1);
        positions.push_back(depth[static_cast<size_t>(i)]);
        nodes.push_back(i);
      }
      if (rows) {
        grow(x, rows * d);
        grow(queries, rows * query_width(m));
        grow(keys, rows * wide);
        grow(values, rows * wide);
        place.resize(static_cast<size_t>(rows));
        std::iota(place.begin(), place.end(), 0);
        context.resize(static_cast<size_t>(rows));
        for (int64_t r = 0; r < rows; ++r) context[static_cast<size_t>(r)] = lists.data() + list_at[static_cast<size_t>(r)];
        const Memory memory{keys.data(), values.data(), place.data(), context.data(), length.data()};
        const int64_t part = chunk_rows(m, rows), chunks = ceil_div(rows, part);
        parallel_for(chunks, [&](int64_t c) {
          grow(scratch.a, d);
          for (int64_t r = c * part; r < std::min(rows, (c + 1) * part); ++r)
            embed(k, m, tokens[nodes[static_cast<size_t>(r)]], positions[static_cast<size_t>(r)], x.data() + r * d, scratch.a.data());
        });
        const bool small = are_few(rows);
        if (small) few.reserve(m, rows, longest(memory, 0, rows));
        for (int32_t i = 0; i < m.num_layers; ++i) {
          const mb_layer& l = m.layers[i];
          if (small) {
            layer_of_few(k, m, l, activations, x.data(), rows, positions.data(), memory, queries.data(), few);
            continue;
          }
          parallel_for(chunks, [&](int64_t c) { keys_and_values(k, m, l, activations, x.data(), c * part, std::min(part, rows - c * part), positions.data(), memory, queries.data()); });
          parallel_for(chunks, [&](int64_t c) { rest_of_layer(k, m, l, activations, x.data(), c * part, std::min(part, rows - c * part), memory, queries.data()); });
        }
        if (m.final_gain) norm(k, m, m.final_gain, m.final_bias, x.data(), rows, x.data());
        // Children of each row, by token.
        order.clear();
        for (int64_t i = begin; i < end; ++i) if (parents[i] >= 0) order.push_back(i);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
          const int32_t ra = row[static_cast<size_t>(parents[a])], rb = row[static_cast<size_t>(parents[b])];
          return ra != rb ? ra < rb : tokens[a] < tokens[b];
        });
        offsets.assign(static_cast<size_t>(rows + 1), 0);
        targets.clear();
        for (int64_t i : order) {
          ++offsets[static_cast<size_t>(row[static_cast<size_t>(parents[i])]) + 1];
          targets.push_back(tokens[i]);
        }
        for (int64_t r = 0; r < rows; ++r) offsets[static_cast<size_t>(r + 1)] += offsets[static_cast<size_t>(r)];
        found.resize(targets.size());
        log_softmax_at(k, m.head, activations, x.data(), rows, m.head_bias, offsets.data(), targets.data(), found.data(), nullptr);
        for (size_t i = 0; i < order.size(); ++i) out[order[i]] = found[i];
      }
      begin = end;
    }
  } catch (const std::bad_alloc&) {
    return MB_NO_MEMORY;
  } catch (const std::length_error&) {
    return MB_NO_MEMORY;
  }
  return MB_OK;
}

mb_state* mb_state_new(const mb_model* model, int32_t activations, int64_t streams) {
  if (mb_check_model(model) || streams < 1 || streams > (1 << 20) || (activations != MB_INT8 && activations != MB_FLOAT32)) return nullptr;
  try {
    auto s = std::make_unique<mb_state>();
    s->model = *model;
    s->activations = activations;
    s->streams = streams;
    const mb_model& m = s->model;
    const int64_t rows = streams * m.context;
    if (rows > std::numeric_limits<int32_t>::max()) return nullptr;
    s->keys.resize(static_cast<size_t>(rows * key_width(m) * m.num_layers));
    s->values.resize(s->keys.size());
    s->rows.resize(static_cast<size_t>(rows));
    std::iota(s->rows.begin(), s->rows.end(), 0);
    s->lengths.assign(static_cast<size_t>(streams), 0);
    s->seen.assign(static_cast<size_t>(streams), 0);
    s->x.resize(static_cast<size_t>(streams * m.hidden));
    s->queries.resize(static_cast<size_t>(streams * query_width(m)));
    s->place.resize(static_cast<size_t>(streams));
    s->positions.resize(static_cast<size_t>(streams));
    s->length.resize(static_cast<size_t>(streams));
    s->context.resize(static_cast<size_t>(streams));
    s->few.reserve(m, streams, m.context);
    return s.release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  } catch (const std::length_error&) {
    return nullptr;
  }
}

void mb_state_free(mb_state* state) { delete state; }

int32_t mb_state_reset(mb_state* state, int64_t stream) {
  if (!state) return MB_BAD_POINTER;
  if (stream < -1 || stream >= state->streams) return MB_BAD_SHAPE;
  if (stream >= 0) state->lengths[static_cast<size_t>(stream)] = 0;
  else std::fill(state->lengths.begin(), state->lengths.end(), 0);
  return MB_OK;
}

int64_t mb_state_length(const mb_state* state, int64_t stream) {
  return state && stream >= 0 && stream < state->streams ? state->lengths[static_cast<size_t>(stream)] : -1;
}

int32_t mb_step(mb_state* state, const int64_t* streams, const int64_t* tokens, int64_t n, float* logits) {
  if (!state || (n > 0 && (!streams || !tokens || !logits))) return MB_BAD_POINTER;
  mb_state& s = *state;
  const mb_model& m = s.model;
  if (n < 0 || n > s.streams) return MB_BAD_SHAPE;
  ++s.calls;
  for (int64_t i = 0; i < n; ++i) {
    if (streams[i] < 0 || streams[i] >= s.streams) return MB_BAD_SHAPE;
    if (std::exchange(s.seen[static_cast<size_t>(streams[i])], s.calls) == s.calls) return MB_BAD_SHAPE;
    if (tokens[i] < 0 || tokens[i] >= m.embedding.rows) return MB_BAD_TOKEN;
    if (s.lengths[static_cast<size_t>(streams[i])] >= m.context) return MB_TOO_LONG;
  }
  if (n == 0) return MB_OK;
  const Kernels& k = kernels();
  const int64_t d = m.hidden, wide = key_width(m), per_layer = s.streams * m.context * wide;
  try {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t stream = streams[i];
      const int32_t at = s.lengths[static_cast<size_t>(stream)];
      s.positions[static_cast<size_t>(i)] = at;
      s.length[static_cast<size_t>(i)] = at + 1;
      s.place[static_cast<size_t>(i)] = static_cast<int32_t>(stream * m.context + at);
      s.context[static_cast<size_t>(i)] = s.rows.data() + stream * m.context;
      embed(k, m, tokens[i], at, s.x.data() + i * d, s.few.b.data());
    }
    const bool small = are_few(n);
    const int64_t part = chunk_rows(m, n), chunks = ceil_div(n, part);
    for (int32_t i = 0; i < m.num_layers; ++i) {
      const mb_layer& l = m.layers[i];
      const Memory memory{s.keys.data() + i * per_layer, s.values.data() + i * per_layer, s.place.data(), s.context.data(), s.length.data()};
      if (small) {
        layer_of_few(k, m, l, s.activations, s.x.data(), n, s.positions.data(), memory, s.queries.data(), s.few);
        continue;
      }
      parallel_for(chunks, [&](int64_t c) { keys_and_values(k, m, l, s.activations, s.x.data(), c * part, std::min(part, n - c * part), s.positions.data(), memory, s.queries.data()); });
      parallel_for(chunks, [&](int64_t c) { rest_of_layer(k, m, l, s.activations, s.x.data(), c * part, std::min(part, n - c * part), memory, s.queries.data()); });
    }
    if (m.final_gain) norm(k, m, m.final_gain, m.final_bias, s.x.data(), n, s.x.data());
    s.few.held.forget();
    const Target head{&m.head, m.head_bias, logits};
    share(k, s.activations, s.x.data(), n, s.few.held, &head, 1, [](int, int64_t, int64_t) {});
  } catch (const std::bad_alloc&) {
    return MB_NO_MEMORY;
  }
  for (int64_t i = 0; i < n; ++i) ++s.lengths[static_cast<size_t>(streams[i])];
  return MB_OK;
}

}  // extern "C"
