/* Launches stored.cl: embeddings, and norms of the rows of stored matrices. */
#include "runtime.h"

#include <string.h>

enum { FEW_ITEMS = 64 };

static pl_cl_shape shape_of(const pl_cl_operation *o) {
    pl_cl_shape shape = {pl_cl_is_cpu(o->device) ? 1 : FEW_ITEMS, 4, 1};
    if (pl_cl_forced_shape.group) shape.group = pl_cl_forced_shape.group;
    return shape;
}

static pl_cl_launch begin(const pl_cl_operation *o) { return pl_cl_begin(o, pl_cl_source_stored, shape_of(o), 0); }

/* The weight that is argument `index`. */
static void add_weight(pl_cl_launch *l, int index) {
    const pl_weight *w = &l->operation->call->arg[index].w;
    pl_cl_place data = l->operation->place[index];
    pl_cl_add_weight(l, w, data.buffer ? data : pl_cl_place_of(l->operation, w->data));
}

static int run(pl_cl_launch *l, const char *kernel, int64_t groups) {
    return pl_cl_enqueue(l, kernel, (size_t)groups, (size_t)shape_of(l->operation).group, NULL);
}

static int embedding_forward(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    pl_cl_add_array(&l, 0, 4);
    add_weight(&l, 1);
    pl_cl_add_array(&l, 2, 4);
    return run(&l, "embedding_forward", PL_DIM(o->call, 'N'));
}

/* For row_squares and row_norms. */
static int squared_rows(const pl_cl_operation *o, const char *name, size_t item) {
    pl_cl_launch l = begin(o);
    add_weight(&l, 0);
    pl_cl_add_array(&l, 1, item);
    return run(&l, name, PL_DIM(o->call, 'O'));
}

static int adapted_norm(const pl_cl_operation *o) {
    int64_t rank = PL_DIM(o->call, 'R'), out = PL_DIM(o->call, 'O'), in = PL_DIM(o->call, 'I');
    pl_cl_place scratch = pl_cl_scratch(o, sizeof(float) * (size_t)(2 * rank * out + rank * rank));
    if (!scratch.buffer) return 1;
    pl_cl_place wa = scratch, gb = scratch, inner = scratch;
    gb.offset += sizeof(float) * (size_t)(rank * out);
    inner.offset += sizeof(float) * (size_t)(2 * rank * out);
    const pl_weight *w = &o->call->arg[0].w;
    pl_cl_place data = o->place[0].buffer ? o->place[0] : pl_cl_place_of(o, w->data);
    const pl_weight a = {.rows = in, .cols = rank, .format = PL_W_F32}, b = {.rows = rank, .cols = out, .format = PL_W_F32};
    /* a^T w^T, a^T a, and (a^T a) b. */
    const pl_cl_gemm products[] = {
        {.m = rank,
         .n = out,
         .k = in,
         .a = o->place[1],
         .a_row = 1,
         .a_k = rank,
         .b = *w,
         .b_data = data,
         .b_transposed = 1,
         .b_scale = 1,
         .c = wa},
        {.m = rank,
         .n = rank,
         .k = in,
         .a = o->place[1],
         .a_row = 1,
         .a_k = rank,
         .b = a,
         .b_data = o->place[1],
         .b_scale = 1,
         .c = inner},
        {.m = rank,
         .n = out,
         .k = rank,
         .a = inner,
         .a_row = rank,
         .a_k = 1,
         .b = b,
         .b_data = o->place[2],
         .b_scale = 1,
         .c = gb},
    };
    int failed = 0;
    for (int i = 0; i < 3 && !failed; i++) failed = pl_cl_gemm_run(o, &products[i]);
    pl_cl_launch l = begin(o);
    add_weight(&l, 0);
    pl_cl_add_arrays(&l, "12", 4);
    pl_cl_add_array(&l, 4, 8);
    pl_cl_add_place(&l, wa, 4);
    pl_cl_add_place(&l, gb, 4);
    pl_cl_add_array(&l, 5, 4);
    pl_cl_add_scalar(&l, o->call->arg[3].f);
    pl_cl_add_i64(&l, rank);
    pl_cl_add_i64(&l, out);
    int64_t group = shape_of(o).group;
    failed = failed || run(&l, "adapted_norm", (out + group - 1) / group);
    pl_cl_buffer_release(scratch.buffer);
    return failed;
}

int pl_cl_norm(const char *name, const pl_cl_operation *o) {
    if (!strcmp(name, "embedding_forward")) return embedding_forward(o);
    if (!strcmp(name, "row_squares")) return squared_rows(o, name, 8);
    if (!strcmp(name, "row_norms")) return squared_rows(o, name, 4);
    return strcmp(name, "adapted_norm") ? -1 : adapted_norm(o);
}
