"""`python -m quire.healthcheck HOST:PORT [TIMEOUT_SECONDS]`: exit status 0 if and only if the service is SERVING.

For container health checks: starts fast, prints one line.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def status_code(error: grpc.RpcError) -> grpc.StatusCode:
    """Returns the status code of a failed call; what grpc raises is always the call itself."""
    assert isinstance(error, grpc.Call)
    code: grpc.StatusCode = error.code()
    return code


def check(address: str, timeout: float = 2.0) -> str:
    """Returns the health of the service at `address`: "SERVING", "NOT_SERVING", or the status code of the failure."""
    # As in quire.rpc, which takes longer to import than this whole command: no proxy of the environment is asked.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            return status_code(error).name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def main() -> None:
    """Runs the command."""
    if len(sys.argv) not in {2, 3}:
        sys.exit(__doc__)
    state = check(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 2.0)  # noqa: PLR2004
    sys.stdout.write(state + "\n")
    sys.exit(0 if state == "SERVING" else 1)


if __name__ == "__main__":
    main()
