/* Attention: grouped-query, over packed sequences, without the matrix of all scores, as in
 * kernels/attention/. A row is a query of one of the `share` heads that share a key-value head. A
 * work-item has WIDTH rows in the lanes of its vectors and walks over the keys that they see. For
 * the gradients of keys and values it has WIDTH keys and walks over the queries that see them. It
 * takes a TILE at a time, which the work-group loads together.
 *
 *   D     elements of a head
 *   TILE  keys (or queries) of a tile
 */
#define INDEX long
#include "types.cl"

#include "../../softcap.h"

#define LOWEST (-(REAL)INFINITY)
#define ARRAY_D (D > 0 ? D : 1) /* C has no arrays of 0 elements */
#define ITEM_ROWS (GROUP * WIDTH)

typedef struct {
    long query, key; /* the sequence's first row of q, and of k */
    long n, m;       /* its number of queries, and of keys */
    long block;      /* the group's block of rows or keys in the sequence */
    long head;       /* the key-value head */
} group_work;

/* The sequence and the block of this group. Blocks are of rows, or with `by_key` of keys. */
INLINE group_work find_work(const global int *q_offsets, const global int *k_offsets,
                            long sequences, long kv_heads, long heads, int by_key) {
    group_work w;
    const long block = get_group_id(0) / kv_heads;
    w.head = get_group_id(0) % kv_heads;
    long before = 0;
    for (long s = 0; s < sequences; s++) {
        w.query = q_offsets[s];
        w.key = k_offsets[s];
        w.n = q_offsets[s + 1] - w.query;
        w.m = k_offsets[s + 1] - w.key;
        const long rows = by_key ? w.m : w.n * (heads / kv_heads),
                   blocks = (rows + ITEM_ROWS - 1) / ITEM_ROWS;
        w.block = block - before;
        if (w.block < blocks) break;
        before += blocks;
    }
    return w;
}

/* The index of a sequence's row among the heads of all tokens. */
INLINE long head_index(const group_work *w, long row, long heads, long kv_heads) {
    const long share = heads / kv_heads;
    return (w->query + row / share) * heads + w->head * share + row % share;
}

/* A row sees the keys [hidden, visible); none if visible <= 0. */
typedef struct {
    long hidden, visible;
} keys_of_row;
INLINE keys_of_row keys_seen(const group_work *w, long row, long share, long window, long ahead) {
    keys_of_row k;
    const long place = w->m - w->n + row / share + 1;
    k.visible = min(place + ahead, w->m);
    k.hidden = max(0L, place - window);
    return k;
}

/* Tiles: rows of D floats, `step` apart, which the work-items copy to local memory together. On a
 * processor they are read in place. */
#if GROUP > 1
#define TILE_MEMORY(name) local float name##_tile[TILE * ARRAY_D]
#define LOAD_TILE(name, from, step, count) \
    for (int e = LANE; e < (count) * D; e += GROUP) name##_tile[e] = (from)[e / D * (step) + e % D]
#define TILE_ROW(name, from, step, j) (name##_tile + (j)*D)
#define TILE_POINTER const local float *
#define TILE_BARRIER barrier(CLK_LOCAL_MEM_FENCE)
#else
#define TILE_MEMORY(name)
#define LOAD_TILE(name, from, step, count)
#define TILE_ROW(name, from, step, j) ((from) + (j) * (step))
#define TILE_POINTER const global float *
#define TILE_BARRIER
#endif

/* Copy WIDTH rows of D floats to or from lanes: a vector has one element of each row. */
#define GATHER(to, from, factor) \
    for (int l = 0; l < WIDTH; l++) { \
        const long row = row0 + l; \
        const global float *source = \
            ROW(from, head_index(&w, min(row, rows - 1), heads, kv_heads) * D); \
        for (int d = 0; d < D; d++) to[d * WIDTH + l] = row < rows ? (factor) * source[d] : 0.0f; \
    }
#define SCATTER(from, to, factor) \
    for (int l = 0; l < WIDTH && row0 + l < rows; l++) { \
        global float *target = ROW(to, head_index(&w, row0 + l, heads, kv_heads) * D); \
        for (int d = 0; d < D; d++) target[d] = (factor) * from[d * WIDTH + l]; \
    }

/* The dot products of the rows in lanes with one row of a tile, in four independent sums. */
INLINE V dot_row(const float *lanes, TILE_POINTER row) {
    V sum[4] = {v_set(0), v_set(0), v_set(0), v_set(0)};
    for (int d = 0; d < D / 4 * 4; d += 4)
        for (int j = 0; j < 4; j++) sum[j] = FMA(VLOAD(d + j, lanes), v_set(row[d + j]), sum[j]);
    for (int d = D / 4 * 4; d < D; d++) sum[0] = FMA(VLOAD(d, lanes), v_set(row[d]), sum[0]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* A score after the cap, if there is one, and the cap's slope there. */
INLINE V score_of(V s, float softcap) { return softcap > 0 ? capped(s, v_set(softcap)) : s; }
INLINE V score_slope(V score, float softcap) {
    return softcap > 0 ? cap_slope(score, v_set(softcap)) : v_set(1);
}

/* acc = acc factor + the sum over the tile of p[j] row j. */
#define ADD_ROWS(acc, factor, p, name, from, step, count) \
    for (int d = 0; d < D; d++) { \
        V sum = VLOAD(d, acc) * (factor); \
        for (int j = 0; j < (count); j++) \
            sum = FMA(p[j], v_set(TILE_ROW(name, from, step, j)[d]), sum); \
        VSTORE(sum, d, acc); \
    }

/* Which lanes see key `key`. */
#define SEES(key) (((VI)(key) < visible) & ((VI)(key) >= hidden))
#define TAKE_SEEN \
    int seen_memory[WIDTH], hidden_memory[WIDTH]; \
    for (int l = 0; l < WIDTH; l++) { \
        const keys_of_row k = keys_seen(&w, min(row0 + l, rows - 1), share, window, ahead); \
        seen_memory[l] = (int)(row0 + l < rows ? max(k.visible, 0L) : 0); \
        hidden_memory[l] = (int)k.hidden; \
    } \
    const VI visible = VLOAD(0, seen_memory), hidden = VLOAD(0, hidden_memory); \
    const long first_key = keys_seen(&w, w.block * ITEM_ROWS, share, window, ahead).hidden; \
    const long last_row = min((w.block + 1) * ITEM_ROWS, rows) - 1; \
    const long last_key = max(0L, keys_seen(&w, last_row, share, window, ahead).visible)
/* Loads the tile of `count` keys and values from `key` on. */
#define TAKE_KEYS(key) \
    const int count = (int)min((long)TILE, last_key - key); \
    const global float *keys = ROW(k, ((w.key + key) * kv_heads + w.head) * D); \
    const global float *values = ROW(v, ((w.key + key) * kv_heads + w.head) * D); \
    TILE_BARRIER; \
    LOAD_TILE(k, keys, step, count); \
    LOAD_TILE(v, values, step, count); \
    TILE_BARRIER;

KERNEL attention_forward(ARRAY(const float, q), ARRAY(const float, k), ARRAY(const float, v),
                         ARRAY(const int, q_offsets), ARRAY(const int, k_offsets), ARRAY(float, o),
                         ARRAY(float, lse), long sequences, long heads, long kv_heads, float scale,
                         float softcap, long window, long ahead) {
    TILE_MEMORY(k);
    TILE_MEMORY(v);
    const group_work w =
        find_work(ROW(q_offsets, 0), ROW(k_offsets, 0), sequences, kv_heads, heads, 0);
    const long share = heads / kv_heads, rows = w.n * share,
               row0 = w.block * ITEM_ROWS + LANE * WIDTH, step = kv_heads * D;
    float query[ARRAY_D * WIDTH], acc[ARRAY_D * WIDTH];
    GATHER(query, q, scale)
    TAKE_SEEN;
    for (int d = 0; d < D; d++) VSTORE(v_set(0), d, acc);
    V top = v_set(LOWEST), total = v_set(0);
    for (long key = first_key; key < last_key; key += TILE) {
        TAKE_KEYS(key)
        V p[TILE], high = top;
        for (int j = 0; j < count; j++) {
            const V s = score_of(dot_row(query, TILE_ROW(k, keys, step, j)), softcap);
            p[j] = v_select(SEES((int)(key + j)), s, v_set(LOWEST));
            high = p[j] > high || p[j] != p[j] ? p[j] : high;
        }
        /* While no key is seen, all weights are e^(-inf - 0) = 0. */
        const V base = v_select(v_equal(high, v_set(LOWEST)), v_set(0), high),
                factor = v_exp(top - base);
        total *= factor;
        for (int j = 0; j < count; j++) {
            p[j] = v_exp(p[j] - base);
            total += p[j];
        }
        ADD_ROWS(acc, factor, p, v, values, step, count)
        top = high;
    }
    float sums[WIDTH], tops[WIDTH];
    VSTORE(total, 0, sums);
    VSTORE(top, 0, tops);
    for (int l = 0; l < WIDTH && row0 + l < rows; l++) {
        const long at = head_index(&w, row0 + l, heads, kv_heads);
        for (int d = 0; d < D; d++)
            *ROW(o, at * D + d) = sums[l] == 0 ? 0.0f : acc[d * WIDTH + l] / sums[l];
        *ROW(lse, at) = sums[l] == 0 ? LOWEST : tops[l] + log(sums[l]);
    }
}

/* Writes dq, and delta = o . do of each row for attention_grad_keys. */
KERNEL attention_grad_rows(ARRAY(const float, d_o), ARRAY(const float, q), ARRAY(const float, k),
                           ARRAY(const float, v), ARRAY(const float, o), ARRAY(const float, lse),
                           ARRAY(const int, q_offsets), ARRAY(const int, k_offsets),
                           ARRAY(float, dq), ARRAY(float, delta), long sequences, long heads,
                           long kv_heads, float scale, float softcap, long window, long ahead) {
    TILE_MEMORY(k);
    TILE_MEMORY(v);
    const group_work w =
        find_work(ROW(q_offsets, 0), ROW(k_offsets, 0), sequences, kv_heads, heads, 0);
    const long share = heads / kv_heads, rows = w.n * share,
               row0 = w.block * ITEM_ROWS + LANE * WIDTH, step = kv_heads * D;
    float query[ARRAY_D * WIDTH], slope[ARRAY_D * WIDTH], acc[ARRAY_D * WIDTH], lses[WIDTH],
        deltas[WIDTH];
    GATHER(query, q, scale)
    GATHER(slope, d_o, 1.0f)
    TAKE_SEEN;
    for (int l = 0; l < WIDTH; l++) {
        const long at = head_index(&w, min(row0 + l, rows - 1), heads, kv_heads);
        float sum = 0;
        for (int d = 0; d < D; d++) sum += *ROW(o, at * D + d) * slope[d * WIDTH + l];
        deltas[l] = sum;
        lses[l] = *ROW(lse, at);
        if (row0 + l < rows) *ROW(delta, at) = sum;
    }
    const V log_sum = VLOAD(0, lses), by = VLOAD(0, deltas);
    for (int d = 0; d < D; d++) VSTORE(v_set(0), d, acc);
    for (long key = first_key; key < last_key; key += TILE) {
        TAKE_KEYS(key)
        V ds[TILE];
        for (int j = 0; j < count; j++) {
            const V s = score_of(dot_row(query, TILE_ROW(k, keys, step, j)), softcap),
                    p = v_exp(s - log_sum);
            ds[j] = v_select(SEES((int)(key + j)),
                             p * (dot_row(slope, TILE_ROW(v, values, step, j)) - by) *
                                 score_slope(s, softcap),
                             v_set(0));
        }
        ADD_ROWS(acc, v_set(1), ds, k, keys, step, count)
    }
    SCATTER(acc, dq, scale)
}

/* Writes dk and dv of WIDTH keys per work-item, summed over all rows that see them. */
KERNEL attention_grad_keys(ARRAY(const float, d_o), ARRAY(const float, q), ARRAY(const float, k),
                           ARRAY(const float, v), ARRAY(const float, lse),
                           ARRAY(const float, delta), ARRAY(const int, q_offsets),
                           ARRAY(const int, k_offsets), ARRAY(float, dk), ARRAY(float, dv),
                           long sequences, long heads, long kv_heads, float scale, float softcap,
                           long window, long ahead) {
    TILE_MEMORY(q);
    TILE_MEMORY(d_o);
#if GROUP > 1
    local float lse_tile[TILE], delta_tile[TILE];
#endif
    const group_work w =
        find_work(ROW(q_offsets, 0), ROW(k_offsets, 0), sequences, kv_heads, heads, 1);
    const long share = heads / kv_heads, key0 = w.block * ITEM_ROWS + LANE * WIDTH;
    float key_memory[ARRAY_D * WIDTH], value_memory[ARRAY_D * WIDTH], dkey[ARRAY_D * WIDTH],
        dvalue[ARRAY_D * WIDTH];
    int numbers[WIDTH];
    for (int l = 0; l < WIDTH; l++) {
        const long at = ((w.key + min(key0 + l, w.m - 1)) * kv_heads + w.head) * D;
        numbers[l] = (int)(key0 + l);
        for (int d = 0; d < D; d++) {
            key_memory[d * WIDTH + l] = key0 + l < w.m ? *ROW(k, at + d) : 0.0f;
            value_memory[d * WIDTH + l] = key0 + l < w.m ? *ROW(v, at + d) : 0.0f;
        }
    }
    const VI number = VLOAD(0, numbers);
    for (int d = 0; d < D; d++) {
        VSTORE(v_set(0), d, dkey);
        VSTORE(v_set(0), d, dvalue);
    }
    /* The group's keys are seen from the first query on that reaches its first key, as long as its
     * last key is in the window. */
    const long earlier = w.m - w.n, first_key = w.block * ITEM_ROWS,
               first_query = max(0L, first_key - earlier - ahead),
               last_query = min(w.n, min(first_key + ITEM_ROWS, w.m) - 1 - earlier + window);
    for (long part = 0; part < share;
         part++) { /* head by head: rows of a head are heads * D apart */
        const long step = heads * D;
        for (long query = first_query; query < last_query; query += TILE) {
            const int count = (int)min((long)TILE, last_query - query);
            const long at = (w.query + query) * heads + w.head * share + part;
            const global float *queries = ROW(q, at * D), *slopes = ROW(d_o, at * D);
            TILE_BARRIER;
            LOAD_TILE(q, queries, step, count);
            LOAD_TILE(d_o, slopes, step, count);
#if GROUP > 1
            for (int j = LANE; j < count; j += GROUP) {
                lse_tile[j] = *ROW(lse, at + j * heads);
                delta_tile[j] = *ROW(delta, at + j * heads);
            }
#endif
            TILE_BARRIER;
            V p[TILE], ds[TILE];
            for (int j = 0; j < count; j++) {
#if GROUP > 1
                const float log_sum = lse_tile[j], by = delta_tile[j];
#else
                const float log_sum = *ROW(lse, at + j * heads), by = *ROW(delta, at + j * heads);
#endif
                const VI newest = (VI)((int)min(earlier + query + j + ahead, w.m)),
                         oldest = (VI)((int)max(earlier + query + j + 1 - window, 0L));
                const V s = score_of(scale * dot_row(key_memory, TILE_ROW(q, queries, step, j)),
                                     softcap);
                const VI sees = (number <= newest) & (number >= oldest);
                p[j] = v_select(sees, v_exp(s - log_sum), v_set(0));
                ds[j] = v_select(
                    sees,
                    p[j] * (dot_row(value_memory, TILE_ROW(d_o, slopes, step, j)) - by) *
                        score_slope(s, softcap),
                    v_set(0));
            }
            ADD_ROWS(dvalue, v_set(1), p, d_o, slopes, step, count)
            ADD_ROWS(dkey, v_set(1), ds, q, queries, step, count)
        }
    }
    for (int l = 0; l < WIDTH && key0 + l < w.m; l++) {
        const long at = ((w.key + key0 + l) * kv_heads + w.head) * D;
        for (int d = 0; d < D; d++) {
            *ROW(dk, at + d) = scale * dkey[d * WIDTH + l];
            *ROW(dv, at + d) = dvalue[d * WIDTH + l];
        }
    }
}
