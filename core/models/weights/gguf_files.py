"""Weights of a GGUF file by the names and in the order that native families have them.

Source: the format's description in the ggml project; F32 to K-quants are widened by the `gguf`
package, and Q8_0 and Q4_0, whose blocks the contract's record can say, stay codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.core.errors import CheckpointError
from quire.core.interface.quantization import QuantizedWeight
from quire.core.models.weights.checkpoint_files import CheckpointFiles, StoredTensor
from quire.core.models.weights.gguf_architectures import Metadata, architecture_of
from quire.core.models.weights.weight_layout import TensorShape

GGUF_NAME = "weights.gguf"
"""In the directory that stands for a GGUF file."""
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""What the config says as well."""
_BLOCK = 32
"""Inputs that share a scale in Q8_0 and Q4_0."""


def open_reader(path: Path) -> Any:
    """A reader of the file, which maps it.

    Raises: CheckpointError without the gguf package, or if the file is none of its.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{path} is read through the gguf package, which is not installed; "
            "install it with `pip install gguf`, or give a directory with *.safetensors"
        ) from error
    try:
        return GGUFReader(path)
    # The reader looks no further than what it needs: broken bytes fail in any way.
    except Exception as error:
        raise CheckpointError(
            f"{path} is no GGUF file, or truncated ({error}); download it again"
        ) from error


class GgufFiles(CheckpointFiles):
    """The tensors of one GGUF file.

    Raises: CheckpointError if the file cannot be read.
    """

    def __init__(self, path: Path, rename: Callable[[str], str | None]) -> None:
        self._directory = path.parent
        metadata = Metadata(open_reader(path), path)
        self._known = architecture_of(metadata)
        heads = int(metadata.own("attention.head_count"))
        kv = int(metadata.own("attention.head_count_kv", heads))
        self._heads = {"attn_q": heads, "attn_k": kv}
        self._tensors = metadata.tensors
        self._expert_of: dict[str, int] = {}
        self._stored = {}
        for name in self._tensors:
            if name not in _IGNORED:
                self._store(path, name, rename)

    def _store(self, path: Path, name: str, rename: Callable[[str], str | None]) -> None:
        """Notes a tensor, or those of the experts that lie in it."""
        standard = standard_gguf_name(name, self._known.names)
        shape = tuple(int(size) for size in reversed(self._tensors[name].shape))
        if "{expert}" not in standard:
            # A matrix of one row is stored as a vector.
            shape = (1, *shape) if standard.endswith("shared_expert_gate.weight") else shape
            ours = rename(standard)
            if ours is not None:
                self._stored[ours] = StoredTensor(path, name, shape)
            return
        for expert in range(shape[0]):
            ours = rename(standard.format(expert=expert))
            if ours is not None:
                self._stored[ours] = StoredTensor(path, name, shape[1:])
                self._expert_of[ours] = expert

    def read(self, tensor: TensorShape) -> Tensor:
        """One tensor; float32 where it is stored in anything but float16."""
        import gguf

        name = self._stored[tensor.name].name
        stored = self._tensors[name]
        expert = self._expert_of.get(tensor.name)
        data = stored.data if expert is None else stored.data[expert]
        try:
            numbers = gguf.dequantize(data, stored.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(f"{name} cannot be widened: {error}") from error
        content = torch.from_numpy(np.array(numbers, copy=True)).view(tensor.shape)
        if self._known.norm_offset and name.endswith("norm.weight"):
            content = content - self._known.norm_offset
        return self._in_order(name, content)

    def read_quantized(
        self, tensor: TensorShape, formats: Collection[str]
    ) -> QuantizedWeight | None:
        """A weight of Q8_0 or Q4_0 as codes; None: it is stored in another type."""
        name = self._stored[tensor.name].name
        stored = self._tensors[name]
        known = {"Q8_0": ("int8", _q8_0), "Q4_0": ("int4", _q4_0)}
        format_name, decode = known.get(stored.tensor_type.name, ("", None))
        if decode is None or format_name not in formats or tensor.name in self._expert_of:
            return None
        blocks = torch.from_numpy(np.array(stored.data, copy=True))
        blocks = blocks.view(tensor.shape[0], tensor.shape[1] // _BLOCK, -1)
        scales = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(-1)
        bits, codes = decode(blocks[:, :, 2:])
        return QuantizedWeight(
            bits=bits,
            group_size=_BLOCK,
            num_inputs=tensor.shape[1],
            codes=self._in_order(name, codes.flatten(1)).contiguous(),
            scales=self._in_order(name, scales).contiguous(),
            scheme=stored.tensor_type.name.lower(),
        )

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Rows as rotary embeddings by halves want them: GGUF has a Llama's in turn."""
        matched = _LAYER.fullmatch(name)
        heads = self._heads.get(matched[2]) if matched and self._known.is_in_turn else None
        if heads is None:
            return rows
        in_turn = rows.reshape(heads, -1, 2, *rows.shape[1:])
        return in_turn.transpose(1, 2).flatten(0, 2)


def standard_gguf_name(name: str, own_names: Mapping[str, str]) -> str:
    """A tensor's name as Hugging Face's checkpoints have it; what is not known keeps its own.

    `own_names`: of an architecture, in a layer.
    """
    if matched := _LAYER.fullmatch(name):
        layer, part, kind = matched.groups()
        ours = own_names.get(part, _IN_LAYER.get(part, part))
        return f"model.layers.{layer}.{ours}.{kind}"
    part, _, kind = name.rpartition(".")
    return f"{_TOP.get(part, part)}.{kind}"


def _q8_0(blocks: Tensor) -> tuple[int, Tensor]:
    """Signed bytes, moved up by half their range."""
    return 8, blocks ^ 128


def _q4_0(blocks: Tensor) -> tuple[int, Tensor]:
    """The low halves hold the first 16 inputs and the high ones the last."""
    codes = torch.cat((blocks & 15, blocks >> 4), dim=-1)
    return 4, codes[:, :, 0::2] | codes[:, :, 1::2] << 4
