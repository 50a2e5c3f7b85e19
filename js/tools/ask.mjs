// Asks a package in headless Chromium. JSON from stdin: {executable, env, package, prompts: {name: file}, calls:
// [[method, ...arguments]], options, isolated, args}; the answers on stdout, an error as {error, message}.
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { openBrowser } from "./browser.mjs";

const home = dirname(dirname(fileURLToPath(import.meta.url)));
const { executable, env, package: folder, prompts = {}, calls, options = {}, isolated = false, args } = JSON.parse(readFileSync(0, "utf8"));
const files = Object.entries(prompts);
const { browser, origin, close } = await openBrowser({
  executable, env, isolated, ...(args ? { args } : {}),
  roots: {
    "/js/": `${home}/dist/`, "/ort/": `${home}/node_modules/onnxruntime-web/dist/`, "/package/": `${folder}/`,
    ...Object.fromEntries(files.map(([name, file]) => [`/prompts/${name}/`, `${dirname(file)}/`])),
  },
  pages: { "/": "<!doctype html><title>ask</title>" },
});
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(0);
  await page.goto(`${origin}/`);
  const asked = { origin, calls, options, files: files.map(([name, file]) => [name, `${origin}/prompts/${name}/${basename(file)}`]) };
  const found = await page.evaluate(async ({ origin, calls, options, files }) => {
    const { load } = await import(`${origin}/js/browser.js`);
    const ort = `${origin}/ort/ort.${options.provider === "webgpu" ? "webgpu" : "wasm"}.bundle.min.mjs`;
    const runtime = await load(`${origin}/package/`, { ort, wasmPaths: `${origin}/ort/`, ...options });
    for (const [name, file] of files) await runtime.addPrompt(file, { name });
    const plain = (one) => (one instanceof Float32Array ? [...one] : Array.isArray(one) ? one.map(plain) : one);
    const answers = [];
    for (const [method, ...given] of calls) {
      answers.push(await runtime[method](...given).then(plain, ({ name, message }) => ({ error: name, message })));
    }
    await runtime.close();
    return answers;
  }, asked);
  process.stdout.write(`${JSON.stringify({ found, browser: browser.browser()?.version() ?? "" })}\n`);
} finally {
  await close();
}
process.exit(0);
