// Starts a NiiVue viewer in each <details class="scan-viewer"> when it is opened. A browser keeps about 16 WebGL
// contexts: one viewer of a page is open at a time, and its context is released when it is closed.
(() => {
  "use strict";
  const STYLE = `
.scan-viewer { margin: .6rem 0; } .scan-viewer > summary { cursor: pointer; }
.scan-viewer-place { container-type: inline-size; }
.scan-viewer-canvas { position: relative; width: 100%; aspect-ratio: 5 / 2; background: #000; margin: .5rem 0; overflow: hidden; }
.scan-viewer-canvas canvas { display: block; position: absolute; left: 0; top: 0; outline: none; }
.scan-viewer-controls { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; font-size: .9rem; }
.scan-viewer-controls label { display: flex; align-items: center; gap: .4rem; }
.scan-viewer p { margin: .3rem 0; font-size: .9rem; } .scan-viewer-value { font-variant-numeric: tabular-nums; }
@container (max-width: 600px) { .scan-viewer-canvas { aspect-ratio: 1; } }
@media print { .scan-viewer { display: none; } }`;
  let current = null;

  const add = (parent, tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text) element.textContent = text;
    parent.append(element);
    return element;
  };
  const control = (parent, text, tag, attributes) => {
    const label = add(parent, "label", "", text);
    const input = add(label, tag);
    Object.assign(input, attributes);
    return input;
  };

  async function open(details) {
    if (current && current !== details) close(current);
    current = details;
    const data = JSON.parse(details.querySelector('script[type="application/json"]').textContent);
    const place = add(details, "div", "scan-viewer-place");
    const canvas = add(add(place, "div", "scan-viewer-canvas"), "canvas");
    const controls = add(place, "div", "scan-viewer-controls");
    const value = add(place, "p", "scan-viewer-value");
    const side = add(place, "p", "scan-viewer-side");
    if (data.num_frames > data.frames.length) {
      add(place, "p", "", `Frames in this page: ${data.frames.join(", ")} of ${data.num_frames}.`);
    }
    if (!document.createElement("canvas").getContext("webgl2")) {
      place.replaceChildren("This browser cannot show the scan: it has no WebGL2.");
      return;
    }
    const nv = new niivue.Niivue({
      dragAndDropEnabled: false, isNearestInterpolation: true, multiplanarShowRender: niivue.SHOW_RENDER.NEVER,
      multiplanarPadPixels: 4, crosshairColor: [0.2, 0.7, 1, 1], crosshairWidth: 0.5, crosshairWidthUnit: "percent",
      crosshairGap: 4, showAllOrientationMarkers: true, fontMinPx: 16, fontColor: [1, 0.84, 0, 1], logLevel: "error",
    });
    details.viewer = nv;
    await nv.attachToCanvas(canvas);
    nv.setSliceType(nv.sliceTypeMultiplanar);
    const opacities = data.overlays.map((overlay) => overlay.opacity);
    let frame = 0;

    const load = (item, colormap, opacity) => niivue.NVImage.loadFromBase64({
      base64: item.nifti, name: `${item.name}.nii.gz`, colormap, opacity, cal_min: item.low, cal_max: item.high,
    });
    const show = async (channel) => {
      const volumes = [await load(channel, "gray", 1)];
      for (const [i, overlay] of data.overlays.entries()) {
        volumes.push(await load(overlay, overlay.colormap, opacities[i]));
      }
      while (nv.volumes.length) nv.removeVolumeByIndex(0);
      volumes.forEach((volume) => nv.addVolume(volume));
      if (frame) nv.setFrame4D(nv.volumes[0].id, frame);
    };
    const describe = (location) => {
      const mm = Array.from(location.mm).slice(0, 3).map((x) => (Math.round(10 * x) / 10 + 0).toFixed(1)).join(", ");
      const named = location.values.slice(1).map((each, i) => `${data.overlays[i].name} ${+each.value.toPrecision(3)}`);
      const values = [`value ${+location.values[0].value.toPrecision(4)}`, ...named].join(", ");
      value.textContent = `Crosshair: ${values}; ${mm} mm to the right, front and top of the centre.`;
    };
    const face = (isRadiological) => {
      nv.setRadiologicalConvention(isRadiological);
      side.textContent = `The left of the person is on the ${isRadiological ? "right" : "left"} of the picture. ` +
        "Letters: R right, L left, A anterior, P posterior, S superior, I inferior. " +
        "Click to move the crosshair, scroll to change the slice.";
    };

    nv.onLocationChange = describe;
    if (data.channels.length > 1) {
      const select = control(controls, "Channel", "select", {});
      data.channels.forEach((channel) => add(select, "option", "", channel.name));
      select.onchange = () => show(data.channels[select.selectedIndex]);
    }
    if (data.frames.length > 1) {
      const slider = control(controls, "Frame", "input", { type: "range", min: 0, max: data.frames.length - 1, value: 0 });
      const number = add(slider.parentElement, "output", "", String(data.frames[0]));
      slider.oninput = () => {
        frame = Number(slider.value);
        number.textContent = data.frames[frame];
        nv.setFrame4D(nv.volumes[0].id, frame);
        nv.createOnLocationChange();
      };
    }
    data.overlays.forEach((overlay, i) => {
      const slider = control(controls, overlay.name, "input", { type: "range", min: 0, max: 1, step: 0.05, value: overlay.opacity });
      slider.oninput = () => nv.setOpacity(i + 1, opacities[i] = Number(slider.value));
    });
    const radiological = control(controls, "Radiological convention", "input", { type: "checkbox" });
    radiological.onchange = () => face(radiological.checked);
    face(false);
    await show(data.channels[0]);
    nv.createOnLocationChange();
    details.dataset.state = "shown";
  }

  function close(details) {
    if (current === details) current = null;
    details.open = false;
    details.dataset.state = "";
    const nv = details.viewer;
    details.viewer = null;
    if (nv) {
      nv.cleanup();
      nv.gl?.getExtension("WEBGL_lose_context")?.loseContext();
    }
    details.querySelector(".scan-viewer-place")?.remove();
  }

  function toggle(details) {
    const isShown = details.querySelector(".scan-viewer-place") !== null;
    if (details.open && !isShown) {
      open(details).catch((error) => {
        add(details.querySelector(".scan-viewer-place") ?? details, "p", "", `The viewer failed: ${error.message}`);
      });
    } else if (!details.open && isShown) close(details);
  }

  function start() {
    add(document.head, "style", "", STYLE);
    for (const details of document.querySelectorAll("details.scan-viewer")) {
      details.addEventListener("toggle", () => toggle(details));
      toggle(details);
    }
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
