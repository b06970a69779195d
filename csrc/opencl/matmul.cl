/* Matrix products over weights as they are stored: the program of pl_cl_gemm. A work-group makes TILE_N columns of C for one
 * tile of rows, or on a processor (GROUP 1) for `tiles` of them, one after the other. Panels of B are expanded into local memory,
 * those of A too where work-items share them. The low-rank branch is a second product into the same tile.
 *
 *   TM, TN   rows and vectors of columns of a work-item     ACROSS   work-items side by side, of GROUP
 *   DEPTH    of a panel in local memory                     FLUSH    products added up before they join C: long sums keep digits
 *   B_TRANSPOSED   where B is stored as [n, k]            A_STRIDED   where A's rows are not contiguous
 */
#define INDEX long
#include "types.cl"
#include "quant.cl"

#ifdef A_STRIDED
#define K_STEP k_step
#else
#define K_STEP 1
#endif
#define TILE_N (ACROSS * TN * WIDTH)
#define TILE_M (GROUP / ACROSS * TM)
#define UNROLLED_LOOP _Pragma("unroll")
#define EACH_RUN(r, count) for (int r = LANE; r < (count); r += GROUP)

/* Runs of 8 along the depth, put across the panel; and runs of 8 columns, put as they are. */
#define PANEL_OF_RUNS_ALONG(panel, width, r, run) \
    { \
        float eight[8]; \
        vstore8(run, 0, eight); \
        for (int l = 0; l < 8; l++) panel[(r / (width) * 8 + l) * (width) + r % (width)] = eight[l]; \
    }

/* Columns [j, j + TILE_N) of rows [k, k + DEPTH) of B. */
INLINE void load_b(const weight *w, long k, long depth, long j, long n, const global float *rows, float scale,
                   local float *panel) {
#ifdef B_TRANSPOSED
    EACH_RUN(r, TILE_N * (DEPTH / 8)) {
        const long column = j + r % TILE_N;
        if (r / TILE_N * 8 >= depth) break;
        float8 v = 0.0f;
        if (column < n) v = weight_run(w, stored_row(w, column), k + r / TILE_N * 8) * (rows ? scale * rows[column] : scale);
        PANEL_OF_RUNS_ALONG(panel, TILE_N, r, v)
    }
#else
    EACH_RUN(r, DEPTH * (TILE_N / 8)) {
        const long row = k + r / (TILE_N / 8);
        if (r / (TILE_N / 8) >= depth) break;
        const float8 v = weight_run(w, stored_row(w, row), j + r % (TILE_N / 8) * 8) * (rows ? scale * rows[row] : scale);
        vstore8(v, r, panel);
    }
#endif
}

/* The same of the low-rank branch's U, float32 [rank, n] or [n, rank]. */
INLINE void load_u(const global float *u, int transposed, long rank, long k, long depth, long j, long n, float scale,
                   local float *panel) {
    if (transposed) {
        EACH_RUN(r, TILE_N * (DEPTH / 8)) {
            const long column = j + r % TILE_N;
            PANEL_OF_RUNS_ALONG(panel, TILE_N, r,
                                column < n ? float_run(u + column * rank, k + r / TILE_N * 8, rank) * scale : (float8)(0.0f))
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
/* Rows [i, i + TILE_M) of columns [k, k + DEPTH) of A, across the panel; 0 past the depth. */
INLINE void load_a(const global float *a, long row_step, long k_step, long i, long m, long k, long depth, local float *panel) {
    if (k_step == 1) {
        EACH_RUN(r, TILE_M * (DEPTH / 8)) {
            const long row = min(i + r % TILE_M, m - 1), at = r / TILE_M * 8;
            PANEL_OF_RUNS_ALONG(panel, TILE_M, r, float_run(a + row * row_step + k, at, depth))
        }
    } else {
        EACH_RUN(r, DEPTH * (TILE_M / 8)) {
            const long at = r / (TILE_M / 8);
            if (at < depth) vstore8(float_run(a + (k + at) * k_step, i + r % (TILE_M / 8) * 8, m), r, panel);
        }
    }
}
#endif

KERNEL gemm(ARRAY(const float, a), WEIGHT_PARAMETERS, ARRAY(const float, b_rows), ARRAY(const float, bias), ARRAY(float, c),
            ARRAY(const float, h), ARRAY(const float, u), long m, long n, long k, long a_row, long a_k, float b_scale,
            long accumulate, long rank, long u_transposed, float u_scale, long across, long tiles) {
    local float b_panel[DEPTH * TILE_N];
#if GROUP > 1
    local float a_panel[DEPTH * TILE_M];
#endif
    TAKE_WEIGHT
    const long j = get_group_id(0) % across * TILE_N, first_row = get_group_id(0) / across * tiles * TILE_M;
    const global float *factors = b_rows_data ? ROW(b_rows, 0) : 0;
    const int x = LANE % ACROSS, y = LANE / ACROSS;
    int fresh = 1; /* nothing has been stored yet */
    for (int branch = 0; branch < 2; branch++) {
        const long whole = branch ? rank : k;
        const global float *left = branch ? ROW(h, 0) : ROW(a, 0);
        const long row_step = branch ? rank : a_row, k_step = branch ? 1 : a_k;
        for (long k0 = 0; k0 < whole || (!branch && k0 == 0); k0 += FLUSH) {
            const long end = min(whole, k0 + FLUSH);
#if GROUP == 1
            if (branch) load_u(ROW(u, 0), u_transposed != 0, rank, k0, end - k0, j, n, u_scale, b_panel);
            else load_b(&w, k0, end - k0, j, n, factors, b_scale, b_panel);
#endif
            for (long i = first_row; i < min(m, first_row + tiles * TILE_M); i += TILE_M) {
                V acc[TM][TN];
                UNROLLED_LOOP for (int r = 0; r < TM; r++)
                    UNROLLED_LOOP for (int v = 0; v < TN; v++) acc[r][v] = v_set(0);
#if GROUP == 1
                const global float *at[TM];
                UNROLLED_LOOP for (int r = 0; r < TM; r++) at[r] = left + min(i + r, m - 1) * row_step + k0 * k_step;
                for (long d = 0; d < end - k0; d++) {
                    V b[TN];
                    UNROLLED_LOOP for (int v = 0; v < TN; v++) b[v] = VLOAD(0, b_panel + d * TILE_N + v * WIDTH);
                    UNROLLED_LOOP for (int r = 0; r < TM; r++)
                        UNROLLED_LOOP for (int v = 0; v < TN; v++) acc[r][v] = FMA((V)(at[r][d * K_STEP]), b[v], acc[r][v]);
                }
#else
                for (long d0 = k0; d0 < end; d0 += DEPTH) {
                    const int depth = (int)min((long)DEPTH, end - d0);
                    barrier(CLK_LOCAL_MEM_FENCE);
                    if (branch) load_u(ROW(u, 0), u_transposed != 0, rank, d0, depth, j, n, u_scale, b_panel);
                    else load_b(&w, d0, depth, j, n, factors, b_scale, b_panel);
                    load_a(left, row_step, k_step, i, m, d0, depth, a_panel);
                    barrier(CLK_LOCAL_MEM_FENCE);
                    for (int d = 0; d < depth; d++) {
                        V b[TN];
                        UNROLLED_LOOP for (int v = 0; v < TN; v++)
                            b[v] = VLOAD(0, b_panel + d * TILE_N + (v * ACROSS + x) * WIDTH);
                        UNROLLED_LOOP for (int r = 0; r < TM; r++)
                            UNROLLED_LOOP for (int v = 0; v < TN; v++)
                                acc[r][v] = FMA((V)(a_panel[d * TILE_M + y * TM + r]), b[v], acc[r][v]);
                    }
                }
#endif
                float made[TM * TN * WIDTH]; /* so that what follows is compiled once, and not for each register */
                UNROLLED_LOOP for (int r = 0; r < TM; r++)
                    UNROLLED_LOOP for (int v = 0; v < TN; v++) VSTORE(acc[r][v], r * TN + v, made);
                for (int p = 0; p < TM * TN; p++) {
                    const long row = i + y * TM + p / TN, column = j + (p % TN * ACROSS + x) * WIDTH;
                    if (row >= m) break;
                    V sum = VLOAD(p, made);
                    if (fresh && bias_data) sum += fetch_f32(ROW(bias, 0), column, n, 0);
                    if (!fresh || accumulate) sum += fetch_f32(ROW(c, row * n), column, n, 0);
                    put_f32(sum, ROW(c, row * n), column, n);
                }
            }
            fresh = 0;
        }
    }
}
