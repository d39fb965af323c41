"""Loading a model takes little more memory than its packed weights, whatever its files are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]
BOUND = 1.15
# What Python and its libraries take is there when the small model has answered.
CHILD = """
import json, sys
from quire import LLM, SamplingParams
def resident(field):
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) * 1024 for l in file if l.startswith(field))
def load(directory):
    llm = LLM(directory, dtype="bfloat16", quantization=quantization or None, max_model_len=64,
              cache_memory_bytes=2**24, device="cpu", num_threads=1)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, detokenize=False))
    return llm
small, large, quantization = sys.argv[1:]
load(small).close()
before = resident("VmRSS")
llm = load(large)
print(json.dumps({"taken": resident("VmHWM") - before, "weights": llm.facts.weight_bytes}))
"""


def make_model(directory: Path, size: int, num_layers: int):
    """A Llama of random weights, on the disk in shards of safetensors."""
    config = transformers.LlamaConfig(
        hidden_size=size,
        intermediate_size=4 * size,
        num_hidden_layers=num_layers,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 64,
        vocab_size=32 * size,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="100MB")
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """One model of 0.5 GB in two formats, and a small one."""
    home = tmp_path_factory.mktemp("checkpoints")
    make_model(home / "small", 64, 1)
    model = make_model(home / "safetensors", 1024, 12)
    assert len(list((home / "safetensors").glob("*.safetensors"))) > 2
    (home / "bin").mkdir()
    (home / "bin" / "config.json").write_bytes((home / "safetensors" / "config.json").read_bytes())
    tensors = dict(model.state_dict())
    tensors.pop("lm_head.weight", None)  # tied
    torch.save(tensors, home / "bin" / "pytorch_model.bin")
    return {path.name: path for path in home.iterdir()}


@pytest.mark.parametrize(
    ("files", "quantization"),
    [("safetensors", ""), ("bin", ""), ("safetensors", "int8"), ("safetensors", "int4")],
)
def test_peak_of_loading_is_little_more_than_the_packed_weights(checkpoints, files, quantization):
    """A copy that outlives its layer, or a heap with holes, would show here; no cache helps."""
    arguments = [str(checkpoints["small"]), str(checkpoints[files]), quantization]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 100 * 2**20
    assert found["taken"] < BOUND * found["weights"], found
