"""Chat messages to a prompt, by the model's Jinja template.

Templates see what transformers' ``apply_chat_template`` gives them (sandboxed environment, ``raise_exception``,
``strftime_now``, a plain ``tojson``, loop controls, ``generation`` blocks, the special tokens by role), so a template
written for it renders the same here, without importing transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kubeinfer.errors import OptionError, RequestError
from kubeinfer.text.tokenizer import Tokenizer

ContentFormat = Literal["auto", "string", "openai"]
Messages = Sequence[Mapping[str, Any]]

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_TAG = "\u2063kubeinfer-continues-here\u2063 "  # a space at its end shows whether the template trims
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's part for training; to a prompt it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=64)
def _compile(source: str) -> tuple[jinja2.Template, bool]:
    """The template, and whether it walks over a message's content parts itself."""
    environment = _environment()
    return environment.from_string(source), _walks_content(environment.parse(source))


def _walks_content(tree: jinja2.nodes.Template) -> bool:
    names: set[str] = set()

    def is_content(node: jinja2.nodes.Node) -> bool:
        if isinstance(node, jinja2.nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, jinja2.nodes.Getitem):
            return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
        if isinstance(node, jinja2.nodes.Filter) and node.node is not None:
            return is_content(node.node)
        return isinstance(node, jinja2.nodes.Name) and node.name in names

    for assign in tree.find_all(jinja2.nodes.Assign):
        if isinstance(assign.target, jinja2.nodes.Name) and is_content(assign.node):
            names.add(assign.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))


def read_chat_template(value: str) -> str:
    """The template that ``--chat-template`` names: a file's text, or the value itself if it is a template."""
    try:
        path = Path(value)
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        if not any(char in value for char in "{}\n"):
            raise OptionError(f"chat_template: {value!r} cannot be read ({exc}).", "chat_template") from None
    if any(char in value for char in "{}\n"):
        return value
    raise OptionError(
        f"chat_template: {value!r} is neither a file that exists nor a Jinja template; give the template's path.",
        "chat_template",
    )


class ChatTemplate:
    """A chat template ready to render. ``source`` is None where the model has none.

    Raises :class:`OptionError` on creation where the template's syntax is wrong.
    """

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, str] | None = None,
        content_format: ContentFormat = "auto",
    ):
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.content_format: ContentFormat = content_format
        if source is not None:
            try:
                _compile(source)
            except jinja2.TemplateSyntaxError as exc:
                raise OptionError(
                    f"chat_template: line {exc.lineno}: {(exc.message or '').rstrip('.')}. Give a template that is right with "
                    "--chat-template.",
                    "chat_template",
                ) from None

    @classmethod
    def for_tokenizer(
        cls, tokenizer: Tokenizer, chat_template: str | None = None, content_format: ContentFormat = "auto"
    ) -> ChatTemplate:
        """The template of ``chat_template`` (a file or the template itself), else the tokenizer's own."""
        source = (
            read_chat_template(chat_template) if chat_template else tokenizer.chat_templates.get("default")
        )
        return cls(source, tokenizer.special_tokens, content_format)

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Encode it with ``add_special_tokens=False``: the template writes the special tokens itself.

        Raises :class:`RequestError` naming the field for messages that cannot be rendered.
        """
        if self.source is None:
            raise RequestError(
                "this model has no chat template; start the server with --chat-template FILE, or use completions "
                "with a prompt of your own.",
                "messages",
            )
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be true; set add_generation_prompt to false.",
                "continue_final_message",
            )
        template, walks = _compile(self.source)
        parts = self.content_format == "openai" or (self.content_format == "auto" and walks)
        chat = [_message(message, index, parts) for index, message in enumerate(messages)]
        if not chat:
            raise RequestError("messages must hold at least one message.", "messages")
        if continue_final_message:
            _mark(chat[-1])
        variables: dict[str, Any] = {**self.special_tokens, **(chat_template_kwargs or {})}
        for name in _RESERVED:
            if name in (chat_template_kwargs or {}):
                raise RequestError(f"chat_template_kwargs cannot set {name!r}.", "chat_template_kwargs")
        try:
            text = template.render(
                **variables,
                messages=chat,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as exc:
            raise RequestError(
                f"the chat template refuses these messages: {exc.message or exc}", "messages"
            ) from None
        except RecursionError:
            raise RequestError("the chat template nests too deep for these messages.", "messages") from None
        except (
            Exception
        ) as exc:  # a template is a program: it may fail in any way on a message it did not expect
            raise RequestError(
                f"the chat template failed on these messages: {type(exc).__name__}: {exc}", "messages"
            ) from None
        return _cut(text) if continue_final_message else text


def _message(message: Mapping[str, Any], index: int, as_parts: bool) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content.", where)
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise RequestError(f"{where}.role must be a string.", f"{where}.role")
    content = message.get("content")
    result = {key: value for key, value in message.items() if value is not None}
    if content is None:
        if message["role"] != "assistant":
            raise RequestError(f"{where}.content must be given.", f"{where}.content")
        result["content"] = [] if as_parts else ""
        return result
    if isinstance(content, str):
        result["content"] = [{"type": "text", "text": content}] if as_parts else content
        return result
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}.content must be a string or a list of parts.", f"{where}.content")
    texts = [_part_text(part, f"{where}.content[{at}]") for at, part in enumerate(content)]
    result["content"] = [{"type": "text", "text": text} for text in texts] if as_parts else "\n".join(texts)
    return result


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise RequestError(f"{where} must be a string or an object with a type.", where)
    kind = part["type"]
    if kind not in _TEXT_PARTS:
        raise RequestError(
            f"{where}: content of type {kind!r} is not supported; this model reads text only.", where
        )
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise RequestError(f"{where}.text must be a string.", f"{where}.text")
    return text


def _mark(message: dict[str, Any]) -> None:
    """Mark where the final message's content ends, to cut the rendered text there."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _TAG
    elif content:
        content[-1]["text"] += _TAG
    else:
        content.append({"type": "text", "text": _TAG})


def _cut(text: str) -> str:
    at = text.rfind(_TAG.rstrip())
    if at < 0:
        raise RequestError(
            "continue_final_message: the chat template does not show the final message's content, so it cannot be continued.",
            "continue_final_message",
        )
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()  # as transformers has it
