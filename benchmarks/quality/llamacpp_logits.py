"""Next-token log-probabilities of llama.cpp for token ids on stdin; run by `benchmarks.quality.kl` where xllamacpp is.

Each line in is a JSON list of ids, each line out a list of [id, logprob] pairs, the most likely ones first.
"""

from __future__ import annotations

import json
import os
import sys

import xllamacpp


def main() -> None:
    """Answer line by line."""
    path, most, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp talks on stdout
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx, parameters.n_parallel = 1024, 1
    parameters.cpuparams.n_threads = threads
    server = xllamacpp.Server(parameters)
    print(json.dumps({"version": xllamacpp.__version__}), file=out, flush=True)
    for line in sys.stdin:
        request = {
            "prompt": json.loads(line),
            "n_predict": 1,
            "n_probs": most,
            "temperature": -1,
            "cache_prompt": False,
        }
        answer = server.handle_completions(request)
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        print(json.dumps([[one["id"], one["logprob"]] for one in found]), file=out, flush=True)


if __name__ == "__main__":
    main()
