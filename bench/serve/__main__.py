"""Put load on a server process that this program starts, and look at its speed, its answers and its memory.

    python -m bench.serve throughput                                   # tokens/s of 1, 8 and 16 streams, demo model
    python -m bench.serve throughput --slice --counts 1,8 --rounds 3   # with the widths of K2.6
    python -m bench.serve soak --streams 64 --minutes 10

`soak` first asks every request of a fixed pool alone, then lets so many clients ask them at random, leave in the middle
of a prompt or a reply, reset connections, and send nonsense. It fails (exit code 1) if a reply that was read to its end
differs from the one alone, a request gets stuck or is refused, nonsense is answered otherwise than by 400 to 499,
memory grows by more than 2 % after the warm-up, or a page of the KV cache is not given back.
The result is one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.serve.process import OwnServer, Server
from bench.serve.soak import soak
from bench.serve.throughput import throughput

WARM_UP_SHARE = 0.2
LONGEST_WARM_UP_S = 120.0


def main() -> None:
    """Run one measurement."""
    args = _arguments()
    with tempfile.TemporaryDirectory() as name:
        server = _server(args, Path(name))
        try:
            result = asyncio.run(_measure(args, server))
        except OSError as error:
            result = {"failures": [f"the server cannot be asked any more: {error}"]}
        finally:
            code = server.stop() if isinstance(server, OwnServer) else 0
        if isinstance(server, OwnServer):
            failures = result.setdefault("failures", [])
            failures += [f"the server's log: {line}" for line in server.errors()[:5]]
            if code != 0:
                failures.append(f"the server: expected it to end with 0 at SIGTERM, got {code}")
    print(json.dumps(result, indent=2))
    sys.exit(bool(result.get("failures")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--url", help="a server that runs already, with keys for nobody")
    common.add_argument("--pid", type=int, help="its process, to watch the memory")
    common.add_argument("--model", default="demo", help="what to serve, if there is no --url")
    common.add_argument("--slice", action="store_true", help="serve a slice of K2.6 with random weights")
    common.add_argument("--layers", type=int, default=4, help="of the slice; the first is dense")
    common.add_argument("--experts", type=int, default=16, help="of the slice, in each layer")
    common.add_argument("--threads", default="auto")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("throughput", parents=[common])
    one.add_argument("--counts", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 16])
    one.add_argument("--tokens", type=int, default=64, help="of each reply")
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--kv-tokens", type=int, default=32768, help="of the cache of latents")
    two = commands.add_parser("soak", parents=[common])
    two.add_argument("--streams", type=int, default=64)
    two.add_argument("--minutes", type=float, default=10.0)
    two.add_argument("--pool", type=int, default=48, help="different requests")
    two.add_argument("--seed", type=int, default=1)
    two.add_argument("--patience", type=float, default=300.0, help="seconds after which a request is stuck")
    two.add_argument("--kv-tokens", type=int, default=4096, help="so few that requests take pages from each other")
    return parser.parse_args()


def _server(args: argparse.Namespace, folder: Path) -> Server:
    if args.url:
        return Server(args.url, args.pid)
    model = args.model
    if args.slice:
        from bench.serve.checkpoint import write_served_slice

        _say(f"writing a slice of {args.layers} layers")
        model = str(folder / "slice")
        Path(model).mkdir()
        write_served_slice(Path(model), args.layers, args.experts)
    _say("starting the server")
    options = ["--max-running", str(max(args.counts))] if args.command == "throughput" else []
    return OwnServer(folder, model, threads=args.threads, kv_tokens=args.kv_tokens, options=options)


async def _measure(args: argparse.Namespace, server: Server) -> dict[str, Any]:
    if isinstance(server, OwnServer):
        await server.wait_ready()
    _say("measuring")
    if args.command == "throughput":
        return await throughput(server, counts=args.counts, tokens=args.tokens, rounds=args.rounds)
    seconds = args.minutes * 60
    return await soak(
        server,
        streams=args.streams,
        seconds=seconds,
        warm_up_s=min(WARM_UP_SHARE * seconds, LONGEST_WARM_UP_S),
        pool=args.pool,
        seed=args.seed,
        patience_s=args.patience,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
