"""What Chromium makes of a page: a picture of it, and how it is laid out on a screen of some width."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
FRAME = """<!doctype html>
<iframe src="page.html" style="width:{width}px;height:800px;border:0"></iframe><pre></pre>
<script>
onload = () => {{
  const {{document: page, performance}} = frames[0], root = page.documentElement;
  const scrolls = element => element && (getComputedStyle(element).overflowX != "visible" || scrolls(above(element)));
  const above = element => element.parentElement;
  const beyond = [...page.body.querySelectorAll("*")].filter(
    element => element.getBoundingClientRect().right > root.clientWidth + 0.5 && !scrolls(above(element)));
  document.querySelector("pre").textContent = JSON.stringify({{
    screen: root.clientWidth, page: root.scrollWidth, beyond: beyond.map(element => element.outerHTML.slice(0, 200)),
    requests: performance.getEntriesByType("resource").map(entry => entry.name)}});
}}
</script>"""
"""Shows a page on a screen of a given width, and measures it: the pages themselves may not run scripts."""


def layout(page: str, folder: Path, width: int) -> dict[str, Any]:
    """Lay out a page, without the policy that would block its requests.

    Returns:
        `screen` and `page`, their widths in pixels; `beyond`, elements that reach past the screen and are in nothing
        that scrolls; and `requests`, what the page asked for.
    """
    (folder / "page.html").write_text(CSP.sub("", page))
    (folder / "frame.html").write_text(FRAME.format(width=width))
    run(folder, "--allow-file-access-from-files", "--dump-dom", "--window-size=1600,900", f"file://{folder}/frame.html")
    measured = re.search(r"<pre>(.*?)</pre>", (folder / "output").read_text(), re.DOTALL)
    assert measured and measured[1], "the page was not measured"
    return json.loads(unescape(measured[1]))


def run(folder: Path, *arguments: str) -> None:
    """Run Chromium without a screen and without any host that it could reach. Its output goes to folder/output."""
    if BROWSER is None:
        pytest.skip("no chromium on PATH")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    # Chromium's helper processes outlive it for a moment: with pipes, run() would wait for them too.
    with (folder / "output").open("w") as output:
        command = [BROWSER, *options, *arguments]
        subprocess.run(command, check=True, stdout=output, stderr=subprocess.DEVNULL, timeout=300, env=environment)
