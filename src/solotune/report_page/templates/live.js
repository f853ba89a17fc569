// In a page that `solotune report --live` serves: ask for new points, and load the page again where more has changed.
// The charts take the points by the event `solotune:curves` (charts.js); if they cannot, the page is loaded again.
function solotuneLive(served) {
  "use strict";
  const { files } = served;
  let { since } = served;
  const EVERY = 2000, LATEST = 30000; // ms between two questions, where the server answers and where it does not
  const LEAST = 10000; // ms between two loads for points that the charts cannot take
  const started = Date.now();
  const state = document.createElement("p");
  state.setAttribute("role", "status");
  state.style.cssText =
    "position:fixed;right:12px;bottom:12px;margin:0;padding:4px 10px;border-radius:6px;font:13px system-ui,sans-serif;" +
    "background:Canvas;color:CanvasText;border:1px solid GrayText;z-index:9";
  state.className = "live";
  document.body.append(state);
  const say = (text) => state.textContent !== text && (state.textContent = text);
  say("live"); // it was served just now
  let wait = EVERY;

  function take(found) {
    if (found.restarted || found.files !== files || found.findings) return location.reload();
    if (found.next !== since) {
      const event = new CustomEvent("solotune:curves", { detail: found, cancelable: true });
      const isDrawn = !dispatchEvent(event);
      if (isDrawn) since = found.next;
      else if (Date.now() - started >= LEAST) return location.reload();
    }
    const step = found.last_step ? `, step ${found.last_step.toLocaleString("en")}` : "";
    if (found.last_step || !state.textContent.startsWith("live")) say(`live${step}`);
  }

  async function ask() {
    if (!document.hidden) {
      try {
        const answer = await fetch(`curves.json?since=${since}`, { cache: "no-store" });
        if (!answer.ok) throw new Error(await answer.text());
        take(await answer.json());
        wait = EVERY;
      } catch (error) {
        wait = Math.min(LATEST, wait * 2);
        say("not live: the server does not answer");
      }
    }
    setTimeout(ask, wait);
  }

  document.addEventListener("visibilitychange", () => (wait = EVERY));
  setTimeout(ask, EVERY);
}
