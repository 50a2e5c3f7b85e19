/** Sets and maps of code points, packed in `tables.ts`. */

import { fromBase64 } from "../bytes.ts";
import * as tables from "./tables.ts";

function integers(text: string): number[] {
  const found: number[] = [];
  let value = 0;
  let shift = 1;
  for (const byte of fromBase64(text)) {
    value += (byte & 0x7f) * shift;
    shift *= 128;
    if (byte < 0x80) {
      found.push(value);
      value = 0;
      shift = 1;
    }
  }
  return found;
}

/** A set of code points, unpacked when first asked. */
export class CodeSet {
  private borders: Int32Array | null = null;
  private readonly ascii = new Uint8Array(128);

  constructor(private readonly packed: string | number[]) {}

  /** Where the set begins and ends, in turn. */
  ranges(): Int32Array {
    if (!this.borders) {
      let at = 0;
      const runs = typeof this.packed === "string" ? integers(this.packed) : this.packed;
      this.borders = Int32Array.from(runs, (length) => (at += length));
      for (let code = 0; code < 128; code++) this.ascii[code] = this.search(code) ? 1 : 0;
    }
    return this.borders;
  }

  has(code: number): boolean {
    if (!this.borders) this.ranges();
    return code < 128 ? this.ascii[code] === 1 : this.search(code);
  }

  /** The set as ranges inside a regular expression's character class. */
  toRegExp(): string {
    const borders = this.ranges();
    let text = "";
    for (let i = 0; i < borders.length; i += 2) {
      text += `\\u{${borders[i]!.toString(16)}}-\\u{${(borders[i + 1]! - 1).toString(16)}}`;
    }
    return text;
  }

  private search(code: number): boolean {
    const borders = this.borders!;
    let low = 0;
    let high = borders.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (borders[middle]! <= code) low = middle + 1;
      else high = middle;
    }
    return (low & 1) === 1;
  }
}

function codeMap(packed: string): () => Map<number, number> {
  let found: Map<number, number> | null = null;
  return () => {
    if (!found) {
      found = new Map();
      const values = integers(packed);
      let first = 0;
      for (let i = 0; i < values.length; i += 3) {
        first += values[i]!;
        const stride = (values[i + 1]! & 1) + 1;
        const shift = values[i + 2]! & 1 ? -(values[i + 2]! + 1) / 2 : values[i + 2]! / 2;
        for (let k = 0; k < values[i + 1]! >> 1; k++) found.set(first + k * stride, first + k * stride + shift);
      }
    }
    return found;
  };
}

export const LETTERS = new CodeSet(tables.LETTERS);
export const NUMBERS = new CodeSet(tables.NUMBERS);
export const MARKS = new CodeSet(tables.MARKS);
export const PUNCTUATION = new CodeSet(tables.PUNCTUATION_REGEX);
export const SYMBOLS = new CodeSet(tables.SYMBOLS);
export const UPPER = new CodeSet(tables.UPPER);
export const LOWER = new CodeSet(tables.LOWER_CASE);
export const WORDS = new CodeSet(tables.WORDS);
export const DIGITS = new CodeSet(tables.DIGITS);
export const BERT_CONTROL = new CodeSet(tables.BERT_CONTROL);
export const BERT_PUNCTUATION = new CodeSet(tables.BERT_PUNCTUATION);
export const BERT_HAN = new CodeSet(tables.BERT_HAN);
export const ACCENTS = new CodeSet(tables.ACCENTS);
export const NONSPACING = new CodeSet(tables.NONSPACING);
/** Unicode's White_Space, which is neither JavaScript's `\s` nor Python's. */
export const SPACES = new CodeSet([
  9, 5, 18, 1, 100, 1, 26, 1, 5599, 1, 2431, 11, 29, 2, 5, 1, 47, 1, 4000, 1,
]);
const NORMAL_FORMS = new CodeSet(tables.NORMAL_FORMS);
const COMBINING = codeMap(tables.COMBINING);
const LOWERCASE = codeMap(tables.LOWERCASE);

/** Lower case of one code point, without regard to its neighbours. */
export function lowercase(char: string): string {
  const code = char.codePointAt(0)!;
  if (code < 128) return code >= 65 && code <= 90 ? String.fromCharCode(code + 32) : char;
  if (code === 0x130) return "i\u0307";
  const found = LOWERCASE().get(code);
  return found === undefined ? char : String.fromCodePoint(found);
}

const combiningClass = (code: number): number => {
  const found = COMBINING().get(code);
  return found === undefined ? 0 : found - code;
};

/** A character of a changed text, and how it came: 0 in place of one, 1 in addition, -n in place of one and n more. */
export type Change = [char: string, change: number];

/** Decompose and order canonically, as the `unicode-normalization-alignments` crate does. */
export function decompose(chars: readonly string[], compatible: boolean): Change[] {
  const found: Change[] = [];
  let sorted = 0; // marks behind the last starter begin here
  const order = (): void => {
    const run = found.slice(sorted).map((one): [Change, number] => [one, combiningClass(one[0].codePointAt(0)!)]);
    run.sort((a, b) => a[1] - b[1]);
    for (let i = 0; i < run.length; i++) found[sorted + i] = run[i]![0];
  };
  for (const char of chars) {
    const code = char.codePointAt(0)!;
    const parts = code >= 0xa0 && NORMAL_FORMS.has(code) ? [...char.normalize(compatible ? "NFKD" : "NFD")] : [char];
    parts.forEach((part, i) => {
      if (combiningClass(part.codePointAt(0)!) === 0) {
        if (found.length - sorted > 1) order();
        found.push([part, i ? 1 : 0]);
        sorted = found.length;
      } else found.push([part, i ? 1 : 0]);
    });
  }
  if (found.length - sorted > 1) order();
  return found;
}

function composed(first: string, second: string): string | null {
  if (second.codePointAt(0)! < 0x300 || !NORMAL_FORMS.has(second.codePointAt(0)!)) return null;
  const found = (first + second).normalize("NFC");
  const size = found.codePointAt(0)! > 0xffff ? 2 : 1;
  return found.length === size ? found : null;
}

/** Compose what `decompose` gave. */
export function compose(parts: readonly Change[]): Change[] {
  const found: Change[] = [];
  let base: Change | null = null;
  let held: Change[] = [];
  let last: number | null = null;
  for (const [char, change] of parts) {
    const kind = combiningClass(char.codePointAt(0)!);
    if (!base) {
      if (kind) found.push([char, change]);
      else base = [char, change];
      continue;
    }
    if (last === null || last < kind) {
      const joined = composed(base[0], char);
      if (joined !== null) {
        base = [joined, base[1] + change - 1];
        continue;
      }
    }
    if (kind === 0) {
      found.push(base, ...held);
      base = [char, change];
      held = [];
      last = null;
    } else {
      held.push([char, change]);
      last = kind;
    }
  }
  if (base) found.push(base, ...held);
  return found;
}
