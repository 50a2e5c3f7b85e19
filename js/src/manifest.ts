/** The manifest of a package, `edgeprompt.json`: strict, versioned, and all that the runtime needs to know. */

import { sha256 } from "./bytes.ts";
import { PackageError } from "./errors.ts";
import { FormatError, canonicalJson, check, checkKeys, given, numeric, parseJson, plain, repr, type Fields } from "./json.ts";
import * as names from "./names.ts";

const FORMAT = "edgeprompt-package";
const VERSION = 1;
export const MAX_MANIFEST_BYTES = 4 << 20;

/** Sizes that a prompt must fit; counts. `maxPositions` 0: no limit is known. */
export interface Geometry {
  vocabSize: number;
  hiddenSize: number;
  numLayers: number;
  numAttentionHeads: number;
  numKeyValueHeads: number;
  headSize: number;
  maxPositions: number;
  numEncoderLayers: number;
  positionOffset: number;
  embeddingSize: number;
}

/** Special token ids; null where the base has none. */
export interface Tokens {
  bos: number | null;
  eos: number[];
  pad: number | null;
  mask: number | null;
  decoderStart: number | null;
  forcedBos: number | null;
  forcedEos: number | null;
}

/** One ONNX graph and its external data: file name -> SHA-256. */
export interface GraphFile {
  file: string;
  sha256: string;
  data: Record<string, string>;
}

export interface Base {
  name: string;
  fingerprint: string;
}

/** What a package is. `graphs` is keyed "model", or "encoder" and "decoder". */
export interface Manifest {
  architecture: (typeof names.ARCHITECTURES)[number];
  modelType: string;
  base: Base;
  geometry: Geometry;
  tokens: Tokens;
  precision: string;
  route: string;
  graphs: Record<string, GraphFile>;
  tokenizerFingerprint: string | null;
  tokenizerSha256: string | null;
  kvDtype: "float32" | "float16";
  pooling: string;
  prompts: string[];
  /** One hash over all weights: what a prompt tuned for a package names. */
  weightsHash: string;
  extra: Record<string, any>;
  /** What the base's generation_config says of every answer, under transformers' names. */
  generation: Record<string, any>;
  /** "web": operators that are fast in browsers. */
  target: string;
  /** How near the package is to its base. */
  quality: Record<string, any>;
}

export const MANIFEST_REQUIRED = "architecture model_type base geometry tokens precision route graphs".split(" ");
export const MANIFEST_OPTIONAL =
  "tokenizer_fingerprint tokenizer_sha256 prompt_input door kv_dtype pooling kv_in_place pads_right batched_prefill prompts validation versions extra generation"
    .split(" ")
    .concat("quality", "quality_gate", "target");
const GEOMETRY = "vocab_size hidden_size num_layers num_attention_heads num_key_value_heads head_size".split(" ");
const GEOMETRY_MORE = "max_positions num_encoder_layers position_offset embedding_size".split(" ");
const GENERATION_COUNTS = ["no_repeat_ngram_size", "min_length", "min_new_tokens", "forced_bos_token_id"];
const GENERATION_LISTS = ["suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"];
export const GENERATION_FIELDS = ["repetition_penalty", "bad_words_ids", ...GENERATION_COUNTS, ...GENERATION_LISTS];
const TOKENS = "bos eos pad mask decoder_start forced_bos forced_eos".split(" ");
/** snake_case to camelCase. */
const camel = (name: string): string => name.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase());

/** Read and check the manifest's text. */
export async function parseManifest(text: string | Uint8Array): Promise<Manifest> {
  try {
    return await read(text);
  } catch (error) {
    if (error instanceof FormatError) throw new PackageError(`bad ${names.MANIFEST}: ${error.message}`);
    throw error;
  }
}

async function read(text: string | Uint8Array): Promise<Manifest> {
  const data = check<Fields>(parseJson(text), "dict", "the manifest");
  if (data["format"] !== FORMAT) throw new FormatError(`"format" is not ${repr(FORMAT)}`);
  if (data["version"] !== VERSION) {
    throw new FormatError(
      `contract version ${repr(data["version"])}, this edgeprompt reads ${VERSION}; export the base again`,
    );
  }
  delete data["format"];
  delete data["version"];
  checkKeys(data, "the manifest", MANIFEST_REQUIRED, MANIFEST_OPTIONAL);
  const geometry = readGeometry(data["geometry"]);
  const graphs = readGraphs(data["graphs"]);
  const choice = (name: string, allowed: readonly string[], fallback: string): string => {
    const value = given(data, name, fallback);
    if (!allowed.includes(value as string)) {
      throw new FormatError(`${name} is ${repr(value)}, allowed: ${allowed.join(", ")}`);
    }
    return value as string;
  };
  const architecture = choice("architecture", names.ARCHITECTURES, "") as Manifest["architecture"];
  const manifest: Manifest = {
    architecture,
    modelType: check<string>(data["model_type"], "str", "base and model_type"),
    base: readBase(data["base"], "base", "base and model_type"),
    geometry,
    tokens: readTokens(data["tokens"], architecture === "decoder-only" ? Infinity : geometry.vocabSize),
    precision: choice("precision", names.PRECISIONS, ""),
    route: choice("route", names.ROUTES, ""),
    graphs,
    tokenizerFingerprint: optionalText(data, "tokenizer_fingerprint"),
    tokenizerSha256: typeof data["tokenizer_sha256"] === "string" ? data["tokenizer_sha256"] : null,
    kvDtype: choice("kv_dtype", ["float32", "float16"], "float32") as Manifest["kvDtype"],
    pooling: choice("pooling", ["mean", "cls", "last"], "mean"),
    prompts: readPrompts(given(data, "prompts", [])),
    weightsHash: "",
    extra: plain(given(data, "extra", {})),
    generation: checkGeneration(given(data, "generation", {})),
    target: choice("target", ["native", "web"], "native"),
    quality: plain(given(data, "quality", {})),
  };
  if ("door" in data) choice("door", ["input", "adapter"], "input");
  else choice("prompt_input", ["required", "optional"], "required");
  const needed = architecture === "encoder-decoder" ? ["decoder", "encoder"] : ["model"];
  const found = Object.keys(graphs).sort();
  if (found.join() !== needed.join()) throw new FormatError(`graphs are ${repr(found)}, needed: ${repr(needed)}`);
  for (const name of ["kv_in_place", "pads_right", "batched_prefill"]) {
    if (name in data) check(data[name], "bool", name);
  }
  if ("quality_gate" in data && data.quality_gate !== null) choice("quality_gate", ["passed", "allowed"], "passed");
  for (const name of ["validation", "quality", "versions", "extra"]) {
    if (name in data) check(data[name], "dict", name);
  }
  const weights = Object.fromEntries(
    Object.entries(graphs).map(([key, graph]) => [key, Object.keys(graph.data).length ? graph.data : graph.sha256]),
  );
  manifest.weightsHash = `sha256:${await sha256(new TextEncoder().encode(canonicalJson(weights)))}`;
  return manifest;
}

function readGeometry(data: unknown): Geometry {
  const found = checkKeys(data, "geometry", GEOMETRY, GEOMETRY_MORE);
  const values: Record<string, number> = {};
  for (const name of [...GEOMETRY, ...GEOMETRY_MORE]) {
    const value = check<number>(given(found, name, 0), "int", `geometry.${name}`);
    if (!(value >= 0 && value < 2 ** 31)) throw new FormatError(`geometry.${name} is ${value}`);
    values[camel(name)] = value;
  }
  return values as unknown as Geometry;
}

/** `size`: of the vocabulary, where a graph reads special tokens: one beyond it would be a row of a prompt. */
function readTokens(data: unknown, size: number): Tokens {
  const found = checkKeys(data, "tokens", [], TOKENS);
  const id = (value: unknown, name: string): number => {
    const token = check<number>(value, "int", `tokens.${name}`);
    if (token < 0 || (token >= size && name !== "eos")) throw new FormatError(`tokens.${name} is ${token}`);
    return token;
  };
  const values: Record<string, number | number[] | null> = {};
  for (const name of TOKENS) {
    const value = found[name];
    if (name === "eos") values["eos"] = check<unknown[]>(given(found, name, []), "list", "tokens.eos").map((one) => id(one, name));
    else values[camel(name)] = value === undefined || value === null ? null : id(value, name);
  }
  return values as unknown as Tokens;
}

export function checkGeneration(data: unknown): Record<string, any> {
  const found = check<Fields>(data, "dict", "generation");
  for (const [name, value] of Object.entries(found)) {
    const where = `generation.${name}`;
    const counts = (one: unknown): number => {
      const number = check<number>(one, "int", where);
      if (number < 0) throw new FormatError(`${where} has ${number}, it must be at least 0`);
      return number;
    };
    const list = (one: unknown): number[] => check<unknown[]>(one, "list", where).map(counts);
    if (name === "repetition_penalty") {
      if (numeric(value, where) <= 0) throw new FormatError(`${where} is ${repr(value)}, it must be more than 0`);
    } else if (GENERATION_COUNTS.includes(name)) counts(value);
    else if (GENERATION_LISTS.includes(name)) list(value);
    else if (name === "bad_words_ids") {
      for (const one of check<unknown[]>(value, "list", where)) {
        if (!list(one).length) throw new FormatError(`${where} has an empty list`);
      }
    } else if (name === "length_penalty") numeric(value, where);
    else if (name === "early_stopping") {
      if (typeof value !== "boolean" && value !== "never") {
        throw new FormatError(`${where} is ${repr(value)}, it must be true, false or 'never'`);
      }
    } else throw new FormatError(`generation has unknown key ${repr(name)}`);
  }
  return plain(found);
}

function readGraphs(data: unknown): Record<string, GraphFile> {
  const graphs: Record<string, GraphFile> = {};
  for (const [key, value] of Object.entries(check<Fields>(data, "dict", "graphs"))) {
    const found = checkKeys(value, `graphs.${key}`, ["file", "sha256"], ["data"]);
    const hashes = check<Fields>(given(found, "data", {}), "dict", "a graph's data");
    for (const hash of [found["sha256"], ...Object.values(hashes)]) check(hash, "str", "a graph's hash");
    for (const file of [found["file"], ...Object.keys(hashes)]) checkInside(file);
    graphs[key] = {
      file: found["file"] as string,
      sha256: found["sha256"] as string,
      data: { ...hashes } as Record<string, string>,
    };
  }
  return graphs;
}

export function readBase(data: unknown, where: string, what?: string): Base {
  const found = checkKeys(data, where, ["name", "fingerprint"]);
  return {
    name: check<string>(found["name"], "str", what ?? `${where}.name`),
    fingerprint: check<string>(found["fingerprint"], "str", what ?? `${where}.fingerprint`),
  };
}

function readPrompts(data: unknown): string[] {
  return check<unknown[]>(data, "list", "prompts").map(checkInside);
}

function checkInside(file: unknown): string {
  const name = check<string>(file, "str", "a file name");
  if (!name || name.startsWith("/") || name.includes("\\") || name.split("/").includes("..")) {
    throw new FormatError(`file ${repr(name)} points out of the package`);
  }
  return name;
}

function optionalText(data: Fields, name: string): string | null {
  return check<string | null>(given(data, name, null), ["str", "null"], name);
}
