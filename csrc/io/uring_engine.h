/* memopt's io_uring engine: batches of reads and writes on one ring, driven by one native thread.
 *
 * Plain C11, no Python, no torch, no printing. Every function that can fail returns -errno. This header is also the
 * cdef of the Python binding (build_uring.py drops the lines that start with '#'), so both cannot disagree.
 *
 * Threads: every function may be called from any thread; after close only wait, count, release and free have a meaning.
 * Memory: requests are copied; the bytes they point to must stay valid until their ticket is finished.
 */
#ifndef MEMOPT_URING_ENGINE_H
#define MEMOPT_URING_ENGINE_H
#include <stdint.h>

typedef struct memopt_uring memopt_uring;
typedef struct memopt_uring_ticket memopt_uring_ticket;

/* One contiguous read or write. A block that the kernel refuses as unaligned (EINVAL), or that a short transfer leaves
 * unaligned, goes on through plain_fd, which has no O_DIRECT. Slots are registered files, or -1. The first copy_bytes of
 * address stand for those at payload (0 for none), the odd tail of a direct transfer: copied after a read, before a write.
 * A request with a payload is at most one block. */
typedef struct {
    uint64_t address;
    uint64_t nbytes;
    uint64_t offset;
    uint64_t payload;
    uint32_t copy_bytes;
    uint32_t unit_bytes;
    int32_t direct_fd;
    int32_t direct_slot;
    int32_t plain_fd;
    int32_t plain_slot;
    int32_t is_write;
    int32_t is_direct;
} memopt_uring_request;

/* How a ticket ended: error is 0 or an errno (ENODATA: the kernel moved no byte), with the request and how far that got. */
typedef struct {
    int32_t error;
    uint32_t request;
    uint64_t done_bytes;
} memopt_uring_result;

typedef struct {
    uint64_t num_blocks;
    uint64_t num_resumed;
    uint64_t num_retried;
    uint64_t num_fixed_buffers;
    uint64_t num_enters;
    uint64_t peak_blocks; /* most in the kernel at a time */
} memopt_uring_counters;

/* The version of liburing that was compiled in; empty where the build could not tell. */
const char *memopt_uring_liburing(void);

/* What the ring was opened with: bit 0 SQPOLL, bit 1 deferred task work, bit 2 registered files, bit 3 buffers. */
int memopt_uring_open(uint32_t queue_depth, uint64_t block_bytes, int32_t use_sqpoll, memopt_uring **out);
uint32_t memopt_uring_features(memopt_uring *engine);

/* From now on at most num_blocks blocks (1 to the queue_depth of open) are in the kernel. */
int memopt_uring_limit(memopt_uring *engine, uint32_t num_blocks);

/* Queue a batch; never waits for the disk. The ticket is the caller's to free, after it is finished. when_over is the
 * address of a 32-bit word that becomes 1 when the ticket is over, well or badly (0 for none): stored with release order
 * after the last byte, by the thread that ends the ticket, so that a GPU can wait for it. It must outlive the ticket. */
int memopt_uring_submit(memopt_uring *engine, const memopt_uring_request *requests, uint32_t num_requests,
                        uint64_t when_over, memopt_uring_ticket **out);

/* The same in steps. A prepared ticket is not queued. arm() announces one call of release(), by anybody, even after the
 * ticket was freed or the engine closed. release() queues the ticket, or ends it with ECANCELED when the engine was closed;
 * it has the signature of a CUDA host function, takes no lock that is held across a system call that can block on the
 * disk, and calls no CUDA. cancel() ends a ticket that was not released with ECANCELED and returns 1, else 0. */
int memopt_uring_prepare(memopt_uring *engine, const memopt_uring_request *requests, uint32_t num_requests,
                         uint64_t when_over, memopt_uring_ticket **out);
void memopt_uring_arm(memopt_uring_ticket *ticket);
void memopt_uring_release(void *ticket);
int memopt_uring_cancel(memopt_uring_ticket *ticket);
int memopt_uring_is_released(memopt_uring_ticket *ticket);

/* 1: finished, result filled in. 0: timeout_ns passed (0 polls, negative waits for ever). */
int memopt_uring_wait(memopt_uring *engine, memopt_uring_ticket *ticket, int64_t timeout_ns,
                      memopt_uring_result *result);
/* Of a ticket that is finished, or was never released. */
void memopt_uring_ticket_free(memopt_uring_ticket *ticket);

/* Returns a slot. A negative slot is none to remove. */
int memopt_uring_add_file(memopt_uring *engine, int32_t fd);
int memopt_uring_remove_file(memopt_uring *engine, int32_t slot);

/* Memory that is mapped once for all transfers inside it; locked while registered. All of it or none. */
int memopt_uring_add_buffer(memopt_uring *engine, uint64_t address, uint64_t nbytes);
int memopt_uring_remove_buffers(memopt_uring *engine);

void memopt_uring_count(memopt_uring *engine, memopt_uring_counters *out);

/* For tests: from the skip-th completion on, count completions report result instead of what happened, and no block asks
 * the kernel for more than max_bytes at a time (0: no limit), as if each transfer were short. */
void memopt_uring_inject(memopt_uring *engine, int32_t result, uint32_t skip, uint32_t count, uint64_t max_bytes);

/* Waits for everything in flight, then closes the ring and its thread; tickets that were not released are not waited
 * for. Tickets can still be asked until the free; the memory goes with the last release that was announced. A second call returns 0. */
int memopt_uring_close(memopt_uring *engine);
void memopt_uring_free(memopt_uring *engine);
/* In a forked child: closes the child's descriptors, touches neither the parent's ring nor its thread. Once. */
void memopt_uring_abandon(memopt_uring *engine);

#endif
