"Champion and candidate side by side: two bundles whose private packages have one name and two versions, each with the textrelay it was sealed with."

import shutil
import zipfile
from pathlib import Path

from conftest import LABELS, ROOT, TEXTS, seal
from textrelay.batch import score_apart
from textrelay.core import read_json, write_json
from textrelay.judging import judge_scores

FILTER = '''import textrelay
from textrelay.filters import Filter

class Marks(Filter):
    "Holds back what it was told, and says which code held it back."

    def apply(self, record):
        return self.hold(record, "suppressed", "acme:{version}:" + textrelay.SEALED_WITH) if {version} == 2 and "budget" in record["text"] else record
'''


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    info = f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as z:
        for path, text in {**files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", f"{info}/RECORD": ""}.items():
            z.writestr(path, text)


def bundle(tiny_bundle: Path, folder: Path, version: int) -> Path:
    shutil.copytree(tiny_bundle, folder)
    wheel(folder / "wheels", "acme_filters", f"{version}.0", {"acme_filters/__init__.py": FILTER.replace("{version}", str(version))})
    code = {f"textrelay/{f.name}": f.read_text() for f in (ROOT / "src_generated/textrelay").glob("*.py")}
    code["textrelay/__init__.py"] += f'\nSEALED_WITH = "textrelay-of-{version}"\n'
    wheel(folder / "wheels", "textrelay", "0.0.1", code)
    model = read_json(folder / "model/model.json")
    write_json(folder / "model/model.json", {**model, "before": [*model["before"], {"class": "acme_filters.Marks", "params": {}}]})
    return seal(folder)


def test_two_versions_of_one_private_package_share_no_code(tiny_bundle, tmp_path, state):
    old, new = (bundle(tiny_bundle, tmp_path / f"v{version}", version) for version in (1, 2))
    items = [{"id": f"m{n}", "text": f"{TEXTS[n % 6]} {n}"} for n in range(90)]
    y = [LABELS[n % 3] for n in range(90)]
    champion, candidate = (score_apart(folder, items, y, dataset="sha256:d") for folder in (old, new))
    assert set(champion.status) == {"scored"}
    held = {i for i, status in zip(candidate.ids, candidate.status, strict=True) if status == "suppressed"}
    assert held == {f"m{n}" for n in range(90) if n % 6 == 1}
    assert {r for r in candidate.reason if r} == {"acme:2:textrelay-of-2"}, "code of the bundle itself, textrelay's too"
    assert champion.model != candidate.model and (candidate.ms > 0).all()

    digests = (candidate.model, champion.model)
    rules = [{"metric": "coverage", "not_worse_than": "champion", "margin": 0.02}, {"metric": "rate.acme", "between": [0.1, 0.2]}]
    verdict = judge_scores(rules, candidate, champion, leaks=[], digests=digests)
    assert [c["outcome"] for c in verdict.checks] == ["PASS", "PASS", "PASS", "FAIL", "PASS"], str(verdict)
    swapped = judge_scores(rules[:1], champion, candidate, leaks=[], digests=digests)
    assert swapped.outcome == "INCONCLUSIVE" and "are the tables swapped?" in str(swapped)
