"""Quotas from a file: a mistake in it is named at the start, not met as a strange refusal later."""

from __future__ import annotations

from pathlib import Path

import pytest

from memsvc.core.memory import MemoryCore
from memsvc.core.tenancy import TenantQuota
from memsvc.core.validation import PoolRegistration
from memsvc.quota_file import read_quotas
from quire.errors import ConfigError
from quire.memory import PoolSpec


def test_quotas_are_read_by_tenant(tmp_path: Path) -> None:
    """What is not said has no limit, and no floor."""
    path = tmp_path / "quotas.toml"
    path.write_text('[tenants.a]\nfloor_blocks = 3\nceiling_blocks = 9\n[tenants.""]\nretained_blocks = 0\n')
    assert read_quotas(str(path)) == {"a": TenantQuota(3, 9, None, 0), "": TenantQuota(0, None, 0, 0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants = 3", "expected tables"),
        ("[tenant.a]\n", "found tenant"),
        ("[tenants.a]\nfloor = 3\n", "tenants.a.floor: is unknown"),
        ("[tenants.a]\nfloor_blocks = -1\n", "found -1, allowed are 0"),
        ("[tenants.a]\nfloor_blocks = true\n", "found True"),
        ("[tenants.a]\nceiling_blocks = 0\n", "found 0, allowed are 1"),
        ("[tenants.a]\nceiling_blocks = 2\npinned_blocks = 3\n", "less than the floor or the pins, 3"),
        ("[tenants\n", "quotas.toml"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    """A quota that is silently left out limits nobody."""
    path = tmp_path / "quotas.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_quotas(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        read_quotas(str(tmp_path / "missing.toml"))


def test_quotas_of_a_file_are_those_of_every_pool_and_cut_to_small_ones() -> None:
    """Otherwise floors of a large pool leave nothing of a small one to anybody else."""
    quotas = {"a": TenantQuota(floor=20), "b": TenantQuota(floor=20, ceiling=100), "c": TenantQuota(ceiling=7)}
    core = MemoryCore(b"secret of this test", quotas=quotas)
    for number, usable in enumerate((100, 30)):
        spec = PoolSpec(usable + 1, 16, 1, "model", "float32", 512)
        core.register_pool(PoolRegistration(f"pool-{number}", 1, "h:1", spec), 1, 0.0)
    for pool_id, floors in (("pool-0", [20, 20, 0]), ("pool-1", [20, 0, 0])):
        pool = core.pool(pool_id)
        tenancy = pool.memory.tenancy
        assert tenancy is not None
        found = [tenancy.quota(tenancy.known(core.tenant_tag(pool_id, name))) for name in quotas]
        assert [quota.floor for quota in found] == floors
        assert found[2].ceiling == 7
