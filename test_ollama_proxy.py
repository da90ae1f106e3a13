# /// script
# requires-python = ">=3.9"
# dependencies = ["pytest"]
# ///
"""Tests of ollama_proxy.py, in the order of its rooms.

    python3 -m pytest -q test_ollama_proxy.py          all tests; the official clients' where installed
    python3 test_ollama_proxy.py --bench               processor time per token, no pytest needed

Everything runs on loopback.  Where something has to happen elsewhere first, a test waits for the
event, never for a time.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import gzip
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import SimpleNamespace

import ollama_proxy as proxy_module
from ollama_proxy import (
    OLLAMA, OPENAI, BadRequest, ChatCall, ChunkedDecoder, Config, Context, DemoServer, EmbedCall, Finish, Habits,
    LineDecoder, Message, OllamaDecoder, OllamaEncoder, OpenAIDecoder, OpenAIEncoder, ProxyServer, TextDelta,
    ThinkingDelta, Told, ToolCall, ToolCalls, Translation, Usage, UsageError,
    error_text, parse_ollama_chat, parse_openai_chat, read_models, render_ollama_chat, render_openai_chat)

try:
    import pytest
except ImportError:                     # --bench runs without it
    pytest = None

PATIENCE = 20.0                         # seconds until a test that waits for an event gives up
HERE = Path(__file__).resolve().parent
OWN = {name: value for name, value in os.environ.items()}


def fixture(function=None, **options):
    """pytest.fixture, where there is pytest."""
    if pytest is None:
        return function if function else lambda inner: inner
    return pytest.fixture(function, **options) if function else pytest.fixture(**options)


def cases(names, rows, ids=None):
    """pytest.mark.parametrize, where there is pytest."""
    if pytest is None:
        return lambda function: function
    return pytest.mark.parametrize(names, rows, ids=ids)


@fixture(autouse=True)
def clean_environ(monkeypatch, tmp_path):
    """A developer's OLLAMA_HOST, proxies and .env must not leak in."""
    for name in list(os.environ):
        if name.upper().startswith(("OLLAMA", "OPENAI", "THINK_MODELS", "OPENROUTER")) or name.upper().endswith("_PROXY") \
                or name.endswith("_API_KEY"):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@fixture
def later(monkeypatch):
    """later(seconds): so much time has passed, as the program sees it."""
    now, ahead = time.monotonic, []
    monkeypatch.setattr(time, "monotonic", lambda: now() + sum(ahead))
    return ahead.append


def shut(sock):
    """Both directions at once; wakes whoever waits for the socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


# ----------------------------------------------------------------------------
# Wire samples: what servers really send.  The letter and number name the kind of quirk.
# ----------------------------------------------------------------------------

PRINTED_ERRORS = [
    ('E01', 400, 'application/json', rb'''{"error":{"message":"Unsupported parameter: max_tokens","type":"invalid_request_error","param":"max_tokens","code":"unsupported_parameter"}}''',
     'Unsupported parameter: max_tokens'),
    ('E02', 422, 'application/json', rb'''{"error":"Input validation error: inputs must be shorter","error_type":"validation"}''',
     'Input validation error: inputs must be shorter'),
    ('E03', 400, 'application/json', rb'''{"object":"error","message":"context is too long","type":"BadRequestError","param":null,"code":400}''',
     'context is too long'),
    ('E04', 422, 'application/json', rb'''{"object":"error","message":{"detail":[{"type":"extra_forbidden","loc":["body","seed"],"msg":"Extra inputs are not permitted","input":1}]},"type":"invalid_request_error","param":null,"code":null}''',
     'body.seed: Extra inputs are not permitted'),
    ('E05', 422, 'application/json', rb'''{"detail":[{"type":"int_parsing","loc":["body","seed"],"msg":"Input should be a valid integer","input":null}]}''',
     'body.seed: Input should be a valid integer'),
    ('E06', 401, 'application/json', rb'''{"detail":"Unauthorized"}''',
     'Unauthorized'),
    ('E07', 503, 'application/json', rb'''{"detail":{"msg":"Server is busy; please try again later.","type":"service_unavailable"}}''',
     'Server is busy; please try again later.'),
    ('E08', 400, 'application/json', rb'''[{"error":{"code":400,"message":"Unknown name \"seed\": Cannot find field.","status":"INVALID_ARGUMENT"}}]''',
     'Unknown name "seed": Cannot find field.'),
    ('E09', 400, 'application/json', rb'''{"code":"Client specified an invalid argument","error":"Argument not supported on this model: stop"}''',
     'Argument not supported on this model: stop'),
    ('E10', 401, 'application/json', rb'''{"error":"Unauthorized"}''',
     'Unauthorized'),
    ('E11', 429, 'application/json', rb'''{"error":{"message":"Provider returned error","code":429,"metadata":{"raw":"model is rate-limited upstream","provider_name":"X"}}}''',
     'Provider returned error: model is rate-limited upstream'),
    ('E12', 502, 'text/html', rb'''<html>
<head><title>502 Bad Gateway</title></head>
<body><center><h1>502 Bad Gateway</h1></center></body></html>''',
     '502 Bad Gateway'),
    ('E13', 500, 'text/plain', rb'''Internal Server Error''',
     'Internal Server Error'),
    ('E14', 503, 'none', rb'''''',
     'upstream returned HTTP 503'),
    ('E15', 503, 'application/json', rb'''{"error":{"message":"Loading model","type":"unavailable_error","code":503}}''',
     'Loading model'),
    ('E16', 400, 'application/json', rb'''{"error":"'response_format.type' must be 'json_schema' or 'text'"}''',
     "'response_format.type' must be 'json_schema' or 'text'"),
    ('E17', 401, 'application/octet-stream', rb'''{"error":{"message":"Authentication Fails","type":"authentication_error","param":null,"code":"invalid_request_error"}}''',
     'Authentication Fails'),
    ('E18', 404, 'application/json', rb'''{"error":"Only text content is supported"}''',
     'Only text content is supported'),
    ('E20', 400, 'application/json', rb'''{"error":{"message":"The response was filtered","type":null,"param":"prompt","code":"content_filter","status":400,"innererror":{"code":"ResponsibleAIPolicyViolation"}}}''',
     'The response was filtered'),
]

PRINTED_LISTS = [
    ('L01', r'''{"models":[{"name":"qwen3-8b","model":"qwen3-8b","size":"","digest":"","capabilities":["completion"],"details":{"parent_model":"","format":"gguf","family":"","families":[""],"parameter_size":"","quantization_level":""}}],"object":"list","data":[{"id":"qwen3-8b","aliases":["qwen3-8b"],"tags":[],"object":"model","created":1,"owned_by":"llamacpp","meta":{"vocab_type":2,"n_vocab":151936,"n_ctx":8192,"n_ctx_train":40960,"n_embd":4096,"n_params":8190735360,"size":5027783488,"ftype":"Q4_K - Medium"}}]}''',
     r'''{"name":"qwen3-8b","size":5027783488,"format":"gguf","parameter_size":"8.2B","quantization_level":"Q4_K_M","context_max":40960,"context_now":8192,"embedding_length":4096,"running":true}'''),
    ('L03', r'''{"object":"list","data":[{"id":"qwen2-vl-7b","object":"model","type":"vlm","publisher":"p","arch":"qwen2_vl","compatibility_type":"mlx","quantization":"4bit","state":"not-loaded","max_context_length":32768},{"id":"llama-3.1-8b","object":"model","type":"llm","publisher":"p","arch":"llama","compatibility_type":"gguf","quantization":"Q4_K_M","state":"loaded","max_context_length":131072,"loaded_context_length":4096,"capabilities":["tool_use"]},{"id":"nomic","object":"model","type":"embeddings","publisher":"p","arch":"nomic-bert","compatibility_type":"gguf","quantization":"Q4_0","state":"not-loaded","max_context_length":2048}]}''',
     r'''[{"name":"qwen2-vl-7b","format":"mlx","family":"qwen2_vl","quantization_level":"4bit","context_max":32768,"vision":true,"tools":false,"running":false},{"name":"llama-3.1-8b","format":"gguf","family":"llama","quantization_level":"Q4_K_M","context_max":131072,"context_now":4096,"vision":false,"tools":true,"running":true},{"name":"nomic","family":"nomic-bert","context_max":2048,"embedding":true,"running":false}]'''),
    ('L04', r'''{"models":[{"type":"llm","publisher":"p","key":"g/gemma-9","display_name":"Gemma 9","architecture":"gemma9","quantization":{"name":"Q4_K_M","bits_per_weight":4},"size_bytes":17000000000,"params_string":"26B-A4B","loaded_instances":[{"id":"g/gemma-9","config":{"context_length":8192}}],"max_context_length":262144,"format":"gguf","capabilities":{"vision":true,"trained_for_tool_use":true,"reasoning":{"allowed_options":["off","on"],"default":"on"}}},{"type":"embedding","publisher":"p","key":"nomic","quantization":null,"size_bytes":84000000,"params_string":null,"loaded_instances":[],"max_context_length":2048,"format":"gguf"}]}''',
     r'''[{"name":"g/gemma-9","size":17000000000,"format":"gguf","family":"gemma9","parameter_size":"26B-A4B","quantization_level":"Q4_K_M","context_max":262144,"context_now":8192,"vision":true,"tools":true,"thinking":true,"running":true},{"name":"nomic","size":84000000,"context_max":2048,"embedding":true,"running":false}]'''),
    ('L05', r'''{"object":"list","data":[{"id":"Qwen/Qwen3-8B","object":"model","created":1,"owned_by":"vllm","root":"Qwen/Qwen3-8B","parent":null,"max_model_len":40960,"permission":[]},{"id":"my-lora","object":"model","created":1,"owned_by":"vllm","root":"/adapters/x","parent":"Qwen/Qwen3-8B","max_model_len":null}]}''',
     r'''[{"name":"Qwen/Qwen3-8B","context_max":40960,"context_now":40960,"running":true},{"name":"my-lora","parent_model":"Qwen/Qwen3-8B","running":true}]'''),
    ('L06', r'''{"data":[{"id":"acme/think-1","canonical_slug":"acme/think-1-0101","name":"Acme: Think 1","created":1,"context_length":200000,"architecture":{"input_modalities":["text","image"],"output_modalities":["text"],"tokenizer":"Other"},"top_provider":{"context_length":128000,"max_completion_tokens":8192},"supported_parameters":["tools","tool_choice","reasoning","include_reasoning","max_tokens"],"hugging_face_id":null}]}''',
     r'''{"name":"acme/think-1","context_max":200000,"vision":true,"tools":true,"thinking":true}'''),
    ('L09', r'''{"object":"list","data":[{"id":"g-oss","object":"model","created":1,"owned_by":"OpenAI","active":true,"context_window":131072,"max_completion_tokens":65536},{"id":"old","object":"model","created":1,"owned_by":"x","active":false,"context_window":8192}]}''',
     r'''[{"name":"g-oss","context_max":131072}]'''),
    ('L10', r'''{"data":[{"model_name":"gpt","litellm_params":{"model":"openai/gpt-x"},"model_info":{"id":"1","max_input_tokens":128000,"max_tokens":16384,"max_output_tokens":16384,"mode":"chat","supports_vision":true,"supports_function_calling":true,"supports_reasoning":null,"litellm_provider":"openai"}},{"model_name":"gpt","litellm_params":{"model":"azure/gpt-x"},"model_info":{"id":"2","max_input_tokens":128000,"mode":"chat","supports_vision":true}},{"model_name":"emb","litellm_params":{"model":"openai/e"},"model_info":{"id":"3","mode":"embedding","max_input_tokens":8191,"output_vector_size":1536}}]}''',
     r'''[{"name":"gpt","context_max":128000,"vision":true,"tools":true},{"name":"emb","context_max":8191,"embedding":true,"embedding_length":1536}]'''),
    ('L11', r'''{"object":"list","data":[{"id":"phi","object":"model","capabilities":["chat","vision","tools","thinking"],"input_modalities":["text","image"],"output_modalities":["text"]},{"id":"whisper","object":"model","capabilities":["transcription"]}]}''',
     r'''[{"name":"phi","vision":true,"tools":true,"thinking":true}]'''),
    ('L12', r'''{"object":"list","data":[{"id":"models/gemini-9-flash","object":"model","owned_by":"google","display_name":"Gemini 9 Flash"}]}''',
     r'''{"name":"gemini-9-flash","upstream_id":"models/gemini-9-flash"}'''),
    ('L13', r'''{"error":"Unexpected endpoint or method. (GET /props)"}''',
     r'''{"probe":"absent"}'''),
    ('L15', r'''{"model_path":"Qwen/Qwen3-VL","tokenizer_path":"Qwen/Qwen3-VL","is_generation":true,"has_image_understanding":true,"has_audio_understanding":false,"model_type":"qwen3_vl","architectures":["Qwen3VLForConditionalGeneration"],"tool_call_parser":"qwen","reasoning_parser":"qwen3"}''',
     r'''{"family":"qwen3_vl","vision":true,"tools":true,"thinking":true}'''),
    ('L16', r'''{"object":"list","data":[{"id":"koboldcpp/tiny","object":"model","created":1,"owned_by":"koboldcpp"}]}''',
     r'''{"name":"koboldcpp/tiny"}'''),
]

PRINTED_REQUESTS = [
    ('R03', r'''{"model":"m","messages":[{"role":"user","content":"hi"}],"options":{"num_predict":64,"top_k":20,"min_p":0.05,"repeat_penalty":1.1,"seed":7,"stop":["A","B","C","D","E"],"temperature":0.2}}''',
     r'''{"max_tokens":64,"top_k":20,"min_p":0.05,"repeat_penalty":1.1,"repetition_penalty":1.1,"seed":7,"temperature":0.2,"stop":["A","B","C","D","E"]}''',
     'options, num_predict, num_ctx'),
    ('R04', r'''{"model":"m","messages":[{"role":"user","content":"what","images":["iVBORw0KGgo=","/9j/4AAQ","UklGRgAAAABXRUJQ"]}]}''',
     r'''{"messages":[{"role":"user","content":[{"type":"text","text":"what"},{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgo="}},{"type":"image_url","image_url":{"url":"data:image/jpeg;base64,/9j/4AAQ"}},{"type":"image_url","image_url":{"url":"data:image/webp;base64,UklGRgAAAABXRUJQ"}}]}]}''',
     'messages[].images'),
    ('R06', r'''{"model":"m","messages":[{"role":"user","content":"reply in json"}],"format":"json"}''',
     r'''{"response_format":{"type":"json_object"}}''',
     'format'),
    ('R08', r'''{"model":"m","messages":[{"role":"user","content":"x"}],"tools":[{"function":{"name":"now"}}]}''',
     r'''{"tools":[{"type":"function","function":{"name":"now","parameters":{"type":"object","properties":{}}}}]}''',
     'tool_choice'),
    ('R09', r'''{"model":"m","prompt":"p","system":"s","stream":false}''',
     r'''{"messages":[{"role":"system","content":"s"},{"role":"user","content":"p"}],"stream":false}''',
     'prompt, system, stream_options'),
    ('R10', r'''{"model":"m","prompt":"[INST] p [/INST]","raw":true,"stream":false,"options":{"num_predict":5}}''',
     r'''{"prompt":"[INST] p [/INST]","max_tokens":5,"stream":false}''',
     'messages, raw'),
    ('R11', r'''{"model":"m","messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","thinking":"c"},{"role":"user","content":"d"}]}''',
     r'''{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"d"}]}''',
     'messages[].thinking'),
    ('R12', r'''{"model":"e","input":"x","truncate":true,"keep_alive":"5m"}''',
     r'''{"model":"e","input":["x"]}''',
     'truncate, keep_alive, options, encoding_format'),
    ('R13', r'''{"model":"m","messages":[{"role":"user","content":"x"}],"think":false}''',
     r'''{"reasoning_effort":"none","chat_template_kwargs":{"enable_thinking":false}}''',
     'think'),
]


def sse(*frames, done=True):
    """Frames as an event stream; a str is sent as it is."""
    text = "".join(frame if isinstance(frame, str) else f"data: {json.dumps(frame)}\n\n" for frame in frames)
    return (text + ("data: [DONE]\n\n" if done else "")).encode()


def tight(*frames, done=True):
    """The same without a blank too many, as most servers write it; a str begins the next frame."""
    text = "".join(frame if isinstance(frame, str) else f"data: {json.dumps(frame, separators=(',', ':'))}\n\n"
                   for frame in frames)
    return (text + ("data: [DONE]\n\n" if done else "")).encode()


def whole(content, finish="stop", calls=None, **fields):
    """The JSON of an answer that is no stream."""
    message = {"role": "assistant", "content": content, **({} if calls is None else {"tool_calls": calls})}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}], **fields}).encode()


def usage(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def ndjson(*values):
    """Values as NDJSON."""
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def delta(content=..., finish=None, index=0, **fields):
    """One chat.completion.chunk."""
    if content is not ...:
        fields["content"] = content
    return {"choices": [{"index": index, "delta": fields, "finish_reason": finish}]}


def call_delta(*calls, finish=None):
    return delta(finish=finish, tool_calls=list(calls))


def lines(*texts, thinking="", calls=None, reason="stop", error=None, **counts):
    """The Ollama lines that are expected, as the samples write them."""
    out = [{"message": {"role": "assistant", "content": "", "thinking": thinking}, "done": False}] if thinking else []
    out += [{"message": {"role": "assistant", "content": text}, "done": False} for text in texts]
    if calls is not None:
        out.append({"message": {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": name, "arguments": arguments}} for name, arguments in calls]}, "done": False})
    out.append({"error": error} if error else {"message": {"role": "assistant", "content": ""}, "done": True,
                                               "done_reason": reason, **counts})
    return json.dumps(out)


def answers(text, thinking="", **last):
    """The same for /api/generate."""
    out = [{"response": "", "thinking": thinking, "done": False}] if thinking else []
    return json.dumps(out + [{"response": text, "done": False}, {
        "response": "", "done": True, "done_reason": "stop", **last}])


STOP = delta(finish="stop")
TOOLS_END = delta(finish="tool_calls")


def part(name=None, arguments=None, **fields):
    """One fragment of a tool call."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {**fields, "function": function}


TOO_LONG = "The number of tokens to keep is greater than the context length"
# (name, how it was asked for, bytes of the target, lines for the client)
STREAMS = [
    ("F01 reference stream: role chunk, text, finish, usage-only chunk with empty choices", "chat",
     tight(delta("", role="assistant"), delta("Hel"), delta("lo"), STOP,
           {"choices": [], "usage": usage(9, 2)}),
     lines("Hello", prompt_eval_count=9, eval_count=2)),
    ("F03 no space after the colon, byte-order mark, event: lines, retry: and id: fields", "chat",
     b"\xef\xbb\xbfretry:1000\nid:1\nevent:message\n"
     + tight(delta("ok"), "id:2\n", STOP).replace(b"data: ", b"data:"), lines("ok")),
    ("F04 events separated by one newline only, no blank lines", "chat",
     tight(delta("a"), delta("b", finish="stop")).replace(b"}\n\n", b"}\n"), lines("ab")),
    ("F06 [DONE] but finish_reason never set", "chat", tight(delta("fine", role="assistant")), lines("fine")),
    ("F07 connection ends with neither finish_reason nor [DONE]: a truncated answer is an error", "chat",
     tight(delta("half an ans", role="assistant"), done=False),
     lines("half an ans", error="upstream closed the stream before finishing")),
    ("F08 HTTP 200 with an empty event-stream", "chat", b"", lines(error="upstream sent an empty response")),
    ("F09 stream:true answered with one plain JSON completion", "chat",
     whole("whole", object="chat.completion", usage=usage(4, 1)),
     lines("whole", prompt_eval_count=4, eval_count=1)),
    ("F14 the same text in delta and in message of one choice", "chat",
     tight({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "once"}, "finish_reason": None,
                         "message": {"role": "assistant", "content": "once"}}]}), lines("once")),
    ("F15 llama.cpp prompt progress chunks repeat the role", "chat",
     tight(*[{**delta(None, role="assistant"), "prompt_progress": {
               "total": 35, "cache": 0, "processed": 35 * at, "time_ms": at}} for at in (0, 1)],
           delta(None, role="assistant"), delta("go"), STOP), lines("go")),
    ("F20 usage null on every chunk, real usage on the finish chunk itself", "chat",
     tight({**delta("", role="assistant", reasoning_content=None), "usage": None}, {**delta("4"), "usage": None},
           {**delta("", finish="stop"), "usage": {
               **usage(12, 1), "prompt_cache_hit_tokens": 0, "prompt_cache_miss_tokens": 12}}),
     lines("4", prompt_eval_count=12, eval_count=1)),
    ("F22 usage arrives after the finish chunk in a chunk whose choices are not empty", "chat",
     tight({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "hey"}}]}, STOP,
           {"choices": [{"index": 0, "delta": {}}], "usage": usage(5, 1)}),
     lines("hey", prompt_eval_count=5, eval_count=1)),
    ("F24 usage only inside x_groq, with timings in seconds", "chat",
     tight({**delta("", role="assistant"), "x_groq": {"id": "req_1"}}, delta("ok"),
           {**STOP, "x_groq": {"id": "req_1", "usage": {**usage(10, 2), "queue_time": 0.05, "prompt_time": 0.002,
                                                        "completion_time": 0.004, "total_time": 0.006}}}),
     lines("ok", prompt_eval_count=10, eval_count=2, prompt_eval_duration=2000000, eval_duration=4000000)),
    ("F25 no usage at all but llama.cpp timings on the finish chunk; prompt_n counts only uncached tokens", "chat",
     tight(delta(None, role="assistant"), delta("ab"),
           {**delta(finish="length"), "timings": {
               "cache_n": 30, "prompt_n": 5, "prompt_ms": 12.5, "predicted_n": 3, "predicted_ms": 40.25}}),
     lines("ab", reason="length", prompt_eval_count=35, eval_count=3, prompt_eval_duration=12500000,
           eval_duration=40250000)),
    ("F26 usage and timings together: counts from usage, durations from timings", "chat",
     tight(delta("ab"), STOP,
           {"choices": [], "usage": {**usage(35, 3), "prompt_tokens_details": {"cached_tokens": 34}},
            "timings": {"cache_n": 34, "prompt_n": 1, "prompt_ms": 6.2, "predicted_n": 3, "predicted_ms": 0.8}}),
     lines("ab", prompt_eval_count=35, eval_count=3, prompt_eval_duration=6200000, eval_duration=800000)),
    ("F28 usage inside the choice object", "chat",
     tight(delta("m", role="assistant"), {"choices": [{**STOP["choices"][0], "usage": usage(3, 1)}]}),
     lines("m", prompt_eval_count=3, eval_count=1)),
    ("F30 reasoning_content with explicit nulls on the other key", "chat",
     tight(delta(None, role="assistant", reasoning_content=""), delta(None, reasoning_content="Let me "),
           delta(None, reasoning_content="see."), delta("Done.", reasoning_content=None),
           delta("", finish="stop", reasoning_content=None)), lines("Done.", thinking="Let me see.")),
    ("F32 the same thought in reasoning and reasoning_details: count once; encrypted details carry no text", "chat",
     tight(delta("", role="assistant", reasoning="First", reasoning_details=[
               {"type": "reasoning.text", "text": "First", "format": "unknown", "index": 0}]),
           delta("", role="assistant", reasoning=None, reasoning_details=[
               {"type": "reasoning.encrypted", "data": "AAAA", "index": 0}]),
           delta("Second", role="assistant"), {"choices": [{
               **delta("", finish="stop", role="assistant")["choices"][0], "native_finish_reason": "STOP"}]}),
     lines("Second", thinking="First")),
    ("F36 think tag later in the text is content, not reasoning", "chat",
     tight(delta("Write "), delta("<think> to open"), STOP), lines("Write <think> to open")),
    ("F38 request had think:false but the server reasons anyway: drop it", "think_false",
     tight(delta(None, role="assistant"), delta(reasoning_content="secret"), delta("plain"), STOP), lines("plain")),
    ("F39 content is a list of typed parts", "chat",
     tight(delta("", role="assistant"),
           delta([{"type": "thinking", "thinking": [{"type": "text", "text": "two and two"}]}]),
           delta([{"type": "text", "text": "4"}]),
           {**delta("", finish="stop"), "usage": usage(10, 9)}),
     lines("4", thinking="two and two", prompt_eval_count=10, eval_count=9)),
    ("F40 whole answer, template opened the tag: only the closing tag is there", "chat",
     whole("I think so.\n</think>\n\nYes."),
     lines("Yes.", thinking="I think so.")),
    ("F41 length limit reached while still reasoning", "chat",
     tight(delta(None, role="assistant"), delta(reasoning_content="and then"), delta(finish="length")),
     lines(thinking="and then", reason="length")),
    ("F50 two parallel calls, arguments in fragments, interleaved by index", "chat",
     tight(delta(None, role="assistant", tool_calls=[part("f", "", index=0, id="call_a", type="function")]),
           call_delta(part(None, '{"x":', index=0)), call_delta(part("g", "", index=1, id="call_b", type="function")),
           call_delta(part(None, "{}", index=1), part(None, "1}", index=0)), TOOLS_END),
     lines(calls=[("f", {"x": 1}), ("g", {})])),
    ("F52 index 0 reused for a second call with another id", "chat",
     tight(call_delta(part("f", '{"a":1}', index=0, id="c1", type="function")),
           call_delta(part("g", '{"b":2}', index=0, id="c2", type="function")), TOOLS_END),
     lines(calls=[("f", {"a": 1}), ("g", {"b": 2})])),
    ("F53 call, finish and usage in one chunk; no index or type; arguments as object; id is the word null", "chat",
     tight({**delta("", finish="tool_calls", role="assistant", tool_calls=[part("f", {"city": "Rome"}, id="null")]),
            "usage": usage(50, 9)}),
     lines(calls=[("f", {"city": "Rome"})], prompt_eval_count=50, eval_count=9)),
    ("F55 continuation with id null and name null; later with id empty and name empty", "chat",
     tight(delta(None, role="assistant", reasoning_content=None, tool_calls=[
               part("f", "", id="call_1", index=0, type="function")]),
           delta(None, tool_calls=[
               {"id": None, "index": 0, "type": "function", "function": {"name": None, "arguments": '{"k":'}}]),
           delta(None, tool_calls=[part("", "true}", id="", index=0, type="function")]),
           delta(None, finish="tool_calls", tool_calls=None)), lines(calls=[("f", {"k": True})])),
    ("F57 continuation deltas without id and with type", "chat",
     tight({"choices": [{"index": 0, "delta": {
               "role": "assistant", "tool_calls": [part("f", "", index=0, id="call_z", type="function")]}}]},
           {"choices": [{"index": 0, "delta": {"tool_calls": [part(None, '{"n":7}', index=0, type="function")]}}]},
           TOOLS_END), lines(calls=[("f", {"n": 7})])),
    ("F58 index starts at 1", "chat",
     tight(call_delta(part("f", "", index=1, id="toolu_1", type="function")),
           call_delta(part(None, '{"a":[]}', index=1)), TOOLS_END), lines(calls=[("f", {"a": []})])),
    ("F59 extra empty or whitespace fragment after a complete call", "chat",
     tight(call_delta(part("f", '{"x":1}', index=0, id="a", type="function")), call_delta(part(None, " ", index=0)),
           call_delta(part(None, "", index=0, id="")), TOOLS_END), lines(calls=[("f", {"x": 1})])),
    ("F60 name repeated on every fragment", "chat",
     tight(call_delta(part("f", '{"x"', index=0, id="a", type="function")),
           call_delta(part("f", ":1}", index=0, id="a", type="function")), TOOLS_END), lines(calls=[("f", {"x": 1})])),
    ("F62 text, then a call: both survive, in order", "chat",
     tight(delta("Checking.", role="assistant"),
           delta(None, tool_calls=[part("f", "{}", index=0, id="a", type="function")]), TOOLS_END),
     lines("Checking.", calls=[("f", {})])),
    ("F64 arguments are JSON inside a JSON string (encoded twice)", "chat",
     tight(call_delta(part("f", '"{\\"x\\":1}"', index=0, id="a")), TOOLS_END), lines(calls=[("f", {"x": 1})])),
    ("F67 non-streaming call: content null, no id, arguments as object", "chat",
     whole(None, "tool_calls", [part("f", {"a": 1}, type="function")], usage=usage(20, 5)),
     lines(calls=[("f", {"a": 1})], prompt_eval_count=20, eval_count=5)),
    ("F70 empty tool list next to text is not a call", "chat",
     whole("no tools", "stop", []), lines("no tools")),
    ("F80 finish_reason eos maps to done_reason stop", "chat", tight(delta("k"), delta(finish="eos")), lines("k")),
    ("F81 finish_reason stop_sequence maps to done_reason stop", "chat",
     tight(delta("k"), delta(finish="stop_sequence")), lines("k")),
    ("F82 finish_reason eos_token maps to done_reason stop", "chat",
     tight(delta("k"), delta(finish="eos_token")), lines("k")),
    ("F83 finish_reason content_filter maps to done_reason stop", "chat",
     tight(delta("k"), delta(finish="content_filter")), lines("k")),
    ("F84 finish_reason abort maps to done_reason stop", "chat", tight(delta("k"), delta(finish="abort")), lines("k")),
    ("F88 finish_reason is the string null or empty on every chunk until the end", "chat",
     tight(delta("a", finish="null", role="assistant"), delta("b", finish=""), STOP), lines("ab")),
    ("F90 mid-stream error object, no [DONE]", "chat",
     tight(delta(None, role="assistant"), delta("so far"),
           {"error": {"code": 500, "message": "output does not match the expected format", "type": "server_error"}},
           done=False), lines("so far", error="output does not match the expected format")),
    ("F91 mid-stream error object then [DONE]", "chat",
     tight(delta("so far", role="assistant"),
           {"error": {"message": "engine died", "type": "InternalServerError", "param": None, "code": 500}}),
     lines("so far", error="engine died")),
    ("F92 event: error as the very first event of a 200", "chat",
     tight("event: error\n", {"error": {"message": TOO_LONG}, "message": TOO_LONG}, done=False), lines(error=TOO_LONG)),
    ("F93 event: error with a tool failure", "chat",
     tight("event: error\n", {"error": {
         "message": "Failed to call a function.", "type": "invalid_request_error", "code": "tool_use_failed",
         "failed_generation": "<function=f>", "status_code": 400}}, done=False),
     lines(error="Failed to call a function.")),
    ("F94 error next to choices with finish_reason error", "chat",
     tight(delta("par", role="assistant"),
           {"id": "gen-1", "object": "chat.completion.chunk", **delta("", finish="error"),
            "error": {"code": "server_error", "message": "Provider disconnected"}},
           done=False), lines("par", error="Provider disconnected")),
    ("F95 flat error string", "chat",
     tight(delta("a", role="assistant"),
           {"error": "Request failed during generation: out of memory", "error_type": "generation"}),
     lines("a", error="Request failed during generation: out of memory")),
    ("F98 200 whose body is only an error string", "chat",
     b'{"error":"Unexpected endpoint or method. (POST /v1/chat/completion)"}',
     lines(error="Unexpected endpoint or method. (POST /v1/chat/completion)")),
    ("F100 legacy completions stream: text field, usage in the finish chunk without being asked", "raw",
     tight({"object": "text_completion", "choices": [
               {"text": "A", "index": 0, "logprobs": None, "finish_reason": None}]},
           {"object": "text_completion", "choices": [
               {"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}], "usage": usage(2, 1)}),
     answers("A", done_reason="length", prompt_eval_count=2, eval_count=1)),
    ("F101 chat stream used for /api/generate", "generate",
     tight(delta("", role="assistant"), delta(reasoning_content="t"), delta("r"), STOP),
     answers("r", thinking="t")),
    ("F102 answer repeats the trailing assistant message that was sent as prefill: take it off once", "prefill",
     tight(delta(None, role="assistant"), delta("Sure, here"), delta(" it is"), STOP), lines(", here it is")),
    ("F103 answer does not repeat the prefill", "prefill",
     tight(delta("", role="assistant"), delta(", here"), STOP), lines(", here")),
    ("F104 second choice must be ignored", "chat", tight(delta("B", index=1), delta("A"), STOP), lines("A")),
    ("F106 refusal instead of content", "chat",
     tight(delta(None, role="assistant", refusal=""), delta(refusal="I cannot help with that."), STOP),
     lines("I cannot help with that.")),
    ("F108 blank data lines, an empty object, and a last [DONE] with blanks", "chat",
     b"data:\n\n" + tight({}, delta("ok"), STOP).replace(b"[DONE]", b" [DONE] "), lines("ok")),
    ("F02 comments, pings and blank lines", "chat",
     sse(": OPENROUTER PROCESSING\n\n", ":\n", "\n\n", delta("ok"), ": ping\n", STOP), lines("ok")),
    ("F05 no final newline, no DONE", "chat", sse(delta("ok"), STOP, done=False).rstrip(), lines("ok")),
    ("F05b CR LF and lone CR", "chat", sse(delta("ok"), STOP).replace(b"\n\n", b"\r\n\r"), lines("ok")),
    ("F04b several data lines in one event", "chat",
     b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"ok"}}]}\n\n' + sse(STOP), lines("ok")),
    ("F10 white space before a JSON body", "chat",
     b'\n \n\n{"choices":[{"message":{"content":"whole"},"finish_reason":"stop"}]}', lines("whole")),
    ("F10b a printed JSON body", "chat",
     json.dumps({"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}]}, indent=1).encode(),
     lines("whole")),
    ("F11 bare NDJSON", "chat", b"".join(json.dumps(frame).encode() + b"\n" for frame in (delta("ok"), STOP))
     + b"[DONE]\n", lines("ok")),
    ("F11b frames after bare lines, and bare lines after frames", "chat",
     json.dumps(delta("o")).encode() + b"\n\nevent: message\n" + sse(delta("k"), done=False)
     + json.dumps(delta("!")).encode() + b"\n" + sse(STOP), lines("ok!")),
    ("F12 choices missing, null, empty; delta null", "chat",
     sse({"id": "x"}, {"choices": None}, {"choices": []}, {"choices": [{"delta": None}]}, delta("ok"), STOP), lines("ok")),
    ("F13 role in every delta, null or empty", "chat",
     sse(delta("o", role=None), delta("k", role=""), delta("", finish="stop", role="assistant")), lines("ok")),
    ("F21 usage on every chunk: the last counts", "chat",
     sse({**delta("ok"), "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
         {**STOP, "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}),
     lines("ok", prompt_eval_count=3, eval_count=2)),
    ("F23 zero usage after a real one", "chat",
     sse({**delta("ok"), "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
         {**STOP, "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}),
     lines("ok", prompt_eval_count=3, eval_count=2)),
    ("F27 reasoning counted in the total only", "chat",
     sse(delta("ok"), {**STOP, "usage": {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 303}}),
     lines("ok", prompt_eval_count=12, eval_count=291)),
    ("F31 reasoning", "chat", sse(delta(reasoning="Let me"), delta("ok"), STOP), lines("ok", thinking="Let me")),
    ("F33 only reasoning_details", "chat",
     sse(delta(reasoning_details=[{"type": "reasoning.text", "text": "hm", "index": 0}]), delta("ok"), STOP),
     lines("ok", thinking="hm")),
    ("F34 inline think tags, cut anywhere", "chat",
     sse(delta("<th"), delta("ink>\nwhy "), delta("not</thi"), delta("nk>\n\nok"), STOP), lines("ok", thinking="why not")),
    ("F35 inline thinking tags after white space", "chat",
     sse(delta("\n <thinking>a"), delta("b</thinking> ok"), STOP), lines("ok", thinking="ab")),
    ("F37 thought tags", "chat", sse(delta("<thought>x</thought>ok"), STOP), lines("ok", thinking="x")),
    ("F42 no tags once a reasoning field was seen", "chat",
     sse(delta(reasoning_content="r"), delta("<think>x</think>"), STOP), lines("<think>x</think>", thinking="r")),
    ("F43 a tag that is never closed", "chat", sse(delta("<think>on and on"), delta(finish="length")),
     lines(thinking="on and on", reason="length")),
    ("F43b something that only begins like a tag", "chat", sse(delta("<thin"), delta("g>"), STOP), lines("<thing>")),
    ("F51 no index: a name begins a call", "chat",
     sse(call_delta({"id": "", **part("f", '{"a":')}), call_delta(part(None, "1}")),
         call_delta({"id": "", **part("g", "{}")}), STOP), lines(calls=[("f", {"a": 1}), ("g", {})])),
    ("F54 constant id 0, finish stop", "chat",
     sse(call_delta({"index": 0, "id": "0", **part("f", "")}), call_delta({"index": 0, "id": "0", **part(None, "{}")}),
         STOP), lines(calls=[("f", {})])),
    ("F54b finish tool_calls without any", "chat", sse(delta("ok"), TOOLS_END), lines("ok")),
    ("F56 arguments null, missing, the word null", "chat",
     sse(call_delta({"index": 0, "id": "a", "function": {"name": "f", "arguments": None}}),
         call_delta({"index": 1, "id": "b", "function": {"name": "g"}}),
         call_delta({"index": 2, "id": "c", **part("h", "null")}), TOOLS_END), lines(calls=[("f", {}), ("g", {}), ("h", {})])),
    ("F61 the name comes later", "chat",
     sse(call_delta({"index": 0, "id": "a", **part(None, '{"x"')}), call_delta({"index": 0, **part("f", ":1}")}), TOOLS_END),
     lines(calls=[("f", {"x": 1})])),
    ("F63 a call cut by the token limit is left out", "chat",
     sse(delta("so"), call_delta({"index": 0, "id": "a", **part("f", '{"x": "unfin')}), delta(finish="length")),
     lines("so", reason="length")),
    ("F65 the old function_call", "chat",
     sse(delta(function_call={"name": "f", "arguments": '{"x"'}), delta(function_call={"arguments": ":1}"}),
         delta(finish="function_call")), lines(calls=[("f", {"x": 1})])),
    ("F66 unreadable arguments are an error", "chat",
     sse(call_delta({"index": 0, "id": "a", **part("f", "{oops")}), TOOLS_END),
     lines(error="the model called f with arguments that are not a JSON object: {oops")),
    ("F68 raw newlines inside arguments", "chat",
     sse(call_delta({"index": 0, "id": "a", **part("f", '{"x":\n\t"a\nb"}')}), TOOLS_END), lines(calls=[("f", {"x": "a\nb"})])),
    ("F69 text after the calls still comes before them", "chat",
     sse(call_delta({"index": 0, "id": "a", **part("f", "{}")}), delta("ok"), TOOLS_END), lines("ok", calls=[("f", {})])),
    ("F71 whole calls without ids on a reused index", "chat",
     sse(call_delta({"index": 0, **part("f", '{"a":1}')}), call_delta({"index": 0, **part("g", '{"b":2}')}), TOOLS_END),
     lines(calls=[("f", {"a": 1}), ("g", {"b": 2})])),
    ("F85 finish MAX_TOKENS", "chat", sse(delta("k"), delta(finish="MAX_TOKENS")), lines("k", reason="length")),
    ("F86 finish model_length", "chat", sse(delta("k"), delta(finish="model_length")), lines("k", reason="length")),
    ("F87 finish insufficient_system_resource", "chat", sse(delta("k"), delta(finish="insufficient_system_resource")),
     lines("k", error="upstream ended the answer with an error (finish_reason insufficient_system_resource)")),
    ("F89 text after the finish reason", "chat", sse(delta("a", finish="stop"), delta("b")), lines("ab")),
    ("F96 finish error", "chat", sse(delta("k"), delta(finish="error")),
     lines("k", error="upstream ended the answer with an error (finish_reason error)")),
    ("F97 an error body where a stream was expected", "chat", b'{"error":{"message":"no"}}', lines(error="no")),
    ("F99 a page of text where a stream was expected", "chat", b"<html><title>Oops</title></html>", lines(error="Oops")),
    ("F105 U+2028, U+0085 and form feed end no line", "chat",
     'data: {"choices":[{"delta":{"content":"a\u2028b\u0085c"}}]}\n\n'.encode() + sse(STOP), lines("a\u2028b\u0085c")),
    ("F107 an empty error is none", "chat", sse({**delta("ok"), "error": None}, {**STOP, "error": ""}), lines("ok")),
    ("F109 finish max_output_tokens", "chat", sse(delta("k"), delta(finish="max_output_tokens")), lines("k", reason="length")),
    ("F110 emoji cut by the network", "chat", 'data: {"choices":[{"delta":{"content":"\U0001f999"}}]}\n\n'.encode() + sse(STOP),
     lines("\U0001f999")),
    ("F111 DONE alone is an empty stream", "chat", sse(), lines(error="upstream sent an empty response")),
    ("F25b timings that are no numbers", "chat",
     sse(delta("ok"), {**STOP, "timings": {"prompt_n": "5", "cache_n": [], "prompt_ms": "1", "predicted_n": {}}}),
     lines("ok")),
    ("F114 a word before the JSON of an event", "chat",
     b'data: ping\ndata: {"choices":[{"delta":{"content":"ok"}}]}\n\n' + sse(STOP), lines("ok")),
    ("F115 a field nobody knows", "chat", sse(delta("ok"), STOP, done=False) + b"foo: bar\n", lines("ok")),
    ("F116 a whole answer without a finish", "chat", b'{"choices":[{"message":{"content":"ok"}}]}', lines("ok")),
    ("F117 content in parts", "chat",
     sse(delta([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]), STOP), lines("Hello")),
    ("F113 the word null is no end", "chat", sse(delta("Hel"), "data: null\n\n", delta("lo"), STOP), lines("Hello")),
    ("F113b the word null is no finish", "chat", sse(delta("Hel"), "data: null\n\n", done=False),
     lines("Hel", error="upstream closed the stream before finishing")),
    ("F112 a frame that is no JSON", "chat", b"data: {broken\n\n", lines(error="upstream sent an event that is not JSON: {broken")),
    ("F118 the last fragment repeats the arguments", "chat",
     tight(call_delta(part("f", "", index=0, id="a")), call_delta(part(None, '{"x": 1, ', index=0)),
           call_delta(part(None, '"y": 2}', index=0)), call_delta(part(None, '{"x": 1, "y": 2}', index=0)), TOOLS_END),
     lines(calls=[("f", {"x": 1, "y": 2})])),
    ("F119 each fragment holds all there is so far", "chat",
     tight(call_delta(part("f", '{"x":', index=0, id="a")), call_delta(part(None, '{"x":"a b', index=0)),
           call_delta(part(None, '{"x":"a b"}', index=0)), TOOLS_END), lines(calls=[("f", {"x": "a b"})])),
    ("F120 whole arguments twice, written in two ways, in two calls", "chat",
     tight(call_delta(part("f", '{"x":1}', index=0, id="a")), call_delta(part(None, '{"x": 1}', index=0)),
           call_delta(part("g", "", index=1, id="b")), call_delta(part(None, "{}", index=1)),
           call_delta(part(None, "{}", index=1)), TOOLS_END), lines(calls=[("f", {"x": 1}), ("g", {})])),
    ("F121 a whole answer whose arguments stand twice", "chat",
     whole(None, "tool_calls", [part("f", '{"x":1}{"x":1}', id="a")]), lines(calls=[("f", {"x": 1})])),
    ("F121b an empty object before the arguments", "chat",
     tight(call_delta(part("f", "{}", index=0, id="a")), call_delta(part(None, '{"x"', index=0)),
           call_delta(part(None, ":1}", index=0)), TOOLS_END), lines(calls=[("f", {"x": 1})])),
    ("F121c numbers beyond JSON in arguments", "chat",
     whole(None, "tool_calls", [part("f", '{"x":NaN,"y":1e999,"z":-Infinity,"n":1.5}', id="a")]),
     lines(calls=[("f", {"x": None, "y": None, "z": None, "n": 1.5})])),
    ("F122 a call without arguments, whole", "chat",
     whole(None, "tool_calls", [part("f", id="a", type="function")]), lines(calls=[("f", {})])),
    ("F123 an error inside the choice", "chat",
     tight(delta("par", role="assistant"), {"choices": [
         {**delta("", finish="error")["choices"][0], "error": {"message": "upstream timed out", "code": 504}}]}),
     lines("par", error="upstream timed out")),
    ("F124 the error inside the choice is a text, and the first frame", "chat",
     tight({"choices": [{"index": 0, "delta": {}, "finish_reason": "error", "error": "no capacity"}]}),
     lines(error="no capacity")),
    ("F125 halves of a surrogate pair in two frames", "chat",
     sse(delta("Hi"), delta(" you \ud83d"), delta("\ude00"), delta(" end"), STOP), lines("Hi you \U0001f600 end")),
    ("F126 halves that stay alone, at the end too", "chat",
     sse(delta("a\ud83d"), delta("b \ude00"), delta("c\ud83d"), STOP), lines("a\ufffdb \ufffdc\ufffd")),
    ("F127 three halves in a row, and empty frames between them", "chat",
     sse(delta("\ud83d"), delta(""), delta("\ud83d"), delta(None), delta("\ude00"), STOP), lines("\ufffd\U0001f600")),
    ("F128 halves in reasoning", "chat",
     sse(delta(reasoning_content="so \ud83d"), delta(reasoning_content="\ude00"), delta("ok"), STOP),
     lines("ok", thinking="so \U0001f600")),
    ("F128b half a pair that reasoning ends with", "chat",
     sse(delta(reasoning_content="so \ud83d"), STOP), lines(thinking="so \ufffd")),
    ("F129 halves in the arguments of a call", "chat",
     sse(call_delta(part("f", '{"x":"\ud83d', index=0, id="a")), call_delta(part(None, '\ude00"}', index=0)),
         TOOLS_END),
     lines(calls=[("f", {"x": "\U0001f600"})])),
    ("F130 half a pair in whole arguments", "chat",
     whole(None, "tool_calls", [part("f", '{"x":"\\ud83d"}', id="a")]), lines(calls=[("f", {"x": "\ufffd"})])),
]


# ----------------------------------------------------------------------------
# Helpers: increments, clocks, calls
# ----------------------------------------------------------------------------


class StillClock:
    """A clock that stands still."""

    now = staticmethod(lambda: 5_000_000_000)
    wall = staticmethod(lambda: 1_700_000_000)
    stamp = staticmethod(lambda: "2026-01-01T00:00:00Z")


def chat_call(how="chat", **fields):
    """The ChatCall a sample was recorded for."""
    messages = (Message("user", "hi"),)
    if how == "prefill":
        messages += (Message("assistant", "Sure"),)
    call = ChatCall("m", "generate" if how in ("generate", "raw") else "chat", messages, stream=True,
                    think=False if how == "think_false" else None)
    if how == "raw":
        call = call._replace(prompt="hi", messages=())
    return call._replace(**fields)


def translated(pieces, how="chat", decoder=None, encoder=None):
    """What a client gets of a stream that comes in `pieces`, without HTTP framing."""
    call = chat_call(how)
    decoder = decoder or OpenAIDecoder(call)
    return through(Translation(decoder, encoder or OllamaEncoder(call, StillClock, 1, 2), steps_of(call, decoder)), pieces)


def steps_of(call, decoder, mode="separate"):
    return proxy_module.steps_for(SimpleNamespace(reasoning=mode), call, decoder, False)


def through(translation, pieces):
    """All bytes of a translation; an early failure as the line that it is not.  An exception in `pieces` is a fault."""
    def coming():
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    out = b""
    try:
        for lines in translation.lines(coming()):
            out += b"".join(lines)
    except Told:
        pass
    except proxy_module.ProxyError as error:     # before the first event: a status, not a line
        assert not out
        out = json.dumps({"error": error.message}).encode() + b"\n"
    return out


def normalised(out):
    """Lines as the samples compare them: neighbours joined, times and ids left out."""
    joined = []
    for line in out.splitlines():
        value = json.loads(line)
        for key in ("model", "created_at", "total_duration", "load_duration", "context"):
            value.pop(key, None)
        message = value.get("message", value)
        for call in message.get("tool_calls", ()):
            call.pop("id")
            call["function"].pop("index")
        last = joined[-1] if joined else None
        for key in ("thinking", "content", "response"):
            if last is not None and message.get(key) and not value.get("done", True) and not last.get("done", True) \
                    and set(message) == set(last.get("message", last)):
                last.get("message", last)[key] += message[key]
                break
        else:
            joined.append(value)
    for value in joined:
        message = value.get("message", value)
        if "thinking" in message:
            message["thinking"] = message["thinking"].strip()
    return joined


def same_lines(got, wanted):
    """Compares with the expected lines; what the sample does not tell may be an estimate."""
    wanted = json.loads(wanted)
    if got and wanted and got[-1].get("done"):
        for key in ("prompt_eval_count", "eval_count", "prompt_eval_duration", "eval_duration"):
            assert got[-1][key] >= 1
            if key not in wanted[-1]:
                got[-1].pop(key)
    assert got == wanted


def splits(data):
    """Whole, byte by byte, at every two-way split, and at random places with a seed."""
    yield [data]
    yield [data[at:at + 1] for at in range(len(data))]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
    chance = random.Random(len(data))
    for _ in range(20):
        cuts = sorted(chance.sample(range(len(data) + 1), min(len(data), chance.randint(1, 9))))
        yield [data[one:two] for one, two in zip([0] + cuts, cuts + [len(data)])]


# ----------------------------------------------------------------------------
# Room 4: framing
# ----------------------------------------------------------------------------


@cases("data, wanted", [(b"a\nb\r\nc\rd", [b"a", b"b", b"c", b"d"]), (b"\r\n\r\n", [b"", b""]), (b"a\r", [b"a"]),
                        ("x\u2028y\x0cz\x85\n".encode(), ["x\u2028y\x0cz\x85".encode()])])
def test_lines_end_at_lf_crlf_and_cr_only(data, wanted):
    for pieces in splits(data):
        decoder = LineDecoder()
        assert [line for piece in pieces for line in decoder.feed(piece)] + decoder.close() == wanted


def test_chunked_coding_comes_off_at_every_split():
    data = b"5\r\nhello\r\n1a;name=value\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nTrailer: x\r\n\r\n"
    for pieces in splits(data):
        decoder = ChunkedDecoder()
        assert b"".join(map(decoder.feed, pieces)) == b"helloabcdefghijklmnopqrstuvwxyz"
        assert decoder.done and decoder.rest == b""


@cases("data", [b"+5\r\nhello\r\n", b"0x5\r\nhello\r\n", b"5 5\r\n", b"-1\r\n", b"1_0\r\n", b"5\nhello\r\n", b"\r\n",
                b"5\r\nhelloXX", b"5\r\nhello\n\n", b"5\r\nhello\rX", "\uff15\r\nhello\r\n".encode(), b"g\r\n",
                b"0\r\nno colon\r\n\r\n", b"0\r\n name: folded\r\n\r\n", b"f" * 5000])
def test_chunked_coding_refuses_what_smugglers_send(data):
    for pieces in ([data], [data[at:at + 1] for at in range(len(data))]):
        decoder = ChunkedDecoder()
        with pytest.raises(ValueError):
            for piece in pieces:
                decoder.feed(piece)


@cases("body, status, text", [
    (b"", 400, "missing request body"), (b"  \n", 400, "missing request body"), (b'{"a":', 400, "unexpected EOF"),
    (b"{oops}", 400, "invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (b"[1]", 400, "json: cannot unmarshal array into a request object"),
    (b'{"a": NaN}', 400, "invalid JSON: invalid number NaN"), (b'{"a": 1e999}', 400, "invalid JSON: invalid number 1e999"),
    (b'{"a":' + b"[" * 100000, 400, "exceeded max depth"),
    (b'{"a":' + b'{"a":' * 300 + b"1" + b"}" * 301, 400, "exceeded max depth"),
    (b'{"a": ' + b"9" * 6000 + b"}", 400, None)])
def test_bad_request_bodies_are_refused_in_plain_words(proxy, body, status, text):
    answer = proxy.post("/api/show", body)
    error = json.loads(answer.data)["error"]
    assert answer.status == status and (error == text or text is None and error)    # None: in Python's words


def test_request_bodies_are_read_as_ollama_reads_them(proxy):
    assert proxy.post("/api/show", b'{"Model": "m", "stream": false} trailing').status == 200
    brackets = "[" * 1000 + '\\"{' * 500            # in strings they do not nest
    assert proxy.post("/api/show", {"model": "m", "a": brackets}).status == 200


# ----------------------------------------------------------------------------
# Rooms 5 and 6: dialects
# ----------------------------------------------------------------------------


@cases("name, how, data, wanted", STREAMS, ids=[row[0] for row in STREAMS])
def test_every_stream_of_every_server_decodes_whole_and_at_every_cut(name, how, data, wanted):
    same_lines(normalised(translated([data], how)), wanted)
    whole = [value for value in normalised(translated([data], how))]
    for pieces in splits(data):
        got = normalised(translated(pieces, how))
        for value in got + whole:
            value.pop("eval_count", None)           # without usage it counts deltas, which tags may regroup
        assert got == whole


ODD_TOKENS = ["a", " b", "\n", "\n\n", '"', "\\", "\\n", "é", " \u65e5\u672c", "\U0001f999", "</", "</think>", "<b>", "\t", "\x7f", "\x00", "/", "x" * 600, "", "\u2028",
              "data: ", "}\n\n", '"},"finish_reason":null}]}', "\ud83d", "\ude00"]


def token_stream(chance, dialect, count=60, odd=1.0):
    """A stream with the texts that shortcuts trip over, `odd` of them, written the way servers differ."""
    ascii_only, spaces = chance.random() < .4, chance.random() < .3
    frames = []
    created = 1
    for _ in range(chance.randint(1, count)):
        tokens = ODD_TOKENS if chance.random() < odd else [" the", " quick", " brown", "fox"]
        text = "".join(chance.choice(tokens) for _ in range(chance.choice([1, 1, 1, 2, 3])))
        created += chance.random() < .05 * odd
        if dialect is OPENAI:
            value = {"id": "x", "created": created, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
            if chance.random() < .05 * odd:
                value = chance.choice([delta(reasoning_content="r"), {"choices": []}, {**value, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}])
        else:
            value = {"model": "m", "created_at": f"2026-01-01T00:00:0{created % 10}{'.25' * (created & 1)}Z", "message": {"role": "assistant", "content": text}, "done": False}
        line = json.dumps(value, ensure_ascii=ascii_only, separators=None if spaces else (",", ":")).replace("/", chance.choice(["/", "\\/"]) if chance.random() < .1 else "/")
        frames.append(f"data: {line}\n\n" if dialect is OPENAI else line + "\n")
    last = sse(STOP) if dialect is OPENAI else ndjson({"message": {"content": ""}, "done": True})
    return "".join(frames).encode("utf-8", "surrogatepass") + last


def some_pieces(chance, data):
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice([0, 0, 1, 3, 9, len(data) // 150])))
    return [data[one:two] for one, two in zip([0] + cuts, cuts + [len(data)]) if one < two]


@cases("texts", [["one", " two", " three", "four \ud83d", "\ude00", " five", " six", "\ud83d", "seven", "\ude00 eight"],
                ["\ud83d\ude00", " a", " b", " c\ud83d", "", "\ude00", " d"], ["a", "b", "c\ud83d", "d\ud83d"]])
def test_halves_of_pairs_are_joined_at_every_cut_with_the_shortcut_and_without(texts):
    data = sse(*map(delta, texts), STOP)
    wanted = "".join(texts).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    for pieces in splits(data):
        outs = []
        for shortcut in (True, False):
            call = chat_call()
            decoder = OpenAIDecoder(call)
            encoder = OllamaEncoder(call, StillClock, 1, 2)
            outs.append(through(Translation(decoder, encoder, steps_of(call, decoder), shortcut=shortcut), pieces))
        assert outs[0] == outs[1]
        assert "".join(json.loads(line)["message"]["content"] for line in outs[0].splitlines()) == wanted


@cases("dialect, encoder", [(OPENAI, OllamaEncoder), (OLLAMA, OpenAIEncoder)], ids=["openai", "ollama"])
@cases("face", ["chat", "generate"])
def test_the_shortcut_is_invisible(dialect, encoder, face, monkeypatch):
    """Same bytes out with and without it, for every sample and random streams, with random cuts and faults."""
    monkeypatch.setattr(proxy_module, "call_id", lambda *seed: "fixed")
    chance = random.Random(17)
    streams = [row[2] for row in STREAMS] + [token_stream(chance, dialect) for _ in range(60)]
    used, encoded = 0, []

    class Counted(encoder):
        def encode(self, event):
            encoded.append(event)
            return super().encode(event)

    for data in streams:
        pieces, outs = some_pieces(chance, data), []
        if chance.random() < .3:
            pieces[chance.randrange(len(pieces) + 1):] = [proxy_module.BadUpstreamPayload("broke")]
        encoded.clear()
        for shortcut in (True, False):
            took = len(encoded)
            call = chat_call(face=face if encoder is OllamaEncoder else "completion" if face == "generate" else "chat",
                             conversation=() if face == "generate" else None)
            decoder = dialect.Decoder(call)
            steps = steps_of(call, decoder)
            translation = Translation(decoder, Counted(call, StillClock, 1, 2), steps, shortcut=shortcut)
            outs.append(through(translation, pieces))
        used += took < len(encoded) - took
        assert outs[0] == outs[1], (data, pieces)
    assert used > 30


@cases("name, how, data, wanted", [row for row in STREAMS if b"data:" in row[2]],
       ids=[row[0] for row in STREAMS if b"data:" in row[2]])
def test_a_stream_that_is_cut_never_looks_whole(name, how, data, wanted):
    if b"[DONE]" not in data and b'"finish_reason":"' not in data.replace(b" ", b""):
        return
    ends = [match.end() for match in re.finditer(rb'"finish_reason": ?"(?!null)[^"]+"|\[DONE\]', data)]
    for at in range(0, min(ends)):
        assert b'"done":true' not in translated([data[:at]], how)


FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
HARMONY = "<|channel|>analysis<|message|>why"
MARKED = [      # what models leave in the text of servers without a parser: text, thinking, answer
    ("tags", "<think>why</think>ok", "why", "ok"), ("longer tags", "<thinking>\nwhy\n</thinking>\n\nok", "why", "ok"),
    ("thought", "\n<thought>why</thought> ok", "why", "ok"), ("brackets", "[THINK]why[/THINK]ok", "why", "ok"),
    ("brackets and lines", "[THINK]\nwhy\n[/THINK]\n\nok", "why", "ok"),
    ("Gemma", "<|channel>thought\nwhy<channel|>ok", "why", "ok"),
    ("Gemma, nothing thought", "<|channel>thought\n<channel|>ok", "", "ok"),
    ("gpt-oss", HARMONY + FINAL + "ok", "why", "ok"),
    ("gpt-oss, an answer alone", "<|channel|>final<|message|>ok", "", "ok"),
    ("gpt-oss, from its first mark", "<|start|>assistant" + HARMONY + FINAL + "ok", "why", "ok"),
    ("gpt-oss thinks twice", HARMONY + FINAL.replace("final", "analysis") + "more" + FINAL + "ok", "whymore", "ok"),
    ("Seed", "<seed:think>why</seed:think>ok", "why", "ok"),
    ("Kimi", "\u25c1think\u25b7why\u25c1/think\u25b7ok", "why", "ok"),
    ("Command", "<|START_THINKING|>why<|END_THINKING|><|START_RESPONSE|>ok", "why", "ok"),
    ("reasoning", "<reasoning>why</reasoning>ok", "why", "ok"),
    ("another closer inside", "<think>a [/THINK] b</think>ok", "a [/THINK] b", "ok"),
    ("half a closer inside", "[THINK]a [/TH b[/THINK]ok", "a [/TH b", "ok"),
    ("a tag in the middle", "In HTML <think> is no tag", "", "In HTML <think> is no tag"),
    ("half a bracket", "[THE END]", "", "[THE END]"), ("a list", "[1, 2]", "", "[1, 2]"),
    ("half a channel", "<|im", "", "<|im"), ("a channel of no use", "<|channel is open", "", "<|channel is open"),
    ("a mark in quotes", "`[THINK]` opens", "", "`[THINK]` opens")]


@cases("name, text, thinking, answer", MARKED, ids=[row[0] for row in MARKED])
def test_reasoning_marks_are_told_apart_from_the_answer_whole_and_at_every_cut(name, text, thinking, answer):
    pieces = [[text[:at], text[at:]] for at in range(1, len(text))] + [list(text), [text], [text[:9], "", text[9:]]]
    for data in [whole(text)] + [sse(*map(delta, cut), STOP) for cut in pieces]:
        got = [json.loads(line) for line in translated([data]).splitlines()]
        assert got[-1]["done"] is True, data
        told = [[entry["message"].get(key, "") for entry in got] for key in ("thinking", "content")]
        assert ["".join(texts).strip() for texts in told] == [thinking, answer], data


@cases("name, status, content_type, body, wanted", PRINTED_ERRORS, ids=[row[0] for row in PRINTED_ERRORS])
def test_the_sentence_in_every_error_shape_is_found(name, status, content_type, body, wanted):
    assert error_text(body, status) == wanted


def subset(wanted, got, ids):
    """Whether `got` holds everything in `wanted`; <ID1> stands for any nine letters or digits."""
    if isinstance(wanted, dict):
        return isinstance(got, dict) and all(key in got and subset(value, got[key], ids) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(got, list) and len(got) == len(wanted) and all(map(subset, wanted, got, itertools.repeat(ids)))
    return wanted == got


@cases("name, body, wanted, absent", PRINTED_REQUESTS, ids=[row[0] for row in PRINTED_REQUESTS])
def test_requests_carry_what_servers_need_and_nothing_they_refuse(name, body, wanted, absent):
    body, wanted = json.loads(body), json.loads(wanted)
    habits = Habits(think="template")
    if "input" in body:
        wire = OPENAI.render_embed(OLLAMA.parse_embed(body), habits)
    else:
        face = "generate" if "prompt" in body else "chat"
        wire = render_openai_chat(parse_ollama_chat(body, face), habits)
        assert wire.path == ("/completions" if body.get("raw") else "/chat/completions")
    assert subset(wanted, wire.body, {})
    for key in filter(None, absent.split(", ")):
        if key.startswith("messages[]."):
            assert not any(key[len("messages[]."):] in message for message in wire.body["messages"])
        else:
            assert key not in wire.body
    assert None not in wire.body.values()


def rendered(**body):
    """An Ollama chat as it goes to a lenient OpenAI target."""
    body.setdefault("messages", [{"role": "user", "content": "hi"}])
    return render_openai_chat(parse_ollama_chat({"model": "m", **body}), Habits(think="template")).body


@cases("options, wanted", [
    ({"num_predict": -1}, {}), ({"num_predict": -2}, {}), ({"num_predict": 0}, {}), ({"num_predict": 7}, {"max_tokens": 7}),
    ({"seed": -1}, {}), ({"seed": 0}, {"seed": 0}), ({"temperature": 0}, {"temperature": 0}), ({"temperature": None}, {}),
    ({"top_k": 0}, {}), ({"repeat_last_n": -1}, {}), ({"stop": "x"}, {"stop": ["x"]}), ({"stop": [""]}, {}),
    ({"stop": ["", "y"]}, {"stop": ["y"]}), ({"num_ctx": 4096, "mirostat": 1, "f16_kv": True}, {}),
    ({"num_predict": 4.7}, {"max_tokens": 4}), ({"repeat_penalty": 1.1}, {"repeat_penalty": 1.1, "repetition_penalty": 1.1}),
    ({"frequency_penalty": 0.0}, {"frequency_penalty": 0.0}), ({"typical_p": 0.5}, {"typical_p": 0.5})])
def test_options_become_openai_parameters(options, wanted):
    body = rendered(options=options)
    assert {key: value for key, value in body.items() if key not in ("model", "messages", "stream", "stream_options")} == wanted


def test_a_strict_target_gets_nothing_beyond_the_standard():
    call = parse_ollama_chat({"model": "m", "messages": [{"role": "user", "content": "x"}], "think": False, "stream": False,
                              "options": {"top_k": 1, "min_p": 0.1, "repeat_penalty": 1.2, "temperature": 1}})
    assert render_openai_chat(call, Habits(strict=True)).body == {
        "model": "m", "messages": [{"role": "user", "content": "x"}], "stream": False, "temperature": 1,
        "reasoning_effort": "none"}


@cases("body, text", [
    ({}, "model is required"), ({"model": ""}, "model is required"),
    ({"model": 5}, "json: cannot unmarshal number into field model of type string"),
    ({"messages": "x"}, "json: cannot unmarshal string into field messages of type array"),
    ({"messages": [1]}, "json: cannot unmarshal number into field messages of type object"),
    ({"stream": "yes"}, "json: cannot unmarshal string into field stream of type bool"),
    ({"think": "xhigh"}, 'invalid think value: "xhigh" (must be "high", "medium", "low", "max", true, or false)'),
    ({"think": 5}, 'think must be a boolean or string ("high", "medium", "low", "max", true, or false)'),
    ({"format": "xml"}, 'invalid format: "xml"; expected "json" or a valid JSON Schema object'),
    ({"options": {"temperature": "hot"}}, 'option "temperature" must be of type float32'),
    ({"options": {"num_predict": "many"}}, 'option "num_predict" must be of type integer'),
    ({"options": {"stop": 5}}, 'option "stop" must be of type array of strings'),
    ({"options": {"stop": ["x"] * 65}}, 'option "stop": at most 64 strings of at most 256 characters are supported'),
    ({"options": []}, "json: cannot unmarshal array into field options of type object"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
    ({"messages": [{"role": "user", "content": 5}]}, "json: cannot unmarshal number into field content of type string"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]},
     "invalid message format: content part of type 'video'"),
    ({"messages": [{"role": "user", "images": ["!!"]}]}, "illegal base64 data in image"),
    ({"messages": [{"role": "user", "images": [5]}]}, "invalid image input: a base64 string is expected"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}] * 513}]}, "more than 512 tool calls in one message"),
    ({"tools": "x"}, "json: cannot unmarshal string into field tools of type array"),
    ({"tools": [5]}, "json: cannot unmarshal number into field tools of type object"),
    ({"tools": [{"type": "web_search"}]}, "tools of type web_search are not supported: only functions are"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "json: cannot unmarshal array into field role of type string"),
    ({"messages": [{"role": "assistant", "tool_calls": [1]}]},
     "json: cannot unmarshal number into field tool_calls of type object"),
    ({"messages": [{"role": "user"}], "tools": [{"function": "x"}]},
     "json: cannot unmarshal string into field function of type object")])
def test_wrong_types_are_told_in_ollamas_words(body, text):
    with pytest.raises(BadRequest) as caught:
        parse_ollama_chat({**({} if text == "model is required" else {"model": "m"}), **body})
    assert caught.value.message == text and caught.value.status == 400


@cases("body, text, status", [
    ({"prompt": "x"}, "model '' not found", 404), 
    ({"model": "m", "prompt": 5}, "json: cannot unmarshal number into field prompt of type string", 400),
    ({"model": "m", "prompt": "x", "raw": True, "system": "s"}, "raw mode does not support template, system, or context", 400),
    ({"model": "m", "raw": True, "images": ["iVBORw0KGgo="]}, "images cannot be sent together with raw or suffix", 400),
    ({"model": "m", "prompt": "x", "context": [0x70A11A, 1, 1]}, "invalid context", 400),
    ({"model": "m", "prompt": "x", "template": "{{ range .Messages }}"},
     "template error: {{ range .Messages }} is not supported by this proxy", 400),
    ({"model": "m", "prompt": "x", "template": "{{ if .System }}x{{ end }}"},
     "template error: {{ if .System }} is not supported by this proxy", 400)])
def test_generate_refuses_in_ollamas_words(body, text, status):
    with pytest.raises(BadRequest) as caught:
        parse_ollama_chat(body, "generate")
    assert caught.value.message == text and caught.value.status == status


def test_empty_fields_are_no_fields():
    body = rendered(tools=[], format="", options=None, keep_alive=None, think=None, messages=[
        {"role": "user", "content": "a", "images": [], "tool_calls": []}, {"role": "user", "content": [], "images": [""]}, {"role": "assistant"}])
    assert body == {"model": "m", "stream": True, "stream_options": {"include_usage": True},
                    "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": ""}]}


def test_prompt_and_system_stand_in_for_messages():
    assert render_openai_chat(parse_ollama_chat({"model": "m", "prompt": "p", "system": "s"}), Habits()).body["messages"] == [
        {"role": "system", "content": "s"}, {"role": "user", "content": "p"}]


@cases("value, wanted", [
    ("iVBORw0KGgo=", "data:image/png;base64,iVBORw0KGgo="), ("data:image/webp;base64,UklGRgAAAABXRUJQ", "data:image/webp;base64,UklGRgAAAABXRUJQ"),
    ("/9j/\n4AAQ", "data:image/jpeg;base64,/9j/4AAQ"), ("R0lGODlh", "data:image/gif;base64,R0lGODlh"),
    ("https://x.example/a.png", "https://x.example/a.png"), ("iVBORw0KGgo", "data:image/png;base64,iVBORw0KGgo=")])
def test_images_in_any_form_become_urls(value, wanted):
    body = rendered(messages=[{"role": "user", "images": [value]}])
    assert body["messages"][0]["content"] == [{"type": "image_url", "image_url": {"url": wanted}}]


def test_content_parts_are_accepted_on_the_ollama_face():
    body = rendered(messages=[{"role": "user", "content": [
        {"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]}])
    assert [part["type"] for part in body["messages"][0]["content"]] == ["text", "image_url"]


def test_sound_becomes_input_audio():
    wav = base64.b64encode(b"RIFF\x00\x00\x00\x00WAVEfmt ").decode()
    body = rendered(messages=[{"role": "user", "content": "listen", "images": [wav]}])
    assert body["messages"][0]["content"][1] == {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}}


@cases("parameters, wanted", [
    (None, {"type": "object", "properties": {}}), ({}, {"type": "object", "properties": {}}),
    ({"properties": {"a": {"type": "string"}}}, {"type": "object", "properties": {"a": {"type": "string"}}}),
    ({"a": {"type": "string"}}, {"type": "object", "properties": {"a": {"type": "string"}}}),
    ({"$schema": "x", "type": "object", "properties": {}, "additionalProperties": False},
     {"type": "object", "properties": {}, "additionalProperties": False})])
def test_tool_parameters_become_an_object_schema(parameters, wanted):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert rendered(tools=[tool])["tools"][0]["function"]["parameters"] == wanted


def valid_history(messages):
    """What strict servers check: each call has an id of its own and is answered once, right after it."""
    waiting, seen = [], set()
    for message in messages:
        if message["role"] == "tool":
            assert message["tool_call_id"] in waiting, "a result without a call"
            waiting.remove(message["tool_call_id"])
            continue
        assert not waiting, "a call without a result"
        for call in message.get("tool_calls", ()):
            assert call["type"] == "function" and isinstance(json.loads(call["function"]["arguments"]), dict)
            assert call["id"] and call["id"] not in seen, "an id twice"
            seen.add(call["id"])
            waiting.append(call["id"])
    assert not waiting, "a call without a result at the end"


def calling(*calls, **fields):
    return {"role": "assistant", "tool_calls": [
        {**({"id": call[2]} if len(call) > 2 else {}), "function": {"name": call[0], "arguments": call[1]}} for call in calls],
        **fields}


def result(text, **fields):
    return {"role": "tool", "content": text, **fields}


HISTORIES = [
    ("by id, answered out of order", [calling(("f", {}, "a"), ("g", {}, "b")), result("B", tool_call_id="b"), result("A", tool_call_id="a")],
     {"f": "A", "g": "B"}),
    ("by name, without ids", [calling(("f", {}), ("g", {})), result("G", tool_name="g"), result("F", tool_name="f")],
     {"f": "F", "g": "G"}),
    ("by order, with neither", [calling(("f", {}), ("g", {})), result("1"), result("2")], {"f": "1", "g": "2"}),
    ("the same function twice", [calling(("f", {"n": 1}), ("f", {"n": 2})), result("1", tool_name="f"), result("2", tool_name="f")],
     {"f": "2"}),
    ("a name that is an id", [calling(("f", {}, "call_1"), ("g", {}, "call_2")), result("G", tool_name="call_2"), result("F", tool_name="call_1")],
     {"f": "F", "g": "G"}),
    ("ids that do not match", [calling(("f", {})), result("F", tool_call_id="made-up")], {"f": "F"}),
    ("results as user text", [calling(("f", {}), content="x"), {"role": "user", "content": "the result is F"}], {"f": ""}),
    ("a result whose call was trimmed", [result("F", tool_name="f"), {"role": "user", "content": "and?"}], {"f": "F"}),
    ("a call at the very end", [calling(("f", {}, "a"))], {"f": ""}),
    ("the same id in two turns", [calling(("f", {}, "a")), result("1", tool_call_id="a"), calling(("g", {}, "a")), result("2", tool_call_id="a")],
     {"f": "1", "g": "2"}),
    ("a late result after a user turn", [calling(("f", {}, "a"), ("g", {}, "b")), result("A", tool_call_id="a"),
                                         {"role": "user", "content": "wait"}, result("B", tool_call_id="b")], {"f": "A", "g": "B"}),
    ("arguments as text", [calling(("f", '{"x": 1}', "a")), result("F", tool_call_id="a")], {"f": "F"}),
]


@cases("name, turns, wanted", HISTORIES, ids=[row[0] for row in HISTORIES])
def test_any_tool_history_becomes_a_valid_one(name, turns, wanted):
    messages = rendered(messages=[{"role": "user", "content": "go"}] + turns)["messages"]
    valid_history(messages)
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    assert {names[message["tool_call_id"]]: message["content"] for message in messages if message["role"] == "tool"} == wanted
    assert all(message["content"] is None for message in messages if message.get("tool_calls") and name != "results as user text")
    again = parse_openai_chat({"model": "m", "messages": messages})
    valid_history(render_openai_chat(again, Habits()).body["messages"])


def test_a_random_history_of_any_shape_becomes_a_valid_one():
    chance = random.Random(7)
    for _ in range(300):
        turns = []
        for _ in range(chance.randint(1, 8)):
            kind = chance.choice(["user", "calls", "tool", "tool", "assistant"])
            if kind == "calls":
                turns.append(calling(*[(chance.choice("fg"), {}) + ((chance.choice("abc"),) if chance.random() < .5 else ())
                                       for _ in range(chance.randint(1, 3))]))
            elif kind == "tool":
                turns.append(result("r", **{key: chance.choice("abcfg") for key in ("tool_call_id", "tool_name") if chance.random() < .4}))
            else:
                turns.append({"role": kind, "content": "x"})
        valid_history(rendered(messages=turns)["messages"])


def test_images_in_a_tool_result_follow_all_results():
    messages = rendered(messages=[calling(("f", {}, "a"), ("g", {}, "b")), result("A", tool_call_id="a", images=["iVBORw0KGgo="]),
                                  result("B", tool_call_id="b")])["messages"]
    assert [message["role"] for message in messages] == ["assistant", "tool", "tool", "user"]
    assert messages[3]["content"][0]["type"] == "image_url"


def test_pictures_of_a_turn_with_calls_are_shown_behind_their_results():
    turns = [calling(("f", {}, "a"), images=["iVBORw0KGgo="]), result("A", tool_call_id="a")]
    messages = rendered(messages=turns)["messages"]
    valid_history(messages)
    assert [message["role"] for message in messages] == ["assistant", "tool", "user"]
    assert messages[2]["content"][0]["type"] == "image_url"


def test_mistral_gets_nine_character_ids_and_a_bridge():
    call = parse_ollama_chat({"model": "m", "messages": [calling(("f", {}, "call_long_one")), result("A", tool_call_id="call_long_one"),
                                                         {"role": "user", "content": "and?"}]})
    messages = render_openai_chat(call, proxy_module.PRESETS["mistral"].habits).body["messages"]
    assert re.fullmatch("[a-zA-Z0-9]{9}", messages[0]["tool_calls"][0]["id"])
    assert messages[1]["tool_call_id"] == messages[0]["tool_calls"][0]["id"]
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant", "user"]


@cases("style, think, wanted", [
    ("effort", False, {"reasoning_effort": "none"}), ("effort", True, {}), ("effort", "low", {"reasoning_effort": "low"}),
    ("template", False, {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}}),
    ("template", True, {"chat_template_kwargs": {"enable_thinking": True}}), ("template", "high", {"reasoning_effort": "high"}),
    ("reasoning", False, {"reasoning": {"enabled": False}}), ("reasoning", "max", {"reasoning": {"effort": "high"}}),
    ("thinking", False, {"thinking": {"type": "disabled"}}), ("high", "low", {"reasoning_effort": "high"})])
def test_think_is_told_to_each_target_in_its_own_way(style, think, wanted):
    body = render_openai_chat(chat_call(think=think, stream=False), Habits(think=style)).body
    assert {key: value for key, value in body.items() if key not in ("model", "messages", "stream")} == wanted


@cases("value, seconds", [(0, 0), (0.0, 0), ("0", 0), ("0s", 0), ("5m", 300), ("1h30m", 5400), ("1.5h", 5400), ("300ms", .3),
                          (-1, -1), ("-1", -1), ("-1s", -1), ("300", 300), (1800, 1800), (None, None), (True, None),
                          ("1d", None), ("", None), ("10m0s", 600)])
def test_keep_alive_in_all_its_forms(value, seconds):
    found = proxy_module.keep_alive_seconds(value)
    assert found == seconds or abs(found - seconds) < 1e-9


def context_after(call, answer):
    """The numbers that a client is given for its next request."""
    body = OllamaEncoder(call, StillClock, 1, 2).fold([TextDelta(answer), Finish("stop", Usage())])
    return json.loads(body)["context"]


def test_generate_system_template_and_context():
    template = "<{{ .System }}>[{{.Prompt}}]{{ .Response }}"
    call = parse_ollama_chat({"model": "m", "prompt": "p", "system": "s", "template": template}, "generate")
    assert [tuple(message[:2]) for message in call.messages] == [("user", "<s>[p]")]
    first = parse_ollama_chat({"model": "m", "prompt": "I am Bob", "system": "s"}, "generate")
    numbers = context_after(first, "Hi Bob \U0001f999")
    assert all(isinstance(number, int) and 0 <= number < 2 ** 24 for number in numbers)
    second = parse_ollama_chat({"model": "m", "prompt": "and me?", "context": numbers}, "generate")
    assert [tuple(message[:2]) for message in second.messages] == [
        ("system", "s"), ("user", "I am Bob"), ("assistant", "Hi Bob \U0001f999"), ("user", "and me?")]
    assert len(parse_ollama_chat({"model": "m", "prompt": "x", "context": [1, 2, 3]}, "generate").messages) == 1
    with pytest.raises(BadRequest):
        parse_ollama_chat({"model": "m", "prompt": "x", "context": numbers[:2] + [1, 2, 3]}, "generate")


def test_raw_and_suffix_go_to_completions_with_a_limit():
    wire = render_openai_chat(parse_ollama_chat({"model": "m", "prompt": "a", "suffix": "b"}, "generate"), Habits(), 1000)
    assert wire.path == "/completions" and wire.body["suffix"] == "b" and 900 < wire.body["max_tokens"] < 1000
    wire = render_openai_chat(parse_ollama_chat({"model": "m", "prompt": "a", "raw": True}, "generate"), Habits())
    assert wire.body["max_tokens"] > 1000       # servers stop after 16 where nobody says how many


def test_logprobs_pass_and_surplus_alternatives_do_not():
    token = {"token": "a", "logprob": -1.5, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -1.5}, {"token": "b", "logprob": -2.0}]}
    data = sse({"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [token]}}]}, STOP)
    for wanted in (0, 1, 2):
        call = chat_call(logprobs=wanted)
        out = translated([data], decoder=OpenAIDecoder(call), encoder=OllamaEncoder(call, StillClock, 1, 2))
        first = json.loads(out.splitlines()[0])
        assert first["logprobs"][0]["token"] == "a" and len(first["logprobs"][0].get("top_logprobs", ())) == wanted
        assert first["message"] == {"role": "assistant", "content": "a"} and first["done"] is False
    assert rendered(logprobs=True)["logprobs"] is True


@cases("mode, wanted", [("separate", ("ok", "why")), ("drop", ("ok", None)), ("merge", ("<think>\nwhy\n</think>\n\nok", None))])
def test_reasoning_goes_where_it_is_wanted(mode, wanted):
    call = chat_call()
    decoder = OpenAIDecoder(call)
    translation = Translation(decoder, OllamaEncoder(call, StillClock, 1, 2), steps_of(call, decoder, mode))
    data = sse(delta(reasoning_content="wh"), delta(reasoning_content="y"), delta("ok"), STOP)
    got = normalised(through(translation, [data]))
    text = "".join(value["message"]["content"] for value in got)
    thinking = "".join(value["message"].get("thinking", "") for value in got) or None
    assert (text, thinking) == wanted


def test_every_line_is_complete_and_only_the_last_one_is_done():
    call = call_delta({"index": 0, **part("f", "{}")})
    out = translated([sse(delta("a"), delta(reasoning_content="t"), call, TOOLS_END)])
    assert out.endswith(b"\n") and b"\n\n" not in out and out.isascii()
    values = [json.loads(line) for line in out.splitlines()]
    for value in values:
        assert value["model"] == "m" and value["message"]["role"] == "assistant" and isinstance(value["message"]["content"], str)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", value["created_at"])
        assert "error" not in value and None not in value.values() and None not in value["message"].values()
    assert [value["done"] for value in values] == [False] * (len(values) - 1) + [True]
    assert not any("done_reason" in value for value in values[:-1])
    call = next(value["message"]["tool_calls"][0] for value in values if "tool_calls" in value["message"])
    assert set(call) == {"id", "function"} and set(call["function"]) == {"index", "name", "arguments"}
    last = values[-1]
    assert last["message"] == {"role": "assistant", "content": ""}
    for key in ("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"):
        assert isinstance(last[key], int) and last[key] >= 1


def test_a_prompt_nobody_counted_is_a_token_for_each_four_bytes():
    def estimate(**body):
        call = parse_ollama_chat({"model": "m", **body}, "generate" if "prompt" in body else "chat")
        answer = OllamaEncoder(call, StillClock, 1, 2).fold([TextDelta("x"), Finish("stop", Usage())])
        return json.loads(answer)["prompt_eval_count"]

    turns = [{"role": "user", "content": "\u597d" * 100}]
    tool = {"type": "function", "function": {"name": "f", "description": "d" * 400, "parameters": {}}}
    assert estimate(messages=turns) == estimate(prompt="\u597d" * 100) == 75
    assert 175 <= estimate(messages=turns, tools=[tool]) <= 250


def random_events(chance):
    """A reply nobody would write: any text, empty pieces never."""
    alphabet = ["a", "\n", '"', "\\", "\u2028", "\U0001f999", "é", "<", "</think>", "data: ", "\x00", "\ud7ff", "{", "x" * 50]
    events = []
    for _ in range(chance.randint(0, 12)):
        text = "".join(chance.choice(alphabet) for _ in range(chance.randint(1, 6)))
        events.append(chance.choice([TextDelta, TextDelta, ThinkingDelta])(text))
    if chance.random() < 0.5:
        events.append(ToolCalls(tuple(ToolCall(f"id{at}", chance.choice("fgh"), {"x": chance.choice([1, "\u2028", None, [{}]])})
                                      for at in range(chance.randint(1, 3)))))
    if not any(isinstance(event, (TextDelta, ToolCalls)) for event in events):
        events.append(TextDelta("x"))
    return events + [Finish(chance.choice(["stop", "length"]), Usage(7, 9))]


def merged(events):
    """Neighbouring deltas joined; what encodings may lose left out."""
    out = []
    for event in events:
        if isinstance(event, ToolCalls) and out and isinstance(out[-1], ToolCalls):
            out[-1] = ToolCalls(out[-1].calls + event.calls)
        elif isinstance(event, (TextDelta, ThinkingDelta)) and out and type(out[-1]) is type(event):
            out[-1] = type(event)(out[-1].text + event.text)
        elif isinstance(event, ToolCalls):
            out.append(ToolCalls(tuple(call._replace(extra=None) for call in event.calls)))
        elif isinstance(event, Finish):
            out.append(Finish(event.reason, event.usage._replace(prompt_ns=None, completion_ns=None, load_ns=None)))
        else:
            out.append(event)
    return [ToolCalls(tuple(call._replace(extra=None) for call in event.calls)) if isinstance(event, ToolCalls) else event for event in out]


@cases("dialect", [OLLAMA, OPENAI], ids=["ollama", "openai"])
def test_what_is_encoded_decodes_to_the_same_events(dialect):
    chance = random.Random(3)
    for _ in range(200):
        call = chat_call(want_usage=True)
        events = random_events(chance)
        encoder = dialect.Encoder(call, StillClock, 1, 2)
        encoder.tick()
        data = b"".join(map(encoder.encode, events)) + encoder.tail
        for pieces in ([data], [data[at:at + 7] for at in range(0, len(data), 7)]):
            decoder = dialect.Decoder(call)
            got = [event for piece in pieces for event in decoder.feed(piece)]
            got += [] if decoder.done else decoder.close()
            if isinstance(events[0], TextDelta) and dialect is OPENAI and events[0].text.lstrip()[:1] in ("<", ""):
                continue                # a text that begins like a think tag is read as one
            assert merged(got) == merged(events)


def test_folding_a_stream_says_what_the_whole_body_says():
    body = {"choices": [{"message": {"content": "Hello", "reasoning_content": "hm", "tool_calls": [
        {"id": "a", "function": {"name": "f", "arguments": "{}"}}]}, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}}
    stream = sse(delta(reasoning_content="hm"), delta("Hel"), delta("lo"), call_delta({"index": 0, "id": "a", **part("f", "{}")}),
                 {**TOOLS_END, "usage": body["usage"]})
    call = chat_call()
    decoder = OpenAIDecoder(call)
    for encoder in (OllamaEncoder, OpenAIEncoder):
        one = json.loads(encoder(call, StillClock, 1, 2).fold(OpenAIDecoder(call).decode_body(body)))
        decoder = OpenAIDecoder(call)
        two = json.loads(encoder(call, StillClock, 1, 2).fold(decoder.feed(stream)))
        one.pop("id", None), two.pop("id", None)
        assert one == two


# -- the OpenAI face


def native(**body):
    """An OpenAI chat as it goes to a real Ollama."""
    body.setdefault("messages", [{"role": "user", "content": "hi"}])
    return render_ollama_chat(parse_openai_chat({"model": "m", **body}), Habits()).body


@cases("body, wanted", [
    ({"temperature": 0.5, "top_p": 0.9, "stop": "x", "max_tokens": 5}, {"temperature": 0.5, "top_p": 0.9, "stop": ["x"], "num_predict": 5}),
    ({"max_completion_tokens": 7, "max_tokens": 5}, {"num_predict": 7}), ({"stop": ["a", ""]}, {"stop": ["a"]}), ({"stop": []}, None),
    ({}, None), ({"options": {"num_ctx": 8192}, "temperature": 1}, {"temperature": 1, "num_ctx": 8192}), ({"seed": 3, "top_k": 4}, {"seed": 3, "top_k": 4}),
    ({"frequency_penalty": 0.1, "presence_penalty": 0.2}, {"frequency_penalty": 0.1, "presence_penalty": 0.2}),
    ({"num_ctx": 16384}, {"num_ctx": 16384}), ({"num_ctx": 5, "options": {"num_ctx": 7}}, {"num_ctx": 7}),
    ({"num_ctx": None}, None),
    ({"num_gpu": 1, "num_thread": 2, "use_mmap": False}, {"num_gpu": 1, "num_thread": 2, "use_mmap": False}),
    ({"options": {"stop": "x"}}, {"stop": ["x"]}), ({"options": {"stop": None, "top_k": 2}}, {"top_k": 2}),
    ({"options": None}, None), ({"options": {"temperature": None}, "temperature": 1}, {"temperature": 1}),
    ({"min_p": 0.1, "repeat_penalty": 1.2}, {"min_p": 0.1, "repeat_penalty": 1.2})])
def test_openai_parameters_become_options(body, wanted):
    assert native(**body).get("options") == wanted


@cases("body, wanted", [
    ({}, None), ({"reasoning_effort": "none"}, False), ({"reasoning_effort": "minimal"}, "low"), ({"reasoning_effort": "xhigh"}, "max"),
    ({"reasoning": {"effort": "high"}}, "high"), ({"think": True, "reasoning_effort": "none"}, True), ({"reasoning": {"enabled": False}}, False),
    ({"chat_template_kwargs": {"enable_thinking": False}}, False), ({"reasoning_effort": ""}, None),
    ({"reasoning_effort": "low"}, "low"), ({"reasoning_effort": "HIGH"}, "high"), ({"reasoning_effort": "max"}, "max"),
    ({"reasoning_effort": "off"}, False), ({"reasoning": {"effort": "none"}}, False),
    ({"reasoning": {"enabled": True}}, True),
    ({"reasoning": {"effort": None}}, None), ({"reasoning": {"max_tokens": 99}}, None), ({"reasoning": "x"}, None),
    ({"thinking": {"type": "disabled"}}, False), ({"thinking": {"type": "enabled"}}, True),
    ({"thinking": {"type": "adaptive"}}, None), ({"thinking": {"type": "enabled"}, "reasoning_effort": "low"}, "low"),
    ({"thinking": {"type": "disabled"}, "reasoning_effort": "none"}, False), ({"thinking": None}, None),
    ({"enable_thinking": False}, False), ({"enable_thinking": True}, True), ({"enable_thinking": None}, None),
    ({"chat_template_kwargs": {"enable_thinking": True}}, True), ({"chat_template_kwargs": {"thinking": False}}, False),
    ({"chat_template_kwargs": {"thinking": True}}, True),
    ({"chat_template_kwargs": {"reasoning_effort": "medium"}}, "medium"),
    ({"chat_template_kwargs": {}}, None), ({"chat_template_kwargs": None}, None), ({"think": "max"}, "max"),
    ({"think": False, "enable_thinking": True}, False), ({"reasoning_effort": "none", "enable_thinking": True}, False)])
def test_what_a_client_says_of_thinking_is_understood_in_every_spelling(body, wanted):
    assert native(**body).get("think") == wanted


def test_openai_messages_become_native_ones():
    body = native(messages=[
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"},
                                     {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "c2", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "two"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "one"}], response_format={
            "type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}, keep_alive="30m")
    assert body["messages"] == [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb", "images": ["iVBORw0KGgo="]},
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [
            {"id": "c1", "function": {"index": 0, "name": "f", "arguments": {"x": 1}}},
            {"id": "c2", "function": {"index": 1, "name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "two", "tool_name": "f", "tool_call_id": "c2"},
        {"role": "tool", "content": "one", "tool_name": "f", "tool_call_id": "c1"}]
    assert body["format"] == {"type": "object"} and body["keep_alive"] == "30m" and body["stream"] is False


def test_tool_choice_is_honoured_as_far_as_ollama_can():
    tools = [{"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "string"}}}}} for name in "fg"]
    assert len(native(tools=tools)["tools"]) == 2 and "tools" not in native(tools=tools, tool_choice="none")
    named = native(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}})["tools"]
    assert [tool["function"]["name"] for tool in named] == ["g"]
    assert named[0]["function"]["parameters"] == {"type": "object", "properties": {"p": {"type": "string"}}}


@cases("body, text", [
    ({"model": "m"}, "too short"), ({"messages": [{}]}, "model is required"), ({"model": "m", "messages": [{"role": "user"}], "n": 2}, "n greater than 1"),
    ({"model": "m", "messages": [{"role": "user"}], "reasoning_effort": "huge"}, "reasoning effort"),
    ({"model": "m", "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "invalid message format"),
    ({"model": "m", "messages": [{"role": "user"}], "temperature": "x"}, "field temperature")])
def test_what_ollama_cannot_do_is_a_clear_400(body, text):
    with pytest.raises(BadRequest) as caught:
        parse_openai_chat(body)
    assert text in caught.value.message


def test_an_openai_stream_has_one_id_one_role_and_an_index_for_each_call():
    call = chat_call(want_usage=True)
    native_lines = b"".join(json.dumps(value).encode() + b"\n" for value in (
        {"message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False},
        {"message": {"role": "assistant", "content": "a"}, "done": False},
        {"message": {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}]}, "done": False},
        {"message": {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, "done": True,
         "done_reason": "stop", "prompt_eval_count": 4, "eval_count": 5}))
    out = translated([native_lines], decoder=OllamaDecoder(call), encoder=OpenAIEncoder(call, StillClock, 1, 2))
    for pieces in splits(native_lines):
        again = translated(pieces, decoder=OllamaDecoder(call), encoder=OpenAIEncoder(call, StillClock, 1, 2))
        assert len(again.splitlines()) == len(out.splitlines())
    frames = out.decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    values = [json.loads(frame[6:]) for frame in frames[:-2]]
    assert len({value["id"] for value in values}) == 1 and len({value["created"] for value in values}) == 1
    deltas = [value["choices"][0]["delta"] for value in values[:-1]]
    assert [entry.get("role") for entry in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert deltas[0]["reasoning_content"] == deltas[0]["reasoning"] == "hm"
    calls = [entry["tool_calls"][0] for entry in deltas if "tool_calls" in entry]
    assert [call["index"] for call in calls] == [0, 1] and len({call["id"] for call in calls}) == 2
    assert calls[0]["function"] == {"name": "f", "arguments": '{"x":1}'} and all(call["id"] for call in calls)
    assert "".join(entry.get("content") or "" for entry in deltas) == "ab"
    assert values[-2]["choices"][0]["finish_reason"] == "tool_calls" and deltas[-1] == {}
    assert values[-1]["choices"] == [] and values[-1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    assert not any("usage" in value for value in values[:-1])


@cases("value, wanted", [("-1", -1), ("300", 300), ("0", 0), (-1, -1), (0, 0), (1.5, 1.5), ("5m", "5m"),
                         ("1h30m", "1h30m"), ("-1s", "-1s"), ("500ms", "500ms"), (None, None)])
def test_keep_alive_reaches_an_ollama_as_it_takes_it(value, wanted):
    assert native(keep_alive=value).get("keep_alive") == wanted
    for body in ({"input": "x"}, {"input": ["x"]}):
        call = OPENAI.parse_embed({"model": "m", "keep_alive": value, **body})
        assert OLLAMA.render_embed(call, Habits()).body.get("keep_alive") == wanted


ANIMAL = {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}
KINDS = {name: {"type": "object", "properties": {"kind": {"const": name.lower()}}} for name in ("Cat", "Dog")}
CAT, DOG = [{"type": "object", "properties": {"kind": {"enum": [name]}}} for name in ("cat", "dog")]
SCHEMAS = [     # parameters of a tool, and what of them an Ollama must see
    ("true stands for anything", {"properties": {"a": True, "b": {"type": "object", "properties": {"c": True}}}},
     {"a": {}, "b": {"type": "object", "properties": {"c": {}}}}),
    ("true in a choice", {"properties": {"a": {"anyOf": [True, {"type": "null"}]}}},
     {"a": {"anyOf": [{}, {"type": "null"}]}}),
    ("true as items", {"properties": {"a": {"type": "array", "items": True}}}, {"a": {"type": "array", "items": {}}}),
    ("no properties, as PHP writes them", {"type": "object", "properties": [], "required": []}, {}),
    ("no properties inside", {"properties": {"a": {"type": "object", "properties": []}}},
     {"a": {"type": "object", "properties": {}}}),
    ("properties are null", {"type": "object", "properties": None}, {}),
    ("a root that may be null", {"type": ["object", "null"], "properties": {"q": {"type": ["string", "null"]}}},
     {"q": {"type": ["string", "null"]}}),
    ("a choice of references", {"properties": {"pet": ANIMAL}, "$defs": KINDS}, {"pet": {"anyOf": [CAT, DOG]}}),
    ("references into definitions", {"properties": {"a": {"$ref": "#/definitions/A", "description": "d"}},
                                     "definitions": {"A": {"type": "string"}}},
     {"a": {"type": "string", "description": "d"}}),
    ("a list of references", {"properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/Cat"}}}, "$defs": KINDS},
     {"a": {"type": "array", "items": CAT}}),
    ("all of one", {"properties": {"a": {"allOf": [{"$ref": "#/$defs/Cat"}], "description": "d"}}, "$defs": KINDS},
     {"a": {**CAT, "description": "d"}}),
    ("a constant", {"properties": {"a": {"const": 5}, "b": {"const": None}}},
     {"a": {"enum": [5]}, "b": {"enum": [None]}}),
    ("what Ollama keeps", {"properties": {"a": {"type": "string", "enum": ["x"], "description": "d"}}},
     {"a": {"type": "string", "enum": ["x"], "description": "d"}}),
    ("a reference to nothing", {"properties": {"a": {"$ref": "#/$defs/None"}}}, {"a": {}}),
    ("a name that is a keyword", {"properties": {"const": {"type": "string"}, "oneOf": {"const": 1},
                                                 "$ref": {"type": "integer"}}},
     {"const": {"type": "string"}, "oneOf": {"enum": [1]}, "$ref": {"type": "integer"}}),
    ("a default is no schema", {"properties": {"a": {"type": "object", "default": {"const": 1, "items": True}}}},
     {"a": {"type": "object"}})]


def as_ollama_reads(schema):
    """What Ollama's structs keep of a schema; fails where they would refuse it."""
    assert isinstance(schema, dict), schema
    kept = {key: value for key, value in schema.items() if key in ("type", "description", "enum")}
    assert isinstance(kept.get("type", ""), str) or all(isinstance(one, str) for one in kept["type"])
    assert isinstance(schema.get("required", []), list)
    if "properties" in schema:
        kept["properties"] = {name: as_ollama_reads(inner) for name, inner in schema["properties"].items()}
    if "anyOf" in schema:
        kept["anyOf"] = list(map(as_ollama_reads, schema["anyOf"]))
    if "items" in schema:
        kept["items"] = as_ollama_reads(schema["items"])
    return kept


@cases("name, parameters, wanted", SCHEMAS, ids=[row[0] for row in SCHEMAS])
def test_schemas_of_tools_reach_an_ollama_in_what_it_keeps(name, parameters, wanted):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    sent = native(tools=[tool])["tools"][0]["function"]["parameters"]
    assert sent["type"] == "object" and as_ollama_reads(sent)["properties"] == wanted


def test_a_schema_that_refers_to_itself_ends():
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/T"}, "right": {"$ref": "#/$defs/T"}}}
    parameters = {"properties": {"t": {"$ref": "#/$defs/T"}}, "$defs": {"T": tree}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    try:
        assert len(json.dumps(native(tools=[tool]))) < 1_000_000
    except BadRequest as error:
        assert error.status == 400 and "schema" in error.message


@cases("written, wanted", [
    ("[]", {}), ("", {}), ("null", {}), (None, {}), ([], {}), ({"a": 1}, {"a": 1}), ('{"a": 1}', {"a": 1}),
    ('"{\\"a\\": 1}"', {"a": 1}), ('{"command": "ls -', None), ("ls -la", None), ("5", None), ("[1, 2]", None),
    ('{"a": 1}}', None), ("{'a': 1}", None)])
def test_what_a_model_once_wrote_as_arguments_never_ends_the_chat(written, wanted):
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "run", "arguments": written}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "no JSON"}, {"role": "user", "content": "again"}]
    found = native(messages=turns)["messages"]
    sent = found[1]["tool_calls"][0]["function"]["arguments"]
    assert [turn["role"] for turn in found] == ["user", "assistant", "tool", "user"]
    assert isinstance(sent, dict)
    assert sent == wanted if wanted is not None else json.dumps(written)[1:-1] in json.dumps(sent)
    call = parse_ollama_chat({"model": "m", "messages": turns})
    text = render_openai_chat(call, Habits()).body["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(text) == sent


def offered(choice, *kinds):
    """The names of the tools that an Ollama is shown."""
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("read", "write", "delete")]
    return [tool["function"]["name"] for tool in native(tools=tools + list(kinds), tool_choice=choice).get("tools", ())]


def named_tool(name):
    return {"type": "function", "function": {"name": name}}


@cases("choice, wanted", [
    ("auto", ["read", "write", "delete"]), ("required", ["read", "write", "delete"]), ("none", []),
    (None, ["read", "write", "delete"]), (named_tool("write"), ["write"]),
    ({"type": "function", "name": "write"}, ["write"]),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named_tool("read")]}}, ["read"]),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
        named_tool("write"), {"type": "function", "name": "read"}]}}, ["read", "write"]),
    ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "read"}]}, ["read"]),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, [])])
def test_only_tools_that_may_be_called_are_offered(choice, wanted):
    assert offered(choice) == wanted


@cases("tool", [{"type": "custom", "custom": {"name": "sql", "format": {"type": "grammar"}}},
                {"type": "custom", "name": "sql"}, {"type": "web_search"}, {"type": "web_search_preview"},
                {"type": "code_interpreter", "container": {"type": "auto"}}])
def test_other_kinds_of_tools_are_served_or_refused_but_not_forgotten(tool):
    try:
        assert len(offered(None, tool)) == 4
    except BadRequest as error:
        assert error.status == 400 and tool["type"] in error.message and "function" in error.message


@cases("data, text", [(b'{"message":{"content":"a"},"done":false}\n{"error":"boom"}\n', "boom"),
                      (b'{"message":{"content":"a"},"done":false}\n', "upstream closed the stream before finishing"),
                      (b'{"message":{"content":"a"},"done":false}\nnonsense\n', "not JSON")])
def test_an_openai_stream_that_breaks_ends_in_an_error_and_no_done(data, text):
    call = chat_call()
    for pieces in splits(data):
        out = translated(pieces, decoder=OllamaDecoder(call), encoder=OpenAIEncoder(call, StillClock, 1, 2))
        last = json.loads(out.decode().rstrip().split("\n\n")[-1][6:])
        assert text in last["error"]["message"] and b"[DONE]" not in out and b"finish_reason\":\"" not in out


# -- embeddings


@cases("answer, count, wanted", [
    ({"data": [{"embedding": [0.1, 0.2]}, {"embedding": [0.3, 0.4]}]}, 2, [[0.1, 0.2], [0.3, 0.4]]),
    ({"data": [{"index": 1, "embedding": [2]}, {"index": 0, "embedding": [1]}]}, 2, [[1], [2]]),
    ({"data": [{"index": 0, "embedding": base64.b64encode(struct.pack("<2f", 1, 0.5)).decode()}]}, 1, [[1.0, 0.5]]),
    ({"data": [{"index": 0, "embedding": [[1.0, 3.0], [3.0, 5.0]]}]}, 1, [[2.0, 4.0]]), ([{"embedding": [1]}], 1, [[1]])],
    ids=["M02 no usage, no index", "M05 order by index", "M01 base64", "a vector per token", "a bare list"])
def test_embeddings_in_every_shape(answer, count, wanted):
    assert OPENAI.read_embeddings(answer, count)[0] == wanted


@cases("answer, count", [({"data": [{"embedding": [1]}]}, 2), ({}, 1), ({"data": [{"embedding": "!"}]}, 1),
                         ({"data": [{"embedding": []}]}, 1), ({"data": [{"embedding": {"numbers": 7}}]}, 1)])
def test_missing_embeddings_are_an_error_not_a_short_list(answer, count):
    with pytest.raises(proxy_module.BadUpstreamPayload):
        OPENAI.read_embeddings(answer, count)


def test_embedding_answers_hold_what_ollama_says_and_nothing_else():
    call = EmbedCall("m", ("abcd" * 3,))
    assert OLLAMA.render_embeddings(call, [[1]], Usage(2), 5) == {
        "model": "m", "embeddings": [[1]], "total_duration": 5, "load_duration": 1, "prompt_eval_count": 2}
    assert OLLAMA.render_embeddings(call, [[1]], Usage(), 5)["prompt_eval_count"] == 3
    assert OLLAMA.render_embeddings(EmbedCall("m", ("\u597d" * 4,)), [[1]], Usage(), 5)["prompt_eval_count"] == 3
    assert OLLAMA.render_embeddings(call._replace(legacy=True), [[1]], Usage(2), 5) == {"embedding": [1]}
    packed = OPENAI.render_embeddings(call._replace(base64=True), [[1.0, 0.5]], Usage(2), 5)["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (1.0, 0.5)


# ----------------------------------------------------------------------------
# Room 8: configuration
# ----------------------------------------------------------------------------


def config(*argv, **environ):
    return Config.from_args(list(argv), environ)


A_URL = "http://HOST[:PORT][/PATH] is expected, and keys belong into --api-key"
ITSELF = "is the address this proxy listens on: give another --target, or another --listen"


@cases("argv, environ, text", [
    (["--target", "ftp://x"], {}, "bad target URL 'ftp://x': it must begin with http:// or https://"),
    (["--target", "http://a b"], {}, f"bad target URL 'http://a b': {A_URL}"),
    (["--target", "http://h:99999"], {}, "bad target URL 'http://h:99999': Port out of range 0-65535"),
    (["--target", "http://k:s@h"], {}, f"bad target URL 'http://***@h': {A_URL}"),
    (["--target", "openrouter"], {}, "openrouter.ai needs a key: set OPENROUTER_API_KEY or give --api-key"),
    (["--target", "azure"], {},
     "preset azure needs a URL of your own: --target https://NAME.openai.azure.com/openai/v1"),
    (["--listen", "x:port"], {}, "--listen x:port: the port must be a number up to 65535"),
    (["--timeout", "-1"], {}, "--timeout -1: must be between 0.1 and 1000000"),
    (["--listen", "[::1"], {}, "--listen [::1: [HOST]:PORT is expected"),
    (["--listen", "::1:19320"], {}, "--listen ::1:19320: [HOST]:PORT is expected"),
    (["--client-key", ""], {}, "--client-key: the key is empty"),
    (["--target", "18080"], {}, "bad target '18080': write http://HOST:PORT"),
    (["--set", "nonsense"], {}, "--set nonsense: PATTERN:KEY=VALUE,... is expected"),
    (["--alias", "x"], {}, "--alias x: NAME=ID is expected"),
    (["--header", "no colon"], {}, "--header ***: 'Name: value' is expected"),
    (["--reasoning", "x"], {}, "--reasoning x: must be separate, merge or drop"),
    ([], {"OLLAMA_PROXY_TIMEOUT": "x"}, "OLLAMA_PROXY_TIMEOUT x: must be a number"),
    ([], {"OLLAMA_PROXY_DEBUG": "perhaps"}, "OLLAMA_PROXY_DEBUG perhaps: must be true or false"),
    (["--target", "http://localhost:11434"], {}, None),
    (["--target", "http://localhost:11434", "--port", "11434"], {}, f"the target http://localhost:11434/v1 {ITSELF}"),
    (["--target", "http://127.0.0.1:8080", "--listen", "0.0.0.0:8080"], {},
     f"the target http://127.0.0.1:8080/v1 {ITSELF}"),
    (["--models-filter", "missing.txt"], {}, None),
    (["--env-file", "missing"], {}, "--env-file missing: no such file or directory"),
    (["--api-key", "a b"], {}, "--api-key: a key is printable ASCII without spaces"),
    (["--target", "openrouter"], {"OPENROUTER_API_KEY": "a b"},
     "OPENROUTER_API_KEY: a key is printable ASCII without spaces"),
    (["--workers", "0"], {}, "--workers 0: must be between 1 and 256"),
    (["--set", "m:num_ctx=abc"], {}, '--set m:num_ctx=abc: option "num_ctx" must be of type integer'),
    (["--set", "m:use_mmap=5"], {}, '--set m:use_mmap=5: option "use_mmap" must be of type boolean'),
    (["--set", "m:temperature=warm"], {}, '--set m:temperature=warm: option "temperature" must be of type float32'),
    (["--set", "m:keep_alive=xx"], {}, '--set m:keep_alive=xx: invalid keep_alive "xx": seconds, or a duration such as "5m"'),
    (["--set", "m:capabilities=tool"], {}, "--set m:capabilities=tool: capabilities are completion, tools, vision, thinking, "
                                           "insert, embedding, and not tool"),
    (["--set", "m:reasoning=gone"], {}, "--set m:reasoning=gone: must be separate, merge or drop"),
    (["--set", "m:think=maybe"], {}, '--set m:think=maybe: invalid think value: "maybe" (must be "high", "medium", '
                                     '"low", "max", true, or false)')])
def test_a_setting_that_cannot_be_used_is_one_clear_line(argv, environ, text):
    if text is None:
        config(*argv, **environ)
        return
    with pytest.raises(UsageError) as caught:
        config(*argv, **environ)
    assert str(caught.value) == text


@cases("flag, name", [("--env-file", ".env"), ("--models-filter", "models-filter.txt")])
def test_a_file_that_is_there_and_closed_is_not_passed_over(start, monkeypatch, flag, name):
    def closed(path, **_):
        if path == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    Path(name).write_text("x=y")
    monkeypatch.setattr(proxy_module, "open", closed, raising=False)
    with pytest.raises(UsageError) as caught:
        start()
    assert str(caught.value) == f"{flag} {name}: permission denied"


@cases("files, environ, notes", [
    ({"models-filter.txt": "# nothing yet\n"}, {}, ("models-filter.txt: not a line in it, so no model is hidden",)),
    ({"models-filter.txt": "m\n"}, {}, ()),
    ({}, {"OLLAMA_PROXY_CLIENT_KEY": " "}, ("OLLAMA_PROXY_CLIENT_KEY is empty, so no key is asked for",)),
    ({".env": "OLLAMA_PROXY_CLIENT_KEY=\n"}, {}, ("OLLAMA_PROXY_CLIENT_KEY is empty, so no key is asked for",)),
    ({"venv": ""}, {}, ())])
def test_what_leaves_a_door_open_is_told(files, environ, notes):
    for name, text in files.items():
        Path(name).write_text(text)
    if "venv" in files:
        os.makedirs(".env")             # as a virtual environment may be called
    assert config(**environ).notes == notes


@cases("flag, name", [("--env-file", "odd.env"), ("--env-file", ".env"), ("--models-filter", "models-filter.txt")])
def test_a_file_that_cannot_be_read_is_named_with_its_flag(start, flag, name):
    Path(name).write_bytes(b"\xff")
    with pytest.raises(UsageError) as caught:
        start(*([flag, name] if name == "odd.env" else []))
    assert str(caught.value) == f"{flag} {name}: not a UTF-8 text"
    Path(name).unlink()
    with pytest.raises(UsageError) as caught:
        start(flag, name)
    assert str(caught.value) == f"{flag} {name}: no such file or directory"


def test_flag_beats_environment_beats_env_file_beats_default(tmp_path):
    assert config().timeout == 600
    Path(".env").write_text("OLLAMA_PROXY_TIMEOUT=7\nexport OPENROUTER_API_KEY='sk-or-file'  \n# comment\nX=1 # note\n")
    assert config().timeout == 7
    assert config(OLLAMA_PROXY_TIMEOUT="8").timeout == 8
    assert config("--timeout", "9", OLLAMA_PROXY_TIMEOUT="8").timeout == 9
    assert config("--target", "openrouter").destination.key == "sk-or-file"
    assert config("--target", "openrouter", OPENROUTER_API_KEY="sk-env").destination.key == "sk-env"
    assert config("--target", "openrouter", "--api-key", "sk-flag", OPENROUTER_API_KEY="sk-env").destination.key == "sk-flag"


@cases("value, url, root", [
    ("http://localhost:1234", "http://localhost:1234/v1", ""), ("localhost:8080", "http://localhost:8080/v1", ""),
    ("http://h/v1/", "http://h/v1", ""), ("https://h/openai/v1", "https://h/openai/v1", "/openai"), ("http://h/custom", "http://h/custom", "/custom"),
    ("http://[::1]:8080", "http://[::1]:8080/v1", ""), ("openai", "https://api.openai.com/v1", ""),
    ("http://h:1/v1/chat/completions", "http://h:1/v1", "")])
def test_targets_are_read_as_people_write_them(value, url, root):
    target = config("--target", value, "--api-key", "k").destination
    assert target.url == url and target.root == root


def test_a_presets_key_goes_to_its_own_host_only():
    environ = {"OPENAI_API_KEY": "sk-openai", "OPENROUTER_API_KEY": "sk-or", "LITELLM_API_KEY": "sk-lite"}
    assert config("--target", "https://api.openai.com/v1", **environ).destination.key == "sk-openai"
    assert config("--target", "http://localhost:1234", **environ).destination.key == ""
    assert config("--target", "https://evil.example/v1", **environ).destination.key == ""
    assert config("--target", "litellm", **environ).destination.key == "sk-lite"
    assert config(OLLAMA_PROXY_API_KEY="sk-own").destination.key == "sk-own"


@cases("text, wanted", [(":11434", ("", 11434)), ("0.0.0.0:80", ("0.0.0.0", 80)), ("[::1]:5", ("::1", 5)), ("::1", ("::1", 11434)),
                        ("5000", ("127.0.0.1", 5000)), ("host", ("host", 11434)), ("http://1.2.3.4:5/", ("1.2.3.4", 5))])
def test_listen_addresses(text, wanted):
    assert config("--listen", text).address == wanted


def test_host_and_port_are_halves_of_listen():
    assert config("--host", "0.0.0.0", "--port", "9").address == ("0.0.0.0", 9)
    assert config("--target", "ollama").address == ("127.0.0.1", 4000)
    assert config(OLLAMA_BASE_URL="http://localhost:11434").address == ("127.0.0.1", 4000)
    assert config(OLLAMA_BASE_URL="http://gpu:11434").target_api == "ollama"
    for flag in ("--target", "--lmstudio-url", "--base-url"):
        assert config(flag, "http://h:1").destination.url == "http://h:1/v1"


def test_a_header_in_the_environment_may_hold_semicolons(start, target):
    start(environ={"OLLAMA_PROXY_HEADER": "Cookie: a=1; b=2"}).call("GET", "/v1/x")
    assert target.received[-1].headers["cookie"] == "a=1; b=2"


def test_set_patterns_may_hold_colons():
    assert list(config("--set", "qwen3:8b*:num_ctx=32768, keep_alive=30m,think=false,stop=[\"a\",\"b\"]").set) == [
        ("qwen3:8b*", {"num_ctx": 32768, "keep_alive": "30m", "think": False, "stop": ["a", "b"]})]


def test_no_secret_in_any_repr():
    value = config("--api-key", "sk-very-secret", "--client-key", "ck-secret", "--header", "X-Key: hs-secret")
    assert "secret" not in repr(value) + repr(value.destination) + repr(value._asdict()["destination"])


def test_help_names_every_setting_and_its_variable(capsys):
    with pytest.raises(SystemExit):
        Config.from_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for row in proxy_module.SETTINGS:
        for flag in row.flags.split():
            assert flag in text
        assert row.variables[0] in text.replace("- ", "-") or row.variables[0] in text


def test_the_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        config().timeout = 5


# ----------------------------------------------------------------------------
# A scripted target, and the real proxy in front of it
# ----------------------------------------------------------------------------


def http_answer(body=b"", status=200, content_type="application/json", *headers):
    """A whole HTTP answer as bytes."""
    body = json.dumps(body).encode() if not isinstance(body, (bytes, str)) else body.encode() if isinstance(body, str) else body
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"] + ([f"Content-Type: {content_type}"] if content_type else [])
    return "\r\n".join(head + list(headers)).encode() + b"\r\n\r\n" + body


def http_stream(data, content_type="text/event-stream"):
    """A whole chunked answer as bytes."""
    return stream_head(content_type) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)


def stream_head(content_type="text/event-stream"):
    return f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


HELLO = sse(delta("Hel"), delta("lo"), STOP, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})
WHOLE = {"object": "chat.completion", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
LIST = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1700000000, "owned_by": "me"},
                                   {"id": "vendor/big:free", "object": "model"}, {"id": "qwen3:8b", "object": "model"},
                                   {"id": "text-embed", "object": "model"}]}


class Conversation:
    """One connection to the scripted target, in the hands of a script."""

    def __init__(self, target, sock, request):
        self.target, self.sock, self.request = target, sock, request
        self.released = False

    def send(self, data):
        self.sock.sendall(data)

    def wait_closed(self):
        """Blocks until the proxy ends the connection, and says so."""
        self.sock.settimeout(PATIENCE)
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        except OSError:
            return
        self.target.peer_closed.set()


class ScriptedTarget:
    """A raw-socket server: an answer for each path, as bytes or as a script that holds the connection.

    `received` are the requests, `peer_closed` is set by scripts that saw the proxy hang up.
    """

    def __init__(self, tls=None, port=0):
        self.answers = {"/v1/models": http_answer(LIST)}
        self.received, self.peer_closed, self.asked = [], threading.Event(), threading.Condition()
        self.go = threading.Event()     # scripts that wait for the test wait for this
        self.connections = 0
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
            file = sock.makefile("rb")
            while self._one(sock, file):
                pass
        except (OSError, ValueError):
            pass
        finally:
            sock.close()

    def _one(self, sock, file):
        line = file.readline().decode("latin-1")
        if not line:
            return False
        headers = {}
        while True:
            header = file.readline().decode("latin-1").strip()
            if not header:
                break
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") == "chunked":
            data = b""
            while True:
                size = int(file.readline(), 16)
                data += file.read(size)
                file.readline()
                if not size:
                    break
        else:
            data = file.read(int(headers.get("content-length", 0)))
        method, path, _ = line.split(" ")
        path = re.sub("^http://[^/]+", "", path)        # as a forward proxy's clients ask
        request = SimpleNamespace(method=method, path=path, headers=headers, data=data, json=None)
        try:
            request.json = json.loads(data) if data else None
        except ValueError:
            pass
        with self.asked:
            self.received.append(request)
            self.asked.notify_all()
        answer = self.answers.get(path.partition("?")[0], http_answer({"error": {"message": "not here"}}, 404))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            talk = Conversation(self, sock, request)
            answer(talk)
            return talk.released
        sock.sendall(answer)
        return b"Connection: close" not in answer[:400]

    def calls(self, path):
        """The requests for `path` so far."""
        return [request for request in self.received if request.path.partition("?")[0] == path]

    def wait_for(self, path, count=1):
        """Waits until `path` was asked `count` times; returns the last request."""
        with self.asked:
            assert self.asked.wait_for(lambda: len(self.calls(path)) >= count, PATIENCE), f"{path} was never asked"
            return self.calls(path)[-1]

    def close(self):
        self.go.set()
        shut(self._listener)            # wakes accept(), which would serve one more
        self._listener.close()


class Record(io.TextIOBase):
    """A stream that keeps the lines written to it."""

    told = threading.Condition()        # one for all

    def __init__(self):
        self.lines, self._begun = [], ""

    def write(self, text):
        with self.told:
            *whole, self._begun = (self._begun + text).split("\n")
            self.lines += whole
            self.told.notify_all()
        return len(text)


class Streams:
    """What the program takes for `sys`: its stdout and stderr are kept."""

    def __init__(self):
        self.stdout, self.stderr = Record(), Record()

    def __getattr__(self, name):
        return getattr(sys, name)


@fixture
def hurry(monkeypatch):
    """The program is as impatient with lists as tests are: they hold without it, and take longer."""
    for name in ("LIST_TIMEOUT", "PROBE_TIMEOUT"):
        monkeypatch.setattr(proxy_module, name, 0.2, raising=False)


class RunningProxy:
    """The real server on a port of its own; `logged` and `errors` are the lines on stdout and stderr."""

    def __init__(self, *argv, environ=None):
        self.config = Config.from_args(["--listen", "127.0.0.1:0", *argv], environ or {})
        self.logged, self.errors = proxy_module.sys.stdout.lines, proxy_module.sys.stderr.lines
        self.context = Context(self.config)
        self.server = ProxyServer(self.context, self.config.address)
        self.port = self.server.server_port
        self.url = f"http{'s' if self.config.tls_cert else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.005,), daemon=True).start()

    def wait_logged(self, text, count=1):
        """Waits for `count` lines with `text` in them, and returns the first."""
        def found():
            return [line for line in self.logged + self.errors if text in line]

        with Record.told:
            assert Record.told.wait_for(lambda: len(found()) >= count, PATIENCE), (text, self.logged, self.errors)
            return found()[0]

    def call(self, method, path, body=None, headers=None):
        """One request with http.client -> status, headers, body."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            return SimpleNamespace(status=answer.status, reason=answer.reason, headers=answer.headers, data=answer.read())
        finally:
            connection.close()

    def get(self, path, headers=None):
        """What a GET of JSON answers."""
        return json.loads(self.call("GET", path, None, headers).data)

    def post(self, path, body, headers=None):
        return self.call("POST", path, body, headers)

    def lines(self, path, body):
        """A streamed answer as objects."""
        answer = self.post(path, body)
        assert answer.status == 200, answer.data
        assert answer.headers["Content-Type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.data.splitlines()]

    def dial(self):
        """A raw connection."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def raw(self, data):
        """Bytes in, all bytes out until the proxy closes."""
        with self.dial() as sock:
            sock.sendall(data)
            return read_all(sock)

    def drains(self):
        """Whether the server, told to end, has nobody to wait for."""
        thread = threading.Thread(target=self.server.drain, args=(2 * PATIENCE,), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        return not thread.is_alive()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.context.upstream.close()


def read_all(sock):
    data = b""
    try:
        while True:
            piece = sock.recv(65536)
            if not piece:
                return data
            data += piece
    except ConnectionError:
        return data


def read_until(sock, text):
    data, seen = bytearray(), 0
    while data.find(text, max(0, seen - len(text))) < 0:
        seen = len(data)
        piece = sock.recv(1 << 20)
        assert piece, f"closed before {text!r}: {bytes(data[-2000:])!r}"
        data += piece
    return bytes(data)


def http_request(method, path, body=b"", *headers, version="1.1"):
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    head = [f"{method} {path} HTTP/{version}", "Host: localhost"] + list(headers) + ([f"Content-Length: {len(body)}"] if body else [])
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@fixture
def target():
    scripted = ScriptedTarget()
    yield scripted
    scripted.close()


@fixture
def start(target, monkeypatch):
    """Starts proxies in front of the scripted target; they end with the test."""
    running = []
    monkeypatch.setattr(proxy_module, "sys", Streams())

    def run(*argv, **options):
        argv = argv if "--target" in argv else ("--target", target.url, *argv)
        running.append(RunningProxy(*argv, **options))
        return running[-1]

    yield run
    for one in running:
        one.close()


@fixture
def proxy(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    return start("--target-api", "openai")


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


def a_tool(name="look_up", **parameters):
    return {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"q": {"type": "string"}}, **parameters}}}


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
GENERATE = {"model": "m", "prompt": "hi"}
HI, SYSTEM, PICTURE = turn("user", "hi"), turn("system", "Be brief."), "iVBORw0KGgo="


# ----------------------------------------------------------------------------
# Rooms 11-15, end to end: the Ollama face over an OpenAI target
# ----------------------------------------------------------------------------


def test_root_version_and_the_small_ones(proxy):
    for method in ("GET", "HEAD"):
        answer = proxy.call(method, "/")
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
        assert answer.data == (b"Ollama is running" if method == "GET" else b"") and answer.headers["Content-Length"] == "17"
    version = proxy.get("/api/version")
    assert set(version) == {"version"} and tuple(map(int, version["version"].split("."))) >= (0, 17, 6)
    assert proxy.get("/health")["status"] == "ok"
    assert "disabled" in proxy.get("/api/status")["cloud"]
    assert proxy.get("/api/experimental/model-recommendations") == {"recommendations": []}
    assert "id" not in json.loads(proxy.post("/api/me", {}).data)
    assert proxy.call("HEAD", "/api/tags").data == b"" and proxy.call("HEAD", "/api/version").status == 200


def test_tags_hold_what_strict_clients_need(proxy):
    answer = proxy.call("GET", "/api/tags")
    assert answer.headers["Content-Type"].startswith("application/json")
    models = json.loads(answer.data)["models"]
    assert [model["name"] for model in models] == ["m:latest", "vendor/big:free", "qwen3:8b", "text-embed:latest"]
    assert len({model["digest"] for model in models}) == 4
    for model in models:
        assert model["name"] == model["model"] and re.fullmatch("[0-9a-f]{64}", model["digest"])
        assert isinstance(model["size"], int) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", model["modified_at"])
        for key in ("parent_model", "format", "family", "parameter_size", "quantization_level"):
            assert isinstance(model["details"][key], str)
        assert model["details"]["families"] and "error" not in model and "type" not in model
    import hashlib
    assert models[0]["digest"] == hashlib.sha256(b"m").hexdigest() and models[0]["capabilities"] == ["completion", "tools"]
    assert models[3]["capabilities"] == ["embedding"]


@cases("name", ["m", "m:latest", "M", "m:proxy", "m:2", "vendor/big:free", "vendor/big:free:latest", "big:free", "qwen3:8b", "QWEN3:8B"])
def test_a_model_is_found_under_every_name_it_was_shown(proxy, target, name):
    assert proxy.lines("/api/chat", {**CHAT, "model": name})[0]["model"] == name
    wanted = {"m": "m", "v": "vendor/big:free", "b": "vendor/big:free", "q": "qwen3:8b"}[name[0].lower()]
    assert target.calls("/v1/chat/completions")[-1].json["model"] == wanted
    assert proxy.post("/v1/chat/completions", {**CHAT, "model": name, "stream": True}).status == 200
    assert target.calls("/v1/chat/completions")[-1].json["model"] == wanted
    for key in ("model", "name"):
        shown = json.loads(proxy.post("/api/show", {key: name}).data)
        assert shown["capabilities"] and shown["details"]


@cases("path, body, text", [
    ("/api/chat", CHAT, "model 'nope' not found"), ("/api/generate", GENERATE, "model 'nope' not found"),
    ("/api/show", {}, "model 'nope:latest' not found"), ("/api/embed", {"input": "x"}, 'model "nope" not found, try pulling it first'),
    ("/api/embeddings", {"prompt": "x"}, 'model "nope" not found, try pulling it first'), ("/api/chat", {"messages": []}, "model 'nope' not found"),
    ("/api/generate", {"prompt": "", "keep_alive": 0}, "model 'nope' not found")])
def test_an_unknown_model_is_404_in_ollamas_words(proxy, target, path, body, text):
    answer = proxy.post(path, {**body, "model": "nope"})
    assert answer.status == 404 and json.loads(answer.data) == {"error": text} and answer.reason == text
    assert not target.calls("/v1/chat/completions")


@cases("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"])
def test_a_hidden_model_is_404_in_openais_shape_on_v1(start, path):
    Path("models-filter.txt").write_text("m\n")
    proxy = start("--target-api", "openai")
    answer = proxy.post(path, {"model": "nope", "input": "x", "prompt": "x", "messages": []})
    error = json.loads(answer.data)["error"]
    assert answer.status == 404 and set(error) == {"message", "type", "param", "code"} and "nope" in error["message"]


def test_show_has_the_shape_that_editors_need(proxy):
    shown = json.loads(proxy.post("/api/show", {"model": "m"}, {"Content-Type": "text/plain"}).data)
    info = shown["model_info"]
    family = info["general.architecture"]
    assert [key for key in info if key.endswith(".context_length")] == [f"{family}.context_length"]
    assert info[f"{family}.context_length"] == 131072 and info["general.basename"] == "m"
    assert f"{family}.embedding_length" in info and isinstance(info["general.parameter_count"], int)
    assert all(isinstance(shown[key], str) for key in ("license", "modelfile", "parameters", "template"))
    assert "tools" in shown["template"] and "num_ctx" not in shown["parameters"] and shown["capabilities"] == ["completion", "tools"]


def test_running_models_are_the_whole_list_where_the_target_reports_no_state(proxy):
    models = proxy.get("/api/ps")["models"]
    assert len(models) == 4
    for model in models:
        assert {"name", "model", "size", "digest", "details", "expires_at", "size_vram"} <= set(model) and len(model["details"]) == 6
        assert "context_length" not in model


def test_chat_streams_line_by_line(proxy, target):
    values = proxy.lines("/api/chat", CHAT)
    assert [value["message"]["content"] for value in values] == ["Hel", "lo", ""]
    assert values[-1]["prompt_eval_count"] == 3 and values[-1]["eval_count"] == 2 and values[-1]["done_reason"] == "stop"
    sent = target.calls("/v1/chat/completions")[0]
    assert sent.json == {"model": "m", "messages": CHAT["messages"], "stream": True, "stream_options": {"include_usage": True}}
    assert "authorization" not in sent.headers and sent.headers["host"] == f"127.0.0.1:{target.port}"


def test_each_line_is_a_chunk_of_its_own(proxy):
    with proxy.dial() as sock:
        sock.sendall(http_request("POST", "/api/chat", CHAT))
        body = read_until(sock, b"0\r\n\r\n").partition(b"\r\n\r\n")[2]
    sizes = re.findall(rb"([0-9a-f]+)\r\n(\{.*\}\n)\r\n", body)
    assert len(sizes) == 3 and all(int(size, 16) == len(line) for size, line in sizes)


@cases("stream", [True, False])
@cases("as_stream", [True, False])
def test_stream_and_whole_whatever_the_target_sends(start, target, stream, as_stream):
    """A body where a stream was expected, and a stream where a body was expected."""
    target.answers["/v1/chat/completions"] = http_stream(HELLO) if as_stream else http_answer(WHOLE)
    proxy = start()
    answer = proxy.post("/api/chat", {**CHAT, "stream": stream})
    values = [json.loads(line) for line in answer.data.splitlines()]
    assert "".join(value["message"]["content"] for value in values) == "Hello"
    assert values[-1]["done"] is True and values[-1]["eval_count"] == 2 and (len(values) == 1) is not stream
    assert answer.headers["Content-Type"] == ("application/x-ndjson" if stream else "application/json")


def test_generate_both_ways_with_context(proxy, target):
    values = proxy.lines("/api/generate", {**GENERATE, "system": "s"})
    assert [value["response"] for value in values] == ["Hel", "lo", ""] and values[-1]["context"]
    assert all("context" not in value and "message" not in value for value in values[:-1])
    target.answers["/v1/chat/completions"] = http_answer(WHOLE)
    answer = json.loads(proxy.post("/api/generate", {**GENERATE, "stream": False, "context": values[-1]["context"]}).data)
    assert answer["response"] == "Hello" and answer["done"] is True
    assert [message["content"] for message in target.calls("/v1/chat/completions")[-1].json["messages"]] == ["s", "hi", "Hello", "hi"]


def test_raw_generate_goes_to_completions(proxy, target):
    target.answers["/v1/completions"] = http_stream(sse({"choices": [{"text": "A", "index": 0}]}, {"choices": [{"text": "", "finish_reason": "length"}]}))
    values = proxy.lines("/api/generate", {**GENERATE, "raw": True})
    assert [value["response"] for value in values] == ["A", ""] and values[-1]["done_reason"] == "length" and "context" not in values[-1]
    assert target.calls("/v1/completions")[0].json["prompt"] == "hi"
    proxy.lines("/api/generate", {**GENERATE, "suffix": "end"})
    assert target.calls("/v1/completions")[1].json["suffix"] == "end"


def test_generate_falls_back_to_completions_when_there_is_no_chat(start, target):
    target.answers["/v1/completions"] = http_stream(sse({"choices": [{"text": "A", "finish_reason": "stop"}]}))
    proxy = start()
    assert proxy.lines("/api/generate", {**GENERATE, "system": "s"})[0]["response"] == "A"
    assert target.calls("/v1/completions")[0].json["prompt"] == "s\n\nhi"
    second = start("--generate-via", "completions")
    second.lines("/api/generate", GENERATE)
    assert len(target.calls("/v1/chat/completions")) == 1


@cases("path, body, reason", [
    ("/api/chat", {"messages": []}, "load"), ("/api/chat", {"messages": None}, "load"), ("/api/chat", {"keep_alive": 0}, "unload"),
    ("/api/chat", {"keep_alive": "0s"}, "unload"), ("/api/generate", {"prompt": ""}, "load"), ("/api/generate", {"keep_alive": "0s"}, "unload"),
    ("/api/generate", {"prompt": "", "keep_alive": -1, "options": None, "suffix": "", "template": "", "system": ""}, "load")])
def test_load_and_unload_are_one_object_and_never_reach_the_target(proxy, target, path, body, reason):
    answer = proxy.post(path, {"model": "m", **body})
    value = json.loads(answer.data)
    assert value["done"] is True and value["done_reason"] == reason and answer.headers["Content-Type"].startswith("application/json")
    assert value.get("response", value.get("message", {}).get("content")) == "" and not target.calls("/v1/chat/completions")


def test_embeddings_new_and_legacy(proxy, target):
    target.answers["/v1/embeddings"] = http_answer({"data": [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}], "usage": {"prompt_tokens": 7}})
    answer = json.loads(proxy.post("/api/embed", {"model": "text-embed", "input": ["a", "b"], "truncate": True, "keep_alive": "5m",
                                                  "options": {"temperature": None}}).data)
    assert answer["embeddings"] == [[1, 2], [3, 4]] and answer["prompt_eval_count"] == 7
    assert set(answer) == {"model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"}
    assert target.calls("/v1/embeddings")[0].json == {"model": "text-embed", "input": ["a", "b"]}
    target.answers["/v1/embeddings"] = http_answer({"data": [{"embedding": [1, 2]}]})
    assert json.loads(proxy.post("/api/embeddings", {"model": "text-embed", "prompt": "a"}).data) == {"embedding": [1, 2]}
    assert json.loads(proxy.post("/api/embed", {"model": "text-embed", "input": "a", "dimensions": 2}).data)["embeddings"] == [[1, 2]]
    assert target.calls("/v1/embeddings")[-1].json["dimensions"] == 2
    for empty in ({"input": ""}, {"input": []}, {}, {"input": None}):
        assert json.loads(proxy.post("/api/embed", {"model": "text-embed", **empty}).data) == {"model": "text-embed", "embeddings": []}
    assert json.loads(proxy.post("/api/embeddings", {"model": "text-embed", "prompt": ""}).data) == {"embedding": []}
    for wrong in (5, [1], ["a", 1], {}):
        assert json.loads(proxy.post("/api/embed", {"model": "text-embed", "input": wrong}).data) == {"error": "invalid input type"}
    target.answers["/v1/embeddings"] = http_answer({"data": []})
    answer = proxy.post("/api/embed", {"model": "text-embed", "input": "a"})
    assert answer.status == 502 and json.loads(answer.data)["error"] == "upstream returned 0 embeddings for 1 inputs"


def test_long_vectors_pass_as_they_are_written(proxy, target):
    vectors = [[round(chance.uniform(-1, 1), 9) for _ in range(100)] for chance in (random.Random(1), random.Random(2))]
    text = json.dumps({"data": [{"index": 1, "embedding": vectors[1]}, {"index": 0, "embedding": vectors[0]}], "usage": {"prompt_tokens": 7}}, indent=1)
    target.answers["/v1/embeddings"] = http_answer(text)
    answer = json.loads(proxy.post("/api/embed", {"model": "text-embed", "input": ["a", "b"]}).data)
    assert answer["embeddings"] == vectors and answer["prompt_eval_count"] == 7
    target.answers["/v1/embeddings"] = http_answer({"data": [{"embedding": [vectors[0], vectors[0]]}]})
    assert json.loads(proxy.post("/api/embeddings", {"model": "text-embed", "prompt": "a"}).data) == {"embedding": vectors[0]}


LONG_VECTOR = ", ".join(["0.125"] * 40)


@cases("vector", [LONG_VECTOR.replace(",", ",,", 1), "0.3--4, " + LONG_VECTOR, LONG_VECTOR + ", 1e",
                  "01, " + LONG_VECTOR, "1e999", "NaN", '"x"', "null", "true"])
def test_what_is_no_number_is_no_embedding(proxy, target, vector):
    answers = [f'{{"embedding": [{LONG_VECTOR}]}}', f'{{"embedding": [{vector}]}}']
    target.answers["/v1/embeddings"] = http_answer(f'{{"data": [{", ".join(answers)}]}}')
    answer = proxy.post("/api/embed", {"model": "text-embed", "input": ["a", "b"]})
    assert answer.status == 502 and json.loads(answer.data)["error"]


def test_an_object_beside_a_long_vector_is_no_embedding(proxy, target):
    target.answers["/v1/embeddings"] = http_answer(
        f'{{"data": [{{"embedding": {{"numbers": 7}}}}, {{"embedding": [{LONG_VECTOR}]}}]}}')
    answer = proxy.post("/api/embed", {"model": "text-embed", "input": ["a", "b"]})
    assert answer.status == 502 and json.loads(answer.data)["error"]


def test_pull_of_a_served_model_succeeds_and_of_another_does_not(proxy):
    values = proxy.lines("/api/pull", {"name": "m"})
    assert values[0] == {"status": "pulling manifest"} and values[-1] == {"status": "success"}
    assert json.loads(proxy.post("/api/pull", {"model": "m:latest", "stream": False}).data) == {"status": "success"}
    answer = proxy.post("/api/pull", {"model": "nope"})
    assert answer.status == 501 and json.loads(answer.data)["error"].startswith(
        "pulling models that the target does not serve is not supported by this proxy: ")


def test_a_model_of_a_bare_list_is_there_to_be_pulled(start, target):
    target.answers["/v1/models"] = http_answer(["m"])
    assert start("--target-api", "openai").lines("/api/pull", {"name": "m"})[-1] == {"status": "success"}


@cases("method, path", [("POST", "/api/create"), ("POST", "/api/copy"), ("DELETE", "/api/delete"), ("POST", "/api/push"),
                        ("POST", "/api/blobs/sha256:abc"), ("HEAD", "/api/blobs/sha256:abc"), ("POST", "/api/signout")])
def test_what_only_an_ollama_can_do_is_an_honest_501(proxy, method, path):
    answer = proxy.call(method, path, {"model": "m"} if method != "HEAD" else None)
    what = {"create": "creating models", "copy": "copying models", "delete": "deleting models", "push": "pushing models",
            "blobs": "storing model files", "signout": "signing out"}[path.split("/")[2]]
    text = f"{what} is not supported by this proxy: the models live on {proxy.context.target.url} (--fallback URL sends " \
           "such requests to a real Ollama)"
    assert answer.status == 501 and (method == "HEAD" or json.loads(answer.data) == {"error": text})


def test_fallback_gets_what_is_not_served_here_but_never_our_key(start, target):
    other = ScriptedTarget()
    other.answers.update({"/api/create": http_answer({"status": "success"}), "/api/blobs/sha256:x": http_answer(b"", 201, ""),
                          "/api/new": http_answer({"new": 1}), "/api/pull": http_stream(b'{"status":"success"}\n', "application/x-ndjson")})
    proxy = start("--fallback", other.url, "--api-key", "sk-target-key")
    assert json.loads(proxy.post("/api/create", {"model": "x"}, {"Authorization": "Bearer client"}).data) == {"status": "success"}
    assert proxy.get("/api/new?x=1") == {"new": 1}
    assert proxy.post("/api/pull", {"model": "nope"}).data == b'{"status":"success"}\n'
    with proxy.dial() as sock:          # the CLI uploads without a length
        sock.sendall(http_request("POST", "/api/blobs/sha256:x", b"", "Transfer-Encoding: chunked") + chunk(b"abc") + chunk(b"def") + b"0\r\n\r\n")
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 201")
    assert other.calls("/api/blobs/sha256:x")[0].data == b"abcdef"
    assert not any("sk-target" in str(request.headers) or "client" in str(request.headers) for request in other.received)
    other.close()


def test_wrong_method_is_405_with_allow_and_unknown_paths_are_404_in_json(proxy):
    answer = proxy.call("GET", "/api/chat")
    assert answer.status == 405 and "POST" in answer.headers["Allow"] and "error" in json.loads(answer.data)
    answer = proxy.post("/api/tags", {})
    assert answer.status == 405 and answer.headers["Allow"].startswith("HEAD, GET")
    assert proxy.call("DELETE", "/api/version").status == 405
    assert isinstance(proxy.get("/api/nothing")["error"], str)
    assert proxy.call("GET", "/nothing").status == 404
    error = json.loads(proxy.call("PUT", "/v1/models").data)["error"]
    assert error["type"] == "invalid_request_error"


@cases("path", ["//api/tags", "/api//tags", "/api/tags/", "/api/tags?x=1", "/v1/api/tags", "/api/generate/api/tags"])
def test_paths_are_read_as_they_were_meant(proxy, path):
    assert "models" in proxy.get(path)


def test_root_aliases_of_v1(proxy, target):
    target.answers["/v1/responses"] = http_answer({"ok": 1})
    assert b"Hel" in proxy.post("/chat/completions", {**CHAT, "stream": True}).data
    assert proxy.post("/v1/v1/chat/completions", {**CHAT, "stream": True}).status == 200
    assert proxy.post("/api/v1/chat/completions", {**CHAT, "stream": True}).status == 200
    assert json.loads(proxy.post("/responses", {"model": "m"}).data) == {"ok": 1}


@cases("content_type", [None, "text/plain", "text/event-stream", "application/x-www-form-urlencoded"])
def test_content_type_and_accept_of_requests_do_not_matter(proxy, content_type):
    headers = {"Accept": "text/event-stream", **({"Content-Type": content_type} if content_type else {})}
    answer = proxy.post("/api/chat", json.dumps(CHAT).encode(), headers)
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/x-ndjson"


@cases("value", ["Bearer ", "Bearer undefined", "Bearer None", "Bearer ollama", "Basic dXNlcjpwYXNz", "junk"])
def test_any_credential_is_accepted_and_none_is_passed_on(proxy, target, value):
    assert proxy.post("/api/chat", CHAT, {"Authorization": value, "X-Api-Key": "abc", "Cookie": "a=b"}).status == 200
    assert proxy.post("/v1/chat/completions", {**CHAT, "stream": True}, {"Authorization": value, "Cookie": "a=b"}).status == 200
    for request in target.calls("/v1/chat/completions"):
        assert not {"authorization", "x-api-key", "cookie"} & set(request.headers)


def test_forward_auth_passes_real_keys_only(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--forward-auth", "--api-key", "sk-own-key")
    for value, wanted in (("Bearer sk-client-key-1", "Bearer sk-client-key-1"), ("Bearer ollama", "Bearer sk-own-key"), ("Bearer ", "Bearer sk-own-key")):
        proxy.post("/api/chat", CHAT, {"Authorization": value})
        assert target.calls("/v1/chat/completions")[-1].headers["authorization"] == wanted
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": "bad key"}}, 401)
    assert proxy.post("/api/chat", CHAT, {"Authorization": "Bearer sk-client-key-1"}).status == 401


def test_a_key_is_passed_on_however_it_is_sent_and_only_through_the_door(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--forward-auth", "--target-api", "openai", "--client-key", "door")
    for headers in ({"x-api-key": "sk-1234", "Authorization": "Bearer door"}, {"x-api-key": "door", "Authorization": "Bearer sk-1234"}):
        proxy.post("/api/chat", CHAT, headers)
        assert target.calls("/v1/chat/completions")[-1].headers["authorization"] == "Bearer sk-1234"
    proxy = start("--forward-auth", "--target-api", "openai", "--client-key", "door")
    assert proxy.call("GET", "/api/tags", None, {"Authorization": "Bearer sk-stranger-1"}).status == 401
    assert proxy.call("GET", "/api/tags", None, {"Authorization": "Bearer door"}).status == 200
    assert not any("sk-stranger-1" in str(request.headers) for request in target.received)


@cases("before", [(), ({},), ({"Authorization": "Bearer sk-wrong-key-9"},)],
       ids=["first of all", "after no key", "after a wrong one"])
def test_lists_are_asked_with_the_clients_own_key_where_keys_are_forwarded(start, target, before):
    def guarded(talk):
        talk.released = True
        known = talk.request.headers.get("authorization") == "Bearer sk-client-key-1"
        talk.send(http_answer(LIST) if known else http_answer({"error": {"message": "who are you?"}}, 401))

    target.answers["/v1/models"] = guarded
    proxy = start("--forward-auth", "--target-api", "openai")
    for headers in before:
        assert proxy.call("GET", "/api/tags", None, headers).status >= 400
    key = {"Authorization": "Bearer sk-client-key-1"}
    assert len(proxy.get("/api/tags", key)["models"]) == len(proxy.get("/api/ps", key)["models"]) == 4
    assert proxy.post("/api/show", {"model": "m"}, key).status == 200


def test_lists_are_asked_with_our_key_where_there_is_one(start, target):
    target.answers["/v1/models"] = lambda talk: talk.send(
        http_answer(LIST) if talk.request.headers.get("authorization") == "Bearer sk-own-key" else http_answer({"error": "no"}, 401))
    proxy = start("--forward-auth", "--target-api", "openai", "--api-key", "sk-own-key")
    assert proxy.config.notes == ("--forward-auth: clients that send no key use that of --api-key",)
    assert len(proxy.get("/api/tags", {"Authorization": "Bearer sk-junk-junk"})["models"]) == 4


def test_a_clients_key_that_the_target_repeats_is_shown_to_nobody(start, target):
    def parrot(talk):
        talk.send(http_answer({"error": {"message": f"Incorrect API key: {talk.request.headers['authorization'].split()[1]}"}}, 401))

    target.answers = {"/v1/models": parrot, "/v1/chat/completions": parrot}
    proxy = start("--forward-auth", "--target-api", "openai", "--debug")
    key = {"Authorization": "Bearer sk-alice-secret-1"}
    assert proxy.call("GET", "/api/tags", None, key).status == 502
    other = proxy.call("GET", "/api/tags")      # in whose answer the error of the list stands
    answers = [other, proxy.post("/api/chat", {**CHAT, "model": "x"}, key), proxy.post("/v1/chat/completions", CHAT, key)]
    assert all("Incorrect API key: ***" in answer.data.decode() for answer in answers)
    proxy.wait_logged("/v1/chat/completions HTTP/1.1")
    seen = "\n".join(proxy.logged + proxy.errors + [answer.data.decode() for answer in answers])
    assert "Incorrect API key: ***" in seen and "alice" not in seen


@cases("key", ["sk-alice-secret-1", "sk-abc", "two words of-a-key"])
@cases("status", [200, 401])
def test_a_clients_key_is_hidden_whatever_the_status(start, target, status, key):
    def parrot(talk):
        talk.send(http_answer({"error": {"message": f"bad key <{talk.request.headers.get('authorization')}>", "code": 401}}, status))

    target.answers = {"/v1/models": parrot, "/v1/chat/completions": parrot, "/v1/embeddings": parrot}
    proxy = start("--forward-auth", "--target-api", "openai", "--models-filter", os.devnull)
    key = {"Authorization": f"Bearer {key}"}
    answers = [proxy.call("GET", "/api/tags", None, key), proxy.call("GET", "/api/tags"), proxy.post("/api/chat", CHAT, key),
               proxy.post("/api/embed", {"model": "m", "input": "x"}, key)]
    assert all(json.loads(answer.data)["error"].endswith("bad key <Bearer ***>") for answer in answers[2:]), answers
    proxy.wait_logged("/api/embed")
    seen = "".join(proxy.logged + proxy.errors + [answer.data.decode() for answer in answers])
    assert "***" in seen and key["Authorization"] not in seen


def test_the_key_of_the_proxy_may_be_a_word(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": "bad key message"}}, 400)
    assert json.loads(start("--target-api", "openai", "--api-key", "message").post("/api/chat", CHAT).data) == {"error": "bad key ***"}


def test_a_key_at_the_end_of_a_long_error_is_hidden_too(start, target):
    limit = proxy_module.MAX_ERROR_BYTES
    target.answers["/v1/chat/completions"] = http_answer(b"x" * (limit - 5) + b"sk-alice-secret-1" + b"x" * 99, 401)
    answer = start("--forward-auth", "--target-api", "openai").post("/v1/chat/completions", CHAT, {"Authorization": "Bearer sk-alice-secret-1"})
    assert answer.data == b"x" * (limit - 5) + b"***xx"


def test_a_client_may_use_models_that_only_its_own_key_lists(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--forward-auth", "--target-api", "openai", "--api-key", "sk-own-key")
    mine = {**CHAT, "model": "mine"}
    assert proxy.post("/api/chat", mine, {"Authorization": "Bearer sk-client-key-1"}).status == 200
    assert target.calls("/v1/chat/completions")[-1].json["model"] == "mine"
    assert proxy.post("/api/chat", mine).status == 404


def test_a_header_that_is_no_secret_may_be_shown(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": "no message, Bearer hush-hush"}}, 400)
    proxy = start("--target-api", "openai", "--header", "X-Feature: message", "--header", "X-Token: hush-hush")
    assert json.loads(proxy.post("/v1/chat/completions", CHAT).data) == {"error": {"message": "no message, Bearer ***"}}


def test_trouble_with_our_key_is_no_401_for_ollama_clients(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": "bad key sk-our-own-key"}}, 401)
    proxy = start("--api-key", "sk-our-own-key")
    answer = proxy.post("/api/chat", CHAT)
    assert answer.status == 502 and "bad key" in answer.data.decode() and b"sk-our" not in answer.data and "sk-our" not in answer.reason
    answer = proxy.post("/v1/chat/completions", CHAT)
    assert answer.status == 401 and b"bad key ***" in answer.data


def test_a_refusal_keeps_its_status_its_text_and_retry_after(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": "slow\ndown"}}, 429, "application/json", "Retry-After: 7")
    proxy = start()
    answer = proxy.post("/api/chat", CHAT)
    assert answer.status == 429 and json.loads(answer.data) == {"error": "slow\ndown"} and answer.headers["Retry-After"] == "7"
    assert answer.reason == "slow down" and len(target.calls("/v1/chat/completions")) == 1
    target.answers["/v1/chat/completions"] = http_answer({"error": "x"}, 429, "application/json", "llm_provider-retry-after: 9")
    assert proxy.post("/api/chat", CHAT).headers["Retry-After"] == "9"


def test_error_text_in_the_reason_phrase_injects_nothing(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"error": "bad\r\nX-Evil: 1\r\n\r\n<b>\u00fc\U0001f999" + "x" * 60000}, 400)
    data = start().raw(http_request("POST", "/api/chat", CHAT, "Connection: close"))
    head, _, body = data.partition(b"\r\n\r\n")
    status_line = head.split(b"\r\n")[0]
    assert len(status_line) < 300 and status_line.isascii() and b"\r\nX-Evil" not in head
    assert json.loads(body)["error"].startswith("bad\r\nX-Evil")


@cases("frames, status, text", [
    (b'event: error\ndata: {"error":{"message":"no tools","status_code":400}}\n\n', 400, "no tools"),
    (b'data: {"error":{"message":"no credit","code":402}}\n\n', 402, "no credit"),
    (b'data: {"error":"just text"}\n\n', 502, "just text"), (b"", 502, "upstream sent an empty response"),
    (b'{"error":"Unexpected endpoint"}', 502, "Unexpected endpoint")])
def test_an_error_before_the_first_token_is_a_status(start, target, frames, status, text):
    target.answers["/v1/chat/completions"] = http_stream(frames) if frames else http_answer(b"", 200, "text/event-stream")
    proxy = start()
    for stream in (True, False):
        answer = proxy.post("/api/chat", {**CHAT, "stream": stream})
        assert answer.status == status and json.loads(answer.data) == {"error": text}


def test_an_error_after_the_first_token_is_the_last_line(start, target):
    target.answers["/v1/chat/completions"] = http_stream(sse(delta("so far"), {"error": {"message": "engine died"}}))
    proxy = start()
    values = proxy.lines("/api/chat", CHAT)
    assert values[0]["message"]["content"] == "so far" and values[1:] == [{"error": "engine died"}]
    proxy.wait_logged("engine died")
    answer = proxy.post("/api/chat", {**CHAT, "stream": False})
    assert answer.status == 502 and json.loads(answer.data) == {"error": "engine died"}


def strict(text):
    """JSON as strict clients read it: no NaN, no Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@cases("stream", [True, False])
def test_an_endless_number_in_a_call_is_not_the_clients_fault(start, target, stream):
    call = {"index": 0, "id": "a", **part("f", '{"x": 1e999}')}
    whole = {"choices": [{"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    streamed = http_stream(sse(call_delta(call), TOOLS_END))
    target.answers["/v1/chat/completions"] = streamed if stream else http_answer(whole)
    answer = start("--target-api", "openai").post("/api/chat", {**CHAT, "stream": stream})
    assert answer.status in (200, 502) and all(map(strict, answer.data.splitlines()))


def test_a_dead_target_is_502_that_says_who_and_why(start, target):
    target.close()
    proxy = start("--target", f"http://127.0.0.1:{target.port}")
    for path, body in (("/api/chat", CHAT), ("/api/generate", GENERATE), ("/v1/chat/completions", CHAT)):
        answer = proxy.post(path, body)
        assert answer.status == 502 and f"127.0.0.1:{target.port}" in answer.data.decode() and b"refused" in answer.data
    assert proxy.call("GET", "/api/tags").status == 502 and proxy.call("GET", "/api/version").status == 200


def test_lists_are_answered_from_memory_when_the_target_is_down(start, target, later):
    proxy = start()
    first = proxy.call("GET", "/api/tags").data
    target.answers["/v1/models"] = http_answer({"error": "restarting"}, 503)
    later(3600)
    assert proxy.call("GET", "/api/tags").data == first
    assert proxy.post("/api/show", {"model": "m"}).status == 200
    target.wait_for("/v1/models", 2)


def test_a_new_model_is_found_on_a_miss(start, target, later):
    proxy = start()
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    assert proxy.post("/api/chat", CHAT).status == 200
    target.answers["/v1/models"] = http_answer({"data": [{"id": "m"}, {"id": "fresh"}]})
    later(5)
    assert proxy.post("/api/chat", {**CHAT, "model": "fresh"}).status == 200


def test_targets_without_a_list_are_trusted(start, target):
    target.answers["/v1/models"] = http_answer({"error": "no"}, 404)
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    assert start().post("/api/chat", {**CHAT, "model": "anything"}).status == 200


TEXT, ARRAY, OBJECT, FLAG, NUMBER = "string", "array", "object", "bool", "integer"
WRONG = {TEXT: (5, True, ["x"]), ARRAY: ("x", {"a": 1}, 5), OBJECT: ("x", ["x"], True), FLAG: ("yes", 1, {}),
         NUMBER: ("1", True, 1.5)}
TYPES = [       # endpoint, what a request needs besides a model, and the types of its fields
    ("/api/chat", {"messages": [{"role": "user", "content": "hi"}]}, {
        "model": TEXT, "messages": ARRAY, "tools": ARRAY, "options": OBJECT, "stream": FLAG, "truncate": FLAG,
        "shift": FLAG, "logprobs": FLAG, "top_logprobs": NUMBER}),
    ("/api/generate", {"prompt": "hi"}, {
        "model": TEXT, "prompt": TEXT, "suffix": TEXT, "system": TEXT, "template": TEXT, "context": ARRAY,
        "images": ARRAY, "raw": FLAG, "options": OBJECT, "stream": FLAG, "truncate": FLAG, "shift": FLAG,
        "logprobs": FLAG, "top_logprobs": NUMBER}),
    ("/api/embed", {"input": "hi"}, {"model": TEXT, "truncate": FLAG, "dimensions": NUMBER, "options": OBJECT}),
    ("/api/embeddings", {"prompt": "hi"}, {"model": TEXT, "prompt": TEXT, "options": OBJECT}),
    ("/api/show", {}, {"model": TEXT, "name": TEXT, "verbose": FLAG, "options": OBJECT, "system": TEXT}),
    ("/api/pull", {}, {"model": TEXT, "name": TEXT, "stream": FLAG, "insecure": FLAG}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, {
        "model": TEXT, "messages": ARRAY, "tools": ARRAY, "stream": FLAG, "stream_options": OBJECT, "options": OBJECT,
        "max_tokens": NUMBER, "max_completion_tokens": NUMBER, "seed": NUMBER, "n": NUMBER, "logprobs": FLAG,
        "top_logprobs": NUMBER}),
    ("/v1/completions", {"prompt": "hi"}, {"model": TEXT, "suffix": TEXT, "stream": FLAG, "max_tokens": NUMBER}),
    ("/v1/embeddings", {"input": "hi"}, {"model": TEXT, "dimensions": NUMBER, "encoding_format": TEXT})]
INNER = [       # what stands inside, and what is said of it
    ("messages", ["hi"], "string into field messages of type object"),
    ("messages", [{"role": 5}], "number into field role of type string"),
    ("messages", [{"role": "user", "content": 5}], "number into field content of type string"),
    ("messages", [{"role": "user", "content": "x", "thinking": 5}], "number into field thinking of type string"),
    ("messages", [{"role": "user", "content": "x", "images": "x"}], "string into field images of type array"),
    ("messages", [{"role": "assistant", "tool_calls": {}}], "object into field tool_calls of type array"),
    ("messages", [{"role": "assistant", "tool_calls": ["f"]}], "string into field tool_calls of type object"),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": "f"}]}],
     "string into field function of type object"),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}],
     "number into field name of type string"),
    ("messages", [{"role": "tool", "content": "x", "tool_name": 5}], "number into field tool_name of type string"),
    ("messages", [{"role": "tool", "content": "x", "tool_call_id": 5}],
     "number into field tool_call_id of type string"),
    ("tools", [5], "number into field tools of type object"), ("tools", [None], "null into field tools of type object"),
    ("tools", [{"type": "function", "function": []}], "array into field function of type object"),
    ("tools", [{"type": "function", "function": {"name": 5}}], "number into field name of type string"),
    ("tools", [{"type": "function", "function": {"name": "f", "description": {}}}],
     "object into field description of type string"),
    ("tools", [{"type": "function", "function": {}}], "a tool has no name"),
    *(("keep_alive", value, f'invalid keep_alive {json.dumps(value)}: seconds, or a duration such as "5m"')
      for value in ("soon", True, [1], "1d", {}, ""))]


@cases("path, needed, kinds", TYPES, ids=[row[0] for row in TYPES])
def test_a_wrong_type_in_any_field_is_told_in_ollamas_words_and_goes_no_further(start, target, path, needed, kinds):
    target.answers["/api/tags"] = http_answer({"models": [{"name": "m:latest", "model": "m:latest"}]})
    proxy = start("--target-api", "ollama" if path.startswith("/v1") else "openai")
    for name, kind in kinds.items():
        for value in WRONG[kind]:
            answer = proxy.post(path, {"model": "m", **needed, name: value})
            told = json.loads(answer.data)["error"]
            told = told["message"] if path.startswith("/v1") else told
            wrong = {str: "string", bool: "bool", list: "array", dict: "object"}.get(type(value), "number")
            assert answer.status == 400, (name, value)
            assert told == f"json: cannot unmarshal {wrong} into field {name} of type {kind}"
    assert not [request for request in target.received if request.method == "POST"]


@cases("path", ["/api/chat", "/v1/chat/completions"])
@cases("name, value, text", INNER, ids=[row[2] for row in INNER])
def test_a_wrong_type_inside_a_field_is_told_as_well(start, target, path, name, value, text):
    target.answers["/api/tags"] = http_answer({"models": [{"name": "m:latest", "model": "m:latest"}]})
    answer = start("--target-api", "ollama" if path.startswith("/v1") else "openai").post(path, {**CHAT, name: value})
    told = json.loads(answer.data)["error"]
    assert answer.status == 400
    assert (told["message"] if path.startswith("/v1") else told) in (text, f"json: cannot unmarshal {text}")
    assert not [request for request in target.received if request.method == "POST"]


@cases("path, body", [("/api/generate", {"prompt": "x"}), ("/api/embed", {"input": "x"}),
                      ("/api/embeddings", {"prompt": "x"}), ("/v1/completions", {"prompt": "x"}),
                      ("/v1/embeddings", {"input": "x"})])
def test_what_is_no_duration_is_refused_on_every_endpoint(start, target, path, body):
    target.answers["/api/tags"] = http_answer({"models": [{"name": "m:latest", "model": "m:latest"}]})
    proxy = start("--target-api", "ollama" if path.startswith("/v1") else "openai")
    for value in ("soon", True, [1], "1d"):
        answer = proxy.post(path, {"model": "m", **body, "keep_alive": value})
        assert answer.status == 400 and "keep_alive" in answer.data.decode(), value
    assert not [request for request in target.received if request.method == "POST"]


@cases("value", [5, {"a": 1}, [1], [["x"]], ["x", None], True])
def test_what_cannot_be_embedded_is_refused_on_both_faces(start, target, value):
    target.answers["/api/tags"] = http_answer({"models": [{"name": "m:latest", "model": "m:latest"}]})
    for api, path in (("openai", "/api/embed"), ("ollama", "/v1/embeddings")):
        answer = start("--target-api", api).post(path, {"model": "m", "input": value})
        assert answer.status == 400 and "invalid input" in answer.data.decode()


@cases("value", [[1, 2], [[1, 2]], ["a", "b"], 5, {}])
def test_a_prompt_that_an_ollama_cannot_take_is_a_clear_400(start, ollama_target, value):
    answer = start().post("/v1/completions", {"model": "llama3", "prompt": value})
    assert answer.status == 400 and "prompt must be one string" in json.loads(answer.data)["error"]["message"]


@cases("path, body", [("/api/chat", b'{"model":"m","stream":false,"messages":[{"role":"user","content":"%b"}]}'),
                      ("/api/generate", b'{"model":"m","stream":false,"prompt":"%b"}')])
@cases("text, wanted", [("Gr\u00fc\u00dfe".encode("latin-1"), "Gr\ufffd\ufffde"), (b"cut \\ud83d", "cut \ufffd"),
                        (b"\\ud83d\\ude00", "\U0001f600"), (b"\\ude00\\ud83d x", "\ufffd\ufffd x"),
                        (b"\xed\xa0\xbd", None)])
def test_text_that_is_no_utf8_is_served_as_go_reads_it(start, target, path, body, text, wanted):
    target.answers["/v1/chat/completions"] = http_answer(WHOLE)
    assert start().post(path, body % text).status == 200
    sent = target.calls("/v1/chat/completions")[-1]
    assert sent.json["messages"][0]["content"] == wanted or wanted is None
    target.answers.update({"/api/tags": http_answer({"models": [{"name": "m:latest", "model": "m:latest"}]}),
                           "/api/chat": http_answer(NATIVE_WHOLE)})
    chat = body.replace(b'"prompt":"%b"', b'"messages":[{"role":"user","content":"%b"}]')
    assert start("--target-api", "ollama").post("/v1/chat/completions", chat % text).status == 200
    assert target.calls("/api/chat")[-1].json["messages"][0]["content"] == wanted or wanted is None
    assert not re.search(rb"\\ud[89a-f]", re.sub(rb"\\ud[89ab]..\\ud[c-f]..", b"", sent.data)), "half a pair"


# -- names, filter, aliases


def names_of(proxy):
    return [model["name"] for model in proxy.get("/api/tags")["models"]]


def test_tag_and_vendor_settings(start, target):
    assert names_of(start("--tag", "proxy")) == ["m:proxy", "vendor/big:free", "qwen3:8b", "text-embed:proxy"]
    assert names_of(start("--tag", "none")) == ["m", "vendor/big:free", "qwen3:8b", "text-embed"]
    assert names_of(start("--strip-vendor")) == ["m:latest", "big:free", "qwen3:8b", "text-embed:latest"]
    target.answers["/v1/models"] = http_answer({"data": [{"id": "a/x"}, {"id": "b/x"}, {"id": "c/y"}, {"id": "models/gemini-9"}]})
    proxy = start("--strip-vendor")
    assert names_of(proxy) == ["a/x:latest", "b/x:latest", "y:latest", "gemini-9:latest"]
    assert proxy.post("/api/show", {"model": "x"}).status == 404      # a short form that is not unique
    assert proxy.post("/api/show", {"model": "y"}).status == proxy.post("/api/show", {"model": "models/gemini-9"}).status == 200


def test_a_filter_hides_models_everywhere(start, target):
    Path("models-filter.txt").write_text("# mine\nm\nbig*   # glob\n!*embed*\nqwen3:8b\n!qwen3:8b\n")
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start()
    assert names_of(proxy) == ["m:latest", "vendor/big:free"]
    assert [model["id"] for model in proxy.get("/v1/models")["data"]] == ["m", "vendor/big:free"]
    for path, body in (("/api/chat", CHAT), ("/api/show", {}), ("/v1/chat/completions", CHAT), ("/api/embed", {"input": "x"})):
        assert proxy.post(path, {**body, "model": "qwen3:8b"}).status == 404
    assert proxy.call("GET", "/v1/models/qwen3:8b").status == 404 and proxy.call("GET", "/v1/models/m").status == 200
    assert proxy.post("/api/chat", CHAT).status == 200
    assert not any("qwen" in str(request.json) for request in target.received)


def test_aliases_are_listed_and_resolved(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--alias", "gpt=vendor/big:free", "--alias", "m=qwen3:8b")
    assert {"gpt:latest", "vendor/big:free", "m:latest"} <= set(names_of(proxy))
    for name, wanted in (("gpt", "vendor/big:free"), ("gpt:latest", "vendor/big:free"), ("m", "m")):     # an exact id wins
        proxy.lines("/api/chat", {**CHAT, "model": name})
        assert target.calls("/v1/chat/completions")[-1].json["model"] == wanted
    digests = [model["digest"] for model in proxy.get("/api/tags")["models"]]
    assert len(set(digests)) == len(digests)
    assert "gpt" in [model["id"] for model in proxy.get("/v1/models")["data"]]


# -- relay


def test_v1_is_relayed_byte_for_byte(proxy, target):
    odd = b": comment\n\ndata:{\"choices\" :[ ]}\r\n\r\ndata: [DONE]\n\n"
    target.answers["/v1/chat/completions"] = http_stream(odd)
    answer = proxy.post("/v1/chat/completions", {**CHAT, "stream": True})
    assert answer.data == odd and answer.headers["Content-Type"] == "text/event-stream"
    target.answers["/v1/anything"] = http_answer(b"\x00\x01raw", 200, "application/x-odd", "X-Request-Id: 7", "Set-Cookie: a=b", "Connection: x-secret", "X-Secret: 1", "Keep-Alive: 5")
    answer = proxy.call("PATCH", "/v1/anything?a=b", b"body", {"X-Custom": "yes", "Connection": "keep-alive, x-drop", "X-Drop": "1", "TE": "trailers"})
    assert answer.data == b"\x00\x01raw" and answer.headers["X-Request-Id"] == "7"
    assert not {"set-cookie", "x-secret", "keep-alive"} & {name.lower() for name in answer.headers}
    sent = target.received[-1]
    assert sent.method == "PATCH" and sent.path == "/v1/anything?a=b" and sent.data == b"body" and sent.headers["x-custom"] == "yes"
    assert not {"x-drop", "te", "origin"} & set(sent.headers)


def test_the_relay_changes_nothing_but_the_name(proxy, target):
    body = b'{ "messages" : [{"role":"user","content":"the \\"model\\" is 1.0"}],\n "temperature": 0.10, "model" : "m:latest" }'
    proxy.post("/v1/chat/completions", body)
    assert target.calls("/v1/chat/completions")[-1].data == body.replace(b"m:latest", b"m")
    proxy.post("/v1/chat/completions", body.replace(b"m:latest", b"m"))
    assert target.calls("/v1/chat/completions")[-1].data == body.replace(b"m:latest", b"m")
    known = b'{ "metadata": {"model": "x"}, "temperature": 0.10, "model": "m", "messages": [] }'
    proxy.post("/v1/chat/completions", known)
    assert target.calls("/v1/chat/completions")[-1].data == known
    nested = b'{"metadata": {"model": "m:latest"}, "model": "m:latest", "messages": []}'
    proxy.post("/v1/chat/completions", nested)
    assert target.calls("/v1/chat/completions")[-1].json == {"metadata": {"model": "m:latest"}, "model": "m", "messages": []}


@cases("model", ["m", "m:latest"])
def test_the_relay_adds_no_keys(proxy, target, model):
    body = {"metadata": {"model": "x"}, "model": model, "Tools": [], "messages": [], "N": 1}
    proxy.post("/v1/chat/completions", body)
    assert target.calls("/v1/chat/completions")[-1].json == {**body, "model": "m"}


def test_the_length_that_head_tells_is_the_targets(start, target):
    def bodiless(talk):
        talk.released = True
        talk.send(http_answer(b"x" * 1234)[:-1234] if talk.request.method == "HEAD" else http_answer(LIST))

    target.answers["/v1/models"] = target.answers["/v1/files"] = bodiless
    proxy = start("--target-api", "openai")
    for path in ("/v1/models", "/v1/files"):
        answer = proxy.call("HEAD", path)
        assert answer.headers["Content-Length"] == "1234" and answer.data == b""
    assert proxy.get("/v1/models") == LIST


ZSTD = b"\x28\xb5\x2f\xfd\x20\x1d\xe9\x00\x00" + b'{"model":"m","input":"hello"}'      # one raw block
OPAQUE = [      # path, media type, body: what holds no name that we could read
    ("/v1/realtime/calls?model=m:latest", "application/sdp", b"v=0\r\no=- 1 2 IN IP4 127.0.0.1\r\ns=-\r\n"),
    ("/v1/audio/speech", "application/octet-stream", b"\x00\x01\xff{\"model\":\"m:latest\"}"),
    ("/v1/files/f/content", "text/csv", b'model,"m:latest"\n1,2\n'),
    ("/v1/x", "application/xml", b'<model>"m:latest"</model>'),
    ("/v1/x", "image/png", b"\x89PNG\r\n\x1a\n"), ("/v1/x", "text/plain", b"model: m:latest"),
    ("/v1/x", "text/event-stream", b'data: {"model":"m:latest"}\n\n'), ("/v1/x", "", b"\xff\xfe\x00"),
    ("/v1/x", "", b"just text"),
    ("/v1/x", "application/x-www-form-urlencoded", b"model=m%3Alatest&a=1"),
    ("/v1/x", "application/x-ndjson", b'{"a":1}\n{"model":"m:latest"}\n'),
    ("/v1/x", "application/jsonl", b'{"model":"m:latest"}\n{"model":"m:latest"}\n'),
    ("/v1/files", "multipart/form-data; boundary=b",
     b"--b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n{}\r\n--b--\r\n")]


@cases("path, media_type, body", OPAQUE, ids=[f"{row[1]} {row[2][:9]}" for row in OPAQUE])
def test_what_is_no_json_is_relayed_as_it_is(proxy, target, path, media_type, body):
    target.answers[path.partition("?")[0]] = http_answer(b"v=0\r\n", 201, "application/sdp", "Location: /v1/calls/1")
    for method in ("POST", "PUT", "PATCH"):
        answer = proxy.call(method, path, body, {"Content-Type": media_type} if media_type else {})
        assert (answer.status, answer.data, answer.headers["Location"]) == (201, b"v=0\r\n", "/v1/calls/1")
        sent = target.received[-1]
        assert (sent.method, sent.path, sent.data) == (method, path, body)
        assert sent.headers.get("content-type", "") == media_type


@cases("path, media_type, body", OPAQUE, ids=[f"{row[1]} {row[2][:9]}" for row in OPAQUE])
def test_what_cannot_be_read_does_not_pass_a_filter(start, target, path, media_type, body):
    Path("models-filter.txt").write_text("other\n")
    proxy = start("--target-api", "openai")
    for method in ("POST", "PUT", "PATCH"):
        answer = proxy.call(method, path, body, {"Content-Type": media_type} if media_type else {})
        assert answer.status in (400, 404, 415) and set(json.loads(answer.data)["error"]) == {
            "message", "type", "param", "code"}
    assert not [request for request in target.received if request.method != "GET"]


@cases("media_type", ["application/json", "application/json; charset=utf-8", "application/vnd.api+json",
                      "APPLICATION/JSON", "", "text/plain", "application/x-www-form-urlencoded"])
def test_what_says_it_is_json_or_looks_like_it_has_its_name_resolved(proxy, target, media_type):
    target.answers["/v1/responses"] = http_answer({"id": "resp_1"})
    headers = {"Content-Type": media_type} if media_type else {}
    assert proxy.post("/v1/responses", b' {"model": "m:latest", "input": "x"}', headers).status == 200
    assert target.received[-1].data == b' {"model": "m", "input": "x"}'


def test_what_says_it_is_json_and_is_none_is_a_400(proxy, target):
    for body in (b"{broken", b"[1, 2]", b'"m"'):
        answer = proxy.post("/v1/responses", body, {"Content-Type": "application/json"})
        assert answer.status == 400 and json.loads(answer.data)["error"]["type"] == "invalid_request_error"
    assert not target.calls("/v1/responses")


@cases("coding, packed", [("zstd", ZSTD), ("br", b"\x0b\x02\x80abc\x03"), ("compress", b"\x1f\x9d\x90"),
                          ("gzip, zstd", ZSTD), ("aes128gcm", b"\x00" * 30)], ids=lambda value: str(value)[:12])
def test_what_is_compressed_as_we_cannot_read_passes_unless_a_filter_must_see_it(start, target, coding, packed):
    target.answers.update({path: http_answer({"id": "resp_1"}) for path in ("/v1/responses", "/v1/chat/completions")})
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    assert start("--target-api", "openai").post("/v1/responses", packed, headers).status == 200
    sent = target.calls("/v1/responses")[0]
    plain = sent.data == ZSTD[9:] and "content-encoding" not in sent.headers     # where Python can unpack it
    assert plain or (sent.data, sent.headers["content-encoding"], sent.headers["content-type"]) == (
        packed, coding, "application/json")
    Path("models-filter.txt").write_text("other\n")
    filtered = start("--target-api", "openai")
    for path in ("/v1/responses", "/v1/chat/completions"):
        assert filtered.post(path, packed, headers).status in (404, 415)
    assert len(target.calls("/v1/responses")) == 1 and not target.calls("/v1/chat/completions")


def a_form(*fields, boundary="XyZ"):
    """multipart/form-data; a field is a name, its content and whatever else its head says."""
    parts = b""
    for name, content, *more in fields:
        head = "\r\n".join([f'Content-Disposition: form-data; name="{name}"' + "".join(more[:1]), *more[1:]])
        parts += b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary.encode(), head.encode(), content)
    return parts + b"--%b--\r\n" % boundary.encode()


AUDIO = b"RIFF\x00\x01\r\n--Xy\x00\xff" * 50
FILE = ("file", AUDIO, '; filename="a.wav"', "Content-Type: audio/wav")
FORMS = [       # the fields, in which {} is the name of the model
    ("model first", [("model", b"{}"), FILE]), ("model last", [FILE, ("language", b"en"), ("model", b"{}")]),
    ("a type of its own", [("model", b"{}", "", "Content-Type: text/plain"), FILE]),
    ("a file of that name", [("file", b"m:latest", '; filename="model"'), ("model", b"{}")]),
    ("a prompt about models", [("prompt", b'say name="model"\r\n\r\nm:latest\r\n'), ("model", b"{}")]),
    ("a file about models", [("file", a_form(("model", b"m:latest"), boundary="x"), '; filename="a"'),
                             ("model", b"{}")])]


@cases("path", ["/v1/audio/transcriptions", "/v1/images/edits"])
@cases("name, fields", FORMS, ids=[row[0] for row in FORMS])
def test_names_in_forms_are_resolved_and_all_other_bytes_stay(start, target, path, name, fields):
    target.answers[path] = http_answer({"text": "hello"})
    proxy = start("--target-api", "openai", "--alias", "whisper-1=vendor/big:free")
    headers = {"Content-Type": 'multipart/form-data; boundary="XyZ"'}
    for given, wanted in (("whisper-1", "vendor/big:free"), ("m:latest", "m"), ("m", "m"), ("nowhere", "nowhere")):
        body, right = (a_form(*[(field[0], field[1].replace(b"{}", model.encode()), *field[2:]) for field in fields])
                       for model in (given, wanted))
        assert proxy.post(path, body, headers).status == 200
        assert target.calls(path)[-1].data == right, given


@cases("name, fields", FORMS, ids=[row[0] for row in FORMS])
def test_a_form_cannot_smuggle_a_hidden_name_past_a_filter(start, target, name, fields):
    Path("models-filter.txt").write_text("m\n")
    target.answers["/v1/audio/transcriptions"] = http_answer({"text": "hello"})
    proxy = start("--target-api", "openai")
    for model, status in ((b"qwen3:8b", 404), (b"m", 200)):
        body = a_form(*[(field[0], field[1].replace(b"{}", model), *field[2:]) for field in fields])
        headers = {"Content-Type": "multipart/form-data; boundary=XyZ"}
        assert proxy.post("/v1/audio/transcriptions", body, headers).status == status
    assert len(target.calls("/v1/audio/transcriptions")) == 1


@cases("second", ['name="model"', "name=model", 'name="model"; filename="x"', 'NAME="model"'])
def test_a_second_name_in_a_form_does_not_pass_a_filter(start, target, second):
    Path("models-filter.txt").write_text("m\n")
    target.answers["/v1/audio/transcriptions"] = http_answer({"text": "hello"})
    form = a_form(("model", b"m"), FILE, ("other", b"qwen3:8b")).replace(b'name="other"', second.encode())
    headers = {"Content-Type": "multipart/form-data; boundary=XyZ"}
    proxy = start("--target-api", "openai")
    assert proxy.post("/v1/audio/transcriptions", form, headers).status in (400, 404)
    assert not target.calls("/v1/audio/transcriptions")


@cases("path", ["/v1/models/m/endpoints", "/v1/models/vendor/big:free/endpoints", "/v1/models/not-listed",
                "/v1/models/not/listed/at-all", "/v1/models/m/versions/2?a=b"])
def test_what_stands_below_models_is_the_targets_affair(start, target, path):
    target.answers[path.partition("?")[0]] = http_answer({"data": {"endpoints": [1]}})
    proxy = start("--target-api", "openai")
    assert proxy.get(path) == {"data": {"endpoints": [1]}} and target.received[-1].path == path
    target.answers[path.partition("?")[0]] = http_answer({"error": {"message": "no such thing", "code": 7}}, 404)
    answer = proxy.call("GET", path)
    assert answer.status == 404 and json.loads(answer.data) == {"error": {"message": "no such thing", "code": 7}}


@cases("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank"])
def test_names_that_stand_in_no_list_are_the_targets_affair_unless_a_filter_is_set(start, target, path):
    target.answers[path] = http_answer({"id": "x"})
    body = {"model": "team-alias", "input": "x", "prompt": "x", "messages": [HI], "documents": []}
    assert start("--target-api", "openai").post(path, body).status == 200
    assert target.calls(path)[0].json == body
    Path("models-filter.txt").write_text("m\n")
    filtered = start("--target-api", "openai")
    assert filtered.post(path, body).status == 404 and len(target.calls(path)) == 1
    assert filtered.post(path, {**body, "model": "m"}).status == 200
    assert filtered.post("/api/chat", {"model": "team-alias", "messages": [HI]}).status == 404


def test_ollama_clients_are_told_404_for_names_that_stand_in_no_list(proxy, target):
    for path, body in (("/api/chat", {"messages": [HI]}), ("/api/generate", {"prompt": "x"}),
                       ("/api/embed", {"input": "x"})):
        answer = proxy.post(path, {"model": "team-alias", **body})
        assert answer.status == 404 and "team-alias" in json.loads(answer.data)["error"]
    assert not [request for request in target.received if request.method == "POST"]


def test_a_target_that_wants_more_reasoning_is_not_given_less(start, target):
    text = "The `reasoning_content` in the thinking mode must be passed back to the API."
    turns = [HI, turn("assistant", "b", reasoning_content="because"), HI, calling(("read", {}, "c1")),
             result("d", tool_call_id="c1")]

    def script(talk):
        talk.released = True
        kept = {"reasoning_content" in message for message in talk.request.json["messages"]
                if message["role"] == "assistant"}
        talk.send(http_answer({"error": {"message": text}}, 400) if len(kept) > 1 else http_answer(WHOLE))

    target.answers["/v1/chat/completions"] = script
    answer = start("--target-api", "openai").post("/v1/chat/completions", {"model": "m", "messages": turns})
    assert answer.status == 400 and json.loads(answer.data)["error"]["message"] == text
    assert all(request.json["messages"] == turns for request in target.calls("/v1/chat/completions"))


@cases("text", ["messages[1].reasoning_content is required in thinking mode", "Missing `reasoning_content` field",
                "options must be provided", "format is missing", "`think` needs to be set for this model"])
def test_a_relay_leaves_nothing_out_that_the_target_asks_for(start, target, text):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": text}}, 400)
    body = {"model": "m", "think": True, "format": "json", "options": {"num_ctx": 5},
            "messages": [HI, turn("assistant", "a", reasoning_content="b"), HI]}
    answer = start("--target-api", "openai").post("/v1/chat/completions", body)
    assert answer.status == 400 and [request.json for request in target.calls("/v1/chat/completions")] == [body]


@cases("argv, authorization, travels", [
    ([], "Bearer sk-client-own-key", False), (["--api-key", "sk-upstream-key"], "Bearer sk-client-own-key", False),
    (["--api-key", "sk-upstream-key"], None, False), (["--forward-auth"], "Bearer sk-client-own-key", True),
    (["--forward-auth", "--api-key", "sk-upstream-key"], "Bearer sk-client-own-key", True),
    (["--forward-auth", "--api-key", "sk-upstream-key"], "Bearer ollama", False)])
@cases("path", ["/v1/chat/completions", "/v1/files"])
def test_whose_account_pays_is_told_beside_the_clients_own_key_alone(start, target, path, argv, authorization, travels):
    target.answers[path] = http_answer(WHOLE)
    headers = {"OpenAI-Organization": "org-client", "OpenAI-Project": "proj_client", "X-Trace": "1"}
    headers.update({"Authorization": authorization} if authorization else {})
    assert start("--target-api", "openai", *argv).post(path, CHAT, headers).status == 200
    sent = target.calls(path)[-1].headers
    assert sent["x-trace"] == "1" and ("openai-organization" in sent) is ("openai-project" in sent) is travels
    ours = "Bearer sk-upstream-key" if "--api-key" in argv else None
    assert sent.get("authorization") == (authorization if travels else ours)


@cases("path", ["/v1/responses", "/v1/realtime?model=m", "/v1/models", "/api/chat"])
def test_a_websocket_is_426_at_once_and_the_target_is_not_asked(start, target, path):
    proxy = start("--target-api", "openai")
    headers = ("Connection: Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
    with proxy.dial() as sock:
        sock.sendall(http_request("GET", path, b"", *headers))
        head = read_until(sock, b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 426 ") and b"\r\nUpgrade: HTTP/1.1\r\n" in head and not target.received


def test_another_upgrade_is_no_reason_to_refuse(proxy, target):
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAM"}
    assert proxy.call("GET", "/v1/models", None, headers).status == 200
    assert not {"upgrade", "http2-settings"} & set(target.received[-1].headers)


def test_what_cannot_get_better_says_so_to_sdks(start, target):
    Path("models-filter.txt").write_text("m\n")
    proxy = start("--target-api", "openai", "--client-key", "door-key")
    key = {"Authorization": "Bearer door-key"}
    for status, method, path, body, headers in (
            (401, "POST", "/v1/chat/completions", CHAT, {}),
            (404, "POST", "/v1/chat/completions", {**CHAT, "model": "nope"}, key),
            (404, "POST", "/v1/messages", {**CHAT, "model": "nope"}, key), (404, "GET", "/v1/models/nope", None, key),
            (400, "POST", "/v1/responses", b"{broken", {**key, "Content-Type": "application/json"}),
            (405, "TRACE", "/v1/x", None, key),
            (413, "POST", "/v1/chat/completions", b"x", {**key, "Content-Length": "999999999"})):
        with proxy.dial() as sock:
            data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
            length = () if "Content-Length" in headers else (f"Content-Length: {len(data)}",)
            lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *length]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
            head = read_until(sock, b"\r\n\r\n").lower()
        assert head.startswith(b"http/1.1 %d " % status), (status, head)
        assert b"\r\nx-should-retry: false\r\n" in head, status
    assert "x-should-retry" not in proxy.post("/api/chat", {**CHAT, "model": "nope"}, key).headers


@cases("status", [400, 429, 500, 503])
def test_what_a_target_says_of_its_own_errors_is_left_to_it(start, target, status):
    proxy, told = start("--target-api", "openai"), ("x-should-retry: true",)
    for headers in (told, ()):
        target.answers["/v1/chat/completions"] = http_answer({"error": "x"}, status, "application/json", *headers)
        answer = proxy.post("/v1/chat/completions", CHAT)
        assert answer.headers.get("x-should-retry") == ("true" if headers else None)


def test_a_target_that_is_down_may_be_asked_again(start):
    proxy = start("--target", "http://127.0.0.1:9", "--target-api", "openai")
    answer = proxy.post("/v1/chat/completions", CHAT)
    assert answer.status == 502 and "x-should-retry" not in answer.headers


def test_head_and_pings_of_a_stream_reach_the_client_as_they_come(start, target):
    def script(talk):
        talk.send(stream_head())
        assert talk.target.go.wait(PATIENCE)
        talk.send(chunk(b": keep-alive\n\n"))
        talk.wait_closed()

    target.answers["/v1/responses"] = script
    with start("--target-api", "openai").dial() as sock:
        sock.sendall(http_request("POST", "/v1/responses", {"model": "m", "stream": True}))
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        target.go.set()
        assert b": keep-alive\n\n" in read_until(sock, b"keep-alive\n\n")


@cases("path", ["/v1/chat/completions", "/api/chat"])
def test_a_target_that_refuses_before_it_has_read_the_body_is_heard(start, target, path):
    refusal = {"error": {"message": "request entity too large"}}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    listed = read_until(sock, b"\r\n\r\n").startswith(b"GET /v1/models ")
                    status = (LIST, 200) if listed else (refusal, 413)
                    sock.sendall(http_answer(*status, "application/json", "Connection: close"))
                    sock.shutdown(socket.SHUT_WR)
                    read_all(sock)      # what still comes, so that nothing resets the connection

        threading.Thread(target=serve, daemon=True).start()
        proxy = start("--target", f"http://127.0.0.1:{listener.getsockname()[1]}", "--target-api", "openai")
        answer = proxy.post(path, {**CHAT, "stream": False, "messages": [turn("user", "x" * 3_000_000)]})
        shut(listener)
    assert answer.status == 413 and b"too large" in answer.data


def test_compression_that_nobody_asked_for_is_unpacked_or_labelled(start, target):
    plain = b'{"object":"list","data":[]}'
    target.answers["/v1/files"] = http_answer(gzip.compress(plain), 200, "application/json", "Content-Encoding: gzip")
    target.answers["/v1/odd"] = http_answer(b"\x0b\x02\x80abc\x03", 200, "application/json", "Content-Encoding: br")
    proxy = start("--target-api", "openai")
    answer = proxy.call("GET", "/v1/files")
    assert answer.data == plain and "content-encoding" not in answer.headers
    answer = proxy.call("GET", "/v1/odd")
    assert answer.status == 502 or answer.headers["Content-Encoding"] == "br"


def test_errors_of_the_target_are_relayed_as_they_are(proxy, target):
    body = b'{"error": {"message": "no", "type": "odd", "param": "x", "code": 7}, "extra": 1}'
    target.answers["/v1/chat/completions"] = http_answer(body, 418)
    answer = proxy.post("/v1/chat/completions", CHAT)
    assert answer.status == 418 and answer.data == body
    target.answers["/v1/chat/completions"] = http_answer(b"", 503)
    assert "503" in json.loads(proxy.post("/v1/chat/completions", CHAT).data)["error"]["message"]


def test_what_editors_add_is_left_out_when_the_target_refuses_it(proxy, target):
    target.answers["/v1/chat/completions"] = [http_answer({"error": {"message": "property 'options' is unsupported"}}, 400),
                                              http_answer({"error": {"message": "messages[0].copilot_cache_control: extra"}}, 422), http_answer(WHOLE)]
    body = {"model": "m", "options": {"num_ctx": 1}, "messages": [{"role": "user", "content": "x", "copilot_cache_control": {}}]}
    assert proxy.post("/v1/chat/completions", body).status == 200
    assert target.calls("/v1/chat/completions")[-1].json == {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def test_v1_models_and_one_model(proxy, target):
    assert proxy.get("/v1/models") == LIST
    assert proxy.get("/v1/models/vendor/big:free")["id"] == "vendor/big:free"
    assert proxy.get("/v1/models/vendor%2Fbig:free")["id"] == "vendor/big:free"
    assert proxy.call("GET", "/v1/models/nope").status == 404


# -- what targets want: healing, extras of tool calls, metadata


def picky(refused):
    """A script of a target that refuses requests with these fields, in these words, and answers all others."""
    def script(talk):
        body, talk.released = talk.request.json, True
        words = [text for name, text in refused.items() if name in body]
        talk.send(http_answer({"error": {"message": words[0]}}, 400) if words else
                  http_stream(HELLO) if body.get("stream") else http_answer(WHOLE))
    return script


HEALING = [
    ("X01 max_tokens renamed", {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", "param": "max_tokens", "code": "unsupported_parameter"}}, 400,
     {"max_completion_tokens": 5}, ["max_tokens"]),
    ("X02 value refused", {"error": {"message": "Unsupported value: 'temperature' does not support 0.2 with this model.", "param": "temperature"}}, 400, {}, ["temperature"]),
    ("X03 stream_options", {"error": {"message": "unknown field stream_options"}}, 400, {}, ["stream_options"]),
    ("X04 seed renamed", {"message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}}, 422, {"random_seed": 7}, ["seed"]),
    ("X05 property named", {"error": {"message": "property 'top_k' is unsupported"}}, 400, {}, ["top_k"]),
    ("X06 Gemini's array", [{"error": {"code": 400, "message": 'Invalid JSON payload received. Unknown name "presence_penalty": Cannot find field.'}}], 400, {}, ["presence_penalty"]),
    ("X07 json_object", {"error": "'response_format.type' must be 'json_schema' or 'text'"}, 400,
     {"response_format": {"type": "json_schema", "json_schema": {"name": "response", "schema": {"type": "object"}}}}, []),
    ("X08 LiteLLM's list", {"error": {"message": "litellm.UnsupportedParamsError: openai does not support parameters: ['reasoning_effort'], for model=gpt-4o"}}, 400, {}, ["reasoning_effort"]),
    ("X09 xAI", {"code": "Client specified an invalid argument", "error": "Model grok-x does not support parameter presence_penalty."}, 400, {}, ["presence_penalty"]),
    ("X11 pydantic", {"detail": [{"loc": ["body", "chat_template_kwargs"], "msg": "extra"}]}, 422, {}, ["chat_template_kwargs"]),
]


@cases("name, error, status, has, lacks", HEALING, ids=[row[0] for row in HEALING])
def test_a_refused_field_is_healed_and_the_second_request_is_right_at_once(start, target, name, error, status, has, lacks):
    target.answers["/v1/chat/completions"] = [http_answer(error, status), http_stream(HELLO)]
    proxy = start()
    body = {**CHAT, "format": "json", "think": False, "options": {
        "num_predict": 5, "temperature": 0.2, "seed": 7, "top_k": 3, "presence_penalty": 0.1}}
    for count in (2, 3):
        assert proxy.lines("/api/chat", body)[-1]["done"] is True
        sent = target.calls("/v1/chat/completions")
        assert len(sent) == count and subset(has, sent[-1].json, {})
        assert not set(lacks) & set(sent[-1].json) and sent[-1].json["messages"] == CHAT["messages"]


def test_x10_a_refused_value_is_no_lesson_for_others(start, target):
    target.answers["/v1/chat/completions"] = [http_answer({"error": {"message": "Field 'top_k': Value must be between 0 <= value <= 9, but got 99"}}, 400), http_stream(HELLO)]
    proxy = start()
    proxy.lines("/api/chat", {**CHAT, "options": {"top_k": 99}})
    assert target.calls("/v1/chat/completions")[1].json["top_k"] == 9
    proxy.lines("/api/chat", {**CHAT, "options": {"top_k": 5}})
    assert target.calls("/v1/chat/completions")[2].json["top_k"] == 5


def test_a_guess_that_did_not_help_is_no_lesson(start, target):
    target.answers["/v1/chat/completions"] = picky({"min_p": "temperature is fine but min_p is not supported"})
    proxy = start()
    body = {**CHAT, "options": {"temperature": 0.2, "min_p": 0.1}}
    assert proxy.lines("/api/chat", body)[-1]["done"]
    asked = len(target.calls("/v1/chat/completions"))
    assert proxy.lines("/api/chat", body)[-1]["done"]
    sent = target.calls("/v1/chat/completions")[asked:]
    assert [(request.json.get("temperature"), "min_p" in request.json) for request in sent] == [(0.2, False)]


def test_what_the_last_request_was_refused_for_is_told(start, target):
    target.answers["/v1/chat/completions"] = [http_answer({"error": {"message": "first: top_k"}}, 400), http_answer({"error": {"message": "second"}}, 400)]
    answer = start().post("/api/chat", {**CHAT, "options": {"top_k": 3}})
    assert answer.status == 400 and json.loads(answer.data) == {"error": "second"} and len(target.calls("/v1/chat/completions")) == 2


def test_retries_are_few(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": "no temperature top_p seed top_k min_p typical_p repeat_penalty presence_penalty frequency_penalty"}}, 400)
    options = dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"), 0.5)
    assert start().post("/api/chat", {**CHAT, "options": {**options, "seed": 1, "top_k": 1}}).status == 400
    assert len(target.calls("/v1/chat/completions")) <= 7


@cases("message", ['"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', "tools is not supported", "model does not support image input", "messages: bad"])
def test_tools_messages_and_images_are_never_dropped(start, target, message):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": message}}, 400)
    answer = start().post("/api/chat", {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]})
    assert answer.status == 400 and json.loads(answer.data) == {"error": message}
    assert all("tools" in request.json for request in target.calls("/v1/chat/completions"))


# How servers say what they do not take: who says it, in what words.  Numbers and names are those of the requests here.

def roles(body):
    return [message["role"] for message in body["messages"]]


def said(body):
    """All that the model reads in the turns of a request."""
    contents = [message.get("content") or "" for message in body["messages"]]
    return "\n".join(part.get("text", "") for content in contents
                     for part in ([{"text": content}] if isinstance(content, str) else content))


def names_in(body):
    """The names of tools in the list, and in the calls of the history."""
    calls = [call for message in body["messages"] for call in message.get("tool_calls", ())]
    return [entry["function"]["name"] for entry in body.get("tools", []) + calls]


def ids_in(body):
    turns = body["messages"]
    return [call["id"] for message in turns for call in message.get("tool_calls", ())] \
        + [message["tool_call_id"] for message in turns if "tool_call_id" in message]


def fitting(request):
    """An answer in the form that was asked for."""
    if "input" in request.json:
        return http_answer({"data": [{"index": at, "embedding": [float(len(text)), 0.5]}
                                     for at, text in enumerate(request.json["input"])],
                            "usage": {"prompt_tokens": len(request.json["input"])}})
    return http_stream(HELLO) if request.json.get("stream") else http_answer(WHOLE)


def reluctant(*refusals):
    """A target that refuses with each of these texts or (status, body), and then answers."""
    left = list(refusals)

    def script(talk):
        talk.released = True
        status, body = left.pop(0) if left and isinstance(left[0], tuple) else (400, left.pop(0) if left else None)
        body = {"error": {"message": body}} if isinstance(body, str) else body
        talk.send(fitting(talk.request) if body is None else http_answer(body, status))

    return script


def answered(proxy, request):
    """The answer to a chat or to texts to embed, which must be whole."""
    answer = proxy.post("/api/embed" if "input" in request else "/api/chat", {"model": "m", **request})
    assert answer.status == 200, answer.data
    last = json.loads(answer.data.splitlines()[-1])
    assert last["done"] is True if "messages" in request else len(last["embeddings"]) == len(request["input"])
    return last


def lessons_in(proxy):
    """What the log tells of what was learned; the access line of a later request says that it is all there."""
    proxy.call("GET", "/health")
    proxy.wait_logged("/health")
    return [line for line in proxy.logged + proxy.errors if "from now on" in line]


CALLED = [turn("user", "go"), calling(("look.up", {"q": "x"}, "functions.f:0")),
          result("r", tool_call_id="functions.f:0")]
LONG_ID = "call_" + "x" * 40
FORMAT = {"type": "object", "properties": {"age": {"type": "integer"}}}
BOUNDED = {"properties": {"a": {"type": "array"}, "b": {"type": "string", "pattern": "a+", "maxLength": 500000},
                          "c": {"$ref": "#/$defs/C"}}, "additionalProperties": False,
           "$defs": {"C": {"type": "integer", "exclusiveMinimum": 0}}}
WORDS = " ".join(f"word{at}" for at in range(992))
THOUGHT = [turn("user", "a"), turn("assistant", "b", thinking="because"), turn("user", "c"), calling(("f", {})),
           result("r")]


def plain_tools(body):
    text = json.dumps(body["tools"])
    found = body["tools"][0]["function"]["parameters"]["properties"]
    return not re.search("pattern|maxLength|additional|defs|ref|Minimum", text) and "items" in found["a"] \
        and [found["b"]["type"], found["c"]["type"]] == ["string", "integer"]


def in_words(body):
    return "response_format" not in body and "age" in said(body)


NAME, BEGUN_WELL = "[A-Za-z0-9_-]{1,64}", "[A-Za-z_][A-Za-z0-9_-]{0,63}"
OTHERWISE = [
    # (what is refused, a request, how it must come the second time, a later request and how it must come at once; none
    #  where the same comes right at once, in whose words)
    ("a limit", {"messages": [HI], "options": {"num_predict": 100000}},
     lambda body: body.get("max_tokens") == 8192 and "max_completion_tokens" not in body,
     ({"messages": [HI], "options": {"num_predict": 50}}, lambda body: body.get("max_tokens") == 50), {
     "DeepSeek": "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]",
     "DashScope": "<400> InternalError.Algo.InvalidParameter: Range of max_tokens should be [1, 8192]",
     "OpenAI": "max_tokens is too large: 100000. This model supports at most 8192 completion tokens, whereas you "
               "provided 100000.",
     "Azure": "Invalid 'max_tokens': integer above maximum value. Expected a value <= 8192, but got 100000 instead.",
     "Claude": "max_tokens: 100000 > 8192, which is the maximum allowed number of output tokens for claude-x",
     "a gateway": "max_tokens (100000) exceeds model's maximum output tokens (8192) for model m",
     "Ark": "The parameter `max_tokens` specified in the request are not valid: integer above maximum value, expected "
            "a value <= 8192, but got 100000 instead. Request id: 1",
     "Groq": "max_tokens must be less than or equal to 8192, the maximum value for max_tokens is less than the "
             "context_window for this model",
     "Cohere": "invalid request: max_tokens must be less than or equal to 8192, the maximum output length for this "
               "model - received 100000.",
     "TGI": (422, {"error": "Input validation error: `max_new_tokens` must be <= 8192. Given: 100000",
                   "error_type": "validation"})}),
    ("a temperature", {"messages": [HI], "options": {"temperature": 1.9, "num_predict": 9}},
     lambda body: 0.9 <= body.get("temperature", 1) <= 1 and body["max_tokens"] == 9,
     ({"messages": [HI], "options": {"temperature": 0.5}}, lambda body: body.get("temperature") == 0.5), {
     "OpenAI": "Invalid 'temperature': decimal above maximum value. Expected a value <= 1, but got 1.9 instead.",
     "Claude": "temperature: range: 0..1", "DashScope": "Temperature should be in [0.0, 1.0]",
     "Mistral": (422, {"detail": [{"type": "less_than_equal", "loc": ["body", "temperature"], "input": 1.9,
                                   "msg": "Input should be less than or equal to 1"}]}),
     "Zhipu": "temperature must be between 0 and 1"}),
    ("a pair", {"messages": [HI], "options": {"temperature": 0.5, "top_p": 0.9}},
     lambda body: len({"temperature", "top_p"} & set(body)) == 1,
     ({"messages": [HI], "options": {"temperature": 0.5}}, lambda body: body.get("temperature") == 0.5), {
     "Claude": "`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
     "Bedrock": "The model returned the following errors: 'temperature' and 'top_p' cannot both be specified for this "
                "model. Please use only one."}),
    ("a temperature beside thinking", {"messages": [HI], "think": "high", "options": {"temperature": 0.5}},
     lambda body: "temperature" not in body and body["reasoning_effort"] == "high",
     ({"messages": [HI], "options": {"temperature": 0.5}}, lambda body: body.get("temperature") == 0.5), {
     "Claude": "`temperature` may only be set to 1 when thinking is enabled. Please consult our documentation at "
               "https://docs.x/extended-thinking"}),
    ("neighbours", {"messages": [SYSTEM, turn("user", "It is cold.", images=[PICTURE]), turn("user", "What helps?")]},
     lambda body: roles(body) == ["system", "user"], None, {
     "llama.cpp": (500, {"error": {"code": 500, "type": "server_error", "message":
                   "\n------------\nWhile executing CallExpression at line 19, column 27 in source:\n... Error: Jinja "
                   "Exception: Conversation roles must alternate user/assistant/user/assistant/..."}}),
     "Ministral": (500, {"error": {"message": "Jinja Exception: After the optional system message, conversation roles "
                   "must alternate user and assistant roles except for tool calls and results."}}),
     "Perplexity": "After the (optional) system message(s), user or tool message(s) should alternate with assistant "
                   "message(s).",
     "DeepSeek": "deepseek-reasoner does not support successive user or assistant messages (messages[1] and "
                 "messages[2] in your input). You should interleave the user/assistant messages in the message "
                 "sequence.",
     "Bedrock": "A conversation must alternate between user and assistant roles. Make sure the conversation "
                "alternates between user and assistant roles and try again.",
     "Claude": 'messages: roles must alternate between "user" and "assistant", but found multiple "user" roles in a '
               'row', "Gemini": "Please ensure that multiturn requests alternate between user and model."}),
    ("neighbours, one of which calls", {"messages": [
        turn("user", "go"), turn("assistant", "I shall look."), *CALLED[1:], HI], "tools": [a_tool("look.up")]},
     lambda body: roles(body) == ["user", "assistant", "tool", "user"] and len(names_in(body)) == 2, None, {
     "llama.cpp": (500, {"error": {"message": "Jinja Exception: After the optional system message, conversation roles "
                   "must alternate user and assistant roles except for tool calls and results."}})}),
    ("a greeting", {"messages": [SYSTEM, turn("assistant", "Hello!"), HI]},
     lambda body: roles(body) == ["system", "user", "assistant", "user"], None, {
     "Bedrock": "A conversation must start with a user message. Try again with a conversation that starts with a user "
                "message.", "Claude": 'messages: first message must use the "user" role',
     "llama.cpp": (500, {"error": {"message": "Jinja Exception: Conversation roles must alternate user/assistant/user/"
                   "assistant/..."}})}),
    ("a question behind results", {"messages": [*CALLED, HI]},
     lambda body: roles(body) == ["user", "assistant", "tool", "assistant", "user"], None, {
     "Mistral": (400, {"object": "error", "message": "Unexpected role 'user' after role 'tool'",
                       "type": "invalid_request_message_order", "param": None, "code": "3230"}),
     "OpenRouter": (400, {"error": {"message": "Provider returned error", "code": 400, "metadata": {
                    "raw": '{"object":"error","message":"Unexpected role \'user\' after role \'tool\'","code":"3230"}',
                    "provider_name": "Mistral"}}}),
     "LiteLLM": 'litellm.BadRequestError: MistralException - {"object":"error","message":"Unexpected role \'user\' '
                'after role \'tool\'","type":"invalid_request_message_order","param":null,"code":"3230"}'}),
    ("a late system turn", {"messages": [SYSTEM, HI, turn("assistant", "ok"), turn("system", "Mind the gap."), HI]},
     lambda body: roles(body) == ["system", "user", "assistant", "user"], None, {
     "Qwen": (500, {"error": {"message": "Jinja Exception: System message must be at the beginning."}}),
     "Mistral": "Unexpected role 'system' after role 'assistant'", "vLLM": "System message must be at the beginning.",
     "Mistral's template": (500, {"error": {"message": "Jinja Exception: Only user, assistant and tool roles are "
                            "supported, with the exception of an initial optional system message!"}})}),
    ("system turns", {"messages": [SYSTEM, HI]}, lambda body: roles(body) == ["user"], None, {
    "Gemma": (500, {"error": {"message": "Jinja Exception: System role not supported"}}),
    "Google": "Developer instruction is not enabled for models/gemma-3-27b-it",
    "o1": "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
    "Claude": 'messages: Unexpected role "system". The Messages API accepts a top-level `system` parameter, not '
              '"system" as an input message role.', "MiniMax": "invalid params, invalid message role: system (2013)",
    "a template": "Only user, assistant and tool roles are supported, got system."}),
    ("an unknown role", {"messages": [turn("control", "thinking"), HI]}, lambda body: roles(body)[1:] == ["user"]
     and roles(body)[0] in ("system", "user"), None, {
    "OpenAI": "Invalid value: 'control'. Supported values are: 'system', 'assistant', 'user', 'function', 'tool', and "
              "'developer'.",
    "DeepSeek": "Failed to deserialize the JSON body into the target type: messages[0].role: unknown variant "
                "`control`, expected one of `system`, `user`, `assistant`, `tool` at line 1 column 60",
    "Ark": "The parameter `messages.role` specified in the request are not valid: invalid value: `control`, supported "
           "values are [system user assistant tool]", "Kimi": "role 'control' is not a valid role",
    "DashScope": "control is not one of ['system', 'assistant', 'user', 'tool', 'function'] - 'messages.[0].role'",
    "Mistral": "Input tag 'control' found using 'role' does not match any of the expected tags: 'system', 'user', "
               "'assistant', 'tool'", "a template": (500, {"error": {"message": "Unexpected message role."}})}),
    ("empty text", {"messages": [turn("user", "go"), turn("assistant", ""), turn("user", " "), calling(("rm", {})),
                             result(""), turn("user", "and?")], "tools": [a_tool("rm")]},
     lambda body: all((message["content"] or "").strip() or message.get("tool_calls") for message in body["messages"])
     and roles(body)[-3:] == ["assistant", "tool", "user"], None, {
     "Bedrock": "litellm.BadRequestError: BedrockException - {\"message\":\"The text field in the ContentBlock object "
                "at messages.2.content.0 is blank. Add text to the text field, and try again.\"}",
     "Converse": "The content field in the Message object at messages.2 is empty. Add a ContentBlock object to the "
                 "content field and try again.",
     "Claude": "messages.2: all messages must have non-empty content except for the optional final assistant message",
     "Claude's blocks": "messages: text content blocks must be non-empty",
     "Claude's white space": "messages: text content blocks must contain non-whitespace text",
     "Moonshot": "Invalid request: the message at position 3 with role 'assistant' must not be empty",
     "xAI": (400, {"code": "Client specified an invalid argument", "error": "Invalid request content: Each message "
                   "must have at least one content element."}),
     "Gemini": [{"error": {"code": 400, "message": "* GenerateContentRequest.contents[1].parts: contents.parts must "
                                                   "not be empty."}}]}),
    ("names of tools", {"messages": CALLED, "tools": [a_tool("look.up"), a_tool("look/up"), a_tool("n" * 70)]},
     lambda body: len(set(names_in(body))) == 3 and all(re.fullmatch(NAME, name) for name in names_in(body)), None, {
     "OpenAI": (400, {"error": {"param": "tools[0].function.name", "code": "invalid_value", "message":
                "Invalid 'tools[0].function.name': string does not match pattern. Expected a string that matches the "
                "pattern '^[a-zA-Z0-9_-]+$'."}}),
     "OpenAI's length": "Invalid 'tools[2].function.name': string too long. Expected a string with maximum length 64, "
                        "but got a string with length 70 instead.",
     "OpenAI's history": "Invalid 'messages[1].tool_calls[0].function.name': string does not match pattern. Expected "
                         "a string that matches the pattern '^[a-zA-Z0-9_-]+$'.",
     "Claude": "tools.0.custom.name: String should match pattern '^[a-zA-Z0-9_-]{1,64}$'",
     "Mistral": "Function name was look.up but must be a-z, A-Z, 0-9, or contain underscores and dashes, with a "
                "maximum length of 64.",
     "Moonshot": "Invalid request: function name is invalid, must start with a letter and can contain letters, "
                 "numbers, underscores, and dashes",
     "Gemini": "* GenerateContentRequest.tools[0].function_declarations[1].name: Invalid function name. Must start "
               "with a letter or an underscore. Must be alphameric (a-z, A-Z, 0-9), underscores (_), dots (.) or "
               "dashes (-), with a maximum length of 64.",
     "Bedrock": "1 validation error detected: Value 'look.up' at 'toolConfig.tools.1.member.toolSpec.name' failed to "
                "satisfy constraint: Member must satisfy regular expression pattern: [a-zA-Z0-9_-]+"}),
    ("names that begin with a digit", {"messages": [HI], "tools": [a_tool("2nd"), a_tool("-x"), a_tool("1.st")]},
     lambda body: len(set(names_in(body))) == 3
     and all(re.fullmatch(BEGUN_WELL, name) for name in names_in(body)), None, {
     "Moonshot": "function name is invalid, must start with a letter and can contain letters, numbers, underscores, "
                 "and dashes",
     "Gemini": "* GenerateContentRequest.tools[0].function_declarations[0].name: [FIELD_INVALID] Invalid function "
               "name. Must start with a letter or an underscore. Must be a-z, A-Z, 0-9, or contain underscores "
               "(_), dots (.), colons (:), or dashes (-), with a maximum length of 64."}),
    ("names in a history without tools", {"messages": CALLED},
     lambda body: re.fullmatch(NAME, names_in(body)[0]), None, {
     "OpenAI": "Invalid 'messages[1].tool_calls[0].function.name': string does not match pattern. Expected a string "
               "that matches the pattern '^[a-zA-Z0-9_-]+$'."}),
    ("ids of calls", {"messages": CALLED}, lambda body: len(ids_in(body)) == 2 and len(set(ids_in(body))) == 1
     and re.fullmatch(NAME, ids_in(body)[0]), None, {
     "Claude": '{"type":"error","error":{"type":"invalid_request_error","message":"messages.1.content.0.tool_use.id: '
               'String should match pattern \'^[a-zA-Z0-9_-]+$\'"}}',
     "Mistral": "Tool call id was functions.f:0 but must be a-z, A-Z, 0-9, with a length of 9.",
     "Bedrock": "1 validation error detected: Value 'functions.f:0' at 'messages.2.member.content.1.member.toolUse."
                "toolUseId' failed to satisfy constraint: Member must satisfy regular expression pattern: "
                "[a-zA-Z0-9_-]+"}),
    ("long ids of calls", {"messages": [turn("user", "go"), calling(("f", {}, LONG_ID)),
                                        result("r", tool_call_id=LONG_ID)]},
     lambda body: len(set(ids_in(body))) == 1 and len(ids_in(body)[0]) <= 40, None, {
     "OpenAI": "Invalid 'messages[1].tool_calls[0].id': string too long. Expected a string with maximum length 40, "
               "but got a string with length 45 instead.",
     "OpenAI's results": "Invalid 'messages[2].tool_call_id': string too long. Expected a string with maximum length "
                         "40, but got a string with length 45 instead."}),
    ("a schema of a tool", {"messages": [HI], "tools": [a_tool("f", **BOUNDED)]}, plain_tools, None, {
    "Gemini": [{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": 'Invalid JSON payload received. '
                'Unknown name "additionalProperties" at \'tools[0].function_declarations[0].parameters\': Cannot find '
                'field.'}}],
    "Gemini's items": "* GenerateContentRequest.tools[0].function_declarations[0].parameters.properties[a].items: "
                      "missing field.",
    "Vertex": "Unable to submit request because `f` functionDeclaration `parameters.c` schema didn't specify the "
              "schema type field.",
    "OpenAI": "Invalid schema for function 'f': In context=('properties', 'a'), array schema missing items.",
    "Claude": "tools.0.custom.input_schema: JSON schema is invalid. It must match JSON Schema draft 2020-12",
    "Moonshot": "Invalid request: tools.function.parameters is not a valid moonshot flavored json schema, details: "
                "<At path 'properties.a.items': type is not defined>",
    "llama.cpp": "Failed to initialize samplers: failed to parse grammar",
    "llama.cpp's templates": "Unable to generate parser for this template. Automatic parser generation failed: JSON "
                             "schema conversion failed:\nUnrecognized schema: {\"not\":{}}",
    "llama.cpp's patterns": (500, {"error": {"code": 500, "message": "JSON schema conversion failed:\nPattern must "
                                   "start with '^' and end with '$'"}}),
    "vLLM": "The provided JSON schema contains features not supported by xgrammar.",
    "vLLM's guidance": 'Grammar error: Unimplemented keys: ["propertyNames"]',
    "Cerebras": "Unsupported JSON schema fields: {'pattern'}"}),
    ("a type that is a list", {"messages": [HI], "tools": [a_tool("f", properties={
        "a": {"type": ["string", "null"]}, "b": {"type": "array", "items": {"type": ["integer", "null"]}}})]},
     lambda body: re.findall(r'"type": "?(.*?)[",]', json.dumps(body["tools"][0]["function"]["parameters"])) == [
         "object", "string", "array", "integer"], None, {
     "Gemini": [{"error": {"code": 400, "message": "Invalid JSON payload received. Unknown name \"type\" at 'tools[0]."
                 "function_declarations[0].parameters.properties[0].value': Proto field is not repeating, cannot start "
                 "list."}}]}),
    ("a tool without parameters", {"messages": [HI], "tools": [{"type": "function", "function": {"name": "now"}}]},
     lambda body: body["tools"][0]["function"].get("parameters", {"properties": 1}).get("properties"), None, {
     "Gemini": [{"error": {"code": 400, "message": "* GenerateContentRequest.tools[0].function_declarations[0]."
                 "parameters.properties: should be non-empty for OBJECT type"}}]}),
    ("a schema beside tools", {"messages": [HI], "tools": [a_tool()], "format": FORMAT}, in_words,
     ({"messages": [HI], "format": FORMAT}, lambda body: "response_format" in body), {
     "Gemini": [{"error": {"code": 400, "message": "Function calling with a response mime type: 'application/json' is "
                                                   "unsupported"}}],
     "Gemini, forced": "Forced function calling (ANY mode) with response mime type: 'application/json' is unsupported",
     "Groq": "json mode cannot be combined with tool/function calling",
     "llama.cpp": "Cannot use custom grammar constraints with tools.",
     "Cerebras": '"tools" is incompatible with "response_format"'}),
    ("JSON beside tools", {"messages": [HI], "tools": [a_tool()], "format": "json"},
     lambda body: "response_format" not in body and "JSON" in said(body),
     ({"messages": [HI], "format": "json"}, lambda body: "response_format" in body), {
     "Gemini": "Function calling with a response mime type: 'application/json' is unsupported",
     "Groq": "json mode cannot be combined with tool/function calling",
     "Cerebras": '"tools" is incompatible with "response_format"'}),
    ("no schemas for answers", {"messages": [HI], "format": FORMAT}, in_words, None, {
    "DeepSeek": "This response_format type is unavailable now"}),
    ("one schema for answers", {"messages": [HI], "format": {**FORMAT, "type": ["object", "null"]}}, in_words,
     ({"messages": [HI], "format": FORMAT}, lambda body: "response_format" in body), {
    "OpenAI": (400, {"error": {"param": "response_format", "code": "invalid_json_schema", "message": "Invalid schema "
               "for response_format 'response': schema must be a JSON Schema of 'type: \"object\"', got 'type: "
               "\"['object', 'null']\"'."}}),
    "llama.cpp": (400, {"error": {"message": "JSON schema conversion failed:\nPattern must start with '^' and end with "
                                             "'$'"}}),
    "llama.cpp's grammars": (500, {"error": {"code": 500, "message": '"json_schema": JSON schema conversion failed:\n'
                                                                     'Unbalanced parentheses'}}),
    "llama.cpp's samplers": "Failed to initialize samplers: failed to parse grammar",
    "vLLM": "The provided JSON schema contains features not supported by xgrammar."}),
    ("streams", {"messages": [HI]}, lambda body: body["stream"] is False and "stream_options" not in body, None, {
    "OpenAI": (400, {"error": {"param": "stream", "code": "unsupported_value", "message": "Your organization must be "
               "verified to stream this model. Please go to: https://platform.openai.com/settings/organization/"
               "general and click on Verify Organization."}}),
    "o1": (400, {"error": {"param": "stream", "code": "unsupported_value", "message": "Unsupported value: 'stream' "
                 "does not support true with this model. Supported values are: false"}}),
    "Bedrock": "This model doesn't support tool use in streaming mode.",
    "Bedrock's models": "The model is unsupported for streaming",
    "a gateway": "Streaming is not supported with tools.", "another": "streaming is not supported for this model",
    "a third": "'stream' is not allowed when using function calling"}),
    ("whole answers", {"messages": [HI], "stream": False, "think": True, "options": {"num_predict": 5000}},
     lambda body: body["stream"] is True and body.get("max_tokens") == 5000, None, {
     "DashScope": "This model only support stream mode, please enable the stream parameter to access the model. ",
     "DashScope's thinkers": "parameter.enable_thinking must be set to false for non-streaming calls",
     "ModelScope": "enable thinking can not be support when `stream=False`.",
     "Fireworks": "Requests with max_tokens > 4096 must have stream=true",
     "Claude": "Streaming is required for operations that may take longer than 10 minutes.",
     "Codex": "Stream must be set to true"}),
    ("an effort beside tools", {"messages": [HI], "tools": [a_tool()], "think": "high"},
     lambda body: body["reasoning_effort"] == "none",
     ({"messages": [HI], "think": "high"}, lambda body: body.get("reasoning_effort") == "high"), {
     "OpenAI": (400, {"error": {"param": "reasoning_effort", "message": "Function tools with reasoning_effort are not "
                "supported for m in /v1/chat/completions. To use function tools, use /v1/responses or set "
                "reasoning_effort to 'none'."}})}),
    ("tools without an effort", {"messages": [HI], "tools": [a_tool()]},
     lambda body: body["reasoning_effort"] == "none",
     ({"messages": [HI]}, lambda body: "reasoning_effort" not in body), {
     "OpenAI": "Function tools with reasoning_effort are not supported for m in /v1/chat/completions. To use function "
               "tools, use /v1/responses or set reasoning_effort to 'none'."}),
    ("the greatest effort", {"messages": [HI], "think": "max"}, lambda body: body["reasoning_effort"] == "high", None, {
    "OpenAI": "Unsupported value: 'reasoning_effort' does not support 'max' with this model. Supported values are: "
              "'low', 'medium', and 'high'.",
    "Groq": "'reasoning_effort' : value is not one of the allowed values ['none', 'default', 'low', 'medium', "
            "'high']"}),
    ("no thinking", {"messages": [HI], "think": False}, lambda body: body.get("reasoning_effort") != "none",
     ({"messages": [HI], "think": "high"}, lambda body: body.get("reasoning_effort") == "high"), {
     "OpenAI": (400, {"error": {"param": "reasoning_effort", "code": "unsupported_value", "message": "Unsupported "
                "value: 'reasoning_effort' does not support 'none' with this model. Supported values are: 'minimal', "
                "'low', 'medium', and 'high'."}}),
     "Groq": "`reasoning_effort` must be one of `low`, `medium`, or `high`"}),
    ("a level of thinking", {"messages": [HI], "think": "high"}, lambda body: body.get("reasoning_effort") != "high",
     ({"messages": [HI], "think": False}, lambda body: body.get("reasoning_effort") == "none"), {
     "Groq": "`reasoning_effort` must be one of `none` or `default`"}),
    ("an answer without its reasoning", {"messages": THOUGHT}, lambda body: [
    message.get("reasoning_content", "").strip() for message in body["messages"] if message["role"] == "assistant"]
    == ["because", ""] and body["messages"][3]["reasoning_content"], None, {
     "DeepSeek": "The `reasoning_content` in the thinking mode must be passed back to the API.",
     "DeepSeek, before": "Missing `reasoning_content` field in the assistant message at message index 1",
     "Moonshot": "thinking is enabled but reasoning_content is missing in assistant tool call message at index 2"}),
    ("a turn to be continued", {"messages": [HI, turn("assistant", "One")]},
     lambda body: body["messages"][-1] == {"role": "assistant", "content": "One", "prefix": True}, None, {
     "Mistral": "Expected last role User or Tool (or Assistant with prefix True) for serving but got assistant"}),
    ("a turn to be continued by a thinker", {"messages": [HI, turn("assistant", "One")]},
     lambda body: body["chat_template_kwargs"] == {"enable_thinking": False} and roles(body)[-1] == "assistant",
     ({"messages": [HI]}, lambda body: "chat_template_kwargs" not in body), {
     "llama.cpp": "Assistant response prefill is incompatible with enable_thinking."}),
    ("many texts", {"input": [f"t{at:02}" for at in range(25)]}, lambda body: 1 <= len(body["input"]) <= 10, None, {
    "DashScope": "<400> InternalError.Algo.InvalidParameter: Value error, batch size is invalid, it should not be "
                 "larger than 10.: input.contents",
    "SiliconFlow": (413, {"code": 20042, "message": "input batch size 25 > maximum allowed batch size 10"}),
    "TEI": (422, {"error": "batch size 25 > maximum allowed batch size 10", "error_type": "Validation"}),
    "Gemini": [{"error": {"code": 400, "message": "* BatchEmbedContentsRequest.requests: at most 10 requests can be in "
                                                  "one batch\n"}}],
    "Cohere": "invalid request: total number of texts must be at most 10 - received 25",
    "Azure": "Too many inputs. The max number of inputs is 10.  We hope to increase the number of inputs per request "
             "soon.",
    "OpenAI": "Invalid 'input': array too long. Expected an array with maximum length 10, but got an array with length "
              "25 instead.", "Voyage": "The batch size limit is 10. Your batch size is 25.",
    "a limit of one": "Too many inputs for model None. The max number of inputs is 1.",
    "a gateway": (413, {"error": {"message": "at most 10 inputs are allowed in one request"}})}),
    ("too much at once", {"input": [f"t{at:02}" for at in range(25)]},
     lambda body: body["input"] == [f"t{at:02}" for at in range(len(body["input"]))] and len(body["input"]) < 25,
     ({"input": ["a", "b"]}, lambda body: body["input"] == ["a", "b"]), {
     "Mistral": "Too many inputs in request, split into more batches.",
     "Mistral's tokens": "Too many tokens overall, split into more batches.",
     "Mistral, before": "Too many tokens in batch. Max is 16384 got 17555",
     "Voyage": "The max allowed tokens per submitted batch is 120000. Your batch has 121138 tokens after truncation. "
               "Please lower the number of tokens in the batch.",
     "OpenAI": "Requested 400000 tokens, max 300000 tokens per request"}),
    ("a long text", {"input": ["short", WORDS]}, lambda body: body["input"][0] == "short" and len(body["input"]) == 2
     and WORDS.startswith(body["input"][1]) and 200 < len(body["input"][1].split()) < 512,
     ({"input": [WORDS[:2000]]}, lambda body: body["input"] == [WORDS[:2000]]), {
     "llama.cpp": (500, {"error": {"code": 500, "message": "input (992 tokens) is too large to process. increase the "
                         "physical batch size (current batch size: 512)"}}),
     "llama.cpp's context": (400, {"error": {"message": "request (992 tokens) exceeds the available context size (512 "
                                                        "tokens), try increasing it", "n_ctx": 512}}),
     "an older one": (500, {"error": {"message": "input (992 tokens) is larger than the max context size (512 tokens). "
                                                 "skipping"}}),
     "OpenAI": "This model's maximum context length is 512 tokens, however you requested 992 tokens (992 in your "
               "prompt; 0 for the completion). Please reduce your prompt; or completion length.",
     "vLLM": "This model's maximum context length is 512 tokens. However, you requested 992 tokens in the input for "
             "embedding generation. Please reduce the length of the input.",
     "TEI": (413, {"error": "Input validation error: `inputs` must have less than 512 tokens. Given: 992",
                   "error_type": "Validation"}),
     "SGLang": "The input (992 tokens) is longer than the model's context length (512 tokens).",
     "NVIDIA": (400, {"error": "Input length 992 exceeds maximum allowed token size 512"})}),
    ("a text of unknown length", {"input": ["short", WORDS]}, lambda body: body["input"][0] == "short"
     and WORDS.startswith(body["input"][1]) and 0 < len(body["input"][1]) < len(WORDS), (
     {"input": [WORDS[:2000]]}, lambda body: body["input"] == [WORDS[:2000]]), {
     "SiliconFlow": (413, {"code": 20042, "message": "input must have less than 512 tokens", "data": None}),
     "an Ollama": "the input length exceeds the context length",
     "DashScope": "<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 2048]"}),
]
# What the log tells of those that are learned.
FROM_NOW_ON, PLAIN_IDS = "m: the target refuses it otherwise, so from now on ", "tool call ids are at most 40 letters, digits, - and _"
PLAIN_NAMES, JOINED = "tools get names of letters, digits, - and _", "neighbouring turns of one role are joined"
KEPT_SCHEMAS = "schemas of tools hold what Ollama keeps of them"
LEARNED = {
    "a greeting": JOINED, "neighbours": JOINED, "neighbours, one of which calls": JOINED,
    "a late system turn": "all system texts stand in one turn at the beginning",
    "a question behind results": "an assistant turn stands between results and a question",
    "a schema of a tool": KEPT_SCHEMAS, "a tool without parameters": KEPT_SCHEMAS, "a type that is a list": KEPT_SCHEMAS,
    "a turn to be continued": "a turn to be continued is marked as one",
    "an answer without its reasoning": "every assistant turn carries reasoning_content",
    "an unknown role": "unknown roles are system turns", "empty text": "something stands for empty text",
    "ids of calls": ("tool call ids are nine letters or digits", PLAIN_IDS), "long ids of calls": PLAIN_IDS,
    "many texts": "texts for embeddings go out in portions", "names of tools": PLAIN_NAMES,
    "names in a history without tools": PLAIN_NAMES, "names that begin with a digit": PLAIN_NAMES,
    "no schemas for answers": "a schema is asked for in words",
    "streams": "whole answers are asked for and given as streams",
    "whole answers": "streams are asked for and given as whole answers",
    "system turns": "system texts are told by the user", "the greatest effort": "effort max is sent as high"}
WORDINGS = [(*row[:4], text) for row in OTHERWISE for text in row[4].values()]


@cases("name, request_, fits, later, text", WORDINGS,
       ids=[f"{row[0]}: {who}" for row in OTHERWISE for who in row[4]])
def test_a_refusal_is_understood_in_every_servers_words_and_learned_from_once(
        start, target, name, request_, fits, later, text):
    path = "/v1/embeddings" if "input" in request_ else "/v1/chat/completions"
    target.answers[path] = reluctant(text)
    proxy = start("--target-api", "openai")
    answered(proxy, request_)
    first, second = [request.json for request in target.calls(path)[:2]]
    assert fits(second), second
    for message in request_.get("messages", ()):            # nothing that the model reads is lost
        assert message.get("content", "").strip() in said(second)
    assert len(second.get("tools", ())) == len(request_.get("tools", ()))
    assert json.dumps(second).count(PICTURE) == json.dumps(request_).count(PICTURE)
    asked = len(target.calls(path))
    if later is not None:                                   # what was not proved is not remembered
        again, right = later
        answered(proxy, again)
        assert len(target.calls(path)) == asked + 1 and right(target.calls(path)[-1].json), target.calls(path)[-1].json
        return
    answered(proxy, request_)
    assert target.calls(path)[asked].json == second
    if "messages" in request_:
        answered(proxy, {"messages": [turn("user", "plain")], **({} if first["stream"] else {"stream": False})})
        plain = target.calls(path)[-1].json
        assert plain["messages"] == [{"role": "user", "content": "plain"}] and len(target.calls(path)) == asked + 2
    learned = LEARNED[name] if isinstance(LEARNED[name], tuple) else (LEARNED[name],)
    assert lessons_in(proxy) in [[FROM_NOW_ON + words] for words in learned], proxy.errors


def unsupported(key):
    return {"error": {"message": f"Unsupported parameter: {key}", "param": key}}


@cases("request_, error, words", [
    ({"tools": [a_tool()], "format": FORMAT}, "json mode cannot be combined with tool/function calling",
     "a format beside tools is asked for in words"),
    ({"format": "json"}, "'response_format.type' must be 'json_schema' or 'text'", "JSON mode is asked for as a schema"),
    ({"format": "json"}, unsupported("response_format"), "JSON mode is asked for as a schema"),
    ({"format": FORMAT}, "unsupported JSON schema", "a schema that its grammar refuses is asked for in words"),
    ({"tools": [a_tool()]}, "Function tools with reasoning_effort are not supported. Please set reasoning_effort to 'none'.",
     "reasoning_effort none is sent with tools"),
    ({"input": ["x"] * 9}, "Too many tokens in batch.", "texts for embeddings go out in portions of 8"),
    ({"options": {"num_predict": 5}}, "Use 'max_completion_tokens' instead.", "max_completion_tokens is sent for max_tokens"),
    ({"options": {"num_predict": 5}}, unsupported("max_tokens"), "max_completion_tokens is sent for max_tokens"),
    ({"options": {"seed": 5}}, unsupported("seed"), "random_seed is sent for seed"),
    ({"input": ["x"], "dimensions": 5}, unsupported("dimensions"), "output_dimension is sent for dimensions"),
    ({"options": {"stop": list("abcde")}}, unsupported("stop"), "four stop strings are sent, the others watched for here"),
    ({"tools": [{"function": {"name": "f", "strict": True}}]}, "Unknown parameter: strict", "strict is left out of tools"),
    ({"options": {"top_k": 5}}, unsupported("top_k"), "top_k is left out")])
def test_what_is_learned_of_a_target_is_told_in_the_log(start, target, request_, error, words):
    refusal = error if isinstance(error, str) else (400, error)
    target.answers["/v1/embeddings" if "input" in request_ else "/v1/chat/completions"] = reluctant(refusal)
    proxy = start("--target-api", "openai")
    answered(proxy, request_ if "input" in request_ else {"messages": [HI], **request_})
    assert lessons_in(proxy) == [FROM_NOW_ON + words]


def test_details_that_a_target_gave_and_does_not_take_are_left_out(start, target):
    thought = delta(reasoning_details=[{"type": "reasoning.text", "text": "hm"}])
    called_ = http_stream(sse(thought, call_delta({"index": 0, "id": "call_1", **part("f", "{}")}), TOOLS_END))
    target.answers["/v1/chat/completions"] = [called_, reluctant((400, unsupported("reasoning_details")))]
    proxy = start("--target-api", "openai")
    proxy.post("/api/chat", CHAT)
    answered(proxy, {"messages": [HI, calling(("f", {}, "call_1")), result("r", tool_call_id="call_1")]})
    assert lessons_in(proxy) == [f"{FROM_NOW_ON}reasoning_details is left out"]
    sent = [str(request.json) for request in target.calls("/v1/chat/completions")]
    assert ["reasoning_details" in text for text in sent] == [False, True, False]


@cases("request_, refusals, words", [
    ({"messages": [HI], "options": {"num_predict": 5}}, [unsupported("max_tokens"), unsupported("max_completion_tokens")],
     ["max_completion_tokens is sent for max_tokens", "max_tokens is sent for max_completion_tokens"]),
    ({"messages": THOUGHT}, [{"error": "Missing `reasoning_content` field"}, unsupported("reasoning_content")],
     [LEARNED["an answer without its reasoning"], "reasoning_content is left out"])])
def test_what_is_learned_and_taken_back_is_told_as_well(start, target, request_, refusals, words):
    target.answers["/v1/chat/completions"] = reluctant(*((400, refusal) for refusal in refusals))
    proxy = start("--target-api", "openai")
    answered(proxy, request_)
    assert lessons_in(proxy) == [FROM_NOW_ON + one for one in words]


FULL = {"messages": [SYSTEM, turn("user", "look", images=[PICTURE]), turn("user", ""), *CALLED[1:], HI],
        "tools": [a_tool("look.up")], "format": FORMAT, "options": {"num_predict": 100000, "temperature": 0.5}}
ELSEWHERE = [   # refusals that are about something else: nothing that the model reads may change
    (400, "At most 1 image(s) may be provided in one prompt."),
    (400, "Too many images provided. This model supports up to 5 images"),
    (400, "messages.0.content.1.image.source.base64.data: At least one of the image dimensions exceed max allowed "
          "size: 8000 pixels"),
    (413, "Request too large for model `m` in organization `org_x` service tier `on_demand` on tokens per minute "
          "(TPM): Limit 8000, Requested 8590, please reduce your message size and try again."),
    (400, "The input token count (1500000) exceeds the maximum number of tokens allowed (1048576)."),
    (400, "Request payload size exceeds the limit: 20971520 bytes."),
    (429, "Rate limit reached for m: at most 10 requests per minute"),
    (400, "prompt is too long: 205000 tokens > 200000 maximum"),
    (400, "A maximum of 4 blocks with cache_control may be provided. Found 5."),
    (400, "Invalid 'tools': array too long. Expected an array with maximum length 128, but got an array with length "
          "200 instead."),
    (400, "Invalid 'messages[0].content': string too long. Expected a string with maximum length 1048576, but got a "
          "string with length 1200000 instead."),
    (400, "Invalid 'tools[0].function.description': string too long. Expected a string with maximum length 1024, but "
          "got a string with length 1100 instead."),
    (400, "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. "
          "The following tool_call_ids did not have response messages: call_1"),
    (400, "Invalid parameter: 'tool_call_id' of 'call_1' not found in 'tool_calls' of previous message."),
    (400, "messages.1.content.0: unexpected `tool_use_id` found in `tool_result` blocks: toolu_01. Each `tool_result` "
          "block must have a corresponding `tool_use` block in the previous message."),
    (400, "Function call is missing a thought_signature in functionCall parts. This is required for tools to work "
          "correctly"),
    (400, "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."),
    (400, "This model does not support tools."), (400, "This model does not support function calling."),
    (400, "This model does not support assistant message prefill. The conversation must end with a user message."),
    (400, "Your credit balance is too low to access the API. Please go to Plans & Billing to upgrade."),
    (400, "Invalid model name passed in model=m. Call `/v1/models` to view available models for your key."),
    (401, "Incorrect API key provided"), (403, "Your organization must be verified to use the model `m`."),
    (402, "This request requires more credits, or fewer max_tokens. You requested up to 100000 tokens, but can only "
          "afford 900."),
    (500, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB"),
    (500, "Internal Server Error"), (500, "Failed to load model"), (503, "Service temporarily overloaded"),
    (500, "KeyError: 'messages'"), (502, "Bad gateway")]


@cases("status, text", ELSEWHERE)
def test_a_refusal_about_something_else_changes_nothing_that_the_model_reads(start, target, status, text):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": text}}, status)
    answer = start("--target-api", "openai").post("/api/chat", {"model": "m", **FULL})
    assert answer.status >= 400 and text in json.loads(answer.data)["error"]
    first, *others = [request.json for request in target.calls("/v1/chat/completions")]
    for other in others:
        assert [other.get(key) for key in ("messages", "tools", "response_format", "temperature", "stream")] == \
            [first.get(key) for key in ("messages", "tools", "response_format", "temperature", "stream")]
        assert other.get("max_tokens", other.get("max_completion_tokens", 100000)) == 100000
    assert len(others) <= 1


ELSEWHERE_THAN_TEXTS = [
    (400, "The max allowed tokens per submitted batch is 120000. Your batch has 121138 tokens after truncation. Please "
          "lower the number of tokens in the batch."),
    (400, "Requested 400000 tokens, max 300000 tokens per request"), (400, "The model `m` does not support embeddings"),
    (400, "This model does not support specifying dimensions."),
    (429, "Too many requests: at most 3 requests per second"),
    (400, "Invalid value for 'dimensions' = 5000. Must be less than or equal to 3072."), (500, "Internal Server Error"),
    (500, "ggml_backend_alloc_ctx_tensors_from_buft: failed to allocate buffer: out of memory"),
    (501, "This server does not support embeddings. Start it with `--embeddings`")]


@cases("status, text", ELSEWHERE_THAN_TEXTS)
def test_texts_are_not_cut_for_another_reason(start, target, status, text):
    target.answers["/v1/embeddings"] = http_answer({"error": {"message": text}}, status)
    body = {"model": "m", "dimensions": 5000, "input": ["a", WORDS]}
    answer = start("--target-api", "openai").post("/api/embed", body)
    assert answer.status >= 400 and text in json.loads(answer.data)["error"]
    assert {item for request in target.calls("/v1/embeddings") for item in request.json["input"]} <= {"a", WORDS}


@cases("status, text, request_", [
    (400, "Conversation roles must alternate user/assistant/user/assistant/...", {"messages": [HI]}),
    (500, "System message must be at the beginning.", {"messages": [SYSTEM, HI]}),
    (400, "System role not supported", {"messages": [HI]}), (400, "Unknown role: user", {"messages": [HI]}),
    (400, "messages: text content blocks must be non-empty", {"messages": [HI]}),
    (400, "Invalid 'tools[0].function.name': string does not match pattern.", {"messages": [HI], "tools": [a_tool()]}),
    (400, "messages.1.content.0.tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'", {"messages": [HI]}),
    (400, "Expected last role User or Tool (or Assistant with prefix True)", {"messages": [HI]}),
    (400, "Unexpected role 'user' after role 'tool'", {"messages": [HI]}),
    (400, "failed to parse grammar", {"messages": [HI], "tools": [a_tool()]}),
    (400, "Streaming is not supported", {"messages": [HI], "stream": False}),
    (400, "batch size is invalid, it should not be larger than 10", {"input": ["a", "b"]}),
    (400, "input is too large to process", {"input": [""]})], ids=lambda value: str(value)[:40])
def test_a_request_is_not_sent_again_as_it_was(start, target, status, text, request_):
    path = "/v1/embeddings" if "input" in request_ else "/v1/chat/completions"
    target.answers[path] = http_answer({"error": {"message": text}}, status)
    face = "/api/embed" if "input" in request_ else "/api/chat"
    answer = start("--target-api", "openai").post(face, {"model": "m", **request_})
    assert answer.status == status and json.loads(answer.data) == {"error": text}
    assert len(target.calls(path)) == 1


def test_a_bound_is_the_whole_number_that_is_written(start, target):
    target.answers["/v1/chat/completions"] = reluctant("max_tokens: the model takes at most 8,192 completion tokens")
    answered(start("--target-api", "openai"), {"messages": [HI], "options": {"num_predict": 100000}})
    assert target.calls("/v1/chat/completions")[-1].json.get("max_tokens", 8192) == 8192


def test_two_lessons_of_one_request_are_logged_once_each(start, target):
    target.answers["/v1/chat/completions"] = reluctant(
        "System role not supported", "Unsupported parameter: 'temperature' is not supported with this model.")
    proxy = start("--target-api", "openai")
    for _ in range(3):
        answered(proxy, {"messages": [SYSTEM, HI], "options": {"temperature": 0.5}})
    assert len(target.calls("/v1/chat/completions")) == 5
    first, second = lessons_in(proxy)
    assert first == FROM_NOW_ON + LEARNED["system turns"] and second == f"{FROM_NOW_ON}temperature is left out"


def test_a_lesson_is_one_models_and_one_endpoints(start, target):
    target.answers["/v1/chat/completions"] = reluctant("System role not supported")
    target.answers["/v1/completions"] = http_answer({"choices": [{"text": "x", "finish_reason": "stop"}]})
    proxy = start("--target-api", "openai")
    answered(proxy, {"messages": [SYSTEM, HI]})
    proxy.post("/api/chat", {"model": "qwen3:8b", "stream": False, "messages": [SYSTEM, HI]})
    assert roles(target.calls("/v1/chat/completions")[-1].json) == ["system", "user"]
    proxy.post("/api/generate", {"model": "m", "stream": False, "system": "Be brief.", "prompt": "hi"})
    assert roles(target.calls("/v1/chat/completions")[-1].json) == ["user"]
    proxy.post("/v1/chat/completions", {"model": "m", "messages": [SYSTEM, HI]})
    assert roles(target.calls("/v1/chat/completions")[-1].json) == ["system", "user"]       # relayed as it is


def test_a_guess_is_forgotten_though_every_refusal_has_a_number_of_its_own(start, target):
    seen = []

    def script(talk):
        body, talk.released = talk.request.json, True
        seen.append(body)
        text = f"temperature is fine but min_p is not supported. Request id: {len(seen)}"
        talk.send(http_answer({"error": {"message": text}}, 400) if "min_p" in body else fitting(talk.request))

    target.answers["/v1/chat/completions"] = script
    proxy = start("--target-api", "openai")
    answered(proxy, {"messages": [HI], "options": {"temperature": 0.2, "min_p": 0.1}})
    answered(proxy, {"messages": [HI], "options": {"temperature": 0.2}})
    assert seen[-1].get("temperature") == 0.2


@cases("face", ["/api/chat", "/api/generate"])
def test_the_client_is_told_what_the_most_healed_request_was_refused_for(start, target, face):
    target.answers["/v1/chat/completions"] = [
        http_answer({"error": {"message": "`reasoning_effort` is not supported with this model"}}, 400),
        http_answer({"error": {"message": "Your credit balance is too low"}}, 402)]
    proxy = start("--target-api", "openai")
    body = {"model": "m", "think": "high", **({"prompt": "hi"} if face == "/api/generate" else {"messages": [HI]})}
    answer = proxy.post(face, body)
    assert answer.status == 402 and json.loads(answer.data) == {"error": "Your credit balance is too low"}
    assert "reasoning_effort" not in target.calls("/v1/chat/completions")[1].json and not lessons_in(proxy)


AGENTS = [      # what coding agents send
    ("/v1/messages", {"max_tokens": 100000, "system": "Be brief.", "messages": [HI], "thinking": {"type": "adaptive"},
                      "output_config": {"effort": "high"},
                      "tools": [{"name": "look.up", "input_schema": {"type": "object"}}]}),
    ("/v1/responses", {"max_output_tokens": 100000, "instructions": "Be brief.", "input": "hi",
                       "reasoning": {"effort": "high"},
                       "tools": [{"type": "function", "name": "look.up", "parameters": {"type": "object"}}]})]


@cases("path, body", AGENTS, ids=[row[0] for row in AGENTS])
def test_requests_of_coding_agents_are_healed_as_all_others(start, target, path, body):
    target.answers["/v1/chat/completions"] = reluctant(
        "System role not supported", "Invalid 'tools[0].function.name': string does not match pattern.",
        "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]")
    proxy = start("--target-api", "openai", "--translate", "always")
    for count in (4, 6):                # names and system texts are learned, a limit is each request's own
        assert proxy.post(path, {"model": "m", **body}).status == 200
        sent = target.calls("/v1/chat/completions")[-1].json
        assert "system" not in roles(sent) and "Be brief." in said(sent) and re.fullmatch(NAME, names_in(sent)[0])
        assert sent["max_tokens"] == 8192 and len(sent["tools"]) == 1
        target.answers["/v1/chat/completions"] = reluctant("the valid range of max_tokens is [1, 8192]")
        assert len(target.calls("/v1/chat/completions")) == count
    assert len(lessons_in(proxy)) == 2


@cases("path, body", AGENTS, ids=[row[0] for row in AGENTS])
def test_a_coding_agent_is_told_what_its_most_healed_request_was_refused_for(start, target, path, body):
    target.answers["/v1/chat/completions"] = [
        http_answer({"error": {"message": "`reasoning_effort` is not supported with this model"}}, 400),
        http_answer({"error": {"message": "Your credit balance is too low"}}, 402)]
    answer = start("--target-api", "openai", "--translate", "always").post(path, {"model": "m", **body})
    assert answer.status == 402 and json.loads(answer.data)["error"]["message"] == "Your credit balance is too low"


def test_tools_get_names_that_a_target_takes_and_their_own_ones_back(start, target):
    shown = []

    def script(talk):
        talk.released = True
        names = names_in(talk.request.json)
        if not all(re.fullmatch(NAME, name) for name in names):
            text = "Invalid 'tools[0].function.name': string does not match pattern. Expected '^[a-zA-Z0-9_-]+$'."
            return talk.send(http_answer({"error": {"message": text}}, 400))
        shown.append(names)
        calls = [part(name, "{}", index=at, id=f"call_{at}") for at, name in enumerate(names[:4])]
        talk.send(http_stream(sse(call_delta(*calls), TOOLS_END)) if talk.request.json["stream"] else http_answer(
            {"choices": [{"message": {"content": None, "tool_calls": calls}, "finish_reason": "tool_calls"}]}))

    target.answers["/v1/chat/completions"] = script
    proxy = start("--target-api", "openai")
    names = ["a.b", "a/b", "a_b", "n" * 70]
    asked = {"model": "m", "tools": list(map(a_tool, names)), "messages": [turn("user", "go")]}
    for stream in (True, False, True):
        answer = proxy.post("/api/chat", {**asked, "stream": stream})
        turns = [json.loads(line)["message"] for line in answer.data.splitlines()]
        calls = [call for message in turns for call in message.get("tool_calls", ())]
        assert [call["function"]["name"] for call in calls] == names
        asked["messages"] += [turn("assistant", "", tool_calls=calls)] + [
            result("r", tool_name=name) for name in names]
    assert len(target.calls("/v1/chat/completions")) == 4           # one refusal, one lesson
    assert shown[-1][:4] == shown[-1][4:8] == shown[-1][8:12] and len(set(shown[-1])) == 4 and "a_b" in shown[-1]
    assert len(lessons_in(proxy)) == 1


@cases("face", ["/api/chat", "/api/generate"])
@cases("stream", [True, False])
@cases("refusal, mode", [("Streaming is not supported for this model", False),
                         ("This model only support stream mode, please enable the stream parameter", True)],
       ids=["never", "always"])
def test_a_client_gets_the_form_it_asked_for_from_a_target_that_has_one(start, target, face, stream, refusal, mode):
    def script(talk):
        talk.released = True
        talk.send(http_answer({"error": {"message": refusal}}, 400) if talk.request.json["stream"] is not mode
                  else fitting(talk.request))

    target.answers["/v1/chat/completions"] = script
    proxy = start("--target-api", "openai")
    body = {"model": "m", "stream": stream, **({"prompt": "hi"} if face == "/api/generate" else {"messages": [HI]})}
    for count in (1 + (stream is not mode), 2 + (stream is not mode)):
        answer = proxy.post(face, body)
        values = [json.loads(line) for line in answer.data.splitlines()]
        assert answer.headers["Content-Type"].startswith("application/x-ndjson" if stream else "application/json")
        assert "".join(value.get("response", value.get("message", {}).get("content")) for value in values) == "Hello"
        assert values[-1]["done"] is True and values[-1]["eval_count"] == 2 and len(values) > 1 or not stream
        assert len(target.calls("/v1/chat/completions")) == count
    assert ("stream_options" in target.calls("/v1/chat/completions")[-1].json) is mode


@cases("text, words", [
    ("No endpoints found that support tool use. To learn more about provider routing, visit: https://x", "tools"),
    ("No endpoints found that support image input", "images"), ("Tool use is not supported by this model", "tools"),
    ("No endpoints found that support the provided 'tool_choice' value. To learn more, visit: https://x", "tools")])
def test_a_404_that_is_about_tools_or_pictures_is_a_400_for_ollama_clients_alone(start, target, text, words):
    body = {"error": {"message": text, "code": 404}}
    target.answers["/v1/chat/completions"] = http_answer(body, 404)
    proxy = start("--target-api", "openai")
    request = {"model": "m", "messages": [turn("user", "hi", images=[PICTURE])], "tools": [a_tool()]}
    answer = proxy.post("/api/chat", request)
    told = json.loads(answer.data)["error"]
    assert answer.status == 400 and told == f"{text} (the model does not support {words})"
    assert all("tools" in sent.json and PICTURE in sent.data.decode() for sent in target.calls("/v1/chat/completions"))
    answer = proxy.post("/v1/chat/completions", {**request, "messages": [HI]})
    assert answer.status == 404 and json.loads(answer.data) == body


@cases("text", ["The model `m` does not exist or you do not have access to it.", "Model m not found",
                "No endpoints found for m."])
def test_a_404_about_the_model_stays_one(start, target, text):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": text}}, 404)
    answer = start("--target-api", "openai").post("/api/chat", {"model": "m", "messages": [HI], "tools": [a_tool()]})
    assert answer.status == 404 and json.loads(answer.data) == {"error": text}


# -- texts to embed


def meter(most=10 ** 9, longest=10 ** 9):
    """A target that takes so many texts in one request, of so many words; a vector tells which text it is of."""
    def script(talk):
        talk.released = True
        texts = talk.request.json["input"]
        count = max((len(text.split()) for text in texts), default=0)
        if len(texts) > most:
            return talk.send(http_answer({"error": {"message": f"at most {most} inputs are allowed"}}, 413))
        if count > longest:
            text = f"input ({count} tokens) is too large to process. increase the physical batch size (current batch " \
                   f"size: {longest})"
            return talk.send(http_answer({"error": {"message": text}}, 500))
        talk.send(http_answer({"data": [{"index": at, "embedding": [float(text.split()[0][1:]), 0.5]}
                                        for at, text in reversed(list(enumerate(texts)))],
                               "usage": {"prompt_tokens": len(texts) * 3, "total_tokens": len(texts) * 3}}))
    return script


@cases("count", [9, 10, 11, 20, 25])
@cases("truncate", [None, True, False])
def test_texts_in_portions_keep_their_order_and_counts_add_up(start, target, count, truncate):
    target.answers["/v1/embeddings"] = meter(most=10)
    proxy = start("--target-api", "openai")
    body = {"model": "m", "input": [f"t{at}" for at in range(count)], "truncate": truncate}
    portions = -(-count // 10)
    for asked in (portions + (count > 10), 2 * portions + (count > 10)):        # refused once, then right at once
        answer = json.loads(proxy.post("/api/embed", body).data)
        assert [vector[0] for vector in answer["embeddings"]] == list(range(count))
        assert answer["prompt_eval_count"] == 3 * count and len(target.calls("/v1/embeddings")) == asked
    assert len(lessons_in(proxy)) == (count > 10)


def test_portions_whose_vectors_are_missing_are_an_error(start, target):
    def script(talk):
        talk.released = True
        texts = talk.request.json["input"]
        error = {"error": {"message": "batch size is invalid, it should not be larger than 10.: input.contents"}}
        vectors = [{"index": at, "embedding": [1.0]} for at in range(min(len(texts), 9))]
        talk.send(http_answer(error, 400) if len(texts) > 10 else http_answer({"data": vectors}))

    target.answers["/v1/embeddings"] = script
    answer = start("--target-api", "openai").post("/api/embed", {"model": "m", "input": ["x"] * 25})
    assert answer.status == 502 and "9 embeddings for 10 inputs" in json.loads(answer.data)["error"]


@cases("path", ["/api/embed", "/api/embeddings"])
def test_a_text_is_cut_as_often_as_it_takes_from_its_end(start, target, path):
    """The beginning of the text has shorter words than the rest, so that the first cut is not deep enough."""
    target.answers["/v1/embeddings"] = meter(longest=100)
    text = "t7 " + "a " * 150 + "longer_words_than_these " * 150
    proxy = start("--target-api", "openai")
    body = {"model": "m", "prompt": text} if path == "/api/embeddings" else {"model": "m", "input": ["t1", text, "t3"]}
    answer = proxy.post(path, body)
    assert answer.status == 200, answer.data
    sent = target.calls("/v1/embeddings")[-1].json["input"]
    cut = sent[0 if path == "/api/embeddings" else 1]
    assert text.startswith(cut) and 30 < len(cut.split()) <= 100
    assert path == "/api/embeddings" or (sent[0], sent[2]) == ("t1", "t3")
    assert not lessons_in(proxy)


def test_texts_are_cut_inside_portions(start, target):
    target.answers["/v1/embeddings"] = meter(most=10, longest=100)
    texts = [f"t{at} " + "word " * (300 if at == 17 else 3) for at in range(25)]
    answer = json.loads(start("--target-api", "openai").post("/api/embed", {"model": "m", "input": texts}).data)
    assert [vector[0] for vector in answer["embeddings"]] == list(range(25)) and answer["prompt_eval_count"] == 75


@cases("path, body", [("/api/embed", {"input": ["t1", "t2 " + WORDS]}), ("/api/embed", {"input": "t2 " + WORDS})])
def test_truncate_false_is_never_cut(start, target, path, body):
    target.answers["/v1/embeddings"] = meter(longest=512)
    answer = start("--target-api", "openai").post(path, {"model": "m", "truncate": False, **body})
    assert answer.status >= 400 and "too large to process" in json.loads(answer.data)["error"]
    assert all("t2 " + WORDS in request.json["input"] for request in target.calls("/v1/embeddings"))


# -- the middle of a text

INFILL = {"/props": {"default_generation_settings": {"n_ctx": 8192}, "total_slots": 1},
          "/v1/models": {"object": "list", "data": [{"id": "m", "owned_by": "llamacpp", "meta": {"n_ctx": 8192}}]}}
FILL = {"model": "m", "prompt": "def add(a, b):\n    return ", "suffix": "\n\nprint(add(1, 2))"}


@cases("stream", [True, False])
@cases("stop_type, reason", [("eos", "stop"), ("limit", "length"), ("word", "stop")])
def test_the_middle_of_a_text_is_filled_where_llama_cpp_fills_it(start, target, stream, stop_type, reason):
    target.answers.update((path, http_answer(value)) for path, value in INFILL.items())
    last = {"index": 0, "stop": True, "stop_type": stop_type, "tokens_predicted": 3, "tokens_evaluated": 9}
    streamed = sse({"index": 0, "content": "a +", "stop": False}, {"index": 0, "content": " b", "stop": False},
                   {**last, "content": ""}, done=False)
    target.answers["/infill"] = http_stream(streamed) if stream else http_answer({**last, "content": "a + b"})
    proxy = start("--target-api", "openai")
    proxy.get("/api/tags")
    answer = proxy.post("/api/generate", {**FILL, "stream": stream, "options": {"num_predict": 16, "temperature": 0.5}})
    values = [json.loads(line) for line in answer.data.splitlines()]
    assert "".join(value["response"] for value in values) == "a + b" and values[-1]["done_reason"] == reason
    assert (values[-1]["prompt_eval_count"], values[-1]["eval_count"]) == (9, 3)
    sent = target.calls("/infill")[0].json
    assert (sent["input_prefix"], sent["input_suffix"]) == (FILL["prompt"], FILL["suffix"])
    assert sent["n_predict"] == 16 and sent["temperature"] == 0.5 and sent["stream"] is stream
    assert not target.calls("/v1/completions")


def test_other_targets_get_a_suffix_and_one_that_takes_none_is_an_honest_error(start, target):
    target.answers["/v1/completions"] = [http_answer({"choices": [{"text": "a + b", "finish_reason": "stop"}]}),
                                         http_answer({"error": {"message": "Unsupported param: suffix"}}, 400)]
    proxy = start("--target-api", "openai")
    assert json.loads(proxy.post("/api/generate", {**FILL, "stream": False}).data)["response"] == "a + b"
    answer = proxy.post("/api/generate", {**FILL, "stream": False})
    assert answer.status == 400 and "suffix" in json.loads(answer.data)["error"]
    assert all(request.json["suffix"] == FILL["suffix"] for request in target.calls("/v1/completions"))


def test_x13_context_overflow_is_tried_once_without_a_limit(start, target):
    overflow = http_answer({"error": {"message": "This model's maximum context length is 100 tokens"}}, 400)
    target.answers["/v1/chat/completions"] = [overflow, http_stream(HELLO)]
    proxy = start()
    assert proxy.lines("/api/chat", {**CHAT, "options": {"num_predict": 5}})[-1]["done"]
    assert "max_tokens" not in target.calls("/v1/chat/completions")[1].json
    proxy.lines("/api/chat", {**CHAT, "options": {"num_predict": 5}})
    assert target.calls("/v1/chat/completions")[2].json["max_tokens"] == 5          # no lesson for good
    target.answers["/v1/chat/completions"] = overflow
    assert proxy.post("/api/chat", CHAT).status == 400 and len(target.calls("/v1/chat/completions")) == 4


TOO_MUCH = [    # a prompt and a limit that do not fit together
    "This model's maximum context length is 8192 tokens. However, you requested 100062 tokens (62 in the messages, "
    "100000 in the completion). Please reduce the length of the messages or completion.",
    "'max_tokens' or 'max_completion_tokens' is too large: 100000. This model's maximum context length is 64001 tokens "
    "and your request has 24235 input tokens (100000 > 64001 - 24235). None",
    "You passed 400 input tokens and requested 100000 output tokens. However, the model's context length is only 2048 "
    "tokens, resulting in a maximum input length of 3 tokens.",
    "This endpoint's maximum context length is 131072 tokens. However, you requested about 195000 tokens (95000 of "
    "text input, 100000 in the output).",
    "max_tokens: 100000 > context_window: 200000 - input_tokens: 190000 = available_tokens: 10000",
    "input length and `max_tokens` exceed context limit: 188240 + 100000 > 200000, decrease input length or "
    "`max_tokens` and try again",
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193. Given: 5000 `inputs` tokens and "
    "100000 `max_new_tokens`",
    "request (9000 tokens) exceeds the available context size (8192 tokens), try increasing it"]


@cases("text", TOO_MUCH)
def test_a_limit_that_does_not_fit_beside_the_prompt_is_lowered_or_left_out_once(start, target, text):
    target.answers["/v1/chat/completions"] = reluctant(text)
    proxy = start("--target-api", "openai")
    answered(proxy, {"messages": [HI], "options": {"num_predict": 100000}})
    sent = target.calls("/v1/chat/completions")[-1].json
    assert len(target.calls("/v1/chat/completions")) == 2
    assert "max_completion_tokens" not in sent and sent.get("max_tokens", 1) < 100000
    answered(proxy, {"messages": [HI], "options": {"num_predict": 50}})
    assert target.calls("/v1/chat/completions")[-1].json.get("max_tokens") == 50 and not lessons_in(proxy)


@cases("error, headers, times", [({"error": {"message": "Loading model", "code": 503}}, (), 1),
                                 ({"error": {"code": "model_loading", "message": "wait"}}, ("Retry-After: 0",), 2)])
def test_x14_x15_a_loading_server_is_waited_for(start, target, error, headers, times):
    busy = http_answer(error, 503, "application/json", *headers)
    target.answers["/v1/chat/completions"] = [busy] * times + [http_stream(HELLO)]
    assert start().lines("/api/chat", CHAT)[-1]["done"]


def test_a_busy_server_is_not_asked_again(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"error": "Server is busy"}, 503)
    assert start().post("/api/chat", CHAT).status == 503 and len(target.calls("/v1/chat/completions")) == 1


def test_x16_what_a_provider_attached_to_a_call_goes_back_with_it(start, target):
    signature = {"google": {"thought_signature": "sig"}}
    details = [{"type": "reasoning.text", "text": "a", "index": 0}, {"type": "reasoning.text", "text": "b", "index": 0}, {"type": "reasoning.encrypted", "data": "X", "index": 1}]
    target.answers["/v1/chat/completions"] = http_stream(sse(
        *[delta(reasoning_details=[piece]) for piece in details],
        call_delta({"index": 0, "id": "call_g", "extra_content": signature, **part("f", "{}")}), TOOLS_END))
    proxy = start()
    call = next(value["message"]["tool_calls"][0] for value in proxy.lines("/api/chat", CHAT) if "tool_calls" in value["message"])
    assert call == {"id": "call_g", "function": {"index": 0, "name": "f", "arguments": {}}}
    proxy.lines("/api/chat", {"model": "m", "messages": CHAT["messages"] + [{"role": "assistant", "tool_calls": [call]}, result("r", tool_call_id="call_g")]})
    sent = target.calls("/v1/chat/completions")[-1].json["messages"][1]
    assert sent["tool_calls"][0]["extra_content"] == signature
    assert sent["reasoning_details"] == [{"type": "reasoning.text", "text": "ab", "index": 0}, {"type": "reasoning.encrypted", "data": "X", "index": 1}]
    assert "reasoning_content" not in sent


def test_reasoning_of_earlier_turns_goes_back_where_it_is_demanded(start, target):
    target.answers["/v1/chat/completions"] = [http_answer({"error": {"message": "Missing `reasoning_content` field in the assistant message"}}, 400), http_stream(HELLO)]
    turns = CHAT["messages"] + [{"role": "assistant", "content": "b", "thinking": "c"}, {"role": "user", "content": "d"}]
    assert start().lines("/api/chat", {"model": "m", "messages": turns})[-1]["done"]
    assert target.calls("/v1/chat/completions")[1].json["messages"][1]["reasoning_content"]
    call = parse_ollama_chat({"model": "m", "messages": turns})
    assert render_openai_chat(call, proxy_module.PRESETS["deepseek"].habits).body["messages"][1]["reasoning_content"] == "c"


def test_a_model_seen_thinking_is_listed_as_one(start, target):
    target.answers["/v1/chat/completions"] = http_stream(sse(delta(reasoning_content="hm"), delta("ok"), STOP))
    proxy = start()
    assert "thinking" not in json.loads(proxy.post("/api/show", {"model": "m"}).data)["capabilities"]
    proxy.lines("/api/chat", CHAT)
    assert "thinking" in json.loads(proxy.post("/api/show", {"model": "m"}).data)["capabilities"]


def test_a_model_that_opens_its_tag_in_the_template_is_learned(start, target):
    target.answers["/v1/chat/completions"] = [http_answer({"choices": [{"message": {"content": "hm\n</think>\n\nok"}, "finish_reason": "stop"}]}),
                                              http_stream(sse(delta("h"), delta("m</th"), delta("ink>ok"), STOP))]
    proxy = start()
    answer = json.loads(proxy.post("/api/chat", {**CHAT, "stream": False}).data)
    assert answer["message"] == {"role": "assistant", "content": "ok", "thinking": "hm"}
    values = proxy.lines("/api/chat", CHAT)
    assert "".join(value["message"].get("thinking", "") for value in values) == "hm"
    assert "".join(value["message"]["content"] for value in values) == "ok"


FACTS = {"context_max": "context", "context_now": "context_now", "embedding_length": "embedding_length", "size": "size", "format": "format",
         "family": "family", "parameter_size": "parameter_size", "quantization_level": "quantization", "parent_model": "parent", "running": "running"}
LISTS = [row for row in PRINTED_LISTS if row[0] not in ("L13", "L15")]


@cases("name, body, wanted", LISTS, ids=[row[0] for row in LISTS])
def test_every_model_list_tells_what_it_knows(start, target, name, body, wanted):
    wanted = json.loads(wanted)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    target.answers["/v1/models"] = http_answer(json.loads(body))
    proxy = start("--tag", "none")
    shown = {model["name"]: model for model in proxy.get("/api/tags")["models"]}
    running = {model["name"]: model for model in proxy.get("/api/ps")["models"]}
    infos = {info.id: info for info in read_models(json.loads(body))}
    assert set(shown) == {fact["name"] for fact in wanted}
    for fact in wanted:
        info = infos[fact.get("upstream_id", fact["name"])]
        for key, attribute in FACTS.items():
            if key in fact and key != "running":
                assert getattr(info, attribute) == fact[key], key
        capabilities = shown[fact["name"]]["capabilities"]
        for word in ("vision", "tools", "thinking", "embedding"):
            if word in fact:
                assert (word in capabilities) is fact[word], word
        if "running" in fact:
            assert (fact["name"] in running) is fact["running"]
        if fact.get("running") and "context_now" in fact:
            assert running[fact["name"]]["context_length"] == fact["context_now"]
        if "context_max" in fact:
            info = json.loads(proxy.post("/api/show", {"model": fact["name"]}).data)["model_info"]
            assert info[info["general.architecture"] + ".context_length"] == fact["context_max"]


def test_more_lists_l02_l07_l08_l14_bare_arrays_router_mistral_xai():
    bare = read_models([{"id": "a", "type": "chat", "context_length": 4}, {"id": "b", "type": "image"}, "c"])
    assert [info.id for info in bare] == ["a", "b", "c"] and bare[0].context == 4 and bare[1].traits["other"]
    router = read_models({"data": [{"id": "a", "status": {"value": "loaded", "args": ["llama-server", "--ctx-size", "2048"]}},
                                   {"id": "b", "status": {"value": "unloaded"}}]})
    assert [info.running for info in router] == [True, False] and router[0].context_now == 2048
    mistral = read_models({"data": [{"id": "a", "max_context_length": 9, "capabilities": {"completion_chat": True, "vision": False, "function_calling": True}}]})[0]
    assert mistral.context == 9 and mistral.traits["tools"] is True and mistral.traits["vision"] is False
    assert read_models({"models": [{"id": "x", "input_modalities": ["text", "image"], "aliases": []}]})[0].traits["vision"] is True
    assert read_models({"data": None}) == [] and read_models({"error": "x"}) is None and read_models("x") is None


def test_a_model_that_cannot_chat_does_not_say_so(start, target):
    target.answers["/v1/models"] = http_answer({"data": [
        {"id": name, "owned_by": "mistralai", "capabilities": {"completion_chat": able, "completion_fim": True}}
        for name, able in (("chat", True), ("code", False))]})
    models = start("--target-api", "openai").get("/api/tags")["models"]
    shown = {model["name"]: model["capabilities"] for model in models}
    assert "completion" in shown["chat:latest"] and "completion" not in shown["code:latest"]


def test_parameter_sizes_are_written_as_ollama_writes_them(start, target):
    wanted = {494032768: "494.03M", 8030261248: "8.0B", 7000000000: "7B", 137000000: "137M", 22000: "22K"}
    entries = [{"id": str(size), "meta": {"n_params": size}} for size in wanted]
    target.answers["/v1/models"] = http_answer({"data": entries})
    models = start("--target-api", "openai").get("/api/tags")["models"]
    assert {int(model["name"].split(":")[0]): model["details"]["parameter_size"] for model in models} == wanted


PROBED = [
    ("lmstudio v1", "organization_owner", {"/api/v1/models": {"models": [{"key": "m", "type": "llm", "max_context_length": 9000, "architecture": "gem", "capabilities": {"vision": True}}]}}, (9000, "vision")),
    ("lmstudio v0", "organization_owner", {"/api/v1/models": {"error": "Unexpected endpoint or method. (GET /api/v1/models)"},
                                           "/api/v0/models": {"data": [{"id": "m", "arch": "gem", "state": "loaded", "type": "vlm", "max_context_length": 9000}]}}, (9000, "vision")),
    ("llama.cpp props", "llamacpp", {"/props": {"default_generation_settings": {"n_ctx": 9000}, "modalities": {"vision": True}, "chat_template": "tpl"}}, (9000, "vision")),
    ("litellm", "openai", {"/model/info": {"data": [{"model_name": "m", "model_info": {"max_input_tokens": 9000, "supports_vision": True, "mode": "chat"}}]}}, (9000, "vision")),
    ("L15 sglang", "sglang", {"/model_info": {"model_type": "qwen3_vl", "has_image_understanding": True, "reasoning_parser": "qwen3"}}, (None, "thinking")),
    ("L14 tgi", "m", {"/info": {"model_id": "m", "max_total_tokens": 9000, "router": "text-generation-router"}},
     (9000, "completion")),
]


@cases("name, owner, answers, wanted", PROBED, ids=[row[0] for row in PROBED])
def test_metadata_is_gathered_once_and_never_on_the_way_of_a_chat(start, target, name, owner, answers, wanted):
    target.answers.update({path: http_answer(body) for path, body in answers.items()})
    entry = {"id": "m", "object": "model", "created": 0 if owner == "m" else 5, "owned_by": owner}  # TGI has no date
    target.answers["/v1/models"] = http_answer({"data": [entry]})
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai")
    proxy.lines("/api/chat", CHAT)
    assert {request.path for request in target.received} == {"/v1/models", "/v1/chat/completions"}
    shown = json.loads(proxy.post("/api/show", {"model": "m"}).data)
    context, word = wanted
    assert word in shown["capabilities"] and (context is None or context in shown["model_info"].values())
    count = len(target.received)
    for _ in range(3):
        proxy.post("/api/show", {"model": "m"}), proxy.call("GET", "/api/tags"), proxy.call("GET", "/api/ps")
    assert len(target.received) == count


@cases("first", ["/api/chat", "/v1/models/m"])
def test_metadata_is_there_for_whoever_joins_a_refresh_that_began_without_it(start, target, first):
    def held(talk):
        talk.target.go.wait(PATIENCE)
        talk.send(http_answer({"data": [{"id": "m", "object": "model", "owned_by": "llamacpp"}]}))

    target.answers.update({"/v1/models": held, "/v1/chat/completions": http_answer(WHOLE),
                           "/props": http_answer({"default_generation_settings": {"n_ctx": 9000}})})
    proxy = start("--target-api", "openai", "--debug")
    with proxy.dial() as one, proxy.dial() as other:
        one.sendall(http_request("POST", first, CHAT) if first == "/api/chat" else http_request("GET", first))
        target.wait_for("/v1/models")
        other.sendall(http_request("POST", "/api/show", {"model": "m"}, "Connection: close"))
        proxy.wait_logged("[PROXY] POST /api/show")
        target.go.set()
        assert b'.context_length":9000' in read_all(other)


ODD_MODELS = [
    {"id": "vendor/big", "created": 1754000000.75, "context_length": 131072.0, "description": None,
     "architecture": {"input_modalities": ["text", "image", "audio", "file"], "output_modalities": ["text"]},
     "top_provider": {"context_length": None, "max_completion_tokens": None},
     "supported_parameters": ["tools", "reasoning"]},
    {"id": "bare"}, {"id": "odd", "created": None, "owned_by": None, "max_model_len": "8192", "meta": None},
    {"id": "late", "created": "2025-07-01T00:00:00Z", "context_window": None, "size": 4.5e9, "quantization": None},
    {"id": "wrong", "created": [], "size": "4 GB", "context_length": {}, "capabilities": "tools", "architecture": 5,
     "meta": "x"}]
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")


def no_nulls(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is not None and all(map(no_nulls, inner))


def test_every_key_has_its_type_whatever_the_list_holds(start, target):
    """What typed clients (Kotlin, C#, Rust, Go, Swift) decode: no null, no 1.0 for an integer, texts for details."""
    target.answers["/v1/models"] = http_answer({"object": "list", "data": ODD_MODELS})
    proxy = start("--target-api", "openai")
    tags, running = proxy.get("/api/tags"), proxy.get("/api/ps")
    shown = [json.loads(proxy.post("/api/show", {"model": model["name"]}).data) for model in tags["models"]]
    assert len(tags["models"]) == len(running["models"]) == 5 and all(map(no_nulls, [tags, running, *shown]))
    for entry in tags["models"] + running["models"]:
        assert type(entry["size"]) is int and re.fullmatch("[0-9a-f]{64}", entry["digest"])
        assert entry["name"] == entry["model"]
        assert STAMP.fullmatch(entry.get("modified_at") or entry["expires_at"])
        assert all(type(entry.get(key, 0)) is int for key in ("size_vram", "context_length"))
    for entry in tags["models"] + running["models"] + shown:
        details = entry["details"]
        assert all(type(details[key]) is str for key in ("parent_model", "format", "family", "parameter_size",
                                                         "quantization_level"))
        assert details["families"] == [details["family"]]
        assert all(type(details.get(key, 1)) is int for key in ("context_length", "embedding_length"))
    for entry in shown:
        info, known = entry["model_info"], {"completion", "tools", "insert", "vision", "embedding", "thinking", "audio"}
        assert STAMP.fullmatch(entry["modified_at"]) and entry["capabilities"] and set(entry["capabilities"]) <= known
        assert all(type(entry[key]) is str for key in ("license", "modelfile", "parameters", "template"))
        family = info["general.architecture"]
        assert all(type(info[key]) is int for key in (
            "general.parameter_count", f"{family}.context_length", f"{family}.embedding_length"))
        assert info[f"{family}.context_length"] >= 1


def test_counts_that_are_floats_become_integers(start, target):
    usage = {"prompt_tokens": 3.0, "completion_tokens": 2.0, "total_tokens": 5.0}
    target.answers["/v1/embeddings"] = http_answer({"data": [{"index": 0, "embedding": [1, 0, 0.5]}], "usage": usage})
    target.answers["/v1/chat/completions"] = http_answer({**WHOLE, "usage": usage})
    proxy = start("--target-api", "openai")
    answers = [json.loads(proxy.post(path, {"model": "m", "stream": False, "input": "x", "messages": [HI]}).data)
               for path in ("/api/embed", "/api/chat")]
    for answer in answers:
        assert all(type(answer[key]) is int and answer[key] >= 1
                   for key in answer if key.endswith(("_count", "_duration")))
    assert [answer["prompt_eval_count"] for answer in answers] == [3, 3] and answers[1]["eval_count"] == 2


def test_probes_that_are_not_there_are_remembered(start, target, later):
    for path in ("/props", "/api/v0/models", "/api/v1/models", "/model/info"):
        target.answers[path] = http_answer({"error": f"Unexpected endpoint or method. (GET {path})"})
    proxy = start("--target-api", "openai")
    names_of(proxy)
    for count in (2, 3):                # the third list is asked for when all about the second is over
        later(60)
        names_of(proxy)
        target.wait_for("/v1/models", count)
    assert len(target.calls("/props")) == 1


def test_four_hundred_models_are_shown_from_memory(start, target):
    target.answers["/v1/models"] = http_answer({"data": [{"id": f"v/model-{at}", "context_length": 1000 + at} for at in range(400)]})
    proxy = start("--target-api", "openai")
    assert len(names_of(proxy)) == 400
    count = len(target.received)
    results = []
    threads = [threading.Thread(target=lambda at=at: results.append(proxy.post("/api/show", {"name": f"v/model-{at}:latest"}).status)) for at in range(0, 400, 4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert results == [200] * 100 and len(target.received) == count


# -- logs


def test_the_access_line_has_exactly_its_form(proxy):
    proxy.call("GET", "/api/version")
    line = proxy.wait_logged("/api/version")
    assert re.fullmatch(r'ACCESS: \d{4}/\d\d/\d\d \d\d:\d\d:\d\d 127\.0\.0\.1 "GET /api/version HTTP/1\.1" 200 \d+ \d+\.\dms', line)
    proxy.lines("/api/chat", CHAT)
    assert re.search(r'"POST /api/chat HTTP/1\.1" 200 [1-9]\d+ ', proxy.wait_logged("/api/chat"))
    assert len(proxy.logged) == 2 and not proxy.errors


def test_the_access_line_has_no_query_and_the_reason_of_an_error(proxy):
    proxy.call("GET", "/api/version?key=SECRET")
    assert '"GET /api/version HTTP/1.1" 200 ' in proxy.wait_logged("/api/version")
    proxy.post("/api/chat?key=SECRET", {**CHAT, "model": "nope"})
    line = proxy.wait_logged("/api/chat")
    assert re.search(r""" "POST /api/chat HTTP/1\.1" 404 \d+ \d+\.\dms "model 'nope' not found"$""", line)
    assert "SECRET" not in "\n".join(proxy.logged + proxy.errors)


def test_debug_shows_the_whole_way_without_keys(start, target):
    target.answers["/v1/chat/completions"] = http_answer({**WHOLE, "echo": "sk-secret-key"})
    proxy = start("--debug", "--api-key", "sk-secret-key", "--target-api", "openai")
    proxy.post("/api/chat", {**CHAT, "stream": False}, {"Authorization": "Bearer sk-client-secret"})
    proxy.call("GET", "/api/tags")
    proxy.wait_logged('"GET /api/tags')
    text = "\n".join(proxy.logged)
    assert f"[PROXY] POST /api/chat - Body: {json.dumps({**CHAT, 'stream': False})}" in text
    assert f"[PROXY] POST {target.url}/v1/chat/completions - Request: {{" in text
    assert re.search(r"\[PROXY\] Target response: \{.*\} \(took \d+ms\)", text) and re.search(r"\[PROXY\] Ollama response: \{.*\} \(took \d+ms\)", text)
    assert "[PROXY] GET /api/tags" in text and "secret" not in text
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy.lines("/api/chat", CHAT)
    proxy.wait_logged("[PROXY] Target chunk: data: ")
    proxy.wait_logged('[PROXY] Client chunk: {"model":"m"')
    proxy.post("/v1/chat/completions", CHAT)
    proxy.wait_logged("[PROXY] POST /v1/chat/completions - Body: {")
    proxy.wait_logged(f"[PROXY] POST {target.url}/v1/chat/completions - Request: {json.dumps(CHAT)}")
    target.answers["/v1/chat/completions"] = http_answer({"error": "too cold"}, 400)
    proxy.post("/api/chat", CHAT)
    proxy.post("/v1/chat/completions", CHAT)
    assert proxy.wait_logged("[PROXY] Target response: 400 ", 2).endswith(" [PROXY] Target response: 400 too cold")
    assert proxy.logged[-2].endswith(" [PROXY] Target response: 400 too cold")


def test_debug_shows_the_answer_to_an_openai_client(start, ollama_target):
    ollama_target.answers["/api/chat"] = http_answer(NATIVE_WHOLE)
    proxy = start("--debug", "--target-api", "ollama")
    data = proxy.post("/v1/chat/completions", ASK).data.decode()
    assert re.search(r" \[PROXY\] Response: (.*) \(took \d+ms\)$", proxy.wait_logged("Response: "))[1] == data


def test_debug_hides_every_key_wherever_it_is_said(start, target):
    keys = ("sk-secret-key", "header-secret", "door-secret")
    target.answers["/v1/chat/completions"] = http_answer({**WHOLE, "echo": keys})
    proxy = start("--debug", "--api-key", keys[0], "--header", f"X-Key: {keys[1]}", "--client-key", keys[2])
    assert proxy.post("/api/chat", {**CHAT, "keys": keys}, {"Authorization": f"Bearer {keys[2]}"}).status == 200
    proxy.wait_logged("ACCESS: ")
    assert "***" in "".join(proxy.logged) and "secret" not in "".join(proxy.logged + proxy.errors)


def test_no_log_is_silent(start):
    start("--no-log").call("GET", "/api/version")
    proxy = start()
    proxy.call("GET", "/health")
    assert "/health" in proxy.wait_logged("ACCESS: ") and len(proxy.logged) == 1 and not proxy.errors


@cases("late", [True, False])
def test_whatever_the_target_says_is_one_plain_line_in_the_log(start, target, late):
    evil = "a\r\nb\x1b[31m\x9b\u2028c\ud800 end"
    error = {"error": {"message": evil}}
    target.answers["/v1/chat/completions"] = http_stream(sse(delta("x"), error)) if late else http_answer(error, 400)
    proxy = start("--target-api", "openai")
    proxy.post("/api/chat", CHAT)
    proxy.wait_logged('"POST /api/chat HTTP/1.1"')
    assert "end" in "".join(proxy.errors if late else proxy.logged)
    assert len(proxy.logged + proxy.errors) == 1 + late
    assert all(re.fullmatch("[ -~\xa0-\xff]*", line) for line in proxy.logged + proxy.errors)


# ----------------------------------------------------------------------------
# The other way round: OpenAI clients, a native Ollama behind
# ----------------------------------------------------------------------------

TAGS = {"models": [{"name": name, "model": name, "modified_at": "2026-01-01T00:00:00Z", "size": 5, "digest": "ab" * 32,
                    "details": {"family": "llama", "parameter_size": "8.0B"}} for name in ("llama3:latest", "glm-5:cloud", "qwen3:8b")]}


NATIVE = ndjson({"model": "llama3", "message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False},
                {"model": "llama3", "message": {"role": "assistant", "content": "Hello"}, "done": False},
                {"model": "llama3", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop",
                 "prompt_eval_count": 4, "eval_count": 5})
NATIVE_WHOLE = {"model": "llama3", "message": {"role": "assistant", "content": "Hello", "thinking": "hm"}, "done": True,
                "done_reason": "stop", "prompt_eval_count": 4, "eval_count": 5}
ASK = {"model": "llama3", "messages": [{"role": "user", "content": "hi"}]}


@fixture
def ollama_target(target):
    target.answers = {"/api/version": http_answer({"version": "0.33.0"}), "/api/tags": http_answer(TAGS),
                      "/api/chat": http_stream(NATIVE, "application/x-ndjson")}
    return target


def kind_of(proxy, target):
    """What the proxy takes its target for, as the target sees it."""
    proxy.post("/api/chat", CHAT)
    return "ollama" if target.calls("/api/chat") else "openai"


def test_e1_the_kind_of_target_is_found_out_by_asking(start, ollama_target):
    proxy = start()
    assert proxy.post("/v1/chat/completions", {**ASK, "stream": True}).status == 200
    assert ollama_target.received[0].path == "/api/version"
    assert len(ollama_target.calls("/api/version")) == 1
    third = RunningProxy(environ={"OLLAMA_BASE_URL": ollama_target.url})
    assert third.get("/v1/models")["data"]
    third.close()
    second = start("--target", ollama_target.url, environ={"OLLAMA_BASE_URL": "http://nowhere:1"})
    assert kind_of(second, ollama_target) == "ollama"


@cases("answers, wanted", [
    ({}, "openai"), ({"/api/version": {"version": "0.33.0"}}, "ollama"), ({"/api/version": {"error": "Unexpected endpoint"}}, "openai"),
    ({"/api/version": {"version": "1"}, "/v1/models": {"object": "list", "data": None}}, "ollama"),
    ({"/api/version": {"version": "1"}, "/v1/models": LIST}, "openai"),
    ({"/api/version": {"version": "1"}, "/v1/models": {"data": [{"id": "m:latest", "owned_by": "library"}]}}, "ollama")])
def test_an_emulation_of_ollama_is_taken_for_what_it_does_better(start, target, answers, wanted):
    target.answers = {path: http_answer(answer) for path, answer in answers.items()}
    assert kind_of(start(), target) == wanted


def test_the_kind_is_asked_again_when_the_target_was_down(start, ollama_target, later):
    ollama_target.close()
    proxy = start()
    assert proxy.call("GET", "/v1/models").status == 502
    again = ScriptedTarget(port=ollama_target.port)
    again.answers = ollama_target.answers
    later(60)
    assert kind_of(proxy, again) == "ollama"
    again.close()


def test_e2_think_goes_to_the_list_and_to_nobody_else(start, ollama_target):
    proxy = start(environ={"THINK_MODELS": "qwen3:8b, other"})
    for model, body, wanted in (("glm-5:cloud", {}, True), ("qwen3:8b", {}, True), ("llama3", {}, None),
                                ("glm-5:cloud", {"reasoning_effort": "none"}, False), ("llama3", {"think": True}, True)):
        proxy.post("/v1/chat/completions", {**ASK, **body, "model": model, "stream": True})
        assert ollama_target.calls("/api/chat")[-1].json.get("think") == wanted, model


@cases("stream", [True, False])
def test_e2_think_is_taken_back_from_a_model_that_cannot(start, ollama_target, stream):
    refused = http_answer({"error": '"glm-5:cloud" does not support thinking'}, 400)
    good = http_stream(NATIVE, "application/x-ndjson") if stream else http_answer(NATIVE_WHOLE)
    ollama_target.answers["/api/chat"] = [refused, good]
    proxy = start()
    for count in (2, 3):
        assert proxy.post("/v1/chat/completions", {**ASK, "model": "glm-5:cloud", "stream": stream}).status == 200
        assert len(ollama_target.calls("/api/chat")) == count and "think" not in ollama_target.calls("/api/chat")[-1].json


def test_e3_health_and_e4_models(start, ollama_target):
    proxy = start()
    assert proxy.get("/health")["status"] == "ok"
    models = proxy.get("/v1/models")
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["llama3:latest", "glm-5:cloud", "qwen3:8b"]
    assert all(model["object"] == "model" and isinstance(model["created"], int) for model in models["data"])
    assert proxy.get("/v1/models/llama3")["id"] == "llama3"
    assert proxy.call("GET", "/v1/models/nope").status == 404


def test_e5_e6_e7_chat_both_ways(start, ollama_target):
    proxy = start()
    body = {**ASK, "temperature": 0.5, "top_p": 0.8, "stop": ["x"], "max_tokens": 9}
    answer = proxy.post("/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["Content-Type"] == "text/event-stream" and answer.data.endswith(b"data: [DONE]\n\n")
    values = [json.loads(frame[6:]) for frame in answer.data.decode().split("\n\n")[:-2]]
    assert values[0]["choices"][0]["delta"]["reasoning_content"] == "hm" and values[1]["choices"][0]["delta"]["content"] == "Hello"
    assert values[-2]["choices"][0]["finish_reason"] == "stop" and values[-1]["usage"]["total_tokens"] == 9
    sent = ollama_target.calls("/api/chat")[-1].json
    assert sent["options"] == {"temperature": 0.5, "top_p": 0.8, "stop": ["x"], "num_predict": 9} and sent["stream"] is True
    assert sent["model"] == "llama3:latest" and "temperature" not in sent
    ollama_target.answers["/api/chat"] = http_answer(NATIVE_WHOLE)
    whole = json.loads(proxy.post("/v1/chat/completions", ASK).data)
    message = whole["choices"][0]["message"]
    assert message["content"] == "Hello" and message["reasoning_content"] == message["reasoning"] == "hm"
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9} and whole["model"] == "llama3"
    assert "options" not in ollama_target.calls("/api/chat")[-1].json
    one = start("--reasoning-field", "reasoning_content")
    assert "reasoning" not in json.loads(one.post("/v1/chat/completions", ASK).data)["choices"][0]["message"]


def test_e8_any_client_key_unless_one_is_set(start, ollama_target):
    assert start().post("/v1/chat/completions", {**ASK, "stream": True}, {"Authorization": "Bearer sk-anything"}).status == 200
    assert "authorization" not in ollama_target.calls("/api/chat")[-1].headers


def test_completions_and_embeddings_over_an_ollama(start, ollama_target):
    ollama_target.answers["/api/generate"] = http_stream(ndjson({"response": "A", "done": False}, {"response": "", "done": True, "done_reason": "length"}))
    proxy = start()
    answer = proxy.post("/v1/completions", {"model": "llama3", "prompt": "x", "suffix": "y", "stream": True}).data.decode()
    values = [json.loads(frame[6:]) for frame in answer.split("\n\n")[:-2]]
    assert values[0]["choices"][0]["text"] == "A" and values[-1]["choices"][0]["finish_reason"] == "length" and answer.endswith("[DONE]\n\n")
    assert ollama_target.calls("/api/generate")[0].json["suffix"] == "y"
    assert proxy.post("/v1/completions", {"model": "llama3", "prompt": [1, 2]}).status == 400
    ollama_target.answers["/api/embed"] = http_answer({"embeddings": [[1.0, 0.5], [0.25, 2.0]], "prompt_eval_count": 3})
    answer = json.loads(proxy.post("/v1/embeddings", {"model": "llama3", "input": ["a", "b"]}).data)
    assert [item["embedding"] for item in answer["data"]] == [[1.0, 0.5], [0.25, 2.0]] and answer["usage"]["prompt_tokens"] == 3
    answer = json.loads(proxy.post("/v1/embeddings", {"model": "llama3", "input": ["a", "b"], "encoding_format": "base64"}).data)
    assert struct.unpack("<2f", base64.b64decode(answer["data"][1]["embedding"])) == (0.25, 2.0)
    assert proxy.post("/v1/embeddings", {"model": "llama3", "input": [[1, 2]]}).status == 400


@cases("stream", [True, False])
def test_logprobs_of_completions_have_the_shape_of_completions(start, ollama_target, stream):
    def told(token, logprob, other):
        alternatives = [{"token": token, "logprob": logprob}, {"token": other, "logprob": -3.5}]
        return {"token": token, "logprob": logprob, "bytes": [1], "top_logprobs": alternatives}

    pieces = [("Hi", told("Hi", -0.5, "Ho")), (" you", told(" you", -0.25, " me"))]
    last = {"response": "", "done": True, "done_reason": "stop"}
    lines = [{"response": text, "done": False, "logprobs": [item]} for text, item in pieces] + [last]
    whole = {**last, "response": "Hi you", "logprobs": [item for _, item in pieces]}
    ollama_target.answers["/api/generate"] = http_stream(ndjson(*lines)) if stream else http_answer(whole)
    answer = start().post("/v1/completions", {"model": "llama3", "prompt": "x", "logprobs": 2, "stream": stream})
    sent = ollama_target.calls("/api/generate")[0].json
    assert sent["logprobs"] is True and sent["top_logprobs"] == 2
    frames = [frame[6:] for frame in answer.data.split(b"\n\n")[:-2]] if stream else [answer.data]
    choices = [json.loads(frame)["choices"][0] for frame in frames]
    told = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    assert {key: [item for part in told for item in part[key]] for key in told[0]} == {
        "tokens": ["Hi", " you"], "token_logprobs": [-0.5, -0.25], "text_offset": [0, 2],
        "top_logprobs": [{"Hi": -0.5, "Ho": -3.5}, {" you": -0.25, " me": -3.5}]}


def openai_frames(answer):
    """The objects of a stream of /v1, or the one of a whole answer."""
    if answer.headers["Content-Type"] != "text/event-stream":
        return [json.loads(answer.data)]
    assert answer.data.endswith(b"data: [DONE]\n\n")
    return [json.loads(frame[6:]) for frame in answer.data.split(b"\n\n")[:-2]]


JINJA = ('{"error":{"code":500,"message":"\\n------------\\nWhile executing CallExpression at line 85, column 32 in '
         'source:\\n... raise_exception\\nError: Jinja Exception: %s","type":"server_error"}}')


@cases("text, messages, wanted", [
    ("System message must be at the beginning.", [SYSTEM, turn("developer", "Mind."), HI], ["system", "user"]),
    ("System message must be at the beginning.", [SYSTEM, HI, turn("system", "Mind."), HI], ["system", "user", "user"]),
    ("Conversation roles must alternate user/assistant/user/assistant/...", [SYSTEM, HI, turn("user", "Mind.")],
     ["system", "user"]),
    ("System role not supported", [SYSTEM, turn("user", "Mind.")], ["user"])])
@cases("stream", [True, False])
def test_what_templates_of_an_ollama_refuse_is_said_in_another_way(
        start, ollama_target, stream, text, messages, wanted):
    refused = http_answer({"error": JINJA % text}, 500)
    good = http_stream(NATIVE, "application/x-ndjson") if stream else http_answer(NATIVE_WHOLE)
    ollama_target.answers["/api/chat"] = [refused, good]
    proxy = start()
    for count in (2, 3):
        answer = proxy.post("/v1/chat/completions", {"model": "llama3", "messages": messages, "stream": stream})
        assert answer.status == 200 and len(ollama_target.calls("/api/chat")) == count
        sent = ollama_target.calls("/api/chat")[-1].json
        assert roles(sent) == wanted and all(message["content"] in said(sent) for message in messages)
    assert len(lessons_in(proxy)) == 1


@cases("text", ['"llama3" does not support thinking', 'think value "low" is not supported for this model'])
def test_a_word_on_thinking_that_a_model_does_not_know_is_left_out(start, ollama_target, text):
    ollama_target.answers["/api/chat"] = [http_answer({"error": text}, 400), http_answer(NATIVE_WHOLE)]
    proxy = start()
    assert proxy.post("/v1/chat/completions", {**ASK, "reasoning_effort": "low"}).status == 200
    sent = [request.json for request in ollama_target.calls("/api/chat")]
    assert sent[0]["think"] == "low" and "think" not in sent[1]
    assert lessons_in(proxy) == [FROM_NOW_ON.replace("m", "llama3:latest", 1) + "think is left out"]


@cases("switch", [{"thinking": {"type": "disabled"}}, {"enable_thinking": False}, {"reasoning_effort": "none"},
                  {"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning": {"enabled": False}},
                  {"think": False}])
def test_a_clients_word_on_thinking_beats_the_list_and_settings(start, ollama_target, switch):
    proxy = start("--set", "llama*:think=true", environ={"THINK_MODELS": "llama3, glm-5:cloud"})
    for model in ("llama3", "glm-5:cloud"):
        proxy.post("/v1/chat/completions", {**ASK, **switch, "model": model, "stream": True})
        assert ollama_target.calls("/api/chat")[-1].json["think"] is False
    proxy.post("/v1/chat/completions", {**ASK, "stream": True})
    assert ollama_target.calls("/api/chat")[-1].json["think"] is True


@cases("path, native_path", [("/v1/chat/completions", "/api/chat"), ("/v1/completions", "/api/generate")])
@cases("said_, wanted", [({"num_ctx": 16384}, 16384), ({"options": {"num_ctx": 16384}}, 16384), ({}, 4096),
                         ({"num_ctx": 5, "options": {"num_ctx": 16384}}, 16384), ({"num_ctx": None}, 4096)])
def test_the_clients_context_length_beats_settings(start, ollama_target, path, native_path, said_, wanted):
    ollama_target.answers["/api/generate"] = http_answer({"response": "x", "done": True})
    ollama_target.answers["/api/chat"] = http_answer(NATIVE_WHOLE)
    body = {"model": "llama3", "messages": [HI], "prompt": "hi", **said_}
    assert start("--set", "llama*:num_ctx=4096").post(path, body).status == 200
    assert ollama_target.calls(native_path)[-1].json["options"]["num_ctx"] == wanted


@cases("value, wanted", [("-1", -1), ("300", 300), (-1, -1), (0, 0), ("5m", "5m"), (None, "30m")])
@cases("path, native_path", [("/v1/chat/completions", "/api/chat"), ("/v1/completions", "/api/generate"),
                             ("/v1/embeddings", "/api/embed")])
def test_keep_alive_of_openai_clients_beats_settings(start, ollama_target, path, native_path, value, wanted):
    ollama_target.answers[native_path] = http_answer({**NATIVE_WHOLE, "response": "x", "embeddings": [[1.0]]})
    body = {"model": "llama3", "messages": [HI], "prompt": "hi", "input": "hi", "keep_alive": value}
    assert start("--set", "llama*:keep_alive=30m").post(path, body).status == 200
    assert ollama_target.calls(native_path)[-1].json["keep_alive"] == wanted


@cases("stream", [True, False])
@cases("top", [None, 2])
def test_logprobs_of_chats_are_whole(start, ollama_target, stream, top):
    others = [{"token": "o", "logprob": -0.1}, {"token": "\u00fc", "logprob": -3.5}]
    items = [{"token": "o", "logprob": -0.1, "bytes": [111]}, {"token": "k", "logprob": -0.2}]
    items = [{**item, "top_logprobs": others} for item in items] if top else items
    pieces = [{"message": turn("assistant", item["token"]), "done": False, "logprobs": [item]} for item in items]
    last = {"message": turn("assistant", ""), "done": True, "done_reason": "stop"}
    whole = http_answer({**last, "message": turn("assistant", "ok"), "logprobs": items})
    ollama_target.answers["/api/chat"] = http_stream(ndjson(*pieces, last), "application/x-ndjson") if stream else whole
    body = {**ASK, "stream": stream, "logprobs": True, **({"top_logprobs": top} if top else {})}
    answer = start().post("/v1/chat/completions", body)
    sent = ollama_target.calls("/api/chat")[0].json
    assert sent["logprobs"] is True and sent.get("top_logprobs") == top
    told = [item for frame in openai_frames(answer) for choice in frame["choices"]
            for item in (choice.get("logprobs") or {}).get("content") or ()]
    tops = [{**others[0], "bytes": [111]}, {**others[1], "bytes": [195, 188]}] if top else []
    assert told == [{"token": "o", "logprob": -0.1, "bytes": [111], "top_logprobs": tops},
                    {"token": "k", "logprob": -0.2, "bytes": [107], "top_logprobs": tops}]


def test_calls_that_come_one_a_line_under_one_id_are_told_apart(start, ollama_target):
    pieces = [{"message": turn("assistant", "", tool_calls=[
        {"id": "call_same", "function": {"index": 0, "name": "write", "arguments": {"n": at}}}]), "done": False}
        for at in range(3)]
    last = {"message": turn("assistant", ""), "done": True, "done_reason": "stop"}
    ollama_target.answers["/api/chat"] = http_stream(ndjson(*pieces, last), "application/x-ndjson")
    frames = openai_frames(start().post("/v1/chat/completions", {**ASK, "stream": True, "tools": [a_tool("write")]}))
    calls = [call for frame in frames for choice in frame["choices"] for call in choice["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1, 2] and len({call["id"] for call in calls}) == 3
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_turns_without_content_are_served(start, ollama_target):
    ollama_target.answers["/api/chat"] = http_answer(NATIVE_WHOLE)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [turn("user", "a"), turn("assistant", None), HI, turn("assistant", None, tool_calls=[call]),
             turn("tool", [{"type": "text", "text": "r"}], tool_call_id="c1")]
    assert start().post("/v1/chat/completions", {"model": "llama3", "messages": turns}).status == 200
    sent = ollama_target.calls("/api/chat")[0].json["messages"]
    assert [message["content"] for message in sent] == ["a", "", "hi", "", "r"]


@cases("wanted", ["float", "base64", None])
def test_vectors_have_the_encoding_that_was_asked_for(start, ollama_target, wanted):
    ollama_target.answers["/api/embed"] = http_answer({"embeddings": [[0.25, -0.5, 1.0]], "prompt_eval_count": 3})
    body = {"model": "llama3", "input": "x", **({"encoding_format": wanted} if wanted else {})}
    vector = json.loads(start().post("/v1/embeddings", body).data)["data"][0]["embedding"]
    vector = struct.unpack("<3f", base64.b64decode(vector)) if wanted == "base64" else vector
    assert list(vector) == [0.25, -0.5, 1.0]


def test_a_prompt_list_of_one_is_that_prompt(start, ollama_target):
    ollama_target.answers["/api/generate"] = http_answer({"response": "x", "done": True})
    assert start().post("/v1/completions", {"model": "llama3", "prompt": ["only"]}).status == 200
    assert ollama_target.calls("/api/generate")[0].json["prompt"] == "only"


def test_errors_of_an_ollama_come_in_openais_shape(start, ollama_target):
    ollama_target.answers["/api/chat"] = http_answer({"error": "registry/llama3 does not support tools"}, 400)
    answer = start().post("/v1/chat/completions", {**ASK, "tools": [{"type": "function", "function": {"name": "f"}}]})
    error = json.loads(answer.data)["error"]
    assert answer.status == 400 and error["message"].endswith("does not support tools") and error["type"] == "invalid_request_error"
    assert len(ollama_target.calls("/api/chat")) == 1


def test_set_gives_defaults_where_the_client_said_nothing(start, ollama_target):
    proxy = start("--set", "llama*:num_ctx=32768,temperature=0.1,keep_alive=30m,think=false", "--set", "qwen*:num_ctx=1")
    proxy.post("/v1/chat/completions", {**ASK, "stream": True})
    sent = ollama_target.calls("/api/chat")[-1].json
    assert sent["options"] == {"temperature": 0.1, "num_ctx": 32768} and sent["keep_alive"] == "30m" and sent["think"] is False
    proxy.post("/v1/chat/completions", {**ASK, "stream": True, "temperature": 1, "options": {"num_ctx": 5}, "keep_alive": 0, "think": True})
    sent = ollama_target.calls("/api/chat")[-1].json
    assert sent["options"] == {"temperature": 1, "num_ctx": 5} and sent["keep_alive"] == 0 and sent["think"] is True
    proxy.post("/api/chat", {**ASK, "options": {"temperature": 2}})
    sent = ollama_target.calls("/api/chat")[-1].json
    assert sent["options"] == {"num_ctx": 32768, "temperature": 2} and sent["keep_alive"] == "30m"


def test_set_on_an_openai_target(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--set", "m:temperature=0.1,num_predict=9,num_ctx=5,think=false")
    proxy.lines("/api/chat", {**CHAT, "options": {"temperature": 1}})
    sent = target.calls("/v1/chat/completions")[-1].json
    assert sent["temperature"] == 1 and sent["max_tokens"] == 9 and sent["reasoning_effort"] == "none" and "num_ctx" not in sent


def test_api_is_relayed_untouched_to_an_ollama(start, ollama_target):
    proxy = start()
    odd = b'{ "model":"llama3",\n"messages" : [{"role":"user","content":"1.0"}], "x": 1.0 }'
    assert proxy.post("/api/chat", odd).data == NATIVE
    assert ollama_target.calls("/api/chat")[-1].data == odd
    assert proxy.get("/api/tags") == TAGS
    ollama_target.answers["/api/create"] = http_stream(b'{"status":"success"}\n', "application/x-ndjson")
    assert proxy.post("/api/create", {"model": "x"}).data == b'{"status":"success"}\n'
    ollama_target.answers["/api/delete"] = http_answer(b"", 200, "")
    assert proxy.call("DELETE", "/api/delete", {"model": "x"}).status == 200
    ollama_target.answers["/api/blobs/sha256:y"] = http_answer(b"", 201, "")
    with proxy.dial() as sock:
        sock.sendall(http_request("POST", "/api/blobs/sha256:y", b"", "Transfer-Encoding: chunked") + chunk(b"abc"))
        sock.sendall(chunk(b"d" * 100000) + b"0\r\n\r\n")
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 201")
    assert ollama_target.calls("/api/blobs/sha256:y")[0].data == b"abc" + b"d" * 100000
    ollama_target.answers["/api/brand-new"] = http_answer({"new": True})
    assert proxy.get("/api/brand-new") == {"new": True}
    assert proxy.post("/api/chat", {**ASK, "model": "not-here"}).data == NATIVE          # the Ollama is the judge
    proxy.post("/api/chat", {**ASK, "model": "llama3:proxy"})
    assert ollama_target.calls("/api/chat")[-1].json["model"] == "llama3:latest"


def test_the_native_relay_writes_each_key_once(start, ollama_target):
    proxy = start("--alias", "fast=qwen3:8b", "--set", "qwen3*:num_ctx=5")
    proxy.post("/api/chat", {"Model": "fast", "Messages": ASK["messages"], "Options": {"top_k": 1}})
    sent = ollama_target.calls("/api/chat")[-1].json
    assert {key.lower(): value for key, value in sent.items()} == {
        "model": "qwen3:8b", "messages": ASK["messages"], "options": {"num_ctx": 5, "top_k": 1}} and len(sent) == 3


def test_only_options_become_options_on_the_native_relay(start, ollama_target):
    start("--set", "llama*:reasoning=drop,open_think=true,num_ctx=5").post("/api/chat", ASK)
    assert ollama_target.calls("/api/chat")[-1].json == {**ASK, "options": {"num_ctx": 5}}


def test_think_is_injected_and_taken_back_on_the_native_relay(start, ollama_target):
    ollama_target.answers["/api/chat"] = [http_answer({"error": '"x" does not support thinking'}, 400), http_stream(NATIVE, "application/x-ndjson")]
    assert start().post("/api/chat", {**ASK, "model": "glm-5:cloud"}).data == NATIVE
    sent = [request.json for request in ollama_target.calls("/api/chat")]
    assert sent[0]["think"] is True and "think" not in sent[1]


def test_a_filter_and_aliases_on_native_lists(start, ollama_target):
    Path("models-filter.txt").write_text("llama3\nqwen3:8b\n")
    proxy = start("--alias", "fast=qwen3:8b")
    assert names_of(proxy) == ["llama3:latest", "qwen3:8b", "fast:latest"]
    assert proxy.post("/api/chat", {**ASK, "model": "glm-5:cloud"}).status == 404
    proxy.post("/api/chat", {**ASK, "model": "fast"})
    assert ollama_target.calls("/api/chat")[-1].json["model"] == "qwen3:8b"


@cases("scheme", ["http", "https", "file"])
def test_the_address_of_a_picture_is_not_asked_but_refused(start, target, ollama_target, scheme):
    picture = {"type": "image_url", "image_url": {"url": f"{scheme}://127.0.0.1:{target.port}/a.png"}}
    answer = start().post("/v1/chat/completions", {**ASK, "messages": [{"role": "user", "content": [picture]}]})
    assert answer.status == 400 and "base64" in json.loads(answer.data)["error"]["message"]
    assert not target.calls("/a.png") and not target.calls("/api/chat")


def test_two_proxies_in_a_row_give_the_direct_answers(start):
    """OpenAI client -> proxy -> Ollama API -> proxy -> OpenAI server, against the server itself."""
    demo = DemoServer()
    inner = start("--target", demo.url)
    outer = start("--target", inner.url, "--target-api", "ollama")
    direct = HTTPConnection("127.0.0.1", demo.server_address[1], timeout=PATIENCE)

    def both(path, body):
        direct.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return json.loads(direct.getresponse().read()), json.loads(outer.post(path, body).data)

    tools = [{"type": "function", "function": {"name": "note", "parameters": {"type": "object", "properties": {}}}}]
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    for extra in ({}, {"tools": tools}, {"response_format": schema}):
        body = {"model": "demo-chat", "messages": [{"role": "user", "content": "call me \U0001f999" if extra else "plain"}], **extra}
        one, two = both("/v1/chat/completions", body)
        message = [dict(answer["choices"][0]["message"]) for answer in (one, two)]
        calls = [[(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in entry.get("tool_calls", ())] for entry in message]
        assert calls[0] == calls[1] and (message[0]["content"] or None) == (message[1]["content"] or None)
        assert one["choices"][0]["finish_reason"] == two["choices"][0]["finish_reason"] and one["usage"] == two["usage"]
    one, two = both("/v1/embeddings", {"model": "demo-embed", "input": ["one", "two"]})
    assert [item["embedding"] for item in one["data"]] == [item["embedding"] for item in two["data"]]
    streamed = outer.post("/v1/chat/completions", {"model": "demo-chat", "stream": True, "messages": [{"role": "user", "content": "think hard"}]}).data
    frames = [json.loads(frame[6:]) for frame in streamed.decode().split("\n\n")[:-2]]
    text = "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames)
    assert text == "You said: think hard" and frames[0]["choices"][0]["delta"]["reasoning_content"] == "The user wants an echo."
    demo.shutdown()


# ----------------------------------------------------------------------------
# Safety: framing, limits, who may talk, what must not leak
# ----------------------------------------------------------------------------

def told(answer):
    """The error in the bytes of a whole answer."""
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


HEAD = b"POST /api/show HTTP/1.1\r\nHost: localhost\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


@cases("data", [
    HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    HEAD + b"Content-Length: +5\r\n\r\nhello", HEAD + b"Content-Length: 5, 5\r\n\r\nhello", HEAD + b"Content-Length: 1_0\r\n\r\nhello",
    HEAD + b"Content-Length: -1\r\n\r\n", HEAD + b"Content-Length: 0x5\r\n\r\nhello", HEAD + "Content-Length: \uff15\r\n\r\n".encode(),
    HEAD + b"Content-Length:\r\n\r\nhello", HEAD + b"Content-Length : 5\r\n\r\nhello", HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n", HEAD + b"Transfer-Encoding: xchunked\r\n\r\n", HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", HEAD + b"X: a\r\n folded\r\n\r\n", HEAD + b" X: a\r\n\r\n",
    HEAD + b"X: a\nY: b\r\n\r\n", HEAD + b"X: a\rY: b\r\n\r\n", HEAD + b"X: a\x00b\r\n\r\n", HEAD + b"X: a\x1bb\r\n\r\n", HEAD + b"no colon\r\n\r\n", HEAD + b": empty\r\n\r\n",
    HEAD + b"X(): a\r\n\r\n", HEAD + b"Host: other\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET /\r\n\r\n", b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n", b"get / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /\x7f HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\nHost: localhost\n\n", b"\x16\x03\x01\x02\x00\x01", HEAD + b"Transfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    b"POST /api/show HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"])
def test_bad_framing_is_refused_and_the_connection_closed(proxy, data):
    answers = proxy.raw(data + SMUGGLED)
    assert re.match(rb"HTTP/1\.1 (400|501|505) ", answers), answers
    assert answers.count(b"HTTP/1.1 ") == 1 and b"smuggled" not in answers
    assert isinstance(json.loads(answers.partition(b"\r\n\r\n")[2])["error"], str)


UNREAD = "the request has a body that "
GET = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n"
REFUSED_REQUESTS = [
    (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400,
     "Transfer-Encoding beside Content-Length or in HTTP/1.0"),
    (HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n", 400, "repeated content-length header"),
    (HEAD + b"Content-Length: +5\r\n\r\n", 400, "malformed Content-Length"),
    (HEAD + b"Content-Length: 999999999999\r\n\r\n", 413,
     "request body too large: more than 134217728 bytes (--max-body)"),
    (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "transfer coding not implemented"),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n+5\r\n", 400,
     "malformed chunked coding: chunk longer than its size, malformed size or trailer"),
    (HEAD + b"no colon\r\n\r\n", 400, "malformed header"), (b"GET / HTTP/1.1\r\n\r\n", 400, "missing Host header"),
    (b"GET / HTTP/2.0\r\n\r\n", 505, "this version of HTTP is not spoken here"),
    (b"GET /\r\n\r\n", 400, "malformed request line"), (b"GET /" + b"a" * 17000 + b" HTTP/1.1\r\n", 414, "request line too long"),
    (b"GET / HTTP/1.1\nHost: localhost\n\n", 400, "bare line feed in the request head"),
    (b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400,
     "the request target must be a path: this is no forward proxy"),
    (GET.replace(b"version", b"../x") + b"Connection: close\r\n\r\n", 400, "dot segments are not allowed in the path"),
    (GET + b"".join(b"X%d: 1\r\n" % at for at in range(100)) + b"\r\n", 431, "more than 100 headers"),
    (GET + b"X: " + b"a" * 70000, 431, "request head too large"),
    (http_request("POST", "/api/show", gzip.compress(b"{}")[:-9], "Content-Encoding: gzip"), 400,
     UNREAD + "ends in the middle of its compression"),
    (http_request("POST", "/api/show", b"{}", "Content-Encoding: gzip"), 400, UNREAD + "is broken inside its compression"),
    (http_request("POST", "/api/show", b"{}", "Content-Encoding: br"), 415,
     UNREAD + "is compressed as br, which is not understood here"),
    (GET + b"Upgrade: websocket\r\nConnection: close\r\n\r\n", 426, "WebSockets are not spoken here: use HTTP"),
    (GET.replace(b"version", b"chat") + b"Connection: close\r\n\r\n", 405, "method not allowed"),
    (GET.replace(b"/api/version", b"/nothing") + b"Connection: close\r\n\r\n", 404, "/nothing not found"),
    (http_request("POST", "/api/show", {"verbose": True}, "Connection: close"), 400, "model is required"),
    (http_request("POST", "/api/pull", {"stream": True}, "Connection: close"), 400, "invalid model name")]


@cases("data, status, text", REFUSED_REQUESTS, ids=[row[2] for row in REFUSED_REQUESTS])
def test_a_request_that_is_refused_is_told_why(proxy, data, status, text):
    answer = proxy.raw(data)
    assert answer.startswith(b"HTTP/1.1 %d " % status) and told(answer) == text


@cases("name, value, text", [("Host", "evil.com", "host evil.com is not allowed"),
                             ("Origin", "https://evil.com", "origin https://evil.com is not allowed (see --origins)")])
def test_the_log_says_why_a_visitor_was_turned_away(proxy, name, value, text):
    assert proxy.call("GET", "/api/version", None, {name: value}).data == b""
    assert re.search(r'" 403 0 \d+\.\dms "(.*)"$', proxy.wait_logged("/api/version"))[1] == text


def test_a_bug_is_an_internal_error(proxy, monkeypatch, capfd):
    monkeypatch.setitem(proxy_module.ROUTES, ("GET", "/api/version"), proxy_module.Route(lambda request, scope: 1 / 0))
    answer = proxy.call("GET", "/api/version")
    assert answer.status == 500 and json.loads(answer.data) == {"error": "internal error"}
    assert proxy.call("GET", "/health").status == 200 and "ZeroDivisionError" in capfd.readouterr().err


@cases("data", [b"GET /\r\n", b"GET /\r\n\r\n"])
def test_a_request_of_http_0_9_is_refused_at_once(start, data):
    with start("--target-api", "openai", "--client-timeout", "3").dial() as sock:
        sock.sendall(data)
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")


@cases("address, status", [
    ("http://127.0.0.1:{port}/api/version?x=1", 200), ("http://localhost:{port}/api/version", 200),
    ("HTTP://LOCALHOST:{port}/api/version", 200), ("http://127.0.0.1:{port}", 200), ("http://evil.example/", 400),
    ("http://evil.example:{port}/", 400), ("http://127.0.0.1:1/", 400), ("http://127.0.0.1:{port}@evil.example/", 400),
    ("ftp://127.0.0.1:{port}/", 400), ("http://", 400), ("//evil.example/", 404)])
def test_a_whole_address_is_served_if_it_is_ours(proxy, address, status):
    data = proxy.raw(http_request("GET", address.format(port=proxy.port), b"", "Connection: close"))
    assert data.startswith(b"HTTP/1.1 %d " % status)
    if status == 200:
        assert data.endswith(b'"}' if "version" in address else b"Ollama is running")


@cases("prefix, status", [
    (b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X%d: 1\r\n" % at for at in range(150)), 431),
    (b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70000, 431), (b"GET /" + b"a" * 17000 + b" HTTP/1.1\r\nHost: x", 414)])
def test_heads_have_limits(proxy, prefix, status):
    assert proxy.raw(prefix + b"\r\n\r\n").startswith(b"HTTP/1.1 %d " % status)


def test_pipelined_requests_are_answered_in_order(proxy):
    data = proxy.raw(http_request("GET", "/api/version") + http_request("POST", "/api/show", {"model": "m"}) + http_request("POST", "/api/chat", CHAT)
                     + http_request("GET", "/", b"", "Connection: close"))
    places = [data.index(text) for text in (b'"version"', b'"model_info"', b'"done":true', b"Ollama is running")]
    assert places == sorted(places) and data.count(b"HTTP/1.1 200") == 4


def test_an_unread_body_never_becomes_the_next_request(proxy):
    for path in ("/nothing", "/api/tags", "/api/version"):
        data = proxy.raw(http_request("POST", path, SMUGGLED, "Connection: keep-alive") + http_request("GET", "/", b"", "Connection: close"))
        assert b"smuggled" not in data and data.count(b"HTTP/1.1 ") <= 2
    data = proxy.raw(http_request("GET", "/api/version", SMUGGLED) + http_request("GET", "/", b"", "Connection: close"))
    assert data.count(b"HTTP/1.1 200") == 2 and data.endswith(b"Ollama is running")


def test_http_1_0_and_keep_alive(proxy):
    data = proxy.raw(http_request("POST", "/api/chat", CHAT, version="1.0"))
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"chunked" not in head and b"Connection: close" in head and [json.loads(line)["done"] for line in body.splitlines()] == [False, False, True]
    data = proxy.raw(b"GET /api/version HTTP/1.0\r\n\r\n")
    assert data.startswith(b"HTTP/1.1 200")
    with proxy.dial() as sock:
        for _ in range(2):
            sock.sendall(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert b"Connection: keep-alive" in read_until(sock, b"Ollama is running")


def test_expect_100_continue(proxy):
    body = json.dumps(CHAT).encode()
    with proxy.dial() as sock:
        sock.sendall(http_request("POST", "/api/chat", b"", f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert b'"done":true' in read_until(sock, b"0\r\n\r\n")
    data = proxy.raw(http_request("POST", "/api/chat", b"", "Content-Length: 999999999999", "Expect: 100-continue"))
    assert data.startswith(b"HTTP/1.1 413 ") and b"100 Continue" not in data


def test_chunked_and_compressed_request_bodies(proxy):
    body = json.dumps(CHAT).encode()
    chunked = b"".join(chunk(body[at:at + 5]) for at in range(0, len(body), 5)) + b"0\r\n\r\n"
    with proxy.dial() as sock:
        sock.sendall(http_request("POST", "/api/chat", b"", "Transfer-Encoding: chunked") + chunked + http_request("GET", "/api/version"))
        assert b'"version"' in read_until(sock, b'"version"')
    packed = gzip.compress(body)
    assert proxy.post("/api/chat", packed, {"Content-Encoding": "gzip"}).status == 200
    assert proxy.post("/api/chat", packed, {"Content-Encoding": "zstd"}).status == 415
    assert proxy.post("/api/chat", packed[:-9], {"Content-Encoding": "gzip"}).status == 400


def test_bodies_have_a_limit(start, target):
    proxy = start("--max-body", "1000")
    assert proxy.post("/api/show", {"model": "m", "x": "a" * 2000}).status == 413
    for chunks in (chunk(b"a" * 2000), chunk(b"a" * 8) * 200):
        data = proxy.raw(http_request("POST", "/api/show", b"", "Transfer-Encoding: chunked") + chunks)
        assert data.startswith(b"HTTP/1.1 413")
    assert proxy.post("/api/show", gzip.compress(b"a" * 100000), {"Content-Encoding": "gzip"}).status == 413
    # A client that writes everything before it reads still sees why.
    with proxy.dial() as sock:
        try:
            sock.sendall(http_request("POST", "/api/show", b"a" * 3_000_000))
        except ConnectionError:
            pass
        assert read_all(sock).startswith(b"HTTP/1.1 413")


def test_a_slow_client_is_cut_off_and_others_are_not(start, target):
    proxy = start("--client-timeout", "0.3")
    slow = proxy.dial()
    slow.sendall(b"GET /api/version HTTP/1.1\r\n")
    drip = proxy.dial()
    drip.sendall(http_request("POST", "/api/show", b"", "Content-Length: 100000") + b"{")
    assert proxy.call("GET", "/api/version").status == 200
    for answer in (read_all(slow), read_all(drip)):
        assert answer.startswith(b"HTTP/1.1 408") and told(answer) == "the client took too long to send its request"
    dripping = proxy.dial()
    dripping.sendall(b"GET / HTTP/1.1\r\nX: ")
    stop = threading.Event()

    def drops():
        try:
            while not stop.wait(0.05):
                dripping.sendall(b"a")
        except OSError:
            pass

    threading.Thread(target=drops, daemon=True).start()
    assert b"408" in read_all(dripping)         # every byte in time, the whole never
    stop.set()
    idle = proxy.dial()
    assert read_all(idle) == b""
    [sock.close() for sock in (slow, drip, dripping, idle)]


BUSY = "server busy, please try again.  maximum pending requests exceeded"


def test_connections_have_a_limit(start, target):
    proxy = start("--max-connections", "3")
    held = [proxy.dial() for _ in range(3)]
    for sock in held:
        sock.sendall(http_request("GET", "/api/version"))
        read_until(sock, b"version")
    data = proxy.raw(b"")
    assert data.startswith(b"HTTP/1.1 503") and b"Retry-After" in data and told(data) == BUSY
    held[0].close()
    for _ in range(200):
        if b"200 OK" in proxy.raw(http_request("GET", "/", b"", "Connection: close")):
            break
    else:
        raise AssertionError("the place of a client that left was not given to another")
    [sock.close() for sock in held]


@cases("host, allowed", [
    ("localhost", 1), ("localhost:11434", 1), ("LOCALHOST", 1), ("127.0.0.1:5", 1), ("[::1]:80", 1), ("x.localhost", 1), ("host.docker.internal", 1), ("my.local", 1),
    ("[fd00::1]:80", 1), ("172.16.0.1", 1), ("[2001:db8::1]", 0), ("[2001:db8::1]:80", 0), ("203.0.113.5", 0),
    ("198.18.0.1", 0),
    ("192.168.1.5", 1), ("10.0.0.1:1", 1), ("0.0.0.0", 1), ("evil.com", 0), ("8.8.8.8", 0), ("169.254.1.1", 0), ("ollama", 0), ("localhost.evil.com", 0), ("127.0.0.1.evil.com", 0)])
def test_a_loopback_listener_answers_to_its_own_names_only(proxy, host, allowed):
    data = proxy.raw(f"GET /api/version HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert data.startswith(b"HTTP/1.1 200" if allowed else b"HTTP/1.1 403")
    if not allowed:
        assert data.endswith(b"\r\n\r\n")


@cases("origin, allowed", [
    ("http://localhost", 1), ("http://localhost:3000", 1), ("https://127.0.0.1:8443", 1), ("http://0.0.0.0", 1), ("app://obsidian.md", 1), ("file://", 1),
    ("tauri://localhost", 1), ("vscode-webview://abc", 1), ("https://evil.com", 0), ("null", 0), ("chrome-extension://abc", 0), ("http://localhost.evil.com", 0),
    ("http://localhost:3000.evil.com", 0), ("http://[::1]:3000", 0)])
def test_browser_origins_as_ollama(proxy, origin, allowed):
    for method, path, body in (("GET", "/api/tags", None), ("POST", "/api/chat", CHAT), ("POST", "/api/nothing", {}), ("OPTIONS", "/any", None)):
        answer = proxy.call(method, path, body, {"Origin": origin})
        if allowed:
            assert answer.status != 403 and answer.headers["Access-Control-Allow-Origin"] == origin and "Origin" in answer.headers["Vary"]
            assert answer.headers["Access-Control-Allow-Credentials"] is None
        else:
            assert answer.status == 403 and answer.data == b"" and answer.headers["Access-Control-Allow-Origin"] is None


def test_preflights_and_more_origins(start, target):
    proxy = start("--origins", "https://chat.example.com,chrome-extension://*")
    for origin in ("https://chat.example.com", "chrome-extension://abcdef", "http://localhost:1"):
        answer = proxy.call("OPTIONS", "/api/chat", None, {"Origin": origin, "Access-Control-Request-Method": "POST",
                                                           "Access-Control-Request-Headers": "content-type,x-stainless-os,bad header\u00a0"})
        assert answer.status == 204 and answer.headers["Access-Control-Allow-Methods"] == "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
        assert "x-stainless-os" in answer.headers["Access-Control-Allow-Headers"] and "bad header" not in answer.headers["Access-Control-Allow-Headers"]
    assert proxy.call("GET", "/api/tags", None, {"Origin": "https://chat.example.com.evil.com"}).status == 403
    for anyone in (start(environ={"OLLAMA_ORIGINS": "*"}), start("--origins", "*")):
        answer = anyone.call("GET", "/api/version", None, {"Origin": "https://any.where"})
        assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["Vary"] is None
    same = proxy.call("GET", "/api/version", None, {"Origin": f"http://127.0.0.1:{proxy.port}"})
    assert same.status == 200 and same.headers["Access-Control-Allow-Origin"] is None


def test_a_client_key_is_asked_for_and_never_passed_on(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--client-key", "ck-secr\u00e9t-key", "--target-api", "openai")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"Authorization": "Basic ck"}, {"Authorization": "Bearer \u00ff"}):
        answer = proxy.call("GET", "/api/tags", None, headers)
        assert answer.status == 401 and json.loads(answer.data) == {
            "error": "missing or wrong key: send it as Authorization: Bearer KEY or x-api-key"}
    assert proxy.get("/v1/models")["error"]["type"] == "authentication_error"
    plain = start("--client-key", "ck-secret-key", "--target-api", "openai")
    for headers in ({"Authorization": "Bearer ck-secret-key"}, {"X-Api-Key": "ck-secret-key"}):
        assert plain.post("/api/chat", CHAT, headers).status == plain.post("/v1/chat/completions", CHAT, headers).status == 200
    assert plain.call("GET", "/").status == 200 and plain.call("OPTIONS", "/api/chat", None, {"Origin": "http://localhost"}).status == 204
    assert not any("ck-" in str(request.headers) for request in target.received)


def test_the_targets_key_goes_to_the_target_and_nowhere_else(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--api-key", "sk-target-key", "--target-api", "openai")
    assert proxy.lines("/api/chat", CHAT)[-1]["done"]
    assert target.received[-1].headers["authorization"] == "Bearer sk-target-key"
    for path in ("/health", "/api/tags", "/v1/models", "/api/version"):
        assert b"sk-target" not in proxy.call("GET", path).data


@cases("status", [301, 302, 303, 307, 308])
@cases("elsewhere", [True, False], ids=["to another server", "to another path"])
def test_redirects_are_told_and_not_followed(start, target, status, elsewhere):
    other = ScriptedTarget()
    place = other.url if elsewhere else ""
    target.answers["/v1/chat/completions"] = target.answers["/v1/models"] = (
        f"HTTP/1.1 {status} X\r\nLocation: {place}/v2/chat/completions?key=1\r\nContent-Length: 0\r\n\r\n").encode()
    target.answers["/v2/chat/completions"] = http_stream(HELLO)
    proxy = start("--api-key", "sk-target-key", "--target-api", "openai")
    for path, body in (("/api/chat", CHAT), ("/v1/chat/completions", CHAT), ("/api/tags", None), ("/v1/models", None)):
        answer = proxy.call("POST" if body else "GET", path, body)
        assert answer.status == 502 and answer.headers["Location"] is None
        assert f'"{target.url}/v1 redirects to {place or target.url}/v2/chat/completions: give that address as --target ' \
               'if it is the right one"' in answer.data.decode()
    assert not other.received and not target.calls("/v2/chat/completions")
    other.close()


def test_a_redirected_upload_is_told_and_not_sent_again(start, ollama_target):
    ollama_target.answers["/api/blobs/sha256:x"] = (
        b"HTTP/1.1 307 X\r\nLocation: http://store.example/blobs/sha256:x\r\nContent-Length: 0\r\n\r\n")
    upload = http_request("POST", "/api/blobs/sha256:x", b"", "Transfer-Encoding: chunked", "Connection: close")
    answer = start().raw(upload + chunk(b"abc") + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502 ") and b"http://store.example" in answer and b"--target" in answer
    assert [request.data for request in ollama_target.calls("/api/blobs/sha256:x")] == [b"abc"]


def test_azure_keys_and_queries(start, target):
    proxy = start("--target", f"{target.url}/openai/deployments/d?api-version=2024-01-01", "--api-key", "az-key", "--header", "X-Title: mine", "--target-api", "openai")
    target.answers["/openai/deployments/d/models"] = http_answer(LIST)
    target.answers["/openai/deployments/d/chat/completions"] = http_stream(HELLO)
    assert proxy.lines("/api/chat", CHAT)[-1]["done"]
    sent = target.calls("/openai/deployments/d/chat/completions")[0]
    assert sent.path.endswith("?api-version=2024-01-01") and sent.headers["x-title"] == "mine"
    assert config("--target", "https://x.openai.azure.com/openai/v1", "--api-key", "k").destination.key_header == "api-key"


# -- cancellation


def silent(talk):
    talk.go = talk.target.go.set()
    talk.wait_closed()


def silent_after_head(talk):
    talk.send(stream_head())
    silent(talk)


def silent_mid_stream(talk):
    talk.send(stream_head() + chunk(sse(delta("Hel"), done=False)))
    silent(talk)


def silent_whole(talk):
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    silent(talk)


AGENT_BODIES = {"/v1/messages": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "stream": True},
                "/v1/responses": {"model": "m", "input": "hi", "stream": True}}
STILL_THERE = {"/v1/messages": b'{"type":"text_delta","text":""}', "/v1/responses": b"event: response.in_progress"}


def after_a_while(*told):
    """Says nothing until the test wants it to."""
    def script(talk):
        talk.target.go.wait(PATIENCE)
        for piece in told:
            talk.send(piece)
    return script


def told_after_a_while(start, target, path, script):
    """The whole answer of a target that waits until its client was told that something still happens."""
    target.answers["/v1/chat/completions"] = script
    sock = start("--target-api", "openai", "--translate", "always").dial()
    sock.sendall(http_request("POST", path, AGENT_BODIES[path], "Connection: close"))
    told = read_until(sock, STILL_THERE[path])
    target.go.set()
    head, _, body = (told + read_all(sock)).partition(b"\r\n\r\n")
    decoder = proxy_module.ChunkedDecoder()
    body = decoder.feed(body)
    assert head.startswith(b"HTTP/1.1 200") and decoder.done
    names, last = [name for name, _ in events_of(body)], events_of(body)[-1][1]
    return [name for name, before in zip(names, [""] + names) if name != before], last, body


@cases("path", AGENT_BODIES)
def test_agents_that_wait_long_for_an_answer_get_signs_of_life(start, target, path, monkeypatch):
    monkeypatch.setattr(proxy_module, "SIGN_OF_LIFE", 0.05)
    names, last, body = told_after_a_while(start, target, path, after_a_while(stream_head(), chunk(sse(delta("Hel"), delta("lo"), STOP)), b"0\r\n\r\n"))
    assert b"Hel" in body and names == {
        "/v1/messages": ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"],
        "/v1/responses": ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
                          "response.output_text.delta", "response.output_text.done", "response.content_part.done",
                          "response.output_item.done", "response.completed"]}[path]


def test_an_agent_that_asked_for_thinking_waits_in_a_block_of_it(start, target, monkeypatch):
    monkeypatch.setattr(proxy_module, "SIGN_OF_LIFE", 0.05)
    monkeypatch.setitem(AGENT_BODIES, "/v1/messages", {**AGENT_BODIES["/v1/messages"], "thinking": {"type": "enabled", "budget_tokens": 2000}})
    monkeypatch.setitem(STILL_THERE, "/v1/messages", b'{"type":"thinking_delta","thinking":""}')
    script = after_a_while(stream_head(), chunk(sse(delta(reasoning_content="hm"), delta("lo"), STOP)), b"0\r\n\r\n")
    names, _, body = told_after_a_while(start, target, "/v1/messages", script)
    blocks = [value["content_block"]["type"] for name, value in events_of(body) if name == "content_block_start"]
    assert blocks == ["thinking", "text"] and b'"thinking":"hm"' in body


@cases("text", ['["a"]', '"made.txt"', "42", "true", '[{"path": "x"}]'])
def test_arguments_that_are_json_but_no_object_come_back_as_one(start, target, text):
    def answer(talk):
        calls = [{"index": 0, "id": "a", "function": {"name": "f", "arguments": text}}]
        talk.send(http_stream(sse({"choices": [{"delta": {"tool_calls": calls}, "finish_reason": "tool_calls"}]})))
        talk.released = True

    target.answers["/v1/chat/completions"] = answer
    proxy = start("--target-api", "openai", "--translate", "always")
    body = {**AGENT_BODIES["/v1/messages"], "tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    told = "".join(value["delta"]["partial_json"] for name, value in events_of(proxy.post("/v1/messages", body).data)
                   if name == "content_block_delta")
    assert json.loads(told) == {"arguments": text}
    for given in ({"arguments": text}, json.loads(text)):
        history = [HI, turn("assistant", [{"type": "tool_use", "id": "a", "name": "f", "input": given}]),
                   turn("user", [{"type": "tool_result", "tool_use_id": "a", "content": "no"}])]
        assert proxy.post("/v1/messages", {**body, "messages": history}).status == 200
        sent = target.calls("/v1/chat/completions")[-1].json["messages"][1]["tool_calls"][0]["function"]["arguments"]
        assert json.loads(sent) == (given if isinstance(given, dict) else {"arguments": given})


def test_an_agent_hears_of_a_call_that_grows_for_long(start, target, monkeypatch):
    def fragment(text, **named):
        return chunk(sse({"tool_calls": [{"index": 0, "function": {"arguments": text, **named}}]}, done=False))

    def script(talk):
        talk.send(stream_head() + chunk(sse(delta("Hel"), done=False)) + fragment('{"q": "', name="f"))
        while not talk.target.go.wait(0.02):
            talk.send(fragment("x"))
        talk.send(fragment('"}') + chunk(sse(STOP)) + b"0\r\n\r\n")

    monkeypatch.setattr(proxy_module, "SIGN_OF_LIFE", 0.05)
    target.answers["/v1/chat/completions"] = script
    sock = start("--target-api", "openai", "--translate", "always").dial()
    sock.sendall(http_request("POST", "/v1/messages", AGENT_BODIES["/v1/messages"], "Connection: close"))
    read_until(sock, b'{"type":"text_delta","text":""}')
    target.go.set()
    assert b"event: message_stop" in read_all(sock)


@cases("path", AGENT_BODIES)
@cases("packed", [False, True])
def test_an_agent_gets_signs_of_life_in_the_midst_of_a_stream(start, target, path, packed, monkeypatch):
    first, rest = sse(delta(role="assistant", content=""), done=False), sse(delta("lo"), STOP)
    first, rest = (gzip.compress(first + rest)[:12], gzip.compress(first + rest)[12:]) if packed else (first, rest)

    def script(talk):
        talk.send(stream_head() if not packed else stream_head().replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"))
        talk.send(chunk(first))
        talk.target.go.wait(PATIENCE)
        talk.send(chunk(rest) + b"0\r\n\r\n")

    monkeypatch.setattr(proxy_module, "SIGN_OF_LIFE", 0.05)
    names, _, body = told_after_a_while(start, target, path, script)
    assert b'"lo"' in body and names[-1] == {"/v1/messages": "message_stop", "/v1/responses": "response.completed"}[path]


def test_a_target_that_falls_silent_is_given_up_whatever_an_agent_was_told(start, target, monkeypatch):
    monkeypatch.setattr(proxy_module, "SIGN_OF_LIFE", 0.05)
    target.answers["/v1/chat/completions"] = silent_mid_stream
    proxy = start("--target-api", "openai", "--translate", "always", "--timeout", "1")
    answer = proxy.post("/v1/messages", AGENT_BODIES["/v1/messages"])
    assert answer.data.count(b'{"type":"text_delta","text":""}') > 9
    assert b"event: error" in answer.data and b"upstream was silent for 1 s" in answer.data


@cases("path", AGENT_BODIES)
def test_what_breaks_after_a_sign_of_life_is_told_in_the_stream(start, target, path, monkeypatch):
    monkeypatch.setattr(proxy_module, "SIGN_OF_LIFE", 0.05)
    refused = b'{"error": {"message": "out of memory"}}'
    names, last, _ = told_after_a_while(start, target, path, after_a_while(
        b"HTTP/1.1 500 Oh\r\nContent-Length: %d\r\n\r\n" % len(refused) + refused))
    assert names[-1] == ("error" if path == "/v1/messages" else "response.failed") and "out of memory" in json.dumps(last)


@cases("path", AGENT_BODIES)
def test_an_agent_that_leaves_while_it_waits_takes_the_target_with_it(start, target, path, monkeypatch):
    monkeypatch.setattr(proxy_module, "SIGN_OF_LIFE", 0.05)
    target.answers["/v1/chat/completions"] = silent
    proxy = start("--target-api", "openai", "--translate", "always")
    sock = proxy.dial()
    sock.sendall(http_request("POST", path, AGENT_BODIES[path]))
    read_until(sock, STILL_THERE[path])
    sock.close()
    assert target.peer_closed.wait(PATIENCE)
    proxy.wait_logged(path)
    assert not proxy.errors


def test_an_agent_is_answered_where_no_more_threads_can_be_had(start, target, monkeypatch):
    begin = threading.Thread.start

    def refuse(thread):
        if thread.name.startswith("#"):
            raise RuntimeError("can't start new thread")
        begin(thread)

    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai", "--translate", "always")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    answer = proxy.post("/v1/messages", AGENT_BODIES["/v1/messages"])
    assert answer.status == 200 and b"event: message_stop" in answer.data and not proxy.errors


def test_the_next_request_does_not_wait_for_the_end_of_a_stream_that_is_late(start, target, monkeypatch):
    def script(talk):
        talk.send(stream_head() + chunk(HELLO))
        target.answers["/v1/chat/completions"] = http_stream(HELLO)
        talk.target.go.wait(3 * PATIENCE)       # the last chunk never comes

    monkeypatch.setattr(proxy_module, "DRAIN", 2 * PATIENCE)
    target.answers["/v1/chat/completions"] = script
    sock = start("--target-api", "openai").dial()
    for _ in range(2):
        sock.sendall(http_request("POST", "/api/chat", CHAT))
        assert read_until(sock, b"0\r\n\r\n").startswith(b"HTTP/1.1 200")
    target.go.set()


def test_an_answer_that_comes_when_its_request_is_over_is_let_go(start, target, monkeypatch):
    proxy = start("--target-api", "openai")
    scope, opened, replies = proxy_module.Scope(proxy.context), proxy.context.upstream.open, []

    def just_too_late(*given):
        replies.append(opened(*given))
        scope.__exit__(ValueError)      # what the request's own thread does, while this one waits for the answer
        return replies[0]

    monkeypatch.setattr(proxy.context.upstream, "open", just_too_late)
    with pytest.raises(proxy_module.ClientGone):
        scope.open(proxy.context.target, "GET", "/v1/models", [], b"")
    assert replies[0]._wire.sock.fileno() == -1


PHASES = [("before the headers", silent, "/api/chat", True), ("after the headers", silent_after_head, "/api/chat", True),
          ("in mid-stream", silent_mid_stream, "/api/chat", True), ("while a whole answer is read", silent_whole, "/api/chat", False),
          ("in a relayed stream", silent_mid_stream, "/v1/chat/completions", True),
          ("before an agent was told anything", silent, "/v1/messages", True), ("in an agent's stream", silent_mid_stream, "/v1/messages", True), ("in a relay before the headers", silent, "/v1/chat/completions", False)]


@cases("name, script, path, stream", PHASES, ids=[row[0] for row in PHASES])
def test_a_client_that_leaves_takes_the_target_with_it(start, target, name, script, path, stream):
    target.answers["/v1/chat/completions"] = script
    proxy = start("--target-api", "openai", "--translate", "always")
    sock = proxy.dial()
    sock.sendall(http_request("POST", path, {**CHAT, "max_tokens": 9, "stream": stream}))
    assert target.go.wait(PATIENCE)
    if script is silent_mid_stream:
        read_until(sock, b"Hel")
    sock.close()
    assert target.peer_closed.wait(PATIENCE)
    assert '" 499 ' in proxy.wait_logged(path)
    assert proxy.call("GET", "/api/version").status == 200 and not proxy.errors


def test_a_client_that_leaves_ends_the_wait_for_a_loading_server(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": "Loading model"}}, 503, "application/json", "Retry-After: 30")
    proxy = start("--target-api", "openai")
    sock = proxy.dial()
    sock.sendall(http_request("POST", "/api/chat", CHAT))
    target.wait_for("/v1/chat/completions")
    sock.close()
    assert '" 499 ' in proxy.wait_logged("/api/chat") and len(target.calls("/v1/chat/completions")) == 1


def test_pipelined_bytes_are_no_hangup(start, target):
    def slowly(talk):
        talk.send(stream_head() + chunk(sse(delta("Hel"), done=False)))
        talk.target.go.wait(PATIENCE)
        talk.send(chunk(sse(delta("lo"), STOP)) + b"0\r\n\r\n")
        talk.released = True

    target.answers["/v1/chat/completions"] = slowly
    proxy = start("--target-api", "openai")
    with proxy.dial() as sock:
        sock.sendall(http_request("POST", "/api/chat", CHAT))
        first = read_until(sock, b"Hel")
        sock.sendall(http_request("GET", "/api/version"))
        target.go.set()
        rest = read_until(sock, b'"version"')
        assert b'"done":true' in first + rest and proxy.wait_logged("/api/version") and not proxy.errors


def test_a_client_that_leaves_while_the_target_is_dialled_asks_it_nothing(start, certificate):
    """The target accepts, and keeps its half of the TLS handshake to itself until the client is known to be gone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.both)
    begun, go = threading.Event(), threading.Event()

    def shake_hands(sock, **options):
        begun.set()
        go.wait(PATIENCE)
        return context.wrap_socket(sock, **options)

    slow = ScriptedTarget(SimpleNamespace(wrap_socket=shake_hands))
    proxy = start("--target", slow.url, "--insecure", "--target-api", "openai")
    with proxy.dial() as sock:
        sock.sendall(http_request("GET", "/v1/x"))
        assert begun.wait(PATIENCE)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""        # the proxy has seen it, and ends its side
    go.set()
    assert '" 499 ' in proxy.wait_logged("/v1/x") and not slow.received
    slow.close()


def test_a_quick_answer_reaches_a_client_that_has_closed_its_half(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    answers = []
    for _ in range(3):                  # somebody looks now and then, and may look in just that moment
        with start("--target-api", "openai").dial() as sock:
            sock.sendall(http_request("POST", "/api/chat", CHAT))
            sock.shutdown(socket.SHUT_WR)
            answers.append(read_all(sock))
    assert any(b'"done":true' in answer and answer.endswith(b"0\r\n\r\n") for answer in answers)


def test_a_client_that_leaves_while_it_sends_its_request_is_let_go(start, target):
    proxy = start("--target-api", "openai")
    sock = proxy.dial()
    sock.sendall(http_request("POST", "/api/chat", CHAT)[:-5])
    sock.close()
    assert '" 499 ' in proxy.wait_logged("/api/chat") and not target.calls("/v1/chat/completions")


def test_a_bug_in_mid_stream_cuts_the_stream_and_nothing_else(start, target, monkeypatch, capfd):
    proxy = start("--target-api", "openai")
    encode = proxy_module.OllamaEncoder.encode

    def stumble(self, event):
        if isinstance(event, Finish):
            raise RuntimeError("a bug")
        return encode(self, event)

    def in_two(talk):
        talk.send(stream_head() + chunk(sse(delta("Hel"), done=False)))
        talk.target.go.wait(PATIENCE)
        talk.send(chunk(sse(STOP)) + b"0\r\n\r\n")

    target.answers["/v1/chat/completions"] = in_two
    monkeypatch.setattr(proxy_module.OllamaEncoder, "encode", stumble)
    with proxy.dial() as sock:
        sock.sendall(http_request("POST", "/api/chat", CHAT))
        read_until(sock, b"Hel")
        target.go.set()
        assert not read_all(sock).endswith(b"0\r\n\r\n")
    assert '" 200 ' in proxy.wait_logged("/api/chat") and "RuntimeError: a bug" in capfd.readouterr().err
    assert proxy.call("GET", "/api/version").status == 200 and proxy.drains()


# -- truth about streams


def cut(*data):
    def script(talk):
        for piece in data:
            talk.send(piece)
    return script


CUTS = [("in the middle of a chunk", cut(stream_head(), b"fff\r\n" + sse(delta("Hel"), done=False))),
        ("between chunks", cut(stream_head(), chunk(sse(delta("Hel"), done=False)))),
        ("the last chunk, but no finish", cut(stream_head(), chunk(sse(delta("Hel"), done=False)) + b"0\r\n\r\n")),
        ("before the promised length", cut(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + sse(delta("Hel"), done=False))),
        ("at the end of a bare body without finish", cut(b"HTTP/1.0 200 OK\r\n\r\n" + sse(delta("Hel"), done=False))),
        ("by broken chunk framing", cut(stream_head(), chunk(sse(delta("Hel"), done=False)) + b"zz\r\n"))]


@cases("name, script", CUTS, ids=[row[0] for row in CUTS])
def test_a_stream_that_is_cut_ends_in_an_error_line(start, target, name, script):
    target.answers["/v1/chat/completions"] = script
    proxy = start("--target-api", "openai")
    values = proxy.lines("/api/chat", CHAT)
    assert values[0]["message"]["content"] == "Hel" and set(values[-1]) == {"error"} and len(values) == 2
    answer = proxy.post("/api/chat", {**CHAT, "stream": False})
    assert answer.status == 502 and "upstream" in json.loads(answer.data)["error"]
    assert "done" not in json.loads(answer.data)


BROKEN = [row for row in CUTS if "finish" not in row[0]]       # the relay does not know what a finish is


@cases("name, script", BROKEN, ids=[row[0] for row in BROKEN])
def test_a_relayed_stream_that_is_cut_is_cut_for_the_client(start, target, name, script):
    target.answers["/v1/chat/completions"] = script
    request = http_request("POST", "/v1/chat/completions", {**CHAT, "stream": True}, "Connection: close")
    head, _, body = start("--target-api", "openai").raw(request).partition(b"\r\n\r\n")
    if b" 200 " in head:
        assert b"chunked" in head and b"Hel" in body and not body.endswith(b"0\r\n\r\n")
    else:
        assert head.startswith(b"HTTP/1.1 502 ") and json.loads(body)["error"]["message"]


def test_a_body_without_a_length_ends_with_its_connection(start, target):
    target.answers["/v1/chat/completions"] = cut(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + HELLO)
    proxy = start("--target-api", "openai")
    assert proxy.post("/v1/chat/completions", {**CHAT, "stream": True}).data == HELLO
    assert proxy.lines("/api/chat", CHAT)[-1]["done"]


# c: a large read with a fault somewhere in it
FAULTS = [("no size", b"zz\r\n"), ("too long a chunk", b"5\r\nhello world\r\n"), ("an empty line", b"\n"),
          ("the end", b"")]


@cases("name, fault", FAULTS, ids=[row[0] for row in FAULTS])
@cases("face", ["openai", "ollama"])
def test_what_came_before_a_fault_in_a_large_read_is_not_lost(start, target, face, name, fault):
    texts = [f"{at:04d} " for at in range(400)]
    if face == "ollama":
        frames = [sse(delta(text), done=False) for text in texts]
        path, proxy = "/api/chat", start("--target-api", "openai")
    else:
        frames = [ndjson({"message": {"role": "assistant", "content": text}, "done": False}) for text in texts]
        path, proxy = "/v1/chat/completions", start("--target-api", "ollama")
    target.answers["/v1/chat/completions"] = target.answers["/api/chat"] = cut(
        stream_head() + b"".join(map(chunk, frames)) + fault + chunk(frames[0]) * bool(fault))
    data = proxy.post(path, {**CHAT, "stream": True}).data
    lines = [json.loads(line.replace(b"data: ", b"")) for line in data.splitlines() if line]
    said = [line["message"] if face == "ollama" else line["choices"][0]["delta"] for line in lines[:-1]]
    assert [text for text in (message["content"] for message in said) if text] == texts
    assert "error" in lines[-1] and b"[DONE]" not in data


HEADS = [("half a head", b"HTTP/1.1 200 OK\r\nContent-Len"), ("no HTTP", b"SSH-2.0-OpenSSH\r\n\r\n"), ("a broken header", b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n"),
         ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"), ("an endless head", b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 20000),
         ("a bad length", b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n{}"), ("nothing at all", b""), ("brotli", b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\nxx")]


@cases("name, data", HEADS, ids=[row[0] for row in HEADS])
def test_a_broken_answer_is_502(start, target, name, data, capfd):
    target.answers["/v1/chat/completions"] = cut(data)
    proxy = start("--target-api", "openai")
    for path in ("/api/chat", "/v1/chat/completions"):
        answer = proxy.post(path, CHAT)
        assert answer.status == 502 and answer.data and "Traceback" not in capfd.readouterr().err


def test_a_length_beside_chunks_counts_for_nothing_and_ends_the_connection(start, target):
    body = json.dumps(WHOLE).encode()
    target.answers["/v1/chat/completions"] = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunk(body) + b"0\r\n\r\n")
    proxy = start("--target-api", "openai")
    assert len(proxy.get("/api/tags")["models"]) == 4
    for path, wanted in (("/v1/chat/completions", WHOLE), ("/api/chat", None), ("/v1/chat/completions", WHOLE)):
        before = target.connections
        answer = proxy.post(path, CHAT)
        assert answer.status == 200 and (wanted is None or json.loads(answer.data) == wanted)
        assert proxy.post("/v1/chat/completions", CHAT).status == 200 and target.connections > before


@cases("path", ["/api/chat", "/v1/chat/completions"])
@cases("chunked", [True, False])
def test_a_compressed_answer_that_stops_inside_is_not_whole(start, target, path, chunked):
    packed = gzip.compress(json.dumps(WHOLE).encode())[:-9]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    target.answers["/v1/chat/completions"] = head + (
        b"Transfer-Encoding: chunked\r\n\r\n" + chunk(packed) + b"0\r\n\r\n" if chunked else
        b"Content-Length: %d\r\n\r\n" % len(packed) + packed)
    request = http_request("POST", path, {**CHAT, "stream": False}, "Connection: close")
    data = start("--target-api", "openai").raw(request)
    assert data.startswith(b"HTTP/1.1 502 ") or b"chunked" in data and not data.endswith(b"0\r\n\r\n")


def test_interim_answers_are_not_the_answer(start, target):
    target.answers["/v1/chat/completions"] = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + http_answer(WHOLE)
    assert start("--target-api", "openai").lines("/api/chat", CHAT)[-1]["done"]


def test_a_silent_target_is_504_or_an_error_line(start, target):
    proxy = start("--target-api", "openai", "--timeout", "0.3")
    target.answers["/v1/chat/completions"] = silent
    answer = proxy.post("/api/chat", CHAT)
    assert answer.status == 504 and json.loads(answer.data) == {"error": "upstream was silent for 0.3 s"}
    target.answers["/v1/chat/completions"] = silent_mid_stream
    values = proxy.lines("/api/chat", CHAT)
    assert values[0]["message"]["content"] == "Hel" and values[-1] == {"error": "upstream was silent for 0.3 s"}


def test_a_stale_connection_is_replaced_once_and_only_without_an_answer(start, target):
    target.answers["/v1/chat/completions"] = http_answer(WHOLE)
    proxy = start("--target-api", "openai")
    connection = HTTPConnection("127.0.0.1", proxy.port, timeout=PATIENCE)

    def ask():                          # on one connection: what the last request used is in the pool by then
        connection.request("POST", "/api/chat", json.dumps(CHAT))
        answer = connection.getresponse()
        answer.read()
        return answer.status

    assert ask() == 200
    seen = target.connections

    def close_at_once(talk):
        talk.sock.close()

    target.answers["/v1/chat/completions"] = [close_at_once, http_answer(WHOLE)]
    assert ask() == 200                 # idle connection died under the request
    assert target.connections == seen + 1 and len(target.calls("/v1/chat/completions")) == 3
    target.answers["/v1/chat/completions"] = [close_at_once, close_at_once, http_answer(WHOLE)]
    assert ask() == 502                 # once, not twice
    target.answers["/v1/chat/completions"] = http_answer(WHOLE)
    ask()
    count = len(target.calls("/v1/chat/completions"))
    target.answers["/v1/chat/completions"] = cut(b"H")
    assert ask() == 502                 # a byte of an answer: never again
    assert len(target.calls("/v1/chat/completions")) == count + 1


@cases("answer", [http_answer(WHOLE), http_stream(HELLO)], ids=["counted", "chunked"])
@cases("rest", [b"", b"\r\n", b"X: y\r\n\r\n", http_answer({"error": "poison"}, 418)],
       ids=["nothing", "an empty line", "a trailer", "an answer"])
def test_bytes_behind_an_answer_are_nobodys(start, target, answer, rest):
    target.answers["/v1/chat/completions"] = [answer + rest, answer]
    proxy = start("--target-api", "openai")
    with proxy.dial() as sock:          # one connection: what the last request used is in the pool by then
        for _ in range(2):
            before = target.connections
            sock.sendall(http_request("POST", "/api/chat", CHAT))
            assert b'"done":true' in read_until(sock, b"0\r\n\r\n")
    assert target.connections == before + bool(rest)


def test_connections_to_the_target_are_kept(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai")
    with proxy.dial() as sock:
        for _ in range(5):
            sock.sendall(http_request("POST", "/api/chat", CHAT))
            assert b'"done":true' in read_until(sock, b"0\r\n\r\n")
    assert target.connections <= 2


def test_a_slow_reader_slows_the_target_and_gets_everything(start, target):
    total = 16000                       # 64 MB: more than all socket buffers on the way will take
    sent, stuck = [], threading.Event()

    def blast(talk):
        talk.send(stream_head())
        for at in range(total):
            data = chunk(sse(delta(f"{at:05d}" + "x" * 4000), done=False))
            talk.sock.settimeout(PATIENCE if stuck.is_set() else 0.2)
            while data:
                try:
                    data = data[talk.sock.send(data):]
                except socket.timeout:
                    assert not stuck.is_set()
                    stuck.set()
                    talk.sock.settimeout(PATIENCE)
            sent.append(at)
        talk.send(chunk(sse(STOP)) + b"0\r\n\r\n")

    target.answers["/v1/chat/completions"] = blast
    proxy = start("--target-api", "openai")
    with proxy.dial() as sock:
        sock.sendall(http_request("POST", "/api/chat", CHAT))
        pieces = [read_until(sock, b"00000")]
        assert stuck.wait(PATIENCE) and len(sent) < total       # the target stands still, because nobody reads
        pieces.append(read_until(sock, b'"done":true'))
    assert [int(found) for found in re.findall(rb'"content":"(\d{5})x{4000}"', b"".join(pieces))] == list(range(total))


# -- networks


@fixture
def certificate(tmp_path):
    """A private CA's certificate for 127.0.0.1, made with openssl where there is one."""
    path = tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
               "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(tmp_path / "key.pem"), "-out", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl here")
    both = tmp_path / "both.pem"
    both.write_text((tmp_path / "key.pem").read_text() + path.read_text())
    return SimpleNamespace(ca=str(path), both=str(both), key=str(tmp_path / "key.pem"))


@fixture
def tls_target(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.both)
    scripted = ScriptedTarget(context)
    scripted.answers["/v1/chat/completions"] = http_stream(HELLO)
    yield scripted
    scripted.close()


def test_a_tls_target_with_a_private_ca(start, tls_target, certificate):
    answer = start("--target", tls_target.url).post("/api/chat", CHAT)
    assert answer.status == 502 and re.fullmatch(
        f"cannot reach {tls_target.url}/v1: certificate not trusted \\(self.signed certificate\\); see --ca-file",
        json.loads(answer.data)["error"])
    for argv, environ in ((["--ca-file", certificate.ca], {}), ([], {"SSL_CERT_FILE": certificate.ca}), (["--insecure"], {})):
        proxy = start("--target", tls_target.url, *argv, environ=environ)
        assert [value["done"] for value in proxy.lines("/api/chat", CHAT)] == [False, False, True]
        assert proxy.post("/v1/chat/completions", {**CHAT, "stream": True}).data == HELLO
    tls_target.answers["/v1/chat/completions"] = silent_mid_stream
    sock = proxy.dial()
    sock.sendall(http_request("POST", "/api/chat", CHAT))
    read_until(sock, b"Hel")
    sock.close()
    assert tls_target.peer_closed.wait(PATIENCE)


def test_a_large_stream_through_tls_is_whole(start, tls_target, certificate):
    tls_target.answers["/v1/chat/completions"] = http_stream(sse(*[delta(f"{at:06d}") for at in range(20000)], STOP))
    proxy = start("--target", tls_target.url, "--ca-file", certificate.ca)
    text = "".join(value["message"]["content"] for value in proxy.lines("/api/chat", CHAT))
    assert text == "".join(f"{at:06d}" for at in range(20000))


def test_a_client_certificate_is_shown(start, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.both)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificate.ca)
    scripted = ScriptedTarget(context)
    scripted.answers["/v1/chat/completions"] = http_stream(HELLO)
    assert start("--target", scripted.url, "--ca-file", certificate.ca, "--client-cert", certificate.both).lines("/api/chat", CHAT)[-1]["done"]
    assert start("--target", scripted.url, "--ca-file", certificate.ca).post("/api/chat", CHAT).status == 502
    scripted.close()


def test_tls_towards_clients(start, target, certificate):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--tls-cert", certificate.ca, "--tls-key", certificate.key, "--target-api", "openai")
    context = ssl.create_default_context(cafile=certificate.ca)

    def dial():
        return context.wrap_socket(proxy.dial(), server_hostname="localhost")

    with dial() as sock:
        for _ in range(2):
            sock.sendall(http_request("POST", "/api/chat", CHAT))
            assert b'"done":true' in read_until(sock, b"0\r\n\r\n")
    target.answers["/v1/chat/completions"] = silent_mid_stream
    sock = dial()
    sock.sendall(http_request("POST", "/api/chat", CHAT))
    read_until(sock, b"Hel")
    sock.close()
    assert target.peer_closed.wait(PATIENCE)
    assert b"200" not in proxy.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with pytest.raises(UsageError) as caught:
        start("--tls-cert", "missing.pem")
    assert str(caught.value) == "--tls-cert missing.pem: no such file or directory"
    with pytest.raises(UsageError) as caught:
        start("--tls-cert", certificate.ca, "--tls-key", "missing.pem")
    assert str(caught.value) == f"--tls-cert {certificate.ca} with --tls-key missing.pem: no such file or directory"


def test_debug_tells_of_a_client_that_speaks_no_tls(start, certificate):
    proxy = start("--tls-cert", certificate.both, "--target-api", "openai", "--debug")
    with proxy.dial() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert "[PROXY] the connection of 127.0.0.1 broke: " in proxy.wait_logged(" broke: ")


class TunnelProxy:
    """A CONNECT proxy with a password; everything is tunnelled to one port, whatever name was asked for."""

    def __init__(self, port):
        self.requests = []
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        head = read_until(sock, b"\r\n\r\n")
        self.requests.append(head)
        if base64.b64encode(b"user:p@ss") not in head:
            sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            sock.close()
            return
        far = socket.create_connection(("127.0.0.1", self._port))
        if head.startswith(b"CONNECT"):
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            far.sendall(head)

        def pump(one, two):
            try:
                while True:
                    data = one.recv(65536)
                    if not data:
                        break
                    two.sendall(data)
            except OSError:
                pass
            shut(two)

        threading.Thread(target=pump, args=(far, sock), daemon=True).start()
        pump(sock, far)

    def close(self):
        self._listener.close()


def test_a_connect_proxy_with_a_password(start, tls_target, certificate, monkeypatch):
    tunnel = TunnelProxy(tls_target.port)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:p%40ss@127.0.0.1:{tunnel.port}")
    proxy = start("--target", "https://inference.example:8443/v1", "--insecure", "--target-api", "openai", "--api-key", "sk-target-key")
    assert proxy.lines("/api/chat", CHAT)[-1]["done"]
    assert tunnel.requests[0].startswith(b"CONNECT inference.example:8443 ") and b"sk-target" not in b"".join(tunnel.requests)
    assert tls_target.calls("/v1/chat/completions")[0].headers["host"] == "inference.example:8443"
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:wrong@127.0.0.1:{tunnel.port}")
    answer = start("--target", "https://inference.example:8443/v1", "--insecure", "--target-api", "openai").post("/api/chat", CHAT)
    assert answer.status == 502 and "407" in answer.data.decode() and "wrong" not in answer.data.decode()
    count = len(tunnel.requests)
    assert start("--target", tls_target.url, "--insecure").lines("/api/chat", CHAT)[-1]["done"]     # loopback has no proxy
    assert len(tunnel.requests) == count
    tunnel.close()


def test_a_plain_http_proxy_and_no_proxy(start, target, monkeypatch):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    tunnel = TunnelProxy(target.port)
    monkeypatch.setenv("http_proxy", f"http://user:p%40ss@127.0.0.1:{tunnel.port}")
    assert start("--target", "http://inference.example/v1", "--target-api", "openai").lines("/api/chat", CHAT)[-1]["done"]
    assert b"http://inference.example/v1/" in tunnel.requests[0]
    monkeypatch.setenv("no_proxy", "inference.example")
    assert start("--target", "http://inference.example/v1", "--target-api", "openai").post("/api/chat", CHAT).status == 502
    tunnel.close()
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    answer = start("--target", "http://inference.example/v1", "--target-api", "openai").post("/api/chat", CHAT)
    assert json.loads(answer.data) == {
        "error": "cannot reach http://inference.example/v1 through the proxy 127.0.0.1:9: connection refused"}


def deflated(data, wbits):
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(data) + packer.flush()


@cases("coding, wbits", [("gzip", 31), ("x-gzip", 31), ("deflate", 15)],
       ids=["gzip", "x-gzip", "deflate"])
def test_compressed_answers_are_unpacked_however_they_are_cut(start, target, coding, wbits):
    packed = deflated(HELLO, wbits)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: {coding}\r\n".encode()
    counted = [head + b"Content-Length: %d\r\n\r\n" % len(packed)]
    singly = [packed[at:at + 1] for at in range(len(packed))]
    chunked = [head + b"Transfer-Encoding: chunked\r\n\r\n"]
    proxy = start("--target-api", "openai")
    for pieces in (counted + [packed], counted + singly, chunked + [*map(chunk, singly), b"0\r\n\r\n"]):
        target.answers["/v1/chat/completions"] = cut(*pieces)
        assert proxy.post("/v1/chat/completions", {**CHAT, "stream": True}).data == HELLO
        assert [value["message"]["content"] for value in proxy.lines("/api/chat", CHAT)] == ["Hel", "lo", ""]
    packed = deflated(json.dumps(WHOLE).encode(), wbits)
    target.answers["/v1/chat/completions"] = http_answer(packed, 200, "application/json", f"Content-Encoding: {coding}")
    assert json.loads(proxy.post("/v1/chat/completions", CHAT).data) == WHOLE
    assert json.loads(proxy.post("/api/chat", {**CHAT, "stream": False}).data)["message"]["content"] == "Hello"


def test_a_compressed_stream_is_unpacked_as_it_comes(start, target):
    packer = zlib.compressobj(wbits=31)
    first = packer.compress(sse(delta("Hel"), done=False)) + packer.flush(zlib.Z_SYNC_FLUSH)
    rest = packer.compress(sse(delta("lo"), STOP)) + packer.flush()

    def slowly(talk):
        talk.send(stream_head().replace(b"\r\n", b"\r\nContent-Encoding: gzip\r\n", 1) + chunk(first))
        talk.target.go.wait(PATIENCE)
        talk.send(chunk(rest) + b"0\r\n\r\n")

    target.answers["/v1/chat/completions"] = slowly
    with start("--target-api", "openai").dial() as sock:
        sock.sendall(http_request("POST", "/api/chat", CHAT))
        read_until(sock, b"Hel")
        target.go.set()
        read_until(sock, b'"done":true')


def test_ipv6(start, target):
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    port = listener.getsockname()[1]
    listener.close()
    proxy = RunningProxy("--listen", f"[::1]:{port}", "--target", target.url)
    sock = socket.create_connection(("::1", port), timeout=PATIENCE)
    sock.sendall(b"GET / HTTP/1.1\r\nHost: [::1]:%d\r\nConnection: close\r\n\r\n" % port)
    assert b"Ollama is running" in read_all(sock)
    sock.close()
    answer = start("--target", f"http://[::1]:{port}").call("GET", "/api/tags")
    assert answer.status == 200 and b"m:latest" in answer.data       # a proxy of our own kind behind us
    proxy.close()
    proxy = start("--listen", "[::]:0", "--client-key", "sk-client")
    assert proxy.call("GET", "/health").status == 200
    proxy.wait_logged(' 127.0.0.1 "GET /health HTTP/1.1" 200')       # and not ::ffff:127.0.0.1


# -- load


def test_many_streams_at_once_are_complete_and_correct(start, target):
    count, pieces = 200, 50

    def script(talk):
        mark = talk.request.json["messages"][0]["content"]
        talk.send(stream_head())
        for at in range(pieces):
            talk.send(chunk(sse(delta(f"{mark}-{at} "), done=False)))
        talk.send(chunk(sse(STOP)) + b"0\r\n\r\n")
        talk.released = True

    target.answers["/v1/chat/completions"] = script
    proxy = start("--target-api", "openai")
    wrong = []

    def one(number):
        values = proxy.lines("/api/chat", {"model": "m", "messages": [{"role": "user", "content": f"s{number}"}]})
        if "".join(value["message"]["content"] for value in values) != "".join(f"s{number}-{at} " for at in range(pieces)):
            wrong.append(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc") if pytest else lambda f: f
def test_nothing_grows_over_thousands_of_requests(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai")

    def some(number):
        with proxy.dial() as sock:
            for _ in range(number):
                sock.sendall(http_request("POST", "/api/chat", CHAT) + http_request("GET", "/api/version"))
                read_until(sock, b'"version"')

    some(50)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        some(50)
    proxy.raw(http_request("GET", "/", b"", "Connection: close"))
    assert len(os.listdir("/proc/self/fd")) <= before[0] + 6 and threading.active_count() <= before[1] + 6


def mutated(data, chance):
    """A few bytes changed, dropped, doubled or put elsewhere."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data))
        kind = chance.randrange(4)
        if kind == 0:
            data[at] = chance.randrange(256)
        elif kind == 1:
            del data[at:at + chance.randint(1, 8)]
        elif kind == 2:
            data[at:at] = data[at:at + chance.randint(1, 20)]
        else:
            data[at:at] = chance.choice([b"\r\n", b"\n", b"\0", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"{" * 50, b"\xff"])
        if not data:
            data = bytearray(b"x")
    return bytes(data)


def test_mutated_streams_never_crash_a_decoder():
    chance = random.Random(11)
    for _ in range(1500):
        _, how, data, _ = chance.choice(STREAMS)
        out = translated([mutated(data or b"x", chance)], how if how != "prefill" else "chat")
        last = json.loads(out.splitlines()[-1])
        assert last.get("done") is True or set(last) == {"error"}


def test_mutated_requests_never_crash_the_server(start, target, capfd):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai", "--client-timeout", "0.2")
    valid = [http_request("POST", "/api/chat", CHAT), http_request("POST", "/v1/chat/completions", CHAT), http_request("GET", "/api/tags", b"", "Origin: http://localhost"),
             http_request("POST", "/api/chat", b"", "Transfer-Encoding: chunked") + chunk(json.dumps(CHAT).encode()) + b"0\r\n\r\n"]
    chance = random.Random(5)
    for _ in range(250):
        with proxy.dial() as sock:
            sock.sendall(mutated(chance.choice(valid), chance))
            sock.shutdown(socket.SHUT_WR)
            for line in re.findall(rb"HTTP/1\.1 (\d+)", read_all(sock)):
                assert line != b"500"
    assert proxy.call("GET", "/api/version").status == 200
    assert "Traceback" not in capfd.readouterr().err


# ----------------------------------------------------------------------------
# The program: command line, life cycle
# ----------------------------------------------------------------------------


LAUNCHED = []


@fixture(autouse=True)
def no_orphans():
    """A test that fails leaves no process behind."""
    yield
    while LAUNCHED:
        process = LAUNCHED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()


def launch(*argv, source=None, **environ):
    """The program in a process of its own, on a free port; returns it with the URL it printed."""
    command = [sys.executable, *(source or [str(HERE / "ollama_proxy.py")]), "--listen", "127.0.0.1:0", *argv]
    clean = {name: value for name, value in OWN.items() if not name.upper().endswith("_PROXY") and not name.startswith("OLLAMA")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**clean, "PYTHONUNBUFFERED": "1", **environ})
    LAUNCHED.append(process)
    text = ""
    for line in process.stdout:
        text += line
        if "for clients" in line:
            break
    found = re.search(r"OLLAMA_HOST=http://127\.0\.0\.1:(\d+)", text)
    if not found:
        process.kill()
        raise AssertionError((text, process.communicate()))
    process.port = int(found[1])
    process.banner = text
    return process


def banner(url, target, read="", everywhere=""):
    """What the program says of itself at start, but for --demo."""
    return f"ollama_proxy {proxy_module.__version__}\n  listening on  {everywhere or url}\n  target        {target}\n" \
           f"  for clients   OLLAMA_HOST={url}   or, for OpenAI clients, base URL {url}/v1\n" \
        + (f"  read          {read}\n" if read else "")


DEMO_ASKED = '{"model": "demo-chat", "messages": [{"role": "user", "content": "hello"}]}'


def ask(port, method, path, body=None):
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request(method, path, json.dumps(body) if body else None)
    answer = connection.getresponse()
    status, data = answer.status, answer.read()
    connection.close()
    return status, data


def ends_well(process):
    """SIGTERM ends it with status 0 and without complaints; returns what else was on stderr."""
    process.terminate()
    errors = process.stderr.read()
    assert process.wait(PATIENCE) == 0 and "Traceback" not in errors
    return errors


@pytest.mark.skipif(os.name != "posix", reason="only POSIX tells whether a pipe takes more") if pytest else lambda f: f
def test_a_log_that_nobody_reads_stops_nothing(target):
    process = launch("--target", target.url, "--target-api", "openai", "--debug")
    with socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE) as sock:
        for _ in range(60):             # two lines each: more than a pipe and the program's memory hold
            sock.sendall(http_request("GET", "/api/version") * 100)
            data = b""
            while data.count(b'"version"') < 100:
                data += sock.recv(1 << 20)
    seen = threading.Event()

    def read():
        for line in iter(process.stdout.readline, ""):
            if re.fullmatch(r"\([1-9]\d* lines were lost: nobody read the log\)\n", line):
                seen.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for _ in range(1000):               # once somebody reads, it goes on, and says so
        assert ask(process.port, "GET", "/api/version")[0] == 200
        if seen.is_set():
            break
    assert seen.wait(PATIENCE)
    ends_well(process)


def test_a_closed_stdout_does_not_kill_the_service(target):
    process = launch("--target", target.url, "--target-api", "openai")
    process.stdout.close()
    for _ in range(3):
        assert ask(process.port, "GET", "/api/version")[0] == 200
    ends_well(process)


def test_demo_shows_the_whole_path_from_source_given_with_c():
    """pipx runs a URL as source: no __file__, no second file."""
    source = (HERE / "ollama_proxy.py").read_text(encoding="utf-8")
    command = [sys.executable, "-c", "import sys; source = sys.stdin.read(); sys.argv[0] = 'ollama_proxy'; exec(compile(source, '<string>', 'exec'), {'__name__': '__main__'})",
               "--demo", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(source)
    process.stdin.close()
    shown = [process.stdout.readline() for _ in range(5)]
    port = int(re.search(r"listening on  http://127\.0\.0\.1:(\d+)", shown[1])[1])
    url = f"http://127.0.0.1:{port}"
    assert "".join(shown) == banner(url, "demo target inside this process (OpenAI API), 2 models: demo-chat:latest, "
                                         "demo-embed:latest") \
        + f"  try it        curl {url}/api/chat -d '{DEMO_ASKED}'\n"
    status, data = ask(port, "POST", "/api/chat", {"model": "demo-chat", "messages": [{"role": "user", "content": "hello"}], "stream": False})
    assert status == 200 and json.loads(data)["message"]["content"] == "You said: hello"
    process.terminate()
    assert process.wait(PATIENCE) == 0
    process.stdout.close()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX") if pytest else lambda f: f
def test_sigterm_lets_streams_end_and_exits_0(target):
    def slowly(talk):
        talk.send(stream_head() + chunk(sse(delta("Hel"), done=False)))
        talk.target.go.wait(PATIENCE)
        talk.send(chunk(sse(delta("lo"), STOP)) + b"0\r\n\r\n")

    target.answers["/v1/chat/completions"] = slowly
    process = launch("--target", target.url, "--target-api", "openai")
    assert process.banner == banner(f"http://127.0.0.1:{process.port}", f"{target.url}/v1 (OpenAI API), 4 models: "
                                    "m:latest, vendor/big:free, qwen3:8b, text-embed:latest")
    idle = socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE)
    idle.sendall(http_request("GET", "/api/version"))
    read_until(idle, b"version")
    sock = socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE)
    sock.sendall(http_request("POST", "/api/chat", CHAT))
    first = read_until(sock, b"Hel")
    process.send_signal(signal.SIGTERM)
    assert read_all(idle) == b""                # idle connections end at once
    target.go.set()
    assert b'"done":true' in first + read_all(sock)
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "Traceback" not in errors
    socket.create_server(("127.0.0.1", process.port)).close()       # the port is free at once


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX") if pytest else lambda f: f
def test_a_second_signal_cuts_at_once(target):
    target.answers["/v1/chat/completions"] = silent_mid_stream
    process = launch("--target", target.url, "--target-api", "openai", "--grace", "1000")
    socks = [socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE) for _ in range(2)]
    for sock in socks:
        sock.sendall(http_request("POST", "/api/chat", CHAT))
        read_until(sock, b"Hel")
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)      # the first may not have been noticed yet
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            pass
    _, errors = process.communicate()
    assert process.returncode == 0 and errors == "finishing 2 requests; again to cut them\ncut 2 requests\n"
    [sock.close() for sock in socks]


def run_program(*argv, **environ):
    return subprocess.run([sys.executable, str(HERE / "ollama_proxy.py"), *argv], capture_output=True, text=True, timeout=PATIENCE * 2, env={**unset(), **environ})


def unset():
    """The environment without what the program reads."""
    return {name: value for name, value in OWN.items() if not name.startswith(("OLLAMA", "OPENROUTER"))}


def test_problems_at_start_are_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        done = run_program("--listen", address)
        why = os.strerror(errno.EADDRINUSE)
        assert done.returncode == 1 and done.stderr == (
            f"ollama_proxy: cannot listen on {address}: {why[0].lower()}{why[1:]} (is an Ollama or another proxy running "
            "there?): choose another with --listen\n")
    done, why = run_program("--listen", "192.0.2.1:0"), os.strerror(errno.EADDRNOTAVAIL)
    assert done.returncode == 1 and done.stderr == (
        f"ollama_proxy: cannot listen on 192.0.2.1:0: {why[0].lower()}{why[1:]}\n")
    for argv, text in ((["--target", "openrouter"], "openrouter.ai needs a key: set OPENROUTER_API_KEY or give --api-key"),
                       (["--target", "http://a b"], f"bad target URL 'http://a b': {A_URL}"),
                       (["--target", "http://127.0.0.1:5", "--listen", "127.0.0.1:5"],
                        f"the target http://127.0.0.1:5/v1 {ITSELF}")):
        done = run_program(*argv)
        assert done.returncode == 2 and done.stderr == f"ollama_proxy: {text}\n" and not done.stdout
    assert run_program("--version").stdout == f"ollama_proxy {proxy_module.__version__}\n"


def test_check_tells_what_it_found(target):
    demo = DemoServer()
    done = run_program("--check", "--target", demo.url)
    assert done.returncode == 0 and done.stdout == f"""\
target      {demo.url}/v1 without a key
speaks      OpenAI API
models      2: demo-chat:latest, demo-embed:latest
model       demo-chat:latest (the first; --models-filter chooses): context 65536, completion, tools
chat        works (1 piece, 4 tokens)
stream      works (4 pieces, 4 tokens)
tools       works (1 piece, 1 token, calls get_time)
schema      works (1 piece, 4 tokens)
thinking    no: no thinking came
vision      works (1 piece, 7 tokens)
suffix      works (1 piece, 6 tokens)
embeddings  works (8 numbers from demo-embed:latest)
VS Code Copilot        ready
JetBrains AI Assistant ready
Open WebUI             ready
Home Assistant         ready
ollama CLI             ready
Claude Code            ready
Codex                  ready
verdict     7 of 7 kinds of client are ready
"""
    target.answers["/v1/chat/completions"] = picky({
        "max_tokens": "Unsupported parameter: 'max_tokens'", "stream_options": "unknown field stream_options"})
    done = run_program("--check", "--target", target.url)
    assert done.returncode == 0 and "FAILED" not in done.stdout
    assert "tools       no: the model answered in text instead of calling\n" in done.stdout
    target.close()
    done = run_program("--check", "--target", f"http://127.0.0.1:{target.port}", "--api-key", "k")
    assert done.returncode == 1 and done.stdout == (
        f"target      {target.url}/v1 with a key\n"
        f"FAILED      cannot reach {target.url}/v1: connection refused\n")
    demo.shutdown()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork") if pytest else lambda f: f
def test_workers_share_one_socket_and_end_together(target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    process = launch("--target", target.url, "--workers", "2")
    for _ in range(20):
        assert ask(process.port, "POST", "/api/chat", CHAT)[0] == 200
    ends_well(process)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", process.port), timeout=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork") if pytest else lambda f: f
def test_every_worker_lets_its_streams_end(target):
    def held(talk):
        talk.send(stream_head() + chunk(sse(delta("Hel"), done=False)))
        talk.target.go.wait(PATIENCE)
        talk.send(chunk(HELLO) + b"0\r\n\r\n")

    target.answers["/v1/chat/completions"] = held
    process, finishing = launch("--target", target.url, "--target-api", "openai", "--workers", "4", "--grace", "1000"), 0
    with contextlib.ExitStack() as stack:
        too_late = threading.Timer(PATIENCE, process.kill)
        stack.callback(too_late.cancel)
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE)) for _ in range(12)]
        for sock in socks:
            sock.sendall(http_request("POST", "/api/chat", CHAT))
            read_until(sock, b"Hel")
        process.terminate()
        too_late.start()
        while finishing < 12:           # each process tells how many of them are its own
            line = process.stderr.readline()
            assert line.startswith("finishing "), line
            finishing += int(line.split()[1])
        target.go.set()
        for sock in socks:
            assert b'"done":true' in read_until(sock, b"0\r\n\r\n")
        assert (process.wait(PATIENCE), process.stderr.read()) == (0, "")


@cases("argv, warnings", [
    (["--listen", "0.0.0.0:0"], ["everybody who reaches 0.0.0.0:{port} can use the target and its key; set --client-key "
                                 "or listen on 127.0.0.1"]),
    (["--insecure"], ["--insecure: the target's certificate is not checked"]),
    (["--listen", "0.0.0.0:0", "--client-key", "abcd"], [])])
def test_a_warning_when_exposed_without_a_key(argv, warnings):
    process = launch("--target", "http://127.0.0.1:9", *argv)
    everywhere = f"http://0.0.0.0:{process.port}" if "--listen" in argv else ""
    why = os.strerror(errno.ECONNREFUSED)
    assert process.banner == banner(
        f"http://127.0.0.1:{process.port}", "http://127.0.0.1:9/v1 (not answering yet), cannot reach "
        f"http://127.0.0.1:9/v1: {why[0].lower()}{why[1:]}", "", everywhere)
    assert [line for line in ends_well(process).splitlines() if "warning" in line] == [
        "warning: " + line.format(port=process.port) for line in warnings]


# ----------------------------------------------------------------------------
# Replicas: the README's balancers, where they are installed, in front of real processes
# ----------------------------------------------------------------------------


def readme_block(language, **replaced):
    """A fenced block of the README, some words in it replaced."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)[1]
    for printed, used in replaced.items():
        assert printed in block, printed
        block = block.replace(printed, used)
    return block


def start_balancer(name, folder, **replaced):
    """The real program with the README's configuration; it runs until it is terminated."""
    block, file = readme_block(name, **replaced), folder / "balancer.conf"
    if name == "nginx":                 # the README prints what belongs inside http {}
        paths = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        block = f"daemon off; master_process off; pid {folder}/pid; error_log stderr crit; events {{}}\n" \
                f"http {{ access_log off; {paths}\n{block}}}\n"
    file.write_text(block)
    command = ["nginx", "-p", str(folder), "-c", str(file)] if name == "nginx" else ["haproxy", "-db", "-f", str(file)]
    return subprocess.Popen(command, env={**OWN, "PATH": WIDE_PATH}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


WIDE_PATH = OWN.get("PATH", "") + os.pathsep + "/usr/sbin"      # where Debian keeps servers


def start_replica(target, port=0):
    """The program on a port of its own; `answered` is set once it has answered a chat."""
    process = launch("--target", target.url, "--target-api", "openai", "--grace", "60", "--listen", f"127.0.0.1:{port}")
    process.answered = threading.Event()

    def read():
        for line in process.stdout:
            if '"POST /api/chat HTTP/1.1" 200' in line:
                process.answered.set()

    threading.Thread(target=read, daemon=True).start()
    return process


def outcome(port, content="", stream=True):
    """What became of one chat: "whole", "cut" when it broke after its beginning, or else what was wrong."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST", "/api/chat", json.dumps({
            "model": "m", "stream": stream, "messages": [{"role": "user", "content": content}],
            "padding": "x" * (100_000 if content else 0)}))             # coding agents send as much
        answer = connection.getresponse()
    except (OSError, HTTPException) as error:
        return f"lost: {error!r}"
    try:
        data = answer.read()
    except (OSError, HTTPException):
        return "cut"
    finally:
        connection.close()
    return "whole" if answer.status == 200 and b'"done":true' in data else f"lost: {answer.status} {data[-200:]!r}"


def wait_listening(port):
    """Waits until somebody accepts connections there."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def wait_asked(target, content, count):
    """Waits until the target has been asked so often with this content."""
    def found():
        return sum(request.json["messages"][0]["content"] == content for request in target.calls("/v1/chat/completions"))

    with target.asked:
        assert target.asked.wait_for(lambda: found() >= count, PATIENCE), (content, found())


def asked_by(target, content):
    """The replica that last asked the target this: its mark in the header that finds loops."""
    return [request.headers["x-ollama-proxy"] for request in target.calls("/v1/chat/completions")
            if request.json["messages"][0]["content"] == content][-1]


def replica_name(target, port):
    """The mark of the replica on this port."""
    assert outcome(port, f"who listens on {port}?") == "whole"
    return asked_by(target, f"who listens on {port}?")


class Chats:
    """Chats in threads of their own: `count` at once, each one or, with `again`, one after the other until stop()."""

    def __init__(self, port, count, content="", again=False):
        self.outcomes, self._again, self._changed = [], again, threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(port, content, bool(content or at % 2))) for at in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, *chat):
        while True:
            told = outcome(*chat)
            with self._changed:
                self.outcomes.append(told)
                self._changed.notify_all()
            if not self._again:
                return

    def wait_for(self, more):
        """Waits until so many more have ended."""
        with self._changed:
            wanted = len(self.outcomes) + more
            assert self._changed.wait_for(lambda: len(self.outcomes) >= wanted, PATIENCE)

    def stop(self):
        """Waits for those under way; returns the outcomes."""
        self._again = False
        for thread in self._threads:
            thread.join(PATIENCE)
        return self.outcomes


@cases("balancer", ["haproxy", "nginx"])
def test_replicas_die_and_return_and_no_request_that_had_not_begun_is_lost(balancer, target, tmp_path):
    if os.name != "posix" or not shutil.which(balancer, path=WIDE_PATH):
        pytest.skip(f"{balancer} is not installed")
    begun, finish = threading.Semaphore(0), threading.Event()

    def script(talk):
        content = talk.request.json["messages"][0]["content"]
        if content == "held":           # the answer has not begun
            target.go.wait(PATIENCE)
        if content == "begun":
            talk.send(stream_head() + chunk(sse(delta("Hel"), done=False)))
            begun.release()
            finish.wait(PATIENCE)
            talk.send(chunk(sse(delta("lo"), STOP)) + b"0\r\n\r\n")
        elif talk.request.json["stream"]:
            talk.send(http_stream(HELLO))
        else:
            talk.send(http_answer(WHOLE))
        talk.released = True

    target.answers["/v1/chat/completions"] = script
    replicas = [start_replica(target) for _ in range(3)]
    ports = [replica.port for replica in replicas]
    with socket.create_server(("127.0.0.1", 0)) as free:
        front = free.getsockname()[1]
    process = start_balancer(balancer, tmp_path, **{"0.0.0.0:11434": f"127.0.0.1:{front}"}, **{
        f"127.0.0.1:1150{at}": f"127.0.0.1:{port}" for at, port in enumerate(ports, 1)})
    try:
        wait_listening(front)
        names = [replica_name(target, port) for port in ports]
        load = Chats(front, 4, again=True)

        held = Chats(front, 6, "held")          # one replica dies with requests in its hands
        wait_asked(target, "held", 6)
        busy = names.index(asked_by(target, "held"))
        for row in (replicas, ports):           # it is the first from now on
            row.insert(0, row.pop(busy))
        replicas[0].kill()
        wait_asked(target, "held", 7)
        target.go.set()
        assert held.stop() == ["whole"] * 6

        replicas[0] = start_replica(target, ports[0])       # it returns, and gets work again
        assert replicas[0].answered.wait(PATIENCE)

        streams = Chats(front, 6, "begun")      # one is stopped as a service manager does, with streams under way
        for _ in range(3):
            assert begun.acquire(timeout=PATIENCE)
        replicas[1].terminate()
        load.wait_for(40)
        finish.set()
        assert streams.stop() == ["whole"] * 6 and replicas[1].wait(PATIENCE) == 0

        told = load.stop()
        assert len(told) > 100 and not [one for one in told if one not in ("whole", "cut")]
        assert told.count("cut") <= 4           # those that streamed when the first one was killed
    finally:
        for one in (process, *replicas):
            one.kill()
            one.wait()


# ----------------------------------------------------------------------------
# Documents agree with the program
# ----------------------------------------------------------------------------


def test_the_docstring_lists_every_route_and_every_room():
    text = proxy_module.__doc__
    rows = [line.split() for line in text.partition("Endpoints")[2].splitlines()]
    assert set(proxy_module.ROUTES) <= {(row[0], path) for row in rows for path in row[1:]}
    source = (HERE / "ollama_proxy.py").read_text(encoding="utf-8")
    rooms = re.findall(r"^# Room (\d+)\.  ([A-Z]\w+(?: \w+)?)", source, re.M)
    listed = re.findall(r"^ +(\d+)  ([A-Z]\w+(?: \w+)?)  ", text, re.M)
    assert [number for number, _ in rooms] == [number for number, _ in listed]
    for (_, banner), (_, name) in zip(rooms, listed):
        assert banner.startswith(name.split()[0]) or name.startswith(banner.split()[0]), (banner, name)


def test_the_readme_lists_every_setting_and_every_route():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for row in proxy_module.SETTINGS:
        assert all(f"`{flag}" in text for flag in row.flags.split()), row.flags
        assert all(f"`{name}`" in text for name in row.variables[:1]), row.variables
    for _, path in proxy_module.ROUTES:
        assert f"`{path}`" in text, path


def test_the_readme_has_the_groups_of_help_and_the_rooms_and_stays_short():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    group, shown = "", []
    for name, flags in re.findall(r"^\| (\*\*.+?\*\*)? ?\| (`--[^|]*(?:\\\|[^|]*)*) \|", text, re.M):
        group = name.strip("*") or group
        shown += [(group, flag) for flag in re.findall("`(--[a-z-]+)", flags)]
    group, wanted = "", []
    for row in proxy_module.SETTINGS:
        group = proxy_module.GROUPS.get(row.field, group)
        wanted += [(group, flag) for flag in row.flags.split()]
    assert shown == wanted
    for number, name in re.findall(r"^ +(\d+)  ([A-Z]\w+(?: \w+)?)  ", proxy_module.__doc__, re.M):
        assert re.search(rf"\b{number}\s+{name}".replace(" ", r"\s+"), text), (number, name)
    assert len(text.splitlines()) < 450


def test_the_file_imports_the_standard_library_alone():
    import ast
    names = set()
    for node in ast.walk(ast.parse((HERE / "ollama_proxy.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    known = getattr(sys, "stdlib_module_names", names)
    assert names <= set(known) | {"__future__"}


# ----------------------------------------------------------------------------
# Agents: /v1/messages and /v1/responses
# ----------------------------------------------------------------------------

MODEL = "qwen3:8b"                      # stands in the lists of both scripted targets
PNG = "iVBORw0KGgo="
DATA_URL = f"data:image/png;base64,{PNG}"
IMAGE_BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
BY_URL = {"type": "image", "source": {"type": "url", "url": "https://x.test/a.png"}}
INPUT_IMAGE = {"type": "input_image", "detail": "high", "image_url": DATA_URL}
PLAIN = {"/v1/messages": {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]},
         "/v1/responses": {"model": MODEL, "input": "hi"}}
AGENT_FACES, TARGET_KINDS = list(PLAIN), ["openai", "ollama"]
CHAT_PATH = {"openai": "/v1/chat/completions", "ollama": "/api/chat"}
LIST_PATH = {"openai": ("/v1/models", http_answer(LIST)), "ollama": ("/api/tags", http_answer(TAGS))}


def spoken(kind, stream, *parts, reason="stop"):
    """A target's HTTP answer that says `parts`: ("thinking", text), ("text", text) or ("call", id, name, arguments)."""
    calls = [entry[1:] for entry in parts if entry[0] == "call"]
    if not stream:
        thinking, text = ("".join(entry[1] for entry in parts if entry[0] == name) for name in ("thinking", "text"))
        if kind == "ollama":
            message = {"role": "assistant", "content": text, "thinking": thinking, "tool_calls": [
                {"id": ident, "function": {"name": name, "arguments": inner}} for ident, name, inner in calls]}
            return http_answer({"message": message, "done": True, "done_reason": reason, "prompt_eval_count": 7,
                                "eval_count": 9})
        wired = [{"id": ident, "type": "function", **part(name, json.dumps(inner))} for ident, name, inner in calls]
        return http_answer(whole(text or None, "tool_calls" if wired else reason, wired, usage=usage(7, 9)).replace(
            b'"role"', b'"reasoning_content": %b, "role"' % json.dumps(thinking).encode(), 1))
    pieces, at = [], 0
    for name, *inner in parts:
        if kind == "openai" and name == "call":
            pieces.append(call_delta({"index": at, "id": inner[0], **part(inner[1], json.dumps(inner[2]))}))
            at += 1
        elif kind == "openai":
            pieces.append(delta(inner[0]) if name == "text" else delta(reasoning_content=inner[0]))
        else:
            told = {"content" if name == "text" else name: inner[0]} if name != "call" else {
                "tool_calls": [{"id": inner[0], "function": {"name": inner[1], "arguments": inner[2]}}]}
            pieces.append({"message": {"role": "assistant", "content": "", **told}, "done": False})
    if kind == "openai":
        pieces += [delta(finish="tool_calls" if calls else reason), {"choices": [], "usage": usage(7, 9)}]
        return http_stream(sse(*pieces))
    pieces.append({"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": reason,
                   "prompt_eval_count": 7, "eval_count": 9})
    return http_stream(ndjson(*pieces), "application/x-ndjson")


def speaking(kind, *parts, **options):
    """A script that answers streamed or whole, as it is asked."""
    def script(talk):
        talk.released = True
        talk.send(spoken(kind, talk.request.json["stream"], *parts, **options))
    return script


HEARD = (("thinking", "h"), ("thinking", "m"), ("text", "Hel"), ("text", "lo"), ("call", "c1", "f", {"x": 1}),
         ("call", "c2", "g", {}))


def translating(start, target, kind, *argv):
    """A proxy that translates both faces for a target of one kind."""
    path, listed = LIST_PATH[kind]
    target.answers = {path: listed, CHAT_PATH[kind]: speaking(kind, ("text", "Hello"))}
    return start("--target-api", kind, "--translate", "always", *argv)


@fixture(scope="module")
def kept():
    """What `agents` started first: it serves all rows of the tables."""
    found = {}
    yield found
    for proxy, scripted in found.values():
        proxy.close()
        scripted.close()


@fixture
def agents(kept, monkeypatch):
    """kind -> a proxy that translates both faces, and its target."""
    if not kept:
        monkeypatch.setattr(proxy_module, "sys", Streams())
    for kind in TARGET_KINDS if not kept else ():
        scripted = ScriptedTarget()
        run = lambda *argv, url=scripted.url: RunningProxy("--target", url, "--no-log", *argv)      # noqa: E731
        kept[kind] = translating(run, scripted, kind), scripted
    return kept


def last_sent(target, kind):
    """The latest request for a chat, as the target got it."""
    return target.calls(CHAT_PATH[kind])[-1].json


def without(body, asked):
    """`body` with what a row asks besides; what the row writes as ... is left out."""
    return {key: value for key, value in {**body, **asked}.items() if value is not ...}


def a_turn(role, content="", *calls, **beside):
    """A turn that should reach the target: calls are (id, name, arguments)."""
    return SimpleNamespace(**{"role": role, "content": content, "calls": calls, "thinking": "", "images": (), "id": "",
                              "name": "", **beside})


def openai_turns(history):
    """Pictures of results follow as a user's."""
    out, late = [], []
    for one in history:
        pictures = [{"type": "image_url", "image_url": {"url": url if ":" in url else f"data:image/png;base64,{url}"}}
                    for url in one.images]
        if one.role == "tool":
            out.append({"role": "tool", "tool_call_id": one.id, "content": one.content})
            late += [{"role": "user", "content": pictures}] if pictures else []
            continue
        out, late = (out, late) if one.calls else (out + late, [])
        if pictures:
            words = [{"type": "text", "text": one.content}] if one.content else []
            out.append({"role": one.role, "content": words + pictures})
        elif one.calls:
            out.append({"role": one.role, "content": one.content or None, "tool_calls": [
                {"id": ident, "type": "function", **part(name, json.dumps(inner, separators=(",", ":")))}
                for ident, name, inner in one.calls]})
        elif one.content or one.role != "assistant":
            out.append({"role": one.role, "content": one.content})
    return out + late


def ollama_turns(history):
    """What is empty is left out."""
    out = []
    for one in history:
        out.append({"role": one.role, "content": one.content})
        out[-1].update((key, value) for key, value in (
            ("thinking", one.thinking), ("images", list(one.images)), ("tool_calls", [
                {"id": ident, "function": {"index": at, "name": name, "arguments": inner}}
                for at, (ident, name, inner) in enumerate(one.calls)]),
            ("tool_call_id", one.id), ("tool_name", one.name)) if value)
    return out


def turns(kind, *history):
    """Turns as a target of this kind gets them."""
    return (openai_turns if kind == "openai" else ollama_turns)(history)


def wired(kind, history, tools=(), tool_choice=None, parallel=None, think=None, format=None, **options):
    """The whole body that should reach the target."""
    body = {"model": MODEL, "stream": False, "messages": turns(kind, *history)}
    if kind == "ollama":
        renamed = {"num_predict" if name == "max_tokens" else name: value for name, value in options.items()}
        offered = [{"type": "function", "function": {"description": "", **tool}} for tool in tools
                   if tool_choice != "none"]
        for tool in offered:
            tool["function"].pop("strict", None)
        beside = {"options": renamed, "tools": offered, "format": format}
        return {**body, **{key: value for key, value in beside.items() if value},
                **({} if think is None else {"think": think})}
    body.update(options)
    if tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in tools]
        body.update(((key, value) for key, value in (("tool_choice", tool_choice), ("parallel_tool_calls", parallel))
                     if value is not None))
    if isinstance(think, bool):
        body["chat_template_kwargs"] = {"enable_thinking": think}
    body.update({} if think is None or think is True else {"reasoning_effort": think or "none"})
    if format:
        body["response_format"] = {"type": "json_object"} if format == "json" else {
            "type": "json_schema", "json_schema": {"name": "response", "schema": format}}
    return body


def blocks(*content, role="user"):
    """A message of blocks; a text stands for itself."""
    return {"role": role, "content": [{"type": "text", "text": block} if isinstance(block, str) else block
                                      for block in content]}


def use(ident="toolu_1", name="f", **arguments):
    return {"type": "tool_use", "id": ident, "name": name, "input": arguments}


def used(content=..., ident="toolu_1", **fields):
    return {"type": "tool_result", "tool_use_id": ident, **({} if content is ... else {"content": content}), **fields}


def asked(*messages):
    """The messages of a request after the user's first."""
    return {"messages": [{"role": "user", "content": "hi"}, *messages]}


def after_call(*content):
    """The same with a call, and these blocks behind it."""
    return asked(blocks(use(x=1), role="assistant"), blocks(*content))


HI_SEEN = a_turn("user", "hi")
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
NO_SCHEMA = {"type": "object", "properties": {}}
F, G = {"name": "f", "description": "does f", "parameters": SCHEMA}, {"name": "g", "parameters": NO_SCHEMA}
CLAUDE_TOOLS = {"tools": [{"name": "f", "description": "does f", "input_schema": {
    "$schema": "http://json-schema.org/draft-07/schema#", **SCHEMA}}, {"type": "custom", "name": "g"}]}
CALL_SEEN = a_turn("assistant", "", ("toolu_1", "f", {"x": 1}))


def result_turn(content, **fields):
    return a_turn("tool", content, id="toolu_1", name="f", **fields)


# (name, what is asked besides, turns at the target, what stands beside them; `only` is the one kind that it is about)
MESSAGES_ASKED = [
    ("a text", {}, [HI_SEEN], {}),
    ("what an Ollama ignores, and keys that nobody knows", {
        "metadata": {"user_id": "x"}, "context_management": {
            "edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "service_tier": "auto", "container": None, "mcp_servers": [], "betas": ["x"], "output_config": {}}, [HI_SEEN], {}),
    ("a system text", {"system": "be brief"}, [a_turn("system", "be brief"), HI_SEEN], {}),
    ("system blocks, joined without anything between them", {"system": [
        {"type": "text", "text": "be ", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief"}]},
     [a_turn("system", "be brief"), HI_SEEN], {}),
    ("the billing block is dropped, the rest stays", {"system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=ab12;"},
        {"type": "text", "text": "be brief"}]},
     [a_turn("system", "be brief"), HI_SEEN], {}),
    ("nothing but a billing block", {"system": [{"type": "text", "text": "x-anthropic-billing-header: cch=ab12;"}]},
     [HI_SEEN], {}),
    ("system turns anywhere join the leading one", {"system": "one", "messages": [
        {"role": "user", "content": "hi"}, {"role": "system", "content": "two"}, blocks("Hello", role="assistant"),
        blocks("three", role="system"), {"role": "user", "content": "go"}]},
     [a_turn("system", "one\n\ntwo\n\nthree"), HI_SEEN, a_turn("assistant", "Hello"), a_turn("user", "go")], {}),
    ("a system turn without a leading system", asked({"role": "system", "content": "two"}), [a_turn("system", "two"), HI_SEEN],
     {}),
    ("text blocks, joined without anything between them", {"messages": [blocks("a", "b")]}, [a_turn("user", "ab")], {}),
    ("pictures among texts", {"messages": [blocks("look: ", IMAGE_BLOCK, "and ", IMAGE_BLOCK, "here")]},
     [a_turn("user", "look: and here", images=(PNG, PNG))], {}),
    ("a picture alone", {"messages": [blocks(IMAGE_BLOCK)]}, [a_turn("user", images=(PNG,))], {}),
    ("a picture of a kind that its bytes do not tell", {"messages": [blocks({"type": "image", "source": {
        "type": "base64", "media_type": "image/webp", "data": "AAAAAAAA"}})]},
     [a_turn("user", images=("data:image/webp;base64,AAAAAAAA",))], {"only": "openai"}),
    ("a picture by its URL", {"messages": [blocks(BY_URL)]},
     [a_turn("user", images=("https://x.test/a.png",))], {"only": "openai"}),
    ("thinking that comes back without a signature", asked(blocks(
        {"type": "thinking", "thinking": "hm", "signature": ""}, "Hello", role="assistant"), blocks("go")),
     [HI_SEEN, a_turn("assistant", "Hello", thinking="hm"), a_turn("user", "go")], {}),
    ("thinking that cannot be read", asked(blocks({"type": "redacted_thinking", "data": "AAAA"}, "Hello",
                                                  role="assistant"), blocks("go")),
     [HI_SEEN, a_turn("assistant", "Hello"), a_turn("user", "go")], {}),
    ("a call and its result", asked(blocks("I call.", use(x=1), role="assistant"), blocks(used("done"))),
     [HI_SEEN, a_turn("assistant", "I call.", ("toolu_1", "f", {"x": 1})), result_turn("done")], {}),
    ("thinking beside a call", asked(blocks({"type": "thinking", "thinking": "hm", "signature": "s"}, use(x=1),
                                            role="assistant"),
                                     blocks(used("done"))),
     [HI_SEEN, a_turn("assistant", "", ("toolu_1", "f", {"x": 1}), thinking="hm"), result_turn("done")], {}),
    ("a result in blocks", after_call(used([{"type": "text", "text": "do"}, {"type": "text", "text": "ne"}])),
     [HI_SEEN, CALL_SEEN, result_turn("done")], {}),
    ("a result with a picture", after_call(used([{"type": "text", "text": "see"}, IMAGE_BLOCK])),
     [HI_SEEN, CALL_SEEN, result_turn("see", images=(PNG,))], {}),
    ("a result that is a picture", after_call(used([IMAGE_BLOCK], cache_control={"type": "ephemeral"})),
     [HI_SEEN, CALL_SEEN, result_turn("", images=(PNG,))], {}),
    ("a result without content", after_call(used()), [HI_SEEN, CALL_SEEN, result_turn("")], {}),
    ("a result of no blocks", after_call(used([])), [HI_SEEN, CALL_SEEN, result_turn("")], {}),
    ("a result that is an error", after_call(used("no such file", is_error=True)),
     [HI_SEEN, CALL_SEEN, result_turn("Error: no such file")], {}),
    ("a result that is none", after_call(used("done", is_error=False)), [HI_SEEN, CALL_SEEN, result_turn("done")], {}),
    ("results of parallel calls in one message, in another order", asked(
        blocks(use(x=1), use("toolu_2", "g"), role="assistant"), blocks(used("two", "toolu_2"), used("one"))),
     [HI_SEEN, a_turn("assistant", "", ("toolu_1", "f", {"x": 1}), ("toolu_2", "g", {})),
      a_turn("tool", "two", id="toolu_2", name="g"), result_turn("one")], {}),
    ("results before the text of their turn, wherever they stand", asked(
        blocks(use(x=1), role="assistant"), blocks("and ", IMAGE_BLOCK, used("done"), "now?")),
     [HI_SEEN, CALL_SEEN, result_turn("done"), a_turn("user", "and now?", images=(PNG,))], {}),
    ("pictures of two results", asked(blocks(use(x=1), use("toolu_2", "g"), role="assistant"),
                                      blocks(used([IMAGE_BLOCK]),
                                             used([IMAGE_BLOCK, {"type": "text", "text": "b"}], "toolu_2"))),
     [HI_SEEN, a_turn("assistant", "", ("toolu_1", "f", {"x": 1}), ("toolu_2", "g", {})), result_turn("", images=(PNG,)),
      a_turn("tool", "b", id="toolu_2", name="g", images=(PNG,))], {}),
    ("a call that nobody answered", after_call("never mind"),
     [HI_SEEN, CALL_SEEN, result_turn(""), a_turn("user", "never mind")], {}),
    ("a result whose call was cut off", {"messages": [blocks(used("done"))]},
     [a_turn("assistant", "", ("toolu_1", "unknown", {})), a_turn("tool", "done", id="toolu_1", name="unknown")], {}),
    ("two turns of calls", asked(blocks(use(x=1), role="assistant"), blocks(used("one")),
                                 blocks(use("toolu_2", "f", x=2), role="assistant"), blocks(used("two", "toolu_2"))),
     [HI_SEEN, CALL_SEEN, result_turn("one"), a_turn("assistant", "", ("toolu_2", "f", {"x": 2})),
      a_turn("tool", "two", id="toolu_2", name="f")], {}),
    ("what a server's own tool left", asked(blocks(
        {**use("srv_1", "web_search", query="x"), "type": "server_tool_use"},
        {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": []}, "Found.", role="assistant"),
        blocks("go")),
     [HI_SEEN, a_turn("assistant", "Found.", ("srv_1", "web_search", {"query": "x"})),
      a_turn("tool", "", id="srv_1", name="web_search"), a_turn("user", "go")], {}),
    ("options", {"temperature": 0, "top_p": 0.5, "top_k": 3, "stop_sequences": ["a", "b"], "max_tokens": 7}, [HI_SEEN],
     {"temperature": 0, "top_p": 0.5, "top_k": 3, "stop": ["a", "b"], "max_tokens": 7}),
    ("no stop sequences", {"stop_sequences": []}, [HI_SEEN], {}),
    ("an answer by a schema", {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, [HI_SEEN],
     {"format": SCHEMA}),
    ("tools", CLAUDE_TOOLS, [HI_SEEN], {"tools": [F, G]}),
    ("tools that run at Anthropic are left out", {"tools": [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "code_execution_20250825", "name": "code_execution"},
        *CLAUDE_TOOLS["tools"]]}, [HI_SEEN], {"tools": [F, G]}),
    ("nothing but such tools", {"tools": [{"type": "web_search_20250305", "name": "web_search"}],
                                "tool_choice": {"type": "auto"}}, [HI_SEEN], {}),
    ("no tools, but a choice among them", {"tools": [],
                                           "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, [HI_SEEN],
                                           {}),
    ("tool choice auto", {**CLAUDE_TOOLS, "tool_choice": {"type": "auto"}}, [HI_SEEN],
     {"tools": [F, G], "tool_choice": "auto"}),
    ("tool choice any", {**CLAUDE_TOOLS, "tool_choice": {"type": "any"}}, [HI_SEEN],
     {"tools": [F, G], "tool_choice": "required"}),
    ("tool choice none", {**CLAUDE_TOOLS, "tool_choice": {"type": "none"}}, [HI_SEEN],
     {"tools": [F, G], "tool_choice": "none"}),
    ("tool choice of one tool", {**CLAUDE_TOOLS, "tool_choice": {"type": "tool", "name": "f"}}, [HI_SEEN],
     {"tools": [F], "tool_choice": "required"}),
    ("one call at a time", {**CLAUDE_TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, [HI_SEEN],
     {"tools": [F, G], "tool_choice": "auto", "parallel": False}),
    ("many calls at a time", {**CLAUDE_TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": False}}, [HI_SEEN],
     {"tools": [F, G], "tool_choice": "required"}),
]
# thinking, effort, what it means
CLAUDE_THINKING = [
    (None, None, None), (None, "low", "low"), (None, "medium", "medium"), (None, "high", "high"), (None, "max", "max"),
    (None, "xhigh", "high"), (None, "unheard of", None), ({"type": "adaptive"}, None, None),
    ({"type": "adaptive"}, "high", "high"), ({"type": "disabled"}, None, False), ({"type": "disabled"}, "high", False),
    ({"type": "enabled"}, None, True), ({"type": "enabled", "budget_tokens": 1024}, None, "low"),
    ({"type": "enabled", "budget_tokens": 10000}, None, "medium"),
    ({"type": "enabled", "budget_tokens": 31999}, None, "high"),
    ({"type": "enabled", "budget_tokens": 1 << 70}, None, "high"),
]
MESSAGES_ASKED += [
    (f"thinking {json.dumps(thinking)}, effort {effort}", {"thinking": thinking, "output_config": {"effort": effort}},
     [HI_SEEN],
     {"think": wanted}) for thinking, effort, wanted in CLAUDE_THINKING]


def item(kind, **fields):
    return {"type": kind, **fields}


def message(role, *parts, kind="input_text", **fields):
    """A message item; a text stands for a part of its own."""
    content = [{"type": kind, "text": one} if isinstance(one, str) else one for one in parts]
    return {"type": "message", "id": "msg_1", "role": role, "content": content, **fields}


def called(ident="call_1", name="f", arguments='{"x": 1}', **fields):
    return {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": ident, "name": name,
            "arguments": arguments, **fields}


def output(value, ident="call_1", **fields):
    return {"type": "function_call_output", "id": "fco_1", "call_id": ident, "output": value, **fields}


def given(*items):
    return {"input": [message("user", "hi"), *items]}


def reasoned(text="hm", **fields):
    return {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": text}], "content": None,
            "encrypted_content": None, **fields}


CALLED_TOO = a_turn("assistant", "", ("call_1", "f", {"x": 1}))
CODEX_TOOLS = {"tools": [{"type": "function", "name": "f", "description": "does f", "strict": False,
                          "parameters": SCHEMA},
                         {"type": "function", "name": "g", "parameters": None}]}
F_TOO = {**F, "strict": False}
SPAWN = {"type": "namespace", "name": "agents", "description": "other agents", "tools": [
    {"type": "function", "name": "f", "description": "does f", "strict": False, "parameters": SCHEMA}]}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Patches files.",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: begin end"}}
ONE_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def output_turn(content, **fields):
    return a_turn("tool", content, **{"id": "call_1", "name": "f", **fields})


RESPONSES_ASKED = [
    ("a text", {}, [HI_SEEN], {}),
    ("what an Ollama ignores, and keys that nobody knows", {
        "store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "client_metadata": {"a": "b"}, "metadata": {},
        "truncation": "auto", "service_tier": "auto", "user": "u", "previous_response_id": None,
        "text": {"verbosity": "low"}, "instructions": None},
     [HI_SEEN], {}),
    ("instructions", {"instructions": "be brief"}, [a_turn("system", "be brief"), HI_SEEN], {}),
    ("the instructions of a developer", {"input": [message("developer", "be ", "brief"), message("system", "now"),
                                                   message("user", "hi")]},
     [a_turn("system", "be \nbrief"), a_turn("system", "now"), HI_SEEN], {}),
    ("a message without type", {"input": [{"role": "user", "content": "hi"}]}, [HI_SEEN], {}),
    ("an answer that comes back", given(message("assistant",
                                                {"type": "output_text", "text": "Hello", "annotations": []},
                                                status="completed"), message("user", "go")),
     [HI_SEEN, a_turn("assistant", "Hello"), a_turn("user", "go")], {}),
    ("an answer that comes back as a string", given({"role": "assistant", "content": "Hello"}, message("user", "go")),
     [HI_SEEN, a_turn("assistant", "Hello"), a_turn("user", "go")], {}),
    ("a refusal that comes back", given(message("assistant", {"type": "refusal", "refusal": "No."}),
                                        message("user", "go")),
     [HI_SEEN, a_turn("assistant", "No."), a_turn("user", "go")], {}),
    ("pictures", {"input": [message("user", "look", INPUT_IMAGE, INPUT_IMAGE)]},
     [a_turn("user", "look", images=(PNG, PNG))], {}),
    ("a picture by its URL", {"input": [message("user", {"type": "input_image", "image_url": "https://x.test/a.png"})]},
     [a_turn("user", images=("https://x.test/a.png",))], {"only": "openai"}),
    ("a call and its result", given(called(), output("done")), [HI_SEEN, CALLED_TOO, output_turn("done")], {}),
    ("a call joins the answer before it", given(message("assistant", "I call.", kind="output_text"), called(),
                                                output("done")),
     [HI_SEEN, a_turn("assistant", "I call.", ("call_1", "f", {"x": 1})), output_turn("done")], {}),
    ("a call without arguments", given(called(arguments=""), output("done")),
     [HI_SEEN, a_turn("assistant", "", ("call_1", "f", {})), output_turn("done")], {}),
    ("a result in parts", given(called(), output([{"type": "input_text", "text": "do"},
                                                  {"type": "output_text", "text": "ne"}])),
     [HI_SEEN, CALLED_TOO, output_turn("do\nne")], {}),
    ("a result with a picture", given(called(), output([{"type": "input_text", "text": "see"}, INPUT_IMAGE])),
     [HI_SEEN, CALLED_TOO, output_turn("see", images=(PNG,))], {}),
    ("a result that is a picture", given(called(), output([INPUT_IMAGE])),
     [HI_SEEN, CALLED_TOO, output_turn("", images=(PNG,))], {}),
    ("parallel calls, their results in another order",
     given(called(), called("call_2", "g", "{}"), output("two", "call_2"), output("one")),
     [HI_SEEN, a_turn("assistant", "", ("call_1", "f", {"x": 1}), ("call_2", "g", {})),
      output_turn("two", id="call_2", name="g"), output_turn("one")], {}),
    ("a call that nobody answered", given(called(), message("user", "never mind")),
     [HI_SEEN, CALLED_TOO, output_turn(""), a_turn("user", "never mind")], {}),
    ("a result whose call was cut off", {"input": [output("done")]},
     [a_turn("assistant", "", ("call_1", "unknown", {})), output_turn("done", name="unknown")], {}),
    ("a call into a namespace", given(called(namespace="agents"), output("done")),
     [HI_SEEN, a_turn("assistant", "", ("call_1", "agents__f", {"x": 1})), output_turn("done", name="agents__f")], {}),
    ("a custom call", given(item("custom_tool_call", id="ctc_1", call_id="call_1", name="apply_patch",
                                 input="*** Begin\n\"x\""),
                            item("custom_tool_call_output", call_id="call_1", output="done")),
     [HI_SEEN, a_turn("assistant", "", ("call_1", "apply_patch", {"input": "*** Begin\n\"x\""})),
      output_turn("done", name="apply_patch")], {}),
    ("a custom call's result in parts", given(item("custom_tool_call", call_id="call_1", name="apply_patch", input="x"),
                                              item("custom_tool_call_output", call_id="call_1", output=[INPUT_IMAGE])),
     [HI_SEEN, a_turn("assistant", "", ("call_1", "apply_patch", {"input": "x"})),
      output_turn("", name="apply_patch", images=(PNG,))], {}),
    ("a summary before an answer", given(reasoned(), message("assistant", "Hello", kind="output_text"),
                                         message("user", "go")),
     [HI_SEEN, a_turn("assistant", "Hello", thinking="hm"), a_turn("user", "go")], {}),
    ("a summary before a call", given(reasoned(), called(), output("done")),
     [HI_SEEN, a_turn("assistant", "", ("call_1", "f", {"x": 1}), thinking="hm"), output_turn("done")], {}),
    ("reasoning in full", given(reasoned(summary=[],
                                         content=[{"type": "reasoning_text", "text": "h"},
                                                  {"type": "reasoning_text", "text": "m"}]), called(), output("done")),
     [HI_SEEN, a_turn("assistant", "", ("call_1", "f", {"x": 1}), thinking="hm"), output_turn("done")], {}),
    ("reasoning in encrypted_content, where we put it",
     given(reasoned("short", encrypted_content="hm"), message("assistant", "Hello", kind="output_text"),
           message("user", "go")),
     [HI_SEEN, a_turn("assistant", "Hello", thinking="hm"), a_turn("user", "go")], {}),
    ("what a hosted tool left", given(item("web_search_call", id="ws_1", status="completed",
                                           action={"type": "search", "query": "x"}),
                                      message("assistant", "Found.", kind="output_text"), message("user", "go")),
     [HI_SEEN, a_turn("assistant", "Found."), a_turn("user", "go")], {}),
    ("options", {"temperature": 0, "top_p": 0.5, "max_output_tokens": 7}, [HI_SEEN],
     {"temperature": 0, "top_p": 0.5, "max_tokens": 7}),
    ("no more than one token", {"max_output_tokens": 1}, [HI_SEEN], {"max_tokens": 1}),
    ("an answer by a schema", {"text": {"verbosity": "low",
                                        "format": {"type": "json_schema", "strict": True, "name": "title",
                                                   "schema": SCHEMA}}}, [HI_SEEN], {"format": SCHEMA}),
    ("an answer in JSON", {"text": {"format": {"type": "json_object"}}}, [HI_SEEN], {"format": "json"}),
    ("an answer in text", {"text": {"format": {"type": "text"}}}, [HI_SEEN], {}),
    ("tools", CODEX_TOOLS, [HI_SEEN], {"tools": [F_TOO, G]}),
    ("a namespace of tools", {"tools": [SPAWN]}, [HI_SEEN], {"tools": [{**F_TOO, "name": "agents__f"}]}),
    ("a tool of one text", {"tools": [PATCH]}, [HI_SEEN], {"tools": [{
        "name": "apply_patch", "description": "Patches files.\n\nThe input must follow this grammar:\nstart: begin end",
        "parameters": ONE_TEXT}]}),
    ("a tool of one text, any text", {"tools": [{"type": "custom", "name": "say", "format": {"type": "text"}}]}, [HI_SEEN],
     {"tools": [{"name": "say", "parameters": ONE_TEXT}]}),
    ("hosted tools are left out", {"tools": [
        {"type": "web_search", "external_web_access": True}, {"type": "local_shell"}, {"type": "image_generation"},
        {"type": "code_interpreter"},
        {"type": "tool_search", "execution": "client", "description": "d", "parameters": {}}, *CODEX_TOOLS["tools"]]},
        [HI_SEEN], {"tools": [F_TOO, G]}),
    ("nothing but such tools", {"tools": [{"type": "web_search"}], "tool_choice": "auto", "parallel_tool_calls": True},
     [HI_SEEN], {}),
    ("no tools, but a choice among them", {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False}, [HI_SEEN], {}),
    ("many calls at a time", {**CODEX_TOOLS, "parallel_tool_calls": True}, [HI_SEEN],
     {"tools": [F_TOO, G], "parallel": True}),
    ("one call at a time", {**CODEX_TOOLS, "parallel_tool_calls": False}, [HI_SEEN],
     {"tools": [F_TOO, G], "parallel": False}),
]
# tool_choice, tools that are offered, what is left of the choice
CODEX_CHOICES = [
    ("auto", [F_TOO, G], "auto"), ("required", [F_TOO, G], "required"), ("none", [F_TOO, G], "none"),
    ({"type": "function", "name": "f"}, [F_TOO], "required"),
    ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}, [G], "auto"),
    ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}, [F_TOO], "required"),
]
CODEX_REASONING = [
    (None, None), ({"summary": "auto"}, None), ({"effort": None}, None), ({"effort": "none"}, False),
    ({"effort": "minimal"}, "low"), ({"effort": "low"}, "low"), ({"effort": "medium", "summary": "auto"}, "medium"),
    ({"effort": "high"}, "high"), ({"effort": "xhigh"}, "max"),
]
RESPONSES_ASKED += [
    (f"tool choice {json.dumps(choice)}", {**CODEX_TOOLS, "tool_choice": choice}, [HI_SEEN],
     {"tools": offered, "tool_choice": left})
    for choice, offered, left in CODEX_CHOICES]
RESPONSES_ASKED += [(f"reasoning {json.dumps(reasoning)}", {"reasoning": reasoning}, [HI_SEEN], {"think": wanted})
                    for reasoning, wanted in CODEX_REASONING]


def check_asked(agents, path, body, history, only=None, **beside):
    for kind, (proxy, target) in agents.items():
        if kind == (only or kind):
            before = len(target.calls(CHAT_PATH[kind]))
            answer = proxy.post(path, without(PLAIN[path], body))
            assert answer.status == 200, answer.data
            sent = target.calls(CHAT_PATH[kind])[before:]
            assert [request.json for request in sent] == [wired(kind, history, **beside)], kind


@cases("name, body, history, beside", MESSAGES_ASKED, ids=[row[0] for row in MESSAGES_ASKED])
def test_what_is_asked_of_messages_reaches_the_target(agents, name, body, history, beside):
    check_asked(agents, "/v1/messages", body, history, **{"max_tokens": 50, **beside})


@cases("name, body, history, beside", RESPONSES_ASKED, ids=[row[0] for row in RESPONSES_ASKED])
def test_what_is_asked_of_responses_reaches_the_target(agents, name, body, history, beside):
    check_asked(agents, "/v1/responses", body, history, **beside)


def cannot(kind, name):
    """Ollama's parser says so of a value of the wrong type."""
    return f"cannot unmarshal {kind} into .*{name}"


POSITIVE = "^max_tokens is required and must be positive$"
NO_URLS = "^image URLs are not currently supported, please use base64 encoded data instead$"

# (what is asked besides, what the refusal says, the only kind of target that it is about)
MESSAGES_REFUSED = [
    ({"model": ...}, "^model is required$"), ({"model": ""}, "^model is required$"),
    ({"model": 5}, cannot("number", "model")),
    ({"max_tokens": ...}, POSITIVE), ({"max_tokens": 0}, POSITIVE),
    ({"max_tokens": -1}, POSITIVE), ({"max_tokens": None}, POSITIVE),
    ({"max_tokens": "5"}, cannot("string", "max_tokens")), ({"max_tokens": 1.5}, cannot("number", "max_tokens")),
    ({"max_tokens": True}, cannot("bool", "max_tokens")),
    ({"messages": ...}, "^messages is required$"), ({"messages": []}, "^messages is required$"),
    ({"messages": "hi"}, cannot("string", "messages")),
    ({"messages": {}}, cannot("object", "messages")), ({"messages": ["hi"]}, cannot("string", "messages")),
    ({"messages": [{"role": 5, "content": "hi"}]}, cannot("number", "role")),
    ({"messages": [{"role": "user", "content": 5}]}, "^json: cannot unmarshal number into field content of type array$"),
    ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "content"),
    ({"messages": [{"role": "user", "content": True}]}, "content"),
    ({"messages": [{"role": "system", "content": 5}]}, "^json: cannot unmarshal number into field system of type string$"),
    ({"messages": [{"role": "user", "content": [5]}]}, cannot("number", "content")),
    ({"messages": [blocks({"type": "text", "text": 5})]}, cannot("number", "text")),
    ({"messages": [blocks({"type": "nonsense"})]}, "^content blocks of type nonsense are not supported$"),
    ({"messages": [blocks({"text": "no type"})]}, "."), ({"messages": [blocks({"type": 5})]}, cannot("number", "type")),
    ({"messages": [blocks({"type": "document", "source": {"type": "text", "data": "x"}})]}, "document"),
    ({"messages": [blocks({"type": "search_result", "content": []})]}, "search_result"),
    ({"messages": [blocks({"type": "image", "source": PNG})]}, cannot("string", "source")),
    ({"messages": [blocks({"type": "image"})]}, "image"),
    ({"messages": [blocks({"type": "image", "source": {"type": "base64", "media_type": "image/png"}})]}, "image"),
    ({"messages": [blocks({"type": "image", "source": {"type": "base64", "data": "?"}})]}, "illegal base64"),
    ({"messages": [blocks({"type": "image", "source": {"type": "file", "file_id": "file_1"}})]},
     "^invalid image input: a source of type base64 or url is expected$"),
    ({"messages": [blocks(BY_URL)]},
     NO_URLS, "ollama"),
    (asked(blocks({**use(), "id": 5}, role="assistant")), cannot("number", "id")),
    (asked(blocks({"type": "thinking", "thinking": 5}, role="assistant")), cannot("number", "thinking")),
    (after_call(used(5)), "content"), (after_call(used({"a": 1})), "content"),
    (after_call(used([{"type": "nonsense"}])), "nonsense"),
    (after_call(used("x", is_error="yes")), cannot("string", "is_error")),
    (after_call(used([BY_URL])),
     NO_URLS, "ollama"),
    ({"system": 5}, cannot("number", "system")),
    ({"system": {"type": "text", "text": "x"}}, cannot("object", "system")),
    ({"system": [5]}, cannot("number", "system")),
    ({"system": [{"type": "text", "text": 5}]}, cannot("number", "text")),
    ({"system": [IMAGE_BLOCK]}, "^system takes blocks of text alone, no image or other type$"), (asked(blocks(IMAGE_BLOCK, role="system")), "image"),
    ({"tools": {}}, cannot("object", "tools")), ({"tools": ["f"]}, cannot("string", "tools")),
    ({"tools": [{"input_schema": SCHEMA}]}, "^a tool has no name$"),
    ({"tools": [{"name": 5}]}, cannot("number", "name")), ({"tool_choice": "auto"}, cannot("string", "tool_choice")),
    ({"tool_choice": {"type": 5}, **CLAUDE_TOOLS}, "type"),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": "yes"}, **CLAUDE_TOOLS},
     "disable_parallel_tool_use"),
    ({"thinking": True}, cannot("bool", "thinking")), ({"thinking": {"type": 5}}, "type"),
    ({"thinking": {"type": "enabled", "budget_tokens": "many"}}, "budget_tokens"),
    ({"output_config": {"effort": 5}}, "effort"),
    ({"output_config": "high"}, cannot("string", "output_config")),
    ({"output_config": {"format": "json"}}, "format"), ({"temperature": "hot"}, cannot("string", "temperature")),
    ({"top_k": 1.5}, cannot("number", "top_k")), ({"stop_sequences": "a"}, cannot("string", "stop_sequences")),
    ({"stop_sequences": [5]}, "stop"), ({"stream": "yes"}, cannot("string", "stream")),
]
RESPONSES_REFUSED = [
    ({"model": ...}, "^model is required$"), ({"model": ""}, "^model is required$"),
    ({"model": 5}, cannot("number", "model")),
    *(({"input": value}, "^input is required: a string or a list of items$") for value in (..., "", [], None, 5, {})),
    ({"input": ["hi"]}, cannot("string", "input")),
    ({"input": [{}]}, r'^input\[0\]: unknown input item type: ""$'),
    (given(item("nonsense")), r'^input\[1\]: unknown input item type: "nonsense"$'),
    (given(item("item_reference", id="msg_1")), r'^input\[1\]: unknown input item type: "item_reference"$'),
    ({"input": [{"type": 5}]}, cannot("number", "type")),
    ({"input": [{"role": 5, "content": "hi"}]}, cannot("number", "role")),
    ({"input": [{"role": "user", "content": 5}]}, "content"),
    ({"input": [message("user", {"type": "nonsense"})]}, "^invalid message format: content part of type 'nonsense'$"),
    ({"input": [message("user", {"type": "input_file", "file_id": "file_1"})]}, "input_file"),
    ({"input": [message("user", {"type": "input_image", "file_id": "file_1"})]}, "image"),
    ({"input": [message("user", {**INPUT_IMAGE, "image_url": 5})]}, "image"),
    ({"input": [message("user", {**INPUT_IMAGE, "image_url": "?"})]}, "image"),
    ({"input": [message("user", {"type": "input_image", "image_url": "https://x.test/a.png"})]},
     NO_URLS, "ollama"),
    (given(called(arguments=5)), cannot("number", "arguments")), (given(called(ident=5)), cannot("number", "call_id")),
    (given(called(), output([{"type": "nonsense"}])), "nonsense"), (given(called(), output(5)), "."),
    (given(reasoned(summary="x")), cannot("string", "summary")),
    (given(item("custom_tool_call", call_id="c", name="f", input={})), cannot("object", "input")),
    *((value, "^previous_response_id is not supported here: nothing is stored, send the whole input$")
      for value in ({"previous_response_id": "resp_1"}, {"conversation": "conv_1"})),
    ({"previous_response_id": 5}, "previous_response_id"),
    ({"instructions": 5}, cannot("number", "instructions")), ({"tools": {}}, cannot("object", "tools")),
    ({"tools": ["f"]}, cannot("string", "tools")),
    ({"tools": [{"type": "function"}]}, "^a tool has no name$"), ({"tools": [{"type": "custom"}]}, "^a tool has no name$"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": "x"}]}, cannot("string", "tools")),
    ({"tool_choice": 5, **CODEX_TOOLS}, "^tool_choice must be a word or an object$"), ({"text": "x"}, cannot("string", "text")),
    ({"text": {"format": "json"}}, "format"), ({"reasoning": "high"}, cannot("string", "reasoning")),
    ({"reasoning": {"effort": "lots"}}, '^invalid reasoning effort "lots": none, minimal, low, medium, high, xhigh or max '
                                        'is expected$'), ({"reasoning": {"effort": 5}}, "effort"),
    ({"max_output_tokens": "5"}, cannot("string", "max_output_tokens")),
    ({"parallel_tool_calls": "yes"}, cannot("string", "parallel_tool_calls")),
    ({"temperature": "hot"}, cannot("string", "temperature")),
    ({"stream": "yes"}, cannot("string", "stream")),
]
REFUSED = [(kind, path, row[0], row[1]) for path, table in zip(AGENT_FACES, (MESSAGES_REFUSED, RESPONSES_REFUSED))
           for row in table
           for kind in (row[2:] or TARGET_KINDS[:1])]


def check_agent_error(path, answer, status, kind, text):
    """An error answer in the dialect's own shape; OpenAI has fewer types of them than Anthropic, as Ollama has."""
    value = json.loads(answer.data)
    if path == "/v1/responses" and status not in (400, 404, 500, 502):
        kind = value["error"]["type"]
    assert answer.status == status and answer.headers["Content-Type"] == "application/json", answer.data
    if path == "/v1/responses":
        assert set(value) == {"error"} and set(value["error"]) == {"message", "type", "param", "code"}
    else:
        assert set(value) == {"type", "error", "request_id"} and value["type"] == "error"
        assert set(value["error"]) == {"type", "message"}
        assert re.fullmatch("req_[0-9a-zA-Z]{16,}", value["request_id"])
    assert value["error"]["type"] == kind and re.search(text, value["error"]["message"]), value
    temporary = status >= 500 or status == 429
    assert answer.headers.get("x-should-retry") == (None if temporary else "false")


@cases("kind, path, body, text", REFUSED, ids=[f"{path[4:]} {str(body)[:100]}" for _, path, body, _ in REFUSED])
def test_what_cannot_be_understood_is_refused_in_the_shape_of_the_dialect(agents, capfd, kind, path, body, text):
    proxy, target = agents[kind]
    before = len(target.calls(CHAT_PATH[kind]))
    for stream in (False, True):
        answer = proxy.post(path, without(PLAIN[path], {"stream": stream, **body}))
        check_agent_error(path, answer, 400, "invalid_request_error", text)
    assert len(target.calls(CHAT_PATH[kind])) == before and "Traceback" not in capfd.readouterr().err


@cases("path", [*AGENT_FACES, "/v1/messages/count_tokens"])
@cases("data, text", [(b"", "missing request body"), (b"  ", "missing request body"),
                      (b'{"model": "m"', "unexpected EOF"), (b"hello", "invalid JSON"),
                      (b"[]", "cannot unmarshal"), (b'"x"', "cannot unmarshal")])
def test_what_is_no_json_object_is_refused_in_the_shape_of_the_dialect(agents, path, data, text):
    answer = agents["openai"][0].post(path, data, {"Content-Type": "application/json"})
    check_agent_error(path, answer, 400, "invalid_request_error", text)


@cases("kind", TARGET_KINDS)
def test_tokens_are_counted_without_asking_the_target(agents, kind):
    proxy, target = agents[kind]
    before, path = len(target.calls(CHAT_PATH[kind])), "/v1/messages/count_tokens"

    def count(**body):
        answer = proxy.post(path + "?beta=true", without(PLAIN["/v1/messages"], {"max_tokens": ..., **body}))
        assert answer.status == 200 and list(json.loads(answer.data)) == ["input_tokens"], answer.data
        return json.loads(answer.data)["input_tokens"]

    assert 1 <= count() < count(system="be brief, " * 20) < count(system="be brief, " * 20, **CLAUDE_TOOLS)
    assert count(messages=[blocks("x" * 4000)]) >= 1000
    assert count(messages=[blocks("x", {"type": "thinking", "thinking": "y" * 4000}, role="assistant")]) >= 1000
    assert count(**asked(blocks(use(x="z" * 4000), role="assistant"), blocks(used("r" * 4000)))) >= 2000
    for body, text in (({"model": ...}, "model is required"), ({"messages": []}, "messages is required"),
                       ({"messages": [blocks({"type": "nonsense"})]}, "nonsense")):
        answer = proxy.post(path, without(PLAIN["/v1/messages"], body))
        check_agent_error(path, answer, 400, "invalid_request_error", text)
    assert len(target.calls(CHAT_PATH[kind])) == before and not target.calls(path)


# -- what comes back


def events_of(data):
    """(name, data) of all frames; every frame is one `event:` line and one `data:` line."""
    frames = data.decode().split("\n\n")
    assert frames.pop() == "", data[-200:]
    found = []
    for frame in frames:
        name, line = frame.split("\n")
        assert name.startswith("event: ") and line.startswith("data: "), frame
        found.append((name[7:], json.loads(line[6:])))
        assert found[-1][1]["type"] == name[7:]
    return found


def speech(thinking="", text="", calls=(), ending="", error=None):
    """What an answer says, whichever way it is written."""
    return SimpleNamespace(thinking=thinking.strip(), text=text, calls=[tuple(call) for call in calls], ending=ending,
                           error=error)


def read_blocks(content):
    """What the blocks of a message say."""
    for block in content:
        assert set(block) <= {"type", "text", "thinking", "signature", "id", "name", "input"}, block
    calls = [block for block in content if block["type"] == "tool_use"]
    assert all(isinstance(block["input"], dict) and block["id"] and block["name"] for block in calls)
    assert len({block["id"] for block in calls}) == len(calls)
    thinking, text = ("".join(block[kind] for block in content if block["type"] == kind)
                      for kind in ("thinking", "text"))
    return {"thinking": thinking, "text": text, "calls": [(block["name"], block["input"]) for block in calls]}


def check_usage(usage, *names):
    assert all(isinstance(usage[name], int) and usage[name] >= (name != "output_tokens") for name in names), usage


STOP_REASONS = ["end_turn", "max_tokens", "tool_use", "stop_sequence"]


def read_message(value, finished=True):
    """What a whole message says; it has all that the SDK's types demand."""
    assert (value["type"], value["role"]) == ("message", "assistant") and re.fullmatch("msg_[0-9a-zA-Z]{10,}",
        value["id"])
    assert isinstance(value["model"], str)
    assert value["stop_reason"] in (STOP_REASONS if finished else [None])
    assert (value["stop_sequence"] is not None) == (value["stop_reason"] == "stop_sequence")
    check_usage(value["usage"], "input_tokens", "output_tokens")
    return speech(ending=value["stop_reason"] or "", **read_blocks(value["content"]))


def read_message_stream(events):
    """What the events of /v1/messages say; their order is right, and only a finished stream looks finished."""
    content, opened, ending, error = [], False, "", None
    names = [name for name, _ in events]
    if names == ["error"]:
        assert events[0][1]["error"]["message"]
        return speech(error=events[0][1]["error"]["message"])
    assert names[0] == "message_start" and names.count("message_start") == 1
    assert read_message(events[0][1]["message"], False) == speech()
    for name, value in events[1:]:
        assert not ending and error is None or (name == "message_stop" and value is events[-1][1] and ending), names
        if name == "content_block_start":
            assert not opened and value["index"] == len(content)
            content.append({**value["content_block"]})
            kind, opened = content[-1]["type"], True
            assert content[-1].get(kind, "") == "" and (kind != "tool_use" or content[-1]["input"] == {})
            content[-1]["json"] = ""
        elif name == "content_block_delta":
            inner = value["delta"]
            assert opened and value["index"] == len(content) - 1
            if inner["type"] == "input_json_delta":
                assert content[-1]["type"] == "tool_use" and inner["partial_json"]
                content[-1]["json"] += inner["partial_json"]
            else:
                assert inner["type"] == f"{content[-1]['type']}_delta" and inner[content[-1]["type"]]
                content[-1][content[-1]["type"]] += inner[content[-1]["type"]]
        elif name == "content_block_stop":
            assert opened and value["index"] == len(content) - 1
            opened, text = False, content[-1].pop("json")
            if content[-1]["type"] == "tool_use":
                content[-1]["input"] = json.loads(text or "{}")
            else:
                assert content[-1][content[-1]["type"]]     # no block without a text in it
        elif name == "message_delta":
            assert not opened
            check_usage(value["usage"], "input_tokens", "output_tokens")
            ending = value["delta"]["stop_reason"]
            assert ending in STOP_REASONS
            assert (value["delta"]["stop_sequence"] is not None) == (ending == "stop_sequence")
        elif name == "error":
            error = value["error"]["message"]
            assert error and value["error"]["type"]
        else:
            assert name == "message_stop" and names[-2] == "message_delta"
    assert (names[-1] == "message_stop") == bool(ending) != (names[-1] == "error")
    content = [{key: value for key, value in block.items() if key != "json"} for block in content
               if block["type"] != "tool_use" or "json" not in block]
    return speech(ending=ending, error=error, **read_blocks(content))


def read_items(output):
    """What the items of a response say."""
    assert len({one["id"] for one in output}) == len(output)
    found = {"thinking": "", "text": "", "calls": []}
    for one in output:
        if one["type"] == "message":
            assert one["role"] == "assistant" and one["status"] == "completed" and one["id"].startswith("msg_")
            for piece in one["content"]:
                assert piece["type"] == "output_text" and piece["annotations"] == [] and piece["logprobs"] == []
                found["text"] += piece["text"]
        elif one["type"] == "reasoning":
            text = "".join(piece["text"] for piece in one["summary"])
            assert {piece["type"] for piece in one["summary"]} == {"summary_text"} and one["encrypted_content"] == text
            found["thinking"] += text
        else:
            assert one["type"] == "function_call" and one["status"] == "completed" and one["id"] and one["call_id"]
            found["calls"].append((one["name"], json.loads(one["arguments"])))
    calls = [one["call_id"] for one in output if "call_id" in one]
    assert len(set(calls)) == len(calls)
    return found


def read_response(value, status):
    """What a response object says; it has all that the SDK's types demand."""
    assert (value["object"], value["status"]) == ("response", status) and re.fullmatch("resp_[0-9a-zA-Z]{10,}",
        value["id"])
    for key in ("created_at", "model", "parallel_tool_calls", "tool_choice", "tools", "metadata", "temperature",
                "top_p", "instructions"):
        assert key in value, key
    assert value["previous_response_id"] is None and (value["error"] is None) == (status != "failed")
    assert value["incomplete_details"] == ({"reason": "max_output_tokens"} if status == "incomplete" else None)
    if status in ("completed", "incomplete"):
        told = value["usage"]
        check_usage(told, "input_tokens", "output_tokens", "total_tokens")
        assert told["total_tokens"] == told["input_tokens"] + told["output_tokens"]
        assert 0 <= told["input_tokens_details"]["cached_tokens"] <= told["input_tokens"]
        assert 0 <= told["output_tokens_details"]["reasoning_tokens"] <= told["output_tokens"]
    return speech(ending="" if status in ("in_progress", "failed") else status, **read_items(value["output"]))


OPENS = {"response.output_text": "response.content_part",
         "response.reasoning_summary_text": "response.reasoning_summary_part"}


def read_response_stream(events):
    """What the events of /v1/responses say: each item is done before the next opens, the numbers have no gaps."""
    names = [name for name, _ in events]
    assert [value["sequence_number"] for _, value in events] == list(range(len(events)))
    assert names[:2] == ["response.created", "response.in_progress"]
    assert all(read_response(value["response"], "in_progress") == speech() for _, value in events[:2])
    identity, items, parts, text, whole_text = events[0][1]["response"]["id"], [], [], None, None
    opened = None
    for name, value in events[2:-1]:
        stem, _, act = name.rpartition(".")
        assert name not in ("response.completed", "response.failed", "response.incomplete", "response.created")
        assert value["output_index"] == len(items)
        if name == "response.output_item.added":
            assert opened is None
            opened, parts, text, whole_text = value["item"], [], None, None
            assert opened["status"] == "in_progress" if opened["type"] != "reasoning" else opened["summary"] == []
            assert not (opened.get("content") or opened.get("arguments") or opened.get("input"))
            continue
        if name == "response.output_item.done":
            one = value["item"]
            assert (one["id"], one["type"]) == (opened["id"], opened["type"]) and whole_text is not None
            told = one.get("content") or one.get("summary") or [{"text": one.get("arguments", one.get("input"))}]
            assert [piece["text"] for piece in told] == [whole_text]
            items.append(one)
            opened = None
            continue
        assert opened is not None and value["item_id"] == opened["id"], name
        if opened["type"] in ("message", "reasoning"):
            assert value["content_index" if opened["type"] == "message" else "summary_index"] == 0
        if stem in OPENS.values():
            assert value["part"]["text"] == ("" if act == "added" else whole_text)
            assert parts == ([] if act == "added" else ["added"])
            parts.append(act)
        elif act == "delta":
            assert value["delta"] and parts == (["added"] if stem in OPENS else []) and whole_text is None
            text = (text or "") + value["delta"]
        else:
            assert act == "done" and parts == (["added"] if stem in OPENS else []) and text is not None
            whole_text = value.get("text", value.get("arguments", value.get("input")))
            assert whole_text == text
    name, last = events[-1]
    status = last["response"]["status"]
    assert name == f"response.{status}" and last["response"]["id"] == identity
    if status == "failed":
        error = last["response"]["error"]
        assert last["response"]["output"] == items
        assert set(error) == {"code", "message"} and error["message"]
        found = read_items(items)
        if opened is not None and text is not None:         # what had begun when it broke
            found["thinking" if opened["type"] == "reasoning" else "text"] += text
        return speech(error=error["message"], **found)
    assert opened is None and last["response"]["output"] == items and status in ("completed", "incomplete")
    return read_response(last["response"], status)


READERS = {"/v1/messages": read_message_stream, "/v1/responses": read_response_stream}
ENCODERS = {"/v1/messages": proxy_module.AnthropicEncoder, "/v1/responses": proxy_module.ResponsesEncoder}
ENDINGS = {"/v1/messages": {"stop": "end_turn", "length": "max_tokens"},
           "/v1/responses": {"stop": "completed", "length": "incomplete"}}


def read_whole(path, data):
    """What an answer that is no stream says."""
    value = json.loads(data)
    return read_message(value) if path == "/v1/messages" else read_response(value, value["status"])


def heard(path, data, stream):
    """What an answer says."""
    return READERS[path](events_of(data)) if stream else read_whole(path, data)


def wanted_of(path, lines):
    """What the Ollama lines that a sample expects mean on another face."""
    lines = json.loads(lines)
    messages = [line.get("message", line) for line in lines]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for message in messages
             for call in message.get("tool_calls", ())]
    thinking = "".join(message.get("thinking", "") for message in messages)
    text = "".join(message.get("content", message.get("response", "")) for message in messages)
    if "error" in lines[-1]:
        return speech(thinking, text, calls, error=lines[-1]["error"])
    ending = ENDINGS[path].get(lines[-1]["done_reason"], ENDINGS[path]["stop"])
    if path == "/v1/messages" and calls and ending == "end_turn":
        ending = "tool_use"
    return speech(thinking, text, calls, ending)


def some_splits(data):
    """Whole, byte by byte, and at random places with a seed."""
    found = splits(data)
    return [next(found), next(found), *list(found)[-5:]]


FOR_AGENTS = [row for row in STREAMS if "unreadable arguments" not in row[0]]


def test_agents_get_arguments_that_are_no_json_as_the_model_wrote_them(start, target):
    calls = [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{oops"}}]
    target.answers["/v1/chat/completions"] = http_stream(
        b"data: " + json.dumps({"choices": [{"delta": {"tool_calls": calls}, "finish_reason": "tool_calls"}]}).encode() + b"\n\ndata: [DONE]\n\n")
    proxy = start("--target-api", "openai", "--translate", "always")
    asked = {"model": "m", "max_tokens": 9, "messages": [HI], "tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    whole = json.loads(proxy.post("/v1/messages", asked).data)
    assert whole["content"][0]["input"] == {"arguments": "{oops"} and whole["stop_reason"] == "tool_use"
    answer = proxy.post("/v1/messages", {**asked, "stream": True})
    assert answer.status == 200 and {"type": "input_json_delta", "partial_json": "{oops"} in [
        value.get("delta") for _, value in events_of(answer.data)]
    asked = {"model": "m", "input": "hi", "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}]}
    assert json.loads(proxy.post("/v1/responses", asked).data)["output"][0]["arguments"] == "{oops"
    answer = proxy.post("/v1/responses", {**asked, "stream": True})
    assert events_of(answer.data)[-1][1]["response"]["output"][0]["arguments"] == "{oops"
    assert proxy.post("/api/chat", {**CHAT, "tools": [a_tool("f")], "stream": False}).status == 502


@cases("name, how, data, lines", FOR_AGENTS, ids=[row[0] for row in FOR_AGENTS])
def test_every_printed_stream_is_told_to_agents(name, how, data, lines):
    for path in AGENT_FACES:
        call, wanted = chat_call(how), wanted_of(path, lines)
        for pieces in some_splits(data):
            out = translated(pieces, how, encoder=ENCODERS[path](call, StillClock, 1, 2))
            if out.startswith(b'{"error"'):     # before the first event: a status of its own
                assert wanted == speech(error=json.loads(out)["error"])
            else:
                assert READERS[path](events_of(out)) == wanted
        decoder = OpenAIDecoder(call)
        whole_answer = Translation(decoder, ENCODERS[path](call, StillClock, 1, 2), steps_of(call, decoder))
        if wanted.error is None:
            assert read_whole(path, whole_answer.whole(data)) == wanted
        else:
            with pytest.raises(proxy_module.ProxyError) as caught:
                whole_answer.whole(data)
            assert caught.value.message == wanted.error


@cases("path", AGENT_FACES)
def test_replies_that_nobody_would_write_keep_the_order_of_events(path):
    chance = random.Random(11)
    for _ in range(300):
        call, events = chat_call(), random_events(chance)
        if chance.random() < 0.3:               # as a native Ollama sends them: one by one, with text behind
            late = [ToolCalls((ToolCall(f"late{at}", "f", {"at": at}),)) for at in range(2)]
            events[-1:-1] = late + [TextDelta("behind")]
        cut = chance.random() < 0.2
        if cut:
            events[chance.randint(1, len(events) - 1):] = [proxy_module.Failure(BadRequest("broke", 502))]
        encoder = ENCODERS[path](call, StillClock, 1, 2)
        frames = [encoder.error(event.error) if isinstance(event, proxy_module.Failure) else encoder.encode(event) for event in events]
        found = READERS[path](events_of(b"".join(frames)))
        thinking, text = ("".join(event.text for event in events if isinstance(event, kind))
                          for kind in (ThinkingDelta, TextDelta))
        calls = [(call.name, call.arguments) for event in events if isinstance(event, ToolCalls)
                 for call in event.calls]
        assert (found.thinking, found.text, found.calls) == (thinking.strip(), text, calls)
        assert found.error == ("broke" if cut else None) and bool(found.ending) != cut
        if not cut:
            assert read_whole(path, ENCODERS[path](call, StillClock, 1, 2).fold(events)) == found


BLOCK = "content_block_start", "content_block_delta", "content_block_stop"
CALL = "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"
THOUGHT_SEEN = [f"reasoning_summary_{name}" for name in ("part.added", "text.delta", "text.delta", "text.done", "part.done")]
TEXT_SEEN = "content_part.added", "output_text.delta", "output_text.delta", "output_text.done", "content_part.done"
# What HEARD makes of itself.
EVENTS = {
    "/v1/messages": ["message_start", *(BLOCK[0], BLOCK[1], *BLOCK[1:]) * 2, *BLOCK * 2, "message_delta",
                     "message_stop"],
    "/v1/responses": ["response." + name for name in (
        "created", "in_progress", CALL[0], *THOUGHT_SEEN, CALL[-1], CALL[0], *TEXT_SEEN, CALL[-1], *CALL * 2, "completed")]}


@cases("kind", TARGET_KINDS)
@cases("path", AGENT_FACES)
def test_the_order_of_events_is_exact_and_a_whole_answer_says_the_same(agents, path, kind):
    proxy, target = agents[kind]
    target.answers[CHAT_PATH[kind]] = speaking(kind, *HEARD)
    body, identities = {**PLAIN[path], **(CLAUDE_TOOLS if path == "/v1/messages" else CODEX_TOOLS)}, set()
    for _ in range(2):
        answer = proxy.post(path, {**body, "stream": True})
        assert answer.status == 200 and answer.headers["Content-Type"] == "text/event-stream"
        events = events_of(answer.data)
        assert [name for name, _ in events] == EVENTS[path]
        found = READERS[path](events)
        ending = "tool_use" if path == "/v1/messages" else "completed"
        assert found == speech("hm", "Hello", [("f", {"x": 1}), ("g", {})], ending)
        one = proxy.post(path, body)
        assert one.headers["Content-Type"] == "application/json" and read_whole(path, one.data) == found
        first = events[0][1].get("message") or events[0][1]["response"]
        identities |= {first["id"], json.loads(one.data)["id"]}
        told = json.loads(one.data)["usage"], (events[-2][1]["usage"] if path == "/v1/messages"
                                               else events[-1][1]["response"]["usage"])
        assert [(use["input_tokens"], use["output_tokens"]) for use in told] == [(7, 9), (7, 9)]
        assert first["model"] == json.loads(one.data)["model"] == MODEL
        if path == "/v1/responses":             # its items have ids of their own, the calls their target's
            items = [value["item"] for name, value in events if name == "response.output_item.done"]
            assert not identities & {one["id"] for one in items}
            identities |= {one["id"] for one in items}
            assert [one["call_id"] for one in items if "call_id" in one] == ["c1", "c2"]
    assert len(identities) == (4 if path == "/v1/messages" else 12)


@cases("stream", [True, False])
@cases("kind", TARGET_KINDS)
@cases("path, ending", [("/v1/messages", "max_tokens"), ("/v1/responses", "incomplete")])
def test_an_answer_that_was_cut_for_its_length_says_so(agents, kind, path, ending, stream):
    proxy, target = agents[kind]
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("text", "Hel"), reason="length")
    data = proxy.post(path, {**PLAIN[path], "stream": stream}).data
    assert heard(path, data, stream) == speech(text="Hel", ending=ending)


@cases("kind", TARGET_KINDS)
@cases("path", AGENT_FACES)
def test_an_answer_that_says_nothing_is_still_a_whole_one(agents, kind, path):
    proxy, target = agents[kind]
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("text", ""))
    for stream in (True, False):
        data = proxy.post(path, {**PLAIN[path], "stream": stream}).data
        found = heard(path, data, stream)
        assert found == speech(ending=ENDINGS[path]["stop"])


@cases("path", AGENT_FACES)
def test_a_count_that_the_target_never_gave_is_an_estimate(path):
    call, reply = chat_call(), [ToolCalls((ToolCall("c1", "f", {"x": "y" * 100}),)), Finish("stop", Usage())]
    encoder = ENCODERS[path](call, StillClock, 1, 2)
    last = events_of(b"".join(map(encoder.encode, reply)))[-2 if path == "/v1/messages" else -1][1]
    one = json.loads(ENCODERS[path](call, StillClock, 1, 2).fold(reply))
    for told in (last.get("response", last)["usage"], one["usage"]):
        assert told["input_tokens"] >= 1 and told["output_tokens"] >= 1, told


@cases("kind", TARGET_KINDS)
def test_calls_go_back_under_the_names_that_codex_knows(agents, kind):
    proxy, target = agents[kind]
    target.answers[CHAT_PATH[kind]] = speaking(
        kind, ("call", "c1", "agents__f", {"x": 1}), ("call", "c2", "apply_patch", {"input": "*** Begin \"x\"\n"}),
        ("call", "c3", "f", {}))
    body = {**PLAIN["/v1/responses"], "tools": [SPAWN, PATCH, *CODEX_TOOLS["tools"]]}
    events = events_of(proxy.post("/v1/responses", {**body, "stream": True}).data)
    items = [value["item"] for name, value in events if name == "response.output_item.done"]
    assert [{key: value for key, value in one.items() if key != "id"} for one in items] == [
        {"type": "function_call", "name": "f", "namespace": "agents", "call_id": "c1", "status": "completed",
         "arguments": '{"x":1}'},
        {"type": "custom_tool_call", "name": "apply_patch", "call_id": "c2", "status": "completed",
         "input": '*** Begin "x"\n'},
        {"type": "function_call", "name": "f", "call_id": "c3", "status": "completed", "arguments": "{}"}]
    names = [name for name, value in events if value.get("item_id") == items[1]["id"]]
    assert names == ["response.custom_tool_call_input.delta", "response.custom_tool_call_input.done"]
    assert events[-1][1]["response"]["output"] == items
    one = json.loads(proxy.post("/v1/responses", body).data)["output"]
    assert [{**item, "id": ""} for item in one] == [{**item, "id": ""} for item in items]
    # What came out goes in again, as Codex sends it.
    named = [("c1", "agents__f"), ("c2", "apply_patch"), ("c3", "f")]
    results = [{"type": one["type"] + "_output", "call_id": one["call_id"], "output": one["call_id"]} for one in items]
    proxy.post("/v1/responses", {**body, "input": [message("user", "hi"), *items, *results]})
    sent = last_sent(target, kind)
    assert sent["messages"] == turns(kind, HI_SEEN, a_turn("assistant", "", ("c1", "agents__f", {"x": 1}), (
        "c2", "apply_patch", {"input": "*** Begin \"x\"\n"}), ("c3", "f", {})), *(
            output_turn(ident, id=ident, name=name) for ident, name in named))


@cases("arguments", [{"patch": "*** Begin"}, {"input": ["*** Begin"]}, {"input": {"patch": "*** Begin"}}])
def test_what_a_model_writes_for_a_custom_tool_is_not_lost(agents, arguments):
    proxy, target = agents["openai"]
    target.answers["/v1/chat/completions"] = speaking("openai", ("call", "c1", "apply_patch", arguments))
    value = json.loads(proxy.post("/v1/responses", {**PLAIN["/v1/responses"], "tools": [PATCH]}).data)["output"][0]
    assert value["type"] == "custom_tool_call" and "*** Begin" in value["input"]


def broken(kind, error=None):
    """A stream that thinks and speaks, and then breaks, or brings an error."""
    head = stream_head("text/event-stream" if kind == "openai" else "application/x-ndjson")
    begun = [delta(reasoning_content="hm"), delta("Hel")] if kind == "openai" else [
        {"message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False},
        {"message": {"role": "assistant", "content": "Hel"}, "done": False}]
    frames = begun + [{"error": error}] * (error is not None)
    data = sse(*frames, done=False) if kind == "openai" else ndjson(*frames)
    return cut(head, chunk(data) + b"0\r\n\r\n" * (error is not None))


@cases("error", [None, "boom"])
@cases("kind", TARGET_KINDS)
@cases("path", AGENT_FACES)
def test_a_broken_stream_never_looks_finished_to_an_agent(agents, kind, path, error):
    proxy, target = agents[kind]
    target.answers[CHAT_PATH[kind]] = broken(kind, error)
    found = READERS[path](events_of(proxy.post(path, {**PLAIN[path], "stream": True}).data))
    assert (found.thinking, found.text, found.ending) == ("hm", "Hel", "") and (error or "upstream") in found.error
    answer = proxy.post(path, {**PLAIN[path], "stream": False})
    check_agent_error(path, answer, 502, "api_error", error or "upstream")


@cases("name, script", CUTS, ids=[row[0] for row in CUTS])
@cases("path", AGENT_FACES)
def test_a_stream_that_is_cut_ends_in_an_error_event(agents, path, name, script):
    proxy, target = agents["openai"]
    target.answers["/v1/chat/completions"] = script
    found = READERS[path](events_of(proxy.post(path, {**PLAIN[path], "stream": True}).data))
    assert found.text == "Hel" and not found.ending and "upstream" in found.error


# (what the target says in its stream, type for /v1/messages, code for /v1/responses)
FAILURES = [
    ("boom", "api_error", "server_error"),
    ({"message": "no", "code": 400}, "invalid_request_error", "invalid_prompt"),
    ({"message": "no", "code": 422}, "invalid_request_error", "invalid_prompt"),
    ({"message": "no key", "code": 401}, "authentication_error", "invalid_prompt"),
    ({"message": "no", "code": 403}, "permission_error", "invalid_prompt"),
    ({"message": "no such model", "code": 404}, "not_found_error", "invalid_prompt"),
    ({"message": "too large", "code": 413}, "request_too_large", "invalid_prompt"),
    ({"message": "pay", "code": 402}, "invalid_request_error", "insufficient_quota"),
    ({"message": "slow down", "code": 429}, "rate_limit_error", "rate_limit_exceeded"),
    ({"message": "oops", "code": 500}, "api_error", "server_error"),
    ({"message": "busy", "code": 503}, "overloaded_error", "server_is_overloaded"),
    ({"message": "busy", "code": 529}, "overloaded_error", "server_is_overloaded"),
    ({"message": "bad gateway", "code": 502}, "api_error", "server_error"),
    ({"message": "This model's maximum context length is 100 tokens", "code": 400}, "invalid_request_error",
     "context_length_exceeded"),
    ({"message": "the request exceeds the available context size", "code": 400}, "invalid_request_error",
     "context_length_exceeded"),
    ({"message": "Context size has been exceeded.", "code": 500}, "api_error", "context_length_exceeded"),
    (TOO_LONG, "api_error", "context_length_exceeded"),
]


@cases("error, kind, code", FAILURES, ids=[str(row[0])[:80] for row in FAILURES])
def test_a_failure_in_mid_stream_has_the_code_that_agents_act_on(error, kind, code):
    call, data = chat_call(), sse(delta("Hel"), {"error": error}, done=False)
    name, value = events_of(translated([data], encoder=proxy_module.AnthropicEncoder(call, StillClock, 1, 2)))[-1]
    assert (name, value["error"]["type"]) == ("error", kind)
    name, value = events_of(translated([data], encoder=proxy_module.ResponsesEncoder(call, StillClock, 1, 2)))[-1]
    assert (name, value["response"]["error"]["code"]) == ("response.failed", code)


STATUSES = [(400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
            (404, "not_found_error"), (422, "invalid_request_error"),
            (429, "rate_limit_error"), (500, "api_error"), (503, "overloaded_error"), (529, "overloaded_error")]


@cases("status, kind", STATUSES)
@cases("target_kind", TARGET_KINDS)
def test_a_refusal_of_the_target_keeps_its_status_and_says_whether_to_try_again(agents, target_kind, status, kind):
    proxy, target = agents[target_kind]
    error = {"message": "it said no"} if target_kind == "openai" else "it said no"
    target.answers[CHAT_PATH[target_kind]] = http_answer({"error": error}, status, "application/json", "Retry-After: 7")
    for path, stream in itertools.product(AGENT_FACES, (True, False)):
        answer = proxy.post(path, {**PLAIN[path], "stream": stream})
        check_agent_error(path, answer, status, kind, "it said no")
        assert answer.headers.get("Retry-After") == ("7" if status in (429, 503) else None)


@cases("script", [silent_mid_stream, silent])
@cases("path", AGENT_FACES)
def test_an_agent_that_leaves_frees_the_target(start, target, path, script):
    proxy = translating(start, target, "openai")
    target.answers["/v1/chat/completions"] = script
    with proxy.dial() as sock:
        sock.sendall(http_request("POST", path, {**PLAIN[path], "stream": True}))
        target.wait_for("/v1/chat/completions")
        if script is silent_mid_stream:
            read_until(sock, b"delta")
    assert target.peer_closed.wait(PATIENCE)


# -- relay first, translate when needed


ROUTED = [*AGENT_FACES, "/v1/messages/count_tokens"]


def asking(path):
    """A plain request for one of these routes."""
    return PLAIN.get(path, PLAIN["/v1/messages"])


def pair(start, target, kind, *argv):
    """A proxy that asks its target for the routes of agents first."""
    path, listed = LIST_PATH[kind]
    target.answers = {path: listed, CHAT_PATH[kind]: speaking(kind, ("text", "Hello"))}
    return start("--target-api", kind, *argv)


@cases("kind", TARGET_KINDS)
@cases("path", ROUTED)
def test_a_target_that_speaks_the_route_gets_the_bytes(start, target, path, kind):
    proxy = pair(start, target, kind)
    odd = b"event: odd\ndata:{\"x\" :1}\r\n\r\n: comment\n\n"
    target.answers[path] = http_stream(odd)
    headers = {"Content-Type": "application/json", "anthropic-version": "2023-06-01", "anthropic-beta": "a,b",
               "x-api-key": "mine"}
    for name in (MODEL, MODEL.upper(), MODEL + ":latest"):
        body = b'{ "messages" : [{"content": "the \\"model\\" is 1.0"}],\n "temperature": 0.10, ' \
            b'"previous_response_id": "r", "model" : "%b" }' % name.encode()
        answer = proxy.post(path + "?beta=true", body, headers)
        assert answer.status == 200 and answer.data == odd and answer.headers["Content-Type"] == "text/event-stream"
        sent = target.calls(path)[-1]
        assert sent.path == path + "?beta=true" and sent.data == body.replace(name.encode(), MODEL.encode())
        assert (sent.headers["anthropic-version"], sent.headers["anthropic-beta"]) == ("2023-06-01", "a,b")
        assert "x-api-key" not in sent.headers
    assert not target.calls(CHAT_PATH[kind])


LACKING = [
    ("Ollama of last year", http_answer(b"404 page not found", 404, "text/plain")),
    ("FastAPI", http_answer({"detail": "Not Found"}, 404)),
    ("FastAPI, another method", http_answer({"detail": "Method Not Allowed"}, 405)),
    ("not implemented", http_answer({"error": {"message": "Not implemented"}}, 501)),
    ("no text at all", http_answer(b"", 404)), ("no text at all, 405", http_answer(b"", 405)),
    ("a page", http_answer(b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>nginx</body></html>",
                           404, "text/html")),
    ("OpenAI's words", http_answer({"error": {"message": "Invalid URL (POST /v1/messages)",
                                              "type": "invalid_request_error", "param": None, "code": None}}, 404)),
    ("Groq's words", http_answer({"error": {
        "message": "Unknown request URL: POST /openai/v1/messages. Please check the URL for typos, or see the docs at "
                   "https://console.groq.com/docs/", "type": "invalid_request_error", "code": "unknown_url"}}, 404)),
    ("Kong", http_answer({"message": "no Route matched with those values"}, 404)),
    ("LM Studio", http_answer({"error": "Unexpected endpoint or method. (POST /v1/messages)"})),
]


@cases("name, answer", LACKING, ids=[row[0] for row in LACKING])
def test_a_target_that_lacks_the_route_is_translated_for_and_not_asked_again(start, target, name, answer):
    for first in (True, False):
        proxy = pair(start, target, "openai")
        target.answers.update(dict.fromkeys(AGENT_FACES, answer))
        for path in AGENT_FACES:
            before, asked_before = len(target.calls("/v1/chat/completions")), len(target.calls(path))
            for count, stream in enumerate((first, not first), 1):
                data = proxy.post(path, {**PLAIN[path], "stream": stream}).data
                assert heard(path, data, stream).text == "Hello"
                assert len(target.calls("/v1/chat/completions")) == before + count
                assert len(target.calls(path)) == asked_before + 1


@cases("kind", TARGET_KINDS)
def test_each_route_is_asked_for_by_itself_and_again_after_a_while(start, target, kind, later):
    proxy = pair(start, target, kind)
    target.answers["/v1/responses"] = http_answer({"relayed": True})
    for path in ROUTED * 2:
        assert proxy.post(path, asking(path)).status == 200
    assert [len(target.calls(path)) for path in ROUTED] == [1, 2, 1] and len(target.calls(CHAT_PATH[kind])) == 2
    target.answers["/v1/messages"] = http_answer({"relayed": True})
    later(24 * 3600)
    assert json.loads(proxy.post("/v1/messages", PLAIN["/v1/messages"]).data) == {"relayed": True}


RELAYED_ERRORS = [
    (404, {"type": "error", "error": {"type": "not_found_error", "message": "model 'qwen3:8b' not found"}}),
    (404, {"error": "model \"qwen3:8b\" not found, try pulling it first"}),
    (404, {"error": {"message": "The model `qwen3:8b` does not exist or you do not have access to it.",
                     "code": "model_not_found"}}),
    (404, {"detail": "Model qwen3:8b is not served here"}), (400, {"error": {"message": "max_tokens is too large"}}),
    (401, {"error": {"message": "no key"}}),
    (429, {"error": {"message": "slow down"}}), (500, {"error": {"message": "oops"}}),
    (200, {"id": "msg_1", "content": [{"type": "text", "text": "Unexpected endpoint or method?"}]}),
]


@cases("status, error", RELAYED_ERRORS, ids=[f"{status} {str(error)[:60]}" for status, error in RELAYED_ERRORS])
def test_other_answers_are_relayed_and_mean_nothing_for_the_route(start, target, status, error):
    proxy = pair(start, target, "openai")
    target.answers.update(dict.fromkeys(ROUTED, http_answer(error, status)))
    for path, count in itertools.product(ROUTED, (1, 2)):
        answer = proxy.post(path, asking(path))
        assert answer.status == status and json.loads(answer.data) == error and len(target.calls(path)) == count
        assert not target.calls("/v1/chat/completions")


@cases("path", ROUTED)
def test_translate_never_and_always(start, target, path):
    body, missing = asking(path), http_answer({"detail": "Not Found"}, 404)
    proxy = pair(start, target, "openai", "--translate", "never")
    target.answers[path] = missing
    for count in (1, 2):
        answer = proxy.post(path, body)
        assert answer.status == 404 and json.loads(answer.data) == {"detail": "Not Found"}
        assert len(target.calls(path)) == count
    target.answers[path] = http_answer({"relayed": True})
    proxy = start("--target-api", "openai", "--translate", "always")
    assert "relayed" not in json.loads(proxy.post(path, body).data) and len(target.calls(path)) == 2


@cases("path", AGENT_FACES)
def test_a_relayed_stream_that_breaks_is_cut_for_the_agent(start, target, path):
    proxy = pair(start, target, "openai")
    target.answers[path] = cut(stream_head(), chunk(b"event: message_start\ndata: {}\n\n"))
    request = http_request("POST", path, {**PLAIN[path], "stream": True}, "Connection: close")
    head, _, body = proxy.raw(request).partition(b"\r\n\r\n")
    assert b" 200 " in head and b"message_start" in body and not body.endswith(b"0\r\n\r\n") and b"[DONE]" not in body


@cases("how", ["auto", "always"])
@cases("path", ROUTED)
def test_a_packed_request_is_unpacked_or_refused_for_what_it_is(start, target, path, how):
    proxy, body = pair(start, target, "openai", "--translate", how), asking(path)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert proxy.post(path, gzip.compress(json.dumps(body).encode()), headers).status == 200
    headers["Content-Encoding"] = "compress"
    answer, other = proxy.post(path, b"\x1f\x9d\x90", headers), proxy.post("/api/chat", b"\x1f\x9d\x90", headers)
    check_agent_error(path, answer, other.status, "invalid_request_error",
                      re.escape(json.loads(other.data)["error"]))


# -- names, keys, settings


def test_the_small_requests_of_agents(start, target):
    proxy = pair(start, target, "openai", "--client-key", "inbound-key-1")
    answer = proxy.call("HEAD", "/")
    assert answer.status == 200 and answer.data == b""
    assert proxy.get("/v1/models?limit=1000", {"x-api-key": "inbound-key-1"}) == LIST


@cases("path", ROUTED)
def test_the_inbound_key_of_agents(start, target, path):
    body = asking(path)
    proxy = pair(start, target, "openai", "--client-key", "inbound-key-1", "--api-key", "sk-target-key-1")
    for headers in ({}, {"x-api-key": "wrong"}, {"Authorization": "Bearer wrong"}, {"Authorization": "inbound-key-1"}):
        answer = proxy.post(path, body, headers)
        check_agent_error(path, answer, 401, "authentication_error", "key")
    assert not target.received
    for headers in ({"x-api-key": "inbound-key-1"}, {"Authorization": "Bearer inbound-key-1"}):
        assert proxy.post(path, body, headers).status == 200
    assert not [request for request in target.received if "inbound-key-1" in str(request.headers)]
    assert {request.headers["authorization"] for request in target.received} == {"Bearer sk-target-key-1"}


@cases("path", ROUTED)
@cases("upgrade", ["websocket", "WebSocket"])
def test_an_upgrade_to_a_websocket_is_answered_426(agents, path, upgrade):
    headers = {"Connection": "Upgrade", "Upgrade": upgrade, "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "eA=="}
    answer = agents["openai"][0].call("GET", path, None, headers)
    check_agent_error(path, answer, 426, "invalid_request_error", "HTTP")


@cases("path", ROUTED)
def test_other_methods_are_not_allowed_on_the_routes_of_agents(agents, path):
    answer = agents["openai"][0].call("GET", path)
    assert answer.status == 405 and "POST" in answer.headers["Allow"]
    check_agent_error(path, answer, 405, "invalid_request_error", "method")


@cases("how", ["auto", "always"])
@cases("kind", TARGET_KINDS)
def test_an_alias_with_a_star_serves_all_claudes(start, target, kind, how):
    proxy = pair(start, target, kind, "--alias", f"claude-*={MODEL}", "--translate", how)
    for name, path in itertools.product(("claude-opus-4-8", "claude-haiku-4-5-20251001"), AGENT_FACES):
        answer = proxy.post(path, {**PLAIN[path], "model": name})
        assert answer.status == 200 and json.loads(answer.data)["model"] == name, answer.data
        assert last_sent(target, kind)["model"] == MODEL
        if how == "auto":
            assert target.calls(path)[-1].json["model"] == MODEL
    assert not [name for name in names_of(proxy) if "claude" in name or "*" in name]


@cases("path", AGENT_FACES)
def test_a_hidden_model_is_a_missing_one_for_agents(start, target, path, tmp_path):
    (tmp_path / "filter").write_text("m\n")
    proxy = pair(start, target, "openai", "--models-filter", str(tmp_path / "filter"))
    check_agent_error(path, proxy.post(path, PLAIN[path]), 404, "not_found_error", f"model '{MODEL}' not found")
    assert proxy.post(path, {**PLAIN[path], "model": "m"}).status == 200


def test_capabilities_are_corrected_by_set(start, target):
    sets = "--set", "m:capabilities=vision,-tools", "--set", "qwen*:capabilities=thinking"
    proxy = pair(start, target, "openai", *sets)
    wanted = {"m": ["completion", "vision"], MODEL: ["completion", "tools", "thinking"],
              "vendor/big:free": ["completion", "tools"]}
    listed = {entry["name"].replace(":latest", ""): entry["capabilities"] for entry in proxy.get("/api/tags")["models"]}
    for name, capabilities in wanted.items():
        assert listed[name] == capabilities
        assert json.loads(proxy.post("/api/show", {"model": name}).data)["capabilities"] == capabilities


@cases("kind", TARGET_KINDS)
@cases("path", AGENT_FACES)
def test_settings_fill_in_what_agents_do_not_say(start, target, kind, path):
    proxy = translating(start, target, kind, "--set", f"{MODEL}:temperature=0.5,seed=7,think=low")
    proxy.post(path, PLAIN[path])
    beside = {"max_tokens": 50} if path == "/v1/messages" else {}
    assert last_sent(target, kind) == wired(kind, [HI_SEEN], temperature=0.5, seed=7, think="low", **beside)
    quiet = {"thinking": {"type": "disabled"}} if path == "/v1/messages" else {"reasoning": {"effort": "none"}}
    proxy.post(path, {**PLAIN[path], "temperature": 0.1, **quiet})
    assert last_sent(target, kind) == wired(kind, [HI_SEEN], temperature=0.1, seed=7, think=False, **beside)


@cases("mode, thinking, text", [("separate", "hm", "Hello"), ("drop", "", "Hello"),
                                ("merge", "", "<think>\nhm\n</think>\n\nHello")])
@cases("path", AGENT_FACES)
def test_reasoning_goes_where_the_flag_says(start, target, path, mode, thinking, text):
    proxy = translating(start, target, "openai", "--reasoning", mode)
    target.answers["/v1/chat/completions"] = speaking("openai", ("thinking", "hm"), ("text", "Hello"))
    for stream in (True, False):
        data = proxy.post(path, {**PLAIN[path], "stream": stream}).data
        found = heard(path, data, stream)
        assert (found.thinking, found.text) == (thinking, text)


@cases("stops, wanted", [(["STOP"], ("end_turn", None)), (["a", "b", "c", "d", "STOP"], ("stop_sequence", "STOP"))])
@cases("stream", [True, False])
def test_a_stop_sequence_is_told_where_it_is_known(start, target, stops, wanted, stream):
    proxy = translating(start, target, "openai")
    target.answers["/v1/chat/completions"] = speaking("openai", *[("text", text) for text in (
        ("Hel", "lo ST", "OP never") if len(stops) > 4 else ("Hel", "lo "))])
    data = proxy.post("/v1/messages", {**PLAIN["/v1/messages"], "stop_sequences": stops, "stream": stream}).data
    found = read_message_stream(events_of(data)) if stream else read_message(json.loads(data))
    told = events_of(data)[-2][1]["delta"] if stream else json.loads(data)
    assert found.text == "Hello " and (told["stop_reason"], told["stop_sequence"]) == wanted


# (what the target says, what it said no to, the field that reaches it then)
AGENTS_HEALED = [
    ("a range", "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", 400, {"max_tokens": 8192}),
    ("a maximum", "max_tokens is too large: 32000. This model supports at most 16384 completion tokens", 400,
     {"max_tokens": 16384}),
    ("a context", "This model's maximum context length is 16384 tokens. However, you requested 32010 tokens", 400,
     {"max_tokens": None}),
    ("another name",
     "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", 400,
     {"max_tokens": None, "max_completion_tokens": 32000}),
    ("effort", "unknown field reasoning_effort", 400, {"max_tokens": 32000, "reasoning_effort": None}),
]


@cases("name, error, status, wanted", AGENTS_HEALED, ids=[row[0] for row in AGENTS_HEALED])
@cases("path", AGENT_FACES)
def test_what_a_small_server_refuses_is_healed_for_agents(start, target, path, name, error, status, wanted):
    proxy = translating(start, target, "openai")
    target.answers["/v1/chat/completions"] = [http_answer({"error": {"message": error}}, status),
                                              spoken("openai", True, ("text", "Hello"))]
    many = {"max_tokens": 32000, "output_config": {"effort": "high"}} if path == "/v1/messages" else {
        "max_output_tokens": 32000, "reasoning": {"effort": "high"}}
    assert READERS[path](events_of(proxy.post(path, {**PLAIN[path], **many, "stream": True}).data)).text == "Hello"
    first, second = target.calls("/v1/chat/completions")
    assert first.json["max_tokens"] == 32000
    assert {key: second.json.get(key) for key in wanted} == wanted and second.json["messages"] == first.json["messages"]


@cases("path", AGENT_FACES)
def test_a_native_model_that_cannot_think_is_asked_without_it(start, target, path):
    proxy = translating(start, target, "ollama")
    target.answers["/api/chat"] = [http_answer({"error": f'"{MODEL}" does not support thinking'}, 400),
                                   spoken("ollama", False, ("text", "Hello"))]
    asking = {"thinking": {"type": "enabled", "budget_tokens": 31999}} if path == "/v1/messages" else {
        "reasoning": {"effort": "high"}}
    assert read_whole(path, proxy.post(path, {**PLAIN[path], **asking}).data).text == "Hello"
    assert [request.json.get("think") for request in target.calls("/api/chat")] == ["high", None]


@cases("status", [401, 403])
@cases("how", ["auto", "always"])
@cases("path", AGENT_FACES)
def test_a_refused_key_of_ours_is_nothing_to_try_again(start, target, path, how, status):
    proxy = pair(start, target, "openai", "--translate", how, "--api-key", "sk-target-key-1")
    target.answers[path] = target.answers["/v1/chat/completions"] = http_answer(
        {"error": {"message": "Incorrect API key"}}, status)
    answer = proxy.post(path, PLAIN[path])
    assert answer.status in (status, 502) and answer.headers.get("x-should-retry") == "false"
    assert "Incorrect API key" in json.loads(answer.data)["error"]["message"]


@cases("path", AGENT_FACES)
def test_a_relayed_404_is_nothing_to_try_again(start, target, path):
    proxy = pair(start, target, "openai")
    target.answers[path] = http_answer({"error": {"message": "model 'x' not found"}}, 404)
    answer = proxy.post(path, PLAIN[path])
    assert answer.status == 404 and answer.headers.get("x-should-retry") == "false"


def test_a_target_that_is_down_is_worth_another_try(start, target):
    proxy = translating(start, target, "openai")
    target.close()
    for path in AGENT_FACES:
        check_agent_error(path, proxy.post(path, PLAIN[path]), 502, "api_error", ".")


# -- requests of the shapes that were recorded from Claude Code, Codex and Copilot CLI; a word for all that is kept


CLAUDE_CODE = {
    "model": MODEL, "max_tokens": 32000, "stream": True, "thinking": {"type": "adaptive"},
    "metadata": {"user_id": "lost1"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=lost2;"},
               {"type": "text", "text": "kept1", "cache_control": {"type": "ephemeral"}},
               {"type": "text", "text": "kept2"}],
    "tools": [{"name": "kept3", "description": "kept4", "input_schema": {
        "$schema": "lost3", "type": "object", "additionalProperties": False, "required": ["kept5"],
        "properties": {"kept5": {"type": "string", "description": "kept6"}}}}],
    "messages": [
        blocks("kept7", {"type": "text", "text": "kept8", "cache_control": {"type": "ephemeral"}}),
        {"role": "system", "content": "kept9"},
        blocks({"type": "thinking", "thinking": "thought1", "signature": ""}, "kept10",
               use("kept11", "kept3", kept5="kept12", more="\u00e9 \U0001f999"),
               use("kept13", "kept3", __unparsedToolInput={"raw": "kept14", "len": 3}), role="assistant"),
        blocks(used("kept15", "kept13", is_error=True),
               used([{"type": "text", "text": "kept16"}, IMAGE_BLOCK], "kept11", cache_control={"type": "ephemeral"})),
        {"role": "assistant", "content": "kept17"}, {"role": "user", "content": "kept18"},
        blocks(use("kept19", "kept3"), role="assistant"),
        {"role": "user", "content": [{"tool_use_id": "kept19", "type": "tool_result", "content": "kept20",
                                      "is_error": False}]}]}
TITLE = {
    "model": MODEL, "max_tokens": 32000, "stream": True, "tools": [],
    "thinking": {"budget_tokens": 31999, "type": "enabled"},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {
        "type": "object", "properties": {"kept1": {"type": "string"}}}}},
    "system": [{"type": "text", "text": "kept2"}], "messages": [{"role": "user", "content": "kept3"}]}
CODEX = {
    "model": MODEL, "stream": True, "store": False, "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "lost1", "client_metadata": {"a": "lost2"},
    "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"effort": "high", "summary": "auto"},
    "text": {"verbosity": "low"}, "instructions": "kept1",
    "tools": [{"type": "function", "name": "kept2", "description": "kept3", "strict": False,
               "parameters": {"type": "object", "properties": {"kept4": {"type": "string"}}}},
              {"type": "namespace", "name": "kept5", "description": "lost3", "tools": [
                  {"type": "function", "name": "kept6", "description": "kept7", "strict": False,
                   "parameters": {"type": "object", "properties": {}}}]},
              {"type": "web_search", "external_web_access": True, "search_content_types": ["lost4"]},
              {"type": "custom", "name": "kept8", "description": "kept9", "format": {
                  "type": "grammar", "syntax": "lark", "definition": "kept10"}},
              {"type": "tool_search", "execution": "lost5", "description": "lost6", "parameters": {"type": "object"}}],
    "input": [message("developer", "kept11", "kept12"), message("user", "kept13"),
              message("user", "kept14", INPUT_IMAGE), reasoned("thought1"),
              called("kept15", "kept2", '{"kept4":"kept16"}'), called("kept17", "kept6", "{}", namespace="kept5"),
              output("kept18", "kept17"),
              output([{**INPUT_IMAGE}, {"type": "input_text", "text": "kept19"}], "kept15"),
              reasoned(summary=[], content=[{"type": "reasoning_text", "text": "thought2"}]),
              item("custom_tool_call", id="ctc_1", status="completed", call_id="kept20", name="kept8", input="kept21"),
              item("custom_tool_call_output", id="ctco_1", call_id="kept20", output="kept22"),
              message("assistant", {"type": "output_text", "text": "kept23", "annotations": []}, status="completed"),
              {"type": "message", "role": "user", "content": [
                  {"type": "input_text", "text": "kept24"}]}]}
COMPACTION = {**CODEX, "tools": [], "parallel_tool_calls": False, "reasoning": {"summary": "auto"}}
COPILOT = {
    "model": MODEL, "max_tokens": 8192, "temperature": 0, "stream": True, "system": "kept1", "tools": [{
        "name": "kept2", "description": "kept3",
        "input_schema": {"type": "object", "properties": {"kept4": {"type": "string"}}}}],
    "messages": [blocks("kept5"), blocks(use("kept6", "kept2", kept4="kept7"), role="assistant"),
                 blocks(used("kept8", "kept6"))]}
RECORDED = [("Claude Code", "/v1/messages", CLAUDE_CODE), ("Claude Code, a title", "/v1/messages", TITLE),
            ("Codex", "/v1/responses", CODEX),
            ("Codex, compaction", "/v1/responses", COMPACTION), ("Copilot CLI", "/v1/messages", COPILOT)]


@cases("kind", TARGET_KINDS)
@cases("name, path, body", RECORDED, ids=[row[0] for row in RECORDED])
def test_nothing_is_lost_of_what_agents_really_send(agents, kind, name, path, body):
    proxy, target = agents[kind]
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("text", "Hello"))
    query = "?beta=true" if path == "/v1/messages" else ""
    assert READERS[path](events_of(proxy.post(path + query, body).data)).text == "Hello"
    sent = last_sent(target, kind)
    text, told = json.dumps(sent), json.dumps(body)
    kept = set(re.findall("kept[0-9]+", told))
    assert kept - set(re.findall("kept[0-9]+", text)) == set() and len(kept) > 2 and "lost" not in text
    assert text.count(PNG) == told.count(PNG)
    assert set(re.findall("thought[0-9]", text)) == (set(re.findall("thought[0-9]", told)) if kind == "ollama"
                                                     else set())
    asked_for = [turn["tool_calls"] for turn in sent["messages"] if "tool_calls" in turn]
    results = [turn["tool_call_id"] for turn in sent["messages"] if turn["role"] == "tool"]
    assert sorted(call["id"] for calls in asked_for for call in calls) == sorted(results)
    assert ("tools" in sent) == bool(body["tools"]) and "tool_choice" not in sent or body["tools"]
    roles = [turn["role"] for turn in sent["messages"]]
    assert path == "/v1/responses" or (roles.count("system") == 1 and roles[0] == "system")


# -- the official SDKs of both faces, where they are installed, in front of targets of both kinds


def final(stream):
    """What a stream helper has gathered when all was read."""
    with stream as opened:
        events = list(opened)
        end = getattr(opened, "get_final_message", None) or opened.get_final_response
        return events, end()


@cases("kind", TARGET_KINDS)
def test_the_official_anthropic_client(agents, kind):
    anthropic = pytest.importorskip("anthropic")
    proxy, target = agents[kind]
    client = anthropic.Anthropic(base_url=proxy.url, api_key="x", max_retries=0)
    target.answers[CHAT_PATH[kind]] = speaking(kind, *HEARD)
    asking = dict(model=MODEL, max_tokens=2000, messages=[{"role": "user", "content": "hi"}],
                  tools=CLAUDE_TOOLS["tools"],
                  thinking={"type": "enabled", "budget_tokens": 1024})
    one = client.messages.create(**asking)
    events, streamed = final(client.messages.stream(**asking))
    raw = list(client.messages.create(stream=True, **asking))
    assert raw[0].type == "message_start" and raw[-1].type == "message_stop"
    for answer in (one, streamed):
        assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert (answer.content[0].thinking, answer.content[1].text) == ("hm", "Hello")
        calls = [(block.id, block.name, block.input) for block in answer.content[2:]]
        assert calls == [("c1", "f", {"x": 1}), ("c2", "g", {})] and answer.stop_reason == "tool_use"
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, 9)
        assert answer.role == "assistant" and answer.model == MODEL
    assert [event.text for event in events if event.type == "text"] == ["Hel", "lo"]
    assert [event.snapshot for event in events if event.type == "input_json"][0] == {"x": 1}
    # The round trip: what came out goes in again, with results.
    results = [{"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "see"}, IMAGE_BLOCK]},
               {"type": "tool_result", "tool_use_id": "c1", "content": "one", "is_error": False}]
    for answer in (one, streamed):
        later = [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
        client.messages.create(**{**asking, "messages": asking["messages"] + later})
        assert last_sent(target, kind)["messages"] == turns(
            kind, HI_SEEN, a_turn("assistant", "Hello", ("c1", "f", {"x": 1}), ("c2", "g", {}), thinking="hm"),
            a_turn("tool", "see", id="c2", name="g", images=(PNG,)), a_turn("tool", "one", id="c1", name="f"))
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("text", "A pixel."))
    answer = client.messages.create(model=MODEL, max_tokens=9, system="s", messages=[blocks(IMAGE_BLOCK, "what?")])
    assert answer.content[0].text == "A pixel." and answer.stop_reason == "end_turn"
    assert last_sent(target, kind)["messages"] == turns(kind, a_turn("system", "s"), a_turn("user", "what?", images=(PNG,)))
    many = [{"role": "user", "content": "hi" * 40}]
    assert client.messages.count_tokens(model=MODEL, messages=many).input_tokens >= 10
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("text", "Hel"), reason="length")
    assert final(client.messages.stream(**asking))[1].stop_reason == "max_tokens"
    assert client.messages.create(**asking).stop_reason == "max_tokens"


@cases("kind", TARGET_KINDS)
def test_the_official_anthropic_client_is_told_what_went_wrong(agents, kind):
    anthropic = pytest.importorskip("anthropic")
    proxy, target = agents[kind]
    client = anthropic.Anthropic(base_url=proxy.url, api_key="x", max_retries=3)
    asking = dict(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "hi"}])
    target.answers[CHAT_PATH[kind]] = broken(kind, "boom")
    for run in (lambda: list(client.messages.create(stream=True, **asking)),
                lambda: final(client.messages.stream(**asking))):
        with pytest.raises(anthropic.APIStatusError, match="boom"):
            run()
    target.answers[CHAT_PATH[kind]] = broken(kind)
    with pytest.raises(anthropic.APIError, match="upstream"):
        list(client.messages.create(stream=True, **asking))
    for status, error in ((400, anthropic.BadRequestError), (401, anthropic.AuthenticationError),
                          (403, anthropic.PermissionDeniedError), (404, anthropic.NotFoundError)):
        target.answers[CHAT_PATH[kind]] = http_answer({"error": "it said no"}, status)
        before = len(target.calls(CHAT_PATH[kind]))
        with pytest.raises(error, match="it said no"):
            client.messages.create(**asking)
        assert len(target.calls(CHAT_PATH[kind])) == before + 1         # asked once: nothing to try again
    with pytest.raises(anthropic.BadRequestError, match="max_tokens is required"):
        client.messages.create(**{**asking, "max_tokens": 0})


@cases("kind", TARGET_KINDS)
def test_the_official_anthropic_client_parses_answers(agents, kind):
    anthropic = pytest.importorskip("anthropic")
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    proxy, target = agents[kind]
    client = anthropic.Anthropic(base_url=proxy.url, api_key="x", max_retries=0)
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("text", '{"name": "Ada", "age": 36}'))
    asking = dict(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "who?"}])
    if not hasattr(client.messages, "parse"):
        pytest.skip("an SDK without messages.parse")
    assert client.messages.parse(output_format=Person, **asking).parsed_output == Person(name="Ada", age=36)
    sent = last_sent(target, kind)
    schema = sent["format"] if kind == "ollama" else sent["response_format"]["json_schema"]["schema"]
    assert set(schema["properties"]) == {"name", "age"}


@cases("kind", TARGET_KINDS)
def test_the_official_openai_client_of_responses(agents, kind):
    openai = pytest.importorskip("openai")
    proxy, target = agents[kind]
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="x", max_retries=0)
    target.answers[CHAT_PATH[kind]] = speaking(kind, *HEARD)
    asking = dict(model=MODEL, input="hi", instructions="s", tools=CODEX_TOOLS["tools"], store=False,
                  reasoning={"effort": "low", "summary": "auto"},
                  include=["reasoning.encrypted_content"])
    one = client.responses.create(**asking)
    raw = list(client.responses.create(stream=True, **asking))
    assert raw[0].type == "response.created" and raw[-1].type == "response.completed"
    strict_tools = [{**tool, "strict": True} for tool in asking["tools"]]      # the helper wants them so
    events, streamed = final(client.responses.stream(**{**asking, "tools": strict_tools}))
    for answer in (one, raw[-1].response, streamed):
        assert [entry.type for entry in answer.output] == ["reasoning", "message", "function_call", "function_call"]
        assert (answer.output[0].summary[0].text, answer.output_text, answer.status) == ("hm", "Hello", "completed")
        calls = [(call.call_id, call.name, json.loads(call.arguments)) for call in answer.output[2:]]
        assert calls == [("c1", "f", {"x": 1}), ("c2", "g", {})]
        assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (7, 9, 16)
        assert answer.usage.output_tokens_details.reasoning_tokens >= 0 and answer.error is None
    grown = {kind_of_event: [event for event in events if event.type == f"response.{kind_of_event}.delta"]
             for kind_of_event in ("output_text", "reasoning_summary_text", "function_call_arguments")}
    assert [event.snapshot for event in grown["output_text"]] == ["Hel", "Hello"]
    assert [event.delta for event in grown["reasoning_summary_text"]] == ["h", "m"]
    assert json.loads(grown["function_call_arguments"][0].snapshot) == {"x": 1}
    # The round trip: what came out goes in again, with results.
    for answer in (one, raw[-1].response, streamed):
        client.responses.create(**{**asking, "input": [
            {"role": "user", "content": "hi"}, *answer.output,
            {"type": "function_call_output", "call_id": "c2",
             "output": [{"type": "input_text", "text": "see"}, INPUT_IMAGE]},
            {"type": "function_call_output", "call_id": "c1", "output": "one"}]})
        assert last_sent(target, kind)["messages"] == turns(
            kind, a_turn("system", "s"), HI_SEEN, a_turn("assistant", "Hello", ("c1", "f", {"x": 1}), ("c2", "g", {}),
                                                thinking="hm"),
            a_turn("tool", "see", id="c2", name="g", images=(PNG,)), a_turn("tool", "one", id="c1", name="f"))
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("text", "A pixel."))
    answer = client.responses.create(model=MODEL, input=[message("user", "what?", INPUT_IMAGE)])
    assert answer.output_text == "A pixel."
    assert last_sent(target, kind)["messages"] == turns(kind, a_turn("user", "what?", images=(PNG,)))
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("text", "Hel"), reason="length")
    cut_short = client.responses.create(**asking, max_output_tokens=5)
    assert cut_short.status == "incomplete" and cut_short.output_text == "Hel"
    assert cut_short.incomplete_details.reason == "max_output_tokens"


@cases("kind", TARGET_KINDS)
def test_the_official_openai_client_parses_responses(agents, kind):
    openai = pytest.importorskip("openai")
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    class Look(BaseModel):
        """Looks somebody up."""
        name: str

    proxy, target = agents[kind]
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="x", max_retries=0)
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("text", '{"name": "Ada", '), ("text", '"age": 36}'))
    asking, ada = dict(model=MODEL, input="who?", text_format=Person), Person(name="Ada", age=36)
    assert client.responses.parse(**asking).output_parsed == ada
    assert final(client.responses.stream(**asking))[1].output_parsed == ada
    sent = last_sent(target, kind)
    schema = sent["format"] if kind == "ollama" else sent["response_format"]["json_schema"]["schema"]
    assert set(schema["properties"]) == {"name", "age"}
    target.answers[CHAT_PATH[kind]] = speaking(kind, ("call", "c1", "Look", {"name": "Ada"}))
    answer = client.responses.parse(model=MODEL, input="who?", tools=[openai.pydantic_function_tool(Look)])
    assert answer.output[0].name == "Look" and answer.output[0].parsed_arguments == Look(name="Ada")


@cases("kind", TARGET_KINDS)
def test_the_official_openai_client_of_responses_is_told_what_went_wrong(agents, kind):
    openai = pytest.importorskip("openai")
    proxy, target = agents[kind]
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="x", max_retries=3)
    for error in (None, "boom"):
        target.answers[CHAT_PATH[kind]] = broken(kind, error)
        last = list(client.responses.create(model=MODEL, input="hi", stream=True))[-1]
        assert last.type == "response.failed" and last.response.status == "failed"
        assert (error or "upstream") in last.response.error.message
        with pytest.raises(RuntimeError, match="response.completed"):
            final(client.responses.stream(model=MODEL, input="hi"))
    for status, kind_of_error in ((400, openai.BadRequestError), (401, openai.AuthenticationError),
                                  (403, openai.PermissionDeniedError), (404, openai.NotFoundError)):
        target.answers[CHAT_PATH[kind]] = http_answer({"error": "it said no"}, status)
        before = len(target.calls(CHAT_PATH[kind]))
        with pytest.raises(kind_of_error, match="it said no"):
            client.responses.create(model=MODEL, input="hi")
        assert len(target.calls(CHAT_PATH[kind])) == before + 1         # asked once: nothing to try again
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=MODEL, input="hi", previous_response_id="resp_1")


# ----------------------------------------------------------------------------
# The official clients, where they are installed: the strictest judges there are
# ----------------------------------------------------------------------------


@fixture
def demo_proxy(start):
    demo = DemoServer()
    yield start("--target", demo.url)
    demo.shutdown()


NOTE = {"type": "function", "function": {"name": "note", "description": "d", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}}


def test_the_official_ollama_client(demo_proxy):
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=demo_proxy.url)
    assert [model.model for model in client.list().models] == ["demo-chat:latest", "demo-embed:latest"]
    shown = client.show("demo-chat")
    assert shown.modelinfo["general.basename"] == "demo-chat" and "tools" in shown.capabilities
    assert client.ps().models
    turn = [{"role": "user", "content": "hello think"}]
    answer = client.chat("demo-chat", turn)
    assert answer.message.content == "You said: hello think" and answer.message.thinking and answer.eval_count > 0
    parts = list(client.chat("demo-chat", turn, stream=True))
    assert "".join(part.message.content for part in parts) == "You said: hello think" and parts[-1].done and parts[-1].done_reason == "stop"
    call = client.chat("demo-chat", [{"role": "user", "content": "call it"}], tools=[NOTE]).message
    assert call.tool_calls[0].function.name == "note" and call.tool_calls[0].function.arguments == {"text": "call it"}
    history = [{"role": "user", "content": "call it"}, call, {"role": "tool", "tool_name": "note", "content": "done"}]
    assert client.chat("demo-chat", history, tools=[NOTE]).message.content == "You said: done"
    assert client.generate("demo-chat", "hi", system="s").response == "You said: hi"
    assert "".join(part.response for part in client.generate("demo-chat", "hi", stream=True)) == "You said: hi"
    assert json.loads(client.chat("demo-chat", turn, format={"type": "object"}).message.content) == {"echo": "hello think"}
    assert len(client.embed("demo-embed", ["a", "b"]).embeddings) == 2 and client.embeddings("demo-embed", "a").embedding
    assert client.generate("demo-chat", "").done_reason == "load"
    assert client.pull("demo-chat").status == "success"
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("nope", turn)
    assert caught.value.status_code == 404 and "not found" in caught.value.error
    with pytest.raises(ollama.ResponseError):
        client.delete("demo-chat")


def check_openai(client, openai):
    turn = [{"role": "user", "content": "hello"}]
    assert {model.id for model in client.models.list()} >= {"demo-chat", "demo-embed"} or client.models.list().data
    assert client.chat.completions.create(model="demo-chat", messages=turn).choices[0].message.content == "You said: hello"
    chunks = list(client.chat.completions.create(model="demo-chat", messages=turn, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "You said: hello" and chunks[-1].usage.total_tokens
    answer = client.chat.completions.create(model="demo-chat", messages=[{"role": "user", "content": "call it"}], tools=[NOTE])
    assert answer.choices[0].finish_reason == "tool_calls" and json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"text": "call it"}
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(model="demo-chat", messages=[{"role": "user", "content": "call it"}], tools=[NOTE], stream=True)]
    assert pieces[-1].finish_reason == "tool_calls" and any(piece.delta.tool_calls for piece in pieces)
    assert len(client.embeddings.create(model="demo-embed", input=["a", "b"]).data) == 2
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}
    assert json.loads(client.chat.completions.create(model="demo-chat", messages=turn, response_format=schema).choices[0].message.content) == {"echo": "hello"}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=turn)


def test_the_official_openai_client_over_the_relay(demo_proxy):
    openai = pytest.importorskip("openai")
    check_openai(openai.OpenAI(base_url=f"{demo_proxy.url}/v1", api_key="undefined", max_retries=0), openai)


def test_the_official_openai_client_in_front_of_an_ollama(start, demo_proxy):
    """The demo behind one proxy is the Ollama of a second one."""
    openai = pytest.importorskip("openai")
    outer = start("--target", demo_proxy.url, "--target-api", "ollama")
    check_openai(openai.OpenAI(base_url=f"{outer.url}/v1", api_key="undefined", max_retries=0), openai)


def test_the_official_openai_client_with_two_parallel_calls_and_a_picture(start, ollama_target):
    openai = pytest.importorskip("openai")
    calls = [{"function": {"name": "f", "arguments": {"n": at}}} for at in (1, 2)]
    ollama_target.answers["/api/chat"] = http_stream(ndjson(
        {"message": {"role": "assistant", "content": "", "tool_calls": calls[:1]}, "done": False},
        {"message": {"role": "assistant", "content": "", "tool_calls": calls[1:]}, "done": True, "done_reason": "stop", "eval_count": 1}))
    client = openai.OpenAI(base_url=f"{start().url}/v1", api_key="x", max_retries=0)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    found = {}
    for chunk in client.chat.completions.create(model="llama3", stream=True, tools=[NOTE], messages=[{"role": "user", "content": [picture]}]):
        for call in chunk.choices[0].delta.tool_calls or ():
            found[call.index] = (call.id, call.function.arguments)
    assert set(found) == {0, 1} and found[0][0] != found[1][0] and [json.loads(found[at][1]) for at in (0, 1)] == [{"n": 1}, {"n": 2}]
    assert ollama_target.calls("/api/chat")[-1].json["messages"][0]["images"] == ["iVBORw0KGgo="]
    ollama_target.answers["/api/chat"] = http_stream(ndjson({"message": {"role": "assistant", "content": "a"}, "done": False}, {"error": "boom"}))
    with pytest.raises(openai.APIError, match="boom"):
        list(client.chat.completions.create(model="llama3", stream=True, messages=[{"role": "user", "content": "x"}]))


# ----------------------------------------------------------------------------
# Regressions: each was found by an attack or a review
# ----------------------------------------------------------------------------


def test_trace_is_not_relayed(start, target):
    proxy = start("--target-api", "openai", "--api-key", "sk-target-key")
    for method in ("TRACE", "PROPFIND"):
        assert proxy.raw(http_request(method, "/v1/x", b"", "Connection: close")).startswith(b"HTTP/1.1 405")
    assert not target.received


def test_the_inbound_key_is_never_forwarded(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai", "--client-key", "inbound-SECRET-9", "--forward-auth", "--api-key", "sk-target-key")
    for path in ("/api/chat", "/v1/chat/completions"):
        assert proxy.post(path, {**CHAT, "stream": True}, {"Authorization": "Bearer inbound-SECRET-9"}).status == 200
        assert target.received[-1].headers["authorization"] == "Bearer sk-target-key"


def test_our_key_is_hidden_in_late_errors_and_in_urls(start, target):
    target.answers["/v1/chat/completions"] = http_stream(sse(delta("a"), {"error": {"message": "bad key sk-target-key"}}))
    proxy = start("--target-api", "openai", "--api-key", "sk-target-key")
    assert proxy.lines("/api/chat", CHAT)[-1] == {"error": "bad key ***"}
    target.answers["/v1/chat/completions"] = b"HTTP/1.1 302 X\r\nLocation: http://evil.example/?key=AIzaSECRET\r\nContent-Length: 0\r\n\r\n"
    keyed = start("--target", f"{target.url}/v1?key=AIzaSECRET", "--debug", "--target-api", "openai")
    answer = keyed.post("/api/chat", CHAT)
    keyed.wait_logged('"POST /api/chat HTTP/1.1" 502 ')
    assert answer.status == 502 and b"AIza" not in answer.data and "AIza" not in "\n".join(keyed.logged + keyed.errors) + answer.reason


def test_extras_of_one_conversation_stay_out_of_another(start, target):
    target.answers["/v1/chat/completions"] = http_stream(sse(call_delta({"index": 0, "id": "call_0", "extra_content": {"s": "ALICE"}, **part("f", '{"a":1.0,"b":[]}')}), TOOLS_END))
    proxy = start("--target-api", "openai")
    proxy.lines("/api/chat", CHAT)
    for arguments, wanted in (({"b": 2}, None), ({"b": [], "a": 1}, {"s": "ALICE"})):
        proxy.lines("/api/chat", {"model": "m", "messages": [calling(("f", arguments, "call_0")), result("r", tool_call_id="call_0")]})
        assert target.received[-1].json["messages"][0]["tool_calls"][0].get("extra_content") == wanted


def test_a_filter_has_no_back_doors(start, target):
    Path("models-filter.txt").write_text("m\n")
    target.answers.update({"/v1/audio/transcriptions": http_answer({"text": "x"}), "/v1/responses": http_answer({}), "/v1/chat/completions": http_answer(WHOLE)})
    proxy = start("--target-api", "openai")
    hidden = {**CHAT, "model": "qwen3:8b"}
    assert proxy.post("/v1/chat/completions", hidden, {"Content-Type": "application/json; x=multipart"}).status == 404
    for name, status in (("qwen3:8b", 404), ("m", 200)):
        form = f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{name}\r\n--b--\r\n'.encode()
        assert proxy.post("/v1/audio/transcriptions", form, {"Content-Type": "multipart/form-data; boundary=b"}).status == status
    assert proxy.call("PUT", "/v1/files", hidden).status == 404 and proxy.post("/v1/responses", {"model": ["qwen3:8b"]}).status == 400
    assert [model["id"] for model in proxy.get("/v1/%6dodels")["data"]] == ["m"]
    proxy.post("/v1/chat/completions", b'{"model":"m","MODEL":"qwen3:8b","Model":"qwen3:8b","messages":[]}')
    proxy.post("/v1/chat/completions", b'{"model":"qwen3:8b","model":"m","messages":[]}')
    assert not any(b"qwen" in request.data for request in target.received)


def test_a_filter_guards_an_ollama_as_well(start, ollama_target):
    Path("models-filter.txt").write_text("llama3\n")
    for path in ("/api/copy", "/api/pull", "/api/create", "/api/push", "/api/delete"):
        ollama_target.answers[path] = http_answer({})
    proxy = start()
    for method, path, body in (("POST", "/api/copy", {"source": "qwen3:8b", "destination": "x"}), ("POST", "/api/pull", {"name": "qwen3:8b"}),
                               ("POST", "/api/create", {"model": "llama3", "from": "qwen3:8b"}), ("DELETE", "/api/delete", {"model": "qwen3:8b"}),
                               ("POST", "/api/%63hat", {**ASK, "model": "qwen3:8b"}), ("POST", "/api/push", {"name": "qwen3:8b"})):
        assert proxy.call(method, path, body).status == 404, path
    assert proxy.call("DELETE", "/api/delete", {"model": "llama3"}).status == 200
    proxy.post("/api/copy", b'{"source":"llama3","Source":"qwen3:8b","destination":"x"}')
    proxy.post("/api/chat", b'{"name":"llama3","Name":"qwen3:8b","messages":[{"role":"user","content":"x"}]}')
    assert not any(b"qwen" in request.data for request in ollama_target.received)


@cases("pattern, argv, wanted", [
    ("openai/gpt-4o:latest", ["--strip-vendor"], ["gpt-4o:latest"]), ("gpt-4o:latest", ["--keep-vendor"], ["openai/gpt-4o:latest"]),
    ("gpt-4o:proxy", [], ["openai/gpt-4o:latest"]), ("!gpt-4o:latest", ["--keep-vendor"], ["openai/other:latest"]), ("GPT-4*", [], ["openai/gpt-4o:latest"])])
def test_a_filter_line_may_have_any_form(start, target, pattern, argv, wanted):
    Path("models-filter.txt").write_text(pattern)
    target.answers["/v1/models"] = http_answer({"data": [{"id": "openai/gpt-4o"}, {"id": "openai/other"}]})
    assert names_of(start("--target-api", "openai", *argv)) == wanted


def test_nothing_is_left_behind_by_short_streams_and_short_visits(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai", "--max-connections", "100")
    done = []

    def visits():
        for _ in range(30):
            with proxy.dial() as sock:
                for _ in range(3):
                    sock.sendall(http_request("POST", "/api/chat", CHAT))
                    done.append(read_until(sock, b"0\r\n\r\n"))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=visits) for _ in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(before)
    held = []
    for _ in range(1000):               # a place is free a moment after its client has left
        held.append(proxy.dial())
        held[-1].sendall(http_request("GET", "/api/version"))
        if read_until(held[-1], b"\r\n\r\n").startswith(b"HTTP/1.1 503"):
            held.pop().close()
        elif len(held) == 100:
            break
    assert len(done) == 8 * 30 * 3 and len(held) == 100 and proxy.drains()
    [sock.close() for sock in held]


@cases("answer", [b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nxx",
                  b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
                  b"HTTP/1.1 302 X\r\nLocation: http://[bad/\r\nContent-Length: 0\r\n\r\n"])
def test_an_answer_that_breaks_at_once_is_502_on_the_relay(start, target, answer, capfd):
    target.answers["/v1/x"] = cut(answer)
    proxy = start("--target-api", "openai")
    assert proxy.call("GET", "/v1/x").status == 502
    proxy.wait_logged('"GET /v1/x HTTP/1.1" 502')
    assert proxy.drains() and "Traceback" not in capfd.readouterr().err


def test_a_reset_in_the_head_is_no_news(start, target, capfd):
    proxy = start("--target-api", "openai")
    for _ in range(20):
        sock = proxy.dial()
        sock.sendall(b"POST ")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    assert proxy.call("GET", "/api/version").status == 200 and proxy.drains()
    assert "Traceback" not in capfd.readouterr().err


@cases("path", ["/v1/models", "/api/version"])
def test_a_list_that_hangs_keeps_no_chat_waiting_for_long(start, target, path, hurry):
    target.answers[path] = lambda talk: talk.target.go.wait(PATIENCE)
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start()
    for _ in range(3):
        assert proxy.lines("/api/chat", CHAT)[-1]["done"]
    assert len(target.calls(path)) == 1


def test_small_requests_have_no_large_costs(start, ollama_target):
    proxy = start()
    schema = {"$defs": {f"a{level}": {"type": "object", "properties": {f"p{at}": {"$ref": f"#/$defs/a{level + 1}"} for at in range(10)}} for level in range(9)},
              "$ref": "#/$defs/a0"}
    answer = proxy.post("/v1/chat/completions", {**ASK, "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]})
    assert answer.status == 400
    assert json.loads(answer.data)["error"]["message"] == "a tool's schema refers to itself too often"
    assert proxy_module.keep_alive_seconds("1" * 100000 + "x") is None and proxy_module.keep_alive_seconds(10 ** 400) is None
    assert proxy_module.keep_alive_seconds(float("inf")) is None
    with pytest.raises(BadRequest):
        parse_ollama_chat({**GENERATE, "template": "{{if .Prompt}}" * 1000}, "generate")
    bomb = gzip.compress(b'{"x":"' + b"a" * 20_000_000 + b'"}')
    for body, headers, text in ((bomb, {"Content-Encoding": "gzip"}, "the request has a body that expands beyond reason"),
                                (b'{"a":[' + b"0," * 2_100_000 + b"0]}", {}, "more than 2000000 values in one request")):
        answer = proxy.post("/v1/chat/completions", body, headers)
        assert answer.status == 413 and json.loads(answer.data)["error"]["message"] == text


def test_a_compressed_answer_that_explodes_is_an_error(start, target):
    target.answers["/v1/chat/completions"] = http_answer(gzip.compress(b" " * 50_000_000), 200, "application/json", "Content-Encoding: gzip")
    proxy = start("--target-api", "openai")
    for path in ("/api/chat", "/v1/chat/completions"):
        answer = proxy.post(path, CHAT)
        assert answer.status == 502 and b'"upstream sent a body that expands beyond reason"' in answer.data


def test_a_huge_error_keeps_its_status(start, target):
    target.answers["/v1/chat/completions"] = http_answer(b"slow down " * 60000, 429, "text/plain")
    answer = start("--target-api", "openai").post("/api/chat", CHAT)
    assert answer.status == 429 and json.loads(answer.data)["error"].startswith("slow down")


@cases("path", ["/v1/../x", "/v1/%2e%2e/x", "/v1/%252e%252e/x", "/v1/..;/x", "/v1/..%5cx", "/v1/..%00/x", "/v1/a/./b"])
def test_dot_segments_are_refused_however_they_are_written(proxy, target, path):
    assert proxy.raw(http_request("GET", path, b"", "Connection: close")).startswith(b"HTTP/1.1 400")
    assert not target.received


def test_a_closing_tag_in_an_answer_teaches_nothing_wrong(start, target):
    target.answers["/v1/chat/completions"] = [http_stream(sse(delta("The tag "), delta("</think> closes"), STOP)), http_stream(HELLO)]
    proxy = start("--target-api", "openai")
    for wanted in ("The tag </think> closes", "Hello"):
        values = proxy.lines("/api/chat", CHAT)
        assert "".join(value["message"]["content"] for value in values) == wanted and not any("thinking" in value["message"] for value in values)
    target.answers["/v1/chat/completions"] = [http_answer({"choices": [{"message": {"content": "hm</think>ok"}, "finish_reason": "stop"}]}), http_stream(HELLO), http_stream(HELLO)]
    proxy.post("/api/chat", {**CHAT, "stream": False})
    proxy.lines("/api/chat", CHAT)              # learned, and found to be wrong this time
    assert "".join(value["message"]["content"] for value in proxy.lines("/api/chat", CHAT)) == "Hello"


@cases("answer", [http_stream(sse({"error": {"message": "bad key", "code": 401}})), http_answer({"error": {"message": "bad key", "code": 401}}),
                  http_answer({"error": {"message": "bad key"}}, 403)])
def test_trouble_with_our_key_is_never_a_401_wherever_it_is_told(start, target, answer):
    target.answers["/v1/chat/completions"] = target.answers["/v1/embeddings"] = answer
    for proxy in (start("--target-api", "openai"), start("--target-api", "openai", "--forward-auth")):
        for path, body in (("/api/chat", CHAT), ("/api/chat", {**CHAT, "stream": False}), ("/api/embed", {"model": "m", "input": "x"})):
            assert proxy.post(path, body, {"Authorization": "Bearer ollama"}).status == 502


def test_the_access_line_counts_bytes_of_body(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai")
    for path in ("/api/chat", "/v1/chat/completions", "/api/generate"):
        body = proxy.post(path, {**CHAT, "prompt": "x", "stream": True}).data
        assert proxy.wait_logged(path).split()[-2] == str(len(body)), path
    target.answers["/v1/chat/completions"] = http_stream(sse(*[delta("x" * (at % 300)) for at in range(500)], STOP))
    body = proxy.post("/api/chat", {**CHAT, "keep_alive": 1}).data
    proxy.wait_logged(f" 200 {len(body)} ")


def test_calls_of_one_turn_get_ids_of_their_own(start, target):
    same = [{"index": at, "id": "call_1", **part("f", "{}")} for at in (0, 1)]
    out = translated([sse(call_delta(*same), TOOLS_END)])
    ids = [call["id"] for line in out.splitlines() for call in json.loads(line)["message"].get("tool_calls", ())]
    assert len(ids) == len(set(ids)) == 2


def test_set_fits_every_name_of_a_model(start, target):
    target.answers["/v1/models"] = http_answer({"data": [{"id": "openai/gpt-4o"}]})
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai", "--strip-vendor", "--alias", "fast=openai/gpt-4o", "--set", "gpt-4o*:temperature=0.1", "--set", "fast:seed=7")
    proxy.lines("/api/chat", {**CHAT, "model": "gpt-4o:latest"})
    assert target.received[-1].json["temperature"] == 0.1 and "seed" not in target.received[-1].json
    proxy.lines("/api/chat", {**CHAT, "model": "fast"})
    assert target.received[-1].json["seed"] == 7


def test_histories_with_odd_parts_are_accepted():
    messages = rendered(messages=[{"Role": "user", "Content": [{"text": "a"}]}, calling(("", {}, "x")), result("r", tool_call_id="x"),
                                  {"role": "assistant", "content": "b", "images": ["iVBORw0KGgo="]}])["messages"]
    assert messages[0] == {"role": "user", "content": "a"} and messages[-1]["content"][0]["type"] == "image_url"
    valid_history(messages)


def test_a_chat_asks_a_target_that_was_down_again_at_once(start, target, later):
    target.close()
    proxy = start("--target-api", "openai")
    assert proxy.post("/api/chat", CHAT).status == 502
    again = ScriptedTarget(port=target.port)
    again.answers["/v1/chat/completions"] = http_stream(HELLO)
    later(1)
    assert proxy.post("/api/chat", CHAT).status == 200
    again.close()


def test_fallback_context_and_version_can_be_set(start, target):
    assert config("--fallback").fallback == "http://127.0.0.1:11505" and not config().fallback
    proxy = start("--default-context", "5000", "--ollama-version", "9.9.9", "--target-api", "openai")
    assert proxy.get("/api/version") == {"version": "9.9.9"}
    assert 5000 in json.loads(proxy.post("/api/show", {"model": "m"}).data)["model_info"].values()


def test_options_in_odd_places_are_found():
    body = rendered(temperature=0.5, max_output_tokens=7, options={"format": "json", "keep_alive": "5m"})
    assert body["temperature"] == 0.5 and body["max_tokens"] == 7
    assert body["response_format"] == {"type": "json_object"}


def test_some_targets_have_words_of_their_own():
    wire = render_openai_chat(chat_call(keep_alive="5m"), proxy_module.PRESETS["lmstudio"].habits)
    assert wire.body["ttl"] == 300
    assert render_openai_chat(chat_call(), proxy_module.PRESETS["mlx"].habits, 1000).body["max_tokens"] > 900
    assert OPENAI.render_embed(EmbedCall("m", ("x",), 5), proxy_module.PRESETS["mistral"].habits).body["output_dimension"] == 5


@cases("pieces, wanted", [
    (["```json\n", '{"a":', "1}\n", "```"], '{"a":1}'), (["``", "`\n{}", "\n``", "`\n"], "{}"), (['{"a":"```"}'], '{"a":"```"}'),
    (["{}", "\n"], "{}\n"), (["`x`"], "`x`"), (["```json\n{}\n"], "{}"), (["```python"], "```python")])
def test_json_comes_without_a_fence(pieces, wanted):
    for split in (pieces, list("".join(pieces)), ["".join(pieces)]):
        run = proxy_module.Fence()
        events = [event for piece in split for event in run([TextDelta(piece)])] + run([Finish("stop", Usage())])
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == wanted and isinstance(events[-1], Finish)


def test_stop_strings_beyond_the_fourth_are_watched_for(start, target):
    target.answers["/v1/chat/completions"] = [http_answer({"error": {"message": "stop: at most 4 sequences are allowed"}}, 400),
                                              http_stream(sse(delta("one S"), delta("IX two"), STOP)), http_answer({"choices": [{"message": {"content": "one SIX"}}]})]
    proxy = start("--target-api", "openai")
    body = {**CHAT, "options": {"stop": ["A", "B", "C", "D", "SIX"]}}
    values = proxy.lines("/api/chat", body)
    assert "".join(value["message"]["content"] for value in values) == "one " and values[-1]["done_reason"] == "stop"
    assert target.received[-1].json["stop"] == ["A", "B", "C", "D"]
    assert json.loads(proxy.post("/api/chat", {**body, "stream": False}).data)["message"]["content"] == "one "


def test_metadata_that_hangs_keeps_no_list_waiting_for_long(start, target, hurry):
    for path in ("/props", "/api/v1/models", "/api/v0/models", "/model/info"):
        target.answers[path] = lambda talk: talk.target.go.wait(PATIENCE)
    assert names_of(start("--target-api", "openai")) == ["m:latest", "vendor/big:free", "qwen3:8b", "text-embed:latest"]


def test_a_long_history_of_strays_is_repaired():
    turns = [calling(*[("f", {"n": at}, f"c{turn}-{at}") for at in range(500)]) for turn in range(4)]
    turns += [result("r", tool_call_id=f"stray-{at}", tool_name="g") for at in range(2000)]
    valid_history(rendered(messages=turns)["messages"])


@cases("line", [b"Content-Length:44", b"CONTENT-LENGTH: 44", b"Content-Length:  44", b"Content-Length:\t44", b"content-length: 44 "])
def test_a_length_counts_however_it_is_written(start, target, line):
    proxy = start("--target-api", "openai")
    inner = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n"[:44].ljust(44)
    data = proxy.raw(b"POST /api/me HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + line + b"\r\n\r\n" + inner)
    assert data.count(b"HTTP/1.1 ") == 1


def test_a_client_that_resets_after_a_refusal_is_counted_once(start, target):
    proxy = start("--target-api", "openai")
    for _ in range(3):
        with proxy.dial() as sock:
            sock.sendall(http_request("POST", "/nope", b"", "Content-Length: 100000"))
            read_until(sock, b"\r\n\r\n")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    proxy.wait_logged("/nope", 3)
    assert proxy.call("GET", "/health").status == 200 and proxy.wait_logged("/health")
    assert proxy.drains() and sum("/nope" in line for line in proxy.logged) == 3


def test_hostile_requests_take_no_time_that_grows_with_their_square(start, target):
    """Without their bounds each of these takes minutes."""
    chance = random.Random(3)
    turns = tuple(Message("user", "".join(chance.choices("abcdefghij ", k=2000))) for _ in range(3000))
    numbers = context_after(chat_call(face="generate", conversation=(Message("system", "first"),) + turns), "answer")
    *back, _ = parse_ollama_chat({**GENERATE, "context": numbers}, "generate").messages
    assert back[0].content == "first" and back[-1].content == "answer" and 10 < len(back) < 3000
    with pytest.raises(BadRequest):
        parse_ollama_chat({**CHAT, "options": {"stop": ["x" * 150000] * 5}})
    stops = proxy_module.StopStrings(["a" * 255 + "b"] * 64)
    out = [event for _ in range(100) for event in stops([TextDelta("a" * 50)])] + stops([Finish("stop", Usage())])
    assert "".join(event.text for event in out[:-1]) == "a" * 5000
    long = chat_call(messages=(Message("user", "x"),) * 40000)
    assert len(render_openai_chat(long, Habits()).body["messages"]) == 40000
    target.answers["/v1/audio/transcriptions"] = http_answer({"text": "x"})
    Path("models-filter.txt").write_text("m\n")
    proxy = start("--target-api", "openai", "--alias", "other=m")
    answer = proxy.post("/v1/audio/transcriptions", b"name=model\r\n" * 30000, {"Content-Type": "multipart/form-data; boundary=x"})
    assert answer.status in (400, 404)  # no model was named
    assert b"max depth" in proxy.post("/api/show", b'{"a":' + b"[" * 5_000_000).data


@cases("fault, line", [(b"zz\r\n", "chunked coding"), (b"5\r\nhelloXX", "chunked coding")])
def test_a_fault_right_behind_the_first_token_ends_the_stream_at_once(start, target, fault, line):
    def script(talk):
        talk.send(stream_head() + chunk(sse(delta("Hel"), done=False)) + fault)
        talk.wait_closed()

    target.answers["/v1/chat/completions"] = script
    proxy = start("--target-api", "openai")
    values = proxy.lines("/api/chat", CHAT)
    assert values[0]["message"]["content"] == "Hel" and line in values[-1]["error"]
    assert target.peer_closed.wait(PATIENCE)


def test_empty_lines_before_a_request_are_few(start, target):
    proxy = start("--target-api", "openai")
    assert proxy.raw(b"\r\n" * 3 + http_request("GET", "/api/version", b"", "Connection: close")).startswith(b"HTTP/1.1 200")
    assert proxy.raw(b"\r\n" * 30000).startswith(b"HTTP/1.1 400")


def test_frames_before_garbage_in_the_same_read_are_not_lost():
    call = chat_call("chat")
    for shortcut in (True, False):
        translation = Translation(OpenAIDecoder(call), OllamaEncoder(call, StillClock, 1, 2), shortcut=shortcut)
        out = through(translation, [sse(delta("A"), delta("B"), done=False) + b"data: garbage\n\n"])
        values = [json.loads(line) for line in out.splitlines()]
        assert [value["message"]["content"] for value in values[:-1]] == ["A", "B"] and "not JSON" in values[-1]["error"]


def test_a_model_name_of_control_characters_is_only_a_name():
    call = chat_call("chat")._replace(model="a\x01b")
    translation = Translation(OllamaDecoder(call), OpenAIEncoder(call, StillClock, 1, 2))
    lines = [json.dumps({"model": "m", "created_at": "x", "message": {"role": "assistant", "content": word}, "done": False}).encode() + b"\n" for word in "abcd"]
    out = through(translation, lines)
    assert [json.loads(frame[6:])["choices"][0]["delta"]["content"] for frame in out.split(b"\n\n")[1:-2]] == ["b", "c", "d"]


def test_a_timestamp_with_something_behind_it_is_no_timestamp():
    def line(text, junk=b""):
        return b'{"model":"m","created_at":"x"%b,"message":{"role":"assistant","content":"%b"},"done":false}\n' % (junk, text)

    outs = []
    for shortcut in (True, False):
        encoder = OllamaEncoder(chat_call(), StillClock, 1, 2)
        translation = Translation(OllamaDecoder(chat_call()), encoder, shortcut=shortcut)
        outs.append(through(translation, [line(b"a"), line(b"a") * 3 + line(b"b", b"JUNK") + line(b"c")]))
    assert outs[0] == outs[1] and b"not JSON" in outs[0]


def test_a_large_relayed_answer_that_breaks_is_an_error_as_long_as_nothing_was_sent(start, target):
    def script(talk):
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 700000\r\n\r\n" + b"x" * 350000)

    target.answers["/v1/embeddings"] = script
    answer = start("--target-api", "openai").post("/v1/embeddings", {"model": "m", "input": "x"})
    assert answer.status == 502 and b"middle of its answer" in answer.data


# ----------------------------------------------------------------------------
# Messages: what an operator reads when something is wrong
# ----------------------------------------------------------------------------


@cases("argv, text", [
    (["--target", "lm-studio"], "bad target 'lm-studio': no such preset (did you mean lmstudio?)"),
    (["llama.cpp"], "bad target 'llama.cpp': no such preset (did you mean llamacpp?)"),
    (["open-router"], "bad target 'open-router': no such preset (did you mean openrouter?)"),
    (["http:/localhost:1234"], "bad target 'http:/localhost:1234': write http://HOST:PORT"),
    (["here", "--target", "there"], "two targets: here and --target there"),
    (["--timeout", "soon"], "--timeout soon: must be a number"),
    (["--port", "x"], "--port x: must be a whole number"),
    (["--port", "99999"], "--port 99999: must be between 0 and 65535"),
    (["--origins", "chat.example.com"], "--origins chat.example.com: chat.example.com is no origin such as https://chat.example.com"),
    (["--ollama-version", "12"], "--ollama-version 12: X.Y.Z is expected"),
    (["--tls-key", "k.pem"], "--tls-key k.pem: --tls-cert is missing, and TLS needs both"),
    (["--set", "m:temperature=hot"], '--set m:temperature=hot: option "temperature" must be of type float32')])
def test_a_flag_that_cannot_be_used_is_named_with_its_value(argv, text):
    with pytest.raises(UsageError) as caught:
        Config.from_args(argv, {})
    assert str(caught.value) == text


def test_certificates_are_looked_at_before_anything_starts():
    done = run_program("--ca-file", "no-such-file.pem", "--target", "https://127.0.0.1:9")
    assert done.returncode == 2 and done.stderr == "ollama_proxy: --ca-file no-such-file.pem: no such file or directory\n"


def test_what_looks_like_a_mistake_is_a_note():
    Path(".env").write_text("OPENAI_API_KEY=x\n# fine\nthis is junk\n")
    config = Config.from_args(["--set", "m:num_ctxx=5", "--demo", "--target", "vllm"], {"OLLAMA_PROXY_TAGET": "x"})
    assert config.notes == (
        ".env: line 3 is no KEY=VALUE", "OLLAMA_PROXY_TAGET is no setting (did you mean OLLAMA_PROXY_TARGET?)",
        "--set m: num_ctxx is not a known option (did you mean num_ctx?)",
        "--target vllm is not used: --demo has a target of its own")
    assert config.files == (".env",)


@cases("given, url", [
    ("localhost:1234", "http://localhost:1234/v1"), ("http://a:1/v1/models", "http://a:1/v1"),
    ("http://a:1/v1/chat/completions", "http://a:1/v1"), ("http://a:1/api", "http://a:1/v1"),
    ("http://a:1/api/tags", "http://a:1/v1"), ("http://a:1/x/v1/responses/", "http://a:1/x/v1")])
def test_a_target_is_read_as_it_was_pasted(given, url):
    assert Config.from_args([given], {}).destination.url == url


def test_patterns_that_fit_no_model_are_told_once_the_list_is_known(start, target):
    Path("models-filter.txt").write_text("m\nqwen3*\nlama*\n!*-preview\n")      # an exception need not be met
    proxy = start("--target-api", "openai", "--alias", "fast=mm", "--set", "qwem3*:num_ctx=5")
    names_of(proxy)
    proxy.wait_logged("lists no such model", 3)
    names_of(proxy)
    assert sorted(proxy.errors) == [
        "warning: --alias mm: the target lists no such model", "warning: --set qwem3*: the target lists no such model",
        "warning: models filter lama*: the target lists no such model"]


@cases("argv, status, why", [
    ((), 400, "no such thing"), (("--api-key", "sk-target-1"), 401, "refused the key of this proxy (--api-key): no such"),
    ((), 403, "wants a key (none is set: OLLAMA_PROXY_API_KEY or --api-key): no such thing")])
@cases("path", ["/v1/chat/completions", "/v1/messages"])
def test_the_log_says_why_a_relayed_request_was_refused(start, target, path, argv, status, why):
    target.answers[path] = http_answer({"error": {"message": "no such thing"}}, status)
    proxy = start("--target-api", "openai", *argv)
    answer = proxy.post(path, CHAT)
    assert answer.status == status and json.loads(answer.data)["error"]["message"] == "no such thing"
    line = proxy.wait_logged(f"POST {path} HTTP/1.1")
    assert why in line and line.endswith('"')


@cases("argv, source", [((), "none is set: OLLAMA_PROXY_API_KEY or --api-key"), (("--api-key", "sk-target-1"), "--api-key")])
def test_a_list_that_wants_a_key_names_the_flag(start, target, argv, source):
    target.answers["/v1/models"] = http_answer({"error": {"message": "Authentication Error"}}, 401)
    proxy = start("--target-api", "openai", *argv)
    proxy.post("/api/show", {"model": "m"})
    proxy.wait_logged("it is asked again with the next request")
    assert proxy.errors == [f"model list: {target.url}/v1 gave no model list: Authentication Error (key: {source}); it is "
                            "asked again with the next request"]


@cases("path", ["/v1/messages", "/v1/responses", "/v1/chat/completions"])
def test_calls_of_an_answer_that_breaks_off_are_not_for_running(start, ollama_target, path):
    call = {"function": {"name": "rm", "arguments": {"x": 1}}}
    lines = [{"message": {"role": "assistant", "content": "I go."}, "done": False},
             {"message": {"role": "assistant", "content": "", "tool_calls": [call]}, "done": False}]
    ollama_target.answers["/api/chat"] = http_stream(b"".join(json.dumps(line).encode() + b"\n" for line in lines),
                                                     "application/x-ndjson")
    body = {"model": "llama3", "messages": [HI], "input": "hi", "max_tokens": 50, "stream": True}
    data = start("--target-api", "ollama", "--translate", "always").post(path, body).data
    assert b"I go." in data and b"before finishing" in data and b'"rm"' not in data


def test_joined_turns_keep_what_was_thought_in_both(start, ollama_target):
    refusal = http_answer({"error": "Conversation roles must alternate user/assistant/user/..."}, 400)
    ollama_target.answers["/api/chat"] = [refusal, http_answer(NATIVE_WHOLE)]
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a", "reasoning_content": "one"},
            {"role": "assistant", "content": "b", "reasoning_content": "two"}, {"role": "user", "content": "go"}]
    answer = start("--target-api", "ollama").post("/v1/chat/completions", {"model": "llama3", "messages": said})
    assert answer.status == 200
    assert ollama_target.calls("/api/chat")[-1].json["messages"][1] == {
        "role": "assistant", "content": "a\n\nb", "thinking": "one\n\ntwo"}


def test_an_unknown_model_is_answered_with_the_nearest_name(start, target):
    answer = start("--target-api", "openai").post("/api/chat", {**CHAT, "model": "qwen3:8"})
    assert json.loads(answer.data) == {"error": "model 'qwen3:8' not found (did you mean qwen3:8b?)"}


@cases("argv, environ, sentence", [
    (["--api-key", "sk-wrong-key"], {}, "refused the key of this proxy (--api-key)"),
    ([], {}, "wants a key (none is set: OLLAMA_PROXY_API_KEY or --api-key)"),
    ([], {"LITELLM_API_KEY": "sk-litellm"}, "wants a key (none is set: OLLAMA_PROXY_API_KEY or --api-key; LITELLM_API_KEY is read for --target litellm alone)"),
    ([], {"OLLAMA_PROXY_API_KEY": "sk-wrong-key"}, "refused the key of this proxy (OLLAMA_PROXY_API_KEY)")])
@cases("status, text", [(401, "no"), (400, "No connected db.")])         # LiteLLM without a database says the second
def test_a_key_that_is_refused_is_told_with_its_place(start, target, argv, environ, sentence, status, text):
    target.answers["/v1/chat/completions"] = target.answers["/v1/models"] = http_answer({"error": {"message": text}}, status)
    proxy = start("--target-api", "openai", *argv, environ=environ)
    assert json.loads(proxy.post("/api/chat", CHAT).data) == {"error": f"{target.url}/v1 {sentence}: {text}"}
    where = sentence.partition("(")[2]
    assert json.loads(proxy.call("GET", "/api/tags").data) == {"error": f"{target.url}/v1 gave no model list: {text} (key: {where}"}


def test_a_target_that_is_down_is_told_once_with_what_to_do(start):
    proxy = start("--target", "http://127.0.0.1:9", "--target-api", "openai")
    for _ in range(3):
        assert proxy.call("GET", "/api/tags").status == 502
    proxy.wait_logged("model list: ")
    assert proxy.errors == ["model list: cannot reach http://127.0.0.1:9/v1: connection refused; start the server or give another "
                            "--target; it is asked again with the next request"]


def test_a_list_that_does_not_come_is_told(start, target, monkeypatch):
    monkeypatch.setattr(proxy_module, "PROBE_TIMEOUT", 0.1)
    target.answers["/v1/models"] = silent
    answer = start("--target-api", "openai").call("GET", "/api/tags")
    assert answer.status == 502 and json.loads(answer.data) == {"error": "the target's model list is not known yet"}


def test_a_web_page_is_told_from_an_api_and_trouble_with_lists_is_logged_once(start, target):
    target.answers["/v1/models"] = http_answer("<html><title>Login</title></html>", 200, "text/html")
    proxy = start("--target-api", "openai")
    for _ in range(3):
        assert proxy.call("GET", "/api/tags").status == 502
    proxy.wait_logged(f"model list: {target.url}/v1 gave no model list: HTTP 200 (a web page, no API: is the address right?); "
                      "it is asked again with the next request")
    assert sum("model list" in line for line in proxy.errors) == 1


def test_a_target_without_a_list_serves_the_names_that_are_configured(start, target):
    target.answers["/v1/models"] = http_answer({"error": {"message": "no such route"}}, 404)
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    Path("models-filter.txt").write_text("big-model\nother-*\n")
    proxy = start("--target-api", "openai", "--alias", "fast=big-model")
    assert names_of(proxy) == ["big-model:latest", "fast:latest"]
    assert proxy.lines("/api/chat", {**CHAT, "model": "fast"})[-1]["done"]
    assert target.calls("/v1/chat/completions")[-1].json["model"] == "big-model"
    assert proxy.post("/api/chat", {**CHAT, "model": "nope"}).status == 404
    Path("models-filter.txt").unlink()
    assert start("--target-api", "openai", "--alias", "fast=big-model").lines("/api/chat", {**CHAT, "model": "any"})[-1]["done"]


def test_two_proxies_that_point_at_each_other_end_after_one_turn(start, target):
    first = start("--target-api", "openai")
    second = start("--target", f"http://127.0.0.1:{first.port}", "--target-api", "openai")
    first.context.target = first.context.target._replace(port=second.port)
    answer = first.post("/v1/chat/completions", CHAT)
    assert answer.status == 508
    assert json.loads(answer.data)["error"]["message"] == \
        "this request came back to the proxy that sent it: its target leads to itself"
    first.wait_logged("a request came back to this proxy: its target leads to itself")


def test_the_wrong_scheme_is_told_in_words(start, target, tls_target):
    demo = DemoServer()
    url = demo.url.replace("http://", "https://")
    assert json.loads(start("--target", url, "--target-api", "openai").post("/api/chat", CHAT).data) == {
        "error": f"cannot reach {url}/v1: no TLS is spoken there: write http:// instead of https://"}
    target.answers["/v1/chat/completions"] = b"\x15\x03\x03\x00\x02\x02\x46\r\n\r\n"      # a TLS alert
    assert json.loads(start("--target-api", "openai").post("/api/chat", CHAT).data) == {
        "error": "upstream does not speak HTTP/1.x: TLS is spoken there, write https:// instead of http://"}
    proxy = start("--target", f"http://127.0.0.1:{tls_target.port}", "--target-api", "openai")
    assert proxy.post("/api/chat", CHAT).status == 502
    demo.shutdown()


@cases("body, media_type", [
    (b"<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head></html>", "text/html"),
    (b"Client sent an HTTP request to an HTTPS server.\n", "text/plain")])
def test_plain_http_on_a_port_for_tls_is_told_in_words(start, target, body, media_type):
    target.answers["/v1/models"] = target.answers["/v1/chat/completions"] = http_answer(body, 400, media_type)
    proxy = start("--target-api", "openai")
    sentence = re.search("[^<>]*HTTPS[^<>]*", body.decode())[0].strip() + ": write https:// instead of http://"
    assert json.loads(proxy.call("GET", "/api/tags").data) == {"error": f"{target.url}/v1 gave no model list: {sentence}"}
    assert json.loads(proxy.post("/api/chat", CHAT).data) == {"error": sentence}


@cases("argv", [[], ["--target-api", "openai"]])
def test_a_port_that_never_answers_the_tls_handshake_is_told_in_words(start, argv):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        answer = start("--target", url, "--connect-timeout", "0.3", *argv).call("GET", "/api/tags")
    assert json.loads(answer.data) == {"error": f"cannot reach {url}/v1: no TLS handshake came: "
                                                "if none is spoken there, write http:// instead of https://"}


@cases("status, title, told", [
    (502, "502 Bad Gateway", "502 Bad Gateway"), (504, "504 Gateway Time-out", "504 Gateway Time-out"),
    (404, "404 Not Found", "404 Not Found (a web page, no API: is the address right?)")])
def test_a_page_of_a_gateway_is_told_from_a_wrong_address(start, target, status, title, told):
    page = f"<html><head><title>{title}</title></head><body>nginx</body></html>"
    target.answers["/v1/models"] = http_answer(page, status, "text/html; charset=utf-8")
    answer = start("--target-api", "openai").call("GET", "/api/tags")
    assert json.loads(answer.data) == {"error": f"{target.url}/v1 gave no model list: {told}"}


def test_an_alias_of_what_stands_in_no_list_is_listed_unless_hidden(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    proxy = start("--target-api", "openai", "--alias", "gpt=DEPLOYMENT", "--alias", "claude-*=DEPLOYMENT")
    assert "gpt:latest" in names_of(proxy) and not {"DEPLOYMENT:latest", "claude-*"} & set(names_of(proxy))
    assert proxy.lines("/api/chat", {**CHAT, "model": "gpt:latest"})[-1]["done"]
    assert target.calls("/v1/chat/completions")[-1].json["model"] == "DEPLOYMENT"
    Path("models-filter.txt").write_text("m\n")
    assert names_of(start("--target-api", "openai", "--alias", "gpt=DEPLOYMENT")) == ["m:latest"]
    Path("models-filter.txt").write_text("gpt\n")
    assert names_of(start("--target-api", "openai", "--alias", "gpt=DEPLOYMENT")) == ["gpt:latest"]


def test_an_alias_finds_its_model_by_every_name_that_clients_may_use(start, target):
    target.answers["/v1/models"] = http_answer({"data": [{"id": "m", "context_length": 5}, {"id": "vendor/BIG"}]})
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    flags = itertools.chain(*(("--alias", f"{name}={meant}") for name, meant in (
        ("chain", "shown"), ("shown", "m:latest"), ("case", "M"), ("short", "big"), ("loop", "pool"), ("pool", "loop"))))
    proxy = start("--target-api", "openai", *flags)
    assert {"chain:latest", "shown:latest", "case:latest", "short:latest"} <= set(names_of(proxy))
    for name, wanted in ("chain", "m"), ("shown", "m"), ("case", "m"), ("short:latest", "vendor/BIG"), ("loop", "pool"):
        assert proxy.lines("/api/chat", {**CHAT, "model": name})[-1]["done"]
        assert target.calls("/v1/chat/completions")[-1].json["model"] == wanted
    assert {model["details"].get("context_length") for model in proxy.get("/api/tags")["models"] if model["name"] == "chain:latest"} == {5}
    Path("models-filter.txt").write_text("fast\n")
    proxy = start("--target-api", "openai", "--alias", "fast=big", "--set", "fast:seed=7")
    assert names_of(proxy) == ["vendor/BIG:latest", "fast:latest"]
    assert proxy.lines("/api/chat", {**CHAT, "model": "fast"})[-1]["done"]
    assert target.calls("/v1/chat/completions")[-1].json["model"] == "vendor/BIG"
    assert "fast: the target lists no such model" not in "".join(proxy.errors)      # an alias may stand in both


def test_the_banner_shows_an_ollama_without_v1(ollama_target):
    process = launch("--target", ollama_target.url)
    assert f"target        {ollama_target.url} (an Ollama), " in process.banner
    process.terminate()
    process.communicate()


def test_reasoning_can_be_set_for_one_model(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"choices": [{"message": {"content": "a", "reasoning_content": "t"}, "finish_reason": "stop"}]})
    proxy = start("--target-api", "openai", "--set", "m:reasoning=drop")
    for model, thinks in (("m", False), ("qwen3:8b", True)):
        answer = json.loads(proxy.post("/api/chat", {**CHAT, "model": model, "stream": False}).data)
        assert ("thinking" in answer["message"]) == thinks


def test_nothing_is_loaded_where_nobody_answers(start, target):
    proxy = start("--target", "http://127.0.0.1:9", "--target-api", "openai")
    for path, body in (("/api/generate", {"model": "m"}), ("/api/chat", {"model": "m", "messages": []})):
        answer = proxy.post(path, body)
        assert answer.status == 502 and json.loads(answer.data) == {"error": "cannot reach http://127.0.0.1:9/v1: connection refused"}


def test_a_name_that_is_passed_on_unlisted_is_told_once(start, target):
    target.answers["/v1/chat/completions"] = http_answer(WHOLE)
    proxy = start("--target-api", "openai")
    for _ in range(2):
        assert proxy.post("/v1/chat/completions", {**CHAT, "model": "nosuch"}).status == 200
    proxy.wait_logged("model nosuch: the target lists no such model; the name is passed on as it is")
    assert sum("nosuch" in line for line in proxy.errors) == 1


def test_json_that_curl_calls_a_form_is_sent_as_json(start, target):
    target.answers["/v1/chat/completions"] = http_answer(WHOLE)
    start("--target-api", "openai").call("POST", "/v1/chat/completions", json.dumps(CHAT), {"Content-Type": "application/x-www-form-urlencoded"})
    assert target.calls("/v1/chat/completions")[-1].headers["content-type"] == "application/json"


def test_a_refusal_that_comes_again_without_think_ends_the_request(start, ollama_target):
    refused = {"error": '"glm-5:cloud" does not support thinking'}
    ollama_target.answers["/api/chat"] = http_answer(refused, 400)
    answer = start("--target-api", "ollama").post("/api/chat", {**CHAT, "model": "glm-5:cloud"})
    assert answer.status == 400 and json.loads(answer.data) == refused
    assert ["think" in call.json for call in ollama_target.calls("/api/chat")] == [True, False]


def test_a_range_that_is_none_is_the_servers_error(start, target):
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": "temperature out of range [0..., 2]"}}, 400)
    answer = start("--target-api", "openai").post("/api/chat", {**CHAT, "options": {"temperature": 3}})
    assert answer.status == 400 and json.loads(answer.data) == {"error": "temperature out of range [0..., 2]"}


def test_it_runs_as_a_module_which_python_keeps_compiled():
    done = subprocess.run([sys.executable, "-m", "ollama_proxy", "--version"], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == f"ollama_proxy {proxy_module.__version__}\n" and not done.stderr


@cases("answer, told", [
    (http_answer("<html><title>Hi</title></html>", 200, "text/html"), "no model for chats"), (http_answer({"data": []}), "no model for chats"),
    (http_answer({"models": [{"x": 1}]}), "no model for chats")])
def test_check_survives_an_ollama_that_is_none(target, answer, told):
    target.answers["/api/tags"] = answer
    done = run_program("--check", "--target-api", "ollama", target.url)
    assert done.returncode == 1 and not done.stderr and done.stdout.endswith(
        f"FAILED      {told} (it is taken for an Ollama: --target-api, OLLAMA_BASE_URL)\n")


def test_a_deep_schema_that_refers_to_itself_is_refused(start, ollama_target):
    deep = {"$ref": "#/properties/a"}
    for _ in range(80):
        deep = {"type": "object", "properties": {"a": deep}}
    answer = start("--target-api", "ollama").post("/v1/chat/completions", {**CHAT, "tools": [
        {"type": "function", "function": {"name": "f", "parameters": deep}}]})
    assert answer.status == 400 and json.loads(answer.data)["error"]["message"] == "a tool's schema refers to itself too often"


def test_an_option_that_ollama_does_not_know_may_be_of_any_type(start, target):
    target.answers["/v1/chat/completions"] = http_stream(HELLO)
    assert start("--target-api", "openai").lines("/api/chat", {**CHAT, "options": {"max_tokens": "100", "x": []}})[-1]["done"]


def test_a_fallback_that_leads_back_ends_after_one_turn(start, target):
    proxy = start("--target-api", "openai", "--fallback", "http://127.0.0.1:9")
    proxy.context.fallback = proxy.context.fallback._replace(port=proxy.port)
    answer = proxy.post("/api/create", {"model": "x", "from": "m"})
    assert answer.status == 508 and json.loads(answer.data) == {
        "error": "this request came back to the proxy that sent it: its target leads to itself"}


def test_a_socks_proxy_is_said_to_be_unsupported(start, monkeypatch):
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1080")
    answer = start("--target", "https://inference.example/v1", "--target-api", "openai").post("/api/chat", CHAT)
    assert json.loads(answer.data)["error"] == "HTTPS_PROXY cannot be used: socks5 proxies are not supported, only http ones"


def test_the_banner_names_what_was_read_and_hidden(tmp_path):
    demo = DemoServer()
    Path("models-filter.txt").write_text("demo-chat\n")
    Path(".env").write_text("this is junk\n")
    process = launch("--target", demo.url, source=[str(HERE / "ollama_proxy.py")])
    assert process.banner + process.stdout.readline() == banner(
        f"http://127.0.0.1:{process.port}", f"{demo.url}/v1 (OpenAI API), 1 model: demo-chat:latest (1 hidden by the filter)",
        ".env, models-filter.txt")
    assert ends_well(process) == "warning: .env: line 1 is no KEY=VALUE\n"
    demo.shutdown()


@pytest.mark.skipif(os.name != "posix", reason="without fork it is so anyway") if pytest else lambda f: f
def test_without_fork_there_is_one_process_and_a_banner_for_an_ollama(ollama_target):
    ollama_target.answers["/api/tags"] = http_answer({"models": [{"name": f"m{at}:1b"} for at in range(5)]})
    run = f"import os, runpy; del os.fork; runpy.run_path({str(HERE / 'ollama_proxy.py')!r}, run_name='__main__')"
    process = launch("--target", ollama_target.url, "--workers", "2", source=["-c", run])
    assert process.banner == banner(f"http://127.0.0.1:{process.port}",
                                    f"{ollama_target.url} (an Ollama), 5 models: m0:1b, m1:1b, m2:1b, m3:1b, ...")
    assert ends_well(process) == "ollama_proxy: --workers needs a POSIX system; running one process\n"


def test_the_line_to_try_names_the_key_of_this_door():
    process = launch("--demo", "--client-key", "door-key")
    url = f"http://127.0.0.1:{process.port}"
    assert process.stdout.readline() == \
        f"  try it        curl {url}/api/chat -H 'Authorization: Bearer door-key' -d '{DEMO_ASKED}'\n"
    ends_well(process)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX") if pytest else lambda f: f
def test_who_stops_a_proxy_in_mid_stream_is_told_what_it_waits_for(target):
    target.answers["/v1/chat/completions"] = silent_mid_stream
    process = launch("--target", target.url, "--target-api", "openai", "--grace", "1000")
    with socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE) as sock:
        sock.sendall(http_request("POST", "/api/chat", CHAT))
        read_until(sock, b"Hel")
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "finishing 1 request; again to cut them\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "cut 1 request\n" and process.wait(PATIENCE) == 0


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX") if pytest else lambda f: f
def test_a_signal_at_the_worst_moment_ends_the_program_as_any_other():
    at_worst = f"""
import runpy, signal, threading
release, armed = threading.Condition.__exit__, []

def release_after_a_signal(self, *error):
    if armed and threading.get_ident() == threading.main_thread().ident:
        signal.raise_signal(signal.SIGINT)
    return release(self, *error)

threading.Condition.__exit__ = release_after_a_signal
signal.signal(signal.SIGUSR1, lambda *_: armed.append(1))
runpy.run_path({str(HERE / "ollama_proxy.py")!r}, run_name="__main__")
"""
    process = launch("--demo", source=["-c", at_worst])
    for number in (signal.SIGUSR1, signal.SIGINT):
        process.send_signal(number)
    assert process.wait(PATIENCE) == 0 and process.stderr.read() == ""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX") if pytest else lambda f: f
def test_who_stops_a_check_sees_no_traceback(target):
    target.answers["/v1/models"] = silent
    command = [sys.executable, str(HERE / "ollama_proxy.py"), "--check", target.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=unset()) as process:
        assert target.go.wait(PATIENCE)
        process.send_signal(signal.SIGINT)
        assert (process.wait(PATIENCE), process.stderr.read()) == (1, "")


def test_check_speaks_plainly_to_its_own_proxy_and_shows_the_notes(certificate):
    Path(".env").write_text("OLLAMA_PROXY_TARGETS=x\n")
    done = run_program("--check", "--demo", "--tls-cert", certificate.ca, "--tls-key", certificate.key)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith(
        "note        OLLAMA_PROXY_TARGETS is no setting (did you mean OLLAMA_PROXY_TARGET?)\nnote        .env was read\n"
        "target      http://127.0.0.1:")


def test_check_survives_a_stream_that_breaks_and_counts_that_are_missing(ollama_target):
    def breaks(talk):
        if talk.request.json.get("stream", True):
            talk.send(stream_head("application/x-ndjson") + chunk(b'{"message": {"role": "assistant", "content": "Hel"}, "done": false}\n'))
            shut(talk.sock)
        talk.send(http_answer({"message": {"role": "assistant", "content": "Hello"}, "done": True}))

    ollama_target.answers["/api/chat"] = breaks
    done = run_program("--check", "--target-api", "ollama", ollama_target.url)
    assert done.returncode == 1 and done.stderr == ""
    assert "chat        works (1 piece, tokens not told)\nstream      FAILED: the answer broke off\n" in done.stdout


def test_a_console_that_knows_few_letters_loses_no_line(target):
    target.answers["/v1/models"] = http_answer({"data": [{"id": "\u6a21\u578b"}]})
    done = run_program("--check", target.url, PYTHONIOENCODING="cp1252")
    assert "models      1: \\u6a21\\u578b:latest\n" in done.stdout and done.stderr == ""


def test_check_tells_which_clients_are_ready(target):
    demo = DemoServer()
    lines = run_program("--check", demo.url).stdout.splitlines()
    for line in ("model       demo-chat:latest (the first; --models-filter chooses): context 65536, completion, tools",
                 "tools       works (1 piece, 1 token, calls get_time)", "embeddings  works (8 numbers from demo-embed:latest)",
                 "vision      works (1 piece, 7 tokens)", "thinking    no: no thinking came", "VS Code Copilot        ready",
                 "Claude Code            ready"):
        assert line in lines
    demo.shutdown()
    target.answers["/v1/chat/completions"] = picky({"tools": "tools are not supported by this model"})
    done = run_program("--check", target.url)
    assert done.returncode == 0 and done.stdout == f"""\
target      {target.url}/v1 without a key
speaks      OpenAI API
models      4: m:latest, vendor/big:free, qwen3:8b, text-embed:latest
model       m:latest (the first; --models-filter chooses): context not told, completion, tools
chat        works (1 piece, 2 tokens)
stream      works (2 pieces, 2 tokens)
tools       no: tools are not supported by this model
schema      no: the answer is no JSON object
thinking    no: no thinking came
vision      works (1 piece, 2 tokens)
suffix      no: not here
embeddings  no: not here
VS Code Copilot        not ready: tools: tools are not supported by this model
JetBrains AI Assistant ready
Open WebUI             ready
Home Assistant         not ready: tools: tools are not supported by this model
ollama CLI             ready
Claude Code            not ready: tools: tools are not supported by this model
Codex                  not ready: tools: tools are not supported by this model
verdict     3 of 7 kinds of client are ready
"""
    target.answers["/v1/chat/completions"] = http_answer({"error": {"message": "out of order"}}, 400)
    done = run_program("--check", target.url)
    assert done.returncode == 1 and done.stdout.splitlines()[4:7] == [
        "chat        FAILED: out of order", "stream      FAILED: out of order", "tools       no: out of order"]
    assert "Open WebUI             not ready: chat, stream: out of order" in done.stdout.splitlines()
    target.answers["/v1/models"] = http_answer({"data": [{"id": "small", "max_model_len": 2048}]})
    done = run_program("--check", target.url)
    assert "Codex                  not ready: stream, tools: out of order; context: 2048 tokens, and agents need 32000 or more\n" in done.stdout
    assert done.stdout.endswith("verdict     0 of 7 kinds of client are ready\n")


def test_check_of_an_ollama_without_a_model_for_chats(ollama_target):
    models = [{"name": f"e{at}:1b", "capabilities": ["embedding"]} for at in range(9)]
    ollama_target.answers["/api/tags"] = http_answer({"models": models})
    done = run_program("--check", "--target-api", "ollama", ollama_target.url)
    assert done.returncode == 1 and done.stdout == (
        f"target      {ollama_target.url} without a key\nspeaks      Ollama API\n"
        f"models      9: {', '.join(f'e{at}:1b' for at in range(8))}, ...\nFAILED      no model for chats "
        "(it is taken for an Ollama: --target-api, OLLAMA_BASE_URL)\n")


def test_help_is_short_grouped_and_names_the_program(capsys):
    with pytest.raises(SystemExit):
        Config.from_args(["--help"], {})
    text = capsys.readouterr().out
    assert text.startswith("usage: ") and "[options] [TARGET]" in text.splitlines()[0] and len(text.splitlines()) < 100
    headings = re.findall(r"^(\w[^\n]*):\n", text, re.M)
    assert [one for one in headings if one in proxy_module.GROUPS.values()] == list(proxy_module.GROUPS.values())


def test_debug_lines_have_a_time_and_the_number_of_the_request(start, target):
    target.answers["/v1/chat/completions"] = http_answer(WHOLE)
    proxy = start("--debug", "--target-api", "openai")
    proxy.post("/api/chat", {**CHAT, "stream": False})
    line = proxy.wait_logged("[PROXY] POST /v1/chat/completions: the target answers 200")
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3} #\d+ \[PROXY\] ", line)
    number = line.split()[1]
    assert all(number in one for one in proxy.logged if "Request: {" in one or "Ollama response" in one)


def hang_up(talk):
    """Ends the connection with a reset."""
    talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    talk.sock.close()


def packed_as(coding, data):
    return http_answer(data, 200, "application/json", f"Content-Encoding: {coding}")


OK_HEAD, IN_THE_MIDDLE = b"HTTP/1.1 200 OK\r\n", "closed the connection in the middle of its answer"
WRONG_ANSWERS = [   # what a target sends, what is told of it; {} is the target
    (cut(stream_head(), b"zz\r\n"),
     "upstream sent a malformed chunked coding: chunk longer than its size, malformed size or trailer"),
    (cut(OK_HEAD + b"Content-Length: 5000\r\n\r\n{"), f"upstream {IN_THE_MIDDLE}"), (cut(b"H"), "{} " + IN_THE_MIDDLE),
    (cut(b""), "{} closed the connection without an answer"),
    (hang_up, "{} closed the connection without an answer (connection reset by peer)"),
    (cut(b"SSH-2.0-x\r\n\r\n"), "upstream does not speak HTTP/1.x: SSH-2.0-x"),
    (cut(OK_HEAD + b"X: " + b"a" * 70000 + b"\r\n\r\n"), "{} sent headers of more than 65536 bytes"),
    (cut(OK_HEAD + b"no colon\r\n\r\n"), "upstream sent a malformed header: no colon"),
    (cut(OK_HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"), "upstream sent two different content lengths"),
    (cut(OK_HEAD + b"Content-Length: +2\r\n\r\n"), "upstream sent a bad Content-Length: +2"),
    (packed_as("br", b"xx"), "upstream sent a body that is compressed as br, which is not understood here"),
    (packed_as("gzip", gzip.compress(b"{}")[:-9]), "upstream sent a body that ends in the middle of its compression"),
    (packed_as("gzip", b"{}"), "upstream sent a body that is broken inside its compression"),
    (http_answer({"x": 1}), "upstream sent an answer without choices"),
    (http_answer(b"5"), "upstream sent a JSON number where an answer was expected"),
    (http_answer({"error": {"code": 5}}), "upstream reported an error without a text"),
    (http_stream(b"data: x\n" * 1001), "upstream sent an event of more than 1000 lines"),
    (http_answer(b"", 500), "upstream returned HTTP 500")]


@cases("answer, text", WRONG_ANSWERS, ids=[row[1] for row in WRONG_ANSWERS])
def test_what_is_wrong_with_an_answer_is_told_to_the_client_and_in_the_log(start, target, answer, text):
    target.answers["/v1/chat/completions"] = answer
    proxy = start("--target-api", "openai")
    text = text.format(f"{target.url}/v1")
    assert json.loads(proxy.post("/api/chat", {**CHAT, "stream": False}).data) == {"error": text}
    assert proxy.wait_logged("ACCESS: ").endswith(f' "{text}"')


@cases("limit, stream, text", [("MAX_LINE_BYTES", True, "upstream sent a line of more than 100 bytes"),
                               ("MAX_ANSWER_BYTES", False, "upstream sent an answer of more than 100 bytes")])
def test_an_answer_beyond_a_limit_is_told_with_the_limit(start, target, monkeypatch, limit, stream, text):
    monkeypatch.setattr(proxy_module, limit, 100)
    monkeypatch.setattr(proxy_module.Reply.read, "__defaults__", (100, False))
    target.answers["/v1/chat/completions"] = http_stream(b"data: " + b"a" * 200) if stream else http_answer(b"a" * 200)
    proxy = start("--target-api", "openai")
    assert json.loads(proxy.post("/api/chat", {**CHAT, "stream": stream}).data) == {"error": text}


def test_a_stream_that_breaks_is_told_in_the_log_as_well(start, target):
    def reset(talk):
        talk.send(stream_head() + chunk(sse(delta("Hel"), done=False)))
        talk.target.go.wait(PATIENCE)
        hang_up(talk)

    target.answers["/v1/chat/completions"] = reset
    proxy, text = start("--target-api", "openai"), "upstream broke the connection: connection reset by peer"
    with proxy.dial() as sock:
        sock.sendall(http_request("POST", "/api/chat", CHAT, "Connection: close"))
        read_until(sock, b"Hel")
        target.go.set()
        assert json.dumps({"error": text}, separators=(",", ":")).encode() in read_all(sock)
    proxy.wait_logged("ACCESS: ")
    assert proxy.errors == [f"stream of POST /api/chat broke: {text}"]


@cases("frame, status", [({"error": {"message": "no", "code": "429"}}, 429), ({"error": {"message": "no", "code": "\u00b2"}}, 502),
                          ({"error": {"message": "no", "code": "4" * 5000}}, 502)])
def test_the_status_in_an_error_frame_is_a_number(start, target, frame, status):
    target.answers["/v1/chat/completions"] = http_stream(sse(frame, done=False))
    answer = start("--target-api", "openai").post("/api/chat", CHAT)
    assert answer.status == status and json.loads(answer.data) == {"error": "no"}


def test_a_duration_without_measure_is_measured_here(start, target):
    target.answers["/v1/chat/completions"] = http_stream(sse(delta("hi"), {**STOP, "timings": {"prompt_n": 1, "prompt_ms": 10 ** 400}}))
    last = start("--target-api", "openai").lines("/api/chat", CHAT)[-1]
    assert last["done"] and 0 < last["prompt_eval_duration"] < 10 ** 18


@cases("path, body, answer, text", [
    ("/v1/messages", {"max_tokens": 5, "stream": False}, {"x": 1}, "upstream sent an answer without a message"),
    ("/v1/chat/completions", {"stream": True}, b"hello\n", "upstream sent a line that is not JSON: hello")])
def test_what_is_wrong_with_an_ollamas_answer_is_told(start, ollama_target, path, body, answer, text):
    ollama_target.answers["/api/chat"] = http_answer(answer)
    answer = start("--target-api", "ollama", "--translate", "always").post(path, {**CHAT, **body})
    assert answer.status == 502 and json.loads(answer.data)["error"]["message"] == text


@cases("answer, text", [(b"hello", "upstream sent embeddings that are not JSON: hello"),
                        (b'{"data": [{"embedding": [1%b, 1]}]}' % (b"0" * 400), "upstream sent an embedding that is not a list of numbers"),
                        (b'{"data": [{"embedding": ["x"]}]}', "upstream sent an embedding that is not a list of numbers")])
def test_what_is_wrong_with_embeddings_is_told(proxy, target, answer, text):
    target.answers["/v1/embeddings"] = http_answer(answer)
    answer = proxy.post("/api/embed", {"model": "text-embed", "input": "a"})
    assert answer.status == 502 and json.loads(answer.data) == {"error": text}


@cases("path, body, text", [
    ("chat/completions", {**CHAT, "n": 2}, "n greater than 1 is not supported: Ollama gives one choice per request"),
    ("chat/completions", {**CHAT, "messages": []}, "[] is too short - 'messages'"),
    ("chat/completions", {**CHAT, "model": ""}, "model is required"),
    ("completions", {"model": "m", "prompt": ["a", "b"]},
     "prompt must be one string: Ollama takes neither lists nor token ids"),
    ("embeddings", {"model": "m", "input": []}, "invalid input: a string or a list of strings is expected"),
    ("embeddings", {"input": "x"}, "model is required"),
    ("embeddings", {"model": "m", "input": "x", "encoding_format": "x"},
     "invalid encoding_format: float or base64 is expected")])
def test_what_an_ollama_cannot_be_asked_is_told(start, ollama_target, path, body, text):
    answer = start("--target-api", "ollama").post(f"/v1/{path}", body)
    assert answer.status == 400 and json.loads(answer.data)["error"]["message"] == text


A_FORM = "multipart/form-data; boundary=XyZ"


@cases("body, media_type, status, text", [
    (a_form(FILE), A_FORM, 404, "a form must name its model once"),
    (a_form(("model", b"m"), ("model", b"m")), A_FORM, 400, "a form must name its model once"),
    (b"hello", "text/plain", 415, "the body is not one JSON object: it cannot be looked into for the filter"),
    (b'{"model": ["m"]}', "application/json", 400, "model must be a string")])
def test_what_a_filter_cannot_look_into_is_told(start, body, media_type, status, text):
    Path("models-filter.txt").write_text("m\n")
    answer = start("--target-api", "openai").post("/v1/x", body, {"Content-Type": media_type})
    assert answer.status == status and json.loads(answer.data)["error"]["message"] == text


def test_a_list_that_an_ollama_does_not_give_is_told(start, ollama_target):
    Path("models-filter.txt").write_text("llama3\n")
    ollama_target.answers["/api/tags"] = http_answer({"error": "no"}, 500)
    answer = start("--target-api", "ollama").call("GET", "/api/tags")
    assert answer.status == 502 and json.loads(answer.data) == {
        "error": f"{ollama_target.url} gave no model list (HTTP 500)"}


def test_a_bug_in_reading_a_list_is_told(start, monkeypatch, capfd):
    monkeypatch.setattr(proxy_module, "read_models", lambda payload: 1 / 0)
    answer = start("--target-api", "openai").call("GET", "/api/tags")
    assert answer.status == 502 and json.loads(answer.data) == {"error": "the model list could not be read"}
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_target_that_takes_no_connection_and_one_that_takes_no_request(start):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"127.0.0.1:{deaf.getsockname()[1]}/v1"
        argv = ("--timeout", "0.1", "--connect-timeout", "0.1", "--target-api", "openai")
        for scheme, text in (("https", "cannot reach https://{}: no TLS handshake came: if none is spoken there, write http:// instead of https://"),
                             ("http", "http://{} did not take the request for 0.1 s")):
            answer = start("--target", f"{scheme}://{url}", *argv).post(
                "/v1/files", b"x" * 12_000_000, {"Content-Type": "application/octet-stream"})
            assert answer.status == 504 and json.loads(answer.data)["error"]["message"] == text.format(url)


# ----------------------------------------------------------------------------
# --bench: processor time of the proxy per unit of work, with nothing but Python
# ----------------------------------------------------------------------------


def cpu_seconds(pid):
    """User and system time a process has used: from /proc where there is one, else from ps."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        text = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        minutes, _, seconds = text.rpartition(":")
        return float(seconds) + 60 * sum(int(part) * 60 ** at for at, part in enumerate(reversed(minutes.replace("-", ":").split(":"))) if part)


BENCH_TOKENS = 2000


def bench_script(pace):
    """A target that streams BENCH_TOKENS tokens at once, or 100 of them one each `pace` seconds."""
    words = [" the", " quick", " brown", " fox", ",", "\n", " jumps", " over"]
    frames = [chunk(sse({"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", **delta(word)}, done=False)) for word in words]
    last = chunk(sse(STOP)) + b"0\r\n\r\n"
    blast = stream_head() + b"".join(frames * (BENCH_TOKENS // len(words))) + last

    def script(talk):
        if not pace:
            talk.send(blast)
        else:
            talk.send(stream_head())
            for at in range(100):
                talk.send(frames[at % len(frames)])
                time.sleep(pace)
            talk.send(last)
        talk.released = True
    return script


def bench_client(port, request, count, ending):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        for _ in range(count):
            sock.sendall(request)
            data = b""
            while not data.endswith(ending):
                data = (data + sock.recv(1 << 20))[-64:]


PIPE = """
import socket, sys, threading
def copy(source, sink):
    try:
        while True:
            data = source.recv(65536)
            if not data:
                break
            sink.sendall(data)
    except OSError:
        pass
    sink.close()
listener = socket.create_server(("127.0.0.1", 0), backlog=512)
print(f"listening on  http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
while True:
    client = listener.accept()[0]
    server = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    for ends in ((client, server), (server, client)):
        for end in ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=copy, args=ends, daemon=True).start()
"""


def bench_cost(process, port, request, clients, count, ending):
    """(seconds of processor time, rounds): rounds of `clients` connections with `count` requests each, until the cost
    is half a second, which the clock of a process tells well enough."""
    bench_client(port, request, 1, ending)
    before, begun, rounds = cpu_seconds(process.pid), time.monotonic(), 0
    while cpu_seconds(process.pid) - before < 0.5 and time.monotonic() - begun < 20:
        arguments = (port, request, count, ending)
        threads = [threading.Thread(target=bench_client, args=arguments) for _ in range(clients)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        rounds += 1
    return cpu_seconds(process.pid) - before, rounds


def bench():
    """Prints microseconds of processor time per unit, and the ratio to a pipe of a few lines of Python that passes the
    same answers on as bytes, measured in the same run."""
    target = ScriptedTarget()
    target.answers["/v1/embeddings"] = http_answer({"data": [{"index": at, "embedding": [0.123456] * 768} for at in range(16)]})
    process = launch("--target", target.url, "--target-api", "openai")
    threading.Thread(target=process.stdout.read, daemon=True).start()
    pipe = subprocess.Popen([sys.executable, "-c", PIPE, str(target.port)], stdout=subprocess.PIPE, text=True)
    pipe_port = int(pipe.stdout.readline().rpartition(":")[2])
    ask = {path: http_request("POST", path, {**CHAT, "stream": True}) for path in ("/api/chat", "/v1/chat/completions")}
    relay, whole = ask["/v1/chat/completions"], http_request("POST", "/api/chat", {**CHAT, "stream": False})
    plain = http_request("POST", "/v1/chat/completions", {**CHAT, "stream": False})
    embed = http_request("POST", "/api/embed", {"model": "text-embed", "input": ["x"] * 16})
    vectors = http_request("POST", "/v1/embeddings", {"model": "text-embed", "input": ["x"] * 16})
    tags, models = http_request("GET", "/api/tags"), http_request("GET", "/v1/models")
    stream, paced, end = bench_script(0), bench_script(0.02), b"0\r\n\r\n"
    rows = [("saturated stream, translated", ask["/api/chat"], relay, stream, 1, 10, BENCH_TOKENS, "token", end, end),
            ("saturated stream, relayed", relay, relay, stream, 1, 10, BENCH_TOKENS, "token", end, end),
            ("paced streams, 32 at once", ask["/api/chat"], relay, paced, 32, 1, 100, "token", end, end),
            ("non-stream chat", whole, plain, http_answer(WHOLE), 1, 100, 1, "request", b"}", b"}"),
            ("tags from memory", tags, models, None, 1, 300, 1, "request", b"}]}", b"}"),
            ("embeddings, 16 of 768", embed, vectors, None, 1, 10, 1, "request", b"}", b"}")]
    print(f"{'':32}{'µs of processor':>16}{'per':>9}{'pipe':>8}{'ratio':>8}")
    for name, request, same, answer, clients, count, units, unit, ending, same_ending in rows:
        if answer is not None:
            target.answers["/v1/chat/completions"] = answer
        costs = [cost / (rounds * clients * count * units) * 1e6 for cost, rounds in (
            bench_cost(process, process.port, request, clients, count, ending),
            bench_cost(pipe, pipe_port, same, clients, count, same_ending))]
        print(f"{name:32}{costs[0]:>16.2f}{unit:>9}{costs[1]:>8.2f}{costs[0] / costs[1]:>8.1f}")
    for one in (process, pipe):
        one.terminate()
        one.wait()
    target.close()
    return 0


def test_bench_prints_one_row_for_each_kind_of_work(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "bench_cost", lambda *asked: (0.016, 1))
    assert bench() == 0
    assert capsys.readouterr().out == """\
                                 \u00b5s of processor      per    pipe   ratio
saturated stream, translated                0.80    token    0.80     1.0
saturated stream, relayed                   0.80    token    0.80     1.0
paced streams, 32 at once                   5.00    token    5.00     1.0
non-stream chat                           160.00  request  160.00     1.0
tags from memory                           53.33  request   53.33     1.0
embeddings, 16 of 768                    1600.00  request 1600.00     1.0
"""


if __name__ == "__main__":
    sys.exit(bench() if "--bench" in sys.argv else pytest.main(["-q", __file__]))
