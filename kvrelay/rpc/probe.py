"""Asks a server for its health: `python3 -m kvrelay.rpc.probe HOST:PORT` exits with 0 if the answer is SERVING."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.rpc.channel import open_sync_channel

__all__ = ["main"]

_SECONDS = 3.0


def main() -> int:
    """For health checks of containers, whose image has no other gRPC client."""
    if len(sys.argv) != 2:
        print("usage: python3 -m kvrelay.rpc.probe HOST:PORT", file=sys.stderr)
        return 2
    with open_sync_channel(sys.argv[1]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        except grpc.RpcError as error:
            print(error.code().name, file=sys.stderr)
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
