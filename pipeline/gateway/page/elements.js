// Elements of text. Nothing here, nor anywhere in this page, takes HTML: a text is a text node.

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else if (name === "data") Object.assign(made.dataset, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export const find = (id) => document.getElementById(id);

// Writing what is there already would have screen readers say it again, and undo a selection.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
