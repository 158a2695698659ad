// How a call of attention is cut into blocks, and what is done with one block of rows.

struct Attention {
  int64_t batch, heads, groups, time, keys, dim, value_dim;
  int64_t causal, window;  // window: how many keys a position sees at most, itself included
  int64_t samples;  // whether the mask is the first key that each position sees, up to its own
  // strides of samples, heads and positions
  int64_t q[3], k[3], v[3], mask[3], out[3], grad[3], dq[3], dk[3], dv[3];
};

namespace {

constexpr int64_t kRows = 64;           // rows of a block, about
constexpr int64_t kScores = 48 * 1024;  // scores of a block, at most: they stay in the cache

struct Range {
  int64_t first, last;
};

// How a call is cut: blocks of positions of pairs of sample and group.
struct Plan {
  const Attention& a;
  const uint8_t* mask;
  const int32_t* first;  // of the positions of samples, or nullptr
  const float* sinks;    // of query heads, or nullptr
  float softcap;       // 0 where there is none
  int64_t pairs, share, padded, positions, blocks, rows, widest;
  Memory<Range> ranges;  // the keys that a block sees, from a multiple of 16 on

  Plan(const Attention& a, const uint8_t* mask, const float* sinks, float softcap)
      : a(a), mask(a.samples ? nullptr : mask),
        first(a.samples ? reinterpret_cast<const int32_t*>(mask) : nullptr), sinks(sinks),
        softcap(softcap) {
    pairs = a.batch * a.groups;
    share = a.heads / a.groups;
    padded = rounded_up(a.keys, 16);
    positions = kRows / share > 0 ? kRows / share : 1;
    while (!fits()) positions = (positions + 1) / 2;
  }

  bool fits() {
    blocks = (a.time + positions - 1) / positions;
    rows = rounded_up(positions * share, kTall);
    widest = 16;
    ranges.allocate(pairs * blocks);
    for (int64_t pair = 0; pair < pairs; pair++)
      for (int64_t block = 0; block < blocks; block++) {
        int64_t i = pair * blocks + block;
        bool varies = mask || first;
        bool known = !varies ? pair > 0 : pair % a.groups > 0 && !a.mask[1];
        ranges[i] = known ? ranges[varies ? i - blocks : block] : keys_of(pair, block);
        int64_t width = width_of(i);
        if (width > widest) widest = width;
      }
    return positions == 1 || rows * widest <= kScores;
  }

  int64_t width_of(int64_t i) const { return rounded_up(ranges[i].last - ranges[i].first, 16); }

  Range seen_by(int64_t sample, int64_t t) const {
    if (first) return {first[sample * a.mask[0] + t * a.mask[2]], t + 1};
    if (!a.causal) return {0, a.keys};
    return {t + 1 > a.window ? t + 1 - a.window : 0, t + 1};
  }

  const uint8_t* mask_row(int64_t sample, int64_t head, int64_t t) const {
    return mask + sample * a.mask[0] + head * a.mask[1] + t * a.mask[2];
  }

  Range keys_of(int64_t pair, int64_t block) const {
    int64_t start = block * positions, stop = start + positions;
    if (stop > a.time) stop = a.time;
    int64_t sample = pair / a.groups;
    Range range{seen_by(sample, start).first, seen_by(sample, stop - 1).last};
    if (mask) {
      range = {a.keys, 0};
      int64_t head = pair % a.groups * share;
      for (int64_t h = head; h < (a.mask[1] ? head + share : head + 1); h++)
        for (int64_t t = start; t < (a.mask[2] ? stop : start + 1); t++)
          widen(range, mask_row(sample, h, t));
      if (range.first > range.last) range.first = range.last;
    }
    range.first = range.first / 16 * 16;
    return range;
  }

  // Adds the keys of one row of the mask.
  void widen(Range& range, const uint8_t* row) const {
    int64_t j = 0;
    while (j + 8 <= range.first && load<uint64_t>(row + j) == 0) j += 8;
    while (j < range.first && !row[j]) j++;
    range.first = j;
    j = a.keys;
    while (j - 8 >= range.last && load<uint64_t>(row + j - 8) == 0) j -= 8;
    while (j > range.last && !row[j - 1]) j--;
    range.last = j;
  }
};

// One block of rows at a time: row r is position start + r / share of query head head + r % share.
struct Block {
  const Plan& plan;
  const Attention& a;
  int64_t start, stop, sample, head, low, width;
  Memory<bf16> queries, upstream, natural;  // natural: a matrix (rows, keys), rounded
  Memory<uint32_t> crossed;                 // the same as pairs of rows
  Memory<uint32_t> queries_t, upstream_t;   // (features, pairs of rows)
  Memory<float> scores, inverses, slopes, sums;
  Memory<float> bends;        // derivatives of the softcap
  Memory<float> sink_slopes;  // of each row the probability of its sink, then the gradient

  Block(const Plan& plan, bool backward) : plan(plan), a(plan.a) {
    int64_t rows = plan.rows, all = rows * plan.widest;
    queries.allocate(rows * a.dim);
    natural.allocate(all);
    scores.allocate(all);
    inverses.allocate(rows);
    sums.allocate(rows * (a.dim > a.value_dim ? a.dim : a.value_dim));
    if (!backward) return;
    slopes.allocate(all);
    sink_slopes.allocate(rows);
    bends.allocate(plan.softcap ? all : 0);
    crossed.allocate(all / 2);
    upstream.allocate(rows * a.value_dim);
    queries_t.allocate(rows * a.dim / 2);
    upstream_t.allocate(rows * a.value_dim / 2);
  }

  void begin(int64_t i) {
    int64_t pair = i / plan.blocks;
    start = i % plan.blocks * plan.positions;
    stop = start + plan.positions < a.time ? start + plan.positions : a.time;
    sample = pair / a.groups;
    head = pair % a.groups * plan.share;
    low = plan.ranges[i].first;
    width = plan.width_of(i);
  }

  // Exponentials in fp32 and their factors, from the queries and pack_features of the keys; zeros in
  // unused rows.
  void probabilities(const bf16* q, const uint32_t* keys, float scale) {
    gather(q, a.q, a.dim, queries.data);
    multiply(queries.data, a.dim, keys, scores.data);
    int64_t r = 0;
    for (int64_t t = start; t < stop; t++) {
      Range seen = plan.seen_by(sample, t);
      for (int64_t h = 0; h < plan.share; h++, r++) {
        const uint8_t* row = plan.mask ? plan.mask_row(sample, head + h, t) + low : nullptr;
        inverses[r] = softmax(r, {seen.first - low, seen.last - low}, row, scale,
                              plan.sinks ? plan.sinks[head + h] : -__builtin_inff());
      }
    }
    std::memset(scores.data + r * width, 0, (plan.rows - r) * width * sizeof(float));
    std::memset(inverses.data + r, 0, (plan.rows - r) * sizeof(float));
    if (bends.data) std::memset(bends.data + r * width, 0, (plan.rows - r) * width * sizeof(float));
  }

  void gather(const bf16* from, const int64_t* strides, int64_t dim, bf16* to) const {
    int64_t r = 0;
    for (int64_t t = start; t < stop; t++)
      for (int64_t h = 0; h < plan.share; h++, r++)
        std::memcpy(to + r * dim,
                    from + sample * strides[0] + (head + h) * strides[1] + t * strides[2],
                    dim * sizeof(bf16));
    std::memset(to + r * dim, 0, (plan.rows - r) * dim * sizeof(bf16));
  }

  void scatter(float scale, bf16* to, const int64_t* strides, int64_t dim) const {
    int64_t r = 0;
    for (int64_t t = start; t < stop; t++)
      for (int64_t h = 0; h < plan.share; h++, r++) {
        bf16* row = to + sample * strides[0] + (head + h) * strides[1] + t * strides[2];
        for (int64_t d = 0; d < dim; d += kLanes)
          store(row + d, narrowed(load<Floats>(sums.data + r * dim + d) * scale));
      }
  }

  // To (B, H, T).
  void scatter_sinks(float* to) const {
    int64_t r = 0;
    for (int64_t t = start; t < stop; t++)
      for (int64_t h = 0; h < plan.share; h++, r++)
        to[(sample * a.heads + head + h) * a.time + t] = sink_slopes[r];
  }

  // (rows, dim) to (dim, pairs of rows).
  void transpose(const bf16* from, int64_t dim, uint32_t* to) const {
    int64_t count = plan.rows / 2;
    for (int64_t m = 0; m < count; m++)
      for (int64_t d = 0; d < dim; d++)
        to[d * count + m] =
            uint32_t(from[2 * m * dim + d]) | uint32_t(from[(2 * m + 1) * dim + d]) << 16;
  }

  // into (rows, width) = left (rows, dim) · pack_features (dim / 2, keys)
  void multiply(const bf16* left, int64_t dim, const uint32_t* right, float* into) const {
    product(reinterpret_cast<const uint32_t*>(left), dim / 2, right + low, plan.padded, into,
            width, plan.rows, width, dim / 2, false);
  }

  // sums (rows, dim) = natural (rows, width) · pack_keys (keys / 2, dim)
  void multiply_keys(const uint32_t* right, int64_t dim) {
    product(reinterpret_cast<const uint32_t*>(natural.data), width / 2, right + low / 2 * dim, dim,
            sums.data, dim, plan.rows, dim, width / 2, false);
  }

  // into (dim, keys) += left (dim, pairs of rows) · crossed (pairs of rows, width)
  void add_to_keys(const uint32_t* left, int64_t dim, float* into) const {
    product(left, plan.rows / 2, crossed.data, width, into + low, plan.padded, dim, width,
            plan.rows / 2, true);
  }

  // Scores of row r to exponentials; returns what makes probabilities of them, 0 where nothing is
  // seen.
  float softmax(int64_t r, Range seen, const uint8_t* mask, float scale, float sink) const {
    const float infinity = __builtin_inff();
    float *row = scores.data + r * width, *bend = bends.data ? bends.data + r * width : nullptr;
    Floats most = splat(-infinity);
    for (int64_t j = 0; j < width; j += kLanes) {
      Floats s = load<Floats>(row + j) * scale;
      if (plan.softcap) {
        Floats t = tangent(s / plan.softcap);
        if (bend) store(bend + j, 1.0f - t * t);
        s = t * plan.softcap;
      }
      if (mask)
        s = masked(mask + j, a.keys - low - j) ? s : splat(-infinity);
      else if (j < seen.first || j + kLanes > seen.last)
        s = between(seen.first - j, seen.last - j) ? s : splat(-infinity);
      most = larger(most, s);
      store(row + j, s);
    }
    float peak = larger(largest(most), sink);
    if (peak == -infinity) {
      std::memset(row, 0, width * sizeof(float));
      return 0;
    }
    Floats total{};
    for (int64_t j = 0; j < width; j += kLanes) {
      Floats e = exponential(load<Floats>(row + j) - peak);
      total += e;
      store(row + j, e);
    }
    float of_sink = exponential(splat(sink - peak))[0];
    float inverse = 1.0f / (sum(total) + of_sink);
    if (sink_slopes.data) sink_slopes[r] = of_sink * inverse;
    return inverse;
  }

  // natural = the probabilities.
  void round() {
    for (int64_t r = 0; r < plan.rows; r++)
      for (int64_t j = 0; j < width; j += kLanes)
        store(natural.data + r * width + j,
              narrowed(load<Floats>(scores.data + r * width + j) * inverses[r]));
  }

  // crossed = the probabilities, which are in scores then.
  void round_crossed() {
    for (int64_t r = 0; r < plan.rows; r += 2)
      for (int64_t j = 0; j < width; j += kLanes) {
        float *even = scores.data + r * width + j, *odd = even + width;
        Floats p = load<Floats>(even) * inverses[r], q = load<Floats>(odd) * inverses[r + 1];
        store(even, p);
        store(odd, q);
        store(crossed.data + r / 2 * width + j, pairs_of(p, q));
      }
  }

  // natural and crossed = the gradients of the scores, P * (dP - rowsum(P * dP)).
  void softmax_backward() {
    for (int64_t r = 0; r < plan.rows; r += 2) {
      float *p = scores.data + r * width, *d = slopes.data + r * width;
      Floats totals[2] = {};
      for (int64_t j = 0; j < width; j += kLanes) {
        totals[0] += load<Floats>(p + j) * load<Floats>(d + j);
        totals[1] += load<Floats>(p + width + j) * load<Floats>(d + width + j);
      }
      float even = sum(totals[0]), odd = sum(totals[1]);
      sink_slopes[r] *= -even;
      sink_slopes[r + 1] *= -odd;
      for (int64_t j = 0; j < width; j += kLanes) {
        Floats s = load<Floats>(p + j) * (load<Floats>(d + j) - even);
        Floats t = load<Floats>(p + width + j) * (load<Floats>(d + width + j) - odd);
        if (bends.data) {
          s *= load<Floats>(bends.data + r * width + j);
          t *= load<Floats>(bends.data + (r + 1) * width + j);
        }
        store(natural.data + r * width + j, narrowed(s));
        store(natural.data + (r + 1) * width + j, narrowed(t));
        store(crossed.data + r / 2 * width + j, pairs_of(s, t));
      }
    }
  }
};

}  // namespace
