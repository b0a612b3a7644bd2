"""`discrete-lit models`: the published models that have a name here."""

from json import dumps
from typing import Any

from discrete_lit.pretrained.catalogue import ModelEntry, by_hand, find_model, matching, published_models
from discrete_lit.pretrained.obtaining import cache_folder, places


def models(name: str | None = None, *, word: str | None = None, json: bool = False) -> None:
    """List the published models that `sample` takes by their names, or show one.

    A list of your own, in the form of `discrete_lit/pretrained/published.yaml`, is named by the environment variable
    DISCRETE_LIT_MODELS.

    Args:
        name: the model to show; all by default. It may stand without its option: `discrete-lit models rar_b`.
        word: show those alone that have it in their name, family, source or licence.
        json: print JSON, for other programs.

    Raises:
        ValueError: no such model, or a list of your own that cannot be read.
    """
    entries = [find_model(name)] if name is not None else matching(word, published_models().values())
    if json:
        described = [described_entry(entry) for entry in entries]
        print(dumps(described[0] if name is not None else described, indent=2))
    elif name is not None:
        _show(entries[0])
    else:
        _list(entries, word)


def described_entry(entry: ModelEntry) -> dict[str, Any]:
    """Describe an entry as plain data, with the addresses and the places of its files in the cache."""
    found = [{"address": address, "place": str(place), "there": place.exists()} for address, place in places(entry)]
    return {**entry.described(), "downloads": found}


def measuring(entry: ModelEntry) -> list[str]:
    """List the commands that measure the number which was published with a model: FID of samples, rFID of images."""
    kind, size = entry.published.partition(" ")[0], entry.image_size
    evaluate = "discrete-lit evaluate --protocol"
    if kind == "FID" and size is not None:
        side = 512 if size == 512 else 256
        # Published numbers of samples of 384 pixels are of images shrunk to 256.
        shrunk = "" if side == size else f" --image_size {side}"
        accepted = " --accept_licence true" if entry.accept else ""
        reference = "VIRTUAL_imagenet512.npz" if side == 512 else "VIRTUAL_imagenet256_labeled.npz"
        return [
            f"discrete-lit sample --model {entry.name}{accepted} --num_samples 50000{shrunk} "
            f"--output samples/{entry.name}",
            f"{evaluate} gfid_adm50k --reference {reference} --image_size {side} "
            f"--samples '{{{entry.name}: samples/{entry.name}/samples.npz}}' --output runs/{entry.name}",
        ]
    if kind == "rFID" and size is not None:
        images = "shards/imagenet/validation"
        return [
            f"{evaluate} rfid_val50k --reference {images} --held_out {images} --image_size {size} "
            f"--reconstructions '{{{entry.name}: model://{entry.name}}}' --output runs/{entry.name}"
        ]
    return []


def _list(entries: list[ModelEntry], word: str | None) -> None:
    if not entries:
        raise ValueError(f"no published model has the word {word!r}: `discrete-lit models` lists all")
    rows = [
        (entry.name, entry.family, str(entry.image_size or ""), entry.tokenizer or "", entry.published)
        for entry in entries
    ]
    head = ("name", "family", "size", "tokenizer", "published")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{len(entries)} models: `discrete-lit models NAME` shows one, `discrete-lit sample --model NAME` draws")
    if word is None:
        print("\nBy hand, then `discrete-lit import`:")
        for family, reason in by_hand().items():
            print(f"  {family}: {reason}")


def _show(entry: ModelEntry) -> None:
    licence = entry.licence or "not stated here, see the source"
    must = ", which must be accepted (--accept_licence true)" if entry.accept else ""
    print(f"{entry.name}: {entry.published or 'no number published with it'}")
    print(f"  family            {entry.family}")
    print(f"  source            {entry.source}")
    print(f"  licence           {licence}{must}")
    print(f"  image size        {entry.image_size or 'none'}")
    print(f"  tokenizer         {entry.tokenizer or 'in the same file, or none'}")
    print(f"  reference_config  {dumps(entry.reference_config) if entry.reference_config else 'none needed'}")
    for file, (address, place) in zip(entry.files, places(entry), strict=True):
        print(f"  download          {address}")
        print(f"    SHA-256         {file.sha256 or 'not published: its size is checked, and what the server states'}")
        print(f"    in the cache    {place}{'' if place.exists() else ' (not there)'}")
    print(f"  cache             {cache_folder()}")
    if commands := measuring(entry):
        print(
            f"\nTo measure {entry.published.partition(' ')[0]} again, on ImageNet (docs/evaluation.md, data/README.md):"
        )
        print("\n".join(f"  {command}" for command in commands))
