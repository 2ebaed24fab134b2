// Many requests at once, to see the engine at work. They go as the prompts of one request, so that leaving it ends all.

import { stream } from "./api.js";

const $ = (id) => document.getElementById(id);
const TEXT =
  "A quire is a gathering of sheets, folded once and laid one inside the other. A book is a row of them. Whoever " +
  "prints one does not wait for the whole text: sheets are taken from the pile as they are needed, and go back to it " +
  "when they have been read. Continue this story, with a new scene and a new person in it. ";

export class Load {
  constructor() {
    this.model = "";
    this.most = Infinity;
    this.running = null;
    $("load").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.running.abort();
      else this.run();
    });
  }

  async run() {
    const count = $("load-n").valueAsNumber;
    const tokens = Math.min($("load-tokens").valueAsNumber, Math.max(1, this.most - 160));
    const shared = $("load-shared").checked;
    const body = {
      prompt: Array.from({ length: count }, (_, i) => (shared ? `${TEXT}Scene ${i + 1}:` : `Scene ${i + 1}. ${TEXT}`)),
      max_tokens: tokens,
      ignore_eos: true,
      temperature: 1,
    };
    if (this.model) body.model = this.model;
    this.running = new AbortController();
    $("load-go").textContent = "Stop";
    let ended = 0;
    const say = (text) => ($("load-said").textContent = text);
    say("running");
    try {
      for await (const event of stream("v1/completions", body, this.running.signal)) {
        ended += event.choices.filter((choice) => choice.finish_reason).length;
        if (ended) say(`${ended} of ${count} have ended`);
      }
    } catch (error) {
      say(error.name === "AbortError" ? "stopped" : error.message);
    }
    this.running = null;
    $("load-go").textContent = "Start";
  }
}
