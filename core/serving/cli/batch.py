"""`quire batch`: a file of requests becomes a file of answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.core.config import EngineConfig
from quire.core.env import read_environment
from quire.core.errors import ConfigError
from quire.core.serving.cli.console import err
from quire.core.serving.cli.errors import FAILURE, require_extra
from quire.core.serving.cli.options import with_optional_engine_options

if TYPE_CHECKING:
    import httpx

    from quire.core.serving.batch.lines import AnswerFile

_URL_CONCURRENCY = 64
_BODY_BYTES = 1 << 30
"""A line of one's own file is as long as it is."""


@with_optional_engine_options
def batch(
    config: EngineConfig | None,
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Requests, one JSON object a line.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Answers; those that it holds are kept.")
    ],
    url: Annotated[str | None, typer.Option(help="A running server, instead of --model.")] = None,
    api_key: Annotated[str | None, typer.Option(help="For --url. Default: QUIRE_API_KEY.")] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Lines in flight. Default: --max-num-seqs; with --url 64."),
    ] = None,
    max_retries: Annotated[
        int, typer.Option(min=0, help="For lines that meet a full or absent server.")
    ] = 8,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again what an earlier run saw fail.")
    ] = False,
) -> None:
    """Answer a file of requests in the format of the OpenAI batch API, with or without a server.

    A run that was interrupted goes on where it stopped when the same command is given again. Ends
    with 1 if a line was refused or failed.
    """
    require_extra("bench", "httpx", "fastapi", "prometheus_client")
    if (config is None) == (url is None):
        raise ConfigError("give --model to answer the file here, or --url to send it to a server")
    from quire.core.serving.batch.lines import AnswerFile, check_lines

    ids = check_lines(source)
    with AnswerFile(output) as answers:
        answers.resume(ids, drops_failed=retry_failed)
        num_left = len(ids) - len(answers.done)
        if answers.done:
            err().print(f"{len(answers.done)} of {len(ids)} lines are answered", style="dim")
        if num_left:
            work = _Work(source, answers, num_left, concurrency, max_retries)
            asyncio.run(work.here(config) if config is not None else work.at(str(url), api_key))
        err().print(f"{len(ids)} lines, {answers.num_failed} failed: {output}", markup=False)
        if answers.num_failed:
            raise typer.Exit(FAILURE)


class _Work:
    """The lines that are left, and how they are to be sent."""

    def __init__(
        self,
        source: Path,
        answers: AnswerFile,
        num_left: int,
        concurrency: int | None,
        max_retries: int,
    ) -> None:
        self._source = source
        self._answers = answers
        self._num_left = num_left
        self._concurrency = concurrency
        self._max_retries = max_retries

    async def here(self, config: EngineConfig) -> None:
        """With an engine of this command's own, through the server's own code."""
        import httpx

        from quire.core.serving.cli.engine_run import started
        from quire.core.serving.http.app import make_app
        from quire.core.serving.settings import ServerSettings

        async with started(config) as engine:
            settings = ServerSettings(max_body_bytes=_BODY_BYTES, serve_playground=False)
            app = make_app(engine, settings)
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://quire", timeout=httpx.Timeout(None)
            ) as client:
                await self._run(client, self._concurrency or engine.config.max_num_seqs)

    async def at(self, url: str, api_key: str | None) -> None:
        """At a server."""
        import httpx

        key = api_key or read_environment().api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        count = self._concurrency or _URL_CONCURRENCY
        async with httpx.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=httpx.Timeout(None, connect=30.0),
            limits=httpx.Limits(max_connections=count),
        ) as client:
            await self._run(client, count)

    async def _run(self, client: httpx.AsyncClient, concurrency: int) -> None:
        from quire.core.engine.progress import ProgressBar
        from quire.core.serving.batch.lines import BatchAnswer, read_lines
        from quire.core.serving.batch.run import BatchRunner

        runner = BatchRunner(
            client=client,
            concurrency=min(concurrency, self._num_left),
            max_retries=self._max_retries,
        )
        done = frozenset(self._answers.done)
        left = (line for line in read_lines(self._source) if line.custom_id not in done)
        with ProgressBar(self._num_left, is_wanted=True) as bar:

            def keep(answer: BatchAnswer) -> None:
                self._answers.add(answer)
                bar.advance(_num_tokens(answer.body))

            await runner.run(left, keep)


def _num_tokens(body: Any) -> int:
    """What was written for a line, where its answer says so."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return 0
    return int(usage.get("completion_tokens") or usage.get("output_tokens") or 0)
