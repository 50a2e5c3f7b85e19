/** What a request does with logits, one step at a time: generate, answer with one of some texts, score label words. */

import { InputError } from "../errors.ts";
import type { Classification, Clock, Generation } from "../results.ts";
import { wordTree, type Verbalizer, type WordNode } from "../verbalizer.ts";
import { Detokenizer } from "./detokenizer.ts";
import type { Processors } from "./processors.ts";
import { Sampler, largest, logProbabilities, type Sampling } from "./sampling.ts";

/** The next token to run. */
export interface Step {
  token: number;
  /** Behind how many tokens after the text it stands. */
  depth: number;
}

export interface Strategy<T> {
  /** Take the logits behind the last token. */
  advance(logits: Float32Array): Step | null;
  result(): T;
  /** Whether it continues from states before the last one. */
  readonly goesBack?: boolean;
}

/** Hands out the logits behind the text. */
export class FirstLogits implements Strategy<Float32Array> {
  private logits: Float32Array = new Float32Array();
  advance(logits: Float32Array): null {
    largest(logits);
    this.logits = logits.slice();
    return null;
  }
  result(): Float32Array {
    return this.logits;
  }
}

/** Log-probabilities of label words, walking the tree of their tokens depth first. */
export class ScoreWords implements Strategy<Classification> {
  readonly goesBack = true;
  private readonly found: Float64Array;
  private here: [node: WordNode, logprob: number, depth: number];
  private readonly todo: [token: number, logprob: number, node: WordNode, depth: number][] = [];

  constructor(
    private readonly verbalizer: Verbalizer,
    private readonly clock: Clock,
  ) {
    this.found = new Float64Array(verbalizer.words.length).fill(-Infinity);
    this.here = [wordTree(verbalizer.words), 0, 0];
  }

  advance(logits: Float32Array): Step | null {
    const [node, before, depth] = this.here;
    const chance = logProbabilities(logits);
    for (const [token, child] of node.children) {
      const logprob = before + chance(token);
      for (const word of child.words) this.found[word] = logprob;
      if (child.children.size) this.todo.push([token, logprob, child, depth]);
    }
    const next = this.todo.pop();
    if (!next) {
      this.clock.tick();
      return null;
    }
    const [token, logprob, child, from] = next;
    this.here = [child, logprob, from + 1];
    return { token, depth: from };
  }

  result(): Classification {
    return { ...this.verbalizer.classification(this.found), timings: this.clock.timings(1) };
  }
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

  advance(logits: Float32Array): Step | null {
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
    return { token, depth: this.ids.length - 1 };
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
