/* Matrix multiplication: one blocked product serves every dense layer, forward and backward.
 *
 *   C[m, n] (+)= bias + alpha A B + u_scale H U,   H = h_scale A P  or given
 *
 * B, P and U are stored matrices in any format, read as they are or transposed. A is packed once into panels of `mr` rows; the
 * columns of B are packed (and expanded, when quantised) KC deep beside the tile that uses them. The low-rank branch H U of
 * an adapter runs as a continuation of the inner loop over k, so it joins a tile before the tile is stored. Each element
 * of C is summed in one order whatever the threads, so its bits depend on nothing else. */

#if PL_BYTES == 64
enum { MR = 14 }; /* 14 x 2 accumulators, two vectors of B and a broadcast fill 31 of 32 registers */
#elif PL_BYTES == 16 && defined(__aarch64__)
enum { MR = 12 };
#else
enum { MR = 6 };
#endif
enum {
    NR = 2 * LANES,  /* columns of a tile */
    KC = 576,        /* depth of a packed panel of B */
    KS = 4 * KC,     /* depth of packed A */
    MS = 1024,       /* rows of packed A, about */
    NB = 96,         /* columns of a piece of work: a multiple of 32 (quantised blocks) and of every NR */
    SMALL_M = 4,     /* up to here rows of B are read once and multiplied as they come */
    PANEL_SPILL = 16 /* packing writes whole vectors past the end of a panel */
};

typedef struct {
    int64_t m, n, k;
    const float *a; /* [m, k], or [k, m] when a_transposed */
    int a_transposed;
    pl_weight b; /* [k, n], or [n, k] when b_transposed */
    int b_transposed;
    const float *bias; /* [n] or NULL */
    float alpha;
    int accumulate;
    float *c; /* [m, n] */
    /* The low-rank branch; absent when rank is 0. */
    int64_t rank;
    const float *h_given; /* [m, rank], or NULL when H is computed */
    float *h;             /* [m, rank], written when computed */
    pl_weight p, u;       /* [k, rank] and [rank, n], or transposed */
    int p_transposed, u_transposed;
    float h_scale, u_scale;
} gemm;

/* One tile: rows of packed A times columns of B (row stride ldb), then the continuation. */
typedef struct {
    int64_t k, ldb, k2;
    const float *a, *b, *a2, *b2;
    int64_t a_stride; /* rows of a packed panel; the tile may compute fewer */
    const float *bias;
    float *c;
    int64_t ldc;
    int rows, cols, add; /* valid part of the tile; add to C or store */
} tile_args;

/* mr and nv are constants in every instance, so that the accumulators live in registers. */
INLINE void tile_body(const tile_args *t, const int mr, const int nv) {
    vf acc[MR][2];
#pragma GCC unroll 14
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) acc[i][j] = vf_set1(0);
    const float *a = t->a, *b = t->b;
    int64_t ldb = t->ldb;
    for (int part = 0; part < 2; part++) {
        int64_t depth = part ? t->k2 : t->k;
        for (int64_t k = 0; k < depth; k++) {
            vf b0 = vf_load(b), b1 = nv == 2 ? vf_load(b + LANES) : b0;
#pragma GCC unroll 14
            for (int i = 0; i < mr; i++) {
                vf x = vf_set1(a[i]);
                acc[i][0] += x * b0;
                if (nv == 2) acc[i][1] += x * b1;
            }
            a += t->a_stride;
            b += ldb;
        }
        a = t->a2;
        b = t->b2;
        ldb = nv * LANES;
    }
    if (t->cols == nv * LANES) {
        vf bias0 = t->bias ? vf_load(t->bias) : vf_set1(0);
        vf bias1 = t->bias && nv == 2 ? vf_load(t->bias + LANES) : vf_set1(0);
#pragma GCC unroll 14
        for (int i = 0; i < mr; i++) {
            if (i >= t->rows) break;
            float *c = t->c + i * t->ldc;
            vf y0 = acc[i][0] + bias0;
            vf_store(c, t->add ? vf_load(c) + y0 : y0);
            if (nv == 2) {
                vf y1 = acc[i][1] + bias1;
                vf_store(c + LANES, t->add ? vf_load(c + LANES) + y1 : y1);
            }
        }
        return;
    }
#pragma GCC unroll 14
    for (int i = 0; i < mr; i++) {
        if (i >= t->rows) break;
        float *c = t->c + i * t->ldc, row[NR] = {0};
        vf_store(row, acc[i][0]);
        if (nv == 2) vf_store(row + LANES, acc[i][1]);
        for (int j = 0; j < t->cols; j++) {
            float y = row[j] + (t->bias ? t->bias[j] : 0);
            c[j] = t->add ? c[j] + y : y;
        }
    }
}

typedef void (*tile_fn)(const tile_args *t);
#define TILE(mr, nv) \
    static void tile_##mr##x##nv(const tile_args *t) { tile_body(t, mr, nv); }
TILE(1, 1)
TILE(1, 2)
TILE(2, 1)
TILE(2, 2)
TILE(4, 1)
TILE(4, 2)
#if PL_BYTES == 64
TILE(8, 1)
TILE(8, 2)
TILE(14, 1)
TILE(14, 2)
#elif PL_BYTES == 16 && defined(__aarch64__)
TILE(8, 1)
TILE(8, 2)
TILE(12, 1)
TILE(12, 2)
#else
TILE(6, 1)
TILE(6, 2)
#endif
#undef TILE

static const struct {
    int mr;
    tile_fn fn[2];
} tiles[] = {{1, {tile_1x1, tile_1x2}},
             {2, {tile_2x1, tile_2x2}},
             {4, {tile_4x1, tile_4x2}},
#if PL_BYTES == 64
             {8, {tile_8x1, tile_8x2}},
             {14, {tile_14x1, tile_14x2}}
#elif PL_BYTES == 16 && defined(__aarch64__)
             {8, {tile_8x1, tile_8x2}},
             {12, {tile_12x1, tile_12x2}}
#else
             {6, {tile_6x1, tile_6x2}}
#endif
};

/* The entry of `tiles` for so many rows. */
static int tile_kernel(int64_t rows) {
    int kernel = 0;
    while (tiles[kernel].mr < rows && tiles[kernel].mr < MR) kernel++;
    return kernel;
}

static void run_tile(const tile_args *t, int width) { tiles[tile_kernel(t->rows)].fn[width / LANES - 1](t); }

/* A full panel of rows times at most LANES / 2 columns (ldb is LANES / 2), as adapters of small rank have: whole vectors would
 * spend half their lanes on padding. */
static void tile_narrow(const tile_args *t) {
    typedef float half __attribute__((vector_size(PL_BYTES / 2)));
    half acc[MR] = {{0}};
    const float *a = t->a, *b = t->b;
    for (int64_t k = 0; k < t->k; k++, a += MR, b += LANES / 2) {
        half y;
        memcpy(&y, b, sizeof y);
#pragma GCC unroll 14
        for (int i = 0; i < MR; i++) acc[i] += a[i] * y;
    }
#pragma GCC unroll 14
    for (int i = 0; i < MR; i++) {
        if (i >= t->rows) break;
        for (int j = 0; j < t->cols; j++) t->c[i * t->ldc + j] = acc[i][j] + (t->add ? t->c[i * t->ldc + j] : 0);
    }
}

/* Transposes LANES vectors in place by swapping off-diagonal blocks of halving size. */
INLINE void transpose(vf v[LANES]) {
#if defined(__clang__)
    float from[LANES][LANES], to[LANES][LANES];
    memcpy(from, v, sizeof from);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[j][i] = from[i][j];
    memcpy(v, to, sizeof to);
#else
#pragma GCC unroll 4
    for (int h = LANES / 2; h > 0; h /= 2) {
        vi first, second;
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) {
            first[l] = l & h ? LANES + l - h : l;
            second[l] = l & h ? LANES + l : l + h;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & h) continue;
            vf a = v[i], b = v[i + h];
            v[i] = __builtin_shuffle(a, b, first);
            v[i + h] = __builtin_shuffle(a, b, second);
        }
    }
#endif
}

/* Rows [row, row + rows) of A, columns [k0, k0 + kc), as [kc][mr] times alpha; missing rows are 0. */
static void pack_a(const gemm *g, int64_t row, int rows, int mr, int64_t k0, int64_t kc, float *dst) {
    vf alpha = vf_set1(g->alpha);
    if (g->a_transposed) {
        for (int64_t k = 0; k < kc; k++, dst += mr) {
            const float *a = g->a + (k0 + k) * g->m + row;
            for (int i = 0; i < mr; i += LANES) {
                int n = rows - i < LANES ? rows - i : LANES;
                vf_store(dst + i, (n <= 0 ? vf_set1(0) : n == LANES ? vf_load(a + i) : vf_load_part(a + i, n, 0)) * alpha);
            }
        }
        return;
    }
    enum { GROUPS = (MR + LANES - 1) / LANES };
    for (int64_t k = 0; k < kc; k += LANES) {
        int64_t depth = kc - k < LANES ? kc - k : LANES;
        vf v[GROUPS][LANES];
        int groups = (mr + LANES - 1) / LANES;
        for (int i = 0; i < groups * LANES; i++) {
            const float *a = g->a + (row + i) * g->k + k0 + k;
            v[i / LANES][i % LANES] = i >= rows ? vf_set1(0) : depth == LANES ? vf_load(a) : vf_load_part(a, depth, 0);
        }
        for (int i = 0; i < groups; i++) transpose(v[i]);
        /* In order of k: the lanes past mr are overwritten by the next k. */
        for (int64_t l = 0; l < depth; l++)
            for (int i = 0; i < groups; i++) vf_store(dst + (k + l) * mr + i * LANES, v[i][l] * alpha);
    }
}

/* Elements [begin, begin + n) of a stored row, n <= 32: where they lie if they are floats, else expanded into `run`. */
INLINE const float *stored_run(const pl_weight *w, int64_t row, int64_t begin, int64_t n, float *run) {
    const uint8_t *p = pl_weight_row(w, row);
    if (w->format == PL_W_F32 && n == 32) return (const float *)p + begin;
    decode_run(w->format, p, begin, n, run);
    return run;
}

/* Columns [j0, j0 + n) and depth [k0, k0 + kc) of B as panels [n / width][kc][width] times `scale`, padded with 0. For a
 * quantised B, k0 (transposed) or j0 (not) is a multiple of 32. */
static void pack_b(const pl_weight *w, int transposed, int64_t j0, int64_t n, int64_t k0, int64_t kc, int width, float scale,
                   float *dst) {
    float run[LANES][32] = {{0}};
    const vf factor = vf_set1(scale);
    const int64_t padded = (n + width - 1) / width * width;
    if (transposed) {
        for (int64_t j = 0; j < padded; j += LANES) {
            float *panel = dst + j / width * width * kc + j % width;
            for (int64_t k = 0; k < kc; k += 32) {
                int64_t depth = kc - k < 32 ? kc - k : 32;
                const float *source[LANES];
                for (int i = 0; i < LANES; i++) {
                    if (j + i < n) source[i] = stored_run(w, j0 + j + i, k0 + k, depth, run[i]);
                    else source[i] = memset(run[i], 0, sizeof run[i]);
                }
                for (int64_t at = 0; at < depth; at += LANES) {
                    vf v[LANES];
                    for (int i = 0; i < LANES; i++) v[i] = vf_load(source[i] + at);
                    transpose(v);
                    int64_t end = depth - at < LANES ? depth - at : LANES;
                    for (int64_t l = 0; l < end; l++) vf_store(panel + (k + at + l) * width, v[l] * factor);
                }
            }
        }
        return;
    }
    for (int64_t k = 0; k < kc; k++) {
        for (int64_t j = 0; j < padded; j += 32) {
            int64_t count = n - j < 32 ? (n - j < 0 ? 0 : n - j) : 32;
            if (count < 32) memset(run[0], 0, sizeof run[0]);
            const float *source = count ? stored_run(w, k0 + k, j0 + j, count, run[0]) : run[0];
            for (int64_t at = 0; at < 32 && j + at < padded; at += LANES) {
                int64_t col = j + at;
                vf_store(dst + col / width * width * kc + k * width + col % width, vf_load(source + at) * factor);
            }
        }
    }
}

/* The state of one block of A, [row0, row0 + rows) x [k0, k0 + depth). */
typedef struct {
    const gemm *g;
    int mr; /* rows of a panel */
    int64_t row0, rows, k0, depth;
    int64_t chunk;         /* depth of packed B: even parts of at most KC, a multiple of 32 */
    int last;              /* the last block over k: bias and the low-rank branch join here */
    float *packed_a;       /* [panels][panel_stride] */
    float *packed_h;       /* [panels][h_stride] */
    const float *packed_p; /* [rank / width][depth][width] */
    float *packed_b;       /* per worker */
    int64_t panel_stride, h_stride, b_stride;
    int64_t row_pieces, rows_per_piece, column_pieces;
} block;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int panel_width(int64_t columns) { return columns <= LANES ? LANES : NR; }
/* The same for H, which has a narrower tile over full panels. */
static int h_width(int64_t rank, int mr) { return mr == MR && LANES >= 8 && rank <= LANES / 2 ? LANES / 2 : panel_width(rank); }

/* Packs panels of A, and computes and packs their rows of H. */
static void pack_panels(const void *context, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const block *s = context;
    const gemm *g = s->g;
    for (int64_t panel = begin; panel < end; panel++) {
        int64_t row = s->row0 + panel * s->mr;
        int rows = (int)(s->row0 + s->rows - row < s->mr ? s->row0 + s->rows - row : s->mr);
        float *a = s->packed_a + panel * s->panel_stride;
        pack_a(g, row, rows, s->mr, s->k0, s->depth, a);
        if (g->rank && !g->h_given) {
            int width = h_width(g->rank, s->mr);
            for (int64_t j = 0; j < g->rank; j += width) {
                tile_args t = {.k = s->depth,
                               .ldb = width,
                               .a = a,
                               .a_stride = s->mr,
                               .b = s->packed_p + j * s->depth,
                               .c = g->h + row * g->rank + j,
                               .ldc = g->rank,
                               .rows = rows,
                               .cols = (int)(g->rank - j < width ? g->rank - j : width),
                               .add = s->k0 > 0};
                if (width < LANES) tile_narrow(&t);
                else run_tile(&t, width);
            }
        }
        if (g->rank && s->last) {
            gemm h = {.m = g->m, .k = g->rank, .a = g->h_given ? g->h_given : g->h, .alpha = g->u_scale};
            pack_a(&h, row, rows, s->mr, 0, g->rank, s->packed_h + panel * s->h_stride);
        }
    }
}

/* Pieces of C: a range of packed panels times NB columns. */
static void multiply_pieces(const void *context, int64_t begin, int64_t end, int worker) {
    const block *s = context;
    const gemm *g = s->g;
    float *packed_b = s->packed_b + worker * s->b_stride;
    int width = panel_width(g->n);
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t j0 = piece % s->column_pieces * NB, n = g->n - j0 < NB ? g->n - j0 : NB, padded = round_up(n, width);
        int64_t first = piece / s->column_pieces * s->rows_per_piece;
        int64_t last = first + s->rows_per_piece < s->rows ? first + s->rows_per_piece : s->rows;
        /* With one panel of A, packing B would cost as much as using it. */
        int direct = s->rows <= s->mr && !g->b_transposed && g->b.format == PL_W_F32 && !g->b.head_dim && n % width == 0;
        int64_t k = 0, depth;
        do {
            depth = s->depth - k < s->chunk ? s->depth - k : s->chunk;
            int finish = s->last && k + depth == s->depth;
            const float *b = packed_b;
            float *packed_u = packed_b + padded * depth;
            if (direct) b = (const float *)g->b.data + (s->k0 + k) * g->n + j0;
            else pack_b(&g->b, g->b_transposed, j0, n, s->k0 + k, depth, width, 1, packed_b);
            if (finish && g->rank) pack_b(&g->u, g->u_transposed, j0, n, 0, g->rank, width, 1, packed_u);
            for (int64_t row = first; row < last; row += s->mr) {
                int64_t panel = row / s->mr;
                for (int64_t j = 0; j < padded; j += width) {
                    tile_args t = {.k = depth,
                                   .ldb = direct ? g->n : width,
                                   .a = s->packed_a + panel * s->panel_stride + k * s->mr,
                                   .a_stride = s->mr,
                                   .b = direct ? b + j : b + j * depth,
                                   .k2 = finish ? g->rank : 0,
                                   .a2 = s->packed_h + panel * s->h_stride,
                                   .b2 = packed_u + j * g->rank,
                                   .bias = finish && g->bias ? g->bias + j0 + j : NULL,
                                   .c = g->c + (s->row0 + row) * g->n + j0 + j,
                                   .ldc = g->n,
                                   .rows = (int)(last - row < s->mr ? last - row : s->mr),
                                   .cols = (int)(n - j < width ? n - j : width),
                                   .add = g->accumulate || s->k0 + k > 0};
                    run_tile(&t, width);
                }
            }
            k += depth;
        } while (k < s->depth);
    }
}

/* The low-rank branch of one element of C. Not inlined: the compiler would fuse or split its products differently in every
 * instance of few_rows, and a row's bits would depend on how many rows come with it. */
static __attribute__((noinline)) float few_branch(const gemm *g, const float *h, int64_t o) {
    const float *u = (const float *)g->u.data;
    float sum = 0;
    for (int64_t j = 0; j < g->rank; j++) sum += g->u_scale * h[j] * (g->u_transposed ? u[o * g->rank + j] : u[j * g->n + o]);
    return sum;
}

/* Few rows against W transposed: every row of W is expanded once, a run at a time, and multiplied with all rows of A.
 * The number of rows and the format are constants in every instance, so that sums and expanded runs live in registers. */
INLINE void few_rows(const gemm *g, int64_t begin, int64_t end, const int m, const int format) {
    const float *h = g->h_given ? g->h_given : g->h;
    for (int64_t o = begin; o < end; o++) {
        const uint8_t *row = pl_weight_row(&g->b, o);
        vf acc[SMALL_M][32 / LANES];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++)
#pragma GCC unroll 8
            for (int l = 0; l < 32 / LANES; l++) acc[i][l] = vf_set1(0);
        int64_t k = 0;
        for (; k + 32 <= g->k; k += 32) {
            float run[32];
            decode_run(format, row, k, 32, run);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++)
#pragma GCC unroll 8
                for (int l = 0; l < 32 / LANES; l++)
                    acc[i][l] += vf_load(run + l * LANES) * vf_load(g->a + i * g->k + k + l * LANES);
        }
        float tail[32] = {0};
        if (k < g->k) decode_run(format, row, k, g->k - k, tail);
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) {
            vf total = acc[i][0];
#pragma GCC unroll 8
            for (int l = 1; l < 32 / LANES; l++) total += acc[i][l];
            float sum = vf_sum(total);
            for (int64_t l = 0; l < g->k - k; l++) sum += tail[l] * g->a[i * g->k + k + l];
            float y = sum * g->alpha + (g->bias ? g->bias[o] : 0);
            if (g->rank) y += few_branch(g, h + i * g->rank, o);
            float *c = g->c + i * g->n + o;
            *c = g->accumulate ? *c + y : y;
        }
    }
}

INLINE void few_rows_of(const gemm *g, int64_t begin, int64_t end, const int format) {
    switch (g->m) {
    case 1: few_rows(g, begin, end, 1, format); return;
    case 2: few_rows(g, begin, end, 2, format); return;
    case 3: few_rows(g, begin, end, 3, format); return;
    default: few_rows(g, begin, end, SMALL_M, format);
    }
}

static void multiply_few(const void *context, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const gemm *g = context;
    switch (g->b.format) {
    case PL_W_F32: few_rows_of(g, begin, end, PL_W_F32); return;
    case PL_W_BF16: few_rows_of(g, begin, end, PL_W_BF16); return;
    case PL_W_F16: few_rows_of(g, begin, end, PL_W_F16); return;
    case PL_W_Q8_0: few_rows_of(g, begin, end, PL_W_Q8_0); return;
    case PL_W_Q4_0: few_rows_of(g, begin, end, PL_W_Q4_0); return;
    default: few_rows_of(g, begin, end, PL_W_Q4_1);
    }
}

/* H for few rows: P is [k, rank] in float32, as adapters store it. */
static void small_h(const gemm *g) {
    const float *p = (const float *)g->p.data;
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t j = 0; j < g->rank; j++) {
            double sum = 0;
            for (int64_t k = 0; k < g->k; k++)
                sum += (double)g->a[i * g->k + k] * (g->p_transposed ? p[j * g->k + k] : p[k * g->rank + j]);
            g->h[i * g->rank + j] = (float)sum * g->h_scale;
        }
}

static pl_status gemm_run(const gemm *g) {
    if (g->m == 0 || g->n == 0) return PL_OK;
    if (g->m <= SMALL_M && g->b_transposed && !g->a_transposed) {
        if (g->rank && !g->h_given) small_h(g);
        pl_parallel(g->n, 1 + 32768 / (g->k + 1), multiply_few, g);
        return PL_OK;
    }
    block s = {.g = g, .mr = tiles[tile_kernel(g->m)].mr};
    int64_t deepest = g->k < KS ? g->k : KS, tallest = g->m < MS + s.mr ? g->m : round_up(MS, s.mr);
    int64_t panels = (tallest + s.mr - 1) / s.mr, width = panel_width(g->n);
    s.panel_stride = round_up(deepest * s.mr + PANEL_SPILL, 16);
    s.h_stride = round_up(g->rank * s.mr + PANEL_SPILL, 16);
    s.b_stride = round_up(NB, width) * (KC + g->rank);
    int64_t p_size = g->rank && !g->h_given ? round_up(round_up(g->rank, NR) * deepest + PANEL_SPILL, 16) : 0;
    float *scratch = pl_acquire(4 * (size_t)(panels * (s.panel_stride + s.h_stride) + p_size + pl_num_threads() * s.b_stride));
    if (!scratch) return PL_NO_MEMORY;
    s.packed_a = scratch;
    s.packed_h = s.packed_a + panels * s.panel_stride;
    float *packed_p = s.packed_h + panels * s.h_stride;
    s.packed_p = packed_p;
    s.packed_b = packed_p + p_size;
    s.column_pieces = (g->n + NB - 1) / NB;
    for (s.row0 = 0; s.row0 < g->m; s.row0 += s.rows) {
        s.rows = g->m - s.row0 < tallest ? g->m - s.row0 : tallest;
        int64_t used = (s.rows + s.mr - 1) / s.mr, most = used / 9 + 1; /* a piece of fewer rows would not pay for packing B */
        int64_t wanted = (3 * pl_num_threads() + s.column_pieces - 1) / s.column_pieces;
        s.row_pieces = wanted < most ? wanted : most;
        s.rows_per_piece = (used + s.row_pieces - 1) / s.row_pieces * s.mr;
        s.row_pieces = (s.rows + s.rows_per_piece - 1) / s.rows_per_piece;
        s.k0 = 0;
        do { /* also once for k = 0: bias and the low-rank branch remain */
            s.depth = g->k - s.k0 < KS ? g->k - s.k0 : KS;
            int64_t chunks = s.depth ? (s.depth + KC - 1) / KC : 1;
            s.chunk = round_up((s.depth + chunks - 1) / chunks, 32);
            s.last = s.k0 + s.depth == g->k;
            if (p_size) pack_b(&g->p, g->p_transposed, 0, g->rank, s.k0, s.depth, h_width(g->rank, s.mr), g->h_scale, packed_p);
            pl_parallel(used, 4, pack_panels, &s);
            pl_parallel(s.row_pieces * s.column_pieces, 1, multiply_pieces, &s);
            s.k0 += s.depth;
        } while (s.k0 < g->k);
    }
    pl_release(scratch);
    return PL_OK;
}

INLINE pl_weight float_matrix(const float *data, int64_t rows, int64_t cols) {
    return (pl_weight){.data = (const uint8_t *)data, .rows = rows, .cols = cols, .row_bytes = 4 * cols, .format = PL_W_F32};
}

/* y [n, o] = x [n, i] W^T + bias + scale h b. */
static pl_status linear_forward(const pl_call *call) {
    int64_t n = PL_DIM(call, 'N'), i = PL_DIM(call, 'I'), o = PL_DIM(call, 'O'), r = PL_DIM(call, 'R');
    gemm g = {.m = n,
              .n = o,
              .k = i,
              .a = call->arg[0].in,
              .b = call->arg[1].w,
              .b_transposed = 1,
              .bias = call->arg[2].in,
              .alpha = 1,
              .c = call->arg[6].out};
    if (call->arg[3].in && call->arg[4].in) {
        g.rank = r;
        g.h_given = call->arg[3].in;
        g.u = float_matrix(call->arg[4].in, r, o);
        g.u_scale = (float)call->arg[5].f;
    }
    return gemm_run(&g);
}

/* h [n, r] = x a; y [n, o] = x W^T + bias + scale h b. */
static pl_status lora_forward(const pl_call *call) {
    int64_t n = PL_DIM(call, 'N'), i = PL_DIM(call, 'I'), o = PL_DIM(call, 'O'), r = PL_DIM(call, 'R');
    gemm g = {.m = n,
              .n = o,
              .k = i,
              .a = call->arg[0].in,
              .b = call->arg[1].w,
              .b_transposed = 1,
              .bias = call->arg[2].in,
              .alpha = 1,
              .c = call->arg[7].out,
              .rank = r,
              .h = call->arg[6].out,
              .p = float_matrix(call->arg[3].in, i, r),
              .h_scale = 1,
              .u = float_matrix(call->arg[4].in, r, o),
              .u_scale = (float)call->arg[5].f};
    return gemm_run(&g);
}

/* dx [n, i] (+)= dy [n, o] W + dh a^T. */
static pl_status linear_input_grad(const pl_call *call) {
    int64_t n = PL_DIM(call, 'N'), i = PL_DIM(call, 'I'), o = PL_DIM(call, 'O'), r = PL_DIM(call, 'R');
    gemm g = {.m = n,
              .n = i,
              .k = o,
              .a = call->arg[0].in,
              .b = call->arg[1].w,
              .alpha = 1,
              .accumulate = call->arg[4].i != 0,
              .c = call->arg[5].out};
    if (call->arg[2].in && call->arg[3].in) {
        g.rank = r;
        g.h_given = call->arg[2].in;
        g.u = float_matrix(call->arg[3].in, i, r);
        g.u_transposed = 1;
        g.u_scale = 1;
    }
    return gemm_run(&g);
}

/* dh [n, r] = scale dy b^T; dx [n, i] (+)= dy W + dh a^T. */
static pl_status lora_input_grad(const pl_call *call) {
    int64_t n = PL_DIM(call, 'N'), i = PL_DIM(call, 'I'), o = PL_DIM(call, 'O'), r = PL_DIM(call, 'R');
    gemm g = {.m = n,
              .n = i,
              .k = o,
              .a = call->arg[0].in,
              .b = call->arg[1].w,
              .alpha = 1,
              .accumulate = call->arg[5].i != 0,
              .c = call->arg[7].out,
              .rank = r,
              .h = call->arg[6].out,
              .p = float_matrix(call->arg[3].in, r, o),
              .p_transposed = 1,
              .h_scale = (float)call->arg[4].f,
              .u = float_matrix(call->arg[2].in, i, r),
              .u_transposed = 1,
              .u_scale = 1};
    return gemm_run(&g);
}

/* c (+)= alpha a b, with a as [m, k] or [k, m] and b as [k, n] or [n, k]. */
INLINE pl_status plain_product(const pl_call *call, int a_transposed, int b_transposed) {
    int64_t m = PL_DIM(call, 'M'), n = PL_DIM(call, 'N'), k = PL_DIM(call, 'K');
    gemm g = {.m = m,
              .n = n,
              .k = k,
              .a = call->arg[0].in,
              .a_transposed = a_transposed,
              .b = float_matrix(call->arg[1].in, b_transposed ? n : k, b_transposed ? k : n),
              .b_transposed = b_transposed,
              .alpha = (float)call->arg[2].f,
              .accumulate = call->arg[3].i != 0,
              .c = call->arg[4].out};
    return gemm_run(&g);
}
static pl_status matmul_nn(const pl_call *call) { return plain_product(call, 0, 0); }
static pl_status matmul_nt(const pl_call *call) { return plain_product(call, 0, 1); }
static pl_status matmul_tn(const pl_call *call) { return plain_product(call, 1, 0); }
