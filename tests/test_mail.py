"""Mail rules measured on real mail: 32 replies, 18 header cases, 40 bounces and 4 automatic replies (../shared/fixtures, see SOURCE.md there)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from textrelay.mail import automatic_kind, current_reply, cut_with_quotequail, parse_mail, text_to_mail

SHARED = Path(os.environ.get("TEXTRELAY_SHARED", str(Path(__file__).parents[2] / "shared")))
FIXTURES = SHARED / "fixtures"
with_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(),
    reason=f"{FIXTURES} is missing: copy discourse/email_reply_trimmer's test data and sisimai/set-of-emails there, or set TEXTRELAY_SHARED",
)


def files(folder: str) -> list[Path]:
    found = sorted((FIXTURES / folder).iterdir())
    assert found, f"{FIXTURES / folder} is empty"
    return found


def normal(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def measure(cut: Callable[[str], str]) -> dict[str, int]:
    "Counts over the replies: exact, emptied, lost (words of the reply are missing) and leaked (other words are left)."
    figures = Counter(files=0, exact=0, emptied=0, lost=0, leaked=0)
    for path in files("replies/emails"):
        wanted = normal((FIXTURES / "replies/trimmed" / path.name).read_text(encoding="utf-8"))
        got = normal(cut(path.read_text(encoding="utf-8")))
        wanted_words, got_words = Counter(wanted.split()), Counter(got.split())
        figures["files"] += 1
        figures["exact"] += got == wanted
        figures["emptied"] += not got
        figures["lost"] += bool(wanted_words - got_words)
        figures["leaked"] += bool(got_words - wanted_words)
    return dict(figures)


@with_fixtures
def test_replies_are_cut_and_never_emptied() -> None:
    figures = measure(current_reply)
    print("replies, default:          ", figures)
    assert figures["files"] == 32
    assert figures["exact"] >= 22
    assert figures["emptied"] == 0
    assert figures["lost"] <= 1
    assert figures["leaked"] <= 3


@with_fixtures
def test_the_default_beats_the_library_alone() -> None:
    alone = measure(lambda text: current_reply(text, cut=cut_with_quotequail))
    print("replies, quotequail guarded:", alone)
    assert alone["emptied"] == 0
    assert measure(current_reply)["exact"] > alone["exact"]


@with_fixtures
@pytest.mark.parametrize(
    ("bulk", "suppress", "right"),
    [(True, True, 18), (True, False, 17), (False, False, 13)],  # the corpus calls bulk and a bare X-Auto-Response-Suppress automatic
)
def test_header_cases(bulk: bool, suppress: bool, right: int) -> None:
    cases = json.loads((FIXTURES / "autoreply/header_cases.json").read_text(encoding="utf-8"))
    rows = [(name, value, True) for name, value in cases["positive"]] + [(name, value, False) for name, value in cases["negative"]]
    assert len(rows) == 18
    found = [
        automatic_kind(text_to_mail("Some text.", headers={name: value}), bulk_is_automatic=bulk, suppress_is_automatic=suppress) is not None
        for name, value, _ in rows
    ]
    assert sum(got == wanted for got, (_, _, wanted) in zip(found, rows, strict=True)) == right


@with_fixtures
def test_bounces_are_bounces() -> None:
    kinds = {path.name: automatic_kind(parse_mail(path.read_bytes())) for path in files("autoreply/bounce")}
    others = {name: kind for name, kind in kinds.items() if kind is None or kind[0] != "bounce"}
    print("bounces:", len(kinds) - len(others), "of", len(kinds), others)
    assert len(kinds) == 40
    assert len(others) <= 1
    assert None not in others.values()  # whatever its name, none is a person


@with_fixtures
def test_automatic_replies_are_absences() -> None:
    kinds = {path.name: automatic_kind(parse_mail(path.read_bytes())) for path in files("autoreply/auto")}
    assert len(kinds) == 4
    assert {kind and kind[0] for kind in kinds.values()} == {"out_of_office"}


@with_fixtures
def test_real_replies_of_people_are_human() -> None:
    called = [path.name for path in files("replies/emails") if automatic_kind(text_to_mail(path.read_text(encoding="utf-8"), "Re: Offer"))]
    assert called == []


@with_fixtures
def test_no_truncation_of_a_real_mail_raises() -> None:
    for path in files("autoreply/bounce"):
        raw = path.read_bytes()
        for end in range(0, len(raw), max(1, len(raw) // 40)):
            automatic_kind(parse_mail(raw[:end]))


@pytest.mark.parametrize(
    "text",
    [
        "> a\nOn hello\n" * 40_000,
        "On Mon, Feb 1, 2021 at 6:32 PM, Bob <b@example.com> wrote:\n" * 20_000,
        "a" * 500_000,
        "a " * 250_000,
        "\n" * 500_000,
        "From: a\n" * 50_000,
        "-" * 300_000,
        "automatic " * 50_000,
        "for " * 100_000,
        "<div>" * 100_000,
    ],
    ids=["quotes", "attributions", "one-word", "one-line", "newlines", "labels", "dashes", "automatic", "for", "divs"],
)
def test_half_a_megabyte_of_anything_takes_seconds_at_most(text: str) -> None:
    started = time.perf_counter()
    automatic_kind(text_to_mail(text))
    parse_mail(b"Content-Type: text/html\n\n" + text.encode())
    assert time.perf_counter() - started < 5


def test_reading_mail_imports_nothing_heavy() -> None:
    heavy = "torch transformers mlflow papermill boto3 sagemaker pandas sklearn"
    code = f"import sys, textrelay.mail; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
