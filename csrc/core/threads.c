/* The thread pool. It starts at its first use, serves one caller at a time, restarts after fork. */
#include "../pyloss.h"
#include "os.h"

#include <stdatomic.h>
#include <stdlib.h>

enum { MAX_THREADS = 256, SPINS = 4000, CLOSED = 1 << 30 };

static struct {
    pl_mutex caller; /* held by the thread whose job runs */
    pl_mutex lock;   /* guards wake and sleepers */
    pl_condition wake;
    int sleepers;
    int started; /* worker threads, without the caller */
    _Atomic int wanted;
    _Atomic uint64_t generation;
    _Atomic int joined; /* workers in the running job, plus CLOSED when it accepts no more */
    _Atomic int64_t next;
    int64_t n, grain;
    int shares; /* of the items, one for each thread, or 0: they are taken from one queue */
    pl_range_fn fn;
    const void *context;
    pl_thread thread[MAX_THREADS];
    uint64_t first_generation;
    _Atomic int stop;
} pool = {.caller = PL_MUTEX, .lock = PL_MUTEX, .wake = PL_CONDITION, .joined = CLOSED};

static _Thread_local int inside;
static _Thread_local pl_pieces counted; /* of this thread's latest call */
static _Thread_local int call_threads;  /* pl_num_threads() during a call; 0 outside of calls */

/* The items that are left of a thread's share: the first one in the low half, the end in the high
 * half. A cache line each. */
static struct { _Alignas(64) _Atomic uint64_t rest; } share[MAX_THREADS];

static void set_shares(int64_t n, int count) {
    for (int i = 0; i < count; i++)
        atomic_store_explicit(&share[i].rest,
                              (uint64_t)(n * i / count) | (uint64_t)(n * (i + 1) / count) << 32,
                              memory_order_relaxed);
}

/* Takes an item: the next one of the worker's own share, else the last one of another; -1: none is
 * left. */
static int64_t take(int worker) {
    for (int i = 0; i < pool.shares; i++) {
        _Atomic uint64_t *rest = &share[(worker + i) % pool.shares].rest;
        uint64_t seen = atomic_load_explicit(rest, memory_order_relaxed);
        while ((uint32_t)seen < seen >> 32) {
            const uint64_t left = i == 0 ? seen + 1 : seen - ((uint64_t)1 << 32);
            if (atomic_compare_exchange_weak_explicit(rest, &seen, left, memory_order_relaxed,
                                                      memory_order_relaxed))
                return i == 0 ? (int64_t)(uint32_t)seen : (int64_t)(left >> 32);
        }
    }
    return -1;
}

static void run_pieces(int worker) {
    if (pool.shares) {
        for (int64_t i; (i = take(worker)) >= 0;) pool.fn(pool.context, i, i + 1, worker);
        return;
    }
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&pool.next, pool.grain, memory_order_relaxed);
        if (begin >= pool.n) return;
        int64_t end = begin + pool.grain < pool.n ? begin + pool.grain : pool.n;
        pool.fn(pool.context, begin, end, worker);
    }
}

/* A worker that wakes late finds the job closed, so that the caller never waits for a thread that
 * the system has not scheduled. */
static int join_job(void) {
    int joined = atomic_load_explicit(&pool.joined, memory_order_acquire);
    while (!(joined & CLOSED))
        if (atomic_compare_exchange_weak_explicit(&pool.joined, &joined, joined + 1,
                                                  memory_order_acq_rel, memory_order_acquire))
            return 1;
    return 0;
}

static pl_thread_result PL_THREAD_CALL worker_main(void *argument) {
    int worker = (int)(intptr_t)argument;
    uint64_t seen = pool.first_generation;
    inside = 1;
    for (;;) {
        for (int i = 0;
             i < SPINS && atomic_load_explicit(&pool.generation, memory_order_acquire) == seen; i++)
            PL_RELAX();
        if (atomic_load_explicit(&pool.generation, memory_order_acquire) == seen) {
            pl_lock(&pool.lock);
            pool.sleepers++;
            while (atomic_load_explicit(&pool.generation, memory_order_acquire) == seen)
                pl_wait(&pool.wake, &pool.lock);
            pool.sleepers--;
            pl_unlock(&pool.lock);
        }
        seen = atomic_load_explicit(&pool.generation, memory_order_acquire);
        if (atomic_load_explicit(&pool.stop, memory_order_acquire)) return 0;
        if (!join_job()) continue;
        run_pieces(worker);
        atomic_fetch_sub_explicit(&pool.joined, 1, memory_order_release);
    }
}

static void announce(void) {
    atomic_fetch_add_explicit(&pool.generation, 1, memory_order_release);
    pl_lock(&pool.lock);
    if (pool.sleepers) pl_wake_all(&pool.wake);
    pl_unlock(&pool.lock);
}

static void stop_workers(void) {
    if (!pool.started) return;
    atomic_store(&pool.stop, 1);
    announce();
    for (int i = 0; i < pool.started; i++) pl_thread_join(pool.thread[i]);
    pool.started = 0;
    atomic_store(&pool.stop, 0);
}

/* Starts or stops workers. There are fewer than wanted if the system refuses. The caller holds
 * pool.caller. */
static void adjust_workers(void) {
    int wanted = pl_num_threads() - 1;
    if (pool.started == wanted) return;
    stop_workers();
    pool.first_generation = atomic_load(&pool.generation);
    for (int i = 0; i < wanted; i++) {
        if (pl_thread_start(&pool.thread[i], worker_main, (void *)(intptr_t)(i + 1))) break;
        pool.started++;
    }
}

static void run(int64_t n, int64_t grain, int near, pl_range_fn fn, const void *context) {
    if (n <= 0) return;
    if (grain < 1) grain = 1;
    if (!inside) {
        const int64_t pieces = (n + grain - 1) / grain;
        counted.meetings += pieces > 1;
        if (pieces > counted.most) counted.most = pieces;
    }
    if (inside || n <= grain || pl_num_threads() == 1 || !pl_try_lock(&pool.caller)) {
        /* In the pieces of a parallel run, so that results do not depend on threads. */
        for (int64_t begin = 0; begin < n; begin += grain)
            fn(context, begin, begin + grain < n ? begin + grain : n, 0);
        return;
    }
    adjust_workers();
    inside = 1;
    pool.n = n;
    pool.grain = grain;
    pool.fn = fn;
    pool.context = context;
    pool.shares = near ? pool.started + 1 : 0;
    set_shares(n, pool.shares);
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.joined, 0, memory_order_release);
    if (pool.started) announce();
    run_pieces(0);
    atomic_fetch_or_explicit(&pool.joined, CLOSED, memory_order_acq_rel);
    /* On a busy machine a worker may be waiting for this processor. */
    for (int i = 0; atomic_load_explicit(&pool.joined, memory_order_acquire) != CLOSED; i++) {
        if (i < SPINS) PL_RELAX();
        else pl_yield();
    }
    inside = 0;
    pl_unlock(&pool.caller);
}

void pl_parallel(int64_t n, int64_t grain, pl_range_fn fn, const void *context) {
    run(n, grain, 0, fn, context);
}
void pl_parallel_near(int64_t n, pl_range_fn fn, const void *context) {
    run(n, 1, n <= INT32_MAX, fn, context);
}

void pl_wait_for(const int32_t *progress, int32_t least) {
    for (int i = 0; __atomic_load_n(progress, __ATOMIC_ACQUIRE) < least; i++) {
        if (i < SPINS) PL_RELAX();
        else pl_yield();
    }
}
void pl_tell(int32_t *progress, int32_t value) {
    __atomic_store_n(progress, value, __ATOMIC_RELEASE);
}

static int threads_from_environment(void) {
    static const char *const names[] = {"PYLOSS_NUM_THREADS", "OMP_NUM_THREADS"};
    for (int i = 0; i < 2; i++) {
        const char *text = getenv(names[i]);
        int n = text ? atoi(text) : 0;
        if (n > 0) return n < MAX_THREADS ? n : MAX_THREADS;
    }
    int n = pl_cpu_count();
    return n < MAX_THREADS ? n : MAX_THREADS;
}

int pl_num_threads(void) {
    if (call_threads) return call_threads;
    int n = atomic_load_explicit(&pool.wanted, memory_order_relaxed);
    if (n == 0) {
        n = threads_from_environment();
        atomic_store_explicit(&pool.wanted, n, memory_order_relaxed);
    }
    return n;
}

void pl_set_num_threads(int n) {
    atomic_store(&pool.wanted, n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n);
}

void pl_enter_call(void) {
    call_threads = pl_num_threads();
    counted = (pl_pieces){0, 0};
}
pl_pieces pl_latest_pieces(void) { return counted; }
void pl_leave_call(void) { call_threads = 0; }

/* Threads do not survive fork: the child starts its own. */
static void before_fork(void) { pl_lock(&pool.caller); }
static void after_fork_parent(void) { pl_unlock(&pool.caller); }
static void after_fork_child(void) {
    pl_mutex_init(&pool.caller);
    pl_mutex_init(&pool.lock);
    pl_condition_init(&pool.wake);
    pool.sleepers = 0;
    pool.started = 0;
    pool.joined = CLOSED;
    inside = 0;
}
PL_AT_LOAD static void watch_fork(void) {
    pl_at_fork(before_fork, after_fork_parent, after_fork_child);
}
