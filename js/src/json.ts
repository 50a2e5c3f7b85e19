/** Strict reading of our own JSON: duplicate, unknown and missing keys are errors, and 1.0 is no integer. */

/** A JSON number that is written as a float and has an integral value, as 1.0: no integer, though JavaScript sees none. */
export class Float {
  constructor(readonly value: number) {}
}

const MAX_DEPTH = 512;
const SPACE = /[ \t\n\r]*/y;
const NUMBER = /-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?/y;
const TEXT = /[^"\\\u0000-\u001f]*/y;
const ESCAPES: Record<string, string> = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };

/** A problem of a file's content, before its reader gives it a kind and says which file it is. */
export class FormatError extends Error {}

/**
 * Parse strict JSON: no duplicate keys, no NaN or Infinity (nor 1e999), not nested too deeply.
 * Objects have no prototype; integers beyond 2^53 are bigints; integral floats are `Float`.
 */
export function parseJson(data: string | Uint8Array): unknown {
  let text: string;
  try {
    text = typeof data === "string" ? data : new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(data);
  } catch {
    throw new FormatError("the text is no UTF-8");
  }
  let at = 0;
  const fail = (what: string): never => {
    throw new FormatError(`${what} at character ${at}`);
  };
  const sticky = (pattern: RegExp): RegExpExecArray | null => {
    pattern.lastIndex = at;
    const found = pattern.exec(text);
    if (found) at = pattern.lastIndex;
    return found;
  };
  const string = (): string => {
    at++;
    let found = "";
    for (;;) {
      found += sticky(TEXT)![0];
      const char = text[at];
      if (char === '"') {
        at++;
        return found;
      }
      if (char !== "\\") fail("expected the end of a string");
      const escape = text[at + 1];
      if (escape === "u") {
        const code = text.slice(at + 2, at + 6);
        if (!/^[0-9a-fA-F]{4}$/.test(code)) fail("bad \\u escape");
        found += String.fromCharCode(parseInt(code, 16));
        at += 6;
      } else {
        if (!(escape! in ESCAPES)) fail("bad escape");
        found += ESCAPES[escape!];
        at += 2;
      }
    }
  };
  const value = (depth: number): unknown => {
    if (depth > MAX_DEPTH) throw new FormatError("nested too deeply");
    sticky(SPACE);
    const char = text[at];
    if (char === "{") {
      const found: Record<string, unknown> = Object.create(null);
      at++;
      sticky(SPACE);
      if (text[at] === "}") {
        at++;
        return found;
      }
      for (;;) {
        sticky(SPACE);
        if (text[at] !== '"') fail("expected a key");
        const key = string();
        if (key in found) throw new FormatError(`duplicate key ${repr(key)}`);
        sticky(SPACE);
        if (text[at] !== ":") fail("expected ':'");
        at++;
        found[key] = value(depth + 1);
        sticky(SPACE);
        if (text[at] === "}") break;
        if (text[at] !== ",") fail("expected ',' or '}'");
        at++;
      }
      at++;
      return found;
    }
    if (char === "[") {
      const found: unknown[] = [];
      at++;
      sticky(SPACE);
      if (text[at] === "]") {
        at++;
        return found;
      }
      for (;;) {
        found.push(value(depth + 1));
        sticky(SPACE);
        if (text[at] === "]") break;
        if (text[at] !== ",") fail("expected ',' or ']'");
        at++;
      }
      at++;
      return found;
    }
    if (char === '"') return string();
    for (const [word, meaning] of [["true", true], ["false", false], ["null", null]] as const) {
      if (text.startsWith(word, at)) {
        at += word.length;
        return meaning;
      }
    }
    for (const word of ["NaN", "Infinity", "-Infinity"]) {
      if (text.startsWith(word, at)) throw new FormatError(`${word} is not allowed`);
    }
    const number = sticky(NUMBER);
    if (!number || number[0] === "") return fail("expected a value");
    const found = Number(number[0]);
    if (!Number.isFinite(found)) throw new FormatError(`the number ${number[0]} is too large`);
    if (number[1] || number[2]) return Number.isInteger(found) ? new Float(found) : found;
    return Number.isSafeInteger(found) ? found : BigInt(number[0]);
  };
  const found = value(0);
  sticky(SPACE);
  if (at !== text.length) fail("extra data");
  return found;
}

/** Plain JavaScript of what `parseJson` gave: `Float` as its number, prototypes as usual. */
export function plain(value: unknown): any {
  if (value instanceof Float) return value.value;
  if (Array.isArray(value)) return value.map(plain);
  if (value && typeof value === "object") {
    const found: Record<string, unknown> = {};
    for (const [key, one] of Object.entries(value)) {
      Object.defineProperty(found, key, { value: plain(one), enumerable: true, writable: true, configurable: true });
    }
    return found;
  }
  return value;
}

/** Deterministic JSON as Python writes it: sorted keys (by code point), no spaces. */
export function canonicalJson(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonicalJson).join(",")}]`;
  if (value && typeof value === "object" && !(value instanceof Float)) {
    const keys = Object.keys(value).sort(byCodePoint);
    const items = keys.map((key) => `${quote(key)}:${canonicalJson((value as Record<string, unknown>)[key])}`);
    return `{${items.join(",")}}`;
  }
  if (typeof value === "string") return quote(value);
  if (value instanceof Float) return pythonFloat(value.value);
  if (typeof value === "number" && !Number.isInteger(value)) return pythonFloat(value);
  return String(value);
}

/** A float as Python's `repr` writes it; both give the shortest digits that read back. */
function pythonFloat(value: number): string {
  if (Object.is(value, -0)) return "-0.0";
  const text = String(value);
  const size = Math.abs(value);
  if (value !== 0 && (size >= 1e16 || size < 1e-4)) {
    const [digits, exponent] = value.toExponential().split("e") as [string, string];
    const power = Number(exponent);
    return `${digits}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
  }
  return /[.e]/.test(text) ? text : `${text}.0`;
}

function quote(text: string): string {
  // JSON.stringify escapes lone surrogates, and beyond that what Python does with ensure_ascii=False.
  return JSON.stringify(text);
}

function byCodePoint(a: string, b: string): number {
  const left = [...a];
  const right = [...b];
  for (let i = 0; i < Math.min(left.length, right.length); i++) {
    const difference = left[i]!.codePointAt(0)! - right[i]!.codePointAt(0)!;
    if (difference) return difference;
  }
  return left.length - right.length;
}

/** A value as Python's `repr` would show it in a message, near enough. */
export function repr(value: unknown): string {
  if (typeof value === "string") {
    const text = value.replace(/\\/g, "\\\\").replace(/\n/g, "\\n").replace(/\t/g, "\\t").replace(/\r/g, "\\r");
    return text.includes("'") && !text.includes('"') ? `"${text}"` : `'${text.replace(/'/g, "\\'")}'`;
  }
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (value instanceof Float) return pythonFloat(value.value);
  if (Array.isArray(value)) return `[${value.map(repr).join(", ")}]`;
  return typeof value === "object" ? JSON.stringify(plain(value)) : String(value);
}

export type Kind = "str" | "int" | "float" | "bool" | "dict" | "list" | "null";

export function kindOf(value: unknown): string {
  if (value === null) return "NoneType";
  if (value instanceof Float) return "float";
  if (Array.isArray(value)) return "list";
  switch (typeof value) {
    case "string":
      return "str";
    case "boolean":
      return "bool";
    case "bigint":
      return "int";
    case "number":
      return Number.isInteger(value) ? "int" : "float";
    default:
      return "dict";
  }
}

/** Return `value` if it is of one of the kinds. */
export function check<T = unknown>(value: unknown, kinds: Kind | Kind[], where: string): T {
  const wanted = Array.isArray(kinds) ? kinds : [kinds];
  const found = kindOf(value);
  if (!wanted.some((kind) => kind === found || (kind === "null" && found === "NoneType"))) {
    throw new FormatError(`${where} must be ${wanted.join(" or ")}, found ${found}`);
  }
  return value as T;
}

export type Fields = Record<string, unknown>;

/** Return `data` as an object whose keys are exactly `required` and any of `optional`. */
export function checkKeys(data: unknown, where: string, required: string[], optional: string[] = []): Fields {
  if (kindOf(data) !== "dict") throw new FormatError(`${where} must be a JSON object, found ${kindOf(data)}`);
  const found = data as Fields;
  const known = [...required, ...optional];
  const unknown = Object.keys(found)
    .filter((key) => !known.includes(key))
    .sort(byCodePoint);
  if (unknown.length) throw new FormatError(`${where} has unknown key ${repr(unknown[0])}; known: ${known.join(", ")}`);
  const missing = required.filter((key) => !(key in found)).sort(byCodePoint);
  if (missing.length) throw new FormatError(`${where} lacks key ${repr(missing[0])}`);
  return found;
}

/** A key's value, or what stands for one that lacks (null is a value). */
export const given = (fields: Fields, key: string, fallback: unknown): unknown => (key in fields ? fields[key] : fallback);

/** The number of an `int` or `float`. */
export function numeric(value: unknown, where: string): number {
  const found = check(value, ["int", "float"], where);
  return found instanceof Float ? found.value : Number(found);
}
