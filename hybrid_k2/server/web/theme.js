// Dark or light, before anything is drawn: the reader's choice, or else the system's.

{
  const KEY = "hybrid-k2.theme";
  const root = document.documentElement;
  const show = (theme) => (theme ? root.setAttribute("data-theme", theme) : root.removeAttribute("data-theme"));
  let chosen = null;
  try {
    chosen = localStorage.getItem(KEY);
  } catch {
    // storage is switched off
  }
  show(["light", "dark"].includes(chosen) ? chosen : null);

  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      const dark = (root.dataset.theme ?? system) === "dark";
      show(dark ? "light" : "dark");
      try {
        localStorage.setItem(KEY, root.dataset.theme);
      } catch {
        // the choice lasts until the page is left
      }
    });
  });
}
