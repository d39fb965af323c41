"""Embeddings, pooling, classification, scores and ranking, over an engine that pools."""

from __future__ import annotations

import base64
import struct

import pytest
from asking import connected, error_of, served_in_thread
from fake_engine import FakeEngine, facts, vector_of
from openai import OpenAI
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from quire.core.errors import EngineDeadError
from quire.core.serving.operations.pooling_metrics import PoolingMetrics

EMBEDS = ["embed", "token_embed"]
ALL_PATHS = {
    "/v1/embeddings": {"input": "a"},
    "/pooling": {"input": "a"},
    "/classify": {"input": "a"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
}


def pooling_engine(*tasks: str, **changes) -> FakeEngine:
    return FakeEngine(facts=facts(tasks=list(tasks), **changes))


def ids_of(text: str) -> list[int]:
    return [256, *text.encode()]


@pytest.mark.parametrize("path", ALL_PATHS)
async def test_model_that_generates_refuses_by_name(client, path):
    """A model without a pooling head says so, on every one of these paths."""
    error = error_of(await client.post(path, json=ALL_PATHS[path]), 400)
    assert error["param"] == "model"
    assert "this model generates text; it has no pooling head" in error["message"]


def test_openai_embeddings_are_understood():
    """The library, which asks for base64 by itself, reads the numbers; all forms of input."""
    engine = pooling_engine(*EMBEDS)
    with (
        served_in_thread(engine) as address,
        OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        many = client.embeddings.create(model="fake", input=["ab", "c"])
        assert [item.embedding for item in many.data] == [
            vector_of(ids_of("ab")),
            vector_of(ids_of("c")),
        ]
        assert many.usage.prompt_tokens == 5
        floats = client.embeddings.create(model="fake", input="ab", encoding_format="float")
        assert floats.data[0].embedding == many.data[0].embedding
        for given in ([97, 98], [[97, 98], [99]]):
            found = client.embeddings.create(model="fake", input=given)
            assert found.data[0].embedding == vector_of([97, 98])
        short = client.embeddings.create(model="fake", input="ab", dimensions=3, user="me")
        assert len(short.data[0].embedding) == 3


async def test_embedding_in_base64_is_little_endian_float32():
    """The packed form is what the API's clients unpack."""
    async with connected(pooling_engine(*EMBEDS)) as client:
        body = {"input": "ab", "encoding_format": "base64"}
        [item] = (await client.post("/v1/embeddings", json=body)).json()["data"]
    packed = base64.b64decode(item["embedding"])
    assert list(struct.unpack("<8f", packed)) == vector_of(ids_of("ab"))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [""], "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 9}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": [[1], "a"]}, "input"),
        ({"input": ["a"] * 9}, "input"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "nonsense": 1}, "nonsense"),
        ({}, "input"),
    ],
)
async def test_embedding_bad_field_is_refused_by_name(body, param):
    """Every refusal names the field."""
    async with connected(pooling_engine(*EMBEDS), max_outputs=8) as client:
        assert error_of(await client.post("/v1/embeddings", json=body), 400)["param"] == param


async def test_pooling_does_what_the_model_does():
    """Without a task it is the model's first; rows for tokens keep their shape unless packed."""
    async with connected(pooling_engine("token_embed", "reward")) as client:
        rows = (await client.post("/pooling", json={"input": "ab"})).json()["data"][0]["data"]
        assert rows == [[256.0], [97.0], [98.0]]
        body = {"input": "ab", "task": "reward"}
        assert (await client.post("/pooling", json=body)).json()["data"][0]["data"] == [3.0]
        packed = {"input": "ab", "encoding_format": "base64"}
        text = (await client.post("/pooling", json=packed)).json()["data"][0]["data"]
        assert struct.unpack("<3f", base64.b64decode(text)) == (256.0, 97.0, 98.0)
        refused = await client.post("/pooling", json={"input": "ab", "task": "classify"})
        assert "token_embed" in error_of(refused, 400)["message"]


async def test_classification_names_the_likeliest_label():
    """Labels are the model's, or their numbers where it has none."""
    for labels, expected in ((["bad", "good"], "good"), ([], "LABEL_1")):
        async with connected(pooling_engine("classify", labels=labels)) as client:
            answer = (await client.post("/classify", json={"input": ["a", "b"]})).json()
            assert [item["label"] for item in answer["data"]] == [expected] * 2
            assert answer["data"][0]["probs"] == [0.25, 0.75]
            raw = {"input": "a", "use_activation": False}
            assert (await client.post("/classify", json=raw)).json()["data"][0]["probs"] == [-1, 1]


async def test_score_of_vectors_is_their_cosine():
    """A model that makes vectors scores a text beside itself with one, each text computed once."""
    engine = pooling_engine(*EMBEDS)
    async with connected(engine) as client:
        body = {"text_1": "ab", "text_2": ["ab", "xyz"]}
        scores = [item["score"] for item in (await client.post("/score", json=body)).json()["data"]]
    assert scores[0] == pytest.approx(1.0)
    assert scores[1] < 1.0
    assert [prompt for prompt, _, _ in engine.pooled] == ["ab", "xyz"]


async def test_score_of_pairs_is_the_models():
    """A model that reads both texts gets them as a pair, one with each or one by one."""
    engine = pooling_engine("score")
    async with connected(engine) as client:
        body = {"text_1": ["ab", "cd"], "text_2": ["abc", "xyz"]}
        data = (await client.post("/v1/score", json=body)).json()["data"]
        assert [item["score"] for item in data] == [2.0, 0.0]
        uneven = {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}
        assert error_of(await client.post("/score", json=uneven), 400)["param"] == "text_1"
    assert [(one, two) for one, two, _ in engine.pooled] == [("ab", "abc"), ("cd", "xyz")]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_rerank_puts_the_best_first(path):
    """Documents come best first, with their place in the request, and as many as asked."""
    documents = ["xyz", "a", {"text": "abc"}]
    async with connected(pooling_engine("score")) as client:
        body = {"query": "abc", "documents": documents}
        results = (await client.post(path, json=body)).json()["results"]
        assert [item["index"] for item in results] == [2, 1, 0]
        assert [item["relevance_score"] for item in results] == [3.0, 1.0, 0.0]
        assert ("document" in results[0]) == (path != "/v2/rerank")
        two = {**body, "top_n": 1, "return_documents": True}
        [best] = (await client.post(path, json=two)).json()["results"]
        assert best["document"] == {"text": "abc"}


async def test_pooling_dead_engine_is_503():
    """A dead engine is told as on every other path."""
    engine = pooling_engine(*EMBEDS)
    engine.dead_error = EngineDeadError("gone")
    async with connected(engine) as client:
        error_of(await client.post("/v1/embeddings", json={"input": "a"}), 503)


async def test_metrics_count_texts_tokens_and_time_by_task():
    """An operator sees what a model of vectors does, though it generates nothing; also failures."""
    engine = pooling_engine(*EMBEDS)
    async with connected(engine) as client:
        await client.post("/v1/embeddings", json={"input": ["ab", "c"]})
        await client.post("/pooling", json={"input": "abc", "task": "token_embed"})
        text = (await client.get("/metrics")).text
    told = {
        (sample.name, sample.labels["task"], sample.labels.get("outcome")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "pooling" in sample.name and "le" not in sample.labels
    }
    assert told["quire:pooling_requests_total", "embed", "success"] == 2
    assert told["quire:pooling_requests_total", "token_embed", "success"] == 1
    assert told["quire:pooling_prompt_tokens_total", "embed", None] == 3 + 2
    assert told["quire:pooling_prompt_tokens_total", "token_embed", None] == 4
    assert told["quire:pooling_request_latency_seconds_count", "embed", None] == 2
    assert told["quire:pooling_request_latency_seconds_sum", "embed", None] > 0


@pytest.mark.parametrize(("error", "outcome"), [(ValueError, "error"), (GeneratorExit, "abort")])
def test_metrics_tell_how_a_text_ended(error, outcome):
    """What fails and what is given up are not counted as done, and say nothing of the time."""
    registry = CollectorRegistry()
    metrics = PoolingMetrics(registry, "m", ["embed"])
    with pytest.raises(error), metrics.observed("embed"):
        raise error
    labels = {"model_name": "m", "task": "embed"}
    ends = {**labels, "outcome": outcome}
    assert registry.get_sample_value("quire:pooling_requests_total", ends) == 1
    assert registry.get_sample_value("quire:pooling_request_latency_seconds_count", labels) == 0
