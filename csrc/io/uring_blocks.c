/* Tickets are cut into blocks, blocks go to the kernel and come back, until they are over. */
#include "uring_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

/* ---------------------------------------------------------------------------------------------- tickets and blocks */

void memopt_end_ticket(memopt_uring *engine, memopt_uring_ticket *ticket)
{
    ticket->finished = true;
    if (ticket->when_over != NULL)
        atomic_store_explicit(ticket->when_over, 1, memory_order_release);
    pthread_cond_broadcast(&engine->changed);
}

static void settle_if_over(memopt_uring *engine, memopt_uring_ticket *ticket)
{
    if (!ticket->queued && ticket->num_blocks == 0 && !ticket->finished)
        memopt_end_ticket(engine, ticket);
}

static void copy_payload(const memopt_uring_request *request)
{
    void *block = (void *)(uintptr_t)request->address, *payload = (void *)(uintptr_t)request->payload;
    if (request->copy_bytes != 0)
        memcpy(request->is_write ? block : payload, request->is_write ? payload : block, request->copy_bytes);
}

static void fail(memopt_uring_ticket *ticket, const block_t *block, int error)
{
    if (ticket->result.error != 0)
        return;
    ticket->result.error = error;
    ticket->result.request = block->request;
    ticket->result.done_bytes = block->begin + block->done;
}

static void retire(memopt_uring *engine, uint32_t index)
{
    memopt_uring_ticket *ticket = engine->blocks[index].ticket;
    engine->free_blocks[engine->num_free++] = index;
    ticket->num_blocks--;
    settle_if_over(engine, ticket);
}

static void unqueue_head(memopt_uring *engine)
{
    memopt_uring_ticket *ticket = engine->head;
    engine->head = ticket->next;
    if (engine->head == NULL)
        engine->tail = NULL;
    ticket->queued = false;
    settle_if_over(engine, ticket);
}

/* Cut the next block from the first ticket that has one; false when there is none. Called with the lock held. */
static bool cut_block(memopt_uring *engine)
{
    for (;;) {
        memopt_uring_ticket *ticket = engine->head;
        if (ticket == NULL)
            return false;
        if (ticket->result.error != 0) {
            unqueue_head(engine);
            continue;
        }
        const memopt_uring_request *request = &ticket->requests[ticket->cursor];
        uint64_t left = request->nbytes - ticket->cursor_bytes;
        uint64_t nbytes = left < engine->block_bytes ? left : engine->block_bytes;
        if (request->is_write && ticket->cursor_bytes == 0)
            copy_payload(request);
        uint32_t index = engine->free_blocks[--engine->num_free];
        engine->blocks[index] = (block_t){
            .ticket = ticket,
            .request = ticket->cursor,
            .begin = ticket->cursor_bytes,
            .nbytes = nbytes,
            .direct = request->is_direct != 0,
        };
        engine->again[engine->num_again++] = index;
        engine->counters.num_blocks++;
        if (engine->queue_depth - engine->num_free > engine->counters.peak_blocks)
            engine->counters.peak_blocks = engine->queue_depth - engine->num_free;
        ticket->num_blocks++;
        ticket->cursor_bytes += nbytes;
        if (ticket->cursor_bytes == request->nbytes) {
            ticket->cursor++;
            ticket->cursor_bytes = 0;
        }
        if (ticket->cursor == ticket->num_requests)
            unqueue_head(engine);
        return true;
    }
}

/* ----------------------------------------------------------------------------------------------------- submission */

static int find_region(const memopt_uring *engine, uint64_t address, uint64_t nbytes)
{
    for (uint32_t i = 0; i < engine->num_regions; i++) {
        const region_t *region = &engine->regions[i];
        if (address >= region->address && address + nbytes <= region->address + region->nbytes)
            return (int)i;
    }
    return -1;
}

static void prepare(memopt_uring *engine, struct io_uring_sqe *sqe, uint32_t index)
{
    block_t *block = &engine->blocks[index];
    const memopt_uring_request *request = &block->ticket->requests[block->request];
    uint64_t at = block->begin + block->done;
    uint64_t left = block->nbytes - block->done;
    int slot = block->direct ? request->direct_slot : request->plain_slot;
    int fd = slot >= 0 ? slot : (block->direct ? request->direct_fd : request->plain_fd);

    if (engine->inject_max_bytes != 0 && left > engine->inject_max_bytes)
        left = engine->inject_max_bytes;
    void *address = (void *)(uintptr_t)(request->address + at);
    int region = find_region(engine, request->address + at, left);
    if (region >= 0)
        engine->counters.num_fixed_buffers++;
    if (request->is_write && region >= 0)
        io_uring_prep_write_fixed(sqe, fd, address, (unsigned)left, request->offset + at, region);
    else if (request->is_write)
        io_uring_prep_write(sqe, fd, address, (unsigned)left, request->offset + at);
    else if (region >= 0)
        io_uring_prep_read_fixed(sqe, fd, address, (unsigned)left, request->offset + at, region);
    else
        io_uring_prep_read(sqe, fd, address, (unsigned)left, request->offset + at);
    if (request->is_write && !block->direct)
        sqe->rw_flags = RWF_DSYNC; /* a write-back error must belong to this write */
    sqe->flags |= (slot >= 0 ? IOSQE_FIXED_FILE : 0) | (block->force_async ? IOSQE_ASYNC : 0);
    io_uring_sqe_set_data64(sqe, index);
}

static void arm_kick(memopt_uring *engine)
{
    struct io_uring_sqe *sqe = engine->kick_armed ? NULL : io_uring_get_sqe(&engine->ring);
    if (sqe == NULL)
        return;
    io_uring_prep_read(sqe, engine->kick_fd, &engine->kick_value, sizeof engine->kick_value, 0);
    io_uring_sqe_set_data64(sqe, KICK_TAG);
    engine->kick_armed = true;
}

/* Called with the lock held: only the driver touches the ring, but the lists of blocks belong to tickets. */
void memopt_fill_ring(memopt_uring *engine)
{
    arm_kick(engine);
    while (engine->num_again != 0 ||
           (engine->num_free > engine->queue_depth - engine->limit && cut_block(engine))) {
        uint32_t index = engine->again[engine->num_again - 1];
        block_t *block = &engine->blocks[index];
        if (block->ticket->result.error != 0) {
            engine->num_again--;
            retire(engine, index);
            continue;
        }
        struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring);
        if (sqe == NULL)
            return;
        engine->num_again--;
        prepare(engine, sqe, index);
    }
}

/* ---------------------------------------------------------------------------------------------------- completions */

static int injected(memopt_uring *engine, int result)
{
    if (engine->inject_count == 0)
        return result;
    if (engine->inject_skip > 0) {
        engine->inject_skip--;
        return result;
    }
    engine->inject_count--;
    return engine->inject_result;
}

static void issue_again(memopt_uring *engine, uint32_t index)
{
    engine->again[engine->num_again++] = index;
}

static void complete_block(memopt_uring *engine, uint32_t index, int result)
{
    block_t *block = &engine->blocks[index];
    memopt_uring_ticket *ticket = block->ticket;
    const memopt_uring_request *request = &ticket->requests[block->request];

    result = injected(engine, result);
    if (result == -EINTR || result == -EAGAIN) {
        block->force_async = result == -EAGAIN;
        engine->counters.num_retried++;
        issue_again(engine, index);
        return;
    }
    if (result == -EINVAL && block->direct) {
        block->direct = false;
        engine->counters.num_retried++;
        issue_again(engine, index);
        return;
    }
    if (result <= 0) {
        fail(ticket, block, result < 0 ? -result : ENODATA);
        retire(engine, index);
        return;
    }
    block->done += (uint64_t)result;
    if (block->done < block->nbytes) {
        if ((block->begin + block->done) % request->unit_bytes != 0)
            block->direct = false;
        engine->counters.num_resumed++;
        issue_again(engine, index);
        return;
    }
    if (!request->is_write && block->begin + block->nbytes == request->nbytes)
        copy_payload(request);
    retire(engine, index);
}

void memopt_reap(memopt_uring *engine)
{
    struct io_uring_cqe *cqe;
    unsigned head, num = 0;

    io_uring_for_each_cqe(&engine->ring, head, cqe) {
        num++;
        if (cqe->user_data == KICK_TAG)
            engine->kick_armed = false;
        else
            complete_block(engine, (uint32_t)cqe->user_data, cqe->res);
    }
    io_uring_cq_advance(&engine->ring, num);
}

/* What was prepared and taken, and has not come back; the kick counts too. */
uint32_t memopt_num_in_kernel(memopt_uring *engine)
{
    uint32_t num_blocks = engine->queue_depth - engine->num_free - engine->num_again;
    return num_blocks + engine->kick_armed - io_uring_sq_ready(&engine->ring);
}

/* The ring itself broke: nothing more can be trusted to complete, so every ticket fails. Called with the lock held. */
void memopt_fail_everything(memopt_uring *engine, int rc)
{
    while (engine->head != NULL) {
        engine->head->result.error = engine->head->result.error ? engine->head->result.error : -rc;
        unqueue_head(engine);
    }
    bool *is_free = calloc(engine->queue_depth, sizeof *is_free);
    for (uint32_t i = 0; is_free != NULL && i < engine->num_free; i++)
        is_free[engine->free_blocks[i]] = true;
    for (uint32_t i = 0; is_free != NULL && i < engine->queue_depth; i++) {
        if (!is_free[i]) {
            fail(engine->blocks[i].ticket, &engine->blocks[i], -rc);
            retire(engine, i);
        }
    }
    free(is_free);
    if (engine->control != NULL && engine->control->op != CONTROL_NONE) {
        engine->control->rc = rc;
        engine->control->op = CONTROL_NONE;
    }
    pthread_cond_broadcast(&engine->changed);
}
