// Labels JSON lines by every prompt: node triage.mjs MODEL PROMPT.safetensors... < in.jsonl > out.jsonl
// Each line is an object with a "text"; the output has the same objects with the labels and their scores.
import { createInterface } from "node:readline";
import { load } from "edgeprompt";

const [model, ...prompts] = process.argv.slice(2);
if (!prompts.length) {
  console.error("usage: node triage.mjs MODEL PROMPT.safetensors... < in.jsonl > out.jsonl");
  process.exit(2);
}
const runtime = await load(model, { prompts });
const names = await runtime.prompts();
let number = 0;
let failed = 0;
for await (const line of createInterface({ input: process.stdin, crlfDelay: Infinity })) {
  number++;
  if (!line.trim()) continue;
  try {
    const record = JSON.parse(line);
    if (typeof record?.text !== "string") throw new Error('it has no "text"');
    const found = await runtime.runTasks(record.text, names, { truncate: true });
    const labels = Object.fromEntries(names.map((name) => [name, { label: found[name].label, score: found[name].scores[found[name].label] }]));
    console.log(JSON.stringify({ ...record, labels }));
  } catch (error) {
    failed++;
    console.error(`line ${number}: ${error.message}`);
  }
}
await runtime.close();
process.exitCode = failed ? 1 : 0;
