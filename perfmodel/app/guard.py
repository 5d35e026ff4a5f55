"""What stands before the page's server: small bodies only, and no way to leave a file."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 2 * 2**20  # bytes; a training config has at most 1 MiB (`imports.read`)
STORES = ("/upload", "/upload/")  # ends of the addresses at which Gradio writes what it is sent to disk


class Guard:
    """ASGI: refuses bodies that are large or of unknown length, and uploads to disk, before anything reads them."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "http" and (status := refused(scope)):
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send)


def refused(scope: Scope) -> int:
    """The status with which a request is refused; 0 if it is not."""
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return 0
    if scope["path"].endswith(STORES):
        return 403
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not length.isdigit():
        return 411
    return 413 if int(length) > LARGEST_BODY else 0
