// Several tasks on one model of transformers.js, switched by their prefixes: node tasks.mjs MODEL TEXT PROMPT-KV...
import { readFile } from "node:fs/promises";
import { basename, dirname, resolve } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";
import { inputsBehind, prefixOf } from "./prefix.mjs";

const [folder, text, ...files] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = `${dirname(resolve(folder))}/`;
const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
const model = await AutoModelForCausalLM.from_pretrained(basename(folder), { device: "cpu" });
for (const file of files) {
  const bytes = await readFile(file);
  const prefix = prefixOf(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  const about = JSON.parse(JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + Number(bytes.readBigUInt64LE())))).__metadata__.edgeprompt_kv);
  const filled = about.template.map((part) => part.literal ?? text).join("");
  const { input_ids } = tokenizer(filled);
  const ids = Array.from(input_ids.data, Number);
  const output = await model.generate({ ...inputsBehind(prefix, ids), max_new_tokens: 24, do_sample: false });
  const said = Array.from(output.data, Number).slice(ids.length);
  console.log(`${about.name}: ${tokenizer.decode(said, { skip_special_tokens: true })}`);
}
