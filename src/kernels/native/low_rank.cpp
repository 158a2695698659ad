// Products of wide matrices in bf16, as they are, with low-rank ones in fp32: those of adapters. As
// exact as products of fp32, into which nothing is copied. Sums are made of parts of kDepth terms,
// so their errors grow with the root of that and of the number of parts.

namespace {

constexpr int kTileRows = 12;
constexpr int64_t kDepth = 64;

// A low-rank matrix (length, rank), packed with columns up to whole vectors, in zeros.
struct LowRank {
  int64_t length, rank, padded;
  Memory<float> memory;

  LowRank(const float* from, const int64_t* strides, int64_t length, int64_t rank, int64_t to)
      : length(length), rank(rank), padded(rounded_up(rank, to)), memory(length * padded) {
    for (int64_t k = 0; k < length; k++)
      for (int64_t r = 0; r < padded; r++)
        memory[k * padded + r] = r < rank ? from[k * strides[0] + r * strides[1]] : 0.0f;
  }

  const float* row(int64_t k) const { return memory.data + k * padded; }
};

inline Floats widened(const bf16* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Bits) << 16);
}

// sums (kTileRows, Vectors) += wide (kTileRows, kDepth) · low_rank (depth, Vectors)
template <int Vectors>
inline void tile_of_rows(const float* wide, int64_t depth, const float* low_rank, int64_t padded,
                         float* sums) {
  Floats total[kTileRows][Vectors] = {};
  for (int64_t k = 0; k < depth; k++) {
    Floats columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) columns[v] = load<Floats>(low_rank + k * padded + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; v++) total[r][v] += wide[r * kDepth + k] * columns[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) {
      float* at = sums + r * padded + v * kLanes;
      store(at, load<Floats>(at) + total[r][v]);
    }
}

// Some rows times the low-rank matrix; buffers of (kTileRows, kDepth) and (kTileRows, padded).
void product_of_rows(const bf16* wide, int64_t stride, int64_t rows, const LowRank& low_rank,
                     float scale, float* out, float* copy, float* sums) {
  std::memset(sums, 0, kTileRows * low_rank.padded * sizeof(float));
  for (int64_t start = 0; start < low_rank.length; start += kDepth) {
    int64_t depth = low_rank.length - start < kDepth ? low_rank.length - start : kDepth;
    for (int64_t r = 0; r < rows; r++) {
      const bf16* from = wide + r * stride + start;
      __builtin_prefetch(from + 2 * kDepth);  // processors follow fewer rows than a tile has
      __builtin_prefetch(from + 2 * kDepth + 32);
      int64_t k = 0;
      for (; k + kLanes <= depth; k += kLanes) store(copy + r * kDepth + k, widened(from + k));
      for (; k < depth; k++) copy[r * kDepth + k] = widened(from[k]);
    }
    int64_t c = 0;
    for (; c + 2 * kLanes <= low_rank.padded; c += 2 * kLanes)
      tile_of_rows<2>(copy, depth, low_rank.row(start) + c, low_rank.padded, sums + c);
    if (c < low_rank.padded)
      tile_of_rows<1>(copy, depth, low_rank.row(start) + c, low_rank.padded, sums + c);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < low_rank.rank; c++)
      out[r * low_rank.rank + c] = sums[r * low_rank.padded + c] * scale;
}

constexpr int kTileColumns = 8;         // of the low-rank matrix
constexpr int64_t kStrip = 2 * kLanes;  // features of the wide one

// sums (kTileColumns, kStrip) += low_rankᵀ (kTileColumns, depth) · wide (depth, kStrip)
inline void tile_of_features(const float* wide, int64_t depth, const float* low_rank,
                             int64_t padded, float* sums) {
  Floats total[kTileColumns][2] = {};
  for (int64_t n = 0; n < depth; n++) {
    Floats left = load<Floats>(wide + n * kStrip), right = load<Floats>(wide + n * kStrip + kLanes);
#pragma GCC unroll 16
    for (int c = 0; c < kTileColumns; c++) {
      total[c][0] += low_rank[n * padded + c] * left;
      total[c][1] += low_rank[n * padded + c] * right;
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kTileColumns; c++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      float* at = sums + c * kStrip + v * kLanes;
      store(at, load<Floats>(at) + total[c][v]);
    }
}

// Up to kStrip features of all rows; buffers of (kDepth, kStrip) and (padded, kStrip).
void sums_of_features(const bf16* wide, int64_t stride, int64_t count, const LowRank& low_rank,
                      float* copy, float* sums) {
  std::memset(sums, 0, low_rank.padded * kStrip * sizeof(float));
  for (int64_t start = 0; start < low_rank.length; start += kDepth) {
    int64_t depth = low_rank.length - start < kDepth ? low_rank.length - start : kDepth;
    for (int64_t n = 0; n < depth; n++) {
      const bf16* from = wide + (start + n) * stride;
      __builtin_prefetch(from + kDepth * stride);  // each row is in another page
      if (count == kStrip)
        for (int64_t f = 0; f < kStrip; f += kLanes)
          store(copy + n * kStrip + f, widened(from + f));
      else
        for (int64_t f = 0; f < kStrip; f++)
          copy[n * kStrip + f] = f < count ? widened(from[f]) : 0.0f;
    }
    for (int64_t c = 0; c < low_rank.padded; c += kTileColumns)
      tile_of_features(copy, depth, low_rank.row(start) + c, low_rank.padded, sums + c * kStrip);
  }
}

void over_rows(const bf16* wide, int64_t stride, int64_t rows, int64_t features,
               const float* low_rank, const int64_t* strides, int64_t rank, float scale, float* out,
               int threads) {
  LowRank packed(low_rank, strides, features, rank, kLanes);
  Memory<float> copies(threads * kTileRows * kDepth), sums(threads * kTileRows * packed.padded);
  copies.zero(threads * kTileRows * kDepth);
#pragma omp parallel for num_threads(threads)
  for (int64_t start = 0; start < rows; start += kTileRows) {
    int64_t thread = thread_number(), count = rows - start < kTileRows ? rows - start : kTileRows;
    product_of_rows(wide + start * stride, stride, count, packed, scale, out + start * rank,
                    copies.data + thread * kTileRows * kDepth,
                    sums.data + thread * kTileRows * packed.padded);
  }
}

void over_features(const bf16* wide, int64_t stride, int64_t rows, int64_t features,
                   const float* low_rank, const int64_t* strides, int64_t rank, float scale,
                   float* out, const int64_t* out_strides, int threads) {
  LowRank packed(low_rank, strides, rows, rank, kTileColumns);
  Memory<float> copies(threads * kDepth * kStrip), sums(threads * packed.padded * kStrip);
#pragma omp parallel for num_threads(threads)
  for (int64_t start = 0; start < features; start += kStrip) {
    int64_t thread = thread_number(), count = features - start < kStrip ? features - start : kStrip;
    float* partial = sums.data + thread * packed.padded * kStrip;
    sums_of_features(wide + start, stride, count, packed, copies.data + thread * kDepth * kStrip,
                     partial);
    for (int64_t f = 0; f < count; f++)
      for (int64_t r = 0; r < rank; r++)
        out[(start + f) * out_strides[0] + r * out_strides[1]] = partial[r * kStrip + f] * scale;
  }
}

}  // namespace

// out (rows, rank) = scale · wide (rows, features) · low_rank (features, rank); out is contiguous.
extern "C" int low_rank_over_rows(const bf16* wide, int64_t stride, int64_t rows,
                                  int64_t features, const float* low_rank, const int64_t* strides,
                                  int64_t rank, float scale, float* out, int threads) {
  return guarded([&] {
    over_rows(wide, stride, rows, features, low_rank, strides, rank, scale, out, threads);
  });
}

// out (features, rank) = scale · wideᵀ (features, rows) · low_rank (rows, rank); out has strides.
extern "C" int low_rank_over_features(const bf16* wide, int64_t stride, int64_t rows,
                                      int64_t features, const float* low_rank,
                                      const int64_t* strides, int64_t rank, float scale,
                                      float* out, const int64_t* out_strides, int threads) {
  return guarded([&] {
    over_features(wide, stride, rows, features, low_rank, strides, rank, scale, out, out_strides,
                  threads);
  });
}
