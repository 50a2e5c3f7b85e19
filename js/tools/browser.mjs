// Headless Chromium and the folders that it may fetch from: for tests and measurements.
import { createServer } from "node:http";
import { createReadStream, mkdtempSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { extname, join, normalize } from "node:path";
import { chromium } from "playwright-core";

const types = {
  ".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript",
  ".json": "application/json", ".wasm": "application/wasm",
};
const quiet = ["--no-sandbox", "--no-zygote", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];

/**
 * `roots`: path that a URL begins with -> folder; `pages`: path -> HTML.
 * Says what was fetched in `fetched`; `state.serving = false` is a server that is gone, `state.half` an ending of paths
 * that get half of their bytes: "stay" leaves the connection open, "break" closes it.
 */
export async function openBrowser({ executable, env, roots, pages = {}, isolated = false, caching = "max-age=3600", args = ["--disable-gpu"] }) {
  const fetched = [];
  const state = { serving: true, half: null, then: "stay" };
  const server = createServer((request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url, "http://x").pathname));
    if (!state.serving) return response.destroy();
    fetched.push(path);
    if (isolated) {
      response.setHeader("Cross-Origin-Opener-Policy", "same-origin");
      response.setHeader("Cross-Origin-Embedder-Policy", "require-corp");
    }
    if (path in pages) return response.setHeader("content-type", "text/html").end(pages[path]);
    const root = Object.keys(roots).filter((one) => path.startsWith(one)).sort((a, b) => b.length - a.length)[0];
    const file = root && join(roots[root], path.endsWith("/") ? `${path.slice(root.length)}index.html` : path.slice(root.length));
    const found = file && statSync(file, { throwIfNoEntry: false });
    if (!found?.isFile()) return response.writeHead(404).end();
    response.writeHead(200, {
      "content-type": types[extname(file)] ?? "application/octet-stream",
      "content-length": found.size,
      "cache-control": caching,
    });
    if (!state.half || !path.endsWith(state.half)) return createReadStream(file).pipe(response);
    const half = createReadStream(file, { end: Math.floor(found.size / 2) });
    half.on("end", () => state.then === "break" && response.destroy());
    half.pipe(response, { end: false });
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  const profile = mkdtempSync(join(tmpdir(), "edgeprompt-chromium-"));
  const browser = await chromium.launchPersistentContext(profile, {
    executablePath: executable,
    env: { ...process.env, ...env },
    args: [...quiet, ...args],
  });
  return {
    browser,
    fetched,
    state,
    origin: `http://127.0.0.1:${server.address().port}`,
    async close() {
      await browser.close();
      server.close();
      server.closeAllConnections();
      rmSync(profile, { recursive: true, force: true });
    },
  };
}
