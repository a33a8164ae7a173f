"The page /demo in a real browser, against the real service. Loopback only; nothing is downloaded."

import os
import re
import shutil
import time

import httpx
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from aerec_nb.data.event_database import sqlite_url
from aerec_nb.data.event_log import EventLog
from aerec_nb.inference import Recommender
from aerec_nb.models.registry import create_model
from aerec_nb.packaging import save_bundle
from aerec_nb.postprocessing import Chain
from aerec_nb.serving import new_api_key, service

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
# The title of the item that everybody has
EVIL = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> & <b>Co</b>'
pytestmark = pytest.mark.xdist_group("demo")


def missing(what):
    "No browser is a reason to skip, but not where everything has to be checked."
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("no playwright here (make setup)")
    if not os.path.exists(CHROMIUM):
        missing("no chromium here (Debian: apt-get install chromium)")
    with sync_playwright() as p:
        b = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield b
        b.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """120 users of two tastes, 60 items; the one that everybody has, has markup for a title, and users 1000 to 1004 do
    not have it.
    """
    rng = np.random.default_rng(0)
    taste = np.arange(120)[:, None] % 2 == np.arange(60) % 2
    x = (rng.random((120, 60)) < np.where(taste, 0.3, 0.05)).astype(np.float32)
    x[:, 0] = 1
    x[:5, 0] = 0
    comedies = ["Comedy|Western", "Comedy", "Comedy"]
    genres = ["Drama|War" if n % 2 else comedies[n % 3] for n in range(60)]
    table = pd.DataFrame(
        {
            "item_id": np.arange(60),
            "title": [EVIL, *(f"Film {n} of the {'Sea' if n % 2 else 'Hills'}" for n in range(1, 60))],
            "genres": genres,
        }
    )
    r = Recommender(
        create_model("ease").fit(csr_matrix(x)),
        np.arange(60),
        np.arange(1000, 1120),
        csr_matrix(x),
        chain=Chain(),
        item_table=table,
    )
    return save_bundle(r, tmp_path_factory.mktemp("bundles") / "b", {"name": "films"})


@pytest.fixture(scope="module")
def keys():
    return {
        roles: new_api_key(roles) for roles in ("read+feedback", "read")
    }  # roles -> key, what the service knows of it


@pytest.fixture(scope="module")
def running(browser, bundle, keys, tmp_path_factory):  # no browser, no service
    """A service that wants keys, and its log.

    Where the test is not about keys the browser adds one to whatever the page asks for.
    """
    folder = tmp_path_factory.mktemp("log")
    url = sqlite_url(folder / "events.db")
    wanted = {
        "AEREC_SERVING__REQUIRE_AUTH": "true",
        "AEREC_SERVING__API_KEYS": ",".join(entry for _, entry in keys.values()),
        "AEREC_PATHS__VAR_DIR": str(folder / "var"),
    }
    with service(bundle, url, variables=wanted) as s:
        yield s, EventLog(url)


@pytest.fixture
def page(browser, keys):
    "A page of which `said` has everything that its console was told, and that fails the test when there was an error."
    context = browser.new_context(
        viewport={"width": 1200, "height": 900},
        locale="en-GB",
        extra_http_headers={"X-API-Key": keys["read+feedback"][0]},
    )
    context.set_default_timeout(8000)
    p = context.new_page()
    p.said = []
    p.expected = None
    p.on("console", lambda m: p.said.append(m.text) if m.type in ("error", "warning") else None)
    p.on("pageerror", lambda e: p.said.append(str(e)))
    p.on("dialog", lambda d: (p.said.append(f"dialog: {d.message}"), d.dismiss()))
    p.on(
        "request",
        lambda r: (
            p.said.append(f"not of this service: {r.url}")
            if not r.url.startswith(("http://127.0.0.1:", "data:"))
            else None
        ),
    )
    yield p
    assert [s for s in p.said if not (p.expected and re.search(p.expected, s))] == []
    context.close()


def titles(page):
    return page.locator("#list .title").all_inner_texts()


def settled(page, act, n=None):
    "Do something, and wait until the list that it asks for is there; returns that answer."
    with page.expect_response(lambda r: r.url.endswith("/v1/recommend") and r.request.method == "POST") as found:
        act()
    page.locator("#list[aria-busy=false]").wait_for(state="attached")
    answer = found.value.json()
    if found.value.ok:
        assert titles(page)[-len(answer["items"]) :] == [i["title"] for i in answer["items"]]
    return answer


def ids(answer):
    return [str(i["item_id"]) for i in answer["items"]]  # as the log has them


def open_page(page, url):
    return settled(page, lambda: page.goto(f"{url}/demo"))


def known(page):
    return page.evaluate('[...document.querySelectorAll("#items li")].map(li => li.firstChild.textContent)')


def eventually(page, look, seconds=8):
    """What `look` returns as soon as it is true.

    (`wait_for_function` evaluates text, which the page's own policy forbids.)
    """
    end = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < end:
        page.wait_for_timeout(30)
    assert found
    return found


def feedback_of(log, answer):
    found = log.read("feedback")
    return found[found.request_id == answer["request_id"]]


def test_choose_a_user(running, keys, page):
    service, log = running
    open_page(page, service.url)
    there = httpx.get(
        f"{service.url}/demo/history",
        params={"user_id": "1007"},
        headers={"X-API-Key": keys["read"][0]},
        trust_env=False,
    ).json()
    page.get_by_label("User id").fill("1007")
    a = settled(page, lambda: page.get_by_label("User id").press("Enter"))
    assert a["user_id"] == 1007 and len(titles(page)) == 10
    assert (
        page.locator("#for").inner_text() == "Recommended for user 1007"
        and page.locator("#status").inner_text() == "10 titles"
    )
    assert page.locator("#list .rank").all_inner_texts() == [f"{n}." for n in range(1, 11)]
    best = a["items"][0]
    assert page.locator("#list .why").first.inner_text() == best["why"]
    assert best["reasons"] and all(reason["title"] in best["why"] for reason in best["reasons"])
    assert (
        page.locator("#model").inner_text() == "films"
        and page.locator("#version").inner_text() == a["version"]
        and page.locator("#ms").inner_text().endswith(" ms")
    )
    page.get_by_role("heading", name="Known of user 1007").wait_for()
    eventually(page, lambda: page.locator("#items li").count() == there["n"])
    shown = eventually(page, lambda: (e := log.read("impression"))[e.request_id == a["request_id"]].to_dict("records"))
    assert [e["item_id"] for e in sorted(shown, key=lambda e: e["value"])] == ids(a) and {
        e["user_id"] for e in shown
    } == {"1007"}


def test_offered_users_and_strangers(running, page):
    service, _ = running
    open_page(page, service.url)
    offered = page.get_by_role("group", name="Some users").get_by_role("button")
    a = settled(page, offered.nth(2).click)
    assert (
        str(a["user_id"]) == offered.nth(2).inner_text()
        and offered.nth(2).get_attribute("aria-pressed") == "true"
        and not page.locator("#notes").is_visible()
    )
    page.get_by_label("User id").fill("nobody <i>at all</i>")
    a = settled(page, page.get_by_role("button", name="Show").click)
    notes = page.locator("#notes").inner_text()
    assert (
        [w["code"] for w in a["warnings"]] == ["unknown_user", "popular_fallback"]
        and all("nobody <i>at all</i>" in w["message"] and w["message"] in notes for w in a["warnings"])
        and page.locator("#fallback").is_visible()
        and page.locator("#list .badge.popular").count() == 10
    )
    assert page.locator("#knownhint").inner_text() == "Nothing yet."


def test_wishes_change_the_list(running, page):
    service, _ = running
    open_page(page, service.url)
    before = titles(page)
    page.get_by_label("Number of titles").focus()
    settled(page, lambda: page.keyboard.press("ArrowLeft"))
    assert titles(page) == before[:9]
    a = settled(page, lambda: page.get_by_label("Diversity").fill("0.9"))
    assert len(a["items"]) == 9 and titles(page) != before[:9] and page.locator("#dout").inner_text() == "0.90"
    a = settled(page, lambda: page.get_by_label("Genre").select_option("Western"))
    assert a["items"] and all("Western" in i["genres"] for i in a["items"])
    settled(page, page.get_by_role("button", name="Reset wishes").click)
    assert titles(page) == before and page.locator("#dout").inner_text() == "as served"


def test_more(running, page):
    service, _ = running
    open_page(page, service.url)
    before = titles(page)
    more = page.get_by_role("button", name="More")
    settled(page, more.click)
    assert (
        titles(page)[:10] == before
        and len(set(titles(page))) == 20
        and page.locator("#list .rank").last.inner_text() == "20."
    )
    assert page.evaluate('document.activeElement.closest("li").querySelector(".rank").textContent') == "11."
    for _ in range(5):
        if more.is_visible():
            settled(page, more.click)
    assert not more.is_visible() and len(set(titles(page))) == len(titles(page))


@pytest.mark.parametrize("value,label", [(1, "Thumbs up"), (-1, "Thumbs down")])
def test_thumbs_of_a_user(running, page, value, label):
    service, log = running
    user = 1040 + value
    open_page(page, service.url)
    page.get_by_label("User id").fill(str(user))
    a = settled(page, lambda: page.get_by_label("User id").press("Enter"))
    item = a["items"][2]
    page.get_by_role("button", name=f"{label}: {item['title']}").focus()
    b = settled(page, lambda: page.keyboard.press("Enter"))
    event = feedback_of(log, a).iloc[0]
    assert (
        len(feedback_of(log, a)) == 1
        and event.user_id == str(user)
        and event.item_id == str(item["item_id"])
        and event.value == value
        and event.payload == {"type": "thumb"}
    )
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", event.event_id)
    assert event.item_id not in ids(b) and page.locator("#list .new:visible").count() >= 1
    assert page.locator("#done").inner_text().startswith(f"{label} for {item['title']} is stored")
    focused = page.evaluate('document.activeElement.getAttribute("aria-label")')
    assert focused == f"{label}: {b['items'][2]['title']}"
    eventually(page, lambda: (item["title"] in known(page)) == (value > 0))


def test_history_with_the_keyboard_only(running, page):
    service, log = running
    open_page(page, service.url)

    def focused():
        return page.evaluate(
            "document.activeElement.id || document.activeElement.textContent || document.activeElement.value"
        )

    for _ in range(30):
        if page.evaluate('document.activeElement.name === "mode"'):
            break
        page.keyboard.press("Tab")
    assert (
        page.evaluate('getComputedStyle(document.activeElement.closest("label")).outlineStyle') == "solid"
    )  # focus can be seen
    a = settled(page, lambda: page.keyboard.press("ArrowRight"))
    assert (
        a["fallback_used"]
        and page.locator("#fallback").is_visible()
        and "popular" in page.locator("#list .badge").first.inner_text()
    )
    page.keyboard.press("Tab")
    assert focused() == "search"

    def add(text, downs=0):
        page.keyboard.type(text)
        page.locator("#found li").nth(downs).wait_for()
        for _ in range(downs):
            page.keyboard.press("ArrowDown")
        assert (
            page.locator("#found [aria-selected=true]").get_attribute("id")
            == page.locator("#search").get_attribute("aria-activedescendant")
            == f"found-{downs}"
        )
        return settled(page, lambda: page.keyboard.press("Enter"))

    a = add("film 21 sea")
    assert (
        not a["fallback_used"]
        and page.locator("#chips li").all_inner_texts() == ["Film 21 of the Sea"]
        and focused() == "search"
    )
    add("SEA", downs=2)
    chosen = page.locator("#chips li").all_inner_texts()
    assert (
        len(chosen) == 2
        and not set(chosen) & set(titles(page))
        and page.locator("#for").inner_text() == "Recommended for a history of 2"
    )
    page.keyboard.type("sea")
    page.locator("#found li").first.wait_for()
    page.keyboard.press("Escape")
    assert not page.locator("#found").is_visible()
    for _ in "sea":
        page.keyboard.press("Backspace")
    page.keyboard.press("Tab")
    a = settled(page, lambda: page.keyboard.press("Enter"))  # removes the first
    assert page.locator("#chips li").all_inner_texts() == chosen[1:] and focused() == chosen[1]
    up = page.get_by_role("button", name=f"Thumbs up: {a['items'][0]['title']}")
    up.focus()
    b = settled(page, lambda: page.keyboard.press("Space"))
    event = feedback_of(log, a).iloc[0]
    assert event.value == 1 and pd.isna(event.user_id) and event.item_id == ids(a)[0]
    assert page.locator("#chips li").all_inner_texts() == [
        *chosen[1:],
        a["items"][0]["title"],
    ] and event.item_id not in ids(b)
    c = settled(page, page.get_by_role("button", name=f"Thumbs down: {b['items'][0]['title']}").click)
    assert ids(b)[0] not in ids(c) and page.locator("#chips .no").count() == 1


def test_nothing_found(running, page):
    service, _ = running
    open_page(page, service.url)
    settled(page, page.get_by_label("A history").check)
    page.get_by_label("Add titles that you like").press_sequentially("zzz")
    page.locator("#nothing:visible").wait_for()
    assert "zzz" in page.locator("#nothing").inner_text() and not page.locator("#found").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow(running, page, scheme):
    service, _ = running
    page.set_viewport_size({"width": 360, "height": 800})
    page.emulate_media(color_scheme=scheme)
    open_page(page, service.url)

    def width():
        return page.evaluate("document.documentElement.scrollWidth")

    assert width() <= 360
    page.get_by_text("Wishes", exact=True).click()
    assert page.get_by_label("Diversity").is_visible() and width() <= 360
    page.get_by_label("User id").fill("x" * 200)
    settled(page, page.get_by_role("button", name="Show").click)
    assert width() <= 360
    settled(page, page.get_by_label("A history").check)
    page.get_by_label("Add titles that you like").press_sequentially("film")
    page.locator("#found li").first.wait_for()
    assert width() <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")


def test_markup_is_text(running, page):
    "In the list, in what is known, among what was found, on a chip and in notices."
    service, _ = running
    open_page(page, service.url)
    page.get_by_label("User id").fill("1002")
    settled(page, page.get_by_role("button", name="Show").click)
    assert EVIL in titles(page)
    settled(page, page.get_by_role("button", name=f"Thumbs up: {EVIL}", exact=True).click)
    assert EVIL in page.locator("#done").inner_text()
    eventually(page, lambda: EVIL in known(page))
    settled(page, page.get_by_label("A history").check)
    page.get_by_label("Add titles that you like").press_sequentially("<script>")
    page.locator("#found li").first.wait_for()
    settled(page, lambda: page.keyboard.press("Enter"))
    assert page.locator("#chips li").all_inner_texts() == [EVIL]
    assert page.evaluate("window.hacked") is None and page.locator("main script, main img, main b").count() == 0


def test_errors_are_one_line(running, page):
    service, _ = running
    open_page(page, service.url)
    page.expected = "status of 503|ERR_FAILED"
    detail = "the event log cannot be written now; nothing was stored, send the same events again"
    page.route(
        "**/v1/events",
        lambda route: route.fulfill(
            status=503,
            content_type="application/problem+json",
            json={"status": 503, "title": "Not available", "code": "log_not_writable", "detail": detail},
        ),
    )
    before = titles(page)
    up = page.locator("#list .up").first
    up.click()
    page.locator("#error:visible").wait_for()
    assert (
        page.locator("#error").inner_text() == detail
        and titles(page) == before
        and page.get_by_role("alert").count() == 1
    )
    sent = []
    page.unroute("**/v1/events")
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/v1/events") else None)
    settled(page, up.click)
    assert sent[0]["value"] == 1 and not page.locator("#error").is_visible()
    page.route("**/v1/recommend", lambda route: route.abort())
    page.get_by_role("button", name="Reset wishes").click()
    page.get_by_text("The service cannot be reached.").wait_for()
    assert titles(page) == []


def test_key(running, keys, page):
    "The page asks for one, keeps it in memory only, and works with the roles read and feedback."
    service, log = running
    (key, _), (reader, _) = keys.values()
    page.expected = r"status of 40[13]"
    page.context.set_extra_http_headers({})
    page.goto(f"{service.url}/demo")
    field = page.get_by_label("This service asks for a key")
    field.wait_for()
    assert (
        page.evaluate("document.activeElement.id") == "key"
        and titles(page) == []
        and field.get_attribute("type") == "password"
    )
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("send a valid key").wait_for()
    page.locator("#keys:visible").wait_for()
    page.locator("#list[aria-busy=false]").wait_for(state="attached")
    field.fill(reader)
    a = settled(page, lambda: page.keyboard.press("Enter"))
    page.get_by_text("What was shown is not in the log: this key may read").wait_for()
    page.reload()
    field.wait_for()
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0 and page.context.cookies() == []
    field.fill(key)
    a = settled(page, lambda: page.keyboard.press("Enter"))
    assert len(titles(page)) == 10 and not field.is_visible() and not page.locator("#error").is_visible()
    n = len(page.said)
    settled(page, page.locator("#list .up").first.click)
    assert feedback_of(log, a).item_id.tolist() == ids(a)[:1] and len(page.said) == n
    page.get_by_role("heading", name="Known of user").wait_for()
    assert key not in page.content()


def test_the_file_needs_nothing_else():
    "No framework, no font, nothing from elsewhere; data never becomes markup."
    from pathlib import Path

    text = (Path(__import__("aerec_nb").__file__).parent / "demo.html").read_text(encoding="utf-8")
    assert not re.search(
        r"https?://|//cdn|@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|alert\(|eval\(|localStorage|sessionStorage|document\.cookie",
        text,
    )
    assert len(text.splitlines()) < 400


def test_docs_without_another_server(running, page):
    "Every request is described, and can be tried; what the policy forbids would be an error on the console."
    service, _ = running
    page.goto(f"{service.url}/docs")
    page.locator(".opblock").first.wait_for()
    described = httpx.get(f"{service.url}/openapi.json", trust_env=False).json()["paths"]
    assert (
        page.locator(".opblock").count() == sum(len(methods) for methods in described.values())
        and page.title() == "aerec: requests"
    )
    post = page.locator(".opblock", has=page.locator('[data-path="/v1/recommend"]'))
    post.locator(".opblock-summary").click()
    post.get_by_role("button", name="Try it out").click()
    post.locator("textarea").fill('{"history": [1, 3], "k": 2}')
    with page.expect_response(lambda r: r.url.endswith("/v1/recommend")) as found:
        post.get_by_role("button", name="Execute").click()
    assert (
        len(found.value.json()["items"]) == 2
        and post.locator(".responses-table.live-responses-table").inner_text().count('"rank"') == 2
    )


def test_policies_are_in_force(running, page):
    "A script that is not the page's own does not run, on either page."
    service, _ = running
    page.expected = "Content Security Policy|ERR_INVALID_URL"
    for path in ("demo", "docs"):
        page.goto(f"{service.url}/{path}")
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
        )
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:x onerror=\"window.hacked = 1\">')")
        page.wait_for_timeout(200)
        assert page.evaluate("window.hacked") is None
    assert [s for s in page.said if "script-src" in s]
