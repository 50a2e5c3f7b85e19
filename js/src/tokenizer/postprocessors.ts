/** Post-processors of `tokenizer.json`: special tokens around one text or two, and trimmed offsets. */

import { UnsupportedError } from "../errors.ts";
import type { Encoding } from "./tokenizer.ts";

/** Takes the encodings of `sources`, one or two, and gives the parts to join. */
export type PostProcessor = (texts: Encoding[], addSpecialTokens: boolean, sources: readonly string[]) => Encoding[];

export function makePostProcessor(spec: any, tokenOf: (id: number) => string): PostProcessor {
  if (!spec) return (texts) => typed(texts);
  switch (spec.type) {
    case "Sequence": {
      const steps: PostProcessor[] = spec.processors.map((one: any) => makePostProcessor(one, tokenOf));
      return (texts, special, sources) => steps.reduce((found, step) => step(found, special, sources), texts);
    }
    case "ByteLevel":
      return (texts, _, sources) =>
        typed(spec.trim_offsets ? texts.map((one) => trim(one, spec.add_prefix_space, tokenOf, sources)) : texts);
    case "TemplateProcessing":
      return (texts, special) => applyTemplate(spec, texts, special);
    case "BertProcessing": {
      const [sep, cls] = [spec.sep[1], spec.cls[1]] as [number, number];
      return (texts, special) => {
        if (!special) return typed(texts);
        return texts.map((one, i) => surround(withType(one, i), i ? [] : [cls], [sep], i));
      };
    }
    case "RobertaProcessing": {
      const [sep, cls] = [spec.sep[1], spec.cls[1]] as [number, number];
      return (texts, special, sources) => {
        const found = texts
          .map((one) => (spec.trim_offsets ? trim(one, spec.add_prefix_space, tokenOf, sources) : one))
          .map((one) => withType(one, 0));
        return special ? found.map((one, i) => surround(one, [i ? sep : cls], [sep], 0)) : found;
      };
    }
    default:
      throw new UnsupportedError(`post-processor ${spec.type} of tokenizer.json is not known here; there are \
TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel and Sequence`);
  }
}

/** Without special tokens the second of a pair is segment 1. */
const typed = (texts: Encoding[]): Encoding[] => (texts.length > 1 ? texts.map(withType) : texts);

function withType(one: Encoding, type: number): Encoding {
  return { ...one, typeIds: one.ids.map(() => type) };
}

function special(ids: number[], type: number): Encoding {
  return { ids, offsets: ids.map(() => [0, 0]), typeIds: ids.map(() => type), sequences: ids.map(() => null) };
}

function surround(one: Encoding, before: number[], after: number[], type: number): Encoding {
  return join([special(before, type), one, special(after, type)]);
}

export function join(parts: Encoding[]): Encoding {
  return {
    ids: parts.flatMap((part) => part.ids),
    offsets: parts.flatMap((part) => part.offsets),
    typeIds: parts.flatMap((part) => part.typeIds),
    sequences: parts.flatMap((part) => part.sequences),
  };
}

function applyTemplate(spec: any, texts: Encoding[], addSpecialTokens: boolean): Encoding[] {
  const template: any[] = texts.length > 1 ? spec.pair : spec.single;
  const found: Encoding[] = [];
  for (const part of template) {
    if (part.Sequence) {
      const text = texts[part.Sequence.id === "A" ? 0 : 1]!;
      found.push(withType(text, part.Sequence.type_id));
    } else if (addSpecialTokens) {
      found.push(special(spec.special_tokens[part.SpecialToken.id].ids, part.SpecialToken.type_id));
    }
  }
  return found;
}

/** Take the spaces that byte-level tokens hold out of their offsets: a character for a space, of one unit or of two. */
function trim(one: Encoding, addPrefixSpace: boolean, tokenOf: (id: number) => string, sources: readonly string[]): Encoding {
  const isSpace = (char: string): boolean => char === "Ġ" || /[\u0009-\u000d \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]/.test(char);
  const offsets = one.offsets.map(([from, to], i): [number, number] => {
    const source = sources[one.sequences[i] ?? 0]!;
    const chars = [...tokenOf(one.ids[i]!)];
    let leading = 0;
    while (leading < chars.length && isSpace(chars[leading]!)) leading++;
    let trailing = 0;
    while (trailing < chars.length && isSpace(chars[chars.length - 1 - trailing]!)) trailing++;
    if (leading === 1 && (i === 0 || from === 0) && addPrefixSpace) leading = 0; // more are not what was added
    for (; leading > 0 && from < to; leading--) from += source.codePointAt(from)! > 0xffff ? 2 : 1;
    let end = to;
    for (; trailing > 0 && end > 0; trailing--) end -= end > 1 && source.codePointAt(end - 2)! > 0xffff ? 2 : 1;
    return [from, trailing ? to : Math.max(end, from)];
  });
  return { ...one, offsets };
}
