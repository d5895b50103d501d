// The group penalties on the CPU: segments, blocks of columns and sums in a fixed order. The code of the blocks is in
// fairness_rows.h, compiled once per instruction set.
#include "cpu/fairness.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace classfair {

namespace {

using torch::stable::parallel_for;

template <class A>
PenaltyKernels<A> penalty_kernels() {
#if defined(__x86_64__)
  if (selected_isa() == Isa::kAvx512) return avx512::penalty_kernels<A>();
  if (selected_isa() == Isa::kAvx2) return avx2::penalty_kernels<A>();
#endif
  return baseline::penalty_kernels<A>();
}

// Neighbouring rows of one label, or all groups.
struct Segment {
  int64_t first, rows;
};

// Which rows belong together, and how many samples are behind each.
struct Partition {
  std::vector<Segment> segments;
  std::vector<int64_t> samples;  // (M,), 0 in unused rows
  int64_t total;

  Partition(int64_t M, const CountTable& count, const OptionalTensor& cell, const OptionalTensor& num_cells)
      : samples(M, 0) {
    const int64_t G = count.G, C = count.C, *n = count.data;
    total = std::accumulate(n, n + G * C, int64_t(0));
    if (!cell.has_value()) {
      segments.push_back({0, M});
      for (int64_t g = 0; g < M; ++g) samples[g] = std::accumulate(n + g * C, n + (g + 1) * C, int64_t(0));
      return;
    }
    const int64_t *key = data<int64_t>(*cell), used = *data<int64_t>(*num_cells);
    for (int64_t m = 0; m < used; ++m) {
      const int64_t label = key[m] / G;
      samples[m] = n[key[m] % G * C + label];
      if (m == 0 || label != key[m - 1] / G) segments.push_back({m, 0});
      ++segments.back().rows;
    }
    if (used < M) segments.push_back({used, M - used});  // unused rows: no samples
  }
};

// Writes the part of the segment's first row, and the gradients of all of its rows.
template <class A>
void segment_penalty(const Partition& part, const Segment& segment, int64_t C, const A* rows, bool mutual_information,
                     bool weighted, A* parts, A* grads) {
  std::vector<const A*> from;
  std::vector<A*> to;
  std::vector<A> samples;
  int64_t size = 0;
  const int64_t end = segment.first + segment.rows;
  const bool alone = std::count_if(part.samples.begin() + segment.first, part.samples.begin() + end,
                                   [](int64_t n) { return n > 0; }) < 2;
  std::fill(parts + segment.first, parts + end, A(0));
  for (int64_t m = segment.first; m < end; ++m) {
    if (alone || part.samples[m] == 0) {  // nothing to differ from: exactly 0
      std::fill(grads + m * C, grads + (m + 1) * C, A(0));
      continue;
    }
    from.push_back(rows + m * C);
    to.push_back(grads + m * C);
    samples.push_back(static_cast<A>(part.samples[m]));
    size += part.samples[m];
  }
  if (alone) return;
  const A weight = weighted ? static_cast<A>(size) / static_cast<A>(std::max<int64_t>(part.total, 1)) : A(1);
  const PenaltyKernels<A> kernels = penalty_kernels<A>();
  const auto kernel = mutual_information ? kernels.mutual_information : kernels.squared_differences;
  for (int64_t begin = 0; begin < C; begin += kPenaltyColumns)
    parts[segment.first] += kernel({from.data(), to.data(), samples.data(), static_cast<int64_t>(from.size()),
                                    static_cast<A>(size), weight, begin, std::min(begin + kPenaltyColumns, C)});
}

// The penalty of the means of IoU, and its derivatives in their sums (G + 1,): groups, then all.
template <class A>
A iou_slopes(const std::vector<A>& iou, const std::vector<A>& classes, const std::vector<bool>& there, bool paired,
             std::vector<A>* slope) {
  const std::size_t G = there.size();
  const auto mean = [&](std::size_t g) { return iou[g] / std::max(classes[g], A(1)); };
  const auto add = [&](std::size_t g, A derivative) { (*slope)[g] += derivative / std::max(classes[g], A(1)); };
  A value = 0;
  for (std::size_t g = 0; g < G; ++g) {
    for (std::size_t other = paired ? g + 1 : G; other < (paired ? G : G + 1); ++other) {
      if (!there[g] || (paired && !there[other])) continue;
      const A difference = mean(g) - mean(other);
      value += difference * difference;
      add(g, 2 * difference);
      add(other, -2 * difference);
    }
  }
  return value;
}

CountTable count_table(const Tensor& count) { return {data<int64_t>(count), count.size(0), count.size(1)}; }

std::tuple<Tensor, Tensor> dependence_cpu(Tensor rows, Tensor count, OptionalTensor cell, OptionalTensor num_cells,
                                          bool mutual_information, bool weighted) {
  return dependence(rows, count_table(count), cell, num_cells, mutual_information, weighted);
}

std::tuple<Tensor, Tensor, Tensor> iou_penalty_cpu(Tensor mass, Tensor hit, Tensor count, bool paired, bool skip) {
  return iou_penalty(mass, hit, count_table(count), paired, skip);
}

}  // namespace

std::tuple<Tensor, Tensor> dependence(const Tensor& rows, const CountTable& count, const OptionalTensor& cell,
                                      const OptionalTensor& num_cells, bool mutual_information, bool weighted) {
  const int64_t M = rows.size(0), C = rows.size(1);
  Tensor parts = allocate<1>(rows, {M}, rows.scalar_type());
  Tensor grad_rows = allocate<2>(rows, {M, C}, rows.scalar_type());
  const Partition part(M, count, cell, num_cells);
  dispatch_accumulate(rows, [&](auto tag) {
    using A = decltype(tag);
    parallel_for(0, static_cast<int64_t>(part.segments.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        segment_penalty(part, part.segments[s], C, data<A>(rows), mutual_information, weighted, data<A>(parts),
                        data<A>(grad_rows));
      }
    });
  });
  return {parts, grad_rows};
}

std::tuple<Tensor, Tensor, Tensor> iou_penalty(const Tensor& mass, const Tensor& hit, const CountTable& count,
                                               bool paired, bool skip) {
  const int64_t G = count.G, C = count.C, blocks = ceil_div(C, kPenaltyColumns);
  Tensor value = allocate<0>(mass, {}, mass.scalar_type());
  Tensor grad_mass = allocate<2>(mass, {G, C}, mass.scalar_type());
  Tensor grad_hit = allocate<2>(mass, {G, C}, mass.scalar_type());
  std::vector<bool> there(G);
  for (int64_t g = 0; g < G; ++g) {
    const int64_t* n = count.data + g * C;
    there[g] = std::any_of(n, n + C, [](int64_t samples) { return samples > 0; });
  }
  dispatch_accumulate(mass, [&](auto tag) {
    using A = decltype(tag);
    std::vector<A> all(3 * C);
    const IouInputs<A> in{data<A>(mass), data<A>(hit),       count.data,        G,         C,
                          skip,          data<A>(grad_mass), data<A>(grad_hit), all.data()};
    const PenaltyKernels<A> kernels = penalty_kernels<A>();
    std::vector<A> partial(2 * blocks * (G + 1)), iou(G + 1, A(0)), classes(G + 1, A(0)), slope(G + 1, A(0));
    const auto sums = [&](int64_t block) {
      A* first = partial.data() + 2 * block * (G + 1);
      return IouSums<A>{first, first + G + 1};
    };
    const auto columns = [&](auto&& run) {
      parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) run(b, b * kPenaltyColumns, std::min((b + 1) * kPenaltyColumns, C));
      });
    };
    columns([&](int64_t b, int64_t begin, int64_t end) { kernels.iou_sums(in, begin, end, sums(b)); });
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t g = 0; g <= G; ++g) iou[g] += sums(b).iou[g], classes[g] += sums(b).classes[g];
    *static_cast<A*>(value.data_ptr()) = iou_slopes(iou, classes, there, paired, &slope);
    columns([&](int64_t, int64_t begin, int64_t end) { kernels.iou_gradients(in, begin, end, slope.data()); });
  });
  return {value, grad_mass, grad_hit};
}

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CPU, m) {
  m.impl("dependence", TORCH_BOX(&dependence_cpu));
  m.impl("iou_penalty", TORCH_BOX(&iou_penalty_cpu));
}

}  // namespace classfair
