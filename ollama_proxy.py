#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Point any Ollama client at any OpenAI-compatible server, and the reverse.

One file, nothing but the standard library, Python 3.9 and newer.

    python3 ollama_proxy.py --target http://localhost:1234

    client bytes --> Request --> parse_* --> Call --> render_* --> Scope.open --> upstream bytes
    (server, 14)     (route 13)  +- client dialect    +- upstream dialect  (9)
    client bytes <-- send <-- Encoder <-- events <-- Decoder <-- Reply.pieces <-----+
    (server, 14)             client dialect   upstream dialect    a client that leaves (9) ends the call

A *dialect* is a wire API family.  Both are parsed into one neutral vocabulary and
rendered from it, so each dialect is written once, whichever side it stands on:

    who calls us             whom we call              what happens
    Ollama client            OpenAI-compatible server  translated, both ways, streaming
    OpenAI client            OpenAI-compatible server  relayed; only the model name and the key change
    OpenAI client            Ollama                    translated, thinking and options injected
    Ollama client            Ollama                    relayed; thinking and options injected

Rooms, in reading order; each uses only names from rooms above it:

     1  Constants       limits with their reasons, media types
     2  Vocabulary      calls and events that belong to no dialect
     3  Errors          one tree; every error carries a status and a sentence
     4  Framing         bytes to lines, SSE frames and HTTP bodies; JSON with limits
     5  Ollama dialect  /api/*: parse, render, decode, encode
     6  OpenAI dialect  /v1/*: the mirror room
     7  Translation     a decoder and an encoder joined into a generator of lines
     8  Configuration   presets, flags and environment become one frozen value
     9  Upstream        dial, send, read, pool; and the watch for clients that leave
    10  Catalogue       what the target serves, under which names, with what metadata
    11  Healing         what a target refused, and what to send instead
    12  Operations      one short function per verb
    13  Routes          the dispatch table
    14  HTTP server     sockets to Request, Response to sockets
    15  Demo target     a tiny OpenAI-compatible server for --demo and the tests
    16  Command line    main, --check, signals, banner

Endpoints (the dispatch table of room 13, tied to this list by a test):

    GET    /  /health  /api/version  /api/tags  /api/ps  /api/status
    GET    /api/experimental/model-recommendations  /v1/models  /v1/models/{id}
    POST   /api/chat  /api/generate  /api/embed  /api/embeddings  /api/show  /api/pull  /api/me
    POST   /v1/chat/completions  /v1/completions  /v1/embeddings
    POST   /api/create  /api/copy  /api/push  /api/signout  /api/blobs/{digest}
    DELETE /api/delete
    any    /v1/...
"""

from __future__ import annotations

import argparse
import base64
import binascii
import collections
import contextlib
import email.utils
import fnmatch
import functools
import hashlib
import hmac
import http.client
import http.server
import ipaddress
import itertools
import json
import os
import random
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import urllib.parse
import zlib
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional

__version__ = "1.2.0"

# ----------------------------------------------------------------------------
# Room 1.  Constants: limits with their reasons, media types, ports
# ----------------------------------------------------------------------------

OLLAMA_VERSION = "0.33.0"        # the release whose contract rooms 5 and 12 follow
OLLAMA_PORT = 11434
OPENAI_FACE_PORT = 4000          # where we listen when the target itself sits on 11434
DEFAULT_TARGET = "http://localhost:1234"
DEFAULT_FALLBACK = "http://127.0.0.1:11505"
BUILT_IN_THINK_MODELS = ("glm-5:cloud", "glm4:thinking")

NDJSON = "application/x-ndjson"
EVENT_STREAM = "text/event-stream"
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"

# Headers that belong to one connection (RFC 9110 section 7.6.1) and never travel on.
HOP_BY_HOP = frozenset((
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade"))
# Headers of a client that the target has no business to see, or that we set ourselves.
PRIVATE_HEADERS = frozenset((
    "host", "authorization", "x-api-key", "api-key", "cookie", "content-length", "expect", "origin",
    "referer", "accept-encoding", "forwarded", "x-forwarded-for", "x-forwarded-host",
    "x-forwarded-proto", "x-real-ip"))

# Node allows 16 KiB of headers, nginx 4 x 8 KiB, Apache 100 fields; clients behind corporate
# single sign-on send large cookies, hence 64 KiB.
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
# Ollama sets none; ten photographs in base64 are about 100 MB.
MAX_BODY_BYTES = 128 * 1024 * 1024
# A whole answer of the target: embeddings of a large batch reach tens of megabytes.
MAX_ANSWER_BYTES = 256 * 1024 * 1024
MAX_INFLATED = 8 * 1024 * 1024   # out of one read of READ_SIZE
MAX_ERROR_BYTES = 256 * 1024
# One SSE event or NDJSON line.  Ollama's own client stops at 8 MB.
MAX_LINE_BYTES = 32 * 1024 * 1024
# JSON Schema rarely nests beyond 20; CPython's scanner recurses in C, so the bound must be ours.
MAX_JSON_DEPTH = 200
MAX_JSON_VALUES = 2_000_000      # parsed, a value of 8 bytes takes some 200 bytes of memory
MAX_CONNECTIONS = 1024
CLIENT_TIMEOUT = 60.0            # seconds: a request head, a silent keep-alive, a reader that stopped
BODY_BYTES_PER_SECOND = 16 * 1024  # a body may take this much longer than CLIENT_TIMEOUT
GRACE = 8.0                      # container managers kill 10 s after SIGTERM
LINGER = 2.0                     # seconds for a client to read a refusal while it still sends
RELAY_WHOLE = 1024 * 1024        # a relayed answer up to this size is read whole: if it breaks, that still is a 502
READ_SIZE = 120 * 1024           # from 128 KiB on the C library asks the system for fresh pages each time
POOL_SIZE = 512                  # idle connections kept to one target: as many as may come at once
POOL_IDLE = 50.0                 # seconds; common servers close after 60 or more
CATALOGUE_FRESH = 15.0           # seconds a model list is believed without asking again
DOWN_MEMORY = 3.0                # seconds a dead target is not asked for its list again
LIST_TIMEOUT = 10.0              # seconds for a model list: chats wait for the first one
ASK_TIMEOUT = 3.0                # seconds for what tells an Ollama from an OpenAI server
ABSENT_MEMORY = 600.0            # seconds metadata that is not there is not looked for again
DISCOVERY_PATIENCE = 0.7         # seconds tags, show and ps wait before they answer from memory
FIRST_PATIENCE = 4.0             # the same when there is no memory yet; Home Assistant gives up after 5
DETAILS_PATIENCE = 1.5           # seconds more for metadata, the first time
HUNG_MEMORY = 60.0               # seconds a target whose list hung is not asked for it again
PROBE_TIMEOUT = 3.0              # seconds for metadata that is nice to have
KEEPSAKES = 2048                 # tool calls whose provider extras are remembered
DEFAULT_CONTEXT = 131072
DEFAULT_COMPLETION_TOKENS = 4096  # /v1/completions stops after 16 on several servers otherwise
CONTEXT_BYTES = 256 * 1024       # conversation carried inside generate's `context` numbers

# ----------------------------------------------------------------------------
# Room 2.  Vocabulary: calls and events that belong to no dialect
#
# Calls travel from client to target, events back.  A reply is any number of
# TextDelta, ThinkingDelta and ToolCalls, then exactly one Finish or one Failure.
# ----------------------------------------------------------------------------


class Image(NamedTuple):
    """A picture or sound: base64 `data` with its media type, or an http(s) `url`."""

    data: str = ""
    media_type: str = ""
    url: str = ""


class ToolCall(NamedTuple):
    """One call, whole, never a fragment.  `arguments` is an object; `extra` is what the upstream
    attached and wants to see again when the call comes back in the history."""

    id: str
    name: str
    arguments: dict
    extra: Optional[dict] = None


class Tool(NamedTuple):
    """A function the model may call; `parameters` is a JSON Schema object."""

    name: str
    description: str
    parameters: dict
    strict: Optional[bool] = None


class Message(NamedTuple):
    """One turn.  `tool_call_id` and `tool_name` tie a `tool` turn to its call."""

    role: str
    content: str = ""
    thinking: str = ""
    images: tuple = ()
    tool_calls: tuple = ()
    tool_call_id: str = ""
    tool_name: str = ""


class ChatCall(NamedTuple):
    """One request for text, whichever endpoint it came through.

    `prompt` is set for a plain continuation without chat template; `options` holds neutral sampling
    names, `extra` those that only one kind of target knows; `think` is None (not said), a bool or
    an effort word; `format` is None, "json" or a JSON Schema; `logprobs` is None (off) or how many
    alternatives; `conversation` is what a later `context` must bring back.
    """

    model: str
    face: str = "chat"                  # chat | generate | completion: how the client is answered
    messages: tuple = ()
    prompt: Optional[str] = None
    suffix: str = ""
    tools: tuple = ()
    tool_choice: Any = None             # None, "none", "auto", "required", or a function's name in a tuple
    options: dict = {}
    extra: dict = {}
    think: Any = None
    format: Any = None
    stream: bool = False
    logprobs: Optional[int] = None
    keep_alive: Any = None
    want_usage: bool = False
    images: tuple = ()
    conversation: Optional[tuple] = None
    raw: bool = False

    def prompt_bytes(self) -> int:
        """Size of everything the model reads, for the estimate of a count nobody told."""
        total = len(self.prompt or "") + len(self.suffix)
        for message in self.messages:
            total += len(message.content) + len(message.thinking)
        return total


class EmbedCall(NamedTuple):
    """Texts to embed.  `legacy` answers in the old single-vector shape."""

    model: str
    inputs: tuple
    dimensions: Optional[int] = None
    legacy: bool = False
    base64: bool = False
    keep_alive: Any = None
    truncate: Optional[bool] = None
    options: dict = {}


class ModelInfo(NamedTuple):
    """What is known of one model; None or empty means that nobody told."""

    id: str
    shown: str = ""
    context: Optional[int] = None       # the largest the model can take
    context_now: Optional[int] = None   # what the running instance was given
    embedding_length: Optional[int] = None
    family: str = ""
    format: str = ""
    parameter_size: str = ""
    parameter_count: Optional[int] = None
    quantization: str = ""
    size: Optional[int] = None
    created: Optional[int] = None
    owner: str = ""
    parent: str = ""
    capabilities: tuple = ()
    running: Optional[bool] = None
    template: str = ""
    alias: str = ""                     # the configured name that this entry is another listing of
    traits: dict = {}                   # what servers said: "tools", "vision", "thinking", ... -> bool
    raw: dict = {}                      # the target's own list entry


class TextDelta(NamedTuple):
    """More of the answer."""

    text: str
    logprobs: Optional[list] = None


class ThinkingDelta(NamedTuple):
    """More of the model's reasoning."""

    text: str


class ToolCalls(NamedTuple):
    """All calls of one turn, whole, after all text."""

    calls: tuple


class Usage(NamedTuple):
    """Token counts, and durations in nanoseconds; None is what the upstream did not tell."""

    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    prompt_ns: Optional[int] = None
    completion_ns: Optional[int] = None
    load_ns: Optional[int] = None


class Finish(NamedTuple):
    """The end: `reason` is "stop" or "length" (or a word of the upstream passed through)."""

    reason: str
    usage: Usage


class Failure(NamedTuple):
    """The end that was not one."""

    error: Exception


class WireRequest(NamedTuple):
    """What a dialect's render_* hands to room 9: a path below the target's base, and a JSON body."""

    path: str
    body: dict


class Habits(NamedTuple):
    """How one target differs from the common reading of its dialect (presets, room 8)."""

    strict: bool = False            # refuses keys it does not know: send nothing beyond the standard
    think: str = "effort"           # which switch turns reasoning on and off: a key of THINK_SWITCHES
    echo: tuple = ()                # what it wants back with tool calls: "extra_content", ...
    tool_ids: str = ""              # "nine": ids of exactly nine letters or digits
    bridge: bool = False            # an assistant turn must stand between tool results and a user turn
    dimensions: str = "dimensions"  # its name for the length of an embedding
    ttl: bool = False               # knows `ttl` seconds, the counterpart of keep_alive
    limit_chat: bool = False        # cuts chat answers short unless a limit is sent


class Dialect(NamedTuple):
    """One wire API family as plain functions; rooms 5 and 6 each close with one."""

    name: str
    parse_chat: Callable            # body of a client, face -> ChatCall
    parse_embed: Callable           # body of a client, legacy -> EmbedCall
    render_chat: Callable           # ChatCall, Habits, context length -> WireRequest
    render_embed: Callable          # EmbedCall, Habits -> WireRequest
    read_embeddings: Callable       # answer, count -> (vectors, Usage)
    render_embeddings: Callable     # EmbedCall, vectors, Usage, durations -> answer
    Decoder: Callable               # ChatCall, ... -> bytes to events
    decode_body: Callable           # answer, ChatCall -> events
    Encoder: Callable               # ChatCall, clock, ... -> events to bytes, or to one answer
    render_error: Callable          # ProxyError -> answer


# ----------------------------------------------------------------------------
# Room 3.  Errors: every one carries a status and a sentence
#
#   ProxyError
#   +-- BadRequest          400, 404, 405, 413, ...   the client's fault
#   |   +-- Unauthorized    401
#   +-- UpstreamError       502                       the target's
#   |   +-- UpstreamRefused       its own 4xx or 5xx, passed on
#   |   +-- UpstreamUnreachable   502
#   |   +-- UpstreamTimeout       504
#   |   +-- StreamTruncated       502
#   |   +-- BadUpstreamPayload    502
#   +-- ClientGone          499   nobody is left to be told
# ----------------------------------------------------------------------------


class ProxyError(Exception):
    """Base: `status` for the client, `message` in one plain sentence, extra response `headers`."""

    status = 500
    close = False                   # the connection is out of step and must end

    def __init__(self, message: str, status: Optional[int] = None, headers: Iterable = (), code: Any = None):
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.headers = tuple(headers)
        self.code = code


class BadRequest(ProxyError):
    """The client sent something that cannot be served; `close` when the connection is out of step."""

    status = 400

    def __init__(self, message: str, status: Optional[int] = None, headers: Iterable = (), close: bool = False,
                 code: Any = None):
        super().__init__(message, status, headers, code)
        self.close = close


class Unauthorized(BadRequest):
    """The inbound key is missing or wrong."""

    status = 401


class UpstreamError(ProxyError):
    """The target's fault, whatever it was."""

    status = 502


class UpstreamRefused(UpstreamError):
    """The target answered with a 4xx or 5xx; `body` is what it sent, `param` the field it named."""

    def __init__(self, message: str, status: int, headers: Iterable = (), body: Any = None, raw: bytes = b"",
                 content_type: str = JSON):
        super().__init__(message, status, headers)
        self.body = body
        self.raw = raw
        self.content_type = content_type


class UpstreamUnreachable(UpstreamError):
    """No connection, or none that lasted until an answer."""


class UpstreamTimeout(UpstreamError):
    """Silence for longer than --timeout."""

    status = 504


class StreamTruncated(UpstreamError):
    """The connection ended before the answer did."""


class BadUpstreamPayload(UpstreamError):
    """Bytes that are neither HTTP nor JSON nor SSE."""


class ClientGone(ProxyError):
    """The client hung up; logged as 499, nothing is written."""

    status = 499


def model_not_found(name: str) -> BadRequest:
    """404 in Ollama's own words (ollama-api 1.4), which several clients search for."""
    return BadRequest(f"model '{name}' not found", 404, code="model_not_found")


# ----------------------------------------------------------------------------
# Room 4.  Framing: bytes to lines, SSE frames and HTTP bodies; JSON with limits
#
# Feed bytes, get what is complete; close() says whether the end was allowed here.
# Nothing in this room waits, and nothing in it knows what the JSON means.
# ----------------------------------------------------------------------------

_decode_json = json.JSONDecoder(parse_constant=lambda _: None).decode
_scan_json = json.JSONDecoder(parse_constant=lambda _: None).raw_decode
_decode_first_json = json.JSONDecoder(parse_constant=lambda _: None, strict=False).raw_decode
_encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode
encode_text = json.encoder.encode_basestring_ascii

_NOT_STRUCTURE = bytes(sorted(set(range(256)) - set(b'[]{}"\\')))
_STRING_SHAPE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.S)


def dump(value: Any) -> bytes:
    """Compact ASCII JSON.  Raises BadRequest for numbers JSON cannot hold and for absurd nesting."""
    try:
        return _encode_json(value).encode("ascii")
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"cannot be written as JSON: {error}") from None


def json_depth(data: bytes) -> int:
    """How deep arrays and objects nest, up to MAX_JSON_DEPTH, strings left aside; broken JSON is no matter."""
    found = 0
    for bracket in (b"[", b"{"):        # find() passes long texts at many times the speed of count()
        at = data.find(bracket)
        while at >= 0 and found < MAX_JSON_DEPTH:
            found, at = found + 1, data.find(bracket, at + 1)
    if found < MAX_JSON_DEPTH:
        return 0
    skeleton = data.translate(None, _NOT_STRUCTURE)     # only brackets, quotes and backslashes remain
    depth = deepest = 0
    for byte in _STRING_SHAPE.sub(b"", skeleton):
        if byte in b"[{":
            depth += 1
            if depth > deepest:
                deepest = depth
                if depth >= MAX_JSON_DEPTH:
                    break
        elif byte in b"]}":
            depth -= 1
    return deepest


def load(data: bytes) -> Any:
    """JSON of the upstream: lenient about NaN (becomes null), strict about depth.  Raises ValueError."""
    if json_depth(data) >= MAX_JSON_DEPTH:
        raise ValueError("nested too deeply")
    text = str(data, "utf-8", "replace").strip(" \t\r\n")
    value, end = _scan_json(text)
    if end < len(text):
        raise ValueError("more than one value")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"invalid number literal {name}")


_decode_request = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode


def load_request(data: bytes) -> dict:
    """The JSON object of a request body; what follows the first value is ignored (ollama-api 1.3).

    Raises BadRequest 400 with Ollama's wording where it has one.
    """
    if not data or data.isspace():
        raise BadRequest("missing request body")
    if len(data) > MAX_JSON_VALUES and data.count(b",") > MAX_JSON_VALUES:
        raise BadRequest(f"more than {MAX_JSON_VALUES} values in one request", 413)
    if json_depth(data) >= MAX_JSON_DEPTH:
        raise BadRequest("exceeded max depth")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"invalid UTF-8 in request body at byte {error.start}") from None
    try:
        value, _ = _decode_request(text.lstrip("\ufeff \t\r\n"))
    except RecursionError:
        raise BadRequest("exceeded max depth") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip()):
            raise BadRequest("unexpected EOF") from None
        raise BadRequest(f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"json: cannot unmarshal {json_kind(value)} into a request object")
    if not all(map(str.islower, value)):        # Ollama matches keys without regard to case
        for key in [key for key in value if not key.islower()]:
            value.setdefault(key.lower(), value[key])
    return value


_KINDS = {str: "string", bool: "bool", list: "array", dict: "object", int: "integer", float: "number"}


def field(body: dict, name: str, kind: type, default: Any = None) -> Any:
    """A request field of the JSON type `kind`; null and absence give `default`.

    Raises BadRequest 400 in the wording of Ollama's parser.
    """
    value = body.get(name)
    if value is None:
        return default
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise BadRequest(f"json: cannot unmarshal {json_kind(value)} into field {name} of type {_KINDS[kind]}")
    return value


def json_kind(value: Any) -> str:
    """The JSON name of a value's type, for error texts."""
    if value is None:
        return "null"
    for kind, name in ((bool, "bool"), (str, "string"), ((int, float), "number"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"


class LineDecoder:
    """Bytes to lines at LF, CR LF or CR, and nowhere else: U+2028 and form feed are text."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []          # of a line whose end has not come
        self._held = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the complete lines, without their ends.  Raises BadUpstreamPayload on a giant one."""
        if self._after_cr:                      # the LF of a CR LF that was cut in two ends no second line
            self._after_cr = False
            if data[:1] == b"\n":
                data = data[1:]
        if b"\r" in data:
            if data[-1:] == b"\r":
                self._after_cr = True
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        if len(lines) > 1 and self._pieces:
            lines[0] = b"".join(self._pieces) + lines[0]
            self._pieces, self._held = [], 0
        rest = lines.pop()
        if rest:
            self._pieces.append(rest)
            self._held += len(rest)
            if self._held > MAX_LINE_BYTES:
                raise BadUpstreamPayload(f"upstream sent a line of more than {MAX_LINE_BYTES} bytes")
        return lines

    @property
    def idle(self) -> bool:
        """No line is half read."""
        return not self._pieces and not self._after_cr

    def close(self) -> list[bytes]:
        """Returns the last line if it had no end."""
        rest, self._pieces, self._held = b"".join(self._pieces), [], 0
        return [rest] if rest else []


class FrameDecoder:
    """SSE frames or bare NDJSON lines to (event name, JSON value or None for [DONE]).

    Every data line is tried as JSON when it arrives, so a server that forgets the blank line costs no
    delay; lines that are no JSON alone are joined as the SSE standard says.  A body that is no stream
    at all ends up in `stray`, for the caller to judge at the end.
    """

    def __init__(self) -> None:
        self._lines = LineDecoder()
        self._event = ""
        self._pending: list[bytes] = []         # data lines of an event that are no JSON yet
        self._bare = self._begun = False
        self.stray: list[bytes] = []
        self.fault: Optional[BadUpstreamPayload] = None     # to be raised once the frames before it are used

    @property
    def idle(self) -> bool:
        """Between two events."""
        return self._lines.idle and not self._pending and not self._event and not self._bare

    def feed(self, data: bytes) -> list[tuple]:
        """Returns the complete frames in `data`.  Raises BadUpstreamPayload."""
        return self._frames(self._lines.feed(data))

    def close(self) -> list[tuple]:
        """Returns frames that lacked their final newline or blank line."""
        return self._frames(self._lines.close() + [b""])

    def _frames(self, lines: list[bytes]) -> list[tuple]:
        frames: list[tuple] = []
        for line in lines:
            if not self._begun and line:
                self._begun, line = True, line[3:] if line[:3] == b"\xef\xbb\xbf" else line
            if line[:5] == b"data:" and not self._bare:
                self._data(line[5:].strip(), frames)
            elif not line:
                if self._pending:
                    self.fault = BadUpstreamPayload("upstream sent an event that is not JSON: "
                                                    + one_line(b" ".join(self._pending)))
                    break
                self._event = ""
            elif line.strip() == b"[DONE]":
                frames.append(("", None))
            elif self._bare or line.lstrip()[:1] in (b"{", b"["):
                self._bare_line(line, frames)
            elif line[:6] == b"event:":
                self._event = str(line[6:].strip(), "utf-8", "replace")
            elif not line.startswith((b":", b"id:", b"retry:")) and len(self.stray) < 64:
                self.stray.append(line)
        return frames

    def _data(self, payload: bytes, frames: list) -> None:
        if payload == b"[DONE]":
            frames.append((self._event, None))
        elif payload or self._pending:
            self._pending.append(payload)
            if len(self._pending) > 1000:
                raise BadUpstreamPayload("upstream sent an event of more than 1000 lines")
            if len(self._pending) == 1 or payload[-1:] in (b"}", b"]"):
                value = load_or_none(b"\n".join(self._pending))
                if value is None and len(self._pending) > 1:
                    value = as_dict(load_or_none(payload)) or None      # a line of its own after junk
                if value is not None:
                    self._pending.clear()
                    frames.append((self._event, value))

    def _bare_line(self, line: bytes, frames: list) -> None:
        """An NDJSON line is whole; a printed JSON document is not, and is kept for the end."""
        self._bare = True
        value = load_or_none(line) if not self.stray else None
        if value is None:
            self.stray.append(line)
        else:
            frames.append(("", value))


def load_or_none(data: bytes) -> Any:
    """load(), or None for what is no JSON (and for a null, which says nothing)."""
    try:
        return load(data)
    except (ValueError, RecursionError):
        return None


def sse_frame(value: Any) -> bytes:
    """One `data:` event (WHATWG server-sent events)."""
    return b"data: " + dump(value) + b"\n\n"


def ndjson_line(value: Any) -> bytes:
    """One compact object and a newline."""
    return dump(value) + b"\n"


def http_chunk(data: bytes) -> bytes:
    """One chunk of chunked transfer coding (RFC 9112 section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
_CHUNK = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_TRAILERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
_CHUNK_LINE_BYTES = 4096


class ChunkedDecoder:
    """Takes chunked transfer coding off (RFC 9112 section 7.1), strictly: hexadecimal sizes, CR LF only.

    Reads from the CR LF that ends one chunk to the one that ends the next; the first chunk ends none.
    `done` once the last chunk and its trailers were read; `rest` is what followed.  Raises ValueError on
    anything else, and leaves what came before it in `salvaged`.
    """

    def __init__(self, limit: int = 1 << 62) -> None:
        self._limit = limit
        self._left = 0                  # content bytes before the next CR LF
        self._last = False              # the last chunk has come, its trailers not yet
        self.content = 0
        self.rest = b"\r\n"
        self.done = False
        self.salvaged = b""

    def feed(self, data: bytes) -> bytes:
        """Returns the content bytes in `data`."""
        data, at = self.rest + data, self._left
        pieces = [data[:at]] if at else []
        while at < len(data) and not self._last:
            line = _CHUNK.match(data, at)
            if line is None:
                self._expect(data[at:], pieces, b"\r\n")
                break
            size, begin = int(line[1], 16), line.end()
            self.content += size
            if self.content > self._limit:
                raise BodyTooLarge("body too large")
            self._last, at = not size, begin + size
            pieces.append(data[begin:at])
        self._left, self.rest = max(0, at - len(data)), data[at:]
        if self._last and not self._left:
            end = _TRAILERS.match(self.rest)
            if end is not None:
                self.done, self.rest = True, self.rest[end.end():]
            else:
                self._expect(self.rest, pieces, b"")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _expect(self, held: bytes, pieces: list, before: bytes) -> None:
        """Raises ValueError unless `held` may be the beginning of a size line or of trailers."""
        if len(held) > _CHUNK_LINE_BYTES or not (held.startswith(before) or before.startswith(held)) \
                or (before and b"\n" in held[2:]) or (not before and not _TRAILER_BEGUN.fullmatch(held)):
            self.salvaged = b"".join(pieces)
            raise ValueError("chunk longer than its size, malformed size or trailer")


_TRAILER_BEGUN = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*(?:[^\r\n]*\r?)")


class BodyTooLarge(ValueError):
    """A chunked body grew beyond its limit."""


def inflater(coding: str) -> Optional[Callable]:
    """What takes a content coding off an answer, piece by piece; None when there is none.

    Raises BadUpstreamPayload for a coding that was not asked for.
    """
    if coding in ("", "identity"):
        return None
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise BadUpstreamPayload(f"upstream compressed its answer as {one_line(coding, 40)}, which was not asked for")
    inflate: Any = zlib.decompressobj(31) if coding != "deflate" else None
    head = b""

    def step(data: bytes) -> bytes:
        nonlocal inflate, head
        if inflate is None:             # "deflate" is zlib by the standard and raw by habit (RFC 9110 section 8.4.1.2)
            data = head = head + data
            if len(data) < 2:
                return b""
            inflate = zlib.decompressobj(15 if data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0 else -15)
        try:
            data = inflate.decompress(data, MAX_INFLATED)
        except zlib.error:
            raise BadUpstreamPayload("upstream sent a broken compressed body") from None
        if inflate.unconsumed_tail:
            raise BadUpstreamPayload("upstream sent a compressed body that expands beyond reason")
        return data

    return step


def one_line(text: Any, limit: int = 500) -> str:
    """Text for a log line or an error: one line, control characters escaped, cut to `limit`."""
    if isinstance(text, (bytes, bytearray)):
        text = str(text[:limit * 4], "utf-8", "replace")
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    text = " ".join(text[:limit * 4].split()) if "\n" in text or "\r" in text else text
    text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text[:limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def sniff_media_type(data: str) -> str:
    """Media type of base64 `data` from its first bytes; image/jpeg when nothing is recognised."""
    try:
        head = binascii.a2b_base64(data[:24] + "=" * (-len(data[:24]) % 4))
    except ValueError:
        return "image/jpeg"
    if head[:4] == b"RIFF":
        return "audio/wav" if head[8:12] == b"WAVE" else "image/webp"
    for magic, media_type in ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"GIF8", "image/gif"),
                              (b"ID3", "audio/mp3"), (b"\xff\xfb", "audio/mp3"), (b"\xff\xf3", "audio/mp3")):
        if head.startswith(magic):
            return media_type
    return "image/jpeg"


_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.A)
_URLSAFE = str.maketrans("-_", "+/")
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


def parse_image(value: Any) -> Optional[Image]:
    """An image as any client sends it: base64, data URL or http(s) URL; None for an empty one.

    Raises BadRequest when it is none of these.
    """
    if isinstance(value, dict):                 # OpenAI's {"url": ...}, and bytes wrapped by some libraries
        value = value.get("url") or value.get("data") or ""
    if not isinstance(value, str):
        raise BadRequest("invalid image input: a base64 string is expected")
    if value[:7] in ("http://", "https:/"):
        return Image(url=value)
    match = _DATA_URL.match(value[:200])
    data = value[match.end():] if match else value
    if not data.strip():
        return None
    if not data.isascii() or any(space in data for space in "\r\n\t "):
        data = "".join(data.split())
    if "-" in data or "_" in data:
        data = data.translate(_URLSAFE)
    data += "=" * (-len(data) % 4)
    if len(data) % 4 or not _BASE64.fullmatch(data):
        raise BadRequest("illegal base64 data in image")
    sniffed = sniff_media_type(data)
    named = match[1] if match and match[1] and match[1] != "image/jpg" else ""
    return Image(data=data, media_type=sniffed if sniffed != "image/jpeg" or not named else named)


def call_id(*seed: Any) -> str:
    """Nine letters or digits, the only form every server takes (Mistral insists on it); the same for
    the same seed, so that a repeated history hits the target's prompt cache.  Random without seed."""
    number = (int.from_bytes(hashlib.sha256(repr(seed).encode("utf-8", "replace")).digest()[:7], "big")
              if seed else random.getrandbits(56))
    letters = ""
    for _ in range(9):
        number, digit = divmod(number, 36)
        letters += "0123456789abcdefghijklmnopqrstuvwxyz"[digit]
    return letters


def parse_arguments(value: Any) -> Optional[dict]:
    """A call's arguments as an object, from an object, JSON text, or JSON text encoded twice.

    Nothing, "" and "null" are {}; None is returned for what cannot be read.
    """
    for _ in range(3):
        if value is None:
            return {}
        if isinstance(value, dict):
            return value
        if not isinstance(value, str):
            return None
        text = value.strip()
        if not text:
            return {}
        if json_depth(text.encode("utf-8", "replace")) >= MAX_JSON_DEPTH:
            return None
        try:
            value, end = _decode_first_json(text)
        except (ValueError, RecursionError):
            return None
        if text[end:].strip():
            return None
    return None


def schema_of(parameters: Any) -> dict:
    """A tool's parameters as an object schema: fills in what clients leave out (clients rule 42)."""
    if not isinstance(parameters, dict) or not parameters:
        return {"type": "object", "properties": {}}
    known = ("type", "properties", "required", "$defs", "definitions", "items", "anyOf", "oneOf", "allOf", "$ref",
             "additionalProperties", "description", "$schema", "title")
    if "type" not in parameters and "properties" not in parameters \
            and not any(key in parameters and key != "description" for key in known[2:]) \
            and all(isinstance(value, dict) for value in parameters.values()):
        return {"type": "object", "properties": parameters}     # a bare property map
    schema = {key: value for key, value in parameters.items() if key != "$schema" and value is not None}
    if "type" not in schema and not any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref")):
        schema = {"type": "object", **schema}
    if schema.get("type") == "object":
        schema.setdefault("properties", {})
    return schema


def gather(events: Iterable) -> tuple[str, str, list, list, Finish]:
    """A whole reply: its text, thinking, calls, logprobs and finish.  Raises the error of a Failure."""
    text, thinking, calls, logprobs = [], [], [], []
    finish = Finish("stop", Usage())
    for event in events:
        if isinstance(event, TextDelta):
            text.append(event.text)
            logprobs.extend(event.logprobs or ())
        elif isinstance(event, ThinkingDelta):
            thinking.append(event.text)
        elif isinstance(event, ToolCalls):
            calls.extend(event.calls)
        elif isinstance(event, Failure):
            raise event.error
        else:
            finish = event
    return "".join(text), "".join(thinking), calls, logprobs, finish


def as_list(value: Any) -> list:
    """The list in a field of an upstream, or nothing."""
    return value if isinstance(value, list) else []


def as_dict(value: Any) -> dict:
    """The object in a field of an upstream, or nothing."""
    return value if isinstance(value, dict) else {}


def as_text(value: Any) -> str:
    """The string in a field of an upstream, or nothing."""
    return value if isinstance(value, str) else ""


def as_count(value: Any) -> Optional[int]:
    """A positive number of an upstream as int, or None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1 << 62:
        return int(value)
    return None


def nanoseconds(value: Any, unit: float) -> Optional[int]:
    """A duration of an upstream, `unit` seconds each, as whole nanoseconds of at least 1."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value * unit < 1e9:
        return max(1, round(value * unit * 1e9))
    return None

# ----------------------------------------------------------------------------
# Room 5.  Ollama dialect: /api/*, both faces (Ollama v0.33, docs/api.md)
# ----------------------------------------------------------------------------

# Neutral name -> Ollama's, read both ways.  What OpenAI has no word for stands in room 6's table
# under the name that llama.cpp and vLLM understand.
OLLAMA_OPTION_KEYS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "typical_p": "typical_p", "seed": "seed", "max_tokens": "num_predict", "stop": "stop",
    "repeat_penalty": "repeat_penalty", "repeat_last_n": "repeat_last_n",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
}
_OPTION_NAMES = {wire: name for name, wire in OLLAMA_OPTION_KEYS.items()}
OPTION_KINDS = {"top_k": int, "seed": int, "max_tokens": int, "repeat_last_n": int}
_GO_KINDS = {int: "integer", float: "float32", list: "array"}
THINK_LEVELS = ("low", "medium", "high", "max")


def parse_options(options: dict) -> tuple[dict, dict]:
    """Ollama's `options` -> (neutral options, the rest).  Nulls and meaningless values are left out.

    Raises BadRequest for an option of the wrong type, in Ollama's words.
    """
    neutral: dict = {}
    rest: dict = {}
    for wire, value in options.items():
        name = _OPTION_NAMES.get(wire)
        if value is None:
            continue
        if name is None:
            rest[wire] = value
            continue
        if name == "stop":
            value = parse_stop(value)
            if not value:
                continue
        else:
            kind = OPTION_KINDS.get(name, float)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BadRequest(f'option "{wire}" must be of type {_GO_KINDS[kind]}')
            if kind is int:
                try:
                    value = int(value)
                except (ValueError, OverflowError):
                    raise BadRequest(f'option "{wire}" must be of type integer') from None
            if (name == "max_tokens" and value <= 0) or (name == "seed" and value == -1) \
                    or (name in ("repeat_last_n", "top_k") and value < (name == "top_k")):
                continue                # "no limit", "random", "off": what absence means to everybody else
        neutral[name] = value
    return neutral, rest


def parse_stop(value: Any) -> list:
    """Stop strings from one string or a list; empty ones end some servers' answers at once."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRequest('option "stop" must be of type array of strings')
    if len(value) > 64 or any(len(item) > 256 for item in value):
        raise BadRequest('option "stop": at most 64 strings of at most 256 characters are supported')
    return [item for item in value if item]


def parse_think(value: Any) -> Any:
    """`think` -> None, bool or level.  Raises BadRequest in Ollama's words."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        word = value.strip().lower()
        if word in THINK_LEVELS:
            return word
        if word in ("true", "false", ""):
            return {"true": True, "false": False}.get(word)
        raise BadRequest(f'invalid think value: "{one_line(value, 40)}" '
                         '(must be "high", "medium", "low", "max", true, or false)')
    raise BadRequest('think must be a boolean or string ("high", "medium", "low", "max", true, or false)')


def parse_format(value: Any) -> Any:
    """`format` -> None, "json" or a schema.  Raises BadRequest in Ollama's words."""
    if value is None or value == "":
        return None
    if value == "json" or isinstance(value, dict):
        return value or "json"
    raise BadRequest(f"invalid format: {one_line(json.dumps(value), 80)}; "
                     'expected "json" or a valid JSON Schema object')


_DURATION = re.compile(r"([0-9.]+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_alive_seconds(value: Any) -> Optional[float]:
    """`keep_alive` in all its forms -> seconds; negative is forever, None is not said or unreadable."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value) if abs(value) < 1e12 else None
    text = str(value)[:64].strip().lower()
    if re.fullmatch(r"-?[0-9]{1,12}(\.[0-9]*)?", text):
        return float(text)                      # "300" and "-1", which Ollama refuses and clients send
    sign, text = (-1.0, text[1:]) if text[:1] == "-" else (1.0, text.lstrip("+"))
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    try:
        return sign * sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)
    except ValueError:
        return None


def require_model(body: dict) -> str:
    """The model's name, under its present or its legacy key; "" when there is none."""
    return (field(body, "model", str, "") or field(body, "name", str, "")).strip()


def parse_tools(value: Any) -> tuple:
    """Tools of a request -> Tool; only functions, since nothing else can be offered to the model."""
    tools = []
    for tool in value or ():
        if not isinstance(tool, dict):
            raise BadRequest("json: cannot unmarshal a tool: an object is expected")
        function = tool.get("function")
        if function is None and "name" in tool:
            function = tool
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            continue
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise BadRequest("a tool has no name")
        strict = function.get("strict")
        tools.append(Tool(name, as_text(function.get("description")), schema_of(function.get("parameters")),
                          strict if isinstance(strict, bool) else None))
    return tuple(tools)


def parse_tool_choice(value: Any) -> Any:
    """`tool_choice` -> None, a word, or a named function as a 1-tuple."""
    if isinstance(value, dict):
        name = as_dict(value.get("function")).get("name") or value.get("name")
        return (name,) if isinstance(name, str) and name else None
    return {"none": "none", "required": "required", "any": "required", "auto": "auto"}.get(value) \
        if isinstance(value, str) else None


def parse_logprobs(body: dict) -> Optional[int]:
    """`logprobs` and `top_logprobs` -> None or the number of alternatives."""
    if not field(body, "logprobs", bool, False):
        return None
    top = field(body, "top_logprobs", int, 0)
    if not 0 <= top <= 20:
        raise BadRequest("top_logprobs must be between 0 and 20")
    return top


def parse_parts(parts: list) -> tuple[str, tuple, str]:
    """A content list of any client -> (text, images, thinking).  Raises BadRequest for unknown parts."""
    texts, images, thinking = [], [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text", "refusal"):
            texts.append(as_text(part.get("text", part.get("refusal"))))
        elif kind in ("image_url", "input_image", "image"):
            images.append(parse_image(part.get("image_url", part.get("image"))))
        elif kind == "input_audio":
            audio = as_dict(part.get("input_audio"))
            image = parse_image(audio.get("data", ""))
            images.append(image and image._replace(media_type=f"audio/{as_text(audio.get('format')) or 'wav'}"))
        elif kind in ("thinking", "reasoning"):
            inner = part.get("thinking", part.get("text"))
            thinking.append(inner if isinstance(inner, str)
                            else "".join(as_text(as_dict(piece).get("text")) for piece in as_list(inner)))
        else:
            raise BadRequest(f"invalid message format: content part of type {kind!r}")
    return "\n".join(texts), tuple(image for image in images if image), "".join(thinking)


def parse_call(call: Any) -> ToolCall:
    """One tool call of the history, whichever way its arguments are written."""
    function = as_dict(as_dict(call).get("function")) or as_dict(call)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        name = "unknown"
    arguments = parse_arguments(function.get("arguments"))
    if arguments is None:
        raise BadRequest(f"invalid tool call arguments of {one_line(name, 60)}: a JSON object is expected")
    return ToolCall(as_text(call.get("id")), name, arguments)


_PLAIN_ROLES = frozenset(("user", "assistant", "system"))


def parse_message(message: Any) -> Message:
    """One message as Ollama and OpenAI clients write it (the two differ in names, not in meaning)."""
    if not isinstance(message, dict):
        raise BadRequest(f"json: cannot unmarshal {json_kind(message)} into field messages of type object")
    role, content = message.get("role"), message.get("content")
    if len(message) == 2 and type(content) is str and role in _PLAIN_ROLES:
        return Message(role, content)
    if not all(map(str.islower, message)):
        message = {**{key.lower(): value for key, value in message.items()}, **message}
    role = (field(message, "role", str, "") or "user").lower()
    content, images, thinking = message.get("content"), (), ""
    if isinstance(content, list):
        content, images, thinking = parse_parts(content)
    elif isinstance(content, dict) and role == "tool":
        content = json.dumps(content)           # a result that was never turned into text
    elif content is not None and not isinstance(content, str):
        raise BadRequest(f"json: cannot unmarshal {json_kind(content)} into field content of type string")
    for key in ("thinking", "reasoning_content", "reasoning"):
        thinking = thinking or as_text(message.get(key))
    extra_images = message.get("images")
    if extra_images:
        if not isinstance(extra_images, list):
            raise BadRequest(f"json: cannot unmarshal {json_kind(extra_images)} into field images of type array")
        images += tuple(image for image in map(parse_image, extra_images) if image)
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, (list, tuple)):
        raise BadRequest(f"json: cannot unmarshal {json_kind(calls)} into field tool_calls of type array")
    if len(calls) > 512:
        raise BadRequest("more than 512 tool calls in one message")
    return Message("system" if role == "developer" else role, content or "", thinking, images,
                   tuple(parse_call(call) for call in calls), as_text(message.get("tool_call_id")),
                   as_text(message.get("tool_name")) or (as_text(message.get("name")) if role == "tool" else ""))


def _common(body: dict) -> dict:
    """The fields that /api/chat and /api/generate share, as arguments of ChatCall."""
    wire = field(body, "options", dict, {})
    for name, key in (("temperature", "temperature"), ("top_p", "top_p"), ("max_output_tokens", "num_predict")):
        if body.get(name) is not None:          # some AI SDK providers lift these to the top level
            wire = {key: body[name], **wire}
    options, extra = parse_options(wire)
    keep_alive = body.get("keep_alive", wire.get("keep_alive"))
    return dict(options=options, extra=extra, think=parse_think(body.get("think")), keep_alive=keep_alive,
                format=parse_format(body.get("format", wire.get("format"))),
                stream=field(body, "stream", bool, True), logprobs=parse_logprobs(body), want_usage=True)


_BARE = frozenset(("model", "messages", "stream"))


def parse_ollama_chat(body: dict, face: str = "chat") -> ChatCall:
    """POST /api/chat or, with face "generate", /api/generate (ollama-api 2.4, 2.6) -> ChatCall.

    A call without messages and prompt asks to load or unload the model.  Raises BadRequest.
    """
    if face == "generate":
        return _parse_ollama_generate(body)
    model = require_model(body)
    if not model:
        raise BadRequest("model is required")
    messages = tuple([parse_message(message) for message in field(body, "messages", list, [])])
    if body.keys() <= _BARE:
        return ChatCall(model, "chat", messages, stream=field(body, "stream", bool, True), want_usage=True)
    system, prompt = field(body, "system", str, ""), field(body, "prompt", str, "")
    if not messages and prompt:
        messages = (Message("user", prompt),)
    if messages and system and messages[0].role != "system":
        messages = (Message("system", system),) + messages
    return ChatCall(model, "chat", messages, tools=parse_tools(field(body, "tools", list, [])),
                    tool_choice=parse_tool_choice(body.get("tool_choice")), **_common(body))


def _parse_ollama_generate(body: dict) -> ChatCall:
    model = require_model(body)
    if not model:
        raise BadRequest("model '' not found", 404)
    prompt, suffix, system, template = (field(body, key, str, "") for key in
                                        ("prompt", "suffix", "system", "template"))
    raw = field(body, "raw", bool, False)
    context = field(body, "context", list, [])
    images = tuple(image for image in map(parse_image, field(body, "images", list, [])) if image)
    if raw and (template or system or context):
        raise BadRequest("raw mode does not support template, system, or context")
    call = ChatCall(model, "generate", raw=raw, images=images, **_common(body))
    if raw or suffix:
        if not prompt and not suffix:
            return call
        if images:
            raise BadRequest("images cannot be sent together with raw or suffix")
        return call._replace(prompt=f"{system}\n\n{prompt}" if system else prompt, suffix=suffix)
    if not prompt and not images:
        return call
    if template:
        prompt = render_template(template, {"System": system, "Prompt": prompt, "Suffix": suffix, "Response": ""})
        system = "" if ".System" in template else system
    turns = unpack_context(context) + ([Message("system", system)] if system else []) \
        + [Message("user", prompt, images=images)]
    turns.sort(key=lambda turn: turn.role != "system")      # a system text given late still stands first
    return call._replace(messages=tuple(turns), conversation=tuple(turns))


_ACTION = re.compile(r"\{\{([^{}]*)\}\}")


def render_template(template: str, values: dict) -> str:
    """The part of Go's templates that prompt overrides use: {{ .Name }}, if, else, end, and trimming.

    Raises BadRequest for any other action, rather than send half a prompt.
    """
    output: list[str] = []
    stack = [True]
    at = 0
    trim = False
    for match in _ACTION.finditer(template):
        text = template[at:match.start()]
        action = match[1]
        text = text.lstrip() if trim else text
        text = text.rstrip() if action[:1] == "-" else text
        at, trim = match.end(), action[-1:] == "-"
        action = action.strip("- \t\r\n")
        if all(stack):
            output.append(text)
        name = re.fullmatch(r"(if\s+)?\.(\w+)", action)
        if name and name[2] in values:
            if name[1]:
                if len(stack) > 50:
                    raise BadRequest("template error: nested too deeply")
                stack.append(bool(values[name[2]]))
            elif all(stack):
                output.append(values[name[2]])
        elif action == "else" and len(stack) > 1:
            stack[-1] = not stack[-1]
        elif action == "end" and len(stack) > 1:
            stack.pop()
        elif not action.startswith("/*"):
            raise BadRequest(f"template error: {{{{ {one_line(action, 60)} }}}} is not supported by this proxy")
    if len(stack) > 1:
        raise BadRequest("template error: unexpected EOF")
    rest = template[at:]
    return "".join(output) + (rest.lstrip() if trim else rest)


# The `context` of generate is a list of numbers that brings a conversation back.  An OpenAI target has
# no such list, so ours carries the conversation itself: compressed, three bytes to a number, after a mark.
_CONTEXT_MARK = 0x70A11A


def pack_context(conversation: tuple, answer: str) -> list[int]:
    """Conversation and answer -> numbers below 2**24, which every client's integers hold."""
    turns = [[turn.role, turn.content] for turn in conversation] + [["assistant", answer]]
    data = zlib.compress(dump(turns), 1)
    while len(data) > CONTEXT_BYTES and len(turns) > 2:
        first = turns[0][0] == "system"         # the oldest go first, but for the system text
        surplus = len(turns) - int(len(turns) * 0.8 * CONTEXT_BYTES / len(data))
        del turns[first:first + max(1, min(surplus, len(turns) - 2))]
        data = zlib.compress(dump(turns), 1)
    padded = data + b"\0" * (-len(data) % 3)
    return [_CONTEXT_MARK, len(data)] + [int.from_bytes(padded[at:at + 3], "big") for at in range(0, len(padded), 3)]


def unpack_context(numbers: list) -> list[Message]:
    """The turns in a `context` of ours; none from a real Ollama's tokens, which mean nothing here."""
    if len(numbers) < 3 or numbers[0] != _CONTEXT_MARK:
        return []
    try:
        data = b"".join(int(number).to_bytes(3, "big") for number in numbers[2:])[:int(numbers[1])]
        inflate = zlib.decompressobj()
        turns = load(inflate.decompress(data, 64 * CONTEXT_BYTES))
        return [Message(str(role), str(content)) for role, content in turns]
    except (ValueError, TypeError, OverflowError, zlib.error):
        raise BadRequest("invalid context") from None


def parse_ollama_embed(body: dict, legacy: bool = False) -> EmbedCall:
    """POST /api/embed or, with `legacy`, /api/embeddings (ollama-api 2.8, 2.9) -> EmbedCall."""
    model = require_model(body)
    if not model:
        raise BadRequest("model is required") if legacy else BadRequest("model '' not found", 404)
    value = body.get("prompt", body.get("input")) if legacy else body.get("input", body.get("prompt"))
    if value is None or value == "":
        inputs: tuple = ()
    elif isinstance(value, str):
        inputs = (value,)
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        inputs = tuple(value)
    else:
        raise BadRequest("invalid input type")
    dimensions = field(body, "dimensions", int, 0)
    return EmbedCall(model, inputs, dimensions if dimensions > 0 else None, legacy,
                     keep_alive=body.get("keep_alive"), truncate=body.get("truncate"),
                     options=field(body, "options", dict, {}))


def render_ollama_options(call: ChatCall) -> dict:
    """Neutral options -> Ollama's; what the client wrote under Ollama's own names wins."""
    options = {OLLAMA_OPTION_KEYS[name]: value for name, value in call.options.items() if name in OLLAMA_OPTION_KEYS}
    options.update(call.extra)
    return options


def render_ollama_message(message: Message, names: dict) -> dict:
    """One turn for a real Ollama: string content, bare base64, object arguments, named results."""
    wire: dict = {"role": message.role, "content": message.content}
    if message.thinking:
        wire["thinking"] = message.thinking
    if message.images:
        wire["images"] = [image.data for image in message.images]
    if message.tool_calls:
        wire["tool_calls"] = [
            {"id": call.id, "function": {"index": at, "name": call.name, "arguments": call.arguments}}
            for at, call in enumerate(message.tool_calls)]
        names.update((call.id, call.name) for call in message.tool_calls)
    if message.role == "tool":
        name = message.tool_name or names.get(message.tool_call_id, "")
        wire.update({key: value for key, value in (("tool_name", name), ("tool_call_id", message.tool_call_id))
                     if value})
    return wire


def resolve_references(schema: Any, root: Optional[dict] = None, depth: int = 0, budget: Optional[list] = None) -> Any:
    """A tool schema with local $ref put in place, since Ollama drops references (ollama-api 2.4).

    Raises BadRequest for one that grows beyond 10,000 places by that.
    """
    budget = [10000] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0:
        raise BadRequest("a tool's schema refers to itself too often")
    if isinstance(schema, list):
        return [resolve_references(item, root, depth, budget) for item in schema]
    if not isinstance(schema, dict):
        return schema
    root = schema if root is None else root
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/") and depth < 8:
        found: Any = root
        for part in reference[2:].split("/"):
            found = as_dict(found).get(part.replace("~1", "/").replace("~0", "~"))
        if isinstance(found, dict):
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            return resolve_references({**found, **rest}, root, depth + 1, budget)
    return {key: resolve_references(value, root, depth, budget) for key, value in schema.items()
            if key not in ("$defs", "definitions")}


def render_ollama_chat(call: ChatCall, habits: Habits, context: Optional[int] = None) -> WireRequest:
    """ChatCall -> POST /api/chat, or /api/generate for a plain prompt, of a real Ollama."""
    del habits, context                         # an Ollama behaves like an Ollama
    body: dict = {"model": call.model}
    if call.prompt is None:
        names: dict = {}
        body["messages"] = [render_ollama_message(message, names) for message in call.messages]
        tools = [tool for tool in call.tools if not isinstance(call.tool_choice, tuple)
                 or tool.name == call.tool_choice[0]]
        if tools and call.tool_choice != "none":
            body["tools"] = [{"type": "function", "function": {
                "name": tool.name, "description": tool.description,
                "parameters": resolve_references(tool.parameters)}} for tool in tools]
    else:
        body["prompt"] = call.prompt
        if call.suffix:
            body["suffix"] = call.suffix
    body["stream"] = call.stream
    options = render_ollama_options(call)
    for key, value in (("options", options or None), ("format", call.format), ("think", call.think),
                       ("keep_alive", call.keep_alive), ("logprobs", True if call.logprobs is not None else None),
                       ("top_logprobs", call.logprobs or None)):
        if value is not None:
            body[key] = value
    return WireRequest("/api/chat" if call.prompt is None else "/api/generate", body)


def render_ollama_embed(call: EmbedCall, habits: Habits) -> WireRequest:
    """EmbedCall -> POST /api/embed."""
    del habits
    body = {"model": call.model, "input": list(call.inputs), "dimensions": call.dimensions,
            "keep_alive": call.keep_alive, "truncate": call.truncate, "options": call.options or None}
    return WireRequest("/api/embed", {key: value for key, value in body.items() if value is not None})


def read_ollama_embeddings(answer: Any, count: int) -> tuple[list, Usage]:
    """Answer of /api/embed -> (vectors, Usage).  Raises BadUpstreamPayload when vectors are missing."""
    vectors = as_list(as_dict(answer).get("embeddings"))
    check_vectors(vectors, count)
    return vectors, Usage(prompt_tokens=as_count(answer.get("prompt_eval_count")))


def check_vectors(vectors: list, count: int) -> None:
    """Raises BadUpstreamPayload unless there is one vector for each input."""
    if len(vectors) != count:
        raise BadUpstreamPayload(f"upstream returned {len(vectors)} embeddings for {count} inputs")


def render_ollama_embeddings(call: EmbedCall, model: str, vectors: list, usage: Usage, took: int) -> dict:
    """Vectors -> answer of /api/embed, or of /api/embeddings when `call.legacy`.  `took` in ns."""
    if call.legacy:
        return {"embedding": vectors[0] if vectors else []}
    answer = {"model": model, "embeddings": vectors}
    if vectors:
        prompt = usage.prompt_tokens or max(1, sum(len(text.encode("utf-8", "replace")) for text in call.inputs) // 4)
        answer.update(total_duration=max(1, took), load_duration=usage.load_ns or 1, prompt_eval_count=prompt)
    return answer


class OllamaDecoder:
    """NDJSON of /api/chat or /api/generate -> events.  feed(bytes), then close()."""

    frame_end = b"\n"
    stamp = re.compile(rb'"created_at":"[^"\\\x00-\x1f]*"')     # other in each line

    def __init__(self, call: ChatCall) -> None:
        self._lines = LineDecoder()
        self._call = call
        self.done = False

    def decode_body(self, answer: Any) -> list:
        """A whole answer instead of a stream -> all events."""
        return decode_ollama_body(answer, self._call)

    @property
    def plain(self) -> bool:
        """Nothing is pending: a content line is just its text (the shortcut of room 7 asks)."""
        return not self.done and self._call.logprobs is None and self._lines.idle

    @property
    def between(self) -> bool:
        return self._lines.idle

    def feed(self, data: bytes) -> list:
        """Returns the events of all complete lines."""
        events: list = []
        for line in self._lines.feed(data):
            self._line(line, events)
        return events

    def close(self) -> list:
        """The body ended: events of a line without newline, and a Failure if `done` never came."""
        events: list = []
        for line in self._lines.close():
            self._line(line, events)
        if not self.done:
            self.done = True
            events.append(Failure(StreamTruncated("upstream closed the stream before finishing")))
        return events

    def _line(self, line: bytes, events: list) -> None:
        if self.done or not line.strip():
            return
        try:
            answer = load(line)
        except (ValueError, RecursionError):
            self.done = True
            events.append(Failure(BadUpstreamPayload(f"upstream sent a line that is not JSON: {one_line(line)}")))
            return
        decode_ollama_answer(as_dict(answer), events)
        self.done = bool(events) and isinstance(events[-1], (Finish, Failure))


def decode_ollama_answer(answer: dict, events: list) -> None:
    """One object of a stream, or a whole answer, appended to `events`."""
    error = answer.get("error")
    if error:
        text = error if isinstance(error, str) else as_text(as_dict(error).get("message")) or json.dumps(error)
        events.append(Failure(UpstreamError(text)))
        return
    message = as_dict(answer.get("message"))
    thinking = as_text(message.get("thinking")) or as_text(answer.get("thinking"))
    text = as_text(message.get("content")) or as_text(answer.get("response"))
    if thinking:
        events.append(ThinkingDelta(thinking))
    if text:
        events.append(TextDelta(text, as_list(answer.get("logprobs")) or None))
    calls = as_list(message.get("tool_calls")) or as_list(answer.get("tool_calls"))
    if calls:
        events.append(ToolCalls(tuple(
            ToolCall(as_text(as_dict(call).get("id")) or "call_" + call_id(),
                     as_text(as_dict(as_dict(call).get("function")).get("name")),
                     parse_arguments(as_dict(as_dict(call).get("function")).get("arguments")) or {})
            for call in calls)))
    if answer.get("done"):
        events.append(Finish(as_text(answer.get("done_reason")) or "stop", Usage(
            as_count(answer.get("prompt_eval_count")), as_count(answer.get("eval_count")),
            as_count(answer.get("prompt_eval_duration")), as_count(answer.get("eval_duration")),
            as_count(answer.get("load_duration")))))


def decode_ollama_body(answer: Any, call: ChatCall, **_: Any) -> list:
    """A whole answer of /api/chat or /api/generate -> events."""
    del call
    events: list = []
    if not isinstance(answer, dict) or not {"message", "response", "error"} & answer.keys():
        return [Failure(BadUpstreamPayload("upstream sent an answer without a message"))]
    decode_ollama_answer({"done": True, **answer, "done": True}, events)
    return events


class OllamaEncoder:
    """Events -> NDJSON lines of /api/chat or /api/generate, or one whole answer.

    `clock` tells monotonic nanoseconds (`now`) and the RFC 3339 stamp (`stamp`); `started` and `sent`
    are when the request arrived and when it went to the target.  A count the target never gave is an
    estimate: deltas seen, bytes / 4 for the prompt.
    """

    media_type = NDJSON
    tail = b""

    def __init__(self, call: ChatCall, clock: Any, started: int, sent: int, reasoning: tuple = ()) -> None:
        del reasoning
        self._call, self._clock, self._started, self._sent = call, clock, started, sent
        self._first = 0                 # when the first delta was encoded
        self._deltas = 0
        self._answer: Optional[list] = [] if call.conversation is not None else None
        self._stamp = ""

    def tick(self) -> None:
        """A new batch of events begins: one timestamp serves them all."""
        self._stamp = self._clock.stamp().decode()

    def around(self, texts: list) -> tuple[bytes, bytes]:
        """What stands before and after each of `texts`, which are JSON string contents already."""
        self._count(len(texts))
        if self._answer is not None:
            self._answer.append(_decode_json(f'"{b"".join(texts).decode("ascii")}"'))
        self.tick()
        before, _, after = ndjson_line(self._object("\x01")).rpartition(b"\\u0001")
        return before, after

    def encode(self, event: Any) -> bytes:
        """Returns one line."""
        if isinstance(event, Failure):
            return self.error(event.error)
        if isinstance(event, Finish):
            return ndjson_line({**self._object(), **self._last(event)})
        self._count(len(event.calls) if isinstance(event, ToolCalls) else 1)
        if isinstance(event, ThinkingDelta):
            return ndjson_line(self._object(thinking=event.text))
        if isinstance(event, ToolCalls):
            return ndjson_line(self._object(tool_calls=ollama_calls(event.calls)))
        if self._answer is not None:
            self._answer.append(event.text)
        return ndjson_line({**self._object(event.text), **({"logprobs": event.logprobs} if event.logprobs else {})})

    def error(self, error: ProxyError) -> bytes:
        """The in-band error line; nothing follows it."""
        return ndjson_line({"error": error.message})

    def fold(self, events: Iterable) -> bytes:
        """All events -> the JSON for stream:false.  Raises the error of a Failure."""
        content, thinking, calls, logprobs, finish = gather(events)
        if self._answer is not None:
            self._answer.append(content)
        self._deltas = max(1, (len(content) + len(thinking)) // 4)
        self.tick()
        beside = {key: value for key, value in (("thinking", thinking), ("tool_calls", ollama_calls(calls))) if value}
        return dump({**self._object(content, **beside), **self._last(finish), **({"logprobs": logprobs} if logprobs else {})})

    def _count(self, deltas: int) -> None:
        """Deltas that are part of the estimates."""
        self._first = self._first or self._clock.now()
        self._deltas += deltas

    def _object(self, text: str = "", **beside: Any) -> dict:
        """One object: `text` and what stands `beside` it."""
        said = {"response": text, **beside} if self._call.face == "generate" \
            else {"message": {"role": "assistant", "content": text, **beside}}
        return {"model": self._call.model, "created_at": self._stamp, **said, "done": False}

    def _last(self, finish: Finish) -> dict:
        """done, done_reason, context and the six metrics, each at least 1 (durations in ns)."""
        usage, now = finish.usage, self._clock.now()
        first = self._first or self._sent
        context = {} if self._answer is None else {"context": pack_context(self._call.conversation, "".join(self._answer))}
        metrics = {"total_duration": now - self._started, "load_duration": usage.load_ns or self._sent - self._started,
                   "prompt_eval_count": usage.prompt_tokens or self._call.prompt_bytes() // 4,
                   "prompt_eval_duration": usage.prompt_ns or first - self._sent,
                   "eval_count": usage.completion_tokens or self._deltas, "eval_duration": usage.completion_ns or now - first}
        return {"done": True, "done_reason": "length" if finish.reason == "length" else "stop", **context,
                **{name: max(1, value) for name, value in metrics.items()}}


def ollama_calls(calls: Iterable) -> list:
    """Calls as Ollama writes them: id, index within the turn, object arguments, no type."""
    return [{"id": call.id, "function": {"index": at, "name": call.name, "arguments": call.arguments}}
            for at, call in enumerate(calls)]


def render_ollama_error(error: ProxyError) -> dict:
    """One flat object (ollama-api 1.4)."""
    return {"error": error.message}


def load_answer(call: ChatCall, stamp: str) -> dict:
    """The answer to a call without anything to say: load, or unload for keep_alive 0 (ollama-api 2.7)."""
    answer: dict = {"model": call.model, "created_at": stamp}
    if call.face == "generate":
        answer["response"] = ""
    else:
        answer["message"] = {"role": "assistant", "content": ""}
    return {**answer, "done": True, "done_reason": "unload" if keep_alive_seconds(call.keep_alive) == 0 else "load"}


def digest_of(model_id: str) -> str:
    """A stable digest for a model that has none: 64 hex digits of SHA-256 over its id."""
    return hashlib.sha256(model_id.encode("utf-8", "replace")).hexdigest()


def timestamp(seconds: Optional[float]) -> str:
    """RFC 3339 in UTC; the epoch for a date that nobody told."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(min(max(seconds or 0, 0), 253402300799)))


def ollama_details(info: ModelInfo) -> dict:
    """`details` of tags, show and ps (ollama-api 2.1): six fields, always strings."""
    family = info.family or "unknown"
    return {"parent_model": info.parent, "format": info.format, "family": family, "families": [family],
            "parameter_size": info.parameter_size, "quantization_level": info.quantization}


def ollama_entry(info: ModelInfo) -> dict:
    """What tags and ps have in common."""
    return {"name": info.shown, "model": info.shown, "size": info.size or 0,
            "digest": digest_of(info.alias or info.id),
            "details": ollama_details(info)}


def ollama_tag(info: ModelInfo) -> dict:
    """One entry of GET /api/tags (ollama-api 2.1)."""
    entry = {**ollama_entry(info), "modified_at": timestamp(info.created), "capabilities": list(info.capabilities)}
    for key, value in (("context_length", info.context), ("embedding_length", info.embedding_length)):
        if value:
            entry["details"][key] = value
    return entry


def ollama_running(info: ModelInfo, now: float) -> dict:
    """One entry of GET /api/ps (ollama-api 2.2).  Servers do not say when they unload: never."""
    entry = {**ollama_entry(info), "expires_at": timestamp(now + 292 * 31556952), "size_vram": info.size or 0}
    if info.context_now:
        entry["context_length"] = info.context_now
    return entry


def ollama_show(info: ModelInfo, name: str, default_context: int) -> dict:
    """Answer of POST /api/show (ollama-api 2.3), in the shape strict clients need (clients rules 24-34)."""
    family = info.family or "unknown"
    template = info.template or "{{ if .System }}{{ .System }}\n{{ end }}{{ .Prompt }}"
    if "tools" in info.capabilities and "tools" not in template:
        template = "{{ if .Tools }}{{ .Tools }}{{/* tools */}}\n{{ end }}" + template
    if "insert" in info.capabilities and ".Suffix" not in template:
        template += "{{ .Suffix }}"
    return {
        "license": "", "parameters": "", "template": template,
        "modelfile": f'# Modelfile generated by "ollama show"\nFROM {one_line(info.shown)}\n',
        "details": ollama_details(info), "modified_at": timestamp(info.created),
        "capabilities": list(info.capabilities),
        "model_info": {
            "general.architecture": family, "general.basename": name,
            "general.parameter_count": info.parameter_count or 0,
            f"{family}.context_length": info.context or info.context_now or default_context,
            f"{family}.embedding_length": info.embedding_length or 0}}


OLLAMA = Dialect("ollama", parse_ollama_chat, parse_ollama_embed, render_ollama_chat, render_ollama_embed,
                 read_ollama_embeddings, render_ollama_embeddings, OllamaDecoder, decode_ollama_body,
                 OllamaEncoder, render_ollama_error)

# ----------------------------------------------------------------------------
# Room 6.  OpenAI dialect: /v1/*, the mirror room (OpenAI API reference, and what the many servers
# that call themselves compatible make of it)
# ----------------------------------------------------------------------------

# Neutral name -> OpenAI's.  The second table holds what OpenAI itself refuses and most local servers
# take; repeat_penalty goes out under both of its names (llama.cpp knows the first, vLLM the second).
OPENAI_OPTION_KEYS = {
    "temperature": ("temperature",), "top_p": ("top_p",), "seed": ("seed",), "max_tokens": ("max_tokens",),
    "stop": ("stop",), "presence_penalty": ("presence_penalty",), "frequency_penalty": ("frequency_penalty",),
}
OPENAI_EXTENSION_KEYS = {
    "top_k": ("top_k",), "min_p": ("min_p",), "typical_p": ("typical_p",), "repeat_last_n": ("repeat_last_n",),
    "repeat_penalty": ("repeat_penalty", "repetition_penalty"),
}
FINISH_LENGTH = frozenset(("length", "max_tokens", "model_length", "max_output_tokens"))
FINISH_ERROR = frozenset(("error", "insufficient_system_resource"))
EFFORTS = {"none": False, "off": False, "disabled": False, "minimal": "low", "low": "low", "medium": "medium",
           "high": "high", "max": "max", "xhigh": "max", "ultra": "max"}


def _switch(off: dict, on: dict, level: Callable) -> Callable:
    return lambda think: off if think is False else on if think is True else level(think)


# How targets are told to think or not (upstreams table 1D).
THINK_SWITCHES = {
    "effort": _switch({"reasoning_effort": "none"}, {}, lambda level: {"reasoning_effort": level}),
    "template": _switch({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}},
                        {"chat_template_kwargs": {"enable_thinking": True}},
                        lambda level: {"reasoning_effort": level}),
    "reasoning": _switch({"reasoning": {"enabled": False}}, {"reasoning": {"enabled": True}},
                         lambda level: {"reasoning": {"effort": "high" if level == "max" else level}}),
    "thinking": _switch({"thinking": {"type": "disabled"}}, {"thinking": {"type": "enabled"}},
                        lambda level: {"thinking": {"type": "enabled"}, "reasoning_effort": level}),
    "high": _switch({"reasoning_effort": "none"}, {"reasoning_effort": "high"},
                    lambda level: {"reasoning_effort": "high"}),
}


def parse_openai_chat(body: dict, face: str = "chat") -> ChatCall:
    """POST /v1/chat/completions or, with face "completion", /v1/completions -> ChatCall.

    `options`, `keep_alive` and `think` in the body (extra_body of the SDKs) are honoured.
    Raises BadRequest, above all for what Ollama has no counterpart for.
    """
    model = field(body, "model", str, "").strip()
    if not model:
        raise BadRequest("model is required")
    if field(body, "n", int, 1) > 1 or field(body, "best_of", int, 1) > 1:
        raise BadRequest("n greater than 1 is not supported: Ollama gives one choice per request")
    options: dict = {}
    for table in (OPENAI_OPTION_KEYS, OPENAI_EXTENSION_KEYS):
        for name, wires in table.items():
            for wire in wires:
                if body.get(wire) is not None and name not in options:
                    options[name] = (parse_stop(body[wire]) if name == "stop"
                                     else field(body, wire, OPTION_KINDS.get(name, float)))
    limit = field(body, "max_completion_tokens", int)
    if limit is not None:
        options["max_tokens"] = limit
    if not options.get("stop", True):
        del options["stop"]
    call = ChatCall(model, face, options=options, extra=field(body, "options", dict, {}),
                    stream=field(body, "stream", bool, False), keep_alive=body.get("keep_alive"),
                    think=parse_effort(body), format=parse_response_format(body.get("response_format")),
                    want_usage=bool(field(body, "stream_options", dict, {}).get("include_usage")))
    if face == "completion":
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise BadRequest("prompt must be one string: Ollama takes neither lists nor token ids")
        count = body.get("logprobs")
        return call._replace(prompt=prompt, suffix=field(body, "suffix", str, ""),
                             logprobs=count if isinstance(count, int) and not isinstance(count, bool) else None)
    messages = field(body, "messages", list, [])
    if not messages:
        raise BadRequest("[] is too short - 'messages'")
    return call._replace(messages=tie_results(tuple(parse_message(message) for message in messages)),
                         tools=parse_tools(field(body, "tools", list, [])),
                         tool_choice=parse_tool_choice(body.get("tool_choice")), logprobs=parse_logprobs(body))


def parse_effort(body: dict) -> Any:
    """think, reasoning.effort, reasoning_effort or chat_template_kwargs -> None, bool or level."""
    if body.get("think") is not None:
        return parse_think(body["think"])
    reasoning = as_dict(body.get("reasoning"))
    effort = reasoning.get("effort", body.get("reasoning_effort"))
    if effort is None or effort == "":
        enabled = reasoning.get("enabled", as_dict(body.get("chat_template_kwargs")).get("enable_thinking"))
        return enabled if isinstance(enabled, bool) else None
    word = effort.lower() if isinstance(effort, str) else effort
    if not isinstance(word, str) or word not in EFFORTS:
        raise BadRequest(f"invalid reasoning effort {one_line(json.dumps(effort), 40)}: none, minimal, low, medium, "
                         "high, xhigh or max is expected")
    return EFFORTS[word]


def parse_response_format(value: Any) -> Any:
    """`response_format` -> None, "json" or a schema."""
    kind = as_dict(value).get("type")
    if kind == "json_object":
        return "json"
    if kind == "json_schema":
        wrapped = as_dict(value.get("json_schema"))
        return as_dict(wrapped.get("schema")) or "json"
    return None


def parse_openai_embed(body: dict, legacy: bool = False) -> EmbedCall:
    """POST /v1/embeddings -> EmbedCall.  Token ids cannot be sent to Ollama."""
    del legacy
    model = field(body, "model", str, "").strip()
    if not model:
        raise BadRequest("model is required")
    value = body.get("input")
    inputs = (value,) if isinstance(value, str) else value
    if not isinstance(inputs, (list, tuple)) or not inputs or not all(isinstance(text, str) for text in inputs):
        raise BadRequest("invalid input: a string or a list of strings is expected")
    encoding = field(body, "encoding_format", str, "float")
    if encoding not in ("float", "base64"):
        raise BadRequest("invalid encoding_format: float or base64 is expected")
    return EmbedCall(model, tuple(inputs), field(body, "dimensions", int) or None, base64=encoding == "base64",
                     keep_alive=body.get("keep_alive"), options=field(body, "options", dict, {}))


def tie_results(messages: tuple) -> tuple:
    """A valid history from any history: every call has an id of its own and exactly one result right behind it,
    every result a call (clients rule 5).

    Results are tied by id, else by an id that stands where the name belongs, else by name, else by order.  A call
    nobody answered in time gets an empty result; a result whose call was cut off, or that comes late, gets its call back.
    """
    if not any(message.tool_calls or message.role == "tool" for message in messages):
        return messages
    turns: list = []
    waiting: list = []              # (id as sent, call) of the calls that have no result yet
    seen: set = set()
    names: dict = {}                # id as sent -> function, for results that come late

    def renamed(call: ToolCall, *seed: Any) -> ToolCall:
        used = call.id if call.id and call.id not in seen else call_id(*seed)
        seen.add(used)
        return call._replace(id=used)

    def answer(call: ToolCall, result: Message = Message("tool")) -> None:
        turns.append(result._replace(tool_call_id=call.id, tool_name=call.name))

    def settle() -> None:           # another turn begins: whoever still waits is answered for
        for _, call in waiting:
            answer(call)
        waiting.clear()

    for number, message in enumerate(messages):
        if message.role == "tool":
            found = _waiting_call(waiting, message)
            if found is None:
                settle()
                name = message.tool_name or names.get(message.tool_call_id, "unknown")
                call = renamed(ToolCall(message.tool_call_id, name, {}), number, message.content)
                turns.append(Message("assistant", tool_calls=(call,)))
            else:
                waiting.remove(found)
                call = found[1]
            answer(call, message)
            continue
        settle()
        calls = tuple(renamed(call, number, at, call.name) for at, call in enumerate(message.tool_calls))
        waiting += zip([call.id for call in message.tool_calls], calls)
        names.update((call.id, call.name) for call in message.tool_calls)
        turns.append(message._replace(tool_calls=calls))
    settle()
    return tuple(turns)


def _waiting_call(waiting: list, result: Message) -> Optional[tuple]:
    """The open call that `result` answers."""
    for key in (result.tool_call_id, result.tool_name):
        for entry in waiting:
            if key and key in (entry[0], entry[1].id):
                return entry
    for entry in waiting:
        if result.tool_name in ("", entry[1].name):
            return entry
    return waiting[0] if waiting and result.tool_call_id and not result.tool_name else None


def render_openai_message(message: Message, habits: Habits) -> list[dict]:
    """One turn as OpenAI writes it; pictures in a tool result follow as a user turn."""
    if message.role == "assistant":
        if not message.tool_calls:
            turns = [{"role": "assistant", "content": message.content, **_echo(message, habits)}] \
                if message.content else []
            if message.images:          # only users may show pictures
                turns.append({"role": "user", "content": render_parts("", message.images)})
            return turns
        calls, whole = [], {}
        for call in message.tool_calls:
            extra = call.extra or {}
            calls.append({"id": nine(call.id) if habits.tool_ids == "nine" else call.id, "type": "function",
                          "function": {"name": call.name, "arguments": _encode_json(call.arguments)},
                          **extra.get("call", {})})
            whole.update((key, value) for key, value in extra.get("message", {}).items()
                         if key != "reasoning_content" or key in habits.echo)
        return [{"role": "assistant", "content": message.content or None, "tool_calls": calls,
                 **_echo(message, habits), **whole}]
    if message.role == "tool":
        turns = [{"role": "tool", "tool_call_id": nine(message.tool_call_id) if habits.tool_ids == "nine"
                  else message.tool_call_id, "content": message.content}]
        if message.images:
            turns.append({"role": "user", "content": render_parts("", message.images)})
        return turns
    if message.images:
        return [{"role": message.role, "content": render_parts(message.content, message.images)}]
    return [{"role": message.role, "content": message.content}]


def _echo(message: Message, habits: Habits) -> dict:
    """Reasoning of an earlier turn, for the servers that demand it back."""
    return {"reasoning_content": message.thinking} if message.thinking and "reasoning_content" in habits.echo else {}


def nine(identifier: str) -> str:
    """An id Mistral accepts: itself when it is nine letters or digits, else nine that stand for it."""
    return identifier if re.fullmatch("[A-Za-z0-9]{9}", identifier) else call_id("nine", identifier)


def render_parts(text: str, images: tuple) -> list[dict]:
    """Content parts, text first."""
    parts: list = [{"type": "text", "text": text}] if text else []
    for image in images:
        if image.media_type.startswith("audio/"):
            parts.append({"type": "input_audio",
                          "input_audio": {"data": image.data, "format": image.media_type[len("audio/"):]}})
        else:
            url = image.url or f"data:{image.media_type};base64,{image.data}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def render_openai_messages(messages: tuple, habits: Habits) -> list[dict]:
    """The whole history; with `habits.bridge` an assistant turn keeps results and questions apart."""
    wire: list[dict] = []
    late: list[dict] = []           # pictures of tool results wait until all results stand together
    for message in tie_results(messages):
        turns = render_openai_message(message, habits)
        if message.role == "tool":
            wire.append(turns[0])
            late += turns[1:]
            continue
        wire += late
        late = []
        if habits.bridge and wire and wire[-1]["role"] == "tool" and message.role == "user":
            wire.append({"role": "assistant", "content": "OK."})
        wire += turns
    return wire + late


def render_openai_options(call: ChatCall, habits: Habits) -> dict:
    """Neutral options under OpenAI's names; extensions only for targets that may know them."""
    body: dict = {}
    for table in (OPENAI_OPTION_KEYS,) if habits.strict else (OPENAI_OPTION_KEYS, OPENAI_EXTENSION_KEYS):
        for name, wires in table.items():
            if name in call.options:
                body.update((wire, call.options[name]) for wire in wires)
    return body


def room_for_answer(call: ChatCall, context: Optional[int]) -> int:
    """Tokens an answer may take where the target would cut it short unasked: what the context leaves
    beside the prompt, else a few thousand."""
    if not context:
        return DEFAULT_COMPLETION_TOKENS
    return max(1, context - call.prompt_bytes() // 3 - 16)


def render_openai_chat(call: ChatCall, habits: Habits, context: Optional[int] = None) -> WireRequest:
    """ChatCall -> POST /chat/completions, or /completions for a plain prompt.  Only what was asked for
    is sent: strict servers refuse even harmless defaults."""
    body: dict = {"model": call.model}
    if call.prompt is None:
        body["messages"] = render_openai_messages(call.messages, habits)
    else:
        body["prompt"] = call.prompt
        if call.suffix:
            body["suffix"] = call.suffix
    body["stream"] = call.stream
    if call.stream:
        body["stream_options"] = {"include_usage": True}
    body.update(render_openai_options(call, habits))
    if "max_tokens" not in body and (call.prompt is not None or habits.limit_chat):
        body["max_tokens"] = room_for_answer(call, context)
    if call.prompt is None:
        _render_chat_fields(call, habits, body)
    elif call.logprobs is not None:
        body["logprobs"] = max(1, call.logprobs)
    if call.format is not None:
        body["response_format"] = {"type": "json_object"} if call.format == "json" else {
            "type": "json_schema", "json_schema": {"name": "response", "schema": call.format}}
    seconds = keep_alive_seconds(call.keep_alive)
    if habits.ttl and seconds and seconds > 0:
        body["ttl"] = max(1, int(seconds))
    return WireRequest("/chat/completions" if call.prompt is None else "/completions", body)


def _render_chat_fields(call: ChatCall, habits: Habits, body: dict) -> None:
    tools = [tool for tool in call.tools if not isinstance(call.tool_choice, tuple)
             or tool.name == call.tool_choice[0]]
    if tools:
        body["tools"] = [{"type": "function", "function": {
            key: value for key, value in (("name", tool.name), ("description", tool.description),
                                          ("parameters", tool.parameters), ("strict", tool.strict))
            if value or key == "name"}} for tool in tools]
        choice = "required" if isinstance(call.tool_choice, tuple) else call.tool_choice
        if choice:
            body["tool_choice"] = choice
    if call.think is not None:
        body.update(THINK_SWITCHES[habits.think](call.think))
    if call.logprobs is not None:
        body["logprobs"] = True
        body["top_logprobs"] = max(1, call.logprobs)


def render_openai_embed(call: EmbedCall, habits: Habits) -> WireRequest:
    """EmbedCall -> POST /embeddings with nothing that strict servers refuse (upstreams rule 25)."""
    body: dict = {"model": call.model, "input": list(call.inputs)}
    if call.dimensions:
        body[habits.dimensions] = call.dimensions
    return WireRequest("/embeddings", body)


def read_openai_embeddings(answer: Any, count: int) -> tuple[list, Usage]:
    """Answer of /embeddings -> (vectors in input order, Usage); lists or base64 of float32.

    Raises BadUpstreamPayload when vectors are missing or unreadable.
    """
    if isinstance(answer, list):
        answer = {"data": answer}
    items = [item for item in as_list(as_dict(answer).get("data")) if isinstance(item, dict)]
    check_vectors(items, count)
    if all(isinstance(item.get("index"), int) for item in items):
        items.sort(key=lambda item: item["index"])
    usage = as_dict(answer.get("usage"))
    return ([read_vector(item.get("embedding")) for item in items],
            Usage(prompt_tokens=as_count(usage.get("prompt_tokens")) or as_count(usage.get("total_tokens"))))


def read_vector(value: Any) -> list:
    """One embedding: numbers, base64 of little-endian float32, or a vector per token, which is averaged.

    The mark that stands for numbers set aside passes as it is.
    """
    if isinstance(value, dict) and "numbers" in value:
        return value                            # type: ignore[return-value]
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
            vector = list(struct.unpack(f"<{len(data) // 4}f", data))
            if not all(number - number == 0 for number in vector):
                raise ValueError("not finite")
            return vector
        except (ValueError, struct.error):
            raise BadUpstreamPayload("upstream sent an unreadable base64 embedding") from None
    vector = as_list(value)
    if vector and all(isinstance(row, list) for row in vector):
        try:
            return [sum(column) / len(vector) for column in zip(*vector)] if len(vector) > 1 else vector[0]
        except TypeError:
            vector = []
    if not vector or not all(isinstance(number, (int, float)) for number in vector):
        raise BadUpstreamPayload("upstream sent an embedding that is not a list of numbers")
    return vector


def render_openai_embeddings(call: EmbedCall, model: str, vectors: list, usage: Usage, took: int) -> dict:
    """Vectors -> answer of /v1/embeddings."""
    del took
    tokens = usage.prompt_tokens or 0
    return {"object": "list", "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "data": [
        {"object": "embedding", "index": at, "embedding":
         base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii") if call.base64 else vector}
        for at, vector in enumerate(vectors)]}


class ToolAssembler:
    """Fragments of tool calls -> whole calls, in order of first appearance (upstreams rules 62-73)."""

    def __init__(self) -> None:
        self._calls: list[dict] = []
        self._by_index: dict = {}

    def add(self, fragments: Any) -> None:
        """Takes one `tool_calls` list of a delta or a message."""
        for fragment in as_list(fragments):
            if isinstance(fragment, dict):
                self._add(fragment)

    def _add(self, fragment: dict) -> None:
        function = fragment.get("function")
        function = {"name": function} if isinstance(function, str) else as_dict(function)
        name, arguments = as_text(function.get("name")), function.get("arguments")
        identifier = as_text(fragment.get("id"))
        identifier = "" if identifier in ("null", "0") else identifier
        index = fragment.get("index")
        if isinstance(index, int):
            call = self._by_index.get(index)
            if call and name and self._is_another(call, identifier, arguments):
                call = None
        else:
            call = None if name or not self._calls else self._calls[-1]
        if call is None:
            call = {"id": "", "name": "", "text": "", "object": None, "extra": {}}
            self._calls.append(call)
            if isinstance(index, int):
                self._by_index[index] = call
        call["id"] = call["id"] or identifier
        call["name"] = call["name"] or name
        if isinstance(arguments, str):
            call["text"] += arguments
        elif isinstance(arguments, dict):
            call["object"] = {**(call["object"] or {}), **arguments}
        if isinstance(fragment.get("extra_content"), dict):
            call["extra"]["extra_content"] = fragment["extra_content"]

    @staticmethod
    def _is_another(call: dict, identifier: str, arguments: Any) -> bool:
        """A named fragment on a known index: another call, or the same one repeating its name?"""
        if identifier and call["id"]:
            return identifier != call["id"]
        begins = isinstance(arguments, dict) or as_text(arguments).lstrip()[:1] == "{"
        return begins and (call["object"] is not None
                           or (bool(call["text"].strip()) and parse_arguments(call["text"]) is not None))

    def attach(self, extra: dict) -> None:
        """Extras that came in a delta of their own belong to the latest call."""
        if self._calls:
            self._calls[-1]["extra"].update(extra)

    def close(self, cut: bool, message_extra: dict) -> tuple:
        """Returns the calls.  With `cut` (the length limit) unfinished ones are left out; otherwise
        raises BadUpstreamPayload for arguments that cannot be read."""
        calls = []
        for call in self._calls:
            if not call["name"]:
                continue
            arguments = call["object"] if call["object"] is not None else parse_arguments(call["text"])
            if arguments is None:
                if cut:
                    continue
                raise BadUpstreamPayload(f"the model called {one_line(call['name'], 60)} with arguments that are "
                                         f"not a JSON object: {one_line(call['text'], 200)}")
            extra = {key: value for key, value in (("call", call["extra"]), ("message", message_extra)) if value}
            used = call["id"] if call["id"] and all(call["id"] != other.id for other in calls) else call_id()
            calls.append(ToolCall(used, call["name"], arguments, extra or None))
            message_extra = {}
        return tuple(calls)


def merge_details(details: list, pieces: Any) -> None:
    """OpenRouter's reasoning_details arrive in pieces: text of the same entry is joined."""
    for piece in as_list(pieces):
        if not isinstance(piece, dict):
            continue
        last = details[-1] if details else None
        if last is not None and piece.get("index") == last.get("index") and piece.get("type") == last.get("type"):
            for key, value in piece.items():
                if key in ("text", "summary", "data") and isinstance(value, str) and isinstance(last.get(key), str):
                    last[key] += value
                elif value is not None:
                    last[key] = value
        else:
            details.append(dict(piece))


_COUNTED = frozenset(("usage", "timings", "x_groq"))
_PLAIN_DELTA = frozenset(("role", "content"))


class OpenAIDecoder:
    """SSE of /chat/completions or /completions -> events.  feed(bytes), then close().

    Holds the finish reason until usage, [DONE] or the end, because text and counts may still follow it.
    `opened` says that this model's answers begin inside a think tag.
    """

    def __init__(self, call: ChatCall) -> None:
        self._frames = FrameDecoder()
        self._tools = ToolAssembler()
        self._thinking: list[str] = []
        self._details: list = []
        self._usage: dict = {}
        self._timings: dict = {}
        self._reason = ""
        self._any = False               # something came that was an answer
        self._alternatives = call.logprobs
        self.done = self.whole = False
    frame_end = b"\n\n"
    stamp = re.compile(rb"(?!)")

    @property
    def plain(self) -> bool:
        """Nothing is pending: a content frame is just its text (the shortcut of room 7 asks)."""
        return self._alternatives is None and not self.done and not self._reason and self._frames.idle

    @property
    def between(self) -> bool:
        return self._frames.idle

    def feed(self, data: bytes) -> list:
        """Returns the events of all complete frames.  A Failure or Finish is the last one, ever."""
        return self._run(self._frames.feed, data)

    def close(self) -> list:
        """The body ended.  Without finish reason and [DONE] that is a Failure."""
        events = self._run(self._frames.close)
        if not self.done and self._frames.stray and not self._any and not self._reason:
            self._stray(events)
        if not self.done:
            if self._reason:
                self._finish(events)
            elif self._any:
                self._fail(events, StreamTruncated("upstream closed the stream before finishing"))
            else:
                self._fail(events, StreamTruncated("upstream sent an empty response"))
        return events

    def decode_body(self, answer: Any) -> list:
        """A whole answer instead of a stream -> all events."""
        events: list = []
        try:
            self._frame("", answer, events, whole=True)
            if not self.done and not self._any and not self._reason:
                raise BadUpstreamPayload("upstream sent an answer without choices")
        except UpstreamError as error:
            self._fail(events, error)
        if not self.done:
            self._finish(events)
        return events

    def _run(self, take: Callable, *data: bytes) -> list:
        events: list = []
        if self.done:
            return events
        try:
            for event, value in take(*data):
                if self.done:
                    break
                if value is None:
                    self._finish(events)
                else:
                    self._frame(event, value, events)
            if self._frames.fault is not None and not self.done:
                raise self._frames.fault
        except UpstreamError as error:
            self._fail(events, error)
        return events

    def _stray(self, events: list) -> None:
        """What was no stream: a printed JSON document, or a page of text."""
        data = b"\n".join(self._frames.stray)
        try:
            answer = load(data)
        except (ValueError, RecursionError):
            self._fail(events, BadUpstreamPayload(error_text(data, 502)))
            return
        events += self.decode_body(answer)

    def _fail(self, events: list, error: UpstreamError) -> None:
        self.done = True
        events.append(Failure(error))

    def _frame(self, event: str, value: Any, events: list, whole: bool = False) -> None:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = value[0]            # Gemini wraps errors in an array
        if not isinstance(value, dict):
            raise BadUpstreamPayload(f"upstream sent {json_kind(value)} where an answer was expected")
        if value.get("error") or event == "error" or (value.get("object") == "error" and "message" in value) \
                or ("detail" in value and "choices" not in value):
            raise stream_error(value)
        if not _COUNTED.isdisjoint(value):
            for source in (value, as_dict(value.get("x_groq"))):
                self._take_usage(source.get("usage"))
            if isinstance(value.get("timings"), dict):
                self._timings = value["timings"]
        for choice in as_list(value.get("choices")):
            if isinstance(choice, dict) and choice.get("index") in (0, None):
                is_whole = whole or ("message" in choice and "delta" not in choice)
                self.whole = is_whole
                self._choice(choice, events)
                if is_whole and value.get("object") != "chat.completion.chunk" and not self._reason:
                    self._reason = "stop"       # a whole answer needs no reason to be one

    def _take_usage(self, usage: Any) -> None:
        if isinstance(usage, dict) and any(as_count(number) for number in usage.values()):
            self._usage = usage

    def _choice(self, choice: dict, events: list) -> None:
        self._any = True
        delta = as_dict(choice.get("delta")) or as_dict(choice.get("message"))
        content = delta.get("content")
        if delta.keys() <= _PLAIN_DELTA and type(content) is str:
            if content:
                events.append(TextDelta(content, read_logprobs(choice.get("logprobs"), self._alternatives)))
        else:
            self._rich_choice(choice, delta, events)
        if "usage" in choice:
            self._take_usage(choice["usage"])
        reason = as_text(choice.get("finish_reason"))
        if reason and reason != "null":
            if reason.lower() in FINISH_ERROR:
                raise UpstreamError(f"upstream ended the answer with an error (finish_reason {one_line(reason, 40)})")
            self._reason = reason

    def _rich_choice(self, choice: dict, delta: dict, events: list) -> None:
        """Everything that may stand beside, or instead of, a string of content."""
        thinking = as_text(delta.get("reasoning_content")) or as_text(delta.get("reasoning"))
        details = delta.get("reasoning_details")
        if details:
            if not thinking:
                thinking = "".join(as_text(piece.get("text")) or as_text(piece.get("summary"))
                                   for piece in as_list(details) if isinstance(piece, dict))
            merge_details(self._details, details)
        content = delta.get("content")
        if content is None:
            content = choice.get("text")
        if isinstance(content, list):
            parts = [parse_parts([part]) for part in content if isinstance(part, dict) and part.get("type")
                     in ("text", "thinking", "output_text", "reasoning", "refusal")]
            content = "".join(text for text, _, _ in parts)
            thinking = thinking or "".join(inner for _, _, inner in parts)
        if thinking:
            self._thinking.append(thinking)
            events.append(ThinkingDelta(thinking))
        text = as_text(content) or as_text(delta.get("refusal"))
        if text:
            events.append(TextDelta(text, read_logprobs(choice.get("logprobs"), self._alternatives)))
        self._tools.add(delta.get("tool_calls"))
        if isinstance(delta.get("function_call"), dict):
            self._tools.add([{"index": 0, "function": delta["function_call"]}])
        if isinstance(delta.get("extra_content"), dict):
            self._tools.attach({"extra_content": delta["extra_content"]})

    def _finish(self, events: list) -> None:
        reason = "length" if self._reason.lower() in FINISH_LENGTH else "stop"
        extra: dict = {}
        if self._details:
            extra["reasoning_details"] = self._details
        if self._thinking:
            extra["reasoning_content"] = "".join(self._thinking)
        try:
            calls = self._tools.close(reason == "length", extra)
        except UpstreamError as error:
            self._fail(events, error)
            return
        if not self._any and not self._reason and not calls:
            self._fail(events, StreamTruncated("upstream sent an empty response"))
            return
        if calls:
            events.append(ToolCalls(calls))
        self.done = True
        events.append(Finish(reason, read_usage(self._usage, self._timings)))


def decode_openai_body(answer, call):
    return OpenAIDecoder(call).decode_body(answer)


def read_logprobs(value: Any, alternatives: Optional[int]) -> Optional[list]:
    """`logprobs` of a choice as OpenAI's content list, or None when nobody asked."""
    if alternatives is None or not isinstance(value, dict):
        return None
    if isinstance(value.get("content"), list):
        items = [{key: item[key] for key in ("token", "logprob", "bytes", "top_logprobs")
                  if item.get(key) is not None} for item in value["content"] if isinstance(item, dict)]
    else:                               # the older shape of /completions: parallel lists
        items = [{"token": token, "logprob": logprob} for token, logprob in
                 zip(as_list(value.get("tokens")), as_list(value.get("token_logprobs"))) if logprob is not None]
    for item in items:
        tops = as_list(item.pop("top_logprobs", None))[:alternatives]
        if tops:
            item["top_logprobs"] = [{key: top[key] for key in ("token", "logprob", "bytes")
                                     if top.get(key) is not None} for top in tops if isinstance(top, dict)]
    return items or None


def read_usage(usage: dict, timings: dict) -> Usage:
    """Counts and times wherever servers put them (upstreams rules 74-78)."""
    prompt, completion = as_count(usage.get("prompt_tokens")), as_count(usage.get("completion_tokens"))
    total = as_count(usage.get("total_tokens"))
    if total and prompt and total > prompt + (completion or 0):
        completion = total - prompt     # reasoning that was counted in the total only
    if timings:
        prompt = prompt or as_count((timings.get("cache_n") or 0) + (timings.get("prompt_n") or 0))
        completion = completion or as_count(timings.get("predicted_n"))
        return Usage(prompt, completion, nanoseconds(timings.get("prompt_ms"), 1e-3),
                     nanoseconds(timings.get("predicted_ms"), 1e-3))
    return Usage(prompt, completion, nanoseconds(usage.get("prompt_time"), 1.0),
                 nanoseconds(usage.get("completion_time"), 1.0))


_ERROR_TITLE = re.compile(rb"<title[^>]*>(.*?)</title>", re.I | re.S)


def error_text(data: bytes, status: int) -> str:
    """The sentence in an error of any server: JSON in a dozen shapes, HTML, text, or nothing at all."""
    try:
        text = error_sentence(load(data))
    except (ValueError, RecursionError):
        text = ""
        title = _ERROR_TITLE.search(data[:8192])
        if title:
            text = str(title[1].strip(), "utf-8", "replace")
        elif data.lstrip()[:1] not in (b"<", b"{", b"["):
            text = str(data.strip()[:500], "utf-8", "replace")
    return text or f"upstream returned HTTP {status}"


def error_sentence(value: Any) -> str:
    """The text in a decoded error, "" when there is none (upstreams rule 79)."""
    if isinstance(value, list):
        return error_sentence(value[0]) if value else ""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return ""
    error = value.get("error")
    text = ""
    if isinstance(error, dict):
        text = error_sentence({key: item for key, item in error.items() if key != "metadata"})
        raw = as_dict(error.get("metadata")).get("raw")
        if isinstance(raw, str) and raw and raw not in text:
            try:
                raw = error_sentence(json.loads(raw)) or raw
            except (ValueError, RecursionError):
                pass
            text = f"{text}: {raw}" if text else raw
    elif isinstance(error, str):
        text = error
    if text:
        return text
    for key in ("message", "detail", "msg"):
        item = value.get(key)
        if isinstance(item, str) and item:
            return item
        if isinstance(item, list):
            parts = []
            for problem in item:
                where = ".".join(str(part) for part in as_list(as_dict(problem).get("loc")))
                what = as_text(as_dict(problem).get("msg")) or as_text(problem)
                parts.append(f"{where}: {what}" if where else what)
            return "; ".join(part for part in parts if part)
        if isinstance(item, dict):
            return error_sentence(item)
    return as_text(value.get("error_type"))


def stream_error(value: dict) -> UpstreamError:
    """An error frame -> an exception with the status it names, else 502."""
    text = error_sentence(value) or "upstream reported an error without a text"
    error = as_dict(value.get("error"))
    for status in (error.get("status_code"), error.get("code"), value.get("code"), error.get("status")):
        if isinstance(status, str) and status.isdigit():
            status = int(status)
        if isinstance(status, int) and 400 <= status <= 599:
            return UpstreamRefused(text, status, body=value)
    return UpstreamError(text)


class OpenAIEncoder:
    """Events -> SSE of /v1/chat/completions or /v1/completions, or one whole answer.

    `reasoning` names the delta keys that carry thinking.  One id and one date serve the whole stream.
    """

    media_type = EVENT_STREAM
    tail = b"data: [DONE]\n\n"

    def __init__(self, call: ChatCall, clock: Any, started: int, sent: int,
                 reasoning: tuple = ("reasoning_content", "reasoning")) -> None:
        del started, sent
        self._call, self._reasoning = call, reasoning
        self._ids: set = set()
        self._chat = call.face != "completion"
        self._base = {"id": ("chatcmpl-" if self._chat else "cmpl-") + call_id() + call_id(),
                      "object": "chat.completion.chunk" if self._chat else "text_completion",
                      "created": int(clock.wall()), "model": call.model, "system_fingerprint": "fp_ollama"}
        self._spoke = False
        self._calls = 0
        self._deltas = 0
        self._around: Optional[tuple] = None

    def tick(self) -> None:
        """Nothing here changes with time."""

    def around(self, texts: list) -> tuple[bytes, bytes]:
        """What stands before and after each of `texts`, once the role was sent."""
        if self._around is None:
            frame = self.encode(TextDelta("\x01"))
            self._deltas -= 1
            before, _, after = frame.rpartition(b"\\u0001")
            self._around = before, after
        self._deltas += len(texts)
        return self._around

    def encode(self, event: Any) -> bytes:
        """Returns the frames of one event."""
        if isinstance(event, TextDelta):
            self._deltas += 1
            if not self._chat:
                return self._frame({"text": event.text})
            return self._frame({"delta": {"content": event.text}}, event.logprobs)
        if isinstance(event, ThinkingDelta):
            self._deltas += 1
            return self._frame({"delta": dict.fromkeys(self._reasoning, event.text)}) if self._chat else b""
        if isinstance(event, ToolCalls):
            frames = []
            for call in event.calls:
                frames.append(self._frame({"delta": {"tool_calls": [self._tool_call(call, self._calls)]}}))
                self._calls += 1
            return b"".join(frames)
        if isinstance(event, Finish):
            last = {"delta": {}} if self._chat else {"text": ""}
            frames = self._frame({**last, "finish_reason": self._reason(event)})
            if self._call.want_usage:
                frames += sse_frame({**self._base, "choices": [], "usage": self._usage(event.usage)})
            return frames
        return self.error(event.error)

    def error(self, error: ProxyError) -> bytes:
        """The error frame; no [DONE] follows it."""
        return sse_frame(render_openai_error(error))

    def fold(self, events: Iterable) -> bytes:
        """All events -> the JSON for stream:false.  Raises the error of a Failure."""
        content, thinking, calls, logprobs, finish = gather(events)
        self._calls = len(calls)
        self._deltas = max(1, (len(content) + len(thinking)) // 4)
        choice: dict = {"index": 0, "finish_reason": self._reason(finish)}
        if not self._chat:
            choice["text"] = content
        else:
            message: dict = {"role": "assistant", "content": content}
            if thinking:
                message.update(dict.fromkeys(self._reasoning, thinking))
            if calls:
                message["content"] = content or None
                message["tool_calls"] = [self._tool_call(call, at, False) for at, call in enumerate(calls)]
            choice["message"] = message
        choice["logprobs"] = {"content": logprobs} if logprobs else None
        return dump({**self._base, "object": "chat.completion" if self._chat else "text_completion",
                     "choices": [choice], "usage": self._usage(finish.usage)})

    def _frame(self, choice: dict, logprobs: Optional[list] = None) -> bytes:
        if self._chat and not self._spoke:
            self._spoke = True
            choice["delta"] = {"role": "assistant", "content": "", **choice["delta"]}
        choice = {"index": 0, **choice}
        choice.setdefault("finish_reason", None)
        if logprobs:
            choice["logprobs"] = {"content": logprobs}
        return sse_frame({**self._base, "choices": [choice]})

    def _tool_call(self, call: ToolCall, index: int, streamed: bool = True) -> dict:
        used = call.id if call.id and call.id not in self._ids else "call_" + call_id()
        self._ids.add(used)
        wire = {"id": used, "type": "function",
                "function": {"name": call.name, "arguments": _encode_json(call.arguments)}}
        return {"index": index, **wire} if streamed else wire

    def _reason(self, finish: Finish) -> str:
        if finish.reason == "length":
            return "length"
        return "tool_calls" if self._calls else "stop"

    def _usage(self, usage: Usage) -> dict:
        prompt = usage.prompt_tokens or max(1, self._call.prompt_bytes() // 4)
        completion = usage.completion_tokens or self._deltas
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


_ERROR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                404: "not_found_error", 405: "invalid_request_error", 413: "invalid_request_error",
                415: "invalid_request_error", 422: "invalid_request_error", 429: "rate_limit_error"}


def render_openai_error(error: ProxyError) -> dict:
    """OpenAI's nested object; param is null because nothing here knows better."""
    return {"error": {"message": error.message, "type": _ERROR_TYPES.get(error.status, "api_error"),
                      "param": None, "code": error.code}}


def openai_model(info: ModelInfo) -> dict:
    """One entry of GET /v1/models."""
    return {"id": info.shown or info.id, "object": "model", "created": info.created or 0,
            "owned_by": info.owner or "library"}


OPENAI = Dialect("openai", parse_openai_chat, parse_openai_embed, render_openai_chat, render_openai_embed,
                 read_openai_embeddings, render_openai_embeddings, OpenAIDecoder, decode_openai_body,
                 OpenAIEncoder, render_openai_error)

# ----------------------------------------------------------------------------
# Room 7.  Translation: a decoder and an encoder joined into one pipe
#
# A pipe takes what the upstream's socket gave (feed_from), or its body bytes (feed), and
# gives bytes for the client's socket: everything that has arrived is decoded, encoded and
# handed out in one piece.
# ----------------------------------------------------------------------------


# What think tags are called; a model opens one of them before its first word, or not at all.
THINK_TAGS = ("think", "thinking", "thought")
_OPENERS, _CLOSERS = tuple(f"<{tag}>" for tag in THINK_TAGS), tuple(f"</{tag}>" for tag in THINK_TAGS)


def half_of(marks: Iterable, text: str) -> int:
    """Where the end of `text` may be the beginning of one of `marks`; its length when it is not."""
    return min((at for mark in marks for at in range(max(0, len(text) - len(mark) + 1), len(text))
                if mark[0] == text[at] and mark.startswith(text[at:])), default=len(text))


class Step:
    """What happens to events between the dialects, wherever the text is cut.  A step holds back what may turn out to
    be something else; `idle` once it holds nothing and never will."""

    idle = False

    def __init__(self) -> None:
        self._held = ""

    def __call__(self, events: list) -> list:
        kept: list = []
        for event in events:
            if type(event) is TextDelta:
                self._held += event.text
                told = self.feed()
                kept += [TextDelta(told, event.logprobs)] if isinstance(told, str) and told else told or []
            else:
                kept += [TextDelta(text) for text in [self.flush(event)] if text] + [event]
            if type(kept[-1:] and kept[-1]) is Finish:
                break
        return kept

    def take(self, size: int) -> str:
        """The first `size` characters of what is held."""
        text, self._held = self._held[:size], self._held[size:]
        return text

    def feed(self) -> Any:
        """More is held: returns the text, or the events, that are certain."""
        return self.take(len(self._held))

    def flush(self, event: Any) -> str:
        """`event` is no text: returns what was held back when nothing more can change it."""
        return self.take(len(self._held)) if not isinstance(event, ThinkingDelta) else ""


class Prefill(Step):
    """Takes the text of a trailing assistant message off the answer of a server that repeats it (llama.cpp)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._expected = text

    def feed(self) -> str:
        if not self.idle and len(self._held) < len(self._expected) and self._expected.startswith(self._held):
            return ""
        if not self.idle and self._held.startswith(self._expected):
            self.take(len(self._expected))
        self.idle = True
        return super().feed()


class ThinkTags(Step):
    """Splits reasoning in inline tags off the start of an answer (upstreams rule 58).

    With `opened` the answer begins inside the tag, as templates that write the opening tag themselves leave it
    (rule 59); a `whole` answer shows that by a closing tag alone.  `begins_inside` is what was learned of that.
    """

    def __init__(self, decoder: Any, opened: bool = False) -> None:
        super().__init__()
        self._state, self._opened, self._decoder = "inside" if opened else "start", opened, decoder
        self._spoke = False
        self.begins_inside: Optional[bool] = None

    def feed(self) -> Any:
        events: list = []
        if self._state == "start":
            self._start()
        if self._state == "inside":
            events = self._inside()
        if self._state == "after":              # white space between the tag and the answer
            self._held = self._held.lstrip()
            self._state = "plain" if self._held else "after"
        if self._state == "plain":
            self.idle = True
            return events + [TextDelta(super().feed())] if events else super().feed()
        return events

    def flush(self, event: Any) -> str:
        """A server that splits reasoning off by itself leaves no tags in the text."""
        if self._opened and self._state == "inside" and isinstance(event, Finish) and event.reason != "length":
            self.begins_inside = False          # the tag never came: it was the answer all along
        state, self._state, self.idle = self._state, "plain", True
        return "" if state in ("inside", "after") else self.take(len(self._held))

    def __call__(self, events: list) -> list:
        kept: list = []
        for event in events:
            if self._state == "inside" and self._held.strip() and type(event) is not TextDelta:
                kept.append(ThinkingDelta(self.take(len(self._held)).rstrip()))
            kept += super().__call__([event])
        return kept

    def _start(self) -> None:
        begun = self._held.lstrip()
        opener = next((opener for opener in _OPENERS if begun.startswith(opener)), "")
        if opener:
            self._held, self._state = begun[len(opener):], "inside"
        elif self._decoder.whole and begun[:1] != "<" and any(closer in begun for closer in _CLOSERS):
            self._state, self.begins_inside = "inside", True
        elif not any(opener.startswith(begun) for opener in _OPENERS):
            self._state = "plain"

    def _inside(self) -> list:
        if not self._spoke:
            self._held = self._held.lstrip()
        at, closer = min((self._held.find(closer), closer) for closer in _CLOSERS if closer in self._held) \
            if any(closer in self._held for closer in _CLOSERS) else (-1, "")
        # Trailing space, and half a closing tag, may be dropped yet.
        thinking = self.take(at if closer else half_of(_CLOSERS, self._held.rstrip()))
        if closer:
            self._held, self._state = self._held[len(closer):], "after"
        else:
            self._held, thinking = thinking[len(thinking.rstrip()):] + self._held, thinking.rstrip()
        self._spoke = self._spoke or bool(thinking.rstrip())
        return [ThinkingDelta(thinking.rstrip())] if thinking.rstrip() else []


class Fence(Step):
    """Takes a code fence off an answer that was asked to be JSON."""

    _state = "start"

    def feed(self) -> str:
        if self._state == "start":
            begun = self._held.lstrip()
            match = re.match(r"```(?:json|JSON)?[ \t]*\r?\n", begun)
            if match:
                self._state, self._held = "fenced", begun[match.end():]
            elif re.fullmatch(r"`{0,2}|```\w{0,8}[ \t]*\r?", begun):
                return ""
            else:
                self._state = "plain"
        # What may be the closing fence waits.
        return self.take(len(self._held.rstrip("`\r\n\t ") if self._state == "fenced" else self._held))

    def flush(self, event: Any) -> str:
        text = super().flush(event)
        return "" if self._state == "fenced" and text.strip() in ("```", "") else text


class StopStrings(Step):
    """Ends an answer at stop strings that the target was not told, because it takes four at most."""

    def __init__(self, stops: list) -> None:
        super().__init__()
        self._stops = stops

    def feed(self) -> Any:
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if not found:
            return self.take(half_of(self._stops, self._held))
        return [TextDelta(self.take(min(found))), Finish("stop", Usage())]


class Reasoning(Step):
    """Applies --reasoning: "drop" leaves thinking out, "merge" puts it into the text between think tags."""

    def __init__(self, mode: str) -> None:
        self._merge, self._open = mode == "merge", False

    def __call__(self, events: list) -> list:
        kept: list = []
        for event in events:
            if isinstance(event, ThinkingDelta):
                kept += [TextDelta(event.text if self._open else f"<think>\n{event.text}")] if self._merge else []
                self._open = self._merge
                continue
            kept += [TextDelta("\n</think>\n\n"), event] if self._open else [event]
            self._open = False
        return kept


class Told(Exception):
    """A stream broke after its first line, and the client was told so in its own dialect."""


class Translation:
    """The target's body in, lines for the client out; sans-I/O, like its two halves."""

    def __init__(self, decoder: Any, encoder: Any, steps: Iterable = (), witness: Callable = lambda events: None,
                 redact: Callable = lambda text: text, tap: Optional[Callable] = None, shortcut: bool = True) -> None:
        self._decoder, self._encoder, self._steps, self._witness = decoder, encoder, list(steps), witness
        self._redact, self._tap = redact, tap
        self._shortcut = Shortcut(decoder, encoder, self) if shortcut and tap is None else None
        self._failure: Optional[ProxyError] = None
        self._ended = False

    def lines(self, pieces: Iterable) -> Iterator[list]:
        """One list of lines for each piece that says something: nothing is held back, nothing waits for more.

        Raises what broke before the first line, which can still be an HTTP status; later the client gets its
        dialect's in-band error, and Told is raised.
        """
        started = False
        try:
            for data in pieces:
                if self._tap:
                    self._tap("Target chunk", data)
                lines = self._shortcut.feed(data, self._ordinary) if self._shortcut else self._ordinary(data)[0]
                if lines:
                    started = True
                    yield lines
                if self._ended:
                    break
            else:
                lines = self._encode(self._decoder.close())
                if lines:
                    started = True
                    yield lines
            if self._failure is not None:
                raise self._failure
        except ProxyError as error:
            if not started:
                raise
            error.message = self._redact(error.message)
            yield [self._encoder.error(error)]
            raise Told(error.message) from None

    @property
    def plain(self) -> bool:
        """Nothing is pending: a content frame is just its text."""
        return self._decoder.plain and not self._steps

    def _ordinary(self, data: bytes) -> tuple[list, list]:
        events = self._decoder.feed(data)
        return self._encode(events), events

    def _encode(self, events: list) -> list:
        for step in self._steps:
            events = step(events)
        if self._ended:                 # a step has ended the answer: what still comes is nobody's
            return []
        if self._steps and all(step.idle for step in self._steps):
            self._steps = []
        self._witness(events)
        lines = []
        self._encoder.tick()
        for event in events:
            if isinstance(event, Failure):
                self._failure, self._ended = event.error, True
                break
            lines.append(self._encoder.encode(event))
            if isinstance(event, Finish):
                self._ended = True
                lines.append(self._encoder.tail)
        lines = [line for line in lines if line]
        if self._tap and lines:
            self._tap("Client chunk", b"".join(lines))
        return lines


def begun(lines: Iterator) -> Iterable:
    """`lines`, once the first of them are there: an early failure still is an HTTP status."""
    return itertools.chain([next(lines)], lines)


SHORT_FRAME = 4096                      # bytes up to which a frame may be an envelope


class Shortcut:
    """Carries text from upstream frames into client lines without decoding it.

    Within a stream everything around the text of a content frame stays the same.  That envelope is learned
    from a frame that the decoder took for exactly one TextDelta, and proved by showing the decoder the same
    frame with another text.  From then on a read is cut at the envelopes, and the texts, JSON string contents
    already, are set between the encoder's own constants.  Whatever does not match to the byte goes the
    ordinary way, in its turn; what the client reads is the same.
    """

    _LESSONS = 8                        # envelopes learned without use before a stream is left alone

    def __init__(self, decoder: Any, encoder: Any, translation: Any) -> None:
        self._decoder, self._encoder, self._translation = decoder, encoder, translation
        self._head = self._tail = b""   # what stands before and after a text
        self._behind_stamp = b""        # if the head ends before a timestamp: what stands between that and the text
        self._lessons = self._LESSONS

    def feed(self, data: bytes, ordinary: Callable) -> list:
        """Client lines for `data`; `ordinary(data)` is the way around for (lines, events)."""
        lines: list = []
        at, end = 0, self._decoder.frame_end
        while at < len(data):
            if self._head and self._translation.plain and data.startswith(self._head, at):
                begun, (texts, at) = at, self._cut(data, at)
                if texts:
                    self._lessons = self._LESSONS
                    before, after = self._encoder.around(texts)
                    lines += [before + text + after for text in texts]
                if at > begun:
                    continue
            stop = data.find(end, at) + len(end) if self._lessons else 0
            piece, at = (data[at:stop], stop) if stop >= len(end) else (data[at:], len(data))
            whole = self._decoder.between and piece.endswith(end)
            made, events = ordinary(piece)
            lines += made
            if self._lessons and whole and len(events) == 1 and type(events[0]) is TextDelta and self._translation.plain:
                self._learn(piece, events[0].text)
        return lines

    def _learn(self, frame: bytes, said: str) -> None:
        """What surrounds the text of a frame that said nothing else?"""
        self._lessons -= 1
        for text in (encode_text(said).encode("ascii"), b'"%b"' % said.encode("utf-8", "replace")):
            head, found, tail = frame.rpartition(text)
            if found and len(frame) < SHORT_FRAME and self._decoder.feed(head + b'"probe"' + tail) == [TextDelta("probe")]:
                stamp = self._decoder.stamp.search(head)
                self._head, self._behind_stamp = (head[:stamp.start()], head[stamp.end():] + b'"') if stamp else (head + b'"', b"")
                self._tail = b'"' + tail
                return

    def _cut(self, data: bytes, at: int) -> tuple[list, int]:
        """(texts of the frames from `at` on that fit, as the client gets them; where the first that does not begins)."""
        texts: list = []
        for frame in data[at:].split(self._tail)[:-1]:
            text = frame[len(self._head):]
            if self._behind_stamp:
                stamp, _, text = text.partition(self._behind_stamp)
                if not self._decoder.stamp.fullmatch(stamp):
                    break
            plain = text if _PLAIN_TEXT.fullmatch(text) else rewritten(text)
            if plain is None or not frame.startswith(self._head):
                break
            if plain:                   # an empty one is no event
                texts.append(plain)
            at += len(frame) + len(self._tail)
        return texts, at


# A JSON string's content that our encoders write in the same way: ASCII, with the shortest escapes.
_PLAIN_TEXT = re.compile(rb'(?:[ !#-\[\]-~]|\\["\\nrtbf])*')


def rewritten(text: bytes) -> Optional[bytes]:
    """The content of a JSON string as our encoders write it; None when it is none."""
    try:
        return encode_text(_decode_json(f'"{str(text, "utf-8", "replace")}"'))[1:-1].encode("ascii")
    except (ValueError, TypeError):
        return None

# ----------------------------------------------------------------------------
# Room 8.  Configuration: presets, flags and environment become one frozen value
#
# A flag beats the environment, which beats the env file, which beats the default.
# ----------------------------------------------------------------------------


class Preset(NamedTuple):
    """One known server: where it is, which variable holds its key, and how it differs.

    `hosts` recognises it behind a plain URL; `lessons` is what self-healing would find out anyway
    (room 11): a key to another name, or to None for leaving it out.
    """

    url: str = ""
    key_env: str = ""
    hosts: tuple = ()
    api: str = "openai"
    habits: Habits = Habits(think="template")
    lessons: dict = {}
    strip_vendor: bool = False
    key_header: str = "authorization"


_LOCAL = Habits(think="template")
_CUTS = Habits(think="template", limit_chat=True)
_NO_PENALTIES = {"seed": None, "presence_penalty": None, "frequency_penalty": None}

PRESETS = {
    "lmstudio": Preset("http://localhost:1234", habits=Habits(think="template", ttl=True)),
    "llamacpp": Preset("http://localhost:8080"),
    "vllm": Preset("http://localhost:8000"),
    "sglang": Preset("http://localhost:30000"),
    "litellm": Preset("http://localhost:4000", "LITELLM_API_KEY"),
    "localai": Preset("http://localhost:8080", "LOCALAI_API_KEY"),
    "tgi": Preset("http://localhost:3000"),
    "jan": Preset("http://localhost:1337"),
    "textgen": Preset("http://localhost:5000"),
    "koboldcpp": Preset("http://localhost:5001", habits=_CUTS),
    "mlx": Preset("http://localhost:8080", habits=_CUTS),
    "llamacpp-python": Preset("http://localhost:8000"),
    "ollama": Preset(f"http://localhost:{OLLAMA_PORT}", api="ollama"),
    "openai": Preset("https://api.openai.com/v1", "OPENAI_API_KEY", ("api.openai.com",), habits=Habits(strict=True)),
    "azure": Preset("", "AZURE_OPENAI_API_KEY", ("*.openai.azure.com", "*.cognitiveservices.azure.com",
                                                 "*.services.ai.azure.com"),
                    habits=Habits(strict=True), key_header="api-key"),
    "openrouter": Preset("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", ("openrouter.ai", "*.openrouter.ai"),
                         habits=Habits(think="reasoning"), strip_vendor=True),
    "deepseek": Preset("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY", ("api.deepseek.com",),
                       habits=Habits(strict=True, think="thinking", echo=("reasoning_content",))),
    "groq": Preset("https://api.groq.com/openai/v1", "GROQ_API_KEY", ("api.groq.com",), habits=Habits(strict=True)),
    "mistral": Preset("https://api.mistral.ai/v1", "MISTRAL_API_KEY", ("api.mistral.ai",),
                      habits=Habits(strict=True, think="high", tool_ids="nine", bridge=True,
                                    dimensions="output_dimension"),
                      lessons={"seed": "random_seed", "stream_options": None}),
    "together": Preset("https://api.together.xyz/v1", "TOGETHER_API_KEY", ("api.together.xyz", "api.together.ai"),
                       habits=Habits(think="reasoning")),
    "fireworks": Preset("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY", ("api.fireworks.ai",),
                        habits=Habits()),
    "gemini": Preset("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY",
                     ("generativelanguage.googleapis.com",), habits=Habits(strict=True), lessons=_NO_PENALTIES),
    "xai": Preset("https://api.x.ai/v1", "XAI_API_KEY", ("api.x.ai",), habits=Habits(strict=True)),
}


class UsageError(Exception):
    """A setting that cannot be used: one line for the user, exit status 2."""


class Target(NamedTuple):
    """Whom we call.  `root` has no path of the API's own, `base` is where /chat/completions hangs."""

    scheme: str
    host: str
    port: int
    root: str                       # path prefix of native endpoints, no trailing slash
    base: str                       # path prefix of the OpenAI endpoints
    query: str = ""
    key: str = ""
    key_header: str = "authorization"
    preset: Preset = Preset()
    name: str = ""                  # the preset's name, "" for a plain URL

    @property
    def place(self) -> tuple:
        """What tells it from other servers."""
        return self[:3]

    @property
    def url(self) -> str:
        """As a user would write it, for banners and errors; never with a key."""
        return f"{self.scheme}://{self.authority}{self.base}"

    @property
    def authority(self) -> str:
        """host[:port] as the Host header wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"

    def __repr__(self) -> str:
        return f"Target({self.url})"


def parse_target(value: str, api: str = "auto") -> Target:
    """A URL or a preset's name -> Target without its key.  Raises UsageError."""
    text = value.strip()
    name = text.lower()
    preset = PRESETS.get(name)
    if preset is not None:
        if not preset.url:
            raise UsageError(f"preset {name} needs a URL of your own: --target https://NAME.openai.azure.com/openai/v1")
        text = preset.url
    else:
        name = ""
    if "://" not in text:
        text = "http://" + text
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"bad target URL {one_line(value, 200)!r}: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"bad target URL {one_line(value, 200)!r}: it must begin with http:// or https://")
    if not parts.hostname or re.search(r"[\x00-\x20\x7f-\uffff]", text) or parts.username is not None:
        raise UsageError(f"bad target URL {one_line(re.sub('//.*@', '//***@', value), 200)!r}: "
                         "http://HOST[:PORT][/PATH] is expected, and keys belong into --api-key")
    if preset is None:
        preset = next((row for row in PRESETS.values()
                       if any(fnmatch.fnmatchcase(parts.hostname, host) for host in row.hosts)), Preset())
    path = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/api/chat"):      # what people paste from manuals
        if path.endswith(ending):
            path = path[:-len(ending)]
    base = path or ("" if api == "ollama" else "/v1")
    root = path[:-3] if path.endswith("/v1") else path
    return Target(parts.scheme, parts.hostname, port or {"http": 80, "https": 443}[parts.scheme],
                  root, base or root + "/v1", parts.query, preset=preset, name=name, key_header=preset.key_header)


class Setting(NamedTuple):
    """One row per setting: flags, environment, default and help all derive from it."""

    field: str
    flags: str
    metavar: str
    default: Any
    help: str
    parse: Callable = str
    env: str = ""                   # other variables, read after OLLAMA_PROXY_<FIELD>
    secret: bool = False
    repeat: bool = False
    optional: Any = None            # the value of the flag when it stands alone

    @property
    def variables(self) -> tuple:
        """Environment variables in the order they are asked."""
        return ("OLLAMA_PROXY_" + self.field.upper(),) + tuple(self.env.split())


def _number(kind: type, least: float, most: float = 1e12) -> Callable:
    def parse(text: Any) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise ValueError(f"must be between {least:g} and {most:g}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def _switch_value(text: Any) -> bool:
    if isinstance(text, bool):
        return text
    word = str(text).strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("must be true or false")


def _one_of(*words: str) -> Callable:
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError("must be " + ", ".join(words[:-1]) + " or " + words[-1])
        return text.lower()
    return parse


def parse_listen(text: str) -> tuple[str, int]:
    """[HOST]:PORT -> (host, port); an empty host means every interface (as OLLAMA_HOST=:5000 does)."""
    value = re.sub(r"^https?://", "", text.strip()).rstrip("/")
    host, colon, port = value.rpartition(":")
    if not colon or value.endswith("]"):
        host, port = (value, "") if not value.isdigit() else ("127.0.0.1", value)
    elif ":" in host and not host.startswith("["):
        host, port = value, ""          # a bare IPv6 address
    if port and (not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535):
        raise ValueError("the port must be a number up to 65535")
    return host.strip("[]"), int(port) if port else OLLAMA_PORT


def parse_set(text: str) -> tuple[str, dict]:
    """PATTERN:KEY=VALUE,... -> (glob on model names, options)."""
    match = re.fullmatch(r"(.+?):\s*([A-Za-z_]\w*\s*=.*)", text.strip(), re.S)
    if not match:
        raise ValueError("PATTERN:KEY=VALUE,... is expected")
    values: dict = {}
    for item in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", match[2]):
        key, _, value = item.partition("=")
        try:
            values[key.strip()] = json.loads(value)
        except ValueError:
            values[key.strip()] = value.strip()
    return match[1].strip(), values


def parse_alias(text: str) -> tuple[str, str]:
    """NAME=ID -> (name, id)."""
    name, equals, model = text.partition("=")
    if not equals or not name.strip() or not model.strip():
        raise ValueError("NAME=ID is expected")
    return name.strip(), model.strip()


def parse_header(text: str) -> tuple[str, str]:
    """'Name: value' -> (name, value)."""
    name, colon, value = text.partition(":")
    if not colon or not _TOKEN.fullmatch(name.strip()) or re.search(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]", value):
        raise ValueError("'Name: value' is expected")
    return name.strip(), value.strip()


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def comma_list(text: str) -> tuple:
    """"a, b" -> ("a", "b")."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


SETTINGS = (
    Setting("target", "--target --lmstudio-url --base-url", "URL|PRESET", DEFAULT_TARGET,
            "whom we call; a URL without a path gets /v1, or the name of a preset: " + ", ".join(PRESETS)),
    Setting("target_api", "--target-api", "auto|openai|ollama", "auto",
            "what the target speaks; auto asks it", _one_of("auto", "openai", "ollama")),
    Setting("listen", "--listen", "[HOST]:PORT", "127.0.0.1:11434",
            "where we listen; :PORT is every interface; 127.0.0.1:4000 when the target is an Ollama on 11434"),
    Setting("host", "--host", "HOST", "", "the host part of --listen alone"),
    Setting("port", "--port", "PORT", None, "the port part of --listen alone", _number(int, 0, 65535)),
    Setting("api_key", "--api-key", "KEY", "", "key for the target; a preset also reads its own variable", secret=True),
    Setting("client_key", "--client-key", "KEY", "", "key that clients must send (Bearer or x-api-key)", secret=True),
    Setting("forward_auth", "--forward-auth", "", False, "pass a client's own key on to the target", _switch_value),
    Setting("fallback", "--fallback", "URL", "", "a real Ollama for endpoints that are not served here; without a "
            "value " + DEFAULT_FALLBACK, optional=DEFAULT_FALLBACK),
    Setting("models_filter", "--models-filter", "FILE", "", "which models exist: one name or glob a line, # comments, "
            "! excludes; models-filter.txt is read when present"),
    Setting("alias", "--alias", "NAME=ID", (), "another name for a model", parse_alias, repeat=True),
    Setting("tag", "--tag", "TAG|none", "latest", "tag shown after an id without one"),
    Setting("strip_vendor", "--strip-vendor", "", None, "show openai/gpt-4o as gpt-4o (default for openrouter)",
            _switch_value),
    Setting("keep_vendor", "--keep-vendor", "", None, "show ids with their vendor", _switch_value),
    Setting("reasoning", "--reasoning", "separate|merge|drop", "separate",
            "where thinking goes: its own field, the text between think tags, or nowhere",
            _one_of("separate", "merge", "drop")),
    Setting("reasoning_field", "--reasoning-field", "both|reasoning_content|reasoning", "both",
            "the field that carries thinking on /v1 in front of an Ollama",
            _one_of("both", "reasoning_content", "reasoning")),
    Setting("think_models", "--think-models", "LIST", (), "models of an Ollama target that always think, besides "
            + " and ".join(BUILT_IN_THINK_MODELS), comma_list, env="THINK_MODELS"),
    Setting("set", "--set", "PATTERN:KEY=VALUE,...", (), "defaults for models, such as "
            "'qwen*:num_ctx=32768,keep_alive=30m,think=false'", parse_set, repeat=True),
    Setting("fetch_images", "--fetch-images", "", False,
            "download http(s) pictures for an Ollama target (public addresses only)", _switch_value),
    Setting("generate_via", "--generate-via", "chat|completions", "chat", "where /api/generate goes",
            _one_of("chat", "completions")),
    Setting("default_context", "--default-context", "N", DEFAULT_CONTEXT,
            "context length shown when the target does not tell", _number(int, 1)),
    Setting("ollama_version", "--ollama-version", "X.Y.Z", OLLAMA_VERSION, "answer of /api/version"),
    Setting("timeout", "--timeout", "S", 600.0, "longest silence of the target, in seconds", _number(float, 0.1)),
    Setting("connect_timeout", "--connect-timeout", "S", 10.0, "longest wait for a connection to the target",
            _number(float, 0.1)),
    Setting("client_timeout", "--client-timeout", "S", CLIENT_TIMEOUT,
            "longest wait for a client: a request head, its next request, its reading", _number(float, 0.1)),
    Setting("max_body", "--max-body", "BYTES", MAX_BODY_BYTES, "largest request body", _number(int, 1)),
    Setting("max_connections", "--max-connections", "N", MAX_CONNECTIONS, "clients at once; others get 503",
            _number(int, 1)),
    Setting("grace", "--grace", "S", GRACE, "time for streams to end after SIGTERM", _number(float, 0)),
    Setting("origins", "--origins", "LIST", (), "browser origins allowed besides Ollama's own defaults, such as "
            "'https://chat.example.com,chrome-extension://*'", comma_list, env="OLLAMA_ORIGINS"),
    Setting("ca_file", "--ca-file", "FILE", "", "certificates of a private CA, besides the system's",
            env="SSL_CERT_FILE"),
    Setting("client_cert", "--client-cert", "FILE", "", "certificate and key (one PEM) shown to the target"),
    Setting("insecure", "--insecure", "", False, "do not check the target's certificate", _switch_value),
    Setting("header", "--header", "'K: V'", (), "a header for every request to the target", parse_header, repeat=True,
            secret=True),
    Setting("tls_cert", "--tls-cert", "FILE", "", "certificate for TLS towards clients"),
    Setting("tls_key", "--tls-key", "FILE", "", "its private key, when not in the same file"),
    Setting("env_file", "--env-file", "FILE", "", "more environment; .env is read when present; real variables win"),
    Setting("workers", "--workers", "N", 1, "processes on one socket (POSIX)", _number(int, 1, 256)),
    Setting("debug", "--debug", "", False, "print requests, answers and chunks, with keys hidden", _switch_value),
    Setting("no_log", "--no-log", "", False, "print nothing but errors", _switch_value),
    Setting("demo", "--demo", "", False, "start a tiny target inside and use it", _switch_value),
    Setting("check", "--check", "", False, "ask the target everything we need, print the findings, exit",
            _switch_value),
)


class Config(collections.namedtuple("Config", [row.field for row in SETTINGS] + ["destination", "address", "sources"])):
    """All settings, frozen.  `destination` is the Target, `address` the (host, port) to listen on,
    `sources` says per field whether it came from a flag, a variable or the default."""

    __slots__ = ()

    def __repr__(self) -> str:
        secret = {row.field for row in SETTINGS if row.secret}
        return "Config(%s)" % ", ".join(f"{name}={'***' if name in secret and value else repr(value)}"
                                        for name, value in self._asdict().items())

    @property
    def reasoning_keys(self) -> tuple:
        """The keys under which an OpenAI client finds thinking."""
        return ("reasoning_content", "reasoning") if self.reasoning_field == "both" else (self.reasoning_field,)

    @property
    def secrets(self) -> tuple:
        """Every text that must never be shown."""
        found = [self.destination.key, self.client_key] + [value for _, value in self.header]
        found += [value for name, value in urllib.parse.parse_qsl(self.destination.query) if name != "api-version"]
        return tuple(sorted({text for text in found if len(text) > 3}, key=len, reverse=True))

    @classmethod
    def from_args(cls, argv: Optional[list] = None, environ: Optional[dict] = None) -> "Config":
        """Command line and environment -> Config.  Raises UsageError with one clear line."""
        given = vars(argument_parser().parse_args(argv))
        environ = dict(os.environ if environ is None else environ)
        for name, value in read_env_file(given.get("env_file") or environ.get("OLLAMA_PROXY_ENV_FILE")).items():
            environ.setdefault(name, value)
        values, sources = {}, {}
        for row in SETTINGS:
            values[row.field], sources[row.field] = _value_of(row, given.get(row.field), environ)
        if sources["target"] == "default" and environ.get("OLLAMA_BASE_URL", "").strip():
            values["target"], sources["target"] = environ["OLLAMA_BASE_URL"], "OLLAMA_BASE_URL"
            if values["target_api"] == "auto":
                values["target_api"] = "ollama"
        target = pick_target(values, sources, environ)
        if values["target_api"] == "auto" and target.preset.api == "ollama":
            values["target_api"] = "ollama"
        values["fallback"] = values["fallback"] and (
            DEFAULT_FALLBACK if values["fallback"].lower() in ("1", "true", "on", "yes") else values["fallback"])
        if values["fallback"]:
            parse_target(values["fallback"], "ollama")
        if values["tag"].lower() == "none":
            values["tag"] = ""
        return cls(**values, destination=target, address=_pick_address(values, sources, target), sources=sources)


def _value_of(row: Setting, flag: Any, environ: dict) -> tuple[Any, str]:
    """The value of one setting and where it came from."""
    texts, source = flag, "flag"
    if texts is None:
        source = next((name for name in row.variables if environ.get(name, "").strip()), "default")
        if source == "default":
            return row.default, source
        texts = environ[source].strip().strip("'\"")
        if row.repeat:
            texts = [part for part in texts.split(";") if part.strip()]
    try:
        if row.repeat:
            return tuple(row.parse(text) for text in texts), source
        return row.parse(texts), source
    except (ValueError, TypeError) as error:
        label = row.flags.split()[0] if source == "flag" else source
        shown = "***" if row.secret else one_line(str(texts), 100)
        raise UsageError(f"{label} {shown}: {error}") from None


def pick_target(values: dict, sources: dict, environ: dict) -> Target:
    """The configured target with its key.  A preset's own variable counts towards its own host only."""
    target = parse_target(values["target"], values["target_api"])
    key = values["api_key"]
    if not key and target.preset.key_env and (target.name or target.preset.hosts):
        key = environ.get(target.preset.key_env, "").strip()
    if key and (not key.isascii() or not key.isprintable() or " " in key):
        raise UsageError(f"--api-key must be printable ASCII without spaces ({sources['api_key']})")
    if target.preset.hosts and not key and not values["forward_auth"] and not values["demo"]:
        raise UsageError(f"{target.host} needs a key: set {target.preset.key_env} or give --api-key")
    return target._replace(key=key)


def _pick_address(values: dict, sources: dict, target: Target) -> tuple[str, int]:
    try:
        host, port = parse_listen(values["listen"])
    except ValueError as error:
        raise UsageError(f"--listen {one_line(values['listen'], 80)}: {error}") from None
    if sources["listen"] == "default" and target.port == OLLAMA_PORT and not values["demo"] \
            and (values["target_api"] == "ollama" or is_loopback(target.host)):
        port = OPENAI_FACE_PORT
    if values["host"]:
        host = values["host"].strip("[]")
    if values["port"] is not None:
        port = values["port"]
    same_host = host in ("", "0.0.0.0", "::", target.host) or is_loopback(host)
    if port and port == target.port and is_loopback(target.host) and same_host and not values["demo"]:
        raise UsageError(f"the target {target.url} is the address this proxy listens on: "
                         "give another --target, or another --listen")
    return host, port


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def argument_parser() -> argparse.ArgumentParser:
    """--help is SETTINGS, spelled out."""
    parser = argparse.ArgumentParser(
        prog="ollama_proxy.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Point any Ollama client at any OpenAI-compatible server, and the reverse.",
        epilog="examples:\n"
               "  ollama_proxy.py --demo                                   try it without any model\n"
               "  ollama_proxy.py                                          LM Studio on this machine\n"
               "  ollama_proxy.py --target http://localhost:8080           llama.cpp\n"
               "  OPENROUTER_API_KEY=... ollama_proxy.py --target openrouter\n"
               "  ollama_proxy.py --target ollama                          OpenAI clients in front of an Ollama\n")
    for row in SETTINGS:
        shown = f"env {' or '.join(row.variables)}"
        if row.default not in ("", None, (), False):
            shown += f", default {row.default}"
        options: dict = {"dest": row.field, "default": None, "help": f"{row.help} ({shown})".replace("%", "%%")}
        if not row.metavar:
            options["action"] = "store_true"
        else:
            options["metavar"] = row.metavar
            if row.optional is not None:
                options.update(nargs="?", const=row.optional)
            if row.repeat:
                options["action"] = "append"
        parser.add_argument(*row.flags.split(), **options)
    parser.add_argument("--version", action="version", version=f"ollama_proxy {__version__}")
    return parser


def read_env_file(path: Optional[str]) -> dict:
    """KEY=VALUE lines of an env file; `.env` in the working directory when no path is given."""
    try:
        with open(path or ".env", encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except OSError as error:
        if path:
            raise UsageError(f"--env-file {path}: {error.strerror}") from None
        return {}
    except ValueError:
        raise UsageError(f"--env-file {path or '.env'}: not a UTF-8 text") from None
    found = {}
    for line in lines:
        match = re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*?)\s*", line)
        if match:
            value = match[2]
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            else:
                value = re.sub(r"\s+#.*", "", value)
            found[match[1]] = value
    return found


def read_filter_file(path: str) -> Optional[tuple]:
    """The patterns of a models filter; None when there is none.  Raises UsageError."""
    try:
        with open(path or "models-filter.txt", encoding="utf-8-sig") as file:
            lines = [line.partition("#")[0].strip() for line in file.read().splitlines()]
    except OSError as error:
        if path:
            raise UsageError(f"--models-filter {path}: {error.strerror}") from None
        return None
    except ValueError:
        raise UsageError(f"--models-filter {path or 'models-filter.txt'}: not a UTF-8 text") from None
    return tuple(line for line in lines if line) or None

# ----------------------------------------------------------------------------
# Room 9.  Upstream: dial, send, read, pool; and the watch for clients that leave
#
# http.client dials and sends (proxies, tunnels, TLS).  Answers are read here, straight from the
# socket: its HTTPResponse hands out one HTTP chunk a call, takes the end of the stream for the
# end of the headers, and cannot say whether a body was whole.
# ----------------------------------------------------------------------------


def shut(sock: Any) -> None:
    """Both directions, at once, without an exception; below TLS, which would wait for an answer."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass


def close_quietly(sock: Any) -> None:
    """Whatever it was, it is closed now."""
    try:
        sock.close()
    except OSError:
        pass


def complain(error: BaseException) -> None:
    """A traceback on stderr, for bugs of our own only; a closed stderr is no second bug."""
    import traceback
    try:
        traceback.print_exception(type(error), error, error.__traceback__)
    except (OSError, ValueError):
        pass


RDHUP = getattr(select, "POLLRDHUP", 0)         # Linux: tells a hang-up from bytes that wait


def is_ready(sock: Any, mask: int = 1) -> bool:
    """Whether something can be read (or, with RDHUP, whether the peer has ended), without waiting.

    poll() because select() refuses descriptors from 1024 up; Windows has only select().
    """
    if not hasattr(select, "poll"):
        return bool(select.select([sock], [], [], 0)[0])
    poller = select.poll()
    poller.register(sock, mask)
    return bool(poller.poll(0))


def has_left(sock: Any) -> bool:
    """Whether a client has ended its connection.  Never waits: recv() on a socket with a time-out would, even with
    MSG_DONTWAIT, so it is asked only when there is something to read."""
    if RDHUP:
        return is_ready(sock, RDHUP)
    try:
        return is_ready(sock) and socket.socket.recv(sock, 1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


class Watcher:
    """One thread that looks, some times a second, whether the clients of running requests are still there: their own
    threads wait for the target and cannot see it.  A client that left takes its upstream connection with it."""

    TICK = 0.2

    def __init__(self) -> None:
        self.lock = threading.Lock()        # while it is held no watched socket is closed, no number used again
        self._scopes: set = set()
        self._some = threading.Event()
        threading.Thread(target=self._run, name="watcher", daemon=True).start()

    def add(self, scope: "Scope") -> None:
        with self.lock:
            self._scopes.add(scope)
            self._some.set()

    def remove(self, scope: "Scope") -> None:
        with self.lock:
            self._scopes.discard(scope)

    def _run(self) -> None:
        while True:
            self._some.wait()
            time.sleep(self.TICK)
            with self.lock:
                for scope in [scope for scope in self._scopes if has_left(scope.client)]:
                    self._scopes.discard(scope)
                    scope.abort()
                if not self._scopes:
                    self._some.clear()


class Scope:
    """One request's claim on the outside: the client it is for, the upstream connection that works for it now."""

    def __init__(self, context: Any, client: Any = None) -> None:
        self.context, self.client = context, client
        self._gone = threading.Event()
        self._sock: Any = None
        self._reply: Optional[Reply] = None
        if client is not None:
            context.watcher.add(self)

    def open(self, target: Target, method: str, path: str, headers: Iterable, body: Any, timeout: Optional[float] = None) -> "Reply":
        """Upstream.open, for as long as the request lasts."""
        self.release()
        self._reply = self.context.upstream.open(self, target, method, path, headers, body, timeout)
        return self._reply

    def hold(self, sock: Any) -> None:
        """From now on `sock` is shut when the client leaves; None lets go of it.  Raises ClientGone if it has left."""
        with self.context.watcher.lock:
            self._sock = sock
        self.check()

    def check(self) -> None:
        """Raises ClientGone once the client has left."""
        if self._gone.is_set():
            raise ClientGone("client closed the connection")

    def pause(self, seconds: float) -> None:
        """Sleeps, unless the client leaves.  Raises ClientGone."""
        self._gone.wait(seconds)
        self.check()

    def abort(self) -> None:
        """The client has left; the watcher's thread calls this, with its lock held."""
        self._gone.set()
        shut(self.client)
        if self._sock is not None:
            shut(self._sock)

    def release(self) -> None:
        """The present answer is not needed any more: its connection goes back to the pool, or ends."""
        with self.context.watcher.lock:
            self._sock = None
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.close()

    def close(self) -> None:
        """The request is over."""
        if self.client is not None:
            self.context.watcher.remove(self)
        self.release()


class Clock:
    """Time for everyone who is not allowed to look at one."""

    now = staticmethod(time.monotonic_ns)
    wall = staticmethod(time.time)

    @staticmethod
    def stamp() -> bytes:
        """RFC 3339 in UTC with microseconds."""
        second, nanosecond = divmod(time.time_ns(), 1_000_000_000)
        return b"%b.%06dZ" % (_second_stamp(second), nanosecond // 1000)


@functools.lru_cache(maxsize=4)
def _second_stamp(second: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()


_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?")
_FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:[ \t]*([^\r\n\0]*?)[ \t]*")


def parse_answer_head(head: bytes) -> tuple[int, int, dict]:
    """Response head -> (minor version, status, headers by lower-case name).

    Lenient about line ends, strict about shape.  Raises BadUpstreamPayload.
    """
    first, *lines = head.replace(b"\r\n", b"\n").split(b"\n")
    match = _STATUS_LINE.fullmatch(first)
    if not match:
        raise BadUpstreamPayload(f"upstream does not speak HTTP/1.x: {one_line(first, 80)}")
    headers: dict = {}
    for line in filter(None, lines):
        pair = _FIELD_LINE.fullmatch(line)
        if not pair:
            raise BadUpstreamPayload(f"upstream sent a malformed header: {one_line(line, 80)}")
        name, value = pair[1].decode("ascii").lower(), pair[2].decode("latin-1")
        if name == "content-length" and headers.get(name, value) != value:
            raise BadUpstreamPayload("upstream sent two different content lengths")
        headers[name] = f"{headers[name]}, {value}" if name in headers and name != "content-length" else value
    return int(match[1]), int(match[2]), headers


class Reply:
    """One answer of the target: status and headers, then its body, whole by read() or piece by piece.

    A connection goes back to the pool only when its body was read to the end.
    """

    def __init__(self, upstream: "Upstream", scope: Scope, key: tuple, connection: Any, head: tuple, rest: bytes, patience: float,
                 bodiless: bool) -> None:
        minor, self.status, self.headers = head
        self._upstream, self._scope, self._key, self._connection = upstream, scope, key, connection
        self._rest, self._patience = rest, patience
        options = self.headers.get("connection", "").lower()
        self._keep = "close" not in options and (minor == 1 or "keep-alive" in options)
        self._chunks: Optional[ChunkedDecoder] = None
        self._left: Optional[int] = None
        length = self.headers.get("content-length")
        if bodiless or self.status in (204, 304):
            self._left = 0
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._chunks = ChunkedDecoder()
        elif length is not None:
            if not re.fullmatch("[0-9]{1,18}", length):
                raise BadUpstreamPayload(f"upstream sent a bad Content-Length: {one_line(length, 40)}")
            self._left = int(length)
        else:
            self._keep = False
        self._inflate = inflater(self.headers.get("content-encoding", "").strip().lower()) if self._left != 0 else None
        self.done = self._left == 0

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")

    def pieces(self) -> Iterator[bytes]:
        """Body bytes as they come, framing and compression off.

        Raises StreamTruncated, UpstreamTimeout, BadUpstreamPayload, each after what came before it; or ClientGone.
        """
        while not self.done:
            data, self._rest = self._rest or self._receive(), b""
            fault: Optional[UpstreamError] = None
            if not data:
                if self._chunks is not None or self._left is not None:
                    raise StreamTruncated("upstream closed the connection in the middle of its answer")
                self.done = True
            elif self._chunks is not None:
                try:
                    data = self._chunks.feed(data)
                except ValueError as error:
                    fault, data = BadUpstreamPayload(f"upstream broke its chunked coding: {error}"), self._chunks.salvaged
                self.done, self._rest = self._chunks.done, self._chunks.rest if self._chunks.done else b""
            elif self._left is not None:
                data, self._rest = data[:self._left], data[self._left:]
                self._left -= len(data)
                self.done = self._left == 0
            data = self._inflate(data) if self._inflate else data
            if data:
                yield data
            if fault is not None:
                raise fault

    def _receive(self) -> bytes:
        sock = self._connection.sock
        try:
            sock.settimeout(self._patience)
            data = sock.recv(READ_SIZE)
        except socket.timeout:
            raise UpstreamTimeout(f"upstream was silent for {self._patience:g} s") from None
        except OSError as error:
            self._scope.check()
            raise StreamTruncated(f"upstream broke the connection: {reason_of(error)}") from None
        if not data:
            self._scope.check()         # cut off by the watcher: the client's doing, not the target's
        return data

    def read(self, limit: int = MAX_ANSWER_BYTES, cut: bool = False) -> bytes:
        """The whole body.  Larger than `limit` it is cut there, or BadUpstreamPayload is raised.  Else as pieces()."""
        found, size = [], 0
        for piece in self.pieces():
            found.append(piece)
            size += len(piece)
            if size > limit and not cut:
                raise BadUpstreamPayload(f"upstream sent an answer of more than {limit} bytes")
            if size > limit:
                break
        return b"".join(found)[:limit] if cut else b"".join(found)

    def finish(self, seconds: float = 0.5) -> None:
        """Waits a moment for the end of a body that nobody needs more of, so that its connection lives on."""
        self._patience, until = seconds, time.monotonic() + seconds
        try:
            for _ in self.pieces():
                if time.monotonic() > until:
                    break
        except ProxyError:
            pass

    def close(self) -> None:
        """Gives the connection back, or ends it."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._keep and self.done and not self._rest:
            self._upstream.give_back(self._key, connection)
        else:
            shut(connection.sock)
            connection.close()


_REDIRECTS = frozenset((301, 302, 303, 307, 308))


class Upstream:
    """Connections to targets: pooled, kept alive, each request on one of them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._pool: dict = {}           # (place, proxy) -> [(connection, idle since)], the one used last at the end
        self._context: Any = None
        self._routes: dict = {}         # Target.place -> proxy or None

    def open(self, scope: Scope, target: Target, method: str, path: str, headers: Iterable, body: Any,
             timeout: Optional[float] = None, hops: int = 3) -> Reply:
        """Sends one request; returns when the head of the answer is there.

        `path` is complete; `body` is bytes, or an iterable of pieces that are sent chunked as they come.  A pooled
        connection that turns out dead before a byte of an answer is replaced once.  Redirects are followed on the
        same scheme, host and port only, `hops` of them.
        Raises UpstreamUnreachable, UpstreamTimeout, BadUpstreamPayload or ClientGone.
        """
        via = self._proxy_for(target)
        key, patience, headers = (target.place, via[:2] if via else None), timeout or self._config.timeout, list(headers)
        for attempt in range(2):
            # A body that streams can be sent once: not on a connection that may be dead.
            connection = self._take(key) if attempt == 0 and isinstance(body, bytes) else None
            reused = connection is not None
            connection = connection or self._dial(target, via, min(self._config.connect_timeout, timeout or 1e9))
            begun = time.monotonic()
            try:
                scope.hold(connection.sock)
                broken = self._send(connection, target, via, method, path, headers, body)
                head, rest = self._read_head(connection.sock, patience, target, broken)
                reply = Reply(self, scope, key, connection, head, rest, patience, method == "HEAD")
                break
            except BaseException as error:
                shut(connection.sock)
                connection.close()
                scope.check()
                # Dead before it could have been read: an idle connection that the target had given up.
                if not isinstance(error, _NoAnswer) or not reused or time.monotonic() - begun > 2.0:
                    raise
        if reply.status not in _REDIRECTS:
            return reply
        reply.close()
        if not hops or not isinstance(body, bytes):
            raise UpstreamError(f"{target.url} redirects in circles" if not hops else f"{target.url} redirects an upload")
        path = self._redirected(target, path, reply.headers.get("location", ""))
        return self.open(scope, target, method, path, headers, body, timeout, hops - 1)

    @staticmethod
    def _redirected(target: Target, path: str, location: str) -> str:
        try:
            where = urllib.parse.urlsplit(urllib.parse.urljoin(f"{target.scheme}://{target.authority}{path}", location))
            port = where.port or {"http": 80, "https": 443}.get(where.scheme)
        except ValueError:
            raise BadUpstreamPayload(f"{target.url} redirects to no address: {one_line(location, 100)}") from None
        if not location or (where.scheme, where.hostname, port) != (target.scheme, target.host.lower(), target.port):
            raise UpstreamError(f"{target.url} redirects to {one_line(location.partition('?')[0], 200) or 'nowhere'}: "
                                "give that address as --target if it is the right one")
        return where.path + (f"?{where.query}" if where.query else "")

    def _send(self, connection: Any, target: Target, via: Optional[tuple], method: str, path: str, headers: list,
              body: Any) -> Optional[OSError]:
        """Sends a request.  What breaks the sending is returned: a server may answer and close before it has read all."""
        connection.sock.settimeout(self._config.timeout)
        sender = http.client.HTTPConnection(target.host)        # keeps no state of an earlier request on this socket
        sender.sock = connection.sock
        plain_proxy = via is not None and target.scheme == "http"
        try:
            sender.putrequest(method, (f"http://{target.authority}" if plain_proxy else "") + path, True, True)
            for name, value in [("Host", target.authority)] + headers:
                sender.putheader(name, value.encode("latin-1", "replace"))
            if plain_proxy and via[2]:
                sender.putheader("Proxy-Authorization", via[2])
            if not isinstance(body, bytes):
                sender.putheader("Transfer-Encoding", "chunked")
            elif body or method in ("POST", "PUT", "PATCH"):
                sender.putheader("Content-Length", str(len(body)))
            sender.endheaders(body or None, encode_chunked=not isinstance(body, bytes))
        except socket.timeout:
            raise UpstreamTimeout(f"{target.url} did not take the request for {self._config.timeout:g} s") from None
        except OSError as error:
            return error
        return None

    def _read_head(self, sock: Any, patience: float, target: Target, broken: Optional[OSError]) -> tuple[tuple, bytes]:
        """(parsed head of the final answer, bytes after it), within `patience` seconds altogether."""
        deadline, data = time.monotonic() + patience, b""
        while True:
            end = re.search(rb"\r?\n\r?\n", data)
            if end:
                head, data = parse_answer_head(data[:end.start()]), data[end.end():]
                if head[1] >= 200:
                    return head, data   # 100 and 103 announce the answer; they are not the answer
                continue
            if len(data) > MAX_HEAD_BYTES:
                raise BadUpstreamPayload(f"{target.url} sent headers of more than {MAX_HEAD_BYTES} bytes")
            try:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                piece = sock.recv(READ_SIZE)
            except socket.timeout:
                raise UpstreamTimeout(f"upstream was silent for {patience:g} s") from None
            except OSError:
                piece = b""
            if not piece and data:
                raise BadUpstreamPayload(f"{target.url} closed the connection in the middle of its answer")
            if not piece:
                raise _NoAnswer(f"{target.url} closed the connection without an answer" + (f" ({reason_of(broken)})" if broken else ""))
            data += piece

    # -- connections

    def _take(self, key: tuple) -> Any:
        """The idle connection used last, unless the target has closed or spoiled it meanwhile."""
        while True:
            with self._lock:
                idle = self._pool.get(key)
                connection, since = idle.pop() if idle else (None, 0.0)
            # Bytes that nobody asked for are an answer to nobody: they must not reach the next client.
            if connection is None or (time.monotonic() - since < POOL_IDLE and not is_ready(connection.sock)):
                return connection
            connection.close()

    def give_back(self, key: tuple, connection: Any) -> None:
        """A connection whose answer was read to the end."""
        now, surplus = time.monotonic(), None
        with self._lock:
            idle = self._pool.setdefault(key, [])
            idle.append((connection, now))
            if len(idle) > POOL_SIZE or now - idle[0][1] > POOL_IDLE:
                surplus = idle.pop(0)[0]
        if surplus is not None:
            surplus.close()

    def close(self) -> None:
        """Ends all idle connections."""
        with self._lock:
            idle, self._pool = self._pool, {}
        for connection, _ in itertools.chain.from_iterable(idle.values()):
            connection.close()

    def _dial(self, target: Target, via: Optional[tuple], timeout: float) -> Any:
        """A new connection, through a proxy or TLS where they are needed."""
        host, port = via[:2] if via else (target.host, target.port)
        try:
            if target.scheme == "https":
                connection: Any = http.client.HTTPSConnection(host, port, timeout=timeout, context=self._tls())
                if via:
                    connection.set_tunnel(target.host, target.port, {"Proxy-Authorization": via[2]} if via[2] else {})
            else:
                connection = http.client.HTTPConnection(host, port, timeout=timeout)
            connection.connect()
        except (OSError, http.client.HTTPException, ValueError) as error:
            through = f" through the proxy {host}:{port}" if via else ""
            kind = UpstreamTimeout if isinstance(error, socket.timeout) else UpstreamUnreachable
            raise kind(f"cannot reach {target.url}{through}: {reason_of(error)}") from None
        return connection

    def _tls(self) -> Any:
        """The TLS settings, made when the first https target is dialled."""
        with self._lock:
            if self._context is None:
                import ssl                          # costs memory that plain targets need not pay
                config = self._config
                try:
                    context = ssl.create_default_context()
                    if config.ca_file:
                        context.load_verify_locations(config.ca_file)
                    if config.client_cert:
                        context.load_cert_chain(config.client_cert)
                except (OSError, ValueError) as error:
                    raise UpstreamUnreachable(f"TLS settings cannot be used: {reason_of(error)}") from None
                if config.insecure:
                    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                self._context = context
            return self._context

    def _proxy_for(self, target: Target) -> Optional[tuple]:
        """(host, port, Proxy-Authorization value) of the proxy on the way, or None.  Loopback has none.

        It may look up names, so it blocks.
        """
        route = None
        if not is_loopback(target.host):
            import urllib.request                   # reads the system's settings on macOS and Windows
            address = urllib.request.getproxies().get(target.scheme)
            if address and not urllib.request.proxy_bypass(f"{target.host}:{target.port}") \
                    and not urllib.request.proxy_bypass(target.host):
                try:
                    parts = urllib.parse.urlsplit(address if "://" in address else "http://" + address)
                    port = parts.port or 8080
                except ValueError as error:
                    raise UpstreamUnreachable(f"{target.scheme.upper()}_PROXY is no address: {error}") from None
                login = ""
                if parts.username is not None:
                    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
                    login = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
                if parts.hostname:
                    route = (parts.hostname, port, login)
        self._routes[target.place] = route
        return route


class _NoAnswer(UpstreamUnreachable):
    """The connection ended before the first byte of an answer."""


def reason_of(error: Exception) -> str:
    """An OSError in the words of a human: "connection refused", not "[Errno 111] ..."."""
    if type(error).__name__ == "SSLCertVerificationError":
        return f"certificate not trusted ({getattr(error, 'verify_message', '') or error}); see --ca-file"
    if isinstance(error, socket.timeout):
        return "timed out"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return one_line(text[:1].lower() + text[1:], 200)

# ----------------------------------------------------------------------------
# Room 10.  Catalogue: what the target serves, under which names, with what metadata
# ----------------------------------------------------------------------------

# Kinds of models that answer neither chats nor embeddings (upstreams rule 90).
OTHER_KINDS = frozenset(("image", "audio", "rerank", "reranker", "moderation", "transcription", "tts", "transcribe",
                         "speech", "video", "image_generation", "audio_transcription", "audio_speech"))
_EMBEDDING_NAME = re.compile(r"embed|(^|[/-])(bge|e5|gte|minilm)([-_.]|$)|nomic-bert", re.I)
_VISION_NAME = re.compile(r"vision|[-_.]vl([-_.\d]|$)|llava|pixtral|gpt-4o|gpt-4\.1|gpt-5|gemini|claude-[3-9]|moondream",
                          re.I)


def human_count(count: Optional[int]) -> str:
    """8190735360 -> "8.2B", as Ollama writes parameter sizes."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count and count >= limit:
            return f"{count / limit:.1f}{unit}"
    return str(count) if count else ""


def parse_count(text: str) -> Optional[int]:
    """"8.2B" -> 8200000000; None for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMBT])", text.strip(), re.I)
    return round(float(match[1]) * {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2].upper()]) if match else None


# What servers call it (upstreams rules 86-92): attribute of ModelInfo -> names, the likeliest first.
_COUNTS = {
    "context": "max_context_length context_length max_model_len context_window context_size max_input_tokens inputTokenLimit "
               "max_total_tokens n_ctx_train",
    "context_now": "loaded_context_length n_ctx", "size": "size_bytes size", "created": "created",
    "embedding_length": "n_embd output_vector_size embedding_length", "parameter_count": "n_params"}
_TEXTS = {
    "owner": "owned_by publisher", "family": "arch architecture model_type family", "format": "compatibility_type format",
    "parameter_size": "params_string parameter_size", "parent": "parent parent_model", "template": "chat_template",
    "quantization": "quantization ftype model_ftype quantization_level"}
_TRAITS = {
    "vision": "vision supports_vision has_image_understanding", "completion": "completion_chat",
    "tools": "trained_for_tool_use function_calling tools supports_function_calling supports_tools supports_tool_calls",
    "thinking": "reasoning thinking supports_reasoning", "insert": "completion_fim"}
# Words in lists of capabilities, parameters and modalities -> traits.
_WORDS = {"tools": "tools", "tool_use": "tools", "vision": "vision", "image": "vision", "thinking": "thinking", "reasoning": "thinking",
          "embedding": "embedding", "embeddings": "embedding", "insert": "insert"}
_INSIDE = ("model_info", "meta", "details", "top_provider", "capabilities", "default_generation_settings", "modalities",
           "chat_template_caps", "quantization")


def as_flag(value: Any) -> Optional[bool]:
    """Whether an upstream says yes or no; None when it says something else, or nothing."""
    return value if isinstance(value, bool) else bool(value) if isinstance(value, dict) else None


def look_up(sources: list, names: str, read: Callable) -> Any:
    """The first usable value under any of `names` in any of `sources`."""
    found = (read(source.get(name)) for name in names.split() for source in sources)
    return next((value for value in found if value not in (None, "")), None)


def read_model(entry: dict) -> Optional[ModelInfo]:
    """One list entry of any server, or what it tells of its only model -> ModelInfo; None when it names nothing."""
    sources = [entry] + [as_dict(entry.get(key)) for key in _INSIDE]
    told: dict = {}
    for table, read in ((_COUNTS, as_count), (_TEXTS, as_text)):
        told.update((key, value) for key, value in ((key, look_up(sources, names, read)) for key, names in table.items()) if value)
    identifier = look_up([entry], "id key model_name name model", as_text)
    owner, status, loaded = told.get("owner"), as_dict(entry.get("status")), entry.get("loaded_instances")
    local, arguments = owner == "llamacpp" and bool(as_dict(entry.get("meta"))), [str(word) for word in as_list(status.get("args"))]
    for flag, value in zip(arguments, arguments[1:]):
        if flag in ("--ctx-size", "-c"):
            told.setdefault("context_now", parse_int(value))
    for instance in as_list(loaded):
        told.setdefault("context_now", as_count(as_dict(as_dict(instance).get("config")).get("context_length")))
    if isinstance(loaded, list):
        told["running"] = bool(loaded)
    elif "state" in entry or "value" in status:
        told["running"] = (entry.get("state") or status.get("value")) == "loaded"
    elif owner in ("vllm", "sglang") or local:
        told["running"] = True
    if owner in ("vllm", "sglang"):
        told.setdefault("context_now", told.get("context"))
    if local:
        told.setdefault("format", "gguf")
    told["parameter_size"] = told.get("parameter_size") or human_count(told.get("parameter_count"))
    told.setdefault("parameter_count", parse_count(told["parameter_size"]))
    text = as_text(as_dict(entry.get("quantization")).get("name")) or told.get("quantization", "")
    text = re.sub(r"^\(guessed\) ?|^all | - [0-9.]+ bpw$|^mostly ", "", text)
    told["quantization"] = re.sub(r" - (S|M|L)(mall|edium|arge)\b", r"_\1", text)       # "Q4_K - Medium" is Q4_K_M
    return ModelInfo(identifier, raw=entry, traits=read_traits(entry, sources, owner), **told) if identifier else None


def read_traits(entry: dict, sources: list, owner: Optional[str]) -> dict:
    """What an entry says that its model can and cannot do; nothing for what it does not mention."""
    traits = {trait: look_up(sources, names, as_flag) for trait, names in _TRAITS.items()}
    kind = look_up(sources[:2], "type mode", as_text)
    shapes = as_dict(entry.get("architecture"))
    lists = [entry.get("capabilities") if owner != "llamacpp" else None, entry.get("supported_parameters"),
             as_list(shapes.get("input_modalities")) or entry.get("input_modalities")]
    for at, words in enumerate(lists):
        if isinstance(words, list) or (at == 0 and "arch" in entry and "state" in entry):      # LM Studio v0 tells by leaving out
            for trait in (("tools", "vision"), ("tools", "thinking"), ("vision",))[at]:
                traits[trait] = traits.get(trait) or False
            traits.update({_WORDS[word]: True for word in as_list(words) if isinstance(word, str) and word in _WORDS})
    for trait, key in (("tools", "tool_call_parser"), ("thinking", "reasoning_parser")):
        traits[trait] = True if entry.get(key) else traits.get(trait)
    outputs = {str(word) for word in as_list(shapes.get("output_modalities"))}
    said = {word for word in as_list(entry.get("capabilities")) if isinstance(word, str)}
    traits["vision"] = True if kind == "vlm" else traits["vision"]
    traits["embedding"] = True if kind in ("embedding", "embeddings") else traits.get("embedding")
    traits["other"] = True if kind in OTHER_KINDS or entry.get("active") is False or (outputs and not outputs & {"text", "embeddings"}) \
        or (said and said <= OTHER_KINDS) else None
    return {trait: value for trait, value in traits.items() if value is not None}


def parse_int(text: str) -> Optional[int]:
    """A decimal number or None."""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else None


def read_models(payload: Any) -> Optional[list[ModelInfo]]:
    """A model list of any shape -> ModelInfo, doubles merged; None when it is no list at all."""
    entries = payload
    if isinstance(payload, dict):
        if payload.get("error") and not payload.get("data"):
            return None
        entries = next((payload[key] for key in ("data", "models") if isinstance(payload.get(key), list)), None)
        if entries is None and payload.get("data", payload.get("models", "")) is None:
            entries = []                # an empty list, as Go writes it
    if not isinstance(entries, list):
        return None
    found: dict = {}
    for entry in entries:
        info = read_model(entry) if isinstance(entry, dict) else ModelInfo(entry) if isinstance(entry, str) else None
        if info is not None:
            found[info.id] = merge_info(found[info.id], info) if info.id in found else info
    return list(found.values())


def merge_info(old: ModelInfo, new: ModelInfo) -> ModelInfo:
    """What `new` tells, over what `old` told."""
    known = {name: value for name, value in new._asdict().items()
             if value not in (None, "", (), {}) and name not in ("id", "raw", "traits")}
    return old._replace(**known, traits={**old.traits, **new.traits}, raw=old.raw or new.raw)


class Probe(NamedTuple):
    """Where metadata may be had besides the model list: path, whether it hangs below the root or the
    base, and the signs (any of them) that make it worth asking."""

    path: str
    native: bool
    signs: frozenset
    instead: str = ""               # a probe whose success makes this one needless


# "unknown" stands for a server of one's own that shows no sign at all.
PROBES = (
    Probe("/api/v1/models", True, frozenset(("organization_owner", "lmstudio", "unknown"))),
    Probe("/api/v0/models", True, frozenset(("organization_owner", "lmstudio", "unknown")), "/api/v1/models"),
    Probe("/props", True, frozenset(("llamacpp", "llama.cpp", "unknown"))),
    Probe("/model/info", True, frozenset(("litellm", "unknown"))),
    Probe("/model_info", True, frozenset(("sglang",))),
    Probe("/info", True, frozenset(("tgi",))),
    Probe("/models/capabilities", False, frozenset(("localai", "bare"))),
    Probe("/language-models", False, frozenset(("xai",))),
    Probe("/api/extra/true_max_context_length", True, frozenset(("koboldcpp",))),
)


def server_signs(target: Target, models: list, headers: dict) -> set:
    """What the list and its headers say about the server (upstreams 2.25)."""
    signs = {target.name} if target.name else set()
    signs |= {name for name, preset in PRESETS.items() if preset is target.preset and preset.hosts}
    signs |= {info.owner for info in models if info.owner}
    if headers.get("server", "").lower().startswith("llama.cpp"):
        signs.add("llama.cpp")
    if any(name.startswith("x-litellm") for name in headers):
        signs.add("litellm")
    if models and not any(info.raw.get("created") or info.owner for info in models):
        signs.add("bare")
    if any(info.id.startswith("koboldcpp/") for info in models):
        signs.add("koboldcpp")
    recognised = set().union(*(probe.signs for probe in PROBES)) - {"unknown"} | {"vllm", "mlx", "ollama", "library"}
    if not signs & recognised and not target.preset.hosts:
        signs.add("unknown")
    return signs


class Catalogue:
    """The target's models: fetched once, kept, refreshed when stale or on a miss, answered from memory
    when the target is down.

    `fetch(native, path, timeout)` returns (status, headers, JSON or None) or raises UpstreamError.
    Refreshing happens in one thread at a time; whoever asks waits for it only as long as is useful.
    """

    def __init__(self, config: Config, fetch: Callable, api: Callable, say: Callable = lambda text: None) -> None:
        self._config, self._fetch, self._api, self._say = config, fetch, api, say
        self._patterns = read_filter_file(config.models_filter)
        self._lock = threading.Lock()
        self._models: Optional[list] = None     # list entries with all metadata, None before the first answer
        self._listed: list = []                 # what is shown, aliases included
        self._names: dict = {}
        self._fetched = self._failed = 0.0
        self._error: Optional[UpstreamError] = None
        self._absent: dict = {}                 # probe -> until when it is not asked again
        self._probed = False
        self._details: dict = {}                # id -> ModelInfo that probes told
        self._thinkers: set = set()             # ids whose answers were seen to think
        self._busy: Optional[tuple] = None      # (list is there, metadata is there) of a refresh under way
        self.generation = 0

    # -- asking

    def models_at_once(self, details: bool = True) -> Optional[list]:
        """models() from memory; None when that may take waiting."""
        return self._listed if self._is_fresh() and (self._probed or not details) else None

    def resolve_at_once(self, name: str) -> Optional[ModelInfo]:
        """resolve() from memory; None when that may take waiting.  A list that is old is renewed meanwhile."""
        if self._models is None:
            return None
        if not self._is_fresh():
            self._update(0.0, False)
        return self._find(name)

    def models(self, details: bool = True) -> list[ModelInfo]:
        """Everything that may be shown.  Raises UpstreamError when nothing was ever known."""
        self._update(FIRST_PATIENCE if self._models is None else DISCOVERY_PATIENCE, details)
        if self._models is None:
            raise self._error or UpstreamUnreachable("the target's model list is not known yet")
        return self._listed

    def resolve(self, name: str) -> ModelInfo:
        """The model a client means (mission: names accepted).

        Raises BadRequest 404 for an unknown or hidden one.  A target whose list cannot be had is
        trusted to know its models: the name passes as it is.
        """
        if self._models is None or not self._is_fresh():
            self._update(0.0 if self._models else LIST_TIMEOUT + 1, False)
        for attempt in range(2):
            found = self._find(name)
            if found is not None:
                return found
            if attempt == 0 and time.monotonic() - max(self._fetched, self._failed) > (1.0 if self._models else 0.2):
                self._update(LIST_TIMEOUT + 1, False, force=True)
        if not self._models and not self._patterns:
            if isinstance(self._error, UpstreamUnreachable):
                raise self._error
            return ModelInfo(self._aliased(name), shown=name)
        if self._passes_unlisted(name):
            return ModelInfo(name, shown=name)
        raise model_not_found(name)

    def _passes_unlisted(self, name: str) -> bool:
        """Azure's deployments and OpenRouter's variants (x:online) are real and stand in no list."""
        if self._patterns:
            return False
        if self._config.destination.key_header == "api-key":
            return True
        return self._config.destination.preset.strip_vendor and self._find(name.rpartition(":")[0]) is not None

    def is_hidden(self, model_id: str) -> bool:
        """A models filter keeps it from clients."""
        return not self._allowed(ModelInfo(model_id), ())

    @property
    def filtered(self) -> bool:
        """Lists of the target cannot be passed on as they are."""
        return bool(self._patterns or self._config.alias)

    def note_thinking(self, model_id: str) -> None:
        """An answer of this model brought reasoning: it can think, whatever lists say."""
        if model_id not in self._thinkers:
            with self._lock:
                self._thinkers.add(model_id)
                if self._models is not None:
                    self._index(self._models)

    # -- names

    def shown_name(self, model_id: str, short: str) -> str:
        """The name in lists: a tag is added to an id that has none."""
        name = short or model_id
        last = name.rpartition("/")[2]
        return name if ":" in last or not self._config.tag else f"{name}:{self._config.tag}"

    def _short(self, model_id: str) -> str:
        name = model_id[len("models/"):] if model_id.startswith("models/") else model_id
        return name.rpartition("/")[2]

    def _strips(self) -> bool:
        config = self._config
        return bool(config.strip_vendor or (config.destination.preset.strip_vendor and not config.keep_vendor))

    def _aliased(self, name: str) -> str:
        return dict(self._config.alias).get(name, name)

    def _index(self, models: list) -> None:
        """Builds everything that lookups need; called with the lock held."""
        config = self._config
        shorts: dict = collections.Counter(self._short(info.id) for info in models)
        aliases: dict = {}
        for alias, model_id in config.alias:
            aliases.setdefault(model_id, []).append(alias)
        names: dict = {"exact": {}, "short": {}, "alias": {}, "lower": {}}
        listed: list = []
        for info in models:
            info = merge_info(info, self._details.get(info.id, ModelInfo(info.id)))
            short = self._short(info.id)
            cut = short if shorts[short] == 1 and (self._strips() or info.id == f"models/{short}") else ""
            info = info._replace(shown=self.shown_name(info.id, cut), capabilities=self._capabilities(info))
            if not self._allowed(info, tuple(aliases.get(info.id, ()))):
                continue
            names["exact"][info.id] = info
            if shorts[short] == 1:
                names["short"].setdefault(short, info)
            if "other" not in info.traits:
                listed.append(info)
            for alias in aliases.get(info.id, ()):
                if any(other.id == alias for other in models):
                    continue            # an id that exists is never shadowed
                entry = info._replace(alias=alias, shown=self.shown_name(alias, ""))
                names["alias"][alias] = entry
                listed.append(entry)
        for table in ("short", "alias", "exact"):
            names["lower"].update((key.lower(), info) for key, info in names[table].items())
        listed.sort(key=lambda info: -(info.created or 0))
        self._models, self._names, self._listed = models, names, listed
        self.generation += 1

    def _find(self, name: str) -> Optional[ModelInfo]:
        names = self._names
        if not names:
            return None
        if name in names["exact"]:
            return names["exact"][name]
        forms = [name]
        for tag in {"latest": 1, "proxy": 1, self._config.tag: 1}:
            if tag and name.endswith(f":{tag}"):
                forms.append(name[:-len(tag) - 1])
        forms += [re.sub(r":[0-9]+$", "", form) for form in forms if re.search(r":[0-9]+$", form)]
        forms += [f"{form}:latest" for form in forms]
        for table in ("exact", "alias", "short"):
            for form in forms:
                if form in names[table]:
                    return names[table][form]
        for form in forms:
            for key in (form.lower(), f"models/{form.lower()}"):
                if key in names["lower"]:
                    return names["lower"][key]
        return None

    def _allowed(self, info: ModelInfo, aliases: tuple) -> bool:
        if not self._patterns:
            return True
        tags = tuple(f":{tag}" for tag in ("latest", "proxy", self._config.tag.lower()) if tag)

        def bare(name: str) -> str:
            return next((name[:-len(tag)] for tag in tags if name.endswith(tag)), name)

        forms = {form.lower() for form in (info.id, self._short(info.id), info.shown, *aliases) if form}
        forms |= {bare(form) for form in forms}

        def hit(pattern: str) -> bool:
            patterns = {pattern.lower(), bare(pattern.lower())}
            return any(fnmatch.fnmatchcase(form, one) or form == one for form in forms for one in patterns)

        wanted = [pattern for pattern in self._patterns if not pattern.startswith("!")]
        return (not wanted or any(map(hit, wanted))) \
            and not any(hit(pattern[1:].strip()) for pattern in self._patterns if pattern.startswith("!"))

    def _capabilities(self, info: ModelInfo) -> tuple:
        """Ollama's words; what nobody told is assumed so that clients do not hide the model (rule 91)."""
        traits = dict(info.traits)
        traits.setdefault("embedding", bool(_EMBEDDING_NAME.search(info.id)))
        if traits["embedding"]:
            return ("embedding",)
        traits.setdefault("vision", bool(_VISION_NAME.search(info.id)))
        traits.setdefault("tools", True)
        if info.id in self._thinkers:
            traits["thinking"] = True
        if self._config.reasoning == "merge":
            traits["thinking"] = False
        return ("completion",) + tuple(word for word in ("tools", "vision", "thinking", "insert") if traits.get(word))

    # -- refreshing

    def _is_fresh(self) -> bool:
        return self._models is not None and time.monotonic() - self._fetched < CATALOGUE_FRESH

    def _update(self, patience: float, details: bool, force: bool = False) -> None:
        """Starts a refresh when one is due; waits `patience` seconds for the list, and a moment more for
        metadata that was never there."""
        now = time.monotonic()
        known, wanting = self._models is not None, details and not self._probed
        hung = isinstance(self._error, UpstreamTimeout)
        memory = HUNG_MEMORY if hung else DOWN_MEMORY if known else 0.2
        if not (force or wanting or not known or not self._is_fresh()) \
                or (now - self._failed < memory and (hung or not force)):
            return
        with self._lock:
            busy = self._busy
            if busy is None:
                busy = (threading.Event(), threading.Event())
                try:
                    threading.Thread(target=self._refresh, args=(*busy, details), name="catalogue", daemon=True).start()
                except RuntimeError:    # no more threads: the memory has to do
                    return
                self._busy = busy
        if patience:
            busy[0].wait(patience)
        if wanting and patience:
            busy[1].wait(DETAILS_PATIENCE)

    def _refresh(self, listed: threading.Event, done: threading.Event, details: bool) -> None:
        try:
            native = self._api() == "ollama"
            status, headers, payload = self._fetch(native, "/api/tags" if native else "/models", LIST_TIMEOUT)
            models = read_models(payload) if status < 400 else None
            if models is None:
                sentence = error_sentence(payload) if status >= 400 or payload else ""
                raise UpstreamRefused(f"{self._config.destination.url} gave no model list: "
                                      f"{sentence or f'HTTP {status}'}", 502)
            with self._lock:
                self._index(models)
            self._fetched, self._error = time.monotonic(), None
            listed.set()
            if not native and (details or self._probed):
                self._probe(models, headers)
        except ProxyError as error:
            self._failed = time.monotonic()
            self._error = error if isinstance(error, UpstreamError) else UpstreamError(error.message)
            self._say(f"model list: {error.message}")
        except Exception as error:      # noqa: BLE001  a bug here must not stop every later refresh
            self._failed = time.monotonic()
            self._error = UpstreamError("the model list could not be read")
            complain(error)
        finally:
            with self._lock:
                self._busy = None
            listed.set()
            done.set()

    def _probe(self, models: list, headers: dict) -> None:
        """Gathers metadata; every answer that is no metadata means "not there", and is remembered."""
        signs = server_signs(self._config.destination, models, headers)
        found: dict = {}
        answered: set = set()
        for probe in PROBES:
            if not signs & probe.signs or probe.instead in answered \
                    or self._absent.get(probe.path, 0.0) > time.monotonic():
                continue
            told = self._ask(probe, models)
            if not told:
                self._absent[probe.path] = time.monotonic() + ABSENT_MEMORY
                continue
            answered.add(probe.path)
            for info in told:
                found[info.id] = merge_info(found.get(info.id, info), info)
        self._probed = True
        with self._lock:
            if found != self._details:
                self._details = found
                self._index(self._models or models)

    def _ask(self, probe: Probe, models: list) -> list[ModelInfo]:
        try:
            status, _, payload = self._fetch(probe.native, probe.path, PROBE_TIMEOUT)
        except ProxyError:
            return []
        if status != 200 or not isinstance(payload, (dict, list)) or as_dict(payload).get("error"):
            return []
        listed = read_models(payload)
        if listed:
            return listed
        if not isinstance(payload, dict):
            return []
        if probe.path == "/props" and payload.get("role") == "router":
            found = []
            for info in models:         # asking about a model that is not loaded would load it
                if info.running:
                    name = urllib.parse.quote(info.id, safe="")
                    found += self._ask(probe._replace(path=f"/props?model={name}"), [info])
            return found or [ModelInfo("")]
        told = read_model({**payload, "id": models[0].id}) if len(models) == 1 else None
        return [told] if told and (told.context or told.context_now or told.family or told.template or told.traits) else []


# ----------------------------------------------------------------------------
# Room 11.  Healing: what a target refused, and what to send instead
#
# A refusal before the first event that names a field of ours is answered by sending the
# request once more without it, or with what the target wants in its place.  What worked
# is remembered per target, endpoint and model, so the next request is right at once.
# ----------------------------------------------------------------------------


def _rename(new: str) -> Callable:
    def act(body: dict, key: str) -> bool:
        if key not in body or new in body:
            return body.pop(key, None) is not None
        body[new] = body.pop(key)
        return True
    return act


def _drop(body: dict, key: str) -> bool:
    return body.pop(key, None) is not None


def _schema_instead(body: dict, key: str) -> bool:
    """json_object -> json_schema with a bare object; a schema that is refused, too, becomes a request in words."""
    value = as_dict(body.get(key))
    if value.get("type") == "json_object" and body.get("messages") is not None:
        body[key] = {"type": "json_schema", "json_schema": {"name": "response", "schema": {"type": "object"}}}
        return True
    return False


def _schema_in_words(body: dict, key: str) -> bool:
    value = as_dict(body.pop(key, None))
    messages = body.get("messages")
    if not value or not isinstance(messages, list):
        return bool(value)
    schema = as_dict(value.get("json_schema")).get("schema") or {"type": "object"}
    wanted = "Answer with JSON only, no code fence, matching this JSON Schema: " + json.dumps(schema)
    body["messages"] = [{"role": "system", "content": wanted}] + messages
    return True


def _first_four(body: dict, key: str) -> bool:
    stops = body.get(key)
    if isinstance(stops, list) and len(stops) > 4:
        body[key] = stops[:4]
        return True
    return False


def _lower_effort(body: dict, key: str) -> bool:
    if body.get(key) == "max":
        body[key] = "high"
        return True
    return False


def _messages_without(name: str) -> Callable:
    def act(body: dict, key: str) -> bool:
        messages = [dict(message) for message in as_list(body.get("messages")) if isinstance(message, dict)]
        found = [message.pop(name, None) is not None for message in messages]
        if any(found):
            body["messages"] = messages
        return any(found)
    return act


def _tools_without_strict(body: dict, key: str) -> bool:
    changed = False
    for tool in as_list(body.get("tools")):
        changed = as_dict(as_dict(tool).get("function")).pop("strict", None) is not None or changed
    return changed


def _nine_ids(body: dict, key: str) -> bool:
    changed = False
    for message in as_list(body.get("messages")):
        for holder, name in [(call, "id") for call in as_list(message.get("tool_calls"))] + [(message, "tool_call_id")]:
            if isinstance(holder.get(name), str) and nine(holder[name]) != holder[name]:
                holder[name], changed = nine(holder[name]), True
    return changed


def _bridge_results(body: dict, key: str) -> bool:
    messages, bridged = as_list(body.get("messages")), []
    for message in messages:
        if bridged and bridged[-1].get("role") == "tool" and message.get("role") == "user":
            bridged.append({"role": "assistant", "content": "OK."})
        bridged.append(message)
    body["messages"] = bridged
    return len(bridged) > len(messages)


def _fill_reasoning(body: dict, key: str) -> bool:
    changed = False
    for message in as_list(body.get("messages")):
        if message.get("role") == "assistant" and not message.get("reasoning_content"):
            message["reasoning_content"], changed = " ", True
    return changed


class Remedy(NamedTuple):
    """One row: when the refusal is about `key` and matches `pattern`, do `act`."""

    key: str
    act: Callable
    pattern: str = ""


# Rows of one key are tried in order, each once a request.  A key without a row is dropped.
REMEDIES = (
    Remedy("max_tokens", _rename("max_completion_tokens")),
    Remedy("max_completion_tokens", _rename("max_tokens")),
    Remedy("seed", _rename("random_seed")),
    Remedy("dimensions", _rename("output_dimension")),
    Remedy("response_format", _schema_instead),
    Remedy("response_format", _schema_in_words),
    Remedy("stop", _first_four),
    Remedy("reasoning_effort", _lower_effort),
    Remedy("reasoning_content", _messages_without("reasoning_content")),
    Remedy("reasoning_details", _messages_without("reasoning_details")),
    Remedy("strict", _tools_without_strict),
)
# Refusals that do not name the key in so many words.
SYMPTOMS = (
    Remedy("think", _drop, r"does not support thinking|think value .* is not supported"),
    Remedy("response_format", _schema_instead, r"response_format|json_object|must contain the word .?json"),
    Remedy("messages", _nine_ids, r"tool.?call.?id.* length of 9|must be a-z, A-Z, 0-9"),
    Remedy("messages", _bridge_results, r"[Uu]nexpected role .?user.? after role .?tool"),
    Remedy("messages", _fill_reasoning, r"reasoning_content.{0,80}(must be|is missing|is required|passed back)"
                                        r"|[Mm]issing .?reasoning_content"),
    Remedy("max_tokens", _rename("max_completion_tokens"), r"max_completion_tokens.? instead"),
)
_VALUE_REFUSED = re.compile(r"must be (between|less|greater|at most|at least|in|>|<)|out of range|should be (less|greater)", re.I)
_CONTEXT_OVERFLOW = re.compile(r"context.{0,20}(length|size|window)|maximum context|exceeds? the available|too many tokens"
                               r"|n_ctx", re.I)
# Never dropped: an answer without them would be an answer to another question (rule 29).
_ESSENTIAL = frozenset(("model", "messages", "stream", "tools", "prompt", "input", "images", "suffix"))
_NESTED = {"enable_thinking": "chat_template_kwargs", "include_usage": "stream_options", "effort": "reasoning"}
# What editors add for themselves and strict servers refuse on the relay (clients rule 43).
CLIENT_KEYS = ("options", "keep_alive", "think", "format")
CLIENT_MESSAGE_KEYS = ("copilot_cache_control", "copilot_references", "cot_id", "cot_summary", "reasoning_content")


def refused_keys(error: UpstreamRefused, body: dict) -> list[str]:
    """The keys of `body` that a refusal may be about, likeliest first (upstreams rule 27)."""
    told = error.body
    told = told[0] if isinstance(told, list) and told else told
    keys: list[str] = []
    param = as_dict(as_dict(told).get("error")).get("param") or as_dict(told).get("param")
    if isinstance(param, str):
        keys += re.findall(r"\w+", param)
    for holder in (as_dict(told), as_dict(as_dict(told).get("message"))):
        for problem in as_list(holder.get("detail")):
            keys += [str(part) for part in reversed(as_list(as_dict(problem).get("loc")))]
    words = set(re.findall(r"\w+", error.message))
    message_keys = {key for message in as_list(body.get("messages")) if isinstance(message, dict) for key in message}
    ours = set(body) | set(_NESTED) | (message_keys - {"role", "content", "name"}) | {"strict"}
    keys += sorted(words & ours, key=len, reverse=True)
    keys = [_NESTED.get(key, key) for key in keys]
    return [key for key in dict.fromkeys(keys) if key in body or key in message_keys or key == "strict"]


class Healer:
    """Knows what the target refused; a lesson is (key, action), and `where` is (path, model)."""

    def __init__(self) -> None:
        self._lessons: dict = {}

    def apply(self, where: tuple, preset: Preset, body: dict) -> None:
        """Changes `body` to what this target is known to want."""
        for key, new in preset.lessons.items():
            (_rename(new) if new else _drop)(body, key)
        for key, act in self._lessons.get(where, ()):
            act(body, key)

    def remember(self, where: tuple, lessons: list) -> None:
        """What was done to a request that then succeeded."""
        if len(self._lessons) > 4096:
            self._lessons.pop(next(iter(self._lessons)))
        known = self._lessons.get(where, ())
        self._lessons[where] = known + tuple(lesson for lesson in lessons if lesson not in known)

    def heal(self, error: UpstreamRefused, body: dict, tried: list) -> bool:
        """Changes `body` in answer to a refusal and notes the lesson in `tried`; False when nothing helps."""
        if error.status not in (400, 404, 422, 501):
            return False
        error.message = error.message[:20000]
        limit = next((key for key in ("max_tokens", "max_completion_tokens") if key in body), None)
        if limit and _CONTEXT_OVERFLOW.search(error.message) \
                and not re.search("unsupported|not supported", error.message, re.I):
            return self._try(None, _drop, body, tried, limit)
        for row in SYMPTOMS:
            if re.search(row.pattern, error.message) and self._try(row.key, row.act, body, tried):
                return True
        if error.status == 404 and not as_dict(as_dict(error.body).get("error")).get("param"):
            return False                # an unknown model or path is not cured by leaving fields out
        for key in refused_keys(error, body):
            for row in REMEDIES:
                if row.key == key and self._try(key, row.act, body, tried):
                    return True
            if key in CLIENT_MESSAGE_KEYS and self._try(key, _MESSAGE_DROPS[key], body, tried):
                return True
            if key not in _ESSENTIAL and self._try(key, _drop, body, tried):
                return True
        return False

    @staticmethod
    def _try(key: Optional[str], act: Callable, body: dict, tried: list, on: str = "") -> bool:
        if (key, act) in tried or not act(body, on or key):
            return False
        tried.append((key, act))
        return True


_MESSAGE_DROPS = {key: _messages_without(key) for key in CLIENT_MESSAGE_KEYS}


class Keepsakes:
    """Extras that a provider attached to tool calls and wants to see again (Gemini's extra_content,
    OpenRouter's reasoning_details, DeepSeek's reasoning_content), by tool call id, the oldest forgotten."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict = collections.OrderedDict()

    def keep(self, calls: Iterable) -> None:
        """Remembers what came with `calls`."""
        for call in calls:
            if call.extra:
                self._kept[self._key(call)] = call.extra
                while len(self._kept) > KEEPSAKES:
                    self._kept.popitem(last=False)

    def attach(self, messages: tuple) -> tuple:
        """The history with everything that is remembered about its calls."""
        if not self._kept:
            return messages
        return tuple(message._replace(tool_calls=tuple(
            call._replace(extra=self._kept.get(self._key(call))) for call in message.tool_calls))
            if message.tool_calls else message for message in messages)

    @staticmethod
    def _key(call: ToolCall) -> str:
        """Ids like call_0 come again in every conversation; the whole call hardly does."""
        return digest_of(json.dumps([call.id, call.name, whole_numbers(call.arguments)], sort_keys=True))


def whole_numbers(value: Any) -> Any:
    """JSON as JavaScript would write it again: 1.0 is 1."""
    if isinstance(value, dict):
        return {key: whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

# ----------------------------------------------------------------------------
# Room 12.  Operations: one short function per verb
# ----------------------------------------------------------------------------


class Request:
    """What a client asks.  `body` is bytes, or an iterator of its pieces for routes that stream it."""

    def __init__(self, method: str, target: str, version: int, headers: dict) -> None:
        self.method, self.target, self.version, self.headers = method, target, version, headers
        path, _, self.query = target.partition("?")
        self.path = clean_path(path)
        self.body: Any = b""
        self.route: Any = None
        self.arguments: tuple = ()
        self.started = time.monotonic_ns()
        self.keep = version == 1
        self.length: Optional[int] = None
        self.chunked = False

    @property
    def text(self) -> str:
        """The body for --debug."""
        return self.body.decode("utf-8", "replace") if isinstance(self.body, bytes) else "(a stream)"


class Response:
    """What the client gets: a whole `body`, or `lines`, lists of pieces as they come (`length` bytes, if that is known)."""

    def __init__(self, status: int, body: bytes = b"", media_type: str = JSON, headers: Iterable = (),
                 lines: Optional[Iterable] = None, length: Optional[int] = None) -> None:
        self.status, self.body, self.media_type, self.headers = status, body, media_type, tuple(headers)
        self.lines, self.length = lines, length
        self.reason = ""


def json_response(value: Any, status: int = 200, headers: Iterable = ()) -> Response:
    """A whole JSON answer."""
    return Response(status, dump(value), JSON, headers)


class Log:
    """The access line of mission C10 on stdout, [PROXY] lines with --debug, warnings on stderr; all on
    one line each, with keys hidden.  A closed stream silences it and nothing else."""

    def __init__(self, config: Config) -> None:
        self._secrets = config.secrets
        self.debugging = config.debug and not config.no_log
        self._quiet = config.no_log
        self._lock = threading.Lock()
        self._lost = 0                  # lines that nobody took
        self._second = (0, "")
        self._known: dict = {}          # request lines as they are written
        self._outlet: tuple = (None, None)      # the stream written to last, and what tells whether it takes more

    def redact(self, text: str) -> str:
        """`text` without any key of ours."""
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, "***")
        return text

    def access(self, client: str, request_line: str, status: int, size: int, milliseconds: float) -> None:
        """ACCESS: 2023/04/15 12:34:56 127.0.0.1 "POST /api/generate HTTP/1.1" 200 1024 45.6ms"""
        if self._quiet:
            return
        second, known = int(time.time()), self._second
        if known[0] != second:
            known = self._second = (second, time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(second)))
        line = self._known.get(request_line)
        if line is None:
            if len(self._known) >= 256:
                self._known.clear()
            line = self.redact(one_line(request_line, 400).replace('"', "%22"))
            if len(request_line) < 1024:
                self._known[request_line] = line
        self._write(sys.stdout, f'ACCESS: {known[1]} {client} "{line}" {status} {size} {milliseconds:.1f}ms')

    def debug(self, text: Any) -> None:
        """One [PROXY] line, when --debug is given."""
        if self.debugging:
            self._write(sys.stdout, "[PROXY] " + one_line(self.redact(text), 20000))

    @property
    def tap(self) -> Optional[Callable]:
        """What --debug does with every chunk of a stream (mission B9); None without it."""
        return (lambda label, data: self.debug(f"{label}: {data.decode('utf-8', 'replace')}")) if self.debugging else None

    def say(self, text: str) -> None:
        """Something the operator should know."""
        if not self._quiet:
            self._write(sys.stderr, one_line(self.redact(text), 1000))

    def _write(self, stream: Any, line: str) -> None:
        """Writes unless that would wait: whoever does not read the log must not stop the proxy."""
        try:
            text = line if line.isascii() else line.encode("utf-8", "replace").decode("utf-8")
            with self._lock:
                if self._lost:
                    text = f"\n({self._lost} lines were lost: nobody read the log)\n{text}"
                takes_more = self._outlet[1] if self._outlet[0] is stream else self._look_at(stream)
                text += "\n"
                while text:             # a pipe that is ready takes 4096 bytes
                    if not takes_more(0):
                        self._lost += 1
                        return
                    stream.write(text[:1000])
                    stream.flush()
                    text = text[1000:]
                self._lost = 0
        except (OSError, ValueError, AttributeError, UnicodeError):
            pass

    def _look_at(self, stream: Any) -> Callable:
        """What tells whether a write to a pipe or a terminal goes on at once, as far as the system knows (POSIX)."""
        try:
            poller = select.poll()
            poller.register(stream.fileno(), select.POLLOUT)
            takes_more = poller.poll
        except (OSError, ValueError, AttributeError):
            def takes_more(patience: float) -> bool:    # Windows, or no file at all, such as a test's
                return True
        self._outlet = (stream, takes_more)
        return takes_more


class Context:
    """What every operation may use, built once: configuration, target, catalogue, memory."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.target = config.destination
        self.log = Log(config)
        self.clock = Clock()
        self.watcher = Watcher()
        self.upstream = Upstream(config)
        self.healer = Healer()
        self.keepsakes = Keepsakes()
        self.openers: set = set()       # models whose answers begin inside a think tag
        self.fallback = parse_target(config.fallback, "ollama") if config.fallback else None
        self._unknown_since = -1e9
        self.known_api = config.target_api if config.target_api != "auto" else ""
        if not self.known_api and (self.target.name or self.target.preset.hosts):
            self.known_api = self.target.preset.api
        self.catalogue = Catalogue(config, self.fetch, self.api, self.log.say)
        self.memory: dict = {}          # answers of tags and show, by catalogue generation
        self._headers = self._own_headers()

    def api(self) -> str:
        """What the target speaks, "openai" or "ollama": found out by asking, kept once it answered."""
        if not self.known_api:
            if time.monotonic() - self._unknown_since < DOWN_MEMORY:
                return "openai"
            try:
                self.known_api = "ollama" if self._is_ollama() else "openai"
            except UpstreamUnreachable:
                self._unknown_since = time.monotonic()
                return "openai"         # down: asked again soon
            except UpstreamTimeout:     # an Ollama answers this at once
                self.known_api = "openai"
        return self.known_api

    def _is_ollama(self) -> bool:
        """Asks for a version, then for the OpenAI list.  Ollama shows every model with a tag (ollama-api 1.9);
        a server that has a version and lists ids without one emulates a part of Ollama (KoboldCpp, LocalAI, a
        proxy of our own kind), and is taken for the OpenAI server that it is."""
        try:
            status, _, payload = self.fetch(True, "/api/version", ASK_TIMEOUT)
            if status != 200 or not isinstance(as_dict(payload).get("version"), str):
                return False
            status, _, payload = self.fetch(False, "/models", ASK_TIMEOUT)
        except (UpstreamUnreachable, UpstreamTimeout):
            raise
        except UpstreamError:
            return False
        listed = read_models(payload) if status == 200 else None
        return all(":" in info.id for info in listed or ())

    def habits(self) -> Habits:
        """The target's habits; a server of one's own may know template switches, a stranger's may not."""
        return self.target.preset.habits

    def _own_headers(self) -> tuple:
        target, config = self.target, self.config
        headers = [("User-Agent", f"ollama-proxy/{__version__}"), ("Accept-Encoding", "identity")]
        if target.key:
            headers.append(("api-key", target.key) if target.key_header == "api-key"
                           else ("Authorization", f"Bearer {target.key}"))
        return tuple(headers) + tuple(config.header)

    def headers(self, request: Optional[Request] = None) -> list:
        """What goes to the target with every request: its key, never the client's unless so configured."""
        headers = list(self._headers)
        client = self.client_authorization(request)
        if client:
            headers = [pair for pair in headers if pair[0].lower() != "authorization"]
            headers.append(("Authorization", client))
        return headers

    def client_authorization(self, request: Optional[Request]) -> str:
        """The client's own key, when it is to be passed on; the key of our own door never is."""
        if not self.config.forward_auth or request is None:
            return ""
        client, own = request.headers.get("authorization", ""), self.config.client_key
        return client if is_real_key(client) and not (own and own in client) else ""

    def path(self, native: bool, path: str) -> str:
        """A path on the target, its base and the query of the configured URL added."""
        whole = (self.target.root if native else self.target.base) + path
        if self.target.query:
            whole += ("&" if "?" in whole else "?") + self.target.query
        return whole

    def fetch(self, native: bool, path: str, timeout: Optional[float]) -> tuple:
        """GET of a JSON document -> (status, headers, value or None).  Raises UpstreamError."""
        with contextlib.closing(Scope(self)) as scope:
            reply = scope.open(self.target, "GET", self.path(native, path), self.headers() + [("Accept", JSON)], b"", timeout)
            data = reply.read(64 * 1024 * 1024)
        try:
            return reply.status, reply.headers, load(data)
        except (ValueError, RecursionError):
            return reply.status, reply.headers, None


_PLACEHOLDERS = frozenset(("", "undefined", "null", "none", "ollama", "dummy", "test", "key", "token", "api-key", "lm-studio",
                           "not-needed", "no-key", "no-key-required", "sk-no-key-required", "api-key-not-set",
                           "default-key", "okki", "changeme", "your-api-key"))


def is_real_key(authorization: str) -> bool:
    """A key, and not one of the words that clients send when they have none."""
    scheme, _, key = authorization.strip().partition(" ")
    return scheme.lower() == "bearer" and key.strip().lower() not in _PLACEHOLDERS and len(key.strip()) >= 8


def refusal(reply: Reply) -> UpstreamRefused:
    """An error answer of the target, read and understood."""
    try:
        data = reply.read(MAX_ERROR_BYTES, cut=True)
    except (StreamTruncated, BadUpstreamPayload):
        data = b""                      # the status is worth more than half a text
    try:
        body = load(data)
    except (ValueError, RecursionError):
        body = None
    headers = []
    wait_for = reply.headers.get("retry-after") or reply.headers.get("llm_provider-retry-after")
    if wait_for and reply.status in (402, 429, 503):
        headers.append(("Retry-After", one_line(wait_for, 60)))
    status = reply.status if 400 <= reply.status <= 599 else 502
    return UpstreamRefused(error_text(data, reply.status), status, headers, body, data, reply.content_type)


_LOADING = re.compile(r"loading|warming up|starting up", re.I)


def send(scope: Scope, request: Request, dialect: Dialect, wire: WireRequest, model: str) -> Reply:
    """One translated request to the target, healed and repeated where that helps.

    Raises the first refusal when nothing does.  A server that is still loading is waited for.
    """
    context = scope.context
    native = dialect is OLLAMA
    path = context.path(native, wire.path)
    headers = context.headers(request) + [("Content-Type", JSON), ("Accept", EVENT_STREAM if wire.body.get("stream")
                                                                   and not native else JSON)]
    where = (wire.path, model)
    body, tried, lessons, first = dict(wire.body), [], [], None
    context.healer.apply(where, context.target.preset, body)
    patient_until = time.monotonic() + context.config.timeout
    while True:
        data = dump(body)
        if context.log.debugging:
            context.log.debug(f"POST {context.target.scheme}://{context.target.authority}{path} - Request: {data.decode()}")
        reply = scope.open(context.target, "POST", path, headers, data)
        if reply.status < 300:
            if tried:
                context.healer.remember(where, lessons)
            return reply
        error = refusal(reply)
        context.log.debug(f"Target response: {error.status} {error.message}")
        loading = error.status == 503 and (_LOADING.search(error.message) or "model_loading" in str(error.body))
        if loading and time.monotonic() < patient_until:
            told = dict(error.headers).get("Retry-After", "")
            scope.pause(min(float(told) if re.fullmatch("[0-9]{1,4}", told) else 1.0, 30.0))
            continue
        first = first or error
        if len(tried) >= 6 or not context.healer.heal(error, body, tried):
            raise first
        if tried[-1][0] is not None and not _VALUE_REFUSED.search(error.message):
            lessons.append(tried[-1])   # the field is the trouble, not this client's value


def blame_our_key(context: Context, error: ProxyError, request: Request) -> ProxyError:
    """Trouble with *our* key is not the client's 401, wherever in the answer the target told it."""
    if error.status in (401, 403) and isinstance(error, UpstreamError) and not context.client_authorization(request):
        return UpstreamError(f"{context.target.url} refused the key of this proxy: {error.message}", 502)
    return error


def settings_for(config: Config, *names: str) -> list[dict]:
    """The --set rows whose pattern fits any of a model's names, with or without vendor and tag."""
    if not config.set:
        return []
    forms = {form.lower() for name in names for form in (name, name.rpartition("/")[2])}
    forms |= {re.sub(":(latest|proxy)$", "", form) for form in forms}
    return [values for pattern, values in config.set
            if any(fnmatch.fnmatchcase(form, pattern.lower()) for form in forms)]


def with_defaults(config: Config, model: str, call: ChatCall) -> ChatCall:
    """--set, where the client said nothing."""
    for values in settings_for(config, model, call.model):
        options, extra = parse_options(values)
        for key in ("think", "keep_alive", "format", "reasoning", "open_think"):
            extra.pop(key, None)
        known = set(call.options) | {name for name, wire in OLLAMA_OPTION_KEYS.items() if wire in call.extra}
        call = call._replace(options={**{key: value for key, value in options.items() if key not in known},
                                      **call.options}, extra={**extra, **call.extra})
        if call.think is None and "think" in values:
            call = call._replace(think=parse_think(values["think"]))
        if call.keep_alive is None:
            call = call._replace(keep_alive=values.get("keep_alive"))
        if call.format is None and values.get("format"):
            call = call._replace(format=parse_format(values["format"]))
    return call


def thinks_always(config: Config, model: str) -> bool:
    """A model of THINK_MODELS or the built-ins (mission E2)."""
    names = {name.lower() for name in BUILT_IN_THINK_MODELS + tuple(config.think_models)}
    return model.lower() in names or re.sub(":latest$", "", model.lower()) in names


def converse(request: Request, scope: Scope) -> Response:
    """POST /api/chat, /api/generate, /v1/chat/completions, /v1/completions: the longest road, in order."""
    context = scope.context
    client, face = request.route.dialect, request.route.face
    target = DIALECTS[context.api()]
    if client is target:
        return (relay_native if client is OLLAMA else relay_openai)(request, scope)
    call = client.parse_chat(load_request(request.body), face)
    info = context.catalogue.resolve(call.model)
    if not call.messages and call.prompt is None:
        return json_response(load_answer(call, context.clock.stamp().decode()))
    call = with_defaults(context.config, info.id, call)
    if context.config.generate_via == "completions" and call.face == "generate" and not call.images:
        call = as_continuation(call)
    if target is OLLAMA:
        call = for_ollama(call, info, context.config)
    wired, messages = call, context.keepsakes.attach(call.messages)
    if info.id != call.model or messages is not call.messages:
        wired = call._replace(model=info.id, messages=messages)
    habits = context.habits()
    wire = target.render_chat(wired, habits, info.context_now or info.context)
    sent = time.monotonic_ns()
    try:
        reply = send(scope, request, target, wire, info.id)
    except UpstreamRefused as error:
        if error.status != 404 or wire.path != "/chat/completions" or call.face != "generate" \
                or "model" in error.message.lower():
            raise
        wire = target.render_chat(as_continuation(wired), habits, info.context)
        reply = send(scope, request, target, wire, info.id)
    config = context.config
    encoder = client.Encoder(call, context.clock, request.started, sent, config.reasoning_keys)
    decoder = target.Decoder(wired)
    steps = steps_for(config, call, decoder, info.id in context.openers or bool(setting_for(config, info.id, "open_think")))
    witness = Witness(context, info.id, steps)
    if not call.stream:
        return whole_answer(reply.read(), decoder, encoder, witness, steps, context.log, request.started)
    translation = Translation(decoder, encoder, steps, witness, context.log.redact, context.log.tap)
    return Response(200, media_type=encoder.media_type, lines=begun(translation.lines(reply.pieces())))


class Witness:
    """Called with all events of an answer; notes what later requests profit from: provider extras of tool
    calls, models that think, models whose answers begin inside a think tag."""

    def __init__(self, context: Context, model: str, steps: list) -> None:
        self._context, self._model, self._tags = context, model, next((step for step in steps if isinstance(step, ThinkTags)), None)
        self._thought = False

    def __call__(self, events: list) -> None:
        for event in events:
            kind = type(event)
            if kind is ThinkingDelta and not self._thought:
                self._thought = True
                self._context.catalogue.note_thinking(self._model)
            elif kind is ToolCalls:
                self._context.keepsakes.keep(event.calls)
            elif kind is Finish and self._tags is not None and self._tags.begins_inside is not None:
                openers = self._context.openers
                (openers.add if self._tags.begins_inside else openers.discard)(self._model)


def steps_for(config: Config, call: ChatCall, decoder: Any, opened: bool) -> list:
    """What happens to events between the dialects: JSON is bare (clients rule 20), stop strings beyond the fourth are
    watched for here (upstreams rule 9), `think: false` hides all thinking (rule 60)."""
    last, mode, steps = call.messages[-1] if call.messages else None, "drop" if call.think is False else config.reasoning, []
    tagged = isinstance(decoder, OpenAIDecoder)
    if tagged and last is not None and last.role == "assistant" and last.content and not last.tool_calls:
        steps.append(Prefill(last.content))
    if tagged:
        steps.append(ThinkTags(decoder, opened))
    if call.format is not None:
        steps.append(Fence())
    if len(call.options.get("stop", ())) > 4:
        steps.append(StopStrings(call.options["stop"]))
    return steps + ([Reasoning(mode)] if mode != "separate" else [])


def setting_for(config: Config, model: str, key: str) -> Any:
    """A value given by --set for a model, for keys that are no options of the target."""
    return next((values[key] for values in settings_for(config, model) if key in values), None)


def as_continuation(call: ChatCall) -> ChatCall:
    """A conversation as one plain prompt, for targets without a chat endpoint."""
    if call.prompt is not None:
        return call
    return call._replace(prompt="\n\n".join(message.content for message in call.messages if message.content),
                         messages=(), tools=())


def for_ollama(call: ChatCall, info: ModelInfo, config: Config) -> ChatCall:
    """What an Ollama needs that OpenAI clients do not say: thinking for its models, pictures as bytes."""
    if call.think is None and thinks_always(config, info.id):
        call = call._replace(think=True)
    messages = list(call.messages)
    for at, message in enumerate(messages):
        if any(image.url for image in message.images):
            images = [fetch_image(image.url, config) if image.url else image for image in message.images]
            messages[at] = message._replace(images=tuple(images))
    return call._replace(messages=tuple(messages))


def whole_answer(data: bytes, decoder: Any, encoder: Any, witness: Callable, steps: list, log: Log,
                 started: int) -> Response:
    """stream:false, whatever the target sent: one document, or a stream all the same."""
    def took() -> str:
        return f"(took {(time.monotonic_ns() - started) / 1e6:.0f}ms)"

    if log.debugging:
        log.debug(f"Target response: {data.decode('utf-8', 'replace')} {took()}")
    try:
        answer = load(data)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, (dict, list)):
        events = decoder.decode_body(answer)
    else:
        events = decoder.feed(data) + decoder.close()
    for step in steps:
        events = step(events)
    witness(events)
    response = Response(200, encoder.fold(events))
    if log.debugging:
        log.debug(f"Ollama response: {response.body.decode()} {took()}")
    return response


def find_model_as(context: Context, name: str, wording: str) -> ModelInfo:
    """Context.find_model with the sentence Ollama uses at this endpoint (ollama-api 1.4)."""
    try:
        return context.catalogue.resolve(name)
    except BadRequest as error:
        if error.status != 404:
            raise
        raise BadRequest(wording.format(name=name), 404, code="model_not_found") from None


def embed(request: Request, scope: Scope) -> Response:
    """POST /api/embed, /api/embeddings, /v1/embeddings."""
    context, client = scope.context, request.route.dialect
    target = DIALECTS[context.api()]
    if client is target:
        return (relay_native if client is OLLAMA else relay_openai)(request, scope)
    call = client.parse_embed(load_request(request.body), request.route.face == "legacy")
    info = find_model_as(context, call.model, 'model "{name}" not found, try pulling it first')
    if not call.inputs:
        return json_response(client.render_embeddings(call, call.model, [], Usage(), 0))
    if call.keep_alive is None:
        call = call._replace(keep_alive=setting_for(context.config, info.id, "keep_alive"))
    wire = target.render_embed(call._replace(model=info.id), context.habits())
    data = (send(scope, request, target, wire, info.id)).read()
    vectors_apart: list = []
    try:
        floats_needed = call.base64 or _VECTOR_PER_TOKEN.search(data)
        answer = load(data if floats_needed else set_aside(data, vectors_apart))
    except (ValueError, RecursionError):
        raise BadUpstreamPayload(f"upstream sent embeddings that are not JSON: {error_text(data, 502)}") from None
    if as_dict(answer).get("error"):
        raise stream_error(answer)
    vectors, usage = target.read_embeddings(answer, len(call.inputs))
    took = time.monotonic_ns() - request.started
    body = dump(client.render_embeddings(call, call.model, vectors, usage, took))
    return Response(200, put_back(body, vectors_apart))


# A list of many numbers is the same text in both dialects: it need not become floats on its way.
_MANY_NUMBERS = re.compile(rb"\[\s*-?[0-9][-+0-9.eE,\s]{30,}[0-9]\s*\]")
_VECTOR_PER_TOKEN = re.compile(rb'"embedding"\s*:\s*\[\s*\[')      # llama-cpp-python; to be averaged
_PUT_BACK = re.compile(rb'\{"numbers":([0-9]+)\}')


def set_aside(data: bytes, kept: list) -> bytes:
    """`data` with every long list of numbers moved to `kept` and a small mark in its place."""
    def mark(found: Any) -> bytes:
        kept.append(found[0])
        return b'{"numbers":%d}' % (len(kept) - 1)
    return _MANY_NUMBERS.sub(mark, data)


def put_back(data: bytes, kept: list) -> bytes:
    """`data` with its lists of numbers in their places."""
    return _PUT_BACK.sub(lambda found: kept[int(found[1])], data) if kept else data


def hello(request: Request, scope: Scope) -> Response:
    """GET / in the words that clients look for."""
    return Response(200, b"Ollama is running", TEXT)


def health(request: Request, scope: Scope) -> Response:
    """GET /health: this process is up.  Whether the target is, `/api/tags` tells."""
    return json_response({"status": "ok"})


def version(request: Request, scope: Scope) -> Response:
    """GET /api/version from memory: some clients wait less than two seconds for it."""
    return json_response({"version": scope.context.config.ollama_version})


def cloud_status(request: Request, scope: Scope) -> Response:
    """GET /api/status: there is no Ollama cloud here."""
    return json_response({"cloud": {"disabled": True, "source": "config"}})


def account(request: Request, scope: Scope) -> Response:
    """POST /api/me: nobody."""
    return json_response({"email": "", "name": "", "plan": ""})


def recommendations(request: Request, scope: Scope) -> Response:
    """GET /api/experimental/model-recommendations: none."""
    return json_response({"recommendations": []})


def from_memory(context: Context, key: tuple, make: Callable) -> Response:
    """An answer that depends on the catalogue alone, written once for each state of it."""
    generation = context.catalogue.generation
    known = context.memory.get(key)
    if known is None or known[0] != generation:
        if len(context.memory) > 4096:
            context.memory.clear()
        known = context.memory[key] = (generation, dump(make()))
    return Response(200, known[1])


def list_models(request: Request, scope: Scope) -> Response:
    """GET /api/tags."""
    context = scope.context
    if context.api() == "ollama":
        return relay_native(request, scope)
    models = context.catalogue.models()
    return from_memory(context, ("tags",), lambda: {"models": [ollama_tag(info) for info in models]})


def list_running(request: Request, scope: Scope) -> Response:
    """GET /api/ps: what the target reports as loaded; the whole list where it reports no state."""
    context = scope.context
    if context.api() == "ollama":
        return relay_native(request, scope)
    models = context.catalogue.models()
    known = any(info.running is not None for info in models)
    now = context.clock.wall()
    return json_response({"models": [ollama_running(info, now) for info in models if info.running or not known]})


def show_model(request: Request, scope: Scope) -> Response:
    """POST /api/show from what is known; it never loads a model."""
    context = scope.context
    if context.api() == "ollama":
        return relay_native(request, scope)
    name = require_model(load_request(request.body))
    if not name:
        raise BadRequest("model is required")
    context.catalogue.models()
    info = find_model_as(context, name, "model '{name}' not found" if ":" in name else "model '{name}:latest' not found")
    base = info.alias or info.shown or info.id
    return from_memory(context, ("show", info.id, base), lambda: ollama_show(
        info, re.sub(":latest$", "", base), context.config.default_context))


def pull_model(request: Request, scope: Scope) -> Response:
    """POST /api/pull: success for a model that is there already, because that is true; else not ours to do."""
    context = scope.context
    if context.api() == "ollama":
        return relay_native(request, scope)
    body = load_request(request.body)
    name = require_model(body)
    if not name:
        raise BadRequest("invalid model name")
    try:
        info = context.catalogue.resolve(name)
    except BadRequest:
        return unsupported(request, scope)
    if not info.raw:                    # taken on trust: nobody has seen it in a list
        return unsupported(request, scope)
    if not field(body, "stream", bool, True):
        return json_response({"status": "success"})
    digest = "sha256:" + digest_of(info.id)
    steps: list = [{"status": "pulling manifest"}]
    if info.size:
        steps.append({"status": f"pulling {digest[7:19]}", "digest": digest, "total": info.size, "completed": info.size})
    steps += [{"status": "verifying sha256 digest"}, {"status": "writing manifest"}, {"status": "success"}]
    return Response(200, b"".join(map(ndjson_line, steps)), NDJSON)


_VERBS = {"create": "creating models", "copy": "copying models", "delete": "deleting models", "push": "pushing models",
          "pull": "pulling models that the target does not serve", "blobs": "storing model files",
          "signout": "signing out"}


def unsupported(request: Request, scope: Scope) -> Response:
    """What only a real Ollama can do: relayed to one where there is one, else an honest 501."""
    context = scope.context
    if context.api() == "ollama":
        return relay_native(request, scope)
    if context.fallback is not None:
        return relay(scope, request, context.fallback, context.fallback.root + request.path,
                           request.body, key=False)
    verb = request.path.split("/")[2] if request.path.count("/") > 1 else request.path
    raise BadRequest(f"{_VERBS.get(verb, request.path)} is not supported by this proxy: the models live on "
                     f"{context.target.url} (--fallback URL sends such requests to a real Ollama)", 501)


def list_openai_models(request: Request, scope: Scope) -> Response:
    """GET /v1/models: the target's own list, unless there is something to hide or to add."""
    context = scope.context
    api = context.api()
    if api == "openai" and not context.catalogue.filtered:
        return relay_openai(request, scope)
    return json_response({"object": "list", "data": [openai_entry(info, api) for info in context.catalogue.models(False)]})


def show_openai_model(request: Request, scope: Scope) -> Response:
    """GET /v1/models/{id}, which several servers lack, out of the list."""
    context = scope.context
    api, name = context.api(), urllib.parse.unquote("/".join(request.arguments))
    info = context.catalogue.resolve(name)
    return json_response({**openai_entry(info, api), "id": name if api == "ollama" else info.alias or info.id})


def openai_entry(info: ModelInfo, api: str) -> dict:
    """A list entry in OpenAI's form: the target's own where it speaks OpenAI."""
    if api == "openai" and info.raw:
        return {**info.raw, "id": info.alias or info.id}
    return openai_model(info if api == "ollama" else info._replace(shown=info.alias or info.id))


# -- relays: same dialect on both sides


def client_headers(request: Request) -> list:
    """The headers of a client that may travel on."""
    listed = {name.strip().lower() for name in request.headers.get("connection", "").split(",")}
    return [(name, value) for name, value in request.headers.items()
            if name not in HOP_BY_HOP and name not in PRIVATE_HEADERS and name not in listed and name != "user-agent"
            and name != "content-encoding" and not name.startswith(("access-control-", "sec-", "cf-"))]


_ANSWER_HEADERS_DROPPED = HOP_BY_HOP | {"content-length", "content-type", "content-encoding", "set-cookie", "date",
                                        "server", "vary", "alt-svc", "strict-transport-security"}


def answer_headers(reply: Reply) -> list:
    """The headers of an answer that may travel on."""
    listed = {name.strip().lower() for name in reply.headers.get("connection", "").split(",")}
    return [(name, value) for name, value in reply.headers.items()
            if name not in _ANSWER_HEADERS_DROPPED and name not in listed and not name.startswith("access-control-")]


def relay(scope: Scope, request: Request, target: Target, path: str, body: Any, key: bool = True,
                heal: Optional[Callable] = None) -> Response:
    """One request passed on and its answer passed back, streams byte for byte.

    Without `key` the target is a stranger to our secrets.  `heal(error)` may give another body for one
    more try after a refusal.
    """
    context = scope.context
    headers = context.headers(request) if key else [("User-Agent", f"ollama-proxy/{__version__}"),
                                                    ("Accept-Encoding", "identity")]
    whole = path + (f"{'&' if '?' in path else '?'}{request.query}" if request.query else "")
    while True:
        if context.log.debugging and isinstance(body, bytes):
            context.log.debug(f"{request.method} {target.scheme}://{target.authority}{whole} - Request: "
                              f"{body.decode('utf-8', 'replace')}")
        reply = scope.open(target, request.method, whole, headers + client_headers(request), body)
        if reply.status < 400:
            break
        error = refusal(reply)
        again = heal(error) if heal is not None and error.status in (400, 422) else None
        if again is None:
            context.log.debug(f"Target response: {error.status} {error.message}")
            text = context.log.redact(error.raw.decode("latin-1")).encode("latin-1")
            if not text:                # an empty error body looks like success to several clients
                return json_response(request_dialect(request).render_error(error), error.status, answer_headers(reply))
            return Response(error.status, text, reply.content_type or TEXT, answer_headers(reply))
        body = again
    media_type = reply.content_type or "application/octet-stream"
    length = reply.headers.get("content-length")
    counted = int(length) if length is not None and "content-encoding" not in reply.headers else None
    if request.method == "HEAD" or reply.done or (counted is not None and counted <= RELAY_WHOLE):
        data = reply.read()
        if context.log.debugging:
            took = (time.monotonic_ns() - request.started) // 1_000_000
            context.log.debug(f"Target response: {data.decode('utf-8', 'replace')} (took {took}ms)")
        return Response(reply.status, data, media_type, answer_headers(reply))
    return Response(reply.status, media_type=media_type, headers=answer_headers(reply), lines=begun([piece] for piece in tapped(reply.pieces(), context.log.tap)),
                    length=counted)


def tapped(pieces: Iterable, tap: Optional[Callable]) -> Iterator[bytes]:
    """The pieces of a relayed answer, shown to --debug."""
    for piece in pieces:
        if tap is not None:
            tap("Target chunk", piece)
        yield piece


_MODEL_FIELD = re.compile(rb'"model"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')


def with_model(data: bytes, body: dict, model: str) -> bytes:
    """A JSON request with another model name; every other byte stays where that is possible."""
    found = _MODEL_FIELD.findall(data)
    if len(found) == 1 and json.loads(found[0]) == body.get("model"):
        at = _MODEL_FIELD.search(data)
        return data[:at.start(1)] + dump(model) + data[at.end(1):]
    return dump({**body, "model": model})


def unambiguous(data: bytes, body: dict) -> bytes:
    """A request that names its model once: what another parser could read otherwise is written anew.

    Only needed where models are hidden; elsewhere the bytes stay as they are.
    """
    others = [key for key in body if key not in _NAMING and key.lower() in _NAMING]
    for key in others:
        del body[key]
    return dump(body) if others or (data.count(b'"model"') > 1 and len(_TOP_MODEL.findall(data)) > 1) else data


_TOP_MODEL = re.compile(rb'"model"\s*:')
_NAMING = ("model", "name", "source", "from")


def relay_openai(request: Request, scope: Scope) -> Response:
    """/v1/* between an OpenAI client and a target that speaks it: only the model's name and the key change."""
    context = scope.context
    native = context.api() == "ollama"
    path = context.path(native, request.path if native else request.path[len("/v1"):])
    data, body = request.body, None
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if data and media_type == "multipart/form-data":
        if context.catalogue.filtered:
            found = re.search(rb'name="?model"?\r\n(?:[^\r\n]{1,200}\r\n){0,8}\r\n([^\r\n]{1,200})\r\n', data)
            context.catalogue.resolve(found[1].decode("utf-8", "replace") if found else "")
    elif data and (request.method == "POST" or context.catalogue.filtered):
        body = load_request(data)
        if context.catalogue.filtered:
            data = unambiguous(data, body)
        name = body.get("model")
        if isinstance(name, str) and name:
            info = context.catalogue.resolve(name)
            if info.id != name:
                data = with_model(data, body, info.id)
                body["model"] = info.id
        elif context.catalogue.filtered and name is not None:
            raise BadRequest("model must be a string")

    def heal(error: UpstreamRefused) -> Optional[bytes]:
        """Leaves out what an editor added for itself, when the target names it (clients rule 43)."""
        if body is None:
            return None
        found = False
        for key in refused_keys(error, body):
            if key in CLIENT_KEYS:
                found = _drop(body, key) or found
            elif key in CLIENT_MESSAGE_KEYS:
                found = _MESSAGE_DROPS[key](body, key) or found
        return dump(body) if found else None

    return relay(scope, request, context.target, path, data, heal=heal)


def relay_native(request: Request, scope: Scope) -> Response:
    """/api/* between an Ollama client and an Ollama: as it is, but for names, think and --set."""
    context = scope.context
    path = context.path(True, request.path)
    if request.route.operation in (list_models, list_running) and context.catalogue.filtered:
        return filtered_native(context, request.path)
    injected = False
    data, body = request.body, None
    if isinstance(data, bytes) and data and not request.route.face and context.catalogue.filtered:
        named = load_request(data)
        data = unambiguous(data, named)
        for key in _NAMING:
            if isinstance(named.get(key), str) and context.catalogue.is_hidden(named[key]):
                raise model_not_found(named[key])
    if isinstance(data, bytes) and data and request.route.face:
        body = load_request(data)
        data, injected = native_body(context, request, body)

    def heal(error: UpstreamRefused) -> Optional[bytes]:
        """Takes an injected think away from a model that cannot."""
        if injected and re.search(SYMPTOMS[0].pattern, error.message) and body.pop("think", None) is not None:
            return dump(body)
        return None

    return relay(scope, request, context.target, path, data, heal=heal)


def native_body(context: Context, request: Request, body: dict) -> tuple[bytes, bool]:
    """A native request with names resolved and defaults filled in -> (body, whether think was injected);
    untouched bytes when there is nothing to do.  Changes `body`, too."""
    config = context.config
    data = unambiguous(request.body, body) if context.catalogue.filtered else request.body
    before = dict(body)
    name = require_model(body)
    try:
        info = context.catalogue.resolve(name) if name else None
    except BadRequest:
        if context.catalogue.filtered:
            raise
        info = None                     # let the Ollama say so itself
    if info is not None and info.id != name and f"{name}:latest" != info.id:
        body["model"] = info.id
    injected = False
    if request.route.face in ("chat", "generate"):
        model = info.id if info is not None else name
        for values in settings_for(config, model, name):
            options = {key: value for key, value in values.items()
                       if key not in ("think", "keep_alive", "format", "open_think")}
            if options:
                body["options"] = {**options, **as_dict(body.get("options"))}
            for key in ("think", "keep_alive", "format"):
                if key in values and body.get(key) is None:
                    body[key] = values[key]
                    injected = injected or key == "think"
        if body.get("think") is None and thinks_always(config, model):
            body["think"], injected = True, True
    return (data if body == before else dump(body)), injected


def filtered_native(context: Context, path: str) -> Response:
    """A native list without the hidden models and with the aliases; it blocks."""
    status, _, payload = context.fetch(True, path, None)
    if status >= 400 or not isinstance(as_dict(payload).get("models"), list):
        raise UpstreamError(f"{context.target.url} gave no model list (HTTP {status})")
    entries = [entry for entry in payload["models"] if isinstance(entry, dict)]
    kept = [entry for entry in entries if not context.catalogue.is_hidden(as_text(entry.get("name")))]
    for alias, model in context.config.alias:
        for entry in entries:
            if entry.get("name") in (model, f"{model}:latest"):
                shown = context.catalogue.shown_name(alias, "")
                kept.append({**entry, "name": shown, "model": shown, "digest": digest_of(alias)})
    return json_response({**payload, "models": kept})


def fetch_image(url: str, config: Config) -> Image:
    """Downloads a picture for --fetch-images.  Raises BadRequest.

    Loopback, private and link-local addresses are refused, before and after the connection is made.
    """
    if not config.fetch_images:
        raise BadRequest("image URLs are not fetched by this proxy: send the picture as base64 data, or start it "
                         "with --fetch-images")
    deadline = time.monotonic() + 15.0
    for _ in range(4):
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
            if not port or not parts.hostname:
                raise BadRequest("an image URL must begin with http:// or https://")
            for address in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM):
                refuse_private(address[4][0])
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.hostname, port, timeout=10.0)
            try:
                connection.connect()
                refuse_private(connection.sock.getpeername()[0])
                connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
                                   headers={"Accept": "image/*", "User-Agent": f"ollama-proxy/{__version__}"})
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308) and answer.getheader("Location"):
                    url = urllib.parse.urljoin(url, answer.getheader("Location"))
                    continue
                if answer.status != 200:
                    raise BadRequest(f"the image URL answered HTTP {answer.status}")
                data = bytearray()
                while len(data) <= 20 * 1024 * 1024 and time.monotonic() < deadline:
                    piece = answer.read1(65536)
                    if not piece:
                        text = base64.b64encode(bytes(data)).decode("ascii")
                        return Image(text, sniff_media_type(text))
                    data += piece
                raise BadRequest("the image URL sends too much, or too slowly")
            finally:
                connection.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise BadRequest(f"the image URL cannot be fetched: {reason_of(error)}") from None
    raise BadRequest("the image URL redirects too often")


def refuse_private(address: str) -> None:
    """Raises BadRequest unless `address` is one of the public internet."""
    if not ipaddress.ip_address(address.partition("%")[0]).is_global:
        raise BadRequest("image URLs on private addresses are not fetched")


DIALECTS = {"ollama": OLLAMA, "openai": OPENAI}

# ----------------------------------------------------------------------------
# Room 13.  Routes: the dispatch table
# ----------------------------------------------------------------------------


class Route(NamedTuple):
    """One row.  `face` tells operations that serve several endpoints which one it is; with `streams`
    the body is not read before the operation but handed on as it comes."""

    operation: Callable
    dialect: Dialect = OLLAMA
    face: str = ""
    streams: bool = False


ROUTES = {
    ("GET", "/"): Route(hello),
    ("GET", "/health"): Route(health, OPENAI),
    ("GET", "/api/version"): Route(version),
    ("GET", "/api/status"): Route(cloud_status),
    ("GET", "/api/experimental/model-recommendations"): Route(recommendations),
    ("POST", "/api/me"): Route(account),
    ("GET", "/api/tags"): Route(list_models),
    ("GET", "/api/ps"): Route(list_running),
    ("POST", "/api/show"): Route(show_model, OLLAMA, "show"),
    ("POST", "/api/chat"): Route(converse, OLLAMA, "chat"),
    ("POST", "/api/generate"): Route(converse, OLLAMA, "generate"),
    ("POST", "/api/embed"): Route(embed, OLLAMA, "embed"),
    ("POST", "/api/embeddings"): Route(embed, OLLAMA, "legacy"),
    ("POST", "/api/pull"): Route(pull_model),
    ("POST", "/api/push"): Route(unsupported),
    ("POST", "/api/create"): Route(unsupported),
    ("POST", "/api/copy"): Route(unsupported),
    ("DELETE", "/api/delete"): Route(unsupported),
    ("POST", "/api/signout"): Route(unsupported),
    ("GET", "/v1/models"): Route(list_openai_models, OPENAI),
    ("POST", "/v1/chat/completions"): Route(converse, OPENAI, "chat"),
    ("POST", "/v1/completions"): Route(converse, OPENAI, "completion"),
    ("POST", "/v1/embeddings"): Route(embed, OPENAI, "embed"),
}

# What is relayed.  TRACE would echo our own key to the client, CONNECT would make us an open proxy.
RELAYED_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# Paths that carry an argument; None is any relayed method.  The last row is everything else under /v1.
PREFIXES = (
    ("GET", "/v1/models/", Route(show_openai_model, OPENAI)),
    ("POST", "/api/blobs/", Route(unsupported, OLLAMA, "", True)),
    ("HEAD", "/api/blobs/", Route(unsupported)),
    (None, "/v1/", Route(relay_openai, OPENAI)),
)
_METHODS_BY_PATH: dict = {}
for _method, _path in ROUTES:
    _METHODS_BY_PATH.setdefault(_path, []).append(_method)
# What lives under /v1 and is called without it by some clients (Copilot Chat 0.37).
_ROOT_ALIASES = frozenset(("/chat/completions", "/completions", "/embeddings", "/models", "/responses", "/messages"))
_ODD_PREFIX = re.compile(r"^/v1(?=/api/)|^/api(?=/v1/(?!models$))|^/api/(?:chat|generate)(?=/api/)|^/v1(?=/v1/)")


# Escapes of letters, digits and -._~ mean the characters themselves (RFC 3986 section 6.2.2.2).
_ESCAPED = re.compile("%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")


def clean_path(path: str) -> str:
    """The path a client meant: slashes doubled by a base URL, prefixes doubled by a habit."""
    path = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), path)
    while "//" in path:
        path = path.replace("//", "/")
    if len(path) > 1:
        path = path.rstrip("/") or "/"
    path = _ODD_PREFIX.sub("", path) or "/"
    return "/v1" + path if path in _ROOT_ALIASES else path


def match(request: Request, context: Context) -> Route:
    """The row for a request.  Raises BadRequest 404, or 405 with Allow."""
    method = "GET" if request.method == "HEAD" else request.method
    route = ROUTES.get((method, request.path))
    if route is not None:
        return route
    if request.path in _METHODS_BY_PATH:
        allowed = list(_METHODS_BY_PATH[request.path])
        if "GET" in allowed:
            allowed.insert(0, "HEAD")
        raise BadRequest("method not allowed", 405, [("Allow", ", ".join(allowed + ["OPTIONS"]))])
    for wanted, prefix, row in PREFIXES:
        if request.path.startswith(prefix) and len(request.path) > len(prefix):
            if wanted is None and request.method not in RELAYED_METHODS:
                raise BadRequest("method not allowed", 405, [("Allow", ", ".join(RELAYED_METHODS + ("OPTIONS",)))])
            if wanted in (None, request.method) or (wanted == "GET" and request.method == "HEAD"):
                request.arguments = tuple(request.path[len(prefix):].split("/"))
                return row
    if request.path.startswith("/api/blobs/"):
        raise BadRequest("method not allowed", 405, [("Allow", "HEAD, POST, OPTIONS")])
    if request.path.startswith("/api/") and request.method in RELAYED_METHODS \
            and (context.fallback is not None or context.api() == "ollama"):
        return Route(unsupported)
    raise BadRequest(f"{one_line(request.path, 100)} not found", 404)


def request_dialect(request: Optional[Request]) -> Any:
    """Who must understand our errors: told by the path alone, so that it works for paths unknown."""
    path = request.path if request is not None else "/"
    if path.startswith("/v1/messages"):
        return AnthropicErrors
    return OPENAI if path.startswith("/v1") else OLLAMA


class AnthropicErrors:
    """The error shape of /v1/messages, which is relayed and not translated."""

    _TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
              404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}

    @classmethod
    def render_error(cls, error: ProxyError) -> dict:
        return {"type": "error", "error": {"type": cls._TYPES.get(error.status, "api_error"), "message": error.message}}

# ----------------------------------------------------------------------------
# Room 14.  HTTP server: sockets to Request, Response to sockets
#
# The server accepts and counts; every connection is one task of the loop (room 9).  Heads are
# parsed here, strictly (RFC 9112): http.server's own parser forgives what smuggles requests.
# ----------------------------------------------------------------------------

_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]{1,16384}) HTTP/1\.([01])")
_FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*")
_FIELD = re.compile(rb"([^:]+):[\t ]*([^\r]*?)[\t ]*\r\n")
_ONCE = frozenset((b"host", b"content-length", b"transfer-encoding", b"authorization", b"content-type", b"origin",
                   b"expect"))


def parse_request_head(head: bytes) -> Request:
    """The bytes up to the empty line -> Request.  Raises BadRequest, after which the connection is closed.

    Refused: anything but `METHOD target HTTP/1.x`, bare CR, LF or NUL, white space before a colon, folded
    lines, repeated framing headers, Content-Length beside Transfer-Encoding, any coding but chunked.
    """
    line, _, rest = head.partition(b"\r\n")
    match_line = _REQUEST_LINE.fullmatch(line)
    if not match_line:
        if len(line) > 16384:
            raise BadRequest("request line too long", 414, close=True)
        if re.search(rb" HTTP/[2-9]", line):
            raise BadRequest("this version of HTTP is not spoken here", 505, close=True)
        raise BadRequest("malformed request line", close=True)
    if not _FIELDS.fullmatch(rest):
        raise BadRequest("malformed header", close=True)
    pairs = _FIELD.findall(rest)
    if len(pairs) > MAX_HEADERS:
        raise BadRequest(f"more than {MAX_HEADERS} headers", 431, close=True)
    headers: dict = {}
    for name, value in pairs:
        key = name.lower()
        text = key.decode("ascii")
        if text in headers:
            if key in _ONCE:
                raise BadRequest(f"repeated {text} header", close=True)
            headers[text] += ", " + value.decode("latin-1")
        else:
            headers[text] = value.decode("latin-1")
    target = match_line[2].decode("ascii")
    if target[0] != "/" and not (target == "*" and match_line[1] == b"OPTIONS"):
        raise BadRequest("the request target must be a path: this is no forward proxy", close=True)
    request = Request(match_line[1].decode("ascii"), target, int(match_line[3]), headers)
    _frame_body(request)
    plain = request.path
    for _ in range(3):                  # escaped escapes are undone somewhere behind us
        plain = urllib.parse.unquote(plain, "latin-1")
    parts = [part.partition(";")[0] for part in re.split(r"[/\\\xc0\xaf]", plain)]
    if "\0" in plain or any(part.rstrip(" ") in ("..", ".") for part in parts):
        raise BadRequest("dot segments are not allowed in the path")
    return request


def _frame_body(request: Request) -> None:
    """Reads how the body is framed, and whether the connection may be kept, into `request`."""
    headers = request.headers
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or request.version == 0:
            raise BadRequest("Transfer-Encoding beside Content-Length or in HTTP/1.0", close=True)
        if coding.lower() != "chunked":
            raise BadRequest("transfer coding not implemented", 501, close=True)
        request.chunked = True
    elif length is not None:
        if not re.fullmatch("[0-9]{1,15}", length):
            raise BadRequest("malformed Content-Length", close=True)
        request.length = int(length)
    if request.version == 1 and "host" not in headers:
        raise BadRequest("missing Host header", close=True)
    connection = {token.strip().lower() for token in headers.get("connection", "").split(",")}
    request.keep = "keep-alive" in connection if request.version == 0 else "close" not in connection


_DEFAULT_ORIGINS = tuple(f"{scheme}://{host}{port}" for scheme in ("http", "https")
                         for host in ("localhost", "127.0.0.1", "0.0.0.0") for port in ("", ":*")) \
    + ("app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*")


def origin_allowed(origin: str, host: str, origins: tuple) -> Optional[bool]:
    """Whether a browser page of `origin` may call us; None when it is our own (ollama-api 1.5)."""
    if origin in (f"http://{host}", f"https://{host}"):
        return None
    origin = origin.lower()
    for pattern in _DEFAULT_ORIGINS + tuple(origins):
        head, star, tail = pattern.lower().rstrip("/").partition("*") if pattern != "*" else ("", "*", "")
        if not star and origin == head:
            return True
        if star and len(origin) >= len(head) + len(tail) and origin.startswith(head) and origin.endswith(tail):
            middle = origin[len(head):len(origin) - len(tail)]
            if not head.endswith(":") or "://" not in head or middle.isdigit():     # "host:*" means a port
                return True
    return False


def host_allowed(host: str, own_names: frozenset) -> bool:
    """Whether a Host header may reach a loopback listener: protects from DNS rebinding (ollama-api 1.6)."""
    name = host.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if not name or name in own_names or name.endswith((".localhost", ".local", ".internal")):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    # is_private alone would admit 169.254.0.0/16 and other special ranges.
    return address.is_loopback or address.is_unspecified or (address.is_private and not address.is_link_local)


_ALLOW_HEADERS = ("Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Api-Key,"
                  "Anthropic-Version,Anthropic-Beta")


def preflight_headers(request: Request) -> list:
    """The answer to OPTIONS: our methods, our headers and those that were asked for."""
    asked = [name.strip() for name in request.headers.get("access-control-request-headers", "").split(",")]
    known = {name.lower() for name in _ALLOW_HEADERS.split(",")}
    extra = [name for name in asked[:64] if _TOKEN.fullmatch(name) and name.lower() not in known]
    headers = [("Access-Control-Allow-Methods", "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"),
               ("Access-Control-Allow-Headers", ",".join([_ALLOW_HEADERS] + extra)),
               ("Access-Control-Max-Age", "43200"),
               ("Vary", "Access-Control-Request-Method"), ("Vary", "Access-Control-Request-Headers")]
    if request.headers.get("access-control-request-private-network") == "true":
        headers.append(("Access-Control-Allow-Private-Network", "true"))
    return headers


class Intake:
    """What a client sends: read up to an absolute `deadline`, whatever drips in meanwhile."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.deadline = 0.0
        self.buffer = b""               # has come, was not asked for yet

    def receive(self) -> bool:
        """More bytes into `buffer`; False when the client sends no more.

        Raises BadRequest 408 when the time is over, ClientGone when the connection breaks.
        """
        try:
            self._sock.settimeout(max(0.001, self.deadline - time.monotonic()))
            data = self._sock.recv(1 << 16)
        except socket.timeout:
            raise BadRequest("the client took too long to send its request", 408, close=True) from None
        except OSError:
            raise ClientGone("client closed the connection") from None
        self.buffer = self.buffer + data if self.buffer else data
        return bool(data)

    def take(self, most: int) -> bytes:
        """Some bytes, `most` at most; none when the client sends no more.  Raises as receive()."""
        if not self.buffer:
            self.receive()
        data, self.buffer = self.buffer[:most], self.buffer[most:]
        return data

    def head(self) -> Optional[bytes]:
        """One request head without its empty line; None when the client left.  Raises as receive(), and BadRequest."""
        while True:
            data = self.buffer
            begun = data.lstrip(b"\r\n") if data[:2] == b"\r\n" else data   # RFC 9112 section 2.2: empty lines before a request
            if len(data) - len(begun) > 16:
                raise BadRequest("malformed request line", close=True)
            end = begun.find(b"\r\n\r\n")
            if max(end, 0 if end >= 0 else len(begun)) > MAX_HEAD_BYTES:
                raise BadRequest("request head too large", 431, close=True)
            if end >= 0:
                self.buffer = begun[end + 4:]
                return begun[:end + 2]
            if re.search(rb"(?<!\r)\n", begun):
                raise BadRequest("bare line feed in the request head", close=True)
            if begun[:1] == b"\x16":
                raise BadRequest("this is plain HTTP, not TLS", close=True)
            if not self.receive():
                return None


class ProxyServer(http.server.ThreadingHTTPServer):
    """A thread for every connection; counts connections and calls, and ends well."""

    request_queue_size = 512            # hundreds of clients connect at once when an editor starts
    daemon_threads = True
    allow_reuse_address = os.name == "posix"    # on Windows it would let two servers share the port

    def __init__(self, context: Context, address: tuple[str, int], listener: Optional[socket.socket] = None) -> None:
        self.context = context
        self.draining = False
        self.connections = self.calls = 0       # `calls` are requests being answered
        self.idle: set = set()                  # kept connections without a request
        self.changed = threading.Condition()    # guards these three
        host, port = address
        if ":" in host or (host == "" and socket.has_dualstack_ipv6()):
            self.address_family = socket.AF_INET6
        super().__init__((host, port), ProxyHandler, bind_and_activate=listener is None)
        if listener is not None:
            self.socket.close()
            self.socket, self.server_address = listener, listener.getsockname()
        self.socket.setblocking(False)          # several workers may race for one connection
        self.server_name, self.server_port = self.server_address[:2]
        self.loopback = is_loopback(self.server_name)
        self.own_names = frozenset(("localhost", socket.gethostname().lower()))
        self.tls = server_tls(context.config)

    def server_bind(self) -> None:
        """Without the name look-up of HTTPServer.server_bind, which may wait for a DNS server."""
        if self.address_family == socket.AF_INET6 and self.server_address[0] == "":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if os.name == "nt" and hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        http.server.socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple:
        """accept(); out of descriptors the listener stays ready: do not spin."""
        try:
            return super().get_request()
        except BlockingIOError:
            raise
        except OSError:
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """A connection begins: in a thread of its own, or not at all."""
        with self.changed:
            self.connections += 1
            too_many = self.connections > self.context.config.max_connections
        if too_many:
            body = dump({"error": "server busy, please try again.  maximum pending requests exceeded"})
            request.setblocking(False)
            try:
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
                             b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            except OSError:
                pass
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """A connection ends."""
        with self.changed:
            self.connections -= 1
        shut(request)
        close_quietly(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news; a bug of ours is."""
        error = sys.exc_info()[1]
        if not isinstance(error, (OSError, ClientGone)):
            complain(error)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """One request being answered."""
        with self.changed:
            self.calls += 1
        try:
            yield
        finally:
            with self.changed:
                self.calls -= 1
                self.changed.notify_all()

    @contextlib.contextmanager
    def waiting(self, sock: Any) -> Iterator[bool]:
        """A connection between two requests; not while the server drains."""
        with self.changed:
            self.idle.add(sock)
            open_ = not self.draining
        try:
            yield open_
        finally:
            with self.changed:
                self.idle.discard(sock)

    def drain(self, seconds: float) -> None:
        """Stops accepting, ends idle connections, waits for calls in flight at most `seconds`."""
        self.shutdown()
        self.server_close()
        with self.changed:
            self.draining = True
            for sock in self.idle:
                shut(sock)
            self.changed.wait_for(lambda: not self.calls, seconds)


def server_tls(config: Config) -> Any:
    """TLS towards clients, or None.  Raises UsageError."""
    if not config.tls_cert:
        return None
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key or None)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tls-cert {config.tls_cert}: {reason_of(error)}") from None
    return context


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """One client connection.  handle_one_request is one request, read aloud."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """TLS where it is wanted.  Plain sockets instead of files: reads have deadlines, an answer is one write."""
        self.connection, self.context = self.request, self.server.context
        self.patience = self.context.config.client_timeout
        self.connection.settimeout(self.patience)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if self.server.tls is not None:
            self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.intake = Intake(self.connection)

    def finish(self) -> None:
        """Closes the TLS socket, which has taken the plain one over."""
        if self.connection is not self.request:
            shut(self.connection)
            close_quietly(self.connection)

    def handle_one_request(self) -> None:
        """One request from its first byte to its access line."""
        self.close_connection, self._cors, self._sent, self._unread = True, [], 0, True
        request: Optional[Request] = None
        with self.server.waiting(self.connection) as may_come:
            self.intake.deadline = time.monotonic() + self.patience
            try:
                if not may_come or not (self.intake.buffer or self.intake.receive()):
                    return
            except ProxyError:          # gone, or silent for too long: nobody asked anything
                return
        self.intake.deadline = time.monotonic() + self.patience
        with self.server.counted():
            try:
                if not self.parse_request():
                    return
                request = self.ask
                with contextlib.closing(Scope(self.context, self.connection)) as scope:
                    self._answer(request, scope)
            except ClientGone as gone:
                self._log(request, gone.status)
            except BadRequest as error:     # a head that cannot be trusted
                request = Request("BAD", "/", 1, {})
                self._unread, request.keep = True, False
                self._send(request, self._error_response(None, error))
            except OSError:
                self._log(request, ClientGone.status)
            if self.close_connection and self._unread:
                self._linger()

    def _answer(self, request: Request, scope: Scope) -> None:
        try:
            response = self._respond(request, scope)
        except ClientGone:
            raise
        except ProxyError as error:
            error = error if request.path.startswith("/v1") else blame_our_key(self.context, error, request)
            response = self._error_response(request, error)
        except Exception as error:      # noqa: BLE001  a bug of ours: told, logged, survived
            complain(error)
            response = self._error_response(request, ProxyError("internal error"))
        try:
            self._send(request, response)
        except (ClientGone, OSError):
            raise
        except Exception as error:      # noqa: BLE001  a bug in mid-stream: the client must not take it for the end
            complain(error)
            self._log(request, response.status)

    def _respond(self, request: Request, scope: Scope) -> Response:
        """framing was checked -> Host and Origin -> preflight -> key -> route -> body -> operation."""
        self._check_origin(request)
        if request.method == "OPTIONS":
            return Response(204, headers=preflight_headers(request))
        self._authorize(request)
        request.route = match(request, self.context)
        if request.route.streams and (self.context.fallback is not None or self.context.api() == "ollama"):
            request.body = self._body_pieces(request, None)
        elif self._unread:
            request.body = self._whole_body(request)
        log = self.context.log
        if log.debugging:
            log.debug(f"{request.method} {request.path}" + (f" - Body: {request.text}" if request.body else ""))
        return request.route.operation(request, scope)

    # -- who may talk

    def _check_origin(self, request: Request) -> None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if origin is not None:
            allowed = origin_allowed(origin, host, self.context.config.origins)
            if allowed is False:
                raise BadRequest(f"origin {one_line(origin, 100)} is not allowed (see --origins)", 403)
            if allowed and "*" in self.context.config.origins:
                self._cors = [("Access-Control-Allow-Origin", "*")]
            elif allowed:
                self._cors = [("Access-Control-Allow-Origin", origin), ("Vary", "Origin")]
                if request.method != "OPTIONS":
                    self._cors.append(("Access-Control-Expose-Headers", "*"))
        if self.server.loopback and not host_allowed(host, self.server.own_names):
            raise BadRequest(f"host {one_line(host, 100)} is not allowed", 403)

    def _authorize(self, request: Request) -> None:
        key = self.context.config.client_key
        if not key or (request.path in ("/", "/health") and request.method in ("GET", "HEAD")):
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        offered = [given.strip() if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", "")]
        wanted = key.encode("utf-8")
        if not any([hmac.compare_digest(text.encode("latin-1", "replace"), wanted) for text in offered]):
            raise Unauthorized("missing or wrong key: send it as Authorization: Bearer KEY or x-api-key",
                               headers=[("WWW-Authenticate", "Bearer")])

    # -- reading

    def parse_request(self) -> bool:
        """Reads a head, strictly; self.ask is the Request.  False when the client left.  Raises BadRequest."""
        head = self.intake.head()
        if head is None:
            return False
        self.ask = parse_request_head(head)
        self._unread = bool(self.ask.length or self.ask.chunked)
        return True

    def _body_pieces(self, request: Request, limit: Optional[int]) -> Iterator[bytes]:
        """The body as it comes, framing off.  Raises BadRequest 400, 408 or 413, or ClientGone."""
        left, decoder = request.length or 0, ChunkedDecoder(limit or 1 << 62) if request.chunked else None
        if limit is not None and left > limit:
            raise too_large(limit)
        if request.version == 1 and request.headers.get("expect", "").lower() == "100-continue" and not self.intake.buffer:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        started, received = time.monotonic(), 0
        while left or decoder is not None and not decoder.done:
            self.intake.deadline = started + self.patience + received / BODY_BYTES_PER_SECOND
            data = self.intake.take(left if decoder is None else 1 << 16)
            if not data:
                raise ClientGone("client left while sending its request")
            received += len(data)
            if decoder is None:
                left -= len(data)
            else:
                try:
                    data = decoder.feed(data)
                except BodyTooLarge:
                    raise too_large(limit or 0) from None
                except ValueError as error:
                    raise BadRequest(f"malformed chunked body: {error}", close=True) from None
            if data:
                yield data
        if decoder is not None:
            self.intake.buffer = decoder.rest + self.intake.buffer
        self._unread = False

    def _whole_body(self, request: Request) -> bytes:
        limit = self.context.config.max_body
        body = b"".join(self._body_pieces(request, limit))
        return unpack_body(body, request.headers.get("content-encoding", "").strip().lower(), limit)

    # -- writing

    def _error_response(self, request: Optional[Request], error: ProxyError) -> Response:
        """An error in the dialect of the path.  On /api its text is the reason phrase, too, the only
        place some clients look (clients rule 4)."""
        error.message = self.context.log.redact(error.message)
        dialect = request_dialect(request)
        try:
            response = json_response(dialect.render_error(error), error.status, error.headers)
        except ProxyError:
            response = json_response({"error": "internal error"}, 500)
        if error.status == 403 and isinstance(error, BadRequest) and not isinstance(error, Unauthorized):
            response.body, response.media_type = b"", ""        # as Ollama answers (ollama-api 1.5)
        if request is not None and error.close:
            request.keep = False
        if dialect is OLLAMA:
            response.reason = one_line(error.message.encode("ascii", "replace").decode("ascii"), 200)
        return response

    def _head(self, request: Request, response: Response, keep: bool) -> bytes:
        """Status line and headers; the body is counted, or chunked, or ends with the connection."""
        reason = response.reason or http.client.responses.get(response.status, "Unknown")
        lines = [f"HTTP/1.1 {response.status} {reason}"]
        lines += [f"{name}: {value}" for name, value in self._cors + list(response.headers)]
        if response.media_type:
            lines.append(f"Content-Type: {response.media_type}")
        if (response.lines is None or response.length is not None) and response.status != 204:
            lines.append(f"Content-Length: {len(response.body) if response.lines is None else response.length}")
        elif response.lines is not None and request.version == 1:
            lines.append("Transfer-Encoding: chunked")
        if not keep or request.version == 0:
            lines.append("Connection: keep-alive" if keep else "Connection: close")
        lines.append(f"Date: {http_date(int(time.time()))}\r\n\r\n")
        return "\r\n".join(lines).encode("latin-1", "replace")

    def _send(self, request: Request, response: Response) -> None:
        """Writes the answer: head and first bytes in one send, then whatever has come, at once."""
        keep = request.keep and not self._unread and not self.server.draining
        if response.lines is None:
            body = b"" if request.method == "HEAD" or response.status == 204 else response.body
            self._sent = len(body)
            self._write(self._head(request, response, keep) + body)
            self.close_connection = not keep
            self._log(request, response.status)
            return
        chunked = response.length is None and request.version == 1
        keep = keep and (chunked or response.length is not None)
        out, failure = self._head(request, response, keep), None
        try:
            for lines in response.lines:
                self._sent += sum(map(len, lines))
                self._write(out + b"".join(map(http_chunk, lines) if chunked else lines))
                out = b""
        except Told as error:           # the client knows
            failure = error
        except UpstreamError as error:  # it must not take the end for the end
            failure, keep, chunked = error, False, False
        self._write(out + (LAST_CHUNK if chunked else b""))
        self.close_connection = not keep
        self._log(request, response.status, failure)

    def _write(self, data: bytes) -> None:
        """All of it, as fast as the client takes it.  sendall() would count its time-out for the whole."""
        view = memoryview(data)
        self.connection.settimeout(self.patience)
        try:
            while view:
                view = view[self.connection.send(view):]
        except OSError:
            raise ClientGone("client closed the connection, or does not read") from None

    def _log(self, request: Optional[Request], status: int, failure: Optional[Exception] = None) -> None:
        if request is None:
            return
        log = self.context.log
        if failure is not None:
            log.say(f"stream of {request.method} {request.path} broke: {failure}")
        log.access(self.client_address[0], f"{request.method} {request.target} HTTP/1.{request.version}", status, self._sent,
                   (time.monotonic_ns() - request.started) / 1e6)

    def _linger(self) -> None:
        """Reads and drops what the client still sends: closing at once would reset the connection, and
        the client would never see why."""
        self.intake.deadline = time.monotonic() + LINGER
        try:
            socket.socket.shutdown(self.connection, socket.SHUT_WR)
            while self.intake.take(1 << 16):
                pass
        except (OSError, ProxyError):
            pass


@functools.lru_cache(maxsize=4)
def http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


def too_large(limit: int) -> BadRequest:
    return BadRequest(f"request body too large: more than {limit} bytes (--max-body)", 413, close=True)


def unpack_body(body: bytes, coding: str, limit: int) -> bytes:
    """A request body without its Content-Encoding.  Raises BadRequest 400, 413 or 415."""
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise BadRequest(f"request bodies compressed as {one_line(coding, 40)} are not understood", 415)
    inflate = zlib.decompressobj(47)
    limit = min(limit, max(1 << 20, 50 * len(body)))        # text shrinks tenfold, bombs a thousandfold
    try:
        body = inflate.decompress(body, limit + 1)
    except zlib.error:
        raise BadRequest("the compressed request body is broken") from None
    if len(body) > limit:
        raise BadRequest(f"request body too large: more than {limit} bytes (--max-body)", 413)
    if not inflate.eof:
        raise BadRequest("the compressed request body is broken")
    return body

# ----------------------------------------------------------------------------
# Room 15.  Demo target: a tiny OpenAI-compatible server for --demo and the tests
# ----------------------------------------------------------------------------


class DemoHandler(http.server.BaseHTTPRequestHandler):
    """Two models.  demo-chat echoes the last message word by word, calls the first tool it is offered
    when the message says "call", and thinks when the message says "think"; demo-embed counts letters."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    pace = 0.0                          # seconds between words

    def log_message(self, format: str, *args: Any) -> None:     # noqa: A002  the parent's name for it
        """Silent: the proxy logs."""

    def do_GET(self) -> None:
        """GET /v1/models; everything else is not there."""
        if self.path == "/v1/models":
            self._answer({"object": "list", "data": [
                {"id": name, "object": "model", "created": 1700000000, "owned_by": "demo", "context_length": 8192,
                 "type": kind} for name, kind in (("demo-chat", "llm"), ("demo-embed", "embeddings"))]})
        else:
            self._answer({"error": {"message": f"no {self.path} here", "type": "not_found_error"}}, 404)

    def do_POST(self) -> None:
        """Chat, completions, embeddings."""
        body = load(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if body.get("model") not in ("demo-chat", "demo-embed"):
            self._answer({"error": {"message": f"model {body.get('model')!r} does not exist", "code": "model_not_found"}}, 404)
        elif self.path == "/v1/embeddings":
            call = parse_openai_embed(body)
            self._answer(render_openai_embeddings(call, call.model, [self._vector(text) for text in call.inputs],
                                                  Usage(sum(len(text.split()) for text in call.inputs)), 0))
        elif self.path in ("/v1/chat/completions", "/v1/completions"):
            call = parse_openai_chat(body, "chat" if "chat" in self.path else "completion")
            events, encoder = self._events(call), OpenAIEncoder(call, Clock, 0, 0, ("reasoning_content",))
            if call.stream:
                self._stream(events, encoder)
            else:
                self._answer(load(encoder.fold(events)))
        else:
            self._answer({"error": {"message": f"no {self.path} here"}}, 404)

    @staticmethod
    def _vector(text: str) -> list:
        counts = [text.lower().count(letter) for letter in "etaoinsh"]
        length = sum(count * count for count in counts) ** 0.5 or 1.0
        return [round(count / length, 6) for count in counts]

    @staticmethod
    def _events(call: ChatCall) -> list:
        last = call.messages[-1] if call.messages else Message("user", call.prompt or "")
        said = last.content + " [picture]" * len(last.images)
        words = re.findall(r"\s*\S+", f"You said: {said}")[:call.options.get("max_tokens") or 10000]
        events: list = [TextDelta(word) for word in words]
        if call.format is not None:
            events = [TextDelta(piece) for piece in ('{"echo"', ": ", dump(said).decode(), "}")]
        if call.tools and "call" in said.lower():
            events = [ToolCalls((ToolCall("call_demo1", call.tools[0].name, {"text": said}),))]
        if "think" in said.lower():
            events.insert(0, ThinkingDelta("The user wants an echo."))
        prompt = sum(len(message.content.split()) for message in call.messages) or len(said.split())
        return events + [Finish("stop", Usage(prompt, len(events)))]

    def _stream(self, events: list, encoder: OpenAIEncoder) -> None:
        self.send_response(200)
        self.send_header("Content-Type", EVENT_STREAM)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            self.wfile.write(http_chunk(encoder.encode(event)))
            time.sleep(self.pace)
        self.wfile.write(http_chunk(encoder.tail) + LAST_CHUNK)

    def _answer(self, value: dict, status: int = 200) -> None:
        data = dump(value)
        self.send_response(status)
        self.send_header("Content-Type", JSON)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class DemoServer(http.server.ThreadingHTTPServer):
    """The demo target on a loopback port of its own, in a thread."""

    daemon_threads = True

    def __init__(self, pace: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), type("PacedDemoHandler", (DemoHandler,), {"pace": pace}))
        threading.Thread(target=self.serve_forever, args=(0.1,), name="demo", daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def server_bind(self) -> None:
        http.server.socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""

# ----------------------------------------------------------------------------
# Room 16.  Command line: main, --check, signals, banner
# ----------------------------------------------------------------------------


def client_url(server: ProxyServer) -> str:
    """What a client on this machine puts into its settings."""
    host = server.server_name
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    return f"{'https' if server.context.config.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:" \
           f"{server.server_port}"


def banner(server: ProxyServer) -> None:
    """Who listens where, what the target is and serves, and the line to paste into a client."""
    context = server.context
    config, url = context.config, client_url(server)
    if not server.loopback and not config.client_key:
        context.log.say(f"warning: everybody who reaches {server.server_name or '0.0.0.0'}:{server.server_port} can use "
                        "the target and its key; set --client-key or listen on 127.0.0.1")
    if config.insecure:
        context.log.say("warning: --insecure: the target's certificate is not checked")
    if config.no_log:
        return
    names: Any = None
    try:
        names = [info.shown for info in context.catalogue.models(False)]
        speaks = {"ollama": "an Ollama", "openai": "OpenAI API"}[context.api()]
        found = f"{len(names)} model{'' if len(names) == 1 else 's'}" + (": " + ", ".join(names[:4]) if names else "")
        found += ", ..." if len(names) > 4 else ""
    except UpstreamError as error:
        speaks, found = "not answering yet", error.message
    lines = [f"ollama_proxy {__version__}", f"  listening on  {url}",
             f"  target        {'demo target inside this process' if config.demo else context.target.url} "
             f"({speaks}), {found}",
             f"  for clients   OLLAMA_HOST={url}   or, for OpenAI clients, base URL {url}/v1"]
    if config.demo:
        lines.append(f"  try it        curl {url}/api/chat -d "
                     "'{\"model\": \"demo-chat\", \"messages\": [{\"role\": \"user\", \"content\": \"hello\"}]}'")
    try:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        pass


def check(config: Config) -> int:
    """--check: asks the target everything we need, one plain line per finding; 0 when chats will work."""
    context = Context(config)
    target = config.destination
    print(f"target     {target.url}" + (" with a key" if target.key else " without a key"))
    try:
        names = [info.id for info in context.catalogue.models()]
        print(f"speaks     {'Ollama' if context.api() == 'ollama' else 'OpenAI'} API")
        print(f"models     {len(names)}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}")
    except ProxyError as error:
        print(f"FAILED     {error.message}")
        return 1
    chats = [info for info in context.catalogue.models() if "completion" in info.capabilities]
    if not chats:
        print("FAILED     no model for chats")
        return 1
    print(f"first      {chats[0].id}: context {chats[0].context or 'not told'}, "
          f"{', '.join(chats[0].capabilities)}")
    call = ChatCall(chats[0].id, messages=(Message("user", "Say OK."),), options={"max_tokens": 16})
    dialect, failed = DIALECTS[context.api()], 0
    for stream in (False, True):
        label = "stream" if stream else "chat"
        try:
            wire = dialect.render_chat(call._replace(stream=stream), context.habits())
            body = dict(wire.body)
            context.healer.apply((target.url, wire.path, call.model), target.preset, body)
            with contextlib.closing(Scope(context)) as scope:
                reply = scope.open(target, "POST", context.path(dialect is OLLAMA, wire.path),
                                   context.headers() + [("Content-Type", JSON)], dump(body))
                if reply.status >= 300:
                    raise refusal(reply)
                decoder = dialect.Decoder(call)
                events = decoder.feed(reply.read()) + decoder.close()
            if isinstance(events[-1], Failure):
                raise events[-1].error
            print(f"{label:<10} works ({sum(isinstance(event, TextDelta) for event in events)} pieces of text)")
        except ProxyError as error:
            failed = 1
            print(f"{label:<10} FAILED: {error.message}")
    return failed


class Stop:
    """What SIGINT, SIGTERM and SIGHUP ask for: to end well, and the second time to end now."""

    def __init__(self) -> None:
        self.asked, self.insisted = threading.Event(), threading.Event()
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name) and not (name == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN):
                signal.signal(getattr(signal, name), self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()


def serve(server: ProxyServer, quiet: bool = False, workers: Iterable = ()) -> int:
    """Runs until SIGINT or SIGTERM; then lets streams end for --grace seconds.  A second signal cuts them.
    Both are passed on to `workers`, process ids."""
    stop = Stop()
    threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
    if not quiet:
        threading.Thread(target=banner, args=(server,), name="banner", daemon=True).start()
    while not stop.asked.wait(0.5):         # without a time-out Windows does not notice Ctrl-C
        pass
    pass_on(workers)
    drain = threading.Thread(target=server.drain, args=(server.context.config.grace,), name="drain", daemon=True)
    drain.start()
    while drain.is_alive() and not stop.insisted.wait(0.1):
        pass
    if stop.insisted.is_set():
        pass_on(workers)
    return 0


def pass_on(workers: Iterable) -> None:
    """SIGTERM for other processes."""
    for pid in workers:
        try:
            os.kill(pid, signal.SIGTERM)
        except OSError:
            pass


def serve_workers(config: Config, server: ProxyServer, count: int) -> int:
    """--workers: the listening socket is open already; every process accepts on it, none outlives the first."""
    children = []
    reader, writer = os.pipe()
    for _ in range(count - 1):
        pid = os.fork()
        if pid == 0:
            os.close(writer)

            def follow() -> None:
                os.read(reader, 1)      # returns when the first process is gone, however it went
                os.kill(os.getpid(), signal.SIGTERM)

            threading.Thread(target=follow, daemon=True).start()
            os._exit(serve(ProxyServer(Context(config), config.address, server.socket), quiet=True))
        children.append(pid)
    status = serve(server, workers=children)
    for pid in children:
        try:
            os.waitpid(pid, 0)
        except OSError:
            pass
    os.close(writer)
    return status


def main(argv: Optional[list] = None) -> int:
    """The command.  Returns the exit status: 0, 1 when it cannot run, 2 when it was called wrongly.
    """
    threading.stack_size(1024 * 1024)   # address space only: JSON of 200 levels needs a tenth of it
    try:
        config = Config.from_args(argv)
        if config.demo:
            demo = DemoServer(pace=0.03)
            config = config._replace(destination=parse_target(demo.url), target_api="openai")
        if config.check:
            return check(config)
        server = ProxyServer(Context(config), config.address)
    except UsageError as error:
        print(f"ollama_proxy: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        host, port = config.address
        hint = " (is an Ollama or another proxy running there?): choose another with --listen" \
            if error.errno in (48, 98, 10013, 10048) else ""
        print(f"ollama_proxy: cannot listen on {host or '*'}:{port}: {reason_of(error)}{hint}", file=sys.stderr)
        return 1
    if config.workers > 1:
        if not hasattr(os, "fork"):
            print("ollama_proxy: --workers needs a POSIX system; running one process", file=sys.stderr)
        else:
            return serve_workers(config, server, config.workers)
    return serve(server)


if __name__ == "__main__":
    sys.exit(main())
