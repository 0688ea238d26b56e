// y = W x + B (A x) + b, and its backward. Base weights stay packed; adapters are added beside them.

#include <algorithm>
#include <type_traits>

#include "base/profile.h"
#include "op/panels.h"

namespace nomoat {

namespace {

const Lora* lora_of(const LoraSet* set, int layer, int target) {
  if (!set || target == kTargets) return nullptr;
  const Lora& lora = (*set)[layer][target];
  return lora.rank ? &lora : nullptr;
}

// Consecutive segments with the same adapters, as one run of rows: of those that a job takes, counted from its first one.
template <class Visit>
void for_adapter_runs(const Batch& batch, int layer, const LinearJob& job, Visit&& visit) {
  const int begin = job.row, end = job.rows ? job.row + job.rows : batch.rows;
  for (size_t i = 0; i < batch.segments.size();) {
    const LoraSet* set = batch.segments[i].lora;
    const int first = std::max(batch.segments[i].row, begin);
    size_t j = i;
    while (j < batch.segments.size() && batch.segments[j].lora == set) j++;
    const int last = std::min(batch.segments[j - 1].row + batch.segments[j - 1].count, end);
    if (first < last)
      if (const Lora* lora = lora_of(set, layer, job.target)) visit(*lora, first - begin, last - begin);
    i = j;
  }
}

// Of all rows, whatever a job takes: its rank-r intermediates lie among those of others.
int widest_rank(const Batch& batch, int layer, int target) {
  int rank = 0;
  for (const Segment& segment : batch.segments)
    if (const Lora* lora = lora_of(segment.lora, layer, target)) rank = std::max(rank, lora->rank);
  return rank;
}

// Equal shares of rows, one a thread: each share decodes its own panels.
template <class Body>
void for_shares(int rows, Body&& body) {
  const int shares = rows < 32 ? 1 : threads();
  parallel_for(shares, [&](int task, int thread) {
    const int first = int(int64_t(rows) * task / shares), last = int(int64_t(rows) * (task + 1) / shares);
    if (first < last) body(first, last, thread);
  });
}

// out[m, r] = scale[r] * sum_p a[m, p] s[r, p] for m in [0, rows), s plain [rank][ld]
template <class T>
void project_rows(const T* a, int lda, int rows, const float* s, int ld, int width, int rank, const float* scale, float* out,
                  int ldo, Buffer& scratch) {
  constexpr int most = 1024;  // steps of the contraction at once
  T* panel = scratch.get<T>(size_t(most) * kPanelCols + sizeof(float) / sizeof(T) * size_t(rows) * kPanelCols);
  float* c = reinterpret_cast<float*>(panel + size_t(most) * kPanelCols);
  for (int column = 0; column < rank; column += kPanelCols) {
    const int columns = std::min(round_up(rank - column, 16), kPanelCols);
    for (int from = 0; from < width; from += most) {
      const int count = std::min(most, round_up(width - from, 16));
      Ops<T>::plain_panel()(s, ld, rank, width, false, column, from, count, panel);
      Ops<T>::gemm()(a + from, lda, rows, panel, count, columns, c, from > 0);
    }
    const int last = rank - column < kPanelCols ? rank - column : kPanelCols;
    for (int m = 0; m < rows; m++)
      for (int r = 0; r < last; r++) out[size_t(m) * ldo + column + r] = scale[column + r] * c[m * kPanelCols + r];
  }
}

// ---- forward ----------------------------------------------------------------------------------------------------------

// The rows of x that a job takes.
Activations input_of(const LinearJob& job, const Activations& x) { return job.rows ? x.part(job.row, job.rows) : x; }

// The strips of matrices that share their input, in tasks.
struct Strips {
  int count, shares = threads(), tasks = std::min(count, 8 * shares);

  explicit Strips(int all) : count(all) {}
  // The first strip of a task, and of a share.
  int of_task(int task) const { return int(int64_t(count) * task / tasks); }
  int of_share(int share) const { return of_task(share_begin(tasks, share, shares)); }

  int share_of(int task) const {
    int share = 0;
    while (task >= share_begin(tasks, share + 1, shares)) share++;
    return share;
  }
};

// The matrices whose product comes after that of `job`, where no router decides that. After the head: those of the next token.
struct Next {
  std::array<const Matrix*, 3> w{};

  Next(const Engine& engine, int layer, const LinearJob& job) {
    if (job.target == kTargets && job.w != &engine.head) return;  // a router, or a matrix of no model
    const Layer& own = engine.layers[size_t(layer)];
    if (own.experts && job.target != kQ) return;
    switch (job.target) {
      case kQ:
        w = {&own.w[kO]};
        break;
      case kO:
        w = {engine.dims.gated ? &own.w[kGate] : nullptr, &own.w[kUp]};
        break;
      case kGate:
      case kUp:
        w = {&own.w[kDown]};
        break;
      default:
        if (job.target == kDown && layer + 1 == engine.dims.layers) {
          w = {&engine.head};
        } else {
          const Layer& after = engine.layers[job.target == kDown ? size_t(layer) + 1 : 0];
          w = {&after.w[kQ], &after.w[kK], &after.w[kV]};
        }
    }
  }

  // Where a share of them begins; null where they are not known.
  const uint8_t* begin(int share) const {
    int all = 0;
    for (const Matrix* m : w) all += m ? m->strips() : 0;
    int first = all ? Strips(all).of_share(share) : 0;
    for (const Matrix* m : w) {
      if (m && first < m->strips()) return m->strip(first);
      if (m) first -= m->strips();
    }
    return nullptr;
  }
};

void linear_int8(const Engine& engine, int layer, const Activations& x, const LinearJob* jobs, int count) {
  int all = 0;
  for (int j = 0; j < count; j++) all += jobs[j].w->strips();
  const Strips strips(all);
  const Next next(engine, layer, jobs[0]);
  const int ahead = x.rows < kernels().fetch_rows ? 0 : kAhead;
  std::vector<const uint8_t*> waiting(static_cast<size_t>(strips.shares));  // behind what the product itself fetches ahead
  for (int i = 0; i < strips.shares; i++)
    if (const uint8_t* begin = next.begin(i)) waiting[size_t(i)] = begin + ahead;
  auto run = [&](int task, int) {
    const int share = strips.share_of(task);
    int first = strips.of_task(task), last = strips.of_task(task + 1), furthest = strips.of_share(share + 1);
    for (int j = 0; j < count && first < last; j++) {
      const LinearJob& job = jobs[j];
      const int own = job.w->strips(), begin = first < 0 ? 0 : first, end = last < own ? last : own;
      if (begin < end) {
        const Activations in = input_of(job, x);
        const ReadOn then{job.w->strip(std::min(furthest, own)), furthest > own ? jobs[j + 1].w->data : next.begin(share)};
        if (job.w->floating())
          kernels().gemm_float(*job.w, begin, end, in.f32, in.cols, in.rows, job.y, job.ldy, job.add);
        else
          kernels().gemm_i8(*job.w, begin, end, then, in.digits, in.q, in.blocks, in.rows, job.y, job.ldy, job.add);
        if (end == own && !job.add) clear_padding(job.y, in.rows, own * kStripRows, job.ldy);
      }
      first = first - own < 0 ? 0 : first - own;
      last -= own;
      furthest -= own;
    }
  };
  parallel_for(strips.tasks, run, waiting);
}

void adapters_int8(Engine& engine, const Activations& x, const LinearJob* jobs, int count, const Batch& batch, int layer) {
  constexpr int kRows = 4;
  struct Share {
    const LinearJob* job;
    Lora lora;
    int first, last;
  };
  std::vector<Share> shares;  // of all jobs: experts have a row or two each
  for (int j = 0; j < count; j++)
    for_adapter_runs(batch, layer, jobs[j], [&](const Lora& lora, int first, int last) {
      for (; first < last; first += kRows) shares.push_back({jobs + j, lora, first, std::min(first + kRows, last)});
    });
  // What a thread takes next is what comes next in memory: of an adapter, the factors of all jobs.
  std::ranges::stable_sort(shares, {}, [](const Share& share) { return share.job->row + share.first; });
  parallel_for(int(shares.size()), [&](int task, int thread) {
    const auto& [job, lora, first, last] = shares[size_t(task)];
    const Activations in = input_of(*job, x);
    const int rows = last - first;
    float* u = engine.thread_scratch[size_t(thread)].get<float>(size_t(rows) * lora.rank);
    auto apply = [&](const auto* a, int lda, const auto* bt, int ldb, auto shrink, auto expand) {
      shrink(in.f32 + size_t(first) * in.cols, in.cols, rows, a, lda, lora.scale, lora.rank, job->w->cols, u, lora.rank);
      expand(u, lora.rank, rows, bt, ldb, lora.rank, 0, job->w->rows, job->y + size_t(first) * job->ldy, job->ldy);
    };
    if (lora.a_low)
      apply(lora.a_low, round_up(lora.lda, kLoraCols), lora.bt_low, round_up(lora.ldb, kLoraCols), kernels().lora_shrink_bf16,
            kernels().lora_expand_bf16);
    else
      apply(lora.a, lora.lda, lora.bt, lora.ldb, kernels().lora_shrink_f32, kernels().lora_expand_f32);
  });
}

template <class T>
void linear_panels(Engine& engine, const Activations& x, const LinearJob* jobs, int count, const Batch& batch, int layer) {
  std::vector<PanelProduct<T>> products;
  std::vector<Activations> inputs;
  for (int j = 0; j < count; j++) {
    const LinearJob& job = jobs[j];
    const Activations& in = inputs.emplace_back(input_of(job, x));
    PanelProduct<T>& product = products.emplace_back();
    product = {{{job.w, Ops<T>::of(in), Ops<T>::stride(in)}}, {}, false, job.add, in.rows, job.w->rows, job.y, job.ldy};
    const int widest = widest_rank(batch, layer, job.target);
    if (!widest) continue;
    float* u = (job.u ? *job.u : engine.target_u[job.target]).get<float>(size_t(x.rows) * widest) + size_t(job.row) * widest;
    for_adapter_runs(batch, layer, job, [&](const Lora& lora, int first, int last) {
      for_shares(last - first, [&](int a, int b, int thread) {
        project_rows<T>(Ops<T>::of(in) + size_t(first + a) * Ops<T>::stride(in), Ops<T>::stride(in), b - a, lora.a, lora.lda,
                        job.w->cols, lora.rank, lora.scale, u + size_t(first + a) * widest, widest,
                        engine.thread_scratch[thread]);
      });
      product.low.push_back({u, lora.bt, widest, lora.ldb, lora.rank, job.w->rows, first, last});
    });
  }
  multiply_panels(engine, products, x.q ? inputs.data() : nullptr);
}

// x[rows][cols] as bf16 rows.
void to_low(const float* x, int rows, const Rows& to) {
  for_rows(rows, 32, [&](int first, int last) {
    for (int m = first; m < last; m++) to.end(m, x + size_t(m) * to.cols);
  });
}

// da and dbt of one linear, from the gradients du and dy.
template <class T>
void adapter_gradients(const Activations& x, const LinearBackwardJob& job, const Lora& lora, const T* dy, int ldy,
                       const float* du) {
  constexpr int chunk = 64;
  const int trained = lora.rank - lora.trained, a_chunks = (job.w->cols + chunk - 1) / chunk,
            b_chunks = (job.w->rows + chunk - 1) / chunk;
  parallel_for(a_chunks + b_chunks, [&](int task, int) {
    const bool is_a = task < a_chunks;
    const int width = is_a ? job.w->cols : job.w->rows, first = (is_a ? task : task - a_chunks) * chunk,
              last = std::min(first + chunk, width);
    if (is_a)
      Ops<T>::outer()(du + lora.trained, lora.rank, trained, Ops<T>::of(x), Ops<T>::stride(x), x.rows, first, last, lora.da,
                      lora.lda);
    else
      Ops<T>::outer()(job.u + lora.trained, lora.rank, trained, dy, ldy, x.rows, first, last, lora.dbt, lora.ldb);
  });
}

template <class T>
void backward_panels(Engine& engine, const Activations& x, const LinearBackwardJob* jobs, int count, const Batch& batch,
                     int layer, float* dx, int ldx) {
  size_t total = 0, total_u = 0;
  for (int j = 0; j < count; j++) {
    if (!jobs[j].dy_low) total += size_t(x.rows) * low_stride(jobs[j].ldy);
    if (const Lora* lora = lora_of(batch.lora(), layer, jobs[j].target)) total_u += size_t(x.rows) * lora->rank;
  }
  const int width = jobs[0].w->cols;
  T* low = std::is_same_v<T, bf16> ? engine.dy_low.get<T>(total) : nullptr;
  float* du = engine.du.get<float>(total_u + 1);
  std::vector<PanelProduct<T>> products{{{}, {}, true, false, x.rows, width, dx, ldx}};
  for (int j = 0; j < count; j++) {
    const LinearBackwardJob& job = jobs[j];
    const T* dy;
    int ldy = job.ldy;
    if constexpr (std::is_same_v<T, bf16>) {
      dy = job.dy_low;
      if (!dy) {
        ldy = low_stride(job.ldy);
        to_low(job.dy, x.rows, {nullptr, low, job.ldy, ldy});
        dy = low;
        low += size_t(x.rows) * ldy;
      }
    } else {
      dy = job.dy;
    }
    products[0].terms.push_back({job.w, dy, ldy});
    const Lora* lora = lora_of(batch.lora(), layer, job.target);
    if (!lora) continue;
    for_shares(x.rows, [&](int a, int b, int thread) {
      project_rows<T>(dy + size_t(a) * ldy, ldy, b - a, lora->bt, lora->ldb, job.w->rows, lora->rank, lora->scale,
                      du + size_t(a) * lora->rank, lora->rank, engine.thread_scratch[thread]);
    });
    products[0].low.push_back({du, lora->a, lora->rank, lora->lda, lora->rank, width, 0, x.rows});
    if (lora->da) adapter_gradients<T>(x, job, *lora, dy, ldy, du);
    du += size_t(x.rows) * lora->rank;
  }
  if (dx) multiply_panels<T>(engine, products, nullptr);
}

// Of the profile: products that share their input are one stage.
struct StageNames {
  const char *forward, *backward;
};
StageNames stage_of(int target) {
  switch (target) {
    case kQ:
    case kK:
    case kV:
      return {"q, k, v", "q, k, v: backward"};
    case kO:
      return {"attention output", "attention output: backward"};
    case kGate:
    case kUp:
    case kSharedGate:
    case kSharedUp:
      return {"gate, up", "gate, up: backward"};
    case kDown:
    case kSharedDown:
      return {"down", "down: backward"};
    default:
      return {"head", "head: backward"};  // and routers
  }
}

}  // namespace

Activations prepare(Mode mode, int digits, const float* x, int rows, int cols, Buffer& low, Buffer& q, Buffer& blocks) {
  if (!low_products(mode)) return prepare(mode, digits, rows_of(x, cols), rows, q, blocks);
  const Timed timed("activations to low precision");
  const Rows to = rows_for_products(mode, rows, cols, low, low);
  to_low(x, rows, to);
  return room_for(mode, digits, to, rows, q, blocks);
}

Activations prepare(Mode mode, int digits, const Rows& x, int rows, Buffer& q, Buffer& blocks) {
  const Timed timed("activations to low precision");
  const Activations a = room_for(mode, digits, x, rows, q, blocks);
  if (a.q)
    for_rows(rows, 8, [&](int first, int last) {
      for (int m = first; m < last; m++) quantize_row(a, m, 0, a.cols);
    });
  return a;
}

Activations room_for(Mode mode, int digits, const Rows& x, int rows, Buffer& q, Buffer& blocks) {
  Activations a{mode, rows, x.cols, digits, x.f32, x.low, nullptr, nullptr, x.ld};
  if (x.low || mode == Mode::f32 || !digits) return a;
  if (mode == Mode::bf16) a.digits = 2;
  if (a.digits == 2 && rows > 1 && kernels().words) a.digits = kWords;
  a.q = q.get<int8_t>(size_t(rows) * size_t(x.cols) * size_t(code_bytes(a.digits)));
  a.blocks = blocks.get<ActBlock>(size_t(rows) * size_t(x.cols / kTileCols));
  return a;
}

void quantize_row(const Activations& x, int row, int first, int count) {
  if (!x.q) return;
  const size_t at = size_t(row) * size_t(x.cols) + size_t(first);
  kernels().quantize(x.f32 + at, count, x.digits, x.q + at * size_t(code_bytes(x.digits)), x.blocks + at / kTileCols);
}

void linear(Engine& engine, const Activations& x, const LinearJob* jobs, int count, const Batch& batch, int layer) {
  if (x.mode == Mode::int8) {
    {
      const Timed timed(stage_of(jobs[0].target).forward);
      linear_int8(engine, layer, x, jobs, count);
    }
    const Timed timed("adapters");
    adapters_int8(engine, x, jobs, count, batch, layer);
  } else {
    const Timed timed(stage_of(jobs[0].target).forward);
    (low_products(x.mode) ? linear_panels<bf16> : linear_panels<float>)(engine, x, jobs, count, batch, layer);
  }
  for (int j = 0; j < count; j++)
    if (const float* bias = jobs[j].bias)
      for_rows(x.rows, 16, [&](int first, int last) {
        for (int m = first; m < last; m++) kernels().axpy(bias, 1, jobs[j].ldy, jobs[j].y + size_t(m) * jobs[j].ldy);
      });
}

void linear_backward(Engine& engine, const Activations& x, const LinearBackwardJob* jobs, int count, const Batch& batch,
                     int layer, float* dx, int ldx) {
  const Timed timed(stage_of(jobs[0].target).backward);
  if (low_products(x.mode))
    backward_panels<bf16>(engine, x, jobs, count, batch, layer, dx, ldx);
  else
    backward_panels<float>(engine, x, jobs, count, batch, layer, dx, ldx);
}

}  // namespace nomoat
