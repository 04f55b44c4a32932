/* Vectors of fp32, and how rows of fp32, bf16 and fp16 become them.

   One spelling for every instruction set: GCC's and Clang's vector types, as wide as the widest registers that the
   compiler was told of; intrinsics stand only where a vector type has no operation for it. `a * b + c` contracts to a
   fused multiply-add wherever there is one. A step is what one iteration along a row takes: VL elements, or 2·VL of
   bf16, whose even elements are the first half of a step and whose odd ones are the second (see `widen_row`).
*/
#pragma once
#include <math.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

enum dtype { F32, BF16, F16 };
/* what a row-dot multiplies: fp32 rows, bf16 or fp16 widened in registers, or bf16 pairs (`vdpbf16ps`) */
enum kind { DOT_F32, DOT_BF16, DOT_F16, DOT_PAIRS };

INLINE int size_of(int dtype) { return dtype == F32 ? 4 : 2; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf select_vf(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

/* ------------------------------------------------------------------ scalars of the half precisions */
INLINE float bf16_to_f32(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
INLINE uint16_t f32_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if (f != f)
        return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff, u;
    float f;
    if (exponent == 0) { /* zero and the subnormals: exact in fp32 */
        f = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    memcpy(&f, &u, 4);
    return f;
}
static uint16_t f32_to_f16(float f) {
    uint32_t u, sign, shift, kept, rest, half;
    int exponent;
    memcpy(&u, &f, 4);
    sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000) /* what rounds to 2^16 and more, and infinity */
        return (uint16_t)(sign | 0x7c00);
    exponent = (int)(u >> 23) - 112;
    if (exponent < -10)
        return (uint16_t)sign;
    if (exponent > 0) {
        kept = ((uint32_t)exponent << 10) | ((u >> 13) & 0x3ff);
        rest = u & 0x1fff;
        half = 0x1000;
    } else { /* subnormal: the implicit one comes into the mantissa */
        shift = (uint32_t)(14 - exponent);
        u = (u & 0x7fffff) | 0x800000;
        kept = u >> shift;
        rest = u & ((1u << shift) - 1);
        half = 1u << (shift - 1);
    }
    if (rest > half || (rest == half && (kept & 1)))
        kept++;
    return (uint16_t)(sign | kept);
}
INLINE float get(const void *p, int64_t i, int dtype) {
    if (dtype == F32)
        return ((const float *)p)[i];
    return dtype == BF16 ? bf16_to_f32(((const uint16_t *)p)[i]) : f16_to_f32(((const uint16_t *)p)[i]);
}
INLINE void put(void *p, int64_t i, int dtype, float v) {
    if (dtype == F32)
        ((float *)p)[i] = v;
    else
        ((uint16_t *)p)[i] = dtype == BF16 ? f32_to_bf16(v) : f32_to_f16(v);
}

/* ------------------------------------------------------------------ vectors of the half precisions */
INLINE vf load_bf16(const uint16_t *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
INLINE vf load_f16(const uint16_t *p) {
#if VL == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif VL == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__ARM_NEON)
    float16x4_t h;
    memcpy(&h, p, sizeof h);
    return (vf)vcvt_f32_f16(h);
#else
    vf v;
    for (int i = 0; i < VL; i++)
        v[i] = f16_to_f32(p[i]);
    return v;
#endif
}
/* VL elements in their own order */
INLINE vf load_as(const void *p, int64_t i, int dtype) {
    if (dtype == F32)
        return load((const float *)p + i);
    return dtype == BF16 ? load_bf16((const uint16_t *)p + i) : load_f16((const uint16_t *)p + i);
}
/* the bits of bf16 in the low halves of 32-bit lanes */
INLINE vu bf16_bits(vf v) {
    vu u = (vu)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vi nan = v != v;
    return (rounded & (vu)~nan) | (((u >> 16) | 0x40) & (vu)nan);
}
INLINE void store_as(void *p, int64_t i, int dtype, vf v) {
    if (dtype == F32) {
        store((float *)p + i, v);
    } else if (dtype == BF16) {
        vh h = __builtin_convertvector(bf16_bits(v), vh);
        memcpy((uint16_t *)p + i, &h, sizeof h);
    } else {
#if VL == 16
        _mm256_storeu_si256((__m256i *)((uint16_t *)p + i), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif VL == 8
        _mm_storeu_si128((__m128i *)((uint16_t *)p + i), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
        float16x4_t h = vcvt_f16_f32((float32x4_t)v);
        memcpy((uint16_t *)p + i, &h, sizeof h);
#else
        for (int l = 0; l < VL; l++)
            ((uint16_t *)p)[i + l] = f32_to_f16(v[l]);
#endif
    }
}
/* n fp32 values rounded into a row of any dtype, and the reverse */
static void store_row(void *p, int64_t at, int dtype, const float *v, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        store_as(p, at + i, dtype, load(v + i));
    for (; i < n; i++)
        put(p, at + i, dtype, v[i]);
}
static void load_row(float *v, const void *p, int64_t at, int dtype, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        store(v + i, load_as(p, at + i, dtype));
    for (; i < n; i++)
        v[i] = get(p, at + i, dtype);
}

/* ------------------------------------------------------------------ the operand rows of a row-dot */
INLINE int step_of(int kind) { return kind == DOT_BF16 || kind == DOT_PAIRS ? 2 * VL : VL; }
INLINE int64_t padded_row(int64_t n) { return round_up(n, 2 * VL); }
/* where element k of a row of a DOT_BF16 operand lies: the evens of a step, then its odds */
INLINE int64_t swizzled(int64_t k) { return (k & ~(int64_t)(2 * VL - 1)) + (k & 1) * VL + (k & (2 * VL - 1)) / 2; }

/* `n` fp32 values as an operand of `kind`, zeros up to a whole step */
static void write_operand(void *row, int kind, const float *v, int64_t at, int64_t n) {
    if (kind == DOT_PAIRS)
        store_row(row, at, BF16, v, n);
    else if (kind == DOT_BF16)
        for (int64_t i = 0; i < n; i++)
            ((float *)row)[swizzled(at + i)] = v[i];
    else
        memcpy((float *)row + at, v, (size_t)n * 4);
}
static void pad_operand(void *row, int kind, int64_t n) {
    if (kind == DOT_BF16)
        for (int64_t k = n; k < padded_row(n); k++)
            ((float *)row)[swizzled(k)] = 0;
    else if (kind == DOT_PAIRS)
        memset((uint16_t *)row + n, 0, (size_t)(padded_row(n) - n) * 2);
    else
        memset((float *)row + n, 0, (size_t)(padded_row(n) - n) * 4);
}
/* a row of x as an operand of `kind` */
static void widen_row(void *row, int kind, const void *x, int64_t at, int dtype, int64_t n) {
    int64_t k = 0;
    if (kind == DOT_PAIRS) {
        memcpy(row, (const uint16_t *)x + at, (size_t)n * 2);
    } else if (kind == DOT_BF16) {
        for (; k + 2 * VL <= n; k += 2 * VL) {
            vu u;
            memcpy(&u, (const uint16_t *)x + at + k, sizeof u);
            store((float *)row + k, (vf)(u << 16));
            store((float *)row + k + VL, (vf)(u & 0xffff0000u));
        }
        for (; k < n; k++)
            ((float *)row)[swizzled(k)] = bf16_to_f32(((const uint16_t *)x)[at + k]);
    } else {
        load_row((float *)row, x, at, dtype, n);
    }
    pad_operand(row, kind, n);
}

INLINE float sum_lanes(vf v) {
#if VL == 16
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#elif VL == 8
    __m256 half = (__m256)v;
#endif
#if VL >= 8
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
