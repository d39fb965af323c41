"""Models that see, token by token as transformers' own generation, in every way of scheduling."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from more_vision import needs_torchvision
from tiny_vision import MARKS, make_config, make_image, make_vision_model

from quire import LLM, SamplingParams
from quire.core.engine.image_reader import load_processor
from quire.core.errors import RequestError
from quire.core.models.registry import describe
from quire.core.models.transformers_adapter.seeing import SIGHTS

NUM_TOKENS = 10
GREEDY = SamplingParams(
    temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=0
)
FAMILIES = [family for family in MARKS if family in SIGHTS]


@dataclass(frozen=True)
class Case:
    """One prompt with its images and what transformers makes of it."""

    prompt: str
    images: list[Any]
    expected: list[int]
    first_logprob: float
    """Of the first new token."""

    @property
    def request(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "multi_modal_data": {"image": self.images}}


def _cases(directory: Path, family: str) -> list[Case]:
    """Texts with one image, two images, and the same text with another image."""
    mark = MARKS[family]
    processor = load_processor(directory)
    model_class = getattr(transformers, make_config(family).architectures[0])
    model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
    asked = [
        (f"a cat {mark} what is in this picture", [make_image(1)]),
        (
            f"the dog {mark} and {mark} tell me more please",
            [make_image(2, (64, 40)), make_image(3)],
        ),
        (f"a cat {mark} what is in this picture", [make_image(4)]),
        (f"a cat {mark} what is in this picture", [make_image(1)]),
    ]
    cases = []
    for prompt, images in asked:
        with warnings.catch_warnings():
            # PaliGemma's processor makes arrays of tensors in a way that numpy has left.
            warnings.simplefilter("ignore", DeprecationWarning)
            inputs = processor(text=[prompt], images=[images], return_tensors="pt")
        for name in ("num_crops", "labels"):
            inputs.pop(name, None)
        # Llama 4's processor makes images in bfloat16, whatever the model is in.
        inputs = inputs.to(torch.float32)
        with torch.no_grad():
            output = model.generate(
                **inputs, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprob = float(output.logits[0][0].double().log_softmax(-1)[new[0]])
        cases.append(Case(prompt, images, new, logprob))
    return cases


def _engine(directory: Path, **settings: Any) -> LLM:
    chosen = {
        "device": "cpu", "dtype": "float32", "max_model_len": 160, "max_num_seqs": 4,
        "block_size": 16, "model_impl": "transformers", "cache_memory_bytes": 1 << 22,
        "num_threads": 1, **settings,
    }  # fmt: skip
    return LLM(model=str(directory), **chosen)


def _tokens(outputs: list[Any]) -> list[list[int]]:
    assert not [output.error for output in outputs if output.error]
    return [list(output.outputs[0].token_ids) for output in outputs]


def _first_logprob(output: Any) -> float:
    return next(iter(output.outputs[0].logprobs[0].values())).logprob


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    """Each family that sees."""
    if needs_torchvision(request.param) and find_spec("torchvision") is None:
        pytest.skip("its image processor wants torchvision; see test_torchvision.py")
    return request.param


@pytest.fixture(scope="module")
def directory(family, tmp_path_factory) -> Path:
    """A tiny model of the family."""
    return make_vision_model(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def cases(directory, family) -> list[Case]:
    """What transformers generates."""
    return _cases(directory, family)


def test_generate_images_in_chunks_and_together_as_transformers(directory, family, cases):
    """Chunks of 7 tokens cut images in the middle, four requests share steps and prefixes."""
    with _engine(directory, max_num_batched_tokens=7) as llm:
        requests = [case.request for case in cases]
        expected = [case.expected for case in cases]
        first = llm.generate(requests, GREEDY, use_tqdm=False)
        assert _tokens(first) == expected
        # The image counts: were it ignored, all this would hold of the text alone.
        logprobs = [_first_logprob(output) for output in first]
        assert logprobs == pytest.approx([case.first_logprob for case in cases], abs=2e-4)
        one, _, other, same = logprobs
        assert one != pytest.approx(other, abs=1e-6)
        assert one == pytest.approx(same, abs=1e-5)
        # Again, from cached prefixes; the third has the first one's text and another image.
        again = llm.generate(requests, GREEDY, use_tqdm=False)
        assert _tokens(again) == expected
        has_cache = llm.config.enable_prefix_caching
        assert has_cache == (not SIGHTS[family].sees_whole_prompt)
        # A prompt that fills no block leaves nothing.
        long = [output for output in again if len(output.prompt_token_ids) > 16]
        assert long
        assert all(bool(output.num_cached_tokens) == has_cache for output in long)


@pytest.mark.slow
def test_generate_image_with_a_full_cache_is_preempted_and_exact(directory, cases):
    """Whoever loses its blocks sees its image again when it resumes."""
    with _engine(directory) as probe:
        block_bytes = probe.statistics().memory_bytes["cache"] // probe.facts.num_blocks[0]
    long = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, detokenize=False)
    num_preemptions = 0
    # Families make images of many lengths: the first size at which two requests meet and grow.
    for num_blocks in (14, 12, 11, 10, 9, 8):
        settings = {"cache_memory_bytes": num_blocks * block_bytes}
        settings["max_model_len"] = min(160, 16 * num_blocks - 16)
        with _engine(directory, **settings, enable_prefix_caching=False) as llm:
            outputs = llm.generate([case.request for case in cases], long, use_tqdm=False)
            starts = [tokens[:NUM_TOKENS] for tokens in _tokens(outputs)]
            assert starts == [case.expected for case in cases]
            num_preemptions = llm.statistics().num_preemptions
        if num_preemptions:
            break
    assert num_preemptions


# --- one family is enough -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A tiny model whose images have grids."""
    return make_vision_model("qwen2_vl", tmp_path_factory.mktemp("qwen"))


def test_generate_one_image_for_many_requests_runs_the_tower_once(qwen, monkeypatch):
    """Equal content is one hash; nothing is kept when nobody runs."""
    from quire.core.models.transformers_adapter import paged

    made = []
    original = paged.Eyes.__init__

    def remember(self, *arguments):
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(paged.Eyes, "__init__", remember)
    mark, image = MARKS["qwen2_vl"], make_image(7)
    with _engine(qwen, enable_prefix_caching=False) as llm:
        requests = [
            {"prompt": f"{word} {mark} cat", "multi_modal_data": {"image": image.copy()}}
            for word in ("a", "the", "one")
        ]
        _tokens(llm.generate(requests, GREEDY, use_tqdm=False))
        eyes = made[-1]
        assert eyes.cache.num_encoded == 1
        llm.generate("the cat", GREEDY, use_tqdm=False)
        assert len(eyes.cache) == 0


def test_chat_image_parts_equal_the_prompt_with_placeholders(qwen):
    """`image_url`, `input_image` and `image` parts all reach the same tokens."""
    import base64
    import io

    image = make_image(5)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
        {"type": "image", "image": image},
    ]
    conversations = [
        [{"role": "user", "content": [part, {"type": "text", "text": "describe it"}]}]
        for part in parts
    ]
    prompt = f"user : {MARKS['qwen2_vl']} describe it assistant : "
    with _engine(qwen) as llm:
        chats = _tokens(llm.chat(conversations, GREEDY, use_tqdm=False))
        request = {"prompt": prompt, "multi_modal_data": {"image": image}}
        plain = llm.generate(request, GREEDY, use_tqdm=False, add_special_tokens=False)
        assert chats == _tokens(plain) * 3


def test_generate_ids_with_one_placeholder_each_are_written_out(qwen):
    """Token ids are taken as text is: one placeholder for each image."""
    mark, image = MARKS["qwen2_vl"], make_image(6)
    with _engine(qwen) as llm:
        ids = llm.get_tokenizer().encode(f"a {mark} cat")
        data = {"image": [image]}
        both = llm.generate(
            [{"prompt_token_ids": ids, "multi_modal_data": data},
             {"prompt": f"a {mark} cat", "multi_modal_data": data}],
            GREEDY, use_tqdm=False,
        )  # fmt: skip
        assert both[0].prompt_token_ids == both[1].prompt_token_ids
        assert len(both[0].prompt_token_ids) > len(ids)
        assert _tokens(both)[0] == _tokens(both)[1]


def test_generate_wrong_images_are_refused_before_anything_runs(qwen):
    """Too many, too few, broken, of another kind: each says so, and the engine goes on."""
    mark = MARKS["qwen2_vl"]
    image = make_image(1)
    with _engine(qwen, limit_mm_per_prompt={"image": 2}) as llm:
        bad = [
            (f"{mark} {mark} {mark}", {"image": [image] * 3}, "takes 2"),
            ("a cat", {"image": image}, "0 placeholders"),
            (f"{mark} {mark}", {"image": image}, "2 placeholders"),
            (mark, {"image": b"broken"}, "none that can be read"),
            (mark, {"video": image}, "takes text and images"),
            (mark, {"image": "http://127.0.0.1/x.png"}, "private network"),
        ]
        for prompt, data, message in bad:
            with pytest.raises(RequestError, match=message):
                llm.generate({"prompt": prompt, "multi_modal_data": data}, GREEDY, use_tqdm=False)
        assert _tokens(llm.generate("the cat", GREEDY, use_tqdm=False))


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_load_model_that_sees_both_ways_is_not_chunked(tmp_path, family):
    """Where tokens see later ones a prompt is computed whole, and it is said."""
    directory = make_vision_model(family, tmp_path)
    with _engine(directory, max_num_batched_tokens=7) as llm:
        assert not llm.config.enable_chunked_prefill
        assert any("see each other" in change for change in llm.facts.changes)


def test_generate_ids_of_paligemma_get_the_image_alone(tmp_path):
    """Where ids are given, nothing is written behind an image that the user did not write."""
    directory = make_vision_model("paligemma", tmp_path)
    prompt, image = f"a cat {MARKS['paligemma']} what is this", make_image(1)
    with _engine(directory) as llm:
        codec_ids = llm.get_tokenizer()(prompt, add_special_tokens=False)["input_ids"]
        request = {"prompt_token_ids": codec_ids, "multi_modal_data": {"image": image}}
        (output,) = llm.generate([request], GREEDY, use_tqdm=False)
        assert not output.error
        assert len(output.prompt_token_ids) == len(codec_ids) - 1 + 16


def test_describe_gemma3_with_images_goes_to_who_serves_them(tmp_path):
    """A checkpoint that sees is not served blind, unless the native family is asked for."""
    directory = make_vision_model("gemma3", tmp_path)
    seeing = describe(directory)
    assert (seeing.implementation, seeing.accepts) == ("transformers", ("image",))
    assert any("--model-impl native" in note for note in seeing.notes)
    blind = describe(directory, model_impl="native")
    assert (blind.implementation, blind.accepts) == ("native", ())
