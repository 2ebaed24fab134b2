// The playground: a conversation, streamed. Owns: its messages and how they look. Whatever the model says is put into
// the page as text, never as markup.

import { stream } from "./api.js";

const $ = (id) => document.getElementById(id);
const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city, now",
      parameters: {
        type: "object",
        properties: { city: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
        required: ["city"],
      },
    },
  },
];

function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text) element.textContent = text;
  return element;
}

/** A message on the page. */
class Bubble {
  constructor(log, role, title, text = "") {
    this.element = make("article", `message ${role}`);
    this.body = make("div", "text", text);
    this.meta = make("p", "meta");
    this.meta.hidden = true;
    this.element.append(make("h3", "", title), this.body, this.meta);
    this.calls = [];
    log.append(this.element);
  }

  say(text) {
    this.body.append(text);
  }

  think(text) {
    if (!this.thought) {
      const details = make("details");
      this.thought = make("div", "thought");
      details.append(make("summary", "", "Reasoning"), this.thought);
      details.open = true;
      this.body.before(details);
    }
    this.thought.append(text);
  }

  /** A part of a tool call, as it is streamed. */
  call(part) {
    let call = this.calls[part.index];
    if (!call) {
      const card = make("div", "call");
      const name = make("span", "name");
      const text = make("pre", "code");
      card.append("Calls ", name, text);
      this.meta.before(card);
      call = this.calls[part.index] = { id: part.id, card, name, text, arguments: "" };
    }
    if (part.function?.name) call.name.textContent = part.function.name;
    call.arguments += part.function?.arguments ?? "";
    call.text.textContent = call.arguments;
  }

  note(text) {
    this.meta.hidden = false;
    this.meta.textContent = text;
  }
}

export class Chat {
  constructor(map) {
    this.map = map;
    this.model = "";
    this.messages = [];
    this.running = null;
    this.log = $("log");
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    $("stop").addEventListener("click", () => this.running?.abort());
    $("fresh").addEventListener("click", () => this.clear());
    $("example").addEventListener("click", () => {
      $("tools").value = JSON.stringify(EXAMPLE, null, 2);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running && event.target.id !== "map") this.running.abort();
    });
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    this.log.querySelectorAll(".message").forEach((one) => one.remove());
    $("hint").hidden = false;
    this.trouble("");
    $("prompt").focus();
  }

  trouble(text) {
    $("trouble").textContent = text;
    $("trouble").hidden = !text;
  }

  send() {
    const text = $("prompt").value.trim();
    if (!text || this.running) return;
    $("prompt").value = "";
    $("hint").hidden = true;
    this.log.querySelectorAll(".call form").forEach((form) => form.remove());
    this.messages.push({ role: "user", content: text });
    new Bubble(this.log, "user", "You", text);
    this.run();
  }

  /** The body of a request for the next message. Throws for what is not valid. */
  body() {
    const system = $("system").value.trim();
    const body = { messages: [...(system ? [{ role: "system", content: system }] : []), ...this.messages] };
    if (this.model) body.model = this.model;
    for (const input of $("sampling").querySelectorAll("input")) {
      if (!input.reportValidity()) throw new Error(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`);
      if (input.value !== "") body[input.name] = Number(input.value);
    }
    const tools = $("tools").value.trim();
    if (tools) {
      try {
        body.tools = JSON.parse(tools);
      } catch (error) {
        $("tools-panel").open = true;
        throw new Error(`the tools are not JSON: ${error.message}`);
      }
      body.tool_choice = $("tool-choice").value;
    }
    return { ...body, stream_options: { include_usage: true } };
  }

  async run() {
    this.trouble("");
    let body;
    try {
      body = this.body();
    } catch (error) {
      this.trouble(error.message);
      return;
    }
    const bubble = new Bubble(this.log, "assistant running", "Model");
    const control = new AbortController();
    this.running = control;
    this.busy(true);
    const begin = performance.now();
    const seen = { first: 0, last: 0, reason: "", usage: null, content: "" };
    try {
      for await (const event of stream("v1/chat/completions", body, control.signal)) {
        if (event.id) this.map.mine = event.id;
        if (event.usage) seen.usage = event.usage;
        for (const choice of event.choices) this.take(bubble, choice, seen);
        this.follow();
      }
    } catch (error) {
      if (error.name === "AbortError") seen.reason = "stopped";
      else {
        seen.reason = "failed";
        this.trouble(error.message);
      }
    } finally {
      if (this.running === control) {
        this.running = null;
        this.busy(false);
      }
      bubble.element.classList.remove("running");
    }
    if (!bubble.element.isConnected) return; // a new chat was begun meanwhile
    bubble.note(summary(begin, seen));
    this.finish(bubble, seen);
    this.follow();
  }

  take(bubble, choice, seen) {
    const delta = choice.delta ?? {};
    const now = performance.now();
    if (!seen.first) seen.first = now;
    seen.last = now;
    if (delta.reasoning) bubble.think(delta.reasoning);
    if (delta.content) {
      bubble.say(delta.content);
      seen.content += delta.content;
    }
    for (const part of delta.tool_calls ?? []) bubble.call(part);
    if (choice.finish_reason) seen.reason = choice.finish_reason;
  }

  /** Keep what was said; ask for the results of tool calls. */
  finish(bubble, seen) {
    const message = { role: "assistant", content: seen.content || null };
    const calls = bubble.calls.filter(Boolean);
    if (calls.length && seen.reason !== "stopped" && seen.reason !== "failed") {
      message.tool_calls = calls.map((call) => ({
        id: call.id,
        type: "function",
        function: { name: call.name.textContent, arguments: call.arguments },
      }));
      calls.forEach((call) => this.askForResult(call, calls));
    } else if (message.content === null) {
      message.content = "";
    }
    this.messages.push(message);
  }

  askForResult(call, calls) {
    const form = make("form");
    const input = make("input");
    input.setAttribute("aria-label", `What ${call.name.textContent} answers`);
    input.placeholder = "What does it answer?";
    form.append(input, make("button", "quiet", "Give"));
    call.card.append(form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      form.remove();
      call.answered = true;
      this.messages.push({ role: "tool", tool_call_id: call.id, content: input.value });
      new Bubble(this.log, "tool", `${call.name.textContent} answers`, input.value);
      if (calls.every((one) => one.answered)) this.run();
    });
  }

  busy(is) {
    $("send").hidden = is;
    $("stop").hidden = !is;
    this.log.setAttribute("aria-busy", String(is)); // read out when whole, not token by token
  }

  follow() {
    const log = this.log;
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
  }
}

function summary(begin, seen) {
  const parts = [];
  const made = seen.usage?.completion_tokens;
  if (made) parts.push(`${made} tokens`);
  if (seen.first) parts.push(`first after ${Math.round(seen.first - begin)} ms`);
  if (made > 1 && seen.last > seen.first) {
    parts.push(`${Math.round(((made - 1) * 1000) / (seen.last - seen.first))} tokens/s`);
  }
  const cached = seen.usage?.prompt_tokens_details?.cached_tokens;
  if (seen.usage) parts.push(`prompt ${seen.usage.prompt_tokens}${cached ? `, ${cached} of them cached` : ""}`);
  const ends = { length: "ended by its length", stopped: "stopped", failed: "failed", tool_calls: "calls a tool" };
  if (ends[seen.reason]) parts.push(ends[seen.reason]);
  return parts.join(" · ");
}
