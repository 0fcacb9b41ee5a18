/* What libsd35 takes from Rust: tokenizers of tokenizer.json files, and SHA-256.
 *
 * Strings that come back as `error` are freed with sd35_rust_message_free. */
#ifndef SD35_TOKENIZERS_H
#define SD35_TOKENIZERS_H

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

void sd35_tokenizer_free(sd35_tokenizer *tokenizer);

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
