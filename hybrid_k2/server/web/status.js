// The status view: speed, queue and caches, where the weights lie, and which experts are used.

import { getJson } from "./api.js";
import { byId, setText } from "./dom.js";
import { formatCount, formatNumber, formatSeconds, formatShare } from "./format.js";
import { HeatMap } from "./heat_map.js";
import { memoryMap } from "./memory_map.js";

const POLL_MS = 1000;
const SAMPLES = 60; // of the speed, one for each poll
const RATE_SAMPLES = 4; // that the number beside them is the mean of
const RECENT_MS = 30_000;

export class StatusView {
  /** `askKey(why)` lets the reader type a key, and says whether there is one. */
  constructor(askKey) {
    this._askKey = askKey;
    this._samples = []; // {time, generated, prompt}, the oldest first
    this._uses = []; // {layers, counts, hot, at} of the last seconds
    this._on = false;
    this._turn = 0; // of polling: one that was switched off does not go on when the next begins
    this._heat = new HeatMap(byId("heat"), byId("heat-scale"), byId("heat-told"));
    for (const choice of document.querySelectorAll("input[name=heat-span]")) {
      choice.addEventListener("change", () => this._showUses());
    }
  }

  /** Poll while the view is shown. */
  run(on) {
    if (on === this._on) return;
    this._on = on;
    this._turn += 1;
    if (on) this._poll(this._turn);
  }

  async _poll(turn) {
    this._samples = [];
    this._uses = [];
    while (turn === this._turn) {
      if (!document.hidden) await this._once();
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }

  async _once() {
    try {
      this._show(await getJson("v1/hybrid-k2/status"));
      this._take(await getJson("v1/hybrid-k2/experts"));
      byId("status-error").hidden = true;
    } catch (error) {
      if (error.status === 401 && (await this._askKey(error.message))) return;
      if (error.code === "loading") return; // which the notice above tells
      setText(byId("status-error"), error.message);
      byId("status-error").hidden = false;
    }
  }

  _show({ state, version, uptime_s: uptime, context_tokens: context, service, plan }) {
    const facts = [state, `up for ${formatSeconds(uptime)}`, `hybrid-k2 ${version}`];
    if (context) facts.push(`context of ${formatCount(context)} tokens`);
    if (plan) facts.push(`${plan.layers} layers`, `${plan.numerics} numerics`);
    setText(byId("facts"), facts.join(" · "));
    if (service) this._showService(service, uptime);
    if (plan) this._showPlan(plan);
  }

  _showService(service, time) {
    const { kv_pages_used: used, kv_pages_kept: kept, kv_pages_total: pages } = service;
    const { prefix_hit_tokens: hits, prefix_queries_tokens: asked } = service;
    this._sample({ time, generated: service.generated_tokens, prompt: service.prompt_tokens });
    setText(byId("running"), formatCount(service.running));
    setText(byId("queue"), `${formatCount(service.waiting)} waiting · ${formatCount(service.finished)} done`);
    setText(byId("pages"), formatShare(pages ? used / pages : 0));
    setText(
      byId("pages-more"),
      `${formatCount(used)} of ${formatCount(pages)} pages in use, ${formatCount(kept)} kept`,
    );
    setText(byId("hits"), asked ? formatShare(hits / asked) : "–");
    setText(byId("hits-more"), `${formatCount(hits)} of ${formatCount(asked)} prompt tokens reused`);
    setText(byId("tokens"), formatCount(service.generated_tokens));
    setText(byId("tokens-more"), `${formatCount(service.prompt_tokens)} prompt tokens computed`);
    setText(byId("step"), service.steps ? `${formatNumber(service.step_s * 1000)} ms` : "–");
    setText(
      byId("step-more"),
      `${formatCount(service.step_sequences)} in the last step · ${formatCount(service.steps)} steps`,
    );
  }

  /** Take the counters of this moment, and show the speed since those before. */
  _sample(sample) {
    if (this._samples.at(-1)?.time >= sample.time) this._samples = []; // the server was started again
    this._samples = [...this._samples, sample].slice(-SAMPLES - 1);
    const last = this._samples.at(-1);
    const before = this._samples.at(-1 - RATE_SAMPLES) ?? this._samples[0];
    const seconds = last.time - before.time;
    const rate = (name) => formatNumber(seconds ? (last[name] - before[name]) / seconds : 0);
    setText(byId("speed"), rate("generated"));
    setText(byId("speed-more"), `tokens/s · prompts ${rate("prompt")}`);
    const rates = this._samples.slice(1).map((each, index) => {
      const previous = this._samples[index];
      return (each.generated - previous.generated) / (each.time - previous.time);
    });
    const most = Math.max(1, ...rates);
    const points = rates.map(
      (each, index) => `${SAMPLES - rates.length + index + 1},${(23 - (each / most) * 22).toFixed(1)}`,
    );
    byId("speed-line").setAttribute("points", points.length > 1 ? points.join(" ") : "");
  }

  _showPlan(plan) {
    const text = JSON.stringify(plan);
    if (text === this._plan) return;
    this._plan = text;
    byId("memory").replaceChildren(...memoryMap(plan));
  }

  _take(uses) {
    const now = performance.now();
    this._uses = [...this._uses, { ...uses, at: now }].filter(({ at }) => now - at <= RECENT_MS);
    this._showUses();
  }

  _showUses() {
    const last = this._uses.at(-1);
    if (!last) return;
    const { layers, counts, hot } = last;
    const recent = byId("heat-recent").checked;
    const before = this._uses[0].counts;
    // Counts are halved now and then, and start again with the server.
    const since = (layer, expert) => Math.max(0, counts[layer][expert] - (before[layer]?.[expert] ?? 0));
    const shown = recent ? counts.map((row, layer) => row.map((_, expert) => since(layer, expert))) : counts;
    byId("experts-view").hidden = !layers.length;
    if (layers.length) this._heat.update({ layers, hot, counts: shown });
  }
}
