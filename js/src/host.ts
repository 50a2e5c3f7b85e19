/** The way from a runtime to its service: in a worker, by messages. */

import { EdgePromptError, InputError, RequestCancelledError, unpackError, type PlainError } from "./errors.ts";
import type { Progress } from "./service.ts";

/** Methods of the service that a runtime may call. */
export type Method = "open" | "addPrompt" | "removePrompt" | "promptNames" | "run" | "stream" | "logits" | "embed" | "check" | "calibration" | "close";

export interface AskOptions {
  signal?: AbortSignal | undefined;
  onText?: ((piece: string) => void) | undefined;
  onProgress?: ((progress: Progress) => void) | undefined;
}

export interface Host {
  ask(method: Method, args: unknown[], options?: AskOptions): Promise<any>;
  /** Free what the host itself holds. */
  end(): Promise<void>;
}

/** One end of a channel: a Worker, a parent, or a port of either kind. */
export interface Channel {
  post(message: unknown): void;
  listen(onMessage: (message: any) => void, onFailure: (error: Error) => void): void;
  end(): Promise<void>;
}

interface Pending {
  resolve(value: unknown): void;
  reject(error: Error): void;
  options: AskOptions;
  unlisten(): void;
}

/** Asks a service in another thread. */
export class WorkerHost implements Host {
  private next = 0;
  private readonly pending = new Map<number, Pending>();
  private failure: Error | null = null;

  constructor(private readonly channel: Channel) {
    channel.listen(
      (message) => this.receive(message),
      (error) => this.fail(new EdgePromptError(`the worker failed: ${error.message}`)),
    );
  }

  ask(method: Method, args: unknown[], options: AskOptions = {}): Promise<any> {
    if (this.failure) return Promise.reject(this.failure);
    const id = this.next++;
    return new Promise((resolve, reject) => {
      const abort = (): void => this.channel.post({ id, abort: true });
      if (options.signal?.aborted) {
        reject(new RequestCancelledError("the request was cancelled"));
        return;
      }
      options.signal?.addEventListener("abort", abort, { once: true });
      const unlisten = (): void => options.signal?.removeEventListener("abort", abort);
      this.pending.set(id, { resolve, reject, options, unlisten });
      try {
        this.channel.post({ id, method, args, wantsText: !!options.onText });
      } catch (error) {
        this.settle(id)?.reject(new InputError(`${(error as Error).message} Give texts, numbers and plain objects.`));
      }
    });
  }

  async end(): Promise<void> {
    this.fail(new RequestCancelledError("the runtime was closed before the request finished"));
    await this.channel.end();
  }

  private receive(message: { id: number; value?: unknown; error?: PlainError; text?: string; progress?: Progress }): void {
    const pending = this.pending.get(message.id);
    if (!pending) return;
    if (message.text !== undefined) pending.options.onText?.(message.text);
    else if (message.progress) pending.options.onProgress?.(message.progress);
    else if (message.error) this.settle(message.id)!.reject(unpackError(message.error));
    else this.settle(message.id)!.resolve(message.value);
  }

  /** A question that has its answer. */
  private settle(id: number): Pending | undefined {
    const pending = this.pending.get(id);
    this.pending.delete(id);
    pending?.unlisten();
    return pending;
  }

  private fail(error: Error): void {
    this.failure ??= error; // a worker that was ended may say so afterwards
    for (const pending of this.pending.values()) {
      pending.unlisten();
      pending.reject(error);
    }
    this.pending.clear();
  }
}
