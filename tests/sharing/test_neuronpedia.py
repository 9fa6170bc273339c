"""The upload of feature dashboards against a stub of Neuronpedia on this machine."""

import json
import sys
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import neuronpedia
import pytest
import requests
from helpers import make_sae
from neuronpedia.requests.base_request import NPRequest

from saelens_cosine.cli import main
from saelens_cosine.metrics.dictionary.features import Context, FeatureDashboard, TokenValue
from saelens_cosine.sharing import command
from saelens_cosine.sharing.neuronpedia import upload_dashboards, write_dashboards


class StubNeuronpedia:
    """Sets of sources and the features that they were given; `failures` are statuses to answer uploads with first."""

    def __init__(self):
        self.models, self.sets, self.batches, self.failures, self.calls = {"tiny": 4}, {}, [], [], []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                asked = json.loads(self.rfile.read(length)) if length else {}
                stub.calls.append(f"{self.command} {self.path}")
                status, content = stub.route(self.path.strip("/"), asked, self.headers.get("X-Api-Key"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            do_GET = do_POST = answer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def route(self, path, asked, key):
        if key != "np-key":
            return 401, {}
        if path == "api/model/new":
            self.models[asked["id"]] = asked["layers"]
            return 200, {"id": asked["id"], "layers": asked["layers"], "displayName": None, "website": None}
        if path == "api/source-set/new":
            if asked["modelId"] not in self.models:
                return 400, {"message": "no such model"}
            layers, name, model = self.models[asked["modelId"]], asked["name"], asked["modelId"]
            sources = [{"id": f"{i}-{name}", "modelId": model, "setName": name} for i in range(layers)]
            made = {"name": name, "modelId": model, "description": asked["description"], "urls": [asked["url"]]}
            self.sets[f"{model}/{name}"] = {**made, "sources": sources}
            return 200, self.sets[f"{model}/{name}"]
        if path.startswith("api/source-set/"):
            found = self.sets.get(path.removeprefix("api/source-set/"))
            return (200, found) if found else (404, {})
        assert path == "api/feature/upload-batch"
        if self.failures and (status := self.failures.pop(0)) != 200:
            return status, {"message": "not now"}
        assert len(asked["features"]) <= 128
        self.batches.append(asked)
        return 200, {}


@pytest.fixture
def stub(monkeypatch):
    stub = StubNeuronpedia()
    monkeypatch.setattr(NPRequest, "BASE_URL", f"http://127.0.0.1:{stub.server.server_port}/api")
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "np-key")
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


def dashboards(n=300, density=0.25):
    contexts = (Context(("<s>", " a"), (0.0, 1.5)),)
    return [
        FeatureDashboard(i, density, (TokenValue(" top", 2.0),), (TokenValue(" low", -2.0),), contexts)
        for i in range(n)
    ]


def upload(stub, content, tmp_path, **options):
    waits = {"wait_s": 0.0, "record": tmp_path / "neuronpedia.json"}
    return upload_dashboards(content, "tiny", "set", 2, **{**waits, **options})


def test_features_arrive_in_batches_with_all_that_is_shown(stub, tmp_path, capsys):
    done = []
    url = upload(stub, iter(dashboards()), tmp_path, url="https://example.org/me/saes", on_batch=done.append)
    assert url == "https://neuronpedia.org/tiny/2-set"
    assert [len(batch["features"]) for batch in stub.batches] == [128, 128, 44]
    assert done == [128, 256, 300]
    assert [f["index"] for batch in stub.batches for f in batch["features"]] == list(range(300))
    assert {(batch["modelId"], batch["source"]) for batch in stub.batches} == {("tiny", "2-set")}
    shown = stub.batches[1]["features"][0]
    assert shown["index"] == 128
    assert shown["density"] == 0.25
    assert shown["topLogits"] == [{"token": " top", "value": 2.0}]
    assert shown["bottomLogits"] == [{"token": " low", "value": -2.0}]
    (activation,) = shown["activations"]
    assert (activation["tokens"], activation["values"]) == (["<s>", " a"], [0.0, 1.5])
    assert stub.sets["tiny/set"]["urls"] == ["https://example.org/me/saes"]
    assert capsys.readouterr().out == ""  # the client prints, we don't


def test_a_source_set_that_exists_is_used(stub, tmp_path):
    upload(stub, dashboards(1), tmp_path)
    upload(stub, dashboards(1, density=0.5), tmp_path)
    assert stub.calls.count("POST /api/source-set/new") == 1
    assert "POST /api/model/new" not in stub.calls


def test_a_new_model_is_created_before_its_source_set(stub, tmp_path):
    upload_dashboards(dashboards(1), "mine", "set", 5, new_model_layers=6)
    assert stub.models["mine"] == 6
    assert stub.batches[0]["source"] == "5-set"


def test_an_unknown_model_and_a_missing_layer_are_errors_without_retries(stub, tmp_path):
    with pytest.raises(OSError, match="creating the source set set of the model other failed: .*no such model"):
        upload_dashboards(dashboards(1), "other", "set", 2, wait_s=0.0)
    assert stub.calls.count("POST /api/source-set/new") == 1
    with pytest.raises(ValueError, match="layer 4 not found"):
        upload_dashboards(dashboards(1), "tiny", "set", 4)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(stub, tmp_path, status):
    stub.failures = [200, status, status]
    upload(stub, dashboards(), tmp_path, attempts=3)
    assert [batch["features"][0]["index"] for batch in stub.batches] == [0, 128, 256]


def test_waits_double(stub, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("saelens_cosine.sharing.neuronpedia.time.sleep", waits.append)
    stub.failures = [500, 500, 429]
    upload(stub, dashboards(1), tmp_path, wait_s=2.0)
    assert waits == [2.0, 4.0, 8.0]


def test_no_connection_is_tried_again_and_reported(stub, tmp_path, monkeypatch):
    stub.server.shutdown()
    stub.server.server_close()
    with pytest.raises(OSError, match="looking for the source set set failed after 2 attempts") as caught:
        upload(stub, dashboards(1), tmp_path, attempts=2)
    assert isinstance(caught.value.__cause__, requests.ConnectionError)


@pytest.mark.parametrize("failures, calls", [([200, 400], 2), ([200, 500, 500], 3)])
def test_after_a_failure_the_next_call_goes_on_where_it_ended(stub, tmp_path, failures, calls):
    stub.failures = failures
    with pytest.raises(OSError, match="uploading features 128 to 255 failed"):
        upload(stub, dashboards(), tmp_path, attempts=2)
    assert stub.calls.count("POST /api/feature/upload-batch") == calls
    upload(stub, dashboards(), tmp_path)
    assert [batch["features"][0]["index"] for batch in stub.batches] == [0, 128, 256]
    upload(stub, dashboards(), tmp_path)
    assert len(stub.batches) == 3


def test_features_that_have_changed_are_sent_again(stub, tmp_path):
    content = dashboards()
    upload(stub, content, tmp_path)
    content[200] = dashboards(201, density=0.75)[200]
    upload(stub, content, tmp_path)
    assert [batch["features"][0]["index"] for batch in stub.batches] == [0, 128, 256, 128]


def test_a_refused_key_says_so(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "wrong")
    with pytest.raises(PermissionError, match="refuses this API key"):
        upload(stub, dashboards(1), tmp_path)
    assert len(stub.calls) == 1


def test_a_missing_key_says_where_to_get_one(stub, tmp_path, monkeypatch):
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    with pytest.raises(PermissionError, match="Set NEURONPEDIA_API_KEY"):
        upload(stub, dashboards(1), tmp_path)
    with neuronpedia.api_key("np-key"):
        upload(stub, dashboards(1), tmp_path)
    assert len(stub.batches) == 1


def test_without_the_client_the_error_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "neuronpedia", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "saelens-cosine\[share\]"'):
        upload_dashboards(dashboards(1), "tiny", "set", 2)
    make_sae("cosine_batchtopk").save_inference_model(tmp_path)
    assert main(["share", str(tmp_path), "--neuronpedia", "tiny/set"]) == 2
    assert 'pip install "saelens-cosine[share]"' in capsys.readouterr().err


def test_dashboards_are_written_as_they_would_be_sent(tmp_path):
    content = dashboards(130)
    write_dashboards(content, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "features-000000.json",
        "features-000128.json",
    ]
    assert json.loads((tmp_path / "out" / "features-000128.json").read_text()) == json.loads(
        json.dumps([asdict(dashboard) for dashboard in content[128:]])
    )
    with pytest.raises(FileExistsError, match="exists"):
        write_dashboards(content, tmp_path / "out")


def test_the_command_takes_model_text_and_layer_from_the_saes_metadata(stub, tmp_path, capsys):
    sae = make_sae("per_feature_cosine_topk", d_in=192, d_sae=130)
    for name, value in {"hook_name": "blocks.3.hook_resid_post", "model_name": "bundled", "dataset_path": "bundled",
                        "context_size": 64, "prepend_bos": True, "max_norm_multiple": 3.0}.items():  # fmt: skip
        sae.cfg.metadata[name] = value
    sae.save_inference_model(tmp_path / "sae")
    arguments = [
        "share",
        str(tmp_path / "sae"),
        "--neuronpedia",
        "tiny/set",
        "--tokens",
        "3k",
        "--contexts",
        "2",
        "--quiet",
    ]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "https://neuronpedia.org/tiny/3-set" in output
    assert "of 3,072 tokens left out as in training" in output
    assert "0.00%" not in output  # the first token of each context, at 4.4 times the median norm
    assert [len(batch["features"]) for batch in stub.batches] == [128, 2]
    active = [f for batch in stub.batches for f in batch["features"] if f["activations"]]
    assert active
    for feature in active:
        assert len(feature["activations"]) <= 2
        assert len(feature["activations"][0]["tokens"]) == 64
        assert max(feature["activations"][0]["values"]) > 0
    assert json.loads((tmp_path / "sae" / command.RECORD).read_text())["tiny/3-set"].keys() == {"0", "128"}
    assert main(arguments) == 0
    assert len(stub.batches) == 2  # the same dashboards again: nothing to send


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"hook_name": "blocks.3.hook_resid_post"}, "Pass --model and --dataset"),
        ({"hook_name": "hook_embed", "model_name": "bundled", "dataset_path": "bundled"}, "names no layer"),
    ],
)
def test_metadata_that_does_not_say_enough_is_an_error(stub, tmp_path, capsys, metadata, message):
    sae = make_sae("cosine_topk")
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    sae.save_inference_model(tmp_path)
    assert main(["share", str(tmp_path), "--neuronpedia", "tiny/set", "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert stub.calls == []
