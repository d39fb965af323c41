"""`quire chat`: a conversation in the terminal, or with a pipe."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.core.config import EngineConfig
from quire.core.errors import RequestError
from quire.core.serving.cli.console import err, show_error
from quire.core.serving.cli.engine_run import describe
from quire.core.serving.cli.generate import stream_text
from quire.core.serving.cli.options import with_engine_options, with_sampling_options

if TYPE_CHECKING:
    from quire.core.engine.async_engine import AsyncEngine
    from quire.core.sampling_params import SamplingParams

_HELP = "/exit ends, /reset forgets the conversation, Ctrl-C stops an answer"


@dataclass(slots=True)
class Conversation:
    """The turns so far."""

    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """What the template is given."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns]

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.turns.clear()


@with_sampling_options
@with_engine_options
def chat(
    config: EngineConfig,
    sampling: dict[str, Any],
    system: Annotated[str | None, typer.Option(help="What the system says first.")] = None,
) -> None:
    """Talk to a model: /exit ends, /reset forgets. Lines from a pipe are answered in turn."""
    from quire.core.engine.async_engine import AsyncEngine
    from quire.core.sampling_params import SamplingParams

    SamplingParams.from_user(**sampling)  # a wrong one is told before the model is loaded
    # One loop, run piecewise: while a person types nothing else has to happen, and Ctrl-C reaches
    # the answer that is running or the line that is typed.
    with asyncio.Runner() as runner:
        console = err()
        begun_s = time.monotonic()
        with console.status(f"loading {config.model}"):
            engine = runner.run(AsyncEngine.start(config))
        try:
            console.print(
                describe(engine, time.monotonic() - begun_s),
                style="dim",
                markup=False,
                soft_wrap=True,
            )
            console.print(_HELP, style="dim")
            defaults = {"max_tokens": None, **engine.default_sampling}
            params = SamplingParams.from_user(**{**defaults, **sampling})
            _converse(runner, engine, params, Conversation(system))
        finally:
            runner.run(engine.shutdown())


def _converse(
    runner: asyncio.Runner, engine: AsyncEngine, params: SamplingParams, talk: Conversation
) -> None:
    number = 0
    while (line := _next_line()) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            talk.reset()
            continue
        if line == "/help":
            err().print(_HELP, style="dim")
            continue
        if not line:
            continue
        number += 1
        talk.turns.append({"role": "user", "content": line})
        try:
            answer = runner.run(_answer(engine, params, talk, f"chat-{number}"))
            talk.turns.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:
            talk.turns.pop()
        except RequestError as error:
            talk.turns.pop()
            show_error(error)
        sys.stdout.write("\n")
        sys.stdout.flush()


async def _answer(
    engine: AsyncEngine, params: SamplingParams, talk: Conversation, request_id: str
) -> str:
    prompt = await engine.render_chat(talk.messages())
    return await stream_text(engine, prompt, params, request_id, add_special_tokens=False)


def _next_line() -> str | None:
    """The next line of the user, stripped; None at the end. A prompt is shown to people only."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401 - gives input() a history and arrow keys

            return input("> ").strip()
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        return None
    return line.strip() if line else None
