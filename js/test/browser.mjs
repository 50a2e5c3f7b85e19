// Serves folders to headless Chromium and runs a test page's questions there: JSON from stdin, results on stdout.
import { createServer } from "node:http";
import { createReadStream, mkdtempSync, readFileSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const home = dirname(dirname(fileURLToPath(import.meta.url)));
const { executable, env, folders, calls, prompts, isolated } = JSON.parse(readFileSync(0, "utf8"));
const roots = { "/js/": `${home}/dist/`, "/ort/": `${home}/node_modules/onnxruntime-web/dist/`, ...folders };
const types = { ".js": "text/javascript", ".mjs": "text/javascript", ".json": "application/json", ".wasm": "application/wasm" };
const fetched = [];
let serving = true;

const server = createServer((request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, "http://x").pathname));
  if (!serving) return response.destroy();
  fetched.push(path);
  if (isolated) {
    response.setHeader("Cross-Origin-Opener-Policy", "same-origin");
    response.setHeader("Cross-Origin-Embedder-Policy", "require-corp");
  }
  if (path === "/") return response.setHeader("content-type", "text/html").end("<!doctype html><title>test</title>");
  const root = Object.keys(roots).find((one) => path.startsWith(one));
  const file = root && join(roots[root], path.slice(root.length));
  const found = file && statSync(file, { throwIfNoEntry: false });
  if (!found?.isFile()) return response.writeHead(404).end();
  response.writeHead(200, {
    "content-type": types[extname(file)] ?? "application/octet-stream",
    "content-length": found.size,
    "cache-control": "max-age=3600",
  });
  createReadStream(file).pipe(response);
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const origin = `http://127.0.0.1:${server.address().port}`;

const profile = mkdtempSync(join(tmpdir(), "edgeprompt-chromium-"));
const browser = await chromium.launchPersistentContext(profile, {
  executablePath: executable,
  env: { ...process.env, ...env },
  args: ["--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});

/** Load the package in the page, ask everything, and say what was fetched for it. */
async function visit(page, damage = false) {
  fetched.length = 0;
  return page.evaluate(
    async ({ origin, calls, prompts, damage }) => {
      if (damage) {
        const cache = await caches.open("edgeprompt");
        for (const request of await cache.keys()) {
          if (request.url.includes("edgeprompt-cache/")) await cache.put(request, new Response("damaged"));
        }
      }
      const { load } = await import(`${origin}/js/browser.js`);
      const progress = [];
      const runtime = await load(`${origin}/package/`, {
        ort: `${origin}/ort/ort.wasm.bundle.min.mjs`,
        wasmPaths: `${origin}/ort/`,
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
    { origin, calls, prompts, damage },
  );
}

try {
  const page = await browser.newPage();
  await page.goto(`${origin}/`);
  const first = await visit(page);
  const firstFetched = [...fetched];
  const second = await visit(page);
  const secondFetched = [...fetched];
  const third = await visit(page, true);
  const thirdFetched = [...fetched];
  process.stdout.write(JSON.stringify({ first, firstFetched, second, secondFetched, third, thirdFetched }) + "\n");
} finally {
  await browser.close();
  server.close();
  rmSync(profile, { recursive: true, force: true });
}
process.exit(0);
