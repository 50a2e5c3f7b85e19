// For a bundler: esbuild bundled.js worker.js --bundle --format=esm --outdir=out --external:node:*
import { load } from "edgeprompt";

/** Load a package with the bundled worker; ONNX Runtime's .wasm files lie at `wasmPaths`. */
export function open(url, wasmPaths) {
  return load(url, { wasmPaths, worker: new Worker(new URL("./worker.js", import.meta.url), { type: "module" }) });
}
