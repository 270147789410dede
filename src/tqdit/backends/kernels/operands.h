// The parameters of an activation, and its codes: unsigned bytes u = code + 128, as VNNI wants them.
#pragma once
#include "vector.h"

namespace tqdit {

enum Grid { UNIFORM = 0, TWO_REGION = 1, MERGED = 2 };

// Parameters of one activation: entry [sample * stride + head]; stride 0 if all samples share them. Zero points are of
// signed codes. Merged: coarse = scale * 2^shift, both regions in one grid of step `scale`.
struct Operand {
  const float *scale, *coarse;
  const int32_t *zero, *shift;
  int64_t stride, grid, bits;
};

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

}  // namespace tqdit
