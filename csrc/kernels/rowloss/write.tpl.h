/* Gradients of a row on their way from scratch to memory; included by rowloss_real.tpl.h.
 *
 * Large gradients are streamed past the caches. That is bound by memory and taking statistics by arithmetic, so that the gradient
 * of one row is written piece by piece between the exponentials of the next.
 */

/* A row's gradient: values * by_values + probabilities * by_weights, but `special` at one place. */
typedef struct {
    const pl_rows *out; /* NULL where nothing is to be written */
    int64_t i, n;
    const REAL *values;                   /* [n], or NULL */
    const TYPED(row_statistics) *weights; /* or NULL */
    REAL scale, special;
    double by_values, by_weights;
    int64_t special_at; /* -1: nowhere */
    int stream;
} TYPED(unwritten);

/* A part of it. The first `whole` elements after `head` are written in steps of 2 WIDTH, of which a walk takes `count` elements
 * from `first` on, round about, a step in each 1 << pace of its own. */
typedef struct {
    REAL *to;
    uint16_t *to_bf16;
    const REAL *values, *kept;
    V by_values, prob;
    int64_t whole, head, first, count;
    int stream, pace;
} TYPED(unwritten_part);

/* The gradient at j of the part, of which n elements are to be used. */
INLINE V TYPED(gradient_at)(const TYPED(unwritten_part) *part, int64_t j, int64_t n) {
    V values = part->values ? TYPED(load)(part->values + j, n, 0) * part->by_values : VEC(set1)(0);
    if (!part->kept) return values;
    V kept = TYPED(load)(part->kept + j, n, 0);
    return part->values ? VEC(fma)(kept, part->prob, values) : kept * part->prob;
}

INLINE TYPED(unwritten_part)
    TYPED(begin_writing)(const TYPED(unwritten) *u, int64_t begin, int64_t n) {
    TYPED(unwritten_part) part = {.stream = u->stream};
    if (u->values) {
        part.values = u->values + begin;
        part.by_values = VEC(set1)((REAL)u->by_values);
    }
    if (u->weights) {
        part.kept = u->weights->kept + begin;
        part.prob = TYPED(block_factor)(u->weights, begin, u->scale, u->by_weights);
    }
    uintptr_t to = 0, size = 0;
    if ((int)u->out->type == TYPED(native)) {
        part.to = (REAL *)pl_row(u->out, u->i) + begin;
        to = (uintptr_t)part.to, size = sizeof(REAL);
    } else if (sizeof(REAL) == 4 && u->out->type == PL_BF16) {
        part.to_bf16 = (uint16_t *)pl_row(u->out, u->i) + begin;
        to = (uintptr_t)part.to_bf16, size = 2;
    }
    if (!to) return part; /* other types are converted in end_writing */
    if (u->stream) part.head = (int64_t)(-to % sizeof(V) / size);
    if (part.head > n) part.head = n;
    part.whole = (n - part.head) / (2 * WIDTH) * (2 * WIDTH);
    part.count = part.whole;
    return part;
}

/* Leaves to a walk over a block of another row what it is to write: all, or half in each of two walks. All is written half a page
 * off, as stores hold up loads from the same place of another page. */
INLINE void TYPED(share_writing)(TYPED(unwritten_part) *part, int walk, int walks) {
    const int64_t half_page = 2048 / sizeof(REAL), half = part->whole / (4 * WIDTH) * (2 * WIDTH);
    part->pace = walks - 1;
    if (walks == 1) part->first = part->whole > half_page ? half_page : 0;
    else part->first = walk ? half : 0, part->count = walk ? part->whole - half : half;
}

/* What a walk that is at its element i is to write. */
INLINE void TYPED(write_two)(const TYPED(unwritten_part) *part, int64_t i) {
    int64_t j = i >> part->pace;
    if (j >= part->count || (i & ((2 * WIDTH << part->pace) - 1))) return;
    j += part->first;
    j += part->head - (j >= part->whole ? part->whole : 0);
    V a = TYPED(gradient_at)(part, j, WIDTH), b = TYPED(gradient_at)(part, j + WIDTH, WIDTH);
    if (part->to_bf16) {
        vf low, high;
        memcpy(&low, &a, sizeof low), memcpy(&high, &b, sizeof high);
        if (part->stream) vf_stream_bf16_twice(part->to_bf16 + j, low, high);
        else vf_to_bf16_twice(part->to_bf16 + j, low, high);
    } else if (part->stream) {
        VEC(stream)(part->to + j, a);
        VEC(stream)(part->to + j + WIDTH, b);
    } else {
        VEC(store)(part->to + j, a);
        VEC(store)(part->to + j + WIDTH, b);
    }
}

/* What the steps leave: the head, what is behind them, and the special element. */
static void TYPED(end_writing)(const TYPED(unwritten) *u, const TYPED(unwritten_part) *part,
                               int64_t begin, int64_t n) {
    REAL buffer[ROW_BLOCK];
    for (int side = 0; side < 2; side++) {
        int64_t from = side ? part->head + part->whole : 0, to = side ? n : part->head;
        if (from >= to) continue;
        REAL *at = part->to ? part->to : buffer;
        for (int64_t j = from; j < to; j += WIDTH)
            TYPED(store)(at + j, TYPED(gradient_at)(part, j, to - j), to - j);
        TYPED(put)(u->out, u->i, begin + from, to - from, at + from, 1);
    }
    if (u->special_at < begin || u->special_at >= begin + n) return;
    if (part->to) part->to[u->special_at - begin] = u->special;
    else TYPED(put)(u->out, u->i, u->special_at, 1, &u->special, 1);
}

/* Writes all of it at once. */
INLINE void TYPED(write_row)(TYPED(unwritten) *u) {
    if (!u->out) return;
    for (int64_t begin = 0; begin < u->n; begin += ROW_BLOCK) {
        int64_t m = u->n - begin < ROW_BLOCK ? u->n - begin : ROW_BLOCK;
        TYPED(unwritten_part) part = TYPED(begin_writing)(u, begin, m);
        for (int64_t j = 0; j < part.count; j += 2 * WIDTH) TYPED(write_two)(&part, j);
        TYPED(end_writing)(u, &part, begin, m);
    }
    u->out = NULL;
}
