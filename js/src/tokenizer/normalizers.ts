/** Normalizers of `tokenizer.json`, exact with the Rust library, offsets included. */

import { fromBase64 } from "../bytes.ts";
import { UnsupportedError } from "../errors.ts";
import { Piece } from "./piece.ts";
import { compilePattern } from "./pattern.ts";
import * as unicode from "./unicode.ts";

export type Normalizer = (piece: Piece) => Piece;

export function makeNormalizer(spec: any): Normalizer {
  if (!spec) return (piece) => piece;
  switch (spec.type) {
    case "Sequence": {
      const steps: Normalizer[] = spec.normalizers.map(makeNormalizer);
      return (piece) => steps.reduce((found, step) => step(found), piece);
    }
    case "BertNormalizer":
      return bert(spec);
    case "NFC":
    case "NFKC":
      return (piece) => piece.changed(unicode.compose(unicode.decompose(piece.chars, spec.type === "NFKC")));
    case "NFD":
    case "NFKD":
      return (piece) => piece.changed(unicode.decompose(piece.chars, spec.type === "NFKD"));
    case "Lowercase":
      return lowered;
    case "StripAccents":
      return (piece) => piece.filtered((char) => !unicode.ACCENTS.has(char.codePointAt(0)!));
    case "Strip":
      return (piece) => strip(piece, spec.strip_left, spec.strip_right);
    case "Replace": {
      const pattern = compilePattern(spec.pattern);
      return (piece) => piece.replaced(pattern, spec.content);
    }
    case "Prepend":
      return (piece) => piece.prepended(spec.prepend);
    case "Precompiled":
      return precompiled(spec.precompiled_charsmap);
    default:
      throw new UnsupportedError(`normalizer ${spec.type} of tokenizer.json is not known here; there are BertNormalizer, \
NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip, Replace, Prepend, Precompiled and Sequence`);
  }
}

function lowered(piece: Piece): Piece {
  return piece.changed(piece.chars.flatMap((char) => [...unicode.lowercase(char)].map((c, i): unicode.Change => [c, i ? 1 : 0])));
}

const isSpace = (char: string): boolean => unicode.SPACES.has(char.codePointAt(0)!);

function strip(piece: Piece, left: boolean, right: boolean): Piece {
  let from = 0;
  let to = piece.chars.length;
  while (left && from < to && isSpace(piece.chars[from]!)) from++;
  while (right && to > from && isSpace(piece.chars[to - 1]!)) to--;
  return piece.slice(from, to);
}

function bert(spec: any): Normalizer {
  const accents: boolean = spec.strip_accents ?? spec.lowercase;
  return (piece) => {
    if (spec.clean_text) {
      const clean = piece.filtered((char) => {
        const code = char.codePointAt(0)!;
        return code !== 0xfffd && !unicode.BERT_CONTROL.has(code);
      });
      piece = new Piece(clean.chars.map((char) => (isSpace(char) ? " " : char)), clean.starts, clean.ends);
    }
    if (spec.handle_chinese_chars) {
      piece = piece.changed(
        piece.chars.flatMap((char): unicode.Change[] =>
          char > "\u2e7f" && unicode.BERT_HAN.has(char.codePointAt(0)!) ? [[" ", 0], [char, 1], [" ", 1]] : [[char, 0]],
        ),
      );
    }
    if (accents) {
      piece = piece.changed(unicode.decompose(piece.chars, false));
      piece = piece.filtered((char) => !unicode.NONSPACING.has(char.codePointAt(0)!));
    }
    return spec.lowercase ? lowered(piece) : piece;
  };
}

/** SentencePiece's table of replacements: a double-array trie and the texts that it points into. */
function precompiled(base64: string): Normalizer {
  const data = fromBase64(base64);
  const view = new DataView(data.buffer);
  const size = data.length >= 4 ? view.getUint32(0, true) : 0;
  const trie = Array.from({ length: size >> 2 }, (_, i) => view.getUint32(4 + 4 * i, true));
  const texts = data.subarray(4 + size);
  const encoder = new TextEncoder();
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const segmenter = new Intl.Segmenter(undefined, { granularity: "grapheme" });
  const offset = (unit: number): number => ((unit >>> 10) << ((unit & 512) >>> 6)) >>> 0;

  const replacement = (text: string): string | null => {
    if (!trie.length) return null;
    let node = offset(trie[0]!);
    for (const byte of encoder.encode(text)) {
      if (byte === 0) break;
      node = (node ^ byte) >>> 0;
      const unit = trie[node];
      if (unit === undefined || (unit & 0x800000ff) >>> 0 !== byte) return null;
      node = (node ^ offset(unit)) >>> 0;
      if ((unit >>> 8) & 1) {
        const from = trie[node]! & 0x7fffffff; // the shortest match, as the library takes it
        return decoder.decode(texts.subarray(from, texts.indexOf(0, from)));
      }
    }
    return null;
  };

  return (piece) => {
    const changes: unicode.Change[] = [];
    let modified = false;
    const replace = (old: string, text: string): void => {
      modified = true;
      const added = [...text].length - [...old].length;
      for (const char of text) changes.push([char, 0]);
      for (let i = 1; i <= added; i++) changes[changes.length - i]![1] = 1;
      if (added < 0 && changes.length) changes.at(-1)![1] += added;
    };
    for (const { segment } of segmenter.segment(piece.text)) {
      const whole = encoder.encode(segment).length < 6 ? replacement(segment) : null;
      if (whole !== null) {
        replace(segment, whole);
        continue;
      }
      for (const char of segment) {
        const found = replacement(char);
        if (found === null) changes.push([char, 0]);
        else replace(char, found);
      }
    }
    return modified ? piece.changed(changes) : piece;
  };
}
