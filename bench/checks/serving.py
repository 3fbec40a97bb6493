"""Does the serving example hold under clients that mean ill? ``python -m bench.checks.serving --seconds 60``.

Starts ``examples/ray_serve.py`` on a free port of this machine and measures how long healthy requests take: of one
client and of fifty at once, each alone and beside hostile ones. These are 300 connections that send half a head or half
a body, then a byte a second, and come again when they are cut; clients that send what no request may hold (200 MB, an
endless body, NaN, half a surrogate, a guidance of 1e308, a thousand steps, nesting without end); and clients that ask
for the most steps and hang up. The memory of the service is looked at all the while.

Needs the extras ``ray`` and ``test``. ``--out`` writes ``serving.json`` and ``serving.md`` there; ``--example`` takes
another file with the same options. Exit codes: 0 all is as it should be; 1 a healthy request was not served or took
more than twice its time alone, a hostile one got another answer than it should, memory grew by more than 200 MB, or a
process was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import psutil

from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "ray_serve.py"
HEAD = "POST /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
HALVES = (HEAD[:40].encode(), f"{HEAD}X-Slow: ".encode(), f'{HEAD}Content-Length: 1000\r\n\r\n{{"prompt": "'.encode())
HALF_OPEN, CLIENTS = 300, 50
LONG = 200_000_000  # bytes
CUT = 0  # for a status: the connection was cut, or the client waited in vain
SLOWER, GROWTH = 2.0, 200.0  # times; MB
PATIENCE = 120.0  # seconds that a healthy client waits


class Answer(NamedTuple):
    """What a client got."""

    status: int
    size: int
    seconds: float


@dataclass
class Phase:
    """What came of one kind of load."""

    name: str
    seconds: list[float] = field(default_factory=list)
    not_served: Counter[int] = field(default_factory=Counter)
    amiss: list[str] = field(default_factory=list)
    hostile: int = 0
    cut: int = 0
    front_mb: float = 0.0
    all_mb: float = 0.0

    def row(self) -> dict[str, Any]:
        """Its figures."""
        figures = {name: value for name, value in vars(self).items() if name != "seconds"}
        late = quantiles(self.seconds, n=20)[-1] if len(self.seconds) > 1 else float("nan")
        middle = median(self.seconds) if self.seconds else float("nan")
        return {**figures, "served": len(self.seconds), "median_s": middle, "p95_s": late}


class Service:
    """The example as a process of its own, from its first answer on; ended as by Ctrl-C."""

    def __init__(self, *options: str, example: Path = EXAMPLE, env: dict[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "examples")))
        self.process = subprocess.Popen(
            [sys.executable, str(example), "--port", str(self.port), *options],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=2,  # what it tells is no result
        )

    def wait(self, seconds: float = 300) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: it ended, or did not answer in time.
        """
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=5):
                return
            time.sleep(0.3)
        raise RuntimeError(f"the service did not start: exit code {self.process.poll()}")

    def family(self) -> list[psutil.Process]:
        """The process and all below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def memory(self) -> tuple[float, float]:
        """MB of the process that speaks HTTP, and of all of them."""
        sizes = []
        for each in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes.append(each.memory_info().rss / 1e6)
        return (sizes[0], sum(sizes)) if sizes else (0.0, 0.0)

    def end(self, by: signal.Signals = signal.SIGINT, seconds: float = 60) -> list[psutil.Process]:
        """End it; returns the processes that are left, after they have been killed."""
        family = self.family()
        if self.process.poll() is None:
            self.process.send_signal(by)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        _, left = psutil.wait_procs(family, timeout=10)
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        return left


@contextlib.contextmanager
def serving(*options: str, example: Path = EXAMPLE) -> Iterator[Service]:
    """The service while it runs."""
    service = Service(*options, example=example)
    try:
        service.wait()
        yield service
    finally:
        service.end()


async def exchange(port: int, parts: list[bytes], patience: float = PATIENCE) -> Answer:
    """Send a request in parts, as far as it is taken, and read the answer."""
    begin, got = time.perf_counter(), bytearray()

    async def talk() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def send() -> None:
            for part in parts:
                writer.write(part)
                await writer.drain()

        sending = asyncio.ensure_future(send())
        try:
            while part := await reader.read(65536):
                got.extend(part)
        finally:
            sending.cancel()
            writer.close()

    with contextlib.suppress(OSError, asyncio.TimeoutError):
        await asyncio.wait_for(talk(), patience)
    status = int(got[9:12]) if got.startswith(b"HTTP/1.1 ") else CUT
    return Answer(status, len(got), time.perf_counter() - begin)


def request(body: str | bytes) -> list[bytes]:
    """A request with a body."""
    body = body.encode() if isinstance(body, str) else body
    return [f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body]


def hostile_requests() -> dict[str, tuple[set[int], list[bytes]]]:
    """What is sent, by its name, and the answers it may get: who sends on is cut off, and may not see the answer."""
    asks = {
        "NaN as seed": '{"prompt": "taxi", "seed": NaN}',
        "infinite seed": '{"prompt": "taxi", "seed": 1e999}',
        "half a surrogate": '{"prompt": "taxi \\ud800", "seed": 1}',
        "half a surrogate as a name": '{"prompt": "taxi", "seed": 1, "\\udfff": 1}',
        "guidance of 1e308": '{"prompt": "taxi", "seed": 1, "guidance_scale": 1e308}',
        "NaN as guidance": '{"prompt": "taxi", "seed": 1, "guidance_scale": NaN}',
        "a thousand steps": '{"prompt": "taxi", "seed": 1, "num_inference_steps": 1000}',
        "a large picture": '{"prompt": "taxi", "seed": 1, "height": 100000, "width": 100000}',
        "many names": json.dumps({f"n{number}": number for number in range(4000)}),
        "a long prompt": json.dumps({"prompt": "a" * 60_000, "seed": 1}),
        "no JSON": "\0" * 1000,
    }
    block = b"a" * 65536
    long = [f"{HEAD}Content-Length: {LONG}\r\n\r\n".encode(), *[block] * (LONG // len(block))]
    chunk = b"10000\r\n" + block + b"\r\n"
    endless = [f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode(), *[chunk] * (LONG // len(block))]
    return {
        **{name: ({422}, request(body)) for name, body in asks.items()},
        "nesting without end": ({400}, request("[" * 60_000)),
        "200 MB": ({413, CUT}, long),
        "an endless body": ({413, CUT}, endless),
    }


async def healthy(port: int, until: float, seeds: Iterator[int], phase: Phase) -> None:
    """A client that asks for one picture after the other."""
    while time.perf_counter() < until:
        body = json.dumps({"prompt": "panda face", "seed": next(seeds)})
        answer = await exchange(port, request(body))
        if answer.status == 200:
            phase.seconds.append(answer.seconds)
        else:
            phase.not_served[answer.status] += 1


async def half_open(port: int, sent: bytes, phase: Phase) -> None:
    """A connection with half a request, which goes on by a byte a second, and is made again when it is cut."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(sent)
                while True:
                    try:
                        if not await asyncio.wait_for(reader.read(4096), 1):
                            break
                    except asyncio.TimeoutError:
                        writer.write(b"a")
            finally:
                phase.cut += 1
                writer.transport.abort()
        await asyncio.sleep(0.1)


async def malicious(port: int, phase: Phase) -> None:
    """One hostile request after the other, ten a second at most."""
    for name, (statuses, parts) in cycle(hostile_requests().items()):
        answer = await exchange(port, parts)
        phase.hostile += 1
        if answer.status not in statuses or answer.size > 5000:  # nothing is echoed
            phase.amiss.append(f"{name}: {answer.status}, {answer.size} bytes")
        await asyncio.sleep(0.1)


async def hanging_up(port: int, phase: Phase) -> None:
    """Asks for the most steps and hangs up, twice a second."""
    for seed in count():
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.writelines(request(json.dumps({"prompt": "taxi", "seed": seed, "num_inference_steps": 100})))
            await asyncio.sleep(0.25)
            writer.transport.abort()
        phase.hostile += 1
        await asyncio.sleep(0.25)


async def watching(service: Service, phase: Phase) -> None:
    """The most memory."""
    while True:
        front, everything = await asyncio.to_thread(service.memory)
        phase.front_mb, phase.all_mb = max(phase.front_mb, front), max(phase.all_mb, everything)
        await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def beside(*others: Awaitable[None]) -> AsyncIterator[None]:
    """Others that go on meanwhile."""
    tasks = [asyncio.ensure_future(each) for each in others]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def load(service: Service, name: str, clients: int, seconds: float, half: int = 0) -> Phase:
    """Healthy clients for a time; with ``half`` also as many half-open connections, and the other hostile clients."""
    phase, port, seeds = Phase(name), service.port, count()
    others = [watching(service, phase)]
    if half:
        others += [half_open(port, HALVES[each % len(HALVES)], phase) for each in range(half)]
        others += [malicious(port, phase), hanging_up(port, phase)]
    async with beside(*others):
        if half:
            await asyncio.sleep(1)  # until they are connected
        until = time.perf_counter() + seconds
        await asyncio.gather(*(healthy(port, until, seeds, phase) for _ in range(clients)))
    return phase


def run(service: Service, seconds: float) -> list[Phase]:
    """All kinds of load, one after the other."""
    kinds: tuple[tuple[str, int, float, int], ...] = (
        ("one client alone", 1, seconds / 3, 0),
        ("one client, beside hostile ones", 1, seconds, HALF_OPEN),
        (f"{CLIENTS} clients alone", CLIENTS, seconds / 3, 0),
        (f"{CLIENTS} clients, beside hostile ones", CLIENTS, seconds, HALF_OPEN),
    )
    phases = []
    for name, clients, time_, half in kinds:
        print(f"{name} …", file=sys.stderr, flush=True)
        phases.append(asyncio.run(load(service, name, clients, time_, half)))
    return phases


def faults(phases: list[Phase], left: int) -> list[str]:
    """What is not as it should be."""
    found = [f"{left} processes were left"] if left else []
    for alone, beside_ in zip(phases[::2], phases[1::2], strict=True):
        for phase in (alone, beside_):
            found += [f"{phase.name}: {number} got {status}" for status, number in phase.not_served.items()]
            found += [f"{phase.name}: {each}" for each in phase.amiss[:5]]
        before, after = alone.row(), beside_.row()
        for figure in ("median_s", "p95_s"):
            if not after[figure] <= SLOWER * before[figure]:
                found.append(f"{beside_.name}: {figure} {after[figure]:.2f}, alone {before[figure]:.2f}")
        if beside_.all_mb - phases[0].all_mb > GROWTH:
            found.append(f"{beside_.name}: {beside_.all_mb:.0f} MB, in the first phase {phases[0].all_mb:.0f} MB")
    return found


def page(figures: dict[str, Any]) -> str:
    """The figures in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        "# The serving example under hostile clients",
        "",
        f"By `{figures['command']}`, on {figures['machine']}; {packages}; {figures['date']}.",
        "",
        f"Hostile: {HALF_OPEN} half-open connections that come again when they are cut, and requests that are too "
        "long, endless, out of range, no JSON, or hung up. MB: the most that was resident, in the process that was "
        "started, and in all of the service's, Ray's own included.",
        "",
        "| load | served | not served | median, s | 95 %, s | hostile requests | not answered as they should be | "
        "connections cut | started, MB | all, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["phases"]:
        lines.append(
            f"| {row['name']} | {row['served']} | {sum(row['not_served'].values())} | {row['median_s']:.2f} | "
            f"{row['p95_s']:.2f} | {row['hostile']} | {len(row['amiss'])} | {row['cut']} | {row['front_mb']:.0f} | "
            f"{row['all_mb']:.0f} |"
        )
    told = "; ".join(figures["faults"]) or "all within their bounds, and no process was left"
    return "\n".join([*lines, "", f"Result: {told}."])


def main() -> int:
    """Measure, and print or write what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="of each kind of hostile load")
    parser.add_argument("--example", type=Path, default=EXAMPLE, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    args = parser.parse_args()
    service = Service(example=args.example)
    try:
        service.wait()
        phases = run(service, args.seconds)
    finally:
        left = service.end()
    figures = {
        "command": f"python -m bench.checks.serving --seconds {args.seconds:g}",
        "machine": machine(),
        "versions": versions("ray", "fastapi", "starlette", "uvicorn"),
        "date": datetime.date.today().isoformat(),
        "phases": [phase.row() for phase in phases],
        "faults": faults(phases, len(left)),
    }
    text = page(figures)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / "serving.json", json.dumps(figures, indent=1) + "\n")
        write_text(args.out / "serving.md", text + "\n")
    return 1 if figures["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
