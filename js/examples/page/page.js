// The page: one package is loaded once, and every prompt of site.json is a task that it can be asked.
import { load } from "./edgeprompt/browser.js";

const find = (id) => document.getElementById(id);
const here = (path) => new URL(path, location.href).href;
const say = (text) => (find("status").textContent = text);
if ("serviceWorker" in navigator) navigator.serviceWorker.register("sw.js");

const loaded = new Map();
const started = performance.now();
const site = await (await fetch("site.json")).json();
let runtime;
try {
  runtime = await load(here("model/"), {
    ort: here("ort/ort.wasm.bundle.min.mjs"),
    wasmPaths: here("ort/"),
    onProgress({ file, loaded: bytes, total }) {
      loaded.set(file, [bytes, total]);
      const [have, all] = [...loaded.values()].reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
      find("progress").value = have / all;
      say(`Loading: ${(have / 1e6).toFixed(0)} of ${(all / 1e6).toFixed(0)} MB`);
    },
  });
  for (const { file } of site.prompts) await runtime.addPrompt(here(file));
} catch (error) {
  say(`${error.name}: ${error.message}`);
  throw error;
}
find("progress").hidden = true;
say(`Ready in ${((performance.now() - started) / 1000).toFixed(1)} s: ${runtime.manifest.base.name}, ${runtime.manifest.precision}`);
for (const { name } of site.prompts) find("task").add(new Option(name, name));
find("task").disabled = false;

function showLabels(scores) {
  find("labels").replaceChildren(
    ...Object.entries(scores)
      .sort((a, b) => b[1] - a[1])
      .map(([label, score]) => {
        const row = document.createElement("div");
        row.className = "row";
        row.dataset.label = label;
        const [name, bar, value] = ["span", "meter", "span"].map((tag) => document.createElement(tag));
        name.textContent = label;
        bar.value = score;
        value.textContent = `${(100 * score).toFixed(1)} %`;
        row.append(name, bar, value);
        return row;
      }),
  );
}

function showFigures({ ttft, total, newTokens }) {
  const rate = newTokens > 1 ? `, ${((newTokens - 1) / (total - ttft)).toFixed(1)} tokens/s` : "";
  find("figures").textContent = `first token ${(1000 * ttft).toFixed(0)} ms${rate}`;
}

let running = null;
/** Ask the chosen task about the text; a new question stops the last one. */
async function ask() {
  running?.abort();
  const controller = (running = new AbortController());
  const { signal } = controller;
  const task = site.prompts[find("task").selectedIndex];
  const text = find("input").value;
  document.body.dataset.answered = "";
  find("labels").replaceChildren();
  find("text").textContent = find("figures").textContent = "";
  if (!text.trim()) return;
  find("stop").disabled = false;
  try {
    if (task.task === "classify") {
      const found = await runtime.classify(text, { prompt: task.name, signal, truncate: true });
      showLabels(found.scores);
      if (found.timings) showFigures(found.timings);
    } else {
      const onResult = (result) => showFigures(result.timings);
      for await (const piece of runtime.stream(text, { prompt: task.name, signal, truncate: true, maxNewTokens: 60, onResult })) {
        if (running === controller) find("text").textContent += piece;
      }
    }
    if (running === controller) document.body.dataset.answered = task.name;
  } catch (error) {
    if (error.name !== "RequestCancelledError") say(`${error.name}: ${error.message}`);
  } finally {
    if (running === controller) find("stop").disabled = true;
  }
}

let waiting;
find("input").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(ask, 300);
});
find("task").addEventListener("change", ask);
find("stop").addEventListener("click", () => running?.abort());
document.body.dataset.state = "ready";
await ask();
