"""A page in a headless Chromium, spoken to over a pipe (the DevTools protocol)."""

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser():
    """-> send(method, session=None, **parameters) -> the result, a dict. Raises RuntimeError with
    what the browser says is wrong."""
    to_browser, here_out = os.pipe()
    here_in, from_browser = os.pipe()
    # The browser reads file descriptor 3 and writes 4
    wiring = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                "bash", "-c", wiring, "browser", CHROMIUM,
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-first-run", "--disable-extensions", "--disable-background-networking",
                f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
            ],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        answers = os.fdopen(here_in, "rb")
        numbers = itertools.count(1)

        def read():
            message = bytearray()
            while (byte := answers.read(1)) != b"\0":
                if not byte:
                    raise RuntimeError("the browser has gone")
                message += byte
            return json.loads(message)

        def send(method, session=None, **parameters):
            number = next(numbers)
            command = {"id": number, "method": method, "params": parameters}
            if session:
                command["sessionId"] = session
            os.write(here_out, json.dumps(command).encode() + b"\0")
            while True:
                message = read()
                if message.get("id") == number:
                    break
            if "error" in message:
                raise RuntimeError(f"{method}: {message['error']}")
            return message["result"]

        try:
            yield send
        finally:
            process.terminate()
            process.wait()
            os.close(here_out)
            answers.close()


@contextmanager
def opened(address, send, width=1280, height=900):
    """A page of its own -> (run, send): run(script) gives a script's value, as JSON knows it."""
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
    ask("Page.navigate", url=address)
    run("new Promise(r => document.readyState == 'complete' ? r() : addEventListener('load', r))")
    yield run, ask
    send("Target.closeTarget", targetId=target)
