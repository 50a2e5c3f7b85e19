/** Templates: where the virtual tokens and the text stand, as in `"{prompt}{text}\nSentiment:"`. */

import { InputError, TemplateError } from "./errors.ts";
import { FormatError, check, repr, type Fields } from "./json.ts";

export type Part = { literal: string } | { slot: string } | { virtual: number | null } | { mask: true };

/** A request's text: a string fills `{text}`, an object fills slots by name. */
export type Text = string | Readonly<Record<string, string>>;

/** What a template needs of a tokenizer. */
export interface TemplateTokenizer {
  readonly maskToken: string | null;
  encode(text: string, addSpecialTokens?: boolean): number[];
  /** Where each of its tokens ends, bare. */
  ends(text: string): number[];
}

export interface Placement {
  numVirtualTokens: number;
  firstVirtualId: number;
  maxLength?: number | null;
  addSpecialTokens?: boolean;
}

const FIELD = /\{\{|\}\}|\{([a-z_][a-z0-9_]*)(?::(\d+))?\}|[{}]/g;

/** An ordered list of parts. */
export class Template {
  constructor(readonly parts: readonly Part[]) {}

  /** Read the written form. */
  static parse(text: string): Template {
    const parts: Part[] = [];
    let literal = "";
    let position = 0;
    for (const match of text.matchAll(FIELD)) {
      literal += text.slice(position, match.index);
      position = match.index + match[0].length;
      if (match[0] === "{{" || match[0] === "}}") {
        literal += match[0][0];
        continue;
      }
      if (match[1] === undefined) {
        throw new TemplateError(`template ${repr(text)} has a stray ${repr(match[0])}; write ${repr(match[0] + match[0])}`);
      }
      if (literal) parts.push({ literal });
      literal = "";
      if (match[2] !== undefined && match[1] !== "prompt") {
        throw new TemplateError(`template ${repr(text)}: only {prompt:N} takes a number, found ${match[0]}`);
      }
      if (match[1] === "prompt") parts.push({ virtual: match[2] === undefined ? null : Number(match[2]) });
      else parts.push(match[1] === "mask" ? { mask: true } : { slot: match[1] });
    }
    literal += text.slice(position);
    if (literal) parts.push({ literal });
    return new Template(parts).checked();
  }

  /** Read the form stored in prompt files (a list of one-key objects). */
  static fromJson(data: unknown): Template {
    const parts: Part[] = [];
    try {
      for (const item of check<unknown[]>(data, "list", "template")) {
        const entries = Object.entries(check<Fields>(item, "dict", "template part"));
        if (entries.length !== 1) throw new FormatError(`a template part has ${entries.length} keys, 1 is needed`);
        const [key, value] = entries[0]!;
        if (key === "literal") parts.push({ literal: check<string>(value, "str", "literal") });
        else if (key === "slot") parts.push({ slot: check<string>(value, "str", "slot") });
        else if (key === "virtual_tokens") {
          parts.push({ virtual: check<number | null>(value, ["int", "null"], "virtual_tokens") });
        } else if (key === "mask") parts.push({ mask: true });
        else throw new FormatError(`unknown template part ${repr(key)}`);
      }
    } catch (error) {
      if (error instanceof FormatError) throw new TemplateError(`bad template: ${error.message}`);
      throw error;
    }
    return new Template(parts).checked();
  }

  private checked(): Template {
    if (!this.slots.length) {
      throw new TemplateError(`template ${repr(String(this))} has no slot for the text; write {text} where it belongs`);
    }
    const counts = this.virtualCounts;
    if (counts.filter((count) => count === null).length > 1) {
      throw new TemplateError(
        `template ${repr(String(this))} has {prompt} twice; give all but one a count, as {prompt:4}`,
      );
    }
    if (counts.some((count) => count !== null && count < 1)) {
      throw new TemplateError(`template ${repr(String(this))}: {prompt:N} needs N of at least 1`);
    }
    return this;
  }

  /** The written form. */
  toString(): string {
    return this.parts
      .map((part) => {
        if ("literal" in part) return part.literal.replace(/\{/g, "{{").replace(/\}/g, "}}");
        if ("slot" in part) return `{${part.slot}}`;
        if ("mask" in part) return "{mask}";
        return part.virtual === null ? "{prompt}" : `{prompt:${part.virtual}}`;
      })
      .join("");
  }

  /** Names of the request's fields, in order. */
  get slots(): string[] {
    return this.parts.flatMap((part) => ("slot" in part ? [part.slot] : []));
  }

  get virtualCounts(): (number | null)[] {
    return this.parts.flatMap((part) => ("virtual" in part ? [part.virtual] : []));
  }

  get masks(): number {
    return this.parts.filter((part) => "mask" in part).length;
  }

  /** Whether all virtual tokens stand in front, so that their keys and values can be cached. */
  get promptIsPrefix(): boolean {
    return !this.parts.slice(1).some((part) => "virtual" in part);
  }

  /** The same template with no virtual tokens. */
  withoutPrompt(): Template {
    return new Template(this.parts.filter((part) => !("virtual" in part)));
  }

  /** "a" in every slot, to try a template with. */
  get trial(): Record<string, string> {
    return Object.fromEntries(this.slots.map((slot) => [slot, "a"]));
  }

  checkFields(fields: Readonly<Record<string, string>>): void {
    const missing = this.slots.find((name) => !Object.hasOwn(fields, name));
    if (missing !== undefined) {
      const given = Object.keys(fields).join(", ") || "nothing";
      throw new InputError(`the template ${repr(String(this))} needs ${repr(missing)}; given: ${given}`);
    }
  }

  /** Token ids of one request; the last slot is cut where the result would exceed `maxLength`. */
  encode(tokenizer: TemplateTokenizer, fields: Readonly<Record<string, string>>, placement: Placement): number[] {
    this.checkFields(fields);
    let ids = this.ids(tokenizer, fields, placement);
    const limit = placement.maxLength ?? null;
    if (limit === null || ids.length <= limit) return ids;
    const name = this.slots.at(-1)!;
    const text = fields[name]!;
    const ends = tokenizer.ends(text);
    let over = ids.length - limit;
    let tokens = ends.length;
    while (tokens > 0) {
      tokens = Math.max(0, tokens - over);
      ids = this.ids(tokenizer, { ...fields, [name]: cutAt(text, ends, tokens) }, placement);
      over = ids.length - limit;
      if (over <= 0) return ids;
    }
    throw new InputError(`the template's fixed parts and prompt take ${ids.length} tokens; at most ${limit} fit`);
  }

  private ids(tokenizer: TemplateTokenizer, fields: Readonly<Record<string, string>>, placement: Placement): number[] {
    const special = placement.addSpecialTokens ?? true;
    const counts = this.counts(placement.numVirtualTokens);
    const runs: (string | number[])[] = [];
    let next = placement.firstVirtualId;
    for (const part of this.parts) {
      if ("virtual" in part) {
        const count = counts.shift()!;
        runs.push(range(next, next + count));
        next += count;
        continue;
      }
      let text: string | null;
      if ("mask" in part) text = tokenizer.maskToken;
      else text = "slot" in part ? fields[part.slot]! : part.literal;
      if (text === null) throw new TemplateError("the template has {mask}, and this tokenizer has no mask token");
      const last = runs.at(-1);
      if (typeof last === "string") runs[runs.length - 1] = last + text;
      else runs.push(text);
    }
    const texts = runs.filter((run) => typeof run === "string");
    if (texts.length === 1 && (typeof runs[0] === "string" || runs.length === 2) && typeof runs.at(-1) === "string") {
      const lead = typeof runs[0] === "string" ? [] : runs[0]!;
      return [...lead, ...tokenizer.encode(texts[0]!, special)];
    }
    const [before, after] = special ? specials(tokenizer) : [[], []];
    let ids: number[] = [];
    let started = false;
    for (const run of runs) {
      if (typeof run !== "string" && !started && !ids.length) {
        ids = ids.concat(run);
        continue;
      }
      if (!started) {
        ids = ids.concat(before);
        started = true;
      }
      ids = ids.concat(typeof run === "string" ? tokenizer.encode(run, false) : run);
    }
    return [...ids, ...after];
  }

  private counts(numVirtualTokens: number): number[] {
    const slots = this.virtualCounts;
    if (!slots.length || numVirtualTokens === 0) return slots.map(() => 0);
    const fixed = slots.reduce<number>((sum, count) => sum + (count ?? 0), 0);
    const rest = numVirtualTokens - fixed;
    if (rest < 0 || (rest > 0 && !slots.includes(null))) {
      throw new TemplateError(
        `template ${repr(String(this))} places ${fixed} virtual tokens, and the prompt has ${numVirtualTokens}`,
      );
    }
    return slots.map((count) => count ?? rest);
  }
}

/** The longest beginning of a text of at most `count` tokens, which end at `ends`. */
export const cutAt = (text: string, ends: readonly number[], count: number): string =>
  ends.length <= count ? text : count ? text.slice(0, ends[count - 1]) : "";

export const range = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, i) => from + i);

/** Ids that the tokenizer puts before and after a text. */
function specials(tokenizer: TemplateTokenizer): [number[], number[]] {
  const bare = tokenizer.encode("a", false);
  const full = tokenizer.encode("a", true);
  for (let start = 0; start <= full.length - bare.length; start++) {
    if (bare.every((id, i) => full[start + i] === id)) return [full.slice(0, start), full.slice(start + bare.length)];
  }
  return [[], []];
}

export const LONE_SURROGATE = /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/;

/** A request's text as slot fields: a plain string fills `{text}`. */
export function asFields(text: unknown): Readonly<Record<string, string>> {
  const fields = typeof text === "string" ? { text } : text;
  if (typeof fields !== "object" || fields === null || Array.isArray(fields)) {
    throw new InputError(`the text is ${fields === null ? "null" : typeof text}; give a string, or an object of slot names to strings`);
  }
  for (const [name, value] of Object.entries(fields)) {
    if (typeof value !== "string") throw new InputError(`the text of ${repr(name)} is ${typeof value}; it must be a string`);
    if (LONE_SURROGATE.test(value)) {
      throw new InputError(
        "the text is no Unicode text: it holds half of a surrogate pair (U+D800 to U+DFFF); read it as UTF-8",
      );
    }
  }
  return fields as Record<string, string>;
}
