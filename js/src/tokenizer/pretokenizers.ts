/** Pre-tokenizers of `tokenizer.json`: pieces to smaller pieces. */

import { UnsupportedError } from "../errors.ts";
import { compilePattern } from "./pattern.ts";
import type { Piece } from "./piece.ts";
import * as unicode from "./unicode.ts";

export type PreTokenizer = (pieces: Piece[]) => Piece[];
type Behavior = "Removed" | "Isolated" | "MergedWithPrevious" | "MergedWithNext" | "Contiguous";
/** From, to, and whether the pattern matched. */
type Match = [from: number, to: number, is: boolean];

export function makePreTokenizer(spec: any): PreTokenizer {
  if (!spec) return (pieces) => pieces;
  switch (spec.type) {
    case "Sequence": {
      const steps: PreTokenizer[] = spec.pretokenizers.map(makePreTokenizer);
      return (pieces) => steps.reduce((found, step) => step(found), pieces);
    }
    case "ByteLevel":
      return byteLevel(spec.add_prefix_space, spec.use_regex ?? true);
    case "BertPreTokenizer": {
      const isPunctuation = (char: string): boolean => unicode.BERT_PUNCTUATION.has(char.codePointAt(0)!);
      return (pieces) =>
        each(pieces, (piece) => each(split(piece, runs(piece, isSpace), "Removed"), (part) =>
          split(part, runs(part, isPunctuation), "Isolated"),
        ));
    }
    case "Whitespace":
      return (pieces) =>
        each(pieces, (piece) => split(piece, wordRuns(piece), "Removed"));
    case "WhitespaceSplit":
      return (pieces) => each(pieces, (piece) => split(piece, runs(piece, isSpace), "Removed"));
    case "Digits": {
      const isDigit = (char: string): boolean => unicode.DIGITS.has(char.codePointAt(0)!);
      const how: Behavior = spec.individual_digits ? "Isolated" : "Contiguous";
      return (pieces) => each(pieces, (piece) => split(piece, runs(piece, isDigit), how));
    }
    case "Punctuation": {
      const isPunctuation = (char: string): boolean => unicode.BERT_PUNCTUATION.has(char.codePointAt(0)!);
      return (pieces) => each(pieces, (piece) => split(piece, runs(piece, isPunctuation), spec.behavior ?? "Isolated"));
    }
    case "Metaspace":
      return metaspace(spec);
    case "Split": {
      const pattern = compilePattern(spec.pattern);
      return (pieces) => each(pieces, (piece) => split(piece, matches(piece, pattern, spec.invert), spec.behavior));
    }
    default:
      throw new UnsupportedError(`pre-tokenizer ${spec.type} of tokenizer.json is not known here; there are ByteLevel, \
BertPreTokenizer, Whitespace, WhitespaceSplit, Digits, Punctuation, Metaspace, Split and Sequence`);
  }
}

const isSpace = (char: string): boolean => unicode.SPACES.has(char.codePointAt(0)!);

function each(pieces: Piece[], split: (piece: Piece) => Piece[]): Piece[] {
  return pieces.flatMap(split);
}

/** Every character for which `is` holds, alone, and what stands between them. */
function runs(piece: Piece, is: (char: string) => boolean): Match[] {
  const found: Match[] = [];
  let from = 0;
  piece.chars.forEach((char, i) => {
    if (!is(char)) return;
    if (from < i) found.push([from, i, false]);
    found.push([i, i + 1, true]);
    from = i + 1;
  });
  if (from < piece.chars.length) found.push([from, piece.chars.length, false]);
  return found;
}

/** `\w+|[^\w\s]+`: what matches is kept, so white space counts as the match. */
function wordRuns(piece: Piece): Match[] {
  const kind = (char: string): number => {
    const code = char.codePointAt(0)!;
    return unicode.WORDS.has(code) ? 0 : unicode.SPACES.has(code) ? 2 : 1;
  };
  const found: Match[] = [];
  let from = 0;
  for (let i = 1; i <= piece.chars.length; i++) {
    if (i < piece.chars.length && kind(piece.chars[i]!) === kind(piece.chars[from]!)) continue;
    found.push([from, i, kind(piece.chars[from]!) === 2]);
    from = i;
  }
  return found;
}

function matches(piece: Piece, pattern: RegExp, invert: boolean): Match[] {
  const places = piece.offsets();
  const found: Match[] = [];
  let from = 0;
  for (const match of piece.text.matchAll(pattern)) {
    const start = places.get(match.index)!;
    const end = places.get(match.index + match[0].length)!;
    if (from < start) found.push([from, start, invert]);
    found.push([start, end, !invert]);
    from = end;
  }
  if (from < piece.chars.length) found.push([from, piece.chars.length, invert]);
  return found;
}

function split(piece: Piece, found: Match[], behavior: Behavior): Piece[] {
  let spans: [number, number][] = [];
  let previous: boolean | null = null;
  switch (behavior) {
    case "Isolated":
      spans = found.map(([from, to]) => [from, to]);
      break;
    case "Removed":
      spans = found.filter(([, , is]) => !is).map(([from, to]) => [from, to]);
      break;
    case "Contiguous":
      for (const [from, to, is] of found) {
        if (is === previous) spans.at(-1)![1] = to;
        else spans.push([from, to]);
        previous = is;
      }
      break;
    case "MergedWithPrevious":
      for (const [from, to, is] of found) {
        if (is && previous === false) spans.at(-1)![1] = to;
        else spans.push([from, to]);
        previous = is;
      }
      break;
    case "MergedWithNext":
      for (const [from, to, is] of [...found].reverse()) {
        if (is && previous === false) spans.at(-1)![0] = from;
        else spans.push([from, to]);
        previous = is;
      }
      spans.reverse();
      break;
    default:
      throw new UnsupportedError(`split behavior ${String(behavior)} of tokenizer.json is not known here`);
  }
  return spans.filter(([from, to]) => to > from).map(([from, to]) => piece.slice(from, to));
}

function metaspace(spec: any): PreTokenizer {
  const mark: string = spec.replacement;
  const scheme: string = spec.prepend_scheme ?? ((spec.add_prefix_space ?? true) ? "always" : "never");
  return (pieces) =>
    each(pieces, (piece) => {
      piece = piece.replaced(/ /gu, mark);
      const bare = piece.chars[0] !== mark;
      if (bare && (scheme === "always" || (scheme === "first" && piece.starts[0] === 0))) piece = piece.prepended(mark);
      if (!(spec.split ?? true)) return piece.chars.length ? [piece] : [];
      return split(piece, runs(piece, (char) => char === mark), "MergedWithNext");
    });
}

const CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"];

/** GPT-2's pattern: `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`. */
function gpt2Runs(piece: Piece): Match[] {
  const { chars } = piece;
  const kinds = chars.map((char) => {
    const code = char.codePointAt(0)!;
    return unicode.LETTERS.has(code) ? 1 : unicode.NUMBERS.has(code) ? 2 : unicode.SPACES.has(code) ? 3 : 0;
  });
  const found: Match[] = [];
  let at = 0;
  while (at < chars.length) {
    let end = at;
    if (chars[at] === "'") {
      const short = CONTRACTIONS.find((word) => chars.slice(at, at + word.length).join("") === word);
      if (short) end = at + short.length;
    }
    if (end === at) {
      const first = chars[at] === " " && at + 1 < chars.length && kinds[at + 1] !== 3 ? at + 1 : at;
      end = first;
      while (end < chars.length && kinds[end] === kinds[first]) end++;
      // White space leaves its last character to what follows, unless it is alone.
      if (kinds[first] === 3 && end < chars.length && end - at > 1) end--;
    }
    found.push([at, end, true]);
    at = end;
  }
  return found;
}

/** GPT-2's characters for bytes: visible ones for themselves, the others from U+0100 on. */
export const BYTE_CHARS: readonly string[] = (() => {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const visible = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    return String.fromCharCode(visible ? byte : next++);
  });
})();
const encoder = new TextEncoder();

function byteLevel(addPrefixSpace: boolean, useRegex: boolean): PreTokenizer {
  return (pieces) =>
    each(pieces, (piece) => {
      if (addPrefixSpace && piece.chars[0] !== " ") piece = piece.prepended(" ");
      const parts = useRegex ? split(piece, gpt2Runs(piece), "Isolated") : [piece];
      return parts.map((part) =>
        part.changed(
          part.chars.flatMap((char) =>
            Array.from(encoder.encode(char), (byte, i): unicode.Change => [BYTE_CHARS[byte]!, i ? 1 : 0]),
          ),
        ),
      );
    });
}
