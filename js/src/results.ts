/** What goes into a runtime and what comes out. */

import type { GenerationOptions } from "./decoding/sampling.ts";
import type { Text } from "./template.ts";

export type Task = "classify" | "generate" | "tag" | "qa" | "embed";

/** One request. Give `text`, or `inputIds` (all of them, the prompt's virtual tokens not included). */
export interface Request {
  text?: Text;
  prompt?: string | null;
  inputIds?: readonly number[];
  /** Left out: the prompt's task, or "generate" ("embed" for encoders). */
  task?: Task;
  options?: GenerationOptions;
  /** Wrap the text in the package's chat template. */
  chat?: boolean;
  /** Seconds after which the request fails with RequestTimeoutError. */
  timeout?: number;
  /** Cut the text where the request exceeds the context; else it is refused. */
  truncate?: boolean;
}

/** Seconds: `ttft` from text to first token id, `total` to the last. */
export interface Timings {
  ttft: number;
  total: number;
  inputTokens: number;
  newTokens: number;
}

/** A label, and for every label its probability (`scores`) and raw score (`logits`). */
export interface Classification {
  label: string;
  scores: Record<string, number>;
  logits: Record<string, number>;
  /** Multi-label: all labels above one half. */
  labels: string[];
  timings?: Timings;
}

export interface Generation {
  text: string;
  tokenIds: number[];
  finishReason: "eos" | "stop" | "length";
  timings: Timings;
  logprobs: number[];
}

/** A tagged piece of text: `text.slice(start, end)`. */
export interface Span {
  label: string;
  start: number;
  end: number;
  text: string;
  score: number;
}

export interface Tagging {
  spans: Span[];
  words: Span[];
}

/** The span of the context that answers a question; an empty text: there is no answer. */
export interface Answer {
  text: string;
  start: number;
  end: number;
  score: number;
}

export type Result = Classification | Generation | Tagging | Answer | Float32Array;

/** What a prompt answered to its golden example, beside what it answered where it was made. */
export interface GoldenCheck {
  passed: boolean;
  expected: string | number[];
  found: string | number[];
  maxLogitDifference: number | null;
}

/** Times of one request, from the moment it was made. */
export class Clock {
  private readonly start = performance.now();
  private first = 0;
  inputTokens = 0;

  /** A token is there. */
  tick(): void {
    this.first ||= performance.now();
  }

  get elapsed(): number {
    return (performance.now() - this.start) / 1000;
  }

  timings(newTokens: number): Timings {
    const now = performance.now();
    const ttft = ((this.first || now) - this.start) / 1000;
    return { ttft, total: (now - this.start) / 1000, inputTokens: this.inputTokens, newTokens };
  }
}
