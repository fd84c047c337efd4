"""An executor that knows what every slot must hold.

Instead of keys and values a slot holds the digest of all tokens up to it. Before a position is computed every earlier
slot of the table is compared with what it must be, so a block that was shared wrongly, freed early, copied late or
published before it was written is found at the first read. The next token is a function of the digest and the seed:
what a request must produce is known beforehand (`expected_tokens`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
import dataclasses
import hashlib
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway.tokenize import TokenizerFiles
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import ExecutorUnavailableError
from quire.memory import PoolSpec
from quire.window import outside_block_count

VOCAB_SIZE = 256
SWAP_RATE = 10**12
"""Bytes a second that blocks are said to move with."""
EOS_TOKEN = 0


def digest_of(parent: bytes, token: int) -> bytes:
    """Returns what the slot of `token` after `parent` holds."""
    return hashlib.blake2b(parent + token.to_bytes(4, "little"), digest_size=8).digest()


def next_token(digest: bytes, seed: int, withheld: Collection[int] = ()) -> int:
    """Returns the token that follows; about one in 256 is the end of the sequence. Withheld ones are passed over."""
    drawn = hashlib.blake2b(digest + seed.to_bytes(8, "little"), digest_size=4).digest()
    token = int.from_bytes(drawn, "little") % VOCAB_SIZE
    while token in withheld:
        token = (token + 1) % VOCAB_SIZE
    return token


def logprob_of(digest: bytes, token: int) -> tuple[int, float]:
    """Returns rank and log-probability of a token after a digest, which only look like such."""
    drawn = hashlib.blake2b(digest + token.to_bytes(4, "little"), digest_size=2, person=b"logprob").digest()
    return drawn[0] + 1, -(drawn[1] + 1) / 8


def likely_tokens(digest: bytes, count: int) -> list[tuple[int, float]]:
    """Returns the likeliest tokens after a digest for a search, with their log-probabilities, the likeliest first."""
    drawn = hashlib.shake_128(digest).digest(VOCAB_SIZE)
    order = sorted(range(VOCAB_SIZE), key=lambda token: (-drawn[token], token))[:count]
    return [(token, -place / 2 - (255 - drawn[token]) / 64) for place, token in enumerate(order)]


def expected_logprobs(tokens: Sequence[int], start: int) -> list[tuple[int, float]]:
    """Returns rank and log-probability of each token from index `start` on."""
    digest, found = b"", []
    for index, token in enumerate(tokens):
        if index >= start:
            found.append(logprob_of(digest, token))
        digest = digest_of(digest, token)
    return found


def expected_tokens(
    prompt: Sequence[int],
    seed: int,
    max_tokens: int,
    *,
    ignore_eos: bool = False,
    withheld: Collection[int] = (),
    min_tokens: int = 0,
) -> list[int]:
    """Returns what a request must produce; the first `min_tokens` are none of `withheld`."""
    digest = b""
    for token in prompt:
        digest = digest_of(digest, token)
    produced: list[int] = []
    while len(produced) < max_tokens:
        token = next_token(digest, seed, withheld if len(produced) < min_tokens else ())
        produced.append(token)
        if token == EOS_TOKEN and not ignore_eos:
            break
        digest = digest_of(digest, token)
    return produced


def tokenizer_files() -> TokenizerFiles:
    """Returns a byte-level tokenizer without merges: token = byte, for the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    data = tokenizer.to_str().encode()
    assert json.loads(data)["decoder"]["type"] == "ByteLevel"
    return TokenizerFiles(data, hashlib.sha256(data).digest(), "", "", "")


@dataclasses.dataclass
class _Row:
    """A sequence as the executor keeps it."""

    tokens: list[int]
    blocks: list[int]
    computed: int
    seed: int
    withheld: frozenset[int]
    withheld_until: int
    sibling_seeds: list[int]
    sampling: pb.SamplingParams


@dataclasses.dataclass
class _Logprobs:
    """The columns of quire.execsvc.v1.Logprobs; of the most likely tokens it knows the token itself."""

    tables: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    ranks: list[int] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)

    def add(self, table: int, position: int, digest: bytes, token: int, count: int) -> None:
        """Adds a row."""
        rank, value = logprob_of(digest, token)
        self.tables.append(table)
        self.positions.append(position)
        self.ranks.append(rank)
        self.counts.append(1 + count)
        self.tokens += [token] * (1 + count)
        self.values += [value] * (1 + count)

    def add_likely(self, table: int, position: int, likely: list[tuple[int, float]]) -> None:
        """Adds a row with the first of the likeliest tokens, and all of them."""
        self.tables.append(table)
        self.positions.append(position)
        self.ranks.append(1)
        self.counts.append(1 + len(likely))
        self.tokens += [likely[0][0], *(token for token, _ in likely)]
        self.values += [likely[0][1], *(value for _, value in likely)]

    def message(self) -> pb.Logprobs:
        """Returns them as they travel."""
        return pb.Logprobs(
            tables=columns.pack(self.tables),
            positions=columns.pack(self.positions),
            ranks=columns.pack(self.ranks),
            counts=columns.pack(self.counts),
            token_ids=columns.pack(self.tokens),
            values=columns.pack_floats(self.values),
        )


class WrongContentError(AssertionError):
    """A slot held something else than the tokens before it."""


class OracleExecutor:
    """`gateway.clients.executor.ExecutorLink` on digests; see the module.

    Args:
        pool_spec: geometry.
        delay: seconds that a step takes, asked for every step.
        max_num_batched_tokens: token budget of a step.
        swap_slots: blocks that fit into host memory.
    """

    def __init__(
        self,
        pool_spec: PoolSpec,
        delay: Callable[[], float],
        max_num_batched_tokens: int = 64,
        swap_slots: int = 0,
    ) -> None:
        self.spec = pool_spec
        self.incarnation = 1
        self.epoch = 0
        self.step_count = 0
        self.computed_token_count = 0
        self.copied_block_count = 0
        self.largest_step = 0
        self.fail_at_step: int | None = None
        self._delay = delay
        self._budget = max_num_batched_tokens
        self._slots: dict[tuple[int, int], bytes] = {}
        self.swap_slots = swap_slots
        self.host: dict[int, list[bytes]] = {}
        """What slots of host memory hold, by offset in the block."""
        self.swapped_out_count = self.swapped_in_count = self.refused_count = 0
        self.says_how_long = True
        self.elsewhere: Callable[[], int] = int
        """Slots that other gateways hold, asked for every step."""
        self.rows: dict[int, _Row] = {}
        self._turn = asyncio.Lock()
        self._last_step = 0
        self._open = False

    async def describe(self) -> pb.DescribeResponse:
        """See ExecutorLink."""
        model = pb.ModelInfo(
            name=self.spec.model_id,
            architecture="Oracle",
            vocab_size=VOCAB_SIZE,
            max_model_len=self.spec.max_model_len,
            eos_token_ids=[EOS_TOKEN],
        )
        return pb.DescribeResponse(
            executor_id="oracle",
            executor_incarnation=self.incarnation,
            ready=True,
            model=model,
            max_num_batched_tokens=self._budget,
            max_num_seqs=64,
            swap_slot_count=self.swap_slots,
            swap_out_bytes_per_second=SWAP_RATE * bool(self.swap_slots),
            swap_in_bytes_per_second=SWAP_RATE * bool(self.swap_slots),
        )

    async def tokenizer(self) -> TokenizerFiles:
        """See ExecutorLink."""
        return tokenizer_files()

    async def open(self, request: pb.Open) -> pb.Opened:
        """See ExecutorLink: what an earlier session held is dropped."""
        async with self._turn:
            self.rows.clear()
            self.host.clear()
            self.epoch = request.epoch
            self._last_step = 0
            self._open = True
        return pb.Opened(epoch=request.epoch)

    async def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """See ExecutorLink."""
        async with self._turn:
            await asyncio.sleep(self._delay())
            if not self._open:
                raise ExecutorUnavailableError("the session is over")
            assert plan.epoch == self.epoch
            assert plan.step == self._last_step + 1
            self._last_step = plan.step
            self.step_count += 1
            if self.step_count == self.fail_at_step:
                self._open = False
                raise ExecutorUnavailableError("injected failure")
            return self._apply(plan)

    async def close(self) -> None:
        """See ExecutorLink."""
        self._open = False

    def _apply(self, plan: pb.StepPlan) -> pb.StepResult:
        removed = columns.unpack_list(plan.removed, "removed")
        for table in removed:
            self.rows.pop(table, None)
        for start in plan.added:
            assert start.table not in self.rows, "added twice"
            tokens = columns.unpack_list(start.token_ids, "token_ids")
            blocks = columns.unpack_list(start.block_ids, "block_ids")
            outside = outside_block_count(start.computed_token_count, self.spec.window, self.spec.block_size)
            assert 0 not in blocks[outside:], "a null block that is read"
            assert start.computed_token_count < len(tokens)
            sampling = start.sampling
            withheld = frozenset(columns.unpack_list(sampling.withheld_tokens, "withheld_tokens"))
            self.rows[start.table] = _Row(
                tokens,
                blocks,
                start.computed_token_count,
                sampling.seed,
                withheld,
                sampling.withheld_until,
                list(start.sibling_seeds),
                sampling,
            )
        appended = columns.unpack_list(plan.appended, "appended", row_length=3)
        for table, index, block in zip(appended[::3], appended[1::3], appended[2::3], strict=True):
            blocks = self.rows[table].blocks
            assert index <= len(blocks)
            blocks[index : index + 1] = [block]
        elsewhere = self.elsewhere()
        refused = self._swap_out(columns.unpack_list(plan.swap_out, "swap_out", row_length=2), elsewhere)
        copies = columns.unpack_list(plan.copies, "copies", row_length=2)
        self.copied_block_count += len(copies) // 2
        for source, destination in zip(copies[::2], copies[1::2], strict=True):
            for offset in range(self.spec.block_size):
                self._slots[destination, offset] = self._slots.get((source, offset), b"")
        self._swap_in(columns.unpack_list(plan.swap_in, "swap_in", row_length=2), refused, copies)
        for slot in columns.unpack_list(plan.swap_freed, "swap_freed"):
            assert slot < self.swap_slots
            self.host.pop(slot, None)
        result = self._compute(plan, removed)
        result.swap_refused, result.swap_slots_elsewhere = columns.pack(refused), elsewhere
        return result

    def _swap_out(self, pairs: list[int], elsewhere: int) -> list[int]:
        """Keeps blocks in host memory; returns the slots for which there was no place."""
        refused = []
        assert len(set(pairs[1::2])) * 2 == len(pairs), "a slot is written twice"
        for block, slot in zip(pairs[::2], pairs[1::2], strict=True):
            assert 0 < block < self.spec.block_count
            assert 0 <= slot < self.swap_slots
            assert slot not in self.host, "a slot is written over that still holds something"
            if len(self.host) + elsewhere >= self.swap_slots:
                refused.append(slot)
                continue
            self.host[slot] = [self._slots.get((block, offset), b"") for offset in range(self.spec.block_size)]
        self.swapped_out_count += len(pairs) // 2
        self.refused_count += len(refused)
        return refused

    def _swap_in(self, pairs: list[int], refused: list[int], copies: list[int]) -> None:
        """Brings blocks back."""
        assert len(set(pairs[1::2])) * 2 == len(pairs), "a block is written twice"
        for slot, block in zip(pairs[::2], pairs[1::2], strict=True):
            assert slot in self.host, "a slot holds nothing"
            assert slot not in refused
            assert block not in copies
            for offset, digest in enumerate(self.host[slot]):
                self._slots[block, offset] = digest
        self.swapped_in_count += len(pairs) // 2

    def _compute(self, plan: pb.StepPlan, removed: list[int]) -> pb.StepResult:
        tables = columns.unpack_list(plan.scheduled_tables, "scheduled_tables")
        counts = columns.unpack_list(plan.scheduled_counts, "scheduled_counts", row_count=len(tables))
        assert len(set(tables)) == len(tables)
        assert sum(counts) <= self._budget
        self.largest_step = max(self.largest_step, sum(counts))
        self.computed_token_count += sum(counts)
        # All writes of a step happen before its reads end: two rows that share a block must not write to it.
        written: dict[tuple[int, int], int] = {}
        sampled_tables, sampled_tokens, written_counts = [], [], []
        sibling_tables, sibling_tokens = [], []
        logprobs = _Logprobs()
        for table, count in zip(tables, counts, strict=True):
            row = self.rows[table]
            digest = self._check(row, table)
            for position in range(row.computed, row.computed + count):
                digest = digest_of(digest, row.tokens[position])
                slot = (row.blocks[position // self.spec.block_size], position % self.spec.block_size)
                assert slot[0], "a token is written to the null block"
                assert written.setdefault(slot, table) == table, "two sequences write one slot"
                self._slots[slot] = digest
                if row.sampling.HasField("prompt_logprobs") and position + 1 < row.sampling.prompt_token_count:
                    next_one, count_top = row.tokens[position + 1], row.sampling.prompt_logprobs
                    logprobs.add(table, position + 1, digest, next_one, count_top)
            row.computed += count
            written_counts.append(row.computed)
            if row.computed == len(row.tokens):
                withheld = row.withheld if len(row.tokens) < row.withheld_until else ()
                siblings = [next_token(digest, seed, withheld) for seed in row.sibling_seeds]
                sibling_tables += [table] * len(siblings)
                sibling_tokens += siblings
                row.sibling_seeds.clear()
                if row.sampling.HasField("logprobs") and row.sampling.temperature == 0:
                    likely = likely_tokens(digest, row.sampling.logprobs)
                    row.tokens.append(likely[0][0])
                    logprobs.add_likely(table, len(row.tokens) - 1, likely)
                else:
                    row.tokens.append(next_token(digest, row.seed, withheld))
                if row.sampling.HasField("logprobs") and row.sampling.temperature:
                    for token in (row.tokens[-1], *siblings):
                        logprobs.add(table, len(row.tokens) - 1, digest, token, row.sampling.logprobs)
                sampled_tables.append(table)
                sampled_tokens.append(row.tokens[-1])
        return pb.StepResult(
            step=plan.step,
            written_tables=columns.pack(tables),
            written_counts=columns.pack(written_counts),
            sampled_tables=columns.pack(sampled_tables),
            sampled_tokens=columns.pack(sampled_tokens),
            fenced=columns.pack(removed),
            sibling_tables=columns.pack(sibling_tables),
            sibling_tokens=columns.pack(sibling_tokens),
            logprobs=logprobs.message() if logprobs.tables else None,
            model_ns=1000 * sum(counts) * self.says_how_long,
        )

    def _check(self, row: _Row, table: int) -> bytes:
        """Returns the digest before the next position; raises WrongContentError if a slot that is read is wrong."""
        digest = b""
        window = self.spec.window
        first = max(0, row.computed - window + 1) if window else 0
        for position in range(row.computed):
            digest = digest_of(digest, row.tokens[position])
            slot = (row.blocks[position // self.spec.block_size], position % self.spec.block_size)
            if position >= first and self._slots.get(slot) != digest:
                raise WrongContentError(f"table {table} position {position}: slot {slot} holds foreign content")
        return digest
