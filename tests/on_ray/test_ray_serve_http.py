"""The HTTP of the Ray Serve example, without Ray: in place of the replicas' queue a stand-in that draws nothing."""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from ray_serve_help import call, send, until

pytest.importorskip("ray.serve")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import ray_serve
from ray.serve.exceptions import BackPressureError

READ, TIMEOUT, BODY, CONNECTIONS = 0.4, 0.6, 2000, 40
GOOD = {"prompt": "taxi", "seed": 7}


class Queue:
    """Stands for the handle of the replicas: answers at once, never, or not at all, as the prompt says."""

    def __init__(self):
        self.draw, self.asked, self.cancelled = self, [], []

    def remote(self, prompt, seed, settings):
        self.asked.append((prompt, seed, settings))
        return Drawn(self, prompt)


class Drawn:
    """Stands for a response of Serve's."""

    def __init__(self, queue, prompt):
        self.queue, self.prompt = queue, prompt

    def cancel(self):
        self.queue.cancelled.append(self.prompt)

    def __await__(self):
        if self.prompt == "full":
            raise BackPressureError(num_queued_requests=2, max_queued_requests=1)
        if self.prompt == "never":
            yield from asyncio.sleep(60).__await__()
        numbers = {"replica": "r", "at": 0.0, "batch_sizes": {}, "cache": {}}
        return {"png": b"picture", "headers": {"X-Cache": "off"}, "numbers": numbers}


class Serving:
    """A server in a thread."""

    def __init__(self):
        self.queue, self.errors = Queue(), []
        options = ray_serve.Options(
            read_time=READ, timeout=TIMEOUT, max_body=BODY, max_steps=50, max_guidance=20, connections=CONNECTIONS
        )
        self.server = ray_serve.http_server(options, self.queue)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        until(lambda: self.server.started, 10)

    def _run(self):
        async def serve():
            asyncio.get_running_loop().set_exception_handler(lambda _, context: self.errors.append(context))
            await self.server.serve(sockets=[self.socket])

        asyncio.run(serve())

    def end(self):
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture(scope="module")
def serving():
    here = Serving()
    yield here
    here.end()
    assert not here.thread.is_alive()
    assert here.errors == []  # no task failed unseen


def raw(port, sent):
    """A connection on which something was sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(sent)
    return connection


def answer_to(port, body, head=b""):
    """Status, and body of the answer, to a body as it is."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + head
    with raw(port, head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body) as connection:
        return read(connection)


def read(connection):
    got = b""
    while part := connection.recv(65536):
        got += part
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def seconds_until_cut(connection):
    begin = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(1000) == b""
    return time.monotonic() - begin


def test_a_request(serving):
    """Only what was asked for is passed on; a connection is for one request."""
    answer = call(serving.port, "POST", "/generate", {**GOOD, "guidance_scale": 20, "num_inference_steps": 50})
    assert (answer.status, answer.body, answer.headers["x-cache"]) == (200, b"picture", "off")
    assert answer.headers["connection"] == "close"
    assert serving.queue.asked[-1] == ("taxi", 7, {"guidance_scale": 20.0, "num_inference_steps": 50})
    assert call(serving.port, "POST", "/generate", GOOD).status == 200
    assert serving.queue.asked[-1] == ("taxi", 7, {})
    assert call(serving.port, "GET", "/-/healthz").status == 200


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ('"seed": NaN', "seed"),
        ('"seed": Infinity', "seed"),
        ('"seed": 1e999', "seed"),
        ('"seed": 9223372036854775808', "seed"),
        ('"seed": -1', "seed"),
        ('"seed": 1.5', "seed"),
        ('"prompt": "\\ud800"', "prompt"),
        ('"prompt": ""', "prompt"),
        ('"guidance_scale": 1e308', "guidance_scale"),
        ('"guidance_scale": 20.1', "guidance_scale"),
        ('"guidance_scale": NaN', "guidance_scale"),
        ('"guidance_scale": -Infinity', "guidance_scale"),
        ('"num_inference_steps": 51', "num_inference_steps"),
        ('"num_inference_steps": 0', "num_inference_steps"),
        ('"height": 100000', "height"),
        ('"caf\\u00e9": 1', "caf\\xe9"),
    ],
)
def test_fields_out_of_bounds(serving, changed, where):
    """Refused with the field's name and what it should be, and nothing of what it held."""
    before = len(serving.queue.asked)
    status, body = answer_to(serving.port, f'{{"prompt": "taxi", "seed": 7, {changed}}}'.encode())
    (told,) = json.loads(body)["detail"]
    assert (status, told["loc"], set(told)) == (422, ["body", where], {"loc", "msg"})
    assert len(serving.queue.asked) == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"NaN",
        b"[" * 1900,
        b'{"a":' * 380,
        b'{"prompt": "taxi", "seed": 1, "\\ud800": 1}',
        b'{"prompt": "taxi", "seed": ' + b"9" * 1900 + b"}",
        b'{"prompt": "taxi", "seed": 1, "' + b"a" * 1900 + b'": 1}',
        json.dumps({f"n{number}": 0 for number in range(150)}).encode(),
    ],
)
def test_bodies_that_are_none(serving, body):
    """Refused in few words."""
    status, told = answer_to(serving.port, body)
    assert status in (400, 422)
    assert len(told) < 1000
    assert b"aaa" * 100 not in told


def test_a_body_that_is_too_long(serving):
    """413 as soon as its length is known; its end is not waited for."""
    assert answer_to(serving.port, b" " * (BODY + 1))[0] == 413
    assert answer_to(serving.port, b'{"prompt": "taxi", "seed": 7}'.ljust(BODY))[0] == 200
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with raw(serving.port, head + b"Content-Length: 200000000\r\n\r\n{") as announced:
        assert read(announced)[0] == 413
    with raw(
        serving.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"a" * 1024 + b"\r\n"
    ) as endless:
        endless.sendall(b"400\r\n" + b"a" * 1024 + b"\r\n")
        assert read(endless)[0] == 413


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"POST /gen",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    ],
)
def test_half_a_request(serving, half):
    """Cut when its time is over, however it goes on; meanwhile others are served."""
    with contextlib.ExitStack() as held:
        halves = [held.enter_context(raw(serving.port, half)) for _ in range(20)]
        begin = time.monotonic()
        assert call(serving.port, "POST", "/generate", GOOD).status == 200
        while time.monotonic() < begin + READ / 2:
            time.sleep(0.05)
            if half:
                halves[0].sendall(b"a")
        waited = [seconds_until_cut(each) for each in halves]
        assert sum(waited) + READ / 2 < 3 * READ
    until(lambda: not serving.server.server_state.connections, 5)


def test_a_request_that_takes_too_long(serving):
    """A whole request that waits is not cut by the time for reading, but at the end of its own."""
    begin = time.monotonic()
    answer = call(serving.port, "POST", "/generate", {**GOOD, "prompt": "never"})
    assert (answer.status, answer.json) == (504, {"detail": "not drawn within 0.6 s"})
    assert TIMEOUT <= time.monotonic() - begin < TIMEOUT + 1
    assert TIMEOUT > READ
    until(lambda: "never" in serving.queue.cancelled, 5)


def test_a_client_that_hangs_up(serving):
    """The replicas' queue is told at once."""
    before = len(serving.queue.cancelled)
    gone = send(serving.port, "POST", "/generate", {**GOOD, "prompt": "never"})
    until(lambda: serving.queue.asked[-1][0] == "never", 5)
    begin = time.monotonic()
    gone.close()
    until(lambda: len(serving.queue.cancelled) == before + 1, 5)
    assert time.monotonic() - begin < TIMEOUT / 2


def test_a_full_queue(serving):
    """503, and when to try again."""
    answer = call(serving.port, "POST", "/generate", {**GOOD, "prompt": "full"})
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


def test_too_many_connections(serving):
    """503 without looking at the request, until those that are half open have been cut."""
    with contextlib.ExitStack() as held:
        for _ in range(CONNECTIONS):
            held.enter_context(raw(serving.port, b"POST /"))
        assert call(serving.port, "POST", "/generate", GOOD).status == 503
        until(lambda: call(serving.port, "POST", "/generate", GOOD).status == 200, READ + 3)
