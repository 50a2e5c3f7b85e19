/** What the runtime asks of an architecture, and what its engines share. */

import { BaseMismatchError, InputError, TemplateError, UnsupportedError } from "../errors.ts";
import { repr } from "../json.ts";
import type { Manifest } from "../manifest.ts";
import type { PromptFile } from "../prompt.ts";
import type { Request, Result, Task } from "../results.ts";
import { range } from "../template.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import type { Graph } from "../ort.ts";
import { applyHead } from "../heads.ts";
import * as names from "../names.ts";
import type { CallOptions } from "./context.ts";

/** A prompt as an engine keeps it. */
export interface Loaded {
  readonly file: PromptFile;
}

export interface Engine {
  /** Check a prompt and make it ready. */
  prepare(name: string, prompt: PromptFile): Promise<Loaded>;
  answer(request: Request, loaded: Loaded | null, options: CallOptions): Promise<Result>;
  /** Many at once, in order; an error is given in its request's place. */
  answerAll?(requests: readonly Request[], loaded: readonly (Loaded | null)[], options: CallOptions): Promise<(Result | Error)[]>;
  /** Scores of the next token. */
  logits(request: Request, loaded: Loaded | null, options: CallOptions): Promise<Float32Array>;
  embed(requests: readonly Request[], loaded: Loaded | null, pooling: string | null, options: CallOptions): Promise<Float32Array[]>;
  close(): Promise<void>;
}

export interface EngineParts {
  manifest: Manifest;
  tokenizer: Tokenizer;
  graphs: Record<string, Graph>;
  /** `tokenizer.chat` of the Python runtime: a text as the user's turn. */
  chat: (text: string) => Promise<string>;
  kvBudget: number;
}

/** Ids that a caller brings, checked. */
export function checkIds(ids: readonly number[], vocabSize: number): number[] {
  const bad = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabSize);
  if (bad !== undefined) throw new InputError(`inputIds holds ${bad}; ids of this base are 0 to ${vocabSize - 1}`);
  return [...ids];
}

export const virtualIds = (vocabSize: number, count: number): number[] => range(vocabSize, vocabSize + count);

export const unknownTask = (task: string, known: string): UnsupportedError =>
  new UnsupportedError(`task ${repr(task)} is not known; there are ${known}`);

export const taskOf = (request: Request, loaded: Loaded | null, fallback: Task): Task =>
  request.task ?? ((loaded?.file.task as Task | undefined) ?? fallback);

/** Refuse a head that does not fit the task, the labels or the hidden size. */
export function checkHead(name: string, prompt: PromptFile, manifest: Manifest, hasPooler: boolean): void {
  const head = prompt.headSpec!;
  if (head.input === "pooler" && !hasPooler) {
    throw new BaseMismatchError(`prompt ${repr(name)} reads the pooled vector, and ${manifest.base.name} has no trained pooler`);
  }
  if (head.input.startsWith("tokens") !== ["tag", "qa"].includes(prompt.task)) {
    throw new InputError(`prompt ${repr(name)} is for ${repr(prompt.task)}, and its head reads ${repr(head.input)}`);
  }
  const width = manifest.geometry.hiddenSize;
  let found: number;
  try {
    found = applyHead(head, prompt.head, { data: new Float32Array(width), width }).width;
  } catch (error) {
    throw new BaseMismatchError(`the head of prompt ${repr(name)} does not fit hidden size ${width}: ${(error as Error).message}`);
  }
  const wanted = prompt.task === "qa" ? 2 : prompt.labels.length;
  if (wanted && found !== wanted) {
    throw new InputError(`the head of prompt ${repr(name)} gives ${found} scores for ${wanted} labels`);
  }
}

/** Refuse prompt rows on a graph that cannot take them here. */
export function checkRows(name: string, prompt: PromptFile, graph: Graph): void {
  if (prompt.promptEmbeddings && !graph.inputs.has(names.PROMPT_EMBEDDINGS)) {
    throw new UnsupportedError(
      `prompt ${repr(name)} has embeddings, and this graph takes them from adapters of ONNX Runtime alone, which ` +
        "JavaScript's has not; export the base with --door input",
    );
  }
  if (prompt.promptEmbeddings && !prompt.template.virtualCounts.length) {
    throw new TemplateError(
      `prompt ${repr(name)} has ${prompt.numVirtualTokens} virtual tokens, and its template ` +
        `${repr(String(prompt.template))} no {prompt}`,
    );
  }
}
