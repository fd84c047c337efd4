"""`python -m kernels.bench`: measures on the CUDA device, and prints one JSON document; progress goes to stderr.

With `--tune` it chooses launch options instead, and writes the device's table.
"""

import argparse
import json
import sys
from typing import Any

import torch

from kernels import configs
from kernels.bench.problem import Scale

_NO_DEVICE = 2


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def run(*, tuning: bool) -> dict[str, Any]:
    """Returns the document; it has an "error" where there is no device."""
    if not torch.cuda.is_available():
        what = "to choose launch options by measuring them" if tuning else "to measure kernels"
        message = f"a CUDA device is needed {what}: torch {torch.__version__} sees none"
        return {"error": {"message": message, "reason": "NO_DEVICE", "field": ""}}
    # Triton needs a device when these are imported.
    from kernels.bench.clock import CudaClock  # noqa: PLC0415
    from kernels.bench.report import measure  # noqa: PLC0415
    from kernels.bench.tune import tune  # noqa: PLC0415

    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    if tuning:
        return tune(CudaClock(7), device, Scale(), configs.FOLDER, _say)
    return measure(CudaClock(), device, Scale(), _say)


def main() -> int:
    """Runs the command; returns 0, or 2 where there is no device."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--tune", action="store_true", help="choose launch options and write the device's table")
    parser.add_argument("--json", action="store_true", help="print JSON, which is all that this prints")
    options = parser.parse_args()
    document = run(tuning=options.tune)
    sys.stdout.write(json.dumps(document) + "\n")
    if "error" in document:
        _say(document["error"]["message"])
        return _NO_DEVICE
    return 0


if __name__ == "__main__":
    sys.exit(main())
