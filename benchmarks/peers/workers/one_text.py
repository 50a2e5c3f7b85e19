"""Several tasks over one text, with the peer's best caching of that text: `one_text.py llamacpp|genai WORK`.

Reads a text's number a line, answers all tasks on that text, and prints the seconds it took and each task's likeliest
token. The text is computed once: llama.cpp's server keeps the longest common beginning of a slot (`cache_prompt`),
ONNX Runtime GenAI rewinds to the text's end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


class LlamaCpp:
    """llama.cpp's server in this process (xllamacpp)."""

    def __init__(self, work: dict) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = work["gguf"]
        parameters.n_ctx, parameters.n_parallel = 1024, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = work["threads"]
        self._server, self.version = xllamacpp.Server(parameters), f"xllamacpp {xllamacpp.__version__}"

    def answer(self, text: list[int], tasks: list[list[int]]) -> list[int]:
        """Each task's likeliest token behind the text and its own ids."""
        found = []
        for task in tasks:
            request = {"prompt": [*text, *task], "n_predict": 1, "temperature": -1, "cache_prompt": True, "n_probs": 1}
            answer = self._server.handle_completions(request)
            found.append(int(answer["choices"][0]["logprobs"]["content"][0]["id"]))
        return found


class GenAI:
    """ONNX Runtime GenAI with its own graph."""

    def __init__(self, work: dict) -> None:
        import numpy as np
        import onnxruntime_genai as og

        self._np, self.version = np, f"onnxruntime-genai {og.__version__}"
        config = og.Config(work["genai"])
        sessions = {"intra_op_num_threads": work["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": sessions}}}))
        self._model = og.Model(config)
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, max_length=1024, batch_size=1)
        self._generator = og.Generator(self._model, parameters)

    def answer(self, text: list[int], tasks: list[list[int]]) -> list[int]:
        """Each task's likeliest token behind the text and its own ids."""
        np, generator, found = self._np, self._generator, []
        generator.rewind_to(0)
        generator.append_tokens(np.asarray(text, np.int32))
        for task in tasks:
            generator.append_tokens(np.asarray(task, np.int32))
            logits = np.asarray(generator.get_logits())
            found.append(int(logits.reshape(-1, logits.shape[-1])[-1].argmax()))
            generator.rewind_to(len(text))
        return found


def main() -> None:
    """Answer line by line."""
    kind, file = sys.argv[1:3]
    work = json.loads(Path(file).read_text(encoding="utf-8"))
    os.environ["OMP_NUM_THREADS"] = str(work["threads"])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp talks on stdout
    peer = {"llamacpp": LlamaCpp, "genai": GenAI}[kind](work)
    print(json.dumps({"version": peer.version}), file=out, flush=True)
    for line in sys.stdin:
        text = work["texts"][int(line)]
        started = time.perf_counter()
        tokens = peer.answer(text, work["tasks"])
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}), file=out, flush=True)


if __name__ == "__main__":
    main()
