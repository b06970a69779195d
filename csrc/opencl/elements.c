/* Launches elements.cl. */
#include "runtime.h"

#include <string.h>

static pl_cl_shape shape_of(const pl_cl_operation *o) {
    pl_cl_shape shape = pl_cl_is_cpu(o->device) ? (pl_cl_shape){64, 16, 1} : (pl_cl_shape){256, 4, 1};
    if (pl_cl_forced_shape.group) shape.group = pl_cl_forced_shape.group;
    if (pl_cl_forced_shape.width) shape.width = pl_cl_forced_shape.width;
    while ((size_t)shape.group > o->device->info->max_group && shape.group > 1) shape.group /= 2;
    return shape;
}

static pl_cl_launch begin(const pl_cl_operation *o) { return pl_cl_begin(o, pl_cl_source_elements, shape_of(o), 0); }

/* A kernel over n elements, the last argument. */
static int run(pl_cl_launch *l, const char *kernel, int64_t n) {
    pl_cl_shape shape = shape_of(l->operation);
    int64_t each = (int64_t)shape.group * shape.width;
    pl_cl_add_i64(l, n);
    return pl_cl_enqueue(l, kernel, (size_t)((n + each - 1) / each), (size_t)shape.group, NULL);
}

int pl_cl_zero(const pl_cl_operation *o, pl_cl_place to, int64_t n) {
    pl_cl_launch l = begin(o);
    pl_cl_add_place(&l, to, 4);
    return run(&l, "zero", n);
}

static uint64_t next_word(uint64_t *state) { /* splitmix64, as in layers.tpl.h */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int dropout(const pl_cl_operation *o, int64_t n) {
    double p = o->call->arg[2].f;
    if (p >= 1) return pl_cl_zero(o, o->place[3], n);
    uint64_t state = (uint64_t)o->call->arg[1].i, a = next_word(&state), b = next_word(&state);
    pl_cl_launch l = begin(o);
    pl_cl_add_arrays(&l, "03", 4);
    pl_cl_add_i64(&l, (int64_t)(a & 0xffffffff));
    pl_cl_add_i64(&l, (int64_t)(a >> 32));
    pl_cl_add_i64(&l, (int64_t)(b & 0xffffffff));
    pl_cl_add_i64(&l, p > 0 ? (int64_t)(uint32_t)(p * 0x1p32) : 0);
    pl_cl_add_f32(&l, 1 / (1 - p));
    return run(&l, "dropout", n);
}

static int sum_squares(const pl_cl_operation *o, int64_t n) {
    enum { PARTS = 128 };
    pl_cl_place parts = pl_cl_scratch(o, PARTS * sizeof(double));
    if (!parts.buffer) return 1;
    pl_cl_shape shape = shape_of(o);
    pl_cl_launch l = begin(o), join = begin(o);
    pl_cl_add_array(&l, 0, 4);
    pl_cl_add_place(&l, parts, 8);
    pl_cl_add_i64(&l, n);
    pl_cl_add_i64(&l, (n + PARTS - 1) / PARTS);
    pl_cl_add_place(&join, parts, 8);
    pl_cl_add_array(&join, 1, 8);
    pl_cl_add_i64(&join, PARTS);
    int failed = pl_cl_enqueue(&l, "squares_of_parts", PARTS, (size_t)shape.group, NULL) ||
                 pl_cl_enqueue(&join, "sum_of_parts", 1, (size_t)shape.group, NULL);
    pl_cl_buffer_release(parts.buffer);
    return failed;
}

static int any_below(const pl_cl_operation *o, int64_t n) {
    pl_cl_launch l = begin(o);
    pl_cl_add_array(&l, 0, 4);
    pl_cl_add_array(&l, 2, 1);
    pl_cl_add_f32(&l, o->call->arg[1].f);
    pl_cl_add_i64(&l, n);
    return pl_cl_enqueue(&l, "any_below", 1, (size_t)shape_of(o).group, NULL);
}

static int same_bits(const pl_cl_operation *o, int64_t n) {
    pl_cl_launch l = begin(o);
    pl_cl_add_arrays(&l, "01", 4);
    pl_cl_add_array(&l, 2, 1);
    pl_cl_add_i64(&l, n);
    return pl_cl_enqueue(&l, "same_bits", 1, (size_t)shape_of(o).group, NULL);
}

static int adamw(const pl_cl_operation *o, int64_t n) {
    const pl_value *v = o->call->arg;
    double lr = v[1].f, beta1 = v[2].f, beta2 = v[3].f;
    pl_cl_launch l = begin(o);
    pl_cl_add_arrays(&l, "09ab", 4);
    const double given[] = {lr, lr * v[5].f, v[8].f, beta1, 1 - beta1, beta2, 1 - beta2, v[4].f, 1 / v[6].f, 1 / v[7].f};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++) pl_cl_add_f32(&l, given[i]);
    return run(&l, "adamw", n);
}

static int sgd(const pl_cl_operation *o, int64_t n) {
    const pl_value *v = o->call->arg;
    pl_cl_launch l = begin(o);
    pl_cl_add_arrays(&l, "078", 4);
    const double given[] = {v[1].f, v[2].f, 1 - v[3].f, v[4].f};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++) pl_cl_add_f32(&l, given[i]);
    pl_cl_add_i64(&l, v[5].i != 0);
    pl_cl_add_f32(&l, v[6].f);
    return run(&l, "sgd", n);
}

static int lion(const pl_cl_operation *o, int64_t n) {
    const pl_value *v = o->call->arg;
    double lr = v[1].f, beta1 = v[2].f, beta2 = v[3].f;
    pl_cl_launch l = begin(o);
    pl_cl_add_arrays(&l, "067", 4);
    const double given[] = {lr, lr * v[4].f, beta1, 1 - beta1, beta2, 1 - beta2, v[5].f};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++) pl_cl_add_f32(&l, given[i]);
    return run(&l, "lion", n);
}

int pl_cl_element(const char *name, const pl_cl_operation *o) {
    /* Kernels that take the arguments as they come: arrays, or a factor and arrays. */
    static const struct {
        const char *name;
        int factor, arrays;
    } plain[] = {{"swiglu_forward", 0, 3}, {"swiglu_grad", 0, 5}, {"geglu_forward", 0, 3}, {"geglu_grad", 0, 5}, {"add", 0, 3},
                 {"ratio", 0, 3},          {"axpy", 1, 2},        {"scale", 1, 2}};
    static const struct {
        const char *name;
        int (*run)(const pl_cl_operation *, int64_t);
    } special[] = {{"dropout", dropout},
                   {"sum_squares", sum_squares},
                   {"same_bits", same_bits},
                   {"any_below", any_below},
                   {"adamw", adamw},
                   {"sgd", sgd},
                   {"lion", lion}};
    int64_t n = PL_DIM(o->call, 'N');
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        if (strcmp(plain[i].name, name)) continue;
        pl_cl_launch l = begin(o);
        if (plain[i].factor) pl_cl_add_f32(&l, o->call->arg[0].f);
        for (int j = 0; j < plain[i].arrays; j++) pl_cl_add_array(&l, plain[i].factor + j, 4);
        return run(&l, name, n);
    }
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        if (!strcmp(special[i].name, name)) return special[i].run(o, n);
    return -1;
}
