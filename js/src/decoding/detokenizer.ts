/** Text from tokens, piece by piece: characters that end in a later token, stop strings across token borders. */

const REPLACEMENT = "\ufffd";

/**
 * Turns ids into text as they come. A piece is given out only when no later token can change it: bytes of an unfinished
 * character are held back, and so is the longest end of the text that could begin a stop string.
 */
export class Detokenizer {
  /** All that was given out. */
  text = "";
  /** Whether a stop string was met; `text` ends before it. */
  stopped = false;
  private readonly ids: number[] = [];
  private from = 0;
  private done = 0;
  private held = "";

  constructor(
    private readonly decode: (ids: readonly number[]) => string,
    private readonly stop: readonly string[] = [],
  ) {}

  /** Take one more id; the text that is now certain. */
  add(token: number): string {
    this.ids.push(token);
    this.held += this.fresh(false);
    const found = this.stop.map((stop) => this.held.indexOf(stop)).filter((at) => at >= 0);
    let ready: string;
    if (found.length) {
      this.stopped = true;
      ready = this.held.slice(0, Math.min(...found));
      this.held = "";
    } else {
      const keep = Math.max(0, ...this.stop.map((stop) => overlap(this.held, stop)));
      ready = this.held.slice(0, this.held.length - keep);
      this.held = this.held.slice(this.held.length - keep);
    }
    this.text += ready;
    return ready;
  }

  /** The rest, when generation ends. */
  finish(): string {
    if (this.stopped) return "";
    const rest = this.held + this.fresh(true);
    this.held = "";
    this.text += rest;
    return rest;
  }

  /** What the ids behind the last border add, decoded beside their predecessors (spaces depend on them). */
  private fresh(last: boolean): string {
    const before = this.decode(this.ids.slice(this.from, this.done));
    const now = this.decode(this.ids.slice(this.from));
    if (now.length <= before.length || (now.endsWith(REPLACEMENT) && !last)) return "";
    this.from = this.done;
    this.done = this.ids.length;
    return now.slice(before.length);
  }
}

/** Length of the longest end of `text` that begins `stop`. */
function overlap(text: string, stop: string): number {
  for (let n = Math.min(text.length, stop.length - 1); n > 0; n--) {
    if (text.endsWith(stop.slice(0, n))) return n;
  }
  return 0;
}
