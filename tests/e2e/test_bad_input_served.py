"""Bad checkpoints, images and sounds at a real server's door, while a good request streams."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import struct
import subprocess
import sys
import wave
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import connected
from tiny_models import make_tiny_model
from tiny_vision import make_vision_model
from tiny_whisper import make_tiny_whisper

from quire.core.config import EngineConfig
from quire.core.engine.async_engine import AsyncEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server around a real engine."""
    config = EngineConfig.from_user(
        model=str(directory), device="cpu", dtype="float32", max_num_seqs=4, num_threads=1,
        cache_memory_bytes=1 << 23,
    )  # fmt: skip
    engine = await AsyncEngine.start(config)
    try:
        async with connected(engine) as client:
            yield client
    finally:
        await engine.shutdown()


async def story(client: httpx.AsyncClient, goes_on: asyncio.Event | None = None) -> str:
    """The text of a streamed answer of 200 tokens; sets `goes_on` with the first event."""
    asked = {
        "messages": [{"role": "user", "content": "the red cat sees"}], "temperature": 0,
        "max_tokens": 200, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    text = ""
    async with client.stream("POST", CHAT, json=asked) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                if goes_on is not None:
                    goes_on.set()
    return text


def bomb() -> bytes:
    """A PNG of some kilobytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))
    return b"\x89PNG\r\n\x1a\n" + head + rows + chunk(b"IEND", b"")


def silence() -> bytes:
    """A WAV of no samples."""
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
    return target.getvalue()


async def test_image_bomb_ends_alone_while_another_streams(tmp_path):
    """Too many pixels are refused by their header; the stream beside gets every token."""
    url = "data:image/png;base64," + base64.b64encode(bomb()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    content = [image, {"type": "text", "text": "describe it"}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
    async with served(make_vision_model("llava", tmp_path)) as client:
        alone, goes_on = await story(client), asyncio.Event()
        beside = asyncio.create_task(story(client, goes_on))
        await goes_on.wait()
        answers = [await client.post(CHAT, json=asked) for _ in range(3)]
        assert await beside == alone
    for answer in answers:
        assert answer.status_code == 400, answer.text
        message = answer.json()["error"]["message"]
        assert "60000" in message
        assert "too many pixels" in message


async def test_sound_of_no_length_ends_alone_while_another_is_heard(tmp_path):
    """No samples are refused by name; what is heard beside stays as it was."""
    make_tiny_whisper(tmp_path)
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(range(256)) * 100)
    good = target.getvalue()

    async def hear(client: httpx.AsyncClient, data: bytes) -> httpx.Response:
        return await client.post(
            "/v1/audio/transcriptions",
            data={"language": "en", "temperature": "0"},
            files={"file": ("a.wav", data)},
        )

    async with served(tmp_path) as client:
        alone = await hear(client, good)
        assert alone.status_code == 200, alone.text
        beside, *bad = await asyncio.gather(
            hear(client, good), *(hear(client, data) for data in (silence(), b" ", good[:20]))
        )
        assert beside.json() == alone.json()
    for answer in bad:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "file"
    assert "no sound in it" in bad[0].json()["error"]["message"]


def _without_architecture(directory: Path) -> None:
    (directory / "config.json").write_text('{"hidden_size": 64}')


def _with_code(directory: Path) -> None:
    settings = {"model_type": "acme", "auto_map": {"AutoConfig": "acme.Config"}}
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "acme.py").write_text("raise SystemExit('this code ran')")


def _with_larger_vocabulary(directory: Path) -> None:
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"vocab_size": 600}))


def _without_a_tensor(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[Callable[[Path], None], tuple[str, ...]] = {
    _without_architecture: ("config.json", "neither architectures nor a model_type", "give the"),
    _with_code: ("acme", "--trust-remote-code", "Read that code"),
    _with_larger_vocabulary: ("embed_tokens.weight", "600", "512"),
    _without_a_tensor: ("layers.1.mlp.up_proj.weight", "nearest", "layers.1.mlp.up.weight"),
}


async def test_broken_checkpoints_fail_in_words_beside_a_running_server(tmp_path):
    """`quire serve` ends with one message and no traceback; the server beside streams on."""
    model = make_tiny_model("llama", tmp_path / "good")
    async with served(model) as client:
        alone = await story(client)
        for damage, said in BROKEN.items():
            copy = Path(shutil.copytree(model, tmp_path / damage.__name__))
            damage(copy)
            goes_on = asyncio.Event()
            beside = asyncio.create_task(story(client, goes_on))
            await goes_on.wait()
            code, message = await asyncio.to_thread(_serve, copy)
            assert await beside == alone
            assert code not in (0, None), message
            assert "Traceback" not in message, message
            joined = " ".join(message.split())
            assert not [part for part in said if part not in joined], message
            assert "this code ran" not in message


def _serve(directory: Path) -> tuple[int, str]:
    """How `quire serve` ends with a checkpoint that it cannot serve, and what it says."""
    options: list[Any] = ["--port", "0", "--cache-memory-bytes", "8M", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-m", "quire", "serve", str(directory), *options],
        check=False, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr
