/* Finding and publishing contents. */
#include "columns.h"


static PyObject *index_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    static const char *const names[INDEX_COLUMNS] = {
        "tokens", "published", "identities",     "parents",       "linked",       "has_extra",
        "index",  "hint",      "identity_heads", "identity_next", "parent_heads", "parent_next"};
    static const Py_ssize_t bytes[INDEX_COLUMNS] = {4, 1, 8, 8, 1, 1, 4, 4, 4, 4, 4, 4};
    Py_ssize_t block_count, block_size, heads;
    PyObject *sources[INDEX_COLUMNS];
    if (!PyArg_ParseTuple(args, "nnnOOOOOOOOOOOO", &block_count, &block_size, &heads, &sources[0], &sources[1],
                          &sources[2], &sources[3], &sources[4], &sources[5], &sources[6], &sources[7], &sources[8],
                          &sources[9], &sources[10], &sources[11])) {
        return NULL;
    }
    if (block_count < 1 || block_count > INT32_MAX || block_size < 1 || block_size > 1024) {
        return PyErr_Format(PyExc_ValueError, "found %zd blocks of %zd, allowed are 1 .. 2147483647 of 1 .. 1024",
                            block_count, block_size);
    }
    if (heads < 1 || (heads & (heads - 1)) != 0) {
        return PyErr_Format(PyExc_ValueError, "heads: found %zd, expected a power of two", heads);
    }
    Py_ssize_t counts[INDEX_COLUMNS];
    for (int i = 0; i < INDEX_COLUMNS; i++) {
        counts[i] = block_count;
    }
    counts[0] *= block_size;
    counts[2] *= 2;
    counts[3] *= 2;
    counts[8] = counts[10] = heads;
    Index *self = (Index *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    if (take_columns(sources, self->views, bytes, counts, names, INDEX_COLUMNS) < 0) {
        memset(self->views, 0, sizeof self->views);
        Py_DECREF(self);
        return NULL;
    }
    self->block_count = block_count;
    self->block_size = block_size;
    self->mask = heads - 1;
    Py_buffer *views = self->views;
    self->tokens = views[0].buf;
    self->published = views[1].buf;
    self->identities = views[2].buf;
    self->parents = views[3].buf;
    self->linked = views[4].buf;
    self->has_extra = views[5].buf;
    self->index = views[6].buf;
    self->hint = views[7].buf;
    self->identity_heads = views[8].buf;
    self->identity_next = views[9].buf;
    self->parent_heads = views[10].buf;
    self->parent_next = views[11].buf;
    return (PyObject *)self;
}

static void index_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    release_columns(((Index *)object)->views, INDEX_COLUMNS);
    type->tp_free(object);
    Py_DECREF(type);
}

/* A block that the columns name; one that cannot be ends a chain like 0 does. */
static inline int64_t checked(const Index *self, int64_t block) {
    return block > 0 && block < self->block_count ? block : 0;
}

static inline int64_t bucket_of(const Index *self, const uint8_t *digest) {
    uint64_t word = 0;
    for (int i = 7; i >= 0; i--) {
        word = word << 8 | digest[i];
    }
    return (int64_t)(word & (uint64_t)self->mask);
}

static inline uint8_t *digest_at(uint8_t *digests, int64_t block) {
    return digests + block * DIGEST_BYTES;
}

/* Takes `block` out of the chain of `digest`; -1 with LookupError if it is not there. */
static int unlink_from(const Index *self, int32_t *heads, int32_t *following, const uint8_t *digest, int64_t block) {
    int32_t *place = &heads[bucket_of(self, digest)];
    for (Py_ssize_t steps = 0; steps < self->block_count; steps++) {
        int64_t found = checked(self, *place);
        if (!found) {
            break;
        }
        if (found == block) {
            *place = following[block];
            return 0;
        }
        place = &following[found];
    }
    PyErr_Format(PyExc_LookupError, "block %lld is not linked under its digest", (long long)block);
    return -1;
}

static int unlink_block(Index *self, int64_t block) {
    if (self->linked[block] == PUBLICATION_FULL &&
        unlink_from(self, self->identity_heads, self->identity_next, digest_at(self->identities, block), block) < 0) {
        return -1;
    }
    if (self->linked[block] &&
        unlink_from(self, self->parent_heads, self->parent_next, digest_at(self->parents, block), block) < 0) {
        return -1;
    }
    self->linked[block] = 0;
    return 0;
}

static void link_into(const Index *self, int32_t *heads, int32_t *following, const uint8_t *digest, int64_t block) {
    int64_t bucket = bucket_of(self, digest);
    following[block] = heads[bucket];
    heads[bucket] = (int32_t)block;
}

/* Returns the block published under `digest`, or 0. */
static int64_t block_of(const Index *self, const uint8_t *digest) {
    int64_t block = checked(self, self->identity_heads[bucket_of(self, digest)]);
    for (Py_ssize_t steps = 0; block && steps < self->block_count; steps++) {
        if (self->published[block] == PUBLICATION_FULL &&
            memcmp(digest_at(self->identities, block), digest, DIGEST_BYTES) == 0) {
            return block;
        }
        block = checked(self, self->identity_next[block]);
    }
    return 0;
}

static int64_t int_at(PyObject *list, Py_ssize_t at) {
    PyObject *item = PyList_GET_ITEM(list, at);
    return PyLong_Check(item) ? PyLong_AsLongLong(item) : -1;
}

static int is_digest(PyObject *item) {
    return PyBytes_Check(item) && PyBytes_GET_SIZE(item) == DIGEST_BYTES;
}

/* Checks the five lists that `publish` takes; raises if they cannot be. */
static int check_fresh(const Index *self, PyObject *const *lists) {
    for (int i = 0; i < 5; i++) {
        if (!PyList_Check(lists[i]) || PyList_GET_SIZE(lists[i]) != PyList_GET_SIZE(lists[0])) {
            PyErr_SetString(PyExc_ValueError, "publish: expected five lists of one length");
            return -1;
        }
    }
    for (Py_ssize_t row = 0; row < PyList_GET_SIZE(lists[0]); row++) {
        int64_t block = int_at(lists[0], row), before = int_at(lists[3], row), position = int_at(lists[4], row);
        if (!is_digest(PyList_GET_ITEM(lists[1], row)) || !is_digest(PyList_GET_ITEM(lists[2], row)) || block < 1 ||
            block >= self->block_count || before < 0 || before >= self->block_count || position < 0 ||
            position > INT32_MAX) {
            if (!PyErr_Occurred()) {
                PyErr_Format(PyExc_ValueError, "publish: row %zd is not a block", row);
            }
            return -1;
        }
    }
    return 0;
}

/* Appends (block, other) to a list. */
static int append_pair(PyObject *list, int64_t block, int64_t other) {
    PyObject *pair = Py_BuildValue("LL", (long long)block, (long long)other);
    int failed = pair == NULL || PyList_Append(list, pair) < 0;
    Py_XDECREF(pair);
    return failed ? -1 : 0;
}

/* Links one block, or finds that an equal one is there: 1 if linked, 0 for a duplicate, 2 for a collision. */
static int publish_one(Index *self, int64_t block, int64_t before, int64_t *other) {
    const uint8_t *identity = digest_at(self->identities, block);
    *other = block_of(self, identity);
    if (*other) {
        size_t bytes = (size_t)self->block_size * sizeof(uint32_t);
        if (memcmp(block_tokens(self, *other), block_tokens(self, block), bytes) != 0) {
            return 2;
        }
        self->published[block] = PUBLICATION_DUPLICATE;
        return 0;
    }
    link_into(self, self->identity_heads, self->identity_next, identity, block);
    link_into(self, self->parent_heads, self->parent_next, digest_at(self->parents, block), block);
    self->linked[block] = PUBLICATION_FULL;
    self->published[block] = PUBLICATION_FULL;
    self->hint[before] = (int32_t)block;
    return 1;
}

/* publish(blocks, parents, identities, before, indexes): see memsvc.core.prefix.PrefixIndex.publish_full.
 *
 * Returns the duplicates as (block, other), the number of collisions, and the rows that were linked: None for all.
 */
static PyObject *index_publish(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    Index *self = (Index *)object;
    if (count != 5) {
        return PyErr_Format(PyExc_TypeError, "publish: found %zd arguments, expected 5", count);
    }
    if (check_fresh(self, args) < 0) {
        return NULL;
    }
    Py_ssize_t rows = PyList_GET_SIZE(args[0]), collisions = 0;
    for (Py_ssize_t row = 0; row < rows; row++) {
        if (unlink_block(self, int_at(args[0], row)) < 0) {
            return NULL;
        }
    }
    for (Py_ssize_t row = 0; row < rows; row++) {
        int64_t block = int_at(args[0], row);
        memcpy(digest_at(self->parents, block), PyBytes_AS_STRING(PyList_GET_ITEM(args[1], row)), DIGEST_BYTES);
        memcpy(digest_at(self->identities, block), PyBytes_AS_STRING(PyList_GET_ITEM(args[2], row)), DIGEST_BYTES);
        self->index[block] = (int32_t)int_at(args[4], row);
        self->has_extra[block] = 0;
    }
    PyObject *duplicates = PyList_New(0), *linked = PyList_New(0), *result = NULL;
    if (duplicates == NULL || linked == NULL) {
        goto done;
    }
    Py_ssize_t linked_count = 0;
    for (Py_ssize_t row = 0; row < rows; row++) {
        int64_t block = int_at(args[0], row), other;
        int outcome = publish_one(self, block, int_at(args[3], row), &other);
        if (outcome == 1) {
            linked_count++;
            continue;
        }
        collisions += outcome == 2;
        if (outcome == 0 && append_pair(duplicates, block, other) < 0) {
            goto done;
        }
    }
    if (linked_count == rows) {
        result = Py_BuildValue("OnO", duplicates, collisions, Py_None);
        goto done;
    }
    for (Py_ssize_t row = 0; row < rows; row++) {
        if (self->linked[int_at(args[0], row)]) {
            PyObject *number = PyLong_FromSsize_t(row);
            int failed = number == NULL || PyList_Append(linked, number) < 0;
            Py_XDECREF(number);
            if (failed) {
                goto done;
            }
        }
    }
    result = Py_BuildValue("OnO", duplicates, collisions, linked);
done:
    Py_XDECREF(duplicates);
    Py_XDECREF(linked);
    return result;
}

/* chain(parent, blocks): the identities of full blocks, the first of which follows `parent`. */
static PyObject *index_chain(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    Index *self = (Index *)object;
    if (count != 2 || !PyBytes_Check(args[0]) || !PyList_Check(args[1])) {
        return PyErr_Format(PyExc_TypeError, "chain: expected a parent and a list of blocks");
    }
    PyObject *parent = args[0], *identities = PyList_New(PyList_GET_SIZE(args[1]));
    if (identities == NULL) {
        return NULL;
    }
    for (Py_ssize_t row = 0; row < PyList_GET_SIZE(args[1]); row++) {
        int64_t block = int_at(args[1], row);
        if (block < 0 || block >= self->block_count) {
            if (!PyErr_Occurred()) {
                PyErr_Format(PyExc_IndexError, "block %lld is not one of %zd", (long long)block, self->block_count);
            }
            Py_DECREF(identities);
            return NULL;
        }
        PyObject *identity = PyBytes_FromStringAndSize(NULL, DIGEST_BYTES);
        if (identity == NULL) {
            Py_DECREF(identities);
            return NULL;
        }
        blake2b_pair((uint8_t *)PyBytes_AS_STRING(identity), (const uint8_t *)PyBytes_AS_STRING(parent),
                     (size_t)PyBytes_GET_SIZE(parent), block_tokens(self, block),
                     (size_t)self->block_size * sizeof(uint32_t));
        PyList_SET_ITEM(identities, row, identity);
        parent = identity;
    }
    return identities;
}

/* follow(block, before, words, start, stop): the blocks that hints lead to and whose contents are those of `words`.
 *
 * `block` is where to begin, `before` the identity of the block before it; `words` are packed tokens of whole blocks,
 * of which those from `start` up to `stop` are looked for. See memsvc.core.prefix.PrefixIndex.match.
 */
static PyObject *index_follow(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    Index *self = (Index *)object;
    if (count != 5 || !is_digest(args[1])) {
        return PyErr_Format(PyExc_TypeError, "follow: expected a block, a digest, words, start and stop");
    }
    int64_t block = PyLong_AsLongLong(args[0]);
    Py_ssize_t start = PyLong_AsSsize_t(args[3]), stop = PyLong_AsSsize_t(args[4]);
    Py_buffer words;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[2], &words, PyBUF_C_CONTIGUOUS) < 0) {
        return NULL;
    }
    Py_ssize_t stride = self->block_size * (Py_ssize_t)sizeof(uint32_t);
    const uint8_t *before = (const uint8_t *)PyBytes_AS_STRING(args[1]);
    PyObject *path = NULL;
    if (start < 0 || stop > words.len / stride) {
        PyErr_Format(PyExc_IndexError, "follow: blocks %zd .. %zd of %zd", start, stop, words.len / stride);
        goto done;
    }
    path = PyList_New(0);
    for (block = checked(self, block); path != NULL && block && start < stop; start++) {
        if (self->published[block] != PUBLICATION_FULL || self->has_extra[block] ||
            memcmp(block_tokens(self, block), (const uint8_t *)words.buf + start * stride, (size_t)stride) != 0 ||
            memcmp(digest_at(self->parents, block), before, DIGEST_BYTES) != 0) {
            break;
        }
        PyObject *number = PyLong_FromLongLong(block);
        if (number == NULL || PyList_Append(path, number) < 0) {
            Py_CLEAR(path);
        }
        Py_XDECREF(number);
        before = digest_at(self->identities, block);
        block = checked(self, self->hint[block]);
    }
done:
    PyBuffer_Release(&words);
    return path;
}

static PyMethodDef methods[] = {
    {"publish", (PyCFunction)(void (*)(void))index_publish, METH_FASTCALL, NULL},
    {"chain", (PyCFunction)(void (*)(void))index_chain, METH_FASTCALL, NULL},
    {"follow", (PyCFunction)(void (*)(void))index_follow, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, index_new},
    {Py_tp_dealloc, index_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "quire.native._accelerator.Index",
    .basicsize = sizeof(Index),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

PyObject *index_type(void) {
    return PyType_FromSpec(&spec);
}
