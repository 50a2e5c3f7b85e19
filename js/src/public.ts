/** Public names of every entry. */
export * from "./errors.ts";
export { Runtime, type AskOptions, type GenerateOptions, type LoadOptions, type PromptSource } from "./runtime.ts";
export type { GenerationOptions } from "./decoding/sampling.ts";
export type { Answer, Classification, Generation, GoldenCheck, Request, Result, Span, Tagging, Task, Timings } from "./results.ts";
export type { Progress } from "./service.ts";
export type { Manifest } from "./manifest.ts";
export type { PromptFile } from "./prompt.ts";
export type { Text } from "./template.ts";
