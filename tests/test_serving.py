"""The server as its clients see it: one process, a tiny model, the `openai` client and raw HTTP."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from tiny_chat import save_tiny_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_tiered_cache import UnsupportedInputError, trace
from hf_tiered_cache.serving import mistakes
from hf_tiered_cache.serving.admission import Limits
from hf_tiered_cache.serving.server import Server, Settings, _refuse_shared_positions

from chat_model import FIRST_BYTE, NUM_IDS

CHUNK = 64
END = 1  # the token that ends an answer
MAX_QUEUED = 3
MAX_RUNNING = 2
BODY_LIMIT = 100_000


class Served:
    """A server in a thread of this process, and ways to talk to it."""

    def __init__(self, settings: Settings) -> None:
        self.server = Server(settings)
        self.model = settings.model
        config = uvicorn.Config(self.server.app, port=0, log_level="error", lifespan="off")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]

    def client(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60
        )

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            method, path, body, {"content-type": "application/json", **(headers or {})}
        )
        answer = connection.getresponse()
        got = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        connection.close()
        return got

    def metric(self, name: str) -> float:
        text = self.send("GET", "/metrics")[2].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def idle(self) -> None:
        """Return when no request is left, neither at the doors nor at the model."""
        for _ in range(1000):
            if not self.server.requests._all and not self.server.thread._running:
                return
            time.sleep(0.01)
        raise AssertionError("a request never left")

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)
        self.server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model"))


def settings_for(folder: Path, disk: Path, **given) -> Settings:
    cache = {
        "device_bytes": "2MiB",
        "disk_bytes": "32MiB",
        "disk_dir": disk,
        "block_tokens": 16,
        **given.pop("cache", {}),
    }
    known = {
        "device": "cpu",
        "chunk": CHUNK,
        "max_num_seqs": MAX_RUNNING,
        "max_num_queued_reqs": MAX_QUEUED,
        "limits": Limits(queue_timeout=30, request_timeout=60, max_body_bytes=BODY_LIMIT),
    }
    return Settings(model=str(folder), cache=cache, **{**known, **given})


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    served = Served(settings_for(folder, tmp_path_factory.mktemp("disk")))
    yield served
    served.close()


def letters_only() -> dict[str, float]:
    """A logit bias for letters only: what is said comes back as the same tokens."""
    letters = range(FIRST_BYTE + ord("a"), FIRST_BYTE + ord("z") + 1)
    return {str(it): -100.0 for it in range(NUM_IDS) if it not in letters}


def chat(served: Served, messages: list[dict], tokens: int = 12, key: str = "any", **more):
    return served.client(key).chat.completions.create(
        model=served.model,
        messages=messages,
        max_tokens=tokens,
        temperature=0,
        logit_bias=letters_only(),
        **more,
    )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def expected(served: Served, messages: list[dict], tokens: int = 12) -> str:
    """What `generate` alone says, with a cache of transformers' own."""
    tokenizer = AutoTokenizer.from_pretrained(served.model)
    model = AutoModelForCausalLM.from_pretrained(served.model)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    bias = {(int(k),): v for k, v in letters_only().items()}
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, sequence_bias=bias)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_six_turns_feed_only_what_is_new_and_say_what_generate_says(served):
    messages: list[dict] = []
    last_total = 0
    for turn in range(6):
        messages.append(user(f"turn {turn}: tell me about é, 漢 and the rest of the world"))
        computed = 'htc_prompt_tokens_total{source="computed"}'
        before = served.metric(computed)
        if turn % 2:
            parts = list(chat(served, messages, stream=True))
            text = "".join(part.choices[0].delta.content or "" for part in parts)
            usage = parts[-1].usage
        else:
            answer = chat(served, messages)
            text, usage = answer.choices[0].message.content, answer.usage
        assert text == expected(served, messages)
        fed = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
        assert served.metric(computed) - before == fed
        if turn:
            # All that was said so far, but for the last token of the answer, which nobody fed.
            assert usage.prompt_tokens_details.cached_tokens == last_total - 1
        last_total = usage.total_tokens
        messages.append({"role": "assistant", "content": text})
    served.idle()


def test_a_branch_of_a_chat_leaves_the_chat_parked(served):
    start = [user("we both begin like this, and it takes a while until we part ways")]
    first = chat(served, start)
    other = chat(served, [user(start[0]["content"] + ": here")])
    assert other.usage.prompt_tokens_details.cached_tokens > 60
    again = [*start, {"role": "assistant", "content": first.choices[0].message.content}, user("go")]
    got = chat(served, again)
    assert got.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1
    assert got.choices[0].message.content == expected(served, again)


def test_all_three_endpoints_say_what_was_cached(served):
    client, model = served.client(), served.model
    text = "a prompt for the two other endpoints"
    for is_cached in (False, True):
        usage = client.completions.create(model=model, prompt=text, max_tokens=2).usage
        assert (usage.prompt_tokens_details.cached_tokens == len(text) - 1) == is_cached
    parts = list(client.completions.create(model=model, prompt=text, max_tokens=2, stream=True))
    assert parts[-1].usage.prompt_tokens_details.cached_tokens == len(text) - 1
    for _ in range(2):
        usage = client.responses.create(
            model=model, input=text, max_output_tokens=2, stream=False
        ).usage
    assert usage.input_tokens_details.cached_tokens == usage.input_tokens - 1
    *_, last = client.responses.create(model=model, input=text, max_output_tokens=2, stream=True)
    assert last.response.usage.input_tokens_details.cached_tokens == usage.input_tokens - 1


def test_a_character_split_over_tokens_arrives_whole(served):
    tokenizer = AutoTokenizer.from_pretrained(served.model)
    first, second, third = tokenizer("漢").input_ids
    bias = [[[first], 50.0], [[first, second], 100.0], [[first, second, third], 150.0]]
    config = {"max_new_tokens": 9, "do_sample": False, "sequence_bias": bias}
    parts = served.client().chat.completions.create(
        model=served.model,
        messages=[user("say it")],
        stream=True,
        extra_body={"generation_config": json.dumps(config)},
    )
    said = [text for part in parts if (text := part.choices[0].delta.content)]
    assert said == ["漢", "漢", "漢"]


def test_a_seed_is_the_requests_own(served):
    def sample(seed: int, text: str) -> str:
        return (
            served.client()
            .chat.completions.create(
                model=served.model,
                messages=[user(text)],
                max_tokens=20,
                seed=seed,
                temperature=2,
                extra_body={
                    "generation_config": json.dumps({"do_sample": True, "max_new_tokens": 20})
                },
            )
            .choices[0]
            .message.content
        )

    alone = sample(7, "one")
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(sample, 8, "another one beside it")
        together = sample(7, "one")
    assert together == alone != beside.result()
    assert sample(9, "one") != alone


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 422, "JSON"),
        (b"[]", 422, "dict"),
        (b'{"model": "another", "messages": []}', 400, "pinned"),
        (b'{"messages": [], "frobnicate": 1}', 422, "frobnicate"),
    ],
    ids=["bad JSON", "no object", "wrong model", "unknown field"],
)
def test_a_mistake_is_answered_as_one(served, body, status, said):
    got, _, text = served.send("POST", "/v1/chat/completions", body)
    assert (got, said in text.decode()) == (status, True), text
    served.idle()


@pytest.mark.parametrize(
    "knobs", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2}]
)
def test_a_way_of_decoding_that_would_feed_the_prompt_twice_is_refused(served, knobs):
    config = json.dumps({"max_new_tokens": 4, "do_sample": "num_return" in str(knobs), **knobs})
    with pytest.raises(openai.BadRequestError, match="expected one sequence"):
        chat(served, [user("beams")], extra_body={"generation_config": config})


def test_knobs_of_the_cache_are_the_servers(served):
    config = {"max_new_tokens": 12, "do_sample": False, "use_cache": False, "prefill_chunk_size": 7}
    messages = [user("the server has a cache, whatever a client thinks")]
    answer = chat(served, messages, extra_body={"generation_config": json.dumps(config)})
    assert answer.choices[0].message.content == expected(served, messages)


def test_a_prompt_longer_than_the_model_is_a_mistake_too(served):
    with pytest.raises(openai.BadRequestError, match="made for 4096"):
        chat(served, [user("x" * 5000)])


def test_a_huge_body_is_refused_whether_it_says_so_or_not(served):
    huge = json.dumps({"messages": [user("x" * BODY_LIMIT)]}).encode()
    status, _, text = served.send("POST", "/v1/chat/completions", huge)
    assert (status, b"max-body-bytes" in text) == (413, True)
    chunks = iter([b"x" * 1000] * 200)  # chunked: without a length
    status, _, text = served.send("POST", "/v1/chat/completions", chunks)
    assert (status, b"max-body-bytes" in text) == (413, True)
    served.idle()


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/load_model"), ("POST", "/reset"), ("POST", "/v1/systemone"), ("GET", "/nowhere")],
)
def test_what_could_unload_the_model_is_not_there(served, method, path):
    status, _, text = served.send(method, path, b"{}")
    assert (status, json.loads(text)["error"]["type"]) == (404, "not_found")


def test_the_model_that_is_served_is_listed(served):
    assert [it.id for it in served.client().models.list()] == [served.model]


def raw_request(served: Served, body: dict, receive_buffer: int | None = None) -> socket.socket:
    text = json.dumps(body).encode()
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", served.port))
    connection.settimeout(60)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(text)}\r\n\r\n"
    )
    connection.sendall(head.encode() + text)
    return connection


def long_request(tokens: int = 3000, stream: bool = True, prompt: str = "long") -> dict:
    config = {"max_new_tokens": tokens, "do_sample": False, "suppress_tokens": [END]}
    return {
        "messages": [user(prompt)],
        "stream": stream,
        "generation_config": json.dumps(config),
    }


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_a_client_that_goes_ends_its_request_wherever_it_is(served, stream, when):
    busy = [raw_request(served, long_request()) for _ in range(MAX_RUNNING * (when == "queued"))]
    prompt = "y" * 3000 if when == "prefill" else "z"
    gone = raw_request(served, long_request(1000, stream, prompt))
    count = MAX_RUNNING + 1 if when == "queued" else 1
    while len(served.server.requests._all) < count:
        time.sleep(0.005)
    (request,) = list(served.server.requests._all.values())[-1:]
    while when != "queued" and request.started is None:
        time.sleep(0.001)
    while when == "decode" and request.first_token is None:
        time.sleep(0.005)
    gone.close()
    for connection in busy:
        connection.close()
    served.idle()
    assert request.failure.kind == "client_closed_request"
    assert (request.first_token is None) == (when != "decode")
    assert (request.started is None) == (when == "queued")


def test_a_slow_reader_holds_nobody_up(served):
    slow = raw_request(served, long_request(1500), receive_buffer=2048)
    assert slow.recv(10)
    began = time.perf_counter()
    assert chat(served, [user("quick")]).usage.completion_tokens == 12
    assert time.perf_counter() - began < 20
    slow.close()
    served.idle()


def test_a_burst_beyond_the_caps_is_refused_at_once_and_the_rest_is_served(served):
    body = json.dumps(long_request(40, stream=False)).encode()

    def one(_: int) -> tuple[int, float, dict[str, str]]:
        began = time.perf_counter()
        status, headers, _ = served.send("POST", "/v1/chat/completions", body)
        return status, time.perf_counter() - began, headers

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, range(12)))
        codes = [status for status, _, _ in answers]
    assert codes.count(200) >= MAX_RUNNING + MAX_QUEUED
    refused = [it for it in answers if it[0] == 503]
    assert len(refused) == 12 - codes.count(200) > 0
    assert all(seconds < 2 and int(headers["retry-after"]) >= 1 for _, seconds, headers in refused)
    served.idle()


def test_health_and_readiness_answer_while_the_server_is_full(served):
    assert served.send("GET", "/ready")[0] == 200
    busy = [raw_request(served, long_request()) for _ in range(MAX_RUNNING + MAX_QUEUED)]
    while len(served.server.requests._all) < MAX_RUNNING + MAX_QUEUED:
        time.sleep(0.005)
    assert served.send("GET", "/health")[0] == 200
    assert served.send("GET", "/ready")[0] == 503
    with pytest.raises(openai.InternalServerError, match="max-num-queued-reqs"):
        chat(served, [user("too late")])
    assert served.metric('htc_requests{state="queued"}') >= MAX_QUEUED
    for connection in busy:
        connection.close()
    served.idle()
    assert served.send("GET", "/ready")[0] == 200


def test_short_requests_are_served_between_the_chunks_of_a_long_prompt(served):
    """Counted in forwards, not in seconds: a short request waits for a chunk or two of a prompt of
    many, however fast the machine is."""
    long = raw_request(served, long_request(1, stream=False, prompt="w" * 3500))
    while served.server.requests.num_running < 1:
        time.sleep(0.001)
    (request,) = served.server.requests._all.values()
    short = chat(served, [user("short")], tokens=1)
    assert short.usage.completion_tokens == 1
    assert request.first_token is None  # the long one is still being read
    assert b" 200 " in long.recv(100)
    long.close()
    served.idle()


@pytest.fixture
def strict(folder, tmp_path):
    limits = Limits(queue_timeout=0.3, request_timeout=1.2, max_body_bytes=BODY_LIMIT)
    settings = settings_for(folder, tmp_path, limits=limits, max_num_seqs=1, keys=("one", "two"))
    served = Served(settings)
    yield served
    served.close()


def test_deadlines_keys_and_tenants(strict):
    with pytest.raises(openai.AuthenticationError):
        chat(strict, [user("hello")], key="three")
    assert strict.send("GET", "/metrics")[0] == 401
    assert strict.send("GET", "/health")[0] == 200

    text = "a secret that nobody else may find in the cache by its timing"
    assert chat(strict, [user(text)], key="one").usage.prompt_tokens_details.cached_tokens == 0
    assert chat(strict, [user(text)], key="two").usage.prompt_tokens_details.cached_tokens == 0
    assert chat(strict, [user(text)], key="one").usage.prompt_tokens_details.cached_tokens > 60

    # Streaming, tokens were sent: the deadline is an event.
    key = {"authorization": "Bearer one"}
    with ThreadPoolExecutor(3) as pool:
        bodies = [json.dumps(long_request(stream=it)).encode() for it in (True, False, True)]
        sent = []
        for body in bodies:
            sent.append(pool.submit(strict.send, "POST", "/v1/chat/completions", body, key))
            time.sleep(0.1)
        streamed, queued, queued_stream = [it.result() for it in sent]
    assert streamed[0] == 200
    last = streamed[2].decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "request_timeout"
    for status, headers, text in (queued, queued_stream):
        assert (status, json.loads(text)["error"]["type"]) == (504, "queue_timeout")
        assert int(headers["retry-after"]) >= 1
    # Nothing was sent: it is a status.
    body = json.dumps(long_request(stream=False)).encode()
    status, _, text = strict.send("POST", "/v1/chat/completions", body, key)
    assert (status, json.loads(text)["error"]["type"]) == (504, "request_timeout")
    strict.idle()


def test_memory_for_one_serves_many_by_waiting_and_nothing_parked_is_in_the_way(folder, tmp_path):
    """Two layers of blocks of 16 tokens, 4 KiB each: room for about 800 tokens."""
    cache = {"device_bytes": 100 * 4096, "disk_bytes": 0}
    served = Served(settings_for(folder, tmp_path, max_num_seqs=3, cache=cache))
    try:
        prompts = [[user(letter * 500)] for letter in "abc"]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda it: chat(served, it, tokens=40), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.choices[0].message.content == expected(served, prompt, 40)
        assert served.metric("htc_preempted_total") > 0
        with pytest.raises(openai.BadRequestError, match="does not fit"):
            chat(served, [user("d" * 1000)])
        assert chat(served, prompts[0], tokens=4).usage.completion_tokens == 4
    finally:
        served.close()
    assert served.server.conversations.root.is_closed


def test_a_restart_reads_on_where_the_chat_was_and_a_damaged_block_is_computed_again(
    folder, tmp_path
):
    """In the store are full blocks of 16 tokens."""
    settings = settings_for(folder, tmp_path, store=tmp_path / "store", keys=("one", "two"))
    messages = [user("a chat that goes on when the server was ended and started again")]
    first = Served(settings)
    answer = chat(first, messages, key="one")
    first.close()
    messages += [{"role": "assistant", "content": answer.choices[0].message.content}, user("on")]

    second = Served(settings)
    usage = chat(second, messages, key="two").usage
    assert usage.prompt_tokens_details.cached_tokens == 0  # another tenant's secret
    again = chat(second, messages, key="one")
    told = answer.usage.total_tokens - 1
    assert again.usage.prompt_tokens_details.cached_tokens == told // 16 * 16
    assert again.choices[0].message.content == expected(second, messages)
    second.close()

    for path in (tmp_path / "store").rglob("*"):
        if path.is_file() and path.stat().st_size > 8192:
            data = bytearray(path.read_bytes())
            data[6000] ^= 255
            path.write_bytes(data)
    third = Served(settings)
    assert chat(third, messages, key="one").choices[0].message.content == expected(third, messages)
    assert third.server.conversations.root.store.counters["quarantined"] > 0
    third.close()


def test_metrics_tell_how_much_of_the_machine_was_used(served):
    before = served.metric("htc_model_flops_total")
    client = served.client()
    usage = client.completions.create(model=served.model, prompt="0123456789", max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens == 0
    config = served.server.model.config
    weights = sum(it.numel() for it in served.server.model.parameters())
    weights -= config.vocab_size * config.hidden_size  # a look-up
    pairs = 10 * 11 / 2
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    assert served.metric("htc_model_flops_total") - before == 2 * weights * 10 + attention
    assert served.metric("htc_peak_flops") > 1e6
    assert served.metric('htc_tier_bytes{tier="device"}') > 0


def test_a_trace_shows_the_way_of_a_request(served):
    with trace() as recorded:
        chat(served, [user("traced")], tokens=3)
    names = [
        it.name for it in recorded.spans if it.name in ("lookup", "prefill chunk", "decode step")
    ]
    assert names == ["lookup", "prefill chunk", "decode step", "decode step", "decode step"]


def test_gradients_stay_off_and_the_model_as_it_was(served):
    model = served.server.model
    assert "forward_in_turn" not in vars(model) and type(model).__name__ == "LlamaForCausalLM"
    assert torch.is_grad_enabled()
    assert served.server.thread.submit(torch.is_grad_enabled).result(10) is False


def test_one_command_serves_and_ctrl_c_ends_it(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = ["--device-bytes=2MiB", "--disk-bytes=4MiB", f"--disk-dir={tmp_path}", "--device=cpu"]
    command = ["-m", "hf_tiered_cache", "serve", str(folder), f"--port={port}", *sizes]
    running = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in running.stdout:
            if "Uvicorn running" in line:
                break
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any")
        answer = client.chat.completions.create(
            model=str(folder), messages=[user("hello")], max_tokens=3
        )
        assert answer.usage.completion_tokens == 3
        running.send_signal(signal.SIGINT)
        rest = running.communicate(timeout=60)[0]
    finally:
        running.kill()
    assert "Traceback" not in rest, rest


def test_a_model_that_keeps_positions_between_requests_is_refused_by_name():
    model = torch.nn.Module()
    model.language_model = torch.nn.Linear(1, 1)
    _refuse_shared_positions(model)
    model.language_model.rope_deltas = None
    with pytest.raises(UnsupportedInputError, match=r"language_model \(Linear\) keeps rope_deltas"):
        _refuse_shared_positions(model)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": "abc"}, "seed is 'abc'"),
        ({"seed": 2**70}, "seed is 1180"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -5}, "max_tokens is -5"),
        ({"logit_bias": {"9999999": 1.0}}, "logit_bias is '9999999'"),
        ({"logit_bias": {"x": 1}}, "logit_bias is 'x'"),
        ({"stop": [1]}, r"stop is \[1\]"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"messages": []}, r"messages is \[\]"),
        ({"messages": None}, "messages is None"),
        ({"messages": [{"content": "whose?"}]}, "messages cannot be read"),
        ({"temperature": 1, "generation_config": '{"do_sample": true, "top_p": 5}'}, "top_p is 5"),
        ({"generation_config": "{"}, "the options of sampling"),
        ({"generation_config": '{"max_new_tokens": "3"}'}, "the options of sampling"),
        ({"generation_config": '{"guidance_scale": 2.0}'}, "guidance_scale is 2.0"),
        ({"generation_config": '{"token_healing": true}'}, "token_healing is True"),
        ({"generation_config": '{"return_dict_in_generate": true}'}, "return_dict_in_generate is"),
    ],
    ids=str,
)
def test_a_wrong_value_is_the_clients_mistake_and_named(served, fields, said):
    path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
    rest = {} if "prompt" in fields else {"messages": [user("hello")]}
    status, _, text = served.send("POST", path, json.dumps({**rest, **fields}).encode())
    assert status == 400, text
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error" and re.search(said, error["message"]), error


def test_a_whole_answer_is_counted_as_one(served):
    answered = 'htc_requests_ended_total{outcome="answered"}'
    before = served.metric(answered)
    chat(served, [user("count me")], tokens=2)
    list(chat(served, [user("count me")], tokens=2, stream=True))
    served.idle()
    assert served.metric(answered) == before + 2


def test_an_error_of_the_server_has_the_form_of_openai_too(served, monkeypatch):
    monkeypatch.setattr(mistakes, "check_seed", lambda _: 1 / 0)
    body = json.dumps({"messages": [user("hello")]}).encode()
    status, _, text = served.send("POST", "/v1/chat/completions", body)
    assert (status, json.loads(text)["error"]["type"]) == (500, "server_error")
    served.idle()
