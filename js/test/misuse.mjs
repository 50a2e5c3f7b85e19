// Wrong arguments, aborts and callbacks, as JavaScript alone can give them. JSON from stdin: {package, words, story}; what
// came of each case on stdout. The process must end by itself.
import { readFileSync } from "node:fs";
import { load } from "../dist/index.js";

const { package: folder, words, story } = JSON.parse(readFileSync(0, "utf8"));
const found = {};

async function say(name, action) {
  try {
    const value = await action();
    found[name] = { value: value === undefined ? null : value };
  } catch (error) {
    found[name] = { error: error?.name, message: error?.message };
  }
}
const opened = async (source, options) => {
  const runtime = await load(source, options);
  await runtime.close();
};
const drain = async (stream) => {
  let text = "";
  for await (const piece of stream) text += piece;
  return text;
};
const later = (ms) => new Promise((done) => setTimeout(done, ms));

for (const source of [undefined, null, 5, "", "nowhere", new URL("https://example.org/model/"), `${folder}/edgeprompt.json`]) {
  await say(`load ${String(source).replace(folder, "")}`, () => opened(source, {}));
}
for (const [name, options] of Object.entries({
  "null": null, "prompts text": { prompts: words }, "prompts object": { prompts: { words } }, "worker object": { worker: {} },
  "worker text": { worker: "x" }, "threads 0": { threads: 0 }, "threads many": { threads: 1e9 }, "kvBudget text": { kvBudget: "1" },
  "kvBudget NaN": { kvBudget: NaN }, "provider number": { provider: 5 }, "provider unknown": { provider: "metal" },
  "onProgress": { onProgress: 5 }, "signal": { signal: {} }, "misspelt": { prompt: [words] }, "cache": { cache: "never" },
})) await say(`load with ${name}`, () => opened(folder, options));
await say("load aborted", () => opened(folder, { signal: AbortSignal.abort() }));
for (const worker of [true, false]) {
  await say(`load aborted soon, ${worker ? "in a worker" : "here"}`, () => opened(folder, { worker, signal: AbortSignal.timeout(1) }));
}

const rt = await load(folder, { threads: 1, prompts: [words, story] });
const ask = { prompt: "words" };
for (const [name, text] of Object.entries({
  "undefined": undefined, "null": null, "number": 5, "list of numbers": [1], "function": () => 1, "half a pair": "\ud800",
  "slots lacking": {}, "a slot's number": { text: 5 }, "a Map": new Map([["text", "x"]]), "bytes": Buffer.from("abc"),
})) await say(`text ${name}`, () => rt.classify(text, ask));
for (const [name, options] of Object.entries({
  "null": null, "text": "words", "misspelt": { promt: "words" }, "prompt number": { prompt: 5 }, "prompt __proto__": { prompt: "__proto__" },
  "timeout text": { ...ask, timeout: "1" }, "timeout NaN": { ...ask, timeout: NaN }, "timeout function": { ...ask, timeout: () => 1 },
  "signal": { ...ask, signal: {} }, "truncate text": { ...ask, truncate: "no" }, "inputIds typed": { ...ask, inputIds: new Int32Array(2) },
})) await say(`classify with ${name}`, () => rt.classify("x", options));
for (const [name, options] of Object.entries({
  "maxNewTokens text": { maxNewTokens: "5" }, "maxNewTokens half": { maxNewTokens: 1.5 }, "stop number": { stop: 5 },
  "choices text": { choices: "a" }, "seed too large": { seed: 1n << 64n, temperature: 1 }, "logprobs number": { logprobs: 5 },
  "temperature": { temperature: Infinity },
})) await say(`generate with ${name}`, () => rt.generate("x", options));
await say("stop null", async () => (await rt.generate("x", { stop: null, maxNewTokens: 2 })).tokenIds.length);
await say("run undefined", () => rt.run());
await say("run null", () => rt.run([null]));
await say("runTasks text", () => rt.runTasks("x", "words"));
await say("embed text", () => rt.embed("x"));
await say("embed misspelt", () => rt.embed(["x"], { promt: "words" }));
await say("logits misspelt", () => rt.logits("x", { promt: "words" }));
await say("calibration text", () => rt.calibration("words", "abc"));
await say("calibration empty", () => rt.calibration("words", []));
for (const [name, prompt] of Object.entries({
  "undefined": undefined, "number": 5, "object": {}, "Blob": new Blob(["x"]), "URL": "https://example.org/x.safetensors",
  "folder": folder, "manifest": `${folder}/edgeprompt.json`, "weights": `${folder}/model.onnx.data`, "no bytes": new Uint8Array(),
})) await say(`addPrompt ${name}`, () => rt.addPrompt(prompt));
for (const [name, options] of Object.entries({ "text": "z", "name number": { name: 5 }, "name empty": { name: "" }, "misspelt": { nam: "z" } })) {
  await say(`addPrompt with ${name}`, () => rt.addPrompt(words, options));
}
await say("prompts", () => rt.prompts());
await say("bytes of a prompt", () => rt.addPrompt(readFileSync(words), { name: "bytes" }));

for (const char of ["\0", "\u202e", "\ufeff", "👩‍👩‍👧‍👦", "\u2028", "\r\n", "ﷺ", "\u0085", ""]) {
  await say(`odd text ${JSON.stringify(char)}`, async () => (await rt.classify(char, ask)).label);
}
await say("a long text", () => rt.classify("word ".repeat(60_000), ask));
await say("a long text, cut", async () => (await rt.classify("word ".repeat(60_000), { ...ask, truncate: true })).timings.inputTokens);
await say("one of two aborted", async () => {
  const controller = new AbortController();
  const one = rt.generate("x", { maxNewTokens: 110, signal: controller.signal }).catch(({ name }) => name);
  const two = rt.generate("y", { maxNewTokens: 9 });
  controller.abort();
  return [await one, (await two).tokenIds.length];
});
await say("a stream that is left", async () => {
  for await (const _ of rt.stream("x", { maxNewTokens: 100 })) break;
  return (await rt.generate("x", { maxNewTokens: 2 })).tokenIds.length;
});
await say("a stream's wrong option", () => drain(rt.stream("x", { maxNewTokens: "x" })));
await say("onResult that throws", () => drain(rt.stream("x", { maxNewTokens: 3, onResult: () => { throw new Error("mine"); } })));
await say("two runtimes", async () => {
  const other = await load(folder, { threads: 1, prompts: [words] });
  const labels = await Promise.all([rt, other].map((one) => one.classify("x", ask)));
  await other.close();
  return [labels[0].label === labels[1].label, !!(await rt.classify("x", ask)).label];
});
await say("disposed", async () => {
  const other = await load(folder, { threads: 1, prompts: [words] });
  await other[Symbol.asyncDispose]();
  return other.classify("x", ask).catch(({ name }) => name);
});
await say("a hundred at once", async () => (await Promise.all(Array.from({ length: 100 }, (_, i) => rt.classify(`${i}`, ask)))).length);
await say("closed while busy", async () => {
  const busy = rt.generate("x", { maxNewTokens: 110 }).catch(({ name }) => name);
  await later(5);
  await rt.close();
  await rt.close();
  return busy;
});
await say("after that", () => rt.classify("x", ask));
process.stdout.write(`${JSON.stringify(found)}\n`);
