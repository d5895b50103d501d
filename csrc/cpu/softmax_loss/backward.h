// The backward pass of softmax_loss: one row, one chunk of rows.
// Included once for each instruction set, by row_code.h.

namespace classfair {
namespace CLASSFAIR_ISA {

// What the column loops of one row's backward need.
template <class A>
struct RowGradient {
  A scale, high, low;        // gradient = scale * exp(x - lse) - target_scale * target_c + ...
  A target_scale;            // upstream gradient of the loss
  const A *offset, *pair;    // parts of x, null: zero
  const A* target;           // smoothed or dense target row
  const A *p, *mass;         // raw softmax and the upstream gradient of its statistics (null: zero)
  A mass_scale;              // of mass
  A dot;                     // <p, mass_scale mass>
  A *sum_offset, *sum_pair;  // running sums of the perturbed part, null: not wanted
};

// g by value: a store to `out` could change one that has an address. kPlain: nothing perturbs the logits, so that the
// softmax of the statistics, where there is one, is the loss's too.
template <bool kTarget, bool kStatistics, bool kPlain, class T, class A>
CLASSFAIR_INLINE void gradient_columns(const RowGradient<A> g, const T* z, int64_t C, T* out) {
  constexpr bool kShared = kStatistics && kPlain, kSum = !kPlain;
  const auto column = [&](Vec<A> x, Vec<A> t) {
    const Vec<A> v = g.scale * (kShared ? x : exp((x - g.high) - g.low));
    return kTarget ? v - g.target_scale * t : v;
  };
  const auto statistics = [&](Vec<A> p, Vec<A> r) { return p * (g.mass_scale * r - g.dot); };
  for_columns<A>(
      C,
      [&](int64_t c) {
        Vec<A> x = kShared ? load(g.p + c) : load(z + c);
        if (!kPlain && g.offset) x += load(g.offset + c);
        if (!kPlain && g.pair) x += load(g.pair + c);
        Vec<A> v = column(x, kTarget ? load(g.target + c) : x);
        if (kSum && g.sum_offset) store(g.sum_offset + c, load(g.sum_offset + c) + v);
        if (kSum && g.sum_pair) store(g.sum_pair + c, load(g.sum_pair + c) + v);
        if (kStatistics) v += statistics(kShared ? x : load(g.p + c), g.mass ? load(g.mass + c) : Vec<A>{});
        store(out + c, v);
      },
      [&](int64_t c, int64_t n) {
        Vec<A> x = kShared ? load_some(g.p + c, n, A(0)) : load_some(z + c, n, A(0));
        if (!kPlain && g.offset) x += load_some(g.offset + c, n, A(0));
        if (!kPlain && g.pair) x += load_some(g.pair + c, n, A(0));
        Vec<A> v = column(x, kTarget ? load_some(g.target + c, n, A(0)) : x);
        for (int64_t i = 0; i < n; ++i) {
          if (kSum && g.sum_offset) g.sum_offset[c + i] += v[i];
          if (kSum && g.sum_pair) g.sum_pair[c + i] += v[i];
        }
        if (kStatistics)
          v += statistics(load_some(g.p + c, n, A(0)), g.mass ? load_some(g.mass + c, n, A(0)) : Vec<A>{});
        store_some(out + c, v, n);
      });
}

// p = exp(z - lse), and <p, mass>.
template <class T, class A = acc_t<T>>
A raw_softmax(const T* z, int64_t C, double lse, const A* mass, A* p) {
  const A high = static_cast<A>(lse), low = static_cast<A>(lse - high);
  Vec<A> dot = {};
  for_columns<A>(
      C,
      [&](int64_t c) {
        const Vec<A> v = exp((load(z + c) - high) - low);
        store(p + c, v);
        if (mass) dot += v * load(mass + c);
      },
      [&](int64_t c, int64_t n) {
        const Vec<A> v = exp((load_some(z + c, n, -std::numeric_limits<A>::infinity()) - high) - low);
        store_some(p + c, v, n);
        if (mass) dot += v * load_some(mass + c, n, A(0));
      });
  return sum_lanes<A>(dot);
}

template <class A>
bool all_zero(const A* x, int64_t C) {
  constexpr int64_t kBlock = 8 * kLanes<A>;
  for (int64_t begin = 0; begin < C; begin += kBlock) {  // most rows that are not show it at once
    Vec<A> largest = {};
    for_columns<A>(
        std::min(kBlock, C - begin),
        [&](int64_t c) { largest = max(largest, max(load(x + begin + c), -load(x + begin + c))); },
        [&](int64_t c, int64_t n) {
          const Vec<A> v = load_some(x + begin + c, n, A(0));
          largest = max(largest, max(v, -v));
        });
    if (max_lanes<A>(largest) != A(0)) return false;
  }
  return true;
}

// Working rows of one chunk's backward.
template <class A>
struct BackwardBuffers {
  A *p, *mass, *target;
  A* smoothing;  // w_c e / C, null without smoothing
  A smoothing_sum;
};

// The statistics' part: fills g.p, g.mass, g.mass_scale, g.dot. False where the row is in no statistic.
template <class T, class A = acc_t<T>>
bool statistics_gradient(const Backward<T>& b, const Row<A>& row, int64_t i, const T* z,
                         const BackwardBuffers<A>& buffers, RowGradient<A>* g, A* extra_a, A* extra_b) {
  const VisitedInputs<T>& in = b.in;
  if (!b.statistics() || row.label < 0 || row.group < 0 || !std::isfinite(b.lse_raw[i])) return false;
  g->mass = b.grad_mass ? b.grad_mass + row.group * in.C : nullptr;
  if (b.grad_joint && row.cell >= 0) {
    const A* joint = b.grad_joint + row.cell * in.C;
    if (g->mass) {
      for (int64_t c = 0; c < in.C; ++c) buffers.mass[c] = joint[c] + g->mass[c];
      g->mass = buffers.mass;
    } else {
      g->mass = joint;
    }
  }
  // Most cells of many classes: equalized odds has nothing to compare them with. A softmax is dearer than a look.
  if (!b.grad_mass && !b.grad_hit && (!g->mass || all_zero(g->mass, in.C))) return false;
  g->mass_scale = b.of_statistics();
  g->dot = g->mass_scale * raw_softmax(z, in.C, b.lse_raw[i], g->mass, buffers.p);
  g->p = buffers.p;
  if (b.grad_hit) {
    const A* hit = b.grad_hit + row.group * in.C;
    const bool dense = in.soft.data != nullptr;
    *extra_a = g->mass_scale * (dense ? hit[row.label] : row.a >= 0 ? row.share_a * hit[row.a] : A(0));
    *extra_b = g->mass_scale * (row.b >= 0 ? row.share_b * hit[row.b] : A(0));
    const int64_t a = dense ? row.label : row.a;
    g->dot += (a >= 0 ? buffers.p[a] * *extra_a : A(0)) + (row.b >= 0 ? buffers.p[row.b] * *extra_b : A(0));
  }
  return true;
}

template <class T, class A = acc_t<T>>
void backward_row(const Backward<T>& b, int64_t i, const Row<A>& row, const T* z, const A* soft,
                  const BackwardBuffers<A>& buffers, A* sum_offset, A* sum_pair, T* out) {
  const VisitedInputs<T>& in = b.in;
  const A upstream = b.of_loss(i) * row.sample_weight, upstream_lse = b.of_lse(i);
  const bool dead = b.lse[i] == -std::numeric_limits<double>::infinity();
  RowGradient<A> g{};
  g.high = static_cast<A>(b.lse[i]);
  g.low = static_cast<A>(b.lse[i] - g.high);
  g.offset = in.offset;
  g.pair = in.pair_row(row.slot);
  g.sum_offset = sum_offset;
  g.sum_pair = sum_pair;
  if (dead) {  // every logit is -inf: loss +inf, gradient 0, and so in no statistic
    std::fill(out, out + in.C, T(A(0)));
    if (b.row_margin) b.row_margin[i] = A(0);
    return;
  }

  // Hard targets: t_y = share (1-e) w_y slope, the slope being the focal term's.
  const auto logit = [&](int64_t y) {
    A x = static_cast<A>(z[y]);
    if (g.offset) x += g.offset[y];
    if (g.pair) x += g.pair[y];
    if (in.margin && y == row.a) x -= in.margin[y];
    return x;
  };
  const auto hard_target = [&](int64_t y, A share) {
    if (y < 0 || share == A(0)) return A(0);
    const A nll = -((logit(y) - g.high) - g.low);
    return share * (A(1) - in.smoothing) * in.class_weight(y) * focal_slope(nll, in.gamma);
  };
  A target_a = hard_target(row.a, row.share_a), target_b = hard_target(row.b, row.share_b);
  A total = target_a + target_b;  // s = sum_c t_c
  g.target_scale = upstream;
  if (soft) {
    double sum = 0;
    for (int64_t c = 0; c < in.C; ++c) {
      buffers.target[c] = smoothed_target(in.class_weight(c), soft[c], in.smoothing, in.smoothing_share);
      sum += buffers.target[c];
    }
    total = static_cast<A>(sum);
    g.target = buffers.target;
  } else if (buffers.smoothing) {
    const A share = row.share_a + row.share_b;
    total += share * buffers.smoothing_sum;
    g.target_scale *= share;
    g.target = buffers.smoothing;
  }
  g.scale = upstream * total + upstream_lse;

  if (b.statistics()) prefetch_for_write(out, in.C);  // while the softmax is computed
  A extra_a = 0, extra_b = 0;
  const bool statistics = statistics_gradient(b, row, i, z, buffers, &g, &extra_a, &extra_b);

  // Columns of hard targets are formed apart, p - 1 without cancellation, and put over what the loop wrote.
  const bool same = row.a == row.b;
  struct Special {
    int64_t y;
    A target, extra, sum_offset, sum_pair;
  } specials[2] = {{row.a, same ? target_a + target_b : target_a, same ? extra_a + extra_b : extra_a, A(0), A(0)},
                   {same ? -1 : row.b, target_b, extra_b, A(0), A(0)}};
  if (soft && statistics) specials[0] = {row.label, A(0), extra_a, A(0), A(0)};
  for (Special& s : specials) {
    if (s.y < 0) continue;
    if (sum_offset) s.sum_offset = sum_offset[s.y];
    if (sum_pair) s.sum_pair = sum_pair[s.y];
  }

  const bool plain = !in.perturbed();
  const auto run = [&](auto target_row, auto statistics_row) {
    if (plain)
      gradient_columns<decltype(target_row)::value, decltype(statistics_row)::value, true>(g, z, in.C, out);
    else
      gradient_columns<decltype(target_row)::value, decltype(statistics_row)::value, false>(g, z, in.C, out);
  };
  if (g.target)
    statistics ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
  else
    statistics ? run(std::false_type{}, std::true_type{}) : run(std::false_type{}, std::false_type{});

  if (b.row_margin) b.row_margin[i] = A(0);
  for (const Special& s : specials) {
    if (s.y < 0) continue;
    const A log_p = (logit(s.y) - g.high) - g.low;
    const A soft_target = g.target ? g.target_scale * g.target[s.y] : A(0);
    const A rest = upstream * (total - s.target) - soft_target;  // 0 for a plain hard label
    A v = upstream * total * std::expm1(log_p) + rest + upstream_lse * std::exp(log_p);
    if (sum_offset) sum_offset[s.y] = s.sum_offset + v;
    if (sum_pair) sum_pair[s.y] = s.sum_pair + v;
    if (b.row_margin && s.y == row.a) b.row_margin[i] = v;
    if (statistics) v += g.p[s.y] * ((g.mass ? g.mass_scale * g.mass[s.y] : A(0)) + s.extra - g.dot);
    out[s.y] = static_cast<T>(v);
  }
}

// Where the perturbed part of a row's gradient is summed for its pair row. A slot that began in an earlier chunk
// goes to this chunk's carry, which is added in chunk order afterwards: no sum depends on the number of threads.
template <class T, class A = acc_t<T>>
A* pair_sum(const Backward<T>& b, int64_t chunk, int64_t position, int64_t slot, int64_t previous) {
  if (b.grad_pair == nullptr || slot < 0) return nullptr;
  A* carry = b.carry + chunk * b.in.C;
  if (position == chunk * b.in.chunk_rows && slot == previous) {
    b.carry_slot[chunk] = slot;
    std::fill(carry, carry + b.in.C, A(0));
  }
  return slot == b.carry_slot[chunk] ? carry : b.grad_pair + slot * b.in.C;
}

// Rows [first, end) of a chunk.
template <class T>
void backward_rows(const Backward<T>& b, int64_t chunk, int64_t first, int64_t end) {
  using A = acc_t<T>;
  const VisitedInputs<T>& in = b.in;
  A* memory = scratch<A>((4 + kTile) * in.C);
  BackwardBuffers<A> buffers{memory, memory + in.C, memory + 2 * in.C, nullptr, A(0)};
  if (in.smoothed()) {
    buffers.smoothing = memory + 3 * in.C;
    for (int64_t c = 0; c < in.C; ++c) buffers.smoothing[c] = in.smoothing_share * in.class_weight(c);
    buffers.smoothing_sum = in.smoothing_share * in.weight_sum;
  }
  T* tiles = scratch_tile<T>(2 * kTile * in.C);
  const TileReader<T> logits{in.logits, in.C, tiles};
  const TileReader<A> soft{in.soft, in.C, memory + 4 * in.C};
  const bool direct = b.grad_logits.contiguous();
  A* sum_offset = b.partial_offset ? b.partial_offset + chunk * in.C : nullptr;
  int64_t previous = b.grad_pair && first > 0 ? resolve_labels<A>(in, in.visited(first - 1)).slot : -1;
  int64_t rows[kTile];
  Row<A> resolved[kTile];
  for (int64_t begin = first; begin < end; begin += kTile) {
    const int64_t count = tile_rows(in, begin, end, rows);
    logits.prepare(rows, count);
    if (in.soft.data) soft.prepare(rows, count);
    for (int64_t r = 0; r < count; ++r) {
      const Row<A>& row = resolved[r] = resolve_labels<A>(in, rows[r]);
      // One number of each row, anywhere in a table that another core may have written.
      if (b.grad_hit && row.label >= 0 && row.group >= 0) __builtin_prefetch(b.grad_hit + row.group * in.C + row.label);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = rows[r];
      const Row<A>& row = resolved[r];
      T* out = direct ? b.grad_logits.row(i) : tiles + (kTile + r) * in.C;
      if (row.kind != LabelKind::kValid) {
        std::fill(out, out + in.C, T(A(0)));
        if (b.row_margin) b.row_margin[i] = A(0);
      } else {
        A* sum_pair = pair_sum(b, chunk, begin + r, row.slot, previous);
        backward_row(b, i, row, logits.row(i, r), in.soft.data ? soft.row(i, r) : nullptr, buffers, sum_offset,
                     sum_pair, out);
      }
      previous = row.slot;
    }
    if (!direct)
      for (int64_t c = 0; c < in.C; ++c)
        for (int64_t r = 0; r < count; ++r)
          b.grad_logits.row(rows[r])[c * b.grad_logits.stride_c] = tiles[(kTile + r) * in.C + c];
  }
}

template <class T>
void backward_chunk(const Backward<T>& b, int64_t chunk) {
  using A = acc_t<T>;
  const int64_t C = b.in.C, first = chunk * b.in.chunk_rows, end = std::min(first + b.in.chunk_rows, b.in.rows);
  if (b.partial_offset) std::fill(b.partial_offset + chunk * C, b.partial_offset + (chunk + 1) * C, A(0));
  if (b.grad_pair) b.carry_slot[chunk] = -1;
  backward_rows(b, chunk, first, end);
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
