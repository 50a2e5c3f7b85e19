// CommonJS: node commonjs.cjs MODEL
const { load } = require("edgeprompt");

(async () => {
  const runtime = await load(process.argv[2]);
  console.log(JSON.stringify((await runtime.generate("a", { maxNewTokens: 5 })).tokenIds));
  await runtime.close();
})();
