"""What stands before the page's server: the few addresses that the page asks, small bodies that come in time, and no
visitor for whom answers pile up unread.

Gradio has more addresses than the page needs: some write to the disk, ask other servers, or wait for ever.
"""

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

WAITING, AT_ONCE = 64, 2  # questions that may wait in all, and that each function of the page answers together
LARGEST_BODY = 2 * 2**20  # bytes; a training config has at most 1 MiB (`imports.read`)
SLOWEST_BODY = 10.0  # seconds until it is there
UNREAD = 8  # questions of a session whose answers it has not taken yet; the page itself has two or three
SESSIONS = 2000  # with unread answers, as many as Gradio keeps answers of
LONGEST_SESSION = 64  # characters of what a page calls its session; Gradio's pages take 11
LONGEST_VALUE = 4000  # characters of a field of the form; a link is no longer (`choices`)
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # what Gradio complains of goes to the terminal as it came

JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
READ = {"/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", DATA,
        "/gradio_api/startup-events", "/gradio_api/app_id"}  # fmt: skip
FILES = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")  # Gradio's own; the last waits beside a page
WORDS = {
    400: "this is no question of this page",
    403: "this page has no such address",
    408: f"a question has to be here within {SLOWEST_BODY:.0f} seconds",
    411: "a question says how long it is",
    413: f"a question has at most {LARGEST_BODY} bytes",
    429: f"{UNREAD} answers wait to be read",
}


class Guard:
    """ASGI: refuses what the page would not ask, before anything reads it.

    Args:
        done: called with a session whose stream of answers has ended.
    """

    def __init__(self, app: App, done: Callable[[str], object] = lambda session: None) -> None:
        self.app, self.done = app, done
        self.unread: OrderedDict[str, int] = OrderedDict()  # by session, those asked last at the end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif status := refused(scope):
            await refuse(status, send)
        elif scope["path"] == JOIN:
            await self._joined(scope, receive, send)
        elif scope["path"] == DATA:
            await self._read(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _joined(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A question: its answer will wait until its session reads it."""
        try:
            async with asyncio.timeout(SLOWEST_BODY):
                body = await whole(receive)
        except TimeoutError:
            return await refuse(408, send)
        session = session_of(body)
        if not session:
            return await refuse(400, send)
        if self.unread.get(session, 0) >= UNREAD:
            return await refuse(429, send)

        async def counted(message: Message) -> None:
            if message.get("status") == 200:
                self.unread[session] = self.unread.get(session, 0) + 1
                self.unread.move_to_end(session)
                while len(self.unread) > SESSIONS:
                    self.unread.popitem(last=False)
            await send(message)

        return await self.app(scope, after(body, receive), counted)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The stream of a session's answers; where it breaks off, Gradio forgets what is left of them."""
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]

        async def counted(message: Message) -> None:
            await send(message)
            if message.get("body", b"").startswith(b'data: {"msg":"process_completed"') and session in self.unread:
                self.unread[session] -= 1

        try:
            await self.app(scope, receive, counted)
        finally:
            self.unread.pop(session, None)
            self.done(session)


async def refuse(status: int, send: Send) -> None:
    """Say no, and why."""
    body = json.dumps({"detail": WORDS[status]}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def refused(scope: Scope) -> int:
    """The status with which a request is refused by its head; 0 if it is not."""
    path: str = scope["path"]
    headers = dict(scope["headers"])
    if any(CONTROL.search(value.decode("latin-1")) for value in headers.values()):
        return 400
    if scope["method"] in ("GET", "HEAD"):
        return 0 if path in READ or (path.startswith(FILES) and ".." not in path) else 403
    if scope["method"] != "POST" or path != JOIN:
        return 403
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not length.isdigit():
        return 411
    return 413 if int(length) > LARGEST_BODY else 0


async def whole(receive: Receive) -> bytes:
    """The body of a request; what there is of it, if whoever sends it goes away."""
    found, more = [], True
    while more:
        message = await receive()
        found.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(found)


def after(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read, then whatever else comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Message:
        return waiting.pop() if waiting else await receive()

    return given


def session_of(body: bytes) -> str:
    """The session that asks; empty if this is no question."""
    try:
        asked = json.loads(body)
        session, values = asked["session_hash"], asked["data"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    named = isinstance(session, str) and len(session) <= LONGEST_SESSION and _is_value(session)
    fit = isinstance(values, list) and all(
        all(map(_is_value, value)) if isinstance(value, list) else _is_value(value) for value in values
    )
    return session if named and fit else ""


def _is_value(value: Any) -> bool:
    """Whether a field of the form may have it: a number, nothing, or a line of text."""
    if isinstance(value, str):
        return len(value) <= LONGEST_VALUE and not CONTROL.search(value)
    return value is None or isinstance(value, (bool, int, float))
