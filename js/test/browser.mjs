// Runs a test's questions in headless Chromium: JSON from stdin, results on stdout.
import { readFileSync } from "node:fs";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { openBrowser } from "../tools/browser.mjs";

const home = dirname(dirname(fileURLToPath(import.meta.url)));
const { executable, env, folders, calls, prompts, isolated, provider = "wasm" } = JSON.parse(readFileSync(0, "utf8"));
const gpu = provider === "webgpu";
const { browser, fetched, origin, close } = await openBrowser({
  executable, env, isolated,
  roots: { "/js/": `${home}/dist/`, "/ort/": `${home}/node_modules/onnxruntime-web/dist/`, ...folders },
  pages: { "/": "<!doctype html><title>test</title>" },
  ...(gpu ? { args: ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"] } : {}),
});

/** Load the package in the page, ask everything, and say what was fetched for it. */
async function visit(page, damage = false) {
  fetched.length = 0;
  return page.evaluate(
    async ({ origin, calls, prompts, damage, provider }) => {
      if (damage) {
        const cache = await caches.open("edgeprompt");
        for (const request of await cache.keys()) {
          if (request.url.includes("edgeprompt-cache/")) await cache.put(request, new Response("damaged"));
        }
      }
      const { load } = await import(`${origin}/js/browser.js`);
      const progress = [];
      const runtime = await load(`${origin}/package/`, {
        ort: `${origin}/ort/ort.${provider === "webgpu" ? "webgpu" : "wasm"}.bundle.min.mjs`,
        wasmPaths: `${origin}/ort/`,
        provider,
        onProgress: ({ file, loaded, total }) => progress.push([file, loaded, total]),
      });
      for (const prompt of prompts) await runtime.addPrompt(`${origin}/prompts/${prompt}`);
      const results = [];
      for (const { method, args } of calls) results.push(await runtime[method](...args));
      const pieces = [];
      const reader = runtime.manifest.architecture === "encoder-only" ? null : runtime.stream("a", { maxNewTokens: 3 }).getReader();
      for (let next = await reader?.read(); next && !next.done; next = await reader.read()) pieces.push(next.value);
      await runtime.close();
      return { results, progress, pieces, isolated: crossOriginIsolated };
    },
    { origin, calls, prompts, damage, provider },
  );
}

try {
  const page = await browser.newPage();
  await page.goto(`${origin}/`);
  const first = await visit(page);
  const firstFetched = [...fetched];
  const second = await visit(page);
  const secondFetched = [...fetched];
  const third = gpu ? null : await visit(page, true);
  const thirdFetched = [...fetched];
  process.stdout.write(JSON.stringify({ first, firstFetched, second, secondFetched, third, thirdFetched }) + "\n");
} finally {
  await close();
}
process.exit(0);
