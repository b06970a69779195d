/* Launches stored.cl: embeddings, and norms of the rows of stored matrices. */
#include "../launch.h"
#include "args.h"
#include "places.h"

enum { GPU_GROUP = 64 };

static pl_cl_shape shape_of(const pl_cl_operation *o) {
    pl_cl_shape shape = {pl_cl_is_cpu(o->device) ? 1 : GPU_GROUP, 4, 1};
    if (pl_cl_forced_shape.group) shape.group = pl_cl_forced_shape.group;
    return shape;
}

static pl_cl_launch begin(const pl_cl_operation *o) {
    return pl_cl_begin(o, pl_cl_source_stored, shape_of(o), 0);
}

/* The place of a weight's codes: `place` for a float32 array; absent for a stored weight. */
static pl_cl_place codes_of(const pl_cl_operation *o, const pl_weight *w, pl_cl_place place) {
    return place.buffer ? place : pl_cl_place_of(o, w->data);
}

static int run(pl_cl_launch *l, const char *kernel, int64_t groups) {
    return pl_cl_enqueue(l, kernel, (size_t)groups, (size_t)shape_of(l->operation).group, NULL);
}

int pl_cl_launch_embedding_forward(const pl_cl_operation *o) {
    const embedding_forward_places at = embedding_forward_places_of(o);
    const pl_weight *w = embedding_forward_args_of(o->call).w;
    pl_cl_launch l = begin(o);
    pl_cl_add_place(&l, at.ids, 4);
    pl_cl_add_weight(&l, w, codes_of(o, w, at.w));
    pl_cl_add_place(&l, at.y, 4);
    return run(&l, "embedding_forward", PL_DIM(o->call, 'N'));
}

/* row_squares and row_norms, whose results have `item` bytes. */
static int squared_rows(const pl_cl_operation *o, const char *kernel, const pl_weight *w,
                        pl_cl_place codes, pl_cl_place out, size_t item) {
    pl_cl_launch l = begin(o);
    pl_cl_add_weight(&l, w, codes_of(o, w, codes));
    pl_cl_add_place(&l, out, item);
    return run(&l, kernel, PL_DIM(o->call, 'O'));
}
int pl_cl_launch_row_squares(const pl_cl_operation *o) {
    const row_squares_places at = row_squares_places_of(o);
    return squared_rows(o, "row_squares", row_squares_args_of(o->call).w, at.w, at.squares,
                        sizeof(double));
}
int pl_cl_launch_row_norms(const pl_cl_operation *o) {
    const row_norms_places at = row_norms_places_of(o);
    return squared_rows(o, "row_norms", row_norms_args_of(o->call).w, at.w, at.norms,
                        sizeof(float));
}

int pl_cl_launch_adapted_norm(const pl_cl_operation *o) {
    const adapted_norm_args args = adapted_norm_args_of(o->call);
    const adapted_norm_places at = adapted_norm_places_of(o);
    int64_t rank = PL_DIM(o->call, 'R'), out = PL_DIM(o->call, 'O'), in = PL_DIM(o->call, 'I');
    pl_cl_place scratch = pl_cl_scratch(o, sizeof(float) * (size_t)(2 * rank * out + rank * rank));
    if (!scratch.buffer) return 1;
    pl_cl_place wa = scratch, gb = scratch, inner = scratch;
    gb.offset += sizeof(float) * (size_t)(rank * out);
    inner.offset += sizeof(float) * (size_t)(2 * rank * out);
    pl_cl_place data = codes_of(o, args.w, at.w);
    const pl_weight a = {.rows = in, .cols = rank, .format = PL_W_F32},
                    b = {.rows = rank, .cols = out, .format = PL_W_F32};
    /* a^T w^T, a^T a, and (a^T a) b. */
    const pl_cl_gemm products[] = {
        {.m = rank,
         .n = out,
         .k = in,
         .a = at.a,
         .a_row_step = 1,
         .a_k_step = rank,
         .b = *args.w,
         .b_codes = data,
         .b_transposed = 1,
         .b_scale = 1,
         .c = wa},
        {.m = rank,
         .n = rank,
         .k = in,
         .a = at.a,
         .a_row_step = 1,
         .a_k_step = rank,
         .b = a,
         .b_codes = at.a,
         .b_scale = 1,
         .c = inner},
        {.m = rank,
         .n = out,
         .k = rank,
         .a = inner,
         .a_row_step = rank,
         .a_k_step = 1,
         .b = b,
         .b_codes = at.b,
         .b_scale = 1,
         .c = gb},
    };
    int failed = 0;
    for (int i = 0; i < 3 && !failed; i++) failed = pl_cl_gemm_run(o, &products[i]);
    pl_cl_launch l = begin(o);
    pl_cl_add_weight(&l, args.w, data);
    pl_cl_add_places(&l, 4, at.a, at.b);
    pl_cl_add_place(&l, at.squares, 8);
    pl_cl_add_places(&l, 4, wa, gb, at.norm);
    pl_cl_add_scalar(&l, args.scale);
    pl_cl_add_i64(&l, rank);
    pl_cl_add_i64(&l, out);
    int64_t group = shape_of(o).group;
    failed = failed || run(&l, "adapted_norm", (out + group - 1) / group);
    pl_cl_buffer_release(scratch.buffer);
    return failed;
}

int pl_cl_launch_magnitude_grad(const pl_cl_operation *o) {
    const magnitude_grad_args args = magnitude_grad_args_of(o->call);
    const magnitude_grad_places at = magnitude_grad_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.dots, at.m, at.norm, at.dy, at.x);
    pl_cl_add_weight(&l, args.w, codes_of(o, args.w, at.w));
    pl_cl_add_places(&l, 4, at.xa, at.b, at.dm);
    pl_cl_add_scalar(&l, args.scale);
    pl_cl_add_i64(&l, PL_DIM(o->call, 'N'));
    pl_cl_add_i64(&l, PL_DIM(o->call, 'R'));
    pl_cl_add_i64(&l, PL_DIM(o->call, 'O'));
    return run(&l, "magnitude_grad", PL_DIM(o->call, 'O'));
}
