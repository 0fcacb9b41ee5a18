// Lists the endpoints of openapi.json, and the fields of their bodies.

const element = (name, text, ...children) => {
  const made = document.createElement(name);
  made.append(text, ...children);
  return made;
};

const spec = await (await fetch("openapi.json")).json();

const resolved = (schema) =>
  schema?.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema;

function typeOf(schema) {
  if (schema.anyOf) return schema.anyOf.filter((one) => one.type !== "null").map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  const least = schema.minimum === undefined ? "" : ` from ${schema.minimum}`;
  const most = schema.maximum === undefined ? "" : ` to ${schema.maximum}`;
  return `${schema.format === "binary" ? "file" : schema.type ?? "any"}${least}${most}`;
}

function fields(body) {
  const [kind, media] = Object.entries(body.content)[0];
  const schema = resolved(media.schema);
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) =>
    element("tr", "",
      element("td", element("code", name)),
      element("td", typeOf(field) + (schema.required?.includes(name) ? ", required" : "")),
      element("td", field.description ?? "")));
  return [element("p", kind), element("table", "", ...rows)];
}

for (const [path, methods] of Object.entries(spec.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    document.getElementById("endpoints").append(
      element("h2", element("code", `${method.toUpperCase()} ${path}`)),
      element("p", operation.description ?? operation.summary ?? ""),
      ...(operation.requestBody ? fields(operation.requestBody) : []));
  }
}
