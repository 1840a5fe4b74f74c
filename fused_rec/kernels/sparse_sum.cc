// y[v] = sum over the edges e of row v of weight[e] * scale[from[e]] * x[from[e]], for XLA on CPUs, of all rows or of
// some; and its transpose for some rows. fused_rec/graph/spmm.py calls them.
//
// The time goes into fetching the rows of x, which lie anywhere: they are asked for some edges ahead, and the sum stays
// in registers until its row is done. Each row is summed by one thread in the order of its edges, so the result does
// not depend on how many threads there are.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parts.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kAhead = 16;         // edges
constexpr int64_t kLine = 64;          // bytes that are fetched at once
constexpr int64_t kNumbers = kLine / sizeof(float);
constexpr int64_t kSmall = 1 << 15;    // multiplications that one thread does sooner than it wakes another
constexpr int64_t kPartsOfAThread = 8;  // so that one who starts late, or has the long rows, holds nobody up

struct Edges {
  const int32_t* start;   // of each row, and the end of the last
  const int32_t* from;    // rows of x
  const float* weight;
  const float* scale;     // of the rows of x; null: 1
};

inline float widened(float x) { return x; }

inline float widened(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Columns c to c + kWidth of the rows first to last of y, which are these rows of the sums, or some: rows[first] and so
// on. The edges end at `end`.
template <int64_t kWidth, typename X>
FOR_EACH_PROCESSOR void sum_columns(Edges edges, const X* x, int64_t width, int64_t c, float* y, int64_t first,
                                    int64_t last, const int32_t* rows, int64_t end) {
  for (int64_t v = first; v < last; ++v) {
    const int64_t row_of_sums = rows ? rows[v] : v;
    if (rows && v > first && rows[v] == rows[v - 1]) {  // padding of a batch is one row again and again
      std::memcpy(y + v * width + c, y + (v - 1) * width + c, kWidth * sizeof(float));
      continue;
    }
    float sum[kWidth] = {};
    for (int64_t e = edges.start[row_of_sums]; e < edges.start[row_of_sums + 1]; ++e) {
      if (e + kAhead < end) {
        const char* next = reinterpret_cast<const char*>(x + edges.from[e + kAhead] * width + c);
        for (int64_t byte = 0; byte < static_cast<int64_t>(kWidth * sizeof(X)); byte += kLine) {
          __builtin_prefetch(next + byte);
        }
      }
      const float weight = edges.scale ? edges.weight[e] * edges.scale[edges.from[e]] : edges.weight[e];
      const X* row = x + edges.from[e] * width + c;
      for (int64_t i = 0; i < kWidth; ++i) sum[i] += weight * widened(row[i]);
    }
    std::memcpy(y + v * width + c, sum, sizeof sum);
  }
}

template <typename X>
void sum_rows(Edges edges, const X* x, int64_t width, float* y, int64_t first, int64_t last, const int32_t* rows,
              int64_t end) {
  int64_t c = 0;
  for (; c + 128 <= width; c += 128) sum_columns<128>(edges, x, width, c, y, first, last, rows, end);
  for (; c + 64 <= width; c += 64) sum_columns<64>(edges, x, width, c, y, first, last, rows, end);
  for (; c + 16 <= width; c += 16) sum_columns<16>(edges, x, width, c, y, first, last, rows, end);
  for (; c < width; ++c) sum_columns<1>(edges, x, width, c, y, first, last, rows, end);
}

// z[from[e]] += weight[e] * y[v] over the edges e of rows[v], in kWidth columns from c on, or, unless kAll, in the first
// `some` of them; for the rows u of z with u mod parts = part.
template <int64_t kWidth, bool kAll>
FOR_EACH_PROCESSOR void spread_columns(Edges edges, const int32_t* rows, int64_t count, const float* y, int64_t width,
                                       int64_t c, float* z, int64_t part, int64_t parts, int64_t some) {
  const int64_t columns = kAll ? kWidth : some;
  for (int64_t v = 0; v < count; ++v) {
    const float* whole = y + v * width;  // what is left out does not depend on how many threads there are
    bool zero = true;  // std::all_of is not compiled for each processor, and doubled the time of a call
    for (int64_t i = 0; i < width; ++i) zero &= whole[i] == 0.0f;
    if (zero) continue;  // padding of a batch
    float of[kWidth];
    std::memcpy(of, whole + c, columns * sizeof(float));
    const int64_t end = edges.start[rows[v] + 1];
    for (int64_t e = edges.start[rows[v]]; e < end; ++e) {
      if (parts > 1 && edges.from[e] % parts != part) continue;
      if (e + kAhead < end) {
        const float* next = z + edges.from[e + kAhead] * width + c;
        for (int64_t line = 0; line < kWidth; line += kNumbers) __builtin_prefetch(next + line, 1);
      }
      float* to = z + edges.from[e] * width + c;
      for (int64_t i = 0; i < columns; ++i) to[i] += edges.weight[e] * of[i];
    }
  }
}

// The columns first to last of z, for the rows u with u mod parts = part.
void spread_rows(Edges edges, const int32_t* rows, int64_t count, const float* y, int64_t width, float* z, int64_t first,
                 int64_t last, int64_t part, int64_t parts) {
  int64_t c = first;
  for (; c + 128 <= last; c += 128) spread_columns<128, true>(edges, rows, count, y, width, c, z, part, parts, 128);
  for (; c + 64 <= last; c += 64) spread_columns<64, true>(edges, rows, count, y, width, c, z, part, parts, 64);
  for (; c + 32 <= last; c += 32) spread_columns<32, true>(edges, rows, count, y, width, c, z, part, parts, 32);
  for (; c + 16 <= last; c += 16) spread_columns<16, true>(edges, rows, count, y, width, c, z, part, parts, 16);
  if (c < last) spread_columns<16, false>(edges, rows, count, y, width, c, z, part, parts, last - c);
}

// Where part number p of `parts` begins: rows and edges before it are p / parts of all.
int64_t beginning(const int32_t* start, int64_t rows, int64_t p, int64_t parts) {
  const int64_t before = (start[rows] + rows) * p / parts;
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (start[middle] + middle < before) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <typename X>
void sum(ffi::ThreadPool pool, Edges edges, const X* x, int64_t rows, int64_t width, float* y) {
  const int64_t work = (edges.start[rows] + rows) * width;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), work / kSmall));
  const int64_t count = threads == 1 ? 1 : threads * kPartsOfAThread;
  fused_rec::on_large_pages(y, rows * width * sizeof(float));
  fused_rec::in_parts(pool, threads, count, [=](int64_t p) {
    const int64_t last = p + 1 == count ? rows : beginning(edges.start, rows, p + 1, count);
    sum_rows(edges, x, width, y, beginning(edges.start, rows, p, count), last, nullptr, edges.start[last]);
  });
}

// How many threads share the edges of some rows.
int64_t threads_of(ffi::ThreadPool pool, Edges edges, const int32_t* rows, int64_t count, int64_t width) {
  int64_t work = 0;
  for (int64_t v = 0; v < count; ++v) work += edges.start[rows[v] + 1] - edges.start[rows[v]];
  return std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), work * width / kSmall));
}

template <typename X>
void sum_some(ffi::ThreadPool pool, Edges edges, const X* x, const int32_t* rows, int64_t count, int64_t width,
              int64_t end, float* y) {
  const int64_t threads = threads_of(pool, edges, rows, count, width);
  const int64_t parts = threads == 1 ? 1 : threads * kPartsOfAThread;
  fused_rec::in_parts(pool, threads, parts, [=](int64_t p) {
    sum_rows(edges, x, width, y, count * p / parts, count * (p + 1) / parts, rows, end);
  });
}

// Whether all rows are among the `count` rows that there are.
bool inside(ffi::Buffer<ffi::S32> rows, int64_t count) {
  const int32_t *first = rows.typed_data(), *last = first + rows.element_count();
  return std::all_of(first, last, [=](int32_t row) { return row >= 0 && row < count; });
}

ffi::Error neighbor_sum(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> from,
                        ffi::Buffer<ffi::F32> weight, ffi::Buffer<ffi::F32> scale, ffi::AnyBuffer x,
                        ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = y->dimensions(), of_x = x.dimensions();
  if (shape.size() != 2 || of_x.size() != 2 || of_x[1] != shape[1]) {
    return ffi::Error::InvalidArgument("x and y must be matrices of one width");
  }
  if (static_cast<int64_t>(start.element_count()) != shape[0] + 1) {
    return ffi::Error::InvalidArgument("start must have one number more than y has rows");
  }
  if (from.element_count() != weight.element_count()) {
    return ffi::Error::InvalidArgument("there must be one weight for each edge");
  }
  if (scale.element_count() && static_cast<int64_t>(scale.element_count()) != of_x[0]) {
    return ffi::Error::InvalidArgument("there must be one factor for each row of x");
  }
  const float* factors = scale.element_count() ? scale.typed_data() : nullptr;
  const Edges edges{start.typed_data(), from.typed_data(), weight.typed_data(), factors};
  switch (x.element_type()) {
    case ffi::F32:
      sum(pool, edges, x.typed_data<float>(), shape[0], shape[1], y->typed_data());
      return ffi::Error::Success();
    case ffi::BF16:
      sum(pool, edges, static_cast<const uint16_t*>(x.untyped_data()), shape[0], shape[1], y->typed_data());
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("x must be float32 or bfloat16");
  }
}

// Of y only some rows: y[b] is the sum of the row rows[b].
ffi::Error neighbor_sum_of(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> from,
                           ffi::Buffer<ffi::F32> weight, ffi::Buffer<ffi::F32> scale, ffi::AnyBuffer x,
                           ffi::Buffer<ffi::S32> rows, ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = y->dimensions(), of_x = x.dimensions();
  const int64_t edges_of = static_cast<int64_t>(start.element_count()) - 1;
  if (shape.size() != 2 || of_x.size() != 2 || of_x[1] != shape[1] || scale.element_count() != of_x[0]) {
    return ffi::Error::InvalidArgument("x and y must be matrices of one width, with one factor for each row of x");
  }
  if (static_cast<int64_t>(rows.element_count()) != shape[0] || !inside(rows, edges_of)) {
    return ffi::Error::InvalidArgument("there must be one row of the sums for each row of y");
  }
  const Edges edges{start.typed_data(), from.typed_data(), weight.typed_data(), scale.typed_data()};
  const int64_t end = edges.start[edges_of];
  switch (x.element_type()) {
    case ffi::F32:
      sum_some(pool, edges, x.typed_data<float>(), rows.typed_data(), shape[0], shape[1], end, y->typed_data());
      return ffi::Error::Success();
    case ffi::BF16:
      sum_some(pool, edges, static_cast<const uint16_t*>(x.untyped_data()), rows.typed_data(), shape[0], shape[1], end,
               y->typed_data());
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("x must be float32 or bfloat16");
  }
}

// The transpose: z[u] = sum over the edges e of each row rows[b] with from[e] = u of weight[e] * y[b].
ffi::Error spread_from(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> from,
                       ffi::Buffer<ffi::F32> weight, ffi::Buffer<ffi::F32> y, ffi::Buffer<ffi::S32> rows,
                       ffi::ResultBuffer<ffi::F32> z) {
  const auto shape = z->dimensions(), of_y = y.dimensions();
  if (shape.size() != 2 || of_y.size() != 2 || of_y[1] != shape[1]) {
    return ffi::Error::InvalidArgument("y and z must be matrices of one width");
  }
  if (from.element_count() != weight.element_count() || static_cast<int64_t>(rows.element_count()) != of_y[0] ||
      !inside(rows, static_cast<int64_t>(start.element_count()) - 1)) {
    return ffi::Error::InvalidArgument("there must be one weight for each edge, and one row of the sums for each row of y");
  }
  const Edges edges{start.typed_data(), from.typed_data(), weight.typed_data(), nullptr};
  const int64_t width = shape[1], count = of_y[0], numbers = shape[0] * width;
  const int32_t* chosen = rows.typed_data();
  const float* of = y.typed_data();
  float* to = z->typed_data();
  fused_rec::on_large_pages(to, numbers * sizeof(float));
  const int64_t clearing = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), numbers / kSmall));
  fused_rec::in_parts(pool, clearing, clearing, [=](int64_t p) {
    std::fill(to + numbers * p / clearing, to + numbers * (p + 1) / clearing, 0.0f);
  });
  // Threads share the columns, as far as each has whole cache lines: all read all edges, and none has to ask of each
  // edge whether it is its own. Where there are more threads, they share the rows of z as well.
  const int64_t threads = threads_of(pool, edges, chosen, count, width), lines = (width + kNumbers - 1) / kNumbers;
  const int64_t by_column = std::max<int64_t>(1, std::min(threads, lines)), by_row = threads / by_column;
  fused_rec::in_parts(pool, threads, by_column * by_row, [=](int64_t p) {
    const int64_t block = p % by_column;
    const int64_t first = lines * block / by_column * kNumbers, last = lines * (block + 1) / by_column * kNumbers;
    spread_rows(edges, chosen, count, of, width, to, first, std::min(last, width), p / by_column, by_row);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_neighbor_sum, neighbor_sum,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_neighbor_sum_of, neighbor_sum_of,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_spread_from, spread_from,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
