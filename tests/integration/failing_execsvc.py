"""An executor whose device fails at a step whose number it is told. Run as a program."""

import itertools
import os
import sys
from typing import Any

from execsvc import server
from execsvc.runner import HostSteps

_launch = HostSteps.launch
_steps = itertools.count()
_failing_step = int(os.environ["FAILING_STEP"])


def launch(self: HostSteps, *arguments: Any) -> Any:
    """The runner's own until it fails."""
    if next(_steps) == _failing_step:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")
    return _launch(self, *arguments)


if __name__ == "__main__":
    HostSteps.launch = launch  # type: ignore[method-assign]
    sys.exit(server.main(sys.argv[1:], os.environ))
