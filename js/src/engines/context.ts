/** What a request carries through an engine: when to stop, and where pieces of text go. */

import { RequestCancelledError, RequestTimeoutError } from "../errors.ts";
import type { Step, Strategy } from "../decoding/strategies.ts";
import { Clock, type Request } from "../results.ts";

export interface CallOptions {
  signal?: AbortSignal | undefined;
  onText?: ((piece: string) => void) | undefined;
}

export class Context {
  readonly clock = new Clock();

  constructor(
    private readonly request: Request,
    private readonly options: CallOptions,
  ) {}

  get onText(): ((piece: string) => void) | undefined {
    return this.options.onText;
  }

  /** Called between steps. */
  check(): void {
    if (this.options.signal?.aborted) throw new RequestCancelledError("the request was cancelled");
    const { timeout } = this.request;
    if (timeout !== undefined && this.clock.elapsed > timeout) {
      throw new RequestTimeoutError(`the request was not answered within ${timeout} s`);
    }
  }
}

/** Logits behind the last token, and what the next step continues from. */
export interface Reached<S> {
  logits: Float32Array;
  state: S;
}

/** Let a strategy go on from the logits behind the text until it is done. */
export async function decode<S, T>(
  strategy: Strategy<T>,
  reached: Reached<S>,
  step: (token: number, state: S) => Promise<Reached<S>>,
  context: Context,
): Promise<T> {
  // States by depth. A strategy that goes back says so by its depth; others leave one state alive.
  const states: S[] = [reached.state];
  for (let next: Step | null; (next = strategy.advance(reached.logits)); ) {
    context.check();
    // A turn of the event loop, so that an abort posted meanwhile is seen before the next step.
    await new Promise<void>((done) => pause(done));
    context.check();
    reached = await step(next.token, states[next.depth]!);
    if (strategy.goesBack !== true) delete states[next.depth];
    states[next.depth + 1] = reached.state;
  }
  return strategy.result();
}

const channel = typeof MessageChannel === "undefined" ? null : new MessageChannel();
const waiting: (() => void)[] = [];
if (channel) {
  channel.port1.onmessage = () => waiting.shift()?.();
  (channel.port1 as { unref?: () => void }).unref?.();
}

/** Call back in a later turn of the event loop, without the delay of nested timers. */
function pause(done: () => void): void {
  if (typeof setImmediate === "function") setImmediate(done);
  else if (channel) {
    waiting.push(done);
    channel.port2.postMessage(0);
  } else setTimeout(done);
}
