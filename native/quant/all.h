#pragma once
// Every weight format, once. A new one: its header and a row here.

#include <utility>

#include "quant/floating.h"
#include "quant/iq4_nl.h"
#include "quant/iq4_xs.h"
#include "quant/mxfp4.h"
#include "quant/q2_k.h"
#include "quant/q3_k.h"
#include "quant/q4_0.h"
#include "quant/q4_1.h"
#include "quant/q4_k.h"
#include "quant/q5_0.h"
#include "quant/q5_1.h"
#include "quant/q5_k.h"
#include "quant/q6_k.h"
#include "quant/q8_0.h"

namespace nomoat {
namespace {

// Calls visit(Q{}) with the traits of `format`; false when there is none.
template <class Visit>
bool with_format(Format format, Visit&& visit) {
  switch (format) {
    case Format::F32:
      visit(F32{});
      return true;
    case Format::F16:
      visit(F16{});
      return true;
    case Format::BF16:
      visit(BF16{});
      return true;
    case Format::Q4_0:
      visit(Q4_0{});
      return true;
    case Format::Q4_1:
      visit(Q4_1{});
      return true;
    case Format::Q5_0:
      visit(Q5_0{});
      return true;
    case Format::Q5_1:
      visit(Q5_1{});
      return true;
    case Format::Q8_0:
      visit(Q8_0{});
      return true;
    case Format::Q2_K:
      visit(Q2_K{});
      return true;
    case Format::Q3_K:
      visit(Q3_K{});
      return true;
    case Format::Q4_K:
      visit(Q4_K{});
      return true;
    case Format::Q5_K:
      visit(Q5_K{});
      return true;
    case Format::Q6_K:
      visit(Q6_K{});
      return true;
    case Format::IQ4_NL:
      visit(IQ4_NL{});
      return true;
    case Format::IQ4_XS:
      visit(IQ4_XS{});
      return true;
    case Format::MXFP4:
      visit(MXFP4{});
      return true;
  }
  return false;
}

// Calls visit.operator()<i>() for i = 0 .. N - 1.
template <int N, class Visit>
inline void unrolled(Visit&& visit) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (visit.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, N>{});
}

}  // namespace
}  // namespace nomoat
