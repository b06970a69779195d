/* A cache of aligned buffers. A released buffer goes to the list of its size class (eighths of a power of two) and serves
 * the next request of that class; when the cache outgrows what was in use at the peak and a little more, the longest unused go
 * back first. Large ones are mapped, so that what goes back is the system's again: a heap would keep it, in pieces that fit
 * nothing. */
#define _GNU_SOURCE
#include "../pyloss.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__ /* which watches heaps alone */
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

/* Whole bytes of a buffer of `size`, a multiple of the alignment; mapped ones lie on pages, of which 4096 is the smallest. */
static size_t whole(size_t size, size_t *align) {
    *align = size >= 2 * HUGE_PAGE ? HUGE_PAGE : size >= MAPPED ? 4096 : ALIGN;
    return (size + ALIGN + *align - 1) / *align * *align;
}

static header *allocate(size_t size) {
    size_t align, bytes = whole(size, &align);
    if (size < MAPPED) return aligned_alloc(align, bytes);
    size_t spare = align == HUGE_PAGE ? HUGE_PAGE : 0;
    char *p = mmap(NULL, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (spare) {
        size_t before = -(uintptr_t)p & (HUGE_PAGE - 1);
        if (before) munmap(p, before);
        if (before < spare) munmap(p + before + bytes, spare - before);
        p += before;
#ifdef MADV_HUGEPAGE
        /* Whole huge pages only: the last one would be resident for a small rest. */
        madvise(p, (size + ALIGN) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    }
    return (header *)(void *)p;
}

static void give_back(header *h) {
    size_t align;
    if (h->size < MAPPED) free(h);
    else munmap(h, whole(h->size, &align));
}

/* The buffer with another size, with the pages it has; NULL where that cannot be, and the buffer is gone. */
static header *resized(header *h, size_t size) {
    size_t align, from = whole(h->size, &align), to = whole(size, &align);
#ifdef MREMAP_MAYMOVE
    void *p = mremap(h, from, to, MREMAP_MAYMOVE);
    if (p != MAP_FAILED) return p;
#endif
    (void)to;
    munmap(h, from);
    return NULL;
}

/* A cached buffer that may be resized to the size of a class, of those the nearest; shorter or longer sequences ask for others
 * than the ones before, and the system would clear new pages. NULL if there is none. */
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
    pthread_mutex_lock(&pool.lock);
    header *h = pool.free[index], *other = NULL;
    if (h) take(h);
    /* What is cached far beyond the peak serves no size that is asked for now; without any room to spare, work that repeats
     * itself would have new pages cleared for the same sizes every time. */
    const size_t most = pool.stats.peak + (pool.stats.peak < SPARE ? pool.stats.peak : SPARE);
    while (!h && pool.oldest && pool.stats.in_use + pool.stats.cached + size > most) {
        if (!other && (other = similar(index, size))) take(other);
        else give_back(take(pool.oldest));
    }
    pool.stats.in_use += size;
    if (pool.stats.in_use > pool.stats.peak) pool.stats.peak = pool.stats.in_use;
    pthread_mutex_unlock(&pool.lock);
    if (!h) {
        if (other) h = resized(other, size);
        if (!h) h = allocate(size);
        if (!h) {
            pl_buffers_trim();
            h = allocate(size);
        }
        if (!h) {
            pthread_mutex_lock(&pool.lock);
            pool.stats.in_use -= size;
            pool.stats.peak = pool.stats.in_use; /* what was refused is no reason to keep so much */
            pthread_mutex_unlock(&pool.lock);
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
    while (pool.oldest) give_back(take(pool.oldest));
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
__attribute__((constructor)) static void watch_fork(void) {
    pthread_atfork(lock_pool, unlock_pool, unlock_pool);
}
