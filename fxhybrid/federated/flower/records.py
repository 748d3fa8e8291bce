"""Requests and replies as Flower's records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fxhybrid.errors import PlanMismatchError
from fxhybrid.federated.protocol.messages import Arrays, Kind, Outcome, Reply, Request, failed
from fxhybrid.federated.protocol.transport import is_out_of_memory

MESSAGE_TYPES = {Kind.REPORT: "query", Kind.TRAIN: "train"}
WORK = "fxhybrid"  # name of the record with a device's work, and of that with what it measured, beside Flower's own
_PAYLOAD, _ARRAYS = "payload", "arrays"
_OUTCOMES = {5: Outcome.LOST, 8: Outcome.KILLED}  # Flower's codes: the node left; its client process was killed


def json_record(payload: Mapping[str, Any]) -> ConfigRecord:
    """Makes a record of JSON values."""
    return ConfigRecord({"json": json.dumps(dict(payload))})


def from_json_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what ``json_record`` wrote."""
    payload: dict[str, Any] = json.loads(str(record["json"]))
    return payload


def _pack(payload: Mapping[str, Any], arrays: Arrays) -> RecordDict:
    held = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return RecordDict({_PAYLOAD: json_record(payload), _ARRAYS: held})


def _unpack(record: RecordDict) -> tuple[dict[str, Any], Arrays]:
    arrays = {name: array.numpy() for name, array in record.array_records[_ARRAYS].items()}
    return from_json_record(record.config_records[_PAYLOAD]), arrays


def encode_request(request: Request) -> RecordDict:
    """Encodes a request as Flower's records."""
    head = {"round": request.round, "now_s": request.now_s, "deadline_s": request.deadline_s}
    return _pack({**head, "payload": dict(request.payload)}, request.arrays)


def decode_request(message: Message, kind: Kind) -> Request:
    """Decodes the request in a message that a device got."""
    payload, arrays = _unpack(message.content)
    device = str(message.metadata.dst_node_id)
    return Request(device, kind, payload["round"], payload["now_s"], payload["deadline_s"], payload["payload"], arrays)


def encode_reply(reply: Reply) -> RecordDict:
    """Encodes a device's reply as Flower's records."""
    payload = {"outcome": reply.outcome.value, "detail": reply.detail, "payload": dict(reply.payload)}
    return _pack(payload, reply.arrays)


def decode_reply(message: Message, request: Request, elapsed_s: float) -> Reply:
    """Decodes the reply in a message that the server got; whatever is wrong with it becomes its outcome."""
    if message.has_error():
        return failed_by(message, request, elapsed_s)
    try:
        payload, arrays = _unpack(message.content)
        outcome, detail = Outcome(payload["outcome"]), str(payload["detail"])
        return Reply(request.device, request.round, outcome, elapsed_s, payload["payload"], arrays, detail)
    except Exception as error:  # noqa: BLE001 - a foreign client may send anything
        return failed(request, Outcome.INVALID, elapsed_s, f"not a reply: {error!r}")


def failed_by(message: Message, request: Request, elapsed_s: float) -> Reply:
    """Makes the reply that says what an error of Flower's means."""
    code, reason = message.error.code, str(message.error.reason or "")
    return failed(request, _outcome(code, reason), elapsed_s, f"Flower error {code}: {reason}")


def _outcome(code: int, reason: str) -> Outcome:
    if "MemoryError" in reason or is_out_of_memory(RuntimeError(reason)):
        return Outcome.OOM
    if PlanMismatchError.__name__ in reason:
        return Outcome.REFUSED
    return _OUTCOMES.get(code, Outcome.FAILED)
