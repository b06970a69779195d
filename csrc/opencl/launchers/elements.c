/* Launches elements.cl. */
#include "../launch.h"
#include "args.h"
#include "places.h"
#include "../../random.h"

static pl_cl_shape shape_of(const pl_cl_operation *o) {
    pl_cl_shape shape =
        pl_cl_is_cpu(o->device) ? (pl_cl_shape){64, 16, 1} : (pl_cl_shape){256, 4, 1};
    if (pl_cl_forced_shape.group) shape.group = pl_cl_forced_shape.group;
    if (pl_cl_forced_shape.width) shape.width = pl_cl_forced_shape.width;
    while ((size_t)shape.group > o->device->info->max_group && shape.group > 1) shape.group /= 2;
    return shape;
}

static pl_cl_launch begin(const pl_cl_operation *o) {
    return pl_cl_begin(o, pl_cl_source_elements, shape_of(o), 0);
}

/* Enqueues a kernel over n elements; n is its last argument. */
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

static int64_t elements(const pl_cl_operation *o) { return PL_DIM(o->call, 'N'); }

/* A kernel whose arguments are all arrays. */
static int map(const pl_cl_operation *o, const char *kernel, size_t count,
               const pl_cl_place *places) {
    pl_cl_launch l = begin(o);
    pl_cl_add_each(&l, 4, count, places);
    return run(&l, kernel, elements(o));
}
int pl_cl_launch_swiglu_forward(const pl_cl_operation *o) {
    const swiglu_forward_places at = swiglu_forward_places_of(o);
    return map(o, "swiglu_forward", 3, (pl_cl_place[]){at.gate, at.up, at.y});
}
int pl_cl_launch_swiglu_grad(const pl_cl_operation *o) {
    const swiglu_grad_places at = swiglu_grad_places_of(o);
    return map(o, "swiglu_grad", 5, (pl_cl_place[]){at.dy, at.gate, at.up, at.dgate, at.dup});
}
int pl_cl_launch_geglu_forward(const pl_cl_operation *o) {
    const geglu_forward_places at = geglu_forward_places_of(o);
    return map(o, "geglu_forward", 3, (pl_cl_place[]){at.gate, at.up, at.y});
}
int pl_cl_launch_geglu_grad(const pl_cl_operation *o) {
    const geglu_grad_places at = geglu_grad_places_of(o);
    return map(o, "geglu_grad", 5, (pl_cl_place[]){at.dy, at.gate, at.up, at.dgate, at.dup});
}
int pl_cl_launch_glu_forward(const pl_cl_operation *o) {
    const glu_forward_places at = glu_forward_places_of(o);
    return map(o, "glu_forward", 3, (pl_cl_place[]){at.gate, at.up, at.y});
}
int pl_cl_launch_glu_grad(const pl_cl_operation *o) {
    const glu_grad_places at = glu_grad_places_of(o);
    return map(o, "glu_grad", 5, (pl_cl_place[]){at.dy, at.gate, at.up, at.dgate, at.dup});
}
int pl_cl_launch_add(const pl_cl_operation *o) {
    const add_places at = add_places_of(o);
    return map(o, "add", 3, (pl_cl_place[]){at.a, at.b, at.y});
}
int pl_cl_launch_ratio(const pl_cl_operation *o) {
    const ratio_places at = ratio_places_of(o);
    return map(o, "ratio", 3, (pl_cl_place[]){at.a, at.b, at.y});
}

static int scaled_map(const pl_cl_operation *o, const char *kernel, double alpha, pl_cl_place x,
                      pl_cl_place y) {
    pl_cl_launch l = begin(o);
    pl_cl_add_f32(&l, alpha);
    pl_cl_add_places(&l, 4, x, y);
    return run(&l, kernel, elements(o));
}
int pl_cl_launch_axpy(const pl_cl_operation *o) {
    const axpy_places at = axpy_places_of(o);
    return scaled_map(o, "axpy", axpy_args_of(o->call).alpha, at.x, at.y);
}
/* Arrays in device memory are float32. */
int pl_cl_launch_convert(const pl_cl_operation *o) {
    const convert_places at = convert_places_of(o);
    return scaled_map(o, "scale", 1, at.x, at.y);
}
int pl_cl_launch_scale(const pl_cl_operation *o) {
    const scale_places at = scale_places_of(o);
    return scaled_map(o, "scale", scale_args_of(o->call).alpha, at.x, at.y);
}

int pl_cl_launch_dropout(const pl_cl_operation *o) {
    const dropout_args args = dropout_args_of(o->call);
    const dropout_places at = dropout_places_of(o);
    if (args.p >= 1) return pl_cl_zero(o, at.y, elements(o));
    uint64_t state = (uint64_t)args.seed, a = pl_next_word(&state), b = pl_next_word(&state);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.y);
    pl_cl_add_i64(&l, (int64_t)(a & 0xffffffff));
    pl_cl_add_i64(&l, (int64_t)(a >> 32));
    pl_cl_add_i64(&l, (int64_t)(b & 0xffffffff));
    pl_cl_add_i64(&l, args.p > 0 ? (int64_t)(uint32_t)(args.p * 0x1p32) : 0);
    pl_cl_add_f32(&l, 1 / (1 - args.p));
    return run(&l, "dropout", elements(o));
}

/* ---- maps.cl */

static pl_cl_launch begin_map(const pl_cl_operation *o, const char *function, int of_one,
                              size_t count, const pl_cl_place *places) {
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_maps, shape_of(o), 0);
    pl_cl_define(&l, "-DMAP=%s_at %s", function, of_one ? "-DOF_ONE " : "");
    pl_cl_add_each(&l, 4, count, places);
    return l;
}

/* An axis whose size is not that of y broadcasts. */
static void add_steps(pl_cl_launch *l, const int64_t size[3], const int64_t whole[3]) {
    pl_cl_add_i64(l, size[0] == whole[0] ? size[1] * size[2] : 0);
    pl_cl_add_i64(l, size[1] == whole[1] ? size[2] : 0);
    pl_cl_add_i64(l, size[2] == whole[2] ? 1 : 0);
}
static int pair_map(const pl_cl_operation *o, const char *function, pl_cl_place a, pl_cl_place b,
                    pl_cl_place y) {
    const pl_call *c = o->call;
    const int64_t whole[] = {PL_DIM(c, 'O'), PL_DIM(c, 'N'), PL_DIM(c, 'D')},
                  of_a[] = {PL_DIM(c, 'P'), PL_DIM(c, 'Q'), PL_DIM(c, 'R')},
                  of_b[] = {PL_DIM(c, 'S'), PL_DIM(c, 'T'), PL_DIM(c, 'U')},
                  n = whole[0] * whole[1] * whole[2], n_a = of_a[0] * of_a[1] * of_a[2],
                  n_b = of_b[0] * of_b[1] * of_b[2];
    if (!n || !n_a || !n_b) return 0;
    pl_cl_launch l = begin_map(o, function, 0, 3, (pl_cl_place[]){a, b, y});
    pl_cl_add_i64(&l, whole[1]);
    pl_cl_add_i64(&l, whole[2]);
    add_steps(&l, of_a, whole);
    add_steps(&l, of_b, whole);
    return run(&l, "map_pair", n);
}
#define PL_MAP(name, of) \
    int pl_cl_launch_map_##name(const pl_cl_operation *o) { \
        const map_##name##_places at = map_##name##_places_of(o); \
        pl_cl_launch l = begin_map(o, #name, 1, 2, (pl_cl_place[]){at.x, at.y}); \
        return run(&l, "map_one", elements(o)); \
    } \
    int pl_cl_launch_map_##name##_grad(const pl_cl_operation *o) { \
        const map_##name##_grad_places at = map_##name##_grad_places_of(o); \
        pl_cl_launch l = begin_map(o, #name "_grad", 0, 3, (pl_cl_place[]){at.dy, at.of, at.dx}); \
        return run(&l, "map_two", elements(o)); \
    }
#define PL_PAIR_MAP(name) \
    int pl_cl_launch_map_##name(const pl_cl_operation *o) { \
        const map_##name##_places at = map_##name##_places_of(o); \
        return pair_map(o, #name, at.a, at.b, at.y); \
    }
#include "../../maps.def"

/* ---- axes.cl */

static int reduce_axis(const pl_cl_operation *o, int kind, pl_cl_place x, double factor,
                       pl_cl_place y) {
    const int64_t outer = PL_DIM(o->call, 'O'), n = PL_DIM(o->call, 'N'), d = PL_DIM(o->call, 'D');
    const pl_cl_shape shape = shape_of(o);
    if (!outer || !d) return 0;
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_axes, shape, 0);
    pl_cl_add_places(&l, 4, x, y);
    pl_cl_add_i64(&l, kind);
    pl_cl_add_f32(&l, factor);
    pl_cl_add_i64(&l, n);
    if (d == 1) return pl_cl_enqueue(&l, "axis_rows", (size_t)outer, (size_t)shape.group, NULL);
    pl_cl_add_i64(&l, d);
    return run(&l, "axis_columns", outer * d);
}
int pl_cl_launch_axis_sum(const pl_cl_operation *o) {
    const axis_sum_places at = axis_sum_places_of(o);
    return reduce_axis(o, 0, at.x, axis_sum_args_of(o->call).scale, at.y);
}
int pl_cl_launch_axis_max(const pl_cl_operation *o) {
    const axis_max_places at = axis_max_places_of(o);
    return reduce_axis(o, 1, at.x, 1, at.y);
}
int pl_cl_launch_axis_min(const pl_cl_operation *o) {
    const axis_min_places at = axis_min_places_of(o);
    return reduce_axis(o, 2, at.x, 1, at.y);
}
int pl_cl_launch_axis_extreme_grad(const pl_cl_operation *o) {
    const axis_extreme_grad_places at = axis_extreme_grad_places_of(o);
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_axes, shape_of(o), 0);
    pl_cl_add_places(&l, 4, at.dy, at.x, at.y, at.dx);
    pl_cl_add_i64(&l, PL_DIM(o->call, 'N'));
    pl_cl_add_i64(&l, PL_DIM(o->call, 'D'));
    return run(&l, "axis_extreme_grad", PL_DIM(o->call, 'O') * PL_DIM(o->call, 'D'));
}
int pl_cl_launch_row_logsumexp(const pl_cl_operation *o) {
    const row_logsumexp_places at = row_logsumexp_places_of(o);
    const pl_cl_shape shape = shape_of(o);
    if (!elements(o)) return 0;
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_axes, shape, 0);
    pl_cl_add_places(&l, 4, at.x, at.y);
    pl_cl_add_i64(&l, PL_DIM(o->call, 'V'));
    return pl_cl_enqueue(&l, "row_logsumexp", (size_t)elements(o), (size_t)shape.group, NULL);
}
int pl_cl_launch_row_logsumexp_grad(const pl_cl_operation *o) {
    const row_logsumexp_grad_places at = row_logsumexp_grad_places_of(o);
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_axes, shape_of(o), 0);
    pl_cl_add_places(&l, 4, at.dy, at.x, at.y, at.dx);
    pl_cl_add_i64(&l, PL_DIM(o->call, 'V'));
    return run(&l, "row_logsumexp_grad", elements(o) * PL_DIM(o->call, 'V'));
}

int pl_cl_launch_row_cumsum(const pl_cl_operation *o) {
    const row_cumsum_places at = row_cumsum_places_of(o);
    const int64_t rows = elements(o);
    const pl_cl_shape shape = shape_of(o);
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_axes, shape, 0);
    pl_cl_add_places(&l, 4, at.x, at.y);
    pl_cl_add_i64(&l, row_cumsum_args_of(o->call).reverse != 0);
    pl_cl_add_i64(&l, PL_DIM(o->call, 'V'));
    pl_cl_add_i64(&l, rows);
    return pl_cl_enqueue(&l, "row_cumsum", (size_t)((rows + shape.group - 1) / shape.group),
                         (size_t)shape.group, NULL);
}
int pl_cl_launch_select(const pl_cl_operation *o) {
    const select_places at = select_places_of(o);
    const pl_call *c = o->call;
    const int64_t whole[] = {PL_DIM(c, 'O'), PL_DIM(c, 'N'), PL_DIM(c, 'D')},
                  of[][3] = {{PL_DIM(c, 'M'), PL_DIM(c, 'K'), PL_DIM(c, 'L')},
                             {PL_DIM(c, 'P'), PL_DIM(c, 'Q'), PL_DIM(c, 'R')},
                             {PL_DIM(c, 'S'), PL_DIM(c, 'T'), PL_DIM(c, 'U')}},
                  n = whole[0] * whole[1] * whole[2];
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_axes, shape_of(o), 0);
    pl_cl_add_place(&l, at.mask, 1);
    pl_cl_add_places(&l, 4, at.a, at.b, at.y);
    pl_cl_add_i64(&l, whole[1]);
    pl_cl_add_i64(&l, whole[2]);
    for (int i = 0; i < 3; i++) {
        const int64_t size = of[i][0] * of[i][1] * of[i][2];
        if (!size || !n) return 0;
        add_steps(&l, of[i], whole);
    }
    return run(&l, "select_pair", n);
}

static int softmax_grad(const pl_cl_operation *o, int logarithm, const pl_cl_place *places) {
    const int64_t rows = elements(o), v = PL_DIM(o->call, 'V');
    const pl_cl_shape shape = shape_of(o);
    if (!rows || !v) return 0;
    pl_cl_launch l = pl_cl_begin(o, pl_cl_source_axes, shape, 0);
    pl_cl_add_each(&l, 4, 3, places);
    pl_cl_add_i64(&l, logarithm);
    pl_cl_add_i64(&l, v);
    return pl_cl_enqueue(&l, "row_softmax_grad", (size_t)rows, (size_t)shape.group, NULL);
}
int pl_cl_launch_row_softmax_grad(const pl_cl_operation *o) {
    const row_softmax_grad_places at = row_softmax_grad_places_of(o);
    return softmax_grad(o, 0, (pl_cl_place[]){at.dy, at.y, at.dx});
}
int pl_cl_launch_row_log_softmax_grad(const pl_cl_operation *o) {
    const row_log_softmax_grad_places at = row_log_softmax_grad_places_of(o);
    return softmax_grad(o, 1, (pl_cl_place[]){at.dy, at.y, at.dx});
}

int pl_cl_launch_sum_squares(const pl_cl_operation *o) {
    enum { PARTS = 128 };
    const sum_squares_places at = sum_squares_places_of(o);
    int64_t n = elements(o);
    pl_cl_place parts = pl_cl_scratch(o, PARTS * sizeof(double));
    if (!parts.buffer) return 1;
    pl_cl_shape shape = shape_of(o);
    pl_cl_launch l = begin(o), join = begin(o);
    pl_cl_add_place(&l, at.x, 4);
    pl_cl_add_place(&l, parts, 8);
    pl_cl_add_i64(&l, n);
    pl_cl_add_i64(&l, (n + PARTS - 1) / PARTS);
    pl_cl_add_places(&join, 8, parts, at.out);
    pl_cl_add_i64(&join, PARTS);
    int failed = pl_cl_enqueue(&l, "squares_of_parts", PARTS, (size_t)shape.group, NULL) ||
                 pl_cl_enqueue(&join, "sum_of_parts", 1, (size_t)shape.group, NULL);
    pl_cl_buffer_release(parts.buffer);
    return failed;
}

int pl_cl_launch_same_bits(const pl_cl_operation *o) {
    const same_bits_places at = same_bits_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.y);
    pl_cl_add_place(&l, at.same, 1);
    pl_cl_add_i64(&l, elements(o));
    return pl_cl_enqueue(&l, "same_bits", 1, (size_t)shape_of(o).group, NULL);
}

static void add_numbers(pl_cl_launch *l, size_t count, const double *numbers) {
    for (size_t i = 0; i < count; i++) pl_cl_add_f32(l, numbers[i]);
}

int pl_cl_launch_adamw(const pl_cl_operation *o) {
    const adamw_args args = adamw_args_of(o->call);
    const adamw_places at = adamw_places_of(o);
    double lr = args.lr, beta1 = args.beta1, beta2 = args.beta2;
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.grad, at.param, at.m, at.v);
    const double decay = lr * args.weight_decay, inverse1 = 1 / args.correction1,
                 inverse2 = 1 / args.correction2;
    add_numbers(&l, 10,
                (double[]){lr, decay, args.grad_scale, beta1, 1 - beta1, beta2, 1 - beta2, args.eps,
                           inverse1, inverse2});
    return run(&l, "adamw", elements(o));
}
int pl_cl_launch_adam_atan2(const pl_cl_operation *o) {
    const adam_atan2_args args = adam_atan2_args_of(o->call);
    const adam_atan2_places at = adam_atan2_places_of(o);
    double beta1 = args.beta1, beta2 = args.beta2;
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.grad, at.param, at.m, at.v);
    add_numbers(&l, 8,
                (double[]){args.decay, args.step, args.grad_scale, beta1, 1 - beta1, beta2,
                           1 - beta2, args.scale_v});
    return run(&l, "adam_atan2", elements(o));
}
int pl_cl_launch_sgd(const pl_cl_operation *o) {
    const sgd_args args = sgd_args_of(o->call);
    const sgd_places at = sgd_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.grad, at.param, at.buf);
    add_numbers(&l, 4, (double[]){args.lr, args.momentum, 1 - args.dampening, args.weight_decay});
    pl_cl_add_i64(&l, args.nesterov != 0);
    pl_cl_add_f32(&l, args.grad_scale);
    return run(&l, "sgd", elements(o));
}
int pl_cl_launch_lion(const pl_cl_operation *o) {
    const lion_args args = lion_args_of(o->call);
    const lion_places at = lion_places_of(o);
    double lr = args.lr, beta1 = args.beta1, beta2 = args.beta2;
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.grad, at.param, at.m);
    const double decay = lr * args.weight_decay;
    add_numbers(&l, 7, (double[]){lr, decay, beta1, 1 - beta1, beta2, 1 - beta2, args.grad_scale});
    return run(&l, "lion", elements(o));
}
