// The full softmax cross-entropy with its derivatives, of bfloat16 by tile registers, for XLA on CPUs;
// fused_rec/model/cross_entropy.py calls it.
//
// Logits are computed twice, once for the normalizers and once for the derivatives, in blocks that stay in the cache:
// that is sooner done than writing and reading them. Parts are of the same items for any number of threads, and their
// sums are added in order, so the result does not depend on how many threads there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "parts.h"
#include "tiles.h"

namespace ffi = xla::ffi;

#ifdef FUSED_REC_TILES

namespace {

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")

using namespace fused_rec;

constexpr int64_t kItems = 128;       // whose derivatives are computed together
constexpr int64_t kUsers = 512;       // likewise
constexpr int64_t kPartItems = 1024;  // of a part, at least
constexpr int64_t kSums = 1 << 24;    // floats of the sums of all parts, at most
constexpr float kLowest = -1e38f;     // below every logit that counts

// As `exponential` in lanes.h, but 0 below -87, since items outside of the denominator must not count at all, and NaN
// stays.
INLINE __m512 exponential(__m512 x) {
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);  // and NaN, which stays
  const __m512 n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, the first of few bits
  __m512 e = f * (1.0f / 5040) + 1.0f / 720;
  e = e * f + 1.0f / 120;
  e = e * f + 1.0f / 24;
  e = e * f + 1.0f / 6;
  e = e * f + 0.5f;
  e = e * f + 1.0f;
  e = e * f + 1.0f;
  return _mm512_maskz_scalef_ps(counts, e, n);
}

// A user and a positive item; repeated ones are one, with the sum of their weights.
struct Positive {
  int64_t item, user;
  float weight, logit;
};

struct Problem {
  Matrix<uint16_t> user, catalogue;
  const float* bias;
  float inverse;  // of the temperature
  std::vector<Positive> positives;
  std::vector<float> whole, normalizer;  // of each user: the sum of weights; the logarithm of the sum of exponentials
  std::unique_ptr<char[], Free> right_of_transpose, right;  // tiles of the users' embeddings: [K, B] and [B, K]
  int64_t users, width;  // padded

  int64_t steps() const { return width / kDepth; }
  // Tiles of [K, B], those of a user one after the other; of [B, K], those of 32 users one after the other.
  char* of_users(int64_t u) const { return right_of_transpose.get() + u / kTile * steps() * kBytes; }
  char* over_users(int64_t u) const { return right.get() + u / kDepth * (width / kTile) * kBytes; }
};

// Products of 32 items, whose tiles are given, with 32 users.
INLINE void products(const Problem& problem, const char* items, int64_t user, float* out) {
  const int64_t across = problem.steps() * kBytes;
  multiply({items, 64, kBytes, across}, {problem.of_users(user), 64, kBytes, across}, problem.steps(), out, kDepth,
           false);
}

INLINE float bias_of(const Problem& problem, int64_t item) {
  return item < problem.catalogue.rows ? problem.bias[item] : -INFINITY;
}

// For each user the highest logit of the items first to last, and the sum of the exponentials of the others less it.
void normalize_part(const Problem& problem, int64_t first, int64_t last, float* highest, float* sum) {
  TileRegisters registers;
  auto items = scratch<char>(2 * problem.steps() * kBytes);
  alignas(64) float block[kDepth * kDepth];
  std::fill(highest, highest + problem.users, kLowest);
  std::fill(sum, sum + problem.users, 0.0f);
  for (int64_t i = first; i < last; i += kDepth) {
    for (int64_t row = 0; row < kDepth; row += kTile) {
      left_tiles(problem.catalogue, i + row, items.get() + row * problem.width * 2, kBytes);
    }
    for (int64_t u = 0; u < problem.users; u += kTile) {
      if (u % kDepth == 0) products(problem, items.get(), u, block);
      float* const column = block + u % kDepth;
      const __m512 before = _mm512_loadu_ps(highest + u);
      __m512 high = before, total = _mm512_setzero_ps();
      for (int64_t row = 0; row < kDepth; ++row) {
        const __m512 logit = _mm512_load_ps(column + row * kDepth) * problem.inverse + bias_of(problem, i + row);
        _mm512_store_ps(column + row * kDepth, logit);
        high = _mm512_max_ps(high, logit);
      }
      for (int64_t row = 0; row < kDepth; ++row) total += exponential(_mm512_load_ps(column + row * kDepth) - high);
      total += _mm512_loadu_ps(sum + u) * exponential(before - high);
      _mm512_storeu_ps(highest + u, high);
      _mm512_storeu_ps(sum + u, total);
    }
  }
}

// Derivatives by the logits of 128 items and up to 512 users.
struct Slopes {
  // Left tiles of [items, users] and right tiles of the same, those of 16 users one after the other.
  std::unique_ptr<char[], Free> left = scratch<char>(2 * kItems * kUsers);
  std::unique_ptr<char[], Free> right = scratch<char>(2 * kItems * kUsers);

  // 16 items from i on, of the block, as rows; 32 users a tile.
  char* left_tile(int64_t i, int64_t u) const { return left.get() + (i / kTile * (kUsers / kDepth) + u / kDepth) * kBytes; }
  // 32 items from i on as pairs, 16 users a tile.
  char* right_tile(int64_t i, int64_t u) const { return right.get() + (u / kTile * (kItems / kDepth) + i / kDepth) * kBytes; }

  void set(int64_t i, int64_t u, uint16_t value) const {
    std::memcpy(left_tile(i, u) + i % kTile * 64 + u % kDepth * 2, &value, 2);
    std::memcpy(right_tile(i, u) + i % kDepth / 2 * 64 + u % kTile * 4 + i % 2 * 2, &value, 2);
  }
};

// The slopes of softmax by 32 items, number i of the block on, and users from `user` on, number u of theirs on.
INLINE void slopes_of(const Problem& problem, const float* block, int64_t item, int64_t user, int64_t i, int64_t u,
                      const Slopes& slopes) {
  for (int64_t half = 0; half < kDepth; half += kTile) {
    const __m512 normalizer = _mm512_loadu_ps(problem.normalizer.data() + user + half);
    const __m512 scale = _mm512_loadu_ps(problem.whole.data() + user + half) * problem.inverse;
    for (int64_t row = 0; row < kDepth; row += 2) {
      __m512 value[2];
      for (int64_t one = 0; one < 2; ++one) {
        const __m512 logit = _mm512_load_ps(block + (row + one) * kDepth + half) * problem.inverse;
        value[one] = exponential(logit + bias_of(problem, item + row + one) - normalizer) * scale;
      }
      const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value[1], value[0]));
      char* const left = slopes.left_tile(i + row, u) + row % kTile * 64 + half * 2;
      _mm256_store_si256(reinterpret_cast<__m256i*>(left), _mm512_castsi512_si256(both));
      _mm256_store_si256(reinterpret_cast<__m256i*>(left + 64), _mm512_extracti64x4_epi64(both, 1));
      _mm512_store_si512(slopes.right_tile(i, u + half) + row / 2 * 64, interleaved(both));
    }
  }
}

inline uint16_t rounded(float x) {
  return reinterpret_cast<__v8hi>(_mm_cvtneps_pbh(_mm_set_ss(x)))[0];
}

// The derivatives by the items first to last, and their share of those by users: float32 [K, B], padded.
void derive_part(const Problem& problem, int64_t first, int64_t last, float* by_catalogue, float* by_user) {
  TileRegisters registers;
  const int64_t width = problem.width, along = kItems / kDepth;
  auto items = scratch<char>(2 * kItems * width), across = scratch<char>(2 * kItems * width);
  auto sums = scratch<float>(kItems * width);
  alignas(64) float block[kDepth * kDepth];
  Slopes slopes;
  std::fill(by_user, by_user + width * problem.users, 0.0f);
  const auto before = [](const Positive& one, int64_t item) { return one.item < item; };
  auto positive = std::lower_bound(problem.positives.begin(), problem.positives.end(), first, before);
  for (int64_t item = first; item < last; item += kItems) {
    for (int64_t i = 0; i < kItems; i += kTile) {
      left_tiles(problem.catalogue, item + i, items.get() + i * width * 2, kBytes);
    }
    for (int64_t i = 0; i < kItems; i += kDepth) {
      right_tiles(problem.catalogue, item + i, across.get() + i / kDepth * kBytes, along * kBytes);
    }
    for (int64_t tile = 0; tile < 2 * kItems * width; tile += kBytes) transpose_tile(across.get() + tile);
    for (int64_t user = 0; user < problem.users; user += kUsers) {
      const int64_t count = std::min(kUsers, problem.users - user);
      for (int64_t i = 0; i < kItems; i += kDepth) {
        for (int64_t u = 0; u < count; u += kDepth) {
          products(problem, items.get() + i * width * 2, user + u, block);
          slopes_of(problem, block, item + i, user + u, i, u, slopes);
        }
      }
      for (auto one = positive; one != problem.positives.end() && one->item < item + kItems; ++one) {
        if (one->user < user || one->user >= user + count) continue;
        const float share = std::exp(one->logit - problem.normalizer[one->user]) * problem.whole[one->user];
        slopes.set(one->item - item, one->user - user, rounded((share - one->weight) * problem.inverse));
      }
      for (int64_t i = 0; i < kItems; i += kDepth) {
        for (int64_t k = 0; k < width; k += kDepth) {
          const Tiles left{slopes.left_tile(i, 0), 64, kBytes, kUsers / kDepth * kBytes};
          const Tiles right{problem.over_users(user) + k / kTile * kBytes, 64, width / kTile * kBytes, kBytes};
          multiply(left, right, count / kDepth, sums.get() + i * width + k, width, user > 0);
        }
      }
      for (int64_t k = 0; k < width; k += kDepth) {
        for (int64_t u = 0; u < count; u += kDepth) {
          const Tiles left{across.get() + k / kTile * along * kBytes, 64, kBytes, along * kBytes};
          const Tiles right{slopes.right_tile(0, u), 64, kBytes, along * kBytes};
          multiply(left, right, along, by_user + k * problem.users + user + u, problem.users, true);
        }
      }
    }
    while (positive != problem.positives.end() && positive->item < item + kItems) ++positive;
    const int64_t columns = problem.catalogue.columns;
    for (int64_t i = 0; i < std::min(kItems, problem.catalogue.rows - item); ++i) {
      std::memcpy(by_catalogue + (item + i) * columns, sums.get() + i * width, columns * sizeof(float));
    }
  }
}

void pack_users(Problem& problem) {
  problem.users = padded(problem.user.rows);
  problem.width = padded(problem.user.columns);
  problem.right_of_transpose = scratch<char>(2 * problem.users * problem.width);
  problem.right = scratch<char>(2 * problem.users * problem.width);
  for (int64_t u = 0; u < problem.users; u += kTile) left_tiles(problem.user, u, problem.of_users(u), kBytes);
  for (int64_t tile = 0; tile < 2 * problem.users * problem.width; tile += kBytes) {
    transpose_tile(problem.right_of_transpose.get() + tile);
  }
  for (int64_t u = 0; u < problem.users; u += kDepth) right_tiles(problem.user, u, problem.over_users(u), kBytes);
}

#pragma GCC pop_options

float widened(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Fills in positives, sorted, and the sum of weights of each user.
void collect_positives(Problem& problem, const int32_t* items, const float* weight, int64_t per_user) {
  problem.whole.assign(problem.users, 0.0f);
  std::vector<Positive> all;
  for (int64_t u = 0; u < problem.user.rows; ++u) {
    for (int64_t p = u * per_user; p < (u + 1) * per_user; ++p) {
      problem.whole[u] += weight[p];
      if (weight[p] > 0) all.push_back({items[p], u, weight[p], 0.0f});  // padding points at an item that may not count
    }
  }
  std::sort(all.begin(), all.end(), [](const Positive& one, const Positive& other) {
    return std::tie(one.item, one.user) < std::tie(other.item, other.user);
  });
  for (const Positive& one : all) {
    auto& last = problem.positives;
    if (!last.empty() && last.back().item == one.item && last.back().user == one.user) {
      last.back().weight += one.weight;
      continue;
    }
    float product = 0;
    const uint16_t *x = problem.user.at(one.user, 0), *y = problem.catalogue.at(one.item, 0);
    for (int64_t k = 0; k < problem.user.columns; ++k) product += widened(x[k]) * widened(y[k]);
    last.push_back(one);
    last.back().logit = product * problem.inverse + problem.bias[one.item];
  }
}

// Joins the normalizers of all parts; returns the loss.
double join_normalizers(Problem& problem, const std::vector<float>& highest, const std::vector<float>& sum) {
  double loss = 0;
  problem.normalizer.assign(problem.users, 0.0f);
  for (int64_t u = 0; u < problem.users; ++u) {
    float high = kLowest, total = 0;
    for (size_t at = u; at < highest.size(); at += problem.users) high = std::max(high, highest[at]);
    for (size_t at = u; at < highest.size(); at += problem.users) total += sum[at] * std::exp(highest[at] - high);
    problem.normalizer[u] = high + std::log(total);
    if (u < problem.user.rows) loss += static_cast<double>(problem.whole[u]) * problem.normalizer[u];
  }
  for (const Positive& one : problem.positives) loss -= static_cast<double>(one.weight) * one.logit;
  return loss;
}

void solve(ffi::ThreadPool pool, Problem& problem, const int32_t* items, const float* weight, int64_t per_user,
           float* loss, float* by_user, float* by_catalogue) {
  pack_users(problem);
  collect_positives(problem, items, weight, per_user);
  const int64_t users = problem.users, size = users * problem.width, columns = problem.user.columns;
  const int64_t blocks = (problem.catalogue.rows + kItems - 1) / kItems;
  const int64_t most = std::max<int64_t>(1, kSums / size), wanted = (blocks * kItems + kPartItems - 1) / kPartItems;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, most));
  const int64_t threads = std::min<int64_t>(parts, std::max<int64_t>(1, pool.num_threads()));
  const auto begin = [=](int64_t p) { return blocks * p / parts * kItems; };
  std::vector<float> highest(parts * users), sum(parts * users);
  float* const all_highest = highest.data();
  float* const all_sum = sum.data();
  const Problem* const given = &problem;
  fused_rec::in_parts(pool, threads, parts, [=](int64_t p) {
    normalize_part(*given, begin(p), begin(p + 1), all_highest + p * users, all_sum + p * users);
  });
  *loss = join_normalizers(problem, highest, sum);
  auto sums = scratch<float>(parts * size);
  float* const all = sums.get();
  fused_rec::on_large_pages(by_catalogue, problem.catalogue.rows * columns * sizeof(float));
  fused_rec::in_parts(pool, threads, parts, [=](int64_t p) {
    derive_part(*given, begin(p), begin(p + 1), by_catalogue, all + p * size);
  });
  for (int64_t p = 1; p < parts; ++p) {
    for (int64_t at = 0; at < size; ++at) all[at] += all[p * size + at];
  }
  for (int64_t u = 0; u < problem.user.rows; ++u) {
    for (int64_t k = 0; k < columns; ++k) by_user[u * columns + k] = all[k * users + u];
  }
}

}  // namespace

#endif  // FUSED_REC_TILES

namespace {

ffi::Error cross_entropy(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> user, ffi::Buffer<ffi::BF16> catalogue,
                         ffi::Buffer<ffi::S32> items, ffi::Buffer<ffi::F32> weight, ffi::Buffer<ffi::F32> bias,
                         float temperature, ffi::ResultBuffer<ffi::F32> loss, ffi::ResultBuffer<ffi::F32> by_user,
                         ffi::ResultBuffer<ffi::F32> by_catalogue) {
#ifdef FUSED_REC_TILES
  const auto of_user = user.dimensions(), of_items = catalogue.dimensions(), of_positives = items.dimensions();
  if (of_user.size() != 2 || of_items.size() != 2 || of_user[1] != of_items[1] || of_user[0] < 1 ||
      of_user[1] < 1) {
    return ffi::Error::InvalidArgument("embeddings of users and items must be matrices of one width, and not empty");
  }
  if (of_positives.size() != 2 || of_positives[0] != of_user[0] || weight.element_count() != items.element_count()) {
    return ffi::Error::InvalidArgument("there must be positives and their weights for each user");
  }
  const int64_t rows = of_items[0];
  if (static_cast<int64_t>(bias.element_count()) != rows || by_user->element_count() != user.element_count() ||
      by_catalogue->element_count() != catalogue.element_count() || loss->element_count() != 1) {
    return ffi::Error::InvalidArgument("there must be a bias for each item, and derivatives of the embeddings' shapes");
  }
  for (size_t p = 0; p < items.element_count(); ++p) {
    const int32_t item = items.typed_data()[p];
    if (weight.typed_data()[p] > 0 && (item < 0 || item >= rows)) {
      return ffi::Error::InvalidArgument("positives must be rows of the catalogue");
    }
  }
  Problem problem;
  problem.user = {static_cast<const uint16_t*>(user.untyped_data()), of_user[0], of_user[1]};
  problem.catalogue = {static_cast<const uint16_t*>(catalogue.untyped_data()), rows, of_items[1]};
  problem.bias = bias.typed_data();
  problem.inverse = 1.0f / temperature;
  solve(pool, problem, items.typed_data(), weight.typed_data(), of_positives[1], loss->typed_data(),
        by_user->typed_data(), by_catalogue->typed_data());
  return ffi::Error::Success();
#else
  return ffi::Error::InvalidArgument("this was compiled without tile registers");
#endif
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_cross_entropy, cross_entropy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("temperature")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
