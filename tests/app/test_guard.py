"""What stands before the page's server: what no page asks is refused before anything reads it."""

import asyncio
import json
from typing import Any

import pytest

from perfmodel.app import guard
from perfmodel.app.guard import DATA, JOIN, LARGEST_BODY, SESSIONS, UNREAD, Guard

ANSWERED = b'data: {"msg":"process_completed","event_id":"x"}\n\n'


def question(**changes: Any) -> bytes:
    return json.dumps({"data": ["gpt2", ["full", "lora"], 4, None], "session_hash": "abc", **changes}).encode()


ASKED = question()


class Server:
    """A server behind the guard, which takes every question.

    Args:
        sends: to who reads answers.
    """

    def __init__(self, *sends: bytes) -> None:
        self.sends = sends
        self.read = b""
        self.guard = Guard(self)
        self.statuses: list[int] = []  # of what is asked while answers are read
        self.dragged = False  # whether something is

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            self.read = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200})
        for body in self.sends if scope["method"] == "GET" else ():
            if self.dragged:
                self.statuses.append(await self.status())
            await send({"type": "http.response.body", "body": body, "more_body": True})

    def asked(self, *words: Any, **named: Any) -> int:
        return asyncio.run(self.status(*words, **named))

    async def status(
        self, path: str = JOIN, method: str = "POST", body: bytes | None = ASKED, query: str = "", **headers: str
    ) -> int:
        """The status that a request gets; without a body one never comes."""
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            if body is None:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": body}

        if method == "POST" and not headers:
            headers = {"content_length": str(len(body or b"x"))}
        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": pairs, "query_string": query.encode()}
        await self.guard(scope, receive, send)
        return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("status", "path", "method"),
    [
        (200, "/", "GET"),
        (200, "/", "HEAD"),
        (200, "/assets/index-1.js", "GET"),
        (200, "/theme.css", "GET"),
        (200, DATA, "GET"),
        (403, "/assets/../secret", "GET"),
        (403, "/static/../../secret", "GET"),
        (403, "/gradio_api/file=/etc/passwd", "GET"),
        (403, "/gradio_api/file=https://example.com/", "GET"),
        (403, "/gradio_api/proxy=https://example.com/", "GET"),
        (403, "/gradio_api/deep_link", "GET"),
        (403, "/gradio_api/dev/reload", "GET"),
        (403, "/gradio_api/upload", "POST"),
        (403, "/gradio_api/upload/", "PUT"),
        (403, "/gradio_api/call/changed", "POST"),
        (403, "/login", "POST"),
        (403, "/", "OPTIONS"),
    ],
)
def test_only_what_the_page_asks_is_there(status: int, path: str, method: str) -> None:
    """Gradio has addresses that write to the disk, ask other servers or never end, where no field needs one."""
    assert Server().asked(path, method) == status


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, {"content_length": "1000"}),
        (200, {"content_length": str(LARGEST_BODY)}),
        (413, {"content_length": str(LARGEST_BODY + 1)}),
        (411, {"transfer_encoding": "chunked"}),
        (411, {"content_length": "-1"}),
        (400, {"content_length": "10", "x_forwarded_host": "a\x1b[31m"}),
    ],
)
def test_a_head_that_is_none_of_a_page(status: int, headers: dict[str, str]) -> None:
    assert Server().asked(body=question(), **headers) == status


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, question()),
        (200, question(data=[])),
        (200, question(event_data={"name": "a.yaml", "text": "x: 1\ny: \x1b"})),
        (400, b""),
        (400, b"[" * 100_000),
        (400, b"null"),
        (400, question(session_hash=None)),
        (400, question(session_hash="x" * 65)),
        (400, question(session_hash="\x1b[31m")),
        (400, question(data={})),
        (400, question(data=["x" * 4001])),
        (400, question(data=["\x1b]0;title\x07"])),
        (400, question(data=[["full", "a\nb"]])),
        (400, question(data=[{"path": "/etc/passwd"}])),
    ],
)
def test_a_body_that_is_no_question(status: int, body: bytes) -> None:
    """Gradio keeps what a session is called for ever, and writes what it complains of to the server's terminal."""
    server = Server()
    assert server.asked(body=body) == status
    assert server.read == (body if status == 200 else b"")


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SLOWEST_BODY", 0.01)
    assert Server().asked(body=None) == 408


def test_answers_that_nobody_reads_do_not_pile_up() -> None:
    """One who asks and does not read could fill the memory, a few kilobytes at a time."""
    server = Server(b'data: {"msg":"heartbeat"}\n\n')
    assert [server.asked() for _ in range(UNREAD + 1)] == [200] * UNREAD + [429]
    assert server.asked(body=question(session_hash="other")) == 200
    server.asked(DATA, "GET", query="session_hash=other")
    assert server.asked() == 429
    server.asked(DATA, "GET", query="session_hash=abc")  # what a stream that ends leaves unread is dropped
    assert server.asked() == 200


@pytest.mark.parametrize(("sent", "stopped"), [(ANSWERED, False), (b'data: {"msg":"heartbeat"}\n\n', True)])
def test_whoever_reads_may_go_on(sent: bytes, stopped: bool) -> None:
    """A slider that is dragged asks for as long as it is; one who reads nothing of what comes is stopped."""
    server = Server(*[sent] * 2 * UNREAD)
    server.dragged = True
    server.asked(DATA, "GET", query="session_hash=abc")
    assert (429 in server.statuses) == stopped
    assert server.statuses[0] == 200


def test_sessions_are_forgotten_in_their_turn() -> None:
    server = Server()
    for number in range(SESSIONS + 2):
        server.asked(body=question(session_hash=str(number)))
    assert len(server.guard.unread) == SESSIONS
    assert "0" not in server.guard.unread


def test_the_end_of_a_stream_is_told() -> None:
    """Also of one that breaks off; what else a session asks is not the end of anything."""
    done: list[str] = []
    server = Server(ANSWERED)
    server.guard.done = done.append
    server.asked()
    assert done == []
    server.asked(DATA, "GET", query="session_hash=abc")
    assert done == ["abc"]

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ConnectionError

    server.guard.app = broken
    with pytest.raises(ConnectionError):
        server.asked(DATA, "GET", query="session_hash=xyz")
    assert done == ["abc", "xyz"]


def test_nothing_is_kept_of_a_session_that_has_its_answers() -> None:
    """Visitors come for months; one that still waits for an answer keeps its queue."""
    pytest.importorskip("gradio")
    from gradio.queueing import Queue

    from perfmodel.app.page import build_page, forget_session

    queue = build_page()._queue
    assert isinstance(queue, Queue)
    for session, pending in (("waits", {"event"}), ("done", set())):
        queue.pending_messages_per_session[session] = asyncio.Queue()
        queue.pending_event_ids_session[session] = pending
    for session in ("waits", "done", "unknown"):
        forget_session(queue, session)
    assert list(queue.pending_messages_per_session) == list(queue.pending_event_ids_session) == ["waits"]
