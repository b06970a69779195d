/* Matrix products with stored weights: the program of pl_cl_gemm. A work-group computes TILE_N
 * columns of C, for one tile of rows, or on a processor (GROUP 1) for `tiles` of them in turn.
 * Panels of B are decoded into local memory, and panels of A too where work-items share them. The
 * low-rank branch is a second product into the same tile.
 *
 *   TM, TN        rows, and vectors of columns, of a work-item
 *   ACROSS        work-items of the group that are side by side
 *   DEPTH         of a panel in local memory
 *   FLUSH         products that are summed before the sum is added to C; a short sum is more exact
 *   B_TRANSPOSED  defined if B is stored as [n, k]
 *   A_STRIDED     defined if A's rows are not contiguous
 */
#define INDEX long
#include "quant.cl"

#ifdef A_STRIDED
#define K_STEP k_step
#else
#define K_STEP 1
#endif
#define TILE_N (ACROSS * TN * WIDTH)
#define TILE_M (GROUP / ACROSS * TM)
/* Unrolled loops over a work-item's rows and its vectors of columns, so that sums stay in
 * registers. */
#define EACH_ROW(r) _Pragma("unroll") for (int r = 0; r < TM; r++)
#define EACH_COLUMNS(v) _Pragma("unroll") for (int v = 0; v < TN; v++)
/* The runs of 8 elements that a work-item loads. */
#define EACH_RUN(r, count) for (int r = LANE; r < (count); r += GROUP)

/* Stores run r, 8 elements along the depth, transposed: a panel [depth, width] has a row per
 * depth. */
#define STORE_TRANSPOSED(panel, width, r, run) \
    { \
        float eight[8]; \
        vstore8(run, 0, eight); \
        for (int l = 0; l < 8; l++) \
            panel[(r / (width) * 8 + l) * (width) + r % (width)] = eight[l]; \
    }

/* Panel of B: columns [j, j + TILE_N) of rows [k, k + depth), times scale and the row factors. */
INLINE void load_b(const weight *w, long k, long depth, long j, long n,
                   const global float *row_factors, float scale, local float *panel) {
#ifdef B_TRANSPOSED
    EACH_RUN(r, TILE_N * (DEPTH / 8)) {
        const long column = j + r % TILE_N;
        if (r / TILE_N * 8 >= depth) break;
        float8 v = 0.0f;
        if (column < n)
            v = weight_run(w, stored_row(w, column), k + r / TILE_N * 8) *
                (row_factors ? scale * row_factors[column] : scale);
        STORE_TRANSPOSED(panel, TILE_N, r, v)
    }
#else
    EACH_RUN(r, DEPTH * (TILE_N / 8)) {
        const long row = k + r / (TILE_N / 8);
        if (r / (TILE_N / 8) >= depth) break;
        const float8 v = weight_run(w, stored_row(w, row), j + r % (TILE_N / 8) * 8) *
                         (row_factors ? scale * row_factors[row] : scale);
        vstore8(v, r, panel);
    }
#endif
}

/* Panel of the branch's U, float32 [rank, n] or [n, rank]: columns [j, j + TILE_N), rows from k
 * on. */
INLINE void load_u(const global float *u, int transposed, long rank, long k, long depth, long j,
                   long n, float scale, local float *panel) {
    if (transposed) {
        EACH_RUN(r, TILE_N * (DEPTH / 8)) {
            const long column = j + r % TILE_N;
            STORE_TRANSPOSED(panel, TILE_N, r,
                             column < n
                                 ? float_run(u + column * rank, k + r / TILE_N * 8, rank) * scale
                                 : (float8)(0.0f))
        }
    } else {
        EACH_RUN(r, DEPTH * (TILE_N / 8)) {
            const long row = k + r / (TILE_N / 8);
            if (r / (TILE_N / 8) >= depth) break;
            vstore8(float_run(u + row * n, j + r % (TILE_N / 8) * 8, n) * scale, r, panel);
        }
    }
}

#if GROUP > 1
/* Panel of A, transposed: rows [i, i + TILE_M), columns [k, k + depth); 0 past the depth. */
INLINE void load_a(const global float *a, long row_step, long k_step, long i, long m, long k,
                   long depth, local float *panel) {
    if (k_step == 1) {
        EACH_RUN(r, TILE_M * (DEPTH / 8)) {
            const long row = min(i + r % TILE_M, m - 1), at = r / TILE_M * 8;
            STORE_TRANSPOSED(panel, TILE_M, r, float_run(a + row * row_step + k, at, depth))
        }
    } else {
        EACH_RUN(r, DEPTH * (TILE_M / 8)) {
            const long at = r / (TILE_M / 8);
            if (at < depth)
                vstore8(float_run(a + (k + at) * k_step, i + r % (TILE_M / 8) * 8, m), r, panel);
        }
    }
}
#endif

KERNEL gemm(ARRAY(const float, a), WEIGHT_PARAMETERS, ARRAY(const float, b_row_factors),
            ARRAY(const float, bias), ARRAY(float, c), ARRAY(const float, branch_h),
            ARRAY(const float, branch_u), long m, long n, long k, long a_row_step, long a_k_step,
            float b_scale, long accumulate, long rank, long branch_u_transposed, float branch_scale,
            long across, long tiles) {
    local float b_panel[DEPTH * TILE_N];
#if GROUP > 1
    local float a_panel[DEPTH * TILE_M];
#endif
    TAKE_WEIGHT
    const long j = get_group_id(0) % across * TILE_N,
               first_row = get_group_id(0) / across * tiles * TILE_M;
    const global float *row_factors = b_row_factors_data ? ROW(b_row_factors, 0) : 0;
    const int x = LANE % ACROSS, y = LANE / ACROSS;
    int first_sum = 1; /* C holds no sum of this product yet */
    for (int branch = 0; branch < 2; branch++) {
        const long whole = branch ? rank : k;
        const global float *lhs = branch ? ROW(branch_h, 0) : ROW(a, 0);
        const long row_step = branch ? rank : a_row_step, k_step = branch ? 1 : a_k_step;
        for (long k0 = 0; k0 < whole || (!branch && k0 == 0); k0 += FLUSH) {
            const long end = min(whole, k0 + FLUSH);
#if GROUP == 1
            if (branch)
                load_u(ROW(branch_u, 0), branch_u_transposed != 0, rank, k0, end - k0, j, n,
                       branch_scale, b_panel);
            else load_b(&w, k0, end - k0, j, n, row_factors, b_scale, b_panel);
#endif
            for (long i = first_row; i < min(m, first_row + tiles * TILE_M); i += TILE_M) {
                V acc[TM][TN];
                EACH_ROW(r)
                    EACH_COLUMNS(v) acc[r][v] = v_set(0);
#if GROUP == 1
                const global float *lhs_row[TM];
                EACH_ROW(r) lhs_row[r] = lhs + min(i + r, m - 1) * row_step + k0 * k_step;
                for (long d = 0; d < end - k0; d++) {
                    V b[TN];
                    EACH_COLUMNS(v) b[v] = VLOAD(0, b_panel + d * TILE_N + v * WIDTH);
                    EACH_ROW(r)
                        EACH_COLUMNS(v)
                            acc[r][v] = FMA((V)(lhs_row[r][d * K_STEP]), b[v], acc[r][v]);
                }
#else
                for (long d0 = k0; d0 < end; d0 += DEPTH) {
                    const int depth = (int)min((long)DEPTH, end - d0);
                    barrier(CLK_LOCAL_MEM_FENCE);
                    if (branch)
                        load_u(ROW(branch_u, 0), branch_u_transposed != 0, rank, d0, depth, j, n,
                               branch_scale, b_panel);
                    else load_b(&w, d0, depth, j, n, row_factors, b_scale, b_panel);
                    load_a(lhs, row_step, k_step, i, m, d0, depth, a_panel);
                    barrier(CLK_LOCAL_MEM_FENCE);
                    for (int d = 0; d < depth; d++) {
                        V b[TN];
                        EACH_COLUMNS(v)
                            b[v] = VLOAD(0, b_panel + d * TILE_N + (v * ACROSS + x) * WIDTH);
                        EACH_ROW(r)
                            EACH_COLUMNS(v)
                                acc[r][v] =
                                    FMA((V)(a_panel[d * TILE_M + y * TM + r]), b[v], acc[r][v]);
                    }
                }
#endif
                /* In an array, so that the code below exists once and not for each register. */
                float sums[TM * TN * WIDTH];
                EACH_ROW(r)
                    EACH_COLUMNS(v) VSTORE(acc[r][v], r * TN + v, sums);
                for (int p = 0; p < TM * TN; p++) {
                    const long row = i + y * TM + p / TN,
                               column = j + (p % TN * ACROSS + x) * WIDTH;
                    if (row >= m) break;
                    V sum = VLOAD(p, sums);
                    if (first_sum && bias_data) sum += fetch_f32(ROW(bias, 0), column, n, 0);
                    if (!first_sum || accumulate) sum += fetch_f32(ROW(c, row * n), column, n, 0);
                    put_f32(sum, ROW(c, row * n), column, n);
                }
            }
            first_sum = 0;
        }
    }
}
