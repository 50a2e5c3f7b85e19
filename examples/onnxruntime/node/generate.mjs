// Serves a package with onnxruntime-node: the prompt file is read as it is, its rows are an ordinary input.
//
//   npm install --ignore-scripts        (the CPU library is in the package; the script only fetches CUDA's)
//   node generate.mjs dist sentiment.safetensors 12,7,431
//
// Takes and prints token ids, as JSON; any JavaScript tokenizer that reads tokenizer.json goes in front.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as ort from "onnxruntime-node";

/** Tensors and metadata of a .safetensors file: eight bytes of header length, a JSON header, the data. */
export function readPrompt(path) {
  const file = readFileSync(path);
  const length = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString("utf8", 8, 8 + length));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [begin, end] = data_offsets;
    if (dtype !== "F32") throw new Error(`${name} is ${dtype}; this example reads F32`);
    const bytes = file.subarray(8 + length + begin, 8 + length + end);
    tensors[name] = { shape, data: new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)) };
  }
  return { tensors, metadata: JSON.parse(header.__metadata__.edgeprompt) };
}

export class Base {
  static async load(folder) {
    const base = new Base();
    base.facts = JSON.parse(readFileSync(join(folder, "edgeprompt.json"), "utf8"));
    base.session = await ort.InferenceSession.create(join(folder, base.facts.graphs.model.file), {
      extra: { session: { x64quantprecision: "1" } }, // int8 overflows on x86 without VNNI else
    });
    return base;
  }

  async run(ids, past, rows) {
    const { num_layers: layers, num_key_value_heads: heads, head_size: size, hidden_size: hidden } = this.facts.geometry;
    const before = past ? past["past_key_values.0.key"].dims[2] : 0;
    const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const feeds = {
      input_ids: int64(ids),
      attention_mask: int64(Array(before + ids.length).fill(1)),
      prompt_embeddings: new ort.Tensor("float32", rows?.data ?? new Float32Array(hidden), rows?.shape ?? [1, hidden]),
    };
    if (this.session.inputNames.includes("position_ids")) feeds.position_ids = int64(ids.map((_, i) => before + i));
    for (let layer = 0; layer < layers; layer++)
      for (const part of ["key", "value"]) {
        const name = `past_key_values.${layer}.${part}`;
        feeds[name] = past?.[name] ?? new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, size]);
      }
    const results = await this.session.run(feeds);
    const grown = {};
    for (const name of Object.keys(feeds))
      if (name.startsWith("past_key_values")) grown[name] = results[name.replace("past_key_values", "present")];
    return [results.logits.data.slice(-this.facts.geometry.vocab_size), grown];
  }

  /** Greedy token ids behind a prompt's virtual tokens and `ids`. */
  async generate(prompt, ids, maxNewTokens = 16) {
    if (prompt.metadata.base.fingerprint !== this.facts.base.fingerprint)
      throw new Error(`the prompt was made for ${prompt.metadata.base.name}, not for ${this.facts.base.name}`);
    const rows = prompt.tensors.prompt_embeddings;
    const virtual = Array.from({ length: rows.shape[0] }, (_, row) => this.facts.geometry.vocab_size + row);
    let [logits, past] = await this.run([...virtual, ...ids], null, rows);
    const found = [];
    while (found.length < maxNewTokens) {
      const token = logits.reduce((best, value, index) => (value > logits[best] ? index : best), 0);
      if (this.facts.tokens.eos.includes(token)) break;
      found.push(token);
      [logits, past] = await this.run([token], past);
    }
    return found;
  }
}

const [folder, file, ids] = process.argv.slice(2);
const base = await Base.load(folder);
console.log(JSON.stringify(await base.generate(readPrompt(file), ids.split(",").map(Number))));
