"""Who goes first where tenants share, and where priorities age: nobody waits for ever."""

from __future__ import annotations

from gateway.core.fairness import OUTPUT_WEIGHT, FairShares
from gateway.core.precedence import SchedulingPolicy
from gateway.core.sequence import Sequence, SequenceState
from tests.conformance.scheduler_rig import SIZE, Rig

FAIR, PRIORITY = SchedulingPolicy.FAIR, SchedulingPolicy.PRIORITY


def begun(rig: Rig) -> list[Sequence]:
    """Returns the sequences in the order in which they were admitted first."""
    return list(dict.fromkeys(rig.asked))


def test_a_tenant_with_many_requests_does_not_keep_another_waiting() -> None:
    """One customer's batch job must not stand between all others and their first token."""
    rig = Rig(256, max_num_seqs=2, policy=FAIR)
    many = [rig.submit(20, max_tokens=10, tenant="many") for _ in range(20)]
    rig.turns(3)
    few = [rig.submit(20, max_tokens=10, tenant="few") for _ in range(3)]
    rig.run()
    order = begun(rig)
    assert [order.index(sequence) for sequence in few] == sorted(order.index(sequence) for sequence in few)
    # Two of the others run when it comes; from then on they take turns.
    assert order.index(few[0]) <= 3
    assert order.index(few[2]) <= 3 + 2 * 2
    assert order[-1] is many[-1]


def test_what_a_tenant_generates_counts_and_not_how_many_requests_it_sends() -> None:
    """Whoever asks for long answers would otherwise have most of the machine."""
    rig = Rig(512, max_num_seqs=2, policy=FAIR)
    talkers = [rig.submit(4, max_tokens=120, tenant="talker") for _ in range(6)]
    others = [rig.submit(4, max_tokens=20, tenant="terse") for _ in range(12)]
    while not all(sequence.state is SequenceState.FINISHED for sequence in others):
        rig.turn()
    given = sum(len(rig.output[sequence]) for sequence in talkers)
    # Equal shares, but for one answer that was under way and the one that is.
    assert given <= 12 * 20 + 2 * 120
    rig.run()


def test_long_prompts_count() -> None:
    """Otherwise a tenant that sends books and asks for a word has the machine to itself."""
    rig = Rig(512, max_num_seqs=1, policy=FAIR)
    for _ in range(8):
        rig.submit(300, max_tokens=2, tenant="books")
        rig.submit(10, max_tokens=10, tenant="notes")
    rig.turns(100)
    order = [sequence.request.settings.tenant for sequence in begun(rig)]
    assert order[:10].count("books") <= 2
    rig.run()


def test_nobody_saves_up_what_it_did_not_use() -> None:
    """A tenant that was away for a day would otherwise have the machine to itself for as long."""
    rig = Rig(256, max_num_seqs=1, policy=FAIR)
    for _ in range(10):
        rig.submit(20, max_tokens=50, tenant="steady")
        rig.run()
    for _ in range(6):
        rig.submit(20, max_tokens=10, tenant="steady")
        rig.submit(20, max_tokens=10, tenant="guest")
    rig.run()
    order = [sequence.request.settings.tenant for sequence in begun(rig)][10:]
    assert 1 <= order[:4].count("steady") <= 3


def test_who_was_preempted_comes_before_whoever_has_not_run() -> None:
    """What it has computed would be evicted, and computed twice, while it waits for its tenant's turn."""
    rig = Rig(8, max_num_seqs=4, policy=FAIR)
    heavy = [rig.submit(SIZE, max_tokens=80, tenant="heavy") for _ in range(3)]
    (victim, *_) = rig.turns_until_preempted(*heavy)
    rig.submit(SIZE, max_tokens=4, tenant="calm")
    while victim.state is not SequenceState.WAITING:
        rig.turn()
    assert rig.queue.pop() is victim
    rig.queue.put_back([victim])
    rig.run()


def test_the_counters_of_tenants_that_left_are_forgotten() -> None:
    """A name for each call would otherwise fill the gateway's memory."""
    shares = FairShares()
    for number in range(5000):
        shares.arrived(f"t{number}", [])
        shares.charge(f"t{number}", OUTPUT_WEIGHT)
        shares.left(f"t{number}")
    assert len(shares._counters) <= 1100


def test_an_old_request_goes_before_a_new_one_that_is_more_urgent() -> None:
    """A steady stream of urgent requests would otherwise keep the others waiting for ever."""
    rig = Rig(256, max_num_seqs=1, policy=PRIORITY, ageing=10.0)
    patient = rig.submit(5, max_tokens=4, priority=2, arrived_at=0.0)
    urgent = []
    for moment in range(40):
        urgent.append(rig.submit(5, max_tokens=4, priority=0, arrived_at=float(moment)))
        rig.turns(3)
    rig.run()
    order = begun(rig)
    # Two steps of priority are worth 20 seconds, so whoever comes later than that comes after it.
    ahead = [sequence.request.arrived_at for sequence in order[: order.index(patient)]]
    assert max(ahead) <= 20.0
    assert len(ahead) >= 10


def test_without_ageing_priorities_are_strict() -> None:
    """Who switches ageing off wants the urgent first whatever happens."""
    rig = Rig(256, max_num_seqs=1, policy=PRIORITY)
    patient = rig.submit(5, max_tokens=4, priority=2, arrived_at=0.0)
    for moment in range(40):
        rig.submit(5, max_tokens=4, priority=0, arrived_at=float(moment))
    rig.run()
    assert begun(rig)[-1] is patient
