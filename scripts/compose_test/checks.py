"""What the running stack must do and must not do."""

from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import signal
import sys
import time

import grpc

from protos.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc

from .console import CheckFailedError, run, say
from .stack import BUILT_SERVICES, SERVICES, Stack

_PROMPT = "The capital of France is"
_ANSWER = "Paris"
_STREAM_SECONDS = 90
_SETTLE_SECONDS = 10
_RESTART_SECONDS = 60
_PUBLISHED = {"gateway", "memsvc"}
# Deltas after which the block table is read: some blocks are full, and many tokens are still to come.
_LOOK_AFTER = 24
_HEAVY = ("torch", "triton", "gguf")


def expect(condition: bool, message: str) -> None:  # noqa: FBT001 - reads like an assertion
    """Raises CheckFailedError with the message unless the condition holds."""
    if not condition:
        raise CheckFailedError(message)


def check_images(stack: Stack) -> None:
    """The images of memsvc and the gateway have no torch, and none lets Python strip assertions."""
    probe = f"import importlib.util as u; print(*[n for n in {_HEAVY!r} if u.find_spec(n)])"
    for service in BUILT_SERVICES:
        image = stack.image(service)
        found = stack.engine.docker("run", "--rm", "--network=none", "--entrypoint=python", image, "-c", probe).split()
        expect(bool(found) == (service == "execsvc"), f"{image}: has {', '.join(found) or 'no torch'}")
        described = stack.engine.docker("image", "inspect", "--format", "{{.Config.Env}} {{.Config.User}}", image)
        expect("PYTHONOPTIMIZE" not in described, f"{image}: sets PYTHONOPTIMIZE")
        expect(described.split()[-1] == "10001:10001", f"{image}: runs as {described.split()[-1]}")
    say("check: no torch in memsvc and gateway, no root, assertions on")


def check_hardening(stack: Stack) -> None:
    """Containers have no capability and no writable root; ports are published on loopback alone, and only two."""
    containers = stack.containers()
    expect(sorted(containers) == sorted(SERVICES), f"running: {sorted(containers)}, expected {sorted(SERVICES)}")
    for service, described in containers.items():
        host = described["HostConfig"]
        expect(described["State"]["Health"]["Status"] == "healthy", f"{service}: not healthy")
        expect(host["ReadonlyRootfs"], f"{service}: its root is writable")
        expect(host["CapDrop"] == ["ALL"] and not host["CapAdd"], f"{service}: has capabilities")
        expect(any("no-new-privileges" in option for option in host["SecurityOpt"]), f"{service}: may gain privileges")
        expect(host["Memory"] > 0 and host["PidsLimit"] > 0, f"{service}: has no memory or process limit")
        expect(described["Config"]["User"].partition(":")[0] not in {"", "0", "root"}, f"{service}: runs as root")
        bindings = [binding for ports in (host["PortBindings"] or {}).values() for binding in ports]
        expect(bool(bindings) == (service in _PUBLISHED), f"{service}: publishes {bindings}")
        expect(all(binding["HostIp"] == "127.0.0.1" for binding in bindings), f"{service}: not only on loopback")
        expect(described["RestartCount"] == 0, f"{service}: restarted {described['RestartCount']} times")
    say("check: four healthy containers, hardened, two ports on loopback")


def check_store(stack: Stack) -> None:
    """The Redis container has what memsvc shares: the services that it knows are named there."""
    keys = stack.compose("exec", "-T", "redis", "redis-cli", "--scan", timeout=30).split()
    for kind in ("memsvc", "executor"):
        expect(any(f":service:{kind}:" in key for key in keys), f"redis: no {kind} is registered in {keys}")
    say(f"check: Redis has memsvc's {len(keys)} keys")


def check_command_line(stack: Stack) -> None:
    """`quire generate` on the host streams a sensible answer through the published port."""
    quire = str(Path(sys.executable).with_name("quire"))
    address = f"127.0.0.1:{stack.gateway_port}"
    options = ["--address", address, "--temperature", "0", "--max-tokens", "32"]
    answer = run([quire, "generate", _PROMPT, *options], timeout=_STREAM_SECONDS)
    expect(_ANSWER in answer, f"quire generate: no {_ANSWER!r} in {answer!r}")
    say(f"check: quire generate {_PROMPT!r} answered {answer.strip()!r}")


def check_stream_and_block_table(stack: Stack) -> None:
    """An answer streams in pieces, and its block table in memsvc matches its token count while it runs."""
    spec = gateway_pb2.GenerationSpec(
        request_id="compose-test",
        text="Once upon a time, in a small village by the sea,",
        sampling=gateway_pb2.Sampling(temperature=0),
        stopping=gateway_pb2.Stopping(max_tokens=128, ignore_eos=True),
    )
    with grpc.insecure_channel(f"127.0.0.1:{stack.gateway_port}") as channel:
        stub = gateway_pb2_grpc.GenerationServiceStub(channel)
        call = stub.GenerateStream(gateway_pb2.GenerateStreamRequest(spec=spec), timeout=_STREAM_SECONDS)
        kinds: list[str] = []
        table: admin_pb2.GetBlockTableResponse | None = None
        with ThreadPoolExecutor(max_workers=1) as pool:
            look = None
            for response in call:
                kinds.append(str(response.WhichOneof("event")))
                if look is None and kinds.count("delta") == _LOOK_AFTER:
                    look = pool.submit(_read_table, stack, spec.request_id)
            table = look.result(timeout=_SETTLE_SECONDS) if look else None
    expect(kinds[:1] == ["admitted"] and kinds[-1:] == ["finished"], f"stream: {kinds[:1]} .. {kinds[-1:]}")
    expect(table is not None, f"stream: only {kinds.count('delta')} deltas")
    assert table is not None
    _expect_table_adds_up(table)
    _show_table(table)
    _expect_pool_is_idle(stack)


def _read_table(stack: Stack, request_id: str) -> admin_pb2.GetBlockTableResponse:
    """Reads the block table of a request's first sample from memsvc."""
    with grpc.insecure_channel(f"127.0.0.1:{stack.memsvc_port}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        return stub.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id=request_id), timeout=_SETTLE_SECONDS)


def _expect_table_adds_up(table: admin_pb2.GetBlockTableResponse) -> None:
    """The blocks are different ones, as many as the tokens need, filled from the front."""
    sequence, size = table.sequence, table.block_size
    ids = [entry.block_id for entry in table.entries]
    expect(len(ids) == sequence.block_count == len(set(ids)), f"block table: {ids} for {sequence.block_count} blocks")
    expect(0 not in ids, "block table: names the null block")
    needed = -(-sequence.token_count // size)
    expect(
        needed <= len(ids) <= needed + 1, f"block table: {len(ids)} blocks of {size} for {sequence.token_count} tokens"
    )
    written = [entry.written_token_count for entry in table.entries]
    expect(
        sum(written) == sequence.written_token_count, f"block table: {written} are not {sequence.written_token_count}"
    )
    full = sequence.written_token_count // size
    expect(written[:full] == [size] * full, f"block table: not filled from the front: {written}")


def _show_table(table: admin_pb2.GetBlockTableResponse) -> None:
    """Prints the table on one line."""
    entries = " ".join(f"{entry.block_id}({entry.written_token_count})" for entry in table.entries)
    say(f"check: {table.sequence.sequence_id}: {table.sequence.token_count} tokens in blocks {entries}")


def _expect_pool_is_idle(stack: Stack) -> None:
    """After the stream every block is free, cached or leased, and the pool adds up."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    with grpc.insecure_channel(f"127.0.0.1:{stack.memsvc_port}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        while True:
            pools = stub.ListPools(admin_pb2.ListPoolsRequest(), timeout=_SETTLE_SECONDS).pools
            expect(len(pools) == 1, f"pools: {[pool.pool_id for pool in pools]}")
            pool = pools[0]
            if pool.used_block_count + pool.pending_free_block_count + pool.sequence_count == 0:
                break
            expect(time.monotonic() < deadline, f"pool: blocks still held after the stream:\n{pool}")
            time.sleep(0.1)
    placed = pool.cached_block_count + pool.leased_block_count + pool.free_block_count
    expect(placed == pool.spec.block_count - 1, f"pool: {placed} of {pool.spec.block_count - 1} blocks accounted for")
    say(f"check: pool {pool.pool_id} is idle and adds up to {placed} blocks")


def check_restart(stack: Stack) -> None:
    """A gateway that is killed comes back by itself and answers again. Needs an engine in this process namespace."""
    before = stack.containers()["gateway"]
    os.kill(before["State"]["Pid"], signal.SIGKILL)
    deadline = time.monotonic() + _RESTART_SECONDS
    while True:
        state = stack.containers().get("gateway", before)
        if state["RestartCount"] == 1 and state["State"]["Health"]["Status"] == "healthy":
            break
        expect(time.monotonic() < deadline, f"gateway: not back after being killed: {state['State']}")
        time.sleep(0.5)
    say("check: the gateway was killed and came back")
    check_command_line(stack)
