"""Serve a prefix (prefix tuning, P-Tuning v2) with stock ONNX Runtime alone: it is the cache that a request starts on.

    edgeprompt export BASE -o dist
    edgeprompt convert prefix.safetensors -o prefix.npy
    python prefix_python.py dist prefix.npy "The movie was fantastic"

Needs onnxruntime, numpy and tokenizers. A prefix has no virtual ids: text starts at the position behind it, and the
attention mask covers both.
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
        self.eos, self.dtype = set(facts["tokens"]["eos"]), facts["kv_dtype"]
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")  # int8 overflows on x86 without VNNI else
        self.session = ort.InferenceSession(Path(folder) / "model.onnx", options)
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.no_rows = np.zeros((1, facts["geometry"]["hidden_size"]), np.float32)

    def run(self, ids, past):
        """Logits of the last position, and the grown cache."""
        before = next(iter(past.values())).shape[2]
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, before + len(ids)), np.int64),
            "position_ids": np.arange(before, before + len(ids))[None],
            "prompt_embeddings": self.no_rows,
        }
        feeds = {name: value for name, value in feeds.items() if name in self.inputs}
        results = dict(zip(self.outputs, self.session.run(None, {**feeds, **past}), strict=True))
        return results["logits"][0, -1], {name: results[name.replace("past_key_values", "present")] for name in past}


def generate(base, prefix, ids, max_new_tokens=16):
    """Greedy token ids behind `prefix` [num_layers, 2, num_key_value_heads, num_virtual_tokens, head_size] and ids."""
    past = {
        f"past_key_values.{layer}.{part}": tensor[None].astype(base.dtype)
        for layer, pair in enumerate(prefix)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    found = []
    logits, past = base.run(ids, past)
    while len(found) < max_new_tokens and int(logits.argmax()) not in base.eos:
        found.append(int(logits.argmax()))
        logits, past = base.run(found[-1:], past)
    return found


def main():
    folder, prefix, text = sys.argv[1:]
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    print(tokenizer.decode(generate(Base(folder), np.load(prefix), tokenizer.encode(text).ids)))


if __name__ == "__main__":
    main()
