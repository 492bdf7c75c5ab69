/* Registered files and buffers. The ring takes registrations from its own thread only, so calls are handed over. */
#include "uring_internal.h"

#include <sys/uio.h>
#include <unistd.h>

static int add_file(memopt_uring *engine, int fd)
{
    if (!(engine->features & 4))
        return -EOPNOTSUPP;
    for (int slot = 0; slot < MAX_FILES; slot++) {
        if (engine->file_used[slot])
            continue;
        int rc = io_uring_register_files_update(&engine->ring, (unsigned)slot, &fd, 1);
        if (rc < 0)
            return rc;
        engine->file_used[slot] = true;
        return slot;
    }
    return -ENFILE;
}

static int remove_file(memopt_uring *engine, int slot)
{
    int none = -1;
    if (slot < 0 || slot >= MAX_FILES || !engine->file_used[slot])
        return -EINVAL;
    int rc = io_uring_register_files_update(&engine->ring, (unsigned)slot, &none, 1);
    engine->file_used[slot] = false;
    return rc < 0 ? rc : 0;
}

static void forget_regions_from(memopt_uring *engine, uint32_t first)
{
    struct iovec none = {0};
    __u64 tag = 0;
    while (engine->num_regions > first)
        io_uring_register_buffers_update_tag(&engine->ring, --engine->num_regions, &none, &tag, 1);
}

static int add_buffer(memopt_uring *engine, uint64_t address, uint64_t nbytes)
{
    uint32_t first = engine->num_regions;
    if (!(engine->features & 8))
        return -EOPNOTSUPP;
    while (nbytes != 0) {
        uint64_t part = nbytes < MAX_REGION_BYTES ? nbytes : MAX_REGION_BYTES;
        struct iovec iov = {.iov_base = (void *)(uintptr_t)address, .iov_len = part};
        __u64 tag = 0;
        int rc = engine->num_regions == MAX_BUFFERS
                     ? -ENOSPC
                     : io_uring_register_buffers_update_tag(&engine->ring, engine->num_regions, &iov, &tag, 1);
        if (rc < 0) {
            forget_regions_from(engine, first);
            return rc;
        }
        engine->regions[engine->num_regions++] = (region_t){address, part};
        address += part;
        nbytes -= part;
    }
    return 0;
}

static int run_control(memopt_uring *engine, const control_t *control)
{
    switch (control->op) {
    case ADD_FILE:
        return add_file(engine, control->fd_or_slot);
    case REMOVE_FILE:
        return remove_file(engine, control->fd_or_slot);
    case ADD_BUFFER:
        return add_buffer(engine, control->address, control->nbytes);
    case REMOVE_BUFFERS:
        forget_regions_from(engine, 0);
        return 0;
    default:
        return -EINVAL;
    }
}

void memopt_serve_control(memopt_uring *engine)
{
    control_t *control = engine->control;
    if (control == NULL || control->op == CONTROL_NONE)
        return;
    control->rc = run_control(engine, control);
    control->op = CONTROL_NONE;
    pthread_cond_broadcast(&engine->changed);
}

void memopt_kick(memopt_uring *engine)
{
    uint64_t one = 1;
    while (write(engine->kick_fd, &one, sizeof one) < 0 && errno == EINTR)
        continue;
}

static int control_call(memopt_uring *engine, control_t control)
{
    pthread_mutex_lock(&engine->lock);
    while (engine->control != NULL && engine->state == 0)
        pthread_cond_wait(&engine->changed, &engine->lock);
    if (engine->state != 0 || engine->stopping) {
        int rc = engine->state != 0 ? engine->state : -ECANCELED;
        pthread_mutex_unlock(&engine->lock);
        return rc;
    }
    engine->control = &control;
    memopt_kick(engine);
    while (control.op != CONTROL_NONE)
        pthread_cond_wait(&engine->changed, &engine->lock);
    engine->control = NULL;
    pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->lock);
    return control.rc;
}

int memopt_uring_add_file(memopt_uring *engine, int32_t fd)
{
    return control_call(engine, (control_t){.op = ADD_FILE, .fd_or_slot = fd});
}

int memopt_uring_remove_file(memopt_uring *engine, int32_t slot)
{
    if (slot < 0)
        return 0;
    return control_call(engine, (control_t){.op = REMOVE_FILE, .fd_or_slot = slot});
}

int memopt_uring_add_buffer(memopt_uring *engine, uint64_t address, uint64_t nbytes)
{
    return control_call(engine, (control_t){.op = ADD_BUFFER, .address = address, .nbytes = nbytes});
}

int memopt_uring_remove_buffers(memopt_uring *engine)
{
    return control_call(engine, (control_t){.op = REMOVE_BUFFERS});
}
