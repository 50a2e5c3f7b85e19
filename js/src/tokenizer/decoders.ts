/** Decoders of `tokenizer.json`: tokens back to text. */

import { UnsupportedError } from "../errors.ts";
import { compilePattern } from "./pattern.ts";
import { BYTE_CHARS } from "./pretokenizers.ts";

type Decoder = (tokens: string[]) => string[];

const CHAR_BYTES = new Map(BYTE_CHARS.map((char, byte) => [char, byte]));
const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
const strict = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });

export function makeDecoder(spec: any): (tokens: string[]) => string {
  if (!spec) return (tokens) => tokens.join(" ");
  const decode = chain(spec);
  return (tokens) => decode(tokens).join("");
}

function chain(spec: any): Decoder {
  switch (spec.type) {
    case "Sequence": {
      const steps: Decoder[] = spec.decoders.map(chain);
      return (tokens) => steps.reduce((found, step) => step(found), tokens);
    }
    case "ByteLevel":
      return (tokens) => [decoder.decode(Uint8Array.from(tokens.flatMap(bytesOfToken)))];
    case "WordPiece":
      return (tokens) =>
        tokens.map((token, i) => {
          let text = token;
          if (i > 0) text = token.startsWith(spec.prefix) ? token.slice(spec.prefix.length) : ` ${token}`;
          return spec.cleanup ? cleanup(text) : text;
        });
    case "Metaspace": {
      const scheme: string = spec.prepend_scheme ?? ((spec.add_prefix_space ?? true) ? "always" : "never");
      return (tokens) =>
        tokens.map((token, i) => token.replaceAll(spec.replacement, i === 0 && scheme !== "never" ? "" : " "));
    }
    case "BPEDecoder":
      return (tokens) => tokens.map((token, i) => token.replaceAll(spec.suffix, i === tokens.length - 1 ? "" : " "));
    case "Replace": {
      const pattern = compilePattern(spec.pattern);
      return (tokens) => tokens.map((token) => token.replace(pattern, () => spec.content));
    }
    case "ByteFallback":
      return byteFallback;
    case "Fuse":
      return (tokens) => [tokens.join("")];
    case "Strip":
      return (tokens) => tokens.map((token) => strip(token, spec.content, spec.start, spec.stop));
    default:
      throw new UnsupportedError(`decoder ${spec.type} of tokenizer.json is not known here; there are ByteLevel, \
WordPiece, Metaspace, BPEDecoder, Replace, ByteFallback, Fuse, Strip and Sequence`);
  }
}

function bytesOfToken(token: string): number[] {
  const found = [...token].map((char) => CHAR_BYTES.get(char));
  return found.every((byte) => byte !== undefined) ? (found as number[]) : [...encoder.encode(token)];
}

function cleanup(text: string): string {
  for (const [from, to] of [[" .", "."], [" ?", "?"], [" !", "!"], [" ,", ","], [" ' ", "'"], [" n't", "n't"],
    [" 'm", "'m"], [" do not", " don't"], [" 's", "'s"], [" 've", "'ve"], [" 're", "'re"]] as const) {
    text = text.replaceAll(from, to);
  }
  return text;
}

function byteFallback(tokens: string[]): string[] {
  const found: string[] = [];
  let bytes: number[] = [];
  const flush = (): void => {
    if (!bytes.length) return;
    try {
      found.push(strict.decode(Uint8Array.from(bytes)));
    } catch {
      found.push(...bytes.map(() => "\ufffd"));
    }
    bytes = [];
  };
  for (const token of tokens) {
    const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(token);
    if (byte) bytes.push(parseInt(byte[1]!, 16));
    else {
      flush();
      found.push(token);
    }
  }
  flush();
  return found;
}

function strip(token: string, content: string, start: number, stop: number): string {
  const chars = [...token];
  let from = 0;
  let to = chars.length;
  while (from < start && from < to && chars[from] === content) from++;
  while (to > from && chars.length - to < stop && chars[to - 1] === content) to--;
  return chars.slice(from, to).join("");
}
