// The mathematics of Rank & Sort for one positive, for host and device.
// Derivation: rsloss_kernels/losses/rank_sort/README.md.
#pragma once

#include "common/host_device.h"
#include "ranking/ranking.h"

namespace rsloss {

// Sums over the positives j, weighted by H(s_j - s_i), seen from positive i.
struct QualitySums {
  double worse;          // H over y_j < y_i
  double worse_deficit;  // H (y_i - y_j) over y_j < y_i
  double better;         // H over y_j >= y_i, i itself included
  double better_excess;  // H (y_j - y_i) over y_j >= y_i
};

struct RankSortTerms {
  double ranking_error;     // Eq. 3
  double sorting_error;     // Eq. 6 minus Eq. 7
  double coefficient;       // share of the ranking error per unit of H that a negative takes
  double weight;            // share of the sorting error per unit of H that a worse positive takes
  double ranking_gradient;  // of the positive itself, before the division by P
  double sorting_gradient;  // likewise, without what better positives push onto it
};

RSL_HOST_DEVICE double not_negative(double x) { return x > 0 ? x : 0; }

// Rounding in prefix differences must not make a sum of non-negative terms negative, nor the self term vanish.
RSL_HOST_DEVICE QualitySums clamp_sums(QualitySums sums) {
  sums.worse = not_negative(sums.worse);
  sums.worse_deficit = not_negative(sums.worse_deficit);
  sums.better = sums.better > 0.5 ? sums.better : 0.5;
  sums.better_excess = not_negative(sums.better_excess);
  return sums;
}

RSL_HOST_DEVICE RankSortTerms rank_sort_terms(QualitySums sums, double false_positive) {
  RankSortTerms terms;
  const double rank = sums.worse + sums.better;
  const bool is_ranked_below = false_positive > kEps;
  const bool is_sorted_below = sums.worse > kEps;
  terms.ranking_error = false_positive / (rank + false_positive);
  terms.sorting_error = (sums.worse_deficit * sums.better + sums.better_excess * sums.worse) / (sums.better * rank);
  terms.coefficient = is_ranked_below ? 1 / (rank + false_positive) : 0;
  terms.weight = is_sorted_below ? terms.sorting_error / sums.worse : 0;
  terms.ranking_gradient = is_ranked_below ? -terms.ranking_error : 0;
  terms.sorting_gradient = is_sorted_below ? -terms.sorting_error : 0;
  return terms;
}

}  // namespace rsloss
