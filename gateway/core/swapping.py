"""Preemption by swap: what a sequence has computed goes to host memory instead of being computed again.

A victim's blocks are copied to slots by the step that removes its table, behind every step that writes to them, and
return to the pool with that step's acknowledgement as after any preemption. Slots hold its content then. When it is
admitted again, what the prefix cache still holds is taken from there, the rest is moved into its new blocks by the
step that adds its table, and nothing is computed twice. A block that another running sequence names stays where it is.
The last of those who name it takes it to host memory when its own table closes, once for all who wait for it.

Whichever is cheaper is done: moving what is not likely to be found again, out and back, at the rates that the executor
has measured, or computing it at the rate of the steps that computed prompts of late. Until there was such a step
nothing is known, and victims are computed again.

Slots are the executor's, for all gateways that are connected to it; it says how many others hold. Whoever asks for one
that is gone meanwhile is told so with the step's result, and computes again.

Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
import dataclasses
import enum
from typing import TYPE_CHECKING, Final

from quire.units import div_ceil

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence
    from gateway.core.step import StepDraft, StepOutcome
    from quire.memory import Admission, PoolSpec

_KEPT: Final = 0.9
"""Weight that a measurement keeps when the next one of the same size comes: the last ten or so count."""
_NEVER: Final = 2**63


class PreemptionMode(enum.Enum):
    """What becomes of what a preempted sequence has computed."""

    AUTO = "auto"
    """Swapped out where that is cheaper than computing it again."""
    RECOMPUTE = "recompute"
    """Computed again, as far as the prefix cache loses it."""
    SWAP = "swap"
    """Swapped out while there are slots."""


@dataclasses.dataclass(frozen=True, slots=True)
class SwapSettings:
    """What an executor offers, and what is to be made of it.

    Attributes:
        slot_count: blocks that fit into its host memory.
        out_rate: bytes a second that it moves there, 0 if it does not say.
        in_rate: bytes a second that it moves back, 0 if it does not say.
        mode: when to use it.
    """

    slot_count: int = 0
    out_rate: float = 0.0
    in_rate: float = 0.0
    mode: PreemptionMode = PreemptionMode.AUTO


@dataclasses.dataclass(slots=True, eq=False)
class SwappedOut:
    """What of a sequence is in host memory, or on its way there.

    Attributes:
        pool_id: whose executor has it.
        first: index of the first block that is in a slot; those before stayed with others.
        slots: where this block and those behind it are.
        token_count: tokens whose keys and values exist.
        own_first: `first` when the sequence itself gave way.
        settled_at: step whose result says that all of the slots hold what they are to.
        confirmed: whether the sequence's fence is there: those from `own_first` on do.
        refused: whether there was no place for one of them.
    """

    pool_id: str
    first: int
    slots: list[int]
    token_count: int
    own_first: int
    settled_at: int = _NEVER
    confirmed: bool = False
    refused: bool = False


class Ratio:
    """A ratio of two sums over what was measured of late."""

    __slots__ = ("_above", "_below")

    def __init__(self) -> None:
        """Starts with nothing measured."""
        self._above = self._below = 0.0

    def add(self, above: float, below: float) -> None:
        """Takes in a measurement."""
        self._above = self._above * _KEPT + above
        self._below = self._below * _KEPT + below

    @property
    def value(self) -> float:
        """The ratio, 0 as long as nothing was measured."""
        return self._above / self._below if self._below else 0.0


@dataclasses.dataclass(slots=True)
class SwapStats:
    """Counters since the start."""

    swap_count: int = 0
    """Preemptions whose content went to host memory."""
    out_count: int = 0
    """Blocks moved there."""
    in_count: int = 0
    """Blocks moved back."""
    lost_count: int = 0
    """Swapped sequences that had to be computed again: slots were refused, or what stayed with others is gone."""


class Swapping:
    """The slots of one executor, as far as one gateway uses them.

    A scheduler calls, in this order: `move_out` while it plans a step, `begin` when it plans the next one, `land` with
    each result, `settle` when the victim's fence is among it, `bring_back` when the victim is admitted again.

    Args:
        pool_id: the executor's pool.
        spec: its geometry.
        settings: what the executor offers.
    """

    def __init__(self, pool_id: str, spec: PoolSpec, settings: SwapSettings) -> None:
        self.stats = SwapStats()
        self.computing = Ratio()
        """Tokens computed in a second by steps that mostly compute prompts."""
        self.found = Ratio()
        """Share of what preempted sequences gave up that they found in the prefix cache again."""
        self._pool_id = pool_id
        self._size = spec.block_size
        self._block_bytes = spec.bytes_per_block
        self._settings = settings
        # A table that begins behind its sliding window is not what an admission hands out.
        self.enabled = settings.slot_count > 0 and not spec.window and settings.mode is not PreemptionMode.RECOMPUTE
        self._free = list(range(settings.slot_count - 1, -1, -1))
        self._elsewhere = 0
        self._away: dict[Sequence, SwappedOut] = {}
        self._out: dict[Sequence, list[int]] = {}
        self._in: dict[Sequence, list[int]] = {}
        self._copies: dict[Sequence, list[int]] = {}
        self._returning: dict[Sequence, SwappedOut] = {}
        self._let_go: list[int] = []
        self._planned = self._landed = 0
        self._arriving: deque[tuple[int, list[Sequence]]] = deque()
        self._prompts: deque[tuple[int, int]] = deque()

    @property
    def held_count(self) -> int:
        """Slots that hold something, or are about to be told of as free."""
        return self._settings.slot_count - len(self._free)

    # --- a victim -------------------------------------------------------------------------------------------------

    def move_out(self, victim: Sequence, running: Iterable[Sequence]) -> bool:
        """Decides what becomes of what a victim has computed; if it is to be swapped out, the next step does it.

        Args:
            victim: who gives way; its table is not closing yet.
            running: who runs, the victim or not.

        Returns:
            Whether it is swapped out.
        """
        if not self.enabled:
            return False
        stays = self._staying(victim, running)
        victim.stayed_token_count = stays * self._size
        end = div_ceil(victim.scheduled, self._size)
        count = end - stays
        room = len(self._free) - self._elsewhere
        if not 0 < count <= room or not self._pays(count, victim.scheduled - victim.stayed_token_count):
            return False
        slots = self._plan_out(victim, victim.blocks[stays:end])
        victim.swapped = self._away[victim] = SwappedOut(self._pool_id, stays, slots, victim.scheduled, stays)
        return True

    def _plan_out(self, sequence: Sequence, blocks: list[int]) -> list[int]:
        """Has the next step move blocks for a sequence; returns the slots that they go to."""
        slots = [self._free.pop() for _ in blocks]
        self._out[sequence] = _interleaved(blocks, slots)
        return slots

    def _staying(self, victim: Sequence, running: Iterable[Sequence]) -> int:
        """Returns how many leading full blocks others name, too."""
        request = victim.request
        if request.settings.skip_cache_read or request.wants_prompt_logprobs:
            # It would not be given them again.
            return 0
        blocks, full = victim.blocks, victim.scheduled // self._size
        count = 0
        for other in running:
            if other is not victim:
                most = min(full, len(other.blocks))
                while count < most and other.blocks[count] == blocks[count]:
                    count += 1
        return count

    def rescue(self, leaver: Sequence, running: Iterable[Sequence]) -> None:
        """A table is about to close: moves out what those in host memory left with it and nobody else names.

        Args:
            leaver: whose table it is; the next step removes it.
            running: who runs, the leaver or not.
        """
        for waiting, swapped in self._away.items():
            count = swapped.first
            if not count or waiting in self._out or not self._has(leaver, waiting, count):
                continue
            others = (other for other in running if other is not leaver)
            kept = any(self._has(other, waiting, count) for other in others) or any(
                not its.first and its is not swapped and self._has(other, waiting, count)
                for other, its in self._away.items()
            )
            if not kept and count <= len(self._free) - self._elsewhere:
                swapped.slots[:0] = self._plan_out(waiting, leaver.blocks[:count])
                swapped.first, swapped.settled_at = 0, _NEVER

    def _has(self, sequence: Sequence, waiting: Sequence, block_count: int) -> bool:
        """Whether a sequence has computed the leading blocks that another one lacks, and may share them."""
        token_count = block_count * self._size
        computed = sequence.swapped.token_count if sequence.swapped is not None else sequence.scheduled
        mine, its = sequence.request.settings, waiting.request.settings
        return (
            computed >= token_count
            and (mine.tenant, mine.cache_salt) == (its.tenant, its.cache_salt)
            and sequence.tokens[:token_count] == waiting.tokens[:token_count]
        )

    def _pays(self, block_count: int, token_count: int) -> bool:
        """Whether moving so many blocks out and back takes less time than computing so many tokens."""
        settings, computing = self._settings, self.computing.value
        if settings.mode is PreemptionMode.SWAP:
            return True
        if not (computing and settings.out_rate and settings.in_rate):
            return False
        missing = 1 - self.found.value
        moving = block_count * self._block_bytes * (1 / settings.out_rate + missing / settings.in_rate)
        return moving < token_count * missing / computing

    # --- steps ----------------------------------------------------------------------------------------------------

    def begin(self, draft: StepDraft) -> None:
        """Puts into a step that is begun what is to be moved with the tables that it removes and adds."""
        if self._out:
            for sequence, pairs in self._out.items():
                draft.swap_out += pairs
                self._away[sequence].settled_at = self._planned + 1
                self.stats.out_count += len(pairs) // 2
            self._out.clear()
        if self._in:
            for sequence, pairs in self._in.items():
                draft.swap_in += pairs
                draft.copies += self._copies.pop(sequence, [])
                self.stats.in_count += len(pairs) // 2
            self._arriving.append((self._planned + 1, list(self._in)))
            self._in.clear()
        if self._let_go:
            # Free for what is planned from here on: this step lets go of them behind everything that it moves.
            draft.swap_freed, self._let_go = self._let_go, []
            self._free += draft.swap_freed

    def planned(self, token_count: int, prompt_token_count: int) -> None:
        """Notes that a step is planned.

        Args:
            token_count: tokens that it computes.
            prompt_token_count: of these, those that only go on with what is known.
        """
        self._planned += 1
        if self.enabled and 2 * prompt_token_count > token_count:
            self._prompts.append((self._planned, token_count))

    def land(self, outcome: StepOutcome) -> list[Sequence]:
        """Takes in the result of the oldest step that is planned, after what the step has written.

        Returns:
            Sequences whose content is back in blocks now, and who have computed nothing behind it yet.
        """
        self._landed += 1
        self._elsewhere = outcome.swap_slots_elsewhere
        if self._prompts and self._prompts[0][0] <= self._landed:
            _, token_count = self._prompts.popleft()
            if outcome.seconds:
                self.computing.add(token_count, outcome.seconds)
        if outcome.swap_refused:
            refused = set(outcome.swap_refused)
            for swapped in self._away.values():
                swapped.refused |= not refused.isdisjoint(swapped.slots)
        if not self._arriving or self._arriving[0][0] > self._landed:
            return []
        moved = self._arriving.popleft()[1]
        for sequence in moved:
            if sequence in self._returning:
                self._let_go += self._returning.pop(sequence).slots
        back = [sequence for sequence in moved if sequence.computed < sequence.begun_at]
        for sequence in back:
            sequence.computed = sequence.begun_at
        return back

    def settle(self, sequence: Sequence) -> bool:
        """A victim's fence is there; returns whether its content is in host memory."""
        swapped = self._away.get(sequence)
        if swapped is None:
            return False
        if swapped.refused:
            self.release(sequence)
            self.stats.lost_count += 1
            return False
        swapped.token_count = sequence.computed
        swapped.confirmed = True
        self.stats.swap_count += 1
        sequence.swap_count += 1
        sequence.swapped_block_count += len(swapped.slots)
        return True

    # --- and back -------------------------------------------------------------------------------------------------

    def bring_back(self, sequence: Sequence, admission: Admission, running: Iterable[Sequence]) -> int:
        """Has the next step move the content of a sequence that is admitted again to where it is needed.

        Args:
            sequence: who was preempted.
            admission: its new table.
            running: who runs.

        Returns:
            Leading tokens that need not be computed: those that were found in the cache, or all that were computed.
        """
        cached = admission.cached_token_count
        given_up = sequence.lost_token_count - sequence.stayed_token_count
        if given_up > 0:
            self.found.add(min(given_up, max(0, cached - sequence.stayed_token_count)), given_up)
        swapped = self._away.get(sequence)
        if swapped is None or swapped.token_count <= cached:
            self.release(sequence)
            return cached
        if swapped.refused or not self._plan_in(sequence, swapped, cached // self._size, admission.block_ids, running):
            self.release(sequence)
            self.stats.lost_count += 1
            return cached
        self._take_back_unheard(self._away.pop(sequence), sequence)
        sequence.swapped = None
        # Others may need its slots until the executor has acknowledged that its blocks have what these hold.
        self._returning[sequence] = swapped
        return swapped.token_count

    def _plan_in(
        self, sequence: Sequence, swapped: SwappedOut, first: int, blocks: list[int], running: Iterable[Sequence]
    ) -> bool:
        """Plans what brings the blocks from index `first` on; returns whether all of it is somewhere."""
        own_first = self._first(swapped)
        begin = max(first, own_first)
        slots = swapped.slots[begin - swapped.first :]
        if first < own_first:
            if others := self._slots_of_others(sequence, first, own_first):
                begin, slots = first, others + slots
            else:
                stayed = own_first * self._size
                holders = (other for other in running if other.computed >= stayed)
                holder = next((other for other in holders if self._has(other, sequence, own_first)), None)
                if holder is None:
                    return False
                self._copies[sequence] = _interleaved(holder.blocks[first:own_first], blocks[first:])
        self._in[sequence] = _interleaved(slots, blocks[begin:])
        sequence.swapped_block_count += len(slots)
        return True

    def _slots_of_others(self, sequence: Sequence, first: int, end: int) -> list[int]:
        """Returns slots of somebody else with blocks `first` .. `end` - 1 of a sequence; none if nobody has them."""
        for other, its in (*self._away.items(), *self._returning.items()):
            there = its.confirmed and not its.refused and self._first(its) <= first
            if there and other is not sequence and self._has(other, sequence, end):
                return its.slots[first - its.first : end - its.first]
        return []

    def _first(self, swapped: SwappedOut) -> int:
        """Returns the index from which on the blocks are known to be in their slots."""
        return swapped.first if self._landed >= swapped.settled_at else swapped.own_first

    def release(self, sequence: Sequence) -> None:
        """Lets go of the slots of a sequence; a no-op for one that has none here."""
        self._in.pop(sequence, None)
        self._copies.pop(sequence, None)
        for records in (self._away, self._returning):
            swapped = records.pop(sequence, None)
            if swapped is not None:
                self._take_back_unheard(swapped, sequence)
                self._let_go += swapped.slots
                if records is self._away:
                    sequence.swapped = None

    def _take_back_unheard(self, swapped: SwappedOut, sequence: Sequence) -> None:
        """Frees those slots of a sequence of which the executor has not heard: the first ones, or all."""
        unheard = self._out.pop(sequence, [])[1::2]
        self._free += unheard
        del swapped.slots[: len(unheard)]
        swapped.first += len(unheard)

    def abandon(self) -> None:
        """The executor's session is over, and with it what its slots held."""
        for sequence in self._away:
            sequence.swapped = None
        self._away.clear()
        self._out.clear()
        self._in.clear()
        self._copies.clear()
        self._returning.clear()
        self._arriving.clear()


def _interleaved(sources: list[int], destinations: list[int]) -> list[int]:
    """Returns pairs of a source and its destination, flat; there may be more destinations."""
    return [number for pair in zip(sources, destinations, strict=False) for number in pair]
