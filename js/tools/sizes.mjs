// What an app's bundler makes of the package (esbuild, minified, tree-shaken): gzipped bytes of each file that is loaded.
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const home = dirname(dirname(fileURLToPath(import.meta.url)));
const folder = mkdtempSync(join(tmpdir(), "edgeprompt-sizes-"));
mkdirSync(join(folder, "node_modules"));
symlinkSync(home, join(folder, "node_modules/edgeprompt"));
const sources = {
  page: `import { load } from "edgeprompt"; globalThis.load = (url, worker) => load(url, { worker });`,
  worker: `import "edgeprompt/worker";`,
};
const pure = (code) => code.replace(/"[A-Za-z0-9+/=]{40,}"/g, '""');
const found = {};
for (const [name, source] of Object.entries(sources)) {
  const entry = join(folder, `${name}.js`);
  writeFileSync(entry, source);
  const { outputFiles, metafile } = await build({
    entryPoints: [entry], bundle: true, minify: true, format: "esm", splitting: true, platform: "browser", write: false, metafile: true,
    outdir: join(folder, "out"), absWorkingDir: folder, preserveSymlinks: true, logLevel: "error",
    external: ["onnxruntime-web", "onnxruntime-web/*", "@huggingface/jinja"],
  });
  const needed = new Set([join(folder, "out", `${name}.js`)]);
  const outputs = Object.entries(metafile.outputs).map(([path, one]) => [join(folder, path), one]);
  for (const path of needed) {
    const one = outputs.find(([other]) => other === path)?.[1];
    for (const { kind, path: to, external } of one?.imports ?? []) if (kind === "import-statement" && !external) needed.add(join(folder, to));
  }
  const codes = outputFiles.filter(({ path }) => needed.has(path)).map(({ text }) => text);
  found[name] = { gzipped: gzipSync(codes.join("\n")).length, without_unicode_tables: gzipSync(codes.map(pure).join("\n")).length };
}
rmSync(folder, { recursive: true });
console.log(JSON.stringify(found, null, 1));
