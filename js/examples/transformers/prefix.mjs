// A prompt of `edgeprompt convert --to kv` as transformers.js takes it: a cache that a request continues from.
import { DynamicCache, Tensor } from "@huggingface/transformers";

/** `bytes`: the file as an ArrayBuffer. A request changes its cache: call this for each request. */
export function prefixOf(bytes) {
  const size = Number(new DataView(bytes).getBigUint64(0, true));
  const { __metadata__, ...tensors } = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, size)));
  const read = ({ dtype, shape, data_offsets: [a, b] }) => {
    const data = bytes.slice(8 + size + a, 8 + size + b);
    return new Tensor("float32", dtype === "F32" ? new Float32Array(data) : Float32Array.from(new Uint16Array(data), widen), shape);
  };
  return new DynamicCache(Object.fromEntries(Object.entries(tensors).map(([name, one]) => [name, read(one)])));
}

/** A number in half precision (finite), as files of `--kv-dtype float16` have them. */
function widen(half) {
  const exponent = (half >> 10) & 31;
  const size = exponent ? (1 + (half & 1023) / 1024) * 2 ** (exponent - 15) : (half & 1023) * 2 ** -24;
  return half & 0x8000 ? -size : size;
}

/** What `model.generate` needs to answer a text's ids behind a prefix. */
export function inputsBehind(prefix, ids) {
  const total = ids.length + prefix.get_seq_length();
  return {
    input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
    past_key_values: prefix,
  };
}
