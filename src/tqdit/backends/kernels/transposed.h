// Products of float rows with a weight that lies transposed, by vectors along the columns: they need no sums across lanes.
#pragma once
#include "products.h"
#include "team.h"

namespace tqdit {

// A weight (columns, depth) of floats or int8 codes, as floats (depth, columns) with zeros after the last column.
class Transposed {
 public:
  template <typename Item>
  Transposed(const Item* weight, int64_t columns, int64_t depth, int64_t threads)
      : columns_(columns), depth_(depth), stride_(round_up(columns, VECTORS * LANES)), items_(depth * stride_) {
    float* const items = items_.data();
    deal_rows(threads, depth, 1 + PIECE / stride_, [=, stride = stride_](int64_t k, int64_t end) {
      for (; k < end; ++k) {
        for (int64_t j = 0; j < columns; ++j) items[k * stride + j] = weight[j * depth + k];
        for (int64_t j = columns; j < stride; ++j) items[k * stride + j] = 0;
      }
    });
  }

  // Multiplies rows of x, `x_stride` apart, and calls each(row, j, sums) for every vector of columns, j the first of them.
  // A sum is one chain in the order of the depth, so that it does not depend on the rows beside it.
  template <typename Each>
  void multiply(const float* x, int64_t x_stride, int64_t rows, const Each& each) const {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) tiles<ROWS>(x + row * x_stride, x_stride, row, each);
    for (; row < rows; ++row) tiles<1>(x + row * x_stride, x_stride, row, each);
  }

 private:
  static constexpr int64_t ROWS = 4, VECTORS = 2;  // of a tile: as many chains hide the latency of one
  static constexpr int64_t PIECE = 32768;          // floats, below which a thread more takes longer to come than it helps

  template <int64_t R, typename Each>
  void tiles(const float* x, int64_t x_stride, int64_t row, const Each& each) const {
    for (int64_t j = 0; j < stride_; j += VECTORS * LANES) {
      vfloat sums[R][VECTORS] = {};
      const float* weight = items_.data() + j;
      for (int64_t k = 0; k < depth_; ++k, weight += stride_)
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; ++r) {
          // x - 0 is x, also where x is -0; so the compiler only copies it to all lanes.
          const vfloat item = x[r * x_stride + k] - vfloat{};
#pragma GCC unroll 8
          for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = multiply_add(item, load(weight + v * LANES), sums[r][v]);
        }
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int64_t v = 0; v < VECTORS; ++v)
          if (j + v * LANES < columns_) each(row + r, j + v * LANES, sums[r][v]);
    }
  }

  int64_t columns_, depth_, stride_;
  Buffer<float> items_;
};

}  // namespace tqdit
