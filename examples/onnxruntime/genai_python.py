"""Serve a package with ORT GenAI, unchanged: virtual ids in the prompt, their rows through `set_model_input`.

    edgeprompt export BASE -o dist --route genai
    edgeprompt convert sentiment.safetensors -o sentiment.npy
    python genai_python.py dist sentiment.npy "The movie was fantastic"

Needs onnxruntime-genai and numpy. The input must be required (`--prompt-input required`, the default): GenAI ignores
`set_model_input` for inputs that have a default.
"""

import sys

import numpy as np
import onnxruntime_genai as og


def generate(model, vocab_size, requests, tables, max_new_tokens=16, pad=0):
    """Greedy new token ids for every row.

    Args:
        model: An `og.Model`.
        vocab_size: The first virtual id.
        requests: (task, token ids) for every row; task indexes `tables`, None is the bare base.
        tables: Prompt embeddings [num_virtual_tokens, hidden_size], one for every task.
        max_new_tokens: How many to generate.
        pad: The id that fills short rows, the `pad_token_id` of genai_config.json.

    Several rows are padded on the right. That needs logits at every position, which graphs of the GenAI builder have
    and packages of `--route genai` have not (they compute the last position alone, for speed): graft the builder's
    folder with `--route onnx` to serve batches.
    """
    starts = np.cumsum([vocab_size, *map(len, tables)])
    rows = [
        [*(() if task is None else range(starts[task], starts[task] + len(tables[task]))), *ids]
        for task, ids in requests
    ]
    width = max(map(len, rows))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, batch_size=len(rows), max_length=width + max_new_tokens)
    generator = og.Generator(model, params)
    table = np.concatenate(tables).astype(np.float32)  # GenAI does not copy it: it must live as long as the generator
    generator.set_model_input("prompt_embeddings", table)
    padded = [row + [pad] * (width - len(row)) for row in rows]
    generator.append_tokens(np.array(padded if len(rows) > 1 else padded[0], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)[width:]] for row in range(len(rows))]


def main():
    import json
    from pathlib import Path

    folder, table, text = sys.argv[1:]
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    vocab_size = json.loads((Path(folder) / "edgeprompt.json").read_text())["geometry"]["vocab_size"]
    ids = [int(token) for token in tokenizer.encode(text)]
    print(tokenizer.decode(np.array(generate(model, vocab_size, [(0, ids)], [np.load(table)])[0], np.int32)))


if __name__ == "__main__":
    main()
