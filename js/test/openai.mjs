// What OpenAI's npm package gets from the server at the URL given, as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const chat = { model: "story", messages: [{ role: "user", content: "the film" }], max_completion_tokens: 6 };
const completion = { model: "story", prompt: "a long story", max_tokens: 6 };

const models = [];
for await (const model of client.models.list()) models.push(model.id);
const whole = await client.completions.create({ ...completion, logprobs: 2 });
let pieces = "";
for await (const chunk of await client.completions.create({ ...completion, stream: true })) pieces += chunk.choices[0].text;
const said = await client.chat.completions.create(chat);
const runner = client.chat.completions.stream({ ...chat, stream_options: { include_usage: true } });
const streamed = await runner.finalChatCompletion();
const vectors = await client.embeddings.create({ model: models[0], input: ["the film", "never again"] });

const stopped = await client.chat.completions.create({ ...chat, max_completion_tokens: 200, stream: true });
let chunks = 0;
for await (const _ of stopped) if (++chunks === 3) break; // closes the connection

let refused;
try {
  await client.completions.create({ ...completion, model: "nothing" });
} catch (error) {
  refused = { name: error.constructor.name, status: error.status, code: error.code };
}
console.log(
  JSON.stringify({
    models,
    completion: whole.choices[0].text,
    tokens: whole.choices[0].logprobs.tokens.length,
    pieces,
    chat: said.choices[0].message.content,
    streamed: streamed.choices[0].message.content,
    usage: streamed.usage,
    vectors: vectors.data.map((one) => one.embedding),
    chunks,
    refused,
  }),
);
