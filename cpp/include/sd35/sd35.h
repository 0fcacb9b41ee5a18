/* libsd35: draws from bundles of sd35-trt.
 *
 * Handles are opaque. Structures begin with their size, which their _init function sets, so that a
 * later version can add fields at their end. Text is UTF-8.
 *
 * A function that can fail returns a status and takes `error`: NULL, or where to put an error,
 * which the caller frees. It is left alone where the function succeeds. Nothing is thrown, nothing
 * is printed, and there is no state outside of handles.
 *
 * Functions on one pipeline may be called from any thread: those that draw take turns. A handle is
 * freed when no other thread uses it. */
#ifndef SD35_SD35_H
#define SD35_SD35_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SD35_API __attribute__((visibility("default")))
#else
#define SD35_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* A number that the caller leaves to the bundle. */
#define SD35_UNSET (-9007199254740992LL)

typedef enum sd35_status {
    SD35_OK = 0,
    SD35_FAILED = 1,        /* an engine, the device or a library failed */
    SD35_USAGE = 2,         /* an argument that the bundle or the function does not accept */
    SD35_BUNDLE = 3,        /* a bundle that is missing, damaged, foreign, or for something else */
    SD35_OUT_OF_MEMORY = 4, /* the device, the host or a budget has no room */
    SD35_CANCELLED = 5,     /* a callback ended the request */
    SD35_NOT_FINITE = 6     /* an image whose latents are NaN or infinite */
} sd35_status;

/* Text of `length` bytes; it need not end with a NUL. */
typedef struct sd35_text {
    const char* data;
    size_t length;
} sd35_text;

typedef struct sd35_error sd35_error;
typedef struct sd35_pipeline sd35_pipeline;
typedef struct sd35_result sd35_result;
typedef struct sd35_memory sd35_memory;
typedef struct sd35_array sd35_array;

/* The library's version, such as "0.1.0". */
SD35_API const char* sd35_version(void);

/* ---- Errors ---- */

SD35_API sd35_status sd35_error_status(const sd35_error* error);
/* One line: what, where, and what to do about it. */
SD35_API const char* sd35_error_message(const sd35_error* error);
SD35_API void sd35_error_free(sd35_error* error);

/* ---- Pipelines ---- */

typedef enum sd35_log_level { SD35_LOG_WARNING = 1, SD35_LOG_ERROR = 2 } sd35_log_level;

/* Called with what a server's operator should know; from the thread that draws. */
typedef void (*sd35_log)(sd35_log_level level, const char* message, void* user);

typedef struct sd35_load_options {
    size_t size;
    /* "cpu", "cuda" or "cuda:N"; NULL takes what the bundle was built for. */
    const char* device;
    /* A bundle that draws when this one's images are anomalous; NULL is none. */
    const char* fallback;
    /* Bytes of the device's memory to stay within; 0 is without limit. */
    uint64_t vram_budget;
    /* Bytes of the host's memory for what the text encoders computed; 0 keeps nothing. */
    uint64_t prompt_cache;
    /* CPU threads of each engine; 0 takes all cores. */
    uint32_t threads;
    /* Characters of a prompt; a longer one is refused. */
    uint32_t max_prompt_chars;
    /* Other than 0: compare the hashes of the large files too. */
    int32_t verify;
    sd35_log log;
    void* log_user;
} sd35_load_options;

SD35_API void sd35_load_options_init(sd35_load_options* options);

/* Opens a bundle. Engines load at first use. `options` may be NULL. */
SD35_API sd35_status sd35_pipeline_load(const char* path, const sd35_load_options* options,
                                        sd35_pipeline** pipeline, sd35_error** error);

/* Loads every engine that stays in memory now, the fallback's excepted. */
SD35_API sd35_status sd35_pipeline_preload(sd35_pipeline* pipeline, sd35_error** error);

/* Releases every engine when what is being drawn is done; a second call does no harm. */
SD35_API sd35_status sd35_pipeline_close(sd35_pipeline* pipeline, sd35_error** error);

/* Closes and frees; NULL is nothing. */
SD35_API void sd35_pipeline_free(sd35_pipeline* pipeline);

/* What a bundle accepts, and what a request gets that does not say otherwise. Strings live as long
 * as the pipeline. */
typedef struct sd35_bundle_info {
    size_t size;
    const char* model;
    const char* variant;
    const char* target;
    const char* builder;
    const char* policy;
    uint32_t guided; /* other than 0: it was built with guidance */
    uint32_t batch[2];
    uint32_t side[2]; /* width and height in pixels */
    uint32_t side_step;
    uint32_t t5_tokens[2];
    uint32_t default_steps;
    uint32_t default_width;
    uint32_t default_height;
    uint32_t default_t5_tokens;
    double default_guidance;
    double default_shift;
    const char* default_sampler;
    uint32_t inpainting;   /* other than 0: it takes masks */
    uint32_t skip_layers;  /* blocks that skip-layer guidance can leave out; 0 where it cannot */
    uint32_t adapter_rank; /* of the adapters of one run together; 0 where it takes none */
    uint32_t controls;     /* ControlNets, see sd35_pipeline_control */
} sd35_bundle_info;

/* `info->size` is set by the caller. */
SD35_API sd35_status sd35_pipeline_info(const sd35_pipeline* pipeline, sd35_bundle_info* info,
                                        sd35_error** error);

/* A ControlNet of the bundle. */
typedef struct sd35_control_info {
    size_t size;
    const char* name;
    const char* kind; /* of its pictures: "canny" (edges), "depth", "blur", "other" */
} sd35_control_info;

/* `info->size` is set by the caller. Strings live as long as the pipeline. */
SD35_API sd35_status sd35_pipeline_control(const sd35_pipeline* pipeline, size_t index,
                                           sd35_control_info* info, sd35_error** error);

/* Knows an adapter by a name, in place of another of that name. `path` is of a file that
 * "sd35-trt adapter convert" wrote. No engine loads for it. */
SD35_API sd35_status sd35_pipeline_load_adapter(sd35_pipeline* pipeline, const char* name,
                                                const char* path, sd35_error** error);
/* Forgets an adapter's name. */
SD35_API sd35_status sd35_pipeline_unload_adapter(sd35_pipeline* pipeline, const char* name,
                                                  sd35_error** error);

/* How many anomalous images there were, the fallback's included. */
SD35_API uint64_t sd35_pipeline_anomalies(const sd35_pipeline* pipeline);
/* 1 while the fallback draws. */
SD35_API int sd35_pipeline_on_fallback(const sd35_pipeline* pipeline);
/* Draws with the bundle itself again, from the next request on. */
SD35_API void sd35_pipeline_restore(sd35_pipeline* pipeline);

/* ---- Requests ---- */

typedef struct sd35_step_source sd35_step_source;

/* What a callback sees after each step. */
typedef struct sd35_step {
    size_t size;
    uint32_t index; /* 0 ... total - 1 */
    uint32_t total;
    float sigma; /* noise level after the step; 0 after the last */
    /* float32 [batch, channels, height, width] in row-major order; valid during the call. */
    const float* latents;
    uint64_t shape[4];
    sd35_step_source* source; /* for sd35_step_denoised */
} sd35_step;

/* The step's estimate of the finished latents, which a preview shows: float32 of `step->shape`,
 * valid during the call. Only a callback may ask for it, of the step that it was given. It is
 * fetched from the device; a GPU ends the step that it is at first. */
SD35_API sd35_status sd35_step_denoised(const sd35_step* step, const float** denoised,
                                        sd35_error** error);

/* Returns 0 to go on, anything else to cancel the request. */
typedef int (*sd35_callback)(const sd35_step* step, void* user);

/* How much an image has of an adapter: a name of sd35_pipeline_load_adapter or the path of a file,
 * and a scale from -100 to 100. */
typedef struct sd35_adapter_use {
    const char* name;
    double scale;
} sd35_adapter_use;

/* The adapters of an image. */
typedef struct sd35_mix {
    const sd35_adapter_use* uses;
    size_t count;
} sd35_mix;

/* What a ControlNet of the bundle is asked for. */
typedef struct sd35_control {
    size_t size;
    const char* name;
    /* The picture that is followed, one of those that the net was trained on, such as edges: uint8
     * [image_height, image_width, 3], RGB, row-major, of the size that is drawn. */
    const uint8_t* image;
    uint32_t image_width;
    uint32_t image_height;
    double scale; /* how much, -100 to 100 */
    double start; /* of the steps, the share after which it begins */
    double end;   /* and at which it ends */
} sd35_control;

/* Scale 1, in all steps. */
SD35_API void sd35_control_init(sd35_control* control);

typedef struct sd35_request {
    size_t size;
    /* One prompt, or several. */
    const sd35_text* prompts;
    size_t prompt_count;
    /* What to steer away from: none, one for all, or one per prompt. */
    const sd35_text* negatives;
    size_t negative_count;
    /* One per image; NULL counts up from `seed`. */
    const uint64_t* seeds;
    size_t seed_count;
    uint64_t seed;
    int64_t batch;       /* images per prompt */
    int64_t steps;       /* 1 to 1000 */
    double guidance;     /* 0 to 100; up to 1 it is off */
    double shift;        /* 0.01 to 100 */
    int64_t width;       /* in pixels; with an image, its width */
    int64_t height;      /* in pixels; with an image, its height */
    int64_t t5_tokens;   /* length of T5's part of the text */
    const char* sampler; /* "euler" or "dpmpp-2m"; NULL leaves it to the bundle */
    /* Start from this picture: uint8 [image_height, image_width, 3], RGB, row-major, of the size
     * that is drawn; NULL starts from noise alone. */
    const uint8_t* image;
    uint32_t image_width;
    uint32_t image_height;
    double strength; /* how much of the picture is redrawn, from one step to 1 */
    /* Called after every step, in the thread that draws; NULL is none. When a request is drawn
     * again by the fallback, steps count from 0 again. */
    sd35_callback callback;
    void* callback_user;
    /* Texts for CLIP-G and for T5 where they are others than CLIP-L's: none, one for all, or one
     * per prompt. */
    const sd35_text* prompts_2;
    size_t prompt_2_count;
    const sd35_text* prompts_3;
    size_t prompt_3_count;
    const sd35_text* negatives_2;
    size_t negative_2_count;
    const sd35_text* negatives_3;
    size_t negative_3_count;
    int64_t weighting; /* other than 0: (text:1.3) in a prompt is a part with this weight */
    /* Which pixels of the image are drawn anew, those of 128 and more: uint8
     * [mask_height, mask_width], of the image's size; NULL is all. */
    const uint8_t* mask;
    uint32_t mask_width;
    uint32_t mask_height;
    int64_t paste; /* other than 0: the other pixels are the image's own in the end */
    /* Blocks that skip-layer guidance leaves out; NULL is without. */
    const int64_t* skip_guidance_layers;
    size_t skip_guidance_layer_count;
    double skip_layer_guidance_scale; /* -100 to 100 */
    double skip_layer_guidance_start; /* fractions of the steps between which it counts */
    double skip_layer_guidance_stop;
    /* What the images have of adapters: none, one mix for all, or one for each image. */
    const sd35_mix* mixes;
    size_t mix_count;
    /* ControlNets, which all images follow. */
    const sd35_control* const* controls;
    size_t control_count;
    /* Start from these in place of `image`: float32 [images, channels, height, width], of one image
     * for all, or of each, as sd35_result_latents and sd35_pipeline_encode give them. They have the
     * size with them; NULL is none. */
    const float* latents;
    uint64_t latent_shape[4];
    int64_t decode; /* 0: the result has latents alone */
} sd35_request;

/* One image, strength 0.6, skip-layer guidance 2.8 from 0.01 to 0.2, decoded; all else is left to
 * the bundle. */
SD35_API void sd35_request_init(sd35_request* request);

/* Checks a request without drawing it. */
SD35_API sd35_status sd35_pipeline_check(const sd35_pipeline* pipeline, const sd35_request* request,
                                         sd35_error** error);

/* Draws prompt_count * batch images in one run. */
SD35_API sd35_status sd35_pipeline_generate(sd35_pipeline* pipeline, const sd35_request* request,
                                            sd35_result** result, sd35_error** error);

/* Whether two requests can be drawn in one run: they agree in size, steps, shift, sampler, text
 * length, ControlNets with the steps of these, and in being decoded; they start from noise, and
 * their adapters fit together. `joins` becomes 1 or 0. */
SD35_API sd35_status sd35_pipeline_joins(const sd35_pipeline* pipeline, const sd35_request* one,
                                         const sd35_request* other, int* joins, sd35_error** error);

/* Draws several requests in one run. They can be joined, and have together no more images than the
 * bundle draws at once.
 *
 * `results` and `errors` are arrays of `count`: of every request one of the two is set, the other
 * NULL. Returns SD35_OK where all were drawn, else the status of the first that was not. */
SD35_API sd35_status sd35_pipeline_generate_joined(sd35_pipeline* pipeline,
                                                   const sd35_request* const* requests,
                                                   size_t count, sd35_result** results,
                                                   sd35_error** errors);

/* ---- Results ---- */

/* One image's first deviation from what calibration saw. */
typedef struct sd35_anomaly {
    size_t size;
    uint32_t image; /* its place in the request */
    uint32_t step;  /* index of the step after which it showed */
    double sigma;   /* noise level there */
    uint64_t seed;
    const char* prompt; /* the first 12 hex digits of the prompt's SHA-256 */
    const char* what;   /* "not finite", or the figure and what was expected */
    uint32_t finite;    /* 0 where a value is NaN or infinite */
} sd35_anomaly;

/* Images of the request, also where they were not decoded. */
SD35_API size_t sd35_result_count(const sd35_result* result);
SD35_API uint32_t sd35_result_width(const sd35_result* result);
SD35_API uint32_t sd35_result_height(const sd35_result* result);
/* uint8 [height, width, 3], RGB; NULL where there is no such image, or none was decoded. */
SD35_API const uint8_t* sd35_result_image(const sd35_result* result, size_t index);
/* What the VAE decoded: float32 [count, channels, height, width]; `shape` may be NULL. */
SD35_API const float* sd35_result_latents(const sd35_result* result, uint64_t shape[4]);
SD35_API uint64_t sd35_result_seed(const sd35_result* result, size_t index);
/* Everything that would draw the same images again, but for the picture started from: JSON. */
SD35_API const char* sd35_result_parameters(const sd35_result* result);
/* Seconds by stage: queue, text, encode, conditioning, denoise, decode, total. */
SD35_API size_t sd35_result_timing_count(const sd35_result* result);
/* Its name, NULL where there is no such stage; `seconds` may be NULL. */
SD35_API const char* sd35_result_timing(const sd35_result* result, size_t index, double* seconds);
/* What the user should know, such as a prompt that was cut. */
SD35_API size_t sd35_result_note_count(const sd35_result* result);
SD35_API const char* sd35_result_note(const sd35_result* result, size_t index);
SD35_API size_t sd35_result_anomaly_count(const sd35_result* result);
/* `anomaly->size` is set by the caller. Strings live as long as the result. */
SD35_API sd35_status sd35_result_anomaly(const sd35_result* result, size_t index,
                                         sd35_anomaly* anomaly, sd35_error** error);
SD35_API void sd35_result_free(sd35_result* result);

/* ---- Pictures and latents ---- */

/* Latents of `count` pictures of one size, uint8 [count, height, width, 3] in RGB, as `latents` of
 * a request takes them. `array` is given float32 [count, channels, height, width]. */
SD35_API sd35_status sd35_pipeline_encode(sd35_pipeline* pipeline, const uint8_t* images,
                                          size_t count, uint32_t width, uint32_t height,
                                          sd35_array** array, sd35_error** error);
/* Pictures of latents, float32 of `shape`. `array` is given uint8 [count, height, width, 3]. */
SD35_API sd35_status sd35_pipeline_decode(sd35_pipeline* pipeline, const float* latents,
                                          const uint64_t shape[4], sd35_array** array,
                                          sd35_error** error);
/* Its values, float32 or uint8, in row-major order; `shape` may be NULL. */
SD35_API const void* sd35_array_data(const sd35_array* array, uint64_t shape[4]);
SD35_API void sd35_array_free(sd35_array* array);

/* ---- Memory ---- */

typedef struct sd35_memory_info {
    size_t size;
    uint64_t used;         /* of the device by this process, as near as the device tells */
    uint64_t peak;         /* the largest that was seen */
    uint64_t total;        /* of the device; 0 where it does not say */
    uint64_t budget;       /* 0 is without limit */
    uint64_t planned_peak; /* what the planner expects at most, for the largest request so far */
} sd35_memory_info;

typedef struct sd35_engine_info {
    size_t size;
    const char* component;
    const char* kind;      /* "resident", "loaded" or "streamed" */
    uint32_t open;         /* other than 0: it is in memory now */
    uint64_t weight_bytes; /* in memory while it is open */
} sd35_engine_info;

/* What the engines and their device take now; the fallback's not counted. */
SD35_API sd35_status sd35_pipeline_memory(sd35_pipeline* pipeline, sd35_memory** memory,
                                          sd35_error** error);
/* `info->size` is set by the caller. */
SD35_API sd35_status sd35_memory_get(const sd35_memory* memory, sd35_memory_info* info,
                                     sd35_error** error);
SD35_API size_t sd35_memory_engine_count(const sd35_memory* memory);
SD35_API sd35_status sd35_memory_engine(const sd35_memory* memory, size_t index,
                                        sd35_engine_info* info, sd35_error** error);
SD35_API void sd35_memory_free(sd35_memory* memory);

#ifdef __cplusplus
}
#endif

#endif
