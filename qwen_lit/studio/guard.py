"""Who may speak to the page: a request that is not the page's own is refused before anything reads it."""

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from urllib.parse import parse_qs, quote, urlsplit

Message = MutableMapping[str, object]
Scope = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "qwen_lit_token"
HEADERS = (
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Of every answer: no other site frames the page, reads it, or hears its address, which may hold the token."""


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)


class Guard:
    """An ASGI application around another: it passes on what comes from the page itself, and answers 403 to the rest.

    A site that the browser shows elsewhere can send requests here. It cannot choose the headers ``Host`` and
    ``Origin``: a foreign origin gives it away, and a name that it has pointed at this machine (DNS rebinding) stands
    in ``Host``.
    """

    def __init__(self, inner: Application, host: str, token: str | None) -> None:
        """Keeps what is allowed.

        Args:
            inner: the application.
            host: the address that is listened on.
            token: what a browser must show once; None asks for none.
        """
        self.inner, self.host, self.token = inner, host, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, redirect or refuse one request."""
        if scope["type"] not in ("http", "websocket"):
            return await self.inner(scope, receive, send)
        headers = _headers(scope)
        reason = self.refusal(scope, headers)
        if reason is not None:
            return await _refuse(scope, receive, send, reason)
        if self.token is not None and not self._known(headers):
            if scope["type"] == "http" and self._shown(scope):
                return await self._welcome(scope, send)
            return await _refuse(scope, receive, send, "open the address with the token that the command has printed")
        await self.inner(scope, receive, _with_headers(send))

    def refusal(self, scope: Scope, headers: dict[str, str]) -> str | None:
        """Why a request is not the page's own; None where it is.

        Args:
            scope: of ASGI.
            headers: of the request, by name in small letters.
        """
        host = headers.get("host", "")
        if not self._names_us(host):
            return f"the page is not served as {host!r}"
        origin = headers.get("origin")
        if origin is None and scope["type"] == "websocket":
            return "a websocket without an origin"
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "a request of another site"
        site, follows_link = headers.get("sec-fetch-site", "none"), _follows_link(scope, headers)
        if site not in ("none", "same-origin") and not follows_link:
            return "a request of another site"
        return None

    def _names_us(self, host: str) -> bool:
        """Whether a ``Host`` is this machine's: any address where a token guards, as rebinding needs a name."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if self.token is None:
            return name in LOOPBACK
        return name in (*LOOPBACK, self.host.lower()) or _is_address(name)

    def _known(self, headers: dict[str, str]) -> bool:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        return COOKIE in cookies and self._is_token(cookies[COOKIE].value)

    def _shown(self, scope: Scope) -> bool:
        query = scope.get("query_string", b"")
        assert isinstance(query, bytes)
        return self._is_token(parse_qs(query.decode("latin-1")).get("token", [""])[0])

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())

    async def _welcome(self, scope: Scope, send: Send) -> None:
        """Keep the token as a cookie, and take it out of the address."""
        cookie = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        where = quote(str(scope.get("path", "/")))
        # Two slashes would begin the address of another machine.
        location = "/" + where.lstrip("/")
        headers = [(b"location", location.encode()), (b"set-cookie", cookie.encode()), *HEADERS]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    pairs = scope.get("headers", [])
    assert isinstance(pairs, list | tuple)
    for name, value in pairs:
        key = name.decode("latin-1").lower()
        # Two hosts or two origins are nobody's.
        found[key] = f"{found[key]},{value.decode('latin-1')}" if key in found else value.decode("latin-1")
    return found


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _follows_link(scope: Scope, headers: dict[str, str]) -> bool:
    """Whether a person opens the page by a link: it shows the page, and does nothing."""
    mode, where = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return scope.get("method") == "GET" and mode == "navigate" and where == "document"


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = message.get("headers", [])
            assert isinstance(given, list | tuple)
            message["headers"] = [*given, *HEADERS]
        await send(message)

    return sent


async def _refuse(scope: Scope, receive: Receive, send: Send, reason: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": "refused"})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": f"refused: {reason}\n".encode()})
