#pragma once
// The only folder that knows Python. It checks shapes, releases the GIL, calls ops, and maps C++ exceptions to Python ones.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

#include "op/engine.h"

namespace nb = nanobind;
using namespace nomoat;

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using ConstInts = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Never converted: a result would go into the copy, and the engine keeps addresses of weights and adapters.
inline auto array(const char* name) { return nb::arg(name).noconvert(); }

// The message, one part behind the other, is only made of what has failed.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline Mode mode_of(const std::string& name) {
  if (name == "int8") return Mode::int8;
  if (name == "bf16") return Mode::bf16;
  if (name == "f32") return Mode::f32;
  throw std::invalid_argument("precision '" + name + "': expected int8, bf16 or f32");
}

inline Matrix matrix_view(int format, int rows, int cols, const ConstBytes& packed) {
  Matrix m = packed_matrix(Format(format), rows, cols);
  require(packed.size() == packed_bytes(m), "packed weights: ", packed.size(), " bytes, expected ", packed_bytes(m), " for ",
          rows, " x ", cols);
  m.data = packed.data();
  return m;
}

inline std::span<const int32_t> span_of(const ConstInts& x) { return {x.data(), x.shape(0)}; }

inline void check_ids(std::span<const int32_t> ids, int limit, const char* what) {
  for (const int32_t id : ids) require(id >= 0 && id < limit, what, " ", id, ": expected 0 to ", limit - 1);
}

// native/bind/kernels.cpp: the machine, packed weights, optimizer, sampler; what the machine can do at most.
void bind_kernels(nb::module_& m);
