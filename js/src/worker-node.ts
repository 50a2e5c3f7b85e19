/** `edgeprompt/worker` of Node.js: serves one package to the thread that started it. */

import { parentPort } from "node:worker_threads";
import { serveChannel } from "./local.ts";
import { nodePlatform } from "./platform/node.ts";

if (!parentPort) throw new Error("edgeprompt/worker is for a worker thread; load() starts one");
const port = parentPort;
serveChannel(
  {
    post: (message) => port.postMessage(message),
    listen: (onMessage) => port.on("message", onMessage),
    end: () => Promise.resolve(),
  },
  nodePlatform,
);
