/**
 * Whether two base fingerprints are of one base. Formats and bounds are those of edgeprompt/package/fingerprint.py, which
 * says what they mean.
 */

const FORMAT_2 = "sha256-2:";
const FORMAT_3 = "sha256-3:";
const KNOWN = "known_values";
const MASKED_SIZES = "masked_head_sizes";
const OPTIONAL = ["masked_head", "final_logits_bias", "switched_off"];
const PROJECTIONS = 4;
const NORM_STEPS = 1024;
const PROJECTION_STEPS = 4096;
const ENTRY_BYTES = 3 + 2 * PROJECTIONS;
const NAMES_BYTES = 8;
const BFLOAT16 = 0;
const ONE = 0.008 * PROJECTION_STEPS;
const ALL = 0.0025 * PROJECTION_STEPS;
const NORM = 12;
const TINY = 2 ** -25;

const OTHER = "their sizes or embeddings differ";

interface Entry {
  kind: number;
  norm: number;
  sums: number[];
}

interface Fingerprint {
  first: string;
  signs: string;
  facts: Record<string, unknown> | null;
  /** Config values that the base's file tells, null where it tells all. */
  known: Record<string, unknown> | null;
  names: string;
  sketch: Entry[];
  /** Of the head of a masked language model. */
  head: Entry[];
}

/** Read a fingerprint of any format; one of no known format is compared as a whole. */
function parse(fingerprint: string): Fingerprint {
  const found: Fingerprint = { first: fingerprint, signs: "", facts: null, known: null, names: "", sketch: [], head: [] };
  if (fingerprint.startsWith(FORMAT_3)) {
    const parts = fingerprint.slice(FORMAT_3.length).split(".");
    try {
      if (parts.length !== 4) return found;
      const facts: unknown = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(decode(parts[2]!)));
      const data = decode(parts[3]!);
      if (!isObject(facts)) return found;
      const known = facts[KNOWN];
      if (known !== undefined && known !== null && !isObject(known)) return found;
      delete facts[KNOWN];
      if (MASKED_SIZES in facts) found.head = entries(decode(`${facts[MASKED_SIZES]}`));
      delete facts[MASKED_SIZES];
      if (data.length < NAMES_BYTES) return found;
      found.sketch = entries(data, NAMES_BYTES);
      found.names = [...data.subarray(0, NAMES_BYTES)].join();
      return { ...found, signs: parts[0]!, first: parts[1]!, facts, known: known ?? null };
    } catch {
      return found;
    }
  }
  if (fingerprint.startsWith(FORMAT_2)) {
    const rest = fingerprint.slice(FORMAT_2.length);
    const point = rest.indexOf(".");
    return point < 0 ? { ...found, signs: rest, first: "" } : { ...found, signs: rest.slice(0, point), first: rest.slice(point + 1) };
  }
  return fingerprint.startsWith("sha256:") ? { ...found, first: fingerprint.slice(7, 23) } : found;
}

/** Why two fingerprints are not of one base, in words; null where they are, as far as the older of both says. */
export function difference(one: string, other: string): string | null {
  if (one === other) return null;
  const a = parse(one);
  const b = parse(other);
  if (a.first !== b.first) return OTHER;
  if (!a.signs || !b.signs) return null;
  if (a.signs !== b.signs) return "their embeddings are the same, so one of both was fine-tuned or merged";
  if (!a.facts || !b.facts) return null;
  const [mine, theirs] = [flat(a.facts), flat(b.facts)];
  const facts = [...new Set([...mine.keys(), ...theirs.keys()])].sort().filter((name) => {
    const [x, y] = [mine.get(name) ?? own(a.known, name), theirs.get(name) ?? own(b.known, name)];
    if (OPTIONAL.includes(name) && (x === undefined || y === undefined)) return false;
    const told = [a, b].every((side) => side.known === null || Object.hasOwn(side.known, name));
    return told && canonical(x) !== canonical(y);
  });
  if (a.head.length && b.head.length && farParameters(a.head, b.head)) facts.push(MASKED_SIZES);
  if (facts.length) return `their configs differ: ${facts.join(", ")}`;
  const far = a.names === b.names ? farParameters(a.sketch, b.sketch) : 0;
  if (!far) return null;
  return `signs are the same, the values of ${far} parameters are not: one of both was scaled or trained (norms, IA3), or matrices changed places`;
}

/** A fingerprint as people read it: format 3 has thousands of characters. */
export function brief(fingerprint: string): string {
  return fingerprint.startsWith(FORMAT_3) ? `${fingerprint.slice(0, FORMAT_3.length + 16)}...` : fingerprint;
}

/** Parameters of a sketch; a last one that was cut is a RangeError. */
function entries(data: Uint8Array, start = 0): Entry[] {
  const view = new DataView(data.buffer);
  const found: Entry[] = [];
  for (let at = start; at < data.length; at += ENTRY_BYTES) {
    const sums = Array.from({ length: PROJECTIONS }, (_, one) => view.getInt16(at + 3 + 2 * one, true));
    found.push({ kind: data[at]!, norm: view.getUint16(at + 1, true), sums });
  }
  return found;
}

function farParameters(one: Entry[], other: Entry[]): number {
  if (one.length !== other.length) return Math.max(one.length, other.length);
  let far = 0;
  let total = 0;
  const usual: number[] = [];
  one.forEach((a, index) => {
    const b = other[index]!;
    const steps = a.sums.map((sum, place) => sum - b.sums[place]!);
    const apart = Math.sqrt(steps.reduce((sum, step) => sum + step * step, 0) / PROJECTIONS);
    const size = Math.abs(a.norm - b.norm);
    const small = Math.min(TINY / 2 ** (Math.min(a.norm, b.norm) / NORM_STEPS - 32), 1);
    const exact = a.kind === b.kind && a.kind !== BFLOAT16;
    const away = exact
      ? steps.some((step) => Math.abs(step) > 1) || size > 1
      : apart > ONE + 3 * small * PROJECTION_STEPS || size > NORM + 3 * small * NORM_STEPS;
    if (away || (a.norm === 0) !== (b.norm === 0)) far++;
    if (small < 0.0005) {
      usual.push(apart);
      total += apart * apart;
    }
  });
  if (!far && usual.length && Math.sqrt(total / usual.length) > ALL) return usual.filter((apart) => apart > ALL).length;
  return far;
}

/** Facts within facts by dotted names; a rotary type "default" is none. */
function flat(facts: Record<string, unknown>, above = "", found = new Map<string, unknown>()): Map<string, unknown> {
  for (const [name, value] of Object.entries(facts)) {
    if (isObject(value)) flat(value, `${above}${name}.`, found);
    else if (value !== null && !(name === "rope_type" && value === "default")) found.set(`${above}${name}`, value);
  }
  return found;
}

function own(values: Record<string, unknown> | null, name: string): unknown {
  return values !== null && Object.hasOwn(values, name) ? values[name] : undefined;
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A JSON value as text that is the same for equal values. */
function canonical(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonical).join()}]`;
  if (typeof value === "object" && value !== null) {
    const items = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));
    return `{${items.map(([name, inner]) => `${JSON.stringify(name)}:${canonical(inner)}`).join()}}`;
  }
  return JSON.stringify(value ?? null);
}

function decode(text: string): Uint8Array {
  if (!/^[\w-]*$/.test(text)) throw new Error("no base64url");
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0));
}
