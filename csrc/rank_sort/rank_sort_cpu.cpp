// The last step of Rank & Sort on the CPU: losses and gradient tables from ranked positives and bins.
// The sums over positives descend a tree of qualities: prefix sums by logit over the worse (or better) half of a node for its
// other half, all pairs inside a leaf; O(P log P) time, 136 bytes per positive.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/sort_doubles.h"
#include "rank_sort/members.h"
#include "rank_sort/rank_sort.h"
#include "ranking/ranking_forward_cpu.h"

#define RSL_SIMD_BODY "rank_sort/rank_sort_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

constexpr int64_t kPadding = 8;  // pair_sums reads whole vectors
constexpr int64_t kLeaf = 192;   // positives of a leaf: comparing all pairs is fastest up to here
constexpr int64_t kPositivesPerTask = 256;

// The positives of every segment in ascending order of quality. A segment has the same range of positions as of ranks.
struct ByQuality {
  std::vector<int32_t> rank;         // [V] rank by logit
  std::vector<int32_t> position;     // [V] inverse of rank
  std::vector<int32_t> group_begin;  // [V] first position with the same quality
  std::vector<int32_t> group_end;    // [V] one past the last
  std::vector<double> logit;         // [V + padding]
  std::vector<double> quality;       // [V + padding]
};

// The same keys, those of the first segment first.
std::vector<SortKey> group_by_segment(const std::vector<SortKey>& keys, const std::vector<SegmentRange>& ranges) {
  std::vector<int32_t> range_of(keys.size());
  std::vector<int64_t> next;
  for (const SegmentRange& range : ranges) {
    std::fill(range_of.begin() + range.begin, range_of.begin() + range.end, static_cast<int32_t>(next.size()));
    next.push_back(range.begin);
  }
  std::vector<SortKey> grouped(keys.size());
  for (const SortKey& key : keys) grouped[next[range_of[key.slot]]++] = key;
  return grouped;
}

ByQuality order_by_quality(const Windows& windows, const double* quality) {
  const int32_t count = static_cast<int32_t>(windows.count);
  ByQuality by{std::vector<int32_t>(count), std::vector<int32_t>(count),           std::vector<int32_t>(count),
               std::vector<int32_t>(count), std::vector<double>(count + kPadding), std::vector<double>(count + kPadding)};
  std::vector<SortKey> keys(count);
  for (int32_t r = 0; r < count; ++r) keys[r] = {ordered_bits(quality[r]), r};
  sort_keys(keys);
  if (windows.ranges.size() > 1) keys = group_by_segment(keys, windows.ranges);
  for (const SegmentRange& range : windows.ranges) {
    const int32_t last = static_cast<int32_t>(range.end);
    for (int32_t begin = static_cast<int32_t>(range.begin); begin < last;) {
      int32_t end = begin;
      for (; end < last && keys[end].bits == keys[begin].bits; ++end) {
        by.rank[end] = keys[end].slot;
        by.position[keys[end].slot] = end;
        by.group_begin[end] = begin;
        by.logit[end] = windows.centre[keys[end].slot];
        by.quality[end] = quality[keys[end].slot];
      }
      std::fill(by.group_end.begin() + begin, by.group_end.begin() + end, end);
      begin = end;
    }
  }
  return by;
}

// Positions [begin, end) of one segment, whose members stand at the same places.
struct Node {
  int32_t begin;
  int32_t end;
};

// The boundary between two qualities next to the middle of the node; its end if all are equal, or if it is a leaf.
int32_t middle_of(const ByQuality& by, Node node) {
  if (node.end - node.begin <= kLeaf) return node.end;
  const int32_t half = node.begin + (node.end - node.begin) / 2;
  const int32_t before = by.group_begin[half], after = by.group_end[half];
  return before > node.begin && half - before <= after - half ? before : after;
}

// Halves the nodes by quality, down to leaves. split(node, middle) treats the pairs across, leaf(node) those inside. Which
// pairs are treated where does not depend on the number of threads.
template <class Split, class Leaf>
void sweep_by_quality(const ByQuality& by, const std::vector<SegmentRange>& ranges, const Split& split, const Leaf& leaf) {
  const int64_t count = count_ranks(ranges), tasks = task_count(count, kPositivesPerTask);
  std::vector<Node> nodes;
  for (const SegmentRange& range : ranges)
    nodes.push_back({static_cast<int32_t>(range.begin), static_cast<int32_t>(range.end)});
  // Large nodes first, all that there are at a time, until there are enough for the threads.
  const auto is_large = [&](Node node) { return tasks * (node.end - node.begin) > count && middle_of(by, node) < node.end; };
  while (tasks > 1 && std::any_of(nodes.begin(), nodes.end(), is_large)) {
    std::vector<Node> halves(2 * nodes.size());
    run_tasks(static_cast<int64_t>(nodes.size()), [&](int64_t i) {
      const Node node = nodes[i];
      const int32_t middle = is_large(node) ? middle_of(by, node) : node.end;
      if (middle < node.end) split(node, middle);
      halves[2 * i] = {node.begin, middle};
      halves[2 * i + 1] = {middle, node.end};
    });
    halves.erase(std::remove_if(halves.begin(), halves.end(), [](Node node) { return node.begin == node.end; }), halves.end());
    nodes.swap(halves);
  }
  run_tasks(tasks, [&](int64_t task) {
    std::vector<Node> open;
    for (const Node& node : nodes) {
      if (node.begin * tasks / std::max<int64_t>(count, 1) != task) continue;
      for (open.push_back(node); !open.empty();) {
        const Node next = open.back();
        open.pop_back();
        const int32_t middle = middle_of(by, next);
        if (middle == next.end) {
          leaf(next);
          continue;
        }
        split(next, middle);
        open.push_back({next.begin, middle});
        open.push_back({middle, next.end});
      }
    }
  });
}

// Room for the members of all nodes.
struct Members {
  explicit Members(int64_t count)
      : members(new Member[count]),
        scratch(new Member[count]),
        prefix(new double[4 * count]),
        worse_before(new int32_t[2 * count]) {}

  // value: of every rank, [V]
  void fill(const Windows& windows, const ByQuality& by, const std::vector<int32_t>& lower, const std::vector<int32_t>& upper,
            const double* value) const {
    for (const SegmentRange& range : windows.ranges) {
      const int32_t first = static_cast<int32_t>(range.begin);
      for (int64_t r = range.begin; r < range.end; ++r)
        members[r] = {by.position[r], lower[r] - first, upper[r] - first, windows.offset[r], value[r], 0, 0};
    }
  }

  NodeRoom node(int32_t begin) const {
    return {&scratch[begin], &prefix[4 * int64_t{begin}], &worse_before[2 * int64_t{begin}]};
  }

  std::unique_ptr<Member[]> members;
  std::unique_ptr<Member[]> scratch;
  std::unique_ptr<double[]> prefix;
  std::unique_ptr<int32_t[]> worse_before;
};

std::vector<QualitySums> compare_qualities(const Windows& windows, const ByQuality& by, const double* quality,
                                           const Members& room) {
  const int64_t count = windows.count;
  const std::vector<double> all = sum_over_positives(windows, [](int64_t) { return 1.0; });
  const std::vector<double> all_quality = sum_over_positives(windows, [&](int64_t j) { return quality[j]; });
  // By position, like the nodes: tasks that write to the same cache lines wait for each other.
  std::vector<double> worse(count), worse_quality(count);
  room.fill(windows, by, windows.lower, windows.upper, quality);
  sweep_by_quality(
      by, windows.ranges,
      [&](Node node, int32_t middle) {
        RSL_ISA_CALL(split_adding_worse, &room.members[node.begin], node.end - node.begin, middle, windows.slope,
                     room.node(node.begin));
      },
      [&](Node node) {
        for (int32_t p = node.begin; p < node.end; ++p) {
          worse[room.members[p].position] = room.members[p].sum;
          worse_quality[room.members[p].position] = room.members[p].product;
        }
        RSL_ISA_CALL(add_worse_in_leaf, by.logit.data(), by.quality.data(), by.group_begin.data(), node.begin, node.end,
                     windows.slope, worse.data(), worse_quality.data());
      });
  std::vector<QualitySums> sums(count);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t p = by.position[i];
    const double better = all[i] - worse[p];
    sums[i] = clamp_sums(
        {worse[p], quality[i] * worse[p] - worse_quality[p], better, all_quality[i] - worse_quality[p] - quality[i] * better});
  }
  return sums;
}

// The sum over better positives i of weight_i H(s_j - s_i), for every positive j, by position.
std::vector<double> pull_of_better(const Windows& windows, const ByQuality& by, const std::vector<double>& weight,
                                   const Members& room) {
  const int64_t count = windows.count;
  std::vector<double> by_quality(count + kPadding), pull(count);
  // The step at delta = 0 takes ties, in either direction.
  const std::vector<int32_t>&lower = windows.delta == 0 ? windows.full_end : windows.lower,
        &upper = windows.delta == 0 ? windows.full_end : windows.upper;
  room.fill(windows, by, lower, upper, weight.data());
  for (int64_t r = 0; r < count; ++r) by_quality[by.position[r]] = weight[r];
  sweep_by_quality(
      by, windows.ranges,
      [&](Node node, int32_t middle) {
        RSL_ISA_CALL(split_adding_pull, &room.members[node.begin], node.end - node.begin, middle, windows.slope,
                     room.node(node.begin));
      },
      [&](Node node) {
        for (int32_t p = node.begin; p < node.end; ++p) pull[room.members[p].position] = room.members[p].product;
        RSL_ISA_CALL(add_pull_in_leaf, by.logit.data(), by_quality.data(), by.group_end.data(), node.begin, node.end,
                     windows.slope, pull.data());
      });
  return pull;
}

constexpr char kFinalize[] = "rank_sort_finalize";

std::tuple<Tensor, Tensor, Tensor, Tensor> finish(const RankedPositives& positives) {
  const int64_t count = positives.count();
  const ByQuality by = order_by_quality(positives.windows, positives.quality());
  const Members room(count);
  const std::vector<QualitySums> sums = compare_qualities(positives.windows, by, positives.quality(), room);
  std::vector<double> ranking_error(count), sorting_error(count), weight(count);
  PositiveTerms terms(count);
  terms.second.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const RankSortTerms term = rank_sort_terms(sums[i], positives.false_positive[i]);
    ranking_error[i] = term.ranking_error;
    sorting_error[i] = term.sorting_error;
    weight[i] = term.weight;
    terms.coefficient[i] = term.coefficient;
    terms.first[i] = term.ranking_gradient;
    terms.second[i] = term.sorting_gradient;
  }
  const std::vector<double> pull = pull_of_better(positives.windows, by, weight, room);
  for (int64_t i = 0; i < count; ++i) terms.second[i] += pull[by.position[i]];
  Tensor gradients = positives.gradients(terms);
  return {positives.loss(ranking_error), positives.loss(sorting_error), gradients, positives.lines(terms)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rank_sort_finalize(Tensors logits, Tensor negatives, Tensor ranked, Tensor counts,
                                                              Tensor bins, std::optional<Tensor> segments, int64_t num_segments,
                                                              double delta, double gradient_scale, bool) {
  return finish({kFinalize, logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rank_sort_forward(
    Tensors logits, Tensors targets, Tensors quality, std::optional<Tensor> segments, int64_t num_segments,
    std::optional<int64_t> max_positives, bool maps, bool background_first, double delta, double gradient_scale, bool) {
  return forward_by_steps(kFinalize, finish, logits, targets, quality, segments, num_segments, max_positives, maps,
                          background_first, delta, gradient_scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) {
  m.impl("rank_sort_finalize.cpp", TORCH_BOX(&rank_sort_finalize));
  m.impl("rank_sort_forward.cpp", TORCH_BOX(&rank_sort_forward));
}

}  // namespace rsloss
