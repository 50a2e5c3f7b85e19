/** `tokenizer.json` read and run: exact with Python's `tokenizers` for the types that edgeprompt's packages have. */

import { sha256 } from "../bytes.ts";
import { EdgePromptError, InputError, PackageError } from "../errors.ts";
import { Float, canonicalJson, parseJson, repr, type Fields } from "../json.ts";
import { makeDecoder } from "./decoders.ts";
import { byteLength, makeModel, type Model } from "./models.ts";
import { makeNormalizer, type Normalizer } from "./normalizers.ts";
import { escape } from "./pattern.ts";
import { Piece } from "./piece.ts";
import { join, makePostProcessor, type PostProcessor } from "./postprocessors.ts";
import { makePreTokenizer, type PreTokenizer } from "./pretokenizers.ts";
import * as unicode from "./unicode.ts";

/** Tokens of a text; offsets in UTF-16 units of it, [0, 0] for special tokens. */
export interface Encoding {
  ids: number[];
  offsets: [number, number][];
  typeIds: number[];
  /** Which text a token is of, null for special ones. */
  sequences: (number | null)[];
}

interface AddedToken {
  id: number;
  content: string;
  single_word: boolean;
  lstrip: boolean;
  rstrip: boolean;
  normalized: boolean;
  special: boolean;
}

interface AddedPattern {
  pattern: RegExp;
  tokens: Map<string, AddedToken>;
}

export class Tokenizer {
  private readonly normalize: Normalizer;
  private readonly preTokenize: PreTokenizer;
  private readonly model: Model;
  private readonly postProcess: PostProcessor;
  private readonly decoder: (tokens: string[]) => string;
  private readonly byId: string[] = [];
  private readonly ids: Map<string, number>;
  private readonly special = new Set<number>();
  private readonly raw: AddedPattern | null;
  private readonly normalized: AddedPattern | null;

  /**
   * @param data `tokenizer.json`, parsed.
   * @param config `tokenizer_config.json`, parsed.
   * @param vocabSize Rows of the base's embedding. A token from there on would read a prompt's row: a text that has one is
   *   refused.
   */
  constructor(
    data: any,
    private readonly config: any = {},
    private readonly vocabSize = Infinity,
  ) {
    this.normalize = makeNormalizer(data.normalizer);
    this.preTokenize = makePreTokenizer(data.pre_tokenizer);
    this.model = makeModel(data.model);
    this.decoder = makeDecoder(data.decoder);
    this.postProcess = makePostProcessor(data.post_processor, (id) => this.byId[id] ?? "");
    this.ids = new Map(this.model.vocab);
    for (const [token, id] of this.model.vocab) this.byId[id] = token;
    const added: AddedToken[] = data.added_tokens ?? [];
    for (const token of added) {
      this.ids.set(token.content, token.id);
      this.byId[token.id] = token.content;
      if (token.special) this.special.add(token.id);
    }
    const plain = added.filter((token) => !token.normalized || !data.normalizer);
    const others = added.filter((token) => token.normalized && data.normalizer);
    this.raw = addedPattern(plain.map((token) => [token.content, token]));
    this.normalized = addedPattern(
      others.map((token) => [this.normalize(Piece.of(token.content, 0, token.content.length)).text, token]),
    );
  }

  /** Read a package's files. */
  static parse(tokenizer: Uint8Array, config: Uint8Array | null, vocabSize: number): Tokenizer {
    try {
      const decoder = new TextDecoder("utf-8", { fatal: true });
      return new Tokenizer(
        JSON.parse(decoder.decode(tokenizer)), config ? JSON.parse(decoder.decode(config)) : {}, vocabSize,
      );
    } catch (error) {
      if (error instanceof EdgePromptError) throw error;
      throw new PackageError(`cannot read tokenizer.json: ${(error as Error).message}`);
    }
  }

  /** The mask token's text, null where there is none. */
  get maskToken(): string | null {
    return this.specialText("mask_token");
  }

  specialText(name: string): string | null {
    const value = this.config[name];
    const content = value && typeof value === "object" ? value.content : value;
    return typeof content === "string" ? content : null;
  }

  get chatTemplate(): string | null {
    return typeof this.config.chat_template === "string" ? this.config.chat_template : null;
  }

  /** Token ids of a text. */
  encode(text: string, addSpecialTokens = true): number[] {
    return this.encodeWithOffsets(text, addSpecialTokens).ids;
  }

  encodeWithOffsets(text: string, addSpecialTokens = true): Encoding {
    return this.join([text], addSpecialTokens);
  }

  /** Two texts joined the tokenizer's way. */
  encodePair(first: string, second: string, addSpecialTokens = true): Encoding {
    return this.join([first, second], addSpecialTokens);
  }

  /** Where each token of a text ends, without special tokens. */
  ends(text: string): number[] {
    return this.encodeWithOffsets(text, false).offsets.map(([, end]) => end);
  }

  /** Text of ids. */
  decode(ids: readonly number[], skipSpecialTokens = true): string {
    const tokens: string[] = [];
    for (const id of ids) {
      const token = this.byId[id];
      if (token !== undefined && !(skipSpecialTokens && this.special.has(id))) tokens.push(token);
    }
    return this.decoder(tokens);
  }

  tokenToId(token: string): number | null {
    return this.ids.get(token) ?? null;
  }

  /** One encoding of all texts, its ids all the base's own; every encoding of text comes through here. */
  private join(texts: string[], addSpecialTokens: boolean): Encoding {
    const found = join(this.postProcess(texts.map((text, i) => this.bare(text, i)), addSpecialTokens, texts));
    const bad = found.ids.find((id) => id >= this.vocabSize);
    if (bad) {
      throw new InputError(`text holds ${bad} (${repr(this.byId[bad])}); ids of this base are 0 to ${this.vocabSize - 1}`);
    }
    return found;
  }

  private bare(text: string, sequence: number): Encoding {
    const found: Encoding = { ids: [], offsets: [], typeIds: [], sequences: [] };
    const add = (id: number, from: number, to: number): void => {
      found.ids.push(id);
      found.offsets.push([from, to]);
      found.typeIds.push(0);
      found.sequences.push(sequence);
    };
    for (const [from, to, token] of findAdded(this.raw, text)) {
      if (token) {
        add(token.id, from, to);
        continue;
      }
      const piece = this.normalize(Piece.of(text, from, to));
      if (!piece.chars.length) continue;
      const places = this.normalized ? piece.offsets() : null;
      for (const [start, end, inside] of findAdded(this.normalized, places ? piece.text : null)) {
        const part = places ? piece.slice(places.get(start)!, places.get(end)!) : piece;
        if (inside) add(inside.id, part.starts[0]!, part.ends.at(-1)!);
        else this.tokenize(part, add);
      }
    }
    return found;
  }

  private tokenize(piece: Piece, add: (id: number, from: number, to: number) => void): void {
    for (const part of this.preTokenize([piece])) {
      const tokens = this.model.tokenize(part.chars);
      const sizes = part.chars.map(byteLength);
      let char = 0;
      let done = 0; // bytes in front of `char`
      for (const { id, from, to } of tokens) {
        while (char > 0 && done > from) done -= sizes[--char]!;
        while (done + sizes[char]! <= from) done += sizes[char++]!;
        const first = char;
        while (done + sizes[char]! < to) done += sizes[char++]!;
        add(id, part.starts[first]!, part.ends[char]!);
      }
    }
  }
}

function addedPattern(tokens: [string, AddedToken][]): AddedPattern | null {
  const found = tokens.filter(([content]) => content);
  if (!found.length) return null;
  const byLength = [...found].sort((a, b) => b[0].length - a[0].length); // the longest of those that begin leftmost
  return { pattern: new RegExp(byLength.map(([content]) => escape(content)).join("|"), "gu"), tokens: new Map(found) };
}

const isSpace = (char: string): boolean => unicode.SPACES.has(char.codePointAt(0)!);
const isWord = (char: string | undefined): boolean => char !== undefined && unicode.WORDS.has(char.codePointAt(0)!);

/** A text as added tokens and what stands between them; null: all of it is one piece. */
function findAdded(added: AddedPattern | null, text: string | null): [number, number, AddedToken | null][] {
  if (text === null || !added) return [[0, text?.length ?? 0, null]];
  const found: [number, number, AddedToken | null][] = [];
  let done = 0;
  for (const match of text.matchAll(added.pattern)) {
    const token = added.tokens.get(match[0])!;
    let from = match.index;
    let to = from + match[0].length;
    if (token.single_word) {
      if (isWord([...text.slice(Math.max(0, from - 2), from)].at(-1)) || isWord([...text.slice(to, to + 2)][0])) continue;
    }
    if (token.lstrip) {
      while (from > done && isSpace(text[from - 1]!)) from--;
    }
    if (token.rstrip) {
      while (to < text.length && isSpace(text[to]!)) to++;
    }
    if (done < from) found.push([done, from, null]);
    found.push([from, to, token]);
    done = to;
  }
  if (done < text.length) found.push([done, text.length, null]);
  return found;
}

/** What prompts name: of vocabulary and rules, however they are written down. */
export async function fingerprintTokenizer(json: Uint8Array): Promise<string> {
  const data = parseJson(json) as Fields;
  for (const key of ["padding", "truncation", "version"]) delete data[key];
  const model = data["model"] as Fields | undefined;
  if (model && typeof model === "object" && !(model instanceof Float) && Array.isArray(model["merges"])) {
    model["merges"] = model["merges"].map((merge: unknown) => {
      if (typeof merge !== "string") return merge;
      const at = merge.indexOf(" ");
      return at < 0 ? [merge] : [merge.slice(0, at), merge.slice(at + 1)];
    });
  }
  return `sha256:${await sha256(new TextEncoder().encode(canonicalJson(data)))}`;
}

