// What the pages of lib/server.py share; it stands before the script of each.
"use strict";
const $ = id => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...children);
  return element;
};
const colour = id => `hsl(${id * 0.381966 % 1 * 360} 100% 55%)`;  // that of lib/draw.colour_of

async function request(path, options) {  // a reply; what the program refuses is an Error in its words
  const reply = await fetch(path, options);
  if (!reply.ok) throw new Error((await reply.json()).error);
  return reply;
}
const get = async path => (await request(path)).json();
const post = (path, body, more) => request(path, {
  method: "POST", body: JSON.stringify(body), headers: {"Content-Type": "application/json"}, ...more});
const why = error => error instanceof TypeError ? "The program does not answer. Has it been ended?" : error.message;
