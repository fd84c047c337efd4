"""The commands of a user against the real services."""

import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import pytest

from quire import Client
from quire.cli import main
from tests.integration.stack import POOL_ID, Stack

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The capital of France is"
GREEDY = ["--temperature", "0"]


@pytest.fixture(autouse=True)
def addresses(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the services as a user's shell would tell them."""
    monkeypatch.setenv("QUIRE_ADDRESS", stack.address)
    monkeypatch.setenv("QUIRE_ADMIN_ADDRESS", stack.memsvc.address)


def quire(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command as a process of its own."""
    command = [sys.executable, "-m", "quire.cli.main", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


def test_generate_prints_what_the_client_gets(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """The command and the library must not differ."""
    assert main.run(["generate", PROMPT, "--max-tokens", "12", *GREEDY]) == 0
    with Client(stack.address) as client:
        assert capsys.readouterr().out == client.generate(PROMPT, max_tokens=12, temperature=0).text + "\n"


def test_generate_prints_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts read text, tokens and usage from one document."""
    assert main.run(["generate", PROMPT, "--max-tokens", "5", "--n", "2", "--seed", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [one["index"] for one in answer["completions"]] == [0, 1]
    assert all(len(one["token_ids"]) <= 5 and one["finish_reason"] for one in answer["completions"])
    assert answer["usage"]["prompt_token_count"] > 0


def test_generate_prints_each_of_several_samples(capsys: pytest.CaptureFixture[str]) -> None:
    """Samples that are mixed line by line can be read by nobody."""
    assert main.run(["generate", PROMPT, "--max-tokens", "5", "-n", "3", "--seed", "3"]) == 0
    assert sorted(re.findall(r"^--- (\d) \(\w+\)$", capsys.readouterr().out, re.MULTILINE)) == ["0", "1", "2"]


def test_generate_reads_standard_input_and_stops_at_a_string() -> None:
    """Long prompts come from files; the stop string is not printed."""
    done = quire("generate", "-", "--max-tokens", "40", "--stop", "Paris", *GREEDY, text=PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" not in done.stdout
    assert len(done.stdout) < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-tokens", "-3"], "max_tokens"),
        (["--min-tokens", "9", "--max-tokens", "8"], "min_tokens"),
        (["--priority", "1"], "priority"),
        (["--model", "nope"], "nope"),
        (["--n", "65"], "n"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who mistypes a number wants to know which."""
    assert main.run(["generate", PROMPT, *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[0]
    assert len(printed.err.splitlines()) <= 2


def test_a_deadline_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A script with a time limit must be able to tell why it got nothing."""
    assert main.run(["generate", PROMPT, "--timeout", "0.05", "--max-tokens", "500"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_an_interrupted_answer_ends_with_130(stack: Stack) -> None:
    """Ctrl-C must end the command at once, and free what it held."""
    command = [sys.executable, "-m", "quire.cli.main", "generate", PROMPT]
    command += ["--max-tokens", "1500", "--min-tokens", "1500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    stack.wait_idle()


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    """`quire generate ... | head -c 1` must not print a traceback."""
    command = f"{sys.executable} -m quire.cli.main generate '{PROMPT}' --max-tokens 200 --temperature 0 | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    assert len(done.stdout) == 1


def test_a_conversation_over_a_pipe_remembers_its_turns() -> None:
    """The second question refers to the first; without it the answer is another."""
    turns = "My name is Ada.\n\nWhat is my name?\n"
    before = quire("sessions", "--json").stdout
    talk = quire("chat", *GREEDY, "--max-tokens", "24", text=turns)
    assert talk.returncode == 0, talk.stderr
    assert "Ada" in talk.stdout
    forgot = quire(
        "chat", *GREEDY, "--max-tokens", "24", text="My name is Ada.\n/clear\nWhat is my name?\n/exit\nnot sent\n"
    )
    assert forgot.returncode == 0
    assert forgot.stdout != talk.stdout
    assert "not sent" not in forgot.stdout
    left = quire("sessions", "--json")
    kept = [{one["session_id"] for one in json.loads(listed)} for listed in (before, left.stdout)]
    assert (left.returncode, kept[1]) == (0, kept[0]), "a conversation that is over is not kept"


def test_a_live_sequence_can_be_listed_and_drawn_by_the_beginning_of_its_id(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looking at a sequence while it runs is what no other server offers."""
    with Client(stack.address) as client:
        options = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
        first = client.stream(PROMPT * 8, request_id="looked-at-1", **options)  # type: ignore[arg-type]
        second = client.stream(PROMPT * 8 + "?", request_id="looked-at-2", **options)  # type: ignore[arg-type]
        for stream in (first, second):
            next(stream.text())
        assert main.run(["sequences", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert {one["sequence_id"] for one in listed} >= {"looked-at-1/0", "looked-at-2/0"}
        assert main.run(["top", "--count", "2", "--interval", "0.1"]) == 0
        seen = capsys.readouterr().out
        assert (seen.count(f"pool {POOL_ID}"), seen.count("looked-at-2/0"), seen.count("tokens/s")) == (2, 2, 2)
        assert main.run(["top", POOL_ID, "--count", "1", "--json"]) == 0
        first_moment = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert first_moment[-1]["pool"]["pool_id"] == POOL_ID
        assert main.run(["sequences"]) == 0
        assert "looked-at-1/0" in capsys.readouterr().out
        assert main.run(["blocks", "looked-at-1"]) == 0
        assert "sequence looked-at-1/0" in capsys.readouterr().out
        assert main.run(["blocks", "looked-at-2/", "--json"]) == 0
        table = json.loads(capsys.readouterr().out)
        block = table["entries"][0]["block_id"]
        assert main.run(["blocks", "looked-at"]) == 1
        assert "'looked-at' begins 2 sequences" in capsys.readouterr().err
        assert main.run(["block", POOL_ID, str(block)]) == 0
        assert "looked-at-2/0" in capsys.readouterr().out
        first.close()
        second.close()
    stack.wait_idle()
    assert main.run(["blocks", "looked-at-1"]) == 1
    assert "hint: `quire sequences`" in capsys.readouterr().err


def test_the_pool_is_shown_and_adds_up(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """An operator's first question is how full it is."""
    stack.wait_idle()
    assert main.run(["pools", "--json"]) == 0
    (pool,) = json.loads(capsys.readouterr().out)
    names = ("used", "cached", "pending_free", "leased", "free")
    assert sum(pool[f"{name}_block_count"] for name in names) == pool["spec"]["block_count"] - 1
    assert main.run(["pools"]) == 0
    text = capsys.readouterr().out
    assert f"pool {POOL_ID}  ready" in text
    assert f"cached {pool['cached_block_count']}" in text


def test_what_happened_to_a_sequence_and_its_block_can_be_asked_when_it_is_gone(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sequence that went wrong is over when somebody asks."""
    with Client(stack.address) as client:
        client.generate(PROMPT * 4, max_tokens=20, temperature=0, request_id="gone-1")
    stack.wait_idle()
    assert main.run(["history", "gone", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert {record["sequence_id"] for record in records} == {"gone-1/0"}
    assert records[0]["command"] == "admit"
    assert "sequence_after" not in records[-1]
    assert main.run(["history", "gone-1/0"]) == 0
    shown = capsys.readouterr()
    assert "Opened as table" in shown.out and "is closed, after" in shown.out
    assert "the log goes" in shown.err
    assert main.run(["history", POOL_ID, "1", "--limit", "3"]) == 0
    assert "GENERATION" in capsys.readouterr().out
    assert main.run(["history", "--pool", POOL_ID, "--limit", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert main.run(["history", "nobody"]) == 1
    assert "does not tell of a sequence" in capsys.readouterr().err


def test_how_long_blocks_stay_is_summed_up(
    small_stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who wonders whether more memory would help must get figures, and where none are taken, be told how."""
    assert main.run(["residencies", POOL_ID]) == 0
    assert "--residency-every" in capsys.readouterr().err
    monkeypatch.setenv("QUIRE_ADMIN_ADDRESS", small_stack.memsvc.address)
    with Client(small_stack.address) as client:
        for number in range(6):
            client.generate(f"{number} " + PROMPT * 40, max_tokens=2, temperature=0)
    small_stack.wait_idle()
    assert main.run(["residencies", POOL_ID]) == 0
    shown = capsys.readouterr().out
    assert "idle at the end" in shown and re.search(r"\d+% of \d+ blocks were hit", shown)
    assert main.run(["residencies", POOL_ID, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["residencies"]) > 5
    assert main.run(["residencies", "nope"]) == 1


@pytest.mark.parametrize("arguments", [["block", "nope", "1"], ["block", POOL_ID, "99999999"], ["blocks", "nope"]])
def test_what_is_not_there_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A typo in an id is the commonest mistake of all."""
    assert main.run(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2


def test_a_reset_is_refused_while_a_sequence_runs_and_forced_is_a_pause(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator who clears the cache must be told what is in the way, and harm nobody when forcing it."""
    options = {"max_tokens": 150, "temperature": 0, "ignore_eos": True}
    with Client(stack.address) as client:
        expected = client.generate(PROMPT * 8, **options).text  # type: ignore[arg-type]
        stack.wait_idle()
        assert main.run(["reset", POOL_ID]) == 0
        assert re.search(r"^\d+ blocks of executor-test were forgotten", capsys.readouterr().out)
        assert stack.pool().cached_block_count == 0
        stream = client.stream(PROMPT * 8, **options)  # type: ignore[arg-type]
        pieces = stream.text()
        text = next(pieces)
        assert main.run(["reset", POOL_ID]) == 1
        printed = capsys.readouterr().err.splitlines()
        assert "1 sequences hold" in printed[0]
        assert "--force" in printed[1]
        epoch = stack.pool().epoch
        assert main.run(["reset", POOL_ID, "--force", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["epoch"] > epoch
        assert text + "".join(pieces) == expected
    stack.wait_idle()
    assert main.run(["reset", "nope"]) == 1
    assert "no pool 'nope'" in capsys.readouterr().err


def test_quotas_are_set_shown_and_taken_away(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """An operator who shares a pool among teams does it by this command."""
    assert main.run(["quota", POOL_ID]) == 0
    assert "no tenant of this pool has a quota" in capsys.readouterr().err
    assert main.run(["quota", POOL_ID, "team-a", "--floor", "10", "--ceiling", "200"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["team-a", "0", "0", "0", "0", "10", "200", "-", "0"]
    assert main.run(["quota", POOL_ID, "team-a", "--floor", "0", "--retained", "7"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[5:] == ["0", "200", "7", "0"]
    assert main.run(["quota", POOL_ID, "", "--ceiling", "600", "--json"]) == 0
    (default,) = json.loads(capsys.readouterr().out)
    assert default["quota"]["ceiling_block_count"] == 600
    assert main.run(["generate", PROMPT, "--max-tokens", "5", *GREEDY]) == 0
    capsys.readouterr()
    assert main.run(["quota", POOL_ID]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["(default)", "team-a"]
    for tenant in ("", "team-a"):
        assert main.run(["quota", POOL_ID, tenant, "--clear"]) == 0
    capsys.readouterr()
    assert main.run(["quota", POOL_ID, "--floor", "1"]) == 1
    assert "TENANT" in capsys.readouterr().err
    assert main.run(["quota", POOL_ID, "team-a", "--floor", "99999"]) == 1
    assert "floor_block_count: found 99999" in capsys.readouterr().err


def test_health_asks_all_services(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that waits for the service needs one command and its exit status."""
    assert main.run(["health", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["address"] for one in found} == {stack.address, stack.memsvc.address, stack.execsvc.address}
    assert main.run(["health", "--address", "127.0.0.1:1"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().out


def test_the_client_of_the_readme_works(stack: Stack) -> None:
    """The first program that a user copies must run."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    program = code.replace("127.0.0.1:50051", stack.address)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "sky" in done.stdout
    assert re.search(r"\d+ prompt tokens were cached", done.stdout)


def test_a_service_can_be_run_alone() -> None:
    """`quire memsvc` is what an operator puts into a unit file: signals must reach the service itself."""
    environment = {**os.environ, "QUIRE_ADMIN_ADDRESS": "127.0.0.1:1"}
    command = [sys.executable, "-m", "quire.cli.main", "memsvc", "--port", "0", "--log-format", "json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        begun = time.monotonic()
        for line in process.stderr:
            if "service_listening" in line:
                break
            assert time.monotonic() - begun < 30
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize("service", ["memsvc", "execsvc", "gateway"])
def test_the_help_of_a_service_is_its_own(service: str) -> None:
    """`quire execsvc --help` must list the executor's flags, not the command line's."""
    done = quire(service, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: quire {service}")
    assert quire(service, "--nonsense").returncode == 2
