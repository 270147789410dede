// The float types of values in memory: fp32, bf16 and fp16. Arithmetic is in fp32; results are rounded once, half to
// even.
#pragma once
#include "vector.h"

namespace tqdit {

enum FloatType { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

typedef uint16_t vhalf __attribute__((vector_size(LANES * 2)));
typedef uint32_t vuint __attribute__((vector_size(LANES * 4)));

template <typename To, typename From>
inline To bits_of(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "other bits");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Item>
inline vhalf load_halves(const Item* p, int64_t count) {
  vhalf v{};
  if (count >= LANES)
    std::memcpy(&v, p, sizeof v);
  else
    std::memcpy(&v, p, count * sizeof(Item));
  return v;
}
template <typename Item>
inline void store_halves(Item* p, vhalf v, int64_t count) {
  if (count >= LANES)
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, count * sizeof(Item));
}

inline vfloat load(const Bfloat16* p, int64_t count) {
  return bits_of<vfloat>(__builtin_convertvector(load_halves(p, count), vuint) << 16);
}

inline void store(Bfloat16* p, vfloat v, int64_t count) {
  const vuint bits = bits_of<vuint>(v);
  const vuint rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const vuint kept = v == v ? rounded : rounded * 0 + 0x7FC0u;  // rounding could turn a NaN into Inf or 0
  store_halves(p, __builtin_convertvector(kept, vhalf), count);
}

#if defined(__AVX512F__)
inline vfloat load(const Float16* p, int64_t count) {
  return bits_of<vfloat>(_mm512_cvtph_ps(bits_of<__m256i>(load_halves(p, count))));
}
inline void store(Float16* p, vfloat v, int64_t count) {
  store_halves(p, bits_of<vhalf>(_mm512_cvtps_ph(bits_of<__m512>(v), _MM_FROUND_TO_NEAREST_INT)), count);
}
#elif defined(__F16C__)
inline vfloat load(const Float16* p, int64_t count) {
  return bits_of<vfloat>(_mm256_cvtph_ps(bits_of<__m128i>(load_halves(p, count))));
}
inline void store(Float16* p, vfloat v, int64_t count) {
  store_halves(p, bits_of<vhalf>(_mm256_cvtps_ph(bits_of<__m256>(v), _MM_FROUND_TO_NEAREST_INT)), count);
}
#else
// fp16 keeps 10 bits of a fraction and has exponents from -14 to 15; smaller values are multiples of 2^-24.
inline vfloat load(const Float16* p, int64_t count) {
  const vuint half = __builtin_convertvector(load_halves(p, count), vuint);
  const vuint sign = (half & 0x8000u) << 16, shifted = (half & 0x7FFFu) << 13;
  const vfloat small = bits_of<vfloat>(shifted + (113u << 23)) - 0x1p-14f;
  const vuint top = shifted & 0x0F800000u;  // the exponent
  const vuint finite = top == 0 ? bits_of<vuint>(small) : shifted + (112u << 23);
  return bits_of<vfloat>(sign | (top == 0x0F800000u ? shifted + (224u << 23) : finite));
}
inline void store(Float16* p, vfloat v, int64_t count) {
  const vuint bits = bits_of<vuint>(v), sign = bits & 0x80000000u, size = bits ^ sign;
  const vuint small = bits_of<vuint>(bits_of<vfloat>(size) + 0.5f) - 0x3F000000u;  // the sum rounds to multiples of 2^-24
  const vuint normal = (size - (112u << 23) + 0xFFFu + (size >> 13 & 1u)) >> 13;
  const vuint large = size > 0x7F800000u ? vuint{} + 0x7E00u : vuint{} + 0x7C00u;
  const vuint kept = size >= (143u << 23) ? large : size < (113u << 23) ? small : normal;
  store_halves(p, __builtin_convertvector(kept | sign >> 16, vhalf), count);
}
#endif

// Calls run(p) with a pointer to items of a type.
template <typename Run>
void for_float_type(int64_t type, void* p, const Run& run) {
  switch (type) {
    case BFLOAT16: return run(static_cast<Bfloat16*>(p));
    case FLOAT16: return run(static_cast<Float16*>(p));
    default: return run(static_cast<float*>(p));
  }
}

}  // namespace tqdit
