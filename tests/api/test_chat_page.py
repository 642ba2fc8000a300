"""The chat page in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.browser import CHROMIUM, DRIVER, Page, browser
from api.running import Running, running
from api.scripted import scripted_engine

PAGE = Path(__file__).resolve().parents[2] / "runtime/kubeinfer/api/static/chat.html"


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text)
    assert "<script src" not in text
    assert '<link rel="stylesheet"' not in text


def test_headers(client: httpx.Client) -> None:
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_the_page_can_be_switched_off(folder: Path) -> None:
    with running(scripted_engine(folder), disable_chat_page=True) as server:
        assert httpx.get(server.url + "/").status_code == 404


needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not installed"
)


@pytest.fixture(scope="module")
def slow(folder: Path) -> Iterator[Running]:
    with running(scripted_engine(folder, delay=0.01, max_model_len=2048), api_key=["secret"]) as server:
        yield server


@pytest.fixture(scope="module")
def page(slow: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as result:
        yield result


LAST = "const t = document.querySelectorAll('.turn.assistant'); const last = t[t.length - 1]; "
DONE = LAST + "return last && !last.classList.contains('busy')"


@needs_browser
def test_chatting(slow: Running, page: Page) -> None:
    page.open(slow.url + "/")
    page.type("#prompt", "Hello there\n")
    page.wait("return document.querySelector('.turn.error .text')")
    assert "API key is missing" in page.run("return document.querySelector('.turn.error .text').textContent")

    page.type("#key", "secret")
    page.run("document.getElementById('key').dispatchEvent(new Event('change'))")
    page.wait("return document.getElementById('model').value === 'scripted'")
    page.click("#clear")
    page.run(
        "for (const [id, v] of [['max_tokens', 48], ['temperature', 0.3], ['top_k', 7]])"
        "{ const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input')); }"
    )
    page.type("#system", "Be brief.")
    page.type("#prompt", "Hello there\n")
    page.wait(DONE)
    text = page.run(LAST + "return last.querySelector('.text').textContent")
    assert text.startswith(" The quick brown fox")
    meta = page.run(LAST + "return last.querySelector('.meta').textContent")
    assert re.fullmatch(r"48 tokens, [\d.]+ tok/s, first after \d+ ms, cut at the longest answer", meta)
    params = slow.core.requests[-1].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.3, 7, 48)

    page.type("#prompt", "And more?\n")
    page.wait("return document.querySelectorAll('.turn.assistant').length === 2")
    page.wait(DONE)
    prompt = slow.engine.tokenizer.decode(slow.core.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>"
    )
    assert "<|im_start|>assistant\n The quick" in prompt
    assert prompt.endswith("user\nAnd more?<|im_end|>\n<|im_start|>assistant\n")

    folder = os.environ.get("KUBEINFER_TEST_PICTURES")
    for theme in ("light", "dark"):
        page.wait(
            f"document.documentElement.dataset.theme === '{theme}' || "
            f"document.getElementById('theme').click(); return document.documentElement.dataset.theme === '{theme}'"
        )
        if folder:
            page.picture(Path(folder) / f"chat-{theme}.png")
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 23, 27)"

    page.click("#clear")
    assert page.run("return document.querySelectorAll('.turn').length") == 0
    refused = [line for line in page.console() if "401" not in line and "[DOM]" not in line]
    assert refused == []


SHOWN = "return document.getElementById(arguments[0]).parentElement.querySelector('output').textContent"
SENT = "const { messages, stream, stream_options, model, ...rest } = requestBody(); return rest"


@needs_browser
def test_untouched_controls_leave_the_model_its_defaults(folder: Path, page: Page, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(folder, own)
    (own / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    with running(scripted_engine(own, max_model_len=256)) as server:
        loaded = "return document.getElementById('model').value !== ''"
        page.open(server.url + "/")
        page.wait(loaded)
        shown = [page.run(SHOWN, name) for name in ("temperature", "top_k", "top_p", "max_tokens")]
        assert shown == ["default: 0.6", "default: 20", "default: 1", "default"]
        assert page.run("return document.getElementById('temperature').value") == "0.6"
        assert page.run(SENT) == {}
        page.type("#prompt", "Hello\n")
        page.wait(DONE)
        request = server.core.requests[-1]
        params = request.params
        assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 1.0)
        assert len(request.prompt_token_ids) + request.max_tokens == 256

        page.run(
            "const e = document.getElementById('top_k'); e.value = 7; e.dispatchEvent(new Event('input'));"
        )
        page.open(server.url + "/")
        page.wait(loaded)
        assert [page.run(SHOWN, "top_k"), page.run(SHOWN, "temperature")] == ["7", "default: 0.6"]
        assert page.run(SENT) == {"top_k": 7}
        page.click("#defaults")
        assert page.run(SHOWN, "top_k") == "default: 20"
        assert page.run(SENT) == {}
        # Another server may tell no defaults.
        assert page.run("cards.clear(); showSliders(); " + SHOWN, "temperature") == "default"
        assert page.run(SENT) == {}


@needs_browser
def test_the_stop_button(slow: Running, page: Page) -> None:
    page.open(slow.url + "/")
    page.type("#key", "secret")
    page.run(
        "const e = document.getElementById('max_tokens'); e.value = 1800; e.dispatchEvent(new Event('input'));"
    )
    page.type("#prompt", "Go on\n")
    page.wait(LAST + "return last && last.querySelector('.text').textContent.length > 20")
    assert len(slow.core.live) == 1
    page.click("#stop")
    page.wait(DONE)
    slow.wait_until(lambda: not slow.core.live)
    assert "stopped" in page.run(LAST + "return last.querySelector('.meta').textContent")
    assert page.run("return document.getElementById('send').hidden") is False


@needs_browser
def test_markup_in_an_answer_stays_text(slow: Running, page: Page) -> None:
    page.open(slow.url + "/")
    shown = page.run(
        "const e = document.createElement('div'); render(e, 'a <b>x</b> ```py\\nif 1 < 2: pass\\n``` end');"
        "return [e.querySelectorAll('b').length, e.querySelector('pre').textContent, e.textContent]"
    )
    assert shown == [0, "if 1 < 2: pass", "a <b>x</b> if 1 < 2: pass end"]
