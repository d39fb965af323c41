"""A model that makes numbers of texts, before its weights."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from quire.core.errors import Reason, UnsupportedError
from quire.core.models.description import ModelDescription, PoolingDescription
from quire.core.models.model_config import dtype_of
from quire.core.models.pooling.layout import VectorLayout, read_layout
from quire.core.models.transformers_adapter.checkpoint import make_empty_model, read_config

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_WITHOUT_LENGTH = 8192
_SEQUENCE, _TOKENS = "ForSequenceClassification", "ForTokenClassification"
_OF_HEADS = ("classify", "score", "reward", "token_classify")


def model_class_of(config: Any, directory: Path, task: str) -> Any:
    """The class of transformers that answers `task` with this checkpoint.

    Raises: UnsupportedError if there is none.
    """
    import transformers

    name = (config.architectures or [""])[0]
    named = getattr(transformers, name, None)
    has_head = name.endswith((_SEQUENCE, _TOKENS))
    if task in _OF_HEADS and not has_head:
        raise _unsupported(directory, f"a head for {task}", name or config.model_type)
    if has_head and named is not None and task not in ("embed", "token_embed"):
        return named
    if getattr(config, "is_encoder_decoder", False):
        if named is None or not name.endswith("EncoderModel"):
            raise _unsupported(directory, "one stack of layers", f"{name} with two")
        return named
    body = transformers.AutoModel._model_mapping.get(type(config), None)  # noqa: SLF001 - no public way
    if body is None:
        raise _unsupported(directory, "a body without a head", name or config.model_type)
    return body[0] if isinstance(body, tuple) else body


def describe_pooling(
    directory: Path, *, task: str = "auto", trust_remote_code: bool = False
) -> ModelDescription:
    """Describes the model in `directory` from its JSON files and a model without weights.

    Raises: CheckpointError, UnsupportedError.
    """
    config = read_config(directory, trust_remote_code=trust_remote_code)
    if not hasattr(config.get_text_config(decoder=True), "vocab_size"):
        raise _unsupported(directory, "a model of texts", f"{config.model_type}, which reads none")
    model = make_empty_model(without_pooler(model_class_of(config, directory, task)), config)
    return describe_model_class(model, config, layout_of(model, config, directory))


def without_pooler(model_class: Any) -> Any:
    """The class without the layers on the first token, which vectors do not use."""
    arguments = pooler_arguments(model_class)
    return functools.partial(model_class, **arguments) if arguments else model_class


def pooler_arguments(model_class: Any) -> dict[str, Any]:
    """What leaves these layers out, where a class has them."""
    parameters = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def layout_of(model: Any, config: Any, directory: Path) -> VectorLayout:
    """How the model's rows become a vector."""
    return read_layout(directory, default_mode="last" if is_causal(model, config) else "mean")


def is_causal(model: Any, config: Any) -> bool:
    """Whether a token sees no later one; without a word on it, a model that can generate."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        return False
    kind = type(config)
    masked, causal = AutoModelForMaskedLM._model_mapping, AutoModelForCausalLM._model_mapping  # noqa: SLF001
    return kind in causal and kind not in masked


def describe_model_class(model: Any, config: Any, layout: VectorLayout) -> ModelDescription:
    """The description of a model whose modules are there, with weights or without."""
    text_config = config.get_text_config(decoder=True)
    hidden_size = int(
        getattr(text_config, "hidden_size", 0) or getattr(text_config, "d_model", 0) or 1
    )
    inner = int(getattr(text_config, "intermediate_size", 0) or 4 * hidden_size)
    name = type(model).__name__
    pooling = _pooling(name, config, layout, hidden_size)
    dtype = dtype_of(config)
    parameters = {id(p): p.numel() for p in model.parameters()}
    return ModelDescription(
        architecture=name,
        checkpoint_dtype=dtype,
        dtype=dtype,
        cache_dtype=dtype,
        vocab_size=int(text_config.vocab_size),
        max_model_len=_max_length(model, text_config, layout),
        hidden_size=hidden_size,
        num_layers=int(getattr(text_config, "num_hidden_layers", 1)),
        num_parameters=sum(parameters.values()),
        attention_groups=(),
        ops=(),
        eos_token_ids=(),
        row_elements=12 * hidden_size + 3 * inner,
        implementation="transformers",
        pooling=pooling,
        tasks=pooling.tasks,
        notes=(_note(pooling, layout),),
    )


def _pooling(name: str, config: Any, layout: VectorLayout, hidden_size: int) -> PoolingDescription:
    num_labels = int(getattr(config, "num_labels", 0) or 0)
    names = getattr(config, "id2label", None) or {}
    labels = tuple(str(names.get(index, f"LABEL_{index}")) for index in range(num_labels))
    if name.endswith(_TOKENS):
        return PoolingDescription(tasks=("token_classify",), labels=labels)
    if name.endswith(_SEQUENCE):
        tasks = ("classify", "score", "reward") if num_labels == 1 else ("classify",)
        return PoolingDescription(tasks=tasks, labels=labels)
    return PoolingDescription(
        tasks=("embed", "token_embed"), vector_size=layout.vector_size(hidden_size)
    )


def _note(pooling: PoolingDescription, layout: VectorLayout) -> str:
    if not pooling.vector_size:
        return f"it does {', '.join(pooling.tasks)}: texts are computed whole, without a KV cache"
    normalized = ", normalized" if layout.is_normalized else ""
    return (
        f"a vector of {pooling.vector_size} is the {' and '.join(layout.modes)} of a text's rows"
        f"{normalized}; texts are computed whole, without a KV cache"
    )


def _max_length(model: Any, config: Any, layout: VectorLayout) -> int:
    """What positions there are for, less those that stand for padding, and what authors foresaw."""
    named = [getattr(config, name, None) for name in _LENGTHS]
    lengths = [n for n in named if isinstance(n, int) and n > 0][:1] or [_WITHOUT_LENGTH]
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.endswith("position_embeddings"):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            lengths.append(module.num_embeddings - offset)
    if layout.max_length is not None:
        lengths.append(layout.max_length)
    return min(lengths)


def _unsupported(directory: Path, need: str, have: str) -> UnsupportedError:
    reason = Reason(
        code="model.pooling", need=need, have=have,
        remedy="choose another --task, or a checkpoint that was made for it",
    )  # fmt: skip
    return UnsupportedError([reason], what=f"the checkpoint in {directory}")
