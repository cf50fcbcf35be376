// Clients for Node.js: `node clients.mjs CASE` asks the server and prints what came of it as JSON.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const MODEL = "smollm2";
const QUESTION = "Name an animal.";
const USER = [{ role: "user", content: QUESTION }];
const Animal = z.strictObject({
  name: z.enum(["lion", "eagle", "spider"]),
  wild: z.boolean(),
});
const Place = z.strictObject({ city: z.string().max(12) });
const baseURL = `${process.env.VEILPIPE_URL}/v1`;
const apiKey = process.env.VEILPIPE_KEY;
const maxRetries = 0;

const openai = new OpenAI({ baseURL, apiKey, maxRetries });
const get_weather = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: z.toJSONSchema(Place),
  },
};
const models = {
  responses: createOpenAI({ baseURL, apiKey })(MODEL),
  chat: createOpenAI({ baseURL, apiKey }).chat(MODEL),
  compatible: createOpenAICompatible({
    name: "here",
    baseURL,
    apiKey,
    supportsStructuredOutputs: true,
  })(MODEL),
  messages: createAnthropic({ baseURL, apiKey })(MODEL),
};

// The openai package.
const cases = {
  async openaiText() {
    const answer = await openai.chat.completions.create({ model: MODEL, messages: USER, max_tokens: 20 });
    let streamed = "";
    const stream = await openai.responses.create({ model: MODEL, input: QUESTION, max_output_tokens: 20, stream: true });
    for await (const event of stream)
      if (event.type === "response.output_text.delta") streamed += event.delta;
    return { text: answer.choices[0].message.content, streamed };
  },
  async openaiForm() {
    const chat = await openai.chat.completions.parse({ model: MODEL, messages: USER, response_format: zodResponseFormat(Animal, "animal") });
    const response = await openai.responses.parse({ model: MODEL, input: QUESTION, text: { format: zodTextFormat(Animal, "animal") } });
    return { animals: [chat.choices[0].message.parsed, response.output_parsed] };
  },
  async openaiTools() {
    const stream = openai.chat.completions.stream({ model: MODEL, messages: USER, tools: [get_weather], tool_choice: "required" });
    const answer = await stream.finalChatCompletion();
    return { calls: answer.choices[0].message.tool_calls.map((call) => JSON.parse(call.function.arguments)) };
  },
};

// The ai package, over each of its ways here.
for (const [way, model] of Object.entries(models)) {
  const asked = { model, prompt: QUESTION, maxRetries };
  cases[`${way}Text`] = async () => {
    const { text } = await generateText({ ...asked, maxOutputTokens: 20 });
    let streamed = "";
    let failure = null;
    const stream = streamText({ ...asked, maxOutputTokens: 20, onError: ({ error }) => { failure = `${error}`; } });
    for await (const part of stream.textStream) streamed += part;
    return { text, streamed, failure };
  };
  cases[`${way}Form`] = async () => ({
    animals: [(await generateObject({ ...asked, schema: Animal, maxOutputTokens: 200 })).object],
  });
  cases[`${way}Tools`] = async () => {
    // The first answer has to call, and what it is told is the beginning of a second.
    const { steps } = await generateText({
      ...asked,
      tools: { get_weather: tool({ description: "Tells the weather.", inputSchema: Place, execute: () => "Sunny." }) },
      toolChoice: { type: "tool", toolName: "get_weather" },
      maxOutputTokens: 60,
      stopWhen: stepCountIs(2),
    });
    return { calls: steps.flatMap((step) => step.toolCalls.map((call) => call.input)), steps: steps.length };
  };
}

console.log(JSON.stringify(await cases[process.argv[2]]()));
