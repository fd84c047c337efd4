"""`python -m execsvc.bench.alone`: our engine, asked as a peer is (see quire.peers.process)."""

from __future__ import annotations

from typing import Any

import torch

from execsvc.bench.workload import Bench
from execsvc.config import ExecsvcConfig
from execsvc.loading import load
from quire.peers.serving import run, take_standard_output

_WARMUP = 2


class EngineAlone:
    """The engine as it serves, without the services around it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        config = ExecsvcConfig(
            model=arguments["model"],
            num_threads=arguments["threads"],
            max_model_len=arguments["len"],
            max_num_seqs=arguments["seqs"],
        )
        self._bench = Bench(load(config).engine)
        self.about = {"version": "quire", "threads": torch.get_num_threads()}

    def decode(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """See quire.peers.serving.Engine."""
        return {"seconds": self._bench.decode(batch, context, _WARMUP, steps)[0].median}

    def prefill(self, length: int, seed: int) -> dict[str, Any]:
        """See quire.peers.serving.Engine; what the tokens are makes no difference."""
        del seed
        return {"seconds": self._bench.prefill(length, 2).median}

    def serve(self, count: int, prompt: int, output: int, seed: int) -> dict[str, Any]:
        """See quire.peers.serving.Engine; what the tokens are makes no difference."""
        del seed
        return {"seconds": self._bench.serve(count, prompt, output), "tokens": count * output}


if __name__ == "__main__":
    run(take_standard_output(), EngineAlone)
