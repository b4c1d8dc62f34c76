"""Requests that a page does not make are refused before they reach Gradio. Standard library only."""

import contextlib
import ipaddress
import os

from runtime.untrusted import parse_json


def is_local(host):
    """Returns True for an address that only this machine reaches."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Guard:
    """An ASGI application that passes to another what the page needs, and answers all else by a status alone.

    - Gradio has many more doors than the page has use for, such as uploads, a proxy and calls by name: 404.
    - Files are served out of one folder alone, and no request may name one that is to be copied there.
    - Pages may load nothing from elsewhere (`Content-Security-Policy`).
    - Where only this machine is listened to, a request must name this machine, so that no other site's page reaches it
      under a name of its own (DNS rebinding).
    - Other sites' pages can't order drawings either: a browser says where a request comes from.

    Args:
        folder: whose files are served. local: whether only this machine is listened to.
    """

    GET = ("/config", "/theme.css", "/favicon.ico", "/gradio_api/queue/data", "/gradio_api/startup-events")
    GET_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/")
    POST = tuple(f"/gradio_api/{name}" for name in ("queue/join", "run/predict", "cancel", "reset"))
    FILE = "/gradio_api/file="
    MAX_BODY = 1 << 18  # bytes of a request
    HEADERS = {
        "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    def __init__(self, application, folder, local):
        self.application, self.folder, self.local = application, os.path.realpath(folder), local

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.application(scope, receive, send)
        if scope["type"] != "http":
            return None
        status = self.judge(scope)
        if status:
            return await self.refuse(send, status)

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in self.HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        if scope["method"] == "POST":
            body = await read_body(receive)
            if not is_plain(body):
                return await self.refuse(send, 400)
            receive = again(body, receive)
        return await self.application(scope, receive, send_with_headers)

    @staticmethod
    async def refuse(send, status):
        """Answers a request with a status alone."""
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": f"{status}\n".encode()})

    def judge(self, scope):
        """Returns 0 for a request that may pass, else the status of its answer."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        name = headers.get("host", "").rpartition("]")[0].strip("[") or headers.get("host", "").partition(":")[0]
        if self.local and not is_local(name):
            return 403
        path, method = scope["path"], scope["method"]
        if method == "POST" and path in self.POST:
            if headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return 403
            length = headers.get("content-length", "")
            return 0 if length.isdecimal() and int(length) <= self.MAX_BODY else 413
        if method not in ("GET", "HEAD"):
            return 404
        if path.startswith(self.FILE):
            return 0 if self.may_read(path.removeprefix(self.FILE)) else 404
        is_below = path.startswith(self.GET_BELOW) and ".." not in path
        return 0 if path == "/" or path in self.GET or is_below else 404

    def may_read(self, path):
        """Returns True for a file of the folder."""
        with contextlib.suppress(ValueError, OSError):
            return os.path.isabs(path) and os.path.realpath(path).startswith(self.folder + os.sep)
        return False


async def read_body(receive):
    """Returns the body of a request, whose length is known to be small."""
    body, message = b"", {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    return body


def again(body, receive):
    """Returns an ASGI `receive` that gives a body that was read already, then what `receive` gives."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again():
        return messages.pop() if messages else await receive()

    return receive_again


def is_plain(body):
    """Returns True for JSON whose `data` are numbers, texts, and lists of these.

    Gradio takes an object among them for a file, whose path it would copy to where pages can read it.
    """
    try:
        data = parse_json(body).get("data", [])
    except (ValueError, AttributeError):
        return False
    if not isinstance(data, list):
        return False
    values = [inner for one in data for inner in (one if isinstance(one, list) else [one])]
    return all(one is None or isinstance(one, (bool, int, float, str)) for one in values)
