"""Asks memsvc's AdminService, page by page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Self, TypeVar

import grpc

from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc
from quire.client import as_quire_error
from quire.rpc import CHANNEL_OPTIONS

_TIMEOUT_SECONDS: Final = 10.0
# The whole command log is replayed, beside all else that the service does.
_REPLAY_TIMEOUT_SECONDS: Final = 120.0
_PAGE: Final = 1000

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

    def watch(self, pool_id: str, interval: float) -> Iterator[admin_pb2.WatchPoolResponse]:
        """Yields what changes in a pool, at most once in `interval` seconds, until the pool or the service is gone.

        Raises:
            PoolNotFoundError: no such pool, or it is gone.
            InvalidRequestError: `interval` is out of range.
            AdmissionError: too many watch already.
        """
        request = admin_pb2.WatchPoolRequest(pool_id=pool_id)
        request.min_interval.FromNanoseconds(int(interval * 1e9))
        try:
            # No deadline: it lasts as long as somebody looks, and keepalive notices a service that is gone.
            yield from self._stub.WatchPool(request)
        except grpc.RpcError as error:
            raise as_quire_error(error, self.address) from None

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
        request = admin_pb2.GetBlockTableRequest(sequence_id=sequence)
        whole = self._call(self._stub.GetBlockTable, request)
        token = whole.next_page_token
        while token:
            request.page_token = token
            page = self._call(self._stub.GetBlockTable, request)
            whole.entries.extend(page.entries)
            token = page.next_page_token
        return whole

    def block(self, pool_id: str, block_id: int) -> admin_pb2.GetBlockResponse:
        """Returns one block."""
        return self._call(self._stub.GetBlock, admin_pb2.GetBlockRequest(pool_id=pool_id, block_id=block_id))

    def reset_cache(self, pool_id: str, *, force: bool) -> admin_pb2.ResetCacheResponse:
        """Forgets everything that prompts can match in a pool.

        Raises:
            PoolNotFoundError: no such pool.
            CacheInUseError: sequences hold blocks, and `force` is not set.
        """
        return self._call(self._stub.ResetCache, admin_pb2.ResetCacheRequest(pool_id=pool_id, force=force))

    def history(
        self, *, pool_id: str = "", block_id: int = 0, sequence_id: str = "", limit: int = 0
    ) -> admin_pb2.HistoryResponse:
        """Returns what happened to a block, a sequence, or everything; at most `limit` records, 0 for all.

        Raises:
            PoolNotFoundError, BlockNotFoundError, SequenceNotFoundError, InvalidRequestError: as the service says.
            UnsupportedError: no command log is kept.
        """
        request = admin_pb2.HistoryRequest(
            pool_id=pool_id, block_id=block_id, sequence_id=sequence_id, page_size=min(limit, _PAGE) or _PAGE
        )
        whole = self._call(self._stub.History, request)
        while whole.next_page_token and not 0 < limit <= len(whole.records):
            request.page_token = whole.next_page_token
            page = self._call(self._stub.History, request)
            whole.records.extend(page.records)
            whole.next_page_token = page.next_page_token
        if limit:
            del whole.records[limit:]
        return whole

    def quota(self, pool_id: str, tenant: str) -> admin_pb2.TenantUsage:
        """Returns what a tenant has of a pool, and what it may have."""
        return self._call(self._stub.GetQuota, admin_pb2.GetQuotaRequest(pool_id=pool_id, tenant=tenant)).usage

    def residencies(self, pool_id: str) -> list[admin_pb2.Residency]:
        """Returns the lives of blocks of a pool that were followed and have ended, the oldest first."""
        found: list[admin_pb2.Residency] = []
        request = admin_pb2.ListResidenciesRequest(pool_id=pool_id, page_size=_PAGE)
        while True:
            page = self._call(self._stub.ListResidencies, request)
            found.extend(page.residencies)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def quotas(self, pool_id: str) -> list[admin_pb2.TenantUsage]:
        """Returns every tenant of a pool that has a quota."""
        found: list[admin_pb2.TenantUsage] = []
        token = ""
        while True:
            request = admin_pb2.ListQuotasRequest(pool_id=pool_id, page_size=_PAGE, page_token=token)
            page = self._call(self._stub.ListQuotas, request)
            found += page.usages
            if not (token := page.next_page_token):
                return found

    def set_quota(self, pool_id: str, tenant: str, quota: admin_pb2.Quota) -> admin_pb2.TenantUsage:
        """Changes what a tenant may hold and keep of a pool.

        Raises:
            InvalidRequestError: a number is not possible, or not beside the other tenants' floors.
        """
        request = admin_pb2.SetQuotaRequest(pool_id=pool_id, tenant=tenant, quota=quota)
        return self._call(self._stub.SetQuota, request).usage

    def explain(self, request: admin_pb2.ExplainPrefixRequest) -> admin_pb2.ExplainPrefixResponse:
        """Says how much of a prompt is cached in a pool, and why not more."""
        return self._call(self._stub.ExplainPrefix, request)

    def prefixes(self, pool_id: str, least: int, limit: int) -> list[admin_pb2.PrefixSummary]:
        """Returns the prefixes that at least `least` references share, at most `limit` of them."""
        request = admin_pb2.ListPrefixesRequest(pool_id=pool_id, min_ref_count=least, page_size=limit)
        return list(self._call(self._stub.ListPrefixes, request).prefixes)

    def pin(self, pool_id: str, prefix: admin_pb2.PrefixSelector) -> int:
        """Pins a prefix; returns how many blocks it has."""
        request = admin_pb2.PinPrefixRequest(pool_id=pool_id, prefix=prefix)
        return self._call(self._stub.PinPrefix, request).block_count

    def release(self, pool_id: str, prefix: admin_pb2.PrefixSelector) -> int:
        """Ends the pinning of a prefix; returns how many blocks were pinned."""
        request = admin_pb2.ReleasePrefixRequest(pool_id=pool_id, prefix=prefix)
        return self._call(self._stub.ReleasePrefix, request).block_count

    def evict(self, pool_id: str, prefix: admin_pb2.PrefixSelector) -> admin_pb2.EvictPrefixResponse:
        """Forgets a prefix and all that continues it, but for what is used or pinned."""
        return self._call(self._stub.EvictPrefix, admin_pb2.EvictPrefixRequest(pool_id=pool_id, prefix=prefix))

    def simulate(self, pool_id: str, block_counts: Sequence[int], block_size: int) -> admin_pb2.SimulateResponse:
        """Says what the recent traffic of a pool would have found in pools of other sizes."""
        request = admin_pb2.SimulateRequest(pool_id=pool_id, block_counts=block_counts, block_size=block_size)
        return self._call(self._stub.Simulate, request, timeout=_REPLAY_TIMEOUT_SECONDS)

    def leaks(self, pool_id: str, seconds: float) -> list[admin_pb2.Holding]:
        """Returns what gateways hold for at least so long, the oldest first."""
        found: list[admin_pb2.Holding] = []
        request = admin_pb2.FindLeaksRequest(pool_id=pool_id, page_size=_PAGE)
        request.min_age.FromNanoseconds(int(seconds * 1e9))
        while True:
            page = self._call(self._stub.FindLeaks, request)
            found += page.holdings
            if not (token := page.next_page_token):
                return found
            request.page_token = token

    def _call(self, method: Callable[..., _Answer], request: object, *, timeout: float = _TIMEOUT_SECONDS) -> _Answer:
        """Calls a method with a deadline; raises QuireError."""
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise as_quire_error(error, self.address) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
