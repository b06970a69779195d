/* Launches matmul.cl, for the operations of kernels/matmul/: dense layers, and layers of experts,
 * one product per expert. */
#include "../launch.h"
#include "args.h"
#include "places.h"

static const pl_cl_place none = {NULL, 0};

/* ---- one product */

void pl_cl_add_weight(pl_cl_launch *l, const pl_weight *w, pl_cl_place codes) {
    pl_cl_define(l, "-DBLOCK_ELEMENTS=%d -DBLOCK_BYTES=%d ", (int)pl_block_elements(w->format),
                 (int)pl_block_bytes(w->format));
    pl_cl_add_place(l, codes, 1);
    /* Blocks hold halves; codes whose scales are elsewhere are bytes. */
    pl_cl_align(l, codes, w->format == PL_W_F32 ? 4 : pl_has_groups(w->format) ? 1 : 2);
    pl_cl_add_i64(l, w->cols);
    pl_cl_add_i64(l, w->head_dim);
    if (!pl_has_groups(w->format)) {
        pl_cl_define(l, "-DFORMAT_%s ", pl_formats[w->format].name);
        return;
    }
    const pl_groups *g = &w->groups;
    const pl_cl_operation *o = l->operation;
    pl_cl_define(l, "-DGROUPED -DSCALE_F32=%d -DSCALE_F16=%d ", PL_W_F32, PL_W_F16);
    if (pl_has_table(w->format)) pl_cl_define(l, "-D%s ", pl_formats[w->format].name);
    else pl_cl_define(l, "-DAFFINE=%d ", pl_code_bits(w->format));
    const uint8_t *const parts[] = {g->scales, g->offsets, g->map, g->table, g->nested};
    for (int i = 0; i < 5; i++)
        pl_cl_add_place(l, parts[i] ? pl_cl_place_of(o, parts[i]) : none, i < 2 ? 1 : 4);
    for (int i = 0; i < 2; i++)
        if (parts[i] && !g->map)
            pl_cl_align(l, pl_cl_place_of(o, parts[i]), (size_t)pl_block_bytes(g->scale_format));
    pl_cl_add_i64(l, g->first);
    pl_cl_add_i64(l, __builtin_ctzll((unsigned long long)g->size));
    pl_cl_add_i64(l, g->map ? __builtin_ctzll((unsigned long long)g->nested_size) : 0);
    pl_cl_add_i64(l, g->scale_format);
    pl_cl_add_f32(l, g->nested_offset);
}

/* The tile of C that a group computes: each work-item has `rows` rows and `vectors` vectors of
 * columns; `across` work-items are side by side. `depth` and `flush` are DEPTH and FLUSH of
 * matmul.cl. */
typedef struct {
    pl_cl_shape shape;
    int rows, vectors, across, depth, flush;
} tiling;

static tiling tiling_of(const pl_cl_operation *o, int64_t m, int64_t n) {
    enum { FLUSH = 512 };
    const pl_cl_info *info = o->device->info;
    if (pl_cl_is_cpu(o->device) && pl_cl_forced_shape.group <= 1) {
        int width = info->vector >= 16  ? 16
                    : info->vector >= 8 ? 8
                                        : 4,
            vectors = n <= width ? 1 : 2, depth = FLUSH;
        while (depth > 32 && (size_t)(4 * depth * vectors * width) > info->local_memory / 2)
            depth /= 2;
        return (tiling){{1, width, 1}, width == 16 ? 12 : 6, vectors, 1, depth, depth};
    }
    tiling t = {{256, 4, 1}, 8, 2, 16, 16, FLUSH};
    int64_t tiles = ((m + 127) / 128) * ((n + 127) / 128);
    if (n <= 16) t = (tiling){{128, 4, 1}, 2, 1, 4, 16, FLUSH};
    else if (tiles < 2 * (int64_t)info->units) t = (tiling){{256, 4, 1}, 4, 1, 16, 16, FLUSH};
    while ((size_t)t.shape.group > info->max_group ||
           (pl_cl_forced_shape.group && t.shape.group > 8 * pl_cl_forced_shape.group)) {
        t.shape.group /= 4;
        t.across /= 2;
    }
    return t;
}

static int enqueue(const pl_cl_operation *o, const pl_cl_gemm *g, tiling t, int *too_large) {
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_matmul, t.shape, 0);
    pl_cl_define(&l, "-DTM=%d -DTN=%d -DACROSS=%d -DDEPTH=%d -DFLUSH=%d ", t.rows, t.vectors,
                 t.across, t.depth, t.flush);
    if (g->b_transposed) pl_cl_define(&l, "-DB_TRANSPOSED ");
    if (g->a_k_step != 1) pl_cl_define(&l, "-DA_STRIDED ");
    pl_cl_add_place(&l, g->a, 4);
    pl_cl_add_weight(&l, &g->b, g->b_codes);
    pl_cl_add_places(&l, 4, g->b_row_factors, g->bias, g->c, g->branch_h, g->branch_u);
    int64_t tile_n = t.across * t.vectors * t.shape.width,
            tile_m = t.shape.group / t.across * t.rows;
    int64_t across = (g->n + tile_n - 1) / tile_n, down = (g->m + tile_m - 1) / tile_m, tiles = 1;
    if (t.shape.group == 1) {
        /* Enough groups to end at about the same time on all cores, each with enough rows to pay
         * for expanding its columns of B. */
        int64_t wanted = (4 * (int64_t)o->device->info->units + across - 1) / across,
                most = down / 8 + 1;
        int64_t parts = wanted < most ? wanted : most;
        tiles = (down + parts - 1) / parts;
    }
    const int64_t numbers[] = {g->m, g->n, g->k, g->a_row_step, g->a_k_step};
    for (int i = 0; i < 5; i++) pl_cl_add_i64(&l, numbers[i]);
    pl_cl_add_f32(&l, g->b_scale);
    pl_cl_add_i64(&l, g->accumulate);
    pl_cl_add_i64(&l, g->rank);
    pl_cl_add_i64(&l, g->branch_u_transposed);
    pl_cl_add_f32(&l, g->branch_scale);
    pl_cl_add_i64(&l, across);
    pl_cl_add_i64(&l, tiles);
    return pl_cl_enqueue(&l, "gemm", (size_t)(across * ((down + tiles - 1) / tiles)),
                         (size_t)t.shape.group, too_large);
}

int pl_cl_gemm_run(const pl_cl_operation *o, const pl_cl_gemm *g) {
    if (!g->m || !g->n) return 0;
    tiling t = tiling_of(o, g->m, g->n);
    for (;;) {
        int too_large = 0;
        if (!enqueue(o, g, t, &too_large)) return 0;
        if (!too_large || t.across == 1) return 1;
        t.shape.group /= 4; /* fewer work-items have more registers each */
        t.across /= 2;
    }
}

/* ---- operations */

/* The place of item `i`, of `bytes` bytes each. */
static pl_cl_place at(pl_cl_place place, int64_t i, int64_t bytes) {
    if (place.buffer) place.offset += (size_t)(i * bytes);
    return place;
}

/* Makes B a float32 matrix. */
static void set_matrix(pl_cl_gemm *g, pl_cl_place data, int64_t rows, int64_t cols,
                       int transposed) {
    g->b = (pl_weight){.rows = rows, .cols = cols, .row_bytes = 4 * cols, .format = PL_W_F32};
    g->b_codes = data;
    g->b_transposed = transposed;
}

/* c [m, n] = scale a b, with a [m, k]. */
static pl_cl_gemm float_product(int64_t m, int64_t n, int64_t k, pl_cl_place a, pl_cl_place b,
                                int b_transposed, double scale, pl_cl_place c) {
    pl_cl_gemm g = {
        .m = m, .n = n, .k = k, .a = a, .a_row_step = k, .a_k_step = 1, .c = c, .b_scale = scale};
    set_matrix(&g, b, b_transposed ? n : k, b_transposed ? k : n, b_transposed);
    return g;
}

/* A layer's product without its adapter: x W^T; backward: dy W. */
static pl_cl_gemm layer(const pl_weight *w, pl_cl_place data, int64_t rows, int backward,
                        pl_cl_place x, pl_cl_place factor, pl_cl_place out) {
    int64_t k = backward ? w->rows : w->cols;
    return (pl_cl_gemm){.m = rows,
                        .n = backward ? w->cols : w->rows,
                        .k = k,
                        .a = x,
                        .a_row_step = k,
                        .a_k_step = 1,
                        .b = *w,
                        .b_codes = data,
                        .b_transposed = !backward,
                        .b_row_factors = factor,
                        .b_scale = 1,
                        .c = out};
}

/* Adds the low-rank branch scale H U to a product. */
static void set_branch(pl_cl_gemm *g, int64_t rank, pl_cl_place h, pl_cl_place u, int transposed,
                       double scale) {
    g->rank = rank;
    g->branch_h = h;
    g->branch_u = u;
    g->branch_u_transposed = transposed;
    g->branch_scale = scale;
}

/* A layer's arguments under common names. The adapter's branch is xa * second; with `first`, xa is
 * computed (x first). Experts have offsets, and store both factors transposed. */
typedef struct {
    const pl_weight *w; /* one, or a stack */
    pl_cl_place codes;  /* of a float32 array; absent: w->data is a virtual address */
    pl_cl_place x, bias, xa, first, second, row_factor, y;
    double scale;
    int64_t accumulate;
    const int32_t *offsets;
} layer_args;

/* Multiplies the rows [begin, begin + rows) by matrix `e` of the weight. */
static int run_layer(const pl_cl_operation *o, const layer_args *l, int backward, int64_t e,
                     int64_t begin, int64_t rows) {
    const pl_weight *w = l->w + e;
    int64_t rank = PL_DIM(o->call, 'R'), k = backward ? w->rows : w->cols,
            n = backward ? w->cols : w->rows;
    pl_cl_place data =
        l->codes.buffer ? at(l->codes, e * w->rows, w->row_bytes) : pl_cl_place_of(o, w->data);
    pl_cl_place x = at(l->x, begin * k, 4), y = at(l->y, begin * n, 4);
    pl_cl_place xa = at(l->xa, begin * rank, 4), second = at(l->second, e * n * rank, 4);
    const int transposed = backward != (l->offsets != NULL);
    pl_cl_gemm g = layer(w, data, rows, backward, x, at(l->row_factor, e * w->rows, 4), y);
    g.bias = at(l->bias, e * n, 4);
    g.accumulate = l->accumulate != 0;
    if (l->first.buffer) {
        /* xa = x a; backward: scale dy b^T. */
        pl_cl_place first = at(l->first, e * k * rank, 4);
        pl_cl_gemm product =
            float_product(rows, rank, k, x, first, transposed, backward ? l->scale : 1, xa);
        if (pl_cl_gemm_run(o, &product)) return 1;
    }
    if (xa.buffer && second.buffer)
        set_branch(&g, rank, xa, second, transposed, backward ? 1 : l->scale);
    return pl_cl_gemm_run(o, &g);
}

/* Multiplies all rows; with experts, each expert's rows. */
static int run_rows(const pl_cl_operation *o, const layer_args *l, int backward) {
    if (!l->offsets) return run_layer(o, l, backward, 0, 0, PL_DIM(o->call, 'N'));
    for (int64_t e = 0; e < PL_DIM(o->call, 'E'); e++) {
        int64_t begin = l->offsets[e], rows = l->offsets[e + 1] - begin;
        if (rows && run_layer(o, l, backward, e, begin, rows)) return 1;
    }
    return 0;
}

/* What all forward operations have of `layer_args`, and what all input gradients have. */
#define FORWARD \
    .w = args.w, .codes = at.w, .x = at.x, .bias = at.bias, .xa = at.xa, .second = at.b, \
    .row_factor = at.row_factor, .y = at.y, .scale = args.scale
#define INPUT_GRAD \
    .w = args.w, .codes = at.w, .x = at.dy, .xa = at.dxa, .second = at.a, \
    .row_factor = at.row_factor, .y = at.dx, .accumulate = args.accumulate

int pl_cl_launch_linear_forward(const pl_cl_operation *o) {
    const linear_forward_args args = linear_forward_args_of(o->call);
    const linear_forward_places at = linear_forward_places_of(o);
    const layer_args l = {FORWARD};
    return run_rows(o, &l, 0);
}

int pl_cl_launch_lora_forward(const pl_cl_operation *o) {
    const lora_forward_args args = lora_forward_args_of(o->call);
    const lora_forward_places at = lora_forward_places_of(o);
    const layer_args l = {FORWARD, .first = at.a};
    return run_rows(o, &l, 0);
}

int pl_cl_launch_linear_input_grad(const pl_cl_operation *o) {
    const linear_input_grad_args args = linear_input_grad_args_of(o->call);
    const linear_input_grad_places at = linear_input_grad_places_of(o);
    const layer_args l = {INPUT_GRAD};
    return run_rows(o, &l, 1);
}

int pl_cl_launch_lora_input_grad(const pl_cl_operation *o) {
    const lora_input_grad_args args = lora_input_grad_args_of(o->call);
    const lora_input_grad_places at = lora_input_grad_places_of(o);
    const layer_args l = {INPUT_GRAD, .first = at.b, .scale = args.scale};
    return run_rows(o, &l, 1);
}

int pl_cl_launch_experts_forward(const pl_cl_operation *o) {
    const experts_forward_args args = experts_forward_args_of(o->call);
    const experts_forward_places at = experts_forward_places_of(o);
    const layer_args l = {FORWARD, .offsets = args.offsets};
    return run_rows(o, &l, 0);
}

int pl_cl_launch_experts_lora_forward(const pl_cl_operation *o) {
    const experts_lora_forward_args args = experts_lora_forward_args_of(o->call);
    const experts_lora_forward_places at = experts_lora_forward_places_of(o);
    const layer_args l = {FORWARD, .first = at.a, .offsets = args.offsets};
    return run_rows(o, &l, 0);
}

int pl_cl_launch_experts_input_grad(const pl_cl_operation *o) {
    const experts_input_grad_args args = experts_input_grad_args_of(o->call);
    const experts_input_grad_places at = experts_input_grad_places_of(o);
    const layer_args l = {INPUT_GRAD, .offsets = args.offsets};
    return run_rows(o, &l, 1);
}

int pl_cl_launch_experts_lora_input_grad(const pl_cl_operation *o) {
    const experts_lora_input_grad_args args = experts_lora_input_grad_args_of(o->call);
    const experts_lora_input_grad_places at = experts_lora_input_grad_places_of(o);
    const layer_args l = {INPUT_GRAD, .first = at.b, .scale = args.scale, .offsets = args.offsets};
    return run_rows(o, &l, 1);
}

/* dw [out, in] = alpha dy^T x. */
static pl_cl_gemm weight_grad_product(int64_t out, int64_t in, int64_t rows, pl_cl_place dy,
                                      pl_cl_place x, double alpha, pl_cl_place dw) {
    pl_cl_gemm g = float_product(out, in, rows, dy, x, 0, alpha, dw);
    g.a_row_step = 1;
    g.a_k_step = out;
    return g;
}
int pl_cl_launch_linear_weight_grad(const pl_cl_operation *o) {
    const linear_weight_grad_args args = linear_weight_grad_args_of(o->call);
    const linear_weight_grad_places to = linear_weight_grad_places_of(o);
    pl_cl_gemm g = weight_grad_product(PL_DIM(o->call, 'O'), PL_DIM(o->call, 'I'),
                                       PL_DIM(o->call, 'N'), to.dy, to.x, 1, to.dw);
    g.accumulate = args.accumulate != 0;
    return pl_cl_gemm_run(o, &g);
}

/* dw[e] = alpha dy^T x over the rows of the expert. */
int pl_cl_launch_experts_weight_grad(const pl_cl_operation *o) {
    const experts_weight_grad_args args = experts_weight_grad_args_of(o->call);
    const experts_weight_grad_places to = experts_weight_grad_places_of(o);
    int64_t out = PL_DIM(o->call, 'O'), in = PL_DIM(o->call, 'I');
    for (int64_t e = 0; e < PL_DIM(o->call, 'E'); e++) {
        int64_t begin = args.offsets[e], rows = args.offsets[e + 1] - begin;
        pl_cl_gemm g =
            weight_grad_product(out, in, rows, at(to.dy, begin * out, 4), at(to.x, begin * in, 4),
                                args.alpha, at(to.dw, e * out * in, 4));
        if (pl_cl_gemm_run(o, &g)) return 1;
    }
    return 0;
}

/* c (+)= alpha a b, with a as [m, k] or [k, m] and b as [k, n] or [n, k]. */
static int plain_product(const pl_cl_operation *o, double alpha, pl_cl_place a, int a_transposed,
                         pl_cl_place b, int b_transposed, int64_t accumulate, pl_cl_place c) {
    int64_t m = PL_DIM(o->call, 'M'), n = PL_DIM(o->call, 'N'), k = PL_DIM(o->call, 'K');
    pl_cl_gemm g = float_product(m, n, k, a, b, b_transposed, alpha, c);
    if (a_transposed) {
        g.a_row_step = 1;
        g.a_k_step = m;
    }
    g.accumulate = accumulate != 0;
    return pl_cl_gemm_run(o, &g);
}
int pl_cl_launch_matmul_nn(const pl_cl_operation *o) {
    const matmul_nn_args args = matmul_nn_args_of(o->call);
    const matmul_nn_places at = matmul_nn_places_of(o);
    return plain_product(o, args.alpha, at.a, 0, at.b, 0, args.accumulate, at.c);
}
int pl_cl_launch_matmul_nt(const pl_cl_operation *o) {
    const matmul_nt_args args = matmul_nt_args_of(o->call);
    const matmul_nt_places at = matmul_nt_places_of(o);
    return plain_product(o, args.alpha, at.a, 0, at.b, 1, args.accumulate, at.c);
}
int pl_cl_launch_matmul_tn(const pl_cl_operation *o) {
    const matmul_tn_args args = matmul_tn_args_of(o->call);
    const matmul_tn_places at = matmul_tn_places_of(o);
    return plain_product(o, args.alpha, at.a, 1, at.b, 0, args.accumulate, at.c);
}

/* Matrices of a batched product, and which of them product i reads. */
typedef struct {
    pl_cl_place data;
    const int32_t *index;
    int64_t count, size;
    int transposed;
} operand;

static pl_cl_place matrix_of(const operand *m, int64_t i) {
    return at(m->data, (m->index ? m->index[i] : i % m->count) * m->size, 4);
}

static int batched_product(const pl_cl_operation *o, operand a, operand b, double alpha,
                           int64_t accumulate, pl_cl_place c) {
    const int64_t m = PL_DIM(o->call, 'M'), n = PL_DIM(o->call, 'N'), k = PL_DIM(o->call, 'K');
    a.count = PL_DIM(o->call, 'A'), a.size = m * k;
    b.count = PL_DIM(o->call, 'B'), b.size = k * n;
    for (int64_t i = 0; a.count && b.count && i < PL_DIM(o->call, 'C'); i++)
        if (plain_product(o, alpha, matrix_of(&a, i), a.transposed, matrix_of(&b, i), b.transposed,
                          accumulate, at(c, i * m * n, 4)))
            return 1;
    return 0;
}
#define BATCHED(name, a_transposed, b_transposed) \
    int pl_cl_launch_##name(const pl_cl_operation *o) { \
        const name##_args args = name##_args_of(o->call); \
        const name##_places to = name##_places_of(o); \
        return batched_product( \
            o, (operand){.data = to.a, .index = args.a_index, .transposed = a_transposed}, \
            (operand){.data = to.b, .index = args.b_index, .transposed = b_transposed}, \
            args.alpha, args.accumulate, to.c); \
    }
BATCHED(batched_nn, 0, 0)
BATCHED(batched_nt, 0, 1)
BATCHED(batched_tn, 1, 0)
