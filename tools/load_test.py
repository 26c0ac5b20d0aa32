"""Load on a running `bitlm serve`: streaming clients without pause, with malformed requests in between.

    python tools/load_test.py http://127.0.0.1:8000 --clients 8 --seconds 60

Every good request must come to its end, and every bad one must be refused with the status it deserves; otherwise the
exit status is 1. Needs httpx.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time

import httpx

PROMPTS = ("The function returns", "Read the", "A list of names: ", "In the beginning, the parser", "x")
JSON = {"content-type": "application/json"}
# Content, headers and the status that each deserves.
MALFORMED = (
    (b'{"prompt": "a"', JSON, 400),
    (b'{"prompt": ""}', JSON, 400),
    (b'{"prompt": "a", "max_tokens": -1}', JSON, 400),
    (b'{"prompt": [99999999]}', JSON, 400),
    (b'{"prompt": "a", "model": "another"}', JSON, 404),
    (b'{"prompt": "a", "seed": "s"}', JSON, 400),
    (b'{"prompt": "' + b"a" * (2 << 20) + b'"}', JSON, 413),
    (b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
)


class Load:
    """The clients' shared figures."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.first_s: list[float] = []
        self.whole_s: list[float] = []
        self.num_tokens = self.num_refused = 0
        self.lost: list[str] = []
        self.end_s = time.perf_counter() + options.seconds

    async def client(self, http: httpx.AsyncClient, number: int) -> None:
        """One client: a good request after the other until the time is up."""
        turn = 0
        while time.perf_counter() < self.end_s:
            await self.good(http, number * 1_000_000 + turn)
            turn += 1

    async def good(self, http: httpx.AsyncClient, seed: int) -> None:
        """One streaming completion."""
        body = {"prompt": PROMPTS[seed % len(PROMPTS)], "max_tokens": self.options.max_tokens, "seed": seed}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        start, first, usage, reason = time.perf_counter(), None, None, None
        try:
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    self.lost.append(f"seed {seed}: status {answer.status_code}")
                    return
                async for line in answer.aiter_lines():
                    if not line or line == "data: [DONE]":
                        continue
                    value = json.loads(line.removeprefix("data: "))
                    first = first or time.perf_counter()
                    usage = value.get("usage") or usage
                    for choice in value.get("choices", []):
                        reason = choice["finish_reason"] or reason
        except (httpx.HTTPError, ValueError) as error:
            self.lost.append(f"seed {seed}: {error!r}")
            return
        if usage is None or reason is None or (reason == "length" and usage["completion_tokens"] != body["max_tokens"]):
            self.lost.append(f"seed {seed}: not whole ({reason}, {usage})")
            return
        self.first_s.append(first - start)
        self.whole_s.append(time.perf_counter() - start)
        self.num_tokens += usage["completion_tokens"]

    async def malformed(self, http: httpx.AsyncClient) -> None:
        """One bad request after the other, with a pause."""
        turn = 0
        while time.perf_counter() < self.end_s:
            content, headers, expected = MALFORMED[turn % len(MALFORMED)]
            try:
                status = (await http.post("/v1/completions", content=content, headers=headers)).status_code
            except httpx.HTTPError as error:
                status = repr(error)
            if status == expected:
                self.num_refused += 1
            else:
                self.lost.append(f"malformed request {turn % len(MALFORMED)}: {status} instead of {expected}")
            turn += 1
            await asyncio.sleep(self.options.pause)

    def report(self, seconds: float) -> dict[str, object]:
        """All figures; latencies in seconds."""
        return {
            "clients": self.options.clients,
            "seconds": round(seconds, 1),
            "completions": len(self.whole_s),
            "tokens_per_second": round(self.num_tokens / seconds, 1),
            "first_block_s": percentiles(self.first_s),
            "whole_s": percentiles(self.whole_s),
            "malformed_refused": self.num_refused,
            "lost": len(self.lost),
        }


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 95 and 99 percent, and the largest."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    chosen = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values)}
    return {name: round(value, 3) for name, value in chosen.items()}


async def run(options: argparse.Namespace) -> int:
    """Put the load on and print the figures."""
    key = os.environ.get("BITLM_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=options.url, timeout=300, headers=headers) as http:
        load, start = Load(options), time.perf_counter()
        await asyncio.gather(*(load.client(http, n) for n in range(options.clients)), load.malformed(http))
        seconds = time.perf_counter() - start
    if not load.whole_s:
        print("no completion came to its end", *load.lost[:5], sep="\n", file=sys.stderr)
        return 1
    print(json.dumps(load.report(seconds), indent=2))
    print("\n".join(load.lost[:20]), file=sys.stderr, end="\n" if load.lost else "")
    return 1 if load.lost else 0


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server; the key is taken from BITLM_API_KEY")
    parser.add_argument("--clients", type=int, default=8, help="streaming at a time (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="new requests for so long (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of a completion (default %(default)s)")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between bad requests (default %(default)s)")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
