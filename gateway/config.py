"""Settings of the gateway."""

from __future__ import annotations

import dataclasses

from quire.config import ServiceConfig, setting


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayConfig(ServiceConfig):
    """The public API: tokenises, batches continuously, streams."""

    port: int = setting(50051, "Port to listen on; 0 lets the system choose.", minimum=0, maximum=65535)
    memsvc: str = setting("127.0.0.1:50061", "HOST:PORT of the memory service.")
    gateway_id: str = setting(
        "",
        "Name of this gateway, unique and stable over restarts; empty for HOSTNAME:PORT, random if that is 0.",
    )
    max_num_seqs: int = setting(256, "Most sequences that run at once on one executor.", minimum=1, maximum=65536)
    max_num_batched_tokens: int | None = setting(
        None, "Most tokens that one step computes; none for what the executor allows.", minimum=1
    )
    max_queue_size: int = setting(1024, "Most requests that wait; more are refused.", minimum=1)
    max_queue_time: float = setting(120.0, "Seconds after which a waiting request is refused.", minimum=0.001)
    max_tokens_default: int = setting(4096, "Completion tokens of a request that does not say.", minimum=1)
    enable_prefix_caching: bool = setting(True, "Reuse keys and values of equal prefixes.")
    pipeline_depth: int = setting(
        2, "Steps sent to the executor before the first result is back.", minimum=1, maximum=4
    )
    max_preemptions: int = setting(
        8, "After this many preemptions a sequence is preempted only if nothing else can be.", minimum=0
    )
    preemption_mode: str = setting(
        "auto",
        "What a preempted sequence has computed: recompute computes it again, swap moves it to host memory while the "
        "executor has room (its --swap-space), auto does what is cheaper.",
        choices=("auto", "recompute", "swap"),
    )
    scheduling_policy: str = setting(
        "fcfs",
        "Who goes first: fcfs by arrival; priority by the requests' priorities, lower first; fair by what tenants had.",
        choices=("fcfs", "priority", "fair"),
    )
    priority_ageing: float = setting(
        60.0, "Seconds of age that are worth one step of priority; 0 for none: the least urgent may starve.", minimum=0
    )
    tenant_metadata: str = setting(
        "", "Metadata key in which a trusted proxy names the tenant of a call; empty: all calls are of one tenant."
    )
    long_prefill_token_threshold: int = setting(
        0, "Most tokens of one prompt in a step that other sequences take part in; 0 for no limit.", minimum=0
    )
    max_sessions: int = setting(1024, "Most sessions that are kept; more are refused.", minimum=1)
    session_ttl: float = setting(
        3600.0, "Seconds without a turn after which a session ends, and most that one may ask for.", minimum=1.0
    )
    api_server_count: int = setting(
        1,
        "Processes that serve clients on the port; with more than 1 the engine has one of its own.",
        minimum=1,
        maximum=64,
    )
    in_process: bool = setting(False, "Run memsvc and the executor inside this process; see QUIRE_EXECSVC_*.")
