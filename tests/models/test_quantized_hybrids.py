"""Models with recurrent states whose checkpoints are stored quantized mean what their layouts say."""

from __future__ import annotations

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from paged_runs import load_on_reference, make_worker_config, run_greedy  # noqa: E402
from quantized_checkpoints import GROUP, quantize_checkpoint  # noqa: E402
from test_hybrid import MULTIPLIERS  # noqa: E402
from test_quantized_checkpoints import FORMATS  # noqa: E402
from tiny_architectures import make_tiny_architecture  # noqa: E402

from quire.backends.cpu import CpuBackend  # noqa: E402
from quire.core.errors import UnsupportedError  # noqa: E402
from quire.core.models.registry import describe, load_language_model  # noqa: E402

PROMPT = list(range(10, 40))
NUM_TOKENS = 5
FAMILIES = {
    "mamba": {},
    "mamba2": {},
    "jamba": {},
    "bamba": {},
    "falcon_h1": MULTIPLIERS,
    "qwen3_next": {},
    "qwen3_5_text": {"linear_num_value_heads": 8},
}
PLAIN = ("router", "x_proj", "dt_proj", "conv1d", "shared_expert_gate")
"""Too small, or what decides: no tool quantizes them."""
FORMAT_NAMES = {"gptq": "int4", "awq": "int4", "integers": "int8", "float8-blocks": "fp8"}


def make(tmp_path, family, name, plain_names=PLAIN):
    """A quantized checkpoint, and a plain one of the numbers that it means."""
    directory, plain = tmp_path / family, tmp_path / "plain"
    make_tiny_architecture(family, **FAMILIES[family]).save_pretrained(directory)
    shutil.copytree(directory, plain)
    settings, encode = FORMATS[name]
    quantize_checkpoint(directory, plain, settings, encode, plain_names)
    return directory, plain


def tokens_of(model):
    return run_greedy(model, [PROMPT], NUM_TOKENS, chunk=16)[0][0]


@pytest.fixture
def cpu():
    device = CpuBackend().open(0)
    yield device
    device.close()


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_checkpoint_gives_the_tokens_of_what_it_means(family, name, tmp_path, cpu):
    """Widened by the reference, multiplied by codes on the CPU, beside transformers."""
    directory, plain = make(tmp_path, family, name)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ids = oracle.generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    expected = ids[0, len(PROMPT) :].tolist()
    assert tokens_of(load_on_reference(directory)) == expected
    ours = load_language_model(make_worker_config(directory), cpu)
    assert tokens_of(ours) == expected
    wide = load_language_model(make_worker_config(plain), cpu)
    assert describe(plain).stored_format is None
    assert describe(directory).stored_format == FORMAT_NAMES[name]
    if name != "float8-blocks":  # which the CPU widens
        assert ours.weight_bytes < 0.8 * wide.weight_bytes


def test_parts_of_one_product_that_are_stored_otherwise_are_widened(tmp_path, cpu):
    """As FP8 releases of Qwen3-Next do: betas and time steps beside them are plain."""
    directory, plain = make(tmp_path, "qwen3_next", "gptq", (*PLAIN, "in_proj_ba"))
    ours, wide = (load_language_model(make_worker_config(d), cpu) for d in (directory, plain))
    assert tokens_of(ours) == tokens_of(wide)
    assert ours.weight_bytes < wide.weight_bytes


@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_unknown_methods_are_refused_by_name(family, tmp_path):
    """Before a weight is read."""
    make_tiny_architecture(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = {"quantization_config": {"quant_method": "hqq", "group_size": GROUP}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(UnsupportedError, match="hqq"):
        describe(tmp_path)
