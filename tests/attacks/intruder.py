"""Speaks to the peer port by hand, with whatever key it has stolen: blocking sockets, from an address of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import ssl
import struct
from typing import Any, ClassVar

from taskd.net.connection import BANNER
from taskd.net.security import Authority, Credentials, Key, SchedulerKey, _derive
from taskd.protocol import messages as msg
from taskd.protocol.frames import FrameReader, encode

WAIT_S = 20.0
_addresses = itertools.count(1)


def own_address() -> str:
    """An address of the loopback network that nobody has come from."""
    number = next(_addresses)
    return f"127.66.{number >> 8}.{number & 255}"


class Intruder:
    """One connection."""

    made: ClassVar[list[Intruder]] = []  # and to be closed when the test is over

    def __init__(self, port: int, source: str = "") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), WAIT_S, source_address=(source or own_address(), 0))
        self.socket.settimeout(WAIT_S)
        self._reader = FrameReader()
        self.made.append(self)

    @classmethod
    def after_banner(cls, port: int, source: str = "") -> Intruder:
        """Plain TCP, after the server's line."""
        made = cls(port, source)
        line = b""
        while not line.endswith(b"\n"):
            byte = made.socket.recv(1)
            assert byte, "no banner"
            line += byte
        assert line.startswith(BANNER)
        return made

    @classmethod
    def with_key(cls, port: int, key: Key, node: msg.NodeInfo, uri: str = "") -> Intruder:
        """TLS with this key; `uri` is what the certificate is to say, if not what is right."""
        made = cls.after_banner(port)
        context = Credentials(key, node).client
        if uri:
            show(context, authority_of(key, node).issue(uri.format(cluster=key.fingerprint)))
        made.socket = context.wrap_socket(made.socket, server_hostname=f"{key.fingerprint}.taskd")
        return made

    @classmethod
    def greeted(cls, port: int, key: Key, node: msg.NodeInfo, cluster: str = "default") -> Intruder:
        """A member, as far as anybody can tell."""
        made = cls.with_key(port, key, node)
        made.say(msg.Hello(msg.PROTOCOL_VERSION, cluster, node))
        assert isinstance(made.hear(msg.Hello), msg.Hello)
        return made

    def say(self, *things: msg.Message | bytes) -> None:
        """Send messages and bytes; a connection that is closed meanwhile is no surprise."""
        data = b"".join(it if isinstance(it, bytes) else encode(it) for it in things)
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def hear(self, kind: type[msg.Message]) -> Any:
        """The next message of a kind. Fails where the connection ends first."""
        while True:
            data = self._receive()
            assert data, f"the connection ended before {kind.__name__}"
            for message in self._reader.feed(data):
                if isinstance(message, kind):
                    return message

    def end(self) -> str:
        """Waits for the end: why, in the words of the Goodbye; "closed" where there is none."""
        said = "closed"
        while data := self._receive():
            if not isinstance(self.socket, ssl.SSLSocket):
                continue  # An alert of TLS.
            for message in self._reader.feed(data):
                if isinstance(message, msg.Goodbye):
                    said = message.reason
        return said

    def until_pong(self, number: int) -> str | None:
        """None when a ping of this number is answered; else why the connection has ended."""
        said = "closed"
        while data := self._receive():
            for message in self._reader.feed(data):
                if isinstance(message, msg.Goodbye):
                    said = message.reason
                elif isinstance(message, msg.Pong) and message.number == number:
                    return None
        return said

    def answers(self) -> bool:
        """Whether the other side still answers a ping."""
        self.say(msg.Ping(424242, 0.0))
        return self.until_pong(424242) is None

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:  # A reset is an end; so is an alert of TLS.
            return b""

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()


def authority_of(key: Key, node: msg.NodeInfo) -> Authority:
    """Who signs for this key."""
    if isinstance(key, SchedulerKey) and "scheduler" in node.roles:
        return key.authority
    secret = key.worker_key.secret if isinstance(key, SchedulerKey) else key.secret
    return Authority(_derive(secret, b"worker authority"), "worker")


def show(context: ssl.SSLContext, pem: bytes) -> None:
    """Have a context show this certificate."""
    descriptor = os.memfd_create("certificate")
    os.write(descriptor, pem)
    context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)


def open_context() -> ssl.SSLContext:
    """A client that checks nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
