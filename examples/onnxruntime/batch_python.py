"""Serve several tasks in one batch with stock ONNX Runtime alone: their rows form a bank, each task has its own ids.

    edgeprompt export BASE -o dist
    edgeprompt convert sentiment.safetensors -o sentiment.npy
    edgeprompt convert topic.safetensors -o topic.npy
    python batch_python.py dist "The movie was fantastic" sentiment.npy topic.npy

Needs onnxruntime, numpy and tokenizers, and a package of the routes genai or torch: their attention
(GroupQueryAttention) counts each row's valid positions from the left, so rows of any length share a step.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


class Base:
    """One graph for all tasks."""

    def __init__(self, folder):
        facts = json.loads((Path(folder) / "edgeprompt.json").read_text())
        size, self.eos, dtype = facts["geometry"], set(facts["tokens"]["eos"]), facts["kv_dtype"]
        self.vocab_size, self.hidden_size = size["vocab_size"], size["hidden_size"]
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")  # int8 overflows on x86 without VNNI else
        self.session = ort.InferenceSession(Path(folder) / "model.onnx", options)
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.inputs = {value.name for value in self.session.get_inputs()}
        shape = (1, size["num_key_value_heads"], 0, size["head_size"])
        self.empty = {name: np.zeros(shape, dtype) for name in self.inputs if name.startswith("past_key_values")}

    def run(self, ids, lengths, past, bank):
        """Next-token logits [batch, vocab_size] and the grown cache; `lengths` are positions before `ids`, by row."""
        count = np.array(lengths)[:, None] + np.arange(ids.shape[1])
        width = next(iter(past.values())).shape[2] + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": (np.arange(width) <= count[:, -1:]).astype(np.int64),
            "position_ids": count,
            "prompt_embeddings": bank,
        }
        feeds = {name: value for name, value in feeds.items() if name in self.inputs}
        results = dict(zip(self.outputs, self.session.run(None, {**feeds, **past}), strict=True))
        return results["logits"][:, -1], {name: results[name.replace("past_key_values", "present")] for name in past}

    def generate(self, requests, tables, max_new_tokens=16):
        """Greedy token ids for every row.

        Args:
            requests: (task, token ids) for every row; task indexes `tables`, None is the bare base.
            tables: Prompt embeddings [num_virtual_tokens, hidden_size], one for every task.
            max_new_tokens: How many to generate.

        Prompts run row by row, then all rows decode together.
        """
        bank = np.concatenate([*tables, np.zeros((1, self.hidden_size))]).astype(np.float32)
        starts = np.cumsum([self.vocab_size, *map(len, tables)])
        first, caches, lengths = [], [], []
        for task, ids in requests:
            virtual = () if task is None else range(starts[task], starts[task] + len(tables[task]))
            row = np.array([[*virtual, *ids]], np.int64)
            logits, cache = self.run(row, [0], self.empty, bank)
            first.append(int(logits[0].argmax()))
            caches.append(cache)
            lengths.append(row.shape[1])
        longest = max(lengths)
        past = {
            name: np.concatenate(
                [np.pad(cache[name], ((0, 0), (0, 0), (0, longest - cache[name].shape[2]), (0, 0))) for cache in caches]
            )
            for name in self.empty
        }
        rows, tokens, ended = [[] for _ in requests], first, [False] * len(requests)
        for _ in range(max_new_tokens):
            ended = [over or token in self.eos for over, token in zip(ended, tokens, strict=True)]
            if all(ended):
                break
            for row, over, token in zip(rows, ended, tokens, strict=True):
                row += [] if over else [token]
            logits, past = self.run(np.array(tokens, np.int64)[:, None], lengths, past, bank)
            tokens, lengths = logits.argmax(1).tolist(), [length + 1 for length in lengths]
        return rows


def main():
    folder, text, *tables = sys.argv[1:]
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    requests = [(task, ids) for task in range(len(tables))]
    for row in Base(folder).generate(requests, [np.load(table) for table in tables]):
        print(tokenizer.decode(row))


if __name__ == "__main__":
    main()
