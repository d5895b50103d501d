// Vectors of one instruction set, on GCC's vector extensions. Included once per instruction set between target
// pragmas, with CLASSFAIR_ISA (a namespace) and CLASSFAIR_VECTOR_BYTES set: no include guard on purpose.
// (target_clones would not reach the lambda inside parallel_for.)

#define CLASSFAIR_INLINE inline __attribute__((always_inline))

namespace classfair {
namespace CLASSFAIR_ISA {

typedef float FloatV __attribute__((vector_size(CLASSFAIR_VECTOR_BYTES)));
typedef int32_t Int32V __attribute__((vector_size(CLASSFAIR_VECTOR_BYTES)));
typedef uint32_t UInt32V __attribute__((vector_size(CLASSFAIR_VECTOR_BYTES)));
typedef uint16_t UInt16V __attribute__((vector_size(CLASSFAIR_VECTOR_BYTES / 2)));
typedef double DoubleV __attribute__((vector_size(CLASSFAIR_VECTOR_BYTES)));
typedef int64_t Int64V __attribute__((vector_size(CLASSFAIR_VECTOR_BYTES)));

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using V = FloatV;
  using Mask = Int32V;
};
template <>
struct VectorOf<double> {
  using V = DoubleV;
  using Mask = Int64V;
};
template <class A>
using Vec = typename VectorOf<A>::V;
template <class A>
constexpr int64_t kLanes = CLASSFAIR_VECTOR_BYTES / sizeof(A);

template <class To, class From>
CLASSFAIR_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A>
CLASSFAIR_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}

// Loads and stores of storage types, widened to and rounded from the accumulate type.
CLASSFAIR_INLINE FloatV load(const float* p) {
  FloatV v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
CLASSFAIR_INLINE DoubleV load(const double* p) {
  DoubleV v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
CLASSFAIR_INLINE FloatV load(const BFloat16* p) {
  UInt16V v;
  std::memcpy(&v, p, sizeof(v));
  return bits_as<FloatV>(__builtin_convertvector(v, UInt32V) << 16);
}
CLASSFAIR_INLINE FloatV load(const Half* p) {
#if CLASSFAIR_VECTOR_BYTES == 64
  return (FloatV)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif CLASSFAIR_VECTOR_BYTES == 32
  return (FloatV)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  FloatV v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

CLASSFAIR_INLINE void store(float* p, FloatV v) { std::memcpy(p, &v, sizeof(v)); }
CLASSFAIR_INLINE void store(double* p, DoubleV v) { std::memcpy(p, &v, sizeof(v)); }
CLASSFAIR_INLINE void store(BFloat16* p, FloatV v) {
  const UInt32V u = bits_as<UInt32V>(v);
  // Round to nearest even; a NaN keeps its sign and becomes quiet instead of rounding to infinity.
  const UInt32V rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UInt32V nan = (u >> 16) | 0x40u;
  const UInt16V out = __builtin_convertvector(v == v ? rounded : nan, UInt16V);
  std::memcpy(p, &out, sizeof(out));
}
CLASSFAIR_INLINE void store(Half* p, FloatV v) {
#if CLASSFAIR_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif CLASSFAIR_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}

// The tail of a row: `count` elements, the rest filled or dropped. Through memory, because a vector indexed by a
// variable goes there once for each element.
template <class T, class A = acc_t<T>>
CLASSFAIR_INLINE Vec<A> load_some(const T* p, int64_t count, A fill) {
  A lane[kLanes<A>];
  for (int64_t i = 0; i < kLanes<A>; ++i) lane[i] = fill;
  for (int64_t i = 0; i < count; ++i) lane[i] = static_cast<A>(p[i]);
  return load(lane);
}
template <class T, class A = acc_t<T>>
CLASSFAIR_INLINE void store_some(T* p, Vec<A> v, int64_t count) {
  A lane[kLanes<A>];
  store(lane, v);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(lane[i]);
}
#if CLASSFAIR_VECTOR_BYTES == 64
CLASSFAIR_INLINE FloatV load_some(const float* p, int64_t count, float fill) {
  return (FloatV)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << count) - 1), p);
}
CLASSFAIR_INLINE void store_some(float* p, FloatV v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}
#elif CLASSFAIR_VECTOR_BYTES == 32
CLASSFAIR_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
CLASSFAIR_INLINE FloatV load_some(const float* p, int64_t count, float fill) {
  const __m256i mask = first_lanes(count);
  return (FloatV)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), (__m256)mask);
}
CLASSFAIR_INLINE void store_some(float* p, FloatV v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)v);
}
#endif

// NaN in b survives, as in x86's max instructions.
CLASSFAIR_INLINE FloatV max(FloatV a, FloatV b) {
#if CLASSFAIR_VECTOR_BYTES == 64
  return (FloatV)_mm512_max_ps((__m512)a, (__m512)b);
#elif CLASSFAIR_VECTOR_BYTES == 32
  return (FloatV)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
CLASSFAIR_INLINE DoubleV max(DoubleV a, DoubleV b) { return a > b ? a : b; }

// The lanes in which a comparison of vectors of A holds, as bits. Comparisons have types of their own in clang.
template <class A, class Comparison>
CLASSFAIR_INLINE unsigned lane_bits(Comparison comparison) {
  const auto mask = (typename VectorOf<A>::Mask)comparison;
#if CLASSFAIR_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)mask);
#elif CLASSFAIR_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) return _mm256_movemask_ps((__m256)mask);
#endif
  unsigned bits = 0;
  for (int64_t i = 0; i < kLanes<A>; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
}

// e^x for x <= 88, relative error below 2e-7: x = n ln2 + r with |r| <= ln2 / 2, a minimax polynomial of e^r (own
// fit, relative error 9.2e-8) times 2^n. e^0 is exactly 1, so that a certain row's loss is exactly 0. Results below
// 2^-126 / sqrt(2) are zero.
CLASSFAIR_INLINE FloatV exp(FloatV x) {
  // At -127 ln2 the scale 2^n below becomes an exact zero, so that -inf gives 0. NaN passes through max.
  x = max(splat(-88.0296919f), x);
  const float round_shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const FloatV shifted = x * 1.44269504088896341f + round_shift;
  const FloatV n = shifted - round_shift;
  const FloatV r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // Cody-Waite split of ln2
  FloatV p = r * 0.00829027207273f + 0.0418981596187f;
  p = p * r + 0.166676381279f;
  p = p * r + 0.499991478411f;
  p = p * r + 0.999999706313f;
  p = p * r + 1.f;
  const FloatV scale = bits_as<FloatV>((bits_as<UInt32V>(shifted) << 23) + 0x3f800000u);
  return p * scale;
}
CLASSFAIR_INLINE DoubleV exp(DoubleV x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// log x for normal x > 0, relative error below 3e-7, log 1 = 0: x = m 2^n with m from sqrt(1/2) to sqrt(2), and the
// series of 2 atanh(s) at s = (m - 1) / (m + 1), |s| < 0.172, whose first term left out is 2e-9 of it.
CLASSFAIR_INLINE FloatV log(FloatV x) {
  const UInt32V bits = bits_as<UInt32V>(x);
  const Int32V exponent = bits_as<Int32V>(bits - 0x3f3504f3u) >> 23;
  const FloatV m = bits_as<FloatV>(bits - (bits_as<UInt32V>(exponent) << 23)),
               n = __builtin_convertvector(exponent, FloatV);
  const FloatV s = (m - 1.f) / (m + 1.f), z = s * s;
  const FloatV series = ((z * (2.f / 9) + 2.f / 7) * z + 2.f / 5) * z + 2.f / 3;
  return n * 0.693359375f + (n * -2.12194440e-4f + (s * 2.f + s * z * series));
}
CLASSFAIR_INLINE DoubleV log(DoubleV x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// Lanes are combined in a fixed order: halves with each other, down to one. reduce(a, b) takes vectors and scalars.
template <class A, class Reduce>
CLASSFAIR_INLINE A fold_lanes(Vec<A> v, Reduce reduce) {
#if CLASSFAIR_VECTOR_BYTES >= 32
  if constexpr (std::is_same_v<A, float>) {
#if CLASSFAIR_VECTOR_BYTES == 64
    const __m256 eight = reduce(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    const __m256 eight = (__m256)v;
#endif
    const __m128 four = reduce(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = reduce(four, _mm_movehl_ps(four, four));
    return reduce(two, _mm_movehdup_ps(two))[0];
  }
#endif
  A lane[kLanes<A>];
  store(lane, v);
  for (int64_t half = kLanes<A> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] = reduce(lane[i], lane[i + half]);
  return lane[0];
}
template <class A>
CLASSFAIR_INLINE A sum_lanes(Vec<A> v) {
  return fold_lanes<A>(v, [](auto a, auto b) { return a + b; });
}
// Of eight vectors at once, at a fifth of the cost; in an order of its own.
template <class A>
CLASSFAIR_INLINE void sum_lanes(const Vec<A>* v, A* sums) {
  for (int64_t i = 0; i < 8; ++i) sums[i] = sum_lanes<A>(v[i]);
}
#if CLASSFAIR_VECTOR_BYTES >= 32
CLASSFAIR_INLINE void sum_lanes(const FloatV* v, float* sums) {
  __m256 half[8];
  for (int64_t i = 0; i < 8; ++i) {
#if CLASSFAIR_VECTOR_BYTES == 64
    half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
#else
    half[i] = (__m256)v[i];
#endif
  }
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(half[4], half[5]), _mm256_hadd_ps(half[6], half[7]));
  _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
}
#endif
template <class A>
CLASSFAIR_INLINE A max_lanes(Vec<A> v) {
  return fold_lanes<A>(v, [](auto a, auto b) { return b > a ? b : a; });
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
