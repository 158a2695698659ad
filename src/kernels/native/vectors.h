// Vectors of fp32, and products of 16-bit numbers with sums in fp32, in the vector types of GCC and
// Clang: what a processor has no instruction for, the compiler composes.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <new>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr int kWide = 4;  // vectors of a tile of a product: kTall * kWide sums in registers
#else
constexpr int64_t kLanes = 8;
constexpr int kWide = 2;
#endif
constexpr int kTall = 4;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint16_t bf16;

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

inline Floats splat(float x) { return x - Floats{}; }
inline Bits splat_bits(uint32_t x) { return x - Bits{}; }
inline Bits bits_of(Floats v) { return (Bits)v; }

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline float widened(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// The nearest numbers in bf16, the even one of two, in the upper halves; NaN stays NaN.
inline Bits rounded(Floats v) {
  Bits bits = bits_of(v);
  Bits nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (v == v ? nearest : bits | 0x400000u) & 0xffff0000u;
}

inline Halves narrowed(Floats v) { return __builtin_convertvector(rounded(v) >> 16, Halves); }

inline bf16 narrowed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return bf16((bits | 0x400000u) >> 16);
  return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Lane i is that of v whose number is i ^ other.
inline Floats exchanged(Floats v, int other) {
#if defined(__clang__)
  Floats swapped;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) swapped[i] = v[i ^ other];
  return swapped;
#else
  Ints lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return __builtin_shuffle(v, lane ^ other);
#endif
}

// All lanes made one by ``join``, in halves.
template <class Join>
inline float reduced(Floats v, Join join) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) v = join(v, exchanged(v, half));
  return v[0];
}

// NaN is larger than all.
template <class V>
inline V larger(V a, V b) {
  return ((b > a) | (b != b)) ? b : a;
}

inline float sum(Floats v) {
  return reduced(v, [](Floats a, Floats b) { return a + b; });
}

inline float largest(Floats v) { return reduced(v, larger<Floats>); }

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// Which lanes are in [first, last).
inline Ints between(int64_t first, int64_t last) {
  Ints lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  auto bounded = [](int64_t n) { return int32_t(n < 0 ? 0 : n > kLanes ? kLanes : n); };
  return (lane >= bounded(first)) & (lane < bounded(last));
}

// Which lanes of a mask are not zero; it ends after some bytes.
inline Ints masked(const uint8_t* mask, int64_t left) {
  if (left >= kLanes) return __builtin_convertvector(load<Bytes>(mask), Ints) != 0;
  Ints lanes{};
  for (int64_t i = 0; i < left; i++) lanes[i] = mask[i] ? -1 : 0;
  return lanes;
}

// e^x for x <= 0, as the exponential of fp32 libraries: 2^n times a polynomial (Cody & Waite).
inline Floats exponential(Floats x) {
  const Floats least = splat(-87.0f);
  Ints small = x < least;
  Floats y = small ? least : x;
  Floats n = y * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer is in the last bits
  Bits shift = (bits_of(n) + 127u - 0x4b400000u) << 23;
  n -= 12582912.0f;
  Floats r = y - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  p *= (Floats)shift;
  return small ? Floats{} : p;
}

// tanh(x) = (1 - e^-2|x|) / (1 + e^-2|x|), with the sign of x.
inline Floats tangent(Floats x) {
  Ints negative = x < Floats{};
  Floats e = exponential((negative ? x : -x) * 2.0f);
  Floats t = (1.0f - e) / (1.0f + e);
  return negative ? -t : t;
}

// A pair in each lane: the first of it in the lower half.
inline Bits pairs_of(Floats first, Floats second) {
  return (rounded(first) >> 16) | rounded(second);
}

// sums + (two products of 16-bit numbers): the halves of each lane are neighbours in a sum.
#if defined(__AVX512BF16__)
inline Floats dot(Floats sums, Bits left, Bits right) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
}
#else
inline Floats dot(Floats sums, Bits left, Bits right) {
  Floats low = (Floats)(left << 16) * (Floats)(right << 16) + sums;
  return (Floats)(left & 0xffff0000u) * (Floats)(right & 0xffff0000u) + low;
}
#endif

// A tile of sums[row][column] (+)= left[row][pair] * right[pair][column]; pairs are of 16-bit
// numbers that are neighbours in the sum. Widths and strides in 32-bit units.
template <int Rows, int Vectors>
inline void tile_product(
    const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t right_stride,
    float* sums, int64_t sums_stride, int64_t pairs, bool add) {
  Floats total[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++)
      total[r][v] = add ? load<Floats>(sums + r * sums_stride + v * kLanes) : Floats{};
  for (int64_t k = 0; k < pairs; k++) {
    Bits columns[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++)
      columns[v] = load<Bits>(right + k * right_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      Bits one = splat_bits(left[r * left_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v++) total[r][v] = dot(total[r][v], one, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++)
      store(sums + r * sums_stride + v * kLanes, total[r][v]);
}

template <int Vectors>
inline void strip_product(
    const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t right_stride,
    float* sums, int64_t sums_stride, int64_t rows, int64_t pairs, bool add) {
  for (int64_t m = 0; m < rows; m += kTall)
    tile_product<kTall, Vectors>(left + m * left_stride, left_stride, right, right_stride,
                                 sums + m * sums_stride, sums_stride, pairs, add);
}

// The whole of it: rows are a multiple of kTall, columns of kLanes.
__attribute__((noinline)) inline void product(
    const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t right_stride,
    float* sums, int64_t sums_stride, int64_t rows, int64_t columns, int64_t pairs, bool add) {
  for (int64_t n = 0; n < columns;) {
    int64_t vectors = (columns - n) / kLanes;
    if (vectors > kWide) vectors = kWide;
    auto strip = vectors == kWide ? strip_product<kWide>
                 : vectors == 3   ? strip_product<3>
                 : vectors == 2   ? strip_product<2>
                                  : strip_product<1>;
    strip(left, left_stride, right + n, right_stride, sums + n, sums_stride, rows, pairs, add);
    n += kLanes * vectors;
  }
}

// Memory that begins at a cache line.
template <class T>
struct Memory {
  T* data = nullptr;

  explicit Memory(int64_t count = 0) { allocate(count); }
  Memory(Memory&& other) noexcept : data(other.data) { other.data = nullptr; }
  ~Memory() { std::free(data); }

  void allocate(int64_t count) {
    std::free(data);
    data = nullptr;
    if (!count) return;
    int64_t bytes = rounded_up(count * int64_t(sizeof(T)), 64);
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data) throw std::bad_alloc();
  }

  void zero(int64_t count) { std::memset(data, 0, count * sizeof(T)); }

  T& operator[](int64_t i) const { return data[i]; }
};

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// 0, or 1 where there was not enough memory: exceptions do not cross to Python. No function may
// allocate where several threads run.
template <class F>
int guarded(F run) {
  try {
    run();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // namespace
