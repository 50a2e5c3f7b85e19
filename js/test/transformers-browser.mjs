// As transformers.mjs, in headless Chromium: the package's web build, its files from node_modules.
import { readFileSync } from "node:fs";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { openBrowser } from "../tools/browser.mjs";

const home = dirname(dirname(fileURLToPath(import.meta.url)));
const { executable, env, models, model, calls, maxNewTokens, dtype = null } = JSON.parse(readFileSync(0, "utf8"));
const imports = {
  "@huggingface/transformers": "/transformers/transformers.web.min.js",
  "onnxruntime-web/webgpu": "/ort/ort.webgpu.bundle.min.mjs",
  "onnxruntime-web": "/ort/ort.bundle.min.mjs",
  "onnxruntime-common": "/ort-common/index.js",
};
const kvs = Object.fromEntries(calls.map(({ kv }, i) => [`/kv/${i}/`, `${dirname(kv)}/`]));
const { browser, origin, close } = await openBrowser({
  executable, env,
  roots: {
    "/transformers/": `${home}/node_modules/@huggingface/transformers/dist/`,
    "/ort/": `${home}/node_modules/onnxruntime-web/dist/`,
    "/ort-common/": `${home}/node_modules/onnxruntime-common/dist/esm/`,
    "/example/": `${home}/examples/transformers/`,
    "/models/": models,
    ...kvs,
  },
  pages: { "/": `<!doctype html><title>test</title><script type="importmap">${JSON.stringify({ imports })}</script>` },
});
try {
  const page = await browser.newPage();
  page.on("pageerror", (error) => console.error(error));
  await page.goto(`${origin}/`);
  const asked = calls.map(({ ids, kv }, i) => ({ ids, kv: `${origin}/kv/${i}/${kv.slice(dirname(kv).length + 1)}` }));
  const found = await page.evaluate(
    async ({ origin, model, asked, maxNewTokens, dtype }) => {
      const { AutoModelForCausalLM, env } = await import("@huggingface/transformers");
      const { inputsBehind, prefixOf } = await import(`${origin}/example/prefix.mjs`);
      env.allowRemoteModels = false;
      env.allowLocalModels = true;
      env.localModelPath = `${origin}/models/`;
      env.backends.onnx.wasm.wasmPaths = `${origin}/ort/`;
      const loaded = await AutoModelForCausalLM.from_pretrained(model, { device: "wasm", ...(dtype ? { dtype } : {}) });
      const found = [];
      for (const { ids, kv } of asked) {
        const prefix = prefixOf(await (await fetch(kv)).arrayBuffer());
        const output = await loaded.generate({ ...inputsBehind(prefix, ids), max_new_tokens: maxNewTokens, do_sample: false });
        found.push(Array.from(output.data, Number).slice(ids.length));
      }
      return found;
    },
    { origin, model, asked, maxNewTokens, dtype },
  );
  process.stdout.write(JSON.stringify({ found }) + "\n");
} finally {
  await close();
}
process.exit(0);
