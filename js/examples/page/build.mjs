// Puts the page, the npm package, ONNX Runtime, a model and prompts into one static folder:
//   node build.mjs SITE MODEL PROMPT.safetensors...
import { createHash } from "node:crypto";
import { copyFileSync, cpSync, existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parsePrompt } from "edgeprompt";

const here = dirname(fileURLToPath(import.meta.url));
const [site, model, ...prompts] = process.argv.slice(2);
if (!prompts.length) {
  console.error("usage: node build.mjs SITE MODEL PROMPT.safetensors...");
  process.exit(2);
}
if (existsSync(site)) {
  console.error(`${site} exists; give a new folder`);
  process.exit(1);
}
const { resolve } = createRequire(import.meta.url);
const shell = []; // what the service worker keeps
function put(from, to, keep = true) {
  mkdirSync(dirname(join(site, to)), { recursive: true });
  copyFileSync(from, join(site, to));
  if (keep) shell.push(to);
}
for (const file of ["index.html", "page.js"]) put(join(here, file), file);
const package_ = dirname(resolve("edgeprompt/package.json"));
const chunks = readdirSync(join(package_, "dist/chunks")).filter((file) => file.endsWith(".js"));
for (const file of ["browser.js", "worker-browser.js", ...chunks.map((file) => `chunks/${file}`)]) put(join(package_, "dist", file), `edgeprompt/${file}`);
const ort = dirname(resolve("onnxruntime-web"));
for (const file of ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]) put(join(ort, file), `ort/${file}`);
cpSync(model, join(site, "model"), { recursive: true });
const tasks = prompts.map((path) => {
  const { name, task } = parsePrompt(readFileSync(path), path);
  const file = `prompts/${basename(path)}`;
  put(path, file);
  return { name, task, file };
});
writeFileSync(join(site, "site.json"), JSON.stringify({ prompts: tasks }, null, 1));
shell.push("site.json");
const digest = createHash("sha256");
for (const file of shell) digest.update(file).update(readFileSync(join(site, file)));
const worker = readFileSync(join(here, "sw.js"), "utf8");
writeFileSync(
  join(site, "sw.js"),
  worker.replace('"VERSION"', JSON.stringify(digest.digest("hex").slice(0, 16))).replace('["./"]', JSON.stringify(["./", ...shell])),
);
console.log(`${site}: serve it with any static server, for example npx http-server ${site}`);
