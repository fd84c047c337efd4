/* Taking and dropping blocks. */
#include "columns.h"

static PyObject *blocks_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    static const char *const names[BLOCK_COLUMNS] = {"refs",   "generation", "state", "filled",
                                                     "lessee", "tenant",     "since"};
    static const Py_ssize_t bytes[BLOCK_COLUMNS] = {4, 4, 1, 1, 4, 4, 8};
    Py_ssize_t block_count;
    PyObject *sources[BLOCK_COLUMNS];
    if (!PyArg_ParseTuple(args, "nOOOOOOO", &block_count, &sources[0], &sources[1], &sources[2], &sources[3],
                          &sources[4], &sources[5], &sources[6])) {
        return NULL;
    }
    if (block_count < 1 || block_count > INT32_MAX) {
        return PyErr_Format(PyExc_ValueError, "block_count: found %zd, allowed are 1 .. 2147483647", block_count);
    }
    Py_ssize_t counts[BLOCK_COLUMNS];
    for (int i = 0; i < BLOCK_COLUMNS; i++) {
        counts[i] = block_count;
    }
    Blocks *self = (Blocks *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    if (take_columns(sources, self->views, bytes, counts, names, BLOCK_COLUMNS) < 0) {
        memset(self->views, 0, sizeof self->views);
        Py_DECREF(self);
        return NULL;
    }
    self->block_count = block_count;
    self->refs = self->views[0].buf;
    self->generation = self->views[1].buf;
    self->state = self->views[2].buf;
    self->filled = self->views[3].buf;
    self->lessee = self->views[4].buf;
    self->tenant = self->views[5].buf;
    self->since = self->views[6].buf;
    return (PyObject *)self;
}

static void blocks_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    release_columns(((Blocks *)object)->views, BLOCK_COLUMNS);
    type->tp_free(object);
    Py_DECREF(type);
}

/* Returns whether every value is the number of a block; raises IndexError if not. */
static int are_blocks(const Values *values, Py_ssize_t block_count) {
    for (Py_ssize_t i = 0; i < values->count; i++) {
        int64_t block = value_at(values, i);
        if (block < 0 || block >= block_count) {
            PyErr_Format(PyExc_IndexError, "block %lld is not one of %zd", (long long)block, block_count);
            return 0;
        }
    }
    return 1;
}

/* take(blocks, now, lessee): gives blocks a new life. */
static PyObject *blocks_take(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    Blocks *self = (Blocks *)object;
    if (count != 3) {
        return PyErr_Format(PyExc_TypeError, "take: found %zd arguments, expected 3", count);
    }
    double now = PyFloat_AsDouble(args[1]);
    long lessee = PyLong_AsLong(args[2]);
    Values blocks;
    if (PyErr_Occurred() || take_values(args[0], &blocks, "blocks") < 0) {
        return NULL;
    }
    if (!are_blocks(&blocks, self->block_count)) {
        release_values(&blocks, 1);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < blocks.count; i++) {
        int64_t block = value_at(&blocks, i);
        self->generation[block] += 1;
        self->filled[block] = 0;
        self->since[block] = now;
        if (lessee) {
            self->state[block] = STATE_LEASED;
            self->lessee[block] = (int32_t)lessee;
        } else {
            self->state[block] = STATE_USED;
            self->refs[block] = 1;
        }
    }
    release_values(&blocks, 1);
    Py_RETURN_NONE;
}

/* drop(blocks, reusable, now): removes a reference of each; see memsvc.core.pool.BlockPool.drop.
 *
 * Returns None, having changed nothing, if a block has no reference; else how many blocks were pending and are gone,
 * and the blocks that are blank and cached now, each packed int64.
 */
static PyObject *blocks_drop(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    Blocks *self = (Blocks *)object;
    if (count != 3) {
        return PyErr_Format(PyExc_TypeError, "drop: found %zd arguments, expected 3", count);
    }
    double now = PyFloat_AsDouble(args[2]);
    Values blocks;
    Py_buffer reusable;
    if (PyErr_Occurred() || take_values(args[0], &blocks, "blocks") < 0) {
        return NULL;
    }
    if (PyObject_GetBuffer(args[1], &reusable, PyBUF_C_CONTIGUOUS) < 0) {
        release_values(&blocks, 1);
        return NULL;
    }
    PyObject *result = NULL, *blank = NULL, *cached = NULL;
    if (reusable.len != blocks.count) {
        PyErr_Format(PyExc_ValueError, "reusable: found %zd, expected %zd", reusable.len, blocks.count);
        goto done;
    }
    if (!are_blocks(&blocks, self->block_count)) {
        goto done;
    }
    Py_ssize_t blank_count = 0, cached_count = 0, pending_count = 0;
    const uint8_t *keep = reusable.buf;
    for (Py_ssize_t i = 0; i < blocks.count; i++) {
        int64_t block = value_at(&blocks, i);
        if (self->refs[block] < 1) {
            result = Py_NewRef(Py_None);
            goto done;
        }
        if (self->refs[block] == 1) {
            *(keep[i] ? &cached_count : &blank_count) += 1;
        }
    }
    blank = PyBytes_FromStringAndSize(NULL, blank_count * (Py_ssize_t)sizeof(int64_t));
    cached = PyBytes_FromStringAndSize(NULL, cached_count * (Py_ssize_t)sizeof(int64_t));
    if (blank == NULL || cached == NULL) {
        goto done;
    }
    char *blank_to = PyBytes_AS_STRING(blank), *cached_to = PyBytes_AS_STRING(cached);
    char *blank_end = blank_to + PyBytes_GET_SIZE(blank), *cached_end = cached_to + PyBytes_GET_SIZE(cached);
    for (Py_ssize_t i = 0; i < blocks.count; i++) {
        int64_t block = value_at(&blocks, i);
        char **to = keep[i] ? &cached_to : &blank_to;
        char *end = keep[i] ? cached_end : blank_end;
        self->refs[block] -= 1;
        /* A block that is given twice, which it must not be, has no place left. */
        if (self->refs[block] != 0 || *to == end) {
            continue;
        }
        pending_count += self->state[block] == STATE_PENDING;
        self->state[block] = keep[i] ? STATE_CACHED : STATE_FREE;
        self->since[block] = now;
        memcpy(*to, &block, sizeof block);
        *to += sizeof block;
    }
    if (blank_to != blank_end || cached_to != cached_end) {
        PyErr_SetString(PyExc_ValueError, "blocks: one is given twice");
        goto done;
    }
    result = Py_BuildValue("nOO", pending_count, blank, cached);
done:
    Py_XDECREF(blank);
    Py_XDECREF(cached);
    PyBuffer_Release(&reusable);
    release_values(&blocks, 1);
    return result;
}

static PyMethodDef methods[] = {
    {"take", (PyCFunction)(void (*)(void))blocks_take, METH_FASTCALL, NULL},
    {"drop", (PyCFunction)(void (*)(void))blocks_drop, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, blocks_new},
    {Py_tp_dealloc, blocks_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "quire.native._accelerator.Blocks",
    .basicsize = sizeof(Blocks),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

PyObject *blocks_type(void) {
    return PyType_FromSpec(&spec);
}
