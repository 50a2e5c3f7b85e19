/** Decoder-only models: prompts as KV prefixes, computed once, and a cache that grows behind them. */

import { FirstLogits, Generate, ScoreWords, type Strategy } from "../decoding/strategies.ts";
import { Processors, generationFields } from "../decoding/processors.ts";
import { DEFAULT_NEW_TOKENS, resolve } from "../decoding/sampling.ts";
import { encodeText, locatedSlot, type EncodedText } from "../encoderText.ts";
import { CapacityError, InputError, PackageError, UnsupportedError } from "../errors.ts";
import { classifyHead, findAnswer, rowOf, rowsOf, tag, tokenLogits, type Matrix } from "../heads.ts";
import { repr } from "../json.ts";
import * as names from "../names.ts";
import { firstPositions, lastLogits, matrixOf, pickAll, type Graph, type OrtTensor } from "../ort.ts";
import type { PromptFile } from "../prompt.ts";
import type { Request, Result } from "../results.ts";
import { Template, asFields, range } from "../template.ts";
import { Verbalizer, idsBehind, textBeforeWords } from "../verbalizer.ts";
import { Context, decode, type CallOptions, type Reached } from "./context.ts";
import { checkHead, checkIds, checkRows, taskOf, unknownTask, virtualIds, type Engine, type EngineParts, type Loaded } from "./engine.ts";

const PREFILL_CHUNK = 512;
/** Most bytes of logits of one run, for graphs that compute them at every position. */
const LOGITS_BUDGET = 64 << 20;
/** Characters of a text's end that decide how a tokenizer splits what follows. */
const TEXT_END = 32;
const CHAT_TEXT = "edgepromptusertext";
const HEAD_INPUTS = ["last", "tokens", "tokens_unshifted"];
const TEXT_ALONE = Template.parse("{text}");

/** Keys and values of all layers, `[1, heads, length, size]` each. */
interface Cache {
  tensors: Record<string, OrtTensor>;
  length: number;
}

interface DecoderPrompt extends Loaded {
  verbalizer: Verbalizer | null;
  /** Virtual tokens, or prefix positions. */
  count: number;
  /** Whether keys and values in front of the text carry the prompt; else virtual ids in the text do. */
  asPrefix: boolean;
  prefix: Promise<Cache> | null;
  rows: OrtTensor | null;
}

export class DecoderEngine implements Engine {
  private readonly graph: Graph;
  private readonly vocab: number;
  private readonly limit: number;
  private readonly pasts: string[];
  private readonly presents: string[];
  private readonly noRows: OrtTensor;
  private readonly empty: Cache;
  private readonly chunk: number;

  constructor(private readonly parts: EngineParts) {
    const { geometry: size, kvDtype } = parts.manifest;
    this.graph = parts.graphs["model"]!;
    this.vocab = size.vocabSize;
    this.limit = size.maxPositions;
    this.pasts = names.perLayer(size.numLayers, names.past);
    this.presents = names.perLayer(size.numLayers, names.present);
    const missing = [...this.pasts.filter((name) => !this.graph.inputs.has(name)),
      ...[names.LOGITS, ...this.presents].filter((name) => !this.graph.outputs.has(name))];
    const caches = [...this.graph.inputs].filter((name) => name.startsWith(`${names.PAST_KEY_VALUES}.`)).length;
    if (missing.length || caches !== this.pasts.length) {
      throw new PackageError(
        `the manifest says ${size.numLayers} layers, and the graph has ${caches / 2} caches; export the base again`,
      );
    }
    this.noRows = this.graph.floats(new Float32Array(size.hiddenSize), [1, size.hiddenSize]);
    const dims = [1, size.numKeyValueHeads, 0, size.headSize];
    const empty = this.graph.floats(new Float32Array(), dims, kvDtype);
    this.empty = { tensors: Object.fromEntries(this.pasts.map((name) => [name, empty])), length: 0 };
    const lastOnly = this.graph.shape(names.LOGITS)?.[1] === 1;
    this.chunk = lastOnly ? PREFILL_CHUNK : Math.min(PREFILL_CHUNK, Math.max(16, Math.floor(LOGITS_BUDGET / (4 * this.vocab))));
  }

  async prepare(name: string, prompt: PromptFile): Promise<DecoderPrompt> {
    if (prompt.encoderPastKeyValues) {
      throw new UnsupportedError(`prompt ${repr(name)} has encoder_past_key_values, and this base has no encoder`);
    }
    if (prompt.headSpec) {
      const source = prompt.headSpec.input;
      if (!HEAD_INPUTS.includes(source)) {
        throw new UnsupportedError(
          `the head of prompt ${repr(name)} reads ${repr(source)}; decoder-only packages serve heads on the last token ` +
            "or on every token, and encoder packages the others",
        );
      }
      this.checkStates(source !== "last");
      checkHead(name, prompt, this.parts.manifest, false);
    }
    checkRows(name, prompt, this.graph);
    const { tokenizer } = this.parts;
    const count = prompt.numVirtualTokens;
    prompt.template.encode(tokenizer, prompt.template.trial, {
      numVirtualTokens: prompt.promptEmbeddings ? count : 0,
      firstVirtualId: this.vocab,
    });
    const bare = (text: string): number[] => tokenizer.encode(text, false);
    const template = prompt.generation["chat"] ? await this.chat(prompt.template) : prompt.template;
    const unshifted = prompt.headSpec?.input === "tokens_unshifted";
    const loaded: DecoderPrompt = {
      file: prompt,
      verbalizer: prompt.verbalizer.size ? Verbalizer.compile(prompt, bare, textBeforeWords(template)) : null,
      count,
      asPrefix: prompt.pastKeyValues !== null || (prompt.template.promptIsPrefix && !unshifted),
      prefix: null,
      rows: prompt.promptEmbeddings && this.graph.floats(prompt.promptEmbeddings.data, prompt.promptEmbeddings.shape),
    };
    if (loaded.asPrefix && count) await this.prefix(loaded);
    return loaded;
  }

  async answer(request: Request, given: Loaded | null, options: CallOptions): Promise<Result> {
    const loaded = given as DecoderPrompt | null;
    const context = new Context(request, options);
    const { tokenizer, manifest } = this.parts;
    const task = taskOf(request, loaded, "generate");
    switch (task) {
      case "tag":
      case "qa":
        return this.locate(request, loaded, task, context);
      case "embed":
        return this.lastState(request, loaded, context);
      case "classify": {
        if (loaded?.file.headSpec) {
          const found = classifyHead(loaded.file, await this.lastState(request, loaded, context));
          context.clock.tick();
          return { ...found, timings: context.clock.timings(1) };
        }
        if (!loaded?.verbalizer) {
          throw new InputError(
            loaded
              ? `prompt ${repr(request.prompt)} has no verbalizer, which classify needs; tune it with label words`
              : "classify needs a prompt with a verbalizer; add one and name it with prompt",
          );
        }
        const deepest = Math.max(...loaded.verbalizer.words.map((word) => word.length));
        const ids = await this.encode(request, loaded, deepest, deepest);
        return this.run(new ScoreWords(loaded.verbalizer, context.clock), loaded, ids, context);
      }
      case "generate": {
        if ((request.options?.numBeams ?? 1) !== 1) {
          throw new UnsupportedError("numBeams is for encoder-decoders; decoders generate greedily or sample");
        }
        const { generation: own = {} } = loaded?.file ?? {};
        const fields = request.options?.choices?.length ? {} : generationFields(manifest.generation, own);
        const sampling = resolve(request.options ?? {}, { ...fields, ...own });
        const new_ = sampling.maxNewTokens;
        const ids = await this.encode(request, loaded, sampling.askedLength ? new_ : Math.min(new_, 1), new_);
        if (!sampling.askedLength && this.limit) {
          sampling.maxNewTokens = Math.min(DEFAULT_NEW_TOKENS, this.limit - ids.length - this.prefixLength(loaded));
        }
        const history = ids.filter((id) => id < this.vocab);
        const end = sampling.choices.length ? await this.textEnd(request, loaded) : "";
        const strategy = new Generate(sampling, {
          eos: manifest.tokens.eos,
          decode: (tokens) => tokenizer.decode(tokens),
          encode: (text) => idsBehind((one) => tokenizer.encode(one, false), end, text),
          history,
          processors: new Processors(fields, history, manifest.tokens.eos, sampling.maxNewTokens),
          clock: context.clock,
          onText: context.onText,
        });
        return this.run(strategy, loaded, ids, context);
      }
      default:
        throw unknownTask(task, "classify, generate, tag, qa and embed");
    }
  }

  async logits(request: Request, given: Loaded | null, options: CallOptions): Promise<Float32Array> {
    const loaded = given as DecoderPrompt | null;
    const ids = await this.encode(request, loaded, 0, 0);
    return this.run(new FirstLogits(), loaded, ids, new Context(request, options));
  }

  async embed(requests: readonly Request[], loaded: Loaded | null, pooling: string | null, options: CallOptions): Promise<Float32Array[]> {
    if (pooling !== null && pooling !== "last") {
      throw new InputError(`pooling ${repr(pooling)} needs an encoder package; a decoder-only one gives 'last'`);
    }
    const found: Float32Array[] = [];
    for (const request of requests) {
      found.push(await this.lastState(request, loaded as DecoderPrompt | null, new Context(request, options)));
    }
    return found;
  }

  close(): Promise<void> {
    return this.graph.close();
  }

  private checkStates(everywhere: boolean): void {
    const shape = this.graph.shape(names.HIDDEN_STATES);
    if (!this.graph.outputs.has(names.HIDDEN_STATES) || (everywhere && shape?.[1] === 1)) {
      throw new UnsupportedError(
        `the graph has no output ${names.HIDDEN_STATES} ${everywhere ? "of every token" : "of the last token"}, which ` +
          "heads and embeddings read; export the base again with this version of edgeprompt",
      );
    }
  }

  /** Bytes of keys and values of one position. */
  private get positionBytes(): number {
    const { geometry: size, kvDtype } = this.parts.manifest;
    return 2 * size.numLayers * size.numKeyValueHeads * size.headSize * (kvDtype === "float16" ? 2 : 4);
  }

  private prefixLength(loaded: DecoderPrompt | null): number {
    return loaded?.asPrefix ? loaded.count : 0;
  }

  /** A prompt's keys and values, computed on this graph, once. */
  private prefix(loaded: DecoderPrompt): Promise<Cache> {
    loaded.prefix ??= this.computePrefix(loaded).catch((error: unknown) => {
      loaded.prefix = null;
      throw error;
    });
    return loaded.prefix;
  }

  private async computePrefix({ file, rows, count }: DecoderPrompt): Promise<Cache> {
    const past = file.pastKeyValues;
    if (!past) return (await this.prefill(virtualIds(this.vocab, count), this.empty, rows)).state;
    const [, , heads, length, size] = past.shape as [number, number, number, number, number];
    const block = heads * length * size;
    const tensors = this.pasts.map((name, i): [string, OrtTensor] => {
      const values = past.data.slice(i * block, (i + 1) * block);
      return [name, this.graph.floats(values, [1, heads, length, size], this.parts.manifest.kvDtype)];
    });
    return { tensors: Object.fromEntries(tensors), length };
  }

  /** Run ids behind a cache, in chunks; `states` gets their hidden states; `keep`: whether to go on behind the last. */
  private async prefill(
    ids: readonly number[], cache: Cache, rows: OrtTensor | null, states?: Matrix[], context?: Context, keep = true,
  ): Promise<Reached<Cache>> {
    let reached: Reached<Cache> = { logits: [], state: cache };
    for (let done = 0; done < ids.length; done += this.chunk) {
      context?.check();
      const end = done + this.chunk;
      reached = await this.forward([ids.slice(done, end)], reached.state, rows, states, keep || end < ids.length);
    }
    return reached;
  }

  /** Run the same number of ids behind the cache of each sequence. */
  private async forward(
    ids: readonly (readonly number[])[], cache: Cache, rows: OrtTensor | null, states?: Matrix[], keep = true,
  ): Promise<Reached<Cache>> {
    const [batch, length] = [ids.length, ids[0]!.length];
    const total = cache.length + length;
    const feeds = {
      ...cache.tensors,
      [names.INPUT_IDS]: this.graph.ints(ids.flat(), [batch, length]),
      [names.ATTENTION_MASK]: this.graph.ints(Array<number>(batch * total).fill(1), [batch, total]),
      [names.POSITION_IDS]: this.graph.ints(ids.flatMap(() => range(cache.length, total)), [batch, length]),
      [names.PROMPT_EMBEDDINGS]: rows ?? this.noRows,
    };
    const presents = keep ? this.presents : [];
    const found = await this.graph.run(feeds, [names.LOGITS, ...(states ? [names.HIDDEN_STATES] : []), ...presents]);
    states?.push(matrixOf(found[names.HIDDEN_STATES]!));
    const tensors = Object.fromEntries(presents.map((name, i) => [this.pasts[i]!, found[name]!]));
    return { logits: lastLogits(found[names.LOGITS]!), state: { tensors, length: total } };
  }

  private async run<T>(strategy: Strategy<T>, loaded: DecoderPrompt | null, ids: number[], context: Context, states?: Matrix[]): Promise<T> {
    context.clock.inputTokens = ids.length;
    context.check();
    let cache = loaded?.asPrefix && loaded.count ? await this.prefix(loaded) : this.empty;
    let rows = loaded && !loaded.asPrefix ? loaded.rows : null;
    if (!ids.length && loaded) {
      // An empty text: the prompt's last virtual token is run again, for its logits.
      ids = [this.vocab + loaded.count - 1];
      rows = loaded.rows;
      const length = loaded.count - 1;
      const tensors = Object.entries(cache.tensors).map(([name, one]) => [name, firstPositions(this.graph, one, length)]);
      cache = { tensors: Object.fromEntries(tensors), length };
    }
    // One of the sequences is the text itself, which all others continue.
    strategy.limit?.(Math.floor(this.parts.kvBudget / (this.positionBytes * (cache.length + ids.length + 1))) - 1);
    const reached = await this.prefill(ids, cache, rows, states, context, !strategy.staysAtText);
    const step = (tokens: number[], state: Cache): Promise<Reached<Cache>> => this.forward(tokens.map((token) => [token]), state, null);
    const pick = ({ tensors, length }: Cache, sequences: number[]): Cache => ({ tensors: pickAll(this.graph, tensors, sequences), length });
    return decode(strategy, reached, step, pick, context);
  }

  private async lastState(request: Request, loaded: DecoderPrompt | null, context: Context): Promise<Float32Array> {
    this.checkStates(false);
    const states: Matrix[] = [];
    await this.run(new FirstLogits(), loaded, await this.encode(request, loaded, 0, 0), context, states);
    const last = states.at(-1)!;
    return rowOf(last, rowsOf(last) - 1).slice();
  }

  private async locate(request: Request, loaded: DecoderPrompt | null, task: string, context: Context): Promise<Result> {
    if (loaded?.file.task !== task) throw new InputError(`task ${repr(task)} needs a prompt that was trained for it`);
    if (request.inputIds) throw new InputError("words can only be found in a text; give text instead of inputIds");
    const { file } = loaded;
    const slot = locatedSlot(file.template);
    const fields = asFields(request.text ?? "");
    const encoded: EncodedText = encodeText(file.template, this.parts.tokenizer, fields, {
      numVirtualTokens: loaded.asPrefix ? 0 : loaded.count,
      firstVirtualId: this.vocab,
      maxLength: this.limit ? this.limit - this.prefixLength(loaded) : null,
      truncate: request.truncate ?? false,
      addSpecialTokens: file.addSpecialTokens,
      locate: slot,
    });
    if (!encoded.ids.length) throw new InputError("the text has no token, so there is nothing to run; give at least one character");
    const states: Matrix[] = [];
    await this.run(new FirstLogits(), loaded, encoded.ids, context, states);
    const virtual = loaded.asPrefix ? 0 : loaded.count;
    const joined = { data: new Float32Array(states.flatMap((one) => [...one.data])), width: states[0]!.width };
    const logits = tokenLogits(file, joined, virtual);
    if (task === "tag") return tag(file, logits, encoded.offsets, fields[slot]!);
    return findAnswer(logits, encoded.offsets, fields[slot]!, file.generation["allow_no_answer"] ? virtual : null);
  }

  /** Ids behind the prefix, all checked; the text's length is checked before any work starts. */
  private async encode(request: Request, loaded: DecoderPrompt | null, least: number, most: number): Promise<number[]> {
    const prefix = this.prefixLength(loaded);
    let ids: number[];
    if (request.inputIds) {
      ids = checkIds(request.inputIds, this.vocab);
      if (loaded && !loaded.asPrefix) {
        throw new InputError(`prompt ${repr(request.prompt)} has virtual tokens inside its template, so it needs text, not ids`);
      }
    } else ids = await this.tokenise(request, loaded, this.limit && request.truncate ? this.limit - least : null);
    if (!ids.length && !(prefix && loaded?.rows)) {
      throw new InputError("the text has no token, so there is nothing to run; give at least one character");
    }
    if (this.limit && prefix + ids.length + least > this.limit) {
      throw new InputError(
        `the request needs ${prefix} prompt, ${ids.length} text and ${least} new tokens; the base holds ${this.limit}; ` +
          "shorten the text, lower maxNewTokens, or set truncate",
      );
    }
    const bytes = this.positionBytes;
    const longest = Math.min(prefix + ids.length + most, this.limit || Infinity);
    if (longest * bytes > this.parts.kvBudget) {
      throw new CapacityError(
        `the request needs ${longest} positions of ${bytes} bytes, and kvBudget is ${this.parts.kvBudget} bytes; ` +
          "shorten it, or raise the budget",
      );
    }
    return ids;
  }

  /** The template's text as the user's turn in the package's chat template, behind leading virtual tokens. */
  private async chat({ parts }: Template): Promise<Template> {
    const [before, after] = (await this.parts.chat(CHAT_TEXT)).split(CHAT_TEXT) as [string, string];
    const lead = parts[0] && "virtual" in parts[0] ? 1 : 0;
    return new Template([...parts.slice(0, lead), { literal: before }, ...parts.slice(lead), { literal: after }]);
  }

  /** The end of the text that an answer stands behind; empty where only ids are known. */
  private async textEnd(request: Request, loaded: DecoderPrompt | null): Promise<string> {
    if (request.inputIds) return "";
    const template = loaded?.file.template ?? TEXT_ALONE;
    const chat = request.chat || loaded?.file.generation["chat"];
    const last = (chat ? await this.chat(template) : template).parts.at(-1)!;
    if ("slot" in last) return [...asFields(request.text ?? "")[last.slot]!].slice(-TEXT_END).join("");
    return "literal" in last ? last.literal : "";
  }

  private async tokenise(request: Request, loaded: DecoderPrompt | null, limit: number | null): Promise<number[]> {
    const { tokenizer } = this.parts;
    let template = loaded?.file.template ?? TEXT_ALONE;
    let special = loaded?.file.addSpecialTokens ?? true;
    if (request.chat || loaded?.file.generation["chat"]) {
      template = await this.chat(template);
      special = false;
    }
    const inside = loaded?.rows ? loaded.count : 0;
    const prefix = this.prefixLength(loaded);
    const ids = template.encode(tokenizer, asFields(request.text ?? ""), {
      numVirtualTokens: inside,
      firstVirtualId: this.vocab,
      maxLength: limit === null ? null : inside ? limit : limit - prefix,
      addSpecialTokens: special,
    });
    return inside && prefix ? ids.slice(inside) : ids;
  }
}
