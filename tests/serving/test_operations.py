"""Keys, scopes, limits, deadlines, logs: what an operator relies on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging

import pytest
from asking import LeavingClient, connected, error_of, events_of
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from quire.core.errors import ConfigError
from quire.core.serving.cli.application import application
from quire.core.serving.operations.access import scope_needed
from quire.core.serving.operations.api_keys import ApiKey, KeyRing, read_keys, sha256_of
from quire.core.serving.operations.key_limits import Budget, KeyLimits
from quire.core.serving.operations.request_log import JsonFormatter, RequestIdFilter

BODY = {"prompt": "abcd", "max_tokens": 5}
COMPLETIONS = "/v1/completions"


def key(secret: str = "s", **fields) -> ApiKey:
    return ApiKey(**{"name": "team", "sha256": sha256_of(secret), **fields})


def bearing(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


# ------------------------------------------------------------------------------------------ keys


async def test_scope_decides_what_a_key_opens():
    """A key opens what its scopes say, and is told which one it lacks."""
    keys = (key("i", name="i", scopes=("inference",)), key("m", name="m", scopes=("metrics",)))
    async with connected(FakeEngine(), keys=keys, protect_metrics=True) as client:
        assert (await client.post(COMPLETIONS, json=BODY, headers=bearing("i"))).status_code == 200
        refused = await client.post(COMPLETIONS, json=BODY, headers=bearing("m"))
        assert error_of(refused, 403)["code"] == "insufficient_scope"
        assert (await client.get("/metrics", headers=bearing("m"))).status_code == 200
        error_of(await client.get("/metrics", headers=bearing("i")), 403)
        error_of(await client.get("/metrics"), 401)
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200


def test_admin_paths_need_the_admin_scope():
    """What changes the server for all is not a matter of inference, also below a path that is known."""
    assert scope_needed("/reset_prefix_cache") == ("admin",)
    assert scope_needed("/admin/anything") == ("admin",)
    assert scope_needed("/administration") == ("inference",)
    assert key(scopes=("admin",)).allows("inference")
    assert not key(scopes=("inference",)).allows("admin")


async def test_key_may_come_as_anthropics_clients_send_it():
    """Clients of Anthropic's API send x-api-key."""
    async with connected(FakeEngine(), keys=(key(),)) as client:
        response = await client.post(COMPLETIONS, json=BODY, headers={"x-api-key": "s"})
    assert response.status_code == 200


def test_keys_file_holds_hashes_or_plain_keys(tmp_path):
    """A key is known by its hash; what the file says is what the key may do."""
    path = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"one").hexdigest()
    path.write_text(
        f'[[key]]\nname = "a"\nsha256 = "{digest}"\nscopes = ["admin"]\n'
        '[[key]]\nname = "b"\nkey = "two"\nrequests_per_minute = 3\nmax_concurrency = 2\n'
    )
    ring = KeyRing(read_keys(path))
    assert ring.find("one").scopes == ("admin",)
    assert (ring.find("two").requests_per_minute, ring.find("two").max_concurrency) == (3, 2)
    assert ring.find("three") is None
    assert ring.find("") is None
    assert "two" not in repr(read_keys(path))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "must hold tables"),
        ("x = 1", "must hold tables"),
        ("[[key]]\nname = 'a'", "either `key` or `sha256`"),
        ("[[key]]\nkey = 'a'", "without a name"),
        ("[[key]]\nname = 'a'\nkey = ''", "either `key` or `sha256`"),
        ("[[key]]\nname = 'a'\nkey = 'x'\nscope = ['admin']", "unknown setting scope"),
        ("[[key]]\nname = 'a'\nkey = 'x'\nscopes = ['root']", "unknown scope 'root'"),
        ("[[key]]\nname = 'a'\nsha256 = 'zz'", "64 hexadecimal"),
        ("[[key]]\nname = 'a'\nkey = 'x'\nmax_concurrency = 0", "above 0"),
        ("[[key", "cannot be read"),
    ],
)
def test_keys_file_that_is_wrong_is_refused_by_name(tmp_path, text, word):
    """A mistake in the file of keys stops the start; it never opens the server."""
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word) as caught:
        read_keys(path)
    assert str(path) in str(caught.value)


def test_made_key_opens_what_its_lines_say(tmp_path):
    """`quire key` prints lines that a file of keys takes, and the secret that they are the hash of."""
    result = CliRunner().invoke(application, ["key", "me", "--scope", "metrics"])
    path = tmp_path / "keys.toml"
    path.write_text(result.stdout)
    [made] = read_keys(path)
    secret = result.stderr.split()[-1]
    assert secret not in result.stdout
    assert KeyRing([made]).find(secret).scopes == ("metrics",)


# ---------------------------------------------------------------------------------------- limits


async def test_requests_beyond_the_rate_are_told_when_to_come_back():
    """A key has so many requests a minute; the next hears 429 and how long to wait; others go on."""
    keys = (key("a", name="a", requests_per_minute=2), key("b", name="b"))
    async with connected(FakeEngine(), keys=keys) as client:
        for _ in range(2):
            assert (
                await client.post(COMPLETIONS, json=BODY, headers=bearing("a"))
            ).status_code == 200
        refused = await client.post(COMPLETIONS, json=BODY, headers=bearing("a"))
        assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert (await client.get("/v1/models", headers=bearing("a"))).status_code == 200
        assert (await client.post(COMPLETIONS, json=BODY, headers=bearing("b"))).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_paid_at_the_end(stream):
    """Prompt and output count, streamed or whole; who is in debt waits."""
    async with connected(FakeEngine(), keys=(key(tokens_per_minute=8),)) as client:
        body = {**BODY, "stream": stream}
        assert (await client.post(COMPLETIONS, json=body, headers=bearing("s"))).status_code == 200
        refused = await client.post(COMPLETIONS, json=body, headers=bearing("s"))
    assert "tokens a minute" in error_of(refused, 429)["message"]
    assert int(refused.headers["retry-after"]) >= 1


async def test_concurrency_counts_until_the_last_byte():
    """A key with one request in flight gets no second one before the first is over."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine, keys=(key(max_concurrency=1),)) as client:
        first = asyncio.create_task(client.post(COMPLETIONS, json=BODY, headers=bearing("s")))
        while not engine.submitted:  # noqa: ASYNC110 - the engine is a fake without events
            await asyncio.sleep(0)
        refused = await client.post(COMPLETIONS, json=BODY, headers=bearing("s"))
        assert "at once" in error_of(refused, 429)["message"]
        engine.hold.set()
        assert (await first).status_code == 200
        assert (await client.post(COMPLETIONS, json=BODY, headers=bearing("s"))).status_code == 200


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 30)), max_size=40), st.integers(1, 100))
def test_budget_never_gives_more_than_its_rate(spending, per_minute):
    """What is spent when the budget says yes exceeds capacity and refill by at most one debt."""
    now_s, spent, largest = 0.0, 0, 0
    budget = Budget(per_minute, now_s)
    for pause_s, cost in spending:
        now_s += pause_s
        if budget.wait_s(1.0, now_s) == 0:
            budget.spend(cost, now_s)
            spent += cost
            largest = max(largest, cost)
    assert spent <= max(per_minute, 1) + now_s * per_minute / 60 + largest + 1e-6


@given(st.floats(1, 1000), st.floats(0, 500))
def test_budget_is_there_after_the_wait_that_it_names(per_minute, cost):
    """Retry-After is honest: who waits so long is let in."""
    budget = Budget(per_minute, 0.0)
    budget.spend(cost, 0.0)
    wait_s = budget.wait_s(1.0, 0.0)
    assert budget.wait_s(1.0, wait_s + 1e-6) <= 1e-6


def test_limits_of_two_keys_are_apart():
    """One key's use is not another's."""
    limits = KeyLimits(clock=lambda: 0.0)
    with limits.admitted(key(name="a", requests_per_minute=1)):
        pass
    with limits.admitted(key(name="b", requests_per_minute=1)):
        pass


# ------------------------------------------------------------------------------------- deadlines


async def test_deadline_ends_a_whole_answer_with_504():
    """A request that takes too long is told so, and nothing of it is left in the engine."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine, request_timeout_s=0.05) as client:
        response = await client.post(COMPLETIONS, json=BODY)
    assert error_of(response, 504)["code"] == "deadline_exceeded"
    assert engine.num_unfinished == 0


async def test_deadline_ends_a_stream_with_an_event():
    """In mid-stream the deadline comes as an event and the stream ends as streams do."""
    engine = FakeEngine(hold=asyncio.Event(), hold_after=2)
    async with connected(engine) as client:
        headers = {"x-request-timeout": "0.05"}
        response = await client.post(COMPLETIONS, json={**BODY, "stream": True}, headers=headers)
    events = events_of(response)
    assert events[0]["choices"]
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    assert engine.num_unfinished == 0


@pytest.mark.parametrize("asked", ["soon", "-1", "0", "nan", "inf"])
async def test_deadline_that_is_no_time_is_refused(client, asked):
    """A header that says nothing is not ignored."""
    response = await client.post(COMPLETIONS, json=BODY, headers={"x-request-timeout": asked})
    assert error_of(response, 400)["param"] == "x-request-timeout"


# ------------------------------------------------------------------------- root path and origins


async def test_root_path_works_with_and_without_its_prefix():
    """A proxy may take the prefix away or leave it on; keys protect both."""
    async with connected(FakeEngine(), root_path="/quire", keys=(key(),)) as client:
        for prefix in ("", "/quire"):
            assert (await client.get(f"{prefix}/health")).status_code == 200
            error_of(await client.get(f"{prefix}/v1/models"), 401)
            response = await client.get(f"{prefix}/v1/models", headers=bearing("s"))
            assert response.status_code == 200


# ------------------------------------------------------------------------------------------ logs


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="quire.access")
    handler = caplog.handler
    handler.addFilter(wanted := RequestIdFilter())
    yield lambda: [
        json.loads(JsonFormatter().format(r)) for r in caplog.records if r.name == "quire.access"
    ]
    handler.removeFilter(wanted)


async def test_log_tells_who_and_how_much_and_no_prompt(lines):
    """One JSON line a request, with its id, key, status and tokens; nobody's words."""
    async with connected(FakeEngine(), keys=(key(),), log_requests=True) as client:
        headers = {**bearing("s"), "x-request-id": "my-id"}
        await client.post(COMPLETIONS, json={**BODY, "prompt": "secret words"}, headers=headers)
        await client.get("/health")
    [line] = lines()
    assert (line["request_id"], line["key"], line["status"]) == ("my-id", "team", 200)
    assert (line["prompt_tokens"], line["output_tokens"], line["finish_reasons"]) == (
        13,
        5,
        {"length": 1},
    )
    assert line["time_to_first_token_s"] >= 0
    assert "secret" not in json.dumps(line)


async def test_log_tells_prompts_only_where_asked(lines):
    """With --log-prompts the body is there too."""
    async with connected(FakeEngine(), log_prompts=True) as client:
        await client.post(COMPLETIONS, json={**BODY, "prompt": "these words"})
    [line] = lines()
    assert "these words" in line["body"]


async def test_errors_in_the_log_carry_the_requests_id(caplog):
    """Whoever looks for a request finds what it caused, also where requests are not logged."""
    caplog.handler.addFilter(wanted := RequestIdFilter())
    async with connected(FakeEngine(fail_at=2)) as client:
        await client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "lost"})
    caplog.handler.removeFilter(wanted)
    [line] = [r for r in caplog.records if "a request failed" in r.getMessage()]
    assert json.loads(JsonFormatter().format(line))["request_id"] == "lost"


async def test_log_tells_clients_that_left(lines):
    """A client that goes away leaves a line with what it had by then."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine, log_requests=True) as http:
        client = LeavingClient(http.app, COMPLETIONS, {**BODY, "stream": True})
        running = asyncio.create_task(client.run())
        await client.has_events.wait()
        client.leaves.set()
        await asyncio.wait_for(running, 5)
    [line] = lines()
    assert line["finish_reasons"] == {"abort": 1}


# ----------------------------------------------------------------------------------------- config


def shown(*arguments: str) -> dict[str, tuple[str, str]]:
    """Setting to value and source."""
    result = CliRunner().invoke(application, ["serve", *arguments, "--show-config"])
    assert result.exit_code == 0, result.output
    rows = [line.strip("│ \n").split("│") for line in result.stdout.splitlines() if "│" in line]
    return {row[0].strip(): (row[1].strip(), row[2].strip()) for row in rows}


@pytest.mark.parametrize("kind", ["yaml", "toml"])
def test_settings_come_from_flags_then_environment_then_file(tmp_path, monkeypatch, kind):
    """One precedence, and `--show-config` says where each value came from."""
    path = tmp_path / f"q.{kind}"
    texts = {
        "yaml": "model: demo\nport: 1\nmax-num-seqs: 2\nseed: 3\nenable_prefix_caching: false\napi_key: [hidden-one]\n",
        "toml": 'model = "demo"\nport = 1\nmax-num-seqs = 2\nseed = 3\nenable_prefix_caching = false\napi_key = ["hidden-one"]\n',
    }
    path.write_text(texts[kind])
    monkeypatch.setenv("QUIRE_MAX_NUM_SEQS", "20")
    monkeypatch.setenv("QUIRE_SEED", "30")
    table = shown("--config", str(path), "--seed", "300")
    assert table["model"][0] == "demo"
    assert table["port"] == ("1", f"file {path}")
    assert table["max_num_seqs"] == ("20", "environment QUIRE_MAX_NUM_SEQS")
    assert table["seed"] == ("300", "flag")
    assert table["enable_prefix_caching"][0] == "False"
    assert table["host"] == ("127.0.0.1", "default")
    assert table["api_keys"][0] == "(hidden)"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("nothing_such: 1", "unknown settings nothing_such"),
        ("- a", "must hold settings"),
        (": [", "cannot be read"),
    ],
)
def test_config_file_that_is_wrong_is_refused(tmp_path, text, word):
    """A misspelled setting is an error, not silence."""
    path = tmp_path / "q.yaml"
    path.write_text(text)
    result = CliRunner().invoke(
        application, ["serve", "demo", "--config", str(path), "--show-config"]
    )
    assert result.exit_code == 2
    assert word in result.output.replace("\n", " ")
