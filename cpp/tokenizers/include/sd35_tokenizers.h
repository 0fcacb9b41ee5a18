/* What libsd35 takes from Rust: tokenizers of tokenizer.json files, headers of safetensors files,
 * and SHA-256.
 *
 * Strings that come back as `error` are freed with sd35_rust_message_free. */
#ifndef SD35_TOKENIZERS_H
#define SD35_TOKENIZERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sd35_tokenizer sd35_tokenizer;
typedef struct sd35_sha256 sd35_sha256;

/* NULL where the bytes are no tokenizer. */
sd35_tokenizer *sd35_tokenizer_open(const uint8_t *json, size_t size, char **error);

/* Writes `length` ids: those of the text, special tokens included, cut or filled with `pad_id`.
 * Returns how many tokens the whole text has, -1 where it fails. One thread at a time. */
int64_t sd35_tokenizer_encode(sd35_tokenizer *tokenizer, const uint8_t *text, size_t size,
                              size_t length, int64_t pad_id, int64_t *ids, char **error);

/* Writes at most `room` ids of the text's, with special tokens or without. Returns how many tokens it
 * has, -1 where it fails. One thread at a time. */
int64_t sd35_tokenizer_tokens(sd35_tokenizer *tokenizer, const uint8_t *text, size_t size,
                              bool special, size_t room, int64_t *ids, char **error);

void sd35_tokenizer_free(sd35_tokenizer *tokenizer);

typedef struct sd35_safetensors sd35_safetensors;

/* A tensor of a file; pointers are valid as long as the header. */
typedef struct sd35_safetensors_entry {
    const uint8_t *name; /* UTF-8, without a NUL at its end */
    size_t name_size;
    int32_t is_float32;
    size_t rank;
    const size_t *shape;
    size_t begin; /* where its values are in the file: bytes from `begin` to before `end` */
    size_t end;
} sd35_safetensors_entry;

/* The header of a file's content; NULL where that is no such file. What its entries say is in the
 * file was checked. */
sd35_safetensors *sd35_safetensors_open(const uint8_t *data, size_t size, char **error);
/* Tensors, in the order of their names. */
size_t sd35_safetensors_count(const sd35_safetensors *header);
sd35_safetensors_entry sd35_safetensors_tensor(const sd35_safetensors *header, size_t index);
/* An entry of the metadata; NULL where there is none. */
const uint8_t *sd35_safetensors_metadata(const sd35_safetensors *header, const uint8_t *key,
                                         size_t key_size, size_t *size);
void sd35_safetensors_free(sd35_safetensors *header);

sd35_sha256 *sd35_sha256_new(void);
void sd35_sha256_update(sd35_sha256 *state, const uint8_t *data, size_t size);
/* Of what came so far: 32 bytes. */
void sd35_sha256_digest(const sd35_sha256 *state, uint8_t *digest);
void sd35_sha256_free(sd35_sha256 *state);

void sd35_rust_message_free(char *message);

#ifdef __cplusplus
}
#endif

#endif
