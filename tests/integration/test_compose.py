"""The container stack: what its files promise, and one run for real where an engine can be started."""

import json
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77
RUN_SECONDS = 900
SERVICES = ["execsvc", "gateway", "memsvc", "redis"]


def compose_test(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs the script behind `make compose-test`."""
    command = [sys.executable, "-m", "scripts.compose_test", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module", params=["gpu", "cpu"])
def resolved(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The compose files as Compose reads them, alone and with the CPU override."""
    done = compose_test("--print-config", request.param, timeout=300)
    if done.returncode == SKIPPED:
        pytest.skip(f"the compose files were NOT checked: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, json.loads(done.stdout)


def test_every_container_is_hardened(resolved: tuple[str, dict[str, Any]]) -> None:
    """Otherwise a bug in a service could write to its image, gain privileges or eat the host's memory."""
    _, config = resolved
    assert sorted(config["services"]) == SERVICES
    for name, service in config["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"], name
        assert service["restart"] == "unless-stopped", name
        assert int(service["mem_limit"]) > 0, name
        assert service["pids_limit"] > 0, name
        assert service["healthcheck"]["test"], name
        assert not any(key in service for key in ("privileged", "cap_add", "network_mode", "pid")), name


def test_only_loopback_reaches_the_stack(resolved: tuple[str, dict[str, Any]]) -> None:
    """Otherwise anyone on the network could use the model, or read and write Redis."""
    _, config = resolved
    published = {name: service.get("ports", []) for name, service in config["services"].items()}
    assert published["redis"] == []
    assert published["execsvc"] == []
    for name, port in (("gateway", 50051), ("memsvc", 50061)):
        assert [(entry["host_ip"], entry["target"]) for entry in published[name]] == [("127.0.0.1", port)]
    assert list(config["services"]["redis"]["networks"]) == ["store"]
    assert config["networks"]["store"]["internal"]
    assert config["networks"]["services"]["internal"]


def test_services_start_in_order_and_stop_in_time(resolved: tuple[str, dict[str, Any]]) -> None:
    """Otherwise a service starts before what it needs, or is killed while streams are still draining."""
    _, config = resolved
    needs = {
        name: {other for other, how in service.get("depends_on", {}).items() if how["condition"] == "service_healthy"}
        for name, service in config["services"].items()
    }
    assert needs == {"redis": set(), "memsvc": {"redis"}, "execsvc": {"memsvc"}, "gateway": {"memsvc", "execsvc"}}
    for name in ("memsvc", "execsvc", "gateway"):
        # A service drains for up to 25 s.
        assert config["services"][name]["stop_grace_period"] == "30s"


def test_the_override_takes_the_gpu_away(resolved: tuple[str, dict[str, Any]]) -> None:
    """Otherwise the stack asks for a GPU driver on machines that have none and does not start."""
    kind, config = resolved
    executor = config["services"]["execsvc"]
    devices = executor["deploy"]["resources"].get("reservations", {}).get("devices", [])
    assert executor["build"]["target"] == {"gpu": "execsvc-gpu", "cpu": "execsvc"}[kind]
    assert [device["capabilities"] for device in devices] == {"gpu": [["gpu"]], "cpu": []}[kind]


def test_no_secret_and_no_host_name_is_in_the_files(resolved: tuple[str, dict[str, Any]]) -> None:
    """Otherwise credentials or a private index end in every clone."""
    _, config = resolved
    for service in config["services"].values():
        build_arguments = service.get("build", {}).get("args", {})
        assert build_arguments.get("EXTRA_PIP_OPTIONS", "") == ""
        assert not any(re.search("PASSWORD|SECRET|TOKEN$|KEY$", key) for key in service.get("environment", {}))


def test_the_dockerfile_is_plain_and_safe() -> None:
    """Otherwise the classic builder cannot read it, a service runs as root, or assertions are stripped."""
    text = (ROOT / "Dockerfile").read_text()
    instructions = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert not [line for line in instructions if re.search(r"--mount|--link|<<[-\w]", line)]
    assert not [line for line in instructions if "PYTHONOPTIMIZE" in line]
    stages = {stage.split()[2]: stage for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]}
    for name in ("memsvc", "gateway", "execsvc", "execsvc-gpu"):
        assert "\nUSER 10001:10001\n" in stages[name], name
        assert f'ENTRYPOINT ["python", "-m", "{name.removesuffix("-gpu")}"]' in stages[name], name
    for name in ("base", "wheel", "slim", "memsvc", "gateway"):
        assert "--extra executor" not in stages[name], name


def test_the_build_context_names_what_it_lets_in() -> None:
    """Otherwise .git, .venv, models or local settings travel into images."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert not [line for line in lines if line.startswith("!") and re.search(r"git|venv|\.env|\*|models", line)]


def test_names_said_twice_agree() -> None:
    """Otherwise the test runs other images or another model than the files do."""
    read = {name: (ROOT / name).read_text() for name in ("Dockerfile", "docker-compose.yml")}
    images = (ROOT / "scripts/compose_test/images.py").read_text()
    wheels = (ROOT / "scripts/compose_test/wheels.py").read_text()
    for variable, where, pattern in (
        ("PYTHON_IMAGE", read["docker-compose.yml"], r"QUIRE_COMPOSE_PYTHON_IMAGE:-([^}]+)"),
        ("PYTHON_IMAGE", read["Dockerfile"], r"^ARG PYTHON_IMAGE=(\S+)"),
        ("REDIS_IMAGE", read["docker-compose.yml"], r"QUIRE_COMPOSE_REDIS_IMAGE:-([^}]+)"),
    ):
        (expected,) = re.findall(rf'^{variable} = "([^"]+)"', images, flags=re.MULTILINE)
        assert re.findall(pattern, where, flags=re.MULTILINE) == [expected]
    (model,) = re.findall(r'^DEMO_MODEL = "([^"]+)"', wheels, flags=re.MULTILINE)
    assert set(re.findall(r"^ARG DEMO_MODEL=(\S+)", read["Dockerfile"], flags=re.MULTILINE)) == {model}


@pytest.mark.compose
@pytest.mark.slow
def test_the_containers_run_and_answer() -> None:
    """Otherwise `docker compose up` gives a user something else than an answer."""
    done = compose_test(timeout=RUN_SECONDS)
    sys.stdout.write(done.stderr)
    if done.returncode == SKIPPED:
        pytest.skip(f"the containers were NOT run: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
