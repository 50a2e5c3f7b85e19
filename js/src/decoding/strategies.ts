/** What a request does with logits, one step at a time: generate, answer with one of some texts, score label words. */

import { InputError } from "../errors.ts";
import type { Classification, Clock, Generation } from "../results.ts";
import { wordTree, type Verbalizer, type WordNode } from "../verbalizer.ts";
import { Detokenizer } from "./detokenizer.ts";
import type { Processors } from "./processors.ts";
import { Sampler, largest, logProbabilities, type Sampling } from "./sampling.ts";

/** Most sequences that the label words of one request take at once. */
const WORDS_AT_ONCE = 16;

/** Tokens to run, one for each sequence. */
export interface Move {
  tokens: number[];
  /** The sequence of the last step that each goes on from; null: all go on behind the text. */
  parents: number[] | null;
}

export interface Strategy<T> {
  /** Take the logits behind the last token of each sequence; the first time, behind the text. */
  advance(logits: readonly Float32Array[]): Move | null;
  result(): T;
  /** Whether it comes back to the text. */
  readonly goesBack?: boolean;
  /** Whether it needs the logits behind the text alone, and no keys and values. */
  readonly staysAtText?: boolean;
  /** Take no more sequences at once than these; said before the first step. */
  limit?(sequences: number): void;
}

/** Hands out the logits behind the text. */
export class FirstLogits implements Strategy<Float32Array> {
  readonly staysAtText = true;
  private logits: Float32Array = new Float32Array();
  advance([logits]: readonly Float32Array[]): null {
    largest(logits!);
    this.logits = logits!.slice();
    return null;
  }
  result(): Float32Array {
    return this.logits;
  }
}

/**
 * Log-probabilities of label words. Words of one token need the logits behind the text alone. The others go on behind
 * the text in chunks, one token deeper with every move, a sequence for each beginning that is not yet a whole word.
 */
export class ScoreWords implements Strategy<Classification> {
  readonly goesBack = true;
  readonly staysAtText: boolean;
  private readonly found: Float64Array;
  private left: number[][];
  /** Words at hand, and where their sequences stand. */
  private chunk: number[] = [];
  private open: [node: WordNode, logprob: number][] = [];
  private first: Map<number, number> | null = null;

  constructor(
    private readonly verbalizer: Verbalizer,
    private readonly clock: Clock,
  ) {
    this.found = new Float64Array(verbalizer.words.length).fill(-Infinity);
    this.left = chunksOf(verbalizer.words, WORDS_AT_ONCE);
    this.staysAtText = !this.left.length;
  }

  limit(sequences: number): void {
    if (sequences < WORDS_AT_ONCE) this.left = chunksOf(this.verbalizer.words, Math.max(1, sequences));
  }

  advance(logits: readonly Float32Array[]): Move | null {
    const chances = logits.map(logProbabilities);
    if (!this.first) {
      this.first = new Map(this.verbalizer.words.map(([token]) => [token!, chances[0]!(token!)]));
      this.verbalizer.words.forEach((word, i) => {
        if (word.length === 1) this.found[i] = this.first!.get(word[0]!)!;
      });
      return this.nextChunk();
    }
    const move: Move & { parents: number[] } = { tokens: [], parents: [] };
    const open: typeof this.open = [];
    this.open.forEach(([node, before], row) => {
      for (const [token, child] of node.children) {
        const logprob = before + chances[row]!(token);
        for (const word of child.words) this.found[this.chunk[word]!] = logprob;
        if (!child.children.size) continue;
        move.tokens.push(token);
        move.parents.push(row);
        open.push([child, logprob]);
      }
    });
    this.open = open;
    return open.length ? move : this.nextChunk();
  }

  result(): Classification {
    return { ...this.verbalizer.classification(this.found), timings: this.clock.timings(1) };
  }

  private nextChunk(): Move | null {
    const chunk = this.left.shift();
    if (!chunk) {
      this.clock.tick();
      return null;
    }
    this.chunk = chunk;
    const { children } = wordTree(chunk.map((index) => this.verbalizer.words[index]!));
    this.open = [...children].map(([token, child]) => [child, this.first!.get(token)!]);
    return { tokens: [...children.keys()], parents: null };
  }
}

/** Words of several tokens, by index, so that a chunk's tree has `width` inner nodes at most at every depth. */
function chunksOf(words: readonly (readonly number[])[], width: number): number[][] {
  const chunks: number[][] = [];
  let nodes: Set<string>[] = [];
  const long = words.flatMap((word, i) => (word.length > 1 ? [i] : []));
  for (const index of long.sort((a, b) => compare(words[a]!, words[b]!))) {
    const inner = words[index]!.slice(0, -1).map((_, depth) => words[index]!.slice(0, depth + 1).join());
    const fits = inner.every((node, depth) => !nodes[depth] || nodes[depth].has(node) || nodes[depth].size < width);
    if (!chunks.length || !fits) {
      chunks.push([]);
      nodes = [];
    }
    chunks.at(-1)!.push(index);
    inner.forEach((node, depth) => (nodes[depth] ??= new Set()).add(node));
  }
  return chunks;
}

function compare(one: readonly number[], other: readonly number[]): number {
  const at = one.findIndex((token, i) => token !== other[i]);
  return at < 0 ? one.length - other.length : at < other.length ? one[at]! - other[at]! : 1;
}

export interface GenerateParts {
  eos: readonly number[];
  decode: (ids: readonly number[]) => string;
  encode: (text: string) => number[];
  history: Iterable<number>;
  clock: Clock;
  processors?: Processors | null;
  onText?: ((piece: string) => void) | undefined;
}

/** Generates until an end token, a stop string, the length, or the end of a choice. */
export class Generate implements Strategy<Generation> {
  private readonly sampler: Sampler;
  private readonly text: Detokenizer | null;
  private choice: WordNode | null;
  private readonly ids: number[] = [];
  private readonly logprobs: number[] = [];
  private reason: Generation["finishReason"] = "length";

  constructor(
    private readonly sampling: Sampling,
    private readonly parts: GenerateParts,
  ) {
    this.sampler = new Sampler(sampling, parts.history);
    this.text = parts.onText || sampling.stop.length ? new Detokenizer(parts.decode, sampling.stop) : null;
    this.choice = sampling.choices.length ? choiceTree(sampling, parts.encode) : null;
  }

  advance([logits]: readonly Float32Array[]): Move | null {
    const { choice } = this;
    const { eos } = this.parts;
    const allowed = choice ? [...choice.children.keys(), ...(choice.words.length ? eos : [])] : null;
    const { processors } = this.parts;
    // The model's own logits are looked at for NaN; processors put infinities on purpose.
    const scores = processors?.active && !choice ? processors.apply((largest(logits), logits), this.ids) : logits;
    const token = this.sampler.choose(scores, allowed);
    this.parts.clock.tick();
    if (eos.includes(token) && !choice?.children.has(token)) return this.end(choice ? "stop" : "eos");
    this.ids.push(token);
    if (this.sampling.logprobs) this.logprobs.push(logProbabilities(logits)(token));
    if (this.text) {
      this.say(this.text.add(token));
      if (this.text.stopped) return this.end("stop");
    }
    if (choice) {
      this.choice = choice.children.get(token)!;
      if (!this.choice.children.size) return this.end("stop");
    } else if (this.ids.length >= this.sampling.maxNewTokens) return this.end("length");
    return { tokens: [token], parents: [0] };
  }

  result(): Generation {
    return {
      text: this.text ? this.text.text : this.parts.decode(this.ids),
      tokenIds: this.ids,
      finishReason: this.reason,
      timings: this.parts.clock.timings(this.ids.length),
      logprobs: this.logprobs,
    };
  }

  private say(piece: string): void {
    if (piece) this.parts.onText?.(piece);
  }

  private end(reason: Generation["finishReason"]): null {
    this.reason = reason;
    if (this.text) this.say(this.text.finish());
    return null;
  }
}

function choiceTree(sampling: Sampling, encode: (text: string) => number[]): WordNode {
  const choices = sampling.choices.map(encode);
  const longest = Math.max(...choices.map((ids) => ids.length));
  if (longest > sampling.maxNewTokens) {
    throw new InputError(
      `the longest of the choices has ${longest} tokens, and maxNewTokens is ${sampling.maxNewTokens}; raise it, or ` +
        "shorten the choice",
    );
  }
  return wordTree(choices);
}
