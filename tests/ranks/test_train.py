"""`saelens-cosine train` on several ranks: the files of one process, and an end that all ranks share."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import flags

import saelens_cosine
from saelens_cosine.cli import main

CHANGES = {"architecture": "per_feature_cosine_batchtopk", "d_sae": 47, "dead_feature_window_tokens": 512}


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The run of one process, all of its checkpoints kept."""
    output = tmp_path_factory.mktemp("alone") / "sae"
    assert main(["train", *flags(text, output, **CHANGES), "--keep", "9", "--quiet"]) == 0
    return output


def command(text, output, *more, **changes):
    return ["train", *flags(text, output, **{**CHANGES, **changes}), "--quiet", *more]


def tensors(folder):
    return {
        f"{path.name} {name}": t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()
    }


def assert_same_run(one, other, exact=1e-6):
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        torch.testing.assert_close(ours[name], tensor, rtol=exact, atol=exact * tensor.abs().max().item(), msg=name)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    cfgs = [json.loads((folder / "cfg.json").read_text()) for folder in (one, other)]
    assert cfgs[0] == cfgs[1]


def checkpoints(output):
    return output.with_name(f"{output.name}-checkpoints")


def test_two_ranks_write_what_one_process_writes(ranks, text, alone, tmp_path):
    output = tmp_path / "sae"
    found = ranks(*[command(text, output, "--keep", "9")] * 2)
    assert found["statuses"] == [0, 0], found["told"]
    assert "".join(found["told"]).count("Written: ") == 1
    assert_same_run(output, alone)
    names = [sorted(path.name for path in checkpoints(folder).iterdir()) for folder in (output, alone)]
    assert names[0] == names[1]
    newest = [checkpoints(folder) / "4096" for folder in (output, alone)]
    states = [torch.load(folder / "trainer_state.pt") for folder in newest]
    for ours, theirs in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5 * tensor.abs().max().item(), msg=name)
            assert ours[name].stride() == tensor.stride()
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
    assert torch.equal(states[0]["act_freq_scores"], states[1]["act_freq_scores"])


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_goes_on_with_another_number_of_ranks(size, ranks, text, alone, tmp_path):
    output = tmp_path / "sae"
    for tokens in ("1024", "2048"):
        shutil.copytree(checkpoints(alone) / tokens, checkpoints(output) / tokens)
    found = ranks(*[command(text, output, "--resume")] * size)
    assert found["statuses"] == [0] * size, found["told"]
    assert f"Going on from {checkpoints(output) / '2048'}." in found["told"][0]
    assert not any(line for told in found["told"][1:] for line in told.splitlines() if "Going on" in line)
    assert_same_run(output, alone)


def test_what_ranks_have_saved_one_process_goes_on_with(ranks, text, alone, tmp_path):
    output = tmp_path / "sae"
    found = ranks(*[command(text, output, "--keep", "9")] * 2, fault="stop_at_step_9", on=1)
    assert found["statuses"] == [143, 143], found["told"]
    assert "Stopped after 2,304 of 4,096 tokens; all of it is in" in found["told"][0]
    assert "Stopped" not in found["told"][1]
    assert not output.exists()
    assert main(command(text, output, "--resume")) == 0
    assert_same_run(output, alone)


def test_torchrun_starts_again_after_a_rank_was_killed(text, alone, tmp_path):
    output = tmp_path / "sae"
    program = tmp_path / "killed_once.py"
    program.write_text(f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
if __name__ == "__main__":
    from forked_ranks import die_at_step_9
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_at_step_9()
    from saelens_cosine.cli import main
    sys.exit(main())
""")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    run = subprocess.run(
        [*launcher, str(program), *command(text, output, "--resume")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"Going on from {checkpoints(output) / '2048'}." in run.stderr
    assert_same_run(output, alone)


def told_once(found, words):
    lines = [line for told in found["told"] for line in told.splitlines() if words in line]
    assert len(lines) == 1, found["told"]
    assert found["seconds"] < 60
    assert all(found["statuses"])
    assert not any("Traceback" in told for told in found["told"]), found["told"]
    return lines[0]


def test_ranks_with_other_flags_stop(ranks, text, tmp_path):
    output = tmp_path / "sae"
    found = ranks(command(text, output), command(text, output, lr=0.01))
    line = told_once(found, "The ranks of one run need the same flags: ")
    assert "lr is 0.0003 on rank 0 and 0.01 on rank 1" in line
    assert not output.exists()


@pytest.mark.parametrize("on", [0, 1])
def test_a_rank_that_sees_nan_stops_all(on, ranks, text, tmp_path):
    found = ranks(*[command(text, tmp_path / "sae")] * 2, fault="lose_an_activation", on=on)
    assert "activations of the language model" in told_once(found, "are not finite")


def test_an_earlier_run_is_kept_and_all_ranks_stop(ranks, text, alone):
    before = {path: path.stat().st_mtime_ns for path in alone.iterdir()}
    found = ranks(*[command(text, alone)] * 2)
    assert str(checkpoints(alone)) in told_once(found, "earlier run") or str(alone) in told_once(found, "earlier run")
    assert {path: path.stat().st_mtime_ns for path in alone.iterdir()} == before


def test_an_architecture_of_saelens_is_refused(ranks, text, tmp_path):
    found = ranks(*[command(text, tmp_path / "sae", architecture="topk", k=6, dead_feature_window_tokens=None)] * 2)
    assert "trains in one process" in told_once(found, "'topk' is an architecture of SAELens")


def test_reading_ahead_is_refused(ranks, text, tmp_path):
    found = ranks(*[command(text, tmp_path / "sae", "--prefetch_llm_batches", "2")] * 2)
    assert "start it without torchrun" in told_once(found, "--prefetch_llm_batches")


def test_what_is_logged_is_of_the_whole(ranks, text, tmp_path, monkeypatch):
    """Evaluation while training takes text from the stream, so that it ends as one process only if all ranks evaluate alike."""
    logs = {"log_to_wandb": "true", "wandb_log_frequency": 2, "eval_every_n_wandb_logs": 3}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main(command(text, tmp_path / "alone", **logs)) == 0
    found = ranks(*[command(text, tmp_path / "ranks", **logs)] * 2)
    assert found["statuses"] == [0, 0], found["told"]
    assert_same_run(tmp_path / "ranks", tmp_path / "alone")


def test_a_dead_rank_ends_the_others(ranks, text, tmp_path):
    found = ranks(*[command(text, tmp_path / "sae")] * 3, fault="die_at_step_9", on=2)
    assert found["statuses"][2] == -9
    assert all(found["statuses"])
    assert found["seconds"] < 60
    assert not (tmp_path / "sae").exists()
    assert (checkpoints(tmp_path / "sae") / "2048").is_dir()


def test_other_commands_are_refused(ranks, tmp_path):
    found = ranks(*[["convert", str(tmp_path)]] * 2)
    assert found["statuses"] == [2, 2]
    assert "torchrun starts saelens-cosine train or compare or benchmark, not convert" in told_once(found, "torchrun")


def test_nothing_outside_this_room_imports_it_or_anything_distributed():
    """But the command line, once torchrun has started it."""
    found = {}
    for path in Path(saelens_cosine.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith(("saelens_cosine.ranks", "torch.distributed")) and path.parent.name != "ranks":
                    found[path.name] = (name, node.col_offset > 0)
    assert found == {"cli.py": ("saelens_cosine.ranks.launch", True)}
