// Runs what a bundler made of the sample in headless Chromium; tokens on stdout.
import { readFileSync } from "node:fs";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { openBrowser } from "../tools/browser.mjs";

const home = dirname(dirname(fileURLToPath(import.meta.url)));
const { executable, env, out, model } = JSON.parse(readFileSync(0, "utf8"));
const { browser, origin, close } = await openBrowser({
  executable, env,
  roots: { "/out/": `${out}/`, "/model/": `${model}/`, "/ort/": `${home}/node_modules/onnxruntime-web/dist/` },
  pages: { "/": "<!doctype html><title>test</title>" },
});
try {
  const page = await browser.newPage();
  await page.goto(`${origin}/`);
  const found = await page.evaluate(async (origin) => {
    const { open } = await import(`${origin}/out/bundled.js`);
    const runtime = await open(`${origin}/model/`, `${origin}/ort/`);
    const { tokenIds } = await runtime.generate("a", { maxNewTokens: 5 });
    await runtime.close();
    return tokenIds;
  }, origin);
  process.stdout.write(JSON.stringify(found) + "\n");
} finally {
  await close();
}
process.exit(0);
