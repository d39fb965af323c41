// What serves: plan, device, memory, and charts of this moment.

import { serverFacts } from "./api.js";
import { Chart } from "./chart.js";
import { $, el, formatBytes, formatNumber } from "./dom.js";

const SECOND = 1000;

export class ServerView {
  constructor(onFacts) {
    this.onFacts = onFacts;
    this.before = null;
    const whole = (value) => formatNumber(value);
    const percent = (value) => formatNumber(value, value < 10 ? 1 : 0);
    this.charts = {
      speed: new Chart("Generation", "tokens/s", { format: whole }),
      running: new Chart("Running", "requests", { format: whole }),
      waiting: new Chart("Waiting", "requests", { format: whole }),
      cache: new Chart("KV cache in use", "%", { top: 100, format: percent }),
      hits: new Chart("Prefix-cache hits", "% of prompts", { top: 100, format: percent }),
    };
    $("charts").append(...Object.values(this.charts).map((chart) => chart.node));
    this.refresh();
    setInterval(() => { if (!document.hidden) this.refresh(); }, SECOND);
  }

  async refresh() {
    try {
      const facts = await serverFacts();
      this.onFacts(facts, null);
      this.#plot(facts);
      this.#show(facts);
      $("server-notice").hidden = true;
    } catch (error) {
      this.before = null;
      this.onFacts(null, error);
      $("server-notice").textContent = error.status === 401 ? "The server asks for an API key: give it in the settings." : `The server does not answer: ${error.message}`;
      $("server-notice").hidden = false;
    }
  }

  #plot(facts) {
    const now = { ...facts.statistics, at: performance.now() };
    const { charts, before } = this;
    charts.running.add(now.num_running);
    charts.waiting.add(now.num_waiting);
    charts.cache.add(now.cache_usage * 100);
    const asked = now.num_prompt_tokens;
    charts.hits.add(asked ? (now.num_cached_prompt_tokens / asked) * 100 : 0);
    if (before) {
      const tokens = Math.max(0, now.num_output_tokens - before.num_output_tokens);
      charts.speed.add(tokens / ((now.at - before.at) / SECOND));
    }
    this.before = now;
  }

  #show(facts) {
    const { model, device, statistics } = facts;
    const startup = Object.entries(facts.startup_s).map(([name, seconds]) => [name.replaceAll("_", " "), `${formatNumber(seconds, 2)} s`]);
    const memory = Object.entries(device.memory_bytes).map(([name, bytes]) => [name, formatBytes(bytes)]);
    const settings = Object.entries(facts.settings).map(([name, value]) => [name.replaceAll("_", " "), value === null ? "no limit or default" : String(value)]);
    const cards = [
      card("Model", [["name", model.name], ["architecture", model.architecture], ["parameters", `${formatNumber(model.num_parameters / 1e6, 1)} million`],
        ["weights", `${formatBytes(model.weight_bytes)} in ${model.dtype}`], ["context", `${formatNumber(model.max_model_len)} tokens`]]),
      card("Backend", [["backend", device.backend], ["device", device.name], ["cache", `${formatNumber(device.num_cache_tokens)} tokens`], ...memory]),
      card("Now", [["state", facts.state], ["up for", duration(facts.uptime_s)], ["engine restarts", facts.num_restarts], ["steps", formatNumber(statistics.num_steps)],
        ["tokens generated", formatNumber(statistics.num_output_tokens)], ["preemptions", formatNumber(statistics.num_preemptions)]]),
      card("Plan: who serves each operator", Object.entries(device.providers)),
      card("Start", startup),
      card("Settings", settings),
    ];
    if (facts.changes.length) {
      cards.push(el("section", { class: "card" }, el("h2", {}, "Chosen for you"), el("ul", { class: "plain" }, ...facts.changes.map((one) => el("li", {}, one)))));
    }
    $("cards").replaceChildren(...cards);
  }
}

const card = (title, rows) => rows.length === 0 ? el("section", { class: "card" }, el("h2", {}, title), el("p", { class: "none" }, "The engine tells nothing of this."))
  : el("section", { class: "card" }, el("h2", {}, title),
  el("dl", { class: "rows" }, ...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value))))));

function duration(seconds) {
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}
