/** Regular expressions of `tokenizer.json` (Oniguruma's) as JavaScript's, with the library's own character classes. */

import { UnsupportedError } from "../errors.ts";
import { CodeSet } from "./unicode.ts";
import * as unicode from "./unicode.ts";

const CLASSES: Record<string, CodeSet> = {
  L: unicode.LETTERS,
  N: unicode.NUMBERS,
  M: unicode.MARKS,
  P: unicode.PUNCTUATION,
  S: unicode.SYMBOLS,
  Lu: unicode.UPPER,
  Ll: unicode.LOWER,
};
const SHORT: Record<string, CodeSet> = { s: unicode.SPACES, w: unicode.WORDS };
/** What else a letter matches where case does not count. */
const FOLDED: Record<string, string> = { s: "sSſ", k: "kKK" };

/** `{"String": text}` or `{"Regex": pattern}` as a global expression. */
export function compilePattern(pattern: any): RegExp {
  if (typeof pattern?.String === "string") return new RegExp(escape(pattern.String), "gu");
  const source = pattern?.Regex;
  if (typeof source !== "string") throw new UnsupportedError("a pattern of tokenizer.json is neither String nor Regex");
  try {
    return new RegExp(translate(source), "gu");
  } catch (error) {
    if (error instanceof UnsupportedError) throw error;
    throw new UnsupportedError(`the pattern ${JSON.stringify(source)} of tokenizer.json is not understood here`);
  }
}

export const escape = (text: string): string => text.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&");

function translate(source: string): string {
  let found = "";
  let inClass = false;
  const ignoring = [false];
  const set = (codes: CodeSet, negated: boolean): string => {
    if (!negated) return inClass ? codes.toRegExp() : `[${codes.toRegExp()}]`;
    if (inClass) return complement(codes).toRegExp();
    return `[^${codes.toRegExp()}]`;
  };
  for (let i = 0; i < source.length; i++) {
    const rest = source.slice(i);
    const property = /^\\(p|P)\{(\^?)(\w+)\}/.exec(rest);
    if (property) {
      const codes = CLASSES[property[3]!];
      if (!codes) throw new UnsupportedError(`\\p{${property[3]}} in a pattern of tokenizer.json is not known here`);
      found += set(codes, (property[1] === "P") !== (property[2] === "^"));
      i += property[0].length - 1;
      continue;
    }
    const char = source[i]!;
    if (char === "\\") {
      const next = source[++i]!;
      const codes = SHORT[next.toLowerCase()];
      if (codes) found += set(codes, next !== next.toLowerCase());
      else if (/[dDbBAzZGhHRXKpPk1-9]/.test(next)) {
        throw new UnsupportedError(`\\${next} in a pattern of tokenizer.json is not known here`);
      } else if (/[nrtfv0ux]/.test(next)) found += `\\${next}`;
      else found += /[\\^$.*+?()[\]{}|/]/.test(next) || (inClass && next === "-") ? `\\${next}` : next;
      continue;
    }
    if (inClass) {
      if (char === "[" || rest.startsWith("&&")) {
        throw new UnsupportedError("classes of classes in a pattern of tokenizer.json are not known here");
      }
      if (char === "]") inClass = false;
      found += char;
      continue;
    }
    if (char === "[") inClass = true;
    if (char === "(") {
      const flags = /^\(\?i:/.exec(rest);
      ignoring.push(flags ? true : ignoring.at(-1)!);
      if (flags) {
        found += "(?:";
        i += 3;
        continue;
      }
      if (rest.startsWith("(?") && !/^\(\?(:|=|!|<=|<!)/.test(rest)) {
        throw new UnsupportedError(`${rest.slice(0, 4)} in a pattern of tokenizer.json is not known here`);
      }
    }
    if (char === ")") ignoring.pop();
    if (ignoring.at(-1) && /[a-zA-Z]/.test(char)) {
      const low = char.toLowerCase();
      found += `[${FOLDED[low] ?? low + low.toUpperCase()}]`;
    } else found += char;
    if (/[*+?}]/.test(char) && source[i + 1] === "+") {
      throw new UnsupportedError("possessive repeats in a pattern of tokenizer.json are not known here");
    }
  }
  return found;
}

function complement(codes: CodeSet): CodeSet {
  const runs: number[] = [];
  let last = 0;
  for (const border of codes.ranges()) {
    runs.push(border - last);
    last = border;
  }
  return new CodeSet([0, ...runs, 0x110000 - last]);
}
