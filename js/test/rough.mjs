// A page whose network, disk or context misbehaves. JSON from stdin: {executable, env, package, prompt}; what came of each
// case on stdout.
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { openBrowser } from "../tools/browser.mjs";

const home = dirname(dirname(fileURLToPath(import.meta.url)));
const { executable, env, package: folder, prompt } = JSON.parse(readFileSync(0, "utf8"));
const html = "<!doctype html><title>rough</title>";
const { browser, fetched, state, origin, close } = await openBrowser({
  executable, env, caching: "no-store", args: ["--disable-gpu", "--host-resolver-rules=MAP insecure.example 127.0.0.1"],
  roots: {
    "/js/": `${home}/dist/`, "/ort/": `${home}/node_modules/onnxruntime-web/dist/`, "/package/": `${folder}/`,
    "/prompts/": `${dirname(prompt)}/`,
  },
  pages: { "/": html, "/app/edgeprompt.json": html },
});
const found = {};
const weights = () => fetched.filter((path) => path.endsWith(".onnx.data")).length;

/** In a page: load, label a text, close. `ask` may abort, or ask for more threads. */
const use = (page, ask = {}) =>
  page.evaluate(
    async ({ ask, prompt }) => {
      const { url = "/package/", abortAfter, cache, threads, twice } = ask;
      const here = location.origin;
      try {
        const { load } = await import(`${here}/js/browser.js`);
        const options = { ort: `${here}/ort/ort.wasm.bundle.min.mjs`, wasmPaths: `${here}/ort/`, ...(cache ? { cache } : {}), ...(threads ? { threads } : {}) };
        if (abortAfter) options.signal = AbortSignal.timeout(abortAfter);
        const runtimes = await Promise.all((twice ? [1, 2] : [1]).map(() => load(`${here}${url}`, options)));
        const labels = [];
        for (const runtime of runtimes) {
          await runtime.addPrompt(`${here}/prompts/${prompt}`, { name: "task" });
          labels.push((await runtime.classify("The plot is thin.", { prompt: "task" })).label);
        }
        await Promise.all(runtimes.map((one) => one.close()));
        return { labels };
      } catch ({ name, message }) {
        return { error: name, message };
      }
    },
    { ask, prompt: basename(prompt) },
  );

async function visit(name, ask, before, at = origin) {
  const page = await browser.newPage();
  await page.goto(`${at}/`);
  await before?.(page);
  fetched.length = 0;
  found[name] = { ...(await use(page, ask)), weights: weights() };
  await page.close();
}
const within = async (action) => {
  const page = await browser.newPage();
  await page.goto(`${origin}/`);
  await action(page);
  await page.close();
};

try {
  await visit("no package", { url: "/nowhere/" });
  await visit("a page in its place", { url: "/app/" });
  await visit("insecure", {}, null, origin.replace("127.0.0.1", "insecure.example"));
  state.half = ".onnx.data";
  await visit("aborted while it downloads", { abortAfter: 1500 });
  state.then = "break";
  await visit("a connection that breaks", {});
  state.then = "stay";
  await within(async (page) => {
    void use(page).catch(() => undefined);
    await page.waitForTimeout(1500);
    await page.reload(); // in the middle of the download
    state.half = null;
    fetched.length = 0;
    found["reloaded"] = { ...(await use(page)), weights: weights() };
  });
  await visit("then from the cache", {});
  await within((page) => page.evaluate(() => caches.delete("edgeprompt")));
  await visit("no room", {}, async (page) => {
    const session = await page.context().newCDPSession(page);
    await session.send("Storage.overrideQuotaForOrigin", { origin, quotaSize: 1024 });
  });
  await visit("still no room", {});
  await within(async (page) => {
    const session = await page.context().newCDPSession(page);
    await session.send("Storage.overrideQuotaForOrigin", { origin });
  });
  await visit("cache none", { cache: "none" });
  await visit("two at once", { twice: true });
  await visit("threads without isolation", { threads: 4 });
  await within(async (page) => {
    const other = await browser.newPage();
    await other.goto(`${origin}/`);
    const both = await Promise.all([use(page), use(other)]);
    found["two tabs"] = { labels: both.flatMap(({ labels, error }) => labels ?? error) };
    await other.close();
  });
  process.stdout.write(`${JSON.stringify(found)}\n`);
} finally {
  await close();
}
process.exit(0);
