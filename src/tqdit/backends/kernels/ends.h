// What surrounds the blocks of a transformer on patches: latents to tokens, and tokens to latents.
#pragma once
#include "elementwise.h"

namespace tqdit {

// A layer y = (x weight^T) * scale + bias, whose weight is in float or in codes.
struct EndLayer {
  const float* weight;  // (columns, depth), or null
  const int8_t* codes;  // (columns, depth), where `weight` is null
  const float *scale, *bias;  // (columns), or null: 1, and 0
  int64_t columns, depth;

  Transposed transposed(int64_t threads) const {
    if (weight) return Transposed(weight, columns, depth, threads);
    return Transposed(codes, columns, depth, threads);
  }

  // Returns results from sums of products, a vector from column j on.
  vfloat finished(vfloat sums, int64_t j) const {
    if (scale) sums *= load(scale + j, columns - j);
    return bias ? sums + load(bias + j, columns - j) : sums;
  }
};

// Where patches lie: `across` in a row of an image, `side` pixels wide and high, `tokens` in a sample.
struct Patches { int64_t batch, tokens, across, side; };

constexpr int64_t TOKENS = 8;  // of one task

// out (batch, tokens, columns) = layer(patches of x) + position. A patch is (channels, side, side).
struct EmbedCall {
  const void* x;          // (batch, channels, height, width) of a `FloatType`
  const float* position;  // (tokens, columns)
  void* out;              // of a `FloatType`
  int64_t sample_stride, channel_stride, line_stride, pixel_stride;  // of x, in items
  int64_t channels, type, out_type, threads;
  Patches patches;
  EndLayer layer;
};

// Reads the patch of a token of all samples.
template <typename Item>
void read_patch(const EmbedCall& c, const Item* x, int64_t token, float* patch) {
  const int64_t place = token % c.patches.tokens, side = c.patches.side;
  x += token / c.patches.tokens * c.sample_stride + place / c.patches.across * side * c.line_stride +
       place % c.patches.across * side * c.pixel_stride;
  for (int64_t channel = 0; channel < c.channels; ++channel)
    for (int64_t line = 0; line < side; ++line)
      for (int64_t pixel = 0; pixel < side; ++pixel)
        *patch++ = load(x + channel * c.channel_stride + line * c.line_stride + pixel * c.pixel_stride, 1)[0];
}

template <typename Item>
void embed(const EmbedCall& c, Item* out) {
  const Transposed weight = c.layer.transposed(c.threads);
  const int64_t tokens = c.patches.batch * c.patches.tokens, columns = c.layer.columns, depth = c.layer.depth;
  deal(c.threads, (tokens + TOKENS - 1) / TOKENS, [&](const auto& next) {
    const Buffer<float> rows(TOKENS * depth);
    for (int64_t i; next(i);) {
      const int64_t first = i * TOKENS, count = tokens - first < TOKENS ? tokens - first : TOKENS;
      for (int64_t r = 0; r < count; ++r)
        for_float_type(c.type, const_cast<void*>(c.x),
                       [&](const auto* x) { read_patch(c, x, first + r, rows.data() + r * depth); });
      weight.multiply(rows.data(), depth, count, [&](int64_t r, int64_t j, vfloat sums) {
        const float* const position = c.position + (first + r) % c.patches.tokens * columns;
        const vfloat y = c.layer.finished(sums, j) + load(position + j, columns - j);
        store(out + (first + r) * columns + j, y, columns - j);
      });
    }
  });
}

extern "C" void tqdit_embed(const EmbedCall* call) {
  for_float_type(call->out_type, call->out, [=](auto* out) { embed(*call, out); });
}

// out (batch, channels, height, width) = the pixels of the tokens: layer(LayerNorm(x) (1 + scale) + shift). Column
// (line * side + pixel) * channels + channel of the layer is a pixel of a token's patch. A sample with a number that is
// not finite is NaN as a whole.
struct UnembedCall {
  const void* x;            // (batch, tokens, depth) of a `FloatType`
  const float* modulation;  // shift (depth) and scale (depth) of each sample, `stride` apart
  void* out;                // of a `FloatType`
  int64_t stride, type, out_type, threads;
  Patches patches;
  EndLayer layer;
  float eps;
};

// Writes the modulated norm of a token of all samples.
template <typename Item>
void normalize_token(const UnembedCall& c, const Item* x, int64_t token, float* out) {
  const int64_t depth = c.layer.depth;
  const float* const shift = c.modulation + token / c.patches.tokens * c.stride;
  const Normal<Item> values(x + token * depth, shift, shift + depth, c.eps, depth);
  along(depth, [=](int64_t k, auto n) { store(out + k, values(k, n), n); });
}

// Writes the pixels of a token of all samples.
template <typename Item>
void write_patch(const UnembedCall& c, const float* pixels, int64_t token, Item* out) {
  const int64_t side = c.patches.side, place = token % c.patches.tokens, width = c.patches.across * side;
  const int64_t channels = c.layer.columns / (side * side), plane = c.patches.tokens * side * side;
  out += token / c.patches.tokens * channels * plane + place / c.patches.across * side * width +
         place % c.patches.across * side;
  for (int64_t line = 0; line < side; ++line)
    for (int64_t pixel = 0; pixel < side; ++pixel)
      for (int64_t channel = 0; channel < channels; ++channel)
        store(out + channel * plane + line * width + pixel, splat(*pixels++), 1);
}

template <typename Item>
void write_nan(Item* out, int64_t size) {
  const vfloat nan = splat(__builtin_nanf(""));
  along(size, [=](int64_t i, auto n) { store(out + i, nan, n); });
}

extern "C" void tqdit_unembed(const UnembedCall* call) {
  const UnembedCall& c = *call;
  const Transposed weight = c.layer.transposed(c.threads);
  const int64_t tokens = c.patches.batch * c.patches.tokens, columns = c.layer.columns, depth = c.layer.depth;
  const Buffer<uint8_t> infinite(c.patches.batch);  // whether a sample has a number that is not finite
  std::memset(infinite.data(), 0, c.patches.batch);
  deal(c.threads, (tokens + TOKENS - 1) / TOKENS, [&](const auto& next) {
    const Buffer<float> rows(TOKENS * depth), pixels(TOKENS * columns);
    for (int64_t i; next(i);) {
      const int64_t first = i * TOKENS, count = tokens - first < TOKENS ? tokens - first : TOKENS;
      for (int64_t r = 0; r < count; ++r)
        for_float_type(c.type, const_cast<void*>(c.x),
                       [&](const auto* x) { normalize_token(c, x, first + r, rows.data() + r * depth); });
      weight.multiply(rows.data(), depth, count, [&](int64_t r, int64_t j, vfloat sums) {
        const vfloat y = first_lanes(c.layer.finished(sums, j), columns - j);
        if (any(magnitude(y) >= 0x7F800000))
          __atomic_store_n(infinite.data() + (first + r) / c.patches.tokens, 1, __ATOMIC_RELAXED);
        store(pixels.data() + r * columns + j, y, columns - j);
      });
      for (int64_t r = 0; r < count; ++r)
        for_float_type(c.out_type, c.out, [&](auto* out) { write_patch(c, pixels.data() + r * columns, first + r, out); });
    }
  });
  const int64_t size = c.patches.tokens * columns;
  for (int64_t sample = 0; sample < c.patches.batch; ++sample)
    if (infinite.data()[sample]) for_float_type(c.out_type, c.out, [=](auto* out) { write_nan(out + sample * size, size); });
}

}  // namespace tqdit
