/** The runtime: one package, many prompts. */

import type { GenerationOptions } from "./decoding/sampling.ts";
import { InputError, unpackError } from "./errors.ts";
import type { Host } from "./host.ts";
import { repr } from "./json.ts";
import type { Manifest } from "./manifest.ts";
import type { Answer, Classification, Generation, GoldenCheck, Request, Result, Tagging } from "./results.ts";
import type { Outcome, Progress, PromptOptions, ServiceOptions } from "./service.ts";
import type { Text } from "./template.ts";

export interface LoadOptions extends ServiceOptions {
  /** Prompts to add: paths, URLs or bytes. */
  prompts?: readonly PromptSource[];
  /**
   * Where the model runs: true (default): in a worker, so that this thread stays free; false: here; or a worker of your
   * own that runs `edgeprompt/worker`, as bundlers want it.
   */
  worker?: boolean | object;
  onProgress?: (progress: Progress) => void;
  signal?: AbortSignal;
}

/** A path (Node) or URL, or the file's bytes. */
export type PromptSource = string | URL | Uint8Array | ArrayBuffer;

/** What every question may carry. */
export interface AskOptions {
  prompt?: string | null;
  /** Ids instead of a text, without the prompt's virtual tokens. */
  inputIds?: readonly number[];
  truncate?: boolean;
  /** Seconds after which the request fails with RequestTimeoutError. */
  timeout?: number;
  signal?: AbortSignal;
}

export interface GenerateOptions extends AskOptions, GenerationOptions {
  chat?: boolean;
}

/** Options that reach the thread of the model. */
const OPTION_NAMES = ["provider", "threads", "kvBudget", "cache", "allowOtherWeights", "ort", "wasmPaths"];
/** Options of `load`: what each may be. */
const LOAD_OPTIONS: Record<string, [fits: (value: any) => boolean, wanted: string]> = {
  provider: [isText, "a text"],
  threads: [(value) => Number.isInteger(value) && value >= 1 && value <= 1024, "an integer from 1 to 1024, or left out for one per core"],
  kvBudget: [(value) => typeof value === "number" && value >= 1, "a number of bytes"],
  cache: [(value) => value === "default" || value === "none", "'default' or 'none'"],
  allowOtherWeights: [(value) => typeof value === "boolean", "true or false"],
  ort: [isText, "the URL of a module"],
  wasmPaths: [isText, "a URL that ends with /"],
  prompts: [Array.isArray, "a list of paths, URLs or bytes"],
  worker: [() => true, ""],
  onProgress: [(value) => typeof value === "function", "a function"],
  signal: [() => true, ""],
};

function isText(value: unknown): boolean {
  return typeof value === "string";
}

/** Refuse options that are no object, and a signal that is none. */
function checkOptions(options: unknown): void {
  if (typeof options !== "object" || options === null || Array.isArray(options)) {
    throw new InputError(`options is ${repr(options)}; give an object`);
  }
  const { signal } = options as { signal?: unknown };
  if (signal !== undefined && typeof (signal as AbortSignal | null)?.addEventListener !== "function") throw new InputError("signal must be an AbortSignal");
}

function checkList(value: unknown, where: string): void {
  if (!Array.isArray(value)) throw new InputError(`${where} is ${repr(value)}; give a list`);
}

/** @internal */
export function checkSource(source: unknown, what: string): void {
  if (!(source instanceof URL) && (typeof source !== "string" || !source)) {
    throw new InputError(`the package is ${repr(source)}; give its ${what}`);
  }
}

/** @internal */
export function checkWorker(worker: unknown): boolean | object {
  const fits = typeof worker === "boolean" || typeof (worker as { postMessage?: unknown } | null)?.postMessage === "function";
  if (worker !== undefined && !fits) throw new InputError(`worker is ${repr(worker)}; give true, false, or a Worker`);
  return (worker as boolean | object | undefined) ?? true;
}

const REQUEST_NAMES = ["prompt", "inputIds", "truncate", "timeout", "chat"] as const;

/** Serves one package; make one with `load`. */
export class Runtime implements AsyncDisposable {
  private constructor(
    private readonly host: Host,
    /** What the package is. */
    readonly manifest: Manifest,
    /** The execution provider that runs it. */
    readonly provider: string,
  ) {}

  /** @internal */
  static async open(makeHost: () => Host, source: string, options: LoadOptions): Promise<Runtime> {
    checkOptions(options);
    for (const [name, value] of Object.entries(options)) {
      const [fits, wanted] = LOAD_OPTIONS[name] ?? [];
      if (!fits) throw new InputError(`unknown option ${repr(name)}; known: ${Object.keys(LOAD_OPTIONS).join(", ")}`);
      if (value !== undefined && !fits(value)) throw new InputError(`${name} is ${repr(value)}; it must be ${wanted}`);
    }
    const host = makeHost();
    try {
      const settings = Object.fromEntries(
        OPTION_NAMES.filter((name) => name in options).map((name) => [name, options[name as keyof LoadOptions]]),
      );
      const { onProgress, signal } = options;
      const { manifest, provider } = await host.ask("open", [source, settings], { onProgress, signal });
      const runtime = new Runtime(host, manifest, provider);
      for (const prompt of options.prompts ?? []) await runtime.addPrompt(prompt);
      return runtime;
    } catch (error) {
      await host.end();
      throw error;
    }
  }

  /**
   * Make a prompt ready, replacing one of the same name; requests that run keep the old one.
   * @returns Its name.
   */
  async addPrompt(prompt: PromptSource, options: PromptOptions = {}): Promise<string> {
    const source = prompt instanceof URL ? prompt.href : prompt instanceof ArrayBuffer ? new Uint8Array(prompt) : prompt;
    const { name, note } = await this.host.ask("addPrompt", [source, options]);
    if (note) console.info(`edgeprompt: ${note}`);
    return name;
  }

  /** Forget a prompt; requests that run keep it. */
  removePrompt(name: string): Promise<void> {
    return this.host.ask("removePrompt", [name]);
  }

  /** Names of the prompts that requests can name. */
  prompts(): Promise<string[]> {
    return this.host.ask("promptNames", []);
  }

  /** Answer a batch of mixed tasks, in order; with `returnErrors`, a request that fails is its error in the list. */
  async run(requests: readonly Request[], options: { signal?: AbortSignal; returnErrors?: false }): Promise<Result[]>;
  async run(requests: readonly Request[], options: { signal?: AbortSignal; returnErrors: true }): Promise<(Result | Error)[]>;
  async run(requests: readonly Request[]): Promise<Result[]>;
  async run(requests: readonly Request[], options: { signal?: AbortSignal; returnErrors?: boolean } = {}): Promise<(Result | Error)[]> {
    checkList(requests, "requests");
    checkOptions(options);
    const outcomes: Outcome[] = await this.host.ask("run", [requests], { signal: options.signal });
    return outcomes.map((one) => {
      if ("result" in one) return one.result;
      if (!options.returnErrors) throw unpackError(one.error);
      return unpackError(one.error);
    });
  }

  /** One text, many tasks: prompt name -> result. */
  async runTasks(text: Text, prompts: readonly string[], options: { truncate?: boolean; signal?: AbortSignal } = {}): Promise<Record<string, Result>> {
    checkList(prompts, "prompts");
    checkOptions(options);
    const { truncate = false, signal } = options;
    const results = await this.run(prompts.map((prompt) => ({ text, prompt, truncate })), { signal });
    return Object.fromEntries(prompts.map((prompt, i) => [prompt, results[i]!]));
  }

  /** Label a text, or a list of texts. */
  classify(text: readonly Text[], options?: AskOptions): Promise<Classification[]>;
  classify(text: Text, options?: AskOptions): Promise<Classification>;
  classify(text: Text | readonly Text[], options: AskOptions = {}): Promise<any> {
    return this.each(text, "classify", options);
  }

  /** Generate from a text, or from a list of texts; without `prompt`, exactly the base model. */
  generate(text: readonly Text[], options?: GenerateOptions): Promise<Generation[]>;
  generate(text: Text, options?: GenerateOptions): Promise<Generation>;
  generate(text: Text | readonly Text[], options: GenerateOptions = {}): Promise<any> {
    return this.each(text, "generate", options);
  }

  /** `generate`, piece by piece; `onResult` gets the whole at the end, with its timings. Cancelling the stream, or leaving a `for await` over it, cancels the request. */
  stream(text: Text, options: GenerateOptions & { onResult?: (result: Generation) => void } = {}): ReadableStream<string> {
    checkOptions(options);
    const { onResult, ...asked } = options;
    const controller = new AbortController();
    const { signal } = options;
    const abort = (): void => controller.abort();
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort, { once: true });
    return new ReadableStream<string>({
      start: (stream) => {
        let open = true;
        controller.signal.addEventListener("abort", () => (open = open && signal?.aborted === true));
        this.host
          .ask("stream", [request(text, "generate", asked)], {
            signal: controller.signal,
            onText: (piece) => {
              if (open) stream.enqueue(piece);
            },
          })
          .then(
            (result: Generation) => {
              if (!open) return;
              onResult?.(result);
              stream.close();
            },
            (error: unknown) => open && stream.error(error),
          )
          .catch((error: unknown) => stream.error(error)) // of onResult
          .finally(() => signal?.removeEventListener("abort", abort));
      },
      cancel: abort,
    });
  }

  /** Spans of a text, by a prompt for tagging. */
  tag(text: readonly Text[], options?: AskOptions): Promise<Tagging[]>;
  tag(text: Text, options?: AskOptions): Promise<Tagging>;
  tag(text: Text | readonly Text[], options: AskOptions = {}): Promise<any> {
    return this.each(text, "tag", options);
  }

  /** The span of `context` that answers `question`, by a prompt for question answering. */
  answer(question: string, context: string, options: AskOptions = {}): Promise<Answer> {
    return this.each({ question, context }, "qa", options);
  }

  /** Scores of the next token (first decoder step for encoder-decoders). */
  logits(text: Text, options: AskOptions = {}): Promise<Float32Array> {
    checkOptions(options);
    const { task: _, ...asked } = request(text, "generate", options);
    return this.host.ask("logits", [asked], { signal: options.signal });
  }

  /** A vector for each text. `pooling` "mean", "cls" or "last"; left out: the package's default. */
  async embed(texts: readonly Text[], options: AskOptions & { pooling?: string } = {}): Promise<Float32Array[]> {
    if (!Array.isArray(texts)) throw new InputError("embed takes a list of texts; put the one text into a list");
    checkOptions(options);
    const { pooling = null, ...others } = options;
    const requests = texts.map((text: Text) => request(text, "embed", others));
    return this.host.ask("embed", [requests, options.prompt ?? null, pooling], { signal: options.signal });
  }

  /** Ask a prompt its golden example, and compare with what it answered where it was made. */
  check(prompt: string): Promise<GoldenCheck> {
    return this.host.ask("check", [prompt]);
  }

  /** Values for a prompt file's calibration: what the verbalizer says about texts without content. */
  calibration(prompt: string, texts?: readonly Text[]): Promise<number[]> {
    return this.host.ask("calibration", [prompt, texts ?? null]);
  }

  /** Fail requests in flight with RequestCancelledError and free the model. Closing twice is fine. */
  async close(): Promise<void> {
    await this.host.ask("close", []).catch(() => undefined);
    await this.host.end();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  private async each(text: any, task: Request["task"], options: GenerateOptions): Promise<any> {
    checkOptions(options);
    const many = Array.isArray(text);
    const requests = (many ? text : [text]).map((one: Text) => request(one, task, options));
    const results = await this.run(requests, { signal: options.signal });
    return many ? results : results[0];
  }
}

/** A request from a text and flat options. */
function request(text: Text, task: Request["task"], options: GenerateOptions): Request {
  const { signal: _, ...others } = options;
  const found: Record<string, unknown> = { text, task };
  for (const name of REQUEST_NAMES) {
    if (others[name] !== undefined) found[name] = others[name];
    delete others[name];
  }
  if (Object.keys(others).length) found["options"] = others;
  return found as Request;
}
