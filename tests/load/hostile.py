"""What strangers send: requests that no page makes, and lines that hardly move."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from perfmodel.app.guard import LARGEST_BODY, SLOWEST_BODY, UNREAD

from .asking import JOIN, Refused, Visitor, sent, written
from .visitors import HOSTILE, Question

API = "/gradio_api"
NO = (0, 400, 403, 404, 405, 411, 413, 414, 422, 431)  # closed, or refused
LONG_PATH, ENDING = b"GET " + b"/" * 100_000 + b" HTTP/1.1", b"\r\n\r\n"
HANGS = 20.0  # s without an answer
SECRET = b"root:"  # how /etc/passwd begins
OUTSIDE = (
    "file=/etc/passwd", "file=../../../../etc/passwd", "file=..%2f..%2f..%2fetc/passwd", "file/etc/passwd",
    "file=http://127.0.0.1:1/", "file=https://example.com/", "proxy=https://example.com/", "proxy=http://127.0.0.1/",
    "deep_link?session_hash=", "dev/reload", "upload_progress?upload_id=x", "run-history/buckets", "vibe-code/",
    "stream/a/b/0/playlist.m3u8", "custom_component/a/client/component/..%2f..%2froutes.py", "info", "openapi.json",
)  # fmt: skip
ELSEWHERE = (
    "/file=/etc/passwd", "/..%2f..%2fetc/passwd", "/../../../etc/passwd", "/static/..%2f..%2f..%2froutes.py",
    "/static/%2e%2e/%2e%2e/routes.py", "/assets/..%2f..%2froutes.py", "/svelte/..%5c..%5croutes.py", "//etc/passwd",
    "/assets//etc/passwd", "/static/%00", "/monitoring", "/login", "/logout", "/docs", "/openapi.json", "/.git/config",
)  # fmt: skip
POSTED = ("upload", "run/changed", "api/changed", "call/changed", "call/v2/changed", "component_server", "cancel",
          "reset", "process_recording", "vibe-edit", "stream/x", "run-history/connect")  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """A request, and the statuses that it may get."""

    kind: str
    request: bytes
    statuses: tuple[int, ...] = NO


def attacks(functions: dict[str, int]) -> Iterator[Attack]:
    """Requests to refuse, or to answer in peace."""
    for path in (*(f"{API}/{path}" for path in OUTSIDE), *ELSEWHERE):
        for method in ("GET", "HEAD"):
            yield Attack("paths", written(method, path))
    for path in POSTED:
        yield Attack("other addresses", written("POST", f"{API}/{path}", b'{"data": [], "fn_index": 0}'))
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        yield Attack("methods", written(method, JOIN), (*NO, 501))
    yield from _bodies(functions)
    for value in (HOSTILE, "x" * 200_000, "\x00", "a\r\nX-Injected: 1", "../../etc/passwd"):
        yield Attack("headers", written("GET", "/", headers={"X-Forwarded-Host": value, "Cookie": value}), (*NO, 200))
        yield Attack("headers", written("GET", "/config", headers={"Host": value.replace("\r\n", "")}), (*NO, 200))
    for raw in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9", b"\xff" * 5000, LONG_PATH):
        yield Attack("not HTTP", raw + ENDING, (*NO, 200, 505))


def _bodies(functions: dict[str, int]) -> Iterator[Attack]:
    def join(**changes: Any) -> bytes:
        asked = {"data": [], "fn_index": functions["changed"], "session_hash": "attack", **changes}
        return json.dumps(asked).encode()

    sizes = {"Content-Length": str(LARGEST_BODY + 1)}
    yield Attack("large bodies", written("POST", JOIN, b"x", sizes))
    yield Attack("large bodies", written("POST", JOIN, b"x" * (LARGEST_BODY + 1)))
    yield Attack("large bodies", written("POST", JOIN, b"x", {"Content-Length": "9" * 400}))
    yield Attack("large bodies", written("POST", JOIN, b"x", {"Content-Length": "-1"}))
    yield Attack("large bodies", written("POST", JOIN, b"5\r\nhello\r\n0\r\n\r\n", {"Transfer-Encoding": "chunked"}))
    yield Attack("large bodies", written("POST", JOIN, join(session_hash="x" * 1_000_000)))
    for body in (b"", b"{", b"[" * 100_000, b"null", b"[]", b"\xff\xfe", b"1" * 100_000, b'{"session_hash": ["a"]}'):
        yield Attack("bodies", written("POST", JOIN, body))
    for changes in ({"session_hash": None}, {"session_hash": ""}, {"session_hash": {}}):
        yield Attack("bodies", written("POST", JOIN, join(**changes)))


def after_joining(functions: dict[str, int]) -> Iterator[tuple[str, list[Any], Any]]:
    """Questions of whose values none is what the page sends; some are refused at once, others by Gradio, by a line."""
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for value in (None, {}, [], "x" * 100_000, HOSTILE, "\x1b]0;x\x07", "$(true)", -1, 1e308, file):
        for name in ("changed", "map_drawn", "everywhere"):
            yield name, [value] * 15, None
    yield "changed", [], None
    for event in (None, {}, {"name": HOSTILE}, {"name": "a.yaml", "text": ["x"]}, {"name": 1, "text": "a: &a [*a]"}):
        yield "dropped", [None] * 15, event


async def refused(port: int, functions: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Each attack's kind, and what was wrong with what came of it; empty if nothing was."""
    found = []
    for attack in attacks(functions):
        try:
            status, body = await sent(port, attack.request, HANGS)
        except TimeoutError:
            status, body = -1, b"nothing came"
        told = SECRET in body or b"X-Injected" in body
        right = status in attack.statuses and not told
        found.append((attack.kind, "" if right else f"{attack.request[:80]!r}: {status} {body[:80]!r}"))
    for name, values, event in after_joining(functions):
        visitor = Visitor(port, functions)
        try:
            given = await visitor.ask(name, values, event=event)
            told = SECRET.decode() in str(given) or "<img" in str(given)
            found.append(("values", f"{name} {str(values)[:60]}: {str(given)[:80]}" if told else ""))
        except Refused as no:
            found.append(("values", "" if no.status in NO else f"{name} {str(values)[:60]}: {no}"))
    return iter(found)


async def unread(port: int, functions: dict[str, int], question: Question) -> str:
    """Someone who asks and never reads is stopped before the answers fill the memory."""
    visitor, taken = Visitor(port, functions), 0
    for _ in range(2 * UNREAD):
        try:
            await visitor.join(visitor.question(question.name, question.values))
            taken += 1
        except Refused as no:
            if no.status not in (429, 503):
                return str(no)
    return "" if 0 < taken <= UNREAD else f"{taken} answers wait for one who does not read"


async def slowly(port: int, functions: dict[str, int], question: Question, lines: int) -> tuple[str, str]:
    """Lines that hardly move: what is wrong with an answer to somebody else meanwhile or with how they end, and how."""
    whole = Visitor(port, functions).question(question.name, question.values)
    head = whole.index(b"\r\n\r\n") + 4
    starts = [b"", b"", whole[:40], whole[:head]]  # nothing, half a head, a head whose body does not come
    slow = [asyncio.create_task(_drip(port, starts[i % 4])) for i in range(lines)]
    await asyncio.sleep(1)
    began = time.monotonic()
    visitor = Visitor(port, functions)
    wrong = question.wrong(await visitor.ask(question.name, question.values, question.query, question.event))
    took = time.monotonic() - began
    ends = await asyncio.gather(*slow)
    late = sum(end is None for end in ends[3::4])
    silent, halves = (sum(end is None for end in ends[i::4]) for i in (1, 2))
    said = (
        f"an answer meanwhile took {took:.1f} s; of {lines // 4} each {silent} silent, {halves} half heads still open"
    )
    return wrong or (f"{late} questions whose bodies did not come still wait" if late else ""), said


async def _drip(port: int, start: bytes) -> bytes | None:
    """Begin a request, and go on with it byte by byte; what the server says by the time that a body may take."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(reader.read())
    try:
        writer.write(start)
        for _ in range(int(SLOWEST_BODY) + 5):
            await asyncio.wait([answer], timeout=1)
            if answer.done():
                return answer.result()
            if start:
                writer.write(b" ")
        return None
    except ConnectionError:
        return b""
    finally:
        answer.cancel()
        writer.close()
