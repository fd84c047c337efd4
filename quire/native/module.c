/* quire.native._accelerator: the hot paths of the memory core. Optional: Python has the same, slower. */
#include "columns.h"

PyTypeObject *BlocksType;
PyTypeObject *IndexType;

/* Appends the digest of `parent` and `bytes` at `tail` to a list; returns it, borrowed, or NULL. */
static PyObject *append_digest(PyObject *list, PyObject *parent, const uint8_t *tail, Py_ssize_t bytes) {
    PyObject *digest = PyBytes_FromStringAndSize(NULL, DIGEST_BYTES);
    if (digest == NULL) {
        return NULL;
    }
    blake2b_pair((uint8_t *)PyBytes_AS_STRING(digest), (const uint8_t *)PyBytes_AS_STRING(parent),
                 (size_t)PyBytes_GET_SIZE(parent), tail, (size_t)bytes);
    int failed = PyList_Append(list, digest);
    Py_DECREF(digest);
    return failed ? NULL : digest;
}

static Py_ssize_t stride_of(PyObject *object) {
    Py_ssize_t stride = PyLong_AsSsize_t(object);
    if (stride < 1 && !PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "stride: found %zd, must be above 0", stride);
    }
    return stride;
}

/* chain(parent, data, stride): see quire.hashing.chain. */
static PyObject *chain(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (count != 3 || !PyBytes_Check(args[0])) {
        return PyErr_Format(PyExc_TypeError, "chain: expected a parent (bytes), data and a stride");
    }
    Py_ssize_t stride = stride_of(args[2]);
    Py_buffer data;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[1], &data, PyBUF_C_CONTIGUOUS) < 0) {
        return NULL;
    }
    PyObject *parent = args[0], *digests = PyList_New(0);
    for (Py_ssize_t start = 0; digests != NULL && stride <= data.len - start; start += stride) {
        parent = append_digest(digests, parent, (const uint8_t *)data.buf + start, stride);
        if (parent == NULL) {
            Py_CLEAR(digests);
        }
    }
    PyBuffer_Release(&data);
    return digests;
}

/* each(parents, data, stride): see quire.hashing.each. */
static PyObject *each(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (count != 3 || !PyList_Check(args[0])) {
        return PyErr_Format(PyExc_TypeError, "each: expected parents (a list), data and a stride");
    }
    Py_ssize_t stride = stride_of(args[2]);
    Py_buffer data;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[1], &data, PyBUF_C_CONTIGUOUS) < 0) {
        return NULL;
    }
    PyObject *digests = PyList_New(0);
    Py_ssize_t pieces = data.len / stride + (data.len % stride != 0);
    if (digests != NULL && pieces != PyList_GET_SIZE(args[0])) {
        PyErr_Format(PyExc_ValueError, "each: %zd parents for %zd blocks", PyList_GET_SIZE(args[0]), pieces);
        Py_CLEAR(digests);
    }
    for (Py_ssize_t row = 0; digests != NULL && row < pieces; row++) {
        PyObject *parent = PyList_GET_ITEM(args[0], row);
        Py_ssize_t start = row * stride;
        Py_ssize_t bytes = data.len - start < stride ? data.len - start : stride;
        if (!PyBytes_Check(parent)) {
            PyErr_SetString(PyExc_TypeError, "each: a parent is not bytes");
            Py_CLEAR(digests);
        } else if (append_digest(digests, parent, (const uint8_t *)data.buf + start, bytes) == NULL) {
            Py_CLEAR(digests);
        }
    }
    PyBuffer_Release(&data);
    return digests;
}

static PyMethodDef methods[] = {
    {"chain", (PyCFunction)(void (*)(void))chain, METH_FASTCALL, NULL},
    {"each", (PyCFunction)(void (*)(void))each, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "quire.native._accelerator",
    .m_doc = "The hot paths of the memory core.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__accelerator(void) {
    PyObject *module = PyModule_Create(&definition);
    PyObject *blocks = blocks_type(), *index = index_type(), *tables = tables_type();
    if (module == NULL || blocks == NULL || index == NULL || tables == NULL ||
        PyModule_AddObjectRef(module, "Blocks", blocks) < 0 || PyModule_AddObjectRef(module, "Index", index) < 0 ||
        PyModule_AddObjectRef(module, "Tables", tables) < 0) {
        Py_XDECREF(blocks);
        Py_XDECREF(index);
        Py_XDECREF(tables);
        Py_XDECREF(module);
        return NULL;
    }
    /* Kept for as long as the process lives, as the module is. */
    BlocksType = (PyTypeObject *)blocks;
    IndexType = (PyTypeObject *)index;
    Py_DECREF(tables);
    return module;
}
