"""Serve a package with stock ONNX Runtime alone: tasks are `.onnx_adapter` files, swapped per run.

    edgeprompt export BASE -o dist --prompt-input optional
    edgeprompt convert sentiment.safetensors -o sentiment.onnx_adapter
    python stock_python.py dist sentiment.onnx_adapter "The movie was fantastic"

Needs onnxruntime, numpy and tokenizers.
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
        size, self.eos = facts["geometry"], set(facts["tokens"]["eos"])
        self.vocab_size = size["vocab_size"]
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")  # int8 overflows on x86 without VNNI else
        self.session = ort.InferenceSession(Path(folder) / "model.onnx", options)
        self.outputs = [value.name for value in self.session.get_outputs()]
        shape = (1, size["num_key_value_heads"], 0, size["head_size"])
        inputs = {value.name for value in self.session.get_inputs()}
        self.needs_positions = "position_ids" in inputs
        self.empty = {name: np.zeros(shape, np.float32) for name in inputs if name.startswith("past_key_values")}

    def run(self, ids, past, options=None):
        """Logits of the last position, and the grown cache."""
        before = next(iter(past.values())).shape[2]
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, before + len(ids)), np.int64),
            **past,
        }
        if self.needs_positions:
            feeds["position_ids"] = np.arange(before, before + len(ids))[None]
        results = dict(zip(self.outputs, self.session.run(None, feeds, options), strict=True))
        return results["logits"][0, -1], {name: results[name.replace("past_key_values", "present")] for name in past}

    def generate(self, task, ids, max_new_tokens=16):
        """Greedy token ids behind a task's virtual tokens and `ids`."""
        virtual = range(self.vocab_size, self.vocab_size + task.num_virtual_tokens)
        logits, past = self.run([*virtual, *ids], self.empty, task.options)
        found = []
        while len(found) < max_new_tokens and int(logits.argmax()) not in self.eos:
            found.append(int(logits.argmax()))
            logits, past = self.run(found[-1:], past)
        return found


class Task:
    """A task's adapter; swapping tasks is passing another one's options.

    The adapter object must live as long as its options: once it is collected, ONNX Runtime silently serves the bare
    base. An adapter does not say for which base it was made, and ONNX Runtime does not ask; `edgeprompt run` does.
    """

    def __init__(self, path):
        self.adapter = ort.LoraAdapter()
        self.adapter.Load(str(path))
        self.options = ort.RunOptions()
        self.options.add_active_adapter(self.adapter)
        rows = ort.AdapterFormat.read_adapter(str(path)).get_parameters()["prompt_embeddings"]
        self.num_virtual_tokens = rows.shape()[0]


def main():
    folder, adapter, text = sys.argv[1:]
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    print(tokenizer.decode(Base(folder).generate(Task(adapter), tokenizer.encode(text).ids)))


if __name__ == "__main__":
    main()
