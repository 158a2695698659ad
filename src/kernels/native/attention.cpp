// Attention in bf16: some positions times all query heads of a group, folded into the rows of one
// matrix, against the keys that any of them may see. Scores, softmax and sums are in fp32; the
// probabilities, and in backward the gradients of the scores, are rounded before they are
// multiplied. A row's probabilities are whole before they are used, so nothing is rescaled.

namespace {

// (keys, dim) of one pair to (dim / 2, padded): pairs of features.
void pack_features(const bf16* from, int64_t stride, const Plan& plan, int64_t dim, uint32_t* to) {
  for (int64_t j = 0; j < plan.padded; j++)
    for (int64_t d = 0; d < dim / 2; d++)
      to[d * plan.padded + j] = j < plan.a.keys ? load<uint32_t>(from + j * stride + 2 * d) : 0;
}

// The same to (padded / 2, dim): pairs of keys.
void pack_keys(const bf16* from, int64_t stride, const Plan& plan, int64_t dim, uint32_t* to) {
  int64_t keys = plan.a.keys;
  for (int64_t j = 0; j < plan.padded; j += 2)
    for (int64_t d = 0; d < dim; d++) {
      uint32_t even = j < keys ? from[j * stride + d] : 0;
      uint32_t odd = j + 1 < keys ? from[(j + 1) * stride + d] : 0;
      to[j / 2 * dim + d] = even | odd << 16;
    }
}

const bf16* of_pair(const bf16* from, const int64_t* strides, const Plan& plan, int64_t pair) {
  return from + pair / plan.a.groups * strides[0] + pair % plan.a.groups * strides[1];
}

// The rounded features of all pairs, in the layouts in which they are multiplied.
struct Packed {
  const Plan& plan;
  int64_t size;
  Memory<uint32_t> memory;

  Packed(const Plan& plan, int64_t dim, bool needed)
      : plan(plan), size(plan.padded * dim / 2), memory(needed ? plan.pairs * size : 0) {}

  uint32_t* operator()(int64_t pair) { return memory.data + pair * size; }
};

std::vector<Block> blocks_of(const Plan& plan, bool backward, int threads) {
  std::vector<Block> blocks;
  for (int i = 0; i < threads; i++) blocks.emplace_back(plan, backward);
  return blocks;
}

void forward(const Attention& a, const bf16* q, const bf16* k, const bf16* v, const uint8_t* mask,
             bf16* out, const float* sinks, float scale, float softcap, int threads) {
  Plan plan(a, mask, sinks, softcap);
  Packed keys(plan, a.dim, true), values(plan, a.value_dim, true);
  std::vector<Block> blocks = blocks_of(plan, false, threads);
  int64_t count = plan.pairs * plan.blocks;
#pragma omp parallel num_threads(threads)
  {
    Block& block = blocks[thread_number()];
#pragma omp for
    for (int64_t pair = 0; pair < plan.pairs; pair++) {
      pack_features(of_pair(k, a.k, plan, pair), a.k[2], plan, a.dim, keys(pair));
      pack_keys(of_pair(v, a.v, plan, pair), a.v[2], plan, a.value_dim, values(pair));
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = count - 1; i >= 0; i--) {  // in causal attention the last ones take longest
      block.begin(i);
      block.probabilities(q, keys(i / plan.blocks), scale);
      block.round();
      block.multiply_keys(values(i / plan.blocks), a.value_dim);
      block.scatter(1.0f, out, a.out, a.value_dim);
    }
  }
}

// Sums over rows, of keys in fp32: (features, padded) of each pair. A thread goes through
// consecutive blocks; of a pair that another has begun it has separate sums, added up later in
// the order of the threads: results depend on their number, not on their speed.
struct KeySums {
  const Plan& plan;
  int64_t size;
  Memory<float> whole, parts;

  KeySums(const Plan& plan, int64_t dim, int threads, bool needed)
      : plan(plan), size(plan.padded * dim), whole(needed ? plan.pairs * size : 0),
        parts(needed ? threads * size : 0) {
    if (!needed) return;
    whole.zero(plan.pairs * size);
    parts.zero(threads * size);
  }

  float* of(int64_t pair) { return whole.data ? whole.data + pair * size : nullptr; }
  float* part(int thread) { return parts.data ? parts.data + thread * size : nullptr; }

  void add(int64_t pair, int thread) {
    for (int64_t i = 0; i < size; i++) of(pair)[i] += part(thread)[i];
  }

  void write(int64_t pair, float scale, bf16* to, const int64_t* strides, int64_t dim) {
    bf16* first = to + pair / plan.a.groups * strides[0] + pair % plan.a.groups * strides[1];
    for (int64_t j = 0; j < plan.a.keys; j += kLanes)
      for (int64_t d = 0; d < dim; d += 16) {
        bf16 tile[16][kLanes];
        for (int64_t i = 0; i < 16; i++)
          store(tile[i], narrowed(load<Floats>(of(pair) + (d + i) * plan.padded + j) * scale));
        int64_t there = plan.a.keys - j < kLanes ? plan.a.keys - j : kLanes;
        for (int64_t l = 0; l < there; l++)
          for (int64_t i = 0; i < 16; i++) first[(j + l) * strides[2] + d + i] = tile[i][l];
      }
  }
};

// Where the blocks of each of some threads begin, by the scores that there are.
std::vector<int64_t> shares_of(const Plan& plan, int threads) {
  int64_t count = plan.pairs * plan.blocks, total = 0, before = 0;
  for (int64_t i = 0; i < count; i++) total += plan.width_of(i) + 16;
  std::vector<int64_t> starts{0};
  for (int64_t i = 0; i < count; i++) {
    while (int64_t(starts.size()) < threads && before * threads >= total * int64_t(starts.size()))
      starts.push_back(i);
    before += plan.width_of(i) + 16;
  }
  starts.resize(threads, count);
  starts.push_back(count);
  return starts;
}

struct Gradients {
  bf16 *q, *k, *v;  // nullptr where nobody wants it
  float* sinks;     // what each row adds
};

// What all threads of a backward pass read, and add to.
struct Backward {
  const Plan& plan;
  const bf16 *grad, *q;
  Gradients to;
  float scale;
  Packed keys, values, rows;  // features of keys and of values in pairs, and pairs of keys
  KeySums dk, dv;

  Backward(const Plan& plan, const bf16* grad, const bf16* q, Gradients to, float scale,
           int threads)
      : plan(plan), grad(grad), q(q), to(to), scale(scale), keys(plan, plan.a.dim, true),
        values(plan, plan.a.value_dim, to.q || to.k || to.sinks), rows(plan, plan.a.dim, to.q),
        dk(plan, plan.a.dim, threads, to.k), dv(plan, plan.a.value_dim, threads, to.v) {}

  void pack(const bf16* k, const bf16* v, int64_t pair) {
    const Attention& a = plan.a;
    const bf16 *own_k = of_pair(k, a.k, plan, pair), *own_v = of_pair(v, a.v, plan, pair);
    pack_features(own_k, a.k[2], plan, a.dim, keys(pair));
    if (to.q) pack_keys(own_k, a.k[2], plan, a.dim, rows(pair));
    if (to.q || to.k || to.sinks) pack_features(own_v, a.v[2], plan, a.value_dim, values(pair));
  }

  // Block i; dk and dv are where its pair's sums are.
  void add(Block& block, int64_t i, float* dk, float* dv) {
    const Attention& a = plan.a;
    int64_t pair = i / plan.blocks;
    block.begin(i);
    block.probabilities(q, keys(pair), scale);
    block.round_crossed();
    block.gather(grad, a.grad, a.value_dim, block.upstream.data);
    if (to.v) {
      block.transpose(block.upstream.data, a.value_dim, block.upstream_t.data);
      block.add_to_keys(block.upstream_t.data, a.value_dim, dv);
    }
    if (!to.q && !to.k && !to.sinks) return;
    block.multiply(block.upstream.data, a.value_dim, values(pair), block.slopes.data);
    block.softmax_backward();
    if (to.sinks) block.scatter_sinks(to.sinks);
    if (to.q) {
      block.multiply_keys(rows(pair), a.dim);
      block.scatter(scale, to.q, a.dq, a.dim);
    }
    if (to.k) {
      block.transpose(block.queries.data, a.dim, block.queries_t.data);
      block.add_to_keys(block.queries_t.data, a.dim, dk);
    }
  }

  void finish(int64_t pair, const std::vector<int64_t>& starts) {
    for (size_t thread = 1; thread + 1 < starts.size(); thread++) {
      bool begun = starts[thread] < starts[thread + 1] && starts[thread] % plan.blocks;
      if (!begun || starts[thread] / plan.blocks != pair) continue;
      if (to.k) dk.add(pair, thread);
      if (to.v) dv.add(pair, thread);
    }
    if (to.k) dk.write(pair, scale, to.k, plan.a.dk, plan.a.dim);
    if (to.v) dv.write(pair, 1.0f, to.v, plan.a.dv, plan.a.value_dim);
  }
};

void backward(const Attention& a, const bf16* grad, const bf16* q, const bf16* k, const bf16* v,
              const uint8_t* mask, Gradients to, const float* sinks, float scale, float softcap,
              int threads) {
  Plan plan(a, mask, sinks, softcap);
  Backward pass(plan, grad, q, to, scale, threads);
  std::vector<Block> blocks = blocks_of(plan, true, threads);
  std::vector<int64_t> starts = shares_of(plan, threads);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t pair = 0; pair < plan.pairs; pair++) pass.pack(k, v, pair);
#pragma omp for schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
      for (int64_t i = starts[thread]; i < starts[thread + 1]; i++) {
        int64_t pair = i / plan.blocks;
        bool begun = pair * plan.blocks < starts[thread];
        pass.add(blocks[thread], i, begun ? pass.dk.part(thread) : pass.dk.of(pair),
                 begun ? pass.dv.part(thread) : pass.dv.of(pair));
      }
#pragma omp for
    for (int64_t pair = 0; pair < plan.pairs; pair++) pass.finish(pair, starts);
  }
}

}  // namespace

// Both return 0, or 1 where there is not enough memory. Strides of features are 1.

extern "C" int attention_forward(const Attention* a, const bf16* q, const bf16* k, const bf16* v,
                                 const uint8_t* mask, bf16* out, const float* sinks, float scale,
                                 float softcap, int threads) {
  return guarded([&] { forward(*a, q, k, v, mask, out, sinks, scale, softcap, threads); });
}

extern "C" int attention_backward(const Attention* a, const bf16* grad, const bf16* q,
                                  const bf16* k, const bf16* v, const uint8_t* mask, bf16* dq,
                                  bf16* dk, bf16* dv, const float* sinks, float* dsinks,
                                  float scale, float softcap, int threads) {
  Gradients to{dq, dk, dv, dsinks};
  return guarded([&] { backward(*a, grad, q, k, v, mask, to, sinks, scale, softcap, threads); });
}
