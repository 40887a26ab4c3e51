// Seesaw loss on the CPU: rows over the threads, one pass forward and one back, each row by itself; then the rows' losses added
// up. Allocates the outputs, the losses of the rows and a table of logarithms of the counts.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/new_tensor_cpu.h"
#include "common/parallel.h"
#include "seesaw/seesaw.h"
#include "seesaw/seesaw_checks.h"
#include "seesaw/seesaw_rows.h"

#define RSL_SIMD_BODY "seesaw/seesaw_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

// Numbers of any floating dtype; without a tensor all are 1.
struct Numbers {
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;

  Numbers() = default;
  explicit Numbers(const Tensor& tensor) : data(tensor.const_data_ptr()), type(tensor.scalar_type()) {}
  explicit Numbers(const std::optional<Tensor>& tensor) : Numbers(tensor ? Numbers(*tensor) : Numbers()) {}

  double operator[](int64_t i) const {
    double value = 1;
    if (data != nullptr)
      dispatch_floating(type,
                        [&](auto tag) { value = static_cast<double>(widen(static_cast<const decltype(tag)*>(data)[i])); });
    return value;
  }
};

struct Rows {
  int64_t rows;
  int64_t classes;
  const void* labels;
  bool has_int_labels;
  Numbers weights;
  std::vector<double> log_counts;  // p l_j
  double q;
  double log_eps;

  Rows(const Tensor& logits, const Tensor& label_tensor, const std::optional<Tensor>& weight_tensor, const Tensor& counts,
       double p, double q, double eps)
      : rows(logits.size(0)),
        classes(counts.size(0)),
        labels(label_tensor.const_data_ptr()),
        has_int_labels(label_tensor.scalar_type() == ScalarType::Int),
        weights(weight_tensor),
        log_counts(classes + kMostLanes),
        q(q),
        log_eps(eps > 0 ? std::log(eps) : -INFINITY) {
    const double* data = static_cast<const double*>(counts.const_data_ptr());
    for (int64_t j = 0; j < classes; ++j) log_counts[j] = p * data[j];
  }

  int64_t label(int64_t row) const {
    return has_int_labels ? static_cast<const int32_t*>(labels)[row] : static_cast<const int64_t*>(labels)[row];
  }
  SeesawRow of_label(int64_t at) const { return {classes, at, log_counts.data(), q, log_eps}; }
};

// Logits of enough work to pay for waking a thread.
constexpr int64_t kLogitsPerTask = 16384;

// Calls body(row) for all rows, on as many threads as it pays.
template <class Body>
void for_rows(const Rows& problem, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kLogitsPerTask / (problem.classes + 2));
  share_items(problem.rows, task_count(problem.rows, grain), body, std::max<int64_t>(1, grain / 8));
}

// pair: the logits of foreground and background.
template <class In>
ObjectnessTerms objectness_of(const In* pair, bool is_foreground) {
  return objectness_terms(static_cast<double>(widen(pair[is_foreground ? 0 : 1])),
                          static_cast<double>(widen(pair[is_foreground ? 1 : 0])));
}

// Sums in an order that the number alone fixes.
double sum_of(const double* values, int64_t count) {
  constexpr int64_t kApart = 8;
  double sums[kApart] = {};
  int64_t i = 0;
  for (; i + kApart <= count; i += kApart)
    for (int64_t k = 0; k < kApart; ++k) sums[k] += values[i + k];
  for (; i < count; ++i) sums[0] += values[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// As the operator numbers them: 2 is the sum.
constexpr int64_t kNoReduction = 0, kMean = 1;

// What divides objectness and classes.
void fill_divisors(const Rows& problem, int64_t reduction, const std::optional<Tensor>& avg_factor, double* divisors) {
  int64_t used = 1, foreground = 1;
  if (reduction == kMean && !avg_factor) {
    used = foreground = 0;
    for (int64_t row = 0; row < problem.rows; ++row) {
      const int64_t label = problem.label(row);
      used += label >= 0 ? 1 : 0;
      foreground += label >= 0 && label < problem.classes ? 1 : 0;
    }
  }
  const double factor = avg_factor && reduction != kNoReduction ? *static_cast<const double*>(avg_factor->const_data_ptr()) : 1;
  divisors[0] = factor * static_cast<double>(std::max<int64_t>(used, 1));
  divisors[1] = factor * static_cast<double>(std::max<int64_t>(foreground, 1));
}

Tensor reduced(const double* losses, int64_t rows, double divisor, ScalarType type) {
  Tensor loss = new_cpu_tensor({}, type);
  const double value = sum_of(losses, rows) / divisor;
  if (type == ScalarType::Double) *static_cast<double*>(loss.mutable_data_ptr()) = value;
  else *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(value);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> seesaw_forward(Tensor logits, Tensor labels, std::optional<Tensor> weights,
                                                          Tensor log_counts, double p, double q, double eps, int64_t reduction,
                                                          std::optional<Tensor> avg_factor) {
  const char* op = "seesaw_forward";
  check_seesaw_rows(op, logits, labels, weights, log_counts, p, q);
  check_seesaw_number(op, "eps", eps);
  check_seesaw_reduction(op, reduction, avg_factor, logits);
  const Rows problem(logits, labels, weights, log_counts, p, q, eps);
  const int64_t rows = problem.rows, classes = problem.classes;
  Tensor divisors = new_cpu_tensor({2}, ScalarType::Double);
  Tensor row_tables = new_cpu_tensor({kSeesawTables, rows}, ScalarType::Double);
  Tensor objectness = new_cpu_tensor({rows}, ScalarType::Double), of_rows = new_cpu_tensor({rows}, ScalarType::Double);
  double* of_objectness = static_cast<double*>(objectness.mutable_data_ptr());
  double* of_classes = static_cast<double*>(of_rows.mutable_data_ptr());
  double* tables = static_cast<double*>(row_tables.mutable_data_ptr());
  double* divided_by = static_cast<double*>(divisors.mutable_data_ptr());
  fill_divisors(problem, reduction, avg_factor, divided_by);
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    const In* data = static_cast<const In*>(logits.const_data_ptr());
    for_rows(problem, [&](int64_t row) {
      const int64_t label = problem.label(row);
      const double weight = problem.weights[row];
      const In* z = data + row * (classes + 2);
      const bool is_foreground = has_class(label, weight, classes);
      SeesawTerms terms{};
      if (is_foreground) RSL_ISA_CALL(seesaw_forward_row, problem.of_label(label), z, terms);
      of_objectness[row] = is_row_used(label, weight) ? weight * objectness_of(z + classes, is_foreground).loss : 0;
      of_classes[row] = is_foreground ? weight * terms.loss : 0;
      const double values[kSeesawTables] = {terms.threshold, terms.top, terms.scale, terms.complement};
      for (int k = 0; k < kSeesawTables; ++k) tables[k * rows + row] = values[k];
    });
  });
  if (reduction == kNoReduction) return {objectness, of_rows, divisors, row_tables};
  const ScalarType type = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return {reduced(of_objectness, rows, divided_by[0], type), reduced(of_classes, rows, divided_by[1], type), divisors,
          row_tables};
}

// Upstream gradients of the rows' losses, over the divisor; without a tensor 0.
struct Upstream {
  Numbers numbers;
  bool is_one;
  double factor;

  Upstream(const std::optional<Tensor>& grad, double divisor)
      : numbers(grad), is_one(!grad || grad->dim() == 0), factor((grad ? 1 : 0) / divisor) {}
  double operator[](int64_t row) const { return numbers[is_one ? 0 : row] * factor; }
};

Tensor seesaw_backward(Tensor logits, Tensor labels, std::optional<Tensor> weights, Tensor log_counts, Tensor divisors,
                       Tensor row_tables, std::optional<Tensor> grad_objectness, std::optional<Tensor> grad_classes, double p,
                       double q) {
  const char* op = "seesaw_backward";
  check_seesaw_rows(op, logits, labels, weights, log_counts, p, q);
  check_seesaw_backward(op, divisors, row_tables, grad_objectness, grad_classes, logits);
  const Rows problem(logits, labels, weights, log_counts, p, q, 0);
  const int64_t rows = problem.rows, classes = problem.classes;
  const double* tables = static_cast<const double*>(row_tables.const_data_ptr());
  const double* divided_by = static_cast<const double*>(divisors.const_data_ptr());
  const Upstream of_objectness(grad_objectness, divided_by[0]), of_classes(grad_classes, divided_by[1]);
  Tensor gradient = new_cpu_tensor_like(logits);
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    using Wide = Arithmetic<In>;
    const In* data = static_cast<const In*>(logits.const_data_ptr());
    In* slopes = static_cast<In*>(gradient.mutable_data_ptr());
    for_rows(problem, [&](int64_t row) {
      const int64_t label = problem.label(row);
      const double weight = problem.weights[row];
      const In* z = data + row * (classes + 2);
      In* out = slopes + row * (classes + 2);
      const bool is_foreground = has_class(label, weight, classes);
      const SeesawTerms terms{tables[row], tables[rows + row], tables[2 * rows + row], tables[3 * rows + row], 0};
      if (!is_foreground) std::memset(static_cast<void*>(out), 0, static_cast<size_t>(classes) * sizeof(In));
      else if (terms.top != terms.top) std::fill(out, out + classes, In(static_cast<Wide>(NAN)));
      else RSL_ISA_CALL(seesaw_backward_row, problem.of_label(label), z, terms, weight * of_classes[row], out);
      const bool is_used = is_row_used(label, weight);
      const double pull = is_used ? weight * of_objectness[row] * objectness_of(z + classes, is_foreground).slope : 0;
      out[classes] = In(static_cast<Wide>(is_foreground ? -pull : pull));
      // No negative zero in rows that are not read.
      out[classes + 1] = In(static_cast<Wide>(is_foreground ? pull : 0 - pull));
    });
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) {
  m.impl("seesaw_forward.cpp", TORCH_BOX(&seesaw_forward));
  m.impl("seesaw_backward.cpp", TORCH_BOX(&seesaw_backward));
}

}  // namespace rsloss
