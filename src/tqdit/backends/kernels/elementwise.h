// LayerNorm with its quantization, and linear layers on float inputs.
#pragma once
#include "operands.h"
#include "products.h"

namespace tqdit {

// LayerNorm without parameters, then x (1 + scale) + shift, quantized. x (batch, tokens, width); shift and scale: one
// row per sample, `stride` apart.
extern "C" void tqdit_norm_quantize(const float* x, const float* shift, const float* scale, int64_t stride, float eps,
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

constexpr int64_t NARROW = 64;

// The same for a narrow x, such as the pixels of a patch: vectors along the columns, which needs no sums across lanes.
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

// out = (x codes^T) * scale + bias for float x. x (rows, depth), codes (columns, depth), scale and bias (columns), out
// (rows, columns). Up to 8 rows read the int8 weight once.
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
