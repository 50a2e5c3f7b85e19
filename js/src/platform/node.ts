/** Node.js: a package in a folder, run by onnxruntime-node. */

import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { MissingDependencyError, PackageError, PromptFileError, ProviderError } from "../errors.ts";
import { repr } from "../json.ts";
import type { Manifest } from "../manifest.ts";
import { WITHOUT_FUSIONS, firstLine, openGraph, type Graph, type Ort } from "../ort.ts";
import { MAX_FILE_BYTES } from "../prompt.ts";
import type { Platform, Progress, ServiceOptions } from "../service.ts";

/** A larger graph file holds weights, whose hash would cost a noticeable part of a start. */
const HASHED_AT_LOAD = 16 << 20;
const PROVIDERS = ["cpu", "cuda", "dml", "coreml", "webgpu"];

export async function nodePlatform(source: string, options: ServiceOptions, onProgress: (progress: Progress) => void, signal?: AbortSignal): Promise<Platform> {
  const folder = await stat(source).catch(() => null);
  if (!folder?.isDirectory()) throw new PackageError(`no package folder at ${repr(source)}; edgeprompt export makes one`);
  const asked = options.provider ?? "auto";
  const provider = asked === "auto" ? "cpu" : asked.toLowerCase();
  if (!PROVIDERS.includes(provider)) {
    throw new ProviderError(`provider ${repr(asked)} is not known here (known: auto, ${PROVIDERS.join(", ")})`);
  }
  const ort = await importOrt(options.ort);
  return {
    provider,
    async read(file, most) {
      const path = join(source, file);
      const found = await stat(path).catch(() => null);
      if (!found) return null;
      if (!found.isFile()) throw new PackageError(`${repr(path)} is no regular file`);
      if (found.size > most) throw new PackageError(`${repr(path)} is larger than ${most} bytes`);
      return readFile(path);
    },
    async readPrompt(path) {
      if (/^https?:/.test(path)) {
        throw new PromptFileError(`cannot read prompt file ${repr(path)}: Node.js reads files; give a path, or the bytes that you fetched`);
      }
      const place = path.startsWith("file:") ? fileURLToPath(path) : path;
      try {
        const found = await stat(place);
        if (!found.isFile()) throw new Error("no regular file");
        if (found.size > MAX_FILE_BYTES) throw new Error(`${found.size} bytes, at most ${MAX_FILE_BYTES} are allowed`);
        return await readFile(place);
      } catch (error) {
        throw new PromptFileError(`cannot read prompt file ${repr(place)}: ${firstLine(error)}`);
      }
    },
    open: (manifest, key) => {
      signal?.throwIfAborted();
      return open(ort, source, manifest, key, provider, options.threads, onProgress);
    },
  };
}

async function importOrt(from: string | undefined): Promise<Ort> {
  try {
    const found = (await import(from ?? "onnxruntime-node")) as Ort & { default?: Ort };
    return found.InferenceSession ? found : found.default!;
  } catch (error) {
    throw new MissingDependencyError(
      `onnxruntime-node cannot be loaded (${firstLine(error)}): npm install onnxruntime-node`,
      { cause: error },
    );
  }
}

async function open(
  ort: Ort, folder: string, manifest: Manifest, key: string, provider: string, threads: number | undefined,
  onProgress: (progress: Progress) => void,
): Promise<Graph> {
  const graph = manifest.graphs[key]!;
  for (const file of [graph.file, ...Object.keys(graph.data)]) {
    const found = await stat(join(folder, file)).catch(() => null);
    if (!found?.isFile()) throw new PackageError(`package ${repr(folder)} lacks ${repr(file)}; export the base again`);
    onProgress({ file, loaded: found.size, total: found.size });
  }
  const path = join(folder, graph.file);
  if ((await stat(path)).size <= HASHED_AT_LOAD) {
    const digest = createHash("sha256");
    for await (const piece of createReadStream(path)) digest.update(piece as Buffer);
    const found = digest.digest("hex");
    if (found !== graph.sha256) {
      throw new PackageError(`${graph.file} has SHA-256 ${found}, the manifest names ${graph.sha256}; export the base again`);
    }
  }
  return openGraph(ort, graph.file, path, {
    executionProviders: provider === "cpu" ? ["cpu"] : [provider, "cpu"],
    ...(threads === undefined ? {} : { intraOpNumThreads: threads }),
    interOpNumThreads: 1,
    logSeverityLevel: 3,
    extra: {
      session: { intra_op: { spin_duration_us: "1000" }, x64quantprecision: (await saturates()) ? "1" : "0" },
      ...WITHOUT_FUSIONS,
    },
  });
}

/** Whether products of 8-bit weights may be added in 16 bits, which saturate: x86 that is not known to have VNNI. */
async function saturates(): Promise<boolean> {
  if (process.arch !== "x64" && process.arch !== "ia32") return false;
  const text = await readFile("/proc/cpuinfo", "utf8").catch(() => ""); // other systems than Linux do not say
  return !/^flags\s*:.*\bavx(512)?_vnni\b/m.test(text);
}
