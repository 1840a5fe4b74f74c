// Of each row of scores the k best, and how often held-out items lie above others, for XLA on CPUs;
// fused_rec/evaluation/ranking.py and metrics.py call them.
//
// The greatest score of each column of items comes first: outside the k best columns is none of the k best scores.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "parts.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMostColumns = 2048;
constexpr int64_t kMore = 4;           // columns beyond k that do no harm
constexpr int64_t kPartsOfAThread = 4;
constexpr int64_t kSmall = 1 << 15;    // scores that one thread reads sooner than it wakes another
constexpr float kLeast = -std::numeric_limits<float>::infinity();
constexpr uint32_t kExponent = 0x7f800000;  // all set: NaN or infinity

struct Found {
  float score;
  int32_t place, item;  // place: in the order of equal scores
};

inline bool before(const Found& a, const Found& b) {
  return a.score > b.score || (a.score == b.score && a.place < b.place);
}

// How many columns n items stand in, item i in column i % columns: finding the k best columns then takes about as long
// as finding the k best items in them.
int64_t columns_of(int64_t n, int64_t k) {
  int64_t columns = 64;
  while (2 * columns < kMostColumns && columns * columns < n * k) columns *= 2;
  return columns + 16;  // no power of two: a column of those would lie in few lines of the cache
}

// The greatest eligible score of each column. Returns whether all scores, eligible or not, are finite.
FOR_EACH_PROCESSOR bool greatest_of_columns(const float* scores, const uint8_t* eligible, int64_t n, int64_t columns,
                                            float* greatest) {
  float strange[kMostColumns] = {};  // NaN where a score is not finite
  std::fill(greatest, greatest + columns, kLeast);
  for (int64_t begin = 0; begin < n; begin += columns) {
    const int64_t width = std::min(columns, n - begin);
    const float* row = scores + begin;
    const uint8_t* may = eligible + begin;
    for (int64_t c = 0; c < width; ++c) {
      const float score = may[c] ? row[c] : kLeast;
      greatest[c] = score > greatest[c] ? score : greatest[c];
      strange[c] += row[c] * 0.0f;
    }
  }
  int32_t any = 0;
  for (int64_t c = 0; c < columns; ++c) any |= strange[c] != 0.0f;
  return !any;
}

// Numbers in the order of the scores they stand for, and back.
inline int32_t number_of(float score) {
  int32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float score_of(int32_t number) {
  const int32_t bits = number ^ ((number >> 31) & 0x7fffffff);
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// A score that at least k of the n reach, and hardly more than k: counting all of them a few times takes less than
// selecting among them.
FOR_EACH_PROCESSOR float reached_by(const float* scores, int64_t n, int64_t k) {
  int64_t low = number_of(kLeast), high = number_of(*std::max_element(scores, scores + n)) + int64_t{1};
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const float score = score_of(static_cast<int32_t>(middle));
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += scores[i] >= score;
    if (count < k) high = middle;
    else low = middle;
    if (k <= count && count <= k + kMore) break;
  }
  return score_of(static_cast<int32_t>(low));
}

// found: room for n. Returns whether all scores are finite.
bool best_of_row(const float* scores, const bool* eligible, const int32_t* place, int64_t n, int64_t k, Found* found,
                 int32_t* items, float* top) {
  const uint8_t* may = reinterpret_cast<const uint8_t*>(eligible);
  const int64_t columns = columns_of(n, k);
  float greatest[kMostColumns];
  const bool finite = greatest_of_columns(scores, may, n, columns, greatest);
  // k columns have a score of at least this, so the k best are no worse.
  const float least = k <= columns ? reached_by(greatest, columns, k) : kLeast;
  int64_t count = 0;
  for (int64_t c = 0; c < std::min(columns, n); ++c) {
    if (greatest[c] < least) continue;
    for (int64_t i = c; i < n; i += columns) {
      if (may[i] && scores[i] >= least) found[count++] = {scores[i], place[i], static_cast<int32_t>(i)};
    }
  }
  const int64_t there = std::min(count, k);
  if (count > 2 * k) {
    std::nth_element(found, found + k - 1, found + count, before);
    count = k;
  }
  std::sort(found, found + count, before);
  for (int64_t rank = 0; rank < k; ++rank) {
    items[rank] = rank < there ? found[rank].item : -1;
    top[rank] = rank < there ? found[rank].score + 0.0f : kLeast;  // + 0: 0 for -0
  }
  return finite;
}

// other: room for n. The share of (held-out item, other item) pairs whose held-out item scores higher, ties half.
FOR_EACH_PROCESSOR float auc_of_row(const float* scores, const bool* compared, int64_t n, const int32_t* truth,
                                         int64_t n_truth, float* other) {
  const uint8_t* may = reinterpret_cast<const uint8_t*>(compared);
  int32_t pairs = 0;
  for (int64_t i = 0; i < n; ++i) {
    pairs += may[i];
    other[i] = may[i] ? scores[i] : std::numeric_limits<float>::infinity();  // above every score
  }
  float total = 0;
  for (int64_t t = 0; t < n_truth; ++t) {
    const float score = scores[truth[t]];
    int32_t twice = 0;  // exact: 2 I < 2^31
    for (int64_t i = 0; i < n; ++i) twice += (other[i] < score) + (other[i] <= score);
    total += static_cast<float>(twice) / static_cast<float>(2 * pairs);
  }
  return total / static_cast<float>(n_truth);
}

// Row by row, by as many threads as the work is worth; `of_rows` is of (first row, last row).
template <typename OfRows>
void over_rows(ffi::ThreadPool pool, int64_t rows, int64_t width, OfRows of_rows) {
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), rows * width / kSmall));
  const int64_t count = threads == 1 ? 1 : threads * kPartsOfAThread;
  fused_rec::in_parts(pool, threads, count, [=](int64_t p) { of_rows(p * rows / count, (p + 1) * rows / count); });
}

ffi::Error best(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> scores, ffi::Buffer<ffi::PRED> eligible,
                ffi::Buffer<ffi::S32> place, ffi::ResultBuffer<ffi::S32> items, ffi::ResultBuffer<ffi::F32> top,
                ffi::ResultBuffer<ffi::PRED> finite) {
  const auto shape = scores.dimensions(), lists = items->dimensions();
  if (shape.size() != 2 || lists.size() != 2 || lists[0] != shape[0] || lists[1] < 1) {
    return ffi::Error::InvalidArgument("scores and items must be matrices of as many rows, and lists not empty");
  }
  if (eligible.element_count() != scores.element_count() || place.element_count() != shape[1] ||
      top->element_count() != items->element_count() || finite->element_count() != shape[0]) {
    return ffi::Error::InvalidArgument("there must be an eligibility for each score and a place for each item");
  }
  const int64_t n = shape[1], k = lists[1];
  const float* of = scores.typed_data();
  const bool* may = eligible.typed_data();
  const int32_t* places = place.typed_data();
  int32_t* to_items = items->typed_data();
  float* to_top = top->typed_data();
  bool* to_finite = finite->typed_data();
  over_rows(pool, shape[0], n, [=](int64_t first, int64_t last) {
    std::vector<Found> found(n);
    for (int64_t row = first; row < last; ++row) {
      to_finite[row] = best_of_row(of + row * n, may + row * n, places, n, k, found.data(), to_items + row * k,
                                   to_top + row * k);
    }
  });
  return ffi::Error::Success();
}

ffi::Error auc(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> scores, ffi::Buffer<ffi::PRED> compared,
               ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> truth, ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = scores.dimensions();
  if (shape.size() != 2 || compared.element_count() != scores.element_count() ||
      start.element_count() != shape[0] + 1 || y->element_count() != shape[0]) {
    return ffi::Error::InvalidArgument("scores and compared must be matrices alike, and start one longer than rows");
  }
  const int64_t n = shape[1];
  const float* of = scores.typed_data();
  const bool* with = compared.typed_data();
  const int32_t *starts = start.typed_data(), *items = truth.typed_data();
  float* to = y->typed_data();
  over_rows(pool, shape[0], n, [=](int64_t first, int64_t last) {
    std::vector<float> other(n);
    for (int64_t row = first; row < last; ++row) {
      to[row] = auc_of_row(of + row * n, with + row * n, n, items + starts[row], starts[row + 1] - starts[row],
                           other.data());
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_best, best,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::PRED>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_auc, auc,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
