"""Beam search on the executor's log-probabilities against transformers on the same weights."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
import subprocess
from typing import Any

import pytest
import torch

from execsvc.model import llama
from execsvc.model.source import open_model
from gateway.core.beam import BeamSearch, BeamSettings
from gateway.plan import to_outcome
from tests.oracle.expected import ORACLE_PYTHON, ROOT, oracle_available
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import CONFIG, Driver, start

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(not oracle_available(), reason="no .venv-oracle: run scripts/setup_oracle.sh"),
]
IDS = [(7 * index) % 311 for index in range(20)]
MODEL = dataclasses.replace(CONFIG, hidden_size=192)


def search(driver: Driver, case: dict[str, Any]) -> list[list[int]]:
    """Returns what our search finds, each beam computed anew at each step."""
    settings = BeamSettings(case["width"], case["length_penalty"], case["early_stopping"])
    found = BeamSearch(settings, case["ends"], case["max_tokens"])
    beams: list[list[int]] = [[]]
    wanted = settings.candidate_count(len(case["ends"]))
    while not found.done:
        added = [
            start(table, IDS + said, [1 + 4 * table, 2 + 4 * table, 3 + 4 * table, 4 + 4 * table], logprobs=wanted)
            for table, said in enumerate(beams, 1)
        ]
        counts = {table: len(IDS) + len(said) for table, said in enumerate(beams, 1)}
        rows = {row.table: row for row in to_outcome(driver.run(counts, added=added)).logprobs}
        driver.run(removed=list(counts))
        candidates = [
            list(zip(rows[table].token_ids[1:], rows[table].values[1:], strict=True)) for table in sorted(rows)
        ]
        beams = [[*beams[beam], token] for beam, token in found.advance(candidates)]
    return [list(hypothesis.tokens) for hypothesis in found.best(case["width"])]


def test_a_search_of_width_four_finds_what_transformers_finds(tmp_path: Path) -> None:
    """Whoever moves here must get the completions that they know, with and without ends, early or not."""
    directory = tiny.write_directory(tmp_path / "model", MODEL)
    (directory / "config.json").write_text(json.dumps({**tiny.hf_config(MODEL), "model_type": "llama"}))
    source = open_model(str(directory))
    model = llama.load(source, torch.float32, torch.device("cpu"), 256)
    source.close()
    driver = Driver(tiny.engine_of(model, blocks=64, max_model_len=256))
    plain = {"width": 4, "max_tokens": 20, "ends": [], "length_penalty": 1.0, "early_stopping": False}
    free = search(driver, plain)
    ends = [free[0][9]]
    cases: list[dict[str, Any]] = [plain]
    for penalty in (1.0, 0.3, 2.0):
        cases += [plain | {"ends": ends, "length_penalty": penalty, "early_stopping": early} for early in (False, True)]
    paths = [tmp_path / "cases.json", tmp_path / "result.json"]
    paths[0].write_text(json.dumps([case | {"ids": IDS} for case in cases]))
    command = [ORACLE_PYTHON, ROOT / "tests" / "oracle" / "run_beams.py", directory, *paths]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for case, expected in zip(cases, json.loads(paths[1].read_text()), strict=True):
        assert search(driver, case) == expected, case
