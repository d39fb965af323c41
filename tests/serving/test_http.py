"""What holds for every request: errors, keys, ids, sizes, the gate, what leaves nothing behind."""

from __future__ import annotations

import asyncio
import json

import pytest
from asking import LeavingClient, connected, error_of, events_of
from fake_engine import FakeEngine

from quire.core.errors import EngineDeadError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BODY = {"prompt": "a"}
MESSAGES = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"a"',
        b"\xff",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 3000,
        b'{"prompt": [' + b"9" * 5000 + b"]}",
        json.dumps({"prompt": "a", "x" * 100_000: 1}).encode(),
    ],
    ids=lambda content: repr(content[:24]),
)
async def test_broken_body_is_the_clients_error(client, content):
    """Nothing that a client sends is the server's fault."""
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        response = await client.post(path, content=content)
        error_of(response, 400)
        assert len(response.content) < 10_000


async def test_content_type_does_not_matter(client):
    """curl sends a form's content type by default; the JSON counts."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = await client.post(COMPLETIONS, content=json.dumps(BODY), headers=headers)
    assert response.status_code == 200


async def test_unknown_path_and_method_have_error_bodies(client):
    """Also the framework's own errors read as the API's."""
    assert error_of(await client.get("/v1/nothing"), 404)["type"] == "not_found_error"
    response = await client.get(COMPLETIONS)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


async def test_unknown_model_is_not_found(client):
    """Every endpoint that takes a model knows its own."""
    for path, body in (
        (COMPLETIONS, BODY),
        (CHAT, MESSAGES),
        ("/tokenize", BODY),
        ("/tokenize", MESSAGES),
        ("/detokenize", {"tokens": [1]}),
    ):
        error = error_of(await client.post(path, json={**body, "model": "other"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    error_of(await client.get("/v1/models/other"), 404)


async def test_models_lists_the_served_name(client):
    """Clients find the model's name and how much it takes."""
    [card] = (await client.get("/v1/models")).json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 512)
    assert (await client.get("/v1/models/fake")).json() == card


async def test_full_queue_is_429_with_retry_after():
    """A full queue asks clients to come back."""
    async with connected(FakeEngine(queue_limit=0), retry_after_s=7) as client:
        for stream in (False, True):
            response = await client.post(COMPLETIONS, json={**BODY, "stream": stream})
            assert error_of(response, 429)["code"] == "queue_full"
            assert response.headers["retry-after"] == "7"


async def test_dead_engine_is_503_and_unhealthy():
    """A dead engine is told with its cause, and whoever watches the server sees it."""
    engine = FakeEngine()
    async with connected(engine) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.head("/ready")).status_code == 200
        engine.dead_error = EngineDeadError("gone", root_cause="bad memory")
        engine.is_ready = False
        assert "bad memory" in error_of(await client.post(COMPLETIONS, json=BODY), 503)["message"]
        assert "bad memory" in error_of(await client.get("/health"), 503)["message"]
        error_of(await client.get("/ready"), 503)
        assert "quire:engine_up{" in (await client.get("/metrics")).text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("field", "status"), [("fail_at", 500), ("die_at", 503)])
async def test_failure_in_the_middle_is_told(path, field, status):
    """Whole: an error's status. Streamed: an event with the error, then the end, never a broken stream."""
    body = BODY if path == COMPLETIONS else MESSAGES
    async with connected(FakeEngine(**{field: 3})) as client:
        error_of(await client.post(path, json=body), status)
    engine = FakeEngine(**{field: 3})
    async with connected(engine) as client:
        events = events_of(await client.post(path, json={**body, "stream": True}))
    assert "choices" in events[0]
    assert events[-1]["error"]["type"] == "server_error"
    assert engine.num_unfinished == 0 or field == "die_at"


async def test_unforeseen_error_is_told_without_its_details():
    """A bug of ours is a 500 with the API's body, and says nothing about the machine."""

    class BrokenEngine(FakeEngine):
        async def submit(self, *args, **kwargs):
            raise ZeroDivisionError("/secret/path")

    async with connected(BrokenEngine()) as client:
        error = error_of(await client.post(COMPLETIONS, json=BODY), 500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]


async def test_api_key_is_asked_for_where_it_protects():
    """With a key set, only those who know it may use the model; probes stay open."""
    async with connected(FakeEngine(), api_keys=("s3cret", "other")) as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret"},
            {"authorization": "Basic s3cret"},
            {"authorization": "Bearer s3cret2"},
            {"authorization": "Bearer s3cre"},
            {"authorization": "Bearer "},
            {"authorization": "Bearer \u00e9".encode("latin-1").decode("latin-1")},
        ):
            raw = {k: v.encode("latin-1") for k, v in headers.items()}
            response = await client.post(COMPLETIONS, json=BODY, headers=raw)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["x-request-id"]
        for key in ("s3cret", "other"):
            headers = {"authorization": f"Bearer {key}"}
            assert (await client.post(COMPLETIONS, json=BODY, headers=headers)).status_code == 200
        error_of(await client.get("/v1/models"), 401)
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert (await client.get(path)).status_code == 200


async def test_request_id_is_echoed_and_in_the_body(client, engine):
    """A client's id comes back; the engine's is unique even if two clients choose the same."""
    headers = {"x-request-id": "my-id-1"}
    for _ in range(2):
        response = await client.post(COMPLETIONS, json=BODY, headers=headers)
        assert response.headers["x-request-id"] == "my-id-1"
        assert response.json()["id"] == "cmpl-my-id-1"
    first, second = (submitted.request_id for submitted in engine.submitted)
    assert first != second
    own = await client.post(COMPLETIONS, json={**BODY, "request_id": "from-body"})
    assert own.json()["id"] == "cmpl-from-body"


@pytest.mark.parametrize("bad", [b"a b", b"x" * 129, b"\xe9"])
async def test_request_id_that_is_unsound_is_replaced(client, bad):
    """What could break a log or a header is not taken over."""
    response = await client.post(COMPLETIONS, json=BODY, headers={"x-request-id": bad})
    assert response.status_code == 200
    assert len(response.headers["x-request-id"]) == 32


async def test_body_above_the_limit_is_413():
    """Announced or not, a body above the limit is refused before it is held in memory."""

    async def chunks():
        for _ in range(100):
            yield b" " * 50

    async with connected(FakeEngine(), max_body_bytes=1000) as client:
        error_of(await client.post(COMPLETIONS, content=b" " * 1001), 413)
        error_of(await client.post(COMPLETIONS, content=chunks()), 413)
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 200


async def test_cors_is_answered_for_allowed_origins_alone():
    """A browser's question is answered without a key, for the origins that were allowed."""
    settings = {"allowed_origins": ("http://good",), "api_keys": ("k",)}
    async with connected(FakeEngine(), **settings) as client:
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "x"}
        good = await client.options(CHAT, headers={"origin": "http://good", **ask})
        assert good.headers["access-control-allow-origin"] == "http://good"
        bad = await client.options(CHAT, headers={"origin": "http://bad", **ask})
        assert "access-control-allow-origin" not in bad.headers


async def test_closed_gate_refuses_new_requests_and_readiness(client):
    """A server that shuts down says so to whoever comes, and is alive all the same."""
    client.app.state.server.gate.close()
    response = await client.post(COMPLETIONS, json=BODY)
    assert error_of(response, 503)["code"] == "shutting_down"
    assert response.headers["retry-after"]
    error_of(await client.get("/ready"), 503)
    assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_aborts_every_request(path, stream):
    """When a client leaves, all that it asked for ends in the engine."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine) as http:
        body = {"prompt": ["a", "b", "c"]} if path == COMPLETIONS else MESSAGES
        client = LeavingClient(http.app, path, {**body, "n": 2, "stream": stream})
        running = asyncio.create_task(client.run())
        while engine.num_unfinished < (3 if path == COMPLETIONS else 1):  # noqa: ASYNC110
            await asyncio.sleep(0)
        if stream:
            await client.has_events.wait()
        client.leaves.set()
        await asyncio.wait_for(running, 5)
        assert http.app.state.server.gate.num_inside == 0
    assert engine.num_unfinished == 0
    assert len(engine.aborted) == len(engine.submitted)


async def test_disconnect_before_the_first_event_aborts():
    """A client that has left before its stream begins leaves nothing behind."""
    engine = FakeEngine(hold=asyncio.Event(), hold_after=0)
    async with connected(engine) as http:
        client = LeavingClient(http.app, COMPLETIONS, {"prompt": "a", "stream": True})
        client.leaves.set()
        await asyncio.wait_for(client.run(), 5)
    assert engine.num_unfinished == 0
    assert len(engine.aborted) == 1


async def test_cancelled_request_aborts():
    """A server that is stopped hard still ends what runs in the engine."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine) as http:
        client = LeavingClient(http.app, COMPLETIONS, {"prompt": ["a", "b"], "stream": True})
        running = asyncio.create_task(client.run())
        await client.has_events.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert engine.num_unfinished == 0


async def test_aborted_request_ends_with_its_reason():
    """What the server itself ends comes back with finish_reason abort, not as an error."""
    engine = FakeEngine(hold=asyncio.Event(), hold_after=2)
    async with connected(engine) as client:
        for stream in (False, True):
            asking = asyncio.create_task(client.post(COMPLETIONS, json={**BODY, "stream": stream}))
            while not engine.num_unfinished:  # noqa: ASYNC110
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            await engine.shutdown()
            response = await asyncio.wait_for(asking, 5)
            last = events_of(response)[-1] if stream else response.json()
            assert last["choices"][0]["finish_reason"] == "abort"


async def test_schema_names_every_body(client):
    """The API documents itself: each endpoint says what it takes and gives, and no reference dangles."""
    schema = (await client.get("/openapi.json")).json()
    for path in (COMPLETIONS, CHAT, "/v1/embeddings", "/detokenize"):
        post = schema["paths"][path]["post"]
        for content in (post["requestBody"], post["responses"]["200"]):
            ref = content["content"]["application/json"]["schema"]["$ref"]
            assert ref.rsplit("/", 1)[1] in schema["components"]["schemas"]
    assert '"#/$defs' not in json.dumps(schema)
