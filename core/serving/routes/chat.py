"""`POST /v1/chat/completions`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from quire.core.errors import RequestError
from quire.core.serving.answers.answers import AnswerHead
from quire.core.serving.answers.chat_answers import ChatWriter
from quire.core.serving.answers.generation import Generation
from quire.core.serving.answers.token_bytes import TokenBytes
from quire.core.serving.chat_audio import hear
from quire.core.serving.http.bodies import read_body
from quire.core.serving.http.disconnect import run_while_connected
from quire.core.serving.http.limits import check_limits
from quire.core.serving.http.sse import EventStream
from quire.core.serving.protocol.chat import ChatRequest, TemplateFields
from quire.core.serving.protocol.tools import NamedToolChoice, ToolChoice
from quire.core.serving.server_state import Names, Server, ServerState, make_names
from quire.core.serving.tools.plan import AnswerPlan
from quire.core.serving.tools.registry import Formats

router = APIRouter()


@dataclass(frozen=True, slots=True)
class ChatRun:
    """A conversation that the engine is answering."""

    generation: Generation
    """To be entered, or given to a stream as its owner: leaving it ends what has not ended."""
    writer: ChatWriter


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, server: Server) -> Response:
    """Answers a conversation."""
    body = await read_body(request, ChatRequest)
    server.check_model(body.model)
    run = await begin_chat(body, server, make_names(request, "chatcmpl", body.request_id))
    if body.is_streaming:
        chunks = run.writer.chunks(run.generation)
        wait_s = server.settings.keep_alive_s
        return EventStream(chunks, owner=run.generation, keep_alive_s=wait_s)
    async with run.generation:
        answer = await run_while_connected(request.receive, run.writer.whole(run.generation))
    return Response(answer.to_json(), media_type="application/json")


async def begin_chat(body: ChatRequest, server: ServerState, names: Names) -> ChatRun:
    """Submits a conversation, of this endpoint or translated from another one's form.

    Raises: RequestError naming the field; QueueFullError; EngineDeadError.
    """
    params = body.to_sampling_params(server.engine.default_sampling)
    check_limits(params, 1, settings=server.settings, config=server.engine.config)
    plan = plan_answer(body, server)
    prompt = await render(body, server)
    plan.apply(params, prompt)
    data = {"image": body.images, "audio": await hear(body.sounds, server.engine.config)}
    brought = {kind: given for kind, given in data.items() if given}
    shown = {"prompt": prompt, "multi_modal_data": brought} if brought else prompt
    generation = await Generation.begin(
        server.engine,
        server.metrics,
        [shown],
        params,
        request_id=names.engine_id,
        output_kind="delta" if body.is_streaming else "final",
        add_special_tokens=bool(body.add_special_tokens),
    )
    head = AnswerHead(id=names.answer_id, model=server.model_name)
    token_bytes = TokenBytes(server.engine.tokenizer)
    writer = ChatWriter(
        request=body,
        head=head,
        token_bytes=token_bytes,
        make_parser=(lambda: plan.parser(prompt)) if plan.is_reading else None,
    )
    return ChatRun(generation, writer)


def plan_answer(body: ChatRequest, server: ServerState) -> AnswerPlan:
    """What the request wants of tools and thoughts.

    Raises: RequestError for tools that the model may call by itself, where nobody knows how it
    writes calls.
    """
    body.check_template_fields()
    formats = server.formats
    if body.reasoning_effort not in (None, "none") and not formats.knows_reasoning_effort:
        raise RequestError(
            f"reasoning_effort is {body.reasoning_effort!r}; this model's chat template does not "
            "know it: leave it out",
            param="reasoning_effort",
        )
    tools = [tool.to_template() for tool in body.shown_tools]
    return replace(
        _plan_tools(body.tool_choice, tools, formats),
        is_parallel=body.parallel_tool_calls is not False,
        max_thinking_tokens=body.thinking_token_budget,
    )


def _plan_tools(
    choice: ToolChoice | None, tools: list[dict[str, Any]], formats: Formats
) -> AnswerPlan:
    if not tools:
        return AnswerPlan(formats=formats)
    if isinstance(choice, NamedToolChoice):
        named = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        return AnswerPlan(formats=formats, mode="named", tools=named)
    if choice == "required":
        return AnswerPlan(formats=formats, mode="required", tools=tools)
    if formats.tools is None:
        raise RequestError(
            "there are tools and the chat template does not tell how this model writes tool "
            "calls; set tool_choice to required, none or one tool, or start the server with "
            "--tool-call-parser",
            param="tool_choice",
        )
    return AnswerPlan(formats=formats, mode="auto", tools=tools)


async def render(body: TemplateFields, server: ServerState) -> str:
    """The prompt text of a conversation.

    Raises: RequestError for messages that the template refuses, and for a template of the client's
    own where the server does not trust one.
    """
    if body.chat_template is not None and not server.settings.trust_request_chat_template:
        raise RequestError(
            "chat_template in a request is a program, and this server runs only its own; "
            "start it with --trust-request-chat-template to allow it",
            param="chat_template",
        )
    body.check_template_fields()
    if body.images and "image" not in server.engine.facts.accepts:
        raise RequestError(
            f"the messages show images and {server.model_name!r} takes text alone",
            param="messages",
        )
    if body.sounds and "audio" not in server.engine.facts.accepts:
        raise RequestError(
            f"the messages bring sound and {server.model_name!r} takes none among its tokens",
            param="messages",
        )
    return await server.engine.render_chat(
        [message.to_template() for message in body.messages],
        tools=[tool.to_template() for tool in body.shown_tools] or None,
        chat_template=body.chat_template,
        add_generation_prompt=body.adds_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        template_variables=body.template_variables,
    )
