"""The rules of preemption by swap, each taken out once, and the test that notices."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutation import Mutant

_SCHEDULER: Final = "gateway.core.scheduler:Scheduler"
_SWAPPING: Final = "gateway.core.swapping:Swapping"

MUTANTS: Final = (
    Mutant(
        "what is in flight for a victim is not moved",
        f"{_SWAPPING}.move_out",
        "div_ceil(victim.scheduled, self._size)",
        "div_ceil(victim.computed, self._size)",
        "swap: in flight",
    ),
    Mutant(
        "a victim's blocks are moved a step after they may be somebody else's",
        f"{_SCHEDULER}.schedule",
        "draft.removed, self._to_remove = self._to_remove, []\n        self.swapping.begin(draft)",
        "draft.removed, self._to_remove = self._to_remove, []",
        "swap: behind its writes",
    ),
    Mutant(
        "what is to be moved in is taken for written when it is planned",
        "gateway.core.sequence:Sequence.begin_at",
        "self.begun_at = self.scheduled = token_count",
        "self.begun_at = self.computed = self.scheduled = token_count",
        "swap: two phases",
    ),
    Mutant(
        "what was moved in is written when something is computed behind it",
        f"{_SWAPPING}.land",
        "sequence.computed = sequence.begun_at",
        "pass",
        "swap: told",
    ),
    Mutant(
        "everything is moved back, whatever is cached",
        f"{_SWAPPING}.bring_back",
        "cached // self._size",
        "0",
        "swap: cached",
    ),
    Mutant(
        "a copy and a transfer write one block",
        f"{_SCHEDULER}.start",
        "if sequence.begun_at == admission.cached_token_count:",
        "if True:",
        "swap: copy",
    ),
    Mutant(
        "shared blocks are moved with everybody who names them",
        f"{_SWAPPING}._staying",
        "count += 1",
        "break",
        "swap: stays",
    ),
    Mutant(
        "nobody takes along what others left with it",
        f"{_SCHEDULER}._close",
        "self.swapping.rescue(sequence, self._running.values())",
        "pass",
        "swap: taken along",
    ),
    Mutant(
        "any executor takes what is in the host memory of another one",
        "gateway.core.queue:WaitingQueue._pop_from",
        "sequence.swapped.pool_id != pool_id",
        "False",
        "swap: at home",
    ),
    Mutant(
        "a session that is over still holds slots",
        f"{_SWAPPING}.abandon",
        "sequence.swapped = None",
        "pass",
        "swap: at home",
    ),
    Mutant(
        "who is cancelled while it waits keeps its slots",
        f"{_SCHEDULER}.finish",
        "if sequence.state is SequenceState.WAITING:",
        "if False:",
        "swap: slots",
    ),
    Mutant(
        "who is cancelled while it is moved keeps its slots",
        f"{_SCHEDULER}._fenced",
        "self.swapping.release(sequence)",
        "pass",
        "swap: slots",
    ),
    Mutant(
        "slots of those that are back are never free again",
        f"{_SWAPPING}.land",
        "self._let_go += self._returning.pop(sequence).slots",
        "self._returning.pop(sequence)",
        "swap: nothing twice",
    ),
    Mutant(
        "a victim is moved as far as there is room",
        f"{_SWAPPING}.move_out",
        "if not 0 < count <= room or",
        "end = stays + min(count, room)\n    if not 0 < end - stays or",
        "swap: no room",
    ),
    Mutant(
        "slots of other gateways are counted as free",
        f"{_SWAPPING}.move_out",
        "len(self._free) - self._elsewhere",
        "len(self._free)",
        "swap: others",
    ),
    Mutant(
        "a refused slot is read all the same",
        f"{_SWAPPING}.settle",
        "if swapped.refused:",
        "if False:",
        "swap: refused",
    ),
    Mutant(
        "everything that can be moved is",
        f"{_SWAPPING}._pays",
        "moving < token_count * missing / computing",
        "True",
        "swap: cheaper",
    ),
    Mutant(
        "the dearer way is taken",
        f"{_SWAPPING}._pays",
        "moving < token_count",
        "moving > token_count",
        "swap: dearer",
    ),
    Mutant(
        "what was found again of late says nothing",
        f"{_SWAPPING}._pays",
        "1 - self.found.value",
        "1",
        "swap: found again",
    ),
    Mutant(
        "without a measurement computing is for nothing",
        f"{_SWAPPING}._pays",
        "if not (computing and settings.out_rate and settings.in_rate):\n        return False",
        "computing = computing or 1e-9",
        "swap: unmeasured",
    ),
    Mutant(
        "blocks are saved for those who are in host memory",
        f"{_SCHEDULER}._preempt",
        "self._shortage.returned(victim.held_block_count)",
        "self._shortage.preempted(victim)",
        "swap: not spared",
    ),
    Mutant(
        "the cache keeps what is in host memory, too",
        f"{_SCHEDULER}._fenced",
        "CloseReason.SWAPPED if swapped else reason",
        "reason",
        "swap: not awaited",
    ),
)
