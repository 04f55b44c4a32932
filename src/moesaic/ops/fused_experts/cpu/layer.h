/* One call of the expert layer: its operands, its plan, and the workspace between its two products. */
#pragma once
#include "act.h"
#include "amx.h"
#include "dot.h"
#include "outer.h"
#include "pool.h"
#include <stdlib.h>

/* Filled by `_cpu.py`, field by field in this order. Strides are in elements. */
typedef struct {
    const void *x, *w_up, *b_up, *w_down, *b_down, *residual;
    const float *weights;
    const int32_t *row_order, *row_index, *expert_offsets;
    void *out, *hidden;
    int64_t T, K, E, H, I;
    int64_t x_stride, residual_stride;
    int64_t up_expert, up_row, up_column, down_expert, down_row, down_column; /* of W[e][output][input] */
    int64_t dtype, act, interleaved, threads, amx_rows, pairs;
    double alpha, limit;
} arguments;

/* An expert with rows. `amx` ones have panels of x and of the activation, counted from `panel`. */
typedef struct {
    int64_t expert, row, rows, panel, panels;
    int amx;
} live;

typedef struct {
    int64_t jobs, first; /* `first` job of the queue */
    atomic_llong done;
} phase;

enum { PACK, UP, DOWN, COMBINE, PHASES };

typedef struct {
    const arguments *p;
    live *experts;
    int64_t num_live, num_rows, num_panels;
    int x_kind, up_outer, down_outer, a_kind; /* operands of the two products, and which of them are outer products */
    int64_t x_size, a_size;                   /* bytes of an operand's element */
    int direct;                               /* x is an operand as it is */
    int64_t x_row, a_row;                     /* bytes from row to row of `tokens` and of `a` */
    int64_t token_jobs, up_chunk, up_chunks, down_chunk, down_chunks, combine_rows;
    int64_t up_floats;         /* the widest chunk of `up`, whole vectors */
    int64_t block, amx_panels; /* rows, and panels, that a block of weights meets at a time: they stay in the L2 */
    int64_t scratch;           /* floats that a thread has to itself */
    char *tokens, *a, *x_panels, *a_panels;
    float *y, *scratches;
    phase phases[PHASES];
    atomic_llong next;
} layer;

#define UP_CHUNK 48 /* columns of the activation to a job: a multiple of a strip's */
#define DOWN_CHUNK 96
#define OUTER_CHUNK 256
#define AMX_CHUNK 96 /* whole tiles, and whole strips for the experts with few rows */
