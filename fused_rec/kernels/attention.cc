// Softmax attention within the texts of a packed batch, for XLA on CPUs; fused_rec/text/encoders/packed.py calls it.
//
// Tokens of all texts lie one after the other, so nothing is padded. A head of a text fits in the cache: its keys are
// transposed once, and scores of a few queries are computed, exponentiated and summed before those of the next.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "parts.h"

namespace ffi = xla::ffi;

namespace {

using fused_rec::at;
using fused_rec::kLanes;
using fused_rec::Lanes;

constexpr int64_t kQueries = 8;        // that are processed together
constexpr int64_t kPartsOfAThread = 16;
constexpr int64_t kSmall = 1 << 16;    // multiplications that one thread does sooner than it wakes another

struct Heads {
  const float *query, *key, *value;  // of a token: all heads one after the other
  float* out;
  int64_t heads, width;  // width: of a head
};

// One head of the text of tokens first to last. scratch: transposed keys and scores.
template <int64_t kWidth>
INLINE void attend(const Heads& h, int64_t head, int64_t first, int64_t last, std::vector<float>& scratch) {
  const int64_t length = last - first, padded = (length + kLanes - 1) / kLanes * kLanes;
  const int64_t size = h.heads * kWidth, place = first * size + head * kWidth;
  scratch.resize((kWidth + kQueries) * padded);
  float* const keys = scratch.data();
  float* const scores = keys + kWidth * padded;
  const float *const query = h.query + place, *const key = h.key + place, *const value = h.value + place;
  for (int64_t j = 0; j < padded; ++j) {
    for (int64_t c = 0; c < kWidth; ++c) keys[c * padded + j] = j < length ? key[j * size + c] : 0.0f;
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(kWidth));
  for (int64_t q = 0; q < length; q += kQueries) {
    const float* of[kQueries];
    for (int64_t r = 0; r < kQueries; ++r) of[r] = query + std::min(q + r, length - 1) * size;
    for (int64_t j = 0; j < padded; j += kLanes) {
      Lanes sum[kQueries] = {};
      for (int64_t c = 0; c < kWidth; ++c) {
        const Lanes column = at(keys + c * padded + j);
        for (int64_t r = 0; r < kQueries; ++r) sum[r] += of[r][c] * column;
      }
      for (int64_t r = 0; r < kQueries; ++r) at(scores + r * padded + j) = sum[r] * scale;
    }
    float normalizer[kQueries];
    for (int64_t r = 0; r < kQueries; ++r) {
      float* const row = scores + r * padded;
      for (int64_t j = length; j < padded; ++j) row[j] = -INFINITY;
      Lanes high = at(row);
      for (int64_t j = kLanes; j < padded; j += kLanes) high = at(row + j) > high ? at(row + j) : high;
      float highest = high[0];
      for (int64_t i = 1; i < kLanes; ++i) highest = std::max(highest, high[i]);
      Lanes total = {};
      for (int64_t j = 0; j < padded; j += kLanes) total += at(row + j) = fused_rec::exponential(at(row + j) - highest);
      normalizer[r] = fused_rec::sum(total);
    }
    constexpr int64_t kParts = kWidth / kLanes;
    for (int64_t part = 0; part < kParts; part += 2) {
      Lanes mixed[kQueries][2] = {};
      for (int64_t j = 0; j < length; ++j) {
        const float* const row = value + j * size + part * kLanes;
        const Lanes one = at(row), two = at(row + kLanes);
        for (int64_t r = 0; r < kQueries; ++r) {
          mixed[r][0] += scores[r * padded + j] * one;
          mixed[r][1] += scores[r * padded + j] * two;
        }
      }
      for (int64_t r = 0; r < std::min(kQueries, length - q); ++r) {
        float* const row = h.out + place + (q + r) * size + part * kLanes;
        at(row) = mixed[r][0] / normalizer[r];
        at(row + kLanes) = mixed[r][1] / normalizer[r];
      }
    }
  }
}

// Pairs of a text and a head, from the first to before the last.
template <int64_t kWidth>
FOR_EACH_PROCESSOR void attend_pairs(Heads h, const int32_t* start, int64_t first, int64_t last) {
  std::vector<float> scratch;
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t text = pair / h.heads;
    if (start[text] < start[text + 1]) attend<kWidth>(h, pair % h.heads, start[text], start[text + 1], scratch);
  }
}

template <int64_t kWidth>
void attend_all(ffi::ThreadPool pool, Heads h, const int32_t* start, int64_t texts) {
  double work = 0;
  for (int64_t t = 0; t < texts; ++t) work += std::pow(start[t + 1] - start[t], 2) * h.heads * kWidth;
  while (texts > 1 && start[texts - 1] == start[texts]) --texts;  // padded
  const int64_t pairs = texts * h.heads;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), work / kSmall));
  const int64_t count = threads == 1 ? 1 : std::min(pairs, threads * kPartsOfAThread);
  fused_rec::in_parts(pool, threads, count, [=](int64_t p) {
    attend_pairs<kWidth>(h, start, pairs * p / count, pairs * (p + 1) / count);
  });
}

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::F32> key,
                     ffi::Buffer<ffi::F32> value, ffi::Buffer<ffi::S32> start, int64_t heads,
                     ffi::ResultBuffer<ffi::F32> out) {
  const auto shape = out->dimensions();
  for (const auto& rows : {query, key, value}) {
    const auto other = rows.dimensions();
    if (shape.size() == 2 && other.size() == 2 && other[0] == shape[0] && other[1] == shape[1]) continue;
    return ffi::Error::InvalidArgument("queries, keys, values and the result must be matrices of one shape");
  }
  const int64_t texts = static_cast<int64_t>(start.element_count()) - 1;
  const int32_t* const begin = start.typed_data();
  if (texts < 1 || begin[0] != 0 || begin[texts] > shape[0] || !std::is_sorted(begin, begin + texts + 1)) {
    return ffi::Error::InvalidArgument("start must ascend from 0 to the number of tokens at most");
  }
  if (heads < 1 || shape[1] % heads) return ffi::Error::InvalidArgument("heads must divide the columns of the result");
  const Heads h{query.typed_data(), key.typed_data(), value.typed_data(), out->typed_data(), heads, shape[1] / heads};
  std::memset(h.out + begin[texts] * shape[1], 0, (shape[0] - begin[texts]) * shape[1] * sizeof(float));
  switch (h.width) {
    case 32: attend_all<32>(pool, h, begin, texts); break;
    case 64: attend_all<64>(pool, h, begin, texts); break;
    case 96: attend_all<96>(pool, h, begin, texts); break;
    case 128: attend_all<128>(pool, h, begin, texts); break;
    default: return ffi::Error::InvalidArgument("a head must have 32, 64, 96 or 128 columns");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("heads")
                                  .Ret<ffi::Buffer<ffi::F32>>());
