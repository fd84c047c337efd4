"""One set-up of structlog for every service: JSON lines, or colours on a terminal."""

import logging
import sys

import structlog

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "console")


def _named(service: str) -> structlog.typing.Processor:
    """Returns a processor that puts the service's name into every event."""

    def add_service(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault("service", service)
        return event

    return add_service


def configure_logging(level: str = "info", log_format: str = "auto", *, service: str) -> None:
    """Sends events at or above `level` to stderr, with `service` bound to each.

    Args:
        level: one of LEVELS.
        log_format: "json", "console", or "auto": console when stderr is a terminal.
        service: name of the service.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    threshold = getattr(logging, level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _named(service),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if console
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries that log through the standard library are heard from WARNING up.
    logging.basicConfig(stream=sys.stderr, level=max(threshold, logging.WARNING), format="%(name)s: %(message)s")
