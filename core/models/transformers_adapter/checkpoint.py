"""Which class of transformers a checkpoint is of, and its weights in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quire.core.errors import CheckpointError, Reason, UnsupportedError
from quire.core.models.model_config import load_config, read_json, refuse_quantized
from quire.core.models.transformers_adapter.seeing import settle_direction

_MAX_LISTED = 12
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.gguf")


def read_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """The Hugging Face config, if it is one that may be used.

    Raises: CheckpointError, UnsupportedError.
    """
    raw = read_json(directory / "config.json")
    if "auto_map" in raw and not trust_remote_code and not _is_known(raw):
        raise CheckpointError(
            f"{directory} holds a model whose code comes with it ({raw['auto_map']}); nothing of "
            "it was run. Read that code, and pass --trust-remote-code if you trust it"
        )
    if not raw.get("model_type") and not raw.get("architectures"):
        raise CheckpointError(
            f"{directory / 'config.json'} names neither architectures nor a model_type; give the "
            "config.json that belongs to these weights"
        )
    refuse_quantized(raw, directory)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    settle_direction(config)
    return config


def _is_known(raw: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return raw.get("model_type") in CONFIG_MAPPING


def model_class_of(config: Any, directory: Path, *, trust_remote_code: bool) -> Any:
    """The class that generates text with this config.

    Raises: UnsupportedError if there is none.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if named is not None and hasattr(named, "generate") and _has_a_head(name):
            return _refuse_encoder_decoder(named, config, directory)
    mapped = AutoModelForCausalLM._model_mapping.get(type(config), None)  # noqa: SLF001 - no public way
    names = config.architectures or ()
    is_known = not names or any(hasattr(transformers, name) for name in names)
    if mapped is not None and is_known:
        return mapped
    if mapped is not None:
        # A class of somebody's own may compute something else of the same tensors.
        raise _unsupported(
            "architecture", ", ".join(names),
            f"no such class in transformers, whose {config.model_type} is another",
            "install the package that brings it, or correct config.json", directory,
        )  # fmt: skip
    if trust_remote_code and getattr(config, "auto_map", None):
        return None
    asked = ", ".join(names) or config.model_type
    raise _unsupported(
        "architecture", f"a causal language model in {asked}", _what_there_is(names),
        "give a checkpoint that generates text", directory,
    )  # fmt: skip


def _what_there_is(names: Sequence[str]) -> str:
    """In the place of a class that generates text."""
    import transformers

    found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if not found:
        return "no such class in transformers"
    if any(hasattr(one, "generate") for one in found):
        return "a class whose head is none of a causal language model"
    return "a class that generates no text"


def _has_a_head(name: str) -> bool:
    return name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "LMHead"))


def _refuse_encoder_decoder(model_class: Any, config: Any, directory: Path) -> Any:
    if getattr(config, "is_encoder_decoder", False) and "CausalLM" not in model_class.__name__:
        raise _unsupported(
            "encoder_decoder", f"the encoder of {model_class.__name__}",
            "decoder-only models in this adapter", "use a decoder-only model", directory,
        )  # fmt: skip
    return model_class


def make_empty_model(model_class: Any, config: Any) -> nn.Module:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    return model.eval()


def load_weights(
    directory: Path,
    model_class: Any,
    config: Any,
    *,
    dtype: str,
    trust_remote_code: bool,
    **arguments: Any,
) -> nn.Module:
    """The model with the checkpoint's weights, on the host.

    Reads safetensors (sharded, mapped), PyTorch files (weights alone, no code) and GGUF.
    `arguments`: further ones of the model's class.
    Raises: CheckpointError that names what is missing or misshaped, and the nearest there is.
    """
    from transformers import AutoModelForCausalLM

    found = [p for pattern in _WEIGHT_PATTERNS for p in sorted(directory.glob(pattern))]
    if not found:
        raise CheckpointError(
            f"{directory} has no *.safetensors, *.bin or *.gguf file; download the weights, or "
            "pass --load-format dummy"
        )
    settings: dict[str, Any] = {
        "config": config,
        "dtype": getattr(torch, dtype),
        "local_files_only": True,
        "output_loading_info": True,
        **arguments,
    }
    if all(path.suffix == ".gguf" for path in found):
        settings["gguf_file"] = found[0].name
    if model_class is None:
        model_class, settings["trust_remote_code"] = AutoModelForCausalLM, trust_remote_code
    try:
        model, report = model_class.from_pretrained(directory, **settings)
    # Files may be broken in any way, and each reader raises its own.
    except Exception as error:
        raise CheckpointError(
            f"the weights in {directory} cannot be loaded into {_name(model_class)}: {error}; "
            "download the model again, or give the config.json that belongs to these weights"
        ) from error
    _check(report, directory, model)
    loaded: nn.Module = model.eval()
    return loaded


def make_dummy_model(model_class: Any, config: Any, *, dtype: str, seed: int) -> nn.Module:
    """The model with the random weights that transformers starts a training from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = model_class(config).to(getattr(torch, dtype))
    return model.eval()


def _check(report: dict[str, Any], directory: Path, model: Any) -> None:
    """Raises CheckpointError if a tensor that the model needs is not there."""
    missing = sorted(report.get("missing_keys") or ())
    if not missing:
        return
    unexpected = sorted(report.get("unexpected_keys") or ())
    lines = [_missing_line(name, unexpected) for name in missing[:_MAX_LISTED]]
    more = len(missing) - len(lines)
    shown = "".join(f"\n    {line}" for line in lines)
    shown += f"\n    and {more} more" if more > 0 else ""
    raise CheckpointError(
        f"the weights in {directory} lack {len(missing)} tensors of {_name(type(model))}:{shown}\n"
        "Download the model again, or give the config.json that belongs to these weights."
    )


def _missing_line(name: str, unexpected: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(unexpected), n=1, cutoff=0.5)
    return f"{name}; the nearest there is: {near[0]}" if near else name


def _name(model_class: Any) -> str:
    return str(getattr(model_class, "__name__", model_class))


def _unsupported(code: str, need: str, have: str, remedy: str, directory: Path) -> UnsupportedError:
    reason = Reason(code=f"model.{code}", need=need, have=have, remedy=remedy)
    return UnsupportedError([reason], what=f"the checkpoint in {directory}")
