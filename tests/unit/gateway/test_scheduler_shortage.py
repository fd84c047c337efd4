"""What the scheduler does when blocks are short: whom it spares, who gives way, and when that ends."""

from __future__ import annotations

from gateway.core.queue import WaitingQueue
from gateway.core.sequence import SequenceState
from quire.memory import Fork
from tests.unit.gateway.test_scheduler import Bench, make_request, one


def test_who_is_left_alone_with_a_shared_block_while_blocks_are_short_takes_none() -> None:
    """Otherwise it gets a block behind the one that it writes to, and names a wrong one for every later token."""
    bench = Bench()
    request = make_request(20, samples=2)
    first = bench.admit(request.samples[0])
    outcome = bench.outcome(bench.scheduler.schedule())
    outcome.sibling_tables, outcome.sibling_tokens = [first.table], [8]
    bench.scheduler.update(outcome)
    bench.scheduler.fork(first.table, request.samples[1:], Fork(1, [11], list(first.blocks), 20, must_copy=False))
    first.resume()
    bench.scheduler._shortage.preempted(one(16))
    bench.grant(2)
    draft = bench.scheduler.schedule()
    assert sorted(draft.scheduled_tables) == [first.table, 11]
    assert (draft.replaced, draft.appended) == ([first.table, 1, bench.next_block - 2], [])
    assert len(bench.scheduler.lease) == 1


def test_a_shortage_ends_with_those_who_waited_for_its_end() -> None:
    """Otherwise everybody goes on being spared blocks for somebody whose client has left."""
    bench = Bench()
    first, second = bench.admit(one(16)), bench.admit(one(16))
    bench.step()
    bench.scheduler.lease.exhausted = True
    bench.step()
    assert (first.state, second.state) == (SequenceState.RUNNING, SequenceState.WAITING)
    bench.scheduler.schedule()
    assert bench.scheduler.lease.sparing
    second.ended = True
    bench.scheduler.schedule()
    assert not bench.scheduler.lease.sparing


def test_who_is_held_gives_way_where_nobody_computes_and_is_queued_when_it_is_resumed() -> None:
    """Otherwise beams that wait for others hold the blocks that these wait for, and all wait for ever."""
    bench = Bench()
    queue = WaitingQueue(8)
    requests = [make_request(16), make_request(16, arrived_at=1.0)]
    for request in requests:
        request.samples[0].hold()
        queue.push_request(request)
        bench.admit(request.samples[0])
    assert (queue.pop(), queue.pop()) == tuple(request.samples[0] for request in requests)
    assert not bench.scheduler.yield_held()
    bench.grant(2)
    bench.step()
    assert not bench.scheduler.schedule()
    assert bench.scheduler.yield_held()
    last = requests[1].samples[0]
    assert (last.state, requests[0].samples[0].state) == (SequenceState.CLOSING, SequenceState.RUNNING)
    _, update = bench.step()
    queue.put_back(update.requeued)
    assert (last.state, len(queue), queue.pop()) == (SequenceState.WAITING, 0, None)
    last.resume()
    queue.resumed(last)
    queue.resumed(last)
    assert (len(queue), queue.pop(), queue.pop()) == (1, last, None)
    last.hold()
    queue.put_back([last])
    assert queue.remove(last)
    assert not queue.remove(last)
