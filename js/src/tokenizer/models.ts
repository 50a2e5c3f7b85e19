/** Models of `tokenizer.json`: one piece of text to tokens. */

import { UnsupportedError } from "../errors.ts";

/** A token of a piece; `from` and `to` in UTF-8 bytes of the piece's text. */
export interface ModelToken {
  id: number;
  from: number;
  to: number;
}

export interface Model {
  readonly vocab: Map<string, number>;
  tokenize(chars: readonly string[]): ModelToken[];
}

const encoder = new TextEncoder();

export function byteLength(char: string): number {
  const code = char.codePointAt(0)!;
  return code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
}

export function makeModel(spec: any): Model {
  const type: string = spec?.type ?? (spec?.merges ? "BPE" : Array.isArray(spec?.vocab) ? "Unigram" : "WordPiece");
  if (type === "BPE") return new Bpe(spec);
  if (type === "WordPiece") return new WordPiece(spec);
  if (type === "Unigram") return new Unigram(spec);
  throw new UnsupportedError(`tokenizers of type ${type} are not known here; there are BPE, WordPiece and Unigram`);
}

function bytesOf(vocab: Map<string, number>, text: string): number[] | null {
  const ids = Array.from(encoder.encode(text), (byte) =>
    vocab.get(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`),
  );
  return ids.every((id) => id !== undefined) ? (ids as number[]) : null;
}

interface Symbol {
  id: number;
  size: number;
  previous: number;
  next: number;
}

class Bpe implements Model {
  readonly vocab: Map<string, number>;
  /** `left id * 2^26 + right id` -> rank and id of the pair merged. */
  private readonly merges = new Map<number, [rank: number, id: number]>();
  private readonly cache = new Map<string, ModelToken[]>();
  private readonly unknown: number | null;

  constructor(private readonly spec: any) {
    if (spec.dropout) throw new UnsupportedError("tokenizer.json has BPE dropout, under which no text has one encoding");
    this.vocab = new Map(Object.entries(spec.vocab as Record<string, number>));
    this.unknown = spec.unk_token == null ? null : (this.vocab.get(spec.unk_token) ?? null);
    const prefix: string = spec.continuing_subword_prefix ?? "";
    spec.merges.forEach((merge: string | [string, string], rank: number) => {
      const [left, right] = typeof merge === "string" ? (merge.split(" ", 2) as [string, string]) : merge;
      const joined = this.vocab.get(left + right.slice(prefix.length));
      const pair = [this.vocab.get(left), this.vocab.get(right)];
      if (joined === undefined || pair[0] === undefined || pair[1] === undefined) {
        throw new UnsupportedError(`tokenizer.json merges ${left} and ${right}, which its vocabulary lacks`);
      }
      this.merges.set(pair[0] * 2 ** 26 + pair[1], [rank, joined]);
    });
  }

  tokenize(chars: readonly string[]): ModelToken[] {
    const text = chars.join("");
    const known = this.cache.get(text);
    if (known) return known;
    let found: ModelToken[] | null = null;
    if (this.spec.ignore_merges) {
      const id = this.vocab.get(text);
      if (id !== undefined) found = [{ id, from: 0, to: encoder.encode(text).length }];
    }
    found ??= this.merged(chars);
    if (text.length < 256) {
      if (this.cache.size >= 20_000) this.cache.clear();
      this.cache.set(text, found);
    }
    return found;
  }

  private merged(chars: readonly string[]): ModelToken[] {
    const symbols = this.symbols(chars);
    const queue = new Heap();
    const offer = (left: number, right: number): void => {
      const found = this.merges.get(symbols[left]!.id * 2 ** 26 + symbols[right]!.id);
      if (found) queue.push(found[0], left, found[1]);
    };
    for (let i = 1; i < symbols.length; i++) offer(i - 1, i);
    for (let top = queue.pop(); top; top = queue.pop()) {
      const [, at, id] = top;
      const left = symbols[at]!;
      if (left.size === 0 || left.next < 0) continue;
      const right = symbols[left.next]!;
      if (this.merges.get(left.id * 2 ** 26 + right.id)?.[1] !== id) continue;
      left.id = id;
      left.size += right.size;
      right.size = 0;
      left.next = right.next;
      if (left.next >= 0) symbols[left.next]!.previous = at;
      if (left.previous >= 0) offer(left.previous, at);
      if (left.next >= 0) offer(at, left.next);
    }
    let from = 0;
    return symbols.flatMap(({ id, size }) => (size ? [{ id, from, to: (from += size) }] : []));
  }

  /** The characters as symbols; one that the vocabulary lacks is bytes, the unknown token, or nothing at all. */
  private symbols(chars: readonly string[]): Symbol[] {
    const { continuing_subword_prefix: prefix, end_of_word_suffix: suffix, fuse_unk, byte_fallback } = this.spec;
    const found: Symbol[] = [];
    let unknown: { id: number; size: number } | null = null;
    const add = (id: number, size: number): void => {
      found.push({ id, size, previous: found.length - 1, next: found.length + 1 });
    };
    const flush = (): void => {
      if (unknown) add(unknown.id, unknown.size);
      unknown = null;
    };
    chars.forEach((char, i) => {
      let text = char;
      if (i > 0 && prefix) text = prefix + text;
      if (i === chars.length - 1 && suffix) text += suffix;
      const id = this.vocab.get(text);
      const size = byteLength(char);
      if (id !== undefined) {
        flush();
        add(id, size);
        return;
      }
      const bytes = byte_fallback ? bytesOf(this.vocab, text) : null;
      if (bytes) {
        // As the library does it: what is unknown before comes behind the bytes.
        for (const byte of bytes) add(byte, 1);
        return;
      }
      if (this.unknown === null) return;
      if (unknown && fuse_unk) unknown.size += size;
      else {
        flush();
        unknown = { id: this.unknown, size };
      }
    });
    flush();
    if (found.length) found.at(-1)!.next = -1;
    return found;
  }
}

/** Merges, the lowest rank first and of one rank the leftmost. */
class Heap {
  private readonly items: [rank: number, at: number, id: number][] = [];

  push(rank: number, at: number, id: number): void {
    const { items } = this;
    let place = items.push([rank, at, id]) - 1;
    while (place > 0) {
      const parent = (place - 1) >> 1;
      if (!this.before(place, parent)) break;
      this.swap(place, parent);
      place = parent;
    }
  }

  pop(): [rank: number, at: number, id: number] | undefined {
    const { items } = this;
    if (items.length < 2) return items.pop();
    const top = items[0]!;
    items[0] = items.pop()!;
    for (let place = 0; ; ) {
      let least = place;
      for (const child of [2 * place + 1, 2 * place + 2]) {
        if (child < items.length && this.before(child, least)) least = child;
      }
      if (least === place) return top;
      this.swap(place, least);
      place = least;
    }
  }

  private before(a: number, b: number): boolean {
    const [left, right] = [this.items[a]!, this.items[b]!];
    return left[0] < right[0] || (left[0] === right[0] && left[1] < right[1]);
  }

  private swap(a: number, b: number): void {
    [this.items[a], this.items[b]] = [this.items[b]!, this.items[a]!];
  }
}

class WordPiece implements Model {
  readonly vocab: Map<string, number>;
  private longest = 1;

  constructor(private readonly spec: any) {
    this.vocab = new Map(Object.entries(spec.vocab as Record<string, number>));
    for (const token of this.vocab.keys()) this.longest = Math.max(this.longest, [...token].length);
  }

  tokenize(chars: readonly string[]): ModelToken[] {
    const { max_input_chars_per_word: most = 100, continuing_subword_prefix: prefix = "##" } = this.spec;
    const size = chars.reduce((sum, char) => sum + byteLength(char), 0);
    const unknown = (): ModelToken[] => {
      const id = this.vocab.get(this.spec.unk_token);
      if (id === undefined) throw new UnsupportedError("the vocabulary of tokenizer.json lacks its unknown token");
      return [{ id, from: 0, to: size }];
    };
    if (chars.length > most) return unknown();
    const found: ModelToken[] = [];
    let at = 0;
    let from = 0;
    while (at < chars.length) {
      let end = Math.min(chars.length, at + this.longest);
      let id: number | undefined;
      for (; end > at; end--) {
        id = this.vocab.get((at ? prefix : "") + chars.slice(at, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return unknown();
      const to = from + chars.slice(at, end).reduce((sum, char) => sum + byteLength(char), 0);
      found.push({ id, from, to });
      [at, from] = [end, to];
    }
    return found;
  }
}

const UNKNOWN_PENALTY = 10;

class Unigram implements Model {
  readonly vocab = new Map<string, number>();
  private readonly scores: number[] = [];
  private readonly unknownScore: number;
  private readonly longest: number;
  private readonly unknown: number | null;

  constructor(private readonly spec: any) {
    let longest = 1;
    (spec.vocab as [string, number][]).forEach(([token, score], id) => {
      this.vocab.set(token, id);
      this.scores.push(score);
      longest = Math.max(longest, [...token].length);
    });
    this.longest = longest;
    this.unknown = spec.unk_id ?? null;
    this.unknownScore = this.scores.reduce((least, score) => Math.min(least, score), Infinity) - UNKNOWN_PENALTY;
  }

  tokenize(chars: readonly string[]): ModelToken[] {
    const found: ModelToken[] = [];
    let from = 0;
    for (const [start, end] of this.best(chars)) {
      const text = chars.slice(start, end).join("");
      const to = from + encoder.encode(text).length;
      const id = this.vocab.get(text);
      const bytes = id === undefined && this.spec.byte_fallback ? bytesOf(this.vocab, text) : null;
      if (bytes) found.push(...bytes.map((byte) => ({ id: byte, from, to })));
      else found.push({ id: id ?? this.needUnknown(), from, to });
      from = to;
    }
    return found;
  }

  private needUnknown(): number {
    if (this.unknown === null) throw new UnsupportedError("tokenizer.json names no unknown token, and the text needs one");
    return this.unknown;
  }

  /** The most likely pieces, as spans of characters; unknown neighbours are one. */
  private best(chars: readonly string[]): [number, number][] {
    const score = new Float64Array(chars.length + 1);
    const start = new Int32Array(chars.length + 1).fill(-1);
    const ids = new Int32Array(chars.length + 1);
    const offer = (from: number, to: number, value: number, id: number): void => {
      if (start[to]! >= 0 && value <= score[to]!) return;
      score[to] = value;
      start[to] = from;
      ids[to] = id;
    };
    for (let from = 0; from < chars.length; from++) {
      let text = "";
      let single = false;
      for (let to = from + 1; to <= Math.min(chars.length, from + this.longest); to++) {
        text += chars[to - 1]!;
        const id = this.vocab.get(text);
        if (id === undefined) continue;
        offer(from, to, this.scores[id]! + score[from]!, id);
        if (to === from + 1) single = true;
      }
      if (!single) offer(from, from + 1, this.unknownScore + score[from]!, this.needUnknown());
    }
    const spans: [number, number][] = [];
    let joined = false;
    for (let end = chars.length; end > 0; end = start[end]!) {
      const unknown = this.unknown !== null && ids[end] === this.unknown;
      if (unknown && joined) spans.at(-1)![0] = start[end]!;
      else spans.push([start[end]!, end]);
      joined = unknown;
    }
    return spans.reverse();
  }
}
