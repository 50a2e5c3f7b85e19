/** Public names of every entry. */
export * from "./errors.ts";
export { Runtime, type AskOptions, type GenerateOptions, type LoadOptions, type PromptSource } from "./runtime.ts";
export type { GenerationOptions } from "./decoding/sampling.ts";
export type { Answer, Classification, Generation, GoldenCheck, Request, Result, Span, Tagging, Task, Timings } from "./results.ts";
export type { Progress } from "./service.ts";
export type { Manifest } from "./manifest.ts";
export type { Text } from "./template.ts";
export { Template } from "./template.ts";
export { Tokenizer, type Encoding } from "./tokenizer/tokenizer.ts";
export { difference as fingerprintDifference } from "./fingerprint.ts";
export { parseManifest } from "./manifest.ts";
export { parsePrompt, type PromptFile } from "./prompt.ts";
