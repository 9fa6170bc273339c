"""Nothing that is planted is found in what may be published, nor in what is printed."""

import json
import logging
import warnings
from pathlib import Path

import pytest
from fake_hub import FakeHub
from helpers import make_sae
from sae_lens import LoggingConfig
from shared_saes import logged_in, save_sae, share  # noqa: F401
from small_runs import HOOK, flags, write_text

from saelens_cosine.bundled import model_folder
from saelens_cosine.cli import main
from saelens_cosine.files.secrets import as_typed, logged_without_secrets, published, scrubbed, without_secrets
from saelens_cosine.saebench import Judge, prepare
from saelens_cosine.saebench.runner import Runner
from saelens_cosine.training.wandb_log import _kept_going

TOKEN = "hf_PlantedPlantedPlanted"
KEY = "planted-judge-key"
PASSWORD = "plantedword"
URL = f"https://planteduser:{PASSWORD}@judge:8000/v1?key=plantedquery"
PLANTED = (TOKEN, KEY, PASSWORD, "planteduser", "plantedquery")


@pytest.fixture
def hub():
    hub = FakeHub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def assert_nowhere(folder: Path, printed: str = "", planted=PLANTED) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for secret in planted:
        assert secret not in printed, secret
        for path in files:
            assert secret.encode() not in path.read_bytes(), (secret, path)


def said(capsys) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no https://me:pass@word@host:80/v1?key=x#y", "no https://host:80/v1"),
        ("no https:/me:word@host/x", "no https:/host/x"),
        ("C:/a?b", "C:/a?b"),
        (f"Invalid token {TOKEN}.", "Invalid token (hidden)."),
        (f"the key is {KEY}", "the key is (hidden)"),
        ("Authorization: Bearer abc.def-1234", "Authorization: Bearer (hidden)"),
        ("token='abc' and api_key=abc", "token='(hidden)' and api_key=(hidden)"),
        ("""{"token": "abc", 'hf_token': 'abc'}""", """{"token": "(hidden)", 'hf_token': '(hidden)'}"""),
        ("sk-abcdefghijklmnopqrst", "(hidden)"),
        ("Authorization: Basic dXNlcjpwdw==", "Authorization: Basic (hidden)"),
        ("Authorization: token abcdef", "Authorization: token (hidden)"),
        ("X-Api-Key: abcdef, Host: a", "X-Api-Key: (hidden), Host: a"),
        ("--token=abc --max-token=5", "--token=(hidden) --max-token=5"),
        ("max_tokens=5, bos_token='<s>', tokens: 3, token: a", "max_tokens=5, bos_token='<s>', tokens: 3, token: a"),
        ("No Hugging Face token. Set HF_TOKEN to a token", "No Hugging Face token. Set HF_TOKEN to a token"),
        ("blocks.3.hook_resid_post, gpt2/res-cosine", "blocks.3.hook_resid_post, gpt2/res-cosine"),
    ],
)
def test_text_without_secrets(text, told):
    assert without_secrets(text) == told
    assert without_secrets(told) == told


def test_what_libraries_log_and_warn_of_is_without_secrets(caplog, capsys):
    with logged_without_secrets():
        logging.getLogger("a_library").warning("HTTP Error 503 while requesting %s %s", "PUT", URL)
        told = warnings.formatwarning(UserWarning(f"no {TOKEN}"), UserWarning, "a.py", 1)
    assert caplog.messages[0] == "HTTP Error 503 while requesting PUT https://judge:8000/v1"
    assert "no (hidden)" in told
    assert TOKEN in warnings.formatwarning(UserWarning(TOKEN), UserWarning, "a.py", 1)


def test_what_follows_a_flag_for_a_secret_is_hidden():
    assert (
        as_typed(["share", "--hf-token", "abc", "--tokens", "5", "a b"])
        == "share --hf-token '(hidden)' --tokens 5 'a b'"
    )


def test_a_key_that_says_nothing_is_not_looked_for(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert without_secrets("there is none") == "there is none"


def test_entries_that_are_called_like_a_secret_go():
    given = {
        "token": "abc",
        "dtype": "float32",
        "more": [{"api_key": "abc", "bos_token": "<s>", "tokens": 5}, {"token": ["abc"], "headers": {"Cookie": "a=b"}}],
        "hf_token": None,
    }
    assert scrubbed(given) == {
        "dtype": "float32",
        "more": [{"bos_token": "<s>", "tokens": 5}, {"headers": {}}],
        "hf_token": None,
    }


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("dataset_path", "/home/me/data/mine.jsonl", "mine.jsonl"),
        ("dataset_path", "~/data/mine", "mine"),
        ("dataset_path", "../data/mine/", "mine"),
        ("dataset_path", "runs/data/mine", "mine"),
        ("dataset_path", "C:\\Users\\me\\mine", "mine"),
        ("dataset_path", "file:///home/me/mine", "mine"),
        ("dataset_path", "owner/name", "owner/name"),
        ("model_name", "/home/me/models/small", "small"),
        ("model_name", "gpt2", "gpt2"),
        ("reason", "No space left: '/home/me/runs/x' and/or so", "No space left: 'x' and/or so"),
        ("reason", "No space left: '/home/me/my runs/x', 1/2 and/or so", "No space left: 'x', 1/2 and/or so"),
        ("path", "cosine_topk/seed0", "cosine_topk/seed0"),
        ("hook_name", "blocks.3.hook_resid_post", "blocks.3.hook_resid_post"),
        ("dataset_path", "https://me:word@host/a/b.jsonl?sig=1", "https://host/a/b.jsonl"),
    ],
)
def test_what_is_published_of_a_place(name, value, told):
    assert published({name: value}) == {name: told}


def test_a_folder_that_is_here_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert published({"model_name": "owner/name"}) == {"model_name": "name"}


def test_a_judge_does_not_show_its_address():
    assert PASSWORD not in repr(Judge("mine", URL, KEY))


def test_what_saebench_prints_is_logged_without_secrets(tmp_path):
    runner = object.__new__(Runner)
    runner.log, runner.quiet, runner.model = tmp_path / "saebench.log", True, None
    with runner._scopes():
        print(f"Incorrect API key provided: {KEY} at {URL}")
    assert "Incorrect API key provided: (hidden) at https://judge:8000/v1\n" in runner.log.read_text()


def test_a_damaged_file_is_not_published(tmp_path, capsys):
    save_sae(tmp_path / "sae")
    (tmp_path / "sae" / "runner_cfg.json").write_text("{")
    assert share(tmp_path / "sae", "--repo", "me/saes", "--dry-run", "--output", tmp_path / "out") == 2
    assert "runner_cfg.json is damaged" in said(capsys)


def test_train_saves_and_says_no_token(tmp_path, capsys):
    text = write_text(tmp_path / "text.jsonl")
    arguments = flags(
        text,
        tmp_path / "out" / "sae",
        model_name=model_folder(),
        model_class_name="AutoModelForCausalLM",
        hook_name="model.layers.0",
        model_from_pretrained_kwargs=json.dumps({"token": TOKEN}),
        training_tokens=1024,
        n_batches_in_buffer=8,
    )
    assert main(["train", *arguments]) == 0, said(capsys)
    assert (tmp_path / "out" / "sae" / "runner_cfg.json").is_file()
    assert [path for path in (tmp_path / "out").rglob("cfg.json") if "checkpoints" in str(path)]
    assert_nowhere(tmp_path / "out", said(capsys))
    arguments[arguments.index("--hook_name") + 1] = "nowhere"
    arguments[arguments.index("--output_path") + 1] = str(tmp_path / "out" / "other")
    assert main(["train", *arguments]) == 2
    assert_nowhere(tmp_path / "out", said(capsys))


def test_compare_saves_and_says_no_secret(tmp_path, capsys):
    small = [
        "--arms",
        "cosine_topk",
        "--hook",
        HOOK,
        "--tokens",
        "8192",
        "--d-sae",
        "32",
        "--k",
        "4",
        "--context-size",
        "32",
    ]
    text = write_text(tmp_path / "text.jsonl")
    out = tmp_path / "out"
    assert main(["compare", *small, "--dataset", str(text), "--eval-tokens", "512", "--output", str(out)]) == 0, said(
        capsys
    )
    assert (out / "comparison.json").is_file()
    assert_nowhere(out, said(capsys))
    assert main(["compare", *small, "--dataset", URL.replace("v1", "x.jsonl"), "--output", str(tmp_path / "no")]) == 2
    assert_nowhere(out, said(capsys))
    assert share(out, "--repo", "me/saes", "--dry-run", "--output", tmp_path / "shared") == 0
    assert (tmp_path / "shared" / "hub" / "comparison.json").is_file()
    assert_nowhere(tmp_path / "shared", planted=(*PLANTED, str(tmp_path)))


def plant(folder: Path) -> Path:
    """An SAE whose files tell a token and where things lie."""
    save_sae(folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {
        "model_name": str(folder.parent / "models" / "small"),
        "dataset_path": str(folder.parent / "data" / "mine.jsonl"),
        "model_from_pretrained_kwargs": {"token": TOKEN, "dtype": "float32"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    runner = {"output_path": str(folder), "model_from_pretrained_kwargs": {"token": TOKEN}, "lr": 3e-4}
    (folder / "runner_cfg.json").write_text(json.dumps(runner))
    return folder


def test_share_publishes_neither_tokens_nor_places(tmp_path, capsys):
    folder = plant(tmp_path / "sae")
    assert share(folder, "--repo", "me/saes", "--dry-run", "--output", tmp_path / "out") == 0
    assert "without their place: model_name 'small', dataset_path 'mine.jsonl'" in said(capsys).replace("\n", " ")
    assert_nowhere(tmp_path / "out", planted=(*PLANTED, str(tmp_path)))
    sent = tmp_path / "out" / "hub" / "blocks.3.hook_resid_post"
    assert json.loads((sent / "runner_cfg.json").read_text()) == {
        "output_path": "sae",
        "model_from_pretrained_kwargs": {},
        "lr": 3e-4,
    }
    metadata = json.loads((sent / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["dataset_path"]) == ("small", "mine.jsonl")
    assert metadata["model_from_pretrained_kwargs"] == {"dtype": "float32"}
    assert "`mine.jsonl`" in (sent / "README.md").read_text()


def test_files_that_tell_nothing_are_published_as_they_are(tmp_path):
    save_sae(tmp_path / "sae")
    assert share(tmp_path / "sae", "--repo", "me/saes", "--dry-run", "--output", tmp_path / "out") == 0
    sent = tmp_path / "out" / "hub" / "blocks.3.hook_resid_post" / "cfg.json"
    assert sent.read_bytes() == (tmp_path / "sae" / "cfg.json").read_bytes()


def test_convert_saves_no_token(tmp_path, capsys):
    assert main(["convert", str(plant(tmp_path / "sae")), str(tmp_path / "out")]) == 0
    assert_nowhere(tmp_path / "out", said(capsys))


def test_a_token_that_the_hub_echoes_is_not_said(tmp_path, logged_in, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # which this Hub does not take
    route = logged_in.route

    def echo(*request):
        status, content, headers = route(*request)
        return status, {"error": f"Invalid token {TOKEN}, Bearer {TOKEN}"} if status == 401 else content, headers

    monkeypatch.setattr(logged_in, "route", echo)
    save_sae(tmp_path / "sae")
    assert share(tmp_path / "sae", "--repo", "me/saes") == 2
    printed = said(capsys)
    assert "nothing was published" in printed
    assert "(hidden)" in printed
    assert_nowhere(tmp_path, printed)


def test_evaluate_saves_and_says_no_secret(tmp_path, capsys):
    sae = make_sae("cosine_topk", d_in=192, d_sae=64)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name, sae.cfg.metadata.dataset_path = "bundled", HOOK, "bundled"
    sae.cfg.metadata.storage_options = {"token": TOKEN}  # any entry
    sae.save_inference_model(tmp_path / "sae")
    out = tmp_path / "out"
    arguments = [
        "--tokens",
        "600",
        "--context-size",
        "32",
        "--evals",
        "reconstruction",
        "--output",
        str(out),
        "--judge-url",
        URL,
    ]
    assert main(["evaluate", str(tmp_path / "sae"), *arguments]) == 0, said(capsys)
    page = (out / "report.html").read_text()
    assert str(tmp_path) not in page  # what is handed around
    assert "evaluate sae --tokens 600" in page
    assert json.loads((out / "evaluation.json").read_text())["saes"][0]["place"] == str(tmp_path / "sae")
    assert_nowhere(out, said(capsys))
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["metadata"]["model_from_pretrained_kwargs"] = {"token": TOKEN}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    assert main(["evaluate", str(tmp_path / "sae"), *arguments[:-2], "--overwrite"]) == 2  # a file asks for nothing
    assert_nowhere(out, said(capsys))


def test_what_saebench_saves_of_an_sae_has_no_secrets(tmp_path):
    sae = prepare(make_sae("cosine_topk"), model_name="bundled", hook_name=HOOK)
    found = {"sae_cfg_dict": {"metadata": {"token": "abc", "said": TOKEN}}, "eval_result_metrics": {"a": {"b": 0.1}}}

    class Row:
        name, module = "core", None

        @staticmethod
        def call(module, config, call):
            (call.output / "x_eval_results.json").write_text(json.dumps(found))

    runner = Runner(tmp_path, None, "cpu", Judge(), None, True)
    runner._call(Row, {}, sae, tmp_path, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "sae_cfg_dict": {"metadata": {"said": "(hidden)"}},
        "eval_result_metrics": {"a": {"b": 0.1}},
    }


def test_a_key_that_wandb_echoes_is_not_said():
    def refuse():
        raise RuntimeError(f"api_key={KEY} is not known")

    with pytest.warns(UserWarning, match=r"api_key=\(hidden\) is not known") as told:
        _kept_going(refuse, LoggingConfig())()
    assert KEY not in str(told[0].message)
