/* The thread that owns the ring. */
#include "uring_internal.h"

#include <signal.h>
#include <time.h>

#ifndef IORING_SETUP_DEFER_TASKRUN
#error "memopt needs liburing 2.3 or later"
#endif

static int open_ring(memopt_uring *engine)
{
    static const unsigned ladder[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        IORING_SETUP_COOP_TASKRUN,
        0,
    };
    unsigned entries = engine->queue_depth + 1; /* and the kick */
    int rc = -EINVAL;
    if (engine->use_sqpoll) {
        /* The polling thread can complete a whole batch before it gives the batch's entries back. Without as many
         * again there would be none for the next batch, and nobody to wake the driver when there are. */
        struct io_uring_params params = {.flags = IORING_SETUP_SQPOLL, .sq_thread_idle = 50};
        rc = io_uring_queue_init_params(2 * entries, &engine->ring, &params);
        engine->features = rc == 0 ? 1 : 0;
        return rc;
    }
    for (unsigned i = 0; i < sizeof ladder / sizeof *ladder && rc == -EINVAL; i++) {
        struct io_uring_params params = {.flags = ladder[i]};
        rc = io_uring_queue_init_params(entries, &engine->ring, &params);
        if (rc == 0 && i == 0)
            engine->features |= 2;
    }
    return rc;
}

static void announce(memopt_uring *engine, int state)
{
    pthread_mutex_lock(&engine->lock);
    engine->state = state;
    pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->lock);
}

static void sleep_1ms(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* Give the kernel what was prepared and wait for one completion. Transient refusals are tried again for ten seconds. */
static int enter(memopt_uring *engine)
{
    for (int failures = 0;; failures++) {
        int rc = io_uring_submit_and_wait(&engine->ring, 1);
        if (rc >= 0 || rc == -EINTR)
            return 0;
        /* A call that submits nothing does not look at completions either, and these are what ends a shortage. */
        io_uring_get_events(&engine->ring);
        if (io_uring_cq_ready(&engine->ring) != 0)
            return 0;
        if ((rc != -EAGAIN && rc != -EBUSY && rc != -ENOMEM) || failures == MAX_ENTER_FAILURES)
            return rc;
        sleep_1ms();
    }
}

/* The ring broke. What the kernel has already can still move bytes from and to the memory of tickets, so these are not
 * ended at once: first everything is collected that still comes. The kick is made to come too. Lock held. */
static void collect_what_comes(memopt_uring *engine, int rc)
{
    engine->state = rc; /* nothing new is taken */
    memopt_kick(engine);
    for (int i = 0; i < MAX_SETTLE_TRIES && memopt_num_in_kernel(engine) != 0; i++) {
        pthread_mutex_unlock(&engine->lock);
        io_uring_get_events(&engine->ring);
        sleep_1ms();
        pthread_mutex_lock(&engine->lock);
        memopt_reap(engine);
    }
}

/* A forked child may hold the ring's descriptor for as long as it lives. Memory and files must not stay that long. */
static void forget_registrations(memopt_uring *engine)
{
    if (engine->features & 4)
        io_uring_unregister_files(&engine->ring);
    if (engine->features & 8)
        io_uring_unregister_buffers(&engine->ring);
}

static void *drive(void *argument)
{
    memopt_uring *engine = argument;
    pthread_setname_np(pthread_self(), "memopt-uring");
    int rc = open_ring(engine);
    if (rc < 0) {
        announce(engine, rc);
        return NULL;
    }
    io_uring_ring_dontfork(&engine->ring); /* its mappings alone would keep the ring alive in a child */
    if (io_uring_register_files_sparse(&engine->ring, MAX_FILES) == 0)
        engine->features |= 4;
    if (io_uring_register_buffers_sparse(&engine->ring, MAX_BUFFERS) == 0)
        engine->features |= 8;
    announce(engine, 0);

    pthread_mutex_lock(&engine->lock);
    for (;;) {
        memopt_reap(engine);
        memopt_serve_control(engine);
        memopt_fill_ring(engine);
        if (engine->stopping && engine->head == NULL && engine->num_free == engine->queue_depth)
            break;
        engine->counters.num_enters++;
        pthread_mutex_unlock(&engine->lock);
        rc = enter(engine);
        pthread_mutex_lock(&engine->lock);
        if (rc < 0) {
            collect_what_comes(engine, rc);
            memopt_fail_everything(engine, rc);
            break;
        }
    }
    pthread_mutex_unlock(&engine->lock);
    if (rc >= 0)
        forget_registrations(engine);
    io_uring_queue_exit(&engine->ring);
    return NULL;
}

int memopt_start_driver(memopt_uring *engine)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
    int rc = pthread_create(&engine->driver, NULL, drive, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0)
        return -rc;
    pthread_mutex_lock(&engine->lock);
    while (engine->state == 1)
        pthread_cond_wait(&engine->changed, &engine->lock);
    rc = engine->state;
    pthread_mutex_unlock(&engine->lock);
    if (rc != 0)
        pthread_join(engine->driver, NULL);
    return rc;
}
