"""Options that nobody reads are refused before anything is loaded."""

from __future__ import annotations

import pytest

from quire.core.option_names import unread_options

KNOWN = ("acme.fast", "acme.isa")


def refused(options, of_device=KNOWN):
    """(option, remedy) of each that is."""
    found = unread_options(
        options, device="acme", of_device=of_device, backends=["acme", "cpu", "zed"]
    )
    return [(reason.code.removeprefix("options."), reason.remedy) for reason in found]


def test_options_that_are_read_pass():
    """Of the device, of the engine, and of another backend that the same settings may serve."""
    assert refused({"acme.fast": "1", "quantization.group_size": "32", "zed.speed": "9"}) == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("acme.fsat", "did you mean acme.fast?"),
        ("group_size", "did you mean quantization.group_size?"),
        ("acmee.isa", "did you mean acme.isa?"),
        ("x", "leave it out"),
    ],
)
def test_option_that_nobody_reads_is_refused_with_the_nearest(name, remedy):
    """A setting with a typing error must not be passed over in silence."""
    assert refused({name: "1", "acme.fast": "1"}) == [(name, remedy)]


def test_all_unread_options_are_named_at_once():
    """Nobody should learn of his errors one start after the other."""
    assert [name for name, _ in refused({"x": "1", "acme.y": "2"})] == ["x", "acme.y"]


def test_device_that_does_not_say_keeps_its_own_options():
    """One that was written before it could say is served as it was."""
    assert refused({"acme.anything": "1", "other.thing": "2"}, of_device=None) == [
        ("other.thing", "leave it out")
    ]
