"""A crowd of streaming clients against a server whose pool holds a quarter of them.

    load_test.py [--clients 64] [--seconds 600] [--model FOLDER] [--kv-format int8] [--csv FILE]
                 [--conversations FILE]

Starts `quantpage serve` as a process, with a tiny float32 model unless one is given, and a pool
that holds a quarter of the clients. A client asks in rounds: greedy or seeded, with a beginning
that others share, and a third of the answers are left midway. With conversations, as ShareGPT's
file has them, people's first messages are asked, for answers as long as those they got. Checked,
exit status 1 where one does not hold:

    every finished answer is what the same request gets alone (asked of an idle server before)
    preemptions are fewer than requests
    at the end nobody runs or waits, and pages that are held are those of known prompts
    after SIGTERM in the crowd every answer under way is finished, and the process ends with 0

The resident memory of the server stands beside every minute. `--csv` appends a row a minute.
"""

import argparse
import asyncio
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

KINDS = 48
"""Requests that there are: each is asked alone once, to compare with."""
LONGEST = 160
"""Tokens of an answer at most."""
LONGEST_PROMPT = 512
"""Tokens of a prompt of people at most, about."""
WORDS = [
    *("the", "page", "cache", "holds", "keys", "and"),
    *("values", "of", "tokens", "in", "eight", "bits"),
]


@dataclass
class Counted:
    """What happened."""

    finished: int = 0
    left: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked, and what each request gets alone."""

    bodies: list[dict]
    wanted: list[str]


def bodies(prompts: list[tuple[str, int]]) -> list[dict]:
    """Requests for prompts and lengths of answers, in turn greedy and seeded."""
    made = []
    for at, (text, length) in enumerate(prompts):
        drawn = {"temperature": 0} if at % 2 else {"temperature": 1.0, "top_p": 0.95, "seed": at}
        made.append({"prompt": text, "max_tokens": length, "ignore_eos": True, **drawn})
    return made


def made_up(seed: int = 0) -> list[tuple[str, int]]:
    """Texts of few words with a few beginnings that are shared, and lengths of answers."""
    draw = random.Random(seed)
    beginnings = [" ".join(draw.choices(WORDS, k=draw.randrange(10, 40))) for _ in range(6)]
    return [
        (
            f"{beginnings[at % 6]} {' '.join(draw.choices(WORDS, k=draw.randrange(1, 12)))}",
            draw.randrange(20, LONGEST),
        )
        for at in range(KINDS)
    ]


def asked_by_people(path: Path) -> list[tuple[str, int]]:
    """First messages of conversations, and how long their answers were.

    path: a JSON list of {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}.
    """
    text, decoder, found = path.read_text(), json.JSONDecoder(), []
    at = text.index("[") + 1
    # One at a time: the first of a file of any size, whole or not.
    while len(found) < KINDS:
        at = re.compile(r"[\s,]*").match(text, at).end()
        said, at = decoder.raw_decode(text, at)
        turns = said["conversations"][:2]
        if [each["from"] for each in turns] != ["human", "gpt"]:
            continue
        prompt, answer = (each["value"] for each in turns)
        # A token is about four letters.
        if 4 <= len(prompt) <= 4 * LONGEST_PROMPT and len(answer) >= 16:
            found.append((prompt, min(len(answer) // 4, LONGEST)))
    return found


class Server:
    """`quantpage serve` as a process."""

    def __init__(self, folder: str, *flags: str) -> None:
        command = [sys.executable, "-m", "quantpage", "serve", "--model", folder]
        command += ["--engine", "embedded", "--port", "0", *flags]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        said = ""
        for line in self.process.stderr:
            said += line
            found = re.search(r"on (http://\S+) ", line)
            if found:
                self.url = found.group(1)
                # A full pipe would stop a server that has something to say.
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return
        self.process.communicate()
        raise SystemExit(said)

    def end(self) -> None:
        """At once."""
        self.process.kill()
        self.process.wait()

    def resident(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) * 1024

    def counters(self) -> dict[str, float]:
        """Of /metrics, by name."""
        found = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            match = re.match(r"(\w+:\w+)\{model_name=[^}]*\} (\S+)$", line)
            if match:
                found[match[1]] = float(match[2])
        return found


async def ask(
    client: httpx.AsyncClient, body: dict, leave_after: int | None = None
) -> str | int | None:
    """The text of a streamed answer; None: left midway; a number: a status other than 200."""
    text = ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as got:
        if got.status_code != 200:
            return got.status_code
        ended = False
        async for line in got.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return event["error"]["message"]
            text += event["choices"][0]["text"]
            ended = ended or event["choices"][0]["finish_reason"] is not None
            if leave_after is not None and len(text) >= leave_after:
                return None
        return text if ended else f"{text} [cut off]"


async def crowd(server: Server, load: Load, clients: int, until: float, counted: Counted) -> None:
    """Clients that ask until the time is over; a third of the answers are left."""
    limits = httpx.Limits(max_connections=clients)

    async def one(at: int, client: httpx.AsyncClient) -> None:
        draw = random.Random(at)
        while time.monotonic() < until:
            which = draw.randrange(KINDS)
            leave = draw.randrange(1, 40) if draw.random() < 1 / 3 else None
            try:
                said = await ask(client, load.bodies[which], leave)
            except httpx.HTTPError as error:
                said = f"[{type(error).__name__}: {error}]"
            if said is None:
                counted.left += 1
            elif said in (429, 503):
                counted.refused += 1
                await asyncio.sleep(0.2)
            elif said == load.wanted[which]:
                counted.finished += 1
            else:
                counted.wrong.append(
                    f"request {which}: expected {load.wanted[which]!r}, got {said!r}"
                )

    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(one(at, client) for at in range(clients)))


async def alone(server: Server, bodies: list[dict]) -> list[str]:
    """What each request gets from a server that does nothing else."""
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        return [await ask(client, body) for body in bodies]


async def watched(
    server: Server, load: Load, given: argparse.Namespace, counted: Counted
) -> list[dict]:
    """The crowd, and the server's memory and counters beside it every minute."""
    rows, begin = [], time.monotonic()
    until = begin + given.seconds
    task = asyncio.ensure_future(crowd(server, load, given.clients, until, counted))
    while not task.done():
        await asyncio.wait({task}, timeout=min(60, given.seconds))
        now = await asyncio.to_thread(server.counters)
        rows.append(
            {
                "minute": round((time.monotonic() - begin) / 60, 1),
                "resident_mib": round(server.resident() / 2**20, 1),
                "finished": counted.finished,
                "left": counted.left,
                "preemptions": int(now["vllm:num_preemptions_total"]),
                "tokens": int(now["vllm:generation_tokens_total"]),
                "pages_used": int(now["quantpage:pages_used"]),
            }
        )
        print(rows[-1], flush=True)
    await task
    return rows


async def drained(server: Server, load: Load, clients: int) -> list[str]:
    """What is wrong with answers that are under way when SIGTERM comes."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        tasks = [
            asyncio.ensure_future(ask(client, load.bodies[at % KINDS])) for at in range(clients)
        ]
        # Who waits in the system's queue of connections is not taken yet, and may not be later.
        under_way = 0
        while under_way + sum(each.done() for each in tasks) < clients:
            now = await asyncio.to_thread(server.counters)
            under_way = int(now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"])
        server.process.send_signal(signal.SIGTERM)
        said = await asyncio.gather(*tasks, return_exceptions=True)
    print(f"SIGTERM with {under_way} of {clients} under way", flush=True)
    found = [] if under_way else ["SIGTERM: expected answers under way, got none"]
    for at, each in enumerate(said):
        expected = load.wanted[at % KINDS]
        if each != expected:
            found.append(f"SIGTERM: request {at % KINDS}: expected {expected!r}, got {each!r}")
    return found


def main() -> int:
    """0 where all held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--model")
    parser.add_argument("--kv-format", default="int8")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--conversations", type=Path, help="as ShareGPT's JSON")
    parser.add_argument("--tokens", type=int, default=256, help="that a client holds, about")
    given = parser.parse_args()
    prompts = asked_by_people(given.conversations) if given.conversations else made_up()
    asked = bodies(prompts)
    with tempfile.TemporaryDirectory() as work:
        folder = given.model
        if folder is None:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from tests.server.small import save_small

            folder = str(save_small(Path(work)))
        # Float32, as rounding in 16 bits depends on how many share a product.
        flags = ["--dtype", "float32", "--kv-format", given.kv_format, "--page-size", "16"]
        flags += ["--max-requests", str(given.clients), "--max-waiting", "4096"]
        # However slow a machine is: what a server does with answers that take too long has a test.
        flags += ["--drain", "3600"]
        quiet = Server(folder, *flags, "--no-prefix-cache", "--memory", "64MiB")
        try:
            load = Load(asked, asyncio.run(alone(quiet, asked)))
            held = pages_of(quiet)
        finally:
            quiet.end()
        # Beside pages a server holds what its requests' exact pages take, however many it has.
        larger = Server(folder, *flags, "--memory", "128MiB")
        try:
            page_bytes = (64 << 20) / (pages_of(larger) - held)
        finally:
            larger.end()
        # A quarter of the clients, each with a prompt and an answer of usual length.
        pages = given.clients // 4 * (given.tokens // 16)
        flags += ["--memory", f"{(64 << 20) - round((held - pages) * page_bytes)}B"]
        return run(Server(folder, *flags), load, given)


def pages_of(server: Server) -> int:
    """What its memory holds."""
    return int(server.counters()["quantpage:pages"])


def run(server: Server, load: Load, given: argparse.Namespace) -> int:
    """The crowd, against a pool that holds a quarter of it."""
    counted = Counted()
    try:
        rows = asyncio.run(watched(server, load, given, counted))
        for _ in range(100):
            end = server.counters()
            if not end["vllm:num_requests_running"] + end["vllm:num_requests_waiting"]:
                break
            time.sleep(0.1)
        problems = counted.wrong[:5]
        requests = counted.finished + counted.left
        if end["vllm:num_requests_running"] or end["vllm:num_requests_waiting"]:
            problems.append(f"expected nobody under way at the end, got {end}")
        if end["quantpage:pages_used"] != end["quantpage:pages_remembered"]:
            problems.append(f"pages: expected only known prompts' to be held, got {end}")
        if end["vllm:num_preemptions_total"] >= requests:
            problems.append(f"preemptions: expected fewer than {requests}, got {end}")
        if not counted.finished or not counted.left:
            problems.append(f"expected answers that ended and that were left, got {counted}")
        problems += asyncio.run(drained(server, load, given.clients))
        code = server.process.wait(timeout=120)
        if code:
            problems.append(f"exit code: expected 0, got {code}")
    finally:
        server.end()
    if given.csv is not None:
        new = not given.csv.exists()
        with given.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)
    print(
        f"{counted.finished} answers as alone, {counted.left} left midway, {counted.refused} told "
        f"to come again, {len(counted.wrong)} wrong, "
        f"{int(end['vllm:num_preemptions_total'])} preemptions, {int(end['quantpage:pages'])} pages"
    )
    for each in problems:
        print(f"FAILED: {each}"[:2000])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
