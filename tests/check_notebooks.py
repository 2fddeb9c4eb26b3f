"""make check: notebooks are clean, the export is a no-op, README is what index.ipynb says, and nothing shown names a path of the machine it was made on.

Whatever is not so is put right in place and named; then it only has to be committed. Exit code 1 if anything changed."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from textrelay.core import manifest

ROOT = Path(__file__).parents[1]


def readme() -> str:
    "README.md as made from nbs/index.ipynb; pictures lie beside the notebook."
    notebook = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = text.replace("](images/", "](nbs/images/")
    return "<!-- made from nbs/index.ipynb by `make check`; edit that -->\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def state() -> dict[str, str]:
    found = {f"{top}/{name}": digest for top in ("nbs", "src_generated/textrelay") for name, digest in manifest(ROOT / top).items()}
    return {k: v for k, v in found.items() if "__pycache__" not in k and ".ipynb_checkpoints" not in k}


def of_this_machine() -> list[str]:
    "Notebooks with an output that names where something was installed or checked out, such as a library's warning does."
    shown = {p: "".join(str(c.get("outputs", "")) for c in nbformat.read(p, as_version=4).cells) for p in sorted((ROOT / "nbs").rglob("*.ipynb"))}
    return [str(p.relative_to(ROOT)) for p, text in shown.items() if "site-packages" in text or f"{ROOT}/" in text]


def main() -> int:
    before = state()
    if not any(name.endswith(".ipynb") for name in before):
        print("no notebooks found below nbs", file=sys.stderr)
        return 1
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([str(Path(sys.executable).parent / command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = state()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    text = readme()
    if not (ROOT / "README.md").is_file() or (ROOT / "README.md").read_text(encoding="utf-8") != text:
        (ROOT / "README.md").write_text(text, encoding="utf-8")
        changed.append("README.md")
    placed = of_this_machine()
    for name in placed:
        print(f"{name}: an output names a path of this machine; run that cell again without the warning, or leave the path out", file=sys.stderr)
    for name in changed:
        print(f"{name}: was not as the notebooks say; it is now, commit it", file=sys.stderr)
    return 1 if changed or placed else 0


if __name__ == "__main__":
    sys.exit(main())
