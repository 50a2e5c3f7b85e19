/** edgeprompt for Node.js. */

import { Worker } from "node:worker_threads";
import { fileURLToPath } from "node:url";
import { PackageError } from "./errors.ts";
import { WorkerHost, type Channel, type Host } from "./host.ts";
import { LocalHost } from "./local.ts";
import { nodePlatform } from "./platform/node.ts";
import { Runtime, checkSource, checkWorker, type LoadOptions } from "./runtime.ts";
import { here } from "./platform/here.ts";

/**
 * Open a package.
 * @param source Its folder, or a file: URL.
 */
export async function load(source: string | URL, options: LoadOptions = {}): Promise<Runtime> {
  checkSource(source, "folder");
  if (/^https?:/.test(String(source))) throw new PackageError(`${String(source)} is a URL; Node.js reads packages from folders, so download it first`);
  const folder = source instanceof URL ? fileURLToPath(source) : source;
  return Runtime.open(() => makeHost(checkWorker(options.worker)), folder, options);
}

function makeHost(worker: boolean | object): Host {
  if (worker === false) return new LocalHost(nodePlatform);
  const thread = worker === true ? new Worker(new URL("./worker.js", here())) : (worker as Worker);
  thread.unref();
  return new WorkerHost(channelTo(thread));
}

/** While questions are open the thread keeps the process alive; else it does not. */
function channelTo(thread: Worker): Channel {
  let open = 0;
  let ending = false;
  return {
    post: (message) => {
      thread.postMessage(message);
      if ((message as { method?: string }).method && open++ === 0) thread.ref();
    },
    listen: (onMessage, onFailure) => {
      thread.on("message", (message: { text?: string; progress?: unknown }) => {
        if (message.text === undefined && !message.progress && --open === 0 && !ending) thread.unref();
        onMessage(message);
      });
      thread.on("error", onFailure);
      thread.on("exit", (code) => onFailure(new Error(`it ended with code ${code}`)));
    },
    end: async () => {
      ending = true; // an answer that comes late must not let the process end before the thread has
      await thread.terminate();
    },
  };
}

export * from "./public.ts";
export * from "./formats.ts";
