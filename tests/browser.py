"""A page in a headless Chromium.

python -m tests.browser runs/toy/report.html assets/page.png     a picture of it
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-extensions --disable-background-networking --hide-scrollbars"
).split()
DUMP = "--dump-dom --allow-file-access-from-files --blink-settings=preferredColorScheme=0"
FRAMES = """<meta name="color-scheme" content="light dark"><body><script>
async function look(address, width, height, scripts) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: ${height}px; border: 0`;
  frame.src = address;
  document.body.append(frame);
  await new Promise((done) => (frame.onload = done));
  const found = scripts.map((text) => {
    const script = frame.contentDocument.createElement("script");
    script.textContent = `window.found = undefined; window.found = (${text})`;
    frame.contentDocument.body.append(script);
    return [text, frame.contentWindow.found];
  });
  return Object.fromEntries(found);
}
addEventListener("load", async () => {
  const found = [];
  for (const view of VIEWS) found.push(await look(ADDRESS, ...view));
  document.body.textContent = JSON.stringify(found);
});
</script>"""


def chromium(address, *flags):
    """What it prints."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", address]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=60)


def look_at(file, address, *views):
    """What scripts give, one after the other, in frames that show a page and prefer dark colors: a
    dict for each view. file: is written. views: (width, height, scripts)."""
    views = [(width, height, [*scripts]) for width, height, scripts in views]
    parts = {"ADDRESS": json.dumps(address), "VIEWS": json.dumps(views).replace("<", "\\u003c")}
    file.write_text(re.sub("ADDRESS|VIEWS", lambda match: parts[match[0]], FRAMES))
    page = chromium(file.as_uri(), *DUMP.split(), "--virtual-time-budget=10000")
    return json.loads(html.unescape(re.search("<body>(.*)</body>", page, re.S)[1]))


if __name__ == "__main__":
    address = Path(sys.argv[1]).resolve().as_uri()
    chromium(address, "--window-size=1280,800", f"--screenshot={Path(sys.argv[2]).resolve()}")
