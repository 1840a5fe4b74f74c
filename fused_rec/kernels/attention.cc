// Softmax attention within the texts of a packed batch, for XLA on CPUs; fused_rec/text/encoders/packed.py calls it.
//
// Tokens of all texts lie one after the other, so nothing is padded. A head of a text fits in the cache: its keys are
// transposed once, for all heads of queries that share them, and scores of a few queries are computed, exponentiated and
// summed before those of the next. Of the keys outside of a window or after a causal query none is read.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "lanes.h"
#include "parts.h"
#include "tiles.h"

namespace ffi = xla::ffi;

namespace {

using fused_rec::at;
using fused_rec::kLanes;
using fused_rec::Lanes;
using fused_rec::Rows;

constexpr int64_t kQueries = 8;        // that are processed together
constexpr int64_t kPartsOfAThread = 16;
constexpr int64_t kSmall = 1 << 16;    // multiplications that one thread does sooner than it wakes another

struct Heads {
  const float *query, *key, *value;  // of a token: all heads one after the other
  const float* turns;  // of a token: the cosines, then the sines of its pairs of numbers; null for no rotation
  Rows out;
  int64_t heads, groups, width;  // groups: heads of keys, each for as many heads of queries; width: of a head
  int64_t window;                // a token attends to tokens less than so many places away
  bool causal;                   // and to none after it
  bool narrow;                   // whether factors are rounded to bfloat16, for tile registers (AMX)
};

// What the heads of a text share.
struct Scratch {
  std::vector<float> keys, scores;  // keys of one head, transposed
  int64_t text = -1, group = -1;    // whose keys they are

  float* keys_of(int64_t size) { return sized(keys, size); }
  static float* sized(std::vector<float>& x, int64_t size) {
    if (static_cast<int64_t>(x.size()) < size) x.resize(size);
    return x.data();
  }
};

// A head of a token with its pairs of numbers, i and i + half, rotated by rotary positions.
template <int64_t kWidth>
INLINE const float* turned(const float* x, const float* turns, float* to) {
  if (!turns) return x;
  constexpr int64_t kHalf = kWidth / 2;
  for (int64_t c = 0; c < kHalf; c += kLanes) {
    const Lanes first = at(x + c), second = at(x + kHalf + c), cosine = at(turns + c), sine = at(turns + kHalf + c);
    at(to + c) = first * cosine - second * sine;
    at(to + kHalf + c) = second * cosine + first * sine;
  }
  return to;
}

template <int64_t kWidth>
INLINE void transpose(const Heads& h, int64_t group, int64_t first, int64_t length, int64_t padded, float* keys) {
  float row[kWidth];
  for (int64_t j = 0; j < padded; ++j) {
    const int64_t token = first + std::min(j, length - 1);
    const float* const turns = h.turns ? h.turns + token * kWidth : nullptr;
    const float* const key = turned<kWidth>(h.key + (token * h.groups + group) * kWidth, turns, row);
    for (int64_t c = 0; c < kWidth; ++c) keys[c * padded + j] = key[c];
  }
}

// One head of the text of tokens first to last.
template <int64_t kWidth>
INLINE void attend(const Heads& h, int64_t head, int64_t first, int64_t last, Scratch& scratch) {
  const int64_t length = last - first, padded = (length + kLanes - 1) / kLanes * kLanes;
  const int64_t size = h.heads * kWidth, key_size = h.groups * kWidth, group = head / (h.heads / h.groups);
  float* const keys = scratch.keys_of(kWidth * padded);
  float* const scores = Scratch::sized(scratch.scores, kQueries * padded);
  const float* const query = h.query + first * size + head * kWidth;
  const float* const value = h.value + first * key_size + group * kWidth;
  if (scratch.text != first || scratch.group != group) {
    transpose<kWidth>(h, group, first, length, padded, keys);
    scratch.text = first, scratch.group = group;
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(kWidth));
  for (int64_t q = 0; q < length; q += kQueries) {
    float rotated[kQueries][kWidth];
    const float* of[kQueries];
    int64_t low[kQueries], high[kQueries];  // the keys that a query sees
    for (int64_t r = 0; r < kQueries; ++r) {
      const int64_t place = std::min(q + r, length - 1);
      of[r] = turned<kWidth>(query + place * size, h.turns ? h.turns + (first + place) * kWidth : nullptr, rotated[r]);
      low[r] = std::max<int64_t>(0, place + 1 - h.window);
      high[r] = h.causal ? place + 1 : std::min(length, place + h.window);
    }
    const int64_t begin = low[0] / kLanes * kLanes, end = high[kQueries - 1];
    const int64_t end_padded = (end + kLanes - 1) / kLanes * kLanes;
    for (int64_t j = begin; j < end_padded; j += kLanes) {
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
      Lanes most = Lanes{} - INFINITY;
      for (int64_t j = begin; j < end_padded; j += kLanes) {
        if (j < low[r] || j + kLanes > high[r]) {
          for (int64_t i = j; i < j + kLanes; ++i) row[i] = i < low[r] || i >= high[r] ? -INFINITY : row[i];
        }
        most = at(row + j) > most ? at(row + j) : most;
      }
      float highest = most[0];
      for (int64_t i = 1; i < kLanes; ++i) highest = std::max(highest, most[i]);
      Lanes total = {};
      for (int64_t j = begin; j < end_padded; j += kLanes) {
        total += at(row + j) = fused_rec::exponential(at(row + j) - highest);
      }
      normalizer[r] = fused_rec::sum(total);
    }
    constexpr int64_t kParts = kWidth / kLanes;
    for (int64_t part = 0; part < kParts; part += 2) {
      Lanes mixed[kQueries][2] = {};
      for (int64_t j = begin; j < end; ++j) {
        const float* const row = value + j * key_size + part * kLanes;
        const Lanes one = at(row), two = at(row + kLanes);
        for (int64_t r = 0; r < kQueries; ++r) {
          mixed[r][0] += scores[r * padded + j] * one;
          mixed[r][1] += scores[r * padded + j] * two;
        }
      }
      for (int64_t r = 0; r < std::min(kQueries, length - q); ++r) {
        const int64_t place = (first + q + r) * size + head * kWidth + part * kLanes;
        h.out.store(mixed[r][0] / normalizer[r], place);
        h.out.store(mixed[r][1] / normalizer[r], place + kLanes);
      }
    }
  }
}

// Pairs of a text and a head, from the first to before the last.
template <int64_t kWidth>
FOR_EACH_PROCESSOR void attend_pairs(Heads h, const int32_t* start, int64_t first, int64_t last) {
  Scratch scratch;
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t text = pair / h.heads;
    if (start[text] < start[text + 1]) attend<kWidth>(h, pair % h.heads, start[text], start[text + 1], scratch);
  }
}

#ifdef FUSED_REC_TILES

using fused_rec::kBytes;
using fused_rec::kDepth;
using fused_rec::kTile;

// What the heads of a text share in products of bfloat16.
struct Tiled {
  fused_rec::Storage keys, values;           // right tiles of a head
  std::unique_ptr<float[], fused_rec::Free> scores;
  std::unique_ptr<uint16_t[], fused_rec::Free> weights;
  int64_t room = 0, text = -1, group = -1;  // room: keys there is memory for; text, group: whose keys they are

  // Rows of scores and weights are a line longer, so that those of a column do not compete for one place in the cache.
  static int64_t line(int64_t padded) { return padded + kDepth; }

  void hold(int64_t padded, int64_t width) {
    if (padded <= room) return;
    keys = fused_rec::scratch<char>(padded * width * 2), values = fused_rec::scratch<char>(padded * width * 2);
    scores = fused_rec::scratch<float>(kDepth * line(padded));
    weights = fused_rec::scratch<uint16_t>(kDepth * line(padded));
    room = padded, text = -1;
  }
};

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16,prefer-vector-width=512")

INLINE __m512i narrowed(const float* x) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + kTile), _mm512_loadu_ps(x)));
}

// The tiles of a head's keys, transposed, and of its values; what lies after the text is 0.
template <int64_t kWidth>
INLINE void pack_head(const Heads& h, int64_t group, int64_t first, int64_t length, int64_t padded, Tiled& tiled) {
  constexpr int64_t kSteps = kWidth / kDepth;
  const auto at_token = [&](const float* x, int64_t j) { return x + ((first + j) * h.groups + group) * kWidth; };
  for (int64_t j = 0; j < padded; j += kTile) {
    __m512i rows[kSteps][kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      float row[kWidth] = {};
      const float* key = row;
      if (j + i < length) {
        const float* const turns = h.turns ? h.turns + (first + j + i) * kWidth : nullptr;
        key = turned<kWidth>(at_token(h.key, j + i), turns, row);
      }
      for (int64_t step = 0; step < kSteps; ++step) rows[step][i] = narrowed(key + step * kDepth);
    }
    for (int64_t step = 0; step < kSteps; ++step) {
      fused_rec::transpose(rows[step]);
      char* const to = tiled.keys.get() + (j / kTile * kSteps + step) * kBytes;
      for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(to + 64 * i, rows[step][i]);
    }
  }
  for (int64_t j = 0; j < padded; j += 2) {
    const float* const one = j < length ? at_token(h.value, j) : nullptr;
    const float* const other = j + 1 < length ? at_token(h.value, j + 1) : nullptr;
    char* const to = tiled.values.get() + j / kDepth * (kWidth / kTile) * kBytes + j % kDepth / 2 * 64;
    for (int64_t c = 0; c < kWidth; c += kTile) {
      const __m512i both = fused_rec::two_rows(one ? one + c : one, other ? other + c : other, kTile);
      _mm512_store_si512(to + c / kTile * kBytes, fused_rec::interleaved(both));
    }
  }
}

// Weights of the keys begin to end, multiples of 32, of which low to high are seen; returns their sum.
INLINE float softmax(float* scores, int64_t begin, int64_t end, int64_t low, int64_t high, uint16_t* weights) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t j = begin; j < end; j += kLanes) {
    __m512 x = _mm512_loadu_ps(scores + j);
    if (j < low || j + kLanes > high) {
      const auto below = [j](int64_t end) { return (1u << std::clamp<int64_t>(end - j, 0, kLanes)) - 1; };
      x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), below(high) & ~below(low), x);
      _mm512_storeu_ps(scores + j, x);
    }
    most = _mm512_max_ps(most, x);
  }
  const float highest = _mm512_reduce_max_ps(most);
  Lanes total = {};
  for (int64_t j = begin; j < end; j += kDepth) {
    const Lanes one = fused_rec::exponential(at(scores + j) - highest);
    const Lanes two = fused_rec::exponential(at(scores + j + kLanes) - highest);
    total += one + two;
    const auto both = _mm512_cvtne2ps_pbh(reinterpret_cast<const __m512&>(two), reinterpret_cast<const __m512&>(one));
    _mm512_store_si512(weights + j, reinterpret_cast<const __m512i&>(both));
  }
  return _mm512_reduce_add_ps(reinterpret_cast<const __m512&>(total));
}

// `attend` with products of bfloat16.
template <int64_t kWidth>
INLINE void attend_tiled(const Heads& h, int64_t head, int64_t first, int64_t last, Tiled& tiled) {
  constexpr int64_t kSteps = kWidth / kDepth, kBlocks = kWidth / kTile;
  const int64_t length = last - first, padded = fused_rec::padded(length), line = Tiled::line(padded);
  const int64_t size = h.heads * kWidth, group = head / (h.heads / h.groups);
  tiled.hold(padded, kWidth);
  if (tiled.text != first || tiled.group != group) {
    pack_head<kWidth>(h, group, first, length, padded, tiled);
    tiled.text = first, tiled.group = group;
  }
  float* const scores = tiled.scores.get();
  uint16_t* const weights = tiled.weights.get();
  const float scale = 1.0f / std::sqrt(static_cast<float>(kWidth));
  alignas(64) uint16_t queries[kDepth * kWidth];
  alignas(64) float mixed[kDepth * kDepth];
  for (int64_t q = 0; q < length; q += kDepth) {
    const int64_t there = std::min(kDepth, length - q);
    for (int64_t r = 0; r < kDepth; ++r) {
      const int64_t token = first + std::min(q + r, length - 1);
      float row[kWidth];
      const float* const turns = h.turns ? h.turns + token * kWidth : nullptr;
      const float* const query = turned<kWidth>(h.query + token * size + head * kWidth, turns, row);
      for (int64_t c = 0; c < kWidth; c += kLanes) {
        fused_rec::store_narrow(at(query + c) * scale, queries + r * kWidth + c);
      }
    }
    const int64_t begin = std::max<int64_t>(0, q + 1 - h.window) / kDepth * kDepth;
    const int64_t end = fused_rec::padded(h.causal ? q + there : std::min(length, q + there - 1 + h.window));
    for (int64_t j = begin; j < end; j += kDepth) {
      fused_rec::multiply({queries, 2 * kWidth, 64, 2 * kWidth * kTile},
                          {tiled.keys.get() + j / kTile * kSteps * kBytes, 64, kBytes, kSteps * kBytes}, kSteps,
                          scores + j, line, false);
    }
    float share[kDepth];
    for (int64_t r = 0; r < kDepth; ++r) {
      const int64_t place = std::min(q + r, length - 1), low = std::max<int64_t>(0, place + 1 - h.window);
      const int64_t high = h.causal ? place + 1 : std::min(length, place + h.window);
      share[r] = 1.0f / softmax(scores + r * line, begin, end, low, high, weights + r * line);
    }
    for (int64_t c = 0; c < kWidth; c += kDepth) {
      const char* const values = tiled.values.get() + (begin / kDepth * kBlocks + c / kTile) * kBytes;
      fused_rec::multiply({weights + begin, 2 * line, 64, 2 * line * kTile}, {values, 64, kBlocks * kBytes, kBytes},
                          (end - begin) / kDepth, mixed, kDepth, false);
      for (int64_t r = 0; r < there; ++r) {
        const int64_t place = (first + q + r) * size + head * kWidth + c;
        h.out.store(at(mixed + r * kDepth) * share[r], place);
        h.out.store(at(mixed + r * kDepth + kLanes) * share[r], place + kLanes);
      }
    }
  }
}

template <int64_t kWidth>
void attend_tiled_pairs(const Heads& h, const int32_t* start, int64_t first, int64_t last) {
  const fused_rec::TileRegisters registers;
  Tiled tiled;
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t text = pair / h.heads;
    if (start[text] < start[text + 1]) attend_tiled<kWidth>(h, pair % h.heads, start[text], start[text + 1], tiled);
  }
}

#pragma GCC pop_options

#endif  // FUSED_REC_TILES

template <int64_t kWidth>
void attend_all(ffi::ThreadPool pool, Heads h, const int32_t* start, int64_t texts) {
  double work = 0;
  for (int64_t t = 0; t < texts; ++t) work += std::pow(start[t + 1] - start[t], 2) * h.heads * kWidth;
  while (texts > 1 && start[texts - 1] == start[texts]) --texts;  // padded
  const int64_t pairs = texts * h.heads;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), work / kSmall));
  const int64_t count = threads == 1 ? 1 : std::min(pairs, threads * kPartsOfAThread);
  fused_rec::in_parts(pool, threads, count, [=](int64_t p) {
    const int64_t first = pairs * p / count, last = pairs * (p + 1) / count;
#ifdef FUSED_REC_TILES
    if (h.narrow) return attend_tiled_pairs<kWidth>(h, start, first, last);
#endif
    attend_pairs<kWidth>(h, start, first, last);
  });
}

using Matrix = ffi::Buffer<ffi::F32>;

ffi::Error attention(ffi::ThreadPool pool, Matrix query, Matrix key, Matrix value, ffi::Buffer<ffi::S32> start,
                     ffi::Buffer<ffi::S32> window, Matrix turns, int64_t heads, bool causal,
                     bool narrow, ffi::Result<ffi::AnyBuffer> out) {
  const auto shape = query.dimensions(), keys = key.dimensions(), values = value.dimensions();
  if (shape.size() != 2 || keys.size() != 2 || values.size() != 2 || keys[0] != shape[0] || values[0] != shape[0] ||
      keys[1] != values[1]) {
    return ffi::Error::InvalidArgument("queries, keys and values must be matrices of as many rows");
  }
  const int64_t texts = static_cast<int64_t>(start.element_count()) - 1, tokens = shape[0];
  const int32_t* const begin = start.typed_data();
  if (texts < 1 || begin[0] != 0 || begin[texts] > tokens || !std::is_sorted(begin, begin + texts + 1)) {
    return ffi::Error::InvalidArgument("start must ascend from 0 to the number of tokens at most");
  }
  if (heads < 1 || shape[1] % heads) return ffi::Error::InvalidArgument("heads must divide the columns of queries");
  const int64_t width = shape[1] / heads, groups = keys[1] / width;
  if (groups < 1 || keys[1] % width || heads % groups) {
    return ffi::Error::InvalidArgument("heads of keys must divide those of queries");
  }
  const bool turn = turns.element_count() > 0;
  if (turn && static_cast<int64_t>(turns.element_count()) != tokens * width) {
    return ffi::Error::InvalidArgument("each token must have half a cosine and a sine for each column of a head");
  }
  if (window.element_count() != 1 || *window.typed_data() < 1) {
    return ffi::Error::InvalidArgument("the window must be at least 1");
  }
#ifndef FUSED_REC_TILES
  if (narrow) return ffi::Error::InvalidArgument("this was compiled without tile registers");
#endif
  const auto rows = fused_rec::as_rows(*out, tokens * shape[1]);
  if (!rows) return ffi::Error::InvalidArgument("the result must have the shape of queries, in float or its parts");
  const Heads h{query.typed_data(), key.typed_data(), value.typed_data(), turn ? turns.typed_data() : nullptr, *rows,
                heads, groups, width, *window.typed_data(), causal, narrow};
  h.out.clear(begin[texts] * shape[1], tokens * shape[1]);
  switch (width) {
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
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("heads")
                                  .Attr<bool>("causal")
                                  .Attr<bool>("narrow")
                                  .Ret<ffi::AnyBuffer>());
