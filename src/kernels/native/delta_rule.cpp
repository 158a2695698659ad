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

inline void read_row(const float* from, int64_t stride, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) to[i] = from[i * stride];
}

inline void read_row(const bf16* from, int64_t stride, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) to[i] = widened(from[i * stride]);
}

inline void write_row(float* to, const float* from, int64_t count) {
  std::memcpy(to, from, count * sizeof(float));
}

inline void write_row(bf16* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = narrowed(from[i]);
}

// out (rows, columns) (+)= left (rows, depth) · right (depth, columns); rows are a multiple of 4,
// columns of kLanes. ``down`` and ``along`` are the strides of left, which may be a transpose.
template <int Rows, int Vectors>
inline void tile(const float* left, int64_t down, int64_t along, const float* right,
                 int64_t right_stride, float* out, int64_t out_stride, int64_t depth, bool add) {
  Floats total[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++)
      total[r][v] = add ? load<Floats>(out + r * out_stride + v * kLanes) : Floats{};
  for (int64_t d = 0; d < depth; d++) {
    Floats row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) row[v] = load<Floats>(right + d * right_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; v++) total[r][v] += left[r * down + d * along] * row[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) store(out + r * out_stride + v * kLanes, total[r][v]);
}

template <int Vectors>
inline void strip(const float* left, int64_t down, int64_t along, const float* right,
                  int64_t right_stride, float* out, int64_t out_stride, int64_t rows,
                  int64_t depth, bool add) {
  int64_t m = 0;
  for (; m + 8 <= rows && Vectors < 3; m += 8)
    tile<8, Vectors>(left + m * down, down, along, right, right_stride, out + m * out_stride,
                     out_stride, depth, add);
  for (; m < rows; m += 4)
    tile<4, Vectors>(left + m * down, down, along, right, right_stride, out + m * out_stride,
                     out_stride, depth, add);
}

constexpr int64_t kDepthAtOnce = 128;

// Two vectors of each row of ``right`` are copied side by side: as they are, a power of two apart,
// they would drive each other out of the innermost cache.
__attribute__((noinline)) void multiply(
    const float* left, int64_t down, int64_t along, const float* right, int64_t right_stride,
    float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth, bool add) {
  alignas(64) float panel[kDepthAtOnce * 2 * kLanes];
  for (int64_t n = 0; n < columns; n += 2 * kLanes)
    for (int64_t d = 0; d < depth; d += kDepthAtOnce) {
      int64_t count = depth - d < kDepthAtOnce ? depth - d : kDepthAtOnce;
      const float *from = right + d * right_stride + n, *part = left + d * along;
      bool adds = add || d, two = n + kLanes < columns;
      for (int64_t i = 0; i < count; i++) {
        store(panel + 2 * i * kLanes, load<Floats>(from + i * right_stride));
        if (two) store(panel + (2 * i + 1) * kLanes, load<Floats>(from + i * right_stride + kLanes));
      }
      auto run = two ? strip<2> : strip<1>;
      run(part, down, along, panel, 2 * kLanes, out + n, out_stride, rows, count, adds);
    }
}

inline Floats joined(Floats a, Floats b, Ints lanes) {
#if defined(__clang__)
  Floats result;
  for (int i = 0; i < kLanes; i++) result[i] = lanes[i] < kLanes ? a[lanes[i]] : b[lanes[i] - kLanes];
  return result;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Both numbers are multiples of kLanes. Of a block the halves off the diagonal are exchanged, and
// so are the halves of these.
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  Ints lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) block[i] = load<Floats>(from + (r + i) * columns + c);
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
      for (int i = 0; i < kLanes; i++) store(to + (c + i) * rows + r, block[i]);
    }
}

inline float dot(const float* a, const float* b, int64_t count) {
  Floats total{};
  for (int64_t i = 0; i < count; i += kLanes) total += load<Floats>(a + i) * load<Floats>(b + i);
  return sum(total);
}

// 64 steps of a row of a triangle: the first count of them.
inline Ints first_of(int64_t count, int64_t j) { return between(-j, count - j); }

inline void scaled(float* to, const float* from, float by, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load<Floats>(from + i) * by);
}

// One chunk of a head, and buffers for it. K and V are rounded up to whole vectors, with zeros.
struct Chunk {
  int64_t K, V;
  Memory<float> x, keys_t, products, v, error, found, decay, p, negative, z, norms, g, beta, read,
      write;
  float through;

  Chunk(int64_t features, int64_t values)
      : K(rounded_up(features, kLanes)), V(rounded_up(values, kLanes)),
        x(2 * kChunk * K), keys_t(K * kChunk), products(2 * kChunk * kChunk), v(kChunk * V), error(kChunk * V),
        found(2 * kChunk * V), decay(kChunk * kChunk), p(2 * kChunk * kChunk), negative(kChunk * kChunk),
        z(kChunk * V), norms(2 * kChunk), g(kChunk), beta(kChunk), read(kChunk), write(kChunk) {}

  float* keys() const { return x.data + kChunk * K; }

  template <class T>
  void load_rows(const void* base, const int64_t* strides, int64_t b, int64_t first, int64_t steps,
                 int64_t head, int64_t count, int64_t width, float* to) const {
    std::memset(to, 0, kChunk * width * sizeof(float));
    const T* from = static_cast<const T*>(base) + b * strides[0] + head * strides[2];
    if (strides[3] == 1)
      for (int64_t t = 0; t < steps; t++)
        read_row(from + (first + t) * strides[1], 1, count, to + t * width);
    else  // steps are neighbours: as a convolution over time leaves them
      for (int64_t i = 0; i < count; i++) {
        float column[kChunk];
        read_row(from + first * strides[1] + i * strides[3], strides[1], steps, column);
        for (int64_t t = 0; t < steps; t++) to[t * width + i] = column[t];
      }
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
    transpose(keys(), kChunk, K, keys_t.data);
    multiply(x.data, K, 1, keys_t.data, kChunk, products.data, kChunk, 2 * kChunk, kChunk, K,
             false);
  }

  // Reads a head, and computes what it writes (z) from the state (K, V) before the chunk; what
  // queries find in that (found) only where it is wanted.
  template <class T>
  void run(const Inputs& in, int64_t b, int64_t head, int64_t first, int64_t steps,
           const float* state, bool with_queries) {
    load_rows<T>(in.v, in.v_strides, b, first, steps, head, in.values, V, v.data);
    float total = 0.0f;
    int64_t begins[kChunk];
    for (int64_t t = 0; t < kChunk; t++) {
      int64_t at = (b * in.length + first + t) * in.heads + head;
      total += t < steps ? in.g[at] : 0.0f;
      g[t] = total;
      beta[t] = t < steps ? in.beta[at] : 0.0f;
      int64_t step = t < steps ? t : steps - 1;
      begins[t] = in.segments ? in.segments[b * in.length + first + step] - first : -1;
    }
    for (int64_t i = 0; i < kChunk; i++) {
      const float *one = products.data + i * kChunk, *two = one + kChunk * kChunk;
      float *to = decay.data + i * kChunk, *to_one = p.data + i * kChunk;
      float now = g[i];
      for (int64_t j = 0; j < kChunk; j += kLanes) {
        Floats e = exponential(now - load<Floats>(g.data + j));
        e = between(begins[i] - j, i + 1 - j) ? e : Floats{};
        store(to + j, e);
        store(to_one + j, load<Floats>(one + j) * e);
        store(to_one + kChunk * kChunk + j, load<Floats>(two + j) * e);
      }
      read[i] = begins[i] < 0 ? decay_of(g[i]) : 0.0f;
      write[i] = i >= begins[kChunk - 1] ? decay_of(g[kChunk - 1] - g[i]) : 0.0f;
    }
    through = read[kChunk - 1];
    int64_t skipped = with_queries ? 0 : kChunk;
    multiply(x.data + skipped * K, K, 1, state, V, found.data + skipped * V, V, 2 * kChunk - skipped,
             V, K, false);
    for (int64_t t = 0; t < kChunk; t++) {
      const float *value = v.data + t * V, *known = found.data + (kChunk + t) * V;
      float *to = error.data + t * V, *rate_of = z.data + t * V, left = read[t], rate = beta[t];
      for (int64_t i = 0; i < V; i += kLanes) {
        Floats e = load<Floats>(value + i) - load<Floats>(known + i) * left;
        store(to + i, e);
        store(rate_of + i, e * rate);
      }
    }
    negate_system(negative.data);
    solve(z.data);
  }

  static float decay_of(float x) { return exponential(splat(x))[0]; }

  // The strictly lower triangle of -beta M.
  void negate_system(float* to) const {
    for (int64_t i = 0; i < kChunk; i++) {
      const float* m = p.data + (kChunk + i) * kChunk;
      float rate = -beta[i];
      for (int64_t j = 0; j < kChunk; j += kLanes) {
        Floats value = load<Floats>(m + j) * rate;
        store(to + i * kChunk + j, first_of(i, j) ? value : Floats{});
      }
    }
  }

  // rows = (1 + beta M)^-1 rows, in place; ``negative`` is -beta M.
  void solve(float* rows) const {
    for (int64_t first = 0; first < kChunk; first += kBlock) {
      float* own = rows + first * V;
      const float* left = negative.data + first * kChunk;
      if (first) multiply(left, kChunk, 1, rows, V, own, V, kBlock, V, first, true);
      for (int64_t i = 1; i < kBlock; i++)
        for (int64_t j = 0; j < i; j++) add(own + i * V, own + j * V, left[i * kChunk + first + j]);
    }
  }

  // The same with the transpose of the system.
  void solve_transposed(float* rows) const {
    for (int64_t first = kChunk - kBlock; first >= 0; first -= kBlock) {
      float* own = rows + first * V;
      const float* left = negative.data + first;
      int64_t after = first + kBlock;
      if (after < kChunk)
        multiply(left + after * kChunk, 1, kChunk, rows + after * V, V, own, V, kBlock, V,
                 kChunk - after, true);
      for (int64_t i = kBlock - 2; i >= 0; i--)
        for (int64_t j = i + 1; j < kBlock; j++)
          add(own + i * V, own + j * V, left[(first + j) * kChunk + i]);
    }
  }

  void add(float* to, const float* from, float by) const {
    for (int64_t i = 0; i < V; i += kLanes)
      store(to + i, load<Floats>(to + i) + load<Floats>(from + i) * by);
  }
};

inline int64_t steps_of(const Inputs& in, int64_t chunk) {
  int64_t left = in.length - chunk * kChunk;
  return left < kChunk ? left : kChunk;
}

// A state as it is kept, (features, values), in (K, V).
inline void load_state(const float* from, const Inputs& in, const Chunk& c, float* to) {
  std::memset(to, 0, c.K * c.V * sizeof(float));
  for (int64_t i = 0; i < in.features; i++) write_row(to + i * c.V, from + i * in.values, in.values);
}

inline void store_state(float* to, const Inputs& in, const Chunk& c, const float* from) {
  for (int64_t i = 0; i < in.features; i++) write_row(to + i * in.values, from + i * c.V, in.values);
}

template <class T>
void forward_of(const Inputs& in, int64_t b, int64_t group, Chunk& c, float* all_states,
                float* states, T* out, float* final) {
  int64_t each = in.heads / in.groups, size = in.features * in.values, S = c.K * c.V;
  int64_t chunks = (in.length + kChunk - 1) / kChunk;
  for (int64_t n = 0; n < chunks; n++) {
    int64_t first = n * kChunk, steps = steps_of(in, n);
    c.load_keys<T>(in, b, group, first, steps);
    for (int64_t e = 0; e < each; e++) {
      int64_t head = group * each + e, lane = b * in.heads + head;
      float* state = all_states + e * S;
      if (!n) load_state(states + lane * size, in, c, state);
      c.run<T>(in, b, head, first, steps, state, true);
      for (int64_t t = 0; t < kChunk; t++) scaled(&c.found[t * c.V], &c.found[t * c.V], c.read[t], c.V);
      multiply(c.p.data, kChunk, 1, c.z.data, c.V, c.found.data, c.V, kChunk, c.V, kChunk, true);
      for (int64_t t = 0; t < steps; t++)
        write_row(out + ((b * in.length + first + t) * in.heads + head) * in.values,
                  &c.found[t * c.V], in.values);
      for (int64_t t = 0; t < kChunk; t++) scaled(&c.z[t * c.V], &c.z[t * c.V], c.write[t], c.V);
      scaled(state, state, c.through, S);
      multiply(c.keys_t.data, kChunk, 1, c.z.data, c.V, state, c.V, c.K, c.V, kChunk, true);
      bool last = n + 1 == chunks;
      float* to = last ? final : states + (n + 1) * in.batch * in.heads * size;
      store_state(to + lane * size, in, c, state);
    }
  }
}

// What the backward pass needs besides.
struct Buffers {
  Memory<float> state, after, turned, outer, scores, score_sums, dx, z_t, changes, sums;

  Buffers(const Chunk& c, int64_t each)
      : state(c.K * c.V), after(each * c.K * c.V), turned(c.K * c.V), outer(2 * kChunk * c.V),
        scores(2 * kChunk * kChunk), score_sums(2 * kChunk * kChunk), dx(2 * kChunk * c.K), z_t(c.V * kChunk), changes(kChunk * c.V), sums(2 * kChunk * c.K) {}
};

template <class T>
struct Gradients {
  T *q, *k, *v;         // like the inputs, contiguous
  float *g, *beta;      // (batch, length, heads)
  float* state;         // (batch, heads, features, values): after all; then before all
  const void* out;      // that of the outputs, or null
  const int64_t* out_strides;
};

// Adds to ``sums`` the gradients of queries and keys as they are in ``x``.
template <class T>
void backward_of_head(const Inputs& in, const Gradients<T>& to, int64_t b, int64_t head,
                      int64_t first, int64_t steps, Chunk& c, Buffers& w, float* after) {
  const int64_t K = c.K, V = c.V;
  c.run<T>(in, b, head, first, steps, w.state.data, false);
  float *grad = w.outer.data, *dy = grad + kChunk * V;
  if (to.out)
    c.load_rows<T>(to.out, to.out_strides, b, first, steps, head, in.values, V, grad);
  else
    std::memset(grad, 0, kChunk * V * sizeof(float));
  alignas(64) float dg[kChunk], dbeta[kChunk], written[kChunk];
  // of z, by the state after and by the outputs
  multiply(c.keys(), K, 1, after, V, w.changes.data, V, kChunk, V, K, false);
  for (int64_t t = 0; t < kChunk; t++) {
    scaled(dy + t * V, &w.changes[t * V], c.write[t], V);
    written[t] = dot(dy + t * V, &c.z[t * V], V);
    dg[t] = 0.0f;
  }
  multiply(c.p.data, 1, kChunk, grad, V, dy, V, kChunk, V, kChunk, true);
  c.solve_transposed(dy);
  transpose(c.z.data, kChunk, V, w.z_t.data);
  multiply(grad, V, 1, w.z_t.data, kChunk, w.scores.data, kChunk, 2 * kChunk, kChunk, V, false);
  for (int64_t i = 0; i < kChunk; i++) {
    dbeta[i] = dot(dy + i * V, &c.error[i * V], V);
    const float *p = &c.p[i * kChunk], *m = p + kChunk * kChunk, *d = &c.decay[i * kChunk];
    const float *one = &w.scores[i * kChunk], *two = one + kChunk * kChunk;
    float *sums = &w.score_sums[i * kChunk], rate = c.beta[i];
    Floats of_beta{}, row{};
    for (int64_t j = 0; j < kChunk; j += kLanes) {
      Floats a = load<Floats>(one + j), b = -load<Floats>(two + j);
      a = first_of(i + 1, j) ? a : Floats{};
      b = first_of(i, j) ? b : Floats{};
      of_beta += b * load<Floats>(m + j);
      b *= rate;
      Floats below = first_of(i, j) ? a : Floats{};  // the diagonal does not decay
      Floats moved = below * load<Floats>(p + j) + b * load<Floats>(m + j);
      row += moved;
      store(dg + j, load<Floats>(dg + j) - moved);
      a *= load<Floats>(d + j);
      b *= load<Floats>(d + j);
      store(sums + j, load<Floats>(sums + j) + a);
      store(sums + kChunk * kChunk + j, load<Floats>(sums + kChunk * kChunk + j) + b);
    }
    dbeta[i] += sum(of_beta);
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
  transpose(w.state.data, K, V, w.turned.data);
  multiply(grad, V, 1, w.turned.data, K, w.dx.data, K, 2 * kChunk, K, V, false);
  for (int64_t i = 0; i < 2 * kChunk; i++) {
    const float *x = c.x.data + i * K, *dx = w.dx.data + i * K;
    float* sums = w.sums.data + i * K;
    dg[i % kChunk] += dot(x, dx, K);
    for (int64_t j = 0; j < K; j += kLanes) store(sums + j, load<Floats>(sums + j) + load<Floats>(dx + j));
  }
  transpose(after, K, V, w.turned.data);
  for (int64_t t = 0; t < kChunk; t++) scaled(&c.z[t * V], &c.z[t * V], c.write[t], V);
  multiply(c.z.data, V, 1, w.turned.data, K, w.sums.data + kChunk * K, K, kChunk, K, V, true);
  float before = c.through * dot(after, w.state.data, K * V);  // of what is written earlier
  scaled(after, after, c.through, K * V);
  multiply(c.x.data, 1, K, grad, V, after, V, K, V, 2 * kChunk, true);
  // a step's decay counts in all sums of its segment from there on, and for all that was written
  // before it and lasts to the end
  float later = 0.0f;
  for (int64_t t = steps - 1; t >= 0; t--) {
    dg[t] = later += dg[t];
    if (in.segments && in.segments[b * in.length + first + t] == first + t) later = 0.0f;
  }
  for (int64_t t = 0; t < steps; t++) {
    int64_t at = (b * in.length + first + t) * in.heads + head;
    to.g[at] = dg[t] + before;
    to.beta[at] = dbeta[t];
    before += written[t];
  }
}

template <class T>
void backward_of(const Inputs& in, const Gradients<T>& to, int64_t b, int64_t group, Chunk& c,
                 Buffers& w, const float* states) {
  int64_t each = in.heads / in.groups, size = in.features * in.values, K = c.K;
  for (int64_t e = 0; e < each; e++)
    load_state(to.state + (b * in.heads + group * each + e) * size, in, c,
               w.after.data + e * K * c.V);
  for (int64_t n = (in.length + kChunk - 1) / kChunk - 1; n >= 0; n--) {
    int64_t first = n * kChunk, steps = steps_of(in, n);
    c.load_keys<T>(in, b, group, first, steps);
    w.sums.zero(2 * kChunk * K);
    w.score_sums.zero(2 * kChunk * kChunk);
    for (int64_t e = 0; e < each; e++) {
      int64_t head = group * each + e, lane = b * in.heads + head;
      load_state(states + (n * in.batch * in.heads + lane) * size, in, c, w.state.data);
      backward_of_head(in, to, b, head, first, steps, c, w, w.after.data + e * K * c.V);
    }
    float *sums = w.sums.data, *of_keys = sums + kChunk * K;
    const float* scores = w.score_sums.data;
    multiply(scores, kChunk, 1, c.keys(), K, sums, K, 2 * kChunk, K, kChunk, true);
    multiply(scores, 1, kChunk, c.x.data, K, of_keys, K, kChunk, K, 2 * kChunk, true);
    for (int64_t i = 0; i < 2 * kChunk; i++) {
      int64_t t = i % kChunk;
      if (t >= steps) continue;
      float *row = &w.sums[i * K], *x = &c.x[i * K], scale = i < kChunk ? in.scale : 1.0f;
      float along = in.l2norm ? dot(row, x, K) / (scale * scale) : 0.0f;
      for (int64_t j = 0; j < K; j += kLanes)
        store(row + j, (load<Floats>(row + j) - load<Floats>(x + j) * along) * (c.norms[i] * scale));
      T* base = i < kChunk ? to.q : to.k;
      write_row(base + ((b * in.length + first + t) * in.groups + group) * in.features, row,
                in.features);
    }
  }
  for (int64_t e = 0; e < each; e++)
    store_state(to.state + (b * in.heads + group * each + e) * size, in, c,
                w.after.data + e * K * c.V);
}

template <class T>
int forward(const Inputs& in, float* states, void* out, float* final, int threads) {
  return guarded([&] {
    std::vector<Chunk> chunks;
    std::vector<Memory<float>> held;
    for (int i = 0; i < threads; i++) {
      chunks.emplace_back(in.features, in.values);
      held.emplace_back(in.heads / in.groups * chunks[i].K * chunks[i].V);
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
      buffers.emplace_back(chunks[i], in.heads / in.groups);
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
