"""A run's output folder: one run at a time, nobody's files but ours replaced, and nothing lost to a kill."""

import contextlib
import json
import os
import shutil
import signal
import time

import pytest
from foreign import write as write_foreign

from saelens_cosine.cli import main
from saelens_cosine.experiments.compare import run as comparison
from saelens_cosine.experiments.compare.results import Trained, TrainedArm
from saelens_cosine.experiments.compare.run import SAE_FILES, compare, open_comparison
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.training import Setting
from saelens_cosine.files import lock, output
from saelens_cosine.files.lock import LOCK, OutputInUseError, locked
from saelens_cosine.files.manifest import MANIFEST
from saelens_cosine.files.output import open_output


def contents(folder, but=(MANIFEST, LOCK)):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    files = (path for path in files if path.parent.name != ".comparison-run")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def put(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def write(folder, files, overwrite=False, before=(), fails=False):
    """A run that writes files, and may fail when it has."""
    with open_output(folder, "result") as opened:
        opened.begin(before=before, places=files, overwrite=overwrite)
        made = folder / "made"
        opened.add(put(made, files))
        shutil.rmtree(made)
        if fails:
            raise RuntimeError("midway")


def in_a_child(run):
    """The id of a process that runs this, once it has told that it is ready."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(lambda: os.write(tell, b"ready"))
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(ready, 5) == b"ready"
    os.close(ready)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to the folder."""

    def hold(tell):
        with locked(tmp_path):
            tell()
            time.sleep(600)

    child = in_a_child(hold)
    yield child
    with contextlib.suppress(ProcessLookupError):
        kill(child)


def test_a_second_run_refuses_and_names_the_first(holder, tmp_path, capsys):
    for command in (["compare", "--overwrite"], ["evaluate", "no_sae"], ["ground-truth", "--overwrite"]):
        assert main([*command, "--output", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert f"process {holder} on {os.uname().nodename}, started 20" in message, command
        assert str(tmp_path / LOCK) in message
    source = write_foreign("standard", tmp_path.parent / f"{tmp_path.name}-foreign")
    assert main(["convert", str(source), str(tmp_path), "--overwrite"]) == 2
    assert f"process {holder}" in capsys.readouterr().err
    with locked(put(tmp_path / "below", {"file": ""})):  # another folder
        pass


def test_a_second_run_of_the_same_process_refuses_too(tmp_path):
    with locked(tmp_path), pytest.raises(OutputInUseError, match=str(os.getpid())), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_taken_over_and_what_it_left_is_removed(holder, tmp_path):
    kill(holder)
    assert json.loads((tmp_path / LOCK).read_text())["process"] == holder
    left = ".unfinished-0123456789abcdef-x"
    put(tmp_path, {f"{left}/cfg.json": "", f"mine/{left}": "", "ours/.unfinished-note": "", f"ours/{left}": ""})
    outside = put(tmp_path.parent / f"{tmp_path.name}-outside", {left: ""})
    (tmp_path / "our_link").symlink_to(outside)
    with open_output(tmp_path, "result", parts=("our*",)):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert set(contents(tmp_path)) == {f"mine/{left}", "ours/.unfinished-note"}
    assert (outside / left).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path):
    def hold(tell):
        with locked(tmp_path):
            if os.fork() == 0:
                tell()
                time.sleep(5)
                os._exit(0)
            time.sleep(600)

    kill(in_a_child(hold))
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("host", "process", "taken"), [("here", 2**22 + 1, True), ("here", 1, False), ("there", 9, False)]
)
def test_without_locks_of_the_file_system_a_dead_process_of_this_host_counts(
    host, process, taken, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "_flock", lambda _descriptor: None)
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "here")
    (tmp_path / LOCK).write_text(json.dumps({"process": process, "host": host, "started": "2026-01-01"}))
    if taken:
        with locked(tmp_path), pytest.raises(OutputInUseError), locked(tmp_path):
            pass
        assert not (tmp_path / LOCK).exists()
    else:
        with (
            pytest.raises(OutputInUseError, match=f"process {process} on {host}, started 2026-01-01"),
            locked(tmp_path),
        ):
            pass


def test_an_earlier_result_is_replaced_when_told_and_when_the_new_one_is_whole(tmp_path):
    old, new = {"a/one": "1", "b/two": "2", "three": "3"}, {"a/one": "new", "c/four": "new"}
    write(tmp_path, old)
    with pytest.raises(FileExistsError, match="earlier result .a/one, b/two, three.. Pass --overwrite"):
        write(tmp_path, new)
    with pytest.raises(RuntimeError, match="midway"):
        write(tmp_path, new, overwrite=True, fails=True)
    assert contents(tmp_path) == {**old, ".result-new/a/one": "new", ".result-new/c/four": "new"}
    write(tmp_path, {"a/one": "newer"}, overwrite=True)
    assert contents(tmp_path) == {"a/one": "newer"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "a"]


def test_files_and_links_of_others_stay_and_are_never_followed(tmp_path):
    folder, outside = tmp_path / "out", put(tmp_path / "outside", {"seed0/cfg": "theirs"})
    write(folder, {"a/seed0/cfg": "1", "b/seed0/cfg": "1", "c/seed0/cfg": "1", "d/seed0/cfg": "1"})
    put(folder, {"a/seed0/notes": "mine", "a/seeds_of_mine/cfg": "mine", "c/seed0/cfg": "changed by me"})
    shutil.rmtree(folder / "b")
    (folder / "b").symlink_to(outside)
    write(folder, {"a/seed0/cfg": "2"}, overwrite=True)
    kept = {"a/seed0/notes": "mine", "a/seeds_of_mine/cfg": "mine", "c/seed0/cfg": "changed by me"}
    assert contents(folder) == {"a/seed0/cfg": "2", **kept}
    for name, why in (("b/seed0/cfg", "b is a link"), ("c/seed0/cfg", "cfg is not as this package wrote it")):
        with pytest.raises(FileExistsError, match=why):
            write(folder, {name: "3"}, overwrite=True)
    assert contents(folder) == {"a/seed0/cfg": "2", **kept}
    assert contents(outside) == {"seed0/cfg": "theirs"}


def test_only_named_files_of_versions_without_a_list_are_replaced(tmp_path):
    put(tmp_path, {"one": "1", "two": "2"})
    with pytest.raises(FileExistsError, match="Pass --overwrite"):
        write(tmp_path, {"three": "3"}, before=["one", "not there"])
    write(tmp_path, {"three": "3"}, before=["one"], overwrite=True)
    assert contents(tmp_path) == {"two": "2", "three": "3"}


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_list_that_names_files_outside_is_refused(name, tmp_path):
    folder = put(tmp_path / "out", {MANIFEST: json.dumps({"files": {"result": {name: [{"size": 0, "sha256": ""}]}}})})
    with pytest.raises(ValueError, match="Move it away"):
        write(folder, {"one": "1"}, overwrite=True)


def test_killed_while_it_replaces_it_is_ended_by_the_next_run(tmp_path):
    """SIGKILL before each step on the disk in turn: what is there is the old result or, once the next run looks, the new."""
    old, new = {"a/one": "1", "b/two": "2", "d/five": "5"}, {"a/one": "new", "c/four": "new"}
    outcomes = []
    for step in range(100):
        folder = tmp_path / str(step)
        write(folder, old)
        if not killed_at(step, lambda folder=folder: write(folder, new, overwrite=True)):
            break
        shutil.rmtree(folder / "made", ignore_errors=True)
        with open_output(folder, "result"):
            pass
        visible = {name: text for name, text in contents(folder).items() if not name.startswith(".")}
        assert visible in (old, new), step
        outcomes.append(visible == new)
        write(folder, new, overwrite=True)
        assert contents(folder) == new, step
    assert outcomes == sorted(outcomes)  # from one step on it is the new one
    assert set(outcomes) == {False, True}
    assert 10 < step < 99


def killed_at(step, run):
    """Whether a child process that runs this was killed before its `step`th change of the disk; else it ended well."""

    def counted(real):
        def call(*arguments, **options):
            nonlocal step
            step -= 1
            if step < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    child = os.fork()
    if child == 0:
        try:
            for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
                setattr(output.Path, name, counted(getattr(output.Path, name)))
            run()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_comparison_that_fails_midway_keeps_the_earlier_one_and_what_it_finished(tmp_path, monkeypatch):
    def sae(folder, content):
        return {f"{folder}/{file}": content for file in SAE_FILES}

    class Nothing:
        hook_name, d_in, dropped_share, kwargs, site = "hook", 4, 0.0, {}, None

        def __init__(self, *_):
            pass

    written = "old"

    def train(_, training, folder, *_args):
        if written == "new" and training.point.seed == 1:
            raise RuntimeError("midway")
        put(folder, sae("cosine_topk", f"{written} {training.point.seed}"))
        return Trained((TrainedArm("cosine_topk", None, 0.0, (), None),), (), 0.0, 1e-3)

    def measure(_, point, *_args):
        return ()

    monkeypatch.setattr(comparison, "load_hooked_model", Nothing)
    monkeypatch.setattr(comparison, "heldout_contexts", Nothing)
    monkeypatch.setattr(comparison, "HeldOut", Nothing)
    monkeypatch.setattr(Setting, "train", train)
    monkeypatch.setattr(Setting, "measure", measure)
    settings = ComparisonSettings(arms=("cosine_topk",), seeds=2)
    compare(settings, tmp_path)
    old = contents(tmp_path)
    assert old == {**sae("cosine_topk/seed0", "old 0"), **sae("cosine_topk/seed1", "old 1")}
    with pytest.raises(FileExistsError, match="earlier comparison"):
        compare(settings, tmp_path)
    written = "new"
    with pytest.raises(RuntimeError, match="midway"):
        compare(settings, tmp_path, overwrite=True)
    assert contents(tmp_path) == {**old, **sae(".comparison-new/cosine_topk/seed0", "new 0")}
    with open_comparison(tmp_path) as opened:
        opened.begin(before=(), places=(), overwrite=False, resume=True)
        assert (opened.results / "cosine_topk" / "seed0" / "cfg.json").read_text() == "new 0"
        opened.add(put(tmp_path / "made", sae("cosine_topk/seed1", "new 1")))
    assert contents(tmp_path) == {**sae("cosine_topk/seed0", "new 0"), **sae("cosine_topk/seed1", "new 1")}
