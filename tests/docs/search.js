// Asks the search of a built site, by the worker that its pages use:
//
//     node tests/docs/search.js build/site "resume" "OOM"
//
// prints a JSON object: for each query, the pages and sections that were found, best first.
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const [site, ...queries] = process.argv.slice(2);
const workers = path.join(site, "assets", "javascripts", "workers");
const name = fs.readdirSync(workers).find((file) => /^search\..*\.js$/.test(file));
const index = JSON.parse(fs.readFileSync(path.join(site, "search", "search_index.json"), "utf8"));

let listener;
const waiting = [];
const worker = {
  addEventListener: (type, handler) => { if (type === "message") listener = handler; },
  postMessage: (message) => waiting.shift()(message),
  importScripts: () => {},
  location: { href: "http://localhost/" },
  performance, setTimeout, URL,
};
worker.self = worker;
vm.runInNewContext(fs.readFileSync(path.join(workers, name), "utf8"), worker);

const SETUP = 0, QUERY = 2;
const ask = (type, data) => new Promise((answer) => {
  waiting.push(answer);
  listener({ data: { type, data } });
});

(async () => {
  await ask(SETUP, { ...index, options: { suggest: true } });
  const found = {};
  for (const query of queries) {
    const pages = (await ask(QUERY, query)).data.items;
    found[query] = pages.map((hits) => hits[0].location);
  }
  console.log(JSON.stringify(found, null, 1));
})();
