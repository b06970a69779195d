/* Launches the programs of programs/rowloss. A loss's line in losses.def and the types of its arrays
 * choose the program's options. */
#include "../launch.h"
#include "args.h"
#include "places.h"

typedef enum { CLASS, PAIR, COSINE, SPARSE, ELEMENT, MAP, ARGMAX } kind_of_loss;
static const char *const sources[] = {
    [CLASS] = pl_cl_source_rowloss_class,     [PAIR] = pl_cl_source_rowloss_pair,
    [COSINE] = pl_cl_source_rowloss_cosine,   [SPARSE] = pl_cl_source_rowloss_sparse,
    [ELEMENT] = pl_cl_source_rowloss_element, [MAP] = pl_cl_source_rowloss_map,
    [ARGMAX] = pl_cl_source_rowloss_argmax};

/* An array of type `float` in ops.def: its rows, and its place. */
typedef struct {
    const pl_rows *rows;
    pl_cl_place place;
} floats;

/* An operation of any kind, with its arguments under common names. */
typedef struct {
    kind_of_loss kind;
    const char *macros;
    floats in[2], out[2];                /* absent where the kind has fewer */
    pl_cl_place integers;                /* labels, or the result of argmax */
    pl_cl_place dloss, loss;             /* of the computed type */
    pl_cl_place class_weight, dlse, lse; /* of a class loss */
    double scale[2], softcap[2];         /* of a pair loss's rows */
    pl_cl_place ids, logp, shares, left; /* of a sparse pair loss */
    int renormalize, cross, reverse;
    double option[PL_MAX_OPTIONS];
    int with_mean;      /* a class loss that needs the mean log-probability */
    int softcap_option; /* which option is the softcap; -1: none */
} row_loss;

static const char *const type_names[] = {
    [PL_F32] = "f32", [PL_F64] = "f64", [PL_F16] = "f16", [PL_BF16] = "bf16"};
static const size_t type_sizes[] = {[PL_F32] = 4, [PL_F64] = 8, [PL_F16] = 2, [PL_BF16] = 2};

/* One launch while it is built up. */
typedef struct {
    pl_cl_launch launch;
    const pl_call *call;
    pl_cl_shape shape;
    int aligned;   /* every row begins at a multiple of a vector */
    int exact_out; /* gradients are of the computed type */
} loss_launch;

static int present(floats array) { return array.place.buffer != NULL; }

/* Adds an array of `float`s and defines `macro` as its type. */
static void add_floats(loss_launch *l, floats array, const char *macro) {
    pl_float type = array.rows->type;
    size_t vector = type_sizes[type] * (size_t)l->shape.width;
    pl_cl_define(&l->launch, " -D%s=%s", macro, type_names[type]);
    if (macro[0] == 'O' && type != (l->call->wide ? PL_F64 : PL_F32)) l->exact_out = 0;
    if (array.place.offset % vector || (size_t)PL_DIM(l->call, 'V') * type_sizes[type] % vector)
        l->aligned = 0;
    pl_cl_add_place(&l->launch, array.place, type_sizes[type]);
}

/* Adds an array of the computed type, which may be absent. */
static void add_computed(loss_launch *l, pl_cl_place place) {
    size_t size = l->call->wide ? 8 : 4;
    if (place.offset % (size * (size_t)l->shape.width)) l->aligned = 0;
    pl_cl_add_place(&l->launch, place, size);
}

/* On a processor one work-item computes a row in whole vector registers. On a GPU a group shares a
 * row, in vectors of four elements. */
static pl_cl_shape shape_of(const pl_cl_operation *operation, kind_of_loss kind) {
    int64_t v = PL_DIM(operation->call, 'V');
    int cpu = pl_cl_is_cpu(operation->device);
    pl_cl_shape shape = {.width = cpu ? 16 : 4, .block = cpu ? 32 : 4};
    if (pl_cl_forced_shape.width) shape.width = pl_cl_forced_shape.width;
    if (pl_cl_forced_shape.block) shape.block = pl_cl_forced_shape.block;
    if (kind == ELEMENT) shape.group = cpu ? 64 : 256;
    else if (cpu) shape.group = 1;
    else
        for (shape.group = 32; shape.group < 1024 && shape.group * shape.width * shape.block < v;)
            shape.group *= 2;
    if (pl_cl_forced_shape.group) shape.group = pl_cl_forced_shape.group;
    while ((size_t)shape.group > operation->device->info->max_group && shape.group > 1)
        shape.group /= 2;
    return shape;
}

static void add_arrays(loss_launch *l, const row_loss *given) {
    add_floats(l, given->in[0], "IN0");
    switch (given->kind) {
    case CLASS:
        pl_cl_add_place(&l->launch, given->integers, 4);
        add_computed(l, given->class_weight);
        add_computed(l, given->dloss);
        add_computed(l, given->dlse);
        add_computed(l, given->loss);
        add_computed(l, given->lse);
        if (present(given->out[0])) add_floats(l, given->out[0], "OUT0");
        if (given->with_mean) pl_cl_define(&l->launch, " -DWITH_MEAN");
        if (given->class_weight.buffer) pl_cl_define(&l->launch, " -DWITH_CLASS_WEIGHT");
        if (given->softcap_option >= 0)
            pl_cl_define(&l->launch, " -DPREPARE -DSOFTCAP_OPTION=%d", given->softcap_option);
        break;
    case PAIR:
    case COSINE:
    case ELEMENT:
        add_floats(l, given->in[1], "IN1");
        if (given->kind != ELEMENT) {
            pl_cl_add_place(&l->launch, given->integers, 4);
            if (given->softcap[0] > 0 || given->softcap[1] > 0 ||
                given->scale[0] != given->scale[1])
                pl_cl_define(&l->launch, " -DPREPARE");
        }
        add_computed(l, given->dloss);
        add_computed(l, given->loss);
        if (present(given->out[0])) add_floats(l, given->out[0], "OUT0");
        if (present(given->out[1])) add_floats(l, given->out[1], "OUT1");
        break;
    case SPARSE:
        pl_cl_add_place(&l->launch, given->ids, 4);
        add_computed(l, given->logp);
        add_computed(l, given->shares);
        add_computed(l, given->left);
        pl_cl_add_place(&l->launch, given->integers, 4);
        add_computed(l, given->dloss);
        add_computed(l, given->loss);
        if (present(given->out[0])) add_floats(l, given->out[0], "OUT0");
        pl_cl_define(&l->launch, " -DRENORMALIZE=%d -DCROSS=%d -DREVERSE=%d", given->renormalize,
                     given->cross, given->reverse);
        if (given->softcap[0] > 0) pl_cl_define(&l->launch, " -DPREPARE");
        break;
    case MAP:
        if (present(given->in[1])) add_floats(l, given->in[1], "IN1");
        if (present(given->out[0])) add_floats(l, given->out[0], "OUT0");
        if (present(given->out[1])) add_floats(l, given->out[1], "OUT1");
        break;
    case ARGMAX: pl_cl_add_place(&l->launch, given->integers, 4); break;
    }
}

static void add_scalars(loss_launch *l, const row_loss *given) {
    const pl_call *c = l->call;
    pl_cl_add_i64(&l->launch,
                  given->kind == ELEMENT ? PL_DIM(c, 'N') * PL_DIM(c, 'V') : PL_DIM(c, 'V'));
    for (int side = 0; (given->kind == PAIR || given->kind == COSINE) && side < 2; side++) {
        pl_cl_add_scalar(&l->launch, given->scale[side]);
        pl_cl_add_scalar(&l->launch, given->softcap[side]);
    }
    if (given->kind == SPARSE) {
        pl_cl_add_i64(&l->launch, PL_DIM(c, 'K'));
        pl_cl_add_scalar(&l->launch, given->scale[0]);
        pl_cl_add_scalar(&l->launch, given->softcap[0]);
        pl_cl_add_scalar(&l->launch, given->scale[1]);
    }
    if (given->kind == MAP || given->kind == ARGMAX || given->kind == COSINE) return;
    for (int i = 0; i < PL_MAX_OPTIONS; i++) pl_cl_add_scalar(&l->launch, given->option[i]);
}

static int run(const pl_cl_operation *operation, const row_loss *given) {
    const pl_call *call = operation->call;
    int64_t rows = PL_DIM(call, 'N'), v = PL_DIM(call, 'V');
    if (!rows || !v) return 0;
    loss_launch l = {.call = call, .shape = shape_of(operation, given->kind)};
    if (call->wide && l.shape.width > 8) l.shape.width = 8;
    for (;;) {
        l.aligned = l.exact_out = 1;
        l.launch = pl_cl_begin(operation, sources[given->kind], l.shape, call->wide);
        pl_cl_define(&l.launch, "%s%s", given->macros,
                     v > INT32_MAX / 2 || given->kind == ELEMENT ? " -DINDEX=long"
                                                                 : " -DINDEX=int");
        add_arrays(&l, given);
        add_scalars(&l, given);
        int cpu = pl_cl_is_cpu(operation->device), alone = cpu && l.shape.group == 1;
        if (alone && l.exact_out && given->kind == PAIR) pl_cl_define(&l.launch, " -DKEEP");
        if (!alone && l.aligned)
            pl_cl_define(&l.launch, " -DALIGNED"); /* processors load unaligned vectors as fast */
        if (!cpu)
            pl_cl_define(&l.launch, " -DUNROLLED"); /* processors keep a block in the L1 cache */
        size_t group = (size_t)l.shape.group, groups = (size_t)rows;
        if (given->kind == ELEMENT)
            groups = ((size_t)(rows * v) + (size_t)l.shape.width * group - 1) /
                     ((size_t)l.shape.width * group);
        int too_large = 0;
        if (!pl_cl_enqueue(&l.launch, "row_loss", groups, group, &too_large)) return 0;
        if (!too_large) return 1;
        l.shape.group /= 2; /* fewer work-items have more registers each */
    }
}

/* ---- a launcher for each line of losses.def */

#define PL_LOSS_TABLE
#define PL_CLASS_LOSS(name, family, options, mean_option, softcap_option_) \
    int pl_cl_launch_##name(const pl_cl_operation *o) { \
        const name##_args args = name##_args_of(o->call); \
        const name##_places at = name##_places_of(o); \
        const int mean = name##_##mean_option, softcap = name##_##softcap_option_; \
        row_loss given = {.kind = CLASS, \
                          .macros = "-DLOSS=" #name " -DFAMILY=" #family, \
                          .in = {{args.logits, at.logits}}, \
                          .integers = at.labels, \
                          .class_weight = at.class_weight, \
                          .dloss = at.dloss, \
                          .dlse = at.dlse, \
                          .loss = at.loss, \
                          .lse = at.lse, \
                          .out = {{args.dlogits, at.dlogits}}}; \
        name##_options_of(o->call, given.option); \
        given.with_mean = mean >= 0 && given.option[mean < 0 ? 0 : mean] > 0; \
        given.softcap_option = \
            softcap >= 0 && given.option[softcap < 0 ? 0 : softcap] > 0 ? softcap : -1; \
        return run(o, &given); \
    }
#define PL_PAIR_LOSS(name, options, q_sums_to_0) \
    int pl_cl_launch_##name(const pl_cl_operation *o) { \
        const name##_args args = name##_args_of(o->call); \
        const name##_places at = name##_places_of(o); \
        row_loss given = {.kind = PAIR, \
                          .macros = \
                              "-DLOSS=" #name " -DFAMILY=softmax -DQ_SUMS_TO_0=" #q_sums_to_0, \
                          .in = {{args.q, at.q}, {args.p, at.p}}, \
                          .integers = at.labels, \
                          .scale = {args.scale_q, args.scale_p}, \
                          .softcap = {args.softcap_q, args.softcap_p}, \
                          .dloss = at.dloss, \
                          .loss = at.loss, \
                          .out = {{args.dq, at.dq}, {args.dp, at.dp}}}; \
        name##_options_of(o->call, given.option); \
        return run(o, &given); \
    } \
    int pl_cl_launch_sparse_##name(const pl_cl_operation *o) { \
        const sparse_##name##_args args = sparse_##name##_args_of(o->call); \
        const sparse_##name##_places at = sparse_##name##_places_of(o); \
        row_loss given = {.kind = SPARSE, \
                          .macros = "-DLOSS=" #name " -DFAMILY=softmax", \
                          .in = {{args.q, at.q}}, \
                          .ids = at.ids, \
                          .logp = at.logp, \
                          .shares = at.shares, \
                          .left = at.left, \
                          .integers = at.labels, \
                          .scale = {args.scale_q, args.scale_p}, \
                          .softcap = {args.softcap_q, 0}, \
                          .renormalize = args.renormalize != 0, \
                          .cross = args.cross != 0, \
                          .reverse = args.reverse != 0, \
                          .dloss = at.dloss, \
                          .loss = at.loss, \
                          .out = {{args.dq, at.dq}}}; \
        sparse_##name##_options_of(o->call, given.option); \
        return run(o, &given); \
    }
#define PL_ELEMENT_LOSS(name, options) \
    int pl_cl_launch_##name(const pl_cl_operation *o) { \
        const name##_args args = name##_args_of(o->call); \
        const name##_places at = name##_places_of(o); \
        row_loss given = {.kind = ELEMENT, \
                          .macros = "-DLOSS=" #name, \
                          .in = {{args.x, at.x}, {args.t, at.t}}, \
                          .dloss = at.dloss, \
                          .loss = at.loss, \
                          .out = {{args.dx, at.dx}, {args.dt, at.dt}}}; \
        name##_options_of(o->call, given.option); \
        return run(o, &given); \
    }
#define PL_ROW_MAP(name, family, logarithm) \
    int pl_cl_launch_##name(const pl_cl_operation *o) { \
        const name##_args args = name##_args_of(o->call); \
        const name##_places at = name##_places_of(o); \
        return run(o, &(row_loss){.kind = MAP, \
                                  .macros = "-DFAMILY=" #family " -DLOGARITHM=" #logarithm, \
                                  .in = {{args.x, at.x}, {args.dy, at.dy}}, \
                                  .out = {{args.y, at.y}, {args.dx, at.dx}}}); \
    }
#include "../../losses.def"

int pl_cl_launch_cosine(const pl_cl_operation *o) {
    const cosine_args args = cosine_args_of(o->call);
    const cosine_places at = cosine_places_of(o);
    return run(o, &(row_loss){.kind = COSINE,
                              .macros = "-DFAMILY=softmax",
                              .in = {{args.q, at.q}, {args.p, at.p}},
                              .integers = at.labels,
                              .scale = {args.scale_q, args.scale_p},
                              .softcap = {args.softcap_q, args.softcap_p},
                              .dloss = at.dloss,
                              .loss = at.loss,
                              .out = {{args.dq, at.dq}, {args.dp, at.dp}}});
}

int pl_cl_launch_argmax(const pl_cl_operation *o) {
    const argmax_places at = argmax_places_of(o);
    return run(o, &(row_loss){.kind = ARGMAX,
                              .macros = "",
                              .in = {{argmax_args_of(o->call).x, at.x}},
                              .integers = at.index});
}
