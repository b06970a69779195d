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

#endif
