/** ONNX Runtime, onnxruntime-node's or onnxruntime-web's: sessions and tensors. */

import { fromHalf, toHalf } from "./bytes.ts";
import { EdgePromptError, PackageError, RequestCancelledError } from "./errors.ts";
import type { Matrix } from "./heads.ts";

/** What is used of the onnxruntime module. */
export interface Ort {
  Tensor: new (type: string, data: any, dims: readonly number[]) => OrtTensor;
  InferenceSession: { create(model: any, options: any): Promise<OrtSession> };
  env: any;
}

export interface OrtTensor {
  readonly type: string;
  readonly data: any;
  readonly dims: readonly number[];
  dispose?(): void;
}

interface Metadata {
  name: string;
  type?: string;
  shape?: readonly (number | string)[];
}

interface OrtSession {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata?: readonly Metadata[];
  readonly outputMetadata?: readonly Metadata[];
  run(feeds: Record<string, OrtTensor>, fetches: readonly string[]): Promise<Record<string, OrtTensor>>;
  release(): Promise<void>;
}

/** Fusions that the Python runtime switches off, so that both compute the same: int8 makes their rounding visible. */
export const WITHOUT_FUSIONS = {
  optimization: { disable_specified_optimizers: "SkipLayerNormFusion;BiasGeluFusion" },
};

export type Dtype = "float32" | "float16";
type Float16 = new (source: ArrayBufferLike | ArrayLike<number>) => ArrayLike<number>;
const FLOAT16 = (globalThis as { Float16Array?: Float16 }).Float16Array;

/** One open graph. Runs follow one another, whoever asks. */
export class Graph {
  readonly inputs: ReadonlySet<string>;
  readonly outputs: ReadonlySet<string>;
  private tail: Promise<unknown> = Promise.resolve();
  private closed = false;

  constructor(
    readonly ort: Ort,
    private readonly session: OrtSession,
    private readonly file: string,
  ) {
    this.inputs = new Set(session.inputNames);
    this.outputs = new Set(session.outputNames);
  }

  /** An input's or output's dimensions where they are known; a name stands for a free one. */
  shape(name: string): readonly (number | string)[] | null {
    const all = [...(this.session.inputMetadata ?? []), ...(this.session.outputMetadata ?? [])];
    return all.find((one) => one.name === name)?.shape ?? null;
  }

  run(feeds: Record<string, OrtTensor>, fetches: readonly string[]): Promise<Record<string, OrtTensor>> {
    const known = Object.fromEntries(Object.entries(feeds).filter(([name]) => this.inputs.has(name)));
    const turn = this.tail.then(async () => {
      if (this.closed) throw new RequestCancelledError("the runtime was closed before the request finished");
      try {
        return await this.session.run(known, fetches);
      } catch (error) {
        throw new EdgePromptError(`ONNX Runtime failed on ${this.file}: ${firstLine(error)}`, { cause: error });
      }
    });
    this.tail = turn.catch(() => undefined);
    return turn;
  }

  async close(): Promise<void> {
    this.closed = true;
    await this.tail;
    await this.session.release();
  }

  ints(values: readonly number[], dims: readonly number[]): OrtTensor {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  }

  floats(values: Float32Array, dims: readonly number[], dtype: Dtype = "float32"): OrtTensor {
    if (dtype === "float32") return new this.ort.Tensor("float32", values, dims);
    return new this.ort.Tensor("float16", FLOAT16 ? new FLOAT16(values) : toHalf(values), dims);
  }
}

/** A tensor's values in float32. */
export function floatsOf(tensor: OrtTensor): Float32Array {
  const { data } = tensor;
  if (data instanceof Float32Array) return data;
  return data instanceof Uint16Array ? fromHalf(data) : Float32Array.from(data as ArrayLike<number>);
}

/** A tensor's last two dimensions (of a batch of one) as a matrix. */
export function matrixOf(tensor: OrtTensor): Matrix {
  return { data: floatsOf(tensor), width: tensor.dims.at(-1)! };
}

/** The first `length` positions of keys or values `[batch, heads, positions, size]`. */
export function firstPositions(graph: Graph, tensor: OrtTensor, length: number): OrtTensor {
  const [batch, heads, positions, size] = tensor.dims as [number, number, number, number];
  if (positions === length) return tensor;
  const data = tensor.data as Float32Array;
  const found = new (data.constructor as Float32ArrayConstructor)(batch * heads * length * size);
  for (let head = 0; head < batch * heads; head++) {
    found.set(data.subarray(head * positions * size, (head * positions + length) * size), head * length * size);
  }
  return new graph.ort.Tensor(tensor.type, found, [batch, heads, length, size]);
}

/** Sequences of a tensor `[batch, ...]`, by their numbers. */
export function pickSequences(graph: Graph, tensor: OrtTensor, sequences: readonly number[]): OrtTensor {
  const [batch, ...dims] = tensor.dims as [number, ...number[]];
  const data = tensor.data as Float32Array;
  const size = data.length / batch;
  const found = new (data.constructor as Float32ArrayConstructor)(sequences.length * size);
  sequences.forEach((from, to) => found.set(data.subarray(from * size, (from + 1) * size), to * size));
  return new graph.ort.Tensor(tensor.type, found, [sequences.length, ...dims]);
}

/** The same of several tensors by name. */
export const pickAll = (graph: Graph, tensors: Record<string, OrtTensor>, sequences: readonly number[]): Record<string, OrtTensor> =>
  Object.fromEntries(Object.entries(tensors).map(([name, one]) => [name, pickSequences(graph, one, sequences)]));

/** Logits behind the last position of every sequence. */
export function lastLogits(tensor: OrtTensor): Float32Array[] {
  const [batch, positions, vocab] = tensor.dims as [number, number, number];
  const all = floatsOf(tensor);
  return Array.from({ length: batch }, (_, i) => all.subarray(((i + 1) * positions - 1) * vocab, (i + 1) * positions * vocab));
}

export const firstLine = (error: unknown): string => String((error as Error)?.message ?? error).split("\n")[0]!;

/** Open a graph; what ONNX Runtime says is the package's fault. */
export async function openGraph(ort: Ort, file: string, model: string | Uint8Array, options: any): Promise<Graph> {
  try {
    return new Graph(ort, await ort.InferenceSession.create(model, options), file);
  } catch (error) {
    throw new PackageError(`cannot load graph ${file}: ${firstLine(error)}`, { cause: error });
  }
}
