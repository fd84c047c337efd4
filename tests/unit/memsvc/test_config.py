"""Settings of the memory service."""

from __future__ import annotations

from pathlib import Path

import pytest

from memsvc.config import MemsvcConfig
from quire.errors import ConfigError


def test_a_secret_file_gives_the_same_salt_after_a_restart(tmp_path: Path) -> None:
    """Otherwise two memsvc of one cluster never match each other's prefixes."""
    path = tmp_path / "secret"
    path.write_text("sixteen bytes or more\n")
    config = MemsvcConfig(tenant_secret_file=str(path))
    assert config.tenant_secret() == config.tenant_secret()
    assert len(config.tenant_secret()) == 32


def test_without_a_secret_file_every_start_has_its_own() -> None:
    """Otherwise the salt is a constant that anyone can read in the source."""
    assert MemsvcConfig().tenant_secret() != MemsvcConfig().tenant_secret()


@pytest.mark.parametrize("content", [None, b"short"])
def test_a_secret_file_that_is_missing_or_short_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """Otherwise tenants are separated by a secret that can be guessed."""
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="--tenant-secret-file"):
        MemsvcConfig(tenant_secret_file=str(path)).tenant_secret()


def test_a_ttl_must_leave_room_for_two_heartbeats() -> None:
    """Otherwise every gateway is lost again and again."""
    with pytest.raises(ConfigError, match="--lease-ttl"):
        MemsvcConfig(lease_ttl=0.5, heartbeat_interval=0.4).check()
