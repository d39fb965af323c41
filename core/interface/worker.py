"""The boundary: two plain records and the object that takes one and gives the other.

`StepBatch` goes down, `StepResult` comes up: host data, device-neutral, recordable to a file and
replayable on another backend. Nothing here knows torch.

A worker remembers the requests that it was given. A batch brings new ones whole (`NewRequest`),
names those that go on by id, and tells which to forget. A preempted request is forgotten; when it
resumes it comes as new, with all its tokens so far. Tokens that a worker samples it appends to the
request itself, so a decode step carries no token ids, and the next step can be scheduled before
this one is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from quire.core.interface.contract import check_contract
from quire.core.interface.errors import Reason, UnsupportedError

NULL_BLOCK = 0
"""The block that belongs to nobody: fills block tables where a group keeps nothing (before a
sliding window), and takes what padding tokens write. Never allocated.
"""


class SamplingSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a worker chooses a request's tokens. Numbers and ids only; text is the front's affair."""

    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    """Token number i of the output uses random number i of this seed, whatever else is in the
    batch.
    """
    min_tokens: int = 0
    """Until the output has so many tokens, `min_tokens_forbids` may not be chosen."""
    min_tokens_forbids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that may not be completed."""
    num_logprobs: int | None = None
    """None: no log-probabilities; n: of the chosen token and the n most likely."""
    num_prompt_logprobs: int | None = None
    logits_processors: tuple[str, ...] = ()
    """Names registered with the worker, applied in this order before penalties."""

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit is taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens already seen count against themselves."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )


class FeatureArray(msgspec.Struct, frozen=True, kw_only=True):
    """One array as plain data."""

    data: bytes
    """Elements in C order, little endian."""
    dtype: str
    """`float32`, `int64`, ..., as numpy names it."""
    shape: tuple[int, ...]


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """What a request brings besides its prompt: an image, sound, the text that an encoder reads."""

    kind: str
    """`image`, `audio`, `tokens`, as the model's input side calls it."""
    key: str
    """A cryptographic hash of the content: equal keys mean equal features."""
    num_tokens: int
    """How many tokens it stands for: placeholders of the prompt, or positions of an encoder."""
    offset: int | None = None
    """Where its placeholders begin in the prompt; None: it goes to the model's encoder."""
    arrays: dict[str, FeatureArray] = {}
    """What the model's code takes, by name. Empty where what it brought is in the cache already."""


class PoolingSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker makes of a request's text instead of tokens. The text is computed whole."""

    task: str
    """`embed`, `classify`, `score`, `token_embed`, `token_classify`, `reward`."""
    dimensions: int | None = None
    """Of a vector, its first so many; normalized again."""
    use_activation: bool = True
    """Vectors as the model normalizes them, probabilities instead of logits."""
    token_type_ids: list[int] = []
    """One for each token, for a model that reads two texts at once; empty: all 0."""


class PooledNumbers(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What came of one text."""

    shape: list[int]
    """[n], or [tokens, n]."""
    data: bytes
    """float32, little endian, row by row."""


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that the worker has not seen, or has forgotten."""

    request_id: str
    token_ids: list[int]
    """The prompt and, for a resumed request, its output so far."""
    num_prompt_tokens: int
    """Where the output begins in `token_ids`."""
    num_computed_tokens: int
    """Tokens whose keys and values are in the cache already (a prefix hit)."""
    block_ids: list[list[int]]
    """For each cache group, all blocks of the request so far, this step's included."""
    sampling: SamplingSpec
    pooling: PoolingSpec | None = None
    """Given: nothing is sampled; the step that ends the text answers in `StepResult.pooled`."""
    features: list[Feature] = []
    """In the order in which they come; those of an encoder run in the request's first step."""


class StepBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One step of work: columns with one entry for each scheduled request."""

    step_id: int
    """Counts up by one."""
    finished_request_ids: list[str]
    """To forget before anything else: finished, aborted or preempted since the last step."""
    new_requests: list[NewRequest]
    """Brought whole; each is also scheduled below."""
    request_ids: list[str]
    num_new_tokens: list[int]
    """Tokens to compute, at least 1 each."""
    num_computed_tokens: list[int]
    """Tokens in the cache before this step."""
    new_block_ids: list[list[list[int]] | None]
    """For each cache group, blocks to append to the request's table; None: none (and for new
    requests).
    """
    samples: list[bool]
    """Whether this step reaches the request's last token, so that a token is to be sampled."""
    token_masks: dict[str, bytes] = {}
    """For requests that sample under a grammar: the tokens that may follow, as little-endian 32-bit
    words; bit i % 32 of word i // 32 is set where token i may. ceil(vocab_size / 32) words.
    """

    draft_token_ids: dict[str, list[int]] = {}
    """For some requests that sample: guesses of what follows their last token, which
    `num_new_tokens` counts. The worker samples after the last token and after each guess, and
    answers with its own tokens up to and with the first that differs from the guess, or with one
    more than the guesses if none does: the same tokens as without guesses. Of the slots of refused
    guesses nothing is kept. Never for requests with log-probabilities, a token mask, or sampling
    that depends on their output so far (penalties, bad_words, min_tokens, custom processors), and
    never ahead of the result. Only for devices that claim the feature `speculation`.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(self.num_new_tokens)


class PositionLogprobs(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Log-probabilities at one position."""

    token_id: int
    """The token that stands there."""
    logprob: float
    rank: int
    """1: the most likely."""
    top_ids: list[int]
    """The most likely tokens, best first."""
    top_logprobs: list[float]


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one step brought; columns in the order of the batch's `request_ids`."""

    step_id: int
    sampled_token_ids: list[list[int]]
    """Empty where nothing was sampled; several where a speculation was accepted."""
    logprobs: list[list[PositionLogprobs] | None] | None = None
    """One for each sampled token, where asked; None: nobody asked."""
    prompt_logprobs: dict[str, list[PositionLogprobs]] = {}
    """For the prompt tokens that this step computed, of those who asked: entry i is about the token
    after position num_computed_tokens + i, as far as the prompt goes.
    """
    pooled: dict[str, PooledNumbers] = {}
    """Of requests with `pooling` whose text ended in this step."""
    errors: dict[str, str] = {}
    """Requests that failed alone (NaN logits, a custom processor that raised), and why.

    Others are unharmed.
    """


class CacheGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that share one block table, since they need the same of the cache."""

    name: str
    """`full`, `sliding_4096`."""
    kind: str
    """As in `AttentionSpec.kind`."""
    window: int | None
    block_size: int
    num_layers: int
    bytes_per_block: int
    """Of all the group's layers together."""
    max_tokens: int | None = None
    """For `cross`: the most encoder tokens of one request. Its blocks follow these, not the
    request's own tokens, are filled by the request's first step and never change.
    """


class CachePlan(msgspec.Struct, frozen=True, kw_only=True):
    """How many blocks each group gets, block 0 included.

    In the order of `ModelInfo.cache_groups`.
    """

    num_blocks: list[int]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine must know of a loaded model."""

    architecture: str
    vocab_size: int
    max_model_len: int
    """The most tokens that a request may have, as loaded."""
    cache_groups: list[CacheGroup]
    num_parameters: int
    weight_bytes: int
    dtype: str
    providers: dict[str, str] = {}
    """Operator to who serves it."""
    implementation: str = "native"
    """Who runs the model: `native`, `transformers`, or the package that brings it."""
    tasks: list[str] = msgspec.field(default_factory=lambda: ["generate"])
    """What it does; a model that hears has `transcribe`."""
    labels: list[str] = []
    """Of a model that classifies, by index."""
    vector_size: int = 0
    """Of a model that makes vectors: how many numbers one has."""
    encoder_input: str | None = None
    """What a request must bring for the model's encoder, as `Feature.kind`; None: it has none."""
    accepts: list[str] = []
    """What a prompt may bring besides text, as `Feature.kind`."""
    source_steps: list[int] = []
    """Of an encoder that makes more tokens of more sound: stride, offset and multiple, of which
    n frames of its input make (n // multiple + offset) // stride tokens."""


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is built with; complete and resolved."""

    model: str
    """A local directory."""
    dtype: str
    cache_dtype: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    device_memory_fraction: float
    cache_memory_bytes: int | None = None
    """Given: the cache's size, nothing is measured."""
    load_format: str = "auto"
    """`auto`: from the files; `dummy`: random weights."""
    model_impl: str = "auto"
    """Who runs the model: `native`, `transformers`, or `auto`: the first that knows it."""
    task: str = "auto"
    """What the model is for: `generate`, a task of `PoolingSpec`, or `auto`: what it was made for.
    """
    trust_remote_code: bool = False
    """Whether code that comes with a checkpoint may run."""
    quantization: str | None = None
    deterministic: bool = False
    """A request's logits must be bitwise the same whatever the batch, chunking or prefix hit."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    logits_processors: dict[str, str] = {}
    """Name to `module:attribute` of custom logits processors."""
    options: dict[str, str] = {}
    """The backend's own, `vendor.name` to value."""
    num_threads: int | None = None
    """Of the host, for a device that computes with them; None: the device chooses."""


class PendingStep(ABC):
    """A step that was submitted."""

    @abstractmethod
    def result(self) -> StepResult:
        """Waits for the step and returns its result; the same at each call.

        Raises: DeviceOutOfMemory (the step did not happen; the worker lives on), DeviceLost,
        DeviceError.
        """


class CompletedStep(PendingStep):
    """A step that was done when it was submitted."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        """The result."""
        return self._result


class Worker(ABC):
    """Runs steps on one device.

    Used by one thread. Calls come in the order: load_model, cache_budget_bytes, allocate_cache,
    warm_up, then execute or submit until close.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_contract(cls, Worker)

    @abstractmethod
    def load_model(self) -> ModelInfo:
        """Loads the weights and says what the layers need of the cache.

        Raises: CheckpointError, UnsupportedError, DeviceOutOfMemory.
        """

    @abstractmethod
    def cache_budget_bytes(self) -> int:
        """Bytes that the cache may take, beside weights and the measured peak of a step."""

    @abstractmethod
    def allocate_cache(self, plan: CachePlan) -> None:
        """Allocates the blocks of each group.

        Raises: DeviceOutOfMemory.
        """

    def warm_up(self) -> None:  # noqa: B027 - optional
        """Runs what the first real steps would otherwise wait for.

        Compilation, capture, the largest batch.
        """

    def warm_up_more(self) -> bool:
        """Does one more piece of what `warm_up` left for later; whether there are others.

        Called after `warm_up`, in moments that no request waits for, also with steps in flight,
        which it changes nothing of. Until then steps run without it, slower and with the same
        results. What it finds no memory for is left out, and said.
        Raises: DeviceLost.
        """
        return False

    @abstractmethod
    def execute(self, batch: StepBatch) -> StepResult:
        """Runs one step and waits for it.

        Raises: DeviceOutOfMemory (the step did not happen, the worker lives on), DeviceLost,
        DeviceError.
        """

    def submit(self, batch: StepBatch) -> PendingStep:
        """Starts one step.

        Steps complete in the order of submission. By default it is done on return.
        """
        return CompletedStep(self.execute(batch))

    def copy_blocks(self, group: int, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies blocks of one cache group on the device, in all its layers."""
        raise UnsupportedError([_not_offered("copy_blocks")], what="copying blocks")

    def export_blocks(self, group: int, block_ids: Sequence[int]) -> bytes:
        """Blocks of one group in the canonical layout.

        float32, little endian, [layers, n, block_size, Hk, D + Dv].
        """
        raise UnsupportedError([_not_offered("export_blocks")], what="exporting blocks")

    def import_blocks(self, group: int, block_ids: Sequence[int], blocks: bytes) -> None:
        """Writes blocks that another worker exported."""
        raise UnsupportedError([_not_offered("import_blocks")], what="importing blocks")

    def sleep(self, level: int) -> None:
        """Gives memory back: 1 drops the cache and keeps weights on the host, 2 drops both."""
        raise UnsupportedError([_not_offered("sleep")], what="sleep")

    def wake(self) -> None:
        """Undoes `sleep`; the cache is empty afterwards."""
        raise UnsupportedError([_not_offered("wake")], what="wake")

    def load_adapter(self, name: str, path: str) -> None:
        """Loads a LoRA adapter under `name`."""
        raise UnsupportedError([_not_offered("adapters")], what="loading an adapter")

    def unload_adapter(self, name: str) -> None:
        """Drops an adapter."""
        raise UnsupportedError([_not_offered("adapters")], what="unloading an adapter")

    def health(self) -> None:  # noqa: B027 - optional
        """Returns if the worker can run steps. Raises: DeviceLost."""

    def memory_by_tag(self) -> dict[str, int]:
        """Bytes held by `weights`, `cache`, `activations`, ..., where known."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Releases everything. Calling twice is harmless."""


def _not_offered(what: str) -> Reason:
    return Reason(
        code=f"worker.{what}",
        need=what,
        have="a worker without it",
        remedy="use a backend whose capabilities claim it",
    )
