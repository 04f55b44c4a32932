/* C[m][n] += sum_k A[m][k]·W[k][n]: for weights stored input-major, whose columns lie side by side.

   Lanes along n; an element of A is broadcast. K goes by in blocks of KB rows, so that a block of weights is read in
   long pieces and stays in cache while every row of A passes over it; between blocks a sum waits in C, in fp32, which
   changes nothing. The order of an element's additions is that of k.
*/
#pragma once
#include "vec.h"

#define OUTER_KB 64
#if VL == 8
#define OUTER_MB 4
#define OUTER_NV 2
#else
#define OUTER_MB 6
#define OUTER_NV 4
#endif

INLINE void outer_tile(int dtype, int MB, int NV, const float *const *A, const char *W, int64_t row_bytes, int64_t kn,
                       float *C, int64_t ldc, int first) {
    int size = size_of(dtype);
    vf acc[OUTER_MB][OUTER_NV];
    if (first)
        UNROLL for (int i = 0; i < MB; i++) UNROLL for (int j = 0; j < NV; j++) acc[i][j] = splat(0.0f);
    else
        UNROLL for (int i = 0; i < MB; i++)
            UNROLL for (int j = 0; j < NV; j++) acc[i][j] = load(C + i * ldc + j * VL);
    for (int64_t k = 0; k < kn; k++, W += row_bytes) {
        vf w[OUTER_NV];
        UNROLL for (int j = 0; j < NV; j++) w[j] = load_as(W + j * VL * size, 0, dtype);
        UNROLL for (int i = 0; i < MB; i++) {
            vf a = splat(A[i][k]);
            UNROLL for (int j = 0; j < NV; j++) acc[i][j] += a * w[j];
        }
    }
    UNROLL for (int i = 0; i < MB; i++)
        UNROLL for (int j = 0; j < NV; j++) store(C + i * ldc + j * VL, acc[i][j]);
}

INLINE void outer_rows(int dtype, int NV, int64_t M, const float *const *A, const char *W, int64_t row_bytes,
                       int64_t kn, float *C, int64_t ldc, int first) {
    for (int64_t m = 0; m < M; m += OUTER_MB) {
        float *c = C + m * ldc;
        switch (min64(M - m, OUTER_MB)) {
#if OUTER_MB == 6
        case 6: outer_tile(dtype, 6, NV, A + m, W, row_bytes, kn, c, ldc, first); break;
        case 5: outer_tile(dtype, 5, NV, A + m, W, row_bytes, kn, c, ldc, first); break;
#endif
        case 4: outer_tile(dtype, 4, NV, A + m, W, row_bytes, kn, c, ldc, first); break;
        case 3: outer_tile(dtype, 3, NV, A + m, W, row_bytes, kn, c, ldc, first); break;
        case 2: outer_tile(dtype, 2, NV, A + m, W, row_bytes, kn, c, ldc, first); break;
        default: outer_tile(dtype, 1, NV, A + m, W, row_bytes, kn, c, ldc, first);
        }
    }
}

/* the last columns, fewer than a vector: through a padded copy of them */
static void outer_tail(int dtype, int64_t M, const float *const *A, const char *W, int64_t row_bytes, int64_t kn,
                       float *C, int64_t ldc, int64_t n, int first) {
    char copy[OUTER_KB * VL * 4];
    float sums[VL];
    int size = size_of(dtype);
    memset(copy, 0, sizeof copy);
    for (int64_t k = 0; k < kn; k++)
        memcpy(copy + k * VL * size, W + k * row_bytes, (size_t)(n * size));
    for (int64_t m = 0; m < M; m++) {
        memset(sums, 0, sizeof sums);
        memcpy(sums, C + m * ldc, (size_t)n * 4);
        switch (dtype) {
        case F32: outer_tile(F32, 1, 1, A + m, copy, VL * size, kn, sums, VL, first); break;
        case BF16: outer_tile(BF16, 1, 1, A + m, copy, VL * size, kn, sums, VL, first); break;
        default: outer_tile(F16, 1, 1, A + m, copy, VL * size, kn, sums, VL, first);
        }
        memcpy(C + m * ldc, sums, (size_t)n * 4);
    }
}

INLINE void outer_block_of(int dtype, int64_t M, const float *const *A, const char *W, int64_t row_bytes, int64_t kn,
                           float *C, int64_t ldc, int64_t N, int first) {
    int64_t n = 0;
    for (; n + OUTER_NV * VL <= N; n += OUTER_NV * VL)
        outer_rows(dtype, OUTER_NV, M, A, W + n * size_of(dtype), row_bytes, kn, C + n, ldc, first);
    for (; n + VL <= N; n += VL)
        outer_rows(dtype, 1, M, A, W + n * size_of(dtype), row_bytes, kn, C + n, ldc, first);
    if (n < N)
        outer_tail(dtype, M, A, W + n * size_of(dtype), row_bytes, kn, C + n, ldc, N - n, first);
}

/* `C[m][0..N)` of M rows of A in fp32, at most OUTER_ROWS; `W` points at the first column wanted; C is overwritten */
#define OUTER_ROWS 96
static void outer_product(int dtype, int64_t M, const float *const *A, const char *W, int64_t row_bytes, int64_t K,
                          float *C, int64_t ldc, int64_t N) {
    const float *a[OUTER_ROWS];
    if (K == 0)
        for (int64_t m = 0; m < M; m++)
            memset(C + m * ldc, 0, (size_t)N * 4);
    for (int64_t k = 0; k < K; k += OUTER_KB) {
        int64_t kn = min64(OUTER_KB, K - k);
        int first = k == 0;
        for (int64_t m = 0; m < M; m++)
            a[m] = A[m] + k;
        switch (dtype) {
        case F32: outer_block_of(F32, M, a, W + k * row_bytes, row_bytes, kn, C, ldc, N, first); break;
        case BF16: outer_block_of(BF16, M, a, W + k * row_bytes, row_bytes, kn, C, ldc, N, first); break;
        default: outer_block_of(F16, M, a, W + k * row_bytes, row_bytes, kn, C, ldc, N, first);
        }
    }
}
