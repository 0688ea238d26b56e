#pragma once
// One vector of numbers of any type that is kept, as float32.

#include <cstdint>

#include "kernel/table.h"

namespace nomoat {
namespace {

template <class V>
inline typename V::F load_as_float(const bf16* x) {
  return V::from_bf16(x);
}
template <class V>
inline typename V::F load_as_float(const float* x) {
  return V::load(x);
}
template <class V>
inline typename V::F load_as_float(const int8_t* x) {
  return V::from_s8(x);
}

}  // namespace
}  // namespace nomoat
