/** What a base's generation_config says of every answer, done to the logits as transformers' processors do it. */

import { InputError } from "../errors.ts";
import { FormatError } from "../json.ts";
import { checkGeneration, GENERATION_FIELDS } from "../manifest.ts";

/** The fields of the manifest's `generation`, a later layer's before an earlier one's. */
export function generationFields(...layers: Record<string, any>[]): Record<string, any> {
  const merged: Record<string, any> = {};
  for (const layer of layers) {
    for (const name of GENERATION_FIELDS) if (layer[name] !== undefined && layer[name] !== null) merged[name] = layer[name];
  }
  try {
    return checkGeneration(merged);
  } catch (error) {
    if (error instanceof FormatError) throw new InputError(error.message);
    throw error;
  }
}

/** Changes one sequence's scores before a token is chosen; the repetition penalty is the sampler's. */
export class Processors {
  /** Whether anything is ever changed. */
  readonly active: boolean;
  private readonly ngram: number;
  private readonly bad: number[][];
  private readonly least: number;
  private readonly first: number | null;
  private readonly last: number[];
  private readonly never: number[];
  private readonly notFirst: number[];
  private readonly begin: number;

  constructor(
    fields: Record<string, any>,
    private readonly history: readonly number[],
    private readonly eos: readonly number[],
    private readonly maxNewTokens: number,
  ) {
    const { forced_bos_token_id: forced = null } = fields;
    this.ngram = fields["no_repeat_ngram_size"] ?? 0;
    this.bad = (fields["bad_words_ids"] ?? []).filter((word: number[]) => word.length > 1 || !eos.includes(word[0]!));
    this.least = Math.max((fields["min_length"] ?? 0) - history.length, eos.length ? (fields["min_new_tokens"] ?? 0) : 0);
    this.first = history.length === 1 ? forced : null;
    this.last = fields["forced_eos_token_id"] ?? [];
    this.never = fields["suppress_tokens"] ?? [];
    this.notFirst = fields["begin_suppress_tokens"] ?? [];
    this.begin = history.length <= 1 && forced !== null ? 1 : 0;
    this.active =
      this.ngram > 0 || this.least > 0 || this.first !== null ||
      [this.bad, this.last, this.never, this.notFirst].some((list) => list.length > 0);
  }

  /** Scores behind `answer`, changed in a copy. */
  apply(logits: Float32Array, answer: readonly number[]): Float32Array {
    const scores = logits.slice();
    const ids = [...this.history, ...answer];
    const ban = (tokens: readonly number[]): void => {
      for (const token of tokens) if (token < scores.length) scores[token] = -Infinity;
    };
    const force = (tokens: readonly number[]): void => {
      scores.fill(-Infinity);
      for (const token of tokens) scores[token] = 0;
    };
    ban(this.repeats(ids));
    ban(this.bad.filter((word) => endsWith(ids, word.slice(0, -1))).map((word) => word.at(-1)!));
    if (answer.length < this.least) ban(this.eos);
    if (this.first !== null && !answer.length) force([this.first]);
    if (this.last.length && answer.length === this.maxNewTokens - 1) force(this.last);
    ban(this.never);
    if (answer.length === this.begin) ban(this.notFirst);
    return scores;
  }

  /** Tokens that would complete an n-gram that is there. */
  private repeats(ids: readonly number[]): number[] {
    const size = this.ngram;
    if (!size || ids.length < size) return [];
    const end = ids.slice(ids.length - size + 1);
    return ids.flatMap((_, at) =>
      at + size <= ids.length && end.every((id, i) => ids[at + i] === id) ? [ids[at + size - 1]!] : [],
    );
  }
}

function endsWith(ids: readonly number[], end: readonly number[]): boolean {
  return end.length <= ids.length && end.every((id, i) => ids[ids.length - end.length + i] === id);
}
