"""A page as a reader of HTML sees it, and as a browser does."""

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DARK, LIGHT = 0, 1  # of preferredColorScheme


class Page(html.parser.HTMLParser):
    """What stands on a page. faults: tags that do not match, repeated ids, and what should not be there at all."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []  # of each element, by its number, its own text
        self.parents: list[str] = []
        self.at: list[int] = []
        self.feed(source)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]
        self.ids = [given["id"] for _, given in self.elements if "id" in given]
        self.faults += [f"id {name} twice" for name in {name for name in self.ids if self.ids.count(name) > 1}]
        for tag, given in self.elements:
            self._check(tag, given)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.parents.append(self.open[-1] if self.open else "")
        self.texts.append("")
        if len(dict(attrs)) != len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)
            self.at.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:]}")
            return
        self.open.pop()
        self.at.pop()

    def handle_data(self, data):
        if self.at:
            self.texts[self.at[-1]] += data

    def handle_comment(self, data):
        self.faults.append(f"comment {data!r}")

    def _check(self, tag, given):
        if tag in {
            "script",
            "iframe",
            "object",
            "embed",
            "link",
            "img",
            "form",
            "base",
            "use",
            "image",
            "foreignobject",
        }:
            self.faults.append(f"<{tag}>")
        for name, value in given.items():
            if name.startswith("on") or name in {"src", "srcset", "action", "xlink:href", "srcdoc"}:
                self.faults.append(f"{name} of <{tag}>")
            if name == "href" and (value or "").removeprefix("#") not in self.ids:
                self.faults.append(f"href {value} leads nowhere on the page")
            if name == "style" and not re.fullmatch(r"width:\d+(\.\d+)?%", value or ""):
                self.faults.append(f"style {value}")
        for name in (given.get("aria-labelledby") or "").split():
            if name not in self.ids:
                self.faults.append(f"<{tag}> is labelled by {name}, which is not there")
        if tag == "svg" and not (given.get("role") == "img" and given.get("aria-labelledby")):
            self.faults.append("a drawing without a name")

    def inside(self, outer: str, tag: str) -> list[str]:
        """Own texts of the elements with this tag that are children of one with the other."""
        return [
            text
            for (own, _), text, parent in zip(self.elements, self.texts, self.parents, strict=True)
            if (own, parent) == (tag, outer)
        ]

    def named(self, tag: str) -> list[str]:
        """Own texts of the elements with this tag."""
        return [text for (own, _), text in zip(self.elements, self.texts, strict=True) if own == tag]


def browse(
    file: Path, *flags: str, width: int = 1280, scheme: int = LIGHT, profile: Path
) -> subprocess.CompletedProcess:
    """Opens a file in a browser without a window, which writes what `flags` ask for. stderr has its console."""
    assert BROWSER is not None
    command = [
        BROWSER,
        *("--headless", "--hide-scrollbars", *FLAGS),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", f"--window-size={width},1600"),
        f"--blink-settings=preferredColorScheme={scheme}",
        *flags,
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    return done


def console(done: subprocess.CompletedProcess) -> list[str]:
    """What pages said on the console: warnings and errors of scripts, styles and the policy."""
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
