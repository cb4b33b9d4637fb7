"use strict";
// Shows the OpenAPI document of this server, without anything from elsewhere.

function make(tag, text = "", ...children) {
  const element = document.createElement(tag);
  element.append(text, ...children);
  return element;
}

// a part of the document with what it refers to in its place
function whole(part, all, depth = 0) {
  if (Array.isArray(part)) return part.map((one) => whole(one, all, depth));
  if (part === null || typeof part !== "object") return part;
  if (part.$ref && depth < 8) {
    const name = part.$ref.split("/").pop();
    return whole(all.components.schemas[name], all, depth + 1);
  }
  return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, whole(value, all, depth)]));
}

async function show() {
  const answer = await fetch("/openapi.json");
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const found = await answer.json();
  document.getElementById("about").textContent = found.info.description;
  const routes = document.getElementById("routes");
  for (const [path, methods] of Object.entries(found.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const details = make("details", "", make("summary", `${method.toUpperCase()} ${path}`));
      details.append(make("p", route.description ?? ""));
      const takes = route.requestBody?.content ?? {};
      for (const [kind, { schema }] of Object.entries(takes)) {
        details.append(make("h2", `Takes ${kind}`));
        details.append(make("pre", JSON.stringify(whole(schema, found), null, 2)));
      }
      for (const [status, { description, content }] of Object.entries(route.responses)) {
        details.append(make("h2", `${status} ${description}`));
        const schema = status === "200" ? content?.["application/json"]?.schema : null;
        if (schema) details.append(make("pre", JSON.stringify(whole(schema, found), null, 2)));
      }
      routes.append(details);
    }
  }
}

show().catch((error) => (document.getElementById("error").textContent = error.message));
