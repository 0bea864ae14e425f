"""A page in a headless Chromium, spoken to over a pipe (the DevTools protocol).

python -m tests.browser "runs/toy/report.html#order=gain" assets/page.png     a picture of it
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-extensions --disable-background-networking --remote-debugging-pipe"
).split()


@contextmanager
def browser():
    """-> send(method, session, **parameters) -> the result, a dict. Raises RuntimeError with what
    the browser says is wrong."""
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    # It reads its commands from file descriptor 3 and answers on 4, each ended by a null byte
    wiring = f'exec 3<&{commands} 4>&{answers}; exec "$@"'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["bash", "-c", wiring, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        numbers = itertools.count(1)

        def send(method, session=None, **parameters):
            number = next(numbers)
            command = {"id": number, "method": method, "params": parameters}
            if session:
                command["sessionId"] = session
            os.write(to_browser, json.dumps(command).encode() + b"\0")
            message = {}
            while message.get("id") != number:  # the others are events
                message = read_message(file)
            if "error" in message:
                raise RuntimeError(f"{method}: {message['error']}")
            return message["result"]

        with os.fdopen(from_browser, "rb") as file:
            try:
                yield send
            finally:
                process.terminate()
                process.wait()
                os.close(to_browser)


def read_message(file):
    message = bytearray()
    while (byte := file.read(1)) != b"\0":
        if not byte:
            raise RuntimeError("the browser has gone")
        message += byte
    return json.loads(message)


@contextmanager
def tab(send, address, *, width=1280, height=900, scheme="light"):
    """A tab of the browser with a page -> (run, ask): run(script) gives a script's value, as JSON
    knows it; ask(method, **parameters) speaks to the tab."""
    target = send("Target.createTarget", url="about:blank")["targetId"]
    session = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(method, **parameters):
        return send(method, session, **parameters)

    def run(script):
        options = dict(expression=script, awaitPromise=True, returnByValue=True)
        result = ask("Runtime.evaluate", **options)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    ask("Emulation.setDeviceMetricsOverride", **size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    ask("Emulation.setEmulatedMedia", features=features)
    ask("Page.navigate", url=address)
    run("new Promise(r => document.readyState == 'complete' ? r() : addEventListener('load', r))")
    yield run, ask
    send("Target.closeTarget", targetId=target)


def picture_of(page, view, path):
    """Writes what a window of 1280 x 800 pixels shows of a page, opened at a view (or "")."""
    address = Path(page).resolve().as_uri()
    with browser() as send, tab(send, f"{address}#{view}", height=800) as (run, ask):
        run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
        data = ask("Page.captureScreenshot", format="png")["data"]
    Path(path).write_bytes(base64.b64decode(data))


if __name__ == "__main__":
    page, _, view = sys.argv[1].partition("#")
    picture_of(page, view, sys.argv[2])
