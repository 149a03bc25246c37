"""Measures the answers of a running `msa-hf serve`. Prints a table and a JSON line.

msa-hf serve ./smol-msa --store ./notes --json      # prints its token
python scripts/serve_benchmark.py http://127.0.0.1:8000 TOKEN --clients 1,8,32
"""

import argparse
import json
import platform
import sys

from msa_hf.serving.benchmark import measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("token", help="a bearer token")
    parser.add_argument("--clients", default="1,8,32", help="at once (default 1,8,32)")
    parser.add_argument("--requests", type=int, default=64, help="per number of clients (default 64)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (default 32)")
    parser.add_argument("--questions", help="a file with one per line")
    options = parser.parse_args()
    questions = ["Which river flows through Cairo?"]
    if options.questions:
        with open(options.questions, encoding="utf-8") as lines:
            questions = [line.strip() for line in lines if line.strip()]
    runs = []
    print("clients  requests  failed   p50 s   p95 s  first p50  first p95  requests/s  tokens/s")
    for clients in map(int, options.clients.split(",")):
        run = measure(options.url, options.token, questions, clients, options.requests, options.max_tokens)
        runs.append(run.to_dict())
        print(
            f"{run.clients:7} {run.requests:9} {run.failed:7} {run.p50:7.3f} {run.p95:7.3f} "
            f"{run.first_p50:10.3f} {run.first_p95:10.3f} {run.requests_per_second:11.2f} "
            f"{run.tokens_per_second:9.1f}",
            flush=True,
        )
    print(json.dumps({"machine": platform.processor() or platform.machine(), "runs": runs}))


if __name__ == "__main__":
    sys.exit(main())
