/** A piece of text on its way through a tokenizer: characters, and where each comes from. */

import type { Change } from "./unicode.ts";

/** `starts` and `ends` are places in the original text, in UTF-16 units, for every character of the piece. */
export class Piece {
  constructor(
    readonly chars: readonly string[],
    readonly starts: readonly number[],
    readonly ends: readonly number[],
  ) {}

  static of(text: string, from: number, to: number): Piece {
    const chars: string[] = [];
    const starts: number[] = [];
    const ends: number[] = [];
    let at = from;
    for (const char of text.slice(from, to)) {
      chars.push(char);
      starts.push(at);
      at += char.length;
      ends.push(at);
    }
    return new Piece(chars, starts, ends);
  }

  get text(): string {
    return this.chars.join("");
  }

  slice(from: number, to: number): Piece {
    return new Piece(this.chars.slice(from, to), this.starts.slice(from, to), this.ends.slice(from, to));
  }

  /** The piece after changes, from its first character on. */
  changed(changes: Iterable<Change>): Piece {
    const chars: string[] = [];
    const starts: number[] = [];
    const ends: number[] = [];
    let at = 0;
    for (const [char, change] of changes) {
      const source = change > 0 ? at - 1 : at;
      chars.push(char);
      starts.push(source < 0 ? 0 : this.starts[source]!);
      ends.push(source < 0 ? 0 : this.ends[source]!);
      if (change <= 0) at += 1 - change;
    }
    return new Piece(chars, starts, ends);
  }

  filtered(keep: (char: string) => boolean): Piece {
    const kept = this.chars.flatMap((char, i) => (keep(char) ? [i] : []));
    if (kept.length === this.chars.length) return this;
    const pick = <T>(list: readonly T[]): T[] => kept.map((i) => list[i]!);
    return new Piece(pick(this.chars), pick(this.starts), pick(this.ends));
  }

  prepended(text: string): Piece {
    if (!this.chars.length) return this;
    const chars = [...text];
    const fill = (list: readonly number[]): number[] => [...chars.map(() => list[0]!), ...list];
    return new Piece([...chars, ...this.chars], fill(this.starts), fill(this.ends));
  }

  /** Every match of a pattern replaced; what comes in its place stands for the match's last character. */
  replaced(pattern: RegExp, content: string): Piece {
    const text = this.text;
    const places = this.offsets();
    const chars: string[] = [];
    const starts: number[] = [];
    const ends: number[] = [];
    let done = 0;
    const keep = (to: number): void => {
      for (; done < to; done++) {
        chars.push(this.chars[done]!);
        starts.push(this.starts[done]!);
        ends.push(this.ends[done]!);
      }
    };
    for (const match of text.matchAll(pattern)) {
      const from = places.get(match.index)!;
      const to = places.get(match.index + match[0].length)!;
      keep(from);
      for (const char of content) {
        chars.push(char);
        starts.push(to ? this.starts[to - 1]! : 0);
        ends.push(to ? this.ends[to - 1]! : 0);
      }
      done = to;
    }
    keep(this.chars.length);
    return new Piece(chars, starts, ends);
  }

  /** UTF-16 place in `text` -> number of the character. */
  offsets(): Map<number, number> {
    const found = new Map<number, number>();
    let at = 0;
    this.chars.forEach((char, i) => {
      found.set(at, i);
      at += char.length;
    });
    return found.set(at, this.chars.length);
  }
}
