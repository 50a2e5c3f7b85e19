// Unmodified transformers.js on a model folder, with prompts as keys and values: JSON from stdin, tokens on stdout.
import { readFileSync } from "node:fs";
import { AutoModelForCausalLM, DynamicCache, Tensor, env } from "@huggingface/transformers";

const { models, model, calls, maxNewTokens } = JSON.parse(readFileSync(0, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = models;

/** A prompt of `edgeprompt convert --to kv` as transformers.js takes it (docs/javascript.md). */
async function prefixOf(bytes) {
  const size = Number(new DataView(bytes).getBigUint64(0, true));
  const { __metadata__: _, ...tensors } = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, size)));
  const read = ({ shape, data_offsets: [a, b] }) => new Tensor("float32", new Float32Array(bytes.slice(8 + size + a, 8 + size + b)), shape);
  return new DynamicCache(Object.fromEntries(Object.entries(tensors).map(([name, one]) => [name, read(one)])));
}

const loaded = await AutoModelForCausalLM.from_pretrained(model, { dtype: "fp32", device: "cpu" });
const found = [];
for (const { ids, kv } of calls) {
  const bytes = kv && readFileSync(kv);
  const prefix = kv ? await prefixOf(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)) : null;
  const total = ids.length + (prefix?.get_seq_length() ?? 0);
  const output = await loaded.generate({
    input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
    ...(prefix ? { past_key_values: prefix } : {}),
    max_new_tokens: maxNewTokens,
    do_sample: false,
  });
  found.push(Array.from(output.data ?? output.sequences.data, Number).slice(ids.length));
}
process.stdout.write(`${JSON.stringify(found)}\n`, () => process.exit(0));
