/* What the backward pass needs beside torch's products: the activation's derivative over all rows, and the gradients
   of the weights, `out[e] = sum over the expert's rows r of left[r]ᵀ right[r]`.

   Both operands of a weight gradient are small and its result is large: it is written once, in its own dtype, by the
   job that computes it, into memory that is asked for in large pages; experts without rows get their zeros here too.
*/
#pragma once
#include "act_backward.h"
#include "amx.h"
#include "outer.h"
#include "pool.h"
#include <stdlib.h>
#include <sys/mman.h>

/* ------------------------------------------------------------------ the activation */
/* Filled by `_cpu_backward.py`, field by field in this order. Rows are by expert, one after the other. */
typedef struct {
    const void *hidden, *grad_a; /* (R, width) and (R, I); without a gradient only `scaled` is computed */
    const float *scale;          /* (R,), or null */
    void *grad_hidden, *scaled;  /* (R, width); scale·activation (R, I), or null */
    float *grad_scale;           /* (R,), or null */
    int64_t rows, I, dtype, act, interleaved, threads;
    double alpha, limit;
} activation_arguments;

enum { PIECE = 512 }; /* columns at a time: a multiple of every VL */

typedef struct {
    const activation_arguments *p;
    atomic_llong next;
} activation_work;

static void activation_row(const activation_arguments *p, int64_t r) {
    int act = (int)p->act, dtype = (int)p->dtype, gated = is_gated(act), apart = gated && p->interleaved;
    int64_t I = p->I, width = gated ? 2 * I : I;
    float alpha = (float)p->alpha, limit = (float)p->limit, scale = p->scale ? p->scale[r] : 1.0f;
    float g[PIECE], u[PIECE], d[PIECE], pair[2 * PIECE];
    vf total = splat(0.0f);
    memset(g, 0, sizeof g);
    memset(d, 0, sizeof d);
    for (int64_t i = 0; i < I; i += PIECE) {
        int64_t n = min64(PIECE, I - i), whole = round_up(n, VL);
        if (apart) {
            load_row(pair, p->hidden, r * width + 2 * i, dtype, 2 * n);
            for (int64_t j = 0; j < n; j++)
                g[j] = pair[2 * j], u[j] = pair[2 * j + 1];
        } else {
            if (gated)
                load_row(g, p->hidden, r * width + i, dtype, n);
            load_row(u, p->hidden, r * width + i + (gated ? I : 0), dtype, n);
        }
        if (p->grad_a)
            load_row(d, p->grad_a, r * I + i, dtype, n);
        for (int64_t j = n; j < whole; j++)
            g[j] = u[j] = d[j] = 0;
        for (int64_t j = 0; j < whole; j += VL) {
            vf gv = load(g + j), uv = load(u + j), dv = load(d + j), dg = splat(0.0f), du;
            vf a = activate(act, gv, uv, alpha, limit);
            store(d + j, scale * a);
            if (!p->grad_a)
                continue;
            activate_backward(act, gv, uv, scale * dv, alpha, limit, &dg, &du);
            total += a * dv;
            store(g + j, dg), store(u + j, du);
        }
        if (!p->grad_a) {
        } else if (apart) {
            for (int64_t j = 0; j < n; j++)
                pair[2 * j] = g[j], pair[2 * j + 1] = u[j];
            store_row(p->grad_hidden, r * width + 2 * i, dtype, pair, 2 * n);
        } else {
            if (gated)
                store_row(p->grad_hidden, r * width + i, dtype, g, n);
            store_row(p->grad_hidden, r * width + i + (gated ? I : 0), dtype, u, n);
        }
        if (p->scaled)
            store_row(p->scaled, r * I + i, dtype, d, n);
    }
    if (p->grad_scale)
        p->grad_scale[r] = sum_lanes(total);
}

static void activation_rows(void *context, int member) {
    activation_work *w = context;
    (void)member;
    for (;;) {
        int64_t r = 8 * atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed), end = min64(w->p->rows, r + 8);
        if (r >= w->p->rows)
            return;
        for (; r < end; r++)
            activation_row(w->p, r);
    }
}

/* ------------------------------------------------------------------ the tokens */
/* `out[t] = residual[t] + sum_k w[t, k]·rows[row_index[t, k]]` in fp32, in order of k, rounded once */
typedef struct {
    const void *rows, *residual;
    const float *weights;
    const int32_t *row_index;
    void *out;
    int64_t T, K, H, residual_stride, dtype, threads;
} sum_arguments;

typedef struct {
    const sum_arguments *p;
    atomic_llong next;
} sum_work;

static void sum_token(const sum_arguments *p, int64_t t) {
    int dtype = (int)p->dtype;
    float sums[PIECE];
    for (int64_t h = 0; h < p->H; h += PIECE) {
        int64_t n = min64(PIECE, p->H - h);
        memset(sums, 0, sizeof sums);
        for (int64_t k = 0; k < p->K; k++) {
            int64_t r = p->row_index[t * p->K + k], i = 0;
            if (r < 0)
                continue;
            float w = p->weights ? p->weights[t * p->K + k] : 1.0f;
            for (; i + VL <= n; i += VL)
                store(sums + i, load(sums + i) + w * load_as(p->rows, r * p->H + h + i, dtype));
            for (; i < n; i++)
                sums[i] = fmaf(w, get(p->rows, r * p->H + h + i, dtype), sums[i]);
        }
        if (p->residual)
            for (int64_t i = 0; i < n; i++)
                sums[i] += get(p->residual, t * p->residual_stride + h + i, dtype);
        store_row(p->out, t * p->H + h, dtype, sums, n);
    }
}

static void sum_tokens(void *context, int member) {
    sum_work *w = context;
    (void)member;
    for (;;) {
        int64_t t = 4 * atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed), end = min64(w->p->T, t + 4);
        if (t >= w->p->T)
            return;
        for (; t < end; t++)
            sum_token(w->p, t);
    }
}

/* ------------------------------------------------------------------ the weights */
/* Filled by `_cpu_backward.py`. Row r of an operand is its row r, or with `gather` that of r's token. */
typedef struct {
    const void *left, *right;
    void *out; /* (E, P, Q), contiguous */
    const int32_t *row_order, *expert_offsets;
    int64_t left_stride, right_stride, left_gather, right_gather;
    int64_t K, E, P, Q, dtype, threads, amx;
} weight_arguments;

#define P_CHUNK 96 /* rows of the result to a job: at most OUTER_ROWS */
#define Q_CHUNK 256

typedef struct {
    const weight_arguments *p;
    int64_t p_chunks, pack_jobs, longest; /* `longest`: rows of the longest expert, padded */
    int amx;
    char *right, *scratches; /* packed rows of `right` where they must be */
    int64_t scratch, *panels; /* of expert e: where its packed rows begin, in bytes */
    atomic_llong next, packed;
} weight_work;

INLINE const char *operand_row(const weight_arguments *p, int left, int64_t r) {
    int64_t at = (left ? p->left_gather : p->right_gather) ? p->row_order[r] / p->K : r;
    return (const char *)(left ? p->left : p->right) + at * (left ? p->left_stride : p->right_stride) *
           size_of((int)p->dtype);
}

/* the rows of one expert, from `right`: as they are, or for AMX in pairs of rows, 16 columns to a tile of 32 rows */
static void pack_right(const weight_work *w, int64_t e) {
    const weight_arguments *p = w->p;
    int64_t r0 = p->expert_offsets[e], rows = p->expert_offsets[e + 1] - r0, size = size_of((int)p->dtype);
    char *out = w->right + w->panels[e];
    if (!w->amx) {
        for (int64_t r = 0; r < rows; r++)
            memcpy(out + r * p->Q * size, operand_row(p, 0, r0 + r), (size_t)(p->Q * size));
        return;
    }
#if HAVE_AMX
    static const uint16_t none[16];
    int64_t padded = round_up(rows, AMX_K);
    for (int64_t r = 0; r < padded; r += 2) {
        const uint16_t *a = r < rows ? (const uint16_t *)operand_row(p, 0, r0 + r) : 0;
        const uint16_t *b = r + 1 < rows ? (const uint16_t *)operand_row(p, 0, r0 + r + 1) : 0;
        for (int64_t q = 0; q < p->Q; q += 16) { /* [16 columns][32 rows / 2][16][2] */
            __mmask16 m = (__mmask16)(p->Q - q >= 16 ? 0xffff : (1 << (p->Q - q)) - 1);
            __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(a ? m : 0, a ? a + q : none));
            __m512i hi = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(b ? m : 0, b ? b + q : none));
            _mm512_storeu_si512(out + q / 16 * padded * 32 + r * 32, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
        }
    }
#endif
}

#if HAVE_AMX
/* rows [p0, p0 + n) of the result: 2×2 tiles, n and Q in blocks of 32, whose overhang is not stored */
static void weight_amx(const weight_work *w, int64_t e, int64_t p0, int64_t n, char *scratch) {
    const weight_arguments *p = w->p;
    int64_t r0 = p->expert_offsets[e], rows = p->expert_offsets[e + 1] - r0, padded = round_up(rows, AMX_K);
    int64_t Q = p->Q, last = (Q + 15) / 16 - 1;
    uint16_t *left = (uint16_t *)scratch; /* [round_up(n, 32)][padded] */
    float tiles[4][256];
    memset(left, 0, (size_t)(round_up(n, 32) * padded * 2));
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *from = (const uint16_t *)operand_row(p, 1, r0 + r) + p0;
        for (int64_t i = 0; i < n; i++)
            left[i * padded + r] = from[i];
    }
    for (int64_t i = 0; i < n; i += 32)
        for (int64_t q = 0; q < Q; q += 32) {
            const char *x0 = w->right + w->panels[e] + q / 16 * padded * 32;
            const char *x1 = w->right + w->panels[e] + min64(q / 16 + 1, last) * padded * 32;
            const uint16_t *a = left + i * padded;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t r = 0; r < padded; r += AMX_K) {
                _tile_loadd(4, a + r, padded * 2);
                _tile_loadd(6, x0 + r * 32, 64);
                _tile_loadd(5, a + 16 * padded + r, padded * 2);
                _tile_loadd(7, x1 + r * 32, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, tiles[0], 64);
            _tile_stored(1, tiles[1], 64);
            _tile_stored(2, tiles[2], 64);
            _tile_stored(3, tiles[3], 64);
            for (int64_t j = 0; j < min64(32, n - i); j++) {
                const float *t = tiles[j / 16 * 2] + j % 16 * 16;
                int64_t at = (e * p->P + p0 + i + j) * Q + q;
                if (Q - q >= 32) {
                    store_as(p->out, at, BF16, load(t));
                    store_as(p->out, at + 16, BF16, load(t + 256));
                } else {
                    store_row(p->out, at, BF16, t, min64(16, Q - q));
                    if (Q - q > 16)
                        store_row(p->out, at + 16, BF16, t + 256, Q - q - 16);
                }
            }
        }
}
#endif

static void weight_outer(const weight_work *w, int64_t e, int64_t p0, int64_t n, char *scratch) {
    const weight_arguments *p = w->p;
    int dtype = (int)p->dtype;
    int64_t r0 = p->expert_offsets[e], rows = p->expert_offsets[e + 1] - r0, size = size_of(dtype);
    int packed = p->right_gather != 0;
    int64_t row_bytes = packed ? p->Q * size : p->right_stride * size;
    const char *right = packed ? w->right + w->panels[e] : operand_row(p, 0, r0);
    float *left = (float *)scratch, *c = left + P_CHUNK * w->longest; /* [n][rows] and [n][Q_CHUNK] */
    const float *A[P_CHUNK];
    for (int64_t r = 0; r < rows; r++) {
        const char *from = operand_row(p, 1, r0 + r);
        for (int64_t i = 0; i < n; i++)
            left[i * w->longest + r] = get(from, p0 + i, dtype);
    }
    for (int64_t i = 0; i < n; i++)
        A[i] = left + i * w->longest;
    for (int64_t q = 0; q < p->Q; q += Q_CHUNK) {
        int64_t width = min64(Q_CHUNK, p->Q - q);
        if (dtype == F32) {
            float *to = (float *)p->out + (e * p->P + p0) * p->Q + q;
            outer_product(F32, n, A, right + q * size, row_bytes, rows, to, p->Q, width);
            continue;
        }
        outer_product(dtype, n, A, right + q * size, row_bytes, rows, c, Q_CHUNK, width);
        for (int64_t i = 0; i < n; i++)
            store_row(p->out, (e * p->P + p0 + i) * p->Q + q, dtype, c + i * Q_CHUNK, width);
    }
}

static void weight_jobs(void *context, int member) {
    weight_work *w = context;
    const weight_arguments *p = w->p;
    char *scratch = w->scratches + member * w->scratch;
    int64_t size = size_of((int)p->dtype), all = w->pack_jobs + p->E * w->p_chunks;
#if HAVE_AMX
    if (w->amx)
        amx_begin();
#endif
    for (;;) {
        int64_t job = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (job >= all)
            break;
        if (job < w->pack_jobs) {
            pack_right(w, job);
            atomic_fetch_add_explicit(&w->packed, 1, memory_order_release);
            continue;
        }
        for (int spin = 0; atomic_load_explicit(&w->packed, memory_order_acquire) < w->pack_jobs; spin++)
            spin < SPINS ? pause_cpu() : (void)sched_yield();
        job -= w->pack_jobs;
        int64_t e = job / w->p_chunks, p0 = job % w->p_chunks * P_CHUNK, n = min64(P_CHUNK, p->P - p0);
        if (p->expert_offsets[e + 1] == p->expert_offsets[e])
            memset((char *)p->out + (e * p->P + p0) * p->Q * size, 0, (size_t)(n * p->Q * size));
#if HAVE_AMX
        else if (w->amx)
            weight_amx(w, e, p0, n, scratch);
#endif
        else
            weight_outer(w, e, p0, n, scratch);
    }
#if HAVE_AMX
    if (w->amx)
        amx_end();
#endif
}

/* Fresh memory costs a fault a page: ask for pages of 2 MiB. Advice only; where it is not taken, nothing is lost. */
static void large_pages(void *base, size_t bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t large = (uintptr_t)2 << 20, from = ((uintptr_t)base + large - 1) / large * large;
    uintptr_t to = ((uintptr_t)base + bytes) / large * large;
    if (to > from)
        (void)madvise((char *)base + (from - (uintptr_t)base), to - from, MADV_HUGEPAGE);
#else
    (void)base, (void)bytes;
#endif
}
