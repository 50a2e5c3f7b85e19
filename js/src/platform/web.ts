/** Browsers: a package at a URL, its weights kept by their hash in the Cache API, run by onnxruntime-web. */

import { sha256 } from "../bytes.ts";
import { MissingDependencyError, PackageError, PromptFileError, ProviderError } from "../errors.ts";
import { repr } from "../json.ts";
import type { Manifest } from "../manifest.ts";
import { WITHOUT_FUSIONS, firstLine, openGraph, type Graph, type Ort } from "../ort.ts";
import { MAX_FILE_BYTES } from "../prompt.ts";
import type { Platform, Progress, ServiceOptions } from "../service.ts";

const CACHE = "edgeprompt";
/** A larger file than a page could hold in memory; ORT's wasm ends at 4 GB. */
const MOST_BYTES = 4 * 2 ** 30;

export async function webPlatform(source: string, options: ServiceOptions, onProgress: (progress: Progress) => void, signal?: AbortSignal): Promise<Platform> {
  const base = new URL(source.endsWith("/") ? source : `${source}/`, globalThis.location?.href);
  const provider = chooseProvider(options.provider ?? "auto");
  const device = provider === "webgpu" ? await gpuDevice() : null;
  const ort = await importOrt(options, provider);
  const files = new Files(base, options.cache ?? "default", onProgress, signal);
  return {
    provider,
    read: (file, most, hash) => files.read(file, most, hash ?? null),
    readPrompt: async (url) => {
      const found = await fetchBytes(new URL(url, base), MAX_FILE_BYTES).catch((error: unknown) => {
        throw new PromptFileError(`cannot read prompt file ${repr(url)}: ${firstLine(error)}`);
      });
      if (!found) throw new PromptFileError(`cannot read prompt file ${repr(url)}: there is no such file`);
      return found;
    },
    open: (manifest, key) => open(ort, files, manifest, key, device ? { name: provider, device } : provider),
  };
}

function chooseProvider(asked: string): string {
  const known: Record<string, string> = { auto: "wasm", cpu: "wasm", wasm: "wasm", webgpu: "webgpu" };
  const found = known[asked.toLowerCase()];
  if (!found) throw new ProviderError(`provider ${repr(asked)} is not known here (known: ${Object.keys(known).join(", ")})`);
  if (found === "webgpu" && !(globalThis.navigator as { gpu?: object } | undefined)?.gpu) {
    throw new ProviderError("provider 'webgpu' is not available in this browser; use 'wasm'");
  }
  return found;
}

/** The smallest subgroups with which ONNX Runtime's attention is known to be right. */
const LEAST_SUBGROUP = 8;

/**
 * A device without subgroups where the adapter's are too small (a software adapter has 4): ONNX Runtime 1.30's attention is
 * wrong there for 32 positions and more. Null: ONNX Runtime makes its own device.
 */
async function gpuDevice(): Promise<object | null> {
  const adapter = await (globalThis.navigator as any).gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw new ProviderError("provider 'webgpu' has no adapter in this browser; use 'wasm'");
  if (!(adapter.info?.subgroupMinSize < LEAST_SUBGROUP)) return null;
  const limits: Record<string, number> = {};
  for (const name in adapter.limits) if (typeof adapter.limits[name] === "number") limits[name] = adapter.limits[name];
  const features = [...(adapter.features as Set<string>)].filter((name) => !name.startsWith("subgroups"));
  return adapter.requestDevice({ requiredFeatures: features, requiredLimits: limits });
}

async function importOrt(options: ServiceOptions, provider: string): Promise<Ort> {
  let ort: Ort;
  try {
    if (options.ort) ort = (await import(/* @vite-ignore */ /* webpackIgnore: true */ options.ort)) as Ort;
    else if (provider === "webgpu") ort = (await import("onnxruntime-web/webgpu")) as unknown as Ort;
    else ort = (await import("onnxruntime-web/wasm")) as unknown as Ort;
  } catch (error) {
    throw new MissingDependencyError(
      `onnxruntime-web cannot be loaded (${firstLine(error)}): npm install onnxruntime-web, or say where it is with ort`,
      { cause: error },
    );
  }
  const { wasm } = ort.env;
  if (options.wasmPaths) wasm.wasmPaths = options.wasmPaths;
  // Threads share memory, which a page has only where it is isolated (COOP and COEP headers); one thread works anywhere.
  const isolated = (globalThis as { crossOriginIsolated?: boolean }).crossOriginIsolated === true;
  const cores = Math.max(1, Math.min(4, globalThis.navigator?.hardwareConcurrency ?? 1));
  wasm.numThreads = isolated ? (options.threads ?? cores) : 1;
  return ort;
}

async function open(ort: Ort, files: Files, manifest: Manifest, key: string, provider: string | object): Promise<Graph> {
  const graph = manifest.graphs[key]!;
  const need = async (file: string, hash: string): Promise<Uint8Array> => {
    const found = await files.read(file, MOST_BYTES, hash);
    if (!found) throw new PackageError(`the package lacks ${repr(file)}; export the base again`);
    return found;
  };
  const model = await need(graph.file, graph.sha256);
  const externalData: { path: string; data: Uint8Array }[] = [];
  const folder = graph.file.replace(/[^/]*$/, "");
  for (const [file, hash] of Object.entries(graph.data)) {
    const path = file.startsWith(folder) ? file.slice(folder.length) : file;
    externalData.push({ path, data: await need(file, hash) });
  }
  return openGraph(ort, graph.file, model, { executionProviders: [provider], externalData, logSeverityLevel: 3, extra: WITHOUT_FUSIONS });
}

/** Files of a package, by name; those with a hash are kept under it, the others as they were last seen. */
class Files {
  private store: Promise<Cache | null> | null = null;

  constructor(
    private readonly base: URL,
    private readonly mode: string,
    private readonly onProgress: (progress: Progress) => void,
    private readonly signal: AbortSignal | undefined,
  ) {}

  async read(file: string, most: number, hash: string | null): Promise<Uint8Array | null> {
    const url = new URL(file, this.base);
    const tell = (loaded: number, total: number): void => this.onProgress({ file, loaded, total });
    if (!hash) return this.readFresh(url, most, tell);
    const key = new URL(`edgeprompt-cache/${hash}`, this.base.origin).href;
    const kept = await this.kept(key);
    if (kept && (await sha256(kept)) === hash) {
      tell(kept.length, kept.length);
      return kept;
    }
    if (kept) await (await this.cache())?.delete(key);
    // What is damaged here may be damaged in the browser's own cache too.
    let found = await this.fetch(url, most, tell, kept ? "reload" : "default");
    if (found && !kept && (await sha256(found)) !== hash) found = await this.fetch(url, most, tell, "reload");
    if (!found) return null;
    const real = await sha256(found);
    if (real !== hash) throw new PackageError(`${file} has SHA-256 ${real}, the manifest names ${hash}; export the base again`);
    await this.keep(key, found);
    return found;
  }

  /** The file as the server has it now, else as it was when the server could last be reached. */
  private async readFresh(url: URL, most: number, tell: (loaded: number, total: number) => void): Promise<Uint8Array | null> {
    try {
      const found = await this.fetch(url, most, tell, "default");
      if (found) await this.keep(url.href, found);
      return found;
    } catch (error) {
      const kept = await this.kept(url.href);
      if (!kept) throw error;
      return kept;
    }
  }

  private async fetch(url: URL, most: number, tell: (loaded: number, total: number) => void, cache: RequestCache): Promise<Uint8Array | null> {
    try {
      return await fetchBytes(url, most, tell, cache, this.signal);
    } catch (error) {
      throw new PackageError(`cannot fetch ${url.href}: ${firstLine(error)}`, { cause: error });
    }
  }

  private cache(): Promise<Cache | null> {
    this.store ??=
      this.mode === "none" || !globalThis.caches ? Promise.resolve(null) : globalThis.caches.open(CACHE).catch(() => null);
    return this.store;
  }

  private async kept(key: string): Promise<Uint8Array | null> {
    const found = await (await this.cache())?.match(key);
    return found ? new Uint8Array(await found.arrayBuffer()) : null;
  }

  private async keep(key: string, data: Uint8Array): Promise<void> {
    // A full disk must not stop a model that is in memory already.
    await (await this.cache())?.put(key, new Response(data as Uint8Array<ArrayBuffer>)).catch(() => undefined);
  }
}

/** Fetch a file of at most `most` bytes; null where the server has none. */
async function fetchBytes(
  url: URL, most: number, tell?: (loaded: number, total: number) => void, cache: RequestCache = "default", signal?: AbortSignal,
): Promise<Uint8Array | null> {
  const response = await fetch(url, { cache, ...(signal ? { signal } : {}) });
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`${url.href} answers ${response.status}`);
  const packed = response.headers.has("content-encoding");
  const total = packed ? 0 : Number(response.headers.get("content-length") ?? 0);
  let data = new Uint8Array(total || 1 << 16);
  let size = 0;
  const reader = response.body!.getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    const needed = size + piece.value.length;
    if (needed > most) throw new Error(`${url.href} is larger than ${most} bytes`);
    if (needed > data.length) {
      const larger = new Uint8Array(Math.max(needed, data.length * 2));
      larger.set(data.subarray(0, size));
      data = larger;
    }
    data.set(piece.value, size);
    size = needed;
    tell?.(size, total || size);
  }
  return data.subarray(0, size);
}
