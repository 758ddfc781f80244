// Every instruction set of the CPU library against its scalar code, to the bit, through the C interface alone: products, embeddings,
// log-softmax, forests and steps of small OPT and Llama models. Prints the instruction sets and the number of comparisons; exits
// with 1 at the first difference, and if a step of few streams allocates memory. Built by test_isas.py, also for other processors, and
// by test_sanitizers.py with sanitizers.
//
// Usage: compare_isas NUM_THREADS
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>
#include <string>
#include <vector>

#include "mixbits.h"

std::atomic<int64_t> allocations{0};  // of the library, too: it takes operator new from this program
void* operator new(size_t size) {
  ++allocations;
  if (void* p = std::malloc(size ? size : 1)) return p;
  throw std::bad_alloc();
}
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size ? size : 1);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace {

uint64_t state = 88172645463325252ull;
uint32_t next() {  // xorshift64
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return static_cast<uint32_t>(state >> 32);
}
float number() { return static_cast<float>(static_cast<int32_t>(next())) / 2147483648.0f; }
std::vector<float> numbers(int64_t n, float size, float plus = 0.0f) {
  std::vector<float> v(static_cast<size_t>(n));
  for (auto& x : v) x = number() * size + plus;
  return v;
}
void need(int32_t error, const char* what) {
  if (!error) return;
  std::printf("%s: %s\n", what, mb_error_text(error));
  std::exit(1);
}

struct Matrix {
  std::vector<uint8_t> packed;
  std::vector<float> scales;
  mb_matrix w{};

  Matrix(int64_t rows, int64_t cols, int bits, int64_t group, bool half_step) {
    packed.resize(static_cast<size_t>(mb_packed_bytes(rows, cols, group, bits)));
    std::vector<uint8_t> codes(static_cast<size_t>((rows * cols * bits + 7) / 8));
    for (auto& c : codes) {
      c = static_cast<uint8_t>(next());
      if (bits == 8 && c == 255) c = 0;
    }
    if (bits == 16)  // float16 numbers between -2 and 2
      for (int64_t i = 0; i < rows * cols; ++i) codes[static_cast<size_t>(2 * i + 1)] &= 0xbf;
    need(mb_repack(codes.data(), static_cast<int64_t>(codes.size()), rows, cols, group, bits, 0, packed.data()), "repack");
    w.packed = packed.data();
    w.rows = rows;
    w.cols = cols;
    w.group = group;
    w.bits = bits;
    w.mul = 1;
    if (bits == 16) return;
    scales.resize(static_cast<size_t>(mb_num_scales(rows, cols, group)));
    const int64_t groups = group ? (cols + group - 1) / group : 1;
    const float size = 0.5f / static_cast<float>(1 << bits);
    const auto own = numbers(rows * groups, 0.3f * size, size);
    need(mb_repack_scales(own.data(), groups, 1.0f, rows, cols, group, scales.data()), "scales");
    w.scales = scales.data();
    w.mul = bits == 1 || (half_step && bits != 8) ? 2 : 1;
    w.off = bits == 8 ? 127 : w.mul == 2 ? (1 << bits) - 1 : (1 << (bits - 1)) - 1;
  }
};

std::vector<std::string> sets;
int64_t comparisons = 0;

// `run` with every instruction set; what it returns must be the scalar code's.
template <class F> void compare(const std::string& what, F&& run) {
  need(mb_set_isa("scalar"), "scalar");
  const std::vector<float> expected = run();
  for (const auto& name : sets) {
    need(mb_set_isa(name.c_str()), name.c_str());
    const std::vector<float> got = run();
    ++comparisons;
    if (got.size() == expected.size() && !std::memcmp(got.data(), expected.data(), got.size() * sizeof(float))) continue;
    for (size_t i = 0; i < got.size(); ++i)
      if (std::memcmp(&got[i], &expected[i], 4)) {
        std::printf("%s: %s gives %.9g at %zu, scalar %.9g\n", what.c_str(), name.c_str(), static_cast<double>(got[i]), i, static_cast<double>(expected[i]));
        break;
      }
    std::exit(1);
  }
}

void matrices() {
  const int64_t shapes[][2] = {{1, 1}, {3, 7}, {64, 32}, {67, 131}, {1100, 20}, {65, 530}};
  for (int bits : {1, 2, 3, 4, 8, 16})
    for (int half_step = 0; half_step < 2; ++half_step)
      for (const auto& shape : shapes)
        for (int64_t group : {0, 7, 32, 100}) {
          if (bits == 16 && (group || half_step)) continue;
          const int64_t rows = shape[0], cols = shape[1];
          const Matrix m(rows, cols, bits, group, half_step != 0);
          const auto x = numbers(25 * cols, 3.0f), bias = numbers(rows, 1.0f);
          const std::string name = std::to_string(bits) + " bits, " + std::to_string(rows) + " x " + std::to_string(cols) + ", group " + std::to_string(group);
          for (int64_t count : {1, 2, 3, 4, 5, 6, 7, 25})
            for (int activations : {MB_INT8, MB_FLOAT32})
              compare(name, [&] {
                std::vector<float> y(static_cast<size_t>(count * rows));
                need(mb_linear(&m.w, activations, x.data(), count, bias.data(), y.data()), "linear");
                return y;
              });
          compare(name + ", rows", [&] {
            const int64_t ids[3] = {0, rows - 1, rows / 2};
            std::vector<float> y(static_cast<size_t>(3 * cols));
            need(mb_embedding(&m.w, ids, 3, y.data()), "embedding");
            return y;
          });
          for (int activations : {MB_INT8, MB_FLOAT32})
            compare(name + ", log-softmax", [&] {
              std::vector<int64_t> offsets, targets;
              for (int64_t i = 0; i <= 25; ++i) offsets.push_back(2 * i);
              for (int64_t i = 0; i < 25; ++i) targets.insert(targets.end(), {i % rows / 2, rows - 1});
              std::vector<float> y(50 + 25);
              need(mb_log_softmax_at(&m.w, activations, x.data(), 25, bias.data(), offsets.data(), targets.data(), y.data(), y.data() + 50), "log-softmax");
              return y;
            });
        }
}

// A model whose matrices have bits one after the other of a list.
struct Model {
  std::deque<Matrix> matrices;
  std::deque<std::vector<float>> vectors;
  std::vector<mb_layer> layers{2};
  mb_model m{};
  int used = 0;

  mb_matrix matrix(int64_t rows, int64_t cols) {
    static const int bits[] = {4, 16, 2, 8, 3, 1, 2};
    static const int64_t groups[] = {0, 0, 7, 0, 32, 0, 0};
    const int i = used++ % 7;
    matrices.emplace_back(rows, cols, bits[i], groups[i], used % 2 == 0);
    return matrices.back().w;
  }
  const float* vector(int64_t n, float plus = 0.0f) {
    vectors.push_back(numbers(n, 0.3f, plus));
    return vectors.back().data();
  }
  Model(int family, int activation, bool norm_first, int skip) : used(skip) {
    const int64_t d = 72, ff = 130, vocabulary = 1050;
    const bool opt = family == MB_OPT;
    m.family = family;
    m.num_layers = 2;
    m.hidden = static_cast<int32_t>(d);
    m.heads = 4;
    m.kv_heads = opt ? 4 : 2;
    m.head_dim = opt ? 18 : 20;
    m.feed_forward = static_cast<int32_t>(ff);
    m.context = 20;
    m.activation = activation;
    m.norm_first = norm_first;
    m.position_offset = opt ? 2 : 0;
    m.eps = 1e-5f;
    m.attention_scale = 0.25f;
    m.embedding = matrix(vocabulary, d);
    m.head = matrix(vocabulary, d);
    if (opt) m.positions = matrix(22, d);
    if (norm_first) m.final_gain = vector(d, 1.0f), m.final_bias = vector(d);
    m.rope_cos = vector(20 * 20);
    m.rope_sin = vector(20 * 20);
    const int64_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
    for (auto& l : layers) {
      l = mb_layer{};
      l.q = matrix(q, d), l.k = matrix(kv, d), l.v = matrix(kv, d), l.o = matrix(d, q);
      if (!opt) l.gate = matrix(ff, d);
      l.up = matrix(ff, d), l.down = matrix(d, ff);
      l.q_bias = vector(q), l.up_bias = vector(ff), l.down_bias = vector(d);
      l.norm1_gain = vector(d, 1.0f), l.norm1_bias = vector(d);
      l.norm2_gain = vector(d, 1.0f), l.norm2_bias = vector(d);
    }
    m.layers = layers.data();
    need(mb_check_model(&m), "model");
  }
};

void models() {
  for (int which = 0; which < 8; ++which) {
    const bool opt = which < 4;
    const int kinds[] = {MB_RELU, MB_GELU, MB_GELU_TANH, MB_SILU};
    const Model model(opt ? MB_OPT : MB_LLAMA, kinds[which % 4], !opt || which % 2, which);
    std::vector<int64_t> tokens, parents, depth;
    int64_t root = 0;
    for (int64_t i = 0; i < 150; ++i) {
      const bool is_root = i == 0 || next() % 20 == 0;
      int64_t parent = -1;
      if (is_root) root = i;
      else do parent = root + next() % (i - root); while (depth[static_cast<size_t>(parent)] >= 20);
      tokens.push_back(next() % 1050);
      parents.push_back(parent);
      depth.push_back(is_root ? 0 : depth[static_cast<size_t>(parent)] + 1);
    }
    for (int activations : {MB_INT8, MB_FLOAT32})
      for (int64_t max_rows : {1, 40, 1000})
        compare("forest of model " + std::to_string(which), [&] {
          std::vector<float> y(150);
          const int64_t before = allocations;
          need(mb_score_forest(&model.m, activations, tokens.data(), parents.data(), 150, max_rows, y.data()), "forest");
          if (allocations == before) std::printf("the library's allocations are not seen\n"), std::exit(1);
          return y;
        });
    for (int64_t count : {1, 3, 50})
      compare("steps of model " + std::to_string(which), [&] {
        mb_state* streams = mb_state_new(&model.m, which % 2, 50);
        std::vector<float> all, y(static_cast<size_t>(count * 1050));
        std::vector<int64_t> numbers_of(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) numbers_of[static_cast<size_t>(i)] = 49 - i;
        for (int64_t step = 0; step < 3; ++step) {
          const int64_t before = allocations;
          need(mb_step(streams, numbers_of.data(), tokens.data() + step, count, y.data()), "step");
          if (step > 0 && count < 12 && allocations != before) std::printf("a step allocates\n"), std::exit(1);
          all.insert(all.end(), y.begin(), y.end());
        }
        mb_state_free(streams);
        return all;
      });
  }
}

}  // namespace

int main(int, char** arguments) {
  mb_set_num_threads(std::atoi(arguments[1]));
  std::string names = mb_isas();
  std::printf("%s\n", names.c_str());
  for (size_t at = 0; at != std::string::npos && at < names.size();) {
    const size_t end = names.find(',', at);
    const std::string name = names.substr(at, end == std::string::npos ? end : end - at);
    if (name != "scalar" || sets.empty()) sets.push_back(name);  // where there is no other, with itself: chunks and threads are tested
    at = end == std::string::npos ? end : end + 1;
  }
  matrices();
  models();
  std::printf("%lld comparisons\n", static_cast<long long>(comparisons));
}
