#pragma once
// Fills the table from a level's vector type. Included by one file per level, compiled with that level's flags: everything
// here has internal linkage, so that the linker can never hand one level's code to another.

#include "kernel/attend.h"
#include "kernel/gemm.h"
#include "kernel/peak.h"
#include "kernel/rowwise.h"

namespace nomoat {
namespace {

template <class V>
constexpr Kernels make_kernels(Level level) {
  Kernels k{};
  k.level = level;
  k.bf16_dots = V::kBf16Dots;
  k.words = V::kHasWords;
  k.fetch_rows = V::kFetchRows;
  k.gemm_i8 = gemm_i8<V>;
  k.gemm_float = gemm_float<V>;
  k.write_sums = write_sums<V>;
  k.panels_bf16 = panels_bf16<V>;
  k.panels_f32 = panels_f32<V>;
  k.plain_panel_bf16 = plain_panel_bf16<V>;
  k.plain_panel_f32 = plain_panel_f32<V>;
  k.gemm_bf16 = gemm_bf16<V>;
  k.gemm_f32 = gemm_f32<V>;
  k.read_row = read_row<V>;
  k.lora_shrink_bf16 = lora_shrink<V, bf16>;
  k.lora_shrink_f32 = lora_shrink<V, float>;
  k.lora_expand_bf16 = lora_expand<V, bf16>;
  k.lora_expand_f32 = lora_expand<V, float>;
  k.outer_bf16 = outer_bf16<V>;
  k.outer_f32 = outer_f32<V>;
  k.quantize = quantize<V>;
  k.to_int8 = to_int8<V>;
  k.to_bf16 = to_bf16<V>;
  k.to_f32 = to_f32<V>;
  k.rms_norm = rms_norm<V>;
  k.rms_norm_backward = rms_norm_backward<V>;
  k.center = center<V>;
  k.silu_mul = act_mul<V, Silu<V>>;
  k.silu_mul_backward = act_mul_backward<V, Silu<V>>;
  k.gelu_mul = act_mul<V, Gelu<V>>;
  k.gelu_mul_backward = act_mul_backward<V, Gelu<V>>;
  k.soft_cap = soft_cap<V>;
  k.soft_cap_backward = soft_cap_backward<V>;
  k.axpy = axpy<V>;
  k.highest = highest<V>;
  k.log_sum_exp = log_sum_exp<V>;
  k.softmax_bf16 = softmax_bf16<V>;
  k.softmax_f32 = softmax_f32<V>;
  k.attend_bf16 = attend_bf16<V>;
  k.attend_f32 = attend_f32<V>;
  k.attend_int8 = attend_int8<V>;
  k.attend_backward = k.attend_backward_bf16 = attend_backward<V>;
  k.sum_squares = sum_squares;
  k.adamw = adamw;
  k.peak = peak<V>;
  k.read_all = read_all<V>;
  return k;
}

}  // namespace
}  // namespace nomoat
