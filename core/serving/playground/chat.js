// The conversation: sends, streams, shows what it cost.

import { stream } from "./api.js";
import { $, el, formatNumber } from "./dom.js";
import { readSettings } from "./settings.js";
import { TokenView, readLogprobs } from "./tokens.js";

const IDEAS = {
  chat: ["What is a list?", "What does the function sorted do?", "Explain a Python class.", "How do I read a file?"],
  completion: ["def fibonacci(n):\n", "import json\n\ndef load(path):\n", "class Stack:\n    \"\"\"A stack.\"\"\"\n", "for index, name in enumerate("],
};

export class Chat {
  constructor() {
    this.turns = [];
    this.running = null;
    // Taken out of the page with the first message, and put back for the next conversation.
    this.welcome = $("welcome");
    this.ideas = $("ideas");
    $("composer").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    $("stop").addEventListener("click", () => this.running?.abort());
    $("clear").addEventListener("click", () => this.clear());
    const text = $("composer-text");
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
    });
    text.addEventListener("input", () => { text.style.height = "auto"; text.style.height = `${text.scrollHeight}px`; });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") this.running?.abort(); });
    this.showMode("chat");
  }

  showMode(mode) {
    this.ideas.replaceChildren(...IDEAS[mode].map((idea) => el("li", {},
      el("button", { type: "button", onclick: () => { $("composer-text").value = idea; this.send(); } },
        mode === "chat" ? idea : el("code", {}, idea.trim())))));
    $("composer-text").placeholder = mode === "chat" ? "Write a message …" : "Write the beginning of a text …";
    $("composer-label").textContent = mode === "chat" ? "Your message" : "The text to continue";
  }

  clear() {
    this.running?.abort();
    this.turns = [];
    $("log").replaceChildren(this.welcome);
    $("composer-text").focus();
    this.#announce("New conversation");
  }

  async send() {
    const text = $("composer-text").value;
    if (this.running || !text.trim()) return;
    $("composer-text").value = "";
    $("composer-text").style.height = "auto";
    this.welcome.remove();
    const settings = readSettings();
    const answer = settings.mode === "chat" ? this.#askChat(text, settings) : this.#askCompletion(text, settings);
    await this.#run(answer, settings);
  }

  #askChat(text, settings) {
    $("log").append(turn("user", "You", el("div", { class: "text" }, text)));
    this.turns.push({ role: "user", content: text });
    const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
    const logprobs = settings.logprobs ? { logprobs: true, top_logprobs: 5 } : {};
    return {
      path: "v1/chat/completions", given: "",
      body: { ...settings.sampling, ...logprobs, messages: [...system, ...this.turns] },
      read: (choice) => choice.delta.content || "",
      think: (choice) => choice.delta.reasoning_content || "",
    };
  }

  #askCompletion(text, settings) {
    const logprobs = settings.logprobs ? { logprobs: 5 } : {};
    return {
      path: "v1/completions", given: text,
      body: { ...settings.sampling, ...logprobs, prompt: text },
      read: (choice) => choice.text,
      think: () => "",
    };
  }

  // The last question once more, with the sampling that is set now; its answer takes the old one's place.
  async #again(last) {
    if (this.running) return;
    this.turns = last.turns;
    last.answer.node.remove();
    const { sampling } = readSettings();
    const asked = this.#run({ ...last.question, body: { ...last.question.body, ...sampling } }, last.settings);
    $("stop").focus();
    await asked;
  }

  #addActions(last) {
    for (const old of document.querySelectorAll(".again")) old.remove();
    const copy = async () => {
      try { await navigator.clipboard.writeText(last.answer.said); this.#announce("Copied"); }
      catch { this.#announce("The browser did not allow copying"); }
    };
    last.answer.node.append(el("div", { class: "actions" },
      navigator.clipboard && last.answer.said ? el("button", { type: "button", class: "quiet copy", onclick: copy }, "Copy") : null,
      el("button", { type: "button", class: "quiet again", onclick: () => this.#again(last) }, "Try again")));
  }

  async #run(question, settings) {
    const turns = [...this.turns];
    const answer = new Answer(question.given, settings);
    $("log").append(answer.node);
    this.#setRunning(new AbortController());
    this.#announce("The model is answering");
    try {
      for await (const event of stream(question.path, question.body, this.running.signal)) {
        const atEnd = isAtEnd($("log"));
        answer.take(event, question);
        if (atEnd) $("log").scrollTop = $("log").scrollHeight;
      }
      answer.finish();
      this.#announce(`Answer: ${answer.said}`);
    } catch (error) {
      if (error.name === "AbortError") { answer.finish("stopped"); this.#announce("Stopped"); }
      else { answer.fail(error.message); this.#announce(`Error: ${error.message}`); }
    }
    if (settings.mode === "chat") {
      if (answer.said) this.turns.push({ role: "assistant", content: answer.said });
      else this.turns.pop();
    }
    this.#addActions({ question, settings, turns, answer });
    this.#setRunning(null);
    $("log").scrollTop = $("log").scrollHeight;
  }

  #setRunning(controller) {
    const hadFocus = document.activeElement === $("stop");
    this.running = controller;
    $("stop").hidden = !controller;
    $("send").hidden = Boolean(controller);
    $("log").setAttribute("aria-busy", String(Boolean(controller)));
    if (hadFocus) $("composer-text").focus();
  }

  #announce(text) { $("announcer").textContent = text; }
}

class Answer {
  constructor(given, settings) {
    this.said = "";
    this.begun = performance.now();
    this.first = this.last = null;
    this.numTokens = 0;
    this.usage = null;
    this.reason = null;
    this.isMono = settings.mode === "completion";
    this.view = settings.logprobs ? new TokenView() : null;
    this.text = this.view ? this.view.text : el("div", { class: "text" });
    this.body = document.createTextNode("");
    if (given) this.text.append(el("span", { class: "given" }, given));
    if (!this.view) this.text.append(this.body);
    this.facts = el("ul", { class: "facts", "aria-label": "What the answer took" });
    const parts = this.view ? [this.view.legend, this.view.detail] : [];
    this.thoughts = new Thoughts();
    this.node = turn("assistant", "Model", this.thoughts.node, this.text, ...parts, this.facts);
    this.node.classList.add("running");
    if (this.isMono) this.node.classList.add("mono");
  }

  take(event, { read, think }) {
    if (event.usage) this.usage = event.usage;
    for (const choice of event.choices) {
      const added = read(choice);
      const thought = think(choice);
      if (added || thought) {
        this.last = performance.now();
        this.first ??= this.last;
      }
      if (thought) this.thoughts.add(thought);
      if (added) {
        this.thoughts.end();
        this.said += added;
      }
      if (this.view) this.view.add(readLogprobs(choice.logprobs));
      else if (added) this.body.data += added;
      this.reason = choice.finish_reason || this.reason;
    }
  }

  finish(reason = this.reason) {
    this.node.classList.remove("running");
    this.thoughts.end();
    if (!this.view && !this.isMono) this.text.replaceChildren(...withCode(this.said));
    const facts = [];
    if (this.first) facts.push(["first token", `${formatNumber(this.first - this.begun)} ms`]);
    if (this.usage) {
      const { prompt_tokens: asked, completion_tokens: given, prompt_tokens_details: details } = this.usage;
      const seconds = (this.last - this.first) / 1000;
      if (given > 1 && seconds > 0) facts.push(["speed", `${formatNumber((given - 1) / seconds)} tokens/s`]);
      facts.push(["tokens", `${formatNumber(asked)} in, ${formatNumber(given)} out`]);
      const cached = details?.cached_tokens || 0;
      if (asked) facts.push(["prefix cache", `${formatNumber(cached)} of ${formatNumber(asked)}`, cached > 0]);
    }
    if (reason) facts.push(["ended by", { length: "the limit of tokens", stop: "itself", stopped: "you" }[reason] || reason]);
    this.facts.replaceChildren(...facts.map(([name, value, hit]) => el("li", { class: hit ? "hit" : false }, `${name} `, el("b", {}, value))));
  }

  fail(message) {
    this.finish(null);
    this.node.append(el("p", { class: "error", role: "alert" }, message));
  }
}

// What a model thinks before it answers: open while it does, folded when the answer begins.
class Thoughts {
  constructor() {
    this.begun = performance.now();
    this.isOver = false;
    this.title = el("summary", {}, "Thinking …");
    this.text = document.createTextNode("");
    this.node = el("details", { class: "thoughts", open: true, hidden: true }, this.title, el("div", { class: "text" }, this.text));
  }

  add(text) {
    this.node.hidden = false;
    this.text.data += text;
  }

  end() {
    if (this.isOver) return;
    this.isOver = true;
    this.node.open = false;
    this.title.textContent = `Thought for ${formatNumber((performance.now() - this.begun) / 1000, 1)} s`;
  }
}

const turn = (kind, name, ...parts) => el("article", { class: `turn ${kind}`, "aria-label": name }, el("h3", {}, name), ...parts);

const isAtEnd = (log) => log.scrollHeight - log.scrollTop - log.clientHeight < 90;

// Fenced code stands in blocks; the rest stays as it is.
function withCode(text) {
  return text.split(/^```[^\n]*\n?/m).map((part, index) =>
    index % 2 ? el("pre", { tabindex: "0", "aria-label": "Code" }, el("code", {}, part)) : part);
}
