/** One package being served: its prompts by name and its engine. Lives in the thread that runs the model. */

import { sha256 } from "./bytes.ts";
import type { CallOptions } from "./engines/context.ts";
import { DecoderEngine } from "./engines/decoder.ts";
import { EncoderEngine } from "./engines/encoder.ts";
import type { Engine, EngineParts, Loaded } from "./engines/engine.ts";
import { Seq2SeqEngine } from "./engines/seq2seq.ts";
import { InputError, MissingDependencyError, PackageError, PromptNotFoundError, RequestCancelledError, UnsupportedError, type PlainError, packError } from "./errors.ts";
import { checkGolden } from "./golden.ts";
import { repr } from "./json.ts";
import { parseManifest, type Manifest } from "./manifest.ts";
import * as names from "./names.ts";
import type { Graph } from "./ort.ts";
import { checkBase, parsePrompt, type PromptFile } from "./prompt.ts";
import type { Classification, GoldenCheck, Request, Result } from "./results.ts";
import { asFields, type Text } from "./template.ts";
import { ALLOWED, checkWeights, differ } from "./weights.ts";
import { Tokenizer, fingerprintTokenizer } from "./tokenizer/tokenizer.ts";
import { CONTENT_FREE, contextualCalibration } from "./verbalizer.ts";

/** How far a file has come. */
export interface Progress {
  file: string;
  loaded: number;
  total: number;
}

/** Settings that reach the thread of the model. */
export interface ServiceOptions {
  provider?: string;
  /** Threads of one step; left out: one for each core (browsers: as many as the page may have). */
  threads?: number;
  /** Most bytes of KV cache of one request. */
  kvBudget?: number;
  /** Browsers: "default" keeps weights in the Cache API, "none" keeps nothing. */
  cache?: "default" | "none";
  /** Serve prompts that were tuned for other weights, though these or their own are far from the base. */
  allowOtherWeights?: boolean;
  /** Where to import ONNX Runtime from, where the bare name cannot be resolved (a page without bundler). */
  ort?: string;
  /** Where onnxruntime-web finds its .wasm files. */
  wasmPaths?: string;
}

/** A package's files and the ONNX Runtime to run them: Node's or the browser's. */
export interface Platform {
  /** Read a small file; null where it is not there. */
  read(file: string, most: number, hash?: string | null): Promise<Uint8Array | null>;
  /** Read a prompt from where the caller says. */
  readPrompt(source: string): Promise<Uint8Array>;
  open(manifest: Manifest, key: string): Promise<Graph>;
  readonly provider: string;
}

export type MakePlatform = (
  source: string, options: ServiceOptions, onProgress: (progress: Progress) => void, signal?: AbortSignal,
) => Promise<Platform>;

const MAX_TOKENIZER_BYTES = 256 << 20;
const KV_BUDGET = 1 << 30;
const ENGINES = { "decoder-only": DecoderEngine, "encoder-only": EncoderEngine, "encoder-decoder": Seq2SeqEngine };

/** How a prompt is added. */
export interface PromptOptions {
  name?: string;
  /** Accept a prompt of another base whose sizes fit. */
  allowBaseMismatch?: boolean;
  /** Accept a prompt tuned for other weights that are far from the package's; left out: as `load` says. */
  allowOtherWeights?: boolean;
}

/** A result or an error in its place, as plain data. */
export type Outcome = { result: Result } | { error: PlainError };

export class Service {
  private readonly prompts = new Map<string, Loaded>();
  private closed = false;

  private constructor(
    readonly manifest: Manifest,
    private readonly platform: Platform,
    private readonly engine: Engine,
    private readonly allowOtherWeights: boolean,
  ) {}

  static async open(
    makePlatform: MakePlatform, source: string, options: ServiceOptions, onProgress: (progress: Progress) => void, signal?: AbortSignal,
  ): Promise<Service> {
    try {
      return await Service.opened(makePlatform, source, options, onProgress, signal);
    } catch (error) {
      throw signal?.aborted ? new RequestCancelledError("loading was cancelled") : error;
    }
  }

  private static async opened(
    makePlatform: MakePlatform, source: string, options: ServiceOptions, onProgress: (progress: Progress) => void, signal?: AbortSignal,
  ): Promise<Service> {
    const platform = await makePlatform(source, options, onProgress, signal);
    const text = await platform.read(names.MANIFEST, 4 << 20);
    if (!text) throw new PackageError(`${repr(source)} is no package: it has no ${names.MANIFEST}; edgeprompt export makes one`);
    const manifest = await parseManifest(text);
    const tokenizer = await readTokenizer(platform, manifest);
    const keys = Object.keys(manifest.graphs);
    let turn: Promise<unknown> = Promise.resolve();
    const open = (key: string): Promise<Graph> => {
      // ONNX Runtime's WebGPU provider makes one session at a time.
      const found = platform.provider === "webgpu" ? turn.then(() => platform.open(manifest, key)) : platform.open(manifest, key);
      turn = found.catch(() => undefined);
      return found;
    };
    const opened = await Promise.allSettled(keys.map(open));
    const failed = opened.find((one) => one.status === "rejected");
    if (failed || signal?.aborted) {
      await Promise.all(opened.map((one) => (one.status === "fulfilled" ? one.value.close() : undefined)));
      throw failed?.reason;
    }
    const graphs = Object.fromEntries(keys.map((key, i) => [key, (opened[i] as PromiseFulfilledResult<Graph>).value]));
    const parts: EngineParts = {
      manifest,
      tokenizer,
      graphs,
      kvBudget: options.kvBudget ?? KV_BUDGET,
      chat: (message) => renderChat(platform, tokenizer, message),
    };
    const service = new Service(manifest, platform, new ENGINES[manifest.architecture](parts), options.allowOtherWeights ?? false);
    for (const file of manifest.prompts) {
      const data = await platform.read(file, 1 << 30);
      if (!data) throw new PackageError(`package ${repr(source)} lacks ${repr(file)}; export the base again`);
      await service.addPrompt(data, { name: file.replace(/^.*\//, "").replace(/\.safetensors$/, "") });
    }
    return service;
  }

  get facts(): { manifest: Manifest; provider: string } {
    return { manifest: this.manifest, provider: this.platform.provider };
  }

  /** Make a prompt ready, replacing one of the same name; the name, and what the caller should know. */
  async addPrompt(source: string | Uint8Array, options: PromptOptions = {}): Promise<{ name: string; note: string | null }> {
    this.open();
    checkPrompt(source, options);
    const data = typeof source === "string" ? await this.platform.readPrompt(source) : source;
    const prompt = parsePrompt(data, typeof source === "string" ? source : undefined);
    checkBase(prompt, this.manifest, options.allowBaseMismatch);
    if (!(options.allowOtherWeights ?? this.allowOtherWeights) && !options.allowBaseMismatch) {
      checkWeights(prompt, this.manifest, ALLOWED in this.manifest.extra ? await sha256(data) : null);
    }
    const name = options.name ?? prompt.name;
    const loaded = await this.engine.prepare(name, prompt);
    this.open();
    this.prompts.set(name, loaded);
    const other = differ(prompt, this.manifest);
    const note = other === null ? null : `prompt ${repr(prompt.name)} was tuned for ${other}, the package is ${this.manifest.precision}`;
    return { name, note };
  }

  removePrompt(name: string): void {
    if (!this.prompts.delete(name)) throw this.notFound(name);
  }

  promptNames(): string[] {
    return [...this.prompts.keys()];
  }

  prompt(name: string): PromptFile {
    return this.find(name)!.file;
  }

  /** Answer a batch of mixed tasks, in order; each request has its result or its error. */
  async run(requests: readonly Request[], options: CallOptions = {}): Promise<Outcome[]> {
    this.open();
    const outcomes: (Result | Error)[] = [];
    const found = requests.map((request, i) => {
      try {
        checkRequest(request);
        return this.find(request.prompt);
      } catch (error) {
        outcomes[i] = error as Error;
        return null;
      }
    });
    const ready = requests.flatMap((_, i) => (outcomes[i] ? [] : [i]));
    if (this.engine.answerAll) {
      const answers = await this.engine.answerAll(ready.map((i) => requests[i]!), ready.map((i) => found[i]!), options);
      answers.forEach((answer, at) => (outcomes[ready[at]!] = answer));
    } else {
      for (const i of ready) {
        try {
          outcomes[i] = await this.engine.answer(requests[i]!, found[i]!, options);
        } catch (error) {
          outcomes[i] = error as Error;
        }
      }
    }
    return outcomes.map((one) => (one instanceof Error ? { error: packError(one) } : { result: one }));
  }

  /** Generate, with pieces of text to `options.onText`. */
  async stream(request: Request, options: CallOptions): Promise<Result> {
    this.open();
    checkRequest(request);
    return this.engine.answer({ ...request, task: "generate" }, this.find(request.prompt), options);
  }

  async logits(request: Request, options: CallOptions = {}): Promise<Float32Array> {
    this.open();
    checkRequest(request);
    return this.engine.logits(request, this.find(request.prompt), options);
  }

  async embed(requests: readonly Request[], prompt: string | null, pooling: string | null, options: CallOptions = {}): Promise<Float32Array[]> {
    this.open();
    requests.forEach(checkRequest);
    return this.engine.embed(requests, this.find(prompt), pooling, options);
  }

  check(name: string): Promise<GoldenCheck> {
    return checkGolden(this, name);
  }

  /** Values for a prompt file's `calibration`: what the verbalizer says about texts without content. */
  async calibration(prompt: string, texts: readonly Text[] = CONTENT_FREE): Promise<number[]> {
    if (!Array.isArray(texts) || !texts.length) throw new InputError("calibration takes a list of at least one text");
    const outcomes = await this.run(texts.map((text) => ({ text, prompt, task: "classify" })));
    return contextualCalibration(
      outcomes.map((one) => {
        if ("error" in one) throw new InputError(one.error.message);
        return Object.values((one.result as Classification).logits);
      }),
    );
  }

  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    await this.engine.close();
  }

  private open(): void {
    if (this.closed) throw new RequestCancelledError("the runtime is closed; load the package again");
  }

  private find(name: string | null | undefined): Loaded | null {
    if (name === null || name === undefined) return null;
    const found = this.prompts.get(name);
    if (!found) throw this.notFound(name);
    return found;
  }

  private notFound(name: string): PromptNotFoundError {
    const there = [...this.prompts.keys()].slice(0, 20).join(", ") || "none";
    return new PromptNotFoundError(`no prompt ${repr(name)}; there are: ${there}`);
  }
}

const PROMPT_KEYS = ["name", "allowBaseMismatch", "allowOtherWeights"];

function checkPrompt(source: unknown, options: unknown): void {
  if (typeof source !== "string" && !(source instanceof Uint8Array)) {
    throw new InputError(`a prompt is ${source === null ? "null" : typeof source}; give its path (in browsers its URL), or the file's bytes`);
  }
  if (typeof options !== "object" || options === null) throw new InputError(`options is ${repr(options)}; give an object`);
  const unknown = Object.keys(options).find((key) => !PROMPT_KEYS.includes(key));
  if (unknown) throw new InputError(`unknown option ${repr(unknown)}; known: ${PROMPT_KEYS.join(", ")}`);
  const { name } = options as PromptOptions;
  if (name !== undefined && (typeof name !== "string" || !name)) throw new InputError(`name is ${repr(name)}; give a text of at least one character`);
}

const REQUEST_KEYS = ["text", "prompt", "inputIds", "task", "options", "chat", "timeout", "truncate"];
const GENERATION_KEYS = ["maxNewTokens", "temperature", "topK", "topP", "minP", "repetitionPenalty", "seed", "stop", "logprobs", "numBeams", "choices"];

function checkRequest(request: Request): void {
  if (typeof request !== "object" || request === null) throw new InputError(`a request is ${repr(request)}; give an object with a text`);
  for (const [where, keys, known] of [
    ["", Object.keys(request), REQUEST_KEYS],
    ["", Object.keys(request.options ?? {}), GENERATION_KEYS],
  ] as const) {
    const unknown = keys.find((key) => !known.includes(key));
    if (unknown) throw new InputError(`unknown option ${repr(unknown)}${where}; known: ${known.join(", ")}`);
  }
  const { prompt, timeout, inputIds } = request;
  if (prompt !== undefined && prompt !== null && typeof prompt !== "string") {
    throw new InputError(`prompt is ${repr(prompt)}; give the name of a prompt, or null`);
  }
  if (timeout !== undefined && !(typeof timeout === "number" && timeout >= 0)) {
    throw new InputError(`timeout is ${repr(timeout)}; it must be a number of seconds`);
  }
  if (inputIds !== undefined && !Array.isArray(inputIds)) throw new InputError("inputIds must be a list of integers");
  for (const name of ["chat", "truncate"] as const) {
    if (request[name] !== undefined && typeof request[name] !== "boolean") throw new InputError(`${name} is ${repr(request[name])}; it must be true or false`);
  }
  if (!inputIds) asFields(request.text);
}

async function readTokenizer(platform: Platform, manifest: Manifest): Promise<Tokenizer> {
  const [data, config] = await Promise.all([
    platform.read(names.TOKENIZER, MAX_TOKENIZER_BYTES, manifest.tokenizerSha256),
    platform.read(names.TOKENIZER_CONFIG, MAX_TOKENIZER_BYTES),
  ]);
  if (!data) throw new PackageError(`the package has no ${names.TOKENIZER}; export a base with a tokenizer`);
  const expected = manifest.tokenizerFingerprint;
  if (expected && (await sha256(data)) !== manifest.tokenizerSha256) {
    const found = await fingerprintTokenizer(data).catch((error: unknown) => (error as Error).message);
    if (found !== expected) {
      throw new PackageError(
        `${names.TOKENIZER} has fingerprint ${found}, the manifest names ${expected}; export the base again`,
      );
    }
  }
  return Tokenizer.parse(data, config, manifest.geometry.vocabSize);
}

/** A text as the user's turn in the package's chat template, ready for the answer. */
async function renderChat(platform: Platform, tokenizer: Tokenizer, text: string): Promise<string> {
  const file = await platform.read(names.CHAT_TEMPLATE, 1 << 20);
  const source = file ? new TextDecoder().decode(file) : tokenizer.chatTemplate;
  if (source === null) throw new UnsupportedError("the package has no chat template; leave out chat");
  let jinja: { Template: new (source: string) => { render(values: Record<string, unknown>): string } };
  try {
    jinja = await import("@huggingface/jinja");
  } catch (error) {
    throw new MissingDependencyError("chat templates need @huggingface/jinja: npm install @huggingface/jinja", { cause: error });
  }
  const special = (name: string): string => tokenizer.specialText(name) ?? "";
  return new jinja.Template(source).render({
    messages: [{ role: "user", content: text }],
    add_generation_prompt: true,
    bos_token: special("bos_token"),
    eos_token: special("eos_token"),
  });
}

