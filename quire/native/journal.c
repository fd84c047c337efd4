/* Journals of the usual kind, applied row by row.
 *
 * The usual kind: tables of this gateway that get their next blocks out of its lease, and rows that give a table's next
 * tokens, for which it has blocks, and confirm some as written. Everything is checked before anything stays changed. A
 * journal that is not of that kind is declined as a whole, with nothing changed; memsvc.core.writer then says what it
 * means, or what is wrong with it. So this file refuses nothing and knows no rule that is not there.
 */
#include "columns.h"


enum { TABLE_COLUMNS = 11 };

typedef struct {
    PyObject_HEAD
    int64_t mask;
    PyObject *records;
    /* By slot: the last call that had a row of it, and the blocks that the call under way gives it. */
    uint32_t *seen;
    uint32_t *grown;
    uint32_t call;
    Py_buffer views[TABLE_COLUMNS];
    int64_t *counter;
    int64_t *tokens;
    int64_t *written;
    int64_t *written_floor;
    int64_t *committed;
    int64_t *gateway;
    int64_t *token_block;
    int64_t *write_block;
    int64_t *length;
    int64_t *tenant_tag;
    int64_t *by_hand;
} Tables;

static struct {
    PyObject *blocks;
    PyObject *parent;
    PyObject *publishes;
    PyObject *append;
} names;

static PyObject *tables_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    static const char *const column_names[TABLE_COLUMNS] = {
        "counter", "tokens",      "written",     "written_floor", "committed",  "gateway",
        "token_block", "write_block", "length", "tenant_tag",    "by_hand"};
    Py_ssize_t bytes[TABLE_COLUMNS], counts[TABLE_COLUMNS], capacity;
    PyObject *records, *sources[TABLE_COLUMNS];
    if (!PyArg_ParseTuple(args, "nO!OOOOOOOOOOO", &capacity, &PyList_Type, &records, &sources[0], &sources[1],
                          &sources[2], &sources[3], &sources[4], &sources[5], &sources[6], &sources[7], &sources[8],
                          &sources[9], &sources[10])) {
        return NULL;
    }
    if (capacity < 1 || (capacity & (capacity - 1)) != 0 || PyList_GET_SIZE(records) != capacity) {
        return PyErr_Format(PyExc_ValueError, "capacity: found %zd for %zd records, expected a power of two",
                            capacity, PyList_GET_SIZE(records));
    }
    for (int i = 0; i < TABLE_COLUMNS; i++) {
        bytes[i] = sizeof(int64_t);
        counts[i] = capacity;
    }
    Tables *self = (Tables *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->seen = PyMem_Calloc((size_t)capacity, sizeof(uint32_t));
    self->grown = PyMem_Calloc((size_t)capacity, sizeof(uint32_t));
    if (self->seen == NULL || self->grown == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    if (take_columns(sources, self->views, bytes, counts, column_names, TABLE_COLUMNS) < 0) {
        memset(self->views, 0, sizeof self->views);
        Py_DECREF(self);
        return NULL;
    }
    self->mask = capacity - 1;
    self->records = Py_NewRef(records);
    self->call = 0;
    Py_buffer *views = self->views;
    self->counter = views[0].buf;
    self->tokens = views[1].buf;
    self->written = views[2].buf;
    self->written_floor = views[3].buf;
    self->committed = views[4].buf;
    self->gateway = views[5].buf;
    self->token_block = views[6].buf;
    self->write_block = views[7].buf;
    self->length = views[8].buf;
    self->tenant_tag = views[9].buf;
    self->by_hand = views[10].buf;
    return (PyObject *)self;
}

static void tables_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    Tables *self = (Tables *)object;
    release_columns(self->views, TABLE_COLUMNS);
    PyMem_Free(self->seen);
    PyMem_Free(self->grown);
    Py_XDECREF(self->records);
    type->tp_free(object);
    Py_DECREF(type);
}

/* A row of the journal that was checked. */
typedef struct {
    int64_t slot;
    int64_t known;
    int64_t count;
    int64_t after;
    int64_t written;
    int64_t offset;
} Row;

/* What is published. */
typedef struct {
    PyObject *blocks;
    PyObject *parents;
    PyObject *identities;
    PyObject *before;
    PyObject *indexes;
} Fresh;

enum { TABLE_IDS, TOKEN_STARTS, TOKEN_COUNTS, WRITTEN_COUNTS, TOKEN_IDS, APPENDED, JOURNAL_COLUMNS };

typedef struct {
    Tables *tables;
    Blocks *blocks;
    Index *index;
    int64_t gateway;
    double now;
    int64_t token_limit;
    int64_t block_limit;
    Values columns[JOURNAL_COLUMNS];
    Py_ssize_t row_count;
    Row *rows;
    Py_ssize_t growth_count;
    int64_t *growth_slots;
} Call;

/* Returns the slot of an open table of this gateway whose rows are applied here, or -1. */
static int64_t slot_of(const Call *call, int64_t table) {
    const Tables *tables = call->tables;
    int64_t slot = table & tables->mask;
    int is_open = table > 0 && tables->counter[slot] == table;
    return is_open && tables->gateway[slot] == call->gateway && tables->by_hand[slot] == 0 ? slot : -1;
}

static PyObject *record_of(const Call *call, int64_t slot) {
    return PyList_GET_ITEM(call->tables->records, slot);
}

/* Takes the block ids of a table: 1, 0 if they are not `length` items of int64, -1 with an exception. */
static int take_held(PyObject *record, int64_t length, Py_buffer *held) {
    PyObject *ids = PyObject_GetAttr(record, names.blocks);
    if (ids == NULL) {
        return -1;
    }
    int failed = PyObject_GetBuffer(ids, held, PyBUF_C_CONTIGUOUS);
    Py_DECREF(ids);
    if (failed) {
        return -1;
    }
    if (held->itemsize != sizeof(int64_t) || held->len != length * (Py_ssize_t)sizeof(int64_t)) {
        PyBuffer_Release(held);
        return 0;
    }
    return 1;
}

/* Takes back the growth that was tried: the first `count` rows. */
static void undo_growth(Call *call, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        call->tables->length[call->growth_slots[i]] -= 1;
        call->tables->grown[call->growth_slots[i]] = 0;
        call->blocks->lessee[value_at(&call->columns[APPENDED], 3 * i + 2)] = (int32_t)call->gateway;
    }
}

/* Tries the growth: counts each block to its table and takes it out of the lease. 0, with nothing changed, if one is
 * not the next of its table or not leased to this gateway. */
static int try_growth(Call *call) {
    const Values *appended = &call->columns[APPENDED];
    Tables *tables = call->tables;
    Blocks *blocks = call->blocks;
    int64_t size = call->index->block_size;
    for (Py_ssize_t i = 0; i < call->growth_count; i++) {
        int64_t slot = slot_of(call, value_at(appended, 3 * i));
        int64_t at = value_at(appended, 3 * i + 1), block = value_at(appended, 3 * i + 2);
        if (slot < 0 || at != tables->length[slot] || at >= call->block_limit ||
            tables->tokens[slot] > tables->length[slot] * size || block < 1 || block >= blocks->block_count ||
            blocks->lessee[block] != call->gateway || blocks->state[block] != STATE_LEASED) {
            undo_growth(call, i);
            return 0;
        }
        call->growth_slots[i] = slot;
        tables->length[slot] += 1;
        tables->grown[slot] += 1;
        blocks->lessee[block] = 0;
    }
    return 1;
}

/* Reads row `at`; 0 if it is not of the usual kind. */
static int read_row(Call *call, Py_ssize_t at, int64_t offset) {
    Tables *tables = call->tables;
    Row *row = &call->rows[at];
    row->slot = slot_of(call, value_at(&call->columns[TABLE_IDS], at));
    if (row->slot < 0 || tables->seen[row->slot] == tables->call) {
        return 0;
    }
    tables->seen[row->slot] = tables->call;
    int64_t start = value_at(&call->columns[TOKEN_STARTS], at);
    row->known = tables->tokens[row->slot];
    row->count = value_at(&call->columns[TOKEN_COUNTS], at);
    row->written = value_at(&call->columns[WRITTEN_COUNTS], at);
    row->offset = offset;
    if (start < 0 || start > row->known || row->count < 0 || row->count > call->columns[TOKEN_IDS].count - offset ||
        (row->count > 0 && start != row->known)) {
        return 0;
    }
    row->after = row->known + row->count;
    int64_t room = tables->length[row->slot] * call->index->block_size;
    return row->after <= call->token_limit && row->after <= room && row->written >= tables->written[row->slot] &&
           row->written <= row->after && tables->written_floor[row->slot] == 0;
}

/* Checks that the blocks which a row touches are there: 1, 0, or -1 with an exception.
 *
 * What the table gets in this call is not in its record yet.
 */
static int check_held(const Call *call, const Row *row) {
    const Tables *tables = call->tables;
    int64_t size = call->index->block_size, length = tables->length[row->slot] - tables->grown[row->slot];
    int64_t first = tables->committed[row->slot];
    Py_buffer held;
    int taken = take_held(record_of(call, row->slot), length, &held);
    if (taken != 1) {
        return taken;
    }
    const int64_t *ids = held.buf;
    int fine = first >= 0 && first <= row->written / size && row->known >= first * size;
    /* The block before the first is named as what it follows. */
    for (int64_t i = first ? first - 1 : 0; fine && i < length; i++) {
        fine = ids[i] > 0 && ids[i] < call->index->block_count;
    }
    PyBuffer_Release(&held);
    int64_t open = tables->write_block[row->slot];
    return fine && open >= 0 && open < call->index->block_count;
}

/* Reads and checks all rows: 1, 0, or -1 with an exception. */
static int check_rows(Call *call) {
    const Values *tokens = &call->columns[TOKEN_IDS];
    Tables *tables = call->tables;
    if (++tables->call == 0) {
        memset(tables->seen, 0, (size_t)(tables->mask + 1) * sizeof(uint32_t));
        tables->call = 1;
    }
    int64_t offset = 0;
    for (Py_ssize_t at = 0; at < call->row_count; at++) {
        if (!read_row(call, at, offset)) {
            return 0;
        }
        offset += call->rows[at].count;
    }
    if (offset != tokens->count) {
        return 0;
    }
    for (Py_ssize_t i = 0; tokens->wide && i < tokens->count; i++) {
        if ((uint64_t)value_at(tokens, i) > UINT32_MAX) {
            return 0;
        }
    }
    for (Py_ssize_t at = 0; at < call->row_count; at++) {
        int fine = check_held(call, &call->rows[at]);
        if (fine != 1) {
            return fine;
        }
    }
    return 1;
}

static int apply_growth(Call *call) {
    Tables *tables = call->tables;
    Blocks *blocks = call->blocks;
    for (Py_ssize_t i = 0; i < call->growth_count; i++) {
        int64_t slot = call->growth_slots[i], block = value_at(&call->columns[APPENDED], 3 * i + 2);
        tables->grown[slot] = 0;
        PyObject *ids = PyObject_GetAttr(record_of(call, slot), names.blocks);
        PyObject *number = ids == NULL ? NULL : PyLong_FromLongLong(block);
        PyObject *done = number == NULL ? NULL : PyObject_CallMethodOneArg(ids, names.append, number);
        Py_XDECREF(ids);
        Py_XDECREF(number);
        if (done == NULL) {
            return -1;
        }
        Py_DECREF(done);
        blocks->state[block] = STATE_USED;
        blocks->refs[block] = 1;
        blocks->since[block] = call->now;
        blocks->tenant[block] = (uint32_t)tables->tenant_tag[slot];
        /* Where a table was full up to its end, the first new block is the one that is open now. */
        if (tables->token_block[slot] == 0) {
            tables->token_block[slot] = block;
        }
        if (tables->write_block[slot] == 0) {
            tables->write_block[slot] = block;
        }
    }
    return 0;
}

static void apply_tokens(Call *call, const Row *row, const int64_t *held) {
    Tables *tables = call->tables;
    int64_t size = call->index->block_size;
    if (row->count == 0) {
        return;
    }
    for (int64_t i = 0; i < row->count; i++) {
        int64_t position = row->known + i;
        call->index->tokens[held[position / size] * size + position % size] =
            (uint32_t)value_at(&call->columns[TOKEN_IDS], row->offset + i);
    }
    tables->tokens[row->slot] = row->after;
    tables->token_block[row->slot] = row->after / size < tables->length[row->slot] ? held[row->after / size] : 0;
}

static int append_int(PyObject *list, int64_t value) {
    PyObject *number = PyLong_FromLongLong(value);
    int failed = number == NULL || PyList_Append(list, number) < 0;
    Py_XDECREF(number);
    return failed ? -1 : 0;
}

/* Notes the blocks [first, last) of a table, whose identities it computes, as fresh. */
static int add_fresh(Call *call, PyObject *record, const int64_t *held, int64_t first, int64_t last, Fresh *fresh) {
    size_t bytes = (size_t)call->index->block_size * sizeof(uint32_t);
    PyObject *parent = PyObject_GetAttr(record, names.parent);
    int failed = parent == NULL;
    for (int64_t i = first; !failed && i < last; i++) {
        if (!PyBytes_Check(parent)) {
            PyErr_SetString(PyExc_TypeError, "parent: expected bytes");
            failed = 1;
            break;
        }
        PyObject *identity = PyBytes_FromStringAndSize(NULL, DIGEST_BYTES);
        if (identity == NULL) {
            failed = 1;
            break;
        }
        blake2b_pair((uint8_t *)PyBytes_AS_STRING(identity), (const uint8_t *)PyBytes_AS_STRING(parent),
                     (size_t)PyBytes_GET_SIZE(parent), block_tokens(call->index, held[i]), bytes);
        failed = append_int(fresh->blocks, held[i]) < 0 || PyList_Append(fresh->parents, parent) < 0 ||
                 PyList_Append(fresh->identities, identity) < 0 ||
                 append_int(fresh->before, i ? held[i - 1] : 0) < 0 || append_int(fresh->indexes, i) < 0;
        Py_SETREF(parent, identity);
    }
    failed = failed || PyObject_SetAttr(record, names.parent, parent) < 0;
    Py_XDECREF(parent);
    return failed ? -1 : 0;
}

static int apply_written(Call *call, const Row *row, const int64_t *held, Fresh *fresh) {
    Tables *tables = call->tables;
    Blocks *blocks = call->blocks;
    int64_t size = call->index->block_size, slot = row->slot;
    int64_t before = tables->written[slot], open = tables->write_block[slot];
    tables->written[slot] = row->written;
    if (row->written / size == before / size && open > 0) {
        blocks->filled[open] = (uint8_t)(row->written % size);
        return 0;
    }
    if (row->written == before) {
        return 0;
    }
    int64_t first = tables->committed[slot], last = row->written / size;
    for (int64_t i = first; i < last; i++) {
        blocks->filled[held[i]] = (uint8_t)size;
    }
    tables->committed[slot] = last;
    open = tables->write_block[slot] = last < tables->length[slot] ? held[last] : 0;
    if (row->written % size) {
        blocks->filled[open] = (uint8_t)(row->written % size);
    }
    if (last == first) {
        return 0;
    }
    PyObject *record = record_of(call, slot), *publishes = PyObject_GetAttr(record, names.publishes);
    int wanted = publishes == NULL ? -1 : PyObject_IsTrue(publishes);
    Py_XDECREF(publishes);
    return wanted <= 0 ? wanted : add_fresh(call, record, held, first, last, fresh);
}

static int apply_rows(Call *call, Fresh *fresh) {
    for (Py_ssize_t at = 0; at < call->row_count; at++) {
        const Row *row = &call->rows[at];
        Py_buffer held;
        int taken = take_held(record_of(call, row->slot), call->tables->length[row->slot], &held);
        if (taken != 1) {
            if (taken == 0) {
                PyErr_SetString(PyExc_RuntimeError, "a table's blocks are not those counted");
            }
            return -1;
        }
        apply_tokens(call, row, held.buf);
        int failed = apply_written(call, row, held.buf, fresh);
        PyBuffer_Release(&held);
        if (failed) {
            return -1;
        }
    }
    return 0;
}

/* Checks, then applies: returns what is fresh, None if the journal is declined, NULL with an exception. */
static PyObject *run(Call *call) {
    if (!try_growth(call)) {
        Py_RETURN_NONE;
    }
    int fine = check_rows(call);
    if (fine != 1) {
        undo_growth(call, call->growth_count);
        return fine == 0 ? Py_NewRef(Py_None) : NULL;
    }
    Fresh fresh = {PyList_New(0), PyList_New(0), PyList_New(0), PyList_New(0), PyList_New(0)};
    PyObject *result = NULL;
    if (fresh.blocks == NULL || fresh.parents == NULL || fresh.identities == NULL || fresh.before == NULL ||
        fresh.indexes == NULL) {
        undo_growth(call, call->growth_count);
    } else if (apply_growth(call) == 0 && apply_rows(call, &fresh) == 0) {
        result = Py_BuildValue("nOOOOO", call->growth_count, fresh.blocks, fresh.parents, fresh.identities,
                               fresh.before, fresh.indexes);
    }
    Py_XDECREF(fresh.blocks);
    Py_XDECREF(fresh.parents);
    Py_XDECREF(fresh.identities);
    Py_XDECREF(fresh.before);
    Py_XDECREF(fresh.indexes);
    return result;
}

/* Whether the columns of the journal fit one another. */
static int fit(const Call *call) {
    const Values *columns = call->columns;
    return columns[TOKEN_STARTS].count == call->row_count && columns[TOKEN_COUNTS].count == call->row_count &&
           columns[WRITTEN_COUNTS].count == call->row_count && columns[APPENDED].count % 3 == 0;
}

/* apply(blocks, index, gateway, now, token_limit, block_limit, tables, token_starts, token_counts, written_counts,
 *       token_ids, appended): see above. */
static PyObject *tables_apply(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    static const char *const column_names[JOURNAL_COLUMNS] = {"tables",         "token_starts", "token_counts",
                                                              "written_counts", "token_ids",    "appended"};
    if (count != 6 + JOURNAL_COLUMNS || !Py_IS_TYPE(args[0], BlocksType) || !Py_IS_TYPE(args[1], IndexType)) {
        return PyErr_Format(PyExc_TypeError, "apply: expected Blocks, Index, four numbers and six columns");
    }
    Call call = {.tables = (Tables *)object, .blocks = (Blocks *)args[0], .index = (Index *)args[1]};
    if (call.blocks->block_count != call.index->block_count || call.index->block_size > 255) {
        return PyErr_Format(PyExc_ValueError, "apply: %zd blocks, and contents of %zd", call.blocks->block_count,
                            call.index->block_count);
    }
    call.gateway = PyLong_AsLongLong(args[2]);
    call.now = PyFloat_AsDouble(args[3]);
    call.token_limit = PyLong_AsLongLong(args[4]);
    call.block_limit = PyLong_AsLongLong(args[5]);
    if (PyErr_Occurred()) {
        return NULL;
    }
    for (int i = 0; i < JOURNAL_COLUMNS; i++) {
        if (take_values(args[6 + i], &call.columns[i], column_names[i]) < 0) {
            release_values(call.columns, i);
            return NULL;
        }
    }
    call.row_count = call.columns[TABLE_IDS].count;
    call.growth_count = call.columns[APPENDED].count / 3;
    PyObject *result = NULL;
    if (call.gateway < 1 || call.gateway > INT32_MAX || !fit(&call)) {
        result = Py_NewRef(Py_None);
    } else {
        call.rows = PyMem_Calloc((size_t)call.row_count + 1, sizeof(Row));
        call.growth_slots = PyMem_Calloc((size_t)call.growth_count + 1, sizeof(int64_t));
        result = call.rows == NULL || call.growth_slots == NULL ? PyErr_NoMemory() : run(&call);
        PyMem_Free(call.rows);
        PyMem_Free(call.growth_slots);
    }
    release_values(call.columns, JOURNAL_COLUMNS);
    return result;
}

static PyMethodDef methods[] = {
    {"apply", (PyCFunction)(void (*)(void))tables_apply, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, tables_new},
    {Py_tp_dealloc, tables_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "quire.native._accelerator.Tables",
    .basicsize = sizeof(Tables),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

PyObject *tables_type(void) {
    names.blocks = PyUnicode_InternFromString("blocks");
    names.parent = PyUnicode_InternFromString("parent");
    names.publishes = PyUnicode_InternFromString("publishes");
    names.append = PyUnicode_InternFromString("append");
    if (names.blocks == NULL || names.parent == NULL || names.publishes == NULL || names.append == NULL) {
        return NULL;
    }
    return PyType_FromSpec(&spec);
}
