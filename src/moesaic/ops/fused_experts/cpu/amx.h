/* bf16 products on AMX's tiles: C'[n][m] = sum_k W[n][k]·X[m][k], weights on the left.

   The left operand of `tdpbf16ps` is 16 rows of 32 elements as they lie in memory, so the weights are read where they
   are; the right one wants pairs of k side by side, 16 rows of x to a line, and x is the small one: it is packed into
   panels of 16 rows, `panel[k/2][m][2]`, zeros up to 16 rows and to 32 elements of k. A result tile has n along its
   rows and m along its lanes, which is the panel's own shape: the activation's output goes to the next panel without
   being transposed.
*/
#pragma once
#include "vec.h"

#if defined(__AMX_BF16__) && defined(__linux__) && VL == 16
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

#define PANEL 16 /* rows of x to a panel */
#define AMX_K 32 /* elements of k to a tile */

/* Linux lends the tile registers to programs that ask: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA. */
static int amx_ask(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

static void amx_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t columns[16];
        uint8_t rows[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++)
        config.columns[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}
static void amx_end(void) { _tile_release(); }

INLINE int64_t panel_bytes(int64_t K) { return round_up(K, AMX_K) * PANEL * 2; }

/* rows `row[0..n)` of bf16, K elements each, as a panel */
static void pack_panel(void *panel, const uint16_t *const *row, int64_t n, int64_t K) {
    static const uint16_t zeros[AMX_K];
    uint32_t *out = panel;
    for (int64_t k = 0; k < round_up(K, AMX_K); k += AMX_K, out += AMX_K / 2 * PANEL)
        for (int r = 0; r < PANEL; r++) {
            uint16_t part[AMX_K];
            if (r >= n)
                memcpy(part, zeros, sizeof part);
            else if (k + AMX_K <= K)
                memcpy(part, row[r] + k, sizeof part);
            else {
                memset(part, 0, sizeof part);
                memcpy(part, row[r] + k, (size_t)(K - k) * 2);
            }
            for (int p = 0; p < AMX_K / 2; p++)
                memcpy(out + p * PANEL + r, part + 2 * p, 4);
        }
}

/* 16 rows of W, `stride` bytes apart, and what its rows lack of a whole tile, padded with zeros */
typedef struct {
    const char *rows;
    int64_t stride;
    uint16_t tail[16][AMX_K];
} left;

static void left_of(left *l, const char *rows, int64_t stride, int64_t K) {
    int64_t full = K / AMX_K * AMX_K;
    l->rows = rows, l->stride = stride;
    if (full == K)
        return;
    memset(l->tail, 0, sizeof l->tail);
    for (int r = 0; r < 16; r++)
        memcpy(l->tail[r], rows + r * stride + full * 2, (size_t)(K - full) * 2);
}

/* two left blocks by two panels: `out[block][panel]` are tiles [16 n][16 m] */
static void amx_2x2(const left *w, const char *x0, const char *x1, int64_t K, float out[2][2][256]) {
    int64_t k = 0, full = K / AMX_K * AMX_K;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; k < full; k += AMX_K, x0 += 1024, x1 += 1024) {
        _tile_loadd(4, w[0].rows + k * 2, w[0].stride);
        _tile_loadd(6, x0, 64);
        _tile_loadd(5, w[1].rows + k * 2, w[1].stride);
        _tile_loadd(7, x1, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    if (k < K) {
        _tile_loadd(4, w[0].tail, 64);
        _tile_loadd(6, x0, 64);
        _tile_loadd(5, w[1].tail, 64);
        _tile_loadd(7, x1, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out[0][0], 64);
    _tile_stored(1, out[0][1], 64);
    _tile_stored(2, out[1][0], 64);
    _tile_stored(3, out[1][1], 64);
}

/* two left blocks by one panel: `out[block][0]` */
static void amx_2x1(const left *w, const char *x0, int64_t K, float out[2][2][256]) {
    int64_t k = 0, full = K / AMX_K * AMX_K;
    _tile_zero(0);
    _tile_zero(2);
    for (; k < full; k += AMX_K, x0 += 1024) {
        _tile_loadd(4, w[0].rows + k * 2, w[0].stride);
        _tile_loadd(6, x0, 64);
        _tile_loadd(5, w[1].rows + k * 2, w[1].stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
    }
    if (k < K) {
        _tile_loadd(4, w[0].tail, 64);
        _tile_loadd(6, x0, 64);
        _tile_loadd(5, w[1].tail, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, out[0][0], 64);
    _tile_stored(2, out[1][0], 64);
}

/* the transpose of a 16×16 tile, into rows `stride` floats apart */
static void transpose16(const float *in, float *out, int64_t stride) {
    __m512 a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(in + 16 * i);
    UNROLL for (int i = 0; i < 16; i += 4) {
        __m512 t0 = _mm512_unpacklo_ps(a[i], a[i + 1]), t1 = _mm512_unpackhi_ps(a[i], a[i + 1]);
        __m512 t2 = _mm512_unpacklo_ps(a[i + 2], a[i + 3]), t3 = _mm512_unpackhi_ps(a[i + 2], a[i + 3]);
        b[i] = _mm512_shuffle_ps(t0, t2, 0x44);
        b[i + 1] = _mm512_shuffle_ps(t0, t2, 0xee);
        b[i + 2] = _mm512_shuffle_ps(t1, t3, 0x44);
        b[i + 3] = _mm512_shuffle_ps(t1, t3, 0xee);
    }
    /* lane group g of b[4·q + i] holds rows 4q..4q+3 of column 4·g + i */
    UNROLL for (int i = 0; i < 4; i++) {
        __m512 lo = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), hi = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
        __m512 lo2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
        __m512 hi2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
        _mm512_storeu_ps(out + (0 + i) * stride, _mm512_shuffle_f32x4(lo, lo2, 0x88));
        _mm512_storeu_ps(out + (8 + i) * stride, _mm512_shuffle_f32x4(lo, lo2, 0xdd));
        _mm512_storeu_ps(out + (4 + i) * stride, _mm512_shuffle_f32x4(hi, hi2, 0x88));
        _mm512_storeu_ps(out + (12 + i) * stride, _mm512_shuffle_f32x4(hi, hi2, 0xdd));
    }
}
#else
#define HAVE_AMX 0
#endif
