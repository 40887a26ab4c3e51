// The floating dtypes in CPU code: dispatch over them, and the type that each is computed in.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace rsloss {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;
using torch::headeronly::ScalarType;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Half x) { return static_cast<float>(x); }
inline float widen(BFloat16 x) { return static_cast<float>(x); }

template <class In>
using Arithmetic = std::conditional_t<std::is_same_v<In, double>, double, float>;

// Calls body with a value of the C++ type of a floating dtype.
template <class Body>
inline void dispatch_floating(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      return body(float{});
  }
}

}  // namespace rsloss
