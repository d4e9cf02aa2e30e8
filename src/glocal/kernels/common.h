/* What the kernels share: the number types, 32-byte vectors, the conversions at their borders.

   Each translation unit is built for one type of tensor element: FLOAT32, FLOAT64, BFLOAT16 or FLOAT16 is
   defined on the command line. All arithmetic is in `real`: double for FLOAT64, float for the others. Vectors
   hold 32 bytes, also where the processor has wider ones: they fit the 16 registers of AVX2, and two such
   operations a cycle keep up with one of 64 bytes. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(FLOAT64)
typedef double real;
typedef double scalar;
typedef int64_t lane_index;
#define LANES 4
#else
typedef float real;
typedef int32_t lane_index;
#define LANES 8
#if defined(BFLOAT16)
typedef uint16_t scalar;
#elif defined(FLOAT16) && defined(__FLT16_MAX__)
typedef _Float16 scalar;
#elif defined(FLOAT16)
typedef uint16_t scalar; /* gcc before 12 and clang before 15 have no such type for x86 */
#else
typedef float scalar;
#endif
#endif

typedef real vec __attribute__((vector_size(32)));
typedef real unaligned __attribute__((vector_size(32), aligned(sizeof(real)), may_alias));
typedef lane_index ivec __attribute__((vector_size(32)));

#if defined(__GNUC__) && __GNUC__ < 12 && !defined(__clang__)
#define __builtin_shufflevector(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__}) /* as it was called before */
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

INLINE vec load(const real *from) { return *(const unaligned *)from; }

INLINE void store(real *to, vec v) { *(unaligned *)to = v; }

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE real widened(scalar s) {
#if defined(BFLOAT16)
    return float_of((uint32_t)s << 16);
#elif defined(FLOAT16) && !defined(__FLT16_MAX__)
    uint32_t sign = (uint32_t)(s & 0x8000) << 16, rest = (uint32_t)(s & 0x7fff) << 13;
    uint32_t small = bits_of(float_of(rest + 0x38800000) - float_of(0x38800000)); /* 2^-14: below it ulps are equal */
    return float_of(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : rest >= 0x00800000 ? rest + 0x38000000 : small));
#else
    return (real)s;
#endif
}

INLINE scalar narrowed(real value) {
#if defined(BFLOAT16)
    uint32_t bits = bits_of(value);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);  /* rounding could turn a NaN into infinity */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  /* to nearest, ties to even */
#elif defined(FLOAT16) && !defined(__FLT16_MAX__)
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3f000000; /* the ulp of 0.5 is the smallest half */
    uint32_t large = rest > 0x7f800000 ? 0x7e00 | (rest >> 13 & 0x3ff) : 0x7c00;
    uint32_t normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    return (uint16_t)(sign | (rest >= 0x47800000 ? large : rest >= 0x38800000 ? normal : small));
#else
    return (scalar)value;
#endif
}

INLINE void widen(real *restrict to, const scalar *restrict from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = widened(from[i]);
}

INLINE void narrow(scalar *restrict to, const real *restrict from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = narrowed(from[i]);
}

/* Sum of the lanes, always in the same order. */
INLINE real sum_lanes(vec v) {
#if LANES == 8
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

INLINE vec splat(real value) {
#if LANES == 8
    return (vec){value, value, value, value, value, value, value, value};
#else
    return (vec){value, value, value, value};
#endif
}

INLINE vec load_widened(const scalar *from) {
#if defined(BFLOAT16)
    typedef uint16_t halves __attribute__((vector_size(16)));
    typedef uint32_t wholes __attribute__((vector_size(32)));
    halves h;
    memcpy(&h, from, sizeof h);
    return (vec)(__builtin_convertvector(h, wholes) << 16);
#elif defined(FLOAT16) && defined(__FLT16_MAX__)
    typedef _Float16 halves __attribute__((vector_size(16)));
    halves h;
    memcpy(&h, from, sizeof h);
    return __builtin_convertvector(h, vec);
#elif defined(FLOAT16)
    vec v;
    for (int i = 0; i < LANES; i++) v[i] = widened(from[i]);
    return v;
#else
    return load(from);
#endif
}

INLINE void store_narrowed(scalar *to, vec v) {
#if defined(FLOAT64) || defined(FLOAT32)
    store(to, v);
#elif defined(BFLOAT16)
    typedef uint16_t halves __attribute__((vector_size(16)));
    typedef uint32_t wholes __attribute__((vector_size(32)));
    wholes bits = (wholes)v, nan = (wholes)(v != v);
    bits = ((bits + 0x7fff + (bits >> 16 & 1)) & ~nan) | ((bits | 0x400000) & nan);
    halves h = __builtin_convertvector(bits >> 16, halves);
    memcpy(to, &h, sizeof h);
#elif defined(__FLT16_MAX__)
    typedef _Float16 halves __attribute__((vector_size(16)));
    halves h = __builtin_convertvector(v, halves);
    memcpy(to, &h, sizeof h);
#else
    for (int i = 0; i < LANES; i++) to[i] = narrowed(v[i]);
#endif
}

/* Rows become columns. */
INLINE void transpose_square(vec r[LANES]) {
#if LANES == 8
    vec a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * j + 1] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
    vec a[4];
    for (int i = 0; i < 4; i += 2) {
        a[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 4, 2, 6);
        a[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 5, 3, 7);
    }
    for (int i = 0; i < 2; i++) {
        r[i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 4, 5);
        r[i + 2] = __builtin_shufflevector(a[i], a[i + 2], 2, 3, 6, 7);
    }
#endif
}

/* [a0 + a1, a2 + a3, b0 + b1, b2 + b3] in each half of two vectors. */
INLINE vec add_pairs(vec a, vec b) {
#if LANES == 8
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
    return __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
#endif
}

/* [sum of a[0], sum of a[1], ...]: each sum adds its lanes in the same order. */
INLINE vec sums_of(const vec a[LANES]) {
#if LANES == 8
    vec b = add_pairs(add_pairs(a[0], a[1]), add_pairs(a[2], a[3]));
    vec c = add_pairs(add_pairs(a[4], a[5]), add_pairs(a[6], a[7]));
    return __builtin_shufflevector(b, c, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(b, c, 4, 5, 6, 7, 12, 13, 14, 15);
#else
    vec b = add_pairs(a[0], a[1]), c = add_pairs(a[2], a[3]);
    return __builtin_shufflevector(b, c, 0, 1, 4, 5) + __builtin_shufflevector(b, c, 2, 3, 6, 7);
#endif
}

/* The larger of each two; `b` where either is not a number. */
INLINE vec max_vec(vec a, vec b) {
    ivec larger = a > b;
    return (vec)((larger & (ivec)a) | (~larger & (ivec)b));
}

INLINE real max_lanes(vec v) {
#if LANES == 8
    v = max_vec(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = max_vec(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = max_vec(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    v = max_vec(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    v = max_vec(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
#endif
    return v[0];
}

/* e to the power of x, for x up to 88 (double: 709), within 2 units in the last place. Exactly 0 where the result
   would be less than the smallest normal number, so also for minus infinity; NaN stays NaN. */
INLINE vec exp_vec(vec x) {
#if LANES == 8
    const real ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f, round = 0x1.8p23f, least = -87.33654f;
    const int bias = 127, mantissa = 23;
    static const real terms[] = {  /* the polynomial nearest to e^x, relative to it, for x up to ln(2) / 2 */
        0x1.6a23cf2150a07p-10f, 0x1.123a1f45f837fp-7f, 0x1.5558f2f66ebf7p-5f, 0x1.555491042a172p-3f,
        0x1.fffffb97a5901p-2f, 1, 1};
#else
    const real ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40, round = 0x1.8p52, least = -708.3964;
    const int bias = 1023, mantissa = 52;
    static const real terms[] = {  /* Taylor's */
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
        1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1, 1};
#endif
    vec whole = x * (real)1.4426950408889634 + round;  /* the low bits of its mantissa are the whole number */
    vec n = whole - round;
    vec rest = x - n * ln2_high - n * ln2_low;  /* at most ln(2) / 2 */
    vec sum = splat(terms[0]);
    for (size_t i = 1; i < sizeof terms / sizeof *terms; i++) sum = sum * rest + terms[i];
    ivec power = ((ivec)whole + bias) << mantissa;  /* 2 to the n */
    return (vec)((ivec)(sum * (vec)power) & ~(ivec)(x < least));
}
