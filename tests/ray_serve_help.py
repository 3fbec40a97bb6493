"""For the tests of the Ray Serve example: an HTTP client, and pipelines to be served."""

import http.client
import io
import json
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pipelines
from PIL import Image


class Answer(NamedTuple):
    """What came back over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(port: int, method: str, path: str, body: Any = None) -> http.client.HTTPConnection:
    """A request under way on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, {"Content-Type": "application/json"})
    return connection


def call(port: int, method: str, path: str, body: Any = None) -> Answer:
    """A request and its answer."""
    connection = send(port, method, path, body)
    try:
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def pixels(png: bytes) -> np.ndarray:
    """(height, width, 3), in steps of 1 of 255."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def until(condition: Any, seconds: float = 60) -> Any:
    """What a condition comes to, once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return found


def other_model() -> Any:
    """A pipeline that the demo's plans are not for."""
    return pipelines.flux()[0]


class Halting:
    """Stands for a painter: what it draws waits until it may go on, and fails where a prompt says so."""

    def __init__(self, steps: int = 8) -> None:
        self.plan, self.handle, self.steps = None, None, steps
        self.go_on, self.drawn, self.closed = threading.Event(), [], False
        self.began = threading.Event()
        self.pipe = type("Pipe", (), {"device": "cpu"})()

    def draw(
        self, prompts: list[str], seeds: list[int], wanted: Callable[[], bool], **settings: Any
    ) -> tuple[list[bytes], dict[str, str]]:
        from ray_serve import Abandoned  # the folder of examples is on the path of who uses this

        self.wanted = wanted
        self.began.set()
        assert self.go_on.wait(20)
        if not wanted():
            raise Abandoned
        self.drawn.append((tuple(prompts), settings))
        if "bad" in prompts:
            raise ValueError("a word that is not known")
        if "broken" in prompts or ("large" in prompts and len(prompts) > 1):
            raise RuntimeError("out of memory")
        return [f"{prompt} {seed}".encode() for prompt, seed in zip(prompts, seeds, strict=True)], {"X-Cache": "off"}

    def close(self) -> None:
        self.closed = True
