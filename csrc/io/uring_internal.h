/* What the parts of the engine share; see uring_engine.c for the design. Not for users of the engine. */
#ifndef MEMOPT_URING_INTERNAL_H
#define MEMOPT_URING_INTERNAL_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "uring_engine.h"

#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#define MEMOPT_HIDDEN __attribute__((visibility("hidden")))
#define MAX_FILES 256
#define MAX_BUFFERS 1024
#define MAX_REGION_BYTES (UINT64_C(1) << 30) /* the kernel's limit for one registered buffer */
#define MAX_ENTER_FAILURES 10000
#define MAX_SETTLE_TRIES 2000
#define KICK_TAG UINT64_MAX

struct memopt_uring_ticket {
    memopt_uring *engine;
    memopt_uring_ticket *next;
    atomic_uint num_owners;    /* the caller's handle, and each announced release */
    _Atomic uint32_t *when_over;
    memopt_uring_request *requests;
    uint32_t num_requests;
    uint32_t cursor;           /* request that is being cut into blocks */
    uint64_t cursor_bytes;     /* how much of it was cut */
    uint32_t num_blocks;       /* blocks in the kernel or waiting to be issued again */
    bool released;
    bool queued;               /* in the engine's list: its owner must not free it yet */
    bool finished;
    memopt_uring_result result;
};

typedef struct {
    memopt_uring_ticket *ticket;
    uint32_t request;
    uint64_t begin; /* of the block within the request */
    uint64_t nbytes;
    uint64_t done;
    bool direct;
    bool force_async;
} block_t;

typedef struct {
    uint64_t address;
    uint64_t nbytes;
} region_t;

typedef enum { CONTROL_NONE, ADD_FILE, REMOVE_FILE, ADD_BUFFER, REMOVE_BUFFERS } control_op;

typedef struct {
    control_op op;
    int32_t fd_or_slot;
    uint64_t address;
    uint64_t nbytes;
    int rc;
} control_t;

struct memopt_uring {
    atomic_uint num_owners; /* the caller's handle, and each announced release */
    struct io_uring ring;
    pthread_t driver;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a ticket finished, a control call returned, the driver started */
    int kick_fd;
    uint64_t kick_value;
    uint32_t queue_depth;
    uint32_t limit; /* blocks in use at most */
    uint64_t block_bytes;
    int32_t use_sqpoll;
    uint32_t features;
    int state; /* 1 while starting, 0 running, -errno failed */
    bool stopping;
    memopt_uring_ticket *head, *tail; /* tickets with requests not yet cut */
    control_t *control;
    memopt_uring_counters counters;
    int32_t inject_result;
    uint32_t inject_skip, inject_count;
    uint64_t inject_max_bytes;
    /* the driver's own */
    block_t *blocks;
    uint32_t *free_blocks, num_free;
    uint32_t *again, num_again; /* blocks to be issued (again) */
    bool kick_armed;
    bool file_used[MAX_FILES];
    region_t regions[MAX_BUFFERS];
    uint32_t num_regions;
};

/* uring_blocks.c: with the lock held; all but end_ticket run on the driver */
MEMOPT_HIDDEN void memopt_end_ticket(memopt_uring *engine, memopt_uring_ticket *ticket);
MEMOPT_HIDDEN void memopt_fill_ring(memopt_uring *engine);
MEMOPT_HIDDEN void memopt_reap(memopt_uring *engine);
MEMOPT_HIDDEN uint32_t memopt_num_in_kernel(memopt_uring *engine);
MEMOPT_HIDDEN void memopt_fail_everything(memopt_uring *engine, int rc);

/* uring_driver.c */
MEMOPT_HIDDEN int memopt_start_driver(memopt_uring *engine);

/* uring_registry.c: on the driver, with the lock held */
MEMOPT_HIDDEN void memopt_serve_control(memopt_uring *engine);
MEMOPT_HIDDEN void memopt_kick(memopt_uring *engine);
#endif
