// The page of umbrella-app: gives the files of a scan to the server, shows the scan, and asks about it.
(() => {
  "use strict";
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const at = (id) => document.getElementById(id);
  const parts = [...document.querySelectorAll("[data-part]")].map((label) => ({
    label, name: label.dataset.part, input: label.querySelector("input"),
  }));
  let key = null;
  // The user's file of each name on the server, for messages.
  let given = new Map();

  // Names on the server are those of the parts: the names of the user's files are not sent.
  const suffixOf = (file) => (/\.nii(\.gz)?$/i.exec(file.name) ?? [""])[0].toLowerCase();
  const isNifti = (part) => !part.name.includes(".");
  const chosen = () => parts.filter((part) => !part.label.hidden && part.input.files.length);

  const showParts = () => {
    const { isSeries, channels } = facts.modalities[at("modality").value];
    for (const part of parts) {
      const [, number] = /^map-(\d+)$/.exec(part.name) ?? [];
      const isOfDwi = [".bval", ".bvec"].some((end) => part.name.endsWith(end));
      part.label.hidden = number ? number > channels.length : isOfDwi ? channels.length < 2
        : part.name === "scan.json" ? !isSeries : false;
      const text = part.label.querySelector("span");
      if (number && !part.label.hidden) text.textContent = `${channels[number - 1]} map, if the scan is a ready ${channels[0]} map`;
      if (part.name === "scan") text.textContent = channels.length > 1 ? `DWI, or ready ${channels[0]} map (.nii, .nii.gz)` : "Scan (.nii, .nii.gz)";
    }
  };

  const state = (id, text, isBad = false) => {
    at(id).textContent = text;
    at(id).classList.toggle("bad", isBad);
  };

  const request = async (path, options) => {
    const response = await fetch(path, options).catch(() => {
      throw new Error("umbrella-app does not answer; is it still running?");
    });
    if (response.ok) return response.status === 204 ? null : response.json();
    const { message, reason, meaning, file } = await response.json();
    throw new Error(reason ? `This scan cannot be used: ${given.get(file) ?? file}: ${message} [${reason}]\n${reason}: ${meaning}.` : message);
  };

  const forget = () => {
    key = null;
    at("see").hidden = at("ask").hidden = true;
    at("viewer").removeAttribute("src");
    at("answers").replaceChildren();
    state("question-state", "");
  };

  const readScan = async () => {
    const modality = at("modality").value;
    const files = chosen().map((part) => ({ part, file: part.input.files[0] }));
    const query = new URLSearchParams({ modality });
    const names = new Map();
    for (const { part, file } of files) {
      if (isNifti(part) && !suffixOf(file)) {
        throw new Error(`${file.name}: not a .nii or .nii.gz file. Convert it; umbrella-predict also takes .hdr/.img pairs.`);
      }
      const name = isNifti(part) ? part.name + suffixOf(file) : part.name;
      query.set(name, file.size);
      names.set(name, file.name);
    }
    if (!files.some(({ part }) => part.name === "scan")) throw new Error("Choose a scan first.");
    const total = files.reduce((sum, { file }) => sum + file.size, 0);
    if (total > facts.maxBytes) {
      throw new Error(`The files have ${(total / 1e9).toPrecision(3)} GB, and at most ${facts.maxBytes / 1e9} GB are accepted (--max-gb).`);
    }
    forget();
    given = names;
    state("scan-state", "Reading the scan …");
    const scan = await request(`scan?${query}`, { method: "POST", body: new Blob(files.map(({ file }) => file)) });
    key = scan.key;
    const [, x, y, z, frames] = scan.shape;
    at("shown-modality").textContent = modality;
    at("shape").textContent = `${x} × ${y} × ${z}`;
    at("frames").textContent = frames ? `, ${frames} frames` : "";
    at("warning").textContent = scan.warning ?? "";
    at("warning").hidden = !scan.warning;
    suggest(facts.questions[modality] ?? []);
    at("see").hidden = at("ask").hidden = false;
    at("viewer").src = `scan/${key}`;
    state("scan-state", "");
    at("question").focus({ preventScroll: true });
  };

  const suggest = (questions) => {
    const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
    at("questions").replaceChildren(...questions.map((text) => make("option", text)));
    at("suggestions").replaceChildren(...questions.slice(0, 4).map((text) => {
      const button = Object.assign(make("button", text), { type: "button" });
      button.onclick = () => { at("question").value = text; };
      return button;
    }));
  };

  const ask = async () => {
    const question = at("question").value;
    state("question-state", "The model answers …");
    const asked = key;
    const { answer } = await request("answer", { method: "POST", body: JSON.stringify({ key, question }) });
    if (asked !== key) return;
    state("question-state", "");
    const [term, words] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = question;
    words.textContent = answer || "(an empty answer)";
    at("answers").prepend(term, words);
  };

  // While one request is answered, no other is sent.
  const run = async (id, action) => {
    for (const button of document.querySelectorAll("button")) button.disabled = true;
    try {
      await action();
    } catch (error) {
      state(id, error.message, true);
    }
    for (const button of document.querySelectorAll("button")) button.disabled = false;
  };
  const remove = (options) => (key ? request(`scan/${key}`, { method: "DELETE", ...options }) : null);

  at("scan-form").onsubmit = (event) => { event.preventDefault(); run("scan-state", readScan); };
  at("question-form").onsubmit = (event) => { event.preventDefault(); run("question-state", ask); };
  // A scan that another window replaced is removed from this page all the same.
  at("remove").onclick = () => run("scan-state", async () => { await Promise.resolve(remove()).finally(forget); });
  at("modality").onchange = showParts;
  window.addEventListener("pagehide", () => { remove({ keepalive: true })?.catch(() => {}); });
  at("viewer").onload = () => {
    const body = at("viewer").contentDocument?.body;
    if (body) new ResizeObserver(() => { at("viewer").style.height = `${body.scrollHeight}px`; }).observe(body);
  };

  at("drop").ondragover = (event) => { event.preventDefault(); at("drop").classList.add("over"); };
  at("drop").ondragleave = () => at("drop").classList.remove("over");
  at("drop").ondrop = (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    const own = event.target.closest("[data-part]");
    const dropped = new Map();
    for (const file of event.dataTransfer.files) {
      // On a field: that one. Beside them: by the end of the name.
      const name = /\.(bval|bvec|json)$/i.exec(file.name)?.[0].toLowerCase();
      const part = own ? parts.find(({ label }) => label === own) : parts.find((each) => each.name === (name ? `scan${name}` : "scan"));
      dropped.set(part, [...(dropped.get(part) ?? []), file]);
    }
    // Which of two files is the scan, and which a map or the mask, is not guessed.
    const several = [...dropped.values()].filter((files) => files.length > 1).flat();
    if (several.length) {
      state("scan-state", `${several.map((file) => file.name).join(", ")}: nothing was chosen. Drop each file on its own field, or choose it there.`, true);
      return;
    }
    if (at("scan-state").classList.contains("bad")) state("scan-state", "");
    for (const [part, [file]] of dropped) {
      const list = new DataTransfer();
      list.items.add(file);
      part.input.files = list.files;
    }
  };
  // A file that is dropped beside the fields would replace the page.
  for (const type of ["dragover", "drop"]) window.addEventListener(type, (event) => event.preventDefault());
  showParts();
})();
