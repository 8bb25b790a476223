"""Who may speak to the page."""

import asyncio

import pytest

from qwen_lit.studio.guard import COOKIE, Guard

HERE = {"host": "127.0.0.1:7860"}
ORIGIN = "http://127.0.0.1:7860"


def ask(headers, *, token=None, host="127.0.0.1", kind="http", method="GET", query=b"", path="/"):
    """The messages of an answer; one of the page itself begins with ``{"type": "inner"}``."""
    sent = []

    async def inner(scope, receive, send):
        await send({"type": "inner"})

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "method": method, "path": path, "headers": pairs, "query_string": query}
    asyncio.run(Guard(inner, host, token)(scope, receive, send))
    return sent


def passed(*given, **options):
    return ask(*given, **options)[0]["type"] == "inner"


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860"])
def test_the_page_itself_is_answered(host):
    assert passed({"host": host})
    assert passed({"host": host, "origin": f"http://{host}"}, method="POST")
    assert passed({"host": host, "origin": f"http://{host}"}, kind="websocket")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:7860"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "evil.example", "origin": "http://evil.example"},
        {"host": "[::1"},
        {},
        {**HERE, "origin": "http://evil.example"},
        {**HERE, "origin": "null"},
        {**HERE, "origin": "http://127.0.0.1:8888"},
        {**HERE, "sec-fetch-site": "cross-site"},
        {**HERE, "sec-fetch-site": "same-site"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_foreign_name_or_origin_is_refused(headers, kind):
    first = ask(headers, kind=kind)[0]
    assert first["type"] == "websocket.close" if kind == "websocket" else first["status"] == 403


def test_a_websocket_names_its_origin():
    assert not passed(HERE, kind="websocket")


def test_a_link_of_another_site_opens_the_page_and_does_no_more():
    link = {**HERE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert passed(link)
    assert not passed(link, method="POST")
    assert not passed({**link, "sec-fetch-dest": "iframe"})


def test_two_hosts_are_none():
    async def inner(scope, receive, send):
        raise AssertionError("passed")

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b""}
    scope["headers"] = [(b"host", b"evil.example"), (b"host", b"127.0.0.1:7860")]
    asyncio.run(Guard(inner, "127.0.0.1", None)(scope, None, send))
    assert sent[0]["status"] == 403


def test_another_address_asks_for_the_token_once():
    there = {"host": "192.168.1.5:7860"}
    options = {"token": "secret", "host": "0.0.0.0"}
    assert ask(there, **options)[0]["status"] == 403
    assert ask(there, **options, query=b"token=guess")[0]["status"] == 403
    welcome = ask(there, **options, query=b"token=secret")[0]
    headers = dict(welcome["headers"])
    assert welcome["status"] == 303 and headers[b"location"] == b"/"
    cookie = headers[b"set-cookie"].decode()
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert passed({**there, "cookie": cookie.partition(";")[0]}, **options)
    assert not passed({**there, "cookie": f"{COOKIE}=guess"}, **options)
    socket = {**there, "origin": "http://192.168.1.5:7860"}
    assert not passed(socket, **options, kind="websocket")
    assert passed({**socket, "cookie": f"{COOKIE}=secret"}, **options, kind="websocket")


def test_a_name_that_is_rebound_is_refused_with_the_token_too():
    assert not passed({"host": "evil.example", "cookie": f"{COOKIE}=secret"}, token="secret", host="0.0.0.0")


def test_the_token_leads_to_this_machine_only():
    sent = ask({"host": "10.0.0.1"}, token="t", host="0.0.0.0", query=b"token=t", path="//evil.example/")
    assert dict(sent[0]["headers"])[b"location"] == b"/evil.example/"
