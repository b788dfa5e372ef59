// Elements, made without HTML text.

/** Make an element. Attributes that are null, undefined or false are left out; `onclick` and the like are listeners. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Find the one element with this id. */
export const byId = (id) => document.getElementById(id);

/** Set a text only where it changes, so that nothing is announced or laid out anew without need. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Make a button that shows an icon of the page, the template `icon`. */
export function iconButton(icon, label, onclick) {
  const button = el("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick });
  button.append(byId(icon).content.cloneNode(true));
  return button;
}

/** Make a button that copies a text; nothing where the browser has no clipboard for this page. */
export function copyButton(text, label) {
  if (!navigator.clipboard) return "";
  const button = el("button", { type: "button", class: "quiet", "aria-label": label }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}
