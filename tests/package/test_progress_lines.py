"""Progress where there is no terminal."""

import io
import sys
import warnings

import pytest
from tqdm.auto import tqdm

from saelens_cosine.cli import main
from saelens_cosine.terminal.bar import progress_bar, progress_lines
from saelens_cosine.terminal.lines import ProgressLines, lasting

WIDE = {"COLUMNS": "200", "TERM": "xterm"}


class Log:
    """What is said, and a clock that a test sets."""

    def __init__(self):
        self.said, self.now = [], 100.0
        self.lines = ProgressLines(self.said.append, lambda: self.now)

    def at(self, now, what, done, total):
        self.now = 100.0 + now
        before = len(self.said)
        self.lines(what, done, total)
        return self.said[before:]


@pytest.fixture
def log():
    return Log()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def gone(*_, **__):
    raise OSError(5, "Input/output error")


def test_a_stage_has_a_line_at_its_start_one_a_minute_and_one_at_its_end(log):
    what, total = "Training, seed 1 of 3", 1_000_000
    assert log.at(0, what, 0, total) == [f"{what}: 0 of 1,000,000 (0 %)"]
    for second in range(1, 196):
        said = log.at(second, what, 5120 * second, total)
        left = {60: "692,800", 120: "385,600", 180: "78,400"}
        assert bool(said) == (second in left), second
        if said:
            done = 5120 * second
            assert said[0].startswith(f"{what}: {done:,} of 1,000,000 ({done // 10_000} %), 5,120 a second, ")
            assert said[0].endswith(" left")
    assert log.said[1].endswith("2 min left")
    assert log.said[-1].endswith("15 s left")
    assert log.at(200, what, total, total) == [f"{what}: 1,000,000 of 1,000,000 (100 %), done in 3 min, 5,000 a second"]
    assert log.at(300, what, total, total) == []
    log.lines.end()
    assert len(log.said) == 5


def test_a_run_that_goes_on_has_the_rate_of_what_it_has_done_itself(log):
    log.at(0, "Training", 900_000, 1_000_000)
    assert log.at(60, "Training", 906_000, 1_000_000) == [
        "Training: 906,000 of 1,000,000 (90 %), 100 a second, 16 min left"
    ]


def test_the_next_stage_ends_one_of_which_nothing_is_counted(log):
    assert log.at(0, "Loading the model", 0, 1) == ["Loading the model: begun"]
    assert log.at(4.2, "Training", 0, 50) == ["Loading the model: done in 4.2 s", "Training: 0 of 50 (0 %)"]
    log.now += 7
    log.lines.end()
    assert log.said[-1] == "Training: done in 7.0 s"


def test_stages_that_share_a_count_share_its_rate_and_short_ones_have_no_end(log):
    log.at(0, "a: fve", 0, 24)
    assert log.at(120, "a: probing", 2, 24) == [
        "a: fve: done in 2 min",
        "a: probing: 2 of 24 (8 %), 1.0 a minute, 22 min left",
    ]
    assert log.at(120.5, "b: fve", 3, 24) == ["b: fve: 3 of 24 (12 %), 1.5 a minute, 14 min left"]
    assert log.at(120.6, "Evaluated", 24, 24) == ["Evaluated: 24 of 24 (100 %)"]


def test_a_stage_that_comes_again_begins_again(log):
    for start in (0, 5):
        assert log.at(start, "Evaluating", 0, 3) == ["Evaluating: 0 of 3 (0 %)"]
        assert log.at(start + 1, "Evaluating", 1, 3) == []
        assert log.at(start + 3, "Evaluating", 3, 3) == ["Evaluating: 3 of 3 (100 %), done in 3.0 s, 1.0 a second"]


def test_a_log_obeys_no_name(log):
    assert log.at(0, "a\x1b[2Jb", 0, 1) == ["a\\x1b[2Jb: begun"]


def test_how_long_something_lasts():
    assert [lasting(seconds) for seconds in (0, 3.21, 42.4, 61, 420, 7499, 7500)] == [
        "0.0 s",
        "3.2 s",
        "42 s",
        "1 min",
        "7 min",
        "2 h 5 min",
        "2 h 5 min",
    ]


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_bar_is_drawn_on_a_terminal_only_and_nothing_but_warnings_if_quiet(stream, quiet, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in WIDE.items():
        monkeypatch.setenv(name, value)
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    with progress_bar(quiet) as progress:
        progress("Probing", 0, 2)
        for _ in range(2):
            warnings.warn("lbfgs failed [status=1]:\nINCREASE the number of iterations", stacklevel=1)
        progress("Probing", 2, 2)
    said = err.getvalue()
    assert said.count("UserWarning: lbfgs failed [status=1]:") == 1
    assert "INCREASE" not in said
    assert ("Probing" in said) != quiet
    assert ("\x1b" in said or "━" in said) == (stream is Terminal and not quiet)
    if stream is io.StringIO and not quiet:
        lines = said.splitlines()
        assert lines[:2] == ["Probing: 0 of 2 (0 %)", "UserWarning: lbfgs failed [status=1]:"]
        assert lines[2].startswith("Probing: 2 of 2 (100 %), done in 0.")
        assert len(lines) == 3


def test_a_log_that_is_gone_ends_no_run(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(err, "write", gone)
    monkeypatch.setattr(err, "flush", gone)
    monkeypatch.setattr(sys, "stderr", err)
    with progress_bar(quiet=False) as progress:
        progress("Probing", 0, 2)
        progress("Probing", 2, 2)


def test_what_fails_has_no_line_that_says_it_is_done(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)

    def fail():
        with progress_bar(quiet=False) as progress:
            progress("Probing", 0, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "Probing: 0 of 2" in err.getvalue()
    assert "done" not in err.getvalue()


def test_train_has_lines_or_saelens_bar_or_nothing(monkeypatch):
    """And tqdm is as it was afterwards."""

    def patched():
        return vars(tqdm).get("__init__")

    before = patched()
    for stream, quiet, lines, bar in (
        (io.StringIO, False, True, False),
        (io.StringIO, True, False, False),
        (Terminal, False, False, True),
        (Terminal, True, False, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream())
        with progress_lines(quiet) as progress:
            assert (progress is not None) == lines
            assert (patched() is before) == bar
        assert patched() is before


FLAGS = [
    *("--architecture", "cosine_topk", "--model_name", "bundled", "--dataset_path", "bundled"),
    *("--hook_name", "blocks.0.hook_resid_post", "--d_in", "192", "--d_sae", "32", "--k", "4"),
    *("--training_tokens", "2048", "--train_batch_size_tokens", "512", "--context_size", "64"),
    *("--log_to_wandb", "false", "--checkpoint_path", "none", "--n_batches_in_buffer", "8"),
]


def test_train_tells_of_its_stages_without_a_terminal(tmp_path, capsys):
    assert main(["train", *FLAGS, "--output_path", str(tmp_path / "sae")]) == 0
    said = capsys.readouterr().err
    assert "Loading the model and the text: begun\n" in said
    assert "\nTraining: 0 of 2,048 (0 %)\n" in said
    assert "\nTraining: 2,048 of 2,048 (100 %), done in " in said
    assert "Training SAE" not in said  # SAELens' bar
    assert main(["train", *FLAGS, "--output_path", str(tmp_path / "again"), "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "Training" not in said
    assert "Loading" not in said
    assert "High-norm tokens dropped" in said
