/* A cache of aligned buffers. A released buffer joins the list of its size class (an eighth of a
 * power of two) and serves the next request of that class. If buffers in use and cached exceed the
 * peak in use and a margin, the longest unused are freed first. Large buffers are mapped: a heap
 * would not return their memory to the system. */
#include "../pyloss.h"
#include "os.h"

#ifdef __SANITIZE_ADDRESS__ /* the sanitizer checks only the heap */
enum { MAPPED = 1 << 30 };
#else
enum { MAPPED = 128 << 10 };
#endif

enum { CLASSES = 8 * 64, ALIGN = 64, HUGE_PAGE = 2 << 20, SPARE = 16 << 20 };

typedef struct header {
    struct header *next, *older, *newer; /* the class list; the list by age */
    size_t size;
    int class_index;
} header;

_Static_assert(sizeof(header) <= ALIGN, "the header takes one alignment unit before the data");

static struct {
    pl_mutex lock;
    header *free[CLASSES];
    header *oldest, *newest;
    pl_buffer_stats stats;
} pool = {.lock = PL_MUTEX};

/* The class of a size; *rounded is the size of every buffer of the class. */
static int size_class(size_t bytes, size_t *rounded) {
    size_t n = bytes < 1024 ? 1024 : bytes;
    int log2 = 63 - __builtin_clzll((unsigned long long)n);
    size_t step = (size_t)1 << (log2 - 3);
    size_t eighths = (n - ((size_t)1 << log2) + step - 1) / step;
    *rounded = ((size_t)1 << log2) + eighths * step;
    return 8 * log2 + (int)eighths;
}

/* Bytes of a buffer with its header, a multiple of *align. Mapped buffers begin at a page, of 4096
 * bytes at least. */
static size_t total_bytes(size_t size, size_t *align) {
    *align = size >= 2 * HUGE_PAGE ? HUGE_PAGE : size >= MAPPED ? 4096 : ALIGN;
    return (size + ALIGN + *align - 1) / *align * *align;
}

static header *allocate(size_t size) {
    size_t align, bytes = total_bytes(size, &align);
    if (size < MAPPED) return pl_heap_take(align, bytes);
    /* Whole huge pages only: a last one would become resident for a few bytes. */
    const size_t huge = align == HUGE_PAGE ? (size + ALIGN) / HUGE_PAGE * HUGE_PAGE : 0;
    return pl_pages_take(align, bytes, huge);
}

static void give_back(header *h) {
    size_t align;
    if (h->size < MAPPED) pl_heap_free(h);
    else pl_pages_free(h, total_bytes(h->size, &align));
}

/* Resizes a mapped buffer, which keeps its pages. If that fails, frees it and returns NULL. */
static header *resized(header *h, size_t size) {
    size_t align, from = total_bytes(h->size, &align), to = total_bytes(size, &align);
    void *p = pl_pages_resize(h, from, to);
    if (!p) pl_pages_free(h, from);
    return p;
}

/* The cached buffer nearest in size that can be resized to `size`, or NULL. Batches of other
 * lengths need other sizes; reused pages spare the system clearing new ones. */
static header *similar(int index, size_t size) {
    if (size < MAPPED || size >= 2 * HUGE_PAGE) return NULL;
    for (int distance = 1; distance <= 16; distance++) {
        if (index + distance < CLASSES && pool.free[index + distance])
            return pool.free[index + distance];
        header *smaller = pool.free[index - distance];
        if (smaller && smaller->size >= MAPPED) return smaller;
    }
    return NULL;
}

/* Takes a buffer out of the cache. */
static header *take(header *h) {
    header **link = &pool.free[h->class_index];
    while (*link != h) link = &(*link)->next;
    *link = h->next;
    if (h->older) h->older->newer = h->newer;
    else pool.oldest = h->newer;
    if (h->newer) h->newer->older = h->older;
    else pool.newest = h->older;
    pool.stats.cached -= h->size;
    return h;
}

void *pl_acquire(size_t bytes) {
    size_t size;
    if (bytes > SIZE_MAX / 4) return NULL;
    int index = size_class(bytes, &size);
    if (index >= CLASSES) return NULL;
    pl_lock(&pool.lock);
    header *h = pool.free[index], *to_resize = NULL;
    if (h) take(h);
    /* Buffers cached far beyond the peak have sizes that are no longer used. The margin keeps
     * repeated work from clearing new pages for the same sizes. */
    const size_t limit = pool.stats.peak + (pool.stats.peak < SPARE ? pool.stats.peak : SPARE);
    while (!h && pool.oldest && pool.stats.in_use + pool.stats.cached + size > limit) {
        if (!to_resize && (to_resize = similar(index, size))) take(to_resize);
        else give_back(take(pool.oldest));
    }
    pool.stats.in_use += size;
    if (pool.stats.in_use > pool.stats.peak) pool.stats.peak = pool.stats.in_use;
    pl_unlock(&pool.lock);
    if (!h) {
        if (to_resize) h = resized(to_resize, size);
        if (!h) h = allocate(size);
        if (!h) {
            pl_buffers_trim();
            h = allocate(size);
        }
        if (!h) {
            pl_lock(&pool.lock);
            pool.stats.in_use -= size;
            pool.stats.peak = pool.stats.in_use; /* the refused bytes must not raise the peak */
            pl_unlock(&pool.lock);
            return NULL;
        }
        h->size = size;
        h->class_index = index;
    }
    return (char *)h + ALIGN;
}

void pl_release(void *buffer) {
    if (!buffer) return;
    header *h = (header *)((char *)buffer - ALIGN);
    pl_lock(&pool.lock);
    pool.stats.in_use -= h->size;
    pool.stats.cached += h->size;
    h->next = pool.free[h->class_index];
    pool.free[h->class_index] = h;
    h->older = pool.newest;
    h->newer = NULL;
    if (pool.newest) pool.newest->newer = h;
    else pool.oldest = h;
    pool.newest = h;
    pl_unlock(&pool.lock);
}

void pl_buffers_trim(void) {
    pl_lock(&pool.lock);
    while (pool.oldest) give_back(take(pool.oldest));
    pool.stats.peak = pool.stats.in_use;
    pl_unlock(&pool.lock);
}

void pl_buffers_stats(pl_buffer_stats *out) {
    pl_lock(&pool.lock);
    *out = pool.stats;
    pl_unlock(&pool.lock);
}

/* fork waits for the lock, so that the child gets it unlocked. */
static void lock_pool(void) { pl_lock(&pool.lock); }
static void unlock_pool(void) { pl_unlock(&pool.lock); }
PL_AT_LOAD static void watch_fork(void) { pl_at_fork(lock_pool, unlock_pool, unlock_pool); }
