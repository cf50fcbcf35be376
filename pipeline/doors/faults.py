"""What a refusal is in each transport, there and back."""

from collections.abc import Mapping
from enum import IntEnum
from http import HTTPStatus

from pipeline.doors.messages import DoorFault


class GrpcStatus(IntEnum):
    """The statuses of gRPC that are used here, by their numbers."""

    OK = 0
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


GRPC_STATUSES: Mapping[DoorFault, GrpcStatus] = {
    DoorFault.INVALID: GrpcStatus.INVALID_ARGUMENT,
    DoorFault.UNAUTHENTIC: GrpcStatus.PERMISSION_DENIED,
    DoorFault.WRONG_KEY: GrpcStatus.FAILED_PRECONDITION,
    DoorFault.CONFLICT: GrpcStatus.ABORTED,
    DoorFault.UNKNOWN_SESSION: GrpcStatus.NOT_FOUND,
    DoorFault.TOO_LARGE: GrpcStatus.RESOURCE_EXHAUSTED,
    DoorFault.BUSY: GrpcStatus.RESOURCE_EXHAUSTED,
    DoorFault.TOO_SLOW: GrpcStatus.DEADLINE_EXCEEDED,
    DoorFault.UNAVAILABLE: GrpcStatus.UNAVAILABLE,
}
HTTP_STATUSES: Mapping[DoorFault, HTTPStatus] = {
    DoorFault.INVALID: HTTPStatus.BAD_REQUEST,
    DoorFault.UNAUTHENTIC: HTTPStatus.FORBIDDEN,
    DoorFault.WRONG_KEY: HTTPStatus.CONFLICT,
    DoorFault.CONFLICT: HTTPStatus.CONFLICT,
    DoorFault.UNKNOWN_SESSION: HTTPStatus.NOT_FOUND,
    DoorFault.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    DoorFault.BUSY: HTTPStatus.TOO_MANY_REQUESTS,
    DoorFault.TOO_SLOW: HTTPStatus.REQUEST_TIMEOUT,
    DoorFault.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
}


def fault_named(name: object) -> DoorFault | None:
    """The fault of that value; None if a door far away says something else."""
    return next((fault for fault in DoorFault if fault.value == name), None)
