// An ES module: node esm.mjs MODEL
import { load } from "edgeprompt";

const runtime = await load(process.argv[2]);
console.log(JSON.stringify((await runtime.generate("a", { maxNewTokens: 5 })).tokenIds));
await runtime.close();
