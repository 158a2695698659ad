// The gated delta rule with one decay per head, forward and backward, in fp32: the arithmetic of
// scan/gated_delta_rule.py, where the formulas are. One thread takes a head of keys at a time, with
// the heads of values that read it, and goes through the chunks; what a chunk needs is in its cache.

namespace delta {

constexpr int64_t kChunk = 64;
constexpr int64_t kBlock = 16;  // rows of the triangular system that are solved one by one

// What both directions are given. Strides are of samples, steps, heads and features.
struct Inputs {
  const void *q, *k, *v;
  const int64_t *q_strides, *k_strides, *v_strides;
  const float *g, *beta;    // (batch, length, heads)
  const int32_t* segments;  // (batch, length), or null
  int64_t batch, length, groups, heads, features, values;
  int32_t l2norm;
  float scale, epsilon;
};

inline void read_row(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, count * sizeof(float));
}

inline void read_row(const bf16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) to[i] = widened(from[i]);
}

inline void write_row(float* to, const float* from, int64_t count) {
  std::memcpy(to, from, count * sizeof(float));
}

inline void write_row(bf16* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = narrowed(from[i]);
}

// A matrix, with the strides of its rows and of its columns, of which one is 1.
struct Matrix {
  const float* data;
  int64_t down, along;
};

// What a product is added to: as it is, or with a factor for all, or (step 1) for each row.
constexpr float kOne = 1.0f;
struct Base {
  const float* rows = nullptr;
  const float* factors = &kOne;
  int64_t step = 0;
};

// Which part of a factor is not zero, or of a product is wanted; squares of kChunk may be stacked.
enum class Part { kWhole, kLower, kUpper, kLowerOfProduct };

constexpr int kRows = kLanes == 16 ? 8 : 4;  // of a tile: its sums are in registers
constexpr int64_t kPanel = 2 * kLanes;       // columns of ``right`` that are copied side by side

// Else GCC writes the structures to the stack and waits for them at every tile.
#define INLINE __attribute__((always_inline)) inline

template <int Vectors>
INLINE void tile(Matrix left, const float* panel, float* out, int64_t stride, int64_t first,
                 int64_t last, Base base) {
  Floats total[kRows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++)
      total[r][v] = base.rows ? load<Floats>(base.rows + r * stride + v * kLanes) *
                                    base.factors[r * base.step]
                              : Floats{};
  for (int64_t d = first; d < last; d++) {
    Floats row[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++) row[v] = load<Floats>(panel + d * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; v++)
        total[r][v] += left.data[r * left.down + d * left.along] * row[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++) store(out + r * stride + v * kLanes, total[r][v]);
}

template <int Vectors>
INLINE void strip(Matrix left, const float* panel, float* out, int64_t stride, int64_t rows,
           int64_t depth, Base base, Part part, int64_t column) {
  for (int64_t m = 0; m < rows; m += kRows) {
    int64_t row = m % kChunk, first = part == Part::kUpper ? row : 0;
    int64_t last = part == Part::kLower ? row + kRows : depth;
    if (part == Part::kLowerOfProduct && row + kRows <= column) continue;
    Base own = {base.rows ? base.rows + m * stride : nullptr, base.factors + m * base.step,
                base.step};
    tile<Vectors>({left.data + m * left.down, left.down, left.along}, panel, out + m * stride,
                  stride, first, last, own);
  }
}

inline Floats joined(Floats a, Floats b, Ints lanes) {
#if defined(__clang__)
  Floats result;
  for (int i = 0; i < kLanes; i++)
    result[i] = lanes[i] < kLanes ? a[lanes[i]] : b[lanes[i] - kLanes];
  return result;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

inline Floats vector_of(const float* from) { return load<Floats>(from); }
inline Floats vector_of(const bf16* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Bits) << 16);
}

// A block of kLanes vectors, turned: its halves off the diagonal are exchanged, and so are the
// halves of these.
template <class T>
inline void transpose(const T* from, int64_t from_stride, float* to, int64_t to_stride) {
  Ints lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  Floats block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) block[i] = vector_of(from + i * from_stride);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    Ints upper = (lane & half) != 0;
    Ints first = upper ? lane + int(kLanes) - half : lane;
    Ints second = upper ? lane + int(kLanes) : lane + half;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
      if (!(i & half)) {
        Floats a = block[i], b = block[i + half];
        block[i] = joined(a, b, first);
        block[i + half] = joined(a, b, second);
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) store(to + i * to_stride, block[i]);
}

// Two vectors of each row are copied side by side: as they are, a power of two apart, they would
// drive each other out of the innermost cache.
inline void pack(Matrix from, int64_t depth, int64_t columns, float* panel) {
  for (int64_t v = 0; v < kPanel; v += kLanes)
    for (int64_t d = 0; d < depth; d += from.along == 1 ? 1 : kLanes) {
      const float* at = from.data + d * from.down + v * from.along;
      if (v >= columns)
        break;
      else if (from.along == 1)
        store(panel + d * kPanel + v, load<Floats>(at));
      else
        transpose(at, from.along, panel + d * kPanel + v, kPanel);
    }
}

constexpr int64_t kDepthAtOnce = 128;

// out (rows, columns) = base + left (rows, depth) · right (depth, columns). Rows are a multiple of
// kRows, columns of kLanes, and so is depth where right is a transpose; all lie densely in memory.
__attribute__((noinline)) void multiply(Matrix left, Matrix right, float* out, int64_t rows,
                                        int64_t columns, int64_t depth, Base base = {},
                                        Part part = Part::kWhole) {
  alignas(64) float panel[kDepthAtOnce * kPanel];
  for (int64_t n = 0; n < columns; n += kPanel)
    for (int64_t d = 0; d < depth; d += kDepthAtOnce) {
      int64_t count = depth - d < kDepthAtOnce ? depth - d : kDepthAtOnce;
      pack({right.data + d * right.down + n * right.along, right.down, right.along}, count,
           columns - n, panel);
      Base own = d ? Base{out + n} : base;
      if (!d && base.rows) own.rows += n;
      Matrix cut = {left.data + d * left.along, left.down, left.along};
      if (n + kLanes < columns)
        strip<2>(cut, panel, out + n, columns, rows, count, own, part, n);
      else
        strip<1>(cut, panel, out + n, columns, rows, count, own, part, n);
    }
}

inline float dot(const float* a, const float* b, int64_t count) {
  Floats totals[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++)
      totals[n] += load<Floats>(a + i + n * kLanes) * load<Floats>(b + i + n * kLanes);
  for (; i < count; i += kLanes) totals[0] += load<Floats>(a + i) * load<Floats>(b + i);
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// Those of kLanes steps from j on that are before the one of number count.
inline Ints first_of(int64_t count, int64_t j) { return between(-j, count - j); }

inline void scaled(float* to, const float* from, float by, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load<Floats>(from + i) * by);
}

// kBlock rows of a triangular system, from the first or (Up) from the last; ``system`` is what is
// off the diagonal, negated.
template <bool Up>
inline void substitute(const float* system, float* rows) {
  Floats row[kBlock];
#pragma GCC unroll 16
  for (int i = 0; i < kBlock; i++) row[i] = load<Floats>(rows + i * kPanel);
#pragma GCC unroll 16
  for (int n = 1; n < kBlock; n++)
#pragma GCC unroll 16
    for (int m = 0; m < n; m++) {
      int i = Up ? kBlock - 1 - n : n, j = Up ? kBlock - 1 - m : m;
      row[i] += row[j] * (Up ? system[j * kChunk + i] : system[i * kChunk + j]);
    }
#pragma GCC unroll 16
  for (int i = 0; i < kBlock; i++) store(rows + i * kPanel, row[i]);
}

// rows (kChunk, columns) = (1 - system)^-1 rows, or (Up) that of its transpose.
template <bool Up>
void solve(const float* system, float* rows, int64_t columns) {
  alignas(64) float panel[kChunk * kPanel] = {};
  for (int64_t n = 0; n < columns; n += kPanel) {
    pack({rows + n, columns, 1}, kChunk, columns - n, panel);
    for (int64_t step = 0; step < kChunk; step += kBlock) {
      int64_t at = Up ? kChunk - kBlock - step : step;
      float* own = panel + at * kPanel;
      Matrix left = Up ? Matrix{system + at, 1, kChunk} : Matrix{system + at * kChunk, kChunk, 1};
      for (int64_t r = 0; step && r < kBlock; r += kRows)
        tile<2>({left.data + r * left.down, left.down, left.along}, panel, own + r * kPanel, kPanel,
                Up ? at + kBlock : 0, Up ? kChunk : at, {own + r * kPanel});
      for (int64_t v = 0; v < kPanel; v += kLanes)
        substitute<Up>(system + at * kChunk + at, own + v);
    }
    for (int64_t t = 0; t < kChunk; t++)
      for (int64_t v = 0; v < kPanel && n + v < columns; v += kLanes)
        store(rows + t * columns + n + v, load<Floats>(panel + t * kPanel + v));
  }
}

// One chunk of a head, and buffers for it. K and V are rounded up to whole vectors, with zeros. Of
// squares what is above the vectors of the diagonal is never read.
struct Chunk {
  int64_t K, V;
  Memory<float> x, products, error, found, decay, p, negative, z, norms, g, beta, read, write;
  float through;

  Chunk(int64_t features, int64_t values)
      : K(rounded_up(features, kLanes)), V(rounded_up(values, kLanes)), x(2 * kChunk * K),
        products(2 * kChunk * kChunk), error(kChunk * V), found(2 * kChunk * V),
        decay(kChunk * kChunk), p(2 * kChunk * kChunk), negative(kChunk * kChunk), z(kChunk * V),
        norms(2 * kChunk), g(kChunk), beta(kChunk), read(kChunk), write(kChunk) {}

  float* keys() const { return x.data + kChunk * K; }

  template <class T>
  void load_rows(const void* base, const int64_t* strides, int64_t b, int64_t first, int64_t steps,
                 int64_t head, int64_t count, int64_t width, float* to) const {
    if (steps < kChunk || count < width) std::memset(to, 0, kChunk * width * sizeof(float));
    const T* from = static_cast<const T*>(base) + b * strides[0] + head * strides[2];
    from += first * strides[1];
    if (strides[3] == 1) {
      for (int64_t t = 0; t < steps; t++) read_row(from + t * strides[1], count, to + t * width);
      return;
    }
    // steps are neighbours: as a convolution over time leaves them
    int64_t whole_steps = strides[1] == 1 ? steps / kLanes * kLanes : 0;
    int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int64_t t = 0; t < whole_steps; t += kLanes)
        transpose(from + t + i * strides[3], strides[3], to + t * width + i, width);
    for (int64_t i = 0; i < count; i++)
      for (int64_t t = i < whole ? whole_steps : 0; t < steps; t++)
        read_row(from + t * strides[1] + i * strides[3], 1, to + t * width + i);
  }

  // Reads queries and keys, which several heads of values share.
  template <class T>
  void load_keys(const Inputs& in, int64_t b, int64_t group, int64_t first, int64_t steps) {
    load_rows<T>(in.q, in.q_strides, b, first, steps, group, in.features, K, x.data);
    load_rows<T>(in.k, in.k_strides, b, first, steps, group, in.features, K, keys());
    for (int64_t i = 0; i < 2 * kChunk; i++) {
      float* row = x.data + i * K;
      norms[i] = in.l2norm ? 1.0f / std::sqrt(dot(row, row, K) + in.epsilon) : 1.0f;
      scaled(row, row, norms[i] * (i < kChunk ? in.scale : 1.0f), K);
    }
    multiply({x.data, K, 1}, {keys(), 1, K}, products.data, 2 * kChunk, kChunk, K, {},
             Part::kLowerOfProduct);
  }

  // Reads a head, and computes what it writes (z) from the state (K, V) before the chunk; what
  // queries find in that (found) only where it is wanted.
  template <class T>
  void run(const Inputs& in, int64_t b, int64_t head, int64_t first, int64_t steps,
           const float* state, bool with_queries) {
    load_rows<T>(in.v, in.v_strides, b, first, steps, head, in.values, V, error.data);
    float total = 0.0f;
    alignas(64) int32_t begins[kChunk];
    for (int64_t t = 0; t < kChunk; t++) {
      int64_t at = (b * in.length + first + t) * in.heads + head;
      total += t < steps ? in.g[at] : 0.0f;
      g[t] = total;
      beta[t] = t < steps ? in.beta[at] : 0.0f;
      int64_t step = t < steps ? t : steps - 1;
      int64_t begin = in.segments ? in.segments[b * in.length + first + step] - first : -1;
      begins[t] = int32_t(begin < 0 ? -1 : begin);
    }
    for (int64_t j = 0; j < kChunk; j += kLanes) {
      Floats now = load<Floats>(&g[j]);
      store(&read[j], load<Ints>(begins + j) < 0 ? exponential(now) : Floats{});
      Ints lasts = between(begins[kChunk - 1] - j, kLanes);
      store(&write[j], lasts ? exponential(g[kChunk - 1] - now) : Floats{});
    }
    through = read[kChunk - 1];
    for (int64_t i = 0; i < kChunk; i++)
      for (int64_t j = 0; j <= i; j += kLanes) {
        int64_t at = i * kChunk + j, below = at + kChunk * kChunk;
        Ints seen = between(begins[i] - j, i + 1 - j);
        Floats e = seen ? exponential(g[i] - load<Floats>(&g[j])) : Floats{};
        Floats m = seen ? load<Floats>(&products[below]) * e : Floats{};
        store(&decay[at], e);
        store(&p[at], seen ? load<Floats>(&products[at]) * e : Floats{});
        store(&p[below], m);
        store(&negative[at], first_of(i, j) ? m * -beta[i] : Floats{});
      }
    int64_t skipped = with_queries ? 0 : kChunk, width = V;
    multiply({x.data + skipped * K, K, 1}, {state, V, 1}, &found[skipped * V], 2 * kChunk - skipped,
             V, K);
    for (int64_t t = 0; t < kChunk; t++) {
      const float* known = &found[(kChunk + t) * width];
      float *to = &error[t * width], *rate_of = &z[t * width], left = read[t], rate = beta[t];
      for (int64_t i = 0; i < width; i += kLanes) {
        Floats e = load<Floats>(to + i) - load<Floats>(known + i) * left;
        store(to + i, e);
        store(rate_of + i, e * rate);
      }
    }
    solve<false>(negative.data, z.data, V);
  }

  // What is written is worth that at the end of the chunk.
  void scale_written() const {
    for (int64_t t = 0; t < kChunk; t++) scaled(&z[t * V], &z[t * V], write[t], V);
  }
};

inline int64_t steps_of(const Inputs& in, int64_t chunk) {
  int64_t left = in.length - chunk * kChunk;
  return left < kChunk ? left : kChunk;
}

// States are kept as (features, values). Where these are whole vectors, they are computed in their
// place; else in ``padded`` (K, V).
inline bool in_place(const Inputs& in, const Chunk& c) {
  return in.features == c.K && in.values == c.V;
}

inline const float* state_of(const float* from, const Inputs& in, const Chunk& c, float* padded) {
  if (in_place(in, c)) return from;
  std::memset(padded, 0, c.K * c.V * sizeof(float));
  for (int64_t i = 0; i < in.features; i++)
    write_row(padded + i * c.V, from + i * in.values, in.values);
  return padded;
}

inline void keep_state(float* to, const Inputs& in, const Chunk& c, const float* state) {
  if (state == to) return;
  for (int64_t i = 0; i < in.features; i++)
    write_row(to + i * in.values, state + i * c.V, in.values);
}

template <class T>
void forward_of(const Inputs& in, int64_t b, int64_t group, Chunk& c, float* padded, float* states,
                T* out, float* final) {
  int64_t each = in.heads / in.groups, size = in.features * in.values;
  int64_t chunks = (in.length + kChunk - 1) / kChunk;
  for (int64_t n = 0; n < chunks; n++) {
    int64_t first = n * kChunk, steps = steps_of(in, n);
    c.load_keys<T>(in, b, group, first, steps);
    for (int64_t e = 0; e < each; e++) {
      int64_t head = group * each + e, lane = b * in.heads + head;
      float* from = states + (n * in.batch * in.heads + lane) * size;
      float* to = n + 1 == chunks ? final + lane * size : from + in.batch * in.heads * size;
      const float* state = state_of(from, in, c, padded);
      c.run<T>(in, b, head, first, steps, state, true);
      multiply({c.p.data, kChunk, 1}, {c.z.data, c.V, 1}, c.found.data, kChunk, c.V, kChunk,
               {c.found.data, c.read.data, 1}, Part::kLower);
      for (int64_t t = 0; t < steps; t++)
        write_row(out + ((b * in.length + first + t) * in.heads + head) * in.values,
                  &c.found[t * c.V], in.values);
      c.scale_written();
      float* next = in_place(in, c) ? to : padded;
      multiply({c.keys(), 1, c.K}, {c.z.data, c.V, 1}, next, c.K, c.V, kChunk, {state, &c.through});
      keep_state(to, in, c, next);
    }
  }
}

// What the backward pass needs besides.
struct Buffers {
  Memory<float> state, after, outer, scores, score_sums, dx, sums;

  explicit Buffers(const Chunk& c)
      : state(c.K * c.V), after(c.K * c.V), outer(2 * kChunk * c.V), scores(2 * kChunk * kChunk),
        score_sums(2 * kChunk * kChunk), dx(2 * kChunk * c.K), sums(2 * kChunk * c.K) {}
};

template <class T>
struct Gradients {
  T *q, *k, *v;         // like the inputs, contiguous
  float *g, *beta;      // (batch, length, heads)
  float* state;         // (batch, heads, features, values): after all; then before all
  const void* out;      // that of the outputs, or null
  const int64_t* out_strides;
};

// Adds to ``sums`` the gradients of queries and keys as they are in ``x``; ``after`` is the
// gradient of the state after the chunk, ``before`` is where that of the state before it goes.
template <class T>
void backward_of_head(const Inputs& in, const Gradients<T>& to, int64_t b, int64_t head,
                      int64_t first, int64_t steps, Chunk& c, Buffers& w, const float* state,
                      const float* after, float* before) {
  const int64_t K = c.K, V = c.V;
  c.run<T>(in, b, head, first, steps, state, false);
  float *grad = w.outer.data, *dy = grad + kChunk * V;
  if (to.out)
    c.load_rows<T>(to.out, to.out_strides, b, first, steps, head, in.values, V, grad);
  else
    std::memset(grad, 0, kChunk * V * sizeof(float));
  alignas(64) float dg[kChunk] = {}, dbeta[kChunk], written[kChunk];
  // of z, by the state after and by the outputs
  multiply({c.keys(), K, 1}, {after, V, 1}, dy, kChunk, V, K);
  for (int64_t t = 0; t < kChunk; t++) written[t] = c.write[t] * dot(dy + t * V, &c.z[t * V], V);
  multiply({c.p.data, 1, kChunk}, {grad, V, 1}, dy, kChunk, V, kChunk, {dy, c.write.data, 1},
           Part::kUpper);
  solve<true>(c.negative.data, dy, V);
  multiply({grad, V, 1}, {c.z.data, 1, V}, w.scores.data, 2 * kChunk, kChunk, V, {},
           Part::kLowerOfProduct);
  for (int64_t i = 0; i < kChunk; i++) {
    Floats of_beta{}, row{};
    float rate = c.beta[i];
    for (int64_t j = 0; j <= i; j += kLanes) {
      int64_t at = i * kChunk + j, below = at + kChunk * kChunk;
      Floats a = load<Floats>(&w.scores[at]), b = -load<Floats>(&w.scores[below]);
      Floats m = load<Floats>(&c.p[below]), d = load<Floats>(&c.decay[at]);
      a = first_of(i + 1, j) ? a : Floats{};
      b = first_of(i, j) ? b : Floats{};
      of_beta += b * m;
      b *= rate;
      Floats off = first_of(i, j) ? a : Floats{};  // the diagonal does not decay
      Floats moved = off * load<Floats>(&c.p[at]) + b * m;
      row += moved;
      store(dg + j, load<Floats>(dg + j) - moved);
      store(&w.score_sums[at], load<Floats>(&w.score_sums[at]) + a * d);
      store(&w.score_sums[below], load<Floats>(&w.score_sums[below]) + b * d);
    }
    dbeta[i] = dot(dy + i * V, &c.error[i * V], V) + sum(of_beta);
    dg[i] += sum(row);
  }
  // dy becomes the gradient of the values; then both are what the state before is read with
  for (int64_t t = 0; t < kChunk; t++) {
    scaled(dy + t * V, dy + t * V, c.beta[t], V);
    if (t < steps)
      write_row(to.v + ((b * in.length + first + t) * in.heads + head) * in.values, dy + t * V,
                in.values);
    scaled(dy + t * V, dy + t * V, -c.read[t], V);
    scaled(grad + t * V, grad + t * V, c.read[t], V);
  }
  multiply({grad, V, 1}, {state, 1, V}, w.dx.data, 2 * kChunk, K, V);
  for (int64_t i = 0; i < 2 * kChunk; i++) {
    const float *x = &c.x[i * K], *dx = &w.dx[i * K];
    float* sums = &w.sums[i * K];
    dg[i % kChunk] += dot(x, dx, K);
    for (int64_t j = 0; j < K; j += kLanes)
      store(sums + j, load<Floats>(sums + j) + load<Floats>(dx + j));
  }
  c.scale_written();
  float* of_keys = &w.sums[kChunk * K];
  multiply({c.z.data, V, 1}, {after, 1, V}, of_keys, kChunk, K, V, {of_keys});
  float earlier = c.through * dot(after, state, K * V);  // of what is written earlier
  multiply({c.x.data, 1, K}, {grad, V, 1}, before, K, V, 2 * kChunk, {after, &c.through});
  // a step's decay counts in all sums of its segment from there on, and for all that was written
  // before it and lasts to the end
  float later = 0.0f;
  for (int64_t t = steps - 1; t >= 0; t--) {
    dg[t] = later += dg[t];
    if (in.segments && in.segments[b * in.length + first + t] == first + t) later = 0.0f;
  }
  for (int64_t t = 0; t < steps; t++) {
    int64_t at = (b * in.length + first + t) * in.heads + head;
    to.g[at] = dg[t] + earlier;
    to.beta[at] = dbeta[t];
    earlier += written[t];
  }
}

template <class T>
void backward_of(const Inputs& in, const Gradients<T>& to, int64_t b, int64_t group, Chunk& c,
                 Buffers& w, const float* states) {
  int64_t each = in.heads / in.groups, size = in.features * in.values, K = c.K;
  for (int64_t n = (in.length + kChunk - 1) / kChunk - 1; n >= 0; n--) {
    int64_t first = n * kChunk, steps = steps_of(in, n);
    c.load_keys<T>(in, b, group, first, steps);
    w.sums.zero(2 * kChunk * K);
    w.score_sums.zero(2 * kChunk * kChunk);
    for (int64_t e = 0; e < each; e++) {
      int64_t head = group * each + e, lane = b * in.heads + head;
      float* own = to.state + lane * size;
      const float* state = states + (n * in.batch * in.heads + lane) * size;
      const float* after = state_of(own, in, c, w.after.data);
      float* before = in_place(in, c) ? own : w.after.data;
      backward_of_head(in, to, b, head, first, steps, c, w, state_of(state, in, c, w.state.data),
                       after, before);
      keep_state(own, in, c, before);
    }
    float *sums = w.sums.data, *of_keys = sums + kChunk * K;
    const float *of_q = w.score_sums.data, *of_k = of_q + kChunk * kChunk;
    multiply({of_q, kChunk, 1}, {c.keys(), K, 1}, sums, 2 * kChunk, K, kChunk, {sums},
             Part::kLower);
    multiply({of_q, 1, kChunk}, {c.x.data, K, 1}, of_keys, kChunk, K, kChunk, {of_keys},
             Part::kUpper);
    multiply({of_k, 1, kChunk}, {c.keys(), K, 1}, of_keys, kChunk, K, kChunk, {of_keys},
             Part::kUpper);
    for (int64_t i = 0; i < 2 * kChunk; i++) {
      int64_t t = i % kChunk;
      if (t >= steps) continue;
      float *row = &w.sums[i * K], *x = &c.x[i * K], scale = i < kChunk ? in.scale : 1.0f;
      float along = in.l2norm ? dot(row, x, K) / (scale * scale) : 0.0f;
      for (int64_t j = 0; j < K; j += kLanes)
        store(row + j,
              (load<Floats>(row + j) - load<Floats>(x + j) * along) * (c.norms[i] * scale));
      T* base = i < kChunk ? to.q : to.k;
      write_row(base + ((b * in.length + first + t) * in.groups + group) * in.features, row,
                in.features);
    }
  }
}

template <class T>
int forward(const Inputs& in, float* states, void* out, float* final, int threads) {
  return guarded([&] {
    std::vector<Chunk> chunks;
    std::vector<Memory<float>> held;
    for (int i = 0; i < threads; i++) {
      chunks.emplace_back(in.features, in.values);
      held.emplace_back(chunks[i].K * chunks[i].V);
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t lane = 0; lane < in.batch * in.groups; lane++) {
      int thread = thread_number();
      forward_of<T>(in, lane / in.groups, lane % in.groups, chunks[thread], held[thread].data,
                    states, static_cast<T*>(out), final);
    }
  });
}

template <class T>
int backward(const Inputs& in, const float* states, const Gradients<T>& to, int threads) {
  return guarded([&] {
    std::vector<Chunk> chunks;
    std::vector<Buffers> buffers;
    for (int i = 0; i < threads; i++) {
      chunks.emplace_back(in.features, in.values);
      buffers.emplace_back(chunks[i]);
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t lane = 0; lane < in.batch * in.groups; lane++)
      backward_of<T>(in, to, lane / in.groups, lane % in.groups, chunks[thread_number()],
                     buffers[thread_number()], states);
  });
}

}  // namespace delta

// ``states`` (chunks, batch, heads, features, values): the first is given, the others are written.
extern "C" int delta_rule_forward(const delta::Inputs* in, float* states, void* out, float* final,
                                  int is_bf16, int threads) {
  return is_bf16 ? delta::forward<bf16>(*in, states, out, final, threads)
                 : delta::forward<float>(*in, states, out, final, threads);
}

extern "C" int delta_rule_backward(const delta::Inputs* in, const float* states,
                                   const delta::Gradients<void>* to, int is_bf16, int threads) {
  return is_bf16 ? delta::backward(*in, states, *(const delta::Gradients<bf16>*)to, threads)
                 : delta::backward(*in, states, *(const delta::Gradients<float>*)to, threads);
}
