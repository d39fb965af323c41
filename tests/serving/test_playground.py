"""The page at `/` in a real Chromium: what people see, press and hear."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import connected, error_of, served_in_thread
from fake_engine import REPLY, FakeEngine

import quire.core.serving
from quire.core.config import EngineConfig

chromium = pytest.importorskip("chromium", reason="needs the package websockets")
FOLDER = Path(quire.core.serving.__path__[0]) / "playground"
in_browser = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="NO CHROMIUM on this machine: the playground is not tested"
)
ANSWERED = "document.querySelectorAll('.turn.assistant:not(.running) .facts li').length > 0"
SIZES = [(1280, 800), (390, 844)]


def chatting(**fields) -> FakeEngine:
    """An engine whose model has a chat template."""
    return FakeEngine(config=EngineConfig(model="fake", chat_template="{{ messages }}"), **fields)


@pytest.fixture(scope="module")
def page() -> Iterator[chromium.Page]:
    with chromium.browser() as page:
        yield page


@pytest.fixture
def url() -> Iterator[str]:
    with served_in_thread(chatting()) as url:
        yield url


async def test_page_brings_only_its_own_files(client):
    """Everything that the page loads is in the package, and its policy allows nothing else."""
    index = await client.get("/")
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    named = re.findall(r'(?:src|href)="(playground/[^"]+)"', index.text)
    modules = {f"playground/{path.name}" for path in FOLDER.glob("*.js")}
    imported = {
        f"playground/{n}"
        for p in FOLDER.glob("*.js")
        for n in re.findall(r'from "\./([^"]+)"', p.read_text())
    }
    assert imported < modules
    for name in {*named, *modules}:
        assert (await client.get(f"/{name}")).status_code == 200, name
    for path in FOLDER.iterdir():
        outside = re.findall(r"https?://(?!www\.w3\.org/)[^\s\"']+", path.read_text())
        assert outside == [], path


@pytest.mark.parametrize("name", ["..%2Fapp.py", "nothing.js", "%2e%2e/settings.py", "__init__.py"])
async def test_page_gives_no_other_files(client, name):
    """Only files of the folder can be had, whatever is asked."""
    error_of(await client.get(f"/playground/{name}"), 404)


async def test_page_can_be_left_out():
    """An operator who wants no page gets none."""
    async with connected(FakeEngine(), serve_playground=False) as client:
        assert (await client.get("/")).status_code in {404, 405}  # others may be asked there


async def test_page_is_open_and_its_data_is_not():
    """With keys the page loads, and says nothing of the server until a key is given."""
    async with connected(FakeEngine(), api_keys=("k",)) as client:
        assert (await client.get("/")).status_code == 200
        error_of(await client.get("/v1/server"), 401)
        facts = await client.get("/v1/server", headers={"authorization": "Bearer k"})
        assert facts.json()["model"]["name"] == "fake"


async def test_server_facts_tell_plan_and_numbers(client):
    """What the page shows of the server comes from the engine's own facts."""
    facts = (await client.get("/v1/server")).json()
    assert (facts["state"], facts["device"]["backend"], facts["device"]["name"]) == (
        "ready",
        "null",
        "nothing",
    )
    assert facts["statistics"]["num_waiting"] == 2
    assert facts["settings"]["max_num_seqs"] == 64


@in_browser
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_chat_is_answered_with_the_keyboard_alone(page, url, width, height):
    """Typing and Enter is all it takes; the answer streams in, is announced, and shows what it took."""
    page.open(url, width, height)
    page.wait("document.getElementById('model-name').textContent.startsWith('fake on nothing')")
    page.tab()
    assert page.run("document.activeElement.className") == "skip"
    page.enter()
    page.run("document.getElementById('composer-text').focus()")
    page.type("Hi there")
    page.enter()
    page.wait(ANSWERED)
    assert page.run("document.querySelector('.turn.user .text').textContent") == "Hi there"
    assert page.run("document.querySelector('.turn.assistant > .text').textContent") == REPLY
    assert page.run("document.querySelector('.thoughts').hidden") is True
    assert page.run("document.getElementById('announcer').textContent") == f"Answer: {REPLY}"
    facts = page.run("document.querySelector('.facts').innerText")
    for words in ("first token", "tokens", "prefix cache", "ended by"):
        assert words in facts
    assert page.problems == []


@in_browser
def test_thoughts_are_seen_apart_and_folded_when_the_answer_begins(page):
    """A model that thinks must not look as if it did nothing, and its answer comes first afterwards."""
    engine = chatting(reply=lambda prompt_ids, index: "<think>Let me see.</think>Yes")
    with served_in_thread(engine, reasoning_parser="qwen3") as url:
        page.open(url)
        page.run("document.querySelector('#ideas button').click()")
        page.wait(ANSWERED)
        thoughts = "document.querySelector('.turn.assistant .thoughts')"
        assert page.run(f"{thoughts}.querySelector('.text').textContent") == "Let me see."
        assert page.run(f"[{thoughts}.hidden, {thoughts}.open]") == [False, False]
        assert page.run(f"{thoughts}.querySelector('summary').textContent").startswith(
            "Thought for"
        )
        assert page.run("document.querySelector('.turn.assistant > .text').textContent") == "Yes"
        assert page.problems == []


@in_browser
def test_token_probabilities_are_shown_and_reached_by_keys(page, url):
    """Each token tells its probability; arrows move between them and Enter shows the alternatives."""
    page.open(url)
    page.run("document.querySelector('[name=logprobs]').click()")
    page.run("document.querySelector('#ideas button').click()")
    page.wait(ANSWERED)
    tokens = "[...document.querySelectorAll('.turn.assistant > .text .token')]"
    assert page.run(f"{tokens}.map(t => t.textContent).join('')").startswith(REPLY)
    assert page.run(f"{tokens}.filter(t => t.tabIndex === 0).length") == 1
    page.run(f"{tokens}[0].focus()")
    page.press("ArrowRight", code=39)
    assert page.run("document.activeElement.dataset.index") == "1"
    page.enter()
    assert page.run("document.querySelector('.detail').hidden") is False
    assert "%" in page.run("document.querySelector('.detail').innerText")
    page.press("Escape", code=27)
    assert page.run("document.querySelector('.detail').hidden") is True
    assert page.problems == []


@in_browser
@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_controls_reach_the_engine(page, mode):
    """What the controls say is what the engine is asked."""
    engine = chatting()
    with served_in_thread(engine) as url:
        page.open(url)
        page.wait("document.getElementById('model-name').textContent.startsWith('fake on')")
        page.run(f"document.querySelector('[value={mode}]').click()")
        page.run("document.querySelector('[name=temperature]').value = 0.25")
        page.run("document.querySelector('[name=top_k]').value = 7")
        page.run("document.querySelector('[name=seed]').value = 11")
        page.run("document.querySelector('[name=max_tokens]').value = 4")
        page.run(
            "document.getElementById('composer-text').value = 'go'; document.getElementById('send').click()"
        )
        page.wait(ANSWERED)
    [asked] = engine.submitted
    params = asked.params
    assert (params.temperature, params.top_k, params.seed, params.max_tokens) == (0.25, 7, 11, 4)
    assert "go" in asked.prompt
    assert page.run("document.querySelector('.turn.assistant > .text').textContent").endswith(
        REPLY[:4]
    )


@in_browser
def test_stop_ends_the_answer_in_the_engine(page):
    """Stop aborts the request, keeps what came, and leaves the page ready for the next."""
    engine = chatting(hold=asyncio.Event())
    with served_in_thread(engine) as url:
        page.open(url)
        page.run("document.querySelector('#ideas button').click()")
        page.wait("document.querySelector('.turn.assistant > .text')?.textContent.length > 0")
        page.run("document.getElementById('stop').click()")
        page.wait("document.getElementById('stop').hidden")
        page.wait("document.querySelector('.facts').innerText.includes('you')")
    assert len(engine.aborted) == 1
    assert page.problems == []


@in_browser
def test_answer_can_be_copied_and_asked_for_again(page):
    """Trying again asks the same with the sampling that is set now, and only the new answer stays."""
    engine = chatting()
    with served_in_thread(engine) as url:
        page.open(url)
        page.run("document.querySelector('#ideas button').click()")
        page.wait(ANSWERED)
        page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        page.run("document.querySelector('.copy').click()")
        page.wait("document.getElementById('announcer').textContent === 'Copied'")
        assert page.run("window.copied") == REPLY
        page.run("document.querySelector('[name=temperature]').value = 0.25")
        page.run("document.querySelector('.again').focus()")
        page.enter()
        page.wait(f"document.activeElement.id === 'composer-text' && {ANSWERED}")
        assert page.run("document.querySelectorAll('.turn').length") == 2
        assert page.run("document.querySelectorAll('.again').length") == 1
    first, second = engine.submitted
    assert second.prompt == first.prompt
    assert second.params.temperature == 0.25
    assert page.problems == []


@in_browser
def test_errors_are_told_in_words(page):
    """A failure in mid-answer is shown and announced, and the page goes on."""
    with served_in_thread(chatting(fail_at=3)) as url:
        page.open(url)
        page.run("document.querySelector('#ideas button').click()")
        page.wait("document.querySelector('.turn .error') !== null")
        assert page.run("document.querySelector('.turn .error').getAttribute('role')") == "alert"
        assert page.run("document.getElementById('send').hidden") is False


@in_browser
def test_markup_in_an_answer_stays_text(page):
    """What a model says cannot become a part of the page."""
    evil = "<img src=x onerror=document.title=1><script>document.title=2</script>"
    with served_in_thread(chatting(reply=lambda ids, index: evil)) as url:
        page.open(url)
        page.run("document.querySelector('#ideas button').click()")
        page.wait(ANSWERED)
        assert page.run("document.querySelector('.turn.assistant > .text').textContent") == evil
        assert page.run("document.querySelectorAll('.turn img, .turn script').length") == 0


@in_browser
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_server_view_charts_live_numbers(page, url, width, height):
    """The second tab shows backend, plan and charts that move, with words for who does not see them."""
    page.open(url, width, height)
    page.run("document.getElementById('tab-chat').focus()")
    page.press("ArrowRight", code=39)
    assert page.run("document.activeElement.id") == "tab-server"
    page.wait("document.querySelectorAll('#cards .card').length >= 6")
    text = page.run("document.getElementById('view-server').innerText")
    for words in ("Backend", "nothing", "Plan", "Settings", "KV cache in use"):
        assert words in text
    page.wait(
        "(document.querySelector('#charts .card .line').getAttribute('d') || '').includes('L')"
    )
    label = page.run("document.querySelector('#charts svg').getAttribute('aria-label')")
    assert "last two minutes" in label
    assert page.problems == []


ACCESSIBLE = """
(() => {
  const wrong = [];
  const named = (n) => (n.getAttribute('aria-label') || n.getAttribute('aria-labelledby') || n.textContent.trim() || [...(n.labels || [])].map(l => l.textContent.trim()).join(''));
  for (const n of document.querySelectorAll('button, input, textarea, a, [role=tab], [role=tabpanel], [role=log], svg[role=img]')) if (!named(n)) wrong.push(n.outerHTML);
  const ids = [...document.querySelectorAll('[id]')].map(n => n.id);
  if (new Set(ids).size !== ids.length) wrong.push('ids twice');
  for (const n of document.querySelectorAll('img:not([alt])')) wrong.push(n.outerHTML);
  if (document.querySelectorAll('h1').length !== 1 || !document.documentElement.lang) wrong.push('title or language');
  const rgb = (c) => c.match(/[\\d.]+/g).slice(0, 4).map(Number);
  const light = (c) => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = (n) => { for (; n; n = n.parentElement) { const c = rgb(getComputedStyle(n).backgroundColor); if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
  for (const n of document.querySelectorAll('body *')) {
    if (![...n.childNodes].some(c => c.nodeType === 3 && c.data.trim()) || !n.checkVisibility({visibilityProperty: true})) continue;
    const [a, b] = [light(rgb(getComputedStyle(n).color)), light(ground(n))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) wrong.push(`${n.tagName}.${n.className} "${n.textContent.trim().slice(0, 20)}" has contrast ${ratio.toFixed(2)}`);
  }
  if (document.documentElement.scrollWidth > innerWidth) wrong.push('the page is wider than the window');
  return wrong;
})()
"""


@in_browser
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible(page, url, width, height, scheme):
    """Everything has a name, text stands out from its ground by 4.5 to 1, and nothing is wider than the window."""
    page.open(url, width, height, prefers_color_scheme=scheme)
    page.run("document.querySelector('[name=logprobs]').click()")
    page.run("document.getElementById('side').open = true")
    page.run("document.querySelector('#ideas button').click()")
    page.wait(ANSWERED)
    assert page.run(ACCESSIBLE) == []
    page.run("document.getElementById('tab-server').click()")
    page.wait("document.querySelectorAll('#cards .card').length >= 6")
    assert page.run(ACCESSIBLE) == []


@in_browser
def test_motion_stops_where_people_ask(page, url):
    """Who asks for less motion gets none."""
    page.open(url, prefers_reduced_motion="reduce")
    assert page.run("getComputedStyle(document.querySelector('.log')).scrollBehavior") == "auto"
    assert page.run(
        "getComputedStyle(document.querySelector('#ideas button')).transitionDuration"
    ) in {"0s", "1e-05s"}


@in_browser
def test_key_opens_the_server(page):
    """Where a key is needed the page asks for it, keeps it in the tab, and then works."""
    with served_in_thread(chatting(), api_keys=("k",)) as url:
        page.open(url)
        page.wait("document.getElementById('model-name').textContent === 'needs an API key'")
        page.problems.clear()  # the browser reports the 401 itself
        page.run(
            "const i = document.querySelector('[name=api_key]'); i.value = 'k'; i.dispatchEvent(new Event('change', {bubbles: true}))"
        )
        page.wait("document.getElementById('model-name').textContent.startsWith('fake on')")
        page.run("document.querySelector('#ideas button').click()")
        page.wait(ANSWERED)
        assert page.run("localStorage.length") == 0
        page.problems.clear()


@in_browser
def test_model_without_template_is_completed(page):
    """A model that cannot chat is offered what it can: to continue a text."""
    with served_in_thread(FakeEngine()) as url:
        page.open(url)
        page.wait("document.querySelector('[value=completion]').checked")
        page.run("document.querySelector('#ideas button').click()")
        page.wait(ANSWERED)
        page.run(
            "document.getElementById('clear').click(); document.querySelector('[value=chat]').click()"
        )
        assert page.run("document.querySelectorAll('.turn').length") == 0
        assert page.run("document.querySelector('#ideas button').textContent") == "What is a list?"
    assert page.problems == []
