/* Stored weights to float32: one decoder per format, for a run of elements of a row. */

/* Elements [begin, begin + n) of the stored row; begin is a multiple of the format's block, n <= 32 is a whole number of
 * blocks (any n <= 32 for the float formats). */
INLINE void decode_run(int format, const uint8_t *row, int64_t begin, int64_t n, float *out) {
    switch (format) {
    case PL_W_F32: memcpy(out, row + 4 * begin, 4 * (size_t)n); return;
    case PL_W_BF16: {
        const uint8_t *p = row + 2 * begin;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) vf_store(out + i, vf_from_bf16(p + 2 * i));
        for (; i < n; i++) {
            uint32_t bits = (uint32_t)p[2 * i] << 16 | (uint32_t)p[2 * i + 1] << 24;
            memcpy(out + i, &bits, 4);
        }
        return;
    }
    case PL_W_F16: {
        const uint8_t *p = row + 2 * begin;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) vf_store(out + i, vf_from_f16(p + 2 * i));
        for (; i < n; i++) out[i] = f32_from_f16((uint16_t)(p[2 * i] | p[2 * i + 1] << 8));
        return;
    }
    }
    /* The 32-element blocks of GGUF: a half-precision scale (and offset), then the codes. Elements 0..15 are the low
     * nibbles, 16..31 the high ones. */
    const uint8_t *p = row + begin / 32 * pl_block_bytes(format);
    for (int64_t at = 0; at < n; at += 32, p += pl_block_bytes(format), out += 32) {
        vf d = vf_set1(f32_from_f16((uint16_t)(p[0] | p[1] << 8)));
        if (format == PL_W_Q8_0) {
            for (int i = 0; i < 32; i += LANES) vf_store(out + i, vf_from_i8(p + 2 + i) * d);
            continue;
        }
        vf offset = format == PL_W_Q4_1 ? vf_set1(f32_from_f16((uint16_t)(p[2] | p[3] << 8))) : d * -8.0f;
        const uint8_t *codes = p + (format == PL_W_Q4_1 ? 4 : 2);
        for (int i = 0; i < 16; i += LANES) {
            vf low, high;
            vf_from_nibbles(codes + i, &low, &high);
            vf_store(out + i, low * d + offset);
            vf_store(out + 16 + i, high * d + offset);
        }
    }
}

/* A whole row as float32; cols is a whole number of blocks. */
INLINE void decode_row(const pl_weight *w, int64_t row, float *out) {
    const uint8_t *p = pl_weight_row(w, row);
    for (int64_t i = 0; i < w->cols; i += 32) decode_run(w->format, p, i, w->cols - i < 32 ? w->cols - i : 32, out + i);
}
