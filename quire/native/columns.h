/* Columns of the memory core, which Python owns (numpy arrays, bytearrays), as typed memory.
 *
 * Everything that comes from outside is checked before it is used as an index: a wrong value is declined or raises, and
 * never reads or writes out of bounds.
 */
#ifndef QUIRE_COLUMNS_H
#define QUIRE_COLUMNS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#include "blake2b.h"

/* States of a block, as in memsvc.core.pool.BlockState, and of its content, as in memsvc.core.content.Publication. */
enum { STATE_FREE = 1, STATE_CACHED = 2, STATE_USED = 3, STATE_PENDING = 4, STATE_LEASED = 5 };
enum { PUBLICATION_NONE = 0, PUBLICATION_FULL = 1, PUBLICATION_PARTIAL = 2, PUBLICATION_DUPLICATE = 3 };

/* A column that is handed in for one call: int64 or u32, in rows without gaps or, in one dimension, with any stride. */
typedef struct {
    Py_buffer view;
    Py_ssize_t count;
    Py_ssize_t stride;
    int wide;
} Values;

/* Takes a buffer of `count` items of `item_bytes`; -1 with an exception if it is not one. */
int take_column(PyObject *source, Py_buffer *view, Py_ssize_t item_bytes, Py_ssize_t count, const char *name);

/* Takes several buffers at once; on failure none is held. */
int take_columns(PyObject *const *sources, Py_buffer *views, const Py_ssize_t *item_bytes, const Py_ssize_t *counts,
                 const char *const *names, Py_ssize_t count);
void release_columns(Py_buffer *views, Py_ssize_t count);

int take_values(PyObject *source, Values *values, const char *name);
void release_values(Values *values, Py_ssize_t count);

static inline int64_t value_at(const Values *values, Py_ssize_t at) {
    const char *place = (const char *)values->view.buf + at * values->stride;
    if (values->wide) {
        int64_t value;
        memcpy(&value, place, sizeof value);
        return value;
    }
    uint32_t value;
    memcpy(&value, place, sizeof value);
    return value;
}

/* Counts and places of blocks: what memsvc.core.pool.BlockPool keeps. */
enum { BLOCK_COLUMNS = 7 };
typedef struct {
    PyObject_HEAD
    Py_ssize_t block_count;
    Py_buffer views[BLOCK_COLUMNS];
    int32_t *refs;
    uint32_t *generation;
    uint8_t *state;
    uint8_t *filled;
    int32_t *lessee;
    uint32_t *tenant;
    double *since;
} Blocks;

/* Contents of blocks: what memsvc.core.prefix.PrefixIndex keeps. */
enum { INDEX_COLUMNS = 12 };
typedef struct {
    PyObject_HEAD
    Py_ssize_t block_count;
    Py_ssize_t block_size;
    int64_t mask;
    Py_buffer views[INDEX_COLUMNS];
    uint32_t *tokens;
    uint8_t *published;
    uint8_t *identities;
    uint8_t *parents;
    uint8_t *linked;
    uint8_t *has_extra;
    int32_t *index;
    int32_t *hint;
    int32_t *identity_heads;
    int32_t *identity_next;
    int32_t *parent_heads;
    int32_t *parent_next;
} Index;

static inline const uint8_t *block_tokens(const Index *self, int64_t block) {
    return (const uint8_t *)(self->tokens + block * self->block_size);
}

/* Makes the types; each returns a new reference or NULL. */
PyObject *blocks_type(void);
PyObject *index_type(void);
PyObject *tables_type(void);

/* The types, once the module is loaded: what journals are applied to is checked against them. */
extern PyTypeObject *BlocksType;
extern PyTypeObject *IndexType;

#endif
