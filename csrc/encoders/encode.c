/* Writes whole matrices in GGUF's formats whose scales are searched for. */
#include "encoder.h"

typedef struct {
    int format;
    const float *x, *importance;
    int64_t cols, count; /* of values */
    const uint8_t *like;
    uint8_t *out;
} job;

/* Values as groups, with the weights of their squared errors. Errors of large values disturb a
 * model's answers more: a weight is |x| and the root mean square of the block, times the column's
 * importance. */
static void load(const job *j, int64_t begin, int elements, groups *g) {
    for (int block = 0; block < VALUES; block += elements) {
        const int64_t left = j->count - begin - block;
        const int count = left <= 0 ? 0 : left < elements ? (int)left : elements;
        const float *x = j->x + begin + block;
        float squares = 0;
        for (int e = 0; e < count; e++) squares += x[e] * x[e];
        const float size = sqrtf(squares / (float)elements);
        for (int e = 0; e < elements; e++) {
            const int group = (block + e) / g->n, lane = group % LANES,
                      at = (block + e) % g->n * g->vectors + group / LANES;
            const float value = e < count ? x[e] : 0;
            float weight = size + fabsf(value);
            if (j->importance && e < count) weight *= j->importance[(begin + block + e) % j->cols];
            g->x[at][lane] = value;
            g->w[at][lane] = weight;
        }
    }
}

static void encode_range(const void *context, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const job *j = context;
    const int format = j->format;
    const int sixteen = format == PL_W_Q2_K || format == PL_W_Q3_K || format == PL_W_Q6_K;
    groups g = {.n = sixteen ? 16 : 32, .vectors = sixteen ? 4 : 2};
    const int64_t elements = pl_block_elements(format), bytes = pl_block_bytes(format);
    for (int64_t i = begin; i < end; i++) {
        load(j, i * VALUES, (int)elements, &g);
        const int64_t at = i * VALUES / elements * bytes, left = j->count - i * VALUES;
        const int blocks = (int)((left < VALUES ? left : VALUES) / elements);
        const uint8_t *like = j->like ? j->like + at : NULL;
        if (format == PL_W_Q2_K || format == PL_W_Q4_K || format == PL_W_Q5_K)
            pl_encode_offset(format, &g, like, j->out + at);
        else pl_encode_signed(format, &g, blocks, like, j->out + at);
    }
}

int pl_encodes(int format) {
    return format == PL_W_Q2_K || format == PL_W_Q3_K || format == PL_W_Q4_K ||
           format == PL_W_Q5_K || format == PL_W_Q6_K || format == PL_W_IQ4_NL ||
           format == PL_W_IQ4_XS;
}

void pl_encode(int format, const float *x, const float *importance, int64_t rows, int64_t cols,
               const uint8_t *like, uint8_t *out) {
    const job j = {format, x, importance, cols, rows * cols, like, out};
    pl_parallel((j.count + VALUES - 1) / VALUES, 64, encode_range, &j);
}
