"""The memory checker: sound kernels pass, each kind of planted fault is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture
def probes(watch: Any, device: torch.device) -> Any:
    """The probe kernels, under the watch."""
    if device.type != "cpu":
        pytest.skip("tests the interpreter")
    from tests.kernels import probes

    return probes


def test_a_sound_kernel_has_no_faults(probes: Any, watch: Any) -> None:
    """A checker that cries wolf would be turned off."""
    pair = torch.randn(4, 2, 16)
    out = torch.empty(4, 16)
    probes.copy_rows[(4,)](pair[:, 0], out, 32, 16, 0, COUNT=16)
    assert torch.equal(out, pair[:, 0])
    assert watch.launch_count == 1
    assert watch.faults == []


def test_a_load_past_the_end_is_found_and_left_out(probes: Any, watch: Any) -> None:
    """The interpreter reads any address; on a GPU this is an illegal access, or a stranger's data."""
    probes.copy_rows[(2,)](torch.zeros(2, 16), torch.empty(2, 16), 16, 16, 3, COUNT=16)
    (fault,) = watch.take()
    assert fault == (
        "copy_rows: program (1, 0, 0): load out of bounds in 3 lane(s) of 16, the first at byte 128 of 'a_ptr', "
        "which has 128"
    )


def test_a_store_before_the_start_is_found(probes: Any, watch: Any) -> None:
    """A negative slot that is not skipped lands in front of the cache."""
    buffer = torch.zeros(3, 16)
    probes.copy_rows[(1,)](torch.ones(2, 16), buffer[1:], 16, -16, 0, COUNT=16)
    assert watch.take() == []
    probes.copy_rows[(2,)](torch.ones(2, 16), buffer[1:], 16, -16, 0, COUNT=16)
    (fault,) = watch.take()
    assert "store out of bounds in 16 lane(s) of 16, the first at byte -64 of 'out_ptr'" in fault
    assert torch.equal(buffer[0], torch.zeros(16))


def test_a_read_between_the_rows_of_a_view_is_found(probes: Any, watch: Any) -> None:
    """Keys and values share one tensor: values that are read through the view of the keys lie within its ends."""
    pair = torch.zeros(3, 2, 16)
    probes.copy_rows[(2,)](pair[:, 0], torch.empty(2, 16), 32, 16, 16, COUNT=16)
    faults = watch.take()
    assert len(faults) == 2
    assert "the first at byte 64 of 'a_ptr'" in faults[0]


def test_a_pointer_into_another_argument_is_found(probes: Any, watch: Any) -> None:
    """Both tensors are arguments; being inside any of them is not enough."""
    whole = torch.zeros(4, 16)
    probes.copy_rows[(2,)](whole[:1], whole[2:], 16, 16, 0, COUNT=16)
    (fault,) = watch.take()
    assert "of 'a_ptr', which has 64" in fault


def test_two_programs_that_store_to_one_address_are_found(probes: Any, watch: Any) -> None:
    """Which of them wins is open on a GPU; here it is always the last."""
    probes.store_all_to[(2,)](torch.empty(16), 16, COUNT=16)
    assert watch.take() == ["store_all_to: programs (0, 0, 0) and (1, 0, 0) store to one address (16 such addresses)"]


def test_two_lanes_of_one_store_with_one_address_are_found(probes: Any, watch: Any) -> None:
    """Which of them wins is open on a GPU as well."""
    probes.store_all_to[(1,)](torch.empty(16), 8, COUNT=16)
    assert watch.take() == ["store_all_to: program (0, 0, 0): two lanes of one store have one address"]


def test_a_load_of_what_another_program_stores_is_found(probes: Any, watch: Any) -> None:
    """In the interpreter the order of the programs makes such a kernel right; on a GPU it has none."""
    out = torch.zeros(4)
    probes.pass_on[(4,)](out)
    (fault,) = watch.take()
    assert "loads what program" in fault
    assert "(3 such addresses)" in fault


def test_atomic_operations_may_meet(probes: Any, watch: Any) -> None:
    """They are made for it; their addresses are checked all the same."""
    out = torch.zeros(1)
    probes.count[(5,)](out)
    assert out.item() == 5
    assert watch.take() == []
    probes.count[(1,)](torch.zeros(0))
    assert len(watch.take()) == 1


def test_the_kernels_fixture_fails_a_test_with_a_fault(pytester_faults: list[str]) -> None:
    """Negative control of the whole: a slot behind the cache, given to the real kernel, must be reported."""
    assert any("store out of bounds" in fault for fault in pytester_faults)
    assert any("store to one address" in fault for fault in pytester_faults)


@pytest.fixture
def pytester_faults(kernels: Any, watch: Any, device: torch.device) -> list[str]:
    """Faults of kv_write with a slot past the pool, and of one with a slot given twice."""
    if device.type != "cpu":
        pytest.skip("would damage memory")
    cache = torch.zeros(2, 3, 16, 8)
    key = torch.ones(2, 3, 8)
    kernels.kv_write(key, key, cache, cache.clone(), torch.tensor([5, 32]))
    kernels.kv_write(key, key, cache, cache.clone(), torch.tensor([5, 5]))
    found: list[str] = watch.take()
    return found
