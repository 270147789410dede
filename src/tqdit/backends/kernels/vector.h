// One register of lanes at a time, in GCC's and Clang's portable vectors; and the float functions made of them.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace tqdit {

// Vectors wider than a register would live in memory: GCC does not split them well. A tile of AMX has 16 columns, and
// every processor that has it has AVX-512.
#if defined(__AVX512F__) || defined(__AMX_INT8__)
constexpr int64_t LANES = 16;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4;
#else
constexpr int64_t LANES = 8;
#endif
typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef uint8_t vbyte __attribute__((vector_size(LANES)));
typedef int8_t vchar __attribute__((vector_size(LANES)));

inline vfloat splat(float x) { return vfloat{} + x; }
inline vfloat load(const float* p) { vfloat v; std::memcpy(&v, p, sizeof v); return v; }
inline vint load(const int32_t* p) { vint v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
inline void store(int32_t* p, vint v) { std::memcpy(p, &v, sizeof v); }
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
inline vfloat load_or_one(const float* p, int64_t count) {  // used for divisors
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
#if defined(__aarch64__)  // GCC converts four bytes one by one
inline vbyte narrow(vint v) {
  const uint16x4_t halves = vmovn_u32(uint32x4_t(v));
  const uint32_t bits = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
  vbyte bytes;
  std::memcpy(&bytes, &bits, sizeof bytes);
  return bytes;
}
template <typename Bytes>
inline uint8x8_t bytes_of(Bytes v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return vreinterpret_u8_u32(vdup_n_u32(bits));
}
inline vint widen(vchar v) { return vint(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(bytes_of(v)))))); }
inline vint widen(vbyte v) { return vint(vmovl_u16(vget_low_u16(vmovl_u8(bytes_of(v))))); }
#else
inline vbyte narrow(vint v) { return __builtin_convertvector(v, vbyte); }
// GCC converts bytes to ints one by one; in two steps it does not.
inline vint widen(vchar v) {
  typedef int16_t vshort __attribute__((vector_size(LANES * 2)));
  return __builtin_convertvector(__builtin_convertvector(v, vshort), vint);
}
inline vint widen(vbyte v) {
  typedef uint16_t vshort __attribute__((vector_size(LANES * 2)));
  return __builtin_convertvector(__builtin_convertvector(v, vshort), vint);
}
#endif
inline void store_bytes(uint8_t* p, vint v, int64_t count) {
  const vbyte bytes = narrow(v);
  if (count >= LANES)
    std::memcpy(p, &bytes, LANES);  // a known size: one instruction
  else
    std::memcpy(p, &bytes, count);
}
// Returns the values of `LANES` bytes.
inline vfloat floats_of(const int8_t* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // in one step, where GCC takes three
  return reinterpret_cast<vfloat>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  vchar bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return to_float(widen(bytes));
#endif
}
#if defined(__AVX512F__)  // in one instruction, where GCC compares and blends
inline vfloat at_most(vfloat a, vfloat b) {
  return reinterpret_cast<vfloat>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
inline vfloat at_least(vfloat a, vfloat b) {
  return reinterpret_cast<vfloat>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#elif defined(__AVX2__)
inline vfloat at_most(vfloat a, vfloat b) {
  return reinterpret_cast<vfloat>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
inline vfloat at_least(vfloat a, vfloat b) {
  return reinterpret_cast<vfloat>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
#else
inline vfloat at_most(vfloat a, vfloat b) { return a < b ? a : b; }
inline vfloat at_least(vfloat a, vfloat b) { return a > b ? a : b; }
#endif
inline vint at_most(vint a, vint b) { return a < b ? a : b; }
inline vint at_least(vint a, vint b) { return a > b ? a : b; }
// The bits of |x|. As integers they are in the order of the magnitudes, and those of NaN are the largest: a maximum of
// them keeps a NaN, which a maximum of floats drops.
inline vint magnitude(vfloat x) {
  vint bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7FFFFFFF;
}
// Returns the first n lanes of x; the others are 0.
template <typename Count>
inline vfloat first_lanes(vfloat x, Count n) {
  for (int64_t i = n; i < LANES; ++i) x[i] = 0;
  return x;
}

// Combines all lanes into one, by halves.
template <typename Scalar, int64_t COUNT, typename Vector, typename Combine>
inline Scalar reduce(Vector v, Combine combine) {
  if constexpr (COUNT == 4) {
    return combine(combine(v[0], v[2]), combine(v[1], v[3]));
  } else {
    typedef Scalar Half __attribute__((vector_size(COUNT / 2 * sizeof(Scalar))));
    struct { Half low, high; } halves;
    std::memcpy(&halves, &v, sizeof v);
    return reduce<Scalar, COUNT / 2>(combine(halves.low, halves.high), combine);
  }
}
inline float sum(vfloat v) { return reduce<float, LANES>(v, [](auto a, auto b) { return a + b; }); }
inline int32_t sum(vint v) { return reduce<int32_t, LANES>(v, [](auto a, auto b) { return a + b; }); }
inline float largest(vfloat v) { return reduce<float, LANES>(v, [](auto a, auto b) { return a > b ? a : b; }); }
inline int32_t largest(vint v) { return reduce<int32_t, LANES>(v, [](auto a, auto b) { return a > b ? a : b; }); }

// Calls piece(j, n) for every vector of a row of `width`: n items from j on, n a constant for whole vectors.
template <typename Piece>
inline void along(int64_t width, const Piece& piece) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t j = 0; j < whole; j += LANES) piece(j, std::integral_constant<int64_t, LANES>{});
  if (whole < width) piece(whole, width - whole);
}

// Returns a * b + c. Used only where results are not promised bit for bit: inside exp and GELU.
inline vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vfloat>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                  reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<vfloat>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                  reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  return vfloat(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}

// Returns x / y within 3 ulp, y from 1 to 2^126: an estimate of 14 bits of 1 / y and one Newton step.
inline vfloat quotient(vfloat x, vfloat y) {
#if defined(__AVX512F__)
  const vfloat r = reinterpret_cast<vfloat>(_mm512_rcp14_ps(reinterpret_cast<__m512>(y))), first = x * r;
  return multiply_add(first, multiply_add(-y, r, splat(1.0f)), first);
#else
  return x / y;
#endif
}

// Returns x 2^n for whole numbers n from -126 to 126 and x from 0.5 to 2. shifted: n + SHIFT.
inline vfloat times_power_of_two(vfloat x, vfloat n, [[maybe_unused]] vfloat shifted) {
#if defined(__AVX512F__)
  (void)shifted;
  return reinterpret_cast<vfloat>(_mm512_scalef_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(n)));
#else
  (void)n;
  vint exponent, bits;  // the low bits of `shifted` are n
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &x, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Adding 1.5 * 2^23 to |x| < 2^22 leaves no room for a fraction, and the low bits of the sum are the nearest integer.
constexpr float SHIFT = 12582912.0f;
constexpr int32_t SHIFT_BITS = 0x4B400000;

// Returns the nearest integer, half to even, of |x| < 2^22.
inline vint nearest(vfloat x) {
  const vfloat shifted = x + SHIFT;
  vint bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - SHIFT_BITS;
}
inline vfloat clip(vfloat x, vfloat low, vfloat high) { return at_most(at_least(x, low), high); }

// Says whether a comparison holds in any lane.
inline bool any(vint holds) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(holds), reinterpret_cast<__m512i>(holds));
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(holds));
#else
  return reduce<int32_t, LANES>(holds, [](auto a, auto b) { return a | b; });
#endif
}

// Returns exp(x) within 3 ulp, x clipped to +-87: 2^n p(r), |r| <= ln(2) / 2. p is 1 + r + ... of degree 5, whose other
// coefficients make its largest relative error least: 1.05e-7.
inline vfloat exponential(vfloat x) {
  x = at_most(at_least(x, splat(-87.0f)), splat(87.0f));
  const vfloat shifted = multiply_add(x, splat(1.44269504088896341f), splat(SHIFT)), n = shifted - SHIFT;
  const vfloat r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  vfloat p = splat(0.0083125f);
  for (float coefficient : {0.04189033f, 0.16667115f, 0.4999923f, 1.0f, 1.0f})
    p = multiply_add(p, r, splat(coefficient));
  return times_power_of_two(p, n, shifted);
}

// Returns tanh-GELU: x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline vfloat gelu(vfloat x) {
  const vfloat twice = x * multiply_add(x * x, splat(-2.0f * 0.7978845608028654f * 0.044715f),
                                        splat(-2.0f * 0.7978845608028654f));
  return quotient(x, 1.0f + exponential(twice));
}

}  // namespace tqdit
