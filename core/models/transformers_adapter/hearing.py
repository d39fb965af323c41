"""Models that hear among their tokens, in transformers' own code: sound becomes rows among them.

What a sound becomes is asked of the model's own forward: it runs on the sound's placeholders, and
stops where it would hand the embeddings to its language model. So each family joins encoder and
projector as it does in its own generation, whatever it calls them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quire.core.errors import QuireError, Reason, UnsupportedError
from quire.core.models.encoder_cache import EncodedImage, EncoderCache
from quire.core.models.step_images import feature_tensor
from quire.core.models.transformers_adapter.seeing import Eyes, Sight, sight_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.core.interface.worker import Feature
    from quire.core.models.transformers_adapter.text_model import TextModel

_CACHE_BYTES = 512 << 20
HEARS = frozenset({"audioflamingo3", "glmasr", "musicflamingo", "qwen2_audio", "qwen3_asr"})
"""By `model_type`: the families whose sound was held against transformers' own generation."""


def hearing_of(config: Any) -> Sight | None:
    """How a model of this config takes sound among its tokens; None: it takes none."""
    if config.model_type not in HEARS or getattr(config, "has_lora_adapter", False):
        # An adapter that speaks for sound alone would be needed in some steps and not in others.
        return None
    return None if getattr(config, "audio_token_id", None) is None else Sight()


def refuse_sound_at_each_token(model: Any) -> None:
    """Raises UnsupportedError if a model adds a piece of sound to every token that it makes."""
    _refuse_several_ids_at_each_place(model)
    takes = inspect.signature(model.forward).parameters
    if "encoder_inputs_embeds" not in takes or getattr(model.config, "is_encoder_decoder", False):
        return
    reason = Reason(
        code="model.sound",
        need=f"{type(model).__name__} adds sound to every token, its own output included",
        have="sound that stands for tokens of the prompt; no text without sound is its own",
        remedy="use a model that hears its prompt",
    )
    raise UnsupportedError([reason], what=f"running {type(model).__name__}")


def _refuse_several_ids_at_each_place(model: Any) -> None:
    """Raises UnsupportedError if a model's embeddings want more than one id for each token.

    Beside each token of text such a model hears codes of sound, which fill further places.
    """
    try:
        embed = model.get_input_embeddings()
    # Models without one may say so in any way.
    except Exception:
        return
    if not isinstance(embed, nn.Module) or isinstance(embed, nn.Embedding):
        return
    if all(_embeds_one_by_one(embed, n) for n in (5, 7)):
        return
    reason = Reason(
        code="model.sound",
        need=f"{type(model).__name__} reads several ids at each place, codes of sound among them",
        have="one id at each place, of one vocabulary",
        remedy="use a model that hears its prompt",
    )
    raise UnsupportedError([reason], what=f"running {type(model).__name__}")


def _embeds_one_by_one(embed: nn.Module, length: int) -> bool:
    """Whether ids [1, n] become rows [1, n, H]; what takes something else beside them passes."""
    weight = next(embed.parameters(), None)
    if weight is None:
        return True
    try:
        with torch.no_grad():
            rows = embed(torch.zeros((1, length), dtype=torch.int64, device=weight.device))
    except RuntimeError:
        return False
    except (TypeError, AttributeError):
        return True
    return not isinstance(rows, Tensor) or (rows.ndim == 3 and rows.shape[:2] == (1, length))


def senses_of(config: Any, accepts: Sequence[str]) -> tuple[type[Eyes], Sight | None]:
    """Who reads what the prompts of a model bring besides text, and how; None: nobody."""
    if "audio" in accepts:
        return Ears, hearing_of(config)
    return Eyes, sight_of(config) if accepts else None


class Ears(Eyes):
    """The hearing side of one loaded model: as `Eyes`, with sound for images."""

    def __init__(self, text_model: TextModel, sight: Sight) -> None:
        self.sight = sight
        self.cache = EncoderCache(_CACHE_BYTES)
        self._body = text_model.body
        self._language_model = getattr(text_model.body, sight.language_model)
        self._image_token_id = int(text_model.model.config.audio_token_id)
        self._takes = set(inspect.signature(text_model.body.forward).parameters)
        self.is_cut_by_windows = False

    def _encode(self, feature: Feature, like: Tensor) -> EncodedImage:
        """Rows [n, H] that the model's own forward writes over `n` placeholders."""
        arrays: dict[str, Any] = {}
        for name, array in feature.arrays.items():
            if name in self._takes:
                tensor = feature_tensor(array).to(like.device)
                arrays[name] = tensor.to(like.dtype) if tensor.is_floating_point() else tensor
        ids = torch.full(
            (1, feature.num_tokens), self._image_token_id, dtype=torch.int64, device=like.device
        )
        taken: list[Tensor] = []

        def stop(module: Any, given: Any, named: dict[str, Any]) -> None:
            del module, given
            taken.append(named["inputs_embeds"])
            raise _Heard

        hook = self._language_model.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._body(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **arrays
            )
        except _Heard:
            return EncodedImage(rows=taken[0][0].to(like.dtype), deep_rows=())
        finally:
            hook.remove()
        raise QuireError("the model did not hand its embeddings on; report this architecture")

    def _places(self, request: Any, feature: Feature) -> Any:
        """int64 [n]: where the placeholders of a sound stand, which have no gaps."""
        begin = feature.offset or 0
        return np.arange(begin, begin + feature.num_tokens)


class _Heard(Exception):  # noqa: N818 - no error: the rows are known, the rest need not run
    """The language model would begin."""
