"""Settings of the memory service."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
import secrets

from memsvc.store.credentials import Credentials
from quire.config import ServiceConfig, setting
from quire.errors import ConfigError

DEFAULT_PORT = 50061
_SECRET_BYTES_MINIMUM = 16


@dataclasses.dataclass(frozen=True, slots=True)
class MemsvcConfig(ServiceConfig):
    """The memory service: owns every block pool, its block tables and its prefix cache."""

    port: int = setting(DEFAULT_PORT, "Port to listen on; 0 lets the system choose.", minimum=0, maximum=65535)
    store: str = setting(
        "memory://", "Where shared metadata lives: memory:// or redis[s][+cluster]://[USER:PASS@]HOST:PORT[/DB]."
    )
    store_username: str | None = setting(None, "User of the store's access list; before the one in its address.")
    store_password_file: str | None = setting(
        None, "File whose first line is the store's password; before the one in its address."
    )
    store_ca_file: str | None = setting(None, "Certificates that sign the store's, PEM; none for those of the system.")
    store_cert_file: str | None = setting(None, "Certificate that the store asks of its clients, PEM.")
    store_key_file: str | None = setting(None, "Key of --store-cert-file, PEM.")
    store_queue_blocks: int = setting(
        65_536, "Most blocks of a pool that wait to be written to the store before all are written anew.", minimum=64
    )
    memsvc_id: str = setting("memsvc", "Name of this service in the shared store, stable over restarts.")
    tenant_secret_file: str | None = setting(
        None, "File with 16 bytes or more from which tenants' salts are derived; without it, random at each start."
    )
    quota_file: str | None = setting(
        None, "TOML file with what tenants may hold and keep of every pool, see docs/operating.md."
    )
    retained_share: float = setting(
        0.25, "Share of a pool that a tenant may retain if no quota says otherwise.", minimum=0.0, maximum=1.0
    )
    admission_forecast: bool = setting(
        True, "Hold requests back for which there will be no room soon, going by the lengths of outputs so far."
    )
    residency_every: int = setting(
        0,
        "Follow the life of every n-th block that is taken, for ListResidencies; 0 for none.",
        minimum=0,
        maximum=2**31 - 1,
    )
    lease_ttl: float = setting(
        3.0, "Seconds of silence after which a gateway or an executor counts as gone.", minimum=0.1, maximum=3600
    )
    heartbeat_interval: float = setting(
        0.5, "Seconds between heartbeats that gateways and executors are asked for.", minimum=0.02, maximum=600
    )
    fence_timeout: float = setting(2.0, "Seconds that an executor has to answer one fence.", minimum=0.05, maximum=60)
    check_interval: float = setting(
        5.0, "Seconds between checks of all invariants of a pool that is idle; 0 for never.", minimum=0, maximum=3600
    )
    command_log_mib: int = setting(
        128, "MiB for the command log, from which history is told; 0 for none.", minimum=0, maximum=65536
    )
    log_dir: str | None = setting(
        None, "Directory to write the command log to, prompts included, for `quire replay`; without it, to none."
    )
    log_dir_mib: int = setting(
        1024, "MiB of files in --log-dir above which the oldest of this service are removed.", minimum=1
    )
    max_pool_blocks: int = setting(8_388_608, "Most blocks that one pool may have.", minimum=2, maximum=2**31 - 1)
    max_pools: int = setting(256, "Most pools.", minimum=1, maximum=65536)

    def check(self) -> None:
        """Raises ConfigError if settings do not fit one another."""
        if self.lease_ttl < 2 * self.heartbeat_interval:
            message = (
                f"--lease-ttl: {self.lease_ttl} s is less than two heartbeat intervals of {self.heartbeat_interval} s"
            )
            raise ConfigError(message, field="lease_ttl")
        if self.store == "memory://":
            for name in ("username", "password_file", "ca_file", "cert_file", "key_file"):
                if getattr(self, f"store_{name}") is not None:
                    flag = f"--store-{name.replace('_', '-')}"
                    raise ConfigError(f"{flag}: is used only with a store on a server", field=f"store_{name}")
        if self.log_dir is not None and not self.command_log_mib:
            raise ConfigError("--log-dir: there is nothing to write with --command-log-mib 0", field="log_dir")
        if not self.memsvc_id:
            raise ConfigError("--memsvc-id: is empty", field="memsvc_id")

    def store_credentials(self) -> Credentials:
        """Returns who to be for the store."""
        return Credentials(
            username=self.store_username or "",
            password_file=self.store_password_file or "",
            ca_file=self.store_ca_file or "",
            certificate_file=self.store_cert_file or "",
            key_file=self.store_key_file or "",
        )

    def tenant_secret(self) -> bytes:
        """Returns the 32 secret bytes.

        Raises:
            ConfigError: the file cannot be read, or is too short.
        """
        if self.tenant_secret_file is None:
            return secrets.token_bytes(32)
        try:
            content = Path(self.tenant_secret_file).read_bytes().strip()
        except OSError as error:
            message = f"--tenant-secret-file: {error}"
            raise ConfigError(message, field="tenant_secret_file") from error
        if len(content) < _SECRET_BYTES_MINIMUM:
            message = f"--tenant-secret-file: {len(content)} bytes, at least {_SECRET_BYTES_MINIMUM} are expected"
            raise ConfigError(message, field="tenant_secret_file")
        return hashlib.blake2b(content, digest_size=32).digest()
