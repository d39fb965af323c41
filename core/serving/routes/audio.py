"""`POST /v1/audio/transcriptions` and `/v1/audio/translations`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, nullcontext
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from quire.core.engine.audio import (
    FALLBACK_TEMPERATURES,
    AudioClip,
    TranscriptionParams,
    TranscriptSegment,
)
from quire.core.engine.pooling import check_task
from quire.core.errors import RequestError
from quire.core.serving.answers import transcript_answers
from quire.core.serving.audio_files import read_audio
from quire.core.serving.http.disconnect import run_while_connected
from quire.core.serving.http.sse import EventStream
from quire.core.serving.protocol.audio import TranscriptionForm, TranslationForm
from quire.core.serving.server_state import Server, ServerState, make_names

router = APIRouter()

_MAX_FIELDS = 32


@router.post("/v1/audio/transcriptions")
async def create_transcription(request: Request, server: Server) -> Response:
    """What is said in a file, in the language in which it is said."""
    form, data = await _read(request)
    body = TranscriptionForm.model_validate(form)
    server.check_model(body.model)
    body.check()
    params = TranscriptionParams(
        language=body.language,
        prompt=body.prompt,
        temperature=body.temperature,
        fallback_temperatures=_fallback(body.temperature),
        timestamps=body.response_format in {"srt", "vtt", "verbose_json"},
        word_timestamps=body.tells_words,
    )
    return await _transcribe(request, server, body, params, data)


@router.post("/v1/audio/translations")
async def create_translation(request: Request, server: Server) -> Response:
    """What is said in a file, in English."""
    form, data = await _read(request)
    given = TranslationForm.model_validate(form)
    server.check_model(given.model)
    body = TranscriptionForm.model_validate(given.model_dump())
    params = TranscriptionParams(
        task="translate",
        prompt=body.prompt,
        temperature=body.temperature,
        fallback_temperatures=_fallback(body.temperature),
        timestamps=body.response_format in {"srt", "vtt", "verbose_json"},
    )
    return await _transcribe(request, server, body, params, data)


def _fallback(temperature: float) -> tuple[float, ...]:
    """As the API has it: at 0 the temperature rises where a window is not believed."""
    return () if temperature else FALLBACK_TEMPERATURES


async def _transcribe(
    request: Request,
    server: ServerState,
    body: TranscriptionForm,
    params: TranscriptionParams,
    data: bytes,
) -> Response:
    # Before anything is decoded.
    check_task("transcribe", server.engine.facts.tasks, server.model_name)
    clip = await asyncio.to_thread(read_audio, data)
    request_id = make_names(request, "audio", None).engine_id
    if body.stream:
        segments = server.engine.transcribe(clip, params, request_id)
        events = transcript_answers.events(segments, clip.duration_s)
        return EventStream(events, owner=nullcontext(), keep_alive_s=server.settings.keep_alive_s)
    work = _collect(server, clip, params, request_id)
    segments_found = await run_while_connected(request.receive, work)
    return _answer(body, params, segments_found, clip.duration_s)


async def _collect(
    server: ServerState, clip: AudioClip, params: TranscriptionParams, request_id: str
) -> list[TranscriptSegment]:
    async with aclosing(server.engine.transcribe(clip, params, request_id)) as segments:  # type: ignore[type-var]
        return [segment async for segment in segments]


def _answer(
    body: TranscriptionForm,
    params: TranscriptionParams,
    segments: list[TranscriptSegment],
    duration_s: float,
) -> Response:
    if body.response_format == "text":
        text = transcript_answers.text_of(segments) + "\n"
        return Response(text, media_type="text/plain")
    if body.response_format == "srt":
        return Response(transcript_answers.srt(segments), media_type="text/plain")
    if body.response_format == "vtt":
        return Response(transcript_answers.vtt(segments), media_type="text/vtt")
    if body.response_format == "json":
        plain = transcript_answers.plain(segments, duration_s)
        return Response(plain.to_json(), media_type="application/json")
    verbose = transcript_answers.verbose(
        segments,
        params,
        duration_s,
        tells_segments=body.tells_segments,
        tells_words=body.tells_words,
    )
    return Response(verbose.to_json(), media_type="application/json")


async def _read(request: Request) -> tuple[dict[str, Any], bytes]:
    """The fields of the form, lists by their bare names, and the bytes of its file.

    Raises: RequestError for what is no form, has no file or a field twice.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise RequestError("send the file as multipart/form-data", param="file")
    try:
        form = await request.form(max_files=1, max_fields=_MAX_FIELDS)
    except HTTPException as error:
        raise RequestError(f"the form is broken: {error.detail}", param="file") from error
    try:
        return _fields_of(form), await _file_of(form)
    finally:
        await form.close()


def _fields_of(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "file":
                raise RequestError(f"{name[:40]} is a file; send it as a field", param=name[:40])
        elif name.endswith("[]"):
            fields.setdefault(name.removesuffix("[]"), []).append(value)
        elif name in fields:
            raise RequestError(f"{name[:40]} is given twice", param=name[:40])
        else:
            fields[name] = value
    return fields


async def _file_of(form: FormData) -> bytes:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise RequestError("file is missing; send the sound as a file", param="file")
    return await file.read()
