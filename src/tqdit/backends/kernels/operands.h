// The parameters of an activation, and its codes: unsigned bytes u = code + 128, as VNNI wants them.
#pragma once
#include <cfloat>

#include "vector.h"

namespace tqdit {

enum Grid { UNIFORM = 0, TWO_REGION = 1, MERGED = 2, ROW = 3, SOFTMAX_ROW = 4 };

// Columns of a table of ../../ops/tables.py. ZERO is of signed codes; FACTOR is 2^shift of merged regions, where
// COARSE = SCALE * FACTOR, so that both regions share one grid of step SCALE. On the grid of rows SCALE is the
// fraction of a row's largest magnitude that one step is.
enum Column { SCALE, COARSE, ZERO, FACTOR, INVERSE, COARSE_INVERSE, TABLE_COLUMNS = 8 };

// One activation: its table (samples, units, TABLE_COLUMNS). A stride counts floats; it is 0 where all samples, or all
// units, share an entry. `channels`: null, or a factor of every channel, by which values are multiplied before they are
// coded.
struct Operand {
  const float *table, *channels;
  int64_t sample_stride, unit_stride, grid, bits;
  const float* entry(int64_t sample, int64_t unit = 0) const {
    return table + sample * sample_stride + unit * unit_stride;
  }
};

inline int32_t zero_point(const float* entry) { return static_cast<int32_t>(entry[ZERO]); }
inline int32_t merging_shift(const float* entry) { return __builtin_ctz(static_cast<uint32_t>(entry[FACTOR])); }

// Divides by scales exactly. Their reciprocals tell the nearest integers of most quotients, in a third of the time of a
// division: but for a quotient that lies, within the error of three roundings of at most 2^8, between two integers.
constexpr float SURE = 0.4999f;

// Returns the distance from an integer up to which a product with this reciprocal serves; -1 if it has lost its bits.
inline float sure_with(float inverse) { return inverse >= FLT_MIN && inverse <= FLT_MAX ? SURE : -1.0f; }

// Returns the nearest integer of x / scale, clipped to integers `low` and `high` of at most 2^8.
inline vint nearest_quotient(vfloat x, vfloat scale, vfloat inverse, vfloat low, vfloat high, float sure) {
  const vfloat steps = clip(x * inverse, low, high), away = steps - ((steps + SHIFT) - SHIFT);
  if (any(at_least(away, -away) > sure)) return nearest(clip(x / scale, low, high));
  return nearest(steps);
}

// Turns x into the unsigned code of a uniform grid.
struct Uniform {
  vfloat scale, inverse, low, high;  // low, high: the steps that codes can hold, so clipping first changes nothing
  float sure;
  int32_t zero;                      // the zero point of the unsigned code
  vfloat origin;                     // SHIFT + zero: the bits of SHIFT plus a code are those of a float
  vint lowest, highest;              // the bits of the lowest and the highest code
  Uniform(const float* entry, int64_t bits)
      : scale(splat(entry[SCALE])), inverse(splat(entry[INVERSE])), low(splat(-(1 << (bits - 1)) - zero_point(entry))),
        high(splat((1 << (bits - 1)) - 1 - zero_point(entry))), sure(sure_with(entry[INVERSE])), zero(zero_point(entry) + 128),
        origin(splat(SHIFT + zero)), lowest(vint{} + (SHIFT_BITS + 128 - (1 << (bits - 1)))),
        highest(vint{} + (SHIFT_BITS + 127 + (1 << (bits - 1)))) {}
  vint code(vfloat x) const { return nearest_quotient(x, scale, inverse, low, high, sure) + zero; }
  // For an x that is not promised to the last bit either. The code is the low byte of the result.
  vint code_near(vfloat x) const {
    const vfloat shifted = multiply_add(x, inverse, origin);
    vint bits;  // as integers they have the order of the floats, and those of negative floats are negative
    std::memcpy(&bits, &shifted, sizeof bits);
    return at_most(at_least(bits, lowest), highest);
  }
};

// Writes the unsigned codes of x. Uniform: in `first`. Two regions, by the sign of x: magnitudes of negative codes in
// `first`, positive codes in `second`. Merged: one grid of step s1 in `first`, lowest code at 0.
template <int GRID>
struct Encoder {
  Uniform uniform;
  vfloat s1, s2, per_s1, per_s2;
  int32_t shift, half;
  Encoder(const float* entry, int64_t bits)
      : uniform(entry, bits), s1(splat(entry[SCALE])), s2(splat(entry[COARSE])), per_s1(splat(entry[INVERSE])),
        per_s2(splat(entry[COARSE_INVERSE])), shift(GRID == MERGED ? merging_shift(entry) : 0), half(1 << (bits - 1)) {}
  template <typename Count>
  void encode(vfloat x, uint8_t* first, uint8_t* second, Count n) const {
    if (GRID == UNIFORM)
      store_bytes(first, uniform.code(x), n);
    else
      store_regions(x / (x < 0.0f ? s1 : s2), first, second, n);
  }
  // For an x that is not promised to the last bit either.
  template <typename Count>
  void encode_near(vfloat x, uint8_t* first, uint8_t* second, Count n) const {
    if (GRID == UNIFORM)
      store_bytes(first, uniform.code_near(x), n);
    else
      store_regions(x * (x < 0.0f ? per_s1 : per_s2), first, second, n);
  }
  template <typename Count>
  void store_regions(vfloat steps, uint8_t* first, uint8_t* second, Count n) const {
    const vint code = nearest(clip(steps, splat(-half), splat(half - 1)));
    if (GRID == MERGED) {
      store_bytes(first, (code < 0 ? code : code << shift) + half, n);
    } else {
      store_bytes(first, code < 0 ? -code : vint{}, n);
      store_bytes(second, code > 0 ? code : vint{}, n);
    }
  }
};

// Codes on the grid of rows. The magnitude of a row with NaN is NaN, and that of one with Inf is Inf or NaN; so is then
// the step, and with it every product of the row.
struct RowGrid {
  float fraction;
  int64_t bits;
  RowGrid(const float* entry, int64_t bits) : fraction(entry[SCALE]), bits(bits) {}

  // Returns the step of a row, from the bits of its largest magnitude.
  float step(int32_t magnitude) const {
    float largest;
    std::memcpy(&largest, &magnitude, sizeof largest);
    const float step = largest * fraction;
    return step < FLT_MIN ? FLT_MIN : step;
  }
};

// Calls run(grid) with the kind of grid as a constant.
template <typename Run>
void for_grid(int64_t grid, const Run& run) {
  switch (grid) {
    case UNIFORM: return run(std::integral_constant<int, UNIFORM>{});
    case TWO_REGION: return run(std::integral_constant<int, TWO_REGION>{});
    case MERGED: return run(std::integral_constant<int, MERGED>{});
    case ROW: return run(std::integral_constant<int, ROW>{});
  }
}

}  // namespace tqdit
