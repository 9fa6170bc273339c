"""Upload feature dashboards to Neuronpedia through its own client, `pip install "saelens-cosine[share]"`.

On Neuronpedia a source set is a family of SAEs on one model, and each layer of it a source, `<layer>-<set name>`, with numbered
features. The client takes at most 128 of them in one call. No dashboard software has to know the SAE's architecture.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from saelens_cosine.files.secrets import without_secrets
from saelens_cosine.files.whole import read_json, whole_folder, write_json
from saelens_cosine.metrics.dictionary.features import FeatureDashboard, TokenValue

BATCH = 128
"""Features that the client takes in one call."""

_T = TypeVar("_T")


def check_client() -> None:
    """Make sure that an upload could start.

    Raises:
        ModuleNotFoundError: the client is not installed.
        PermissionError: there is no API key.
    """
    try:
        import neuronpedia
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Neuronpedia\'s client is not installed. Install it with: pip install "saelens-cosine[share]"'
        ) from error
    if not (neuronpedia.get_api_key() or os.getenv("NEURONPEDIA_API_KEY")):
        raise PermissionError(
            "No Neuronpedia API key. Set NEURONPEDIA_API_KEY, or call neuronpedia.set_api_key; the key is under your "
            "account on neuronpedia.org."
        )


def upload_dashboards(
    dashboards: Iterable[FeatureDashboard],
    model_id: str,
    set_name: str,
    layer: int,
    *,
    new_model_layers: int | None = None,
    url: str | None = None,
    record: Path | None = None,
    attempts: int = 5,
    wait_s: float = 2.0,
    on_batch: Callable[[int], None] | None = None,
) -> str:
    """Upload dashboards of one SAE, creating the source set if there is none, and return the page's address.

    Args:
        dashboards: from `saelens_cosine.metrics.dictionary.features.feature_dashboards`; consumed a batch at a time.
        model_id: the model on Neuronpedia, such as `gpt2-small`.
        set_name: the source set, such as `res-cosine-16k`.
        layer: which of its sources: the layer of the SAE's hook point.
        new_model_layers: create the model too, unlisted and with this many layers. None where Neuronpedia has it.
        url: where the source set says it comes from, such as the Hub repository.
        record: file that notes what has been taken. A later call with the same file skips batches that are in it and have
            not changed, so a failed upload goes on where it ended.
        attempts: tries of each call that fails for a passing reason (connection, rate limit, server error).
        wait_s: seconds before the second try; doubled before each further one.
        on_batch: called with the number of features done so far.

    Raises:
        ModuleNotFoundError, PermissionError: see `check_client`.
        OSError: Neuronpedia refused, or could not be reached in all attempts.
        ValueError: the source set has no such layer.
    """
    check_client()

    def call(what: str, function: Callable[[], _T]) -> _T:
        return _with_retries(what, function, attempts, wait_s)

    source = _source(model_id, set_name, layer, new_model_layers, url, call)
    taken = _read(record)
    done = taken.setdefault(f"{model_id}/{source.id}", {})
    count = 0
    for batch in _batches(dashboards):
        first, last = str(batch[0].index), batch[-1].index
        digest = hashlib.sha256(json.dumps([asdict(d) for d in batch]).encode()).hexdigest()
        if done.get(first) != digest:
            features = [_feature(dashboard, source) for dashboard in batch]
            call(f"uploading features {first} to {last}", lambda features=features: source.upload_batch(features))
            done[first] = digest
            _write(record, taken)
        count += len(batch)
        if on_batch is not None:
            on_batch(count)
    return f"https://neuronpedia.org/{model_id}/{source.id}"


def write_dashboards(dashboards: Iterable[FeatureDashboard], folder: Path) -> None:
    """Write dashboards to a new folder as JSON, a file per batch of the upload.

    Raises:
        FileExistsError: the folder exists.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as unfinished:
        for batch in _batches(dashboards):
            _write(unfinished / f"features-{batch[0].index:06d}.json", [asdict(dashboard) for dashboard in batch])


def _batches(dashboards: Iterable[FeatureDashboard]) -> Iterator[list[FeatureDashboard]]:
    rest = iter(dashboards)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _source(
    model_id: str, set_name: str, layer: int, new_model_layers: int | None, url: str | None, call: Callable[..., Any]
) -> Any:
    from neuronpedia.np_model import Model
    from neuronpedia.np_source_set import SourceSet

    def existing() -> SourceSet | None:
        try:
            return SourceSet.get(model_id, set_name)
        except OSError as error:  # requests' HTTPError; the client leaves the status in the text only
            if "Resource not found" in str(error):
                return None
            raise

    source_set = call(f"looking for the source set {set_name}", existing)
    if source_set is None:
        if new_model_layers is not None:
            call(f"creating the model {model_id}", lambda: Model.new(model_id, new_model_layers))
        source_set = call(
            f"creating the source set {set_name} of the model {model_id}",
            lambda: SourceSet.new(set_name, model_id, "Cosine-scored SAEs (saelens-cosine)", url),
        )
    return source_set.get_source_for_layer_number(layer)


def _feature(dashboard: FeatureDashboard, source: Any) -> Any:
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_feature import Feature, Logit

    def logits(ends: Sequence[TokenValue]) -> list[Logit]:
        return [Logit(end.token, end.value) for end in ends]

    return Feature(
        modelId=source.model_id,
        source=source.id,
        index=dashboard.index,
        density=dashboard.density,
        top_logits=logits(dashboard.top_logits),
        bottom_logits=logits(dashboard.bottom_logits),
        activations=[
            Activation(source.model_id, source.id, dashboard.index, list(context.tokens), list(context.values))
            for context in dashboard.contexts
        ],
    )


def _with_retries(what: str, function: Callable[[], _T], attempts: int, wait_s: float) -> _T:
    from neuronpedia.requests.base_request import NPInvalidResponseError, NPRateLimitError, NPUnauthorizedError

    for attempt in range(1, attempts + 1):
        try:
            with redirect_stdout(io.StringIO()):  # the client prints a line per request
                return function()
        except NPUnauthorizedError as error:
            raise PermissionError(f"Neuronpedia refuses this API key ({what}). Check NEURONPEDIA_API_KEY.") from error
        except (NPRateLimitError, NPInvalidResponseError, OSError) as error:
            if attempt == attempts or not _may_pass(error):
                tries = f" after {attempt} attempts" if attempt > 1 else ""
                raise OSError(
                    f"Neuronpedia: {what} failed{tries}: {without_secrets(str(error))} Batches taken before stay uploaded; "
                    "run it again to go on."
                ) from error
        time.sleep(wait_s * 2 ** (attempt - 1))
    raise ValueError(f"attempts={attempts} must be at least 1.")


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed. The client raises HTTPError with the status in the text and no response."""
    from requests import HTTPError

    return not isinstance(error, HTTPError) or "Server error" in str(error)


def _read(record: Path | None) -> dict[str, dict[str, str]]:
    if record is None or not record.is_file():
        return {}
    try:
        content: Any = read_json(record)
        return {str(name): dict(sent) for name, sent in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{record} is damaged ({error}), so what Neuronpedia has taken before is not known. Move it away to upload all again."
        ) from error


def _write(path: Path | None, content: Any) -> None:
    if path is not None:
        write_json(content, path, indent=None)
