/* A small pool: the caller works too, workers spin briefly between jobs, then park.
 *
 * A job is published as one word, `ticket` = generation << 32 | chunks left. Whoever lowers the
 * count owns that chunk, and the job cannot end before it is done; so a worker that sleeps through
 * a job delays nobody. One thread means that no worker is ever made or woken.
 */
#define _GNU_SOURCE
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { CHUNKS_PER_THREAD = 4, SPIN_NS = 40000, LOOKS_PER_TIME = 64 };
enum { PATIENT_LOOKS = 1000 };
enum { STACK_BYTES = 128 << 10 }; /* more than any kernel's locals take */

static struct {
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic size_t done;
    _Alignas(64) _Atomic size_t num_parked;
    chunk_fn run;
    void *job;
    size_t num_chunks;
    _Atomic size_t num_threads;
    size_t num_started;
    bool is_pinned;
    int cpus[MAX_THREADS];
    uint32_t generation;
    pthread_mutex_t busy, parking;
    pthread_cond_t wake;
} pool = {.num_threads = 1,
          .busy = PTHREAD_MUTEX_INITIALIZER,
          .parking = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Does one chunk of the current job; false if none is left. */
static bool work_once(void) {
    uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    do {
        if ((uint32_t)ticket == 0) return false;
    } while (!atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket - 1,
                                                    memory_order_acq_rel, memory_order_acquire));
    pool.run(pool.job, pool.num_chunks - (uint32_t)ticket);
    atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
    return true;
}

static bool has_work(size_t worker) {
    return worker < atomic_load(&pool.num_threads) && (uint32_t)atomic_load(&pool.ticket) != 0;
}

static void park(size_t worker) {
    pthread_mutex_lock(&pool.parking);
    atomic_fetch_add(&pool.num_parked, 1);
    while (!has_work(worker)) pthread_cond_wait(&pool.wake, &pool.parking);
    atomic_fetch_sub(&pool.num_parked, 1);
    pthread_mutex_unlock(&pool.parking);
}

/* Works until there has been nothing to do for a while. */
static void spin(size_t worker) {
    int64_t idle_since = now_ns();
    while (now_ns() - idle_since < SPIN_NS) {
        for (int look = 0; look < LOOKS_PER_TIME; look++) {
            while (has_work(worker) && work_once()) idle_since = 0;
            if (idle_since == 0) idle_since = now_ns();
            relax();
        }
    }
}

static void *work(void *worker) {
    for (;;) {
        spin((size_t)(uintptr_t)worker);
        park((size_t)(uintptr_t)worker);
    }
    return NULL;
}

/* A forked child has no workers, and nobody to give back what another thread held. */
static void forget_workers(void) {
    atomic_store(&pool.ticket, 0);
    atomic_store(&pool.num_parked, 0);
    pool.num_started = 0;
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.parking, NULL);
    pthread_cond_init(&pool.wake, NULL);
}

/* Returns an errno; `pool.cpus` holds for workers that are yet to be made. */
static int start_worker(size_t worker) {
    pthread_attr_t attributes;
    int failure = pthread_attr_init(&attributes);
    if (failure) return failure;
    if (pool.is_pinned) {
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(pool.cpus[worker], &own);
        pthread_attr_setaffinity_np(&attributes, sizeof own, &own);
    }
    pthread_t thread;
    failure = pthread_create(&thread, &attributes, work, (void *)(uintptr_t)worker);
    pthread_attr_destroy(&attributes);
    if (!failure) pthread_detach(thread);
    return failure;
}

/* Makes the workers that are missing; fewer than asked for if the system refuses. */
static void start_workers(void) {
    static bool is_told_of_forks = false;
    if (!is_told_of_forks) is_told_of_forks = !pthread_atfork(NULL, NULL, forget_workers);
    while (pool.num_started + 1 < pool.num_threads) {
        if (start_worker(pool.num_started + 1)) return;
        pool.num_started++;
    }
}

void pool_set_num_threads(size_t num_threads, const int *cpus) {
    pthread_mutex_lock(&pool.busy);
    pool.num_threads = num_threads;
    pool.is_pinned = cpus != NULL;
    for (size_t i = 0; cpus && i < pool.num_threads; i++) pool.cpus[i] = cpus[i];
    pthread_mutex_unlock(&pool.busy);
}

size_t pool_num_threads(void) { return pool.num_threads; }

size_t pool_num_chunks(size_t num_units) {
    size_t wanted = pool.num_threads == 1 ? 1 : pool.num_threads * CHUNKS_PER_THREAD;
    return num_units < wanted ? num_units : wanted;
}

/* Does a job with all threads there are; the caller holds `busy`. */
static void share(chunk_fn run, void *job, size_t num_chunks) {
    pool.run = run;
    pool.job = job;
    pool.num_chunks = num_chunks;
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
    atomic_store(&pool.ticket, (uint64_t)++pool.generation << 32 | num_chunks);
    if (atomic_load(&pool.num_parked)) {
        pthread_mutex_lock(&pool.parking);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.parking);
    }
    while (work_once()) continue;
    for (int looks = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < num_chunks;) {
        relax();
        if (++looks > PATIENT_LOOKS) sched_yield(); /* the worker may be waiting for this core */
    }
}

void pool_run(chunk_fn run, void *job, size_t num_chunks) {
    /* alone, or with the pool taken by another thread's product: the same work, serially */
    if (num_chunks < 2 || pool.num_threads == 1 || pthread_mutex_trylock(&pool.busy)) {
        for (size_t chunk = 0; chunk < num_chunks; chunk++) run(job, chunk);
        return;
    }
    start_workers();
    share(run, job, num_chunks);
    pthread_mutex_unlock(&pool.busy);
}

static _Thread_local struct {
    void *memory;
    size_t bytes;
} own;

static void wipe_scratch(void) {
    if (own.memory) explicit_bzero(own.memory, own.bytes);
}

/* Where deeper calls have kept sums and queries. */
__attribute__((noinline)) static void wipe_stack(void) {
    char left[STACK_BYTES];
    explicit_bzero(left, sizeof left);
}

typedef struct {
    size_t num_threads;
    _Atomic size_t num_here;
} wipe_t;

/* A chunk for each thread: none ends before all have begun, so that nobody takes two. */
static void wipe_chunk(void *opaque, size_t chunk) {
    (void)chunk;
    wipe_t *job = opaque;
    wipe_scratch();
    wipe_stack();
    atomic_fetch_add(&job->num_here, 1);
    while (atomic_load(&job->num_here) < job->num_threads) sched_yield();
}

void pool_wipe(void) {
    pthread_mutex_lock(&pool.busy);
    size_t asked_for = pool.num_threads;
    wipe_t job = {.num_threads = pool.num_started + 1};
    pool.num_threads = job.num_threads; /* also those that were only wanted before */
    share(wipe_chunk, &job, job.num_threads);
    pool.num_threads = asked_for;
    pthread_mutex_unlock(&pool.busy);
}

void *scratch(size_t bytes) {
    if (own.bytes < bytes) {
        wipe_scratch(); /* the allocator hands it to somebody else */
        free(own.memory);
        own.bytes = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
        own.memory = aligned_alloc(64, own.bytes);
        if (own.memory == NULL) abort(); /* nothing sensible is left to do in a kernel */
    }
    return own.memory;
}
