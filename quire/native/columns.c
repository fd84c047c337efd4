#include "columns.h"

int take_column(PyObject *source, Py_buffer *view, Py_ssize_t item_bytes, Py_ssize_t count, const char *name) {
    if (PyObject_GetBuffer(source, view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0) {
        return -1;
    }
    if (view->itemsize != item_bytes || view->len != item_bytes * count || (uintptr_t)view->buf % (size_t)item_bytes) {
        PyErr_Format(PyExc_ValueError, "%s: found %zd bytes in items of %zd, expected %zd items of %zd", name,
                     view->len, view->itemsize, count, item_bytes);
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

int take_columns(PyObject *const *sources, Py_buffer *views, const Py_ssize_t *item_bytes, const Py_ssize_t *counts,
                 const char *const *names, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        if (take_column(sources[i], &views[i], item_bytes[i], counts[i], names[i]) < 0) {
            release_columns(views, i);
            return -1;
        }
    }
    return 0;
}

void release_columns(Py_buffer *views, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        PyBuffer_Release(&views[i]);
    }
}

int take_values(PyObject *source, Values *values, const char *name) {
    if (PyObject_GetBuffer(source, &values->view, PyBUF_STRIDES) < 0) {
        return -1;
    }
    Py_ssize_t item = values->view.itemsize;
    int is_row = values->view.ndim == 1 && item != 1;
    /* A bytes object holds packed u32. */
    if (item == 1 && values->view.len % 4 == 0) {
        item = 4;
    }
    if ((item != 4 && item != 8) || (!is_row && !PyBuffer_IsContiguous(&values->view, 'C'))) {
        PyErr_Format(PyExc_ValueError, "%s: found %zd bytes in items of %zd, expected rows of int64 or u32", name,
                     values->view.len, values->view.itemsize);
        PyBuffer_Release(&values->view);
        return -1;
    }
    values->wide = item == 8;
    values->stride = is_row ? values->view.strides[0] : item;
    values->count = values->view.len / item;
    return 0;
}

void release_values(Values *values, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        PyBuffer_Release(&values[i].view);
    }
}
