"""C++ of the casts that ``native.py`` compiles after the row kernels: float32 to fp8 and bfloat16, and back.

fp8 goes by way of float16, which many processors convert to and from in one instruction.
"""

CASTS = r"""
// float32 below 2 as the bits of a float16 towards zero, subnormals included: what is cut off only rounds.
static inline shorts to_half(floats y) {
#if defined(__AVX512F__)
    return (shorts)_mm512_cvtps_ph((__m512)y, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
    shorts half;
    for (int i = 0; i < kLanes; i++) {
        const int32_t raw = bits_of<int32_t>(y[i]), magnitude = raw & 0x7fffffff;
        const int32_t fine = int32_t(bits_of<float>(magnitude) * 0x1p24f), coarse = (magnitude >> 13) - (112 << 10);
        half[i] = (magnitude < 0x38800000 ? fine : coarse) | ((raw >> 16) & 0x8000);
    }
    return half;
#endif
}

static inline floats from_half(shorts half) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps((__m256i)half);
#else
    floats y;
    for (int i = 0; i < kLanes; i++) {
        const int32_t magnitude = half[i] & 0x7fff;
        const int32_t fine = bits_of<int32_t>(float(magnitude) * 0x1p-24f), coarse = (magnitude << 13) + (112 << 23);
        y[i] = bits_of<float>((magnitude < 0x400 ? fine : coarse) | (int32_t(half[i] & 0x8000) << 16));
    }
    return y;
#endif
}

static inline uint16_t to_bf16(float y) {
    const int32_t raw = bits_of<int32_t>(y), magnitude = raw & 0x7fffffff;
    const int32_t rounded = int32_t(uint32_t(raw) + 0x7fff + ((raw >> 16) & 1)) >> 16;
    return magnitude > 0x7f800000 ? 0x7fc0 : rounded;
}

static inline float from_bf16(uint16_t code) { return bits_of<float>(uint32_t(code) << 16); }

// Bits of the largest |x|: as integers these order like the floats, infinities and NaN last.
static inline int32_t largest_bits(const float* x, int64_t n) {
    int32_t found = 0;
    ints most = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        ints a = load<ints>(x + i) & 0x7fffffff;
        most = MORE(most, a);
    }
    for (; i < n; i++) found = MORE(found, bits_of<int32_t>(x[i]) & 0x7fffffff);
    FOLD(most, MORE)
    return MORE(found, most[0]);
}

// e4m3 is float16 of a 256th, cut to 3 bits of mantissa: x, a 256th of what is cast, is below 1. Ties go away from
// zero.
static inline bytes to_e4m3(floats x) {
    const shorts rounded = (to_half(x) + 0x40) >> 7;
    return __builtin_convertvector((rounded & 0x7f) | ((rounded >> 1) & 0x80), bytes);
}

#if defined(__AVX512BW__)
typedef uint16_t shorts32 __attribute__((vector_size(64)));
typedef uint8_t bytes32 __attribute__((vector_size(32)));
// Two vectors at once: most steps are on 16-bit numbers.
static inline bytes32 to_e4m3(floats x, floats y) {
    const __m512i left = _mm512_castsi256_si512((__m256i)to_half(x));
    const shorts32 rounded = ((shorts32)_mm512_inserti64x4(left, (__m256i)to_half(y), 1) + 0x40) >> 7;
    return __builtin_convertvector((rounded & 0x7f) | ((rounded >> 1) & 0x80), bytes32);
}
#endif

static inline floats from_e4m3(bytes codes, float unit) {
    const shorts wide = __builtin_convertvector(codes, shorts);
    return from_half(((wide & 0x7f) << 7) | ((wide & 0x80) << 8)) * 0x1p8f * unit;
}

#define EACH(name, source_t, target_t, result) \
    extern "C" void name(const source_t* __restrict__ x, int64_t n, target_t* __restrict__ y, int threads) { \
        _Pragma("omp parallel for simd num_threads(threads) if (n >= kSerial)") \
        for (int64_t i = 0; i < n; i++) y[i] = result; \
    }
EACH(pack_bf16, float, uint16_t, to_bf16(x[i]))
EACH(unpack_bf16, uint16_t, float, from_bf16(x[i]))

static const int64_t kBlock = 4096;

// Each block has a unit, the power of two that brings its largest |x| into [128, 256); NaN if it is not finite.
static void pack_block(const float* x, int64_t n, uint8_t* q, float* unit) {
    const int32_t largest = largest_bits(x, n), exponent = (largest >> 23) - 7;
    *unit = largest >= 0x7f800000 ? NAN : bits_of<float>((exponent > 1 ? exponent : 1) << 23);
    if (largest >= 0x7f800000) { std::memset(q, 0, n); return; }
    const float factor = 0x1p-8f / *unit;
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + 2 * kLanes <= n; i += 2 * kLanes)
        store(q + i, to_e4m3(load<floats>(x + i) * factor, load<floats>(x + i + kLanes) * factor));
#endif
    for (; i + kLanes <= n; i += kLanes) store(q + i, to_e4m3(load<floats>(x + i) * factor));
    if (i < n) {
        floats rest = {};
        std::memcpy(&rest, x + i, (n - i) * sizeof(float));
        const bytes codes = to_e4m3(rest * factor);
        std::memcpy(q + i, &codes, n - i);
    }
    if (exponent < 247) return;
    for (i = 0; i < n; i++)
        if ((q[i] & 0x7f) > 0x77) q[i] = (q[i] & 0x80) | 0x77;  // 256 units are infinite here
}

static void unpack_block(const uint8_t* q, int64_t n, float unit, float* x) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, from_e4m3(load<bytes>(q + i), unit));
    if (i == n) return;
    bytes codes = {};
    std::memcpy(&codes, q + i, n - i);
    const floats rest = from_e4m3(codes, unit);
    std::memcpy(x + i, &rest, (n - i) * sizeof(float));
}

extern "C" void pack_fp8(const float* x, int64_t n, uint8_t* q, float* units, int threads) {
    #pragma omp parallel for num_threads(threads) if (n >= kSerial)
    for (int64_t b = 0; b < (n + kBlock - 1) / kBlock; b++)
        pack_block(x + b * kBlock, LESS(kBlock, n - b * kBlock), q + b * kBlock, units + b);
}

extern "C" void unpack_fp8(const uint8_t* q, int64_t n, const float* units, float* x, int threads) {
    #pragma omp parallel for num_threads(threads) if (n >= kSerial)
    for (int64_t b = 0; b < (n + kBlock - 1) / kBlock; b++)
        unpack_block(q + b * kBlock, LESS(kBlock, n - b * kBlock), units[b], x + b * kBlock);
}
"""
