"""Records of history as messages of `quire.memsvc.v1`."""

from __future__ import annotations

from memsvc import translate
from memsvc.core.content import Publication
from memsvc.core.history import HistoryRecord
from memsvc.core.history_watches import BlockFacts, SequenceFacts
from protos.memsvc.v1 import admin_pb2


def from_record(record: HistoryRecord, now: float) -> admin_pb2.HistoryRecord:
    """Returns a record as a message.

    Args:
        record: what happened.
        now: the clock that its time is of.
    """
    message = admin_pb2.HistoryRecord(
        place=record.place,
        age=translate.to_duration(now - record.at),
        command=record.command,
        pool_id=record.pool_id,
        gateway_id=record.gateway_id,
        refused=record.refused,
    )
    change = record.change
    if change is None:
        return message
    message.sequence_id, message.explanation = change.sequence_id, change.explanation
    for facts, block, sequence in (
        (change.before, message.block_before, message.sequence_before),
        (change.after, message.block_after, message.sequence_after),
    ):
        if isinstance(facts, BlockFacts):
            block.CopyFrom(_block(facts))
        elif isinstance(facts, SequenceFacts):
            sequence.CopyFrom(_sequence(facts))
    return message


def _block(facts: BlockFacts) -> admin_pb2.BlockFacts:
    return admin_pb2.BlockFacts(
        epoch=facts.epoch,
        state=admin_pb2.BlockState.ValueType(int(facts.state)),
        ref_count=facts.ref_count,
        generation=facts.generation,
        matchable=facts.publication in {Publication.FULL, Publication.PARTIAL},
    )


def _sequence(facts: SequenceFacts) -> admin_pb2.SequenceFacts:
    return admin_pb2.SequenceFacts(
        epoch=facts.epoch,
        table=facts.table,
        state=admin_pb2.SequenceState.ValueType(int(facts.state)),
        token_count=facts.token_count,
        written_token_count=facts.written_token_count,
        block_count=facts.block_count,
    )
