// What all made steps share. A made file has a struct Rule and one line that calls run<Rule>:
//
//   Rule::move      the rule, on entries that lie one after another
//   Rule::P, G, B   types of entries: of the parameter, its gradient and its buffers
//
// Arithmetic is float32, widened from what is narrower and rounded once at the end.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef NARROW
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#endif

namespace {

enum Size { OF_NONE, OF_TENSOR, OF_ROW };   // whose RMS a rule asks for
enum Rows { NONE, ALL, LISTED, MASKED };    // which move; NONE: it does not go by rows
constexpr int64_t PART = 1 << 15;           // entries that are worth a thread
constexpr int64_t BLOCK = 64, AHEAD = 512;  // entries: while a block is computed, the memory sends one further on

// What all tensors of a call share; mirrored in cpu.py.
struct Shared {
  const double* d;  // the rule's numbers, and what is computed from them
  float lr, unscale, shrink, center;
  int32_t threads;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cpu.py has another");

// One tensor: a line of the table, as table.py has it.
template <class P, class G, class B, int BUFFERS, int OWN>
struct TensorOf {
  float* step;        // counts steps, or null
  int64_t size;       // entries
  int64_t noise;      // from which its roundings at random follow
  int64_t width;      // of a row
  int64_t count;      // of rows that the gradient has
  const void* rows;   // int64_t each, a list; or bool each, a mask
  double known;       // its RMS, if it is not to be looked for; else NaN
  P* p;
  const G* g;
  B* b[BUFFERS];
  double own[OWN];    // the rule's numbers that are its own

  // Has the memory send the beginning of what comes next; from there on, each block asks for one further on.
  void fetch(int64_t start, int64_t g_start, int64_t n) const {
    for (int64_t i = 0; i < std::min(n, 2 * AHEAD); i += 16) {
      __builtin_prefetch(p + start + i);
      __builtin_prefetch(g + g_start + i);
      for (int j = 0; j < BUFFERS; j++) __builtin_prefetch(b[j] + start + i);
    }
  }
};

// --- words -----------------------------------------------------------------------------------------

inline float fma(float a, float b, float c) {
#ifdef NO_FMA
  return a * b + c;
#else
  return std::fma(a, b, c);
#endif
}
// From the nearer end, as torch does.
inline float lerp(float a, float b, float w) {
  const bool near = std::fabs(w) < 0.5f;
  return fma(near ? w : w - 1.0f, b - a, near ? a : b);
}
inline float sign_of(float x) { return float(x > 0) - float(x < 0); }  // 0 of 0 and of NaN
inline float sqrt_of(float x) { return std::sqrt(x); }
inline float divided(float a, float b) { return a / b; }
inline float inverse_of(float x) { return 1 / x; }
inline float abs_of(float x) { return std::fabs(x); }
inline float tanh_of(float x) { return std::tanh(x); }
inline float exp_of(float x) { return std::exp(x); }
inline float log_of(float x) { return std::log(x); }
inline float larger_of(float a, float b) { return a != a || a > b ? a : b; }  // NaN stays NaN
inline float smaller_of(float a, float b) { return a != a || a < b ? a : b; }
inline float chosen(bool c, float a, float b) { return c ? a : b; }
inline float float_of(bool x) { return float(x); }
inline bool not_of(bool x) { return !x; }
inline float float_of(double x) { return float(x); }
inline double divided(double a, double b) { return a / b; }
inline double inverse_of(double x) { return 1 / x; }
inline double sqrt_of(double x) { return std::sqrt(x); }
inline double power_of(double a, double b) { return std::pow(a, b); }

// --- rounding at random: minisign/engine/rounding.py says how ----------------------------------------

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

template <bool ROUNDED, class T>
inline void store(T* target, float x, int64_t i, uint32_t key) {
  if constexpr (ROUNDED && sizeof(T) == 2) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t noise = mix(uint32_t(i) * 0x9e3779b1u + uint32_t(uint64_t(i) >> 32) * 0x85ebca77u + key) >> 16;
    const uint16_t rounded = x != x ? 0x7fc0 : uint16_t((bits + noise) >> 16);
    std::memcpy(target, &rounded, sizeof rounded);
  } else {
    *target = T(x);
  }
}

// A processor fetches ahead by itself, but not beyond the end of a page, and less well the more arrays there are.
template <class... T>
inline void fetch(int64_t left, const T*... x) {
  if (left <= AHEAD) return;
  for (int64_t i = AHEAD; i < AHEAD + BLOCK; i += 16) (__builtin_prefetch(x + i), ...);
}

// --- looks: what must be known of a tensor before one entry of it moves ------------------------------

template <class T>
double sum_of_squares(const T* x, int64_t n) {
  constexpr int64_t LANES = 16;
  double lanes[4][LANES] = {};
  const int64_t quarter = n / (4 * LANES) * LANES;
  for (int64_t i = 0; i < quarter; i += LANES)
    for (int64_t k = 0; k < 4; k++)
      for (int64_t j = 0; j < LANES; j++) {
        const double y = float(x[k * quarter + i + j]);
        lanes[k][j] += y * y;
      }
  for (int64_t i = 4 * quarter; i < n; i++) lanes[0][0] += double(float(x[i])) * double(float(x[i]));
  double sum = 0;
  for (int64_t k = 0; k < 4; k++)
    for (double lane : lanes[k]) sum += lane;
  return sum;
}

inline float rms(double squares, int64_t count) {
  const float size = float(std::sqrt(squares / double(std::max<int64_t>(count, 1))));
  return size == 0 ? 1.0f : size;
}

template <class T>
int not_finite(const T* x, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= !(std::fabs(float(x[i])) <= FLT_MAX);
  return bad;
}

// Four places at once: a core reads several streams faster than one.
template <class T>
bool some_not_finite(const T* x, int64_t n) {
  const int64_t quarter = n / 4;
  int bad = not_finite(x + 4 * quarter, n % 4);
  for (int64_t i = 0; i < quarter; i += 64)
    for (int64_t k = 0; k < 4; k++) bad |= not_finite(x + k * quarter + i, std::min<int64_t>(64, quarter - i));
  return bad;
}

template <class T>
int not_zero(const T* x, int64_t n) {  // NaN is not
  int found = 0;
  for (int64_t i = 0; i < n; i++) found |= float(x[i]) != 0;
  return found;
}

// Of n rows, one after another: which have an entry that is not zero.
template <class T>
void rows_not_zero(const T* x, int64_t width, int64_t n, char* found) {
  const int64_t quarter = n / 4;
  for (int64_t j = 4 * quarter; j < n; j++) found[j] = not_zero(x + j * width, width);
  for (int64_t j = 0; j < quarter; j++) {
    int some[4] = {};
    for (int64_t i = 0; i < width; i += BLOCK)
      for (int64_t k = 0; k < 4; k++) {
        const T* y = x + (k * quarter + j) * width + i;
        fetch(INT64_MAX, y);  // the next row, too
        some[k] |= not_zero(y, std::min(BLOCK, width - i));
      }
    for (int64_t k = 0; k < 4; k++) found[k * quarter + j] = some[k];
  }
}

// --- one tensor --------------------------------------------------------------------------------------

template <class Rule>
struct Step {
  const Shared& s;
  const typename Rule::Tensor& t;
  double step;
  uint32_t key;

  template <class Body>  // body(number, first, how many) for each part of `size`
  void in_parts(int64_t size, int64_t part, Body body) const {
    const int64_t parts = (size + part - 1) / part;
    if (parts == 1) return body(0, 0, size);  // to ask for threads takes longer than a small tensor
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (int64_t i = 0; i < parts; i++) body(i, i * part, std::min(part, size - i * part));
  }

  void span(bool finite, float size, int64_t start, int64_t g_start, int64_t n) const {
    if (finite) return Rule::move(t, s, start, g_start, n, step, size, key);
    for (int64_t i = start; i < start + n; i++)
      store<Rule::rounded>(t.p + i, (float(t.p[i]) - s.center) * s.shrink + s.center, i, key);
  }

  void whole() const {
    const int64_t parts = (t.size + PART - 1) / PART;
    int bad = 0;
    float size = float(t.known);
    if (Rule::guard) {
      std::vector<char> found(parts);
      in_parts(t.size, PART, [&](int64_t i, int64_t start, int64_t n) { found[i] = some_not_finite(t.g + start, n); });
      for (char x : found) bad |= x;
    }
    if (Rule::size == OF_TENSOR && size != size && !bad) {
      std::vector<double> found(parts);  // added up in order, whoever finds them
      in_parts(t.size, PART, [&](int64_t i, int64_t start, int64_t n) { found[i] = sum_of_squares(t.p + start, n); });
      double squares = 0;
      for (double x : found) squares += x;
      size = rms(squares, t.size);
    }
    in_parts(t.size, PART, [&](int64_t, int64_t start, int64_t n) { span(!bad, size, start, start, n); });
  }

  template <class Body>  // body(first, end) for parts of the gradient's rows
  void in_rows(int64_t count, Body body) const {
    in_parts(count, std::max<int64_t>(8, PART / std::max<int64_t>(t.width, 1)),
             [&](int64_t, int64_t first, int64_t n) { body(first, first + n); });
  }

  // The rows of the gradient that move.
  std::vector<int64_t> moving() const {
    const bool* mask = static_cast<const bool*>(t.rows);
    std::vector<int64_t> rows;
    constexpr int64_t EIGHT = 8;
    for (int64_t j = 0; j < t.count; j += EIGHT) {  // few of a mask's rows are chosen
      uint64_t some = 1;
      if (Rule::rows == MASKED && j + EIGHT <= t.count) std::memcpy(&some, mask + j, sizeof some);
      for (int64_t i = j; some && i < std::min(j + EIGHT, t.count); i++)
        if (Rule::rows != MASKED || mask[i]) rows.push_back(i);
    }
    if (!Rule::sought) return rows;
    std::vector<char> found(rows.size());
    in_rows(rows.size(), [&](int64_t k, int64_t end) {
      if (Rule::rows != MASKED) return rows_not_zero(t.g + k * t.width, t.width, end - k, &found[k]);
      for (; k < end; k++) {
        if (k + 1 < end) fetch(INT64_MAX, t.g + rows[k + 1] * t.width - AHEAD);
        found[k] = not_zero(t.g + rows[k] * t.width, t.width);
      }
    });
    size_t moved = 0;
    for (size_t k = 0; k < rows.size(); k++)
      if (found[k]) rows[moved++] = rows[k];
    rows.resize(moved);
    return rows;
  }

  void by_rows() const {
    const auto row = [&](int64_t j) { return Rule::rows == LISTED ? static_cast<const int64_t*>(t.rows)[j] : j; };
    const std::vector<int64_t> rows = moving();
    const int64_t count = rows.size();
    int bad = 0;
    if (Rule::guard) {
      std::vector<char> found(count);
      in_rows(count, [&](int64_t k, int64_t end) {
        for (; k < end; k++) found[k] = some_not_finite(t.g + rows[k] * t.width, t.width);
      });
      for (char x : found) bad |= x;
    }
    in_rows(count, [&](int64_t k, int64_t end) {
      for (; k < end; k++) {
        const int64_t start = row(rows[k]) * t.width;
        if (k + 1 < end) t.fetch(row(rows[k + 1]) * t.width, rows[k + 1] * t.width, t.width);
        float size = float(t.known);
        if (Rule::size == OF_ROW && size != size && !bad) size = rms(sum_of_squares(t.p + start, t.width), t.width);
        span(!bad, size, start, rows[k] * t.width, t.width);
      }
    });
  }
};

template <class Rule>
void run(const Shared& s, const typename Rule::Tensor* tensors, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const auto& t = tensors[i];
    if (i + 1 < count) tensors[i + 1].fetch(0, 0, tensors[i + 1].size);
    const double number = t.step ? double(*t.step += 1) : 0;
    const Step<Rule> step{s, t, number, mix(uint32_t(t.noise) + uint32_t(number))};
    Rule::rows ? step.by_rows() : step.whole();
  }
}

}  // namespace
