"""Every encoder gives the numbers that transformers gives of each text alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import ENCODERS, FLAT, make_checkpoint, own_output, texts, write_layout

from quire import LLM
from quire.core.config import EngineConfig
from quire.core.engine.pooling import PoolingParams
from quire.core.errors import RequestError, UnsupportedError
from quire.core.planning import plan_engine


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from threads."""
    torch.set_num_threads(1)


def start(directory: Path, **settings) -> LLM:
    return LLM(str(directory), device="cpu", dtype="float32", num_threads=1, **settings)


def vectors_of(llm: LLM, prompts, **settings) -> torch.Tensor:
    found = llm.embed(prompts, use_tqdm=False, **settings)
    return torch.tensor([one.outputs.embedding for one in found])


def pooled(directory: Path, token_ids: list[int], mode: str = "mean") -> torch.Tensor:
    rows = own_output(directory, "AutoModel", token_ids)[0][0]
    vector = {"mean": rows.mean(0), "last": rows[-1], "cls": rows[0], "max": rows.amax(0)}[mode]
    return vector / vector.norm()


@pytest.mark.parametrize("kind", ENCODERS)
def test_vectors_of_mixed_lengths_equal_those_of_each_text_alone(kind, tmp_path):
    """No text sees another, in either way, and positions begin anew in each."""
    directory = make_checkpoint(kind, tmp_path)
    is_decoder = kind in {"qwen3", "mistral", "llama"}
    with start(directory, max_num_batched_tokens=80) as llm:
        found = vectors_of(llm, texts())
        forward = llm.facts.providers["forward"]
    wanted = [pooled(directory, one, "last" if is_decoder else "mean") for one in texts()]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-5)
    assert forward == f"transformers ({'flat' if kind in FLAT else 'by length'})"


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "mpnet", "qwen3"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_classifier_gives_the_logits_and_probabilities_of_transformers(kind, num_labels, tmp_path):
    """The model's own head runs on the rows of each text alone."""
    auto = "AutoModelForSequenceClassification"
    directory = make_checkpoint(kind, tmp_path, auto=auto, num_labels=num_labels)
    with start(directory) as llm:
        logits = llm.classify(texts(5), use_tqdm=False, use_activation=False)
        likely = llm.classify(texts(5), use_tqdm=False)
        tasks = llm.facts.tasks
    for index, text in enumerate(texts(5)):
        wanted = own_output(directory, auto, text).logits[0]
        torch.testing.assert_close(
            torch.tensor(logits[index].outputs.probs), wanted, rtol=1e-4, atol=1e-5
        )
        active = wanted.sigmoid() if num_labels == 1 else wanted.softmax(-1)
        torch.testing.assert_close(
            torch.tensor(likely[index].outputs.probs), active, rtol=1e-4, atol=1e-5
        )
    assert ("reward" in tasks) == ("score" in tasks) == (num_labels == 1)


def test_reward_is_the_logit_of_the_one_label(tmp_path):
    """A reward model's number is not squeezed into a probability."""
    auto = "AutoModelForSequenceClassification"
    directory = make_checkpoint("llama", tmp_path, auto=auto, num_labels=1)
    with start(directory, task="reward") as llm:
        found = llm.reward(texts(4), use_tqdm=False)
    for one, text in zip(found, texts(4), strict=True):
        wanted = own_output(directory, auto, text).logits[0]
        torch.testing.assert_close(torch.tensor(one.outputs.data), wanted, rtol=1e-4, atol=1e-5)


def test_multi_label_problem_is_activated_label_by_label(tmp_path):
    """`problem_type` of the config, not the number of labels, chooses the activation."""
    auto = "AutoModelForSequenceClassification"
    directory = make_checkpoint(
        "bert", tmp_path, auto=auto, num_labels=3, problem_type="multi_label_classification"
    )
    with start(directory) as llm:
        found = llm.classify([texts()[1]], use_tqdm=False)[0].outputs.probs
        assert llm.facts.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    wanted = own_output(directory, auto, texts()[1]).logits[0].sigmoid()
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_token_classifier_answers_with_a_row_for_each_token(kind, tmp_path):
    """Rows of one text never come from its neighbour."""
    auto = "AutoModelForTokenClassification"
    directory = make_checkpoint(kind, tmp_path, auto=auto, num_labels=4)
    with start(directory) as llm:
        found = llm.encode(texts(5), use_tqdm=False)
    for one, text in zip(found, texts(5), strict=True):
        wanted = own_output(directory, auto, text).logits[0].softmax(-1)
        torch.testing.assert_close(torch.tensor(one.outputs.data), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "mode"),
    [("pooling_mode_cls_token", "cls"), ("pooling_mode_max_tokens", "max"),
     ("pooling_mode_lasttoken", "last"), ("pooling_mode_mean_tokens", "mean")],
)  # fmt: skip
def test_pooling_mode_of_the_layout_is_followed(field, mode, tmp_path):
    """1_Pooling/config.json decides which rows make the vector."""
    directory = make_checkpoint("bert", tmp_path)
    write_layout(directory, mode=field)
    with start(directory) as llm:
        found = vectors_of(llm, texts(4))
    wanted = torch.stack([pooled(directory, one, mode) for one in texts(4)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_dense_stage_and_missing_normalize_are_followed(tmp_path):
    """A layout without Normalize gives vectors as long as they are, after its Dense stage."""
    directory = make_checkpoint("bert", tmp_path)
    dense = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    write_layout(directory, dense=dense, normalizes=False)
    with start(directory) as llm:
        found = vectors_of(llm, texts(3))
        assert llm.facts.vector_size == 12
    for vector, text in zip(found, texts(3), strict=True):
        mean = own_output(directory, "AutoModel", text)[0][0].mean(0)
        torch.testing.assert_close(vector, torch.tanh(dense @ mean), rtol=1e-4, atol=1e-5)


def test_dimensions_keep_the_first_numbers_and_normalize_again(tmp_path):
    """Matryoshka: the shortened vector has length one; more than there are is refused."""
    directory = make_checkpoint("bert", tmp_path)
    with start(directory) as llm:
        whole, short = vectors_of(llm, texts(3)), vectors_of(llm, texts(3), dimensions=8)
        with pytest.raises(RequestError, match="32"):
            llm.embed(texts(1), use_tqdm=False, dimensions=33)
    cut = whole[:, :8]
    torch.testing.assert_close(short, cut / cut.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)


def test_token_embed_gives_normalized_rows(tmp_path):
    """One row for each token, for late interaction."""
    directory = make_checkpoint("bert", tmp_path)
    with start(directory) as llm:
        found = llm.encode([texts()[1]], use_tqdm=False, pooling_task="token_embed")
    rows = own_output(directory, "AutoModel", texts()[1])[0][0]
    wanted = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.tensor(found[0].outputs.data), wanted, rtol=0, atol=1e-5)


def test_long_text_is_refused_alone_or_cut_as_asked(tmp_path):
    """Longer than max_seq_length of the layout: an error with the number, nothing else harmed."""
    directory = make_checkpoint("bert", tmp_path)
    write_layout(directory, max_length=20)
    long = texts()[1]
    with start(directory) as llm:
        assert llm.facts.max_model_len == 20
        with pytest.raises(RequestError, match="40 tokens"):
            llm.embed([long], use_tqdm=False)
        cut = llm.embed([long], use_tqdm=False, truncate_prompt_tokens=-1)[0]
        same = llm.embed([long[:20]], use_tqdm=False)[0]
    assert cut.prompt_token_ids == long[:20]
    assert cut.outputs == same.outputs


def test_roberta_takes_as_many_tokens_as_it_has_positions_for(tmp_path):
    """Two of its positions stand for padding, so the longest text is shorter by two."""
    directory = make_checkpoint("roberta", tmp_path)
    with start(directory) as llm:
        assert llm.facts.max_model_len == 78
        assert vectors_of(llm, [[7] * 78]).isfinite().all()


def test_plan_has_no_cache_and_names_the_pooling(tmp_path):
    """Nothing is kept between steps, and steps hold the longest text."""
    directory = make_checkpoint("bert", tmp_path)
    planned = plan_engine(
        EngineConfig(model=str(directory), device="cpu", max_num_batched_tokens=9)
    )
    planned.device.close()
    plan = planned.plan
    assert plan.cache == ()
    assert {row.tag: row.size_bytes for row in plan.memory}["cache"] == 0
    assert plan.config.max_num_batched_tokens == 80
    assert any("without a KV cache" in note for note in plan.notes)


def test_task_that_the_checkpoint_has_no_head_for_is_refused_before_weights(tmp_path):
    """`--task classify` on a model without a classifier says what it lacks."""
    directory = make_checkpoint("bert", tmp_path)
    with pytest.raises(UnsupportedError, match="classify"):
        plan_engine(EngineConfig(model=str(directory), device="cpu", task="classify"))


def test_generation_with_a_model_that_embeds_is_refused(tmp_path):
    """A request for text is turned away before it reaches the core."""
    directory = make_checkpoint("bert", tmp_path)
    with start(directory) as llm:
        with pytest.raises(RequestError, match="embed"):
            llm.generate([[5, 6]], use_tqdm=False)
        with pytest.raises(RequestError, match="embed"):
            llm.encode([[5]], PoolingParams(task="classify"), use_tqdm=False)
        assert vectors_of(llm, [[5, 6]]).shape == (1, 32)


def test_causal_language_model_embeds_when_asked(tmp_path):
    """`--task embed` takes the body of a checkpoint that generates."""
    directory = make_checkpoint("llama", tmp_path, auto="AutoModelForCausalLM")
    with start(directory, task="embed") as llm:
        found = vectors_of(llm, texts(3))
    wanted = torch.stack([pooled(directory, one, "last") for one in texts(3)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
