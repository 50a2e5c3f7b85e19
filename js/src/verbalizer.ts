/** Classification by label words: what a text's continuation says about its label. */

import { TemplateError } from "./errors.ts";
import { repr } from "./json.ts";
import type { PromptFile } from "./prompt.ts";
import type { Classification } from "./results.ts";
import type { Template } from "./template.ts";

const CONTENT_FREE = ["", "N/A", "[MASK]"];
export { CONTENT_FREE };

/** A node of the tree of words: the words that begin with the tokens on the way here. */
export interface WordNode {
  children: Map<number, WordNode>;
  /** Words that end here, by index. */
  words: number[];
}

export function wordTree(words: readonly (readonly number[])[]): WordNode {
  const root: WordNode = { children: new Map(), words: [] };
  words.forEach((ids, index) => {
    let node = root;
    for (const token of ids) {
      let child = node.children.get(token);
      if (!child) node.children.set(token, (child = { children: new Map(), words: [] }));
      node = child;
    }
    node.words.push(index);
  });
  return root;
}

/** Labels and the token ids of their words. */
export class Verbalizer {
  private constructor(
    readonly labels: readonly string[],
    readonly words: readonly (readonly number[])[],
    private readonly owners: readonly number[],
    private readonly calibration: readonly number[],
    private readonly aggregation: "sum" | "mean" | "max",
  ) {}

  /**
   * Tokenise the label words, exactly as written (a leading space counts), without special tokens. `behind`: the text
   * that they stand behind; null where they begin a text of their own.
   */
  static compile(prompt: PromptFile, encode: (text: string) => number[], behind: string | null = null): Verbalizer {
    const labels = [...prompt.verbalizer.keys()];
    if (labels.length < 2) throw new TemplateError(`a verbalizer needs at least two labels, found ${repr(labels)}`);
    const words = new Map<string, [ids: number[], owner: number]>();
    [...prompt.verbalizer].forEach(([label, texts], owner) => {
      for (const text of texts) {
        const ids = behind === null ? idsAlone(encode, text) : idsBehind(encode, behind, text);
        if (!ids.length) throw new TemplateError(`label word ${repr(text)} of label ${repr(label)} has no tokens`);
        const known = words.get(ids.join());
        if (!known) words.set(ids.join(), [ids, owner]);
        else if (known[1] !== owner) {
          throw new TemplateError(
            `labels ${repr(labels[known[1]])} and ${repr(label)} share the label word ${repr(text)}; change one`,
          );
        }
      }
    });
    const entries = [...words.values()];
    return new Verbalizer(
      labels,
      entries.map(([ids]) => ids),
      entries.map(([, owner]) => owner),
      prompt.calibration,
      prompt.verbalizerAggregation,
    );
  }

  /** The decision, from the log-probability of every word. */
  classification(wordLogprobs: ArrayLike<number>): Classification {
    const own: number[][] = this.labels.map(() => []);
    this.owners.forEach((owner, word) => own[owner]!.push(wordLogprobs[word]!));
    const raw = own.map((values) => {
      if (this.aggregation === "max") return Math.max(...values);
      if (this.aggregation === "mean") return values.reduce((sum, value) => sum + value, 0) / values.length;
      return values.reduce(logAddExp, -Infinity);
    });
    const chances = probabilities(this.calibration.length ? raw.map((one, i) => one - this.calibration[i]!) : raw);
    return {
      label: this.labels[indexOfMax(chances)]!,
      scores: Object.fromEntries(this.labels.map((label, i) => [label, chances[i]!])),
      logits: Object.fromEntries(this.labels.map((label, i) => [label, raw[i]!])),
      labels: [],
    };
  }
}

/** What a word is encoded behind where the text's own end is not known, or the tokenizer joins it with the word. */
const ANCHORS = [".", "a", "\n"];

/**
 * Ids of a word that is a text of its own. Where the tokenizer puts a space in front of every text, the word's own
 * leading space is that one, not a second: the rest of the word has the tokens then that the word has inside a text.
 */
export function idsAlone(encode: (text: string) => number[], word: string): number[] {
  const bare = word.startsWith(" ") ? encode(word.slice(1)) : [];
  return bare.length && bare.join() === idsBehind(encode, "", word).join() ? bare : encode(word);
}

/** Ids of a word as it stands behind a text: some tokenizers put a space in front of whatever they encode. */
export function idsBehind(encode: (text: string) => number[], text: string, word: string): number[] {
  for (const before of text ? [text, ...ANCHORS.map((anchor) => anchor + text), ...ANCHORS] : ANCHORS) {
    const start = encode(before);
    const whole = encode(before + word);
    if (start.length && whole.length > start.length && start.every((id, i) => id === whole[i])) {
      return whole.slice(start.length);
    }
  }
  return encode(word);
}

/** The literal that label words stand behind (at the mask, or at the template's end); empty where it is a slot. */
export function textBeforeWords({ parts }: Template): string {
  const mask = parts.findIndex((part) => "mask" in part);
  const last = parts[(mask < 0 ? parts.length : mask) - 1];
  return last && "literal" in last ? last.literal : "";
}

function logAddExp(a: number, b: number): number {
  if (a === b) return a + Math.LN2;
  const [high, low] = a > b ? [a, b] : [b, a];
  return high + Math.log1p(Math.exp(low - high));
}

export function indexOfMax(values: ArrayLike<number>): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[best]!) best = i;
  return best;
}

/** Softmax. */
export function probabilities(scores: readonly number[]): number[] {
  const largest = Math.max(...scores);
  const shifted = scores.map((score) => Math.exp(score - largest));
  const sum = shifted.reduce((all, one) => all + one, 0);
  return shifted.map((one) => one / sum);
}

/** Calibration values from the raw scores of content-free texts: log of the mean P(label). */
export function contextualCalibration(rawScores: readonly (readonly number[])[]): number[] {
  const chances = rawScores.map(probabilities);
  return chances[0]!.map((_, label) =>
    Math.log(Math.max(chances.reduce((sum, row) => sum + row[label]!, 0) / chances.length, 1e-12)),
  );
}
