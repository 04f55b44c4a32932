/* The threads that work on a call: one call at a time has them, the others wait.

   Where torch runs on an OpenMP library, `team` is that library's: its threads spin for some milliseconds after every
   operator, and others beside them would share their cores. Elsewhere, and after fork, where OpenMP's threads are gone
   but not missed, POSIX threads of our own do it. A call takes as many threads as it asks for, itself among them; the rest are started when first wanted and sleep
   between calls, after a short spin that spares a row of calls the waking. Nothing depends on who takes part: what is
   to be done comes from a queue of jobs. After fork the child has no threads, and starts its own.
*/
#pragma once
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>

#define MAX_THREADS 512
#define SPINS 2000 /* about 50 µs */

typedef void (*task)(void *context, int member);
typedef void (*parallel)(void (*work)(void *), void *context, unsigned threads, unsigned flags); /* GOMP_parallel */

static struct {
    pthread_mutex_t call, lock; /* `call` is held for a whole call; `lock` guards what follows */
    pthread_cond_t wake, idle;
    int threads, wanted, joined, active;
    atomic_uint calls;
    task work;
    void *context;
    parallel team;
    atomic_int members; /* of the team, so far */
} pool = {.call = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .idle = PTHREAD_COND_INITIALIZER};

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void *pool_worker(void *unused) {
    unsigned seen = 0;
    (void)unused;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&pool.calls, memory_order_relaxed) == seen; i++)
            pause_cpu();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load_explicit(&pool.calls, memory_order_relaxed) == seen)
            pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load_explicit(&pool.calls, memory_order_relaxed);
        if (pool.joined < pool.wanted) { /* `wanted` is 0 once a call has ended */
            int member = ++pool.joined;
            task work = pool.work;
            void *context = pool.context;
            pool.active++;
            pthread_mutex_unlock(&pool.lock);
            work(context, member);
            pthread_mutex_lock(&pool.lock);
            if (--pool.active == 0)
                pthread_cond_signal(&pool.idle);
        }
        pthread_mutex_unlock(&pool.lock);
    }
    return 0;
}

static void pool_before_fork(void) {
    pthread_mutex_lock(&pool.call);
    pthread_mutex_lock(&pool.lock);
}
static void pool_in_parent(void) {
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.call);
}
static void pool_in_child(void) {
    pthread_mutex_init(&pool.call, 0);
    pthread_mutex_init(&pool.lock, 0);
    pthread_cond_init(&pool.wake, 0);
    pthread_cond_init(&pool.idle, 0);
    pool.team = 0;
    pool.threads = pool.wanted = pool.joined = pool.active = 0;
    atomic_store(&pool.calls, 0);
}
static void pool_init(void) { pthread_atfork(pool_before_fork, pool_in_parent, pool_in_child); }
static pthread_once_t pool_once = PTHREAD_ONCE_INIT;

/* with `lock` held: start threads up to `others`; fewer, when the system gives no more */
static void pool_grow(int others) {
    sigset_t all, before;
    pthread_attr_t attributes;
    if (pool.threads >= others)
        return;
    sigfillset(&all); /* signals are for the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.threads < others) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, pool_worker, 0))
            break;
        pool.threads++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

/* `pool_begin` ... `pool_run` ... `pool_end`: between the first and the last the caller alone has the pool */
static void pool_begin(void) {
    pthread_once(&pool_once, pool_init);
    pthread_mutex_lock(&pool.call);
}
static void pool_end(void) { pthread_mutex_unlock(&pool.call); }

static void pool_join(void *unused) {
    (void)unused;
    pool.work(pool.context, atomic_fetch_add_explicit(&pool.members, 1, memory_order_relaxed));
}

static void pool_run(task work, void *context, int threads) {
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    if (threads > 1 && pool.team) {
        pool.work = work, pool.context = context;
        atomic_store(&pool.members, 0);
        pool.team(pool_join, 0, (unsigned)threads, 0);
        return;
    }
    if (threads > 1) {
        pthread_mutex_lock(&pool.lock);
        pool_grow(threads - 1);
        pool.work = work, pool.context = context, pool.wanted = threads - 1, pool.joined = 0;
        atomic_fetch_add_explicit(&pool.calls, 1, memory_order_relaxed);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    work(context, 0);
    if (threads > 1) {
        pthread_mutex_lock(&pool.lock);
        pool.wanted = 0;
        while (pool.active)
            pthread_cond_wait(&pool.idle, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
    }
}
