/** Encoder-only models: every row of a batch with its own prompt, its own prefix and its own head. */

import { encodeText, locatedSlot, type EncodedText } from "../encoderText.ts";
import { InputError, PackageError, TemplateError, UnsupportedError } from "../errors.ts";
import { classifyHead, findAnswer, pool, tag, tokenLogits, type Matrix } from "../heads.ts";
import { repr } from "../json.ts";
import * as names from "../names.ts";
import { floatsOf, type Graph, type OrtTensor } from "../ort.ts";
import type { PromptFile } from "../prompt.ts";
import type { Classification, Request, Result } from "../results.ts";
import { Template, asFields } from "../template.ts";
import { Verbalizer, textBeforeWords } from "../verbalizer.ts";
import { Context, type CallOptions } from "./context.ts";
import { checkHead, checkIds, checkRows, taskOf, virtualIds, type Engine, type EngineParts, type Loaded } from "./engine.ts";

const NO_GENERATION = "encoder-only bases do not generate; they classify, tag, answer questions and embed";
/** Most padded tokens of one batch. */
const MAX_TOKENS = 1024;
/** A batch ends before a row that would leave more than this share of it to padding. */
const MAX_WASTE = 0.1;
const TEXT_ALONE = Template.parse("{text}");

interface EncoderPrompt extends Loaded {
  verbalizer: Verbalizer | null;
}

/** One request, encoded. */
interface Work {
  request: Request;
  task: string;
  prompt: EncoderPrompt | null;
  encoded: EncodedText;
  maskPosition: number;
  context: Context;
  output: string;
}

export class EncoderEngine implements Engine {
  private readonly graph: Graph;

  constructor(private readonly parts: EngineParts) {
    this.graph = parts.graphs["model"]!;
    if (!this.graph.outputs.has(names.LAST_HIDDEN_STATE)) {
      throw new PackageError(`the graph has no output ${names.LAST_HIDDEN_STATE}; export the base again`);
    }
  }

  prepare(name: string, prompt: PromptFile): Promise<EncoderPrompt> {
    if (prompt.encoderPastKeyValues) {
      throw new UnsupportedError(
        `prompt ${repr(name)} has encoder_past_key_values, which belong to encoder-decoders; an encoder-only base takes ` +
          "past_key_values",
      );
    }
    if (prompt.pastKeyValues && !this.graph.inputs.has(names.past(0, "key"))) {
      throw new UnsupportedError(
        `prompt ${repr(name)} has past_key_values, and this graph, which another tool exported, has no such input; ` +
          "export the base with --route torch",
      );
    }
    if (prompt.task === "generate") throw new UnsupportedError(`prompt ${repr(name)} is for generation. ${NO_GENERATION}`);
    checkRows(name, prompt, this.graph);
    const loaded: EncoderPrompt = { file: prompt, verbalizer: null };
    this.encodeFields(loaded, prompt.template.trial, false, prompt.task);
    if (prompt.headSpec) checkHead(name, prompt, this.parts.manifest, this.graph.outputs.has(names.POOLER_OUTPUT));
    else if (prompt.task === "classify") loaded.verbalizer = this.compileCloze(name, prompt);
    else if (prompt.task === "tag" || prompt.task === "qa") {
      throw new InputError(`prompt ${repr(name)} is for ${repr(prompt.task)} and has no head; tune it with one`);
    }
    return Promise.resolve(loaded);
  }

  async answer(request: Request, loaded: Loaded | null, options: CallOptions): Promise<Result> {
    const [found] = await this.answerAll([request], [loaded], options);
    if (found instanceof Error) throw found;
    return found!;
  }

  /** Rows of similar length run together. */
  async answerAll(requests: readonly Request[], loaded: readonly (Loaded | null)[], options: CallOptions): Promise<(Result | Error)[]> {
    return this.forwardAll(
      requests.map((request, i) => () => this.encode(request, loaded[i] as EncoderPrompt | null, null, options)),
      null,
    );
  }

  async logits(request: Request, loaded: Loaded | null, options: CallOptions): Promise<Float32Array> {
    const [found] = await this.forwardAll([() => this.encode(request, loaded as EncoderPrompt | null, "logits", options)], null);
    if (found instanceof Error) throw found;
    return found as Float32Array;
  }

  async embed(requests: readonly Request[], loaded: Loaded | null, pooling: string | null, options: CallOptions): Promise<Float32Array[]> {
    const how = pooling ?? this.parts.manifest.pooling;
    if (!["mean", "cls", "last"].includes(how)) throw new InputError(`pooling is ${repr(how)}, allowed: mean, cls, last`);
    const found = await this.forwardAll(
      requests.map((request) => () => this.encode(request, loaded as EncoderPrompt | null, "embed", options)),
      how,
    );
    const error = found.find((one) => one instanceof Error);
    if (error) throw error;
    return found as Float32Array[];
  }

  close(): Promise<void> {
    return this.graph.close();
  }

  private compileCloze(name: string, prompt: PromptFile): Verbalizer {
    const { manifest, tokenizer } = this.parts;
    if (!prompt.verbalizer.size) {
      throw new InputError(`prompt ${repr(name)} has neither a head nor a verbalizer, so it cannot classify`);
    }
    if (!this.graph.outputs.has(names.LOGITS)) {
      throw new UnsupportedError(
        `prompt ${repr(name)} classifies by label words, and ${manifest.base.name} is no masked language model; tune it ` +
          "with a head, or export the ...ForMaskedLM checkpoint",
      );
    }
    const { masks } = prompt.template;
    if (masks !== 1) throw new TemplateError(`prompt ${repr(name)}: label words need one {mask} in the template, found ${masks}`);
    const found = Verbalizer.compile(prompt, (text) => tokenizer.encode(text, false), textBeforeWords(prompt.template));
    const long = found.words.find((word) => word.length > 1);
    if (long) {
      throw new TemplateError(
        `prompt ${repr(name)}: label word ${repr(tokenizer.decode(long))} is ${long.length} tokens; a mask stands for ` +
          "one, so choose words of one token (a leading space may matter)",
      );
    }
    return found;
  }

  private encode(request: Request, prompt: EncoderPrompt | null, as: string | null, options: CallOptions): Work {
    const { manifest } = this.parts;
    const task = as ?? taskOf(request, prompt, "embed");
    if (task === "generate") throw new UnsupportedError(NO_GENERATION);
    if (!["embed", "logits"].includes(task) && prompt?.file.task !== task) {
      throw new InputError(
        prompt
          ? `prompt ${repr(request.prompt)} is for ${repr(prompt.file.task)}, not for ${repr(task)}`
          : `${task} needs a prompt for that task; add one and name it with prompt`,
      );
    }
    if (task === "logits" && !this.graph.outputs.has(names.LOGITS)) {
      throw new UnsupportedError(`${manifest.base.name} is no masked language model, so it has no logits`);
    }
    const context = new Context(request, options);
    const encoded = request.inputIds
      ? this.given(request, prompt, task)
      : this.encodeFields(prompt, asFields(request.text ?? ""), request.truncate ?? false, task);
    context.clock.inputTokens = encoded.ids.length;
    let output: string = names.LAST_HIDDEN_STATE;
    if (task === "logits" || (task === "classify" && prompt?.verbalizer)) output = names.LOGITS;
    else if (task === "classify" && prompt?.file.headSpec?.input === "pooler") output = names.POOLER_OUTPUT;
    let maskPosition = 0;
    if (output === names.LOGITS) {
      const places = encoded.ids.flatMap((id, i) => (id === manifest.tokens.mask ? [i] : []));
      if (places.length !== 1) {
        throw new InputError(`the request holds ${places.length} mask tokens; exactly one is needed, the template's {mask}`);
      }
      maskPosition = places[0]!;
    }
    return { request, task, prompt, encoded, maskPosition, context, output };
  }

  private room(prompt: EncoderPrompt | null): number | null {
    const limit = this.parts.manifest.geometry.maxPositions;
    return limit ? limit - (prompt?.file.pastKeyValues ? prompt.file.numVirtualTokens : 0) : null;
  }

  private inside(prompt: EncoderPrompt | null): number {
    return prompt && !prompt.file.pastKeyValues ? prompt.file.numVirtualTokens : 0;
  }

  private encodeFields(prompt: EncoderPrompt | null, fields: Readonly<Record<string, string>>, truncate: boolean, task: string): EncodedText {
    const template = prompt?.file.template ?? TEXT_ALONE;
    return encodeText(template, this.parts.tokenizer, fields, {
      numVirtualTokens: this.inside(prompt),
      firstVirtualId: this.parts.manifest.geometry.vocabSize,
      maxLength: this.room(prompt),
      truncate,
      addSpecialTokens: prompt?.file.addSpecialTokens ?? true,
      locate: task === "tag" || task === "qa" ? locatedSlot(template) : null,
    });
  }

  private given(request: Request, prompt: EncoderPrompt | null, task: string): EncodedText {
    const { vocabSize } = this.parts.manifest.geometry;
    const given = checkIds(request.inputIds!, vocabSize);
    if (task === "tag" || task === "qa") {
      throw new InputError(`${task} needs the text, to say where its words stand; give text instead of inputIds`);
    }
    const count = this.inside(prompt);
    if (count && !prompt!.file.template.promptIsPrefix) {
      throw new InputError(`prompt ${repr(request.prompt)} has virtual tokens inside its template, so it needs text, not ids`);
    }
    const ids = [...virtualIds(vocabSize, count), ...given];
    const room = this.room(prompt);
    if (room !== null && ids.length > room) {
      throw new InputError(`the request has ${ids.length} tokens with its prompt, at most ${room} fit; shorten it`);
    }
    return { ids, typeIds: ids.map(() => 0), offsets: ids.map(() => null) };
  }

  private async forwardAll(asked: (() => Work)[], pooling: string | null): Promise<(Result | Error)[]> {
    const results: (Result | Error)[] = [];
    const works = asked.map((make, i) => {
      try {
        return make();
      } catch (error) {
        results[i] = error as Error;
        return null;
      }
    });
    const ready = works.flatMap((work, i) => (work ? [i] : []));
    for (const batch of splitBatches(ready, (i) => works[i]!.encoded.ids.length, (i) => prefixLength(works[i]!))) {
      const rows = batch.map((i) => works[i]!);
      try {
        rows.forEach((work) => work.context.check());
        const outputs = await this.forward(rows);
        rows.forEach((work, row) => {
          try {
            work.context.check();
            results[batch[row]!] = this.read(work, outputs(row, work), pooling);
          } catch (error) {
            results[batch[row]!] = error as Error;
          }
        });
      } catch (error) {
        for (const i of batch) results[i] = error as Error;
      }
    }
    return results;
  }

  /** Run a batch; gives a row's own part of the output that it needs. */
  private async forward(works: Work[]): Promise<(row: number, work: Work) => Matrix> {
    if (!works.some((work) => work.encoded.ids.length)) {
      throw new InputError("the text has no token, so there is nothing to run; give at least one character");
    }
    const wanted = [...new Set(works.map((work) => work.output))].sort();
    const found = await this.graph.run(this.feeds(works), wanted);
    return (row, work) => {
      const { dims } = found[work.output]!;
      const values = floatsOf(found[work.output]!);
      const width = dims.at(-1)!;
      const size = values.length / works.length;
      const length = dims.length === 3 ? work.encoded.ids.length * width : width;
      return { data: values.subarray(row * size, row * size + length), width };
    };
  }

  /** The graph's inputs for one batch: rows and prefixes are padded on the right; a text stands behind its own prefix. */
  private feeds(works: Work[]): Record<string, OrtTensor> {
    const { manifest } = this.parts;
    const { geometry: size, tokens, kvDtype } = manifest;
    const batch = works.length;
    const length = Math.max(...works.map((work) => work.encoded.ids.length));
    const prefix = Math.max(...works.map(prefixLength));
    const ids = Array<number>(batch * length).fill(tokens.pad ?? 0);
    const types = Array<number>(batch * length).fill(0);
    const positions = Array<number>(batch * length);
    const mask = Array<number>(batch * (prefix + length)).fill(0);
    const block = size.numKeyValueHeads * prefix * size.headSize;
    const pasts = names.perLayer(size.numLayers, names.past).map(() => new Float32Array(batch * block));
    const bank = new Map<PromptFile, number>();
    const tables: Float32Array[] = [];
    let used = 0;
    works.forEach(({ prompt, encoded }, row) => {
      const file = prompt?.file;
      let shift = 0;
      if (file?.promptEmbeddings) {
        if (!bank.has(file)) {
          bank.set(file, used);
          tables.push(file.promptEmbeddings.data);
          used += file.numVirtualTokens;
        }
        shift = bank.get(file)!;
      }
      const own = prefixLength(works[row]!);
      encoded.ids.forEach((id, i) => {
        ids[row * length + i] = id >= size.vocabSize ? id + shift : id;
        types[row * length + i] = encoded.typeIds[i]!;
        mask[row * (prefix + length) + prefix + i] = 1;
      });
      mask.fill(1, row * (prefix + length), row * (prefix + length) + own);
      for (let i = 0; i < length; i++) {
        const position = own + i;
        positions[row * length + i] = (size.maxPositions ? Math.min(position, size.maxPositions - 1) : position) + size.positionOffset;
      }
      if (!file?.pastKeyValues) return;
      const { headSize } = size;
      pasts.forEach((past, part) => {
        for (let head = 0; head < size.numKeyValueHeads; head++) {
          const from = (part * size.numKeyValueHeads + head) * own * headSize;
          past.set(file.pastKeyValues!.data.subarray(from, from + own * headSize), row * block + head * prefix * headSize);
        }
      });
    });
    const width = size.embeddingSize || size.hiddenSize;
    const { graph } = this;
    const table = new Float32Array(Math.max(1, used) * width);
    let at = 0;
    for (const rows of tables) {
      table.set(rows, at);
      at += rows.length;
    }
    const found: Record<string, OrtTensor> = {
      [names.INPUT_IDS]: graph.ints(ids, [batch, length]),
      [names.ATTENTION_MASK]: graph.ints(mask, [batch, prefix + length]),
      [names.POSITION_IDS]: graph.ints(positions, [batch, length]),
      [names.TOKEN_TYPE_IDS]: graph.ints(types, [batch, length]),
      [names.MASK_POSITIONS]: graph.ints(works.map((work) => work.maskPosition), [batch]),
      [names.PROMPT_EMBEDDINGS]: graph.floats(table, [Math.max(1, used), width]),
    };
    names.perLayer(size.numLayers, names.past).forEach((name, i) => {
      found[name] = graph.floats(pasts[i]!, [batch, size.numKeyValueHeads, prefix, size.headSize], kvDtype);
    });
    return found;
  }

  private read(work: Work, output: Matrix, pooling: string | null): Result {
    const { task, prompt, encoded, request } = work;
    if (task === "logits") return output.data.slice();
    if (task === "classify") return { ...this.classify(work, output), timings: work.context.clock.timings(0) };
    const text = textPositions(encoded.ids, this.parts.manifest.geometry.vocabSize);
    if (task === "embed") return pool(output, text, pooling ?? this.parts.manifest.pooling);
    const { file } = prompt!;
    const logits = tokenLogits(file, output, this.inside(prompt));
    const field = asFields(request.text ?? "")[locatedSlot(file.template)]!;
    if (task === "tag") return tag(file, logits, encoded.offsets, field);
    return findAnswer(logits, encoded.offsets, field, file.generation["allow_no_answer"] ? text[0]! : null);
  }

  private classify({ prompt, encoded }: Work, output: Matrix): Classification {
    const { file, verbalizer } = prompt!;
    if (verbalizer) {
      const largest = output.data.reduce((a, b) => Math.max(a, b), -Infinity);
      const log = Math.log(output.data.reduce((sum, x) => sum + Math.exp(x - largest), 0));
      return verbalizer.classification(verbalizer.words.map((word) => output.data[word[0]!]! - largest - log));
    }
    const how = file.headSpec!.input;
    if (how === "pooler") return classifyHead(file, output.data.slice());
    return classifyHead(file, pool(output, textPositions(encoded.ids, this.parts.manifest.geometry.vocabSize), how));
  }
}

const prefixLength = ({ prompt }: Work): number => (prompt?.file.pastKeyValues ? prompt.file.numVirtualTokens : 0);

export const textPositions = (ids: readonly number[], vocabSize: number): number[] =>
  ids.flatMap((id, i) => (id < vocabSize ? [i] : []));

/** Group rows of similar length, the longest first. */
function splitBatches(rows: number[], length: (row: number) => number, prefix: (row: number) => number): number[][] {
  const order = [...rows].sort((a, b) => length(b) - length(a) || prefix(b) - prefix(a) || a - b);
  const batches: number[][] = [];
  let [used, longest, widest] = [0, 0, 0];
  for (const row of order) {
    const batch = batches.at(-1);
    const count = (batch?.length ?? 0) + 1;
    const wider = Math.max(widest, prefix(row));
    const fits = batch && count * (longest + wider) <= MAX_TOKENS;
    if (fits && used + length(row) >= (1 - MAX_WASTE) * count * longest) {
      batch.push(row);
      [used, widest] = [used + length(row), wider];
    } else {
      batches.push([row]);
      [used, longest, widest] = [length(row), length(row), prefix(row)];
    }
  }
  return batches;
}
