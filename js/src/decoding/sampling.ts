/** From logits to the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, choices. */

import { EdgePromptError, InputError } from "../errors.ts";
import { repr } from "../json.ts";
import { Pcg64 } from "./random.ts";

export const DEFAULT_NEW_TOKENS = 64;
const LEAST_TEMPERATURE = 1e-30;

/** How to generate; what is left out takes the prompt file's default, then the library's (greedy, 64 new tokens). */
export interface GenerationOptions {
  maxNewTokens?: number;
  /** 0 is greedy. */
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  repetitionPenalty?: number;
  seed?: number | bigint;
  stop?: string | readonly string[];
  logprobs?: boolean;
  /** Encoder-decoders of the Python runtime only; 1 here. */
  numBeams?: number;
  /** Answer with one of these texts and nothing else. */
  choices?: readonly string[];
}

/** Generation options with all defaults filled in and checked. */
export interface Sampling {
  maxNewTokens: number;
  askedLength: boolean;
  temperature: number;
  topK: number;
  topP: number;
  minP: number;
  repetitionPenalty: number;
  seed: bigint | null;
  stop: string[];
  logprobs: boolean;
  choices: string[];
}

type Limited = "maxNewTokens" | "temperature" | "topK" | "topP" | "minP" | "repetitionPenalty" | "seed";
const LIMITS: [Limited, string, "int" | "float", number, number][] = [
  ["maxNewTokens", "max_new_tokens", "int", 1, 2 ** 31],
  ["temperature", "temperature", "float", 0, 100],
  ["topK", "top_k", "int", 0, 2 ** 31],
  ["topP", "top_p", "float", 0, 1],
  ["minP", "min_p", "float", 0, 1],
  ["repetitionPenalty", "repetition_penalty", "float", 0.01, 100],
  ["seed", "seed", "int", 0, 2 ** 64 - 1],
];

/** Fill what `options` leaves open from the prompt file's `defaults`, then from the library's. */
export function resolve(options: GenerationOptions, defaults: Record<string, any>): Sampling {
  if (options.logprobs !== undefined && typeof options.logprobs !== "boolean") {
    throw new InputError(`logprobs is ${repr(options.logprobs)}; it must be true or false`);
  }
  if (Array.isArray(options.choices) && !options.choices.length) {
    throw new InputError("choices is empty, so there is nothing to answer; give at least one, or leave it out");
  }
  const found: Sampling = {
    maxNewTokens: DEFAULT_NEW_TOKENS,
    askedLength: false,
    temperature: 0,
    topK: 0,
    topP: 1,
    minP: 0,
    repetitionPenalty: 1,
    seed: null,
    stop: [],
    logprobs: options.logprobs ?? false,
    choices: texts("choices", options.choices ?? []),
  };
  for (const [name, written, kind, low, high] of LIMITS) {
    const value: unknown = options[name] ?? defaults[written];
    if (value === undefined || value === null) continue;
    const number = typeof value === "bigint" ? Number(value) : value;
    const large = typeof value === "bigint" && value >> 64n !== 0n; // rounded to a float, 2^64 is the limit itself
    const whole = kind === "float" || typeof value === "bigint" || Number.isInteger(value);
    if (typeof number !== "number" || !whole || large || !(number >= low && number <= high)) {
      const what = kind === "int" ? "an integer" : "a number";
      throw new InputError(`${name} is ${repr(value)}; it must be ${what} between ${low} and ${high}`);
    }
    if (name === "seed") found.seed = BigInt(value as number | bigint);
    else found[name] = number;
    if (name === "maxNewTokens") found.askedLength = true;
  }
  if (found.topP === 0) throw new InputError("topP is 0; it must be above 0 (1 keeps every token)");
  const asked: unknown = options.stop ?? [];
  const none = asked === "" || (Array.isArray(asked) && !asked.length);
  const stop: unknown = none ? (defaults["stop"] ?? []) : asked;
  found.stop = texts("stop", typeof stop === "string" ? [stop] : stop);
  return found;
}

function texts(name: string, value: unknown): string[] {
  if (!Array.isArray(value)) throw new InputError(`${name} is ${repr(value)}; it must be a list of texts`);
  for (const text of value) {
    if (typeof text !== "string" || !text) {
      throw new InputError(`${name} takes texts of at least one character, found ${repr(text)}`);
    }
  }
  return [...value];
}

/** The largest logit; NaN or infinity there is an error, for an answer that rests on it would look like one. */
export function largest(logits: Float32Array): number {
  let found = -Infinity;
  let broken = false;
  for (let i = 0; i < logits.length; i++) {
    const value = logits[i]!;
    if (value > found) found = value;
    if (value !== value) broken = true;
  }
  if (broken || !Number.isFinite(found)) {
    throw new EdgePromptError(
      "the model's logits are NaN or infinite, so there is no answer: the prompt's values are too large for this " +
        "graph, or the graph is broken (edgeprompt validate tells)",
    );
  }
  return found;
}

function argmax(logits: Float32Array): number {
  const high = largest(logits);
  return logits.indexOf(high);
}

/** The log-probability of some tokens, in float32 as Python computes it. */
export function logProbabilities(logits: Float32Array): (token: number) => number {
  const high = largest(logits);
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.fround(Math.exp(Math.fround(logits[i]! - high)));
  const log = Math.fround(Math.log(sum));
  return (token) => Math.fround(Math.fround(logits[token]! - high) - log);
}

/** Chooses the next token of one request. */
export class Sampler {
  private readonly random: Pcg64 | null;
  private readonly seen: Set<number> | null;

  /** `history`: ids that the repetition penalty counts from the start. */
  constructor(
    private readonly options: Sampling,
    history: Iterable<number> = [],
  ) {
    this.random = options.temperature > 0 ? new Pcg64(options.seed) : null;
    this.seen = options.repetitionPenalty === 1 ? null : new Set(history);
  }

  /** Id of the next token; with `allowed`, one of those ids. */
  choose(logits: Float32Array, allowed: readonly number[] | null = null): number {
    if (this.seen) logits = this.penalised(logits, this.seen);
    if (allowed) return allowed[this.pick(Float32Array.from(allowed, (id) => logits[id]!))]!;
    const token = this.pick(logits);
    this.seen?.add(token);
    return token;
  }

  private penalised(logits: Float32Array, seen: Set<number>): Float32Array {
    const found = logits.slice();
    const penalty = Math.fround(this.options.repetitionPenalty);
    for (const id of seen) {
      if (id < found.length) found[id] = found[id]! > 0 ? found[id]! / penalty : found[id]! * penalty;
    }
    return found;
  }

  private pick(logits: Float32Array): number {
    if (!this.random) return argmax(logits);
    const { options } = this;
    const high = largest(logits);
    const temperature = Math.fround(Math.max(options.temperature, LEAST_TEMPERATURE));
    const weights = logits.map((logit) => Math.exp(Math.fround(Math.fround(logit - high) / temperature)));
    const count = options.topK ? Math.min(options.topK, weights.length) : weights.length;
    const order = sorted(weights, count, options);
    const at = (i: number): number => weights[order ? order[i]! : i]!;
    const size = order ? order.length : weights.length;
    const cumulative = new Float64Array(size);
    for (let i = 0, sum = 0; i < size; i++) cumulative[i] = sum += at(i);
    let keep = size;
    if (options.topP < 1) {
      const total = options.topK ? cumulative[size - 1]! : weights.reduce((sum, weight) => sum + weight, 0);
      keep = search(cumulative, options.topP * total, false) + 1;
    }
    if (options.minP > 0) {
      let likely = 0;
      while (likely < size && at(likely) >= options.minP) likely++;
      keep = Math.min(keep, likely);
    }
    const kept = cumulative.subarray(0, Math.max(1, keep)); // `keep` may be one too many, where sums round differently
    const place = Math.min(search(kept, this.random.random() * kept.at(-1)!, true), kept.length - 1);
    return order ? order[place]! : place;
  }
}

/** First place whose value is at least `value`, or with `right` above it. */
function search(values: Float64Array, value: number, right: boolean): number {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle]! < value || (right && values[middle] === value)) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Indices in falling order: the `count` largest, or as many as top-p and min-p can reach; null: all, as they lie. */
function sorted(weights: Float32Array, count: number, options: Sampling): number[] | null {
  if (options.topK === 0 && options.topP === 1 && options.minP === 0) return null;
  const falling = weights.slice().sort().reverse();
  const total = options.topP < 1 && !options.topK ? weights.reduce((sum, weight) => sum + weight, 0) : 0;
  let size = options.topK ? count : Math.min(256, count);
  for (;;) {
    const least = falling[size - 1]!;
    let found: number[] = [];
    for (let i = 0; i < weights.length; i++) if (weights[i]! >= least) found.push(i);
    found.sort((a, b) => weights[b]! - weights[a]! || a - b);
    found = found.slice(0, size);
    if (size === count) return found;
    const sum = found.reduce((all, i) => all + weights[i]!, 0);
    if ((options.topP < 1 && sum >= options.topP * total) || (options.minP > 0 && least < options.minP)) return found;
    size = Math.min(size * 8, count);
  }
}
