"""Images from anywhere, trusted nowhere."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image

from quire.core.engine.images import ImageAddress, MediaPolicy, read_image
from quire.core.engine.media_fetching import fetch, is_public
from quire.core.errors import RequestError

POLICY = MediaPolicy()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be huge, and is, once it is unpacked."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9) * 4
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


RED = Image.new("RGB", (6, 4), (255, 0, 0))


@pytest.mark.parametrize(
    "given",
    [
        RED,
        _png(RED),
        np.asarray(RED),
        np.asarray(RED) / 255.0,
        "data:image/png;base64," + base64.b64encode(_png(RED)).decode(),
    ],
    ids=["pillow", "bytes", "array", "floats", "data"],
)
def test_read_image_every_form_gives_the_same_pixels(given):
    """One picture is one picture, however it comes, so that its hash is one too."""
    image = read_image(given, POLICY)
    assert image.mode == "RGB"
    assert (np.asarray(image) == np.asarray(RED)).all()


def test_read_image_path_of_the_caller_is_read(tmp_path):
    """A program's own files need no permission; the same text from a client is no path."""
    path = tmp_path / "red.png"
    path.write_bytes(_png(RED))
    assert read_image(path, POLICY).size == read_image(str(path), POLICY).size == (6, 4)
    with pytest.raises(RequestError, match="begins with"):
        read_image(ImageAddress(path), POLICY)


def test_read_image_local_address_needs_the_operators_folder(tmp_path):
    """A client reads no file outside the folder, not by .. and not by a link."""
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    (inside / "red.png").write_bytes(_png(RED))
    outside.write_bytes(_png(RED))
    (inside / "link.png").symlink_to(outside)
    policy = MediaPolicy(local_folder=str(inside))
    address = ImageAddress(f"file://{inside}/red.png")
    assert read_image(address, policy).size == (6, 4)
    with pytest.raises(RequestError, match="may not be read"):
        read_image(address, POLICY)
    for name in ("../out.png", "link.png", "%2e%2e/out.png"):
        with pytest.raises(RequestError, match="outside"):
            read_image(ImageAddress(f"file://{inside}/{name}"), policy)


def test_read_image_bomb_is_refused_before_it_is_unpacked():
    """A few kilobytes cannot make the server take gigabytes."""
    bomb = _bomb(60_000, 60_000)
    assert len(bomb) < 10_000
    with pytest.raises(RequestError, match="too many pixels"):
        read_image(bomb, POLICY)


@pytest.mark.parametrize("broken", [b"", b"no image", _png(RED)[:40]])
def test_read_image_broken_file_is_a_request_error(broken):
    """Whatever a decoder raises, the client is told and nothing else is harmed."""
    with pytest.raises(RequestError, match="image"):
        read_image(broken, POLICY)


def test_read_image_transparency_turning_and_frames_are_settled():
    """Models see what people see: on white, upright, the first frame."""
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.asarray(read_image(_png(clear), POLICY)).min() == 255
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    RED.save(buffer, "JPEG", exif=exif)
    assert read_image(buffer.getvalue(), POLICY).size == (4, 6)
    buffer = io.BytesIO()
    RED.save(buffer, "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4), (0, 0, 255))])
    assert np.asarray(read_image(buffer.getvalue(), POLICY))[0, 0, 0] > 200


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.9", "172.16.5.5", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:0001::", "224.0.0.1",
    ],
)  # fmt: skip
def test_is_public_private_address_is_not(address):
    """Nothing of the network that the server stands in, in any spelling."""
    assert not is_public(address)
    assert is_public("93.184.216.34")


def _fetch(handler, address, hosts, **settings):
    return fetch(
        address,
        max_bytes=1000,
        timeout_s=60.0,
        resolve=lambda host, _port: hosts[host],
        transport=httpx.MockTransport(handler),
        **settings,
    )


def test_fetch_connects_to_the_address_that_was_checked():
    """A name that changes between check and use gains nothing."""
    seen = []

    def answer(request):
        seen.append((request.url.host, request.headers["host"]))
        return httpx.Response(200, content=b"pixels")

    assert _fetch(answer, "http://a.example/x", {"a.example": ["93.184.216.34"]}) == b"pixels"
    assert seen == [("93.184.216.34", "a.example")]


def test_fetch_redirect_to_a_private_name_is_refused():
    """Every station of the way is checked, not only the first."""

    def answer(request):
        assert request.url.host == "93.184.216.34"
        return httpx.Response(302, headers={"location": "http://inner.example/secret"})

    hosts = {"a.example": ["93.184.216.34"], "inner.example": ["93.184.216.34", "10.0.0.1"]}
    with pytest.raises(RequestError, match="private network"):
        _fetch(answer, "http://a.example/x", hosts)


def test_fetch_limits_hold():
    """Size, domains, schemes, endless redirects and bad answers each end in a request error."""
    hosts = {"a.example": ["93.184.216.34"], "b.a.example": ["93.184.216.34"]}
    big = lambda _: httpx.Response(200, content=bytes(1001))  # noqa: E731
    with pytest.raises(RequestError, match="over 1,000 bytes"):
        _fetch(big, "http://a.example/x", hosts)
    with pytest.raises(RequestError, match="may not be fetched"):
        _fetch(big, "http://a.example/x", hosts, allowed_domains=["b.example"])
    with pytest.raises(RequestError, match="over 1,000"):
        _fetch(big, "http://b.a.example/x", hosts, allowed_domains=["a.example"])
    with pytest.raises(RequestError, match="none of the web"):
        _fetch(big, "ftp://a.example/x", hosts)
    round_trip = lambda _: httpx.Response(302, headers={"location": "/again"})  # noqa: E731
    with pytest.raises(RequestError, match="leads on"):
        _fetch(round_trip, "http://a.example/x", hosts)
    with pytest.raises(RequestError, match="answers 404"):
        _fetch(lambda _: httpx.Response(404), "http://a.example/x", hosts)


def test_fetch_private_address_where_allowed_is_fetched():
    """An operator may open the own network."""
    answer = lambda _: httpx.Response(200, content=b"x")  # noqa: E731
    hosts = {"inner": ["10.0.0.1"]}
    assert _fetch(answer, "http://inner/x", hosts, allow_private=True) == b"x"
