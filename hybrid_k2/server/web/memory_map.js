// Where the weights lie: for each memory what it holds, by the plan that the server loaded.

import { el } from "./dom.js";
import { formatBytes, formatCount, formatShare } from "./format.js";

const NAMES = {
  embedding: "Embedding",
  attention: "Attention",
  router: "Router",
  dense_mlp: "Dense MLP",
  shared_experts: "Shared experts",
  routed_experts: "Routed experts",
  lm_head: "Output head",
};
const COLOURS = [...Object.keys(NAMES), "hottest", "kv_cache", "overhead"]; // a class each: part-0, part-1, ...

/** Return the elements that show a plan (`plan` of the status), one section for each memory. */
export function memoryMap(plan) {
  const parts = planParts(plan);
  return Object.entries(plan.devices).map(([device, { bytes, budget }]) => {
    const held = parts.filter((part) => part.memory === device).sort((one, other) => other.bytes - one.bytes);
    const meter = el("meter", {
      min: 0,
      max: Math.max(budget, bytes),
      value: bytes,
      "aria-label": `${device}: budget used`,
    });
    return el(
      "section",
      { class: "memory", "aria-label": `Memory of ${device}` },
      el("h3", {}, deviceName(device)),
      el("p", { class: "note" }, `${formatBytes(bytes)} of a budget of ${formatBytes(budget)}`, meter),
      bar(held, bytes),
      el(
        "div",
        { class: "scrolls", tabindex: 0, role: "group", "aria-label": `Parts in ${device}` },
        table(held, bytes),
      ),
    );
  });
}

function planParts({ groups, kv_cache: cache, overheads }) {
  const weights = groups.map(({ what, hottest, layers, device, dtype, bytes }) => ({
    name: hottest ? `${hottest} hottest experts` : (NAMES[what] ?? what),
    kind: hottest ? "hottest" : what,
    memory: memoryOf(device),
    where: device === "twin" ? `layers ${layers}, twin` : layers && `layers ${layers}`,
    dtype,
    bytes,
  }));
  const pages = { name: "KV cache", kind: "kv_cache", where: `${formatCount(cache.tokens)} tokens` };
  const others = overheads.map(({ what, device, bytes }) => ({
    name: capital(what),
    kind: "overhead",
    memory: memoryOf(device),
    bytes,
  }));
  return [...weights, { ...pages, memory: memoryOf(cache.device), dtype: cache.dtype, bytes: cache.bytes }, ...others];
}

/** The twin computes like an accelerator, out of the host's memory. */
const memoryOf = (device) => (device === "twin" ? "host" : device);

const deviceName = (device) => (device === "host" ? "Host" : `GPU ${device.replace("cuda:", "")}`);

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

const colour = ({ kind }) => `part-${COLOURS.indexOf(kind)}`;

function bar(parts, bytes) {
  const segments = parts.map((part) => {
    const segment = el("span", { class: colour(part), title: `${part.name}: ${formatBytes(part.bytes)}` });
    segment.style.flexGrow = (100 * part.bytes) / bytes;
    return segment;
  });
  return el("div", { class: "bar", "aria-hidden": "true" }, ...segments);
}

function table(parts, bytes) {
  const rows = parts.map((part) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, el("span", { class: `swatch ${colour(part)}` }), part.name),
      el("td", {}, part.where ?? ""),
      el("td", {}, part.dtype ?? ""),
      el("td", { class: "right" }, formatBytes(part.bytes)),
      el("td", { class: "right" }, formatShare(part.bytes / bytes)),
    ),
  );
  const titles = ["Part", "Which", "Type", "Size", "Share"];
  const head = titles.map((title, index) => el("th", { scope: "col", class: index > 2 ? "right" : null }, title));
  return el("table", { class: "parts" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
}
