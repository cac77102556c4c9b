// Asks a server by the openai package: reads {url, key, requests: [[how, body]]} from stdin, prints a list of results.

import { text } from "node:stream/consumers";
import OpenAI, { toFile } from "openai";

const { url, key, requests } = JSON.parse(await text(process.stdin));
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0, timeout: 60_000 });
const { batches, chat, files, models, responses } = client;

async function listed(items) {
  const found = [];
  for await (const item of items) found.push(item);
  return found;
}

const WAYS = {
  chat: (body) => chat.completions.create(body),
  pieces: async (body) => listed(await chat.completions.create({ ...body, stream: true })),
  gathered: (body) => chat.completions.stream(body).finalChatCompletion(),
  parsed: async (body) => (await chat.completions.parse(body)).choices[0].message.parsed,
  respond: (body) => responses.create(body),
  events: async (body) => listed(await responses.create({ ...body, stream: true })),
  models: () => listed(models.list()),
  model: ({ name }) => models.retrieve(name),
  // The package calls the function itself, and sends what it gave.
  tools: async ({ result, ...body }) => {
    const given = [];
    const call = (values) => (given.push(values), result);
    const tools = body.tools.map(({ type, function: about }) => ({ type, function: { ...about, parse: JSON.parse, function: call } }));
    const runner = chat.completions.runTools({ ...body, tools });
    await runner.done();
    return { given, messages: runner.messages };
  },
  batch: async ({ lines }) => {
    const input = await files.create({ file: await toFile(Buffer.from(lines), "asked.jsonl"), purpose: "batch" });
    let batch = await batches.create({
      input_file_id: input.id, endpoint: "/v1/chat/completions", completion_window: "24h",
    });
    while (["validating", "in_progress", "finalizing"].includes(batch.status)) batch = await batches.retrieve(batch.id);
    const output = await (await files.content(batch.output_file_id)).text();
    return { status: batch.status, counts: batch.request_counts, output };
  },
  // Leaves after the first piece.
  abandoned: async (body) => {
    for await (const piece of await chat.completions.create({ ...body, stream: true })) return piece.object;
  },
};

const results = [];
for (const [how, body] of requests) {
  try {
    results.push(await WAYS[how](body));
  } catch (error) {
    const { status, type, param, code } = error;
    results.push({ error: error.constructor.name, status, type, param, code, message: error.message });
  }
}
console.log(JSON.stringify(results));
