#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Point any Ollama client at any OpenAI-compatible server, and the reverse.

One file, nothing but the standard library, Python 3.9 and newer.

    python3 ollama_proxy.py --target http://localhost:1234

    client bytes --> Request --> parse_* --> Call --> render_* --> Scope.open --> upstream bytes
    (server, 16)     (route 15)  +- client dialect    +- upstream dialect  (11)
    client bytes <-- send <-- Encoder <-- events <-- Decoder <-- Reply.pieces <-----+
    (server, 16)             client dialect   upstream dialect    a client that leaves (11) ends the call

A *dialect* is a wire API family.  Both are parsed into one neutral vocabulary and
rendered from it, so each dialect is written once, whichever side it stands on:

    who calls us             whom we call              what happens
    Ollama client            OpenAI-compatible server  translated, both ways, streaming
    OpenAI client            OpenAI-compatible server  relayed; only the model name and the key change
    OpenAI client            Ollama                    translated, thinking and options injected
    Ollama client            Ollama                    relayed; thinking and options injected
    Anthropic, Responses     either                    relayed where the target speaks it, else translated

Rooms, in reading order; each uses only names from rooms above it:

     1  Constants       limits with their reasons, media types
     2  Vocabulary      calls and events that belong to no dialect
     3  Errors          one tree; every error carries a status and a sentence
     4  Framing         bytes to lines, SSE frames and HTTP bodies; JSON with limits
     5  Ollama dialect  /api/*: parse, render, decode, encode
     6  OpenAI dialect  /v1/*: the mirror room
     7  Anthropic dialect  /v1/messages, a face only: parse, encode
     8  Responses dialect  /v1/responses, a face only
     9  Translation     a decoder and an encoder joined into a generator of lines
    10  Configuration   presets, flags and environment become one frozen value
    11  Upstream        dial, send, read, pool; and the watch for clients that leave
    12  Catalogue       what the target serves, under which names, with what metadata
    13  Healing         what a target refused, and what to send instead
    14  Operations      one short function per verb
    15  Routes          the dispatch table
    16  HTTP server     sockets to Request, Response to sockets
    17  Demo target     a tiny OpenAI-compatible server for --demo and the tests
    18  Command line    main, --check, signals, banner

Endpoints (the dispatch table of room 15, tied to this list by a test):

    GET    /  /health  /api/version  /api/tags  /api/ps  /api/status
    GET    /api/experimental/model-recommendations  /v1/models  /v1/models/{id}
    POST   /api/chat  /api/generate  /api/embed  /api/embeddings  /api/show  /api/pull  /api/me
    POST   /v1/chat/completions  /v1/completions  /v1/embeddings
    POST   /v1/messages  /v1/messages/count_tokens  /v1/responses
    POST   /api/create  /api/copy  /api/push  /api/signout  /api/blobs/{digest}
    HEAD   /api/blobs/{digest}
    DELETE /api/delete
    any    /v1/...
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import fnmatch
import functools
import hashlib
import hmac
import http.client
import http.server
import importlib
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

__version__ = "2.0.0"

# ----------------------------------------------------------------------------
# Room 1.  Constants: limits with their reasons, media types, ports
# ----------------------------------------------------------------------------

OLLAMA_VERSION = "0.33.0"        # the release whose contract rooms 5 and 14 follow
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
HOP_BY_HOP = frozenset(("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
                        "te", "trailer", "transfer-encoding", "upgrade"))
# Headers of a client that the target has no business to see, or that we set ourselves.
PRIVATE_HEADERS = frozenset(("host", "authorization", "x-api-key", "api-key", "cookie", "content-length", "expect",
                             "origin", "referer", "accept-encoding", "forwarded", "x-forwarded-for", "x-forwarded-host",
                             "x-forwarded-proto", "x-real-ip", "user-agent", "x-ollama-proxy"))
ACCOUNT_HEADERS = frozenset(("openai-organization", "openai-project"))

# Node allows 16 KiB of headers, nginx 4 x 8 KiB, Apache 100 fields; clients behind corporate
# single sign-on send large cookies, hence 64 KiB.
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
# Ollama sets none; ten photographs in base64 are about 100 MB.
MAX_BODY_BYTES = 128 * 1024 * 1024
# A whole answer of the target: embeddings of a large batch reach tens of megabytes.
MAX_ANSWER_BYTES = 256 * 1024 * 1024
MAX_INFLATED = 8 * 1024 * 1024   # out of one piece of READ_SIZE: text shrinks tenfold, bombs a thousandfold
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
DRAIN = 0.5                      # seconds for the end of an answer that nobody needs more of, to keep its connection
LINGER = 2.0                     # seconds for a client to read a refusal while it still sends
RELAY_WHOLE = 1024 * 1024        # a relayed answer up to this size is read whole: if it breaks, that still is a 502
READ_SIZE = 64 * 1024
POOL_SIZE = 512                  # idle connections kept to one target; those beyond are closed after use
POOL_IDLE = 50.0                 # seconds; common servers close after 60 or more
CATALOGUE_FRESH = 15.0           # seconds a model list is believed without asking again
FAILURE_MEMORY = 3.0             # seconds after a failed list: the old one has to do, a target that hangs is left alone
LIST_TIMEOUT = 10.0              # seconds for a model list: chats wait for the first one
PROBE_TIMEOUT = 3.0              # seconds for what is nice to know; Home Assistant gives up on tags after 5
SIGN_OF_LIFE = 30.0              # seconds of silence until an agent is sent something to read: it gives up after 300
ROUTE_MEMORY = 600.0             # seconds a target that lacks a route is not asked for it again
CALL_EXTRAS = 2048               # tool calls whose provider extras are remembered
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
    attached and wants to see again when the call comes back in the history; `raw` is what the model
    wrote where that is no JSON object: agents tell it so, and it tries again."""

    id: str
    name: str
    arguments: dict
    extra: Optional[dict] = None
    raw: str = ""

    @property
    def text(self) -> str:
        """The arguments as text."""
        return self.raw or dump(self.arguments).decode()


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
    parallel: Optional[bool] = None     # whether more than one call may come at once
    labels: dict = {}                   # name of a tool -> how a Responses client calls it
    options: dict = {}
    extra: dict = {}
    think: Any = None
    format: Any = None
    stream: bool = False
    logprobs: Optional[int] = None
    keep_alive: Any = None
    want_usage: bool = False
    conversation: Optional[tuple] = None

    @property
    def offered(self) -> tuple:
        """The tools that the model may use: all of them, or the one that the client named."""
        named = self.tool_choice if isinstance(self.tool_choice, tuple) else None
        return tuple(tool for tool in self.tools if named is None or tool.name in named)

    def prompt_tokens(self) -> int:
        """An estimate for the count that the upstream did not tell: a quarter of the bytes the model reads."""
        texts = [self.prompt or "", self.suffix]
        texts += [text for message in self.messages for text in (message.content, message.thinking)]
        texts += [call.name + str(call.arguments) for message in self.messages for call in message.tool_calls]
        texts += [tool.name + tool.description + str(tool.parameters) for tool in self.tools]
        return max(1, sum(len(text.encode("utf-8", "replace")) for text in texts) // 4)


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
    """The end: `reason` is "stop" or "length" (or a word of the upstream passed through), `stop` the stop string where
    it was met here."""

    reason: str
    usage: Usage
    stop: str = ""


class Failure(NamedTuple):
    """The end that was not one."""

    error: Exception


class WireRequest(NamedTuple):
    """What a dialect's render_* hands to room 14: a path below the target's base, and a JSON body."""

    path: str
    body: dict


class Habits(NamedTuple):
    """How one target differs from the common reading of its dialect (presets, room 10)."""

    strict: bool = False            # refuses keys it does not know: send nothing beyond the standard
    think: str = "effort"           # which switch turns reasoning on and off: a key of THINK_SWITCHES
    echo: tuple = ()                # what it wants back with tool calls: "extra_content", ...
    tool_ids: str = ""              # "nine": ids of nine letters or digits; "plain": of letters, digits, - and _
    tool_names: bool = False        # names of tools hold letters, digits, - and _ alone
    plain_schemas: bool = False     # schemas of tools hold only what Ollama knows of JSON Schema
    bridge: bool = False            # an assistant turn must stand between tool results and a user turn
    merge: bool = False             # neighbouring turns of one role are not taken
    system: str = ""                # "first": one system turn, at the beginning; "user": none at all
    known_roles: bool = False       # only system, user, assistant and tool are taken
    filler: str = ""                # what stands for empty content
    prefix: bool = False            # an assistant turn to be continued says so
    stream: str = ""                # "never" or "always"
    batch: int = 0                  # most texts in one request for embeddings
    infill: bool = False            # has /infill, and no suffix in /completions
    fill_reasoning: bool = False    # every assistant turn must carry reasoning_content
    dimensions: str = "dimensions"  # its name for the length of an embedding
    ttl: bool = False               # knows `ttl` seconds, the counterpart of keep_alive
    limit_chat: bool = False        # cuts chat answers short unless a limit is sent


class Dialect(NamedTuple):
    """One wire API family as plain functions; rooms 5 to 8 each close with one, the last two as faces alone."""

    name: str
    parse_chat: Callable            # body of a client, face -> ChatCall
    Encoder: Callable               # ChatCall, clock, ... -> events to bytes, or to one answer
    render_error: Callable          # ProxyError -> answer
    parse_embed: Any = None         # body of a client, legacy -> EmbedCall
    render_chat: Any = None         # ChatCall, Habits, context length -> WireRequest
    render_embed: Any = None        # EmbedCall, Habits -> WireRequest
    read_embeddings: Any = None     # answer, count -> (vectors, Usage)
    render_embeddings: Any = None   # EmbedCall, vectors, Usage, duration -> answer
    Decoder: Any = None             # ChatCall -> bytes, or a whole answer, to events


# ----------------------------------------------------------------------------
# Room 3.  Errors: every one carries a status and a sentence
#
#   ProxyError
#   +-- BadRequest          400, 404, 405, 413, ...   the client's fault
#   +-- UpstreamError       502                       the target's
#   |   +-- UpstreamRefused       its own 4xx or 5xx, passed on
#   |   +-- UpstreamUnreachable   502
#   |   +-- UpstreamTimeout       504
#   |   +-- StreamTruncated       502
#   |   +-- BadUpstreamPayload    502
#   +-- ClientGone          499   nobody is left to be told
# ----------------------------------------------------------------------------


class ProxyError(Exception):
    """Base: `status` for the client, `message` in one plain sentence, extra response `headers`, OpenAI's `code`.

    With `close` the connection is out of step and must end.
    """

    status = 500

    def __init__(self, message: str, status: Optional[int] = None, headers: Iterable = (), code: Any = None,
                 close: bool = False) -> None:
        super().__init__(message)
        self.message, self.status, self.headers = message, status or self.status, tuple(headers)
        self.code, self.close = code, close


class BadRequest(ProxyError):
    """The client sent something that cannot be served."""

    status = 400


class UpstreamError(ProxyError):
    """The target's fault, whatever it was."""

    status = 502


class UpstreamRefused(UpstreamError):
    """The target answered with a 4xx or 5xx: the JSON `body` it sent (None when it was none), and the bytes of it."""

    def __init__(self, message: str, status: int, headers: Iterable = (), body: Any = None, raw: bytes = b"",
                 content_type: str = JSON) -> None:
        super().__init__(message, status, headers)
        self.body, self.raw, self.content_type = body, raw, content_type


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


def model_not_found(name: str, hint: str = "") -> BadRequest:
    """404 in Ollama's own words (ollama-api 1.4), which several clients search for; `hint` follows them."""
    return BadRequest(f"model '{name}' not found{hint}", 404, code="model_not_found")


# ----------------------------------------------------------------------------
# Room 4.  Framing: bytes to lines, SSE frames and HTTP bodies; JSON with limits
#
# Feed bytes, get what is complete; close() says whether the end was allowed here.
# Nothing in this room waits, and nothing in it knows what the JSON means.
# ----------------------------------------------------------------------------


def _refuse_number(text: str) -> None:
    raise ValueError(f"invalid number {text}")


def _finite_number(text: str) -> float:
    number = float(text)
    return number if number - number == 0 else _refuse_number(text)     # type: ignore[return-value]


_read_json = json.JSONDecoder(parse_constant=lambda _: None, strict=False).raw_decode
_read_request = json.JSONDecoder(parse_float=_finite_number, parse_constant=_refuse_number).raw_decode
_encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode
encode_text = json.encoder.encode_basestring_ascii

_JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.S)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def dump(value: Any) -> bytes:
    """Compact ASCII JSON that strict readers take: a number beyond what JSON can hold (a model's 1e999) becomes null,
    half a surrogate pair U+FFFD.  Raises BadRequest for absurd nesting."""
    try:
        text = _encode_json(value)
        return (text if "\\ud" not in text else _encode_json(_strict(value))).encode("ascii")
    except ValueError:
        return _encode_json(_strict(value)).encode("ascii")
    except RecursionError:
        raise BadRequest("nested too deeply") from None


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {_strict(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_strict, value))
    if isinstance(value, str):
        return whole_pairs(value)
    return value if not isinstance(value, float) or value - value == 0 else None


def whole_pairs(text: str) -> str:
    """`text` with halves of surrogate pairs joined; one that is alone becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def json_depth(data: bytes) -> int:
    """How deep arrays and objects nest, up to MAX_JSON_DEPTH, strings left aside; broken JSON is no matter."""
    opened = data.count(b"[") + data.count(b"{")
    if opened < MAX_JSON_DEPTH or opened > MAX_JSON_VALUES:
        return 0 if opened < MAX_JSON_DEPTH else MAX_JSON_DEPTH     # nearly always too few to nest so deep
    brackets = _JSON_STRING.sub(b"", data).translate(None, _NOT_BRACKETS)
    for depth in range(MAX_JSON_DEPTH):
        peeled = brackets.replace(b"[]", b"").replace(b"{}", b"")       # the innermost level of all there are
        if len(peeled) == len(brackets):
            return min(depth + len(brackets), MAX_JSON_DEPTH)      # and what has no partner
        brackets = peeled
    return MAX_JSON_DEPTH


def load(data: bytes) -> Any:
    """JSON of the upstream: lenient about NaN (null) and control characters, strict about depth.  Raises ValueError."""
    if json_depth(data) >= MAX_JSON_DEPTH:
        raise ValueError("nested too deeply")
    text = str(data, "utf-8", "replace").strip(" \t\r\n")
    value, end = _read_json(text)
    if end < len(text):
        raise ValueError("more than one value")
    return value


def load_or_none(data: bytes) -> Any:
    """load(), or None for what is no JSON (and for a null, which says nothing)."""
    try:
        return load(data)
    except (ValueError, RecursionError):
        return None


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
        value, _ = _read_request(str(data, "utf-8", "replace").lstrip("\ufeff \t\r\n"))    # U+FFFD, as Go reads it
    except RecursionError:
        raise BadRequest("exceeded max depth") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip()):
            raise BadRequest("unexpected EOF") from None
        raise BadRequest(f"invalid JSON: {str(error).partition('; use sys.')[0]}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"json: cannot unmarshal {json_kind(value)} into a request object")
    return value


def lower_keys(value: dict) -> dict:
    """`value` with its keys in lower case: Ollama matches keys without regard to case."""
    if all(key == key.casefold() for key in value):
        return value
    return {key.casefold(): item for key, item in sorted(value.items(), key=lambda pair: pair[0] == pair[0].casefold())}


_KINDS = {str: "string", bool: "bool", list: "array", dict: "object", int: "integer", float: "number"}


def field(body: dict, name: str, kind: type) -> Any:
    """A request field of the JSON type `kind`.  Raises BadRequest 400 in the wording of Ollama's parser."""
    value = body[name]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise BadRequest(f"json: cannot unmarshal {json_kind(value)} into field {name} of type {_KINDS[kind]}")
    return value


def required(value: Any, refusal: str, status: int = 400) -> Any:
    """What a request cannot do without.  Raises BadRequest with the sentence `refusal` when it says nothing."""
    if not value:
        raise BadRequest(refusal, status)
    return value


def json_kind(value: Any) -> str:
    """The JSON name of a value's type, for error texts."""
    return {**_KINDS, type(None): "null", int: "number"}.get(type(value), "object")


class LineDecoder:
    """Bytes to lines at LF, CR LF or CR, and nowhere else: U+2028 and form feed are text."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []          # of a line whose end has not come
        self._held = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the complete lines, without their ends.  Raises BadUpstreamPayload on a giant one."""
        if self._after_cr:                      # the LF of a CR LF that was cut in two ends no second line
            data = data.removeprefix(b"\n")
        self._after_cr = data[-1:] == b"\r"
        if b"\r" in data:
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


DONE = object()                                 # what a frame of [DONE] says


class FrameDecoder:
    """SSE frames or bare NDJSON lines to (event name, JSON value or DONE).

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
            if line[:5] in (b"data:", b"event") and not self.stray:
                self._bare = False      # frames after bare lines
            if line[:5] == b"data:" and not self._bare:
                self._data(line[5:].strip(), frames)
            elif not line:
                if self._pending:
                    text = one_line(b" ".join(self._pending))
                    self.fault = BadUpstreamPayload(f"upstream sent an event that is not JSON: {text}")
                    break
                self._event = ""
            elif line.strip() == b"[DONE]":
                frames.append(("", DONE))
            elif self._bare or line.lstrip()[:1] in (b"{", b"["):
                self._bare_line(line, frames)
            elif line[:6] == b"event:":
                self._event = str(line[6:].strip(), "utf-8", "replace")
            elif not line.startswith((b":", b"id:", b"retry:")) and len(self.stray) < 64:
                self.stray.append(line)
        return frames

    def _data(self, payload: bytes, frames: list) -> None:
        if payload == b"[DONE]":
            frames.append((self._event, DONE))
        elif payload not in (b"", b"null") or self._pending:
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
_TRAILERS = rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*"
_END = re.compile(_TRAILERS + rb"\r\n")
_BEGUN = re.compile(_TRAILERS + rb"[^\r\n]*\r?")        # of an end that has not come as a whole
_CHUNK_LINE_BYTES = 4096


class ChunkedDecoder:
    """Takes chunked transfer coding off (RFC 9112 section 7.1), strictly: hexadecimal sizes, CR LF only.

    Reads from the CR LF that ends one chunk to the one that ends the next; the first chunk ends none.
    `done` once the last chunk and its trailers were read; `rest` is what followed.  Raises ValueError on
    anything else, and leaves what came before it in `salvaged`.
    """

    def __init__(self) -> None:
        self._left = 0                  # content bytes before the next CR LF
        self._last = False              # the last chunk has come, its trailers not yet
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
                self._expect(b"\r\n".startswith(data[at:at + 2]) and b"\n" not in data[at + 2:], data[at:], pieces)
                break
            size, begin = int(line[1], 16), line.end()
            self._last, at = not size, begin + size
            pieces.append(data[begin:at])
        self._left, self.rest = max(0, at - len(data)), data[at:]
        if self._last and not self._left:
            end = _END.match(self.rest)
            if end is not None:
                self.done, self.rest = True, self.rest[end.end():]
            else:
                self._expect(_BEGUN.fullmatch(self.rest), self.rest, pieces)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _expect(self, plausible: Any, held: bytes, pieces: list) -> None:
        """Raises ValueError unless `held` may be the beginning of a size line or of trailers."""
        if not plausible or len(held) > _CHUNK_LINE_BYTES:
            self.salvaged = b"".join(pieces)
            raise ValueError("chunk longer than its size, malformed size or trailer")


CODINGS = frozenset(("", "identity", "gzip", "x-gzip", "deflate", *(("zstd",) if sys.version_info >= (3, 14) else ())))


def inflater(coding: str, fault: Callable) -> Callable:
    """What takes a content coding off, piece by piece (None is the end of the body): bytes -> bytes.

    Raises `fault(sentence, status)`, a sentence about "a body that ...", when that is impossible.
    """
    if coding not in CODINGS:
        raise fault(f"is compressed as {one_line(coding, 40)}, which is not understood here", 415)
    inflate: Any = importlib.import_module("compression.zstd").ZstdDecompressor() if coding == "zstd" \
        else zlib.decompressobj(47)

    begun = False

    def step(data: Optional[bytes]) -> bytes:
        nonlocal inflate, begun
        if data is None and not inflate.eof:
            raise fault("ends in the middle of its compression", 400)
        try:
            data, begun = inflate.decompress(data, MAX_INFLATED) if data and not inflate.eof else b"", True
        except Exception:               # noqa: BLE001  each module has an error of its own
            if coding == "deflate" and not begun:       # zlib by the standard, raw by habit (RFC 9110 8.4.1.2)
                inflate, begun = zlib.decompressobj(-15), True
                return step(data)
            raise fault("is broken inside its compression", 400) from None
        if not inflate.eof and (getattr(inflate, "unconsumed_tail", b"") or not getattr(inflate, "needs_input", True)):
            raise fault("expands beyond reason", 413)
        return data

    return step


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: Any, limit: int = 500) -> str:
    """Text for a log line or an error: one line, control characters escaped, cut to `limit`."""
    if isinstance(text, (bytes, bytearray)):
        text = str(text[:limit * 4], "utf-8", "replace")
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    text = " ".join(text[:limit * 4].split()) if "\n" in text or "\r" in text else text
    text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text[:limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


_MAGIC = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"GIF8", "image/gif"), (b"ID3", "audio/mp3"),
          (b"\xff\xfb", "audio/mp3"), (b"\xff\xf3", "audio/mp3"))


def sniff_media_type(data: str) -> str:
    """Media type of base64 `data` from its first bytes; image/jpeg when nothing is recognised."""
    try:
        head = base64.b64decode(data[:24] + "=" * (-len(data[:24]) % 4))
    except ValueError:
        return "image/jpeg"
    if head[:4] == b"RIFF":
        return "audio/wav" if head[8:12] == b"WAVE" else "image/webp"
    return next((media_type for magic, media_type in _MAGIC if head.startswith(magic)), "image/jpeg")


_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.A)
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
    data = "".join((value[match.end():] if match else value).split()).replace("-", "+").replace("_", "/")
    if not data:
        return None
    data += "=" * (-len(data) % 4)
    if not _BASE64.fullmatch(data):
        raise BadRequest("illegal base64 data in image")
    sniffed = sniff_media_type(data)
    named = match[1] if match and match[1] and match[1] != "image/jpg" else ""
    return Image(data=data, media_type=sniffed if sniffed != "image/jpeg" or not named else named)


def call_id(*seed: Any) -> str:
    """Nine letters or digits, the only form every server takes (Mistral insists on it); the same for
    the same seed, so that a repeated history hits the target's prompt cache.  Random without seed."""
    if not seed:
        return f"{random.getrandbits(36):09x}"
    return hashlib.sha256(repr(seed).encode("utf-8", "replace")).hexdigest()[:9]


def parse_arguments(value: Any) -> Optional[dict]:
    """A call's arguments as an object, from an object, JSON text, or JSON text encoded twice.

    Nothing, "" and "null" are {}; None is returned for what cannot be read.
    """
    for _ in range(3):
        if isinstance(value, str):
            text = value.strip()
            value = load_or_none(whole_pairs(text).encode()) if text not in ("", "null") else None
            if value is None and text not in ("", "null"):      # written twice, or after an empty object
                found = [load_or_none(part.encode("utf-8", "replace")) for part in re.split(r"(?<=\})\s*(?=\{)", text)]
                value = next(filter(None, found), None) if None not in found else None
                return value if all(part in ({}, value) for part in found) else None
        if value in (None, []):         # PHP's empty map
            return {}
        if isinstance(value, dict):
            return value
    return None


_SCHEMA_KEYS = frozenset(("type", "properties", "required", "$defs", "definitions", "items", "anyOf", "oneOf", "allOf",
                          "$ref", "additionalProperties", "$schema", "title"))


def schema_of(parameters: Any) -> dict:
    """A tool's parameters as an object schema: fills in what clients leave out (clients rule 42)."""
    if not isinstance(parameters, dict) or not parameters:
        return {"type": "object", "properties": {}}
    if _SCHEMA_KEYS.isdisjoint(parameters) and all(isinstance(value, dict) for value in parameters.values()):
        return {"type": "object", "properties": parameters}     # a bare property map
    schema = {key: value for key, value in parameters.items() if key != "$schema" and value is not None}
    if isinstance(schema.get("type"), list):        # nullable roots: arguments are an object anyway
        schema["type"] = "object"
    if not isinstance(schema.get("properties", {}), dict):
        schema["properties"] = {}                   # PHP's empty map
    if schema.keys().isdisjoint(("type", "anyOf", "oneOf", "allOf", "$ref")):
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


class Encoder:
    """Events -> bytes for a client: what the encoders of all dialects have in common.

    `clock` tells monotonic nanoseconds (`now`), seconds (`wall`) and the RFC 3339 stamp (`stamp`); `started` and `sent`
    are when the request arrived and when it went to the target; `reasoning` names OpenAI's delta keys that carry
    thinking.  A count the target never gave is an estimate: deltas seen, bytes / 4 for the prompt.
    """

    media_type = EVENT_STREAM
    tail = b""
    alive: Any = None                   # makes a frame that says nothing, for clients that give up on silence

    def __init__(self, call: ChatCall, clock: Any, started: int, sent: int,
                 reasoning: tuple = ("reasoning_content", "reasoning")) -> None:
        self._call, self._clock, self._started, self._sent, self._reasoning = call, clock, started, sent, reasoning
        self._deltas = 0
        self._ids: set = set()          # of the calls so far

    def tick(self) -> None:
        """A new batch of events begins: nothing here changes with time."""

    def _unused_id(self, call: ToolCall, prefix: str) -> str:
        """The id of a call, or another where it has none of its own."""
        used = call.id if call.id and call.id not in self._ids else prefix + call_id()
        self._ids.add(used)
        return used


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
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9 / unit:
        return max(1, round(value * unit * 1e9))
    return None


def present(**fields: Any) -> dict:
    """The fields that say something: for JSON in which absence means "not said"."""
    return {key: value for key, value in fields.items() if value is not None}

# ----------------------------------------------------------------------------
# Room 5.  Ollama dialect: /api/*, both faces (Ollama v0.33, docs/api.md)
# ----------------------------------------------------------------------------

# Neutral name -> Ollama's, read both ways.  What OpenAI has no word for stands in room 6's table
# under the name that llama.cpp and vLLM understand.
OLLAMA_OPTION_KEYS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
                      "typical_p": "typical_p", "seed": "seed", "max_tokens": "num_predict", "stop": "stop",
                      "repeat_penalty": "repeat_penalty", "repeat_last_n": "repeat_last_n",
                      "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty"}
_OPTION_NAMES = {wire: name for name, wire in OLLAMA_OPTION_KEYS.items()}
# Options that only an Ollama has, at the top level where bridges such as LiteLLM take them from.
OLLAMA_ONLY = ("num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap")
OPTION_KINDS = {**dict.fromkeys(OLLAMA_OPTION_KEYS, float), **dict.fromkeys(OLLAMA_ONLY, int), "use_mmap": bool,
                **dict.fromkeys(("top_k", "seed", "max_tokens", "repeat_last_n"), int)}
_KIND_NAMES = {int: "integer", float: "float32", bool: "boolean"}
# Below it an option says "no limit", "random" or "off": what absence means to everybody else.
_LEAST = {"max_tokens": 1, "top_k": 1, "repeat_last_n": 0, "seed": 0}
_THINK_WORDS = {"true": True, "false": False, "": None, "low": "low", "medium": "medium", "high": "high", "max": "max"}
CAPABILITIES = ("completion", "tools", "vision", "thinking", "insert", "embedding")

# Fields of requests and their JSON types (ollama-api 2.4 to 2.10); `object` may be anything.
OLLAMA_FIELDS = {"model": str, "name": str, "messages": list, "prompt": str, "suffix": str, "system": str,
                 "template": str, "raw": bool, "context": list, "images": list, "stream": bool, "options": dict,
                 "tools": list, "tool_choice": object, "format": object, "think": object, "keep_alive": object,
                 "logprobs": bool, "top_logprobs": int, "truncate": bool, "shift": bool, "dimensions": int,
                 "input": object, "verbose": bool, "insecure": bool, "username": str, "password": str}
MESSAGE_FIELDS = {"role": str, "content": object, "thinking": str, "images": list, "tool_calls": list,
                  "tool_name": str, "tool_call_id": str}
CALL_FIELDS = {"id": str, "function": dict, "name": str, "arguments": object}
TOOL_FIELDS = {"type": str, "function": dict, "name": str, "description": str, "strict": object}


def typed(body: Any, kinds: dict, name: str = "") -> dict:
    """The fields of a request, or of the object in its field `name`, nulls left out; those in `kinds` have that type.

    Raises BadRequest 400 in the wording of Ollama's parser.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"json: cannot unmarshal {json_kind(body)} into field {name} of type object")
    body = lower_keys(body)
    return {key: value if kinds.get(key, object) is object else field(body, key, kinds[key])
            for key, value in body.items() if value is not None}


def parse_options(options: dict) -> tuple[dict, dict]:
    """Ollama's `options` -> (neutral options, the rest).  Nulls and meaningless values are left out.

    Raises BadRequest for an option of the wrong type, in Ollama's words.
    """
    neutral: dict = {}
    rest: dict = {}
    for wire, value in options.items():
        name = _OPTION_NAMES.get(wire, wire)
        if name == "stop":
            value = parse_stop(value) or None
        elif (wire in _OPTION_NAMES or wire in OLLAMA_ONLY) and value is not None:
            kind = OPTION_KINDS[name]
            finite = isinstance(value, (int, float)) and value - value == 0
            if not finite or isinstance(value, bool) != (kind is bool):
                raise BadRequest(f'option "{wire}" must be of type {_KIND_NAMES[kind]}')
            value = int(value) if kind is int else value
            value = value if value >= _LEAST.get(name, value) else None
        if value is not None:
            (neutral if wire in _OPTION_NAMES else rest)[name] = value
    return neutral, rest


def parse_stop(value: Any) -> list:
    """Stop strings from one string or a list; empty ones end some servers' answers at once."""
    value = [value] if isinstance(value, str) else value or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRequest('option "stop" must be of type array of strings')
    if len(value) > 64 or any(len(item) > 256 for item in value):
        raise BadRequest('option "stop": at most 64 strings of at most 256 characters are supported')
    return [item for item in value if item]


def parse_think(value: Any) -> Any:
    """`think` -> None, bool or level.  Raises BadRequest in Ollama's words."""
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise BadRequest('think must be a boolean or string ("high", "medium", "low", "max", true, or false)')
    if value.strip().lower() not in _THINK_WORDS:
        raise BadRequest(f'invalid think value: "{one_line(value, 40)}" '
                         '(must be "high", "medium", "low", "max", true, or false)')
    return _THINK_WORDS[value.strip().lower()]


def parse_format(value: Any) -> Any:
    """`format` -> None, "json" or a schema.  Raises BadRequest in Ollama's words."""
    if value is None or value == "":
        return None
    if value == "json" or isinstance(value, dict):
        return value or "json"
    raise BadRequest(f"invalid format: {one_line(json.dumps(value), 80)}; "
                     'expected "json" or a valid JSON Schema object')


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")


def keep_alive_seconds(value: Any) -> Optional[float]:
    """`keep_alive` in all its forms -> seconds; negative is forever, None is not said or unreadable."""
    text = str(value)[:64].strip().lower()
    if re.fullmatch(r"-?[0-9]{1,12}(\.[0-9]*)?", text):
        return float(text)                      # numbers; and "300" and "-1", which Ollama refuses and clients send
    if not re.fullmatch(rf"[-+]?(?:{_DURATION.pattern})+", text):
        return None
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text))
    return -seconds if text[0] == "-" else seconds


def parse_keep_alive(value: Any) -> Any:
    """`keep_alive` in a form that Ollama takes; "300" and "-1", which it refuses and clients send, as numbers.

    Raises BadRequest for what is no duration.
    """
    seconds = keep_alive_seconds(value)
    if value is not None and (seconds is None or isinstance(value, bool)):
        raise BadRequest(f'invalid keep_alive {one_line(json.dumps(value), 40)}: seconds, or a duration such as "5m"')
    return seconds if isinstance(value, str) and value.strip()[-1:].isdigit() else value


def name_in(body: dict) -> str:
    """The model's name, under its present or its legacy key; "" when there is none."""
    return (body.get("model") or body.get("name") or "").strip()


def parse_tools(value: Iterable) -> tuple:
    """Tools of a request -> Tool; only functions, since nothing else can be offered to the model."""
    tools = []
    for tool in value:
        tool = typed(tool, TOOL_FIELDS, "tools")
        function = typed(tool.get("function", tool), TOOL_FIELDS, "function")
        if tool.get("type", "function") != "function":
            raise BadRequest(f"tools of type {one_line(tool['type'], 40)} are not supported: only functions are")
        name, strict = required(function.get("name"), "a tool has no name"), function.get("strict")
        tools.append(Tool(name, function.get("description", ""), schema_of(function.get("parameters")),
                          strict if isinstance(strict, bool) else None))
    return tuple(tools)


def parse_tool_choice(value: Any) -> Any:
    """`tool_choice` -> None, a word, or a named function as a 1-tuple."""
    if isinstance(value, dict):
        name = as_dict(value.get("function")).get("name") or value.get("name")
        return (name,) if isinstance(name, str) and name else None
    return {"none": "none", "required": "required", "any": "required", "auto": "auto"}.get(as_text(value))


def parse_logprobs(body: dict) -> Optional[int]:
    """`logprobs` and `top_logprobs` -> None or the number of alternatives."""
    if not body.get("logprobs"):
        return None
    top = body.get("top_logprobs", 0)
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
    call = typed(call, CALL_FIELDS, "tool_calls")
    function = typed(call.get("function", call), CALL_FIELDS)
    arguments = parse_arguments(function.get("arguments"))
    if arguments is None:               # what a model once wrote stays in the history: it must not end the chat
        arguments = {"arguments": function["arguments"]}
    return ToolCall(call.get("id", ""), function.get("name") or "unknown", arguments)


def parse_message(message: Any) -> Message:
    """One message as Ollama and OpenAI clients write it (the two differ in names, not in meaning)."""
    message = typed(message, MESSAGE_FIELDS, "messages")
    role, content = (message.get("role") or "user").lower(), message.get("content", "")
    images: tuple = ()
    thinking = ""
    if isinstance(content, list):
        content, images, thinking = parse_parts(content)
    elif isinstance(content, dict) and role == "tool":
        content = json.dumps(content)           # a result that was never turned into text
    elif not isinstance(content, str):
        raise BadRequest(f"json: cannot unmarshal {json_kind(content)} into field content of type string")
    for key in ("thinking", "reasoning_content", "reasoning"):
        thinking = thinking or as_text(message.get(key))
    images += tuple(filter(None, map(parse_image, message.get("images", ()))))
    calls = message.get("tool_calls", ())
    if len(calls) > 512:
        raise BadRequest("more than 512 tool calls in one message")
    name = message.get("tool_name") or (as_text(message.get("name")) if role == "tool" else "")
    return Message("system" if role == "developer" else role, content, thinking, images, tuple(map(parse_call, calls)),
                   message.get("tool_call_id", ""), name)


def _common(body: dict) -> dict:
    """The fields that /api/chat and /api/generate share, as arguments of ChatCall."""
    # Some AI SDK providers lift options to the top level.
    wire = {**present(temperature=body.get("temperature"), top_p=body.get("top_p"),
                      num_predict=body.get("max_output_tokens")), **body.get("options", {})}
    options, extra = parse_options(wire)
    return dict(options=options, extra=extra, think=parse_think(body.get("think")),
                keep_alive=parse_keep_alive(body.get("keep_alive", wire.get("keep_alive"))),
                format=parse_format(body.get("format", wire.get("format"))),
                stream=body.get("stream", True), logprobs=parse_logprobs(body), want_usage=True)


def parse_ollama_chat(body: dict, face: str = "chat") -> ChatCall:
    """POST /api/chat or, with face "generate", /api/generate (ollama-api 2.4, 2.6) -> ChatCall.

    A call without messages and prompt asks to load or unload the model.  Raises BadRequest.
    """
    body = typed(body, OLLAMA_FIELDS)
    if face == "generate":
        return _parse_generate(body)
    model = required(name_in(body), "model is required")
    messages = tuple(map(parse_message, body.get("messages", ())))
    if not messages and body.get("prompt"):
        messages = (Message("user", body["prompt"]),)
    if messages and body.get("system") and messages[0].role != "system":
        messages = (Message("system", body["system"]),) + messages
    return ChatCall(model, "chat", messages, tools=parse_tools(body.get("tools", ())),
                    tool_choice=parse_tool_choice(body.get("tool_choice")), **_common(body))


def _parse_generate(body: dict) -> ChatCall:
    model = required(name_in(body), "model '' not found", 404)
    prompt, suffix, system, template = (body.get(key, "") for key in ("prompt", "suffix", "system", "template"))
    raw, context = body.get("raw", False), body.get("context", [])
    images = tuple(filter(None, map(parse_image, body.get("images", ()))))
    if raw and (template or system or context):
        raise BadRequest("raw mode does not support template, system, or context")
    call = ChatCall(model, "generate", **_common(body))
    if not (prompt or suffix or images):
        return call
    if raw or suffix:
        if images:
            raise BadRequest("images cannot be sent together with raw or suffix")
        return call._replace(prompt=f"{system}\n\n{prompt}" if system else prompt, suffix=suffix)
    if template:
        prompt, system = render_template(template, system, prompt), "" if ".System" in template else system
    turns = unpack_context(context) + ([Message("system", system)] if system else []) \
        + [Message("user", prompt, images=images)]
    turns.sort(key=lambda turn: turn.role != "system")      # a system text given late still stands first
    return call._replace(messages=tuple(turns), conversation=tuple(turns))


def render_template(template: str, system: str, prompt: str) -> str:
    """A prompt override: {{ .System }} and {{ .Prompt }} of Go's templates.

    Raises BadRequest for any other action, rather than send half a prompt.
    """
    values = {".System": system, ".Prompt": prompt, ".Response": ""}

    def fill(match: Any) -> str:
        if match[1] not in values:
            raise BadRequest(f"template error: {one_line(match[0], 60)} is not supported by this proxy")
        return values[match[1]]

    return re.sub(r"(?:\s*\{\{-|\{\{)\s*(.*?)\s*(?:-\}\}\s*|\}\})", fill, template, flags=re.S)


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


def parse_inputs(value: Any) -> tuple:
    """`input` of an embedding request: one text or a list of them; nothing at all is none."""
    inputs = () if value in (None, "") else (value,) if isinstance(value, str) else value
    if not isinstance(inputs, (list, tuple)) or not all(isinstance(item, str) for item in inputs):
        raise BadRequest("invalid input type")
    return tuple(inputs)


def parse_ollama_embed(body: dict, legacy: bool = False) -> EmbedCall:
    """POST /api/embed or, with `legacy`, /api/embeddings (ollama-api 2.8, 2.9) -> EmbedCall."""
    body = typed(body, OLLAMA_FIELDS)
    refusal, status = ("model is required", 400) if legacy else ("model '' not found", 404)
    model = required(name_in(body), refusal, status)
    first, second = ("prompt", "input") if legacy else ("input", "prompt")
    dimensions = body.get("dimensions", 0)
    return EmbedCall(model, parse_inputs(body.get(first, body.get(second))), dimensions if dimensions > 0 else None,
                     legacy, keep_alive=parse_keep_alive(body.get("keep_alive")), truncate=body.get("truncate"),
                     options=body.get("options", {}))


def render_ollama_options(call: ChatCall) -> dict:
    """Neutral options -> Ollama's; what the client wrote under Ollama's own names wins."""
    return {**{OLLAMA_OPTION_KEYS[name]: value for name, value in call.options.items()}, **call.extra}


def render_ollama_message(message: Message, names: dict) -> dict:
    """One turn for a real Ollama: string content, bare base64, object arguments, named results."""
    names.update((call.id, call.name) for call in message.tool_calls)
    tied = present(tool_name=message.tool_name or names.get(message.tool_call_id) or None,
                   tool_call_id=message.tool_call_id or None) if message.role == "tool" else {}
    return {"role": message.role, "content": message.content, **present(
        thinking=message.thinking or None, images=[image.data for image in message.images] or None,
        tool_calls=ollama_calls(message.tool_calls) or None), **tied}


def ollama_calls(calls: Iterable) -> list:
    """Calls as Ollama writes them: id, index within the turn, object arguments, no type.

    Raises BadUpstreamPayload for arguments that are no object: Ollama has no way to write them.
    """
    for call in calls:
        if call.raw:
            raise BadUpstreamPayload(f"the model called {one_line(call.name, 60)} with arguments that are "
                                     f"not a JSON object: {one_line(call.raw, 200)}")
    return [{"id": call.id, "function": {"index": at, "name": call.name, "arguments": call.arguments}}
            for at, call in enumerate(calls)]


_KEPT_KEYWORDS = ("type", "anyOf", "items", "description", "enum", "properties", "required")


def plain_schema(schema: Any, root: Optional[dict] = None, strictly: bool = False, depth: int = 0,
                 budget: Optional[list] = None, level: int = 0) -> dict:
    """A tool's schema in what Ollama keeps of JSON Schema (ollama-api 2.4): references put in place, oneOf as anyOf,
    const as enum, booleans as objects.  `strictly` leaves out what it would drop.

    Raises BadRequest for one that grows beyond 10,000 places or MAX_JSON_DEPTH levels by that.
    """
    budget = [10000] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or level > MAX_JSON_DEPTH:
        raise BadRequest("a tool's schema refers to itself too often")
    if not isinstance(schema, dict):
        return {}                       # true: anything
    root = schema if root is None else root

    def inner(value: Any) -> dict:
        return plain_schema(value, root, strictly, depth, budget, level + 1)

    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/") and depth < 8:
        found: Any = root
        for part in reference[2:].split("/"):
            found = as_dict(found).get(part.replace("~1", "/").replace("~0", "~"))
        if isinstance(found, dict):
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            return plain_schema({**found, **rest}, root, strictly, depth + 1, budget, level + 1)
    plain: dict = {}
    for key, value in schema.items():
        if key == "properties":
            plain[key] = {name: inner(item) for name, item in as_dict(value).items()}
        elif key == "allOf" and len(as_list(value)) == 1:
            plain.update(inner(value[0]))
        elif key in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            plain["anyOf" if key == "oneOf" else key] = list(map(inner, value))
        elif key == "const":
            plain["enum"] = [value]
        elif key == "items":
            plain[key] = inner(value)
        elif key not in ("$defs", "definitions"):
            plain[key] = value
    if strictly and isinstance(plain.get("type"), list):
        plain["type"] = next((kind for kind in plain["type"] if kind != "null"), "string")
    if strictly and plain.get("type") == "array":
        plain.setdefault("items", {})
    return {key: value for key, value in plain.items() if key in _KEPT_KEYWORDS or not strictly}


def plain_parameters(parameters: dict) -> Optional[dict]:
    """A strict server's parameters of a tool; None when there are no properties, which Gemini wants left out."""
    schema = plain_schema(parameters, strictly=True)
    return schema if schema.get("properties") or schema.get("type") != "object" else None


def arrange(messages: tuple, habits: Habits) -> tuple:
    """The history as a target wants it: known roles, one system text, no neighbours of one role, nothing empty."""
    if habits.known_roles:
        messages = tuple(turn if turn.role in ("system", "user", "assistant", "tool") else turn._replace(role="system")
                         for turn in messages)
    if habits.system:
        texts = [turn.content for turn in messages if turn.role == "system"]
        messages = tuple(turn for turn in messages if turn.role != "system")
        if texts:
            messages = (Message("system" if habits.system == "first" else "user", "\n\n".join(texts)),) + messages
    if habits.merge or habits.system == "user":
        joined: list = []
        for turn in messages:
            last = joined[-1] if joined else None
            if last is not None and last.role == turn.role != "tool" and not last.tool_calls:
                text, thinking = ("\n\n".join(filter(None, pair)) for pair in (
                    (last.content, turn.content), (last.thinking, turn.thinking)))
                joined[-1] = turn._replace(content=text, thinking=thinking, images=last.images + turn.images)
            elif turn.role == "assistant" and (last is None or last.role == "system"):
                joined += [Message("user", "(start)"), turn]       # a greeting: templates want a question first
            else:
                joined.append(turn)
        messages = tuple(joined)
    return tuple(turn._replace(content=habits.filler) if habits.filler and not turn.content.strip() and not turn.images
                 and not turn.tool_calls else turn for turn in messages)


def render_ollama_chat(call: ChatCall, habits: Habits, _context: Optional[int] = None) -> WireRequest:
    """ChatCall -> POST /api/chat, or /api/generate for a plain prompt, of a real Ollama."""
    body: dict = {"model": call.model, "stream": call.stream}
    if call.prompt is None:
        names: dict = {}
        body["messages"] = [render_ollama_message(message, names) for message in arrange(call.messages, habits)]
        if call.offered and call.tool_choice != "none":
            body["tools"] = [{"type": "function", "function": {"name": tool.name, "description": tool.description,
                              "parameters": plain_schema(tool.parameters)}} for tool in call.offered]
    else:
        body.update(prompt=call.prompt, **present(suffix=call.suffix or None))
    body.update(present(options=render_ollama_options(call) or None, format=call.format, think=call.think,
                        keep_alive=call.keep_alive, logprobs=True if call.logprobs is not None else None,
                        top_logprobs=call.logprobs or None))
    return WireRequest("/api/chat" if call.prompt is None else "/api/generate", body)


def render_ollama_embed(call: EmbedCall, _habits: Habits) -> WireRequest:
    """EmbedCall -> POST /api/embed."""
    return WireRequest("/api/embed", present(
        model=call.model, input=list(call.inputs), dimensions=call.dimensions, keep_alive=call.keep_alive,
        truncate=call.truncate, options=call.options or None))


def read_ollama_embeddings(answer: Any, count: int) -> tuple[list, Usage]:
    """Answer of /api/embed -> (vectors, Usage).  Raises BadUpstreamPayload when vectors are missing."""
    answer = as_dict(answer)
    return (read_vectors(as_list(answer.get("embeddings")), count),
            Usage(prompt_tokens=as_count(answer.get("prompt_eval_count"))))


def read_vectors(values: list, count: int) -> list:
    """Embeddings of an upstream as lists of numbers.  Raises BadUpstreamPayload unless there is one for each input."""
    if len(values) != count:
        raise BadUpstreamPayload(f"upstream returned {len(values)} embeddings for {count} inputs")
    return list(map(_read_vector, values))


def _read_vector(value: Any) -> list:
    """One embedding: numbers, base64 of little-endian float32, or a vector per token, which is averaged."""
    try:
        if isinstance(value, str):
            data = base64.b64decode(value, validate=True)
            value = struct.unpack(f"<{len(data) // 4}f", data)
        elif value and isinstance(value[0], list):      # llama-cpp-python
            value = [sum(column) / len(value) for column in zip(*value)] if len(value) > 1 else value[0]
        if not isinstance(value, (list, tuple)) or not value or sum(value) * 0.0 != 0 or bool in map(type, value):
            raise ValueError("no numbers")
    except (ValueError, TypeError, KeyError, OverflowError, struct.error):
        raise BadUpstreamPayload("upstream sent an embedding that is not a list of numbers") from None
    return list(value)


def render_ollama_embeddings(call: EmbedCall, vectors: list, usage: Usage, took: int) -> dict:
    """Vectors -> answer of /api/embed, or of /api/embeddings when `call.legacy`.  `took` in ns."""
    if call.legacy:
        return {"embedding": vectors[0] if vectors else []}
    answer = {"model": call.model, "embeddings": vectors}
    if vectors:
        prompt = usage.prompt_tokens or max(1, sum(len(text.encode("utf-8", "replace")) for text in call.inputs) // 4)
        answer.update(total_duration=max(1, took), load_duration=usage.load_ns or 1, prompt_eval_count=prompt)
    return answer


class OllamaDecoder:
    """NDJSON of /api/chat or /api/generate -> events.  feed(bytes), then close().

    Holds tool calls until the end: agents would run those of an answer that breaks off.
    """

    frame_end = b"\n"
    taken = 0                           # frames that left more behind than their events: none do here

    def __init__(self, call: ChatCall) -> None:
        self._lines = LineDecoder()
        self._logprobs = call.logprobs is not None
        self._calls: tuple = ()
        self.done = False

    @property
    def at_rest(self) -> bool:
        """Nothing is pending: a content line is just its text (the shortcut of room 9 asks)."""
        return not self.done and not self._logprobs and self._lines.idle

    def feed(self, data: bytes) -> list:
        """Returns the events of all complete lines."""
        return self._read(self._lines.feed(data))

    def close(self) -> list:
        """The body ended: events of a line without newline, and a Failure if `done` never came."""
        events = self._read(self._lines.close())
        if not self.done:
            self.done = True
            events.append(Failure(StreamTruncated("upstream closed the stream before finishing")))
        return events

    def decode_body(self, answer: Any) -> list:
        """A whole answer instead of a stream -> all events."""
        if not isinstance(answer, dict) or not {"message", "response", "error"} & answer.keys():
            return [Failure(BadUpstreamPayload("upstream sent an answer without a message"))]
        return decode_ollama_answer({**answer, "done": True})

    def _read(self, lines: list) -> list:
        events: list = []
        for line in lines:
            if line.strip() and not self.done:
                answer = load_or_none(line)
                for event in decode_ollama_answer(answer) if isinstance(answer, dict) else [Failure(
                        BadUpstreamPayload(f"upstream sent a line that is not JSON: {one_line(line)}"))]:
                    self.done = isinstance(event, (Finish, Failure))
                    if isinstance(event, ToolCalls):
                        self._calls += event.calls
                        continue
                    if isinstance(event, Finish) and self._calls:
                        events.append(ToolCalls(self._calls))
                    events.append(event)
        return events


def decode_ollama_answer(answer: dict) -> list:
    """One object of a stream, or a whole answer -> events."""
    error = answer.get("error")
    if error:
        text = error if isinstance(error, str) else as_text(as_dict(error).get("message")) or json.dumps(error)
        return [Failure(UpstreamError(text))]
    events: list = []
    message = as_dict(answer.get("message"))
    thinking = as_text(message.get("thinking")) or as_text(answer.get("thinking"))
    text = as_text(message.get("content")) or as_text(answer.get("response"))
    if thinking:
        events.append(ThinkingDelta(thinking))
    if text:
        events.append(TextDelta(text, as_list(answer.get("logprobs")) or None))
    calls = as_list(message.get("tool_calls")) or as_list(answer.get("tool_calls"))
    if calls:
        functions = [as_dict(as_dict(call).get("function")) for call in calls]
        events.append(ToolCalls(tuple(
            ToolCall(as_text(as_dict(call).get("id")) or "call_" + call_id(), as_text(function.get("name")),
                     parse_arguments(function.get("arguments")) or {}) for call, function in zip(calls, functions))))
    if answer.get("done"):
        counts = [as_count(answer.get(key)) for key in ("prompt_eval_count", "eval_count", "prompt_eval_duration",
                                                        "eval_duration", "load_duration")]
        events.append(Finish(as_text(answer.get("done_reason")) or "stop", Usage(*counts)))
    return events


def ollama_answer(call: ChatCall, stamp: str, text: str = "", **beside: Any) -> dict:
    """One object of a stream: `text` and what stands `beside` it."""
    said = {"response": text, **beside} if call.face == "generate" \
        else {"message": {"role": "assistant", "content": text, **beside}}
    return {"model": call.model, "created_at": stamp, **said, "done": False}


class OllamaEncoder(Encoder):
    """Events -> NDJSON lines of /api/chat or /api/generate, or one whole answer."""

    media_type = NDJSON

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._first = 0                 # when the first delta was encoded
        self._answer: Optional[list] = [] if self._call.conversation is not None else None
        self._stamp = ""

    def tick(self) -> None:
        """A new batch of events begins: one timestamp serves them all."""
        self._stamp = self._clock.stamp()

    def around(self, texts: list) -> tuple[bytes, bytes]:
        """What stands before and after each of `texts`, which are JSON string contents already."""
        self._count(len(texts))
        if self._answer is not None:
            self._answer.append(_read_json(f'"{b"".join(texts).decode("ascii")}"')[0])
        self.tick()
        before, _, after = ndjson_line(self._object("\x01")).rpartition(b"\\u0001")
        return before, after

    def encode(self, event: Any) -> bytes:
        """Returns one line."""
        if isinstance(event, Finish):
            return ndjson_line({**self._object(), **self._last(event)})
        self._count(len(event.calls) if isinstance(event, ToolCalls) else 1)
        if isinstance(event, ThinkingDelta):
            return ndjson_line(self._object(thinking=event.text))
        if isinstance(event, ToolCalls):
            return ndjson_line(self._object(tool_calls=ollama_calls(event.calls)))
        if self._answer is not None:
            self._answer.append(event.text)
        return ndjson_line({**self._object(event.text), **present(logprobs=event.logprobs)})

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
        beside = present(thinking=thinking or None, tool_calls=ollama_calls(calls) or None)
        return dump({**self._object(content, **beside), **self._last(finish), **present(logprobs=logprobs or None)})

    def _count(self, deltas: int) -> None:
        """Deltas that are part of the estimates."""
        self._first = self._first or self._clock.now()
        self._deltas += deltas

    def _object(self, text: str = "", **beside: Any) -> dict:
        return ollama_answer(self._call, self._stamp, text, **beside)

    def _last(self, finish: Finish) -> dict:
        """done, done_reason, context and the six metrics, each at least 1 (durations in ns)."""
        usage, now = finish.usage, self._clock.now()
        first = self._first or self._sent
        context = {} if self._answer is None else {
            "context": pack_context(self._call.conversation, "".join(self._answer))}
        metrics = {"total_duration": now - self._started, "load_duration": usage.load_ns or self._sent - self._started,
                   "prompt_eval_count": usage.prompt_tokens or self._call.prompt_tokens(),
                   "prompt_eval_duration": usage.prompt_ns or first - self._sent,
                   "eval_count": usage.completion_tokens or self._deltas,
                   "eval_duration": usage.completion_ns or now - first}
        return {"done": True, "done_reason": "length" if finish.reason == "length" else "stop", **context,
                **{name: max(1, value) for name, value in metrics.items()}}


def render_ollama_error(error: ProxyError) -> dict:
    """One flat object (ollama-api 1.4)."""
    return {"error": error.message}


def load_answer(call: ChatCall, stamp: str) -> dict:
    """The answer to a call without anything to say: load, or unload for keep_alive 0 (ollama-api 2.7)."""
    reason = "unload" if keep_alive_seconds(call.keep_alive) == 0 else "load"
    return {**ollama_answer(call, stamp), "done": True, "done_reason": reason}


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
    return {"name": info.shown, "model": info.shown, "size": info.size or 0, "digest": digest_of(info.alias or info.id),
            "details": ollama_details(info)}


def ollama_tag(info: ModelInfo) -> dict:
    """One entry of GET /api/tags (ollama-api 2.1)."""
    entry = {**ollama_entry(info), "modified_at": timestamp(info.created), "capabilities": list(info.capabilities)}
    entry["details"].update(present(context_length=info.context, embedding_length=info.embedding_length))
    return entry


def ollama_running(info: ModelInfo, now: float) -> dict:
    """One entry of GET /api/ps (ollama-api 2.2).  Servers do not say when they unload: never."""
    return {**ollama_entry(info), "expires_at": timestamp(now + 292 * 31556952), "size_vram": info.size or 0,
            **present(context_length=info.context_now)}


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
        "capabilities": list(info.capabilities), "model_info": {
            "general.architecture": family, "general.basename": name,
            "general.parameter_count": info.parameter_count or 0,
            f"{family}.context_length": info.context or info.context_now or default_context,
            f"{family}.embedding_length": info.embedding_length or 0}}


OLLAMA = Dialect("ollama", parse_ollama_chat, OllamaEncoder, render_ollama_error, parse_ollama_embed,
                 render_ollama_chat, render_ollama_embed, read_ollama_embeddings, render_ollama_embeddings,
                 OllamaDecoder)

# ----------------------------------------------------------------------------
# Room 6.  OpenAI dialect: /v1/*, the mirror room (OpenAI API reference, and what the many servers
# that call themselves compatible make of it)
# ----------------------------------------------------------------------------

# Neutral name -> OpenAI's.  What is not OPENAI_STANDARD OpenAI itself refuses and most local servers take;
# repeat_penalty goes out under both of its names (llama.cpp knows the first, vLLM the second).
OPENAI_OPTION_KEYS = {
    "temperature": ("temperature",), "top_p": ("top_p",), "seed": ("seed",), "max_tokens": ("max_tokens",),
    "stop": ("stop",), "presence_penalty": ("presence_penalty",), "frequency_penalty": ("frequency_penalty",),
    "top_k": ("top_k",), "min_p": ("min_p",), "typical_p": ("typical_p",), "repeat_last_n": ("repeat_last_n",),
    "repeat_penalty": ("repeat_penalty", "repetition_penalty")}
OPENAI_STANDARD = tuple(OPENAI_OPTION_KEYS)[:7]
FINISH_LENGTH = frozenset(("length", "max_tokens", "model_length", "max_output_tokens"))
FINISH_ERROR = frozenset(("error", "insufficient_system_resource"))
EFFORTS = {"none": False, "off": False, "disabled": False, "minimal": "low", "low": "low", "medium": "medium",
           "high": "high", "max": "max", "xhigh": "max", "ultra": "max"}
# How targets are told to think or not (upstreams table 1D): what says no, what says yes, what says how much.
THINK_SWITCHES = {
    "effort": ({"reasoning_effort": "none"}, {}, lambda level: {"reasoning_effort": level}),
    "template": ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}},
                 {"chat_template_kwargs": {"enable_thinking": True}}, lambda level: {"reasoning_effort": level}),
    "reasoning": ({"reasoning": {"enabled": False}}, {"reasoning": {"enabled": True}},
                  lambda level: {"reasoning": {"effort": "high" if level == "max" else level}}),
    "thinking": ({"thinking": {"type": "disabled"}}, {"thinking": {"type": "enabled"}},
                 lambda level: {"thinking": {"type": "enabled"}, "reasoning_effort": level}),
    "high": ({"reasoning_effort": "none"}, {"reasoning_effort": "high"}, lambda level: {"reasoning_effort": "high"})}
# Fields of requests and their JSON types; `object` may be anything.
OPENAI_FIELDS = {
    **{wire: OPTION_KINDS.get(name, float) for name, wires in OPENAI_OPTION_KEYS.items() for wire in wires},
    "stop": object, "model": str, "messages": list, "prompt": object, "suffix": str, "stream": bool, "n": int,
    "parallel_tool_calls": bool, "best_of": int, "max_completion_tokens": int, "options": dict, "stream_options": dict,
    "tools": list, "top_logprobs": int, "dimensions": int, "encoding_format": str}


def parse_openai_chat(body: dict, face: str = "chat") -> ChatCall:
    """POST /v1/chat/completions or, with face "completion", /v1/completions -> ChatCall.

    `options`, `keep_alive` and `think` in the body (extra_body of the SDKs) are honoured.
    Raises BadRequest, above all for what Ollama has no counterpart for.
    """
    body = typed(body, OPENAI_FIELDS if face == "completion" else {**OPENAI_FIELDS, "logprobs": bool})
    model = required(body.get("model", "").strip(), "model is required")
    if body.get("n", 1) > 1 or body.get("best_of", 1) > 1:
        raise BadRequest("n greater than 1 is not supported: Ollama gives one choice per request")
    options = {name: body[wire] for name, wires in OPENAI_OPTION_KEYS.items() for wire in reversed(wires)
               if wire in body and name != "stop"}
    options.update(present(stop=parse_stop(body.get("stop")) or None, max_tokens=body.get("max_completion_tokens")))
    above = {name: body[name] for name in OLLAMA_ONLY if name in body}
    own, extra = parse_options({**above, **body.get("options", {})})
    call = ChatCall(model, face, options={**options, **own}, extra=extra, stream=body.get("stream", False),
                    keep_alive=parse_keep_alive(body.get("keep_alive")), think=parse_effort(body),
                    format=parse_response_format(body.get("response_format")),
                    want_usage=bool(body.get("stream_options", {}).get("include_usage")))
    if face == "completion":
        prompt, count = body.get("prompt"), body.get("logprobs")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise BadRequest("prompt must be one string: Ollama takes neither lists nor token ids")
        return call._replace(prompt=prompt, suffix=body.get("suffix", ""),
                             logprobs=count if isinstance(count, int) and not isinstance(count, bool) else None)
    messages = required(body.get("messages"), "[] is too short - 'messages'")
    return call._replace(messages=tie_results(tuple(map(parse_message, messages))),
                         logprobs=parse_logprobs(body), parallel=body.get("parallel_tool_calls"),
                         **choose_tools(parse_tools(body.get("tools", ())), body.get("tool_choice")))


def choose_tools(tools: tuple, choice: Any) -> dict:
    """`tools` and `tool_choice` as arguments of ChatCall; {"type": "allowed_tools"} leaves the others out."""
    allowed = as_dict(as_dict(choice).get("allowed_tools"))
    if as_dict(choice).get("type") == "allowed_tools":
        allowed = allowed or choice     # as /v1/responses writes it
        names = {parse_tool_choice(tool) for tool in as_list(allowed.get("tools"))}
        tools, choice = tuple(tool for tool in tools if (tool.name,) in names), allowed.get("mode")
    return {"tools": tools, "tool_choice": parse_tool_choice(choice)}


def parse_effort(body: dict) -> Any:
    """What a client says of thinking, in any spelling (OpenAI's, OpenRouter's, DeepSeek's, Qwen's, vLLM's) -> None,
    bool or level."""
    if "think" in body:
        return parse_think(body["think"])
    reasoning, template = as_dict(body.get("reasoning")), as_dict(body.get("chat_template_kwargs"))
    for effort in (reasoning.get("effort"), body.get("reasoning_effort"), template.get("reasoning_effort")):
        if effort not in (None, ""):
            word = as_text(effort).lower()
            if word not in EFFORTS:
                raise BadRequest(f"invalid reasoning effort {one_line(json.dumps(effort), 40)}: none, minimal, low, "
                                 "medium, high, xhigh or max is expected")
            return EFFORTS[word]
    kind = {"disabled": False, "enabled": True}.get(as_text(as_dict(body.get("thinking")).get("type")))
    switches = (kind, reasoning.get("enabled"), body.get("enable_thinking"), template.get("enable_thinking"),
                template.get("thinking"), template.get("enable_reasoning"))
    return next((switch for switch in switches if isinstance(switch, bool)), None)


def parse_response_format(value: Any) -> Any:
    """`response_format` -> None, "json" or a schema."""
    kind = as_dict(value).get("type")
    schema = as_dict(as_dict(as_dict(value).get("json_schema")).get("schema"))
    return schema or "json" if kind == "json_schema" else "json" if kind == "json_object" else None


def parse_openai_embed(body: dict, _legacy: bool = False) -> EmbedCall:
    """POST /v1/embeddings -> EmbedCall.  Token ids cannot be sent to Ollama."""
    body = typed(body, OPENAI_FIELDS)
    model = required(body.get("model", "").strip(), "model is required")
    inputs = required(("",) if body.get("input") == "" else parse_inputs(body.get("input")),
                      "invalid input: a string or a list of strings is expected")
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise BadRequest("invalid encoding_format: float or base64 is expected")
    return EmbedCall(model, inputs, body.get("dimensions") or None, base64=encoding == "base64",
                     keep_alive=parse_keep_alive(body.get("keep_alive")), options=body.get("options", {}))


def tie_results(messages: tuple) -> tuple:
    """A valid history from any history: every call has an id of its own and exactly one result right behind it,
    every result a call (clients rule 5).

    Results are tied by id, else by an id where the name belongs, else by name, else by order.  A call that nobody
    answered in time gets an empty result; a result whose call was cut off, or that comes late, gets its call back.
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
    """One turn as OpenAI writes it; pictures that only users may show follow as a turn of theirs."""
    shown = [{"role": "user", "content": render_parts("", message.images)}] if message.images else []
    ident = {"nine": nine, "plain": plain_id}.get(habits.tool_ids, str)
    named = plain_name if habits.tool_names else str
    if message.role == "tool":
        return [{"role": "tool", "tool_call_id": ident(message.tool_call_id), "content": message.content}] + shown
    if message.role != "assistant":
        content = render_parts(message.content, message.images) if shown else message.content
        return [{"role": message.role, "content": content}]
    turn: dict = {"role": "assistant", "content": message.content}
    if habits.fill_reasoning or (message.thinking and "reasoning_content" in habits.echo):
        turn["reasoning_content"] = message.thinking or " "     # for the servers that demand it back
    if message.tool_calls:
        turn["content"] = message.content or None
        turn["tool_calls"] = []
    for call in message.tool_calls:
        extra = call.extra or {}
        turn["tool_calls"].append({"id": ident(call.id), "type": "function", **extra.get("call", {}), "function": {
            "name": named(call.name), "arguments": dump(call.arguments).decode()}})
        turn.update((key, value) for key, value in extra.get("message", {}).items()
                    if key != "reasoning_content" or key in habits.echo)
    return ([turn] if message.content or message.tool_calls else []) + shown


def nine(identifier: str) -> str:
    """An id Mistral accepts: itself when it is nine letters or digits, else nine that stand for it."""
    return identifier if re.fullmatch("[A-Za-z0-9]{9}", identifier) else call_id("nine", identifier)


def plain_id(identifier: str) -> str:
    """An id of letters, digits, - and _."""
    return identifier if re.fullmatch("[A-Za-z0-9_-]{1,40}", identifier) else call_id("plain", identifier)


def plain_name(name: str) -> str:
    """A tool's name in the letters that OpenAI takes, a letter first; the digest keeps two of them apart."""
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_-]{0,63}", name):
        return name
    return re.sub("^[^A-Za-z_]|[^A-Za-z0-9_-]", "_", name)[:50] + "_" + digest_of(name)[:8]


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
    late: list[dict] = []           # pictures beside calls and results wait until all results stand together
    for message in tie_results(arrange(messages, habits)):
        turns = render_openai_message(message, habits)
        if message.role == "tool" or message.tool_calls:
            late += turns[1:]
            turns = turns[:1]
        else:
            turns, late = late + turns, []
        if habits.bridge and wire and wire[-1]["role"] == "tool" and turns and turns[0]["role"] == "user":
            wire.append({"role": "assistant", "content": "OK."})
        wire += turns
    if habits.prefix and wire and wire[-1]["role"] == "assistant":
        wire[-1]["prefix"] = True
    return wire + late


def room_for_answer(call: ChatCall, context: Optional[int]) -> int:
    """Tokens an answer may take where the target would cut it short unasked: what the context leaves
    beside the prompt, else a few thousand."""
    return max(1, context - call.prompt_tokens() * 4 // 3 - 16) if context else DEFAULT_COMPLETION_TOKENS


def render_openai_chat(call: ChatCall, habits: Habits, context: Optional[int] = None) -> WireRequest:
    """ChatCall -> POST /chat/completions, or /completions for a plain prompt.  Only what was asked for
    is sent: strict servers refuse even harmless defaults."""
    chat, stream = call.prompt is None, {"never": False, "always": True}.get(habits.stream, call.stream)
    if call.suffix and habits.infill:
        return render_infill(call, stream)
    body: dict = {"model": call.model}
    if chat:
        body["messages"] = render_openai_messages(call.messages, habits)
    else:
        body.update(prompt=call.prompt, **present(suffix=call.suffix or None))
    body["stream"] = stream
    if stream:
        body["stream_options"] = {"include_usage": True}
    body.update((wire, call.options[name]) for name, wires in OPENAI_OPTION_KEYS.items() for wire in wires
                if name in call.options and (name in OPENAI_STANDARD or not habits.strict))
    if "max_tokens" not in body and (habits.limit_chat or not chat):
        body["max_tokens"] = room_for_answer(call, context)
    if chat and call.offered:
        body["tools"] = [{"type": "function", "function": present(
            name=plain_name(tool.name) if habits.tool_names else tool.name, description=tool.description or None,
            parameters=plain_parameters(tool.parameters) if habits.plain_schemas else tool.parameters,
            strict=tool.strict)} for tool in call.offered]
        body.update(present(tool_choice="required" if isinstance(call.tool_choice, tuple) else call.tool_choice,
                            parallel_tool_calls=call.parallel))
    if chat and call.think is not None:
        off, on, level = THINK_SWITCHES[habits.think]
        body.update(off if call.think is False else on if call.think is True else level(call.think))
    if call.logprobs is not None:
        body.update(logprobs=True, top_logprobs=max(1, call.logprobs)) if chat \
            else body.update(logprobs=max(1, call.logprobs))
    if call.format is not None:
        body["response_format"] = {"type": "json_object"} if call.format == "json" else {
            "type": "json_schema", "json_schema": {"name": "response", "schema": call.format}}
    seconds = keep_alive_seconds(call.keep_alive)
    if habits.ttl and seconds and seconds > 0:
        body["ttl"] = max(1, int(seconds))
    return WireRequest("/chat/completions" if chat else "/completions", body)


def render_infill(call: ChatCall, stream: bool) -> WireRequest:
    """A prompt with a suffix -> POST /infill of llama.cpp, whose /completions has no suffix."""
    options = {OLLAMA_OPTION_KEYS[name]: value for name, value in call.options.items() if name != "max_tokens"}
    return WireRequest("/infill", {"model": call.model, "input_prefix": call.prompt, "input_suffix": call.suffix,
                                   "stream": stream, **present(n_predict=call.options.get("max_tokens")), **options})


def render_openai_embed(call: EmbedCall, habits: Habits) -> WireRequest:
    """EmbedCall -> POST /embeddings with nothing that strict servers refuse (upstreams rule 25)."""
    length = {habits.dimensions: call.dimensions} if call.dimensions else {}
    return WireRequest("/embeddings", {"model": call.model, "input": list(call.inputs), **length})


def read_openai_embeddings(answer: Any, count: int) -> tuple[list, Usage]:
    """Answer of /embeddings -> (vectors in input order, Usage); lists or base64 of float32.

    Raises BadUpstreamPayload when vectors are missing or unreadable.
    """
    if isinstance(answer, list):
        answer = {"data": answer}
    items = [item for item in as_list(as_dict(answer).get("data")) if isinstance(item, dict)]
    if all(isinstance(item.get("index"), int) for item in items):
        items.sort(key=lambda item: item["index"])
    usage = as_dict(as_dict(answer).get("usage"))
    return (read_vectors([item.get("embedding") for item in items], count),
            Usage(prompt_tokens=as_count(usage.get("prompt_tokens")) or as_count(usage.get("total_tokens"))))


def render_openai_embeddings(call: EmbedCall, vectors: list, usage: Usage, _took: int) -> dict:
    """Vectors -> answer of /v1/embeddings."""
    tokens = usage.prompt_tokens or 0
    return {"object": "list", "model": call.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "data": [
        {"object": "embedding", "index": at, "embedding":
         base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii") if call.base64 else vector}
        for at, vector in enumerate(vectors)]}


class ToolAssembler:
    """Fragments of tool calls -> whole calls, in order of first appearance (upstreams rules 62-73)."""

    def __init__(self) -> None:
        self._calls: list[dict] = []
        self._by_index: dict = {}

    def add(self, delta: dict) -> None:
        """Takes what a delta or a message holds of calls."""
        for fragment in as_list(delta.get("tool_calls")):
            if isinstance(fragment, dict):
                self._add(fragment)
        if isinstance(delta.get("function_call"), dict):
            self._add({"index": 0, "function": delta["function_call"]})
        if isinstance(delta.get("extra_content"), dict) and self._calls:
            self._calls[-1]["extra"]["extra_content"] = delta["extra_content"]      # of the latest call

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
            call = {"id": "", "name": "", "text": "", "last": "", "object": None, "extra": {}}
            self._calls.append(call)
            if isinstance(index, int):
                self._by_index[index] = call
        call["id"] = call["id"] or identifier
        call["name"] = call["name"] or name
        if isinstance(arguments, str):
            call["text"] += arguments
            call["last"] = arguments or call["last"]
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

    def close(self, cut: bool, message_extra: dict) -> tuple:
        """Returns the calls.  With `cut` (the length limit) those whose arguments cannot be read are left out."""
        calls = []
        for call in self._calls:
            if not call["name"]:
                continue
            arguments = call["object"] if call["object"] is not None else parse_arguments(call["text"])
            if arguments is None:       # some servers repeat the whole in the last fragment, or in each
                arguments = parse_arguments(call["last"])
            if arguments is None and cut:
                continue
            extra = present(call=call["extra"] or None, message=message_extra or None)
            used = call["id"] if call["id"] and all(call["id"] != other.id for other in calls) else call_id()
            raw = call["text"] if arguments is None else ""
            calls.append(ToolCall(used, call["name"], {"arguments": raw} if raw else arguments, extra or None, raw))
            message_extra = {}
        return tuple(calls)


def merge_details(details: list, pieces: list) -> None:
    """OpenRouter's reasoning_details arrive in pieces: text of the same entry is joined."""
    for piece in pieces:
        last = details[-1] if details else None
        if last is not None and piece.get("index") == last.get("index") and piece.get("type") == last.get("type"):
            for key, value in piece.items():
                if key in ("text", "summary", "data") and isinstance(value, str) and isinstance(last.get(key), str):
                    last[key] += value
                elif value is not None:
                    last[key] = value
        else:
            details.append(dict(piece))


class OpenAIDecoder:
    """SSE of /chat/completions or /completions -> events.  feed(bytes), then close().

    Holds the finish reason until usage, [DONE] or the end, because text and counts may still follow it; and tool
    calls until then, because they come in fragments.  `whole` says that the answer came in one piece.
    """

    frame_end = b"\n\n"

    def __init__(self, call: ChatCall) -> None:
        self._frames = FrameDecoder()
        self._tools = ToolAssembler()
        self._thinking: list[str] = []
        self._details: list = []
        self._usage: dict = {}
        self._timings: dict = {}
        self._reason = ""
        self._any = False               # something came that was an answer
        self._halves: dict = {}         # of surrogate pairs whose other halves come in another frame
        self._names = {plain_name(tool.name): tool.name for tool in call.tools}
        self._alternatives = call.logprobs
        self.taken = 0                  # frames that left more behind than their events
        self.done = self.whole = False

    @property
    def at_rest(self) -> bool:
        """Nothing is pending: a content frame is just its text (the shortcut of room 9 asks)."""
        return self._alternatives is None and not (self.done or self._reason or self._halves) and self._frames.idle

    def feed(self, data: bytes) -> list:
        """Returns the events of all complete frames.  A Failure or Finish is the last one, ever."""
        return self._run(lambda: self._frames.feed(data))

    def close(self) -> list:
        """The body ended.  Without finish reason and [DONE] that is a Failure."""
        events = self._run(self._frames.close)
        if self.done:
            return events
        if self._frames.stray and not self._any and not self._reason:
            data = b"\n".join(self._frames.stray)      # no stream: a printed JSON document, or a page of text
            answer = load_or_none(data)
            return events + (self._fail(BadUpstreamPayload(error_text(data, 502))) if answer is None
                             else self.decode_body(answer))
        if self._any and not self._reason:
            return events + self._fail(StreamTruncated("upstream closed the stream before finishing"))
        return events + self._finish()

    def decode_body(self, answer: Any) -> list:
        """A whole answer instead of a stream -> all events."""
        events = self._run(lambda: [("", answer)], whole=True)
        if self.done:
            return events
        if not self._any and not self._reason:
            return self._fail(BadUpstreamPayload("upstream sent an answer without choices"))
        return events + self._finish()

    def _run(self, frames: Callable, whole: bool = False) -> list:
        events: list = []
        try:
            for event, value in frames():
                if not self.done:
                    events += self._finish() if value is DONE else self._frame(event, value, whole)
            if self._frames.fault is not None and not self.done:
                raise self._frames.fault
        except UpstreamError as error:
            events += self._fail(error)
        return events

    def _fail(self, error: UpstreamError) -> list:
        failed, self.done = self.done, True
        return [] if failed else [Failure(error)]

    def _frame(self, event: str, value: Any, whole: bool) -> list:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = value[0]            # Gemini wraps errors in an array
        if not isinstance(value, dict):
            raise BadUpstreamPayload(f"upstream sent a JSON {json_kind(value)} where an answer was expected")
        if value.get("error") or event == "error" or (value.get("object") == "error" and "message" in value) \
                or ("detail" in value and "choices" not in value):
            raise stream_error(value)
        self._take_usage(value.get("usage"))
        self._take_usage(as_dict(value.get("x_groq")).get("usage"))
        self._timings = as_dict(value.get("timings")) or self._timings
        choices = as_list(value.get("choices"))
        if "stop" in value and not choices:     # llama.cpp's /infill
            cut = as_text(value.get("stop_type")) == "limit"
            choices = [{"text": value.get("content"), "finish_reason": cut and "length" or value["stop"] and "stop"}]
            self._take_usage({"prompt_tokens": value.get("tokens_evaluated"),
                              "completion_tokens": value.get("tokens_predicted")})
        events: list = []
        for choice in choices:
            if isinstance(choice, dict) and choice.get("index") in (0, None):
                self.whole = whole or ("message" in choice and "delta" not in choice)
                events += self._choice(choice)
                if self.whole and value.get("object") != "chat.completion.chunk" and not self._reason:
                    self._reason = "stop"       # a whole answer needs no reason to be one
        return events

    def _take_usage(self, usage: Any) -> None:
        if isinstance(usage, dict) and any(map(as_count, usage.values())):
            self._usage = usage

    def _choice(self, choice: dict) -> list:
        self._any = True
        delta = as_dict(choice.get("delta")) or as_dict(choice.get("message"))
        thinking = as_text(delta.get("reasoning_content")) or as_text(delta.get("reasoning"))
        details = [piece for piece in as_list(delta.get("reasoning_details")) if isinstance(piece, dict)]
        if details:
            thinking = thinking or "".join(as_text(piece.get("text") or piece.get("summary")) for piece in details)
            merge_details(self._details, details)
        content = choice.get("text") if delta.get("content") is None else delta["content"]
        if isinstance(content, list):
            parts = [parse_parts([part]) for part in content if isinstance(part, dict) and part.get("type")
                     in ("text", "thinking", "output_text", "reasoning", "refusal")]
            content = "".join(text for text, _, _ in parts)
            thinking = thinking or "".join(inner for _, _, inner in parts)
        events: list = []
        thinking = self._paired("thinking", thinking)
        if thinking:
            self._thinking.append(thinking)
            events.append(ThinkingDelta(thinking))
        text = self._paired("text", as_text(content) or as_text(delta.get("refusal")))
        if text:
            events.append(TextDelta(text, read_logprobs(choice.get("logprobs"), self._alternatives)))
        self._tools.add(delta)
        self.taken += bool(details or {"tool_calls", "function_call", "extra_content"} & delta.keys())
        self._take_usage(choice.get("usage"))
        reason = as_text(choice.get("finish_reason"))
        if reason.lower() in FINISH_ERROR:
            raise stream_error({"error": choice.get("error") or "upstream ended the answer with an error "
                                f"(finish_reason {one_line(reason, 40)})"})
        self._reason = reason if reason not in ("", "null") else self._reason
        return events

    def _paired(self, kind: str, text: str) -> str:
        """`text` in whole characters: half a surrogate pair waits for the other half in a later frame."""
        text = self._halves.pop(kind, "") + text if self._halves else text
        if text.isascii():
            return text
        if "\ud800" <= text[-1] <= "\udbff":
            self._halves[kind], text = text[-1], text[:-1]
        return whole_pairs(text)

    def _finish(self) -> list:
        reason = "length" if self._reason.lower() in FINISH_LENGTH else "stop"
        calls = self._tools.close(reason == "length", present(
            reasoning_details=self._details or None, reasoning_content="".join(self._thinking) or None))
        if not self._any and not self._reason:
            return self._fail(StreamTruncated("upstream sent an empty response"))
        self.done = True
        events: list = [(TextDelta if kind == "text" else ThinkingDelta)("\ufffd") for kind in self._halves]
        if calls:
            events.append(ToolCalls(tuple(call._replace(name=self._names.get(call.name, call.name)) for call in calls)))
        return events + [Finish(reason, read_usage(self._usage, self._timings))]


_LOGPROB = ("token", "logprob", "bytes")


def read_logprobs(value: Any, alternatives: Optional[int]) -> Optional[list]:
    """`logprobs` of a choice as OpenAI's content list, or None when nobody asked."""
    if alternatives is None or not isinstance(value, dict):
        return None
    items = value.get("content")
    if not isinstance(items, list):     # the older shape of /completions: parallel lists
        tops = [[{"token": token, "logprob": logprob} for token, logprob in as_dict(top).items()]
                for top in as_list(value.get("top_logprobs"))]
        lists = itertools.zip_longest(as_list(value.get("tokens")), as_list(value.get("token_logprobs")), tops)
        items = [{"token": token, "logprob": logprob, "top_logprobs": top} for token, logprob, top in lists
                 if logprob is not None]
    found = []
    for item in filter(None, map(as_dict, items)):
        tops = [as_dict(top) for top in as_list(item.get("top_logprobs"))[:alternatives]]
        found.append(present(**{key: item.get(key) for key in _LOGPROB}, top_logprobs=[
            present(**{key: top.get(key) for key in _LOGPROB}) for top in tops] or None))
    return found or None


def read_usage(usage: dict, timings: dict) -> Usage:
    """Counts and times wherever servers put them (upstreams rules 74-78)."""
    prompt, completion = as_count(usage.get("prompt_tokens")), as_count(usage.get("completion_tokens"))
    total = as_count(usage.get("total_tokens"))
    if total and prompt and total > prompt + (completion or 0):
        completion = total - prompt     # reasoning that was counted in the total only
    if timings:
        seen = (as_count(timings.get("cache_n")) or 0) + (as_count(timings.get("prompt_n")) or 0)
        return Usage(prompt or seen or None, completion or as_count(timings.get("predicted_n")),
                     nanoseconds(timings.get("prompt_ms"), 1e-3), nanoseconds(timings.get("predicted_ms"), 1e-3))
    return Usage(prompt, completion, nanoseconds(usage.get("prompt_time"), 1.0),
                 nanoseconds(usage.get("completion_time"), 1.0))


def whole_logprob(item: dict) -> dict:
    """An item with all the keys that OpenAI's have; Ollama leaves empty ones out."""
    def spelt(entry: dict) -> dict:
        return {"bytes": list(as_text(entry.get("token")).encode("utf-8", "replace")), **entry}

    return {**spelt(item), "top_logprobs": list(map(spelt, item.get("top_logprobs", ())))}


# How servers say that prompt and answer do not fit.
CONTEXT_OVERFLOW = re.compile(
    r"context.{0,20}(length|size|window|limit)|maximum context|exceeds? the available|too many tokens|n_ctx", re.I)
_ERROR_TITLE = re.compile(rb"<title[^>]*>(.*?)</title>", re.I | re.S)
# What nginx, Go and Apache answer to plain HTTP on a port for TLS.
_PLAIN_TO_TLS = re.compile(r"plain HTTP request was sent to HTTPS|HTTP request to an HTTPS|plain HTTP to an SSL", re.I)


def error_text(data: bytes, status: int) -> str:
    """The sentence in an error of any server: JSON in a dozen shapes, HTML, text, or nothing at all."""
    value = load_or_none(data)
    text = error_sentence(value)
    if value is None:
        title = _ERROR_TITLE.search(data[:8192])
        if title:
            text = str(title[1].strip(), "utf-8", "replace")
        elif data.lstrip()[:1] not in (b"<", b"{", b"["):
            text = str(data.strip()[:500], "utf-8", "replace")
    if _PLAIN_TO_TLS.search(text):
        text += ": write https:// instead of http://"
    return text or f"upstream returned HTTP {status}"


def error_sentence(value: Any) -> str:
    """The text in a decoded error, "" when there is none (upstreams rule 79)."""
    if isinstance(value, list):
        return "; ".join(filter(None, map(_problem, value)))
    if not isinstance(value, dict):
        return as_text(value)
    told = (error_sentence(value.get(key)) for key in ("error", "message", "detail", "msg", "error_type"))
    text = next(filter(None, told), "")
    raw = as_dict(value.get("metadata")).get("raw")     # OpenRouter: what the provider said
    if isinstance(raw, str) and raw and raw not in text:
        raw = error_sentence(load_or_none(raw.encode("utf-8", "replace"))) or raw
        text = f"{text}: {raw}" if text else raw
    return text


def _problem(problem: Any) -> str:
    """One entry of a list of errors; FastAPI says in `loc` where the trouble is."""
    where = ".".join(map(str, as_list(as_dict(problem).get("loc"))))
    what = error_sentence(problem)
    return f"{where}: {what}" if where else what


def is_about_key(status: int, text: str) -> bool:
    """Whether an error is about the key; LiteLLM without a database says so to any key but its own."""
    return status in (401, 403) or text == "No connected db."


def stream_error(value: dict) -> UpstreamError:
    """An error frame -> an exception with the status it names, else 502."""
    text = error_sentence(value) or "upstream reported an error without a text"
    error = as_dict(value.get("error"))
    for status in (error.get("status_code"), error.get("code"), value.get("code"), error.get("status")):
        if isinstance(status, str) and re.fullmatch("[0-9]{3}", status):
            status = int(status)
        if isinstance(status, int) and 400 <= status <= 599:
            return UpstreamRefused(text, status, body=value)
    return UpstreamError(text)


class OpenAIEncoder(Encoder):
    """Events -> SSE of /v1/chat/completions or /v1/completions, or one whole answer.

    One id and one date serve the whole stream.
    """

    tail = b"data: [DONE]\n\n"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._chat = self._call.face != "completion"
        self._base = {"id": ("chatcmpl-" if self._chat else "cmpl-") + call_id() + call_id(),
                      "object": "chat.completion.chunk" if self._chat else "text_completion",
                      "created": int(self._clock.wall()), "model": self._call.model, "system_fingerprint": "fp_ollama"}
        self._spoke = False
        self._calls = self._offset = 0
        self._around: Optional[tuple] = None

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
        if isinstance(event, Finish):
            frames = self._frame({"delta": {}} if self._chat else {"text": ""}, finish_reason=self._reason(event))
            if self._call.want_usage:
                frames += sse_frame({**self._base, "choices": [], "usage": self._usage(event.usage)})
            return frames
        if isinstance(event, ToolCalls):
            self._calls += len(event.calls)
            return b"".join(self._frame({"delta": {"tool_calls": [{"index": at, **self._tool_call(call)}]}})
                            for at, call in enumerate(event.calls, self._calls - len(event.calls)))
        self._deltas += 1
        if isinstance(event, ThinkingDelta):
            return self._frame({"delta": dict.fromkeys(self._reasoning, event.text)}) if self._chat else b""
        said = {"delta": {"content": event.text}} if self._chat else {"text": event.text}
        return self._frame(said, **present(logprobs=self._logprobs(event.logprobs)))

    def error(self, error: ProxyError) -> bytes:
        """The error frame; no [DONE] follows it."""
        return sse_frame(render_openai_error(error))

    def fold(self, events: Iterable) -> bytes:
        """All events -> the JSON for stream:false.  Raises the error of a Failure."""
        content, thinking, calls, logprobs, finish = gather(events)
        self._calls = len(calls)
        self._deltas = max(1, (len(content) + len(thinking)) // 4)
        said: dict = {"text": content}
        if self._chat:
            said = {"message": {"role": "assistant", "content": content or (None if calls else ""),
                                **(dict.fromkeys(self._reasoning, thinking) if thinking else {}),
                                **present(tool_calls=list(map(self._tool_call, calls)) or None)}}
        choice = {"index": 0, **said, "logprobs": self._logprobs(logprobs), "finish_reason": self._reason(finish)}
        return dump({**self._base, "object": "chat.completion" if self._chat else "text_completion",
                     "choices": [choice], "usage": self._usage(finish.usage)})

    def _frame(self, choice: dict, **beside: Any) -> bytes:
        if self._chat and not self._spoke:
            self._spoke = True
            choice["delta"] = {"role": "assistant", "content": "", **choice["delta"]}
        return sse_frame({**self._base, "choices": [{"index": 0, **choice, "finish_reason": None, **beside}]})

    def _logprobs(self, items: Optional[list]) -> Optional[dict]:
        """The items of the vocabulary in the shape of the endpoint: parallel lists in /v1/completions."""
        if not items or self._chat:
            return {"content": list(map(whole_logprob, items))} if items else None
        tokens = [as_text(item.get("token")) for item in items]
        offsets = list(itertools.accumulate(map(len, tokens), initial=self._offset))
        self._offset = offsets.pop()
        return {"tokens": tokens, "token_logprobs": [item.get("logprob") for item in items], "text_offset": offsets,
                "top_logprobs": [{as_text(top.get("token")): top.get("logprob") for top in item.get("top_logprobs", ())}
                                 for item in items]}

    def _tool_call(self, call: ToolCall) -> dict:
        return {"id": self._unused_id(call, "call_"), "type": "function",
                "function": {"name": call.name, "arguments": call.text}}

    def _reason(self, finish: Finish) -> str:
        return "length" if finish.reason == "length" else "tool_calls" if self._calls else "stop"

    def _usage(self, usage: Usage) -> dict:
        prompt = usage.prompt_tokens or self._call.prompt_tokens()
        completion = usage.completion_tokens or self._deltas
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


_ERROR_TYPES = {**dict.fromkeys((400, 405, 413, 415, 422), "invalid_request_error"), 401: "authentication_error",
                403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def render_openai_error(error: ProxyError) -> dict:
    """OpenAI's nested object; param is null because nothing here knows better."""
    return {"error": {"message": error.message, "type": _ERROR_TYPES.get(error.status, "api_error"),
                      "param": None, "code": error.code}}


def openai_model(info: ModelInfo) -> dict:
    """One entry of GET /v1/models."""
    return {"id": info.shown or info.id, "object": "model", "created": info.created or 0,
            "owned_by": info.owner or "library"}


OPENAI = Dialect("openai", parse_openai_chat, OpenAIEncoder, render_openai_error, parse_openai_embed,
                 render_openai_chat, render_openai_embed, read_openai_embeddings, render_openai_embeddings,
                 OpenAIDecoder)

# ----------------------------------------------------------------------------
# Room 7.  Anthropic dialect: /v1/messages, a face only (Messages API; ollama-api 4.9)
# ----------------------------------------------------------------------------

ANTHROPIC_FIELDS = {"model": str, "max_tokens": int, "messages": list, "system": object, "stream": bool,
                    "temperature": float, "top_p": float, "top_k": int, "stop_sequences": list, "tools": list,
                    "tool_choice": dict, "thinking": dict, "output_config": dict}
BLOCK_FIELDS = {"type": str, "text": str, "thinking": str, "source": dict, "id": str, "name": str, "input": object,
                "tool_use_id": str, "is_error": bool}
_BILLING = "x-anthropic-billing-header:"        # another one in each conversation: it would spoil every prompt cache
_BUDGETS = ((4096, "low"), (16384, "medium"))       # thinking.budget_tokens up to -> level; more is "high"


def parse_anthropic(body: dict, face: str = "chat") -> ChatCall:
    """POST /v1/messages, or with face "count" /v1/messages/count_tokens -> ChatCall.  Raises BadRequest."""
    body = typed(body, ANTHROPIC_FIELDS)
    model = required(body.get("model", "").strip(), "model is required")
    if face != "count" and body.get("max_tokens", 0) <= 0:
        raise BadRequest("max_tokens is required and must be positive")
    messages = required(body.get("messages"), "messages is required")
    turns, system = [], [block_texts(body.get("system", ""))]
    for message in messages:
        message = typed(message, MESSAGE_FIELDS, "messages")
        if message.get("role") == "system":             # Claude Code's later instructions
            system.append(block_texts(message.get("content", "")))
        else:
            turns += parse_blocks(message.get("role", "user"), message.get("content", ""))
    if any(system):
        turns.insert(0, Message("system", "\n\n".join(filter(None, system))))
    output = typed(body.get("output_config", {}), {"effort": str, "format": dict}, "output_config")
    choice = typed(body.get("tool_choice", {}), {"type": str, "disable_parallel_tool_use": bool}, "tool_choice")
    thinking = typed(body.get("thinking", {}), {"type": str, "budget_tokens": int}, "thinking")
    options = present(temperature=body.get("temperature"), top_p=body.get("top_p"), top_k=body.get("top_k"),
                      max_tokens=body.get("max_tokens"), stop=parse_stop(body.get("stop_sequences")) or None)
    return ChatCall(model, face, tie_results(tuple(turns)), tools=tuple(parse_anthropic_tools(body.get("tools", ()))),
                    tool_choice=parse_tool_choice(choice if choice.get("type") == "tool" else choice.get("type")),
                    parallel=False if choice.get("disable_parallel_tool_use") is True else None, options=options,
                    think=parse_thinking(thinking, output), stream=body.get("stream", False),
                    format=parse_response_format({**output["format"], "json_schema": output["format"]})
                    if "format" in output else None)


def block_texts(content: Any) -> str:
    """The text of a string or of text blocks, without the billing block."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"json: cannot unmarshal {json_kind(content)} into field system of type string")
    blocks = [typed(block, BLOCK_FIELDS, "system") for block in content]
    if any(block.get("type", "text") != "text" for block in blocks):
        raise BadRequest("system takes blocks of text alone, no image or other type")
    texts = [block.get("text", "") for block in blocks]
    return "".join(text for text in texts if not text.startswith(_BILLING))


def parse_blocks(role: str, content: Any) -> list[Message]:
    """One message -> the results of tools in it, then its own turn."""
    results, texts, thinking, images, calls = [], [], "", [], []
    if not isinstance(content, (str, list)):
        raise BadRequest(f"json: cannot unmarshal {json_kind(content)} into field content of type array")
    for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        block = typed(block, BLOCK_FIELDS, "content")
        kind = block.get("type")
        if kind == "text":
            texts.append(block.get("text", ""))
        elif kind == "image":
            images.append(parse_source(block.get("source", {})))
        elif kind == "thinking":
            thinking = block.get("thinking", "")
        elif kind in ("tool_use", "server_tool_use"):
            calls.append(parse_call({**block, "arguments": block.get("input")}))
        elif kind == "tool_result":
            inner = parse_blocks("tool", block.get("content", ""))[-1]
            text = f"Error: {inner.content}" if block.get("is_error") else inner.content
            results.append(inner._replace(content=text, tool_call_id=block.get("tool_use_id", "")))
        elif kind not in ("redacted_thinking", "web_search_tool_result"):       # nothing in them that can be read
            raise BadRequest(f"content blocks of type {one_line(str(kind), 40)} are not supported")
    turn = Message(role, "".join(texts), thinking, tuple(filter(None, images)), tuple(calls))
    return results + ([turn] if not results or turn.content or turn.images else [])


def parse_source(source: dict) -> Optional[Image]:
    """The `source` of an image block: base64, or a URL that the target must understand."""
    plain = source.get("type") == "base64"
    value = source.get("data") if plain else source.get("url")
    if not isinstance(value, str):
        raise BadRequest("invalid image input: a source of type base64 or url is expected")
    named = as_text(source.get("media_type")) or "image/jpeg"
    return parse_image(f"data:{named};base64,{value}" if plain and not value.startswith("data:") else value)


def parse_anthropic_tools(tools: Iterable) -> Iterator[Tool]:
    """Client tools -> Tool; those that Anthropic's servers run (web_search_20250305, ...) are left out."""
    for tool in tools:
        tool = typed(tool, {"type": str, "name": str, "description": str}, "tools")
        if tool.get("type", "custom") == "custom":
            name = required(tool.get("name"), "a tool has no name")
            yield Tool(name, tool.get("description", ""), schema_of(tool.get("input_schema")))


def parse_thinking(thinking: dict, output: dict) -> Any:
    """`thinking` and `output_config.effort` -> None, bool or level."""
    budget = thinking.get("budget_tokens")
    if thinking.get("type") == "disabled":
        return False
    if thinking.get("type") == "enabled" and isinstance(budget, int):
        return next((level for most, level in _BUDGETS if budget <= most), "high")
    if output.get("effort") == "xhigh":
        return "high"                   # ollama-api 4.9
    return EFFORTS.get(as_text(output.get("effort")), True if thinking.get("type") == "enabled" else None)


class AnthropicEncoder(Encoder):
    """Events -> SSE of /v1/messages, or one whole answer.  Blocks come one after the other, each with an index."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._message = {"id": "msg_" + call_id() + call_id() + call_id()[:6], "type": "message", "role": "assistant",
                         "model": self._call.model, "content": []}
        self._index, self._kind, self._called = -1, "", False

    def encode(self, event: Any) -> bytes:
        """Returns the frames of one event."""
        if isinstance(event, Finish):
            usage = self._usage(event.usage)
            delta = {"stop_reason": self._reason(event), "stop_sequence": event.stop or None}
            return self._begin() + self._stop() + self._frame("message_delta", delta=delta, usage=usage) \
                + self._frame("message_stop")
        self._deltas += 1
        if isinstance(event, ToolCalls):
            return self._begin() + b"".join(map(self._encode_call, event.calls))
        kind = "thinking" if isinstance(event, ThinkingDelta) else "text"
        opened = self._begin() + (b"" if self._kind == kind else self._start({"type": kind, kind: ""}))
        delta = {"type": f"{kind}_delta", kind: event.text}
        return opened + self._frame("content_block_delta", index=self._index, delta=delta)

    def alive(self) -> bytes:
        """An empty delta: Claude Code heeds no ping."""
        kind = self._kind or ("thinking" if self._call.think else "text")
        return self.encode(ThinkingDelta("") if kind == "thinking" else TextDelta(""))

    def error(self, error: ProxyError) -> bytes:
        """The error event; no message_stop follows it."""
        return self._frame("error", **render_anthropic_error(error))

    def fold(self, events: Iterable) -> bytes:
        """All events -> the JSON for stream:false.  Raises the error of a Failure."""
        content, thinking, calls, _, finish = gather(events)
        self._deltas, self._called = max(1, (len(content) + len(thinking)) // 4), bool(calls)
        blocks = [{"type": "thinking", "thinking": thinking, "signature": ""}] if thinking else []
        blocks += [{"type": "text", "text": content}] if content else []
        blocks += [{**self._tool_use(call), "input": call.arguments} for call in calls]
        return dump({**self._message, "content": blocks, "stop_reason": self._reason(finish),
                     "stop_sequence": finish.stop or None, "usage": self._usage(finish.usage)})

    @staticmethod
    def _frame(kind: str, **fields: Any) -> bytes:
        return b"event: %b\n" % kind.encode() + sse_frame({"type": kind, **fields})

    def _begin(self) -> bytes:
        if self._index >= 0:
            return b""
        usage = {"input_tokens": self._call.prompt_tokens(), "output_tokens": 1}
        self._index = 0
        return self._frame("message_start", message={**self._message, "stop_reason": None, "stop_sequence": None,
                                                     "usage": usage})

    def _start(self, block: dict) -> bytes:
        closed = self._stop()
        self._kind = block["type"]
        return closed + self._frame("content_block_start", index=self._index, content_block=block)

    def _stop(self) -> bytes:
        if not self._kind:
            return b""
        self._kind, self._index = "", self._index + 1
        return self._frame("content_block_stop", index=self._index - 1)

    def _encode_call(self, call: ToolCall) -> bytes:
        self._called = True
        # Claude Code makes an `input` of all that is JSON: it must be an object there.
        is_json = load_or_none(call.raw.encode("utf-8", "replace")) is not None
        delta = {"type": "input_json_delta", "partial_json": (call._replace(raw="") if is_json else call).text}
        started = self._start({**self._tool_use(call), "input": {}})
        return started + self._frame("content_block_delta", index=self._index, delta=delta) + self._stop()

    def _tool_use(self, call: ToolCall) -> dict:
        return {"type": "tool_use", "id": self._unused_id(call, "toolu_"), "name": call.name}

    def _reason(self, finish: Finish) -> str:
        if finish.stop:
            return "stop_sequence"
        return "max_tokens" if finish.reason == "length" else "tool_use" if self._called else "end_turn"

    def _usage(self, usage: Usage) -> dict:
        return {"input_tokens": usage.prompt_tokens or self._call.prompt_tokens(),
                "output_tokens": usage.completion_tokens or self._deltas}


_ANTHROPIC_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                     404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
                     529: "overloaded_error"}


def render_anthropic_error(error: ProxyError) -> dict:
    """Anthropic's nested object."""
    kind = _ANTHROPIC_ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message},
            "request_id": "req_" + call_id() + call_id()}


ANTHROPIC = Dialect("anthropic", parse_anthropic, Encoder=AnthropicEncoder, render_error=render_anthropic_error)

# ----------------------------------------------------------------------------
# Room 8.  Responses dialect: /v1/responses, a face only, stateless (OpenAI Responses API; ollama-api 4.7)
# ----------------------------------------------------------------------------

RESPONSES_FIELDS = {"model": str, "instructions": str, "input": object, "stream": bool, "temperature": float,
                    "top_p": float, "max_output_tokens": int, "tools": list, "tool_choice": object, "text": dict,
                    "reasoning": dict, "parallel_tool_calls": bool, "previous_response_id": str}
ITEM_FIELDS = {"type": str, "role": str, "id": str, "call_id": str, "name": str, "namespace": str, "content": object,
               "summary": list, "encrypted_content": str, "output": object, "input": str, "arguments": str}


def parse_responses(body: dict, face: str = "chat") -> ChatCall:
    """POST /v1/responses -> ChatCall; `labels` tell how the client named its tools.  Raises BadRequest."""
    body = typed(body, RESPONSES_FIELDS)
    model, given = required(body.get("model", "").strip(), "model is required"), body.get("input", "")
    if body.get("previous_response_id") or body.get("conversation"):
        raise BadRequest("previous_response_id is not supported here: nothing is stored, send the whole input")
    if not isinstance(given, (str, list)) or not given:
        raise BadRequest("input is required: a string or a list of items")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    tools, labels = parse_responses_tools(body.get("tools", ()))
    turns = [Message("system", body["instructions"])] if body.get("instructions") else []
    wanted = typed(body.get("text", {}), {"format": dict}, "text").get("format", {})
    choice = body.get("tool_choice")
    if not isinstance(choice, (str, dict, type(None))):
        raise BadRequest("tool_choice must be a word or an object")
    options = present(temperature=body.get("temperature"), top_p=body.get("top_p"),
                      max_tokens=body.get("max_output_tokens"))
    return ChatCall(model, face, tie_results(tuple(turns + parse_items(items))), options=options, labels=labels,
                    think=parse_effort({"reasoning": body.get("reasoning", {})}), stream=body.get("stream", False),
                    format=parse_response_format({**wanted, "json_schema": wanted}),
                    parallel=body.get("parallel_tool_calls"), **choose_tools(tools, choice))


def parse_items(items: list) -> list[Message]:
    """Input items -> turns: calls join the assistant turn before them, reasoning the one behind."""
    turns: list[Message] = []
    thinking = ""
    for at, item in enumerate(items):
        item = typed(item, ITEM_FIELDS, "input")
        kind = item.get("type", "message" if "role" in item else "")
        if kind == "message":
            turn = parse_message({"role": item.get("role", "user"), "content": item.get("content", "")})
            turns.append(turn._replace(thinking=thinking) if turn.role == "assistant" else turn)
            thinking = "" if turn.role == "assistant" else thinking
        elif kind == "reasoning":
            parts = as_list(item.get("content")) or item.get("summary", [])
            thinking = item.get("encrypted_content") or "".join(as_text(as_dict(part).get("text")) for part in parts)
        elif kind in ("function_call", "custom_tool_call"):
            arguments = {"input": item.get("input", "")} if kind == "custom_tool_call" else item.get("arguments")
            call = parse_call({"id": item.get("call_id", ""), "arguments": arguments,
                               "name": flat_name(item.get("namespace", ""), item.get("name", ""))})
            if not turns or turns[-1].role != "assistant":
                turns.append(Message("assistant", thinking=thinking))
                thinking = ""
            turns[-1] = turns[-1]._replace(tool_calls=turns[-1].tool_calls + (call,))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            result = parse_message({"role": "tool", "content": item.get("output", "")})
            turns.append(result._replace(tool_call_id=item.get("call_id", "")))
        elif not kind.endswith("_call"):        # web_search_call and others that a hosted tool has left
            raise BadRequest(f'input[{at}]: unknown input item type: "{one_line(kind, 40)}"')
    return turns


_ONE_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def flat_name(namespace: str, name: str) -> str:
    """The name under which the model sees a tool of a namespace."""
    return f"{namespace}__{name}" if namespace else name


def parse_responses_tools(tools: Iterable) -> tuple[tuple, dict]:
    """(Tools, name -> how the client calls it): functions, those inside namespaces, custom tools as functions of one
    text.  Hosted tools (web_search, local_shell, ...) run at OpenAI alone, and are left out."""
    found, labels = [], {}
    for tool in tools:
        tool = typed(tool, {"type": str, "name": str, "description": str, "tools": list}, "tools")
        namespace = tool.get("name", "") if tool.get("type") == "namespace" else ""
        for one in tool.get("tools", ()) if namespace else (tool,):
            kind = as_dict(one).get("type")
            if kind not in ("function", "custom"):
                continue
            name = required(as_text(one.get("name")), "a tool has no name")
            flat = flat_name(namespace, name)
            labels[flat] = {**present(namespace=namespace or None), "name": name, "custom": kind == "custom"}
            if kind == "function":
                found += [parsed._replace(name=flat) for parsed in parse_tools([{"type": kind, "function": one}])]
                continue
            grammar = as_text(as_dict(one.get("format")).get("definition"))
            told = [as_text(one.get("description")), grammar and f"The input must follow this grammar:\n{grammar}"]
            found.append(Tool(flat, "\n\n".join(filter(None, told)), _ONE_TEXT))
    return tuple(found), labels


# What the text of an item and the part around it are called in events.
_PARTS = {"message": ("output_text", "content_part"), "reasoning": ("reasoning_summary_text", "reasoning_summary_part")}


class ResponsesEncoder(Encoder):
    """Events -> SSE of /v1/responses, or one whole answer.  Items come one after the other; each is whole in its
    `done` event, and again in the last."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._created = int(self._clock.wall())
        self._id = "resp_" + call_id() + call_id()
        self._output: list[dict] = []       # items that are done
        self._item: dict = {}               # the one that is open
        self._text: list[str] = []          # of the open item
        self._number, self._thought = 0, 0

    def encode(self, event: Any) -> bytes:
        """Returns the frames of one event."""
        if isinstance(event, Finish):
            frames, response = self._begin() + self._close(), self._ended(event)
            return frames + self._frame(response["status"], response=response)
        self._deltas += 1
        if isinstance(event, ToolCalls):
            return self._begin() + self._close() + b"".join(map(self._encode_call, event.calls))
        self._thought += isinstance(event, ThinkingDelta)
        kind = "reasoning" if isinstance(event, ThinkingDelta) else "message"
        frames = self._begin() + (b"" if self._item.get("type") == kind else self._close() + self._open(kind))
        self._text.append(event.text)
        return frames + self._frame(f"{_PARTS[kind][0]}.delta", **self._place(kind), delta=event.text)

    def alive(self) -> bytes:
        """The state of the response, once more."""
        return self._begin() or self._frame("in_progress", response=self._response("in_progress", None))

    def error(self, error: ProxyError) -> bytes:
        """The failed response; nothing follows it."""
        failed = {"code": _failure_code(error), "message": error.message}
        return self._begin() + self._frame("failed", response=self._response("failed", Usage(), error=failed))

    def fold(self, events: Iterable) -> bytes:
        """All events -> the JSON for stream:false.  Raises the error of a Failure."""
        finish = Finish("stop", Usage())
        for event in events:
            if isinstance(event, Failure):
                raise event.error
            self.encode(event)
            finish = event if isinstance(event, Finish) else finish
        return dump(self._ended(finish))

    def _frame(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        name = f"response.{kind}"
        return b"event: %b\n" % name.encode() + sse_frame({"type": name, "sequence_number": number, **fields})

    def _begin(self) -> bytes:
        if self._number:
            return b""
        begun = self._response("in_progress", None)
        return self._frame("created", response=begun) + self._frame("in_progress", response=begun)

    def _place(self, kind: str) -> dict:
        """Where a part stands that has begun, or grows."""
        index = {"summary_index": 0} if kind == "reasoning" else {"content_index": 0}
        return {"item_id": self._item["id"], "output_index": len(self._output), **index}

    def _part(self, kind: str, text: str) -> dict:
        return {"type": "summary_text", "text": text} if kind == "reasoning" else {
            "type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _open(self, kind: str) -> bytes:
        self._text = []
        self._item = {"type": "reasoning", "id": "rs_" + call_id(), "summary": []} if kind == "reasoning" else {
            "type": "message", "id": "msg_" + call_id(), "status": "in_progress", "role": "assistant", "content": []}
        return self._frame("output_item.added", output_index=len(self._output), item=self._item) \
            + self._frame(f"{_PARTS[kind][1]}.added", **self._place(kind), part=self._part(kind, ""))

    def _close(self) -> bytes:
        if not self._item:
            return b""
        kind, text = self._item["type"], "".join(self._text)
        name, part = _PARTS[kind]
        place, whole = self._place(kind), self._part(kind, text)
        frames = self._frame(f"{name}.done", **place, text=text) + self._frame(f"{part}.done", **place, part=whole)
        item = {**self._item, "summary": [whole], "encrypted_content": text} if kind == "reasoning" else {
            **self._item, "status": "completed", "content": [whole]}
        self._item = {}
        return frames + self._done(item)

    def _done(self, item: dict) -> bytes:
        self._output.append(item)
        return self._frame("output_item.done", output_index=len(self._output) - 1, item=item)

    def _encode_call(self, call: ToolCall) -> bytes:
        label = dict(self._call.labels.get(call.name, {"name": call.name}))
        custom = label.pop("custom", False)
        key, kind = ("input", "custom_tool_call") if custom else ("arguments", "function_call")
        given = call.arguments.get("input") if custom else None
        text = given if isinstance(given, str) else call.text       # no patch is lost
        item = {"type": kind, "id": ("ctc_" if custom else "fc_") + call_id(), **label,
                "call_id": call.id or "call_" + call_id(), "status": "in_progress", key: ""}
        place = {"item_id": item["id"], "output_index": len(self._output)}
        name = "custom_tool_call_input" if custom else "function_call_arguments"
        return self._frame("output_item.added", output_index=len(self._output), item=item) \
            + self._frame(f"{name}.delta", **place, delta=text) + self._frame(f"{name}.done", **place, **{key: text}) \
            + self._done({**item, "status": "completed", key: text})

    def _ended(self, finish: Finish) -> dict:
        """The response object at its end."""
        cut = finish.reason == "length"
        details = {"reason": "max_output_tokens"} if cut else None
        return self._response("incomplete" if cut else "completed", finish.usage, incomplete_details=details)

    def _response(self, status: str, usage: Optional[Usage], **beside: Any) -> dict:
        """The response object as it is by now."""
        call = self._call
        told = None
        if usage is not None:
            read, written = usage.prompt_tokens or call.prompt_tokens(), usage.completion_tokens or self._deltas
            told = {"input_tokens": read, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": written,
                    "output_tokens_details": {"reasoning_tokens": min(self._thought, written)},
                    "total_tokens": read + written}
        return {"id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
                "incomplete_details": None, "instructions": None, "model": call.model, "output": list(self._output),
                "max_output_tokens": call.options.get("max_tokens"), "parallel_tool_calls": call.parallel is not False,
                "previous_response_id": None, "store": False, "temperature": call.options.get("temperature"),
                "top_p": call.options.get("top_p"), "tool_choice": "auto", "tools": [], "truncation": "disabled",
                "metadata": {}, "usage": told, **beside}


def _failure_code(error: ProxyError) -> str:
    """What Codex and the SDKs read: which failures are final, and which are worth another try."""
    if CONTEXT_OVERFLOW.search(error.message):
        return "context_length_exceeded"
    codes = {402: "insufficient_quota", 429: "rate_limit_exceeded", 503: "server_is_overloaded",
             529: "server_is_overloaded"}
    return codes.get(error.status, "invalid_prompt" if 400 <= error.status < 500 else "server_error")


RESPONSES = Dialect("responses", parse_responses, Encoder=ResponsesEncoder, render_error=render_openai_error)

# ----------------------------------------------------------------------------
# Room 9.  Translation: a decoder and an encoder joined into a generator of lines
#
# Pieces of the target's body go in, a list of client lines comes out for each of them.  Between
# decoder and encoder stand steps: small filters of events, one for each thing that text may hide.
# ----------------------------------------------------------------------------

# What opens reasoning, what closes it, and whether another mark may follow.  A model opens it before its first word,
# or not at all; a mark that nothing closes stands before the answer.
THINK_MARKS = (
    ("<think>", "</think>", False), ("<thinking>", "</thinking>", False), ("<thought>", "</thought>", False),
    ("<reasoning>", "</reasoning>", False), ("[THINK]", "[/THINK]", False),             # the last is Mistral's
    ("<seed:think>", "</seed:think>", False), ("◁think▷", "◁/think▷", False),           # ByteDance, Moonshot
    ("<|channel>thought", "<channel|>", False), ("<|channel>", "<channel|>", False),    # Gemma
    ("<|START_THINKING|>", "<|END_THINKING|>", True), ("<|START_RESPONSE|>", "", False),            # Cohere
    ("<|channel|>analysis<|message|>", "<|end|>", True), ("<|channel|>final<|message|>", "", False),    # gpt-oss
    ("<|start|>assistant<|channel|>analysis<|message|>", "<|end|>", True),
    ("<|start|>assistant<|channel|>final<|message|>", "", False),
)
_CLOSERS = tuple(closer for _, closer, _ in THINK_MARKS[:5])


def partial_at(marks: Iterable, text: str) -> int:
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
            spoken = type(event) is TextDelta
            if spoken:
                self._held += event.text
            certain = self.feed() if spoken else self.flush(event)
            if isinstance(certain, str):
                certain = [TextDelta(certain, event.logprobs if spoken else None)] if certain else []
            kept += certain if spoken else certain + [event]
            if kept and type(kept[-1]) is Finish:
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
        self._spoke, self._closers, self._again = False, _CLOSERS, False
        self.begins_inside: Optional[bool] = None

    def feed(self) -> Any:
        events: list = []
        passed: Any = None              # one text may pass several states
        while passed != (self._state, self._held):
            passed = (self._state, self._held)
            if self._state == "start":
                self._start()
            elif self._state == "inside":
                events += self._inside()
            elif self._state == "after" and self._held.lstrip():        # white space between the mark and the answer
                self._held, self._state = self._held.lstrip(), "start" if self._again else "plain"
        if self._state == "plain":
            self.idle = True
            return events + [TextDelta(super().feed())] if events else super().feed()
        return events

    def flush(self, event: Any) -> Any:
        """Any event but text ends the search: who splits reasoning off by itself leaves no tags in the text."""
        if self._opened and self._state == "inside" and isinstance(event, Finish) and event.reason != "length":
            self.begins_inside = False          # no tag came: too late for this answer, learned for the next
        state, self._state, self.idle, held = self._state, "plain", True, self.take(len(self._held))
        if state == "inside":
            return [ThinkingDelta(held.rstrip())] if held.strip() else []
        return held if state != "after" else ""

    def _start(self) -> None:
        begun = self._held.lstrip()
        if any(opener.startswith(begun) and opener != begun for opener, _, _ in THINK_MARKS):
            return
        mark = next((mark for mark in THINK_MARKS if begun.startswith(mark[0])), None)
        if mark:
            self._held, self._closers, self._again = begun[len(mark[0]):], mark[1:2], mark[2]
            self._state = "inside" if mark[1] else "after"
        elif self._decoder.whole and begun[:1] != "<" and any(closer in begun for closer in _CLOSERS):
            self._state, self.begins_inside = "inside", True
        else:
            self._state = "plain"

    def _inside(self) -> list:
        if not self._spoke:
            self._held = self._held.lstrip()
        at, closer = min(((self._held.find(closer), closer) for closer in self._closers if closer in self._held),
                         default=(partial_at(self._closers, self._held.rstrip()), ""))
        # Trailing space, and half a closing tag, may be dropped yet.
        thinking = self.take(len(self._held[:at].rstrip()))
        if closer:
            self._held, self._state = self._held.lstrip()[len(closer):], "after"
        self._spoke = self._spoke or bool(thinking)
        return [ThinkingDelta(thinking)] if thinking else []


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
        found = [(at, stop) for at, stop in zip(map(self._held.find, self._stops), self._stops) if at >= 0]
        if not found:
            return self.take(partial_at(self._stops, self._held))
        at, stop = min(found)
        text = self.take(at)
        return ([TextDelta(text)] if text else []) + [Finish("stop", Usage(), stop)]


class Reasoning(Step):
    """Applies --reasoning: "drop" leaves thinking out, "merge" puts it into the text between think tags."""

    def __init__(self, mode: str) -> None:
        self._merge, self._open = mode == "merge", False

    def __call__(self, events: list) -> list:
        kept: list = []
        for event in events:
            if not isinstance(event, ThinkingDelta):
                kept += [TextDelta("\n</think>\n\n"), event] if self._open else [event]
                self._open = False
            elif self._merge:
                kept.append(TextDelta(event.text if self._open else f"<think>\n{event.text}"))
                self._open = True
        return kept


class Told(Exception):
    """A stream broke after its first line, and the client was told so in its own dialect."""


class Translation:
    """The target's body in, lines for the client out; sans-I/O, like its two halves.

    `observe(events)` sees every event, after the steps, but for text that takes the shortcut; `redact(text)` hides
    keys in errors, `tap(label, bytes)` shows every chunk to --debug.  steps_for (room 14) picks the steps.
    """

    def __init__(self, decoder: Any, encoder: Any, steps: Iterable = (), observe: Callable = lambda events: None,
                 redact: Callable = lambda text: text, tap: Optional[Callable] = None, shortcut: bool = True) -> None:
        self.decoder, self.encoder, self._steps, self._observe = decoder, encoder, list(steps), observe
        self._redact, self._tap = redact, tap
        self.shortcut = Shortcut(self) if shortcut and tap is None and hasattr(encoder, "around") else None
        self._failure: Optional[ProxyError] = None
        self._ended = False

    def lines(self, pieces: Iterable) -> Iterator[list]:
        """One list of lines for each piece that says something: a line that is ready never waits for the next piece.
        Agents get a frame without meaning when long nothing was said, while a call grows for one; b"" is a pause.

        Raises what broke before the first line, which can still be an HTTP status; later the client gets its
        dialect's in-band error, and Told is raised.
        """
        started, spoke = False, time.monotonic()
        try:
            for data in itertools.chain(pieces, [None]):
                lines = [] if data == b"" else \
                    self.shortcut.feed(data) if self.shortcut and data is not None else self.read(data)[0]
                if not lines and self.encoder.alive and time.monotonic() - spoke >= SIGN_OF_LIFE:
                    lines = [self.encoder.alive()]
                if lines:
                    started, spoke = True, self.encoder.alive and time.monotonic()
                    yield lines
                if self._ended:
                    break
            if self._failure is not None:
                raise self._failure
        except ProxyError as error:     # ClientGone, too: the client's socket is shut by then, and the send fails
            if not started:
                raise
            error.message = self._redact(error.message)
            yield [self.encoder.error(error)]
            raise Told(error.message) from None

    def whole(self, data: bytes) -> bytes:
        """The answer for stream:false, whatever the target sent: one document, or a stream all the same."""
        answer = load_or_none(data)
        events = self.decoder.decode_body(answer) if isinstance(answer, (dict, list)) \
            else self.decoder.feed(data) + self.decoder.close()
        return self.encoder.fold(self._filtered(events))

    @property
    def at_rest(self) -> bool:
        """Nothing is pending: a content frame is just its text.  While a step is at work, nothing is certain."""
        return self.decoder.at_rest and not self._steps

    def read(self, data: Optional[bytes]) -> tuple[list, list]:
        """(client lines, the decoder's events) of a piece; None is the end of the body."""
        if self._tap and data:
            self._tap("Target chunk", data)
        decoded = self.decoder.close() if data is None else self.decoder.feed(data)
        lines = []
        self.encoder.tick()
        for event in self._filtered(decoded) if not self._ended else ():    # what a step ended is over
            try:
                if isinstance(event, Failure):
                    raise event.error
                lines.append(self.encoder.encode(event))
            except ProxyError as error:     # the target's, or what the client's dialect cannot write
                self._failure, self._ended = error, True
                break
            if isinstance(event, Finish):
                self._ended = True
                lines.append(self.encoder.tail)
        lines = [line for line in lines if line]
        if self._tap and lines:
            self._tap("Client chunk", b"".join(lines))
        return lines, decoded

    def _filtered(self, events: list) -> list:
        for step in self._steps:
            events = step(events)
        if self._steps and all(step.idle for step in self._steps):
            self._steps = []
        self._observe(events)
        return events


def with_pauses(pieces: Iterator) -> Iterator[bytes]:
    """`pieces`, and b"" for every SIGN_OF_LIFE seconds before the first of them, which another thread waits for: the
    target says nothing while it reads a long prompt."""
    found: list = []

    def wait() -> None:
        try:
            found.append(next(pieces, b""))
        except BaseException as error:  # noqa: BLE001  it is raised where somebody waits for it
            found.append(error)

    waiting = threading.Thread(target=wait, name=threading.current_thread().name, daemon=True)
    try:
        waiting.start()
    except RuntimeError:                # no more threads: then without signs
        wait()
    while not found:
        waiting.join(SIGN_OF_LIFE)
        if not found:
            yield b""
    if isinstance(found[0], BaseException):
        raise found[0]
    yield from itertools.chain(found, pieces)


def primed(lines: Iterator) -> Iterable:
    """`lines`, once the first of them are there: an early failure still is an HTTP status."""
    return itertools.chain([next(lines, [])], lines)


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

    def __init__(self, translation: Translation) -> None:
        self._decoder, self._encoder, self._translation = translation.decoder, translation.encoder, translation
        self.head = self._tail = b""   # what stands before and after a text
        self._lessons = self._LESSONS

    def feed(self, data: bytes) -> list:
        """Client lines for `data`."""
        lines: list = []
        at, end = 0, self._decoder.frame_end
        while at < len(data):
            if self.head and self._translation.at_rest and data.startswith(self.head, at):
                begun, (texts, at) = at, self._cut(data, at)
                if texts:
                    self._lessons = self._LESSONS
                    before, after = self._encoder.around(texts)
                    lines += [before + text + after for text in texts]
                if at > begun:
                    continue
            stop = data.find(end, at) if self._lessons else -1
            piece, at = (data[at:stop + len(end)], stop + len(end)) if stop >= 0 else (data[at:], len(data))
            whole, taken = self._translation.at_rest and piece.endswith(end), self._decoder.taken
            made, events = self._translation.read(piece)
            lines += made
            if whole and self._lessons and list(map(type, events)) == [TextDelta] and self._translation.at_rest \
                    and self._decoder.taken == taken:
                self._learn(piece, events[0].text)
        return lines

    def _learn(self, frame: bytes, said: str) -> None:
        """What surrounds the text of a frame that said nothing else, and left nothing behind in the decoder?"""
        self._lessons -= 1
        for text in (encode_text(said).encode("ascii"), b'"%b"' % said.encode("utf-8", "replace")):
            head, found, tail = frame.rpartition(text)
            if found and len(frame) < SHORT_FRAME \
                    and self._decoder.feed(head + b'"probe"' + tail) == [TextDelta("probe")]:
                self.head, self._tail = head + b'"', b'"' + tail
                return

    def _cut(self, data: bytes, at: int) -> tuple[list, int]:
        """(texts of the frames from `at` on that fit, as the client gets them; where the first other one begins)."""
        texts: list = []
        for frame in data[at:].split(self._tail)[:-1]:
            text = frame[len(self.head):]
            plain = text if _PLAIN_TEXT.fullmatch(text) else rewritten(text)
            if plain is None or not frame.startswith(self.head):
                break
            if plain:                   # an empty one is no event
                texts.append(plain)
            at += len(frame) + len(self._tail)
        return texts, at


# A JSON string's content that our encoders write in the same way: ASCII, with the shortest escapes.
_PLAIN_TEXT = re.compile(rb'(?:[ !#-\[\]-~]|\\["\\nrtbf])*')


def rewritten(text: bytes) -> Optional[bytes]:
    """The content of a JSON string as our encoders write it; None when it is none."""
    quoted = f'"{str(text, "utf-8", "replace")}"'
    if "\n" in quoted or "\r" in quoted:
        return None
    try:
        value, end = _read_json(quoted)
        value.encode("utf-8")           # half a surrogate pair is the decoder's affair
    except ValueError:
        return None
    return encode_text(value)[1:-1].encode("ascii") if end == len(quoted) else None

# ----------------------------------------------------------------------------
# Room 10.  Configuration: presets, flags and environment become one frozen value
#
# A flag beats the environment, which beats the env file, which beats the default.
# ----------------------------------------------------------------------------


class Preset(NamedTuple):
    """One known server: where it is, which variable holds its key, and how it differs.

    `hosts` recognises it behind a plain URL; `lessons` is what self-healing would find out anyway
    (room 13): a key to another name, or to None for leaving it out.
    """

    url: str = ""
    key_env: str = ""
    hosts: tuple = ()
    api: str = "openai"
    habits: Habits = Habits(think="template")
    lessons: dict = {}
    strip_vendor: bool = False
    key_header: str = "authorization"


_STRICT, _CUTS = Habits(strict=True), Habits(think="template", limit_chat=True)
_NO_PENALTIES = {"seed": None, "presence_penalty": None, "frequency_penalty": None}
_MISTRAL = Habits(strict=True, think="high", tool_ids="nine", bridge=True, dimensions="output_dimension")
_AZURE_HOSTS = ("*.openai.azure.com", "*.cognitiveservices.azure.com", "*.services.ai.azure.com")

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
    "openai": Preset("https://api.openai.com/v1", "OPENAI_API_KEY", ("api.openai.com",), habits=_STRICT),
    "azure": Preset("", "AZURE_OPENAI_API_KEY", _AZURE_HOSTS, habits=_STRICT, key_header="api-key"),
    "openrouter": Preset("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", ("openrouter.ai", "*.openrouter.ai"),
                         habits=Habits(think="reasoning"), strip_vendor=True),
    "deepseek": Preset("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY", ("api.deepseek.com",),
                       habits=Habits(strict=True, think="thinking", echo=("reasoning_content",))),
    "groq": Preset("https://api.groq.com/openai/v1", "GROQ_API_KEY", ("api.groq.com",), habits=_STRICT),
    "mistral": Preset("https://api.mistral.ai/v1", "MISTRAL_API_KEY", ("api.mistral.ai",), habits=_MISTRAL,
                      lessons={"seed": "random_seed", "stream_options": None}),
    "together": Preset("https://api.together.xyz/v1", "TOGETHER_API_KEY", ("api.together.xyz", "api.together.ai"),
                       habits=Habits(think="reasoning")),
    "fireworks": Preset("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY", ("api.fireworks.ai",),
                        habits=Habits()),
    "gemini": Preset("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY",
                     ("generativelanguage.googleapis.com",), habits=_STRICT, lessons=_NO_PENALTIES),
    "xai": Preset("https://api.x.ai/v1", "XAI_API_KEY", ("api.x.ai",), habits=_STRICT)}


class UsageError(Exception):
    """A setting that cannot be used: one line for the user, exit status 2."""


def bracketed(host: str) -> str:
    """A host as URLs write it (RFC 3986 section 3.2.2)."""
    return f"[{host}]" if ":" in host else host


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
    api: str = ""                   # "openai" or "ollama", when that is known

    @property
    def place(self) -> tuple:
        """What tells it from other servers."""
        return self[:3]

    @property
    def url(self) -> str:
        """As a user would write it, for banners and errors; never with a key."""
        return f"{self.scheme}://{self.authority}{self.root if self.api == 'ollama' else self.base}"

    @property
    def authority(self) -> str:
        """host[:port] as the Host header wants it."""
        plain = self.port == {"http": 80, "https": 443}[self.scheme]
        return bracketed(self.host) + ("" if plain else f":{self.port}")

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
        near = did_you_mean(name, PRESETS) if re.fullmatch(r"[\w-]+|\w+\.cpp", name) else ""
        if near or re.match(r"https?:/?[^/]|[0-9]+$", name):
            what = f"no such preset{near}" if near else "write http://HOST:PORT"
            raise UsageError(f"bad target {one_line(value, 100)!r}: {what}")
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
    # What people paste from manuals.
    path = re.sub(r"/(chat/completions|completions|embeddings|models|responses|messages"
                  r"|api(/(chat|generate|tags))?)$", "", path)
    base = path or ("" if api == "ollama" else "/v1")
    root = path[:-3] if path.endswith("/v1") else path
    return Target(parts.scheme, parts.hostname, port or {"http": 80, "https": 443}[parts.scheme],
                  root, base or root + "/v1", parts.query, preset=preset, name=name, key_header=preset.key_header)


class Setting(NamedTuple):
    """One row per setting: flags, environment, default and help all derive from it."""

    flags: str
    metavar: str
    default: Any
    help: str
    parse: Callable = str
    env: str = ""                   # other variables, read after OLLAMA_PROXY_<FIELD>
    secret: bool = False
    repeat: str = ""                # may be given more than once; what separates the values in a variable
    optional: Any = None            # the value of the flag when it stands alone

    @property
    def field(self) -> str:
        """The name in Config."""
        return self.flags.split()[0][2:].replace("-", "_")

    @property
    def reader(self) -> Callable:
        """What makes a value of a text: told by the metavar where that is a list of words, or nothing."""
        words = self.metavar.split("|")
        chosen = _one_of(*words) if words[1:] and self.metavar.islower() else self.parse
        return chosen if self.metavar else _switch_value

    @property
    def variables(self) -> tuple:
        """Environment variables in the order they are asked."""
        return ("OLLAMA_PROXY_" + self.field.upper(),) + tuple(self.env.split())


def _number(kind: type, least: float, most: float = 1e6) -> Callable:
    def parse(text: Any) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"must be a {'whole ' if kind is int else ''}number") from None
        if not least <= value <= most:
            raise ValueError(f"must be between {least:.12g} and {most:.12g}")
        return value
    return parse


def _switch_value(text: Any) -> bool:
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
    if ("[" in host and not host.endswith("]")) or re.search(":[0-9]{5}$", host):
        raise ValueError("[HOST]:PORT is expected")
    if port and (not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535):
        raise ValueError("the port must be a number up to 65535")
    return host.strip("[]"), int(port) if port else OLLAMA_PORT


def parse_set(text: str) -> tuple[str, dict]:
    """PATTERN:KEY=VALUE,... -> (glob on model names, options).  Raises ValueError, and BadRequest for a bad value."""
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
    parse_options(values)
    parse_think(values.get("think"))
    parse_format(values.get("format"))
    parse_keep_alive(values.get("keep_alive"))
    _one_of("separate", "merge", "drop")(str(values.get("reasoning", "separate")))
    for word in comma_list(str(values.get("capabilities", ""))):
        if word.lstrip("-") not in CAPABILITIES:
            raise ValueError(f"capabilities are {', '.join(CAPABILITIES)}, and not {word}")
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


def parse_origins(text: str) -> tuple:
    """A list of browser origins -> tuple; each names its scheme."""
    for origin in comma_list(text):
        if origin != "*" and "://" not in origin:
            raise ValueError(f"{origin} is no origin such as https://chat.example.com")
    return comma_list(text)


def parse_version(text: str) -> str:
    """X.Y.Z, which clients compare number by number."""
    if not re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+\S*", text):
        raise ValueError("X.Y.Z is expected")
    return text


def plural(count: int, noun: str) -> str:
    """"1 model", "2 models"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def did_you_mean(word: str, words: Iterable) -> str:
    """" (did you mean ...?)" when one of `words` is near."""
    import difflib                      # needed for mistakes alone
    near = difflib.get_close_matches(word, list(words), 1, 0.75)
    return f" (did you mean {near[0]}?)" if near else ""


def comma_list(text: str) -> tuple:
    """"a, b" -> ("a", "b")."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


# In groups, as --help and the README show them.
GROUPS = {"target": "Target", "listen": "Listening", "models_filter": "Models", "reasoning": "Thinking",
          "client_key": "Security and TLS", "timeout": "Limits", "debug": "Logs", "env_file": "Else"}
SETTINGS = (
    Setting("--target --lmstudio-url --base-url", "URL|PRESET", DEFAULT_TARGET,
            "the server; a URL without a path gets /v1; or a preset: " + ", ".join(PRESETS), env="OLLAMA_BASE_URL"),
    Setting("--target-api", "auto|openai|ollama", "auto", "what the server speaks; auto asks it"),
    Setting("--api-key", "KEY", "", "key for the server; a preset also reads its own variable", secret=True),
    Setting("--forward-auth", "", False, "pass a client's own key on to the server"),
    Setting("--header", "'K: V'", (), "a header for every target request", parse_header, repeat="\n", secret=True),
    Setting("--fallback", "URL", "", "a real Ollama for endpoints that are not served here; without a "
            "value " + DEFAULT_FALLBACK, optional=DEFAULT_FALLBACK),
    Setting("--translate", "auto|always|never", "auto",
            "make chats of /v1/messages and /v1/responses: where the server lacks them, always, or never"),
    Setting("--generate-via", "chat|completions", "chat", "where /api/generate goes"),
    Setting("--listen", "[HOST]:PORT", "127.0.0.1:11434",
            "where clients come; :PORT is every interface; 127.0.0.1:4000 when the server is an Ollama on 11434",
            parse_listen),
    Setting("--host", "HOST", "", "the host part of --listen alone"),
    Setting("--port", "PORT", None, "the port part of --listen alone", _number(int, 0, 65535)),
    Setting("--workers", "N", 1, "processes on one socket (POSIX)", _number(int, 1, 256)),
    Setting("--models-filter", "FILE", "", "which models exist: one name or glob a line, # comments, "
            "! excludes; models-filter.txt is read when present"),
    Setting("--alias", "NAME=ID", (), "another name for a model; NAME may be a glob", parse_alias, repeat=";"),
    Setting("--tag", "TAG|none", "latest", "tag shown after an id without one"),
    Setting("--strip-vendor", "", None, "show openai/gpt-4o as gpt-4o (default for openrouter)"),
    Setting("--keep-vendor", "", None, "show ids with their vendor"),
    Setting("--set", "PATTERN:KEY=VALUE,...", (), "defaults for models, such as "
            "'qwen*:num_ctx=32768,keep_alive=30m,think=false'", parse_set, repeat=";"),
    Setting("--default-context", "N", DEFAULT_CONTEXT, "context shown when the server tells none",
            _number(int, 1, 1e12)),
    Setting("--ollama-version", "X.Y.Z", OLLAMA_VERSION, "answer of /api/version", parse_version),
    Setting("--reasoning", "separate|merge|drop", "separate",
            "where thinking goes: its own field, the text between think tags, or nowhere"),
    Setting("--reasoning-field", "both|reasoning_content|reasoning", "both",
            "the field that carries thinking on /v1 in front of an Ollama"),
    Setting("--think-models", "LIST", (), "models of an Ollama that always think, besides "
            + " and ".join(BUILT_IN_THINK_MODELS), comma_list, env="THINK_MODELS"),
    Setting("--client-key", "KEY", "", "key that clients must send (Bearer or x-api-key)", secret=True),
    Setting("--origins", "LIST", (), "browser origins allowed besides Ollama's own defaults, such as "
            "'https://chat.example.com,chrome-extension://*'", parse_origins, env="OLLAMA_ORIGINS"),
    Setting("--ca-file", "FILE", "", "certificates of a private CA, besides the system's", env="SSL_CERT_FILE"),
    Setting("--client-cert", "FILE", "", "certificate and key (one PEM) shown to the server"),
    Setting("--insecure", "", False, "do not check the server's certificate"),
    Setting("--tls-cert", "FILE", "", "certificate for TLS towards clients"),
    Setting("--tls-key", "FILE", "", "its private key, when not in the same file"),
    Setting("--timeout", "S", 600.0, "longest silence of the server, in seconds", _number(float, 0.1)),
    Setting("--connect-timeout", "S", 10.0, "longest wait for a connection to the server", _number(float, 0.1)),
    Setting("--client-timeout", "S", CLIENT_TIMEOUT,
            "longest wait for a client: a request head, its next request, its reading", _number(float, 0.1)),
    Setting("--max-body", "BYTES", MAX_BODY_BYTES, "largest request body", _number(int, 1, 1e12)),
    Setting("--max-connections", "N", MAX_CONNECTIONS, "clients at once; others get 503", _number(int, 1)),
    Setting("--grace", "S", GRACE, "time for streams to end after SIGTERM", _number(float, 0)),
    Setting("--debug", "", False, "print requests, answers and chunks, with keys hidden"),
    Setting("--no-log", "", False, "print nothing while it runs"),
    Setting("--env-file", "FILE", "", "read this file instead of .env; real variables win"),
    Setting("--demo", "", False, "start a tiny server inside and use it"),
    Setting("--check", "", False, "ask the server everything that clients need, print the findings, exit"))


class Config(collections.namedtuple("Config", [row.field for row in SETTINGS]
                                    + ["destination", "address", "sources", "files", "notes"])):
    """All settings, frozen.  `destination` is the Target, `address` the (host, port) to listen on, `sources` says per
    field whether it came from a flag, a variable or the default, `files` were read, `notes` are for the operator."""

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
    def key_source(self) -> str:
        """Where the key for the target came from, or may be set."""
        return self.sources["api_key"]

    @property
    def secrets(self) -> tuple:
        """Every text that must never be shown."""
        found = [self.destination.key, self.client_key]
        found += [text for name, value in self.header for text in (value, *value.split())
                  if re.search("auth|cookie|cred|jwt|key|pass|secret|sess|sign|token", name, re.I)]
        for part in self.destination.query.split("&"):
            name, _, value = part.partition("=")
            found += [value, urllib.parse.unquote_plus(value)] if name != "api-version" else []
        return tuple(sorted({text for text in found if len(text) > 3}, key=len, reverse=True))

    @classmethod
    def from_args(cls, argv: Optional[list] = None, environ: Optional[dict] = None) -> "Config":
        """Command line and environment -> Config.  Raises UsageError with one clear line."""
        given = vars(argument_parser().parse_args(argv))
        if given["bare_target"] and given["target"]:
            raise UsageError(f"two targets: {given['bare_target']} and --target {given['target']}")
        given["target"] = given["target"] or given["bare_target"]
        environ = dict(os.environ if environ is None else environ)
        env_file = given.get("env_file") or environ.get("OLLAMA_PROXY_ENV_FILE")
        found, notes = read_env_file(env_file)
        environ = {**found, **environ}
        known = [name for row in SETTINGS for name in row.variables]
        notes += [f"{name} is no setting{did_you_mean(name, known)}" for name in environ
                  if name.startswith("OLLAMA_PROXY_") and name not in known]
        values, sources = {}, {}
        for row in SETTINGS:
            values[row.field], sources[row.field] = _value_of(row, given.get(row.field), environ)
        target = pick_target(values, sources, environ)
        if values["target_api"] == "auto" and (target.preset.api == "ollama" or sources["target"] == "OLLAMA_BASE_URL"):
            values["target_api"] = "ollama"
        values["fallback"] = values["fallback"] and (
            DEFAULT_FALLBACK if values["fallback"].lower() in ("1", "true", "on", "yes") else values["fallback"])
        if values["fallback"]:
            try:
                parse_target(values["fallback"], "ollama")
            except UsageError as error:
                raise UsageError(f"--fallback: {error}") from None
        if values["tag"].lower() == "none":
            values["tag"] = ""
        if values["tls_key"] and not values["tls_cert"]:
            raise UsageError(f"--tls-key {values['tls_key']}: --tls-cert is missing, and TLS needs both")
        notes += [f"--set {pattern}: {key} is not a known option{did_you_mean(key, KNOWN_OPTIONS)}"
                  for pattern, options in values["set"] for key in options if key not in KNOWN_OPTIONS]
        if values["demo"] and sources["target"] == "flag":
            notes.append(f"--target {values['target']} is not used: --demo has a target of its own")
        files = (env_file or ".env", values["models_filter"] or "models-filter.txt")
        if os.path.isfile(files[1]) and not read_filter_file(values["models_filter"]):
            notes.append(f"{files[1]}: not a line in it, so no model is hidden")
        if not environ.get("OLLAMA_PROXY_CLIENT_KEY", "none").strip() and not values["client_key"]:
            notes.append("OLLAMA_PROXY_CLIENT_KEY is empty, so no key is asked for")
        if values["forward_auth"] and target.key:
            notes.append(f"--forward-auth: clients that send no key use that of {sources['api_key']}")
        target = target._replace(api=values["target_api"])
        return cls(**values, destination=target, address=_pick_address(values, sources, target), sources=sources,
                   files=tuple(filter(os.path.isfile, files)), notes=tuple(notes))


def _value_of(row: Setting, flag: Any, environ: dict) -> tuple[Any, str]:
    """The value of one setting and where it came from."""
    texts, source = flag, "flag"
    if texts is None:
        source = next((name for name in row.variables if environ.get(name, "").strip()), "default")
        if source == "default":
            return row.reader(row.default) if isinstance(row.default, str) else row.default, source
        texts = environ[source].strip().strip("'\"")
        if row.repeat:
            texts = [part for part in texts.split(row.repeat) if part.strip()]
    if not texts and row.field == "client_key":     # an unset variable in a script would open the door to everybody
        raise UsageError("--client-key: the key is empty")
    try:
        return tuple(map(row.reader, texts)) if row.repeat else row.reader(texts), source
    except (ValueError, TypeError, BadRequest) as error:
        label = row.flags.split()[0] if source == "flag" else source
        shown = "***" if row.secret else one_line(texts if isinstance(texts, str) else "; ".join(texts), 100)
        raise UsageError(f"{label} {shown}: {error}") from None


def pick_target(values: dict, sources: dict, environ: dict) -> Target:
    """The configured target with its key.  A preset's own variable counts towards its own host only."""
    target = parse_target(values["target"], values["target_api"])
    key = values["api_key"]
    if not key and target.preset.key_env and (target.name or target.preset.hosts):
        key, sources["api_key"] = environ.get(target.preset.key_env, "").strip(), target.preset.key_env
    sources["api_key"] = "--api-key" if sources["api_key"] == "flag" else sources["api_key"]
    if not key:
        sources["api_key"] = "no client sent one that can be passed on" if values["forward_auth"] else \
            "none is set: OLLAMA_PROXY_API_KEY or --api-key" + "".join(
            f"; {row.key_env} is read for --target {name} alone" for name, row in PRESETS.items()
            if environ.get(row.key_env) and row is not target.preset)
    if key and (not key.isascii() or not key.isprintable() or " " in key):
        raise UsageError(f"{sources['api_key']}: a key is printable ASCII without spaces")
    if target.preset.hosts and not key and not values["forward_auth"] and not values["demo"]:
        raise UsageError(f"{target.host} needs a key: set {target.preset.key_env} or give --api-key")
    return target._replace(key=key)


def _pick_address(values: dict, sources: dict, target: Target) -> tuple[str, int]:
    host, port = values["listen"]
    if sources["listen"] == "default" and target.port == OLLAMA_PORT and not values["demo"] \
            and (values["target_api"] == "ollama" or is_loopback(target.host)):
        port = OPENAI_FACE_PORT
    host = values["host"].strip("[]") if values["host"] else host
    port = values["port"] if values["port"] is not None else port
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
    """--help is SETTINGS, spelled out in groups."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [TARGET]", add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=118),
        description="Point any Ollama client at any OpenAI-compatible server, and the reverse.",
        epilog="A flag beats its variable, which beats .env, which beats the default.  Examples:\n"
               "  %(prog)s --demo                                   try it without any model\n"
               "  %(prog)s                                          LM Studio on this machine\n"
               "  %(prog)s http://localhost:8080                    llama.cpp\n"
               "  OPENROUTER_API_KEY=... %(prog)s openrouter\n"
               "  %(prog)s ollama                                   OpenAI clients in front of an Ollama\n")
    parser.add_argument("bare_target", nargs="?", metavar="TARGET", help="the server, as for --target")
    group: Any = parser
    for row in SETTINGS:
        group = parser.add_argument_group(GROUPS[row.field]) if row.field in GROUPS else group
        shown = " or ".join(row.variables)
        if row.default not in ("", None, (), False):
            shown += f", default {row.default}"
        action = "append" if row.repeat else "store" if row.metavar else "store_true"
        beside = present(metavar=row.metavar or None, nargs="?" if row.optional else None, const=row.optional)
        group.add_argument(*row.flags.split(), dest=row.field, default=None, action=action, **beside,
                           help=f"{row.help} ({shown})".replace("%", "%%"))
    group.add_argument("-h", "--help", action="help", help="show this text and exit")
    group.add_argument("--version", action="version", version=f"ollama_proxy {__version__}")
    return parser


def read_lines(path: Optional[str], present: str, label: str) -> list[str]:
    """The lines of the text file `path`, or of `present` if there is such a file.  Raises UsageError."""
    if not path and not os.path.isfile(present):
        return []
    try:
        with open(path or present, encoding="utf-8-sig") as file:
            return file.read().splitlines()
    except (OSError, ValueError) as error:
        why = str(error.strerror).lower() if isinstance(error, OSError) else "not a UTF-8 text"
        raise UsageError(f"{label} {path or present}: {why}") from None


def read_env_file(path: Optional[str]) -> tuple[dict, list]:
    """(KEY=VALUE lines of an env file, what is wrong with it); `.env` in the working directory without a path."""
    found, junk = {}, []
    for number, line in enumerate(read_lines(path, ".env", "--env-file"), 1):
        match = re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*?)\s*", line)
        if match:
            value = match[2]
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            found[match[1]] = value[1:-1] if quoted else re.sub(r"\s+#.*", "", value)
        elif line.strip() and not line.lstrip().startswith("#"):
            junk.append(f"{path or '.env'}: line {number} is no KEY=VALUE")
    return found, junk


def read_filter_file(path: str) -> tuple:
    """The patterns of a models filter; none when there is no such file.  Raises UsageError."""
    lines = [line.partition("#")[0].strip() for line in read_lines(path, "models-filter.txt", "--models-filter")]
    return tuple(filter(None, lines))


def short_name(model_id: str) -> str:
    """An id without its vendor."""
    return model_id.rpartition("/")[2]


# What --set knows besides options.
_NO_OPTIONS = ("think", "keep_alive", "format", "reasoning", "open_think", "capabilities")
KNOWN_OPTIONS = tuple(OLLAMA_OPTION_KEYS.values()) + OLLAMA_ONLY + _NO_OPTIONS


def settings_for(config: Config, *names: str) -> tuple[dict, dict]:
    """What --set says of a model with any of these names, with or without vendor and tag -> (options, the rest).
    The first row that fits wins."""
    if not config.set:
        return {}, {}
    forms = {form.lower() for name in names for form in (name, short_name(name))}
    forms |= {re.sub(":(latest|proxy)$", "", form) for form in forms}
    found: dict = {}
    for pattern, values in config.set:
        if any(fnmatch.fnmatchcase(form, pattern.lower()) for form in forms):
            found = {**values, **found}
    rest = {key: found.pop(key) for key in _NO_OPTIONS if key in found}
    return found, rest

# ----------------------------------------------------------------------------
# Room 11.  Upstream: dial, send, read, pool; and the watch for clients that leave
#
# http.client dials (proxies, tunnels, TLS) and sends.  Answers are read by the same Wire that reads
# requests: http.client's HTTPResponse hands out one HTTP chunk a call, takes the end of the stream
# for the end of the headers, and cannot say whether a body was whole.
# ----------------------------------------------------------------------------


def shut(sock: Any) -> None:
    """Both directions, at once, without an exception; below TLS, which would wait for an answer."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def complain(error: BaseException) -> None:
    """A traceback on stderr, for bugs of our own only; a closed stderr is no second bug."""
    import traceback
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(type(error), error, error.__traceback__)


RDHUP = getattr(select, "POLLRDHUP", 0)         # Linux: tells a hang-up from bytes that wait


def is_ready(sock: Any, mask: int = 1) -> bool:
    """Whether something can be read (or, with RDHUP, whether the peer has ended), without waiting.

    1 is POLLIN, a name that Windows lacks.  poll() because select() refuses descriptors from 1024 up; Windows has
    only select().
    """
    if not hasattr(select, "poll"):
        return bool(select.select([sock], [], [], 0)[0])
    poller = select.poll()
    poller.register(sock, mask)
    return bool(poller.poll(0))


def has_left(sock: Any) -> bool:
    """Whether a client has ended its connection.  Never waits: recv() on a socket with a time-out would, even with
    MSG_DONTWAIT, so it is asked only when there is something to read."""
    try:
        if RDHUP:
            return is_ready(sock, RDHUP)
        return is_ready(sock) and socket.socket.recv(sock, 1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


class Watcher:
    """One thread that looks, some times a second, whether the clients of running requests are still there: their own
    threads wait for the target and cannot see it.  A client that left takes its upstream connection with it."""

    TICK = 0.2

    def __init__(self) -> None:
        # Guards _scopes and each Scope._sock.  A client's socket is closed only after remove(), a target's only after
        # its scope let go of it: no descriptor that was used again is ever polled or shut.
        self.lock = threading.Lock()
        self._scopes: set = set()
        self._some = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def add(self, scope: "Scope") -> None:
        with self.lock:
            if not self._thread.ident:
                self._thread.start()
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
        self._over = threading.Event()
        self._sock: Any = None
        self._reply: Optional[Reply] = None
        if client is not None:
            context.watcher.add(self)

    def open(self, target: Target, method: str, path: str, headers: Iterable, body: Any,
             timeout: Optional[float] = None) -> "Reply":
        """Upstream.open, for as long as the request lasts."""
        self.release()
        self._reply = self.context.upstream.open(self, target, method, path, headers, body, timeout)
        if self._over.is_set():         # meanwhile another thread has released all that there was
            self.release()
        self.check()
        self.context.log.debug(f"{method} {path.partition('?')[0]}: the target answers {self._reply.status}")
        return self._reply

    def hold(self, sock: Any) -> None:
        """From now on `sock` is shut when the client leaves, until release().  Raises ClientGone if it has left."""
        with self.context.watcher.lock:
            self._sock = sock
        self.check()

    def check(self) -> None:
        """Raises ClientGone once the client has left."""
        if self._over.is_set():
            raise ClientGone("client closed the connection")

    def pause(self, seconds: float) -> None:
        """Sleeps, unless the client leaves.  Raises ClientGone."""
        self._over.wait(seconds)
        self.check()

    def abort(self) -> None:
        """The client has left; the watcher's thread calls this, with its lock held."""
        self._cut()
        shut(self.client)               # wakes a blocked send, and makes every later one fail

    def _cut(self) -> None:
        """Nobody waits for the target any more; the watcher's lock is held."""
        self._over.set()
        if self._sock is not None:
            shut(self._sock)

    def release(self) -> None:
        """The present answer is not needed any more: its connection goes back to the pool, or ends."""
        with self.context.watcher.lock:
            self._sock = None
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.close(0.0 if self._over.is_set() else DRAIN, self.client)

    def __enter__(self) -> "Scope":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """The request is over; after an exception nobody waits for the rest of an answer, or for its beginning."""
        if kind is not None:
            with self.context.watcher.lock:
                self._cut()
        if self.client is not None:
            self.context.watcher.remove(self)
        self.release()


class Clock:
    """The clock, handed to encoders so that tests can stop it: `now` in monotonic ns, `wall` in seconds."""

    now = staticmethod(time.monotonic_ns)
    wall = staticmethod(time.time)

    @staticmethod
    def stamp() -> str:
        """RFC 3339 in UTC with microseconds."""
        second, nanosecond = divmod(time.time_ns(), 1_000_000_000)
        return f"{timestamp(second)[:-1]}.{nanosecond // 1000:06d}Z"


KERNEL_TIME_OUTS = os.name == "posix" and struct.calcsize("l") == 8     # the kernel's struct timeval is two longs


class Wire:
    """The incoming side of a socket, read up to a deadline, cut into heads and bodies: for clients and targets alike.

    A subclass says what to raise when the other side is `late`, breaks the connection (`broken`), ends it too early
    (`ended`) or sends what is no HTTP (`malformed`).
    """

    head_end = re.compile(rb"\r\n\r\n")
    rate = 0                            # bytes a second from which on a body may take longer than `patience`
    late = broken = ended = malformed = too_large = None        # type: Any

    def __init__(self, sock: Any, patience: float) -> None:
        self.sock, self.patience = sock, patience
        self.endurance = 0.0            # a body may be silent for so long, and gives b"" after each `patience`
        self.buffer = b""               # has come, was not asked for yet
        self.in_step = True             # at the boundary of a message, not inside a head or body
        self._allowed = 0.0

    def set_timeout(self, seconds: float) -> None:
        """The longest that one recv or send may wait from now on.  A time-out that the kernel holds costs nothing;
        Python's own, which TLS and Windows need, is a poll() before every call."""
        if seconds == self._allowed:
            return
        self._allowed, seconds = seconds, max(0.001, seconds)
        if KERNEL_TIME_OUTS and type(self.sock) is socket.socket:
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            self.sock.settimeout(None)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        else:
            self.sock.settimeout(seconds)

    def receive(self, deadline: float = 0.0) -> bytes:
        """One recv: waits for `patience` seconds, or until the monotonic clock says `deadline`; b"" is the end."""
        self.set_timeout(deadline - time.monotonic() if deadline else self.patience)
        try:
            return self.sock.recv(READ_SIZE)
        except (socket.timeout, BlockingIOError):
            raise self.late() from None
        except (OSError, ValueError) as error:
            raise self.broken(error) from None

    def head(self, deadline: float = 0.0) -> Optional[bytes]:
        """The next message head without its empty line; None when the other side sends no more.  Without a `deadline`
        all of it must come within `patience` seconds of its first byte."""
        while True:
            end = self.head_end.search(self.buffer)
            if (end.start() if end else len(self.buffer)) > MAX_HEAD_BYTES:
                raise self.too_large()
            if end:
                head, self.buffer = self.buffer[:end.start()], self.buffer[end.end():]
                return head
            if self.buffer:
                self.check_beginning(self.buffer)
                deadline = deadline or time.monotonic() + self.patience
            data = self.receive(deadline)
            if not data:
                return None
            self.buffer += data

    def check_beginning(self, beginning: bytes) -> None:
        """May refuse a head before all of it is there."""

    def body(self, length: Optional[int], chunked: bool) -> Iterator[bytes]:
        """The pieces of a body as they come, framing off; without a length or chunks it ends with the connection.

        What came before a fault is handed out before the fault is raised.
        """
        decoder, left = (ChunkedDecoder(), None) if chunked else (None, length)
        began, received, silent = time.monotonic(), 0, 0.0
        self.in_step = left == 0
        while not self.in_step:
            deadline = self.rate and began + self.patience + received / self.rate
            try:
                data, self.buffer = self.buffer or self.receive(deadline), b""
            except UpstreamTimeout:
                silent += self.patience
                if silent >= self.endurance:
                    raise
                yield b""
                continue
            silent = 0.0
            received += len(data)
            if not data:
                self.in_step = decoder is None and left is None
                if not self.in_step:
                    raise self.ended()
            elif decoder is not None:
                try:
                    data = decoder.feed(data)
                except ValueError as error:
                    if decoder.salvaged:
                        yield decoder.salvaged
                    raise self.malformed(f"malformed chunked coding: {error}") from None
                if decoder.done:
                    self.in_step, self.buffer = True, decoder.rest
            elif left is not None:
                data, self.buffer = data[:left], data[left:]
                left -= len(data)
                self.in_step = left == 0
            if data:
                yield data


class TargetWire(Wire):
    """What a target sends, on a connection of http.client's."""

    head_end = re.compile(rb"\r?\n\r?\n")

    def __init__(self, connection: Any, url: str) -> None:
        super().__init__(connection.sock, 0.0)
        self.connection, self._url, self._scope = connection, url, None

    def begin(self, scope: Scope, patience: float) -> None:
        """A request of `scope` has this connection from now on.  Raises ClientGone."""
        self._scope, self.patience, self.endurance = scope, patience, 0.0
        scope.hold(self.sock)
        self.set_timeout(patience)

    def late(self) -> ProxyError:
        return UpstreamTimeout(f"upstream was silent for {max(self.patience, self.endurance):g} s")

    def broken(self, error: Exception) -> ProxyError:
        self._scope.check()             # cut off by the watcher: the client's doing, not the target's
        return StreamTruncated(f"upstream broke the connection: {reason_of(error)}")

    def ended(self) -> ProxyError:
        self._scope.check()
        return StreamTruncated("upstream closed the connection in the middle of its answer")

    def malformed(self, text: str) -> ProxyError:
        return BadUpstreamPayload(f"upstream sent a {text}")

    def too_large(self) -> ProxyError:
        return BadUpstreamPayload(f"{self._url} sent headers of more than {MAX_HEAD_BYTES} bytes")

    def answer_head(self, send_error: Optional[OSError]) -> tuple:
        """The parsed head of the final answer.  `send_error` is what broke the sending of the request: a server may
        answer and close before it has read all.  Raises _NoAnswer when not a byte of one came."""
        deadline = 0.0
        try:
            while (head := self.head(deadline)) is not None:
                parsed = parse_answer_head(head)
                if parsed[1] >= 200:
                    return parsed       # 100 and 103 announce the answer; they are not the answer
                deadline = deadline or time.monotonic() + self.patience
        except StreamTruncated as error:
            send_error = send_error or OSError(error.message.rpartition(": ")[2])
        if self.buffer:
            raise BadUpstreamPayload(f"{self._url} closed the connection in the middle of its answer")
        why = f" ({reason_of(send_error)})" if send_error else ""
        raise _NoAnswer(f"{self._url} closed the connection without an answer{why}")

    def close(self) -> None:
        """Ends the connection, at once."""
        shut(self.sock)
        self.connection.close()


_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?")
_FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:[ \t]*([^\r\n\0]*?)[ \t]*")


def parse_answer_head(head: bytes) -> tuple[int, int, dict]:
    """Response head -> (minor version, status, headers by lower-case name).

    Lenient about line ends, strict about shape.  Raises BadUpstreamPayload.
    """
    first, *lines = head.replace(b"\r\n", b"\n").split(b"\n")
    match = _STATUS_LINE.fullmatch(first)
    if not match:
        why = "TLS is spoken there, write https:// instead of http://" if first[:1] == b"\x15" else one_line(first, 80)
        raise BadUpstreamPayload(f"upstream does not speak HTTP/1.x: {why}")
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

    def __init__(self, upstream: "Upstream", key: tuple, wire: TargetWire, head: tuple, method: str) -> None:
        minor, self.status, self.headers = head
        self._upstream, self._key, self._wire = upstream, key, wire
        options, length = self.headers.get("connection", "").lower(), self.headers.get("content-length")
        chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            raise BadUpstreamPayload(f"upstream sent a bad Content-Length: {one_line(length, 40)}")
        self.length = int(length) if length is not None else None       # as announced, also for HEAD
        self.content_type = self.headers.get("content-type", "")
        bodiless = method == "HEAD" or self.status in (204, 304)
        # Exactly one framing: with neither the body ends with the connection, with both it smells of smuggling.
        self._keep = "close" not in options and (minor == 1 or "keep-alive" in options) \
            and (bodiless or chunked != (length is not None))
        coding = self.headers.get("content-encoding", "").strip().lower()
        plain = bodiless or coding in ("", "identity")
        self._inflate = None if plain else inflater(
            coding, lambda sentence, _: BadUpstreamPayload(f"upstream sent a body that {sentence}"))
        self._body = wire.body(0 if bodiless else self.length, chunked and not bodiless)
        wire.in_step = False            # the generator says so itself only once it runs

    def pieces(self, pause: float = 0.0) -> Iterator[bytes]:
        """Body bytes as they come, framing and compression off; with a `pause` also b"" after each so long silence.

        Raises StreamTruncated, UpstreamTimeout, BadUpstreamPayload, each after what came before it; or ClientGone.
        """
        if pause:
            self._wire.endurance, self._wire.patience = self._wire.patience, min(pause, self._wire.patience)
        for piece in itertools.chain(self._body, [None] if self._inflate else []):
            data = self._inflate(piece) if self._inflate else piece
            if data or piece == b"":    # no `yield from`: who stops here must not close the body, as close() reads on
                yield data

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
        return b"".join(found)[:limit]

    def hide_key(self, data: bytes) -> bytes:
        """`data` without the key that the client sent along: some servers repeat it when they refuse it."""
        return data.replace(self.secret, b"***") if len(self.secret) > 3 else data

    def close(self, patience: float = 0.0, client: Any = None) -> None:
        """Gives the connection back, or ends it.  The end of a body that nobody needs more of is waited for up to
        `patience` seconds, so that its connection lives on, unless `client` asks for something else meanwhile."""
        wire, until = self._wire, time.monotonic() + patience
        if self._keep and patience and not wire.in_step:
            wire.patience, wire.endurance = 0.02, patience
            with contextlib.suppress(ProxyError):
                for piece in self._body:
                    if time.monotonic() > until or (not piece and client and is_ready(client) and not has_left(client)):
                        break
        if self._keep and wire.in_step and not wire.buffer:
            self._upstream.give_back(self._key, wire)
        else:
            wire.close()


class Upstream:
    """Connections to targets: pooled, kept alive, each request on one of them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._pool: dict = {}           # (place, proxy) -> [(wire, idle since)], the one used last at the end
        self._tls = functools.lru_cache(maxsize=None)(lambda: client_tls(config))      # made when it is needed first
        self._proxy_for = functools.lru_cache(maxsize=None)(proxy_for)

    def open(self, scope: Scope, target: Target, method: str, path: str, headers: Iterable, body: Any,
             timeout: Optional[float] = None) -> Reply:
        """Sends one request; returns when the head of the answer is there.

        `path` is complete; `body` is bytes, or an iterable of pieces that are sent chunked as they come.  A pooled
        connection that turns out dead before a byte of an answer is replaced once.  Redirects are not followed.
        Raises UpstreamUnreachable, UpstreamTimeout, BadUpstreamPayload or ClientGone.
        """
        via, patience = self._proxy_for(target.scheme, target.host, target.port), timeout or self._config.timeout
        key = (target.place, via)
        # A body that streams can be sent once: not on a connection that may be dead.
        reused = self._take(key) if isinstance(body, bytes) else None
        wire = reused or self._dial(scope, target, via, min(self._config.connect_timeout, patience))
        while True:
            began = time.monotonic()
            try:
                wire.begin(scope, patience)
                send_error = self._send(wire, target, via, method, path, headers, body)
                reply = Reply(self, key, wire, wire.answer_head(send_error), method)
                break
            except BaseException as error:
                scope.release()
                wire.close()
                scope.check()
                # Dead before it could have been read: an idle connection that the target had given up.  After a longer
                # time it may have begun to generate, and nobody wants to pay twice.
                if wire is not reused or not isinstance(error, _NoAnswer) or time.monotonic() - began > 2.0:
                    raise
            wire = self._dial(scope, target, via, min(self._config.connect_timeout, patience))
        sent = dict(headers).get("Authorization", "").partition(" ")[2].strip()
        reply.secret = b"" if sent == target.key else sent.encode("latin-1")    # ours is hidden by the log
        if 300 <= reply.status < 400 and reply.status != 304:
            reply.close()
            where = reply.headers.get("location", "").partition("?")[0]
            where = f"{target.scheme}://{target.authority}{where}" if where[:1] == "/" else where or "nowhere"
            raise UpstreamError(f"{target.url} redirects to {one_line(where, 200)}: "
                                "give that address as --target if it is the right one")
        return reply

    def _send(self, wire: TargetWire, target: Target, via: Optional[Proxy], method: str, path: str, headers: Iterable,
              body: Any) -> Optional[OSError]:
        """Sends a request; returns what broke the sending: the target may have answered before it stopped reading."""
        plain_proxy = via is not None and target.scheme == "http"
        address = f"http://{target.authority}{path}" if plain_proxy else path
        lines = [f"{method} {address} HTTP/1.1", f"Host: {target.authority}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if plain_proxy and via.login:
            lines.append(f"Proxy-Authorization: {via.login}")
        if not isinstance(body, bytes):
            lines.append("Transfer-Encoding: chunked")
        elif body or method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
        out = [head + body] if isinstance(body, bytes) else itertools.chain([head], map(http_chunk, body), [LAST_CHUNK])
        try:
            for part in out:
                wire.connection.send(part)
        except (socket.timeout, BlockingIOError):
            raise UpstreamTimeout(f"{target.url} did not take the request for {wire.patience:g} s") from None
        except OSError as error:
            return error
        return None

    # -- connections

    def _take(self, key: tuple) -> Optional[TargetWire]:
        """The idle connection used last, unless the target has closed or spoiled it meanwhile."""
        while True:
            with self._lock:
                idle = self._pool.get(key)
                wire, since = idle.pop() if idle else (None, 0.0)
            # Bytes that nobody asked for are an answer to nobody: they must not reach the next client.
            if wire is None or (time.monotonic() - since < POOL_IDLE and not is_ready(wire.sock)):
                return wire
            wire.close()

    def give_back(self, key: tuple, wire: TargetWire) -> None:
        """A connection whose answer was read to the end."""
        now, surplus = time.monotonic(), None
        with self._lock:
            idle = self._pool.setdefault(key, [])
            idle.append((wire, now))
            if len(idle) > POOL_SIZE or now - idle[0][1] > POOL_IDLE:
                surplus = idle.pop(0)[0]
        if surplus is not None:
            surplus.close()

    def close(self) -> None:
        """Ends all idle connections."""
        with self._lock:
            idle, self._pool = self._pool, {}
        for wire, _ in itertools.chain.from_iterable(idle.values()):
            wire.close()

    def _dial(self, scope: Scope, target: Target, via: Optional[Proxy], timeout: float) -> TargetWire:
        """A new connection, through a proxy or TLS where they are needed."""
        host, port = via[:2] if via else (target.host, target.port)
        try:
            if target.scheme == "https":
                connection: Any = http.client.HTTPSConnection(host, port, timeout=timeout, context=self._tls())
                if via:
                    login = {"Proxy-Authorization": via.login} if via.login else {}
                    connection.set_tunnel(target.host, target.port, login)
            else:
                connection = http.client.HTTPConnection(host, port, timeout=timeout)
            connection.connect()
        except (OSError, http.client.HTTPException, ValueError) as error:
            scope.check()
            through = f" through the proxy {host}:{port}" if via else ""
            kind, reason = UpstreamUnreachable, reason_of(error)
            if isinstance(error, socket.timeout):
                kind = UpstreamTimeout
                if connection.sock is not None and not via:     # it is connected, but says nothing that is TLS
                    reason = "no TLS handshake came: if none is spoken there, write http:// instead of https://"
            raise kind(f"cannot reach {target.url}{through}: {reason}") from None
        return TargetWire(connection, target.url)


def client_tls(config: Config) -> Any:
    """How https targets are spoken to.  Raises UsageError."""
    import ssl                          # costs memory that plain targets need not pay
    context = ssl.create_default_context()
    for flag, path, read in (("--ca-file", config.ca_file, context.load_verify_locations),
                             ("--client-cert", config.client_cert, context.load_cert_chain)):
        try:
            if path:
                read(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{flag} {path}: {reason_of(error)}") from None
    if config.insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Proxy(NamedTuple):
    """A forward proxy on the way to the target; `login` is the value of Proxy-Authorization."""

    host: str
    port: int
    login: str = ""


def proxy_for(scheme: str, host: str, port: int) -> Optional[Proxy]:
    """What HTTP(S)_PROXY, NO_PROXY or the system's settings say.  Loopback has none."""
    if is_loopback(host):
        return None
    import urllib.request               # reads the system's settings on macOS and Windows
    address = urllib.request.getproxies().get(scheme)
    if not address or urllib.request.proxy_bypass(f"{host}:{port}") or urllib.request.proxy_bypass(host):
        return None
    try:
        parts = urllib.parse.urlsplit(address if "://" in address else "http://" + address)
        number = parts.port or 8080
        if parts.scheme.startswith("socks"):
            raise ValueError(f"{parts.scheme} proxies are not supported, only http ones")
    except ValueError as error:
        raise UpstreamUnreachable(f"{scheme.upper()}_PROXY cannot be used: {error}") from None
    login = ""
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        login = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
    return Proxy(parts.hostname, number, login) if parts.hostname else None


class _NoAnswer(UpstreamUnreachable):
    """The connection ended before the first byte of an answer."""


def reason_of(error: Exception) -> str:
    """An OSError in the words of a human: "connection refused", not "[Errno 111] ..."."""
    if type(error).__name__ == "SSLCertVerificationError":
        return f"certificate not trusted ({getattr(error, 'verify_message', '') or error}); see --ca-file"
    if "WRONG_VERSION_NUMBER" in str(error):
        return "no TLS is spoken there: write http:// instead of https://"
    if isinstance(error, socket.timeout):
        return "timed out"
    if "PEM lib" in str(error):
        return "no certificate with its private key in PEM"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return one_line(text[:1].lower() + text[1:], 200)

# ----------------------------------------------------------------------------
# Room 12.  Catalogue: what the target serves, under which names, with what metadata
# ----------------------------------------------------------------------------

# Kinds of models that answer neither chats nor embeddings (upstreams rule 90).
OTHER_KINDS = frozenset(("image", "audio", "rerank", "reranker", "moderation", "transcription", "tts", "transcribe",
                         "speech", "video", "image_generation", "audio_transcription", "audio_speech"))
_EMBEDDING_NAME = re.compile(r"embed|(^|[/-])(bge|e5|gte|minilm)([-_.]|$)|nomic-bert", re.I)
_VISION_NAME = re.compile(
    r"vision|[-_.]vl([-_.\d]|$)|llava|pixtral|gpt-4o|gpt-4\.1|gpt-5|gemini|claude-[3-9]|moondream", re.I)


def human_count(count: Optional[int]) -> str:
    """8190735360 -> "8.2B", 494032768 -> "494.03M", as Ollama writes parameter sizes."""
    for unit, letter, digits in ((1e9, "B", 1), (1e6, "M", 2), (1e3, "K", 0)):
        if count and count >= unit:
            return f"{count / unit:.{0 if count % unit == 0 else digits}f}{letter}"
    return str(count) if count else ""


def parse_count(text: str) -> Optional[int]:
    """"8.2B" -> 8200000000; None for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMBT])", text.strip(), re.I)
    return round(float(match[1]) * {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2].upper()]) if match else None


# What servers call it (upstreams rules 86-92): attribute of ModelInfo -> names, the likeliest first.
_COUNTS = {"context": "max_context_length context_length max_model_len context_window context_size max_input_tokens "
                      "inputTokenLimit max_total_tokens n_ctx_train",
           "context_now": "loaded_context_length n_ctx", "size": "size_bytes size", "created": "created",
           "embedding_length": "n_embd output_vector_size embedding_length", "parameter_count": "n_params"}
_TEXTS = {"owner": "owned_by publisher", "family": "arch architecture model_type family",
          "format": "compatibility_type format", "parameter_size": "params_string parameter_size",
          "parent": "parent parent_model", "template": "chat_template",
          "quantization": "quantization ftype model_ftype quantization_level"}
_TRAITS = {
    "vision": "vision supports_vision has_image_understanding", "completion": "completion_chat",
    "tools": "trained_for_tool_use function_calling tools supports_function_calling supports_tools supports_tool_calls",
    "thinking": "reasoning thinking supports_reasoning", "insert": "completion_fim"}
# Words in lists of capabilities, parameters and modalities -> traits.
_WORDS = {"tools": "tools", "tool_use": "tools", "vision": "vision", "image": "vision", "thinking": "thinking",
          "reasoning": "thinking", "embedding": "embedding", "embeddings": "embedding", "insert": "insert"}
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
    identifier = look_up([entry], "id key model_name name model", as_text)
    if not identifier:
        return None
    sources = [entry] + [as_dict(entry.get(key)) for key in _INSIDE]
    told = {key: look_up(sources, names, read) for table, read in ((_COUNTS, as_count), (_TEXTS, as_text))
            for key, names in table.items()}
    told = present(**told)
    owner, status, loaded = told.get("owner"), as_dict(entry.get("status")), entry.get("loaded_instances")
    if isinstance(loaded, list):        # LM Studio
        told["running"] = bool(loaded)
        for instance in loaded:
            told.setdefault("context_now", as_count(as_dict(as_dict(instance).get("config")).get("context_length")))
    elif "state" in entry or "value" in status:         # LM Studio before 0.4, llama.cpp's router
        told["running"] = (entry.get("state") or status.get("value")) == "loaded"
    elif owner in ("vllm", "sglang"):
        told.update(running=True, context_now=told.get("context_now") or told.get("context"))
    if owner == "llamacpp" and as_dict(entry.get("meta")):
        told = {"running": True, "format": "gguf", **told}
    arguments = list(map(str, as_list(status.get("args"))))
    for flag, value in zip(arguments, arguments[1:]):
        if flag in ("--ctx-size", "-c") and re.fullmatch("[0-9]{1,12}", value):
            told.setdefault("context_now", int(value))
    told["parameter_size"] = told.get("parameter_size") or human_count(told.get("parameter_count"))
    told.setdefault("parameter_count", parse_count(told["parameter_size"]))
    text = as_text(as_dict(entry.get("quantization")).get("name")) or told.get("quantization", "")
    text = re.sub(r"^\(guessed\) ?|^all | - [0-9.]+ bpw$|^mostly ", "", text)
    told["quantization"] = re.sub(r" - (S|M|L)(mall|edium|arge)\b", r"_\1", text)       # "Q4_K - Medium" is Q4_K_M
    return ModelInfo(identifier, raw=entry, traits=read_traits(entry, sources, owner), **told)


def read_traits(entry: dict, sources: list, owner: Optional[str]) -> dict:
    """What an entry says that its model can and cannot do; nothing for what it does not mention."""
    traits = {trait: look_up(sources, names, as_flag) for trait, names in _TRAITS.items()}
    shapes = as_dict(entry.get("architecture"))
    words = entry.get("capabilities") if owner != "llamacpp" else None
    if words is None and "arch" in entry and "state" in entry:
        words = []                      # LM Studio before 0.4 tells by leaving out
    for told, meant in ((words, ("tools", "vision")), (entry.get("supported_parameters"), ("tools", "thinking")),
                        (shapes.get("input_modalities") or entry.get("input_modalities"), ("vision",))):
        if isinstance(told, list):      # what such a list leaves out the model cannot do
            traits.update((trait, traits.get(trait) or False) for trait in meant)
            traits.update((_WORDS[word], True) for word in told if isinstance(word, str) and word in _WORDS)
    kind, said = look_up(sources[:2], "type mode", as_text), set(map(str, as_list(entry.get("capabilities"))))
    outputs = set(map(str, as_list(shapes.get("output_modalities"))))
    certain = {"tools": entry.get("tool_call_parser"), "thinking": entry.get("reasoning_parser"),
               "vision": kind == "vlm", "embedding": kind in ("embedding", "embeddings"),
               "other": kind in OTHER_KINDS or entry.get("active") is False or (said and said <= OTHER_KINDS)
               or (outputs and not outputs & {"text", "embeddings"})}
    traits.update((trait, True) for trait, sign in certain.items() if sign)
    return present(**traits)


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
        info = read_model(entry) if isinstance(entry, dict) else \
            ModelInfo(entry, raw={"id": entry}) if isinstance(entry, str) else None
        if info is not None:
            found[info.id] = merge_info(found[info.id], info) if info.id in found else info
    return list(found.values())


def merge_info(old: ModelInfo, new: ModelInfo) -> ModelInfo:
    """What `new` tells, over what `old` told."""
    known = {name: value for name, value in new._asdict().items()
             if value not in (None, "", (), {}) and name not in ("id", "raw", "traits")}
    return old._replace(**known, traits={**old.traits, **new.traits}, raw=old.raw or new.raw)


# Where metadata may be had besides the model list: path, whether it hangs below the root (else the base), and the
# preset that alone has it.  Each is a cheap GET; the first that tells anything is the only one of its server.
PROBES = (
    ("/api/v1/models", True, ""),       # LM Studio
    ("/api/v0/models", True, ""),       # LM Studio before 0.4
    ("/props", True, ""),               # llama.cpp
    ("/model/info", True, ""),          # LiteLLM
    ("/model_info", True, ""),          # SGLang
    ("/info", True, ""),                # TGI
    ("/models/capabilities", False, ""),                # LocalAI
    ("/api/extra/true_max_context_length", True, ""),   # KoboldCpp
    ("/language-models", False, "xai"),
)


class Listing(list):
    """Models to show; hashable, so that functools.lru_cache can hold what is made of one."""

    __hash__ = object.__hash__          # type: ignore[assignment]
    __eq__ = object.__eq__


class Catalogue:
    """The target's models: fetched once, kept, refreshed when stale or on a miss, answered from memory
    when the target is down.

    `fetch(native, path, timeout)` returns (status, headers, JSON or None) or raises UpstreamError.
    Refreshing happens in one thread at a time; whoever asks waits for it only as long as is useful.
    """

    def __init__(self, config: Config, fetch: Callable, api: Callable, say: Callable = lambda text: None) -> None:
        self._config, self._fetch, self._api, self._say = config, fetch, api, say
        self._patterns = read_filter_file(config.models_filter)
        self._changed = threading.Condition()   # guards all that follows
        self._models: Optional[list] = None     # list entries, None before the first answer
        self._listed = Listing()                # what is shown, with all metadata, aliases included
        self._names: dict = {}                  # every name that means a model -> its entry
        self._fetched = self._failed = -1e9
        self._error: Optional[UpstreamError] = None
        self._absent: set = set()               # probes without an answer, until the list changes
        self._wanted = self._probed = False     # somebody wants metadata; it was looked for
        self._details: dict = {}                # id -> ModelInfo that probes told
        self._thinkers: set = set()             # ids whose answers were seen to think
        self._busy = False                      # a refresh is under way
        self._unlisted: set = set()             # names that were passed on although the target does not list them
        self._guessed = False                   # the target has no list: these are configured names
        self._said = ""                         # what was wrong last time
        self.hidden = 0                         # models that the filter keeps from clients
        self.silence: Optional[UpstreamError] = None    # why the target could not be asked what it speaks

    # -- asking

    def models(self, details: bool = True) -> Listing:
        """Everything that may be shown.  Raises UpstreamError when nothing was ever known."""
        for _ in range(2):              # a refresh that began before metadata was wanted may end without it
            self._update(PROBE_TIMEOUT if self._models is None else 1.0, details)
        if self._models is None:
            raise self._error or self.silence or UpstreamUnreachable("the target's model list is not known yet")
        return self._listed

    def resolve(self, name: str, unlisted: bool = False) -> ModelInfo:
        """The model a client means (mission: names accepted).

        Raises BadRequest 404 for an unknown or hidden one.  A target whose list cannot be had is trusted to know its
        models: the name passes as it is.  With `unlisted` every target is, unless a filter is set.
        """
        patience = 0.0 if self._models or isinstance(self._error, UpstreamTimeout) else LIST_TIMEOUT
        self._update(patience)
        found = self._find(name)
        if found is None and self._models and time.monotonic() - max(self._fetched, self._failed) > 1.0:
            self._update(LIST_TIMEOUT, force=True)      # it may be new
            found = self._find(name)
        if found is None:               # an alias may be a glob, and may mean what stands in no list
            meant = next((model for pattern, model in self._config.alias if fnmatch.fnmatchcase(name, pattern)), name)
            found = self._find(meant)
            trusted = not self._models or self._guessed or unlisted or meant != name or self._passes_unlisted(name)
            if found is None and trusted and not self._patterns:
                found = ModelInfo(meant, shown=name)
                if self._models and not self._guessed and meant not in self._unlisted and len(self._unlisted) < 64:
                    self._unlisted.add(meant)
                    self._say(f"model {one_line(meant, 80)}: the target lists no such model; "
                              "the name is passed on as it is")
        if found is None:
            raise model_not_found(name, did_you_mean(name, self._names))
        return found

    def _passes_unlisted(self, name: str) -> bool:
        """Azure's deployments and OpenRouter's variants (x:online) are real and stand in no list."""
        target = self._config.destination
        return target.key_header == "api-key" or (
            target.preset.strip_vendor and self._find(name.rpartition(":")[0]) is not None)

    def is_hidden(self, model_id: str) -> bool:
        """A models filter keeps it from clients."""
        return not self._allowed(ModelInfo(model_id), ())

    def refuse_hidden(self, text: str) -> None:
        """Raises BadRequest 404 when a hidden model stands in a path, a query or a list."""
        for info in self._models or ():
            if info.id not in self._names and re.search(rf'(^|[/=?&,"\s]){re.escape(info.id)}($|[/=?&,"\s])', text):
                raise model_not_found(info.id)

    def refuse_when_down(self) -> None:
        """Raises UpstreamError when the target could not be reached when it was asked last."""
        if isinstance(self._error, (UpstreamUnreachable, UpstreamTimeout)):
            raise self._error

    @property
    def filtered(self) -> bool:
        """Lists of the target cannot be passed on as they are."""
        return bool(self._patterns or self._config.alias)

    def note_thinking(self, model_id: str) -> None:
        """An answer of this model brought reasoning: it can think, whatever lists say."""
        if model_id not in self._thinkers:
            with self._changed:
                self._thinkers.add(model_id)
                self._index()

    # -- names

    def shown_name(self, name: str) -> str:
        """The name in lists: a tag is added to one that has none."""
        return name if ":" in name.rpartition("/")[2] or not self._config.tag else f"{name}:{self._config.tag}"

    def _strips(self) -> bool:
        config = self._config
        return bool(config.strip_vendor or (config.destination.preset.strip_vendor and not config.keep_vendor))

    def _index(self) -> None:
        """Builds everything that look-ups need, with the lock held.  The first that takes a name keeps it."""
        models = self._models or []
        shorts = collections.Counter(short_name(info.id) for info in models)
        listed, short_forms, names, hidden = [], {}, {}, 0
        for info in models:
            info = merge_info(info, self._details.get(info.id, ModelInfo(info.id)))
            short = short_name(info.id)
            cut = shorts[short] == 1 and (self._strips() or info.id == f"models/{short}")
            shown = self.shown_name(short if cut else info.id)
            info = info._replace(shown=shown, capabilities=self._capabilities(info))
            named = (info.id, short if shorts[short] == 1 else info.id)
            forms = dict.fromkeys((*named, *map(str.lower, named)), info)
            own = [alias for alias, model in self._config.alias
                   if self._patterns and "*" not in alias and self._find(model, forms)]
            if not self._allowed(info, own):
                hidden += 1
                continue
            names[info.id] = info
            if shorts[short] == 1:
                short_forms[short] = info
            listed += [info] if "other" not in info.traits else []
        ids, names, meant = names, {**short_forms, **names}, dict(self._config.alias)
        for name in list(names):
            names.setdefault(name.lower(), names[name])
        # What an alias means may be another alias, or stand in no list, as Azure's deployments.
        for alias, model in sorted(self._config.alias, key=lambda pair: pair[1] in meant):
            info = self._find(model, names) or ModelInfo(model)
            if "*" not in alias and alias not in ids and self._allowed(info, [alias]):      # an id is never shadowed
                names[alias] = ids[alias] = info._replace(alias=alias, shown=self.shown_name(alias),
                                                          capabilities=self._capabilities(info))
                names.setdefault(alias.lower(), names[alias])
                listed.append(names[alias])
        self._names, self.hidden = names, hidden
        self._listed = Listing(sorted(listed, key=lambda info: -(info.created or 0)))

    def _find(self, name: str, names: Optional[dict] = None) -> Optional[ModelInfo]:
        names = self._names if names is None else names
        forms = [name] + [name[:-len(tag) - 1] for tag in {"latest": 1, "proxy": 1, self._config.tag: 1}
                          if tag and name.endswith(f":{tag}")]
        forms += [form.rpartition(":")[0] for form in forms if re.search(r":[0-9]+$", form)]
        forms += [f"{form}:latest" for form in forms]
        forms += [form.lower() for form in forms] + [f"models/{form.lower()}" for form in forms]
        return next((names[form] for form in forms if form in names), None)

    def _allowed(self, info: ModelInfo, aliases: Iterable) -> bool:
        if not self._patterns:
            return True
        tags = tuple(f":{tag}" for tag in ("latest", "proxy", self._config.tag.lower()) if tag)

        def both(name: str) -> set:         # with and without its tag
            name = name.lower()
            return {name, next((name[:-len(tag)] for tag in tags if name.endswith(tag)), name)} - {""}

        forms = set().union(*map(both, (info.id, short_name(info.id), info.shown, *aliases)))

        def hit(pattern: str) -> bool:
            return any(fnmatch.fnmatchcase(form, one) or form == one for form in forms for one in both(pattern))

        wanted = [pattern for pattern in self._patterns if not pattern.startswith("!")]
        return (not wanted or any(map(hit, wanted))) \
            and not any(hit(pattern[1:].strip()) for pattern in self._patterns if pattern.startswith("!"))

    def _capabilities(self, info: ModelInfo) -> tuple:
        """Ollama's words; what nobody told is assumed so that clients do not hide the model (rule 91)."""
        traits = {"completion": True, "tools": True, "embedding": bool(_EMBEDDING_NAME.search(info.id)),
                  "vision": bool(_VISION_NAME.search(info.id)), **info.traits}
        for word in comma_list(str(settings_for(self._config, info.id)[1].get("capabilities", ""))):
            traits[word.lstrip("-")] = word[0] != "-"
        if traits["embedding"]:
            return ("embedding",)
        traits["thinking"] = (traits.get("thinking") or info.id in self._thinkers) and self._config.reasoning != "merge"
        return tuple(word for word in CAPABILITIES if traits.get(word) and word != "embedding")

    # -- refreshing

    def _update(self, patience: float, details: bool = False, force: bool = False) -> None:
        """Starts a refresh when one is due; waits `patience` seconds at most for what is wanted and not there."""
        with self._changed:
            now, known = time.monotonic(), self._models is not None
            self._wanted = self._wanted or details
            missing = not known or (details and not self._probed)
            stale = now - self._fetched > CATALOGUE_FRESH
            failed = now - self._failed < FAILURE_MEMORY and (known or isinstance(self._error, UpstreamTimeout))
            if not self._busy and (force or missing or stale) and not failed:
                self._busy = True
                try:
                    threading.Thread(target=self._refresh, name="catalogue", daemon=True).start()
                except RuntimeError:    # no more threads: the memory has to do
                    self._busy = False
            if patience and (force or missing or stale):
                self._changed.wait_for(lambda: not self._busy or (self._fetched > now and not (
                    details and not self._probed)), patience)

    def _refresh(self) -> None:
        error: Optional[UpstreamError] = None
        try:
            native = self._api() == "ollama"
            status, headers, payload = self._fetch(native, "/api/tags" if native else "/models", LIST_TIMEOUT)
            models = read_models(payload) if status < 400 else None
            if models is None:
                # A gateway's page says what is wrong by itself: "502 Bad Gateway".
                page = "html" in headers.get("content-type", "") and status not in (400, 502, 503, 504)
                page = " (a web page, no API: is the address right?)" * page
                key = f" (key: {self._config.key_source})" * is_about_key(status, error_sentence(payload))
                sentence = (error_sentence(payload) or f"HTTP {status}") + page + key
                self._guess()
                raise UpstreamRefused(f"{self._config.destination.url} gave no model list: {sentence}", 502)
            self._take(models)
            self._probe(models, native)
        except ProxyError as told:
            error = told if isinstance(told, UpstreamError) else UpstreamError(told.message)
            if told.message != self._said:      # once, until something else is wrong
                start = "start the server or give another --target; " * isinstance(told, UpstreamUnreachable)
                self._say(f"model list: {told.message}; {start}it is asked again with the next request")
            self._said = told.message
        except Exception as bug:        # noqa: BLE001  a bug here must not stop every later refresh
            error = UpstreamError("the model list could not be read")
            complain(bug)
        finally:
            with self._changed:
                self._error = error
                self._failed = time.monotonic() if error else self._failed
                self._busy = False
                self._changed.notify_all()

    def _guess(self) -> None:
        """The target tells no list: aliases and the literal names of the filter are one."""
        names = [model for _, model in self._config.alias]
        names += [name for name in self._patterns if not re.search(r"[!*?[]", name)]
        if names:
            self._take([ModelInfo(name, raw={"id": name}) for name in dict.fromkeys(names)], guessed=True)

    def _take(self, models: list, guessed: bool = False) -> None:
        first, self._said, self._guessed = self._models is None, "", guessed
        with self._changed:
            if [info.id for info in models] != [info.id for info in self._models or ()]:
                self._absent.clear()
            self._models, self._fetched = models, time.monotonic()
            self._index()
            self._changed.notify_all()
        if first:
            self._complain()

    def _complain(self) -> None:
        """Names what is configured for models that the target does not list."""
        ids = [info.id for info in self._models or ()] + [alias for alias, _ in self._config.alias]
        for flag, pattern in [("--set", pattern) for pattern, _ in self._config.set] \
                + [("--alias", model) for _, model in self._config.alias] \
                + [("models filter", pattern) for pattern in self._patterns if pattern[0] != "!"]:
            bare = re.sub(":(latest|proxy)$", "", pattern.lower())
            if not any(fnmatch.fnmatchcase(form, one) for name in ids for one in (pattern.lower(), bare)
                       for form in (name.lower(), name.lower().removesuffix(":latest"), short_name(name).lower(),
                                    self.shown_name(name).lower())):
                self._say(f"warning: {flag} {pattern}: the target lists no such model{did_you_mean(pattern, ids)}")

    def _probe(self, models: list, native: bool) -> None:
        """Gathers metadata when somebody wants it; every answer that is no metadata means "not there"."""
        if not self._wanted:
            return
        preset, found = self._config.destination.preset, {}
        for path, below_root, only in () if native else PROBES:
            if path in self._absent or (preset is not PRESETS[only] if only else preset.hosts):
                continue
            for info in self._ask(path, below_root, models):
                found[info.id] = merge_info(found.get(info.id, info), info)
            if found:
                break
            self._absent.add(path)
        with self._changed:
            self._details, self._probed = found or self._details, True
            self._index()

    def _ask(self, path: str, native: bool, models: list) -> list[ModelInfo]:
        try:
            status, _, payload = self._fetch(native, path, PROBE_TIMEOUT)
        except ProxyError:
            return []
        if status != 200 or not isinstance(payload, (dict, list)) or as_dict(payload).get("error"):
            return []
        listed = read_models(payload)
        if listed or not isinstance(payload, dict):
            return listed or []
        if path == "/props" and payload.get("role") == "router":
            # Asking about a model that is not loaded would load it.
            loaded = [info for info in models if info.running]
            return [ModelInfo("")] + [told for info in loaded for told in self._ask(
                f"/props?model={urllib.parse.quote(info.id, safe='')}", native, [info])]
        told = read_model({**payload, "id": models[0].id}) if len(models) == 1 else None
        return [told] if told and any((told.context, told.context_now, told.family, told.template, told.traits)) else []

# ----------------------------------------------------------------------------
# Room 13.  Healing: what a target refused, and what to send instead
#
# A refusal before the first event that names something we sent is answered by sending the request
# once more in another way: a remedy either edits the body or changes the target's habits, after which
# the call is rendered again.  What was proved by success is remembered per target, endpoint and model.
# ----------------------------------------------------------------------------


def _rename(new: str) -> Callable:
    def edit(body: dict, key: str, told: Any = None) -> None:
        value = body.pop(key, None)
        if value is not None:
            body.setdefault(new, value)
    return edit


def _set(value: Any) -> Callable:
    def edit(body: dict, key: str, told: Any = None) -> None:
        body[key] = {**body[key], **value} if isinstance(value, dict) and isinstance(body.get(key), dict) else value
    return edit


def _drop(body: dict, key: str, told: Any = None) -> None:
    body.pop(key, None)


def _schema_instead(body: dict, key: str, told: Any = None) -> None:
    """json_object -> json_schema with a bare object."""
    if as_dict(body.get(key)).get("type") == "json_object" and body.get("messages") is not None:
        body[key] = {"type": "json_schema", "json_schema": {"name": "response", "schema": {"type": "object"}}}


def _schema_in_words(body: dict, key: str, told: Any = None) -> None:
    """A schema that is refused becomes a request in words."""
    value, messages = as_dict(body.pop(key, None)), body.get("messages")
    if value and isinstance(messages, list):
        schema = as_dict(value.get("json_schema")).get("schema") or {"type": "object"}
        wanted = "Answer with JSON only, no code fence, matching this JSON Schema: " + json.dumps(schema)
        body["messages"] = [{"role": "system", "content": wanted}] + messages


def _first_four(body: dict, key: str, told: Any = None) -> None:
    if isinstance(body.get(key), list):
        body[key] = body[key][:4]


def _lower_effort(body: dict, key: str, told: Any = None) -> None:
    if body.get(key) == "max":
        body[key] = "high"


def _messages_without(body: dict, key: str, told: Any = None) -> None:
    """Takes a key out of every message."""
    for message in as_list(body.get("messages")):
        as_dict(message).pop(key, None)


def _tools_without_strict(body: dict, key: str, told: Any = None) -> None:
    for tool in as_list(body.get("tools")):
        as_dict(as_dict(tool).get("function")).pop(key, None)


def _clamp(body: dict, key: str, told: Any) -> None:
    """A number is brought into the range that the refusal names."""
    bounds, value = [float(text) for text in told.groups() if text], body.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least, most = bounds if len(bounds) == 2 else (value, bounds[0])
        body[key] = type(value)(min(max(value, least), most))


def _cut_texts(body: dict, key: str, told: Any) -> None:
    """The longest text is cut by the measure of the two numbers of tokens that the refusal names, as Ollama cuts it."""
    texts, numbers = as_list(body.get(key)), sorted(map(int, re.findall(r"[0-9]{2,9}", told.string)))
    length = int(max(map(len, texts), default=0) * (0.95 * numbers[0] / numbers[-1] if len(numbers) > 1 else 0.5))
    if length > 0:
        body[key] = [text[:length] for text in texts]


def _portion(told: Any) -> dict:
    return {"batch": max(1, int(next(filter(None, told.groups()))))}


class Remedy(NamedTuple):
    """One row: when a refusal matches `pattern`, or else names `key`, `edit` the body or change the `habits`."""

    words: str                      # what is done, for the log
    key: str = ""
    edit: Optional[Callable] = None     # edit(body, key, match of the pattern)
    pattern: str = ""
    habits: Any = {}                # fields of Habits, or a function of the match that gives them
    lesson: bool = True             # success teaches something about the target, not about one client's values


# How llama.cpp, vLLM and Cerebras refuse what their grammars do not know.
_SCHEMA_REFUSED = (r"grammar.{0,60}(pars|fail)|fail.{0,40}grammar|grammar error|schema conversion failed|xgrammar"
                   r"|unsupported JSON schema|(JSON|tool|input_?|function).{0,20}schema.{0,60}"
                   r"(invalid|not supported|unsupported|unrecogni)")
_NO_THINKING = r"does not support thinking|think value .* is not supported"
# Told by a refusal's text, whatever its case, in the order in which they are tried.  Above each stands a server that
# wants it.
SYMPTOMS = (
    # Ollama
    Remedy("think is left out", "think", _drop, _NO_THINKING),
    # DeepSeek (deepseek-ai/DeepSeek-V3#69), and most others
    Remedy("numbers are brought into the range that it takes", "", _clamp,
           r"(?:range.{0,30}|be in )\[\s*(-?[0-9]*\.?[0-9]+)\s*,\s*(-?[0-9]*\.?[0-9]+)\s*\]"
           r"|between (-?[0-9]*\.?[0-9]+) and (-?[0-9]*\.?[0-9]+)|range: ?(-?[0-9]+)\.\.(-?[0-9]+)"
           r"|maximum output tokens \(([0-9]+)\)|[0-9] > ([0-9]+), which is the maximum"
           r"|(?:less than or equal to|at most|<=|maximum(?: allowed)?(?: value)?(?: is| of|:)?) ?(-?[0-9]*\.?[0-9]+)",
           lesson=False),
    # Gemini (googleapis/python-genai#867), Groq, Cerebras, llama.cpp
    Remedy("a format beside tools is asked for in words", "response_format", _schema_in_words,
           r"response mime type.{0,40}unsupported|response_format.{0,60}(with|and) tools|grammar constraints with tools"
           r"|json mode cannot be combined|.tools. is incompatible with .response_format"),
    # LM Studio; OpenAI, which wants the word JSON in the messages
    Remedy("JSON mode is asked for as a schema", "response_format", _schema_instead,
           r"response_format|json_object|must contain the word .?json"),
    # Mistral
    Remedy("tool call ids are nine letters or digits", "messages", None,
           r"tool.?call.?id.* length of 9", {"tool_ids": "nine"}),
    # Claude behind a gateway (farion1231/cc-switch#1181); OpenAI, which takes 40
    Remedy("tool call ids are at most 40 letters, digits, - and _", "messages", None,
           r"(tool_use\.id|tool_?use_?id|tool_call_?id|tool_calls?\S*\.id)\S{0,3} ?.{0,80}"
           r"(pattern|match|invalid|too long)", {"tool_ids": "plain"}),
    # OpenAI, Azure, DeepSeek (defilantech/LLMKube#1525)
    Remedy("tools get names of letters, digits, - and _", "messages", None,
           r"function\.name|tools\S*\.name|(function|tool) names?.{0,80}(pattern|match|characters|contain|invalid)"
           r"|invalid (function|tool) name", {"tool_names": True}),
    # Gemini (tashfeenahmed/freellmapi#97); llama.cpp's grammars
    Remedy("schemas of tools hold what Ollama keeps of them", "tools", None,
           r"Unknown name .{0,60}(tools|function_declarations)|invalid schema for function"
           r"|function_?declarations?.{0,120}(items|schema|properties)|moonshot flavored|" + _SCHEMA_REFUSED,
           {"plain_schemas": True}),
    # llama.cpp, vLLM
    Remedy("a schema that its grammar refuses is asked for in words", "response_format", _schema_in_words,
           _SCHEMA_REFUSED),
    # Mistral
    Remedy("an assistant turn stands between results and a question", "messages", None,
           r"unexpected role .?user.? after role .?tool", {"bridge": True}),
    # Templates of Gemma and Mistral at llama.cpp (ggml-org/llama.cpp#19851)
    Remedy("neighbouring turns of one role are joined", "messages", None,
           r"roles must alternate|alternate (between|with)|successive user or|start with a user message"
           r"|first message must use", {"merge": True, "system": "first"}),
    # Templates of Qwen, at Ollama too (ollama/ollama#16988)
    Remedy("all system texts stand in one turn at the beginning", "messages", None,
           r"system message.{0,30}(beginning|first)|only one system|multiple system|unexpected role .?system"
           r"|initial optional system message", {"system": "first"}),
    # Templates of Gemma; Google's own servers
    Remedy("system texts are told by the user", "messages", None,
           r"system (role|message|prompt|instruction)s?.{0,20}not (be )?(supported|enabled|allowed)"
           r"|(developer|system) instruction is not enabled|does not support .system|got system|top-level .?system"
           r"|role: system", {"system": "user"}),
    # OpenAI (ollama/ollama-python#506)
    Remedy("unknown roles are system turns", "messages", None,
           r"invalid value: .\w+.[.,] supported values are:? .{0,60}assistant|role.{0,40}(must|should) be one of"
           r"|role: unknown variant|not a valid role|is not one of \[.{0,60}assistant|using 'role' does not match"
           r"|(unknown|invalid|unsupported|unexpected) (message )?role", {"known_roles": True}),
    # Bedrock, Claude (BerriAI/litellm#7169)
    Remedy("something stands for empty text", "messages", None,
           r"is blank|content.{0,60}(non-?empty|not be empty|is empty|cannot be empty|must have|non-whitespace)"
           r"|empty content|with role '\w+' must not be empty", {"filler": "(empty)"}),
    # Mistral, DeepSeek
    Remedy("a turn to be continued is marked as one", "messages", None,
           r"prefix.{0,20}true|last message must.{0,40}prefix|expected last role", {"prefix": True}),
    # llama.cpp (ggml-org/llama.cpp#20861)
    Remedy("thinking is off while a turn is continued", "chat_template_kwargs", _set({"enable_thinking": False}),
           r"prefill is incompatible with enable_thinking", lesson=False),
    # OpenAI in 2026 (BerriAI/litellm#33221)
    Remedy("reasoning_effort none is sent with tools", "reasoning_effort", _set("none"),
           r"set reasoning_effort to .?none"),
    # DeepSeek (anomalyco/opencode#25000)
    Remedy("every assistant turn carries reasoning_content", "messages", None,
           r"reasoning_content.{0,80}(must be|is missing|is required|passed back)|missing .?reasoning_content",
           {"fill_reasoning": True}),
    # OpenAI, to accounts that are not verified (open-webui/open-webui#16452)
    Remedy("whole answers are asked for and given as streams", "stream", None,
           r"verified to stream|does not support stream|stream(ing)?'? is not (supported|allowed|available)"
           r"|'stream' does not support true|in streaming mode|unsupported for streaming", {"stream": "never"}),
    # Qwen at DashScope
    Remedy("streams are asked for and given as whole answers", "stream", None,
           r"only supports? .{0,20}stream|stream(ing)?.{0,10}(must be|is) (set to |enabled|required|true)"
           r"|must (be|set|have).{0,20}stream|non-streaming calls|stream=false", {"stream": "always"}),
    # DashScope, Gemini (mem0ai/mem0#6861)
    Remedy("texts for embeddings go out in portions", "input", None,
           r"(?:batch|inputs?|texts|items|requests).{0,60}?(?:larger than|at most|exceed\w*|up to|more than|<="
           r"|max(?:imum)?(?: of| allowed batch size| length| number of inputs is)?|limit is)\D{0,12}([0-9]{1,5})\b"
           r"(?! tokens)|at most ([0-9]{1,5}) (?:requests|inputs|texts|items)", _portion),
    # Mistral, Voyage, OpenAI: too many tokens at once, of texts that fit one by one
    *(Remedy(f"texts for embeddings go out in portions of {size}", "input", None,
             r"split into more batches|tokens (in|per) .{0,20}batch|tokens per request", {"batch": size})
      for size in (8, 1)),
    # llama.cpp (gpustack/gpustack#950)
    Remedy("texts for embeddings are cut to what it takes", "input", _cut_texts,
           r"too large to process|context (length|size)|maximum.{0,20}(length|tokens)|too (long|many tokens)"
           r"|less than [0-9]+ tokens|allowed token size|range of input length", lesson=False),
    # OpenAI
    Remedy("max_completion_tokens is sent for max_tokens", "max_tokens", _rename("max_completion_tokens"),
           r"max_completion_tokens.? instead"))
# For a key that the refusal names.  A key without a row is left out.
REMEDIES = (Remedy("max_completion_tokens is sent for max_tokens", "max_tokens", _rename("max_completion_tokens")),
            Remedy("max_tokens is sent for max_completion_tokens", "max_completion_tokens", _rename("max_tokens")),
            Remedy("random_seed is sent for seed", "seed", _rename("random_seed")),
            Remedy("output_dimension is sent for dimensions", "dimensions", _rename("output_dimension")),
            Remedy("JSON mode is asked for as a schema", "response_format", _schema_instead),
            Remedy("a schema is asked for in words", "response_format", _schema_in_words),
            Remedy("four stop strings are sent, the others watched for here", "stop", _first_four),
            Remedy("effort max is sent as high", "reasoning_effort", _lower_effort),
            Remedy("reasoning_content is left out", "reasoning_content", _messages_without),
            Remedy("reasoning_details is left out", "reasoning_details", _messages_without),
            Remedy("strict is left out of tools", "strict", _tools_without_strict))
_VALUE_REFUSED = re.compile(
    r"must be (between|less|greater|at most|at least|in|>|<|one of)|out of range|should be (less|greater)|valid range"
    r"|both be specified|only be set to|Supported values|invalid schema|schema conversion|grammar", re.I)
# The refusal asks for more of something, which is no reason to leave it out.
_DEMANDS = re.compile(
    r"(must be|needs? to be) (passed|provided|included|present|set|sent)|(is|are) (missing|required)|[Mm]issing")
# What servers say with a status that means something else to Ollama clients: 404 makes them pull the model.
_NOT_FOUND_MEANS = (
    (re.compile("support tool use|supports? tools|tool.{0,20}not supported|tool_choice", re.I),
     "does not support tools"),
    (re.compile("support (image|vision)|image.{0,20}not supported", re.I), "does not support images"))
# Never dropped: an answer without them would be an answer to another question (rule 29).
_ESSENTIAL = frozenset(("model", "messages", "stream", "tools", "prompt", "input", "images", "suffix"))
_NESTED = {"enable_thinking": "chat_template_kwargs", "include_usage": "stream_options", "effort": "reasoning",
           "max_new_tokens": "max_tokens"}
# What editors add for themselves and strict servers refuse on the relay (clients rule 43).
CLIENT_KEYS = ("options", "keep_alive", "think", "format")
CLIENT_MESSAGE_KEYS = ("copilot_cache_control", "copilot_references", "cot_id", "cot_summary", "reasoning_content")


def meant_for_ollama(error: UpstreamRefused) -> UpstreamRefused:
    """A refusal with the status, and the words, that Ollama has for it."""
    for pattern, words in _NOT_FOUND_MEANS if error.status == 404 else ():
        if pattern.search(error.message):
            error.status, error.message = 400, f"{error.message} (the model {words})"
    return error


def refused_keys(error: UpstreamRefused, body: dict) -> list[str]:
    """The keys of `body` that a refusal may be about, likeliest first (upstreams rule 27); none when it wants more."""
    if _DEMANDS.search(error.message):
        return []
    told = error.body
    told = as_dict(told[0] if isinstance(told, list) and told else told)
    param = as_dict(told.get("error")).get("param") or told.get("param")
    keys = re.findall(r"\w+", as_text(param))
    for holder in (told, as_dict(told.get("message"))):
        for problem in as_list(holder.get("detail")):
            keys += [str(part) for part in reversed(as_list(as_dict(problem).get("loc")))]
    message_keys = {key for message in as_list(body.get("messages")) if isinstance(message, dict) for key in message}
    ours = set(body) | set(_NESTED) | (message_keys - {"role", "content", "name"}) | {"strict"}
    keys += sorted(ours.intersection(re.findall(r"\w+", error.message.lower())), key=len, reverse=True)
    keys = [_NESTED.get(key, key) for key in keys]
    return [key for key in dict.fromkeys(keys) if key in body or key in message_keys or key == "strict"]


class Attempt(NamedTuple):
    """How a call is sent: the target's habits, and edits of the body; `words` tell what of it was learned."""

    habits: Habits
    edits: tuple = ()               # (remedy, match of its pattern)
    words: tuple = ()
    tried: tuple = ()               # remedies, whether they helped or not

    def body(self, render: Callable) -> WireRequest:
        """The call that `render(habits)` renders, edited."""
        wire = render(self.habits)
        for remedy, told in self.edits:
            remedy.edit(wire.body, remedy.key, told)
        return wire


class Healer:
    """Knows how targets want their requests; `where` is a model and a kind of request."""

    def __init__(self, preset: Preset) -> None:
        rows = (Remedy("", key, _rename(new) if new else _drop) for key, new in preset.lessons.items())
        self._default = Attempt(preset.habits, tuple((row, None) for row in rows))
        self._known: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    def known(self, where: tuple) -> Attempt:
        """What is known to work, or what the preset says."""
        return self._known.get(where, self._default)

    def remember(self, where: tuple, attempt: Attempt) -> tuple:
        """An attempt that succeeded; returns the words of what is new in it."""
        with self._lock:
            new = tuple(words for words in attempt.words if words not in self.known(where).words)
            lessons = tuple(edit for edit in attempt.edits if edit[0].lesson)
            self._known[where] = attempt._replace(edits=lessons, tried=())
            while len(self._known) > 4096:
                self._known.popitem(last=False)
        return new

    def heal(self, error: UpstreamRefused, body: dict, attempt: Attempt, kept: tuple = ()) -> Optional[Attempt]:
        """Another attempt in answer to a refusal of `body`, which may turn out the same; None when nothing is left to
        try.  `kept` names fields that the client wants as they are."""
        lasting = not _VALUE_REFUSED.search(error.message)
        for remedy, told in self._remedies(error, body):
            attempted = (remedy, told and told.string)
            if attempted in attempt.tried or (remedy.edit and remedy.key in kept):
                continue
            lesson = remedy.lesson and (lasting or remedy.edit not in (_drop, _schema_in_words))
            tried, words = attempt.tried + (attempted,), attempt.words + ((remedy.words,) if lesson else ())
            habits = attempt.habits._replace(**(remedy.habits(told) if callable(remedy.habits) else remedy.habits))
            if habits != attempt.habits or remedy.edit is not None:
                edits = () if remedy.edit is None else ((remedy._replace(lesson=lesson), told),)
                return Attempt(habits, attempt.edits + edits, words, tried)
        return None

    @staticmethod
    def _remedies(error: UpstreamRefused, body: dict) -> Iterator[tuple[Remedy, Any]]:
        """(remedy, match of its pattern), likeliest first."""
        text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", error.message[:20000])        # 8,192 is 8192
        limit = next((key for key in ("max_tokens", "max_completion_tokens") if key in body), None)
        if limit and CONTEXT_OVERFLOW.search(text) \
                and not re.search(f"unsupported|not supported|{limit} must", text, re.I):
            yield Remedy("", limit, _drop, lesson=False), None
            return
        if error.status not in (400, 404, 413, 422, 500, 501):
            return
        keys = refused_keys(error, body)
        for row in SYMPTOMS:
            told = re.search(row.pattern, text, re.I) if row.edit or row.key in body else None
            if told and row.key:
                yield row, told
            elif told:                  # a row for whatever number is named
                yield from ((row._replace(key=key), told) for key in keys)
        named = as_dict(as_dict(error.body).get("error")).get("param")
        if error.status in (413, 500) or (error.status == 404 and not named):
            return                      # a server in trouble, an unknown model: not cured by leaving fields out
        for key in keys:
            yield from ((row, None) for row in REMEDIES if row.key == key)
            if key in CLIENT_MESSAGE_KEYS:
                yield Remedy(f"{key} is left out", key, _messages_without), None
            if key not in _ESSENTIAL:
                yield Remedy(f"{key} is left out", key, _drop), None


class CallExtras:
    """A cache of what a provider attached to tool calls and wants to see again (Gemini's extra_content,
    OpenRouter's reasoning_details, DeepSeek's reasoning_content), the oldest forgotten."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    def keep(self, calls: Iterable) -> None:
        """Remembers what came with `calls`."""
        with self._lock:
            self._kept.update((self._key(call), call.extra) for call in calls if call.extra)
            while len(self._kept) > CALL_EXTRAS:
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
        """Ids like call_0 come again in every conversation; the whole call hardly does.  JavaScript writes 1.0 as 1."""
        return digest_of(json.dumps([call.id, call.name, call.arguments], sort_keys=True).replace(".0", ""))

# ----------------------------------------------------------------------------
# Room 14.  Operations: what they share, then one short function per verb
# ----------------------------------------------------------------------------


# What lives under /v1 and is called without it by some clients (Copilot Chat 0.37).
_ROOT_ALIASES = frozenset(("/chat/completions", "/completions", "/embeddings", "/models", "/responses", "/messages"))
_ODD_PREFIX = re.compile(r"^/v1(?=/api/)|^/api(?=/v1/(?!models$))|^/api/(?:chat|generate)(?=/api/)|^/v1(?=/v1/)")


# Escapes of letters, digits and -._~ mean the characters themselves (RFC 3986 section 6.2.2.2).
_ESCAPED = re.compile("%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")


def clean_path(path: str) -> str:
    """The path a client meant: slashes doubled by a base URL, prefixes doubled by a habit."""
    path = re.sub("//+", "/", _ESCAPED.sub(lambda found: chr(int(found[1], 16)), path))
    path = _ODD_PREFIX.sub("", path.rstrip("/")) or "/"
    return "/v1" + path if path in _ROOT_ALIASES else path


class Request:
    """What a client asks.  `body` is bytes, or an iterator of its pieces for routes that stream it."""

    def __init__(self, method: str, target: str, version: int, headers: dict) -> None:
        self.method, self.target, self.version, self.headers = method, target, version, headers
        path, _, self.query = target.partition("?")
        self.path = clean_path(path)
        self.body: Any = b""
        self.length, self.chunked, self.keep, self.packed = 0, False, version == 1, False
        self.route: Any = None
        self.started = time.monotonic_ns()


def request_dialect(path: str) -> Dialect:
    """Who must understand our errors: told by the path alone, so that it works for paths unknown."""
    return ANTHROPIC if path.startswith("/v1/messages") else OPENAI if path.startswith("/v1") else OLLAMA


class Response:
    """What the client gets: `lines`, lists of pieces as they come, `length` bytes altogether if that is known; a whole
    `body` becomes one list of one piece.  `failure` is the reason of an error that is passed on, for the log."""

    def __init__(self, status: int, body: bytes = b"", media_type: str = JSON, headers: Iterable = (),
                 lines: Optional[Iterable] = None, length: Optional[int] = None) -> None:
        self.status, self.media_type, self.headers = status, media_type, tuple(headers)
        self.reason = self.failure = ""
        self.lines, self.length = ([[body]], len(body)) if lines is None else (lines, length)


def json_response(value: Any, status: int = 200, headers: Iterable = ()) -> Response:
    """A whole JSON answer."""
    return Response(status, dump(value), JSON, headers)


class Log:
    """The access line of mission C10 on stdout, [PROXY] lines with --debug, warnings on stderr; all on one line each,
    with keys hidden.  A thread of its own writes them, so that whoever does not read the log stops nothing."""

    def __init__(self, config: Config) -> None:
        self._secrets = config.secrets
        self.debugging = config.debug and not config.no_log
        self.tap = self.data if self.debugging else None        # sees every chunk of a stream (mission B9)
        self._quiet = config.no_log
        self._waiting: collections.deque = collections.deque()      # (stream, line)
        self._lost = 0                  # lines that nobody took
        self._some = threading.Event()
        self._thread, self._starting = threading.Thread(target=self._run, name="log", daemon=True), threading.Lock()

    def redact(self, text: str) -> str:
        """`text` without any key of ours."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def access(self, client: str, request_line: str, status: int, size: int, milliseconds: float, reason: str) -> None:
        """ACCESS: 2023/04/15 12:34:56 127.0.0.1 "POST /api/generate HTTP/1.1" 200 1024 45.6ms, from 400 on "why"."""
        if not self._quiet:
            line = self.redact(one_line(request_line, 400).replace('"', "%22"))
            why = ' "' + self.redact(one_line(reason, 200)).replace('"', "'") + '"' if reason and status >= 400 else ""
            self._write(sys.stdout, f'ACCESS: {time.strftime("%Y/%m/%d %H:%M:%S")} {client} "{line}" '
                                    f'{status} {size} {milliseconds:.1f}ms{why}')

    def debug(self, text: str) -> None:
        """One [PROXY] line, when --debug is given."""
        if self.debugging:
            now = time.time()
            stamp = f"{time.strftime('%H:%M:%S', time.localtime(now))}.{int(now * 1000) % 1000:03d}"
            line = one_line(self.redact(text), 20000)
            self._write(sys.stdout, f"{stamp} {threading.current_thread().name} [PROXY] {line}")

    def data(self, label: str, data: bytes, started: Optional[int] = None) -> None:
        """debug() of bytes that came or went, and of the time since `started`, monotonic nanoseconds."""
        if self.debugging:
            took = f" (took {(time.monotonic_ns() - started) / 1e6:.0f}ms)" if started else ""
            self.debug(f"{label}: {data.decode('utf-8', 'replace')}{took}")

    def say(self, text: str) -> None:
        """Something the operator should know."""
        if not self._quiet:
            self._write(sys.stderr, one_line(self.redact(text), 1000))

    def _write(self, stream: Any, line: str) -> None:
        with self._starting:
            if not self._thread.ident:  # not before there is something to do: --workers forks, which threads forbid
                self._thread.start()
        if len(self._waiting) < 10000:
            self._waiting.append((stream, line))
        else:
            self._lost += 1
        self._some.set()

    def _run(self) -> None:
        while True:
            self._some.wait()
            self._some.clear()
            while self._waiting:
                stream, line = self._waiting[0]
                lost, self._lost = self._lost, 0
                line += f"\n({lost} lines were lost: nobody read the log)" if lost else ""
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.write(line.encode("utf-8", "replace").decode("utf-8") + "\n")
                    stream.flush()
                self._waiting.popleft()
            time.sleep(0.02)            # so that one wake-up serves many lines

    def close(self) -> None:
        """Waits a moment until what was logged is written."""
        for _ in range(100):
            time.sleep(0.01 if self._waiting else 0.0)


class Context:
    """What every operation may use, built once: configuration, target, catalogue, memory."""

    clock = Clock()

    def __init__(self, config: Config) -> None:
        self.config, self.target = config, config.destination
        self.log = Log(config)
        self.watcher = Watcher()
        self.upstream = Upstream(config)
        self.healer = Healer(self.target.preset)
        self.call_extras = CallExtras()
        self.absent: dict = {}          # route that the target lacks -> until when it is not asked for it
        self.openers: set = set()       # models whose answers begin inside a think tag
        self.fallback = parse_target(config.fallback, "ollama") if config.fallback else None
        known = bool(self.target.name or self.target.preset.hosts)
        self._api = config.target_api if config.target_api != "auto" else self.target.preset.api if known else ""
        self._ask_again = -1e9          # not before: the target did not answer
        self._lock = threading.Lock()
        self.client_authorization = ""  # with --forward-auth: the last that came in by the door, for lists
        self.ident = call_id()          # tells requests that went through this proxy
        self.catalogue = Catalogue(config, self.fetch, self.api, self.log.say)

    def api(self) -> str:
        """What the target speaks, "openai" or "ollama": found out by asking, kept once it answered."""
        if self._api:
            return self._api
        with self._lock:
            if not self._api and time.monotonic() > self._ask_again:
                try:
                    self._api = "ollama" if self._is_ollama() else "openai"
                    self.target, self.catalogue.silence = self.target._replace(api=self._api), None
                except UpstreamError as error:          # down, or hung: an Ollama answers this at once
                    self.catalogue.silence, hung = error, isinstance(error, UpstreamTimeout)
                    self._ask_again = time.monotonic() + (10 * FAILURE_MEMORY if hung else FAILURE_MEMORY)
        return self._api or "openai"

    def _is_ollama(self) -> bool:
        """Asks for a version, then for the OpenAI list.  Ollama shows every model with a tag (ollama-api 1.9);
        a server that has a version and lists ids without one emulates a part of Ollama (KoboldCpp, LocalAI, a
        proxy of our own kind), and is taken for the OpenAI server that it is."""
        status, _, payload = self.fetch(True, "/api/version", PROBE_TIMEOUT)
        if status == 200 and isinstance(as_dict(payload).get("version"), str):
            status, _, payload = self.fetch(False, "/models", PROBE_TIMEOUT)
            return all(":" in info.id for info in read_models(payload) or () if status == 200)
        if status >= 500 and status != 501:
            raise UpstreamUnreachable(f"{self.target.url} is in trouble: HTTP {status}")
        return False

    def headers(self, request: Optional[Request] = None, key: bool = True) -> list:
        """What goes to the target with every request: its key, never the client's unless so configured; without `key`
        what a server gets that our secrets are not meant for."""
        target, client = self.target, self.authorization_of(request)
        own = ("api-key", target.key) if target.key_header == "api-key" else ("Authorization", f"Bearer {target.key}")
        secret = [("Authorization", client)] if client else [own] if target.key else []
        secret += [pair for pair in self.config.header if not client or pair[0].lower() != "authorization"]
        marks = [request.headers[LOOP_HEADER]] if request is not None and LOOP_HEADER in request.headers else []
        return OWN_HEADERS + (secret if key else []) + [(LOOP_HEADER, ", ".join(marks + [self.ident]))]

    def authorization_of(self, request: Optional[Request]) -> str:
        """The client's own Authorization, when it is to be passed on; the key of our own door never is.  Lists are
        nobody's: they are asked with our key, or else with the last one seen, and so show its models to all."""
        if not self.config.forward_auth:
            return ""
        if request is None:
            return "" if self.target.key else self.client_authorization
        own = self.config.client_key
        offered = request.headers.get("authorization", ""), f"Bearer {request.headers.get('x-api-key', '')}"
        return next((one for one in offered if is_real_key(one) and not (own and own in one)), "")

    def path(self, native: bool, path: str) -> str:
        """A path on the target, its base and the query of the configured URL added."""
        whole, query = (self.target.root if native else self.target.base) + path, self.target.query
        return whole + (f"{'&' if '?' in whole else '?'}{query}" if query else "")

    def fetch(self, native: bool, path: str, timeout: Optional[float]) -> tuple:
        """GET of a JSON document -> (status, headers, value; None, or the text of an error, when it is no JSON).
        Raises UpstreamError."""
        with Scope(self) as scope:
            headers = self.headers() + [("Accept", JSON)]
            reply = scope.open(self.target, "GET", self.path(native, path), headers, b"", timeout)
            data = reply.hide_key(reply.read(64 * 1024 * 1024))
            value = load_or_none(data)
            told = error_text(data, reply.status) if value is None and reply.status >= 400 else value
            return reply.status, reply.headers, told


LOOP_HEADER = "x-ollama-proxy"          # the proxies that a request came through
OWN_HEADERS = [("User-Agent", f"ollama-proxy/{__version__}"), ("Accept-Encoding", "identity")]
_PLACEHOLDERS = frozenset("""undefined null none ollama dummy test key token api-key lm-studio not-needed no-key
    no-key-required sk-no-key-required api-key-not-set default-key okki changeme your-api-key""".split())


def is_real_key(authorization: str) -> bool:
    """A key, and not one of the words that clients send when they have none."""
    scheme, _, key = authorization.strip().partition(" ")
    key = key.strip().lower()
    return scheme.lower() == "bearer" and key not in _PLACEHOLDERS and (len(key) >= 8 or key.startswith("sk-"))


def refusal(reply: Reply) -> UpstreamRefused:
    """An error answer of the target, read and understood."""
    try:
        data = reply.hide_key(reply.read(MAX_ERROR_BYTES + MAX_HEAD_BYTES, cut=True))[:MAX_ERROR_BYTES]
    except (StreamTruncated, BadUpstreamPayload):
        data = b""                      # the status is worth more than half a text
    wait_for = reply.headers.get("retry-after") or reply.headers.get("llm_provider-retry-after")
    headers = [("Retry-After", one_line(wait_for, 60))] if wait_for and reply.status in (402, 429, 503) else []
    return UpstreamRefused(error_text(data, reply.status), reply.status if 400 <= reply.status <= 599 else 502, headers,
                           load_or_none(data), data, reply.content_type)


_LOADING = re.compile(r"loading|warming up|starting up", re.I)


def send(scope: Scope, request: Request, native: bool, where: tuple, render: Callable, kept: tuple = ()) -> Reply:
    """One translated request to the target, healed and repeated where that helps.  `render(habits)` gives the
    WireRequest; `where` tells the kinds of requests apart whose lessons are their own, `kept` the fields that stay.

    Raises what the last, most healed request was refused for.  A server that is still loading is waited for.
    """
    context, patient_until = scope.context, time.monotonic() + scope.context.config.timeout
    attempt = before = context.healer.known(where)
    refused, remedies = "", 0
    while True:
        wire = attempt.body(render)
        path, data = context.path(native or wire.path == "/infill", wire.path), dump(wire.body)
        accepted = EVENT_STREAM if wire.body.get("stream") and not native else JSON
        context.log.data(f"POST {context.target.scheme}://{context.target.authority}{path} - Request", data)
        reply = scope.open(context.target, "POST", path, context.headers(request) + [
            ("Content-Type", JSON), ("Accept", accepted)], data)
        if reply.status < 300:
            for words in context.healer.remember(where, attempt) if attempt.tried else ():
                context.log.say(f"{where[0]}: the target refuses it otherwise, so from now on {words}")
            return reply
        error = refusal(reply)
        context.log.debug(f"Target response: {error.status} {error.message}")
        loading = error.status == 503 and (_LOADING.search(error.message) or "model_loading" in str(error.body))
        if loading and time.monotonic() < patient_until:
            told = dict(error.headers).get("Retry-After", "")
            scope.pause(min(max(float(told) if re.fullmatch("[0-9]{1,4}", told) else 1.0, 1.0), 30.0))
            continue
        refusal_text = re.sub("[0-9]+", "", error.message)      # without ids of requests
        if refusal_text == refused and not (attempt.edits and attempt.edits[-1][1]):    # the last remedy was no help
            attempt = before._replace(tried=attempt.tried)
            wire = attempt.body(render)
            data = dump(wire.body)
        before, refused = attempt, refusal_text
        while True:
            healed = context.healer.heal(error, wire.body, attempt, kept) if remedies < 6 else None
            if healed is None:
                raise meant_for_ollama(error) if request.route.dialect is OLLAMA else error
            if dump(healed.body(render).body) != data:
                break
            attempt = attempt._replace(tried=healed.tried)      # that remedy changes nothing
        attempt, remedies = healed, remedies + 1


def unpacked(request: Request) -> bytes:
    """The body of a request that must be read here.  Raises BadRequest 415 for a coding that cannot be."""
    if request.packed:
        inflater(request.headers["content-encoding"].strip().lower(), unreadable)
    return request.body


def blame_our_key(context: Context, error: ProxyError, request: Request) -> ProxyError:
    """Trouble with *our* key is not the client's 401, wherever in the answer the target told it."""
    if isinstance(error, UpstreamError) and is_about_key(error.status, error.message) \
            and not context.authorization_of(request):
        verdict = "refused the key of this proxy" if context.target.key else "wants a key"
        text = f"{context.target.url} {verdict} ({context.config.key_source}): {error.message}"
        return UpstreamError(text, 502)
    return error


def with_defaults(config: Config, model: str, call: ChatCall) -> ChatCall:
    """--set, where the client said nothing."""
    values, rest = settings_for(config, model, call.model)
    options, extra = parse_options(values)
    known = set(call.options) | {name for name, wire in OLLAMA_OPTION_KEYS.items() if wire in call.extra}
    options = {key: value for key, value in options.items() if key not in known}
    return call._replace(options={**options, **call.options}, extra={**extra, **call.extra},
                         think=call.think if call.think is not None else parse_think(rest.get("think")),
                         keep_alive=call.keep_alive if call.keep_alive is not None else rest.get("keep_alive"),
                         format=call.format if call.format is not None else parse_format(rest.get("format")))


def thinks_always(config: Config, model: str) -> bool:
    """A model of THINK_MODELS or the built-ins (mission E2)."""
    names = {name.lower() for name in BUILT_IN_THINK_MODELS + tuple(config.think_models)}
    return model.lower() in names or re.sub(":latest$", "", model.lower()) in names


def converse(request: Request, scope: Scope) -> Response:
    """POST /api/chat, /api/generate, /v1/chat/completions, /v1/completions: the longest road, in order."""
    context, config, client = scope.context, scope.context.config, request.route.dialect
    target = DIALECTS[context.api()]
    call = client.parse_chat(load_request(unpacked(request)), request.route.face)
    own = context.target.key and context.authorization_of(request)      # may have models that our key does not list
    info = context.catalogue.resolve(call.model, client is not OLLAMA or bool(own))
    if not call.messages and call.prompt is None:
        context.catalogue.refuse_when_down()    # nothing is loaded where nobody answers
        return json_response(load_answer(call, context.clock.stamp()))
    call = with_defaults(config, info.id, call)
    if config.generate_via == "completions" and call.face == "generate":
        call = as_continuation(call)
    if target is OLLAMA:
        call = for_ollama(call, info, config)
    wired = call._replace(model=info.id, messages=context.call_extras.attach(call.messages))
    sent = time.monotonic_ns()

    def render(habits: Habits) -> WireRequest:
        habits = habits._replace(infill=info.owner == "llamacpp")
        return target.render_chat(wired, habits, info.context_now or info.context)

    def ask() -> Reply:
        nonlocal wired
        while True:
            where = (info.id, wired.prompt is None, bool(wired.tools))
            try:
                return send(scope, request, target is OLLAMA, where, render)
            except UpstreamRefused as error:
                no_chats = error.status == 404 and wired.prompt is None and "model" not in error.message.lower()
                if call.face != "generate" or not no_chats or as_continuation(wired) is wired:
                    raise
                wired = as_continuation(wired)

    def pieces() -> Iterator[bytes]:
        yield from ask().pieces(SIGN_OF_LIFE if encoder.alive else 0.0)

    encoder = client.Encoder(call, context.clock, request.started, sent, config.reasoning_keys)
    decoder = target.Decoder(wired)
    known = settings_for(config, info.id)[1]
    config = config._replace(reasoning=known["reasoning"]) if "reasoning" in known else config
    steps = steps_for(config, call, decoder, info.id in context.openers or bool(known.get("open_think")))
    translation = Translation(decoder, encoder, steps, observer(context, info.id, steps), context.log.redact,
                              context.log.tap)
    if call.stream:
        lines = translation.lines(with_pauses(pieces()) if encoder.alive else pieces())
        return Response(200, media_type=encoder.media_type, lines=primed(lines))
    data = ask().read()
    context.log.data("Target response", data, request.started)
    response = Response(200, translation.whole(data))
    context.log.data("Ollama response" if client is OLLAMA else "Response", response.lines[0][0], request.started)
    return response


def relay_or_translate(request: Request, scope: Scope) -> Response:
    """POST /v1/messages, /v1/responses: relayed where the target speaks the route, else translated."""
    context, how = scope.context, scope.context.config.translate
    if how == "never" or (how == "auto" and context.absent.get(request.path, 0.0) < time.monotonic()):
        response = relay_openai(request, scope)
        if how == "never" or not lacks_route(response):
            if response.status in (401, 403, 404) and "x-should-retry" not in dict(response.headers):
                response.headers += (("x-should-retry", "false"),)      # SDKs ask again otherwise
            return response
        context.absent[request.path] = time.monotonic() + ROUTE_MEMORY
    if request.route.face == "count":
        call = parse_anthropic(load_request(unpacked(request)), "count")
        return json_response({"input_tokens": call.prompt_tokens()})    # an estimate: a quarter of the bytes
    return converse(request, scope)


def lacks_route(response: Response) -> bool:
    """Whether an answer means that the target has no such endpoint, rather than no such model.  LM Studio says it
    with status 200."""
    body = b"".join(response.lines[0]) if isinstance(response.lines, list) else b""
    return (response.status in (404, 405, 501) and b"model" not in body.lower()) \
        or b"Unexpected endpoint" in as_text(as_dict(load_or_none(body)).get("error")).encode()


def observer(context: Context, model: str, steps: list) -> Callable:
    """Sees all events of an answer; notes what later requests profit from: provider extras of tool calls, models
    that think, models whose answers begin inside a think tag."""
    tags = next((step for step in steps if isinstance(step, ThinkTags)), None)

    def observe(events: list) -> None:
        for event in events:
            if isinstance(event, ThinkingDelta):
                context.catalogue.note_thinking(model)
            elif isinstance(event, ToolCalls):
                context.call_extras.keep(event.calls)
            elif isinstance(event, Finish) and tags is not None and tags.begins_inside is not None:
                (context.openers.add if tags.begins_inside else context.openers.discard)(model)

    return observe


def steps_for(config: Config, call: ChatCall, decoder: Any, opened: bool) -> list:
    """What happens to events between the dialects: JSON is bare (clients rule 20), stop strings beyond the fourth are
    watched for here (upstreams rule 9), `think: false` hides all thinking (rule 60)."""
    last, mode, steps = call.messages[-1] if call.messages else None, config.reasoning, []
    if isinstance(decoder, OpenAIDecoder):
        if last is not None and last.role == "assistant" and last.content and not last.tool_calls:
            steps.append(Prefill(last.content))
        steps.append(ThinkTags(decoder, opened))
    if call.format is not None:
        steps.append(Fence())
    if len(call.options.get("stop", ())) > 4:
        steps.append(StopStrings(call.options["stop"]))
    if call.think is False or mode != "separate":
        steps.append(Reasoning("drop" if call.think is False else mode))
    return steps


def as_continuation(call: ChatCall) -> ChatCall:
    """A conversation as one plain prompt, for targets without a chat endpoint; pictures need one."""
    if call.prompt is not None or any(message.images for message in call.messages):
        return call
    return call._replace(prompt="\n\n".join(message.content for message in call.messages if message.content),
                         messages=(), tools=())


def for_ollama(call: ChatCall, info: ModelInfo, config: Config) -> ChatCall:
    """What an Ollama needs that OpenAI clients do not say: thinking for its models; and pictures as bytes."""
    if any(image.url for message in call.messages for image in message.images):
        raise BadRequest("image URLs are not currently supported, please use base64 encoded data instead")
    return call._replace(think=True) if call.think is None and thinks_always(config, info.id) else call


def resolve_as(context: Context, name: str, wording: str) -> ModelInfo:
    """Catalogue.resolve with the sentence Ollama uses at this endpoint (ollama-api 1.4)."""
    try:
        return context.catalogue.resolve(name)
    except BadRequest as error:
        hint = error.message.partition(" not found")[2]
        raise BadRequest(wording.format(name=name) + hint, 404, code="model_not_found") from None


def embed(request: Request, scope: Scope) -> Response:
    """POST /api/embed, /api/embeddings, /v1/embeddings."""
    context, client = scope.context, request.route.dialect
    target = DIALECTS[context.api()]
    call = client.parse_embed(load_request(request.body), request.route.face == "legacy")
    info = resolve_as(context, call.model, 'model "{name}" not found, try pulling it first')
    if not call.inputs:
        return json_response(client.render_embeddings(call, [], Usage(), 0))
    if call.keep_alive is None:
        call = call._replace(keep_alive=settings_for(context.config, info.id)[1].get("keep_alive"))
    vectors, counts, portion = [], [], []

    def render(habits: Habits) -> WireRequest:
        portion[:] = call.inputs[len(vectors):][:habits.batch or None]
        return target.render_embed(call._replace(model=info.id, inputs=tuple(portion)), habits)

    while len(vectors) < len(call.inputs):
        kept = ("input",) if call.truncate is False else ()
        data = send(scope, request, target is OLLAMA, (info.id, "embed"), render, kept).read()
        answer = load_or_none(data)
        if answer is None:
            raise BadUpstreamPayload(f"upstream sent embeddings that are not JSON: {error_text(data, 502)}")
        if as_dict(answer).get("error"):
            raise stream_error(answer)
        more, usage = target.read_embeddings(answer, len(portion))
        vectors += more
        counts.append(usage.prompt_tokens)
    usage = Usage(sum(counts) if all(counts) else None)
    return json_response(client.render_embeddings(call, vectors, usage, time.monotonic_ns() - request.started))


def constant(value: Any, media_type: str = JSON) -> Callable:
    """An operation that always answers the same."""
    body = dump(value) if media_type == JSON else value
    return lambda request, scope: Response(200, body, media_type)


def version(request: Request, scope: Scope) -> Response:
    """GET /api/version from memory: some clients wait less than two seconds for it."""
    return json_response({"version": scope.context.config.ollama_version})


def list_models(request: Request, scope: Scope) -> Response:
    """GET /api/tags."""
    return Response(200, tags_of(scope.context.catalogue.models()))


@functools.lru_cache(maxsize=4)
def tags_of(models: Listing) -> bytes:
    """The answer of /api/tags, which some clients ask for every second."""
    return dump({"models": list(map(ollama_tag, models))})


def list_running(request: Request, scope: Scope) -> Response:
    """GET /api/ps: what the target reports as loaded; the whole list where it reports no state."""
    models = scope.context.catalogue.models()
    known, now = any(info.running is not None for info in models), scope.context.clock.wall()
    return json_response({"models": [ollama_running(info, now) for info in models if info.running or not known]})


def show_model(request: Request, scope: Scope) -> Response:
    """POST /api/show from what is known; it never loads a model."""
    context = scope.context
    name = required(name_in(typed(load_request(request.body), OLLAMA_FIELDS)), "model is required")
    context.catalogue.models()
    info = resolve_as(context, name, "model '{name}' not found" if ":" in name else "model '{name}:latest' not found")
    base = re.sub(":latest$", "", info.alias or info.shown or info.id)
    return json_response(ollama_show(info, base, context.config.default_context))


def pull_model(request: Request, scope: Scope) -> Response:
    """POST /api/pull: success for a model that is there already, because that is true; else not ours to do."""
    context = scope.context
    body = typed(load_request(request.body), OLLAMA_FIELDS)
    name = required(name_in(body), "invalid model name")
    try:
        info = context.catalogue.resolve(name)
    except BadRequest:
        return unsupported(request, scope)
    if not info.raw:                    # taken on trust: nobody has seen it in a list
        return unsupported(request, scope)
    if not body.get("stream", True):
        return json_response({"status": "success"})
    return Response(200, ndjson_line({"status": "pulling manifest"}) + ndjson_line({"status": "success"}), NDJSON)


_VERBS = {"create": "creating models", "copy": "copying models", "delete": "deleting models", "push": "pushing models",
          "pull": "pulling models that the target does not serve", "blobs": "storing model files",
          "signout": "signing out"}


def unsupported(request: Request, scope: Scope) -> Response:
    """What only a real Ollama can do: relayed to one where there is one, else an honest 501."""
    context = scope.context
    if context.fallback is not None:
        return relay(scope, request, context.fallback, context.fallback.root + request.path, request.body, key=False)
    raise BadRequest(f"{_VERBS[request.path.split('/')[2]]} is not supported by this proxy: the models live on "
                     f"{context.target.url} (--fallback URL sends such requests to a real Ollama)", 501)


def list_openai_models(request: Request, scope: Scope) -> Response:
    """GET /v1/models: the target's own list, unless there is something to hide or to add."""
    context = scope.context
    api = context.api()
    if api == "openai" and not context.catalogue.filtered:
        return relay_openai(request, scope)
    entries = [openai_entry(info, api) for info in context.catalogue.models(False)]
    return json_response({"object": "list", "data": entries})


def show_openai_model(request: Request, scope: Scope) -> Response:
    """GET /v1/models/{id}, which several servers lack, out of the list."""
    api, name = scope.context.api(), urllib.parse.unquote(request.path[len("/v1/models/"):])
    try:
        info = scope.context.catalogue.resolve(name)
    except BadRequest:
        if api == "ollama" or scope.context.catalogue.filtered:
            raise
        return relay_openai(request, scope)     # below a model's name, or a name that stands in no list
    return json_response({**openai_entry(info, api), **({"id": name} if api == "ollama" else {})})


def openai_entry(info: ModelInfo, api: str) -> dict:
    """A list entry in OpenAI's form: the target's own where it speaks OpenAI."""
    if api == "ollama":
        return openai_model(info)
    return {**(info.raw or openai_model(info)), "id": info.alias or info.id}


# -- relays: same dialect on both sides

_ANSWER_HEADERS_DROPPED = HOP_BY_HOP | {"content-length", "content-type", "content-encoding", "set-cookie", "date",
                                        "server", "vary", "alt-svc", "strict-transport-security"}


def travelling(headers: dict, dropped: Iterable, prefixes: tuple) -> list:
    """The headers that may travel on: neither hop-by-hop nor named by Connection (RFC 9110 section 7.6.1), nor ours."""
    listed = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    return [(name, value) for name, value in headers.items()
            if name not in dropped and name not in listed and not name.startswith(prefixes)]


def relay(scope: Scope, request: Request, target: Target, path: str, body: Any, key: bool = True,
          heal: Optional[Callable] = None) -> Response:
    """One request passed on and its answer passed back, streams byte for byte.

    Without `key` the target is a stranger to our secrets.  `heal(error)` may give another body for one
    more try after a refusal.
    """
    log = scope.context.log
    own = scope.context.authorization_of(request) and key     # whose account pays is told beside one's own key only
    private = PRIVATE_HEADERS | HOP_BY_HOP | (set() if own else ACCOUNT_HEADERS)
    headers = scope.context.headers(request, key) + travelling(
        request.headers, private, ("access-control-", "sec-", "cf-"))
    whole = path + (f"{'&' if '?' in path else '?'}{request.query}" if request.query else "")
    while True:
        if isinstance(body, bytes):
            log.data(f"{request.method} {target.scheme}://{target.authority}{path.partition('?')[0]} - Request", body)
        reply = scope.open(target, request.method, whole, headers, body)
        answer = (reply.content_type, travelling(reply.headers, _ANSWER_HEADERS_DROPPED, ("access-control-",)))
        if reply.status < 400:
            break
        error = refusal(reply)
        body = heal(error) if heal is not None and error.status in (400, 422) else None
        if body is None:
            log.debug(f"Target response: {error.status} {error.message}")
            text = log.redact(error.raw.decode("latin-1")).encode("latin-1")
            # An empty error body looks like success to several clients.
            response = Response(error.status, text, answer[0] or TEXT, answer[1]) if text else \
                json_response(request_dialect(request.path).render_error(error), error.status, answer[1])
            response.failure = (blame_our_key(scope.context, error, request) if key else error).message
            return response
    length = None if "content-encoding" in reply.headers else reply.length
    if request.method == "HEAD" or reply.status in (204, 304):
        return Response(reply.status, b"", *answer, lines=(), length=length)
    answer = (answer[0] or "application/octet-stream", answer[1])
    if length is not None and length <= RELAY_WHOLE:
        data = reply.read()
        log.data("Target response", data, request.started)
        return Response(reply.status, data, *answer)
    pieces = tapped(reply.pieces(), log)
    # Of a stream the head goes out at once, for servers may be silent during a long prompt.
    lines = itertools.chain([[]], pieces) if answer[0].startswith(EVENT_STREAM) else primed(pieces)
    return Response(reply.status, b"", *answer, lines=lines, length=length)


def tapped(pieces: Iterable, log: Log) -> Iterator[list]:
    """The pieces of a relayed answer as lists of one, shown to --debug."""
    for piece in pieces:
        log.data("Target chunk", piece)
        yield [piece]


_MODEL_FIELD = re.compile(rb'"model"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')
_NAMING = ("model", "name", "source", "from")       # the keys under which requests name models


def model_parts(data: bytes, content_type: str) -> list[tuple[int, int]]:
    """Where the values of fields named "model" stand in a form (RFC 7578)."""
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)
    mark = b"--" + boundary[1].encode("latin-1") if boundary else b"--"
    at, found = 0 if data.startswith(mark) else -1, []
    while at >= 0:
        start, after = data.find(b"\r\n\r\n", at), data.find(b"\r\n" + mark, at + 1)
        head = data[at:start].lower()
        if 0 <= start < after and re.search(rb';\s*name="?model"?\s*(;|\r|$)', head):
            found.append((start + 4, after))
        at = after
    return found


def with_model(data: bytes, body: dict, model: str) -> bytes:
    """A JSON request with another model name; every other byte stays where that is possible."""
    found = list(_MODEL_FIELD.finditer(data))
    if len(found) == 1 and json.loads(found[0][1]) == body.get("model"):
        return data[:found[0].start(1)] + dump(model) + data[found[0].end(1):]
    return dump({**body, "model": model})


def load_relayed(context: Context, data: bytes) -> tuple[bytes, dict]:
    """(bytes to pass on, the object in them).  Where models are hidden the body is written anew, each name in it once:
    no other parser may read another one."""
    body = load_request(data)
    if context.api() == "ollama":
        body = lower_keys(body)
    elif context.catalogue.filtered:
        body = {key: value for key, value in body.items() if key in _NAMING or key.casefold() not in _NAMING}
    return dump(body) if context.catalogue.filtered else data, body


def relay_openai(request: Request, scope: Scope) -> Response:
    """/v1/* between an OpenAI client and a target that speaks it: only the model's name and the key change."""
    context, data, body = scope.context, request.body, None
    native = context.api() == "ollama"
    path = context.path(native, request.path if native else request.path[len("/v1"):])
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    written = not request.packed and (media_type.rpartition("+")[2] in ("application/json", "text/json", "json") or (
        media_type in ("", "text/plain", "application/x-www-form-urlencoded") and data.lstrip()[:1] == b"{"))
    if context.catalogue.filtered:
        context.catalogue.refuse_hidden(urllib.parse.unquote(f"{request.path}?{request.query}"))
    if data and media_type == "multipart/form-data":
        found = model_parts(data, request.headers["content-type"])
        if context.catalogue.filtered and len(found) != 1:
            raise BadRequest("a form must name its model once", 404 if not found else None)
        for start, end in found[:1]:
            info = context.catalogue.resolve(data[start:end].decode("utf-8", "replace"), True)
            data = data[:start] + info.id.encode() + data[end:]
    elif data and (written and request.method == "POST" or context.catalogue.filtered):
        if not written and load_or_none(data) is None:
            raise BadRequest("the body is not one JSON object: it cannot be looked into for the filter", 415)
        data, body = load_relayed(context, data)
        if "json" not in media_type:            # what curl -d calls JSON; LiteLLM would read a form
            request.headers["content-type"] = JSON
        name = body.get("model")
        if isinstance(name, str) and name:
            info = context.catalogue.resolve(name, True)
            if info.id != name:
                data = with_model(data, body, info.id)
                body["model"] = info.id
        elif context.catalogue.filtered and name is not None:
            raise BadRequest("model must be a string")
        if context.catalogue.filtered:          # OpenRouter's and LiteLLM's second choices
            context.catalogue.refuse_hidden(json.dumps([body.get("models"), body.get("fallbacks")]))

    def heal(error: UpstreamRefused) -> Optional[bytes]:
        """Leaves out what an editor added for itself, when the target names it (clients rule 43)."""
        before = dump(body)
        for key in refused_keys(error, body) if body is not None else ():
            for keys, edit in (CLIENT_KEYS, _drop), (CLIENT_MESSAGE_KEYS, _messages_without):
                if key in keys:
                    edit(body, key)
        after = dump(body)
        return after if after != before else None

    return relay(scope, request, context.target, path, data, heal=heal)


def relay_native(request: Request, scope: Scope) -> Response:
    """/api/* between an Ollama client and an Ollama: as it is, but for names, think and --set."""
    context, data, injected = scope.context, request.body, {}
    if request.route.operation in (list_models, list_running) and context.catalogue.filtered:
        return filtered_native(context, request.path)
    if isinstance(data, bytes) and data and (request.route.face or context.catalogue.filtered):
        data, body = load_relayed(context, data)
        if request.route.face:
            injected = defaults_for_native(context, request.route.face, body)
            data = dump({**body, **injected}) if injected else data
        for key in _NAMING[2:] if request.route.face else _NAMING:      # a model that was resolved may be seen
            if isinstance(body.get(key), str) and context.catalogue.is_hidden(body[key]):
                raise model_not_found(body[key])

    def heal(error: UpstreamRefused) -> Optional[bytes]:
        """Takes an injected think away from a model that cannot."""
        if not re.search(_NO_THINKING, error.message, re.I) or injected.pop("think", None) is None:
            return None
        return dump({**body, **injected})

    return relay(scope, request, context.target, context.path(True, request.path), data, heal=heal)


def defaults_for_native(context: Context, face: str, body: dict) -> dict:
    """What a native request gets besides what the client said: the model's real name, --set, think."""
    name, injected = name_in(typed(body, OLLAMA_FIELDS)), {}
    try:
        model = context.catalogue.resolve(name).id if name else ""
    except BadRequest:
        if context.catalogue.filtered:
            raise
        model = name                    # let the Ollama say so itself
    if model not in (name, f"{name}:latest"):
        injected["model"] = model
    if face in ("chat", "generate"):
        options, rest = settings_for(context.config, model, name)
        if any(key not in as_dict(body.get("options")) for key in options):
            injected["options"] = {**options, **as_dict(body.get("options"))}
        rest.setdefault("think", True if thinks_always(context.config, model) else None)
        injected.update((key, rest[key]) for key in ("think", "keep_alive", "format")
                        if body.get(key) is None and rest.get(key) is not None)
    return injected


def filtered_native(context: Context, path: str) -> Response:
    """A native list without the hidden models and with the aliases."""
    status, _, payload = context.fetch(True, path, None)
    if status >= 400 or not isinstance(as_dict(payload).get("models"), list):
        raise UpstreamError(f"{context.target.url} gave no model list (HTTP {status})")
    entries = [entry for entry in payload["models"] if isinstance(entry, dict)]
    kept = [entry for entry in entries if not context.catalogue.is_hidden(as_text(entry.get("name")))]
    for alias, model in context.config.alias:
        shown = context.catalogue.shown_name(alias)
        kept += [{**entry, "name": shown, "model": shown, "digest": digest_of(alias)}
                 for entry in entries if entry.get("name") in (model, f"{model}:latest") and "*" not in alias]
    return json_response({**payload, "models": kept})


DIALECTS = {"ollama": OLLAMA, "openai": OPENAI}
RELAYS = {"ollama": relay_native, "openai": relay_openai}       # where the target speaks the dialect of the client

# ----------------------------------------------------------------------------
# Room 15.  Routes: the dispatch table
# ----------------------------------------------------------------------------


class Route(NamedTuple):
    """One row.  `face` tells operations that serve several endpoints which one it is; with `streams`
    the body is not read before the operation but handed on as it comes.  Where the target speaks `dialect`
    the request is relayed instead, but for what is always answered `here`."""

    operation: Callable
    dialect: Dialect = OLLAMA
    face: str = ""
    streams: bool = False
    here: bool = False


# Everything else under /v1 is relayed.
ROUTES = {
    ("GET", "/"): Route(constant(b"Ollama is running", TEXT), here=True),
    ("GET", "/health"): Route(constant({"status": "ok"}), here=True),   # of this process; /api/tags tells of the target
    ("GET", "/api/version"): Route(version, here=True),
    ("GET", "/api/status"): Route(constant({"cloud": {"disabled": True, "source": "config"}}), here=True),
    ("GET", "/api/experimental/model-recommendations"): Route(constant({"recommendations": []}), here=True),
    ("POST", "/api/me"): Route(constant({"email": "", "name": "", "plan": ""}), here=True),
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
    ("POST", "/api/blobs/{digest}"): Route(unsupported, streams=True),
    ("HEAD", "/api/blobs/{digest}"): Route(unsupported),
    ("GET", "/v1/models"): Route(list_openai_models, OPENAI, here=True),
    ("GET", "/v1/models/{id}"): Route(show_openai_model, OPENAI, here=True),
    ("POST", "/v1/chat/completions"): Route(converse, OPENAI, "chat"),
    ("POST", "/v1/completions"): Route(converse, OPENAI, "completion"),
    ("POST", "/v1/embeddings"): Route(embed, OPENAI, "embed"),
    ("POST", "/v1/messages"): Route(relay_or_translate, ANTHROPIC, "chat"),
    ("POST", "/v1/messages/count_tokens"): Route(relay_or_translate, ANTHROPIC, "count"),
    ("POST", "/v1/responses"): Route(relay_or_translate, RESPONSES, "chat")}

_ARGUMENTS = {"/api/blobs/": "{digest}", "/v1/models/": "{id}"}        # paths that end in one
# What is relayed.  TRACE would echo our own key to the client, CONNECT would make us an open proxy.
RELAYED_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def find_route(request: Request, context: Context) -> Route:
    """The row for a request.  Raises BadRequest 404, or 405 with Allow."""
    path, start = request.path, "/".join(request.path.split("/")[:3]) + "/"
    pattern = start + _ARGUMENTS.get(start, "")
    for key in (path, pattern):
        route = ROUTES.get((request.method, key)) or (request.method == "HEAD" and ROUTES.get(("GET", key)))
        if route:
            return route
    known, relayed = {method for method, key in ROUTES if key == path}, request.method in RELAYED_METHODS
    if not known and path.startswith("/v1/"):
        if relayed:
            return Route(relay_openai, OPENAI)
        known = set(RELAYED_METHODS)
    known = known or {method for method, key in ROUTES if key == pattern}
    if known:
        allowed = sorted(known | ({"HEAD"} if "GET" in known else set()), reverse=True) + ["OPTIONS"]
        raise BadRequest("method not allowed", 405, [("Allow", ", ".join(allowed))])
    if path.startswith("/api/") and relayed and (context.fallback is not None or context.api() == "ollama"):
        return Route(unsupported)
    raise BadRequest(f"{one_line(path, 100)} not found", 404)

# ----------------------------------------------------------------------------
# Room 16.  HTTP server: sockets to Request, Response to sockets
#
# ThreadingHTTPServer gives every connection a thread.  Heads are parsed here, strictly (RFC 9112):
# http.server's own parser forgives what smuggles requests.
# ----------------------------------------------------------------------------

_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]{1,16384}) HTTP/1\.([01])")
_FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*")
_FIELD = re.compile(r"([^:]+):[\t ]*([^\r]*?)[\t ]*\r\n")
_ONCE = frozenset(("host", "content-length", "transfer-encoding", "authorization", "content-type", "origin", "expect"))


def parse_request_line(line: bytes) -> tuple[str, str, int]:
    """(method, target, minor version).  Raises BadRequest, after which the connection is closed."""
    match = _REQUEST_LINE.fullmatch(line)
    if match:
        return match[1].decode("ascii"), match[2].decode("ascii"), int(match[3])
    if len(line) > 16384:
        raise BadRequest("request line too long", 414, close=True)
    if re.search(rb" HTTP/[2-9]", line):
        raise BadRequest("this version of HTTP is not spoken here", 505, close=True)
    raise BadRequest("malformed request line", close=True)


def parse_request_head(head: bytes, names_us: Callable) -> Request:
    """The bytes before the empty line -> Request; `names_us(authority)` judges a target that is a whole address.
    Raises BadRequest, after which the connection is closed.

    Refused: anything but `METHOD target HTTP/1.x`, bare CR, LF or NUL, white space before a colon, folded
    lines, repeated framing headers, Content-Length beside Transfer-Encoding, any coding but chunked.
    """
    line, _, rest = (head + b"\r\n").partition(b"\r\n")
    method, target, version = parse_request_line(line)
    if not _FIELDS.fullmatch(rest):
        raise BadRequest("malformed header", close=True)
    pairs = _FIELD.findall(rest.decode("latin-1"))
    if len(pairs) > MAX_HEADERS:
        raise BadRequest(f"more than {MAX_HEADERS} headers", 431, close=True)
    headers: dict = {}
    for name, value in pairs:
        name = name.lower()
        if name in headers and name in _ONCE:
            raise BadRequest(f"repeated {name} header", close=True)
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    absolute = re.match("(?i)https?://([^/?#]*)", target)   # RFC 9112 section 3.2.2
    if absolute and names_us(absolute[1]):
        target = target[absolute.end():] or "/"
    if target[0] != "/" and not (target == "*" and method == "OPTIONS"):
        raise BadRequest("the request target must be a path: this is no forward proxy", close=True)
    request = Request(method, target, version, headers)
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
    if coding is not None and (length is not None or request.version == 0):
        raise BadRequest("Transfer-Encoding beside Content-Length or in HTTP/1.0", close=True)
    if coding is not None and coding.lower() != "chunked":
        raise BadRequest("transfer coding not implemented", 501, close=True)
    if length is not None and not re.fullmatch("[0-9]{1,15}", length):
        raise BadRequest("malformed Content-Length", close=True)
    if request.version == 1 and "host" not in headers:
        raise BadRequest("missing Host header", close=True)
    request.chunked, request.length = coding is not None, int(length or 0)
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


_PRIVATE_NETWORKS = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))


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
    # is_private alone would admit link-local, documentation and other special ranges.
    return address.is_loopback or address.is_unspecified \
        or any(address.version == net.version and address in net for net in _PRIVATE_NETWORKS)


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


class ClientWire(Wire):
    """What a client sends."""

    rate = BODY_BYTES_PER_SECOND

    def late(self) -> ProxyError:
        return BadRequest("the client took too long to send its request", 408, close=True)

    def broken(self, error: Optional[Exception] = None) -> ProxyError:
        return ClientGone("client closed the connection")

    ended = broken

    def malformed(self, text: str) -> ProxyError:
        return BadRequest(text, close=True)

    def too_large(self) -> ProxyError:
        return BadRequest("request head too large", 431, close=True)

    def head(self, deadline: float = 0.0) -> Optional[bytes]:
        """The next request head; a few empty lines before it are no matter (RFC 9112 section 2.2)."""
        self.buffer = re.sub(rb"^(?:\r\n){1,8}", b"", self.buffer)
        return super().head(deadline)

    def check_beginning(self, beginning: bytes) -> None:
        """Refuses at once what never becomes a head that is understood."""
        if beginning[:1] == b"\x16":
            raise BadRequest("this is plain HTTP, not TLS", close=True)
        if re.search(rb"(?<!\r)\n", beginning):
            raise BadRequest("bare line feed in the request head", close=True)
        line, end, _ = beginning.partition(b"\r\n")
        if end and line:
            parse_request_line(line)

    def send(self, data: bytes) -> None:
        """All of it, as fast as the client takes it: sendall() would count its time-out for the whole.
        Raises ClientGone."""
        view = memoryview(data)
        self.set_timeout(self.patience)
        try:
            while view:
                slice_, began = view[:READ_SIZE], time.monotonic()
                sent = self.sock.send(slice_)
                if sent < len(slice_) and time.monotonic() - began >= self.patience:
                    raise BlockingIOError       # the kernel's time-out, told as a short write
                view = view[sent:]
        except OSError:
            raise ClientGone("client closed the connection, or does not read") from None


class ProxyServer(http.server.ThreadingHTTPServer):
    """A thread for every connection; counts connections and calls, and ends well."""

    request_queue_size = 512            # hundreds of clients connect at once when an editor starts
    daemon_threads = True
    allow_reuse_address = os.name == "posix"    # on Windows it would let two servers share the port

    def __init__(self, context: Context, address: tuple[str, int], listener: Optional[socket.socket] = None) -> None:
        self.context = context
        self.draining = False
        self.connections = 0
        self.answering: dict = {}               # connection -> whether a request on it is being answered
        self.changed = threading.Condition()    # guards `connections` and `answering`
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
        except OSError as error:
            time.sleep(0.0 if isinstance(error, BlockingIOError) else 0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """A connection begins: in a thread of its own, or not at all."""
        with self.changed:
            self.connections += 1
            refused = self.connections > self.context.config.max_connections
        if not refused:
            try:
                super().process_request(request, client_address)
            except RuntimeError:        # no more threads
                refused = True
        if refused:
            body = dump({"error": "server busy, please try again.  maximum pending requests exceeded"})
            request.setblocking(False)
            with contextlib.suppress(OSError):
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
                             b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """A connection ends."""
        with self.changed:
            self.connections -= 1
        shut(request)
        with contextlib.suppress(OSError):
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news; a bug of ours is."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self.context.log.debug(f"the connection of {client_address[0]} broke: {reason_of(error)}")
        elif not isinstance(error, ClientGone):
            complain(error)

    @property
    def calls(self) -> int:
        """How many requests are being answered."""
        return sum(self.answering.values())

    def note(self, connection: Any, answering: bool) -> None:
        """A request on `connection` has come, or was answered."""
        with self.changed:
            self.answering[connection] = answering
            self.changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Stops accepting and keeping connections, ends idle ones, waits for calls in flight at most `seconds`."""
        self.draining = True
        self.shutdown()
        self.server_close()
        with self.changed:
            for connection, busy in self.answering.items():
                if not busy:
                    shut(connection)
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
        files = " with --tls-key ".join(filter(None, (config.tls_cert, config.tls_key)))
        raise UsageError(f"--tls-cert {files}: {reason_of(error)}") from None
    return context


_REQUEST_NUMBERS = itertools.count(1)   # in --debug lines


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """One client connection: handle() of the standard library calls handle_one_request until `close_connection`."""

    def setup(self) -> None:
        """TLS where it is wanted.  A Wire instead of files: reads have deadlines, an answer is one write."""
        self.connection, self.context = self.request, self.server.context
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if self.server.tls is not None:
            self.connection.settimeout(self.context.config.client_timeout)
            self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.wire = ClientWire(self.connection, self.context.config.client_timeout)
        self.server.note(self.connection, False)

    def finish(self) -> None:
        """Closes the TLS socket, which has taken the plain one over."""
        with self.server.changed:
            del self.server.answering[self.connection]
        if self.connection is not self.request:
            shut(self.connection)
            self.connection.close()

    def handle_one_request(self) -> None:
        """One request from its first byte to its access line."""
        self.close_connection, self.asked, self._cors, self._sent, self._error_text = True, None, [], 0, ""
        with contextlib.suppress(ProxyError):       # gone, or silent for too long: nobody asked anything
            self.wire.buffer = self.wire.buffer.lstrip(b"\r\n") or self.wire.receive()
        if not self.wire.buffer:
            return
        threading.current_thread().name = f"#{next(_REQUEST_NUMBERS)}"
        try:
            with Scope(self.context, self.connection) as scope:
                self.send(self.respond(scope))
            if self.close_connection and not self.wire.in_step:
                self._linger()
        except ClientGone as gone:
            self._log(gone.status)
        except Exception as error:      # noqa: BLE001  a bug in mid-stream: the client must not take it for the end
            complain(error)
            self._log(200)
        finally:
            self.server.note(self.connection, False)

    def respond(self, scope: Scope) -> Response:
        """framing -> Host and Origin -> preflight -> key -> route -> body -> operation.  Raises ClientGone alone."""
        try:
            self.wire.in_step = False     # until a head is parsed nobody knows where the next request begins
            head, context = self.wire.head(), self.context
            if head is None:
                raise ClientGone("client closed the connection")
            self.server.note(self.connection, True)
            request = self.asked = parse_request_head(head, self._names_us)
            self.wire.in_step = not (request.length or request.chunked)
            self._check_origin(request)
            if request.method == "OPTIONS":
                return Response(204, headers=preflight_headers(request))
            self._authorize(request)
            if context.ident in request.headers.get(LOOP_HEADER, ""):
                context.log.say("a request came back to this proxy: its target leads to itself")
                raise BadRequest("this request came back to the proxy that sent it: its target leads to itself", 508)
            context.client_authorization = context.authorization_of(request) or context.client_authorization
            if request.headers.get("upgrade", "").lower() == "websocket":
                raise BadRequest("WebSockets are not spoken here: use HTTP", 426, [("Upgrade", "HTTP/1.1")])
            request.route = find_route(request, context)
            request.body = self._body(request)
            if isinstance(request.body, bytes) and request.body:
                context.log.data(f"{request.method} {request.path} - Body", request.body)
            else:
                context.log.debug(f"{request.method} {request.path}")
            route, spoken = request.route, request.route.dialect.name
            relayed = not route.here and spoken in RELAYS and context.api() == spoken
            return RELAYS[spoken](request, scope) if relayed else route.operation(request, scope)
        except ClientGone:
            raise
        except ProxyError as error:
            return self._error_response(error)
        except Exception as error:      # noqa: BLE001  a bug of ours: told, logged, survived
            complain(error)
            return self._error_response(ProxyError("internal error"))

    def _names_us(self, authority: str) -> bool:
        """Whether an address is that of this server."""
        port = authority.rpartition(":")[2]
        return port == str(self.server.server_port) and host_allowed(authority, self.server.own_names)

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
        # A list: all are compared, whichever fits, so that the time tells nothing.
        if not any([hmac.compare_digest(text.encode("latin-1"), key.encode("utf-8")) for text in offered]):
            raise BadRequest("missing or wrong key: send it as Authorization: Bearer KEY or x-api-key", 401,
                             [("WWW-Authenticate", "Bearer")])

    # -- reading

    def _body(self, request: Request) -> Any:
        """The body, unpacked; pieces as they come for routes that stream it.  Raises BadRequest or ClientGone."""
        limit, wire = self.context.config.max_body, self.wire
        streams = request.route.streams and (self.context.fallback is not None or self.context.api() == "ollama")
        if request.length > limit and not streams:
            raise body_too_large(limit)
        if not wire.in_step and request.version == 1 and not wire.buffer \
                and request.headers.get("expect", "").lower() == "100-continue":
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        pieces = wire.body(request.length, request.chunked)
        if streams:
            return pieces
        coding, found, size = request.headers.get("content-encoding", "").strip().lower(), [], 0
        relayed = request.route.operation in (relay_openai, relay_or_translate) and not self.context.catalogue.filtered
        if relayed and coding not in CODINGS:
            request.packed = True       # not to be read here: it passes as it is
        elif request.headers.pop("content-encoding", "") and coding != "identity":
            pieces = map(inflater(coding, unreadable), itertools.chain(pieces, [None]))
        for piece in pieces:
            found.append(piece)
            size += len(piece)
            if size > limit:
                raise body_too_large(limit)
        return b"".join(found)

    # -- writing

    def _error_response(self, error: ProxyError) -> Response:
        """An error in the dialect of the path.  On /api its text is the reason phrase, too, the only
        place some clients look (clients rule 4)."""
        request = self.asked = self.asked or Request("BAD", "/", 1, {})
        if error.close:
            request.keep, self.wire.in_step = False, False
        if not request.path.startswith("/v1"):
            error = blame_our_key(self.context, error, request)
        own = self.context.authorization_of(request).partition(" ")[2].strip()     # some repeat it with status 200
        error.message = self._error_text = self.context.log.redact(error.message.replace(own or "\0", "***"))
        dialect = request_dialect(request.path)
        headers = list(error.headers)
        if request.path.startswith("/v1") and (error.status < 500 and error.status not in (408, 409, 425, 429)):
            headers.append(("x-should-retry", "false"))     # OpenAI's and Anthropic's SDKs ask again otherwise
        response = json_response(dialect.render_error(error), error.status, headers)
        if error.status == 403 and isinstance(error, BadRequest):
            response = Response(403, media_type="")         # as Ollama answers (ollama-api 1.5)
        if dialect is OLLAMA:
            response.reason = one_line(error.message.encode("ascii", "replace").decode("ascii"), 200)
        return response

    def _head(self, response: Response, keep: bool, chunked: bool) -> bytes:
        """Status line and headers; the body is counted, or chunked, or ends with the connection."""
        reason = response.reason or http.client.responses.get(response.status, "Unknown")
        lines = [f"HTTP/1.1 {response.status} {reason}"]
        lines += [f"{name}: {value}" for name, value in self._cors + list(response.headers)]
        if response.media_type:
            lines.append(f"Content-Type: {response.media_type}")
        if response.length is not None and response.status != 204:
            lines.append(f"Content-Length: {response.length}")
        elif chunked:
            lines.append("Transfer-Encoding: chunked")
        if not keep or self.asked.version == 0:
            lines.append("Connection: keep-alive" if keep else "Connection: close")
        lines.append(f"Date: {self.date_time_string()}\r\n\r\n")
        return "\r\n".join(lines).encode("latin-1", "replace")

    def send(self, response: Response) -> None:
        """Writes the answer: head and first bytes in one send, then whatever has come, at once.  Raises ClientGone."""
        request, failure = self.asked, None
        bodiless = request.method == "HEAD" or response.status in (204, 304)
        chunked = response.length is None and request.version == 1 and not bodiless
        counted = bodiless or chunked or response.length is not None
        keep = request.keep and self.wire.in_step and not self.server.draining and counted
        out = self._head(response, keep, chunked)
        try:
            for lines in () if bodiless else response.lines:
                self._sent += sum(map(len, lines))
                self.wire.send(out + b"".join(map(http_chunk, lines) if chunked else lines))
                out = b""
        except Told as error:           # the client knows
            failure = error
        except UpstreamError as error:  # without the last chunk the client sees that the answer was cut
            failure, keep, chunked = error, False, False
        if out or chunked:
            self.wire.send(out + (LAST_CHUNK if chunked else b""))
        self.close_connection = not keep
        self._error_text = self._error_text or response.failure
        if failure is not None:
            self.context.log.say(f"stream of {request.method} {request.path} broke: {failure}")
        self._log(response.status)

    def _log(self, status: int) -> None:
        request = self.asked
        if request is not None:
            self.context.log.access(self.client_address[0].removeprefix("::ffff:"),
                                    f"{request.method} {request.target.partition('?')[0]} HTTP/1.{request.version}",
                                    status, self._sent, (time.monotonic_ns() - request.started) / 1e6, self._error_text)

    def _linger(self) -> None:
        """Reads and drops what the client still sends: closing at once would reset the connection, and
        the client would never see why."""
        deadline = time.monotonic() + LINGER
        with contextlib.suppress(OSError, ProxyError):
            socket.socket.shutdown(self.connection, socket.SHUT_WR)
            while self.wire.receive(deadline):
                pass


def unreadable(sentence: str, status: int) -> BadRequest:
    return BadRequest(f"the request has a body that {sentence}", status, close=True)


def body_too_large(limit: int) -> BadRequest:
    return BadRequest(f"request body too large: more than {limit} bytes (--max-body)", 413, close=True)

# ----------------------------------------------------------------------------
# Room 17.  Demo target: a tiny OpenAI-compatible server for --demo and the tests
# ----------------------------------------------------------------------------


class DemoHandler(http.server.BaseHTTPRequestHandler):
    """Two models.  demo-chat echoes the last message word by word, calls the first tool it is offered
    when the message says "call", and thinks when the message says "think"; demo-embed counts letters."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:     # noqa: A002  the parent's name for it
        """Silent: the proxy logs."""

    def do_GET(self) -> None:
        """GET /v1/models; everything else is not there."""
        entries = [{"id": name, "object": "model", "created": 1700000000, "owned_by": "demo", "context_length": 65536,
                    "type": kind} for name, kind in (("demo-chat", "llm"), ("demo-embed", "embeddings"))]
        self._answer({"object": "list", "data": entries} if self.path == "/v1/models" else None)

    def do_POST(self) -> None:
        """Chat, completions, embeddings."""
        body = load(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path in ("/v1/embeddings", "/v1/chat/completions", "/v1/completions") \
                and body.get("model") not in ("demo-chat", "demo-embed"):
            self._answer(None, f"model {body.get('model')!r} does not exist")
        elif self.path == "/v1/embeddings":
            call = parse_openai_embed(body)
            usage = Usage(sum(len(text.split()) for text in call.inputs))
            self._answer(render_openai_embeddings(call, list(map(self._vector, call.inputs)), usage, 0))
        elif self.path in ("/v1/chat/completions", "/v1/completions"):
            call = parse_openai_chat(body, "chat" if "chat" in self.path else "completion")
            events, encoder = self._events(call), OpenAIEncoder(call, Clock, 0, 0)
            if call.stream:
                self._stream(events, encoder)
            else:
                self._answer(load(encoder.fold(events)))
        else:
            self._answer(None)

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
            time.sleep(self.server.pace)
        self.wfile.write(http_chunk(encoder.tail) + LAST_CHUNK)

    def _answer(self, value: Optional[dict], missing: str = "nothing here") -> None:
        data = dump(value or {"error": {"message": missing}})
        self.send_response(200 if value else 404)
        self.send_header("Content-Type", JSON)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class DemoServer(http.server.ThreadingHTTPServer):
    """The demo target on a loopback port of its own, in a thread."""

    daemon_threads = True

    def __init__(self, pace: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), DemoHandler)
        self.pace = pace                # seconds between words
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.1,), name="demo", daemon=True).start()

    def server_bind(self) -> None:
        http.server.socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""

# ----------------------------------------------------------------------------
# Room 18.  Command line: main, --check, signals, banner
# ----------------------------------------------------------------------------


def client_url(server: ProxyServer) -> str:
    """What a client on this machine puts into its settings."""
    host = server.server_name
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    return f"{'https' if server.context.config.tls_cert else 'http'}://{bracketed(host)}:{server.server_port}"


def banner(server: ProxyServer) -> None:
    """Who listens where, what the target is and serves, and the line to paste into a client."""
    context = server.context
    config, url = context.config, client_url(server)
    everywhere = f"{bracketed(server.server_name or '0.0.0.0')}:{server.server_port}"
    for note in config.notes:
        context.log.say(f"warning: {note}")
    if not server.loopback and not config.client_key:
        context.log.say(f"warning: everybody who reaches {everywhere} can use the target and its key; "
                        "set --client-key or listen on 127.0.0.1")
    if config.insecure:
        context.log.say("warning: --insecure: the target's certificate is not checked")
    if config.no_log:
        return
    try:
        names = [info.shown for info in context.catalogue.models(False)]
        speaks = {"ollama": "an Ollama", "openai": "OpenAI API"}[context.api()]
        found = plural(len(names), "model") + (": " + ", ".join(names[:4]) if names else "")
        found += ", ..." if len(names) > 4 else ""
    except UpstreamError as error:
        speaks, found = "no model list" if isinstance(error, UpstreamRefused) else "not answering yet", error.message
    if context.catalogue.hidden:
        found += f" ({context.catalogue.hidden} hidden by the filter)"
    where = url if server.loopback else f"{url.partition('://')[0]}://{everywhere}"
    lines = [f"ollama_proxy {__version__}", f"  listening on  {where}",
             f"  target        {'demo target inside this process' if config.demo else context.target.url} "
             f"({speaks}), {found}",
             f"  for clients   OLLAMA_HOST={url}   or, for OpenAI clients, base URL {url}/v1"]
    if config.files:
        lines.append(f"  read          {', '.join(config.files)}")
    if config.demo:
        key = f"-H 'Authorization: Bearer {config.client_key}' " if config.client_key else ""
        lines.append(f"  try it        curl {url}/api/chat {key}-d "
                     "'{\"model\": \"demo-chat\", \"messages\": [{\"role\": \"user\", \"content\": \"hello\"}]}'")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()


def paint(text: str, good: bool, stream: Any) -> str:
    """`text` in green or red on a terminal, unless NO_COLOR is set (no-color.org)."""
    plain = stream is None or not stream.isatty() or os.environ.get("NO_COLOR")
    return text if plain else f"\x1b[{32 if good else 31}m{text}\x1b[0m"


_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
_CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_TOOL = {"type": "function", "function": {"name": "get_time", "description": "The time in a city", "parameters": _CITY}}
_OBJECT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
# What --check asks: name, path, what is asked beside the model.
CHECKS = (
    ("chat", "/api/chat", {"content": "Say OK.", "stream": False}),
    ("stream", "/api/chat", {"content": "Say OK.", "stream": True}),
    ("tools", "/api/chat", {"content": "What time is it in Rome? Call the tool.", "stream": False, "tools": [_TOOL]}),
    ("schema", "/api/chat", {"content": "Give me a number n as JSON.", "stream": False, "format": _OBJECT}),
    ("thinking", "/api/chat", {"content": "What is 2 + 2?", "stream": False, "think": True}),
    ("vision", "/api/chat", {"content": "What colour is this?", "stream": False, "images": [_PIXEL]}),
    ("suffix", "/api/generate", {"prompt": "def add(a, b):\n    return ", "suffix": "\n", "stream": False}),
    ("embeddings", "/api/embed", {"input": "hello"}))
# What kinds of clients need of that.
CLIENTS = {"VS Code Copilot": "stream tools", "JetBrains AI Assistant": "stream", "Open WebUI": "chat stream",
           "Home Assistant": "stream tools", "ollama CLI": "stream", "Claude Code": "stream tools context",
           "Codex": "stream tools context"}
TRIES = {"tools": 3}                    # small models call one time and not the next
AGENT_CONTEXT = 32_000                  # tokens: the instructions of Claude Code alone are more than 20,000


def check(config: Config) -> int:
    """--check: asks the target through a real proxy on a free port, one line a finding; 0 when chats will work."""
    for note in (*config.notes, *(f"{name} was read" for name in config.files)):
        print(f"note        {note}")
    print(f"target      {config.destination.url} {'with' if config.destination.key else 'without'} a key")
    server = ProxyServer(Context(config._replace(no_log=True, client_key="", tls_cert="")), ("127.0.0.1", 0))
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()

    try:
        listed = as_list(as_dict(load_or_none(answer_of(server, "GET", "/api/tags"))).get("models"))
        models = [entry for entry in listed if isinstance(as_dict(entry).get("name"), str)]
        names = [entry["name"] for entry in models]
        print(f"speaks      {'Ollama' if server.context.api() == 'ollama' else 'OpenAI'} API")
        print(f"models      {len(names)}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}")
        chats = [entry for entry in models if "completion" in entry.get("capabilities", ["completion"])]
        if not chats:
            raise UpstreamError("no model for chats")
    except ProxyError as error:
        taken = " (it is taken for an Ollama: --target-api, OLLAMA_BASE_URL)" * (config.target_api == "ollama")
        print(paint(f"FAILED      {error.message}{taken}", False, sys.stdout))
        return 1
    window = as_dict(chats[0].get("details")).get("context_length") or "not told"
    print(f"model       {chats[0]['name']} (the first; --models-filter chooses): context {window}, "
          + ", ".join(chats[0].get("capabilities", ())))
    embedders = [entry["name"] for entry in models if "embedding" in entry.get("capabilities", ())]
    small = isinstance(window, int) and window < AGENT_CONTEXT
    failed = {"context": f"{window} tokens, and agents need {AGENT_CONTEXT} or more"} if small else {}
    for name, path, wanted in CHECKS:
        body = {"model": (embedders or names)[0] if name == "embeddings" else chats[0]["name"], **wanted}
        turn = {key: body.pop(key) for key in ("content", "images") if key in body}
        if turn:
            body.update(messages=[{"role": "user", **turn}], options={"num_predict": 64})
        for _ in range(TRIES.get(name, 1)):
            try:
                verdict = f"works ({finding(name, answer_of(server, 'POST', path, body))})"
                failed.pop(name, None)
                break
            except ProxyError as error:
                failed[name] = one_line(error.message, 200)
                verdict = f"{'FAILED' if name in ('chat', 'stream') else 'no'}: {failed[name]}"
        print(paint(f"{name:<11} {verdict}", name not in failed, sys.stdout))
    for client, needs in CLIENTS.items():
        missing: dict = {}              # reason -> what it is the reason for
        for need in filter(failed.get, needs.split()):
            missing.setdefault(failed[need], []).append(need)
        verdict = "; ".join(f"{', '.join(unmet)}: {reason}" for reason, unmet in missing.items())
        verdict = f"not ready: {verdict}" if missing else "ready"
        print(paint(f"{client:<22} {verdict}", not missing, sys.stdout))
    ready, useless = sum(failed.keys().isdisjoint(needs.split()) for needs in CLIENTS.values()), "stream" in failed
    print(paint(f"verdict     {ready} of {len(CLIENTS)} kinds of client are ready", not useless, sys.stdout))
    return int(useless or "chat" in failed)


def answer_of(server: ProxyServer, method: str, path: str, body: Optional[dict] = None) -> bytes:
    """What the proxy of --check answers.  Raises UpstreamError with the reason when it does not."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    try:
        connection.request(method, path, dump(body) if body else None)
        answer = connection.getresponse()
        data = answer.read()
    except (OSError, http.client.HTTPException):    # nobody but the target breaks this connection
        raise UpstreamError("the answer broke off") from None
    if answer.status >= 400:
        raise UpstreamError(error_text(data, answer.status))
    return data


def finding(name: str, data: bytes) -> str:
    """What an answer shows, in a few words.  Raises UpstreamError when it is not what was asked for."""
    if name == "embeddings":
        answer = as_dict(load_or_none(data))
        if not as_list(answer.get("embeddings")):
            raise UpstreamError("no embedding came")
        return f"{plural(len(as_list(answer['embeddings'][0])), 'number')} from {answer.get('model')}"
    text, thinking, calls, _, finish = gather(OllamaDecoder(ChatCall("")).feed(data + b"\n"))
    if name == "tools" and not calls:
        raise UpstreamError("the model answered in text instead of calling")
    if name == "schema" and not isinstance(load_or_none(text.encode()), dict):
        raise UpstreamError("the answer is no JSON object")
    if name == "thinking" and not thinking:
        raise UpstreamError("no thinking came")
    pieces, tokens = data.count(b"\n") - 1 if name == "stream" else 1, finish.usage.completion_tokens
    return f"{plural(pieces, 'piece')}, {'tokens not told' if tokens is None else plural(tokens, 'token')}" \
        + (f", calls {calls[0].name}" if calls else "")


def serve(server: ProxyServer, children: Iterable = (), tell: Any = None, orders: Iterable = ()) -> int:
    """Runs until SIGINT, SIGTERM or SIGHUP; then lets streams end for --grace seconds.  A second signal cuts them.

    With --workers the first process passes both on to its `children` by `tell`, which ends the pipes that they read,
    `orders`: signals often reach the whole group, and would count twice there.
    """
    signals: list = []                  # no Event: the code that is interrupted may hold its lock
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, signal.SIG_IGN if orders else lambda number, _: signals.append(number))
    if orders:
        obey = lambda: [signals.append(os.read(order, 1)) for order in orders]       # noqa: E731
        threading.Thread(target=obey, name="orders", daemon=True).start()
    else:
        threading.Thread(target=banner, args=(server,), name="banner", daemon=True).start()
    threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
    while not signals:
        time.sleep(0.1)
    if server.calls:
        server.context.log.say(f"finishing {plural(server.calls, 'request')}; again to cut them")
    drain = threading.Thread(target=server.drain, args=(server.context.config.grace,), name="drain", daemon=True)
    drain.start()
    if tell:
        tell()
    while (drain.is_alive() or any(map(is_running, children))) and len(signals) < 2:
        time.sleep(0.1)
    if len(signals) > 1 and tell:
        tell()
    if server.calls:
        server.context.log.say(f"cut {plural(server.calls, 'request')}")
    server.context.log.close()
    return 0


def is_running(pid: int) -> bool:
    """Whether a child process still runs."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except OSError:                     # it was waited for already
        return False


def serve_workers(config: Config, server: ProxyServer, count: int) -> int:
    """--workers: the listening socket is open already; every process accepts on it, none outlives the first.  The end
    of a pipe is an order to all of them, however many read it: the first one to finish, the second one to cut."""
    children: list[int] = []
    readers, writers = map(list, zip(os.pipe(), os.pipe()))
    for _ in range(count - 1):
        pid = os.fork()
        if pid == 0:
            for writer in writers:
                os.close(writer)
            os._exit(serve(ProxyServer(Context(config), config.address, server.socket), orders=readers))
        children.append(pid)
    return serve(server, children, lambda: os.close(writers.pop(0)))


def main(argv: Optional[list] = None) -> int:
    """The command.  Returns the exit status: 0, 1 when it cannot run, 2 when it was called wrongly."""
    with contextlib.suppress(AttributeError):       # a console or a file of Windows may not know every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    threading.stack_size(1024 * 1024)   # address space only: JSON of 200 levels needs a tenth of it
    try:
        config = Config.from_args(argv)
        if config.demo:
            demo = DemoServer(pace=0.03)
            config = config._replace(destination=parse_target(demo.url), target_api="openai")
        if config.ca_file or config.client_cert:
            client_tls(config)
        if config.check:
            return check(config)
        server = ProxyServer(Context(config), config.address)
    except UsageError as error:
        print(paint(f"ollama_proxy: {error}", False, sys.stderr), file=sys.stderr)
        return 2
    except (BrokenPipeError, KeyboardInterrupt):    # --check | head, or Ctrl-C before the server runs
        return 1
    except OSError as error:
        host, port = config.address
        hint = " (is an Ollama or another proxy running there?): choose another with --listen" \
            if error.errno in (48, 98, 10013, 10048) else ""
        text = f"ollama_proxy: cannot listen on {host or '*'}:{port}: {reason_of(error)}{hint}"
        print(paint(text, False, sys.stderr), file=sys.stderr)
        return 1
    if config.workers > 1 and hasattr(os, "fork"):
        return serve_workers(config, server, config.workers)
    if config.workers > 1:
        print("ollama_proxy: --workers needs a POSIX system; running one process", file=sys.stderr)
    return serve(server)


if __name__ == "__main__":
    try:
        exit_status: Any = main()
    except SystemExit as leaving:       # argparse: --help, --version, wrong usage
        exit_status = leaving.code or 0
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    os._exit(exit_status)               # daemon threads that still write would abort an interpreter that finalises
