// Fused attention: exact Q K^T, fp32 softmax, exact P V, a few query rows of one head at a time.
#pragma once
#include "elementwise.h"
#include "operands.h"
#include "packing.h"
#include "products.h"
#include "tiles.h"

namespace tqdit {

// `tokens` queries attend to `context` keys and values. Strides count bytes from one token to the next, so that all
// three may lie in one buffer.
struct AttentionCall {
  const uint8_t *query, *key, *value;  // (batch, tokens or context, heads, dim)
  uint8_t* out;                        // (batch, tokens, heads, dim) codes for the target, or null
  float* attended;                     // null, or the same as values: then there are no codes
  float* steps;                        // (batch, tokens) of a target on the grid of rows, or null
  int8_t* trace;                       // null, or (batch, heads, tokens, context) codes of probabilities, for tests
  const float* bias;                   // null, or (context) per sample: added to the scaled scores
  int64_t query_stride, context_stride, bias_stride;
  int64_t batch, tokens, context, heads, dim, threads;
  Operand queries, keys, values, probability, target;
  float factor;
};

constexpr int64_t QUERY_ROWS = 16;  // rows of a pass: scores and codes of 1024 keys stay in the second-level cache

// Buffers of one thread, for one (sample, head) at a time.
struct Workspace {
  int64_t keys, depth, key_fours, value_fours;
  Buffer<int8_t> key, value;
  Buffer<int32_t> key_sums, value_sums, scores, first_sums, second_sums;
  Buffer<uint8_t> first, second, ones, query;
  TileRegisters registers;
  TileProduct query_key, probability_value;
  vint inside;  // which lanes of the last vector of keys are keys
  explicit Workspace(const AttentionCall& c)
      : keys(round_up(c.context, LANES)), depth(round_up(c.dim, LANES)), key_fours(round_up(c.dim, 4) / 4),
        value_fours(keys / 4), key(keys * key_fours * 4), value(depth * keys), key_sums(keys), value_sums(depth),
        scores(QUERY_ROWS * keys), first_sums(QUERY_ROWS * depth), second_sums(QUERY_ROWS * depth),
        first(QUERY_ROWS * keys), second(QUERY_ROWS * keys), ones(keys + round_up(c.dim, 4)),
        query(QUERY_ROWS * key_fours * 4) {
    std::memset(ones.data(), 1, keys + round_up(c.dim, 4));
    std::memset(query.data(), 0, QUERY_ROWS * key_fours * 4);
    for (int i = 0; i < LANES; ++i) inside[i] = keys - LANES + i < c.context ? -1 : 0;
  }
};

// One (sample, head) of a call, with its scales looked up.
struct Head {
  const AttentionCall& c;
  int64_t sample, head;
  int32_t query_zero, key_zero, value_zero, probability_zero, shift;  // query, uniform probability: unsigned
  float score_scale, value_scale, s1, s2, per_s1, per_s2;
  Uniform probability;
  Head(const AttentionCall& call, int64_t b, int64_t h)
      : c(call), sample(b), head(h), query_zero(zero_point(c.queries.entry(b, h)) + 128),
        key_zero(zero_point(c.keys.entry(b, h))), value_zero(zero_point(c.values.entry(b, h))),
        probability_zero(zero_point(c.probability.entry(b, h)) + 128),
        shift(c.probability.grid == MERGED ? merging_shift(c.probability.entry(b, h)) : 0),
        score_scale(c.queries.entry(b, h)[SCALE] * c.keys.entry(b, h)[SCALE] * c.factor),
        value_scale(c.values.entry(b, h)[SCALE]), s1(c.probability.entry(b, h)[SCALE]),
        s2(c.probability.entry(b, h)[COARSE]), per_s1(c.probability.entry(b, h)[INVERSE]),
        per_s2(c.probability.entry(b, h)[COARSE_INVERSE]), probability(c.probability.entry(b, h), c.probability.bits) {}
};

struct RowSums { int32_t first, second; };  // sums of the codes of one row of probabilities

// Replaces the scores of one row by exp(score - top) and returns their sum. Padding becomes 0.
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

// Computes the softmax of one row of scores and its codes. `first` gets uniform, merged or fine codes, `second` coarse
// ones.
RowSums softmax_codes(const Head& h, float* scores, float top, const Workspace& w, uint8_t* first, uint8_t* second) {
  const int64_t keys = w.keys;
  const vint everywhere = vint{} == 0, inside = w.inside;
  const vfloat share = splat(1.0f / exponentials(scores, top, keys, inside));
  const vfloat limit = splat((1 << (h.c.probability.bits - 1)) - 1), border = limit * h.s1;
  const vfloat per_s1 = splat(h.per_s1), per_s2 = splat(h.per_s2);
  vint first_total{}, second_total{};
  for (int64_t j = 0; j < keys; j += LANES) {
    const vfloat p = load(scores + j) * share;
    const vint valid = j + LANES >= keys ? inside : everywhere;
    if (h.c.probability.grid == UNIFORM) {
      const vint code = h.probability.code_near(p) & (valid & 255);
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

// Codes exp(score - top) of one row as unsigned steps of 1 / (2^bits - 1); the other factor of the softmax is left to the
// sum of the codes.
RowSums softmax_row_codes(const Head& h, const float* scores, float top, const Workspace& w, uint8_t* codes) {
  const vfloat levels = splat((1 << h.c.probability.bits) - 1);
  const vint everywhere = vint{} == 0, inside = w.inside;
  vint total{};
  for (int64_t j = 0; j < w.keys; j += LANES) {
    const vint code = nearest(exponential(load(scores + j) - top) * levels) & (j + LANES >= w.keys ? inside : everywhere);
    total += code;
    store_bytes(codes + j, code, LANES);
  }
  return {sum(total), 0};
}

// The result of attention as codes for the output projection, or as values. write(at, x, n): n of its items from `at` on.
struct AttendedCodes {
  Uniform target;
  uint8_t* out;
  void write(int64_t at, vfloat x, int64_t n) const { store_bytes(out + at, target.code(x), n); }
};
struct AttendedValues {
  float* out;
  void write(int64_t at, vfloat x, int64_t n) const { store(out + at, x, n); }
};

// Writes one row of P V from its exact sums; its first item is the item `at` of the result.
template <typename Result>
void write_attended(const Head& h, const Result result, RowSums rows, const Workspace& w, int64_t row, int64_t at) {
  const int32_t *firsts = w.first_sums.data() + row * w.depth, *seconds = w.second_sums.data() + row * w.depth;
  const float scale = h.c.probability.grid == SOFTMAX_ROW ? h.value_scale / static_cast<float>(rows.first)
                                                          : h.s1 * h.value_scale;
  for (int64_t j = 0; j < h.c.dim; j += LANES) {
    vint acc = load(firsts + j) - h.value_zero * rows.first;
    vfloat x;
    if (h.c.probability.grid == TWO_REGION) {
      const vint second = load(seconds + j) - h.value_zero * rows.second;
      x = (to_float(second) * h.s2 + to_float(acc) * h.s1) * h.value_scale;
    } else {
      if (h.c.probability.grid == UNIFORM) {
        const vint centred = load(w.value_sums.data() + j) - static_cast<int32_t>(h.c.context) * h.value_zero;
        acc -= h.probability_zero * centred;
      }
      x = to_float(acc) * scale;
    }
    result.write(at + j, x, h.c.dim - j);
  }
}

// Writes codes in the form of ops/reference.py: signed, a fine code negative.
void write_trace(const Head& h, const uint8_t* first, const uint8_t* second, int8_t* trace) {
  const bool two = h.c.probability.grid == TWO_REGION;
  const int half = h.c.probability.grid == SOFTMAX_ROW ? 1 << (h.c.probability.bits - 1) : 128;
  for (int64_t j = 0; j < h.c.context; ++j) trace[j] = two ? second[j] - first[j] : first[j] - half;
}

// Turns integer scores of one row into scores: zero points corrected, scaled, the bias added. Returns the largest one.
template <bool BIASED>
float scale_scores(const Head& h, const uint8_t* query, const Workspace& w, int32_t* scores) {
  int32_t query_sum = 0;
  for (int64_t k = 0; k < h.c.dim; ++k) query_sum += query[k];
  const int32_t constant = h.key_zero * (static_cast<int32_t>(h.c.dim) * h.query_zero - query_sum);
  const float* bias = BIASED ? h.c.bias + h.sample * h.c.bias_stride : nullptr;
  const vfloat lowest = splat(-3.0e38f);
  vfloat top = lowest;
  for (int64_t j = 0; j < w.keys; j += LANES) {
    const vint acc = load(scores + j) + constant - load(w.key_sums.data() + j);
    vfloat x = to_float(acc) * h.score_scale;
    if (BIASED) x += load(bias + j, h.c.context - j);
    top = at_least(top, j + LANES >= w.keys ? (w.inside ? x : lowest) : x);
    std::memcpy(scores + j, &x, sizeof x);
  }
  return largest(top);
}

// Multiplies the coarse codes, of which many rows have none.
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

// Returns rows of queries in the form that `dot` reads, in whole fours; `stride` becomes the stride of the result.
const uint8_t* padded_rows(const uint8_t* query, int64_t rows, int64_t dim, Workspace& w, int64_t& stride) {
  if (dim % 4 == 0) return query;
  const int64_t padded = w.key_fours * 4;
  for (int64_t r = 0; r < rows; ++r) std::memcpy(w.query.data() + r * padded, query + r * stride, dim);
  stride = padded;
  return w.query.data();
}

// Computes the query rows [begin, end) of one head.
template <typename Result>
void attend(const Head& h, const Result& result, int64_t begin, int64_t end, Workspace& w) {
  const AttentionCall& c = h.c;
  const int64_t width = c.heads * c.dim, context = h.sample * c.context * c.context_stride + h.head * c.dim;
  const uint8_t* queries = c.query + h.sample * c.tokens * c.query_stride + h.head * c.dim;
  pack_keys(c.key + context, c.context_stride, c.context, c.dim, w.key.data(), w.keys);
  column_sums(w.ones.data(), w.key.data(), w.keys, w.key_fours, w.key_sums.data());
  for (int64_t j = 0; j < w.keys; ++j) w.key_sums.data()[j] *= h.query_zero;
  pack_values(c.value + context, c.context_stride, c.context, c.dim, w.value.data(), w.depth, w.value_fours);
  column_sums(w.ones.data(), w.value.data(), w.depth, w.value_fours, w.value_sums.data());
  for (int64_t i = begin; i < end; i += QUERY_ROWS) {
    const int64_t rows = end - i < QUERY_ROWS ? end - i : QUERY_ROWS;
    int64_t stride = c.query_stride;
    const uint8_t* query = padded_rows(queries + i * stride, rows, c.dim, w, stride);
    w.query_key(query, stride, rows, w.key.data(), w.keys, w.key_fours, w.scores.data(), w.keys);
    RowSums sums[QUERY_ROWS];
    for (int64_t r = 0; r < rows; ++r) {
      int32_t* scores = w.scores.data() + r * w.keys;
      uint8_t *first = w.first.data() + r * w.keys, *second = w.second.data() + r * w.keys;
      const uint8_t* codes = query + r * stride;
      const float top = c.bias ? scale_scores<true>(h, codes, w, scores) : scale_scores<false>(h, codes, w, scores);
      float* const scaled = reinterpret_cast<float*>(scores);
      sums[r] = c.probability.grid == SOFTMAX_ROW ? softmax_row_codes(h, scaled, top, w, first)
                                                  : softmax_codes(h, scaled, top, w, first, second);
      if (c.trace)
        write_trace(h, first, second, c.trace + ((h.sample * c.heads + h.head) * c.tokens + i + r) * c.context);
    }
    w.probability_value(w.first.data(), w.keys, rows, w.value.data(), w.depth, w.value_fours, w.first_sums.data(), w.depth);
    if (c.probability.grid == TWO_REGION) second_product(sums, rows, w);
    for (int64_t r = 0; r < rows; ++r)
      write_attended(h, result, sums[r], w, r, (h.sample * c.tokens + i + r) * width + h.head * c.dim);
  }
}

// Computes one part of the query rows of one head. `values`: where float results go, or null for codes.
void attend_part(const AttentionCall& c, int64_t unit, int64_t first, int64_t rows, float* values, Workspace& w) {
  const int64_t last = first + rows < c.tokens ? first + rows : c.tokens;
  if (first >= last) return;
  const Head head(c, unit / c.heads, unit % c.heads);
  if (values)
    attend(head, AttendedValues{values}, first, last, w);
  else
    attend(head, AttendedCodes{Uniform(c.target.entry(head.sample), c.target.bits), c.out}, first, last, w);
}

// Writes the codes of the values of some samples on the grid of rows, and their steps.
void code_attended(const AttentionCall& c, const float* values, int64_t sample, int64_t end) {
  const int64_t width = c.heads * c.dim, begin = sample * c.tokens;
  deal(c.threads, (end * c.tokens - begin + CODED_ROWS - 1) / CODED_ROWS, [&](const auto& next) {
    const Buffer<float> scratch(round_up(width, LANES));
    for (int64_t i; next(i);)
      for (int64_t row = begin + i * CODED_ROWS; row < begin + (i + 1) * CODED_ROWS && row < end * c.tokens; ++row) {
        const RowGrid grid(c.target.entry(row / c.tokens), c.target.bits);
        const float* in = values + row * width;
        uint8_t* const out = c.out + row * width;
        c.steps[row] = c.target.channels
            ? code_row_by_magnitude(grid, Factored<Plain<float>>{{in}, c.target.channels}, width, out, scratch.data())
            : code_row_by_magnitude(grid, Plain<float>{in}, width, out, scratch.data());
      }
  });
}

// Computes the attention of all heads: exact Q K^T, fp32 softmax, exact P V, codes for the output projection or values.
// On the grid of rows a few samples are finished at a time, so that their values are still in the cache when all heads
// of a row are there and it can be coded.
extern "C" void tqdit_attention(const AttentionCall* call) {
  const AttentionCall& c = *call;
  const bool by_row = c.steps;
  const int64_t width = c.heads * c.dim, items = c.tokens * width;
  const int64_t together = by_row ? samples_in_cache(items, c.batch) : c.batch, heads = together * c.heads;
  const int64_t most = (c.tokens + QUERY_ROWS - 1) / QUERY_ROWS;
  int64_t parts = heads >= c.threads ? 1 : (c.threads + heads - 1) / heads;
  if (parts > most) parts = most;
  const int64_t rows = round_up((c.tokens + parts - 1) / parts, QUERY_ROWS);
  const Buffer<float> kept(by_row ? together * items : LANES);
  for (int64_t sample = 0; sample < c.batch; sample += together) {
    const int64_t end = sample + together < c.batch ? sample + together : c.batch, first = sample * c.heads * parts;
    float* const values = by_row ? kept.data() - sample * items : c.attended;
    deal(c.threads, (end - sample) * c.heads * parts, [&](const auto& next) {
      Workspace w(c);
      for (int64_t i; next(i);) attend_part(c, (first + i) / parts, (first + i) % parts * rows, rows, values, w);
    });
    if (by_row) code_attended(c, values, sample, end);
  }
}

}  // namespace tqdit
