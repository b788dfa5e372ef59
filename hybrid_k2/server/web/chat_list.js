// The list of conversations beside the page.

import { askSure, askText } from "./dialogs.js";
import { byId, el, iconButton } from "./dom.js";

/** Draw the list. `shown`: the conversation in view; `busy`: ids of those with a reply on its way. */
export function drawChatList({ chats, shown, busy, rename, remove }) {
  const items = chats.map((chat) => {
    const current = chat.id === shown?.id;
    const link = el(
      "a",
      { href: `#chat/${chat.id}`, "aria-current": current ? "page" : null, title: chat.title },
      chat.title,
    );
    const state = busy.has(chat.id) ? [el("span", { class: "busy", role: "img", "aria-label": "replying" })] : [];
    const buttons = [
      iconButton("i-rename", `Rename “${chat.title}”`, async () => {
        const title = await askText({ title: "Rename the chat", label: "Title", value: chat.title, ok: "Rename" });
        if (title) rename(chat, title);
      }),
      iconButton("i-delete", `Delete “${chat.title}”`, async () => {
        const note = `“${chat.title}” is kept in this browser only, and cannot be brought back.`;
        if (await askSure({ title: "Delete the chat?", note, ok: "Delete" })) remove(chat);
      }),
    ];
    return el("li", { class: current ? "current" : null }, link, ...state, ...buttons);
  });
  byId("chats").replaceChildren(...items);
}
