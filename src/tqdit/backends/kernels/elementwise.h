// Quantization of float rows, with LayerNorm or without, and linear layers on float inputs.
#pragma once
#include "floats.h"
#include "operands.h"
#include "transposed.h"

namespace tqdit {

// Quantization of float rows: of x, of x (1 + scale) + shift after LayerNorm, or of GELU(x), the last two of fp32; times
// the target's channel factors, if it has some.
struct QuantizeCall {
  const void* x;               // (batch, tokens, width) of a `FloatType`, the items of a row adjacent
  const float *shift, *scale;  // null: no norm; else one row per sample, `stride` apart
  uint8_t *first, *second;     // (batch, tokens, width); the second plane of two regions, or null
  float* steps;                // (batch, tokens) on the grid of rows, or null
  int64_t sample_stride, token_stride;  // of x, in items
  int64_t stride, batch, tokens, width, type, gelu, threads;
  Operand target;
  float eps;

  // Returns the first item of a row of x.
  template <typename Item>
  const Item* row(int64_t index) const {
    return static_cast<const Item*>(x) + index / tokens * sample_stride + index % tokens * token_stride;
  }
};

// The values of one row that are coded, a vector at a time: values(j, n) are the n from column j on.
template <typename Item>
struct Plain {
  const Item* x;
  template <typename Count>
  vfloat operator()(int64_t j, Count n) const { return load(x + j, n); }
};

struct Gelu {
  const float* x;
  template <typename Count>
  vfloat operator()(int64_t j, Count n) const { return gelu(load(x + j, n)); }
};

// LayerNorm without parameters and its modulation.
template <typename Item>
struct Normal {
  const Item* x;
  const float *shift, *scale;
  float mean, inverse;
  Normal(const Item* in, const float* shift, const float* scale, float eps, int64_t width)
      : x(in), shift(shift), scale(scale) {
    vfloat total{}, squares{};
    along(width, [&](int64_t j, auto n) { total += load(in + j, n); });
    const float centre = sum(total) / width;
    along(width, [&](int64_t j, auto n) {
      const vfloat d = first_lanes(load(in + j, n) - centre, n);
      squares += d * d;
    });
    mean = centre;
    inverse = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
  }
  template <typename Count>
  vfloat operator()(int64_t j, Count n) const {
    return (load(x + j, n) - mean) * inverse * (1.0f + load(scale + j, n)) + load(shift + j, n);
  }
};

// Values times the factors of their channels.
template <typename Values>
struct Factored {
  Values values;
  const float* factors;
  template <typename Count>
  vfloat operator()(int64_t j, Count n) const { return values(j, n) * load(factors + j, n); }
};

// Writes the codes of one row. The encoder is passed by value: the compiler would have to assume that bytes written
// here change an encoder behind a reference.
template <int GRID, typename Values>
void code_row(const Encoder<GRID> encoder, const Values values, int64_t width, uint8_t* first, uint8_t* second) {
  along(width, [=](int64_t j, auto n) { encoder.encode(values(j, n), first + j, second + j, n); });
}

// Writes the codes of one row on the grid of rows, and returns their step. `row`: memory for the row in whole vectors.
template <typename Values>
float code_row_by_magnitude(const RowGrid grid, const Values values, int64_t width, uint8_t* out, float* row) {
  vint largest_bits{};
  along(width, [&](int64_t j, auto n) {
    const vfloat x = first_lanes(values(j, n), n);
    largest_bits = at_least(largest_bits, magnitude(x));
    store(row + j, x);
  });
  const float step = grid.step(largest(largest_bits)), inverse = 1.0f / step, sure = sure_with(inverse);
  const vfloat low = splat(-(1 << (grid.bits - 1))), high = splat((1 << (grid.bits - 1)) - 1);
  along(width, [=, steps = splat(step), inverses = splat(inverse)](int64_t j, auto n) {
    store_bytes(out + j, nearest_quotient(load(row + j), steps, inverses, low, high, sure) + 128, n);
  });
  return step;
}

constexpr int64_t CODED_ROWS = 8;  // of one task

// Writes the codes of all rows. values_of(row) are the values of one.
template <int GRID, typename ValuesOf>
void code_rows(const QuantizeCall& c, const ValuesOf& values_of) {
  const int64_t rows = c.batch * c.tokens, step = CODED_ROWS;
  deal(c.threads, (rows + step - 1) / step, [&](const auto& next) {
    const Buffer<float> scratch(GRID == ROW ? round_up(c.width, LANES) : LANES);
    for (int64_t i; next(i);)
      for (int64_t row = i * step; row < (i + 1) * step && row < rows; ++row) {
        const int64_t at = row * c.width;
        const float* entry = c.target.entry(row / c.tokens);
        if constexpr (GRID == ROW)
          c.steps[row] = code_row_by_magnitude(RowGrid(entry, c.target.bits), values_of(row), c.width, c.first + at,
                                               scratch.data());
        else
          code_row(Encoder<GRID>(entry, c.target.bits), values_of(row), c.width, c.first + at,
                   c.second ? c.second + at : nullptr);
      }
  });
}

// Calls run(values_of) with what the values of a call are.
template <typename Run>
void for_values(const QuantizeCall& c, const Run& run) {
  const auto factored = [&](auto values_of) {
    if (const float* factors = c.target.channels)
      run([=](int64_t row) { return Factored<decltype(values_of(row))>{values_of(row), factors}; });
    else
      run(values_of);
  };
  if (c.gelu)
    factored([&c](int64_t row) { return Gelu{c.row<float>(row)}; });
  else if (c.shift)
    factored([&c](int64_t row) {
      const int64_t modulation = row / c.tokens * c.stride;
      return Normal<float>(c.row<float>(row), c.shift + modulation, c.scale + modulation, c.eps, c.width);
    });
  else
    for_float_type(c.type, nullptr, [&](auto* item) {
      typedef std::remove_pointer_t<decltype(item)> Item;
      factored([&c](int64_t row) { return Plain<Item>{c.row<Item>(row)}; });
    });
}

extern "C" void tqdit_quantize(const QuantizeCall* call) {
  for_grid(call->target.grid, [=](auto grid) {
    for_values(*call, [=](const auto& values_of) { code_rows<decltype(grid)::value>(*call, values_of); });
  });
}

// A piece of a product of float x with int8 weights: vectors of sums of `depth` items, in whole vectors.
struct WeightOnlyPiece {
  const float* x;     // rows `x_stride` apart
  const int8_t* w;    // columns `w_stride` apart
  float* sums;        // of column c and row r at (c * WEIGHT_ONLY_ROWS + r) * LANES
  int64_t x_stride, w_stride, depth;
};

constexpr int64_t WEIGHT_ONLY_ROWS = 8, WEIGHT_ONLY_COLUMNS = 32, WEIGHT_ONLY_DEPTH = 512;

// Adds the products of R rows with C columns to their sums. Each has one chain of sums, in the order of the depth, so
// that a result does not depend on R and C; several chains at a time hide their latency.
template <int R, int C>
inline void weight_only_tile(const WeightOnlyPiece& p) {
  vfloat sums[C][R];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[c][r] = load(p.sums + (c * WEIGHT_ONLY_ROWS + r) * LANES);
  for (int64_t k = 0; k < p.depth; k += LANES)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const vfloat weight = floats_of(p.w + c * p.w_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[c][r] = multiply_add(load(p.x + r * p.x_stride + k), weight, sums[c][r]);
    }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(p.sums + (c * WEIGHT_ONLY_ROWS + r) * LANES, sums[c][r]);
}

// Adds the products of R rows with `columns` columns, C at a time.
template <int R, int C>
void weight_only_rows(WeightOnlyPiece p, int64_t columns) {
  for (; columns > 0; columns -= C) {
    if (columns >= C)
      weight_only_tile<R, C>(p);
    else
      for (int64_t c = 0; c < columns; ++c)
        weight_only_tile<R, 1>({p.x, p.w + c * p.w_stride, p.sums + c * WEIGHT_ONLY_ROWS * LANES, p.x_stride, p.w_stride, p.depth});
    p.w += C * p.w_stride;
    p.sums += C * WEIGHT_ONLY_ROWS * LANES;
  }
}

inline void weight_only_piece(WeightOnlyPiece p, int64_t rows, int64_t columns) {
  for (; rows > 0; rows -= 4) {
    switch (rows < 4 ? rows : 4) {
      case 4: weight_only_rows<4, 2>(p, columns); break;
      case 3: weight_only_rows<3, 2>(p, columns); break;
      case 2: weight_only_rows<2, 4>(p, columns); break;
      case 1: weight_only_rows<1, 8>(p, columns); break;
    }
    p.x += 4 * p.x_stride;
    p.sums += 4 * LANES;
  }
}

constexpr int64_t NARROW = 64;

// Multiplies a narrow x, such as the pixels of a patch.
inline void weight_only_narrow(const float* x, const int8_t* codes, const float* scale, const float* bias, int64_t rows,
                               int64_t columns, int64_t depth, float* out, int64_t threads) {
  const Transposed weight(codes, columns, depth, threads);
  deal_rows(threads, rows, CODED_ROWS, [&](int64_t first, int64_t end) {
    weight.multiply(x + first * depth, depth, end - first, [&](int64_t row, int64_t j, vfloat sums) {
      const int64_t n = columns - j;
      store(out + (first + row) * columns + j, sums * load(scale + j, n) + load(bias + j, n), n);
    });
  });
}

// Computes out = (x codes^T) * scale + bias for float x. x (rows, depth), codes (columns, depth), scale and bias
// (columns), out (rows, columns). Up to 8 rows read the int8 weight once.
extern "C" void tqdit_weight_only(const float* x, const int8_t* codes, const float* scale, const float* bias, int64_t rows,
                       int64_t columns, int64_t depth, float* out, int64_t threads) {
  if (depth <= NARROW) return weight_only_narrow(x, codes, scale, bias, rows, columns, depth, out, threads);
  constexpr int64_t ROWS = WEIGHT_ONLY_ROWS, COLUMNS = WEIGHT_ONLY_COLUMNS;
  const int64_t whole = depth / LANES * LANES;
  const int64_t piece = rows <= 2 ? whole : WEIGHT_ONLY_DEPTH;  // few rows stay in the cache whole: longer reads
  const int64_t parts = (rows + ROWS - 1) / ROWS;
  deal(threads, (columns + COLUMNS - 1) / COLUMNS * parts, [=](const auto& next) {
    const Buffer<float> sums(ROWS * COLUMNS * LANES);
    for (int64_t i; next(i);) {
      const int64_t part = i / parts * COLUMNS, first = i % parts * ROWS;
      const int64_t count = rows - first < ROWS ? rows - first : ROWS;
      const int64_t wide = columns - part < COLUMNS ? columns - part : COLUMNS;
      std::memset(sums.data(), 0, ROWS * COLUMNS * LANES * sizeof(float));
      for (int64_t k = 0; k < whole; k += piece)
        weight_only_piece({x + first * depth + k, codes + part * depth + k, sums.data(), depth, depth,
                           whole - k < piece ? whole - k : piece},
                          count, wide);
      for (int64_t c = 0; c < wide; ++c)
        for (int64_t r = 0; r < count; ++r) {
          const float* row = x + (first + r) * depth;
          const int8_t* w = codes + (part + c) * depth;
          float total = sum(load(sums.data() + (c * ROWS + r) * LANES));
          for (int64_t k = whole; k < depth; ++k) total += row[k] * w[k];
          out[(first + r) * columns + part + c] = total * scale[part + c] + bias[part + c];
        }
    }
  });
}

}  // namespace tqdit
