"""The configuration of an engine: built once, frozen, complete before the engine exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from quire.core.errors import ConfigError
from quire.core.interface.capabilities import Capabilities

TASKS = (
    "auto", "generate", "embed", "classify", "score", "reward", "token_embed", "token_classify",
)  # fmt: skip
"""What `EngineConfig.task` may be."""
_MAX_STREAM_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything a user can set. None and `auto` are filled in by `resolve`."""

    model: str
    """A local directory, a hub id, or `demo`."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; None: the model's."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    served_model_name: str | None = None
    """What clients call the model; None: `model` as given."""
    device: str = "auto"
    """A backend's name, `name:index`, or `auto`: the usable backend of highest priority."""
    dtype: str = "auto"
    """`auto`: the checkpoint's own where the device claims it, else the device's first."""
    cache_dtype: str = "auto"
    """`auto`: as `dtype`."""
    quantization: str | None = None
    deterministic: bool = False
    """Bitwise the same logits whatever the batch, chunking or prefix hit; refused where the device
    does not claim that."""
    load_format: str = "auto"
    """`auto` reads the files, `dummy` makes random weights of the configured shape."""
    model_impl: str = "auto"
    """Who runs the model: `native` (a family of Quire's own or of an installed package),
    `transformers` (its own code, with Quire's paged attention), `auto`: the first that knows it."""
    task: str = "auto"
    """What the model is for: `generate`, `embed`, `classify`, `score`, `reward`, `token_embed`,
    `token_classify`, or `auto`: what its checkpoint was made for."""
    trust_remote_code: bool = False
    """Whether code that comes with a checkpoint may run."""
    max_model_len: int | None = None
    """The most tokens that one request may have; None: what the model was made for."""
    block_size: int | None = None
    """Tokens in a cache block; None: the device's preferred."""
    max_num_seqs: int = 64
    """The most requests that run at once."""
    max_num_batched_tokens: int = 2048
    """The most tokens that one step computes."""
    max_num_queued: int | None = None
    """The most requests that wait; one more is refused. None: no limit."""
    scheduling_policy: str = "fcfs"
    """`fcfs`, or `priority` (a lower number goes first)."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    num_speculative_tokens: int = 0
    """The most tokens that a step guesses ahead for one request, looked up in its own text; what is
    said stays the same, and repetitive text comes faster. 0: none."""
    device_memory_fraction: float = 0.85
    """Of the memory that is free at start, what weights, activations and cache may take together.
    """
    cache_memory_bytes: int | None = None
    """The cache's size; None: measured."""
    overlap_scheduling: bool | None = None
    """Schedule a step while the one before it runs; None: where the device is asynchronous."""
    step_timeout_s: float | None = None
    """A step that takes longer counts as hung: the engine's process, or the worker's, ends with the
    reason. Needs a process of its own. None: no limit."""
    worker_process: bool = False
    """Whether the worker has a process of its own, so that a driver that crashes takes neither the
    engine core nor the caller with it."""
    seed: int = 0
    """From which the seeds of requests without one are drawn."""
    stream_interval_s: float = 0.03
    """The shortest time between two pieces of one stream: tokens in between come together, the
    first and the last at once. Many fast streams cost a server less so. 0: each as it is made."""
    num_threads: int | None = None
    """Threads for work on the host; None: the backend's choice."""
    logits_processors: Mapping[str, str] = field(default_factory=dict)
    """Name to `module:attribute` of custom logits processors."""
    chat_template: str | None = None
    """A Jinja template, or a file that holds one; None: the tokenizer's."""
    limit_mm_per_prompt: Mapping[str, int] = field(default_factory=dict)
    """The most that one prompt may bring, by kind; 16 images where nothing is said."""
    allowed_media_domains: tuple[str, ...] = ()
    """Names from which images may be fetched, with those under them; empty: any public one."""
    allow_private_media: bool = False
    """Whether images may be fetched from private networks and from this machine."""
    allowed_local_media_path: str | None = None
    """The folder under which `file:` addresses may be read; None: none may."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The backend's own, `name.key` to value."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def from_user(cls, **settings: Any) -> EngineConfig:
        """A config from keyword settings.

        Raises: ConfigError that names every unknown setting.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(
                f"unknown setting {', '.join(map(repr, unknown))}; "
                f"known are {', '.join(sorted(known))}"
            )
        return cls(**settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigChange:
    """One setting that `resolve` filled in or corrected."""

    setting: str
    asked: str
    given: str
    why: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.asked} -> {self.given} ({self.why})"


class ModelFacts(Protocol):
    """What `resolve` must know of a model, read before its weights."""

    @property
    def checkpoint_dtype(self) -> str:
        """As the files hold it."""

    @property
    def max_model_len(self) -> int:
        """What the model was made for."""

    @property
    def pooling(self) -> object | None:
        """What a model that makes numbers of texts does; None: it generates."""

    @property
    def needs_whole_prompts(self) -> bool:
        """Whether a prompt may not be cut into chunks, since tokens see later ones."""

    @property
    def sees_whole_prompts(self) -> bool:
        """Whether every token of a prompt sees all of it, so that no other prompt can share one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """A config in which nothing is left to choose, and how it came about."""

    config: EngineConfig
    changes: tuple[ConfigChange, ...]


def resolve(user: EngineConfig, capabilities: Capabilities, facts: ModelFacts) -> ResolvedConfig:
    """Fills in what the user left open and corrects what cannot be, each with its reason. Pure.

    What the user asked for by name and the device does not claim is left as it is: planning refuses
    it with the remedy.
    Raises: ConfigError if max_model_len exceeds what the model was made for.
    """
    changes: list[ConfigChange] = []
    given: dict[str, Any] = {}

    def change(setting: str, value: Any, why: str) -> Any:
        asked = getattr(user, setting)
        if asked != value:
            given[setting] = value
            changes.append(
                ConfigChange(setting=setting, asked=str(asked), given=str(value), why=why)
            )
        return value

    dtype = (
        user.dtype if user.dtype != "auto" else change("dtype", *_choose_dtype(capabilities, facts))
    )
    if user.cache_dtype == "auto":
        change("cache_dtype", *_choose_cache_dtype(capabilities, dtype))
    if user.block_size is None:
        change("block_size", capabilities.block_sizes[0], "the device's preferred")
    max_model_len = _max_model_len(user, facts)
    change("max_model_len", max_model_len, "what the model was made for")
    if facts.pooling is not None and user.max_num_batched_tokens < max_model_len:
        change("max_num_batched_tokens", max_model_len, "texts are computed whole")
    is_whole = not user.enable_chunked_prefill
    if facts.needs_whole_prompts:
        change("enable_chunked_prefill", False, "tokens see each other, later ones included")
        is_whole = True
    if facts.sees_whole_prompts:
        change("enable_prefix_caching", False, "every token of a prompt sees all of it")
    if is_whole and user.max_num_batched_tokens < max_model_len:
        change("max_num_batched_tokens", max_model_len, "prompts are computed whole")
    if capabilities.request_buckets and user.max_num_seqs > capabilities.request_buckets[-1]:
        change(
            "max_num_seqs", capabilities.request_buckets[-1], "the device's largest request bucket"
        )
    if capabilities.token_buckets and user.max_num_batched_tokens > capabilities.token_buckets[-1]:
        change(
            "max_num_batched_tokens",
            capabilities.token_buckets[-1],
            "the device's largest token bucket",
        )
    _resolve_overlap(user, capabilities, change)
    return ResolvedConfig(config=replace(user, **given), changes=tuple(changes))


def _choose_dtype(capabilities: Capabilities, facts: ModelFacts) -> tuple[str, str]:
    if facts.checkpoint_dtype in capabilities.dtypes:
        return facts.checkpoint_dtype, "the checkpoint's own"
    return capabilities.dtypes[
        0
    ], f"the device does not claim the checkpoint's {facts.checkpoint_dtype}"


def _choose_cache_dtype(capabilities: Capabilities, dtype: str) -> tuple[str, str]:
    if dtype in capabilities.cache_dtypes:
        return dtype, "as dtype"
    return capabilities.cache_dtypes[0], f"the device's cache does not take {dtype}"


def _max_model_len(user: EngineConfig, facts: ModelFacts) -> int:
    if user.max_model_len is None:
        return facts.max_model_len
    if user.max_model_len > facts.max_model_len:
        raise ConfigError(
            f"max_model_len {user.max_model_len} was asked for; the model was made for "
            f"{facts.max_model_len}: ask for no more"
        )
    return user.max_model_len


def _resolve_overlap(user: EngineConfig, capabilities: Capabilities, change: Any) -> None:
    if user.overlap_scheduling is None:
        why = (
            "the device is asynchronous"
            if capabilities.is_asynchronous
            else "the device is synchronous"
        )
        change("overlap_scheduling", capabilities.is_asynchronous, why)
    elif user.overlap_scheduling and not capabilities.is_asynchronous:
        change(
            "overlap_scheduling", False, "the device is synchronous: there is nothing to overlap"
        )


def _problems(config: EngineConfig) -> list[str]:
    problems = [
        f"{name} is {value}; it must be at least 1"
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "block_size",
            "max_num_queued",
            "num_threads",
            "cache_memory_bytes",
        )
        if (value := getattr(config, name)) is not None and value < 1
    ]
    if not 0.0 < config.device_memory_fraction <= 1.0:
        problems.append(
            f"device_memory_fraction is {config.device_memory_fraction}; it must be in (0, 1]"
        )
    if config.num_speculative_tokens < 0:
        problems.append(
            f"num_speculative_tokens is {config.num_speculative_tokens}; it must be at least 0"
        )
    if not 0.0 <= config.stream_interval_s <= _MAX_STREAM_INTERVAL_S:
        problems.append(
            f"stream_interval_s is {config.stream_interval_s}; it must be from 0 to "
            f"{_MAX_STREAM_INTERVAL_S:g}"
        )
    if config.step_timeout_s is not None and not config.step_timeout_s > 0:
        problems.append(f"step_timeout_s is {config.step_timeout_s}; it must be above 0")
    if config.scheduling_policy not in ("fcfs", "priority"):
        problems.append(
            f"scheduling_policy is {config.scheduling_policy!r}; choose fcfs or priority"
        )
    if config.load_format not in ("auto", "dummy"):
        problems.append(f"load_format is {config.load_format!r}; choose auto or dummy")
    if config.model_impl not in ("auto", "native", "transformers"):
        problems.append(f"model_impl is {config.model_impl!r}; choose auto, native or transformers")
    if config.task not in TASKS:
        problems.append(f"task is {config.task!r}; choose one of {', '.join(TASKS)}")
    if not config.model:
        problems.append("model is empty; give a directory, a hub id, or demo")
    return problems
