/* The gated delta rule over packed sequences (Yang et al., arXiv:2412.06464). A value head has a
 * state S [D,E], which starts as `state` or 0. A row with key k and query q (both of length 1, q
 * times `scale`), value v, log gate g and rate beta does
 *
 *     S = e^g S,   u = beta (v - k S),   S = S + k^T u,   o = q S
 *
 * Rows are taken CHUNK at a time. With G the sum of the chunk's gates up to a row,
 * D_ij = e^(G_i - G_j), and S the state before the chunk:
 *
 *     (1 - N) U = beta (V - e^G K S)     N_ij = -beta_i D_ij k_i k_j for j < i
 *     O = e^G Q S + P U                  P_ij = D_ij q_i k_j         for j <= i
 *     S = e^(G_last) S + (e^(G_last - G) K)^T U
 *
 * Without `delta` the state does not give up what it has at k: u = beta v, and so U = beta V. This
 * is the scan of Mamba-2 (Dao & Gu, arXiv:2405.21060) with q = C, k = B, v = x and beta = dt. It
 * has neither N nor K K^T, and no system to solve. With eps < 0 queries and keys have any length.
 *
 * Gates of at most -200 count as -200, which is e^g = 0 in float32: sums stay exact. No exponent is
 * positive as long as gates are not. N counts rows, B sequences, G heads of keys, H of values. */
#ifndef PYLOSS_DELTA_RULE_TPL_H
#define PYLOSS_DELTA_RULE_TPL_H
#include "../attention/tile.tpl.h"
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/transpose.h"
#include "../simd/vec.h"

enum {
    CHUNK = 64,
    CHUNK_STEP = CHUNK + 16, /* between rows of matrices with a column for each row of a chunk; an
                                odd number of cache lines, as all distances here */
    BAND = 24,               /* rows of a triangular product that are computed together */
    SOLVED = 12,             /* rows of a triangular system that are solved together */
    FEW_ROWS = 4             /* so many rows are taken one by one */
};

/* Distance between rows of n floats in a worker's memory; columns up to whole vectors are 0. */
INLINE int64_t delta_step(int64_t n) { return (n + 15) / 16 * 16 | 16; }

/* The arguments that the operations share, and the sizes of a head. */
typedef struct {
    const float *q, *k, *v, *g, *beta, *state;
    const int32_t *offsets;
    int64_t sequences, k_heads, heads, d, e, dstep, estep;
    float scale, eps;
    int delta;
} delta_inputs;

#define DELTA_INPUTS(c, args, first) \
    { \
        (args).q, (args).k, (args).v, (args).g, (args).beta, first, (args).offsets, \
            PL_DIM(c, 'B'), PL_DIM(c, 'G'), PL_DIM(c, 'H'), PL_DIM(c, 'D'), PL_DIM(c, 'E'), \
            delta_step(PL_DIM(c, 'D')), delta_step(PL_DIM(c, 'E')), (float)(args).scale, \
            (float)(args).eps, (args).delta != 0 \
    }

/* A chunk of one head, in a worker's memory. The gradient has more matrices: delta_slopes. */
typedef struct {
    const delta_inputs *in;
    int64_t row, rows, head;
    float *k, *q;               /* [rows, D], of length 1 unless eps < 0 */
    float *later_k, *earlier_q; /* e^(G_last - G) K and scale e^G Q */
    float *kt;                  /* [D, rows], K transposed */
    float *decay, *kk, *n, *p;  /* [rows, rows]: D, D K K^T below the diagonal, N, P */
    float *u, *seen;            /* [rows, E]: U, and e^G K S */
    float *state;               /* [D, E] */
    float beta[CHUNK], since[CHUNK], until[CHUNK]; /* e^G, e^(G_last - G) */
    float k_length[CHUNK], q_length[CHUNK];        /* one over the lengths */
    int32_t upto[CHUNK + 8];                       /* i + 1 */
} delta_chunk;

static const float delta_ones[CHUNK] = {[0 ... CHUNK - 1] = 1.0f};

/* Takes `rows` rows of `step` floats from *at. */
INLINE float *delta_take(float **at, int64_t rows, int64_t step) {
    float *found = *at;
    *at += rows * step;
    return found;
}
static int64_t delta_chunk_size(const delta_inputs *in) {
    return (4 * in->dstep + 4 * CHUNK_STEP + 2 * in->estep) * CHUNK + in->d * CHUNK_STEP +
           in->d * in->estep;
}
/* A chunk in the memory at *at. */
static delta_chunk delta_chunk_at(const delta_inputs *in, float **at) {
    delta_chunk c = {.in = in};
    c.k = delta_take(at, CHUNK, in->dstep), c.q = delta_take(at, CHUNK, in->dstep);
    c.later_k = delta_take(at, CHUNK, in->dstep), c.earlier_q = delta_take(at, CHUNK, in->dstep);
    c.kt = delta_take(at, in->d, CHUNK_STEP);
    c.decay = delta_take(at, CHUNK, CHUNK_STEP), c.kk = delta_take(at, CHUNK, CHUNK_STEP);
    c.n = delta_take(at, CHUNK, CHUNK_STEP), c.p = delta_take(at, CHUNK, CHUNK_STEP);
    c.u = delta_take(at, CHUNK, in->estep), c.seen = delta_take(at, CHUNK, in->estep);
    c.state = delta_take(at, in->d, in->estep);
    for (int i = 0; i < CHUNK + 8; i++) c.upto[i] = at_most(i + 1, CHUNK);
    return c;
}

/* ---- matrices in a worker's memory */

INLINE int64_t whole_vectors(int64_t n) { return round_up(n, LANES); }

/* to [rows, n] = factor from; rows of `from` are `step` apart. Columns up to whole vectors
 * become 0. */
static void delta_copy(const float *from, int64_t step, int64_t rows, int64_t n, float factor,
                       float *to, int64_t to_step) {
    for (int64_t i = 0; i < rows; i++, from += step, to += to_step)
        for (int64_t j = 0; j < n; j += LANES)
            vf_store(to + j, factor * vf_load_part(from + j, at_most(n - j, LANES), 0));
}
/* Rows of n floats into an array of the caller's. */
static void delta_put(const float *from, int64_t step, int64_t rows, int64_t n, float *to,
                      int64_t to_step) {
    for (int64_t i = 0; i < rows; i++)
        memcpy(to + i * to_step, from + i * step, (size_t)n * sizeof *to);
}
/* to [n, rows] = from [rows, n] transposed; columns up to whole vectors become 0. */
static void delta_transpose(const float *from, int64_t step, int64_t rows, int64_t n, float *to,
                            int64_t to_step) {
    static const float none[LANES];
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < n; j += LANES) {
            const float *source[LANES];
            vf v[LANES];
            for (int64_t r = 0; r < LANES; r++)
                source[r] = i + r < rows ? from + (i + r) * step + j : none;
            load_transposed(source, 0, v);
            for (int64_t c = 0; c < at_most(LANES, n - j); c++)
                vf_store(to + (j + c) * to_step + i, v[c]);
        }
}
INLINE float delta_dot(const float *a, const float *b, int64_t n) {
    vf sum = vf_set1(0);
    for (int64_t j = 0; j < n; j += LANES) sum += vf_load(a + j) * vf_load(b + j);
    return vf_sum(sum);
}
/* y [n] = a x, or with `add` y + a x */
INLINE void delta_scale(float a, const float *x, int64_t n, int add, float *y) {
    for (int64_t j = 0; j < n; j += LANES) {
        const vf scaled = a * vf_load(x + j);
        vf_store(y + j, add ? vf_load(y + j) + scaled : scaled);
    }
}

/* The lower triangle of A [rows, depth] B [depth, rows], and some of the elements above it. */
static void delta_lower(const float *a, int64_t step, const float *b, int64_t rows, int64_t depth,
                        float *c) {
    for (int64_t i = 0; i < rows; i += BAND) {
        const int64_t some = at_most(rows - i, BAND);
        attn_by_row((attn_product){some, whole_vectors(i + some), depth, a + i * step, step, b,
                                   CHUNK_STEP, c + i * CHUNK_STEP, CHUNK_STEP, NULL},
                    0, 0);
    }
}
/* C [rows, columns] = A B, or with `add` C + A B; A [rows, rows] has only zeros above its
 * diagonal. */
static void delta_by_lower(const delta_chunk *c, const float *a, const float *b, int64_t columns,
                           int64_t step, int add, float *to) {
    const attn_product product = {
        c->rows, whole_vectors(columns), c->rows, a, CHUNK_STEP, b, step, to,
        step,    add ? delta_ones : NULL};
    const attn_band band = {0, 0, c->upto, 0};
    attn_multiply(&product, &band, 0);
}
/* The same of A transposed. */
static void delta_by_upper(const delta_chunk *c, const float *a, const float *b, int64_t columns,
                           int64_t step, int add, float *to) {
    const attn_product product = {
        c->rows, whole_vectors(columns), c->rows, a, CHUNK_STEP, b, step, to,
        step,    add ? delta_ones : NULL};
    const attn_band band = {0, 1, NULL, 0};
    attn_multiply(&product, &band, 1);
}
/* C [rows, columns] = A [rows, depth] B, or with `add` C + A B. */
static void delta_product(const delta_chunk *c, const float *a, int64_t a_step, int64_t depth,
                          const float *b, int64_t b_step, int64_t columns, int add, float *to,
                          int64_t step) {
    attn_by_row((attn_product){c->rows, whole_vectors(columns), depth, a, a_step, b, b_step, to,
                               step, add ? delta_ones : NULL},
                0, 0);
}
/* S [D, E] = S factor + A^T B, where A is [rows, D] and B [rows, E]. */
static void delta_into_state(const delta_chunk *c, const float *a, const float *b, float factor,
                             float *state) {
    const delta_inputs *in = c->in;
    float factors[CHUNK];
    for (int64_t i = 0; i < CHUNK; i++) factors[i] = factor;
    for (int64_t i = 0; i < in->d; i += CHUNK) {
        const attn_product product = {at_most(in->d - i, CHUNK),
                                      whole_vectors(in->e),
                                      c->rows,
                                      a + i,
                                      in->dstep,
                                      b,
                                      in->estep,
                                      state + i * in->estep,
                                      in->estep,
                                      factors};
        attn_by_column(product, NULL, 0);
    }
}

/* Solves (1 - N) X = Y in place of Y [rows, E], or with `upper` (1 - N^T) X = Y. */
INLINE void delta_solve_block(const float *n, int64_t rows, int64_t columns, int64_t step,
                              const int upper, float *y) {
    for (int64_t j = 0; j < columns; j += LANES) {
        vf x[SOLVED];
#pragma GCC unroll 12
        for (int i = 0; i < SOLVED; i++) x[i] = i < rows ? vf_load(y + i * step + j) : vf_set1(0);
#pragma GCC unroll 12
        for (int one = 0; one < SOLVED; one++) {
            const int k = upper ? SOLVED - 1 - one : one;
            if (k >= rows) continue;
#pragma GCC unroll 12
            for (int i = 0; i < SOLVED; i++)
                if (upper ? i < k : i > k && i < rows)
                    x[i] += (upper ? n[k * CHUNK_STEP + i] : n[i * CHUNK_STEP + k]) * x[k];
        }
#pragma GCC unroll 12
        for (int i = 0; i < SOLVED; i++)
            if (i < rows) vf_store(y + i * step + j, x[i]);
    }
}
static void delta_solve(const delta_chunk *c, const int upper, float *y) {
    const int64_t columns = whole_vectors(c->in->e), step = c->in->estep;
    const int64_t blocks = (c->rows + SOLVED - 1) / SOLVED;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t i = (upper ? blocks - 1 - b : b) * SOLVED;
        const int64_t rows = at_most(c->rows - i, SOLVED), after = i + rows;
        attn_product product = {rows,       columns,   i,    c->n + i * CHUNK_STEP,
                                CHUNK_STEP, y,         step, y + i * step,
                                step,       delta_ones};
        if (upper) {
            product.depth = c->rows - after;
            product.a = c->n + after * CHUNK_STEP + i;
            product.b = y + after * step;
        }
        if (product.depth > 0 && upper) attn_by_column(product, NULL, 0);
        if (product.depth > 0 && !upper) attn_by_row(product, 0, 0);
        const float *n = c->n + i * CHUNK_STEP + i;
        if (rows == SOLVED && upper) delta_solve_block(n, SOLVED, columns, step, 1, y + i * step);
        else if (rows == SOLVED) delta_solve_block(n, SOLVED, columns, step, 0, y + i * step);
        else delta_solve_block(n, rows, columns, step, upper, y + i * step);
    }
}

/* ---- a chunk */

INLINE float delta_inverse_length(const float *x, int64_t n, float eps) {
    return eps < 0 ? 1.0f : 1.0f / sqrtf(delta_dot(x, x, n) + eps);
}

/* The row of q or k of this head's group. */
INLINE int64_t delta_key_at(const delta_chunk *c, int64_t row) {
    const delta_inputs *in = c->in;
    return (row * in->k_heads + c->head / (in->heads / in->k_heads)) * in->d;
}

/* Reads `rows` rows from `row` on: everything that does not depend on the state. */
static void delta_begin(delta_chunk *c, int64_t row, int64_t rows) {
    const delta_inputs *in = c->in;
    const int64_t d = whole_vectors(in->d), step = in->dstep;
    c->row = row, c->rows = rows;
    double gates[CHUNK], sum = 0;
    for (int64_t i = 0; i < rows; i++) {
        const float gate = in->g[(row + i) * in->heads + c->head];
        sum += gate < -200.0f ? -200.0 : (double)gate;
        gates[i] = sum;
        c->beta[i] = in->beta[(row + i) * in->heads + c->head];
    }
    for (int64_t i = 0; i < CHUNK; i++) {
        c->since[i] = i < rows ? (float)gates[i] : 0;
        c->until[i] = i < rows ? (float)(sum - gates[i]) : 0;
    }
    for (int64_t i = 0; i < CHUNK; i += LANES) {
        vf_store(c->since + i, vf_exp(vf_load(c->since + i)));
        vf_store(c->until + i, vf_exp(vf_load(c->until + i)));
    }
    delta_copy(in->k + delta_key_at(c, row), in->k_heads * in->d, rows, in->d, 1, c->k, step);
    delta_copy(in->q + delta_key_at(c, row), in->k_heads * in->d, rows, in->d, 1, c->q, step);
    for (int64_t i = 0; i < rows; i++) {
        float *k = c->k + i * step, *q = c->q + i * step;
        c->k_length[i] = delta_inverse_length(k, d, in->eps);
        c->q_length[i] = delta_inverse_length(q, d, in->eps);
        delta_scale(c->k_length[i], k, d, 0, k);
        delta_scale(c->q_length[i], q, d, 0, q);
        delta_scale(c->until[i], k, d, 0, c->later_k + i * step);
        delta_scale(c->since[i] * in->scale, q, d, 0, c->earlier_q + i * step);
    }
    delta_transpose(c->k, step, rows, in->d, c->kt, CHUNK_STEP);
    if (in->delta) delta_lower(c->k, step, c->kt, rows, in->d, c->kk);
    delta_lower(c->q, step, c->kt, rows, in->d, c->p);
    for (int64_t i = 0; i < rows; i++) {
        float *decay = c->decay + i * CHUNK_STEP, *kk = c->kk + i * CHUNK_STEP;
        float *n = c->n + i * CHUNK_STEP, *p = c->p + i * CHUNK_STEP;
        for (int64_t j = 0; j < CHUNK; j++)
            decay[j] = j <= i ? (float)(gates[i] - gates[j]) : -INFINITY;
        const int64_t seen = whole_vectors(i + 1);
        const vf beta = vf_set1(-c->beta[i]), scale = vf_set1(in->scale);
        for (int64_t j = 0; j < CHUNK; j += LANES) {
            const vf by = j < seen ? vf_exp(vf_load(decay + j)) : vf_set1(0);
            vf_store(decay + j, by);
            if (in->delta) {
                vf_store(kk + j, j < seen ? by * vf_load(kk + j) : by);
                vf_store(n + j, beta * vf_load(kk + j));
            }
            vf_store(p + j, j < seen ? scale * by * vf_load(p + j) : by);
        }
        kk[i] = n[i] = 0;
    }
}

/* U, and e^G K S, which depend on the state before the chunk. */
static void delta_update(delta_chunk *c, const float *state) {
    const delta_inputs *in = c->in;
    const int64_t e = in->e, step = in->estep;
    if (in->delta) delta_product(c, c->k, in->dstep, in->d, state, step, e, 0, c->seen, step);
    for (int64_t i = 0; i < c->rows; i++) {
        const float *v = in->v + ((c->row + i) * in->heads + c->head) * e;
        float *seen = c->seen + i * step, *u = c->u + i * step;
        const vf since = vf_set1(c->since[i]), beta = vf_set1(c->beta[i]);
        for (int64_t j = 0; j < e; j += LANES) {
            const vf value = vf_load_part(v + j, at_most(e - j, LANES), 0);
            const vf known = in->delta ? since * vf_load(seen + j) : vf_set1(0);
            vf_store(u + j, beta * (value - known));
            if (in->delta) vf_store(seen + j, known);
        }
    }
    if (in->delta) delta_solve(c, 0, c->u);
}

/* The state after the chunk. */
static void delta_advance(const delta_chunk *c, float *state) {
    delta_into_state(c, c->later_k, c->u, c->since[c->rows - 1], state);
}

/* One row, with a state of `step` floats between rows: two walks over it. n columns, at most four
 * vectors. */
INLINE void delta_row_columns(const delta_chunk *c, const float *before, float *after, int64_t step,
                              const float *v, float gate, float beta, float qk, int64_t n,
                              const int whole, float *o) {
    vf known[4], read[4];
#pragma GCC unroll 4
    for (int l = 0; l < 4; l++) known[l] = read[l] = vf_set1(0);
    for (int64_t i = 0; i < c->in->d; i++) {
        const vf k = vf_set1(c->k[i]), q = vf_set1(c->q[i]);
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++) {
            if (!whole && l * LANES >= n) break;
            const float *from = before + i * step + l * LANES;
            const vf s =
                whole ? vf_load(from) : vf_load_part(from, at_most(n - l * LANES, LANES), 0);
            known[l] += k * s;
            read[l] += q * s;
        }
    }
#pragma GCC unroll 4
    for (int l = 0; l < 4; l++) {
        const int64_t some = at_least(at_most(n - l * LANES, LANES), 0);
        if (!some) continue;
        if (!c->in->delta) known[l] = vf_set1(0);
        known[l] = beta * (vf_load_part(v + l * LANES, some, 0) - gate * known[l]);
        vf_store_part(o + l * LANES, gate * read[l] + qk * known[l], some);
    }
    for (int64_t i = 0; i < c->in->d; i++) {
        const vf k = vf_set1(c->k[i]);
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++) {
            if (!whole && l * LANES >= n) break;
            const float *from = before + i * step + l * LANES;
            float *to = after + i * step + l * LANES;
            const int64_t some = at_most(n - l * LANES, LANES);
            const vf s = whole ? vf_load(from) : vf_load_part(from, some, 0);
            const vf next = gate * s + k * known[l];
            if (whole) vf_store(to, next);
            else vf_store_part(to, next, some);
        }
    }
}
/* A row of a head: the state `before` [D,E] becomes `after`, which may be the same. */
static void delta_row(delta_chunk *c, int64_t row, const float *before, float *after, int64_t step,
                      float *o) {
    const delta_inputs *in = c->in;
    const int64_t d = whole_vectors(in->d), e = in->e, at = row * in->heads + c->head;
    delta_copy(in->k + delta_key_at(c, row), 0, 1, in->d, 1, c->k, in->dstep);
    delta_copy(in->q + delta_key_at(c, row), 0, 1, in->d, 1, c->q, in->dstep);
    delta_scale(delta_inverse_length(c->k, d, in->eps), c->k, d, 0, c->k);
    delta_scale(in->scale * delta_inverse_length(c->q, d, in->eps), c->q, d, 0, c->q);
    float gate[LANES];
    vf_store(gate, vf_exp(vf_set1(in->g[at])));
    const float qk = delta_dot(c->q, c->k, d), *v = in->v + at * e;
    int64_t j = 0;
    for (; j + 4 * LANES <= e; j += 4 * LANES)
        delta_row_columns(c, before + j, after + j, step, v + j, *gate, in->beta[at], qk, 4 * LANES,
                          1, o + j);
    if (j < e)
        delta_row_columns(c, before + j, after + j, step, v + j, *gate, in->beta[at], qk, e - j, 0,
                          o + j);
}

/* ---- forward */

typedef struct {
    delta_inputs in;
    float *scratch; /* for each worker */
    int64_t size;
    const int32_t *from, *to; /* the places of states, NULL: those of the sequences */
    const float *first;       /* or NULL: 0 */
    float *last;              /* or NULL */
    float *o;
} delta_job;

static void delta_forward_one(const delta_job *job, int64_t s, int64_t head, float *memory) {
    const delta_inputs *in = &job->in;
    const int64_t begin = in->offsets[s], end = in->offsets[s + 1], size = in->d * in->e;
    if (job->from && begin == end) return;
    const float *first = job->first;
    if (first) first += ((job->from ? job->from[s] : s) * in->heads + head) * size;
    float *last = job->last;
    if (last) last += ((job->to ? job->to[s] : s) * in->heads + head) * size;
    delta_chunk c = delta_chunk_at(in, &memory);
    c.head = head;
    if (first && last && end - begin <= FEW_ROWS) {
        if (begin == end && first != last) memcpy(last, first, (size_t)size * sizeof *last);
        for (int64_t row = begin; row < end; row++)
            delta_row(&c, row, row == begin ? first : last, last, in->e,
                      job->o + (row * in->heads + head) * in->e);
        return;
    }
    if (first) delta_copy(first, in->e, in->d, in->e, 1, c.state, in->estep);
    else memset(c.state, 0, (size_t)(in->d * in->estep) * sizeof *c.state);
    for (int64_t row = begin; row < end; row += CHUNK) {
        delta_begin(&c, row, at_most(end - row, CHUNK));
        delta_update(&c, c.state);
        delta_product(&c, c.earlier_q, in->dstep, in->d, c.state, in->estep, in->e, 0, c.seen,
                      in->estep);
        delta_by_lower(&c, c.p, c.u, in->e, in->estep, 1, c.seen);
        delta_put(c.seen, in->estep, c.rows, in->e, job->o + (row * in->heads + head) * in->e,
                  in->heads * in->e);
        if (last || row + CHUNK < end) delta_advance(&c, c.state);
    }
    if (last) delta_put(c.state, in->estep, in->d, in->e, last, in->e);
}
static void delta_forward_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const delta_job *job = context;
    for (int64_t i = begin; i < end; i++)
        delta_forward_one(job, i / job->in.heads, i % job->in.heads,
                          job->scratch + worker * job->size);
}
static pl_status delta_run(delta_job *job) {
    const delta_inputs *in = &job->in;
    job->size = round_up(delta_chunk_size(in), 16);
    const size_t bytes = (size_t)(job->size * pl_num_threads() + 1) * sizeof(float);
    job->scratch = pl_acquire(bytes);
    if (!job->scratch) return PL_NO_MEMORY;
    pl_parallel(in->sequences * in->heads, 1, delta_forward_piece, job);
    pl_release(job->scratch);
    return PL_OK;
}
pl_status KERNEL(delta_rule_forward)(const pl_call *c) {
    const delta_rule_forward_args args = delta_rule_forward_args_of(c);
    delta_job job = {.in = DELTA_INPUTS(c, args, args.state),
                     .first = args.state,
                     .last = args.last,
                     .o = args.o};
    return delta_run(&job);
}
pl_status KERNEL(delta_rule_step)(const pl_call *c) {
    const delta_rule_step_args args = delta_rule_step_args_of(c);
    delta_job job = {.in = DELTA_INPUTS(c, args, NULL),
                     .from = args.from,
                     .to = args.to,
                     .first = args.store,
                     .last = args.store,
                     .o = args.o};
    return delta_run(&job);
}

/* ---- gradient */

/* What a worker has beside the chunk. A sequence goes forward once more: the states between
 * chunks, and U and e^G K S of all rows, are kept until it has gone back. */
typedef struct {
    const delta_job *job;
    float *d_o, *du, *dseen;        /* [rows, E] */
    float *dk, *dq, *dlater;        /* [rows, D], of keys and queries of length 1 */
    float *state_t, *slope_t, *u_t; /* transposed: [E, D], [E, D], [E, rows] */
    float *slope;                   /* [D, E], of the state after, then before the chunk */
    float *by_p, *by_n;             /* [rows, rows] */
    float *states, *u, *seen;       /* of the whole sequence */
} delta_slopes;

static int64_t delta_slopes_size(const delta_inputs *in, int64_t longest) {
    const int64_t chunks = (longest + CHUNK - 1) / CHUNK;
    return delta_chunk_size(in) + (3 * in->estep + 3 * in->dstep + 2 * CHUNK_STEP) * CHUNK +
           in->e * (2 * in->dstep + CHUNK_STEP) + (chunks + 1) * in->d * in->estep +
           2 * chunks * CHUNK * in->estep;
}

typedef struct {
    delta_job job;
    int64_t longest;
    const float *d_o, *dlast;
    float *dq, *dk, *dv, *dg, *dbeta, *dstate;
} delta_grad_job;

/* Gradients of a chunk's row of keys or queries: from those of length 1 to the caller's. */
INLINE void delta_put_key(const delta_inputs *in, const float *x, const float *slope, float inverse,
                          int add, float *to) {
    const int64_t d = in->d;
    const float along = in->eps < 0 ? 0 : delta_dot(x, slope, whole_vectors(d));
    for (int64_t j = 0; j < d; j += LANES) {
        const int64_t n = at_most(d - j, LANES);
        const vf one = inverse * (vf_load(slope + j) - along * vf_load(x + j));
        vf_store_part(to + j, add ? vf_load_part(to + j, n, 0) + one : one, n);
    }
}

/* One chunk, back. `w->slope` is the gradient of the state after it, and becomes that of the state
 * before it. */
static void delta_back(delta_chunk *c, delta_slopes *w, const delta_grad_job *job, const float *s,
                       int add) {
    const delta_inputs *in = c->in;
    const int64_t d = in->d, e = in->e, ds = in->dstep, es = in->estep, rows = c->rows;
    const int64_t dv = whole_vectors(d), ev = whole_vectors(e);
    const int64_t at = c->row * in->heads + c->head;
    double gate[CHUNK]; /* of G */
    float dbeta[CHUNK];
    delta_copy(job->d_o + at * e, in->heads * e, rows, e, 1, w->d_o, es);
    delta_transpose(s, es, d, e, w->state_t, ds);
    delta_transpose(w->slope, es, d, e, w->slope_t, ds);
    delta_transpose(c->u, es, rows, e, w->u_t, CHUNK_STEP);

    /* U, the system that it solves, and what that reads */
    delta_by_upper(c, c->p, w->d_o, e, es, 0, w->du);
    delta_product(c, c->later_k, ds, d, w->slope, es, e, 1, w->du, es);
    if (in->delta) delta_solve(c, 1, w->du);
    for (int64_t i = 0; i < rows; i++) {
        const float *du = w->du + i * es, *seen = c->seen + i * es;
        const float *v = in->v + (at + i * in->heads) * e;
        float *dvalue = job->dv + (at + i * in->heads) * e, *dseen = w->dseen + i * es;
        const vf beta = vf_set1(c->beta[i]), since = vf_set1(-c->since[i]);
        vf by_beta = vf_set1(0), by_gate = vf_set1(0);
        for (int64_t j = 0; j < e; j += LANES) {
            const int64_t n = at_most(e - j, LANES);
            const vf du_j = vf_load(du + j), one = beta * du_j, value = vf_load_part(v + j, n, 0);
            vf_store_part(dvalue + j, one, n);
            if (!in->delta) {
                by_beta += du_j * value;
                continue;
            }
            const vf known = vf_load(seen + j);
            by_beta += du_j * (value - known);
            by_gate += one * known;
            vf_store(dseen + j, since * one);
        }
        dbeta[i] = vf_sum(by_beta);
        gate[i] = -(double)vf_sum(by_gate);
    }

    /* products with the state, and with the gradient of the next one */
    delta_product(c, w->d_o, es, e, w->state_t, ds, d, 0, w->dq, ds);
    if (in->delta) delta_product(c, w->dseen, es, e, w->state_t, ds, d, 0, w->dk, ds);
    delta_product(c, c->u, es, e, w->slope_t, ds, d, 0, w->dlater, ds);
    double last = 0; /* of G of the last row, from the decays until there */
    for (int64_t i = 0; i < rows; i++) {
        float *dq = w->dq + i * ds, *dlater = w->dlater + i * ds;
        gate[i] += (double)delta_dot(c->earlier_q + i * ds, dq, dv);
        delta_scale(c->since[i] * in->scale, dq, dv, 0, dq);
        const double later = (double)delta_dot(c->later_k + i * ds, dlater, dv);
        gate[i] -= later;
        last += later;
        delta_scale(c->until[i], dlater, dv, in->delta, w->dk + i * ds);
    }
    float kept = 0;
    for (int64_t i = 0; i < d; i++) kept += delta_dot(s + i * es, w->slope + i * es, ev);
    gate[rows - 1] += last + (double)c->since[rows - 1] * (double)kept;

    /* products within the chunk */
    delta_lower(w->d_o, es, w->u_t, rows, e, w->by_p);
    if (in->delta) delta_lower(w->du, es, w->u_t, rows, e, w->by_n);
    double above[CHUNK] = {0};
    for (int64_t i = 0; i < rows; i++) {
        float *by_p = w->by_p + i * CHUNK_STEP, *by_n = w->by_n + i * CHUNK_STEP;
        const float *p = c->p + i * CHUNK_STEP, *n = c->n + i * CHUNK_STEP;
        const float *decay = c->decay + i * CHUNK_STEP, *kk = c->kk + i * CHUNK_STEP;
        float by_kk = 0;
        double sum = 0;
        for (int64_t j = 0; j < i; j++) {
            double one = (double)(by_p[j] * p[j]);
            if (in->delta) {
                one += (double)(by_n[j] * n[j]);
                by_kk += by_n[j] * kk[j];
            }
            sum += one;
            above[j] += one;
        }
        gate[i] += sum;
        dbeta[i] -= by_kk;
        for (int64_t j = 0; j < CHUNK; j++) by_p[j] = j <= i ? in->scale * decay[j] * by_p[j] : 0;
        for (int64_t j = 0; in->delta && j < CHUNK; j++)
            by_n[j] = j < i ? -c->beta[i] * decay[j] * by_n[j] : 0;
    }
    delta_by_lower(c, w->by_p, c->k, d, ds, 1, w->dq);
    delta_by_upper(c, w->by_p, c->q, d, ds, 1, w->dk);
    if (in->delta) {
        delta_by_lower(c, w->by_n, c->k, d, ds, 1, w->dk);
        delta_by_upper(c, w->by_n, c->k, d, ds, 1, w->dk);
    }

    double sum = 0;
    for (int64_t i = rows - 1; i >= 0; i--) {
        sum += gate[i] - above[i];
        job->dg[at + i * in->heads] = (float)sum;
        job->dbeta[at + i * in->heads] = dbeta[i];
        const int64_t key = delta_key_at(c, c->row + i);
        delta_put_key(in, c->k + i * ds, w->dk + i * ds, c->k_length[i], add, job->dk + key);
        delta_put_key(in, c->q + i * ds, w->dq + i * ds, c->q_length[i], add, job->dq + key);
    }
    delta_into_state(c, c->earlier_q, w->d_o, c->since[rows - 1], w->slope);
    if (in->delta) delta_into_state(c, c->k, w->dseen, 1, w->slope);
}

/* One value head of a sequence; with `add` its group's gradients of keys and queries have been
 * begun by another. */
static void delta_grad_one(const delta_grad_job *job, int64_t s, int64_t head, int add,
                           float *memory) {
    const delta_inputs *in = &job->job.in;
    const int64_t begin = in->offsets[s], end = in->offsets[s + 1];
    const int64_t chunks = (job->longest + CHUNK - 1) / CHUNK, size = in->d * in->estep;
    const int64_t given = (s * in->heads + head) * in->d * in->e;
    delta_chunk c = delta_chunk_at(in, &memory);
    delta_slopes w;
    c.head = head;
    w.d_o = delta_take(&memory, CHUNK, in->estep), w.du = delta_take(&memory, CHUNK, in->estep);
    w.dseen = delta_take(&memory, CHUNK, in->estep);
    w.dk = delta_take(&memory, CHUNK, in->dstep), w.dq = delta_take(&memory, CHUNK, in->dstep);
    w.dlater = delta_take(&memory, CHUNK, in->dstep);
    w.state_t = delta_take(&memory, in->e, in->dstep);
    w.slope_t = delta_take(&memory, in->e, in->dstep);
    w.u_t = delta_take(&memory, in->e, CHUNK_STEP);
    w.slope = delta_take(&memory, in->d, in->estep);
    w.by_p = delta_take(&memory, CHUNK, CHUNK_STEP);
    w.by_n = delta_take(&memory, CHUNK, CHUNK_STEP);
    w.states = delta_take(&memory, chunks * in->d, in->estep);
    w.u = delta_take(&memory, chunks * CHUNK, in->estep);
    w.seen = delta_take(&memory, chunks * CHUNK, in->estep);

    if (in->state) delta_copy(in->state + given, in->e, in->d, in->e, 1, c.state, in->estep);
    else memset(c.state, 0, (size_t)size * sizeof *c.state);
    for (int64_t row = begin; row < end; row += CHUNK) {
        memcpy(w.states + (row - begin) / CHUNK * size, c.state, (size_t)size * sizeof *c.state);
        c.u = w.u + (row - begin) * in->estep, c.seen = w.seen + (row - begin) * in->estep;
        delta_begin(&c, row, at_most(end - row, CHUNK));
        delta_update(&c, c.state);
        if (row + CHUNK < end) delta_advance(&c, c.state);
    }
    if (job->dlast) delta_copy(job->dlast + given, in->e, in->d, in->e, 1, w.slope, in->estep);
    else memset(w.slope, 0, (size_t)size * sizeof *w.slope);
    for (int64_t row = begin + (end - begin - 1) / CHUNK * CHUNK; row >= begin && begin < end;
         row -= CHUNK) {
        c.u = w.u + (row - begin) * in->estep, c.seen = w.seen + (row - begin) * in->estep;
        if (row + CHUNK < end) delta_begin(&c, row, CHUNK); /* the last one is still there */
        delta_back(&c, &w, job, w.states + (row - begin) / CHUNK * size, add);
    }
    if (job->dstate) delta_put(w.slope, in->estep, in->d, in->e, job->dstate + given, in->e);
}
static void delta_grad_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const delta_grad_job *job = context;
    const delta_inputs *in = &job->job.in;
    const int64_t each = in->heads / at_least(in->k_heads, 1);
    for (int64_t i = begin; i < end; i++)
        for (int64_t h = 0; h < each; h++)
            delta_grad_one(job, i / in->k_heads, i % in->k_heads * each + h, h > 0,
                           job->job.scratch + worker * job->job.size);
}
pl_status KERNEL(delta_rule_grad)(const pl_call *c) {
    const delta_rule_grad_args args = delta_rule_grad_args_of(c);
    delta_grad_job job = {.job = {.in = DELTA_INPUTS(c, args, args.state)},
                          .d_o = args.d_o,
                          .dlast = args.dlast,
                          .dq = args.dq,
                          .dk = args.dk,
                          .dv = args.dv,
                          .dg = args.dg,
                          .dbeta = args.dbeta,
                          .dstate = args.dstate};
    const delta_inputs *in = &job.job.in;
    for (int64_t s = 0; s < in->sequences; s++)
        job.longest = at_least(job.longest, in->offsets[s + 1] - in->offsets[s]);
    const size_t keys = (size_t)(PL_DIM(c, 'N') * in->k_heads * in->d) * sizeof(float);
    if (!in->heads) memset(args.dq, 0, keys), memset(args.dk, 0, keys);
    job.job.size = round_up(delta_slopes_size(in, job.longest), 16);
    const size_t bytes = (size_t)(job.job.size * pl_num_threads() + 1) * sizeof(float);
    job.job.scratch = pl_acquire(bytes);
    if (!job.job.scratch) return PL_NO_MEMORY;
    pl_parallel(in->sequences * in->k_heads, 1, delta_grad_piece, &job);
    pl_release(job.job.scratch);
    return PL_OK;
}

/* ---- gates: g = -e^a_log softplus(a + dt_bias) and beta = sigmoid(b) */

INLINE vf delta_softplus(vf x) { return vf_max(x, vf_set1(0)) + vf_log1p(vf_exp(-vf_abs(x))); }
INLINE vf delta_sigmoid(vf x) {
    const vf small = vf_exp(-vf_abs(x)), one = vf_set1(1);
    return vf_select(vf_less(x, vf_set1(0)), small, one) / (one + small);
}
static void delta_gates_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const delta_gates_forward_args args = delta_gates_forward_args_of(context);
    const int64_t h = PL_DIM((const pl_call *)context, 'H');
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < h; j += LANES) {
            const int64_t n = at_most(h - j, LANES), at = i * h + j;
            const vf x = vf_load_part(args.a + at, n, 0) + vf_load_part(args.dt_bias + j, n, 0);
            const vf rate = vf_exp(vf_load_part(args.a_log + j, n, 0));
            vf_store_part(args.g + at, -rate * delta_softplus(x), n);
            vf_store_part(args.beta + at, delta_sigmoid(vf_load_part(args.b + at, n, 0)), n);
        }
}
pl_status KERNEL(delta_gates_forward)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'H'), delta_gates_piece, c);
    return PL_OK;
}
static void delta_gates_grad_piece(const void *context, int64_t begin, int64_t end,
                                   int worker UNUSED) {
    const delta_gates_grad_args args = delta_gates_grad_args_of(context);
    const int64_t h = PL_DIM((const pl_call *)context, 'H');
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < h; j += LANES) {
            const int64_t n = at_most(h - j, LANES), at = i * h + j;
            const vf x = vf_load_part(args.a + at, n, 0) + vf_load_part(args.dt_bias + j, n, 0);
            const vf rate = vf_exp(vf_load_part(args.a_log + j, n, 0));
            const vf beta = delta_sigmoid(vf_load_part(args.b + at, n, 0));
            const vf dg = vf_load_part(args.dg + at, n, 0),
                     dbeta = vf_load_part(args.dbeta + at, n, 0);
            vf_store_part(args.da + at, -rate * dg * delta_sigmoid(x), n);
            vf_store_part(args.db + at, dbeta * beta * (1.0f - beta), n);
        }
}
pl_status KERNEL(delta_gates_grad)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'H'), delta_gates_grad_piece, c);
    return PL_OK;
}

/* ---- gates of the scan: dt = softplus(x + dt_bias) between low and high, g = -e^a_log dt */

static void scan_gates_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const scan_gates_forward_args args = scan_gates_forward_args_of(context);
    const int64_t h = PL_DIM((const pl_call *)context, 'H');
    const vf low = vf_set1((float)args.low), high = vf_set1((float)args.high);
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < h; j += LANES) {
            const int64_t n = at_most(h - j, LANES), at = i * h + j;
            const vf x = vf_load_part(args.x + at, n, 0) + vf_load_part(args.dt_bias + j, n, 0);
            const vf dt = vf_min(high, vf_max(low, delta_softplus(x)));
            vf_store_part(args.dt + at, dt, n);
            vf_store_part(args.g + at, -vf_exp(vf_load_part(args.a_log + j, n, 0)) * dt, n);
        }
}
pl_status KERNEL(scan_gates_forward)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'H'), scan_gates_piece, c);
    return PL_OK;
}
static void scan_gates_grad_piece(const void *context, int64_t begin, int64_t end,
                                  int worker UNUSED) {
    const scan_gates_grad_args args = scan_gates_grad_args_of(context);
    const int64_t h = PL_DIM((const pl_call *)context, 'H');
    const vf low = vf_set1((float)args.low), high = vf_set1((float)args.high), none = vf_set1(0);
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < h; j += LANES) {
            const int64_t n = at_most(h - j, LANES), at = i * h + j;
            const vf x = vf_load_part(args.x + at, n, 0) + vf_load_part(args.dt_bias + j, n, 0);
            const vf rate = vf_exp(vf_load_part(args.a_log + j, n, 0)), dt = delta_softplus(x);
            const vf by_dt =
                vf_load_part(args.ddt + at, n, 0) - rate * vf_load_part(args.dg + at, n, 0);
            const vf inside = vf_select(vf_less(high, dt), none, by_dt * delta_sigmoid(x));
            vf_store_part(args.dx + at, vf_select(vf_less(dt, low), none, inside), n);
        }
}
pl_status KERNEL(scan_gates_grad)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'H'), scan_gates_grad_piece, c);
    return PL_OK;
}

#undef DELTA_INPUTS
#endif
