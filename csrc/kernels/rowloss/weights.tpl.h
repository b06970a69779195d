/* The formulas of losses/ for the computed type, the weight families, and the weights of a row that
 * its statistics are made of. */
#ifndef ROWLOSS_WEIGHTS
#define ROWLOSS_WEIGHTS
#include "job.h"
#include "rows.tpl.h"

#include "../../losses/formulas.h"
#include "../../losses.def"

/* The properties of families.def as constants. */
#ifndef PYLOSS_ROWLOSS_FAMILIES
#define PYLOSS_ROWLOSS_FAMILIES
#define PL_FAMILY(name, shifted, sloped) \
    enum { name##_is_shifted = shifted, name##_is_sloped = sloped };
#include "../../families.def"

#define FAMILY(name) \
    ((weight_family){TYPED(name##_weight), name##_is_sloped ? TYPED(name##_slope) : NULL, \
                     TYPED(name##_log_weight), name##_is_shifted})
#endif

typedef struct {
    V (*weight)(V x);
    V (*slope)(V x); /* NULL where it is 1 */
    V (*log_weight)(V x);
    int shifted;
} weight_family;

/* The sum of the weights w(scale x) is total * e^(scale shift); shift is 0 if the family is not
 * shifted. */
typedef struct {
    REAL shift;
    double total;
    /* Of the logits that are not -inf: their sum, with class weights times these, the sum of the
     * class weights, and their number. */
    double sum_x, sum_class_weight;
    int64_t count;
    REAL *kept;        /* the weights, [n]; NULL where nothing needs them later */
    REAL *block_shift; /* the shift of each block's kept weights, [blocks] */
} row_statistics;

/* Statistics of a row of n elements that keep their arrays in one part of scratch. */
INLINE row_statistics statistics_in(REAL *part, int64_t n) {
    return (row_statistics){.kept = part, .block_shift = part + (n + WIDTH - 1) / WIDTH * WIDTH};
}

/* The factor that brings the kept weight of element j to the row's shift. */
INLINE double relative_shift(const row_statistics *row, int64_t j, REAL scale) {
    REAL shift = row->block_shift[j / ROW_BLOCK];
    return shift == row->shift ? 1 : exp(((double)shift - (double)row->shift) * (double)scale);
}

/* The factor that turns the kept weights of the block at `begin` into probabilities times `by`. */
INLINE V block_factor(const row_statistics *row, int64_t begin, REAL scale, double by) {
    return v_set((REAL)(relative_shift(row, begin, scale) * by / row->total));
}

#endif
