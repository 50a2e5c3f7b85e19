/** The prompt file: a `.safetensors` file with a soft prompt and everything needed to use it. */

import { fromHalf } from "./bytes.ts";
import { BaseMismatchError, EdgePromptError, PromptFileError } from "./errors.ts";
import { brief, difference } from "./fingerprint.ts";
import { FormatError, check, checkKeys, given, numeric, parseJson, plain, repr, type Fields } from "./json.ts";
import { readBase, type Base, type Manifest } from "./manifest.ts";
import * as names from "./names.ts";
import { LONE_SURROGATE, Template } from "./template.ts";

const FORMAT = "edgeprompt-prompt";
const VERSION = 1;
const METADATA_KEY = "edgeprompt";
const MAX_HEADER_BYTES = 1 << 20;
export const MAX_FILE_BYTES = 2 ** 30;
const MAX_VIRTUAL_TOKENS = 65_536;
const HEAD_INPUTS = ["first", "first_text", "pooler", "mean", "mean_all", "last", "tokens", "tokens_unshifted"];
const HEAD_OPERATIONS = ["linear", "tanh", "gelu", "relu", "silu", "layer_norm"];
const PROBLEM_TYPES = ["single_label", "multi_label", "regression"];
const AGGREGATIONS = ["sum", "mean", "max"];

/** A tensor in float32; what was float16 in the file is widened. */
export interface Tensor {
  readonly data: Float32Array;
  readonly shape: readonly number[];
}

export interface HeadStep {
  operation: string;
  name: string;
}

export interface Head {
  input: string;
  steps: HeadStep[];
  problemType: string;
}

export interface Golden {
  fields: Record<string, string>;
  label: string | null;
  tokenIds: number[];
  logits: Record<string, number>;
}

/** The weights that the prompt was trained against; null: the base in full precision. */
export interface TunedFor {
  precision: string;
  weightsHash: string | null;
}

/** A soft prompt for one task on one base. */
export interface PromptFile {
  name: string;
  method: string;
  task: string;
  base: Base;
  template: Template;
  /** `[numVirtualTokens, hiddenSize]` */
  promptEmbeddings: Tensor | null;
  /** `[numLayers, 2, numKeyValueHeads, numVirtualTokens, headSize]` */
  pastKeyValues: Tensor | null;
  encoderPastKeyValues: Tensor | null;
  head: Map<string, Tensor>;
  headSpec: Head | null;
  verbalizer: Map<string, string[]>;
  verbalizerAggregation: "sum" | "mean" | "max";
  labels: string[];
  calibration: number[];
  tokenizerFingerprint: string | null;
  addSpecialTokens: boolean;
  generation: Record<string, any>;
  tunedFor: TunedFor[];
  training: Record<string, any>;
  golden: Golden | null;
  numVirtualTokens: number;
}

export const METADATA_REQUIRED =
  "format version name method task base num_virtual_tokens template head verbalizer labels calibration tokenizer_fingerprint add_special_tokens generation tuned_for training golden".split(
    " ",
  );
export const METADATA_OPTIONAL = ["verbalizer_aggregation", "distilled_from"];

/** Read and check the bytes of a prompt file. */
export function parsePrompt(data: Uint8Array, where?: string): PromptFile {
  try {
    return read(data);
  } catch (error) {
    if (!(error instanceof FormatError || error instanceof EdgePromptError)) throw error;
    throw new PromptFileError(where ? `bad prompt file ${repr(where)}: ${error.message}` : error.message);
  }
}

function read(data: Uint8Array): PromptFile {
  if (data.length > MAX_FILE_BYTES) {
    throw new FormatError(`${data.length} bytes, at most ${MAX_FILE_BYTES} are allowed`);
  }
  const [header, start] = readHeader(data);
  const metadata = header["__metadata__"];
  const entries = metadata && typeof metadata === "object" ? Object.entries(metadata) : [];
  if (entries.length !== 1 || entries[0]![0] !== METADATA_KEY) {
    throw new FormatError(
      `no edgeprompt prompt file: __metadata__ must hold the key ${repr(METADATA_KEY)} alone ` +
        "(edgeprompt convert reads other tools' prompts)",
    );
  }
  const tensors = readTensors(header, data.subarray(start));
  const text = check<string>(entries[0]![1], "str", METADATA_KEY);
  const prompt = fromParts(check<Fields>(parseJson(text), "dict", "metadata"), tensors);
  checkTensors(prompt, tensors);
  return prompt;
}

function readHeader(data: Uint8Array): [Fields, number] {
  if (data.length < 8) throw new FormatError("too short for a safetensors file");
  const size = new DataView(data.buffer, data.byteOffset, data.byteLength).getBigUint64(0, true);
  if (size > BigInt(Math.min(MAX_HEADER_BYTES, data.length - 8))) {
    throw new FormatError(
      `the header claims ${size} bytes; the file has ${data.length}, at most ${MAX_HEADER_BYTES} fit`,
    );
  }
  const end = 8 + Number(size);
  const header = check<Fields>(parseJson(data.subarray(8, end)), "dict", "the header");
  for (const [name, spec] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const dtype = spec && typeof spec === "object" ? (spec as Fields)["dtype"] : spec;
    if (dtype !== "F32" && dtype !== "F16") {
      throw new FormatError(`tensor ${repr(name)} is ${repr(dtype)}, allowed: F32, F16`);
    }
  }
  return [header, end];
}

/** The tensors, which must cover the data without gap or overlap, as the safetensors library demands. */
function readTensors(header: Fields, data: Uint8Array): Map<string, Tensor> {
  const found = new Map<string, Tensor>();
  const specs = Object.entries(header)
    .filter(([name]) => name !== "__metadata__")
    .map(([name, value]) => {
      // Other keys mean nothing to the safetensors library either.
      const { dtype, shape: sizes, data_offsets } = value as Fields;
      const spec = checkKeys({ dtype, shape: sizes, data_offsets }, `tensor ${repr(name)}`, ["dtype", "shape", "data_offsets"]);
      const count = (one: unknown): number => {
        const number = check<number>(one, "int", `a size of tensor ${repr(name)}`);
        if (!(number >= 0 && number <= MAX_FILE_BYTES)) throw new FormatError(`tensor ${repr(name)} has size ${number}`);
        return number;
      };
      const shape = check<unknown[]>(spec["shape"], "list", `the shape of ${repr(name)}`).map(count);
      const offsets = check<unknown[]>(spec["data_offsets"], "list", `data_offsets of ${repr(name)}`).map(count);
      if (offsets.length !== 2) throw new FormatError(`data_offsets of ${repr(name)} are ${repr(offsets)}`);
      return { name, dtype: spec["dtype"] as string, shape, begin: offsets[0]!, end: offsets[1]! };
    })
    .sort((a, b) => a.begin - b.begin || a.end - b.end);
  let at = 0;
  for (const { name, dtype, shape, begin, end } of specs) {
    const size = shape.reduce((product, one) => product * one, 1) * (dtype === "F32" ? 4 : 2);
    if (begin !== at || end - begin !== size || end > data.length) {
      throw new FormatError(`tensor ${repr(name)} lies at ${begin} to ${end}, where ${at} to ${at + size} is needed`);
    }
    const bytes = new Uint8Array(data.subarray(begin, end)); // a copy, aligned (a Buffer's slice would be a view)
    const values = dtype === "F32" ? new Float32Array(bytes.buffer) : fromHalf(new Uint16Array(bytes.buffer));
    found.set(name, { data: values, shape });
    at = end;
  }
  if (at !== data.length) throw new FormatError(`the tensors take ${at} bytes, the file has ${data.length}`);
  return found;
}

function fromParts(data: Fields, tensors: Map<string, Tensor>): PromptFile {
  if (data["format"] !== FORMAT) throw new FormatError(`"format" is ${repr(data["format"])}, expected ${repr(FORMAT)}`);
  if (data["version"] !== VERSION) {
    throw new FormatError(`version ${repr(data["version"])}, this edgeprompt reads ${VERSION}`);
  }
  checkKeys(data, "metadata", METADATA_REQUIRED, METADATA_OPTIONAL);
  const text = (key: string): string => check<string>(data[key], "str", key);
  const written = check<number>(data["num_virtual_tokens"], "int", "num_virtual_tokens");
  const embeddings = tensors.get(names.PROMPT_EMBEDDINGS) ?? null;
  const past = tensors.get(names.PAST_KEY_VALUES) ?? null;
  const encoderPast = tensors.get(names.ENCODER_PAST) ?? null;
  const aggregation = given(data, "verbalizer_aggregation", "sum");
  if (!AGGREGATIONS.includes(aggregation as string)) {
    throw new FormatError(`verbalizer_aggregation is ${repr(aggregation)}, allowed: ${AGGREGATIONS.join(", ")}`);
  }
  check(given(data, "distilled_from", {}), "dict", "distilled_from");
  checkUnicode(data);
  const prompt: PromptFile = {
    name: text("name"),
    method: text("method"),
    task: text("task"),
    base: readBase(data["base"], "base"),
    template: Template.fromJson(data["template"]),
    promptEmbeddings: embeddings,
    pastKeyValues: past,
    encoderPastKeyValues: encoderPast,
    head: new Map([...tensors].filter(([name]) => name.startsWith("head.")).map(([name, one]) => [name.slice(5), one])),
    headSpec: data["head"] === null ? null : readHead(data["head"]),
    verbalizer: readVerbalizer(data["verbalizer"]),
    verbalizerAggregation: aggregation as PromptFile["verbalizerAggregation"],
    labels: check<unknown[]>(data["labels"], "list", "labels").map((one) => check<string>(one, "str", "a label")),
    calibration: check<unknown[]>(data["calibration"], "list", "calibration").map((one) => numeric(one, "calibration")),
    tokenizerFingerprint: check<string | null>(data["tokenizer_fingerprint"], ["str", "null"], "tokenizer_fingerprint"),
    addSpecialTokens: check<boolean>(data["add_special_tokens"], "bool", "add_special_tokens"),
    generation: plain(check(data["generation"], "dict", "generation")),
    tunedFor: readTunedFor(data["tuned_for"]),
    training: plain(check(data["training"], "dict", "training")),
    golden: data["golden"] === null ? null : readGolden(data["golden"]),
    numVirtualTokens: embeddings ? (embeddings.shape[0] ?? 0) : ((past ?? encoderPast)?.shape[3] ?? 0),
  };
  if (prompt.numVirtualTokens !== written) {
    throw new FormatError(`num_virtual_tokens is ${written}, the tensors have ${prompt.numVirtualTokens}`);
  }
  return prompt;
}

/** JSON can escape half a surrogate pair, which no UTF-8 holds. */
function checkUnicode(value: unknown): void {
  if (typeof value === "string") {
    if (LONE_SURROGATE.test(value)) throw new FormatError("a text holds half of a surrogate pair");
  } else if (value && typeof value === "object") {
    for (const [key, one] of Object.entries(value)) {
      checkUnicode(key);
      checkUnicode(one);
    }
  }
}

function readHead(data: unknown): Head {
  const found = checkKeys(data, "head", ["input", "steps"], ["problem_type"]);
  return {
    input: found["input"] as string,
    steps: check<unknown[]>(found["steps"], "list", "head.steps").map((step) => {
      const one = checkKeys(step, "head step", ["operation"], ["name"]);
      const name = given(one, "name", "");
      return { operation: one["operation"] as string, name: typeof name === "string" ? name : repr(name) };
    }),
    problemType: (given(found, "problem_type", "single_label")) as string,
  };
}

function readTunedFor(data: unknown): TunedFor[] {
  if (data === null) return [];
  return (Array.isArray(data) ? data : [data]).map((one) => {
    const found = checkKeys(one, "tuned_for", ["precision"], ["weights_hash"]);
    return { precision: found["precision"] as string, weightsHash: (given(found, "weights_hash", null)) as string | null };
  });
}

function readVerbalizer(data: unknown): Map<string, string[]> {
  const found = new Map<string, string[]>();
  for (const pair of check<unknown[]>(data, "list", "verbalizer")) {
    const entry = check<unknown[]>(pair, "list", "a verbalizer's entry");
    if (entry.length !== 2) throw new FormatError(`a verbalizer's entry has ${entry.length} items, 2 are needed`);
    const label = check<string>(entry[0], "str", "a verbalizer's label");
    if (found.has(label)) throw new FormatError(`the verbalizer has label ${repr(label)} twice`);
    const words = check<unknown[]>(entry[1], "list", "label words").map((w) => check<string>(w, "str", "a label word"));
    if (!words.length || words.includes("")) throw new FormatError(`the verbalizer has no word for label ${repr(label)}`);
    found.set(label, words);
  }
  return found;
}

function readGolden(data: unknown): Golden {
  const found = checkKeys(data, "golden", ["fields"], ["label", "token_ids", "logits"]);
  const label = check<string | null>(given(found, "label", null), ["str", "null"], "golden.label");
  const tokenIds = check<unknown[]>(given(found, "token_ids", []), "list", "golden.token_ids").map((one) => {
    const token = check<number>(one, "int", "a golden token id");
    if (token < 0) throw new FormatError(`a golden token id is ${token}`);
    return token;
  });
  const fields = check<Fields>(found["fields"], "dict", "golden.fields");
  for (const value of Object.values(fields)) check(value, "str", "a golden field");
  const logits: Record<string, number> = {};
  for (const [key, value] of Object.entries(check<Fields>(given(found, "logits", {}), "dict", "golden.logits"))) {
    logits[key] = numeric(value, "a golden logit");
    if (tokenIds.length && label === null && !/^[0-9]+$/.test(key)) {
      throw new FormatError(`golden.logits has key ${repr(key)}, where a token id is needed`);
    }
  }
  return { fields: { ...fields } as Record<string, string>, label, tokenIds, logits };
}

function checkTensors(prompt: PromptFile, tensors: Map<string, Tensor>): void {
  const ranks: Record<string, number> = { [names.PROMPT_EMBEDDINGS]: 2, [names.PAST_KEY_VALUES]: 5, [names.ENCODER_PAST]: 5 };
  for (const [name, tensor] of tensors) {
    const rank = Object.hasOwn(ranks, name) ? ranks[name]! : null;
    if (rank === null && !name.startsWith("head.")) {
      throw new FormatError(`unknown tensor ${repr(name)}; known: ${Object.keys(ranks).join(", ")}, head.*`);
    }
    const shape = `[${tensor.shape.join(", ")}]`;
    if (rank !== null && tensor.shape.length !== rank) {
      throw new FormatError(`tensor ${repr(name)} has shape ${shape}, ${rank} dimensions are needed`);
    }
    if (!tensor.data.length) throw new FormatError(`tensor ${repr(name)} is empty, shape ${shape}`);
    if (!tensor.data.every(Number.isFinite)) throw new FormatError(`tensor ${repr(name)} holds NaN or infinity`);
  }
  if (prompt.numVirtualTokens > MAX_VIRTUAL_TOKENS) {
    throw new FormatError(`${prompt.numVirtualTokens} virtual tokens, at most ${MAX_VIRTUAL_TOKENS} are allowed`);
  }
  if (prompt.promptEmbeddings && prompt.pastKeyValues) {
    throw new FormatError("both prompt_embeddings and past_key_values; a prompt has one of them");
  }
  if (!tensors.size) throw new FormatError("no tensor");
  if (!names.METHODS.includes(prompt.method) && prompt.method !== "head") {
    throw new FormatError(`method is ${repr(prompt.method)}, allowed: ${names.METHODS.join(", ")}, head`);
  }
  if (!names.TASKS.includes(prompt.task)) {
    throw new FormatError(`task is ${repr(prompt.task)}, allowed: ${names.TASKS.join(", ")}`);
  }
  if (prompt.calibration.length && prompt.calibration.length !== prompt.verbalizer.size) {
    throw new FormatError(`${prompt.calibration.length} calibration values for ${prompt.verbalizer.size} labels`);
  }
  checkHead(prompt);
}

function checkHead(prompt: PromptFile): void {
  const spec = prompt.headSpec;
  if (!spec) {
    if (prompt.head.size) throw new FormatError("head tensors without a head description");
    return;
  }
  if (!HEAD_INPUTS.includes(spec.input)) {
    throw new FormatError(`head input is ${repr(spec.input)}, allowed: ${HEAD_INPUTS.join(", ")}`);
  }
  if (!PROBLEM_TYPES.includes(spec.problemType)) {
    throw new FormatError(`problem_type is ${repr(spec.problemType)}, allowed: ${PROBLEM_TYPES.join(", ")}`);
  }
  for (const step of spec.steps) {
    if (!HEAD_OPERATIONS.includes(step.operation)) {
      throw new FormatError(`head operation is ${repr(step.operation)}, allowed: ${HEAD_OPERATIONS.join(", ")}`);
    }
    if (["linear", "layer_norm"].includes(step.operation) && !prompt.head.has(`${step.name}.weight`)) {
      const there = [...prompt.head.keys()].join(", ") || "none";
      throw new FormatError(`the head needs tensor head.${step.name}.weight; there: ${there}`);
    }
  }
}

/** Refuse a package that a prompt was not made for; with `sizesAlone`, one whose sizes do not fit. */
export function checkBase(prompt: PromptFile, manifest: Manifest, sizesAlone = false): void {
  const { base, geometry: size } = manifest;
  if (!sizesAlone) {
    const apart = difference(prompt.base.fingerprint, base.fingerprint);
    if (apart) {
      throw new BaseMismatchError(
        `prompt ${repr(prompt.name)} was made for base ${repr(prompt.base.name)} (${brief(prompt.base.fingerprint)}), the ` +
          `package holds ${repr(base.name)} (${brief(base.fingerprint)}); ${apart}; tune it for this base`,
      );
    }
    const theirs = manifest.tokenizerFingerprint;
    if (prompt.tokenizerFingerprint && theirs && prompt.tokenizerFingerprint !== theirs) {
      throw new BaseMismatchError(
        `prompt ${repr(prompt.name)} was made with tokenizer ${prompt.tokenizerFingerprint}, the package holds ${theirs}`,
      );
    }
  }
  const prefix = [2, size.numKeyValueHeads, prompt.numVirtualTokens, size.headSize];
  const expected: [string, Tensor | null, number[]][] = [
    [names.PROMPT_EMBEDDINGS, prompt.promptEmbeddings, [prompt.numVirtualTokens, size.embeddingSize || size.hiddenSize]],
    [names.PAST_KEY_VALUES, prompt.pastKeyValues, [size.numLayers, ...prefix]],
    [names.ENCODER_PAST, prompt.encoderPastKeyValues, [size.numEncoderLayers, ...prefix]],
  ];
  for (const [name, tensor, shape] of expected) {
    if (tensor && tensor.shape.join() !== shape.join()) {
      throw new BaseMismatchError(
        `prompt ${repr(prompt.name)}: ${name} is [${tensor.shape.join(", ")}], ${base.name} needs [${shape.join(", ")}]`,
      );
    }
  }
}
