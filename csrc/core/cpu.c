/* The instruction sets of this processor, as far as the operating system saves their registers. */
#include "../pyloss.h"
#include "os.h"

#include <stdatomic.h>

#ifdef PL_X86
#include <cpuid.h>

/* Intel's Software Developer's Manual, volume 2, CPUID, and volume 1, chapter 13. Not by
 * __builtin_cpu_supports: which names it knows depends on the compiler, and its table is not in
 * every compiler's library. */
typedef struct {
    uint32_t a, b, c, d;
} leaf;

static leaf read_leaf(unsigned number, unsigned sub) {
    leaf found = {0, 0, 0, 0};
    if (!__get_cpuid_count(number, sub, &found.a, &found.b, &found.c, &found.d))
        return (leaf){0, 0, 0, 0};
    return found;
}

typedef struct {
    int avx2, avx512, bf16, vnni, avx_vnni, amx, tile_states;
} features;

static features read_features(void) {
    enum { FMA = 1 << 12, OSXSAVE = 1 << 27, F16C = 1 << 29 };     /* leaf 1, c */
    enum { AVX2 = 1 << 5, AVX512F = 1 << 16, AVX512DQ = 1 << 17 }; /* leaf 7, b */
    enum { AVX512BW = 1 << 30, AVX512_VNNI = 1 << 11 };            /* leaf 7, b and c */
    const uint32_t AVX512VL = UINT32_C(1) << 31;                   /* leaf 7, b */
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };               /* leaf 7, d */
    enum { AVX_VNNI = 1 << 4, AVX512_BF16 = 1 << 5 };              /* leaf 7.1, a */
    enum { YMM_STATES = 3 << 1, TILE_STATES = 3 << 17 };
    const uint32_t wide = FMA | OSXSAVE | F16C;
    const uint32_t all512 = AVX512F | AVX512DQ | AVX512BW | AVX512VL;
    const leaf one = read_leaf(1, 0), seven = read_leaf(7, 0);
    const leaf more = seven.a ? read_leaf(7, 1) : (leaf){0, 0, 0, 0};
    features found = {0};
    if ((one.c & wide) != wide) return found;
    uint32_t saved, high;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    found.avx2 = (saved & YMM_STATES) == YMM_STATES && (seven.b & AVX2);
    found.avx512 = found.avx2 && (seven.b & all512) == all512 && pl_saves_zmm(saved);
    found.avx_vnni = found.avx2 && (more.a & AVX_VNNI);
    found.vnni = found.avx512 && (seven.c & AVX512_VNNI);
    found.bf16 = found.avx512 && (more.a & AVX512_BF16);
    found.amx = (seven.d & AMX_TILE) && (seven.d & AMX_BF16);
    found.tile_states = (saved & TILE_STATES) == TILE_STATES;
    return found;
}

/* Read once: asking takes long in virtual machines. */
static features have;
PL_AT_LOAD static void look(void) { have = read_features(); }
#elif defined(__aarch64__)
static int have_dotprod;
PL_AT_LOAD static void look(void) { have_dotprod = pl_has_dotprod(); }
#endif

const pl_table *pl_table_at(int index) {
    const pl_table *found[8] = {&pl_table_baseline};
    int n = 1;
#ifdef PL_X86
    if (have.avx2) found[n++] = &pl_table_avx2;
    if (have.avx512) found[n++] = &pl_table_avx512;
#endif
    return index >= 0 && index < n ? found[index] : NULL;
}

int pl_has_bf16_dots(void) {
#ifdef PL_X86
    return have.bf16;
#else
    return 0;
#endif
}

const char *pl_int8_dots(int bytes) {
#ifdef PL_X86
    if (bytes == 64 && have.vnni) return "avx512_vnni";
    if (bytes == 32 && have.avx_vnni) return "avx_vnni";
#elif defined(__aarch64__)
    if (bytes == 16 && have_dotprod) return "dotprod";
#endif
    (void)bytes;
    return NULL;
}

/* "Intel Architecture Instruction Set Extensions", chapter 3. */
#ifdef PL_AMX
const char *pl_amx_missing(int request) {
    if (!have.amx) return "the processor has no amx_bf16";
    if (!have.bf16) return "the processor has amx_bf16 without avx512_bf16";
    if (!have.tile_states) return "the operating system saves no tile registers";
    if (request && pl_request_tiles()) return "the operating system refuses the tile registers";
    return NULL;
}
#else
const char *pl_amx_missing(int request) {
    (void)request;
    return "this build has no amx_bf16";
}
#endif
