"""What the public services ask of an engine, wherever it runs: in this process, or in one of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Protocol

from quire.errors import ModelNotFoundError, NotReadyError

if TYPE_CHECKING:
    from gateway.core.request import RequestSettings
    from gateway.models import ServedModel
    from gateway.streams import RequestStream


class Intake(Protocol):
    """Takes requests."""

    def models(self) -> list[ServedModel]:
        """Returns the models served, by name."""
        ...

    def find_model(self, name: str) -> ServedModel:
        """Returns the model of this name; an empty name means the only one.

        Raises:
            NotReadyError: draining, or no executor has come yet.
            ModelNotFoundError: no such model, or an empty name and several models.
        """
        ...

    def check_request(self, request_id: str, model: str) -> None:
        """Raises RequestExistsError if a live request has this id, AdmissionError if the model's queue is full."""
        ...

    def submit(self, settings: RequestSettings) -> RequestStream:
        """Queues a request and returns the stream of what comes of it; raises QuireError."""
        ...

    def abandon(self, stream: RequestStream) -> None:
        """The client is gone: what is left of its request is cancelled. A no-op for one that has ended."""
        ...

    async def cancel_all(self, request_ids: Collection[str], tenant: str = "") -> set[str]:
        """Cancels requests of a tenant and waits until their blocks are back; returns those that were live."""
        ...


def find_model(models: Mapping[str, ServedModel], name: str, *, draining: bool) -> ServedModel:
    """Returns one of `models`; see `Intake.find_model`."""
    if draining:
        raise draining_error()
    if not models:
        raise NotReadyError("no executor is connected yet; try again soon", retry_after=1.0)
    if not name and len(models) == 1:
        return next(iter(models.values()))
    if name not in models:
        served = ", ".join(sorted(models))
        raise ModelNotFoundError(f"model: found {name!r}, served here: {served}", field="model")
    return models[name]


def draining_error() -> NotReadyError:
    """Returns the error for a request that comes too late."""
    return NotReadyError("the gateway is draining; try another one", reason="DRAINING", retry_after=1.0)
