"""What a foreign tool's results are compared on and with: inputs, the runtime's scores of tokens, the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeprompt import EngineOptions, PromptFile, load_prompt, names
from edgeprompt.engines.encoder.batch import make_feeds, make_row
from edgeprompt.engines.seq2seq.graphs import Seq2SeqGraphs, SourceRow
from edgeprompt.heads.answers import token_logits
from edgeprompt.ort.session import Sessions, graph_inputs, open_session
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Manifest

IDS = ([5, 9, 21, 7, 30], [11, 3], [2, 8, 33, 14, 29, 6, 17])


def difference(got: Any, want: Any) -> float:
    """The largest, as a share of the largest value where that is above 1."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


def token_scores(folder: Path, file: Path, ids: list[int]) -> Any:
    """The head's output for every text position, by the runtime's own parts: answers show only the best."""
    opened, prompt = open_package(folder), load_prompt(file)
    vocab = opened.manifest.geometry.vocab_size
    rows = prompt.prompt_embeddings
    virtual = [] if rows is None else range(vocab, vocab + len(rows))
    if opened.manifest.architecture == names.ENCODER_DECODER:
        source = SourceRow(np.array([*virtual, *ids]), rows)
        graphs = Seq2SeqGraphs(opened, Sessions(opened, EngineOptions(provider="cpu", threads=1)))
        states = graphs.encode([source]).states[0]
        return token_logits(prompt, states, len(virtual))[-len(ids) :]
    session = open_session(opened.graph("model"), provider="cpu", threads=1).ort
    if opened.manifest.architecture == names.DECODER_ONLY:
        feeds = decoder_feeds(opened.manifest, prompt, [*virtual, *ids])
        feeds = {name: value for name, value in feeds.items() if name in {v.name for v in graph_inputs(session)}}
        states = session.run(["hidden_states"], feeds)[0][0]
        return token_logits(prompt, states, len(virtual))[-len(ids) :]
    row = make_row([*virtual, *ids], vocab, embeddings=rows, prefix=prompt.past_key_values)
    feeds = make_feeds([row], opened.manifest, [value.name for value in graph_inputs(session)])
    states = session.run(["last_hidden_state"], feeds)[0][0]
    return token_logits(prompt, states, len(virtual))[-len(ids) :]


def decoder_feeds(manifest: Manifest, prompt: PromptFile, ids: list[int]) -> dict[str, Any]:
    """All inputs of a decoder's graph for one row."""
    size, past = manifest.geometry, prompt.past_key_values
    length = 0 if past is None else past.shape[3]
    total = length + len(ids)
    feeds = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(length, total)[None],
        "prompt_embeddings": np.zeros((1, size.hidden_size), np.float32)
        if prompt.prompt_embeddings is None
        else prompt.prompt_embeddings,
    }
    empty = np.zeros((1, size.num_key_value_heads, 0, size.head_size), np.float32)
    for layer in range(size.num_layers):
        for at, part in enumerate(("key", "value")):
            feeds[names.past(layer, part)] = empty if past is None else past[layer, at][None]
    return feeds
