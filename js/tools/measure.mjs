// Times packages in headless Chromium on one thread, beside transformers.js on the same weights. JSON from stdin:
// {executable, env, packages: {name: folder}, beside: name, prompt: file, text, snippets, suffix, leads: {name: text or
// number of positions}, tokens: {name: n}, rounds}. `leads`: what transformers.js reads in front of a snippet and its suffix.
import { readFileSync, readdirSync } from "node:fs";
import { basename, dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { openBrowser } from "./browser.mjs";

const home = dirname(dirname(fileURLToPath(import.meta.url)));
const { executable, env, packages, beside, prompt, text, snippets, suffix, leads, tokens, rounds } = JSON.parse(readFileSync(0, "utf8"));
const imports = {
  "@huggingface/transformers": "/transformers/transformers.web.min.js",
  "onnxruntime-web/webgpu": "/ort/ort.webgpu.bundle.min.mjs",
  "onnxruntime-web": "/ort/ort.bundle.min.mjs",
  "onnxruntime-common": "/ort-common/index.js",
};
const modules = `${home}/node_modules`;
const { browser, fetched, origin, close } = await openBrowser({
  executable, env,
  roots: {
    "/js/": `${home}/dist/`,
    "/ort/": `${modules}/onnxruntime-web/dist/`,
    "/ort-common/": `${modules}/onnxruntime-common/dist/esm/`,
    "/transformers/": `${modules}/@huggingface/transformers/dist/`,
    "/prompts/": `${dirname(prompt)}/`,
    ...Object.fromEntries(Object.entries(packages).map(([name, folder]) => [`/models/${name}/`, `${folder}/`])),
  },
  pages: { "/": `<!doctype html><title>measure</title><script type="importmap">${JSON.stringify({ imports })}</script>` },
});

/** Peak resident bytes of the largest renderer process of this browser. */
function peak() {
  let most = 0;
  for (const id of readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    try {
      if (!readFileSync(`/proc/${id}/cmdline`, "utf8").includes("--type=renderer")) continue;
      const found = /VmHWM:\s+(\d+) kB/.exec(readFileSync(`/proc/${id}/status`, "utf8"));
      most = Math.max(most, 1024 * Number(found?.[1] ?? 0));
    } catch {
      continue; // it has ended
    }
  }
  return most;
}

async function openOurs(name) {
  const page = await browser.newPage();
  await page.goto(`${origin}/`);
  fetched.length = 0;
  const loadMs = await page.evaluate(
    async ({ origin, name, prompt }) => {
      const { load } = await import(`${origin}/js/browser.js`);
      const started = performance.now();
      globalThis.runtime = await load(`${origin}/models/${name}/`, {
        ort: `${origin}/ort/ort.wasm.bundle.min.mjs`, wasmPaths: `${origin}/ort/`, allowOtherWeights: true,
      });
      const taken = performance.now() - started;
      await runtime.addPrompt(`${origin}/prompts/${prompt}`, { name: "task" });
      return taken;
    },
    { origin, name, prompt: basename(prompt) },
  );
  return { page, loadMs, weights: fetched.filter((path) => /\.onnx(\.|_)data/.test(path)).length };
}

const askOurs = (page, count) =>
  page.evaluate(
    async ({ text, count }) => {
      const { tokenIds, timings } = await runtime.generate(text, { maxNewTokens: count });
      return { tokenIds, ms: (1000 * (timings.total - timings.ttft)) / (tokenIds.length - 1) };
    },
    { text, count },
  );
const classifyOurs = (page, text) =>
  page.evaluate(async (text) => {
    const started = performance.now();
    const { label } = await runtime.classify(text, { prompt: "task" });
    return { label, ms: performance.now() - started };
  }, text);

const results = {};
for (const name of Object.keys(packages)) {
  const first = await openOurs(name);
  const memory = peak();
  const times = [];
  let tokenIds;
  for (let round = 0; round < (tokens[name] > 8 ? rounds : 2); round++) {
    const found = await askOurs(first.page, tokens[name]);
    times.push(found.ms);
    tokenIds = found.tokenIds;
  }
  await first.page.evaluate(() => runtime.close());
  await first.page.close();
  const second = await openOurs(name);
  await second.page.evaluate(() => runtime.close());
  await second.page.close();
  results[name] = {
    token_ms: times, token_ids: tokenIds, first_load_ms: first.loadMs, first_files: first.weights,
    second_load_ms: second.loadMs, second_files: second.weights, peak_bytes: memory,
  };
  console.error(name, JSON.stringify(results[name]));
}

// Side by side, by turns: this package and transformers.js.
const ours = await openOurs(beside);
const theirs = await browser.newPage();
await theirs.goto(`${origin}/`);
const theirLoad = await theirs.evaluate(
  async ({ origin, beside }) => {
    const { AutoModelForCausalLM, AutoTokenizer, env } = await import("@huggingface/transformers");
    Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/models/" });
    env.backends.onnx.wasm.wasmPaths = `${origin}/ort/`;
    env.backends.onnx.wasm.numThreads = 1;
    const started = performance.now();
    globalThis.model = await AutoModelForCausalLM.from_pretrained(beside, { device: "wasm" });
    globalThis.tokenizer = await AutoTokenizer.from_pretrained(beside);
    return performance.now() - started;
  },
  { origin, beside },
);
const askTheirs = (count) =>
  theirs.evaluate(
    async ({ text, count }) => {
      const inputs = tokenizer(text);
      const times = [];
      const output = await model.generate({
        ...inputs, max_new_tokens: count, do_sample: false, streamer: { put: () => times.push(performance.now()), end() {} },
      });
      const tokenIds = Array.from(output.data, Number).slice(inputs.input_ids.dims[1]);
      const last = times.slice(-tokenIds.length);
      return { tokenIds, ms: (last.at(-1) - last[0]) / (last.length - 1) };
    },
    { text, count },
  );
/** One forward pass over a lead (a text, or as many positions) and a text. */
const forwardTheirs = (lead, text) =>
  theirs.evaluate(
    async ({ lead, text }) => {
      const { Tensor } = await import("@huggingface/transformers");
      const started = performance.now();
      let inputs = tokenizer(typeof lead === "number" ? text : lead + text);
      if (typeof lead === "number") {
        const ids = [...Array(lead).fill(28n), ...inputs.input_ids.data];
        inputs = {
          input_ids: new Tensor("int64", BigInt64Array.from(ids), [1, ids.length]),
          attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), [1, ids.length]),
        };
      }
      await model(inputs);
      return { ms: performance.now() - started, positions: inputs.input_ids.dims[1] };
    },
    { lead, text },
  );
const pairs = { token_ms: { ours: [], theirs: [] } };
for (const name of Object.keys(leads)) pairs[name] = { ours: [], theirs: [], positions: [] };
let same = true;
for (let round = 0; round < rounds + 1; round++) {
  const [one, other] = [await askOurs(ours.page, tokens[beside]), await askTheirs(tokens[beside])];
  same &&= one.tokenIds.join() === other.tokenIds.join();
  if (!round) continue; // warm
  pairs.token_ms.ours.push(one.ms);
  pairs.token_ms.theirs.push(other.ms);
}
const labels = [];
for (const [at, snippet] of snippets.entries()) {
  for (const [place, [name, lead]] of Object.entries(leads).entries()) {
    const [one, other] = [await classifyOurs(ours.page, snippet), await forwardTheirs(lead, snippet + suffix)];
    if (!place) labels.push(one.label);
    if (!at) continue;
    pairs[name].ours.push(one.ms);
    pairs[name].theirs.push(other.ms);
    pairs[name].positions.push(other.positions);
  }
}
const browserVersion = browser.browser()?.version() ?? "";
await close();
process.stdout.write(JSON.stringify({ results, pairs, same_tokens: same, labels, their_load_ms: theirLoad, browser: browserVersion }) + "\n");
process.exit(0);
