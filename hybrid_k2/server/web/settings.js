// The panel of settings: what goes with each request. An empty field leaves the choice to the server.

import { apiKey, setApiKey } from "./api.js";
import { byId } from "./dom.js";

const NUMBERS = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens" }; // parameter -> field
const TEXTS = ["system", "tools", ...Object.values(NUMBERS)];

export class Settings {
  constructor(store) {
    this._store = store;
    this._panel = byId("settings");
    const kept = store.settings();
    for (const id of TEXTS) if (typeof kept[id] === "string") byId(id).value = kept[id];
    byId("thinking").checked = kept.thinking !== false;
    for (const id of [...TEXTS, "thinking"]) byId(id).addEventListener("input", () => this._keep());
    byId("tools").addEventListener("input", () => checkTools());
    byId("open-settings").addEventListener("click", () => this.open());
    byId("api-key").addEventListener("input", (event) => setApiKey(event.target.value.trim()));
    byId("settings-form").addEventListener("reset", () => setTimeout(() => this._reset()));
    checkTools();
  }

  open() {
    byId("api-key").value = apiKey();
    this._panel.showModal();
  }

  /** Return the system prompt, and the other parameters of a request. */
  values() {
    const body = { thinking: { type: byId("thinking").checked ? "enabled" : "disabled" } };
    for (const [name, id] of Object.entries(NUMBERS)) if (byId(id).value !== "") body[name] = Number(byId(id).value);
    const tools = readTools();
    if (tools?.length) body.tools = tools;
    return { system: byId("system").value.trim(), body };
  }

  _keep() {
    const texts = Object.fromEntries(TEXTS.map((id) => [id, byId(id).value]));
    this._store.saveSettings({ ...texts, thinking: byId("thinking").checked });
  }

  _reset() {
    setApiKey("");
    checkTools();
    this._keep();
  }
}

/** Return the tools that the reader declared; null where the text is no list. */
function readTools() {
  const text = byId("tools").value.trim();
  if (!text) return [];
  try {
    const tools = JSON.parse(text);
    return Array.isArray(tools) ? tools : null;
  } catch {
    return null;
  }
}

function checkTools() {
  const wrong = readTools() === null;
  byId("tools").setCustomValidity(wrong ? "Expected a JSON list of tools." : "");
  byId("tools").setAttribute("aria-invalid", String(wrong));
  byId("tools-error").hidden = !wrong;
}
