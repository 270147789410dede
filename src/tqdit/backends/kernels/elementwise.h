// Quantization of float rows, with LayerNorm or without, and linear layers on float inputs.
#pragma once
#include "operands.h"
#include "products.h"

namespace tqdit {

// Quantization of float rows, after LayerNorm and modulation if there is a norm: x (1 + scale) + shift.
struct QuantizeCall {
  const float *x;              // (batch, tokens, width)
  const float *shift, *scale;  // null: no norm; else one row per sample, `stride` apart
  uint8_t *first, *second;     // (batch, tokens, width); the second plane of two regions, or null
  int64_t stride, batch, tokens, width, threads;
  Operand target;
  float eps;
};

// Writes the codes of one row. The encoder is passed by value: the compiler would have to assume that bytes written
// here change an encoder behind a reference.
template <int GRID>
void quantize_row(const Encoder<GRID> encoder, const float* in, int64_t width, uint8_t* first, uint8_t* second) {
  for (int64_t j = 0; j < width; j += LANES) encoder.encode(load(in + j, width - j), first + j, second + j, width - j);
}

// Writes the codes of one row after LayerNorm without parameters and its modulation.
template <int GRID>
void quantize_normal(const Encoder<GRID> encoder, const float* in, const float* shift, const float* scale, float eps,
                     int64_t width, uint8_t* first, uint8_t* second) {
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
  for (int64_t j = 0; j < width; j += LANES) {
    const int64_t n = width - j;
    const vfloat normal = (load(in + j, n) - mean) * inverse;
    encoder.encode(normal * (1.0f + load(scale + j, n)) + load(shift + j, n), first + j, second + j, n);
  }
}

extern "C" void tqdit_quantize(const QuantizeCall* call) {
  const QuantizeCall& c = *call;
  for_grid(c.target.grid, [&](auto grid) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = 0; row < c.batch * c.tokens; ++row) {
      const int64_t sample = row / c.tokens, at = row * c.width, modulation = sample * c.stride;
      const Encoder<decltype(grid)::value> encoder(c.target.entry(sample), c.target.bits);
      uint8_t* second = c.second ? c.second + at : nullptr;
      if (c.shift)
        quantize_normal(encoder, c.x + at, c.shift + modulation, c.scale + modulation, c.eps, c.width, c.first + at,
                        second);
      else
        quantize_row(encoder, c.x + at, c.width, c.first + at, second);
    }
  });
}

// Multiplies one column of the weight by R rows of x.
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

constexpr int64_t NARROW = 64;

// Multiplies a narrow x, such as the pixels of a patch, by vectors along the columns: this needs no sums across lanes.
inline void weight_only_narrow(const float* x, const int8_t* codes, const float* scale, const float* bias, int64_t rows,
                               int64_t columns, int64_t depth, float* out, int64_t threads) {
  const int64_t padded = round_up(columns, LANES);
  const Buffer<float> transposed(depth * padded);
  float* const weight = transposed.data();
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = 0; j < padded; ++j) weight[k * padded + j] = j < columns ? codes[j * depth + k] : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < columns; j += LANES) {
      vfloat total{};
      for (int64_t k = 0; k < depth; ++k)
        total = multiply_add(splat(x[row * depth + k]), load(weight + k * padded + j), total);
      const int64_t n = columns - j;
      store(out + row * columns + j, total * load(scale + j, n) + load(bias + j, n), n);
    }
}

// Computes out = (x codes^T) * scale + bias for float x. x (rows, depth), codes (columns, depth), scale and bias
// (columns), out (rows, columns). Up to 8 rows read the int8 weight once.
extern "C" void tqdit_weight_only(const float* x, const int8_t* codes, const float* scale, const float* bias, int64_t rows,
                       int64_t columns, int64_t depth, float* out, int64_t threads) {
  if (depth <= NARROW) return weight_only_narrow(x, codes, scale, bias, rows, columns, depth, out, threads);
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

}  // namespace tqdit
