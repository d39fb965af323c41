"""The offline front: prompts in, texts out.

llm = LLM(model="demo")
for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from quire.core.config import EngineConfig
from quire.core.engine.chat import ChatRenderer, Message, split_conversations
from quire.core.engine.chat_images import shows_images, split_images
from quire.core.engine.client import CoreClient, InProcessClient, ProcessClient
from quire.core.engine.core import BuildCore, EngineCore
from quire.core.engine.facts import EngineStatistics
from quire.core.engine.familiar_settings import translate_settings
from quire.core.engine.features import ModelInput
from quire.core.engine.front import make_front
from quire.core.engine.input_processor import PreparedRequest, make_params
from quire.core.engine.interrupts import DeferredInterrupts
from quire.core.engine.llm_pooling import PoolingMethods
from quire.core.engine.output_state import OutputKind, Sink
from quire.core.engine.pooling import refuse_text
from quire.core.engine.progress import ProgressBar
from quire.core.engine.prompts import Prompt, parse_prompt, split_prompts
from quire.core.env import read_environment
from quire.core.errors import EngineDeadError, RequestError
from quire.core.outputs import RequestOutput
from quire.core.sampling_params import SamplingParams

ParamsLike = SamplingParams | Mapping[str, Any] | None
"""Sampling parameters, their fields as a dict, or None for the model's own defaults."""


class LLM(PoolingMethods):
    """A model, loaded and ready. Used from one thread; close it, or use it in a `with`."""

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        has_own_process: bool = False,
        build_core: BuildCore = EngineCore.build,
        **settings: Any,
    ) -> None:
        """`settings` are those of `EngineConfig`.

        `has_own_process` runs the core in another process.
        Raises: ConfigError, UnsupportedError with every reason, PluginError,
        CheckpointError, DeviceError.
        """
        if device == "auto":
            device = read_environment().device or device
        config = EngineConfig.from_user(
            model=model,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            **translate_settings(settings),
        )
        make_client = ProcessClient if has_own_process else InProcessClient
        self._client: CoreClient = make_client(config, build_core=build_core)
        try:
            self.config = self._client.config
            self.facts = self._client.facts
            front = make_front(self.config, self.facts, name_function=self._name_function)
            self._codec, self._inputs, self._outputs = front.codec, front.inputs, front.outputs
            self._front = front
            self._chat = (
                ChatRenderer(front.codec, self.config.chat_template) if front.codec else None
            )
        except BaseException:
            self._client.close()
            raise
        self._num_requests = 0
        self._functions: list[Any] = []

    # ------------------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: ParamsLike | Sequence[ParamsLike] = None,
        use_tqdm: bool = True,
        *,
        add_special_tokens: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """The outputs of one prompt or of each of a list, in order.

        One SamplingParams for all, or one for each. A request that fails alone has `error`
        set; the others are whole.
        Raises: RequestError before anything runs, if one of them is wrong; EngineDeadError.
        Ctrl-C ends what is in flight and leaves the engine usable.
        """
        requests = self._prepare_all(
            split_prompts(prompts),
            sampling_params,
            priority=priority,
            add_special_tokens=add_special_tokens,
        )
        return self._run(requests, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: ParamsLike | Sequence[ParamsLike] = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The answers to one conversation or to each of a list, in order.

        Raises: RequestError, also for a template that fails or runs too long;
        CheckpointError without a tokenizer.
        """
        self._inputs.require_codec()
        assert self._chat is not None, self.facts
        conversations, _ = split_conversations(messages)
        told = [split_images(one) if shows_images(one) else (one, []) for one in conversations]
        texts = [
            self._chat.render(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_variables=chat_template_kwargs,
            )
            for conversation, _ in told
        ]
        prompts = [
            {"prompt": text, "multi_modal_data": {"image": images}} if images else text
            for text, (_, images) in zip(texts, told, strict=True)
        ]
        return self.generate(prompts, sampling_params, use_tqdm, add_special_tokens=False)

    def stream(
        self, prompt: Prompt, sampling_params: ParamsLike = None, *, add_special_tokens: bool = True
    ) -> Iterator[RequestOutput]:
        """The output of one prompt as it comes, in deltas. Leaving the loop early ends the request.

        Raises: RequestError at once; EngineDeadError.
        """
        requests = self._prepare_all(
            [prompt], sampling_params, add_special_tokens=add_special_tokens
        )
        return self._stream(requests[0])

    # --------------------------------------------------------------------------- what it knows

    def get_tokenizer(self) -> Any:
        """The tokenizer of transformers.

        Raises: CheckpointError with the remedy if the model has none.
        """
        return self._inputs.require_codec().tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend (`generation_config.json`); used if none are given."""
        return make_params(None, self._inputs.defaults)

    def statistics(self) -> EngineStatistics:
        """Numbers of this moment. Raises: EngineDeadError."""
        return self._client.statistics()

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes. Raises: EngineDeadError."""
        return self._client.reset_prefix_cache()

    def warm_up(self) -> None:
        """Records now what is else recorded between steps, such as decode steps as graphs.

        Nobody needs to call this; who measures does, so that no figure holds a recording.
        Raises: EngineDeadError, DeviceLost.
        """
        self._client.finish_warm_up()

    def close(self) -> None:
        """Ends the engine and releases the device. Calling twice is harmless."""
        self._client.close()
        self._front.grammars.close()
        if self._chat is not None:
            self._chat.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --------------------------------------------------------------------------------- helpers

    def _prepare_all(
        self,
        prompts: Sequence[Prompt],
        params: ParamsLike | Sequence[ParamsLike],
        *,
        add_special_tokens: bool,
        priority: Sequence[int] | None = None,
    ) -> list[PreparedRequest]:
        refuse_text(self.facts.tasks, self.facts.served_model_name)
        many = _one_for_each(params, len(prompts), "sampling_params")
        priorities = _one_for_each(priority, len(prompts), "priority")
        checked = [make_params(one, self._inputs.defaults) for one in many]
        read = self._read_all(prompts, add_special_tokens=add_special_tokens)
        prepared = []
        for index, prompt in enumerate(prompts):
            try:
                self._front.check_grammar(checked[index])
                prepared.append(
                    self._inputs.prepare(
                        str(self._num_requests + index),
                        prompt,
                        checked[index],
                        priority=priorities[index],
                        model_input=read[index],
                    )
                )
            except RequestError as error:
                if len(prompts) == 1:
                    raise
                raise RequestError(f"prompt {index}: {error}", param=error.param) from error
        self._num_requests += len(prompts)
        return prepared

    def _read_all(self, prompts: Sequence[Prompt], *, add_special_tokens: bool) -> list[ModelInput]:
        parsed = [parse_prompt(prompt) for prompt in prompts]
        if self.facts.encoder_input is not None or not all(one.is_plain for one in parsed):
            return [self._inputs.read(one, add_special_tokens=add_special_tokens) for one in parsed]
        texts = [one.text or "" for one in parsed if one.token_ids is None]
        encoded = iter(
            self._inputs.require_codec().encode_all(texts, add_special_tokens=add_special_tokens)
            if texts
            else ()
        )
        return [
            ModelInput(token_ids=next(encoded) if one.token_ids is None else one.token_ids)
            for one in parsed
        ]

    def _run(self, requests: Sequence[PreparedRequest], *, use_tqdm: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        with (
            DeferredInterrupts() as interrupts,
            ProgressBar(len(requests), is_wanted=use_tqdm) as progress,
        ):

            def finish(output: RequestOutput) -> None:
                done[output.request_id] = output
                progress.advance(sum(len(one.token_ids) for one in output.outputs))

            try:
                self._add(requests, "final", finish)
                while len(done) < len(requests):
                    interrupts.check()
                    self._step()
            except BaseException:
                self._abandon(requests)
                raise
        return [done[request.request_id] for request in requests]

    def _stream(self, request: PreparedRequest) -> Iterator[RequestOutput]:
        waiting: deque[RequestOutput] = deque()
        is_finished = False
        try:
            self._add([request], "delta", waiting.append)
            while not is_finished:
                while not waiting:
                    with DeferredInterrupts():
                        self._step()
                output = waiting.popleft()
                is_finished = output.is_finished
                yield output
        finally:
            if not is_finished:
                self._abandon([request])

    def _add(self, requests: Sequence[PreparedRequest], kind: OutputKind, sink: Sink) -> None:
        for request in requests:
            self._outputs.add(request, kind, sink)
        self._client.add([spec for request in requests for spec in request.specs])

    def _step(self) -> None:
        to_abort = self._outputs.process(self._client.receive())
        if to_abort:
            self._client.abort(to_abort)

    def _abandon(self, requests: Sequence[PreparedRequest]) -> None:
        """Ends requests in the middle; nobody wants their outputs."""
        to_abort = self._outputs.abort([request.request_id for request in requests])
        try:
            self._client.abort(to_abort)
        except EngineDeadError:
            return  # whoever waits is told by the error that brought us here

    def _name_function(self, function: Any) -> str:
        """The name under which the worker knows a function; it is registered at its first use."""
        for index, known in enumerate(self._functions):
            if known is function:
                return f"function {index}"
        name = f"function {len(self._functions)}"
        self._client.register_logits_processor(name, function)
        self._functions.append(function)
        return name


def _one_for_each(value: Any, count: int, param: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise RequestError(
            f"{len(value)} {param} for {count} prompts; give one for each", param=param
        )
    return list(value)
