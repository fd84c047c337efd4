/* BLAKE2b with digests of 16 bytes and no key, after RFC 7693. */
#ifndef QUIRE_BLAKE2B_H
#define QUIRE_BLAKE2B_H

#include <stddef.h>
#include <stdint.h>

enum { DIGEST_BYTES = 16 };

/* Writes the digest of `head` followed by `tail` to `out`, which may be `head`. */
void blake2b_pair(uint8_t out[DIGEST_BYTES], const uint8_t *head, size_t head_bytes, const uint8_t *tail,
                  size_t tail_bytes);

#endif
