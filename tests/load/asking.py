"""HTTP and Gradio's questions by hand: every byte that is sent is ours, also those that no library would send."""

import asyncio
import json
import secrets
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
PATIENCE = 180.0  # s for an answer, of which most is waiting for others


class Refused(Exception):
    """The server said no.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, said: bytes) -> None:
        super().__init__(f"{status}: {said[:200]!r}")
        self.status = status


def written(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """A request as it goes over the line."""
    lines = {"Host": "127.0.0.1", "Connection": "close", "Content-Type": "application/json"}
    lines |= ({"Content-Length": str(len(body))} if method == "POST" else {}) | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1", "replace") + body


async def sent(port: int, request: bytes, patience: float = PATIENCE) -> tuple[int, bytes]:
    """Send a request; the status (0: the connection was closed without one) and the body of what comes back."""
    async with asyncio.timeout(patience):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        try:
            writer.write(request)
            await writer.drain()
            return parsed(await reader.read())
        except ConnectionError:
            return 0, b""
        finally:
            writer.close()


def parsed(raw: bytes) -> tuple[int, bytes]:
    """Status and body of a response that has come whole."""
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return 0, raw
    return int(head[9:12]), _joined(body) if b"transfer-encoding: chunked" in head.lower() else body


def _joined(chunks: bytes) -> bytes:
    found = []
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        n = int(size or b"0", 16)
        found.append(rest[:n])
        chunks = rest[n + 2 :] if n else b""
    return b"".join(found)


@dataclass
class Visitor:
    """A session with the page.

    Attributes:
        functions: by name, the number under which Gradio has them.
    """

    port: int
    functions: dict[str, int]
    session: str = field(default_factory=lambda: secrets.token_hex(6))

    def question(self, name: str, values: list[Any], query: str = "", event: Any = None) -> bytes:
        """The request that asks."""
        asked = {"data": values, "fn_index": self.functions[name], "session_hash": self.session, "event_data": event}
        return written("POST", f"{JOIN}?{query}", json.dumps(asked).encode())

    async def join(self, request: bytes) -> str:
        """Ask; the event whose answer will come.

        Raises:
            Refused: it will not.
        """
        status, body = await sent(self.port, request)
        if status != 200:
            raise Refused(status, body)
        return str(json.loads(body)["event_id"])

    async def answers(self) -> dict[str, Any]:
        """What comes of all that was asked, by event: values, or None where the page failed."""
        status, body = await sent(self.port, written("GET", f"{DATA}?session_hash={self.session}"))
        if status != 200:
            raise Refused(status, body)
        found = {}
        for line in body.decode().split("\n\n"):
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                found[message["event_id"]] = message["output"]["data"] if message["success"] else None
        return found

    async def ask(self, name: str, values: list[Any], query: str = "", event: Any = None) -> Any:
        """The answer to one question."""
        joined = await self.join(self.question(name, values, query, event))
        return (await self.answers()).get(joined)


def functions_of(port: int) -> dict[str, int]:
    """The page's functions by name."""
    with urlopen(f"http://127.0.0.1:{port}/config", timeout=60) as answer:
        found = json.load(answer)["dependencies"]
    return {d["api_name"]: d["id"] for d in reversed(found) if d["backend_fn"]}
