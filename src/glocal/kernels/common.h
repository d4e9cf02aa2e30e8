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
#elif defined(FLOAT16)
typedef _Float16 scalar;
#else
typedef float scalar;
#endif
#endif

typedef real vec __attribute__((vector_size(32)));
typedef lane_index ivec __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

INLINE vec load(const real *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(real *to, vec v) { memcpy(to, &v, sizeof v); }

INLINE real widened(scalar s) {
#if defined(BFLOAT16)
    uint32_t bits = (uint32_t)s << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#else
    return (real)s;
#endif
}

INLINE scalar narrowed(real value) {
#if defined(BFLOAT16)
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);  /* rounding could turn a NaN into infinity */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  /* to nearest, ties to even */
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
