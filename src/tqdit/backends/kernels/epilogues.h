// The epilogues of a linear layer's product: none, a residual, codes of heads, or codes of an activation function.
#pragma once
#include "elementwise.h"
#include "linear.h"

namespace tqdit {

// Turns the sums of a product into values: y = sums * (s * weight scale) + bias; with two regions
// (second * s2 - first * s1) * weight scale + bias; of rows (sums * step of the row) * weight scale + bias.
struct Dequantizer {
  const float *weight, *bias, *steps;
  float s1, s2;
  Dequantizer(const LinearCall& c, int64_t sample)
      : weight(c.weight), bias(c.bias), steps(c.steps), s1(c.source.entry(sample)[SCALE]),
        s2(c.source.entry(sample)[COARSE]) {}

  // Returns the dequantizer of one row of the result; s1 is the step of that row.
  template <int SOURCE>
  Dequantizer of(int64_t index) const {
    Dequantizer row = *this;
    if (SOURCE == ROW) row.s1 = steps[index];
    return row;
  }

  // `first`, `second`: the sums from column `begin` on.
  template <int SOURCE, typename Count>
  vfloat value(int64_t begin, const float* first, const float* second, int64_t j, Count n) const {
    const vfloat scale = load(weight + begin + j, n), offset = load(bias + begin + j, n);
    if (SOURCE == TWO_REGION) return (load(second + j, n) * s2 + load(first + j, n) * -s1) * scale + offset;
    if (SOURCE == ROW) return load(first + j, n) * s1 * scale + offset;
    return load(first + j, n) * (s1 * scale) + offset;
  }
};

// Writes codes of heads in 1, 2 or 3 parts, such as key and value, whose grids are per head. Every column has a step, a
// lowest and highest number of steps, and a zero point of its own.
struct HeadsFinish {
  const LinearCall& c;
  uint8_t* out;
  int64_t samples, size;  // of the tables: one sample where all have the same grids
  Buffer<float> tables;
  Buffer<int32_t> zeros;
  float sure = SURE;

  HeadsFinish(const LinearCall& call, const Operand* targets, int64_t parts, int64_t heads, uint8_t* codes)
      : c(call), out(codes), samples(one_for_all(targets, parts) ? 1 : c.batch), size(samples * c.columns),
        tables(4 * size), zeros(size) {
    const int64_t dim = c.columns / (parts * heads);
    for (int64_t at = 0; at < size; ++at) {
      const int64_t unit = at % c.columns / dim;
      const Operand& target = targets[unit / heads];
      const float* entry = target.entry(at / c.columns, unit % heads);
      const int32_t zero = zero_point(entry);
      tables.data()[at] = entry[SCALE];
      tables.data()[size + at] = -(1 << (target.bits - 1)) - zero;
      tables.data()[2 * size + at] = (1 << (target.bits - 1)) - 1 - zero;
      tables.data()[3 * size + at] = entry[INVERSE];
      if (sure_with(entry[INVERSE]) < 0) sure = -1;
      zeros.data()[at] = zero + 128;
    }
  }

  struct Rows {
    const HeadsFinish& f;
    int64_t entry;  // the entry of the sample's first column
    Dequantizer values;
    template <int SOURCE>
    void row(int64_t index, int64_t begin, int64_t count, const float* first, const float* second) const {
      const float *table = f.tables.data() + entry + begin, *lows = table + f.size, *highs = lows + f.size,
                  *inverses = highs + f.size;
      const int32_t* zeros = f.zeros.data() + entry + begin;
      uint8_t* out = f.out + index * f.c.columns + begin;
      each_vector(count, [=, values = values.of<SOURCE>(index), sure = f.sure](int64_t j, auto n) {
        const vfloat y = values.template value<SOURCE>(begin, first, second, j, n);
        const vint steps = nearest_quotient(y, load_or_one(table + j, n), load(inverses + j, n), load(lows + j, n),
                                            load(highs + j, n), sure);
        store_bytes(out + j, steps + load(zeros + j, n), n);
      });
    }
  };
  Rows at(int64_t sample) const { return {*this, samples > 1 ? sample * c.columns : 0, Dequantizer(c, sample)}; }

  static bool one_for_all(const Operand* targets, int64_t parts) {
    for (int64_t part = 0; part < parts; ++part)
      if (targets[part].sample_stride) return false;
    return true;
  }
};

// Writes the codes of GELU in the planes of an `Encoder`. FACTORED: GELU times the channel factors of the target.
template <int GRID, bool FACTORED>
struct GeluFinish {
  const LinearCall& c;
  const Operand& target;
  uint8_t *first, *second;

  struct Rows {
    const GeluFinish& f;
    Dequantizer values;
    Encoder<GRID> encoder;
    template <int SOURCE>
    void row(int64_t index, int64_t begin, int64_t count, const float* first, const float* second) const {
      uint8_t* to_first = f.first + index * f.c.columns + begin;
      uint8_t* to_second = GRID == TWO_REGION ? f.second + index * f.c.columns + begin : nullptr;
      const float* factors = FACTORED ? f.target.channels + begin : nullptr;
      // Copies in registers: the compiler must assume that bytes written below change *this.
      each_vector(count, [=, values = values.of<SOURCE>(index), encoder = encoder](int64_t j, auto n) {
        vfloat x = gelu(values.template value<SOURCE>(begin, first, second, j, n));
        if (FACTORED) x *= load(factors + j, n);
        encoder.encode_near(x, to_first + j, to_second + j, n);
      });
    }
  };
  Rows at(int64_t sample) const {
    return {*this, Dequantizer(c, sample), Encoder<GRID>(target.entry(sample), target.bits)};
  }
};

enum Update { PLAIN, ADDED, GATED };

// Writes y, x + y or x + gate * y, rounded to the type of the items.
template <int UPDATE, typename Item>
struct FloatFinish {
  const LinearCall& c;
  const float* gate;
  int64_t stride;
  const float* x;
  Item* out;

  struct Rows {
    const FloatFinish& f;
    const float* gate;
    Dequantizer values;
    template <int SOURCE>
    void row(int64_t index, int64_t begin, int64_t count, const float* first, const float* second) const {
      const float* gates = UPDATE == GATED ? gate + begin : nullptr;
      const float* x = UPDATE == PLAIN ? nullptr : f.x + index * f.c.columns + begin;
      Item* out = f.out + index * f.c.columns + begin;
      each_vector(count, [=, values = values.of<SOURCE>(index)](int64_t j, auto n) {
        const vfloat y = values.template value<SOURCE>(begin, first, second, j, n);
        if (UPDATE == PLAIN) store(out + j, y, n);
        if (UPDATE == ADDED) store(out + j, load(x + j, n) + y, n);
        if (UPDATE == GATED) store(out + j, load(x + j, n) + load(gates + j, n) * y, n);
      });
    }
  };
  Rows at(int64_t sample) const {
    return {*this, UPDATE == GATED ? gate + sample * stride : nullptr, Dequantizer(c, sample)};
  }
};

// Writes the codes of heads of x W^T + bias. `targets`: of the 1 to 3 parts of the columns; out (batch, tokens,
// columns).
extern "C" void tqdit_project(const LinearCall* call, const Operand* targets, int64_t parts, int64_t heads,
                              uint8_t* out) {
  linear(*call, HeadsFinish(*call, targets, parts, heads, out));
}

// Returns the call of `count` samples from `sample` on.
LinearCall samples_of(LinearCall c, int64_t sample, int64_t count) {
  const int64_t row = sample * c.tokens;
  if (c.first) c.first += row * c.depth;
  if (c.second) c.second += row * c.depth;
  if (c.first_sums) c.first_sums += row * c.columns;
  if (c.second_sums) c.second_sums += row * c.columns;
  if (c.steps) c.steps += row;
  c.source.table += sample * c.source.sample_stride;
  c.batch = count;
  return c;
}

// Writes the codes of GELU(x W^T + bias) on the grid of rows, and their steps. A row is coded when all of its columns
// are there; a few samples at a time, so that their values are still in the cache.
void linear_gelu_rows(const LinearCall& c, const Operand& target, uint8_t* codes, float* steps) {
  const int64_t items = c.tokens * c.columns, together = samples_in_cache(items, c.batch);
  const Buffer<float> values(together * items);
  for (int64_t sample = 0; sample < c.batch; sample += together) {
    const int64_t count = sample + together < c.batch ? together : c.batch - sample;
    const LinearCall part = samples_of(c, sample, count);
    linear(part, FloatFinish<PLAIN, float>{part, nullptr, 0, nullptr, values.data()});
    QuantizeCall rows{};
    rows.x = values.data();
    rows.first = codes + sample * items;
    rows.steps = steps + sample * c.tokens;
    rows.batch = count, rows.tokens = c.tokens, rows.width = c.columns, rows.sample_stride = items;
    rows.token_stride = c.columns, rows.type = FLOAT32, rows.gelu = 1, rows.threads = c.threads;
    rows.target = target;
    rows.target.table += sample * target.sample_stride;
    tqdit_quantize(&rows);
  }
}

// Writes the codes of GELU(x W^T + bias); first, second (batch, tokens, columns). `steps`: (batch, tokens) of a target on
// the grid of rows, or null.
extern "C" void tqdit_linear_gelu(const LinearCall* call, const Operand* target, uint8_t* first, uint8_t* second,
                                  float* steps) {
  for_grid(target->grid, [=](auto grid) {
    if constexpr (grid == ROW) {
      linear_gelu_rows(*call, *target, first, steps);
    } else {
      if (target->channels)
        linear(*call, GeluFinish<grid, true>{*call, *target, first, second});
      else
        linear(*call, GeluFinish<grid, false>{*call, *target, first, second});
    }
  });
}

// Computes out = x W^T + bias. out (batch, tokens, columns) of a `FloatType`.
extern "C" void tqdit_linear(const LinearCall* call, int64_t type, void* out) {
  for_float_type(type, out, [=](auto* items) {
    in_large_pages(items, call->batch * call->tokens * call->columns * static_cast<int64_t>(sizeof *items));
    linear(*call, FloatFinish<PLAIN, std::remove_pointer_t<decltype(items)>>{*call, nullptr, 0, nullptr, items});
  });
}

// Computes out = residual + x W^T + bias. residual, out (batch, tokens, columns); gate: null, or one row per sample, by
// which the update is multiplied, `stride` apart.
extern "C" void tqdit_linear_added(const LinearCall* call, const float* gate, int64_t stride, const float* residual,
                                   float* out) {
  if (!gate)
    linear(*call, FloatFinish<ADDED, float>{*call, gate, stride, residual, out});
  else
    linear(*call, FloatFinish<GATED, float>{*call, gate, stride, residual, out});
}

}  // namespace tqdit
