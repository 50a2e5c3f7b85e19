/** Golden examples: does a prompt answer here as it did where it was made? */

import { InputError, unpackError } from "./errors.ts";
import { repr } from "./json.ts";
import type { Golden } from "./prompt.ts";
import type { GoldenCheck, Request, Result } from "./results.ts";
import type { Service } from "./service.ts";

/** Ask a prompt its golden example, and compare. */
export async function checkGolden(service: Service, name: string): Promise<GoldenCheck> {
  const prompt = service.prompt(name);
  const { golden } = prompt;
  if (!golden) throw new InputError(`prompt ${repr(name)} holds no golden example; tune stores one`);
  if (prompt.task === "generate") return generated(service, name, golden);
  const result = await only(service, { text: golden.fields, prompt: name });
  let label: string;
  let logits: Record<string, number> = {};
  if ("words" in result) label = result.words[0]?.label ?? "";
  else if ("scores" in result) ({ label, logits } = result);
  else if ("text" in result) label = result.text;
  else throw new InputError(`prompt ${repr(name)} is for ${repr(prompt.task)}, which gives nothing to compare`);
  const shared = Object.entries(golden.logits).filter(([key]) => Object.hasOwn(logits, key));
  const largest = shared.length ? Math.max(...shared.map(([key, value]) => Math.abs(value - logits[key]!))) : null;
  if (golden.label !== null) {
    return { passed: label === golden.label, expected: golden.label, found: label, maxLogitDifference: largest };
  }
  if (largest === null) throw new InputError(`the golden example of prompt ${repr(name)} names neither a label nor tokens`);
  const values = Object.values(golden.logits);
  const show = (numbers: number[]): string => numbers.map((one) => String(Number(one.toPrecision(6)))).join(", ");
  return {
    passed: largest <= 0.1 * Math.max(1, ...values.map(Math.abs)),
    expected: show(values),
    found: show(Object.keys(golden.logits).map((key) => logits[key]!)),
    maxLogitDifference: largest,
  };
}

async function generated(service: Service, name: string, golden: Golden): Promise<GoldenCheck> {
  const expected = golden.tokenIds;
  if (!expected.length) throw new InputError(`the golden example of prompt ${repr(name)} names neither a label nor tokens`);
  const options = { maxNewTokens: expected.length, temperature: 0 };
  const answer = await only(service, { text: golden.fields, prompt: name, task: "generate", options });
  const found = "tokenIds" in answer ? answer.tokenIds.slice(0, expected.length) : [];
  const keys = Object.keys(golden.logits);
  const logits = keys.length ? await service.logits({ text: golden.fields, prompt: name }) : new Float32Array();
  const beyond = keys.find((key) => Number(key) >= logits.length);
  if (beyond !== undefined) {
    throw new InputError(`the golden example of prompt ${repr(name)} names token ${beyond}; the base has ${logits.length}`);
  }
  const differences = keys.map((key) => Math.abs(golden.logits[key]! - logits[Number(key)]!));
  return {
    passed: found.join() === expected.join(),
    expected,
    found,
    maxLogitDifference: differences.length ? Math.max(...differences) : null,
  };
}

async function only(service: Service, request: Request): Promise<Exclude<Result, Float32Array>> {
  const [outcome] = await service.run([request]);
  if ("error" in outcome!) throw unpackError(outcome.error);
  return outcome!.result as Exclude<Result, Float32Array>;
}
