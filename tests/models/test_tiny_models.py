"""The tiny models themselves: they must tell errors apart, or the tests that use them say nothing."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    EOS_ID,
    TINY_VARIANTS,
    VOCAB_SIZE,
    make_tiny_model,
    make_torch_model,
)


@pytest.mark.parametrize("variant", TINY_VARIANTS)
@torch.no_grad()
def test_first_token_of_a_prompt_reaches_the_last_logits(variant):
    """A cache that lost the first block must change the answer, through windows too."""
    model = make_torch_model(variant)
    prompt = torch.arange(10, 60)[None]
    other = prompt.clone()
    other[0, 0] = 200
    difference = model(prompt).logits[0, -1] - model(other).logits[0, -1]
    assert difference.abs().max() > 1e-2


def test_same_arguments_make_the_same_weights_and_others_do_not():
    """Tests in different processes compare the same model."""
    first, again = make_torch_model("llama"), make_torch_model("llama")
    other = make_torch_model("llama", seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_saved_directory_serves_text_and_chat(tmp_path):
    """Tokenizer, chat template and end of text are there, and any text survives the round trip."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model("llama", tmp_path))
    assert (len(tokenizer), tokenizer.eos_token_id) == (VOCAB_SIZE, EOS_ID)
    text = 'Straße 24, "日本" 🙂\n\tend'
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|begin|><|turn|>user\nhi\n<|turn|>assistant\n"
