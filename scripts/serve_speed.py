"""Streaming clients against OpenAI servers that run side by side: rows for benchmarks/results.

    serve_speed.py tokens  --out FILE NAME=URL@PID ...   ms a token at 1, 8, 32 clients
    serve_speed.py context --out FILE NAME=URL@PID ...   four prompts of 4k tokens: first token of
                                                         a miss and of a hit, ms a token of 4 hits
    serve_speed.py decode  --out FILE NAME=URL@PID ...   ms a token of answers over four prompts of
                                                         4k tokens, while all four are being given
    serve_speed.py agents  --out FILE NAME=URL@PID ...   rounds of several users over one system
                                                         prompt, each with all that was said before

Servers are asked in turn, round after round, so that what else the machine does meets all of them;
figures are medians over rounds. Beside the time by the clock stands the time that the server's
process and its children (PID) had a processor, which a busy machine changes less.
"""

import argparse
import asyncio
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

WORDS = [
    "river",
    "stone",
    "light",
    "winter",
    "garden",
    "letter",
    "music",
    "window",
    "doctor",
    "market",
    "silver",
    "engine",
]


@dataclass(frozen=True)
class Server:
    """One that is up."""

    name: str
    url: str
    model: str
    process: int

    def processor_seconds(self) -> float:
        """That the process and its children have had."""
        parents, times = {}, {}
        for each in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = each.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            number = int(each.parent.name)
            parents[number] = int(fields[1])
            times[number] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        total = 0.0
        for number, seconds in times.items():
            above = number
            while above in parents and above != self.process:
                above = parents[above]
            total += seconds if above == self.process else 0.0
        return total


@dataclass
class Heard:
    """One answer."""

    first: float
    """Seconds to the first text."""
    tokens: int
    cached: int
    text: str
    times: list[float]
    """When its pieces came."""


def story(seed: int, words: int) -> str:
    """Words that no other seed begins with."""
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=words))


async def ask(
    client: httpx.AsyncClient, server: Server, messages: list[dict], tokens: int
) -> Heard:
    """A greedy chat answer, streamed."""
    body = {
        "model": server.model,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not server.name.startswith("transformers"):
        body["ignore_eos"] = True
    start, first, count, cached, text = time.perf_counter(), 0.0, 0, 0, ""
    times = []
    async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as got:
        if got.status_code != 200:
            raise SystemExit(f"{server.name}: {got.status_code} {(await got.aread())[:300]!r}")
        async for line in got.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or {}
            details = usage.get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens") or cached
            for choice in event.get("choices") or []:
                piece = choice["delta"].get("content") or ""
                if piece or choice.get("finish_reason"):
                    first = first or time.perf_counter() - start
                count += bool(piece)
                text += piece
                times += [time.perf_counter()] * bool(piece)
            count = usage.get("completion_tokens") or count
    return Heard(first, count, cached, text, times)


async def tokens(servers: list[Server], given: argparse.Namespace) -> list[dict]:
    """ms a token, all clients together."""
    rows = []
    async with httpx.AsyncClient(timeout=1200, limits=httpx.Limits(max_connections=64)) as client:
        for clients in given.clients:
            taken: dict[str, list[tuple[float, float]]] = {each.name: [] for each in servers}
            for turn in range(given.rounds + 1):
                for server in servers:
                    asked = [
                        [{"role": "user", "content": f"Write a long story of a {story(at, 40)}."}]
                        for at in range(1000 * turn, 1000 * turn + clients)
                    ]
                    # The first turn warms up, with fewer tokens.
                    new = given.tokens if turn else 4
                    start, had = time.perf_counter(), server.processor_seconds()
                    heard = await asyncio.gather(
                        *(ask(client, server, each, new) for each in asked)
                    )
                    seconds = time.perf_counter() - start, server.processor_seconds() - had
                    if turn:
                        made = sum(each.tokens for each in heard)
                        taken[server.name].append((seconds[0] / made, seconds[1] / made))
            rows += told("tokens", clients, taken)
    return rows


async def context(servers: list[Server], given: argparse.Namespace) -> list[dict]:
    """Long prompts: misses, hits, and decode over all of them."""
    rows = []
    async with httpx.AsyncClient(timeout=3000) as client:
        # Each its own: over one prompt all answers would read the same pages.
        asked = [
            [{"role": "user", "content": story(7 + at, given.words) + "\nGo on with the story."}]
            for at in range(4)
        ]
        for server in servers:
            misses = [await ask(client, server, each, 2) for each in asked]
            hits = [await ask(client, server, each, 2) for each in asked]
            miss, hit = (statistics.median(e.first for e in some) for some in (misses, hits))
            row = {
                "case": "context",
                "server": server.name,
                "clients": 1,
                "cached": hits[-1].cached,
            }
            rows.append(row | {"first_miss_s": round(miss, 3), "first_hit_s": round(hit, 3)})
            print(rows[-1], flush=True)
        taken: dict[str, list[tuple[float, float]]] = {each.name: [] for each in servers}
        for _ in range(given.rounds):
            for server in servers:
                start, had = time.perf_counter(), server.processor_seconds()
                heard = await asyncio.gather(
                    *(ask(client, server, each, given.tokens) for each in asked)
                )
                made = sum(each.tokens for each in heard)
                seconds = time.perf_counter() - start, server.processor_seconds() - had
                taken[server.name].append((seconds[0] / made, seconds[1] / made))
        rows += told("context", 4, taken)
    return rows


async def decode(servers: list[Server], given: argparse.Namespace) -> list[dict]:
    """Answers over four long prompts, from the last one's first piece to the first one's last."""
    rows = []
    async with httpx.AsyncClient(timeout=3000) as client:
        for server in servers:
            had: list[tuple[float, float]] = []

            async def watch(server: Server = server, had: list = had) -> None:
                while True:
                    had.append((time.perf_counter(), server.processor_seconds()))
                    await asyncio.sleep(0.1)

            watching = asyncio.create_task(watch())
            asked = [
                [
                    {
                        "role": "user",
                        "content": story(7 + at, given.words) + "\nGo on with the story.",
                    }
                ]
                for at in range(4)
            ]
            heard = await asyncio.gather(*(ask(client, server, e, given.tokens) for e in asked))
            watching.cancel()
            begin, end = max(e.times[0] for e in heard), min(e.times[-1] for e in heard)
            made = sum(begin < at <= end for each in heard for at in each.times)
            if made < given.tokens:
                raise SystemExit(
                    f"{server.name}: {made} pieces while all were given: more --tokens"
                )
            used = [seconds for at, seconds in had if begin <= at <= end]
            taken = {server.name: [((end - begin) / made, (used[-1] - used[0]) / made)]}
            rows += told("decode", 4, taken)
    return rows


async def agents(servers: list[Server], given: argparse.Namespace) -> list[dict]:
    """Time to the first token, by round."""
    rows = []
    system = {"role": "system", "content": story(1, given.words)}
    talks = {each.name: [[system] for _ in range(given.users)] for each in servers}
    async with httpx.AsyncClient(timeout=3000) as client:
        for turn in range(given.turns):
            for server in servers:
                mine = talks[server.name]
                for user, talk in enumerate(mine):
                    talk.append({"role": "user", "content": story(100 * turn + user, 30)})
                heard = await asyncio.gather(*(ask(client, server, talk, 8) for talk in mine))
                for talk, each in zip(mine, heard, strict=True):
                    talk.append({"role": "assistant", "content": each.text})
                first = statistics.median(each.first for each in heard)
                cached = round(statistics.mean(each.cached for each in heard))
                row = {"case": "agents", "server": server.name, "clients": given.users}
                row |= {"cached": cached, "round": turn + 1, "first_s": round(first, 3)}
                rows.append(row)
                print(rows[-1], flush=True)
    return rows


def told(case: str, clients: int, taken: dict[str, list[tuple[float, float]]]) -> list[dict]:
    """Rows of seconds a token, by the clock and of the processor."""
    rows = []
    for name, figures in taken.items():
        clock, processor = (statistics.median(each) * 1e3 for each in zip(*figures, strict=True))
        row = {"case": case, "server": name, "clients": clients}
        row |= {"ms_a_token": round(clock, 2), "processor_ms_a_token": round(processor, 2)}
        print(row, flush=True)
        rows.append(row)
    return rows


CASES = {"tokens": tokens, "context": context, "decode": decode, "agents": agents}
COLUMNS = (
    "case", "server", "clients", "round", "cached", "ms_a_token", "processor_ms_a_token",
    "first_miss_s", "first_hit_s", "first_s", "note", "device", "cores", "commit",
)  # fmt: skip


def device() -> str:
    """What /proc says of the processor."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def main() -> None:
    """Rows to the CSV, behind those that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL@PID")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--words", type=int, default=3900, help="of the long or the system prompt")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument(
        "--model", default="models/smollm2", help="as `transformers serve` knows it"
    )
    parser.add_argument("--note", default="", help="what else the machine did, threads, settings")
    given = parser.parse_args()
    servers = []
    for each in given.servers:
        name, _, place = each.partition("=")
        url, _, process = place.rpartition("@")
        model = given.model
        if not name.startswith("transformers"):
            model = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        servers.append(Server(name, url, model, int(process)))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {"device": device(), "cores": os.cpu_count(), "commit": commit, "note": given.note}

    rows = asyncio.run(CASES[given.case](servers, given))
    new = not given.out.exists()
    with given.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerows(row | facts for row in rows)


if __name__ == "__main__":
    main()
