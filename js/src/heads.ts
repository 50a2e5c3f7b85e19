/** From hidden states to answers: heads, pooling, labels, spans. */

import { BaseMismatchError, InputError } from "./errors.ts";
import { firstTokens, wordsOf } from "./encoderText.ts";
import type { Head, PromptFile, Tensor } from "./prompt.ts";
import type { Answer, Classification, Span, Tagging } from "./results.ts";
import { indexOfMax } from "./verbalizer.ts";

const MAX_ANSWER_TOKENS = 30;
const EPSILON = 1e-5;

/** Rows of one width. */
export interface Matrix {
  data: Float32Array;
  width: number;
}

export const rowsOf = (matrix: Matrix): number => matrix.data.length / matrix.width;
export const rowOf = (matrix: Matrix, row: number): Float32Array =>
  matrix.data.subarray(row * matrix.width, (row + 1) * matrix.width);

/** Run a head's steps on states `[n, hiddenSize]`; `[n, numLabels]`. */
export function applyHead(head: Head, tensors: Map<string, Tensor>, states: Matrix): Matrix {
  for (const step of head.steps) {
    const weight = tensors.get(`${step.name}.weight`);
    const bias = tensors.get(`${step.name}.bias`);
    if (step.operation === "linear") states = linear(states, weight!, bias);
    else if (step.operation === "layer_norm") states = layerNorm(states, weight!, bias);
    else states = { data: states.data.map(ACTIVATIONS[step.operation]!), width: states.width };
  }
  return states;
}

const ACTIVATIONS: Record<string, (x: number) => number> = {
  tanh: Math.tanh,
  relu: (x) => Math.max(x, 0),
  silu: (x) => x * sigmoid(x),
  gelu: (x) => x * 0.5 * (1 + erf(x * Math.SQRT1_2)),
};

export const sigmoid = (x: number): number => 0.5 * (1 + Math.tanh(0.5 * x));

/** The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26). */
function erf(x: number): number {
  const size = Math.abs(x);
  const t = 1 / (1 + 0.3275911 * size);
  const series =
    t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - series * Math.exp(-(size ** 2)));
}

function linear(states: Matrix, weight: Tensor, bias: Tensor | undefined): Matrix {
  const [outputs, inputs] = weight.shape as [number, number];
  if (weight.shape.length !== 2 || inputs !== states.width || (bias && bias.data.length !== outputs)) {
    throw new BaseMismatchError(`a weight of the head is [${weight.shape.join(", ")}], and its input has ${states.width}`);
  }
  const count = rowsOf(states);
  const found = new Float32Array(count * outputs);
  for (let row = 0; row < count; row++) {
    for (let out = 0; out < outputs; out++) {
      let sum = 0;
      for (let i = 0; i < inputs; i++) sum += states.data[row * inputs + i]! * weight.data[out * inputs + i]!;
      found[row * outputs + out] = Math.fround(sum) + (bias ? bias.data[out]! : 0);
    }
  }
  return { data: found, width: outputs };
}

function layerNorm(states: Matrix, weight: Tensor, bias: Tensor | undefined): Matrix {
  if (weight.data.length !== states.width) {
    throw new BaseMismatchError(`a layer norm of the head has ${weight.data.length} weights for ${states.width} values`);
  }
  const found = new Float32Array(states.data.length);
  for (let row = 0; row < rowsOf(states); row++) {
    const values = rowOf(states, row);
    const mean = values.reduce((sum, x) => sum + x, 0) / values.length;
    const variance = values.reduce((sum, x) => sum + (x - mean) ** 2, 0) / values.length;
    const scale = 1 / Math.sqrt(variance + EPSILON);
    values.forEach((x, i) => {
      found[row * states.width + i] = (x - mean) * scale * weight.data[i]! + (bias ? bias.data[i]! : 0);
    });
  }
  return { data: found, width: states.width };
}

export function softmax(values: Float32Array): Float32Array {
  const largest = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const shifted = values.map((x) => Math.exp(Math.fround(x - largest)));
  const sum = shifted.reduce((a, b) => a + b, 0);
  return shifted.map((x) => x / sum);
}

/** One vector of a row's states. `text`: positions that hold no virtual token. */
export function pool(states: Matrix, text: readonly number[], how: string): Float32Array {
  if (how !== "first" && how !== "mean_all" && !text.length) {
    throw new InputError("the text has no token, so there is nothing to pool; give at least one character");
  }
  if (how === "first") return rowOf(states, 0).slice();
  if (how === "first_text" || how === "cls") return rowOf(states, text[0]!).slice();
  if (how === "last") return rowOf(states, text.at(-1)!).slice();
  const rows = how === "mean_all" ? Array.from({ length: rowsOf(states) }, (_, i) => i) : text;
  const sums = new Float64Array(states.width);
  for (const row of rows) rowOf(states, row).forEach((x, i) => (sums[i]! += x));
  return Float32Array.from(sums, (sum) => sum / rows.length);
}

/** The prompt's labels, or transformers' names for labels that nobody named. */
export const labelsOf = (prompt: PromptFile, count: number): string[] =>
  prompt.labels.length ? prompt.labels : Array.from({ length: count }, (_, i) => `LABEL_${i}`);

/** Apply the prompt's head to a pooled vector. */
export function classifyHead(prompt: PromptFile, vector: Float32Array): Classification {
  const values = applyHead(prompt.headSpec!, prompt.head, { data: vector, width: vector.length }).data;
  const labels = labelsOf(prompt, values.length);
  const named = (numbers: Float32Array): Record<string, number> =>
    Object.fromEntries(labels.map((label, i) => [label, numbers[i]!]));
  const logits = named(values);
  switch (prompt.headSpec!.problemType) {
    case "regression":
      return { label: pythonNumber(values[0]!), scores: {}, logits, labels: [] };
    case "multi_label": {
      const chances = values.map(sigmoid);
      const chosen = labels.filter((_, i) => chances[i]! > 0.5);
      return { label: labels[indexOfMax(chances)]!, scores: named(chances), logits, labels: chosen };
    }
    default: {
      const chances = softmax(values);
      return { label: labels[indexOfMax(chances)]!, scores: named(chances), logits, labels: [] };
    }
  }
}

/** `str(round(value, 6))` of Python. */
function pythonNumber(value: number): string {
  const text = String(Number(value.toFixed(6)));
  return /[.e]/.test(text) ? text : `${text}.0`;
}

/** The head's `[sequenceLength, numLabels]`, where row i answers for token i of the sequence. */
export function tokenLogits(prompt: PromptFile, states: Matrix, numVirtualTokens: number): Matrix {
  const values = applyHead(prompt.headSpec!, prompt.head, states);
  if (prompt.headSpec!.input !== "tokens_unshifted") return values;
  const shifted = new Float32Array(values.data.length);
  shifted.set(values.data.subarray(0, shifted.length - numVirtualTokens * values.width), numVirtualTokens * values.width);
  return { data: shifted, width: values.width };
}

type Offsets = readonly (readonly [number, number] | null)[];

/** Label every word by its first token, and join words to spans. */
export function tag(prompt: PromptFile, logits: Matrix, offsets: Offsets, text: string): Tagging {
  const labels = labelsOf(prompt, logits.width);
  const places = wordsOf(text);
  const words: Span[] = [];
  firstTokens(places, offsets).forEach((token, i) => {
    if (token === null) return;
    const chances = softmax(rowOf(logits, token));
    const best = indexOfMax(chances);
    const [start, end] = places[i]!;
    words.push({ label: labels[best]!, start, end, text: text.slice(start, end), score: chances[best]! });
  });
  return { spans: joinWords(words, text), words };
}

const kindOf = (label: string): string => (/^[BI]-/.test(label) ? label.slice(2) : label);

/** Neighbouring words of one kind as one span; "B-" starts a new one, "O" belongs to none. */
function joinWords(words: readonly Span[], text: string): Span[] {
  const spans: Span[][] = [];
  let open: string | null = null;
  for (const word of words) {
    if (word.label === "O") {
      open = null;
      continue;
    }
    const kind = kindOf(word.label);
    if (kind !== open || word.label.startsWith("B-")) spans.push([]);
    spans.at(-1)!.push(word);
    open = kind;
  }
  return spans.map((span) => {
    const [start, end] = [span[0]!.start, span.at(-1)!.end];
    const score = span.reduce((sum, word) => sum + word.score, 0) / span.length;
    return { label: kindOf(span[0]!.label), start, end, text: text.slice(start, end), score };
  });
}

/** The best span of the context; `noAnswerAt`: the token whose scores say that there is none (SQuAD 2). */
export function findAnswer(logits: Matrix, offsets: Offsets, context: string, noAnswerAt: number | null): Answer {
  const places = offsets.flatMap((span, i) => (span ? [i] : []));
  if (!places.length) return { text: "", start: 0, end: 0, score: 0 };
  const starts = Float32Array.from(places, (place) => rowOf(logits, place)[0]!);
  const ends = Float32Array.from(places, (place) => rowOf(logits, place)[1]!);
  let [best, first, last] = [-Infinity, 0, 0];
  for (let width = 0; width < Math.min(MAX_ANSWER_TOKENS, places.length); width++) {
    for (let at = 0; at + width < places.length; at++) {
      const sum = Math.fround(starts[at]! + ends[at + width]!);
      if (sum > best) [best, first, last] = [sum, at, at + width];
    }
  }
  const score = softmax(starts)[first]! * softmax(ends)[last]!;
  if (noAnswerAt !== null) {
    const row = rowOf(logits, noAnswerAt);
    if (Math.fround(row[0]! + row[1]!) > best) return { text: "", start: 0, end: 0, score: 1 - score };
  }
  const [low, high] = [offsets[places[first]!]![0], offsets[places[last]!]![1]];
  const found = context.slice(low, high);
  const start = low + found.length - found.trimStart().length; // byte-level tokens hold the space in front of their word
  const text = found.trim();
  return { text, start, end: start + text.length, score };
}
