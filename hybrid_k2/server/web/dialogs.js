// Questions to the reader, one at a time.

import { el } from "./dom.js";

/** Ask for a line of text; null when the reader cancels. */
export function askText({ title, note = "", label, value = "", type = "text", ok }) {
  const input = el("input", { id: "ask-input", type, value, autocomplete: "off", spellcheck: "false" });
  return ask(title, note, ok, "primary", [el("label", { for: "ask-input" }, label), input], () => input.value.trim());
}

/** Ask whether to do something; true or null. */
export function askSure({ title, note, ok }) {
  return ask(title, note, ok, "danger", [], () => true);
}

function ask(title, note, ok, kind, fields, answer) {
  return new Promise((resolve) => {
    const cancel = el("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
    const form = el(
      "form",
      { method: "dialog" },
      el("h2", { id: "ask-title" }, title),
      ...(note ? [el("p", { class: "note" }, note)] : []),
      ...fields,
      el("div", { class: "buttons" }, cancel, el("button", { class: kind, value: "ok" }, ok)),
    );
    const dialog = el("dialog", { class: "ask", "aria-labelledby": "ask-title" }, form);
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "ok" ? answer() : null);
    });
    document.body.append(dialog);
    dialog.showModal();
    fields.at(-1)?.select();
  });
}
