/* Many threads use one engine at once, while transfers are short, interrupted and refused. Built by
 * tests/io/test_native_sanitized.py with the thread, address and undefined-behaviour sanitizers; not part of memopt.
 * Exit status 0: every byte came back. */
#define _GNU_SOURCE
#include "uring_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define NUM_THREADS 6
#define REGION_BYTES (UINT64_C(4) << 20)
#define MAX_BATCH 8

typedef struct {
    memopt_uring *engine;
    int direct_fd, plain_fd;
    unsigned seed;
    int number, rounds;
} task;

static void check(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "failed: %s\n", what);
        exit(1);
    }
}

static void *release(void *ticket)
{
    memopt_uring_release(ticket);
    return NULL;
}

/* Start a batch one of three ways: at once; released by another thread; the same, with a cancel that races with it. */
static int start(task *t, const memopt_uring_request *requests, uint32_t n, uint64_t flag, memopt_uring_ticket **ticket)
{
    pthread_t releaser;
    int way = rand_r(&t->seed) % 3, cancelled = 0;
    if (way == 0) {
        check(memopt_uring_submit(t->engine, requests, n, flag, ticket) == 0, "submit");
        return 0;
    }
    check(memopt_uring_prepare(t->engine, requests, n, flag, ticket) == 0, "prepare");
    memopt_uring_arm(*ticket);
    check(pthread_create(&releaser, NULL, release, *ticket) == 0, "pthread_create");
    if (way == 2)
        cancelled = memopt_uring_cancel(*ticket);
    check(pthread_detach(releaser) == 0, "pthread_detach");
    return cancelled;
}

static int run_batch(task *t, char *memory, uint64_t total, int is_write)
{
    memopt_uring_request requests[MAX_BATCH] = {0};
    uint64_t at = 0, base = (uint64_t)t->number * REGION_BYTES;
    uint32_t n = 0;
    while (at < total) {
        uint64_t part = n + 1 == MAX_BATCH ? total - at : UINT64_C(4096) * (1 + (unsigned)rand_r(&t->seed) % 64);
        part = part < total - at ? part : total - at;
        requests[n++] = (memopt_uring_request){
            .address = (uint64_t)(uintptr_t)(memory + at), .nbytes = part, .offset = base + at, .unit_bytes = 4096,
            .direct_fd = t->direct_fd, .direct_slot = -1, .plain_fd = t->plain_fd, .plain_slot = -1,
            .is_write = is_write, .is_direct = 1,
        };
        at += part;
    }
    memopt_uring_ticket *ticket;
    memopt_uring_result result;
    _Atomic uint32_t flag = 0;
    int cancelled = start(t, requests, n, (uint64_t)(uintptr_t)&flag, &ticket);
    if (rand_r(&t->seed) % 2)
        while (atomic_load_explicit(&flag, memory_order_acquire) == 0) /* what a GPU does */
            usleep(50);
    while (!memopt_uring_wait(t->engine, ticket, rand_r(&t->seed) % 3 ? 200000 : -1, &result))
        continue;
    check(atomic_load(&flag) == 1, "the word of a ticket that is over");
    check(!cancelled || result.error == ECANCELED, "a cancelled ticket says so");
    memopt_uring_ticket_free(ticket); /* its release may still be to come */
    return result.error;
}

static void *work(void *argument)
{
    task *t = argument;
    char *out = mmap(NULL, REGION_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *back = mmap(NULL, REGION_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(out != MAP_FAILED && back != MAP_FAILED, "mmap");
    for (int round = 0; round < t->rounds; round++) {
        uint64_t total = UINT64_C(4096) * (1 + (unsigned)rand_r(&t->seed) % (REGION_BYTES / 4096));
        memset(out, 1 + rand_r(&t->seed) % 255, total);
        if (run_batch(t, out, total, 1) != 0)
            continue; /* an injected error: the ticket ended, its memory is ours again */
        if (run_batch(t, back, total, 0) == 0)
            check(memcmp(out, back, total) == 0, "the bytes that came back");
        if (round % 16 == t->number) {
            int slot = memopt_uring_add_file(t->engine, t->plain_fd);
            check(slot >= 0 && memopt_uring_remove_file(t->engine, slot) == 0, "register a file");
        }
    }
    munmap(out, REGION_BYTES);
    munmap(back, REGION_BYTES);
    return NULL;
}

static void refuse_nonsense(memopt_uring *engine)
{
    static const memopt_uring_request nonsense[] = {
        {.nbytes = 0, .unit_bytes = 4096},
        {.nbytes = 4096, .unit_bytes = 0},
        {.nbytes = 4096, .unit_bytes = 4096, .copy_bytes = 4097}, /* more than the block has */
        {.nbytes = 128 << 10, .unit_bytes = 4096, .copy_bytes = 1}, /* a payload of two blocks */
    };
    memopt_uring_ticket *ticket;
    for (unsigned i = 0; i < sizeof nonsense / sizeof *nonsense; i++)
        check(memopt_uring_prepare(engine, &nonsense[i], 1, 0, &ticket) == -EINVAL, "a request that cannot be");
    check(memopt_uring_limit(engine, 0) == -EINVAL && memopt_uring_limit(engine, 6) == -EINVAL, "limits refused");
}

int main(int argc, char **argv)
{
    static const int results[] = {-EINTR, -EAGAIN, -EINVAL, -EIO, 0};
    check(argc == 4, "usage: uring_stress FILE ROUNDS SQPOLL");
    int plain_fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
    int direct_fd = open(argv[1], O_RDWR | O_DIRECT);
    check(plain_fd >= 0, "open");
    check(ftruncate(plain_fd, NUM_THREADS * REGION_BYTES) == 0, "ftruncate");
    memopt_uring *engine;
    int rc = memopt_uring_open(5, 64 << 10, atoi(argv[3]), &engine);
    if (rc < 0) {
        fprintf(stderr, "no io_uring: %s\n", strerror(-rc));
        return 77;
    }
    pthread_t threads[NUM_THREADS];
    task tasks[NUM_THREADS];
    for (int i = 0; i < NUM_THREADS; i++) {
        tasks[i] = (task){engine, direct_fd >= 0 ? direct_fd : plain_fd, plain_fd, 17u + (unsigned)i, i, atoi(argv[2])};
        check(pthread_create(&threads[i], NULL, work, &tasks[i]) == 0, "pthread_create");
    }
    memopt_uring_counters counters;
    for (int i = 0; i < atoi(argv[2]); i++) {
        memopt_uring_inject(engine, results[i % 5], 3, i % 3, i % 4 == 0 ? 12288 : 0);
        memopt_uring_count(engine, &counters);
        check(memopt_uring_limit(engine, 1 + (uint32_t)i % 5) == 0, "limit");
        usleep(2000);
    }
    memopt_uring_inject(engine, 0, 0, 0, 0);
    for (int i = 0; i < NUM_THREADS; i++)
        pthread_join(threads[i], NULL);
    refuse_nonsense(engine);
    check(memopt_uring_close(engine) == 0 && memopt_uring_close(engine) == 0, "close, twice");
    memopt_uring_free(engine);
    close(plain_fd);
    if (direct_fd >= 0)
        close(direct_fd);
    return 0;
}
