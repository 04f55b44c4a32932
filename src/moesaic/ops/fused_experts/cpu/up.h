/* The first product of a layer and its epilogue: bias, the pre-activation kept for backward, the activation. */
#pragma once
#include "layer.h"

/* `row` of the up matrix behind column n of the activation: gate (side 0) or up (side 1) */
INLINE int64_t up_row_of(const arguments *p, int64_t n, int side) {
    if (!is_gated((int)p->act))
        return n;
    return p->interleaved ? 2 * n + side : n + side * p->I;
}

/* One row's columns [n0, n0 + q): `g` and `u` are its sums (u alone for a plain activation), both overwritten. */
static void up_epilogue(const layer *l, int64_t expert, int64_t r, int64_t n0, int64_t q, float *g, float *u) {
    const arguments *p = l->p;
    int act = (int)p->act, dtype = (int)p->dtype, gated = is_gated(act);
    int64_t width = gated ? 2 * p->I : p->I;
    float alpha = (float)p->alpha, limit = (float)p->limit;
    for (int side = gated ? 0 : 1; side < 2; side++) {
        float *v = side ? u : g;
        int apart = gated && p->interleaved;
        int64_t at = up_row_of(p, n0, side);
        if (p->b_up)
            for (int64_t i = 0; i < q; i++)
                v[i] += get(p->b_up, expert * width + at + (apart ? 2 * i : i), dtype);
        if (p->hidden && apart)
            for (int64_t i = 0; i < q; i++)
                put(p->hidden, r * width + at + 2 * i, dtype, v[i]);
        else if (p->hidden)
            store_row(p->hidden, r * width + at, dtype, v, q);
    }
    for (int64_t i = 0; i < q; i += VL) /* buffers are whole vectors long */
        store(u + i, activate(act, gated ? load(g + i) : splat(0), load(u + i), alpha, limit));
    write_operand(l->a + r * l->a_row, l->a_kind, u, n0, q);
    if (n0 + q == p->I)
        pad_operand(l->a + r * l->a_row, l->a_kind, p->I);
}

static const void *x_row(const layer *l, int64_t r) {
    const arguments *p = l->p;
    int64_t token = p->row_order[r] / p->K;
    return l->direct ? (const char *)p->x + token * p->x_stride * 4 : l->tokens + token * l->x_row;
}

/* the row pointers of a strip: gates then ups of DOT_NB/2 columns, or DOT_NB plain ones; those beyond repeat the last */
INLINE void up_strip(const arguments *p, const char *w, int64_t n, int64_t end, const void **rows, int *column,
                     int64_t n0, int64_t ups) {
    int gated = is_gated((int)p->act), wide = gated ? DOT_NB / 2 : DOT_NB;
    for (int j = 0; j < DOT_NB; j++) {
        int side = j / wide;
        int64_t at = min64(n + j % wide, end - 1);
        rows[j] = w + up_row_of(p, at, side) * p->up_row * size_of((int)p->dtype);
        if (column)
            column[j] = (int)(at - n0 + side * ups);
    }
}

static void up_dot(const layer *l, const live *e, int64_t n0, int64_t q, float *c) {
    const arguments *p = l->p;
    const char *w = (const char *)p->w_up + e->expert * p->up_expert * size_of((int)p->dtype);
    int gated = is_gated((int)p->act), wide = gated ? DOT_NB / 2 : DOT_NB;
    int64_t ups = gated ? l->up_floats : 0, ldc = 2 * l->up_floats;
    const void *A[MAX_BLOCK], *B[DOT_NB], *following[DOT_NB];
    int column[DOT_NB];
    for (int64_t m0 = 0; m0 < e->rows; m0 += l->block) {
        int64_t M = min64(l->block, e->rows - m0);
        for (int64_t m = 0; m < M; m++)
            A[m] = x_row(l, e->row + m0 + m);
        for (int64_t n = n0; n < n0 + q; n += wide) {
            int more = m0 == 0 && n + wide < p->I;
            up_strip(p, w, n, n0 + q, B, column, n0, ups);
            if (more)
                up_strip(p, w, n + wide, p->I, following, 0, 0, 0);
            dot_strip(l->x_kind, M, A, B, more ? following : 0, p->H, c, ldc, column);
        }
        for (int64_t m = 0; m < M; m++)
            up_epilogue(l, e->expert, e->row + m0 + m, n0, q, c + m * ldc, c + m * ldc + ups);
    }
}

static void up_outer(const layer *l, const live *e, int64_t n0, int64_t q, float *c) {
    const arguments *p = l->p;
    int dtype = (int)p->dtype, gated = is_gated((int)p->act), apart = gated && p->interleaved;
    int64_t size = size_of(dtype), ups = gated ? l->up_floats : 0, ldc = 2 * l->up_floats;
    const char *w = (const char *)p->w_up + e->expert * p->up_expert * size;
    const float *A[OUTER_ROWS];
    float pair[2][2 * OUTER_CHUNK];
    for (int64_t m0 = 0; m0 < e->rows; m0 += OUTER_ROWS) {
        int64_t M = min64(OUTER_ROWS, e->rows - m0);
        for (int64_t m = 0; m < M; m++)
            A[m] = x_row(l, e->row + m0 + m);
        if (apart) {
            outer_product(dtype, M, A, w + 2 * n0 * size, p->up_column * size, p->H, c, ldc, 2 * q);
        } else {
            outer_product(dtype, M, A, w + n0 * size, p->up_column * size, p->H, c, ldc, q);
            if (gated)
                outer_product(dtype, M, A, w + (n0 + p->I) * size, p->up_column * size, p->H, c + ups, ldc, q);
        }
        for (int64_t m = 0; m < M; m++) {
            float *g = c + m * ldc, *u = g + ups;
            if (apart) {
                for (int64_t i = 0; i < q; i++)
                    pair[0][i] = g[2 * i], pair[1][i] = g[2 * i + 1];
                g = pair[0], u = pair[1];
            }
            up_epilogue(l, e->expert, e->row + m0 + m, n0, q, g, u);
        }
    }
}

#if HAVE_AMX
/* A pre-activation tile [16 n][16 m] with its bias, kept for backward in the rows it belongs to. */
static void up_tile(const arguments *p, int64_t expert, int64_t row, int64_t rows, int64_t n, int side, float *tile) {
    int gated = is_gated((int)p->act), apart = gated && p->interleaved;
    int64_t width = gated ? 2 * p->I : p->I, at = up_row_of(p, n, side);
    float turned[256];
    if (p->b_up)
        for (int i = 0; i < 16; i++) {
            float b = get(p->b_up, expert * width + at + (apart ? 2 * i : i), BF16);
            store(tile + 16 * i, load(tile + 16 * i) + b);
        }
    if (!p->hidden)
        return;
    transpose16(tile, turned, 16);
    for (int64_t m = 0; m < rows; m++)
        if (apart)
            for (int i = 0; i < 16; i++)
                put(p->hidden, (row + m) * width + at + 2 * i, BF16, turned[16 * m + i]);
        else
            store_as(p->hidden, (row + m) * width + at, BF16, load(turned + 16 * m));
}

/* 16 columns of the activation, from n on, into a panel */
static void up_to_panel(const arguments *p, uint32_t *panel, int64_t n, const float *g, const float *u) {
    float alpha = (float)p->alpha, limit = (float)p->limit;
    vu a[16];
    for (int i = 0; i < 16; i++)
        a[i] = bf16_bits(activate((int)p->act, load(g + 16 * i), load(u + 16 * i), alpha, limit));
    if (n % 2 == 0) {
        for (int i = 0; i < 16; i += 2) {
            vu both = a[i] | (a[i + 1] << 16);
            memcpy(panel + (n + i) / 2 * PANEL, &both, sizeof both);
        }
        return;
    }
    for (int i = 0; i < 16; i++)
        for (int m = 0; m < PANEL; m++)
            ((uint16_t *)panel)[((n + i) / 2 * PANEL + m) * 2 + (n + i) % 2] = (uint16_t)a[i][m];
}

/* Blocks of 16 columns; the last one is moved back over its neighbour so that it is whole. */
static void up_amx(const layer *l, const live *e, int64_t n0, int64_t q) {
    const arguments *p = l->p;
    int gated = is_gated((int)p->act);
    int64_t bytes = panel_bytes(p->H), a_bytes = panel_bytes(p->I), end = n0 + q;
    int64_t stride = p->up_row * 2 * (gated && p->interleaved ? 2 : 1), wide = gated ? 16 : 32;
    const char *w = (const char *)p->w_up + e->expert * p->up_expert * 2;
    float tiles[2][2][256];
    left rows[2];
    for (int64_t b0 = 0; b0 < e->panels; b0 += l->amx_panels) {
        int64_t b1 = min64(e->panels, b0 + l->amx_panels);
        for (int64_t at = n0; at < end; at += wide) {
            int64_t n[2] = {min64(at, end - 16), min64(gated ? at : at + 16, end - 16)};
            for (int side = 0; side < 2; side++)
                left_of(&rows[side], w + up_row_of(p, n[side], side) * p->up_row * 2, stride, p->H);
            for (int64_t b = b0; b < b1; b += 2) {
                const char *x = l->x_panels + (e->panel + b) * bytes;
                int two = b + 1 < b1;
                if (two)
                    amx_2x2(rows, x, x + bytes, p->H, tiles);
                else
                    amx_2x1(rows, x, p->H, tiles);
                for (int i = 0; i <= two; i++) {
                    uint32_t *to = (uint32_t *)(l->a_panels + (e->panel + b + i) * a_bytes);
                    int64_t r = (b + i) * PANEL, count = min64(PANEL, e->rows - r);
                    for (int side = 0; side < 2; side++)
                        up_tile(p, e->expert, e->row + r, count, n[side], gated ? side : 1, tiles[side][i]);
                    if (gated) {
                        up_to_panel(p, to, n[0], tiles[0][i], tiles[1][i]);
                    } else {
                        up_to_panel(p, to, n[0], tiles[0][i], tiles[0][i]);
                        up_to_panel(p, to, n[1], tiles[1][i], tiles[1][i]);
                    }
                }
            }
        }
    }
    if (end == p->I)
        for (int64_t b = 0; b < e->panels; b++) {
            uint16_t *panel = (uint16_t *)(l->a_panels + (e->panel + b) * a_bytes);
            for (int64_t k = p->I; k < round_up(p->I, AMX_K); k++)
                for (int m = 0; m < PANEL; m++)
                    panel[(k / 2 * PANEL + m) * 2 + k % 2] = 0;
        }
}
#endif
