// Runs what a test asks, from JSON on stdin, and prints the results as JSON: the tests compare them with Python's.
import { readFileSync } from "node:fs";
import { fingerprintDifference, load, parseManifest, parsePrompt, Tokenizer } from "../dist/index.js";

const asked = JSON.parse(readFileSync(0, "utf8"));

const plain = (value) =>
  value instanceof Error
    ? { error: value.name, message: value.message }
    : value instanceof Float32Array
      ? [...value]
      : value;

async function attempt(action) {
  try {
    return { value: plain(await action()) };
  } catch (error) {
    return { error: error.name, message: error.message };
  }
}

async function call(runtime, { method, args = [], abortAfter, ...rest }) {
  if (rest.prompt) return attempt(() => runtime.addPrompt(rest.prompt, rest.options));
  const options = args.at(-1);
  if (abortAfter !== undefined) {
    const controller = new AbortController();
    options.signal = controller.signal;
    const started = performance.now();
    setTimeout(() => controller.abort(), abortAfter);
    const found = await attempt(() => runtime[method](...args));
    return { ...found, seconds: (performance.now() - started) / 1000 };
  }
  if (method === "stream") {
    return attempt(async () => {
      const pieces = [];
      for await (const piece of runtime.stream(...args)) pieces.push(piece);
      return pieces;
    });
  }
  return attempt(async () => {
    const found = await runtime[method](...args);
    return Array.isArray(found) ? found.map(plain) : found;
  });
}

async function serve({ package: source, options = {}, calls }) {
  const opened = await attempt(() => load(source, { threads: 1, worker: false, ...options }));
  if (opened.error) return [opened];
  const runtime = opened.value;
  const found = [];
  for (const one of calls) found.push(await call(runtime, one));
  await runtime.close();
  return found;
}

/** How many texts a tokenizer encodes and decodes otherwise than Python's. */
function compareTokenizer(file) {
  const { tokenizer: data, cases, pairs, codes } = JSON.parse(readFileSync(file, "utf8"));
  const tokenizer = new Tokenizer(data);
  const wrong = [];
  const same = (kind, text, expected, found) => {
    if (expected.toString() !== found.toString()) wrong.push({ kind, text, expected, found });
  };
  for (const [text, ids, offsets, bare, decoded, whole] of cases) {
    const found = tokenizer.encodeWithOffsets(text);
    same("ids", text, ids, found.ids);
    same("offsets", text, offsets, found.offsets.flat());
    same("bare", text, bare, tokenizer.encode(text, false));
    same("decode", text, decoded, tokenizer.decode(bare));
    same("decode all", text, whole, tokenizer.decode(ids, false));
  }
  for (const [first, second, ids, offsets, types, sequences] of pairs) {
    const found = tokenizer.encodePair(first, second);
    same("pair", [first, second], [ids, offsets, types, sequences.map(String)],
      [found.ids, found.offsets.flat(), found.typeIds, found.sequences.map(String)]);
  }
  for (const [code, ids] of codes) {
    same("code", code, ids, tokenizer.encode(`a${String.fromCodePoint(code)}b`, false));
  }
  return { texts: cases.length, codes: codes.length, wrong: wrong.length, first: wrong.slice(0, 3) };
}

const ways = {
  serve,
  tokenizers: ({ files }) => files.map(compareTokenizer),
  prompts: ({ files }) => Promise.all(files.map((file) => attempt(() => parsePrompt(readFileSync(file)).name))),
  fingerprints: ({ pairs }) => pairs.map(([one, other]) => fingerprintDifference(one, other)),
  manifests: ({ files }) =>
    Promise.all(files.map((file) => attempt(async () => (await parseManifest(readFileSync(file))).weightsHash))),
};
process.stdout.write(`${JSON.stringify(await ways[asked.way](asked))}\n`, () => process.exit(0));
