/* The native CPU kernels without Python, for the sanitisers: random layers against plain loops in double precision,
   called from several threads at once. Build with moe.c's folder on the include path. Exit status 0 if all agree. */
#include "moe.c"
#include <stdio.h>

static uint64_t seed = 1;
static uint32_t draw(uint32_t n) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % n;
}
static float normal(void) { return ((float)draw(2001) - 1000) / 1000; }

/* n random elements, in memory of exactly their size */
static void *tensor(int64_t n, int dtype) {
    void *p = malloc((size_t)max64(n * size_of(dtype), 1));
    for (int64_t i = 0; i < n; i++)
        put(p, i, dtype, normal());
    return p;
}

static double bound(int dtype) { return dtype == F32 ? 1e-4 : dtype == F16 ? 1e-2 : 8e-2; }

typedef struct {
    arguments p;
    int32_t *order, *index, *offsets;
    void *x, *up, *down, *b_up, *b_down, *residual, *out, *hidden;
    float *weights;
} call;

static call make(int dtype, int transposed, int64_t T, int64_t K, int64_t E, int64_t H, int64_t I, int amx) {
    call c;
    int64_t R = T * K, live = 0;
    memset(&c, 0, sizeof c);
    int32_t *ids = malloc((size_t)max64(R, 1) * 4);
    c.order = malloc((size_t)max64(R, 1) * 4);
    c.index = malloc((size_t)max64(R, 1) * 4);
    c.offsets = malloc((size_t)(E + 1) * 4);
    c.weights = malloc((size_t)max64(R, 1) * 4);
    for (int64_t s = 0; s < R; s++)
        ids[s] = (int32_t)draw((uint32_t)E + 1) - 1, c.weights[s] = normal(), c.index[s] = -1, c.order[s] = 0;
    for (int64_t e = 0; e < E; e++) {
        c.offsets[e] = (int32_t)live;
        for (int64_t s = 0; s < R; s++)
            if (ids[s] == e)
                c.order[live] = (int32_t)s, c.index[s] = (int32_t)live++;
    }
    c.offsets[E] = (int32_t)live;
    free(ids);
    c.x = tensor(T * H, dtype), c.up = tensor(E * 2 * I * H, dtype), c.down = tensor(E * H * I, dtype);
    c.b_up = tensor(E * 2 * I, dtype), c.b_down = tensor(E * H, dtype), c.residual = tensor(T * H, dtype);
    c.out = tensor(T * H, dtype), c.hidden = tensor(R * 2 * I, dtype);
    c.p = (arguments){
        .x = c.x, .w_up = c.up, .b_up = c.b_up, .w_down = c.down, .b_down = c.b_down, .residual = c.residual,
        .weights = c.weights, .row_order = c.order, .row_index = c.index, .expert_offsets = c.offsets, .out = c.out,
        .hidden = c.hidden, .T = T, .K = K, .E = E, .H = H, .I = I, .x_stride = H, .residual_stride = H,
        .up_expert = 2 * I * H, .up_row = transposed ? 1 : H, .up_column = transposed ? 2 * I : 1,
        .down_expert = H * I, .down_row = transposed ? 1 : I, .down_column = transposed ? H : 1,
        .dtype = dtype, .act = SWIGLU, .interleaved = transposed, .threads = 4, .amx_rows = amx ? 3 : 0,
        .pairs = 0, .alpha = 1, .limit = 1};
    return c;
}
static void drop(call *c) {
    void *all[] = {c->order, c->index,  c->offsets,  c->weights, c->x,     c->up,
                   c->down,  c->b_up,   c->b_down,   c->residual, c->out,  c->hidden};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static int check(const call *c) {
    const arguments *p = &c->p;
    int d = (int)p->dtype, wrong = 0;
    double *y = malloc((size_t)max64(p->H, 1) * 8), *a = malloc((size_t)p->I * 8);
    for (int64_t t = 0; t < p->T; t++) {
        for (int64_t h = 0; h < p->H; h++)
            y[h] = get(c->residual, t * p->H + h, d);
        for (int64_t k = 0; k < p->K; k++) {
            int64_t r = c->index[t * p->K + k], e = 0;
            if (r < 0)
                continue;
            while (c->offsets[e + 1] <= r)
                e++;
            for (int64_t i = 0; i < p->I; i++) {
                double v[2];
                for (int side = 0; side < 2; side++) {
                    int64_t n = p->interleaved ? 2 * i + side : i + side * p->I;
                    v[side] = get(c->b_up, e * 2 * p->I + n, d);
                    for (int64_t h = 0; h < p->H; h++)
                        v[side] += (double)get(c->x, t * p->H + h, d) *
                                   get(c->up, e * p->up_expert + n * p->up_row + h * p->up_column, d);
                }
                a[i] = v[0] / (1 + exp(-v[0])) * v[1];
            }
            for (int64_t h = 0; h < p->H; h++) {
                double out = get(c->b_down, e * p->H + h, d);
                for (int64_t i = 0; i < p->I; i++)
                    out += a[i] * get(c->down, e * p->down_expert + h * p->down_row + i * p->down_column, d);
                y[h] += c->weights[t * p->K + k] * out;
            }
        }
        for (int64_t h = 0; h < p->H; h++) {
            double got = get(c->out, t * p->H + h, d), scale = fabs(y[h]) + sqrt((double)p->H * (double)p->I);
            wrong += !(fabs(got - y[h]) <= bound(d) * scale);
        }
    }
    free(y);
    free(a);
    return wrong;
}

/* the three functions of the backward pass, on the rows that `c` left */
static int check_backward(const call *c, int amx) {
    const arguments *p = &c->p;
    int d = (int)p->dtype, wrong = 0;
    int64_t live = c->offsets[p->E], P = 2 * p->I, Q = p->H;
    void *da = tensor(live * p->I, d), *dh = tensor(live * P, d), *a = tensor(live * p->I, d);
    void *dx = tensor(p->T * p->H, d), *dw = tensor(p->E * P * Q, d), *rows = tensor(live * p->H, d);
    float *ds = malloc((size_t)max64(live, 1) * 4);
    activation_arguments back = {.hidden = c->hidden, .grad_a = da, .scale = 0, .grad_hidden = dh, .scaled = a,
                                 .grad_scale = ds, .rows = live, .I = p->I, .dtype = d, .act = p->act,
                                 .interleaved = p->interleaved, .threads = 4, .alpha = 1, .limit = 1};
    sum_arguments sum = {.rows = rows, .row_index = c->index, .out = dx, .T = p->T, .K = p->K, .H = p->H,
                         .dtype = d, .threads = 4};
    weight_arguments grad = {.left = dh, .right = c->x, .out = dw, .row_order = c->order,
                             .expert_offsets = c->offsets, .left_stride = P, .right_stride = p->H,
                             .right_gather = 1, .K = p->K, .E = p->E, .P = P, .Q = Q, .dtype = d, .threads = 4,
                             .amx = amx};
    wrong += moesaic_activation_backward(&back) + moesaic_sum_rows(&sum) + moesaic_weight_gradient(&grad);
    for (int64_t e = 0; e < p->E; e++)
        for (int64_t i = 0; i < P; i++)
            for (int64_t q = 0; q < Q; q += 7) {
                double v = 0, size = 1;
                for (int64_t r = c->offsets[e]; r < c->offsets[e + 1]; r++) {
                    double term = (double)get(dh, r * P + i, d) * get(c->x, c->order[r] / p->K * p->H + q, d);
                    v += term, size += fabs(term);
                }
                wrong += !(fabs(get(dw, (e * P + i) * Q + q, d) - v) <= bound(d) * size);
            }
    void *all[] = {da, dh, a, dx, dw, rows, ds};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    return wrong;
}

static void *caller(void *context) {
    call *c = context;
    for (int i = 0; i < 5; i++)
        if (moesaic_fused_experts(&c->p))
            return c;
    return check(c) ? c : 0;
}

int main(void) {
    static const int64_t shapes[][5] = {/* T, K, E, H, I */
                                        {1, 2, 4, 33, 17}, {7, 2, 5, 64, 48}, {40, 2, 3, 63, 35},
                                        {130, 1, 1, 40, 200}, {0, 1, 2, 16, 16}, {9, 3, 6, 5, 3}};
    int wrong = 0, amx = moesaic_amx();
    for (int dtype = F32; dtype <= F16; dtype++)
        for (int transposed = 0; transposed < 2; transposed++)
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
                const int64_t *z = shapes[s];
                call c = make(dtype, transposed, z[0], z[1], z[2], z[3], z[4], amx);
                int bad = moesaic_fused_experts(&c.p) + check(&c) + check_backward(&c, amx);
                if (bad)
                    printf("dtype %d transposed %d shape %zu: %d wrong\n", dtype, transposed, s, bad);
                wrong += bad;
                drop(&c);
            }
    pthread_t threads[3];
    call calls[3];
    for (int i = 0; i < 3; i++) {
        calls[i] = make(i, i % 2, 60, 2, 4, 160, 96, amx);
        pthread_create(&threads[i], 0, caller, &calls[i]);
    }
    for (int i = 0; i < 3; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        wrong += failed != 0;
        drop(&calls[i]);
    }
    printf("%d lanes, AMX %d: %d wrong\n", moesaic_lanes(), amx, wrong);
    return wrong != 0;
}
