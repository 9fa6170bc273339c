"""`saelens-cosine share`: its options, and what it does with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars

from saelens_cosine.activations.contexts import ContextForm, read_contexts
from saelens_cosine.activations.models import load_hooked_model
from saelens_cosine.activations.text import load_text
from saelens_cosine.devices import check_device
from saelens_cosine.files.names import below, check_name
from saelens_cosine.metrics.dictionary.features import feature_dashboards, top_activations
from saelens_cosine.progress import Progress
from saelens_cosine.sharing.hub import gather, load_for_sharing, saved_saes, upload, write
from saelens_cosine.sharing.neuronpedia import check_client, upload_dashboards, write_dashboards
from saelens_cosine.terminal.bar import progress_bar
from saelens_cosine.terminal.options import add_command, count

RECORD = "neuronpedia.json"
"""File in an SAE's folder that notes what Neuronpedia has taken, so that an upload can go on. It is not published."""


def add_share_command(commands: Any) -> None:
    """Add `share` to the subcommands of `saelens-cosine`."""
    parser = add_command(
        commands,
        "share",
        run_share,
        description="Publish a saved SAE, or all of a comparison, on the Hugging Face Hub in one commit, with a card that says "
        "how to load it and what was measured; and dashboards of an SAE's features on Neuronpedia.",
    )
    parser.add_argument("path", type=Path, help="folder of a saved SAE, or one that `compare` has written")
    parser.add_argument("--dry-run", action="store_true", help="write to --output what would be sent, and send nothing")
    parser.add_argument("--output", type=Path, default=Path("runs/share"), help="folder for --dry-run")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    hub = parser.add_argument_group("Hugging Face Hub (log in with `hf auth login`, or set HF_TOKEN)")
    hub.add_argument("--repo", metavar="OWNER/NAME", help="repository; created if it does not exist")
    hub.add_argument("--id", help="id of a single SAE in SAE.from_pretrained(repo, id); its hook point if not given")
    hub.add_argument("--license", help="stated on the card, as the Hub names licenses: mit, apache-2.0")
    hub.add_argument("--private", action="store_true", help="create the repository private")
    hub.add_argument("--replace-card", action="store_true", help="replace the README.md that the repository has")
    pages = parser.add_argument_group("Neuronpedia (pip install 'saelens-cosine[share]', set NEURONPEDIA_API_KEY)")
    pages.add_argument("--neuronpedia", metavar="MODEL/SET", help="upload dashboards: gpt2-small/res-cosine-16k")
    pages.add_argument("--new-model", action="store_true", help="create MODEL on Neuronpedia, unlisted, and then SET")
    pages.add_argument("--model", help="language model; the one that the SAE's metadata names if not given")
    pages.add_argument("--dataset", help="text; likewise")
    pages.add_argument("--tokens", type=count, default=1_000_000, help="tokens to look for activations in")
    pages.add_argument("--contexts", type=int, default=20, help="contexts shown of each feature")
    pages.add_argument("--device", default="cpu", help="where the model and the SAE run: cpu, cuda, cuda:1")


def run_share(options: Any) -> int:
    """Publish, and print where."""
    check_options(options)
    options.interrupted = "Run the same command again to go on."
    if options.repo:
        print(share_on_hub(options))  # noqa: T201
    if options.neuronpedia:
        with progress_bar(options.quiet) as progress:
            message = share_on_neuronpedia(options, progress)
        print(message)  # noqa: T201
    return 0


def check_options(options: Any) -> None:
    """Refuse what cannot be done before anything is loaded or sent.

    Raises:
        ValueError: no target, not one SAE for Neuronpedia, nothing to look for, or a device that is not there.
        ModuleNotFoundError, PermissionError: Neuronpedia's client or its key is missing.
    """
    if not options.repo and not options.neuronpedia:
        raise ValueError("Say where to: --repo OWNER/NAME for the Hugging Face Hub, --neuronpedia MODEL/SET, or both.")
    if options.neuronpedia:
        if options.neuronpedia.count("/") != 1:
            raise ValueError(f"--neuronpedia {options.neuronpedia!r} must be MODEL/SET, such as gpt2-small/res-cosine.")
        check_name(options.neuronpedia, "MODEL/SET of --neuronpedia")
        if options.tokens < 1 or options.contexts < 1:
            raise ValueError(f"--tokens {options.tokens}, --contexts {options.contexts}: both must be positive.")
        check_device(options.device)
        folders = saved_saes(options.path)
        if "" not in folders:
            raise ValueError(
                f"{options.path} holds {len(folders)} SAEs, and a source on Neuronpedia is one. Name its folder: "
                f"{', '.join(str(folder) for folder in folders.values())}."
            )
        if not options.dry_run:
            check_client()


def share_on_hub(options: Any) -> str:
    """Upload to the Hub, or write what would be; returns what to tell the user."""
    bundle = gather(options.path, options.repo, options.id, options.license)
    unnamed = ""
    if bundle.unnamed:
        unnamed = (
            f"\nOn this machine only, and published without their place: {', '.join(bundle.unnamed)}. To have others find "
            "them, put their names on the Hub into the metadata in cfg.json."
        )
    if options.dry_run:
        folder = write(bundle, options.output / "hub")
        return f"Nothing was sent. Written to {folder}: {len(bundle.files)} files for {options.repo}.{unnamed}"
    if options.quiet:
        disable_progress_bars()
    published = upload(bundle, private=options.private, replace_card=options.replace_card)
    kept = "\nIts README.md was there before and is unchanged; --replace-card writes the new one."
    loads = "".join(f'\n  SAE.from_pretrained("{options.repo}", "{sae_id}")' for sae_id in bundle.sae_ids)
    return f"{published.url}{loads}{kept if published.card_kept else ''}{unnamed}"


def share_on_neuronpedia(options: Any, progress: Progress) -> str:
    """Compute dashboards and upload them, or write what would be; returns what to tell the user."""
    model_id, set_name = options.neuronpedia.split("/")
    sae = load_for_sharing(options.path).to(options.device)
    metadata = sae.cfg.metadata
    name, dataset, hook = (
        options.model or metadata.model_name,
        options.dataset or metadata.dataset_path,
        metadata.hook_name,
    )
    if not (name and dataset and hook):
        raise ValueError(
            f"The metadata of {options.path} name model={metadata.model_name}, dataset={metadata.dataset_path}, "
            f"hook={hook}. Pass --model and --dataset; an SAE without a hook name has no place on Neuronpedia."
        )
    layer = re.search(r"\.(\d+)(\.|$)", hook)
    if layer is None:
        raise ValueError(f"The hook {hook!r} names no layer, and a source on Neuronpedia is one layer of a model.")
    progress("Loading the model", 0, 1)
    model = load_hooked_model(
        name,
        options.device,
        hook=hook,
        class_name=metadata.model_class_name,
        kwargs=metadata.model_from_pretrained_kwargs,
    )
    metadata.hook_name = model.hook_name  # as this model calls it
    form = ContextForm.of(metadata, longest=model.context_size)
    store = form.store(model.model, load_text(dataset).train, model.hook_name, model.d_in, options.device)
    batches = read_contexts(store, options.tokens, progress)
    activations = top_activations(sae, model.model, batches, options.contexts, metadata.max_norm_multiple)
    if not activations.tokens_evaluated:
        raise ValueError(
            f"Dataset {dataset!r} is shorter than 16 contexts of {store.context_size} tokens; name another."
        )
    dashboards = feature_dashboards(sae, model.model, activations)
    sinks = f"{activations.high_norm_share_dropped:.2%} of {activations.tokens_seen:,} tokens left out as in training"
    if options.dry_run:
        folder = below(options.output / "neuronpedia", f"{layer[1]}-{set_name}", "source on Neuronpedia")
        write_dashboards(dashboards, folder)
        return f"Nothing was sent. Dashboards are in {folder}; {sinks}."
    url = upload_dashboards(
        dashboards,
        model_id,
        set_name,
        int(layer[1]),
        new_model_layers=_n_layers(model.model) if options.new_model else None,
        url=f"https://huggingface.co/{options.repo}" if options.repo else None,
        record=options.path / RECORD,
        on_batch=lambda done: progress("Uploading features", done, sae.cfg.d_sae),
    )
    return f"{url}\n{sinks}"


def _n_layers(model: Any) -> int:
    return model.cfg.n_layers if hasattr(model, "cfg") else model.model.config.get_text_config().num_hidden_layers
