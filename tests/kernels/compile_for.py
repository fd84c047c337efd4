"""`python tests/kernels/compile_for.py SM`: compiles every kernel for a GPU that is not there, and prints JSON lines.

The host functions run as in production, with CPU tensors; each launch is compiled for the target and not run. The fake
driver answers what the compiler asks. Figures come from the tools inside the triton package.
"""

from __future__ import annotations

import json
from pathlib import Path
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[2]))
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class TargetDriver:
    """Answers for a device of one compute capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        """The target to compile for."""
        return GPUTarget("cuda", self._capability, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """Key of the compilation cache."""
        return self._capability

    def set_current_device(self, device: int) -> None:
        """Nothing to set."""

    def get_current_stream(self, device: int) -> int:
        """No stream."""
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Types as they are."""
        return kind

    def is_active(self) -> bool:
        """Always."""
        return True


def resources(cubin: bytes) -> dict[str, int]:
    """Returns registers, stack bytes and spilling instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([_TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return {"registers": int(found[1]), "stack_bytes": int(found[2]), "spill_instructions": spills}


def launch_all() -> None:
    """Calls every host function once, at the shapes of an 8B model."""
    from kernels.block_copy.copy import block_copy
    from kernels.kv_write.write import kv_write
    from kernels.paged_attention.decode import paged_attention_decode
    from kernels.paged_attention.prefill import paged_attention_prefill

    cache = torch.zeros(9, 1, 2, 8, 16, 128, dtype=torch.bfloat16)
    keys, values = cache[:, 0, 0], cache[:, 0, 1]
    q = torch.zeros(4, 32, 128, dtype=torch.bfloat16)
    tables = torch.ones(4, 8, dtype=torch.int32)
    lens = torch.full((4,), 100, dtype=torch.int32)
    kv_write(q[:, :8], q[:, 8:16], keys, values, torch.zeros(4, dtype=torch.int64))
    block_copy(cache, torch.tensor([[1, 2]]))
    paged_attention_decode(q, keys, values, tables, lens, 100, 0.1)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    paged_attention_prefill(q, keys, values, tables[:1], lens[:1], starts, 4, 0.1)


def main() -> None:
    """Runs the command."""
    capability = int(sys.argv[1])
    original = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = original(self, *args, grid=grid, warmup=True, **options)
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        figures = {"kernel": self.fn.__name__, "shared_bytes": compiled.metadata.shared}
        sys.stdout.write(json.dumps({**figures, **resources(compiled.asm["cubin"])}) + "\n")
        return compiled

    driver.set_active(TargetDriver(capability))
    JITFunction.run = compile_only
    launch_all()


if __name__ == "__main__":
    main()
