// Unmodified transformers.js on a model folder, with prompts as keys and values: JSON from stdin, tokens on stdout.
import { readFileSync } from "node:fs";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";
import { inputsBehind, prefixOf } from "../examples/transformers/prefix.mjs";

const { models, model, calls, maxNewTokens, texts = [] } = JSON.parse(readFileSync(0, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = models;
const loaded = await AutoModelForCausalLM.from_pretrained(model, { device: "cpu" });
const found = [];
for (const { ids, kv } of calls) {
  const bytes = readFileSync(kv);
  const prefix = prefixOf(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  const output = await loaded.generate({ ...inputsBehind(prefix, ids), max_new_tokens: maxNewTokens, do_sample: false });
  found.push(Array.from(output.data, Number).slice(ids.length));
}
const tokenizer = texts.length ? await AutoTokenizer.from_pretrained(model) : null;
const encoded = texts.map((text) => Array.from(tokenizer(text).input_ids.data, Number));
process.stdout.write(`${JSON.stringify({ found, encoded })}\n`, () => process.exit(0));
