"""One process for all answers like three."""

from __future__ import annotations

from pathlib import Path

from quire.client import Client
from tests.integration.stack import Stack, start_service


def test_one_process_gives_what_three_give(stack: Stack, tmp_path: Path) -> None:
    """Who starts with one process and splits it later must see the same text."""
    settings = {"QUIRE_EXECSVC_KV_CACHE_TOKENS": "2048", "QUIRE_EXECSVC_MAX_MODEL_LEN": "1024"}
    alone = start_service("gateway", tmp_path, "--in-process", settings=settings)
    try:
        alone.wait_listening()
        alone.wait_serving()
        answers = []
        for address in (alone.address, stack.address):
            with Client(address) as client:
                answers.append(
                    client.generate("The three primary colours are", n=2, max_tokens=24, temperature=0.7, seed=5)
                )
        assert answers[0].completions == answers[1].completions
        assert answers[0].usage.prompt_token_count == answers[1].usage.prompt_token_count
    finally:
        code = alone.stop()
    assert code == 0
    assert len(alone.events("request_finished")) == 1


def test_a_wrong_setting_of_the_executor_is_one_line(tmp_path: Path) -> None:
    """The executor's settings come from variables; a typing error in one must stop the start and name it."""
    service = start_service("gateway", tmp_path, "--in-process", settings={"QUIRE_EXECSVC_BLOCK_SIZE": "17"})
    assert service.process.wait(60) != 0
    assert "block_size" in service.log_path.read_text().splitlines()[-1]
