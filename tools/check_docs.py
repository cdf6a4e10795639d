"""make docs: the documentation's relative links lead somewhere, and its Python code is Python.

Links to #headings are checked too. With --run, the Python blocks of README.md are also executed,
one after the other in one namespace.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listing.stdout.split("\n") if (ROOT / name).is_file()]


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text())
    titles = re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue  # of the web
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{page.relative_to(ROOT)}: link to {link}, which does not exist"
        elif anchor and target.suffix == ".md" and anchor not in headings(target):
            yield f"{page.relative_to(ROOT)}: link to {link}, which has no such heading"


def broken_code(page: Path) -> Iterator[str]:
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            try:
                compile(code, str(page), "exec")
            except SyntaxError as error:
                yield f"{page.relative_to(ROOT)}: {error}: {error.text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", action="store_true", help="execute the README's Python code")
    options = parser.parse_args()

    found = pages()
    problems = [p for page in found for check in (broken_links, broken_code) for p in check(page)]
    print(*(problems or [f"{len(found)} pages: all links and code blocks are sound"]), sep="\n")
    readme = ROOT / "README.md"
    if options.run and readme.exists():
        namespace: dict[str, object] = {"__name__": "readme"}
        for language, code in BLOCK.findall(readme.read_text()):
            if language == "python":
                exec(compile(code, str(readme), "exec"), namespace)
        print("README.md: its Python code runs")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
