#pragma once
// What a core can do at most: the instructions of the products, with operands in registers and the first-level cache.

#include "kernel/table.h"

namespace nomoat {
namespace {

// Keeps the compiler from knowing what is there, and from taking loads of it out of a loop.
template <class T>
inline void renew(T*& p) {
  __asm__ volatile("" : "+r"(p));
}

// Looks at what `p` points to, so that it is computed.
inline void look_at(const void* p) { __asm__ volatile("" ::"r"(p) : "memory"); }

template <class V>
inline void consume(typename V::F x) {
  alignas(64) float lanes[16];
  V::store(lanes, x);
  look_at(lanes);
}

// Dots of the kernels for codes of four bits with one-digit activations.
template <class V>
int64_t peak_int8(int64_t steps) {
  alignas(64) uint8_t codes[8 * 64] = {};
  alignas(64) int8_t digits[4 * kTileCols] = {};
  const int8_t* x = digits;
  const uint8_t* granules = codes;
  renew(granules);
  typename V::B w[8];
  for (int g = 0; g < 8; g++) w[g] = V::bytes(granules + 64 * g);
  typename V::I sum[4];
  for (auto& s : sum) s = V::iset1(0);
  for (int64_t i = 0; i < steps; i++) {
    renew(x);
    for (int m = 0; m < 4; m++) {
      typename V::I dot = V::iset1(0);
      for (int g = 0; g < 8; g++) dot = V::template dot<15>(dot, w[g], x + m * kTileCols + 4 * g);
      sum[m] = V::iadd(sum[m], V::widen(dot));
    }
  }
  for (auto& s : sum) consume<V>(V::from_i32(s));
  return steps * 4 * V::W * kTileCols;
}

template <class V>
int64_t peak_int16(int64_t steps) {
  if constexpr (V::kHasWords) {
    alignas(64) uint8_t codes[2 * 64] = {};
    alignas(64) int8_t activations[4 * 8] = {};
    const int8_t* x = activations;
    const uint8_t* granules = codes;
    renew(granules);
    const typename V::B w[2] = {V::bytes(granules), V::bytes(granules + 64)};
    typename V::I sum[4][2];
    for (auto& row : sum)
      for (auto& s : row) s = V::iset1(0);
    for (int64_t i = 0; i < steps; i++) {
      renew(x);
      for (int m = 0; m < 4; m++)
        for (int n = 0; n < 2; n++) sum[m][n] = V::dot_words(sum[m][n], w[n], x + 8 * m);
    }
    for (auto& row : sum)
      for (auto& s : row) consume<V>(V::from_i32(s));
    return steps * 8 * V::W * 4;
  }
  return 0;
}

// The tile of the training products, its rows and its columns in the first-level cache.
template <class V, class T>
int64_t peak_tile(int64_t steps) {
  constexpr int R = V::kGemmRows, N = V::kGemmVectors, depth = 64;
  alignas(64) static thread_local T a[R * depth], panel[depth * kPanelCols];
  alignas(64) float c[R * kPanelCols] = {};
  const T *rows = a, *columns = panel;
  for (int64_t i = 0; i < steps; i++) {
    renew(rows);
    renew(columns);
    gemm_tile<V, R, N>(rows, depth, columns, depth, c, true);
  }
  look_at(c);
  return steps * depth * R * N * V::W;
}

template <class V>
int64_t peak(Peak what, int64_t steps) {
  switch (what) {
    case Peak::int8:
      return peak_int8<V>(steps);
    case Peak::int16:
      return peak_int16<V>(steps);
    case Peak::bf16:
      return peak_tile<V, bf16>(steps);
    default:
      return peak_tile<V, float>(steps);
  }
}

template <class V>
void read_all(const uint8_t* data, size_t bytes) {
  constexpr size_t vector = 4 * V::W;
  typename V::B seen[4];
  for (auto& s : seen) s = V::bytes(data);
  for (size_t at = 0; at + 4 * vector <= bytes; at += 4 * vector)
    for (size_t i = 0; i < 4; i++) seen[i] = V::bor(seen[i], V::bytes(data + at + i * vector));
  alignas(64) uint8_t kept[64];
  for (auto& s : seen) {
    V::store_bytes(kept, s);
    look_at(kept);
  }
}

}  // namespace
}  // namespace nomoat
