"""Mamba and Mamba-2 by the operators: transformers' tokens, however a text is cut."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import model_matrix  # noqa: E402
from paged_runs import (  # noqa: E402
    BLOCK_SIZE,
    PagedRun,
    RunningRequest,
    hold_resuming,
    load_on_reference,
    logits_of,
)
from tiny_architectures import make_tiny_architecture  # noqa: E402
from tiny_models import make_tiny_tokenizer  # noqa: E402

from quire.core.errors import CheckpointError, UnsupportedError  # noqa: E402
from quire.core.interface import DeviceOutOfMemory  # noqa: E402
from quire.core.models.registry import describe  # noqa: E402
from quire.core.models.state_space.mixers import Mixer  # noqa: E402

NAMES = ("mamba", "mamba2")
ENGINE = {
    "dtype": "float32", "max_num_seqs": 4, "max_model_len": 128,
    "block_size": 16, "num_threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    """A saved tiny model, and the model itself."""
    directory = tmp_path_factory.mktemp(request.param)
    model = make_tiny_architecture(request.param)
    model.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory, model


@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (7, 1, 8, 9, 15), (16, 16, 8)])
def test_logits_are_those_of_transformers_however_a_text_is_cut(checkpoint, pieces):
    """States at every end of a block are those after its last token, whatever steps they came from."""
    directory, oracle = checkpoint
    token_ids = np.random.default_rng(5).integers(4, 500, size=40).tolist()
    with torch.no_grad():
        want = oracle(torch.tensor([token_ids])).logits[0]
    got = logits_of(load_on_reference(directory), token_ids, pieces)
    ends = np.cumsum(pieces) - 1
    torch.testing.assert_close(torch.stack(got), want[ends], rtol=1e-4, atol=1e-4)


def test_requests_in_one_step_do_not_touch_each_other(checkpoint):
    """Requests at different places of their blocks share rounds and keep their own states."""
    directory, _ = checkpoint
    model = load_on_reference(directory)
    rng = np.random.default_rng(6)
    texts = [rng.integers(4, 500, size=30).tolist() for _ in range(3)]
    alone = [logits_of(model, text, (30,))[0] for text in texts]
    run, requests = PagedRun(model), [RunningRequest(list(text)) for text in texts]
    run.step([(requests[0], 5)])
    run.step([(requests[0], 1), (requests[1], 19)])
    run.step([(requests[2], 29), (requests[0], 23), (requests[1], 10)])
    together = run.step([(requests[2], 1), (requests[0], 1), (requests[1], 1)][:2])
    torch.testing.assert_close(together[0], alone[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-4)


def test_request_resumes_from_the_blocks_of_another(checkpoint):
    """A prefix that is shared, or kept from before a preemption, is a state at the end of a block."""
    hold_resuming(load_on_reference(checkpoint[0]))


def test_step_that_fails_is_computed_anew_from_full_blocks(checkpoint, monkeypatch):
    """An error in the last layer has perhaps changed the block that fills, and none that is full."""
    directory, _ = checkpoint
    model = load_on_reference(directory)
    token_ids = np.random.default_rng(8).integers(4, 500, size=20).tolist()
    want = logits_of(model, token_ids, (BLOCK_SIZE, 20 - BLOCK_SIZE))[-1]
    run, request = PagedRun(model), RunningRequest(list(token_ids))
    run.step([(request, BLOCK_SIZE)])
    run.step([(request, 4)])
    with monkeypatch.context() as patch:
        patch.setattr(model, "_mixers", [*model._mixers[:-1], lambda *_: 1 / 0])
        with pytest.raises(ZeroDivisionError):
            run.step([(request, 1)])
    request.num_computed = BLOCK_SIZE
    assert torch.equal(run.step([(request, 20 - BLOCK_SIZE)])[0], want)


@pytest.mark.parametrize(
    "settings",
    [
        {"device": "cpu", "cache_blocks": 7, "max_num_batched_tokens": 24},
        {"device": "cpu", "cache_blocks": 64, "max_num_batched_tokens": 512},
        {
            "device": "sim",
            "cache_blocks": 8,
            "max_num_batched_tokens": 20,
            "overlap_scheduling": True,
        },
    ],
    ids=["tight", "whole", "tight-overlapped"],
)
def test_engine_gives_the_tokens_of_generate(checkpoint, settings, monkeypatch):
    """Chunked, prefix-shared and overlapped requests give the reference's tokens."""
    from quire import LLM, SamplingParams

    monkeypatch.setattr(model_matrix, "NUM_TOKENS", 40)
    directory, oracle = checkpoint
    expected, margins = model_matrix.reference(oracle, use_cache=True)
    per_block = 16 * sum(g.bytes_per_token({"float32": 4}.__getitem__) for g in describe(directory).attention_groups)  # fmt: skip
    changes = dict(settings)
    blocks = changes.pop("cache_blocks")
    asked = [{"prompt_token_ids": prompt} for prompt in model_matrix.prompts()]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(
        model=str(directory), cache_memory_bytes=blocks * per_block, **ENGINE, **changes
    ) as llm:
        runs = []
        for _ in range(2):
            outputs = llm.generate(asked, params, use_tqdm=False)
            runs.append([list(output.outputs[0].token_ids) for output in outputs])
        assert "causal_conv1d" in llm.facts.providers
    assert model_matrix.compare(runs, expected, margins) == "exact"


def test_memory_refused_in_the_last_layer_changes_no_token(checkpoint, monkeypatch):
    """States that a failed step has overwritten are computed anew, with their requests."""
    from quire import LLM, SamplingParams

    asked = [{"prompt_token_ids": prompt} for prompt in model_matrix.prompts()]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(model=str(checkpoint[0]), device="cpu", **ENGINE) as llm:
        want = [list(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False)]
        calls = _refuse_memory(monkeypatch, checkpoint[1].config.num_hidden_layers, steps=(1, 5, 9))
        got = [list(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False)]
    assert calls["refused"] == 3
    assert got == want


def _refuse_memory(monkeypatch, num_layers, steps):
    """After the last layer of these steps."""
    calls = {"all": 0, "refused": 0}
    mix = Mixer.__call__

    def failing(self, *arguments):
        mixed = mix(self, *arguments)
        calls["all"] += 1
        if calls["all"] in [(step + 1) * num_layers for step in steps]:
            calls["refused"] += 1
            raise DeviceOutOfMemory("an allocation was refused", requested_bytes=1)
        return mixed

    monkeypatch.setattr(Mixer, "__call__", failing)
    return calls


def test_block_holds_one_state_for_all_its_tokens(checkpoint):
    """The memory of a state is counted once a block, and a layer's two tensors with it."""
    directory, oracle = checkpoint
    group = describe(directory).attention_groups[0]
    assert group.spec.kind == "recurrent"
    config = oracle.config
    is_first = config.model_type == "mamba"
    inner = config.intermediate_size if is_first else config.expand * config.hidden_size
    conv = inner if is_first else inner + 2 * config.n_groups * config.state_size
    numbers = conv * (config.conv_kernel - 1) + inner * config.state_size
    sizes = {"float32": 4}.__getitem__
    assert group.bytes_per_token(sizes) == numbers * 4 * len(group.layers) // group.spec.block_size


def test_checkpoint_without_a_tensor_is_refused_by_name(checkpoint, tmp_path):
    """A missing tensor is named before anything is packed."""
    from safetensors.torch import load_file, save_file

    directory, _ = checkpoint
    tensors = load_file(directory / "model.safetensors")
    name = "backbone.layers.1.mixer.A_log"
    tensors[name + "s"] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_on_reference(tmp_path)


def test_limited_time_steps_are_left_to_the_adapter(tmp_path):
    """A config that the operators do not compute is refused natively, and runs in other code."""
    make_tiny_architecture("mamba2").save_pretrained(tmp_path)
    import json

    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_step_limit": [0.0, 0.1]}))
    with pytest.raises(UnsupportedError, match="time steps limited"):
        describe(tmp_path, model_impl="native")
    assert describe(tmp_path).implementation == "transformers"


def test_blocks_of_the_test_are_crossed():
    """The cuts above would show nothing if a block held a whole text."""
    assert BLOCK_SIZE < 10
