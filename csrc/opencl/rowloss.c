/* Launches rowloss.cl: which program a call needs, from the loss's line in losses.def and the types of its arrays. */
#include "runtime.h"

#include <string.h>

typedef enum { CLASS, PAIR, ELEMENT, MAP, ARGMAX } kind_of_loss;

typedef struct {
    const char *name;
    kind_of_loss kind;
    const char *macros;
    int mean_option, softcap_option;
} loss_line;

static const loss_line lines[] = {
#define PL_LOSS_TABLE
#define PL_CLASS_LOSS(name, family, options, mean_option, softcap_option) \
    {#name, CLASS, "-DCLASS -DLOSS=" #name " -DFAMILY=" #family, mean_option, softcap_option},
#define PL_PAIR_LOSS(name, options, q_sums_to_0) \
    {#name, PAIR, "-DPAIR -DLOSS=" #name " -DFAMILY=softmax -DQ_SUMS_TO_0=" #q_sums_to_0, -1, -1},
#define PL_ELEMENT_LOSS(name, options) {#name, ELEMENT, "-DELEMENT -DLOSS=" #name, -1, -1},
#define PL_ROW_MAP(name, family, logarithm) {#name, MAP, "-DMAP -DFAMILY=" #family " -DLOGARITHM=" #logarithm, -1, -1},
#include "../losses.def"
#undef PL_CLASS_LOSS
#undef PL_PAIR_LOSS
#undef PL_ELEMENT_LOSS
#undef PL_ROW_MAP
#undef PL_LOSS_TABLE
    {"argmax", ARGMAX, "-DARGMAX", -1, -1},
};

enum { MAX_OPTIONS = 4 };

static const char *const type_names[] = {[PL_F32] = "f32", [PL_F64] = "f64", [PL_F16] = "f16", [PL_BF16] = "bf16"};
static const size_t type_sizes[] = {[PL_F32] = 4, [PL_F64] = 8, [PL_F16] = 2, [PL_BF16] = 2};

/* One launch as it is put together. */
typedef struct {
    pl_cl_launch launch;
    const pl_call *call;
    const pl_cl_place *place;
    pl_cl_shape shape;
    int aligned, exact_out; /* exact_out: gradients are of the computed type */
} loss_launch;

static int present(const loss_launch *l, int index) { return l->place[index].buffer != NULL; }

/* An array of `float`s: its type under the name `macro`, and whether vectors may be loaded as they are. */
static void add_floats(loss_launch *l, int index, const char *macro) {
    pl_float type = l->call->arg[index].rows.type;
    size_t vector = type_sizes[type] * (size_t)l->shape.width;
    pl_cl_define(&l->launch, " -D%s=%s", macro, type_names[type]);
    if (macro[0] == 'O' && type != (l->call->wide ? PL_F64 : PL_F32)) l->exact_out = 0;
    if (l->place[index].offset % vector || (size_t)PL_DIM(l->call, 'V') * type_sizes[type] % vector) l->aligned = 0;
    pl_cl_add_array(&l->launch, index, type_sizes[type]);
}

/* An array of the computed type, or none. */
static void add_computed(loss_launch *l, int index) {
    size_t size = l->call->wide ? 8 : 4;
    if (l->place[index].offset % (size * (size_t)l->shape.width)) l->aligned = 0;
    pl_cl_add_array(&l->launch, index, size);
}

static void add_options(loss_launch *l, int first, int end) {
    for (int i = 0; i < MAX_OPTIONS; i++) pl_cl_add_scalar(&l->launch, first + i < end ? l->call->arg[first + i].f : 0);
}

/* A processor's core is one work-item that takes whole vector registers; a GPU's group shares a row, four elements each. */
static pl_cl_shape shape_of(const pl_cl_operation *operation, const loss_line *line) {
    int64_t v = PL_DIM(operation->call, 'V');
    int cpu = pl_cl_is_cpu(operation->device);
    pl_cl_shape shape = {.width = cpu ? 16 : 4, .block = cpu ? 32 : 4};
    if (pl_cl_forced_shape.width) shape.width = pl_cl_forced_shape.width;
    if (pl_cl_forced_shape.block) shape.block = pl_cl_forced_shape.block;
    if (line->kind == ELEMENT) shape.group = cpu ? 64 : 256;
    else if (cpu) shape.group = 1;
    else
        for (shape.group = 32; shape.group < 1024 && shape.group * shape.width * shape.block < v;) shape.group *= 2;
    if (pl_cl_forced_shape.group) shape.group = pl_cl_forced_shape.group;
    while ((size_t)shape.group > operation->device->info->max_group && shape.group > 1) shape.group /= 2;
    return shape;
}

static void add_arrays(loss_launch *l, const loss_line *line) {
    const pl_call *c = l->call;
    int n = c->count;
    add_floats(l, 0, "IN0");
    switch (line->kind) {
    case CLASS:
        pl_cl_add_array(&l->launch, 1, 4);
        add_computed(l, n - 3);
        add_computed(l, n - 2);
        if (present(l, n - 1)) add_floats(l, n - 1, "OUT0");
        if (line->mean_option >= 0 && c->arg[2 + line->mean_option].f > 0) pl_cl_define(&l->launch, " -DWITH_MEAN");
        if (line->softcap_option >= 0 && c->arg[2 + line->softcap_option].f > 0)
            pl_cl_define(&l->launch, " -DWITH_CAP -DSOFTCAP_OPTION=%d", line->softcap_option);
        break;
    case PAIR:
    case ELEMENT:
        add_floats(l, 1, "IN1");
        add_computed(l, n - 4);
        add_computed(l, n - 3);
        if (present(l, n - 2)) add_floats(l, n - 2, "OUT0");
        if (present(l, n - 1)) add_floats(l, n - 1, "OUT1");
        break;
    case MAP:
        if (present(l, 1)) add_floats(l, 1, "IN1");
        if (present(l, 2)) add_floats(l, 2, "OUT0");
        if (present(l, 3)) add_floats(l, 3, "OUT1");
        break;
    case ARGMAX: pl_cl_add_array(&l->launch, 1, 4); break;
    }
}

static void add_scalars(loss_launch *l, const loss_line *line) {
    const pl_call *c = l->call;
    pl_cl_add_i64(&l->launch, line->kind == ELEMENT ? PL_DIM(c, 'N') * PL_DIM(c, 'V') : PL_DIM(c, 'V'));
    if (line->kind == PAIR) pl_cl_add_scalar(&l->launch, 1 / c->arg[2].f);
    if (line->kind == CLASS) add_options(l, 2, c->count - 3);
    if (line->kind == PAIR) add_options(l, 3, c->count - 4);
    if (line->kind == ELEMENT) add_options(l, 2, c->count - 4);
}

int pl_cl_row_loss(const char *name, const pl_cl_operation *operation) {
    const pl_call *call = operation->call;
    const loss_line *line = lines, *end = lines + sizeof lines / sizeof *lines;
    while (line < end && strcmp(line->name, name)) line++;
    if (line == end) return -1;
    int64_t rows = PL_DIM(call, 'N'), v = PL_DIM(call, 'V');
    if (!rows || !v) return 0;
    loss_launch l = {.call = call, .place = operation->place, .shape = shape_of(operation, line)};
    if (call->wide && l.shape.width > 8) l.shape.width = 8;
    for (;;) {
        l.aligned = l.exact_out = 1;
        l.launch = pl_cl_begin(operation, pl_cl_source_rowloss, l.shape, call->wide);
        pl_cl_define(&l.launch, "%s%s", line->macros,
                     v > INT32_MAX / 2 || line->kind == ELEMENT ? " -DINDEX=long" : " -DINDEX=int");
        add_arrays(&l, line);
        add_scalars(&l, line);
        int cpu = pl_cl_is_cpu(operation->device), alone = cpu && l.shape.group == 1;
        if (alone && l.exact_out && line->kind == PAIR) pl_cl_define(&l.launch, " -DKEEP");
        if (!alone && l.aligned) pl_cl_define(&l.launch, " -DALIGNED"); /* a processor loads unaligned vectors as fast, */
        if (!cpu) pl_cl_define(&l.launch, " -DUNROLLED");               /* and keeps a block in its nearest cache */
        size_t group = (size_t)l.shape.group, groups = (size_t)rows;
        if (line->kind == ELEMENT)
            groups = ((size_t)(rows * v) + (size_t)l.shape.width * group - 1) / ((size_t)l.shape.width * group);
        int too_large = 0;
        if (!pl_cl_enqueue(&l.launch, "row_loss", groups, group, &too_large)) return 0;
        if (!too_large) return 1;
        l.shape.group /= 2; /* the kernel needs more registers than so many work-items have */
    }
}
