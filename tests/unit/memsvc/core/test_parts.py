"""The parts of the memory core, one by one."""

from __future__ import annotations

from array import array
import random

import numpy as np
import pytest

from memsvc.core.content import FreshContent
from memsvc.core.free_order import BlankOrder, CachedOrder
from memsvc.core.lease import ANSWER_LIMIT, AnswerLog
from memsvc.core.pool import BlockPool, BlockState
from memsvc.core.prefix import PrefixIndex
from memsvc.core.table import TableColumns, TableRecord
from quire import hashing
from quire.columns import pack
from quire.errors import InvariantError, StaleEpochError


def ids(*blocks: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Returns block ids."""
    return np.array(blocks, np.int64)


def test_blank_blocks_come_back_in_the_order_in_which_they_were_returned() -> None:
    """Otherwise runs are not repeatable."""
    random_source = random.Random(1)
    order, model = BlankOrder(20), list(range(1, 20))
    held: list[int] = []
    for _ in range(500):
        if random_source.random() < 0.5 and model:
            count = random_source.randint(1, len(model))
            taken = order.take(count).tolist()
            assert taken == model[:count]
            model = model[count:]
            held += taken
        elif held:
            back = random_source.sample(held, random_source.randint(1, len(held)))
            held = [block for block in held if block not in back]
            order.put(ids(*back))
            model += back
        assert order.blocks().tolist() == model
        assert len(order) == len(model)


def test_row_04_the_cached_order_equals_a_list_over_many_compactions() -> None:
    """Otherwise the wrong block is evicted after some thousand requests."""
    random_source = random.Random(2)
    order, model = CachedOrder(12), list[int]()
    outside = list(range(1, 12))
    for _ in range(2000):
        action = random_source.randrange(3)
        if action == 0 and outside:
            blocks = random_source.sample(outside, random_source.randint(1, len(outside)))
            order.put(ids(*blocks))
            model += blocks
        elif action == 1 and model:
            blocks = random_source.sample(model, random_source.randint(1, len(model)))
            order.remove(ids(*blocks))
            model = [block for block in model if block not in blocks]
        elif action == 2 and model:
            count = random_source.randint(1, len(model))
            assert order.take(count).tolist() == model[:count]
            model = model[count:]
        outside = [block for block in range(1, 12) if block not in model]
        assert order.blocks().tolist() == model
        assert len(order) == len(model)


def test_row_33_a_block_dropped_twice_is_an_invariant_that_is_named() -> None:
    """Otherwise a double free gives one block to two sequences."""
    pool = BlockPool(4)
    blocks, _ = pool.take(2, 0.0)
    pool.drop(blocks, np.zeros(2, bool), 0.0)
    with pytest.raises(InvariantError, match="block 1 was freed twice"):
        pool.drop(blocks[:1], np.zeros(1, bool), 0.0)


def test_a_pending_block_that_is_shared_again_is_used_and_pending_after_that() -> None:
    """Otherwise a block of a dead gateway is freed before its fence, or never."""
    pool = BlockPool(4)
    blocks, _ = pool.take(1, 0.0)
    pool.begin_closing(blocks, 1.0)
    assert pool.count(BlockState.PENDING) == 1
    pool.share(blocks, 2.0)
    assert pool.count(BlockState.USED) == 1
    pool.drop(blocks, np.ones(1, bool), 3.0)
    assert pool.count(BlockState.PENDING) == 1
    pool.end_closing(blocks)
    pool.drop(blocks, np.ones(1, bool), 4.0)
    assert pool.count(BlockState.CACHED) == 1


def filled_index(length: int) -> tuple[PrefixIndex, bytes, bytes]:
    """Returns an index in which blocks 1, 2, ... hold a prompt, the prompt, and the root."""
    index, root = PrefixIndex(20, 16), b"r" * 16
    tokens = list(range(1000, 1000 + length * 16))
    for block in range(1, length + 1):
        index.tokens[block] = tokens[(block - 1) * 16 : block * 16]
    content = FreshContent()
    blocks = list(range(1, length + 1))
    content.add(blocks, root, index.chain(root, blocks), 0)
    assert index.publish_full(content) == []
    return index, pack([*tokens, 1]), root


@pytest.mark.parametrize("missing", [1, 2, 7, 12])
def test_row_14_a_match_ends_at_the_first_missing_block_even_if_later_ones_are_there(missing: int) -> None:
    """Otherwise a sequence reads a block that was given away."""
    index, prompt, root = filled_index(12)
    assert index.match(root, prompt).blocks.tolist() == list(range(1, 13))
    index.forget(ids(missing))
    match = index.match(root, prompt)
    assert match.blocks.tolist() == list(range(1, missing))
    assert match.partial_block == 0


def test_row_20_forgetting_a_block_leaves_an_equal_one_alone() -> None:
    """Otherwise removing one copy removes the identity of the other."""
    index, prompt, root = filled_index(2)
    index.tokens[5] = index.tokens[1]
    content = FreshContent()
    content.add([5], root, index.chain(root, [5]), 0)
    assert index.publish_full(content) == [(5, 1)]
    index.forget(ids(5))
    assert index.match(root, prompt).blocks.tolist() == [1, 2]


def test_a_wrong_hint_costs_a_hash_and_never_a_wrong_block() -> None:
    """Otherwise two prompts that part in the middle read one another's blocks."""
    index, prompt, root = filled_index(4)
    tokens = np.frombuffer(prompt, "<u4")[:-1].copy()
    tokens[40] = 7
    for block, position in ((9, 2), (10, 3)):
        index.tokens[block] = tokens[position * 16 : position * 16 + 16]
    parent = index.identity(2)
    content = FreshContent()
    content.add([9, 10], parent, index.chain(parent, [9, 10]), 2)
    index.publish_full(content)
    assert index.match(root, prompt).blocks.tolist() == [1, 2, 3, 4]
    assert index.match(root, pack([*tokens.tolist(), 1])).blocks.tolist() == [1, 2, 9, 10]
    assert index.match(root, prompt).identity == hashing.chain(root, prompt, 16)[-1]


def test_a_hint_to_a_block_of_another_prefix_is_not_believed() -> None:
    """Otherwise equal tokens after another prefix match, once the block before them was given away."""
    index, prompt, root = filled_index(2)
    index.forget(ids(1))
    index.tokens[1] = range(16)
    content = FreshContent()
    content.add([1], root, index.chain(root, [1]), 0)
    index.publish_full(content)
    other = pack(list(range(16))) + prompt[64:]
    assert index.match(root, other).blocks.tolist() == [1]


def test_tables_keep_their_slots_apart_while_they_grow() -> None:
    """Otherwise two sequences share a row, and one is told the other's tokens."""
    random_source = random.Random(3)
    tables, live = TableColumns(), {}
    for ordinal in range(1000):
        counter = tables.reserve()
        record = TableRecord(counter, ordinal, f"r{ordinal}", 0, 1, "", 0, 0.0, 0, True, array("q"), b"")
        slot = tables.open(record)
        tables.tokens[slot] = counter * 3
        live[counter] = record
        if random_source.random() < 0.6:
            gone = random_source.choice(list(live))
            tables.close(tables.slot(gone))
            del live[gone]
            assert tables.slot(gone) == -1
    found = tables.slots(np.array(sorted(live), np.int64))
    assert tables.tokens[found].tolist() == [counter * 3 for counter in sorted(live)]
    assert [tables.record(slot) for slot in tables.open_slots()] == [live[counter] for counter in sorted(live)]
    assert not tables.has_repeats(found)
    assert tables.has_repeats(np.append(found, found[0]))


def test_old_answers_are_dropped_and_their_requests_refused() -> None:
    """Otherwise the log of answers grows for ever, or a very late retry opens a second table."""
    answers: AnswerLog[str] = AnswerLog()
    for number in range(1, ANSWER_LIMIT + 11):
        assert answers.get(number) is None
        answers.put(number, str(number))
    assert answers.get(11) == "11"
    with pytest.raises(StaleEpochError, match="not above 10"):
        answers.get(5)
