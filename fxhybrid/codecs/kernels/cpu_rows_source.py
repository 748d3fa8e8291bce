"""C++ of the kernels that ``cpu.py`` compiles: rows to codes and back.

Arithmetic is that of ``reference.py`` step by step, products fused with the sum after them, so that both make the
same bytes where the processor has a fused multiply-add. Vectors are those of the compiler's extension (GCC and
Clang), so any processor runs them. A vector past the end is moved back to end with the row: it writes the same values
again, which is cheaper than a loop over single elements.
"""

ROWS = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));
static const int kLanes = 16, kScratch = 8192, kTogether = 4;
static const int64_t kSerial = 1 << 14;     // fewer elements are not worth a second thread
static const float kRound = 12582912.0f;    // 1.5 * 2^23: after adding it, the low bits are the nearest integer

template <typename V, typename T> static inline V load(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <typename V, typename T> static inline void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
template <typename To, typename V> static inline To bits_of(V v) { To t; std::memcpy(&t, &v, sizeof t); return t; }
static inline int64_t at(int64_t j, int64_t n) { return j < n - kLanes ? j : n - kLanes; }

#define FOLD_HALVES(v, op) \
    v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#define FOLD(v, op) \
    v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    FOLD_HALVES(v, op)
#define LESS(a, b) ((b) < (a) ? (b) : (a))
#define MORE(a, b) ((b) > (a) ? (b) : (a))
#define PLUS(a, b) ((a) + (b))

// Whether a lane of a sum is NaN or infinite: any summand was, or the sum overflowed.
static inline bool is_spoiled(floats sum) {
    const floats zero = sum - sum;
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)zero, (__m512)zero, _CMP_UNORD_Q);
#else
    floats total = zero;
    FOLD(total, PLUS)
    return total[0] != 0;
#endif
}

// Lowest and highest of a row; suspect if an element is not finite, and now and then without need.
struct Extent { float low, high; bool suspect; };
static inline Extent extent(const float* x, int64_t n) {
    if (n < kLanes) {
        float sum = 0, low = x[0], high = x[0];
        for (int64_t i = 0; i < n; i++) { low = LESS(low, x[i]); high = MORE(high, x[i]); sum += x[i]; }
        return {low, high, !std::isfinite(sum)};
    }
    floats low0 = load<floats>(x), high0 = low0, low1 = low0, high1 = low0, sum0 = {}, sum1 = {};
    int64_t j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
        floats a = load<floats>(x + j), b = load<floats>(x + j + kLanes);
        low0 = LESS(low0, a); high0 = MORE(high0, a); sum0 += a;
        low1 = LESS(low1, b); high1 = MORE(high1, b); sum1 += b;
    }
    for (; j < n; j += kLanes) {
        floats a = load<floats>(x + at(j, n));
        low0 = LESS(low0, a); high0 = MORE(high0, a); sum0 += a;
    }
    low0 = LESS(low0, low1); high0 = -MORE(high0, high1);
    // both at once, lowest in the left half and negated highest in the right one
    floats left = __builtin_shufflevector(low0, high0, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    floats both = __builtin_shufflevector(low0, high0, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    both = LESS(left, both);
    FOLD_HALVES(both, LESS)
    return {both[0], -both[8], is_spoiled(sum0 + sum1)};
}

// Square-root companding by halving the exponent: a straight line between powers of two. 0 of either sign becomes
// 1.5 * 2^-64, whose square unmapped() takes for 0. NaN and infinities become numbers.
static const int32_t kSign = INT32_MIN, kOne = 127 << 22, kLargest = 0x7f7fffff;
enum Map { kPlain, kSqrt, kSqrtUnsigned };  // unsigned: of rows without negative elements, like those of softmax
template <typename Ints, Map map, typename V> static inline V mapped(V v) {
    if (map == kPlain) return v;
    const Ints half = ((bits_of<Ints>(v) & ~kSign) >> 1) + kOne;
    return bits_of<V>(map == kSqrtUnsigned ? half : half | (bits_of<Ints>(v + 0.0f) & kSign));  // -0 becomes positive
}
template <typename Ints, Map map, typename V> static inline V unmapped(V y) {
    if (map == kPlain) return y;
    const Ints b = bits_of<Ints>(y), half = (map == kSqrtUnsigned ? b : b & ~kSign) - kOne;
    const Ints square = LESS(half, (kLargest >> 1)) << 1;
    return bits_of<V>(map == kSqrtUnsigned ? square : MORE(square, 0) | (b & kSign));
}

static inline bytes low_bytes(ints v) {
#if defined(__AVX512F__)
    return (bytes)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector(v & 255, bytes);  // without the mask GCC 12 narrows one by one, three times slower
#endif
}

template <int width, Map map>
static inline void pack_codes(const float* x, int64_t m, float inverse, float start, uint8_t* q) {
    const int parts = 8 / width, levels = (1 << width) - 1;
    for (int64_t k = 0; k < m; k += kLanes) {
        const int64_t j = m < kLanes ? 0 : at(k, m);
        ints joined = {};
        for (int p = 0; p < parts; p++) {
            const floats y = mapped<ints, map>(load<floats>(x + p * m + j));
            const ints code = bits_of<ints>((y * inverse - start) + kRound);
            joined |= (p < parts - 1 ? code & levels : code) << (width * p);
        }
        const bytes narrow = low_bytes(joined);
        if (m >= kLanes) store(q + j, narrow);
        else std::memcpy(q, &narrow, m);
    }
}

// One row of up to (8 / width) * m elements; code p * m + j stands in byte j, at bit p * width.
template <int width, Map map>
static inline void pack_row(const float* row, int64_t n, Extent of, const float* x, int64_t m, uint8_t* q,
                            float* parameters) {
    const int parts = 8 / width, levels = (1 << width) - 1;
    const float low = mapped<int32_t, map>(of.low), high = mapped<int32_t, map>(of.high);
    if (of.suspect) {
        bool bad = false;
        for (int64_t i = 0; i < n; i++) bad |= !std::isfinite(row[i]);
        if (bad) { parameters[0] = parameters[1] = NAN; std::memset(q, 0, m); return; }
    }
    const float share = 2.0f / levels, scale = (high * 0.5f - low * 0.5f) * share;  // high - low may overflow
    parameters[0] = scale; parameters[1] = low;
    if (scale == 0) { std::memset(q, 0, m); return; }
    const float inverse = 1.0f / scale, start = low * inverse;
    if (scale < 1e-30f || std::fabs(start) > 0x1p18f) {  // no finite inverse, or start is too coarse
        const float up = scale < 1e-30f ? 0x1p60f : 1.0f, exact = 1.0f / (scale * up);
        std::memset(q, 0, m);
        for (int64_t i = 0; i < m * parts; i++) {
            const float y = (mapped<int32_t, map>(x[i]) - low) * up * exact + kRound;
            q[i % m] |= (bits_of<int32_t>(y) & levels) << (width * (i / m));
        }
        return;
    }
    if (map == kSqrt && of.low >= 0) return pack_codes<width, kSqrtUnsigned>(x, m, inverse, start, q);
    pack_codes<width, map>(x, m, inverse, start, q);
}

template <int width, Map map>
static inline void unpack_16(const uint8_t* q, int part, float scale, float low, float* x) {
    int32_t codes[kLanes];  // GCC 12 widens bytes one by one where it is told to convert a vector
    for (int i = 0; i < kLanes; i++) codes[i] = (q[i] >> (width * part)) & ((1 << width) - 1);
    store(x, unmapped<ints, map>(__builtin_convertvector(load<ints>(codes), floats) * scale + low));
}

// At half size: near the end of float32 the widest range would overflow. NaN stays.
template <int width>
static void unpack_extreme(const uint8_t* q, int64_t m, float scale, float low, float* x) {
    const float limit = 3.402823466e38f;
    for (int64_t i = 0; i < m * (8 / width); i++) {
        const int code = (q[i % m] >> (width * (i / m))) & ((1 << width) - 1);
        const float y = 2 * (float(code) * (scale * 0.5f) + low * 0.5f);
        x[i] = y > limit ? limit : y < -limit ? -limit : y;
    }
}

template <int width, Map map>
static inline void unpack_codes(const uint8_t* __restrict__ q, int64_t m, float scale, float low, float* x) {
    const int parts = 8 / width, levels = (1 << width) - 1;
    for (int p = 0; p < parts; p++) {
        float* __restrict__ target = x + p * m;
        if (m >= 4 * kLanes)
            for (int64_t j = 0; j < m; j++)
                target[j] = unmapped<int32_t, map>(float((q[j] >> (width * p)) & levels) * scale + low);
        else if (m >= kLanes)  // the compiler's own vectors are longer than what is left
            for (int64_t k = 0; k < m; k += kLanes)
                unpack_16<width, map>(q + at(k, m), p, scale, low, target + at(k, m));
        else
            unpack_16<width, map>(q, p, scale, low, target);
    }
}

// Vectors may write up to 15 elements past the end where m < 16. Companded rows are never extreme, only NaN.
template <int width, Map map>
static inline void unpack_row(const uint8_t* q, int64_t m, const float* parameters, float* x) {
    const float scale = parameters[0], low = parameters[1];
    if (!(scale * ((1 << width) - 1) + std::fabs(low) < 1.7e38f)) return unpack_extreme<width>(q, m, scale, low, x);
    if (map == kSqrt && low > 0) return unpack_codes<width, kSqrtUnsigned>(q, m, scale, low, x);
    unpack_codes<width, map>(q, m, scale, low, x);
}

// The same for a row that is not of whole bytes or shorter than a vector: by way of a padded copy.
template <int width, Map map>
static void pack_any(const float* x, int64_t row, Extent of, uint8_t* q, float* parameters) {
    const int64_t m = (row * width + 7) / 8, padded = m * (8 / width);
    if (padded == row && m >= kLanes) return pack_row<width, map>(x, row, of, x, m, q, parameters);
    float scratch[kScratch];
    std::memcpy(scratch, x, row * sizeof(float));
    for (int64_t i = row; i < padded + kLanes; i++) scratch[i] = x[row - 1];
    pack_row<width, map>(x, row, of, scratch, m, q, parameters);  // x: what is just written is slow to read
}

template <int width, Map map>
static void unpack_any(const uint8_t* q, const float* parameters, int64_t row, float* x) {
    const int64_t m = (row * width + 7) / 8;
    if (m * (8 / width) == row && m >= kLanes) return unpack_row<width, map>(q, m, parameters, x);
    float scratch[kScratch];
    uint8_t codes[kLanes] = {};
    if (m < kLanes) std::memcpy(codes, q, m);
    unpack_row<width, map>(m < kLanes ? codes : q, m, parameters, scratch);
    std::memcpy(x, scratch, row * sizeof(float));
}

template <Map map = kPlain>
static void pack_width(int width, const float* x, int64_t row, Extent of, uint8_t* q, float* parameters) {
    if (width == 8) pack_any<8, map>(x, row, of, q, parameters);
    else if (width == 4) pack_any<4, map>(x, row, of, q, parameters);
    else pack_any<2, map>(x, row, of, q, parameters);
}

template <Map map = kPlain>
static void unpack_width(int width, const uint8_t* q, const float* parameters, int64_t row, float* x) {
    if (width == 8) unpack_any<8, map>(q, parameters, row, x);
    else if (width == 4) unpack_any<4, map>(q, parameters, row, x);
    else unpack_any<2, map>(q, parameters, row, x);
}

// Packs rows of a storage; place(r) gives the width of row r and where its codes begin. A few rows' extents are found
// before the first of these rows is packed: each ends in a chain of steps that wait for each other, and chains of
// different rows overlap.
template <Map map, typename Place>
static void pack_all(const float* x, int64_t n_rows, int64_t row, float* parameters, int threads, Place place) {
    const int64_t together = row <= 2048 ? kTogether : 1;  // what the nearest cache holds
    #pragma omp parallel for num_threads(threads) if (n_rows * row >= kSerial)
    for (int64_t first = 0; first < n_rows; first += together) {
        const int64_t end = LESS(first + together, n_rows);
        Extent of[kTogether];
        for (int64_t r = first; r < end; r++) of[r - first] = extent(x + r * row, row);
        for (int64_t r = first; r < end; r++) {
            const auto at = place(r);
            pack_width<map>(at.first, x + r * row, row, of[r - first], at.second, parameters + 2 * r);
        }
    }
}

template <Map map>
static void pack_uniform(int width, const float* x, int64_t n_rows, int64_t row, uint8_t* q, float* parameters,
                         int threads) {
    const int64_t m = (row * width + 7) / 8;
    pack_all<map>(x, n_rows, row, parameters, threads, [=](int64_t r) { return std::make_pair(width, q + r * m); });
}

template <Map map>
static void unpack_uniform(int width, const uint8_t* q, const float* parameters, int64_t n_rows, int64_t row, float* x,
                           int threads) {
    const int64_t m = (row * width + 7) / 8;
    #pragma omp parallel for num_threads(threads) if (n_rows * row >= kSerial)
    for (int64_t r = 0; r < n_rows; r++) unpack_width<map>(width, q + r * m, parameters + 2 * r, row, x + r * row);
}

extern "C" void pack_rows(int width, int sqrt, const float* x, int64_t n_rows, int64_t row, uint8_t* q,
                          float* parameters, int threads) {
    (sqrt ? pack_uniform<kSqrt> : pack_uniform<kPlain>)(width, x, n_rows, row, q, parameters, threads);
}

extern "C" void unpack_rows(int width, int sqrt, const uint8_t* q, const float* parameters, int64_t n_rows, int64_t row,
                            float* x, int threads) {
    (sqrt ? unpack_uniform<kSqrt> : unpack_uniform<kPlain>)(width, q, parameters, n_rows, row, x, threads);
}

// Rows are channels of samples, in order; channel c has its own width and begins at offsets[c] of a sample's bytes,
// offsets[n_channels] in all.
extern "C" void pack_channels(const int32_t* widths, const int64_t* offsets, const float* x, int64_t n_rows,
                              int64_t row, int64_t n_channels, uint8_t* q, float* parameters, int threads) {
    pack_all<kPlain>(x, n_rows, row, parameters, threads, [=](int64_t r) {
        const int64_t c = r % n_channels;
        return std::make_pair(widths[c], q + r / n_channels * offsets[n_channels] + offsets[c]);
    });
}

extern "C" void unpack_channels(const int32_t* widths, const int64_t* offsets, const uint8_t* q,
                                const float* parameters, int64_t n_rows, int64_t row, int64_t n_channels, float* x,
                                int threads) {
    #pragma omp parallel for num_threads(threads) if (n_rows * row >= kSerial)
    for (int64_t r = 0; r < n_rows; r++) {
        const int64_t c = r % n_channels, start = r / n_channels * offsets[n_channels] + offsets[c];
        unpack_width(widths[c], q + start, parameters + 2 * r, row, x + r * row);
    }
}
"""
