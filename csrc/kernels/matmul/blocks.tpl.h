/* How products are cut: into blocks of A, computed together in a batch. See gemm.tpl.h. */
#ifndef PYLOSS_BLOCKS_TPL_H
#define PYLOSS_BLOCKS_TPL_H
#include "product.h"
#include "tile.tpl.h"

enum {
    KC = 576,                   /* depth of a packed panel of B */
    KS = 4 * KC,                /* depth of packed A */
    AMX_KS = 2 * KS,            /* the same for AMX, whose A is half as large */
    MS = 1024,                  /* rows of packed A; up to MS + mr */
    NB = NR < 16 ? 32 : 2 * NR, /* columns of a strip: a multiple of 32, for quantized blocks */
    LEAST_PRODUCTS = 1 << 19    /* of a piece of a strip, on average */
};

/* One block of A, rows [row0, row0 + rows) x depth [k0, k0 + depth), in a batch of blocks. */
typedef struct {
    const gemm *g;
    int64_t first_panel, panels, first_piece,
        pieces; /* numbered through the batch; none when k0 is past the product's depth */
    int mr;     /* rows of a panel */
    int64_t row0, rows, k0, depth;
    int64_t columns;    /* of a strip */
    int64_t chunk;      /* depth of packed B: even parts of at most KC, a multiple of 32 */
    int last;           /* the last block over k: bias and the low-rank branch join here */
    int in_place;       /* full panels of A are read in place, only a last partial one is packed */
    float *packed_a;    /* [panels, or 1 in place][panel_stride] */
    float *packed_low;  /* [panels][low_stride] */
    float *packed_down; /* [rank / width][depth][width], or as amx_pack_down has it */
    float *packed_b;    /* per worker */
    /* A in words, unless these are floats: [rows, up to whole panels][pairs_stride], or tiles of
     * AMX, pairs_stride words of each row */
    float *pairs;
    int64_t panel_stride, low_stride, b_stride, pairs_stride;
    int64_t row_pieces, rows_per_piece, column_pieces, first_strip;
} block;

enum { BATCH = 64 }; /* blocks computed together, at most */

typedef struct {
    block blocks[BATCH];
    int count, threads;
    int64_t panels, pieces; /* of all blocks */
    int64_t k;              /* the deepest product's */
} batch;

/* The most depth of a product's blocks of A, and what its first one has. */
static int64_t depth_of(const gemm *g) { return is_amx(g->form) ? AMX_KS : KS; }
static int64_t block_depth(const gemm *g) { return at_most(g->k, depth_of(g)); }

/* Whether C may be rounded as it is stored, all of its depth being summed at once. */
static int narrow_fits(const gemm *g) {
    return is_amx(g->form) && g->k <= AMX_KS && !g->accumulate;
}

static int panel_width(int64_t columns) { return columns <= LANES ? LANES : NR; }
/* Panel width of D: full panels of A have a narrower tile for small ranks. */
static int low_width(int64_t rank, int mr) {
    return mr == MR && LANES >= 8 && rank <= LANES / 2 ? LANES / 2 : panel_width(rank);
}

/* The strip that a worker has packed; its memory begins with this. */
typedef union {
    int64_t strip;
    float line[16];
} packed_strip;
enum { PACKED_STRIP = sizeof(packed_strip) / sizeof(float) };
static float *packed_b_of(const block *s, int worker) {
    return s->packed_b + worker * s->b_stride + PACKED_STRIP;
}

#endif
