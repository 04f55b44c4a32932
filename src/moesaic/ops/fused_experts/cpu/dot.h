/* C[m][n] = sum_k A[m][k]·B[n][k]: both operands lie along k, so the weights are read where they are, as they are.

   A tile of MB rows of A by NB rows of B is held in registers, lanes along k; its sums are added across lanes once, at
   the end. The order of an element's additions depends on k alone: not on the tile, the block or the thread it falls
   to. The hardware sees a row coming but not the next strip's, a page or more away: the tiles of a strip bring that
   nearer between them, so that memory is read while products are computed.
*/
#pragma once
#include "vec.h"

#if VL == 8
#define DOT_MB 2 /* 16 registers */
#define DOT_NB 4
#else
#define DOT_MB 4 /* 32 registers */
#define DOT_NB 6
#endif

typedef struct {
    const char *rows[DOT_NB]; /* of the next strip, brought into the L2 beside this tile's products */
    int count;
} ahead;

/* half `h` of a step of weights, in fp32 */
INLINE vf half_step(int kind, int h, const void *p) {
    if (kind == DOT_F32)
        return load(p);
    if (kind == DOT_F16)
        return load_f16(p);
    vu u;
    memcpy(&u, p, sizeof u);
    return h ? (vf)(u & 0xffff0000u) : (vf)(u << 16);
}

INLINE void dot_step(int kind, int MB, int NB, vf acc[DOT_MB][DOT_NB], const void *const *A, const char *const *B,
                     int64_t k, int64_t at) {
    if (kind == DOT_PAIRS) {
#if VL == 16 && defined(__AVX512BF16__)
        __m512bh a[DOT_MB];
        UNROLL for (int i = 0; i < MB; i++) a[i] = (__m512bh)_mm512_loadu_si512((const uint16_t *)A[i] + k);
        UNROLL for (int j = 0; j < NB; j++) {
            __m512bh b = (__m512bh)_mm512_loadu_si512(B[j] + at);
            UNROLL for (int i = 0; i < MB; i++) acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], a[i], b);
        }
#endif
        return;
    }
    for (int h = 0; h < (kind == DOT_BF16 ? 2 : 1); h++) {
        vf a[DOT_MB];
        UNROLL for (int i = 0; i < MB; i++) a[i] = load((const float *)A[i] + k + h * VL);
        UNROLL for (int j = 0; j < NB; j++) {
            vf b = half_step(kind, h, B[j] + at);
            UNROLL for (int i = 0; i < MB; i++) acc[i][j] += a[i] * b;
        }
    }
}

/* Elements [k0, k1) of the sums of MB rows of A (operands of `kind`, padded) and NB rows of B (any alignment, not
   padded). They go on from `state` unless k0 is 0, and back to it unless k1 is K: then into `C[i·ldc + column[j]]`. */
INLINE void dot_tile(int kind, int MB, int NB, const void *const *A, const void *const *B, int64_t k0, int64_t k1,
                     int64_t K, vf *state, float *C, int64_t ldc, const int *column, const ahead *next) {
    int S = step_of(kind), size = kind == DOT_F32 ? 4 : 2;
    int64_t k = k0, full = k0 + (k1 - k0) / S * S;
    vf acc[DOT_MB][DOT_NB];
    const char *b[DOT_NB];
    if (k0 == 0)
        UNROLL for (int i = 0; i < MB; i++) UNROLL for (int j = 0; j < NB; j++) acc[i][j] = splat(0.0f);
    else
        UNROLL for (int i = 0; i < MB; i++) UNROLL for (int j = 0; j < NB; j++) acc[i][j] = state[i * NB + j];
    UNROLL for (int j = 0; j < NB; j++) b[j] = B[j];
    for (; k < full; k += S) {
        for (int q = 0; q < next->count; q++)
            __builtin_prefetch(next->rows[q] + k * size, 0, 2);
        dot_step(kind, MB, NB, acc, A, b, k, k * size);
    }
    if (k < k1) { /* what is left of a row, and zeros */
        char tail[DOT_NB][8 * VL];
        for (int j = 0; j < NB; j++) {
            memset(tail[j], 0, sizeof tail[j]);
            memcpy(tail[j], b[j] + k * size, (size_t)((k1 - k) * size));
            b[j] = tail[j];
        }
        dot_step(kind, MB, NB, acc, A, b, k, 0);
    }
    if (k1 < K)
        UNROLL for (int i = 0; i < MB; i++) UNROLL for (int j = 0; j < NB; j++) state[i * NB + j] = acc[i][j];
    else
        UNROLL for (int i = 0; i < MB; i++)
            UNROLL for (int j = 0; j < NB; j++) C[i * ldc + column[j]] = sum_lanes(acc[i][j]);
}

/* Along k in blocks, so that the strip's rows of B stay in the L1 while the rows of A pass; sums wait in vectors. */
#define DOT_KB 512 /* a multiple of every step */
#define MAX_BLOCK 128 /* rows of A at a time */

/* M rows of A by one strip of NB rows of B */
INLINE void dot_strip_of(int kind, int64_t M, const void *const *A, const void *const *B, const void *const *following,
                         int64_t K, float *C, int64_t ldc, const int *column) {
    vf state[MAX_BLOCK / DOT_MB][DOT_MB * DOT_NB];
    int64_t tiles = (M + DOT_MB - 1) / DOT_MB, block = tiles > 2 ? DOT_KB : max64(K, 1);
    int64_t each = following ? (DOT_NB + tiles - 1) / tiles : 0, k0 = 0;
    do {
        int64_t k1 = min64(k0 + block, K);
        for (int64_t t = 0; t < tiles; t++) {
            int64_t m = t * DOT_MB;
            float *c = C + m * ldc;
            ahead next = {{0}, 0};
            for (int64_t j = t * each; j < min64(DOT_NB, (t + 1) * each); j++)
                next.rows[next.count++] = following[j];
            switch (min64(M - m, DOT_MB)) {
#if DOT_MB == 4
            case 4: dot_tile(kind, 4, DOT_NB, A + m, B, k0, k1, K, state[t], c, ldc, column, &next); break;
            case 3: dot_tile(kind, 3, DOT_NB, A + m, B, k0, k1, K, state[t], c, ldc, column, &next); break;
#endif
            case 2: dot_tile(kind, 2, DOT_NB, A + m, B, k0, k1, K, state[t], c, ldc, column, &next); break;
            default: dot_tile(kind, 1, DOT_NB, A + m, B, k0, k1, K, state[t], c, ldc, column, &next);
            }
        }
        k0 = k1;
    } while (k0 < K);
}

static void dot_strip(int kind, int64_t M, const void *const *A, const void *const *B, const void *const *following,
                      int64_t K, float *C, int64_t ldc, const int *column) {
    switch (kind) {
    case DOT_F32: dot_strip_of(DOT_F32, M, A, B, following, K, C, ldc, column); break;
    case DOT_BF16: dot_strip_of(DOT_BF16, M, A, B, following, K, C, ldc, column); break;
    case DOT_F16: dot_strip_of(DOT_F16, M, A, B, following, K, C, ldc, column); break;
    default: dot_strip_of(DOT_PAIRS, M, A, B, following, K, C, ldc, column);
    }
}
