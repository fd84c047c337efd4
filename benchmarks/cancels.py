"""Cancels many requests at random moments over gRPC, then looks for what is left of them.

A gateway, memsvc, and an executor without a model run as processes; half of the requests are cancelled by their call,
half by `CancelRequests`. Afterwards no sequence may be open and no block held, and the gateway must answer.

    python benchmarks/cancels.py [COUNT]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from typing import Any

import grpc

from gateway.bench.null_stack import NullStack
from gateway.bench.serve.watch import PoolWatch
from protos.gateway.v1 import gateway_pb2 as pb
from protos.gateway.v1 import gateway_pb2_grpc
from quire.rpc import open_channel

_CLIENTS = 200
_SETTLE_SECONDS = 20.0
_LONGEST_WAIT = 0.05


async def cancel_one(stub: Any, number: int, chance: random.Random) -> str:
    """Starts a request and cancels it at a random moment; returns how it ended."""
    spec = pb.GenerationSpec(
        request_id=f"cancel-{number}",
        token_ids=pb.TokenIds(ids=[chance.randrange(256) for _ in range(chance.randrange(1, 200))]),
        stopping=pb.Stopping(max_tokens=20_000, ignore_eos=True),
    )
    call = stub.GenerateStream(pb.GenerateStreamRequest(spec=spec))

    async def read() -> str:
        try:
            async for event in call:
                if event.HasField("finished"):
                    return "finished"
        except asyncio.CancelledError:
            return "call cancelled"
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "ended"

    reading = asyncio.create_task(read())
    await asyncio.sleep(chance.random() * _LONGEST_WAIT)
    if number % 2:
        call.cancel()
    else:
        while True:
            answer = await stub.CancelRequests(pb.CancelRequestsRequest(request_ids=[spec.request_id]))
            if answer.cancelled_request_ids or reading.done():
                break
            # The request has not arrived yet.
            await asyncio.sleep(_LONGEST_WAIT)
    return await reading


async def main(count: int) -> int:
    """Runs the load and prints what is left; returns the exit code."""
    chance = random.Random(0)
    stack = NullStack(64, 0.001, block_count=2000, gateway_flags=("--max-queue-size", "100000"))
    await stack.start()
    watch = PoolWatch(stack.memsvc_address)
    ends: dict[str, int] = {}
    turns = asyncio.Semaphore(_CLIENTS)
    begun = time.perf_counter()
    try:
        async with open_channel(stack.address) as channel:
            stub = gateway_pb2_grpc.GenerationServiceStub(channel)

            async def turn(number: int) -> None:
                async with turns:
                    end = await cancel_one(stub, number, chance)
                    ends[end] = ends.get(end, 0) + 1

            await asyncio.gather(*(turn(number) for number in range(count)))
            seconds = time.perf_counter() - begun
            deadline = time.perf_counter() + _SETTLE_SECONDS
            left = await watch.look(0.0)
            while (left.sequence_count or left.used_block_count) and time.perf_counter() < deadline:
                await asyncio.sleep(0.1)
                left = await watch.look(0.0)
            spec = pb.GenerationSpec(token_ids=pb.TokenIds(ids=[1]), stopping=pb.Stopping(max_tokens=3))
            answer = await stub.Generate(pb.GenerateRequest(spec=spec), timeout=10)
    finally:
        await watch.close()
        await stack.close()
    figures = {
        "cancels": count,
        "seconds": round(seconds, 1),
        "ends": ends,
        "sequences_left": left.sequence_count,
        "blocks_left": left.used_block_count,
        "answers_afterwards": len(answer.completions[0].token_ids) == 3,
    }
    print(json.dumps(figures, indent=2))
    good = set(ends) <= {"call cancelled", "finished"} and not (left.sequence_count or left.used_block_count)
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=20_000, metavar="COUNT", help="requests")
    sys.exit(asyncio.run(main(parser.parse_args().count)))
