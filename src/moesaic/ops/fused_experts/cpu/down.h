/* The second product of a layer, into fp32 rows by expert, and their weighted sum for every token. */
#pragma once
#include "layer.h"

static void down_bias(const layer *l, const live *e, int64_t m0, int64_t M, int64_t n0, int64_t q) {
    const arguments *p = l->p;
    if (p->b_down)
        for (int64_t m = m0; m < m0 + M; m++)
            for (int64_t n = n0; n < n0 + q; n++)
                l->y[(e->row + m) * p->H + n] += get(p->b_down, e->expert * p->H + n, (int)p->dtype);
}

static void down_dot(const layer *l, const live *e, int64_t n0, int64_t q) {
    const arguments *p = l->p;
    int64_t size = size_of((int)p->dtype), row = p->down_row * size, end = n0 + q;
    const char *w = (const char *)p->w_down + e->expert * p->down_expert * size;
    const void *A[MAX_BLOCK], *B[DOT_NB], *following[DOT_NB];
    int column[DOT_NB];
    for (int64_t m0 = 0; m0 < e->rows; m0 += l->block) {
        int64_t M = min64(l->block, e->rows - m0);
        for (int64_t m = 0; m < M; m++)
            A[m] = l->a + (e->row + m0 + m) * l->a_row;
        for (int64_t n = n0; n < end; n += DOT_NB) {
            int more = m0 == 0 && n + DOT_NB < p->H;
            for (int j = 0; j < DOT_NB; j++) {
                int64_t at = min64(n + j, end - 1);
                B[j] = w + at * row, column[j] = (int)(at - n0);
                following[j] = w + min64(n + DOT_NB + j, p->H - 1) * row;
            }
            dot_strip(l->a_kind, M, A, B, more ? following : 0, p->I, l->y + (e->row + m0) * p->H + n0, p->H, column);
        }
        down_bias(l, e, m0, M, n0, q);
    }
}

static void down_outer(const layer *l, const live *e, int64_t n0, int64_t q) {
    const arguments *p = l->p;
    int64_t size = size_of((int)p->dtype);
    const char *w = (const char *)p->w_down + (e->expert * p->down_expert + n0) * size;
    const float *A[OUTER_ROWS];
    for (int64_t m0 = 0; m0 < e->rows; m0 += OUTER_ROWS) {
        int64_t M = min64(OUTER_ROWS, e->rows - m0);
        for (int64_t m = 0; m < M; m++)
            A[m] = (const float *)(l->a + (e->row + m0 + m) * l->a_row);
        outer_product((int)p->dtype, M, A, w, p->down_column * size, p->I, l->y + (e->row + m0) * p->H + n0, p->H, q);
        down_bias(l, e, m0, M, n0, q);
    }
}

#if HAVE_AMX
static void down_amx(const layer *l, const live *e, int64_t n0, int64_t q) {
    const arguments *p = l->p;
    int64_t bytes = panel_bytes(p->I), end = n0 + q;
    const char *w = (const char *)p->w_down + e->expert * p->down_expert * 2;
    float tiles[2][2][256], turned[256];
    left rows[2];
    for (int64_t b0 = 0; b0 < e->panels; b0 += l->amx_panels) {
        int64_t b1 = min64(e->panels, b0 + l->amx_panels);
        for (int64_t at = n0; at < end; at += 32) {
            int64_t n[2] = {min64(at, end - 16), min64(at + 16, end - 16)};
            for (int side = 0; side < 2; side++)
                left_of(&rows[side], w + n[side] * p->down_row * 2, p->down_row * 2, p->I);
            for (int64_t b = b0; b < b1; b += 2) {
                const char *x = l->a_panels + (e->panel + b) * bytes;
                int two = b + 1 < b1;
                if (two)
                    amx_2x2(rows, x, x + bytes, p->I, tiles);
                else
                    amx_2x1(rows, x, p->I, tiles);
                for (int i = 0; i <= two; i++) {
                    int64_t r = (b + i) * PANEL, count = min64(PANEL, e->rows - r);
                    float *y = l->y + (e->row + r) * p->H;
                    for (int side = 0; side < 2; side++) {
                        if (count == PANEL) {
                            transpose16(tiles[side][i], y + n[side], p->H);
                            continue;
                        }
                        transpose16(tiles[side][i], turned, 16);
                        for (int64_t m = 0; m < count; m++)
                            store(y + m * p->H + n[side], load(turned + 16 * m));
                    }
                }
            }
        }
    }
    down_bias(l, e, 0, e->rows, n0, q);
}
#endif

/* `out[t] = residual[t] + sum_k w[t, k]·y[row of (t, k)]`, in order of k, rounded once */
static void combine(const layer *l, int64_t t0, int64_t t1) {
    const arguments *p = l->p;
    int dtype = (int)p->dtype;
    enum { WIDE = 256 };
    float sums[WIDE];
    for (int64_t t = t0; t < t1; t++)
        for (int64_t h = 0; h < p->H; h += WIDE) {
            int64_t n = min64(WIDE, p->H - h);
            memset(sums, 0, sizeof sums);
            for (int64_t k = 0; k < p->K; k++) {
                int64_t r = p->row_index[t * p->K + k], i = 0;
                if (r < 0)
                    continue;
                const float *y = l->y + r * p->H + h;
                float w = p->weights ? p->weights[t * p->K + k] : 1.0f;
                for (; i + VL <= n; i += VL)
                    store(sums + i, load(sums + i) + w * load(y + i));
                for (; i < n; i++)
                    sums[i] = fmaf(w, y[i], sums[i]);
            }
            if (p->residual)
                for (int64_t i = 0; i < n; i++)
                    sums[i] += get(p->residual, t * p->residual_stride + h + i, dtype);
            store_row(p->out, t * p->H + h, dtype, sums, n);
        }
}
