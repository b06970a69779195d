/* A cache of aligned buffers. A released buffer goes to the list of its size class (eighths of a power of two) and serves
 * the next request of that class; when the cache outgrows what was in use at the peak, the longest unused go back first. */
#include "../pyloss.h"

#include <pthread.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { CLASSES = 8 * 64, ALIGN = 64, HUGE_PAGE = 2 << 20 };

typedef struct header {
    struct header *next, *older, *newer; /* the class list; the list by age */
    size_t size;
    int class_index;
} header;

_Static_assert(sizeof(header) <= ALIGN, "the header takes one alignment unit before the data");

static struct {
    pthread_mutex_t lock;
    header *free[CLASSES];
    header *oldest, *newest;
    pl_buffer_stats stats;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* The class of a size, and the size that every buffer of the class has. */
static int size_class(size_t bytes, size_t *rounded) {
    size_t n = bytes < 1024 ? 1024 : bytes;
    int log2 = 63 - __builtin_clzll((unsigned long long)n);
    size_t step = (size_t)1 << (log2 - 3);
    size_t eighths = (n - ((size_t)1 << log2) + step - 1) / step;
    *rounded = ((size_t)1 << log2) + eighths * step;
    return 8 * log2 + (int)eighths;
}

static void unlink_by_age(header *h) {
    if (h->older) h->older->newer = h->newer;
    else pool.oldest = h->newer;
    if (h->newer) h->newer->older = h->older;
    else pool.newest = h->older;
}

static void give_back_oldest(void) {
    header *h = pool.oldest;
    header **link = &pool.free[h->class_index];
    while (*link != h) link = &(*link)->next;
    *link = h->next;
    unlink_by_age(h);
    pool.stats.cached -= h->size;
    free(h);
}

void *pl_acquire(size_t bytes) {
    size_t size;
    if (bytes > SIZE_MAX / 4) return NULL;
    int index = size_class(bytes, &size);
    if (index >= CLASSES) return NULL;
    pthread_mutex_lock(&pool.lock);
    header *h = pool.free[index];
    if (h) {
        pool.free[index] = h->next;
        unlink_by_age(h);
        pool.stats.cached -= size;
    } else {
        /* Never hold more than the peak: what is cached beyond it serves no size that is asked for now. */
        while (pool.oldest && pool.stats.in_use + pool.stats.cached + size > pool.stats.peak) give_back_oldest();
    }
    pool.stats.in_use += size;
    if (pool.stats.in_use > pool.stats.peak) pool.stats.peak = pool.stats.in_use;
    pthread_mutex_unlock(&pool.lock);
    if (!h) {
        size_t align = size >= 2 * HUGE_PAGE ? HUGE_PAGE : ALIGN;
        size_t whole = (size + ALIGN + align - 1) / align * align;
        h = aligned_alloc(align, whole);
        if (!h) {
            pl_buffers_trim();
            h = aligned_alloc(align, whole);
        }
        if (!h) {
            pthread_mutex_lock(&pool.lock);
            pool.stats.in_use -= size;
            pool.stats.peak = pool.stats.in_use; /* what was refused is no reason to keep so much */
            pthread_mutex_unlock(&pool.lock);
            return NULL;
        }
#ifdef MADV_HUGEPAGE
        /* Whole huge pages only: the last one would be resident for a small rest. */
        if (align == HUGE_PAGE) madvise(h, (size + ALIGN) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
        h->size = size;
        h->class_index = index;
    }
    return (char *)h + ALIGN;
}

void pl_release(void *buffer) {
    if (!buffer) return;
    header *h = (header *)((char *)buffer - ALIGN);
    pthread_mutex_lock(&pool.lock);
    pool.stats.in_use -= h->size;
    pool.stats.cached += h->size;
    h->next = pool.free[h->class_index];
    pool.free[h->class_index] = h;
    h->older = pool.newest;
    h->newer = NULL;
    if (pool.newest) pool.newest->newer = h;
    else pool.oldest = h;
    pool.newest = h;
    pthread_mutex_unlock(&pool.lock);
}

void pl_buffers_trim(void) {
    pthread_mutex_lock(&pool.lock);
    while (pool.oldest) give_back_oldest();
    pool.stats.peak = pool.stats.in_use;
    pthread_mutex_unlock(&pool.lock);
}

void pl_buffers_stats(pl_buffer_stats *out) {
    pthread_mutex_lock(&pool.lock);
    *out = pool.stats;
    pthread_mutex_unlock(&pool.lock);
}

/* A child of fork gets the lock in a known state. */
static void lock_pool(void) { pthread_mutex_lock(&pool.lock); }
static void unlock_pool(void) { pthread_mutex_unlock(&pool.lock); }
__attribute__((constructor)) static void watch_fork(void) { pthread_atfork(lock_pool, unlock_pool, unlock_pool); }
