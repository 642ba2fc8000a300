"""Chat templates render as transformers renders them, and refuse what they cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kubeinfer.errors import OptionError, RequestError
from kubeinfer.text.chat_template import ChatTemplate, read_chat_template
from text.small_tokenizers import byte_level

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}
{%- set messages = messages[1:] -%}{%- endif -%}{{ bos_token }}{%- for m in messages -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate user/assistant') }}
    {%- endif -%}
    {%- if m.role == 'user' -%}[INST] {{ (system + '\n\n' if loop.first and system else '') + m.content | trim }} [/INST]
    {%- else -%} {{ m.content | trim }}{{ eos_token }}{%- endif -%}
{%- endfor -%}"""
PARTS = """{% for m in messages %}<{{ m.role }}>{% if m['content'] is string %}{{ m['content'] }}{% else %}
{%- for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}|{% endif %}{% endfor %}{% endif %}
{% endfor %}"""
FEATURES = """{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{% generation %}{{ m.content }}
{% endgeneration %}{% endfor %}{{ {'a': '<é>'} | tojson }}{{ extra | default('none') }}{% set ns = namespace(n=1) %}
{%- for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"""

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there "},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "你好"},
]
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


def transformers_render(template: str, chat: list[dict[str, Any]], **options: Any) -> str:
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(tokenizer_object=byte_level()._backend, **SPECIALS)
    text = hf.apply_chat_template(chat, chat_template=template, tokenize=False, **options)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA2, PARTS, FEATURES], ids=["chatml", "llama2", "parts", "features"]
)
@pytest.mark.parametrize("prompted", [True, False])
def test_renders_like_transformers(template: str, prompted: bool) -> None:
    ours = ChatTemplate(template, SPECIALS, "string").render(CHAT, add_generation_prompt=prompted)
    assert ours == transformers_render(template, CHAT, add_generation_prompt=prompted)


def test_continue_final_message_like_transformers() -> None:
    chat = CHAT[:3]
    ours = ChatTemplate(CHATML, SPECIALS).render(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    assert ours.endswith("<|im_start|>assistant\nHello")
    assert ours == transformers_render(CHATML, chat, continue_final_message=True)


@pytest.mark.parametrize("trims", ["", " | trim"])
def test_continue_final_message_that_ends_in_a_space(trims: str) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content']" + trims + " }}</>{% endfor %}"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, my name "}]
    ours = ChatTemplate(template).render(chat, add_generation_prompt=False, continue_final_message=True)
    assert ours == transformers_render(template, chat, continue_final_message=True)
    assert ours.endswith("name" if trims else "name ")


def test_continue_final_message_of_content_parts() -> None:
    chat = [
        {"role": "assistant", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    ]
    text = ChatTemplate(PARTS).render(chat, add_generation_prompt=False, continue_final_message=True)
    assert text == "<assistant>one|two"


def test_chat_template_kwargs_reach_the_template() -> None:
    text = ChatTemplate(FEATURES).render(CHAT, chat_template_kwargs={"extra": "given"})
    assert "given" in text
    with pytest.raises(RequestError, match="messages") as caught:
        ChatTemplate(FEATURES).render(CHAT, chat_template_kwargs={"messages": []})
    assert caught.value.param == "chat_template_kwargs"


def test_content_parts_become_what_the_template_reads() -> None:
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]}
    ]
    assert ChatTemplate("{{ messages[0].content }}").render(chat) == "one\ntwo"
    assert ChatTemplate(PARTS).render(chat).strip() == "<user>one|two|"
    assert ChatTemplate(PARTS).render([{"role": "user", "content": "one"}]).strip() == "<user>one|"
    assert ChatTemplate(PARTS, content_format="string").render(chat).strip() == "<user>one\ntwo"


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0]",
            "image_url",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0]", "text only"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[0].content[0]", "type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "string"),
        ({"role": "user", "content": 3}, "messages[0].content", "string or a list"),
        ({"role": "user"}, "messages[0].content", "must be given"),
        ({"content": "x"}, "messages[0].role", "role"),
        ("x", "messages[0]", "object"),
    ],
)
def test_messages_that_cannot_be_shown_are_refused_by_name(message: Any, param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ChatTemplate(CHATML).render([message])
    assert caught.value.param == param


def test_an_assistant_without_content_is_empty_text() -> None:
    chat = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert (
        ChatTemplate(CHATML).render(chat, add_generation_prompt=False)
        == "<|im_start|>assistant\n<|im_end|>\n"
    )


def test_the_template_s_own_refusal_is_shown() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        ChatTemplate(LLAMA2, SPECIALS).render([CHAT[1], CHAT[1]])
    assert caught.value.param == "messages"


def test_a_template_that_fails_on_a_message_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="chat template failed"):
        ChatTemplate("{{ messages[0].content + 1 }}").render(CHAT)
    with pytest.raises(RequestError, match="has no attribute"):
        ChatTemplate("{{ messages[0].nothing.more }}").render(CHAT)


def test_the_sandbox_holds() -> None:
    with pytest.raises(RequestError):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(CHAT)
    with pytest.raises(RequestError):
        ChatTemplate("{% set _ = messages.append(1) %}").render(CHAT)


def test_no_messages_no_template_and_both_prompts() -> None:
    with pytest.raises(RequestError, match="at least one"):
        ChatTemplate(CHATML).render([])
    with pytest.raises(RequestError, match="--chat-template"):
        ChatTemplate(None).render(CHAT)
    with pytest.raises(RequestError, match="add_generation_prompt"):
        ChatTemplate(CHATML).render(CHAT, continue_final_message=True)
    with pytest.raises(RequestError, match="does not show"):
        ChatTemplate("{{ messages[0].role }}").render(
            CHAT, add_generation_prompt=False, continue_final_message=True
        )


def test_reading_the_option(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(CHATML, encoding="utf-8")
    assert read_chat_template(str(file)) == CHATML
    assert read_chat_template(CHATML) == CHATML
    with pytest.raises(OptionError, match="neither a file") as caught:
        read_chat_template("missing.jinja")
    assert caught.value.option == "chat_template"
    with pytest.raises(OptionError, match="line 1"):
        ChatTemplate("{% for x in %}")
    file.write_bytes(b"\xff\xfe{{")
    with pytest.raises(OptionError, match="cannot be read"):
        read_chat_template(str(file))


def test_the_tokenizer_s_own_template_is_the_default() -> None:
    tokenizer = byte_level()
    assert ChatTemplate.for_tokenizer(tokenizer).source is None
    assert ChatTemplate.for_tokenizer(tokenizer, CHATML).source == CHATML
