/* Runs kernels on float32 copies of their `half` arguments that are bfloat16. Results are rounded
 * once, so the bits are those of a kernel that reads and writes bfloat16 itself. */
#include "widened.h"

#include "calls.h"

static int64_t elements_of(const pl_param *p, const pl_call *call) {
    int64_t n = 1;
    for (int i = 0; i < p->ndim; i++) n *= pl_dim_size(&p->dim[i], call);
    return n;
}

/* to = from, in the type of each. */
static pl_status convert(int64_t n, pl_act from, pl_act to) {
    pl_call call = {.count = 2};
    PL_DIM(&call, 'N') = n;
    call.arg[0].act = from;
    call.arg[1].act = to;
    return pl_kernels->kernel[PL_OP_convert](&call);
}

pl_status pl_run_widened(int op, const pl_spec *spec, pl_call *call) {
    const pl_kernel kernel = pl_kernels->kernel[op];
    void *narrow[PL_MAX_ARGS], *copy[PL_MAX_ARGS];
    int which[PL_MAX_ARGS], count = 0;
    pl_status status = PL_OK;
    for (int i = 0; i < spec->count && call->narrow >> i; i++) {
        const pl_param *p = &spec->param[i];
        if (p->type != PL_T_HALF || !(call->narrow >> i & 1)) continue;
        const int64_t n = elements_of(p, call);
        narrow[count] = call->arg[i].out;
        copy[count] = pl_acquire((size_t)n * sizeof(float));
        if (!copy[count]) {
            status = PL_NO_MEMORY;
            break;
        }
        if (!p->output || p->updated || (i == spec->count - 1 && pl_accumulates(spec, call)))
            status = convert(n, (pl_act){narrow[count], 1}, (pl_act){copy[count], 0});
        call->arg[i].out = copy[count];
        which[count++] = i;
    }
    if (status == PL_OK) status = kernel(call);
    for (int j = 0; j < count; j++) {
        const pl_param *p = &spec->param[which[j]];
        if (p->output && status == PL_OK)
            status = convert(elements_of(p, call), (pl_act){copy[j], 0}, (pl_act){narrow[j], 1});
        pl_release(copy[j]);
    }
    return status;
}
