"""From a conversation to a prompt."""

from __future__ import annotations

import asyncio
from typing import Any

from kubeinfer.api.protocol import ChatCompletionRequest, TokenizeRequest
from kubeinfer.api.state import ServerState
from kubeinfer.errors import NotSupportedError, OptionError, RequestError
from kubeinfer.text.chat_template import ChatTemplate

# A longer conversation is rendered in a thread, so that streams go on meanwhile.
_LONG_TEXT = 20_000  # characters


async def render_chat(state: ServerState, body: ChatCompletionRequest | TokenizeRequest) -> dict[str, Any]:
    """The prompt as the engine takes it. Raises :class:`RequestError` naming the message that cannot be used."""
    messages = body.messages or []
    for index, message in enumerate(messages):
        if message.get("tool_calls") or message.get("function_call"):
            raise NotSupportedError("Tool calls are not supported yet.", f"messages[{index}].tool_calls")
    own = body.chat_template is not None
    if own and not state.options.trust_request_chat_template:
        raise RequestError(
            "chat_template comes with the request, and this server renders such only with --trust-request-chat-template.",
            "chat_template",
        )
    size = sum(len(m["content"]) for m in messages if isinstance(m.get("content"), str))
    if own or size > _LONG_TEXT:
        text = await asyncio.to_thread(_render, state, body, messages)
    else:
        text = _render(state, body, messages)
    # The template writes the special tokens itself.
    return {"prompt": text, "add_special_tokens": bool(body.add_special_tokens)}


def _render(
    state: ServerState, body: ChatCompletionRequest | TokenizeRequest, messages: list[dict[str, Any]]
) -> str:
    final = bool(body.continue_final_message)
    template = state.chat
    if body.chat_template is not None:
        try:
            template = ChatTemplate(body.chat_template, template.special_tokens, template.content_format)
        except OptionError as exc:
            raise RequestError(str(exc), "chat_template") from None
    return template.render(
        messages,
        add_generation_prompt=not final if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=final,
        documents=getattr(body, "documents", None),
        chat_template_kwargs=body.chat_template_kwargs,
    )


def response_role(state: ServerState, body: ChatCompletionRequest) -> str:
    """The role of the answer: the continued message's own, else ``--response-role``."""
    if body.add_generation_prompt is False or body.continue_final_message:
        return str(body.messages[-1]["role"])
    return state.options.response_role


def final_text(body: ChatCompletionRequest) -> str:
    """The last message's text, which ``echo`` puts before the answer."""
    content = body.messages[-1].get("content")
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    return content or ""
