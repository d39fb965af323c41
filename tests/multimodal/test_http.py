"""Images over HTTP: what clients of other servers send, and what a server must not do for them."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from asking import connected
from tiny_vision import make_image, make_vision_model

from quire.core.config import EngineConfig
from quire.core.engine.async_engine import AsyncEngine

CHAT = "/v1/chat/completions"


def data_url(seed: int) -> str:
    buffer = io.BytesIO()
    make_image(seed).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asking(*parts, **fields) -> dict:
    content = [*parts, {"type": "text", "text": "describe it"}]
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "temperature": 0, "max_tokens": 4, **fields}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tiny model that sees."""
    return make_vision_model("qwen2_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture
async def client(directory) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server around it."""
    config = EngineConfig.from_user(
        model=str(directory), device="cpu", dtype="float32", max_model_len=128, max_num_seqs=2,
        cache_memory_bytes=1 << 22, num_threads=1,
    )  # fmt: skip
    engine = await AsyncEngine.start(config)
    try:
        async with connected(engine) as client:
            yield client
    finally:
        await engine.shutdown()


@pytest.mark.slow
async def test_chat_with_images_answers_counts_and_refuses(client):
    """One server: images are answered and counted; what is wrong with one harms no other."""
    url = data_url(1)
    plain = await client.post(CHAT, json=asking())
    shown = await client.post(CHAT, json=asking({"type": "image_url", "image_url": {"url": url}}))
    assert shown.status_code == 200, shown.text
    num_plain = plain.json()["usage"]["prompt_tokens"]
    assert shown.json()["usage"]["prompt_tokens"] > num_plain + 8
    bad = {
        "private network": "http://127.0.0.1:1/x.png",
        "may not be read": "file:///etc/passwd",
        "begins with": "/etc/passwd",
        "none that can be read": "data:image/png;base64,AAAA",
    }
    for message, address in bad.items():
        part = {"type": "image_url", "image_url": {"url": address}}
        answer = await client.post(CHAT, json=asking(part))
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["error"]["message"]
    again = await client.post(CHAT, json=asking({"type": "input_image", "image_url": url}))
    assert again.json()["choices"][0]["message"] == shown.json()["choices"][0]["message"]
