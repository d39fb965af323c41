"""Bad input is one clear error of the right class, and harms nothing else."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model

from quire import LLM, SamplingParams
from quire.core.errors import CheckpointError, ConfigError, QuireError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    """One engine for all bad requests: each must leave it as it was."""
    with LLM(model=str(model), device="cpu", dtype="float32", max_model_len=64) as engine:
        yield engine


def _text(llm: LLM) -> str:
    return llm.generate("The quick brown", GREEDY, use_tqdm=False)[0].outputs[0].text


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ("", None, "empty"),
        ([[]], None, "empty"),
        ({"prompt_token_ids": []}, None, "empty"),
        ("word " * 200, None, "64"),
        ({"prompt_token_ids": [5] * 64}, None, "64"),
        ({"prompt_token_ids": [-1, 2]}, None, "-1"),
        ({"prompt_token_ids": [10**6]}, None, "1000000"),
        ({"prompt_token_ids": ["a"]}, None, "token ids"),
        ({"text": "x"}, None, "text"),
        (7, None, "prompt"),
        ("x", {"temprature": 1}, "temprature"),
        ("x", {"temperature": math.nan}, "temperature"),
        ("x", {"temperature": "hot"}, "temperature"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ("x", {"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ("x", {"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ("x", {"logits_processors": ["unknown"]}, "unknown"),
    ],
)
def test_bad_request_is_refused_and_harms_nothing(
    llm: LLM, prompt: Any, params: dict[str, Any] | None, said: str
) -> None:
    """The message names what is wrong; a good request afterwards gets what it would have got."""
    before = _text(llm)
    with pytest.raises(RequestError, match=said):
        llm.generate(prompt, params or GREEDY, use_tqdm=False)
    assert _text(llm) == before


def test_bad_request_among_good_ones_runs_none(llm: LLM) -> None:
    """A batch is checked as a whole before anything runs."""
    with pytest.raises(RequestError):
        llm.generate(["good", ""], GREEDY, use_tqdm=False)
    assert llm.statistics().num_running == 0


def test_wrong_number_of_params_is_refused(llm: LLM) -> None:
    """One for all, or one for each."""
    with pytest.raises(RequestError, match="2"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY], use_tqdm=False)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model to break."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def _load(directory: Path | str, **settings: Any) -> None:
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 64, **settings}
    LLM(model=str(directory), **settings).close()


def test_truncated_weights_name_the_file(copy: Path) -> None:
    """A download that broke off is the commonest damage."""
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _load(copy)


def test_corrupt_weights_name_the_file(copy: Path) -> None:
    """A file that is no safetensors at all."""
    (copy / "model.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _load(copy)


def test_missing_weights_are_said(copy: Path) -> None:
    """A folder with a config alone."""
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        _load(copy)


def test_broken_config_is_said(copy: Path) -> None:
    """config.json that is no JSON."""
    (copy / "config.json").write_text("{")
    with pytest.raises(QuireError, match=r"config\.json"):
        _load(copy)


def test_unknown_architecture_says_what_to_install(copy: Path) -> None:
    """A class of somebody's own may compute something else of the same tensors."""
    settings = json.loads((copy / "config.json").read_text())
    settings |= {"architectures": ["OracleForCausalLM"], "model_type": "llama"}
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(QuireError, match=r"(?s)OracleForCausalLM.*install the package"):
        _load(copy)


def test_missing_tokenizer_is_said_and_ids_still_work(copy: Path) -> None:
    """Text needs a tokenizer; token ids do not."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (copy / name).unlink(missing_ok=True)
    with LLM(model=str(copy), device="cpu", dtype="float32", max_model_len=64) as llm:
        with pytest.raises(QuireError, match="tokenizer"):
            llm.generate("text", GREEDY, use_tqdm=False)
        params = SamplingParams(temperature=0, max_tokens=4, detokenize=False, ignore_eos=True)
        output = llm.generate({"prompt_token_ids": [5, 6]}, params, use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"device": "abacus"}, ConfigError, "abacus"),
        ({"device": "cpu:7"}, ConfigError, "cpu:7"),
        ({"dtype": "float7"}, QuireError, "float7"),
        ({"max_model_len": 10**6}, ConfigError, "max_model_len"),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs"),
        ({"wibble": 1}, ConfigError, "wibble"),
        ({"cache_memory_bytes": 4096}, ConfigError, "max_model_len"),
        ({"block_size": 7}, QuireError, "block_size"),
    ],
)
def test_bad_setting_is_refused_by_name(
    model: Path, settings: dict[str, Any], kind: type[Exception], said: str
) -> None:
    """An unknown device, a cache too small for one request, a length beyond the model."""
    with pytest.raises(kind, match=said):
        _load(model, **settings)


def test_missing_directory_is_said(tmp_path: Path) -> None:
    """Neither a folder nor a reachable hub id."""
    with pytest.raises(QuireError, match="nowhere"):
        _load(tmp_path / "nowhere")


LOOPS = "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}"


def test_chat_template_that_loops_is_stopped(model: Path) -> None:
    """A template comes with the model, from strangers: it may not hang the engine."""
    with LLM(
        model=str(model), device="cpu", dtype="float32", max_model_len=64, chat_template=LOOPS
    ) as llm:
        with pytest.raises(QuireError, match="template"):
            llm.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False)
        assert _text(llm)
