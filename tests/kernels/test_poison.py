"""The poison reaches what it must reach, and nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import poison


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_unused_slot_is_poisoned_and_no_other(dtype: torch.dtype, value: float) -> None:
    """A slot that was forgotten would prove nothing; one too many would fail sound kernels."""
    cache = torch.ones(3, 2, 2, 4, 8).to(dtype)
    used = torch.tensor([0, 1, 2, 3, 4, 9, 11])
    unused = poison.unused_slots(3, 4, used)
    assert int(unused.sum()) == 5
    poison.poison_slots(cache[:, 1], unused, value)
    finite = torch.isfinite(cache.float())
    assert finite[:, 0].all(), "the other half of the cache"
    # [block, kv_head, slot, dim] -> [block, slot]
    poisoned = ~finite[:, 1].transpose(1, 2).any(-1).any(-1)
    assert torch.equal(poisoned, unused)


def test_tails_of_tables_hold_garbage() -> None:
    """Any value may stand behind a row's blocks: negative, huge, plausible."""
    tables = torch.arange(18, dtype=torch.int32).view(3, 6)
    poison.poison_tails(tables, torch.tensor([0, 2, 6]))
    assert set(tables[0].tolist()) <= set(poison.GARBAGE_BLOCKS)
    assert tables[1, :2].tolist() == [6, 7]
    assert set(tables[1, 2:].tolist()) == set(poison.GARBAGE_BLOCKS)
    assert tables[2].tolist() == list(range(12, 18))


def test_outputs_start_as_nan() -> None:
    """An output that starts as zero hides the rows that nobody wrote."""
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        assert poison.poisoned((2, 3), dtype).float().isnan().all()
