"""The page of an evaluation in a real browser: filters, keyboard, players, phone width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import REPOSITORY
from saved_evaluation import save, saved_line
from webdriver import ENTER, Browser, browser

from soundmind.evaluation import evaluate

CLIP = REPOSITORY / "data/sample/test/0001/question.wav"
ROWS, WRONG = 12, 4
GONE = f"{'gone' * 30}.wav"  # longer than a phone is wide
READY = "return document.body.dataset.ready === 'yes'"
SHOWN = "return document.querySelectorAll('.example:not([hidden])').length"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of twelve spoken answers, four of them wrong; one clip has gone since."""
    folder = tmp_path_factory.mktemp("a report") / "out put"
    (folder / "speech").mkdir(parents=True)
    lines = []
    for index in range(ROWS):
        line = saved_line(index, index % 2, (index % 2) ^ (index < WRONG), "Wug, fep, same.")
        spoken = f"speech/{index} é.wav"
        (folder / spoken).write_bytes(CLIP.read_bytes())
        line |= {
            "question_audio": GONE if index == ROWS - 1 else "speech/0 é.wav",
            "speech_audio": spoken,
            "speech_transcript": "Wug fep same. Answer: not-entailed.",
            "speech_seconds": 3.0,
            "speech_tokens": 150,
            "speech_truncated": False,
            "transcript_verdict": "not-entailed",
        }
        lines.append(line)
    speech = {"recogniser": "stand-in", "speaker": "Chelsie", "max_speech_seconds": 10.0}
    save(folder, lines, output_modality="speech", speech=speech)
    evaluate.finish_evaluation(folder)
    return folder / "report.html"


@pytest.fixture
def window(page: Path) -> Iterator[Browser]:
    with browser() as opened:
        opened.resize(1200, 1000)
        opened.open(page)
        opened.wait_for(READY, True)
        yield opened


def test_the_page_filters_opens_and_plays_without_a_mouse_or_a_network(window: Browser) -> None:
    assert window.run(SHOWN) == ROWS

    window.type("#show", "wrong")
    assert window.run(SHOWN) == WRONG
    status = "return document.querySelector('#count').textContent"
    assert window.run(status) == f"{WRONG} of {ROWS} responses"

    window.type("#words", "0002")
    assert window.run(SHOWN) == 1
    window.type(".example:not([hidden]) > summary", ENTER)
    opened = ".example[open] "
    window.wait_for(f"return document.querySelectorAll('{opened}audio').length", 2)
    assert window.run(f"return document.querySelector('{opened}.thinking').open") is False
    window.type(opened + ".thinking > summary", ENTER)
    assert window.run(f"return document.querySelector('{opened}.thinking').open") is True
    assert "Wug, fep, same." in window.run(f"return document.querySelector('{opened}').innerText")

    played = window.run_async(
        """
        const done = arguments[arguments.length - 1];
        const players = [...document.querySelectorAll("audio")];
        Promise.all(players.map(async (audio) => {
          audio.muted = true;
          await audio.play();
          return [audio.error === null, audio.duration > 1];
        })).then(done, (error) => done(String(error)));
        """
    )
    assert played == [[True, True], [True, True]]

    loaded = window.run(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert all(name.startswith(("file:", "data:", "blob:")) for name in loaded)


def test_a_clip_that_has_gone_is_said_so(window: Browser) -> None:
    window.type("#words", f"{ROWS:04d}")
    window.type(".example:not([hidden]) > summary", ENTER)
    window.wait_for("return document.querySelectorAll('.example[open] audio').length", 1)
    text = window.run("return document.querySelector('.example[open]').innerText")
    assert f"clip not found: {GONE}" in text


def test_the_page_fits_a_phone(window: Browser) -> None:
    window.resize(390, 844)
    window.run("for (const row of document.querySelectorAll('.example')) row.open = true")
    window.wait_for("return document.querySelectorAll('audio').length", 2 * ROWS - 1)
    overflow = window.run("return document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    tall = "return Math.min(...[...document.querySelectorAll('select, input, .example > summary')]"
    assert window.run(tall + ".map((node) => node.getBoundingClientRect().height))") >= 40
