/** What an encoder reads: ids, segments, and where each token stands in the request's text. */

import { InputError, TemplateError } from "./errors.ts";
import { repr } from "./json.ts";
import { cutAt, range, type Template } from "./template.ts";
import type { Encoding, Tokenizer } from "./tokenizer/tokenizer.ts";

type Offset = readonly [from: number, to: number];

/** One request's tokens; virtual ones, in front, included. */
export interface EncodedText {
  ids: number[];
  /** Segment of every token: 0, and 1 for the second text of a pair. */
  typeIds: number[];
  /** Characters that a token covers in the field asked for; null for tokens of anything else. */
  offsets: (Offset | null)[];
}

/** The two slots of a template that is nothing but a pair, else null. */
export function pairSlots(template: Template): [string, string] | null {
  const { parts, slots } = template.withoutPrompt();
  return parts.length === 2 && slots.length === 2 ? (slots as [string, string]) : null;
}

/** The field that tags or answers are looked up in. */
export function locatedSlot(template: Template): string {
  const pair = pairSlots(template);
  if (pair) return pair[1];
  return ["context", "text"].find((name) => template.slots.includes(name)) ?? template.slots.at(-1)!;
}

export interface EncodeOptions {
  numVirtualTokens: number;
  firstVirtualId: number;
  maxLength: number | null;
  truncate: boolean;
  addSpecialTokens: boolean;
  /** The field whose tokens get offsets; null: no offsets are needed. */
  locate: string | null;
}

/** Encode a request for an encoder; a template of two slots with nothing between them is the tokenizer's own pair. */
export function encodeText(
  template: Template,
  tokenizer: Tokenizer,
  given: Readonly<Record<string, string>>,
  options: EncodeOptions,
): EncodedText {
  template.checkFields(given);
  const fields = { ...given };
  const virtual = range(options.firstVirtualId, options.firstVirtualId + options.numVirtualTokens);
  const last = template.slots.at(-1)!;
  const pair = pairSlots(template);
  for (;;) {
    let encoded: EncodedText;
    if (pair) encoded = encodePair(pair, tokenizer, fields, virtual, options);
    else if (options.locate !== null) encoded = encodeLocated(template, tokenizer, fields, virtual, options);
    else {
      const ids = template.encode(tokenizer, fields, options);
      encoded = { ids, typeIds: ids.map(() => 0), offsets: ids.map(() => null) };
    }
    const over = options.maxLength === null ? 0 : encoded.ids.length - options.maxLength;
    if (over <= 0) return encoded;
    if (!options.truncate) {
      throw new InputError(
        `the text takes ${encoded.ids.length} tokens with its prompt and template, at most ${options.maxLength} fit; ` +
          "shorten it, or ask for truncation",
      );
    }
    const ends = tokenizer.ends(fields[last]!);
    if (!ends.length) {
      throw new InputError(
        `the template's fixed parts and prompt take ${encoded.ids.length} tokens; at most ${options.maxLength} fit`,
      );
    }
    fields[last] = cutAt(fields[last]!, ends, Math.max(0, ends.length - over));
  }
}

/** Virtual tokens in front of an encoding. */
function behind(virtual: number[], encoded: Encoding, offsets: (Offset | null)[]): EncodedText {
  return {
    ids: [...virtual, ...encoded.ids],
    typeIds: [...virtual.map(() => 0), ...encoded.typeIds],
    offsets: [...virtual.map(() => null), ...offsets],
  };
}

function encodePair(
  slots: [string, string],
  tokenizer: Tokenizer,
  fields: Record<string, string>,
  virtual: number[],
  options: EncodeOptions,
): EncodedText {
  const found = tokenizer.encodePair(fields[slots[0]]!, fields[slots[1]]!, options.addSpecialTokens);
  const wanted = options.locate === null ? -1 : slots.indexOf(options.locate);
  return behind(virtual, found, found.offsets.map((span, i) => (found.sequences[i] === wanted ? span : null)));
}

function encodeLocated(
  template: Template,
  tokenizer: Tokenizer,
  fields: Record<string, string>,
  virtual: number[],
  options: EncodeOptions,
): EncodedText {
  if (!template.promptIsPrefix) {
    throw new TemplateError(`template ${repr(String(template))}: tagging and questions need the virtual tokens in front`);
  }
  let joined = "";
  let start = 0;
  for (const part of template.parts) {
    if ("slot" in part && part.slot === options.locate) start = joined.length;
    if ("literal" in part) joined += part.literal;
    else if ("slot" in part) joined += fields[part.slot]!;
    else if ("mask" in part) joined += tokenizer.maskToken ?? "";
  }
  const end = start + fields[options.locate!]!.length;
  const found = tokenizer.encodeWithOffsets(joined, options.addSpecialTokens);
  const offsets = found.offsets.map(([low, high]): Offset | null =>
    low < end && high > start && high > low ? [Math.max(low, start) - start, Math.min(high, end) - start] : null,
  );
  const encoded = behind(virtual, found, offsets);
  return { ...encoded, typeIds: encoded.ids.map(() => 0) };
}

/** White space as Python's regular expressions know it. */
const WORD = /[^\s\x1c-\x1f\x85]+/g;

/** Where the words of a text stand. */
export function wordsOf(text: string): Offset[] {
  // U+FEFF is white space to JavaScript alone: hide it behind a letter while words are looked for.
  return [...text.replace(/\ufeff/g, "\u0061").matchAll(WORD)].map((match) => [match.index, match.index + match[0].length]);
}

/** For every word the index of its first token, null where truncation or the tokenizer dropped it. */
export function firstTokens(words: readonly Offset[], offsets: readonly (Offset | null)[]): (number | null)[] {
  let token = 0;
  return words.map(([start, end]) => {
    while (token < offsets.length && !(offsets[token] && offsets[token]![1] > start)) token++;
    const span = offsets[token];
    return span && span[0] < end ? token : null;
  });
}
