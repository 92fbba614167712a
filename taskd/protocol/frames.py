"""Frames on the wire: four bytes of length, big-endian, then one message as msgpack. Bytes in, messages out. Pure."""

from __future__ import annotations

import msgspec

from taskd.errors import ProtocolError
from taskd.protocol.messages import Any, Message

FRAME_BYTES_MAX = 16 << 20
_HEAD_BYTES = 4

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Any)


def encode_without(message: Message, surplus: int) -> bytes:
    """The frame of a message without its last fields, `surplus` of them. Raises as `encode` does."""
    names = message.__struct_fields__
    values = [getattr(message, name) for name in names[: len(names) - surplus]]
    return _frame(message, [message.__struct_config__.tag, *values])


def encode(message: Message) -> bytes:
    """The frame of a message. Raises ProtocolError where it would be larger than the other side takes."""
    return _frame(message, message)


def _frame(message: Message, value: object) -> bytes:
    buffer = bytearray(_HEAD_BYTES)
    _encoder.encode_into(value, buffer, _HEAD_BYTES)
    size = len(buffer) - _HEAD_BYTES
    if size > FRAME_BYTES_MAX:
        raise ProtocolError(f"a {type(message).__name__} of {size} bytes does not fit into a frame")
    buffer[:_HEAD_BYTES] = size.to_bytes(_HEAD_BYTES, "big")
    return bytes(buffer)


class FrameReader:
    """Takes bytes as they come, however cut, and gives the messages that are complete."""

    def __init__(self, first_bytes_max: int = FRAME_BYTES_MAX) -> None:
        """`first_bytes_max`: of the first frame, whose sender is a stranger still."""
        self._bytes_max = first_bytes_max
        self._buffer = bytearray()
        self._needed = _HEAD_BYTES  # bytes that make the next step possible; below that nothing is looked at

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """The messages that this data completes. Raises ProtocolError for what is no frame of ours."""
        buffer = self._buffer
        buffer += data
        if len(buffer) < self._needed:
            return []
        messages: list[Message] = []
        start, end = 0, len(buffer)
        try:
            with memoryview(buffer) as view:
                while end - start >= _HEAD_BYTES:
                    size = int.from_bytes(view[start : start + _HEAD_BYTES], "big")
                    if not 0 < size <= self._bytes_max:
                        raise ProtocolError(f"a frame of {size} bytes is not allowed (1 to {self._bytes_max})")
                    stop = start + _HEAD_BYTES + size
                    if stop > end:
                        self._needed = stop - start
                        break
                    messages.append(_decoder.decode(view[start + _HEAD_BYTES : stop]))
                    start = stop
                    self._bytes_max = FRAME_BYTES_MAX
                else:
                    self._needed = _HEAD_BYTES
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a message of this protocol: {error}") from None
        del buffer[:start]
        return messages
