"""The real engine on the device under test, with a small model: what level 3 drives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quire.conformance.oracles.model import TinyLlama
from quire.conformance.trial import Finding, Trial
from quire.conformance.truth import ModelTruth
from quire.core.config import EngineConfig
from quire.core.discovery import ChosenDevice
from quire.core.engine.core import EngineCore, StartTimer, start_core
from quire.core.engine.llm import LLM
from quire.core.errors import ConfigError, EngineDeadError
from quire.core.interface import Device, SamplingSpec
from quire.core.planning import Plan, PlannedEngine, make_plan
from quire.core.scheduler.request import RequestSpec, RequestUpdate

GREEDY = SamplingSpec(temperature=0.0)
_MAX_MODEL_LEN = 192
_ROOMY_BYTES = 1 << 24
_SPARE_BLOCKS = 4
_MAX_DOUBLINGS = 6


def dtype_of(trial: Trial) -> str:
    """The dtype that checks use where they do not name one."""
    claims = trial.capabilities
    shared = [name for name in claims.dtypes if name in claims.cache_dtypes]
    return "float32" if "float32" in shared else shared[0]


def model_of(trial: Trial) -> TinyLlama:
    """The model, of a head size that the device claims."""
    claimed = trial.capabilities.head_sizes
    return TinyLlama(head_size=32 if claimed is None or 32 in claimed else claimed[0])


def make_config(trial: Trial, dtype: str, **settings: Any) -> EngineConfig:
    """The engine's configuration on the device under test, within its buckets."""
    claims = trial.capabilities
    return EngineConfig(
        model=str(model_of(trial).save(trial.directory)),
        device=f"{trial.backend.name}:{trial.device.info.index}" if trial.backend else "tried",
        dtype=dtype,
        cache_dtype=dtype,
        **{
            "block_size": trial.block_size,
            "max_model_len": _MAX_MODEL_LEN,
            "max_num_seqs": min((8, *claims.request_buckets[-1:])),
            "max_num_batched_tokens": min((64, *claims.token_buckets[-1:])),
            "cache_memory_bytes": _ROOMY_BYTES,
            **settings,
        },
    )


def build_core(trial: Trial, config: EngineConfig) -> EngineCore:
    """An engine core for `config`, on the device opened anew; on this one where it stands alone."""
    device = trial.device
    if trial.backend is not None:
        device = trial.backend.open(trial.device.info.index)
    try:
        planned = _plan(trial, config, device)
    except BaseException:
        device.close()
        raise
    return start_core(planned, StartTimer())


def _plan(trial: Trial, config: EngineConfig, device: Device) -> PlannedEngine:
    chosen = ChosenDevice(
        name=config.device,
        backend=trial.backend,  # type: ignore[arg-type]  # not asked again: the device is open
        index=trial.device.info.index,
        info=trial.device.info,
        why="under test",
        considered=(),
    )
    plan, description = make_plan(config, model_of(trial).save(trial.directory), chosen, device)
    trial.provider = trial.provider or plan.kernels.get("paged_attention", "")
    return PlannedEngine(plan=plan, device=device, description=description)


@dataclass(slots=True, kw_only=True)
class Answer:
    """What became of one request."""

    spec: RequestSpec
    tokens: list[int] = field(default_factory=list)
    last: RequestUpdate | None = None
    """The update with which it ended."""


class TrialEngine:
    """An engine core and the answers to what it was asked."""

    def __init__(self, trial: Trial, core: EngineCore, dtype: str) -> None:
        self.core = core
        self.answers: dict[str, Answer] = {}
        self._trial = trial
        self._truth = ModelTruth(model_of(trial), dtype)

    def prompt(self, length: int) -> list[int]:
        """Random tokens."""
        return [
            int(t) for t in self._trial.rng.integers(4, model_of(self._trial).vocab_size, length)
        ]

    def ask(
        self, name: str, prompt: Sequence[int], max_tokens: int, sampling: SamplingSpec = GREEDY
    ) -> Answer:
        """Hands one request in."""
        spec = RequestSpec(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling=sampling,
            max_tokens=max_tokens,
        )
        self.answers[name] = Answer(spec=spec)
        self.core.add(spec)
        return self.answers[name]

    def step(self) -> None:
        """One step of the engine. Raises: Finding if a request fails or the engine dies."""
        try:
            updates = self.core.step()
        except EngineDeadError as error:
            raise Finding(
                f"the engine died in an ordinary step. {error.root_cause or error}"
            ) from error
        for update in updates:
            answer = self.answers[update.request_id]
            answer.tokens += update.new_token_ids
            answer.last = update if update.finish_reason else None
            if update.error:
                raise Finding(f"an ordinary request failed: {update.error}")

    def run(self) -> None:
        """Runs until nothing is left to do."""
        while self.core.has_work():
            self.step()

    def run_alone(
        self, prompt: Sequence[int], max_tokens: int, sampling: SamplingSpec = GREEDY
    ) -> list[int]:
        """The tokens of a request that has the engine to itself, without a cached prefix."""
        self.core.reset_prefix_cache()
        answer = self.ask(f"alone{len(self.answers)}", prompt, max_tokens, sampling)
        self.run()
        return answer.tokens

    def abort(self, names: Sequence[str]) -> None:
        """Ends requests."""
        for update in self.core.abort(names):
            self.answers[update.request_id].last = update

    def hold_empty(self, what: str) -> None:
        """No request and no block is held by anybody."""
        self.run()
        numbers = self.core.statistics()
        left = (numbers.num_running, numbers.num_waiting, numbers.cache_usage)
        self._trial.require(
            left == (0, 0, 0.0),
            f"{what}: {left[0]} requests run, {left[1]} wait and {left[2]:.1%} of the cache is "
            "held although every request has ended",
        )
        try:
            self.core.scheduler.check_integrity()
        except AssertionError as error:
            raise Finding(f"{what}: the engine's books do not add up: {error}") from error

    def hold_same(self, prompt: Sequence[int], got: list[int], alone: list[int], how: str) -> None:
        """Greedy tokens equal those of the request alone, but where rounding explains another."""
        if got == alone:
            return
        self._trial.require(
            len(got) == len(alone), f"{how}: {len(got)} tokens came instead of {len(alone)}"
        )
        at = next(i for i, (a, b) in enumerate(zip(got, alone, strict=True)) if a != b)
        behind, allowed = self._truth.behind([*prompt, *got[:at]], got[at])
        self._trial.require(
            behind <= allowed,
            f"{how}, a greedy request of {len(prompt)} tokens gave {got[at]} as output token {at}, "
            f"and {alone[at]} alone. The float64 model finds {got[at]} {behind:.3g} less likely "
            f"than the best (in log-probability); rounding explains {allowed:.3g}. What one "
            "request computes must not depend on the others, on blocks or on steps",
        )


@contextmanager
def trial_engine(trial: Trial, dtype: str | None = None, **settings: Any) -> Iterator[TrialEngine]:
    """A running engine; closed at the end, twice."""
    dtype = dtype or dtype_of(trial)
    core = build_core(trial, make_config(trial, dtype, **settings))
    try:
        yield TrialEngine(trial, core, dtype)
    finally:
        core.close()
        core.close()


@contextmanager
def tight_engine(trial: Trial) -> Iterator[TrialEngine]:
    """An engine whose cache holds little more than one request of full length."""
    dtype = dtype_of(trial)
    plan = _plan_alone(trial, make_config(trial, dtype))
    num_tokens = _MAX_MODEL_LEN + _SPARE_BLOCKS * trial.block_size
    wanted = num_tokens * sum(row.bytes_per_token for row in plan.cache)
    for _ in range(_MAX_DOUBLINGS):
        try:
            core = build_core(trial, make_config(trial, dtype, cache_memory_bytes=wanted))
            break
        except ConfigError:  # the device's own layout takes more than the bare numbers do
            wanted *= 2
    else:
        raise Finding(
            f"one request of {_MAX_MODEL_LEN} tokens does not fit into {wanted} bytes, many times "
            "what its keys and values take; is bytes_per_block right?"
        )
    try:
        yield TrialEngine(trial, core, dtype)
    finally:
        core.close()


def _plan_alone(trial: Trial, config: EngineConfig) -> Plan:
    return _plan(trial, config, trial.device).plan


@contextmanager
def trial_llm(trial: Trial, *, has_own_process: bool = False) -> Iterator[LLM]:
    """The offline front over an engine here, or in a process of its own."""
    config = make_config(trial, dtype_of(trial))
    names = ("block_size", "max_num_seqs", "max_num_batched_tokens", "cache_memory_bytes")
    settings = {name: getattr(config, name) for name in names}
    how: dict[str, Any] = {"has_own_process": True}
    if not has_own_process:
        how = {"build_core": lambda user: build_core(trial, user)}
    with LLM(
        model=config.model,
        device=config.device,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        cache_dtype=config.cache_dtype,
        **settings,
        **how,
    ) as llm:
        yield llm
