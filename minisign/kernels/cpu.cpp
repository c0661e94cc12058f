// One step of Signum, Lion, Tiger or AdamW on a CPU: every number is read once and written once.
//
// The same arithmetic as triton_step.py, operation by operation: float32 throughout, a fused
// multiply-add only where `fma` says so (compiled with -ffp-contract=off), so that both are equal to the
// last bit. Where torch has no fused multiply-add to use (NO_FMA), it is a product and a sum here too.
// Tensors of other types pass through float32 buffers of a block's size, which stay in the first-level
// cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum Kind { MOMENTUM, LION, ADAMW };
enum Scale { NUMBER, RMS, ROW_RMS };
enum Memory { FROM_M, FROM_G, SUM };
// Which rows move. Of a LIST, the gradient has only the rows in it, in this order.
enum Rows { ALL, BY_GRADIENT, MASK, LIST, LIST_BY_GRADIENT };
enum Type { FLOAT32, BFLOAT16, FLOAT16 };

constexpr int64_t BLOCK = 1024;         // entries that pass through the buffers at once
constexpr int64_t WORTH_A_THREAD = 1 << 15;

}  // namespace

// What all tensors of a call share; mirrored by Shared in cpu.py.
struct Shared {
  double lr, beta1, beta2;
  float decay, weight_decay, keep, weight, memory, toward, beta2_float, square, eps, shrink, center, unscale;
  int32_t kind, scale, memory_form, toward_form, rows, guard, move, fold, rounded, p_type, g_type, m_type;
};

// One tensor; mirrored by Item.columns in rule.py.
struct Tensor {
  void *p, *g, *m, *v;
  float* step;         // of this parameter, or null
  int64_t size;        // entries, of all rows
  int64_t noise;       // of the parameter, from which its roundings at random follow
  int64_t is_vector;   // Tiger's rule for fewer than two dimensions: half the rate, no decay
  int64_t width;       // of a row; 0: not by rows
  int64_t count;       // of rows to look at
  void* rows;          // LIST: their indices [count], int64; MASK: bool [count]
  int64_t unused;
};

namespace {

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float fma(float a, float b, float c) {
#ifdef NO_FMA
  return a * b + c;
#else
  return std::fma(a, b, c);
#endif
}

inline int64_t bytes_of(int type) { return type == FLOAT32 ? 4 : 2; }

inline float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  // Scaling by 2^112 moves the exponent and makes subnormal numbers normal.
  const float x = bits_to_float(rest) * 0x1p112f;
  const uint32_t inf_or_nan = (h & 0x7c00) == 0x7c00 ? 0x7f800000u | rest : float_to_bits(x);
  return bits_to_float(sign | inf_or_nan);
}

inline uint16_t to_half(float x) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16) & 0x8000;
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000)  // subnormal: adding 0.5 leaves the rounding to the processor
    return sign | uint16_t(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}

inline uint16_t to_bfloat(float x) {
  const uint32_t bits = float_to_bits(x);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// --- rounding at random: minisign/optim/rounding.py says how ---------------------------------------

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

inline uint16_t to_bfloat_at_random(float x, uint32_t key, int64_t i) {
  const uint32_t noise = mix(uint32_t(i) * 0x9e3779b1u + uint32_t(uint64_t(i) >> 32) * 0x85ebca77u + key) >> 16;
  return x != x ? 0x7fc0 : uint16_t((float_to_bits(x) + noise) >> 16);
}

// --- blocks ----------------------------------------------------------------------------------------

// A block as float32: where it lies if it is, else a copy in `buffer`.
inline float* opened(void* data, int type, int64_t start, int64_t n, float* buffer) {
  if (type == FLOAT32) return static_cast<float*>(data) + start;
  const uint16_t* source = static_cast<uint16_t*>(data) + start;
  if (type == BFLOAT16)
    for (int64_t i = 0; i < n; i++) buffer[i] = bits_to_float(uint32_t(source[i]) << 16);
  else
    for (int64_t i = 0; i < n; i++) buffer[i] = from_half(source[i]);
  return buffer;
}

inline void close(const float* block, void* data, int type, int64_t start, int64_t n) {
  if (type == FLOAT32) return;
  uint16_t* target = static_cast<uint16_t*>(data) + start;
  if (type == BFLOAT16)
    for (int64_t i = 0; i < n; i++) target[i] = to_bfloat(block[i]);
  else
    for (int64_t i = 0; i < n; i++) target[i] = to_half(block[i]);
}

inline float sign(float x) { return float(x > 0) - float(x < 0); }  // 0 of 0 and of NaN

// torch.lerp(a, b, …), which starts from the nearer end.
template <int FORM>
inline float lerp(float a, float b, float coefficient) {
  return fma(coefficient, b - a, FORM == FROM_M ? a : b);
}

struct Own {  // what one tensor, or one row of it, adds
  float eta, decay, step_size, root;
  bool finite;
  uint32_t key;
};

template <int MEMORY_FORM>
inline float remembered(float m, float g, const Shared& s) {
  if (MEMORY_FORM == SUM) return fma(g, s.weight, m * s.keep);
  return lerp<MEMORY_FORM>(m, g, s.memory);
}

template <int MEMORY_FORM, int TOWARD_FORM>
void update(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
            int64_t n, const Shared& s, const Own& own) {
  if (s.kind == ADAMW) {
    for (int64_t i = 0; i < n; i++) {
      m[i] = lerp<MEMORY_FORM>(m[i], g[i], s.memory);
      v[i] = fma(s.square * g[i], g[i], v[i] * s.beta2_float);
      const float denominator = std::sqrt(v[i]) / own.root + s.eps;
      p[i] = p[i] * own.decay + -own.step_size * m[i] / denominator;
    }
  } else if (s.kind == LION) {
    for (int64_t i = 0; i < n; i++) {
      const float c = lerp<TOWARD_FORM>(m[i], g[i], s.toward);
      m[i] = lerp<MEMORY_FORM>(m[i], g[i], s.memory);
      p[i] = p[i] * own.decay - own.eta * sign(c);
    }
  } else if (!own.finite) {
    for (int64_t i = 0; i < n; i++) p[i] = (p[i] - s.center) * s.shrink + s.center;
  } else {
    if (s.fold && s.move)
      for (int64_t i = 0; i < n; i++) {
        m[i] = remembered<MEMORY_FORM>(m[i], g[i], s);
        p[i] = p[i] * own.decay - own.eta * sign(m[i]);
      }
    else if (s.fold)
      for (int64_t i = 0; i < n; i++) m[i] = remembered<MEMORY_FORM>(m[i], g[i], s);
    else
      for (int64_t i = 0; i < n; i++) p[i] = p[i] * own.decay - own.eta * sign(m[i]);
  }
}

void update_span(const Tensor& t, const Shared& s, const Own& own, int64_t start, int64_t g_start, int64_t n) {
  float p_buffer[BLOCK], g_buffer[BLOCK], m_buffer[BLOCK], v_buffer[BLOCK];
  for (int64_t done = 0; done < n; done += BLOCK) {
    const int64_t at = start + done, length = std::min(BLOCK, n - done);
    float* p = opened(t.p, s.p_type, at, length, p_buffer);
    float* m = opened(t.m, s.m_type, at, length, m_buffer);
    float* v = t.v ? opened(t.v, s.m_type, at, length, v_buffer) : nullptr;
    float* g = nullptr;
    if (s.fold) {
      g = opened(t.g, s.g_type, g_start + done, length, g_buffer);
      if (s.unscale != 1) {  // −1 for maximize
        for (int64_t i = 0; i < length; i++) g_buffer[i] = g[i] * s.unscale;
        g = g_buffer;
      }
    }
    const auto run = s.memory_form == FROM_M
                         ? (s.toward_form == FROM_M ? update<FROM_M, FROM_M> : update<FROM_M, FROM_G>)
                     : s.memory_form == FROM_G
                         ? (s.toward_form == FROM_M ? update<FROM_G, FROM_M> : update<FROM_G, FROM_G>)
                         : update<SUM, FROM_M>;
    run(p, g, m, v, length, s, own);
    if (s.fold) close(m, t.m, s.m_type, at, length);
    if (t.v) close(v, t.v, s.m_type, at, length);
    if (s.rounded && s.p_type == BFLOAT16 && (s.move || !own.finite)) {
      uint16_t* target = static_cast<uint16_t*>(t.p) + at;
      for (int64_t i = 0; i < length; i++) target[i] = to_bfloat_at_random(p[i], own.key, at + i);
    } else if (s.move || !own.finite) {
      close(p, t.p, s.p_type, at, length);
    }
  }
}

// --- what a tensor's entries have in common --------------------------------------------------------

double sum_of_squares(void* data, int type, int64_t start, int64_t n) {
  double lanes[8] = {};
  float buffer[BLOCK];
  for (int64_t done = 0; done < n; done += BLOCK) {
    const int64_t length = std::min(BLOCK, n - done);
    const float* x = opened(data, type, start + done, length, buffer);
    int64_t i = 0;
    for (; i + 8 <= length; i += 8)
      for (int j = 0; j < 8; j++) lanes[j] += double(x[i + j]) * double(x[i + j]);
    for (; i < length; i++) lanes[0] += double(x[i]) * double(x[i]);
  }
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

uint32_t some_not_finite(const float* x, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= (float_to_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
  return bad;
}

bool all_finite(void* data, int type, int64_t start, int64_t n) {
  if (type == FLOAT32) {
    // Four places at once: one core reads several streams faster than one.
    const float* x = static_cast<float*>(data) + start;
    const int64_t quarter = n / 4;
    uint32_t bad = some_not_finite(x + 4 * quarter, n % 4);
    for (int64_t i = 0; i < quarter; i += 64)
      for (int64_t k = 0; k < 4; k++) bad |= some_not_finite(x + k * quarter + i, std::min<int64_t>(64, quarter - i));
    return !bad;
  }
  const uint16_t* x = static_cast<uint16_t*>(data) + start;
  const uint16_t exponent = type == BFLOAT16 ? 0x7f80 : 0x7c00;
  uint16_t bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= (x[i] & exponent) == exponent;
  return !bad;
}

float rms(double squares, int64_t count) {
  const float size = float(std::sqrt(squares / double(std::max<int64_t>(count, 1))));
  return size == 0 ? 1.0f : size;
}

Own with_rate(const Shared& s, Own own, const Tensor& t, float size) {
  if (t.is_vector) {
    own.eta = float(s.lr) * 0.5f;
    own.decay = 1.0f;
  } else if (s.scale != NUMBER) {
    own.eta = float(s.lr) * size;
    own.decay = 1.0f - own.eta * s.weight_decay;
  }
  return own;
}

// --- one tensor ------------------------------------------------------------------------------------

bool is_zero(const void* data, int type, int64_t start, int64_t n) {
  for (int64_t done = 0; done < n; done += 64) {
    const int64_t end = std::min(done + 64, n);
    uint32_t any = 0;  // −0 is 0 too, NaN is not
    if (type == FLOAT32) {
      const float* x = static_cast<const float*>(data) + start;
      for (int64_t i = done; i < end; i++) any |= float_to_bits(x[i]) << 1;
    } else {
      const uint16_t* x = static_cast<const uint16_t*>(data) + start;
      for (int64_t i = done; i < end; i++) any |= uint32_t(x[i]) << 17;
    }
    if (any) return false;
  }
  return true;
}

// Which rows move, by their place in the gradient.
std::vector<int64_t> moving_rows(const Tensor& t, const Shared& s, int threads) {
  std::vector<int64_t> found;
  if (s.rows == MASK) {
    const uint8_t* mask = static_cast<const uint8_t*>(t.rows);
    for (int64_t i = 0; i < t.count; i++) {
      uint64_t eight = 1;
      if (i % 8 == 0 && i + 8 <= t.count) std::memcpy(&eight, mask + i, 8);
      if (!eight) i += 7;
      else if (mask[i]) found.push_back(i);
    }
    return found;
  }
  std::vector<uint8_t> moves(t.count, 1);
  if (s.rows == BY_GRADIENT || s.rows == LIST_BY_GRADIENT) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && t.count * t.width > WORTH_A_THREAD)
    for (int64_t i = 0; i < t.count; i++) moves[i] = !is_zero(t.g, s.g_type, i * t.width, t.width);
  }
  for (int64_t i = 0; i < t.count; i++)
    if (moves[i]) found.push_back(i);
  return found;
}

// Reads a byte here and there. Rows lie on pages of their own, and a page that was not used lately is slow
// to find: with eight rows at a time the processor looks for several at once.
void visit(const void* data, int type, int64_t start, int64_t n) {
  const volatile char* first = static_cast<const char*>(data) + start * bytes_of(type);
  for (int64_t i = 0; i < n * bytes_of(type); i += 2048) (void)first[i];
}

void step_tensor(const Tensor& t, const Shared& s, int threads) {
  Own own{float(s.lr), s.decay, 0, 0, true, 0};
  if (t.step) {
    *t.step += 1;
    own.key = mix(uint32_t(t.noise) + uint32_t(*t.step));
  }
  if (s.kind == ADAMW) {
    own.step_size = float(s.lr / (1 - std::pow(s.beta1, double(*t.step))));
    own.root = float(std::sqrt(1 - std::pow(s.beta2, double(*t.step))));
  }
  const int64_t chunks = (t.size + WORTH_A_THREAD - 1) / WORTH_A_THREAD;
  const auto length_of = [&](int64_t c) { return std::min(WORTH_A_THREAD, t.size - c * WORTH_A_THREAD); };
  if (!t.width) {
    if (s.guard && s.fold) {
      int bad = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1) reduction(| : bad)
      for (int64_t c = 0; c < chunks; c++)
        bad |= !all_finite(t.g, s.g_type, c * WORTH_A_THREAD, length_of(c));
      own.finite = !bad;
    }
    double squares = 0;
    if (s.scale == RMS && s.move && own.finite && !t.is_vector) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1) reduction(+ : squares)
      for (int64_t c = 0; c < chunks; c++)
        squares += sum_of_squares(t.p, s.p_type, c * WORTH_A_THREAD, length_of(c));
    }
    own = with_rate(s, own, t, rms(squares, t.size));
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1)
    for (int64_t c = 0; c < chunks; c++)
      update_span(t, s, own, c * WORTH_A_THREAD, c * WORTH_A_THREAD, length_of(c));
    return;
  }
  const std::vector<int64_t> rows = moving_rows(t, s, threads);
  const int64_t count = rows.size();
  const bool many = threads > 1 && count * t.width > WORTH_A_THREAD;
  if (s.guard && s.fold) {
    int bad = 0;
#pragma omp parallel for num_threads(threads) if (many) reduction(| : bad)
    for (int64_t j = 0; j < count; j++) bad |= !all_finite(t.g, s.g_type, rows[j] * t.width, t.width);
    own.finite = !bad;
  }
  const auto* indices = s.rows >= LIST ? static_cast<const int64_t*>(t.rows) : nullptr;
  const auto start_of = [&](int64_t j) { return (indices ? indices[rows[j]] : rows[j]) * t.width; };
#pragma omp parallel for num_threads(threads) if (many)
  for (int64_t first = 0; first < count; first += 8) {
    const int64_t end = std::min(first + 8, count);
    for (int64_t j = first; j < end && s.rows != ALL; j++) {
      visit(t.p, s.p_type, start_of(j), t.width);
      visit(t.m, s.m_type, start_of(j), t.width);
    }
    for (int64_t j = first; j < end; j++) {
      const int64_t start = start_of(j);
      const bool by_row = s.scale == ROW_RMS && s.move && own.finite;
      const float size = by_row ? rms(sum_of_squares(t.p, s.p_type, start, t.width), t.width) : 1.0f;
      update_span(t, s, with_rate(s, own, t, size), start, rows[j] * t.width, t.width);
    }
  }
}

}  // namespace

extern "C" void minisign_step(const Shared* shared, const Tensor* tensors, int64_t count, int32_t threads) {
  for (int64_t i = 0; i < count; i++) step_tensor(tensors[i], *shared, threads);
}

extern "C" int64_t minisign_sizes(int32_t which) { return which ? sizeof(Tensor) : sizeof(Shared); }
