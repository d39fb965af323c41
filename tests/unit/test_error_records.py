"""Exceptions on their way to another process."""

from __future__ import annotations

import msgspec
import pytest

from quire.core.errors import (
    CheckpointError,
    DeviceLost,
    DeviceOutOfMemory,
    PluginError,
    QuireError,
    Reason,
    RequestError,
    UnsupportedError,
)
from quire.core.executor.error_records import ErrorRecord, record_error, restore_error

REASON = Reason(code="a.b", need="this", have="that", remedy="do")


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("no weights"),
        DeviceLost("gone"),
        DeviceOutOfMemory("too much", requested_bytes=1 << 30, tag="cache"),
        DeviceOutOfMemory("too much"),
        RequestError("wrong", param="top_k"),
        UnsupportedError([REASON], what="a model"),
    ],
)
def test_record_error_of_ours_comes_back_whole(error: QuireError) -> None:
    """Whoever catches it decides by its fields, wherever the worker runs."""
    wire = msgspec.msgpack.encode(record_error(error))
    back = restore_error(msgspec.msgpack.decode(wire, type=ErrorRecord))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back).keys() - {"__notes__"} == vars(error).keys()
    for name, value in vars(error).items():
        assert getattr(back, name) == value, name


def test_record_error_of_a_plugin_comes_back_with_its_traceback() -> None:
    """The traceback of the other process is what tells a plug-in's author where to look."""
    back = restore_error(record_error(PluginError("broken")))
    assert isinstance(back, PluginError)
    assert "broken" in back.details
