/* What libsd35 asks of a shared library that runs one kind of engine, or that is a device: a table
 * of functions, found by the name of one. Internal: both sides are built from one source tree.
 *
 * A function that fails returns a status of sd35.h other than SD35_OK and writes a message, one
 * line that names the fix. Nothing is thrown across. */
#ifndef SD35_PLUGIN_INTERFACE_H
#define SD35_PLUGIN_INTERFACE_H

#include <stddef.h>
#include <stdint.h>

#define SD35_PLUGIN_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

/* Where a function writes why it failed. */
typedef struct sd35_plugin_message {
    char *text;
    size_t capacity;
} sd35_plugin_message;

/* Memory of the device that a port reads or writes, C-contiguous. */
typedef struct sd35_plugin_tensor {
    const char *name;
    int32_t dtype; /* libsd35::DType */
    int32_t rank;
    const int64_t *shape;
    void *address;
    uint64_t bytes;
} sd35_plugin_tensor;

/* The device that engines run on. */
typedef struct sd35_plugin_place {
    int32_t cuda; /* other than 0: a GPU */
    int32_t index;
    void *stream; /* cudaStream_t */
    void *device; /* for `scratch` */
    /* Working memory that engines share, one running at a time; NULL where there is none left. */
    void *(*scratch)(void *device, uint64_t bytes);
} sd35_plugin_place;

typedef struct sd35_plugin_engine {
    const char *component;
    const char *path;      /* of the file that is opened */
    const char *built_for; /* for messages */
    uint32_t threads;      /* 0 takes all cores */
    int32_t fp8;           /* other than 0: it has FP8 weights */
    int32_t streams;       /* other than 0: `held_bytes` of its weights are on the device */
    uint64_t held_bytes;
    sd35_plugin_place place;
} sd35_plugin_engine;

/* A kind of engine. */
typedef struct sd35_plugin_backend {
    uint32_t version; /* SD35_PLUGIN_VERSION */
    /* Other than 0: `run` only queues work of fixed shapes and addresses, so that a graph can
     * record it. */
    int32_t recordable;
    int (*open)(const sd35_plugin_engine *engine, void **session, sd35_plugin_message *message);
    int (*run)(void *session, const sd35_plugin_tensor *inputs, size_t input_count,
               const sd35_plugin_tensor *outputs, size_t output_count,
               sd35_plugin_message *message);
    /* Releases the engine's memory; its work is done. */
    void (*close)(void *session);
} sd35_plugin_backend;

typedef const sd35_plugin_backend *(*sd35_plugin_backend_entry)(void);
#define SD35_PLUGIN_BACKEND_ENTRY "sd35_plugin_backend_v1"

/* A GPU. Functions are for one thread at a time, but `release`, which is for any, and `activate`.
 * What is queued is done in order. */
typedef struct sd35_plugin_device {
    uint32_t version; /* SD35_PLUGIN_VERSION */
    int (*open)(int32_t index, void **device, sd35_plugin_message *message);
    void (*close)(void *device);
    /* Makes it the calling thread's device. */
    int (*activate)(void *device, sd35_plugin_message *message);
    sd35_plugin_place (*place)(void *device);
    int (*allocate)(void *device, uint64_t bytes, void **address, sd35_plugin_message *message);
    void (*release)(void *device, void *address);
    /* The memory of the host may be changed, or is there, when these return. */
    int (*upload)(void *device, const void *from, void *to, uint64_t bytes,
                  sd35_plugin_message *message);
    int (*download)(void *device, const void *from, void *to, uint64_t bytes,
                    sd35_plugin_message *message);
    int (*copy)(void *device, const void *from, void *to, uint64_t bytes,
                sd35_plugin_message *message);
    /* Memory of the host that `fetch` copies to. */
    int (*pin)(uint64_t bytes, void **address, sd35_plugin_message *message);
    void (*unpin)(void *address);
    /* Begins to copy to pinned memory, beside the work that is queued after this. */
    int (*fetch)(void *device, const void *from, void *to, uint64_t bytes, void **fetch,
                 sd35_plugin_message *message);
    int (*fetch_wait)(void *fetch, sd35_plugin_message *message);
    /* What is queued from now on runs after the copy. */
    int (*fetch_fence)(void *fetch, sd35_plugin_message *message);
    void (*fetch_free)(void *fetch);
    /* Between the two, work is recorded and not done. `graph` is NULL where `end` drops it. */
    int (*record_begin)(void *device, sd35_plugin_message *message);
    int (*record_end)(void *device, void **graph, sd35_plugin_message *message);
    int (*replay)(void *device, void *graph, sd35_plugin_message *message);
    void (*graph_free)(void *graph);
    /* Changes when the address of the engines' working memory does. */
    uint64_t (*scratch_version)(void *device);
    int (*synchronize)(void *device, sd35_plugin_message *message);
    int (*trim)(void *device, sd35_plugin_message *message);
    int (*memory)(void *device, uint64_t *used, uint64_t *peak, uint64_t *total,
                  sd35_plugin_message *message);
} sd35_plugin_device;

typedef const sd35_plugin_device *(*sd35_plugin_device_entry)(void);
#define SD35_PLUGIN_DEVICE_ENTRY "sd35_plugin_device_v1"

#ifdef __cplusplus
}
#endif

#endif
