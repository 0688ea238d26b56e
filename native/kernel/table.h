#pragma once
// The contract between the hardware and the engine: one table of functions a CPU level, each with its maths in one line.
// Every float buffer has rows padded to 32 elements, the padding zero. Sums run in a fixed order that depends neither on the
// number of rows nor on threads. Reading order: this file, then gemm.h, attend.h, rowwise.h, then one level (avx512.h).

#include <cstdint>

#include "base/cpu.h"
#include "quant/format.h"

namespace nomoat {

using bf16 = uint16_t;

// Columns of a GEMM panel: three strips. 8 rows x 48 columns fill the 32 registers of AVX-512 with 24 accumulators.
constexpr int kPanelCols = 48;
// In place of a number of digits: both digits of an activation as one int16.
constexpr int kWords = 16;
// Bytes of an activation's code.
constexpr int code_bytes(int digits) { return digits == 1 ? 1 : 2; }
// Bytes ahead of those it uses that a product fetches weights: 8 to 32 KB are alike for matrices of 576 columns; 16 KB are too
// few for 4,096.
constexpr int kAhead = 32 << 10;
// Where a thread reads on, at `next`, once it has read weights up to `end`; null: behind them.
struct ReadOn {
  const uint8_t *end = nullptr, *next = nullptr;
};
// Factors of adapters in bf16 lie in the order of reading, which memory brings fastest: ranks in groups, of A of kLoraRanks, of
// B^T all, and of a group's ranks kLoraCols columns in turn. Ranks of A are padded to whole groups, columns to kLoraCols.
constexpr int kLoraRanks = 4, kLoraCols = 32;
// Tokens of one page of the key/value cache, and dimensions of a head at most.
constexpr int kPageTokens = 64, kMostHeadDim = 512;

// 32 activations as one or two int8 digits: x[i] ~ scale * c[i], c = q or 128 * high + low (|c| <= 127 or 127 * 128). With
// kWords c itself is stored, the columns of every four in the order 0, 2, 1, 3.
// scaled_sum = scale * sum(c); sum[h] = sum of c over half h, for formats with a scale per 16 columns.
struct ActBlock {
  float scale, scaled_sum;
  int32_t sum[2];
};

// Attention as a whole, or one of its three steps, so that threads can share a few rows that see many keys: scores of keys
// [begin, end), whole blocks of 16 but for the last; then weights of the groups of virtual rows that begin in [begin, end), rows
// that are taken together; then sums over the values for dimensions [begin, end), multiples of 16. The bits are those of the
// whole.
enum class AttendPart { all, scores, weights, values };

// Query rows that share one kv head, against the cache. A "virtual row" is one (row, head) pair.
struct AttendArgs {
  const float* q;           // [rows][heads][dim], already scaled
  int rows, heads, dim;     // heads = query heads of the group; dim = head dimension padded to 16
  int q_stride;             // floats between rows
  int first_position;       // position of row 0; row i sees keys [max(0, p - window + 1), p], p = first_position + i
  int window;               // 0 = all
  float cap;                // scores become cap * tanh(score / cap); 0 = they stay
  const uint8_t* const* k;  // page -> keys [4 blocks of 16][dim / 2][16][2] bf16, or [4][dim][16] f32 or int8
  const uint8_t* const* v;  // page -> values [64][dim]; behind int8 keys or values stand their 64 scales, float
  float* out;               // [rows][heads][dim], stride q_stride
  float* lse;               // [rows][heads] log of the sum of exponentials, stride lse_stride; may be null
  int lse_stride;
  float* scratch;  // attend_scratch(rows, heads, last position + 1) floats; all parts of the same rows share them
  AttendPart part = AttendPart::all;
  int begin = 0, end = 0;
};

inline size_t attend_scratch(int rows, int heads, int keys) {
  return size_t(rows) * size_t(heads) * size_t(round_up(keys, 16) + 1);
}

// One segment and one kv head. `scale` is the one that the forward pass put into q. The first `before` keys
// belong to rows that other segments share: query row i sees keys [0, before + i]. At most kMaxGroup heads.
struct AttendBackwardArgs {
  const float *q, *out, *d_out;  // [count][heads][dim], q already scaled, stride q_stride
  const float *k, *v;            // [before + count][dim]
  const float* lse;              // [count][heads], stride lse_stride
  int count, heads, dim, q_stride, lse_stride, window;
  float scale, cap;
  float* dq;       // [count][heads][dim], stride q_stride
  float *dk, *dv;  // [before + count rounded up to 16][dim], added to; rows behind the last get zeros added
  float* scratch;  // attend_backward_scratch(before + count, heads, dim) floats
  int before = 0;
};

constexpr int kAttendRows = 4;  // query rows taken together by the attention kernels
constexpr int kMaxGroup = 64;   // query heads that share a kv head

inline int64_t attend_backward_scratch(int key_count, int heads, int dim) {
  const int64_t keys = round_up(key_count, 64), wide = round_up(dim, 32);
  return 2 * keys * (wide + int64_t(kAttendRows) * heads) + 208 * wide + (14 << 10);  // what attend_tiles.h takes, and more
}

enum class Peak : int { int8, int16, bf16, f32 };

struct Kernels {
  Level level;
  // Whether the bf16 products below are what training should use. Where a level has no instruction for dots of bf16 pairs, the
  // float32 ones are faster, and round neither factor: there, bf16 is what the tape and the cache hold, no more.
  bool bf16_dots;
  // Whether the level takes kWords. Where there is no int8 dot that adds in 32 bits, int16 activations are faster than two
  // digits, by 4 % for codes of 4 bits and 80 % for codes of 8, as soon as two rows share the conversion of codes to int16.
  bool words;
  // Rows of a product from which on weights are fetched kAhead ahead; fewer leave that to the hardware.
  int fetch_rows;
  // -- products with packed weights -------------------------------------------------------------------------------
  // y[m, 16s + r] (+)= sum_k W[16s + r, k] x[m, k] for strips s of [first, last), integer formats, activations of
  // one or two int8 digits, or kWords. A block of 32 activations is 32 high digits, then 32 low ones if there are two.
  void (*gemm_i8)(const Matrix& w, int first, int last, const ReadOn& then, int digits, const int8_t* q, const ActBlock* blocks,
                  int rows, float* y, int ldy, bool add);
  // the same in float32: the product for F32, F16 and BF16 weights
  void (*gemm_float)(const Matrix& w, int first, int last, const float* x, int ldx, int rows, float* y, int ldy, bool add);
  // panel[p][c] = W[column + c, from + p], or W[from + p, column + c] when `backward`; c < 48, p < count (a multiple of 32).
  // bf16 panels hold pairs [p / 2][48][2]; f32 panels [p][48]. Outside the matrix: zero. `panels` of them, each 48 columns and
  // `stride` elements behind the one before.
  void (*panels_bf16)(const Matrix& w, bool backward, int column, int panels, int from, int count, bf16* panel, size_t stride);
  void (*panels_f32)(const Matrix& w, bool backward, int column, int panels, int from, int count, float* panel, size_t stride);
  // the same from a plain float32 matrix src[rows][ld]: panel[p][c] = src[column + c][from + p], or src[from + p][column + c]
  void (*plain_panel_bf16)(const float* src, int ld, int rows, int cols, bool backward, int column, int from, int count,
                           bf16* panel);
  void (*plain_panel_f32)(const float* src, int ld, int rows, int cols, bool backward, int column, int from, int count,
                          float* panel);
  // c[m, 0..columns) (+)= sum_p a[m, p] panel[p, c], rows of c 48 apart; columns = 16, 32 or 48. A sum taken in parts of
  // multiples of 32 has the bits of the whole.
  void (*gemm_bf16)(const bf16* a, int lda, int rows, const bf16* panel, int count, int columns, float* c, bool add);
  void (*gemm_f32)(const float* a, int lda, int rows, const float* panel, int count, int columns, float* c, bool add);
  // y[m, i] (+)= c[m, i] for i < width, a multiple of 16; rows of c 48 apart, of y ldy, a multiple of 32
  void (*write_sums)(const float* c, int rows, int width, bool add, float* y, int ldy);
  // out[k] = W[row, k]
  void (*read_row)(const Matrix& w, int row, float* out);
  // -- adapters, sums in float32 ------------------------------------------------------------------------------------
  // u[m, r] = scale[r] * sum_k a[r, k] x[m, k]; a and bt are [rank][ld] in float32, in bf16 as kLoraRanks says
  void (*lora_shrink_bf16)(const float* x, int ldx, int rows, const bf16* a, int lda, const float* scale, int rank, int cols,
                           float* u, int ldu);
  void (*lora_shrink_f32)(const float* x, int ldx, int rows, const float* a, int lda, const float* scale, int rank, int cols,
                          float* u, int ldu);
  // y[m, n] += sum_r u[m, r] bt[r, n] for columns [first, last)
  void (*lora_expand_bf16)(const float* u, int ldu, int rows, const bf16* bt, int ldb, int rank, int first, int last, float* y,
                           int ldy);
  void (*lora_expand_f32)(const float* u, int ldu, int rows, const float* bt, int ldb, int rank, int first, int last, float* y,
                          int ldy);
  // out[r, c] += sum_m u[m, r] x[m, c] for columns [first, last), multiples of 16
  void (*outer_bf16)(const float* u, int ldu, int rank, const bf16* x, int ldx, int rows, int first, int last, float* out,
                     int ldo);
  void (*outer_f32)(const float* u, int ldu, int rank, const float* x, int ldx, int rows, int first, int last, float* out,
                    int ldo);
  // -- rows ---------------------------------------------------------------------------------------------------------
  void (*quantize)(const float* x, int cols, int digits, int8_t* q, ActBlock* blocks);
  // returns max|x| / 127;  out[i] = round(x[i] / that). A NaN or infinite x makes it NaN
  float (*to_int8)(const float* x, int count, int8_t* out);
  void (*to_bf16)(const float* x, int count, bf16* out);
  void (*to_f32)(const bf16* x, int count, float* out);
  // y = x * w * rsqrt(mean(x^2) + eps)
  void (*rms_norm)(const float* x, const float* w, int cols, float eps, float* y);
  // dx += d(rms_norm)/dx applied to dy
  void (*rms_norm_backward)(const float* x, const float* w, const float* dy, int cols, float eps, float* dx);
  // y = x - mean(x), y may be x: what makes layer norm of rms_norm
  void (*center)(const float* x, int cols, float* y);
  // out = act(gate) * up, or act(gate) where up is null;  d_gate, d_up from d_out.  silu(x) = x sigmoid(x),
  // gelu(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is its tanh form
  void (*silu_mul)(const float* gate, const float* up, int count, float* out);
  void (*silu_mul_backward)(const float* gate, const float* up, const float* d_out, int count, float* d_gate, float* d_up);
  void (*gelu_mul)(const float* gate, const float* up, int count, float* out);
  void (*gelu_mul_backward)(const float* gate, const float* up, const float* d_out, int count, float* d_gate, float* d_up);
  // x = cap * tanh(x / cap);  d *= 1 - (x / cap)^2 with that x
  void (*soft_cap)(float* x, float cap, int count);
  void (*soft_cap_backward)(const float* x, float cap, int count, float* d);
  // x[i] += y[i] * factor
  void (*axpy)(const float* y, float factor, int count, float* x);
  // returns max(x), or +infinity where an x is NaN or +infinity
  float (*highest)(const float* x, int count);
  // returns log(sum(exp(x)))
  float (*log_sum_exp)(const float* x, int count);
  // out[i] = factor * (exp(x[i] - lse)), bf16 or float; out may be x
  void (*softmax_bf16)(const float* x, float lse, float factor, int count, bf16* out);
  void (*softmax_f32)(const float* x, float lse, float factor, int count, float* out);
  // -- attention ----------------------------------------------------------------------------------------------------
  void (*attend_bf16)(const AttendArgs& args);
  void (*attend_f32)(const AttendArgs& args);
  void (*attend_int8)(const AttendArgs& args);
  void (*attend_backward)(const AttendBackwardArgs& args);
  // the same where training rounds the factors of products to bf16, as this one may
  void (*attend_backward_bf16)(const AttendBackwardArgs& args);
  // -- optimizer ----------------------------------------------------------------------------------------------------
  double (*sum_squares)(const float* x, int64_t count);
  // AdamW (Loshchilov and Hutter 2019): the bias corrections are folded into `step_size` and `root_correction`
  void (*adamw)(float* w, const float* g, float* m, float* v, int64_t count, float grad_scale, float beta1, float beta2,
                float step_size, float root_correction, float eps, float decay);
  // -- the limits that speeds are compared with --------------------------------------------------------------------------
  // runs `steps` of the instructions that products of a kind consist of; returns how many multiply-adds that were
  int64_t (*peak)(Peak what, int64_t steps);
  void (*read_all)(const uint8_t* data, size_t bytes);
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx2_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();

// The kernels in use: the best usable level, or the one that set_level chose.
const Kernels& kernels();
void set_level(Level level);

}  // namespace nomoat
