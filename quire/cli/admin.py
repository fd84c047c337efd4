"""Asks memsvc's AdminService, page by page, and finds sequences by the beginning of their ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Self, TypeVar

import grpc

from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc
from quire.client import as_quire_error
from quire.errors import InvalidRequestError, SequenceNotFoundError
from quire.rpc import CHANNEL_OPTIONS

_TIMEOUT_SECONDS: Final = 10.0
_PAGE: Final = 1000
_SHOWN_CANDIDATES: Final = 5

_Answer = TypeVar("_Answer")


class AdminClient:
    """A connection to memsvc for operators."""

    def __init__(self, address: str) -> None:
        """Prepares to ask the memsvc at `address`."""
        self.address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)

    def pools(self) -> list[admin_pb2.Pool]:
        """Returns every pool."""
        found: list[admin_pb2.Pool] = []
        token = ""
        while True:
            page = self._call(self._stub.ListPools, admin_pb2.ListPoolsRequest(page_size=_PAGE, page_token=token))
            found += page.pools
            if not (token := page.next_page_token):
                return found

    def sequences(self, pool_id: str = "") -> list[admin_pb2.SequenceSummary]:
        """Returns every sequence that holds blocks, of one pool or of all."""
        found: list[admin_pb2.SequenceSummary] = []
        token = ""
        while True:
            request = admin_pb2.ListSequencesRequest(pool_id=pool_id, page_size=_PAGE, page_token=token)
            page = self._call(self._stub.ListSequences, request)
            found += page.sequences
            if not (token := page.next_page_token):
                return found

    def block_table(self, sequence: str) -> admin_pb2.GetBlockTableResponse:
        """Returns the whole block table of a sequence, named by its id or by a unique beginning of it.

        Raises:
            SequenceNotFoundError: no sequence that holds blocks has such an id.
            InvalidRequestError: several have.
        """
        try:
            return self._block_table(sequence)
        except SequenceNotFoundError:
            return self._block_table(self._complete(sequence))

    def _block_table(self, sequence_id: str) -> admin_pb2.GetBlockTableResponse:
        """Returns the table of exactly this sequence."""
        whole = admin_pb2.GetBlockTableResponse()
        while True:
            request = admin_pb2.GetBlockTableRequest(sequence_id=sequence_id, page_token=whole.next_page_token)
            page = self._call(self._stub.GetBlockTable, request)
            entries = [*whole.entries, *page.entries]
            whole = page
            del whole.entries[:]
            whole.entries.extend(entries)
            if not whole.next_page_token:
                return whole

    def _complete(self, beginning: str) -> str:
        """Returns the id of the only sequence whose id begins so."""
        found = [one.sequence_id for one in self.sequences() if one.sequence_id.startswith(beginning)]
        if not found:
            raise SequenceNotFoundError(f"no sequence that holds blocks has an id that begins with {beginning!r}")
        if len(found) > 1:
            shown = ", ".join(found[:_SHOWN_CANDIDATES]) + (", ..." if len(found) > _SHOWN_CANDIDATES else "")
            message = f"{len(found)} sequences have ids that begin with {beginning!r}: {shown}"
            raise InvalidRequestError(message, field="sequence")
        return found[0]

    def block(self, pool_id: str, block_id: int) -> admin_pb2.GetBlockResponse:
        """Returns one block."""
        return self._call(self._stub.GetBlock, admin_pb2.GetBlockRequest(pool_id=pool_id, block_id=block_id))

    def _call(self, method: Callable[..., _Answer], request: object) -> _Answer:
        """Calls a method with a deadline; raises QuireError."""
        try:
            return method(request, timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise as_quire_error(error, self.address) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
