/* The ring belongs to one native thread ("the driver"): it creates the ring, fills it, waits, and finishes tickets, so
 * that neither Python's lock nor the life of the submitting thread is on the path (requests of a thread that exits are
 * cancelled by the kernel), and so that the kernel may defer its completion work to that thread
 * (IORING_SETUP_DEFER_TASKRUN). Others only append to a queue under the mutex and kick the driver through an eventfd
 * that the ring itself reads.
 *
 * A ticket is prepared, released (queued) and over. Whoever announces a release (a CUDA stream, by a host function) does
 * not know whether the ticket's owner, or the engine's, is gone by then, so each announced release owns a share of both.
 *
 * A ticket is a batch of requests with a cursor; a block is the part of a request that is in the kernel now. There are
 * queue_depth blocks, of which at most limit are in use; a batch may be of any size. A block whose transfer was short stays in its slot and is issued
 * again for the rest.
 */
#include "uring_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* Leaves the mutex and the condition alone: on Linux they own nothing, and in a forked child their state is the
 * parent's, for whose waiters pthread_cond_destroy would wait. */
void memopt_uring_free(memopt_uring *engine)
{
    if (atomic_fetch_sub(&engine->num_owners, 1) != 1)
        return;
    free(engine->blocks);
    free(engine->free_blocks);
    free(engine->again);
    free(engine);
}

int memopt_uring_open(uint32_t queue_depth, uint64_t block_bytes, int32_t use_sqpoll, memopt_uring **out)
{
    if (queue_depth == 0 || queue_depth > 4096 || block_bytes == 0 || block_bytes > (1u << 30))
        return -EINVAL;
    memopt_uring *engine = calloc(1, sizeof *engine);
    if (engine == NULL)
        return -ENOMEM;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&engine->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&engine->lock, NULL);
    engine->state = 1;
    atomic_init(&engine->num_owners, 1);
    engine->queue_depth = engine->num_free = engine->limit = queue_depth;
    engine->block_bytes = block_bytes;
    engine->use_sqpoll = use_sqpoll;
    engine->blocks = calloc(queue_depth, sizeof *engine->blocks);
    engine->free_blocks = calloc(queue_depth, sizeof *engine->free_blocks);
    engine->again = calloc(queue_depth, sizeof *engine->again);
    engine->kick_fd = eventfd(0, EFD_CLOEXEC);
    int rc = engine->kick_fd < 0 ? -errno : 0;
    if (engine->blocks == NULL || engine->free_blocks == NULL || engine->again == NULL)
        rc = -ENOMEM;
    for (uint32_t i = 0; rc == 0 && i < queue_depth; i++)
        engine->free_blocks[i] = i;
    if (rc == 0)
        rc = memopt_start_driver(engine);
    if (rc != 0) {
        if (engine->kick_fd >= 0)
            close(engine->kick_fd);
        memopt_uring_free(engine);
        return rc;
    }
    *out = engine;
    return 0;
}

uint32_t memopt_uring_features(memopt_uring *engine)
{
    return engine->features;
}

int memopt_uring_limit(memopt_uring *engine, uint32_t num_blocks)
{
    if (num_blocks == 0 || num_blocks > engine->queue_depth)
        return -EINVAL;
    pthread_mutex_lock(&engine->lock);
    engine->limit = num_blocks;
    if (engine->kick_fd >= 0)
        memopt_kick(engine); /* there may be room for more now */
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int memopt_uring_prepare(memopt_uring *engine, const memopt_uring_request *requests, uint32_t num_requests,
                         uint64_t when_over, memopt_uring_ticket **out)
{
    for (uint32_t i = 0; i < num_requests; i++) {
        const memopt_uring_request *request = &requests[i];
        if (request->nbytes == 0 || request->unit_bytes == 0)
            return -EINVAL;
        if (request->copy_bytes > request->nbytes || (request->copy_bytes != 0 && request->nbytes > engine->block_bytes))
            return -EINVAL; /* a payload is copied when its one block begins or ends */
    }
    memopt_uring_ticket *ticket = calloc(1, sizeof *ticket);
    size_t size = (size_t)num_requests * sizeof *requests;
    if (ticket == NULL)
        return -ENOMEM;
    ticket->requests = malloc(size ? size : 1);
    if (ticket->requests == NULL) {
        free(ticket);
        return -ENOMEM;
    }
    if (size)
        memcpy(ticket->requests, requests, size);
    ticket->num_requests = num_requests;
    ticket->engine = engine;
    ticket->when_over = (_Atomic uint32_t *)(uintptr_t)when_over;
    atomic_init(&ticket->num_owners, 1);
    *out = ticket;
    return 0;
}

void memopt_uring_arm(memopt_uring_ticket *ticket)
{
    atomic_fetch_add(&ticket->num_owners, 1);
    atomic_fetch_add(&ticket->engine->num_owners, 1);
}

/* Called with the lock held. The kick is under it too: close() forgets the descriptor there. */
static void queue(memopt_uring *engine, memopt_uring_ticket *ticket)
{
    ticket->released = true;
    int rc = engine->stopping ? -ECANCELED : engine->state;
    if (rc != 0 || ticket->num_requests == 0) {
        ticket->result.error = -rc;
        memopt_end_ticket(engine, ticket);
        return;
    }
    ticket->queued = true;
    if (engine->tail != NULL)
        engine->tail->next = ticket;
    else
        engine->head = ticket;
    engine->tail = ticket;
    memopt_kick(engine);
}

void memopt_uring_release(void *argument)
{
    memopt_uring_ticket *ticket = argument;
    memopt_uring *engine = ticket->engine;
    pthread_mutex_lock(&engine->lock);
    if (!ticket->released && !ticket->finished)
        queue(engine, ticket);
    pthread_mutex_unlock(&engine->lock);
    memopt_uring_ticket_free(ticket);
    memopt_uring_free(engine);
}

int memopt_uring_cancel(memopt_uring_ticket *ticket)
{
    memopt_uring *engine = ticket->engine;
    pthread_mutex_lock(&engine->lock);
    bool cancelled = !ticket->released && !ticket->finished;
    if (cancelled) {
        ticket->result.error = ECANCELED;
        memopt_end_ticket(engine, ticket);
    }
    pthread_mutex_unlock(&engine->lock);
    return cancelled;
}

int memopt_uring_is_released(memopt_uring_ticket *ticket)
{
    pthread_mutex_lock(&ticket->engine->lock);
    bool released = ticket->released;
    pthread_mutex_unlock(&ticket->engine->lock);
    return released;
}

int memopt_uring_submit(memopt_uring *engine, const memopt_uring_request *requests, uint32_t num_requests,
                        uint64_t when_over, memopt_uring_ticket **out)
{
    memopt_uring_ticket *ticket;
    int rc = memopt_uring_prepare(engine, requests, num_requests, when_over, &ticket);
    if (rc != 0)
        return rc;
    pthread_mutex_lock(&engine->lock);
    rc = engine->stopping ? -ECANCELED : engine->state;
    if (rc == 0)
        queue(engine, ticket);
    pthread_mutex_unlock(&engine->lock);
    if (rc != 0) {
        memopt_uring_ticket_free(ticket);
        return rc;
    }
    *out = ticket;
    return 0;
}

static void deadline_after(int64_t timeout_ns, struct timespec *out)
{
    clock_gettime(CLOCK_MONOTONIC, out);
    out->tv_sec += timeout_ns / 1000000000;
    out->tv_nsec += timeout_ns % 1000000000;
    if (out->tv_nsec >= 1000000000) {
        out->tv_sec++;
        out->tv_nsec -= 1000000000;
    }
}

int memopt_uring_wait(memopt_uring *engine, memopt_uring_ticket *ticket, int64_t timeout_ns,
                      memopt_uring_result *result)
{
    struct timespec deadline;
    if (timeout_ns > 0)
        deadline_after(timeout_ns, &deadline);
    pthread_mutex_lock(&engine->lock);
    int rc = 0;
    while (!ticket->finished && timeout_ns != 0 && rc == 0) {
        rc = timeout_ns < 0 ? pthread_cond_wait(&engine->changed, &engine->lock)
                            : pthread_cond_timedwait(&engine->changed, &engine->lock, &deadline);
    }
    bool finished = ticket->finished;
    *result = ticket->result;
    pthread_mutex_unlock(&engine->lock);
    return finished ? 1 : 0;
}

void memopt_uring_ticket_free(memopt_uring_ticket *ticket)
{
    if (ticket == NULL || atomic_fetch_sub(&ticket->num_owners, 1) != 1)
        return;
    free(ticket->requests);
    free(ticket);
}

void memopt_uring_count(memopt_uring *engine, memopt_uring_counters *out)
{
    pthread_mutex_lock(&engine->lock);
    *out = engine->counters;
    pthread_mutex_unlock(&engine->lock);
}

void memopt_uring_inject(memopt_uring *engine, int32_t result, uint32_t skip, uint32_t count, uint64_t max_bytes)
{
    pthread_mutex_lock(&engine->lock);
    engine->inject_result = result;
    engine->inject_skip = skip;
    engine->inject_count = count;
    engine->inject_max_bytes = max_bytes;
    pthread_mutex_unlock(&engine->lock);
}

#ifndef MEMOPT_LIBURING
#define MEMOPT_LIBURING ""
#endif
const char *memopt_uring_liburing(void)
{
    return MEMOPT_LIBURING;
}

int memopt_uring_close(memopt_uring *engine)
{
    pthread_mutex_lock(&engine->lock);
    bool again = engine->stopping;
    engine->stopping = true;
    if (!again)
        memopt_kick(engine);
    pthread_mutex_unlock(&engine->lock);
    if (again)
        return 0;
    int rc = -pthread_join(engine->driver, NULL);
    pthread_mutex_lock(&engine->lock);
    close(engine->kick_fd);
    engine->kick_fd = -1;
    pthread_mutex_unlock(&engine->lock);
    return rc;
}

/* No lock: a thread of the parent may have held it when the process forked. */
void memopt_uring_abandon(memopt_uring *engine)
{
    if (engine->kick_fd < 0)
        return;
    close(engine->ring.ring_fd);
    close(engine->kick_fd);
    engine->kick_fd = -1;
}
