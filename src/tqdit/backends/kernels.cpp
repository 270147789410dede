// Fused CPU kernels around the integer matmuls of a DiT block. Compiled on the user's machine at first use (native.py).
//
// Codes travel as unsigned bytes u = code + 128, because VNNI multiplies unsigned by signed bytes. Integer sums are
// exact; float arithmetic follows ops/reference.py operation by operation (the build forbids contraction to fma), so
// that codes differ only where exp, GELU or LayerNorm, which round differently from torch's, meet a rounding boundary.
// Rows are independent and each is summed in one fixed order: neither threads nor the batch change a result.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16;
typedef float vfloat __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint8_t vbyte __attribute__((vector_size(16)));
typedef int8_t vchar __attribute__((vector_size(16)));

inline vfloat splat(float x) { return vfloat{} + x; }
inline vfloat load(const float* p) { vfloat v; std::memcpy(&v, p, sizeof v); return v; }
inline vint load(const int32_t* p) { vint v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
inline vfloat load(const float* p, int64_t count) {
  if (count >= LANES) return load(p);
  vfloat v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline vint load(const int32_t* p, int64_t count) {
  if (count >= LANES) return load(p);
  vint v{};
  std::memcpy(&v, p, count * sizeof(int32_t));
  return v;
}
inline vfloat load_or_one(const float* p, int64_t count) {  // for divisors
  if (count >= LANES) return load(p);
  vfloat v = splat(1.0f);
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline void store(float* p, vfloat v, int64_t count) {
  if (count >= LANES)
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, count * sizeof(float));
}
inline vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }
inline void store_bytes(uint8_t* p, vint v, int64_t count) {
  const vbyte bytes = __builtin_convertvector(v, vbyte);
  if (count >= LANES)
    std::memcpy(p, &bytes, LANES);  // of known size: one instruction
  else
    std::memcpy(p, &bytes, count);
}
// GCC converts bytes to ints one by one; in two steps it does not.
inline vint widen(vchar v) {
  typedef int16_t vshort __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(v, vshort), vint);
}
inline vint widen(vbyte v) {
  typedef uint16_t vshort __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(v, vshort), vint);
}
inline vfloat at_most(vfloat a, vfloat b) { return a < b ? a : b; }
inline vfloat at_least(vfloat a, vfloat b) { return a > b ? a : b; }

// All lanes into one, by halves.
template <typename Scalar, typename Vector, typename Combine>
inline Scalar reduce(Vector v, Combine combine) {
  typedef Scalar Half __attribute__((vector_size(32)));
  typedef Scalar Quarter __attribute__((vector_size(16)));
  struct { Half low, high; } halves;
  struct { Quarter low, high; } quarters;
  std::memcpy(&halves, &v, sizeof v);
  const Half half = combine(halves.low, halves.high);
  std::memcpy(&quarters, &half, sizeof half);
  const Quarter four = combine(quarters.low, quarters.high);
  return combine(combine(four[0], four[2]), combine(four[1], four[3]));
}
inline float sum(vfloat v) { return reduce<float>(v, [](auto a, auto b) { return a + b; }); }
inline int32_t sum(vint v) { return reduce<int32_t>(v, [](auto a, auto b) { return a + b; }); }
inline float largest(vfloat v) { return reduce<float>(v, [](auto a, auto b) { return a > b ? a : b; }); }

// a * b + c, only where results are not promised bit for bit: inside exp and GELU.
inline vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vfloat>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                  reinterpret_cast<__m512>(c)));
#else
  return a * b + c;
#endif
}

// Nearest integer, half to even, of |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction, and the low bits of the
// sum are the integer.
inline vint nearest(vfloat x) {
  const vfloat shifted = x + 12582912.0f;
  vint bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4B400000;
}
inline vfloat clip(vfloat x, vfloat low, vfloat high) { return at_most(at_least(x, low), high); }

// exp(x) within 2 ulp, x clipped to +-87: 2^n p(r), |r| <= ln(2) / 2, p the Taylor polynomial of degree 7.
inline vfloat exponential(vfloat x) {
  const vfloat big = splat(12582912.0f);
  x = at_most(at_least(x, splat(-87.0f)), splat(87.0f));
  const vfloat shifted = multiply_add(x, splat(1.44269504088896341f), big), n = shifted - big;
  const vfloat r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  vfloat p = splat(1.0f / 5040);
  for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = multiply_add(p, r, splat(coefficient));
  vint exponent;  // the low bits of `shifted` are n
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent + 127) << 23;
  vfloat power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

// tanh-GELU: x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline vfloat gelu(vfloat x) {
  const vfloat twice = x * multiply_add(x * x, splat(-2.0f * 0.7978845608028654f * 0.044715f),
                                        splat(-2.0f * 0.7978845608028654f));
  return x / (1.0f + exponential(twice));
}

// c[r][j] = sum_k a[r][k] b[k][j] for R rows and C * 16 columns. b is packed in fours: [k / 4][column][k % 4].
template <int R, int C>
inline void dot_tile(const uint8_t* a, int64_t lda, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
                     int64_t ldc) {
#if defined(__AVX512VNNI__)
  __m512i sums[R][C];  // in registers, once the loops over it are unrolled
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sums[r][j] = _mm512_setzero_si512();
  for (int64_t k = 0; k < fours; ++k) {
    __m512i right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) right[j] = _mm512_loadu_si512(b + k * columns * 4 + j * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t left;
      std::memcpy(&left, a + r * lda + k * 4, 4);
      const __m512i four = _mm512_set1_epi32(left);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], four, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) _mm512_storeu_si512(c + r * ldc + j * LANES, sums[r][j]);
#else
  for (int r = 0; r < R; ++r) {
    int32_t sums[C * LANES] = {};
    for (int64_t k = 0; k < fours; ++k)
      for (int i = 0; i < 4; ++i) {
        const int32_t left = a[r * lda + k * 4 + i];
        for (int j = 0; j < C * LANES; ++j) sums[j] += left * b[(k * columns + j) * 4 + i];
      }
    std::memcpy(c + r * ldc, sums, sizeof sums);
  }
#endif
}

template <int R>
inline void dot_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
                     int64_t ldc) {
  int64_t j = 0;
  for (; columns - j > 6 * LANES; j += 4 * LANES)
    dot_tile<R, 4>(a, lda, b + j * 4, columns, fours, c + j, ldc);
  switch ((columns - j) / LANES) {
    case 6: dot_tile<R, 6>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 5: dot_tile<R, 5>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 4: dot_tile<R, 4>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 3: dot_tile<R, 3>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 2: dot_tile<R, 2>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 1: dot_tile<R, 1>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
  }
}

// (rows, 4 * fours) unsigned x packed signed -> (rows, columns) int32; columns is a multiple of 16.
void dot(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
         int64_t ldc) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<4>(a + r * lda, lda, b, columns, fours, c + r * ldc, ldc);
  for (; r < rows; ++r) dot_rows<1>(a + r * lda, lda, b, columns, fours, c + r * ldc, ldc);
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Keys as the columns of Q K^T: four adjacent items of a key become one group. Codes turn signed; padding is 0.
void pack_keys(const uint8_t* keys, int64_t stride, int64_t tokens, int64_t dim, int8_t* packed, int64_t columns) {
  std::memset(packed, 0, columns * round_up(dim, 4));
  const int64_t whole = dim / 4 * 4, rest = dim - whole;
  for (int64_t j = 0; j < tokens; ++j) {
    const uint8_t* key = keys + j * stride;
    uint32_t four;
    for (int64_t k = 0; k < whole; k += 4) {
      std::memcpy(&four, key + k, 4);
      four ^= 0x80808080u;
      std::memcpy(packed + k * columns + j * 4, &four, 4);
    }
    for (int64_t i = 0; i < rest; ++i)
      packed[whole * columns + j * 4 + i] = static_cast<int8_t>(key[whole + i] ^ 0x80);
  }
}

// Values as the columns of P V: one item of four successive tokens becomes one group.
void pack_values(const uint8_t* values, int64_t stride, int64_t tokens, int64_t dim, int8_t* packed, int64_t columns,
                 int64_t fours) {
  for (int64_t group = 0; group < fours; ++group)
    for (int64_t j = 0; j < columns; j += LANES) {
      vint four{};
      for (int64_t i = 0; i < 4 && group * 4 + i < tokens; ++i) {
        const uint8_t* from = values + (group * 4 + i) * stride + j;
        vbyte bytes = vbyte{} + static_cast<uint8_t>(0x80);  // of a padding lane: code 0
        if (dim - j >= LANES)
          std::memcpy(&bytes, from, LANES);
        else
          std::memcpy(&bytes, from, dim - j);
        four |= (widen(bytes) ^ 0x80) << (8 * i);
      }
      std::memcpy(packed + (group * columns + j) * 4, &four, sizeof four);
    }
}

// Sums of the columns of a packed matrix; `ones`: that many ones.
void column_sums(const uint8_t* ones, const int8_t* packed, int64_t columns, int64_t fours, int32_t* sums) {
  dot(ones, 0, 1, packed, columns, fours, sums, 0);
}

// Scratch memory on a cache line boundary.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : items_(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T), 64)))) {
    if (!items_) throw std::bad_alloc();
  }
  T* data() const { return items_.get(); }

 private:
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T, Free> items_;
};

enum Grid { UNIFORM = 0, TWO_REGION = 1, MERGED = 2 };

}  // namespace

extern "C" {

// Parameters of one activation: entry [sample * stride + head]; stride 0 if all samples share them. Zero points are of
// signed codes. Merged: coarse = scale * 2^shift, both regions in one grid of step `scale`.
struct Operand {
  const float *scale, *coarse;
  const int32_t *zero, *shift;
  int64_t stride, grid, bits;
};

}  // extern "C"

namespace {

// x -> unsigned code of a uniform grid.
struct Uniform {
  vfloat scale, inverse, low, high;  // low, high: steps that the codes can hold, so clipping first changes nothing
  int32_t zero;                      // of the unsigned code
  Uniform(const Operand& o, int64_t i)
      : scale(splat(o.scale[i])), inverse(splat(1.0f / o.scale[i])), low(splat(-(1 << (o.bits - 1)) - o.zero[i])),
        high(splat((1 << (o.bits - 1)) - 1 - o.zero[i])), zero(o.zero[i] + 128) {}
  vint code(vfloat x) const { return nearest(clip(x / scale, low, high)) + zero; }
  // For an x that is not promised to the last bit either.
  vint code_near(vfloat x) const { return nearest(clip(x * inverse, low, high)) + zero; }
};

}  // namespace

extern "C" {

struct AttentionCall {
  const uint8_t* qkv;  // (batch, tokens, 3, heads, dim)
  uint8_t* out;        // (batch, tokens, heads, dim)
  int8_t* trace;       // null, or (batch, heads, tokens, tokens) codes of the probabilities, for tests
  int64_t batch, tokens, heads, dim, threads;
  Operand query, key, value, probability, target;
  float factor;
};

}  // extern "C"

namespace {

constexpr int64_t QUERY_ROWS = 16;  // per pass: scores and codes of 1024 keys stay in the second-level cache

// Buffers of one thread, for one (sample, head) at a time.
struct Workspace {
  int64_t keys, depth, key_fours, value_fours;
  Buffer<int8_t> key, value;
  Buffer<int32_t> key_sums, value_sums, scores, first_sums, second_sums;
  Buffer<uint8_t> first, second, ones;
  vint inside;  // which lanes of the last vector of keys are keys
  explicit Workspace(const AttentionCall& c)
      : keys(round_up(c.tokens, LANES)), depth(round_up(c.dim, LANES)), key_fours(round_up(c.dim, 4) / 4),
        value_fours(keys / 4), key(keys * key_fours * 4), value(depth * keys), key_sums(keys), value_sums(depth),
        scores(QUERY_ROWS * keys), first_sums(QUERY_ROWS * depth), second_sums(QUERY_ROWS * depth),
        first(QUERY_ROWS * keys), second(QUERY_ROWS * keys), ones(keys + round_up(c.dim, 4)) {
    std::memset(ones.data(), 1, keys + round_up(c.dim, 4));
    for (int i = 0; i < LANES; ++i) inside[i] = keys - LANES + i < c.tokens ? -1 : 0;
  }
};

// One (sample, head) of a call, with its scales looked up.
struct Head {
  const AttentionCall& c;
  int64_t sample, head;
  int32_t query_zero, key_zero, value_zero, probability_zero, shift;  // of query and uniform probability: unsigned
  float score_scale, value_scale, s1, s2;
  Uniform probability, target;
  Head(const AttentionCall& call, int64_t b, int64_t h)
      : c(call), sample(b), head(h), query_zero(c.query.zero[b * c.query.stride + h] + 128),
        key_zero(c.key.zero[b * c.key.stride + h]), value_zero(c.value.zero[b * c.value.stride + h]),
        probability_zero(c.probability.zero[b * c.probability.stride] + 128),
        shift(c.probability.grid == MERGED ? c.probability.shift[b * c.probability.stride] : 0),
        score_scale(c.query.scale[b * c.query.stride + h] * c.key.scale[b * c.key.stride + h] * c.factor),
        value_scale(c.value.scale[b * c.value.stride + h]), s1(c.probability.scale[b * c.probability.stride]),
        s2(c.probability.coarse[b * c.probability.stride]), probability(c.probability, b * c.probability.stride),
        target(c.target, b * c.target.stride) {}
};

struct RowSums { int32_t first, second; };  // of the codes of one row of probabilities

// exp(score - top) of one row in place, and their sum. Padding becomes 0.
float exponentials(float* scores, float top, int64_t keys, vint inside) {
  vfloat total{};
  for (int64_t j = 0; j < keys; j += LANES) {
    vfloat e = exponential(load(scores + j) - top);
    if (j + LANES >= keys) e = inside ? e : vfloat{};
    total += e;
    store(scores + j, e);
  }
  return sum(total);
}

// Softmax of one row of scores and its codes: `first` uniform, merged or fine ones, `second` coarse ones.
RowSums softmax_codes(const Head& h, float* scores, float top, const Workspace& w, uint8_t* first, uint8_t* second) {
  const int64_t keys = w.keys;
  const vint everywhere = vint{} == 0, inside = w.inside;
  const vfloat share = splat(1.0f / exponentials(scores, top, keys, inside));
  const vfloat limit = splat((1 << (h.c.probability.bits - 1)) - 1), border = limit * h.s1;
  const vfloat per_s1 = splat(1.0f / h.s1), per_s2 = splat(1.0f / h.s2);
  vint first_total{}, second_total{};
  for (int64_t j = 0; j < keys; j += LANES) {
    const vfloat p = load(scores + j) * share;
    const vint valid = j + LANES >= keys ? inside : everywhere;
    if (h.c.probability.grid == UNIFORM) {
      const vint code = h.probability.code_near(p) & valid;
      first_total += code;
      store_bytes(first + j, code, LANES);
      continue;
    }
    const vint fine = p <= border;
    const vint code = nearest(at_most(p * (fine ? per_s1 : per_s2), limit)) & valid;
    const bool merged = h.c.probability.grid == MERGED;
    const vint in_first = merged ? (fine ? code : code << h.shift) : (code & fine);
    first_total += in_first;
    store_bytes(first + j, in_first, LANES);
    if (merged) continue;
    second_total += code & ~fine;
    store_bytes(second + j, code & ~fine, LANES);
  }
  return {sum(first_total), sum(second_total)};
}

// One row of P V from its exact sums, quantized for the output projection.
void attended_codes(const Head& h, RowSums rows, const Workspace& w, int64_t row, uint8_t* out) {
  const int32_t *firsts = w.first_sums.data() + row * w.depth, *seconds = w.second_sums.data() + row * w.depth;
  for (int64_t j = 0; j < h.c.dim; j += LANES) {
    vint acc = load(firsts + j) - h.value_zero * rows.first;
    vfloat x;
    if (h.c.probability.grid == TWO_REGION) {
      const vint second = load(seconds + j) - h.value_zero * rows.second;
      x = (to_float(second) * h.s2 + to_float(acc) * h.s1) * h.value_scale;
    } else {
      if (h.c.probability.grid == UNIFORM) {
        const vint centred = load(w.value_sums.data() + j) - static_cast<int32_t>(h.c.tokens) * h.value_zero;
        acc -= h.probability_zero * centred;
      }
      x = to_float(acc) * (h.s1 * h.value_scale);
    }
    store_bytes(out + j, h.target.code(x), h.c.dim - j);
  }
}

// Codes as ops/reference.py has them: signed, a fine code negative.
void write_trace(const Head& h, const uint8_t* first, const uint8_t* second, int8_t* trace) {
  const bool two = h.c.probability.grid == TWO_REGION;
  for (int64_t j = 0; j < h.c.tokens; ++j) trace[j] = two ? second[j] - first[j] : first[j] - 128;
}

// Integer scores of one row, zero points corrected, times their scale, in place; the largest one.
float scale_scores(const Head& h, const uint8_t* query, const Workspace& w, int32_t* scores) {
  int32_t query_sum = 0;
  for (int64_t k = 0; k < h.c.dim; ++k) query_sum += query[k];
  const int32_t constant = h.key_zero * (static_cast<int32_t>(h.c.dim) * h.query_zero - query_sum);
  const vfloat lowest = splat(-3.0e38f);
  vfloat top = lowest;
  for (int64_t j = 0; j < w.keys; j += LANES) {
    const vint acc = load(scores + j) + (constant - h.query_zero * load(w.key_sums.data() + j));
    const vfloat x = to_float(acc) * h.score_scale;
    top = at_least(top, j + LANES >= w.keys ? (w.inside ? x : lowest) : x);
    std::memcpy(scores + j, &x, sizeof x);
  }
  return largest(top);
}

// The product of the coarse codes, of which many rows have none.
void second_product(const RowSums* sums, int64_t rows, Workspace& w) {
  for (int64_t r = 0; r < rows; r += 4) {
    const int64_t count = rows - r < 4 ? rows - r : 4;
    bool any = false;
    for (int64_t i = 0; i < count; ++i) any |= sums[r + i].second != 0;
    int32_t* out = w.second_sums.data() + r * w.depth;
    if (any)
      dot(w.second.data() + r * w.keys, w.keys, count, w.value.data(), w.depth, w.value_fours, out, w.depth);
    else
      std::memset(out, 0, count * w.depth * sizeof *out);
  }
}

// Query rows [begin, end) of one head.
void attend(const Head& h, int64_t begin, int64_t end, Workspace& w) {
  const AttentionCall& c = h.c;
  const int64_t width = c.heads * c.dim, stride = 3 * width;
  const uint8_t* query = c.qkv + h.sample * c.tokens * stride + h.head * c.dim;
  pack_keys(query + width, stride, c.tokens, c.dim, w.key.data(), w.keys);
  column_sums(w.ones.data(), w.key.data(), w.keys, w.key_fours, w.key_sums.data());
  pack_values(query + 2 * width, stride, c.tokens, c.dim, w.value.data(), w.depth, w.value_fours);
  column_sums(w.ones.data(), w.value.data(), w.depth, w.value_fours, w.value_sums.data());
  for (int64_t i = begin; i < end; i += QUERY_ROWS) {
    const int64_t rows = end - i < QUERY_ROWS ? end - i : QUERY_ROWS;
    dot(query + i * stride, stride, rows, w.key.data(), w.keys, w.key_fours, w.scores.data(), w.keys);
    RowSums sums[QUERY_ROWS];
    for (int64_t r = 0; r < rows; ++r) {
      int32_t* scores = w.scores.data() + r * w.keys;
      uint8_t *first = w.first.data() + r * w.keys, *second = w.second.data() + r * w.keys;
      const float top = scale_scores(h, query + (i + r) * stride, w, scores);
      sums[r] = softmax_codes(h, reinterpret_cast<float*>(scores), top, w, first, second);
      if (c.trace)
        write_trace(h, first, second, c.trace + ((h.sample * c.heads + h.head) * c.tokens + i + r) * c.tokens);
    }
    dot(w.first.data(), w.keys, rows, w.value.data(), w.depth, w.value_fours, w.first_sums.data(), w.depth);
    if (c.probability.grid == TWO_REGION) second_product(sums, rows, w);
    for (int64_t r = 0; r < rows; ++r)
      attended_codes(h, sums[r], w, r, c.out + (h.sample * c.tokens + i + r) * width + h.head * c.dim);
  }
}

}  // namespace

extern "C" {

// Attention of all heads: exact Q K^T, fp32 softmax, exact P V, codes for the output projection.
void tqdit_attention(const AttentionCall* call) {
  const AttentionCall& c = *call;
  const int64_t heads = c.batch * c.heads;
  const int64_t most = (c.tokens + QUERY_ROWS - 1) / QUERY_ROWS;
  int64_t parts = heads >= c.threads ? 1 : (c.threads + heads - 1) / heads;
  if (parts > most) parts = most;
  const int64_t rows = round_up((c.tokens + parts - 1) / parts, QUERY_ROWS);
#pragma omp parallel num_threads(c.threads)
  {
    Workspace w(c);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * parts; ++task) {
      const int64_t unit = task / parts, first = task % parts * rows;
      const int64_t last = first + rows < c.tokens ? first + rows : c.tokens;
      if (first < last) attend(Head(c, unit / c.heads, unit % c.heads), first, last, w);
    }
  }
}

// LayerNorm without parameters, then x (1 + scale) + shift, quantized. x (batch, tokens, width); shift and scale: one
// row per sample, `stride` apart.
void tqdit_norm_quantize(const float* x, const float* shift, const float* scale, int64_t stride, float eps,
                         const Operand* target, int64_t batch, int64_t tokens, int64_t width, uint8_t* out,
                         int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < batch * tokens; ++row) {
    const int64_t b = row / tokens;
    const float* in = x + row * width;
    vfloat total{};
    for (int64_t j = 0; j < width; j += LANES) total += load(in + j, width - j);
    const float mean = sum(total) / width;
    vfloat squares{};
    for (int64_t j = 0; j < width; j += LANES) {
      vfloat d = load(in + j, width - j) - mean;
      for (int64_t i = width - j; i < LANES; ++i) d[i] = 0;
      squares += d * d;
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
    const Uniform grid(*target, b * target->stride);
    for (int64_t j = 0; j < width; j += LANES) {
      const int64_t n = width - j;
      const vfloat normal = (load(in + j, n) - mean) * inverse;
      const vfloat y = normal * (1.0f + load(scale + b * stride + j, n)) + load(shift + b * stride + j, n);
      store_bytes(out + row * width + j, grid.code(y), n);
    }
  }
}

// A linear layer on codes. Either `packed` (see tqdit_pack_weight) and the codes are given, and the sums are computed
// here; or the sums are, zero points taken out, from a product elsewhere. `second`: the other plane of two regions.
struct LinearCall {
  const uint8_t *first, *second;         // (batch, tokens, depth) codes
  const int8_t* packed;                  // null: use the sums
  const int32_t* column_sums;            // (columns) of the packed weight
  const float *first_sums, *second_sums;  // (batch, tokens, columns)
  const float *weight, *bias;            // (columns): weight scale, bias
  int64_t batch, tokens, depth, columns, threads;
  Operand source;
};

}  // extern "C"

namespace {

constexpr int64_t PANEL = 64;        // columns of a packed weight that lie together
constexpr int64_t TILE_ROWS = 6;     // 6 x 4 vectors of sums leave registers for one row and one column
constexpr int64_t TASK_ROWS = 256;   // of one task, about

int64_t panel_width(int64_t columns, int64_t begin) {
  const int64_t rest = round_up(columns - begin, LANES);
  return rest < PANEL ? rest : PANEL;
}

void dot_tile_rows(int64_t rows, const uint8_t* a, int64_t lda, const int8_t* panel, int64_t width, int64_t fours,
                   int32_t* c) {
  switch (rows) {
    case 6: dot_rows<6>(a, lda, panel, width, fours, c, PANEL); break;
    case 5: dot_rows<5>(a, lda, panel, width, fours, c, PANEL); break;
    case 4: dot_rows<4>(a, lda, panel, width, fours, c, PANEL); break;
    case 3: dot_rows<3>(a, lda, panel, width, fours, c, PANEL); break;
    case 2: dot_rows<2>(a, lda, panel, width, fours, c, PANEL); break;
    case 1: dot_rows<1>(a, lda, panel, width, fours, c, PANEL); break;
  }
}

// Rows of one tile: integer sums, zero point taken out, as floats; then what the operation does with them.
template <typename Finish>
void finish_tile(const LinearCall& c, int64_t row, int64_t rows, int64_t begin, int64_t width, const int32_t* first,
                 const int32_t* second, const Finish& finish) {
  alignas(64) float sums[2][PANEL];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t sample = (row + r) / c.tokens, i = sample * c.source.stride;
    const int32_t zero = c.source.grid == UNIFORM  ? c.source.zero[i] + 128
                         : c.source.grid == MERGED ? 1 << (c.source.bits - 1)
                                                   : 0;
    for (int64_t j = 0; j < width; j += LANES) {
      const vint centre = zero * load(c.column_sums + begin + j, c.columns - begin - j);
      store(sums[0] + j, to_float(load(first + r * PANEL + j) - centre));
      if (second) store(sums[1] + j, to_float(load(second + r * PANEL + j)));
    }
    const int64_t count = c.columns - begin < width ? c.columns - begin : width;
    finish(row + r, sample, begin, count, sums[0], second ? sums[1] : nullptr);
  }
}

template <typename Finish>
void run_task(const LinearCall& c, int64_t row, int64_t end, int64_t begin, const Finish& finish) {
  alignas(64) int32_t first[TILE_ROWS * PANEL], second[TILE_ROWS * PANEL];
  const int64_t width = panel_width(c.columns, begin), fours = c.depth / 4;
  const int8_t* panel = c.packed + begin * c.depth;
  for (; row < end; row += TILE_ROWS) {
    const int64_t rows = end - row < TILE_ROWS ? end - row : TILE_ROWS;
    dot_tile_rows(rows, c.first + row * c.depth, c.depth, panel, width, fours, first);
    if (c.second) dot_tile_rows(rows, c.second + row * c.depth, c.depth, panel, width, fours, second);
    finish_tile(c, row, rows, begin, width, first, c.second ? second : nullptr, finish);
  }
}

// Calls finish(row, sample, first column, columns, first sums, second sums) for every piece of the result.
template <typename Finish>
void linear(const LinearCall& c, const Finish& finish) {
  const int64_t rows = c.batch * c.tokens;
  if (!c.packed) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
      finish(row, row / c.tokens, 0, c.columns, c.first_sums + row * c.columns,
             c.second_sums ? c.second_sums + row * c.columns : nullptr);
    return;
  }
  const int64_t parts = (rows + TASK_ROWS / 2) / TASK_ROWS > 0 ? (rows + TASK_ROWS / 2) / TASK_ROWS : 1;
  const int64_t task = round_up((rows + parts - 1) / parts, TILE_ROWS);
#pragma omp parallel for num_threads(c.threads) schedule(dynamic) collapse(2)
  for (int64_t row = 0; row < rows; row += task)
    for (int64_t begin = 0; begin < c.columns; begin += PANEL)
      run_task(c, row, rows - row < task ? rows : row + task, begin, finish);
}

}  // namespace

extern "C" {

int64_t tqdit_has_vnni() {
#if defined(__AVX512VNNI__)
  return 1;
#else
  return 0;
#endif
}

// Weight codes (columns, depth), depth a multiple of 4 -> panels of 64 columns (the last one: a multiple of 16) in the
// layout of dot_tile, and the sums of each column. packed: (columns rounded up to 16) * depth bytes.
void tqdit_pack_weight(const int8_t* codes, int64_t columns, int64_t depth, int8_t* packed, int32_t* sums,
                       int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t begin = 0; begin < columns; begin += PANEL) {
    const int64_t width = panel_width(columns, begin);
    int8_t* panel = packed + begin * depth;
    for (int64_t j = 0; j < width; ++j) {
      const int8_t* from = codes + (begin + j) * depth;
      int32_t total = 0;
      for (int64_t k = 0; k < depth; k += 4) {
        int32_t four = 0;
        if (begin + j < columns) std::memcpy(&four, from + k, 4);
        std::memcpy(panel + (k / 4 * width + j) * 4, &four, 4);
      }
      if (begin + j >= columns) continue;
      for (int64_t k = 0; k < depth; ++k) total += from[k];
      sums[begin + j] = total;
    }
  }
}

// x W^T + bias -> codes of q, k and v, whose grids are per head. columns = 3 * heads * dim; out (batch, tokens, columns).
void tqdit_linear_heads(const LinearCall* call, const Operand* query, const Operand* key, const Operand* value,
                        int64_t heads, uint8_t* out) {
  const LinearCall& c = *call;
  const Operand* parts[3] = {query, key, value};
  const int64_t dim = c.columns / (3 * heads);
  const int64_t size = c.batch * c.columns;
  const Buffer<float> tables(3 * size);  // step, lowest and highest number of steps of every column
  const Buffer<int32_t> zeros(size);     // and its zero point
  float* const table = tables.data();
  for (int64_t at = 0; at < size; ++at) {
    const int64_t unit = at % c.columns / dim;
    const Operand& part = *parts[unit / heads];
    const int64_t i = at / c.columns * part.stride + unit % heads;
    table[at] = part.scale[i];
    table[size + at] = -(1 << (part.bits - 1)) - part.zero[i];
    table[2 * size + at] = (1 << (part.bits - 1)) - 1 - part.zero[i];
    zeros.data()[at] = part.zero[i] + 128;
  }
  linear(c, [&](int64_t row, int64_t sample, int64_t begin, int64_t count, const float* sums, const float*) {
    const float s = c.source.scale[sample * c.source.stride];
    for (int64_t j = 0; j < count; j += LANES) {
      const int64_t n = count - j, column = begin + j;
      const int64_t entry = sample * c.columns + column;
      const float* of_column = table + entry;
      const vfloat y = load(sums + j, n) * (s * load(c.weight + column, n)) + load(c.bias + column, n);
      const vfloat low = load(of_column + size, n), high = load(of_column + 2 * size, n);
      const vint code = nearest(clip(y / load_or_one(of_column, n), low, high)) + load(zeros.data() + entry, n);
      store_bytes(out + row * c.columns + column, code, n);
    }
  });
}

// GELU(x W^T + bias), quantized. Uniform: codes in `first`. Two regions: magnitudes of negative codes in `first`,
// positive codes in `second`. Merged: one grid of step s1 in `first`, lowest code at 0.
void tqdit_linear_gelu(const LinearCall* call, const Operand* target, uint8_t* first, uint8_t* second) {
  const LinearCall& c = *call;
  linear(c, [&](int64_t row, int64_t sample, int64_t begin, int64_t count, const float* sums, const float*) {
    const float s = c.source.scale[sample * c.source.stride];
    const int64_t i = sample * target->stride;
    const Uniform grid(*target, i);
    const vfloat per_s1 = splat(1.0f / target->scale[i]), per_s2 = splat(1.0f / target->coarse[i]);
    const int32_t shift = target->grid == MERGED ? target->shift[i] : 0, half = 1 << (target->bits - 1);
    for (int64_t j = 0; j < count; j += LANES) {
      const int64_t n = count - j, column = begin + j, at = row * c.columns + column;
      const vfloat y = gelu(load(sums + j, n) * (s * load(c.weight + column, n)) + load(c.bias + column, n));
      if (target->grid == UNIFORM) {
        store_bytes(first + at, grid.code_near(y), n);
        continue;
      }
      const vint code = nearest(clip(y * (y < 0.0f ? per_s1 : per_s2), splat(-half), splat(half - 1)));
      if (target->grid == MERGED) {
        store_bytes(first + at, (code < 0 ? code : code << shift) + half, n);
      } else {
        store_bytes(first + at, code < 0 ? -code : vint{}, n);
        store_bytes(second + at, code > 0 ? code : vint{}, n);
      }
    }
  });
}

// out = x + gate * (y W^T + bias) for the codes of y; of two regions (second * s2 - first * s1) * weight scale + bias.
// x, out (batch, tokens, columns); gate: one row per sample, `stride` apart.
void tqdit_linear_residual(const LinearCall* call, const float* gate, int64_t stride, const float* x, float* out) {
  const LinearCall& c = *call;
  linear(c, [&](int64_t row, int64_t sample, int64_t begin, int64_t count, const float* first, const float* second) {
    const float s1 = c.source.scale[sample * c.source.stride], s2 = c.source.coarse[sample * c.source.stride];
    for (int64_t j = 0; j < count; j += LANES) {
      const int64_t n = count - j, column = begin + j, at = row * c.columns + column;
      vfloat y = load(first + j, n), factor = load(c.weight + column, n);
      if (second)
        y = load(second + j, n) * s2 + y * -s1;
      else
        factor = s1 * factor;
      y = y * factor + load(c.bias + column, n);
      store(out + at, load(x + at, n) + load(gate + sample * stride + column, n) * y, n);
    }
  });
}

}  // extern "C"

namespace {

// One column of the weight times R rows of x.
template <int R>
void weight_only_column(const float* x, const int8_t* w, int64_t depth, float scale, float bias, float* out,
                        int64_t out_stride) {
  const int64_t whole = depth / LANES * LANES;
  vfloat sums[R] = {};
  for (int64_t k = 0; k < whole; k += LANES) {
    vchar bytes;
    std::memcpy(&bytes, w + k, sizeof bytes);
    const vfloat weight = to_float(widen(bytes));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] = multiply_add(load(x + r * depth + k), weight, sums[r]);
  }
  for (int r = 0; r < R; ++r) {
    float acc = sum(sums[r]);
    for (int64_t k = whole; k < depth; ++k) acc += x[r * depth + k] * w[k];
    out[r * out_stride] = acc * scale + bias;
  }
}

using WeightOnlyColumn = decltype(&weight_only_column<1>);
constexpr WeightOnlyColumn WEIGHT_ONLY[] = {
    weight_only_column<1>, weight_only_column<2>, weight_only_column<3>, weight_only_column<4>,
    weight_only_column<5>, weight_only_column<6>, weight_only_column<7>, weight_only_column<8>};

}  // namespace

extern "C" {

// out = (x codes^T) * scale + bias for float x. x (rows, depth), codes (columns, depth), scale and bias (columns), out
// (rows, columns). Up to 8 rows read the int8 weight once.
void tqdit_weight_only(const float* x, const int8_t* codes, const float* scale, const float* bias, int64_t rows,
                       int64_t columns, int64_t depth, float* out, int64_t threads) {
  constexpr int64_t ROWS = 8, COLUMNS = 32;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t first = 0; first < rows; first += ROWS)
    for (int64_t part = 0; part < columns; part += COLUMNS) {
      const int64_t count = rows - first < ROWS ? rows - first : ROWS;
      const int64_t end = columns - part < COLUMNS ? columns : part + COLUMNS;
      for (int64_t column = part; column < end; ++column)
        WEIGHT_ONLY[count - 1](x + first * depth, codes + column * depth, depth, scale[column], bias[column],
                               out + first * columns + column, columns);
    }
}

}  // extern "C"
