"""Minutes of mixed load on a server: nothing may leak, and no request may be lost.

    python -m benchmarks.server.soak [--minutes 10] [--clients 24] [--model demo]

Streams and whole answers, chats and completions, samples, logprobs, JSON; 5 % of the clients leave in the middle, 5 %
of the requests are bad. Every second memory, descriptors and threads of both processes are noted; their slopes are
those of a line through all notes after the first quarter. Exits with 1 where something was lost or leaks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from benchmarks.server.process import ServerProcess, Use, use

from quire.cli.remote import Remote
from quire.types.errors import EngineError

LEAVE, BAD = 0.05, 0.05
WORDS = "the a of and to in is that it was for on are with as his they at be this have from or had by".split()
MOST_MIB, MOST_FILES, MOST_THREADS = 1.0, 1.0, 0.5  # slopes, by the minute


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    server = ServerProcess(args.model, "--max-model-len=1024", "--max-num-seqs=16", "--disable-uvicorn-access-log")
    try:
        report = asyncio.run(soak(server, args))
    finally:
        status = server.stop()
    report["exit_status"] = status
    print(json.dumps(report, indent=2))
    bad = [name for name, fine in checks(report).items() if not fine]
    if bad:
        raise SystemExit(f"not as it should be: {', '.join(bad)}")


async def soak(server: ServerProcess, args: argparse.Namespace) -> dict[str, Any]:
    until = time.monotonic() + 60 * args.minutes
    ends: Counter[str] = Counter()
    notes: list[tuple[float, Use, Use]] = []
    front, engine = server.front, server.engine

    async def watch() -> None:
        while time.monotonic() < until:
            notes.append((time.monotonic(), use(front), use(engine)))
            await asyncio.sleep(1)

    clients = [client(server.url, random.Random(f"{args.seed} {i}"), until, ends) for i in range(args.clients)]
    await asyncio.gather(watch(), *clients)
    await asyncio.sleep(2)
    m = server.metrics()
    return {
        "minutes": args.minutes,
        "requests": sum(ends.values()),
        "ends": dict(ends),
        "received": m["quire:requests_received_total"],
        "ended": m["vllm:request_success_total"],
        "tokens": m["vllm:generation_tokens_total"],
        "blocks_used": m["quire:kv_blocks_used"],
        "restarts": m["quire:engine_restarts"],
        "front": slopes(notes, 1),
        "engine": slopes(notes, 2),
    }


def slopes(notes: list[tuple[float, Use, Use]], which: int) -> dict[str, Any]:
    """Last values, and slopes by the minute."""
    late = [(note[0], note[which]) for note in notes[len(notes) // 4 :]]
    minutes = [(when - late[0][0]) / 60 for when, _ in late]
    out: dict[str, Any] = {}
    for name in ("memory_mib", "files", "threads"):
        values = [getattr(u, name) for _, u in late]
        out[name] = round(values[-1], 1)
        out[f"{name}_per_minute"] = round(float(np.polyfit(minutes, values, 1)[0]), 3)
    return out


def checks(report: dict[str, Any]) -> dict[str, bool]:
    found = {
        "no request is lost": report["ends"].get("lost", 0) == 0,
        "received = ended": report["received"] == report["ended"],
        "no block is held": report["blocks_used"] == 0,
        "no restart": report["restarts"] == 0,
        "it ends well": report["exit_status"] == 0,
    }
    for who in ("front", "engine"):
        for name, most in (("memory_mib", MOST_MIB), ("files", MOST_FILES), ("threads", MOST_THREADS)):
            found[f"{who}: {name} is flat"] = report[who][f"{name}_per_minute"] <= most
    return found


async def client(url: str, lots: random.Random, until: float, ends: Counter[str]) -> None:
    remote = Remote(url)
    while time.monotonic() < until:
        bad, leaves = lots.random() < BAD, lots.random() < LEAVE
        path, body = request(lots, bad)
        if not leaves and lots.random() < 0.2:
            ends[await asyncio.to_thread(whole, f"{url}{path}", {**body, "stream": False}, bad)] += 1
        else:
            ends[await one(remote, path, body, bad, leaves)] += 1


def whole(url: str, body: dict[str, Any], bad: bool) -> str:
    """As `one`, of an answer that comes at once."""
    asked = Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urlopen(asked, timeout=120) as answer:
            ended = [choice["finish_reason"] is not None for choice in json.load(answer)["choices"]]
    except HTTPError as error:
        with error:
            return "refused" if bad and 400 <= error.code < 500 else "lost"
    except OSError as error:
        print(f"lost: {error}", file=sys.stderr)
        return "lost"
    return "done" if ended == [True] * body.get("n", 1) and not bad else "lost"


async def one(remote: Remote, path: str, body: dict[str, Any], bad: bool, leaves: bool) -> str:
    """How a request ended: "done", "left", "refused", or "lost"."""
    finished = 0
    stream = remote.stream(path, body)
    try:
        async with asyncio.timeout(120):
            async for event in stream:
                finished += sum(choice["finish_reason"] is not None for choice in event["choices"])
                if leaves:
                    return "left"
    except EngineError as error:
        if bad and "answers 4" in str(error):
            return "refused"
        print(f"lost: {error}", file=sys.stderr)
        return "lost"
    except TimeoutError:
        print(f"lost: no end of {body}", file=sys.stderr)
        return "lost"
    finally:
        await stream.aclose()
    return "done" if finished == body.get("n", 1) and not bad else "lost"


def request(lots: random.Random, bad: bool) -> tuple[str, dict[str, Any]]:
    text = " ".join(lots.choices(WORDS, k=int(lots.expovariate(1 / 60)) % 600 + 1))
    body: dict[str, Any] = {
        "model": "demo" if lots.random() < 0.5 else None,
        "stream": True,
        "max_tokens": int(lots.expovariate(1 / 40)) % 300 + 1,
        "temperature": lots.choice([0, 0.7, 1.0]),
    }
    chat = lots.random() < 0.5
    if lots.random() < 0.3:
        body["ignore_eos"] = True
    if body["temperature"] and lots.random() < 0.2:
        body["n"] = lots.randint(2, 4)
    if lots.random() < 0.1:
        body |= {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
    if lots.random() < 0.1:
        body["stop"] = ["the", "."]
    if lots.random() < 0.1:
        body["response_format"] = {"type": "json_object"}
    if bad:
        body |= lots.choice([{"model": "none"}, {"temperature": -1}, {"max_tokens": "x"}, {"stop": 5}, {"n": 1 << 40}])
    if chat:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**body, "prompt": text}


if __name__ == "__main__":
    main()
