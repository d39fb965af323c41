// The controls beside the conversation.

import { apiKey } from "./api.js";
import { $ } from "./dom.js";

const NEUTRAL = { top_p: 1, min_p: 0, repetition_penalty: 1 };

export function readSettings() {
  const form = $("settings").elements;
  const sampling = { temperature: Number(form.temperature.value) };
  for (const [name, neutral] of Object.entries(NEUTRAL)) {
    if (Number(form[name].value) !== neutral) sampling[name] = Number(form[name].value);
  }
  for (const name of ["top_k", "seed", "max_tokens"]) {
    if (form[name].value !== "") sampling[name] = Number(form[name].value);
  }
  if (form.stop.value) sampling.stop = [form.stop.value.replaceAll("\\n", "\n")];
  return { mode: form.mode.value, system: form.system.value, logprobs: form.logprobs.checked, sampling };
}

export function setUpSettings({ onMode, onKey }) {
  const form = $("settings");
  form.elements.api_key.value = apiKey.get();
  const show = () => {
    for (const slider of form.querySelectorAll(".slider")) {
      slider.querySelector("output").textContent = Number(slider.querySelector("input").value).toFixed(2);
    }
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", show);
  form.addEventListener("change", (event) => {
    if (event.target.name === "mode") {
      $("system-field").hidden = event.target.value !== "chat";
      onMode(event.target.value);
    }
    if (event.target.name === "api_key") { apiKey.set(event.target.value.trim()); onKey(); }
  });
  show();
  // On a phone the conversation comes first.
  const narrow = matchMedia("(max-width: 860px)");
  const fit = () => { $("side").open = !narrow.matches; };
  narrow.addEventListener("change", fit);
  fit();
}

export function chooseMode(mode) {
  const radio = [...$("settings").elements.mode].find((one) => one.value === mode);
  radio.checked = true;
  radio.dispatchEvent(new Event("change", { bubbles: true }));
}
