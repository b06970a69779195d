/* Gradients of a row on their way from scratch to memory.
 *
 * Streaming a large gradient past the caches is bound by memory, taking statistics by
 * arithmetic. So the two are interleaved: row i's gradient is pending while row i + 1's
 * statistics are taken, and the walk over row i + 1 stores a little of it after each of its own
 * steps:
 *
 *   row      0                   1                   2                   3
 *   walk     statistics 0        statistics 1        statistics 2        (end of the piece)
 *   stores                       gradient 0          gradient 1          gradient 2
 *   buffer   0: weights of 0     1: weights of 1     0: weights of 2
 *
 * Within a block, a walk step and a store step both handle 2 WIDTH elements. A class loss has
 * one walk per row and stores at each of its steps; a pair loss has two walks per row (over q,
 * then over p), each stores one half of the block, at every second of its steps (2^pace = 2):
 *
 *   walk step         0   1   2   3   4   5   6   7   ...
 *   one walk          s0  s1  s2  s3  s4  s5  s6  s7           pace 0
 *   walk over q       s0      s1      s2      s3               pace 1, first half
 *   walk over p       s4      s5      s6      s7               pace 1, second half
 *
 * Stores go in whole vectors and need aligned addresses to be streamed, so a block's gradient is
 *
 *   | head |  whole: store steps, beginning at `first`, wrapping around at the end  | tail |
 *
 * and finish_block writes head and tail. One walk begins half a page into the block, because a
 * store holds up loads from the same place of another page; two walks begin at their half. */
#ifndef ROWLOSS_GRADIENT
#define ROWLOSS_GRADIENT
#include "rows.tpl.h"
#include "weights.tpl.h"

/* A row's gradient: values * by_values + probabilities * by_weights, but `special` at one place. */
typedef struct {
    const pl_rows *out; /* NULL where nothing is to be written */
    int64_t i, n;
    const REAL *values;            /* [n], or NULL */
    const row_statistics *weights; /* or NULL */
    REAL scale, special;
    double by_values, by_weights;
    int64_t special_at; /* -1: nowhere */
    int stream;
} pending_gradient;

/* The gradient of one block, as in the picture. Of the `whole` elements after `head` a walk stores
 * `count` elements from `first` on. */
typedef struct {
    REAL *to;          /* or NULL */
    uint16_t *to_bf16; /* or NULL; with neither, finish_block converts everything */
    const REAL *values, *kept;
    V by_values, prob;
    int64_t whole, head, first, count;
    int stream, pace;
} pending_block;

/* The gradient at element j of the block, which has n elements left. */
INLINE V gradient_at(const pending_block *block, int64_t j, int64_t n) {
    V values = block->values ? load_lanes(block->values + j, n, 0) * block->by_values : v_set(0);
    if (!block->kept) return values;
    V kept = load_lanes(block->kept + j, n, 0);
    return block->values ? v_fma(kept, block->prob, values) : kept * block->prob;
}

INLINE pending_block begin_block(const pending_gradient *g, int64_t begin, int64_t n) {
    pending_block block = {.stream = g->stream};
    if (g->values) {
        block.values = g->values + begin;
        block.by_values = v_set((REAL)g->by_values);
    }
    if (g->weights) {
        block.kept = g->weights->kept + begin;
        block.prob = block_factor(g->weights, begin, g->scale, g->by_weights);
    }
    uintptr_t to = 0, size = 0;
    if ((int)g->out->type == NATIVE) {
        block.to = (REAL *)pl_row(g->out, g->i) + begin;
        to = (uintptr_t)block.to, size = sizeof(REAL);
    } else if (sizeof(REAL) == 4 && g->out->type == PL_BF16) {
        block.to_bf16 = (uint16_t *)pl_row(g->out, g->i) + begin;
        to = (uintptr_t)block.to_bf16, size = 2;
    }
    if (!to) return block;
    if (g->stream) block.head = (int64_t)(-to % sizeof(V) / size);
    if (block.head > n) block.head = n;
    block.whole = (n - block.head) / (2 * WIDTH) * (2 * WIDTH);
    block.count = block.whole;
    return block;
}

/* Leaves the store steps to `walks` walks over a block of another row, of which this is one. */
INLINE void share_block(pending_block *block, int walk, int walks) {
    const int64_t half_page = 2048 / sizeof(REAL), half = block->whole / (4 * WIDTH) * (2 * WIDTH);
    block->pace = walks - 1;
    if (walks == 1) block->first = block->whole > half_page ? half_page : 0;
    else block->first = walk ? half : 0, block->count = walk ? block->whole - half : half;
}

/* The store step that belongs to the walk step at element i, if there is one. */
INLINE void write_step(const pending_block *block, int64_t i) {
    int64_t j = i >> block->pace;
    if (j >= block->count || (i & ((2 * WIDTH << block->pace) - 1))) return;
    j += block->first;
    j += block->head - (j >= block->whole ? block->whole : 0);
    V a = gradient_at(block, j, WIDTH), b = gradient_at(block, j + WIDTH, WIDTH);
    if (block->to_bf16) {
        vf low, high;
        memcpy(&low, &a, sizeof low), memcpy(&high, &b, sizeof high);
        if (block->stream) vf_stream_bf16_twice(block->to_bf16 + j, low, high);
        else vf_to_bf16_twice(block->to_bf16 + j, low, high);
    } else if (block->stream) {
        v_stream(block->to + j, a);
        v_stream(block->to + j + WIDTH, b);
    } else {
        v_store(block->to + j, a);
        v_store(block->to + j + WIDTH, b);
    }
}

/* Writes head, tail and the special element; everything where there were no store steps. */
static void finish_block(const pending_gradient *g, const pending_block *block, int64_t begin,
                         int64_t n) {
    REAL buffer[ROW_BLOCK];
    for (int side = 0; side < 2; side++) {
        int64_t from = side ? block->head + block->whole : 0, to = side ? n : block->head;
        if (from >= to) continue;
        REAL *at = block->to ? block->to : buffer;
        for (int64_t j = from; j < to; j += WIDTH)
            store_lanes(at + j, gradient_at(block, j, to - j), to - j);
        put(g->out, g->i, begin + from, to - from, at + from, 1);
    }
    if (g->special_at < begin || g->special_at >= begin + n) return;
    if (block->to) block->to[g->special_at - begin] = g->special;
    else put(g->out, g->i, g->special_at, 1, &g->special, 1);
}

/* Writes a whole gradient at once; afterwards nothing is pending. */
static void write_gradient(pending_gradient *g) {
    if (!g->out) return;
    for (int64_t begin = 0; begin < g->n; begin += ROW_BLOCK) {
        int64_t m = g->n - begin < ROW_BLOCK ? g->n - begin : ROW_BLOCK;
        pending_block block = begin_block(g, begin, m);
        for (int64_t j = 0; j < block.count; j += 2 * WIDTH) write_step(&block, j);
        finish_block(g, &block, begin, m);
    }
    g->out = NULL;
}

#endif
