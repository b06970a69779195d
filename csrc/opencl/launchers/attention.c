/* Launches attention.cl. */
#include "../launch.h"
#include "args.h"
#include "places.h"

/* Rows are lanes of a processor's vectors; elsewhere each work-item has one. */
static pl_cl_shape shape_of(const pl_cl_operation *o) {
    int cpu = pl_cl_is_cpu(o->device);
    pl_cl_shape shape =
        cpu ? (pl_cl_shape){1, o->device->info->vector >= 8 ? (int)o->device->info->vector : 8, 1}
            : (pl_cl_shape){64, 1, 1};
    if (shape.width > 16) shape.width = 16;
    if (pl_cl_forced_shape.group)
        shape = (pl_cl_shape){pl_cl_forced_shape.group,
                              pl_cl_forced_shape.group > 1 ? 1 : shape.width, 1};
    while ((size_t)shape.group > o->device->info->max_group && shape.group > 1) shape.group /= 2;
    return shape;
}

/* Keys of a tile; fewer where wide heads would not fit in local memory. */
static int tile_of(const pl_cl_operation *o, pl_cl_shape shape) {
    int64_t d = PL_DIM(o->call, 'D'), tile = 32;
    if (shape.group > 1)
        while (tile > 4 && (size_t)(2 * 4 * tile * (d + 1)) > o->device->info->local_memory / 2)
            tile /= 2;
    return (int)tile;
}

static pl_cl_launch begin(const pl_cl_operation *o) {
    pl_cl_shape shape = shape_of(o);
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_attention, shape, 0);
    pl_cl_define(&l, "-DD=%d -DTILE=%d ", (int)PL_DIM(o->call, 'D'), tile_of(o, shape));
    return l;
}

/* Enqueues a group for each block of rows of each key-value head. A token that `offsets` counts has
 * `share` rows. */
static int run(pl_cl_launch *l, const char *kernel, const int32_t *offsets, int64_t share,
               double scale, double softcap, int64_t window, int64_t ahead) {
    const pl_cl_operation *o = l->operation;
    pl_cl_shape shape = shape_of(o);
    int64_t sequences = PL_DIM(o->call, 'S') - 1, blocks = 0, rows = shape.group * shape.width;
    for (int64_t s = 0; s < sequences; s++)
        blocks += ((offsets[s + 1] - offsets[s]) * share + rows - 1) / rows;
    pl_cl_add_i64(l, sequences);
    pl_cl_add_i64(l, PL_DIM(o->call, 'H'));
    pl_cl_add_i64(l, PL_DIM(o->call, 'G'));
    pl_cl_add_f32(l, scale);
    pl_cl_add_f32(l, softcap);
    pl_cl_add_i64(l, window > 0 && window < INT32_MAX ? window : INT32_MAX);
    pl_cl_add_i64(l, ahead < 0 ? 0 : ahead < INT32_MAX ? ahead : INT32_MAX);
    return pl_cl_enqueue(l, kernel, (size_t)(blocks * PL_DIM(o->call, 'G')), (size_t)shape.group,
                         NULL);
}

int pl_cl_launch_attention_forward(const pl_cl_operation *o) {
    if (!PL_DIM(o->call, 'H')) return 0;
    const attention_forward_args args = attention_forward_args_of(o->call);
    const attention_forward_places at = attention_forward_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.q, at.k, at.v, at.q_offsets, at.k_offsets, at.o, at.lse);
    int64_t share = PL_DIM(o->call, 'H') / PL_DIM(o->call, 'G');
    return run(&l, "attention_forward", args.q_offsets, share, args.scale, args.softcap,
               args.window, args.ahead);
}

int pl_cl_launch_attention_grad(const pl_cl_operation *o) {
    if (!PL_DIM(o->call, 'H')) return 0;
    const attention_grad_args args = attention_grad_args_of(o->call);
    const attention_grad_places at = attention_grad_places_of(o);
    pl_cl_place delta =
        pl_cl_scratch(o, sizeof(float) * (size_t)(PL_DIM(o->call, 'N') * PL_DIM(o->call, 'H')));
    if (!delta.buffer) return 1;
    pl_cl_launch rows = begin(o), keys = begin(o);
    pl_cl_add_places(&rows, 4, at.d_o, at.q, at.k, at.v, at.o, at.lse, at.q_offsets, at.k_offsets,
                     at.dq, delta);
    pl_cl_add_places(&keys, 4, at.d_o, at.q, at.k, at.v, at.lse, delta, at.q_offsets, at.k_offsets,
                     at.dk, at.dv);
    int64_t share = PL_DIM(o->call, 'H') / PL_DIM(o->call, 'G');
    int failed = run(&rows, "attention_grad_rows", args.q_offsets, share, args.scale, args.softcap,
                     args.window, args.ahead) ||
                 run(&keys, "attention_grad_keys", args.k_offsets, 1, args.scale, args.softcap,
                     args.window, args.ahead);
    pl_cl_buffer_release(delta.buffer);
    return failed;
}
