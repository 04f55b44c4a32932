/* fused_experts on the CPU. One call is four phases, whose jobs come from one queue:

     PACK     rows of x become operands of the first product (nothing to do where they are already)
     UP       (expert, columns): first product, bias, activation, into operands of the second
     DOWN     (expert, columns): second product and bias, into fp32 rows by expert
     COMBINE  tokens: the weighted sum of their rows

   A job's result is written by it alone, and its sums run in an order that no thread, block or tile changes: the same
   call gives the same bits however many threads take part. */
#include "layer.h"
#include "up.h"
#include "down.h"
#include "backward.h"
#include <unistd.h>

#define TOKENS 16 /* rows of x to a job of PACK */

/* ------------------------------------------------------------------ the workspace, kept between calls */
#define KEEP ((size_t)256 << 20)
static struct {
    char *base;
    size_t size;
} workspace; /* guarded by the pool's call */

static char *workspace_of(size_t bytes) {
    if (bytes > workspace.size) {
        free(workspace.base);
        workspace.size = 0;
        if (posix_memalign((void **)&workspace.base, (size_t)2 << 20, bytes)) {
            workspace.base = 0;
            return 0;
        }
        workspace.size = bytes;
        large_pages(workspace.base, bytes);
    }
    return workspace.base;
}
static void workspace_trim(void) {
    if (workspace.size > KEEP) {
        free(workspace.base);
        workspace.base = 0, workspace.size = 0;
    }
}

/* ------------------------------------------------------------------ the plan */
static int amx_fits(const arguments *p) {
    return HAVE_AMX && p->amx_rows > 0 && p->dtype == BF16 && p->up_column == 1 && p->down_column == 1 && p->H >= 16 &&
           p->I >= 16;
}

/* Which operands the products read, and how the work is cut; nothing of it changes a result's bits. */
static void plan(layer *l, const arguments *p, int64_t l2) {
    int widened = p->dtype == F32 ? DOT_F32 : p->dtype == F16 ? DOT_F16 : p->pairs ? DOT_PAIRS : DOT_BF16;
    int64_t widest = max64(max64(p->H, p->I), 1);
    memset(l, 0, sizeof *l);
    l->p = p;
    l->up_outer = p->up_column != 1, l->down_outer = p->down_column != 1;
    l->x_kind = l->up_outer ? DOT_F32 : widened;
    l->a_kind = l->down_outer ? DOT_F32 : widened;
    l->x_size = l->x_kind == DOT_PAIRS ? 2 : 4, l->a_size = l->a_kind == DOT_PAIRS ? 2 : 4;
    l->direct = p->dtype == F32 && (l->up_outer || p->H % VL == 0);
    l->x_row = padded_row(p->H) * l->x_size, l->a_row = padded_row(p->I) * l->a_size;
    l->block = min64(MAX_BLOCK, max64(16, l2 / 2 / (widest * max64(l->x_size, l->a_size)) / 16 * 16));
    l->amx_panels = max64(2, l2 / 2 / (widest * 2 * 16) / 2 * 2);
    l->up_chunk = amx_fits(p) ? AMX_CHUNK : l->up_outer ? OUTER_CHUNK : UP_CHUNK;
    l->down_chunk = l->down_outer ? OUTER_CHUNK : DOWN_CHUNK;
    l->up_chunks = max64(1, p->I / l->up_chunk); /* the last chunk takes the rest: it is less than two long */
    l->down_chunks = max64(1, p->H / l->down_chunk);
    l->up_floats = round_up(p->I - (l->up_chunks - 1) * l->up_chunk, VL);
    l->scratch = max64(MAX_BLOCK, OUTER_ROWS) * 2 * l->up_floats;
    l->combine_rows = max64(1, 16384 / (widest * max64(p->K, 1)));
}

/* The experts that have rows; then the phases' jobs. */
static void fill(layer *l) {
    const arguments *p = l->p;
    int any = 0, amx = amx_fits(p);
    int64_t first = 0;
    for (int64_t e = 0; e < p->E; e++) {
        int64_t row = p->expert_offsets[e], rows = p->expert_offsets[e + 1] - row;
        if (rows <= 0)
            continue;
        live *now = &l->experts[l->num_live++];
        now->expert = e, now->row = row, now->rows = rows;
        now->amx = amx && rows >= p->amx_rows;
        now->panel = l->num_panels, now->panels = now->amx ? (rows + 15) / 16 : 0;
        l->num_panels += now->panels;
        any |= !now->amx;
    }
    l->num_rows = p->expert_offsets[p->E];
    l->token_jobs = any && !l->direct ? (p->T + TOKENS - 1) / TOKENS : 0;
    l->phases[PACK].jobs = l->token_jobs + l->num_panels;
    l->phases[UP].jobs = p->I ? l->num_live * l->up_chunks : 0;
    l->phases[DOWN].jobs = p->H ? l->num_live * l->down_chunks : 0;
    l->phases[COMBINE].jobs = (p->T + l->combine_rows - 1) / l->combine_rows;
    for (int i = 0; i < PHASES; i++) {
        l->phases[i].first = first;
        first += l->phases[i].jobs;
        atomic_init(&l->phases[i].done, 0);
    }
    atomic_init(&l->next, 0);
}

/* Lay the workspace out; with no memory yet (`base` null), only say how much it takes. */
static size_t lay_out(layer *l, char *base) {
    size_t at = 0;
    int panels = l->num_panels > 0;
#define PART(name, type, bytes) (l->name = base ? (type)(base + at) : 0, at += (size_t)round_up((int64_t)(bytes), 128))
    PART(tokens, char *, l->token_jobs ? l->p->T * l->x_row : 0);
    PART(a, char *, l->num_rows * l->a_row);
    PART(y, float *, l->num_rows * l->p->H * 4);
    PART(scratches, float *, l->p->threads * l->scratch * 4);
#if HAVE_AMX
    PART(x_panels, char *, panels ? l->num_panels * panel_bytes(l->p->H) : 0);
    PART(a_panels, char *, panels ? l->num_panels * panel_bytes(l->p->I) : 0);
#endif
    (void)panels;
    return at;
}

/* ------------------------------------------------------------------ the jobs */
static void pack(const layer *l, int64_t job) {
    const arguments *p = l->p;
    if (job < l->token_jobs) {
        for (int64_t t = job * TOKENS; t < min64(p->T, (job + 1) * TOKENS); t++)
            widen_row(l->tokens + t * l->x_row, l->x_kind, p->x, t * p->x_stride, (int)p->dtype, p->H);
        return;
    }
#if HAVE_AMX
    job -= l->token_jobs;
    int64_t i = 0, high = l->num_live;
    while (high - i > 1) { /* the last expert whose first panel is not behind this one */
        int64_t middle = (i + high) / 2;
        if (l->experts[middle].panel <= job)
            i = middle;
        else
            high = middle;
    }
    const live *e = &l->experts[i];
    const uint16_t *rows[PANEL];
    int64_t r = (job - e->panel) * PANEL, count = min64(PANEL, e->rows - r);
    for (int64_t m = 0; m < count; m++)
        rows[m] = (const uint16_t *)p->x + p->row_order[e->row + r + m] / p->K * p->x_stride;
    pack_panel(l->x_panels + job * panel_bytes(p->H), rows, count, p->H);
#endif
}

static void do_up(const layer *l, int64_t job, float *scratch) {
    const live *e = &l->experts[job / l->up_chunks];
    int64_t chunk = job % l->up_chunks, n0 = chunk * l->up_chunk;
    int64_t q = chunk + 1 == l->up_chunks ? l->p->I - n0 : l->up_chunk;
#if HAVE_AMX
    if (e->amx) {
        up_amx(l, e, n0, q);
        return;
    }
#endif
    (l->up_outer ? up_outer : up_dot)(l, e, n0, q, scratch);
}

static void do_down(const layer *l, int64_t job) {
    const live *e = &l->experts[job / l->down_chunks];
    int64_t chunk = job % l->down_chunks, n0 = chunk * l->down_chunk;
    int64_t q = chunk + 1 == l->down_chunks ? l->p->H - n0 : l->down_chunk;
#if HAVE_AMX
    if (e->amx) {
        down_amx(l, e, n0, q);
        return;
    }
#endif
    (l->down_outer ? down_outer : down_dot)(l, e, n0, q);
}

/* What every thread does: take jobs until there are none, each only once the phases before it are done. */
static void work(void *context, int member) {
    layer *l = context;
    int at = 0;
    float *scratch = l->scratches + member * l->scratch;
#if HAVE_AMX
    if (l->num_panels)
        amx_begin();
#endif
    for (;;) {
        int64_t job = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        while (at < PHASES && job >= l->phases[at].first + l->phases[at].jobs)
            at++;
        if (at == PHASES)
            break;
        for (int before = 0; before < at; before++)
            for (int spin = 0; atomic_load_explicit(&l->phases[before].done, memory_order_acquire) <
                               l->phases[before].jobs; spin++)
                spin < SPINS ? pause_cpu() : (void)sched_yield();
        int64_t i = job - l->phases[at].first;
        switch (at) {
        case PACK: pack(l, i); break;
        case UP: do_up(l, i, scratch); break;
        case DOWN: do_down(l, i); break;
        default: combine(l, i * l->combine_rows, min64(l->p->T, (i + 1) * l->combine_rows));
        }
        atomic_fetch_add_explicit(&l->phases[at].done, 1, memory_order_release);
    }
#if HAVE_AMX
    if (l->num_panels)
        amx_end();
#endif
}

static int64_t l2_bytes(void) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0)
        return size;
#endif
    return 1 << 20;
}

/* ------------------------------------------------------------------ what Python calls */
#define EXPORT __attribute__((visibility("default")))

/* May this process use AMX, and was it built in? */
EXPORT int moesaic_amx(void) {
#if HAVE_AMX
    return amx_ask();
#else
    return 0;
#endif
}

/* Lanes of fp32 in a vector of this build. */
EXPORT int moesaic_lanes(void) { return VL; }

/* Work on calls with the threads of an OpenMP library from now on: its `GOMP_parallel`. */
EXPORT void moesaic_team(parallel team) {
    pool_begin();
    pool.team = team;
    pool_end();
}

/* The whole layer; 0, or 1 where there is no memory for its workspace. */
EXPORT int moesaic_fused_experts(const arguments *given) {
    arguments p = *given;
    layer l;
    p.threads = max64(1, min64(p.threads, MAX_THREADS));
    plan(&l, &p, l2_bytes());
    live *experts = malloc((size_t)(p.E + 1) * sizeof *experts);
    if (!experts)
        return 1;
    l.experts = experts;
    fill(&l);
    /* a small layer is done before other threads are awake; never some of them: OpenMP lets the others go */
    int64_t bytes = l.num_live * p.H * p.I * 3 * size_of((int)p.dtype) + l.num_rows * (p.H + p.I) * 8;
    if (bytes < 128 << 10)
        p.threads = 1;
    if (p.hidden) { /* the rows of dropped slots */
        int64_t row = (is_gated((int)p.act) ? 2 * p.I : p.I) * size_of((int)p.dtype);
        memset((char *)p.hidden + l.num_rows * row, 0, (size_t)((p.T * p.K - l.num_rows) * row));
    }
    pool_begin();
    char *base = workspace_of(lay_out(&l, 0));
    if (base) {
        lay_out(&l, base);
        pool_run(work, &l, (int)p.threads);
        workspace_trim();
    }
    pool_end();
    free(experts);
    return base ? 0 : 1;
}

/* The activation's derivative over all rows. */
EXPORT int moesaic_activation_backward(const activation_arguments *p) {
    activation_work w = {.p = p};
    int64_t threads = p->rows * p->I < 16 << 10 ? 1 : max64(1, p->threads);
    atomic_init(&w.next, 0);
    pool_begin();
    pool_run(activation_rows, &w, (int)min64(threads, MAX_THREADS));
    pool_end();
    return 0;
}

/* The sum of every token's rows. */
EXPORT int moesaic_sum_rows(const sum_arguments *p) {
    sum_work w = {.p = p};
    int64_t threads = p->T * p->K * p->H < 32 << 10 ? 1 : max64(1, p->threads);
    atomic_init(&w.next, 0);
    pool_begin();
    pool_run(sum_tokens, &w, (int)min64(threads, MAX_THREADS));
    pool_end();
    return 0;
}

/* The gradient of a weight of every expert; 0, or 1 where there is no memory for its workspace. */
EXPORT int moesaic_weight_gradient(const weight_arguments *p) {
    int64_t size = size_of((int)p->dtype), threads = max64(1, min64(p->threads, MAX_THREADS)), bytes = 0;
    weight_work w = {.p = p, .p_chunks = (p->P + P_CHUNK - 1) / P_CHUNK};
    int64_t *panels = malloc((size_t)(p->E + 1) * sizeof *panels);
    if (!panels)
        return 1;
    w.panels = panels;
    w.amx = HAVE_AMX && p->amx && p->dtype == BF16;
    for (int64_t e = 0; e < p->E; e++) {
        int64_t rows = round_up(p->expert_offsets[e + 1] - p->expert_offsets[e], 32);
        panels[e] = bytes;
        bytes += rows * round_up(p->Q, 16) * size;
        w.longest = max64(w.longest, rows);
    }
    if (w.amx || p->right_gather)
        w.pack_jobs = p->E;
    else
        bytes = 0;
    w.scratch = round_up((P_CHUNK * w.longest + P_CHUNK * Q_CHUNK) * 4, 128);
    large_pages(p->out, (size_t)(p->E * p->P * p->Q * size));
    atomic_init(&w.next, 0);
    atomic_init(&w.packed, 0);
    pool_begin();
    bytes = round_up(bytes, 128);
    w.right = workspace_of((size_t)(bytes + threads * w.scratch));
    if (w.right) {
        w.scratches = w.right + bytes;
        pool_run(weight_jobs, &w, (int)threads);
        workspace_trim();
    }
    pool_end();
    free(panels);
    return w.right ? 0 : 1;
}
