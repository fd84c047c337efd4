"""Read masks: whoever looks gets the fields that they asked for, and is told of those that are none."""

from __future__ import annotations

import pytest

from protos.memsvc.v1 import admin_pb2
from quire.errors import InvalidRequestError
from tests.conformance.memory_connections import POOL_ID, prompt
from tests.conformance.memory_rig import Rig

METHODS = list(admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods)
READERS = ("List", "Get", "Explain", "Find", "History", "Simulate")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_only_looks_has_a_mask_and_what_commands_has_none(method: object) -> None:
    """Otherwise one list among many cannot be cut down, or a command hides what it did."""
    has_mask = "read_mask" in method.input_type.fields_by_name  # type: ignore[attr-defined]
    assert has_mask == method.name.startswith(READERS)  # type: ignore[attr-defined]


async def test_only_the_fields_asked_for_come(rig: Rig) -> None:
    """Otherwise a dashboard that watches a few numbers reads megabytes."""
    for seed in range(3):
        await rig.admit(prompt(20, seed))
    request = admin_pb2.ListSequencesRequest(page_size=2)
    request.read_mask.paths.extend(["sequences.sequence_id", "sequences.age.seconds"])
    page = await rig.admin.ListSequences(request)
    assert page.next_page_token
    for sequence in page.sequences:
        assert {field.name for field, _ in sequence.ListFields()} <= {"sequence_id", "age"}
        assert sequence.sequence_id and not sequence.age.nanos
    pool = admin_pb2.GetPoolRequest(pool_id=POOL_ID)
    for paths in (["pool.spec"], ["pool.spec.block_size", "pool.spec"], ["pool.spec", "pool.spec.block_size"]):
        pool.read_mask.paths[:] = paths
        shown = (await rig.admin.GetPool(pool)).pool
        assert [field.name for field, _ in shown.ListFields()] == ["spec"]
        assert (shown.spec.block_size, shown.spec.block_count) == (16, 33)
    pool.read_mask.paths[:] = []
    assert (await rig.admin.GetPool(pool)).pool.pool_id == POOL_ID


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["pool.size"], "read_mask: 'pool.size': there is no 'size', allowed are .*block"),
        ([""], "there is no '', allowed are pool"),
        (["pool.pool_id.x"], "there is no 'x', allowed are none: it has no fields"),
        (["pool"] * 65, "read_mask: 65 paths, allowed are at most 64"),
    ],
)
async def test_a_mask_that_names_no_field_is_refused(rig: Rig, paths: list[str], message: str) -> None:
    """Otherwise a typing error looks like a value that is not there."""
    request = admin_pb2.GetPoolRequest(pool_id=POOL_ID)
    request.read_mask.paths.extend(paths)
    with pytest.raises(InvalidRequestError, match=message):
        await rig.admin.GetPool(request)
