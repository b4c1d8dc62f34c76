"""Small messages between the ranks beside the collectives: rank 0 hears every rank, every rank hears rank 0.

Collectives need the main threads of all ranks, and wait for ever for one that hangs; these sockets are for a thread
that still speaks then. A message is a JSON object that says how things stand: a newer one makes the older ones useless,
so that what a peer has not room for is left out instead of waited for.
"""

import contextlib
import hmac
import json
import os
import secrets
import socket

MOST_BYTES = 1 << 16  # without an end of line: not one of ours
CONNECT_SECONDS = 60

_meetings = 0  # connected so far in this process; the same number on every rank


def encode(message):
    return json.dumps(message).encode() + b"\n"


class Line:
    """One connection; `closed` once the other side is gone."""

    def __init__(self, connection):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._received, self._unsent = b"", b""
        self.closed = False

    def fileno(self):
        return self._connection.fileno()

    def send(self, data):
        """Sends what there is room for of `encode(message)`; nothing of it while an earlier one is unfinished."""
        self._unsent = self._unsent or data
        with contextlib.suppress(OSError):  # no room; or gone, which `receive` finds after what was sent before
            self._unsent = self._unsent[self._connection.send(self._unsent) :]

    def receive(self):
        """The messages that have arrived, perhaps none."""
        try:
            part = self._connection.recv(MOST_BYTES)
            self._received += part
            self.closed = not part or len(self._received) > 2 * MOST_BYTES
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._received = self._received.split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            self.closed = True
            return []

    def close(self):
        self._connection.close()


class Alone:
    """The peers of a process that has none."""

    lines = {}

    def receive(self):
        return {}

    def send(self, message):
        pass

    def close(self):
        pass


class Hub:
    """Rank 0's side: a line to every other rank, once it has called."""

    def __init__(self, server, token):
        server.setblocking(False)
        self._server, self._token = server, token
        self._callers = []  # have not said yet who they are
        self.lines = {}  # by rank

    def receive(self):
        """`{rank: newest message}` of those that have sent one."""
        with contextlib.suppress(OSError):
            while True:
                self._callers.append(Line(self._server.accept()[0]))
        arrived = {rank: line.receive() for rank, line in self.lines.items() if not line.closed}
        for caller in list(self._callers):
            hello, *messages = caller.receive() or [None]
            if hello is None and not caller.closed:
                continue
            self._callers.remove(caller)
            if self._is_ours(hello):
                self.lines[hello["rank"]] = caller
                arrived[hello["rank"]] = messages
            else:
                caller.close()
        return {rank: messages[-1] for rank, messages in arrived.items() if messages}

    def _is_ours(self, hello):
        token = hello.get("token") if isinstance(hello, dict) else None
        return isinstance(token, str) and hmac.compare_digest(token.encode(), self._token.encode())

    def send(self, message):
        data = encode(message)
        for line in self.lines.values():
            if not line.closed:
                line.send(data)

    def close(self):
        for line in (*self.lines.values(), *self._callers, self._server):
            line.close()


class Spoke:
    """Another rank's side: a line to rank 0."""

    def __init__(self, line):
        self.lines = {0: line}

    def receive(self):
        messages = self.lines[0].receive()
        return {0: messages[-1]} if messages else {}

    def send(self, message):
        self.lines[0].send(encode(message))

    def close(self):
        self.lines[0].close()


def connect(rank, world_size):
    """The peers of this rank; every rank calls it, after the process group is made.

    Raises:
        OSError: rank 0 can't be reached.
    """
    global _meetings
    if world_size == 1:
        return Alone()
    from paddle.base import core

    store = core.create_or_get_global_tcp_store()
    _meetings += 1
    key = f"peers {_meetings}"
    if rank == 0:
        one_machine = int(os.environ.get("PADDLE_NNODES", "1")) == 1
        host = "127.0.0.1" if one_machine else os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]
        server = socket.create_server((host if one_machine else "", 0), backlog=world_size)
        token = secrets.token_hex(16)
        store.set(key, json.dumps({"address": [host, server.getsockname()[1]], "token": token}))
        return Hub(server, token)
    meeting = json.loads(store.get(key))
    line = Line(socket.create_connection(meeting["address"], timeout=CONNECT_SECONDS))
    line.send(encode({"token": meeting["token"], "rank": rank}))
    return Spoke(line)
