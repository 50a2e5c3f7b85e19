// Builds dist/: ESM for Node and browsers, CommonJS for Node, workers, declarations. `node build.mjs`
import { execFileSync } from "node:child_process";
import { copyFileSync, readFileSync, rmSync } from "node:fs";
import { gzipSync } from "node:zlib";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const MOST_BYTES = 44_500; // of own code for browsers, gzipped, without Unicode tables; the aim is 25,000
const home = dirname(fileURLToPath(import.meta.url));
process.chdir(home);
rmSync("dist", { recursive: true, force: true });

const shared = {
  bundle: true,
  minify: true,
  sourcemap: true,
  target: "es2022",
  external: ["onnxruntime-node", "onnxruntime-web", "onnxruntime-web/*", "@huggingface/jinja"],
  logLevel: "warning",
  metafile: true,
};
const node = { ...shared, platform: "node", format: "esm" };
const browser = { ...shared, platform: "browser", format: "esm" };
await build({ ...node, entryPoints: ["src/node.ts"], outfile: "dist/index.js" });
await build({ ...node, entryPoints: ["src/worker-node.ts"], outfile: "dist/worker.js" });
await build({
  ...node,
  format: "cjs",
  entryPoints: ["src/node.ts"],
  outfile: "dist/index.cjs",
  define: { "import.meta.url": "commonJsUrl" },
  banner: { js: 'const commonJsUrl = require("node:url").pathToFileURL(__filename).href;' },
});
const page = await build({
  ...browser,
  entryPoints: ["src/browser.ts", "src/worker-browser.ts", "src/formats.ts"],
  outdir: "dist",
  splitting: true, // the page has the runtime's face, the worker the rest, and neither has it twice
  chunkNames: "chunks/[name]-[hash]",
});

const require = createRequire(import.meta.url);
const compiler = join(dirname(require.resolve("typescript/package.json")), "bin/tsc");
execFileSync(process.execPath, [compiler, "-p", "."], { stdio: "inherit" });
copyFileSync("dist/types/node.d.ts", "dist/types/node.d.cts");

/** Bytes of a browser's files, gzipped, without Unicode tables; `inputs` says how many each source has, minified. */
const outputs = Object.entries(page.metafile.outputs).filter(([file]) => file.endsWith(".js"));
const pure = (code) => code.replace(/"[A-Za-z0-9+/=]{40,}"/g, '""');
const size = (code) => gzipSync(code).length;
const codes = outputs.map(([file]) => readFileSync(file, "utf8"));
const own = size(codes.map(pure).join("\n"));
console.log(`browser: ${size(codes.join("\n"))} bytes gzipped, ${own} without Unicode tables`);
if (own > MOST_BYTES) {
  console.error(`own code is ${own} bytes gzipped, at most ${MOST_BYTES} are allowed`);
  process.exit(1);
}
if (process.argv.includes("--sizes")) {
  const inputs = outputs.flatMap(([, { inputs }]) => Object.entries(inputs));
  for (const [file, { bytesInOutput }] of inputs.sort((a, b) => b[1].bytesInOutput - a[1].bytesInOutput)) console.log(bytesInOutput, file);
}
