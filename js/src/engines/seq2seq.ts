/** Encoder-decoders: the encoder once per text, then the decoder step by step; greedy or sampled, without beams. */

import { FirstLogits, Generate, ScoreWords, type Strategy } from "../decoding/strategies.ts";
import { Processors, generationFields } from "../decoding/processors.ts";
import { resolve } from "../decoding/sampling.ts";
import { encodeText, locatedSlot } from "../encoderText.ts";
import { CapacityError, InputError, PackageError, PromptFileError, UnsupportedError } from "../errors.ts";
import { pool, tag, tokenLogits, type Matrix } from "../heads.ts";
import { repr } from "../json.ts";
import * as names from "../names.ts";
import { lastLogits, matrixOf, pickAll, type Graph, type OrtTensor } from "../ort.ts";
import type { PromptFile, Tensor } from "../prompt.ts";
import type { Request, Result } from "../results.ts";
import { Template, asFields } from "../template.ts";
import { Verbalizer, idsAlone } from "../verbalizer.ts";
import { Context, decode, type CallOptions, type Reached } from "./context.ts";
import { checkHead, checkIds, checkRows, taskOf, virtualIds, type Engine, type EngineParts, type Loaded } from "./engine.ts";
import { textPositions } from "./encoder.ts";

const TEXT_ALONE = Template.parse("{text}");

interface Seq2SeqPrompt extends Loaded {
  verbalizer: Verbalizer | null;
  /** What the decoder has said already. */
  decoderPrefix: number[];
  rows: number;
  prefixLength: number;
}

/** What the encoder made of a text. */
interface Source {
  states: Matrix;
  cross: Record<string, OrtTensor>;
  /** `cross` once for each sequence of the last step, which the next one likely needs again. */
  wide: Record<string, OrtTensor>;
  batch: number;
  length: number;
}

interface DecoderState {
  past: Record<string, OrtTensor>;
  length: number;
}

export class Seq2SeqEngine implements Engine {
  private readonly encoder: Graph;
  private readonly decoder: Graph;
  private readonly start: number;
  private readonly names: { past: string[]; present: string[]; crossPast: string[]; crossPresent: string[] };

  constructor(private readonly parts: EngineParts) {
    const { tokens, geometry } = parts.manifest;
    this.encoder = parts.graphs["encoder"]!;
    this.decoder = parts.graphs["decoder"]!;
    const start = tokens.decoderStart ?? tokens.bos;
    if (start === null) throw new PackageError("the manifest names no decoder_start token; export the base again");
    this.start = start;
    const all = (name: typeof names.past): string[] => names.perLayer(geometry.numLayers, name);
    this.names = { past: all(names.past), present: all(names.present), crossPast: all(names.crossPast), crossPresent: all(names.crossPresent) };
  }

  private get hasEncoderPrefix(): boolean {
    return this.encoder.inputs.has(names.past(0, "key"));
  }

  prepare(name: string, prompt: PromptFile): Promise<Seq2SeqPrompt> {
    if (prompt.headSpec && prompt.task === "tag") checkHead(name, prompt, this.parts.manifest, false);
    else if (prompt.headSpec || prompt.task === "tag" || prompt.task === "qa") {
      throw new UnsupportedError(
        `prompt ${repr(name)} is for task ${repr(prompt.task)}${prompt.headSpec ? " with a head" : ""}; an ` +
          "encoder-decoder answers by text, or labels words by a head on its encoder: tune it for classify (with a " +
          "verbalizer) or generate",
      );
    }
    if (prompt.encoderPastKeyValues && !this.hasEncoderPrefix) {
      throw new UnsupportedError(
        `prompt ${repr(name)} has encoder deep prompts, and this package's encoder (${this.parts.manifest.modelType}) ` +
          "takes none; T5 exported by the torch route does",
      );
    }
    checkRows(name, prompt, this.encoder);
    const loaded: Seq2SeqPrompt = {
      file: prompt,
      verbalizer: prompt.verbalizer.size ? Verbalizer.compile(prompt, (text) => this.encodeBare(text)) : null,
      decoderPrefix: this.decoderPrefix(name, prompt),
      rows: prompt.promptEmbeddings?.shape[0] ?? 0,
      prefixLength: prompt.pastKeyValues?.shape[3] ?? 0,
    };
    this.textIds(loaded, prompt.template.trial, null);
    return Promise.resolve(loaded);
  }

  async answer(request: Request, given: Loaded | null, options: CallOptions): Promise<Result> {
    const prompt = given as Seq2SeqPrompt | null;
    const context = new Context(request, options);
    const task = taskOf(request, prompt, "generate");
    switch (task) {
      case "embed":
        return this.pooled(request, prompt, null, context);
      case "tag":
        return this.tagWords(request, prompt, context);
      case "classify": {
        if (!prompt?.verbalizer) {
          throw new InputError(
            prompt
              ? `prompt ${repr(prompt.file.name)} has no verbalizer, which classify needs; tune it with label words`
              : "classify needs a prompt with a verbalizer; add one and name it with prompt",
          );
        }
        const longest = Math.max(...prompt.verbalizer.words.map((word) => word.length));
        return this.run(new ScoreWords(prompt.verbalizer, context.clock), request, prompt, longest, context);
      }
      case "generate":
        return this.generate(request, prompt, context);
      default:
        throw new UnsupportedError(
          `task ${repr(task)} is not for encoder-decoders (${this.parts.manifest.modelType}); there are classify, ` +
            "generate, tag and embed",
        );
    }
  }

  logits(request: Request, prompt: Loaded | null, options: CallOptions): Promise<Float32Array> {
    return this.run(new FirstLogits(), request, prompt as Seq2SeqPrompt | null, 1, new Context(request, options));
  }

  async embed(requests: readonly Request[], prompt: Loaded | null, pooling: string | null, options: CallOptions): Promise<Float32Array[]> {
    const found: Float32Array[] = [];
    for (const request of requests) {
      found.push(await this.pooled(request, prompt as Seq2SeqPrompt | null, pooling, new Context(request, options)));
    }
    return found;
  }

  async close(): Promise<void> {
    await this.encoder.close();
    await this.decoder.close();
  }

  private encodeBare(text: string): number[] {
    return this.parts.tokenizer.encode(text, false);
  }

  private decoderPrefix(name: string, prompt: PromptFile): number[] {
    const value: unknown = prompt.generation["decoder_prefix"] ?? [];
    const ids: unknown = typeof value === "string" ? this.encodeBare(value) : value;
    const known = this.parts.manifest.geometry.vocabSize;
    if (!Array.isArray(ids) || !ids.every((id) => Number.isInteger(id) && id >= 0 && id < known)) {
      throw new PromptFileError(
        `prompt ${repr(name)}: decoder_prefix is ${repr(value)}; it must be text, or token ids below ${known}`,
      );
    }
    return ids as number[];
  }

  private generate(request: Request, prompt: Seq2SeqPrompt | null, context: Context): Promise<Result> {
    const { tokens, geometry } = this.parts.manifest;
    const { tokenizer } = this.parts;
    const defaults = prompt?.file.generation ?? {};
    const fields = request.options?.choices?.length ? {} : generationFields(this.parts.manifest.generation, defaults);
    const sampling = resolve(request.options ?? {}, { ...fields, ...defaults });
    const asked = request.options?.numBeams;
    const beams: unknown = asked !== undefined && asked !== 1 ? asked : (defaults["num_beams"] ?? 1);
    if (beams !== 1) {
      throw new UnsupportedError(
        `numBeams is ${repr(beams)}: beam search is in the Python runtime alone; here, encoder-decoders generate ` +
          "greedily or sample (numBeams 1, also in the prompt file)",
      );
    }
    const fed = 1 + (prompt?.decoderPrefix.length ?? 0);
    const limit = geometry.maxPositions;
    const room = limit ? limit - (fed - 1) - (prompt?.prefixLength ?? 0) : sampling.maxNewTokens;
    if (sampling.askedLength && sampling.maxNewTokens > room) {
      throw new InputError(
        `maxNewTokens is ${sampling.maxNewTokens}, and the decoder has ${limit} positions, of which the prompt leaves ` +
          `${room}; ask for at most that`,
      );
    }
    if (room < 1) throw new InputError(`the prompt takes all of the decoder's ${limit} positions; use a shorter one`);
    const length = Math.min(room, sampling.maxNewTokens);
    sampling.maxNewTokens = length;
    const history = [this.start, ...(prompt?.decoderPrefix ?? [])];
    const strategy = new Generate(sampling, {
      eos: tokens.eos,
      decode: (ids) => tokenizer.decode(ids),
      encode: (text) => idsAlone((one) => this.encodeBare(one), text),
      history,
      processors: new Processors(fields, history, tokens.eos, length),
      clock: context.clock,
      onText: context.onText,
    });
    const first = fed === 1 ? tokens.forcedBos : null;
    const ending = sampling.choices.length ? strategy : new Ending(strategy, length, first, tokens.forcedEos);
    return this.run(ending, request, prompt, length, context);
  }

  private async run<T>(strategy: Strategy<T>, request: Request, prompt: Seq2SeqPrompt | null, newTokens: number, context: Context): Promise<T> {
    const source = await this.encode(strategy, request, prompt, newTokens, context);
    const step = (tokens: number[], state: DecoderState): Promise<Reached<DecoderState>> => this.step(tokens, state, source);
    const pick = (state: DecoderState, sequences: number[]): DecoderState => ({ ...state, past: pickAll(this.decoder, state.past, sequences) });
    let reached = await step([this.start], this.begin(prompt));
    for (const token of prompt?.decoderPrefix ?? []) {
      context.check();
      reached = await step([token], reached.state);
    }
    return decode(strategy, reached, step, pick, context);
  }

  /** A decoder that has seen nothing but the prompt's prefix. */
  private begin(prompt: Seq2SeqPrompt | null): DecoderState {
    const { geometry: size, kvDtype } = this.parts.manifest;
    return {
      past: prefixTensors(this.decoder, prompt?.file.pastKeyValues ?? null, this.names.past, size.numKeyValueHeads, size.headSize, kvDtype),
      length: prompt?.prefixLength ?? 0,
    };
  }

  /** One token of each sequence; all read the same text. */
  private async step(tokens: number[], state: DecoderState, source: Source): Promise<Reached<DecoderState>> {
    const [batch, total, length] = [tokens.length, state.length + 1, source.length];
    if (source.batch !== batch) {
      source.wide = batch === 1 ? source.cross : pickAll(this.decoder, source.cross, tokens.map(() => 0));
      source.batch = batch;
    }
    const feeds = {
      ...state.past,
      ...source.wide,
      [names.INPUT_IDS]: this.decoder.ints(tokens, [batch, 1]),
      [names.ATTENTION_MASK]: this.decoder.ints(Array<number>(batch * total).fill(1), [batch, total]),
      [names.ENCODER_ATTENTION_MASK]: this.decoder.ints(Array<number>(batch * length).fill(1), [batch, length]),
    };
    const found = await this.decoder.run(feeds, [names.LOGITS, ...this.names.present]);
    const past = Object.fromEntries(this.names.past.map((name, i) => [name, found[this.names.present[i]!]!]));
    return { logits: lastLogits(found[names.LOGITS]!), state: { past, length: total } };
  }

  private async encode<T>(strategy: Strategy<T>, request: Request, prompt: Seq2SeqPrompt | null, newTokens: number, context: Context): Promise<Source> {
    const ids = this.source(request, prompt);
    const { geometry: size, kvDtype } = this.parts.manifest;
    const positions = (prompt?.prefixLength ?? 0) + 1 + (prompt?.decoderPrefix.length ?? 0) + newTokens + ids.length;
    const bytes = 4 * positions * size.numLayers * size.numKeyValueHeads * size.headSize * (kvDtype === "float16" ? 2 : 4);
    if (bytes > this.parts.kvBudget) {
      throw new CapacityError(`the request needs ${bytes} bytes of caches, and kvBudget is ${this.parts.kvBudget}; shorten it, or raise it`);
    }
    strategy.limit?.(Math.floor(this.parts.kvBudget / bytes) - 1);
    return this.forward(ids, prompt, context);
  }

  private async forward(ids: number[], prompt: Seq2SeqPrompt | null, context: Context): Promise<Source> {
    context.clock.inputTokens = ids.length;
    context.check();
    const { geometry: size, kvDtype } = this.parts.manifest;
    const { encoder } = this;
    const table = prompt?.file.promptEmbeddings;
    const deep = prompt?.file.encoderPastKeyValues ?? null;
    const total = ids.length + (deep?.shape[3] ?? 0);
    const feeds = {
      [names.INPUT_IDS]: encoder.ints(ids, [1, ids.length]),
      [names.ATTENTION_MASK]: encoder.ints(Array<number>(total).fill(1), [1, total]),
      [names.PROMPT_EMBEDDINGS]: table
        ? encoder.floats(table.data, table.shape)
        : encoder.floats(new Float32Array(size.hiddenSize), [1, size.hiddenSize]),
      ...prefixTensors(encoder, deep, names.perLayer(size.numEncoderLayers, names.past), size.numAttentionHeads, size.headSize, kvDtype),
    };
    const found = await encoder.run(feeds, [names.ENCODER_HIDDEN_STATES, ...this.names.crossPresent]);
    const cross = Object.fromEntries(this.names.crossPast.map((name, i) => [name, found[this.names.crossPresent[i]!]!]));
    return { states: matrixOf(found[names.ENCODER_HIDDEN_STATES]!), cross, wide: cross, batch: 1, length: ids.length };
  }

  private async pooled(request: Request, prompt: Seq2SeqPrompt | null, pooling: string | null, context: Context): Promise<Float32Array> {
    const how = pooling ?? this.parts.manifest.pooling;
    if (!["mean", "cls", "last"].includes(how)) throw new InputError(`pooling is ${repr(how)}, allowed: mean, cls, last`);
    const ids = this.source(request, prompt);
    const { states } = await this.forward(ids, prompt, context);
    return pool(states, textPositions(ids, this.parts.manifest.geometry.vocabSize), how);
  }

  private async tagWords(request: Request, prompt: Seq2SeqPrompt | null, context: Context): Promise<Result> {
    if (prompt?.file.task !== "tag") throw new InputError("task 'tag' needs a prompt that was trained for it");
    if (request.inputIds) throw new InputError("words can only be found in a text; give text instead of inputIds");
    const { file } = prompt;
    const { geometry } = this.parts.manifest;
    const fields = asFields(request.text ?? "");
    const slot = locatedSlot(file.template);
    const encoded = encodeText(file.template, this.parts.tokenizer, fields, {
      numVirtualTokens: prompt.rows,
      firstVirtualId: geometry.vocabSize,
      maxLength: geometry.maxPositions || null,
      truncate: request.truncate ?? false,
      addSpecialTokens: file.addSpecialTokens,
      locate: slot,
    });
    const { states } = await this.forward(encoded.ids, prompt, context);
    return tag(file, tokenLogits(file, states, prompt.rows), encoded.offsets, fields[slot]!);
  }

  private source(request: Request, prompt: Seq2SeqPrompt | null): number[] {
    const { vocabSize, maxPositions } = this.parts.manifest.geometry;
    const limit = maxPositions || null;
    const rows = prompt?.rows ?? 0;
    if (request.chat) throw new UnsupportedError("chat templates are for decoder-only packages; leave out chat");
    let ids: number[];
    if (request.inputIds) {
      const given = checkIds(request.inputIds, vocabSize);
      if (rows && !prompt!.file.template.promptIsPrefix) {
        throw new InputError(`prompt ${repr(request.prompt)} has virtual tokens inside its template, so it needs text, not ids`);
      }
      ids = [...virtualIds(vocabSize, rows), ...given];
    } else ids = this.textIds(prompt, asFields(request.text ?? ""), request.truncate ? limit : null);
    if (limit !== null && ids.length > limit) {
      throw new InputError(
        `the request needs ${ids.length} prompt and text tokens; the base holds ${limit}; shorten the text, or set truncate`,
      );
    }
    if (ids.length === rows) {
      throw new InputError("the text has no token, so there is nothing to run; give at least one character");
    }
    return ids;
  }

  private textIds(prompt: Seq2SeqPrompt | null, fields: Readonly<Record<string, string>>, limit: number | null): number[] {
    const template = prompt?.file.template ?? TEXT_ALONE;
    const rows = prompt?.rows ?? 0;
    return (rows ? template : template.withoutPrompt()).encode(this.parts.tokenizer, fields, {
      numVirtualTokens: rows,
      firstVirtualId: this.parts.manifest.geometry.vocabSize,
      maxLength: limit,
      addSpecialTokens: prompt?.file.addSpecialTokens ?? true,
    });
  }
}

/** A prompt's `[layers, 2, heads, length, size]` as one tensor a name, or empty ones. */
function prefixTensors(
  graph: Graph, past: Tensor | null, inputs: string[], heads: number, size: number, dtype: "float32" | "float16",
): Record<string, OrtTensor> {
  const length = past?.shape[3] ?? 0;
  const block = heads * length * size;
  return Object.fromEntries(
    inputs.map((name, i) => [
      name,
      graph.floats(past ? past.data.slice(i * block, (i + 1) * block) : new Float32Array(), [1, heads, length, size], dtype),
    ]),
  );
}

/** Tokens that must come at the start and at the length limit, whatever the logits say. */
class Ending<T> implements Strategy<T> {
  private done = 0;

  constructor(
    private readonly strategy: Strategy<T>,
    private readonly maxNewTokens: number,
    private readonly first: number | null,
    private readonly last: number | null,
  ) {}

  advance(logits: readonly Float32Array[]): ReturnType<Strategy<T>["advance"]> {
    let token = this.done === this.maxNewTokens - 1 ? this.last : null;
    if (this.done === 0 && this.first !== null) token = this.first;
    this.done++;
    if (token === null) return this.strategy.advance(logits);
    const forced = new Float32Array(logits[0]!.length).fill(-Infinity);
    forced[token] = 0;
    return this.strategy.advance([forced]);
  }

  result(): T {
    return this.strategy.result();
  }
}
