"""Models that see, in transformers' own code: images become rows among the embeddings of tokens.

The vision tower runs once for each distinct image. Its rows go to the places of its placeholders as
far as a step computes them, so that a chunk may end in the middle of an image. Positions in three
rows (Qwen's M-RoPE) are computed once for each prompt; the output goes on from the largest.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quire.core.errors import QuireError
from quire.core.models.encoder_cache import EncodedImage, EncoderCache
from quire.core.models.step_images import RequestImages, feature_tensor
from quire.core.models.transformers_adapter.both_ways import Span
from quire.core.models.transformers_adapter.text_model import RunOutput, use_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.core.interface.worker import Feature
    from quire.core.models.step_context import StepContext
    from quire.core.models.transformers_adapter.text_model import TextModel

_CACHE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """How a family of models sees."""

    language_model: str = "language_model"
    """The attribute of the body that takes embeddings; empty: the body itself."""
    has_grid: bool = False
    """Whether positions are three rows, by the grids of the images."""
    is_bidirectional: bool = False
    """Whether the tokens of an image see each other, later ones included."""
    sees_whole_prompt: bool = False
    """Whether all tokens of a prompt see each other, later ones included."""
    first_position: int = 0
    """Of a prompt's first token."""
    mark_table: str = ""
    """The attribute of the body that embeds the marks around images; empty: marks are tokens.

    Its last rows stand for the tokens of `visual_indicator_token_ids`, in prompts with images.
    """
    sees_cached: bool = False
    """Whether images are placed too where requests run with a cache of transformers' own."""
    embedders: tuple[str, ...] = ()
    """Attributes of the body that embed the ids from their `vocab_offset` on, each its own."""
    has_layer_inputs: bool = False
    """Whether the language model takes rows for each layer besides, which it makes of ids."""
    needs_torchvision: bool = False
    """Whether its images are prepared by torchvision alone; without it the model reads text."""
    projector: str = ""
    """The attribute of the body that makes rows of the tower's output; empty: the tower does."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """The tokens of a step as a language model takes them."""

    embeddings: Tensor
    """[T, H], images in their places."""
    positions: Tensor
    """int64 [1, T], or [3, 1, T] where images have grids."""
    arguments: dict[str, Any]
    """What the language model takes besides."""


SIGHTS = {
    "llava": Sight(),
    "qwen2_vl": Sight(has_grid=True),
    "qwen2_5_vl": Sight(has_grid=True),
    "qwen3_vl": Sight(has_grid=True),
    "qwen3_vl_moe": Sight(has_grid=True),
    "glm4v": Sight(has_grid=True),
    "glm4v_moe": Sight(has_grid=True),
    "glm46v": Sight(has_grid=True),
    "exaone4_5": Sight(),
    "video_llama_3": Sight(),
    "deepseek_vl": Sight(),
    "gemma3": Sight(is_bidirectional=True),
    "idefics3": Sight(language_model="text_model"),
    "smolvlm": Sight(language_model="text_model"),
    "idefics2": Sight(language_model="text_model"),
    "vipllava": Sight(),
    "llava_next": Sight(),
    "internvl": Sight(),
    "aya_vision": Sight(),
    "mistral3": Sight(),
    "lighton_ocr": Sight(),
    "qianfan_ocr": Sight(),
    "llava_next_video": Sight(),
    "hyperclovax_vision_v2": Sight(),
    "paddleocr_vl": Sight(has_grid=True),
    "aria": Sight(),
    "janus": Sight(),
    "chameleon": Sight(language_model=""),
    "deepseek_vl_hybrid": Sight(),
    "cohere_compass": Sight(has_grid=True),
    "llava_onevision": Sight(),
    "video_llava": Sight(),
    "ovis2": Sight(mark_table="visual_embeddings_table"),
    "glm_ocr": Sight(has_grid=True),
    "glmga": Sight(has_grid=True),
    "cosmos3_omni": Sight(has_grid=True),
    "granite_docling": Sight(language_model="text_model"),
    "lfm3_vl": Sight(sees_cached=True),
    "llama4": Sight(projector="multi_modal_projector", needs_torchvision=True),
    "lfm2_vl": Sight(sees_cached=True, needs_torchvision=True),
    "cohere2_vision": Sight(needs_torchvision=True),
    "kimi_k25": Sight(needs_torchvision=True),
    "gemma3n": Sight(embedders=("embed_vision", "embed_audio"), has_layer_inputs=True),
    "minimax_m3_vl": Sight(needs_torchvision=True),
    "muse_glimmer": Sight(needs_torchvision=True),
    "step3p7": Sight(needs_torchvision=True),
    "perception_lm": Sight(needs_torchvision=True),
    "fast_vlm": Sight(),
    "qwen3_5": Sight(has_grid=True, sees_cached=True),
    "qwen3_5_moe": Sight(has_grid=True, sees_cached=True),
    "paligemma": Sight(sees_whole_prompt=True, first_position=1),
}
"""By `model_type`: the families whose images were held against transformers' own generation."""


def sight_of(config: Any) -> Sight | None:
    """How a model of this config sees; None: it takes text alone, here or anywhere."""
    if all(getattr(config, name, None) is None for name in ("vision_config", "vq_config")):
        return None
    sight = SIGHTS.get(config.model_type)
    if sight is not None and sight.needs_torchvision and not find_spec("torchvision"):
        return None
    return sight


def settle_direction(config: Any) -> None:
    """Has a model whose prompts see themselves whole run texts causally; changes `config`.

    So its own runs of a text agree however it is cut, which the self-check asks, and the prompts
    of requests are answered as spans of tokens that see each other.
    """
    sight = sight_of(config)
    if sight is not None and sight.sees_whole_prompt:
        config.get_text_config(decoder=True).use_bidirectional_attention = False


class Eyes:
    """The seeing side of one loaded model."""

    def __init__(self, text_model: TextModel, sight: Sight) -> None:
        self.sight = sight
        self.cache = EncoderCache(_CACHE_BYTES)
        self._body = text_model.body
        self._language_model = language_model_of(text_model, sight)
        self._image_token_id = int(text_model.model.config.image_token_id)
        self.is_cut_by_windows = sight.is_bidirectional and _cuts_spans(text_model.model)

    def run(self, step: StepContext) -> Tensor:
        """Rows [T, H] of a step, images in their places."""
        seen = self.look(step)
        output = self._language_model(
            inputs_embeds=seen.embeddings.unsqueeze(0),
            position_ids=seen.positions,
            use_cache=False,
            **seen.arguments,
        )
        hidden: Tensor = output[0][0]
        return hidden

    def run_cached(self, seen: Seen, rows: slice, cache: Any) -> RunOutput:
        """Rows of one request of a step, with transformers' own cache of what is before them."""
        if seen.arguments:
            raise QuireError("rows of images in several layers need the paged way; report this")
        output = self._language_model(
            inputs_embeds=seen.embeddings[rows].unsqueeze(0),
            position_ids=seen.positions[..., rows],
            past_key_values=cache,
            use_cache=True,
        )
        return RunOutput(hidden=output[0][0], cache=output.past_key_values)

    def look(self, step: StepContext) -> Seen:
        """What the language model takes for the tokens of a step."""
        embeddings = self._embed(step)
        is_image = torch.zeros(len(embeddings), dtype=torch.bool, device=embeddings.device)
        deep: list[Tensor] = []
        for request in step.images:
            for feature in request.features:
                self._place(request, feature, embeddings, is_image, deep)
        arguments: dict[str, Any] = {}
        if deep:
            arguments["visual_pos_masks"] = is_image.unsqueeze(0)
            arguments["deepstack_visual_embeds"] = [layer[is_image] for layer in deep]
        if self.sight.has_layer_inputs:
            ids = step.token_ids.unsqueeze(0)
            arguments["per_layer_inputs"] = self._language_model.get_per_layer_inputs(ids)
        return Seen(embeddings=embeddings, positions=self._positions(step), arguments=arguments)

    def spans(self, request: RequestImages) -> list[tuple[int, int]]:
        """Where tokens of a request see each other, of the tokens that this step computes.

        Raises: QuireError if a step ends in the middle of one, which the engine never asks for.
        """
        begin, end = request.num_computed, request.num_computed + request.num_new
        if self.sight.sees_whole_prompt:
            found = [(0, len(request.prompt_ids))]
        elif self.sight.is_bidirectional:
            found = _runs(self._all_places(request))
        else:
            return []
        spans = [span for span in found if span[0] < end > begin]
        spans = [span for span in spans if span[1] > begin]
        if any(stop > end for _, stop in spans):
            raise QuireError(
                "a step ends in the middle of tokens that see each other; run the model with "
                "enable_chunked_prefill=False"
            )
        return spans

    # --- parts ----------------------------------------------------------------------------------

    def _embed(self, step: StepContext) -> Tensor:
        table = self._body.get_input_embeddings()
        # A placeholder may have an id past the table's end.
        ids = step.token_ids.clamp(max=table.weight.shape[0] - 1)
        embeddings: Tensor = table(ids).clone()
        for name in self.sight.embedders:
            embedder = getattr(self._body, name)
            own = step.token_ids - embedder.vocab_offset
            rows = (own >= 0) & (own < embedder.vocab_size)
            embeddings[rows] = embedder(step.token_ids[rows]).to(embeddings.dtype)
        if self.sight.mark_table:
            self._embed_marks(step, embeddings)
        return embeddings

    def _embed_marks(self, step: StepContext, embeddings: Tensor) -> None:
        """Writes the rows of the marks around images, of requests that show some."""
        marks = list(self._body.visual_indicator_token_ids)
        table = getattr(self._body, self.sight.mark_table).weight[-len(marks) :]
        for request in step.images:
            rows = slice(request.begin, request.begin + request.num_new)
            for mark, row in zip(marks, table, strict=True):
                embeddings[rows][step.token_ids[rows] == mark] = row

    def _place(
        self,
        request: RequestImages,
        feature: Feature,
        embeddings: Tensor,
        is_image: Tensor,
        deep: list[Tensor],
    ) -> None:
        """Writes the rows of one image as far as the step computes its placeholders."""
        places = self._places(request, feature)
        first, end = request.num_computed, request.num_computed + request.num_new
        low, high = np.searchsorted(places, [first, end]).tolist()
        if low < high:
            image = self.cache.get(
                feature.key, request.memo, lambda: self._encode(feature, embeddings)
            )
            if len(image.rows) != len(places):
                raise QuireError(
                    f"the vision tower made {len(image.rows)} rows of an image with {len(places)} "
                    "placeholders; the processor and the model of this checkpoint do not agree"
                )
            rows = torch.from_numpy(places[low:high] - first + request.begin).to(embeddings.device)
            embeddings[rows] = image.rows[low:high]
            is_image[rows] = True
            deep += [torch.zeros_like(embeddings) for _ in image.deep_rows[len(deep) :]]
            for layer, added in zip(deep, image.deep_rows, strict=False):
                layer[rows] = added[low:high]
        if len(places) and end > places[-1]:
            self.cache.let_go(feature.key, request.memo)

    def _encode(self, feature: Feature, like: Tensor) -> EncodedImage:
        arrays = {}
        for name, array in feature.arrays.items():
            tensor = feature_tensor(array).to(like.device)
            arrays[name] = tensor.to(like.dtype) if tensor.is_floating_point() else tensor
        output = self._body.get_image_features(**arrays, return_dict=True)
        deep = tuple(_flat(layer) for layer in getattr(output, "deepstack_features", None) or ())
        rows = _flat(self._projected(output)).to(like.dtype)
        return EncodedImage(rows=rows, deep_rows=deep)

    def _projected(self, output: Any) -> Any:
        """What the tower returns, in the width of the language model."""
        if not self.sight.projector:
            return output.pooler_output
        return getattr(self._body, self.sight.projector)(_flat(output.last_hidden_state))

    def _places(self, request: RequestImages, feature: Feature) -> Any:
        """int64 [n]: where the placeholders of an image stand in the prompt."""
        name = f"places@{feature.offset}"
        if name not in request.memo:
            begin = feature.offset or 0
            span = np.asarray(request.prompt_ids[begin : begin + feature.num_tokens], np.int64)
            request.memo[name] = np.flatnonzero(span == self._image_token_id) + begin
        return request.memo[name]

    def _all_places(self, request: RequestImages) -> Any:
        found = [self._places(request, feature) for feature in request.features]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def _positions(self, step: StepContext) -> Tensor:
        """int64 [1, T], or [3, 1, T] where images have grids."""
        if not self.sight.has_grid:
            return step.positions.unsqueeze(0) + self.sight.first_position
        positions = step.positions.expand(3, -1).clone()
        for request in step.images:
            own = self._grid_positions(request).to(positions.device)
            positions[:, request.begin : request.begin + request.num_new] = own
        return positions.unsqueeze(1)

    def _grid_positions(self, request: RequestImages) -> Tensor:
        """int64 [3, num_new]: of the prompt by its grids, of the output one after the other."""
        if "positions" not in request.memo:
            request.memo["positions"] = self._prompt_positions(request)
        prompt, delta = request.memo["positions"]
        begin, end = request.num_computed, request.num_computed + request.num_new
        num_prompt = prompt.shape[1]
        later = torch.arange(max(begin, num_prompt), max(end, num_prompt)) + delta
        return torch.cat([prompt[:, begin:end], later.expand(3, -1)], dim=1)

    def _prompt_positions(self, request: RequestImages) -> tuple[Tensor, int]:
        ids = torch.tensor(list(request.prompt_ids), dtype=torch.int64).unsqueeze(0)
        kinds = torch.zeros_like(ids, dtype=torch.int32)
        kinds[0, torch.from_numpy(self._all_places(request))] = 1
        grids = [
            feature_tensor(f.arrays["image_grid_thw"]).reshape(-1, 3) for f in request.features
        ]
        positions, delta = self._body.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=torch.cat(grids)
        )
        return positions[:, 0], int(delta[0, 0])


def language_model_of(text_model: TextModel, sight: Sight) -> Any:
    """The module that takes embeddings."""
    return (
        getattr(text_model.body, sight.language_model) if sight.language_model else text_model.body
    )


def use_text_attention(text_model: TextModel, sight: Sight, name: str) -> None:
    """The language model alone names this attention; the vision tower keeps its own."""
    use_attention(language_model_of(text_model, sight), name)


def spans_of(eyes: Eyes, images: Sequence[RequestImages]) -> list[Span]:
    """All spans of a step whose tokens see each other."""
    return [
        Span(
            begin=request.begin,
            num_computed=request.num_computed,
            first=first,
            end=end,
            block_ids=request.block_ids,
            is_cut_by_windows=eyes.is_cut_by_windows,
        )
        for request in images
        for first, end in eyes.spans(request)
    ]


def _cuts_spans(model: Any) -> bool:
    """Whether windows of this model hold between the tokens of one image as well.

    transformers changed this for Gemma 3: a module that makes the masks of images by
    `create_masks_for_vision_model` has the window hide them too, an earlier one has not.
    """
    return hasattr(sys.modules[type(model).__module__], "create_masks_for_vision_model")


def _flat(rows: Any) -> Tensor:
    """[n, H] of a tensor [..., H], or of a sequence of them."""
    if isinstance(rows, Tensor):
        return rows.reshape(-1, rows.shape[-1])
    return torch.cat([_flat(part) for part in rows])


def _runs(places: Any) -> list[tuple[int, int]]:
    """Unbroken runs of increasing numbers, as (first, end)."""
    if not len(places):
        return []
    cuts = np.flatnonzero(np.diff(places) > 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(places, cuts)]
